"""
How far apart are a student and its teacher, and does the student still learn?

    measure         two distributions at the same places of a packed row: do they agree on which
                    tokens are likely at all? By position in the response; means_of, describe
    disagreement    the log-ratios of sampled tokens, and what the teacher says of repetitions
    pulls_of        do the gradients of single tokens pull in one direction?
    diagnosis       all of these as the numbers of a step
    guard           a run ends when its texts get worse

opd.py logs them at every step, opd_check.py asks for the first before anything is spent. This file
imports nothing of ours.
"""

import math

import numpy as np
import torch


# -----------------------------------------------------------------------------
# diagnostics: two distributions at the same places

# per place: overlap    share of the two top-k sets that is common
#            p_mass     the student's mass on what is common; q_mass the teacher's
#            covered    the student's mass on the teacher's top k: what a loss on that support sees
#            agreed     -KL(p || q), both renormalised on what is common: 0 is agreement, very
#                       negative an over-confident student
#            gap        |entropy of the teacher - entropy of the student|; p_entropy, q_entropy
#            kl         the whole reverse KL
#            p_stop, q_stop   probability of ending here
MEASURES = ("overlap", "p_mass", "q_mass", "covered", "agreed", "gap", "p_entropy", "q_entropy",
            "kl", "p_stop", "q_stop")
EDGES = (0, 4, 16, 64, 256, 1024, 4096)  # position buckets: 0-3, 4-15, ...
PROBED = 256                             # places of a packed row that are measured, evenly spread


def log_softmax(hidden_ND, head_VD, temperature=1.0):
    logits_NV = hidden_ND @ head_VD.t()
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    return (logits_NV / temperature).log_softmax(-1)


def in_top(logp_NV, k):
    return torch.zeros_like(logp_NV, dtype=torch.bool).scatter_(1, logp_NV.topk(k).indices, True)


def compare(logp_NV, logq_NV, k, stop):
    """-> (N, MEASURES)"""
    k = min(k, logp_NV.shape[1])
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    in_q = in_top(logq_NV, k)
    both = in_top(logp_NV, k) & in_q
    p_mass = (p_NV * both).sum(1)
    q_mass = (q_NV * both).sum(1)
    p_some = p_mass.clamp(min=1e-30)
    shared = torch.where(both, p_NV * (logp_NV - logq_NV), 0.0).sum(1) / p_some
    shared = shared - p_some.log() + q_mass.clamp(min=1e-30).log()
    p_entropy = -(p_NV * logp_NV).sum(1)
    q_entropy = -(q_NV * logq_NV).sum(1)
    found = dict(
        overlap=both.sum(1) / k,
        p_mass=p_mass,
        q_mass=q_mass,
        covered=(p_NV * in_q).sum(1),
        agreed=torch.where(p_mass > 0, -shared, 0.0),
        gap=(q_entropy - p_entropy).abs(),
        p_entropy=p_entropy,
        q_entropy=q_entropy,
        kl=(p_NV * (logp_NV - logq_NV)).sum(1),
        p_stop=p_NV[:, stop].sum(1),
        q_stop=q_NV[:, stop].sum(1),
    )
    return torch.stack([found[name] for name in MEASURES], dim=1)


def places(sample_N):
    """The position of each prediction in its response: 0, 1, 2, ... (sample_N counts up)."""
    lengths = torch.bincount(sample_N)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(len(sample_N), device=sample_N.device) - starts[sample_N]


