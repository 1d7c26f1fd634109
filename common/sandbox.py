"""
Other people's code, held: does a candidate program pass its tests, whatever it tries?

    sandbox = Sandbox()
    sandbox.run("def double(x): return 2 * x", "assert double(4) == 8", ["double"])
    -> Verdict(passed=True, why="passed")

The candidate and its tests never share a process. In the tests' process `double` is a stub: it
sends its arguments as a Python literal and gets the value back as a literal (`ast.literal_eval`),
so what a test compares is a plain number, text or container, never an object with an __eq__ of the
candidate's.

    caller --- source, tests ---------------------> tests' process --- "p" or "w" --> worker --> caller
                                                     |  ^
                                     ('double',(4,)) |  | (True,8)
                                                     v  |
    worker, warm, never sees either --- fork ---> candidate's process

The verdict has a pipe that the candidate does not hold. It may exit with 0, print, patch its own
built-ins, walk every frame and object, or fill its pipe with made-up replies: a reply is only ever
its own return value. The worker is a small warm Python (the standard library, no site-packages)
that forks both processes for each job BEFORE anybody has read the job, so nothing of the tests is
in the candidate's memory.

This file is who runs what and what they say to each other: the caller, what may cross, the
candidate, the tests, the worker. What holds the two processes is common/jail.py: limits, walls of
namespaces, a user without rights, a filter of system calls. Only the wall clock and the size of a
value are limited here. What the machine does not give is said once; `python -m common.sandbox` says
it, too. With neither walls nor filter (macOS) the score still cannot be forged by the ways above,
but the network and the files of the user are open.

Left out of the usual recipe: containers, a package for sandboxes, `exec` of candidate and test in
one process with the dangerous functions set to None. What is not promised: docs/code.md.
"""
import ast
import atexit
import builtins
import functools
import gc
import json
import math
import os
import random
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import types
from dataclasses import asdict, dataclass
from typing import NamedTuple

from common import jail


@dataclass(frozen=True)
class Limits:
    cpu: int = 1                     # seconds of CPU time, of the candidate and of the tests, each
    wall: float = 1.5                # seconds for both together; below what common/reward.py waits
    memory: int = 512 << 20          # bytes of address space
    processes: int = 1               # processes and threads of the candidate, itself included
    file: int = 1 << 20              # bytes in one file
    folder: int = 4 << 20            # bytes in its folder, where there are walls
    files: int = 16                  # open at once
    value: int = 1 << 20             # bytes in one returned value, written out


class Verdict(NamedTuple):
    passed: bool
    why: str


WHY = {
    "p": "passed",
    "w": "a test failed",
    "v": "a value that is no literal, or an exception that is no built-in one",
    "d": "the candidate ended before its tests did",
    "n": "its tests never called the candidate",
    "t": "out of time",
    "x": "the tests' own process ended",
}
START = 30.0                         # seconds that a worker may take to start
SLACK = 10.0                         # seconds beyond the wall clock after which a worker counts as lost
said = set()                         # what this process has said already


# --------------------------------------------------------------------------------------------------
# the caller's side

