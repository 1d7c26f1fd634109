"""
records/verify.py: is this log a record? It reads the log, checks every rule that a machine can
check, and prints the line for the table.

    python records/verify.py records/laptop/LOG.jsonl

A log has one JSON object per run, as records/run.py writes them: track, side (new or old), seed,
started, machine, commit, commands, seconds by stage, accuracy, its standard error over problems,
what it was measured on, and the weights it began with. Exit code 1: no record, and every reason why.
"""
import hashlib
import json
import math
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402  (a script in a folder of its own finds the rest of the house one floor up)
from common.flags import die  # noqa: E402

# task, problems and samples of the judge, the accuracy to reach, seeds at least; start: the model
# that every run begins with, or random weights
TRACKS = {
    "laptop": dict(task="countdown", n=1000, k=4, max_new=48, target=0.5, seeds=5, start="",
                   machine="2 CPU cores"),
    "1gpu": dict(task="gsm8k", n=1319, k=4, max_new=1024, target=0.50, seeds=2,
                 start="Qwen2.5-0.5B-Instruct", machine="one GPU"),
    "8gpu": dict(task="gsm8k", n=1319, k=4, max_new=1024, target=0.83, seeds=2,
                 start="Qwen2.5-3B-Instruct", machine="eight GPUs of one node"),
}
P = 0.01
Z = 1.96             # standard errors from the mean to the ends of a 95% interval
STAGES = ("pretraining", "rollout", "reward", "pack", "update", "idle")
FIELDS = ("track", "side", "seed", "started", "machine", "commit", "commands",
          "seconds", "accuracy", "problems", "n", "k", "max_new")
OF_A_START = ("se", "start")         # two more, where a track begins with a model


def problems_of(track):
    """A name for the fixed problems of a track: it changes when a problem does."""
    t = TRACKS[track]
    return hashlib.sha256("\n".join(p.prompt for p in data.load(t["task"]).problems("test", t["n"], 0))
                          .encode()).hexdigest()[:16]


def tail(t, df):
    """The chance that Student's t with df degrees of freedom is above t: the density summed by
    Simpson's rule, after x = tan(u)."""
    if not math.isfinite(t):
        return 0.0 if t > 0 else 1.0
    front = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)

    def density(u):
        return front * (1 + math.tan(u) ** 2 / df) ** (-(df + 1) / 2) / math.cos(u) ** 2

    a, b, steps = math.atan(t), math.pi / 2 - 1e-9, 2000
    h = (b - a) / steps
    return h / 3 * sum(density(a + i * h) * (1 if i in (0, steps) else 4 if i % 2 else 2)
                       for i in range(steps + 1))


def above(values, bar):
    """p of "the mean of these is not above the bar": one-sided t-test."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    gap = statistics.fmean(values) - bar
    return tail(gap / spread if spread else math.copysign(math.inf, gap), len(values) - 1)


def below(new, old):
    """p of "new is not below old": Welch's one-sided t-test."""
    a, b = statistics.variance(new) / len(new), statistics.variance(old) / len(old)
    gap = statistics.fmean(old) - statistics.fmean(new)
    if a + b == 0:
        return 0.0 if gap > 0 else 1.0
    df = (a + b) ** 2 / (a**2 / (len(new) - 1) + b**2 / (len(old) - 1))
    return tail(gap / math.sqrt(a + b), df)


def read(path):
    if not path.is_file():
        die(f"{path}: no such log")
    runs = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            run = json.loads(line)
            missing = [field for field in FIELDS if field not in run]
        except (ValueError, TypeError):
            die(f"{path}, line {number}: not a JSON object")
        if TRACKS.get(run.get("track"), {}).get("start"):
            missing += [field for field in OF_A_START if field not in run]
        if missing:
            die(f"{path}, line {number}: it has no {', '.join(missing)}")
        runs.append(run)
    if not runs:
        die(f"{path} is empty")
    return sorted(runs, key=lambda run: run["started"])


