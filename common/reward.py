"""
Rewards in worker processes, while the sampler works. A reward is any function reward(problem, text)
-> float that a fresh Python can import.

    rewards = Rewards("countdown:search")      # a task of data/, or a file and its function: "my.py:score"
    rewards.put((sample.problem, sample.index), problem, text)         # when a sample ends; it never waits
    for key, reward, info in rewards.get():    # after a decode step: what is ready, in that order
        ...                                    # get(block=True): at least one, or [] if nothing is pending

A reward is other people's code on a model's worst output: it raises, hangs in a regular expression,
returns nan, takes the process down. Each of these scores 0, is counted (rewards.failed) and named
in the log with its sample, and the run continues. How long is a hang? A problem's limit is 1.5
times the longest that a correct answer of it ever took, within [timeout_min, timeout_max]: checkers
differ by 100x.

Left out of the usual recipe: pools, executors, threads, and fork, which copies a CUDA parent with
its locks held. A worker is `python -m common.reward --worker` between two pipes. It imports no
torch, so it starts in a fraction of a second and killing it costs nothing, and a kill is the only
timeout that also stops C code. Its parent gets plain JSON, never a pickle. A reward's prints are
dropped (use stderr), it reads an empty stdin, and it is the text of the file as the run began:
editing my.py meanwhile changes nothing.

    parent -> worker    a pickle: what to import. Then one per message: [(number, pickled problem, text), ...]
    worker -> parent    a JSON line when the reward is imported, then one per job, in order: an Answer

    python -m common.reward my.py:score        # can it be used? the question every run asks first
"""
import atexit
import inspect
import json
import math
import os
import pickle
import selectors
import signal
import subprocess
import sys
import time
import traceback
import types
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
START = 60.0           # seconds a worker may take to import its reward
# a reward that raised may leave its module in any state: its worker is replaced, unless it is
# younger than this many times what its start took
RENEW = 30
AHEAD = 0.02           # seconds of work in one message: none waits long behind a slow one
PIPE = 30_000          # characters in one message: what a pipe takes without waiting for its reader
READY = -1             # the number of a worker's first answer: the reward is imported


class Info(NamedTuple):
    seconds: float
    error: str | None     # why it scored 0 unasked, or None


class Job(NamedTuple):
    number: int
    key: object
    prompt: str           # whose time limit it has
    problem: bytes        # pickled
    text: str


class Answer(NamedTuple):
    number: int           # of the job, or READY
    reward: float
    seconds: float        # how long it took
    ended: float          # when it ended; one clock serves all processes of a machine
    kind: str | None      # of failure: "raised" or "value"
    error: str | None


@dataclass
class Worker:
    proc: subprocess.Popen
    since: float                                   # when it began what it is doing now
    born: float = math.inf                         # when it was ready
    startup: float = 0.0                           # seconds it took to become ready
    jobs: deque = field(default_factory=deque)     # sent and not answered; answers come in this order
    out: bytes = b""                               # what the pipe did not take yet
    back: bytes = b""                              # the first half of an answer
    ready: bool = False
    retired: bool = False                          # gets no more jobs, is replaced after those it has


def varies(rewards):
    """Do rewards differ? What is nearer than this is rounding."""
    return not max(rewards) - min(rewards) <= 1e-9


# --------------------------------------------------------------------------------------------------
# the parent's side

