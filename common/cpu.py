"""
common/cpu.py: every trick that exists only because a CPU is slow.

The promise: nothing here changes a result beyond rounding, and without it everything runs, slower.
The definitions stand in kernels.py and train_gpt.py; each calls its stand-in here by one line.
NANORL_CPU_TRICKS=0 turns all of it off, and so does `cpu.ON = False` within a process. With it goes
the sampler's promise to the bit (`Sampler(exact=True)`), which rests on how oneDNN sums a row: then
log-probs agree to 1e-5, and tokens until two candidates tie, as on a GPU.

    memory            large tensors in large pages
    products          matmul_t, linear, weight_gradient, padded: oneDNN for fp32 matrices, and the
                      shapes that it likes
    attention         packed_attention: segments of about one length share a call
    log-probs         logprob: chunks of the size of a cache
    decoding          rms_norm, qk_norm_rope, swiglu, draw: the same, in fewer operations

and in common/norms.py norms whose gradient is by hand, in common/numpy_row.py the model in numpy, for
one sequence on one thread.

What repeats the arithmetic of a definition would not see a change to it: you edit the norm, the
trainer follows, and the sampler keeps the old one. So every such copy proves itself on random numbers
against the definition as it is now, and is dropped with one printed line if they disagree.

This file imports nothing of ours: what it needs to know of the model is handed in.
"""

import functools
import os
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F

ON = os.environ.get("NANORL_CPU_TRICKS", "1") != "0"

# Tensors above 2 MB in pages of 2 MB, where Linux gives them to whoever asks: torch does if this is set
# before its first tensor. A page of 4 kB costs a fault when it is first touched, and a walk through
# tables when it is read again: reading 37 MB of weights takes twice as long in them.
if ON:
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def fp32(x):
    """May this tensor take the tricks for fp32?"""
    return ON and x.is_cpu and x.dtype == torch.float32


def decoding(x):
    """Sampling on a CPU, where the number of operations is what a step costs. The number of rows must
    not matter, or a row's rounding would depend on the others."""
    # grad first: a compiler knows the answer, and cuts its graph at the question after it
    return not torch.is_grad_enabled() and torch.is_inference_mode_enabled() and fp32(x)


def training(x):
    """In a trainer, and where it scores without gradients, for the two must agree to the bit; not inside
    torch.compile, which fuses the definitions itself."""
    return not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled() and fp32(x)


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
@torch.enable_grad()
def _difference(trick, definition, more):
    """-> in words, how the two differ on the trick's inputs; or None."""
    try:
        args = PROBES[trick.__name__](_random())
        ours, theirs = _tensors(trick(*args, *more), args), _tensors(definition(*args), args)
        error = max(float((a - b).detach().abs().max()) for a, b in zip(ours, theirs, strict=True))
    except Exception as why:  # a definition that takes or gives something else
        return f"{type(why).__name__}: {why}"
    return None if error <= AGREE else f"by up to {error:.2g} on random numbers"


def _random():
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=g)


def _tensors(result, args):
    """-> what a function gave; and the gradients of those of its arguments that want one."""
    if callable(result):  # attend()
        rand = _random()
        result = result(0, rand(28, 4, 16), rand(28, 2, 16), rand(28, 2, 16))
    found = [result] if torch.is_tensor(result) else list(result)
    leaves = [x for x in args if torch.is_tensor(x) and x.requires_grad]
    rand = _random()
    return found + list(torch.autograd.grad(found, leaves, [rand(*x.shape) for x in found]) if leaves else ())


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


def _probe_logprob(rand):
    """An id twice in a row."""
    return rand(5, 8).requires_grad_(), rand(9, 8).requires_grad_(), torch.arange(10).view(5, 2) // 3, 0.7


