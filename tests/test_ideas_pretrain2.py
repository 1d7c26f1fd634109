"""the exact invariants of more ideas about pretraining: where each equals what it is compared with, a case
worked by hand"""
import math
from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch

import train_gpt
from common.optim import Optimizer
from ideas import (ahead, depth, distill, evolve, memorize, merging, mixture, mup, script_bpe, sinks, tokens,
                   zsl)
from kernels import packed_attention
from tests.models import nudged
from train_gpt import GPT, scratch, steps


@pytest.fixture
def few(monkeypatch):
    """steps of two windows of 16 bytes, one block: what is exact is exact at any size"""
    small = train_gpt.PRESETS["tiny"].replace("--batch 16 --seq-len 128", "--batch 2 --seq-len 16")
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", f"{small} --row-tokens 64 --n-layer 1")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@torch.no_grad()
def logits_of(model, tokens):
    T = len(tokens)
    return model(torch.tensor(tokens), torch.arange(T), packed_attention([0, T], T)) @ model.head_weight.t()


class Silent:
    """a trial that draws nothing"""
    def point(self, *args):
        pass
    dot = point


def plainly(total=3, seed=1, **optimizer):
    """-> the weights after a few steps of train_gpt"""
    model, document = scratch("tiny", seed)
    list(steps(model, document, Optimizer(model, **optimizer), total))
    return model.state_dict()


# -----------------------------------------------------------------------------
# mixtures


def a_law():
    """two domains: the first helps both, the second only itself"""
    E = torch.tensor([[0.5, 1.0]], dtype=torch.float64).log()
    C = torch.tensor([[[1.0, 1e-9], [0.5, 2.0]]], dtype=torch.float64).log()
    g = torch.tensor([[[0.5, 0.5], [0.5, 0.25]]], dtype=torch.float64).log()
    return E, C, g


def test_the_law_by_hand():
    shares = torch.tensor([[0.25, 0.75], [0.64, 0.36]], dtype=torch.float64)
    found = mixture.losses_of(a_law(), shares)
    assert found.shape == (2, 1, 2)
    for (a, b), (first, second) in zip(shares.tolist(), found[:, 0].tolist()):
        assert first == pytest.approx(0.5 + 1 / a**0.5, rel=1e-6)
        assert second == pytest.approx(1.0 + 1 / (0.5 * a**0.5 + 2 * b**0.25))


def test_a_law_is_found_again_and_so_is_its_minimum(monkeypatch):
    """twelve losses that obey a law: the fit says the losses on other shares, and the best shares are
    those of a search over all"""
    monkeypatch.setattr(mixture, "STARTS", 8)
    E, C, g = (torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, 3, dtype=torch.float64),
               torch.full((1, 3, 3), -1.0, dtype=torch.float64))
    C[0] += torch.diag(torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64))
    rand = torch.Generator().manual_seed(0)
    draws = torch.rand(40, 3, generator=rand, dtype=torch.float64).log().neg()
    shares = mixture.floored(draws / draws.sum(1, keepdim=True))
    losses = mixture.losses_of((E, C, g), shares)[:, 0]
    law = mixture.fitted(shares[:12], losses[:12], 300, 0)
    said = mixture.losses_of(law, shares[12:])[:, 0]
    assert float((said - losses[12:]).abs().max()) < 0.02
    best = mixture.best_shares((E, C, g), 3, 300)
    assert float(best.sum()) == pytest.approx(1) and float(best.min()) >= mixture.LEAST - 1e-9
    grid = [(a, b, 1 - a - b) for a in torch.arange(0.05, 0.9, 0.01).tolist()
            for b in torch.arange(0.05, 0.95 - a, 0.01).tolist()]
    means = mixture.losses_of((E, C, g), torch.tensor(grid, dtype=torch.float64)).mean((1, 2))
    assert float(mixture.losses_of((E, C, g), best[None]).mean()) <= float(means.min()) + 1e-4


