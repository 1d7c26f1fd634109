"""
Other people's code, held: does a candidate program pass its tests, whatever it tries?

    sandbox = Sandbox()
    sandbox.run("def double(x): return 2 * x", "assert double(4) == 8", ["double"])
    -> Verdict(passed=True, why="passed")

The candidate and its tests never share a process. In the tests' process `double` is a stub: it sends its
arguments as a Python literal and gets the value back as a literal (`ast.literal_eval`), so what a test
compares is a plain number, text or container, never an object with an __eq__ of the candidate's.

    caller --- source, tests ---------------------> tests' process --- "p" or "w" --> worker --> caller
                                                     |  ^
                                     ('double',(4,)) |  | (True,8)
                                                     v  |
    worker, warm, never sees either --- fork ---> candidate's process

The verdict has a pipe that the candidate does not hold. It may exit with 0, print, patch its own
built-ins, walk every frame and object, or fill its pipe with made-up replies: a reply is only ever its own
return value. The worker is a small warm Python (the standard library, no site-packages) that forks both
processes for each job BEFORE anybody has read the job, so nothing of the tests is in the candidate's memory.

What holds them, each where the kernel gives it (`python -m common.sandbox` says what this machine gives):
    limits      CPU seconds, wall clock, memory, processes, size of a file and of a value, open files
    walls       namespaces: no network, no process but its own to see or to signal, and for files a tree in
                memory that holds the standard library, read-only, and an empty folder
    a user      with no rights, where the caller is root
    a filter    of system calls: no sockets, processes, signals to others, tracing, shared memory. Where
                there are no walls: no writing of files either
What the machine does not give is said once. With neither walls nor filter (macOS) the score still cannot be
forged by the ways above, but the network and the files of the user are open.

Left out of the usual recipe: containers, a package for sandboxes, `exec` of candidate and test in one
process with the dangerous functions set to None. What is not promised: docs/code.md.
"""
import ast
import atexit
import builtins
import ctypes
import errno
import functools
import gc
import json
import math
import os
import platform
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

try:
    import resource
except ImportError:                  # Windows: no limits, so no sandbox; `start` says so
    resource = None


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
        -> Verdict. source: the candidate. names: which of its functions the tests call. setup: code that
        the tests' process runs before those names are put in, such as helpers that the tests share.
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
        if resource is None:
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
        command = [sys.executable, "-P", "-s", "-S", "-B", "-X", "utf8", os.path.abspath(__file__)]
        env = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
        env["PYTHONHASHSEED"] = "0"
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
    a text that ast.literal_eval turns into an equal value; ValueError where there is none. What is derived
    from a built-in travels as that built-in: a Counter is a dict, a named tuple a tuple.
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
    the exception to raise in the tests. StopIteration is none of them: raised inside map or a for loop it
    would end the loop, and the tests that were still to come with it.
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
# the kernel, as its C library is called

NEW_MOUNTS = 0x00020000              # <linux/sched.h>
NEW_IPC = 0x08000000
NEW_USER = 0x10000000
NEW_PIDS = 0x20000000
NEW_NETWORK = 0x40000000
BIND = 0x1000                        # <linux/mount.h>
RECURSIVE = 0x4000
PRIVATE = 0x40000
NO_SUID_DEVICES_PROGRAMS = 2 | 4 | 8
READ_ONLY_NO_SUID_DEVICES = 1 | 2 | 4
DETACH = 2
AT_FDCWD = -100                      # <linux/fcntl.h>
AT_RECURSIVE = 0x8000
DIE_WITH_PARENT = 1                  # <linux/prctl.h>
DUMPABLE = 4
FILTER = 22
NO_NEW_PRIVILEGES = 38
MACHINES = {"x86_64": 0, "aarch64": 1}


@functools.cache
def library():
    if sys.platform != "linux":
        raise OSError(errno.ENOSYS, "not Linux")
    return ctypes.CDLL(None, use_errno=True)


def call(name, *args):
    """a function of the C library; OSError where it says -1"""
    args = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    if getattr(library(), name)(*args) == -1:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def machine():
    """which column of the tables of system calls is ours"""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        raise OSError(errno.ENOSYS, f"{sys.platform} on {platform.machine()}")
    return MACHINES[platform.machine()]


def mount(source, target, kind=None, flags=0, options=None):
    names = [name if name is None else os.fsencode(name) for name in (source, target, kind)]
    call("mount", *names, flags, None if options is None else options.encode())


# --------------------------------------------------------------------------------------------------
# the walls: namespaces, made once for the worker and all that it forks

