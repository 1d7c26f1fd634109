"""
python -m bench algorithms: every row of the algorithm table from the same base, at the same
number of sampled tokens.

Countdown in two styles: `steps` (short answers) and `search` (a heavy tail of lengths); three
seeds; four updates a rollout, because with one update every ratio is 1 and rows differ by
baseline and aggregation alone (--updates 1 shows that). One thread per run, two runs at a time,
two minutes each: a run that needs longer is stopped with a checkpoint. The same command again
continues where it stopped, repeats nothing that is done, and draws the table and the picture from
what there is.

    accuracy, pass@k    on the test split after the last token, mean over seeds +- its standard error;
                        k samples of each problem
    drop                the best held-out accuracy on the way less the last one: what instability costs
    speed               tokens that dr_grpo needed for 80% of what it gained, held out, over the
                        tokens this row needed for it; 0: never got there. The claim for vl_norm,
                        which differs in aggregation alone: up to 2.67 on Countdown (arXiv 2509.07558)
    entropy, length     of the last five rollouts
    seconds             of all steps, by the clock, evaluations left out

    python -m bench algorithms                             66 runs, about an hour on two cores
    python -m bench algorithms --rows vl_norm,dr_grpo --seeds 10
"""
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from algos import ALGORITHMS
from bench import ROOT, finish
from common import view
from common.flags import die, flags, positive
from common.run import newest


@dataclass
class Config:
    name: str = "algorithms"         # runs lie in runs/NAME/, the table and the picture too
    init: str = "runs/base"          # the base of all runs
    rows: str = ",".join(ALGORITHMS)  # of the table in algos.py
    tasks: str = "countdown:steps,countdown:search"  # what they learn
    max_new: str = "48,320"          # tokens per sample, at most, for each task
    seeds: int = 3                   # runs of each row and task
    tokens: int = 240_000            # sampled tokens per run, dropped groups included
    updates: int = 4                 # of a rollout
    prompts: int = 32                # a rollout
    n: int = 16                      # samples per prompt
    lr: float = 1e-3                 # of every row
    eval_every: int = 5              # steps between held-out evaluations
    eval_n: int = 64                 # problems of one
    final_n: int = 128               # problems of the last one
    k: int = 16                      # samples of each
    minutes: float = 2.0             # of a run, before it is stopped with a checkpoint
    parallel: int = 2                # runs at a time


def command(config, task, max_new, row, seed):
    """-> the run's folder, and how to make it or resume it."""
    name = f"{config.name}/{task.replace(':', '-')}-{row}-{seed}"
    words = {"name": name, "init": config.init, "task": task, "max-new": max_new, "algo": row,
             "seed": seed, "tokens": config.tokens, "steps": 100_000, "prompts": config.prompts,
             "n": config.n, "lr": config.lr, "minibatch": -(-config.prompts // config.updates),
             "eval-every": config.eval_every, "eval-n": config.eval_n, "final-n": config.final_n,
             "eval-k": config.k, "save-every": 20, "threads": 1, "workers": 1, "device": "cpu"}
    # the reset of prorl is on the scale of its thousands of steps: here one in the middle, as
    # held-out accuracy stalls
    words |= {"reset-every": 0, "reset-patience": 3} if row == "prorl" else {}
    argv = [sys.executable, str(ROOT / "nanorl.py"),
            *(w for k, v in words.items() for w in (f"--{k}", str(v)))]
    return Path("runs", name), argv + ["--resume"] * Path("runs", name, "config.json").exists()


def metrics(folder):
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()
            if line.endswith("}")] if path.exists() else []


def done(folder, config):
    """A run is over when its tokens are spent, so that its last row has a test score; the
    checkpoint comes after the row."""
    rows = metrics(folder)
    last = newest(folder)
    return (last is not None and rows[-1].get("spent", 0) >= config.tokens
            and "test/avg" in rows[-1] and last[1] == rows[-1]["step"])


def run_all(jobs, config):
    """`parallel` runs at a time; one past its time is told to stop, which it does after a step,
    with a checkpoint."""
    waiting, running, failed = list(jobs), [], []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        while waiting or running:
            while waiting and len(running) < config.parallel:
                folder, argv = waiting.pop(0)
                folder.parent.mkdir(parents=True, exist_ok=True)
                log = open(f"{folder}.txt", "w")
                process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=env)
                running.append([process, folder, time.monotonic(), log, False])
            time.sleep(0.2)
            for item in list(running):
                process, folder, begin, log, told = item
                seconds = time.monotonic() - begin
                if process.poll() is None:
                    if seconds > 60 * config.minutes and not told:
                        process.send_signal(signal.SIGTERM)      # once: the second one kills
                        item[-1] = True
                    if seconds > 60 * config.minutes + 60:       # a step does not last a minute: it hangs
                        process.kill()
                    continue
                running.remove(item)
                log.close()
                words = {0: "done", 130: "stopped at its time, to be gone on with"}.get(process.returncode)
                words = ("stopped before its first step" if process.returncode == -signal.SIGTERM
                         and told else words)
                if words is None:
                    failed.append(folder.name)
                    words = f"failed: see {folder}.txt"
                print(f"  {folder.name}: {words}, {seconds:.0f} s ({len(waiting) + len(running)} to go)",
                      flush=True)
    finally:
        for process, *_ in running:
            process.terminate()
    return failed


# -----------------------------------------------------------------------------
# from metrics.jsonl to a table


def curve(rows):
    """-> tokens sampled so far and held-out accuracy, at every evaluation on the valid split."""
    held = [row for row in rows if "eval/avg" in row]
    return np.array([row.get("spent", 0) for row in held], float), np.array([row["eval/avg"] for row in held])