class Sandbox:
    """without: "walls", "filter", or both, as if this machine had none (for tests of what is left then)"""

    def __init__(self, limits=None, without=(), log=None):
        self.limits = limits or Limits()
        self.without = set(without)
        self.log = log or functools.partial(print, file=sys.stderr)
        self.missing = []            # what this machine does not give
        self.worker = None
        self.owner = None
        self.lock = threading.Lock()

    def run(self, source, tests, names, setup=""):
        """
        -> Verdict. source: the candidate. names: which of its functions the tests call. setup: code
        that the tests' process runs before those names are put in, such as helpers that the tests
        share.
        """
        job = json.dumps({"source": source, "tests": tests, "names": list(names), "setup": setup})
        with self.lock:
            for _ in range(2):       # a worker may have been killed between two jobs: a fresh one tries again
                if self.worker is None or self.owner != os.getpid():
                    self.start()
                try:
                    self.pipe.sendall(framed(job.encode()))
                    letter = self.pipe.recv(1).decode()
                except OSError:      # a timeout is one, too
                    letter = ""
                if letter in WHY:
                    return Verdict(letter == "p", WHY[letter])
                self.close()
        return Verdict(False, "the sandbox's worker ended twice")

    def start(self):
        if jail.resource is None:
            raise OSError("the sandbox needs a Unix: Linux, or macOS with fewer protections")
        self.worker = None           # after a fork of the caller: the old one is the parent's
        self.owner = os.getpid()
        answer = {"failed": "left out"}
        self.missing = []
        if "walls" not in self.without:
            answer = self.attempt(self.without)
        if "failed" in answer:
            self.missing = [f"walls of namespaces ({answer['failed']})"]
            answer = self.attempt(self.without | {"walls"})
        if "failed" in answer:
            raise OSError(f"the sandbox's worker does not start: {answer['failed']}")
        self.missing += answer["missing"]
        atexit.register(self.close)
        words = "; ".join(self.missing)
        if words and words not in said:
            said.add(words)
            self.log(f"sandbox: this machine does not give {words} (docs/code.md says what that means)")

    def attempt(self, without):
        """start a worker -> its first line"""
        self.pipe, theirs = socket.socketpair()
        settings = json.dumps({"limits": asdict(self.limits), "without": sorted(without)})
        # no -I: it would ignore PYTHONHASHSEED, and a set of strings should have one order everywhere
        command = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", "-m", "common.sandbox"]
        env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
        env["PYTHONHASHSEED"] = "0"
        env["PYTHONPATH"] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        with theirs:
            self.worker = subprocess.Popen([*command, "--worker", settings], env=env, cwd="/", stdin=theirs,
                                           stdout=subprocess.DEVNULL)
        self.pipe.settimeout(START)
        try:
            answer = json.loads(self.pipe.makefile().readline())
        except (OSError, ValueError) as e:
            answer = {"failed": f"{type(e).__name__} {e}".strip()}
        self.pipe.settimeout(self.limits.wall + SLACK)
        if "failed" in answer:
            self.close()
        return answer

    def close(self):
        """end the worker, and with it what it holds. A second call does nothing"""
        atexit.unregister(self.close)
        worker = self.worker
        self.worker = None
        if worker is None or self.owner not in (None, os.getpid()):
            return
        self.pipe.close()            # it ends by itself when its pipe does
        try:
            worker.wait(0.5)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()


# --------------------------------------------------------------------------------------------------
# what travels: literals, each with its length before it

def framed(data):
    return struct.pack(">Q", len(data)) + data


def send(fd, data):
    data = framed(data)
    while data:
        data = data[os.write(fd, data):]


def receive(fd, most):
    length, = struct.unpack(">Q", exactly(fd, 8))
    if length > most:
        raise ValueError(f"{length:,} bytes, more than {most:,}")
    return exactly(fd, length)


def exactly(fd, n):
    data = bytearray()
    while len(data) < n:
        chunk = os.read(fd, min(n - len(data), 1 << 16))
        if not chunk:
            raise EOFError
        data += chunk
    return bytes(data)


def literal(value):
    """
    a text that ast.literal_eval turns into an equal value; ValueError where there is none. What is
    derived from a built-in travels as that built-in: a Counter is a dict, a named tuple a tuple.
    """
    if value is None or isinstance(value, bool):
        return repr(value)
    if isinstance(value, int):
        # decimal text of an int stops at 4,300 digits, hexadecimal does not
        return hex(value) if int.bit_length(value) > 10_000 else int.__repr__(value)
    if isinstance(value, float):
        if math.isinf(value):
            return "1e999" if value > 0 else "-1e999"
        if math.isnan(value):
            raise ValueError("nan is no literal")
        return float.__repr__(value)
    for kind in (str, bytes, complex):
        if isinstance(value, kind):
            return kind.__repr__(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{literal(k)}:{literal(v)}" for k, v in dict.items(value)) + "}"
    inside = ",".join(map(literal, value)) if isinstance(value, (tuple, list, set)) else ""
    if isinstance(value, tuple):
        return f"({inside},)" if inside else "()"
    if isinstance(value, list):
        return f"[{inside}]"
    if isinstance(value, set):
        return f"{{{inside}}}" if inside else "set()"
    raise ValueError(f"{type(value).__name__} is no literal")


# --------------------------------------------------------------------------------------------------
# the candidate's process: 0, 1 and 2 lead nowhere

ASKED = 3                            # its two pipes
REPLY = 4


def candidate(limits):
    random.seed(0)                   # a program that draws at random scores the same every time
    source = receive(ASKED, sys.maxsize).decode()
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module          # where dataclasses look their module up
    exec(compile(source, "candidate.py", "exec"), module.__dict__)
    while True:
        name, args, kwargs = ast.literal_eval(receive(ASKED, sys.maxsize).decode())
        send(REPLY, answer(module, name, args, kwargs).encode())


