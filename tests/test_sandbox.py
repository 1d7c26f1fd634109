"""other people's code, held: every escape scores 0 in bounded time, and honest programs do not notice"""
import ast
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import data
from common.reward import Rewards
from common.sandbox import Limits, Sandbox, literal
from data import code
from tests.work import seconds, unit

ROOT = Path(__file__).resolve().parent.parent
LINUX = sys.platform == "linux"
MODES = {"all": (), "walls": ("filter",), "filter": ("walls",), "neither": ("walls", "filter")}
QUICK = Limits(wall=0.8)             # what hangs costs this much; a slow machine can only make an escape fail
TESTS = "for x in (3, 5, 8):\n    assert answer(x) == 7 * x + 1"


def scripts(text):
    """{name: body} of a text with a line `== name` above each body"""
    parts = (part.partition("\n") for part in text.split("\n== ")[1:])
    return {name: body.rstrip("\n") for name, _, body in parts}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """a folder that anybody may write, a file that anybody may read, and a port that anybody may call"""
    folder = tmp_path_factory.mktemp("outside")
    folder.chmod(0o777)
    for parent in list(folder.parents)[:3]:
        if parent.owner() == folder.owner() and parent != Path("/tmp"):
            parent.chmod(parent.stat().st_mode | 0o055)
    (folder / "secret").write_text("the answers")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {"OUT": str(folder), "PORT": server.getsockname()[1], "CALLER": os.getpid()}


@pytest.fixture(scope="module")
def sandboxes():
    made = {name: Sandbox(QUICK, without, log=list) for name, without in MODES.items()}
    for sandbox in made.values():
        sandbox.start()
    yield made
    for sandbox in made.values():
        sandbox.close()


@pytest.fixture(scope="module")
def honest():
    """limits for a busy machine"""
    sandbox = Sandbox(Limits(cpu=5, wall=20))
    yield sandbox
    sandbox.close()


# --------------------------------------------------------------------------------------------------
# escapes. Each is the body of answer(x). `right(x)` is the right answer: it is returned when the escape
# WORKED, so a score of 0 says that it did not. Those without it attack the checker, or its time

