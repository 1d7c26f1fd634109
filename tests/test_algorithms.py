"""the algorithm table: every row against numpy, exact gradients, identities between rows, ranks,
what is refused"""
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import algos
import nanorl
import pack
import stages
from algos import ALGORITHMS, RATIOS, TRUSTS, advantage, key, make_loss
from common import entropy
from common.axes import with_algorithm
from common.entropy import covariant
from common.metrics import merge_stats
from common.optim import Optimizer
from nanorl import Config
from rollout import Sample
from tests.models import nudged
from train_gpt import GPT, GPTConfig

SHAPE = GPTConfig(9, 1, 2, 1, 8, 16, 24, 64, 10000.0)


def model(seed, dtype=torch.float64):
    return nudged(GPT(SHAPE).init_weights(seed).to(dtype), seed, 0.3)


def group(rewards, lengths, seed=0, problem=0):
    g = torch.Generator().manual_seed(seed)

    def draw(n):
        return torch.randint(0, SHAPE.vocab_size, (n,), generator=g).tolist()

    return [Sample([1, 2, problem], draw(L), (-torch.rand(L, generator=g) * 3).tolist(), "stop",
                   problem, i, 0, reward=r) for i, (r, L) in enumerate(zip(rewards, lengths))]


def ragged():
    return [group([1, 0, 0, 1], [3, 9, 1, 20]), group([0, 1, 0.5, 0], [4, 4, 7, 2], seed=1, problem=1)]


def settled(**kw):
    return with_algorithm(Config(**{"tis": 0.0, "max_new": 20, **kw}))


def fake(config, policy, groups, rank=0, world=1, reference=None):
    """what the stages read of setup()'s namespace; advantages are filled in"""
    for g in groups:
        advantage(g, config)
    if policy.head_weight.dtype == torch.float32:
        optimizer = Optimizer(policy, lr=config.lr, clip=config.clip)
    else:                                                        # in float64 only gradients are looked at
        optimizer = SimpleNamespace(finish_micro_batch=lambda: None)
    env = SimpleNamespace(device=torch.device("cpu"), rank=rank, world=world)
    return stages.RL(config, env, policy, tok=None, task=None, sampler=None,
                     workers=None, optimizer=optimizer, reference=reference, steps=config.steps)


def gradients(policy, divide):
    return torch.cat([p.grad.flatten() for p in policy.parameters()]) / divide


def moved(logps, seed=5, size=0.3):
    """log-probs of another policy, not far away"""
    g = np.random.default_rng(seed)
    return {k: v + size * g.standard_normal(len(v)) for k, v in logps.items()}


def close(a, b, rtol=1e-6):
    return float(np.abs(np.asarray(a) - np.asarray(b)).max()) <= rtol * float(np.abs(np.asarray(b)).max())


# -----------------------------------------------------------------------------
# rung 12


def inside(ratio, A, low, high):
    return ratio <= 1 + high if A > 0 else ratio >= 1 - low


def by_hand(algo, r, lengths, x, i, extra):
    """-> for each token of response i the factor before its grad log pi, as the paper of the row
    has it: rewards r and lengths of the group, log-ratios x of the response; extra: what the
    whole batch knows"""
    L, rho = lengths[i], np.exp(x)
    A = {"dr_grpo": r - r.mean(), "vl_norm": r - r.mean(), "rloo": r - (r.sum() - r) / (len(r) - 1),
         "dppo": r - r.mean(), "maxrl": (r - r.mean()) / r.mean()}
    A = A.get(algo, (r - r.mean()) / (r.std() + 1e-6))[i]
    s, tokens, n = np.exp(x.mean()), extra["tokens"], extra["responses"]
    if algo == "grpo":
        return A * rho * inside(rho, A, 0.2, 0.2) / L / n
    if algo == "dapo":
        return A * rho * inside(rho, A, 0.2, 0.28) / tokens
    if algo == "dr_grpo":
        return A * rho * inside(rho, A, 0.2, 0.2) / 20 / n
    if algo == "rloo":
        return A * rho / 20 / n
    if algo == "dppo":
        mu = extra["mu"]
        inside_d = rho * mu - mu <= 0.15 if A > 0 else rho * mu - mu >= -0.15
        return A * np.minimum(rho, 20) * inside_d / 20 / n
    if algo == "maxrl":
        return A * rho * inside(rho, A, 0.2, 0.2) / 20 / n
    if algo == "gspo":
        return A * s * inside(s, A, 3e-4, 4e-4) / L / n * np.ones(L)
    if algo == "cispo":
        return A * np.minimum(rho, 5) / tokens
    if algo == "vl_norm":
        return A * rho * inside(rho, A, 0.2, 0.2) / L / extra["inverse"]
    if algo == "holder":
        mean = (rho ** 2).mean() ** 0.5
        return A * mean * rho ** 2 / (rho ** 2).sum() * inside(mean, A, 0.2, 0.2) / n
    if algo == "prorl":
        return (A * rho * inside(rho, A, 0.2, 0.4) + 1e-3 * (extra["reference"] - 1)) / tokens
    raise AssertionError(f"no formula for {algo}: write it down")


