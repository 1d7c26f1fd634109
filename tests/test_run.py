"""common/run.py: devices, collectives, the run folder, checkpoints that survive a kill, a stop
that all ranks agree on"""
import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common import run as R

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    name: str = "test"                               # the folder under runs/
    steps: int = 10                                  # optimizer steps
    lr: float = 1e-3                                 # peak rate
    batch_size: int = 8                              # problems per step
    resume: bool = False                             # continue


# --------------------------------------------------------------------------------------------------
# start and collectives, one process

def test_start_one_process(capsys):
    env = R.start("cpu")
    assert (env.rank, env.local_rank, env.world, env.master) == (0, 0, 1, True)
    assert env.device.type == "cpu" and env.dtype == torch.float32 and env.deterministic
    assert torch.are_deterministic_algorithms_enabled()
    assert R.start("cpu", "bf16", deterministic=False).dtype == torch.bfloat16
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.distributed.is_initialized()
    for bad in ("cdua", "mps" if not torch.backends.mps.is_available() else "tpu"):
        with pytest.raises(SystemExit) as e:
            R.start(bad)
        assert e.value.code == 2 and "--device" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        R.start("cpu", "int8")
    assert "--dtype" in capsys.readouterr().err


def test_collectives_without_a_group_do_nothing():
    x = torch.arange(3)
    assert R.all_sum(x) is x and R.all_sum(2) == 2 and R.all_max(1.5) == 1.5
    assert R.gather("a") == ["a"] and R.broadcast({"b": 1}) == {"b": 1} and R.barrier() is None


# --------------------------------------------------------------------------------------------------
# the run folder

ENV = R.start("cpu", threads=1)


@pytest.fixture
def make(tmp_path):
    runs = []

    def new(config=None, **more):
        runs.append(R.Run(tmp_path / "r", config or Config(), ENV, **more))
        return runs[-1]
    yield new
    for run in runs:
        run.close()


def write(folder):
    (Path(folder) / "config.json").write_text('{"model": 1}')
    (Path(folder) / "model.safetensors").write_bytes(b"w" * 1000)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_folder_files(make, tmp_path, capsys):
    run = make(sources=[__file__])
    run.log("step 1  reward 0.5")
    run.metrics(1, reward=0.5, loss=float("nan"), best=torch.tensor(2.0),
                worst=float("-inf"), **{"eval/x": np.float32(0.25)})
    run.samples([{"step": 1, "text": "half \ud83d a\u2028line", "logprobs": [0.0, float("nan")]}])
    assert rows(tmp_path / "r/metrics.jsonl") == [{"step": 1, "reward": 0.5, "loss": None,
                                                   "best": 2.0, "worst": None, "eval/x": 0.25}]
    samples = (tmp_path / "r/samples.jsonl").read_bytes().split(b"\n")
    assert json.loads(samples[0])["logprobs"] == [0.0, None]
    assert json.loads(samples[0])["text"] == "half \ud83d a\u2028line"
    log = (tmp_path / "r/log.txt").read_text()
    assert torch.__version__ in log and np.__version__ in log and "device: cpu" in log and "command: " in log
    assert Path(__file__).read_text() in log and log.endswith("step 1  reward 0.5\n")
    assert capsys.readouterr().out == "step 1  reward 0.5\n"
    assert json.loads((tmp_path / "r/config.json").read_text())["batch_size"] == 8


def test_an_existing_folder_is_refused(make, tmp_path, capsys):
    make().close()
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as e:
        make()
    err = capsys.readouterr().err
    assert e.value.code == 2 and "--resume" in err and "--name" in err and err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}


