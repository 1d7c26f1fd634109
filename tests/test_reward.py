"""common/reward.py: rewards in worker processes; whatever a reward does, its sample scores 0 and
nothing else notices"""
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest

import data
from common import reward as R

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = data.Problem("2+2=", "4", id=7, data={"target": 4})

REWARDS = r'''
import math, os, re, signal, subprocess, sys, time

def score(problem, text):
    word, _, value = text.partition(" ")
    if word == "score":
        return float(value)
    if word == "gold":
        return problem.gold == value and problem.data["target"] == 4
    if word == "give":
        return eval(value)
    if word == "raise":
        raise ValueError("first line\nno number in " + value)
    if word == "exit":
        sys.exit(3)
    if word == "die":
        os._exit(3)
    if word == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if word == "sleep":
        time.sleep(float(value))
        return 1
    if word == "wrong":
        time.sleep(float(value))
        return 0
    if word == "hang":
        while True:
            pass
    if word == "regex":
        return bool(re.match(r"(a+)+$", "a" * 60 + "b"))
    if word == "print":
        print("[[[ 1, 2", flush=True)
        os.write(1, b"garbage\n" * 100)
        subprocess.run([sys.executable, "-c", "print('from a child')"])
        return sys.stdin.read() == ""
    if word == "fork":
        os.fork()
        return 0.5
    if word == "child":
        child = subprocess.Popen(["sleep", "60"])
        with open(value, "w") as f:
            f.write(str(child.pid))
        while True:
            pass
    if word == "pid":
        return os.getpid()
    if word == "spoil":
        problem.data["target"] = 5
        return 0
'''


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my.py").write_text(REWARDS)
    return tmp_path


@pytest.fixture
def make(folder):
    made = []

    def go(spec=None, **kw):
        lines = []
        made.append(R.Rewards(spec or f"{folder}/my.py:score", log=lines.append, **kw))
        made[-1].lines = lines
        return made[-1]
    yield go
    for rewards in made:
        rewards.close()


def drain(rewards, seconds=200):
    out, end = [], time.monotonic() + seconds
    while rewards.pending:
        assert time.monotonic() < end, f"{rewards.pending} jobs never came back"
        out += rewards.get(block=True)
    return out


def ask(rewards, *texts):
    """-> the results in the order of the texts"""
    for i, text in enumerate(texts):
        rewards.put((7, i), PROBLEM, text)
    return [(reward, info) for _, reward, info in sorted(drain(rewards))]


def gone(pid, seconds=100):
    """no such process, or a zombie that only waits for an init that is slow to reap"""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True,
                               text=True).stdout.strip()
        if not state or state.startswith("Z"):
            return True
        time.sleep(0.05)
    return False


# --------------------------------------------------------------------------------------------------
# what it is for

def test_a_task_by_its_name(make):
    task = data.load("countdown:search")
    problems = task.problems("test", 50, 0)
    rewards = make("countdown:search")
    for problem in problems:
        rewards.put((problem.id, 0), problem, "#" + problem.gold)
        rewards.put((problem.id, 1), problem, "#1+1=2")
    found = {key: reward for key, reward, _ in drain(rewards)}
    assert found == {(p.id, i): 1.0 - i for p in problems for i in (0, 1)} and rewards.failed == {}


def test_a_file_and_its_function(make):
    results = ask(make(), "score 0.25", "gold 4", "gold 5", "give 3", "give True",
                  "give -1e300", "give __import__('numpy').float32(0.5)")
    assert [reward for reward, _ in results] == [0.25, 1.0, 0.0, 3.0, 1.0, -1e300, 0.5]
    assert all(type(reward) is float and info.error is None and info.seconds >= 0 for reward, info in results)


def test_the_callers_folder_and_the_files_own_modules(make, folder, monkeypatch):
    """a data.py beside the user's reward, or where the run was started, must not be taken for
    ours: problems are made of ours"""
    (folder / "data.py").write_text("raise RuntimeError('the wrong data')")
    (folder / "helper.py").write_text("from dataclasses import dataclass\n"
                                      "@dataclass\nclass A:\n    x: int = 3\n")
    (folder / "other.py").write_text("import helper\ndef score(problem, text):\n"
                                     "    return helper.A().x + len(open(text).read())\n")
    (folder / "facts.txt").write_text("12345")
    monkeypatch.chdir(folder)
    assert ask(make("other.py:score"), "facts.txt")[0][0] == 8.0


def test_workers_import_no_torch(make, folder):
    """a second of import and 300 MB each, and a kill would cost as much again"""
    (folder / "light.py").write_text("import sys\ndef score(problem, text):\n"
                                     "    return 'torch' in sys.modules\n")
    assert ask(make(f"{folder}/light.py:score"), "")[0][0] == 0.0
    code = "import sys, common.reward; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True,
                          text=True).stdout == "False\n"


