"""
pack.py: samples in, rows of tokens without padding and equal work per rank out, nothing lost.

Responses differ in length by 30x. The usual recipe pads every sequence of a micro-batch to the
longest one, so most of an update multiplies padding. Here sequences lie one after another in a
packed row of at most `budget` tokens:

    padded              packed, row of 16
    aaaaaaaaaaaa....    aaaaaaaaaaaabbbb    pack():    the fullest row that has room, longest first
    bbbb............    ccccccccdddddeee    balance(): the least loaded rank, most work first
    cccccccc........                        rows():    one Batch: tokens, parents, predictions
    ddddd...........                        batches(): all of it, from groups of Samples to Batches
    eee.............

Left out of the usual recipe, and why:
- padding, attention masks, labels of -100: a Batch lists the tokens that predict (at_N) and what
  they predict, nothing else;
- equal counts per rank: the loss is a sum and the normaliser is global, so ranks get equal work;
- copies of the prompt: responses of one prompt that meet in a row store it once, and stay exact.

    python pack.py lengths.json             a picture of rows and rank loads for a list of lengths
    python pack.py lengths.json --row-tokens 16384 --ranks 8
"""

import heapq
import itertools
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from common.flags import die, flags, positive
from common.moved import moved
from kernels import packed_attention

# -----------------------------------------------------------------------------
# bins: best fit decreasing
#
#   space left   0  1  2  3  4  5  6      a bit for every amount of space that some open bin has:
#   free         -  0  1  0  0  1  0      the fullest bin that takes 3 tokens is the lowest bit at or
#                                         above 3, here the one with 5 left