def test_resume_without_a_run(make, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        make(resume=True)
    assert e.value.code == 2 and "--resume" in capsys.readouterr().err and not (tmp_path / "r").exists()


def test_resume_with_another_config(make, tmp_path, capsys):
    make(Config(lr=1e-3)).close()
    with pytest.raises(SystemExit) as e:
        make(Config(lr=2e-3, batch_size=4, steps=20), resume=True, free=("steps",))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    assert "--lr was 0.001, is 0.002" in err and "--batch-size was 8, is 4" in err and "--steps" not in err
    make(Config(steps=20, resume=True), resume=True, free=("steps",))
    assert json.loads((tmp_path / "r/config.json").read_text())["steps"] == 20


def test_resume_of_a_run_that_another_version_made(make, tmp_path, capsys):
    """a flag that was dropped since may have made the run what it is: ignored, the rest of the
    run would be another one"""
    make().close()
    path = tmp_path / "r/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tail_batching": "race", "old": None}))
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}
    with pytest.raises(SystemExit) as e:
        make(Config(lr=2e-3, resume=True), resume=True, free=("old",))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.count("\n") == 1
    assert "another version" in err and "--tail-batching, --old" in err and "--name" in err
    assert before == {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.is_file()}


def test_resume_of_a_run_that_is_older_than_a_flag(make, tmp_path, capsys):
    """the run was made as the flag's default says, and continues only like that"""
    make().close()
    path = tmp_path / "r/config.json"
    young = json.loads(path.read_text())
    del young["batch_size"]
    path.write_text(json.dumps(young))
    with pytest.raises(SystemExit):
        make(Config(batch_size=4), resume=True)
    assert "--batch-size was 8, is 4" in capsys.readouterr().err
    make(resume=True).close()
    assert json.loads(path.read_text())["batch_size"] == 8


@pytest.mark.parametrize("text", ["", '{"name": "te', "[1]"])
def test_resume_of_a_damaged_config(make, tmp_path, capsys, text):
    make().close()
    (tmp_path / "r/config.json").write_text(text)
    with pytest.raises(SystemExit) as e:
        make(resume=True)
    assert e.value.code == 2 and "config.json is damaged" in capsys.readouterr().err


def test_rewind_leaves_no_doubled_steps(make, tmp_path):
    run = make()
    for step in range(1, 6):
        run.metrics(step, loss=step)
        run.samples([{"step": step, "text": "a\u2028b"}] * 2)
        if step % 2 == 0:
            run.save(step, write, {"step": step})
    run.close()
    with open(tmp_path / "r/metrics.jsonl", "a") as f:
        f.write('{"step": 3, "lo')                       # the line of a killed process
    run = make(resume=True)
    path, step = run.latest()
    run.rewind(step)
    run.metrics(5, loss=50)
    assert [(r["step"], r["loss"]) for r in rows(tmp_path / "r/metrics.jsonl")] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    run.rewind(2)
    assert [r["step"] for r in rows(tmp_path / "r/metrics.jsonl")] == [1, 2]
    assert (tmp_path / "r/samples.jsonl").read_bytes().count(b"\n") == 4
    assert run.latest()[1] == 2, "a checkpoint from a future that was given up would mix with the new one"


def test_wandb_missing_is_said(tmp_path, capsys, monkeypatch):
    @dataclass
    class W:
        wandb: str = "project"       # project name
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit) as e:
        R.Run(tmp_path / "r", W(), ENV)
    assert e.value.code == 2 and "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_wandb_gets_the_numbers(tmp_path, monkeypatch):
    class Fake:
        id, calls = "abc", []

        def init(self, **kw):
            self.calls.append(("init", kw["project"], kw["id"]))
            return self

        def log(self, numbers, step):
            self.calls.append(("log", numbers, step))

        def finish(self):
            self.calls.append(("finish",))

    @dataclass
    class W:
        wandb: str = "project"       # project name
    fake = Fake()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resume in (False, True):
        run = R.Run(tmp_path / "r", W(), ENV, resume=resume)
        run.metrics(3, reward=1.0)
        run.close()
    assert fake.calls == [("init", "project", None), ("log", {"reward": 1.0}, 3), ("finish",),
                          ("init", "project", "abc"), ("log", {"reward": 1.0}, 3), ("finish",)]