# what decides the score, in every mode
FORGE = scripts(r'''
== an object that equals everything
class Yes:
    def __eq__(self, other): return True
return Yes()
== a number that equals everything
class Yes(int):
    def __eq__(self, other): return True
return Yes(0)
== an object that is written as the answer
class R:
    def __repr__(self): return str(right(x))
return R()
== exit with 0
import os
os._exit(0)
== SystemExit
raise SystemExit(0)
== KeyboardInterrupt
raise KeyboardInterrupt
== the right exception
raise AssertionError
== the verdict on every descriptor
import os
for fd in range(64):
    if fd != 4:
        try: os.write(fd, b'p')
        except OSError: pass
return 0
== replies made up ahead
import os, struct
for text in (b'(True,True)', b'p', b'(True,0)'):
    os.write(4, struct.pack('>Q', len(text)) + text)
return 0
== patched builtins
import builtins
builtins.all = builtins.isinstance = builtins.bool = lambda *a: True
builtins.AssertionError = ValueError
return 0
== a patched checker
import sys, ast
main = sys.modules['__main__']
main.Stubs.verdict = lambda self: 'p'
main.tests = lambda limits: None
ast.literal_eval = lambda text: 0
return 0
== settrace
import sys
def trace(frame, event, arg):
    if event == 'return' and right(x) in frame.f_locals.values():
        frame.f_locals['letter'] = 'p'
    return trace
sys.settrace(trace)
sys.setprofile(trace)
return 0
== frames
import sys
frame = sys._getframe()
while frame:
    if 'assert' + ' answer' in str(frame.f_locals) + str(frame.f_globals): return right(x)
    frame = frame.f_back
== a walk through gc
import gc
gc.unfreeze()
for thing in gc.get_objects():
    if isinstance(thing, dict):
        for text in list(thing.values()):
            if isinstance(text, str) and 'assert' + ' answer' in text: return right(x)
== its own memory
import ctypes, re
ctypes.CDLL(None).prctl(4, 1)
for line in open('/proc/self/maps'):
    a, b = (int(n, 16) for n in line.split()[0].split('-'))
    if '[heap]' in line or 'rw-p 00000000 00:00 0' in line:
        with open('/proc/self/mem', 'rb') as f:
            f.seek(a)
            if re.search(rb'[a]ssert answer\(x\) == 7 [*] x', f.read(b - a)): return right(x)
== a generator
yield right(x)
== a coroutine
async def f(): return right(x)
return f()
== nan
return float('nan')
== an unhashable set
import os, struct
text = b'(True,{[]:1})'
os.write(4, struct.pack('>Q', len(text)) + text)
return 0
== a call in a literal
import os, struct
text = b'(True,__import__("os")._exit(0))'
os.write(4, struct.pack('>Q', len(text)) + text)
return 0
== brackets, 200,000 deep
import os, struct
os.write(4, struct.pack('>Q', 200_000) + b'[' * 200_000)
== signs, 200,000 deep
import os, struct
os.write(4, struct.pack('>Q', 200_001) + b'-' * 200_000 + b'1')
== a number of 200,000 digits
import os, struct
os.write(4, struct.pack('>Q', 200_000) + b'9' * 200_000)
== a length of 2 ** 63
import os, struct
os.write(4, struct.pack('>Q', 1 << 63))
os.write(4, b'x' * 60_000)
== a value of 10 MB
return 'x' * 10_000_000
== a list that holds itself
a = []
a.append(a)
return a
== no function of that name
del globals()['answer']
raise StopIteration
== the repo's own modules
import data.code
return right(x)
== packages
import torch
return right(x)
''')
# what would harm the machine, in every mode
TAKE = scripts(r'''
== 10 GB
block = bytearray(10 << 30)
return right(x)
== 10 GB in pieces
held = []
for _ in range(10_000): held.append(bytes(1 << 20))
return right(x)
== 10 GB, shared
import mmap
block = mmap.mmap(-1, 10 << 30)
return right(x)
== a fork bomb
import os
while True:
    try: os.fork()
    except OSError: pass
== one fork
import os
pid = os.fork()
if pid == 0: os._exit(0)
return right(x)
== a daemon
import os
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True: pass
    os._exit(0)
return right(x)
== zombies
import os
for _ in range(100):
    if os.fork() == 0: os._exit(0)
return right(x)
== a thousand threads
import threading, time
for _ in range(1000): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()
return right(x)
== other programs
import subprocess
subprocess.run(['/bin/sh', '-c', 'true'], check=True)
return right(x)
== another program in its place
import os
os.execv('/bin/true', ['true'])
== a thousand open files
import os
held = [os.dup(0) for _ in range(1000)]
return right(x)
== a file of 10 MB
with open('f', 'wb') as f: f.write(bytes(10 << 20))
return right(x)
== higher limits
import resource
resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
return right(x)
== endless output
while True: print('x' * 10_000)
== endless output into its pipe
import os
while True: os.write(4, b'x' * 60_000)
== a loop
while True: pass
== a loop at import
return 0
while True: pass
== a loop in C
return 9 ** 9 ** 9
== a hopeless pattern
import re
re.match('(a+)+$', 'a' * 60 + 'b')
== sleeping through signals
import signal, time
for n in range(1, 65):
    try: signal.signal(n, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: time.sleep(100)
== stopping itself
import os, signal
os.kill(os.getpid(), signal.SIGSTOP)
signal.pause()
== a segmentation fault
import ctypes
ctypes.string_at(0)
== abort
import os
os.abort()
== endless recursion
import sys
sys.setrecursionlimit(10 ** 9)
def f(): f()
f()
''')
# what reaches outside: needs walls or a filter, or a user without rights
LOOK = scripts(r'''
== its caller's environment
import os
assert dict(os.environ) or b'HOME' in open('/proc/self/environ', 'rb').read()
return right(x)
== inherited descriptors
import os
for fd in range(5, 500):
    try: os.fstat(fd)
    except OSError: continue
    return right(x)
== its caller
import os, signal
os.kill(CALLER, 0)
return right(x)
== all processes
import os
for pid in [-1, *range(2, 5000)]:
    try: os.kill(pid, 9)
    except OSError: continue
    if pid != os.getpid(): return right(x)
== its parent
import os
assert os.getppid()
os.kill(os.getppid(), 9)
return right(x)
== tracing
import ctypes, os
lib = ctypes.CDLL(None, use_errno=True)
assert lib.ptrace(16, ctypes.c_long(CALLER), None, None) == 0
return right(x)
== a signal by way of a pipe
import fcntl
fcntl.fcntl(0, 8, CALLER)
return right(x)
== its caller's memory
open(f'/proc/{CALLER}/mem', 'rb').read(0)
return right(x)
== a port
import socket
socket.socket().connect(('127.0.0.1', PORT))
return right(x)
== a datagram
import socket
socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', PORT))
return right(x)
== a file outside
open(OUT + '/mine', 'w').close()
return right(x)
== a file in /tmp
import os
path = '/tmp/nanorl-escape'
open(path, 'w').close()
if not os.path.exists(OUT): return 0
return right(x)
== a link to the outside
import os
os.symlink(OUT, 'link')
open('link/mine', 'w').close()
return right(x)
== another name for a file
import os
os.link(OUT + '/secret', 'mine')
open('mine').read()
return right(x)
== removing
import os
os.unlink(OUT + '/secret')
return right(x)
== root
import os
os.setuid(0)
os.listdir('/root')
return right(x)
== a namespace
import ctypes
assert ctypes.CDLL(None).unshare(0x10000000) == 0
return right(x)
== a mount
import ctypes
assert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0
return right(x)
== chroot
import os
os.mkdir('d')
os.chroot('d')
return right(x)
''')
# the filter alone stops these
KERNEL = scripts(r'''
== shared memory segments
import ctypes
assert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0
return right(x)
== memory files
import os
os.memfd_create('x')
return right(x)
== io_uring
import ctypes
lib = ctypes.CDLL(None)
assert lib.syscall(425, 1, bytes(120)) >= 0
return right(x)
== tracing itself
import ctypes
assert ctypes.CDLL(None).ptrace(0, 0, None, None) == 0
return right(x)
== outliving its parent
import ctypes
assert ctypes.CDLL(None).prctl(1, 0) == 0
return right(x)
''')
# the walls alone stop these
SEE = scripts(r'''
== reading a file outside
open(OUT + '/secret').read()
return right(x)
== what programs there are
import os
assert os.listdir('/usr/bin')
return right(x)
== what processes there are
import os
assert os.listdir('/proc')
return right(x)
== a disk full of small files
for i in range(2000):
    with open(f'f{i}', 'wb') as f: f.write(bytes(4096))
return right(x)
''')
SLOW = {"a fork bomb", "endless output", "endless output into its pipe", "a loop", "a loop at import",
        "a loop in C", "a hopeless pattern", "sleeping through signals", "endless recursion"}
