"""
What a GPU would do, told on a CPU. A CUDA graph replays kernels on the addresses and the numbers
of the day it was captured; a tape of torch operations does the same here. And what would make a
GPU wait is refused.
"""
import contextlib
import types

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import algos
import kernels
import nanorl
import pack
import rollout
from common import axes, backend, memory, pages
from common.optim import Optimizer
from common.pages import Pool
from rollout import Sample, Sampler
from tests.models import random_matrices
from train_gpt import GPT, GPTConfig

SHAPE = dict(vocab_size=61, n_layer=2, n_head=4, n_kv_head=2, head_dim=16,
             d_model=64, d_ff=96, max_len=400, rope_theta=1e4)
PROMPTS, STOP = [[(7 * i + j * j) % 61 for j in range(1 + 9 * i % 41)] for i in range(7)], 5


def tiny(seed=0, **kw):
    return random_matrices(GPT(GPTConfig(**SHAPE | kw)), seed)


# -----------------------------------------------------------------------------
# a tape in the place of a graph

# each of these copies something to the host, or sizes its result by what it reads, or copies a
# list from the host's memory
WAITS = {"tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__",
         "nonzero", "bincount", "unique", "masked_select", "tensor", "as_tensor", "equal", "allclose"}


class Flowing(TorchFunctionMode):
    """Refuses what would make a GPU wait."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in WAITS, f"{func.__name__} waits for the device"
        if getattr(func, "__name__", "") in ("__getitem__", "__setitem__"):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert not any(torch.is_tensor(i) and i.dtype == torch.bool
                           for i in index), "an index of booleans waits for the device"
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """CUDAGraph: notes every operation with the very tensors it met, and does them again on
    those, whatever has become of the rest."""
    recording = None

    def __init__(self):
        super().__init__()
        self.notes, self.paused = [], False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not self.paused:
            self.notes.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.notes:
            again = func(*args, **kwargs)
            for old, new in zip(out if isinstance(out, (tuple, list)) else [out],
                                again if isinstance(again, (tuple, list)) else [again]):
                if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def one_kernel(f):
    """On the tape a kernel is one note, its inside as opaque as on a GPU."""
    def run(*args):
        tape = Tape.recording
        if tape is None:
            return f(*args)
        tape.paused = True
        with torch._C.DisableTorchFunction():
            out = f(*args)
        tape.paused = False
        tape.notes.append((f, args, {}, out))
        return out
    return run


@pytest.fixture
def taped(monkeypatch):
    @contextlib.contextmanager
    def record(tape, pool=None, capture_error_mode=None):
        Tape.recording = tape
        with Flowing(), tape:
            yield
        Tape.recording = None

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, fake in dict(graph_pool_handle=lambda: None, Stream=lambda: stream,
                           current_stream=lambda: stream, stream=lambda s: contextlib.nullcontext(),
                           CUDAGraph=Tape, graph=record).items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # a CPU is a GPU here, whose numbers no BLAS of numpy reads
    monkeypatch.setattr("common.cpu.ONE_THREAD", False)
    for module, name in (pages, "decode_attention"), (kernels, "draw"), (rollout, "uniform_at"):
        monkeypatch.setattr(module, name, one_kernel(getattr(module, name)))

    def make(model, **kw):
        sampler = Sampler(model, {STOP}, slots=4, paged=True, **kw)
        sampler.replayed = True
        return sampler
    return make


def test_a_replayed_step_follows_everything_that_changes(taped):
    """A captured step answers with the lengths, tables, tokens and weights of its capture unless
    all of them live in tensors that never move. One engine in wide use kept a length as a number:
    half of its answers were wrong and nothing failed. Here rows grow over page edges, leave, enter
    and are preempted, weights are written in place, and every token is that of the step done anew."""
    model = tiny()
    graphs, eager = taped(model, pages=7), Sampler(model, {STOP}, slots=4, paged=True, pages=7)
    for top_p in (1.0, 1.0, 0.9):
        a, b = (s.generate(PROMPTS[:5], 1, 40, top_p=top_p) for s in (graphs, eager))
        assert [[s.tokens for s in g] for g in a] == [[s.tokens for s in g] for g in b]
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.02)
    assert len(graphs.graphs) == 2 * len(graphs.sizes)


def test_a_fresh_engine_keeps_the_addresses_that_graphs_know(taped):
    """After logits that were not finite the sampler starts afresh. It made its table of stop ids
    anew there, while the graphs went on reading the old one: freed memory, and rows that end at
    any token or at none."""
    sampler = taped(tiny())
    sampler.generate(PROMPTS[:2], 2, 9)

    def everything():
        return vars(sampler) | vars(sampler.storage)

    tensors = {k: v for k, v in everything().items() if torch.is_tensor(v)}
    assert {"is_stop", "ints", "reals", "token", "tokens", "logprobs", "kept", "k",
            "v", "table", "lengths"} <= set(tensors)
    sampler.reset()
    after = everything()
    assert sampler.graphs and all(after[name] is x for name, x in tensors.items())


def test_the_tape_refuses_what_waits():
    """The test of the tests above."""
    x = torch.arange(3)
    for wrong in (lambda: x.sum().item(), lambda: x.tolist(), lambda: bool(x[0] > 1), lambda: x[x > 1],
                  lambda: torch.tensor([1]), lambda: torch.bincount(x), lambda: x.cpu()):
        with pytest.raises(AssertionError, match="waits for the device"), Flowing():
            wrong()


@pytest.mark.parametrize("slots, sizes", [(1, [1]), (2, [1, 2]), (8, [1, 2, 4, 8]),
                                          (9, [1, 2, 4, 8, 16]), (40, [1, 2, 4, 8, 16, 32, 48])])
def test_sizes_of_graphs_end_with_the_slots(slots, sizes):
    """One slot ran as sixteen rows: the smallest size that was above the slots was skipped to a
    multiple of 16."""
    assert rollout.graph_sizes(slots) == sizes


def test_a_pool_too_small_is_refused_in_words(monkeypatch):
    """A card that the weights fill was told as an empty list, popped deep in the accounting."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30_000, 10**9))
    with pytest.raises(ValueError, match="GiB left: no room for keys and values"):
        Pool(GPTConfig(**SHAPE), torch.bfloat16, torch.device("cuda"), 4, 400)


