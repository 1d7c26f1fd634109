"""
offload.py: what a small card keeps on the host.

    gradient   card -> a pinned buffer -> added to its fp32 sum by a thread    while the backward runs
    weight     its fp32 master, rounded -> a pinned buffer -> card, in place   while the next is updated
    block      of a reference or a teacher: on the host, or a share on each rank; whole for its forward

Sums, masters and moments never leave the host: 16 bytes per parameter there, and none on the card. Left
out of the usual recipe: an optimizer in C++, and asking the user how many buffers he wants. On a CPU
the same lines run, with second buffers in the place of the card's, so tests reach all but the streams.
"""

import contextlib
import os
import queue
import threading
import weakref
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

GB = 1e9
BUFFER = 1 << 24         # bytes of a pinned buffer: large enough for a copy to run at full speed
BUFFERS = 4              # two on their way, one being added, one to spare
PAGE = 4096              # bytes of the host's memory that are page-locked together

# -----------------------------------------------------------------------------
# memory of the host


def host_free():
    """-> bytes that this machine or its container still has; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    for limit, used in (("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
                        ("/sys/fs/cgroup/memory/memory.limit_in_bytes",
                         "/sys/fs/cgroup/memory/memory.usage_in_bytes")):
        try:
            found.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):      # another version of cgroups, or no limit
            continue
    return min(found, default=None)


def expect_room(numbers):
    """Refuses an offload that this host has no memory for. numbers: fp32, of one rank."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    free = host_free()
    need = 4 * numbers * ranks
    if free is not None and need > free:
        raise ValueError(f"--offload needs {need / GB:.1f} GB of this host's memory (masters, moments and "
                         f"sums of gradients of {ranks} ranks), and {free / GB:.1f} GB are free: take a "
                         "smaller model, more hosts, or leave --offload out")