EVERY = FORGE | TAKE | LOOK | KERNEL | SEE


def held(mode):
    """what this mode must stop: everything where all of it is there, and in the others what is quick"""
    if mode == "all":
        return EVERY
    chosen = FORGE | TAKE
    if mode == "walls":
        chosen = chosen | LOOK | SEE
    if mode == "filter":
        chosen = chosen | LOOK | KERNEL
        if os.geteuid():                               # the same user may read what he may read
            chosen.pop("its caller's memory")
    return {name: body for name, body in chosen.items() if name not in SLOW}


def source(body, names):
    lines = "".join(f"    {line}\n" for line in body.split("\n"))
    if body == TAKE["a loop at import"]:
        lines = "    return 0\nwhile True: pass\n"
    where = "".join(f"{name} = {value!r}\n" for name, value in names.items())
    return f"{where}def right(x): return 7 * x + 1\ndef answer(x):\n{lines}"


@pytest.mark.skipif(not LINUX, reason="what another kernel lets through is written in docs/code.md")
@pytest.mark.parametrize("mode, name", [(mode, name) for mode in MODES for name in held(mode)])
def test_escapes(mode, name, sandboxes, outside):
    sandbox = sandboxes[mode]
    if any("left out" not in words for words in sandbox.missing):
        pytest.skip(f"this machine does not give {sandbox.missing}")
    worker = sandbox.worker.pid
    start = time.monotonic()
    verdict = sandbox.run(source(EVERY[name], outside), TESTS, ["answer"])
    assert not verdict.passed, f"{name} worked"
    assert time.monotonic() - start < QUICK.wall + 100, "it hangs"
    assert sandbox.worker.pid == worker, "its worker survived"
    assert sorted(os.listdir(outside["OUT"])) == ["secret"] and not os.path.exists("/tmp/nanorl-escape")
    assert len(descendants(worker)) <= 1, "nobody is left of it"


