"""data/gym.py: the tasks of the package reasoning-gym; and what happens without the package"""
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import data
import nanorl
from common.reward import Rewards
from data import reasoning

ROOT = Path(__file__).resolve().parent.parent
QUICK = ["gym:chain_sum", "gym:leg_counting", "gym:spell_backward"]


def run(*words, **env):
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, **env})


# --------------------------------------------------------------------------------------------------
# without the package

def test_a_missing_package_is_one_line_with_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)      # so Python says: no such module
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as e:
        nanorl.main(["--task", "gym:chain_sum", "--name", "g"])
    said = capsys.readouterr().err
    assert e.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    assert "python -m pip install reasoning-gym" in said and not list(tmp_path.iterdir())


@pytest.mark.parametrize("task, answer, may", [
    ("n_queens", "[['Q', '_'], ['_', 'Q']]", True),
    ("n_queens", "_ Q _\nQ _ _", True),                          # no Python: eval refuses it, too
    ("spiral_matrix", "[1, -2]", True),
    ("spiral_matrix", "[1, open('x', 'w')]", False),
    ("spiral_matrix", "'a' * 9**9", False),
    ("string_insertion", "ABCDE", True),
    ("string_insertion", "[c for c in 'ab']", False),
    ("binary_matrix", "().__class__", False),
    ("binary_matrix", "(lambda: 1)()", False),
    ("countdown", "(3 + 4) * 5 / 2", True),
    ("countdown", "__import__('os').getpid()", False),
    ("countdown", "24!", False),                                 # sympy would read what Python does not
    ("countdown", "'eval%c1' % 40", False),
    ("simple_integration", "9*X**10 + sqrt(X)/4 + C", True),
    ("simple_integration", "\"eval\\x28'1'\\x29\"", False),      # sympy reads a text as a formula again
    ("simple_integration", "sqrt('exit()')", False),
    ("simple_integration", "f'{40:c}'", False),
    ("simple_integration", "X.subs(X, 1)", False),
    ("simple_integration", "(sin)(X)", True),
    ("simple_integration", "ｅval(1)", False),
    ("chain_sum", "open('x')", True),                            # compared, never evaluated
])
def test_an_answer_is_read_before_it_is_evaluated(task, answer, may):
    """score_answer of these tasks is eval(answer): a policy that is paid for its answers would have
    run code in the process that pays"""
    assert reasoning.harmless(task, answer) is may


# --------------------------------------------------------------------------------------------------
# with it

@pytest.fixture
def package():
    pytest.importorskip("reasoning_gym")


@pytest.mark.parametrize("word, said", [
    ("gym:chain_smu", "no task gym:chain_smu: did you mean gym:chain_sum?"),
    ("gym:nosuch", "did you mean gym:"),
    ("gym", "gym:chain_sum"),
    ("gym:puzzle24", "left out: its score_answer takes any four numbers"),
    ("gym:chain_sum:max_terms", "'max_terms' is no setting like max_terms=3"),
    ("gym:chain_sum:max_term=3", "max_terms=6"),                 # what can be set, with its defaults
    ("gym:chain_sum:max_terms=0", "max_terms must be >= min_terms"),
])
def test_what_a_user_gets_wrong(package, word, said):
    with pytest.raises(ValueError) as e:
        data.load(word)
    assert said in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("name", QUICK)
def test_splits_never_meet_and_repeat(package, name):
    task = data.load(name)
    asked = {split: [p.prompt for seed in (0, 1) for p in task.problems(split, 20, seed)]
             for split in ("train", "valid", "test")}
    assert not set(asked["train"]) & set(asked["valid"]) and not set(asked["train"]) & set(asked["test"])
    assert not set(asked["valid"]) & set(asked["test"])
    again = data.load(name).problems("test", 20, 1)
    assert [p.prompt for p in again] == asked["test"][20:] != asked["test"][:20]
    assert [p.id for p in again] == list(range(20)), "the first k of n are the list of k"
    assert [p.prompt for p in task.problems("test", 7, 1)] == asked["test"][20:27]


def test_settings_change_what_is_asked(package):
    short = data.load("gym:chain_sum:max_terms=2").problems("test", 10, 0)
    assert all(len(re.findall(r"\d+", p.prompt)) == 2 for p in short)
    assert data.load("gym:spell_backward:max_word_len=4").name == "gym:spell_backward:max_word_len=4"


