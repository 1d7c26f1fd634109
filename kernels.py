"""
kernels.py: attention, log-probs of a head, the fused small steps of a layer, and the draw of a token.

Each function here is written in plain torch first: that twin is the definition, it runs anywhere (CPU, MPS, CUDA)
and every faster version is tested against it. This file is also the only place that picks a backend.

Deleted from the usual recipe, and why:
- no padding and no batch dimension: sequences lie one after another in a ragged row and `packed_attention` keeps
  them apart, so nothing else in the house knows where a sequence ends;
- no (N, V) tensor of logits: log-prob and entropy are computed from hidden states and head weight in chunks of rows,
  and the backward recomputes the chunk instead of keeping it;
- no random state: the uniform number of a token is a hash of its address (seed, visit, problem, index, position).
- no autotuner: block sizes are fixed, so that a run never depends on what another process was doing while it started.
  They were chosen from arithmetic and from the registers the compiler reports, not yet from a clock.

How to read a kernel: it is one program out of a grid, `tl.program_id` says which; it loads a tile, works in fp32
whatever the tensors are, and stores a tile. A mask covers what sticks out over the edge. Names in capitals are
constants of compilation.

    python kernels.py                          prints what runs on this machine, each kernel checked against its twin
    NANORL_ATTENTION=torch|varlen|flash ...    forces one            NANORL_CHECK=1 ...   range checks on the GPU too (slow)
"""

import functools
import importlib.util
import inspect
import math
import os
import types

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, varlen

from common.run import FEW, times, spare

try:
    import triton
    import triton.language as tl
except ImportError:                                              # a Mac: the twins run and the kernels are only text
    triton, tl = None, types.SimpleNamespace(constexpr=None)

jit = triton.jit if triton else lambda kernel: kernel
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"            # Triton's own switch: kernels run in numpy on CPU tensors
CHECK = os.environ.get("NANORL_CHECK") == "1"


def fused(x):
    """May this tensor go to a kernel? float64 never: the twins are what a gradient check checks. Nor in torch.compile, which fuses the
    twins itself, and takes what a kernel reads for what it writes where pointers went through a function."""
    return x.dtype != torch.float64 and not torch.compiler.is_compiling() and picked("fused", x.device.type) == "triton"


def expect(name, x, shape, dtypes=None):
    """Shapes and dtypes cost nothing to check; a wrong pointer costs the whole process."""
    assert tuple(x.shape) == tuple(shape), f"{name} is {tuple(x.shape)}, expected {tuple(shape)}"
    assert dtypes is None or x.dtype in dtypes, f"{name} is {x.dtype}, expected {' or '.join(str(d) for d in dtypes)}"
    assert x.stride(-1) == 1 or x.shape[-1] < 2 or x.numel() == 0, f"{name} {tuple(x.shape)}, stride {x.stride()}: rows not contiguous"


def expect_ids(name, ids, n):
    """0 <= ids < n. Reading a number back makes the GPU wait, so there only when NANORL_CHECK=1."""
    if ids.numel() and (CHECK or ids.device.type == "cpu"):
        low, high = int(ids.min()), int(ids.max())
        assert 0 <= low and high < n, f"{name} {tuple(ids.shape)} holds {low} .. {high}, allowed are 0 .. {n - 1}"


def to_device(numbers, dtype, device):
    """A list, an array or a tensor on the device without making the GPU wait: pinned memory, copied when the stream gets there."""
    x = torch.as_tensor(numbers, dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else x.to(device)


# -----------------------------------------------------------------------------
# attention over a packed row
#
#   cu_seqlens  0     5        12   15         segment i owns the rows cu_seqlens[i] .. cu_seqlens[i+1]
#   row         aaaaa bbbbbbb ccc              a segment sees itself causally, and its parent's keys (and theirs) before
#   parent      -1    0       0                here b and c both continue a: a prompt stored once for its two responses


class _Take(torch.autograd.Function):
    """x[take] where every row of x is used once and the rest of `take` is padding that gets no gradient, so that
    the backward is a gather too (index_add, the general backward, is several times slower on CPU)."""

    @staticmethod
    def forward(ctx, x, take, back):
        ctx.save_for_backward(back)
        return x.index_select(0, take)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back), None, None


class _PutBack(torch.autograd.Function):
    """The inverse of _Take: drops the padding; the padding's gradient is exactly zero."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.save_for_backward(back)
        ctx.rows = x.shape[0]
        return x.index_select(0, back)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.new_zeros(ctx.rows, *grad.shape[1:]).index_copy_(0, back, grad), None


def _bucket(n):
    """n rounded up by at most 1/8: lengths that share a bucket share one attention call."""
    step = max(8, 1 << max(0, n.bit_length() - 4))
    return -(-n // step) * step


def _plan(cu_seqlens, parent, device):
    """Which segments share a call. Segments of one (prefix length, bucketed own length) form a batch; a segment shorter
    than its batch is padded at the END with copies of its last row, which causal attention never shows to a real row.
    -> groups [(B, P, L)], take_q, take_k, back, own: all calls' rows one after another, and where each row came back."""
    members = {}
    prefix = []                                                  # rows of all ancestors, oldest first
    for i in range(len(cu_seqlens) - 1):
        start, length = cu_seqlens[i], cu_seqlens[i + 1] - cu_seqlens[i]
        p = parent[i] if parent else -1
        assert p < i, f"segment {i} has parent {p}: a parent must stand before its children"
        prefix.append(prefix[p] + list(range(cu_seqlens[p], cu_seqlens[p + 1])) if p >= 0 else [])
        if length:
            members.setdefault((len(prefix[i]), _bucket(length)), []).append(i)
    groups, take_q, take_k, back = [], [], [], [0] * cu_seqlens[-1]
    for (P, _), segments in members.items():
        L = max(cu_seqlens[i + 1] - cu_seqlens[i] for i in segments)
        for i in segments:
            start, end = cu_seqlens[i], cu_seqlens[i + 1]
            own = list(range(start, end)) + [end - 1] * (L - (end - start))
            back[start:end] = range(len(take_q), len(take_q) + end - start)
            take_q += own
            take_k += prefix[i] + own
        groups.append((len(segments), P, L))
    identity = take_q == list(range(cu_seqlens[-1]))
    if identity and take_k == take_q:
        return groups, None, None, None
    tensor = lambda rows: torch.tensor(rows, dtype=torch.long, device=device)  # noqa: E731
    return groups, tensor(take_q), None if take_k == take_q else tensor(take_k), tensor(back)


def packed_attention_torch(cu_seqlens, max_len, parent=None):
    plan, masks = [], {}

    def mask(P, L, device):                                      # (L, P+L): the prefix whole, its own keys causally
        if (P, L) not in masks:
            masks[P, L] = torch.ones(L, P + L, dtype=torch.bool, device=device).tril(P)
        return masks[P, L]

    def attend(layer, q, k, v):
        assert q.shape[0] == cu_seqlens[-1], f"the row has {q.shape[0]} tokens, cu_seqlens says {cu_seqlens[-1]}"
        if not plan:
            plan.append(_plan(cu_seqlens, parent, q.device))
        groups, take_q, take_k, back = plan[0]
        if take_q is not None:
            if take_k is None:
                k, v = _Take.apply(k, take_q, back), _Take.apply(v, take_q, back)
            else:                                                # a parent's keys are used by many: the general backward
                k, v = k.index_select(0, take_k), v.index_select(0, take_k)
            q = _Take.apply(q, take_q, back)
        q_rows, k_rows = [B * L for B, P, L in groups], [B * (P + L) for B, P, L in groups]
        outs = []
        for (B, P, L), q_g, k_g, v_g in zip(groups, q.split(q_rows), k.split(k_rows), v.split(k_rows)):
            q_BHLD = q_g.view(B, L, *q.shape[1:]).transpose(1, 2)
            k_BHLD = k_g.view(B, P + L, *k.shape[1:]).transpose(1, 2)
            v_BHLD = v_g.view(B, P + L, *v.shape[1:]).transpose(1, 2)
            o = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, is_causal=P == 0, enable_gqa=q.shape[1] != k.shape[1],
                                               attn_mask=mask(P, L, q.device) if P else None)
            outs.append(o.transpose(1, 2).reshape(B * L, *q.shape[1:]))
        o = outs[0] if len(outs) == 1 else torch.cat(outs) if outs else torch.zeros_like(q)
        return o if back is None else _PutBack.apply(o, back)

    return attend


class _Gather(torch.autograd.Function):
    """x[take], rows used many times. A prompt's keys collect the gradients of all its responses: summed in fp32, rounded once."""

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


# both calls keep segments apart by themselves, skip what is masked, share keys among query heads, and align the
# causal mask to the bottom right: with P more keys than queries, query i sees P + i + 1 keys. Half precision only.


GQA = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}     # or else it is always on


def _flash(q, k, v, cu_q, cu_k, max_q, max_k):
    from flash_attn import flash_attn_varlen_func
    return flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)


def _varlen(q, k, v, cu_q, cu_k, max_q, max_k):
    return varlen.varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, window_size=(-1, 0), **GQA)


