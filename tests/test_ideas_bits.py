"""the exact invariants of the ideas about few numbers and few bits: where each equals what it is compared
with, a case worked by hand"""
import pytest
import torch

import train_gpt
from common.optim import Optimizer
from ideas import limit, paretoq, qsgd, signround
from train_gpt import scratch, steps


@pytest.fixture
def few(monkeypatch):
    """steps of two windows of 16 bytes, one block: what is exact is exact at any size"""
    small = train_gpt.PRESETS["tiny"].replace("--batch 16 --seq-len 128", "--batch 2 --seq-len 16")
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", f"{small} --n-layer 1")


# -----------------------------------------------------------------------------
# limit


def test_the_papers_own_extrapolations_of_its_cubic():
    """500k, 1.7m, 4m, 107m, 250m documents stand in its text"""
    said = {512: 500e3, 768: 1.7e6, 1024: 4e6, 3072: 107e6, 4096: 250e6}
    for d, n in said.items():
        assert limit.cubic(d) == pytest.approx(n, rel=0.04)


def test_every_pair_is_found_or_not():
    wanted = limit.relevance(3)
    assert wanted.tolist() == [[1, 1, 0], [1, 0, 1], [0, 1, 1]]
    documents = torch.eye(3)
    assert limit.all_found(wanted, documents, wanted)
    assert not limit.all_found(wanted[:, [1, 0, 2]], documents, wanted), "two queries exchanged"
    assert not limit.all_found(torch.ones(3, 3), documents, wanted), "a tie finds nothing"


def test_limits_gradient_against_autograd():
    wanted = limit.relevance(5).double()
    vectors = torch.randn(15, 4, dtype=torch.float64, requires_grad=True)
    queries, documents = vectors[:10], vectors[10:]
    logp = (queries @ documents.t() / 0.1).log_softmax(1)
    loss = -torch.stack([logp[i, j] for i, j in wanted.nonzero()]).mean()
    loss.backward()
    found, gradient = limit.loss_and_gradient(vectors.detach(), wanted)
    assert found == pytest.approx(loss.item()) and torch.allclose(gradient, vectors.grad)


def test_four_numbers_find_every_pair_on_a_circle():
    """and no more can be had in the plane: there a pair is found only if the two are neighbors"""
    for n in (3, 10, 100):
        queries, documents = limit.circle(n)
        assert queries.shape[1] == documents.shape[1] == 4
        assert torch.allclose(documents.norm(dim=1), torch.full((n,), 2.0**0.5, dtype=torch.float64))
        assert limit.all_found(queries, documents, limit.relevance(n))
    queries, documents = limit.circle(5)
    t, (a, b) = 2 * torch.pi * torch.arange(5) / 5, (0.0, 2 * torch.pi / 5)
    product = (1 - torch.cos(t - a)) * (1 - torch.cos(t - b))
    scores = documents @ queries[0]
    assert torch.allclose(scores[0] - scores, product.double(), atol=1e-6)
    assert not limit.all_found(queries[:, :2], documents[:, :2], limit.relevance(5))


def test_few_documents_are_solved_and_many_in_a_plane_are_not():
    config = limit.Config(steps=400)
    assert limit.solved("free", 4, 4, config) and limit.solved("frozen", 3, 4, config)
    assert not limit.solved("free", 8, 2, config)


# -----------------------------------------------------------------------------
# qsgd


def test_a_quantised_gradient_is_right_on_average():
    """between its two levels; the mean of many draws is v; each number's variance is that of a coin"""
    v = torch.linspace(-1, 1, 600).view(20, 30)                  # two buckets, the second cut short
    g = torch.Generator().manual_seed(0)
    for levels in (1, 7):
        draws = torch.stack([qsgd.quantise(v, levels, g) for _ in range(4000)])
        x = v.abs() * levels                                     # both scales are 1
        coin = (x - x.floor()) * (1 - x + x.floor()) / levels**2
        assert ((draws * levels).round() - draws * levels).abs().max() < 1e-4
        assert ((draws - v).abs() <= 1 / levels + 1e-6).all()
        assert ((draws.mean(0) - v).abs() < 5 * (coin / 4000).sqrt() + 1e-6).all()
        assert torch.allclose(draws.var(0), coin, atol=0.03 / levels**2)


