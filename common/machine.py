"""
What is this machine worth to us, now? How fast a core is, which cores are free, whether that
changes.

    Machine           the flags that say what of it a run takes; every training script has them
    gflops()          fp32 speed of one core, so that a time means something elsewhere
    free_cores()      how many cores nobody else keeps busy: a run takes these when it begins
    threads_for()     how many threads a run gets
    Threads           torch's threads follow the free cores while the run lasts
    Pace              how long the run will take here; a warning when it has become slow

Torch's threads wait for each other by spinning, and a product is only done when its last thread is.
So beside a busy process two threads on two cores take longer than one: the one whose core was taken
holds up the other, which spins (0.9 s per step, some of 9 s, instead of 0.4). One thread per FREE core
is best.

Left out of the usual recipe: threads that sleep while they wait (OMP_WAIT_POLICY, GOMP_SPINCOUNT).
They must be asked for before torch is imported, and a step that takes 0.26 s on two quiet cores then
takes 0.40 to 0.50 s.

This file imports nothing of ours.
"""

import functools
import math
import os
import statistics
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

@dataclass
class Machine:
    """the machine"""
    row_tokens: int = 4096               # tokens of one packed row: a micro-batch
    checkpoint: bool = False             # recompute blocks in the backward: memory for time
    offload: bool = False  # optimizer and sums of gradients on the host: 16 bytes per parameter there
    grads: Literal["auto", "whole", "sharded"] = "auto"  # on each rank; auto: whole where they fit
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    threads: int = 0                     # CPU threads; 0: the cores that are free, shared by the ranks
    deterministic: bool | None = None    # repeatable bit for bit; none: on CPU

    # ---- the run folder
    minutes: float | None = None  # end after this many minutes of steps, evaluations apart; none: no limit
    date: str = ""  # what a chat template that asks for today gets, 2026-01-31; "": the run's first day
    resume: bool = False                 # continue runs/NAME
    wandb: str = ""                      # a wandb project, if curves should go there too


# torch's own choice, before anybody else's: the physical cores that we may use, or OMP_NUM_THREADS
CORES = torch.get_num_threads()
STAT = Path("/proc/stat")
# seconds between two looks at the other processes: a burst is no reason to move
LOOK_EVERY = 2.0
EARLY = 5                 # steps that say how fast a run is, after a first one that compiles products
SLOW = 0.5                # of its early speed: below that a run asks its user what happened

# ------------------------------------------------------------------------------
# how fast is a core?


def gflops(seconds=0.2):
    """
    fp32 GFLOP/s of one thread: the best of five products of 1,024 x 1,024 matrices, fewer where they
    take longer than `seconds`. By the thread's own clock: it is the core's speed, not the share of it
    that others leave.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        a = torch.ones(1024, 1024)
        out = torch.empty_like(a)
        times = []
        end = time.perf_counter() + seconds
        while len(times) < 5 and (not times or time.perf_counter() < end):
            begin = time.thread_time()
            torch.mm(a, a, out=out)
            times.append(time.thread_time() - begin)
    finally:
        torch.set_num_threads(threads)
    return 2 * 1024**3 / min(times) / 1e9


def peak_flops():
    """dense bf16 FLOP/s that its maker promises of this GPU; None where that is not known here"""
    known = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12,
             "4090": 165e12, "3090": 71e12}
    name = torch.cuda.get_device_name()
    return next((peak for card, peak in known.items() if card in name), None)


def mfu(model, docs, seconds):
    """model FLOPs of these documents over what the GPU could do; None where that is not known"""
    peak = peak_flops()
    c = model.config
    weights = sum(p.numel() for name, p in model.named_parameters()
                  if c.tie_embeddings or not name.startswith("embed"))
    if c.n_expert:                             # of which a token meets a few only
        experts = sum(p.numel() for name, p in model.named_parameters()
                      if name.endswith(("experts.gate_up.weight", "experts.down.weight")))
        weights -= experts * (1 - c.n_active / c.n_expert)
    tokens = sum(len(t) for t, _ in docs)
    squares = sum(len(t) ** 2 for t, _ in docs)
    flops = 6 * weights * tokens + 6 * c.n_layer * c.n_head * c.head_dim * squares
    return peak and flops / seconds / peak


# ------------------------------------------------------------------------------
# which cores are free?


def allowed():
    """the numbers of the cores that this process may run on; those of two threads count twice"""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


class Look:
    """A moment: what our cores have done since the machine began, and what this process has"""

    def __init__(self):
        self.when = time.perf_counter()
        self.own = time.process_time()
        self.ticks = self._ticks()

    @staticmethod
    def _ticks():
        """{core: (busy, all)} in the system's ticks; {} where there is no /proc/stat"""
        try:
            lines = STAT.read_text().splitlines()
        except OSError:
            return {}
        ours = allowed()
        found = {}
        for line in lines:
            name, *columns = line.split()
            if not name.startswith("cpu") or name == "cpu" or int(name[3:]) not in ours:
                continue
            # user nice system idle iowait irq softirq steal; what follows is counted in user already
            ticks = [int(column) for column in columns[:8]]
            found[name] = sum(ticks) - sum(ticks[3:5]), sum(ticks)
        return found

    def others(self, before):
        """-> how many cores other processes kept busy since the look `before`, 0.0 to all of them"""
        busy = 0.0
        for name, (worked, total) in self.ticks.items():
            worked_before, total_before = before.ticks.get(name, (worked, total))
            busy += (worked - worked_before) / max(1, total - total_before)
        own = (self.own - before.own) / max(1e-9, self.when - before.when)
        return max(0.0, busy - own)


