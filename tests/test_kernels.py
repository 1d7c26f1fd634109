"""The torch twins against the plainest torch there is, the picker, and the flash-attn path
through a module that only pretends to be it."""
import math
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F

import kernels
from common import backend, cpu


to_the_bit = pytest.mark.skipif(not cpu.ON, reason="NANORL_CPU_TRICKS=0: "
                                "equal to the bit is what common/cpu.py gives; else to 1e-5")


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


# -----------------------------------------------------------------------------
# packed attention


def one_by_one(cu, parent, q, k, v):
    """Each segment alone: the keys of its ancestors before its own, a mask written out, a
    softmax written out."""
    outs, chain = [], []
    for i in range(len(cu) - 1):
        own = list(range(cu[i], cu[i + 1]))
        chain.append((chain[parent[i]] if parent[i] >= 0 else []) + own)
        K, V = (x[chain[i]].repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        z = torch.einsum("qhd,khd->hqk", q[own], K) / math.sqrt(q.shape[-1])
        sees = torch.arange(len(chain[i]))[None] <= torch.arange(len(own))[:, None] + len(chain[i]) - len(own)
        outs.append(torch.einsum("hqk,khd->qhd", z.masked_fill(~sees, -math.inf).softmax(-1), V))
    return torch.cat(outs)


ROWS = [                                                         # cu_seqlens, parent
    ([0, 1], [-1]),                                              # one token
    ([0, 9], [-1]),
    ([0, 3, 3, 4, 21, 38], [-1] * 5),          # an empty segment, a single token, two of one length
    ([0, 7, 10, 11, 19, 24], [-1, 0, 0, 0, -1]),  # a prompt and three responses, then a stranger
    ([0, 4, 9, 10, 16, 18], [-1, 0, 1, 1, 0]),                   # two levels: prompt, turn, answers
    ([0, 40, 57, 75, 90], [-1, -1, 0, 1]),                       # children of different parents
]


@pytest.mark.parametrize("cu, parent", ROWS)
@pytest.mark.parametrize("heads, kv", [(2, 2), (4, 1)])
def test_packed_is_each_segment_alone_forward_and_backward(cu, parent, heads, kv):
    T = cu[-1]
    leaves = [rand(T, n, 8, seed=i, dtype=torch.float64).requires_grad_()
              for i, n in enumerate((heads, kv, kv))]
    attend = kernels.packed_attention(cu, max(b - a for a, b in zip(cu, cu[1:])),
                                      None if set(parent) == {-1} else parent)
    got, want = attend(0, *leaves), one_by_one(cu, parent, *leaves)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(attend(1, *leaves), want)         # the plan serves every layer
    g = rand(T, heads, 8, dtype=torch.float64)
    for a, b in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, leaves, g)):
        torch.testing.assert_close(a, b)


def test_a_shared_prompt_is_a_repeated_prompt():
    """Merging two attention calls (prompt, response) by their log-sum-exp gives the right output
    and, in torch, a silently wrong gradient: the backward of the varlen call ignores what flows
    into the log-sum-exp. So gradients are compared."""
    prompt, a, b = (rand(n, 3, 2, 8, seed=n, dtype=torch.float64).requires_grad_() for n in (6, 4, 5))
    shared = kernels.packed_attention([0, 6, 10, 15], 6,
                                      parent=[-1, 0, 0])(0, *torch.cat([prompt, a, b]).unbind(1))
    twice = kernels.packed_attention([0, 10, 21], 11)(0, *torch.cat([prompt, a, prompt, b]).unbind(1))
    torch.testing.assert_close(shared, torch.cat([twice[:10], twice[16:]]))
    weight = rand(9, 2, 8, dtype=torch.float64)
    one = torch.autograd.grad((shared[6:] * weight).sum(), (prompt, a, b))
    two = torch.autograd.grad((torch.cat([twice[6:10], twice[16:]]) * weight).sum(), (prompt, a, b))
    for x, y in zip(one, two):
        torch.testing.assert_close(x, y)