def test_a_mixture_of_code_alone_is_plain_training_to_the_bit(few):
    model, document = scratch("tiny", 1)
    only = mixture.mixed(document, torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert all(only(split, i) == document(split, i) for split in ("train", "valid") for i in range(5))
    list(steps(model, only, Optimizer(model, lr=1e-2, muon_lr=1.4e-2), 3))
    assert equal(model.state_dict(), plainly(lr=1e-2, muon_lr=1.4e-2))


def test_shares_are_of_tokens_and_mixtures_share_their_texts():
    _, document = scratch("tiny", 1)
    a = mixture.mixed(document, [0.25, 0.25, 0.25, 0.25])
    b = mixture.mixed(document, [0.1, 0.1, 0.1, 0.7])
    alone = [mixture.mixed(document, one) for one in torch.eye(4)]
    counts = [0] * 4
    for i in range(200):
        text = a("train", i)
        assert abs(len(text[0]) - 129) < 4, "every text is as long"
        which = [k for k, one in enumerate(alone) if one("train", i) == text]
        assert len(which) == 1
        counts[which[0]] += 1
        assert any(one("train", i) == b("train", i) for one in alone)
    assert all(30 < count < 70 for count in counts)


def test_what_is_tried_covers_the_simplex():
    shares = mixture.drawn(3)
    assert shares.shape == (12, 4) and torch.allclose(shares.sum(1), torch.ones(12, dtype=torch.float64))
    assert torch.allclose(shares[0], torch.full((4,), 0.25, dtype=torch.float64))
    assert float(shares.min()) >= mixture.LEAST and float(shares.max()) > 0.5
    assert not torch.equal(shares, mixture.drawn(4)), "each seed tries others"


# -----------------------------------------------------------------------------
# distilling


def test_half_of_the_rows_are_of_high_entropy():
    truth = distill.bigram(64, torch.Generator().manual_seed(0))
    assert torch.allclose(truth.sum(1), torch.ones(64, dtype=torch.float64))
    assert float(distill.entropy(truth[:32]).min()) > 3 and float(distill.entropy(truth[32:]).max()) < 0.2
    assert float(truth[32:].max(1).values.min()) >= distill.SURE
    prefixes, nexts = distill.read(truth, 40_000, torch.Generator().manual_seed(0))
    shares = distill.counted(prefixes, nexts, 64)
    assert torch.allclose(shares.sum(1), torch.ones(64, dtype=torch.float64))
    assert float((shares - truth).abs().max()) < 0.06


def test_a_share_of_nothing_is_plain_and_a_teacher_that_is_sure_is_the_token():
    rand = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 8, generator=rand)
    nexts = torch.randint(8, (6,), generator=rand)
    teacher = torch.rand(6, 8, generator=rand).softmax(-1)
    plain = torch.nn.functional.cross_entropy(logits, nexts)
    assert torch.equal(distill.loss_of(logits, nexts, teacher, torch.zeros(6)), plain)
    sure = torch.nn.functional.one_hot(nexts, 8).float()
    assert torch.allclose(distill.loss_of(logits, nexts, sure, torch.full((6,), 0.7)), plain)
    wanted = 0.0
    for row in range(6):
        logp = logits[row].double().log_softmax(-1)
        wanted -= 0.25 * float(logp[nexts[row]]) + 0.75 * float((teacher[row].double() * logp).sum())
    assert float(distill.loss_of(logits, nexts, teacher, torch.full((6,), 0.75))) == pytest.approx(wanted / 6)


def test_a_student_that_equals_its_teacher_has_no_gradient():
    teacher = torch.rand(4, 8, generator=torch.Generator().manual_seed(0)).softmax(-1)
    logits = teacher.log().requires_grad_()
    distill.loss_of(logits, torch.zeros(4, dtype=torch.int64), teacher, torch.ones(4)).backward()
    assert float(logits.grad.abs().max()) < 1e-7


def test_routing_leaves_out_the_surest_rows():
    truth = distill.bigram(40, torch.Generator().manual_seed(0))
    share = distill.routed(truth)
    out = (share == 0).nonzero()[:, 0].tolist()
    assert out == sorted(distill.entropy(truth).argsort()[:6].tolist()) and min(out) >= 20
    assert float(share.max()) == pytest.approx(distill.A)


def test_a_student_of_the_truth_has_no_distance_left():
    truth = distill.bigram(16, torch.Generator().manual_seed(0))
    assert all(abs(kl) < 1e-5 for kl in distill.distance(truth, truth.log().float()).values())
    away = distill.distance(truth, torch.zeros(16, 16))
    assert away["high"] == pytest.approx(math.log(16) - float(distill.entropy(truth[:8]).mean()))


def test_arms_of_the_sandbox_read_the_same():
    """own counts: what the student's text says and nothing else; hard: as many tokens, of the teacher"""
    config = distill.Config(steps=3, batch=8, tokens=16)
    truth = distill.bigram(16, torch.Generator().manual_seed(0))
    tables = {arm: distill.student(arm, config, truth, 0.1, lambda *_: None) for arm in distill.RATES}
    prefixes, _ = distill.read(truth, 24, torch.Generator().manual_seed(config.seed + 1))
    unread = sorted(set(range(16)) - set(prefixes.tolist()))
    assert unread and all(not table[unread].any() for table in tables.values())
    assert len({str(table.tolist()) for table in tables.values()}) == len(tables), "the arms differ"


# -----------------------------------------------------------------------------
# what comes soon


def a_row(texts, model, total=64):
    docs = [(t, [False] + [True] * (len(t) - 1)) for t in texts]
    row, = train_gpt.packed_rows(docs, total, "cpu")
    return row


def test_what_comes_soon_by_hand():
    """two texts in a row: distances by hand, an e less per token, nothing from the other text; a token that
    comes twice counts where it comes first"""
    tokens = torch.tensor([5, 6, 7, 6, 1, 2, 1])
    ends = torch.tensor([4, 4, 4, 4, 7, 7, 7])
    target = ahead.order_targets(tokens, ends, 9, list(range(ahead.W)))
    e = math.exp(-1)
    assert target[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 1 / (1 + e), e / (1 + e), 0])
    assert target[1].tolist() == pytest.approx([0, 0, 0, 0, 0, 0, e / (1 + e), 1 / (1 + e), 0])
    assert target[2].tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 1, 0, 0])
    assert not target[3].any() and not target[6].any(), "nothing comes"
    assert target[4].tolist() == pytest.approx([0, 1 - 1 / (1 + e), 1 / (1 + e), 0, 0, 0, 0, 0, 0])
    swapped = ahead.order_targets(tokens, ends, 9, [1, 0, *range(2, ahead.W)])
    assert swapped[0].tolist() == pytest.approx([0, 0, 0, 0, 0, 0, e / (1 + e), 1 / (1 + e), 0])


def test_what_comes_soon_is_the_papers_target():
    """softmax of W - distance over the whole vocabulary, minus infinity where a token does not come: written
    for one text and all distances, in float64"""
    rand = torch.Generator().manual_seed(0)
    tokens = torch.randint(12, (40,), generator=rand)
    target = ahead.order_targets(tokens, torch.full((40,), 40), 12, list(range(ahead.W)))
    for t in range(39):
        score = torch.full((12,), -torch.inf, dtype=torch.float64)
        for d, token in enumerate(tokens[t + 1:].tolist()):
            score[token] = max(score[token], 100.0 - d)          # a window of 100
        assert torch.allclose(target[t].double(), score.softmax(-1), atol=2e-6)