def log_softmax(z):
    z = z - z.max(1, keepdims=True)
    return z - np.log(np.exp(z).sum(1, keepdims=True))


@pytest.mark.parametrize("seed", [5, 6])
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_every_row_is_three_lines_of_numpy(algo, seed):
    """rung 12: ragged groups, packed, a policy that has moved since it sampled; the gradient of
    the head by numpy from the formula"""
    config, policy, other = settled(algo=algo), model(0), model(1)
    groups, T = ragged(), config.temperature
    rl = fake(config, policy, groups, reference=other)
    rl.config = replace(config, entropy_coef=1e-30)              # every sample scored, whatever its advantage
    old = moved(stages.old_logprobs(rl, groups), seed, 0.2)
    rl.config = config
    stages.update(rl, groups, make_loss(config, old=old, reference=other))
    ours = policy.head_weight.grad.numpy() / rl.normaliser

    def alone(net, s):
        batch = pack.rows(pack.alone(s))
        with torch.no_grad():
            h = batch.hidden(net).numpy()
        return h, log_softmax(h @ net.head_weight.detach().numpy().T / T)

    flat = [s for g in groups for s in g]
    extra = dict(tokens=sum(len(s.tokens) for s in flat), responses=len(flat),
                 inverse=sum(1 / len(s.tokens) for s in flat))
    theirs = np.zeros(policy.head_weight.shape)
    for g in groups:
        r, lengths = np.array([s.reward for s in g]), [len(s.tokens) for s in g]
        for i, s in enumerate(g):
            h, logp = alone(policy, s)
            here = np.arange(len(s.tokens)), s.tokens
            extra["reference"] = np.exp(alone(other, s)[1][here] - logp[here])
            extra["mu"] = np.exp(old[key(s)])
            c = by_hand(algo, r, lengths, logp[here] - old[key(s)], i, extra)
            theirs -= (c[:, None] * (np.eye(SHAPE.vocab_size)[s.tokens] - np.exp(logp))).T @ h / T
    assert close(ours, theirs)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_gradient_on_three_actions_is_the_closed_form(algo):
    """a softmax over three actions with probabilities 1/2, 1/4, 1/4 and a group that holds them
    in just that proportion: the estimate is exact, pi_k (r_k - mean r) for each logit, up to the
    scale of the baseline"""
    W = torch.tensor([[0.5], [0.25], [0.25]], dtype=torch.float64).log().requires_grad_()
    rewards = {0: 1.0, 1: 0.0, 2: 3.0}
    samples = [Sample([1], [a], [0.0], "stop", 0, i, 0, reward=rewards[a])
               for i, a in enumerate([0, 0, 1, 2])]
    config = settled(algo=algo, max_new=1, temperature=1.0, kl_coef=0.0, reset_every=0)
    advantage(samples, config)
    batch = pack.rows([segment for s in samples for segment in pack.alone(s)])
    batch.advantage_N = torch.tensor([s.advantage for s in batch.samples], dtype=torch.float64)
    value, _ = make_loss(config)(batch, torch.ones(4, 1, dtype=torch.float64), W)
    (value / 4).backward()
    pi, r = W.detach().exp().squeeze(), torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    drawn = np.array([1.0, 1, 0, 3])
    scale = {"mean": 1.0, "loo": 4 / 3, "group": 1 / (drawn.std() + 1e-6),
             "relative": 1 / drawn.mean()}[config.baseline]
    assert torch.allclose(-W.grad.squeeze(), scale * pi * (r - (pi * r).sum()), atol=1e-12)


# -----------------------------------------------------------------------------
# the axes


def test_a_baseline_of_equal_rewards_gives_no_advantage():
    for name, baseline in algos.BASELINES.items():
        assert np.abs(baseline(np.ones(4))).max() == 0, name
        assert abs(baseline(np.array([1.0, 0, 0, 1])).sum()) < 1e-9, name
    assert np.allclose(algos.BASELINES["loo"](np.array([1.0, 0, 0])), [1 - 0, 0 - 0.5, 0 - 0.5])
    assert np.allclose(algos.BASELINES["relative"](np.array([1.0, 0, 0])), [2, -1, -1])
    for r in (np.zeros(3), np.array([-1.0, 0, 0])):
        assert not algos.BASELINES["relative"](r).any(), "none right: nothing, and no division by it"


