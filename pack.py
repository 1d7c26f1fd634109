"""
pack.py: what runs together, by length. Samples in, rows of tokens and equal work per rank out, nothing lost.

Responses differ in length by 30x. The usual recipe pads every sequence of a micro-batch to the longest one, so most of
an update multiplies padding. Here sequences lie one after another in a row of at most `budget` tokens:

    padded                 packed, row of 16
    aaaaaaaaaaaa....       aaaaaaaaaaaabbbb       pack():    the fullest row that still has room, longest first
    bbbb............       ccccccccdddddeee       balance(): the least loaded rank, most work first
    cccccccc........                              rows():    one Batch: tokens, positions, who sees whom, what is trained
    ddddd...........                              batches(): all of it, from groups of Samples to this rank's Batches
    eee.............

and the prompts of a step are chosen so that nobody waits for the longest response (tail batching, arXiv 2509.21009):

    Rounds                 a short round launches more than it needs and ends when enough is in; what was too long is queued, and when
                           the queue is a batch, a long round runs it. Pure scheduling: the engine that samples is handed in

Deleted from the usual recipe, and why:
- padding, attention masks, labels of -100: a Batch lists the rows that predict (at_N) and what they predict, nothing else;
- equal counts per rank: the loss is a sum and the normaliser is global, so ranks get equal work, not equal numbers;
- copies of the prompt: the responses of a prompt that meet in a row store it once and are exact all the same.

    python pack.py lengths.json                          a picture of rows and rank loads for a list of lengths
    python pack.py lengths.json --row-tokens 16384 --ranks 8
"""

import heapq
import json
import math
import sys
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common.run import die, flags, gather, positive

# -----------------------------------------------------------------------------
# bins: best fit decreasing
#
#   space left   0  1  2  3  4  5  6        a bit for every amount of space that some open bin has left; the fullest
#   free         -  0  1  0  0  1  0        bin that takes 3 tokens is the lowest set bit at or above 3: here, 5 left