def test_without_the_second_head_it_is_plain_training(few):
    """the loss of the next byte among the arms' losses is train_gpt's"""
    model, document = scratch("tiny", 1)
    docs = [document("train", i) for i in range(2)]
    row, = train_gpt.packed_rows(docs, 64, "cpu")
    hidden = ahead.hidden_of(model, row)
    assert torch.equal(ahead.ahead_loss(model, hidden, row, [1.0]), train_gpt.forward(model, row))
    trial = Silent()
    config = ahead.Config(steps=3, asked=2, seed=1)
    plain = ahead.train("plain", trial, config)
    model.load_state_dict(plainly(lr=ahead.LR, muon_lr=ahead.MUON_LR))
    document.config.eval_docs = 2
    assert plain == train_gpt.evaluate(model, document)


def test_tokens_ahead_by_hand():
    model, _ = scratch("tiny", 1)
    nudged(model, 0, 0.05, matrices_only=True)
    row = a_row([[5, 6, 7, 8], [20, 21]], model)
    hidden = ahead.hidden_of(model, row)
    logp = (hidden @ model.head_weight.t()).detach().double().log_softmax(-1)
    tokens, cu = row[0], row[4]
    wanted = 0.0
    for a, b in zip(cu, cu[1:]):
        for t in range(a, b):
            for n, weight in ((1, 1.0), (2, 0.5), (3, 0.125)):
                wanted -= weight * float(logp[t, tokens[t + n]]) if t + n < b else 0.0
    assert ahead.ahead_loss(model, hidden, row, [1.0, 0.5, 0.125]).item() == pytest.approx(wanted, rel=1e-5)


def test_mtp_ends_as_plain_training():
    assert ahead.weights(0.0) == [1.0, 0.5, 0.25] and ahead.weights(1 / 6) == pytest.approx([1.0, 0.5, 0.125])
    assert ahead.weights(0.5) == pytest.approx([1.0, 0.25]) and ahead.weights(0.9) == [1.0]


# -----------------------------------------------------------------------------
# widths


def test_at_the_narrow_width_all_arms_are_one_model():
    """so one search of the rate serves all; and that model is train_gpt's, with other first matrices"""
    config = mup.Config(steps=2, batch=2, seed=1)
    ends = []
    for arm in mup.ARMS:
        model, document, optimizer_of = mup.built(arm, config, 1)
        plain = GPT(model.config)
        plain.load_state_dict(model.state_dict())
        list(steps(model, document, optimizer_of(1e-2), 2))
        ends.append(model.state_dict())
    list(steps(plain, document, Optimizer(plain, lr=1e-2, weight_decay=0), 2))
    assert all(equal(end, plain.state_dict()) for end in ends)


def test_mups_rates_and_first_weights():
    """four times as wide: 1/4 of the rate where a matrix of a block reads more numbers, elsewhere the rate"""
    config = mup.Config(steps=1, batch=2)
    moves = {}
    for arm in mup.ARMS:
        model, document, optimizer_of = mup.built(arm, config, 4)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        list(steps(model, document, optimizer_of(1e-2), 1))
        moves[arm] = {name: float((p - before[name]).abs().max()) for name, p in model.named_parameters()}
        spread = {name: float(w.std()) for name, w in before.items() if w.ndim == 2}
        assert spread["embed.weight"] == pytest.approx(0.7, rel=0.05)
        assert spread["blocks.1.qkv.weight"] == pytest.approx(128**-0.5, rel=0.05)
        reads = 32 if arm == "muP" else 128
        assert spread["head.weight"] == pytest.approx(reads**-0.5, rel=0.05)
    # the first step of Adam is the rate, for every weight that has a gradient
    rate = moves["standard"]["head.weight"]
    for name, moved in moves["muP"].items():
        quarter = name.startswith("blocks.") and not name.endswith("norm.weight")
        assert moved == pytest.approx(rate / 4 if quarter else rate, rel=0.02), name
        assert moves["all slower"][name] == pytest.approx(rate / 4, rel=0.02)


def test_what_a_step_changes_does_not_grow_with_the_width_in_mup():
    """the coordinate check: by how much one step moves the logits, from 32 to 128 wide"""
    grown = {}
    for arm in ("standard", "muP"):
        moved = []
        for m in (1, 4):
            model, document, optimizer_of = mup.built(arm, mup.Config(steps=1, batch=4, seed=1), m)
            before = logits_of(model, document("valid", 0)[0])
            list(steps(model, document, optimizer_of(1e-3), 1, schedule=lambda step: 1.0))
            moved.append(float((logits_of(model, document("valid", 0)[0]) - before).square().mean().sqrt()))
        grown[arm] = moved[1] / moved[0]
    assert grown["muP"] < 1.5 < 2.5 < grown["standard"]


# -----------------------------------------------------------------------------
# zero-sum learning


def test_what_moves_and_what_cancels_by_hand():
    before = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert zsl.interference(before, before - 0.5) == (pytest.approx(0.5), pytest.approx(0.0))
    moved, cancelled = zsl.interference(before, torch.tensor([0.0, 2.0, 3.5, 4.0]))
    assert moved == pytest.approx(1.5 / 4) and cancelled == pytest.approx(1 - 0.5 / 1.5)
    assert zsl.interference(before, torch.tensor([0.0, 3.0, 3.0, 4.0]))[1] == pytest.approx(1.0)