def test_nothing_waits(make):
    """put and get return at once: before the workers are there, while they are busy, and while
    one does not read its pipe"""
    rewards = make(workers=1)
    assert (rewards.get() == [] and rewards.get(block=True) == []
            and rewards.workers == []), "no worker before it is needed"
    begin = time.monotonic()
    rewards.put(0, PROBLEM, "sleep 0.5")
    assert rewards.get() == [], "nothing waits for it"
    assert rewards.get(block=True)[0][:2] == (0, 1) and time.monotonic() - begin > 0.5, "and this one waits"
    os.kill(rewards.workers[0].proc.pid, signal.SIGSTOP)
    for i in range(3):
        rewards.put(i, PROBLEM, "score " + "1" * 3 + " " * 1_000_000)         # larger than a pipe
        assert rewards.get() == []
    os.kill(rewards.workers[0].proc.pid, signal.SIGCONT)
    assert [reward for _, reward, _ in drain(rewards)] == [111, 111, 111] and rewards.failed == {}


def test_slow_jobs_run_side_by_side(make):
    """quick jobs travel many to a message; with slow ones about, nothing may be stuck behind one
    while a worker is idle"""
    rewards = make()
    ask(rewards, *["sleep 0.1"] * 6)
    for i, text in enumerate(["sleep 0.2", "sleep 0.2", "sleep 1", *["score 1"] * 7]):
        rewards.put(i, PROBLEM, text)
    assert drain(rewards)[-1][0] == 2


def test_no_job_sees_what_another_did(make):
    results = ask(make(workers=1), "spoil", "gold 4", "spoil", "gold 4")
    assert [reward for reward, _ in results] == [0, 1, 0, 1] and PROBLEM.data == {"target": 4}


def test_the_reward_is_the_text_of_the_file_as_the_run_began(make, folder):
    """a user edits my.py for the next experiment while this one runs; a replaced worker must
    not pick that up"""
    rewards = make()
    (folder / "my.py").write_text("def score(problem, text):\n    return 1/0\n")
    results = ask(rewards, "die", "die", "die", "score 0.5")
    assert results[3] == (0.5, (results[3][1].seconds, None)) and rewards.failed == {"died": 3}


# --------------------------------------------------------------------------------------------------
# what goes wrong

@pytest.mark.parametrize("text, kind, says", [
    ("raise it", "raised", "no number in it (my.py, line "),
    ("exit", "raised", "SystemExit: 3"),
    ("give math.nan", "value", "returned nan (float), not a finite number"),
    ("die", "died", "exit code 3"),
    ("crash", "died", "SIGSEGV"),
    ("hang", "timeout", "still running after 0.5 s"),
    ("regex", "timeout", "still running after 0.5 s"),
])
def test_a_failure_scores_0_is_counted_and_named(make, text, kind, says):
    rewards = make(workers=1, timeout_min=0.5)
    results = ask(rewards, "score 1", text, "score 2", "score 3")
    assert [reward for reward, _ in results] == [1, 0, 2, 3] and rewards.failed == {kind: 1}
    assert says in results[1][1].error and [info.error for _, info in results[2:]] == [None, None]
    assert len(rewards.lines) == 1 and "\n" not in rewards.lines[0]
    assert "problem 7, sample 1: " in rewards.lines[0] and says in rewards.lines[0]
    assert f"({kind}," in rewards.lines[0]


def test_what_is_no_number(make):
    rewards = make(workers=1)
    values = {"math.inf": "inf (float)", "None": "None (NoneType)",
              "'1'": "'1' (str)", "[1.0]": "[1.0] (list)", "10**400": "(int)",
              "__import__('numpy').zeros(2)": "array([0., 0.]) (ndarray)"}
    for says, (reward, info) in zip(values.values(), ask(rewards, *(f"give {value}" for value in values))):
        assert reward == 0 and says in info.error
    assert rewards.failed == {"value": 6}


def test_a_problem_that_a_worker_cannot_read_back(make):
    class Odd:
        prompt = "?"

        def __reduce__(self):
            return __import__, ("no_such_module",)
    rewards = make()
    rewards.put((1, 2), Odd(), "score 1")
    (_, reward, info), = drain(rewards)
    assert reward == 0 and "no_such_module" in info.error and rewards.failed == {"raised": 1}


def test_the_log_is_not_flooded(make):
    rewards = make()
    ask(rewards, *["raise x"] * 250)
    assert rewards.failed == {"raised": 250}
    assert [line.split(", ")[1].split()[0] for line in rewards.lines] == ["1", "2", "3",
                                                                          "10", "30", "100", "200"]