def enter_walls():
    """
    Goes on in a child that is process 1 of its own namespaces; this process waits for it and ends with it.
    A user without rights gets them from a namespace of users, in which he is root and alone.
    """
    user = os.geteuid()
    users = {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {os.getegid()} 1"}
    call("unshare", NEW_PIDS | NEW_NETWORK | NEW_MOUNTS | NEW_IPC | (NEW_USER if user else 0))
    for name, line in users.items() if user else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    pid = os.fork()
    if pid:
        os.close(JOB)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
    build_tree()
    return pids


def build_tree():
    """
    Replaces all files by a tree in memory: the standard library, where it was, and an empty /tmp. The new
    tree is built upon /proc, the one folder that holds nobody's library, and becomes the root.
    """
    mount(None, "/", flags=RECURSIVE | PRIVATE)
    mount("tmpfs", "/proc", "tmpfs", options="mode=755")
    os.mkdir("/proc/tmp")
    library_folders = []
    for path in sorted(filter(os.path.isdir, sys.path)):
        if not any(path.startswith(folder + "/") for folder in library_folders):
            library_folders.append(path)
            os.makedirs("/proc" + path)
            mount(path, "/proc" + path, flags=BIND | RECURSIVE)
    for path in library_folders:
        for packages in ("site-packages", "dist-packages"):      # may hold data sets with their answers
            if os.path.isdir(f"/proc{path}/{packages}"):
                mount("tmpfs", f"/proc{path}/{packages}", "tmpfs", options="mode=755")
    os.chdir("/proc")
    call("syscall", FORBIDDEN["pivot_root"][machine()], b".", b".")
    call("umount2", b".", DETACH)
    os.chdir("/")
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY_NO_SUID_DEVICES, 0, 0, 0)
    number = FORBIDDEN["mount_setattr"][machine()]
    call("syscall", number, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.sizeof(attributes))


# --------------------------------------------------------------------------------------------------
# the filter of system calls

# name: its number on x86_64, on aarch64 (None: it has none)
FORBIDDEN = {
    # other machines, other programs
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    # other processes: signals, memory, priorities
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438), "ptrace": (101, 117), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "process_madvise": (440, 440), "process_mrelease": (448, 448),
    "kcmp": (312, 272), "setpriority": (141, 140), "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119), "sched_setaffinity": (203, 122), "sched_setattr": (314, 274),
    "ioprio_set": (251, 30),
    # memory that the limit on the address space does not count
    "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "add_key": (248, 217), "request_key": (249, 218),
    "keyctl": (250, 219), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    # the kernel's own works
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "chroot": (161, 51),
    "pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "personality": (135, 92),
    "open_by_handle_at": (304, 265), "init_module": (175, 105), "finit_module": (313, 273),
    "kexec_load": (246, 104), "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
    "fanotify_init": (300, 262), "seccomp": (317, 277),
}
WRITING = {      # forbidden, too, where there are no walls
    "creat": (85, None), "truncate": (76, 45), "ftruncate": (77, 46), "fallocate": (285, 47),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, None),
    "unlinkat": (263, 35), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None),
    "link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36),
    "mknod": (133, None), "mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52),
    "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "fchown": (93, 55),
    "lchown": (94, None), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None),
    "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5), "lsetxattr": (189, 6),
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14), "lremovexattr": (198, 15),
    "fremovexattr": (199, 16), "removexattrat": (466, 466), "file_setattr": (469, 469),
}
NO_SUCH_CALL = {                     # their flags lie in memory: libc then takes the older call
    "clone3": (435, 435), "openat2": (437, 437),
}
# name: (numbers, which argument decides, how, the values that it is compared with, is the call allowed then?)
A_THREAD = 0x00010000                # CLONE_THREAD
BY_ARGUMENT = {
    "clone": ((56, 220), 0, "&", [A_THREAD], True),
    "prlimit64": ((302, 261), 0, "==", [0], True),                   # the limits of its own process
    "fcntl": ((72, 25), 1, "==", [8, 15], False),                    # F_SETOWN, F_SETOWN_EX: signals
    "ioctl": ((16, 29), 1, "==", [0x8901, 0x8902, 0x5412], False),   # FIOSETOWN, SIOCSPGRP, TIOCSTI
    "prctl": ((157, 167), 0, "==", [DIE_WITH_PARENT], False),        # it would outlive us
}
TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
WRITING_BY_ARGUMENT = {
    "open": ((2, None), 1, "&", [TO_WRITE], False),
    "openat": ((257, 56), 2, "&", [TO_WRITE], False),
}
ARCHITECTURES = (0xC000003E, 0xC00000B7)              # <linux/audit.h>
X32 = 0x40000000                     # numbers from here on are a third set of system calls, on x86_64
KILL = 0x80000000
ALLOW = 0x7FFF0000
REFUSE = 0x00050000 | errno.EPERM
UNKNOWN = 0x00050000 | errno.ENOSYS
CODES = {"load": 0x20, "==": 0x15, ">=": 0x35, "&": 0x45, "return": 0x06}        # <linux/bpf_common.h>