def test_the_papers_bound_of_the_variance():
    """with the 2-norm for scale: min(n / s^2, sqrt(n) / s) |v|^2"""
    v = torch.randn(512, generator=torch.Generator().manual_seed(1))
    g = torch.Generator().manual_seed(0)
    for levels in (1, 7, 60):
        draws = torch.stack([qsgd.quantise(v, levels, g, two_norm=True) for _ in range(400)])
        variance = (draws - v).square().sum(1).mean() / v.square().sum()
        assert variance < min(512 / levels**2, 512**0.5 / levels)


def test_each_bucket_has_its_own_scale():
    """of 128 numbers: what is large in one bucket does not coarsen the next"""
    v = torch.cat([torch.full((128,), 100.0), torch.full((128,), 0.01)])
    assert torch.allclose(qsgd.quantise(v, 1, bucket=128), v)
    assert (qsgd.quantise(v, 1, bucket=256)[128:] == 0).all()


def test_levels_stay_levels_and_nearest_is_nearest():
    v = torch.tensor([0.0, 1.0, -3.0, 7.0, -7.0])
    g = torch.Generator().manual_seed(0)
    assert torch.equal(qsgd.quantise(v, 7, g), v), "numbers that are levels arrive as they are"
    assert torch.equal(qsgd.quantise(torch.zeros(3), 7, g), torch.zeros(3))
    near = qsgd.quantise(torch.tensor([0.4, 0.6, -0.6, 7.0]), 7)
    assert near.tolist() == [0.0, 1.0, -1.0, 7.0]


def test_workers_that_send_everything_are_the_optimizer_of_the_core(few):
    """two halves of a batch, each sent by itself: at 32 bits their sum is the gradient, to the bit; SGD's
    first step is the rate times the mean gradient"""
    ends = []
    for make in (lambda model: Optimizer(model, lr=1e-2, clip=0),
                 lambda model: qsgd.Sent(model, "AdamW", "32 bits", 0),
                 lambda model: qsgd.Sent(model, "AdamW", "4 bits", 0)):
        model, document = scratch("tiny", 1)
        list(steps(model, qsgd.halves(document), make(model), 3))
        ends.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])

    model, document = scratch("tiny", 1)
    before = model.head.weight.detach().clone()
    list(steps(model, qsgd.halves(document), qsgd.Sent(model, "SGD", "32 bits", 0), 1,
               schedule=lambda step: 1.0))
    other, document = scratch("tiny", 1)
    docs = [document("train", i) for i in range(2)]
    for row in train_gpt.packed_rows(docs, 64, "cpu"):
        train_gpt.forward(other, row).backward()
    mean = other.head.weight.grad / train_gpt.targets_of(docs)
    assert torch.allclose(model.head.weight - before, -0.1 * mean, atol=1e-7)


def test_each_worker_is_quantised_by_itself(few):
    seen = []

    class Look(qsgd.Sent):
        def finish_micro_batch(self):
            seen.append(self.model.head.weight.grad.clone())
            super().finish_micro_batch()
    model, document = scratch("tiny", 1)
    list(steps(model, qsgd.halves(document), Look(model, "SGD", "4 bits", 0), 2))
    assert len(seen) == 2 * qsgd.WORKERS


# -----------------------------------------------------------------------------
# paretoq


