"""
python -m bench kill in small; and other ends: no space in the middle of a checkpoint, a folder turned
read-only, one rank of two killed in the middle of an update. Each time --resume ends, bit for bit, where a
run ends to which nothing happened
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import nanorl
from bench import kill
from common.metrics import in_order, sample_rows
from common.run import newest
from rollout import Sample

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def own(tiny_base):
    tiny_base(40)
    return ("--init base --data my.jsonl --reward my.py:score --device cpu --threads 1 --workers 1 "
            "--prompts 5 --n 4 --max-new 10 --steps 5 --row-tokens 128 --eval-n 4 --final-n 4 --eval-k 1 "
            "--eval-every 0 --save-every 1 --lr 1e-2 --warmup 1").split()


# processes of a bench are forks of one that has no threads, which a process of pytest may have
PRELUDE = """
import os, sys
from pathlib import Path
from types import SimpleNamespace
import nanorl
from bench.kill import Job, difference
from common.optim import Optimizer
from common.run import Run

def run(name, *more, before=lambda: None, ranks=1, seconds=600):
    def main(argv):
        before()
        nanorl.main(argv)
    script = SimpleNamespace(main=main, __name__="nanorl")
    with Job(script, [*ARGV, "--name", name, *more], Path(name + ".log"), ranks) as job:
        return job.wait(seconds), job.said()

def in_step(step, do):                                # in the middle of the update of a step
    real = Optimizer.step
    count = []
    def stepping(self, *args, **more):
        count.append(1)
        if len(count) == step:
            do()
        return real(self, *args, **more)
    Optimizer.step = stepping

