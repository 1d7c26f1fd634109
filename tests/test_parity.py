"""
--parity: the log-prob of a token is the same bits in the sampler and in the trainer.

What a GPU does to it only a GPU can tell (tests/test_gpu.py). What we wrote for it is shown here, on
Triton's interpreter, in a child, since the switch is read when kernels.py is imported:
    TRITON_INTERPRET=1 python -m pytest -o python_functions='check_*' tests/test_parity.py
"""
import os
from pathlib import Path

import pytest
import torch

import kernels
import nanorl
import pack
from common import cpu, parity
from rollout import Sampler
from tests.interpreter import checks_interpreted
from tests.models import random_matrices
from train_gpt import GPT, GPTConfig

pytest.importorskip("triton")
SHAPE = dict(vocab_size=61, n_layer=2, n_head=6, n_kv_head=2, head_dim=16, d_model=48, d_ff=56, max_len=400,
             rope_theta=1e4)
ROWS = 1, 2, 3, 8, 17, 64


def test_what_we_wrote_gives_a_row_the_same_bits_in_every_company():
    checks_interpreted(__file__)


def test_a_cpu_is_refused_in_one_line(tiny_base, capsys):
    """accepted there, the flag would do nothing; and nothing is written, nor a base trained first"""
    tiny_base(8)
    words = "--init base --data my.jsonl --reward my.py:score --device cpu --max-new 6".split()
    with pytest.raises(SystemExit) as stopped:
        nanorl.main([*words, "--parity"])
    error, = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and not Path("runs").exists()
    assert error.startswith("error: --parity has no effect on cpu") and "1e-6" in error
    nanorl.main([*words, "--parity", "--dry-run", "--card", "24"])     # it asks for a card that is not here


def test_the_switches_of_cublas_are_set_before_it_is_asked(monkeypatch):
    """read at the first product of a process: later they say nothing, and nothing says so"""
    for name in parity.ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    parity.prepare(True)
    matmul = torch.backends.cuda.matmul
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8" and os.environ["CUBLASLT_WORKSPACE_SIZE"] == "1"
    assert not matmul.allow_bf16_reduced_precision_reduction and not parity.ON, "not before it was tried"
    parity.prepare(False)
    assert matmul.allow_bf16_reduced_precision_reduction


def test_without_it_nothing_of_it_runs(monkeypatch):
    """a run without the flag, in a process that had one with it before"""
    monkeypatch.setattr(parity, "ON", True)
    parity.prepare(False)
    assert kernels.picked("train", "cpu") == "torch" and "parity" not in kernels.backend("cpu")


# -----------------------------------------------------------------------------
# interpreted


@pytest.fixture
def on(monkeypatch):
    """-> a model, with --parity"""
    monkeypatch.setattr(cpu, "ON", False)                    # a CPU's stand-ins, in the sampler alone
    monkeypatch.setattr(parity, "ON", True)
    monkeypatch.setattr(parity, "PRODUCT", "triton")
    return random_matrices(GPT(GPTConfig(**SHAPE)), 0)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@torch.inference_mode()
def check_each_step(on):
    """products, norm, rope, swiglu, log-prob; drawn and trained, decoded and packed"""
    assert parity.trial(on, kernels, ROWS) == []


@torch.inference_mode()
def check_two_tiles_of_logits(on, monkeypatch):
    """a vocabulary that ends one past a tile: the same tiles for one row and for many, and for what is
    drawn, at any temperature, greedy and truncated"""
    monkeypatch.setattr(parity, "WIDTH", 1024)
    head, x = rand(1025, 16), rand(9, 16)
    temperature = torch.tensor([0.7, 1.0, 0.0, 1.3, 0.7, 0.3, 2.0, 0.0, 0.7])
    uniform = torch.linspace(0.05, 0.95, 9)
    top_k = torch.tensor([0, 5, 0, 0, 3, 0, 0, 2, 0])
    token, logp, _ = kernels.draw_next(x, head, uniform, temperature, top_k, torch.ones(9))
    for i, t in enumerate(temperature.tolist()):
        alone, _ = kernels.linear_logprob(x[i : i + 1], head, token[i : i + 1], t or 1.0)
        assert torch.equal(alone, logp[i : i + 1]), i


@torch.inference_mode()
def check_the_trial_sees_what_follows_the_number_of_rows(on, monkeypatch):
    """what --parity replaces is put back, and is found"""
    def by_rows(rows, vocab, numbers):
        return [(low, min(low + 3 * rows, vocab)) for low in range(0, vocab, 3 * rows)]

    def slanted(x, weight, bias=None):
        return parity.multiply(x, weight, bias) * (1 + 1e-6 * len(x))

    monkeypatch.setitem(kernels.RUNS["decode"], "parity", kernels._triton_decode)
    monkeypatch.setattr(kernels, "_tiles", by_rows)
    monkeypatch.setattr(kernels, "linear", slanted)
    assert parity.trial(on, kernels, (1, 2, 4)) == ["log-prob", "qkv", "out", "gate_up", "down", "decode"]


