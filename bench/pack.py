"""
python -m bench pack: rows, rank balance, packed and shared training steps, each against its peer,
one CPU thread.

(a) bins            against trl.pack_dataset(strategy="bfd"), 20,000 lengths, lognormal(6.5, 0.9)
                    capped at 8,192, rows of 8,192
(b) ranks           the heaviest of 8 against max(mean load, largest sample), which no dealing can
                    beat; 50 draws
(c) padding         forward + backward of 64 sequences, ours against transformers with padded
                    micro-batches of 8
(d) shared prompts  a prompt of 1,024 and 8 responses of 256, stored once against repeated; and where
                    it begins to pay

Times are CPU seconds of this process (other users of the machine do not count), sides alternate,
medians with the spread. What both sides compute is compared before it is timed.
"""
import multiprocessing
import random
import resource
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import pack
from bench import alternate, finish, peer, ratio, show
from common.flags import die, flags
from kernels import linear_logprob, packed_attention
from train_gpt import GPT, GPTConfig


@dataclass
class Config:
    parts: str = "abcd"              # which of the four to run
    repeats: int = 5                 # timed runs of each side
    seed: int = 0                    # of lengths, tokens and weights


SHAPE = GPTConfig(vocab_size=4096, n_layer=4, n_head=4, n_kv_head=4, head_dim=64,
                  d_model=256, d_ff=688, max_len=2048, rope_theta=1e4, tie_embeddings=True)


def lengths_of(rng, n, mean, sigma, cap):
    return [min(cap, max(2, int(rng.lognormvariate(mean, sigma)))) for _ in range(n)]


def network(seed):
    """Seeded, and no matrix zero: what writes into the residual stream begins at zero, and would
    hide a mistake behind it."""
    model = GPT(SHAPE).init_weights(seed)
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape, generator=generator)
    return model


# -----------------------------------------------------------------------------
# (a) bins, (b) ranks


def bins(config):
    lengths = lengths_of(random.Random(config.seed), 20_000, 6.5, 0.9, 8192)

    def fill(rows):
        return sum(lengths) / (8192 * len(rows))

    rows = pack.pack(lengths, 8192)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sides, fills = {"ours": lambda: pack.pack(lengths, 8192)}, {"ours": fill(rows)}
    print("(a) 20,000 lengths into rows of 8,192 (bar: fill 99.9%, 20x)")
    datasets, trl = peer("datasets"), peer("trl.data_utils")
    if trl and datasets:
        datasets.disable_caching()
        datasets.disable_progress_bars()
        table = datasets.Dataset.from_dict({"input_ids": [[0] * n for n in lengths]})
        sides["trl"] = lambda: trl.pack_dataset(table, 8192, strategy="bfd")
        fills["trl"] = fill(sides["trl"]())
    else:
        print("  trl is not installed, so ours alone: pip install trl")
    seconds = alternate(sides, config.repeats)
    for name, s in seconds.items():
        show(f"{name}, fill {fills[name]:.4%}", s)
    if "trl" not in sides:
        return {"fill": fills["ours"]}
    faster = ratio(seconds["trl"], seconds["ours"])
    print(f"  {faster:.1f}x faster")
    return {"fill": fills["ours"], "fill_trl": fills["trl"], "times_trl": faster}


def ranks(config):
    print("(b) heaviest of 8 ranks / max(mean load, largest sample), 50 draws (bar: median 1.02, worst 1.05)")
    result = {}
    for n in (32, 64, 256):
        rng, over, arrival = random.Random(config.seed), [], []
        for _ in range(50):
            costs = [pack.cost(pack.SHAPE, x) for x in lengths_of(rng, n, 6.5, 0.9, 8192)]
            floor = max(sum(costs) / 8, max(costs))
            over.append(max(sum(costs[i] for i in s) for s in pack.balance(costs, 8)) / floor)
            arrival.append(max(sum(costs[r::8]) for r in range(8)) / floor)
        result |= {f"ranks_{n}_median": statistics.median(over), f"ranks_{n}_worst": max(over)}
        print(f"  {n:>4} samples: {statistics.median(over):.4f}, worst "
              f"{max(over):.4f}   (as they come: {statistics.median(arrival):.3f})")
    return result


# -----------------------------------------------------------------------------
# (c) packed against padded, (d) shared against repeated


def made(rng, prompt, n, index=0):
    tokens = [rng.randrange(SHAPE.vocab_size) for _ in range(n)]
    return SimpleNamespace(prompt=prompt, tokens=tokens, logprobs=[0.0] * n,
                           kept=None, advantage=1.0, weight=1.0, reward=0.0, problem=0, index=index)


def ours(model, micro):
    """The sum of log-probs of all predictions; the gradient is left in the model."""
    model.zero_grad()
    total = 0.0
    for batch in micro:
        hidden = model(batch.tokens_T, batch.positions_T,
                       packed_attention(batch.cu_seqlens, batch.max_len, batch.parent))
        logp_N, _ = linear_logprob(hidden[batch.at_N], model.head_weight, batch.targets_N)
        loss = (logp_N * batch.advantage_N).sum()
        loss.backward()
        total += loss.item()
    return total


def padded(model, texts):
    """The same in transformers: right-padded micro-batches of 8, in the order given."""
    model.zero_grad()
    total = 0.0
    for at in range(0, len(texts), 8):
        some = texts[at : at + 8]
        longest = max(map(len, some))
        ids = torch.tensor([t + [0] * (longest - len(t)) for t in some])
        mask = torch.tensor([[1] * len(t) + [0] * (longest - len(t)) for t in some])
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        loss = -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
        loss.backward()
        total += loss.item()
    return total


