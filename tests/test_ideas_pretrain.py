"""the exact invariants of the ideas about pretraining: where each equals what it is compared with, a case
worked by hand"""
import importlib
import math
from functools import partial

import numpy as np
import pytest
import torch

import data
import train_gpt
from common import evidence
from common.hf import rope_frequencies
from common.optim import Optimizer
from ideas import batch, context, dion, fim, galore, gradpower, muon, pma, tst
from kernels import packed_attention
from tests.models import nudged
from train_gpt import GPT, scratch, steps


@pytest.fixture
def few(monkeypatch):
    """steps of two windows of 16 bytes, one block: what is exact is exact at any size"""
    small = train_gpt.PRESETS["tiny"].replace("--batch 16 --seq-len 128", "--batch 2 --seq-len 16")
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", f"{small} --row-tokens 64 --n-layer 1")


def trained(optimizer_of, total=3, **changes):
    """-> the weights after a few steps"""
    model, document = scratch("tiny", 1)
    list(steps(model, document, optimizer_of(model), total, **changes))
    return model.state_dict()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def a_matrix(optimizer, rows, columns, seed=0):
    """-> (s, G): the first matrix of the blocks with so many rows and columns, and a gradient for it"""
    s = next(s for s in optimizer.shards if s.muon and s.param.shape == (rows, columns))
    G = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    s.grad = G.reshape(-1).clone()
    return s, G


def moved(optimizer, s, G):
    """-> what one step adds to a matrix"""
    before = s.param.detach().clone()
    optimizer.steps += 1
    s.grad = G.reshape(-1).clone()
    optimizer.update_matrix(s, 1.0, 1.0)
    return s.param.detach() - before


@pytest.mark.parametrize("name", "muon gradpower context pma galore dion tst fim batch "
                         "limit qsgd paretoq signround moe fp4 roundpipe winter esft lighthouse xquant "
                         "cartridges lact precision mixture distill ahead mup zsl sinks depth script_bpe "
                         "memorize tokens".split())
def test_a_model_of_ones_own_is_refused(name, tmp_path, monkeypatch, capsys):
    """all flags of Idea are parsed, and here --init would have been read by nobody"""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"ideas.{name}").main(["--init", "runs/mine"])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and "--init runs/mine has no effect" in error[0]
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind, data, layers", [("tiny", "stdlib", 3), ("recall", "recall", 2)])
def test_the_shared_starts_are_presets(kind, data, layers):
    config = train_gpt.configure(evidence.RECIPES[kind].split())
    assert (config.data, config.n_layer, config.d_model) == (data, layers, 64)


# -----------------------------------------------------------------------------
# optimizers


def test_gradpower_against_float64():
    model, _ = scratch("tiny", 1)
    for w in model.parameters():
        w.grad = torch.linspace(-2, 2, w.numel()).view_as(w)
    before = [w.grad.clone() for w in model.parameters()]
    gradpower.power(model, 1.0)
    assert all(torch.equal(w.grad, b) for w, b in zip(model.parameters(), before)), "p = 1 changes nothing"
    gradpower.power(model, 1.2)
    for w, b in zip(model.parameters(), before):
        g = b.double().numpy()
        assert np.allclose(w.grad.numpy(), np.sign(g) * np.abs(g) ** 1.2, rtol=1e-5)


def test_gradpower_acts_on_the_mean_before_clipping(few):
    """the power of a sum of 32 gradients is 32^0.2 times too large for entry and clip; here the gradient
    that is raised is the mean over the step's bytes"""
    seen = []

    def look(model):
        seen.append([w.grad.clone() for w in model.parameters()])
        gradpower.power(model, 1.2)
        seen.append([w.grad.clone() for w in model.parameters()])

    model, document = scratch("tiny", 1)
    numbers = {}
    list(steps(model, document, Optimizer(model), 1, gradient=look, numbers=numbers))
    raised = torch.stack([g.square().sum() for g in seen[1]]).sum().sqrt()
    assert numbers["grad_norm"] == pytest.approx(float(raised), rel=1e-5)
    other, document = scratch("tiny", 1)
    docs = [document("train", i) for i in range(document.config.batch)]
    rows = train_gpt.packed_rows(docs, document.config.row_tokens, "cpu")
    sum(train_gpt.forward(other, row) for row in rows).backward()
    count = train_gpt.targets_of(docs)
    assert all(torch.allclose(w.grad / count, g, atol=1e-7) for w, g in zip(other.parameters(), seen[0]))


