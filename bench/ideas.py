"""
python -m bench ideas: what the papers of ideas/ claim, over seeds, and the verdict, which is computed.

Runs the seeds that are missing, two at a time with one thread each; the same command again continues after
an interrupt. Writes records/ideas/NAME.json and NAME.png, and the gallery of ideas/README.md. The words:

    holds here          the mean gain is above 0 (t interval over seeds, 95%); "but small": below the smallest
                        gain that the CLAIM calls worth having
    reversed here       it is below 0
    not seen here       neither, and a gain worth having is excluded
    undecided           neither, and it is not: two more seeds are run, and then it stands
    needs scale         by hand in the CLAIM, with the number that shows it

A harness shows first that there is something to see: its gain, RL over no RL for example, must be larger
than any other CLAIM's smallest gain in the same unit, by the same interval.

    python -m bench ideas --names darling,relex
    python -m bench ideas --check          are records, claims and table what they say? exit code 1 if not
    python -m bench ideas --seeds 0        runs nothing: writes the table again from the records
"""
import difflib
import importlib
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import ROOT, finish
from common.evidence import MOST, draw, interval, source, verdict
from common.files import write_whole
from common.flags import die, flags, positive

LEAST = 3                            # seeds of a record
MORE = 2                             # seeds that are added where it is undecided
PARALLEL = 2                         # runs at a time, one thread each
RECORDS = ROOT / "records" / "ideas"
README = ROOT / "ideas" / "README.md"
BEGIN = "<!-- the table: written by python -m bench ideas -->"
END = "<!-- the end of the table -->"
HEAD = "| picture | paper, file, command | measured here, 95% interval | verdict |"
WIDTH = 300                          # of a picture in the table, in pixels
# what they teach: ideas, in the order in which to read them; those with a record come first, and what is
# in no group comes last
GROUPS = {
    "Is there anything to see?": "harness muon",
    "Which samples teach, and how much": "darling evol dupo order chunks treepo relex routing",
    "Tools, turns, other players, one's own texts": "tools debate selfplay xent gzero sdpo forgetting "
                                                    "collapse",
    "Optimizers": "dion galore gradpower qsgd batch pma mup zsl roundpipe",
    "What a model is trained on, and for": "tst fim ahead depth tokens script_bpe mixture midtrain memorize "
                                           "distill winter merging evolve",
    "Attention, caches, long texts": "context lighthouse lact cartridges xquant sinks limit",
    "Few bits": "paretoq signround fp4 precision",
    "Experts": "moe esft",
}
REST = "More"
OF_A_SEED = ("seed", "gain", "se", "table", "note", "minutes", "gflops", "commit", "source")


@dataclass
class Config:
    names: str = ""                  # ideas, with commas between them; none: all
    seeds: int = 3                   # runs of each; 0: only writes the table again from the records
    check: bool = False              # is every verdict what its record says, and the table, too?


def known():
    """The ideas there are, a harness first."""
    names = sorted(path.stem for path in (ROOT / "ideas").glob("*.py") if path.stem != "__init__")
    return sorted(names, key=lambda name: not claim_of(name).harness)


def claim_of(name):
    return importlib.import_module(f"ideas.{name}").CLAIM


def chosen(config):
    names = known()
    for name in filter(None, config.names.split(",")):
        if name not in names:
            near = difflib.get_close_matches(name, names, 1, cutoff=0)
            die(f"--names: no idea {name!r}: did you mean {near[0]!r}? known: {', '.join(names)}")
    return [name for name in names if name in config.names.split(",") or not config.names]


# -----------------------------------------------------------------------------
# runs


def folder_of(name, seed):
    return Path("runs", "ideas", name, f"seed_{seed}")


def result(name, seed):
    """-> result.json of a seed; None where it is missing, or was made by another text of the idea, with
    another CLAIM or with flags of the user's."""
    path = folder_of(name, seed) / "result.json"
    if not path.exists():
        return None
    row = json.loads(path.read_text())
    same = row["claim"] == asdict(claim_of(name)) and row.get("source") == source(name)
    return row if same and not row.get("changed") else None


def wanted(name, seeds):
    """-> the seeds of this idea, the ones that are added included."""
    rows = [result(name, seed) for seed in range(seeds)]
    once = LEAST <= seeds < LEAST + MORE                         # with five of them it stands
    if once and all(rows) and word(claim_of(name), [row["gain"] for row in rows]) == "undecided":
        return range(LEAST + MORE)
    return range(seeds)


def word(claim, gains):
    return "needs scale" if claim.scale else verdict(gains, claim.smallest)