def test_overlong_answers_pay_softly():
    config = settled(algo="dr_grpo", overlong=10)
    samples = group([1, 1, 1], [10, 15, 20])
    advantage(samples, config)
    paid = np.array([s.advantage for s in samples])
    assert np.allclose(paid - paid[0], [0, -0.5, -1])


def test_clipping_stops_the_gradient_of_what_has_moved_far_enough():
    for ratio, A, moves in [(1.5, 1.0, False), (1.5, -1.0, True), (0.5, -1.0, False),
                            (0.5, 1.0, True), (1.1, 1.0, True)]:
        x = torch.tensor(ratio).log().requires_grad_()
        TRUSTS["clip"](x, torch.tensor(A), 0.2, 0.28, None).backward()
        assert (x.grad != 0) == moves, (ratio, A)


def test_a_clipped_weight_keeps_its_gradient():
    """CISPO: the token that turns a solution round is rare, so its ratio leaves the clip first;
    its gradient must not end there"""
    x = torch.tensor(9.0).log().requires_grad_()
    TRUSTS["weight"](x, torch.tensor(1.0), 1.0, 4.0, None).backward()
    assert torch.isclose(x.grad, torch.tensor(5.0))


def test_a_probability_may_move_by_so_much_and_no_further():
    """DPPO: a rare token ten times as likely is still inside, where PPO's clip stops it; a certain one at 0.8
    of its ratio is outside, where the clip keeps it; only the advantage's own direction is held"""
    for mu, pi, A, grad in [(1e-3, 1e-2, 1.0, 10.0), (0.99, 0.80, -1.0, 0.0), (0.99, 0.80, 1.0, 0.80 / 0.99),
                            (0.5, 0.64, 1.0, 1.28), (0.5, 0.66, 1.0, 0.0), (0.5, 0.66, -1.0, -1.32),
                            (1e-4, 1e-2, 1.0, 20.0)]:
        old = torch.tensor(mu, dtype=torch.float64).log()
        x = (torch.tensor(pi, dtype=torch.float64).log() - old).requires_grad_()
        TRUSTS["probability"](x, torch.tensor(A), 0.15, 0.15, old).backward()
        assert x.grad.item() == pytest.approx(grad, abs=1e-12), (mu, pi, A)


def test_relative_rewards_are_the_gradient_of_the_log_of_what_is_right():
    """MaxRL: A = (r - mean) / mean over very many samples of three actions gives d log p, p the chance of the
    right ones, where the mean alone gives d p"""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, requires_grad=True)
    right = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    p = logits.softmax(0)
    counts = (p.detach() * 1_000_000).round().long()
    r = np.repeat(right.numpy(), counts)
    A = torch.tensor(algos.BASELINES["relative"](r))
    action = torch.repeat_interleave(torch.arange(3), counts)
    (found,) = torch.autograd.grad((A * p.log()[action]).mean(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((p * right).sum().log(), logits)
    assert torch.allclose(found, wanted, atol=1e-5)


SAMPLE_N = torch.tensor([0] * 5 + [1] + [2] * 30)
LENGTHS_S = torch.bincount(SAMPLE_N)


def log_ratios(dtype=torch.float64, size=0.3):
    return (torch.randn(len(SAMPLE_N), dtype=torch.float64,
                        generator=torch.Generator().manual_seed(3)) * size).to(dtype).requires_grad_()


def naive(x_N, p):
    """the power mean of each sample as its formula has it, with autograd through all of it"""
    parts = [part.mean().exp() if p == 0 else (part * p).exp().mean() ** (1 / p)
             for part in x_N.split(LENGTHS_S.tolist())]
    return torch.stack(parts)


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5, 1e-4, 0.0, -1e-4, -1.0, -2.0])
def test_power_mean_has_the_value_and_the_gradient_of_its_formula(p):
    """float64: p = 1 is the mean of the token ratios; and with the token's part of the gradient
    in each token, a sum over the tokens is the gradient of the whole"""
    x, y = log_ratios(), log_ratios()
    ratio_N = RATIOS["power"](x, SAMPLE_N, LENGTHS_S, p).exp()
    expected_S = naive(y, p)
    assert close(ratio_N.detach(), expected_S.detach()[SAMPLE_N], 1e-9)
    (ratio_N / LENGTHS_S[SAMPLE_N]).sum().backward()
    expected_S.sum().backward()
    assert close(x.grad, y.grad, 1e-9)
    if p == 1:
        assert close(ratio_N.detach(),
                     torch.stack([v.mean() for v in y.detach().exp().split(LENGTHS_S.tolist())])[SAMPLE_N],
                     1e-12)


def test_power_zero_is_gspo():
    x, y = log_ratios(), log_ratios()
    a, b = RATIOS["power"](x, SAMPLE_N, LENGTHS_S, 0.0), RATIOS["sequence"](y, SAMPLE_N, LENGTHS_S, None)
    assert torch.allclose(a, b, atol=1e-15, rtol=0)
    a.exp().sum().backward()
    b.exp().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-14, rtol=0)


