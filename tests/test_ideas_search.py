"""the exact invariants of ideas about steps, trees, votes and verifiers"""
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import algos
import data
from common import evidence
from ideas import chunks
from rollout import Sample
from stages import Settings, close, collect, next_problems, setup


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(here):
    """a random tiny model on Countdown; a text of odd length is right"""
    made = setup(Settings(init=evidence.random_model("base", here), steps=4, prompts=3, n=4, max_new=12,
                          lr=1e-2, warmup=1, decay=0.0, workers=1, threads=1),
                 reward=evidence.easy_reward(here))
    yield made
    close(made)


TOK = data.tokenizer("chars")


def group_of(texts, rewards=None):
    rewards = rewards or [1.0] * len(texts)
    return [Sample([1], TOK.encode(text), [0.0] * len(text), "stop", 0, i, 0, reward=r)
            for i, (text, r) in enumerate(zip(texts, rewards))]


# --- chunks


def test_chunks_cuts_after_each_step():
    assert chunks.ends(TOK.encode("12*3=36,36+7=43"), TOK) == [8, 15]
    assert chunks.ends(TOK.encode("1,2,"), TOK) == [2, 4], "what ends the response is no step more"
    assert chunks.ends(TOK.encode("12"), TOK) == [2]
    shared = group_of(["1+2=3,3+4=7", "1+2=3,3*4=12", "1*2=2,2+4=6", "8"])
    assert len(chunks.prefixes(shared, TOK)) == 2, "a step that two share is asked once"


def test_chunks_by_hand():
    """the picture in chunks.py: a right first step, then a slip"""
    assert chunks.absolute([0.25, 0.75, 0.0]) == pytest.approx([0.5, -0.75])
    assert chunks.ratio([0.25, 0.75, 0.0], 0.8).tolist() == [1, -1]
    assert chunks.ratio([0.5, 0.41, 0.3], 0.8).tolist() == [1, -1], "a small loss is still good"
    assert chunks.ratio([0.0, 0.0, 0.0], 0.8).tolist() == [-1, -1], "nothing of nothing is not"


KNOWN = {"1+2=3,": 0.75, "1*2=2,": 0.25}


@pytest.mark.parametrize("arm", ["absolute", "shuffled"])
def test_chunks_only_moves_what_plain_pays(arm):
    """the advantages of a response add up to those of GRPO without the deviation, wherever they stand"""
    group = group_of(["1+2=3,3+4=7", "1+2=3,3*4=12", "1*2=2,2+4=6", "8"], [1.0, 0.0, 0.0, 0.0])
    known = {(0, tuple(TOK.encode(text))): value for text, value in KNOWN.items()}
    config = SimpleNamespace(gamma=0.8)
    chunks.credit(group, known, arm, config, TOK, np.random.default_rng(0))
    plain = algos.BASELINES["mean"](np.array([s.reward for s in group]))
    for s, a in zip(group, plain):
        cut = chunks.ends(s.tokens, TOK)
        assert len(s.advantage) == len(s.tokens)
        assert sum(s.advantage[end - 1] for end in cut) == pytest.approx(a)
        assert all(len(set(s.advantage[i:j])) == 1 for i, j in zip([0, *cut], cut)), "one for a whole step"
    assert set(group[3].advantage) == {-0.25}, "a response of one step gets what it got before"
    if arm == "absolute":
        assert group[1].advantage[0] == 0.5 and group[1].advantage[-1] == -0.75


def test_chunks_labels_are_centred_step_by_step():
    group = group_of(["1+2=3,3+4=7", "1+2=3,3*4=12", "1*2=2,2+4=6"], [1.0, 0.0, 0.0])
    known = {(0, tuple(TOK.encode(text))): value for text, value in KNOWN.items()}
    chunks.credit(group, known, "ratio", SimpleNamespace(gamma=0.8), TOK, None)
    assert [s.advantage[0] for s in group] == pytest.approx([2 / 3, 2 / 3, -4 / 3])
    assert [s.advantage[-1] for s in group] == pytest.approx([4 / 3, -2 / 3, -2 / 3])


def test_chunks_is_exact_on_a_chain_with_known_values():
    """Two steps of two choices each; whether a path is right is known. Averaged over all paths, the gradient
    with the true values is that of the chance to be right, in float64, and its variance is below that of the
    whole return."""
    right = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    first = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    second = torch.tensor([[0.5, 0.1], [-0.4, 0.2]], dtype=torch.float64, requires_grad=True)
    p, q = first.softmax(0), second.softmax(1)
    value = (p[:, None] * q * right).sum()
    truth = torch.cat([g.flatten() for g in torch.autograd.grad(value, (first, second), retain_graph=True)])
    after = (q * right).sum(1)
    moments = {}
    for arm in ("absolute", "return"):
        mean, square = 0, 0
        for i, j in itertools.product(range(2), repeat=2):
            path = [value.item(), after[i].item(), right[i, j].item()]
            paid = chunks.absolute(path) if arm == "absolute" else [path[2] - path[0]] * 2
            score = paid[0] * p[i].log() + paid[1] * q[i, j].log()
            grads = torch.autograd.grad(score, (first, second), retain_graph=True, allow_unused=True)
            g = torch.cat([x.flatten() for x in grads])
            chance = float(p[i] * q[i, j])
            mean = mean + chance * g
            square = square + chance * float((g**2).sum())
        moments[arm] = square - float((mean**2).sum())
        assert torch.allclose(mean, truth, atol=1e-12), arm
    assert moments["absolute"] < moments["return"]


def test_chunks_values_are_those_of_the_rollouts(small):
    """k rollouts from each prefix, scored whole; what was forced on them is not counted as sampled"""
    problems = next_problems(small, 3)
    asked = {p.id: [tuple(TOK.encode("1+2=3,")), tuple(TOK.encode("7,"))] for p in problems[:2]}
    known, spent = chunks.values(small, problems, asked, 4, seed=5)
    assert set(known) == {(id, prefix) for id in asked for prefix in asked[id]}
    assert all(4 * value == int(4 * value) for value in known.values())
    assert 2 * 2 * 4 <= spent <= 2 * 4 * (6 + 10), "12 tokens at most, 6 or 2 of them forced"
    again, _ = chunks.values(small, problems, asked, 4, seed=5)
    assert again == known and not small.visits, "an evaluation moves nothing"


def test_chunks_searches_and_counts(small):
    problems = small.problems[:6]
    for curve in (chunks.by_steps(small, problems, 2), chunks.independent(small, problems, 8)):
        tokens, solved = map(np.array, zip(*curve))
        assert (np.diff(tokens) >= 0).all() and (np.diff(solved) >= 0).all() and 0 <= solved[-1] <= 1
    groups = list(collect(small, problems, 8, seed=chunks.SEED))
    assert curve[-1][1] == np.mean([any(s.reward > 0.5 for s in group) for group in groups])
    assert math.isclose(curve[-1][0], sum(len(s.tokens) for group in groups for s in group) / 6)
