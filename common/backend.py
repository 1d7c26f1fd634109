"""
common/backend.py: who runs what, and how it proves itself.

A step of the model may have several backends: a kernel of ours, a package, and always plain torch,
its twin, which is the definition. Whoever owns a step hands over the candidates, best first, and a
function that probes one; this file picks. It also holds what packages are called with, and what each
step is probed with. A wheel built for another card imports all the same and returns noise, or
nothing; so no candidate is used before it has proved itself on this machine, forward and backward.

    choose("decode", "cuda", ["flash", "triton"], probe)    -> "triton", the first that is right
    probe(what, name, kind, low, dtype)    -> what that backend makes of tiny random numbers which
                                           `low` can hold, computed in `dtype`: tensors, gradients
                                           among them

    NANORL_ATTENTION=torch|varlen|flash ...    forces one
    NANORL_CHECK=1 ...                         range checks on the GPU too (slow)

This file imports nothing of ours.
"""

import functools
import importlib.util
import inspect
import os
import types
from itertools import accumulate, pairwise

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

try:
    import triton
    import triton.language as tl
except ImportError:  # a Mac: the twins run and the kernels are only text
    triton, tl = None, types.SimpleNamespace(constexpr=None)

jit = triton.jit if triton else lambda kernel: kernel
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own: kernels run in numpy on the CPU
CHECK = os.environ.get("NANORL_CHECK") == "1"

# what NANORL_ATTENTION forces, and what then runs which kind of attention
FORCED = {
    "flash": {"train": "flash", "decode": "flash"},
    "varlen": {"train": "varlen", "decode": "triton"},
    "torch": {"train": "torch", "decode": "torch"},
}
picks = {}  # (what, kind of device) -> name

# -----------------------------------------------------------------------------
# the pick


def chosen(what, kind):
    """What was picked before, or None."""
    return picks.get((what, kind))


def candidates(what, kind):
    """What could run on this kind of device, best first."""
    flash = ["flash"] if kind == "cuda" and importlib.util.find_spec("flash_attn") else []
    if what == "train":
        return flash + (["varlen"] if kind == "cuda" else [])
    ours = ["triton"] if triton and (kind == "cuda" or INTERPRET) else []
    return flash + ours if what == "decode" else ours


def choose(what, kind, candidates, probe):
    """-> the first of the candidates that proves itself on this kind of device ("cuda", "cpu" or
    "mps"), else "torch". One that does not is dropped, with a printed line; or refused, if it was
    forced."""
    if (what, kind) in picks:
        return picks[what, kind]
    forced = os.environ.get("NANORL_ATTENTION", "")
    if what not in FORCED["torch"]:
        forced = ""
    if forced and forced not in FORCED:
        raise ValueError(f"NANORL_ATTENTION={forced} is not known; known: {', '.join(FORCED)}")

    picked = "torch"
    for name in [FORCED[forced][what]] if forced else candidates:
        if name == "torch":
            break
        try:
            prove(what, name, kind, probe)
        except Exception as why:  # whatever a foreign package raises on this machine
            if forced:
                raise ValueError(f"NANORL_ATTENTION={forced}: {name} "
                                 f"for {what} on {kind} failed its check: {why}") from why
            reason = " ".join(str(why).split())[:200]
            print(f"backend: {name} for {what} on {kind} dropped: {type(why).__name__}: {reason}", flush=True)
        else:
            picked = name
            break
    picks[what, kind] = picked
    return picked


def prove(what, name, kind, probe):
    """Its error is at most twice the torch twin's in the same precision, and the result's rounding."""
    low = torch.bfloat16 if kind == "cuda" else torch.float32
    with torch.inference_mode(False), torch.enable_grad():
        ours = probe(what, name, kind, low, low)
        with sdpa_kernel(SDPBackend.MATH):  # the twin is the same on every card
            twin = probe(what, "torch", kind, low, low)
            exact = probe(what, "torch", kind, low, torch.float32)
    for x, plain, right in zip(ours, twin, exact):
        error = float((x - right).abs().max())
        rounding = torch.finfo(low).eps / 2 * float(right.abs().max())
        allowed = 2 * float((plain - right).abs().max()) + rounding + 1e-3
        assert error <= allowed, f"its error is {error:.2g}, at most {allowed:.2g} is right"