def test_a_parent_behind_its_child_and_a_wrong_length_are_named():
    q = rand(4, 1, 8)
    with pytest.raises(AssertionError, match="parent must stand before"):
        kernels.packed_attention([0, 2, 4], 2, parent=[1, -1])(0, q, q, q)
    with pytest.raises(AssertionError, match=r"q is \(4, 1, 8\), expected \(5, 1, 8\)"):
        kernels.packed_attention([0, 5], 5)(0, q, q, q)
    with pytest.raises(AssertionError, match="max_len"):
        kernels.packed_attention([0, 5], 4)


# -----------------------------------------------------------------------------
# flash-attn and torch's varlen, pretended: the calls and their shapes are checked, the twin does the work


def fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k):
    """The shared meaning of both calls: ragged rows, causal, aligned to the bottom right."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and cu_q.shape == cu_k.shape
    assert cu_q[0] == cu_k[0] == 0 and cu_q[-1] == q.shape[0] and cu_k[-1] == k.shape[0] == v.shape[0]
    assert max_q == int(cu_q.diff().max()) and max_k == int(cu_k.diff().max())
    assert q.ndim == 3 and q.shape[1] % k.shape[1] == 0 and q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    outs = []
    for (a, b), (c, d) in zip(zip(cu_q.tolist(), cu_q.tolist()[1:]), zip(cu_k.tolist(), cu_k.tolist()[1:])):
        sees = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
        o = F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])),
                                           attn_mask=sees, enable_gqa=True)
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs)


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q,
                           max_seqlen_k, dropout_p=0.0, softmax_scale=None,
                           causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
                           deterministic=False, return_attn_probs=False, block_table=None):
    assert causal and dropout_p == 0 and softmax_scale is None and not return_attn_probs
    return fake_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, rotary_cos=None,
                            rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
                            cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
                            window_size=(-1, -1), softcap=0.0, rotary_interleaved=True,
                            alibi_slopes=None, num_splits=0, return_softmax_lse=False):
    B, one, H, hd = q.shape
    assert one == 1 and k.shape == v.shape == (B, 1, k_cache.shape[2],
                                               hd), "the new keys come as (batch, 1, heads, head_dim)"
    assert k_cache.shape[1] % 256 == 0, "flash-attn refuses pages that are no multiple of 256"
    assert block_table.dtype == cache_seqlens.dtype == torch.int32 and causal
    assert num_splits == 1, "left to choose, it has returned nan"
    return kernels.decode_attention_torch(q[:, 0], k[:, 0], v[:, 0], k_cache,
                                          v_cache, block_table, cache_seqlens)[:, None]


@pytest.fixture
def fakes(monkeypatch):
    calls = []

    def counted(f):
        def wrapped(*args, **kwargs):
            calls.append(f.__name__)
            return f(*args, **kwargs)
        return wrapped

    module = types.ModuleType("flash_attn")
    module.__spec__ = types.SimpleNamespace(name="flash_attn")
    module.__version__ = "0.0.fake"
    module.flash_attn_varlen_func = counted(flash_attn_varlen_func)
    module.flash_attn_with_kvcache = counted(flash_attn_with_kvcache)
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(backend, "picks", {})
    return module, calls


@pytest.mark.parametrize("cu, parent", ROWS)
def test_the_flash_path_is_the_twin(fakes, monkeypatch, cu, parent):
    monkeypatch.setenv("NANORL_ATTENTION", "flash")
    leaves = [rand(cu[-1], heads, 16, seed=heads).requires_grad_() for heads in (4, 2, 2)]
    longest = max(b - a for a, b in zip(cu, cu[1:]))
    got = kernels.packed_attention(cu, longest, parent)(0, *leaves)
    want = kernels.packed_attention_torch(cu, longest, parent)(0, *leaves)
    torch.testing.assert_close(got, want)
    g = rand(*got.shape)
    for a, b in zip(torch.autograd.grad(got, leaves, g), torch.autograd.grad(want, leaves, g)):
        torch.testing.assert_close(a, b)
    assert fakes[1] == ["flash_attn_varlen_func"] * 2  # its proof, and the one call for the whole row


@pytest.mark.parametrize("page, through_flash", [(256, True), (16, False)])
def test_decode_goes_to_flash_where_its_pages_allow(fakes, monkeypatch, page, through_flash):
    monkeypatch.setenv("NANORL_ATTENTION", "flash")
    q, k, v = rand(3, 4, 16), rand(3, 2, 16), rand(3, 2, 16)
    pools = rand(7, page, 2, 16, seed=1), rand(7, page, 2, 16, seed=2)
    table = torch.tensor([[1, 2], [4, 3], [5, 6]], dtype=torch.int32)
    lengths = torch.tensor([0, page - 1, page], dtype=torch.int32)
    pages = [x.clone() for x in pools]
    got = kernels.decode_attention(q, k, v, *pages, table, lengths)
    want = kernels.decode_attention_torch(q, k, v, *pools, table, lengths)
    assert torch.equal(got, want) and torch.equal(pages[0], pools[0]) and torch.equal(pages[1], pools[1])
    assert fakes[1] == ["flash_attn_with_kvcache"] * (2 if through_flash else 1)
    assert "train flash, decode flash, fused torch on cpu" in kernels.backend("cpu")


@pytest.mark.parametrize("flag", [True, False])
def test_the_varlen_path_with_and_without_its_gqa_flag(monkeypatch, flag):
    """torch 2.11 to 2.13 differ in the flag."""
    module = pytest.importorskip("torch.nn.attention.varlen")

    def new(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None,
            window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa or q.shape[1] == k.shape[1]
        return old(q, k, v, cu_q, cu_k, max_q, max_k, window_size=window_size)

    def old(q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)):
        assert window_size == (-1, 0) and scale is None
        return fake_varlen(q, k, v, cu_q, cu_k, max_q, max_k)

    monkeypatch.setattr(module, "varlen_attn", new if flag else old)
    monkeypatch.setattr(backend, "_varlen_attn", backend._varlen_attn.__wrapped__)       # asked anew
    monkeypatch.setattr(backend, "picks", {})
    monkeypatch.setenv("NANORL_ATTENTION", "varlen")
    q, k = rand(12, 4, 8), rand(12, 2, 8)
    torch.testing.assert_close(kernels.packed_attention([0, 5, 12], 7, [-1, 0])(0, q, k, k),
                               kernels.packed_attention_torch([0, 5, 12], 7, [-1, 0])(0, q, k, k))
    assert kernels.picked("train", "cpu") == "varlen"


def wrong_forward(*args, **kwargs):
    return flash_attn_varlen_func(*args, **kwargs) * 1.01


def wrong_backward(*args, **kwargs):
    o = flash_attn_varlen_func(*args, **kwargs)
    return o + 0.01 * (o - o.detach())


def wrong_nan(*args, **kwargs):
    return flash_attn_varlen_func(*args, **kwargs) * math.nan


def wrong_raise(*args, **kwargs):
    raise RuntimeError("no kernel image is available")


@pytest.mark.parametrize("wrong", [wrong_forward, wrong_backward, wrong_nan, wrong_raise])
def test_a_backend_that_is_wrong_is_dropped_aloud_and_refused_when_forced(fakes, monkeypatch, capsys, wrong):
    """A wheel built for another card imports, and returns noise or nothing. One per cent off is
    found, in either direction."""
    fakes[0].flash_attn_varlen_func = wrong
    monkeypatch.setenv("NANORL_ATTENTION", "flash")
    with pytest.raises(ValueError, match="NANORL_ATTENTION=flash: flash for train on cpu failed its check"):
        kernels.picked("train", "cpu")
    monkeypatch.delenv("NANORL_ATTENTION")
    monkeypatch.setattr(kernels, "candidates", lambda what, kind: [] if what == "fused" else ["flash"])
    assert kernels.picked("train", "cpu") == "torch" and kernels.picked("decode", "cpu") == "flash"
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 and said[0].startswith("backend: flash for train on cpu dropped: ")


def test_the_proof_leaves_the_random_state_alone_and_an_unknown_name_is_an_error(fakes, monkeypatch):
    monkeypatch.setenv("NANORL_ATTENTION", "flash")
    before = torch.get_rng_state()
    kernels.picked("train", "cpu")
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setenv("NANORL_ATTENTION", "falsh")
    with pytest.raises(ValueError, match="NANORL_ATTENTION=falsh is not known; known: flash, varlen, torch"):
        kernels.picked("decode", "cpu")


def test_without_triton_the_twins_serve():
    """A Mac has none; the kernels must then be text that nobody compiles, not an import error."""
    code = """
