"""on-policy distillation: every loss against the full-vocabulary KL in float64, the teacher's side, the loop, the guard, bad input"""
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import opd
import opd_check
import pack
from common.run import start
from kernels import packed_attention
from nanorl import predicting
from rollout import Sample
from train_gpt import GPT, GPTConfig

N, D, V = 6, 8, 50


# -----------------------------------------------------------------------------
# the losses, in float64: the gradient with respect to the logits


def case(apart=1.0, equal=False, stop=None, **settings):
    """-> p, q, s as a loss gets them. The head is the identity where D = V, so that the gradient at the hidden states is that of the logits"""
    g = torch.Generator().manual_seed(3)
    z = torch.randn(N, V, generator=g, dtype=torch.float64)
    t = z.clone() if equal else z + apart * torch.randn(N, V, generator=g, dtype=torch.float64)
    eye = torch.eye(V, dtype=torch.float64)
    p, q = SimpleNamespace(hidden_ND=z.requires_grad_(), head_VD=eye), SimpleNamespace(hidden_ND=t, head_VD=eye)
    s = SimpleNamespace(**{**dict(targets_N=torch.randint(V, (N,), generator=g), temperature=1.0, k=8, baseline=0, bound=1e9, divergence="reverse",
                                  beta=0.5, stop=None if stop is None else torch.tensor(stop), trust_N=torch.ones(N, dtype=torch.float64)),
                           **settings})
    return p, q, target(p, q, s)


def target(p, q, s):
    s.logp_N, _ = opd.of_target(p, s)
    with torch.no_grad():
        s.logq_N, _ = opd.of_target(q, s)
    return s


def gradient(loss, p, q, s):
    return torch.autograd.grad(loss(p, q, s).sum(), p.hidden_ND)[0]


def logps(p, q, s):
    return (p.hidden_ND / s.temperature).log_softmax(-1), (q.hidden_ND / s.temperature).log_softmax(-1)


def exact(p, q, s):
    """the gradient of sum p (log p - log q) by plain autograd"""
    logp, logq = logps(p, q, s)
    return torch.autograd.grad((logp.exp() * (logp - logq)).sum(), p.hidden_ND)[0]