def padding(config):
    rng = random.Random(config.seed)
    samples = [made(rng, [rng.randrange(4096)], n - 1) for n in lengths_of(rng, 64, 4.4, 0.9, 512)]
    texts = [s.prompt + s.tokens for s in samples]
    by_length, tokens, model = sorted(texts, key=len), sum(map(len, texts)), network(config.seed)
    sides = {"ours, rows of 1,024": lambda: ours(model, pack.batches(samples, 1024, SHAPE))}
    print(f"(c) forward + backward of 64 sequences, {tokens} tokens, longest {len(by_length[-1])}, "
          f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M model (bar: 2.8x padded, 1.4x sorted)")
    qwen3 = peer("transformers.models.qwen3.modeling_qwen3")
    if qwen3:
        with tempfile.TemporaryDirectory() as folder:
            model.save_hf(folder)
            theirs = qwen3.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, order in (("padded", texts), ("sorted", by_length)):
            waste = 1 - tokens / sum(8 * max(map(len, order[i : i + 8])) for i in range(0, 64, 8))
            side = f"transformers, 8 at a time, {name}, {waste:.0%} padding"
            sides[side] = lambda order=order: padded(theirs, order)
        sums = [run() for run in sides.values()]
        assert max(sums) - min(sums) <= 1e-5 * abs(sums[0]), f"the sides disagree: {sums}"
        pairs = ((model.embed, theirs.model.embed_tokens),
                 (model.blocks[0].down, theirs.model.layers[0].mlp.down_proj))
        for a, b in ((x.weight, y.weight) for x, y in pairs):
            assert (a.grad - b.grad).abs().max() <= 1e-4 * b.grad.abs().max(), (
                "the two models' gradients disagree")
    else:
        print("  transformers is not installed, so ours alone: pip install transformers")
    seconds = alternate(sides, config.repeats)
    for name, s in seconds.items():
        show(name, s, tokens, "tok/s")
    mine, *others = seconds.values()
    result = {"tok_s": tokens / statistics.median(mine),
              **{f"times_{n}": ratio(s, mine) for n, s in zip(("padded", "sorted"), others)}}
    if others:
        print(f"  {result['times_padded']:.2f}x padded, {result['times_sorted']:.2f}x padded and sorted")
    return result


def few(seed, prompt, responses, n):
    rng = random.Random(seed)
    text = [rng.randrange(SHAPE.vocab_size) for _ in range(prompt)]
    return [[made(rng, text, n, i) for i in range(responses)]]


def high_water():
    """The most memory this process ever held, in MB. ru_maxrss would do, but Linux hands the
    parent's down to a child."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(line.split()[1]) for line in status.read_text().splitlines()
                    if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20     # macOS: bytes


def peak(share, seed, pipe):
    """In a process of its own: how far one forward + backward raises the peak."""
    torch.set_num_threads(1)
    model = network(seed)
    ours(model, pack.batches(few(seed, 8, 2, 8), 1 << 14, SHAPE))  # what the first call allocates for ever
    micro, before = pack.batches(few(seed, 1024, 8, 256), 1 << 14, SHAPE, share=share), high_water()
    ours(model, micro)
    pipe.send(high_water() - before)


def sharing(config):
    model, memory, context = network(config.seed), {}, multiprocessing.get_context("spawn")
    for share in (True, False):
        end, pipe = context.Pipe()
        worker = context.Process(target=peak, args=(share, config.seed, pipe))
        worker.start()
        pipe.close()                  # so that a child that dies is an EOFError here, not a wait
        memory[share] = end.recv()
        worker.join()

    def timed(prompt, n):
        group = few(config.seed, prompt, 8, n)
        micro = {share: pack.batches(group, 1 << 14, SHAPE, share=share) for share in (True, False)}
        sums = [ours(model, micro[share]) for share in (True, False)]
        assert abs(sums[0] - sums[1]) <= 1e-5 * abs(sums[0]), f"shared and repeated disagree: {sums}"
        chosen = len(pack.batches(group, 1 << 14, SHAPE)[0].parent) > 8
        return alternate({share: lambda share=share: ours(model, micro[share]) for share in (True, False)},
                         config.repeats), chosen

    print("(d) forward + backward, a prompt of 1,024 and 8 responses of 256 (bar: 0.4x the time)")
    seconds, _ = timed(1024, 256)
    for share, name in ((True, "shared"), (False, "repeated")):
        show(f"{name}, peak memory {memory[share]:.0f} MB", seconds[share])
    result = {"shared_time": ratio(seconds[True], seconds[False]),
              "shared_memory": memory[True] / memory[False]}
    print(f"  {result['shared_time']:.3f}x the time, {result['shared_memory']:.2f}x the memory")
    print("  where it pays: time of shared / repeated, and what plan() takes")
    for prompt, n in ((4, 256), (8, 64), (64, 256), (256, 64)):
        seconds, chosen = timed(prompt, n)
        print(f"    prompt {prompt:>4}, 8 x {n:<4} {ratio(seconds[True], seconds[False]):.3f}   "
              f"{'shared' if chosen else 'repeated'}")
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    parts, result, threads = {"a": bins, "b": ranks, "c": padding, "d": sharing}, {}, torch.get_num_threads()
    if not set(config.parts) <= set(parts) or not config.parts or config.repeats < 1:
        die(f"--parts {config.parts} --repeats {config.repeats}: parts are some of abcd, repeats at least 1")
    torch.set_num_threads(1)
    for letter in sorted(set(config.parts)):
        result |= parts[letter](config)
    torch.set_num_threads(threads)
    return finish("pack", **result)


if __name__ == "__main__":
    main()
