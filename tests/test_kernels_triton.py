"""
The Triton kernels without a GPU, two ways.

Interpreted: with TRITON_INTERPRET=1 a kernel runs in numpy on CPU tensors, and must equal its torch
twin. The switch is read when kernels.py is imported, so these checks (named check_*) run in a child:
    TRITON_INTERPRET=1 python -m pytest -o python_functions='check_*' tests/test_kernels_triton.py
fp32 only: the interpreter's bf16 tl.dot returns garbage without a word. Programs run one after
another there, so a race stays hidden.

Compiled, not run: for sm_80, sm_90 and sm_100, with the registers and the stack that the machine
code uses. A stack is a spill.
    python tests/test_kernels_triton.py 80 90 100
"""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import kernels  # noqa: E402
from common import backend, parity  # noqa: E402
from tests.interpreter import checks_interpreted  # noqa: E402

triton = pytest.importorskip("triton")

# -----------------------------------------------------------------------------
# compiled: kernel, the types of its arguments in order, its constants, warps, stages

POINTERS = {"b": "*bf16", "f": "*fp32", "l": "*i64", "i": "*i32", "I": "i32", "F": "fp32"}
ROPE = dict(H=16, KV=8, HALF=64, BLOCK_R=32, BLOCK_D=64)
FORWARD = dict(q_grad=None, k_grad=None, dw_q=None, dw_k=None)
NO_NORM = dict(q_weight=None, k_weight=None)
DECODE = dict(PAGE=256, KV=8, GROUP=4, HD=128, BLOCK_G=16, BLOCK_D=128, BLOCK_N=64)
TILE = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64)
ATTENTION = dict(KV=8, GROUP=2, HD=128, BLOCK_G=2, BLOCK_Q=32, BLOCK_D=128, BLOCK_N=64)
DRAW = dict(SLICE=8192, BLOCK_S=32, BLOCK=4096)
KERNELS = [
    ("_decode_kernel", "bbbbbiiffFIIII", dict(SPLITS=4, **DECODE), 4, 3),
    ("_decode_kernel", "bbbbbiibfFIIII", dict(SPLITS=1, **DECODE), 4, 3),
    ("_merge_kernel", "ffb", dict(HEADS=32, SPLITS=32, HD=128, BLOCK_D=128), 2, 3),
    ("_online_kernel", "flfffffIII", dict(BLOCK_V=1024, BLOCK_K=16), 4, 3),
    ("_dlogits_kernel", "fblfffffIIIF", dict(BLOCK_V=2048, BLOCK_K=16), 4, 3),
    ("_dlogits_kernel", "fblfffffIIIF", dict(BLOCK_V=2048, BLOCK_K=64), 4, 3),
    ("_norm_rope_kernel", "bbbbbbffIIIF", ROPE | FORWARD, 4, 3),
    ("_norm_rope_kernel", "bbbbffIIIF", ROPE | FORWARD | NO_NORM, 4, 3),
    ("_norm_rope_kernel", "bbbbbbffbbffIIIF", ROPE, 4, 3),
    ("_norm_rope_kernel", "bbbbbbffffIIIF", ROPE | NO_NORM, 4, 3),
    ("_swiglu_kernel", "bbI", dict(BLOCK=1024), 4, 3),
    ("_swiglu_back_kernel", "bbbI", dict(BLOCK=1024), 4, 3),
    ("_uniform_kernel", "fllI", dict(BLOCK=256), 4, 3),
    ("_slice_kernel", "ffffIII", dict(SLICE=8192), 8, 3),
    ("_draw_kernel", "fffiffflffIII", DRAW, 8, 3),
    ("_draw_kernel", "ffffflffIII", dict(top_k=None, top_p=None, **DRAW), 8, 3),
    ("_multiply_kernel", "bbbIIIIII", dict(bias=None, **TILE), 4, 3),
    ("_multiply_kernel", "bbbbIIIIII", TILE, 4, 3),
    ("_attention_kernel", "bbbbiiiFIIII", dict(PAGE=32, **ATTENTION), 4, 2),
    ("_attention_kernel", "bbbbiiiFIIII", dict(PAGE=0, **ATTENTION), 4, 2),
]


