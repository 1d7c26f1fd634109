"""
limit.py: how many documents can be found by vectors of d numbers (2508.21038).

A query finds the documents whose vectors have the largest dot products with its own. n documents
have n (n-1) / 2 pairs; give each pair a query that must find exactly these two. All vectors are
free: no text, no model, trained on the very pairs that are asked, so that no embedding model could
do better. The largest n at which every pair is found is the critical n of the dimension d.

    loss = -mean over queries i and their two documents r of log softmax(q_i . v / 0.1)_r
    critical n = -10.5322 + 4.0309 d + 0.0520 d^2 + 0.0037 d^3          the paper's fit, r^2 = 0.999

All of it is as in the authors' code: unit vectors, normalised after each step of Adam at 0.01;
the whole batch; the end when all pairs are found, or when the loss has not fallen by 1e-5 for
1,000 steps; a search that doubles, then halves. (The paper's text sums inside the logarithm, its
code outside; a caption of the paper reads as if n were the first that fails, its code takes the
last that does not.) Left out: dimensions above 9, the sweep around each critical n, and texts that
say who likes what. The authors train for 100,000 steps at most; here it is --steps.

The cubic is fitted from 4 to 45 numbers per vector, and at 4 it says 6.7 where the authors
found 10: so what is found here is held against their table (the last one of the appendix), and the
cubic only drawn. CLAIM was written when runs of seed 0 had been seen; the table took the cubic's
place, and 10% that of 20%, later and without a run.

"frozen" is the same with random documents that stay, and only queries trained: what training the
documents adds. "circle" is a control that trains nothing: documents on the curve

    v(t) = (cos t, sin t, cos 2t, sin 2t),   query of the pair (a, b) = minus the waves of
                                             (1 - cos(t - a)) (1 - cos(t - b)), which is 0 at a and b only

find every pair of ANY number of documents with 4 numbers each (a cyclic polytope: each two of its
corners share an edge). So the table is a limit of what gradient descent finds, and no law about
dimensions: at d = 4 it says 10.

    python -m ideas.limit
    python -m bench ideas --names limit
"""
import math
from dataclasses import dataclass

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import die, flags, positive

CLAIM = Claim(paper="2508.21038", says="4 numbers a vector find all pairs of 10 documents, 9 of 32",
              measured="what is left of an allowance of 10%, for the distance from the paper's numbers",
              smallest=1.0)
ARMS = ("frozen", "free", "circle")      # baseline; idea; control: a construction, nothing trained
# the paper's critical n of each d
FOUND = {4: 10, 5: 14, 6: 19, 7: 24, 8: 28, 9: 32, 10: 36, 11: 42, 12: 47}
TEMPERATURE = 0.1
LR = 0.01
CIRCLE = 200                             # documents on the circle


@dataclass
class Config(Idea):
    dims: int = 9                        # the largest dimension; the smallest is 4
    steps: int = 20_000                  # of Adam for one n, at most
    patience: int = 1000                 # steps without a lower loss, then it has failed


# -----------------------------------------------------------------------------
# the idea


def cubic(d):
    """The paper's fit, of dimensions from 4 to 45."""
    return -10.5322 + 4.0309 * d + 0.0520 * d**2 + 0.0037 * d**3


def relevance(n):
    """-> (M, N): 1 where document j is one of the two of query i, a row for every pair"""
    pairs_M2 = torch.combinations(torch.arange(n))
    return torch.zeros(len(pairs_M2), n).scatter_(1, pairs_M2, 1.0)


def all_found(queries_MD, documents_ND, wanted_MN):
    """Does each query score both of its documents above all others?"""
    scores_MN = queries_MD @ documents_ND.t()
    mine = scores_MN.masked_fill(wanted_MN == 0, math.inf).amin(1)
    others = scores_MN.masked_fill(wanted_MN == 1, -math.inf).amax(1)
    return bool((mine > others).all())


def loss_and_gradient(vectors, wanted_MN):
    """vectors: those of the queries, then those of the documents."""
    queries_MD, documents_ND = vectors.split(wanted_MN.shape)
    logp_MN = (queries_MD @ documents_ND.t() / TEMPERATURE).log_softmax(1)
    count = 2 * len(wanted_MN)
    error_MN = (2 * logp_MN.exp() - wanted_MN) / (count * TEMPERATURE)
    gradient = torch.cat([error_MN @ documents_ND, error_MN.t() @ queries_MD])
    return -float((logp_MN * wanted_MN).sum()) / count, gradient


