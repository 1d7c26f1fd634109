"""
common/evidence.py: what every file of ideas/ needs and none should write again. One call of an
idea is one seed: it trains its arms, prints a table and one line, and leaves a picture. The
verdict over seeds is computed by `python -m bench ideas`, never written by hand.

    config = flags(Config, argv, __doc__)                    # those of Idea, and a few more
    needs(config.task, "answer canon", "it votes")           # or one line: what is missing
    trial = begin(config, __file__, CLAIM, ARMS, steps)      # one folder, one bar over all arms
    folder = trial.base("base")                              # where to start; trained if missing
    rl = setup(Settings(**trial.settings(decay=0.5)), reward=trial.reward)       # stages.py
    trial.point(arm, x, y)                                   # drawn, and a tick of the bar
    picture(trial, x="rollout", y="reward")
    finish(trial, (gain, se), {arm: {"avg": 0.5}})           # the table, one line, result.json

Left out of the usual recipe: a trainer that ideas plug into, and sweeps. An idea is a script with
the loop in it; what it shares with the others is where it starts, how it is judged, and how it is
drawn.
"""
import fcntl
import hashlib
import io
import json
import math
import os
import statistics
import subprocess
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from PIL import Image                                # matplotlib brings it

import data
import train_gpt
from common import machine, view
from common.files import newest, run_config, write_whole
from common.flags import die, positive, without_effect
from common.run import progress, start
from rollout import Sample
from train_gpt import GPT, GPTConfig

# the models that ideas start from: one per seed, shared by all, trained once, not on their clock
RECIPES = {
    "base": "--preset base",
    "tiny": "--preset tiny",                     # bytes of Python's own library, 0.16M parameters
    # hints, siblings, peers, a calculator; at the base's own rates it forgets to solve without them
    "formats": "--init {base} --data formats --steps 120 --lr 6e-3 --muon-lr 4e-3",
    "recall": "--preset recall",                 # keys, values and a question
}
# --smoke: the most that a size of an idea's Config may be then
SMALL = dict(steps=2, asked=3, prompts=3, n=4, k=4, every=1, batch=1)
# flags of an idea that mean the same in a loop
SAME = ("seed", "threads", "task", "steps", "prompts", "n", "max_new", "lr")
FEW = 30                                         # points of a curve that are drawn one by one
MOST = 60_000                                    # bytes of a picture

# -----------------------------------------------------------------------------
# what an idea says, and what it is told


@dataclass
class Claim:
    paper: str                           # arXiv number; "": no paper
    says: str                            # the claim, with the paper's own number, model and data
    measured: str                        # what the gain is, in words
    smallest: float                      # less would interest nobody; written before the first run
    unit: str = "points"                 # of the gain and of the smallest one
    scale: str = ""                      # needs scale: the reason, "the base solves 0 of 400"
    harness: bool = False                # no idea: a known effect, which shows what can be seen


@dataclass
class Idea:
    """every idea"""
    seed: int = 0                        # base, problems and samples
    threads: int = 1                     # CPU threads
    init: str = ""                       # your model instead of the base
    smoke: bool = False                  # two steps per arm on a random model: does it all connect?

    def __post_init__(self):
        positive(self, "threads")
        for name, most in SMALL.items():
            if self.smoke and hasattr(self, name):
                setattr(self, name, min(most, getattr(self, name)))


def needs(name, words, why):
    """-> the task called `name`, which must have these: functions (answer, canon, ...), a "gold" with each
    problem, or a gold that is a "solution", a text that the task's reward takes."""
    try:
        task = data.load(name)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    have = dir(task)
    if {"gold", "solution"} & {*words.split()}:
        problem = task.problems("train", 1, 0)[0]
        known = problem.gold is not None
        have += ["gold"] * known
        have += ["solution"] * (known and task.reward(problem, problem.gold) == 1)
    missing = [word for word in words.split() if word not in have]
    if missing:
        die(f"--task {name} has no {' and no '.join(missing)}: {why}; countdown has all of it")
    return task