def test_muons_control_has_muons_size_and_the_momentums_direction():
    model, _ = scratch("tiny", 1)
    optimizer = muon.Scaled(model, lr=1e-3, muon_lr=1e-2)
    s, G = a_matrix(optimizer, 64, 128)
    step = moved(optimizer, s, G)
    assert torch.allclose(step / step.norm(), -G / G.norm(), atol=1e-5)
    assert float(step.norm()) == pytest.approx(1e-2 * 0.2 * 128**0.5 * 64**0.5, rel=1e-4)


def test_galore_of_full_rank_is_adam_in_another_basis():
    """P square and orthonormal: P Adam(P^T G) is Adam itself where P is the identity, and P^T P = 1 for
    any rank"""
    model, _ = scratch("tiny", 1)
    optimizer = galore.LowRank(model, "GaLore", 64, 1e-3, 1e-2)
    for shape in ((64, 128), (192, 64)):
        s, G = a_matrix(optimizer, *shape)
        optimizer.kept[s.name] = {"P": torch.eye(64), "norm": 0.0}
        optimizer.steps = 1                                      # not the step at which P is found
        step = moved(optimizer, s, G)
        m, v = 0.1 * G, 0.05 * G**2
        adam = m / (1 - 0.9**2) / ((v / (1 - 0.95**2)).sqrt() + 1e-8)
        assert torch.allclose(step, -1e-2 * galore.ALPHA * adam, atol=1e-7)
    for rank in (16, 64):
        optimizer.rank_kept = rank
        P = optimizer.project(torch.randn(64, 128), None)
        assert torch.allclose(P @ P.t(), torch.eye(rank), atol=1e-5)


def test_galore_sees_only_its_directions():
    """a gradient of rank 2 lies in the span of its first two singular vectors: the update has rank 2"""
    model, _ = scratch("tiny", 1)
    optimizer = galore.LowRank(model, "GaLore", 2, 1e-3, 1e-2)
    s, _ = a_matrix(optimizer, 64, 128)
    G = torch.randn(64, 2) @ torch.randn(2, 128)
    step = moved(optimizer, s, G)
    assert int(torch.linalg.matrix_rank(step, rtol=1e-4)) == 2
    assert torch.linalg.matrix_rank(torch.cat([step, G], dim=1), rtol=1e-4) == 2
    assert optimizer.numbers() == 2 * 64 + 2 * 2 * 128, "the projection and two moments"
    optimizer.arm = "APOLLO"
    assert optimizer.numbers() == 2 * 2 * 128 + 2, "R is drawn again from its seed; the last norm is kept"


def test_galore_waits_for_a_gradient(few):
    """`out` and `down` begin at zero, so that the first gradients of qkv and gate_up are zero. GaLore took
    the directions of that first gradient, which were rows of the identity, and kept them for 200 of 600
    steps; APOLLO's random R was not hurt"""
    model, document = scratch("tiny", 1)
    optimizer = galore.LowRank(model, "GaLore", 4, 1e-3, 1e-2)
    matrices = [s for s in optimizer.shards if s.muon]
    late = {s.name for s in matrices if s.param.any()}           # behind a matrix of zeros
    before = {s.name: s.param.detach().clone() for s in matrices}
    list(steps(model, document, optimizer, 1))
    assert len(late) == len(matrices) // 2 and optimizer.kept.keys() == before.keys() - late
    assert all(torch.equal(s.param, before[s.name]) == (s.name in late) for s in matrices)
    list(steps(model, document, optimizer, 2, begin=1))
    assert optimizer.kept.keys() == before.keys()
    for state in optimizer.kept.values():
        assert torch.allclose(state["P"] @ state["P"].t(), torch.eye(4), atol=1e-5)
        assert state["P"].abs().max() < 0.99, "no row of the identity"