import sys
sys.modules["triton"] = None
import torch, kernels
hidden = torch.randn(3, 8, requires_grad=True)
kernels.linear_logprob(hidden, torch.randn(9, 8), torch.tensor([0, 1, 2]))[0].sum().backward()
angle = torch.ones(3, 4)
q, k = kernels.qk_norm_rope(torch.randn(3, 2, 8), torch.randn(3, 1, 8), torch.ones(8), torch.ones(8),
                                angle, angle, 1e-6)
kernels.packed_attention([0, 3], 3)(0, q, k, k)
kernels.draw(kernels.swiglu(torch.randn(3, 8)), kernels.uniform(0, 0, 0, torch.arange(3), 0), torch.ones(3))
assert kernels.triton is None and "fused torch" in kernels.backend("cpu")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# -----------------------------------------------------------------------------
# decode


@pytest.mark.parametrize("heads, kv", [(2, 2), (8, 1)])
def test_decode_is_attention_over_what_was_appended(heads, kv):
    """Token by token into pages of 4, in shuffled pages, three rows of different age: each step
    is the last row of full attention."""
    lengths, T, page = [0, 3, 6], 9, 4
    keys = rand(3, T + 6, kv, 16, seed=1)
    values = rand(3, T + 6, kv, 16, seed=2)
    queries = rand(3, T + 6, heads, 16, seed=3)
    table = torch.tensor([[9, 2, 7, 4], [1, 8, 3, 5], [10, 6, 11, 12]], dtype=torch.int32)
    k_pages, v_pages = torch.zeros(13, page, kv, 16), torch.zeros(13, page, kv, 16)
    for b, n in enumerate(lengths):
        for j in range(n):
            k_pages[table[b, j // page], j % page], v_pages[table[b, j // page],
                                                            j % page] = keys[b, j], values[b, j]
    for step in range(T):
        at = [n + step for n in lengths]
        new = [torch.stack([x[b, at[b]] for b in range(3)]) for x in (queries, keys, values)]
        o = kernels.decode_attention(*new, k_pages, v_pages, table, torch.tensor(at, dtype=torch.int32))
        for b in range(3):
            n = at[b] + 1
            want = one_by_one([0, n], [-1], queries[b, :n], keys[b, :n], values[b, :n])[-1]
            torch.testing.assert_close(o[b], want)
    assert torch.equal(k_pages[0], torch.zeros(page, kv, 16))    # the page that nobody owns


# -----------------------------------------------------------------------------
# log-probs


@pytest.mark.parametrize("N, V, K, temperature, chunk, many, blocks", [
    (1, 5, 1, 1.0, 1 << 22, 1024, 1),
    (40, 33, 1, 0.7, 33 * 16, 16, 3),            # chunks of rows
    (40, 33, 4, 1.5, 33 * 16, 1024, 3),          # tiles of the vocabulary, for all rows
    (40, 33, 4, 0.7, 128, 8, 15),                # and for some of them
])
@pytest.mark.parametrize("run", [kernels.logprob_torch, cpu.logprob], ids=["twin", "cpu"])
def test_linear_logprob_is_log_softmax(run, N, V, K, temperature, chunk, many, blocks, monkeypatch):
    """One block and several; forward and backward, with a gradient into the log-probs and into
    the entropy, and into one of them only."""
    monkeypatch.setattr(kernels, "CHUNK", chunk)
    monkeypatch.setattr(cpu, "CHUNK", chunk)
    monkeypatch.setattr(cpu, "MANY", many)
    assert len(cpu.blocks(N, V)) == blocks
    hidden = rand(N, 12, dtype=torch.float64).requires_grad_()
    weight = rand(V, 12, dtype=torch.float64).requires_grad_()
    ids = torch.randint(V, (N, K), generator=torch.Generator().manual_seed(0))
    ids[0] = ids[0, 0]                                           # an id named K times
    logp = (hidden @ weight.t() / temperature).log_softmax(-1)
    want = logp.gather(1, ids), -(logp.exp() * logp).sum(-1)
    got = run(hidden, weight, ids, temperature)
    torch.testing.assert_close(kernels.linear_logprob_at(hidden, weight, ids, temperature), want[0])
    if K == 1:
        public = kernels.linear_logprob(hidden, weight, ids[:, 0], temperature)
        torch.testing.assert_close(public, (want[0][:, 0], want[1]))
    g, g_H = rand(N, K, dtype=torch.float64), rand(N, dtype=torch.float64)
    for use in (0,), (1,), (0, 1):
        a, b = (torch.autograd.grad([o[i] for i in use], (hidden, weight), [(g, g_H)[i] for i in use],
                                    retain_graph=True) for o in (got, want))
        for x, y in zip((*got, *a), (*want, *b)):
            torch.testing.assert_close(x, y)


def test_twins_pass_gradcheck():
    hidden = rand(3, 4, dtype=torch.float64).requires_grad_()
    weight = rand(7, 4, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 6], [3, 3], [5, 1]])
    assert torch.autograd.gradcheck(lambda h, w: kernels._LogprobAt.apply(h, w, ids, 0.8), (hidden, weight),
                                    # a second backward recomputes what the first had at hand
                                    nondet_tol=1e-12)
    qkv = rand(3, 4, 8, dtype=torch.float64).requires_grad_()
    weights = [rand(8, seed=s, dtype=torch.float64).requires_grad_() for s in (1, 2)]
    tables = kernels.rope_tables(torch.tensor([0, 5, 2]), 1 / 100 ** (torch.arange(4) / 4))

    def norm(x, a, b):
        return kernels.qk_norm_rope(x[:, :2], x[:, 2:3], a, b, *tables, 1e-6)
    assert torch.autograd.gradcheck(norm, (qkv, *weights))
    assert torch.autograd.gradcheck(kernels.swiglu, (rand(3, 8, dtype=torch.float64).requires_grad_(),))
    attend = kernels.packed_attention([0, 2, 4, 5], 2, [-1, 0, 1])
    leaves = [rand(5, heads, 4, seed=heads, dtype=torch.float64).requires_grad_() for heads in (2, 1)]
    assert torch.autograd.gradcheck(lambda q, k: attend(0, q, k, k), leaves)