def test_the_identity_of_the_mean_loss():
    """the change of the mean loss is M (1 - D), whatever the losses"""
    rand = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 1000, generator=rand, dtype=torch.float64)
    moved, cancelled = zsl.interference(a, b)
    assert moved * (1 - cancelled) == pytest.approx(abs(float(b.mean() - a.mean())), rel=1e-9)


def test_the_kink_of_two_lines_is_where_they_meet():
    x = [0.5 * i for i in range(12)]
    y = [5 - 2 * min(t, 3.5) - 0.2 * max(t - 3.5, 0) for t in x]
    assert zsl.kink(x, y) == pytest.approx(3.5)


def test_a_slowdown_by_cancelling_alone_and_by_moving_less_alone():
    """losses whose tokens move as much all along, and ever more of them upwards; and losses that all fall,
    ever less: the parts are 100% and 0%, and they add up to the slow-down"""
    rand = torch.Generator().manual_seed(0)
    whens = [round(10 * 2 ** (j / 2)) for j in range(9)]
    sizes = 0.1 + torch.rand(4000, generator=rand, dtype=torch.float64)
    cancel, shrink = [10 + sizes], [10 + sizes]
    for j in range(8):
        rising = torch.arange(4000) % 100 < (5 if j < 4 else 40)
        cancel.append(cancel[-1] + torch.where(rising, 0.5, -0.5))
        shrink.append(shrink[-1] - (0.5 if j < 4 else 0.1) * sizes)
    at, less, cancelling = zsl.slowdown(whens, torch.stack(cancel))
    assert at == pytest.approx(40, rel=0.3) and abs(less) < 0.1 < 1 < cancelling
    at, less, cancelling = zsl.slowdown(whens, torch.stack(shrink))
    assert less == pytest.approx(math.log(5)) and abs(cancelling) < 1e-9


def test_shuffled_bytes_are_the_same_bytes(few):
    _, document = scratch("tiny", 1)
    mixed = zsl.shuffled(document)
    for split in ("train", "valid"):
        assert sorted(mixed(split, 2)[0]) == sorted(document(split, 2)[0]) != document(split, 2)[0]
        assert mixed(split, 2) == mixed(split, 2)


def test_looking_at_tokens_is_plain_training_to_the_bit(few):
    """the arm of 0.16M is AdamW at a constant rate, and its looks sum to train_gpt's loss"""
    config = zsl.Config(first=2, doublings=2, batch=2, asked=3, seed=1)
    trial = Silent()
    trial.bar = Silent()
    trial.bar.update = lambda: None
    losses = zsl.train("0.16M", trial, config)
    assert len(losses) == 5
    model, document = scratch("tiny", 1)
    list(steps(model, document, Optimizer(model, lr=zsl.LR), 8,
               schedule=lambda step: min(1.0, (step + 1) / zsl.WARMUP)))
    document.config.eval_docs = 3
    assert float(losses[-1].mean()) == pytest.approx(train_gpt.evaluate(model, document)["loss"], rel=1e-6)


# -----------------------------------------------------------------------------
# sinks


def scores_of(size, seed=0):
    rand = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(2, size, size, generator=rand, dtype=torch.float64)
    return scores.masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -torch.inf)


def test_weights_by_hand():
    scores = torch.tensor([[math.log(3.0), -torch.inf], [math.log(2.0), math.log(0.5)]], dtype=torch.float64)
    assert sinks.softmax(scores)[1].tolist() == pytest.approx([0.8, 0.2])
    # e^s - 1: 2; and 1 and -1/2
    assert sinks.softpick(scores).flatten().tolist() == pytest.approx([1, 0, 1 / 1.5, 0], rel=1e-5)
    low = sinks.softpick(torch.tensor([[-1.0, -2.0]], dtype=torch.float64))
    assert low.tolist() == [[0.0, 0.0]], "a head that wants nothing takes nothing"
    assert sinks.sigmoid(torch.tensor([math.log(3.0), -torch.inf])).tolist() == pytest.approx([0.75, 0.0])


def test_what_sums_to_one_and_what_need_not():
    scores = scores_of(7)
    for arm, weights_of in sinks.ARMS.items():
        weights = weights_of(scores)
        assert torch.isfinite(weights).all() and float(weights.min()) >= 0
        assert not weights[:, 0, 1:].any(), f"{arm} looks ahead"
        sums = weights.sum(-1)
        if arm == "softmax":
            assert torch.allclose(sums, torch.ones_like(sums))
        if arm == "sigmoid / sum":
            assert torch.allclose(sums, torch.ones_like(sums), atol=1e-3)
        if arm == "softpick":
            assert float(sums.max()) <= 1 + 1e-6 and float(sums.min()) < 0.9


def test_softpick_is_its_formula_and_survives_large_scores():
    scores = scores_of(7)
    up = (scores.exp() - 1).masked_fill(scores == -torch.inf, 0.0)
    formula = up.relu() / up.abs().sum(-1, keepdim=True)
    assert torch.allclose(sinks.softpick(scores), formula, atol=2e-5)
    large = (100 * scores.float()).requires_grad_()
    sinks.softpick(large).square().sum().backward()
    assert torch.isfinite(large.grad.masked_fill(scores == -torch.inf, 0.0)).all()


