"""
python -m bench kernels: every kernel against what torch, torch.compile and liger-kernel (when
installed) make of the same numbers.

On a GPU: shares of two ceilings measured in the same run, a large matrix product and a large
copy. Sides alternate, CUDA events, medians with the spread; what both compute is compared first.
On a CPU: log-prob + entropy of the twin against plain log_softmax, CPU seconds of one thread and
the peak of resident memory, each side in a fresh process.
"""
import importlib.util
import multiprocessing
import resource
import statistics
import time
from dataclasses import dataclass

import torch

import kernels
from bench import finish
from common import backend
from common.flags import flags


@dataclass
class Config:
    repeats: int = 5                 # timed rounds of each side
    rows: int = 8192                 # of the log-prob on a GPU
    width: int = 4096                # its hidden size
    vocab: int = 131072              # its vocabulary
    compile: bool = True             # torch.compile among the peers (half a minute for each shape)


def plain_logprob(hidden, weight, targets):
    logp = (hidden @ weight.t()).float().log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def forward_backward(run, hidden, weight, targets):
    logp, entropy = run(hidden, weight, targets)
    return torch.autograd.grad(logp.sum() + 0.1 * entropy.sum(), (hidden, weight))


def show(name, seconds, work=None, unit="", ceiling=None, bar=None):
    """-> the median; prints it, the spread, and what it amounts to."""
    s = sorted(seconds)
    words = f"  {name:<46} {statistics.median(s) * 1e3:9.3f} ms  ({s[0] * 1e3:.3f} .. {s[-1] * 1e3:.3f})"
    if work:
        rate = work / statistics.median(s)
        words += f"  {rate:7.1f} {unit}" + (f"  {100 * rate / ceiling:5.1f}% "
                                            "of the ceiling" if ceiling else "")
        words += f"  (bar {bar})" if bar else ""
    print(words, flush=True)
    return statistics.median(s)


# -----------------------------------------------------------------------------
# CPU


N, D, V = 1024, 256, 32768


def cpu_inputs(n, vocab=V):
    g = torch.Generator().manual_seed(0)
    return (torch.randn(n, D, generator=g).requires_grad_(),
            (torch.randn(vocab, D, generator=g) / 16).requires_grad_(),
            torch.randint(vocab, (n,), generator=g))


def cpu_child(name, pipe):
    """In a process of its own: the peak of resident memory never comes down again."""
    torch.set_num_threads(1)
    run = kernels.linear_logprob if name == "ours" else plain_logprob
    forward_backward(run, *cpu_inputs(2, vocab=64))                  # small, or its peak would hide the other
    inputs = cpu_inputs(N)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_backward(run, *inputs)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def cpu(config):
    spawn = multiprocessing.get_context("spawn")
    peak = {}
    for name in ("ours", "plain"):
        ours, theirs = spawn.Pipe()
        child = spawn.Process(target=cpu_child, args=(name, theirs))
        child.start()
        peak[name] = ours.recv() / 1024
        child.join()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    inputs, sides = cpu_inputs(N), {"ours": kernels.linear_logprob, "plain": plain_logprob}
    for a, b in zip(*(forward_backward(run, *inputs) for run in sides.values())):
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-3), "the two sides compute different gradients"
    seconds = {name: [] for name in sides}
    for _ in range(config.repeats):
        for name, run in sides.items():
            start = time.process_time()
            forward_backward(run, *inputs)
            seconds[name].append(time.process_time() - start)
    torch.set_num_threads(threads)
    print(f"log-prob + entropy, forward + backward, N={N} D={D} V={V}, fp32, one thread")
    median = {name: show(f"{name:<8} peak {peak[name]:6.0f} MB", seconds[name]) for name in sides}
    time_x, memory_x = (x["ours"] / x["plain"] for x in (median, peak))
    print(f"  ours / plain: time {time_x:.2f}x (bar 1.0x), memory {memory_x:.2f}x (bar 0.55x)")
    return {"time_x": round(time_x, 3), "memory_x": round(memory_x, 3), "seconds": median, "peak_mb": peak}


# -----------------------------------------------------------------------------
# GPU