def pack(lengths, budget):
    """-> bins: lists of indices whose lengths add up to at most `budget`. 20,000 take 10 ms."""
    same = {}                            # length -> the items that have it: a counting sort
    for i, n in enumerate(lengths):
        if not 1 <= n <= budget:
            cure = f"a row takes {budget}, raise --row-tokens to at least {n}" if n > 0 else "leave it out"
            raise ValueError(f"item {i} has {n} tokens: {cure}")
        same.setdefault(n, []).append(i)
    bins = []
    opened = {}                          # space -> the bins with that much space left
    free = 0
    for n in sorted(same, reverse=True):
        items = same[n]
        done = 0
        while done < len(items):
            if fits := free >> n:
                space = n + (fits & -fits).bit_length() - 1
                bin = opened[space].pop()
                if not opened[space]:
                    free ^= 1 << space
            else:
                space = budget
                bin = []
                bins.append(bin)
            # after one item of this length the bin is still the best for the next
            more = items[done : done + space // n]
            bin += more
            done += len(more)
            space -= n * len(more)
            if space:
                opened.setdefault(space, []).append(bin)
                free |= 1 << space
    return bins


# -----------------------------------------------------------------------------
# ranks: most work first, to the rank that has least
#
#   rank 0  aaaaaaaaaaaaaa              the longest item is a floor that no dealing can beat
#   rank 1  bbbbbbbbb ffff
#   rank 2  cccccc ddddd ee


def cost(shape, n, before=0, predicted=None):
    """Forward flops of n tokens that see `before` tokens ahead of them: linear in n by the
    matrices, quadratic by pairs of tokens that attend. The backward is twice that for each term,
    so it cancels. shape: anything with a GPTConfig's sizes."""
    heads = shape.n_head * shape.head_dim
    kv_heads = shape.n_kv_head * shape.head_dim
    token = 2 * shape.n_layer * shape.d_model * (2 * heads + 2 * kv_heads + 3 * shape.d_ff)
    prediction = 2 * shape.d_model * shape.vocab_size    # the head runs only where it is needed
    pair = 4 * shape.n_layer * heads
    pairs = n * before + n * (n + 1) // 2
    return n * token + (n if predicted is None else predicted) * prediction + pairs * pair


def balance(costs, ranks):
    """-> shares: for each rank the list of its items. Counts may differ."""
    shares = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for item in sorted(range(len(costs)), key=lambda i: -costs[i]):
        load, rank = heap[0]
        shares[rank].append(item)
        heapq.heapreplace(heap, (load + costs[item], rank))
    return improve(shares, costs)


NOTHING = -1                             # the item that stands for none


def improve(shares, costs):
    """Trade while it helps: with few items a rank may be 5% above the floor. The heaviest rank
    gives an item and takes a lighter one of another rank, or nothing."""
    costs = [*costs, 0]                  # the last one is NOTHING's
    loads = [sum(costs[i] for i in items) for items in shares]
    floor = max(sum(loads) / len(loads), max(costs))
    while max(loads) > 1.001 * floor:
        top = loads.index(max(loads))
        best = min(trades(shares, costs, loads, top), default=None)
        if best is None or best[0] >= loads[top]:
            break
        _, relief, rank, given, taken = best
        loads[top] -= relief
        loads[rank] += relief
        shares[top] = [i for i in shares[top] if i != given] + [taken] * (taken != NOTHING)
        shares[rank] = [i for i in shares[rank] if i != taken] + [given]
    return shares


def trades(shares, costs, loads, top):
    """Every way to lighten rank `top`: (the heavier load of the two afterwards, by how much `top` is
    relieved, the other rank, the item given, the item taken)."""
    others = [rank for rank in range(len(shares)) if rank != top]
    for rank in others:
        for given in shares[top]:
            for taken in (*shares[rank], NOTHING):
                relief = costs[given] - costs[taken]
                if relief > 0:
                    yield max(loads[top] - relief, loads[rank] + relief), relief, rank, given, taken


# -----------------------------------------------------------------------------
# segments: what stands in a row
#
#   alone    pppprrrrr ppppsss pppptttt   three responses of a prompt, the prompt three times
#   shared   pppp rrrrr sss tttt          once: responses see the prompt's keys and continue its
#            0123 45678 456 4567          positions, and its last token predicts the first of each
#   a tree   pppp rrrrr qqq uu vvv        parents have parents: u and v answer q, a turn after r
#            -1   0     1   2  2


@dataclass
class Segment:
    """Consecutive tokens of one sequence. They see the tokens of their parents, then their own."""
    tokens: list
    parent: int = -1                     # its place in the same list, before its children; -1: none
    sample: object = None                # whose response `tokens` ends with; None: not trained


def alone(sample):
    return [Segment(sample.prompt + sample.tokens, -1, sample)]


def tree(samples):
    """Samples as segments that share: a prompt is stored once, and one that continues another
    text here (an earlier prompt, or an earlier prompt with its response) hangs under it."""
    if len(samples) == 1:
        return alone(samples[0])
    segments = []
    stored = {}                          # a text from its first token -> the segment it ends in
    longest = max(len(s.prompt) for s in samples)
    for sample in sorted(samples, key=lambda s: len(s.prompt)):
        prompt = tuple(sample.prompt)
        if prompt not in stored:
            begins = [text for text in stored if prompt[: len(text)] == text]
            stem = max(begins, key=len, default=())
            segments.append(Segment(sample.prompt[len(stem) :], stored.get(stem, -1)))
            stored[prompt] = len(segments) - 1
        segments.append(Segment(sample.tokens, stored[prompt], sample))
        if len(prompt) + len(sample.tokens) <= longest:   # another prompt may continue this text
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


# a segment under a parent costs more than its flops: the parent's keys are copied next to its own,
# and its attention is masked instead of causal. One CPU thread, 4M model, prompts of 2..64, 2 or
# 8 responses of 64..512: as much as 0 to 26 more tokens, median 5 (bench/pack.py, part d)
ATTACH = 8


def work(segments, shape):
    total = 0
    for s, before in zip(segments, ahead(segments)):
        predicted = len(s.sample.tokens) if s.sample else 0
        total += cost(shape, len(s.tokens) + ATTACH * (s.parent >= 0), before, predicted)
    return total


# -----------------------------------------------------------------------------
# a Batch: one packed row


@dataclass
class Batch:
    """A packed row, one micro-batch. (The Batch of rollout.py is another: the sequences that are
    being decoded.)"""
    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    at_N: torch.Tensor                   # where the token is that predicts; it may predict many
    targets_N: torch.Tensor
    sample_N: torch.Tensor               # whose prediction it is: an index into samples
    sampler_logp_N: torch.Tensor         # the sampler's log-prob
    kept_N: torch.Tensor                 # log of the mass that truncation left, 0 without
    advantage_N: torch.Tensor
    weight_N: torch.Tensor               # in the loss
    cu_seqlens: list
    max_len: int
    parent: list
    samples: list

    def hidden(self, model):
        """-> hidden_ND: the model's hidden states at the tokens that predict."""
        attend = packed_attention(self.cu_seqlens, self.max_len, self.parent)
        return model(self.tokens_T, self.positions_T, attend)[self.at_N]

    def to(self, device):
        """The same Batch on a device, by one copy: its tensors there are views of one buffer."""
        if torch.device(device).type == "cpu":
            return self
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, torch.Tensor)}
        sizes = [t.nbytes for t in tensors.values()]     # int64 before float32: every view is aligned
        pinned = torch.device(device).type == "cuda"
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, pin_memory=pinned)
        torch.cat([t.contiguous().view(torch.uint8) for t in tensors.values()], out=buffer)
        parts = buffer.to(device, non_blocking=True).split(sizes)
        there = {name: part.view(t.dtype) for (name, t), part in zip(tensors.items(), parts)}
        return replace(self, **there)