def test_explicit_softmax_is_the_models_own_attention():
    """two texts in a row, of different lengths: the same hidden states, and a text sees only itself"""
    shape, _ = scratch("tiny", 1)
    plain = nudged(GPT(shape.config).init_weights(1), 0, 0.1)
    model = sinks.Explicit(shape.config)
    model.load_state_dict(plain.state_dict())
    row = a_row([[5, 6, 7, 8, 9, 10], [20, 21, 22]], model)
    attend = packed_attention(row[4], 6)
    with torch.no_grad():
        assert torch.allclose(model(row[0], row[1], None), plain(row[0], row[1], attend), atol=1e-4)
        found = train_gpt.forward(model, row)
        assert float(found) == pytest.approx(float(train_gpt.forward(plain, row)), rel=1e-5)


def test_a_head_that_always_looks_at_the_first_token_sinks(monkeypatch):
    """weights of one's own: all on the first, or all on the query itself"""
    shape, document = scratch("tiny", 1)
    document = sinks.marked(document)
    model = sinks.Explicit(shape.config).init_weights(1)

    def to_first(scores):
        weights = torch.eye(scores.shape[-1]).expand_as(scores).clone()
        weights[:, 0] = 0.0
        weights[:, 0, :, 0] = 1.0                                # of one head
        return weights

    model.weights_of = to_first
    first = sinks.on_the_first(model, document, 3)
    assert first.shape == (3, 4) and first[:, 0].tolist() == [1.0] * 3 and not first[:, 1:].any()
    assert model.first is None, "looking ends"
    model.weights_of = sinks.sigmoid_sum
    model.blocks[0].qkv.weight.data.zero_()                      # scores of zero: equal weights
    # query i of 128 has i + 1 tokens to look at; the first is left out
    equally = sum(1 / (i + 1) for i in range(1, 129)) / 128
    assert sinks.on_the_first(model, document, 3)[0].tolist() == pytest.approx([equally] * 4, rel=1e-2)


def test_every_text_begins_with_the_same_token():
    _, document = scratch("tiny", 1)
    texts = [sinks.marked(document)(split, i) for split in ("train", "valid") for i in range(4)]
    first, = document.tok.encode(sinks.FIRST)
    assert {tokens[0] for tokens, _ in texts} == {first}
    assert all(len(tokens) > 120 and not trained[0] and all(trained[1:]) for tokens, trained in texts)


# -----------------------------------------------------------------------------
# depth


def test_factors_by_hand():
    """eight blocks in 100 steps: 3 steps for the first, 24 for the last; reverse: the same, the last first"""
    assert depth.factors("plain", 0, 100, 8) == depth.factors("zero blocks", 5, 100, 8) == [1.0] * 8
    assert depth.factors("ProRes", 0, 100, 8) == [0.0] * 8
    assert depth.factors("ProRes", 3, 100, 8) == pytest.approx([1 / l for l in range(1, 9)])
    later = [12 / (3 * l) for l in range(5, 9)]
    assert depth.factors("ProRes", 12, 100, 8) == pytest.approx([1.0] * 4 + later)
    assert depth.factors("ProRes", 24, 100, 8) == [1.0] * 8
    for step in range(30):
        assert depth.factors("reverse", step, 100, 8) == depth.factors("ProRes", step, 100, 8)[::-1]


def test_a_block_with_a_factor_of_one_is_the_block_to_the_bit():
    """the loss and every gradient; with a factor of zero the block is the identity"""
    config = depth.Config(batch=2, asked=2, seed=1)
    model, document = depth.built("plain", config)
    plain = GPT(model.config)
    plain.load_state_dict(model.state_dict())
    row = next(train_gpt.packed_rows([document("train", i) for i in range(2)], 4096, "cpu"))
    for m in (model, plain):
        train_gpt.forward(m, row).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters()))
    for block in model.blocks:
        block.factor = 0.0
    with torch.no_grad():
        found = model(row[0], row[1], packed_attention(row[4], 129))
        assert torch.equal(found, model.norm(model.embed(row[0])))


def test_zero_blocks_never_learn():
    """architecture warm-up as it is described: all matrices of a block zero, and then unlocked. The gradient
    of each matrix is a product with another that is zero, so that training leaves them all at zero, gains
    included, and the model is one of half the depth, to the bit"""
    config = depth.Config(steps=4, batch=2, asked=2, seed=1)
    model, document = depth.built("zero blocks", config)
    half = GPT(replace(model.config, n_layer=4))
    half.load_state_dict({name: w for name, w in model.state_dict().items()
                          if not name.startswith(tuple(f"blocks.{l}." for l in range(4, 8)))})
    before = {name: w.clone() for name, w in model.state_dict().items()}
    for m in (model, half):
        list(steps(m, document, Optimizer(m, lr=1e-2, weight_decay=0), 4))
    after = model.state_dict()
    late = [name for name in after if name.startswith(tuple(f"blocks.{l}." for l in range(4, 8)))]
    assert late and all(torch.equal(after[name], before[name]) for name in late)
    assert all(torch.equal(after[name], w) for name, w in half.state_dict().items())
    assert not torch.equal(after["blocks.0.qkv.weight"], before["blocks.0.qkv.weight"])


def test_the_largest_eigenvalue_of_a_quadratic():
    """H and S are known: the power iteration finds the largest eigenvalue of S H S, in two pieces"""
    rand = torch.Generator().manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(8, 8, generator=rand, dtype=torch.float64))
    H = Q @ torch.diag(torch.tensor([9.0, 3, 2, 1, 1, 0.5, 0.1, -2], dtype=torch.float64)) @ Q.t()
    S = 0.5 + torch.rand(8, generator=rand, dtype=torch.float64)

    def gradient(moved):
        return list((H @ torch.cat(moved)).split(4))

    vector = list(torch.randn(8, generator=rand, dtype=torch.float64).split(4))
    for _ in range(6):                                           # each begins with the last vector
        value, vector = depth.power_iteration(gradient, list(S.split(4)), vector)
    wanted = torch.linalg.eigvalsh(S[:, None] * H * S).abs().max()
    assert value == pytest.approx(float(wanted), rel=1e-6)


