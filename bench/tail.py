"""
python -m bench tail: tail batching for real. Countdown by search, whose lengths have a heavy
tail, on one and two ranks of a CPU.

For each mode, number of ranks and seed one run of nanorl.py; then a table: seconds of rollout for
each token that is trained, against plain rollouts; what the simulator predicts for this machine,
from its own step times and the lengths of the plain runs; accuracy on held-out problems; what was
wasted; and how long each rank stood idle, as a picture. A CPU's step gets cheaper as rows leave,
a GPU's hardly does: what the modes save here is little, and whether it is what the simulator says
is the question.

    python -m bench tail                         24 runs of about half a minute
    python -m bench tail --seeds 1 --steps 10    a look

The same command continues where it was stopped.

Runs of one rank are measured in CPU seconds, two at a time; runs of two ranks by the clock, one
at a time, so let the machine be idle.
"""
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import nanorl
import stages
import tail
from bench import finish, simulate
from bench.algorithms import metrics, run_all
from common import hf, view
from common.flags import die, flags
from rollout import Sampler


@dataclass
class Config:
    name: str = "tail"               # all runs lie in runs/NAME
    init: str = "runs/base"          # the model they start from
    modes: str = "off,race,prompt,continue"  # of --tail-batching
    ranks: str = "1,2"               # processes
    seeds: int = 3                   # runs of each
    steps: int = 30                  # of a run: six periods of four short rounds and a long one
    prompts: int = 8                 # per step
    n: int = 8                       # samples per prompt
    max_new: int = 600               # tokens per sample, at most
    lr: float = 5e-5                 # small: else plain rollouts become shorter than races
    final_n: int = 150               # held-out problems before and after
    minutes: float = 5.0             # of a run, before it is stopped with a checkpoint
    parallel: int = 2                # runs of one rank at a time


# -----------------------------------------------------------------------------
# one run: nanorl.py as it is, and beside it what each rank did in a step


def one(argv):
    """python -m bench.tail '["--flag", "value", of nanorl.py]': writes rank_R.jsonl into the
    run's folder, too."""
    start, everyone, began = nanorl.sample_step, stages.gather_groups, []
    # times: live rows -> [steps, seconds] of those in which nobody entered
    step, times, entered = Sampler.step, {}, [0, 0.0]

    def timed(self):
        rows, waiting, begin = len(self.running), len(self.waiting), time.process_time()
        out = step(self)
        if began and (rows or waiting > len(self.waiting)):
            box = times.setdefault(rows, [0, 0.0]) if waiting == len(self.waiting) else entered
            box[0] += 1 if box is not entered else waiting - len(self.waiting)
            box[1] += time.process_time() - begin
        return out

    def begins(rl):
        began[:] = began or [time.process_time(), time.perf_counter()]
        return start(rl)

    def noted(rl, groups):
        cpu, wall = (f() - b for f, b in zip((time.process_time, time.perf_counter), began))
        out = everyone(rl, groups)
        wall, idle = time.perf_counter() - began[1], rl.clock["idle"]
        with open(f"runs/{rl.config.name}/rank_{rl.env.rank}.jsonl", "a") as f:
            f.write(json.dumps(dict(step=rl.step, cpu=cpu, wall=wall, idle=idle, times=times, entered=entered,
                                    lengths=[[len(s.tokens) for s in g] for g in out])) + "\n")
        began.clear(), times.clear()
        entered[:] = 0, 0.0
        return out
    nanorl.sample_step, stages.gather_groups, Sampler.step = begins, noted, timed
    nanorl.main(argv)