def flat(parts):
    return list(itertools.chain.from_iterable(parts))


def advantages(sample):
    """One for each token."""
    if isinstance(sample.advantage, list):
        return sample.advantage
    return [sample.advantage] * len(sample.tokens)


def predictors(segments, cu, parent):
    """-> for every response token the place in the row of the one that predicts it. segments: in the
    order of the row; cu: where each begins."""
    places = []
    for k, segment in enumerate(segments):
        if segment.sample:
            n = len(segment.sample.tokens)
            last = cu[k + 1] - 1
            if n < len(segment.tokens):  # the prompt stands in the same segment
                places += range(last - n, last)
            else:                        # the parent's last token predicts the first one
                places += [cu[parent[k] + 1] - 1, *range(cu[k], last)]
    return places


def rows(segments):
    """-> the Batch of these segments, any forest of them. Every response token is a prediction,
    the stop token too: a model whose stop is masked never learns to stop. Tokens with log-prob
    nan were forced on the sampler and are not predictions."""
    # no segments: one token that predicts nothing, so that an idle rank still joins collectives
    segments = segments or [Segment([0])]
    # what a segment sees is more than what its parent sees, so parents come first; and attention
    # takes neighbours of one length as a view
    before = ahead(segments)
    order = sorted(range(len(segments)), key=lambda i: (before[i], len(segments[i].tokens)))
    place = {i: k for k, i in enumerate(order)} | {-1: -1}
    parent = [place[segments[i].parent] for i in order]
    lengths = [len(segments[i].tokens) for i in order]
    cu = [0, *itertools.accumulate(lengths)]
    tokens = flat(segments[i].tokens for i in order)
    positions = flat(range(before[i], before[i] + n) for i, n in zip(order, lengths))

    # the predictions, sample by sample, and what the loss knows of each
    predicts = predictors([segments[i] for i in order], cu, parent)
    samples = [segments[i].sample for i in order if segments[i].sample]
    targets = flat(s.tokens for s in samples)
    owner = flat([k] * len(s.tokens) for k, s in enumerate(samples))
    logp = flat(s.logprobs for s in samples)
    kept = flat(s.kept or [0.0] * len(s.tokens) for s in samples)
    advantage = flat(advantages(s) for s in samples)
    weight = flat([s.weight] * len(s.tokens) for s in samples)
    numbers = torch.tensor([logp, kept, advantage, weight], dtype=torch.float32)
    places = torch.tensor([predicts, targets, owner], dtype=torch.int64)
    chosen = ~numbers[0].isnan()         # by the sampler: not forced on it
    logp_N, kept_N, advantage_N, weight_N = numbers[:, chosen]
    at_N, targets_N, sample_N = places[:, chosen]
    return Batch(torch.tensor(tokens), torch.tensor(positions), at_N, targets_N, sample_N, logp_N, kept_N,
                 advantage_N, weight_N, cu, max(lengths), parent, samples)