def test_sequence_ratio_with_its_gradient_in_the_tokens_is_gspo():
    """s_i held fixed times pi / sg(pi) has the gradient of s_i itself when the advantage is uniform"""
    x, y = log_ratios(), log_ratios()
    (RATIOS["sequence"](x, SAMPLE_N, LENGTHS_S, None).exp() / LENGTHS_S[SAMPLE_N]).sum().backward()
    naive(y, 0).sum().backward()
    assert close(x.grad, y.grad, 1e-12)


def test_power_mean_is_stable_through_zero_in_fp32():
    """the anneal from 2 to -2 passes 0, where (logsumexp(p x) - log L) / p subtracts two nearly
    equal numbers and divides by almost nothing: in fp32 its error grows as 1e-7 / p. One that
    goes by expm1 and log1p stays at rounding"""
    worst, plain = 0.0, 0.0
    for size in (1e-4, 0.3):
        x32 = log_ratios(torch.float32, size).detach()
        for p in [sign * 10.0 ** -k for k in range(0, 9) for sign in (1, -1)] + [0.0]:
            exact = RATIOS["power"](x32.double(), SAMPLE_N, LENGTHS_S, p)
            worst = max(worst, float((RATIOS["power"](x32, SAMPLE_N, LENGTHS_S, p) - exact).abs().max()))
            if p:
                lse = [(torch.logsumexp(p * part, 0) - np.log(len(part))) / p
                       for part in x32.split(LENGTHS_S.tolist())]
                plain = max(plain, float((torch.stack(lse)[SAMPLE_N] - exact).abs().max()))
    assert worst < 5e-7 and plain > 1e-2


def test_power_mean_survives_a_token_that_became_impossible():
    """one token at exp(-60) and p = -2: rho^p is exp(120), which fp32 does not have"""
    x = torch.zeros(len(SAMPLE_N))
    x[2] = -60.0
    x.requires_grad_()
    value = RATIOS["power"](x, SAMPLE_N, LENGTHS_S, -2.0)
    assert torch.allclose(value.detach()[:5],
                          torch.tensor(-60 + np.log(5) / 2, dtype=torch.float32), atol=1e-4)
    value.sum().backward()
    assert torch.isfinite(x.grad).all() and torch.isclose(x.grad[2], torch.tensor(5.0), rtol=1e-3)


def test_power_mean_grows_with_p():
    x = log_ratios().detach()
    values = [RATIOS["power"](x, SAMPLE_N, LENGTHS_S, p) for p in (-2, -1, -0.1, 0, 0.1, 1, 2)]
    assert all((b >= a - 1e-12).all() for a, b in zip(values, values[1:]))


