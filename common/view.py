"""
Pictures of runs, drawn from metrics.jsonl, and the page to read their samples in, made of samples.jsonl.

    python -m common.view runs/base               # writes curves.png and samples.html of the run again
    python -m common.view runs/a runs/b runs/c    # one picture, one line per run, to compare

There is no dashboard and no server: a run draws its own curves.png when it ends, and two runs are compared by laying
one over the other. A panel appears when its numbers exist, so the same code draws pretraining, RL and distillation.
samples.html is one file that loads nothing else: open it, mail it, keep it beside a paper.
"""
import html
import json
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend must be chosen first: a training node has no screen)

from common.run import die  # noqa: E402

# title, keys, scale; reward first: it is the question, the loss is not
PANELS = [
    ("reward", ["reward"], "linear"),
    ("loss", ["loss", "eval/loss"], "linear"),
    ("bits per byte", ["bpb", "eval/bpb"], "linear"),
    ("zero-variance, truncated (fraction)", ["zero_var", "truncated"], "linear"),
    ("length (tokens)", ["length"], "linear"),
    ("entropy (nats)", ["entropy"], "linear"),
    ("votes: for the winner, winner right", ["majority_ratio", "label_acc"], "linear"),
    ("student against teacher (KL)", ["kl"], "linear"),
    ("sampler against trainer (KL)", ["sampler_kl"], "log"),
    ("gradient norm", ["grad_norm"], "log"),
    ("tokens a second", ["tokens_per_second"], "linear"),
]
HELD_OUT = {"eval": "eval: valid split", "test": "test: before and after"}
COUNTS = {"n", "k", "length", "truncated", "no_answer"}        # of an evaluation: in metrics.jsonl, not beside accuracies
STAGES = ["t_rollout", "t_reward", "t_pack", "t_train", "t_opt", "t_idle"]      # in the order of a step, from the bottom
STROKES = ["-", "--", ":", "-."]
COLORS = ["#2f6db3", "#d9772b", "#3a9660", "#b8405e", "#7a5bb5", "#8a6d3b", "#3aa6b0", "#6b7280"]


def read(folder):
    """{key: ([steps], [values])}; nulls, words and a half-written last line are left out"""
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        die(f"{folder} is no run: it has no metrics.jsonl")
    series = {}
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            continue
        for key, value in row.items():
            if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    if not series:
        die(f"{path} holds no numbers yet")
    return series


