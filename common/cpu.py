"""
common/cpu.py: every trick that exists only because a CPU is slow.

The promise: nothing here changes a result beyond rounding, and without it everything runs, slower.
The definitions stand in kernels.py and train_gpt.py; each calls its stand-in here by one line.
NANORL_CPU_TRICKS=0 turns all of it off, and so does `cpu.ON = False` within a process. With it goes
the sampler's promise to the bit (`Sampler(exact=True)`), which rests on how oneDNN sums a row: then
log-probs agree to 1e-5, and tokens until two candidates tie, as on a GPU.

    products          matmul_t, linear, weight_gradient, padded: oneDNN for fp32 matrices, and the
                      shapes that it likes
    attention         packed_attention: segments of about one length share a call
    training          trained_norm, trained_norm_rope: their gradients by hand, in half the operations
    decoding          rms_norm, qk_norm_rope, swiglu, draw: the same, in fewer operations
    a row by itself   lone_row: the model in numpy, for one sequence on one thread

What repeats the arithmetic of a definition would not see a change to it: you edit the norm, the
trainer follows, and the sampler keeps the old one. So every such copy proves itself on random numbers
against the definition as it is now, and is dropped with one printed line if they disagree.

This file imports nothing of ours: what it needs to know of the model is handed in.
"""

import copy
import functools
import os
from contextlib import contextmanager
from dataclasses import is_dataclass
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

ON = os.environ.get("NANORL_CPU_TRICKS", "1") != "0"


def fp32(x):
    """May this tensor take the tricks for fp32?"""
    return ON and x.is_cpu and x.dtype == torch.float32


def decoding(x):
    """Sampling on a CPU, where the number of operations is what a step costs. The number of rows must
    not matter, or a row's rounding would depend on the others."""
    # grad first: a compiler knows the answer, and cuts its graph at the question after it
    return not torch.is_grad_enabled() and torch.is_inference_mode_enabled() and fp32(x)


def training(x):
    """Not inside torch.compile, which fuses the definitions itself."""
    return torch.is_grad_enabled() and fp32(x) and not torch.compiler.is_compiling()


# -----------------------------------------------------------------------------
# the proof of a function that repeats another one's arithmetic


AGREE = 1e-4  # of numbers around 1: far above rounding, far below a change
_verdicts = {}  # (trick, definition, ...) -> do they agree?


def stands_for(trick, definition, *more):
    """Does the trick compute what the definition does? Asked once per pair, so anew for a definition
    that was replaced. more: what only the trick takes."""
    pair = trick, definition, *more
    if pair not in _verdicts:
        problem = _difference(trick, definition, more)
        if problem:
            print(f"cpu: its {trick.__name__} is not used, it differs from {definition.__name__}: {problem}",
                  flush=True)
        _verdicts[pair] = not problem
    return _verdicts[pair]


@torch.inference_mode(False)
@torch.no_grad()
def _difference(trick, definition, more):
    """-> in words, how the two differ on the trick's inputs; or None."""
    try:
        args = PROBES[trick.__name__](_random())
        pairs = zip(_tensors(trick(*args, *more)), _tensors(definition(*args)), strict=True)
        error = max(float((a - b).abs().max()) for a, b in pairs)
    except Exception as why:  # a definition that takes or gives something else
        return f"{type(why).__name__}: {why}"
    return None if error <= AGREE else f"by up to {error:.2g} on random numbers"


def _random():
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=g)


def _tensors(result):
    if callable(result):  # attend()
        rand = _random()
        result = result(0, rand(28, 4, 16), rand(28, 2, 16), rand(28, 2, 16))
    return [result] if torch.is_tensor(result) else list(result)


def _probe_qk_norm_rope(rand):
    shapes = (6, 4, 16), (6, 2, 16), (16,), (16,), (6, 8), (6, 8)
    return *(rand(*shape) for shape in shapes), 1e-6


def _probe_draw(rand):
    """All temperatures and both truncations."""
    uniform = torch.linspace(0.01, 0.99, 6)
    temperature = torch.tensor([0.0, 1.0, 0.7, 1.3, 1.0, 0.0])
    top_k = torch.tensor([0, 0, 5, 0, 3, 0])
    top_p = torch.tensor([1.0, 0.9, 1.0, 1.0, 0.8, 0.5])
    return rand(6, 20), uniform, temperature, top_k, top_p


