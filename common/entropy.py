"""
entropy.py: three ways to keep a policy from becoming certain too early. All of them choose from the whole
rollout, by the log-probs of its sampler, so that what they chose is known before any backward.

    --cov clip          Clip-Cov (arXiv 2505.22617): no gradient for a few tokens that lower the entropy
    --cov kl            KL-Cov (the same paper): those that lower it most are tied to the old policy
    --entropy-target    Skywork-OR1 (2505.22312): a bonus on the entropy that grows while it is too low

A token lowers the entropy by (log-prob - mean) (advantage - mean), both means over the rollout. The authors
compute it again for each mini-batch, with the policy as it is then, and Clip-Cov leaves out what PPO's clip
has cut by then; here it is chosen once per rollout, before the first update, when nothing is cut.
"""
import numpy as np
import torch

import kernels
from algos import key

COV_BAND = (1.0, 5.0)                    # --cov clip chooses between these covariances, by chance
COV_SHARE = dict(clip=2e-4, kl=2e-3)     # of the tokens: from the authors' scripts
ENTROPY_STEP = 1e-4                      # --entropy-target moves the coefficient by this per step
ENTROPY_MOST = 5e-3                      # and up to this: both from Skywork-OR1's scripts


def trained_parts(numbers_of, samples):
    """-> one array of numbers per sample, of the tokens that it chose; forced ones are left out"""
    chosen = [~np.isnan(s.logprobs) for s in samples]
    return [np.broadcast_to(numbers_of(s), len(on))[on] for s, on in zip(samples, chosen)]


def covariant(groups, config):
    """-> {key: 1 for the predictions that --cov marks, else 0}: a share of all tokens, one at least. KL-Cov
    marks the largest covariances, of a tie the earlier one; Clip-Cov draws from those in its band, by a
    noise of their own: the same tokens, however groups are ordered."""
    samples = [s for g in groups for s in g]
    logps = trained_parts(lambda s: s.logprobs, samples)
    logp_N = np.concatenate([np.zeros(0), *logps])
    A_N = np.concatenate([np.zeros(0), *trained_parts(lambda s: s.advantage, samples)])
    marked_N = np.zeros(len(logp_N), np.float32)
    if len(logp_N):
        cov_N = (logp_N - logp_N.mean()) * (A_N - A_N.mean())
        share = config.cov_share or COV_SHARE[config.cov]
        count = max(1, int(share * len(cov_N)))
        if config.cov == "kl":
            order_N = np.argsort(-cov_N, kind="stable")
        else:
            draws = trained_parts(lambda s: chance(s, config.seed), samples)
            order_N = np.argsort(np.concatenate(draws), kind="stable")
            low, high = COV_BAND
            order_N = order_N[(low < cov_N[order_N]) & (cov_N[order_N] < high)]
        marked_N[order_N[:count]] = 1
    ends = np.cumsum([len(part) for part in logps])
    return {key(s): part for s, part in zip(samples, np.split(marked_N, ends))}


def chance(s, seed):
    """A uniform number for each token: not the one that drew it, so of another seed."""
    positions = torch.arange(len(s.tokens))
    return kernels.uniform(seed + 1, s.visit, s.problem, s.index, positions).numpy()


def entropy_bonus(coef, groups, config):
    """The coefficient grows while the entropy of a rollout is below its target and falls otherwise, and
    counts only while it is below. -> (what counts now, the next coefficient). The entropy per token is
    minus the mean log-prob of the tokens that were sampled."""
    samples = [s for g in groups for s in g]
    logp_N = np.concatenate([np.zeros(0), *trained_parts(lambda s: s.logprobs, samples)])
    if not len(logp_N):
        return 0.0, coef
    low = -logp_N.mean() < config.entropy_target
    following = coef + ENTROPY_STEP if low else coef - ENTROPY_STEP
    return coef if low else 0.0, min(max(following, 0.0), ENTROPY_MOST)
