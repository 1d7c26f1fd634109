"""
rollout.py: the sampler. A KV cache, continuous batching, the log-prob of every token kept; it reads
the trainer's own weights.

Most of the time of RL is spent here. The model sees one flat row of tokens, as always: only `attend`
knows that there is a cache. The way of a sample:

    submit             a Sequence waits for each sample
    step, again and again:
    _admit             those that wait enter: prefill, a prompt once for all its samples; a slot; the
                       first token
    _next_token        of all that run, in each later step: the model's forward, the draw, written down
    _collect_finished  those that ended leave, as Samples

Left out of the usual recipe, and why:
- no second engine and no weight sync: the tensors read here are the ones the optimizer writes;
- no padding: a sequence costs what its own length costs, and nothing after its last token;
- no random state: the uniform number of a token is a hash of (seed, visit, problem, index, position),
  so slots, batches, ranks, preemption and restarts never change the noise.

    python rollout.py --model runs/base --prompt "C3 7 12=43:"
    python rollout.py --model DIR --prompt "..." --n 8 --temperature 0.7 --top-p 0.95
    python rollout.py --model DIR --chat
"""

import math
import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Literal
from itertools import count, islice

import torch

from common import cpu, machine
from common.deal import Feed
from common.flags import die, flags, positive, truncation, without_effect
from common.moved import moved
from common.pages import Pages, PagesView, Pool, recorded
from common.run import progress, start
from common.slabs import Slabs
from data import begun
from kernels import address, draw_next, picked, uniform_at

NAN = math.nan


@dataclass
class Sample:
    prompt: list[int]
    tokens: list[int]            # ends with the stop token that was sampled, and it is trained
    logprobs: list[float]        # log pi when sampled, tempered full softmax; nan: forced, not trained
    finished: str                # "stop" | "length" | "aborted"
    problem: int
    index: int
    visit: int                   # problem, index and visit are the address of its randomness
    kept: list[float] | None = None      # with top-p/top-k: log of the probability mass that survived
    reward: float = NAN
    advantage: float | list[float] = NAN
    weight: float = 1.0                  # of each of its tokens in the loss; 0: it is left out
    divisor: float = 0.0                 # what it adds to the normaliser


def prompt_ids(problem, tok):
    """A problem's prompt as tokens: a chat if it asks for one, after the beginning-of-text token if
    there is one."""
    text = tok.chat(problem.data["messages"]) if "messages" in problem.data else problem.prompt
    return begun(tok.encode(text), tok)


def completion(sample, tok):
    """The text of a sample without its stop token. Only that is dropped: what a stop string ended
    is all text. A sampler may stop at ids that tok.stop lacks, say a teacher's; where tok knows
    them as special tokens they are no text."""
    tokens = sample.tokens
    if sample.finished == "stop":
        last = tokens[-1]
        if last in tok.stop or tok.decode([last]) in getattr(tok, "special", ()):
            tokens = tokens[:-1]
    return tok.decode(tokens)


# -----------------------------------------------------------------------------
# what waits and runs


@dataclass(eq=False)
class Prefix:
    """Tokens that sequences continue from: a prompt, or a prompt and the tokens to resume."""
    tokens: list[int]
    done: int = 0                        # keys computed so far: long prefixes come in chunks
    hidden: torch.Tensor | None = None   # of the last token, once all keys are computed
    cache: object = None                 # the keys and values, as the storage holds them


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
    waiting: int                         # its sequences that wait
    prefix: Prefix | None = None         # the prompt's keys, kept until its last sequence enters

    @property
    def truncated(self):
        return bool(self.top_k) or self.top_p < 1


@dataclass(eq=False)
class Sequence:
    group: Group
    index: int
    # from before it entered: forced, resumed or preempted
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[float] = field(default_factory=list)
    prefix: Prefix | None = None         # its own, if it has such tokens
    slot: int = -1
    entered: int = -1                    # order of entry: the youngest is preempted first
    count: int = 0                       # its tokens when the batch was last built
    searched: int = 0                    # tokens searched for stop strings so far

    @property
    def cached(self):
        """Keys: that of the last token is stored by the step that reads the token."""
        return len(self.group.prompt) + self.count - 1