PROBES = {  # what each trick is asked with
    # segments with a parent, a grandparent and without, two of which share a bucket
    "packed_attention": lambda rand: ([0, 5, 12, 15, 16, 22, 28], 7, [-1, 0, 1, -1, -1, -1]),
    "rms_norm": lambda rand: (rand(6, 24) * 1e-2, rand(24), 1e-6),  # near the origin, where eps counts
    "qk_norm_rope": _probe_qk_norm_rope,
    "trained_norm": lambda rand: (rand(6, 24) * 1e-2, rand(24), 1e-6),
    "trained_norm_rope": _probe_qk_norm_rope,
    "swiglu": lambda rand: (rand(6, 24),),
    "draw": _probe_draw,
}

# -----------------------------------------------------------------------------
# products


ONEDNN = torch.backends.mkldnn.is_available()
# the overload: finding it costs as much as an addition
PRODUCT = torch.ops.mkldnn._linear_pointwise.default if ONEDNN else None
# With fewer rows of x the BLAS starts faster than oneDNN, but it reads LARGE weights slowly.
FEW = 4
LARGE = 1 << 18
# numpy's BLAS multiplies one row up to twice as fast as both if it was told to keep to one thread; its
# threads and torch's would spin on each other's cores, and a step take ten times as long.
ONE_THREAD = os.environ.get("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")) == "1"
# With this many rows oneDNN computes w x^T a fifth faster than x w^T, and gets the same bits.
TURNED = 16, 32, 48, 64


def matmul_t(x, w):
    """x w^T. Two fp32 matrices on a CPU go to oneDNN: the BLAS that torch links takes its AVX2 path on
    AMD, and oneDNN is 1.3 to 2.4 times as fast there. It also sums each row in the same order, however
    many there are. No autograd: see linear."""
    if fp32(x) and w.dtype == torch.float32:
        if ONE_THREAD and len(x) == 1 and torch.is_inference_mode_enabled():
            return torch.from_numpy(x.numpy() @ w.detach().numpy().T)
        if ONEDNN and (len(x) >= FEW or w.numel() >= LARGE):
            return PRODUCT(x, w, None, "none", [], "")
    return F.linear(x, w)


def weight_gradient(grad_TN, x_TD):
    """grad^T x, the smaller side first: oneDNN is up to twice as fast that way round."""
    if grad_TN.shape[1] > x_TD.shape[1]:
        return matmul_t(x_TD.t(), grad_TN.t()).t()
    return matmul_t(grad_TN.t(), x_TD.t())


class Linear(torch.autograd.Function):
    """F.linear, its three products by matmul_t."""

    @staticmethod
    def forward(ctx, x_TD, weight, bias):
        ctx.save_for_backward(x_TD, weight)
        y = matmul_t(x_TD, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, grad):
        x_TD, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (matmul_t(grad, weight.t()) if need_x else None,
                weight_gradient(grad, x_TD) if need_weight else None,
                grad.sum(0) if need_bias else None)


def linear(x, weight, bias=None, strided=False):
    """kernels.linear for fp32 on a CPU."""
    if bias is None and decoding(x):
        return matmul_t(weight, x).t() if strided and len(x) in TURNED else matmul_t(x, weight)
    if x.ndim != 2 or (x.shape[0] < FEW and torch.is_grad_enabled()):
        return F.linear(x, weight, bias)
    return Linear.apply(x, weight, bias)


def spare_rows(rows, like):
    """How many rows to add so that oneDNN has met their number before: compiling a product for its
    shape takes longer than the product."""
    return -rows % 64 if ONEDNN and rows > 256 and fp32(like) else 0


def padded(x_TD, positions_T, attend):
    """The blocks' inputs with spare rows of zeros at the end, which no sequence sees."""
    T = len(x_TD)
    spare = spare_rows(T, x_TD)
    if not spare:
        return x_TD, positions_T, attend

    def attend_real(layer, q, k, v):
        return F.pad(attend(layer, q[:T], k[:T], v[:T]), (0, 0, 0, 0, 0, spare))

    return F.pad(x_TD, (0, 0, 0, spare)), F.pad(positions_T, (0, spare)), attend_real