def test_apollo_moves_along_the_gradient_channel_by_channel():
    model, _ = scratch("tiny", 1)
    optimizer = galore.LowRank(model, "APOLLO", 8, 1e-3, 1e-2)
    for shape in ((64, 128), (192, 64)):
        s, G = a_matrix(optimizer, *shape)
        step = moved(optimizer, s, G)
        state = optimizer.kept[s.name]
        G, step = (G, step) if shape[0] < shape[1] else (G.t(), step.t())        # channels: the longer side
        scales = (step * G).sum(0) / G.square().sum(0)
        assert torch.allclose(step, scales * G, atol=1e-6)
        if optimizer.steps == 1:
            # Adam is the sign then: its norm over r numbers is sqrt(r)
            low = state["P"] @ G
            assert torch.allclose(-scales, 1e-2 * 8**0.5 / low.norm(dim=0), rtol=1e-3)


def test_apollos_update_grows_by_one_percent_per_step_at_most():
    model, _ = scratch("tiny", 1)
    optimizer = galore.LowRank(model, "APOLLO", 8, 1e-3, 1e-2)
    state = {"norm": 0.0}
    first = optimizer.limited(state, torch.ones(4))
    second = optimizer.limited(state, 10 * torch.ones(4))
    third = optimizer.limited(state, 0.5 * torch.ones(4))
    assert float(first.norm()) == 2.0 and float(second.norm()) == pytest.approx(2.02)
    assert float(third.norm()) == 1.0 and state["norm"] == 1.0


def test_galores_adamw_arm_is_the_optimizer_of_the_core(few):
    assert equal(trained(partial(Optimizer, lr=3e-3)), trained(partial(Optimizer, lr=3e-3)))
    assert not equal(trained(partial(Optimizer, lr=3e-3)),
                     trained(lambda model: galore.LowRank(model, "GaLore", 4, 3e-3, 3e-3)))


def test_dion_of_full_rank_turns_every_direction():
    """with all directions and Q converged P Q^T is the orthogonal matrix nearest to the momentum, which
    is Muon's update; and nothing is left for later but mu of it"""
    model, _ = scratch("tiny", 1)
    optimizer = dion.Dion(model, 64, 1e-3, 1e-2)
    s, G = a_matrix(optimizer, 64, 128)
    U, S, V = torch.linalg.svd(G, full_matrices=False)
    optimizer.Q[s.name] = V.t().contiguous()                     # where the power iteration ends
    step = moved(optimizer, s, G)
    assert torch.allclose(step, -1e-2 * (64 / 128) ** 0.5 * (U @ V), atol=1e-6)
    assert torch.allclose(s.m.view(64, 128), 0.95 * G, atol=1e-4)


def test_dion_keeps_what_it_did_not_apply():
    """error feedback: M + 0.05 P R^T is the momentum before; P has orthonormal columns, Q columns of 1"""
    model, _ = scratch("tiny", 1)
    optimizer = dion.Dion(model, 4, 1e-3, 1e-2)
    s, G = a_matrix(optimizer, 192, 64)
    step = moved(optimizer, s, G)
    Q = optimizer.Q[s.name]
    assert torch.allclose(Q.norm(dim=0), torch.ones(4), atol=1e-5)
    P = step @ torch.linalg.pinv(Q.t()) / (-1e-2 * (192 / 64) ** 0.5)
    assert torch.allclose(P.t() @ P, torch.eye(4), atol=1e-4)
    assert torch.allclose(s.m.view(192, 64) + 0.05 * P @ (P.t() @ G), G, atol=1e-4)
    for seed in range(60):
        moved(optimizer, s, torch.randn(192, 64, generator=torch.Generator().manual_seed(seed)))
    assert float(s.m.norm()) < 60 * float(G.norm()) and torch.isfinite(s.m).all()


def test_dion_keeps_its_random_start_until_there_is_a_gradient():
    """the first gradients of qkv and gate_up are zero (`out` and `down` begin at zero): R was zero, Q became
    0 / |0| = 0, and the directions of the next step were those that QR gives a matrix of zeros"""
    model, _ = scratch("tiny", 1)
    late, early = (dion.Dion(model, 4, 1e-3, 1e-2) for _ in range(2))
    s, G = a_matrix(late, 192, 64)
    assert not moved(late, s, torch.zeros_like(G)).any()
    assert torch.allclose(late.Q[s.name].std(), torch.tensor(1.0), atol=0.2), "the random start"
    waited = moved(late, s, G)
    s, _ = a_matrix(early, 192, 64)
    assert torch.allclose(moved(early, s, G), waited, atol=1e-6) and waited.any()


# -----------------------------------------------------------------------------
# context