# -----------------------------------------------------------------------------
# storage of keys and values. On a CPU the Slabs of common/slabs.py: a slab per capacity, a full row
# moves to a larger one
#
#   slab 64    [row][row][row]          rows stand side by side from 0: a product per layer and slab
#   slab 128   [ row  ][ row  ]
#   slab 256   [    row     ]
#
# On a GPU the Pool of common/pages.py: small pages, of which sequences share those of their prompt.


SLOTS = 256              # sequences at a time; on a CPU, 1M parameters: twice as fast as 32


# -----------------------------------------------------------------------------
# the batch

FAR = 1 << 40            # the end of padding, which has none
AHEAD = 8                # on a CPU uniform numbers are made for that many steps at once


class Columns:
    """A column of numbers per sequence, each row under its name. The sampler has one of all slots,
    and one of the batch, into which the columns of its sequences are gathered: a step touches only
    that."""

    ADVANCED = [                 # a step adds `alive` to all of these in one addition
        "position",              # of the token that the next step reads
        "count",                 # tokens of the response so far
        "write_at",              # where the next token is written down
    ]
    INTS = [
        *ADVANCED,
        "token",                 # that the next step reads
        "alive",                 # 1; padding: 0
        "end",                   # the count at which it ends: max_new, until a stop token is drawn
        "address",               # of its noise
        "top_k",
    ]
    REALS = ["temperature", "top_p"]

    def __init__(self, ints, reals):
        self.ints = ints
        self.reals = reals
        self.advanced = ints[: len(self.ADVANCED)]
        vars(self).update(zip(self.INTS, ints.unbind()))
        vars(self).update(zip(self.REALS, reals.unbind()))

    @classmethod
    def padding(cls, n, write_at, device):
        columns = cls(torch.zeros(len(cls.INTS), n, dtype=torch.int64, device=device),
                      torch.zeros(len(cls.REALS), n, device=device))
        columns.write_at.fill_(write_at)
        columns.end.fill_(FAR)
        columns.reals.fill_(1.0)
        return columns

    def __getitem__(self, places):
        """The columns of these places: views, if they are a slice."""
        return Columns(self.ints[:, places], self.reals[:, places])

    def fill(self, columns):
        self.ints.copy_(columns.ints)
        self.reals.copy_(columns.reals)


@dataclass(eq=False)
class Batch:
    """Sequences side by side. It lasts until one enters or leaves, or the storage has to grow."""
    columns: Columns
    order: list[int]                     # their slots
    truncated: bool                      # some have top-k or top-p
    strings: bool                        # some have stop strings
    slots: torch.Tensor | None = None    # order, on the device
    view: object = None                  # the storage's: advance(position_B), then attend per layer
    forward: object = None               # the model, or its copy in numpy for a sequence alone
    valid_for: float = 0                 # steps until the storage has to grow
    steps: int = 0                       # done so far
    noise: torch.Tensor | None = None    # (AHEAD, B) uniform numbers, where they are made ahead

    def __post_init__(self):
        self.size = self.columns.token.shape[0]                  # with padding


def graph_sizes(slots):
    """Sequences of a CUDA graph: up to the first size that takes them all."""
    sizes = [1, 2, 4, 8, *range(16, slots + 16, 16)]
    smaller = [size for size in sizes if size < slots]
    return sizes[: len(smaller) + 1]


# -----------------------------------------------------------------------------
# the sampler


