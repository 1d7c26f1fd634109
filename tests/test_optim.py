"""the optimizer: AdamW against torch's, Muon against its definition, two ranks against one,
resharding, steps that must not happen"""
import pytest
import torch
from torch import nn

from common import optim
from common.optim import Optimizer, orthogonalize


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6, bias=True) for _ in range(3))
        self.norm = nn.Parameter(torch.ones(7))

    def forward(self, x):
        h = self.embed(x)
        for block in self.blocks:
            h = h + block(h).tanh()
        return h.square().sum() + (self.norm * torch.arange(7.0)).square().sum()


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def test_adamw_is_torchs_adamw():
    a, b = net(), net()
    ours = Optimizer(a, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, clip=0.5)
    decayed = [p for p in b.parameters() if p.ndim == 2]
    others = [p for p in b.parameters() if p.ndim != 2]
    theirs = torch.optim.AdamW([dict(params=decayed, weight_decay=0.1),
                                dict(params=others, weight_decay=0.0)], lr=1e-2, betas=(0.9, 0.99))
    for step in range(5):
        x = torch.randint(0, 11, (9,))
        (3 * a(x)).backward()
        b(x).backward()
        norm = torch.nn.utils.clip_grad_norm_(b.parameters(), 0.5)
        theirs.step()
        theirs.zero_grad()
        assert ours.step(divide=3)["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
        for p, q in zip(a.parameters(), b.parameters()):
            assert torch.allclose(p, q, atol=1e-6)


# the last two are multiplied by oneDNN, the wide one as a small matrix
@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (400, 400), (200, 800)])
def test_orthogonalize_pushes_singular_values_to_one(shape):
    torch.manual_seed(0)
    m = torch.randn(shape)
    before, after = torch.linalg.svdvals(m), torch.linalg.svdvals(orthogonalize(m))
    assert after.max() < 1.2
    assert after[before > 1e-2 * before.norm()].min() > 0.8  # those far below the norm would need more rounds


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_a_small_matrix_is_orthogonalized_as_a_large_one(monkeypatch, shape):
    m = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    small = orthogonalize(m)
    monkeypatch.setattr(optim, "SMALL", 0)
    torch.testing.assert_close(small, orthogonalize(m), atol=1e-4, rtol=0)


def test_muon_takes_only_the_blocks_matrices():
    optimizer = Optimizer(net(), muon_lr=1e-2)
    assert {s.name for s in optimizer.shards if s.muon} == {f"blocks.{i}.weight" for i in range(3)}


@pytest.mark.parametrize("shape", [(6, 6), (12, 6), (6, 12)])
def test_muon_moves_a_matrix_by_its_orthogonal_gradient(shape):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(shape[1], shape[0], bias=False)])
    weight = model.blocks[0].weight
    optimizer = Optimizer(model, muon_lr=1e-2, clip=0)
    before, direction = weight.detach().clone(), torch.randn(shape)
    (weight * direction).sum().backward()
    optimizer.step()
    u, _, vt = torch.linalg.svd(direction, full_matrices=False)
    moved = (before - weight.detach()) / (1e-2 * 0.2 * max(shape) ** 0.5)
    assert (moved - u @ vt).norm() < 0.4 * (u @ vt).norm() and (moved * (u @ vt)).sum() > 0.9 * min(shape)


def test_micro_batches_sum_to_the_whole_batch():
    """the division happens once, at the step: three micro-batches or one, the same weights"""
    a, b = net(), net()
    one, three = Optimizer(a, muon_lr=1e-2), Optimizer(b, muon_lr=1e-2)
    for _ in range(3):
        xs = [torch.randint(0, 11, (n,)) for n in (2, 5, 3)]
        a(torch.cat(xs)).backward()
        (sum(b(x) for x in xs[1:]) - 2 * (b.norm * torch.arange(7.0)).square().sum()).backward()
        b(xs[0]).backward()
        one.step(divide=10)
        three.step(divide=10)
    assert all(torch.allclose(p, q, atol=2e-6) for p, q in zip(a.parameters(), b.parameters()))


def test_a_step_without_signal_moves_nothing():
    """momentum and weight decay would move weights even where the gradient is zero: no signal is no step"""
    model = net()
    optimizer = Optimizer(model, lr=1e-2, muon_lr=1e-2, weight_decay=0.1)
    model(torch.arange(5)).backward()
    optimizer.step()
    before = [p.clone() for p in model.parameters()]
    (0 * model(torch.arange(5))).backward()
    assert optimizer.step()["skipped"]
    model(torch.arange(5)).backward()
    assert optimizer.step(divide=0)["skipped"]
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    assert optimizer.steps == 1