def rows(folder, rank):
    """{step: what that rank noted}; a step that was done again after a stop counts as done the last time."""
    path = folder / f"rank_{rank}.jsonl"
    return {row["step"]: row
            for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def command(config, mode, ranks, seed):
    name = f"{config.name}/{mode}-{ranks}-{seed}"
    words = {"name": name, "init": config.init, "task": "countdown:search", "tail-batching": mode,
             "seed": seed, "steps": config.steps, "prompts": config.prompts, "n": config.n,
             "max-new": config.max_new, "eval-every": 0, "eval-n": 1, "final-n": config.final_n,
             "lr": config.lr, "save-every": 10, "threads": 1, "workers": 1, "device": "cpu"}
    torchrun = (["-m", "torch.distributed.run", "--standalone",
                 f"--nproc_per_node={ranks}"] if ranks > 1 else [])
    argv = ([w for k, v in words.items() for w in (f"--{k}", str(v))]
            + ["--resume"] * Path("runs", name, "config.json").exists())
    # as one word: torchrun takes every --n of its script for an abbreviation of its own flags
    return Path("runs", name), [sys.executable, *torchrun, "-m", "bench.tail", json.dumps(argv)]


def done(folder, config):
    return len(rows(folder, 0)) >= config.steps and "test/avg" in metrics(folder)[-1]


# -----------------------------------------------------------------------------
# what the simulator needs to know of this machine


def step_times(noted, meeting=0.0):
    """Seconds of a decode step by live rows, keys of the usual age included, and of a sample that
    enters: as the runs had them."""
    bins, entered = {}, np.zeros(2)
    for row in noted:
        entered += row["entered"]
        for n, (count, seconds) in row["times"].items():
            bins.setdefault(int(math.log2(int(n)) * 4), []).append((int(n) * count, count, seconds))
    sums = [np.sum(part, 0) for _, part in sorted(bins.items())]
    return dict(rows=[n / count for n, count, _ in sums],
                seconds=[seconds / count for _, count, seconds in sums],
                enter=entered[1] / max(1, entered[0]), meet=meeting)


def meeting(plain, racing):
    """Seconds of a meeting of ranks: what a round takes beside its steps when it races, less what
    it does when not, over its meetings."""
    def beside(rows):
        return statistics.fmean(row["cpu"] - row["entered"][1] - sum(s for _, s in row["times"].values())
                                for row in rows)

    steps = statistics.fmean(sum(count for count, _ in row["times"].values()) for row in racing)
    return max(0.0, beside(racing) - beside(plain)) / (steps / tail.EVERY)


def predicted(config, costs, lengths, modes, ranks):
    """-> {mode: seconds a kept token over plain}. lengths: of the groups of plain runs. costs:
    files of step times, of plain runs and of the others: a rank whose neighbour has ended its
    round, as it does in plain ones, has the memory for itself, and takes shorter steps."""
    logs = np.log(lengths)
    within = logs.var(1, ddof=1).mean()
    between = max(0.0, float(logs.mean(1).var(ddof=1) - within / config.n))
    flat = Path(costs[0]).with_name("lengths.json")
    flat.write_text(json.dumps([n for g in lengths for n in g]))
    sim = dict(trace=str(flat), gpus=ranks, prompts=config.prompts, n=config.n, cap=config.max_new,
               between=between / (between + within), rounds=200, slots=256)
    per = {}
    for mode in modes:          # ranks meet during a round of tail batching, and after a plain one
        c = simulate.Config(**sim, cost=str(costs[mode != "off"]),
                            together=tail.EVERY if ranks > 1 and mode != "off" else 0)
        per[mode] = simulate.simulate(c, mode, simulate.make_law(c), simulate.make_cost(c))[0]["per_token"]
    return {mode: seconds / per["off"] for mode, seconds in per.items()}


# -----------------------------------------------------------------------------


def picture(found, config, path):
    """Idle share of each rank, runs of several ranks."""
    several = sorted({ranks for _, ranks in found if ranks > 1})
    figure, axes = view.pyplot().subplots(1, len(several), figsize=(6 * len(several), 3.6),
                                     squeeze=False, layout="constrained")
    for ax, ranks in zip(axes[0], several):
        modes = [m for m in config.modes.split(",") if (m, ranks) in found]
        for i, mode in enumerate(modes):
            ax.bar(np.arange(ranks) + (i - len(modes) / 2 + 0.5) * 0.8 / len(modes),
                   found[mode, ranks]["idle"], 0.8 / len(modes),
                   label="plain" if mode == "off" else mode, color=view.COLORS[i])
        ax.set_xticks(range(ranks), [f"rank {r}" for r in range(ranks)])
        ax.set(title="idle share of a rollout", ylim=(0, None))
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=140)
    view.pyplot().close(figure)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    modes = config.modes.split(",")
    if not set(modes) <= {"off", "race", "prompt", "continue"} or "off" not in modes:
        die(f"--modes {config.modes}: off, and any of race, prompt, continue")
    if not all(r.isdigit() and int(r) for r in config.ranks.split(",")):
        die(f"--ranks {config.ranks}: numbers of processes, with commas")
    try:
        hf.find(config.init)
    except (ValueError, FileNotFoundError) as e:
        die(f"--init: {e}; `python train_gpt.py` makes runs/base in minutes")

    # ---- run what is missing
    every = {(mode, int(ranks), seed): command(config, mode, int(ranks), seed)
             for ranks in config.ranks.split(",") for seed in range(config.seeds) for mode in modes}
    missing = {key: job for key, job in every.items() if not done(job[0], config)}
    print(f"{len(every)} runs, {len(missing)} to make", flush=True)
    here, failed = config.parallel, []
    for several in (False, True):
        config.parallel = 1 if several else here
        failed += run_all([job for (_, ranks, _), job in missing.items() if (ranks > 1) == several], config)

    # ---- look at what there is
    there = {key: job[0] for key, job in every.items() if done(job[0], config)}
    found, numbers = {}, {}
    for mode, ranks in dict.fromkeys((m, r) for m, r, _ in there):
        runs = [f for (m, r, _), f in there.items() if (m, r) == (mode, ranks)]
        noted = [list(rows(f, 0).values()) for f in runs]
        kept = [sum(n for row in run for g in row["lengths"] for n in g) for run in noted]
        unit = "cpu" if ranks == 1 else "wall"
        lasts = [metrics(f) for f in runs]
        clocks = [[list(rows(f, r).values()) for f in runs] for r in range(ranks)]
        found[mode, ranks] = dict(
            per=sum(row[unit] for run in noted for row in run) / sum(kept), kept=statistics.fmean(kept),
            noted=[row for f in runs for r in range(ranks) for row in rows(f, r).values()], runs=len(runs),
            lengths=[g for run in noted for row in run for g in row["lengths"]],
            idle=[sum(row["idle"] for run in c
                      for row in run) / sum(row["wall"] for run in c for row in run) for c in clocks],
            avg=[m[-1]["test/avg"] for m in lasts],
            wasted=statistics.fmean(row.get("wasted", 0) for m in lasts for row in m[1:]),
            bias=lasts[0][-1].get("length_bias", 0.0) or 0.0)
    for ranks in sorted({r for _, r in found}):
        if ("off", ranks) not in found:
            continue
        plain = found["off", ranks]
        rest = [row for (mode, r), f in found.items() if r == ranks and mode != "off" for row in f["noted"]]
        costs = [Path("runs", config.name, f"steps_{ranks}_{what}.json") for what in ("plain", "rounds")]
        costs[0].write_text(json.dumps(step_times(plain["noted"])))
        costs[1].write_text(json.dumps(
            step_times(rest, meeting(plain["noted"], rest) if ranks > 1 else 0.0) if rest else {}))
        expect = predicted(config, costs, plain["lengths"], modes, ranks)
        head = ("mode,ms a kept token,over plain,simulated,apart,accuracy,tokens "
                "kept,wasted,bias,idle by rank,runs".split(","))
        print(f"\n{ranks} rank{'s' * (ranks > 1)}: {config.prompts} x {config.n} samples, {config.max_new} "
              f"tokens, {config.steps} steps\n\n| {' | '.join(head)} |\n{'|---' * len(head)}|")
        for mode in modes:
            if (mode, ranks) not in found:
                continue
            f, name = found[mode, ranks], "plain" if mode == "off" else mode
            ratio = f["per"] / plain["per"]
            se = statistics.stdev(f["avg"]) / len(f["avg"]) ** 0.5 if len(f["avg"]) > 1 else float("nan")
            print(f"| {name} | {1e3 * f['per']:.4f} | {ratio:.3f} | {expect[mode]:.3f} "
                  f"| {ratio / expect[mode] - 1:+.1%} | {statistics.fmean(f['avg']):.1%} "
                  f"+-{se:.1%} | {f['kept']:.0f} | {f['wasted']:.0%} | "
                  f"{f['bias']:+.1%} | {', '.join(f'{i:.0%}' for i in f['idle'])} | {f['runs']} |")
            numbers |= {f"{name} {ranks} over plain": ratio, f"{name} {ranks} simulated": expect[mode],
                        f"{name} {ranks} accuracy": statistics.fmean(f["avg"])}
    if any(ranks > 1 for _, ranks in found):
        picture(found, config, Path("runs", config.name, "idle.png"))
        print(f"\nwrote runs/{config.name}/idle.png")
    left = len(every) - len(there) - len(failed)
    if left or failed:
        print(f"{left} runs were stopped: the same command goes on with them"
              + (f"; failed: {', '.join(failed)}" if failed else ""))
    return finish("tail", left=left, failed=len(failed), **numbers)


if __name__ == "__main__":
    one(json.loads(sys.argv[1]))
