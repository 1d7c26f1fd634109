"""
Pictures of runs, drawn from metrics.jsonl, and the page to read their samples in, made of samples.jsonl.

    python -m common.view runs/base               # writes curves.png and samples.html of the run again
    python -m common.view runs/a runs/b runs/c    # one picture, one line per run, to compare
    python -m common.view runs/a runs/b --html    # one page: curves to point at, the flags that differ,
                                                  # and what each run wrote for the same problem

There is no dashboard and no server: a run draws its own curves.png when it ends, and two runs are
compared by laying one over the other. A panel appears when its numbers exist, so the same code
draws pretraining, RL and distillation. A page is one file that loads nothing else: open it, mail
it, keep it with a paper.
"""
import functools
import html
import json
import math
import sys
from pathlib import Path

from common.files import ended_runs
from common.flags import die

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
    ("tokens per second", ["tokens_per_second"], "linear"),
]
HELD_OUT = {"eval": "eval: valid split", "test": "test: before and after"}
# of an evaluation, but no accuracies: not drawn
COUNTS = {"n", "k", "length", "truncated", "no_answer"}
# as in a step, from the bottom
STAGES = ["t_rollout", "t_reward", "t_pack", "t_train", "t_opt", "t_idle"]
STROKES = ["-", "--", ":", "-."]
COLORS = ["#2f6db3", "#d9772b", "#3a9660", "#b8405e", "#7a5bb5", "#8a6d3b", "#3aa6b0", "#6b7280"]


@functools.cache
def pyplot():
    """matplotlib's, imported by whoever draws: most processes never do, and would start later"""
    import matplotlib
    matplotlib.use("Agg")                          # a training node has no screen
    import matplotlib.pyplot
    return matplotlib.pyplot


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
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if key != "step" and number and math.isfinite(value):
                steps, values = series.setdefault(key, ([], []))
                steps.append(step)
                values.append(value)
    if not series:
        die(f"{path} holds no numbers yet")
    return series


def has(folder, step, names):
    """are there numbers of these names at that step?"""
    known = read(folder)
    return any(step in known[name][0] for name in names if name in known)


