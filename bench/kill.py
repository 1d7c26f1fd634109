"""
python -m bench kill: kill -9, again and again. A run that was killed and resumed has to end, bit
for bit, where one that was never killed ends: the weights, every metric that is no time, and
every sample that was written down.

    python -m bench kill --kills 100     about ten minutes on two cores; the same command continues
    python -m bench kill --kills 12          a look

One reference per kind of run is never killed. Then, kill by kill: a run starts, dies at a moment
that is drawn by lot, and is resumed until it ends with 0. Half of the moments are drawn within 50
ms after a write to a checkpoint begins, the others anywhere between the start and the end. Some
of the resumed runs are killed, too. Of runs with two ranks either both are killed, or one, and
then the other has to end by itself within a minute and name the dead one. After each kill no
reward worker may be left.

    start ---- kill -9 ---- --resume ---- (kill -9 ---- --resume) ---- 0        compared with the reference
                  |             '- started anew, if it died before its config.json was there
                  '- within 50 ms of a write: told by the times of the files, after the kill

What stands in for what: runs are as small as runs can be, and their pictures, which would take
longer than the runs, are a pause of 0.1 s. All processes are forks of this one, so that torch is
imported once; every script still begins at its main(). What a power cut loses is not tested: a
killed process loses nothing that it has handed to the system.

runs/NAME.jsonl has a line per killed run. Lines of other sources count no more: any change of the
code begins a new tally.
"""
import atexit
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import nanorl
import opd
import train_gpt
import ttrl
from bench import ROOT, finish
from common import view, watch
from common.flags import die, flags, positive
from common.run import newest

NEAR = 0.05              # seconds between a write and the kill
GONE = 60.0              # a rank left alone has to end by then
WORKERS = 5.0            # and the reward workers of a killed run by then
MARK = "NANORL_KILLED_RUN"       # in the environment of a run, and so in that of its workers


@dataclass
class Config:
    name: str = "kill"               # the tally is runs/NAME.jsonl, what the runs need lies in runs/NAME
    kills: int = 100                 # runs that are killed
    kinds: str = "dapo,prorl,tail,ttrl,opd,gpt"  # of runs, in turn
    seed: int = 0                    # of the moments
    minutes: float = 5.0             # of one process, before it is taken for hanging


# ------------------------------------------------------------------------------
# the runs: a few steps of each script, a checkpoint after nearly every one

TINY = ("--n-layer 2 --d-model 32 --n-head 2 --n-kv-head 1 --head-dim 16 --d-ff 48 --tokenizer chars "
        "--data arith --batch 16 --row-tokens 512 --eval-docs 8 --max-len 256 --device cpu --threads 1")
SMALL = "--device cpu --threads 1 --workers 1 --row-tokens 256 --lr 1e-2 --warmup 1"
LOOP = f"{SMALL} --prompts 5 --steps 6 --eval-every 2 --eval-n 4 --eval-k 2 --final-n 4 --save-every 1"
OWN = "--data {home}/my.jsonl --reward {home}/my.py:score"
RL = f"--init {{home}}/base {OWN} {LOOP} --n 4 --max-new 16"

# kind -> the script, and its flags
KINDS = {
    "dapo": (nanorl, f"{RL} --algo dapo"),
    # a reference that is reset, several updates per rollout, a checkpoint after every other step
    "prorl": (nanorl, f"{RL} --algo prorl --kl-coef 0.1 --reset-every 2 --epochs 2 "
              "--minibatch 3 --save-every 2"),
    # unfinished samples wait in the checkpoint for the next round
    "tail": (nanorl, f"{RL} --algo gspo --tail-batching continue --max-new 40"),
    "ttrl": (ttrl, f"--init {{home}}/base {SMALL} --task arith --questions 6 --unseen-n 4 --prompts 3 "
             "--passes 3 --votes 8 "
                   "--samples 4 --min-votes 1 --max-new 32 --eval-k 2 --patience 0 --scattered 0 "
                   "--save-every 1"),
    "opd": (opd, f"--init {{home}}/student --teacher {{home}}/base {OWN} {LOOP} --n 2 "
            "--max-new 16 --gold task "
                 "--kl-coef 0.1"),
    "gpt": (train_gpt, f"{TINY} --steps 8 --eval-every 4 --save-every 1"),
}


