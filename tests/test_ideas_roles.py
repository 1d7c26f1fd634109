"""the exact invariants of ideas in which a model teaches itself, calls, poses, reads its peers, or forgets"""
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import algos
import data
import pack
from common import evidence, view
from data import formats
from ideas import sdpo
from kernels import packed_attention
from rollout import Sample, completion, prompt_ids
from stages import Settings, accumulate, close, collect, next_problems, setup, update


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def small(here):
    """a random tiny model on Countdown; a text of odd length is right"""
    made = setup(Settings(init=evidence.random_model("formats", here), steps=4, prompts=3, n=4, max_new=12,
                          lr=1e-2, warmup=1, decay=0.0, workers=1, threads=1, algo="grpo", aggregate="token"),
                 reward=evidence.easy_reward(here))
    yield made
    close(made)


TOK = data.tokenizer("numbers")


def group_of(texts, rewards, problem=0):
    return [Sample([1], TOK.encode(text), [0.0] * len(TOK.encode(text)), "length", problem, i, 0, reward=r)
            for i, (text, r) in enumerate(zip(texts, rewards))]


def logits(model, tokens):
    """-> (T, V) in float64, of one sequence alone"""
    T = len(tokens)
    hidden_TD = model(torch.tensor(tokens), torch.arange(T), packed_attention([0, T], T))
    return hidden_TD.double() @ model.head_weight.double().t()


def gradient(rl, groups, loss):
    """-> the gradient of a sum over these groups, flat"""
    for p in rl.model.parameters():
        p.grad = None
    algos.weigh(groups, rl.config)
    optimizer, rl.optimizer = rl.optimizer, None                 # the gradients stay where autograd puts them
    accumulate(rl, groups, loss, 0, 1)
    rl.optimizer = optimizer
    found = torch.cat([p.grad.flatten().double() for p in rl.model.parameters()])
    for p in rl.model.parameters():
        p.grad = None
    return found


# --- sdpo


def test_sdpo_reads_the_first_right_sibling_that_is_not_itself():
    """as in the picture of its file: with right ones at 1 and 3, sample 1 reads 3 and all others read 1; a
    single right one teaches the others and is left out; the control distils the same samples"""
    group = group_of("abcd", [0.0, 1.0, 0.0, 1.0])
    pairs = {shown.index: [s.index for s in samples] for samples, shown in sdpo.readers(group, "sdpo")}
    assert pairs == {1: [0, 2, 3], 3: [1]}
    pairs = {shown.index: [s.index for s in samples] for samples, shown in sdpo.readers(group, "wrong")}
    assert pairs == {2: [0], 0: [1, 2, 3]}
    single = {shown.index: [s.index for s in samples]
              for samples, shown in sdpo.readers(group_of("abc", [0.0, 1.0, 0.0]), "sdpo")}
    assert single == {1: [0, 2]}
    assert sdpo.readers(group_of("abc", [0.0] * 3), "sdpo") == []


def test_sdpo_gives_each_teacher_its_own_prompt():
    problem = data.Problem("C3 7 12=43:", id=5)
    group = group_of(["1", "12*3=36,36+7=43", "2", "7+3=10"], [0.0, 1.0, 0.0, 1.0], problem=5)
    parts, contexts = sdpo.lesson([group], [problem], "sdpo", TOK)
    assert {number: TOK.decode(ids) for number, ids in contexts.items()} == {
        5: "E12*3=36,36+7=43|C3 7 12=43:", -6: "E7+3=10|C3 7 12=43:"}
    assert [[(s.problem, s.index) for s in part] for part in parts] == [[(5, 0), (5, 2), (5, 3)], [(-6, 1)]]
    assert {s.advantage for part in parts for s in part} == {1.0}


def test_sdpo_weights_are_the_deviation_of_the_reward():
    groups = [group_of("abcd", rewards) for rewards in ([1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1])]
    weights = sdpo.question_weights(groups, "weighted")
    assert weights == pytest.approx(np.array([3**0.5 / 4, 0.5, 0]) / ((3**0.5 / 4 + 0.5) / 3))
    assert (sdpo.question_weights(groups, "sdpo") == 1).all()
    assert not sdpo.question_weights(groups[2:], "weighted").any()


def test_sdpo_is_zero_where_both_read_the_same(small):
    """the identity: a teacher that knows no more than the student teaches nothing, to the last bit of a sum"""
    groups = list(collect(small, next_problems(small, 3), 4))
    for s in (s for group in groups for s in group):
        s.advantage = 1.0
    loss = sdpo.make_loss(small.model, small.model, {})
    assert gradient(small, groups, loss).abs().max() < 1e-5
    shown = {g[0].problem: TOK.encode("E1+2=3|C1 2 3=3:") for g in groups}
    assert gradient(small, groups, sdpo.make_loss(small.model, small.model, shown)).abs().max() > 1e-3


def test_sdpo_is_the_divergence_of_the_two_in_float64(small):
    """value and gradient against a plain Jensen-Shannon divergence, position by position"""
    (group,) = collect(small, next_problems(small, 1), 1)
    s = group[0]
    s.advantage = 1.0
    read = TOK.encode("E12*3=36,36+7=43|C3 7 12=43:")
    value = 0
    known = logits(small.model, read + s.tokens)[len(read) - 1:-1].detach().log_softmax(-1)
    own = logits(small.model, s.prompt + s.tokens)[len(s.prompt) - 1:-1].log_softmax(-1)
    middle = ((own.exp() + known.exp()) / 2).log()
    for side in (own, known):
        value = value + 0.5 * (side.exp() * (side - middle)).sum()
    grads = torch.autograd.grad(value, [*small.model.parameters()])
    wanted = torch.cat([g.flatten().double() for g in grads])
    loss = sdpo.make_loss(small.model, small.model, {s.problem: read})
    assert torch.allclose(gradient(small, [group], loss), wanted, atol=1e-5)
    stats = update(small, [group], loss)
    assert stats["apart"] == pytest.approx(value.item(), rel=1e-4) and stats["tokens"] == len(s.tokens)


def test_sdpo_teacher_follows_slowly():
    old, new = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = old.weight.detach().clone()
    sdpo.follow(old.requires_grad_(False), new)
    assert torch.allclose(old.weight, 0.95 * before + 0.05 * new.weight)
