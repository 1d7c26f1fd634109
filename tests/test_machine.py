"""which cores a run takes, whether that changes its bits, what it says of its own time, and --minutes"""
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import nanorl
import train_gpt
from common import cpu, machine, run
from common.machine import Pace, Threads
from tests.test_matrix import TINY
from train_gpt import GPT, GPTConfig


class Fake:
    """a machine of four cores, its clock, and a /proc/stat that is busy as told"""

    def __init__(self, folder):
        self.path = folder / "stat"
        self.now = 0.0
        self.ticks = {core: [0] * 10 for core in range(5)}
        self.load(())

    def load(self, busy, seconds=0.0, column=0, own=0.0):
        """some cores are busy for some seconds, in one of the columns; the others are idle"""
        self.now += seconds
        for core, ticks in self.ticks.items():
            ticks[column if core in busy else 3] += round(100 * seconds)
        lines = [f"cpu{core} {' '.join(map(str, ticks))}" for core, ticks in self.ticks.items()]
        self.path.write_text("\n".join(["cpu  1 2 3 4 5 6 7 8 9 10", *lines, "intr 5 6", "ctxt 7"]) + "\n")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """cores 0 to 3 are ours, core 4 is not"""
    fake = Fake(tmp_path)
    monkeypatch.setattr(machine, "STAT", fake.path)
    monkeypatch.setattr(machine, "CORES", 4)
    monkeypatch.setattr(machine, "allowed", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(machine.time, "perf_counter", lambda: fake.now)
    monkeypatch.setattr(machine.time, "process_time", lambda: 0.0)
    yield fake
    torch.set_num_threads(1)
    machine.current = None


USER, NICE, IOWAIT, STEAL = 0, 1, 4, 7


@pytest.mark.parametrize("busy, column, free", [
    ((), USER, 4), ((2,), USER, 3), ((0, 3), NICE, 2), ((0, 1, 2), STEAL, 1), ((0, 1, 2, 3), USER, 1),
    ((0, 1), IOWAIT, 4), ((4,), USER, 4)])
def test_chosen_threads_follow_proc_stat(fake, monkeypatch, busy, column, free):
    """what waits for a disk leaves its core free, and a core that is not ours does not matter"""
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: fake.load(busy, seconds, column))
    count, why = machine.free_cores()
    assert count == free and "/proc/stat" in why
    assert ("all are free" in why) == (free == 4)
    torch.set_num_threads(4)
    env = run.start("cpu")
    assert env.threads.most == free and env.threads.follow and why in env.threads.why


def test_a_system_without_proc_stat_is_asked_otherwise(fake, monkeypatch):
    fake.path.unlink()
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (1.2, 9.0, 9.0))
    by = "the load of the last minute"
    assert machine.free_cores() == (3, f"other processes keep 1.2 of them busy, says {by}")
    monkeypatch.delattr(machine.os, "getloadavg")
    assert machine.free_cores() == (4, "nothing here says which are busy")


def test_threads_go_down_beside_a_busy_process_and_come_back(fake):
    """beside a process that starts later, threads that wait by spinning made steps of 9 seconds"""
    threads = machine.use(Threads(3, "the test", follow=True))

    def after(busy, seconds=machine.LOOK_EVERY):
        fake.load(busy, seconds)
        machine.follow()
        return torch.get_num_threads()

    assert after((), 9.0) == 3 and threads.say() == "", "never above what the run began with"
    assert after((0,)) == 3 and after((0, 1)) == 2
    assert "2.0 of 4 cores busy: 2 of 3 threads" in threads.say() and threads.say() == ""
    assert after((0, 1, 2, 3)) == 1
    assert after((), 0.1) == 1, "a moment says nothing"
    assert after(()) == 3 and threads.say() == ""
    assert after((0, 1, 2)) == 1 and threads.say() == "", "said once"


def test_what_this_process_computes_itself_keeps_nothing_from_it(fake, monkeypatch):
    threads = Threads(4, "the test", follow=True)
    monkeypatch.setattr(machine.time, "process_time", lambda: 4.0 * fake.now)
    fake.load((0, 1, 2, 3), 5.0)
    threads.look()
    assert torch.get_num_threads() == 4