@contextmanager
def one_thread():
    """Around the sum of a large tensor: several threads would share it out, and round by how many they
    are. Everything else here gives the same bits with any number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


# -----------------------------------------------------------------------------
# packed attention in few calls, where plain torch attends (the definition is a call per segment)
#
#   lengths     6 3 5 6     buckets of 6, 6, 6 and of 3: two calls
#   one call    aaaaaa      a segment shorter than its bucket's longest is padded at the END with copies
#               cccccc      of its last row, which causal attention never shows to a real row
#               ddddd.


class Take(torch.autograd.Function):
    """x[take] where every row of x is used once and the rest of `take` is padding without gradient, so
    that the backward is a gather too: several times faster on a CPU than index_add."""

    @staticmethod
    def forward(ctx, x, take, back):
        ctx.save_for_backward(back)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class PutBack(torch.autograd.Function):
    """The inverse of Take: drops the padding, whose gradient is exactly zero."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.save_for_backward(back)
        ctx.rows = x.shape[0]
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, back, grad), None


def bucket(n):
    """n rounded up by at most 1/8: lengths that share a bucket share one attention call."""
    step = max(8, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


def plan_buckets(cu_seqlens, parent, device):
    """Segments of one prefix length and one bucket share a call. -> calls [(B, rows of q, of k, mask)];
    take_q, take_k: the rows of all calls; back: where each row of the packed row went."""
    members = {}
    prefixes = []  # the rows of each segment's ancestors, oldest first
    lengths = [end - start for start, end in pairwise(cu_seqlens)]
    for i, length in enumerate(lengths):
        p = parent[i] if parent else -1
        prefixes.append(prefixes[p] + [*range(cu_seqlens[p], cu_seqlens[p + 1])] if p >= 0 else [])
        if length:
            members.setdefault((len(prefixes[i]), bucket(length)), []).append(i)

    calls = []
    take_q = []
    take_k = []
    back = [0] * cu_seqlens[-1]
    for (P, _), segments in members.items():
        L = max(lengths[i] for i in segments)
        for i in segments:
            start, end = cu_seqlens[i], cu_seqlens[i + 1]
            own = [*range(start, end)] + [end - 1] * (L - lengths[i])
            back[start:end] = range(len(take_q), len(take_q) + lengths[i])
            take_q += own
            take_k += prefixes[i] + own
        mask = dict(is_causal=True)
        if P:  # (L, P+L): the prefix whole, its own keys causally
            mask = dict(attn_mask=torch.ones(L, P + L, dtype=torch.bool, device=device).tril(P))
        B = len(segments)
        calls.append((B, B * L, B * (P + L), mask))

    if list(range(cu_seqlens[-1])) == take_q == take_k:
        return calls, None, None, None
    tensor = functools.partial(torch.tensor, device=device)
    return calls, tensor(take_q), None if take_k == take_q else tensor(take_k), tensor(back)


def packed_attention(cu_seqlens, max_len, parent=None):
    """kernels.packed_attention_torch in fewer calls."""
    @functools.cache
    def plan(device):
        return plan_buckets(cu_seqlens, parent, device)

    def attend(layer, q, k, v):
        calls, take_q, take_k, back = plan(q.device)
        if not calls:
            return torch.zeros_like(q)
        if take_q is not None:
            if take_k is None:
                k = Take.apply(k, take_q, back)
                v = Take.apply(v, take_q, back)
            else:  # a parent's keys are used by many: the general backward
                k = k.index_select(0, take_k)
                v = v.index_select(0, take_k)
            q = Take.apply(q, take_q, back)
        sizes, q_rows, k_rows, masks = zip(*calls)
        outs = []
        for B, mask, *rows in zip(sizes, masks, q.split(q_rows), k.split(k_rows), v.split(k_rows)):
            q_BHLD, k_BHLD, v_BHLD = (x.view(B, -1, *x.shape[1:]).transpose(1, 2) for x in rows)
            shared = q.shape[1] != k.shape[1]
            o = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, enable_gqa=shared, **mask)
            outs.append(o.transpose(1, 2).flatten(0, 1))
        o = outs[0] if len(outs) == 1 else torch.cat(outs)
        return o if back is None else PutBack.apply(o, back)

    return attend