@pytest.mark.parametrize("bits, stretched, wanted", [
    (1, False, [-1, 1]),
    (1.58, True, [-2 / 3, 0, 2 / 3]),
    (2, True, [-0.75, -0.25, 0.25, 0.75]),
    (3, False, [-4, -3, -2, -1, 0, 1, 2, 3]),
    (3, True, [-0.875, -0.625, -0.375, -0.125, 0.125, 0.375, 0.625, 0.875]),
    (4, False, list(range(-8, 8))),
])
def test_as_many_levels_as_the_bits_say(bits, stretched, wanted):
    """a scale of 0.5, weights far beyond both ends"""
    w = torch.linspace(-10, 10, 4000).view(1, -1)
    seen = paretoq.levels(w, torch.tensor([[0.5]]), bits, stretched)
    assert torch.allclose(seen.unique(), 0.5 * torch.tensor(wanted, dtype=torch.float), atol=1e-6)


@pytest.mark.parametrize("bits, stretched", [(1, False), (1.58, True), (2, True), (3, False), (4, False)])
def test_gradients_through_the_rounding(bits, stretched):
    """of the weights: 1 between the ends and 0 beyond; of the scale: the level less w / a between the
    ends, the last level beyond; at 1 bit it is the sign"""
    w = torch.linspace(-1, 1, 41, dtype=torch.float64).view(1, -1).requires_grad_()
    scale = torch.tensor([[0.11 if bits > 2 else 0.7]], dtype=torch.float64, requires_grad=True)
    weight = torch.linspace(1, 2, 41, dtype=torch.float64)       # of each output
    seen = paretoq.levels(w, scale, bits, stretched)
    (seen * weight).sum().backward()
    x = (w / scale).detach()
    level = (seen / scale).detach()
    low, high = {1: (-1, 1), 3: (-4, 3), 4: (-8, 7)}.get(bits, (-0.99, 0.99))
    inside = (x >= low) & (x <= high)
    by_scale = torch.where(inside, level - x, level) if bits > 1 else level
    assert torch.allclose(w.grad, inside * weight) and 0 < inside.sum() < 41
    assert torch.allclose(scale.grad, (by_scale * weight).sum().view(1, 1))


def test_first_scales_fit_the_weights():
    """of a row each: the mean of the sizes, the largest, or what puts the largest on the last level"""
    w = torch.tensor([[0.3, -0.7, 0.2], [1.0, 2.0, -3.0]])
    assert torch.allclose(paretoq.first_scale(w, 1, False), torch.tensor([[0.4], [2.0]]))
    assert torch.allclose(paretoq.first_scale(w, 2, True), torch.tensor([[0.7], [3.0]]))
    assert torch.allclose(paretoq.first_scale(w, 4, False), torch.tensor([[0.1], [3 / 7]]))
    fine = paretoq.levels(w, paretoq.first_scale(w, 4, False), 4, False)
    assert ((fine - w).abs() <= paretoq.first_scale(w, 4, False) / 2 + 1e-6).all()


def test_whole_weights_train_as_ever_and_rounded_ones_are_rounded(few):
    """a wrapper without bits is the model, to the bit; with 2 bits the layers see four levels in a row,
    embeddings and head stay whole, and the scales learn slower by 1 / sqrt(n most)"""
    ends = []
    for wrap in (lambda model: model, lambda model: paretoq.Rounded(model, "whole")):
        model, document = scratch("tiny", 1)
        wrapped = wrap(model)
        list(steps(wrapped, document, Optimizer(wrapped, lr=1e-3), 2))
        ends.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    assert torch.equal(*ends)
    rounded = paretoq.Rounded(model, "2 bits")
    seen = rounded.rounded()
    assert seen and all(name.startswith("blocks") for name in seen)
    assert all(len(row.unique()) <= 4 for w in seen.values() for row in w)
    assert paretoq.moved(model, model.state_dict()) == 0
    name, w = next((n, w) for n, w in seen.items() if n.endswith("qkv.weight"))
    scale = rounded.scales[list(seen).index(name)]
    gradient, = torch.autograd.grad(w.sum(), scale)
    bare = scale.detach().clone().requires_grad_()
    paretoq.levels(rounded.matrices[name].detach(), bare, 2, True).sum().backward()
    assert torch.allclose(gradient, bare.grad * w.numel() ** -0.5, atol=1e-6)


