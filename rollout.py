"""
rollout.py: the sampler. A KV cache, continuous batching, the log-prob of every token kept; it reads the trainer's own weights.

Most of the time of RL is spent here. A step appends one token to every live row; finished rows leave at once, waiting
prompts enter. The model sees one flat row of tokens, as always: only `attend` knows that there is a cache.

    submit -> waiting -> prefill (a prompt once, for all its samples) -> live rows -> step, step, step -> Sample

Deleted from the usual recipe, and why:
- no second engine and no weight sync: the tensors read here are the ones the optimizer writes;
- no padding: a row costs what its own length costs, and nothing after its last token;
- no random state: the uniform number of a token is a hash of (seed, visit, problem, index, position), so slots, batches,
  ranks, preemption and restarts never change the noise.

    python rollout.py --model runs/base --prompt "C3 7 12=43:"
    python rollout.py --model DIR --prompt "..." --n 8 --temperature 0.7 --top-p 0.95
    python rollout.py --model DIR --chat
"""

import math
import pickle
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import count, islice
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from common.run import FEW, ONE, die, flags, progress, start
from kernels import address, continued_attention, decode_attention, draw, linear_logits, packed_attention, picked, uniform_at

NAN = math.nan
calls = count()                          # of stream() in this process; ranks make the same calls, so it names a shared counter


@dataclass
class Sample:
    prompt: list[int]
    tokens: list[int]                    # ends with the stop token that was sampled, and it is trained
    logprobs: list[float]                # log pi when sampled, tempered full softmax; nan = forced token, not trained
    finished: str                        # "stop" | "length" | "aborted"
    problem: int
    index: int
    visit: int                           # problem, index and visit are the address of its randomness
    kept: list[float] | None = None      # with top-p/top-k: log of the probability mass that survived truncation
    reward: float = NAN
    advantage: float | list[float] = NAN


# -----------------------------------------------------------------------------
# accounting: the slots of the batch and the pages of the GPU's pool are both counted by this


class Pages:
    """`total` things: taken one at a time, shared by reference count, free when the last owner lets go."""

    def __init__(self, total):
        self.owners, self.unowned = [0] * total, list(reversed(range(total)))

    @property
    def left(self):
        return len(self.unowned)

    def take(self):
        page = self.unowned.pop()
        self.owners[page] = 1
        return page

    def share(self, page):
        assert self.owners[page], f"page {page} is nobody's: it cannot be shared"
        self.owners[page] += 1
        return page

    def free(self, page):
        assert self.owners[page], f"page {page} is freed twice"
        self.owners[page] -= 1
        if not self.owners[page]:
            self.unowned.append(page)


@dataclass(eq=False)
class Prefix:
    """Tokens that rows go on from: a prompt, or a prompt and the tokens to resume. `cache` is the storage's."""
    tokens: list[int]
    done: int = 0                        # keys computed so far: long prefixes are computed in chunks
    hidden: torch.Tensor | None = None   # of the last token, when all are
    cache: object = None


@dataclass(eq=False)
class Group:
    """One submit()."""
    problem: int
    prompt: list[int]
    max_new: int
    seed: int
    visit: int
    temperature: float
    top_p: float
    top_k: int
    stop_strings: tuple
    unborn: int                          # its rows that wait
    prefix: Prefix | None = None         # the prompt's keys, kept until the last row has entered


@dataclass(eq=False)
class Row:
    group: Group
    index: int
    tokens: list[int] = field(default_factory=list)        # those from before it entered: forced, resumed or preempted
    logprobs: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    prefix: Prefix | None = None         # its own, if it has such tokens
    slot: int = -1
    born: int = -1                       # order of entry: the youngest is preempted first
    count: int = 0                       # tokens at the last arrangement of the batch
    tail: int = 0                        # stop strings: tokens looked at so far

    @property
    def keys(self):                      # in the cache: the last token's key is stored by the step that reads the token
        return len(self.group.prompt) + self.count - 1


def causal(queries, keys, device):
    """The mask of the last `queries` of `keys` positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


# -----------------------------------------------------------------------------
# the prompts of a call, dealt to the ranks. Repeatable: in turn. Otherwise each takes the next one from a counter that all share; and
# when that has run out, a rank without rows asks, and gets half of the groups of one that has several. Noise is addressed, so a sample
# goes on anywhere: its tokens travel, its keys are computed again.
#
#   taken 256   prompts               ended 251    of them, groups that need nothing more: when all have ended nobody waits any longer
#   asked 3     ranks with no rows    given 2      parcels from busy ranks: whoever is without rows takes one that nobody has taken,
#                                                  were it its own, so that a rank may leave while others wait


PIECE = 1 << 22                          # bytes: a store breaks the connection over a value of more than 8 MB


class Deal:
    """An iterator over the prompts that this rank samples, and the store where ranks meet. No store: each `world`-th, and no parcels."""

    def __init__(self, order, store=None, name="", rank=0, world=1):
        self.order, self.store, self.name, self.asking, self.seen = order, store, name, False, set()     # seen: numbers of parcels
        self.turns = iter(order[rank::world])

    def count(self, what, n):
        return self.store.add(f"{self.name}/{what}", n)

    def __iter__(self):
        return self

    def __next__(self):
        if self.store is None:
            return next(self.turns)
        at = self.count("taken", 1) - 1
        if at >= len(self.order):
            raise StopIteration
        return self.order[at]

    def end(self, n=1):
        """So many of this rank's groups need nothing more."""
        if self.store is not None and n:
            self.count("ended", n)

    def asked(self):
        return self.store is not None and self.count("given", 0) < self.count("asked", 0)

    def give(self, groups):
        whole, key = pickle.dumps(groups), f"{self.name}/parcel/{self.count('given', 1)}"
        pieces = range(0, len(whole), PIECE)
        for i, at in enumerate(pieces):
            self.store.set(f"{key}/{i}", whole[at : at + PIECE])
        self.store.set(key, str(len(pieces)))

    def take(self):
        """-> the groups of a parcel that nobody has taken, or []."""
        for number in range(1, self.count("given", 0) + 1) if self.store is not None else ():
            key = f"{self.name}/parcel/{number}"
            if number not in self.seen and self.store.check([key]):
                self.seen.add(number)
                if self.store.add(f"{key}/takers", 1) == 1:
                    pieces = [f"{key}/{i}" for i in range(int(self.store.get(key)))]
                    groups = pickle.loads(b"".join(self.store.get(piece) for piece in pieces))
                    for piece in pieces:                         # or the store would grow with every call
                        self.store.delete_key(piece)
                    return groups
        return []

    def ask(self):
        """-> the groups that came, none as yet: [], or None: there is nothing left to wait for."""
        if self.store is None:
            return None
        if not self.asking:
            self.asking = self.count("asked", 1) > 0
        if groups := self.take():
            self.asking = False
            return groups
        return [] if self.count("ended", 0) < len(self.order) else None