# -----------------------------------------------------------------------------
# from groups to Batches
#
#   group of 8            items: [p rrr sss ttt] [p uu vv ww xx yy]    an item stays together
#   group of 1            items: [pppp rrrrrr]
#
#   rank 0   [item item][item item item][item]     every rank runs as many micro-batches as the
#   rank 1   [item][item item]          [    ]     busiest one; the empty ones weigh zero


def check(sample, budget):
    name = f"problem {sample.problem}, sample {sample.index}"
    p = len(sample.prompt)
    n = len(sample.tokens)
    if p + n > budget:
        raise ValueError(f"{name}: {p} prompt + {n} response tokens, a row takes {budget}: "
                         f"raise --row-tokens to at least {p + n}")
    if p == 0:
        raise ValueError(f"{name}: the prompt has no token, so nothing predicts the first one of the "
                         "response: begin it with one")
    if len(sample.logprobs) != n:
        raise ValueError(f"{name}: {len(sample.logprobs)} log-probs for {n} tokens: "
                         "give one for each (nan: forced, not trained)")


def pays(samples, shape):
    """Is it predicted to be less work to store what these samples share once?"""
    return work(tree(samples), shape) < sum(work(alone(s), shape) for s in samples)


def cut(samples, budget, most, shape):
    """Samples that share, as items of at most `budget` tokens and `most` work: halved until they
    fit, each half with a copy of its prompts."""
    item = tree(samples)
    half = len(samples) // 2
    if half == 0 or (size(item) <= budget and work(item, shape) <= most):
        return [item]
    return cut(samples[:half], budget, most, shape) + cut(samples[half:], budget, most, shape)


def join(items):
    """Items one after another in a row: a parent's place moves by what stands before its item."""
    segments = []
    for item in items:
        base = len(segments)
        for s in item:
            segments.append(replace(s, parent=s.parent + base if s.parent >= 0 else -1))
    return segments


def right(sample):
    return sample.reward > 0.5