def test_threads_that_were_asked_for_stay(fake, monkeypatch):
    monkeypatch.setattr(machine.time, "sleep", lambda seconds: pytest.fail("there is nothing to find out"))
    assert run.start("cpu", threads=3).threads.most == 3
    fake.load((0, 1, 2, 3), 9.0)
    machine.follow()
    assert torch.get_num_threads() == 3
    assert run.start("cpu").threads.most == 3, "the caller had chosen"
    monkeypatch.setattr(machine, "CORES", 3)
    assert run.start("cpu", begun=2).threads.most == 2, "as the run began"


# ------------------------------------------------------------------------------

BITS = """
import hashlib, sys
import torch
import train_gpt
from common.optim import Optimizer
from rollout import Sampler

def digest(x):
    return hashlib.sha1(repr(x).encode()).hexdigest()

for threads in (1, 2, 3):
    torch.set_num_threads(threads)
    model, document = train_gpt.scratch("base")
    document.config.batch = 24
    c = document.config
    optimizer = Optimizer(model, lr=c.lr, muon_lr=c.muon_lr, weight_decay=0.1, clip=0.1)
    numbers = {}
    for _ in train_gpt.steps(model, document, optimizer, 2, numbers=numbers):
        pass
    weights = digest([p.tolist() for p in model.parameters()])
    prompts = [document("train", i)[0][:5 + i] for i in range(5)]
    groups = Sampler(model, document.tok.stop, slots=12).generate(prompts, n=4, max_new=8)
    samples = digest([(s.tokens, s.logprobs) for group in groups for s in group])
    print(weights, numbers["loss"], numbers["grad_norm"], samples)
"""


@pytest.mark.skipif(not (cpu.ON and cpu.ONEDNN), reason="equal to the bit is what oneDNN gives")
def test_any_number_of_threads_gives_the_same_bits(one_process, monkeypatch):
    """a run goes down in threads beside a busy process, and says "repeatable" all the same. The norm of
    the gradient differed in its last bit once: a sum is shared out by the number of threads"""
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")             # or the test suffers from what it is about
    one, two, three = one_process(BITS).splitlines()
    assert one == two == three


# ------------------------------------------------------------------------------


def test_gflops_takes_the_best_of_five_and_leaves_the_threads(monkeypatch):
    clock = iter([0.0, 0.03, 1.0, 1.02, 2.0, 2.04, 3.0, 3.03, 4.0, 4.03])
    monkeypatch.setattr(machine.time, "thread_time", lambda: next(clock))
    monkeypatch.setattr(machine.time, "perf_counter", lambda: 0.0)
    asked = []
    monkeypatch.setattr(machine.torch, "mm",
                        lambda a, b, out: asked.append((len(a), torch.get_num_threads())))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert machine.gflops() == pytest.approx(2 * 1024**3 / 0.02 / 1e9)
        assert asked == [(1024, 1)] * 5 and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    clock = iter([0.0, 0.15, 1.0, 1.12])
    wall = iter([0.0, 0.15, 0.27])
    monkeypatch.setattr(machine.time, "perf_counter", lambda: next(wall))
    assert machine.gflops() == pytest.approx(2 * 1024**3 / 0.12 / 1e9), "a slow one is not asked five times"


def paced(rates, steps=100, seconds=2.0):
    """the lines of a Pace over steps with these rates"""
    pace = Pace()
    return {i: lines for i, rate in enumerate(rates, 1) if (lines := pace.step(i, steps, seconds, rate))}


def test_it_says_how_long_it_will_take_here():
    rate = dict(training=100.0)
    said = paced([rate] * 100, steps=306)
    assert said == {6: ["about 10 minutes here for the 300 steps that are left, evaluations apart: "
                        "2.00 s per step"]}
    pace = Pace()
    said = [line for i in range(1, 101) for line in pace.step(i, 1000, 1.0 if i < 50 else 2.0, rate)]
    assert len(said) == 2 and "30 minutes" in said[1], "corrected once, at a tenth of the run"
    spoken = {0.2: "1 second", 59: "59 seconds", 90: "1.5 minutes", 600: "10 minutes", 7200: "2.0 hours"}
    assert {seconds: machine.words(seconds) for seconds in spoken} == spoken


def test_it_warns_once_when_both_stages_are_half_as_fast_as_at_first():
    fast, slow = dict(rollout=1000.0, update=400.0), dict(rollout=450.0, update=180.0)
    (step, (line,)), = [item for item in paced([fast] * 10 + [slow] * 20 + [fast] * 20 + [slow] * 20).items()
                        if "warning" in item[1][-1]]
    assert 11 < step <= 15 and "rollout 450 tok/s instead of 1,000" in line and "--threads" in line
    assert not [lines for lines in paced([fast] * 10 + [dict(rollout=100.0, update=400.0)] * 20).values()
                if "warning" in lines[-1]], "longer responses slow the rollout alone"