def smooth(values):
    """a mean over the last 2% of the curve, at most 50 points: the raw line stays visible behind it"""
    width = min(50, max(1, len(values) // 50))
    out = []
    total = 0.0
    for i, value in enumerate(values):
        leaves = values[i - width] if i >= width else 0.0
        total += value - leaves
        out.append(total / min(i + 1, width))
    return out


def line(ax, series, key, color, label, style="-", log=False):
    """one curve: the raw line behind its mean, with a band where there are standard errors"""
    steps, values = series[key]
    if log:      # 0 has no place there, and a step without signal has a gradient of 0
        steps = [s for s, v in zip(steps, values) if v > 0]
        values = [v for v in values if v > 0]
    few = {"marker": "o", "markersize": 3.5} if len(steps) < 25 else {}
    error = dict(zip(*series.get(key + "_se", ((), ()))))
    # before and after: two points, and nothing is known of what lies between
    if error and len(steps) < 3:
        bars = [error.get(s, 0.0) for s in steps]
        ax.errorbar(steps, values, bars, fmt="o", linestyle=":", color=color, label=label, linewidth=1.2,
                    capsize=3, markersize=4)
        return
    soft = smooth(values)
    if soft != values:
        ax.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
    ax.plot(steps, soft, style, color=color, label=label, linewidth=1.6, **few)
    if error:
        band = [(s, v - error[s], v + error[s]) for s, v in zip(steps, values) if s in error]
        at, low, high = zip(*band) if band else ((), (), ())
        ax.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)


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
    scores = {}  # eval/trained -> eval/trained/avg, eval/trained/maj
    for key in sorted(have - drawn):
        group, _, name = key.rpartition("/")
        if key.startswith(("eval/", "test/")) and not key.endswith("_se") and name not in COUNTS:
            scores.setdefault(group, []).append(key)
    held_out = []
    for group, keys in scores.items():
        title = HELD_OUT.get(group, group.replace("/", " "))
        if any(key + "_se" in have for key in keys):
            title += ", +- standard error"
        held_out.append((title, keys, "linear"))
    found[1:1] = held_out                          # after the reward
    return [panel for panel in found if panel[1]]


def draw(runs, path, title=""):
    """runs: {name: read(folder)}. One run: a line per key. Several: the color is the run, the
    stroke is the key"""
    todo = panels(runs)
    seconds = timed(runs)
    count = len(todo) + bool(seconds)
    if not count:
        die(f"nothing to draw: {', '.join(runs)} has none of the known numbers (reward, loss, eval/*, ...)")
    columns = min(3, count)
    lines = -(-count // columns)
    size = (4.8 * columns, 3.1 * lines)
    fig, axes = pyplot().subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    axes = list(axes.flat)
    for ax, panel in zip(axes, todo):
        draw_panel(ax, runs, *panel)
    if seconds:
        draw_seconds(axes[len(todo)], runs, seconds)
    for ax in axes[:count]:
        if ax.get_yscale() == "linear":            # 12.1 and 12.2, not 0.1 and 0.2 and a small "+1.2e1"
            ax.ticklabel_format(axis="y", useOffset=False)
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.margins(x=0.05 if ax.containers else 0.01)      # error bars at both ends
    for ax in axes[count:]:
        ax.set_visible(False)
    if len(runs) == 1:
        fig.suptitle(title, fontsize=13)
    else:      # one legend for all panels, which is the title too
        handles = [pyplot().Line2D([], [], color=color(i), linewidth=2, label=run)
                   for i, run in enumerate(runs)]
        fig.legend(handles=handles, loc="outside upper center", ncols=8, frameon=False, fontsize=11)
    fig.savefig(path, dpi=110)
    pyplot().close(fig)
    return path


def timed(runs):
    """-> the stages of a step of which at least one run has the seconds; t_step is their sum"""
    seconds = {k for series in runs.values() for k in series if k.startswith("t_") and k != "t_step"}
    return [k for k in STAGES if k in seconds] + sorted(seconds - set(STAGES))


def color(i):
    return COLORS[i % len(COLORS)]


def told_apart(title, keys):
    """-> the title and keys of a panel of several runs. Of an evaluation, one line per run is drawn:
    with four of each they could not be told apart"""
    if not keys[0].startswith(("eval/", "test/")):
        return title, keys
    return f"{keys[0].rpartition('/')[2]}, {title}", keys[:1]


def draw_panel(ax, runs, title, keys, scale):
    log = scale == "log"
    held_out = keys[0].startswith(("eval/", "test/"))
    single = len(runs) == 1
    if not single:
        title, keys = told_apart(title, keys)
    for i, (run, series) in enumerate(runs.items()):
        for j, key in enumerate(k for k in keys if k in series):
            if single:
                line(ax, series, key, color(j), key.rpartition("/")[2] if held_out else key, log=log)
            else:
                line(ax, series, key, color(i), run, STROKES[j % 4], log=log)
    values = [v for series in runs.values() for k in keys if k in series for v in series[k][1]]
    if log and any(v > 0 for v in values):
        ax.set_yscale("log")
    ax.set_title(title)
    if len(keys) > 1 and single:
        ax.legend(frameon=False, fontsize=8)
    elif len(keys) > 1:
        strokes = [pyplot().Line2D([], [], color="grey", linestyle=STROKES[j % 4], label=key)
                   for j, key in enumerate(keys)]
        ax.legend(handles=strokes, frameon=False, fontsize=8)


def draw_seconds(ax, runs, keys):
    """one run: its stages, stacked; several: the sum of each, over each other"""
    if len(runs) == 1:
        stages(ax, *runs.values(), keys)
        ax.set_title("seconds per step, by stage")
        ax.set_ylim(0, ax.get_ylim()[1] * 1.25)            # room for the legend above the stack
        ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
        return
    for i, (run, series) in enumerate(runs.items()):
        total = whole_steps(series, keys)
        if total:
            line(ax, {"t": (list(total), list(total.values()))}, "t", color(i), run)
    ax.set_title("seconds per step")


def whole_steps(series, keys):
    """-> {step: the seconds of all its stages}"""
    total = {}
    for key in [k for k in keys if k in series]:
        for step, value in zip(*series[key]):
            total[step] = total.get(step, 0.0) + value
    return total


def curves(folder):
    """runs/NAME/curves.png"""
    folder = Path(folder)
    return draw({folder.name: read(folder)}, folder / "curves.png", folder.name)


# --------------------------------------------------------------------------------------------------
# samples: what the model said, token by token

MOST = 200_000       # tokens on a page: a browser is slow with more


def thin(rows):
    """
    -> rows of evenly chosen steps, the first and the last among them, so that a page has at most
    MOST tokens; and a note that says so
    """
    steps = sorted({row["step"] for row in rows})
    size = dict.fromkeys(steps, 0)
    for row in rows:
        size[row["step"]] += len(row["pieces"])
    for every in range(1, len(steps) + 1):
        kept = {*steps[::every], steps[-1]}
        if sum(size[s] for s in kept) <= MOST or every == len(steps):
            break
    note = ""
    if every > 1:
        note = f"Every {every}th step of samples.jsonl, and the last: all of them would be "
        note += f"{sum(size.values()):,} tokens."
    return [row for row in rows if row["step"] in kept], note


def rounded(value):
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return round(value, 3) if isinstance(value, float) else value


def read_samples(folder):
    """-> the rows of samples.jsonl, [] where the run kept none"""
    path = Path(folder) / "samples.jsonl"
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            row = json.loads(line)
            row["step"], row["pieces"], row["prompt"], row["text"]
        # a killed process's half line, or rows that are no samples
        except (ValueError, KeyError, TypeError):
            continue
        rows.append(row)
    return rows


def write_page(frame, name, content, path):
    """-> path. frame: a file beside this one; its NAME and ROWS become what is said here"""
    # "</script>" in a sample must not end the page's own; in JSON, < may be written as its number
    text = json.dumps(content).replace("<", "\\u003c")
    frame = (Path(__file__).parent / frame).read_text(encoding="utf-8")
    # NAME is replaced in the frame alone: a sample may hold the same word
    head, tail = (part.replace("NAME", html.escape(name)) for part in frame.split("ROWS", 1))
    path.write_text(head + text + tail, encoding="utf-8")
    return path


def samples(folder):
    """runs/NAME/samples.html, or None where the run kept no samples"""
    folder = Path(folder)
    rows = read_samples(folder)
    if not rows:
        return None
    rows, note = thin(rows)
    short = [{key: rounded(value) for key, value in row.items()} for row in rows]
    return write_page("samples.html", folder.name, {"rows": short, "note": note}, folder / "samples.html")


def pages(folder):
    """what a run leaves for people: curves.png, and samples.html if it kept samples"""
    return [path for path in (curves(folder), samples(folder)) if path]


# --------------------------------------------------------------------------------------------------
# runs beside each other, on one page

POINTS = 1500        # of a curve on the page
PROBLEMS = 300       # on the page
LETTERS = 3_000_000  # of their samples
NOT_CHOSEN = {"name", "resume", "date"}      # of a config: they say which run it is, not what it does


def charts(runs):
    """-> [{title, scale, lines}] of the same panels as draw(); a line has its run's number, its key,
    the numbers, and their standard errors where there are any"""
    found = []
    for title, keys, scale in panels(runs):
        title, keys = told_apart(title, keys)
        lines = [point_list(i, key, *series[key], dict(zip(*series.get(key + "_se", ((), ())))))
                 for i, series in enumerate(runs.values()) for key in keys if key in series]
        found.append({"title": title, "scale": scale, "lines": lines})
    seconds = timed(runs)
    totals = [whole_steps(series, seconds) for series in runs.values()]
    lines = [point_list(i, "seconds", list(t), list(t.values()), {}) for i, t in enumerate(totals) if t]
    return found + [{"title": "seconds per step", "scale": "linear", "lines": lines}] * bool(lines)


def point_list(run, key, steps, values, errors):
    every = -(-len(steps) // POINTS)
    steps = steps[::every]
    return {"run": run, "key": key, "steps": steps, "values": [float(f"{v:.5g}") for v in values[::every]],
            "errors": [float(f"{errors[s]:.3g}") if s in errors else None for s in steps] if errors else []}


def flags_of(configs):
    """-> [[flag, its value in each run]] of those that differ, and of those that do not"""
    names = list(dict.fromkeys(name for config in configs for name in config if name not in NOT_CHOSEN))
    rows = [[name, [config.get(name) for config in configs]] for name in names]
    same = [all(value == values[0] for value in values) for _, values in rows]
    return [row for row, s in zip(rows, same) if not s], [row for row, s in zip(rows, same) if s]


def task_of(config):
    return config.get("data") or config.get("task") or "a task that its config.json does not name"


def same_problems(folders):
    """-> [{prompt, visits: [[step, samples] of each run]}] of the prompts that at least two runs
    sampled, in the order of their steps; and a note, if a page cannot hold them all"""
    asked = {}                           # prompt -> {run: {step: samples}}
    for i, folder in enumerate(folders):
        for row in read_samples(folder):
            visits = asked.setdefault(row["prompt"], {}).setdefault(i, {})
            short = {key: rounded(row.get(key)) for key in ("index", "reward", "finished", "text")}
            visits.setdefault(row["step"], []).append(short | {"tokens": len(row["pieces"])})
    shared = {prompt: by_run for prompt, by_run in asked.items() if len(by_run) > 1}
    found = [{"prompt": prompt, "visits": [list(by_run.get(i, {}).items()) for i in range(len(folders))]}
             for prompt, by_run in sorted(shared.items(), key=lambda item: min(map(min, item[1].values())))]
    every = max(-(-len(found) // PROBLEMS), -(-len(json.dumps(found)) // LETTERS))
    note = f"{len(found):,} problems were sampled by two runs or more"
    return found[::every], note + (f"; one in {every} of them is here." if every > 1 else ".")


def compare(folders, runs):
    """one page of several runs, beside the first of them"""
    from common.files import run_config          # imports torch, which no picture needs

    configs = [run_config(folder) for folder in folders]
    tasks = [task_of(config) for config in configs]
    alike = len(set(tasks)) == 1
    differ, same = flags_of(configs)
    problems, found = same_problems(folders) if alike else ([], "")
    note = ""
    if not alike:
        names = ", ".join(dict.fromkeys(tasks))
        note = f"These runs are of different tasks ({names}): their curves alone are shown."
    content = {"runs": [{"name": name, "color": color(i)} for i, name in enumerate(runs)], "note": note,
               "charts": charts(runs), "differ": differ if alike else [], "same": same if alike else [],
               "problems": problems, "found": found}
    path = folders[0].parent / f"compare-{'-'.join(f.name for f in folders)[:120]}.html"
    return write_page("compare.html", " and ".join(runs), content, path)


def compare_runs(config):
    """-> the lines that compare a run of ttrl.py that ended with those that differ from it in reward, judge
    or seed alone"""
    runs = []
    free = "name reward judge seed resume threads workers save_every wandb".split()
    for other, result in ended_runs(config, free):
        judge = f" ({other['judge']})" if other["reward"] == "majority" else ""
        runs.append((other["reward"] + judge, other["seed"], result))
    runs.sort(key=lambda entry: entry[:2])
    if len(runs) < 2:
        return []
    ceiling = {}                                         # seed -> the gain with true labels
    for name, seed, result in runs:
        if name == "label" and "trained" in result["gain"]:
            ceiling[seed] = result["gain"]["trained"][0]
    lines = [f"beside each other, avg@{config.eval_k} after - before (paired):"]
    for name, seed, result in runs:
        parts = [f"{where} {d:+.1%} +-{se:.1%}" for where, (d, se) in result["gain"].items()]
        if ceiling.get(seed, 0) > 0 and "trained" in result["gain"]:
            share = result["gain"]["trained"][0] / ceiling[seed]
            parts.append(f"{share:.0%} of the gain with true labels")
        lines.append(f"  {name:<20} seed {seed}  {', '.join(parts)}")
    return lines


def main(argv=None):
    argv = [*(sys.argv[1:] if argv is None else argv)]
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        return
    as_page = "--html" in argv
    folders = [Path(word) for word in argv if word != "--html"]
    if not folders or any(str(word).startswith("-") for word in folders):
        die("give one run folder or several: python -m common.view runs/NAME [runs/NAME ...] [--html]")
    if len(folders) == 1:
        if as_page:
            die("--html compares runs: give two folders or more (samples.html of one is written without it)")
        print(*pages(folders[0]), sep="\n")
        return
    # two folders of one name are told apart by their paths
    short = len({f.name for f in folders}) == len(folders)
    runs = {f.name if short else str(f): read(f) for f in folders}
    if as_page:
        print(compare(folders, runs))
        return
    print(draw(runs, folders[0].parent / f"overlay-{'-'.join(f.name for f in folders)[:120]}.png"))


if __name__ == "__main__":
    main()