def descendants(pid):
    parents = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(entry)] = int(fields[1])
    found = {pid}
    for _ in range(5):
        found |= {child for child, parent in parents.items() if parent in found}
    return found - {pid}


HARMLESS = """one fork, zombies, other programs, a file of 10 MB, a thousand open files, its caller, a port,
a datagram, a file outside, a link to the outside, another name for a file, a signal by way of a pipe,
reading a file outside, memory files, tracing itself, what processes there are, its caller's memory"""


@pytest.mark.parametrize("name", HARMLESS.replace("\n", " ").split(", "))
def test_escapes_work_where_nothing_holds_them(name, outside, tmp_path):
    """or the test above would see nothing"""
    if not LINUX and name in SEE | KERNEL:
        pytest.skip("Linux has that")
    program = source(EVERY[name], outside) + "\nassert answer(3) == 22\n"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    Path(outside["OUT"], "mine").unlink(missing_ok=True)


def test_there_are_enough():
    assert len(EVERY) >= 60


LINKS = """
import os
os.symlink(OUT, 'link')
os.mkdir('shut')
open('shut/x', 'w').close()
os.symlink(OUT, 'shut/link')
os.chmod('shut', 0)
return os.getcwd()"""
REMAINS = """
import gc, os
def answer(x):
    gc.unfreeze()
    seen = [str(thing) for thing in gc.get_objects() if isinstance(thing, dict)]
    return [os.listdir(), any('wa' + 'termelon' in text for text in seen)]"""


def test_links_in_a_folder_are_not_followed_when_it_is_removed(outside, tmp_path, monkeypatch):
    """without walls the folder is a real one; it goes, and what its links point to stays"""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    sandbox = Sandbox(without=("walls", "filter"), log=list)
    tests = f"assert answer(1).startswith({str(tmp_path)!r})"
    assert sandbox.run(source(LINKS, outside), tests, ["answer"]).passed
    sandbox.close()
    assert os.listdir(outside["OUT"]) == ["secret"] and not list(tmp_path.iterdir())


def test_a_job_finds_nothing_of_the_job_before(honest):
    """the worker never reads a job, and a folder is gone with its job"""
    first = "def answer(x):\n    open('watermelon', 'w').write('x')\n    return 'watermelon'"
    assert honest.run(first, "assert answer(1) == 'watermelon'", ["answer"]).passed
    assert honest.run(REMAINS, "assert answer(1) == [[], False], 'watermelon'", ["answer"]).passed


@pytest.mark.skipif(not LINUX, reason="a filter of Linux")
def test_a_kernel_that_refuses_namespaces(tmp_path):
    """as in most containers: the filter is left, and what is missing is said, once for two sandboxes"""
    text = """
import platform
from common import jail
from common.sandbox import Sandbox
jail.call("prctl", jail.NO_NEW_PRIVILEGES, 1, 0, 0, 0)
refuse = jail.instruction("load", 0) + jail.always(jail.FORBIDDEN["unshare"][jail.machine()], jail.REFUSE)
jail.install(refuse + jail.instruction("return", jail.ALLOW))
for _ in range(2):
    held = Sandbox(log=print)
    print(held.run("def f(): return 1", "assert f() == 1", ["f"]).passed)
    print(held.run("import os\\ndef f(): return os.fork() * 0", "assert f() == 0", ["f"]).passed)
"""
    said, *scores = script(text, tmp_path).communicate(timeout=600)[0].splitlines()
    assert said == ("sandbox: this machine does not give walls of namespaces (Operation not permitted) "
                    "(docs/code.md says what that means)")
    assert scores == ["True", "False"] * 2


@pytest.mark.parametrize("mode", MODES)
def test_files_of_ours_are_no_modules_to_a_program(mode, sandboxes):
    """the worker imports common/jail.py, so it starts with our folder on its path; its children do not"""
    code = """
import sys
def answer(x):
    try:
        import common.flags
    except ImportError:
        return [path for path in sys.path if path.endswith(x)]"""
    assert sandboxes[mode].run(code, f"assert answer({ROOT.name!r}) == []", ["answer"]).passed