@torch.no_grad()
def measure(hidden_ND, head_VD, teacher_ND, teacher_VD, sample_N, k, stop, temperature=1.0):
    """-> (buckets, 1 + MEASURES): how many places of a packed row were measured in each bucket, and
    the sums over them."""
    device = sample_N.device
    chosen = torch.arange(0, len(sample_N), max(1, len(sample_N) // PROBED), device=device)
    edges = torch.tensor(EDGES[1:], device=device)
    bucket = torch.bucketize(places(sample_N)[chosen], edges, right=True)
    logp_NV = log_softmax(hidden_ND[chosen], head_VD, temperature)
    logq_NV = log_softmax(teacher_ND[chosen], teacher_VD, temperature)
    found = compare(logp_NV, logq_NV, k, stop)
    found = torch.cat([torch.ones_like(found[:, :1]), found], dim=1)
    return found.new_zeros(len(EDGES), found.shape[1]).index_add_(0, bucket, found)


def means_of(sums):
    """From measure()'s sums to {measure: mean, "measure/4": mean from position 4 on, up to the next
    edge}; what was not seen is left out."""
    sums = sums.reshape(-1, len(EDGES), 1 + len(MEASURES)).sum(0)
    buckets = {"": sums.sum(0)} | {f"/{edge}": part for edge, part in zip(EDGES, sums)}
    means = {}
    for name, (count, *totals) in buckets.items():
        if count:
            means |= {f"{m}{name}": float(total / count) for m, total in zip(MEASURES, totals)}
    return means


def describe(k, means):
    """-> the lines about the overlap, whole and by position."""
    lines = []
    for edge in ("", *(f"/{e}" for e in EDGES)):
        if f"overlap{edge}" in means:
            m = {name: means[f"{name}{edge}"] for name in MEASURES}
            where = f" from position {edge[1:]}" if edge else ""
            lines.append(f"overlap{where}: {m['overlap']:.0%} of the top {k}, mass "
                         f"{m['p_mass']:.1%} of the student, {m['q_mass']:.1%} of the teacher; "
                         f"student on the teacher's {m['covered']:.1%}; KL {m['kl']:.3f}; entropy "
                         f"{m['p_entropy']:.2f} and {m['q_entropy']:.2f}; stop {m['p_stop']:.3f} "
                         f"and {m['q_stop']:.3f}")
    return lines


# -----------------------------------------------------------------------------
# the numbers of a step


def repeated(tokens_N, sample_N, n):
    """Which tokens end an n-gram that their response has had before?"""
    place_N = places(sample_N)
    mixed = sample_N
    for back in range(n):                # a hash of the n tokens and their sample: it wraps around
        mixed = mixed * 1_000_003 + (tokens_N.roll(back) + 1)
    _, key = mixed.unique(return_inverse=True)
    here = torch.arange(len(key), device=key.device)
    early = torch.where(place_N >= n - 1, here, len(key))    # the first n - 1 have no n-gram yet
    first = torch.full_like(here, len(key)).scatter_reduce_(0, key, early, "amin")
    return (place_N >= n - 1) & (here > first[key])


def disagreement(batch, r_N, live_N, config):
    """Sums over the tokens that the teacher scored. r_N: log p - log q, 0 elsewhere."""
    again_N = repeated(batch.targets_N, batch.sample_N, config.repeat_n) & live_N
    return dict(
        live=live_N.sum(),
        advantage=-r_N.sum(),
        advantage_abs=r_N.abs().sum(),
        negative=(r_N > 0).sum(),
        cut=(r_N.abs() > config.bound).sum(),
        again=again_N.sum(),
        again_advantage=-(r_N * again_N).sum(),
    )


def by_sample(batch, values_N):
    """-> {(problem, index): the values of its tokens, for samples.jsonl}"""
    lengths = torch.bincount(batch.sample_N, minlength=len(batch.samples)).tolist()
    parts = values_N.cpu().double().round(decimals=4).split(lengths)
    return {(s.problem, s.index): part.tolist() for s, part in zip(batch.samples, parts)}


def pulls_of(hidden_ND):
    """Filled in by the backward: do the gradients of single tokens pull in one direction?"""
    device = hidden_ND.device
    stats = dict(
        pull_all=torch.zeros(hidden_ND.shape[1], device=device),
        pulls=torch.zeros((), device=device),
    )

    def note(grad_ND):
        stats["pull_all"].add_(grad_ND.float().sum(0))
        stats["pulls"].add_(grad_ND.float().norm(dim=1).sum())

    hidden_ND.register_hook(note)
    return stats


def diagnosis(stats, width):
    """The numbers of a step that a teacher adds, from the sums of stats. width: of the hidden states."""
    # |sum of the gradients of single tokens| / sum of their norms, at the head's input. Large
    # advantages and a small sum: tokens pull in all directions, as in failing runs (2604.13016)
    coherence = math.nan
    if stats.get("pulls"):
        pull = stats["pull_all"].reshape(-1, width).sum(0)
        coherence = float(np.linalg.norm(pull) / stats["pulls"])
    numbers = dict(
        gold=stats.get("gold", 0.0),
        teacher_nan=stats.get("teacher_nan", 0.0),
        coherence=coherence,
    )
    if not stats.get("live"):
        return numbers
    live = stats["live"]
    again = stats["again"]
    return numbers | dict(
        advantage=stats["advantage"] / live,
        advantage_abs=stats["advantage_abs"] / live,
        negative=stats["negative"] / live,
        cut=stats["cut"] / live,
        repeated=again / live,
        advantage_repeated=stats["again_advantage"] / again if again else math.nan,
        advantage_others=(stats["advantage"] - stats["again_advantage"]) / max(1.0, live - again),
        **means_of(torch.from_numpy(stats["look_all"])),
    )


# -----------------------------------------------------------------------------
# the guard of opd.py: does it still work?


def rising(values, n, least):
    """Has it risen for n steps? In thirds, each above the one before, because a single step is noise."""
    if len(values) < n:
        return False
    a, b, c = (float(np.mean(part)) for part in np.array_split(values[-n:], 3))
    return a < b < c and c - a >= least


def guard(history, config):
    """Why the run should end, or nothing. From the texts alone: a KL may rise while a student
    learns, and fall while it breaks."""
    if not config.guard:
        return ""
    for key, what, remedy in [
        ("repetition", "texts that repeat themselves",
         "give --kl-coef 0.01 or --gold teacher, or a --horizon"),
        ("truncated", "texts that are cut",
         "raise --max-new, see whether both stop by the same ids (opd_check.py), or --gold "
         "teacher"),
    ]:
        # what the horizon cuts is no failure
        values = [m[key] for m in history if key != "truncated" or m["max_new"] == config.max_new]
        if rising(values, config.guard, config.guard_rise):
            return (f"the share of {what} has risen for {config.guard} steps, to {values[-1]:.0%}: "
                    f"{remedy}")
    return ""