def mean_curve(runs, tokens, points=41):
    """The mean over seeds at equal numbers of tokens, between evaluations by a straight line; nan
    behind the last one of any seed."""
    grid = np.linspace(0, tokens, points)
    return grid, np.mean([np.interp(grid, *curve(rows), right=np.nan) for rows in runs], axis=0)


def reached(grid, accuracy, target):
    """Tokens at which a curve first is at `target`, at least one point of the grid; inf: never."""
    above = np.flatnonzero(accuracy >= target)
    return float(grid[max(1, above[0])]) if len(above) else math.inf


def cell(runs, config):
    """The numbers of one row on one task, from the metrics of its seeds."""
    ends = [rows[-1] for rows in runs]
    avg = [end["test/avg"] for end in ends]
    tail = [row for rows in runs for row in rows[1:][-5:]]
    known = [row["entropy"] for row in tail if row["entropy"] is not None]
    return dict(accuracy=statistics.fmean(avg),
                se=statistics.stdev(avg) / len(avg) ** 0.5 if len(avg) > 1 else math.nan,
                pass_k=statistics.fmean(end[f"test/pass@{config.k}"] for end in ends),
                drop=statistics.fmean(float(curve(rows)[1].max() - curve(rows)[1][-1]) for rows in runs),
                entropy=statistics.fmean(known) if known else math.nan,
                length=statistics.fmean(row["length"] or 0 for row in tail),
                seconds=statistics.fmean(sum(row["t_step"] for row in rows[1:]) for rows in runs),
                runs=len(runs))


def table(found, config):
    """Prints a table for each task. -> {"task row accuracy": number, ...}."""
    numbers = {}
    for task, rows in found.items():
        print(f"\n{task}: {config.tokens:,} tokens, {config.updates} updates a rollout\n\n"
              f"| row | accuracy | pass@{config.k} | drop | speed | entropy | length | seconds | seeds |\n"
              f"{'|---' * 9}|")
        reference = mean_curve(rows["dr_grpo"], config.tokens) if "dr_grpo" in rows else None
        for row, runs in rows.items():
            c = cell(runs, config)
            if reference:
                known = reference[1][~np.isnan(reference[1])]
                target = known[0] + 0.8 * (known[-1] - known[0])
                c["speed"] = reached(*reference, target) / reached(*mean_curve(runs, config.tokens), target)
            print(f"| {row} | {c['accuracy']:.1%} +-{c['se']:.1%} | {c['pass_k']:.1%} "
                  f"| {c['drop']:.1%} | {c.get('speed', math.nan):.2f} "
                  f"| {c['entropy']:.3f} | {c['length']:.1f} | {c['seconds']:.0f} | {c['runs']} |")
            numbers |= {f"{task} {row} {k}": v for k, v in c.items()
                        if k in ("accuracy", "se", "pass_k", "drop", "speed")}
    return numbers


def picture(found, config, path):
    figure, axes = view.pyplot().subplots(1, len(found), figsize=(6 * len(found), 4), squeeze=False)
    for ax, (task, rows) in zip(axes[0], found.items()):
        for i, (row, runs) in enumerate(rows.items()):
            grid, accuracy = mean_curve(runs, config.tokens)
            again, color = divmod(i, len(view.COLORS))
            ax.plot(grid / 1000, accuracy, label=row, color=view.COLORS[color],
                    ls="--" if again else "-", lw=1.6)
        ax.set(title=task, xlabel="thousand tokens sampled", ylabel=f"held-out accuracy (avg@{config.k})")
        ax.spines[["top", "right"]].set_visible(False)
    axes[0][-1].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=140)
    view.pyplot().close(figure)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    rows, tasks, limits = config.rows.split(","), config.tasks.split(","), config.max_new.split(",")
    for row in rows:
        if row not in ALGORITHMS:
            die(f"--rows: no row {row!r}; known: {', '.join(ALGORITHMS)}")
    if len(limits) != len(tasks) or not all(x.isdigit() and int(x) for x in limits):
        die(f"--max-new {config.max_new}: give one number for each of the {len(tasks)} tasks")
    positive(config, "seeds tokens updates prompts k parallel eval_every")
    if config.k < 2 or config.k & (config.k - 1):
        die(f"--k {config.k}: give a power of two, 2 or more: pass@k is known at those")
    if not Path(config.init, "config.json").exists():
        die(f"{config.init} is not there: `python train_gpt.py` makes "
            "runs/base in minutes; or give another --init")

    # ---- run what is missing
    every = {(task, row, seed): command(config, task, limit, row, seed)
             for seed in range(config.seeds) for task, limit in zip(tasks, limits) for row in rows}
    missing = [job for job in every.values() if not done(job[0], config)]
    print(f"{len(every)} runs, {len(missing)} to make, {config.parallel} at a time")
    failed = run_all(missing, config)

    # ---- look at what there is
    found = {}
    for (task, row, seed), (folder, _) in every.items():
        if done(folder, config):
            found.setdefault(task, {}).setdefault(row, []).append(metrics(folder))
    numbers = table(found, config)
    if found:
        path = Path("runs", config.name, "algorithms.png")
        picture(found, config, path)
        print(f"wrote {path}")
    left = sum(not done(folder, config) for folder, _ in every.values()) - len(failed)
    if left or failed:
        print(f"{left} runs were stopped at their time: the same command goes on with them"
              + (f"; {len(failed)} failed: {', '.join(failed)}" if failed else ""))
    return finish("algorithms", left=left, failed=len(failed), **numbers)


if __name__ == "__main__":
    main()