def _packed_by(run, cu_seqlens, parent=None):
    """attend(), one call for the whole row. With parents, each segment's keys are gathered behind its ancestors': extra
    copies of a prompt's keys, but one exact softmax. (Attending to prompt and response apart and merging by
    log-sum-exp copies nothing, and torch's backward would silently ignore the gradient that flows through it.)"""
    plan = []

    def make(device):
        n = len(cu_seqlens) - 1
        pieces = []                                              # of each segment: the row ranges of its ancestors, then its own
        for i in range(n):
            p = parent[i] if parent else -1
            assert p < i, f"segment {i} has parent {p}: a parent must stand before its children"
            pieces.append((pieces[p] if p >= 0 else []) + [(cu_seqlens[i], cu_seqlens[i + 1])])
        cu_k = [0]
        for ranges in pieces:
            cu_k.append(cu_k[-1] + sum(b - a for a, b in ranges))
        longest = lambda cu: max((b - a for a, b in zip(cu, cu[1:])), default=0)
        take = torch.cat([torch.arange(a, b) for ranges in pieces for a, b in ranges]) if cu_k != list(cu_seqlens) else None
        return (None if take is None else to_device(take, torch.long, device), to_device(cu_seqlens, torch.int32, device),
                to_device(cu_k, torch.int32, device), longest(cu_seqlens), longest(cu_k))

    def attend(layer, q, k, v):
        if q.shape[0] == 0:
            return torch.zeros_like(q)
        if not plan:
            plan.append(make(q.device))
        take, cu_q, cu_k, max_q, max_k = plan[0]
        if take is not None:
            k, v = _Gather.apply(k, take), _Gather.apply(v, take)
        return run(q, k, v, cu_q, cu_k, max_q, max_k)

    return attend


def _trains(q):
    """What this q goes to: both fast calls take half precision and heads of a multiple of 8, at most 256 wide."""
    name = picked("train", q.device.type)
    fits = q.shape[-1] % 8 == 0 and q.shape[-1] <= 256 and (not q.is_cuda or q.dtype in (torch.bfloat16, torch.float16))
    return name if fits else "torch"


def continued_attention(cu_q, cu_k):
    """-> attend(q, k, v) without gradient, for prompts that go on from a cache: segment i's queries are the last of its keys."""
    plan = []

    def attend(q, k, v):
        expect("q", q, (cu_q[-1], q.shape[1], q.shape[2]))
        expect("k", k, (cu_k[-1], k.shape[1], q.shape[2]), (q.dtype,))
        expect("v", v, k.shape, (q.dtype,))
        run = RUNS["train"][_trains(q)]
        if run is None:                                          # a mask each, and scores that are written out
            outs = []
            for a, b, c, d in zip(cu_q, cu_q[1:], cu_k, cu_k[1:]):
                mask = torch.ones(b - a, d - c, dtype=torch.bool, device=q.device).tril(d - c - (b - a))
                o = F.scaled_dot_product_attention(*(x.transpose(0, 1).unsqueeze(0) for x in (q[a:b], k[c:d], v[c:d])), attn_mask=mask,
                                                   enable_gqa=q.shape[1] != k.shape[1])
                outs.append(o.squeeze(0).transpose(0, 1))
            return torch.cat(outs)
        if not plan:
            for cu in (cu_q, cu_k):
                plan.append((to_device(cu, torch.int32, q.device), max(b - a for a, b in zip(cu, cu[1:]))))
        (at_q, max_q), (at_k, max_k) = plan
        return run(q, k, v, at_q, at_k, max_q, max_k)

    return attend


def packed_attention(cu_seqlens, max_len, parent=None):
    """-> attend(layer, q, k, v) for model(tokens_T, positions_T, attend). Lists of ints; the plan is made once and used by all layers."""
    assert max_len >= max((b - a for a, b in zip(cu_seqlens, cu_seqlens[1:])), default=0), "max_len is below the longest segment"
    made = {}

    def attend(layer, q, k, v):
        T, hd = cu_seqlens[-1], q.shape[-1]
        expect("q", q, (T, q.shape[1], hd))
        expect("k", k, (T, k.shape[1], hd), (q.dtype,))
        expect("v", v, (T, k.shape[1], hd), (q.dtype,))
        assert q.shape[1] % k.shape[1] == 0, f"{q.shape[1]} query heads cannot share {k.shape[1]} key heads"
        name = _trains(q)
        if name not in made:
            run = RUNS["train"][name]
            made[name] = _packed_by(run, cu_seqlens, parent) if run else packed_attention_torch(cu_seqlens, max_len, parent)
        return made[name](layer, q, k, v)

    return attend


# -----------------------------------------------------------------------------
# decode: one new token a row against its pages
#
#   block_table  (B, n)  page numbers of each row, in order; key j of row b lies in page block_table[b, j // page], slot j % page
#   lengths      (B,)    keys already there; the new key becomes number lengths[b], and the new token sees it
#   k_pages      (pages, page, n_kv_head, head_dim), as flash-attn wants it
# A row that is not alive (a CUDA graph runs full batches) has length 0 and names a page that nobody owns.