def plan(groups, budget, shape, ranks=1, order="length", share=None):
    """-> for each rank its micro-batches, each a list of segments, as many on every rank. groups:
    lists of Samples that may share, or Samples. The answer depends only on the arguments: ranks
    that hold the same samples agree without talking.
    order  "length": long rows first, so that a row too big for memory fails at once.
           "correct": right and wrong answers in rows of their own, right first.
           "mixed": together, a row of many right ones next to a row of few.
           All three are the same sum, so one update does not change; several updates of one plan do.
    share  None: where it is predicted to pay. True, False: always, never."""
    if order not in ("length", "correct", "mixed"):
        raise ValueError(f'order is "{order}": it must be length, correct or mixed')
    groups = [group if isinstance(group, list) else [group] for group in groups]
    if order == "correct":
        parts = []
        for hit in (True, False):
            some = [[s for s in group if right(s) == hit] for group in groups]
            parts.append(plan(some, budget, shape, ranks, share=share))
        return [first + last for first, last in zip(*parts)]
    items = items_of(groups, budget, shape, ranks, share)
    micro = []
    for mine in balance([work(item, shape) for item in items], ranks):
        bins = pack([size(items[i]) for i in mine], budget)
        made = [join([items[mine[k]] for k in bin]) for bin in bins]
        made.sort(key=lambda row: -max(len(s.tokens) for s in row))
        if order == "mixed":             # from both ends of the rows sorted by how many are right
            made.sort(key=lambda row: np.mean([right(s.sample) for s in row if s.sample]))
            made = [made[k // 2 if k % 2 else -1 - k // 2] for k in range(len(made))]
        micro.append(made)
    most = max(map(len, micro))
    return [made + [[]] * (most - len(made)) for made in micro]


def items_of(groups, budget, shape, ranks, share):
    """-> lists of segments that stay together in a row: samples that share what they begin with, and
    single ones."""
    items = []
    sharing = []                         # lists of samples that become one item, or a few
    for samples in groups:
        # a response without tokens predicts nothing
        samples = [s for s in samples if s.tokens and s.weight]
        samples.sort(key=lambda s: (s.prompt, s.tokens))  # so that what shares stays together when cut
        for s in samples:
            check(s, budget)
        if len(samples) > 1 and (pays(samples, shape) if share is None else share):
            sharing.append(samples)
        else:
            items += [alone(s) for s in samples]
    total = sum(work(item, shape) for item in [*items, *map(tree, sharing)])
    # one heavy group must not make its rank the slowest
    most = total / ranks / 2 if ranks > 1 else total
    for samples in sharing:
        items += cut(samples, budget, most, shape)
    return items


def batches(groups, budget, shape, rank=0, ranks=1, order="length", share=None):
    """-> this rank's Batches. Every rank passes all groups and gets as many, some of them empty."""
    return [rows(segments) for segments in plan(groups, budget, shape, ranks, order, share)[rank]]


# -----------------------------------------------------------------------------
# python pack.py lengths.json


@dataclass
class Config:
    lengths: str                     # a file with a JSON list of lengths; the flag may be left out
    row_tokens: int = 8192           # tokens of a row
    ranks: int = 8                   # ranks to deal to


# the cost of a token and of a pair are those of this shape: Qwen3-0.6B
SHAPE = SimpleNamespace(n_layer=28, n_head=16, n_kv_head=8, head_dim=128, d_model=1024, d_ff=3072,
                        vocab_size=151936)


def picture(path, lengths, bins, budget, loads):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, side) = plt.subplots(1, 2, figsize=(12, 4.5), width_ratios=(3, 1),
                                        layout="constrained")
    for b, bin in enumerate(bins[:64]):
        floor = 0
        for k, i in enumerate(bin):
            color = plt.cm.viridis(k % 8 / 7)
            left.bar(b, lengths[i], 1, floor, color=color, edgecolor="white", linewidth=0.3)
            floor += lengths[i]
    left.axhline(budget, color="black", linewidth=1)
    shown = ", the first 64" if len(bins) > 64 else ""
    title = f"{len(lengths)} sequences in {len(bins)} rows of {budget} tokens{shown}"
    left.set(title=title, xlabel="row", ylabel="tokens")
    relative = [load * len(loads) / sum(loads) for load in loads]
    side.bar(range(len(loads)), relative, color=plt.cm.viridis(0.4))
    side.axhline(1, color="black", linewidth=1)
    side.set(title="work of a rank / mean", xlabel="rank")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        argv = ["--lengths", *argv]
    config = flags(Config, argv, __doc__)
    positive(config, "ranks")
    try:
        lengths = json.loads(Path(config.lengths).read_text())
        if not isinstance(lengths, list) or not lengths or any(type(n) is not int for n in lengths):
            raise ValueError("it must hold a JSON list of lengths, like [12, 340, 7]")
        bins = pack(lengths, config.row_tokens)
    except (OSError, ValueError) as error:
        die(f"{config.lengths}: {getattr(error, 'strerror', None) or error}")
    costs = [cost(SHAPE, n) for n in lengths]
    loads = [sum(costs[i] for i in items) for items in balance(costs, config.ranks)]
    mean = sum(loads) / config.ranks
    least = max(mean, max(costs))        # no dealing beats either
    path = Path(config.lengths).with_suffix(".png")
    picture(path, lengths, bins, config.row_tokens, loads)
    fill = sum(lengths) / (len(bins) * config.row_tokens)
    print(f"fill {fill:.2%}: {sum(lengths)} tokens in {len(bins)} rows of {config.row_tokens}")
    print(f"imbalance {max(loads) / mean:.4f} (heaviest of {config.ranks} ranks / mean), "
          f"{max(loads) / least:.4f} of the least possible")
    print(path)


__getattr__ = moved(__name__)            # names that a fork may know from here


if __name__ == "__main__":
    main()