class Rewards:
    def __init__(self, spec, workers=2, timeout_min=2.0, timeout_max=30.0, log=print):
        self.spec = spec
        self.count = workers
        self.timeout_min = timeout_min
        self.timeout_max = timeout_max
        self.log = log
        self.hello = pickle.dumps((*source(spec), os.getcwd()))
        self.failed = {}               # raised | value | timeout | died -> how many
        self.pending = 0               # put and not yet returned by get
        self.queue = deque()           # jobs that no worker has
        self.done = []                 # (key, reward, info) that get will return
        self.workers = []
        self.dying = []                # processes that were killed and not yet reaped
        self.longest = {}              # prompt -> the longest a correct answer took, if that raises its limit
        self.numbers = 0               # jobs so far
        self.first = 0                 # jobs with a lower number are not wanted any more: see forget
        self.mean = AHEAD              # seconds of a job, as a running mean
        self.misses = 0                # workers in a row that did not start
        self.tries = 3                 # after that many the run ends
        self.selector = selectors.DefaultSelector()
        self.owner = os.getpid()
        atexit.register(self.close)

    def put(self, key, problem, text):
        """queue one reward; key comes back with it, its first two items name the sample in the log"""
        self.queue.append(Job(self.numbers, key, problem.prompt, pickle.dumps(problem, 5), text))
        self.numbers += 1
        self.pending += 1
        self._feed()

    def get(self, block=False):
        """[(key, reward, info)] of those that are ready"""
        while self.pending:
            self._pump(wait=block and not self.done)
            if self.done or not block:
                break
        done, self.done = self.done, []
        self.pending -= len(done)
        return done

    def forget(self):
        """what is pending is not wanted any more: it is not begun, and what runs is not handed back"""
        self.queue.clear()
        self.done.clear()
        self.first = self.numbers
        self.pending = 0

    def close(self):
        """end the workers. A second call does nothing; the end of the program calls it, too"""
        atexit.unregister(self.close)
        if os.getpid() != self.owner:  # a fork of the parent has copies of all this, but no workers
            return
        for worker in [*self.workers]:
            self._drop(worker)
        for proc in self.dying:
            proc.wait()
        self.dying = []
        self.selector.close()
        self.queue.clear()
        self.pending = 0

    # --- one turn: read answers, look at the clock, hand out work

    def _limit(self, worker):
        """the seconds it may take for what it is doing"""
        if not worker.ready:
            return START
        idle = not worker.jobs or worker.out  # it cannot begin before it has the whole message
        return math.inf if idle else self.timeout(worker.jobs[0].prompt)

    def timeout(self, prompt):
        return min(max(self.timeout_min, 1.5 * self.longest.get(prompt, 0)), self.timeout_max)

    def _pump(self, wait=False):
        self._feed()
        # the clock is read before the pipes: an answer given in time is then always seen in time
        now = time.monotonic()
        ends = min((w.since + self._limit(w) for w in self.workers), default=math.inf)
        seconds = max(0, min(ends - now, START)) if wait else 0
        for ready, _ in self.selector.select(seconds):
            worker = ready.data
            if worker not in self.workers:             # it was dropped in this very loop
                continue
            if ready.fileobj is worker.proc.stdout:
                self._read(worker)
            else:
                self._write(worker)
        for worker in [w for w in self.workers if now - w.since > self._limit(w)]:
            self._drop(worker, "timeout", f"still running after {self._limit(worker):.3g} s")
        self.dying = [proc for proc in self.dying if proc.poll() is None]
        self._feed()

    def _feed(self):
        """start the workers that are missing, and hand the queue to those that have nothing to do"""
        while len(self.workers) < self.count:
            self._start()
        for worker in self.workers:
            if not self.queue:
                return
            if worker.ready and not worker.jobs and not worker.retired:
                self._hand_out(worker)

    def _hand_out(self, worker):
        """one message: a share of the queue, 20 ms of work, a pipe's fill. A job that fails takes
        none of the others with it"""
        share = -(-len(self.queue) // self.count)
        most = min(64, share, int(AHEAD / max(self.mean, 1e-6)))
        size = 0
        while self.queue and (not worker.jobs or len(worker.jobs) < most and size < PIPE):
            job = self.queue.popleft()
            worker.jobs.append(job)
            size += len(job.text)
        worker.out = pickle.dumps([(job.number, job.problem, job.text) for job in worker.jobs], 5)
        self._write(worker)

    def _start(self):
        # numpy in two workers must not start a thread per core alongside the sampler's; and a set
        # of strings has one order everywhere
        env = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **os.environ}
        # its own session: Ctrl-C and torchrun's signals reach us, not it, and its children can be
        # killed with it
        command = [sys.executable, "-m", "common.reward", "--worker"]
        proc = subprocess.Popen(command, cwd=ROOT, env=env, bufsize=0, start_new_session=True,
                                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        os.set_blocking(proc.stdin.fileno(), False)
        worker = Worker(proc, since=time.monotonic(), out=self.hello)
        self.workers.append(worker)
        self.selector.register(proc.stdout, selectors.EVENT_READ, worker)
        self._write(worker)

    def _write(self, worker):
        fd = worker.proc.stdin
        try:
            worker.out = worker.out[os.write(fd.fileno(), worker.out):]
        except BlockingIOError:
            pass                             # a full pipe: the selector says when there is room
        except BrokenPipeError:
            return                         # it is dead, as its other pipe says, and began none of this
        watched = fd in self.selector.get_map()
        if worker.out and not watched:
            self.selector.register(fd, selectors.EVENT_WRITE, worker)
        elif watched and not worker.out:
            self.selector.unregister(fd)
        if worker.ready and not worker.out:
            worker.since = time.monotonic()

    def _read(self, worker):
        chunk = os.read(worker.proc.stdout.fileno(), 1 << 16)
        if not chunk:
            self._drop(worker, "died")
            return
        lines, _, worker.back = (worker.back + chunk).rpartition(b"\n")
        for fields in json.loads(b"[" + lines.replace(b"\n", b",") + b"]"):
            answer = Answer(*fields)
            if answer.number == READY and answer.error:
                self._drop(worker, "start", answer.error)
                return
            if answer.number == READY:
                worker.ready = True
                worker.born = answer.ended
                worker.startup = answer.seconds
                self.misses = 0
            else:
                self._judge(worker, answer)
        if worker.retired and not worker.jobs:
            self._drop(worker)

    def _judge(self, worker, answer):
        job = worker.jobs.popleft()
        assert job.number == answer.number
        worker.since = answer.ended                    # the next job of its message began then
        self.mean += 0.1 * (answer.seconds - self.mean)
        limit = self.timeout(job.prompt)
        if answer.kind:
            worker.retired |= answer.ended - worker.born > RENEW * worker.startup
            self._fail(job, answer.kind, answer.error, answer.seconds)
        elif job.number < self.first:                  # forgotten meanwhile
            return
        elif answer.seconds > limit:
            # it ended before we looked: the same verdict as if we had looked in time
            error = f"took {answer.seconds:.3g} s, the limit is {limit:.3g}"
            self._fail(job, "timeout", error, answer.seconds)
        else:
            if answer.reward > 0 and 1.5 * answer.seconds > limit:
                self.longest[job.prompt] = answer.seconds
            self.done.append((job.key, answer.reward, Info(answer.seconds, None)))

    # --- what goes wrong

    def _drop(self, worker, kind=None, error=None):
        """
        kill a worker. kind: what went wrong; the job that it was at is to blame, and fails. Jobs behind
        it go back to the head of the queue. Without a kind nothing went wrong, and all of them do.
        """
        self.workers.remove(worker)
        for pipe in (worker.proc.stdin, worker.proc.stdout):
            if pipe in self.selector.get_map():
                self.selector.unregister(pipe)
            pipe.close()
        try:
            os.killpg(worker.proc.pid, signal.SIGKILL)     # not reaped yet: the number is still its own
        except (ProcessLookupError, PermissionError):
            pass                           # a dead leader without children, as macOS words it
        if kind == "died":                 # its files are closed, so this wait is short
            code = worker.proc.wait()
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            error = f"its process ended {how}"
        else:
            self.dying.append(worker.proc)
        if kind and not worker.ready:
            self.misses += 1
            if self.misses >= self.tries:
                when = "" if kind == "start" else "while it was imported, "
                raise RuntimeError(f"reward {self.spec}: {when}{error}")
            self.log(f"a reward worker did not start, another is tried: {error}")
        elif kind and worker.jobs and not worker.out:
            self._fail(worker.jobs.popleft(), kind, error, time.monotonic() - worker.since)
        self.queue.extendleft(job for job in reversed(worker.jobs) if job.number >= self.first)

    def _fail(self, job, kind, error, seconds):
        if job.number < self.first:
            return
        n = self.failed[kind] = self.failed.get(kind, 0) + 1
        self.done.append((job.key, 0.0, Info(seconds, error)))
        if n <= 3 or n in (10, 30) or n % 100 == 0:
            named = isinstance(job.key, tuple) and len(job.key) > 1
            who = f"problem {job.key[0]}, sample {job.key[1]}" if named else job.key
            self.log(f"reward failed ({kind}, {n} so far), scored 0: {who}: {error}")


class Graders:
    """stands before a Rewards: a question without a label is answered at once, with nan"""

    def __init__(self, workers):
        self.workers = workers
        self.failed = workers.failed
        self.close = workers.close
        self.blank = []                # (key, nan, None) of questions without a label

    def put(self, key, problem, text):
        if problem.gold is None:
            self.blank.append((key, math.nan, None))
        else:
            self.workers.put(key, problem, text)

    def get(self, block=False):
        blank = self.blank
        self.blank = []
        return blank + self.workers.get(block=block and not blank)

    def forget(self):
        self.blank = []
        self.workers.forget()


def source(spec):
    """"my.py:score" -> ("score", its path, its text); "countdown" -> ("countdown", None, None)"""
    path, _, name = spec.rpartition(":")
    if spec.endswith(".py"):
        raise ValueError(f"reward {spec}: which function of it? write {spec}:NAME")
    if not path.endswith(".py"):
        return spec, None, None
    try:
        return name, str(Path(path).resolve()), Path(path).read_bytes()
    except OSError as e:
        raise ValueError(f"reward {spec}: cannot read {path}: {e.strerror}") from None


def check(spec):
    """ValueError, in one line, if this reward cannot be used; for that, a worker is started and dropped"""
    rewards = Rewards(spec, workers=1)
    rewards.tries = 1
    try:
        rewards._pump()
        while not rewards.workers[0].ready:
            rewards._pump(wait=True)
    except RuntimeError as e:
        raise ValueError(str(e)) from None
    finally:
        rewards.close()


# --------------------------------------------------------------------------------------------------
# the worker's side

def last_line(e):
    """ValueError: no integer (my.py, line 12)"""
    lines = "".join(traceback.format_exception_only(e)).splitlines()
    words = [line for line in lines if line.strip()]
    said = words[-1][:300] if words else type(e).__name__
    frames = traceback.extract_tb(e.__traceback__)
    if isinstance(e, SyntaxError):
        return f"{said} ({Path(str(e.filename)).name}, line {e.lineno})"
    if frames:
        return f"{said} ({Path(frames[-1].filename).name}, line {frames[-1].lineno})"
    return said


def function(name, path, text):
    """the reward itself; ValueError where there is none"""
    import data     # first, so that no data.py beside the reward takes its place

    if path is None:
        return data.load(name).reward
    module = types.ModuleType("reward_" + Path(path).stem)
    module.__file__ = path
    sys.modules[module.__name__] = module                      # dataclasses look their module up
    sys.path.insert(0, str(Path(path).parent))
    try:
        exec(compile(text, path, "exec"), module.__dict__)
    except BaseException as e:
        raise ValueError(f"the file does not import: {last_line(e)}") from None
    if not hasattr(module, name):
        has = [key for key, value in vars(module).items()
               if inspect.isfunction(value) and value.__module__ == module.__name__]
        raise ValueError(f"the file has no function {name!r}; it has {', '.join(has) or 'none'}")
    reward = getattr(module, name)
    if not callable(reward):
        raise ValueError(f"{name} is {type(reward).__name__}, not a function")
    try:
        inspect.signature(reward).bind("problem", "text")
    except TypeError as e:
        raise ValueError(f"{name} cannot be called as {name}(problem, text): {e}") from None
    return reward


def judge(reward, problem, text):
    """-> (value, kind of failure or None, error)"""
    try:
        # a fresh copy each time: no job sees what another did to it
        value = reward(pickle.loads(problem), text)
    except BaseException as e:             # sys.exit() in a reward is a failure like others
        return 0.0, "raised", last_line(e)
    try:
        # float("1") is a number, "1" is not
        number = float(value) if hasattr(value, "__float__") else math.nan
    except Exception:
        number = math.nan
    if math.isfinite(number):
        return number, None, None
    return 0.0, "value", f"returned {repr(value)[:80]} ({type(value).__name__}), not a finite number"


def worker():
    jobs = os.fdopen(os.dup(0), "rb")
    answers = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    for name in (signal.SIGINT, signal.SIGTERM):
        # a handler: SIG_IGN would pass to the reward's own children
        signal.signal(name, lambda *_: None)
    if sys.platform == "linux":
        import ctypes

        # the kernel kills us with our parent, even inside C code. Elsewhere, and in between, the
        # end of the pipe does
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    def answer(number, begin, value=0.0, kind=None, error=None):
        now = time.monotonic()
        line = json.dumps(Answer(number, value, now - begin, now, kind, error)) + "\n"
        os.write(answers, line.encode())

    me = os.getpid()
    begin = time.monotonic()
    reward = error = None
    try:
        *what, cwd = pickle.load(jobs)
        reward = function(*what)
        os.chdir(cwd)
    except Exception as e:
        error = str(e) if isinstance(e, ValueError) else last_line(e)
    answer(READY, begin, error=error)
    while not error:
        try:
            batch = pickle.load(jobs)
        except (EOFError, pickle.UnpicklingError):
            break                          # the parent is gone, perhaps in the middle of a message
        for number, problem, text in batch:
            begin = time.monotonic()
            verdict = judge(reward, problem, text)
            if os.getpid() != me:          # a reward that forked, and whose child came back here
                os._exit(0)
            answer(number, begin, *verdict)
    os._exit(0)                            # not through the reward's own exit handlers and threads


def main():
    if sys.argv[1:] == ["--worker"]:
        worker()
    spec = sys.argv[1] if len(sys.argv) == 2 else ""
    try:
        check(spec)
    except ValueError as e:
        print(f"error: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"reward {spec}: can be used")


if __name__ == "__main__":
    main()