def used_pages(block_table, lengths, page):
    """The columns of a table of pages that some row uses. A GPU would wait for their number."""
    used = int(lengths.max()) // page + 1 if ON and block_table.is_cpu else None
    return block_table[:, :used]


# -----------------------------------------------------------------------------
# the small steps of a decode step, in fewer operations


@functools.cache
def _of_width(width, eps):
    """Tensors, because a number is made into one in every call, for 1 us."""
    return torch.tensor((eps * width)**0.5), torch.tensor(width**-0.5)


def root_mean_square(x, eps):
    """sqrt(mean x^2 + eps) of each row: hypot is the root of a sum of squares."""
    epsilon, scale = _of_width(x.shape[-1], eps)
    return torch.linalg.vector_norm(x, 2, -1, True).hypot_(epsilon).mul_(scale)


def rms_norm(x, weight, eps):
    """F.rms_norm is nine small operations on a CPU."""
    return x.div(root_mean_square(x, eps)).mul_(weight)


_tables = (None, None, None, None)  # the last half tables, and what was made of them


def wide_tables(cos_T, sin_T):
    """cos and sin over the whole head, (T, 1, head_dim), the signs in sin: once per step, for all layers."""
    global _tables
    last = _tables  # read once: another thread's sampler may put its own in between
    if last[0] is not cos_T or last[1] is not sin_T:
        cos = torch.cat((cos_T, cos_T), 1).unsqueeze(1)
        sin = torch.cat((-sin_T, sin_T), 1).unsqueeze(1)
        _tables = last = cos_T, sin_T, cos, sin
    return last[2:]


class Norm(torch.autograd.Function):
    """RMSNorm of each row. F.rms_norm keeps every small step of it for the backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        size = root_mean_square(x, eps)
        y = x / size
        ctx.save_for_backward(y, size, weight)
        return y * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, size, weight = ctx.saved_tensors
        return norm_backward(grad * weight, y, size), (grad * y).flatten(0, -2).sum(0), None


def norm_backward(grad, y, size):
    """What a row gains along itself changes its size alone, which is divided away."""
    along = (grad * y).sum(-1, keepdim=True).div_(-y.shape[-1])
    return grad.addcmul(y, along).div_(size)


def trained_norm(x, weight, eps):
    return Norm.apply(x, weight, eps)


class NormRope(torch.autograd.Function):
    """RMSNorm and rotation of all heads, query and key heads together."""

    @staticmethod
    def forward(ctx, x_THd, weight_Hd, cos, sin, eps):
        size = root_mean_square(x_THd, eps)
        y = x_THd / size
        ctx.save_for_backward(y, size, weight_Hd, cos, sin)
        return turned(y * weight_Hd, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, size, weight_Hd, cos, sin = ctx.saved_tensors
        grad = turned(grad, cos, -sin)                       # back
        return norm_backward(grad * weight_Hd, y, size), (grad * y).sum(0), None, None, None


def turned(x, cos, sin):
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def trained_norm_rope(q, k, q_weight, k_weight, cos_T, sin_T, eps):
    heads = q.shape[1], k.shape[1]
    weight_Hd = torch.cat([w.expand(n, -1) for w, n in zip((q_weight, k_weight), heads)])
    x = NormRope.apply(torch.cat((q, k), 1), weight_Hd, *wide_tables(cos_T, sin_T), eps)
    return x.split_with_sizes(heads, 1)


def qk_norm_rope(q, k, q_weight, k_weight, cos_T, sin_T, eps):
    """Query and key heads together."""
    cos, sin = wide_tables(cos_T, sin_T)
    x = torch.cat((q, k), 1)  # (T, n_head + n_kv_head, head_dim)
    q, k = x.split_with_sizes((q.shape[1], k.shape[1]), 1)
    if q_weight is not None:
        x.div_(root_mean_square(x, eps))
        q.mul_(q_weight)
        k.mul_(k_weight)
    swapped = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos).addcmul_(swapped, sin)
    return q, k


def swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def draw(logits_NV, uniform_N, temperature_N, top_k_N, top_p_N, truncated, inverse_cdf):
    """kernels.draw_torch after a look at the temperatures, for which a GPU would have to wait: no
    division by 1, and no sum over tokens for rows that take the likeliest."""
    seen = set(temperature_N.tolist())
    greedy_N = temperature_N == 0
    if not seen <= {0.0, 1.0}:
        logits_NV = logits_NV / torch.where(greedy_N, 1.0, temperature_N).unsqueeze(1)
    p_NV = logits_NV.softmax(1)
    kept_NV = p_NV
    kept_N = logits_NV.new_zeros(len(logits_NV))
    if top_k_N is not None or top_p_N is not None:
        kept_NV, kept_N = truncated(p_NV, top_k_N, top_p_N)
        kept_N = torch.where(greedy_N, 0.0, kept_N)
    if seen == {0.0}:
        token_N = torch.from_numpy(logits_NV.numpy().argmax(1))  # a tenth of torch's time
    else:
        token_N = inverse_cdf(kept_NV, uniform_N)
        if 0.0 in seen:
            token_N = torch.where(greedy_N, logits_NV.argmax(1), token_N)
    return token_N, p_NV.gather(1, token_N.unsqueeze(1)).squeeze(1).log(), kept_N


class Tensors:
    """A module's tensors, NAME.weight as NAME and NAME.bias as NAME_bias, past nn.Module's __getattr__:
    ten of those take as long as one row's product. Made anew in each call: a tensor may be replaced."""

    def __init__(self, module):
        found = self.__dict__
        found["module"] = module
        for name, child in module._modules.items():
            parameters = child._parameters if child is not None else {}
            found[name] = parameters.get("weight")
            if "bias" in parameters:
                found[name + "_bias"] = parameters["bias"]

    def __getattr__(self, name):  # a norm that this model lacks: None, as the module has it
        return getattr(self.module, name)


