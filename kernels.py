"""
kernels.py: attention, log-probs of a head, the fused small steps of a layer, and the draw of a token.

Each function here is written in plain torch first: that twin is the definition, it runs anywhere
(CPU, MPS, CUDA) and every faster version is tested against it. The Triton kernel, where there is one,
stands below its twin; common/backend.py picks which of them runs, and common/cpu.py holds what makes
the twins fast enough on a CPU.

Left out of the usual recipe, and why:
- no padding and no batch dimension: sequences lie one after another in a ragged row and
  `packed_attention` keeps them apart, so nothing else in the house knows where a sequence ends;
- no (N, V) tensor of logits: log-prob and entropy are computed from hidden states and head weight in
  chunks of rows, and the backward recomputes the chunk instead of keeping it;
- no random state: a token's uniform number is a hash of its address (seed, visit, problem, index,
  position);
- no autotuner: block sizes are fixed, so that a run never depends on what another process was doing
  while it started. They were chosen from arithmetic and from the registers that the compiler
  reports, not yet from a clock.

How to read a kernel: it is one program out of a grid, `tl.program_id` says which; it loads a tile,
works in fp32 whatever the tensors are, and stores a tile, which rounds to the tensor's type. A mask
covers what sticks out over the edge. Names in capitals are constants of compilation. In every kernel:
`row` and `cols` are places in a matrix, `block` the first place of a tile, `offsets` places in memory;
z are logits or scores as they lie there, x the same once scaled; m a running maximum, s a running sum
of e^(x - m), `rescale` what a new maximum makes of it; e such an exponential, p a probability.

    python kernels.py     prints what runs on this machine, each kernel checked against its twin
"""

import functools
from itertools import pairwise

import torch
import torch.nn.functional as F

from common import cpu, norms, parity
from common.backend import (PROBED_ROW, PROBES, candidates, choose, chosen, expect, expect_dense,
                            expect_heads, expect_ids, flash, flash_decode, in_one_call, jit, longest,
                            packages_take, report, tl, triton, varlen)
from common.backend import to_device as to_device  # callers know it from here


def fused(x):
    """May this tensor go to a kernel? float64 never: a gradient check checks the twins. Nor inside
    torch.compile, which fuses the twins itself, and takes what a kernel reads for what it writes where
    pointers went through a function."""
    if x.dtype == torch.float64 or torch.compiler.is_compiling():
        return False
    return picked("fused", x.device.type) == "triton"


# -----------------------------------------------------------------------------
# attention over a packed row
#
#   cu_seqlens  0     5        12   15     segment i owns the rows cu_seqlens[i] .. cu_seqlens[i+1]
#   row         aaaaa bbbbbbb ccc          it sees itself causally, and its parent's keys and theirs
#   parent      -1    0       0            b and c both continue a: a prompt stored once for two responses


def causal_attention(q, k, v):
    """One sequence whose last rows are the queries: each sees the keys up to its own."""
    sees = torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).tril(len(k) - len(q))
    q_BHLD, k_BHLD, v_BHLD = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    shared = q.shape[1] != k.shape[1]
    o = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=sees, enable_gqa=shared)
    return o.squeeze(0).transpose(0, 1)


def ancestry(cu_seqlens, parent=None):
    """-> for each segment the ranges of keys it sees: its ancestors', oldest first, then its own."""
    ranges = []
    for i in range(len(cu_seqlens) - 1):
        p = parent[i] if parent else -1
        assert p < i, f"segment {i} has parent {p}: a parent must stand before its children"
        ranges.append((ranges[p] if p >= 0 else []) + [(cu_seqlens[i], cu_seqlens[i + 1])])
    return ranges


def ranges_attention(cu_q, ranges):
    """-> attend(). Segment i's queries see ranges[i] of the keys, the last of which they are."""

    def attend(layer, q, k, v):
        outs = [torch.zeros_like(q[:0])]
        for start, end, seen in zip(cu_q, cu_q[1:], ranges):
            keys = torch.cat([k[a:b] for a, b in seen])
            values = torch.cat([v[a:b] for a, b in seen])
            outs.append(causal_attention(q[start:end], keys, values))
        return torch.cat(outs)

    return attend


def packed_attention_torch(cu_seqlens, max_len, parent=None):
    return ranges_attention(cu_seqlens, ancestry(cu_seqlens, parent))


def _by_backend(cu_q, ranges, keys, twin):
    """-> attend() over ranges of that many keys, made once for the backend that its q go to, and used
    by all layers. twin: makes it in plain torch."""

    @functools.cache
    def made(name):
        run = RUNS["train"][name]
        return in_one_call(run, cu_q, ranges) if run else twin()

    def attend(layer, q, k, v):
        expect("q", q, (cu_q[-1], q.shape[1], q.shape[2]))
        expect("k", k, (keys, k.shape[1], q.shape[2]), (q.dtype,))
        expect("v", v, k.shape, (q.dtype,))
        assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads"
        name = picked("train", q.device.type) if parity.ON or packages_take(q) else "torch"
        return made(name)(layer, q, k, v)

    return attend


def packed_attention(cu_seqlens, max_len, parent=None):
    """-> attend(layer, q, k, v) for model(tokens_T, positions_T, attend). Lists of ints."""
    assert max_len >= longest(cu_seqlens), "max_len is below the longest segment"

    def twin():
        if cpu.ON and cpu.stands_for(cpu.packed_attention, packed_attention_torch):
            return cpu.packed_attention(cu_seqlens, max_len, parent)
        return packed_attention_torch(cu_seqlens, max_len, parent)

    return _by_backend(cu_seqlens, ancestry(cu_seqlens, parent), cu_seqlens[-1], twin)


def continued_attention(cu_q, cu_k):
    """-> attend(layer, q, k, v), for prompts that continue from a cache: segment i's queries are the
    last of its keys."""
    ranges = [[piece] for piece in pairwise(cu_k)]
    return _by_backend(cu_q, ranges, cu_k[-1], lambda: ranges_attention(cu_q, ranges))


# -----------------------------------------------------------------------------
# decode: one new token per row against its pages
#
#   block_table  (B, n)  page numbers of each row, in order: key j of row b lies in page
#                        block_table[b, j // page], slot j % page
#   lengths      (B,)    keys already there: the new one becomes number lengths[b], its token sees it
#   k_pages      (pages, page, n_kv_head, head_dim), as flash-attn wants it
#
# A row that is not alive (a CUDA graph runs full batches) has length 0 and names a page that belongs
# to no row.