# --------------------------------------------------------------------------------------------------
# checkpoints

def test_save_and_load(make):
    run = make()
    assert run.latest() is None
    rng = torch.Generator().manual_seed(1)
    run.save(3, write, {"w": torch.arange(4.0), "rng": rng.get_state(), "order": [1, (2, 3)], "empty": {}})
    path, step = run.latest()
    assert step == 3 and (path / "model.safetensors").read_bytes() == b"w" * 1000
    (state,) = run.load(path)
    assert torch.equal(state["w"], torch.arange(4.0)) and torch.equal(state["rng"], rng.get_state())
    assert state["order"] == [1, (2, 3)] and state["empty"] == {}
    assert json.loads((path / "meta.json").read_text()) == {"step": 3, "world": 1}
    assert not list(run.ckpt.glob("*.tmp")) and not list(path.glob("*.tmp"))
    assert R.newest(run.folder) == (path, 3)


@dataclass
class Deferred:
    tokens: list


def test_a_state_with_our_own_objects_is_refused(make):
    """it was unpickled, and a pickle runs what is written in it"""
    run = make()
    with pytest.raises(TypeError, match=r"state.deferred\[0\] is a Deferred"):
        run.save(1, write, {"deferred": [Deferred([1, 2])]})
    assert not run.latest()
    run.save(1, write, {"deferred": [vars(Deferred([1, 2]))], "reward": np.float64(0.5), 3: (np.arange(2),)})
    assert run.load(run.latest()[0])[0] == {"deferred": [{"tokens": [1, 2]}], "reward": 0.5, 3: ([0, 1],)}


def test_the_last_two_are_kept(make):
    run = make()
    for step in (1, 9, 10, 100):        # by number, not by name
        run.save(step, write, {})
    assert sorted(p.name for p in run.ckpt.iterdir()) == ["step_10", "step_100"]
    run.save(101, write, {}, keep=1)
    assert [p.name for p in run.ckpt.iterdir()] == ["step_101"]


def test_saving_a_step_again_changes_nothing(make):
    run = make()
    run.save(5, write, {"a": 1})
    run.save(5, None, None)             # the periodic save and the one at the end
    run.close()
    run = make(resume=True)
    run.rewind(5)
    run.save(5, None, None)             # a finished run that is resumed has nothing to add
    assert run.load(run.latest()[0]) == [{"a": 1}]


def test_a_crash_while_writing_leaves_the_old_checkpoint(make):
    run = make()
    run.save(1, write, {"a": 1})

    def broken(folder):
        write(folder)
        raise KeyError("a bug in the model's writer")
    with pytest.raises(KeyError):       # a bug is a bug, not a full disk
        run.save(2, broken, {"a": 2})
    assert [p.name for p in run.ckpt.iterdir()] == ["step_1"] and run.latest()[1] == 1
    run.save(2, write, {"a": 2})
    assert run.latest()[1] == 2


@pytest.mark.parametrize("fail_at", range(6))
def test_a_full_disk_in_mid_checkpoint(make, capsys, monkeypatch, fail_at):
    """whichever of the syncs fails (folder, model files, state, marker), the checkpoint before it
    stays and nothing half is left"""
    run = make()
    run.save(1, write, {"a": 1})
    real, calls = os.fsync, []

    def fsync(fd):
        calls.append(fd)
        if len(calls) == fail_at + 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd)
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SystemExit) as e:
        run.save(2, write, {"a": 2})
    err = capsys.readouterr().err
    assert e.value.code == 2 and "step_2" in err and "No space left" in err
    assert "--resume" in err and err.count("\n") == 1
    assert [p.name for p in run.ckpt.iterdir()] == ["step_1"]
    assert run.latest()[1] == 1 and run.load(run.latest()[0]) == [{"a": 1}]