# -----------------------------------------------------------------------------
# a row by itself: the model in numpy, which starts an operation in a quarter of torch's time, and a
# decode step of one row is two hundred small ones. numpy_row repeats what GPT.forward and Block.forward
# say and follows no change to them, so it is compared first.


_proofs = []  # (code_of(model, ...), does numpy_row agree?), the last few


def lone_row(model, keys, values, ours, attention, namespaces):
    """-> forward() of a single token: numpy_row where it agrees with the model, else the model. ours:
    the class of block that it copies. namespaces: of the modules that hold the model's code."""
    if not ON:
        return model
    code = code_of(model, namespaces)
    agrees = next((verdict for known, verdict in _proofs if same(known, code)), None)
    if agrees is None:
        problem = disproof(model, ours, attention)
        if problem:
            why = f"since the copy of it in numpy {problem}"
            print("cpu: a single row is left to the model,", why, flush=True)
        agrees = not problem
        _proofs.append((code, agrees))
        del _proofs[:-8]
    return numpy_row(model, keys, values) if agrees else model


def code_of(model, namespaces):
    """All that decides what a model computes, but for its weights: functions and constants of its
    modules, the insides of its classes, what was set on its objects. It costs half a step."""
    found = []
    for module in model.modules():
        found.append(type(module))
        found += [value for name, value in vars(module).items() if name[0] != "_"]
        found += module._forward_hooks.values()
        found += module._forward_pre_hooks.values()
    insides = [value for cls in dict.fromkeys(map(type, model.modules())) for value in _inside(cls)]
    spaces = [*namespaces, *(value.__globals__ for value in insides if hasattr(value, "__globals__"))]
    for space in {id(space): space for space in spaces}.values():
        insides += space.values()
    return found + insides


def _inside(cls):
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("torch", "builtins")]
    return [value for base in ours for value in vars(base).values()]


def same(a, b):
    """Two lists of code_of: the same objects, or equal numbers, words and configs."""
    return len(a) == len(b) and all(x is y or _equal(x, y) for x, y in zip(a, b))


def _equal(x, y):
    return type(x) is type(y) and (isinstance(x, (int, float, str)) or is_dataclass(x)) and x == y