def test_the_chunked_log_prob_is_no_worse_than_log_softmax():
    """Far from zero, where a careless entropy (lse - sum p z) cancels: error against float64 at
    most twice that of plain torch in fp32."""
    hidden, weight = 3 * rand(64, 32), rand(500, 32) + 2
    targets = torch.randint(500, (64,), generator=torch.Generator().manual_seed(0))

    def plain(dtype):
        logp = (hidden.to(dtype) @ weight.to(dtype).t()).log_softmax(-1)
        return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    for ours, torch32, exact in zip(kernels.linear_logprob(hidden, weight, targets),
                                    plain(torch.float32), plain(torch.float64)):
        assert float((ours - exact).abs().max()) <= 2 * float((torch32 - exact).abs().max()) + 1e-6


def test_linear_topk_is_topk_of_log_softmax():
    hidden, weight = rand(20, 8), rand(30, 8)
    ids, logp = kernels.linear_topk(hidden, weight, 5, temperature=0.5)
    want = (hidden @ weight.t() / 0.5).log_softmax(-1).topk(5)
    assert torch.equal(ids, want.indices)
    torch.testing.assert_close(logp, want.values)
    with pytest.raises(AssertionError, match="k = 31 of a vocabulary of 30"):
        kernels.linear_topk(hidden, weight, 31)