def left_by(others):
    """-> cores to take beside work that keeps so many busy; at least one"""
    return max(1, CORES - math.floor(others + 0.5))


def free_cores(seconds=0.2):
    """-> (how many cores are free, at least one; what says so, in words)"""
    before = Look()
    if before.ticks:
        time.sleep(seconds)
        others = Look().others(before)
        by = "/proc/stat"
    elif hasattr(os, "getloadavg"):
        others = os.getloadavg()[0]
        by = "the load of the last minute"
    else:
        return CORES, "nothing here says which are busy"
    free = left_by(others)
    if free == CORES:
        return free, f"all are free, says {by}"
    return free, f"other processes keep {others:.1f} of them busy, says {by}"


# ------------------------------------------------------------------------------
# how many threads?


class Threads:
    """
    torch's threads: `most` of them, or fewer while other processes keep cores busy.

    why     in words, for the log
    follow  False: always `most`, as the user said, or where another number gives other bits
    """

    def __init__(self, most, why, follow):
        self.most = most
        self.why = why
        self.follow = follow
        self.note = ""                             # what a log should say once
        self.told = False
        self.before = Look()

    def look(self):
        """as often as one likes; it looks every LOOK_EVERY seconds"""
        if not self.follow or time.perf_counter() - self.before.when < LOOK_EVERY:
            return
        now = Look()
        others = now.others(self.before)
        self.before = now
        count = min(self.most, left_by(others))
        torch.set_num_threads(count)
        if count < self.most and not self.told:
            self.told = True
            self.note = (f"other processes keep {others:.1f} of {CORES} cores busy: {count} of {self.most} "
                         "threads until they are done, with the same bits")

    def say(self):
        """-> the note, once; "" where there is none"""
        note = self.note
        self.note = ""
        return note


current = None            # the Threads of this process: torch's number of them is one for all, too


def use(threads):
    """Takes these Threads from here on, and returns them"""
    global current
    current = threads
    torch.set_num_threads(threads.most)
    return threads


def follow():
    """Called between two decode steps and at the end of a step: there the number may change"""
    if current:
        current.look()


