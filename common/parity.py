"""
parity.py: --parity. On a GPU a token's log-prob is the same bits in the sampler and in the trainer.

They read the same weights, and still differ: a sum of thousands of products is rounded by its order, and
the order follows the shape of the call. A decode step has 1 to 256 rows, an update thousands. What
differs, and what --parity does about it:

    products      cuBLAS splits long sums over programs where rows are few (split-K), or rounds them to
                  TF32: no room for the one, no leave for the other. Where a card's cuBLAS still
                  follows the number of rows: our own product, whose order is fixed
    attention     the cache is read in slices, the packed row is not: one kernel for both, which reads
                  keys in blocks that begin at the sequence's first, and never splits them
    log-prob      slices of a row of logits here, tiles of a vocabulary there, cut by the number of rows,
                  and 1 / temperature rounded in two ways: one function, tiles of one width
    norm, rope    are one function for both anyway; their rows are independent

Each of these is tried on the card at the start, on this model's own weights: what a row gives must not
depend on the rows beside it. The log says what was found, and what cannot be promised. Gradients need no
parity: the backward takes the fast kernels.

This file knows backend.py alone; the model's steps are handed in.
"""

import functools
import os

import torch
import torch.nn.functional as F

from common.backend import INTERPRET, chosen, flash, jit, tl, triton, varlen

ON = False
PRODUCT = "cublas"    # or "triton"
FOUND = ""            # what the trial at the start found, in words

# read at the first product: no room for split-K, which adds partial sums through a workspace
ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
WIDTH = 4096          # columns of a tile of logits
ROWS = (1, 2, 3, 8, 17, 64, 300, 4096)


# -----------------------------------------------------------------------------
# on and off


def prepare(on):
    """Before the first CUDA call of a run, which may not be the first run of its process."""
    global ON, PRODUCT, FOUND
    ON = False
    PRODUCT = "cublas"
    FOUND = ""
    if on:
        os.environ.update(ENVIRONMENT)
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = not on
    matmul.allow_fp16_reduced_precision_reduction = not on


def check(device):
    """Refuses a device for which nothing is promised."""
    if device.type != "cuda" and not INTERPRET:
        raise ValueError(f"--parity has no effect on {device.type}: it is for CUDA. On a CPU in fp32 the "
                         "log-probs of sampler and trainer agree within 1e-6 without it")
    if os.environ.get("NANORL_ATTENTION"):
        raise ValueError("--parity has attention of its own: leave NANORL_ATTENTION unset")


def use(model, steps):
    """Turns it on, and tries it on this model. steps: kernels.py."""
    global ON, PRODUCT, FOUND
    device = model.head_weight.device
    check(device)
    if steps.picked("fused", device.type) != "triton":
        raise ValueError("--parity needs the Triton kernels, which failed their check on this device: leave "
                         "it out")
    torch.set_float32_matmul_precision("highest")
    ON = True
    rows = ROWS if device.type == "cuda" else ROWS[:-2]
    with torch.inference_mode():
        unlike = trial(model, steps, rows)
        if any(name in unlike for name in products(model)):
            PRODUCT = "triton"
            unlike = trial(model, steps, rows)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    FOUND = words(device, unlike, rows)


def words(device, unlike, rows):
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "the interpreter"
    by = "cuBLAS without split-K"
    if PRODUCT == "triton":
        by = "our own kernel, since cuBLAS follows the number of rows"
    said = f"parity: products by {by}; tried on {card} with {rows[0]} to {rows[-1]:,} rows, "
    if not unlike:
        return said + "each row has the same bits in all of them"
    return said + f"NOT the same bits: {', '.join(unlike)}. Log-probs of sampler and trainer may differ here"


# -----------------------------------------------------------------------------
# the trial


def products(model):
    """-> {name: (weight, bias or None)} of a block's matrices, and a tile of the head."""
    named = dict(model.blocks[0].named_parameters())
    found = {"head": (model.head_weight[:WIDTH], None)}
    for name, p in named.items():
        if p.ndim == 2:
            found[name.removesuffix(".weight")] = p, named.get(name.replace("weight", "bias"))
    return found


