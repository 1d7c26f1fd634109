"""
algos.py: GRPO and its family. From the rewards of a group to a loss.

An algorithm is a row of choices on five independent axes (the table below), not a class. A new
algorithm is a new row; a new choice on an axis is a function of a few lines.

    rewards of a group   ->  1 baseline  ->  advantages
    log pi - log pi_old  ->  2 ratio  ->  3 trust region, times the advantage  ->  4 aggregation
    5 regularisers are added: the sum to be minimised

Left out of the usual recipe, and why:
- no critic, and no reference model unless --kl-coef asks for one;
- no second forward for old log-probs: with one update per rollout the ratio is 1, so
  old = logp.detach();
- no mean inside the loss: it returns sums, and the one normaliser divides at the step.

Definitions that others write differently are listed in records/definitions.md.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

import kernels
from common.moved import moved
from common.reward import varies
from kernels import linear_logprob

# -----------------------------------------------------------------------------
# axis 1, the baseline: rewards of a group -> advantages, always local to the group


def centred(r):
    """r - mean. Equal rewards give exact zeros: for most numbers r - r.mean() is 1e-17, and the
    optimizer's momentum would turn that into a whole step from no signal at all."""
    return r - r.mean() if varies(r) else np.zeros(len(r))


def relative(r):
    """MaxRL: (r - mean) / mean, the gradient of log P(right) instead of P(right) as samples become
    many: one right of eight counts seven times as much as seven of eight. None right: nothing."""
    return centred(r) / r.mean() if r.mean() > 0 else np.zeros(len(r))


BASELINES = {
    "group": lambda r: centred(r) / (r.std() + 1e-6),
    "mean": centred,
    "loo": lambda r: centred(r) * len(r) / max(1, len(r) - 1),   # r minus the mean of the others
    "relative": relative,
}

# -----------------------------------------------------------------------------
# axis 2, the ratio: x = log pi - log pi_old of each prediction -> the log of the ratio that
# counts for it.
#
# A ratio of the whole response takes one value at every token, but each token back-propagates
# only through its own log-prob, so tokens may have different advantages. With one advantage per
# response the sum is exactly the gradient of that ratio.


def mean_of_sample(values_N, sample_N, lengths_S):
    """The mean over each sample's predictions, repeated at each prediction."""
    sums_S = values_N.new_zeros(len(lengths_S)).index_add_(0, sample_N, values_N)
    return (sums_S / lengths_S)[sample_N]


def sequence(x_N, sample_N, lengths_S, p):
    """GSPO: the geometric mean over the response."""
    return mean_of_sample(x_N.detach(), sample_N, lengths_S) + x_N - x_N.detach()


def power(x_N, sample_N, lengths_S, p):
    """HolderPO: the power mean (mean rho^p)^(1/p). p = 1 is the arithmetic mean, 0 the geometric;
    below 0 the smallest ratios decide. It is computed as log mean exp z = top + log1p(mean
    expm1(z - top)), which holds for any top: 0 while z is small, where the plain form cancels,
    and the largest z where exp could overflow."""
    fixed_N = x_N.detach()
    mean_N = mean_of_sample(fixed_N, sample_N, lengths_S)
    z_N = p * (fixed_N - mean_N)
    top_S = z_N.new_zeros(len(lengths_S)).scatter_reduce_(0, sample_N, z_N, "amax")
    top_N = torch.where(top_S > 1, top_S, 0.0)[sample_N]
    log_N = top_N + mean_of_sample((z_N - top_N).expm1(), sample_N, lengths_S).log1p()
    share_N = (z_N - log_N).exp()  # length * rho^p / sum rho^p: how much each gradient counts
    return mean_N + (log_N / p if p else 0.0) + share_N * (x_N - fixed_N)


RATIOS = {
    "token": lambda x_N, sample_N, lengths_S, p: x_N,
    "sequence": sequence,
    "power": power,
}

# -----------------------------------------------------------------------------
# axis 3, the trust region: log-ratio and advantage of each prediction, and its log-prob under the
# policy that sampled -> the objective, to be maximised


def clip(x, A, low, high, old):
    """PPO: no gradient outside 1 - low .. 1 + high."""
    return torch.minimum(x.exp() * A, x.exp().clamp(1 - low, 1 + high) * A)


def weight(x, A, low, high, old):
    """CISPO: a bounded gradient everywhere."""
    return x.detach().exp().clamp(1 - low, 1 + high) * A * x


def moved_by(x, old):
    """pi - mu, where mu is the probability under the policy that sampled"""
    return old.exp() * x.detach().expm1()


def probability(x, A, low, high, old):
    """DPPO (binary total variation): no gradient where the probability itself has moved by more
    than low or high, in the advantage's direction. A ratio of 9 is nothing to a token of 1e-4; one
    of 0.8 takes a fifth of all mass from a certain one. Weights are cut at 20."""
    inside = torch.where(A > 0, moved_by(x, old) <= high, moved_by(x, old) >= -low)
    return inside * x.detach().exp().clamp(max=20) * A * x


def no_trust(x, A, low, high, old):
    return x.exp() * A