def test_before_the_first_update_every_ratio_and_trust_region_has_one_gradient():
    """old == new: they differ only in what happens once the policy has moved"""
    # each token its own
    A = torch.randn(len(SAMPLE_N), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    found = {}
    for ratio in RATIOS:
        for trust in TRUSTS:
            x = torch.zeros(len(SAMPLE_N), dtype=torch.float64, requires_grad=True)
            log_ratio = RATIOS[ratio](x, SAMPLE_N, LENGTHS_S, -1.5)
            TRUSTS[trust](log_ratio, A, 0.2, 0.2, torch.full_like(A, -0.5)).sum().backward()
            found[ratio, trust] = x.grad
    assert len(found) == len(RATIOS) * len(TRUSTS)
    assert all(torch.allclose(g, A, atol=1e-12, rtol=0) for g in found.values())


def head_gradient(config, groups, **kw):
    policy = model(0)
    rl = fake(config, policy, groups)
    stages.update(rl, groups, make_loss(config, **kw))
    return gradients(policy, rl.normaliser)


def test_vl_norm_with_power_zero_is_dr_grpo_up_to_a_constant():
    zero = head_gradient(settled(algo="vl_norm", length_power=0.0), ragged())
    constant = head_gradient(settled(algo="dr_grpo"), ragged())
    assert close(zero, constant * 20)


def test_vl_norm_weighs_by_length():
    """w_i = L_i^-a / sum_j L_j^-a sums to 1; a = 1 has the least variance of any when a
    response's variance grows with its length"""
    lengths = np.array([20, 40, 80, 400])
    spread = {}
    for a in (0.0, 0.5, 0.75, 1.0):
        pairs = [algos.AGGREGATES["length"](int(L), settled(algo="vl_norm", length_power=a)) for L in lengths]
        w = np.array([weight for weight, _ in pairs]) / sum(share for _, share in pairs)
        assert np.isclose(w.sum(), 1)
        spread[a] = (w ** 2 * lengths).sum()
    assert np.allclose([spread[a] for a in (0.0, 0.5, 0.75, 1.0)], [33.8, 13.5, 11.5, 11.1], atol=0.06)


def test_holder_anneals_its_power():
    """half-way from 2 to -2 it is GSPO's ratio"""
    config, groups = settled(algo="holder"), ragged()
    old = moved(stages.old_logprobs(fake(config, model(0), groups), groups), size=0.05)
    gspo = head_gradient(settled(algo="holder", ratio="sequence"), groups, old=old)
    start, middle, end = (head_gradient(config, groups, old=old, done=at) for at in (0.0, 0.5, 1.0))
    assert close(middle, gspo, 1e-9) and not close(start, gspo, 1e-4) and not close(end, gspo, 1e-4)


# -----------------------------------------------------------------------------
# regularisers and weights


def test_weight_between_sampler_and_trainer_is_truncated_and_knows_what_was_kept():
    """a sampler with top-p draws from pi / kept: the weight is kept times what lies between the
    two log-probs, cut at --tis"""
    config = settled(algo="dr_grpo", tis=2.0, max_new=1)
    # log pi = -log 4 for every action
    W, h = torch.zeros(4, 1, dtype=torch.float64), torch.ones(3, 1, dtype=torch.float64)
    samples = [Sample([1], [i], [-np.log(4) - apart], "stop", 0, i, 0, kept=[np.log(kept)], advantage=1.0)
               for i, (apart, kept) in enumerate([(0.0, 1.0), (np.log(1.5), 0.8), (np.log(4), 1.0)])]
    batch = pack.rows([segment for s in samples for segment in pack.alone(s)])
    value, stats = make_loss(config)(batch, h, W)
    assert np.isclose(float(value), -(1 + 1.5 * 0.8 + 2), atol=1e-6)
    assert np.allclose(stats["weight_all"], [1, 1.2, 4], atol=1e-5), "logged before it is cut"


def test_kl_is_zero_and_pulls_nowhere_at_the_reference():
    config = settled(algo="dr_grpo", kl_coef=0.1)
    policy, groups = model(0), [group([1, 1, 1], [3, 9, 1])]
    rl = fake(config, policy, groups, reference=model(0))
    stats = stages.update(rl, groups, make_loss(config, reference=rl.reference))
    assert stats["reference_kl"] == 0 and all((p.grad == 0).all() for p in policy.parameters())
    rl.reference = model(1)
    stats = stages.update(rl, groups, make_loss(config, reference=rl.reference))
    assert stats["reference_kl"] > 0.1 and any((p.grad != 0).any() for p in policy.parameters())


def test_equal_rewards_still_feel_the_kl():
    """a response without advantage costs no forward, but only when nothing else wants it: the KL
    does, in a run beside which the skipped half would drift freely"""
    groups = [group([1, 0], [4, 6]), group([1, 1], [5, 5], problem=1)]
    counts = {}
    for kl in (0.0, 0.1):
        config = settled(algo="dr_grpo", kl_coef=kl)
        rl = fake(config, model(0), groups, reference=model(1))
        counts[kl] = stages.update(rl, groups, make_loss(config, reference=rl.reference))["tokens"]
    assert counts == {0.0: 10, 0.1: 20}


def covariances(groups):
    """-> of every token of all groups, by the formula"""
    flat = [s for g in groups for s in g]
    logp = np.array([x for s in flat for x in s.logprobs])
    A = np.array([s.advantage for s in flat for _ in s.logprobs])
    return (logp - logp.mean()) * (A - A.mean())


def marks(marked, groups):
    return np.concatenate([marked[key(s)] for g in groups for s in g])


def test_covariance_is_taken_over_the_whole_batch():
    """the top share of one group, or of one rank's groups, are other tokens than the top share of all"""
    config = settled(algo="dr_grpo", cov="kl", cov_share=0.1, epochs=2)
    groups = ragged()
    for g in groups:
        advantage(g, config)
    marked = covariant(groups, config)
    top = marks(marked, groups)
    assert top.sum() == 5 == np.floor(0.1 * 50)
    assert set(np.flatnonzero(top)) == set(np.argsort(-covariances(groups))[:5])
    assert any(not np.array_equal(covariant([g], config)[key(s)], marked[key(s)])
               for g in groups for s in g)


def test_clip_cov_draws_from_a_band_by_chance():
    """Clip-Cov was once the largest covariances here, as KL-Cov is; its authors' code draws a share
    of all tokens, one at least, from those whose covariance is between 1 and 5. By chance, but the same
    ones in whatever order groups come, and others with another seed."""
    config = settled(algo="dr_grpo", cov="clip", cov_share=0.07)
    groups = ragged()
    rng = np.random.default_rng(0)
    for s in (s for g in groups for s in g):
        s.logprobs = list(rng.normal(-6, 4, len(s.logprobs)))
        s.advantage = float(rng.normal(0, 1.5))
    cov = covariances(groups)
    inside = (1 < cov) & (cov < 5)
    assert inside.sum() > 6 and (cov >= 5).any()
    found = marks(covariant(groups, config), groups).astype(bool)
    assert found.sum() == 3 == np.floor(0.07 * 50) and inside[found].all()
    assert set(np.flatnonzero(found)) != set(np.argsort(-np.where(inside, cov, 0))[:3]), "not the largest"

    assert np.array_equal(marks(covariant(groups[::-1], config), groups), found)
    seeds = [marks(covariant(groups, replace(config, seed=i)), groups) for i in range(30)]
    assert len({seed.tobytes() for seed in seeds}) > 10
    every = np.sum(seeds, axis=0)
    assert (every[inside] > 0).sum() > 0.8 * inside.sum() and not every[~inside].any()
    few = marks(covariant(groups, replace(config, cov_share=None)), groups)
    assert few.sum() == 1, "2e-4 of 50 tokens: one at least"
    assert marks(covariant(groups, replace(config, cov_share=0.9)), groups).sum() == inside.sum()


def test_forced_tokens_are_in_no_covariance():
    """a log-prob of nan says that nobody chose the token: it has no prediction in the batch, so
    none here either"""
    samples = group([1, 0], [4, 4])
    samples[0].logprobs[1] = float("nan")
    config = settled(algo="dr_grpo", cov="kl", cov_share=0.5, epochs=2)
    advantage(samples, config)
    marked = covariant([samples], config)
    assert [len(marked[key(s)]) for s in samples] == [3, 4] and sum(m.sum() for m in marked.values()) == 3
    batch = pack.rows([segment for s in samples for segment in pack.alone(s)])
    assert len(algos.by_key(marked, batch)) == len(batch.at_N)


def test_the_bonus_of_a_target_entropy_by_hand():
    """Skywork-OR1: it grows by a step while the entropy is below the target, falls above it and is not
    applied there, and stays between 0 and the most. The entropy is minus the mean log-prob: 1.5 here."""
    samples = group([1, 0], [2, 2])
    samples[0].logprobs = [-1.0, -2.0]
    samples[1].logprobs = [float("nan"), -1.5]
    step, most = entropy.ENTROPY_STEP, entropy.ENTROPY_MOST
    low, high = settled(entropy_target=1.6), settled(entropy_target=1.4)
    assert entropy.entropy_bonus(0.0, [samples], low) == (0.0, step)
    assert entropy.entropy_bonus(3 * step, [samples], low) == (3 * step, 4 * step)
    assert entropy.entropy_bonus(most, [samples], low) == (most, most)
    assert entropy.entropy_bonus(step, [samples], high) == (0.0, 0.0)
    assert entropy.entropy_bonus(0.0, [samples], high) == (0.0, 0.0)
    assert entropy.entropy_bonus(step, [], low) == (0.0, step), "a step without samples says nothing"


def test_a_target_entropy_is_a_bonus_that_adapts():
    """the first step has none; from the second on it is the --entropy-coef of that size, for samples of
    advantage 0, too"""
    config = settled(algo="dr_grpo", entropy_target=9.0, lr=0.05)
    groups, flat = ragged(), [group([1, 1], [3, 5])]
    rl = fake(config, model(0, torch.float32), groups + flat)
    plain = fake(settled(algo="dr_grpo", lr=0.05), model(0, torch.float32), groups + flat)
    stages.learn(rl, groups)
    stages.learn(plain, groups)
    assert torch.equal(weights_of(rl.model), weights_of(plain.model)) and rl.bonus == entropy.ENTROPY_STEP
    plain.config = replace(plain.config, entropy_coef=entropy.ENTROPY_STEP)
    moved_once = weights_of(rl.model)
    for each in (rl, plain):
        stages.learn(each, flat)
    assert torch.equal(weights_of(rl.model), weights_of(plain.model)) and rl.bonus == 2 * entropy.ENTROPY_STEP
    assert not torch.equal(moved_once, weights_of(model(0, torch.float32)))
    assert not torch.equal(weights_of(rl.model), moved_once)


def test_clip_cov_stops_and_kl_cov_holds_the_marked_tokens():
    groups = [group([1, 0], [6, 6])]
    plain, clip = settled(algo="rloo"), settled(algo="rloo", cov="clip")
    kl = settled(algo="rloo", cov="kl", cov_share=0.3, epochs=2, cov_coef=0.5)
    old = moved(stages.old_logprobs(fake(plain, model(0), groups), groups))
    marked = covariant(groups, kl)
    W, h = torch.randn(9, 4, dtype=torch.float64), torch.randn(12, 4, dtype=torch.float64)
    batch = pack.rows([segment for s in groups[0] for segment in pack.alone(s)])
    batch.weight_N.fill_(1)              # not those of the aggregation
    top_N = algos.by_key(marked, batch)

    def per_token(config, **kw):
        hidden = h.clone().requires_grad_()
        make_loss(config, old=old, **kw)(batch, hidden, W)[0].backward()
        return hidden.grad

    a, b, c = per_token(plain), per_token(clip, marked=marked), per_token(kl, marked=marked)
    assert top_N.sum() == 3 and (b[top_N == 1] == 0).all()
    assert torch.equal(a[top_N == 0], b[top_N == 0]) and torch.equal(a[top_N == 0], c[top_N == 0])
    x_N = (h @ W.T).log_softmax(1)[torch.arange(12), batch.targets_N] - algos.by_key(old, batch)
    onehot = torch.nn.functional.one_hot(batch.targets_N, 9).double()
    pull = 0.5 * x_N.sign()[:, None] * (onehot - (h @ W.T).softmax(1)) @ W
    assert torch.allclose((c - a)[top_N == 1], pull[top_N == 1])


def test_reset_makes_the_kl_zero_and_the_loss_continuous():
    config = settled(algo="prorl", kl_coef=0.1, lr=0.05)
    policy, groups = model(0, torch.float32), ragged()
    rl = fake(config, policy, groups, reference=model(0, torch.float32).requires_grad_(False))
    for _ in range(3):
        stages.learn(rl, groups)
    batch = pack.rows([segment for g in groups for s in g for segment in pack.alone(s)])

    def both():
        values = [make_loss(c, reference=rl.reference)(batch, batch.hidden(policy),
                                                       policy.head_weight)[0].item()
                  for c in (config, replace(config, kl_coef=0.0))]
        return values[0], values[1]

    full, without = both()
    assert full > without, "the policy went away from its reference"
    nanorl.reset(rl)
    after, same = both()
    assert after == same == without, "what is left is the loss as it was, less the KL"
    assert rl.optimizer.steps == 0 and all((s.m == 0).all() for s in rl.optimizer.shards)
    stages.learn(rl, groups)
    full, without = both()
    assert full > without, "the reference is a copy, it does not follow"


# -----------------------------------------------------------------------------
# several updates, ranks, signal


def weights_of(policy):
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_two_ranks_equal_one(algo):
    """rung 9, the sums: what two ranks back-propagate adds up to what one does, old log-probs and
    marked tokens included"""
    config = settled(algo=algo, tis=2.0, cov="kl", cov_share=0.1, epochs=2, row_tokens=48)
    groups, other = ragged() + [group([1, 1, 0], [2, 13, 5], seed=2, problem=2)], model(1)
    policy = model(0)
    rl = fake(config, policy, groups, reference=other)
    old = stages.old_logprobs(rl, groups)
    shares = [stages.old_logprobs(fake(config, policy, groups, rank, 2), groups) for rank in (0, 1)]
    assert set(shares[0]) | set(shares[1]) == set(old) and not set(shares[0]) & set(shares[1])
    assert all(np.allclose(v, old[k], atol=1e-12) for share in shares for k, v in share.items())
    loss = make_loss(config, old=moved(old), marked=covariant(groups, config), reference=other)
    whole = stages.update(rl, groups, loss)
    one = gradients(policy, rl.normaliser)
    policy.zero_grad()
    parts = []
    for rank in (0, 1):
        rl = fake(config, policy, groups, rank, 2, other)
        parts.append(stages.update(rl, groups, loss))
    assert all(part["tokens"] < whole["tokens"] for part in parts)
    two = gradients(policy, rl.normaliser)
    assert close(two, one, 1e-9)
    joined = merge_stats(parts)
    assert all(np.isclose(joined[k], whole[k]) for k in whole if not k.endswith("_all"))
    assert np.allclose(np.sort(joined["weight_all"]), np.sort(whole["weight_all"]))


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_minibatches_do_not_depend_on_who_held_the_groups(algo, monkeypatch):
    """they are cut from the list of all groups by address: whatever order ranks finished in, the
    weights are equal to the bit"""
    made, scored = [], []
    real = stages.old_logprobs
    monkeypatch.setattr(stages, "old_logprobs", lambda rl, groups: scored.append(1) or real(rl, groups))
    for turned in (False, True):
        groups = ragged() + [group([1, 1, 0], [2, 13, 5], seed=2, problem=2)]
        config = settled(algo=algo, epochs=2, minibatch=2, lr=1e-2)
        policy = model(0, torch.float32)
        rl = fake(config, policy, groups, reference=model(1, torch.float32).requires_grad_(False))
        stages.learn(rl, groups[::-1] if turned else groups)
        made.append(weights_of(policy))
        # four updates; one whose responses have all left the clip is a step without signal, and
        # counts as none
        assert 2 < rl.optimizer.steps <= 4 and rl.progress == 1
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], weights_of(model(0, torch.float32)))
    assert len(scored) == 2, "old log-probs once a rollout"