def test_a_write_that_the_system_refuses(make, capsys):
    """safetensors, torch and plain files each fail with another type of error; a size limit makes
    the system refuse for real"""
    run, small, large = make(), {"w": torch.zeros(10)}, {"w": torch.zeros(100_000)}
    run.save(1, lambda d: save_file(small, d / "m.safetensors"), small)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write_, state in ((lambda d: save_file(large, d / "m.safetensors"), small),
                          (lambda d: torch.save(large, d / "m.pt"), small),
                          (lambda d: (d / "m.bin").write_bytes(bytes(200_000)), small),
                          (lambda d: None, large)):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(SystemExit) as e:
                run.save(2, write_, state)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        err = capsys.readouterr().err
        assert e.value.code == 2 and err.startswith("error: could not write") and err.count("\n") == 1
        assert "step_2" in err and "from step 1" in err
        assert [p.name for p in run.ckpt.iterdir()] == ["step_1"] and run.latest()[1] == 1


def test_a_checkpoint_counts_only_when_every_rank_wrote(make):
    run = make()
    run.save(1, write, {"a": 1})
    run.save(2, write, {"a": 2})
    two = run.ckpt / "step_2"
    (two / "meta.json").write_text('{"step": 2, "world": 2}')
    (two / "state_0_of_1.pt").rename(two / "state_0_of_2.pt")
    assert run.latest()[1] == 1
    with pytest.raises(SystemExit):
        run.load(two)
    torch.save({"a": 3}, two / "state_1_of_2.pt")
    assert run.latest()[1] == 2 and [s["a"] for s in run.load(two)] == [2, 3]
    (two / "meta.json").unlink()
    assert run.latest()[1] == 1
    run.save(3, write, {"a": 3})        # the next save cleans up
    assert sorted(p.name for p in run.ckpt.iterdir()) == ["step_1", "step_3"]


def test_the_best_is_kept_beside_the_checkpoints(make):
    """one at a time, whole or not there, and no checkpoint"""
    run = make()
    run.keep_best(0, write)
    best = run.folder / "best"
    assert (best / "step_0/model.safetensors").read_bytes() == b"w" * 1000
    for step in (3, 10):
        run.save(step, write, {})
        run.keep_best(step, write)
        assert [p.name for p in best.iterdir()] == [f"step_{step}"]
    run.save(11, write, {}, keep=1)
    assert (best / "step_10/config.json").exists() and run.latest()[1] == 11

    def broken(folder):
        write(folder)
        raise KeyError("a bug in the model's writer")
    with pytest.raises(KeyError):
        run.keep_best(12, broken)
    assert (best / "step_10/config.json").exists() and not (best / "step_12").exists()
    run.keep_best(12, lambda folder: (folder / "again").write_text("x"))
    run.keep_best(12, write)
    assert [p.name for p in best.iterdir()] == ["step_12"]
    assert sorted(p.name for p in (best / "step_12").iterdir()) == ["config.json", "model.safetensors"]


# --------------------------------------------------------------------------------------------------
# kills and signals, in real processes

def script(code, *args, **env):
    code = f"ROOT = {str(ROOT)!r}\n" + textwrap.dedent(code)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})


LOOP = """
import os, sys, time, torch
sys.path.insert(0, ROOT)
from dataclasses import dataclass
from common import run as R
@dataclass
class Config:
    resume: bool = False  # go on
folder, pause = sys.argv[1], float(sys.argv[2])
env = R.start("cpu")
# loop
run = R.Run(folder, Config(), env, resume=os.path.exists(folder) and env.world == 1)
def write(d):
    for i in range(5):
        (d / f"part_{i}").write_text(str(step))
last = run.latest()
first = last[1] if last else 0
for path in [p for p in run.ckpt.iterdir()] if last else []:
    assert all((path / f"part_{i}").read_text() == path.name[5:] for i in range(5)), (
        "files of two steps in one checkpoint")
    assert run.load(path)[0]["step"] == int(path.name[5:])
run.rewind(first)
for step in range(first + 1, 100000):
    run.metrics(step, x=R.all_sum(1))
    if run.stopping():
        run.save(step, write, {"step": step, "rank": env.rank})
        run.bye(step)
    if pause < 0.01:
        run.save(step, write, {"step": step})
    time.sleep(pause)
"""