def test_prints_do_not_reach_the_pipe(make):
    """answers travel over what was the worker's stdout: a print in a reward, or in a process it
    starts, must not become an answer"""
    assert [reward for reward, _ in ask(make(), "print", "score 0.5", "print")] == [1, 0.5, 1]


def test_a_reward_that_forks_answers_once(make):
    rewards = make(workers=1)
    assert [reward for reward, _ in ask(rewards, "fork", "fork", "score 1")] == [0.5, 0.5, 1.0]
    assert rewards.failed == {}


def test_a_hanging_rewards_children_go_with_it(make, folder):
    ask(make(timeout_min=1.0), f"child {folder}/pid")
    assert gone((folder / "pid").read_text())


def test_who_is_replaced(make, monkeypatch):
    """after a hang always; after an exception too, for it may leave the module in any state, but
    never so often that start-ups become the work: a reward that raises on every tenth text would
    otherwise cost a start-up every tenth text"""
    rewards = make(workers=1, timeout_min=0.5)

    def pid():
        return ask(rewards, "pid")[0][0]

    first = pid()
    ask(rewards, "raise x")
    assert pid() == first
    monkeypatch.setattr(R, "RENEW", 0)
    ask(rewards, "raise x")
    second = pid()
    ask(rewards, "hang")
    third = pid()
    assert len({first, second, third}) == 3 and gone(first) and gone(second)


def test_nothing_is_lost_or_doubled(make):
    """2,000 jobs, of which some fail in every way: the others come back, once each, with their own values"""
    random = Random(0)
    kinds = {"raise x": "raised", "give math.nan": "value", "die": "died", "crash": "died", "hang": "timeout"}
    texts = [f"score {i}" for i in range(2000)]
    for text, n in zip(kinds, (40, 40, 5, 5, 2)):
        for i in random.sample(range(2000), n):
            texts[i] = text
    rewards = make(timeout_min=1.0)
    out = []
    for i in range(2000):
        rewards.put((i, 0), PROBLEM, texts[i])
        if i % 8 == 0:
            out += rewards.get()
    out += drain(rewards)
    assert sorted(key[0] for key, _, _ in out) == list(range(2000))
    assert all(reward == (0 if texts[i] in kinds else i) for (i, _), reward, _ in out)
    assert rewards.failed == Counter(kinds[text] for text in texts if text in kinds)


def test_a_file_that_no_longer_starts_is_said(make, folder):
    """rewards that fail are part of a run; workers that cannot begin are its end, in one line
    instead of a night of zeros"""
    (folder / "gone.py").write_text("1/0")
    rewards = make(f"{folder}/gone.py:score")
    rewards.put(0, PROBLEM, "x")
    with pytest.raises(RuntimeError, match=r"gone.py:score: the file "
                       r"does not import: ZeroDivisionError.*\(gone.py, line 1\)"):
        drain(rewards)
    assert len(rewards.lines) == 2, "it was tried again first"


# --------------------------------------------------------------------------------------------------
# the limit of a problem

def test_the_limit_follows_what_was_right(make):
    """T = min(max(T_min, 1.5 * longest of the correct answers of this problem), T_max); a wrong
    answer may be slow for any reason"""
    rewards = make(timeout_min=3.0, timeout_max=3.4)
    other = data.Problem("another")
    assert rewards.timeout(PROBLEM.prompt) == 3.0
    rewards.put((8, 0), other, "wrong 2.2")
    ask(rewards, "sleep 2.2", "score 1")
    assert 3.3 <= rewards.timeout(PROBLEM.prompt) <= 3.4 and rewards.timeout(other.prompt) == 3.0
    rewards.timeout_max = 3.1
    assert rewards.timeout(PROBLEM.prompt) == 3.1


def test_late_is_late_even_if_nobody_looked(make):
    """the parent may be away in an update for a minute: what counts is the worker's clock, or
    results would depend on ours"""
    rewards = make(workers=1, timeout_min=1.5)
    ask(rewards, "score 1")
    rewards.put((7, 0), PROBLEM, "sleep 1.8")
    rewards.put((7, 1), PROBLEM, "score 1")
    time.sleep(2.5)
    assert [(reward, info.error is None)
            for _, reward, info in sorted(drain(rewards))] == [(0, False), (1, True)]
    assert rewards.failed == {"timeout": 1}


# --------------------------------------------------------------------------------------------------
# said before the run starts