def test_one_update_scores_nothing_twice(monkeypatch):
    """one update a rollout: the old policy is the new one, and a second forward would only say so again"""
    monkeypatch.setattr(stages, "old_logprobs", lambda rl, groups: pytest.fail("a second forward"))
    groups = ragged()
    rl = fake(settled(algo="grpo"), model(0, torch.float32), groups)
    assert stages.learn(rl, groups)["clipped"] == 0 and rl.optimizer.steps == 1


def test_the_second_update_is_clipped_against_the_policy_that_sampled():
    """the ratio of update k is to the policy before update 1, not before update k: by then every
    ratio would be 1"""
    groups = ragged()
    rl = fake(settled(algo="grpo", epochs=3, lr=0.05), model(0, torch.float32), groups)
    assert stages.learn(rl, groups)["clipped"] > 0


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_step_without_signal_changes_no_weight(algo):
    """equal rewards, first on a fresh optimizer, then on one with momentum (a reference would be
    signal once the policy has left it)"""
    config = settled(algo=algo, epochs=2, minibatch=1, lr=1e-2)
    policy, flat = model(0, torch.float32), [group([1, 1], [3, 5]), group([0, 0], [2, 2], problem=1)]
    rl = fake(config, policy, flat, reference=model(0, torch.float32).requires_grad_(False))
    before = weights_of(policy).clone()
    stages.learn(rl, flat)
    assert torch.equal(weights_of(policy), before)
    groups = ragged()
    for g in groups:
        advantage(g, config)
    stages.learn(rl, groups)
    before = weights_of(policy).clone()
    assert not torch.equal(before, weights_of(model(0, torch.float32)))
    if config.kl_coef:
        rl.reference.load_state_dict(policy.state_dict())
    stages.learn(rl, flat)
    assert torch.equal(weights_of(policy), before)
    stages.learn(rl, [])
    assert torch.equal(weights_of(policy), before)