def close(a, b, tolerance=1e-12):
    return torch.allclose(a, b, atol=tolerance, rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_is_the_reverse_kl(temperature):
    p, q, s = case(temperature=temperature)
    assert close(gradient(opd.full, p, q, s), exact(p, q, s))
    logp, logq = logps(p, q, s)
    r = logp - logq
    by_hand = logp.exp() * (r - (logp.exp() * r).sum(1, keepdim=True)) / temperature          # p_j (r_j - KL)
    assert close(gradient(opd.full, p, q, s), by_hand.detach())


@pytest.mark.parametrize("baseline", [0, 5, V])
def test_sampled_is_the_full_kl_in_expectation(baseline):
    """the mean over every token that could have been drawn, weighted by its probability; a baseline changes nothing of it"""
    p, q, s = case(baseline=baseline)
    mean = torch.zeros(N, V, dtype=torch.float64)
    for y in range(V):
        s.targets_N = torch.full((N,), y)
        target(p, q, s)
        mean += logps(p, q, s)[0][:, y:y + 1].exp().detach() * gradient(opd.sampled, p, q, s)
    assert close(mean, exact(p, q, s), 1e-10)


def test_the_baseline_takes_variance_away():
    def variance(baseline):
        p, q, s = case(apart=3.0, baseline=baseline)
        total = 0.0
        for y in range(V):
            s.targets_N = torch.full((N,), y)
            target(p, q, s)
            total = total + logps(p, q, s)[0][:, y].exp().detach() * (gradient(opd.sampled, p, q, s) - exact(p, q, s)).pow(2).sum(1)
        return float(total.sum())
    assert variance(16) < 0.8 * variance(0)


def test_r_itself_says_nothing():
    """back-propagating log p - log q at the sampled token looks like the KL and is its estimate; yet its expected gradient is 0, since
    sum p dlog p = 0: a run that did this would drift by noise alone"""
    p, q, s = case()
    mean, largest = torch.zeros(N, V, dtype=torch.float64), 0.0
    for y in range(V):
        logp, logq = logps(p, q, s)
        one = torch.autograd.grad((logp - logq)[:, y].sum(), p.hidden_ND)[0]
        mean += logp[:, y:y + 1].exp().detach() * one
        largest = max(largest, float(one.abs().max()))
    assert mean.abs().max() < 1e-14 and largest > 0.5 and exact(p, q, s).abs().max() > 1e-3


def test_student_topk_is_the_full_gradient_cut():
    p, q, s = case(k=V)
    assert close(gradient(opd.student_topk, p, q, s), exact(p, q, s)), "nothing is cut at K = V"
    p, q, s = case(k=8)
    logp, logq = logps(p, q, s)
    on = torch.zeros(N, V, dtype=torch.bool).scatter_(1, logp.topk(8).indices, True)
    w = (logp.exp() * (logp - logq) * on).detach()
    assert close(gradient(opd.student_topk, p, q, s), w - logp.exp().detach() * w.sum(1, keepdim=True))
    # the corrected form sum (p r - p + q) has the very same one
    corrected = ((logp.exp() * (logp - logq) - logp.exp() + logq.exp()) * on).sum()
    assert close(gradient(opd.student_topk, p, q, s), torch.autograd.grad(corrected, p.hidden_ND)[0])
    assert torch.cosine_similarity(gradient(opd.student_topk, p, q, s).flatten(), exact(p, q, s).flatten(), dim=0) > 0.8


def test_teacher_topk_is_renormalised_and_blind_outside():
    p, q, s = case(k=V)
    assert close(gradient(opd.teacher_topk, p, q, s), exact(p, q, s))
    p, q, s = case(k=8)
    ids = q.hidden_ND.topk(8).indices
    a, b = p.hidden_ND.gather(1, ids).log_softmax(1), q.hidden_ND.gather(1, ids).log_softmax(1)
    expected = torch.autograd.grad((a.exp() * (a - b)).sum(), p.hidden_ND)[0]
    found = gradient(opd.teacher_topk, p, q, s)
    assert close(found, expected)
    assert (found.scatter(1, ids, 0.0).abs() < 1e-15).all(), "what the student has elsewhere is not seen"


def test_tail_is_the_kl_of_k_plus_one_outcomes():
    p, q, s = case(k=V - 1)
    assert close(gradient(opd.tail, p, q, s), exact(p, q, s), 1e-9), "the rest of V - 1 is one token"
    p, q, s = case(k=8)
    ids = p.hidden_ND.topk(8).indices
    a, b = (torch.cat([logp.gather(1, ids), (1 - logp.gather(1, ids).exp().sum(1, keepdim=True)).log()], 1) for logp in logps(p, q, s))
    assert close(gradient(opd.tail, p, q, s), torch.autograd.grad((a.exp() * (a - b)).sum(), p.hidden_ND)[0])


def test_forward_and_jensen_shannon():
    p, q, s = case(divergence="forward")
    assert close(gradient(opd.full, p, q, s), (logps(p, q, s)[0].exp() - logps(p, q, s)[1].exp()).detach())
    for beta in (0.1, 0.5, 0.9):
        p, q, s = case(divergence="jsd", beta=beta)
        logp, logq = logps(p, q, s)
        m = (1 - beta) * logp.exp() + beta * logq.exp()
        value = beta * (logq.exp() * (logq - m.log())).sum(1) + (1 - beta) * (logp.exp() * (logp - m.log())).sum(1)
        assert close(opd.full(p, q, s), value) and (value > 0).all() and (value < math.log(2)).all()
        assert close(gradient(opd.full, p, q, s), torch.autograd.grad(value.sum(), p.hidden_ND)[0])


EVERY = [("sampled", {}), ("sampled", {"baseline": 4}), ("student_topk", {}), ("teacher_topk", {}), ("tail", {}), ("full", {}),
         ("full", {"divergence": "forward"}), ("full", {"divergence": "jsd"})]


@pytest.mark.parametrize("stop", [None, [0, 3, 7]])
@pytest.mark.parametrize("name, settings", EVERY)
def test_no_gradient_where_the_student_is_the_teacher(name, settings, stop):
    p, q, s = case(equal=True, stop=stop, **settings)
    assert gradient(opd.LOSSES[name], p, q, s).abs().max() < 1e-14
    p, q, s = case(stop=stop, **settings)
    assert gradient(opd.LOSSES[name], p, q, s).abs().max() > 1e-3, "and some where it is not"


def test_the_loss_that_is_left_out():
    """The KL summed over the top K as it stands, back-propagated: what several distillers ship. At p = q each term's derivative is
    p (r + 1) = p, and over part of the vocabulary these do not cancel: a perfect student is pushed to put more into its own top K. It is
    worst where the run has nearly converged. Renormalising, a tail bucket, - p + q or stop-gradient weights each repair it."""
    p, q, s = case(equal=True)
    logp, logq = logps(p, q, s)
    ids = logp.topk(s.k).indices
    a, b = logp.gather(1, ids), logq.gather(1, ids)
    assert torch.autograd.grad((a.exp() * (a - b)).sum(), p.hidden_ND)[0].abs().max() > 0.01


@pytest.mark.parametrize("name", opd.LOSSES)
def test_stop_ids_are_one_action(name):
    """A base model ends with one id, its teacher with another, and both mean the same. Scored id by id the student is punished wherever
    it stops, and the id the teacher would use is never sampled: lengths grow to the cap. As one action the two agree, so the gradient
    is the one of a vocabulary that has a single stop."""
    stop, kept = [0, 3], [i for i in range(V) if i not in (0, 3)]
    p, q, s = case(stop=stop, k=V if name != "tail" else V - 3)
    with torch.no_grad():                                        # the student ends by 0 only, the teacher by 3 only
        p.hidden_ND[:, 3], q.hidden_ND[:, 0] = -30.0, -30.0
        q.hidden_ND[:, 3] = p.hidden_ND[:, 0]
        q.hidden_ND[:, kept] = p.hidden_ND[:, kept]
        s.targets_N = torch.zeros(N, dtype=torch.int64)
    found = gradient(opd.LOSSES[name], p, q, target(p, q, s))
    assert found.abs().max() < 1e-9, "they agree on everything but the name of the end"
    s.stop = None
    assert gradient(opd.LOSSES[name], p, q, target(p, q, s)).abs().max() > 0.1, "id by id they seem far apart"


def test_log_ratios_are_bounded_as_weights_not_as_values():
    """A clamp that is back-propagated through has no gradient where it acts: the worst tokens would stop learning. As a weight it only
    limits them."""
    p, q, s = case(apart=8.0, bound=2.0)
    far = (s.logp_N - s.logq_N).abs() > 2
    assert far.any()
    expected = torch.autograd.grad(((s.logp_N - s.logq_N).detach().clamp(-2, 2) * s.logp_N).sum(), p.hidden_ND)[0]
    found = gradient(opd.sampled, p, q, target(p, q, s))
    assert close(found, expected) and (found[far].abs().amax(1) > 0.1).all()


def test_bytes_a_token():
    c = opd.Config()
    assert opd.bytes_a_token(c, 1000) == 4 and opd.bytes_a_token(replace(c, loss="full"), 1000) == 4000
    assert opd.bytes_a_token(replace(c, loss="teacher_topk", k=32), 1000) == 256