def answer(module, name, args, kwargs):
    try:
        if name not in module.__dict__:
            raise NameError(f"name {name!r} is not defined")
        value = module.__dict__[name](*args, **kwargs)
    except BaseException as e:
        return literal((False, type(e).__name__, words_of(e)))
    try:
        return literal((True, value))
    except Exception:
        return literal((None,))


def words_of(e):
    try:
        return str(e)[:500]
    except Exception:
        return ""


# --------------------------------------------------------------------------------------------------
# the tests' process

JOB = 0                              # from the caller
ASK = 3                              # to the candidate
REPLIES = 4                          # from the candidate
VERDICT = 5                          # to the worker: "r" when the job is read, then a letter of WHY


class Foul(BaseException):
    """the candidate did what no test can be asked about; a BaseException, so that few tests catch it"""


class Stubs:
    """what the tests call instead of the candidate"""

    def __init__(self, limits):
        self.limits = limits
        self.calls = 0
        self.foul = ""               # the letter of the first foul: a test that catches it still fails

    def begin(self, source):
        try:
            send(ASK, source.encode(errors="surrogatepass"))
        except OSError:
            self.foul = "d"

    def stub(self, name):
        def call(*args, **kwargs):
            return self.call(name, args, kwargs)
        call.__name__ = name
        return call

    def call(self, name, args, kwargs):
        if self.foul:
            raise Foul
        self.calls += 1
        try:
            send(ASK, literal((name, args, kwargs)).encode())
            reply = ast.literal_eval(receive(REPLIES, self.limits.value).decode())
            if reply[0] is True:
                _, value = reply
                return value
            error = builtin_error(*reply[1:])
        except (OSError, EOFError):
            self.foul = "d"
            raise Foul from None
        except Exception:            # SyntaxError, RecursionError, MemoryError: hostile text has many ways
            self.foul = "v"
            raise Foul from None
        raise error

    def verdict(self):
        if self.foul:
            return self.foul
        return "p" if self.calls else "n"


def builtin_error(name, words):
    """
    the exception to raise in the tests. StopIteration is none of them: raised inside map or a for
    loop it would end the loop, and the tests that were still to come with it.
    """
    kind = vars(builtins)[name]
    if not issubclass(kind, Exception) or issubclass(kind, (StopIteration, StopAsyncIteration)):
        raise ValueError(f"{name} is not passed on")
    return kind(words)


def tests(limits):
    random.seed(0)
    job = json.loads(receive(JOB, sys.maxsize))
    os.write(VERDICT, b"r")          # it is read: from here on the wall clock runs
    os.dup2(1, JOB)
    stubs = Stubs(limits)
    scope = {"__name__": "tests"}
    try:
        stubs.begin(job["source"])
        exec(compile(job["setup"], "setup.py", "exec"), scope)
        scope.update({name: stubs.stub(name) for name in job["names"]})
        exec(compile(job["tests"], "tests.py", "exec"), scope)
        letter = stubs.verdict()
    except BaseException:            # also SystemExit: to leave is not to pass
        letter = stubs.foul or "w"
    os.write(VERDICT, letter.encode())


# --------------------------------------------------------------------------------------------------
# the worker

# what programs and tests import most often: a fork has it for nothing
WARM = """abc bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools
hashlib heapq io itertools json math operator queue random re statistics string textwrap time traceback
typing unicodedata"""


