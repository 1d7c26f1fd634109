"""
What only a GPU can tell: every kernel against its twin in half precision at real sizes, the
backends that were picked, no waiting on the hot path, CUDA graphs, torch.compile, memory. Needs
this file and the scripts of the root; two minutes on one card.

    pytest -m gpu tests/test_gpu.py -s

The measure throughout: error against float64 at most twice that of plain torch in the same
precision, and a few roundings.
"""
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from common import backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICE, HALF = "cuda", torch.bfloat16
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22, torch.float64: 0.0}


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def no_worse(ours, plain, exact, dtype):
    for i, (a, b, e) in enumerate(zip(ours, plain, exact)):
        a, b, e = a.detach().double(), b.detach().double(), e.detach().double()
        error, theirs = float((a - e).abs().max()), float((b - e).abs().max())
        assert error <= 2 * theirs + ROUNDING[dtype] * float(e.abs().max()), (
            f"output {i}: error {error:.3g}, plain torch {theirs:.3g}")


def compare(ours, plain, inputs, dtype, seed=7):
    """Outputs and gradients of both in `dtype`, and of the plain one in float64, from inputs that
    `dtype` can hold."""
    def outcome(run, wide):
        leaves = [x.to(dtype).to(wide).requires_grad_() for x in inputs]
        out = run(*leaves)
        g = [rand(*o.shape, seed=seed + i).to(dtype).to(o.dtype) for i, o in enumerate(out)]
        return [*out, *torch.autograd.grad(out, leaves, g)]
    no_worse(outcome(ours, dtype), outcome(plain, dtype), outcome(plain, torch.float64), dtype)


# -----------------------------------------------------------------------------
# each kernel


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("N, D, V, K, temperature", [(1, 64, 1000, 1, 1.0), (300, 512, 5001, 1, 0.7),
                                                     (257, 256, 32_768, 16, 1.2), (5, 64, 3000, 64, 1.0)])