@torch.inference_mode(False)
@torch.no_grad()
def disproof(model, ours, attention):
    """-> in words, why numpy_row is not this model; or None. Both continue a text of 12 tokens, with
    random weights: the zeros and ones that a new model begins with would hide things."""
    foreign = next((type(block).__name__ for block in model.blocks if type(block) is not ours), None)
    if foreign:
        return f"knows no block of the class {foreign}"
    g = torch.Generator().manual_seed(0)

    def random_like(p):
        x = torch.randn(p.shape, generator=g)
        x = x * p.shape[1] ** -0.5 if p.ndim == 2 else 1 + 0.3 * x
        return torch.nn.Parameter(x, requires_grad=False)

    try:
        c = model.config
        twin = copy.deepcopy(model, {id(p): random_like(p) for p in model.parameters()})
        tokens = torch.randint(c.vocab_size, (12,), generator=g)
        positions = torch.arange(12)
        hidden = twin(tokens, positions, attention([0, 12], 12))
        cache = [np.zeros((2, c.n_kv_head, 12, c.head_dim), dtype=np.float32) for _ in twin.blocks]
        forward = numpy_row(twin, [k for k, _ in cache], [v for _, v in cache])
        row = torch.cat([forward(tokens[i : i + 1], positions[i : i + 1], None) for i in range(12)])
        both = torch.stack([hidden[5:11], row[5:11]])
        logp = F.linear(both, twin.head_weight).log_softmax(-1)
        want, got = logp.gather(2, tokens[6:].view(1, 6, 1).expand(2, 6, 1))
    except Exception as why:  # whatever a changed model raises
        return f"cannot be checked: {type(why).__name__}: {why}"
    error = float((got - want).abs().max())
    return None if error <= AGREE else f"is off by {error:.2g} in its log-probs"


def _views(block):
    """The block's tensors in numpy, under the names of Tensors; None where it has none."""
    found = vars(Tensors(block))
    del found["module"]
    views = {name: None if tensor is None else tensor.detach().numpy() for name, tensor in found.items()}
    return SimpleNamespace(**{"q_norm": None, "k_norm": None} | views)


def numpy_row(model, keys, values):
    """-> forward() of a single token, on the weights where they are. keys and values: the row's, one
    (n_kv_head, capacity, head_dim) array per layer; the new token's are written there."""
    c = model.config
    heads = c.n_head + c.n_kv_head
    half = c.head_dim // 2
    layers = [_views(block) for block in model.blocks]
    embed = model.embed.weight.detach().numpy()
    norm = model.norm.weight.detach().numpy()
    inv_freq, scale = model._rope[0].numpy(), model._rope[1]

    def unit(x):
        return x / np.sqrt(np.add.reduce(x * x, -1, keepdims=True) / x.shape[-1] + c.norm_eps)

    def forward(token_1, position_1, attend):
        x_D = embed[int(token_1)]
        at = int(position_1)
        cos, sin = np.cos(at * inv_freq) * scale, np.sin(at * inv_freq) * scale
        cos, sin = np.concatenate((cos, cos)), np.concatenate((-sin, sin))  # (head_dim)
        for w, k, v in zip(layers, keys, values):
            qkv = w.qkv @ (unit(x_D) * w.attn_norm)
            if w.qkv_bias is not None:
                qkv += w.qkv_bias
            qkv = qkv.reshape(-1, c.head_dim)  # (heads, head_dim)
            qk = qkv[:heads]
            if w.q_norm is not None:
                qk = unit(qk)
                qk[: c.n_head] *= w.q_norm
                qk[c.n_head :] *= w.k_norm
            qk = qk * cos + np.concatenate((qk[:, half:], qk[:, :half]), 1) * sin
            k[:, at] = qk[c.n_head :]
            v[:, at] = qkv[heads:]
            q = qk[: c.n_head].reshape(c.n_kv_head, -1, c.head_dim)  # each key head's query heads
            s = np.matmul(q, k[:, : at + 1].transpose(0, 2, 1)) * c.head_dim**-0.5
            s = np.exp(s - np.maximum.reduce(s, -1, keepdims=True))
            o = np.matmul(s / np.add.reduce(s, -1, keepdims=True), v[:, : at + 1])
            x_D = x_D + w.out @ o.reshape(-1)
            gate_up = w.gate_up @ (unit(x_D) * w.mlp_norm)
            with np.errstate(over="ignore"):  # exp(100) is inf, and 1 / inf the 0 it should be
                hidden = gate_up[: c.d_ff] / (1 + np.exp(-gate_up[: c.d_ff])) * gate_up[c.d_ff :]
            x_D = x_D + w.down @ hidden
        return torch.from_numpy(unit(x_D) * norm).unsqueeze(0)

    return forward