def pack(lengths, budget):
    """-> bins: lists of indices whose lengths add up to at most `budget`. 20,000 lengths take 10 ms."""
    same = {}                                                    # length -> the items that have it: a counting sort
    for i, n in enumerate(lengths):
        if not 1 <= n <= budget:
            cure = f"a row takes {budget}, raise --row-tokens to at least {n}" if n > 0 else "leave it out"
            raise ValueError(f"item {i} has {n} tokens: {cure}")
        same.setdefault(n, []).append(i)
    bins, opened, free = [], {}, 0                               # opened[space]: the bins with that much space left
    for n in sorted(same, reverse=True):
        items, at = same[n], 0
        while at < len(items):
            if fits := free >> n:
                space = n + (fits & -fits).bit_length() - 1
                bin = opened[space].pop()
                if not opened[space]:
                    free ^= 1 << space
            else:
                space, bin = budget, []
                bins.append(bin)
            more = items[at : at + space // n]                   # after one of them this bin is still the best for the next
            bin += more
            at += len(more)
            space -= n * len(more)
            if space:
                opened.setdefault(space, []).append(bin)
                free |= 1 << space
    return bins


# -----------------------------------------------------------------------------
# ranks: most work first, to whoever has least
#
#   rank 0  aaaaaaaaaaaaaa              the longest item is a floor no dealing can beat: a rank holding only it is done
#   rank 1  bbbbbbbbb ffff              when it ends, and the others may as well be shorter
#   rank 2  cccccc ddddd ee


def cost(shape, n, before=0, predicted=None):
    """Forward flops of n tokens that see `before` tokens ahead of them; the backward is twice that for each term, so it cancels.
    shape: anything with a GPTConfig's sizes. Linear in n by the matrices, quadratic by pairs of tokens that attend."""
    heads, kv_heads = shape.n_head * shape.head_dim, shape.n_kv_head * shape.head_dim
    token = 2 * shape.n_layer * shape.d_model * (2 * heads + 2 * kv_heads + 3 * shape.d_ff)
    row = 2 * shape.d_model * shape.vocab_size                   # the head runs on the rows that predict
    pair = 4 * shape.n_layer * heads
    return n * token + (n if predicted is None else predicted) * row + pair * (n * before + n * (n + 1) // 2)


def balance(costs, ranks):
    """-> shares: for each rank the list of its items. Counts may differ."""
    shares, heap = [[] for _ in range(ranks)], [(0, r) for r in range(ranks)]
    for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, r = heap[0]
        shares[r].append(i)
        heapq.heapreplace(heap, (load + costs[i], r))
    # with few items a rank may end 5% over: let the heaviest trade an item for a lighter one, or for nothing, while that helps
    loads, costs = [load for load, _ in sorted(heap, key=lambda x: x[1])], [*costs, 0]
    floor = max(sum(loads) / ranks, max(costs))
    while max(loads) > 1.001 * floor:
        top = loads.index(max(loads))
        trades = [(max(loads[top] - d, loads[r] + d), d, r, i, j) for r in range(ranks) if r != top for i in shares[top]
                  for j in (*shares[r], -1) if (d := costs[i] - costs[j]) > 0]      # item -1 costs nothing
        heavier, d, r, i, j = min(trades, default=(loads[top], 0, 0, 0, 0))
        if heavier >= loads[top]:
            break
        loads[top], loads[r] = loads[top] - d, loads[r] + d
        shares[top] = [x for x in shares[top] if x != i] + [j] * (j >= 0)
        shares[r] = [x for x in shares[r] if x != j] + [i]
    return shares


# -----------------------------------------------------------------------------
# segments: what stands in a row
#
#   alone    pppprrrrr ppppsss pppptttt       three responses of a prompt, the prompt three times
#   shared   pppp rrrrr sss tttt              once: each response sees the prompt's keys, its positions go on after the
#            0123 45678 456 4567              prompt, and the prompt's last row predicts the first token of all three.
#   a tree   pppp rrrrr qqq uu vvv            Parents have parents: u and v answer q, a second turn that goes on from r
#            -1   0     1   2  2


@dataclass
class Segment:
    """Consecutive tokens of one sequence. They see their parent's tokens (and its parents') and then their own."""
    tokens: list
    parent: int = -1                                             # its place in the same list, before its children; -1: none
    sample: object = None                                        # whose response `tokens` ends with; None: nothing is trained


def alone(sample):
    return [Segment(sample.prompt + sample.tokens, -1, sample)]


def tree(samples):
    """Samples as segments that share: a prompt is stored once, and one that goes on from another text here (an earlier
    prompt, or an earlier prompt with its response) hangs under it."""
    if len(samples) == 1:
        return alone(samples[0])
    segments, stored = [], {}                                    # stored: a text from its first token -> the segment it ends in
    longest = max(len(s.prompt) for s in samples)
    for sample in sorted(samples, key=lambda s: len(s.prompt)):
        prompt = tuple(sample.prompt)
        if prompt not in stored:
            stem = max((text for text in stored if prompt[: len(text)] == text), key=len, default=())
            segments.append(Segment(sample.prompt[len(stem) :], stored.get(stem, -1)))
            stored[prompt] = len(segments) - 1
        segments.append(Segment(sample.tokens, stored[prompt], sample))
        if len(prompt) + len(sample.tokens) <= longest:          # some prompt may go on from here
            stored.setdefault(prompt + tuple(sample.tokens), len(segments) - 1)
    return segments


def size(segments):
    return sum(len(s.tokens) for s in segments)


def ahead(segments):
    """How many tokens each segment sees before its own."""
    before = []
    for s in segments:
        before.append(before[s.parent] + len(segments[s.parent].tokens) if s.parent >= 0 else 0)
    return before


# a segment under a parent costs more than its flops: the parent's keys are copied beside its own, and its attention is masked instead of
# causal. One CPU thread, 4M model, prompts of 2..64, 2 or 8 responses of 64..512: 0 to 26 tokens' worth, median 5 (bench/pack.py, part d)
ATTACH = 8


def work(segments, shape):
    return sum(cost(shape, len(s.tokens) + ATTACH * (s.parent >= 0), before, len(s.sample.tokens) if s.sample else 0)
               for s, before in zip(segments, ahead(segments)))


# -----------------------------------------------------------------------------
# a Batch: one packed row


@dataclass
class Batch:
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    at_N: torch.Tensor                                           # rows of the hidden states that predict; one row may stand here often
    targets_N: torch.Tensor
    sample_N: torch.Tensor                                       # whose prediction it is: an index into samples
    old_logp_N: torch.Tensor                                     # the sampler's log-prob
    kept_N: torch.Tensor                                         # log of the mass that truncation left, 0 without truncation
    advantage_N: torch.Tensor
    weight_N: torch.Tensor                                       # ones, for the caller to overwrite
    cu_seqlens: list
    max_len: int
    parent: list
    samples: list

    def to(self, device):
        """The same Batch on a device, in one copy: all tensors go as one buffer and are views of it there."""
        if torch.device(device).type == "cpu":
            return self
        names = [f.name for f in fields(self) if isinstance(getattr(self, f.name), torch.Tensor)]
        parts = [getattr(self, n) for n in names]                # int64 before float32, so that every view is aligned
        flat = torch.empty(sum(p.nbytes for p in parts), dtype=torch.uint8, pin_memory=torch.device(device).type == "cuda")
        torch.cat([p.contiguous().view(torch.uint8) for p in parts], out=flat)
        there = flat.to(device, non_blocking=True).split([p.nbytes for p in parts])
        return Batch(**{**vars(self), **{n: t.view(p.dtype) for n, p, t in zip(names, parts, there)}})


def rows(segments):
    """-> the Batch of these segments, any forest of them. Every response token is a prediction, the stop token too: a model whose
    stop is masked never learns to stop. Tokens with log-prob nan were forced on the sampler and are not predictions."""
    # no segments: one token that nobody predicts, so that a rank out of work still runs a forward and its collectives
    segments = segments or [Segment([0])]
    before = ahead(segments)
    # what a segment sees is more than what its parent sees, so parents come first; and attention takes neighbours of one length as a view
    order = sorted(range(len(segments)), key=lambda i: (before[i], len(segments[i].tokens)))
    place = {i: k for k, i in enumerate(order)}
    cu, parent, samples = [0], [], []
    tokens, positions, at, targets, owner, old, kept, advantage = [], [], [], [], [], [], [], []
    for i in order:
        s, n, start = segments[i], len(segments[i].tokens), cu[-1]
        parent.append(place[s.parent] if s.parent >= 0 else -1)
        tokens += s.tokens
        positions += range(before[i], before[i] + n)
        cu.append(start + n)
        if s.sample:
            m, a = len(s.sample.tokens), s.sample.advantage      # a token is predicted by the row before it, or by its parent's last
            at += range(start + n - m - 1, start + n - 1) if m < n else [cu[parent[-1] + 1] - 1, *range(start, start + n - 1)]
            targets += s.sample.tokens
            owner += [len(samples)] * m
            old += s.sample.logprobs
            kept += s.sample.kept or [0.0] * m
            advantage += a if isinstance(a, list) else [a] * m
            samples.append(s.sample)
    real = torch.tensor([old, kept, advantage, [1.0] * len(old)], dtype=torch.float32)
    trained = ~real[0].isnan()
    return Batch(torch.tensor(tokens), torch.tensor(positions), *torch.tensor([at, targets, owner], dtype=torch.int64)[:, trained],
                 *real[:, trained], cu, max(b - a for a, b in zip(cu, cu[1:])), parent, samples)


# -----------------------------------------------------------------------------
# from groups to Batches
#
#   group of 8, 2 right   items: [p rrr sss ttt] [p uu vv ww xx yy]       an item stays together in a row and on a rank
#   group of 1            items: [pppp rrrrrr]
#
#   rank 0   [item item][item item item][item]            every rank runs as many micro-batches as the busiest one;
#   rank 1   [item][item item]          [    ]            the empty ones weigh zero


def check(sample, budget):
    name, p, n = f"problem {sample.problem}, sample {sample.index}", len(sample.prompt), len(sample.tokens)
    if p + n > budget:
        raise ValueError(f"{name}: {p} prompt + {n} response tokens, a row takes {budget}: raise --row-tokens to at least {p + n}")
    if p == 0:
        raise ValueError(f"{name}: the prompt has no token, so nothing predicts the first one of the response: begin it with one")
    if len(sample.logprobs) != n:
        raise ValueError(f"{name}: {len(sample.logprobs)} log-probs for {n} tokens: give one for each (nan: forced, not trained)")


def right(sample):
    return sample.reward > 0.5


def cut(samples, budget, most, shape):
    """A group that shares, as items of at most `budget` tokens and `most` work: halved until they fit, each with a copy of its prompts."""
    item, half = tree(samples), len(samples) // 2
    if half == 0 or (size(item) <= budget and work(item, shape) <= most):
        return [item]
    return cut(samples[:half], budget, most, shape) + cut(samples[half:], budget, most, shape)


def join(items):
    """Items one after another in a row: a parent's place moves by what stands before its item."""
    segments = []
    for item in items:
        base = len(segments)
        segments += [Segment(s.tokens, s.parent + base if s.parent >= 0 else -1, s.sample) for s in item]
    return segments


def plan(groups, budget, shape, ranks=1, order="length", share=None):
    """-> for each rank its micro-batches, each a list of segments, as many on every rank. groups: lists of Samples that may
    share, or Samples. The answer depends on nothing but the arguments: ranks that hold the same samples agree without talking.
    order  "length": long rows first, so that a row too big for memory fails at once. "correct": right and wrong answers in rows of
           their own, right first. "mixed": together, a row of many right ones beside a row of few. All three are the same sum,
           so one update does not change; they differ where several updates are made of one plan.
    share  None: where it is predicted to pay. True, False: always, never."""
    if order not in ("length", "correct", "mixed"):
        raise ValueError(f'order is "{order}": it must be length, correct or mixed')
    items, sharing = [], []
    for group in groups:
        # a response without tokens predicts nothing. Sorted by text, so that what shares stays together when cut
        group = sorted((s for s in (group if isinstance(group, list) else [group]) if s.tokens), key=lambda s: (s.prompt, s.tokens))
        for sample in group:
            check(sample, budget)
        apart = [[s for s in group if right(s)], [s for s in group if not right(s)]]
        for samples in apart if order == "correct" else [group]:
            separate = [alone(s) for s in samples]
            if len(samples) < 2 or share is False or not (share or work(tree(samples), shape) < sum(work(s, shape) for s in separate)):
                items += separate
            else:
                sharing.append(samples)
    total = sum(work(item, shape) for item in items) + sum(work(tree(samples), shape) for samples in sharing)
    for samples in sharing:                                      # one heavy group must not make its rank the slowest
        items += cut(samples, budget, total / ranks / 2 if ranks > 1 else total, shape)
    micro, shares = [[] for _ in range(ranks)], balance([work(item, shape) for item in items], ranks)
    for kind in (True, False) if order == "correct" else (None,):
        for r, mine in enumerate(shares):
            mine = [items[i] for i in mine if kind is None or right(next(s.sample for s in items[i] if s.sample)) == kind]
            made = [join([mine[i] for i in bin]) for bin in pack([size(item) for item in mine], budget)]
            made.sort(key=lambda row: -max(len(s.tokens) for s in row))
            if order == "mixed":                                 # from both ends of the rows sorted by how many are right
                hits = [[right(s.sample) for s in row if s.sample] for row in made]
                up = sorted(range(len(made)), key=lambda i: sum(hits[i]) / len(hits[i]))
                made = [made[up[k // 2 if k % 2 else -1 - k // 2]] for k in range(len(made))]
            micro[r] += made
        most = max(map(len, micro))
        micro = [m + [[]] * (most - len(m)) for m in micro]
    return micro


def batches(groups, budget, shape, rank=0, ranks=1, order="length", share=None):
    """-> this rank's Batches. Every rank passes all groups and gets equally many, empty ones included."""
    return [rows(segments) for segments in plan(groups, budget, shape, ranks, order, share)[rank]]


# -----------------------------------------------------------------------------
# rounds: which prompts are sampled together, so that no rank waits for the longest response
#
#   short round, 4 prompts wanted, 5 launched     aaa  bbbbb  cc  dddd | eeeeeeeeeeeeeee     the 4th is in: e is aborted and queued
#   long round, when the queue holds 4            eeeeeeeeeeeeeee jjjjjjjjjj oooooooooooooooooo ttttttttttttt          no race
#
#            who races               an aborted sample                            what is trained
#   race     prompts and samples     is drawn anew                                the short ones of a prompt: biased
#   prompt   prompts                 is drawn again, with the same noise          everything once, in another order: unbiased
#   continue prompts                 goes on where it was                         everything once; its first tokens are an older policy's
#   april    prompts                 goes on in the very next round               the same, and there are no long rounds
#   off      nobody                                                               everything


@dataclass
class Launch:
    """A prompt, from its first launch until its group is in."""
    id: int
    visit: int                                                   # of its noise
    have: list = field(default_factory=list)                     # continue: samples that ended before it was deferred,
    resume: list = field(default_factory=list)                   # and those that had begun
    first: list = field(default_factory=list)                    # race: (tokens, ended) of its samples when it was deferred


@dataclass
class Round:
    launches: list
    want: int                                                    # it ends when so many prompts are done
    n: int                                                       # samples of each
    long: bool


def in_order(want):
    """-> claim(done): done prompts of this rank in, those of them that count out, and how many there are in all. Ranks meet, and what
    was done in an earlier decode step comes first; then the order of launching."""
    taken = 0

    def claim(done):
        nonlocal taken
        let = set(sorted(x for part in gather(done) for x in part)[: want - taken])
        taken += len(let)
        return [x for x in done if x in let], taken
    return claim


def as_they_come(want, add):
    """The same without meeting: add(k) adds to a counter that all ranks share, and says where it is."""
    return lambda done: ([x for x in done if add(1) <= want], add(0))


class Rounds:
    def __init__(self, mode, prompts, n, more_prompts=1.25, more_samples=1.25):
        """prompts, n: what a round yields. more_*: how many times that is launched."""
        self.mode, self.prompts, self.n = mode, prompts, n
        self.more = 1.0 if mode == "off" else more_prompts
        self.launched = math.ceil(more_samples * n) if mode == "race" else n
        self.queue = []                                          # Launches, first in, first out
        self.window = deque(maxlen=20)                           # what recent rounds kept, and of what: see selected()
        self.wasted, self.older, self.long, self.most = 0, 0, False, math.inf    # of the last round; older: tokens of earlier policies
        self.bias = math.nan if mode == "race" else 0.0          # at the last long round

    def plan(self, fresh, want=None):
        """-> the next Round. fresh(k): k new (id, visit) or fewer, none of them in the queue. want: fewer prompts, to fill up a step."""
        want = want or self.prompts
        self.long = self.mode != "april" and want == self.prompts and len(self.queue) >= want
        first = want if self.long or self.mode == "april" else 0
        launches, self.queue = self.queue[:first], self.queue[first:]
        if not self.long:
            launches += [Launch(*x) for x in fresh(math.ceil(self.more * want) - len(launches))]
        if not launches:                                         # every problem there is waits in the queue
            launches, self.queue, self.long = self.queue[:want], self.queue[want:], True
        return Round(launches, min(want, len(launches)), self.n if self.long else self.launched, self.long)

    def run(self, engine, round, prompts, max_new, *, claim=None, mine=None, every=1, room=math.inf, score=None, **settings):
        """Yields this rank's groups as it is settled that they count; None: nothing is left to sample here, others are not done.
        prompts: {id: tokens}; max_new, settings: submit's. every: steps between two claims. mine: this rank's places in the round,
        taken while fewer than `room` samples are live. score(ended, idle): those whose rewards are in."""
        claim, score = claim or in_order(round.want), score or (lambda ended, idle: ended)
        place, self.most = {l.id: i for i, l in enumerate(round.launches)}, max_new
        mine = iter(range(len(place)) if mine is None else mine)
        opened, came, ended, cut, kept = {}, {}, {}, {}, {}      # by id: Launch; samples that are in, ended, aborted; groups that count
        taken, step, more = 0, 0, True
        try:
            while taken < round.want:
                done, block = [], step + every
                while step < block:
                    step, new = step + 1, []
                    while more and engine.live < room:
                        launch = next((round.launches[i] for i in mine), None)
                        more = launch is not None
                        if more:
                            id, old = launch.id, launch.resume
                            opened[id], came[id], ended[id], cut[id] = launch, [], list(launch.have), []
                            new += launch.have
                            if len(launch.have) < round.n:       # all may have ended, and the prompt was deferred for it came too late
                                engine.submit(id, prompts[id], round.n - len(launch.have), max_new, visit=launch.visit, resume=old,
                                              **settings)
                    idle = not engine.live
                    for s in sorted(() if idle else engine.step(), key=lambda s: (place[s.problem], s.index)):
                        ended[s.problem].append(s)
                        new.append(s)
                    for s in score(new, idle and not new):
                        came[s.problem].append(s)
                        if len(came[s.problem]) == self.n:
                            done.append((step, place[s.problem]))
                            if round.n > self.n:                 # the others of this prompt lost the race
                                cut[s.problem] = engine.abort(s.problem)
                    if idle and not more:
                        step = block                             # time goes on for those who have nothing to do
                let, taken = claim(done)
                for _, i in let:
                    id = round.launches[i].id
                    kept[id] = sorted(came[id][: self.n], key=lambda s: s.index)
                    yield kept[id]
                if idle and not more and taken < round.want:
                    yield None
        finally:
            for id in opened:
                if id not in kept:
                    cut[id] += engine.abort(id)
        self._settle(round, opened, ended, cut, kept)

    def _settle(self, round, opened, ended, cut, kept):
        """Who is queued, with what; and the evidence. Every rank comes to the same."""
        records, deferred, wasted, older = [], {}, 0, 0
        for id, launch in opened.items():
            seen = [(len(s.tokens), 1) for s in ended[id]] + [(len(s.tokens), 0) for s in cut[id]]
            if id in kept:
                lengths = [len(s.tokens) for s in kept[id]]
                records.append((lengths, launch.first or seen, bool(launch.first)))
                wasted += sum(n for n, _ in seen) - sum(lengths)
                older += sum(len(s.tokens) for s in launch.have + launch.resume)
                continue
            deferred[id] = launch
            if self.mode in ("continue", "april"):
                launch.have, launch.resume = ended[id], cut[id]
                continue
            wasted += sum(n for n, _ in seen)
            if self.mode == "race":                              # the next launch is another draw
                launch.visit, launch.first = launch.visit + 1, launch.first or seen
        parts = gather((records, deferred, wasted, older, set(kept)))
        self.window.append(sorted(x for p in parts for x in p[0]))
        deferred = {id: launch for p in parts for id, launch in p[1].items()}
        self.wasted, self.older, there = sum(p[2] for p in parts), sum(p[3] for p in parts), set().union(*(p[4] for p in parts))
        self.queue += [deferred.get(l.id, l) for l in round.launches if l.id not in there]
        if self.mode == "race" and (round.long or not self.queue):           # a whole period, with those that were deferred in it
            self.bias = selected([x for part in self.window for x in part], self.most)

    def evidence(self):
        """Is the tail between prompts, where racing them is harmless, or within them? Variances of log length, of recent kept groups."""
        logs = [np.log(lengths) for part in self.window for lengths, _, _ in part]
        within = float(np.mean([x.var(ddof=1) for x in logs])) if logs else math.nan
        between = float(np.var([x.mean() for x in logs], ddof=1)) - within / self.n if len(logs) > 1 else math.nan
        kept = sum(sum(lengths) for lengths, _, _ in self.window[-1])
        return dict(length_between=between, length_within=within, length_bias=self.bias, queue=len(self.queue), long=int(self.long),
                    wasted=self.wasted / max(1, self.wasted + kept), older=self.older / max(1, kept))

    def state_dict(self):
        return {k: getattr(self, k) for k in ("queue", "window", "wasted", "older", "long", "bias")}

    def load_state_dict(self, state):
        vars(self).update(state)


def longer(seen):
    """(tokens, ended) of samples, some aborted -> lengths n in order, and the share that is longer than n: the product-limit estimate."""
    n, over = np.array(sorted(seen, key=lambda x: (x[0], -x[1])), float).T
    return n, np.cumprod(1 - over / np.arange(len(n), 0, -1))


def selected(records, most):
    """How much longer kept responses are than all that were drawn (below 0: shorter). records: for each prompt the lengths kept, the
    (tokens, ended) of its first launch, which nobody selected, and whether there was another. What was aborted would have become as
    long as others that came so far, in units of a prompt's own median: prompts differ, and the race sees the short ones first."""
    scales, pool = [], []
    for kept, first, again in records:
        seen = first + [(n, 1) for n in kept] if again else first
        n, share = longer(seen)
        scales.append(max(1.0, n[np.argmax(share <= 0.5)] if share[-1] <= 0.5 else n[-1]))
        pool += [(x / scales[-1], over) for x, over in seen]
    n, share = longer(pool)
    rest = np.append(np.cumsum((share[:-1] * np.diff(n))[::-1])[::-1], 0.0)      # the area under `share` beyond n
    drawn = []
    for (_, first, _), scale in zip(records, scales):
        at = np.searchsorted(n, [x / scale for x, _ in first], "right") - 1
        more = np.divide(rest[at], share[at], out=np.zeros(len(at)), where=share[at] > 0) * scale
        drawn.append(np.mean([x if over else min(most, x + m) for (x, over), m in zip(first, more)]))
    return float(np.mean([np.mean(kept) for kept, _, _ in records]) / np.mean(drawn)) - 1


# -----------------------------------------------------------------------------
# python pack.py lengths.json


@dataclass
class Config:
    lengths: str                     # a file with a JSON list of lengths; may stand first, without its flag
    row_tokens: int = 8192           # tokens of a row
    ranks: int = 8                   # ranks to deal to


# the cost of a token and of a pair are those of this shape: Qwen3-0.6B
SHAPE = SimpleNamespace(n_layer=28, n_head=16, n_kv_head=8, head_dim=128, d_model=1024, d_ff=3072, vocab_size=151936)


def picture(path, lengths, bins, budget, loads):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, side) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 1), layout="constrained")
    for b, bin in enumerate(bins[:64]):
        floor = 0
        for k, i in enumerate(bin):
            left.bar(b, lengths[i], bottom=floor, width=1, color=plt.cm.viridis(k % 8 / 7), edgecolor="white", linewidth=0.3)
            floor += lengths[i]
    left.axhline(budget, color="black", linewidth=1)
    shown = ", the first 64" if len(bins) > 64 else ""
    left.set(title=f"{len(lengths)} sequences in {len(bins)} rows of {budget} tokens{shown}", xlabel="row", ylabel="tokens")
    side.bar(range(len(loads)), [load * len(loads) / sum(loads) for load in loads], color=plt.cm.viridis(0.4))
    side.axhline(1, color="black", linewidth=1)
    side.set(title="work of a rank / mean", xlabel="rank")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    config = flags(Config, argv if not argv or argv[0].startswith("-") else ["--lengths", *argv], __doc__)
    positive(config, "ranks")
    try:
        lengths = json.loads(Path(config.lengths).read_text())
        if not isinstance(lengths, list) or not lengths or any(type(n) is not int for n in lengths):
            raise ValueError("it must hold a JSON list of lengths, like [12, 340, 7]")
        bins = pack(lengths, config.row_tokens)
    except (OSError, ValueError) as error:
        die(f"{config.lengths}: {getattr(error, 'strerror', None) or error}")
    costs = [cost(SHAPE, n) for n in lengths]
    loads = [sum(costs[i] for i in share) for share in balance(costs, config.ranks)]
    mean, path = sum(loads) / config.ranks, Path(config.lengths).with_suffix(".png")
    least = max(mean, max(costs))                                # no dealing beats either
    picture(path, lengths, bins, config.row_tokens, loads)
    print(f"fill {sum(lengths) / (len(bins) * config.row_tokens):.2%}: {sum(lengths)} tokens in {len(bins)} rows of {config.row_tokens}")
    print(f"imbalance {max(loads) / mean:.4f} (heaviest of {config.ranks} ranks / mean), {max(loads) / least:.4f} of the least possible")
    print(path)


if __name__ == "__main__":
    main()