def test_a_bad_gradient_skips_the_step_and_five_in_a_row_stop():
    model = net()
    optimizer = Optimizer(model, lr=1e-2)
    before = [p.clone() for p in model.parameters()]
    for bad in (float("nan"), float("inf")) * 2:
        (model(torch.arange(5)) * bad).backward()
        assert optimizer.step()["skipped"]
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    model(torch.arange(5)).backward()
    # a good one in between starts the count again
    assert not optimizer.step()["skipped"] and optimizer.skipped == 4
    for _ in range(4):
        (model(torch.arange(5)) * float("nan")).backward()
        optimizer.step()
    (model(torch.arange(5)) * float("nan")).backward()
    with pytest.raises(FloatingPointError, match="5 steps in a row"):
        optimizer.step()


def test_half_precision_weights_have_fp32_masters_that_remember_small_steps():
    """a bf16 weight of 1 cannot move by 1e-4; its master can, and a hundred such steps show"""
    model = nn.Linear(4, 4, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    optimizer = Optimizer(model, lr=1e-4, clip=0)
    for _ in range(100):
        model.weight.float().sum().backward()
        optimizer.step()
    assert torch.allclose(model.weight.float(), torch.full((4, 4), 0.99), atol=4e-3)


def test_half_precision_gradients_are_summed_in_fp32():
    """256 + 1 is 256 in bf16: two hundred small micro-batches after a large one would vanish"""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    optimizer = Optimizer(model, lr=1e-2, clip=0)
    (256 * model.weight).sum().backward()
    for _ in range(200):
        model.weight.sum().backward()
    assert optimizer.step()["grad_norm"] == 456


TWO = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from test_optim import net
from common.optim import Optimizer
from common.run import start
env = start("cpu", threads=1)
model = net()
if sys.argv[4] == "bf16":
    model = model.bfloat16()
optimizer = Optimizer(model, lr=1e-2, muon_lr=1e-2, weight_decay=0.1, clip=0.7,
                      grads=sys.argv[3].split("-")[0], offload="offload" in sys.argv[3])
g = torch.Generator().manual_seed(1)
for step in range(4):
    for micro in range(2):
        xs = torch.randint(0, 11, (8,), generator=g).split([2, 3, 1, 2])
        mine = xs[env.rank * 4 // env.world : (env.rank + 1) * 4 // env.world]
        sum(model(x) for x in mine).backward()
        optimizer.finish_micro_batch()
    optimizer.step(divide=14)
torch.save(dict(model=model.state_dict(), state=optimizer.state_dict()),
           f"{sys.argv[1]}/{sys.argv[3]}_{env.world}_{env.rank}.pt")
"""


WAYS = ["whole", "sharded", "whole-offload", "sharded-offload"]


@pytest.mark.parametrize("way", WAYS)
def test_two_ranks_equal_one(tmp_path, ranks, one_process, way):
    """rung 9, and the state of two ranks taken up by one (and by three) without loss"""
    here = __file__.rsplit("/", 1)[0]
    ranks(2, TWO, tmp_path, here, way, "fp32")
    one_process(TWO, tmp_path, here, "whole", "fp32")
    one, a, b = (torch.load(tmp_path / f"{n}.pt", weights_only=False)
                 for n in ("whole_1_0", f"{way}_2_0", f"{way}_2_1"))
    for name, p in one["model"].items():
        assert torch.allclose(p, a["model"][name], atol=2e-6), name
        assert torch.equal(a["model"][name], b["model"][name]), name
    assert {n for n, piece in a["state"]["pieces"].items()} != set(one["state"]["pieces"]), (
        "matrices are dealt whole: each rank owns some")
    model = net(seed=3)
    optimizer = Optimizer(model, lr=1e-2, muon_lr=1e-2)
    optimizer.load_state_dict([a["state"], b["state"]])
    for s in optimizer.shards:
        piece = one["state"]["pieces"][s.name]
        assert (torch.allclose(s.master, piece["master"], atol=2e-6)
                and torch.allclose(s.m, piece["m"], atol=1e-5)), s.name
    assert all(torch.equal(p, q) for p, q in zip(model.state_dict().values(), a["model"].values()))
    with pytest.raises(ValueError, match="covers"):
        optimizer.load_state_dict([a["state"]])