def resources(name, types, constants, warps, stages, arch):
    """-> registers a thread, stack and shared memory in bytes, from the machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = vars(kernels).get(name) or getattr(parity, name)
    names = [n for n in kernel.arg_names if n not in constants]
    assert len(names) == len(types), f"{name} takes {names}"
    signature = {n: POINTERS[t] for n, t in zip(names, types)} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names)
               if signature[n][0] == "*"}
    source = ASTSource(kernel, signature,
                       {(kernel.arg_names.index(n),): value for n, value in constants.items()}, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                              options={"num_warps": warps, "num_stages": stages})
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    cubin = Path(os.environ["TRITON_CACHE_DIR"]) / f"{name}.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    report = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True)
    used = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", report.stdout + report.stderr)
    return int(used[1]), int(used[2]) + int(used[4]), compiled.metadata.shared


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_kernel_compiles_and_keeps_to_registers(arch, tmp_path):
    """A block size too large compiles all the same and keeps what does not fit in memory: ten
    times slower, and nothing says so."""
    env = {k: v for k, v in os.environ.items()
           if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, __file__, str(arch)], env=env, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    stacks = re.findall(r"^sm_\d+ (\w+).* stack +(\d+)", done.stdout, re.M)
    assert len(stacks) == len(KERNELS)
    assert all(stack == "0" for _, stack in stacks), f"these spill:\n{done.stdout}"
    listed = {name for name, *_ in KERNELS}
    assert listed == {name for name in [*vars(kernels), *vars(parity)]
                      if name.endswith("_kernel")}, "a kernel is not in the list of this test"


def test_interpreted_kernels_equal_their_twins():
    checks_interpreted(__file__)


# -----------------------------------------------------------------------------
# interpreted


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def grads(outputs, inputs, seed=5):
    return torch.autograd.grad(outputs, inputs,
                               [rand(*o.shape, seed=seed + i) for i, o in enumerate(outputs)])


def no_worse(kernel, twin, exact):
    """The kernel's error against float64 is at most twice the twin's in fp32, and a few roundings."""
    for a, b, e in zip(kernel, twin, exact):
        a, b, e = a.detach(), b.detach(), e.detach()
        assert a.shape == e.shape and a.isfinite().all()
        unit = 4e-7 * float(e.abs().max())
        assert float((a - e).abs().max()) <= 2 * float((b - e).abs().max()) + unit


def plain_logprob(hidden, weight, ids, temperature):
    logp = (hidden @ weight.t() / temperature).log_softmax(1)
    return logp.gather(1, ids), -(logp.exp() * logp).sum(1)


@pytest.fixture(autouse=True)
def kernels_whatever_they_compute(monkeypatch):
    """The picker would drop a wrong kernel and quietly compare the twin with itself."""
    if backend.INTERPRET:
        monkeypatch.setattr(backend, "picks", {("decode", "cpu"): "triton",
                                               ("fused", "cpu"): "triton", ("train", "cpu"): "torch"})


@pytest.mark.parametrize("N, D, V, K, temperature, tile",
                         [(1, 16, 5, 1, 1.0, 1 << 23), (3, 8, 2049, 3, 0.7, 1 << 23),
                          (5, 24, 2500, 1, 1.3, 1024), (2, 16, 1030, 17, 1.0, 1024)])
def check_logprob(N, D, V, K, temperature, tile, monkeypatch):
    """One row; a vocabulary one past a block; several tiles, the last one narrow; an id named
    twice in a row, in and out of a tile."""
    monkeypatch.setattr(kernels, "FORWARD_TILE", tile)
    monkeypatch.setattr(kernels, "BACKWARD_TILE", tile)
    hidden, weight = 3 * rand(N, D), rand(V, D)
    ids = torch.randint(V, (N, K), generator=torch.Generator().manual_seed(K))
    ids[0, -1], ids[-1, 0] = ids[0, 0], V - 1

    def outcome(apply, dtype):
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()]
        logp, entropy = apply(*leaves, ids, temperature)
        g = [rand(N, K).to(dtype), rand(N).to(dtype)]
        return [logp, entropy, *torch.autograd.grad((logp, entropy), leaves, g)]

    exact = outcome(kernels._LogprobAt.apply, torch.float64)
    no_worse(outcome(kernels._LogprobFused.apply, torch.float32),
             outcome(plain_logprob, torch.float32), exact)
    assert torch.equal(kernels.linear_logprob_at(hidden, weight, ids, temperature),
                       # the public name goes to the kernel
                       kernels._LogprobFused.apply(hidden, weight, ids, temperature)[0])


def check_logprob_without_a_gradient_of_the_entropy_or_of_the_weight():
    hidden, weight = rand(3, 8).requires_grad_(), rand(50, 8)
    targets = torch.tensor([0, 49, 7])
    logp, _ = kernels.linear_logprob(hidden, weight, targets)
    (g,) = torch.autograd.grad(logp.sum(), hidden)
    want = torch.autograd.grad((hidden @ weight.t()).log_softmax(-1).gather(1, targets[:, None]).sum(),
                               hidden)[0]
    torch.testing.assert_close(g, want)


@pytest.mark.parametrize("hd, H, KV, page, splits", [(16, 1, 1, 4, 1), (64, 2, 2, 8, 2), (128, 8, 1, 16, 4),
                                                     (16, 6, 2, 4, 8), (24, 3, 1, 4, 1)])
def check_decode(hd, H, KV, page, splits):
    """Lengths on both sides of every page edge and of every slice edge; a dead row; pages in any
    order; a group of 3, a head of 24."""
    lengths = torch.tensor([0, 1, page - 1, page, page + 1, 4 * page - 1, 0, 17, 4 * page - 3],
                           dtype=torch.int32).clamp(max=4 * page - 1)
    if hd == 64:          # past the least slice of 256 keys, so that several slices have work
        page, lengths = 160, torch.tensor([255, 256, 257, 511, 512, 513, 600], dtype=torch.int32)
    B = len(lengths)
    table = torch.randperm(B * 4, generator=torch.Generator().manual_seed(hd)).int().view(B, 4) + 1
    if hd != 64:
        table[6] = 0                                             # the dead row's page, nobody else's
    pools = rand(B * 4 + 1, page, KV, hd, seed=1), rand(B * 4 + 1, page, KV, hd, seed=2)
    qkv = rand(B, H + 2 * KV, hd)
    q, k, v = qkv.split((H, KV, KV), dim=1)  # slices of one projection, as the model has them

    def outcome(run, dtype):
        pages = [x.to(dtype) for x in pools]
        return [run(q.to(dtype), k.to(dtype), v.to(dtype), *pages, table, lengths), *pages]

    def sliced(*args):
        return kernels._triton_decode(*args, splits=splits)

    public = outcome(kernels.decode_attention, torch.float32)    # its own choice of slices
    twin = outcome(kernels.decode_attention_torch, torch.float32)
    exact = outcome(kernels.decode_attention_torch, torch.float64)
    no_worse(outcome(sliced, torch.float32), twin, exact)
    no_worse(public, twin, exact)
    assert torch.equal(public[1], twin[1]) and torch.equal(public[2], twin[2])


@pytest.mark.parametrize("T, H, KV, hd, norm",
                         [(1, 1, 1, 16, True), (7, 8, 1, 64, True), (5, 4, 2, 128, True),
                          (3, 3, 3, 24, True), (4, 4, 2, 16, False)])
def check_qk_norm_rope(T, H, KV, hd, norm):
    qkv, weights = rand(T, H + 2 * KV, hd), [1 + 0.3 * rand(hd, seed=s) for s in (1, 2)]
    angle = rand(T, hd // 2) * 3

    def outcome(run, dtype):
        x = qkv.to(dtype).requires_grad_()
        q, k, _ = x.split((H, KV, KV), dim=1)
        w = [w.to(dtype).requires_grad_() for w in weights] if norm else [None, None]
        out = run(q, k, *w, angle.cos(), angle.sin(), 1e-6)
        return [*out, *torch.autograd.grad(out, [x, *w] if norm else [x],
                                           [rand(*o.shape, seed=9).to(dtype) for o in out])]

    twin = kernels.qk_norm_rope_torch
    no_worse(outcome(kernels.qk_norm_rope, torch.float32), outcome(twin, torch.float32),
             outcome(twin, torch.float64))


@pytest.mark.parametrize("T, width", [(1, 1), (3, 1025), (4, 64)])
def check_swiglu(T, width):
    def outcome(run, dtype):
        x = (3 * rand(T, 2 * width)).to(dtype).requires_grad_()
        out = run(x)
        return [out, *torch.autograd.grad(out, x, rand(*out.shape).to(dtype))]
    twin = kernels.swiglu_torch
    no_worse(outcome(kernels.swiglu, torch.float32), outcome(twin, torch.float32),
             outcome(twin, torch.float64))


def check_uniform_is_the_same_bits():
    """The twin runs in this process too: by hand, with the function both are made from."""
    words = [torch.randint(-2**62, 2**62, (300,), generator=torch.Generator().manual_seed(s))
             for s in range(4)]
    got = kernels.uniform(2**40 + 7, *words)
    h = torch.full((), 0x9E3779B9)
    for w in (torch.tensor(2**40 + 7), *words):
        h = kernels._mix(h, w)
    assert torch.equal(got, (h >> 8).float() / 2**24)
    assert kernels.uniform(1, 2, 3, 4, 5).shape == ()
    square = kernels.uniform(1, 2, words[0][:3, None], words[1][:5], 0)
    assert square.shape == (3, 5) and square[2, 4] == kernels.uniform(1, 2, words[0][2], words[1][4], 0)


@pytest.mark.parametrize("V, piece", [(1, 8192), (2, 8192), (65, 16), (65, 8192), (4097, 1024)])
def check_draw(V, piece, monkeypatch):
    """Greedy, plain, top-k, top-p and both, each row its own; ties everywhere (logits on a coarse
    grid), an excluded token (-inf). In one slice and in several: the last one of a single token,
    one of excluded tokens alone."""
    monkeypatch.setattr(kernels, "DRAW_SLICE", piece)
    N = 14
    logits = (rand(N, V) * 6).round() / 3
    if V > 2:
        logits[:, 1] = -float("inf")
    if piece < V:
        logits[:, piece : 2 * piece] = -float("inf")
    u = torch.rand(N, generator=torch.Generator().manual_seed(V))
    if V > 4096:
        logits[3, -1] = logits[3].max()  # the greedy row's maximum again, in the second block
    if V < 100:                          # of many unlikely last tokens, rounding may choose another
        u[0], u[1], u[2] = 0.0, 1 - 2**-24, 1 - 2**-24
    temperature = torch.tensor([1, 1, 0.5, 0, 0, 0.7, 1, 1, 1, 1, 1, 1.5, 1, 0])
    top_k = torch.tensor([0, 0, 0, 0, 3, 1, 2, 3, 0, 0, 0, 5, 40, 2])
    top_p = torch.tensor([1, 1, 1, 1, 0.5, 1, 1, 1, 0.0, 0.3, 0.9, 0.8, 0.95, 0.2])
    for k, p in ((None, None), (top_k, None), (None, top_p), (top_k, top_p)):
        got = kernels.draw(logits, u, temperature, k, p)
        want = kernels.draw_torch(logits, u, temperature, k, p)
        assert got[0].tolist() == want[0].tolist(), (k, p)
        torch.testing.assert_close(got[1], want[1], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(got[2], want[2], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("piece", [16, 8192])
def check_a_row_that_is_not_finite_shows_as_nan_and_draws_a_token_that_exists(piece, monkeypatch):
    """The sampler asks only whether a log-prob is nan; a token outside the vocabulary would be an
    illegal memory access one step later."""
    monkeypatch.setattr(kernels, "DRAW_SLICE", piece)
    logits = rand(4, 70)
    logits[0, 3], logits[1, 69], logits[2] = float("nan"), float("inf"), -float("inf")
    rows = torch.tensor([0.5, 0.99, 0.0, 0.5]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    for more in ((), (torch.full((4,), 5), torch.full((4,), 0.9))):
        for run in kernels.draw, kernels.draw_torch:
            token, logp, _ = run(logits, *rows, *more)
            assert logp.isnan().tolist() == [True, True, True, False] and 0 <= int(token.min())
            assert int(token.max()) < 70


def check_the_picker_takes_triton_once_it_has_proved_itself():
    backend.picks.clear()
    assert [kernels.picked(what, "cpu")
            for what in ("train", "decode", "fused")] == ["torch", "triton", "triton"]


def check_bad_input_is_named_before_a_launch():
    with pytest.raises(AssertionError, match=r"ids \(2, 1\) holds 0 .. 9, allowed are 0 .. 4"):
        kernels.linear_logprob(rand(2, 8), rand(5, 8), torch.tensor([0, 9]))
    with pytest.raises(AssertionError, match=r"weight is \(5, 7\), expected \(5, 8\)"):
        kernels.linear_logprob(rand(2, 8), rand(5, 7), torch.tensor([0, 1]))
    with pytest.raises(AssertionError, match="weight is torch.float64"):
        kernels.linear_logprob(rand(2, 8), rand(5, 8).double(), torch.tensor([0, 1]))
    with pytest.raises(AssertionError, match="gate_up"):
        kernels.swiglu(rand(4, 6).t())
    with pytest.raises(AssertionError, match="heads must touch"):
        kernels.qk_norm_rope(rand(2, 6, 8)[:, ::2], rand(2, 3, 8), None, None, rand(2, 4), rand(2, 4), 1e-6)
    q, pages = rand(1, 2, 8), rand(3, 4, 1, 8)
    table, lengths = torch.tensor([[3]], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    with pytest.raises(AssertionError, match=r"block_table \(1, 1\) holds 3 .. 3, allowed are 0 .. 2"):
        kernels.decode_attention(q, q[:, :1], q[:, :1], pages, pages, table, lengths)
    with pytest.raises(AssertionError, match="lengths"):
        kernels.decode_attention(q, q[:, :1], q[:, :1], pages, pages, table - 1, lengths + 3)
    with pytest.raises(AssertionError, match="lengths is torch.int64"):
        kernels.decode_attention(q, q[:, :1], q[:, :1], pages, pages, table - 1, lengths.long())


if __name__ == "__main__":
    import tempfile
    os.environ.setdefault("TRITON_CACHE_DIR", tempfile.mkdtemp())
    for arch in sys.argv[1:]:
        for name, types, constants, warps, stages in KERNELS:
            registers, stack, shared = resources(name, types, constants, warps, stages, int(arch))
            print(f"sm_{arch} {name:24} {warps} warps: registers {registers:3} "
                  f"stack {stack:3} shared {shared:6}   {constants}", flush=True)