# -----------------------------------------------------------------------------
# storage on a CPU: a slab per capacity, 64, 128, 256, ... keys a row; a full row moves to the slab of twice the size
#
#   slab 64    [row][row][row]            rows stand side by side from 0, so a slab is one product per layer over [:rows, :longest]:
#   slab 128   [ row  ][ row  ]           no gathering, and a long row does not make the short ones pay; what moving costs is
#   slab 256   [    row     ]             paid back as in any array that doubles


class Slab:
    def __init__(self, capacity, c, like):
        self.capacity, self.c, self.like, self.size = capacity, c, like, 0
        self.slots, self.k, self.v, self.mask = [], [None] * c.n_layer, [None] * c.n_layer, None

    def add(self, slot, length):
        """-> its row, whose first `length` keys are visible; the caller fills them in."""
        r, c = len(self.slots), self.c
        if r + 2 > self.size:            # twice the rows; never one row alone, see decode()
            size = max(4, 2 * self.size)

            def bigger(old, fill, *shape):
                new = self.like.new_full((size, c.n_kv_head, *shape), fill)
                if old is not None:
                    new[: self.size] = old
                return new
            self.k = [bigger(k, 0.0, self.capacity, c.head_dim) for k in self.k]
            self.v = [bigger(v, 0.0, self.capacity, c.head_dim) for v in self.v]
            self.mask = bigger(self.mask, -math.inf, 1, self.capacity)            # added to the scores: 0 on a row's keys
            self.size = size
        self.slots.append(slot)
        self.mask[r] = -math.inf
        self.mask[r, :, :, :length] = 0
        return r

    def remove(self, r, length):
        """The last row fills the hole. -> the slot that moved, or None."""
        last = len(self.slots) - 1
        slot = self.slots.pop()
        if r == last:
            return None
        for x in (*self.k, *self.v):
            x[r, :, :length] = x[last, :, :length]
        self.mask[r] = self.mask[last]
        self.slots[r] = slot
        return slot