def timed(sides, repeats, target=0.05):
    """-> name -> seconds of one call, each round long enough for the clock; a side that fails is
    left out, aloud."""
    inner, seconds = {}, {}
    for name, run in list(sides.items()):
        try:
            for _ in range(3):
                run()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            inner[name], seconds[name] = max(1, min(200, int(target / (time.perf_counter() - start)))), []
        except Exception as why:                                 # a peer may not fit, or not compile
            if name.startswith("ours") and not isinstance(why, torch.cuda.OutOfMemoryError):
                raise
            print(f"  {name}: left out, {type(why).__name__}: {' '.join(str(why).split())[:150]}", flush=True)
        torch.cuda.empty_cache()
    for _ in range(repeats):
        for name in seconds:
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            a.record()
            for _ in range(inner[name]):
                sides[name]()
            b.record()
            torch.cuda.synchronize()
            seconds[name].append(a.elapsed_time(b) / 1e3 / inner[name])
    return seconds


def half(*shape, scale=1.0):
    return (torch.randn(*shape, device="cuda") * scale).to(torch.bfloat16)


def ceilings(config):
    a, b = half(config.rows, config.width), half(config.vocab, config.width)
    out = torch.empty(config.rows, config.vocab, dtype=torch.bfloat16, device="cuda")
    source = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    seconds = timed({"product": lambda: torch.mm(a, b.t(), out=out),
                     "copy": lambda: target.copy_(source)}, config.repeats)
    flop, moved = 2 * config.rows * config.width * config.vocab / 1e12, 2 * source.numel() * 2 / 1e9
    print("ceilings")
    product = flop / show("bf16 product", seconds["product"], flop, "TFLOP/s")
    return product, moved / show("copy, read + write", seconds["copy"], moved, "GB/s")


def logprob(config, product):
    hidden = half(config.rows, config.width).requires_grad_()
    weight = half(config.vocab, config.width, scale=config.width**-0.5).requires_grad_()
    targets = torch.randint(config.vocab, (config.rows,), device="cuda")
    peers = {"ours": kernels.linear_logprob, "torch twin, chunked": twin_logprob}
    if config.compile:
        peers["torch.compile, whole logits"] = torch.compile(plain_logprob)
    few = slice(0, 256)
    want = plain_logprob(hidden[few].float(), weight.float(), targets[few])
    for a, b in zip(kernels.linear_logprob(hidden[few], weight, targets[few]), want):
        assert float((a - b).abs().max()) < 0.05, "ours is wrong"

    def forward(run):
        with torch.no_grad():
            return run(hidden, weight, targets)

    flop = 2 * config.rows * config.width * config.vocab / 1e12
    print(f"log-prob + entropy, M={config.rows} D={config.width} V={config.vocab}, bf16")
    result = {"forward": {}, "both": {}}
    for name, seconds in timed({n: lambda run=run: forward(run) for n, run in peers.items()},
                               config.repeats).items():
        result["forward"][name] = show(f"forward: {name}", seconds, flop,
                                       "TFLOP/s", product, "75%" if name == "ours" else None)
    sides = {n: lambda run=run: forward_backward(run, hidden, weight, targets) for n, run in peers.items()}
    if importlib.util.find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        sides["liger-kernel (no entropy)"] = lambda: torch.autograd.grad(
            liger(weight, hidden, targets), (hidden, weight))
    else:
        print("  liger-kernel is not installed: ours beside torch alone")
    for name, seconds in timed(sides, config.repeats).items():
        result["both"][name] = show(f"forward + backward: {name}", seconds, 4 * flop, "TFLOP/s", product)
    for name, run in sides.items():
        if name in result["both"]:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            print(f"  peak memory: {name:<33} {(torch.cuda.max_memory_allocated() - before) / 2**20:9.0f} MB")
    return result


def twin_logprob(hidden, weight, targets):
    logp, entropy = kernels._LogprobAt.apply(hidden, weight, targets.unsqueeze(1), 1.0)
    return logp.squeeze(1), entropy