def test_looking_at_the_curvature_leaves_the_weights():
    config = depth.Config(steps=1, batch=2, asked=2, seed=1)
    model, document = depth.built("plain", config)
    optimizer = Optimizer(model, lr=1e-3)
    list(steps(model, document, optimizer, 1))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    value, vector = depth.curvature(model, optimizer, document, None)
    assert value > 0 and len(vector) == len(list(model.parameters()))
    assert equal(model.state_dict(), before)
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


# -----------------------------------------------------------------------------
# merging


def test_pcb_by_hand(monkeypatch):
    """two models, six weights, half of them kept: norm, exp, tanh, the highest kept, each taken whole"""
    monkeypatch.setattr(merging, "KEPT", 0.5)
    monkeypatch.setattr(merging, "CLAMPED", 0.0)
    t = torch.tensor([[4.0, 0, -1, 2, 0, 0], [0.0, 2, 1, 2, 0, 0]], dtype=torch.float64)
    size = t.abs()
    raw = []
    for i in range(2):
        share = (size[i] - size[i].min()) / (size[i].max() - size[i].min())
        raw.append((2 * share**2).exp() * (t[i] * (t[0] + t[1])).tanh())
    kept = merging.scores(t)
    for i in range(2):
        border = raw[i].sort().values[int(6 * (1 - merging.KEPT))]
        wanted = (raw[i].clamp(min=border) - border) / (raw[i].max() - border).clamp(min=1e-30)
        assert torch.allclose(kept[i], wanted)
    s = torch.tensor([[1.0, 0, 0.5, 0, 0, 0], [0.0, 1, 0.5, 0, 0, 0]], dtype=torch.float64)
    assert torch.allclose(merging.pcb(t, s), torch.tensor([4.0, 2, 0, 0, 0, 0], dtype=torch.float64))


def test_one_model_merged_is_itself_where_it_is_kept():
    t = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = merging.scores(t)
    assert 0.09 < float((kept > 0).double().mean()) <= 0.1 and float(kept.max()) == 1.0
    move = merging.pcb(t, kept)
    inside = (kept[0] > 0) & (t[0].abs() < t[0].abs().sort().values[-2])
    assert torch.allclose(move[inside], t[0][inside]) and not move[kept[0] == 0].any()
    assert float(t[0][kept[0] > 0].abs().min()) > float(t[0].abs().quantile(0.89)), "the largest are kept"