class Slabs:
    smallest, horizon = 64, 1            # horizon: steps between two looks at what has ended; a look costs nothing here

    def __init__(self, c, like, exact):
        self.c, self.like, self.exact, self.slabs, self.at = c, like, exact, {}, {}      # at: slot -> (slab, row)

    def open(self, prefix, parent=None):
        c, P = self.c, len(prefix.tokens)
        prefix.cache = self.like.new_empty(2, c.n_layer, c.n_kv_head, P, c.head_dim)
        if parent:
            prefix.done = parent.done
            prefix.cache[:, :, :, : parent.done] = parent.cache
        return True

    def close(self, prefix):
        prefix.cache, prefix.done, prefix.hidden = None, 0, None

    def prefill(self, pieces):
        """pieces: (prefix, start, end), one after another in the row. -> attend"""
        cu = [0]
        for _, a, b in pieces:
            cu.append(cu[-1] + b - a)
        # exact: each prefix by itself, since a call over several may sum in an order that depends on all of them
        together = None if self.exact or any(a for _, a, _ in pieces) else packed_attention(cu, max(b - a for _, a, b in pieces))

        def attend(layer, q, k, v):
            for (prefix, a, b), s, e in zip(pieces, cu, cu[1:]):
                prefix.cache[0, layer, :, a:b] = k[s:e].transpose(0, 1)
                prefix.cache[1, layer, :, a:b] = v[s:e].transpose(0, 1)
            if together:
                return together(layer, q, k, v)
            o = torch.zeros_like(q)
            for (prefix, a, b), s, e in zip(pieces, cu, cu[1:]):
                k_b, v_b = prefix.cache[:, layer, None, :, :b]                     # (1, kv heads, b, hd)
                o[s:e] = F.scaled_dot_product_attention(
                    q[s:e].transpose(0, 1).unsqueeze(0), k_b, v_b, is_causal=a == 0, enable_gqa=q.shape[1] != k.shape[1],
                    attn_mask=causal(b - a, b, q.device) if a else None).squeeze(0).transpose(0, 1)
            return o
        return attend

    def _slab(self, keys):
        capacity = self.smallest
        while capacity < keys:
            capacity *= 2
        if capacity not in self.slabs:
            self.slabs[capacity] = Slab(capacity, self.c, self.like)
        return self.slabs[capacity]

    def enter(self, prefix, slot, live):
        P = len(prefix.tokens)
        slab = self._slab(P + 1)
        r = slab.add(slot, P)
        for layer, (k, v) in enumerate(zip(slab.k, slab.v)):
            k[r, :, :P], v[r, :, :P] = prefix.cache[0, layer], prefix.cache[1, layer]
        self.at[slot] = slab, r
        return True

    def leave(self, slot):
        slab, r = self.at.pop(slot)
        moved = slab.remove(r, slab.capacity)
        if moved is not None:
            self.at[moved] = slab, r

    def grow(self, row):
        """Room for one more key."""
        slab, r = self.at[row.slot]
        if row.keys + 1 > slab.capacity:
            bigger = self._slab(row.keys + 1)
            to = bigger.add(row.slot, row.keys)
            for old, new in zip((*slab.k, *slab.v), (*bigger.k, *bigger.v)):
                new[to, :, : slab.capacity] = old[r]
            self.leave(row.slot)
            self.at[row.slot] = bigger, to
        return True

    def row(self, slot):
        """-> its keys and its values, an array a layer."""
        slab, r = self.at[slot]
        return [k[r].numpy() for k in slab.k], [v[r].numpy() for v in slab.v]

    def decode(self, rows, pad):
        """-> the rows' slots in the order of the batch; begin(position_B), attend; and for how many steps this holds."""
        c, order, parts, lasts = self.c, [], [], math.inf
        rows = {row.slot: row for row in rows}
        for _, slab in sorted(self.slabs.items()):
            n = len(slab.slots)
            if n:
                longest = max(rows[slot].keys for slot in slab.slots)
                lasts = min(lasts, slab.capacity - longest)
                first = torch.arange(n * c.n_kv_head, device=self.like.device).mul_(slab.capacity).view(n, c.n_kv_head)
                parts.append(SimpleNamespace(slab=slab, n=n, kv=n * c.n_kv_head, s=slice(len(order), len(order) + n), longest=longest,
                                             first=first, L=0, write=None))
                order += slab.slots
        B, group, scale = len(order), c.n_head // c.n_kv_head, c.head_dim**-0.5
        rest = self.like.new_zeros(pad - B, c.n_head, c.head_dim) if pad > B else None

        def begin(position_B):
            for p in parts:
                p.longest += 1
                if p.write is None:      # where this token's key goes: (n * kv heads), and the next one behind it
                    p.write = (p.first + position_B[p.s].unsqueeze(1)).view(-1)
                else:
                    p.write += 1
                p.slab.mask.view(-1).index_fill_(0, p.write, 0.0)
                # exact: a length that depends on the row alone, its slab's; at least two products, for a lone one is another routine
                L = p.slab.capacity if self.exact else min(p.slab.capacity, -(-p.longest // 32) * 32)
                if L != p.L:
                    p.L, p.N = L, max(p.kv, 2 if self.exact else 1)
                    flat = lambda x: x.flatten(0, 1)[: p.N, :, :L] if x.shape[2] == 1 else x.flatten(0, 1)[: p.N, :L]  # noqa: B023, E731
                    p.mask = flat(p.slab.mask)                                   # (N, 1, L)
                    p.keys = [flat(k).transpose(1, 2) for k in p.slab.k]         # (N, hd, L)
                    p.values = [flat(v) for v in p.slab.v]                       # (N, L, hd)
                    p.k = [k.view(-1, c.head_dim) for k in p.slab.k]
                    p.v = [v.view(-1, c.head_dim) for v in p.slab.v]

        def attend(layer, q, k, v):
            outs = []
            for p in parts:
                q_p, k_p, v_p = (q, k, v) if p.n == q.shape[0] else (q[p.s], k[p.s], v[p.s])
                p.k[layer].index_copy_(0, p.write, k_p.reshape(-1, c.head_dim))
                p.v[layer].index_copy_(0, p.write, v_p.reshape(-1, c.head_dim))
                q_NGd = q_p.reshape(-1, group, c.head_dim)                        # a key head and the query heads that share it
                if p.kv < p.N:
                    q_NGd = torch.cat((q_NGd, q_NGd))
                s_NGL = torch.baddbmm(p.mask, q_NGd, p.keys[layer], alpha=scale).softmax(-1)
                o = torch.bmm(s_NGL, p.values[layer])                             # (N, group, hd)
                outs.append((o[: p.kv] if p.kv < p.N else o).view(p.n, c.n_head, c.head_dim))
            if rest is not None:
                outs.append(rest)
            return outs[0] if len(outs) == 1 else torch.cat(outs)

        return order, begin, attend, lasts


# -----------------------------------------------------------------------------
# storage on a GPU: a pool of small pages, sized once and never freed, and a table of page numbers per row
#
#   prompt of 40 tokens, pages of 16, two samples       row 0   [3][7][12][20]        pages 3 and 7 are full: both rows share them
#                                                       row 1   [3][7][15]            12 and 15: the prompt's last 8 keys, copied


PAGE = 32                                # a row wastes half a page, and a shared one is rarely copied


class Pool:
    horizon = 8                          # steps between two looks at what has ended: a look makes the GPU wait; the overrun is cut

    def __init__(self, c, dtype, device, slots, max_len, pages=None, page=None):
        self.page = page = page or (256 if picked("decode", device.type) == "flash" else PAGE)       # flash-attn reads no others
        self.c, self.device = c, device
        longest = -(-(max_len + self.horizon) // page)
        if pages is None:
            pages = slots * longest + 1
            if device.type == "cuda":    # what an update left free, and some room for prefill
                a_page = 2 * c.n_layer * page * c.n_kv_head * c.head_dim * torch.empty((), dtype=dtype).element_size()
                free = torch.cuda.mem_get_info(device)[0]
                pages = min(pages, int(0.8 * free) // a_page)
                if pages < 5:
                    raise ValueError(f"the GPU has {free / 2**30:.2f} GiB left: no room for keys and values. Take a smaller model")
        self.pages, self.owned = Pages(pages), {}                # slot -> its pages
        self.pages.take()                                        # page 0: where rows that are not alive write
        shape = c.n_layer, pages, page, c.n_kv_head, c.head_dim
        self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in "kv")
        self.table = torch.zeros(slots, longest, dtype=torch.int32, device=device)   # rows in the order of the batch
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self.written = np.zeros((slots, longest), dtype=np.int32), [0] * slots       # of each slot: its pages, and how many are in there
        self.most = (pages - 3) * page - self.horizon            # tokens of the longest sequence that fits alone

    def _fork(self, cache, length):
        """The same keys again: full pages shared, the last partial one copied. Needs one page at most."""
        full = length // self.page
        mine = [self.pages.share(p) for p in cache[:full]]
        if length % self.page:
            mine.append(self.pages.take())
            self.k[:, mine[-1]], self.v[:, mine[-1]] = self.k[:, cache[full]], self.v[:, cache[full]]
        return mine

    def open(self, prefix, parent=None):
        need = -(-len(prefix.tokens) // self.page)
        if self.pages.left < need + 1:
            return False
        prefix.cache = self._fork(parent.cache, parent.done) if parent else []
        prefix.done = parent.done if parent else 0
        while len(prefix.cache) < need:
            prefix.cache.append(self.pages.take())
        return True

    def close(self, prefix):
        for p in prefix.cache:
            self.pages.free(p)
        prefix.cache, prefix.done, prefix.hidden = None, 0, None

    def prefill(self, pieces):
        cu, where = [0], []
        for prefix, a, b in pieces:
            cu.append(cu[-1] + b - a)
            where += [prefix.cache[t // self.page] * self.page + t % self.page for t in range(a, b)]
        where = torch.tensor(where, device=self.device)          # the place of each token of the row in the pool
        if any(a for _, a, _ in pieces):                         # some go on: what they see lies in the pool, their own tokens included
            places, cu_k = [], [0]
            for prefix, _, b in pieces:
                places.append((torch.tensor(prefix.cache).unsqueeze(1) * self.page + torch.arange(self.page)).view(-1)[:b])
                cu_k.append(cu_k[-1] + b)
            places, whole = torch.cat(places).to(self.device), continued_attention(cu, cu_k)
        else:
            places, whole = None, packed_attention(cu, max(b - a for _, a, b in pieces))

        def attend(layer, q, k, v):
            keys, values = self.k[layer].view(-1, *k.shape[1:]), self.v[layer].view(-1, *v.shape[1:])
            keys.index_copy_(0, where, k[: len(where)])
            values.index_copy_(0, where, v[: len(where)])
            if places is None:
                return whole(layer, q, k, v)
            return whole(q, keys.index_select(0, places), values.index_select(0, places))
        return attend

    def enter(self, prefix, slot, live):
        # a page for what is copied, one to go on, and one for each other row, so that who enters is not preempted at once
        if self.pages.left < 2 + live:
            return False
        self.owned[slot] = self._fork(prefix.cache, len(prefix.tokens))
        self.written[0][slot], self.written[1][slot] = 0, 0
        return True

    def leave(self, slot):
        for p in self.owned.pop(slot):
            self.pages.free(p)

    def grow(self, row):
        """Pages for the steps until the next look; False if there are none left."""
        mine = self.owned[row.slot]
        while len(mine) * self.page < row.keys + self.horizon:
            if not self.pages.left:
                return False
            mine.append(self.pages.take())
        return True

    def decode(self, rows, pad):
        order = [row.slot for row in sorted(rows, key=lambda row: row.born)]
        pages, known = self.written
        for slot in order:                                       # only what is new: for long rows, all of it takes longer than a step
            mine = self.owned[slot]
            pages[slot, known[slot] : len(mine)], known[slot] = mine[known[slot] :], len(mine)
        width = max(known[slot] for slot in order)
        table = np.zeros((pad, width), np.int32)
        table[: len(order)] = pages[order, :width]
        self.table[:pad, :width].copy_(torch.from_numpy(table))
        # the whole width in a graph, whose addresses are fixed: kernels read what a row's length says, not the table's width
        return order, *self.steps(pad), self.horizon

    def steps(self, B):
        table_B, lengths_B = self.table[:B], self.lengths[:B]

        def begin(position_B):
            lengths_B.copy_(position_B)

        def attend(layer, q, k, v):
            return decode_attention(q, k, v, self.k[layer], self.v[layer], table_B, lengths_B)
        return begin, attend


# -----------------------------------------------------------------------------
# the sampler

# a column of numbers per slot; the batch holds a copy of its columns, and a step touches only that
TOKEN, POSITION, COUNT, AT, ALIVE, END, ADDRESS, TOP_K = range(8)         # AT: where the next token is written down
TEMPERATURE, TOP_P = range(2)
FAR = 1 << 40
EVERY = 8                                # steps between two looks whether another rank has run out of rows
AHEAD = 8                                # on a CPU uniform numbers are made for so many steps at once
M32 = 0xFFFFFFFF


def graph_sizes(slots):
    """Rows of a CUDA graph: up to the first size that takes them all."""
    sizes = [1, 2, 4, 8, *range(16, slots + 16, 16)]
    return [size for size in sizes if size < slots] + [next(size for size in sizes if size >= slots)]


def columns(now, real, **more):
    """The batch's numbers under their names: views, made once and not in every step."""
    token, position, count, at, alive, end, address, top_k = now.unbind()
    temperature, top_p = real.unbind()
    return SimpleNamespace(now=now, counters=now[POSITION : AT + 1], token=token, position=position, count=count, at=at, alive=alive,
                           end=end, address=address, top_k=top_k, temperature=temperature, top_p=top_p, noise=None, **more)


class Sampler:
    def __init__(self, model, stop, tok=None, slots=None, max_len=None, exact=None, *, paged=None, pages=None, deterministic=None,
                 store=None):
        """slots: rows at a time. exact: on a CPU, tokens do not depend on what else is in the batch. paged, pages: the GPU's
        storage and its size. deterministic: prompts are dealt to ranks round-robin, not taken from a counter in `store`."""
        self.model, self.c, self.tok = model, model.config, tok
        weight = model.head_weight
        self.device, cuda = weight.device, weight.device.type == "cuda"
        for what in ("train", "decode", "fused"):                # a backend proves itself before the first step: not inside a graph
            picked(what, self.device.type)
        bad = [t for t in stop if not 0 <= t < self.c.vocab_size]
        if bad:
            raise ValueError(f"stop id {bad[0]} is outside the vocabulary of {self.c.vocab_size}")
        if max_len is not None and not 2 <= max_len <= self.c.max_len:
            raise ValueError(f"max_len {max_len}: this model takes 2 .. {self.c.max_len} tokens")
        if slots is not None and slots < 1:
            raise ValueError(f"slots {slots}: at least 1")
        self.stop, self.max_len = set(stop), max_len or self.c.max_len
        self.paged = cuda if paged is None else paged
        self.exact = exact is not False and self.device.type == "cpu" and not self.paged
        self.deterministic = not cuda if deterministic is None else deterministic
        self.store, self.expected = store, {}                    # problem -> mean length at its last visit
        self.slots = slots or 256                                # 1M parameters on a CPU: twice the tokens a second of 32 rows
        self.n_pages, self.chunk = pages, 4096 if cuda else 512  # chunk: prompt tokens between two decode steps
        # products of so many rows are all of one kind (see common.run.times) and sum each row in the same order, however many there are
        self.multiple = max(FEW, 4 * torch.get_num_threads()) if self.exact else 1
        # a lone row's steps in numpy: which rounds otherwise than torch, and is slow where each waits for the other's threads
        self.alone = (ONE and not self.exact and not self.paged and self.device.type == "cpu" and weight.dtype == torch.float32
                      and hasattr(model, "alone"))
        self.replayed = cuda                                     # decode steps are CUDA graphs
        if cuda:
            self.sizes = graph_sizes(self.slots)
        else:
            self.sizes = list(range(self.multiple, self.slots + self.multiple, self.multiple))
        self.steps_done, self.entries = 0, count()
        self.reset()

    @torch.inference_mode()
    def reset(self):
        """Forget everything in flight."""
        make = lambda *shape, dtype=torch.int64: torch.zeros(*shape, dtype=dtype, device=self.device)  # noqa: E731
        self.waiting, self.rows, self.ended, self.batch = deque(), {}, [], None      # rows: slot -> Row; ended: not yet handed back
        self.free = Pages(self.slots)
        dtype = self.model.head_weight.dtype
        if not self.paged:
            self.storage = Slabs(self.c, self.model.head_weight, self.exact)     # like: the weights' dtype and device
        elif isinstance(getattr(self, "storage", None), Pool):   # the pool and all below stay where they are: graphs know their address
            self.storage.pages = Pages(len(self.storage.pages.owners))
            self.storage.pages.take()
            self.storage.owned.clear()
            self.storage.k.zero_(), self.storage.v.zero_()
            return
        else:
            self.storage = Pool(self.c, dtype, self.device, self.sizes[-1], self.max_len, self.n_pages)
        # column `slots` is nobody: the rows that fill a product up to its multiple
        pad = self.sizes[-1]
        self.width = self.max_len + self.storage.horizon
        self.ints, self.reals = make(8, self.slots + pad), make(2, self.slots + pad, dtype=torch.float32)
        self.ints[END], self.ints[AT], self.reals[TEMPERATURE], self.reals[TOP_P] = FAR, self.slots * self.width, 1.0, 1.0
        self.now, self.real = self.ints.clone(), self.reals.clone()                  # in the order of the batch
        tokens = (self.slots + 1) * self.width
        self.tokens, self.logprobs, self.kept = make(tokens), *(make(tokens, dtype=torch.float32) for _ in "lk")
        self.is_stop = make(self.c.vocab_size, dtype=torch.bool)
        self.is_stop[list(self.stop)] = True
        self.graphs = {}

    @property
    def live(self):
        """Samples that are not finished, those that wait for a slot included."""
        return len(self.rows) + len(self.waiting) + len(self.ended)

    # --- in

    def _check(self, problem, prompt, n, max_new, temperature, top_p, top_k, stop_strings=()):
        who = f"problem {problem}: "
        if not prompt:
            raise ValueError(who + "the prompt is empty: a model needs a token to go on from")
        if n < 1 or max_new < 1:
            raise ValueError(who + f"n = {n} and max_new = {max_new} must be at least 1")
        if len(prompt) >= self.max_len:
            raise ValueError(who + f"the prompt has {len(prompt)} tokens, and prompt and response together may have {self.max_len}")
        if self.paged and min(self.max_len, len(prompt) + max_new) > self.storage.most:
            raise ValueError(who + f"prompt and max_new are {len(prompt) + max_new} tokens, the pool holds {self.storage.most}: "
                             "lower max_new, or make a Sampler with more pages")
        outside = [t for t in (min(prompt), max(prompt)) if not 0 <= t < self.c.vocab_size]
        if outside:
            raise ValueError(who + f"the prompt has token {outside[0]}, the vocabulary is 0 .. {self.c.vocab_size - 1}")
        if not 0 <= temperature < math.inf:
            raise ValueError(who + f"temperature {temperature}: 0 (greedy) or more, and finite")
        if not 0 < top_p <= 1:
            raise ValueError(who + f"top_p {top_p}: more than 0, at most 1 (1 = off)")
        if top_k < 0:
            raise ValueError(who + f"top_k {top_k}: 0 (off) or more")
        if stop_strings and self.tok is None:
            raise ValueError(who + "stop strings need a tokenizer: Sampler(model, stop, tok)")
        if "" in stop_strings:
            raise ValueError(who + "an empty stop string would stop everything")

    def submit(self, problem_id, prompt, n, max_new, *, seed=0, visit=0, temperature=1.0, top_p=1.0, top_k=0, resume=(), stop_strings=()):
        """n samples of a prompt join the queue. resume: what abort() gave back goes on where it was, under its own index; a plain
        list of tokens is forced on the sample of its place in the list. If n is more, the rest start fresh."""
        self._check(problem_id, prompt, n, max_new, temperature, top_p, top_k, stop_strings)
        if len(resume) > n:
            raise ValueError(f"problem {problem_id}: {len(resume)} samples to resume, n = {n}")
        limit = min(max_new, self.max_len - len(prompt))
        group = Group(problem_id, list(prompt), limit, seed, visit, temperature, top_p, top_k, tuple(stop_strings), n)
        rows = []
        for i, old in enumerate(resume):
            if isinstance(old, Sample):
                rows.append(Row(group, old.index, list(old.tokens), list(old.logprobs), list(old.kept or [0.0] * len(old.tokens))))
            else:
                rows.append(Row(group, i, list(old), [NAN] * len(old), [0.0] * len(old)))
            if len(rows[-1].tokens) >= limit:
                raise ValueError(f"problem {problem_id}: a sample to resume has {len(rows[-1].tokens)} tokens already, "
                                 f"max_new is {limit}")
        taken = {row.index for row in rows}
        rows += [Row(group, i) for i in range(n) if i not in taken][: n - len(rows)]
        self.waiting.extend(rows)

    # --- one step

    @torch.inference_mode()
    def step(self):
        """One token for every live row; then those that wait take the places that became free, and get their first. -> Samples
        that ended."""
        try:
            if self.rows:
                if self.batch is None or self.batch.age >= self.batch.lasts:
                    self._arrange()
                self._advance(self.batch)
                self.batch.age += 1
                self.steps_done += 1
                if self.batch.age % self.storage.horizon == 0:
                    self._look(self.batch)
            if self.waiting and self.free.left:
                self._admit()
        except FloatingPointError as e:
            self.reset()
            raise ValueError(str(e)) from None
        ended, self.ended = self.ended, []
        return ended

    def _advance(self, b):
        if self.replayed:
            self.graphs[b.size, b.truncated].replay()
            return
        if b.age % AHEAD == 0:
            b.noise = uniform_at(b.address, b.count + torch.arange(AHEAD, device=self.device).unsqueeze(1))      # (AHEAD, B)
        self._eager(b)

    def _eager(self, b):
        b.begin(b.position)
        self._token(b.forward(b.token, b.position, b.attend), b)

    def _token(self, hidden_BD, b):
        """A token for each row from the hidden state of its last: drawn, written down, and made the next input."""
        logits_BV = linear_logits(hidden_BD, self.model.head_weight)
        uniform_B = uniform_at(b.address, b.count) if b.noise is None else b.noise[b.age % AHEAD]
        token_B, logp_B, kept_B = draw(logits_BV, uniform_B, b.temperature, *((b.top_k, b.top_p) if b.truncated else ()))
        self.tokens.index_copy_(0, b.at, token_B)
        self.logprobs.index_copy_(0, b.at, logp_B)
        if b.truncated:
            self.kept.index_copy_(0, b.at, kept_B)
        b.token.copy_(token_B)
        b.counters.add_(b.alive)
        over_B = self.is_stop.take(token_B).logical_or_(logp_B.isnan())
        torch.where(over_B, torch.minimum(b.end, b.count), b.end, out=b.end)

    def _arrange(self):
        """The batch is made anew: after rows left or entered, and where the storage has to grow."""
        self._flush()
        for row in sorted(self.rows.values(), key=lambda row: row.born):
            while row.slot in self.rows and not self.storage.grow(row):
                self._make_room()
        if not self.rows:
            self.batch = None
            return
        truncated = any(r.group.top_k or r.group.top_p < 1 for r in self.rows.values())
        if self.replayed and (self.sizes[0], truncated) not in self.graphs:
            self._capture(truncated)
        B = len(self.rows)
        size = next(size for size in self.sizes if size >= B)
        order, begin, attend, lasts = self.storage.decode(list(self.rows.values()), size)
        slots = torch.tensor(order + [self.slots] * (size - B), device=self.device)
        now, real = self.now[:, :size], self.real[:, :size]
        now.copy_(self.ints[:, slots])
        real.copy_(self.reals[:, slots])
        strings = any(r.group.stop_strings for r in self.rows.values())
        forward = self.model.alone(*self.storage.row(order[0])) if self.alone and size == 1 else self.model
        self.batch = columns(now, real, order=order, B=B, size=size, slots=slots[:B], begin=begin, attend=attend, forward=forward,
                             lasts=lasts, age=0, truncated=truncated, strings=strings)

    def _flush(self):
        """The batch's numbers back to their slots."""
        b, self.batch = self.batch, None
        if b is not None and b.age:
            self.ints[:, b.slots] = b.now[:, : b.B]
            for slot in b.order:
                self.rows[slot].count += b.age

    def _make_room(self):
        """No page is left: a prefix that only waits goes first, then the youngest row. Both are computed again later."""
        for row in reversed(self.waiting):
            for owner in (row, row.group):
                if owner.prefix is not None:
                    self._close(owner)
                    return
        row = max(self.rows.values(), key=lambda row: row.born)
        self._withdraw(row)
        row.group.unborn += 1
        self.waiting.appendleft(row)

    def _close(self, owner):
        self.storage.close(owner.prefix)
        owner.prefix = None

    def _withdraw(self, row, end=None):
        """A row leaves the batch, and takes along the tokens it got there."""
        got = slice(row.slot * self.width + len(row.tokens), row.slot * self.width + (row.count if end is None else end))
        row.tokens += self.tokens[got].tolist()
        row.logprobs += self.logprobs[got].tolist()
        row.kept += self.kept[got].tolist() if row.group.top_k or row.group.top_p < 1 else [0.0] * (got.stop - got.start)
        del self.rows[row.slot]
        self.storage.leave(row.slot)
        self.free.free(row.slot)
        row.slot = -1

    def _sample(self, row, finished):
        g = row.group
        return Sample(g.prompt, row.tokens, row.logprobs, finished, g.problem, row.index, g.visit,
                      row.kept if g.top_k or g.top_p < 1 else None)

    def _look(self, b):
        """Which rows have ended? The only place where the host waits for the device."""
        if not b.strings and not (b.count >= b.end).any():       # nobody's end is far
            return
        counts, ends = b.count.tolist(), b.end.tolist()
        ended = []
        for slot, n, end in zip(b.order, counts, ends):
            row = self.rows[slot]
            if row.group.stop_strings:
                end = min(end, self._string_end(row, min(n, end)))
            if n >= end:
                ended.append((row, end))
        if not ended:
            return
        self._flush()
        for row, end in ended:
            self._withdraw(row, end)
            if math.isnan(row.logprobs[-1]):
                raise FloatingPointError(f"step {self.steps_done}: the logits of problem {row.group.problem}, sample {row.index}, "
                                         f"token {end - 1} are not finite: the weights have diverged, or overflow on this prompt")
            at_limit = row.tokens[-1] not in self.stop and not self._stopped(row)
            self.ended.append(self._sample(row, "length" if at_limit else "stop"))

    def _stopped(self, row):
        strings = row.group.stop_strings
        return bool(strings) and any(s in self.tok.decode(row.tokens[-self._reach(row) :]) for s in strings)

    def _reach(self, row):
        return max(len(s.encode()) for s in row.group.stop_strings) + 4      # a token is a byte or more, and 3 may be half a character

    def _string_end(self, row, n):
        """-> after which token the text holds a stop string. Only the tail of each new token is decoded; what matched stays."""
        first = row.slot * self.width
        start = max(0, row.tail - self._reach(row))
        new = self.tokens[first + start : first + n].tolist()
        for end in range(max(row.tail, len(row.tokens)) + 1, n + 1):
            text = self.tok.decode(new[max(0, end - start - self._reach(row)) : end - start])
            if any(s in text for s in row.group.stop_strings):
                return end
        row.tail = n
        return FAR

    # --- waiting rows enter

    def _prefix(self, row):
        """-> what has to be computed before this row can go on, or None if there is no room for it now."""
        g = row.group
        alone = row.tokens and g.unborn == 1 and g.prefix is None
        if g.prefix is None and not alone:
            prompt = Prefix(g.prompt)
            if not self.storage.open(prompt):
                return None
            g.prefix = prompt
        if not row.tokens or (not alone and g.prefix.hidden is None):
            return g.prefix                                      # the prompt first: others go on from it too
        if row.prefix is None:
            whole = Prefix(g.prompt + row.tokens)
            if not self.storage.open(whole, g.prefix):
                return None
            row.prefix = whole
        return row.prefix

    def _admit(self):
        pieces, budget = [], self.chunk
        for row in list(islice(self.waiting, self.free.left)):
            prefix = self._prefix(row)
            if prefix is None:
                break
            # chunks end where the prefix's own length says, not where the budget does: the same sums in any company
            todo = min(len(prefix.tokens) - prefix.done, self.chunk - prefix.done % self.chunk)
            if prefix.hidden is None and all(prefix is not p for p, _, _ in pieces):
                if pieces and todo > budget:
                    break
                pieces.append((prefix, prefix.done, prefix.done + todo))
                budget -= todo
        if pieces:
            self._prefill(pieces)
        entering = []
        while self.waiting and self.free.left:
            row = self.waiting[0]
            g, prefix = row.group, row.prefix if row.tokens else row.group.prefix
            if prefix is None or prefix.hidden is None:
                break
            slot = self.free.take()
            if not self.storage.enter(prefix, slot, len(self.rows)):
                self.free.free(slot)
                break
            self.waiting.popleft()
            row.slot, row.born, row.count, row.tail = slot, next(self.entries), len(row.tokens), 0
            self.rows[slot] = row
            entering.append((row, prefix.hidden))
            g.unborn -= 1
            if row.prefix is not None:
                self._close(row)
            if not g.unborn and g.prefix is not None:
                self._close(g)
        if entering:
            self._first(entering)
        elif not pieces and not self.rows:
            self._make_room()                                    # prefixes further back hold the pages that the first one needs

    def _prefill(self, pieces):
        tokens, positions, last, at = [], [], [], 0
        for prefix, a, b in pieces:
            tokens += prefix.tokens[a:b]
            positions += range(a, b)
            at += b - a
            last.append(at - 1)
        pad = -at % self.multiple
        to = lambda x: torch.tensor(x + [0] * pad, device=self.device)  # noqa: E731
        hidden_TD = self.model(to(tokens), to(positions), self.storage.prefill(pieces))
        for (prefix, _, b), i in zip(pieces, last):
            prefix.done = b
            if b == len(prefix.tokens):
                prefix.hidden = hidden_TD[i].clone()

    def _first(self, entering):
        """The first token of rows that enter: all from their prefix's last hidden state, each with its own noise."""
        if self.batch is not None:
            self._look(self.batch)
            self._flush()
        rows, groups, E = [row for row, _ in entering], [row.group for row, _ in entering], len(entering)
        words = torch.tensor([[g.seed & M32, g.visit & M32, g.problem & M32, row.index & M32] for row, g in zip(rows, groups)]).t()
        numbers = [[0, len(g.prompt) + row.count - 1, row.count, row.slot * self.width + row.count, 1, g.max_new, a, g.top_k]
                   for row, g, a in zip(rows, groups, address(*words).tolist())]
        slots = torch.tensor([row.slot for row in rows], device=self.device)
        self.ints[:, slots] = torch.tensor(numbers, device=self.device).t()
        self.reals[:, slots] = torch.tensor([[g.temperature, g.top_p] for g in groups], device=self.device).t()
        for row in rows:
            if row.tokens:                                       # so that a stop string may begin in them
                first = row.slot * self.width
                self.tokens[first : first + row.count] = torch.tensor(row.tokens, device=self.device)
        padded = torch.cat((slots, slots.new_full((-E % self.multiple,), self.slots)))
        hidden_ED = torch.stack([hidden for _, hidden in entering] + [entering[0][1]] * (len(padded) - E))
        b = columns(self.ints[:, padded], self.reals[:, padded], order=[row.slot for row in rows],
                    truncated=any(g.top_k or g.top_p < 1 for g in groups), strings=any(g.stop_strings for g in groups))
        self._token(hidden_ED, b)
        self.ints[:, slots] = b.now[:, :E]
        for row in rows:
            row.count += 1
        self._look(b)

    # --- out before the end

    @torch.inference_mode()
    def abort(self, problem_id):
        """A problem's unfinished samples leave with the tokens they have. -> Samples, finished: aborted"""
        if self.batch is not None:
            self._look(self.batch)
            self._flush()
        rows = [row for row in (*self.rows.values(), *self.waiting) if row.group.problem == problem_id]
        for row in rows:
            if row.slot >= 0:
                self._withdraw(row)
            for owner in (row, row.group):
                if owner.prefix is not None:
                    self._close(owner)
        self.waiting = deque(row for row in self.waiting if row.group.problem != problem_id)
        return sorted((self._sample(row, "aborted") for row in rows), key=lambda s: s.index)

    @torch.inference_mode()
    def _salvage(self):
        """After an interrupt that may have hit anywhere: every token that was written down, and a fresh engine."""
        b, samples = self.batch, list(self.ended)
        age = {slot: b.age for slot in b.order} if b is not None else {}
        ends = dict(zip(b.order, b.end.tolist())) if b is not None else {}           # between two looks a row runs on behind its stop
        for row in {id(row): row for row in (*self.rows.values(), *self.waiting)}.values():
            if row.slot in self.rows:
                count = min(row.count + age.get(row.slot, 0), ends.get(row.slot, FAR))
                got = slice(row.slot * self.width + len(row.tokens), row.slot * self.width + count)
                row.tokens += self.tokens[got].tolist()
                row.logprobs += self.logprobs[got].tolist()
                row.kept += self.kept[got].tolist()
            n = min(len(row.tokens), len(row.logprobs), len(row.kept), row.group.max_new)
            del row.tokens[n:], row.logprobs[n:], row.kept[n:]
            samples.append(self._sample(row, "aborted"))
        self.reset()
        return samples

    # --- CUDA graphs: a decode step of a small model is all launches; replayed, it is one

    def _capture(self, truncated):
        """A graph per batch size, the largest first, so that the smaller ones live in its memory."""
        pool, aside = torch.cuda.graph_pool_handle(), torch.cuda.Stream()            # one: libraries keep a workspace for each stream
        self.now.copy_(self.ints[:, self.slots :][:, :1].expand_as(self.now))        # nobody: they write into page 0
        self.real.copy_(self.reals[:, self.slots :][:, :1].expand_as(self.real))
        self.storage.table.zero_()
        for size in reversed(self.sizes):
            b = columns(self.now[:, :size], self.real[:, :size], truncated=truncated)
            b.forward, (b.begin, b.attend) = self.model, self.storage.steps(size)
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):                       # compiles kernels, and lets libraries take their workspace
                for _ in range(2):
                    self._eager(b)
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):      # the process group's thread goes on asking
                self._eager(b)
            self.graphs[size, truncated] = graph

    # --- many prompts

    def stream(self, prompts, n=8, max_new=256, temperature=1.0, top_p=1.0, top_k=0, seed=0, ids=None, visits=None, stop_strings=(),
               bar=None):
        """-> an iterator over (i, the n Samples of prompts[i]), each as it completes. Left early, it frees what it has in flight."""
        ids = list(range(len(prompts))) if ids is None else list(ids)
        visits = [0] * len(prompts) if visits is None else list(visits)
        limits = list(max_new) if hasattr(max_new, "__len__") else [max_new] * len(prompts)
        for name, values in (("ids", ids), ("visits", visits), ("max_new", limits)):
            if len(values) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts but {len(values)} {name}")
        if len(set(ids)) < len(ids):
            raise ValueError("two prompts have the same id: they would get the same noise")
        for i, prompt in enumerate(prompts):
            self._check(ids[i], prompt, n, limits[i], temperature, top_p, top_k, stop_strings)
        settings = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed, stop_strings=stop_strings)
        return self._stream(prompts, n, limits, ids, visits, bar, settings)

    def _stream(self, prompts, n, limits, ids, visits, bar, settings):
        mine, found, place = self.deal(limits, ids), {}, {id: i for i, id in enumerate(ids)}     # found: problem -> its finished samples
        bar = progress(None, "rollout") if bar or (bar is None and sys.stderr.isatty() and n * sum(limits) > 50_000) else None
        finished, more, left = 0, True, True
        ahead = int(self.deterministic)  # one waits for the next free slot; but not if another rank may be free sooner
        if bar is not None:
            bar.unit = " tokens"

        def submit(problem, n, resume=()):
            i = place[problem]
            self.submit(problem, prompts[i], n, limits[i], visit=visits[i], resume=resume, **settings)

        try:
            while more or found or left:
                while more and len(self.waiting) < max(ahead, self.free.left):
                    i = next(mine, None)
                    more = i is not None
                    if more:
                        found[ids[i]] = []
                        submit(ids[i], n)
                left = more or self.even(mine, found, n, submit)
                rows = len(self.rows)
                for sample in self.step():
                    found[sample.problem].append(sample)
                    finished += 1
                    if len(found[sample.problem]) == n:
                        group = sorted(found.pop(sample.problem), key=lambda s: s.index)
                        self.expected[sample.problem] = sum(len(s.tokens) for s in group) / n
                        mine.end()
                        yield place[sample.problem], group
                if bar is not None:
                    bar.update(max(rows, len(self.rows)))
                    bar.set_postfix(live=len(self.rows), finished=finished, refresh=False)
        except KeyboardInterrupt:
            for i in mine:
                found[ids[i]] = []
            while parcel := mine.take():                         # on the way to another rank, which may be leaving too
                found |= {problem: ended + unfinished for problem, ended, unfinished in parcel}
            for sample in self._salvage():
                found[sample.problem].append(sample)
            mine.end(len(found))
            gone, found = found, {}
            for problem, samples in sorted(gone.items(), key=lambda item: place[item[0]]):
                i, there = place[problem], {s.index for s in samples}
                samples += [Sample(list(prompts[i]), [], [], "aborted", problem, j, visits[i]) for j in range(n) if j not in there]
                yield i, sorted(samples, key=lambda s: s.index)
        finally:
            mine.end(len(found))
            for problem in found:
                self.abort(problem)
            if bar is not None:
                bar.close()

    def deal(self, limits, ids):
        """-> the Deal of these prompts, the longest first, so that no long one is left alone at the end: by their limits, and where a run
        need not repeat itself by what they took the last time."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        name, longest = f"rollout/{next(calls)}", lambda i: -limits[i] if self.deterministic else -self.expected.get(ids[i], limits[i])
        order, store = sorted(range(len(ids)), key=longest), self.store
        if self.deterministic or (world == 1 and store is None):
            return Deal(order, rank=rank, world=world)
        store = store or dist.distributed_c10d._get_default_store()
        # a rank expects what it has sampled itself; but the counter is a place in one order, or prompts would be sampled twice or never
        if store.add(f"{name}/came", 1) == 1:
            store.set(f"{name}/order", pickle.dumps(order))
        return Deal(pickle.loads(store.get(f"{name}/order")), store, name)

    @torch.inference_mode()
    def even(self, mine, groups, n, submit):
        """No prompt is left to take. A rank with rows looks now and then whether one without has asked, and parts with half of its
        groups; a rank without asks. groups: problem -> its finished samples, of n; submit(problem, n, resume) lets in what came.
        -> whether there may be something left to do"""
        if self.live:
            if self.steps_done % EVERY == 0 and mine.asked():
                if self.batch is not None:
                    self._look(self.batch)
                late = {s.problem for s in self.ended}           # the next step() hands them back, so their groups stay
                parcel = [(p, groups[p], self.abort(p)) for p in [p for p in groups if len(groups[p]) < n and p not in late][1::2]]
                if parcel:
                    mine.give(parcel)
                for problem, _, _ in parcel:
                    del groups[problem]
            return True
        parcel = mine.ask()
        for problem, ended, unfinished in parcel or ():
            groups[problem] = ended
            submit(problem, len(unfinished), unfinished)
        if parcel == []:
            time.sleep(0.003)                                    # what is asked for takes EVERY steps to come
        return parcel is not None

    def generate(self, prompts, n=8, max_new=256, temperature=1.0, top_p=1.0, top_k=0, seed=0, ids=None, visits=None, stop_strings=(),
                 bar=None):
        """-> groups[i][j]: Sample j of prompts[i]; under torchrun this rank's groups, in the order of the prompts. Ctrl-C: what is
        there so far, the rest as aborted."""
        groups = dict(self.stream(prompts, n, max_new, temperature, top_p, top_k, seed, ids, visits, stop_strings, bar))
        return [groups[i] for i in sorted(groups)]


# -----------------------------------------------------------------------------
# the command line


@dataclass
class Config:
    model: str                           # a run, or any Hugging Face folder
    prompt: str = ""                     # the text to go on from
    chat: bool = False                   # talk to it: an empty line or Ctrl-D ends
    n: int = 1                           # samples
    max_new: int = 512                   # tokens of a sample, at most
    temperature: float = 1.0             # 0: greedy
    top_p: float = 1.0                   # 1: off
    top_k: int = 0                       # 0: off
    seed: int = 0                        # of the sampled tokens
    device: str = "auto"                 # auto|cpu|cuda|mps


def main(argv=None):
    import data
    from common import hf
    from train_gpt import GPT
    config = flags(Config, argv, __doc__)
    if bool(config.prompt) == config.chat:
        die("give --prompt TEXT or --chat, one of them")
    env = start(config.device)
    try:
        folder = hf.find(config.model)
        model, tok = GPT.from_hf(folder, env.dtype, env.device), data.tokenizer(folder)
        sampler = Sampler(model, tok.stop, tok, slots=max(1, config.n), exact=False)       # who talks alone is half again as fast
    except (ValueError, FileNotFoundError) as e:
        die(str(e))

    def say(text, visit=0):
        settings = dict(temperature=config.temperature, top_p=config.top_p, top_k=config.top_k, seed=config.seed, visits=[visit])
        try:
            (samples,) = sampler.generate([data.begun(tok.encode(text), tok)], config.n, config.max_new, **settings)
        except ValueError as e:
            die(str(e))
        return [tok.decode(s.tokens[:-1] if s.finished == "stop" else s.tokens) for s in samples]

    if config.prompt:
        for text in say(config.prompt):
            print(config.prompt + text)
        return
    messages = []
    while line := _ask("you: "):
        messages.append({"role": "user", "content": line})
        reply = say(tok.chat(messages), visit=len(messages))[0]
        print("model:", reply)
        messages.append({"role": "assistant", "content": reply})


def _ask(prompt):
    try:
        return input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return ""


if __name__ == "__main__":
    main()