def decode_attention_torch(q, k_new, v_new, k_pages, v_pages, block_table, lengths):
    page = k_pages.shape[1]
    lengths = lengths.long()
    slot = block_table.gather(1, (lengths // page).unsqueeze(1)).squeeze(1).long(), lengths % page
    k_pages[slot] = k_new
    v_pages[slot] = v_new
    table = cpu.used_pages(block_table, lengths, page).long()
    k = k_pages[table].flatten(1, 2).transpose(1, 2)  # (B, kv heads, n, hd)
    v = v_pages[table].flatten(1, 2).transpose(1, 2)
    mask = torch.arange(k.shape[2], device=q.device) <= lengths.unsqueeze(1)
    mask = mask[:, None, None]  # (B, 1, 1, n)
    shared = q.shape[1] != k_new.shape[1]
    o = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, attn_mask=mask, enable_gqa=shared)
    return o.squeeze(2)


@jit
def _decode_kernel(q, k_new, v_new, k_pages, v_pages, table, lengths, out, lse, scale,
                   table_stride, q_stride, k_stride, v_stride,
                   SPLITS: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr,
                   HD: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """One row, one key head with the GROUP query heads that share it, one slice of the keys:
    softmax(q K^T) V, online (arXiv 2205.14135), the keys split over programs as in Flash-Decoding.
    Keys are read once for the whole group, and that reading is all the cost: the padding of the group
    to the 16 rows that a tensor core wants is free."""
    row = tl.program_id(0)
    kv = tl.program_id(1)
    split = tl.program_id(2)

    length = tl.load(lengths + row)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N, 4 * BLOCK_N)
    start = split * chunk
    end = tl.minimum(start + chunk, length)

    group = tl.arange(0, BLOCK_G)
    cols = tl.arange(0, BLOCK_D)
    heads = kv * GROUP + group
    mask_G = group < GROUP
    mask_D = cols < HD
    mask_GD = mask_G[:, None] & mask_D[None, :]
    q += row * q_stride
    q_GD = tl.load(q + heads[:, None] * HD + cols[None, :], mask=mask_GD, other=0.0)

    # The new key never makes the trip through memory: slice 0 starts its softmax from it (running
    # maximum, sum and output), and stores it for later steps.
    k = tl.load(k_new + row * k_stride + kv * HD + cols, mask=mask_D, other=0.0)
    v = tl.load(v_new + row * v_stride + kv * HD + cols, mask=mask_D, other=0.0)
    first = split == 0
    m = tl.where(first, tl.sum(q_GD.to(tl.float32) * k[None, :].to(tl.float32), 1) * scale, -1e30)
    s = tl.where(first, 1.0, 0.0) + tl.zeros([BLOCK_G], tl.float32)
    acc = tl.where(first, v[None, :].to(tl.float32), 0.0) + tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if first:
        page = tl.load(table + row * table_stride + length // PAGE).to(tl.int64)
        offsets = ((page * PAGE + length % PAGE) * KV + kv) * HD + cols
        tl.store(k_pages + offsets, k, mask=mask_D)
        tl.store(v_pages + offsets, v, mask=mask_D)

    for block in range(start, end, BLOCK_N):
        keys = block + tl.arange(0, BLOCK_N)
        mask_N = keys < end
        page = tl.load(table + row * table_stride + keys // PAGE, mask=mask_N, other=0).to(tl.int64)
        offsets = (((page * PAGE + keys % PAGE) * KV + kv) * HD)[:, None] + cols[None, :]
        mask_ND = mask_N[:, None] & mask_D[None, :]
        k_ND = tl.load(k_pages + offsets, mask=mask_ND, other=0.0)
        v_ND = tl.load(v_pages + offsets, mask=mask_ND, other=0.0)

        z = tl.dot(q_GD, tl.trans(k_ND), input_precision="ieee") * scale
        z = tl.where(mask_N[None, :], z, -1e30)
        m_new = tl.maximum(m, tl.max(z, 1))
        p = tl.exp(z - m_new[:, None])
        rescale = tl.exp(m - m_new)
        acc = acc * rescale[:, None] + tl.dot(p.to(v_ND.dtype), v_ND, input_precision="ieee")
        s = s * rescale + tl.sum(p, 1)
        m = m_new

    # out is (B, SPLITS, n_head, hd), lse (B, SPLITS, n_head). A slice behind the end has s = 0 and
    # weighs nothing in the merge.
    rows = (row * SPLITS + split) * KV * GROUP + heads
    o = acc / tl.maximum(s, 1e-30)[:, None]
    tl.store(out + rows[:, None] * HD + cols[None, :], o, mask=mask_GD)
    if SPLITS > 1:
        total = m + tl.log(tl.maximum(s, 1e-30))
        tl.store(lse + rows, tl.where(s > 0, total, -1e30), mask=mask_G)


@jit
def _merge_kernel(part, lse, out, HEADS: tl.constexpr, SPLITS: tl.constexpr, HD: tl.constexpr,
                  BLOCK_D: tl.constexpr):
    """o = sum_i o_i e^(lse_i) / sum_i e^(lse_i), one program per row and head."""
    row = tl.program_id(0)
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    mask = cols < HD
    rows = (row * SPLITS + tl.arange(0, SPLITS)) * HEADS + head

    z = tl.load(lse + rows)
    p = tl.exp(z - tl.max(z, 0))
    o = tl.load(part + rows[:, None] * HD + cols[None, :], mask=mask[None, :], other=0.0)
    o = tl.sum(o * p[:, None], 0) / tl.sum(p, 0)
    tl.store(out + (row * HEADS + head) * HD + cols, o, mask=mask)


def _triton_decode(q, k_new, v_new, k_pages, v_pages, block_table, lengths, splits=None):
    B, H, hd = q.shape
    page, KV = k_pages.shape[1:3]
    if splits is None:  # 2,000 programs fill any GPU of today; below 256 keys a slice does not pay
        slices = -(-block_table.shape[1] * page // 256)
        splits = triton.next_power_of_2(max(1, min(32, 2048 // max(1, B * KV), slices)))

    out = q.new_empty(B, H, hd)
    part = out if splits == 1 else q.new_empty(B, splits, H, hd, dtype=torch.float32)
    lse = q.new_empty(B, splits, H, dtype=torch.float32)
    block_d = triton.next_power_of_2(hd)

    # BLOCK_N 64: 39 kB, so four programs share an H100's multiprocessor at head_dim 128. 32 halves what
    # each has under way, 128 leaves room for three.
    _decode_kernel[(B, KV, splits)](
        q, k_new, v_new, k_pages, v_pages, block_table, lengths, part, lse, hd**-0.5,
        block_table.stride(0), q.stride(0), k_new.stride(0), v_new.stride(0),
        SPLITS=splits, PAGE=page, KV=KV, GROUP=H // KV, HD=hd,
        BLOCK_G=max(16, triton.next_power_of_2(H // KV)), BLOCK_D=block_d, BLOCK_N=64,
        num_warps=4, num_stages=3)
    if splits > 1:
        _merge_kernel[(B, H)](
            part, lse, out, HEADS=H, SPLITS=splits, HD=hd, BLOCK_D=block_d, num_warps=2)
    return out


def decode_attention(q, k_new, v_new, k_pages, v_pages, block_table, lengths):
    """-> o (B, n_head, hd) of one new token per row; its key and value are stored in their page on
    the way. No gradient."""
    B, H, hd = q.shape
    pages, page, KV, _ = k_pages.shape
    for name, x, heads in ("q", q, H), ("k_new", k_new, KV), ("v_new", v_new, KV):
        expect_heads(name, x, (B, heads, hd), (k_pages.dtype,))
    expect_dense("k_pages", k_pages, (pages, page, KV, hd))
    expect_dense("v_pages", v_pages, (pages, page, KV, hd), (k_pages.dtype,))
    expect("block_table", block_table, (B, block_table.shape[1]), (torch.int32,))
    expect("lengths", lengths, (B,), (torch.int32,))
    assert H % KV == 0, f"{H} query heads cannot share {KV} key heads"
    expect_ids("lengths", lengths, block_table.shape[1] * page)
    expect_ids("block_table", block_table, pages)

    name = picked("decode", q.device.type)
    if name == "flash" and (page % 256 or (q.is_cuda and q.dtype == torch.float32)):
        name = "triton" if fused(q) else "torch"  # flash-attn's pages hold multiples of 256 keys
    return RUNS["decode"][name](q, k_new, v_new, k_pages, v_pages, block_table, lengths)


# -----------------------------------------------------------------------------
# log-probs and entropy from hidden states and head weight: z = h W^T / temperature,
#   logp_k = z[id_k] - lse(z)            d logp_k / dz = 1[id_k] - p
#   H      = lse(z) - sum p z            d H / dz      = -p (z - lse + H)
# The only state kept for the backward is lse and H: two numbers per row.


CHUNK = 1 << 22  # logits alive at a time: 16 MB of fp32 stay in a CPU's last-level cache
TILE = 1 << 27   # and on a GPU, where a product wants thousands of rows: 512 MB


def _slices(rows_ND, vocab):
    """Chunks of rows whose logits are so many numbers together."""
    numbers = CHUNK if rows_ND.device.type == "cpu" else TILE
    rows = max(16, numbers // vocab)
    return [slice(a, a + rows) for a in range(0, max(1, len(rows_ND)), rows)]


def _product(a, b):
    """a @ b, not rounded to half precision: a logit of 20 in bf16 is off by up to 0.06."""
    if parity.ON and parity.PRODUCT == "triton":
        return parity.multiply(a, b.t(), dtype=torch.float32)
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    z = cpu.matmul_t(a, b.t())
    return z if z.dtype == torch.float64 else z.float()


def linear_logits(hidden, weight, temperature=1.0):
    """(N, V), for the sampler, which needs them all. In fp32, as the trainer computes them."""
    z = _product(hidden, weight.t())
    return z.div_(temperature) if temperature != 1.0 else z


class _LogprobAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_NK, temperature):
        logps, lses, entropies = [], [], []
        for s in _slices(ids_NK, len(weight_VD)):
            z = linear_logits(hidden_ND[s], weight_VD, temperature)  # (n, V)
            lse = z.logsumexp(1, keepdim=True)
            z -= lse
            logps.append(z.gather(1, ids_NK[s]))
            lses.append(lse)
            entropies.append(-(z.exp() * z).sum(1))
        lse_N1, entropy_N = torch.cat(lses), torch.cat(entropies)
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, lse_N1, entropy_N)
        ctx.temperature = temperature
        return torch.cat(logps), entropy_N

    @staticmethod
    def backward(ctx, grad_NK, grad_entropy_N):
        hidden_ND, weight_VD, ids_NK, lse_N1, entropy_N = ctx.saved_tensors
        grad_h = torch.empty_like(hidden_ND)
        grad_w = torch.zeros_like(weight_VD, dtype=lse_N1.dtype) if ctx.needs_input_grad[1] else None
        flat_N = grad_NK.sum(1) + grad_entropy_N * entropy_N
        for s in _slices(ids_NK, len(weight_VD)):
            z = linear_logits(hidden_ND[s], weight_VD, ctx.temperature) - lse_N1[s]
            dz = -z.exp() * (flat_N[s].unsqueeze(1) + grad_entropy_N[s].unsqueeze(1) * z)
            dz.scatter_add_(1, ids_NK[s], grad_NK[s]).div_(ctx.temperature)
            dz = dz.to(hidden_ND.dtype)
            grad_h[s] = dz @ weight_VD
            if grad_w is not None:
                grad_w += dz.t() @ hidden_ND[s]
        return grad_h, None if grad_w is None else grad_w.to(weight_VD.dtype), None, None


def logprob_torch(hidden_ND, weight_VD, ids_NK, temperature):
    return _LogprobAt.apply(hidden_ND, weight_VD, ids_NK, temperature)


# On a GPU the product stays with cuBLAS and the kernels do the rest, tile by tile of the vocabulary.
# One kernel for both would save reading the logits back, a tenth of the product's time at D = 4096 and
# a third at D = 1024 (arithmetic for an H200, not timings); but the product, 2 D FLOP per logit, is
# nearly all of the time, and cuBLAS runs it near the ceiling of every GPU. Tiles are larger in the
# backward, where each also adds to dH (N, D); smaller ones in the forward would last less than Python
# takes to launch them.
FORWARD_TILE = 1 << 24  # logits: 64 MB of fp32
BACKWARD_TILE = TILE    # and half of it again for their gradient in bf16


@jit
def _online_kernel(z, ids, m_N, s_N, t_N, at_NK, inverse_N, low, width, K,
                   BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """Folds one row of a tile of logits z[low : low + width] into three running numbers (online
    softmax, arXiv 1805.02867):
        m = max z,   s = sum e^(z - m),   t = sum (z - m) e^(z - m)
    A new maximum m' rescales  s -> s e^(m - m'),  t -> (t + (m - m') s) e^(m - m').  At the end
    lse = m + log s,  H = log s - t / s.  Ids that fall into the tile are read off."""
    row = tl.program_id(0).to(tl.int64)
    z += row * width
    inverse = tl.load(inverse_N + row)     # of the temperature
    m = tl.load(m_N + row)
    s = tl.load(s_N + row)
    t = tl.load(t_N + row)

    for block in range(0, width, BLOCK_V):
        cols = block + tl.arange(0, BLOCK_V)
        x = tl.load(z + cols, mask=cols < width, other=-float("inf")) * inverse
        m_new = tl.maximum(m, tl.max(x, 0))
        rescale = tl.exp(m - m_new)
        e = tl.exp(x - m_new)
        more = tl.where(e > 0, (x - m_new) * e, 0.0)  # 0, not nan, where z is -inf
        t = (t + (m - m_new) * s) * rescale + tl.sum(more, 0)
        s = s * rescale + tl.sum(e, 0)
        m = m_new

    tl.store(m_N + row, m)
    tl.store(s_N + row, s)
    tl.store(t_N + row, t)

    k = tl.arange(0, BLOCK_K)
    offsets = row * K + k
    cols = tl.load(ids + offsets, mask=k < K, other=-1) - low
    mask = (cols >= 0) & (cols < width) & (k < K)
    tl.store(at_NK + offsets, tl.load(z + cols, mask=mask, other=0.0) * inverse, mask=mask)


@jit
def _dlogits_kernel(z, dz, ids, m_N, log_s_N, entropy_N, grad_NK, grad_entropy_N, low, width, K,
                    inv_temperature, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """dz = (sum_k g_k 1[id_k] - p (sum_k g_k + g_H (z - lse + H))) / temperature for one row of a
    tile, by a store of the second term everywhere and then of both where an id points. An id named
    twice gets the sum of its gradients from each of its two stores: the same number, so their order
    does not matter and nothing is atomic. lse comes as its two halves m and log s, because z - m is
    exact where p is large and m + log s would be rounded."""
    row = tl.program_id(0).to(tl.int64)
    z += row * width
    dz += row * width
    k = tl.arange(0, BLOCK_K)
    ids_K = tl.load(ids + row * K + k, mask=k < K, other=-1) - low
    grad = tl.load(grad_NK + row * K + k, mask=k < K, other=0.0)
    m = tl.load(m_N + row)
    log_s = tl.load(log_s_N + row)
    grad_H = tl.load(grad_entropy_N + row)
    flat = tl.sum(grad, 0) + grad_H * tl.load(entropy_N + row)

    for block in range(0, width, BLOCK_V):
        cols = block + tl.arange(0, BLOCK_V)
        mask = cols < width
        x = tl.load(z + cols, mask=mask, other=0.0) * inv_temperature - m - log_s
        dx = -tl.exp(x) * (flat + grad_H * x) * inv_temperature
        tl.store(dz + cols, dx, mask=mask)

    tl.debug_barrier()  # all threads finish the stores above before those below
    mask = (ids_K >= 0) & (ids_K < width) & (k < K)
    x = tl.load(z + ids_K, mask=mask, other=0.0) * inv_temperature - m - log_s
    hits = tl.sum(tl.where(ids_K[:, None] == ids_K[None, :], grad[None, :], 0.0), 1)
    dx = (hits - tl.exp(x) * (flat + grad_H * x)) * inv_temperature
    tl.store(dz + ids_K, dx, mask=mask)


def _tiles(rows, vocab, numbers):
    """Slices of the vocabulary whose logits, all rows together, are about `numbers`; with --parity of
    one width."""
    width = parity.WIDTH if parity.ON else max(1024, numbers // max(1, rows) // 128 * 128)
    return [(low, min(low + width, vocab)) for low in range(0, vocab, width)]


def _fold(hidden_ND, weight_VD, ids_NK, inverse_N, logits_NV=None):
    """-> at, m, s, t of _online_kernel over the whole vocabulary. inverse_N: 1 / temperature. logits_NV:
    filled, for a sampler, which needs them all."""
    N, K = ids_NK.shape
    m_N = torch.full_like(inverse_N, -1e30)
    s_N = torch.zeros_like(m_N)
    t_N = torch.zeros_like(m_N)
    at_NK = m_N.new_empty(N, K)
    for low, high in _tiles(N, weight_VD.shape[0], FORWARD_TILE):
        z = _product(hidden_ND, weight_VD[low:high].t())  # (N, tile)
        _online_kernel[(N,)](
            z, ids_NK, m_N, s_N, t_N, at_NK, inverse_N, low, high - low, K,
            BLOCK_V=1024, BLOCK_K=max(16, triton.next_power_of_2(K)), num_warps=4)
        if logits_NV is not None:
            logits_NV[:, low:high] = z
        del z  # so that the next tile gets the same, still cached, memory
    return at_NK, m_N, s_N, t_N


class _LogprobFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_NK, temperature):
        inverse_N = hidden_ND.new_full((len(ids_NK),), temperature, dtype=torch.float32).reciprocal()
        at_NK, m_N, s_N, t_N = _fold(hidden_ND, weight_VD, ids_NK, inverse_N)
        log_s_N = s_N.log()
        entropy_N = log_s_N - t_N / s_N
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, m_N, log_s_N, entropy_N)
        ctx.temperature = temperature
        return at_NK.sub_(m_N.unsqueeze(1)).sub_(log_s_N.unsqueeze(1)), entropy_N

    @staticmethod
    def backward(ctx, grad_NK, grad_entropy_N):
        hidden_ND, weight_VD, ids_NK, m_N, log_s_N, entropy_N = ctx.saved_tensors
        N, K = ids_NK.shape
        grad_h = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_w = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_NK = grad_NK.contiguous()
        grad_entropy_N = grad_entropy_N.contiguous()

        for low, high in _tiles(N, weight_VD.shape[0], BACKWARD_TILE):
            z = _product(hidden_ND, weight_VD[low:high].t())  # again: cheaper than keeping it
            dz = torch.empty_like(z, dtype=hidden_ND.dtype)
            _dlogits_kernel[(N,)](
                z, dz, ids_NK, m_N, log_s_N, entropy_N, grad_NK, grad_entropy_N, low, high - low, K,
                1 / ctx.temperature, BLOCK_V=2048, BLOCK_K=max(16, triton.next_power_of_2(K)), num_warps=4)
            grad_h += _product(dz, weight_VD[low:high])
            if grad_w is not None:  # all rows in one product: rounded once
                torch.mm(dz.t(), hidden_ND, out=grad_w[low:high])
            del z, dz
        return grad_h.to(hidden_ND.dtype), grad_w, None, None


def _logprob(hidden_ND, weight_VD, ids_NK, temperature):
    hidden_ND = hidden_ND.contiguous()
    ids_NK = ids_NK.contiguous()
    N, D = hidden_ND.shape
    V, K = weight_VD.shape[0], ids_NK.shape[1]
    expect("hidden", hidden_ND, (N, D))
    expect("weight", weight_VD, (V, D), (hidden_ND.dtype,))
    expect("ids", ids_NK, (N, K), (torch.int64,))
    expect_ids("ids", ids_NK, V)
    assert temperature > 0, f"temperature {temperature}: a softmax needs one above 0"

    if fused(hidden_ND) and N and K <= 64:  # beyond, a row's (K, K) comparison outgrows its program
        return _LogprobFused.apply(hidden_ND, weight_VD, ids_NK, temperature)
    if cpu.fp32(hidden_ND) and cpu.stands_for(cpu.logprob, logprob_torch):
        return cpu.logprob(hidden_ND, weight_VD, ids_NK, temperature)
    return logprob_torch(hidden_ND, weight_VD, ids_NK, temperature)


def linear_logprob(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """-> logp_N of the targets and entropy_N, both under softmax(h W^T / temperature), in fp32
    (fp64 for fp64 input)."""
    logp_N1, entropy_N = _logprob(hidden_ND, weight_VD, targets_N.unsqueeze(1), temperature)
    return logp_N1.squeeze(1), entropy_N


def linear_logprob_at(hidden_ND, weight_VD, ids_NK, temperature=1.0):
    """-> logp_NK of K ids per row, under the full softmax."""
    return _logprob(hidden_ND, weight_VD, ids_NK, temperature)[0]


def linear_topk(hidden_ND, weight_VD, k, temperature=1.0):
    """-> ids_NK and logp_NK of the k most likely tokens of each row, most likely first."""
    V = weight_VD.shape[0]
    assert 0 < k <= V, f"k = {k} of a vocabulary of {V}"
    with torch.no_grad():
        chunks = [linear_logits(hidden_ND[s], weight_VD).topk(k, dim=1) for s in _slices(hidden_ND, V)]
        ids_NK = torch.cat([chunk.indices for chunk in chunks])
    return ids_NK, linear_logprob_at(hidden_ND, weight_VD, ids_NK, temperature)


# -----------------------------------------------------------------------------
# the small steps of a layer


def linear(x, weight, bias=None, strided=False):
    """x W^T + b. strided: the result goes into another step at once, and may be a transposed view."""
    if parity.ON and parity.PRODUCT == "triton":
        return parity.linear(x, weight, bias)
    return cpu.linear(x, weight, bias, strided) if cpu.fp32(x) else F.linear(x, weight, bias)


def rope_tables(positions_T, inv_freq, scale=1.0):
    """cos and sin (T, head_dim/2) of these positions: computed, so no table can be too short."""
    angle = positions_T.unsqueeze(1) * inv_freq
    cos, sin = angle.cos(), angle.sin()
    return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


def rope(x_THd, cos_T, sin_T):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the two halves of each head, in fp32 for
    half-precision input."""
    cos = torch.cat((cos_T, cos_T), 1).unsqueeze(1)
    sin = torch.cat((-sin_T, sin_T), 1).unsqueeze(1)
    if x_THd.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    # The halves change places: three passes over x, where halves cut and joined again take six.
    return torch.addcmul(x_THd * cos, x_THd.roll(x_THd.shape[-1] // 2, -1), sin).to(x_THd.dtype)


def qk_norm_rope_torch(q, k, q_weight, k_weight, cos_T, sin_T, eps):
    if q_weight is not None:
        q = F.rms_norm(q, q.shape[-1:], q_weight, eps)
        k = F.rms_norm(k, k.shape[-1:], k_weight, eps)
    return rope(q, cos_T, sin_T), rope(k, cos_T, sin_T)


@jit
def _norm_rope_rows(pid, x, grad, out, dw, weight, cos, sin, T, stride, eps, HEADS, HALF, BLOCK_R, BLOCK_D):
    """BLOCK_R heads, counted through all tokens: x1 and x2 are the two halves of each, normalised."""
    rows = pid * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.arange(0, BLOCK_D)
    tokens = rows // HEADS
    mask = (rows < T * HEADS)[:, None] & (cols < HALF)[None, :]
    offsets = tokens[:, None].to(tl.int64) * stride + (rows % HEADS * 2 * HALF)[:, None]
    offsets = offsets + cols[None, :]
    x1 = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    x2 = tl.load(x + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    cos_RD = tl.load(cos + tokens[:, None] * HALF + cols[None, :], mask=mask, other=0.0)
    sin_RD = tl.load(sin + tokens[:, None] * HALF + cols[None, :], mask=mask, other=0.0)

    w1 = 1.0
    w2 = 1.0
    if weight is not None:
        inv_rms = tl.rsqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)[:, None]
        x1 = x1 * inv_rms
        x2 = x2 * inv_rms
        w1 = tl.load(weight + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]

    offsets = rows[:, None].to(tl.int64) * 2 * HALF + cols[None, :]  # grad and out are contiguous
    if grad is None:
        x1 = x1 * w1
        x2 = x2 * w2
        tl.store(out + offsets, x1 * cos_RD - x2 * sin_RD, mask=mask)
        tl.store(out + offsets + HALF, x2 * cos_RD + x1 * sin_RD, mask=mask)
    else:
        g1 = tl.load(grad + offsets, mask=mask, other=0.0).to(tl.float32)
        g2 = tl.load(grad + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
        g1, g2 = g1 * cos_RD + g2 * sin_RD, g2 * cos_RD - g1 * sin_RD  # the rotation turned back
        if weight is not None:
            # the caller sums dw over programs
            tl.store(dw + pid * 2 * HALF + cols, tl.sum(g1 * x1, 0), mask=cols < HALF)
            tl.store(dw + pid * 2 * HALF + HALF + cols, tl.sum(g2 * x2, 0), mask=cols < HALF)
            g1 = g1 * w1
            g2 = g2 * w2
            along = ((tl.sum(g1 * x1, 1) + tl.sum(g2 * x2, 1)) / (2 * HALF))[:, None]
            g1 = (g1 - x1 * along) * inv_rms
            g2 = (g2 - x2 * along) * inv_rms
        tl.store(out + offsets, g1, mask=mask)
        tl.store(out + offsets + HALF, g2, mask=mask)


@jit
def _norm_rope_kernel(q, k, q_grad, k_grad, q_out, k_out, dw_q, dw_k, q_weight, k_weight, cos, sin,
                      T, q_stride, k_stride, eps, H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr,
                      BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """x / sqrt(mean x^2 + eps) * weight (arXiv 1910.07467), then the rotation of arXiv 2104.09864,
    read once and written once. Given the gradients of that, it writes those of x and of the weight
    instead; with x^ = x / rms:
        dw = sum g x^,   dx = (g w - x^ mean(g w x^)) / rms
    The first programs take the query heads, the rest the key heads. Rounded once, at the store."""
    pid = tl.program_id(0)
    first = tl.cdiv(T * H, BLOCK_R)
    if pid < first:
        _norm_rope_rows(pid, q, q_grad, q_out, dw_q, q_weight, cos, sin, T, q_stride, eps,
                        H, HALF, BLOCK_R, BLOCK_D)
    else:
        _norm_rope_rows(pid - first, k, k_grad, k_out, dw_k, k_weight, cos, sin, T, k_stride, eps,
                        KV, HALF, BLOCK_R, BLOCK_D)


def _norm_rope(q, k, weights, cos, sin, eps, grads=(None, None)):
    """-> q and k turned; or, given the gradients of those, dq and dk, and the parts of each dw. Tiles
    of 2,048 pairs, 16 per thread: 72 registers forward and 123 backward; 4,096 take 164 and 206."""
    half = q.shape[2] // 2
    block_d = triton.next_power_of_2(half)
    block_r = max(1, 2048 // block_d)
    programs = [-(-x.shape[0] * x.shape[1] // block_r) for x in (q, k)]
    outs = [x.new_empty(x.shape) for x in (q, k)]
    dws = [None, None]
    if grads[0] is not None:
        dws = [q.new_empty(n, 2 * half, dtype=torch.float32) for n in programs]
    _norm_rope_kernel[(sum(programs),)](
        q, k, *grads, *outs, *dws, *weights, cos, sin, len(q), q.stride(0), k.stride(0), eps,
        H=q.shape[1], KV=k.shape[1], HALF=half, BLOCK_R=block_r, BLOCK_D=block_d)
    return *outs, *dws


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps):
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        return _norm_rope(q, k, (q_weight, k_weight), cos, sin, eps)[:2]

    @staticmethod
    def backward(ctx, *grads):  # the norm is recomputed: q and k are kept anyway
        q, k, *weights, cos, sin = ctx.saved_tensors
        grads = [grad.contiguous() for grad in grads]
        dq, dk, *dws = _norm_rope(q, k, weights, cos, sin, ctx.eps, grads)
        dws = [None if w is None else dw.sum(0).to(w.dtype) for w, dw in zip(weights, dws)]
        return dq, dk, *dws, None, None, None


def rms_norm_torch(x, weight, eps):
    return F.rms_norm(x, weight.shape, weight, eps)


def rms_norm(x, weight, eps):
    if cpu.decoding(x) and cpu.stands_for(cpu.rms_norm, rms_norm_torch):
        return cpu.rms_norm(x, weight, eps)
    if cpu.training(x) and cpu.stands_for(norms.norm, rms_norm_torch):
        return norms.norm(x, weight, eps)
    return rms_norm_torch(x, weight, eps)


def qk_norm_rope(q, k, q_weight, k_weight, cos_T, sin_T, eps):
    """RMSNorm over each head (no weights: no norm), then RoPE; (T, heads, head_dim) both."""
    args = q, k, q_weight, k_weight, cos_T, sin_T, eps
    if cpu.decoding(q) and cpu.stands_for(cpu.qk_norm_rope, qk_norm_rope_torch):
        return cpu.qk_norm_rope(*args)
    if not fused(q):
        normed = q_weight is not None
        if normed and cpu.training(q) and cpu.stands_for(norms.norm_rope, qk_norm_rope_torch):
            return norms.norm_rope(*args)
        return qk_norm_rope_torch(*args)

    T, H, hd = q.shape
    expect_heads("q", q, (T, H, hd))
    expect_heads("k", k, (T, k.shape[1], hd), (q.dtype,))
    expect_dense("cos", cos_T, (T, hd // 2), (torch.float32,))
    expect_dense("sin", sin_T, (T, hd // 2), (torch.float32,))
    if q_weight is not None:
        expect("q_weight", q_weight, (hd,))
        expect("k_weight", k_weight, (hd,))
    return _NormRope.apply(*args)


# There is no RMSNorm kernel here: on a GPU F.rms_norm is fused already, and a Triton one of the usual
# kind loses to it at small widths.


def swiglu_torch(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@jit
def _swiglu_kernel(x, out, width, BLOCK: tl.constexpr):
    """silu(gate) up, silu(x) = x / (1 + e^-x) (arXiv 2002.05202)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    offsets = row * 2 * width + cols
    gate = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + offsets + width, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + cols, gate * tl.sigmoid(gate) * up, mask=mask)


@jit
def _swiglu_back_kernel(x, grad, dx, width, BLOCK: tl.constexpr):
    """dup = g silu(gate),  dgate = g up sigma (1 + gate (1 - sigma)) with sigma = sigmoid(gate)."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    offsets = row * 2 * width + cols
    gate = tl.load(x + offsets, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(x + offsets + width, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + row * width + cols, mask=mask, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    tl.store(dx + offsets, g * up * sigma * (1 + gate * (1 - sigma)), mask=mask)
    tl.store(dx + offsets + width, g * gate * sigma, mask=mask)


class _Swiglu(torch.autograd.Function):  # BLOCK 1024: 8 columns per thread
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        T, width = x.shape[0], x.shape[1] // 2
        out = x.new_empty(T, width)
        _swiglu_kernel[(T, -(-width // 1024))](x, out, width, BLOCK=1024)
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        T, width = x.shape[0], x.shape[1] // 2
        dx = torch.empty_like(x)
        _swiglu_back_kernel[(T, -(-width // 1024))](x, grad.contiguous(), dx, width, BLOCK=1024)
        return dx


def swiglu(gate_up):
    """silu(gate) * up of one merged projection (T, 2 d_ff)."""
    if cpu.decoding(gate_up) and cpu.stands_for(cpu.swiglu, swiglu_torch):
        return cpu.swiglu(gate_up)
    if not fused(gate_up):
        return swiglu_torch(gate_up)
    T, width = gate_up.shape
    expect_dense("gate_up", gate_up, (T, 2 * (width // 2)))
    return _Swiglu.apply(gate_up)


# -----------------------------------------------------------------------------
# the addressed uniform: a hash of (seed, visit, problem, index, position). 32-bit multiplies and
# xor-shifts, done in int64 and masked, so that torch on any device and Triton give the same 24 bits
# for ever (test vectors: tests/).


def _mix(h, word):
    """One word into the hash. Python runs these lines on torch tensors, Triton compiles them: the same
    text is the same bits."""
    h = h ^ (word & 0xFFFFFFFF)
    h = (h * 0x85EBCA6B) & 0xFFFFFFFF
    h = h ^ (h >> 15)
    h = (h * 0xC2B2AE35) & 0xFFFFFFFF
    h = h ^ (h >> 13)
    h = (h * 0x27D4EB2F + 0x165667B1) & 0xFFFFFFFF
    return h ^ (h >> 16)


_mix_jit = jit(_mix)


@jit
def _uniform_kernel(out, address, position, n, BLOCK: tl.constexpr):
    """One launch instead of torch's ten, in every step of the sampler."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < n
    h = _mix_jit(tl.load(address + cols, mask=mask, other=0), tl.load(position + cols, mask=mask, other=0))
    tl.store(out + cols, (h >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=mask)  # 2^-24


def uniform(seed, visit, problem, index, position, device=None):
    """One number in [0, 1) for each address; the five words are ints or int64 tensors that
    broadcast."""
    words = seed, visit, problem, index, position
    device = torch.device(device or next((w.device for w in words if torch.is_tensor(w)), "cpu"))
    if not torch.is_tensor(position):
        # a fill, not a copy: copying a number to a GPU would make it wait
        position = torch.full((), position, dtype=torch.int64, device=device)
    return uniform_at(address(seed, visit, problem, index, device), position)


def address(seed, visit, problem, index, device=None):
    """The hash of the four words that do not change while a sequence grows."""
    h = torch.full((), 0x9E3779B9, dtype=torch.int64, device=device or index.device)
    for word in (seed, visit, problem, index):
        h = _mix(h, word)
    return h


def uniform_at(address, position):
    """uniform() with its first four words hashed before: the same bits for a fifth of the work."""
    if fused(address):
        address, position = (x.contiguous() for x in torch.broadcast_tensors(address, position))
        out = torch.empty(address.shape, dtype=torch.float32, device=address.device)
        _uniform_kernel[(-(-out.numel() // 256),)](out, address, position, out.numel(), BLOCK=256)
        return out
    return (_mix(address, position) >> 8).to(torch.float32) * 2.0**-24


# -----------------------------------------------------------------------------
# the draw: one token per row by inverse CDF, in vocabulary order (no sort unless a row truncates)


def truncated(p_NV, top_k_N=None, top_p_N=None):
    """-> p with zeros where top-k, then top-p, cut, and the log of the mass that survived (0 where
    nothing was cut)."""
    sorted_p, order = p_NV.sort(dim=1, descending=True, stable=True)
    before = sorted_p.cumsum(1).sub_(sorted_p)  # mass strictly ahead of each token
    rank = torch.arange(p_NV.shape[1], device=p_NV.device)
    keep = torch.ones_like(p_NV, dtype=torch.bool)

    if top_k_N is not None:
        keep &= (rank < top_k_N.unsqueeze(1)) | (top_k_N == 0).unsqueeze(1)
    if top_p_N is not None:  # top-p of what top-k left, as the rest of the field does it
        mass = (sorted_p * keep).sum(1, keepdim=True)
        keep &= (before < top_p_N.unsqueeze(1) * mass) | (top_p_N >= 1).unsqueeze(1)
    keep[:, 0] = True

    p_NV = p_NV * torch.zeros_like(keep).scatter_(1, order, keep)
    return p_NV, torch.where(keep.all(1), 0.0, p_NV.sum(1).log())


def inverse_cdf(p_NV, uniform_N):
    """The first token at which the running sum of p passes u times the whole sum."""
    cdf = p_NV.cumsum(1)
    total = cdf[:, -1:]
    # Strictly below the total, so that the first entry above it exists and its token has weight.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform_N.to(p_NV.dtype).unsqueeze(1) * total, below)
    token_N = torch.searchsorted(cdf, target, right=True).squeeze(1)
    # Logits that are not finite may point past the end; their log-prob is nan, the caller's to see.
    return token_N.clamp_(max=p_NV.shape[1] - 1)


def draw_torch(logits_NV, uniform_N, temperature_N, top_k_N=None, top_p_N=None):
    greedy_N = temperature_N == 0
    z_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    z_NV = z_NV / torch.where(greedy_N, 1.0, temperature_N).to(z_NV.dtype).unsqueeze(1)
    p_NV = z_NV.softmax(1)
    kept_NV = p_NV
    kept_N = z_NV.new_zeros(len(z_NV))
    if top_k_N is not None or top_p_N is not None:
        kept_NV, kept_N = truncated(p_NV, top_k_N, top_p_N)
    token_N = torch.where(greedy_N, z_NV.argmax(1), inverse_cdf(kept_NV, uniform_N))
    # A drawn token has weight, so the log of its p is as exact as p.
    logp_N = p_NV.gather(1, token_N.unsqueeze(1)).squeeze(1).log()
    return token_N, logp_N, torch.where(greedy_N, 0.0, kept_N)


DRAW_SLICE = 8192  # logits of one program: 32 per thread


@jit
def _order(x):
    """fp32 bits as an int32 that sorts like the number, so that a search over numbers is one over
    32 bits."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@jit
def _above(z, V, beta, m, cut, BLOCK):
    """How many tokens lie strictly above the cut, and their mass in units of e^m. Summed lane by
    lane, and over lanes once at the end."""
    count = tl.zeros([BLOCK], tl.int32)
    mass = tl.zeros([BLOCK], tl.float32)
    for block in range(0, V, BLOCK):
        cols = block + tl.arange(0, BLOCK)
        mask = cols < V
        x = tl.load(z + cols, mask=mask, other=-float("inf")).to(tl.float32) * beta
        above = (_order(x) > cut) & mask
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(x - m), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@jit
def _cut(z, V, beta, m, limit, COUNT, BLOCK):
    """Bisection: the lowest cut above which fewer than `limit` tokens (or less than `limit` mass)
    lie. 32 halvings of the 32 bits end at a logit that exists. Each reads the row again, from the
    L2 cache; a sort would move it through memory."""
    low = tl.full((), -2147483648, tl.int32)
    high = _order(m)
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)  # the mean without overflow
        count, mass = _above(z, V, beta, m, middle, BLOCK)
        if COUNT:
            fits = count < limit
        else:
            fits = mass < limit
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, middle + 1)

    count, mass = _above(z, V, beta, m, high, BLOCK)
    back = high ^ ((high >> 31) & 0x7FFFFFFF)
    return high, count, mass, tl.exp(back.to(tl.float32, bitcast=True) - m)


@jit
def _slice_kernel(logits, temperature, m_out, s_out, stride, V, SLICES, SLICE: tl.constexpr):
    """A program takes one slice of one row: its maximum m and the sum of e^(x - m). A batch of 64 rows
    has fewer rows than a GPU has multiprocessors; its slices are a thousand."""
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    beta = tl.load(temperature + row).to(tl.float32)
    beta = 1 / tl.where(beta == 0, 1.0, beta)

    cols = piece * SLICE + tl.arange(0, SLICE)
    x = tl.load(logits + row * stride + cols, mask=cols < V, other=-float("inf")).to(tl.float32) * beta
    m = tl.maximum(tl.max(x, 0), -1e30)  # a slice of excluded tokens has sum 0, not nan
    tl.store(m_out + row * SLICES + piece, m)
    tl.store(s_out + row * SLICES + piece, tl.sum(tl.exp(x - m), 0))


@jit
def _draw_kernel(logits, uniform, temperature, top_k, top_p, m_in, s_in, token_out, logp_out, kept_out,
                 stride, V, SLICES, SLICE: tl.constexpr, BLOCK_S: tl.constexpr,
                 BLOCK: tl.constexpr):
    """A program takes one row: (1) its slices' maxima and sums become the row's, (2) where to cut, if
    the row truncates, (3) the token at which the running sum of what was kept passes u. What is kept
    is all above the cut and the first `ties` tokens equal to it. A row that keeps everything reads
    only the slice in which u falls, and a greedy one only that of its maximum."""
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * stride
    beta = tl.load(temperature + row).to(tl.float32)
    greedy = beta == 0
    beta = 1 / tl.where(greedy, 1.0, beta)

    # (1) the row's maximum m and sum s of e^(x - m)
    pieces = tl.arange(0, BLOCK_S)
    mask_S = pieces < SLICES
    m_S = tl.load(m_in + row * SLICES + pieces, mask=mask_S, other=-1e30)
    m = tl.max(m_S, 0)
    s_S = tl.load(s_in + row * SLICES + pieces, mask=mask_S, other=0.0) * tl.exp(m_S - m)
    s = tl.sum(s_S, 0)

    # (2) the cut
    cut = tl.full((), -2147483648, tl.int32)
    ties = V
    mass = s
    if top_k is not None:
        k = tl.load(top_k + row).to(tl.int32)
        if (k > 0) & (k < V):
            cut, count, above, e = _cut(z, V, beta, m, k, True, BLOCK)
            ties = k - count
            mass = above + ties * e
    if top_p is not None:  # of the mass that top-k left
        p = tl.load(top_p + row).to(tl.float32)
        if p < 1:
            cut_p, count, above, e = _cut(z, V, beta, m, p * mass, False, BLOCK)
            # As many ties as begin below the limit.
            wanted = tl.maximum(tl.ceil((p * mass - above) / e), 1.0)
            wanted = tl.minimum(wanted, V * 1.0).to(tl.int32)
            ties = tl.where(cut_p == cut, tl.minimum(ties, wanted), wanted)
            cut = cut_p
            mass = above + ties * e
    whole = greedy | (ties == V)

    # (3) the token
    target = tl.load(uniform + row) * mass
    passed = tl.where(greedy, m_S == m, tl.cumsum(s_S, 0) > target) & (s_S > 0)
    piece = tl.min(tl.where(passed, pieces, BLOCK_S), 0)
    piece = tl.where(piece < BLOCK_S, piece, tl.max(tl.where(s_S > 0, pieces, 0), 0))
    start = tl.where(whole, piece * SLICE, 0)
    end = tl.where(whole, tl.minimum(start + SLICE, V), V)
    run = tl.where(whole, tl.sum(tl.where(pieces < piece, s_S, 0.0), 0), 0.0)

    seen = tl.full((), 0, tl.int32)
    token = tl.full((), 0, tl.int32) + V
    last = start
    for block in range(start, end, BLOCK):
        cols = block + tl.arange(0, BLOCK)
        x = tl.load(z + cols, mask=cols < end, other=-float("inf")).to(tl.float32) * beta
        e = tl.exp(x - m)
        if top_k is not None or top_p is not None:
            tie = ((_order(x) == cut) & (cols < end)).to(tl.int32)
            nth = seen + tl.cumsum(tie, 0) - tie
            e = tl.where((_order(x) > cut) | ((tie > 0) & (nth < ties)), e, 0.0)
            seen += tl.sum(tie, 0)
        hit = tl.where(greedy, x == m, (run + tl.cumsum(e, 0) > target) & (e > 0))
        token = tl.minimum(token, tl.min(tl.where(hit, cols, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0, cols, 0), 0))
        run += tl.sum(e, 0)

    # No token passed: u was at the very end, and the sums were rounded the other way.
    token = tl.where(token < V, token, last)
    x = tl.load(z + token).to(tl.float32) * beta
    tl.store(token_out + row, token)
    tl.store(logp_out + row, x - m - tl.log(s))
    tl.store(kept_out + row, tl.where(whole, 0.0, tl.log(run / s)))


def draw(logits_NV, uniform_N, temperature_N, top_k_N=None, top_p_N=None):
    """-> token_N, logp_N, kept_N.

    logp is under the full tempered softmax, whatever was truncated; kept is the log of the mass that
    survived top-k, then top-p (0 without truncation). temperature 0: the most likely token (the first
    on a tie), logp at temperature 1. top_k 0 and top_p 1 mean no truncation. None for both skips the
    search."""
    N, V = logits_NV.shape
    expect("logits", logits_NV, (N, V))
    rows = {"uniform": uniform_N, "temperature": temperature_N, "top_k": top_k_N, "top_p": top_p_N}
    for name, x in rows.items():
        if x is not None:
            expect(name, x, (N,))
    args = logits_NV, uniform_N, temperature_N, top_k_N, top_p_N
    if cpu.decoding(logits_NV) and cpu.stands_for(cpu.draw, draw_torch, truncated, inverse_cdf):
        return cpu.draw(*args, truncated, inverse_cdf)
    if not fused(logits_NV):
        return draw_torch(*args)

    logp_N = logits_NV.new_empty(N, dtype=torch.float32)
    kept_N = torch.empty_like(logp_N)
    token_N = torch.empty_like(logp_N, dtype=torch.int64)
    slices = -(-V // DRAW_SLICE)
    m_NS = logp_N.new_empty(N, slices)
    s_NS = torch.empty_like(m_NS)
    stride = logits_NV.stride(0)

    _slice_kernel[(N, slices)](
        logits_NV, temperature_N, m_NS, s_NS, stride, V, slices, SLICE=DRAW_SLICE, num_warps=8)
    _draw_kernel[(N,)](
        logits_NV, uniform_N, temperature_N, top_k_N, top_p_N, m_NS, s_NS, token_N, logp_N, kept_N,
        stride, V, slices, SLICE=DRAW_SLICE, BLOCK_S=max(16, triton.next_power_of_2(slices)), BLOCK=4096,
        num_warps=8)
    return token_N, logp_N, kept_N


def draw_next(hidden_ND, weight_VD, uniform_N, temperature_N, top_k_N=None, top_p_N=None):
    """draw() of the logits that follow from the hidden states."""
    args = uniform_N, temperature_N, top_k_N, top_p_N
    if parity.ON:
        return parity.draw(_fold, draw, hidden_ND, weight_VD, *args)
    return draw(linear_logits(hidden_ND, weight_VD), *args)


# -----------------------------------------------------------------------------
# which backend runs

RUNS = {
    "train": {"flash": flash, "varlen": varlen, "parity": parity.packed, "torch": None},
    "decode": {"flash": flash_decode, "triton": _triton_decode, "parity": parity.decode,
               "torch": decode_attention_torch},
    "fused": {"triton": (_LogprobFused.apply, _NormRope.apply, _Swiglu.apply),
              "torch": (logprob_torch, qk_norm_rope_torch, swiglu_torch)},
}


def outcome(what, name, kind, low, dtype):
    run = RUNS[what][name]
    if what == "train":
        cu, max_len, parent = PROBED_ROW
        run = in_one_call(run, cu, ancestry(cu, parent)) if run else packed_attention_torch(*PROBED_ROW)
    return PROBES[what](run, kind, low, dtype)


def picked(what, kind):
    """The name of what runs "train" attention, "decode" attention or the "fused" steps there."""
    name = chosen(what, kind) or choose(what, kind, candidates(what, kind), outcome)
    return "parity" if parity.ON and what != "fused" else name


def backend(device):
    """In words, for the log. Picks what has not been picked: call it before the first step, because a
    CUDA graph cannot be captured around a check."""
    kind = torch.device(device).type
    said = report(kind, {what: picked(what, kind) for what in RUNS})
    return f"{said}; {parity.FOUND}" if parity.ON else said


def main():
    other = "mps" if torch.backends.mps.is_available() else "cpu"
    print(backend("cuda" if torch.cuda.is_available() else other))


if __name__ == "__main__":
    main()