# -----------------------------------------------------------------------------
# the table and its flags


def test_an_axis_of_its_own_wins_over_the_row():
    config = with_algorithm(Config(algo="grpo", aggregate="token", clip_high=0.3))
    assert (config.baseline, config.aggregate, config.clip_low, config.clip_high,
            config.dynamic) == ("group", "token", 0.2, 0.3, False)
    assert with_algorithm(Config(algo="dapo")).dynamic
    assert with_algorithm(Config(algo="prorl")).temperature == 1.2
    assert with_algorithm(Config()).temperature == 1.0
    assert with_algorithm(Config(algo="prorl", temperature=0.7)).temperature == 0.7
    assert with_algorithm(Config(algo="rloo", trust="clip")).clip_high == 0.2
    assert with_algorithm(Config(ratio="power", power=-1.0)).power_end == -1.0


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_settled_config_settles_again(algo):
    config = with_algorithm(Config(algo=algo))
    assert with_algorithm(config) == config


@pytest.mark.parametrize("flags, words", [
    (dict(algo="rloo", clip_high=0.3), "--clip-high says nothing here: --trust is none"),
    (dict(algo="grpo", trust="none", clip_low=0.3), "--trust is none"),
    (dict(algo="gspo", power=1.0), "--power says nothing here: --ratio is sequence"),
    (dict(algo="gspo", trust="probability"), "--trust probability is about the probability of a token"),
    (dict(algo="grpo", power_end=1.0), "--ratio is token"),
    (dict(algo="dapo", length_power=1.0), "--aggregate is token"),
    (dict(epochs=0), "--epochs"),
    (dict(minibatch=64), "--minibatch 64 is above --prompts 32"),
    (dict(temperature=0.0), "--temperature 0"),
    (dict(clip_low=1.5), "--clip-low 1.5"),
    (dict(tis=0.5), "--tis 0.5"),
    (dict(top_p=0.9, tis=0.0), "--top-p"),
    (dict(reset_every=10), "--kl-coef"),
    (dict(reset_patience=2), "--kl-coef"),
    (dict(algo="prorl", kl_coef=0.0), "--kl-coef"),
    (dict(algo="prorl", reset_patience=2, eval_every=0), "--eval-every 0"),
    (dict(cov="clip", cov_share=2.0), "--cov-share"),
    (dict(cov="kl"), "no gradient"),
])
def test_what_does_not_go_together_is_refused_with_the_reason(flags, words, capsys):
    argv = [w for k, v in {"prompts": 32, **flags}.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    with pytest.raises(SystemExit) as stopped:
        config, _ = nanorl.configure(argv)
        stages.check_flags(with_algorithm(config))
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0], error
