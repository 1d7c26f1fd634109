"""
sharded.py: ZeRO-2. No rank holds a whole fp32 gradient.

A bucket whose gradients are complete is summed over the ranks of this machine, each keeping its part,
while the backward goes on. Machines meet once, at the step: a network between them is slow.

    backward   ... gate_up.grad  out.grad  qkv.grad ...        of this rank's row
    beside it  ...   reduce-scatter      reduce-scatter ...    += this rank's part of the sums

Buckets go in one order on all ranks, and all of them go once per micro-batch: ranks run equally many
micro-batches, or they would wait for each other for ever. Left out of the usual recipe: DDP's reducer,
whose buckets hold copies of all gradients, and FSDP, which moves weights: sampler and trainer share them
here, at addresses that never change.
"""

import atexit
import functools
import os
from collections import deque
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F

BUCKET = 1 << 24  # numbers that travel in one collective: 64 MB of fp32

# torch 2.13 gave them new names, and warns of the old ones
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def local_ranks(world, unsaid=None):
    """The ranks of a machine, as torchrun says it, or `unsaid` where nobody does, or all. A machine for
    each rank, or machines of unequal size, count as one."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", unsaid or world))
    return world if world % local or local == 1 else local


@functools.cache
def machines(rank, world):
    """-> (machines, ranks of each, group of this machine, group of the ranks that have this one's place
    on every machine). Nobody else keeps the groups: one that lives longer than the process group hangs
    the interpreter at its end."""
    local = local_ranks(world)
    if local == world:
        return 1, world, None, None
    count = world // local
    atexit.register(machines.cache_clear)
    inside = [dist.new_group(range(n * local, (n + 1) * local)) for n in range(count)]
    across = [dist.new_group(range(place, world, local)) for place in range(local)]
    return count, local, inside[rank // local], across[rank % local]


class Bucket:
    """Gradients that are reduced together: tensors of AdamW, or one matrix of Muon."""

    def __init__(self, shards, count, local):
        self.shards = shards
        self.owner = shards[0].owner               # a rank, or None: AdamW
        # of one machine's part of a tensor: a slice for each rank in this one's place, padded to one
        # width, machine after machine
        self.widths = [max(end - start for start, end in s.ranges) for s in shards]
        self.numbers = sum(self.widths) * (1 if self.owner is not None else count)
        self.place = None if self.owner is None else self.owner % local
        self.sums = None
        self.fresh = True                          # nothing is in the sums yet


class Sharded:
    """The buckets of a model, and where the micro-batch that is being made has come to."""

    def __init__(self, shards, rank, world, device, host):
        self.rank = rank
        self.device = device
        self.host = host
        self.world = world
        self.count, self.local, _, _ = machines(rank, world)
        self.buckets = [Bucket(group, self.count, self.local) for group in backwards(shards)]
        self.side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.flying = deque()                      # (event, what must live until then), on the side
        self._begin()

    @property
    def inside(self):
        return machines(self.rank, self.world)[2]

    @property
    def across(self):
        return machines(self.rank, self.world)[3]

    def mine(self, bucket):
        """Does this rank keep sums of it?"""
        return bucket.place in (None, self.rank % self.local)

    def _begin(self):
        self.next = 0                              # the bucket that goes next
        self.arrived = set()                       # names of the gradients of this micro-batch

    def arrive(self, name):
        """A gradient is complete."""
        self.arrived.add(name)
        while self.next < len(self.buckets):
            bucket = self.buckets[self.next]
            if not all(s.name in self.arrived for s in bucket.shards):
                return
            self._go(bucket)

    def flush(self):
        """The micro-batch is over: what got no gradient is zero."""
        while self.next < len(self.buckets):
            self._go(self.buckets[self.next])
        self._begin()

    def _go(self, bucket):
        self.next += 1
        if bucket.sums is None and self.mine(bucket):
            bucket.sums = torch.empty(bucket.numbers, device=self.device)
        grads = []
        for s in bucket.shards:
            grads.append(torch.zeros_like(s.param) if s.param.grad is None else s.param.grad)
            s.param.grad = None
        with self._aside(grads):
            if bucket.owner is None:
                self._scatter(bucket, grads)
            else:
                self._reduce(bucket, grads[0].reshape(-1))
        bucket.fresh = False

    @contextmanager
    def _aside(self, held):
        """On a stream beside the backward. Two buckets at most are on their way: a host that runs
        ahead would collect a whole gradient."""
        if self.side is None:
            yield
            return
        while len(self.flying) > 1:
            event, _ = self.flying.popleft()
            event.synchronize()
        self.side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.side):
            yield
            event = torch.cuda.Event()
            event.record(self.side)
        self.flying.append((event, held))

    def _scatter(self, bucket, grads):
        """In pieces: only one of them is ever there in fp32."""
        rows = [self._rows(grad, width) for grad, width in zip(grads, bucket.widths)]
        sent = rows[0] if len(rows) == 1 else torch.cat(rows, 1)     # (ranks of this machine, numbers)
        for start, piece in pieces(sent, BUCKET // self.local):
            piece = piece.float().contiguous()
            got = torch.empty_like(piece[0])
            reduce_scatter(got, piece.view(-1), group=self.inside)
            self._add(bucket, start, got)

    def _rows(self, grad, width):
        """(ranks of this machine, machines x width): row r is what the ranks in place r own."""
        flat = grad.reshape(-1)
        short = self.count * self.local * width - len(flat)
        if short:
            flat = F.pad(flat, (0, short))
        return flat.view(self.count, self.local, width).transpose(0, 1).reshape(self.local, -1)

    def _reduce(self, bucket, flat):
        machine = self.rank // self.local * self.local
        for start, piece in pieces(flat, BUCKET):
            piece = piece.float()                  # fp32: the gradient itself, which nobody needs again
            dist.reduce(piece, machine + bucket.place, group=self.inside)
            if self.mine(bucket):
                self._add(bucket, start, piece)

    def _add(self, bucket, start, x):
        part = bucket.sums[start : start + len(x)]
        if self.host:
            self.host.add(part, x, bucket.fresh)
        elif bucket.fresh:
            part.copy_(x)
        else:
            part.add_(x)

    # --- at the step

    def finish(self):
        """Every shard gets the sum of its gradient."""
        if any(s.param.grad is not None for bucket in self.buckets for s in bucket.shards):
            self.flush()
        self.wait()
        for bucket in self.buckets:
            if not self.mine(bucket):
                continue
            if bucket.fresh:                       # there was no micro-batch
                sums = torch.zeros(sum(bucket.widths), device="cpu" if self.host else self.device)
            else:
                sums = self._over_machines(bucket)
            for s, part in zip(bucket.shards, sums.split(bucket.widths)):
                s.grad = part[: s.size]
            self._empty(bucket)

    def wait(self):
        if self.side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.side)
            self.flying.clear()
        if self.host:
            self.host.settle()

    def _over_machines(self, bucket):
        if self.count == 1:
            return bucket.sums
        sums = bucket.sums.to(self.device)
        if bucket.owner is not None:
            dist.reduce(sums, bucket.owner, group=self.across)
            return sums.to(bucket.sums.device)
        parts = sums.split([self.count * width for width in bucket.widths])
        sent = torch.cat([part.view(self.count, -1) for part in parts], 1)       # (machines, numbers)
        got = torch.empty_like(sent[0])
        reduce_scatter(got, sent.view(-1), group=self.across)
        return got.to(bucket.sums.device)

    def _empty(self, bucket):
        bucket.fresh = True
        if not self.host:
            bucket.sums = None

    def forget(self):
        self.wait()
        self._begin()
        for bucket in self.buckets:
            self._empty(bucket)


def backwards(shards):
    """Shards in the order in which a backward completes their gradients, in buckets: tensors of AdamW
    together, as many as fit, and each matrix of Muon by itself."""
    found = []
    small = []
    for s in reversed(shards):
        if s.muon:
            found.append([s])
            continue
        full = sum(other.param.numel() for other in small) + s.param.numel() > BUCKET
        if small and (full or small[0].param.dtype != s.param.dtype):
            found.append(small)
            small = []
        small.append(s)
    return found + [small] if small else found


def pieces(x, width):
    """Along the last dimension -> (where it starts, piece)."""
    start = 0
    for piece in x.split(width, -1):
        yield start, piece
        start += piece.shape[-1]