def command(kind, name, home):
    script, words = KINDS[kind]
    return script, [*words.format(home=home).split(), "--name", name]


def prepare(home):
    """What the runs need: prompts, a reward that varies, a model that answers sums, and one
    that does not yet."""
    if (home / "student").exists():
        return
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    prompts = [dict(prompt=f"A{i % 7 + 1}+{i % 9 + 2}=", gold=f"#{i % 7 + i % 9 + 3}") for i in range(60)]
    (home / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (home / "my.py").write_text("def score(problem, text):\n"
                                "    return sum(c in '0123456789' for c in text) / 7\n")
    for name, steps in (("base", 120), ("student", 10)):
        argv = [*TINY.split(), "--steps", str(steps), "--save-every", "1000",
                "--name", f"{home.name}/{name}_run"]
        with Job(train_gpt, argv, home / f"{name}.log") as job:
            if job.wait(600) != [0]:
                raise RuntimeError(f"the model {name} was not made:\n{job.said()}")
        made, _ = newest(home / f"{name}_run")
        os.replace(made, home / name)


def fingerprint():
    """Of the sources that a run is made of."""
    paths = sorted(path for folder in (".", "common", "data") for path in (ROOT / folder).glob("*.py"))
    text = b"".join(path.read_bytes() for path in [*paths, Path(__file__)])
    return hashlib.sha1(text).hexdigest()[:9]


# ------------------------------------------------------------------------------
# processes: forks of this one, which has imported the scripts and has no threads


def begin(script, argv, log, environment):
    """In the fork: everything as if the script had been started by its name. It does not return."""
    code = 1
    try:
        os.setsid()                                              # a signal to our terminal is not for it
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for fd, to in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
            os.dup2(to, fd)
        os.environ.update(environment)
        sys.orig_argv = ["python", f"{script.__name__}.py", *argv]
        watch.SUSPECT = 2.5                  # seconds of silence that convict a rank: 5 outside
        view.curves = view.pages = lambda *folders: time.sleep(0.1)
        script.main(argv)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())                          # a rank says by this what ended it
    finally:
        with contextlib.suppress(BaseException):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class Job:
    """One run, in a process for each rank. Left by `with`, nothing of it runs any more."""
    def __init__(self, script, argv, log, ranks=1, mark=""):
        self.log = log
        self.begin = log.stat().st_size if log.exists() else 0
        self.mark = mark
        self.codes = [None] * ranks                              # by rank, once it has ended
        self.pids = []
        environment = {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if ranks > 1:
            with socket.socket() as s:
                s.bind(("127.0.0.1", 0))
                port = str(s.getsockname()[1])
            environment |= dict(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                                MASTER_PORT=port)
        for rank in range(ranks):
            own = dict(RANK=str(rank), LOCAL_RANK=str(rank)) if ranks > 1 else {}
            pid = os.fork()
            if not pid:
                begin(script, argv, log, environment | own)
            self.pids.append(pid)

    def poll(self):
        """-> exit codes by rank, None of those that run"""
        for rank, pid in enumerate(self.pids):
            if self.codes[rank] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return self.codes

    def wait(self, seconds):
        """-> exit codes; whoever still runs after that many seconds is killed"""
        end = time.monotonic() + seconds
        while None in self.poll() and time.monotonic() < end:
            time.sleep(0.005)
        if None in self.codes:
            self.kill()
        return self.codes

    def kill(self, ranks=None):
        """kill -9 of these ranks, or of all, each with its process group. -> once they are dead"""
        chosen = [r for r in (range(len(self.pids)) if ranks is None else ranks) if self.codes[r] is None]
        for rank in chosen:
            try:
                os.killpg(self.pids[rank], signal.SIGKILL)
            except ProcessLookupError:                           # it has no group of its own yet
                os.kill(self.pids[rank], signal.SIGKILL)
        for rank in chosen:
            _, status = os.waitpid(self.pids[rank], 0)
            self.codes[rank] = os.waitstatus_to_exitcode(status)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    def said(self):
        with open(self.log, "rb") as f:
            f.seek(self.begin)
            return f.read().decode(errors="replace")


# ------------------------------------------------------------------------------
# moments


@dataclass
class Moment:
    """When a process is killed: `delay` seconds after the count-th event of this process. Event
    0 is its start."""
    event: str               # "write": a checkpoint or a best state begins; "row": of metrics.jsonl
    count: int
    delay: float


def draw(lot, near, early, reference):
    """near: to a write. early: so that something is left to kill a second time"""
    if near:
        last = reference["write"]
        return Moment("write", lot.randint(1, min(2, last) if early else last), lot.uniform(0, 0.9 * NEAR))
    last = reference["row"]
    return Moment("row", lot.randint(0, 2 if early else last), lot.uniform(0, reference["seconds"] / last))


def writes(folder):
    """The names of what is written whole or not at all, finished or not."""
    found = set()
    for part in ("ckpt", "best"):
        with contextlib.suppress(FileNotFoundError):
            found |= {f"{part}/{name.removesuffix('.tmp')}" for name in os.listdir(folder / part)}
    return found


def rows(folder):
    with contextlib.suppress(FileNotFoundError):
        return (folder / "metrics.jsonl").read_bytes().count(b"\n")
    return 0


class Events:
    """Counts what a process does in its folder from here on, by looking often."""

    def __init__(self, folder):
        self.folder = folder
        self.seen = dict(write=0, row=0)
        self.writes = writes(folder)
        self.rows = rows(folder)

    def look(self):
        time.sleep(0.002)
        now = writes(self.folder)
        self.seen["write"] += len(now - self.writes)
        self.writes = now
        now = rows(self.folder)
        self.seen["row"] += max(0, now - self.rows)              # a resumed run rewinds: fewer rows
        self.rows = now


def reached(job, moment, folder):
    """Waits for the moment. -> did it come before the end?"""
    events = Events(folder)
    while events.seen[moment.event] < moment.count:
        if None not in job.poll():
            return False
        events.look()
    end = time.monotonic() + moment.delay
    while time.monotonic() < end:
        if None not in job.poll():
            return False
        time.sleep(min(0.002, max(0.0, end - time.monotonic())))
    return None in job.poll()


def last_write(folder):
    """When something in a checkpoint was last written, by the clock of the files; 0: never"""
    times = [0.0]
    for part in ("ckpt", "best"):
        for path in (folder / part).rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                times.append(path.stat().st_mtime)
    return max(times)


def half_written(folder):
    """Did the kill leave the half of a checkpoint?"""
    paths = [path for part in ("ckpt", "best") for path in (folder / part).glob("step_*")]
    whole = {path for path in paths if path.suffix != ".tmp"}
    whole = {path for path in whole if path.parent.name == "best" or (path / "meta.json").exists()}
    return len(whole) < len(paths)


def workers_left(mark):
    """-> pids of the processes that a marked run left behind; None where the system does not tell"""
    if not Path("/proc/self/environ").exists():
        return None
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={mark}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


# ------------------------------------------------------------------------------
# one run: killed, once or twice, and resumed until it ends with 0


class Missed(Exception):
    """It ended before its moment came."""


class Failed(Exception):
    """What has to hold did not."""


def killed(job, moment, folder, one=None):
    """-> what is known of this kill. one: the only rank that is killed"""
    if not reached(job, moment, folder):
        raise Missed
    now = time.time()
    job.kill(None if one is None else [one])
    begun = time.monotonic()
    since = now - last_write(folder)
    note = dict(event=moment.event, count=moment.count, near=abs(since) <= NEAR, half=half_written(folder))
    if last_write(folder):
        note["since_write_ms"] = round(1e3 * since, 1)
    if one is not None:
        code = job.wait(GONE)[1 - one]
        note |= dict(rank=one, alone_s=round(time.monotonic() - begun, 1))
        if code < 0:
            raise Failed(f"rank {1 - one} was alone for {note['alone_s']:.0f} s and ended with {code}")
        if code and f"error: rank {one} " not in job.said():
            raise Failed(f"rank {1 - one} ended with {code} and did not name rank {one}")
    left = workers_left(job.mark)
    while left and time.monotonic() < begun + WORKERS + note.get("alone_s", 0.0):
        time.sleep(0.02)
        left = workers_left(job.mark)
    if left:
        raise Failed(f"{len(left)} processes of the killed run are left after {WORKERS:.0f} s: {left}")
    return note


def whole(config, kind, ranks):
    """-> the folder of the run that is never killed, and what happens in it: seconds, writes, rows"""
    home = Path("runs", config.name)
    folder = home / f"whole_{kind}_{ranks}"
    note = folder.with_suffix(".json")
    if not note.exists():
        shutil.rmtree(folder, ignore_errors=True)
        start = time.monotonic()
        argv = command(kind, f"{config.name}/{folder.name}", home)
        with Job(*argv, folder.with_suffix(".log"), ranks) as job:
            events = Events(folder)
            while None in job.poll() and time.monotonic() < start + 60 * config.minutes:
                events.look()
            if any(job.wait(0)):
                raise RuntimeError(f"the run that is never killed ended with {job.codes}:\n{job.said()}")
        note.write_text(json.dumps(events.seen | dict(seconds=time.monotonic() - start)))
    return folder, json.loads(note.read_text())


def trial(config, number, tries=6):
    """One run of the tally. -> its line"""
    kind, ranks, near, twice, alone = plan(config, number)
    reference, happens = whole(config, kind, ranks)
    start = time.monotonic()
    for attempt in range(tries):
        lot = random.Random(f"{config.seed} {number} {attempt}")
        moments = [draw(lot, near, twice, happens)] + [draw(lot, near, True, happens)] * twice
        one = lot.randrange(2) if alone else None
        if alone:                            # before ranks have met, only their launcher can tell
            moments = [replace(moment, count=max(1, moment.count)) for moment in moments]
        row = dict(number=number, kind=kind, ranks=ranks, twice=twice, kills=[], equal=False, wrong="")
        try:
            folder = run_and_kill(config, row, moments, one)
        except Missed:
            continue
        except Failed as e:
            row["wrong"] = str(e)
            break
        row["wrong"] = difference(reference, folder)
        row["equal"] = not row["wrong"]
        if row["equal"]:                                         # what went wrong is kept, to be looked at
            shutil.rmtree(folder)
            folder.with_suffix(".log").unlink()
        break
    else:
        row["wrong"] = f"{tries} times it ended before its moment came"
    return row | dict(seconds=round(time.monotonic() - start, 1))


def run_and_kill(config, row, moments, one):
    """-> the run's folder, after it ended with 0"""
    home = Path("runs", config.name)
    name = f"{config.name}/killed_{row['number']}"
    folder = Path("runs", name)
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".log").unlink(missing_ok=True)
    script, argv = command(row["kind"], name, home)
    for moment in [*moments, None]:
        resume = ["--resume"] * (folder / "config.json").exists()
        mark = f"{os.getpid()}-{row['number']}-{len(row['kills'])}"
        with Job(script, argv + resume, folder.with_suffix(".log"), row["ranks"], mark) as job:
            if moment:
                row["kills"].append(killed(job, moment, folder, one))
            elif any(job.wait(60 * config.minutes)):
                raise Failed(f"resumed, it ended with {job.codes}: "
                             f"{(job.said().strip() or '-').splitlines()[-1]}")
    return folder