# -----------------------------------------------------------------------------
# signround


def test_without_a_shift_it_is_nearest_and_a_shift_is_one_level_at_most():
    w = torch.randn(6, 64, generator=torch.Generator().manual_seed(0))
    groups = w.view(-1, 32)
    for bits in (2, 3, 4):
        step = (groups.amax(1) - groups.amin(1)) / (2**bits - 1)
        seen = signround.rounded(w, bits).view(-1, 32)
        assert all(len(row.unique()) <= 2**bits for row in seen)
        # the zero lies on a level, so the ends may be off by as much again
        assert ((seen - groups).abs() <= step[:, None] + 1e-6).all()
        assert ((seen - groups).abs() <= step[:, None] / 2 + 1e-6).float().mean() > 0.9
        for v in (torch.full_like(w, 0.5), torch.full_like(w, -0.5)):
            moved = (signround.rounded(w, bits, v).view(-1, 32) - seen).abs()
            assert (moved <= step[:, None] + 1e-6).all() and moved.max() > 0


def test_levels_by_hand():
    """2 bits from 0 to 3: s = 1; with the upper end pulled in to 2/3 the levels are 0, 2/3, 4/3, 2"""
    w = torch.tensor([[0.0, 0.4, 1.6, 3.0]])
    assert signround.rounded(w, 2).tolist() == [[0, 0, 2, 3]]
    assert signround.rounded(w, 2, torch.tensor([[0.0, 0.2, -0.2, 0.0]])).tolist() == [[0, 1, 1, 3]]
    pulled = signround.rounded(w, 2, high=torch.tensor([[2 / 3]]))
    assert torch.allclose(pulled, torch.tensor([[0, 2 / 3, 4 / 3, 2]]))


def test_a_learned_rounding_makes_a_blocks_output_better_than_nearest(few):
    model, document = scratch("tiny", 1)
    with torch.no_grad():
        for w in model.blocks.parameters():
            w.add_(0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(1)))
    docs = [document("train", i) for i in range(4)]
    rows = list(train_gpt.packed_rows(docs, 40, "cpu"))
    block = model.blocks[0]
    inputs = signround.calls(model, rows)[0]
    targets = [block(*args).detach() for args in inputs]

    @torch.no_grad()
    def error(weights):
        return sum(float((torch.func.functional_call(block, weights, args) - t).square().mean())
                   for args, t in zip(inputs, targets))
    nearest = {n: signround.rounded(w.detach(), 2) for n, w in block.named_parameters() if w.ndim == 2}
    once = signround.learned(block, inputs, targets, 2, 1)
    assert all(torch.equal(once[name], nearest[name]) for name in nearest), "it begins at nearest"
    both = signround.learned(block, inputs, targets, 2, 100)
    assert error(both) < 0.9 * error(nearest)

    def ordered(weights):
        """does a larger weight of a group always get a level that is not lower?"""
        groups = [(block.get_parameter(name).detach().view(-1, 32), w.view(-1, 32))
                  for name, w in weights.items()]
        return all((seen.gather(1, w.argsort(1)).diff() >= -1e-6).all() for w, seen in groups)
    ends = signround.learned(block, inputs, targets, 2, 100, shifting=False)
    assert ordered(nearest) and ordered(ends) and not ordered(both), "the ends alone round to the nearest"
    assert error(ends) < error(nearest)


def test_a_repair_of_low_rank_is_better_than_levels_alone():
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    plain = (w - signround.rounded(w, 2)).norm()
    once = (w - signround.repaired(w, 2, turns=1)).norm()
    often = (w - signround.repaired(w, 2)).norm()
    assert often <= once < plain
    assert torch.linalg.matrix_rank(signround.repaired(w, 2, turns=1) - signround.rounded(w, 2),
                                    rtol=1e-4) == signround.RANK