def test_a_target_out_of_range_is_named():
    with pytest.raises(AssertionError, match=r"ids \(2, 1\) holds -1 .. 3, allowed are 0 .. 4"):
        kernels.linear_logprob(rand(2, 8), rand(5, 8), torch.tensor([3, -1]))
    with pytest.raises(AssertionError, match="temperature"):
        kernels.linear_logprob(rand(2, 8), rand(5, 8), torch.tensor([3, 1]), temperature=0.0)


# -----------------------------------------------------------------------------
# the draw


def test_the_uniform_is_fixed_for_ever():
    """Stored samples name their noise by address: another hash would make every old run unrepeatable."""
    addresses = (0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 0, 0, 0, 1), (7, 1, 123456, 15, 2047)
    assert [float(kernels.uniform(*words)) * 2**24
            for words in addresses] == [8312281, 783055, 5770118, 16649015]
    many = kernels.uniform(3, 0, torch.arange(100)[:, None], torch.arange(100), 5)
    assert many.shape == (100, 100) and 0 <= float(many.min()) and float(many.max()) < 1
    assert float(many[41, 7]) == float(kernels.uniform(3, 0, 41, 7, 5))
    counts = torch.histc(many, 20, 0, 1)
    assert float(((counts - 500) ** 2 / 500).sum()) < 43.8       # chi-square of 19 degrees, one in a thousand
    assert (abs(float(torch.corrcoef(torch.stack([many[:, :-1].flatten(), many[:, 1:].flatten()]))[0, 1]))
            < 0.04)