PROBES = {  # what each trick is asked with
    # segments with a parent, a grandparent and without, two of which share a bucket
    "packed_attention": lambda rand: ([0, 5, 12, 15, 16, 22, 28], 7, [-1, 0, 1, -1, -1, -1]),
    "logprob": _probe_logprob,
    "rms_norm": lambda rand: (rand(6, 24) * 1e-2, rand(24), 1e-6),  # near the origin, where eps counts
    "qk_norm_rope": _probe_qk_norm_rope,
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
# log-probs and entropy, in chunks that stay in a cache


CHUNK = 1 << 22  # logits: 16 MB


def chunks(N, vocab):
    rows = max(16, CHUNK // vocab)
    return [slice(a, a + rows) for a in range(0, N, rows)]


MANY = 1024  # rows


def blocks(N, vocab):
    """(rows, columns) of the backward: chunks of rows, where they are of MANY. Of a large vocabulary
    they would be of few, and each adds to all of dW, which costs more than its products. So then it is
    MANY rows and a tile of the vocabulary at a time: a tile adds to its own part of dW."""
    if vocab <= CHUNK // MANY:
        return [(rows, slice(0, vocab)) for rows in chunks(N, vocab)]
    rows = max(1, min(MANY, N))
    width = max(16, CHUNK // rows // 4)  # a quarter: such a tile stays in the core's own cache
    return [(slice(a, a + rows), slice(low, low + width))
            for a in range(0, N, rows) for low in range(0, vocab, width)]


def logits(hidden, weight, temperature):
    z = matmul_t(hidden, weight)
    return z.div_(temperature) if temperature != 1.0 else z


class LogprobAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_NK, temperature):
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        logp_NK = torch.empty(ids_NK.shape, dtype=wide, device=hidden_ND.device)
        lse_N = torch.empty(ids_NK.shape[0], dtype=wide, device=hidden_ND.device)
        entropy_N = torch.empty_like(lse_N)
        ctx.last = None

        keep = len(weight_VD) <= CHUNK // MANY
        for s in chunks(len(ids_NK), len(weight_VD)):
            z = logits(hidden_ND[s], weight_VD, temperature)  # (n, V)
            at = z.gather(1, ids_NK[s])
            top = z.amax(1, keepdim=True)
            z.sub_(top)
            p = z.exp()  # not yet divided by its sum
            total = p.sum(1)
            lse = total.log()
            entropy_N[s] = lse - torch.linalg.vecdot(p, z).div_(total)
            if keep:  # so that the backward need not compute the last chunk again
                ctx.last = z.sub_(lse.unsqueeze(1))
            del z, p  # before the next chunk takes as much memory
            lse_N[s] = lse.add_(top.squeeze(1))
            logp_NK[s] = at.sub_(lse.unsqueeze(1))

        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, lse_N, entropy_N)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp_NK, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_NK, grad_entropy_N):
        hidden_ND, weight_VD, ids_NK, lse_N, entropy_N = ctx.saved_tensors
        if grad_logp_NK is None:
            grad_logp_NK = lse_N.new_zeros(ids_NK.shape)
        grad_h = torch.zeros_like(hidden_ND, dtype=lse_N.dtype)
        grad_w = None
        if ctx.needs_input_grad[1]:
            grad_w = torch.zeros_like(weight_VD, dtype=lse_N.dtype)

        for s, v in blocks(len(ids_NK), len(weight_VD)):
            if ctx.last is not None and s.stop >= len(ids_NK):
                z = ctx.last
                ctx.last = None
            else:
                z = logits(hidden_ND[s], weight_VD[v], ctx.temperature)
                z.sub_(lse_N[s].unsqueeze(1))

            g = grad_logp_NK[s].to(z.dtype)
            flat = g.sum(1, keepdim=True)
            if grad_entropy_N is None:
                z.exp_().mul_(-flat)  # -p sum_k g_k
            else:                     # -p (sum_k g_k + g_H (z - lse + H))
                p = z.exp()
                g_H = grad_entropy_N[s].unsqueeze(1)
                z.mul_(-g_H).sub_(g_H * entropy_N[s].unsqueeze(1) + flat).mul_(p)
            cols = ids_NK[s] - v.start
            inside = (cols >= 0) & (cols < z.shape[1])
            z.scatter_add_(1, cols.clamp_(0, z.shape[1] - 1), torch.where(inside, g, 0.0))

            if ctx.temperature != 1.0:
                z.div_(ctx.temperature)
            z = z.to(hidden_ND.dtype)
            grad_h[s] += matmul_t(z, weight_VD[v].t())
            if grad_w is not None:
                grad_w[v] += weight_gradient(z, hidden_ND[s])
        if grad_w is not None:
            grad_w = grad_w.to(weight_VD.dtype)
        return grad_h.to(hidden_ND.dtype), grad_w, None, None


def logprob(hidden_ND, weight_VD, ids_NK, temperature):
    """kernels.logprob_torch."""
    N = len(ids_NK)
    spare = spare_rows(N, hidden_ND)
    if spare:
        hidden_ND = F.pad(hidden_ND, (0, 0, 0, spare))
        ids_NK = F.pad(ids_NK, (0, 0, 0, spare))
    logp_NK, entropy_N = LogprobAt.apply(hidden_ND, weight_VD, ids_NK, temperature)
    return logp_NK[:N], entropy_N[:N]


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