def instruction(code, value, yes=0, no=0):
    """one of the filter's little language. yes, no: how many instructions a comparison skips"""
    return struct.pack("HBBI", CODES[code], yes, no, value)


def always(number, result):
    return instruction("==", number, 0, 1) + instruction("return", result)


def by_argument(number, which, how, values, allowed):
    """a call that is allowed or refused by one of its arguments"""
    program = instruction("==", number, 0, 2 * len(values) + 2)
    program += instruction("load", 16 + 8 * which)
    for value in values:
        program += instruction(how, value, 0, 1) + instruction("return", ALLOW if allowed else REFUSE)
    return program + instruction("return", REFUSE if allowed else ALLOW)


def filter_program(writing):
    """-> the program: the tables above made into jumps. writing: may files be written?"""
    column = machine()
    program = instruction("load", 4) + instruction("==", ARCHITECTURES[column], 1, 0)
    program += instruction("return", KILL) + instruction("load", 0)
    if platform.machine() == "x86_64":
        program += instruction(">=", X32, 0, 1) + instruction("return", REFUSE)
    for numbers in NO_SUCH_CALL.values():
        program += always(numbers[column], UNKNOWN)
    rules = BY_ARGUMENT if writing else BY_ARGUMENT | WRITING_BY_ARGUMENT
    for numbers, *rule in rules.values():
        if numbers[column] is not None:
            program += by_argument(numbers[column], *rule)
    forbidden = FORBIDDEN if writing else FORBIDDEN | WRITING
    for numbers in forbidden.values():
        if numbers[column] is not None:
            program += always(numbers[column], REFUSE)
    return program + instruction("return", ALLOW)


def install(program):
    buffer = ctypes.create_string_buffer(program)
    call("prctl", FILTER, 2, struct.pack("HP", len(program) // 8, ctypes.addressof(buffer)), 0, 0)


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
        self.pids = None if "walls" in without else enter_walls()
        self.absent = []
        self.program = None
        try:
            if "filter" in without:
                raise OSError("left out")
            self.program = filter_program(writing=self.pids is not None)
        except OSError as e:
            self.absent = [f"a filter of system calls ({e.strerror or e})"]

    def hold(self, user, folder):
        """
        the process gives up what it can give up -> what it could not. folder: its own, the current one
        from now on; None: it needs none.
        """
        limits = self.limits
        missing = []

        def step(what, function, *args):
            try:
                function(*args)
            except (OSError, ValueError, AttributeError) as e:
                missing.append(f"{what} ({getattr(e, 'strerror', None) or e})")

        step("a session of its own", os.setsid)
        step("a folder of its own", self.move, folder)
        step("a limit on CPU time", limit, resource.RLIMIT_CPU, limits.cpu)
        step("a limit on memory", limit, resource.RLIMIT_AS, limits.memory)
        step("a limit on the size of files", limit, resource.RLIMIT_FSIZE, limits.file)
        step("a limit on open files", limit, resource.RLIMIT_NOFILE, limits.files)
        step("a limit on core dumps", limit, resource.RLIMIT_CORE, 0)
        if self.was_root:
            step("a user without rights", become, user)
        step("a limit on processes", limit, resource.RLIMIT_NPROC, limits.processes)
        if sys.platform == "linux":
            step("no capabilities", drop_capabilities)
            step("an end with its parent's", call, "prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
            step("memory that nobody traces", call, "prctl", DUMPABLE, 0, 0, 0, 0)
            step("no new privileges", call, "prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        if self.program:
            step("a filter of system calls", install, self.program)
        return missing + self.absent

    def move(self, folder):
        if folder and self.pids is not None:           # its own, and gone with its last process
            call("unshare", NEW_MOUNTS)
            mount("tmpfs", folder, "tmpfs", NO_SUID_DEVICES_PROGRAMS,
                  f"size={self.limits.folder},nr_inodes=1000,mode=777")
        os.chdir(folder or "/")

    def child(self, fds, function, *args):
        """fork: `function` runs with these descriptors, numbered from 0, and no others -> process id"""
        if self.pids is not None:
            call("unshare", NEW_PIDS)                  # the child is process 1 of a namespace of its own
        pid = os.fork()
        if pid:
            if self.pids is not None:
                call("setns", self.pids, NEW_PIDS)
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


def limit(what, most):
    _, hard = resource.getrlimit(what)
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.setrlimit(what, (most, most))


def become(user):
    try:
        change_user(user)
    except OSError:                  # a container that knows no such number
        change_user(65534)


def change_user(user):
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)


def drop_capabilities():
    header = struct.pack("II", 0x20080522, 0)          # <linux/capability.h>, version 3
    call("capset", header, struct.pack("6I", *[0] * 6))


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