def test_logprob(dtype, N, D, V, K, temperature):
    hidden, weight = rand(N, D), rand(V, D) * D**-0.5 * 3
    ids = torch.randint(V, (N, K), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ids[:, -1] = ids[:, 0]

    def ours(h, w):
        return kernels._LogprobFused.apply(h, w, ids, temperature)

    def plain(h, w):
        logp = ((h @ w.t()) / temperature).to(torch.float64 if h.dtype == torch.float64
                                              else torch.float32).log_softmax(-1)
        return logp.gather(1, ids), -(logp.exp() * logp).sum(-1)

    compare(ours, plain, (hidden, weight), dtype)


def test_the_repair_of_ids_is_ordered():
    """A row's gradient is stored twice where an id points, first without it and then with it; a
    missing barrier would show now and then."""
    hidden, weight = rand(512, 128).to(HALF).requires_grad_(), rand(8192, 128).to(HALF)
    ids = torch.randint(8192, (512, 32), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    first = None
    for _ in range(30):
        logp = kernels.linear_logprob_at(hidden, weight, ids)
        (g,) = torch.autograd.grad(logp.sum(), hidden)
        first = g if first is None else first
        assert torch.equal(g, first)


def test_logprob_never_holds_the_logits():
    N, D, V = 8192, 1024, 151_936
    hidden, weight = rand(N, D).to(HALF).requires_grad_(), (rand(V, D) / 32).to(HALF).requires_grad_()
    targets = torch.zeros(N, dtype=torch.long, device=DEVICE)
    # cuBLAS takes its workspace once
    kernels.linear_logprob(hidden[:64], weight, targets[:64])[0].sum().backward()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logp, entropy = kernels.linear_logprob(hidden, weight, targets)
    forward = torch.cuda.max_memory_allocated() - before
    (logp.sum() + entropy.sum()).backward()
    both = torch.cuda.max_memory_allocated() - before - weight.numel() * 2
    print(f"\nlog-prob + entropy of {N} rows, vocabulary {V}: forward "
          f"{forward / 2**20:.0f} MB, backward {both / 2**20:.0f} MB "
          f"on top of the weight's gradient; the logits in fp32 alone: {N * V * 4 / 2**20:.0f} MB")
    assert forward < 100 * 2**20 and both < N * V * 4 / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("T, H, KV, hd, norm", [(1, 16, 8, 128, True), (1000, 32, 8, 128, True),
                                                (333, 14, 2, 64, False), (65, 4, 4, 96, True)])
def test_qk_norm_rope(dtype, T, H, KV, hd, norm):
    angle = rand(T, hd // 2) * 3
    cos, sin = angle.cos(), angle.sin()
    weights = (1 + rand(hd, seed=1) * 0.3, 1 + rand(hd, seed=2) * 0.3) if norm else ()

    def by(run):
        def both(qkv, *w):
            q, k, _ = qkv.split((H, KV, KV), dim=1)
            return run(q, k, *(w or (None, None)), cos, sin, 1e-6)
        return both

    compare(by(kernels.qk_norm_rope), by(kernels.qk_norm_rope_torch),
            (rand(T, H + 2 * KV, hd), *weights), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("T, width", [(1, 3072), (1001, 3072), (77, 1000)])
def test_swiglu(dtype, T, width):
    compare(lambda x: (kernels.swiglu(x),), lambda x: (kernels.swiglu_torch(x),),
            (rand(T, 2 * width) * 3,), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("B, H, KV, hd, page, longest",
                         [(1, 16, 8, 128, 16, 5000), (64, 16, 8, 128, 64, 700),
                          (7, 32, 8, 64, 256, 2048), (300, 8, 1, 128, 32, 90), (5, 4, 4, 80, 16, 300)])
def test_decode(dtype, B, H, KV, hd, page, longest):
    lengths = torch.randint(longest, (B,), generator=torch.Generator().manual_seed(B))
    lengths[0], lengths[-1] = longest - 1, 0 if B > 1 else longest - 1
    width = longest // page + 1
    table = torch.randperm(B * width,
                           generator=torch.Generator().manual_seed(1)).int().view(B, width).to(DEVICE)
    lengths = lengths.int().to(DEVICE)
    numbers = [rand(B, H, hd), rand(B, KV, hd, seed=1), rand(B, KV, hd, seed=2)]
    numbers += [rand(B * width, page, KV, hd, seed=3), rand(B * width, page, KV, hd, seed=4)]

    def outcome(run, wide):
        q, k, v, *pages = (x.to(dtype).to(wide) for x in numbers)
        return [run(q, k, v, *pages, table, lengths), *pages]

    plain = outcome(kernels.decode_attention_torch, dtype)
    exact = outcome(kernels.decode_attention_torch, torch.float64)
    for splits in (None, 1, 4, 32):
        no_worse(outcome(lambda *a, splits=splits: kernels._triton_decode(*a, splits=splits), dtype),
                 plain, exact, dtype)
    picked = outcome(kernels.decode_attention, dtype)            # whatever this machine picked
    no_worse(picked, plain, exact, dtype)
    assert torch.equal(picked[1], plain[1]) and torch.equal(picked[2], plain[2])


ROWS = [([0, 1], [-1]), ([0, 300, 301, 800], [-1] * 3), ([0, 200, 300, 417, 900], [-1, 0, 0, 0]),
        ([0, 70, 90, 100, 160, 180], [-1, 0, 1, 1, 0])]


@pytest.mark.parametrize("name", ["flash", "varlen"])
@pytest.mark.parametrize("cu, parent", ROWS)
@pytest.mark.parametrize("H, KV, hd", [(16, 8, 128), (14, 2, 64), (4, 4, 64)])
def test_packed_attention(name, cu, parent, H, KV, hd):
    if name == "flash":
        pytest.importorskip("flash_attn")
    longest = max(b - a for a, b in zip(cu, cu[1:]))
    ours = backend.in_one_call(kernels.RUNS["train"][name], cu, kernels.ancestry(cu, parent))
    twin = kernels.packed_attention_torch(cu, longest, parent)
    inputs = [rand(cu[-1], H, hd), rand(cu[-1], KV, hd, seed=1), rand(cu[-1], KV, hd, seed=2)]
    compare(lambda q, k, v: (ours(0, q, k, v),), lambda q, k, v: (twin(0, q, k, v),), inputs, HALF)


def test_what_was_picked_has_proved_itself(capsys):
    backend.picks.clear()
    words = kernels.backend(DEVICE)
    said = capsys.readouterr().out
    with capsys.disabled():
        print("\n" + said + words)
    assert kernels.picked("decode", "cuda") in ("flash", "triton"), said
    assert kernels.picked("train", "cuda") in ("flash", "varlen"), said
    assert kernels.picked("fused", "cuda") == "triton", said


def test_uniform_is_the_same_bits_on_both_devices():
    words = [torch.randint(-2**62, 2**62, (100_000,), generator=torch.Generator().manual_seed(s))
             for s in range(4)]
    assert torch.equal(kernels.uniform(12345678901, *(w.to(DEVICE) for w in words)).cpu(),
                       kernels.uniform(12345678901, *words))


@pytest.mark.parametrize("N, V, dtype", [(1, 151_936, torch.float32), (200, 151_936, torch.float32),
                                         (64, 32_001, torch.bfloat16)])
def test_draw(N, V, dtype):
    """Against the twin in float64. Where tokens differ, u must lie on the boundary between them,
    within the rounding of a sum."""
    logits = (rand(N, V) * 3).to(dtype)
    u = torch.rand(N, generator=torch.Generator().manual_seed(V)).to(DEVICE)

    def pick(values):
        return torch.tensor(values, device=DEVICE).repeat(-(-N // len(values)))[:N]

    temperature = pick([1.0, 0.7, 0.0, 1.3, 1.0])
    top_k = pick([0, 50, 0, 1, 0, 1000, 40])
    top_p = pick([1.0, 0.9, 1.0, 0.5, 0.95, 0.99])
    for k, p in ((None, None), (top_k, None), (None, top_p), (top_k, top_p)):
        token, logp, kept = kernels.draw(logits, u, temperature, k, p)
        want = kernels.draw_torch(logits.double(), u, temperature, k, p)
        torch.testing.assert_close(kept, want[2].float(), atol=1e-4, rtol=1e-3)
        z = logits.double() / torch.where(temperature == 0, 1.0, temperature)[:, None]
        torch.testing.assert_close(logp, z.log_softmax(-1).gather(1, token[:, None])[:, 0].float(),
                                   atol=1e-4, rtol=1e-4)
        differ = (token != want[0]).nonzero()[:, 0]
        assert len(differ) <= max(1, N // 20)
        if k is None and p is None and len(differ):
            cdf = z.softmax(-1).cumsum(-1)
            low = torch.minimum(token, want[0])
            assert float((cdf.gather(1, low[:, None])[:, 0] - u)[differ].abs().max()) < 1e-5


def test_checked_mode_names_what_is_out_of_range(monkeypatch):
    """Without it the GPU would read whatever lies there, or die for every process on it; with
    it, a sentence."""
    monkeypatch.setattr(backend, "CHECK", True)
    with pytest.raises(AssertionError, match=r"ids \(2, 1\) holds 0 .. 5, allowed are 0 .. 4"):
        kernels.linear_logprob(rand(2, 64), rand(5, 64), torch.tensor([0, 5], device=DEVICE))
    (*new, k_pages, v_pages, table, lengths), _ = step_inputs()
    with pytest.raises(AssertionError, match="block_table"):
        kernels.decode_attention(*new, k_pages, v_pages, table + 1, lengths)


# -----------------------------------------------------------------------------
# the hot path as a whole


def step_inputs(B=8, H=8, KV=4, hd=64, V=5000, page=16, width=8):
    table = torch.arange(B * width, dtype=torch.int32, device=DEVICE).view(B, width)
    new = [rand(B, n, hd, seed=i).to(HALF) for i, n in enumerate((H, KV, KV))]
    pages = [rand(B * width, page, KV, hd, seed=i).to(HALF) for i in range(2)]
    return (*new, *pages, table, torch.full((B,), 5, dtype=torch.int32, device=DEVICE)), rand(B, V)


def test_nothing_waits_for_the_gpu():
    """Reading one number back stops the queue: with 28 layers that is the whole step. An op that
    waits raises here."""
    from train_gpt import GPT, GPTConfig
    model = GPT(GPTConfig(1000, 2, 4, 2, 64, 256, 512, 512, 1e4)).init_weights(0).to(DEVICE, HALF)
    tokens, positions = torch.arange(100, device=DEVICE) % 50, torch.arange(100, device=DEVICE) % 40
    decode, logits = step_inputs()
    ones, index = torch.ones(8, device=DEVICE), torch.arange(8, device=DEVICE)
    top_k, top_p = torch.full((8,), 20, device=DEVICE), torch.full((8,), 0.9, device=DEVICE)

    def everything():
        hidden = model(tokens, positions, kernels.packed_attention([0, 40, 70, 100], 40, parent=[-1, 0, 0]))
        logp, entropy = kernels.linear_logprob(hidden, model.head_weight, tokens)
        (logp.sum() + entropy.sum()).backward()
        kernels.linear_logprob_at(hidden.detach(), model.head_weight, tokens[:, None].expand(-1, 4))
        kernels.decode_attention(*decode)
        kernels.draw(logits, kernels.uniform(3, 0, index, index, 7, device=DEVICE), ones, top_k, top_p)

    everything()                                                 # compile, pick, allocate
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_a_decode_step_waits_for_nothing():
    """The tokens feed the next step on the device, and the host looks at what has ended every few steps."""
    from rollout import Sampler
    from train_gpt import GPT, GPTConfig
    model = GPT(GPTConfig(1000, 2, 4, 2, 64, 256, 512, 512, 1e4)).init_weights(0).to(DEVICE, HALF)
    sampler = Sampler(model, (), slots=12)
    for i in range(12):
        sampler.submit(i, [1 + i, 2, 3], 1, 100, top_p=0.9 if i % 2 else 1.0)
    while len(sampler.running) < 12 or sampler.batch is None:
        sampler.step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.inference_mode():
            for _ in range(3):
                sampler._next_token(sampler.batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_loss_waits_for_nothing():
    import algos
    import nanorl
    import pack
    from common import axes
    from rollout import Sample
    from train_gpt import GPT, GPTConfig
    model = GPT(GPTConfig(1000, 2, 4, 2, 64, 256, 512, 512, 1e4)).init_weights(0).to(DEVICE, HALF)
    samples = [Sample([1, 2, 3], [4] * (5 + i), [-7.0] * (5 + i), "length", 0, i, 0, advantage=i - 1.0)
               for i in range(4)]
    for algo in algos.ALGORITHMS:
        if algos.ALGORITHMS[algo].get("kl_coef"):
            continue                  # a reference moves between host and device, once an update
        config = axes.with_algorithm(nanorl.Config(algo=algo))
        for mode in ("default", "error"):
            (batch,) = pack.batches([samples], 64, model.config)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode(mode)
            try:
                batch = batch.to(torch.device(DEVICE))
                algos.make_loss(config)(batch, batch.hidden(model),
                                        model.head_weight)[0].backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")


def test_a_captured_step_follows_the_lengths():
    """A graph replayed with a length baked in answered from a stale part of the cache, in a
    library everyone uses: accuracy halved, no error. Here lengths live on the device, and a
    replay after they grew, over page and slice edges, must equal the eager step."""
    (q, k, v, k_pages, v_pages, table, lengths), logits = step_inputs(page=16, width=80)
    index, ones = torch.arange(8, device=DEVICE), torch.ones(8, device=DEVICE)

    def step():
        o = kernels.decode_attention(q, k, v, k_pages, v_pages, table, lengths)
        u = kernels.uniform(0, 0, index, index, lengths.long())
        return o, *kernels.draw(logits, u, ones)

    step()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for n in (0, 15, 16, 255, 256, 257, 1000, 1279):
        lengths.fill_(n)
        want = [x.clone() for x in step()]
        graph.replay()
        for a, b in zip(captured, want):
            assert torch.equal(a, b), n


def test_the_compiled_model_is_the_model():
    from train_gpt import GPT, GPTConfig
    model = GPT(GPTConfig(1000, 2, 4, 2, 64, 256, 512, 512, 1e4)).init_weights(0).to(DEVICE, HALF)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    tokens, positions = torch.arange(100, device=DEVICE) % 50, torch.arange(100, device=DEVICE)
    grads = []
    for compiled in (False, True):
        if compiled:                                             # as train_gpt.py --compile does
            model.compiled = True
            for block in model.blocks:
                block.compile(dynamic=True)
        hidden = model(tokens, positions, kernels.packed_attention([0, 60, 100], 60))
        logp, _ = kernels.linear_logprob(hidden, model.head_weight, tokens)
        logp.sum().backward()
        grads.append([hidden.detach().float()] + [p.grad.float() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*grads):
        assert float((a - b).norm()) <= 0.03 * float(a.norm()) + 1e-3


def test_a_model_in_half_precision_is_the_model():
    """The whole forward and backward on the kernels against the twins in fp32 on the same
    weights: relative error of a few roundings."""
    from train_gpt import GPT, GPTConfig
    config = GPTConfig(2000, 3, 8, 2, 64, 256, 512, 512, 1e4)
    tokens, cu, parent = torch.arange(200) % 97, [0, 80, 130, 200], [-1, 0, 0]
    positions = torch.cat([torch.arange(80), torch.arange(80, 130), torch.arange(80, 150)])
    model = GPT(config).init_weights(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p + 0.02 * torch.randn(p.shape,
                                            generator=torch.Generator().manual_seed(p.numel()))).to(HALF))
    results = []
    for device, dtype in (("cpu", torch.float32), (DEVICE, HALF)):
        m = GPT(config).to(device, dtype)
        m.load_state_dict(model.state_dict())
        hidden = m(tokens.to(device), positions.to(device), kernels.packed_attention(cu, 80, parent))
        logp, entropy = kernels.linear_logprob(hidden, m.head_weight, tokens.roll(-1).to(device))
        (logp.sum() + 0.1 * entropy.sum()).backward()
        results.append([logp.detach().cpu().float(), entropy.detach().cpu().float(),
                        *(p.grad.cpu().float() for p in m.parameters())])
    assert float((results[0][0] - results[1][0]).abs().mean()) < 0.05
    for a, b in zip(*results):
        assert float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0)) > 0.99


# -----------------------------------------------------------------------------
# what a small card keeps on the host


def test_offload_on_a_card():
    """Gradients leave through pinned buffers while the backward runs, and weights come back in place:
    on a CPU second buffers stand for all of it, and no stream is in the way."""
    from common.optim import Optimizer
    from train_gpt import GPT, GPTConfig
    tokens = torch.arange(300, device=DEVICE) % 50
    found = []
    for offload in (False, True):
        model = GPT(GPTConfig(1000, 2, 4, 2, 64, 256, 512, 512, 1e4)).init_weights(0).to(DEVICE, HALF)
        places = [p.data_ptr() for p in model.parameters()]
        optimizer = Optimizer(model, lr=1e-3, muon_lr=1e-2, offload=offload)
        for _ in range(3):
            for n in (100, 300):
                hidden = model(tokens[:n], tokens[:n], kernels.packed_attention([0, n], n))
                logp, _ = kernels.linear_logprob(hidden, model.head_weight, tokens[:n].roll(-1))
                (-logp.sum()).backward()
                optimizer.finish_micro_batch()
                assert not offload or all(p.grad is None for p in model.parameters())
            assert not optimizer.step(divide=400)["skipped"]
        assert [p.data_ptr() for p in model.parameters()] == places
        assert {s.master.device.type for s in optimizer.shards} == {"cpu" if offload else "cuda"}
        found.append([s.master.cpu() for s in optimizer.shards])
    for ours, plain in zip(*found):
        assert float((ours - plain).norm()) <= 1e-2 * float(plain.norm())


def test_a_reference_on_the_host():
    """A block is copied for its forward alone; a new state arrives although the last forward may still
    read the old one."""
    from types import SimpleNamespace

    from common import offload
    from train_gpt import GPT, GPTConfig
    env = SimpleNamespace(device=torch.device(DEVICE, 0), world=1, rank=0)
    one, other = (GPT(GPTConfig(1000, 2, 4, 2, 64, 256, 512, 512, 1e4)) for _ in range(2))
    with torch.no_grad():
        for p in (*one.parameters(), *other.parameters()):
            p.add_(0.02 * torch.randn_like(p))
    one, other = one.to(HALF), other.to(HALF)
    away = GPT(one.config).to(HALF)
    away.load_state_dict(one.state_dict())
    offload.place_blocks(away.requires_grad_(False), "host", env)
    tokens = torch.arange(100, device=DEVICE) % 50
    with torch.no_grad():
        for twin in (one, other):
            got = away(tokens, tokens, kernels.packed_attention([0, 100], 100))
            offload.load_state(away, other.state_dict(), env)
            twin.to(DEVICE)
            assert torch.equal(got, twin(tokens, tokens, kernels.packed_attention([0, 100], 100)))
            twin.cpu()
    assert away.blocks[0].qkv.weight.device.type == "cpu"


# -----------------------------------------------------------------------------
# --parity, in a process of its own: cuBLAS reads its switches once


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    """-> what `python -m bench gpu --part parity` found on the 0.6B shape"""
    out = str(tmp_path_factory.mktemp("parity"))
    done = subprocess.run([sys.executable, "-m", "bench", "gpu", "--part", "parity", "--out", out],
                          cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    print("\n" + done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


def test_parity_of_a_row_in_every_company(sides):
    """Row 0, and every other, of each product of the model and of each step, in 1 to 4,096 rows."""
    assert sides["with parity"]["unlike"] == []


def test_parity_of_sampler_and_trainer(sides):
    """Over 1,000 tokens; without --parity they do not, or the test sees nothing."""
    fast, parity = sides["as it is"], sides["with parity"]
    assert parity["tokens"] >= 1000 and parity["not equal"] == 0 and parity["largest"] == 0
    assert fast["not equal"] > 0
    print(f"\n--parity costs {sides['price of a decode step']:.2f}x a decode step, "
          f"{sides['price of an update']:.2f}x an update of 1,000 tokens")