def test_pages_are_of_the_size_that_the_picked_decode_reads(monkeypatch):
    """flash-attn was picked, printed, and never called: the sampler's pages were of 32 keys, and
    it reads those of 256 alone."""
    for name, page in (("flash", 256), ("triton", 32), ("torch", 32)):
        monkeypatch.setattr(backend, "picks", {("decode", "cpu"): name})
        assert Pool(GPTConfig(**SHAPE), torch.float32, torch.device("cpu"), 2, 300).page == page


def test_a_misspelt_backend_is_one_line(monkeypatch, capsys, tmp_path):
    """It was a traceback out of the first forward, with a run folder already made."""
    import train_gpt
    monkeypatch.setenv("NANORL_ATTENTION", "falsh")
    monkeypatch.setattr(backend, "picks", {})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="NANORL_ATTENTION=falsh is not known; known: flash, varlen, torch"):
        Sampler(tiny(), {STOP})
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main(["--preset", "small", "--device", "cpu"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: NANORL_ATTENTION=falsh")
    assert not list(tmp_path.iterdir())


# -----------------------------------------------------------------------------
# attention of prompts that go on from a cache, and of heads that the fast calls refuse


def test_a_prompt_in_chunks_is_one_fast_call(monkeypatch):
    """The second chunk of a long prompt went through a written-out mask, which on a GPU means the
    scores in fp32: 9 GB for a chunk of 4,096 on 32,768 keys with 16 heads. The ragged call does
    it as it is, aligned to the bottom right; a head of 20 it does not take."""
    calls, cu_q, cu_k = [], [0, 3, 4, 9], [0, 8, 9, 14]

    def rand(*shape):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))

    def ragged(q, k, v, at_q, at_k, max_q, max_k):
        calls.append((at_q.tolist(), at_k.tolist(), max_q, max_k, at_q.dtype, at_k.dtype))
        return torch.zeros_like(q)

    monkeypatch.setitem(kernels.RUNS["train"], "varlen", ragged)
    monkeypatch.setattr(backend, "picks", {("train", "cpu"): "varlen"})
    q, k, v = rand(9, 4, 16), rand(14, 2, 16), rand(14, 2, 16) + 1
    attend = kernels.continued_attention(cu_q, cu_k)
    attend(0, q, k, v), attend(1, q, k, v)
    assert calls == [(cu_q, cu_k, 5, 8, torch.int32, torch.int32)] * 2
    q, k, v = rand(9, 4, 20), rand(14, 2, 20), rand(14, 2, 20) + 1
    got = kernels.continued_attention(cu_q, cu_k)(0, q, k, v)
    assert len(calls) == 2 and not got.equal(torch.zeros_like(got))
    for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):  # the same rows of a prompt that is computed whole
        whole = kernels.packed_attention([0, d - c], d - c)(
            0, torch.cat([rand(d - c - (b - a), 4, 20), q[a:b]]), k[c:d], v[c:d])
        torch.testing.assert_close(got[a:b], whole[d - c - (b - a):])