def test_what_counts_as_the_answer(package):
    task = data.load("gym:chain_sum")
    problem = task.problems("test", 1, 0)[0]
    assert problem.data["messages"] == [{"role": "user", "content": problem.prompt.strip()}]
    gold = problem.gold
    for text in (gold, f"so <answer> {gold}\n</answer>.", f"<answer>1</answer><answer>{gold}"):
        assert task.reward(problem, text) == 1, text
    for text in ("", "<answer></answer>", f"<answer>{gold}</answer> or <answer>no</answer>"):
        assert task.reward(problem, text) < 0.1, text
    assert task.answer("  ") is None and task.same("a  b\n", "a b")
    votes = [task.answer(text) for text in ("<answer>1 2</answer>", "1  2", "3", "")]
    assert data.classes(task, votes) == [0, 0, 1, -1]


def test_an_answer_that_would_run_code_scores_0_and_runs_nothing(package, tmp_path):
    task = data.load("gym:spiral_matrix")
    problem = task.problems("test", 1, 0)[0]
    made = tmp_path / "made"
    assert task.reward(problem, f"<answer>[open({str(made)!r}, 'w')]</answer>") == 0 and not made.exists()
    task.dataset.score_answer(f"[open({str(made)!r}, 'w')]", problem.data["entry"])
    assert made.exists(), "the package no longer evaluates answers: reasoning.py can go"


def test_rewards_come_from_worker_processes(package):
    rewards = Rewards("gym:chain_sum", workers=1)
    try:
        problem = data.load("gym:chain_sum").problems("test", 1, 0)[0]
        for i, text in enumerate([problem.gold, "no"]):
            rewards.put((0, i), problem, text)
        found = {}
        while len(found) < 2:
            found |= {key[1]: (reward, info.error) for key, reward, info in rewards.get(block=True)}
        assert found == {0: (1.0, None), 1: (0.0, None)}
    finally:
        rewards.close()


def test_every_task_that_evaluates_an_answer_is_known(package):
    """a new version of the package may evaluate in another task, too"""
    found = set()
    for name, (kind, _) in reasoning.package().DATASETS.items():
        scorer = inspect.getsource(kind.score_answer)
        if re.search(r"\beval\(answer|parse_expr\(answer", scorer):
            found.add(name)
    assert found == reasoning.LITERALS | reasoning.FORMULAS


# the first question of every task, to be asked in another process
ASKED = """
import json
from data import gym, reasoning
asked = {name: gym.task(name).draw("train", 3, 0)[0]
         for name in reasoning.names() if name not in reasoning.LEFT_OUT}
print("\\n" + json.dumps(asked))                 # after what the package prints
"""


def test_nine_tasks_in_ten_know_their_right_answers(package):
    """load, score the own answer as right and another as wrong, and ask the same in a process that
    hashes strings differently: sets of strings have another order there, and three tasks ask
    something else"""
    other = subprocess.run([sys.executable, "-c", ASKED], cwd=ROOT, capture_output=True, text=True,
                           env={**os.environ, "PYTHONHASHSEED": "77"}, check=True)
    asked = json.loads(next(line for line in other.stdout.splitlines() if line.startswith('{"')))
    names = reasoning.names()
    good = []
    for name in asked:
        task = data.load(f"gym:{name}")
        text, problem = task.draw("train", 3, 0)
        assert text == asked[name], f"{name} asks something else in another process"
        assert task.reward(problem, "<answer>xyzzy</answer>") < 0.9, name
        if problem.gold:
            assert task.reward(problem, f"It is <answer>{problem.gold}</answer>") == 1, name
            good.append(name)
    assert set(asked) - set(good) == {"boxnet", "rush_hour"}     # the package knows no answer of theirs
    assert len(good) >= 0.9 * len(names) > 90


def test_the_listing_shows_an_example_of_each(package):
    done = run("data.gym", "sum")
    assert done.returncode == 0 and "gym:chain_sum\n    'State" in done.stdout, done.stderr
    assert "left out: its score_answer takes every answer" in run("data.gym", "halting").stdout