def from_scratch(config):
    """What is pretrained begins with new weights: a model of one's own is refused, in one line."""
    without_effect(config, [("init", False, "this idea trains its own models, from the first step on")])


# -----------------------------------------------------------------------------
# the trial: all arms of one seed


@dataclass
class Trial:
    name: str
    config: Idea
    claim: Claim
    arms: tuple
    folder: Path
    bar: object
    gflops: float                                    # of one core, when the trial began
    started: float                                   # CPU seconds
    commit: str                                      # the version of the repo, when the trial began
    reward: str = ""                                 # for stages.setup; "": the task's own
    panels: dict = field(default_factory=dict)       # panel -> arm -> [(x, y)]; "" is the first

    def base(self, kind="base"):
        """-> the folder to start from: --init, or a shared start of this seed."""
        if self.config.init or self.config.smoke:
            return self.config.init or random_model(kind, self.folder)
        before = cpu_seconds()
        folder = shared(kind, self.config.seed, self.config.threads)
        self.started += cpu_seconds() - before
        return folder

    def settings(self, **more):
        """-> flags of stages.Settings: the idea's own of the same names, the start, and more"""
        own = {name: value for name, value in vars(self.config).items() if name in SAME}
        few = {"problems": 64} if self.config.smoke else {}      # thousands take longer than two steps
        return {**own, "init": self.base(), "workers": 1, **few, **more}

    def point(self, arm, x, y):
        self.dot("", arm, x, y)
        self.bar.update()

    def dot(self, panel, arm, x, y):
        """a point of another panel, without a tick of the bar"""
        self.panels.setdefault(panel, {}).setdefault(arm, []).append((float(x), float(y)))


