"""
python -m bench speedrun: what ./speedrun.sh made, in one table and one picture: runs/speedrun.md
and runs/speedrun.png.

Every model is asked the same held-out problems with the same noise, before and after its stage:
avg@k, +- the standard error over problems. Test-time RL is judged on the very questions that it
learned on, whose labels it never saw. Seconds are the stage's own, as speedrun.sh clocked it,
start-up and its evaluations included; tokens are those trained on (base, student) or sampled.
"""
import json
import math
from dataclasses import dataclass
from pathlib import Path

import data
from bench import finish
from common import hf, view
from common.flags import die, flags, positive
from common.reward import Rewards
from common.run import start
from evaluate import evaluate
from rollout import Sampler
from train_gpt import GPT


@dataclass
class Config:
    n: int = 400                         # held-out problems; test-time RL: its own questions
    k: int = 4                           # samples of each
    rl: str = "runs/rl"                  # the run of nanorl.py; its --init is the base
    ttrl: str = "runs/ttrl_majority"     # the run of ttrl.py
    opd: str = "runs/opd"                # the run of opd.py; its --init is the student
    device: str = "auto"                 # auto, cpu, cuda, mps
    threads: int = 0                     # CPU threads; 0: all


def settings(run):
    """A run's config.json, or None where the run is not there."""
    path = Path(run, "config.json")
    return json.loads(path.read_text()) if path.is_file() and Path(run, "ckpt").is_dir() else None


def spent(stage, run):
    """-> (seconds, tokens) of a stage. Seconds of a stage that was stopped and resumed add up;
    those of one that speedrun.sh did not make are its steps'."""
    clock = Path("runs", "speedrun.txt")
    lines = [line.split() for line in clock.read_text().splitlines()] if clock.is_file() else []
    rows = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()
            if line.endswith("}")]
    steps = [sum(v for k, v in row.items() if k.startswith("t_") and k != "t_step") for row in rows]
    trained = sum(row.get("tokens_per_second", 0) * t for row, t in zip(rows, steps))
    seconds = sum(float(seconds) for name, _, seconds in lines if name == stage) or sum(steps)
    return seconds, int(sum(row.get("tokens") or 0 for row in rows) or trained)


def best(run):
    """The model of a run: the state that test-time RL kept, else the last."""
    kept = sorted(Path(run, "best").glob("step_*"))
    return str(kept[-1]) if kept else str(hf.find(run))


def measure(model, task, problems, k, max_new, env, known):
    """-> evaluate()'s numbers; each pair of model and problems once."""
    key = model, task.name, problems[0].prompt
    if key not in known:
        folder = hf.find(model)
        net, tok = GPT.from_hf(folder, dtype=env.dtype, device=env.device), data.tokenizer(folder)
        rewards = Rewards(task.name, workers=2)
        known[key] = evaluate(Sampler(net, tok.stop, tok), tok, task, rewards, problems, k, max_new)
        rewards.close()
        print(f"  {model} on {task.name}: {known[key]['avg']:.1%}", flush=True)
    return known[key]


def stages(config, env):
    """-> [{stage, run, task, before, after, seconds, tokens}] of what is there; before and after:
    evaluate()'s numbers, or None."""
    rl, ttrl, opd = settings(config.rl), settings(config.ttrl), settings(config.opd)
    known, rows = {}, []

    def row(stage, run, task_name, max_new, before, after, n=config.n):
        task = data.load(task_name)
        problems = task.problems("test", n, 0)
        scores = [model and measure(model, task, problems, config.k, max_new, env, known)
                  for model in (before, after)]
        seconds, tokens = spent(stage, run)
        rows.append(dict(stage=stage, run=run, task=task.name, before=scores[0],
                         after=scores[1], seconds=seconds, tokens=tokens))

    if rl:
        row("base", rl["init"], rl["task"], rl["max_new"], None, rl["init"])
        row("rl", config.rl, rl["task"], rl["max_new"], rl["init"], best(config.rl))
    if ttrl:
        row("ttrl", config.ttrl, ttrl["task"], ttrl["max_new"], ttrl["init"],
            best(config.ttrl), ttrl["questions"])
    if opd:
        row("student", opd["init"], opd["task"], opd["max_new"], None, opd["init"])
        row("opd", config.opd, opd["task"], opd["max_new"], opd["init"], best(config.opd))
    for name, run, found in (("rl", config.rl, rl), ("ttrl", config.ttrl, ttrl), ("opd", config.opd, opd)):
        if not found:
            print(f"  {name} is left out: {run} is not there (./speedrun.sh {name})")
    return rows