def threads_for(asked, begun, kind, follow):
    """
    -> Threads. Those asked for; or as many as the run began with; or an even share of the cores for
    a rank, and for a process by itself the cores that are free. kind: of the device
    """
    if asked:
        return Threads(asked, "by --threads", follow=False)
    if kind != "cpu":
        return Threads(torch.get_num_threads(), "beside the device", follow=False)
    if "RANK" in os.environ:
        # torchrun sets OMP_NUM_THREADS=1, which leaves cores idle when the ranks are fewer
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
        total = len(allowed())
        share = max(1, total // ranks)
        return Threads(share, f"an even share of {total} cores for each rank", follow=False)
    if torch.get_num_threads() != CORES:
        before = torch.get_num_threads()
        return Threads(before, "as they were when the run was called", follow=False)
    if CORES == 1:
        return Threads(1, "one core, or OMP_NUM_THREADS", follow=False)
    if begun:
        return Threads(min(begun, CORES), "as the run began", follow)
    free, why = free_cores()
    return Threads(free, f"of {CORES} cores: {why}", follow)


# ------------------------------------------------------------------------------
# what a log says of it

_gflops = functools.cache(gflops)              # once, where many runs share a process


def introduced(env, any_number):
    """
    -> what the times of this run depend on, and what its bits do not. env: of run.start();
    any_number: would other numbers of threads give the same bits?
    """
    count = env.threads.most
    threads = f"{count} thread{'s' * (count > 1)}"
    bits = "not repeatable"
    if env.deterministic:
        bits = f"repeatable bit for bit with {threads}{', or any other number' * any_number}"
    return f"{threads}, {env.threads.why}. {_gflops():.0f} GFLOP/s per thread in fp32; {bits}"


def after_step(env, step, steps, numbers):
    """
    The number of threads follows the free cores. -> lines for the log, if there is something to say of
    them or of the pace. numbers: those of the step, as metrics.jsonl has them
    """
    follow()
    names = dict(rollout="rollout_tok_s", update="train_tok_s", training="tokens_per_second")
    rates = {stage: numbers[name] for stage, name in names.items() if numbers.get(name)}
    stages = numbers["t_pack"] + numbers["t_train"] + numbers["t_opt"]
    seconds = numbers.get("t_step", stages)        # pretraining has no stages but these
    note = env.threads.say()
    return [note] * bool(note) + env.pace.step(step, steps, seconds, rates)


class Pace:
    """The speed of a run's steps, beside that of its first ones."""

    def __init__(self):
        self.count = 0
        self.began = 0.0                           # when the first step ended
        self.seconds = deque(maxlen=EARLY)         # of the last steps
        self.rates = deque(maxlen=EARLY)           # {stage: tokens per second} of the last steps
        self.early = {}                            # the first medians of those
        self.foretold = 0.0                        # seconds per step that the log speaks of
        self.warned = False

    def step(self, step, steps, seconds, rates):
        """
        Once per step, the `step`-th of `steps`, which took so long. rates: {stage: tokens per
        second}, without the stages that had nothing to do. -> lines for the log
        """
        self.count += 1
        if self.count == 1:
            self.began = time.perf_counter()
            return []
        self.seconds.append(seconds)
        self.rates.append(rates)
        return self._how_long(step, steps) + self._slow()

    def _how_long(self, step, steps):
        """said after the first steps, and corrected once, at a tenth of the run, if it was wrong"""
        waited = time.perf_counter() - self.began > 60 and not self.foretold
        at_first = len(self.seconds) == EARLY and not self.foretold
        tenth = step == steps // 10 and self.foretold
        if step >= steps or not (waited or at_first or tenth):
            return []
        each = statistics.median(self.seconds)
        if tenth and 0.8 < each / self.foretold < 1.25:
            return []
        self.foretold = each
        return [f"about {words((steps - step) * each)} here for the {steps - step:,} steps that are left, "
                f"evaluations apart: {each:.2f} s per step"]

    def _slow(self):
        if len(self.rates) < EARLY:
            return []
        now = medians(self.rates)
        self.early = now | self.early
        if self.warned or not now or not all(now[stage] < SLOW * self.early[stage] for stage in now):
            return []
        self.warned = True
        rates = ", ".join(f"{stage} {rate:,.0f} tok/s instead of {self.early[stage]:,.0f}"
                          for stage, rate in now.items())
        return [f"  warning: less than half as fast as at first: {rates}. Is another process busy (top), is "
                "the memory full (free -m), the machine hot? Beside other work fewer --threads are faster, "
                "and --resume may change them"]


def medians(rows):
    """[{stage: number}, ...] -> {stage: the median of the rows that have it}"""
    stages = dict.fromkeys(stage for row in rows for stage in row)
    return {stage: statistics.median(row[stage] for row in rows if stage in row) for stage in stages}


def words(seconds):
    """so many seconds, as one says it"""
    for size, name in ((3600, "hour"), (60, "minute")):
        if seconds >= 1.5 * size:
            count = seconds / size
            return f"{count:.0f} {name}s" if count >= 9.5 else f"{count:.1f} {name}s"
    count = max(1, round(seconds))
    return f"{count} second{'s' * (count > 1)}"
