"""the exact invariants of the ideas about blocks, memories and schedules: where each equals what it is
compared with, a case worked by hand"""
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_gpt
from common.experts import Experts
from common.optim import Optimizer, orthogonalize
from ideas import moe
from kernels import packed_attention
from rollout import Sampler
from tests.models import nudged, random_matrices
from train_gpt import GPT, GPTConfig, SparseBlock, scratch, steps

SHAPE = dict(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, d_model=32, d_ff=48, max_len=256,
             rope_theta=1e4)


@pytest.fixture
def few(monkeypatch):
    """steps of two windows of 16 bytes, one block: what is exact is exact at any size"""
    small = train_gpt.PRESETS["tiny"].replace("--batch 16 --seq-len 128", "--batch 2 --seq-len 16")
    monkeypatch.setitem(train_gpt.PRESETS, "tiny", f"{small} --n-layer 1")


def sparse_model(seed=0, **more):
    shape = SHAPE | dict(n_expert=8, n_active=2) | more
    return random_matrices(GPT(GPTConfig(**shape)), seed)


def hidden(model, tokens):
    T = len(tokens)
    return model(torch.tensor(tokens), torch.arange(T), packed_attention([0, T], T))


# -----------------------------------------------------------------------------
# experts


def by_hand(experts, x):
    """each token by itself, in float64"""
    p = (x.double() @ experts.router.weight.double().t()).softmax(-1)
    D, E = x.shape[1], experts.count
    gate_up = experts.gate_up.weight.double().view(E, -1, D)
    down = experts.down.weight.double().view(E, D, -1)
    out = torch.zeros_like(x, dtype=torch.float64)
    for t, row in enumerate(x.double()):
        chosen = p[t].argsort(descending=True)[:experts.active]
        total = p[t, chosen].sum() if experts.norm_gates else 1.0
        for e in chosen:
            gate, up = (gate_up[e] @ row).chunk(2)
            out[t] += p[t, e] / total * (down[e] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("norm", [True, False])
def test_experts_are_their_formula_value_and_gradient(norm):
    experts = random_matrices(Experts(GPTConfig(**SHAPE | dict(n_expert=5, n_active=3, norm_gates=norm))))
    x = torch.randn(37, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weight = torch.linspace(-1, 1, 32)
    got, want = experts(x), by_hand(experts, x)
    assert torch.allclose(got.double(), want, atol=1e-5)
    of = [x, *experts.parameters()]
    both = [torch.autograd.grad((value * weight).sum(), of) for value in (got, want)]
    for a, b in zip(*both):
        assert torch.allclose(a, b.float(), atol=1e-4)


def test_every_expert_on_every_row_gives_the_same():
    """what a GPU does where it cannot ask for the number of rows"""
    experts = random_matrices(Experts(GPTConfig(**SHAPE | dict(n_expert=8, n_active=2))))
    x = torch.randn(20, 32, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(experts.on_every_row(x, *experts.route(x)), experts(x), atol=1e-5)


def test_equal_experts_are_the_dense_block():
    """eight times the same SwiGLU, whose gates sum to 1, is that SwiGLU"""
    dense = random_matrices(GPT(GPTConfig(**SHAPE)))
    model = sparse_model(d_ff=96)
    with torch.no_grad():
        for block, of in zip(model.blocks, dense.blocks):
            block.load_state_dict(of.state_dict(), strict=False)
            block.experts.gate_up.weight.copy_(of.gate_up.weight.repeat(8, 1))
            block.experts.down.weight.copy_(of.down.weight.repeat(8, 1))
        for name in ("embed", "norm", "head"):
            getattr(model, name).load_state_dict(getattr(dense, name).state_dict())
    tokens = list(range(50))
    assert torch.allclose(hidden(model, tokens), hidden(dense, tokens), atol=1e-5)


def test_sampled_and_trained_by_the_same_core():
    """samples do not depend on what else is in the batch, to the bit; the sampler's log-probs are the
    trainer's"""
    model = sparse_model()
    prompts = [list(range(3, 3 + n)) for n in (5, 9, 17)]
    groups = Sampler(model, stop={0}).generate(prompts, n=4, max_new=24, seed=1)
    alone = Sampler(model, stop={0}).generate(prompts[1:2], n=4, max_new=24, seed=1, ids=[1])
    assert [s.tokens for s in groups[1]] == [s.tokens for s in alone[0]]
    assert [s.logprobs for s in groups[1]] == [s.logprobs for s in alone[0]]
    for s in (s for group in groups for s in group):
        with torch.no_grad():
            states = hidden(model, s.prompt + s.tokens)[len(s.prompt) - 1:-1]
            logp = (states @ model.head_weight.t()).log_softmax(-1)
        want = logp.gather(1, torch.tensor(s.tokens).unsqueeze(1)).squeeze(1)
        assert (want - torch.tensor(s.logprobs)).abs().max() < 1e-5


def test_muon_turns_each_expert_by_itself():
    model = sparse_model()
    optimizer = Optimizer(model, lr=1e-3, muon_lr=1e-2, momentum=0.0)
    s = next(s for s in optimizer.shards if s.name == "blocks.0.experts.gate_up.weight")
    G = torch.randn(s.param.shape, generator=torch.Generator().manual_seed(0))
    before = s.param.detach().clone()
    s.grad = G.reshape(-1).clone()
    optimizer.update_matrix(s, 1.0, 1.0)
    moved = (s.param.detach() - before).view(8, -1, 32)
    for expert, own in zip(G.view(8, -1, 32), moved):
        assert torch.allclose(own, -1e-2 * 0.2 * 48**0.5 * orthogonalize(expert), atol=1e-6)


# -----------------------------------------------------------------------------
# moe


def test_what_a_token_costs_does_not_depend_on_granularity():
    dense = GPTConfig(**SHAPE)
    costs = {}
    for arm in moe.ARMS:
        c = moe.shape_of(arm, dense)
        block = (moe.ZeroBlock if arm == "zero" else SparseBlock if c.n_expert else train_gpt.Block)(c)
        whole = block.experts if c.n_expert else block
        numbers = whole.gate_up.weight.numel() + whole.down.weight.numel()
        router = whole.router.weight.numel() if c.n_expert else 0
        share = c.n_active / c.n_expert if c.n_expert else 1
        costs[arm] = numbers * share, router, numbers
    for arm in ("G = 1", "G = 2", "G = 4", "zero"):
        assert costs[arm][0] == costs["dense"][0] and costs[arm][2] == 8 * costs["dense"][2]
    assert sum(costs["G = 1, wider"][:2]) == sum(costs["G = 4"][:2])


def test_a_zero_expert_gives_its_share_of_the_token_back():
    c = moe.shape_of("zero", GPTConfig(**SHAPE))
    experts = random_matrices(moe.WithZero(c))
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    p = (x @ experts.router.weight.t()).softmax(-1)
    want = torch.zeros_like(x)
    gate, chosen = p.topk(3)
    gate_up = experts.gate_up.weight.view(16, -1, 32)
    down = experts.down.weight.view(16, 32, -1)
    for t in range(len(x)):
        for g, e in zip(gate[t], chosen[t]):
            real = int(e) < 16
            a, b = (gate_up[e] @ x[t]).chunk(2) if real else (None, None)
            want[t] += g * (down[e] @ (F.silu(a) * b) if real else x[t])
    assert (chosen >= 16).any() and torch.allclose(experts(x), want, atol=1e-4)


def test_the_balancing_loss_is_least_where_all_are_equal_and_shows_nothing(few):
    """its gradient by hand: E sum_e share_e mean p_e; the loss that is drawn is the plain one"""
    model, document = scratch("tiny", 1)
    sparse = nudged(moe.model_of("G = 2", model.config, 1), 0, 0.05, matrices_only=True)
    docs = [document("train", i) for i in range(2)]
    row = next(train_gpt.packed_rows(docs, 64, "cpu"))
    with_it = moe.balanced(sparse, row)
    plain, found = moe.routed(sparse, row, train_gpt.forward)
    assert with_it.item() == pytest.approx(plain.item(), rel=1e-6)
    router = sparse.blocks[0].experts.router.weight
    (p_TE, chosen), = found
    share = torch.stack([(chosen == e).float().mean() for e in range(16)])
    by_itself = plain + moe.BALANCE * len(row[3]) * 16 * (share * p_TE.mean(0)).sum()
    assert torch.allclose(torch.autograd.grad(with_it, router)[0], torch.autograd.grad(by_itself, router)[0],
                          atol=1e-5)
    assert all(block.experts.seen is None for block in sparse.blocks), "nothing is kept after the step"


def test_a_dense_arm_is_plain_training(few):
    ends = []
    for loss in (train_gpt.forward, moe.balanced):
        model, document = scratch("tiny", 1)
        list(steps(model, document, Optimizer(model, lr=1e-2), 2, loss=loss))
        ends.append(torch.cat([w.detach().flatten() for w in model.parameters()]))
    assert torch.equal(*ends)
    assert moe.model_of("dense", replace(model.config), 1).state_dict().keys() == model.state_dict().keys()