def begin(config, file, claim, arms, steps):
    """steps: ticks of the bar, per arm"""
    name = Path(file).stem
    if os.environ.get("WORLD_SIZE", "1") != "1":
        die(f"ideas.{name} is made for one process: python -m ideas.{name}, without torchrun")
    start(threads=config.threads)
    folder = Path(f"runs/ideas/{name}/{'smoke' if config.smoke else 'seed'}_{config.seed}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)             # of an earlier call
    gflops = 0.0 if config.smoke else machine.gflops()
    bar = progress(steps * len(arms), name)
    trial = Trial(name, config, claim, arms, folder, bar, gflops, cpu_seconds(), commit())
    if config.smoke:
        trial.reward = easy_reward(folder)
    return trial


def cpu_seconds():
    """of this process and of those that it has ended: others on the machine do not count"""
    return sum(os.times()[:4])


# -----------------------------------------------------------------------------
# shared starts


@contextmanager
def only_one(folder):
    """Of two processes that want the same start one trains it, the other waits. A lock ends with
    its process."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process trains {folder}: waiting for it", flush=True)
            fcntl.flock(f, fcntl.LOCK_EX)
        yield


def shared(kind, seed, threads=1):
    """-> runs/ideas/KIND{seed}, trained now if it is missing; resumed, if it was interrupted."""
    recipe = RECIPES[kind]
    if "{base}" in recipe:
        recipe = recipe.format(base=shared("base", seed, threads))
    name = f"ideas/{kind}{seed}"
    folder = Path("runs", name)
    argv = [*recipe.split(), "--name", name, "--seed", str(seed), "--threads", str(threads)]
    with only_one(folder):
        config = train_gpt.configure(argv)
        begun = run_config(folder)
        changed = [k for k, v in begun.items() if k not in ("name", "resume", *train_gpt.FREE)
                   and v != getattr(config, k, None)]
        if changed:
            die(f"{folder} was made by another recipe ({', '.join(changed)} differ): remove it, and results "
                "that began with it")
        found = newest(folder)
        if not found or found[1] < config.steps:
            print(f"no {kind} of seed {seed} yet: training {folder}", flush=True)
            train_gpt.main(argv + ["--resume"] * bool(begun))
            start(threads=threads)                   # again: the training had Threads of its own
    return str(folder)


def random_model(kind, folder):
    """-> a tiny model without a zero in it, of the tokenizer of that start"""
    tok = data.tokenizer(train_gpt.configure(RECIPES[kind].format(base="x").split()).tokenizer)
    model = GPT(GPTConfig(tok.vocab_size, 2, 2, 1, 8, 16, 32, 2048, 10000.0)).init_weights(0)
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=g))
    model.save_hf(folder / "model", tok)
    return str(folder / "model")


def easy_reward(folder):
    """A random model is never right, and without rewards that differ no update would be tried."""
    path = folder / "easy.py"
    path.write_text("def score(problem, text):\n    return float(len(text) % 2)\n")
    return f"{path}:score"


def to_imitate(prompt, text, i, tok):
    """-> text i as a sample, learned as if the model had said it and been right (with --tis 0)"""
    tokens = tok.encode(text + tok.end)
    return Sample(tok.encode(prompt), tokens, [0.0] * len(tokens), "stop", i, 0, 0, advantage=1.0)


# -----------------------------------------------------------------------------
# the verdict


def inside(t, df):
    """P(|T| < t) of Student's t: a finite sum for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(df))
    cosine = math.cos(angle)
    odd = df % 2
    term = cosine if odd else 1.0
    total = 0.0
    for i in range(df // 2):
        total += term
        term *= cosine**2 * (2 * i + 1 + odd) / (2 * i + 2 + odd)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total


def t95(n):
    """How many standard errors of the mean of n numbers the 95% interval reaches to either side."""
    low, high = 0.0, 100.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle, n - 1) < 0.95 else (low, middle)
    return high


def interval(gains):
    """-> (mean, half the width of its 95% interval); one seed has no interval"""
    mean = statistics.fmean(gains)
    if len(gains) < 2:
        return mean, math.inf
    return mean, t95(len(gains)) * statistics.stdev(gains) / math.sqrt(len(gains))


def verdict(gains, smallest):
    """gains: idea minus baseline in the direction of the claim, one per seed -> a word."""
    mean, half = interval(gains)
    if mean - half > 0:
        return "holds here" if mean >= smallest else "holds here, but small"
    if mean + half < 0:
        return "reversed here"
    # not seen: a gain worth having is excluded
    return "not seen here" if mean + half < smallest else "undecided"


# -----------------------------------------------------------------------------
# the picture and the result


def draw(seeds, labels, title, path):
    """
    One picture over the seeds. seeds: panels of each, as in Trial; labels: panel -> (x, y) or (x, y, "o")
    for points without a line. One color per arm; the mean over seeds in front of each seed's own line.
    """
    plt = view.pyplot()
    figure, axes = plt.subplots(1, len(labels), figsize=(5.2 * len(labels), 3.8), squeeze=False)
    arms = list(dict.fromkeys(arm for panels in seeds for panel in panels.values() for arm in panel))
    for ax, (panel, (x, y, *style)) in zip(axes[0], labels.items()):
        for arm in arms:
            curves = [sorted(panels[panel][arm]) for panels in seeds if arm in panels.get(panel, {})]
            draw_arm(ax, curves, arm, arms.index(arm), *style)
        begins_late(ax)
        ax.set(xlabel=x, ylabel=y, title=panel or title)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    for dpi in (110, 90, 70, 50):                    # legible, and never too large to keep in git
        whole = io.BytesIO()
        figure.savefig(whole, dpi=dpi)
        small = Image.open(whole).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE)
        small.save(path, optimize=True)
        if path.stat().st_size < MOST:
            break
    plt.close(figure)


def draw_arm(ax, curves, arm, number, style="-"):
    """The curves of one arm, one per seed. Colors come again after the last one, with other marks."""
    if not curves:
        return
    color = view.color(number)
    again = number >= len(view.COLORS)
    marker = "s" if again else "o"
    if style == "o":
        xs, ys = zip(*(point for curve in curves for point in curve))
        ax.plot(xs, ys, marker, color=color, label=arm, markersize=3, alpha=0.6)
        return
    for curve in curves:
        ax.plot(*zip(*curve), color=color, alpha=0.25, linewidth=0.7)
    xs = [x for x, _ in curves[0]]
    same = all([x for x, _ in curve] == xs for curve in curves)
    for curve in [mean_curve(curves)] if same else curves:
        xs, ys = zip(*curve)
        many = len(xs) > FEW
        ax.plot(xs, smooth(ys) if many else ys, "--" if again else "-", color=color, label=arm, linewidth=1.7,
                marker=None if many else marker, markersize=5 if again else 3)
        arm = None                                               # one line of the legend