def plan(config, number):
    """-> kind, ranks, near a write, killed twice, only one rank of two. Periods without a common
    divisor: every kind meets every case"""
    kinds = config.kinds.split(",")
    turn = number // len(kinds)
    ranks = 2 if number % 5 == 4 else 1
    alone = ranks == 2 and (number // 5 + turn // 5) % 2 == 1
    return kinds[number % len(kinds)], ranks, (turn + number) % 2 == 0, number % 7 == 3, alone


# ------------------------------------------------------------------------------
# the same?


def timeless(path):
    """Rows without what the clock says."""
    timed = ("t_", "seconds", "tokens_per_second", "mfu")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(timed) and not k.endswith("tok_s")}
            for line in lines]


def difference(reference, folder):
    """-> in what they differ, in words; "" if in nothing"""
    ends = [newest(reference), newest(folder)]
    if not ends[1] or ends[0][1] != ends[1][1]:
        return f"the last checkpoint is {ends[1] and ends[1][1]}, not {ends[0][1]}"
    weights = [(path / "model.safetensors").read_bytes() for path, _ in ends]
    if weights[0] != weights[1]:
        return "the weights differ"
    for name in ("metrics.jsonl", "samples.jsonl"):
        one, two = timeless(reference / name), timeless(folder / name)
        if one != two:
            place = next((i for i, (a, b) in enumerate(zip(one, two)) if a != b), min(len(one), len(two)))
            return f"{name} differs: {len(one)} and {len(two)} rows, the first difference in row {place + 1}"
    return ""