def smooth(values):
    """a mean over the last 2% of the curve, at most 50 points: the raw line stays visible behind it"""
    width = min(50, max(1, len(values) // 50))
    out, total = [], 0.0
    for i, v in enumerate(values):
        total += v - (values[i - width] if i >= width else 0.0)
        out.append(total / min(i + 1, width))
    return out


def line(ax, series, key, color, label, style="-", log=False):
    steps, values = series[key]
    if log:      # 0 has no place there, and a step without signal has a gradient of 0
        steps, values = [s for s, v in zip(steps, values) if v > 0], [v for v in values if v > 0]
    few = {"marker": "o", "markersize": 3.5} if len(steps) < 25 else {}
    error = dict(zip(*series.get(key + "_se", ((), ()))))
    if error and len(steps) < 3:      # before and after: two points, and nothing is known of what lies between
        ax.errorbar(steps, values, [error.get(s, 0.0) for s in steps], fmt="o", linestyle=":", color=color, label=label, linewidth=1.2,
                    capsize=3, markersize=4)
        return
    soft = smooth(values)
    if soft != values:
        ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(steps, soft, style, color=color, label=label, linewidth=1.6, **few)
    if error:
        band = [(s, v, error[s]) for s, v in zip(steps, values) if s in error]
        ax.fill_between([s for s, _, _ in band], [v - e for _, v, e in band], [v + e for _, v, e in band], color=color, alpha=0.18,
                        linewidth=0)


def stages(ax, series, keys):
    """seconds of each stage of a step, stacked: the top edge is the step's whole time"""
    steps = sorted({s for k in keys for s in series[k][0]})
    tables = [dict(zip(*series[k])) for k in keys]
    soft = [smooth([t.get(s, 0.0) for s in steps]) for t in tables]
    ax.stackplot(steps, soft, labels=[k[2:] for k in keys], colors=COLORS, alpha=0.75, linewidth=0)


def panels(runs):
    """[(title, keys, scale)] of what at least one of the runs has"""
    have = set().union(*runs.values())
    found = [(title, [k for k in keys if k in have], scale) for title, keys, scale in PANELS]
    drawn = {k for _, keys, _ in found for k in keys}
    evals = sorted(k for k in have - drawn if k.startswith(("eval/", "test/")) and not k.endswith("_se")
                   and k.rpartition("/")[2] not in COUNTS)
    groups = dict.fromkeys(k.rpartition("/")[0] for k in evals)          # eval/trained/avg beside eval/trained/maj
    found[1:1] = [(HELD_OUT.get(g, g.replace("/", " ")) + ", +- standard error" * any(k.startswith(g) and k + "_se" in have for k in evals),
                    [k for k in evals if k.rpartition("/")[0] == g], "linear") for g in groups]
    return [panel for panel in found if panel[1]]


def draw(runs, path, title=""):
    todo = panels(runs)
    seconds = {k for series in runs.values() for k in series if k.startswith("t_") and k != "t_step"}     # that is their sum
    seconds = [k for k in STAGES if k in seconds] + sorted(seconds - set(STAGES))
    count = len(todo) + bool(seconds)
    if not count:
        die(f"nothing to draw: {', '.join(runs)} has none of the known numbers (reward, loss, eval/*, ...)")
    columns = min(3, count)
    lines = -(-count // columns)
    fig, axes = plt.subplots(lines, columns, figsize=(4.8 * columns, 3.1 * lines), squeeze=False, layout="constrained")
    for ax, (name, keys, scale) in zip(axes.flat, todo):
        held_out = keys[0].startswith(("eval/", "test/"))
        if len(runs) > 1 and held_out:      # one line a run, or nobody can tell them apart
            keys, name = keys[:1], f"{keys[0].rpartition('/')[2]}, {name}"
        for i, (run, series) in enumerate(runs.items()):
            for j, key in enumerate(k for k in keys if k in series):
                if len(runs) == 1:
                    line(ax, series, key, COLORS[j % len(COLORS)], key.rpartition("/")[2] if held_out else key, log=scale == "log")
                else:      # the run is the color, the key is the stroke
                    line(ax, series, key, COLORS[i % len(COLORS)], run, STROKES[j % 4], log=scale == "log")
        if scale == "log" and any(v > 0 for s in runs.values() for k in keys if k in s for v in s[k][1]):
            ax.set_yscale("log")
        ax.set_title(name)
        if len(runs) == 1 and len(keys) > 1:
            ax.legend(frameon=False, fontsize=8)
        elif len(keys) > 1:
            strokes = [plt.Line2D([], [], color="grey", linestyle=STROKES[j % 4], label=key) for j, key in enumerate(keys)]
            ax.legend(handles=strokes, frameon=False, fontsize=8)
    if seconds:
        ax = axes.flat[len(todo)]
        if len(runs) == 1:
            stages(ax, *runs.values(), seconds)
        else:
            for i, (run, series) in enumerate(runs.items()):
                total = {}
                for key in [k for k in seconds if k in series]:
                    for s, v in zip(*series[key]):
                        total[s] = total.get(s, 0.0) + v
                if total:
                    line(ax, {"t": (list(total), list(total.values()))}, "t", COLORS[i % len(COLORS)], run)
        ax.set_title("seconds a step" + ", by stage" * (len(runs) == 1))
        if len(runs) == 1:
            ax.set_ylim(0, ax.get_ylim()[1] * 1.25)      # room for the legend above the stack
            ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    for ax in axes.flat[:count]:
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.05 if ax.containers else 0.01)      # error bars at both ends
    for ax in axes.flat[count:]:
        ax.set_visible(False)
    if len(runs) == 1:
        fig.suptitle(title, fontsize=13)
    else:      # one legend for all panels, which is the title too
        handles = [plt.Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2, label=run) for i, run in enumerate(runs)]
        fig.legend(handles=handles, loc="outside upper center", ncols=8, frameon=False, fontsize=11)
    fig.savefig(path, dpi=110)
    plt.close(fig)
    return path


def curves(folder):
    """runs/NAME/curves.png"""
    folder = Path(folder)
    return draw({folder.name: read(folder)}, folder / "curves.png", folder.name)


# ---------------------------------------------------------------------------------------------------------------------
# samples: what the model said, token by token

MOST = 200_000       # tokens on a page: more, and a browser takes its time


def thin(rows):
    """-> rows of evenly chosen steps, the first and the last among them, so that a page has at most MOST tokens; and a note of it"""
    steps = sorted({row["step"] for row in rows})
    size = dict.fromkeys(steps, 0)
    for row in rows:
        size[row["step"]] += len(row["pieces"])
    for every in range(1, len(steps) + 1):
        kept = {*steps[::every], steps[-1]}
        if sum(size[s] for s in kept) <= MOST or every == len(steps):
            break
    note = f"Every {every}th step of samples.jsonl, and the last: all of them would be {sum(size.values()):,} tokens." if every > 1 else ""
    return [row for row in rows if row["step"] in kept], note


def rounded(value):
    return [rounded(v) for v in value] if isinstance(value, list) else round(value, 3) if isinstance(value, float) else value


def samples(folder):
    """runs/NAME/samples.html, or None where the run kept no samples"""
    folder, rows = Path(folder), []
    path = folder / "samples.jsonl"
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            row["step"], row["pieces"], row["prompt"], row["text"]
        except (ValueError, KeyError, TypeError):      # the half line of a killed process, or rows that are no samples
            continue
        rows.append(row)
    if not rows:
        return None
    rows, note = thin(rows)
    # "</script>" in a sample must not end the page's own; in JSON, < may be written as its number
    text = json.dumps({"rows": [{k: rounded(v) for k, v in row.items()} for row in rows], "note": note}).replace("<", "\\u003c")
    frame = (Path(__file__).parent / "samples.html").read_text(encoding="utf-8")
    page = folder / "samples.html"
    page.write_text(text.join(part.replace("NAME", html.escape(folder.name)) for part in frame.split("ROWS", 1)), encoding="utf-8")
    return page


def pages(folder):
    """what a run leaves for people: curves.png, and samples.html if it kept samples"""
    return [path for path in (curves(folder), samples(folder)) if path]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        return
    if not argv or any(word.startswith("-") for word in argv):
        die("give one run folder or several: python -m common.view runs/NAME [runs/NAME ...]")
    if len(argv) == 1:
        print(*pages(argv[0]), sep="\n")
        return
    folders = [Path(word) for word in argv]
    short = len({f.name for f in folders}) == len(folders)      # two folders of one name are told apart by their paths
    runs = {f.name if short else str(f): read(f) for f in folders}
    print(draw(runs, folders[0].parent / f"overlay-{'-'.join(f.name for f in folders)[:120]}.png"))


if __name__ == "__main__":
    main()
