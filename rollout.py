"""
rollout.py: the sampler. A KV cache, continuous batching, the log-prob of every token kept; it reads
the trainer's own weights.

Most of the time of RL is spent here. The model sees one flat row of tokens, as always: only `attend`
knows that there is a cache. The way of a sample:

    generate, stream   many prompts: a Feed (common/deal.py) submits each when there is room, and keeps
                       its samples until all of them have ended
    submit             a Sequence waits for each sample
    step, again and again:
    _next_token        of all that run: the model's forward, the draw, written down
    _collect_finished  those that ended leave, as Samples
    _admit             those that wait enter: what they continue from is computed, a prompt once for all
                       its samples (common/prefix.py); a slot; the first token

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
from dataclasses import dataclass
from typing import Literal
from itertools import count, islice

import numpy as np
import torch

from common import cpu, machine
from common.deal import Feed
from common.flags import die, flags, positive, truncation, without_effect
from common.moved import moved
from common.pages import Pages, PagesView, Pool, recorded
from common.prefix import Prefix, Prefixes
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


@dataclass(eq=False)
class Sequence:
    """A sample in the making."""
    sample: Sample           # its tokens here: from before it entered; forced, resumed or preempted
    prefix: Prefix           # the prompt and those tokens: what it continues from
    address: int             # of its noise
    max_new: int
    temperature: float
    top_p: float
    top_k: int
    stop_strings: tuple
    slot: int = -1
    entered: int = -1        # order of entry: the youngest is preempted first
    count: int = 0           # its tokens when the batch was last built
    searched: int = 0        # tokens searched for stop strings so far

    @property
    def cached(self):
        """Keys: that of the last token is stored by the step that reads the token."""
        return len(self.sample.prompt) + self.count - 1


# -----------------------------------------------------------------------------
# storage of keys and values. On a CPU the Slabs of common/slabs.py: a slab per capacity, a full row
# moves to a larger one
#
#   slab 32    [row][row][row]          rows stand side by side from 0: a product per layer and slab
#   slab 64    [ row  ][ row  ]
#   slab 128   [    row     ]
#
# On a GPU the Pool of common/pages.py: small pages, of which sequences share those of their prompt.


SLOTS = 256              # sequences at a time; on a CPU, 1M parameters: twice as fast as 32


# -----------------------------------------------------------------------------
# the batch

FAR = 1 << 40            # the end of padding, which has none
AHEAD = 8                # on a CPU uniform numbers are made for that many steps at once


class Batch:
    """Sequences side by side, and padding up to its size: a column of numbers each, by name. It lasts
    until one enters or leaves, or the storage has to grow."""

    ADVANCED = [                 # a step adds `alive` to all of these in one addition
        "position",              # of the token that the next step reads
        "count",                 # tokens of the response so far
        "write_at",              # where the next token is written down
    ]
    INTS = [
        *ADVANCED,
        "alive",                 # 1; padding: 0
        "end",                   # the count at which it ends: max_new, until a stop token is drawn
        "address",               # of its noise
        "top_k",
    ]
    REALS = ["temperature", "top_p"]

    def __init__(self, sampler, sequences, size=None):
        """Of all that run; or, with a size, of sequences whose first token is drawn: they need no view
        of the storage."""
        self.truncated = any(s.sample.kept is not None for s in sequences)
        self.strings = any(s.stop_strings for s in sequences)
        self.steps = 0                           # done so far
        self.valid_for = 0                       # steps until the storage has to grow
        self.view = None                         # the storage's: advance(position_B), then attend per layer
        self.forward = sampler.model
        self.noise = None                        # (AHEAD, B) uniform numbers, where they are made ahead
        if size is None:
            size = next(size for size in sampler.sizes if size >= len(sequences))
            if sampler.replayed:
                sampler._capture(self.truncated)
            order, self.view, self.valid_for = sampler.storage.decode(sequences, size)
            sequences = [sampler.running[slot] for slot in order]
            if sampler.alone and size == 1:
                self.forward = sampler.model.lone_row(*sampler.storage.row(order[0]))
        self.sequences = sequences
        self.size = size

        slots = [s.slot for s in sequences] + [sampler.slots] * (size - len(sequences))
        ints = sampler.ints[:, :size]
        reals = sampler.reals[:, :size]
        ints.copy_(torch.from_numpy(sampler.ints_of_slots[:, slots]))
        reals.copy_(torch.from_numpy(sampler.reals_of_slots[:, slots]))
        vars(self).update(zip(self.INTS, ints))
        vars(self).update(zip(self.REALS, reals))
        self.advanced = ints[: len(self.ADVANCED)]
        self.token = sampler.token[:size]        # that the next step reads
        self.token.copy_(sampler.tokens[self.write_at - 1])


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
        self.prefixes = Prefixes(self.model, self.storage, self.chunk, self.multiple)
        self.graphs = {}                 # (size, truncated) -> CUDA graph
        self.is_stop = torch.zeros(self.c.vocab_size, dtype=torch.bool, device=device)
        # what was sampled, `width` places per slot; padding writes behind them
        self.width = self.max_len + self.storage.check_every
        places = (self.slots + 1) * self.width
        self.tokens = torch.zeros(places, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(places, device=device)
        self.kept = torch.zeros(places, device=device)
        # the columns of the batch, which change with every step
        self.ints = torch.zeros(len(Batch.INTS), self.sizes[-1], dtype=torch.int64, device=device)
        self.reals = torch.zeros(len(Batch.REALS), self.sizes[-1], device=device)
        self.token = torch.zeros(self.sizes[-1], dtype=torch.int64, device=device)
        self.ahead = torch.arange(AHEAD, device=device).unsqueeze(1)
        # on the host, of each slot: as its batch was built. The last stays padding
        self.ints_of_slots = np.zeros((len(Batch.INTS), self.slots + 1), dtype=np.int64)
        self.reals_of_slots = np.ones((len(Batch.REALS), self.slots + 1), dtype=np.float32)
        self.ints_of_slots[Batch.INTS.index("write_at")] = self.slots * self.width
        self.ints_of_slots[Batch.INTS.index("end")] = FAR

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
        bar = progress(None, "rollout") if bar else None
        if bar is not None:
            bar.unit = " tokens"

        place = {id: i for i, id in enumerate(ids)}
        prompts, limits, visits = (dict(zip(ids, values)) for values in (prompts, limits, visits))
        feed = Feed(self, prompts, n, limits, visits=visits, ahead=int(self.deterministic), seed=seed,
                    temperature=temperature, top_p=top_p, top_k=top_k, stop_strings=stop_strings)
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

    # --- one prompt

    def submit(self, problem_id, prompt, n, max_new, *, seed=0, visit=0, temperature=1.0, top_p=1.0,
               top_k=0, resume=(), stop_strings=()):
        """n samples of a prompt join the queue. resume: what to continue; its tokens count in
        max_new. A Sample continues under its own index, with its log-probs; a list of tokens is
        forced on the sample of its place in the list. If n is more, the rest start fresh."""
        self._check(problem_id, prompt, n, max_new, temperature, top_p, top_k, stop_strings)
        who = f"problem {problem_id}: "
        if len(resume) > n:
            raise ValueError(who + f"{len(resume)} samples to resume, n = {n}")
        prompt = list(prompt)
        limit = min(max_new, self.max_len - len(prompt))

        samples = {}                     # by index
        for place, old in enumerate(resume):
            if not isinstance(old, Sample):
                old = Sample(prompt, old, [NAN] * len(old), "aborted", problem_id, place, visit)
            if len(old.tokens) >= limit:
                raise ValueError(who + f"a sample to resume has {len(old.tokens)} tokens already, max_new is "
                                 f"{limit}")
            if old.index in samples:
                raise ValueError(who + f"two samples to resume have index {old.index}, and so the same noise")
            samples[old.index] = old
        for i in [i for i in range(n) if i not in samples][: n - len(samples)]:
            samples[i] = Sample(prompt, [], [], "aborted", problem_id, i, visit)

        noises = address(seed, visit, problem_id, torch.tensor(list(samples))).tolist()
        whole = Prefix(prompt, waiting=n)
        for (index, old), noise in zip(samples.items(), noises):
            sample = Sample(prompt, list(old.tokens), list(old.logprobs), "aborted", problem_id, index, visit)
            if top_k or top_p < 1:
                sample.kept = list(old.kept or [0.0] * len(old.tokens))
            self.waiting.append(Sequence(sample, whole.longer(sample.tokens), noise, limit,
                                         temperature, top_p, top_k, tuple(stop_strings)))

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
                self._write_back()
                self._make_room()
                self.batch = Batch(self, list(self.running.values()))
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
        if hidden_BD is None:
            b.view.advance(b.position)
            hidden_BD = b.forward(b.token, b.position, b.view.attend)

        # a number in [0, 1) per sequence, from the address of its next token
        if self.replayed or b.view is None:
            uniform_B = uniform_at(b.address, b.count)
        else:
            if b.steps % AHEAD == 0:
                b.noise = uniform_at(b.address, b.count + self.ahead)
            uniform_B = b.noise[b.steps % AHEAD]

        truncation = (b.top_k, b.top_p) if b.truncated else ()
        token_B, logp_B, kept_B = draw_next(
            hidden_BD, self.model.head_weight, uniform_B, b.temperature, *truncation)
        self.tokens.index_copy_(0, b.write_at, token_B)
        self.logprobs.index_copy_(0, b.write_at, logp_B)
        if b.truncated:
            self.kept.index_copy_(0, b.write_at, kept_B)
        b.token.copy_(token_B)
        b.advanced.add_(b.alive)
        # a stop token ends its sequence here: the end becomes the count that it has now
        stops_B = self.is_stop.take(token_B).logical_or_(logp_B.isnan())
        torch.where(stops_B, torch.minimum(b.end, b.count), b.end, out=b.end)

    def _admit(self):
        """Waiting sequences enter, while there are slots for them and what they continue from is
        computed. Its last hidden state gives their first token."""
        first = [s.prefix for s in islice(self.waiting, self.free.left)]
        computed = self.prefixes.compute(first)

        # a slot each
        entering = {}                                # Sequence -> that hidden state
        while self.waiting and self.free.left:
            s = self.waiting[0]
            slot = self.free.take()
            if s.prefix.hidden is None or not self.storage.enter(s.prefix, slot, len(self.running)):
                self.free.free(slot)
                stuck = not (entering or computed or self.running)
                if stuck and self.prefixes.make_way([s.prefix for s in self.waiting]):
                    continue
                break
            self.running[slot] = s
            self.waiting.popleft()
            s.slot = slot
            s.entered = next(self.entries)
            entering[s] = s.prefix.hidden
            self.prefixes.entered(s.prefix)
        if not entering:
            return

        # their columns
        self._end_batch()
        for s in entering:
            tokens = s.sample.tokens
            begin = s.slot * self.width
            s.count = len(tokens)
            s.searched = 0
            if tokens:                               # a stop string may begin in them
                self.tokens[begin : begin + s.count] = torch.tensor(tokens, device=self.device)
            numbers = dict(
                position=s.cached, count=s.count, write_at=begin + s.count, alive=1, end=s.max_new,
                address=s.address, top_k=s.top_k, top_p=s.top_p, temperature=s.temperature)
            self.ints_of_slots[:, s.slot] = [numbers[name] for name in Batch.INTS]
            self.reals_of_slots[:, s.slot] = [numbers[name] for name in Batch.REALS]

        # their first token
        hiddens = list(entering.values())
        hiddens += hiddens[:1] * (-len(hiddens) % self.multiple)
        self.batch = Batch(self, list(entering), len(hiddens))
        self._next_token(self.batch, torch.stack(hiddens))
        self.batch.steps = 1
        self._end_batch()

    # --- the batch

    def _make_room(self):
        """In the storage, for the keys of the steps until the next look."""
        for s in sorted(self.running.values(), key=lambda s: s.entered):
            while s.slot in self.running and not self.storage.grow(s):
                self._preempt()

    def _preempt(self):
        """No page is left: a prefix that only waits goes first, then the youngest sequence.
        Computed again later."""
        if self.prefixes.give_up_one([s.prefix for s in self.waiting]):
            return
        youngest = max(self.running.values(), key=lambda s: s.entered)
        self._remove(youngest, youngest.count)
        youngest.prefix = youngest.prefix.longer(youngest.sample.tokens)
        youngest.prefix.root.waiting += 1
        self.waiting.appendleft(youngest)

    def _write_back(self):
        """The batch is over: how far its sequences are."""
        b = self.batch
        self.batch = None
        if b is not None and b.steps:
            slots = [s.slot for s in b.sequences]
            self.ints_of_slots[: len(Batch.ADVANCED), slots] += b.steps
            for s in b.sequences:
                s.count += b.steps

    def _end_batch(self):
        """Finished sequences leave, and nothing is in the batch alone: slots may change hands."""
        if self.batch is not None:
            self._collect_finished()
            self._write_back()

    # --- out, at the end

    def _collect_finished(self):
        """Which sequences have ended? The only place where the host waits for the device."""
        b = self.batch
        if not b.strings and not (b.count >= b.end).any():
            return
        finished = []
        for s, tokens, end in zip(b.sequences, b.count.tolist(), b.end.tolist()):
            string_end = self._string_end(s, min(tokens, end))
            end = min(end, string_end)
            if tokens >= end:
                finished.append((s, end, end == string_end))
        if not finished:
            return
        self._write_back()
        for s, end, by_string in finished:
            self._remove(s, end)
            sample = s.sample
            if math.isnan(sample.logprobs[-1]):
                place = f"problem {sample.problem}, sample {sample.index}, token {end - 1}"
                self.reset()
                raise ValueError(f"step {self.steps_done}: the logits of {place} are not finite: the "
                                 "weights have diverged, or overflow on this prompt")
            stopped = by_string or sample.tokens[-1] in self.stop
            sample.finished = "stop" if stopped else "length"
            self.ended.append(sample)

    def _string_end(self, s, n):
        """-> after which of its first n tokens the text holds a stop string, or FAR. Only the tail of
        each new token is decoded; what matched stays. One in the text to resume stops nothing."""
        strings = s.stop_strings
        if not strings:
            return FAR
        # a token is a byte or more, and 3 more bytes may be half a character
        reach = max(len(x.encode()) for x in strings) + 4
        first = s.slot * self.width
        start = max(0, s.searched - reach)
        tokens = self.tokens[first + start : first + n].tolist()
        given = len(s.sample.tokens)                        # of these, those that it entered with
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
        got = slice(first + len(s.sample.tokens), first + end)
        s.sample.tokens += self.tokens[got].tolist()
        s.sample.logprobs += self.logprobs[got].tolist()
        if s.sample.kept is not None:
            s.sample.kept += self.kept[got].tolist()

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
        sequences = [s for s in everyone if s.sample.problem == problem_id]
        for s in sequences:
            if s.slot >= 0:
                self._remove(s, s.count)
            self.prefixes.close(s.prefix)
            self.prefixes.close(s.prefix.root)
        self.waiting = deque(s for s in self.waiting if s.sample.problem != problem_id)
        return sorted((s.sample for s in sequences), key=lambda sample: sample.index)

    @torch.inference_mode()
    def salvage(self):
        """After an interrupt that may have hit anywhere: what was written down, and a fresh engine.
        -> Samples, those that had ended and all others as aborted"""
        b = self.batch
        samples = list(self.ended)
        ends = {}                        # between two looks a sequence runs on behind its stop
        if b is not None:
            ends = dict(zip(b.sequences, b.end.tolist()))
        for s in dict.fromkeys([*self.running.values(), *self.waiting]):
            sample = s.sample
            if s.slot in self.running:
                steps = b.steps if s in ends else 0
                self._take_along(s, min(s.count + steps, ends.get(s, FAR)))
            columns = [x for x in (sample.tokens, sample.logprobs, sample.kept) if x is not None]
            n = min(s.max_new, *map(len, columns))
            for x in columns:
                del x[n:]
            samples.append(sample)
        self.reset()
        return samples

    # --- CUDA graphs

    def _capture(self, truncated):
        """A graph of _next_token per batch size. Once, with and without truncation."""
        if (self.sizes[0], truncated) in self.graphs:
            return
        self.storage.table.zero_()
        batches = {size: Batch(self, [], size) for size in self.sizes}   # padding, which writes into page 0
        for size, b in batches.items():
            b.view = PagesView(self.storage, size)
            b.truncated = truncated

        def next_token(size):
            self._next_token(batches[size])

        for size, graph in recorded(next_token, self.sizes):
            self.graphs[size, truncated] = graph


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