def trial(model, steps, rows):
    """-> the names of the steps in which a row's bits depend on what is beside it."""
    head = model.head_weight
    device = head.device
    c = model.config
    rand = numbers(device, head.dtype)
    x = rand(rows[-1], c.d_model)
    ids = torch.arange(len(x), device=device) % c.vocab_size
    weight = torch.ones_like(head[0])
    cases = {
        "norm": ((x,), lambda x: steps.rms_norm(x, weight, c.norm_eps)),
        "swiglu": ((rand(rows[-1], 2 * c.d_ff),), steps.swiglu),
        "rope": (heads_of(c, rows[-1], rand), functools.partial(rotated, steps, c)),
        "log-prob": ((x, ids), lambda x, ids: steps.linear_logprob(x, head, ids, 0.7)[0]),
    }
    for name, (weight_NK, bias) in products(model).items():
        inputs = (rand(rows[-1], weight_NK.shape[1]),)
        run = functools.partial(steps.linear, weight=weight_NK, bias=bias)
        if name == "head":
            run = functools.partial(steps.linear_logits, weight=weight_NK)
        cases[name] = inputs, run
    unlike = [name for name, (inputs, run) in cases.items() if not alike(run, inputs, rows)]
    both_sides = {"draw": drawn(steps, x[:64], head), **attended(steps, c, rand)}
    return unlike + [name for name, equal in both_sides.items() if not equal]


def numbers(device, dtype):
    g = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(shape, generator=g).to(device, dtype)


def alike(run, inputs, rows):
    """Does each row come out the same in every company, at the front and at the back of it?"""
    whole = run(*inputs)                                     # the last of the numbers of rows
    for n in rows[:-1]:
        front = run(*(x[:n].contiguous() for x in inputs))
        back = run(*(x[-n:].contiguous() for x in inputs))
        if not (torch.equal(front, whole[:n]) and torch.equal(back, whole[-n:])):
            return False
    return True