def score(result):
    return f"{result['avg']:.1%} +-{result['avg_se']:.1%}" if result else ""


def table(rows, k):
    """-> the lines of a markdown table"""
    lines = [f"| stage | task | before, avg@{k} | after, avg@{k} | seconds | tokens |",
             "|---|---|---|---|---|---|"]
    for r in rows:
        lines.append(f"| {r['stage']} | {r['task']} | {score(r['before'])} "
                     f"| {score(r['after'])} | {r['seconds']:.0f} | {r['tokens']:,} |")
    return lines + [f"| together | | | | {sum(r['seconds'] for r in rows):.0f} "
                    f"| {sum(r['tokens'] for r in rows):,} |"]


def picture(rows, config, path):
    """Bars before and after, and beside them the curve that each stage is read by."""
    curves = [("base", ["eval/bpb"], "bits per byte, held out"), ("rl", ["reward", "eval/avg"], "reward"),
              ("ttrl", ["avg", "majority_ratio"], "right, and agreeing"),
              ("opd", ["reward", "eval/avg"], "reward")]
    by_stage = {r["stage"]: r for r in rows}
    drawn = []
    for stage, keys, words in curves:
        series = view.read(by_stage[stage]["run"]) if stage in by_stage else {}
        keys = [key for key in keys if key in series]
        if keys:
            drawn.append((stage, series, keys, words))
    figure, axes = view.pyplot().subplots(1, 1 + len(drawn), figsize=(4 + 3.6 * len(drawn), 3.3),
                                     layout="constrained")
    bars, *others = [axes] if not drawn else list(axes)
    learners = [r for r in rows if r["before"]]
    for i, r in enumerate(learners):
        for side, result in enumerate((r["before"], r["after"])):
            error = 0.0 if math.isnan(result["avg_se"]) else result["avg_se"]
            bars.bar(i + 0.38 * side - 0.19, result["avg"], 0.36, yerr=error,
                     color=["#b8bec8", view.COLORS[0]][side], label=None if i else ("before", "after")[side])
    bars.set(title=f"held-out accuracy (avg@{config.k})", ylim=(0, 1), xticks=range(len(learners)),
             xticklabels=[f"{r['stage']}\n{r['task']}" for r in learners])
    if learners:
        bars.legend(frameon=False, fontsize=8)
    for ax, (stage, series, keys, words) in zip(others, drawn):
        for i, key in enumerate(keys):
            view.line(ax, series, key, view.COLORS[i], key)
        ax.set(title=f"{stage}: {words}", xlabel="step")
        ax.legend(frameon=False, fontsize=8)
        ax.grid(alpha=0.25)
    for ax in (bars, *others):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    view.pyplot().close(figure)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "n k")
    env = start(config.device, threads=config.threads)
    try:
        rows = stages(config, env)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    if not rows:
        die("no run of the speedrun is here: ./speedrun.sh makes them, in the folder that it lies in")
    lines = table(rows, config.k)
    print("\n" + "\n".join(lines) + "\n")
    Path("runs", "speedrun.md").write_text("\n".join(lines) + "\n")
    picture(rows, config, Path("runs", "speedrun.png"))
    print("wrote runs/speedrun.md and runs/speedrun.png")
    return finish("speedrun", seconds=sum(r["seconds"] for r in rows),
                  **{f"{r['stage']} {side}": r[side]["avg"] for r in rows
                     for side in ("before", "after") if r[side]})


if __name__ == "__main__":
    main()