# ------------------------------------------------------------------------------


def metrics(name):
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]


def weights(name, step):
    return Path("runs", name, "ckpt", f"step_{step}", "model.safetensors").read_bytes()


def test_config_holds_the_threads_and_a_resume_takes_them(tmp_path, monkeypatch, capsys):
    """on a busy machine a run began with one thread, and resumed on a quiet one it took two"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "CORES", 2)
    monkeypatch.setattr(machine, "free_cores", lambda: (1, "the other is busy"))
    torch.set_num_threads(2)
    argv = TINY["train_gpt"].replace("--threads 1", "").split()
    train_gpt.main([*argv, "--name", "a", "--minutes", "1e-9"])
    said = capsys.readouterr().out
    assert "1 thread, of 2 cores: the other is busy" in said
    assert "repeatable bit for bit with 1 thread" in said
    assert re.search(r"\d+ GFLOP/s per thread", said)
    assert json.loads(Path("runs/a/config.json").read_text())["threads"] == 1
    monkeypatch.setattr(machine, "free_cores", lambda: (2, "all are free"))
    torch.set_num_threads(2)
    train_gpt.main([*argv, "--name", "a", "--resume"])
    assert "1 thread, as the run began" in capsys.readouterr().out
    machine.current = None


def test_minutes_end_pretraining_and_more_of_them_continue_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = TINY["train_gpt"].split()
    train_gpt.main([*argv, "--name", "whole"])
    train_gpt.main([*argv, "--name", "a", "--minutes", "1e-9"])
    assert "stopped after step 1 of 3: --minutes 1e-09 are over" in capsys.readouterr().out
    train_gpt.main([*argv, "--name", "a", "--minutes", "1e-9", "--resume"])
    assert [row["step"] for row in metrics("a")] == [1], "the seconds before the resume count"
    train_gpt.main([*argv, "--name", "a", "--minutes", "9", "--resume"])
    assert [row["step"] for row in metrics("a")] == [1, 2, 3] and weights("a", 3) == weights("whole", 3)


def test_minutes_end_a_run_and_more_of_them_continue_it(tiny_base, capsys):
    """with its last evaluation and a checkpoint, as after the last step"""
    tiny_base(7)
    argv = TINY["nanorl"].split()
    nanorl.main([*argv, "--name", "whole"])
    nanorl.main([*argv, "--name", "a", "--minutes", "1e-9"])
    assert "stopped after step 1 of 2: --minutes 1e-09 are over" in capsys.readouterr().out
    assert metrics("a")[-1]["step"] == 1 and "test/avg" in metrics("a")[-1]
    nanorl.main([*argv, "--name", "a", "--minutes", "1e-9", "--resume"])
    assert metrics("a")[-1]["step"] == 1, "the seconds before the resume count"
    nanorl.main([*argv, "--name", "a", "--resume"])
    assert metrics("a")[-1]["step"] == 2 and weights("a", 2) == weights("whole", 2)


@pytest.mark.parametrize("main", [nanorl.main, train_gpt.main], ids=["nanorl", "train_gpt"])
def test_no_minutes_at_all_are_refused(tmp_path, monkeypatch, capsys, main):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--minutes", "0"])
    assert stop.value.code == 2 and not os.listdir(tmp_path)
    assert capsys.readouterr().err == ("error: --minutes is 0: a run needs more than 0; leave it out for no "
                                       "limit\n")


def test_mfu_counts_the_experts_that_a_token_meets(monkeypatch):
    """two of eight experts are a quarter of their matrices, and the cost is that of a dense block"""
    monkeypatch.setattr(machine, "peak_flops", lambda: 1.0)
    docs = [([0] * 10, None), ([0] * 30, None)]
    shape = GPTConfig(50, 2, 2, 2, 8, 16, 64, 64, 1e4)
    dense = machine.mfu(GPT(shape), docs, 1.0)
    sparse = machine.mfu(GPT(replace(shape, n_expert=8, n_active=2)), docs, 1.0)
    routers = 6 * 40 * 2 * 8 * 16
    assert sparse == pytest.approx(dense + routers)