def faults(runs, others):
    """-> every reason why this is no record. others: whether the track has another record to beat."""
    found, track = [], runs[0]["track"]
    if track not in TRACKS:
        return [f"no track {track!r}: one of {', '.join(TRACKS)}"]
    rules, problems = TRACKS[track], problems_of(track)
    new, old = ([run for run in runs if run["side"] == side] for side in ("new", "old"))
    if any(run["track"] != track for run in runs):
        found.append("the runs are of more than one track")
    if len({run["machine"] for run in runs}) > 1:
        found.append(f"more than one machine: {', '.join(sorted({run['machine'] for run in runs}))}")
    for name, side in (("new", new), ("old", old)):
        count = len({run["seed"] for run in side})
        if (side or name == "new") and count < rules["seeds"]:
            found.append(f"{name}: {count} seeds, at least {rules['seeds']} are needed")
        if len({json.dumps([run["commit"], run["commands"]]) for run in side}) > 1:
            found.append(f"{name}: the runs are not of one commit and one set of commands")
    for run in runs:
        where = f"{run['side']}, seed {run['seed']}"
        if run["problems"] != problems or any(run[key] != rules[key] for key in ("n", "k", "max_new")):
            found.append(f"{where}: not measured on the track's problems")
        needed = ["rollout"] if rules["start"] else ["pretraining", "rollout"]
        if set(run["seconds"]) - set(STAGES) or not all(run["seconds"].get(s, 0) > 0 for s in needed):
            found.append(f"{where}: its seconds are not by stage, from "
                         f"{rules['start'] or 'random weights'} on: {run['seconds']}")
        if not 0 <= run["accuracy"] <= 1 or any(not v >= 0 for v in run["seconds"].values()):
            found.append(f"{where}: numbers that cannot be")
    if others and not old:
        found.append("the track has a record: run it beside yours, alternating, as side old")
    if any(a["side"] == b["side"] for a, b in zip(runs, runs[1:])) and old:
        found.append("old and new do not alternate")
    if found:
        return found
    if rules["start"]:
        return from_a_model(rules, new, old)
    if (p := above([run["accuracy"] for run in new], rules["target"])) >= P:
        found.append(f"accuracy {statistics.fmean(run['accuracy'] for run in new):.1%} "
                     f"is not above {rules['target']:.0%} with p < {P}: p = {p:.3g}")
    if old and (p := below([total(run) for run in new], [total(run) for run in old])) >= P:
        found.append(f"not faster than the old one with p < {P}: p = {p:.3g}")
    return found


def from_a_model(rules, new, old):
    """The rules of the tracks whose runs are too dear for five seeds: each of the two must pass alone."""
    found = []
    for run in new:
        low = run["accuracy"] - Z * run["se"]
        if not (run["se"] > 0 and low > rules["target"]):
            found.append(f"seed {run['seed']}: accuracy {run['accuracy']:.1%} +-{run['se']:.1%}, the lower "
                         f"end of its 95% interval is {low:.1%}, not above {rules['target']:.0%}")
    weights = {json.dumps(run["start"], sort_keys=True) for run in [*new, *old]}
    if len(weights) > 1:
        found.append(f"they begin with different weights: {', '.join(sorted(weights))}")
    if any(rules["start"] not in str(run["start"].get("name")) for run in new):
        found.append(f"they do not begin with {rules['start']}: {new[0]['start'].get('name')}")
    if any("START" not in command for run in new for command in run["commands"] if "--init" in command):
        found.append("a command begins with another model than START")
    if old and max(map(total, new)) >= min(map(total, old)):
        found.append(f"not each new run is faster than each old one: {max(map(total, new)):.0f} s "
                     f"and {min(map(total, old)):.0f} s")
    return found


def total(run):
    return sum(run["seconds"].values())


def line(runs, path):
    """The row of the table in records/README.md."""
    new = [run for run in runs if run["side"] == "new"]
    seconds, accuracy = [total(run) for run in new], [run["accuracy"] for run in new]
    return (f"| {statistics.fmean(seconds):.0f} +-{statistics.stdev(seconds) / len(new) ** 0.5:.0f} "
            f"s | {statistics.fmean(accuracy):.1%} +-{statistics.stdev(accuracy) / len(new) ** 0.5:.1%} "
            f"| {len(new)} | {new[0]['machine']} | {new[0]['commit'][:9]} "
            f"| [{path.name}]({path.parent.name}/{path.name}) |")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0].startswith("-"):
        print(__doc__.strip())
        raise SystemExit(0 if argv in (["--help"], ["-h"]) else 2)
    path = Path(argv[0])
    runs = read(path)
    others = [log for log in (ROOT / "records" / str(runs[0]["track"])).glob("*.jsonl")
              if log.resolve() != path.resolve()]
    try:
        wrong = faults(runs, bool(others))
    except FileNotFoundError as error:                   # the track's questions, to compare theirs with
        die(error)
    for reason in wrong:
        print(f"no record: {reason}")
    if wrong:
        raise SystemExit(1)
    print(line(runs, path))


if __name__ == "__main__":
    main()