@pytest.mark.parametrize("spec, says", [
    ("my.py:score", None),
    ("countdown:search:4", None),
    ("none.py:score", "cannot read none.py: No such file or directory"),
    ("my.py:scor", "no function 'scor'; it has score"),
    ("my.py", "which function of it"),
    ("number.py:score", "score is float, not a function"),
    ("one.py:score", r"cannot be called as score\(problem, text\)"),
    ("needs.py:score", r"ModuleNotFoundError: No module named 'no_such_package' \(needs.py, line 2\)"),
    ("syntax.py:score", r"SyntaxError: .*\(syntax.py, line 2\)"),
    ("leaves.py:score", "exit code 5"),
    ("countdwn", "unknown task 'countdwn': did you mean 'countdown'"),
    ("", "unknown task"),
])
def test_check(folder, monkeypatch, spec, says):
    (folder / "number.py").write_text("score = 1.0")
    (folder / "one.py").write_text("def score(text):\n    return 1.0")
    (folder / "needs.py").write_text("\nimport no_such_package")
    (folder / "syntax.py").write_text("\ndef score(:\n    return 1.0")
    (folder / "leaves.py").write_text("import os; os._exit(5)")
    monkeypatch.chdir(folder)
    if says is None:
        R.check(spec)
        return
    with pytest.raises(ValueError, match=says) as e:
        R.check(spec)
    assert "\n" not in str(e.value) and str(e.value).startswith(f"reward {spec}: ")


def test_check_does_not_wait_for_ever(folder, monkeypatch):
    (folder / "slow.py").write_text("while True: pass")
    monkeypatch.setattr(R, "START", 0.5)
    with pytest.raises(ValueError, match="while it was imported, still running after 0.5 s"):
        R.check(f"{folder}/slow.py:score")


# --------------------------------------------------------------------------------------------------
# how it ends

DRIVER = """
import json, os, signal, sys, time
from common.reward import Rewards
import data
signals = []
signal.signal(signal.SIGINT, lambda *_: signals.append(1))
rewards = Rewards(sys.argv[1], timeout_min=20)
def put(*texts):
    for i, text in enumerate(texts):
        rewards.put((0, i), data.Problem("p"), text)
def drain():
    out = []
    while rewards.pending:
        out += rewards.get(block=True)
    return [reward for _, reward, _ in sorted(out)]
put("score 1", "score 1")
drain()
pids = [w.proc.pid for w in rewards.workers]
"""


def drive(folder, code):
    return subprocess.Popen([sys.executable, "-c", DRIVER + textwrap.dedent(code),
                             f"{folder}/my.py:score"], cwd=folder, text=True, stdout=subprocess.PIPE,
                            start_new_session=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_ctrl_c_leaves_the_workers_alone(folder):
    """it reaches the whole group of a terminal; the run finishes its step and saves, and for that
    it needs its rewards"""
    p = drive(folder, """
        # so that both have started: one of them may have done all before
        put("sleep 0.2", "sleep 0.2")
        drain()
        put("sleep 0.7", "sleep 0.7")
        rewards.get()
        print(json.dumps(pids), flush=True)
        print(json.dumps([drain(), rewards.failed, len(signals),
                          pids == [w.proc.pid for w in rewards.workers]]))
    """)
    pids = json.loads(p.stdout.readline())
    os.killpg(p.pid, signal.SIGINT)
    assert [os.getsid(pid) for pid in pids] == pids
    for pid in pids:                  # and a batch system may send these to every process there is
        os.kill(pid, signal.SIGINT)
        os.kill(pid, signal.SIGTERM)
    assert json.loads(p.communicate(timeout=300)[0]) == [[1, 1], {}, 1, True] and p.returncode == 0
    assert all(map(gone, pids)), "leaving the program is enough to end them"


def test_workers_die_with_their_parent(folder):
    """killed without a word, while one worker hangs inside C code that holds the interpreter and
    one has nothing to do"""
    p = drive(folder, """
        put("regex", "score 1")
        rewards.get(block=True)
        print(json.dumps(pids), flush=True)
        time.sleep(60)
    """)
    pids = json.loads(p.stdout.readline())
    p.kill()
    p.communicate()
    assert len(pids) == 2 and all(map(gone, pids))


def test_close_twice_and_no_zombies(make):
    rewards = make(timeout_min=0.5)
    ask(rewards, "score 1", "hang", "die", "crash", "score 1")
    pids = [w.proc.pid for w in rewards.workers]
    rewards.put(0, PROBLEM, "hang")
    rewards.close()
    rewards.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert rewards.pending == 0 and rewards.get(block=True) == []


def test_a_fork_of_the_parent_leaves_the_workers_alone(make):
    """a data loader's process leaves through the same exit handlers"""
    rewards = make()
    ask(rewards, "score 1")
    child = os.fork()
    if child == 0:
        rewards.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert ask(rewards, "score 2")[0][0] == 2 and rewards.failed == {}