def naive_draw(logits, u, temperature, top_k, top_p):
    """One row in Python floats: sort, cut, walk."""
    z = [float(x) / (temperature or 1) for x in logits]
    total = sum(math.exp(x - max(z)) for x in z)
    p = [math.exp(x - max(z)) / total for x in z]
    if temperature == 0:
        token = max(range(len(p)), key=lambda i: (p[i], -i))
        return token, math.log(p[token]), 0.0
    keep = sorted(range(len(p)), key=lambda i: (-p[i], i))
    if top_k:
        keep = keep[:top_k]
    if top_p < 1:
        mass, ahead, cut = sum(p[i] for i in keep), 0.0, []
        for i in keep:
            if ahead >= top_p * mass and cut:
                break
            cut.append(i)
            ahead += p[i]
        keep = cut
    mass, run = sum(p[i] for i in keep), 0.0
    for i in sorted(keep):
        run += p[i]
        if run > u * mass:
            break
    return i, math.log(p[i]), 0.0 if len(keep) == len(p) else math.log(mass)


@pytest.mark.parametrize("top_k, top_p",
                         [(0, 1.0), (3, 1.0), (0, 0.7), (5, 0.6), (1, 1.0), (0, 0.0), (50, 0.9)])
def test_draw_is_the_naive_draw(top_k, top_p):
    """One token drawn for all rows and broadcast is a bug someone shipped; rows with one
    distribution and their own noise must differ."""
    N, V = 60, 37
    logits = (4 * rand(N, V)).round() / 2                        # on a grid: ties
    u = torch.rand(N, generator=torch.Generator().manual_seed(1))
    temperature = torch.tensor([0.0, 0.7, 1.0, 1.4, 2.0]).repeat(12)
    token, logp, kept = kernels.draw(logits.double(), u, temperature, torch.full((N,), top_k),
                                     torch.full((N,), top_p))
    for n in range(N):
        want = naive_draw(logits[n], float(u[n]), float(temperature[n]), top_k, top_p)
        assert int(token[n]) == want[0]
        assert abs(float(logp[n]) - want[1]) < 1e-6 and abs(float(kept[n]) - want[2]) < 1e-6
    same = kernels.draw(logits[1:2].expand(N, V), u, torch.ones(N))[0]
    assert same.unique().numel() > 5


def test_draw_follows_the_distribution():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.0, -float("inf"), 0.5])
    n = 20_000
    token = kernels.draw(logits.expand(n, 6), kernels.uniform(0, 0, 0, 0, torch.arange(n)),
                         torch.full((n,), 1.3))[0]
    expected = n * (logits / 1.3).softmax(-1)
    counts = torch.bincount(token, minlength=6)
    assert counts[4] == 0
    alive = expected > 0
    # 4 degrees, one in a thousand
    assert float(((counts - expected)[alive] ** 2 / expected[alive]).sum()) < 18.5


def test_a_draw_at_either_end_of_the_cdf_has_weight():
    """u = 0 with an impossible first token, u just below 1 with impossible last ones:
    neither may be drawn."""
    inf = float("inf")
    logits = torch.tensor([[-inf, 0.0, 1.0, -inf], [-inf, 1.0, 0.0, -inf]])
    for u, want in ((0.0, [1, 1]), (1 - 2**-24, [2, 2])):
        for k, p in ((None, None), (torch.tensor([2, 2]), torch.tensor([0.9999, 1.0]))):
            assert kernels.draw(logits, torch.full((2,), u), torch.ones(2), k, p)[0].tolist() == want