def wait_for(condition, process=None, seconds=300):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it took too long"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_kill_9_in_mid_save_leaves_a_valid_checkpoint(tmp_path):
    """a loop that does nothing but save is killed at a random instruction, again and again; each
    time what is left is whole and is used"""
    folder = tmp_path / "r"
    code = """
    import os, signal, time
    import torch
    def body():
    BODY
    for kill in range(12):
        pid = os.fork()      # the imports are paid for once
        if pid == 0:
            body()
        end = time.time() + 200
        while (R.newest(folder) or (0, 0))[1] <= reached + 2 and time.time() < end:
            time.sleep(0.001)
        time.sleep(0.0017 * kill)
        os.kill(pid, signal.SIGKILL)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL, (
            "it ended before it was killed: what it found was not whole")
        path, step = R.newest(folder)
        assert step > reached
        assert {(path / f"part_{i}").read_text() for i in range(5)} == {str(step)}
        assert torch.load(path / "state_0_of_1.pt")["step"] == step
        reached = step
    """
    head, loop = LOOP.split("# loop\n")
    code = textwrap.dedent(code).replace("BODY", "    global step\n" + textwrap.indent(loop, "    "))
    p = script(head + "from common import run as R\nreached = 0\n" + code, folder, 0)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]
    assert len(steps) > 24 and steps == list(range(1, len(steps) + 1)), "no step is missing, none is doubled"


def test_a_signal_stops_at_the_end_of_a_step(make, capsys):
    run = make()
    for step in (1, 2, 3):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if run.stopping():
            break
    run.save(step, write, {"step": step})
    with pytest.raises(SystemExit) as e:
        run.bye(step)
    out = capsys.readouterr().out
    assert e.value.code == 130 and step == 2 and run.latest()[1] == 2
    assert out.startswith("stopped after step 2. To continue: python ")
    assert out.endswith(" --resume\n") and out.count("--resume") == 1


def test_two_ranks_agree_to_stop(tmp_path):
    """only rank 1 is told to stop; both leave after the same step, with one checkpoint that holds
    the states of both"""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks = [script(LOOP, tmp_path / "r", 0.05, RANK=str(r), LOCAL_RANK=str(r), WORLD_SIZE="2",
                    LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for r in range(2)]
    try:
        wait_for(lambda: lines(tmp_path / "r/metrics.jsonl") > 2, ranks[0])
        ranks[1].send_signal(signal.SIGTERM)
        out = [p.communicate(timeout=300) for p in ranks]
    finally:
        for p in ranks:
            p.kill()
    assert [p.returncode for p in ranks] == [130, 130], out
    path, step = R.newest(tmp_path / "r")
    states = [torch.load(path / f"state_{r}_of_2.pt") for r in range(2)]
    assert states == [{"step": step, "rank": 0}, {"step": step, "rank": 1}]
    assert "torchrun --nproc_per_node=2" in out[0][0] and out[1][0] == "", "rank 1 is silent"
    assert {r["x"] for r in rows(tmp_path / "r/metrics.jsonl")} == {2}


def test_a_second_ctrl_c_leaves_at_once(make):
    before = signal.getsignal(signal.SIGINT)
    run = make()
    os.kill(os.getpid(), signal.SIGINT)
    assert run.stopping()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    run.close()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_in_another_thread_leaves_signals_alone(make):
    before, made = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: made.append(make()))
    thread.start()
    thread.join()
    assert made and signal.getsignal(signal.SIGTERM) is before


def test_progress_is_short_in_a_log_file(capsys):
    bar = R.progress(1000, "rollout")
    for _ in range(1000):
        bar.update()
    bar.close()
    assert 0 < len(capsys.readouterr().err) < 1000