def test_what_it_lacks_is_said_once():
    heard = []
    for _ in range(2):
        with_less = Sandbox(without=("walls",), log=heard.append)
        assert with_less.run("def f(): return 1", "assert f() == 1", ["f"]).passed
        with_less.close()
    assert len(heard) <= 1 and all("walls" in words and "docs/code.md" in words for words in heard)


# --------------------------------------------------------------------------------------------------
# honest programs

HONEST = scripts(r'''
== arguments of all kinds
def f(*args, **kwargs): return [args, kwargs]
--
assert f(1, 'a', b'b', [None], k={(1, 2): {3}}) == [(1, 'a', b'b', [None]), {'k': {(1, 2): {3}}}]
== numbers
def f(x): return [x, -x, x + 0.5, 1j * x, True, float('inf'), -float('inf')]
--
assert f(2) == [2, -2, 2.5, 2j, True, float('inf'), -float('inf')]
assert str(f(0)[1]) == '0'
== a long number
def f(n): return 3 ** n
--
assert f(40_000) == 3 ** 40_000
== letters
def f(s): return s[::-1]
--
assert f('aä\n\ud800é漢') == '漢é\ud800\näa'
== empty ones
def f(): return [(), [], {}, set(), '', b'']
--
assert f() == [(), [], {}, set(), '', b'']
== derived from built-ins
from collections import *
from enum import IntEnum
P = namedtuple('P', 'x y')
E = IntEnum('E', 'one')
def f(): return [Counter('aab'), P(1, 2), E.one, OrderedDict(a=1)]
--
assert f() == [{'a': 2, 'b': 1}, (1, 2), 1, {'a': 1}]
== its state
calls = []
def f(x):
    calls.append(x)
    return calls
--
f(1)
assert f(2) == [1, 2]
== two functions
def f(x): return x + 1
def g(x): return f(x) * 2
--
assert g(f(1)) == 6
== built-in exceptions
def f(x): raise KeyError('k') if x else ZeroDivisionError('z')
--
for x, kind in ((1, KeyError), (0, ZeroDivisionError)):
    try:
        f(x)
    except kind as e:
        assert e.args
    else:
        assert False
== modules
import asyncio, csv, decimal, json, logging, re, uuid
async def g(): return 5
def f(): return asyncio.run(g())
--
assert f() == 5
== a file of its own
import os, tempfile
def f(s):
    with open('a', 'w') as file: file.write(s)
    with tempfile.TemporaryFile() as file: file.write(b'x')
    return [open('a').read(), os.listdir()]
--
assert f('abc') == ['abc', ['a']]
== 200 MB
def f(): return len(bytearray(200 << 20))
--
assert f() == 200 << 20
== prints
def f(): print('x' * 1_000_000); return 1
--
assert f() == 1
print('fine')
== classes
from dataclasses import dataclass
@dataclass
class P:
    x: int
def f(): return P(3).x
--
assert f() == 3
== a main of its own
def f(): return 1
if __name__ == '__main__':
    raise SystemExit
--
assert f() == 1
== chance is the same each time
import random
def f(): return random.random()
--
assert f() == 0.8444218515250481
== no input
def f():
    try: return input()
    except EOFError: return 'none'
--
assert f() == 'none'
''')


@pytest.mark.parametrize("name", HONEST)
def test_honest_programs(name, honest):
    program, _, tests = HONEST[name].partition("\n--\n")
    verdict = honest.run(program, tests, ["f", "g"])
    if "file" in name and honest.missing:
        pytest.skip("where there are no walls no file can be written")
    assert verdict.passed, verdict.why


BAD = "a value that is no literal"
ENDED = "the candidate ended before its tests did"