def report(kind, names):
    """In words, for the log: what runs which step, and the versions. names: step -> backend."""
    versions = {"torch": torch.__version__, "triton": getattr(triton, "__version__", "no")}
    if "flash" in names.values():
        versions["flash_attn"] = __import__("flash_attn").__version__
    runs = ", ".join(f"{what} {name}" for what, name in names.items())
    return f"{runs} on {kind} ({', '.join(f'{package} {version}' for package, version in versions.items())})"


# -----------------------------------------------------------------------------
# attention by a package. Both ragged calls keep segments apart by themselves, skip what is masked, share
# keys among query heads and align the causal mask to the bottom right: with P more keys than queries,
# query i sees P + i + 1 keys. They take half precision only. A torch without this switch always shares
# key heads.


def flash(q, k, v, cu_q, cu_k, max_q, max_k):
    from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)


def varlen(q, k, v, cu_q, cu_k, max_q, max_k):
    call, shared = _varlen_attn()
    return call(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), **shared)


@functools.cache
def _varlen_attn():
    """-> torch's function, and what tells it that heads share keys, where it must be told"""
    from torch.nn.attention.varlen import varlen_attn  # a second of every start, which a CPU can do without
    told = "enable_gqa" in inspect.signature(varlen_attn).parameters
    return varlen_attn, {"enable_gqa": True} if told else {}


def flash_decode(q, k_new, v_new, k_pages, v_pages, block_table, lengths):
    from flash_attn import flash_attn_with_kvcache
    o = flash_attn_with_kvcache(
        q.unsqueeze(1), k_pages, v_pages,
        k=k_new.unsqueeze(1), v=v_new.unsqueeze(1),
        cache_seqlens=lengths, block_table=block_table, causal=True,
        num_splits=1)  # its own choice of splits has given nan
    return o.squeeze(1)


def longest(cu_seqlens):
    return max((b - a for a, b in pairwise(cu_seqlens)), default=0)


def packages_take(q):
    """Half precision, and heads of 8, 16, ... 256."""
    half = q.dtype in (torch.bfloat16, torch.float16) or not q.is_cuda
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= 256


class Gather(torch.autograd.Function):
    """x[take], rows used many times. A prompt's keys collect the gradients of all its responses,
    summed in fp32 and rounded once."""

    @staticmethod
    def forward(ctx, x, take):
        ctx.save_for_backward(take)
        ctx.rows = x.shape[0]
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx, grad):
        (take,) = ctx.saved_tensors
        total = torch.zeros(ctx.rows, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return total.index_add_(0, take, grad.float()).to(grad.dtype), None


def in_one_call(run, cu_q, ranges):
    """-> attend(). Segment i's queries see ranges[i] of the keys, gathered behind each other: extra
    copies of a prompt's keys, but one exact softmax. (Attending to prompt and response apart and
    merging by log-sum-exp copies nothing, and torch's backward would silently ignore the gradient
    that flows through it.)"""
    cu_k = [0, *accumulate(sum(b - a for a, b in seen) for seen in ranges)]
    pieces = [piece for seen in ranges for piece in seen]

    @functools.cache
    def plan(device):
        take = None
        if pieces != list(pairwise(cu_k)):
            take = to_device(torch.cat([torch.arange(a, b) for a, b in pieces]), torch.long, device)
        cu = [to_device(x, torch.int32, device) for x in (cu_q, cu_k)]
        return take, *cu, longest(cu_q), longest(cu_k)

    def attend(layer, q, k, v):
        if len(q) == 0:
            return torch.zeros_like(q)
        take, *ends = plan(q.device)
        if take is not None:
            k, v = Gather.apply(k, take), Gather.apply(v, take)
        return run(q, k, v, *ends)

    return attend


# -----------------------------------------------------------------------------
# what a step is asked with: tiny random numbers that `low` can hold, computed in `dtype`. -> results, and
# gradients where there are any


PROBED_ROW = [0, 5, 12, 15, 16], 7, [-1, 0, 1, -1]  # segments with a parent, a grandparent and without


def _numbers(kind, low, dtype, gradient):
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=g).to(kind, low).to(dtype).requires_grad_(gradient)

    return rand