def run_all(jobs):
    """jobs: (name, seed). -> those that failed. Ctrl-C ends the runs first; a start that is being trained
    is saved by its own run."""
    waiting = list(jobs)
    running = []
    failed = []
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        while waiting or running:
            while waiting and len(running) < PARALLEL:
                running.append(begin(*waiting.pop(0), env))
            time.sleep(0.2)
            for job in [job for job in running if job[0].poll() is not None]:
                running.remove(job)
                process, name, seed = job
                if process.returncode:
                    failed.append((name, seed))
                print(f"  {name}, seed {seed}: {last_words(name, seed, process.returncode)}  "
                      f"({len(waiting) + len(running)} to go)", flush=True)
    finally:
        end(running)
    return failed


def begin(name, seed, env):
    """In a session of its own: Ctrl-C reaches us alone, and we tell it once, as twice would kill it."""
    folder = folder_of(name, seed)
    folder.parent.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", f"ideas.{name}", "--seed", str(seed), "--threads", "1"]
    with open(f"{folder}.txt", "w") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, env=env,
                                   start_new_session=True)
    print(f"  {name}, seed {seed}: begun, see {folder}.txt", flush=True)
    return process, name, seed


def end(running):
    for process, *_ in running:
        process.terminate()
    for process, *_ in running:
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()


def last_words(name, seed, code):
    """-> the line that an idea ends with, or where to read why it has none."""
    if code:
        return f"failed with {code}, see {folder_of(name, seed)}.txt"
    row = result(name, seed)
    if row is None:
        return f"ideas/{name}.py was changed while it ran: run it again"
    return f"{row['gain']:+.2f} {row['claim']['unit']} {row['note']}, {row['minutes']:.1f} CPU minutes"


# -----------------------------------------------------------------------------
# records


def write_record(name, rows):
    """-> the record, written with its picture over the seeds."""
    claim = claim_of(name)
    record = dict(idea=name, claim=asdict(claim), verdict=word(claim, [row["gain"] for row in rows]),
                  seeds=[{key: row[key] for key in OF_A_SEED} for row in rows])
    RECORDS.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1) + "\n"
    write_whole(RECORDS / f"{name}.json", lambda f: f.write(text.encode()))
    points = [json.loads((folder_of(name, row["seed"]) / "points.json").read_text()) for row in rows]
    draw([p["panels"] for p in points], points[0]["labels"], f"{name}, {len(rows)} seeds",
         RECORDS / f"{name}.png")
    return record


def records():
    """-> {idea: its record}"""
    found = [json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))]
    return {record["idea"]: record for record in found}


def measured(record):
    """-> "+2.3 +-0.9 points, 3 seeds": the 95% interval over seeds"""
    gains = [row["gain"] for row in record["seeds"]]
    mean, half = interval(gains)
    unit = record["claim"]["unit"]
    times = "x " if unit[0].isdigit() else ""                    # +11 +-2.9 x 0.01 nats
    return f"{mean:+.2g} +-{half:.2g} {times}{unit}, {len(gains)} seeds"


def grouped(names):
    """-> {title: names}, each name once"""
    found = {title: [name for name in words.split() if name in names] for title, words in GROUPS.items()}
    placed = {name for group in found.values() for name in group}
    found[REST] = [name for name in names if name not in placed]
    return {title: group for title, group in found.items() if group}


def table(found):
    """-> the lines of the gallery in ideas/README.md: what came out, then a table for each group"""
    names = known()
    verdicts = [found[name]["verdict"] for name in names if name in found]
    words = sorted(set(verdicts), key=lambda said: (-verdicts.count(said), said))
    counts = [f"{verdicts.count(said)} {said}" for said in words]
    lines = [f"{len(names)} files, {len(verdicts)} with a record: {', '.join(counts) or 'none yet'}.", ""]
    for title, group in grouped(names).items():
        lines += [f"### {title}", "", HEAD, "|---|---|---|---|"]
        measured_first = sorted(group, key=lambda name: name not in found)
        lines += [row(name, claim_of(name), found.get(name)) for name in measured_first]
        lines.append("")
    return lines[:-1]


def row(name, claim, record):
    paper = f"[{claim.paper}](https://arxiv.org/abs/{claim.paper}): " if claim.paper else ""
    count = len((ROOT / "ideas" / f"{name}.py").read_text().splitlines())
    what = f"**[{name}]({name}.py)** {paper}{claim.says}<br>`python -m ideas.{name}`, {count} lines"
    if not record:
        return f"| no record yet | {what} | {claim.measured}: not measured yet | |"
    minutes = statistics.fmean(row["minutes"] for row in record["seeds"])
    place = f"../records/ideas/{name}.png"
    picture = f'<a href="{place}"><img src="{place}" width="{WIDTH}" alt="{name}"></a>'
    return (f"| {picture} | {what}, {minutes:.1f} CPU minutes per seed | {claim.measured}: "
            f"{measured(record)} | **{record['verdict']}** |")