@pytest.mark.parametrize("program, tests, why", [
    ("def f(x): return x", "assert f(1) == 2", "a test failed"),
    ("def f(x): return", "import sys\nf(1)\nsys.exit(0)", "a test failed"),
    ("def f(x): return (", "assert f(1) == 2", ENDED),
    ("raise ValueError", "assert f(1) == 2", ENDED),
    ("def f(x): raise SystemExit", "try: f(1)\nexcept: pass", BAD),
    ("def f(x): return iter(x)", "try: f([1])\nexcept: pass", BAD),
    ("class E(Exception): pass\ndef f(x): raise E", "try: f(1)\nexcept Exception: pass", BAD),
    ("def f(x): b'\\xff'.decode()", "try: f(1)\nexcept ValueError: pass", BAD),
    ("def f(x): return x", "f(lambda: 1)", BAD),
    ("def f(x): return x", "pass", "its tests never called the candidate"),
    ("def f(x): return x", "f(1)\nimport os\nos._exit(0)", "the tests' own process ended"),
])
def test_why(program, tests, why, honest):
    verdict = honest.run(program, tests, ["f"])
    assert not verdict.passed and verdict.why.startswith(why)


def test_out_of_time(sandboxes):
    """tests that never end are stopped, too: `while f(x) != y` waits for the candidate"""
    verdict = sandboxes["all"].run("def f(): return 1", "while f() != 2: pass", ["f"])
    assert verdict == (False, "out of time")


def test_a_stop_iteration_skips_no_test(honest):
    """raised inside map, it would end the loop over the tests, and all() of nothing is true"""
    tests = "assert all(map(lambda pair: f(pair[0]) == pair[1], [(1, 2), (2, 3)]))"
    assert honest.run("def f(x): return x + 1", tests, ["f"]).passed
    for kind in ("StopIteration", "StopAsyncIteration", "GeneratorExit"):
        assert not honest.run(f"def f(x): raise {kind}", tests, ["f"]).passed


def test_literals():
    values = [None, True, 0, -3, 2.5, -0.0, 1e300, float("inf"), 2j, "a'\n\u2028", b"\0", (), (1,), [[]]]
    values += [{1: {2}}, set()]
    for value in values:
        assert repr(ast.literal_eval(literal(value))) == repr(value)
    assert ast.literal_eval(literal(-(1 << 20_000))) == -(1 << 20_000)
    for value in (float("nan"), object(), range(3), frozenset(), iter([]), bytearray(b""), [print], int):
        with pytest.raises(ValueError):
            literal(value)


# --------------------------------------------------------------------------------------------------
# its caller

def test_a_worker_that_was_killed_is_replaced(honest):
    assert honest.run("def f(): return 1", "assert f() == 1", ["f"]).passed
    os.kill(honest.worker.pid, signal.SIGKILL)
    assert honest.run("def f(): return 1", "assert f() == 1", ["f"]).passed


def script(text, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)}
    command = [sys.executable, "-c", text]
    return subprocess.Popen(command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE)


def test_a_fork_of_the_caller_gets_a_worker_of_its_own(tmp_path):
    text = """
import os
from common.sandbox import Sandbox
sandbox = Sandbox()
check = lambda: sandbox.run("def f(): return 1", "assert f() == 1", ["f"]).passed
assert check()
if os.fork() == 0:
    os._exit(0 if check() else 1)
assert os.wait()[1] == 0 and check()
print("fine")
"""
    assert script(text, tmp_path).communicate(timeout=600)[0] == "fine\n"


@pytest.mark.skipif(not LINUX, reason="reads /proc")
@pytest.mark.parametrize("killed", ["caller", "worker"])
@pytest.mark.parametrize("without", [(), ("walls",)])
def test_nothing_outlives_the_caller(without, killed, tmp_path):
    """killed in the middle of a job: at the end of the job's time nothing is left"""
    text = f"""
import tempfile
from common.sandbox import Limits, Sandbox
sandbox = Sandbox(Limits(cpu=100, wall=2), {without!r})
sandbox.run("def f(): return 1", "assert f() == 1", ["f"])
print(sandbox.worker.pid, flush=True)
sandbox.run("import time\\ndef f(): time.sleep(100)", "f()", ["f"])
"""
    caller = script(text, tmp_path)
    worker = int(caller.stdout.readline())
    processes = 3 if without else 4              # worker, tests, candidate; and who waits outside the walls
    until = time.monotonic() + 300
    while len(descendants(worker)) < processes - 1 and time.monotonic() < until:
        time.sleep(0.02)
    everybody = {worker} | descendants(worker)
    assert len(everybody) == processes
    os.kill(caller.pid, signal.SIGKILL)
    if killed == "worker":                       # its group, as when a reward worker is killed
        os.kill(worker, signal.SIGKILL)
    caller.communicate()
    while any(map(runs, everybody)):
        assert time.monotonic() < until, "somebody is left"
        time.sleep(0.02)