TRUSTS = {"clip": clip, "weight": weight, "probability": probability, "none": no_trust}

# -----------------------------------------------------------------------------
# axis 4, aggregation: length of a response -> (weight of each of its tokens, its divisor: what it
# adds to the normaliser)

AGGREGATES = {
    "token": lambda L, config: (1.0, L),          # DAPO: every token of the batch counts the same
    "sequence": lambda L, config: (1.0 / L, 1.0),                # GRPO: every response does
    # Dr. GRPO: a long answer is not discounted
    "constant": lambda L, config: (1.0 / config.max_new, 1.0),
    # VL Norm: L_i^-a / sum L_j^-a
    "length": lambda L, config: (L ** -config.length_power, L ** -config.length_power),
}


def weigh(groups, config):
    """Fills sample.weight and sample.divisor. Tokens that were forced on one (log-prob nan), a
    tool's words for example, are not trained and do not count. Where the advantage is zero the
    gradient is: unless another term needs such a sample, its weight is 0, and it costs no forward."""
    always = config.entropy_coef or config.entropy_target or config.kl_coef
    for s in (s for group in groups for s in group):
        L = len(s.tokens)
        if math.isnan(sum(s.logprobs)):
            L -= sum(map(math.isnan, s.logprobs))
        s.weight, s.divisor = AGGREGATES[config.aggregate](L, config) if L else (0.0, 0.0)
        if not (always or s.advantage):
            s.weight = 0.0


# -----------------------------------------------------------------------------
# axis 5, the regularisers. They add up, so each is a flag: --kl-coef and the resets of its
# reference, --cov, --entropy-coef, --entropy-target. What --cov and --entropy-target choose for a
# rollout is computed before any backward, in common/entropy.py

# -----------------------------------------------------------------------------
# the table. The clips of cispo (none below) and of holder, and prorl's KL coefficient, are ours:
# their papers leave them open. dppo has the settings of its authors' script (verl), and the cut of
# their loss at 20, which that script lifts; what maxrl has beside its baseline is dr_grpo's, with
# the clips of its authors' script

ALGORITHMS = {
    "grpo": dict(
        baseline="group", ratio="token", trust="clip", clip_low=0.2, clip_high=0.2,
        aggregate="sequence"),
    "dapo": dict(
        baseline="group", ratio="token", trust="clip", clip_low=0.2, clip_high=0.28,
        aggregate="token", dynamic=True),
    "dr_grpo": dict(
        baseline="mean", ratio="token", trust="clip", clip_low=0.2, clip_high=0.2,
        aggregate="constant"),
    "rloo": dict(
        baseline="loo", ratio="token", trust="none", aggregate="constant"),
    "gspo": dict(
        baseline="group", ratio="sequence", trust="clip", clip_low=3e-4, clip_high=4e-4,
        aggregate="sequence"),
    "cispo": dict(
        baseline="group", ratio="token", trust="weight", clip_low=1.0, clip_high=4.0,
        aggregate="token"),
    "vl_norm": dict(
        baseline="mean", ratio="token", trust="clip", clip_low=0.2, clip_high=0.2,
        aggregate="length", length_power=1.0),
    "holder": dict(
        baseline="group", ratio="power", trust="clip", clip_low=0.2, clip_high=0.2,
        aggregate="sequence", power=2.0, power_end=-2.0),
    "prorl": dict(
        baseline="group", ratio="token", trust="clip", clip_low=0.2, clip_high=0.4,
        aggregate="token", temperature=1.2, kl_coef=1e-3, dynamic=True, reset_every=100),
    "dppo": dict(
        baseline="mean", ratio="token", trust="probability", clip_low=0.15, clip_high=0.15,
        aggregate="constant"),
    "maxrl": dict(
        baseline="relative", ratio="token", trust="clip", clip_low=0.2, clip_high=0.2,
        aggregate="constant"),
}


@dataclass
class Algo:
    """the algorithm: a row of the table, and what overrides it"""
    algo: Literal[*ALGORITHMS] = "dr_grpo"  # a row of the table; each axis has its own flag below
    baseline: Literal["", *BASELINES] = ""  # (r - mean) / std; r - mean; leave one out; / mean
    ratio: Literal["", *RATIOS] = ""     # of the token; geometric or power mean of the response
    trust: Literal["", *TRUSTS] = ""     # PPO's clip; weights that keep the gradient; pi - old; none
    clip_low: float | None = None        # the ratio is clipped below 1 - this (probability: old - this)
    clip_high: float | None = None       # and above 1 + this (probability: old + this)
    aggregate: Literal["", *AGGREGATES] = ""  # over tokens; sequences; --max-new; by length^-a
    length_power: float | None = None    # the a of --aggregate length: 0 tokens, 1 responses are equal
    power: float | None = None  # the p of --ratio power at the start of the run; may be negative
    power_end: float | None = None       # and at its end; may be negative
    kl_coef: float | None = None         # KL (k3) to a reference, at first the model of --init
    reference_at: Literal["device", "host", "sharded"] = "device"  # where its blocks are between uses
    cov: Literal["", "clip", "kl"] = ""  # cut, or tie to the old policy, what lowers the entropy most
    cov_share: float | None = None       # of the tokens that are marked: 2e-4 clip, 2e-3 kl
    cov_coef: float = 1.0                # the coefficient of --cov kl
    entropy_coef: float = 0.0            # bonus on the entropy of the policy; may be negative
    entropy_target: float = 0.0          # nats per token: a bonus that adapts below it; 0: off
    overlong: int = 0          # soft penalty on the last this many tokens before --max-new; 0: off
    temperature: float | None = None     # of rollout and training; 1 unless the row says otherwise