def pinned(owner, numbers, device):
    """-> fp32 numbers on the host, page-locked as long as their owner lives. torch's own pin_memory
    rounds up to a power of two: up to twice the memory."""
    if device.type != "cuda" or not numbers:
        return torch.zeros(numbers)
    # whole pages of its own: a page that two rooms share cannot be locked for both
    locked = -(-4 * numbers // PAGE) * PAGE
    room = torch.zeros((locked + PAGE) // 4)
    room = room[-room.data_ptr() % PAGE // 4 :][:numbers]
    cudart = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(room.data_ptr(), locked, 1))              # 1: portable
    if code == 0:
        weakref.finalize(owner, lambda: cudart.cudaHostUnregister(room.data_ptr()))
    else:                                  # only the buffers have to be: it works, and as fast
        forget_error(device)
        print(f"offload: the host does not pin {room.nbytes / GB:.1f} GB (CUDA error {code}), "
              "which stay pageable", flush=True)
    return room


def forget_error(device):
    """A call of CUDA's runtime that failed leaves its error behind, and this thread's next kernel,
    whatever that is, would raise it: an addition that may fail takes it away."""
    with contextlib.suppress(RuntimeError):
        torch.zeros(1, device=device).add_(1)


# -----------------------------------------------------------------------------
# the way between card and host


class Host:
    """
    Copies between a device and tensors on the host, through a few pinned buffers and on a stream of
    their own. One thread waits for the copies and adds: in the order of add(), so that sums are
    the same every time.
    """

    def __init__(self, device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.buffers = queue.SimpleQueue()
        for _ in range(BUFFERS):
            self.buffers.put(torch.empty(BUFFER, dtype=torch.uint8, pin_memory=self.stream is not None))
        self.jobs = queue.SimpleQueue()
        self.failed = []
        work = self.jobs, self.buffers, self.failed, device
        threading.Thread(target=work_off, args=work, name="offload", daemon=True).start()
        weakref.finalize(self, self.jobs.put, None)    # the thread knows the queues, never this object

    def room(self, numbers):
        """-> fp32 zeros on the host."""
        expect_room(numbers)
        return pinned(self, numbers, self.device)

    def add(self, total, x, first=False):
        """total += x, or total = x if it is the first; done when settle() returns. x is kept until its
        copy is out. Waits only if the host has fallen behind by all buffers."""
        size = BUFFER // x.element_size()
        for piece, into in zip(x.split(size), total.split(size)):
            buffer = self.buffers.get()
            there = buffer[: piece.nbytes].view(x.dtype)
            event = self._copy(there, piece)
            self.jobs.put((event, buffer, into, there, first, piece))

    def bring(self, weight, master):
        """weight = master, rounded; on the device when settle() returns."""
        size = BUFFER // weight.element_size()
        for into, piece in zip(weight.split(size), master.split(size)):
            buffer = self.buffers.get()
            there = buffer[: into.nbytes].view(weight.dtype)
            there.copy_(piece)
            event = self._copy(into, there)
            self.jobs.put((event, buffer, None, there, False, into))

    def _copy(self, into, x):
        """-> an event behind the copy; None where it is done."""
        if self.stream is None:
            into.copy_(x)
            return None
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            into.copy_(x, non_blocking=True)
            event = torch.cuda.Event(blocking=True)      # the thread that waits for it sleeps
            event.record(self.stream)
        return event

    def settle(self):
        """Until every copy has arrived and every sum is whole: then all buffers are back."""
        for buffer in [self.buffers.get() for _ in range(BUFFERS)]:
            self.buffers.put(buffer)
        if self.failed:
            raise self.failed.pop()


def work_off(jobs, buffers, failed, device):
    """The thread: waits for a copy, adds, hands the buffer back. A failure is raised by settle()."""
    torch.set_flush_denormal(True)         # of this thread; start() sets it for the main one
    if device.type == "cuda":              # or every rank's thread would take memory of the first GPU
        torch.cuda.set_device(device)
    while job := jobs.get():
        event, buffer, total, there, first, kept = job
        try:
            if event is not None:
                event.synchronize()
            if total is not None and first:
                total.copy_(there)
            elif total is not None:
                total.add_(there)
        except Exception as why:
            failed.append(why)
        finally:
            del job, total, there, kept    # or a gradient would live until the next job comes
            buffers.put(buffer)


# -----------------------------------------------------------------------------
# a model that only scores: a reference, a teacher


def place_blocks(model, where, env):
    """
    -> the model, never trained, with its blocks where they are to live. Embedding, head and last norm
    are on the device in any case, and a block is there for as long as its forward takes.

        device     all of it, all the time
        host       every block is copied for every row: 2 bytes per parameter in bf16
        sharded    each rank holds a share of every tensor, and all ranks gather it for every row
    """
    for name, child in model.named_children():
        if name != "blocks" or where == "device":
            child.to(env.device)
    for block in model.blocks if where != "device" else ():
        for p in block.parameters():
            p.home = at_home(model, p.data, where, env)
            p.whole = p.shape
            p.data = p.home
        block.register_forward_pre_hook(lambda block, args: visit(block, env))
        block.register_forward_hook(lambda block, args, out: leave(block))
    return model


def at_home(model, x, where, env):
    if where == "sharded":
        return share_of(x, env).to(env.device, copy=True)
    if env.device.type == "cpu":
        return x
    room = pinned(model, -(-x.nbytes // 4), env.device).view(x.dtype)
    return room[: x.numel()].view(x.shape).copy_(x)


def share_of(x, env):
    """This rank's part of a tensor, flat."""
    flat = F.pad(x.flatten(), (0, -x.numel() % env.world))
    return flat.view(env.world, -1)[env.rank]


def visit(block, env):
    for p in block.parameters():
        p.data = fetched(p, env)


def leave(block):
    for p in block.parameters():
        p.data = p.home


def fetched(p, env):
    """-> a tensor whole, on the device."""
    if not hasattr(p, "home"):
        return p.data
    if p.home.shape == p.whole:
        return p.home.to(env.device, non_blocking=True)
    parts = [p.home]
    if env.world > 1:
        parts = [torch.empty_like(p.home) for _ in range(env.world)]
        dist.all_gather(parts, p.home)
    return torch.cat(parts)[: p.whole.numel()].view(p.whole)


def state_of(model, env):
    """-> its state dict, whole, on the host. Where it is sharded every rank calls this."""
    return {name: fetched(p, env).cpu() for name, p in model.named_parameters()}


@torch.no_grad()
def load_state(model, state, env):
    """Takes a state dict, wherever the model lives."""
    if env.device.type == "cuda":          # the last forward's copies may still read them
        torch.cuda.synchronize(env.device)
    for name, p in model.named_parameters():
        home = getattr(p, "home", p.data)
        there = state[name] if home.shape == state[name].shape else share_of(state[name], env)
        home.copy_(there)