def _with_gradients(out, leaves, rand):
    grads = torch.autograd.grad(out, leaves, [rand(*o.shape).to(o.dtype) for o in out])
    return [x.detach().float() for x in (*out, *grads)]


def probe_train(attend, kind, low, dtype):
    rand = _numbers(kind, low, dtype, True)
    leaves = rand(16, 4, 64), rand(16, 2, 64), rand(16, 2, 64)
    return _with_gradients([attend(0, *leaves)], leaves, rand)


def probe_decode(run, kind, low, dtype):
    """Lengths at both edges of a page; the pages must hold the new keys."""
    rand = _numbers(kind, low, dtype, False)
    lengths = torch.tensor([0, 255, 256, 300], dtype=torch.int32, device=kind)
    table = torch.tensor([[3, 0], [1, 2], [5, 4], [7, 6]], dtype=torch.int32, device=kind)
    pages = rand(8, 256, 2, 64), rand(8, 256, 2, 64)
    o = run(rand(4, 4, 64), rand(4, 2, 64), rand(4, 2, 64), *pages, table, lengths)
    return [x.float() for x in (o, *pages)]


def probe_fused(steps, kind, low, dtype):
    logprob, norm_rope, act = steps
    rand = _numbers(kind, low, dtype, True)
    leaves = [rand(*shape) for shape in ((5, 64), (300, 64), (5, 4, 64), (64,), (64,), (5, 64))]
    hidden, weight, qkv, q_weight, k_weight, x = leaves
    ids = torch.arange(10, device=kind).view(5, 2)
    angle = torch.arange(160, dtype=torch.float32, device=kind).view(5, 32)
    q, k = qkv[:, :2], qkv[:, 2:3]
    out = [*logprob(hidden, weight, ids, 0.7), act(x),
           *norm_rope(q, k, q_weight, k_weight, angle.cos(), angle.sin(), 1e-6)]
    return _with_gradients(out, leaves, rand)


PROBES = {"train": probe_train, "decode": probe_decode, "fused": probe_fused}

# -----------------------------------------------------------------------------
# what a kernel is given


def expect(name, x, shape, dtypes=None):
    """Shapes and dtypes cost nothing to check; a wrong pointer costs the whole process."""
    assert tuple(x.shape) == tuple(shape), f"{name} is {tuple(x.shape)}, expected {tuple(shape)}"
    assert dtypes is None or x.dtype in dtypes, (
        f"{name} is {x.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
    contiguous = x.stride(-1) == 1 or x.shape[-1] < 2 or x.numel() == 0
    assert contiguous, f"{name} {tuple(x.shape)}, stride {x.stride()}: rows not contiguous"


def expect_dense(name, x, shape, dtypes=None):
    expect(name, x, shape, dtypes)
    assert x.is_contiguous(), f"{name} {tuple(x.shape)}, stride {x.stride()}: not contiguous"


def expect_heads(name, x, shape, dtypes=None):
    """Slices of one projection: any stride between tokens."""
    expect(name, x, shape, dtypes)
    assert x.stride(1) == x.shape[2] or x.shape[1] == 1, (
        f"{name} {tuple(x.shape)}, stride {x.stride()}: a token's heads must touch")


def expect_ids(name, ids, n):
    """0 <= ids < n. Reading a number back makes the GPU wait, so it is done there only with
    NANORL_CHECK=1."""
    if ids.numel() and (CHECK or ids.device.type == "cpu"):
        low, high = int(ids.min()), int(ids.max())
        assert 0 <= low and high < n, (
            f"{name} {tuple(ids.shape)} holds {low} .. {high}, allowed are 0 .. {n - 1}")


def to_device(numbers, dtype, device):
    """A list, an array or a tensor on the device, without making the GPU wait: from pinned memory,
    copied when the stream gets there."""
    x = torch.as_tensor(numbers, dtype=dtype)
    return (x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda"
            else x.to(device))