def test_waves_of_each_way():
    """linear divides every wave's turn by s; NTK leaves the shortest wave and stretches the longest by s
    exactly; YaRN is one at the short end and the other at the long one"""
    model, _ = scratch("tiny", 1)
    waves = {way: rope_frequencies(context.stretched(model.config, way, 8)) for way in context.WAYS}
    none, scale = waves["none"]
    assert scale == 1.0 and context.stretched(model.config, "none", 8) == model.config
    assert torch.allclose(waves["linear"][0], none / 8)
    assert waves["NTK"][0][0] == none[0] and torch.allclose(waves["NTK"][0][-1], none[-1] / 8)
    # d = 16: at 128 tokens the shortest wave turns 20 times, only those above 32 would stay whole
    ratio = waves["YaRN"][0] / none
    assert (ratio.diff() <= 0).all() and ratio[-1] == 1 / 8 and ratio[0] > 0.5
    assert waves["YaRN"][1] == pytest.approx(0.1 * math.log(8) + 1)


@torch.no_grad()
def test_no_stretching_is_the_model_and_linear_is_a_slower_clock():
    """a factor of 1 is the model to the bit; linear at position s p is the model at position p"""
    base, _ = scratch("tiny", 1)
    nudged(base, 0, 0.05, matrices_only=True)
    tokens = torch.arange(40)
    attend = packed_attention([0, 40], 40)

    def hidden(way, s, positions):
        model = GPT(context.stretched(base.config, way, s))
        model.load_state_dict(base.state_dict())
        return model(tokens, positions, attend)

    plain = base(tokens, torch.arange(40), attend)
    for way in context.WAYS:
        assert torch.equal(hidden(way, 1, torch.arange(40)), plain)
    assert torch.allclose(hidden("linear", 4, 4 * torch.arange(40)), plain, atol=1e-5)
    assert not torch.allclose(hidden("linear", 4, torch.arange(40)), plain, atol=1e-3)


@torch.no_grad()
def test_the_far_loss_is_of_what_lies_beyond_the_trained_length():
    model, document = scratch("tiny", 1)
    nudged(model, 0, 0.05, matrices_only=True)
    longer = context.windows(document, 256, 2)
    loss, curve = context.far_loss(model, longer, 3)
    found = []
    for i in range(3):
        tokens, _ = longer("test", i)
        T = len(tokens) - 1
        hidden = model(torch.tensor(tokens[:-1]), torch.arange(T), packed_attention([0, T], T))
        logp = (hidden @ model.head_weight.t()).log_softmax(-1)
        found.append(-logp[torch.arange(T), torch.tensor(tokens[1:])])
    assert loss == pytest.approx(float(torch.cat([f[128:] for f in found]).mean()), rel=1e-5)
    assert curve[5] == pytest.approx(float(torch.stack([f[5] for f in found]).mean()), rel=1e-5)


# -----------------------------------------------------------------------------
# averages


def test_the_mean_of_checkpoints():
    one = dict(w=torch.tensor([[1.0, 2.0]]), b=torch.tensor([4.0]))
    two = dict(w=torch.tensor([[3.0, -2.0]]), b=torch.tensor([0.0]))
    assert equal(pma.mean_of([one]), one) and equal(pma.mean_of([one] * 5), one)
    mean = pma.mean_of([one, two])
    assert mean["w"].tolist() == [[2.0, 0.0]] and mean["b"].tolist() == [2.0]
    short = pma.shrunk(one, mean)
    assert short["b"].tolist() == [2.0] and float(short["w"].norm()) == pytest.approx(2.0)
    assert torch.allclose(short["w"] / short["w"].norm(), one["w"] / one["w"].norm())


def test_the_annealed_run_is_the_plateau_until_the_fork(few, tmp_path, monkeypatch):
    """an anneal that keeps the plateau's rate ends where the plateau ends, to the bit: the two arms
    differ by their rates alone"""
    monkeypatch.chdir(tmp_path)
    config = pma.Config(steps=6, every=1, asked=2)

    class Silent:
        def point(self, *args):
            pass
        dot = point

    checkpoints, start = pma.plateau(Silent(), config, 3)
    assert len(checkpoints) == 3
    real = pma.steps
    monkeypatch.setattr(pma, "steps", lambda *a, schedule, **k: real(*a, schedule=lambda step: 1.0, **k))
    assert equal(pma.anneal(Silent(), config, 3, start), checkpoints[-1])