# -----------------------------------------------------------------------------
# the small steps


def test_qk_norm_rope_turns_relative_angles_and_keeps_lengths():
    """The product of a query and a key depends on how far apart they are, not on where they are."""
    inv = 1 / 100 ** (torch.arange(8) / 8)
    q, k, ones = rand(1, 1, 16), rand(1, 1, 16, seed=1), torch.ones(16)

    def score(i, j):
        a, _ = kernels.qk_norm_rope(q, k, ones, ones, *kernels.rope_tables(torch.tensor([i]), inv), 1e-6)
        _, b = kernels.qk_norm_rope(q, k, ones, ones, *kernels.rope_tables(torch.tensor([j]), inv), 1e-6)
        assert abs(float(a.norm()) - 4) < 1e-4                   # RMS 1 over 16 numbers
        return float((a * b).sum())

    assert abs(score(7, 3) - score(1004, 1000)) < 1e-3 and abs(score(7, 3) - score(7, 5)) > 1e-2


def test_swiglu_is_silu_times_up():
    x = rand(3, 10)
    torch.testing.assert_close(kernels.swiglu(x), x[:, :5] * torch.sigmoid(x[:, :5]) * x[:, 5:])


def test_the_few_operations_of_sampling_are_the_trainers_functions():
    """In inference mode a CPU takes forms with fewer operations: the same numbers to rounding,
    rows of zeros included, and a row is the same bits alone and in company, whatever its number
    of rows picks elsewhere."""
    torch.manual_seed(0)
    x = torch.randn(9, 48)
    heads = torch.randn(9, 5, 16)
    weight = torch.rand(48)
    w_q = torch.rand(16)
    w_k = torch.rand(16)
    x[3], heads[3] = 0, 0
    x[4] *= 1e-4                                                 # small enough for eps to count
    positions, inv = torch.arange(9) * 37, 1 / 100 ** (torch.arange(8) / 8)

    def run(rows, norms):
        q, k = heads[rows, :3], heads[rows, 3:]
        return kernels.rms_norm(x[rows], weight, 1e-6), *kernels.qk_norm_rope(
            q, k, *norms, *kernels.rope_tables(positions[rows], inv, 1.2), 1e-6)
    for norms in (w_q, w_k), (None, None):
        plain = run(slice(None), norms)
        with torch.inference_mode():
            few = run(slice(None), norms)
            alone = [run(slice(i, i + 1), norms) for i in range(9)]
        for a, b, one in zip(plain, few, zip(*alone)):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
            assert torch.equal(torch.cat(one), b)


@to_the_bit
def test_products_the_other_way_round_are_the_same_bits():
    """For 16, 32, ... rows the sampler multiplies as w x^T. If that summed in another order, a row
    would be rounded by how many others there happen to be, and a sample could not be replayed alone."""
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(64, 96, generator=g), torch.randn(200, 96, generator=g)
    with torch.inference_mode():
        plain = kernels.linear(x[:20], w)
        for rows in (4, 12, *cpu.TURNED):
            turned = kernels.linear(x[:rows], w, strided=True)
            assert turned.shape == (rows, 200) and torch.equal(turned[:20], plain[:rows])
            assert torch.equal(turned, kernels.linear(x[:rows], w))
        torch.testing.assert_close(plain, x[:20] @ w.t())


def test_greedy_takes_the_first_of_equals():
    """On a CPU numpy looks for the largest; torch's rule, the first one on a tie and nan above
    all, must hold there too."""
    z = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -1.0, -3.0],
                      [1.0, math.nan, 9.0, math.nan]])
    with torch.inference_mode():
        sampled = kernels.draw(z, torch.rand(4), torch.zeros(4))
    assert sampled[0].tolist() == z.argmax(1).tolist() == [1, 0, 0, 1]
    assert sampled[0].tolist() == kernels.draw(z, torch.rand(4), torch.zeros(4))[0].tolist()
