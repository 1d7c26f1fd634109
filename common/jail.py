"""
What holds a process that runs other people's code. common/sandbox.py says who runs what, and makes
these processes; here is all that is asked of the kernel for them, each where this machine gives it:

    limits      CPU seconds, memory, processes, size of a file, open files
    walls       namespaces: no network, no process but its own to see or to signal, and for files a
                tree in memory that holds the standard library, read-only, and an empty folder
    a user      with no rights, where the caller is root
    a filter    of system calls: no sockets, processes, signals to others, tracing, shared memory.
                Where there are no walls: no writing of files either

    pids = enter_walls(pipe)                   # once, by the worker; OSError: there are no walls
    program = filter_program(writing=True)     # once; OSError: the tables below lack this machine
    missing = hold(limits, user, folder, pids is not None, program)    # in each process of a job

Left out of the usual recipe: libseccomp and bubblewrap. They would have to be installed first, and
what is needed of them is the tables and the few calls below. This file imports nothing of ours.
"""
import ctypes
import errno
import functools
import os
import platform
import signal
import struct
import sys

try:
    import resource
except ImportError:                  # Windows: no limits, so no sandbox, which says so
    resource = None


# --------------------------------------------------------------------------------------------------
# what a process gives up

def hold(limits, user, folder, walled, program):
    """
    this process gives up what it can give up -> what it could not. user: a number that belongs to
    nobody, or None where there are no rights to give up. folder: its own, the current one from now
    on; None: it needs none. walled: are there walls around it? program: the filter, if there is
    one.
    """
    missing = []

    def step(what, function, *args):
        try:
            function(*args)
        except (OSError, ValueError, AttributeError) as e:
            missing.append(f"{what} ({getattr(e, 'strerror', None) or e})")

    step("a session of its own", os.setsid)
    step("a folder of its own", move, folder, limits.folder if walled else None)
    step("a limit on CPU time", limit, resource.RLIMIT_CPU, limits.cpu)
    step("a limit on memory", limit, resource.RLIMIT_AS, limits.memory)
    step("a limit on the size of files", limit, resource.RLIMIT_FSIZE, limits.file)
    step("a limit on open files", limit, resource.RLIMIT_NOFILE, limits.files)
    step("a limit on core dumps", limit, resource.RLIMIT_CORE, 0)
    if user is not None:
        step("a user without rights", become, user)
    step("a limit on processes", limit, resource.RLIMIT_NPROC, limits.processes)
    if sys.platform == "linux":
        step("no capabilities", drop_capabilities)
        step("an end with its parent's", call, "prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        step("memory that nobody traces", call, "prctl", DUMPABLE, 0, 0, 0, 0)
        step("no new privileges", call, "prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if program:
        step("a filter of system calls", install, program)
    return missing


def move(folder, size):
    """into its folder. size: its bytes, if it is to be in memory, and gone with its last process"""
    if folder and size is not None:
        call("unshare", NEW_MOUNTS)
        mount("tmpfs", folder, "tmpfs", NO_SUID_DEVICES_PROGRAMS, f"size={size},nr_inodes=1000,mode=777")
    os.chdir(folder or "/")


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

def enter_walls(pipe):
    """
    Goes on in a child that is process 1 of its own namespaces; this process waits for it and ends
    with it. A user without rights gets them from a namespace of users, in which he is root and
    alone.
    """
    user = os.geteuid()
    users = {"setgroups": "deny", "uid_map": f"0 {user} 1", "gid_map": f"0 {os.getegid()} 1"}
    call("unshare", NEW_PIDS | NEW_NETWORK | NEW_MOUNTS | NEW_IPC | (NEW_USER if user else 0))
    for name, line in users.items() if user else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(line)
    pid = os.fork()
    if pid:
        os.close(pipe)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) & 0xFF)
    call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    pids = os.open("/proc/self/ns/pid", os.O_RDONLY)
    build_tree()
    return pids


def build_tree():
    """
    Replaces all files by a tree in memory: the standard library, where it was, and an empty /tmp.
    The new tree is built upon /proc, the one folder that holds nobody's library, and becomes the
    root.
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
        for packages in ("site-packages", "dist-packages"):  # may hold data sets with their answers
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
    "socket": (41, 198), "fork": (57, None), "vfork": (58, None), "execve": (59, 221),
    "execveat": (322, 281),
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
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "add_key": (248, 217),
    "request_key": (249, 218), "keyctl": (250, 219), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    # the kernel's own works
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "chroot": (161, 51), "pivot_root": (155, 41), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241),
    "userfaultfd": (323, 282), "personality": (135, 92), "open_by_handle_at": (304, 265),
    "init_module": (175, 105), "finit_module": (313, 273), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224),
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
    "fsetxattr": (190, 7), "setxattrat": (463, 463), "removexattr": (197, 14),
    "lremovexattr": (198, 15), "fremovexattr": (199, 16), "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}
NO_SUCH_CALL = {                     # their flags lie in memory: libc then takes the older call
    "clone3": (435, 435), "openat2": (437, 437),
}
# name: (numbers, which argument decides, how, the values that it is compared with, is it allowed then?)
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