def begins_late(ax):
    """The heights of long curves after their first tenth: a loss that falls from 6 to 1.5 at once would
    leave no room for what happens then."""
    late = []
    for line in ax.get_lines():
        heights = line.get_ydata()
        if len(heights) > FEW:
            late += [y for y in heights[len(heights) // 10:] if math.isfinite(y)]
    if late:
        room = 0.05 * (max(late) - min(late))
        ax.set_ylim(min(late) - room, max(late) + room)


def mean_curve(curves):
    return [(points[0][0], statistics.fmean(y for _, y in points)) for points in zip(*curves)]


def smooth(values):
    """A mean over the points around each, a tenth of the curve."""
    reach = max(1, len(values) // 20)
    return [statistics.fmean(values[max(0, i - reach):i + reach + 1]) for i in range(len(values))]


def picture(trial, x, y, **panels):
    """x, y: what the axes of point() mean. panels: NAME=(x, y), or (x, y, "o"), of each dot("NAME", ...)"""
    labels = {"": (x, y), **panels}
    draw([trial.panels], labels, trial.name, trial.folder / "picture.png")
    points = dict(labels=labels, panels=trial.panels)
    write_whole(trial.folder / "points.json", lambda f: f.write(json.dumps(points).encode()))


def finish(trial, gain, table, note=""):
    """gain: (mean, standard error over problems, or 0) of this seed, in the direction of the claim.
    table: {arm: {metric: number}}."""
    trial.bar.close()
    minutes = (cpu_seconds() - trial.started) / 60
    mean, se = map(float, gain)
    numbers = [mean, se, *(v for row in table.values() for v in row.values())]
    if not all(math.isfinite(v) for v in numbers):
        die(f"ideas.{trial.name}, seed {trial.config.seed}: a number is not finite, and no verdict can stand "
            f"on it: gain {mean} +-{se}, {table}")
    width = max(map(len, table))
    for arm, row in table.items():
        print(f"  {arm:<{width}}  " + "  ".join(f"{k} {v:.3g}" for k, v in row.items()))
    claim = trial.claim
    row = dict(idea=trial.name, seed=trial.config.seed, claim=asdict(claim), gain=mean, se=se,
               table=table, note=note, minutes=round(minutes, 2), gflops=round(trial.gflops, 1),
               commit=trial.commit, source=source(trial.name), smoke=trial.config.smoke,
               changed=changed(trial.config))
    text = json.dumps(row, indent=1) + "\n"
    write_whole(trial.folder / "result.json", lambda f: f.write(text.encode()))
    noise = f" +-{se:.2f}" if se else ""
    print(f"{claim.says} | here, seed {trial.config.seed}: {claim.measured} {mean:+.2f}{noise} {claim.unit} "
          f"{note} | {minutes:.1f} CPU minutes at {trial.gflops:.0f} GFLOP/s | {trial.folder}/picture.png")
    return row


def changed(config):
    """-> the flags that are not the idea's own: a record takes no such run."""
    return [f.name for f in fields(config)
            if f.name not in ("seed", "threads") and getattr(config, f.name) != f.default]


def source(name):
    """What ideas/NAME.py says, in twelve letters: a number belongs to the text that made it."""
    path = Path(__file__).parent.parent / "ideas" / f"{name}.py"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12] if path.exists() else ""


def commit():
    """The version of the repo that made a number; "+" if files were changed since."""
    def say(*words):
        try:
            done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True,
                                  timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""
    dirty = say("status", "--porcelain", "--untracked-files=no")
    return say("rev-parse", "--short=9", "HEAD") + "+" * bool(dirty)