def heads_of(c, rows, rand):
    """-> q and k side by side, and angles."""
    angle = rand(rows, c.head_dim // 2).float()
    return rand(rows, c.n_head + c.n_kv_head, c.head_dim), angle.cos(), angle.sin()


def rotated(steps, c, x, cos, sin):
    q, k = x.split((c.n_head, c.n_kv_head), dim=1)
    weight = torch.ones_like(x[0, 0]) if c.qk_norm else None
    return torch.cat(steps.qk_norm_rope(q, k, weight, weight, cos, sin, c.norm_eps), 1)


def drawn(steps, x, head):
    """Is the log-prob of a token that was drawn the one that the trainer gives it?"""
    uniform = torch.linspace(0.01, 0.99, len(x), device=x.device)
    temperature = torch.full_like(uniform, 0.7)
    token, logp, _ = steps.draw_next(x, head, uniform, temperature)
    return torch.equal(logp, steps.linear_logprob(x, head, token, 0.7)[0])


def draw(fold, plain, hidden_ND, weight_VD, uniform_N, temperature_N, top_k_N=None, top_p_N=None):
    """plain, the draw without --parity; but the logits, and of the token that they give the log-prob, are
    those of linear_logprob to the bit. fold: see _fold in kernels.py."""
    logits_NV = hidden_ND.new_empty(len(hidden_ND), len(weight_VD), dtype=torch.float32)
    inverse_N = torch.where(temperature_N == 0, 1.0, temperature_N).reciprocal()
    ids_N1 = torch.zeros_like(temperature_N, dtype=torch.int64).unsqueeze(1)      # not known yet
    _, m_N, s_N, _ = fold(hidden_ND.contiguous(), weight_VD, ids_N1, inverse_N, logits_NV)
    token_N, _, kept_N = plain(logits_NV, uniform_N, temperature_N, top_k_N, top_p_N)
    at_N = logits_NV.gather(1, token_N.unsqueeze(1)).squeeze(1) * inverse_N
    return token_N, at_N.sub_(m_N).sub_(s_N.log()), kept_N


def attended(steps, c, rand, length=200, page=32):
    """-> {name: is a key's weight the same}: the last token of a packed row, in two places of it,
    and a decode step that finds the same keys in pages."""
    q = rand(length, c.n_head, c.head_dim)
    k, v = rand(2, length, c.n_kv_head, c.head_dim)
    whole = steps.packed_attention([0, length], length)(0, q, k, v)
    twice = [torch.cat((x, x)) for x in (q, k, v)]
    behind = steps.packed_attention([0, length, 2 * length], length)(0, *twice)[length:]
    room = 1 + -length % page                                # of the last key, and behind it
    pages = [F.pad(x[:-1], (0, 0, 0, 0, 0, room)).unflatten(0, (-1, page)) for x in (k, v)]
    table = torch.arange(len(pages[0]), dtype=torch.int32, device=q.device).unsqueeze(0)
    lengths = torch.full((1,), length - 1, dtype=torch.int32, device=q.device)
    step = steps.decode_attention(q[-1:], k[-1:], v[-1:], *pages, table, lengths)
    return {"attention": torch.equal(whole, behind), "decode": torch.equal(step, whole[-1:])}


# -----------------------------------------------------------------------------
# products whose order is fixed: x w^T + bias, the sum over K in blocks, one after another


@jit
def _multiply_kernel(x, w, bias, out, M, N, K, x_stride, w_row, w_col,
                     BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """One tile of the result. 64 rows even for one: a wider tile for many rows would go through another
    instruction."""
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for block in range(0, K, BLOCK_K):
        inner = block + tl.arange(0, BLOCK_K)
        mask_K = inner < K
        x_MK = tl.load(x + rows[:, None] * x_stride + inner[None, :],
                       mask=(rows < M)[:, None] & mask_K[None, :], other=0.0)
        w_KN = tl.load(w + cols[None, :] * w_row + inner[:, None] * w_col,
                       mask=(cols < N)[None, :] & mask_K[:, None], other=0.0)
        acc += tl.dot(x_MK, w_KN, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    tl.store(out + rows[:, None] * N + cols[None, :], acc, mask=(rows < M)[:, None] & (cols < N)[None, :])


def multiply(x, w, bias=None, dtype=None):
    """x w^T + bias, rounded once to dtype."""
    x = x if x.stride(1) == 1 else x.contiguous()
    M, K = x.shape
    N = len(w)
    out = x.new_empty(M, N, dtype=dtype or x.dtype)
    _multiply_kernel[(-(-M // 64), -(-N // 64))](
        x, w, bias, out, M, N, K, x.stride(0), w.stride(0), w.stride(1),
        BLOCK_M=64, BLOCK_N=64, BLOCK_K=64 if x.element_size() == 2 else 32, num_warps=4, num_stages=3)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return multiply(x, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (grad @ weight if need_x else None,
                grad.t() @ x if need_weight else None,
                grad.sum(0) if need_bias else None)


linear = _Linear.apply


# -----------------------------------------------------------------------------
# attention whose order is fixed
#
#   packed   segment i has the queries cu_q[i] .. cu_q[i+1] and the keys cu_k[i] .. cu_k[i+1], of which
#            the queries are the last
#   decode   row i has one query, and its keys in pages: see decode_attention in kernels.py


@jit
def _attention_kernel(q, k, v, out, cu_q, cu_k, table, scale, q_stride, k_stride, v_stride, table_stride,
                      PAGE: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr,
                      BLOCK_G: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
                      BLOCK_N: tl.constexpr):
    """BLOCK_Q queries of a segment, each with the GROUP heads that share a key head. The softmax is
    online, over blocks of keys from the first one on. A block that a query does not see changes
    nothing of it, not one bit: its weights are 0, and its maximum is none."""
    segment = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_Q
    kv = tl.program_id(2)
    if PAGE > 0:
        start_q = segment
        start_k = 0
        n_q = 1
        n_k = tl.load(cu_k + segment) + 1
    else:
        start_q = tl.load(cu_q + segment)
        start_k = tl.load(cu_k + segment)
        n_q = tl.load(cu_q + segment + 1) - start_q
        n_k = tl.load(cu_k + segment + 1) - start_k

    rows = tl.arange(0, BLOCK_Q * BLOCK_G)
    queries = first + rows // BLOCK_G
    heads = kv * GROUP + rows % BLOCK_G
    sees = n_k - n_q + queries + 1                   # so many keys
    cols = tl.arange(0, BLOCK_D)
    mask_D = cols < HD
    mask = ((queries < n_q) & (rows % BLOCK_G < GROUP))[:, None] & mask_D[None, :]
    tokens = (start_q + queries).to(tl.int64)
    q_RD = tl.load(q + tokens[:, None] * q_stride + heads[:, None] * HD + cols[None, :], mask=mask, other=0.0)

    m = tl.full([BLOCK_Q * BLOCK_G], -1e30, tl.float32)
    s = tl.zeros([BLOCK_Q * BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_Q * BLOCK_G, BLOCK_D], tl.float32)
    end = tl.where(first < n_q, tl.minimum(n_k, n_k - n_q + first + BLOCK_Q), 0)
    for block in range(0, end, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        mask_N = keys < n_k
        if PAGE > 0:
            page = tl.load(table + segment * table_stride + keys // PAGE, mask=mask_N, other=0).to(tl.int64)
            places = page * PAGE + keys % PAGE
        else:
            places = (start_k + keys).to(tl.int64)
        mask_ND = mask_N[:, None] & mask_D[None, :]
        offsets = kv * HD + cols[None, :]
        k_ND = tl.load(k + places[:, None] * k_stride + offsets, mask=mask_ND, other=0.0)
        v_ND = tl.load(v + places[:, None] * v_stride + offsets, mask=mask_ND, other=0.0)

        z = tl.dot(q_RD, tl.trans(k_ND), input_precision="ieee") * scale
        z = tl.where(keys[None, :] < sees[:, None], z, -1e30)
        m_new = tl.maximum(m, tl.max(z, 1))
        p = tl.exp(z - m_new[:, None])
        rescale = tl.exp(m - m_new)
        acc = acc * rescale[:, None] + tl.dot(p.to(v_ND.dtype), v_ND, input_precision="ieee")
        s = s * rescale + tl.sum(p, 1)
        m = m_new

    o = acc / tl.maximum(s, 1e-30)[:, None]
    offsets = (tokens[:, None] * KV * GROUP + heads[:, None]) * HD + cols[None, :]
    tl.store(out + offsets, o, mask=mask)


def _launch(q, k, v, cu_q, cu_k, table, segments, max_q, page, kv_heads):
    """k and v: keys by rows, of a packed row or of pages."""
    H, hd = q.shape[1:]
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    group = triton.next_power_of_2(H // kv_heads)
    queries = max(1, 64 // group)
    block_d = max(16, triton.next_power_of_2(hd))
    _attention_kernel[(segments, -(-max_q // queries), kv_heads)](
        q, k, v, out, cu_q, cu_k, table, hd**-0.5, q.stride(0), k.stride(0), v.stride(0),
        table.stride(0) if page else 0, PAGE=page, KV=kv_heads, GROUP=H // kv_heads, HD=hd,
        BLOCK_G=group, BLOCK_Q=queries, BLOCK_D=block_d,
        BLOCK_N=64 if block_d * q.element_size() <= 256 else 32,
        num_warps=4, num_stages=2, enable_fp_fusion=False)   # or it might fuse in one kind alone
    return out


def decode(q, k_new, v_new, k_pages, v_pages, block_table, lengths):
    """kernels.decode_attention_torch: the new key goes to its page first."""
    page, KV = k_pages.shape[1:3]
    pages = block_table.gather(1, (lengths // page).long().unsqueeze(1)).squeeze(1)
    places = pages.long() * page + lengths % page
    k = k_pages.view(-1, *k_new.shape[1:]).index_copy_(0, places, k_new)
    v = v_pages.view(-1, *v_new.shape[1:]).index_copy_(0, places, v_new)
    return _launch(q, k, v, lengths, lengths, block_table, len(q), 1, page, KV)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_q, cu_k, max_q, max_k):
        ctx.save_for_backward(q, k, v, cu_q, cu_k)
        ctx.longest = max_q, max_k
        return _launch(q, k, v, cu_q, cu_k, cu_k, len(cu_q) - 1, max_q, 0, k.shape[1])

    @staticmethod
    def backward(ctx, grad):
        *leaves, cu_q, cu_k = ctx.saved_tensors
        leaves = [x.detach().requires_grad_() for x in leaves]
        with torch.enable_grad():
            o = fast(leaves[0])(*leaves, cu_q, cu_k, *ctx.longest)
        return *torch.autograd.grad(o, leaves, grad), None, None, None, None


packed = _Attention.apply        # as flash and varlen of backend.py are called


def fast(q):
    """-> what attends without --parity."""
    known = {"flash": flash, "varlen": varlen}
    fits = q.is_cuda and q.element_size() == 2 and q.shape[2] % 8 == 0 and q.shape[2] <= 256
    return known.get(chosen("train", q.device.type) if fits else "torch", by_segments)


def by_segments(q, k, v, cu_q, cu_k, max_q, max_k):
    outs = []
    ends = cu_q.tolist(), cu_q.tolist()[1:], cu_k.tolist(), cu_k.tolist()[1:]
    for a, b, c, d in zip(*ends):
        sees = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).tril(d - c - (b - a))
        parts = (x.transpose(0, 1).unsqueeze(0) for x in (q[a:b], k[c:d], v[c:d]))
        o = F.scaled_dot_product_attention(*parts, attn_mask=sees, enable_gqa=True)
        outs.append(o.squeeze(0).transpose(0, 1))
    return torch.cat(outs)