class Worker:
    """forks two processes for each job, and never reads what the job is"""

    def __init__(self, limits, without):
        self.limits = limits
        self.null = os.open(os.devnull, os.O_RDWR)
        for name in WARM.split():
            __import__(name)
        self.was_root = os.geteuid() == 0
        self.user = 2_000_000_000 + os.getpid() * 2    # belongs to nobody: what it counts, it counts for us
        self.pids = None if "walls" in without else jail.enter_walls(JOB)
        self.absent = []
        self.program = None
        try:
            if "filter" in without:
                raise OSError("left out")
            self.program = jail.filter_program(writing=self.pids is not None)
        except OSError as e:
            self.absent = [f"a filter of system calls ({e.strerror or e})"]

    def hold(self, user, folder):
        """this process gives up what it can give up -> what it could not"""
        missing = jail.hold(self.limits, user if self.was_root else None, folder, self.pids is not None,
                            self.program)
        return missing + self.absent

    def child(self, fds, function, *args):
        """fork: `function` runs with these descriptors, numbered from 0, and no others -> process id"""
        if self.pids is not None:
            jail.call("unshare", jail.NEW_PIDS)        # the child is process 1 of a namespace of its own
        pid = os.fork()
        if pid:
            if self.pids is not None:
                jail.call("setns", self.pids, jail.NEW_PIDS)
            return pid
        try:
            high = [os.dup2(fd, 100 + i) for i, fd in enumerate(fds)]
            for i, fd in enumerate(high):
                os.dup2(fd, i)
            os.closerange(len(fds), 4096)
            function(*args)
        finally:
            os._exit(0)

    def held(self, user, folder, function):
        """the whole life of a child: nothing runs that is held less than what the caller was told"""
        if set(self.hold(user, folder)) <= set(self.missing):
            gc.enable()
            function(self.limits)

    def probe(self, folder):
        """what a held process lacks here, by holding one"""
        back, there = os.pipe()

        def tell():
            os.write(3, json.dumps(self.hold(self.user, folder)).encode())

        pid = self.child([self.null, self.null, self.null, there], tell)
        os.close(there)
        with os.fdopen(back) as pipe:
            words = pipe.read()
        os.waitpid(pid, 0)
        return json.loads(words)

    def serve(self):
        with Folder(self) as folder:
            self.missing = self.probe(folder)
        os.write(JOB, json.dumps({"missing": self.missing}).encode() + b"\n")
        waiting = select.poll()
        waiting.register(JOB, select.POLLIN)
        while True:
            waiting.poll()
            with Folder(self) as folder:
                letter = self.job(folder)
            if not letter:
                return                                 # the caller is gone
            try:
                os.write(JOB, letter)
            except BrokenPipeError:
                return

    def job(self, folder):
        """-> a letter of WHY; b"": nobody sent one"""
        asked, ask = os.pipe()
        replies, reply = os.pipe()
        back, verdict = os.pipe()
        null = self.null
        pids = [
            self.child([null, null, null, asked, reply], self.held, self.user, folder, candidate),
            self.child([JOB, null, null, ask, replies, verdict], self.held, self.user + 1, None, tests),
        ]
        for fd in (asked, ask, replies, reply, verdict):
            os.close(fd)
        letter = os.read(back, 1)                      # the tests' process has read the job
        if letter:
            ready, _, _ = select.select([back], [], [], self.limits.wall)
            letter = (os.read(back, 1) or b"x") if ready else b"t"
        os.close(back)
        for pid in pids:
            end(pid)
        return letter


class Folder:
    """an empty folder for one job. Within walls it is /tmp, and each job has its own; else it is removed"""

    def __init__(self, worker):
        self.worker = worker

    def __enter__(self):
        self.path = "/tmp"
        if self.worker.pids is None:
            self.path = tempfile.mkdtemp(prefix="nanorl-sandbox-")
            if self.worker.was_root:
                os.chown(self.path, self.worker.user, self.worker.user)
        return self.path

    def __exit__(self, *_):
        if self.worker.pids is None:
            for root, folders, _ in os.walk(self.path):          # follows no links
                os.chmod(root, stat.S_IRWXU)
            shutil.rmtree(self.path, ignore_errors=True)         # nor does this


def end(pid):
    for kill in (os.kill, os.killpg):                  # its session, too, where there are no walls
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    os.waitpid(pid, 0)


def worker(settings):
    signal.signal(signal.SIGINT, signal.SIG_IGN)       # Ctrl-C is for the caller, whose end is ours
    tempfile.gettempdir()                              # reads the environment, which then goes
    sys.path.remove(os.environ["PYTHONPATH"])          # neither program nor tests may import files of ours
    del sys.modules["common"]                          # which knows its folder
    os.environ.clear()
    try:
        made = Worker(Limits(**settings["limits"]), settings["without"])
    except OSError as e:
        os.write(JOB, json.dumps({"failed": e.strerror or str(e)}).encode() + b"\n")
        return
    gc.freeze()                      # a fork then copies fewer pages
    gc.disable()
    made.serve()


def main():
    if sys.argv[1:2] == ["--worker"]:
        worker(json.loads(sys.argv[2]))
        os._exit(0)
    sandbox = Sandbox(log=print)
    verdict = sandbox.run("def double(x): return 2 * x", "assert double(4) == 8", ["double"])
    print(f"a job: {verdict.why}; not given by this machine: {'; '.join(sandbox.missing) or 'nothing'}")


if __name__ == "__main__":
    main()