def check_use_takes_our_product_where_the_library_follows_the_rows(on, monkeypatch):
    plain = torch.nn.functional.linear

    def slanted(x, weight, bias=None):
        return plain(x, weight, bias) * (1 + 1e-6 * len(x))

    monkeypatch.setattr(parity, "ROWS", (1, 2, 300, 4096))
    monkeypatch.setattr(torch.nn.functional, "linear", slanted)
    parity.prepare(True)
    try:
        parity.use(on, kernels)
        assert parity.PRODUCT == "triton" and "the same bits in all" in kernels.backend("cpu")
    finally:
        parity.prepare(False)


@torch.inference_mode()
@pytest.mark.parametrize("length, page", [(1, 4), (64, 32), (65, 32), (70, 16)])
def check_decode_is_packed(on, length, page):
    """on both sides of a block's edge and of a page's; other sequences beside it, on both sides"""
    c = on.config
    rand_ = parity.numbers("cpu", torch.float32)
    assert parity.attended(kernels, c, rand_, length, page) == {"attention": True, "decode": True}


@torch.inference_mode()
def check_a_shared_prompt_is_a_prompt_of_ones_own(on):
    """the trainer stores it once for its responses; the sampler has it in pages, each by itself"""
    q, k, v = (rand(100, n, 16, seed=n) for n in (6, 2, 2))
    shared = kernels.packed_attention([0, 70, 80, 100], 70, [-1, 0, 0])(0, q, k, v)
    for a, b in ((70, 80), (80, 100)):
        own = [torch.cat((x[:70], x[a:b])) for x in (q, k, v)]
        alone = kernels.packed_attention([0, 70 + b - a], 90)(0, *own)
        assert torch.equal(alone[:70], shared[:70]) and torch.equal(alone[70:], shared[a:b])


@pytest.mark.parametrize("cu, parent", [([0, 1], [-1]), ([0, 70, 75, 140], [-1, 0, -1])])
@pytest.mark.parametrize("H, KV, hd", [(6, 2, 16), (1, 1, 24), (8, 1, 64)])
def check_attention_is_right(on, cu, parent, H, KV, hd):
    """values and gradients, against the twin in float64"""
    inputs = rand(cu[-1], H, hd), rand(cu[-1], KV, hd, seed=1), rand(cu[-1], KV, hd, seed=2)
    found = []
    for make, dtype in ((kernels.packed_attention, torch.float32),
                        (kernels.packed_attention_torch, torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        o = make(cu, 80, parent)(0, *leaves)
        found.append([o, *torch.autograd.grad(o, leaves, rand(*o.shape).to(dtype))])
    for ours, right in zip(*found):
        torch.testing.assert_close(ours.double(), right, atol=1e-5, rtol=1e-4)


def check_products_are_right(on):
    """values and gradients; a bias, a transposed weight, a sum longer than a block"""
    x, w, b = rand(70, 100), rand(67, 100), rand(67)
    found = []
    for run, dtype in ((parity.linear, torch.float32), (torch.nn.functional.linear, torch.float64)):
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b)]
        y = run(*leaves)
        found.append([y, *torch.autograd.grad(y, leaves, rand(*y.shape).to(dtype))])
    for ours, right in zip(*found):
        torch.testing.assert_close(ours.double(), right, atol=1e-4, rtol=1e-4)
    turned = parity.multiply(x, w.t().contiguous().t())
    assert torch.equal(turned, parity.multiply(x, w))


def scored(model, temperature):
    """-> sampled log-probs, and the trainer's of the same tokens, in rows with shared prompts"""
    sampler = Sampler(model, (), slots=3, paged=True)                    # one of the four waits
    prompts = [[(7 * i + j * j) % 61 for j in range(3 + 31 * i)] for i in range(2)]
    groups = sampler.generate(prompts, 2, 6, temperature=temperature)
    sampled, trained = [], []
    for batch in pack.batches(groups, 60, model.config, share=True):
        hidden_ND = batch.hidden(model)
        logp_N, _ = kernels.linear_logprob(hidden_ND, model.head_weight, batch.targets_N, temperature)
        sampled.append(batch.sampler_logp_N)
        trained.append(logp_N.detach())
    return torch.cat(sampled), torch.cat(trained)


def check_a_sampler_and_a_trainer(on, monkeypatch):
    """all of it together: prompts stored once, pages, another number of rows in every call"""
    sampled, trained = scored(on, 0.7)
    assert len(sampled) == 24 and torch.equal(sampled, trained)
    monkeypatch.setattr(parity, "ON", False)
    sampled, trained = scored(on, 0.7)
    assert not torch.equal(sampled, trained), "a test that cannot fail"
    assert torch.allclose(sampled, trained, atol=1e-4)