def write_table():
    text = README.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    whole = f"{before}{BEGIN}\n" + "\n".join(table(records())) + f"\n{END}{after}"
    write_whole(README, lambda f: f.write(whole.encode()))


# -----------------------------------------------------------------------------
# the check


def faults():
    """-> what is wrong with records, pictures and table, one line each."""
    found = records()
    names = known()
    lines = [fault for name, record in found.items() for fault in faults_of(name, record, names)]
    if not lines:
        lines += unseen(found)
    again = "python -m bench ideas --seeds 0 writes it again"
    printed = re.findall(rf"{BEGIN}\n(.*?)\n{END}", README.read_text(), re.S)
    if not lines and printed != ["\n".join(table(found))]:
        lines.append(f"the table of {README.relative_to(ROOT)} is not what the records say: {again}")
    return lines


def faults_of(name, record, names):
    path = f"records/ideas/{name}.json"
    if name not in names:
        return [f"{path}: there is no ideas/{name}.py"]
    claim = claim_of(name)
    gains = [row["gain"] for row in record["seeds"]]
    seeds = [row["seed"] for row in record["seeds"]]
    picture = RECORDS / f"{name}.png"
    said = word(claim, gains)
    checks = [
        (record["claim"] == asdict(claim), f"the CLAIM of ideas/{name}.py was changed after its record"),
        (sorted(seeds) == list(range(len(seeds))), f"its seeds are {seeds}: 0, 1, 2, ..., each once"),
        (len(seeds) >= LEAST, f"{len(seeds)} seeds; {LEAST} at least"),
        (record["verdict"] == said, f"it says {record['verdict']!r}, its seeds say {said!r}"),
        (said != "undecided" or len(seeds) >= LEAST + MORE, f"undecided: {MORE} more seeds are to be run"),
        (picture.exists() and picture.stat().st_size <= MOST,
         f"no {name}.png beside it, of at most {MOST:,} bytes"),
    ]
    return [f"{path}: {what}" for right, what in checks if not right]


def unseen(found):
    """-> claims whose smallest gain is not below what a harness of their unit shows to be there."""
    claims = {name: claim_of(name) for name in known()}
    lines = []
    for name, harness in claims.items():
        if not harness.harness:
            continue
        if name not in found:
            lines += [f"records/ideas/{other}.json: what can be seen in {harness.unit} is not known: no "
                      f"record of the harness {name}"
                      for other in found if claims[other].unit == harness.unit]
            continue
        mean, half = interval([row["gain"] for row in found[name]["seeds"]])
        lines += [f"ideas/{other}.py: its smallest gain, {claim.smallest:g} {claim.unit}, is not below what "
                  f"{name} shows here, {mean - half:.2g} at least"
                  for other, claim in claims.items()
                  if not claim.harness and claim.unit == harness.unit and claim.smallest >= mean - half]
    return lines


# -----------------------------------------------------------------------------


def main(argv=None):
    config = flags(Config, argv, __doc__)
    if config.check:
        found = faults()
        waiting = sorted(set(known()) - set(records()))
        said = f"{len(records())} records: verdicts, claims, pictures and the table agree"
        print("\n".join(found) or said + f"; not measured yet: {', '.join(waiting)}" * bool(waiting))
        raise SystemExit(1 if found else 0)
    names = chosen(config)
    if not config.seeds:
        write_table()
        print(f"wrote the table of {README}")
        return None
    positive(config, "seeds")

    # ---- run what is missing; undecided ideas get more seeds
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    failed = []
    tried = set()
    try:
        while missing := [(name, seed) for name in names for seed in wanted(name, config.seeds)
                          if (name, seed) not in tried and not result(name, seed)]:
            print(f"{len(missing)} runs to make, {PARALLEL} at a time", flush=True)
            tried |= set(missing)
            failed += run_all(missing)
    except KeyboardInterrupt:
        print("stopped: the same command continues, and repeats no seed that is done", flush=True)
        raise SystemExit(130) from None

    # ---- records, the table
    verdicts = {}
    for name in names:
        rows = [result(name, seed) for seed in wanted(name, config.seeds)]
        if len(rows) >= LEAST and all(rows):
            record = write_record(name, rows)
            verdicts[name] = record["verdict"]
            print(f"  {name}: {measured(record)}: {record['verdict']}")
    write_table()
    return finish("ideas", verdicts=verdicts, failed=len(failed))


if __name__ == "__main__":
    main()