def unit(vectors):
    return vectors / vectors.norm(dim=1, keepdim=True)


def solved(arm, n, d, config):
    """-> are vectors of d numbers found that retrieve every pair of n documents?"""
    wanted_MN = relevance(n)
    queries = len(wanted_MN)
    g = torch.Generator().manual_seed(1_000_000 * config.seed + 1000 * d + n)
    vectors = unit(torch.randn(queries + n, d, generator=g))
    documents = vectors[queries:].clone()
    m = torch.zeros_like(vectors)
    v = torch.zeros_like(vectors)
    best = math.inf
    stale = 0
    for step in range(1, config.steps + 1):
        loss, gradient = loss_and_gradient(vectors, wanted_MN)
        m.lerp_(gradient, 0.1)
        v.lerp_(gradient.square(), 0.001)
        root = (v / (1 - 0.999**step)).sqrt_().add_(1e-8)
        vectors = unit(vectors - LR / (1 - 0.9**step) * m / root)
        if arm == "frozen":
            vectors[queries:] = documents
        if step % 50 == 0 and all_found(*vectors.split(wanted_MN.shape), wanted_MN):
            return True
        stale += 1
        if loss < best - 1e-5:
            best = loss
            stale = 0
        if stale >= config.patience:
            break
    return all_found(*vectors.split(wanted_MN.shape), wanted_MN)


def critical(arm, d, config):
    """The largest n that is solved: by doubling, then bisection. Two documents are always found."""
    low = 2
    high = 4
    while solved(arm, high, d, config):
        low = high
        high *= 2
    while high - low > 1:
        middle = (low + high) // 2
        if solved(arm, middle, d, config):
            low = middle
        else:
            high = middle
    return low


def circle(n):
    """-> (queries, documents) of 4 numbers that find every pair, in float64. The product of two waves is
    made of waves of their sum and their difference."""
    t_N = 2 * math.pi * torch.arange(n, dtype=torch.float64) / n
    a_M, b_M = t_N[torch.combinations(torch.arange(n))].unbind(1)
    documents_ND = torch.stack([t_N.cos(), t_N.sin(), (2 * t_N).cos(), (2 * t_N).sin()], 1)
    both = a_M + b_M
    slow = [a_M.cos() + b_M.cos(), a_M.sin() + b_M.sin()]
    fast = [-both.cos() / 2, -both.sin() / 2]
    return torch.stack(slow + fast, 1), documents_ND


# -----------------------------------------------------------------------------
# the trial


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "dims steps patience")
    if config.dims not in FOUND:
        die(f"--dims {config.dims}: give {min(FOUND)} to {max(FOUND)}, whose numbers in the paper stand here")
    from_scratch(config)
    dims = range(min(FOUND), config.dims + 1)
    trial = begin(config, __file__, CLAIM, ("frozen", "free"), len(dims))
    table = {arm: {} for arm in ("frozen", "free", "the paper", "its cubic")}
    for d in dims:
        for arm, n in (("the paper", FOUND[d]), ("its cubic", cubic(d))):
            table[arm][f"d={d}"] = n
            trial.dot("", arm, d, n)
        for arm in ("frozen", "free"):
            table[arm][f"d={d}"] = critical(arm, d, config)
            trial.point(arm, d, table[arm][f"d={d}"])
    found = all_found(*circle(CIRCLE), relevance(CIRCLE))
    table["circle"] = {f"d=4, all pairs of {CIRCLE}": float(found)}
    left = {arm: 10 - 100 * sum(abs(table[arm][f"d={d}"] / FOUND[d] - 1) for d in dims) / len(dims)
            for arm in ("frozen", "free")}
    picture(trial, x="numbers in a vector, d", y="documents, every pair of them found")
    note = f"(documents that stay: {left['frozen']:+.0f}"
    note += f"; a circle finds all pairs of {CIRCLE} with 4)" if found else ")"
    return finish(trial, (left["free"], 0.0), table, note)


if __name__ == "__main__":
    main()