# ------------------------------------------------------------------------------


def table(found):
    """-> lines: the mix, kind by kind"""
    head = ("runs,kills,near a write,half a checkpoint left,two ranks,one "
            "rank of two,killed twice,equal".split(","))
    lines = [f"| kind | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    kinds = list(dict.fromkeys(row["kind"] for row in found))
    for kind in [*kinds, "all"]:
        of = [row for row in found if kind in (row["kind"], "all")]
        lines.append(f"| {kind} | {' | '.join(str(n) for n in mix(of).values())} |")
    return lines


def mix(found):
    kills = [kill for row in found for kill in row["kills"]]
    return dict(runs=len(found), kills=len(kills), near=sum(kill["near"] for kill in kills),
                half=sum(kill["half"] for kill in kills), two_ranks=sum(row["ranks"] == 2 for row in found),
                one_rank=sum("rank" in kill for kill in kills),
                twice=sum(len(row["kills"]) > 1 for row in found), equal=sum(row["equal"] for row in found))


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "kills")
    unknown = [kind for kind in config.kinds.split(",") if kind not in KINDS]
    if unknown:
        die(f"--kinds {unknown[0]}: one of {', '.join(KINDS)}")
    tally = Path("runs", f"{config.name}.jsonl")
    home = Path("runs", config.name)
    same = dict(sources=fingerprint(), kinds=config.kinds, seed=config.seed)
    stamp = home / "sources"
    if not stamp.exists() or stamp.read_text() != same["sources"]:   # models and references of other sources
        shutil.rmtree(home, ignore_errors=True)
    prepare(home)
    stamp.write_text(same["sources"])

    # ---- what is missing
    lines = [json.loads(line) for line in tally.read_text().splitlines()] if tally.exists() else []
    found = {row["number"]: row for row in lines if same.items() <= row.items()
             and row["number"] < config.kills}
    print(f"{config.kills} runs to kill, {len(found)} in {tally} already; sources {same['sources']}",
          flush=True)
    for number in range(config.kills):
        if number in found:
            continue
        row = trial(config, number) | same
        found[number] = row
        with open(tally, "a") as f:
            f.write(json.dumps(row) + "\n")
        print(said(row, len(found), config.kills), flush=True)

    # ---- the mix
    found = [found[number] for number in sorted(found)]
    alone = [kill["alone_s"] for row in found for kill in row["kills"] if "alone_s" in kill]
    print(f"\n{len(found)} runs, killed with kill -9 and resumed\n")
    print("\n".join(table(found)))
    if alone:
        print(f"\na rank left alone ended after {statistics.median(alone):.1f} "
              f"s ({min(alone):.1f} .. {max(alone):.1f})")
    for row in found:
        if not row["equal"]:
            print(f"run {row['number']} ({row['kind']}, {row['ranks']} ranks): {row['wrong']}")
    numbers = finish("kill", **mix(found), minutes=sum(row["seconds"] for row in found) / 60)
    if numbers["equal"] < numbers["runs"]:
        raise SystemExit(1)
    return numbers


def said(row, done, of):
    kills = []
    for kill in row["kills"]:
        words = [f"{kill['event']} {kill['count']}"]
        words += [f"{kill['since_write_ms']:.0f} ms after a write"] if kill["near"] else []
        words += ["half a checkpoint left"] if kill["half"] else []
        words += ([f"rank {kill['rank']} only, the other ended {kill['alone_s']} s later"]
                  if "rank" in kill else [])
        kills.append(", ".join(words))
    verdict = "equal" if row["equal"] else f"NOT EQUAL: {row['wrong']}"
    return (f"{done}/{of}  {row['kind']} x {row['ranks']}  {'; again: '.join(kills)}  "
            f"{verdict}  {row['seconds']:.1f} s")