class Sampler:
    def __init__(self, model, stop, tok=None, slots=None, max_len=None, exact=None, *, paged=None,
                 pages=None, deterministic=None, store=None):
        """slots: sequences at a time. exact: on a CPU, tokens do not depend on what else is in the
        batch. paged, pages: the GPU's storage and its size. deterministic: ranks take prompts in
        turn, not from a counter in `store`."""
        self.model = model
        self.c = model.config
        self.tok = tok
        weight = model.head_weight
        self.device = weight.device
        cuda = weight.device.type == "cuda"
        for what in ("train", "decode", "fused"):    # a backend proves itself now, not inside a graph
            picked(what, self.device.type)
        bad = [t for t in stop if not 0 <= t < self.c.vocab_size]
        if bad:
            raise ValueError(f"stop id {bad[0]} is outside the vocabulary of {self.c.vocab_size}")
        if max_len is not None and not 2 <= max_len <= self.c.max_len:
            raise ValueError(f"max_len {max_len}: this model takes 2 .. {self.c.max_len} tokens")
        if slots is not None and slots < 1:
            raise ValueError(f"slots {slots}: at least 1")
        self.stop = set(stop)                        # another set is valid from the next reset() on
        self.max_len = max_len or self.c.max_len
        self.paged = cuda if paged is None else paged
        self.exact = exact is not False and self.device.type == "cpu" and not self.paged
        self.deterministic = not cuda if deterministic is None else deterministic
        self.store = store
        self.expected = {}                           # problem -> mean length at its last visit
        self.slots = slots or SLOTS
        self.chunk = 4096 if cuda else 512           # prompt tokens between two decode steps
        # products of that many rows are of one kind (see cpu.matmul_t): each row is summed in
        # the same order
        self.multiple = max(cpu.FEW, 4 * torch.get_num_threads()) if self.exact else 1
        # a lone sequence in numpy, which rounds differently from torch, and is slow if both have
        # spinning threads
        self.alone = (cpu.ONE_THREAD and not self.exact and not self.paged and self.device.type == "cpu"
                      and weight.dtype == torch.float32 and hasattr(model, "lone_row"))
        self.replayed = cuda                         # decode steps are CUDA graphs
        if cuda:
            self.sizes = graph_sizes(self.slots)
        else:
            self.sizes = list(range(self.multiple, self.slots + self.multiple, self.multiple))
        self.ahead = torch.arange(AHEAD, device=self.device).unsqueeze(1)
        self.steps_done = 0
        self.entries = count()
        self._allocate(pages)
        self.reset()

    @torch.inference_mode()
    def _allocate(self, pages):
        """All that lives on the device, once: graphs know the addresses."""
        weight, device = self.model.head_weight, self.device
        if self.paged:
            self.storage = Pool(self.c, weight.dtype, device, self.sizes[-1], self.max_len, pages)
        else:
            self.storage = Slabs(self.c, weight, self.exact)
        self.graphs = {}                 # (size, truncated) -> CUDA graph
        self.is_stop = torch.zeros(self.c.vocab_size, dtype=torch.bool, device=device)
        # what was sampled, `width` places per slot; padding writes behind them
        self.width = self.max_len + self.storage.check_every
        places = (self.slots + 1) * self.width
        self.tokens = torch.zeros(places, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(places, device=device)
        self.kept = torch.zeros(places, device=device)
        behind = self.slots * self.width
        self.by_slot = Columns.padding(self.slots + 1, behind, device)       # the last stays padding
        self.in_batch = Columns.padding(self.sizes[-1], behind, device)

    @torch.inference_mode()
    def reset(self):
        """Forget everything in flight."""
        self.waiting = deque()
        self.running = {}                # slot -> Sequence
        self.ended = []                  # Samples that no step() has handed back yet
        self.batch = None
        self.free = Pages(self.slots)
        self.storage.clear()
        self.is_stop.zero_()
        self.is_stop[list(self.stop)] = True

    @property
    def live(self):
        """Samples that are not finished, those that wait for a slot included."""
        return len(self.running) + len(self.waiting) + len(self.ended)

    # --- in

    def submit(self, problem_id, prompt, n, max_new, *, seed=0, visit=0, temperature=1.0, top_p=1.0,
               top_k=0, resume=(), stop_strings=()):
        """n samples of a prompt join the queue. resume: what to continue; its tokens count in
        max_new. A Sample continues under its own index, with its log-probs; a list of tokens is
        forced on the sample of its place in the list. If n is more, the rest start fresh."""
        self._check(problem_id, prompt, n, max_new, temperature, top_p, top_k, stop_strings)
        who = f"problem {problem_id}: "
        if len(resume) > n:
            raise ValueError(who + f"{len(resume)} samples to resume, n = {n}")
        limit = min(max_new, self.max_len - len(prompt))
        settings = seed, visit, temperature, top_p, top_k, tuple(stop_strings)
        group = Group(problem_id, list(prompt), limit, *settings, waiting=n)
        sequences = {}                   # by index
        for place, old in enumerate(resume):
            if isinstance(old, Sample):
                kept = old.kept or [0.0] * len(old.tokens)
                s = Sequence(group, old.index, list(old.tokens), list(old.logprobs), list(kept))
            else:
                s = Sequence(group, place, list(old), [NAN] * len(old), [0.0] * len(old))
            if len(s.tokens) >= limit:
                raise ValueError(who + f"a sample to resume has {len(s.tokens)} tokens already, max_new is "
                                 f"{limit}")
            if s.index in sequences:
                raise ValueError(who + f"two samples to resume have index {s.index}, and so the same noise")
            sequences[s.index] = s
        fresh = [Sequence(group, i) for i in range(n) if i not in sequences]
        self.waiting.extend([*sequences.values(), *fresh][:n])

    def _check(self, problem, prompt, n, max_new, temperature, top_p, top_k, stop_strings=()):
        def refuse(why):
            raise ValueError(f"problem {problem}: {why}")

        if not prompt:
            refuse("the prompt is empty: a model needs a token to continue from")
        if n < 1 or max_new < 1:
            refuse(f"n = {n} and max_new = {max_new} must be at least 1")
        if len(prompt) >= self.max_len:
            refuse(f"the prompt has {len(prompt)} tokens, and prompt and response together may have "
                   f"{self.max_len}")
        whole = len(prompt) + max_new
        if self.paged and min(self.max_len, whole) > self.storage.most:
            refuse(f"prompt and max_new are {whole} tokens, the pool holds {self.storage.most}: lower "
                   "max_new, or make a Sampler with more pages")
        last = self.c.vocab_size - 1
        outside = [t for t in (min(prompt), max(prompt)) if not 0 <= t <= last]
        if outside:
            refuse(f"the prompt has token {outside[0]}, the vocabulary is 0 .. {last}")
        if not 0 <= temperature < math.inf:
            refuse(f"temperature {temperature}: 0 (greedy) or more, and finite")
        if not 0 < top_p <= 1:
            refuse(f"top_p {top_p}: more than 0, at most 1 (1 = off)")
        if top_k < 0:
            refuse(f"top_k {top_k}: 0 (off) or more")
        if stop_strings and self.tok is None:
            refuse("stop strings need a tokenizer: Sampler(model, stop, tok)")
        if "" in stop_strings:
            refuse("an empty stop string would stop everything")

    # --- one step

    @torch.inference_mode()
    def step(self):
        """A token for every running sequence, then waiting ones enter. -> Samples that ended"""
        machine.follow()                             # fewer threads while other processes are busy
        if self.running:
            if self.batch is None or self.batch.steps >= self.batch.valid_for:
                self._rebuild_batch()
            b = self.batch
            if self.replayed:
                self.graphs[b.size, b.truncated].replay()        # of _next_token
            else:
                self._next_token(b)
            b.steps += 1
            self.steps_done += 1
            if b.steps % self.storage.check_every == 0:
                self._collect_finished()
        if self.waiting and self.free.left:
            self._admit()
        ended = self.ended
        self.ended = []
        return ended

    def _next_token(self, b, hidden_BD=None):
        """The model reads the last token of each sequence, unless its hidden state is known already; the
        next one is drawn, written down, and read in the next step."""
        c = b.columns
        if hidden_BD is None:
            b.view.advance(c.position)
            hidden_BD = b.forward(c.token, c.position, b.view.attend)
        truncation = (c.top_k, c.top_p) if b.truncated else ()
        token_B, logp_B, kept_B = draw_next(
            hidden_BD, self.model.head_weight, self._uniform(b), c.temperature, *truncation)
        self.tokens.index_copy_(0, c.write_at, token_B)
        self.logprobs.index_copy_(0, c.write_at, logp_B)
        if b.truncated:
            self.kept.index_copy_(0, c.write_at, kept_B)
        c.token.copy_(token_B)
        c.advanced.add_(c.alive)
        # a stop token ends its sequence here: the end becomes the count that it has now
        stops_B = self.is_stop.take(token_B).logical_or_(logp_B.isnan())
        torch.where(stops_B, torch.minimum(c.end, c.count), c.end, out=c.end)

    def _uniform(self, b):
        """Each sequence's own number for its next token; on a CPU those of AHEAD steps at once."""
        c = b.columns
        if self.replayed or b.view is None:          # no view: the batch of first tokens, in _admit
            return uniform_at(c.address, c.count)
        if b.steps % AHEAD == 0:
            b.noise = uniform_at(c.address, c.count + self.ahead)
        return b.noise[b.steps % AHEAD]

    # --- the batch

    def _rebuild_batch(self):
        """After sequences left or entered, and where the storage has to grow."""
        self._write_back()
        for s in sorted(self.running.values(), key=lambda s: s.entered):
            while s.slot in self.running and not self.storage.grow(s):
                self._preempt()
        sequences = list(self.running.values())
        size = next(size for size in self.sizes if size >= len(sequences))
        if self.replayed:
            self._capture(truncated=any(s.group.truncated for s in sequences))
        order, view, valid_for = self.storage.decode(sequences, size)
        self.batch = self._gather(order, size)
        self.batch.view = view
        self.batch.valid_for = valid_for
        if self.alone and size == 1:
            self.batch.forward = self.model.lone_row(*self.storage.row(order[0]))

    def _gather(self, order, size):
        """-> a Batch of the sequences in these slots, and padding up to its size."""
        slots = torch.tensor(order + [self.slots] * (size - len(order)), device=self.device)
        columns = self.in_batch[:size]
        columns.fill(self.by_slot[slots])
        groups = [self.running[slot].group for slot in order]
        truncated = any(g.truncated for g in groups)
        strings = any(g.stop_strings for g in groups)
        return Batch(columns, order, truncated, strings, slots[: len(order)], forward=self.model)

    def _write_back(self):
        """The batch's columns to their slots; the batch is over."""
        b = self.batch
        self.batch = None
        if b is not None and b.steps:
            self.by_slot.ints[:, b.slots] = b.columns.ints[:, : len(b.order)]
            for slot in b.order:
                self.running[slot].count += b.steps

    def _end_batch(self):
        """Finished sequences leave, and nothing is in the batch alone: slots may change hands."""
        if self.batch is not None:
            self._collect_finished()
            self._write_back()

    # --- waiting sequences enter

    def _admit(self):
        """The prefixes of those next in line are computed, a chunk in each step. A sequence whose prefix
        is whole gets a slot, and its first token from the prefix's last hidden state."""
        pieces = self._next_pieces()
        if pieces:
            self._prefill(pieces)
        entering = self._take_slots()
        if not entering and not pieces and not self.running:
            self._make_way()
            entering = self._take_slots()    # at once, or prefixes further back take the pages again
        if not entering:
            return
        self._end_batch()
        self._write_columns(entering)
        hiddens = list(entering.values())
        hiddens += hiddens[:1] * (-len(hiddens) % self.multiple)
        self.batch = self._gather([s.slot for s in entering], len(hiddens))
        self._next_token(self.batch, torch.stack(hiddens))
        self.batch.steps = 1
        self._end_batch()

    def _take_slots(self):
        """The first in line take free slots, while their prefix is whole and the storage has room.
        -> {Sequence: the hidden state it continues from}"""
        entering = {}
        while self.waiting and self.free.left:
            s = self.waiting[0]
            g = s.group
            prefix = s.prefix if s.tokens else g.prefix
            if prefix is None or prefix.hidden is None:
                break
            slot = self.free.take()
            if not self.storage.enter(prefix, slot, len(self.running)):
                self.free.free(slot)
                break
            self.waiting.popleft()
            self.running[slot] = s
            s.slot = slot
            s.entered = next(self.entries)
            s.count = len(s.tokens)
            s.searched = 0
            entering[s] = prefix.hidden
            g.waiting -= 1
            self._close(s)
            if not g.waiting:
                self._close(g)
        return entering

    def _write_columns(self, entering):
        """Those of sequences that enter; and the tokens they have, where a stop string may begin."""
        slots = torch.tensor([s.slot for s in entering], device=self.device)
        words = [(s.group.seed, s.group.visit, s.group.problem, s.index) for s in entering]
        words = torch.tensor([[word & 0xFFFFFFFF for word in four] for four in words])
        numbers = []
        for s, noise in zip(entering, address(*words.t()).tolist()):
            g = s.group
            first = s.slot * self.width
            if s.tokens:
                self.tokens[first : first + s.count] = torch.tensor(s.tokens, device=self.device)
            numbers.append(dict(
                position=len(g.prompt) + s.count - 1, count=s.count, write_at=first + s.count,
                token=0, alive=1, end=g.max_new, address=noise,
                top_k=g.top_k, top_p=g.top_p, temperature=g.temperature,
            ))
        for names, table in (Columns.INTS, self.by_slot.ints), (Columns.REALS, self.by_slot.reals):
            values = [[of[name] for of in numbers] for name in names]
            table[:, slots] = torch.tensor(values, device=self.device)

    def _next_pieces(self):
        """-> (prefix, begin, end): what is computed in this step for those that enter next."""
        pieces = []
        budget = self.chunk
        for s in list(islice(self.waiting, self.free.left)):
            prefix = self._prefix(s)
            if prefix is None:
                break
            if prefix.hidden is not None or any(prefix is p for p, _, _ in pieces):
                continue
            # chunks end where the prefix's own length says, not the budget: the same sums in any
            # company
            todo = min(len(prefix.tokens) - prefix.done, self.chunk - prefix.done % self.chunk)
            if pieces and todo > budget:
                break
            pieces.append((prefix, prefix.done, prefix.done + todo))
            budget -= todo
        return pieces

    def _prefix(self, s):
        """-> what has to be computed before this sequence can enter, or None if there is no room
        for it now."""
        g = s.group
        if s.prefix is not None:
            return s.prefix
        last = s.tokens and g.waiting == 1 and g.prefix is None      # no other needs the mere prompt
        if g.prefix is None and not last:
            prompt = Prefix(g.prompt)
            if not self.storage.open(prompt):
                return None
            g.prefix = prompt
        if not s.tokens or (not last and g.prefix.hidden is None):
            return g.prefix              # the prompt first: others continue from it too
        whole = Prefix(g.prompt + s.tokens)
        if not self.storage.open(whole, g.prefix):
            return None
        s.prefix = whole
        return whole

    def _prefill(self, pieces):
        tokens, positions, last = [], [], []
        for prefix, begin, end in pieces:
            tokens += prefix.tokens[begin:end]
            positions += range(begin, end)
            last.append(len(tokens) - 1)
        padding = [0] * (-len(tokens) % self.multiple)
        tokens = torch.tensor(tokens + padding, device=self.device)
        positions = torch.tensor(positions + padding, device=self.device)
        hidden_TD = self.model(tokens, positions, self.storage.prefill(pieces))
        for (prefix, _, end), i in zip(pieces, last):
            prefix.done = end
            if end == len(prefix.tokens):
                prefix.hidden = hidden_TD[i].clone()

    def _make_way(self):
        """Nothing runs, and the first sequence cannot enter: prefixes that it does not need hold its
        pages. Computed again later."""
        first = self.waiting[0]
        needed = first.prefix or first.group.prefix
        for s in self.waiting:
            for owner in (s, s.group):
                if owner.prefix is not needed:
                    self._close(owner)
        if first.tokens and first.prefix is None:
            whole = Prefix(first.group.prompt + first.tokens)
            if needed is None or not self.storage.open(whole, needed):
                self._close(first.group)         # there are not enough pages for both, even so
                self.storage.open(whole)
            first.prefix = whole

    def _preempt(self):
        """No page is left: a prefix that only waits goes first, then the youngest sequence.
        Computed again later."""
        for s in reversed(self.waiting):
            for owner in (s, s.group):
                if owner.prefix is not None:
                    self._close(owner)
                    return
        youngest = max(self.running.values(), key=lambda s: s.entered)
        self._remove(youngest, youngest.count)
        youngest.group.waiting += 1
        self.waiting.appendleft(youngest)

    def _close(self, owner):
        if owner.prefix is not None:
            self.storage.close(owner.prefix)
            owner.prefix = None

    # --- out, at the end

    def _collect_finished(self):
        """Which sequences have ended? The only place where the host waits for the device."""
        b = self.batch
        c = b.columns
        if not b.strings and not (c.count >= c.end).any():
            return
        finished = []
        for slot, tokens, end in zip(b.order, c.count.tolist(), c.end.tolist()):
            s = self.running[slot]
            string_end = self._string_end(s, min(tokens, end))
            end = min(end, string_end)
            if tokens >= end:
                finished.append((s, end, end == string_end))
        if not finished:
            return
        self._write_back()
        for s, end, by_string in finished:
            self._remove(s, end)
            if math.isnan(s.logprobs[-1]):
                place = f"problem {s.group.problem}, sample {s.index}, token {end - 1}"
                self.reset()
                raise ValueError(f"step {self.steps_done}: the logits of {place} are not finite: the "
                                 "weights have diverged, or overflow on this prompt")
            stopped = by_string or s.tokens[-1] in self.stop
            self.ended.append(self._sample(s, "stop" if stopped else "length"))

    def _string_end(self, s, n):
        """-> after which of its first n tokens the text holds a stop string, or FAR. Only the tail of
        each new token is decoded; what matched stays. One in the text to resume stops nothing."""
        strings = s.group.stop_strings
        if not strings:
            return FAR
        # a token is a byte or more, and 3 more bytes may be half a character
        reach = max(len(x.encode()) for x in strings) + 4
        first = s.slot * self.width
        start = max(0, s.searched - reach)
        tokens = self.tokens[first + start : first + n].tolist()
        given = len(s.tokens)                        # of these, those that it entered with
        for end in range(max(s.searched, given) + 1, n + 1):
            low = max(0, end - start - reach)
            text = self.tok.decode(tokens[low : end - start])
            old = len(self.tok.decode(tokens[low : max(low, given - start)]))
            if any(text.find(x, max(0, old - len(x) + 1)) >= 0 for x in strings):
                return end
        s.searched = n
        return FAR

    def _remove(self, s, end):
        """A sequence leaves the batch, and takes along the tokens it got there."""
        self._take_along(s, end)
        del self.running[s.slot]
        self.storage.leave(s.slot)
        self.free.free(s.slot)
        s.slot = -1

    def _take_along(self, s, end):
        first = s.slot * self.width
        got = slice(first + len(s.tokens), first + end)
        s.tokens += self.tokens[got].tolist()
        s.logprobs += self.logprobs[got].tolist()
        s.kept += self.kept[got].tolist()        # without truncation nobody reads it

    def _sample(self, s, finished):
        g = s.group
        kept = s.kept if g.truncated else None
        return Sample(g.prompt, s.tokens, s.logprobs, finished, g.problem, s.index, g.visit, kept)

    # --- out, before the end

    @torch.inference_mode()
    def finished(self):
        """-> the problems of samples that have ended and that the next step() hands back."""
        if self.batch is not None:
            self._collect_finished()
        return {sample.problem for sample in self.ended}

    @torch.inference_mode()
    def abort(self, problem_id):
        """A problem's unfinished samples leave with the tokens they have. -> Samples: aborted"""
        self._end_batch()
        everyone = [*self.running.values(), *self.waiting]
        sequences = [s for s in everyone if s.group.problem == problem_id]
        for s in sequences:
            if s.slot >= 0:
                self._remove(s, s.count)
            self._close(s)
            self._close(s.group)
        self.waiting = deque(s for s in self.waiting if s.group.problem != problem_id)
        return sorted((self._sample(s, "aborted") for s in sequences), key=lambda s: s.index)

    @torch.inference_mode()
    def salvage(self):
        """After an interrupt that may have hit anywhere: what was written down, and a fresh engine.
        -> Samples, those that had ended and all others as aborted"""
        b = self.batch
        samples = list(self.ended)
        ends = {}                        # between two looks a sequence runs on behind its stop
        if b is not None:
            ends = dict(zip(b.order, b.columns.end.tolist()))
        for s in dict.fromkeys([*self.running.values(), *self.waiting]):
            if s.slot in self.running:
                steps = b.steps if s.slot in ends else 0
                self._take_along(s, min(s.count + steps, ends.get(s.slot, FAR)))
            n = min(len(s.tokens), len(s.logprobs), len(s.kept), s.group.max_new)
            del s.tokens[n:], s.logprobs[n:], s.kept[n:]
            samples.append(self._sample(s, "aborted"))
        self.reset()
        return samples

    # --- CUDA graphs

    def _capture(self, truncated):
        """A graph of _next_token per batch size. Once, with and without truncation."""
        if (self.sizes[0], truncated) in self.graphs:
            return
        self.in_batch.fill(self.by_slot[-1:])    # all of it padding, which writes into page 0
        self.storage.table.zero_()

        def next_token(size):
            columns, view = self.in_batch[:size], PagesView(self.storage, size)
            self._next_token(Batch(columns, [], truncated, strings=False, view=view, forward=self.model))

        for size, graph in recorded(next_token, self.sizes):
            self.graphs[size, truncated] = graph

    # --- many prompts

    def stream(self, prompts, n=8, max_new=256, temperature=1.0, top_p=1.0, top_k=0, seed=0, ids=None,
               visits=None, stop_strings=(), bar=None):
        """-> an iterator over (i, the n Samples of prompts[i]), each as it completes. Left early,
        it frees what it has in flight. After Ctrl-C: what is there so far, the rest as aborted."""
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
        if bar is None:
            bar = sys.stderr.isatty() and n * sum(limits) > 50_000
        settings = dict(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed,
                        stop_strings=stop_strings)
        prompts, limits, visits = (dict(zip(ids, values)) for values in (prompts, limits, visits))
        return self._stream(prompts, n, limits, visits, settings, bar)

    def _stream(self, prompts, n, limits, visits, settings, bar):
        place = {id: i for i, id in enumerate(prompts)}
        feed = Feed(self, prompts, n, limits, visits=visits, ahead=int(self.deterministic), **settings)
        bar = progress(None, "rollout") if bar else None
        if bar is not None:
            bar.unit = " tokens"
        ended = 0
        with feed:
            try:
                while feed.busy:
                    before = len(self.running)
                    samples = feed.step()
                    ended += len(samples)
                    for group in feed.complete(samples):
                        yield place[group[0].problem], group
                    if bar is not None:
                        bar.update(max(before, len(self.running)))
                        bar.set_postfix(live=len(self.running), finished=ended, refresh=False)
            except KeyboardInterrupt:
                found = feed.interrupt()
                for id in sorted(found, key=place.get):
                    rest = set(range(n)) - {s.index for s in found[id]}
                    empty = [Sample(list(prompts[id]), [], [], "aborted", id, j, visits[id]) for j in rest]
                    yield place[id], sorted(found[id] + empty, key=lambda s: s.index)
            finally:
                if bar is not None:
                    bar.close()

    def generate(self, prompts, n=8, max_new=256, temperature=1.0, top_p=1.0, top_k=0, seed=0, ids=None,
                 visits=None, stop_strings=(), bar=None):
        """-> groups[i][j]: Sample j of prompts[i]; under torchrun this rank's groups, in the order
        of the prompts."""
        settings = max_new, temperature, top_p, top_k, seed, ids, visits, stop_strings, bar
        groups = dict(self.stream(prompts, n, *settings))
        return [groups[i] for i in sorted(groups)]


# -----------------------------------------------------------------------------
# the command line


@dataclass
class Config:
    model: str                           # a run, or any Hugging Face folder
    prompt: str = ""                     # the text to continue
    chat: bool = False                   # talk to it: an empty line or Ctrl-D ends
    n: int = 1                           # samples
    max_new: int = 512                   # tokens of a sample, at most
    temperature: float = 1.0             # 0: greedy
    top_p: float = 1.0                   # 1: off
    top_k: int = 0                       # 0: off
    seed: int = 0                        # of the sampled tokens
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where


def configure(argv):
    """-> Config. What does not go together is refused, with the reason, and so is a flag without
    effect."""
    c = flags(Config, argv, __doc__)
    positive(c, "n max_new")
    if bool(c.prompt) == c.chat:
        die("give --prompt TEXT or --chat, one of them")
    truncation(c)
    without_effect(c, [
        ("top_k seed", c.temperature, "temperature 0 takes the likeliest token anyway"),
        ("n", not c.chat, "--chat talks to one"),
    ])
    return c


def main(argv=None):
    config = configure(argv)
    env = start(config.device)
    try:
        talk(config, env)
    except (ValueError, FileNotFoundError) as e:
        die(str(e))


def talk(config, env):
    import data
    from common import hf
    from train_gpt import GPT
    folder = hf.find(config.model)
    model = GPT.from_hf(folder, env.dtype, env.device)
    tok = data.tokenizer(folder)
    # exact=False: 1.5x faster for a single conversation
    sampler = Sampler(model, tok.stop, tok, slots=config.n, exact=False)

    def say(text, visit=0):
        prompt = begun(tok.encode(text), tok)
        (samples,) = sampler.generate([prompt], config.n, config.max_new, config.temperature,
                                      config.top_p, config.top_k, config.seed, visits=[visit])
        return [completion(s, tok) for s in samples]

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


__getattr__ = moved(__name__)            # names that a fork may know from here


if __name__ == "__main__":
    main()