def said_in_one_line(said):
    errors = [line[line.index("error: "):] for line in said.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in said, said
    return errors[0]
"""


@pytest.fixture
def script(own, one_process):
    def go(code, *args):
        return one_process(f"ARGV = {own!r}\n{PRELUDE}\n{code}", *args, timeout=600)
    return go


# ----------------------------------------------------------------------------
# the bench


def bench(*words):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench", "kill", *words]
    return subprocess.run(command, env=env, text=True, capture_output=True, timeout=600, check=False)


def test_a_few_kills(tmp_path, monkeypatch, one_process):
    """four kinds; one run on two ranks, one killed twice. The same command makes only what is missing"""
    monkeypatch.chdir(tmp_path)
    words = ["--kinds", "gpt,ttrl,tail,opd", "--seed", "3"]
    done = bench("--kills", "3", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    done = bench("--kills", "5", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 runs to kill, 3 in runs/kill.jsonl already" in done.stdout and "| all | 5 |" in done.stdout
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert numbers["runs"] == numbers["equal"] == 5 and numbers["kills"] == 6 and numbers["near"] >= 2
    assert numbers["two_ranks"] == numbers["twice"] == 1
    assert not list(Path("runs/kill").glob("killed_*")), "what went right is not kept"

    # a run that had ended, resumed: nothing is written twice
    whole = Path("runs/kill/whole_ttrl_1")
    before = kill.timeless(whole / "metrics.jsonl")
    _, argv = kill.command("ttrl", "kill/whole_ttrl_1", Path("runs/kill"))
    one_process("import sys, ttrl; ttrl.main(sys.argv[1:])", *argv, "--resume")
    assert kill.timeless(whole / "metrics.jsonl") == before

    # the comparison sees what it is for
    shutil.copytree(whole, "other")
    assert kill.difference(whole, Path("other")) == ""
    rows = Path("other/metrics.jsonl").read_text()
    Path("other/metrics.jsonl").write_text(rows.replace('"reward": 0.', '"reward": 1.', 1))
    assert "metrics.jsonl differs" in kill.difference(whole, Path("other"))
    path = newest("other")[0] / "model.safetensors"
    weights = bytearray(path.read_bytes())
    weights[-1] ^= 1
    path.write_bytes(weights)
    assert kill.difference(whole, Path("other")) == "the weights differ"
    shutil.rmtree(path.parent)
    assert "the last checkpoint is 5, not 6" in kill.difference(whole, Path("other"))


def test_the_plan_of_a_hundred():
    """at least 30 near a write, 20 with two ranks, 10 killed twice; and every kind meets every case"""
    config = kill.Config()
    plans = [kill.plan(config, number) for number in range(100)]
    kinds = set(kill.KINDS)
    assert {kind for kind, *_ in plans} == kinds
    assert sum(script is nanorl for script, _ in kill.KINDS.values()) >= 3
    two = [p for p in plans if p[1] == 2]
    near, twice, alone = ([p for p in plans if p[place]] for place in (2, 3, 4))
    for chosen, least in ((two, 20), (near, 45), (twice, 10), (alone, 8)):
        assert len(chosen) >= least and {kind for kind, *_ in chosen} == kinds


def test_an_unknown_kind_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        kill.main(["--kinds", "dapo,grp"])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1


# ----------------------------------------------------------------------------
# how a run begins that was killed at once


def test_killed_before_the_config_was_there(own, capsys):
    """it left a folder with half a file; --resume and a fresh start refused it, each naming the other"""
    half = Path("runs/rl/config.json.tmp")
    half.parent.mkdir(parents=True)
    half.write_text('{"na')
    with pytest.raises(SystemExit) as stopped:
        nanorl.main([*own, "--steps", "1", "--resume"])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and "leave --resume out" in error[-1] and newest("runs/rl") is None
    nanorl.main([*own, "--steps", "1"])
    assert newest("runs/rl")[1] == 1 and not half.exists()


def test_killed_before_the_first_checkpoint(own):
    nanorl.main([*own, "--steps", "2"])
    shutil.copytree("runs/rl", "whole")
    shutil.rmtree("runs/rl/ckpt")
    nanorl.main([*own, "--steps", "2", "--resume"])
    assert kill.difference(Path("whole"), Path("runs/rl")) == ""


def test_what_is_written_down_does_not_depend_on_when_rewards_arrive():
    """two runs that nothing happened to had other samples in samples.jsonl"""
    tok = SimpleNamespace(decode=lambda ids: "x" * len(ids), stop=())
    rl = SimpleNamespace(step=1, tok=tok, problems=[SimpleNamespace(id=i, prompt=f"{i}:") for i in range(9)])
    def sample(i, j):
        return Sample([1], [2] * (i + j + 1), [0.0], "length", i, j, 0, reward=i / 7, advantage=0.0)
    groups = [[sample(i, j) for j in range(4)] for i in range(9)]
    assert sample_rows(rl, groups) == sample_rows(rl, groups[::-1]) and in_order(groups[::-1]) == groups


# ----------------------------------------------------------------------------
# no space, no permission


def test_no_space_in_the_middle_of_a_checkpoint(script):
    """the system refuses a file above a size: the model's, or a state file after the model's"""
    out = script("""
import resource
def limit(size):                                      # from the third checkpoint on
    def before():
        real = Run.save
        def save(self, step, *args, **more):
            if step == 3:
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
            real(self, step, *args, **more)
        Run.save = save
    return before
whole, _ = run("whole")
assert whole == [0]
folder = Path("runs/whole/ckpt/step_5")
model, state = ((folder / name).stat().st_size for name in ("model.safetensors", "state_0_of_1.pt"))
assert 2 * model < state
for name, size in (("model", model // 2), ("state", (model + state) // 2)):
    codes, said = run(name, before=limit(size))
    line = said_in_one_line(said)
    assert codes == [2] and "step_3" in line and "continue from step 2 with --resume" in line, said
    assert sorted(path.name for path in Path("runs", name, "ckpt").iterdir()) == ["step_1", "step_2"]
    codes, said = run(name, "--resume")
    assert codes == [0], said
    print(name, difference(Path("runs/whole"), Path("runs", name)) or "equal")
""")
    assert out.splitlines() == ["model equal", "state equal"]


def test_a_folder_turned_read_only(script):
    """in the middle of a run, and before --resume. Root may write anywhere, unless it gives that right up"""
    out = script("""
import ctypes
def obey():
    if os.geteuid():
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    libc.capget(header, sets)
    sets[0] &= ~2                                     # CAP_DAC_OVERRIDE, of those in effect
    libc.capset(header, sets)
def closed():
    obey()
    in_step(3, lambda: os.chmod("runs/closed/ckpt", 0o555))
def probe():
    obey()
    os.mkdir("probe/x")

os.mkdir("probe", 0o555)
with Job(SimpleNamespace(main=lambda argv: probe(), __name__="probe"), [], Path("probe.log")) as job:
    if job.wait(20) == [0]:
        print("skip")
        raise SystemExit
assert run("whole")[0] == [0]
codes, said = run("closed", before=closed)
line = said_in_one_line(said)
assert codes == [2] and "Permission denied" in line and "continue from step 2 with --resume" in line, said
os.chmod("runs/closed", 0o555)
codes, said = run("closed", "--resume", before=obey)
assert codes == [2] and "cannot write to runs/closed: Permission denied" in said_in_one_line(said), said
os.chmod("runs/closed", 0o755)
os.chmod("runs/closed/ckpt", 0o755)
codes, said = run("closed", "--resume", before=obey)
assert codes == [0], said
print(difference(Path("runs/whole"), Path("runs/closed")) or "equal")
""") if sys.platform == "linux" or os.geteuid() else "skip\n"
    if out == "skip\n":
        pytest.skip("this user may write into read-only folders, and cannot give that right up here")
    assert out == "equal\n"


# ----------------------------------------------------------------------------
# one rank of two


def test_a_rank_killed_in_the_middle_of_an_update(script):
    """either of two: the other ends within a minute and names it, also where the dead one held the store that
    they speak through; both resume, and end where two ranks end that live"""
    out = script("""
import signal, time
assert run("whole", ranks=2)[0] == [0, 0]
for rank in (0, 1):
    def dies():
        if os.environ["RANK"] == str(rank):
            in_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL))
    name = f"rank_{rank}"
    codes, said = run(name, before=dies, ranks=2, seconds=600)
    assert codes[rank] == -signal.SIGKILL and codes[1 - rank] == 1, codes
    assert f"error: rank {rank} died" in said and "--resume continues from the last checkpoint" in said, said
    codes, said = run(name, "--resume", ranks=2)
    assert codes == [0, 0], said
    print(rank, difference(Path("runs/whole"), Path("runs", name)) or "equal")
""")
    assert out.splitlines() == ["0 equal", "1 equal"]