# -----------------------------------------------------------------------------
# the loss and the rehearsal


def test_compiled_blocks_serve_rows_of_any_lengths():
    """A row's attention holds the row's lengths. Compiled along with the block they were part of
    the program, so that every row compiled a new one until torch gave up: --compile was slower
    than nothing, without a word."""
    from torch._dynamo.utils import counters
    torch._dynamo.reset()
    counters.clear()
    model = tiny()
    model.compiled = True
    for block in model.blocks:
        block.compile(dynamic=True, backend="eager")
    for n in (30, 41, 52, 63, 74, 85):
        tokens = torch.arange(n) % 50
        model(tokens, tokens, kernels.packed_attention([0, n - 11, n], n)).sum().backward()
    graphs, frames = counters["stats"]["unique_graphs"], counters["frames"]
    torch._dynamo.reset()
    assert (0 < graphs < torch._dynamo.config.recompile_limit
            and frames["ok"] == frames["total"]), (graphs, dict(frames))


def batch_of(model, n=3):
    g = torch.Generator().manual_seed(0)
    samples = [Sample([1, 2, 3], torch.randint(61, (4 + i,), generator=g).tolist(),
                      [-1.0] * (4 + i), "length", 0, i, 0, advantage=i - 1.0) for i in range(n)]
    (batch,) = pack.batches([samples], 64, model.config)
    return batch


@pytest.mark.parametrize("algo", ["dr_grpo", "gspo", "cispo", "holder", "vl_norm"])
def test_no_loss_waits_for_the_device(algo, monkeypatch):
    """The lengths of the samples came from a bincount, which asks a GPU for its largest number
    first: forward and backward of every row stood apart. Ten statistics were read after every
    row, too; now after the last."""
    model = tiny()
    batch, config = batch_of(model), axes.with_algorithm(nanorl.Config(algo=algo))
    hidden_ND = batch.hidden(model)
    monkeypatch.setattr(kernels, "expect_ids", lambda *args: None)  # it looks at ids on a CPU alone
    with Flowing():
        value, stats = algos.make_loss(config)(batch, hidden_ND, model.head_weight)
        value.backward()
    assert value.detach().isfinite() and stats["weight_all"].shape == (15,)


def test_a_rehearsal_moves_nothing():
    """The sampler's pool is sized by what an update leaves. It was sized before there was an
    optimizer or a gradient: on a model of 8B the first update would have found no room."""
    model = tiny().to(torch.bfloat16)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer, grads = Optimizer(model), []
    was = optimizer.reduce_grads
    optimizer.reduce_grads = lambda: (grads.extend(p.grad32.shape for p in model.parameters()), was())
    memory.trial_update(model, optimizer, tiny(1).to(torch.bfloat16), nanorl.Config(row_tokens=100), 30)
    assert grads == [p.shape for p in model.parameters()]        # every gradient was there, at full size
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(p.grad is None and p.grad32 is None for p in model.parameters())
    assert optimizer.steps == optimizer.skipped == 0


def test_the_budget_counts_pages_and_one_half_gradient():
    """A half-precision gradient is gone once it is in its fp32 sum: counting all of them at once
    was 16 GB too much for 8B. Keys come in pages: 138 tokens take 160."""
    shape, config = GPTConfig(**SHAPE), nanorl.Config(row_tokens=100)
    parts = memory.fixed(shape, config, 2, 1, 130)
    sizes = [p.numel() for p in GPT(shape).parameters()]
    assert parts["gradients"] == 4 * sum(sizes) + 2 * max(sizes)
    pool = Pool(shape, torch.bfloat16, torch.device("cpu"), 4, 130)
    assert memory.full_cache(shape, 2, 4, 130, paged=True) == pool.k.nbytes + pool.v.nbytes
    # a tile is no wider
    assert parts["head"] < memory.fixed(GPTConfig(**SHAPE | dict(vocab_size=6100)), config, 2, 1, 130)["head"]
    model = GPT(shape).to(torch.bfloat16)
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