def captured(run):
    """As the sampler runs it: what a call costs the host is not what is measured."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def decode(config, copy):
    print("decode attention, bf16, head_dim 128: keys and values read, as a share of the copy rate")
    result = {}
    for H, KV, B, context, page in ((16, 8, 1, 4096, 16), (16, 8, 64, 1024, 16), (16, 8, 256, 1024, 16),
                                    (32, 8, 64, 4096, 16), (32, 8, 64, 4096, 256), (32, 8, 256, 1024, 256)):
        width = context // page + 1
        pages = half(B * width, page, KV, 128), half(B * width, page, KV, 128)
        table = torch.randperm(B * width, device="cuda").int().view(B, width)
        lengths = torch.full((B,), context, dtype=torch.int32, device="cuda")
        inputs = half(B, H, 128), half(B, KV, 128), half(B, KV, 128), *pages, table, lengths
        sides = {"ours (Triton)": lambda inputs=inputs: kernels._triton_decode(*inputs)}
        if page % 256 == 0 and importlib.util.find_spec("flash_attn"):
            sides["flash-attn, one split"] = lambda inputs=inputs: backend.flash_decode(*inputs)
        want = kernels.decode_attention_torch(*inputs)
        for run in sides.values():
            assert float((run() - want).abs().max()) < 0.02, "a side is wrong"
        sides = {name: captured(run) for name, run in sides.items()}
        moved = 2 * B * (context + 1) * KV * 128 * 2 / 1e9
        for name, seconds in timed(sides, config.repeats).items():
            bar = "80%" if (B, context) == (64, 4096) and "ours" in name else None
            label = f"{name}: {H}/{KV} heads, batch {B}, {context}, page {page}"
            result[label] = moved / show(label, seconds, moved, "GB/s", copy, bar) / copy
        del pages, inputs, sides, want
        torch.cuda.empty_cache()
    return result


def small(config, copy):
    """16,384 tokens of an 8B shape; the bytes are those that have to move."""
    T, H, KV, hd, ff = 16384, 32, 8, 128, 12288
    qkv, gate_up = half(T, H + 2 * KV, hd).requires_grad_(), half(T, 2 * ff).requires_grad_()
    weights = [torch.ones(hd, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(2)]
    cos, sin = kernels.rope_tables(torch.arange(T, device="cuda"),
                                   1e6 ** (-torch.arange(0, hd, 2, device="cuda") / hd))
    logits = torch.randn(256, 151936, device="cuda") * 3
    u, ones = torch.rand(256, device="cuda"), torch.ones(256, device="cuda")
    top_k, top_p = torch.full((256,), 50, device="cuda"), torch.full((256,), 0.95, device="cuda")

    def rope(run):
        return lambda: run(*qkv.split((H, KV, KV), dim=1)[:2], *weights, cos, sin, 1e-6)

    g_q, g_k, g_x = half(T, H, hd), half(T, KV, hd), half(T, ff)

    def both(run):
        return lambda: torch.autograd.grad(run(), (qkv, *weights), (g_q, g_k))

    def act(run):
        return lambda: run(gate_up)

    def act_both(run):
        return lambda: torch.autograd.grad(run(gate_up), gate_up, g_x)

    numbers = T * (H + KV) * hd * 2 / 1e9
    cases = {                                  # -> ours, its twin, how a side is made of it, GB
        "QK-norm + RoPE, forward": (kernels.qk_norm_rope, kernels.qk_norm_rope_torch, rope, 2 * numbers),
        "QK-norm + RoPE, forward + backward": (kernels.qk_norm_rope, kernels.qk_norm_rope_torch,
                                               lambda r: both(rope(r)), 5 * numbers),
        "SwiGLU, forward": (kernels.swiglu, kernels.swiglu_torch, act, 3 * T * ff * 2 / 1e9),
        "SwiGLU, forward + backward": (kernels.swiglu, kernels.swiglu_torch, act_both, 8 * T * ff * 2 / 1e9),
        "draw, 256 x 151,936": (kernels.draw, kernels.draw_torch, lambda r: lambda: r(logits, u, ones),
                                logits.numel() * 4 / 1e9),
        "draw, top-k 50, top-p 0.95": (kernels.draw, kernels.draw_torch,
                                        lambda r: lambda: r(logits, u, ones, top_k, top_p), None),
    }
    print("small kernels (bar: at least as fast as torch.compile)")
    result = {}
    for case, (ours, twin, make, gigabytes) in cases.items():
        sides = {"ours": make(ours), "torch": make(twin)}
        if config.compile:
            sides["torch.compile"] = make(torch.compile(twin))
        for name, seconds in timed(sides, config.repeats).items():
            result[f"{case}: {name}"] = show(f"{case}: {name}", seconds, gigabytes, "GB/s", copy)
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    if not torch.cuda.is_available():
        return finish("kernels", device="cpu", torch=torch.__version__, **cpu(config))
    print(torch.cuda.get_device_name(), "torch", torch.__version__, "triton",
          kernels.triton and kernels.triton.__version__)
    print(kernels.backend("cuda"))
    product, copy = ceilings(config)
    parts = {"logprob": logprob(config, product), "decode": decode(config, copy),
             "small": small(config, copy)}
    return finish("kernels", device=torch.cuda.get_device_name(), torch=torch.__version__,
                  product_tflops=product, copy_gbs=copy, **parts)


if __name__ == "__main__":
    main()