def test_the_control_keeps_as_many():
    t = torch.randn(3, 500, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    kept = merging.scores(t)
    other = merging.shuffled(kept, 1)
    assert torch.equal(kept.sort(1).values, other.sort(1).values) and not torch.equal(kept, other)
    assert torch.equal(kept.sum(0).sort().values, other.sum(0).sort().values), "together"


def test_weights_in_a_row_and_back():
    model = nudged(scratch("tiny", 1)[0], 0, 0.1)
    before = {name: w.clone() for name, w in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    row = merging.flat(model)
    merging.put(model, torch.zeros_like(row))
    assert not any(p.any() for p in model.parameters())
    merging.put(model, row)
    assert equal(model.state_dict(), before) and places == [p.data_ptr() for p in model.parameters()]


# -----------------------------------------------------------------------------
# tokens of scripts


@pytest.fixture(scope="module")
def table():
    return script_bpe.characters()


def test_every_character_is_a_block_and_a_place(table):
    places = script_bpe.pairs(table)
    assert len(set(places.values())) == len(places) == len(table) > 10_000, "no two are the same"
    most = max(place for _, place in places.values())
    assert places["a"][0] == "Latin LM 0" and places["д"][0] == "Cyrillic LM 0" != places["Д"][1]
    assert places["\n"][0] == places[" "][0] == "Common Z 0" and places["7"][0] == "Common N 0"
    assert most == len([c for c in table if table[c] == ("Latin", "LM")]) - 1
    assert any(block == "Hangul LM 7" for block, _ in places.values()), "larger blocks are cut"


def test_words_by_hand(table):
    def words(text):
        return script_bpe.words(text, table)

    assert words("да ну, ok 12") == ["да", " ну", ",", " ok", " ", "12"]
    assert words("x = f(a)") == ["x", " =", " f", "(", "a", ")"]
    assert words("a  b\n") == ["a", "  ", "b", "\n"], "two spaces are a word"
    assert words("e\u0301te \u0301") == ["e\u0301te", " \u0301"], "what inherits its script stays"
    for text in ("да ну, ok 12", "x = f(a)\n\n  return  [1]"):
        assert "".join(words(text)) == text


def test_what_may_be_merged():
    letter = "д".encode()
    assert script_bpe.may_merge(letter[:1], letter[1:]) and script_bpe.may_merge(letter, b"a")
    assert not script_bpe.may_merge(b"a", letter[:1]) and not script_bpe.may_merge(letter[1:], b"a")
    assert not script_bpe.may_merge(letter[:1], letter) and not script_bpe.may_merge(letter[1:], letter[:1])
    three = "ა".encode()
    assert script_bpe.may_merge(three[:2], three[2:]) and not script_bpe.may_merge(three[:1], three[1:])
    assert script_bpe.may_merge(("A",), (3,)) and script_bpe.may_merge(("A", 3), ("B", 4, "A", 3))
    assert not script_bpe.may_merge((3,), ("A",)) and not script_bpe.may_merge(("A", 3), ("B",))


def test_merges_by_hand():
    """`abab` three times, `abc` twice: ab is first (8), then abab (3), then abc (2)"""
    texts = [[b"a", b"b", b"a", b"b"], [b"a", b"b", b"c"]]
    ranks = script_bpe.learned(texts, [3, 2], 9, free=True)
    assert list(ranks) == [(b"a", b"b"), (b"ab", b"ab"), (b"ab", b"c")]
    assert texts == [[b"abab"], [b"abc"]]
    assert script_bpe.encoded([b"a", b"b", b"a", b"b", b"c"], ranks) == [b"abab", b"c"]


@pytest.mark.parametrize("arm", script_bpe.ARMS)
def test_tokens_are_the_text(arm, table):
    """what is merged joins to what was there; with the rule no token ends within a character"""
    kind, free = script_bpe.ARMS[arm]
    places = script_bpe.pairs(table)
    known = script_bpe.words("где дом? гдедом да ააბა აა გდ, den dom " * 2, table)
    texts = [script_bpe.base_tokens(word, kind, places) for word in known]
    before = [reduce(add, text) for text in texts]
    ranks = script_bpe.learned(texts, [1] * len(texts), 12, free)
    assert [reduce(add, text) for text in texts] == before
    assert all(script_bpe.may_merge(*pair) for pair in ranks) or free
    for word, text in zip(known, texts):
        assert script_bpe.encoded(script_bpe.base_tokens(word, kind, places), ranks) == text


# -----------------------------------------------------------------------------
# memory


def test_rounding_is_bf16_and_fewer_bits_are_coarser():
    w = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    w *= 10.0 ** torch.arange(-20, 20).repeat(100)
    assert torch.equal(memorize.rounded(w, 8), w.bfloat16().float())
    assert torch.equal(memorize.rounded(w, 24), w) and memorize.rounded(torch.zeros(2), 5).tolist() == [0, 0]
    assert memorize.rounded(torch.tensor([1.0, 1.03, 1.04, -1.5]), 5).tolist() == [1.0, 1.0, 1.0625, -1.5]


def test_a_model_that_knows_nothing_holds_nothing():
    """logits of zero over the 65 ids: each symbol costs log2 65 bits, a little more than its 6"""
    model, _ = memorize.built(32, memorize.Config())
    model.head.weight.data.zero_()
    texts = [memorize.text(1, i) for i in range(5)]
    assert memorize.held(model, texts, 4096) == 0.0
    model.head.weight.data.normal_()
    for p in model.parameters():
        p.data.mul_(0.0)
    assert memorize.held(model, texts, 4096) == 0.0


def test_bits_by_hand():
    """two texts, in float64; a text that costs more than its bits counts as none, not as a loss"""
    model, _ = memorize.built(32, memorize.Config())
    nudged(model, 0, 0.2)
    texts = [memorize.text(1, i) for i in range(8)]
    wanted = []
    for text in texts:
        logp = logits_of(model, text).double().log_softmax(-1)
        cost = -sum(float(logp[t, text[t + 1]]) for t in range(memorize.S)) / math.log(2)
        wanted.append(32 * 6 - cost)
    assert memorize.held(model, texts, 4096) == pytest.approx(sum(max(0, w) for w in wanted), abs=1e-3)
    always = GPT(model.config).init_weights(0)
    with torch.no_grad():                                        # says symbol 7, whatever it reads
        always.embed.weight.fill_(1.0)
        always.head.weight.zero_()
        always.head.weight[7] = 1.0
    assert memorize.held(always, [[64] + [7] * 32], 4096) == pytest.approx(32 * 6, abs=1e-6)


def test_texts_are_read_again_and_again_in_other_orders():
    _, document = memorize.built(32, memorize.Config())
    read = memorize.endless(document, 10, 3)
    first, second = ([tuple(read("train", e * 10 + i)[0]) for i in range(10)] for e in (0, 1))
    assert sorted(first) == sorted(second) == sorted(tuple(memorize.text(3, i)) for i in range(10))
    assert first != second and all(text[0] == memorize.V and len(text) == 33 for text in first)
    assert not {tuple(memorize.text(4, i)) for i in range(10)} & set(first)


# -----------------------------------------------------------------------------
# evolution and item response


def test_a_search_finds_the_top_of_a_hill():
    """a narrow ridge, aslant in three dimensions"""
    top = np.array([0.9, -0.2, 0.4])
    along = np.array([[1.0, 0.8, 0], [0, 1, 0.5], [0, 0, 1]])

    def value(c):
        return -float(np.square(along @ (c - top)).sum())

    middle = np.full(3, 1 / 3)
    found = evolve.search(value, middle, 0.3, 400, 0)
    assert np.abs(found - top).max() < 0.02
    assert value(evolve.search(value, middle, 0.3, 60, 0)) > 0.3 * value(middle)
    assert np.array_equal(evolve.search(value, middle, 0.3, 60, 1), evolve.search(value, middle, 0.3, 60, 1))


def test_a_search_asks_no_more_than_it_may():
    asked = []
    evolve.search(lambda c: asked.append(c) or 0.0, np.full(3, 1 / 3), 0.3, 60, 0)
    assert len(asked) == 56, "eight generations of seven"


def test_items_are_found_again():
    """200 problems that obey the law, twelve models: abilities in order, and chances as they were"""
    rand = torch.Generator().manual_seed(0)
    h = torch.linspace(-2, 2, 12)[:, None]
    a = 0.5 + torch.rand(200, generator=rand)
    b = torch.randn(200, generator=rand)
    chances = (h * a - b).sigmoid()
    right = torch.bernoulli(chances, generator=rand)
    skill, b = evolve.items(right)
    said = (skill - b).sigmoid()
    assert float((said - chances).abs().mean()) < 0.14
    assert float((said.mean(1) - chances.mean(1)).abs().max()) < 0.1


def test_an_estimate_is_what_was_seen_and_what_would_be():
    parents = torch.tensor([[-1.0], [1.0]]).expand(2, 10)
    b = torch.linspace(-1, 1, 10)
    right = torch.tensor([1.0, 0, 1, 1, 0, 0, 0, 1, 0, 0])
    assert evolve.estimate(right, np.arange(10), parents, b) == pytest.approx(0.4), "all were seen"
    few = np.array([2, 6])                                       # one right and one wrong
    low = evolve.estimate(torch.tensor([0.0, 0.0]), few, parents, b)
    high = evolve.estimate(torch.tensor([1.0, 1.0]), few, parents, b)
    rest = [i for i in range(10) if i not in few]
    chance = float((-b).sigmoid()[rest].mean())
    assert low < 0.8 * chance and high > 0.2 + 0.8 * chance, "the answers move the mix"


def test_a_merge_is_good_at_what_its_parents_are_good_at():
    """two kinds of problems, a parent for each: answers on one kind say which parent is in the merge, and so
    what becomes of the other kind; with abilities of one dimension they could not"""
    parents = torch.full((2, 20), -2.0)
    parents[0, :10] = parents[1, 10:] = 2.0
    seen = np.arange(6)                                          # of the first kind
    b = torch.zeros(20)
    good = evolve.estimate(torch.ones(6), seen, parents, b)
    bad = evolve.estimate(torch.zeros(6), seen, parents, b)
    assert good == pytest.approx(1 - bad, abs=1e-4), "what is won on one kind is lost on the other"
    assert good < 0.65, "all six were right, and still"


def test_a_tenth_of_right_answers_alone_knows_less():
    """item response says the accuracy on all problems more closely than the share right of those few"""
    rand = torch.Generator().manual_seed(1)
    b = 2 * torch.randn(200, generator=rand)
    parents = torch.tensor([[-1.0], [1.0]]).expand(2, 200)
    off, alone = [], []
    for h in torch.linspace(-1, 1, 60):
        right = torch.bernoulli((h - b).sigmoid(), generator=rand)
        few = torch.randperm(200, generator=rand)[:20].sort().values.numpy()
        off.append(abs(evolve.estimate(right[few], few, parents, b) - float(right.mean())))
        alone.append(abs(float(right[few].mean() - right.mean())))
    assert np.mean(off) < 0.8 * np.mean(alone)


# -----------------------------------------------------------------------------
# vocabularies


def test_tokens_of_a_text_by_hand():
    """`abab` three times, `abc` twice: ab, abab, abc; and no more than the words hold"""
    found = tokens.learned({b"abab": 3, b"abc": 2}, 999)
    assert found[:256] == [bytes([b]) for b in range(256)] and found[256:] == [b"ab", b"abab", b"abc"]
    assert tokens.learned({b"abab": 3, b"abc": 2}, 257)[256:] == [b"ab"]


def test_a_tokenizer_says_what_was_written():
    tok = tokens.tokenizer(300, 1, size=3000)
    assert tok.vocab_size == 301 and tok.stop == {300}
    for text in ("def f(x):\n    return x + 1\n", "naïve 漢字 \t 007"):
        assert tok.decode(tok.encode(text)) == text
    plain = tokens.tokenizer(256, 1, size=3000)
    assert plain.encode("if é:\n") == list("if é:\n".encode()), "no merges: bytes"


def test_shuffled_words_make_shorter_tokens():
    text = tokens.window("test", 1, 0, 4000)
    lengths = {kind: len(tokens.tokenizer(400, 1, kind, size=20_000).encode(text)) for kind in (False, True)}
    assert lengths[False] < 0.95 * lengths[True] and lengths[True] < 0.95 * len(text)


def test_every_arm_costs_what_bytes_cost(monkeypatch):
    """operations by hand; then steps until the budget is used, each on the same windows"""
    monkeypatch.setattr(tokens, "LEARN", 20_000)
    config = tokens.Config(steps=100, seed=1)
    spent = {}
    for arm in ("bytes", "512"):
        model, document, each = tokens.built(arm, config)
        weights = sum(p.numel() for p in model.parameters()) - model.embed.weight.numel()
        docs = [document("train", i)[0] for i in range(50)]
        mean = sum(6 * weights * len(t) + 6 * 3 * 64 * len(t) ** 2 for t in docs) / 50
        assert each == pytest.approx(mean * document.config.batch, rel=1e-9)
        assert 0.8 < sum(map(len, docs)) / 50 * document.config.batch / config.batch < 1.2
        spent[arm] = each
        assert document.tok.decode(docs[3]) == tokens.window("train", 1, 3, tokens.LENGTH)
    assert spent["512"] > spent["bytes"], "a larger head: fewer steps"


def test_the_arm_of_bytes_is_plain_training_to_the_bit():
    config = tokens.Config(steps=2, batch=400, asked=2, seed=1)
    trial = Silent()
    trial.bar = Silent()
    trial.bar.update = lambda: None
    found, budget = tokens.train("bytes", trial, config, None)
    model, document, each = tokens.built("bytes", config)
    list(steps(model, document, Optimizer(model, lr=tokens.LR, muon_lr=tokens.MUON_LR), 2))
    assert budget == 2 * each and found["steps"] == 2
    assert found["loss"] == train_gpt.evaluate(model, document)["loss"]