def runs(pid):
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


# --------------------------------------------------------------------------------------------------
# the task

def test_our_own_dozen():
    task = data.load("code")
    problems = task.problems("train", 100, 0)
    assert len(problems) == 12 and task.problems("train", 5, 0) == problems[:5]
    assert {p.id for p in problems} == set(range(12)) and task.problems("test", 100, 1) != problems
    for p in problems:
        json.dumps(p.data)
        assert task.reward(p, p.gold) == 1.0, p.prompt
        for text in ("", "    return None\n", "```python\n```"):
            assert task.reward(p, text) == 0.0
        assert task.reward(p, f"Like this:\n```python\n{p.gold}\n```\nThat is all.") == 1.0
    prompt, completion = task.document("train", 0, 30)
    assert task.reward(next(p for p in problems if p.prompt == prompt), completion) == 1.0
    assert next(task.corpus("train", 0)) == task.document("train", 0, 0)


def test_a_hundred_per_second_of_cpu():
    """limits on; seconds of CPU time, of the worker and its children too, for this machine may be busy.
    A hundred on a core that does two hundred units a second; a fifth of that is asked for here"""
    core = 1 / min(seconds(unit) for _ in range(5))
    best = 0
    for _ in range(4):
        best = max(best, code.speed(data.load("code"), seconds=1.0)[1])
        if best > 0.1 * core:
            break
    assert best > 0.1 * core


def test_as_a_reward():
    task = data.load("code")
    p = next(p for p in task.problems("train", 12, 0) if "def middle" in p.prompt)
    rewards = Rewards("code", workers=1, timeout_min=20.0)
    texts = [p.gold, "    return items[0]\n", "    while True: pass\n", "    import os\n    os._exit(0)\n"]
    for i, text in enumerate(texts):
        rewards.put((0, i), p, text)
    found = {}
    while rewards.pending:
        found.update({key[1]: reward for key, reward, _ in rewards.get(block=True)})
    rewards.close()
    assert found == {0: 1.0, 1: 0.0, 2: 0.0, 3: 0.0} and not rewards.failed


PROMPT = 'import math\n\ndef helper(x):\n    return x + 1\n\ndef area(r):\n    """of a disc"""\n'
ROW = {"task_id": "T/0", "prompt": PROMPT, "entry_point": "area",
       "canonical_solution": "    return math.pi * r * r\n",
       "test": "def check(candidate):\n    assert helper(1) == 2 and abs(candidate(2) - 12.566) < 0.01\n"}
BODY = "    return math.pi * r * r\n"
FUNCTION = f"def area(r):\n{BODY}"


@pytest.mark.parametrize("text, right", [
    (BODY, True),
    ("\n" + BODY, True),
    ("\r\n" + BODY.replace("\n", "\r\n"), True),
    (BODY + "\n\nprint(area(2)\n", True),                      # cut at the first line that is not indented
    (BODY + "```\nThat is it.", True),
    (BODY + "\ndef area(r):\n    return 0\n", True),
    ("    x = r\n\n    return math.pi * x * x", True),
    (FUNCTION, True),
    (f"Sure!\n```python\n{FUNCTION}```\nIt works.", True),
    (f"```\n{BODY}```", True),
    (f"```python\n{FUNCTION}", True),                            # cut off by the length limit
    (f"First\n```python\ndef area(r): return 0\n```\nno:\n```py\n{FUNCTION}```", True),
    (f"```python\n{FUNCTION}```\nTry it:\n```python\nprint(area(2))\n```", True),
    (f"```python\n{FUNCTION}```\nor\n```python\ndef area(r): return 0\n```", False),
    ("The area is pi r squared.", False),
    ("return math.pi * r * r", False),
    ("", False),
    (f"    ```python\n{FUNCTION}    ```", True),
])
def test_where_the_program_is(text, right):
    p = code.problem(ROW, 0, "code", "file")
    assert code.Code.reward(code.task(), p, text) == float(right)