def decode_attention_torch(q, k_new, v_new, k_pages, v_pages, block_table, lengths):
    page, lengths = k_pages.shape[1], lengths.long()
    slot = block_table.gather(1, (lengths // page).unsqueeze(1)).squeeze(1).long(), lengths % page
    k_pages[slot], v_pages[slot] = k_new, v_new
    table = block_table[:, :int(lengths.max()) // page + 1].long() if q.device.type == "cpu" else block_table.long()
    k, v = k_pages[table].flatten(1, 2), v_pages[table].flatten(1, 2)            # (B, n, kv heads, hd)
    mask = torch.arange(k.shape[1], device=q.device) <= lengths.unsqueeze(1)     # (B, n)
    o = F.scaled_dot_product_attention(q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask[:, None, None],
                                       enable_gqa=q.shape[1] != k_new.shape[1])
    return o.squeeze(2)


def _flash_decode(q, k_new, v_new, k_pages, v_pages, block_table, lengths):
    from flash_attn import flash_attn_with_kvcache
    o = flash_attn_with_kvcache(q.unsqueeze(1), k_pages, v_pages, k=k_new.unsqueeze(1), v=v_new.unsqueeze(1), cache_seqlens=lengths,
                                block_table=block_table, causal=True, num_splits=1)      # its own choice of splits has given nan
    return o.squeeze(1)


@jit
def _decode_kernel(q, k_new, v_new, k_pages, v_pages, table, lengths, out, lse, scale, table_stride, q_stride, k_stride, v_stride,
                   SPLITS: tl.constexpr, PAGE: tl.constexpr, KV: tl.constexpr, GROUP: tl.constexpr, HD: tl.constexpr,
                   BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):
    """One row, one key head with the GROUP query heads that share it, one slice of the keys: softmax(q K^T) V, online
    (arXiv 2205.14135), the keys split over programs as in Flash-Decoding. Keys are read once for the whole group, and
    that reading is all the cost: the padding of the group to the 16 rows a tensor core wants is free."""
    b, kv, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(lengths + b)
    chunk = tl.maximum(tl.cdiv(tl.cdiv(length, SPLITS), BLOCK_N) * BLOCK_N, 4 * BLOCK_N)
    start = split * chunk
    end = tl.minimum(start + chunk, length)
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    head = kv * GROUP + g
    rows, cols = g < GROUP, d < HD
    q_GD = tl.load(q + b * q_stride + head[:, None] * HD + d[None, :], mask=rows[:, None] & cols[None, :], other=0.0)

    # the new key never makes the trip through memory: slice 0 starts its softmax from it, and stores it for later steps
    k = tl.load(k_new + b * k_stride + kv * HD + d, mask=cols, other=0.0)
    v = tl.load(v_new + b * v_stride + kv * HD + d, mask=cols, other=0.0)
    first = split == 0
    m = tl.where(first, tl.sum(q_GD.to(tl.float32) * k[None, :].to(tl.float32), 1) * scale, -1e30)      # running maximum
    s = tl.where(first, 1.0, 0.0) + tl.zeros([BLOCK_G], tl.float32)                                     # running sum
    acc = tl.where(first, v[None, :].to(tl.float32), 0.0) + tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    if first:
        page = tl.load(table + b * table_stride + length // PAGE).to(tl.int64)
        at = ((page * PAGE + length % PAGE) * KV + kv) * HD + d
        tl.store(k_pages + at, k, mask=cols)
        tl.store(v_pages + at, v, mask=cols)

    for a in range(start, end, BLOCK_N):
        n = a + tl.arange(0, BLOCK_N)
        page = tl.load(table + b * table_stride + n // PAGE, mask=n < end, other=0).to(tl.int64)
        at = ((page * PAGE + n % PAGE) * KV + kv) * HD
        k_ND = tl.load(k_pages + at[:, None] + d[None, :], mask=(n < end)[:, None] & cols[None, :], other=0.0)
        v_ND = tl.load(v_pages + at[:, None] + d[None, :], mask=(n < end)[:, None] & cols[None, :], other=0.0)
        z = tl.dot(q_GD, tl.trans(k_ND), input_precision="ieee") * scale
        z = tl.where((n < end)[None, :], z, -1e30)
        m_new = tl.maximum(m, tl.max(z, 1))
        p, r = tl.exp(z - m_new[:, None]), tl.exp(m - m_new)
        acc = acc * r[:, None] + tl.dot(p.to(v_ND.dtype), v_ND, input_precision="ieee")
        s = s * r + tl.sum(p, 1)
        m = m_new

    row = (b * SPLITS + split) * KV * GROUP + head                # out (B, SPLITS, n_head, hd), lse (B, SPLITS, n_head)
    o = acc / tl.maximum(s, 1e-30)[:, None]                      # a slice behind the end has s = 0 and weighs nothing below
    tl.store(out + row[:, None] * HD + d[None, :], o.to(out.dtype.element_ty), mask=rows[:, None] & cols[None, :])
    if SPLITS > 1:
        tl.store(lse + row, tl.where(s > 0, m + tl.log(tl.maximum(s, 1e-30)), -1e30), mask=rows)


@jit
def _merge_kernel(part, lse, out, HEADS: tl.constexpr, SPLITS: tl.constexpr, HD: tl.constexpr, BLOCK_D: tl.constexpr):
    """o = sum_i o_i e^(lse_i) / sum_i e^(lse_i), one program per row and head."""
    b, h = tl.program_id(0), tl.program_id(1)
    i, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    row = (b * SPLITS + i) * HEADS + h
    z = tl.load(lse + row)
    w = tl.exp(z - tl.max(z, 0))
    o = tl.load(part + row[:, None] * HD + d[None, :], mask=(d < HD)[None, :], other=0.0)
    o = tl.sum(o * w[:, None], 0) / tl.sum(w, 0)
    tl.store(out + (b * HEADS + h) * HD + d, o.to(out.dtype.element_ty), mask=d < HD)


def _triton_decode(q, k_new, v_new, k_pages, v_pages, block_table, lengths, splits=None):
    B, H, hd = q.shape
    page, KV = k_pages.shape[1:3]
    if splits is None:                                           # 2,000 programs fill any GPU of today; below 256 keys a slice does not pay
        splits = triton.next_power_of_2(max(1, min(32, 2048 // max(1, B * KV), -(-block_table.shape[1] * page // 256))))
    out = torch.empty(B, H, hd, dtype=q.dtype, device=q.device)
    part = out if splits == 1 else torch.empty(B, splits, H, hd, dtype=torch.float32, device=q.device)
    lse = torch.empty(B, splits, H, dtype=torch.float32, device=q.device)
    block_d = triton.next_power_of_2(hd)
    # BLOCK_N 64: 120 registers and 39 kB, so four programs share an H100's multiprocessor, each with 32 kB under way.
    # 32 halves what is under way, 128 takes 74 kB and leaves room for three (the compiler's report at head_dim 128; not timed)
    _decode_kernel[(B, KV, splits)](
        q, k_new, v_new, k_pages, v_pages, block_table, lengths, part, lse, hd**-0.5, block_table.stride(0), q.stride(0), k_new.stride(0),
        v_new.stride(0), SPLITS=splits, PAGE=page, KV=KV, GROUP=H // KV, HD=hd, BLOCK_G=max(16, triton.next_power_of_2(H // KV)),
        BLOCK_D=block_d, BLOCK_N=64, num_warps=4, num_stages=3)
    if splits > 1:
        _merge_kernel[(B, H)](part, lse, out, HEADS=H, SPLITS=splits, HD=hd, BLOCK_D=block_d, num_warps=2)
    return out


def decode_attention(q, k_new, v_new, k_pages, v_pages, block_table, lengths):
    """-> o (B, n_head, hd) of one new token a row; its key and value are stored in their page on the way. No gradient."""
    (B, H, hd), (pages, page, KV, _) = q.shape, k_pages.shape
    for name, x, heads in (("q", q, H), ("k_new", k_new, KV), ("v_new", v_new, KV)):
        expect(name, x, (B, heads, hd), (k_pages.dtype,))
        assert x.stride(1) == hd or heads == 1, f"{name} {tuple(x.shape)} has stride {x.stride()}: the heads of a row must be contiguous"
    expect("v_pages", v_pages, (pages, page, KV, hd), (k_pages.dtype,))
    assert k_pages.is_contiguous() and v_pages.is_contiguous(), f"k_pages or v_pages {tuple(k_pages.shape)} is not contiguous"
    expect("block_table", block_table, (B, block_table.shape[1]), (torch.int32,))
    expect("lengths", lengths, (B,), (torch.int32,))
    assert H % KV == 0, f"{H} query heads cannot share {KV} key heads"
    expect_ids("lengths", lengths, block_table.shape[1] * page)
    expect_ids("block_table", block_table, pages)
    name = picked("decode", q.device.type)
    if name == "flash" and (page % 256 or (q.is_cuda and q.dtype == torch.float32)):     # flash-attn's pages hold multiples of 256 keys
        name = "triton" if fused(q) else "torch"
    return RUNS["decode"][name](q, k_new, v_new, k_pages, v_pages, block_table, lengths)


# -----------------------------------------------------------------------------
# log-probs and entropy from hidden states and head weight: z = h W^T / temperature,
#   logp_k = z[id_k] - lse(z)            d logp_k / dz = 1[id_k] - p
#   H      = lse(z) - sum p z            d H / dz      = -p (z - lse + H)
# The only state kept for the backward is lse and H: two numbers a row.


CHUNK = 1 << 22                                                  # logits alive at a time: 16 MB of fp32 stay in a CPU's last-level cache
TILE = 1 << 27                                                   # and on a GPU, where a product wants thousands of rows: 512 MB


def _slices(rows_ND, vocab):
    """Chunks of rows whose logits are so many numbers together."""
    rows = max(16, (CHUNK if rows_ND.device.type == "cpu" else TILE) // vocab)
    return [slice(a, a + rows) for a in range(0, len(rows_ND), rows)]


def _product(a, b):
    """a @ b, not rounded to half precision at the end: a logit of 20 in bf16 is off by up to 0.06."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    z = times(a, b.t())
    return z if z.dtype == torch.float64 else z.float()


def linear_logits(hidden, weight, temperature=1.0):
    """(N, V), for those who need them all: the sampler takes its logits here, as the trainer does: in fp32."""
    z = _product(hidden, weight.t())
    return z.div_(temperature) if temperature != 1.0 else z


class _LogprobAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_NK, temperature):
        wide = torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32
        logp_NK = torch.empty(ids_NK.shape, dtype=wide, device=hidden_ND.device)
        lse_N = torch.empty(ids_NK.shape[0], dtype=wide, device=hidden_ND.device)
        entropy_N, ctx.last = torch.empty_like(lse_N), None
        for s in _slices(ids_NK, weight_VD.shape[0]):
            z = linear_logits(hidden_ND[s], weight_VD, temperature)    # (n, V)
            at = z.gather(1, ids_NK[s])
            top = z.amax(1, keepdim=True)
            z.sub_(top)
            p = z.exp()                                          # not yet divided by its sum
            total = p.sum(1)
            lse = total.log()
            ctx.last = z                                         # the backward of the last chunk need not compute it again
            entropy_N[s] = lse - torch.linalg.vecdot(p, z).div_(total)
            z.sub_(lse.unsqueeze(1))
            lse_N[s] = lse.add_(top.squeeze(1))
            logp_NK[s] = at.sub_(lse.unsqueeze(1))
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, lse_N, entropy_N)
        ctx.temperature = temperature
        ctx.set_materialize_grads(False)
        return logp_NK, entropy_N

    @staticmethod
    def backward(ctx, grad_logp_NK, grad_entropy_N):
        hidden_ND, weight_VD, ids_NK, lse_N, entropy_N = ctx.saved_tensors
        if grad_logp_NK is None and grad_entropy_N is None:
            return None, None, None, None
        grad_h = torch.empty_like(hidden_ND)
        grad_w = torch.zeros_like(weight_VD, dtype=lse_N.dtype) if ctx.needs_input_grad[1] else None
        for s in _slices(ids_NK, weight_VD.shape[0]):
            if s.stop >= len(ids_NK) and ctx.last is not None:
                z, ctx.last = ctx.last, None
            else:
                z = linear_logits(hidden_ND[s], weight_VD, ctx.temperature).sub_(lse_N[s].unsqueeze(1))
            g = None if grad_logp_NK is None else grad_logp_NK[s].to(z.dtype)
            if grad_entropy_N is None:
                z.exp_().mul_(-g.sum(1, keepdim=True))           # -p sum_k g_k
            else:                                                # -p (sum_k g_k + g_H (z - lse + H))
                p, g_H = z.exp(), grad_entropy_N[s].unsqueeze(1)
                flat = g_H * entropy_N[s].unsqueeze(1)
                z.mul_(g_H).add_(flat if g is None else flat + g.sum(1, keepdim=True)).mul_(p).neg_()
            if g is not None:
                z.scatter_add_(1, ids_NK[s], g)
            if ctx.temperature != 1.0:
                z.div_(ctx.temperature)
            z = z.to(hidden_ND.dtype)
            grad_h[s] = times(z, weight_VD.t())
            if grad_w is not None:
                grad_w += weight_gradient(z, hidden_ND[s])
        return grad_h, None if grad_w is None else grad_w.to(weight_VD.dtype), None, None


# On a GPU the product stays with cuBLAS and the kernels do the rest, tile by tile of the vocabulary. Why not one kernel
# for both? The product is 2 D FLOP a logit, nearly all of the time, and cuBLAS runs it near the ceiling of every GPU, which
# one Triton product for all of them does not. What one kernel would save is the second half of the logits' round trip: they
# are written while the product computes, and read again at 4 bytes each, a tenth of the product's time at D = 4096. (Small
# D pays more: a third at D = 1024. The figures are arithmetic for an H200, not timings.) The backward takes large tiles, for
# there each tile also adds to dH (N, D), and wants few of those additions.
# Considered for the forward, at N = 8192: 32 MB, which would stay in the L2 cache, but its products are 1,024 wide and last 22 us
# at D = 1024, less than Python takes to launch them; 128 MB, as fast as 64 by arithmetic, for twice the memory.
FORWARD_TILE = 1 << 24                                           # logits: 64 MB of fp32
BACKWARD_TILE = TILE                                             # and half of it again for their gradient in bf16


@jit
def _online_kernel(z, ids, m_N, s_N, t_N, at_NK, low, width, K, inv_temperature, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """Folds one row of a tile of logits z[low : low + width] into three running numbers (online softmax, arXiv 1805.02867):
        m = max z,  s = sum e^(z - m),  t = sum (z - m) e^(z - m);     at the end  lse = m + log s,  H = log s - t / s
    A new maximum m' rescales:  s -> s e^(m - m'),  t -> (t + (m - m') s) e^(m - m').  Ids that fall into the tile are read off."""
    n = tl.program_id(0).to(tl.int64)
    z += n * width
    m, s, t = tl.load(m_N + n), tl.load(s_N + n), tl.load(t_N + n)
    for a in range(0, width, BLOCK_V):
        c = a + tl.arange(0, BLOCK_V)
        x = tl.load(z + c, mask=c < width, other=-float("inf")) * inv_temperature
        m_new = tl.maximum(m, tl.max(x, 0))
        r, e = tl.exp(m - m_new), tl.exp(x - m_new)
        t = (t + (m - m_new) * s) * r + tl.sum(tl.where(e > 0, (x - m_new) * e, 0.0), 0)      # 0, not nan, where z is -inf
        s = s * r + tl.sum(e, 0)
        m = m_new
    tl.store(m_N + n, m)
    tl.store(s_N + n, s)
    tl.store(t_N + n, t)
    k = tl.arange(0, BLOCK_K)
    i = tl.load(ids + n * K + k, mask=k < K, other=-1) - low
    here = (i >= 0) & (i < width) & (k < K)
    tl.store(at_NK + n * K + k, tl.load(z + i, mask=here, other=0.0) * inv_temperature, mask=here)


@jit
def _dlogits_kernel(z, dz, ids, m_N, log_s_N, entropy_N, grad_NK, grad_entropy_N, low, width, K, inv_temperature,
                    BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr):
    """dz = (sum_k g_k 1[id_k] - p (sum_k g_k + g_H (z - lse + H))) / temperature for one row of a tile, by a store of
    the second term everywhere and then of both where an id points. An id named twice gets the sum of its gradients from
    each of its two stores: the same number, so their order does not matter and nothing is atomic. lse comes as its two
    halves m and log s, because z - m is exact where p is large and m + log s would be rounded."""
    n = tl.program_id(0).to(tl.int64)
    z += n * width
    dz += n * width
    k = tl.arange(0, BLOCK_K)
    i = tl.load(ids + n * K + k, mask=k < K, other=-1) - low
    g = tl.load(grad_NK + n * K + k, mask=k < K, other=0.0)
    m, log_s, g_H = tl.load(m_N + n), tl.load(log_s_N + n), tl.load(grad_entropy_N + n)
    flat = tl.sum(g, 0) + g_H * tl.load(entropy_N + n)
    for a in range(0, width, BLOCK_V):
        c = a + tl.arange(0, BLOCK_V)
        x = tl.load(z + c, mask=c < width, other=0.0) * inv_temperature - m - log_s
        d = -tl.exp(x) * (flat + g_H * x) * inv_temperature
        tl.store(dz + c, d.to(dz.dtype.element_ty), mask=c < width)
    tl.debug_barrier()                                           # the stores above, before those below, for all threads
    here = (i >= 0) & (i < width) & (k < K)
    x = tl.load(z + i, mask=here, other=0.0) * inv_temperature - m - log_s
    both = tl.sum(tl.where(i[:, None] == i[None, :], g[None, :], 0.0), 1) - tl.exp(x) * (flat + g_H * x)
    tl.store(dz + i, (both * inv_temperature).to(dz.dtype.element_ty), mask=here)


def _tiles(rows, vocab, numbers):
    """Slices of the vocabulary whose logits, all rows together, are about `numbers`."""
    width = max(1024, numbers // max(1, rows) // 128 * 128)
    return [(low, min(low + width, vocab)) for low in range(0, vocab, width)]


class _LogprobFused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, ids_NK, temperature):
        (N, K), V = ids_NK.shape, weight_VD.shape[0]
        m_N = torch.full((N,), -1e30, dtype=torch.float32, device=hidden_ND.device)
        s_N, t_N = torch.zeros_like(m_N), torch.zeros_like(m_N)
        at_NK = torch.empty(N, K, dtype=torch.float32, device=hidden_ND.device)
        for low, high in _tiles(N, V, FORWARD_TILE):
            z = _product(hidden_ND, weight_VD[low:high].t())     # (N, tile)
            _online_kernel[(N,)](z, ids_NK, m_N, s_N, t_N, at_NK, low, high - low, K, 1 / temperature,
                                 BLOCK_V=1024, BLOCK_K=max(16, triton.next_power_of_2(K)), num_warps=4)
            del z                                                # so that the next tile gets the same, still cached, memory
        log_s_N = s_N.log()
        entropy_N = log_s_N - t_N / s_N
        ctx.save_for_backward(hidden_ND, weight_VD, ids_NK, m_N, log_s_N, entropy_N)
        ctx.temperature = temperature
        return at_NK.sub_(m_N.unsqueeze(1)).sub_(log_s_N.unsqueeze(1)), entropy_N

    @staticmethod
    def backward(ctx, grad_NK, grad_entropy_N):
        hidden_ND, weight_VD, ids_NK, m_N, log_s_N, entropy_N = ctx.saved_tensors
        (N, K), V = ids_NK.shape, weight_VD.shape[0]
        grad_h = torch.zeros_like(hidden_ND, dtype=torch.float32)
        grad_w = torch.empty_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_NK, grad_entropy_N = grad_NK.contiguous(), grad_entropy_N.contiguous()
        for low, high in _tiles(N, V, BACKWARD_TILE):
            z = _product(hidden_ND, weight_VD[low:high].t())     # (N, tile), again: cheaper than keeping it
            dz = torch.empty_like(z, dtype=hidden_ND.dtype)
            _dlogits_kernel[(N,)](z, dz, ids_NK, m_N, log_s_N, entropy_N, grad_NK, grad_entropy_N, low, high - low, K,
                                  1 / ctx.temperature, BLOCK_V=2048, BLOCK_K=max(16, triton.next_power_of_2(K)), num_warps=4)
            grad_h += _product(dz, weight_VD[low:high])
            if grad_w is not None:
                torch.mm(dz.t(), hidden_ND, out=grad_w[low:high])        # all rows in one product: rounded once
            del z, dz
        return grad_h.to(hidden_ND.dtype), grad_w, None, None


def _logprob(hidden_ND, weight_VD, ids_NK, temperature):
    hidden_ND, ids_NK = hidden_ND.contiguous(), ids_NK.contiguous()
    (N, D), (V, _), K = hidden_ND.shape, weight_VD.shape, ids_NK.shape[1]
    expect("hidden", hidden_ND, (N, D))
    expect("weight", weight_VD, (V, D), (hidden_ND.dtype,))
    expect("ids", ids_NK, (N, K), (torch.int64,))
    expect_ids("ids", ids_NK, V)
    assert temperature > 0, f"temperature {temperature}: a softmax needs one above 0"
    if fused(hidden_ND) and N and K <= 64:                       # beyond, a row's (K, K) comparison no longer fits its program
        return _LogprobFused.apply(hidden_ND, weight_VD, ids_NK, temperature)
    more = spare(N, hidden_ND)
    if more:
        hidden_ND, ids_NK = F.pad(hidden_ND, (0, 0, 0, more)), F.pad(ids_NK, (0, 0, 0, more))
    logp_NK, entropy_N = _LogprobAt.apply(hidden_ND, weight_VD, ids_NK, temperature)
    return (logp_NK[:N], entropy_N[:N]) if more else (logp_NK, entropy_N)


def linear_logprob(hidden_ND, weight_VD, targets_N, temperature=1.0):
    """-> logp_N of the targets and entropy_N, both under softmax(h W^T / temperature), in fp32 (fp64 for fp64 input)."""
    logp_N1, entropy_N = _logprob(hidden_ND, weight_VD, targets_N.unsqueeze(1), temperature)
    return logp_N1.squeeze(1), entropy_N


def linear_logprob_at(hidden_ND, weight_VD, ids_NK, temperature=1.0):
    """-> logp_NK of K ids a row, under the full softmax."""
    return _logprob(hidden_ND, weight_VD, ids_NK, temperature)[0]


def linear_topk(hidden_ND, weight_VD, k, temperature=1.0):
    """-> ids_NK and logp_NK of the k most likely tokens of each row, most likely first."""
    V = weight_VD.shape[0]
    assert 0 < k <= V, f"k = {k} of a vocabulary of {V}"
    with torch.no_grad():
        ids_NK = torch.cat([linear_logits(hidden_ND[s], weight_VD, 1.0).topk(k, dim=1).indices for s in _slices(hidden_ND, V)])
    return ids_NK, linear_logprob_at(hidden_ND, weight_VD, ids_NK, temperature)


# -----------------------------------------------------------------------------
# the small steps of a layer


class _Linear(torch.autograd.Function):
    """F.linear in fp32 on a CPU, its three products by `times`."""

    @staticmethod
    def forward(ctx, x_TD, weight, bias):
        ctx.save_for_backward(x_TD, weight)
        y = times(x_TD, weight)
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx, grad):
        x_TD, weight = ctx.saved_tensors
        need_x, need_w, need_b = ctx.needs_input_grad
        return (times(grad, weight.t()) if need_x else None, weight_gradient(grad, x_TD) if need_w else None,
                grad.sum(0) if need_b else None)


def weight_gradient(grad_TN, x_TD):
    """grad^T x, the smaller side first: oneDNN is up to twice as fast that way round."""
    if grad_TN.shape[1] > x_TD.shape[1]:
        return times(x_TD.t(), grad_TN.t()).t()
    return times(grad_TN.t(), x_TD.t())


TILES = 16, 32, 48, 64                   # rows: so many oneDNN multiplies as w x^T a fifth sooner than as x w^T, and gets the same bits


def linear(x, weight, bias=None, rows=True):
    """x W^T + b, in fp32 on a CPU by `times`. rows=False: its rows need not be contiguous, where it is sooner done if they are not."""
    if bias is None and small(x):
        return times(weight, x).t() if not rows and len(x) in TILES else times(x, weight)
    if x.is_cpu and x.dtype == torch.float32 and x.ndim == 2 and (x.shape[0] >= FEW or not torch.is_grad_enabled()):
        return _Linear.apply(x, weight, bias) if torch.is_grad_enabled() or bias is not None else times(x, weight)
    return F.linear(x, weight, bias)


def rope_tables(positions_T, inv_freq, scale=1.0):
    """cos and sin (T, head_dim/2) of these positions: computed, so there is no table to run off the end of."""
    angle = positions_T.unsqueeze(1) * inv_freq
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    if small(angle):                                             # once for all layers: (T, 1, head_dim), the signs of rope() in sin
        return torch.cat((cos, cos), 1).unsqueeze(1), torch.cat((-sin, sin), 1).unsqueeze(1)
    return cos, sin


def rope(x_THd, cos_T, sin_T):
    """(a, b) -> (a cos - b sin, b cos + a sin) on the two halves of each head, in fp32 for half-precision input."""
    cos, sin = torch.cat((cos_T, cos_T), 1).unsqueeze(1), torch.cat((-sin_T, sin_T), 1).unsqueeze(1)
    if x_THd.dtype == torch.float64:
        cos, sin = cos.double(), sin.double()
    # the halves change places: three passes over x, where halves cut and joined again take six
    return torch.addcmul(x_THd * cos, x_THd.roll(x_THd.shape[-1] // 2, -1), sin).to(x_THd.dtype)


def qk_norm_rope_torch(q, k, q_weight, k_weight, cos_T, sin_T, eps):
    if q_weight is not None:
        q, k = F.rms_norm(q, q.shape[-1:], q_weight, eps), F.rms_norm(k, k.shape[-1:], k_weight, eps)
    return rope(q, cos_T, sin_T), rope(k, cos_T, sin_T)


@jit
def _rows(pid, x, weight, cos, sin, T, stride, eps, HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
          BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_R heads, counted through all tokens: the two halves of each, normalised but not yet weighted, and what is needed to go on."""
    r, d = pid * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    t, ok = r // HEADS, (r < T * HEADS)[:, None] & (d < HALF)[None, :]
    at = t[:, None].to(tl.int64) * stride + (r % HEADS * 2 * HALF)[:, None] + d[None, :]
    a = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x + at + HALF, mask=ok, other=0.0).to(tl.float32)
    c = tl.load(cos + t[:, None] * HALF + d[None, :], mask=ok, other=0.0)
    s = tl.load(sin + t[:, None] * HALF + d[None, :], mask=ok, other=0.0)
    w_a, w_b, rstd = 1.0, 1.0, 1.0
    if NORM:
        rstd = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        a, b = a * rstd, b * rstd
        w_a = tl.load(weight + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
        w_b = tl.load(weight + HALF + d, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    at = r[:, None].to(tl.int64) * 2 * HALF + d[None, :]         # where the same head lies in a contiguous tensor
    return a, b, c, s, w_a, w_b, rstd, at, ok


@jit
def _norm_rope_rows(pid, x, out, weight, cos, sin, T, stride, eps, HEADS: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
                    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    a, b, c, s, w_a, w_b, rstd, at, ok = _rows(pid, x, weight, cos, sin, T, stride, eps, HEADS, HALF, NORM, BLOCK_R, BLOCK_D)
    a, b = a * w_a, b * w_b
    tl.store(out + at, (a * c - b * s).to(out.dtype.element_ty), mask=ok)
    tl.store(out + at + HALF, (b * c + a * s).to(out.dtype.element_ty), mask=ok)


@jit
def _norm_rope_rows_back(pid, x, grad, dx, dw, weight, cos, sin, T, stride, eps, HEADS: tl.constexpr, HALF: tl.constexpr,
                         NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    a, b, c, s, w_a, w_b, rstd, at, ok = _rows(pid, x, weight, cos, sin, T, stride, eps, HEADS, HALF, NORM, BLOCK_R, BLOCK_D)
    g_a = tl.load(grad + at, mask=ok, other=0.0).to(tl.float32)
    g_b = tl.load(grad + at + HALF, mask=ok, other=0.0).to(tl.float32)
    g_a, g_b = g_a * c + g_b * s, g_b * c - g_a * s              # the rotation turned back
    if NORM:
        d = tl.arange(0, BLOCK_D)
        tl.store(dw + pid * 2 * HALF + d, tl.sum(g_a * a, 0), mask=d < HALF)             # summed over programs outside
        tl.store(dw + pid * 2 * HALF + HALF + d, tl.sum(g_b * b, 0), mask=d < HALF)
        g_a, g_b = g_a * w_a, g_b * w_b
        along = ((tl.sum(g_a * a, 1) + tl.sum(g_b * b, 1)) / (2 * HALF))[:, None]
        g_a, g_b = (g_a - a * along) * rstd, (g_b - b * along) * rstd
    tl.store(dx + at, g_a.to(dx.dtype.element_ty), mask=ok)
    tl.store(dx + at + HALF, g_b.to(dx.dtype.element_ty), mask=ok)


@jit
def _norm_rope_kernel(q, k, q_out, k_out, q_weight, k_weight, cos, sin, T, q_stride, k_stride, eps, H: tl.constexpr, KV: tl.constexpr,
                      HALF: tl.constexpr, NORM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """x / sqrt(mean x^2 + eps) * weight (arXiv 1910.07467), then the rotation of arXiv 2104.09864, read once and written once.
    The first programs take the query heads, the rest the key heads. Rounded once, at the store."""
    pid, first = tl.program_id(0), tl.cdiv(T * H, BLOCK_R)
    if pid < first:
        _norm_rope_rows(pid, q, q_out, q_weight, cos, sin, T, q_stride, eps, H, HALF, NORM, BLOCK_R, BLOCK_D)
    else:
        _norm_rope_rows(pid - first, k, k_out, k_weight, cos, sin, T, k_stride, eps, KV, HALF, NORM, BLOCK_R, BLOCK_D)


@jit
def _norm_rope_back_kernel(q, k, q_grad, k_grad, dq, dk, dw_q, dw_k, q_weight, k_weight, cos, sin, T, q_stride, k_stride, eps,
                           H: tl.constexpr, KV: tl.constexpr, HALF: tl.constexpr, NORM: tl.constexpr,
                           BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """With x^ = x / rms:  dw = sum g x^,  dx = (g w - x^ mean(g w x^)) / rms. The norm is recomputed: q and k are kept anyway."""
    pid, first = tl.program_id(0), tl.cdiv(T * H, BLOCK_R)
    if pid < first:
        _norm_rope_rows_back(pid, q, q_grad, dq, dw_q, q_weight, cos, sin, T, q_stride, eps, H, HALF, NORM, BLOCK_R, BLOCK_D)
    else:
        _norm_rope_rows_back(pid - first, k, k_grad, dk, dw_k, k_weight, cos, sin, T, k_stride, eps, KV, HALF, NORM, BLOCK_R, BLOCK_D)


def _rope_grid(q, k):
    """Tiles of 2,048 pairs, 16 a thread: 72 registers forward and 123 backward; 4,096 take 164 and 206. (Reported, not timed.)"""
    block_d = triton.next_power_of_2(q.shape[-1] // 2)
    block_r = max(1, 2048 // block_d)
    return -(-q.shape[0] * q.shape[1] // block_r), -(-k.shape[0] * k.shape[1] // block_r), block_r, block_d


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, q_weight, k_weight, cos, sin, eps):
        (T, H, hd), KV = q.shape, k.shape[1]
        q_out, k_out = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)
        norm, (of_q, of_k, block_r, block_d) = q_weight is not None, _rope_grid(q, k)
        _norm_rope_kernel[(of_q + of_k,)](q, k, q_out, k_out, q_weight if norm else q, k_weight if norm else k, cos, sin, T, q.stride(0),
                                          k.stride(0), eps, H=H, KV=KV, HALF=hd // 2, NORM=norm, BLOCK_R=block_r, BLOCK_D=block_d)
        ctx.save_for_backward(q, k, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        return q_out, k_out

    @staticmethod
    def backward(ctx, q_grad, k_grad):
        q, k, q_weight, k_weight, cos, sin = ctx.saved_tensors
        (T, H, hd), KV = q.shape, k.shape[1]
        dq, dk = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty(k.shape, dtype=k.dtype, device=k.device)
        norm, (of_q, of_k, block_r, block_d) = q_weight is not None, _rope_grid(q, k)
        dw_q = torch.empty(of_q, hd, dtype=torch.float32, device=q.device)
        dw_k = torch.empty(of_k, hd, dtype=torch.float32, device=q.device)
        _norm_rope_back_kernel[(of_q + of_k,)](q, k, q_grad.contiguous(), k_grad.contiguous(), dq, dk, dw_q, dw_k, q_weight if norm else q,
                                               k_weight if norm else k, cos, sin, T, q.stride(0), k.stride(0), ctx.eps, H=H, KV=KV,
                                               HALF=hd // 2, NORM=norm, BLOCK_R=block_r, BLOCK_D=block_d)
        if not norm:
            return dq, dk, None, None, None, None, None
        return dq, dk, dw_q.sum(0).to(q_weight.dtype), dw_k.sum(0).to(k_weight.dtype), None, None, None


def small(x):
    """Sampling on a CPU: a step has so few numbers that what it costs is the number of operations. Not a question of how many rows
    there are, or a row would be rounded differently in other company."""
    # grad first: a compiler knows that, and cuts its graph at the question after it
    return not torch.is_grad_enabled() and torch.is_inference_mode_enabled() and x.is_cpu and x.dtype == torch.float32


@functools.cache
def _of_width(width, eps):
    return torch.tensor((eps * width)**0.5), torch.tensor(width**-0.5)       # tensors: a number is made one in every call, for 1 us


def root_mean_square(x, eps):
    """sqrt(mean x^2 + eps) of each row, in three operations: hypot is the square root of a sum of squares."""
    epsilon, scale = _of_width(x.shape[-1], eps)
    return torch.linalg.vector_norm(x, 2, -1, True).hypot_(epsilon).mul_(scale)


def rms_norm(x, weight, eps):
    if small(x):                                                 # F.rms_norm there is nine small operations
        return x.div(root_mean_square(x, eps)).mul_(weight)
    return F.rms_norm(x, weight.shape, weight, eps)


def qk_norm_rope_small(q, k, q_weight, k_weight, cos_T, sin_T, eps):
    """Query and key heads together; the tables are full width and signed already."""
    x = torch.cat((q, k), 1)                                     # (T, n_head + n_kv_head, hd)
    q, k = x.split_with_sizes((q.shape[1], k.shape[1]), 1)
    if q_weight is not None:
        x.div_(root_mean_square(x, eps))
        q.mul_(q_weight), k.mul_(k_weight)
    swapped = x.roll(x.shape[-1] // 2, -1)
    x.mul_(cos_T).addcmul_(swapped, sin_T)
    return q, k


def qk_norm_rope(q, k, q_weight, k_weight, cos_T, sin_T, eps):
    """RMSNorm over each head (no weights: no norm), then RoPE. q (T, n_head, hd), k (T, n_kv_head, hd)."""
    if cos_T.ndim == 3:
        return qk_norm_rope_small(q, k, q_weight, k_weight, cos_T, sin_T, eps)
    if not fused(q):
        return qk_norm_rope_torch(q, k, q_weight, k_weight, cos_T, sin_T, eps)
    T, _, hd = q.shape
    expect("q", q, q.shape)
    expect("k", k, (T, k.shape[1], hd), (q.dtype,))
    expect("cos", cos_T, (T, hd // 2), (torch.float32,))
    expect("sin", sin_T, (T, hd // 2), (torch.float32,))
    assert cos_T.is_contiguous() and sin_T.is_contiguous(), f"cos or sin {tuple(cos_T.shape)} is not contiguous"
    for name, x in (("q", q), ("k", k)):                         # slices of one merged projection: any stride between tokens
        assert x.stride(1) == hd or x.shape[1] == 1, f"{name} {tuple(x.shape)}, stride {x.stride()}: a token's heads must touch"
    if q_weight is not None:
        expect("q_weight", q_weight, (hd,))
        expect("k_weight", k_weight, (hd,))
    return _NormRope.apply(q, k, q_weight, k_weight, cos_T, sin_T, eps)


# There is no RMSNorm kernel here: F.rms_norm is already fused on a GPU, and a Triton one of the usual kind loses to it at small widths.


def swiglu_torch(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate).mul_(up)


@jit
def _swiglu_kernel(x, out, width, BLOCK: tl.constexpr):
    """silu(a) b, silu(a) = a / (1 + e^-a) (arXiv 2002.05202); one program per row and BLOCK columns."""
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + t * 2 * width + c, mask=c < width, other=0.0).to(tl.float32)
    b = tl.load(x + t * 2 * width + width + c, mask=c < width, other=0.0).to(tl.float32)
    tl.store(out + t * width + c, (a * tl.sigmoid(a) * b).to(out.dtype.element_ty), mask=c < width)


@jit
def _swiglu_back_kernel(x, grad, dx, width, BLOCK: tl.constexpr):
    """db = g silu(a),  da = g b s (1 + a (1 - s)) with s = sigmoid(a)."""
    t, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(x + t * 2 * width + c, mask=c < width, other=0.0).to(tl.float32)
    b = tl.load(x + t * 2 * width + width + c, mask=c < width, other=0.0).to(tl.float32)
    g = tl.load(grad + t * width + c, mask=c < width, other=0.0).to(tl.float32)
    s = tl.sigmoid(a)
    tl.store(dx + t * 2 * width + c, (g * b * s * (1 + a * (1 - s))).to(dx.dtype.element_ty), mask=c < width)
    tl.store(dx + t * 2 * width + width + c, (g * a * s).to(dx.dtype.element_ty), mask=c < width)


class _Swiglu(torch.autograd.Function):                          # BLOCK 1024: 8 columns a thread
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        T, width = x.shape[0], x.shape[1] // 2
        out = torch.empty(T, width, dtype=x.dtype, device=x.device)
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
    if small(gate_up) or not fused(gate_up):
        return swiglu_torch(gate_up)
    assert gate_up.ndim == 2 and gate_up.shape[1] % 2 == 0 and gate_up.is_contiguous(), \
        f"gate_up {tuple(gate_up.shape)}, stride {gate_up.stride()}: expected contiguous (T, 2 d_ff)"
    return _Swiglu.apply(gate_up)


# -----------------------------------------------------------------------------
# the addressed uniform: a hash of (seed, visit, problem, index, position). 32-bit multiplies and xor-shifts, done in
# int64 and masked, so that torch on any device and Triton give the same 24 bits for ever (test vectors: tests/).


def _mix(h, word):
    """One word into the hash. Python runs these lines on torch tensors, Triton compiles them: the same text is the same bits."""
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
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    h = _mix_jit(tl.load(address + i, mask=i < n, other=0), tl.load(position + i, mask=i < n, other=0))
    tl.store(out + i, (h >> 8).to(tl.float32) * 5.9604644775390625e-08, mask=i < n)      # 2^-24


def uniform(seed, visit, problem, index, position, device=None):
    """One number in [0, 1) for each address; the five words are ints or int64 tensors that broadcast."""
    words = seed, visit, problem, index, position
    device = torch.device(device or next((w.device for w in words if torch.is_tensor(w)), "cpu"))
    # a fill, not a copy: copying a number to a GPU would make it wait
    words = [w.to(device, torch.int64) if torch.is_tensor(w) else torch.full((), w, dtype=torch.int64, device=device) for w in words]
    return uniform_at(address(*words[:4]), words[4])


def address(seed, visit, problem, index):
    """The hash of the four words that do not change while a sequence grows."""
    h = torch.full((), 0x9E3779B9, dtype=torch.int64, device=index.device)
    for w in (seed, visit, problem, index):
        h = _mix(h, w)
    return h


def uniform_at(address, position):
    """uniform() with its first four words hashed before: the same bits for a fifth of the work, in each step of the sampler."""
    if fused(address):
        address, position = (x.contiguous() for x in torch.broadcast_tensors(address, position))
        out = torch.empty(address.shape, dtype=torch.float32, device=address.device)
        _uniform_kernel[(-(-out.numel() // 256),)](out, address, position, out.numel(), BLOCK=256)
        return out
    return (_mix(address, position) >> 8).to(torch.float32) * 2.0**-24


# -----------------------------------------------------------------------------
# the draw: one token a row by inverse CDF, in vocabulary order (no sort unless top-p asks for one)


def argmax(z_NV):
    """The first of the largest. numpy's is a tenth of torch's time on a CPU."""
    return torch.from_numpy(z_NV.numpy().argmax(1)) if small(z_NV) else z_NV.argmax(1)


def draw_torch(logits_NV, uniform_N, temperature_N, top_k_N=None, top_p_N=None):
    z = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    greedy_N = temperature_N == 0
    seen = set(temperature_N.tolist()) if not z.is_cuda else {0.0, math.nan}     # a look makes a GPU wait, and spares a CPU a pass
    if seen - {0.0, 1.0}:
        z = z / torch.where(greedy_N, 1.0, temperature_N).to(z.dtype).unsqueeze(1)
    p = whole = z.softmax(1)                                     # (N, V), one pass; a drawn token's log is as exact as its weight
    kept_N = z.new_zeros(len(z))
    if top_k_N is not None or top_p_N is not None:
        sorted_p, order = p.sort(dim=1, descending=True, stable=True)
        before = sorted_p.cumsum(1).sub_(sorted_p)               # mass strictly ahead of each token
        rank = torch.arange(p.shape[1], device=p.device)
        keep = torch.ones_like(p, dtype=torch.bool)
        if top_k_N is not None:
            keep &= (rank < top_k_N.unsqueeze(1)) | (top_k_N == 0).unsqueeze(1)
        if top_p_N is not None:                                  # top-p of what top-k left, as the rest of the field does it
            mass = (sorted_p * keep).sum(1, keepdim=True)
            keep &= (before < top_p_N.unsqueeze(1) * mass) | (top_p_N >= 1).unsqueeze(1)
        keep[:, 0] = True
        full_N = keep.all(1)
        p = p * torch.zeros_like(keep).scatter_(1, order, keep)
        kept_N = torch.where(full_N | greedy_N, kept_N, p.sum(1).log())
    if seen == {0.0}:
        token_N = argmax(z)
        return token_N, whole.gather(1, token_N.unsqueeze(1)).squeeze(1).log(), kept_N
    cdf = p.cumsum(1)
    total = cdf[:, -1:]
    # strictly below the total, so that the first entry above it exists and its token has weight
    target = torch.minimum(uniform_N.to(p.dtype).unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    token_N = torch.searchsorted(cdf, target, right=True).squeeze(1)
    token_N = token_N.clamp_(max=p.shape[1] - 1)                 # logits that are not finite: the log-prob is nan, the caller's to see
    if 0.0 in seen:
        token_N = torch.where(greedy_N, z.argmax(1), token_N)
    return token_N, whole.gather(1, token_N.unsqueeze(1)).squeeze(1).log(), kept_N


# considered: one program for a whole row (64 rows of 151,936 leave half of an H200 idle, and the rest waits for 37 loads one after
# another, twice); slices of 32,768, whose numbers no longer stay in registers; of 2,048, which make more partial sums than work
DRAW_SLICE = 8192                                                # logits of one program: 32 a thread


@jit
def _order(x):
    """fp32 bits as an int32 that sorts like the number: a search over numbers becomes a search over 32 bits."""
    i = x.to(tl.int32, bitcast=True)
    return i ^ ((i >> 31) & 0x7FFFFFFF)


@jit
def _above(z, V, beta, m, cut, BLOCK: tl.constexpr):
    """How many tokens lie strictly above the cut, and their mass in units of e^m. Summed lane by lane, and over lanes once at the end."""
    count, mass = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.float32)
    for a in range(0, V, BLOCK):
        c = a + tl.arange(0, BLOCK)
        x = tl.load(z + c, mask=c < V, other=-float("inf")).to(tl.float32) * beta
        above = (_order(x) > cut) & (c < V)
        count += above.to(tl.int32)
        mass += tl.where(above, tl.exp(x - m), 0.0)
    return tl.sum(count, 0), tl.sum(mass, 0)


@jit
def _cut(z, V, beta, m, limit, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Bisection: the lowest cut above which fewer than `limit` tokens (or less than `limit` mass) lie. 32 halvings of the
    32 bits end at a logit that exists. Each reads the row again, from the L2 cache; a sort would move it through memory."""
    low, high = tl.full((), -2147483648, tl.int32), _order(m)
    while low < high:
        middle = (low & high) + ((low ^ high) >> 1)              # the mean without overflow
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
def _slice_kernel(logits, temperature, m_out, s_out, best_out, stride, V, SLICES, SLICE: tl.constexpr):
    """One slice of one row a program: its maximum m, sum e^(z - m), and where the maximum is (the first on a tie). A batch of 64 rows
    has fewer rows than a GPU has multiprocessors; its slices are a thousand."""
    n, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    beta = tl.load(temperature + n).to(tl.float32)
    beta = 1 / tl.where(beta == 0, 1.0, beta)
    c = i * SLICE + tl.arange(0, SLICE)
    x = tl.load(logits + n * stride + c, mask=c < V, other=-float("inf")).to(tl.float32) * beta
    top = tl.max(x, 0)
    m = tl.maximum(top, -1e30)                                   # a slice of excluded tokens has sum 0, not nan
    tl.store(m_out + n * SLICES + i, m)
    tl.store(s_out + n * SLICES + i, tl.sum(tl.exp(x - m), 0))
    tl.store(best_out + n * SLICES + i, tl.min(tl.where(x == top, c, V - 1), 0))


@jit
def _draw_kernel(logits, uniform, temperature, top_k, top_p, m_in, s_in, best_in, token_out, logp_out, kept_out, stride, V, SLICES,
                 HAS_K: tl.constexpr, HAS_P: tl.constexpr, SLICE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """One row a program: (1) its slices' maxima and sums become the row's, (2) where to cut, for a row that truncates, (3) the token
    at which the running sum of what was kept passes u. What is kept is all above the cut and the first `ties` tokens equal to it.
    A row that keeps everything reads only the slice in which u falls."""
    n = tl.program_id(0).to(tl.int64)
    z = logits + n * stride
    beta = tl.load(temperature + n).to(tl.float32)
    greedy = beta == 0
    beta = 1 / tl.where(greedy, 1.0, beta)

    j = tl.arange(0, BLOCK_S)
    m_S = tl.load(m_in + n * SLICES + j, mask=j < SLICES, other=-1e30)
    m = tl.max(m_S, 0)
    s_S = tl.load(s_in + n * SLICES + j, mask=j < SLICES, other=0.0) * tl.exp(m_S - m)
    s = tl.sum(s_S, 0)
    best = tl.min(tl.where(m_S == m, tl.load(best_in + n * SLICES + j, mask=j < SLICES, other=V - 1), V - 1), 0)

    cut, ties = tl.full((), -2147483648, tl.int32), V
    mass, whole = s, tl.full((), 1, tl.int32)
    if HAS_K:
        k = tl.load(top_k + n).to(tl.int32)
        if (k > 0) & (k < V):
            cut, count, above, e = _cut(z, V, beta, m, k, True, BLOCK)
            ties = k - count
            mass, whole = above + ties * e, whole * 0
    if HAS_P:                                                    # of the mass that top-k left
        p = tl.load(top_p + n).to(tl.float32)
        if p < 1:
            cut_p, count, above, e = _cut(z, V, beta, m, p * mass, False, BLOCK)
            wanted = tl.maximum(tl.ceil((p * mass - above) / e), 1.0)            # as many ties as begin below the limit
            wanted = tl.minimum(wanted, V * 1.0).to(tl.int32)
            ties = tl.where(cut_p == cut, tl.minimum(ties, wanted), wanted)
            cut, mass, whole = cut_p, above + ties * e, whole * 0

    target = tl.load(uniform + n) * mass
    here = tl.min(tl.where((tl.cumsum(s_S, 0) > target) & (s_S > 0), j, BLOCK_S), 0)
    here = tl.where(here < BLOCK_S, here, tl.max(tl.where(s_S > 0, j, 0), 0))
    start = tl.where(whole > 0, here * SLICE, 0)
    end = tl.where(whole > 0, tl.minimum(start + SLICE, V), V)
    run = tl.where(whole > 0, tl.sum(tl.where(j < here, s_S, 0.0), 0), 0.0)
    seen = tl.full((), 0, tl.int32)
    token, last = tl.full((), 0, tl.int32) + V, start
    for a in range(start, end, BLOCK):
        c = a + tl.arange(0, BLOCK)
        x = tl.load(z + c, mask=c < end, other=-float("inf")).to(tl.float32) * beta
        e = tl.exp(x - m)
        if HAS_K or HAS_P:
            tie = ((_order(x) == cut) & (c < end)).to(tl.int32)
            nth = seen + tl.cumsum(tie, 0) - tie
            e = tl.where((_order(x) > cut) | ((tie > 0) & (nth < ties)), e, 0.0)
            seen += tl.sum(tie, 0)
        hit = (run + tl.cumsum(e, 0) > target) & (e > 0)
        token = tl.minimum(token, tl.min(tl.where(hit, c, V), 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0, c, 0), 0))
        run += tl.sum(e, 0)
    token = tl.where(token < V, token, last)                     # u at the very end, and the sums rounded the other way
    token = tl.where(greedy, best, token)
    x = tl.load(z + token).to(tl.float32) * beta
    tl.store(token_out + n, token.to(tl.int64))
    tl.store(logp_out + n, x - m - tl.log(s))
    tl.store(kept_out + n, tl.where(greedy | (whole > 0), 0.0, tl.log(run / s)))


def draw(logits_NV, uniform_N, temperature_N, top_k_N=None, top_p_N=None):
    """-> token_N, logp_N, kept_N.

    logp is under the full tempered softmax, whatever was truncated; kept is the log of the mass that survived top-k, then
    top-p (0 without truncation). temperature 0: the most likely token (the first on a tie), logp at temperature 1.
    top_k 0 and top_p 1 mean no truncation. None for both skips the search."""
    N, V = logits_NV.shape
    expect("logits", logits_NV, (N, V))
    for name, x in (("uniform", uniform_N), ("temperature", temperature_N), ("top_k", top_k_N), ("top_p", top_p_N)):
        if x is not None:
            expect(name, x, (N,))
    if not fused(logits_NV):
        return draw_torch(logits_NV, uniform_N, temperature_N, top_k_N, top_p_N)
    make = lambda *shape, dtype=torch.float32: torch.empty(*shape, dtype=dtype, device=logits_NV.device)
    token_N, logp_N, kept_N = make(N, dtype=torch.int64), make(N), make(N)
    slices = -(-V // DRAW_SLICE)
    m_NS, s_NS, best_NS = make(N, slices), make(N, slices), make(N, slices, dtype=torch.int32)
    _slice_kernel[(N, slices)](logits_NV, temperature_N, m_NS, s_NS, best_NS, logits_NV.stride(0), V, slices, SLICE=DRAW_SLICE, num_warps=8)
    has_k, has_p = top_k_N is not None, top_p_N is not None
    _draw_kernel[(N,)](logits_NV, uniform_N, temperature_N, top_k_N if has_k else uniform_N, top_p_N if has_p else uniform_N, m_NS, s_NS,
                       best_NS, token_N, logp_N, kept_N, logits_NV.stride(0), V, slices, HAS_K=has_k, HAS_P=has_p, SLICE=DRAW_SLICE,
                       BLOCK_S=max(16, triton.next_power_of_2(slices)), BLOCK=4096, num_warps=8)       # 16 warps spill under Triton 3.6
    return token_N, logp_N, kept_N


# -----------------------------------------------------------------------------
# which backend runs

RUNS = {
    "train": {"flash": _flash, "varlen": _varlen, "torch": None},
    "decode": {"flash": _flash_decode, "triton": _triton_decode, "torch": decode_attention_torch},
    "fused": {"triton": (_LogprobFused.apply, _NormRope.apply, _Swiglu.apply),
              "torch": (_LogprobAt.apply, qk_norm_rope_torch, swiglu_torch)},
}
FORCED = {"flash": ("flash", "flash"), "varlen": ("varlen", "triton"), "torch": ("torch", "torch")}      # what runs train, and decode
_picked = {}


def candidates(what, kind):
    """What could run on this kind of device, best first."""
    flash = ["flash"] if kind == "cuda" and importlib.util.find_spec("flash_attn") else []
    if what == "train":
        return flash + (["varlen"] if kind == "cuda" else [])
    return (flash if what == "decode" else []) + (["triton"] if triton and (kind == "cuda" or INTERPRET) else [])


def _outcome(what, name, kind, low, dtype):
    """What a backend makes of tiny random numbers that `low` can hold, computed in `dtype`: results, and gradients where there are any."""
    g = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=g).to(kind, low).to(dtype).requires_grad_(what != "decode")
    if what == "decode":                                         # lengths at both edges of a page; the pages must hold the new keys
        lengths = torch.tensor([0, 255, 256, 300], dtype=torch.int32, device=kind)
        table = torch.tensor([[3, 0], [1, 2], [5, 4], [7, 6]], dtype=torch.int32, device=kind)
        pages = rand(8, 256, 2, 64), rand(8, 256, 2, 64)
        o = RUNS[what][name](rand(4, 4, 64), rand(4, 2, 64), rand(4, 2, 64), *pages, table, lengths)
        return [x.float() for x in (o, *pages)]
    if what == "train":                                          # segments with a parent, a grandparent and without
        leaves = rand(16, 4, 64), rand(16, 2, 64), rand(16, 2, 64)
        plan = [0, 5, 12, 15, 16], [-1, 0, 1, -1]
        attend = packed_attention_torch(plan[0], 7, plan[1]) if name == "torch" else _packed_by(RUNS[what][name], *plan)
        out = [attend(0, *leaves)]
    else:
        leaves = hidden, weight, qkv, q_weight, k_weight, x = rand(5, 64), rand(300, 64), rand(5, 4, 64), rand(64), rand(64), rand(5, 64)
        logprob, norm_rope, act = RUNS[what][name]
        angle = torch.arange(160, dtype=torch.float32, device=kind).view(5, 32)
        out = [*logprob(hidden, weight, torch.arange(10, device=kind).view(5, 2), 0.7), act(x),
               *norm_rope(qkv[:, :2], qkv[:, 2:3], q_weight, k_weight, angle.cos(), angle.sin(), 1e-6)]
    grads = torch.autograd.grad(out, leaves, [rand(*o.shape).to(o.dtype) for o in out])
    return [x.detach().float() for x in (*out, *grads)]


def picked(what, kind):
    """The name of what runs "train" attention, "decode" attention or the "fused" steps on "cuda", "cpu" or "mps". Every candidate
    first proves itself, forward and backward: an error of at most twice what the torch twin makes in the same precision, and the
    rounding of the result, or it is dropped, with a printed line."""
    if (what, kind) in _picked:
        return _picked[what, kind]
    forced = os.environ.get("NANORL_ATTENTION", "") if what != "fused" else ""
    if forced and forced not in FORCED:
        raise ValueError(f"NANORL_ATTENTION={forced} is not known; known: {', '.join(FORCED)}")
    low = torch.bfloat16 if kind == "cuda" else torch.float32
    for name in [FORCED[forced][what == "decode"]] if forced else candidates(what, kind):
        if name == "torch":
            break
        try:
            with torch.inference_mode(False), torch.enable_grad():
                ours = _outcome(what, name, kind, low, low)
                with torch.nn.attention.sdpa_kernel(SDPBackend.MATH):               # the twin is the same on every card
                    twins = [_outcome(what, "torch", kind, low, dtype) for dtype in (low, torch.float32)]
                for got, plain, exact in zip(ours, *twins):
                    error, rounding = float((got - exact).abs().max()), torch.finfo(low).eps / 2 * float(exact.abs().max())
                    allowed = 2 * float((plain - exact).abs().max()) + rounding + 1e-3
                    assert error <= allowed, f"its error is {error:.2g}, at most {allowed:.2g} is right"
            break
        except Exception as why:                                 # whatever a foreign package raises on this machine
            if forced:
                raise ValueError(f"NANORL_ATTENTION={forced}: {name} for {what} on {kind} failed its check: {why}") from why
            print(f"backend: {name} for {what} on {kind} dropped: {type(why).__name__}: {' '.join(str(why).split())[:200]}", flush=True)
    else:
        name = "torch"
    _picked[what, kind] = name
    return name


def backend(device):
    """In words, for the log; picks, if nobody has yet. Call it before the first step: a CUDA graph cannot be captured around a check."""
    kind = torch.device(device).type
    names = {what: picked(what, kind) for what in RUNS}
    versions = {"torch": torch.__version__, "triton": getattr(triton, "__version__", "no")}
    if "flash" in names.values():
        versions["flash_attn"] = __import__("flash_attn").__version__
    return f"{', '.join(f'{what} {name}' for what, name in names.items())} on {kind} ({', '.join(f'{k} {v}' for k, v in versions.items())})"


def main():
    print(backend("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"))


if __name__ == "__main__":
    main()