# -----------------------------------------------------------------------------
# from rewards to advantages


def advantage(group, config):
    """Fills sample.advantage of one group. A sample that ran over its soft limit pays before the
    baseline is taken."""
    r = np.array([s.reward for s in group])
    if config.overlong:
        excess = np.array([len(s.tokens) - (config.max_new - config.overlong) for s in group])
        r = r - np.clip(excess / config.overlong, 0, 1)
    for s, a in zip(group, BASELINES[config.baseline](r)):
        s.advantage = float(a)


def key(s):
    """Which sample is it?"""
    return s.problem, s.visit, s.index


def by_key(known, batch):
    """known: {key of a sample: one number per prediction} -> these numbers for the predictions of
    a batch."""
    parts = [known[key(s)] for s in batch.samples]
    flat = np.concatenate([np.zeros(0, np.float32), *parts])
    return kernels.to_device(flat, torch.float32, batch.targets_N.device)


# -----------------------------------------------------------------------------
# the loss


def k3_to(reference, batch, logp_N, temperature):
    """KL (k3) to a reference, of each prediction."""
    with torch.no_grad():
        theirs_ND = batch.hidden(reference)
        reference_N, _ = linear_logprob(theirs_ND, reference.head_weight, batch.targets_N,
                                        temperature)
    x_N = reference_N - logp_N
    return x_N.expm1() - x_N


def make_loss(config, done=0.0, old=None, marked=None, reference=None):
    """-> loss(batch, hidden_ND, head_VD) -> (sum to be minimised, stats as sums). done: the share
    of the run that is over. old: log-probs before the first of several updates; marked: from
    covariant(); both by key. reference: a model for --kl-coef."""
    c = config
    p = None if c.power is None else c.power + done * (c.power_end - c.power)

    def loss(batch, hidden_ND, head_VD):
        logp_N, entropy_N = linear_logprob(hidden_ND, head_VD, batch.targets_N, c.temperature)
        # with one update per rollout the policy that sampled is this one
        old_N = logp_N.detach() if old is None else by_key(old, batch)

        # no bincount: on a GPU it waits for the largest number
        ones_N = torch.ones_like(batch.weight_N)
        zeros_S = batch.weight_N.new_zeros(len(batch.samples))
        lengths_S = zeros_S.index_add_(0, batch.sample_N, ones_N).clamp(min=1)
        x_N = logp_N - old_N
        logratio_N = RATIOS[c.ratio](x_N, batch.sample_N, lengths_S, p)
        objective_N = TRUSTS[c.trust](logratio_N, batch.advantage_N, c.clip_low, c.clip_high, old_N)
        if c.cov == "clip":
            objective_N = objective_N * (1 - by_key(marked, batch))
        elif c.cov == "kl":
            objective_N = objective_N - c.cov_coef * by_key(marked, batch) * x_N.abs()

        # trainer against sampler: rounding, or a bug. With --top-p the sampler drew from
        # pi / kept, where kept is less than 1, so this is the log of old / (sampler's pi / kept)
        gap_N = old_N - batch.sampler_logp_N
        logweight_N = gap_N + batch.kept_N
        if c.tis:
            objective_N = objective_N * logweight_N.exp().clamp(max=c.tis)

        k3_N = torch.zeros_like(logp_N)
        if c.kl_coef:
            k3_N = k3_to(reference, batch, logp_N, c.temperature)
        regularised_N = objective_N + c.entropy_coef * entropy_N - c.kl_coef * k3_N
        total = -(batch.weight_N * regularised_N).sum()

        with torch.no_grad():
            ratio_N = logratio_N.exp()
            outside_N = torch.zeros_like(ratio_N, dtype=torch.bool)      # without a trust region
            if c.trust == "probability":
                moved_N = moved_by(logratio_N, old_N)
                outside_N = (moved_N < -c.clip_low) | (moved_N > c.clip_high)
            elif c.trust != "none":
                outside_N = (ratio_N < 1 - c.clip_low) | (ratio_N > 1 + c.clip_high)
            stats = dict(
                tokens=len(logp_N),
                entropy=entropy_N.sum(),
                sampler_kl=(gap_N.expm1() - gap_N).sum(),
                sampler_far=(gap_N.abs() > 0.1).sum(),
                sampler_max=gap_N.abs().max() if len(gap_N) else 0.0,
                clipped=outside_N.sum(),
                reference_kl=k3_N.sum(),
                weight_all=logweight_N.exp(),
            )
        return total, stats

    return loss


__getattr__ = moved(__name__)            # names that a fork may know from here