def test_a_file_in_the_layout_of_humaneval(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NANORL_DATA", raising=False)
    wrong = {"task_id": "T/1", "prompt": "def one():\n", "entry_point": "one",
             "canonical_solution": "    return 2\n",
             "test": "def check(candidate):\n    assert candidate() == 1\n"}
    bare = {**wrong, "task_id": "T/2", "canonical_solution": "    return 1\n"}
    broken = {**wrong, "task_id": "T/3", "test": None, "entry_point": None, "prompt": None}
    file = tmp_path / "Mine.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join(map(json.dumps, [ROW, wrong, bare, broken])).encode()))
    monkeypatch.setattr(code, "speed", lambda made: (1, 1))
    code.main(["--from", str(file)])
    said = capsys.readouterr().out
    assert "left out: task T/1: its own solution: a test failed" in said and "row 4 (task T/3)" in said
    assert "2 of 4 rows" in said and (tmp_path / "nanorl/code/mine.jsonl").is_file()
    task = data.load("code:mine:all")
    assert [p.prompt for p in task.rows] == [PROMPT, "def one():\n"] and task.name == "code:mine:all"
    assert all(task.reward(p, p.gold) == 1.0 for p in task.problems("test", 9, 0))


def test_a_file_in_the_layout_of_mbpp(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("NANORL_DATA", str(tmp_path / "data"))

    def row(i, **more):
        return {"task_id": i, "text": f"Add {i}.", "code": f"def add(x):\r\n\treturn x + {i}",
                "test_list": [f"assert add(1) == {i + 1}"], "test_setup_code": "",
                "challenge_test_list": [], **more}

    rows = [row(i) for i in range(60)]
    rows.append(row(60, test_setup_code="offset = 5", code="def add(x): return x + offset",
                    test_list=["assert add(1) == offset + 1"]))
    rows.append({"task_id": 61, "prompt": "Root.", "code": "def root(x): return math.sqrt(x)",
                 "test_imports": ["import math"], "test_list": ["assert math.isclose(root(4), 2)"]})
    rows.append(row(62, code="class add:\n    def __init__(self, x): pass"))
    file = tmp_path / "sums.json"
    file.write_text(json.dumps(rows))
    assert code.take(file) == "sums"
    assert "row 63 (task 62)" in capsys.readouterr().out
    assert (tmp_path / "cache/nanorl/code/sums.jsonl").is_file(), "not into NANORL_DATA, which may be shared"
    task = data.load("code:sums")
    parts = [{p.id for p in task.problems(split, 999, 0)} for split in ("train", "valid", "test")]
    assert sum(map(len, parts)) == len(set().union(*parts)) == 62 and min(map(len, parts)) > 0
    p = task.rows[3]
    assert "assert add(1) == 4" in p.prompt and p.data["messages"][0]["content"].startswith("Add 3.")
    assert task.reward(p, "def add(x): return x + 3") == 1.0
    assert task.reward(p, "def add(x): return x + 4") == 0.0
    assert task.reward(p, "```\ndef add(x): return x + 3\n```\n") == 1.0
    assert len(data.load("code:sums:all").problems("test", 999, 0)) == 62


def test_bad_files_and_names(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("NANORL_DATA", raising=False)
    with pytest.raises(FileNotFoundError, match="no nothing.jsonl in .*: run python -m data.code --from"):
        data.load("code:nothing")
    with pytest.raises(FileNotFoundError, match="no such file"):
        code.take(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match="has no variant 'some'; known variants: all"):
        data.load("code:mine:some")
    with pytest.raises(ValueError, match="usage"):
        code.main(["--form", "x"])
    with pytest.raises(ValueError, match="unknown split"):
        data.load("code").problems("dev", 1, 0)
    (tmp_path / "bad.jsonl").write_text('{"task_id": 1, "text": "x"}\n')
    with pytest.raises(ValueError, match="no row whose own solution passes"):
        code.take(tmp_path / "bad.jsonl")
    (tmp_path / "worse.jsonl").write_text('{"question": 1}\n')
    with pytest.raises(ValueError, match="task_id"):
        code.take(tmp_path / "worse.jsonl")
    assert not list((tmp_path / "nanorl/code").iterdir()), "nothing half done is left"
