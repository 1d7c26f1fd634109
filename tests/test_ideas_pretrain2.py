"""the exact invariants of more ideas about pretraining: where each equals what it is compared with, a case
worked by hand"""
import importlib

import pytest
import torch

import train_gpt
from common.optim import Optimizer
from ideas import mixture
from train_gpt import scratch, steps

NAMES = "mixture".split()


@pytest.fixture
def few(monkeypatch):
    """steps of two windows of 16 bytes, one block: what is exact is exact at any size"""
    small = train_gpt.PRESETS["tiny"].replace("--batch 16 --seq-len 128", "--batch 2 --seq-len 16")
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", f"{small} --row-tokens 64 --n-layer 1")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def plainly(total=3, seed=1, **optimizer):
    """-> the weights after a few steps of train_gpt"""
    model, document = scratch("tiny", seed)
    list(steps(model, document, Optimizer(model, **optimizer), total))
    return model.state_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_model_of_ones_own_is_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"ideas.{name}").main(["--init", "runs/mine"])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and "--init runs/mine has no effect" in error[0]
    assert not (tmp_path / "runs").exists()


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


def test_a_law_is_found_again_and_so_is_its_minimum():
    """twelve losses that obey a law: the fit says the losses on other shares, and the best shares are
    those of a search over all"""
    E, C, g = (torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 3, 3, dtype=torch.float64),
               torch.full((1, 3, 3), -1.0, dtype=torch.float64))
    C[0] += torch.diag(torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64))
    rand = torch.Generator().manual_seed(0)
    draws = torch.rand(40, 3, generator=rand, dtype=torch.float64).log().neg()
    shares = mixture.floored(draws / draws.sum(1, keepdim=True))
    losses = mixture.losses_of((E, C, g), shares)[:, 0]
    law = mixture.fitted(shares[:12], losses[:12], 800, 0)
    said = mixture.losses_of(law, shares[12:])[:, 0]
    assert float((said - losses[12:]).abs().max()) < 0.02
    best = mixture.best_shares((E, C, g), 3, 800)
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