# -----------------------------------------------------------------------------
# superposition


def test_bags_of_one_are_plain_training_to_the_bit(few):
    def loss(model, row):
        return tst.bag_loss(model, row, 1)

    def bagged(optimizer_of):
        model, document = scratch("tiny", 1)
        list(steps(model, tst.bags(document, 1), optimizer_of(model), 3, loss=loss))
        return model.state_dict()

    make = partial(Optimizer, lr=3e-3, muon_lr=1e-2)
    assert equal(trained(make), bagged(make))


def test_a_bag_predicts_each_byte_of_the_next():
    """two texts of 3 and 2 bags of two: the loss by hand, in float64"""
    model, _ = scratch("tiny", 1)
    nudged(model, 0, 0.05, matrices_only=True)
    texts = [[5, 6, 7, 8, 9, 10], [20, 21, 22, 23]]
    docs = [(t, [False] * 2 + [True] * (len(t) - 2)) for t in texts]
    row, = train_gpt.packed_rows(docs, 64, "cpu")
    wanted = 0.0
    for text in texts:
        pairs = torch.tensor(text).view(-1, 2)
        into = model.embed(pairs).mean(1)
        B = len(pairs)
        table = GPT(model.config)
        table.load_state_dict(model.state_dict())
        table.embed = torch.nn.Embedding.from_pretrained(into.detach())
        hidden = table(torch.arange(B), torch.arange(B), packed_attention([0, B], B))
        logp = (hidden @ model.head_weight.t()).double().log_softmax(-1)
        wanted -= sum(logp[j, t].item() for j in range(B - 1) for t in pairs[j + 1].tolist())
    assert float(tst.bag_loss(model, row, 2)) == pytest.approx(wanted, rel=1e-5)
    assert float(tst.bag_loss(model, row, 2, mean=False)) != pytest.approx(wanted, rel=1e-5)


def test_a_step_of_bags_costs_what_a_plain_one_does():
    """as many positions and as many predictions per position: s times the bytes"""
    _, document = scratch("tiny", 1)
    for s in (1, 2, 4):
        longer = tst.bags(document, s)
        docs = [longer("train", i) for i in range(document.config.batch)]
        assert all(len(tokens) == 129 * s for tokens, _ in docs)
        assert train_gpt.targets_of(docs) == 16 * 128 * s


# -----------------------------------------------------------------------------
# filling in


def test_a_moved_text_loses_nothing():
    draw = data.stream("fim", "train", 0, 7)
    text = "def f(x):\n    return x + 1\n"
    prefix, middle, suffix = fim.cut(text, draw)
    assert prefix + middle + suffix == text
    assert fim.moved("a", "b", "c", spm=False) == f"{fim.PRE}a{fim.SUF}c{fim.MID}b"
    assert fim.moved("a", "b", "c", spm=True) == f"{fim.PRE}{fim.SUF}c{fim.MID}ab"
    tok = data.tokenizer("bytes")
    ids = tok.encode(fim.moved("a", "b", "c", spm=False))
    assert len(ids) == 6 and len({fim.PRE, fim.SUF, fim.MID}) == 3


def test_half_of_the_windows_are_moved_and_all_are_as_long():
    _, document = scratch("tiny", 1)
    mixed = fim.mixed(document, 0.5)
    tokens = [mixed("train", i)[0] for i in range(400)]
    sentinels = {document.tok.encode(word)[0] for word in (fim.PRE, fim.SUF, fim.MID)}
    count = sum(bool(sentinels & set(t)) for t in tokens)
    assert 160 < count < 240
    assert sum(len(t) == 129 for t in tokens) > 390, "but for a few that lost a piece of a character"
    assert fim.mixed(document, 0.0)("train", 3) == document("train", 3)
    assert mixed("valid", 3) == document("valid", 3), "the loss left to right is of texts as they are"


def test_the_wrong_suffix_is_as_long_and_from_elsewhere():
    _, document = scratch("tiny", 1)
    right, wrong = fim.mixed(document, 1.0), fim.mixed(document, 1.0, wrong=True)
    pairs = [(right("train", i)[0], wrong("train", i)[0]) for i in range(40)]
    assert sum(len(a) == len(b) for a, b in pairs) > 35
    assert sum(a != b for a, b in pairs) > 30


def test_a_middle_counts_by_its_bytes():
    """a model that always says the same byte is right as often as that byte stands in the middles"""
    model, document = scratch("tiny", 1)
    with torch.no_grad():
        model.norm.weight.fill_(1.0)
        model.embed.weight.fill_(1.0)
        model.head.weight.zero_()
        space, = document.tok.encode(" ")
        model.head.weight[space] = 1.0
    c = document.config
    middles = ""
    for i in range(20):
        text = fim.window("test", c.seed, i, c.seq_len - 2)
        prefix, middle, _ = fim.cut(text, data.stream("fim", "test", c.seed, i))
        middles += middle if prefix else ""
    wanted = middles.count(" ") / len(middles.encode())
    for both in (True, False):
        assert fim.filled(model, document, 20, both) == pytest.approx(wanted)


# -----------------------------------------------------------------------------
# batches


def test_every_arm_reads_the_same_text_in_42_percent_fewer_steps(monkeypatch):
    """600 steps of 16, or 200 + 100 + 50: each window once, whatever the batch"""
    read = {}

    def count(model, document, optimizer, total, begin, schedule):
        for step in range(begin, total):
            size = document.config.batch
            seen.extend(range(step * size, (step + 1) * size))
            rates.append(schedule(step))
            yield step + 1, 0.0

    monkeypatch.setattr(batch, "steps", count)
    config = batch.Config()
    third = batch.windows(config.steps // 3, config)
    assert 3 * third == 16 * config.steps
    _, document = scratch("tiny", 1)
    for arm, batches in batch.ARMS.items():
        seen, rates = [], []
        for i, k in enumerate(batches):
            list(batch.stretch(None, document, None, k, 16, i * third, (i + 1) * third, 3 * third))
        assert seen == list(range(9600))
        read[arm] = len(rates), max(rates)
    assert read["small"] == (600, 1.0) and read["large"] == (150, 2.0)
    assert read["warm-up"][0] == read["backwards"][0] == 350
    assert read["warm-up"][1] == 2**0.5, "the decay has begun when batches are largest"


def test_every_fork_reads_the_same_windows(monkeypatch):
    """forks began 64 windows early or read 768 windows instead of 800 where a batch did not divide them"""
    read = {}

    def count(model, document, optimizer, total, begin, schedule):
        size = document.config.batch
        read[size] = range(begin * size, total * size)
        yield total, 0.0

    monkeypatch.setattr(batch, "steps", count)
    monkeypatch.setattr(batch, "evaluate", lambda model, document: dict(loss=0.0))
    for config in (batch.Config(), batch.Config(steps=500, batch=8), batch.Config(smoke=True)):
        for first in (batch.windows(config.steps // 10, config), batch.windows(config.steps // 3, config)):
            read.clear()
            for k in batch.FORKS:
                batch.fork(None, k, config, first)
            most = max(batch.FORKS) * config.batch
            assert len(read) == 4 and len(set(read.values())) == 1
            found = read[config.batch]
            assert found.start == first and len(found) >= most and len(found) % most == 0


def test_small_batches_are_plain_training_to_the_bit(few):
    def thirds_of(optimizer_of):
        model, document = scratch("tiny", 1)
        optimizer = optimizer_of(model)
        for i in range(3):
            list(batch.stretch(model, document, optimizer, 1, 16, 16 * i, 16 * (i + 1), 48))
        return model.state_dict()

    def plain(optimizer_of):
        model, document = scratch("tiny", 1)
        document.config.batch = 16
        list(steps(model, document, optimizer_of(model), 3,
                   schedule=lambda step: train_gpt.trapezoid(16 * step, 48, document.config)))
        return model.state_dict()

    make = partial(Optimizer, lr=3e-3)
    assert equal(thirds_of(make), plain(make))


def test_the_critical_batch_is_the_last_before_the_first_that_is_worse():
    assert batch.critical({1: 2.0, 2: 1.99, 4: 1.995, 8: 2.3}) == 4
    assert batch.critical({1: 2.0, 2: 2.02, 4: 1.9, 8: 1.9}) == 1, "one that is worse ends the search"
    assert batch.critical({1: 2.0, 2: 2.0, 4: 2.0, 8: 2.005}) == 8
