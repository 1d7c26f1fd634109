"""
python -m bench fits: which model trains on which card, and by which flags. Arithmetic of common/memory.py
(what --dry-run prints), not a measurement.

Full fine-tuning in bf16 with fp32 masters and moments. A cell is the cheapest way that fits, and how many
samples of --length tokens its cache holds, 16 at least; 90% of a card is used.

    rows N      --row-tokens N        smaller packed rows             a little speed
    sharded     --grads sharded       ZeRO-2, several GPUs            a few percent of an update
    recompute   --checkpoint          of blocks in the backward       a third of an update
    offload     --offload             optimizer and sums on the host  the way there and back
"""
import re
from dataclasses import dataclass

from bench import finish
from common.flags import flags
from common.memory import GB, count_of, fitting, on_host
from nanorl import Config as RL
from train_gpt import GPTConfig


@dataclass
class Config:
    row_tokens: int = 8192               # tokens of a packed row, at first
    length: int = 1024                   # tokens of a sample, its prompt included
    reference: bool = False              # with a reference model (--kl-coef), its blocks on the host


CARDS = {"8": (8, 1), "12": (12, 1), "24": (24, 1), "80": (80, 1), "8 x 80": (80, 8)}    # GB, ranks
MODELS = {                               # vocabulary, layers, heads, kv heads, head dim, width, ff, tied
    "Qwen2.5-0.5B": (151936, 24, 14, 2, 64, 896, 4864, True),
    "Qwen3-0.6B": (151936, 28, 16, 8, 128, 1024, 3072, True),
    "Llama-3.2-1B": (128256, 16, 32, 8, 64, 2048, 8192, True),
    "Qwen2.5-1.5B": (151936, 28, 12, 2, 128, 1536, 8960, True),
    "Qwen3-1.7B": (151936, 28, 16, 8, 128, 2048, 6144, True),
    "Qwen2.5-3B": (151936, 36, 16, 2, 128, 2048, 11008, True),
    "Llama-3.2-3B": (128256, 28, 24, 8, 128, 3072, 8192, True),
    "Qwen3-4B": (151936, 36, 32, 8, 128, 2560, 9728, True),
    "Qwen2.5-7B": (152064, 28, 28, 4, 128, 3584, 18944, False),
    "Qwen3-8B": (151936, 36, 32, 8, 128, 4096, 12288, False),
    "Qwen2.5-14B": (152064, 48, 40, 8, 128, 5120, 13824, False),
    "Qwen3-14B": (151936, 40, 40, 8, 128, 5120, 17408, False),
}
WORDS = {"--grads sharded": "sharded", "--checkpoint": "recompute", "--offload": "offload"}


def shape_of(name):
    V, layers, heads, kv, hd, width, ff, tied = MODELS[name]
    return GPTConfig(V, layers, heads, kv, hd, width, ff, 32768, 1e6, tie_embeddings=tied,
                     qk_norm=name.startswith("Qwen3"), qkv_bias=name.startswith("Qwen2"))


def cell(words, samples):
    """"--row-tokens 2048 --checkpoint", 300 -> "rows 2048, recompute: 300"."""
    rows = re.search(r"--row-tokens (\d+)", words)
    said = [f"rows {rows[1]}"] if rows else []
    said += [short for flag, short in WORDS.items() if flag in words]
    return f"{', '.join(said) or 'as it is'}: {samples:,}"


def table(config):
    """-> the lines of a table, and {what: {model: ...}}."""
    rl = RL(row_tokens=config.row_tokens, max_new=config.length // 2, kl_coef=float(config.reference),
            reference_at="host")
    lines = ["| model | parameters | " + " | ".join(f"{card} GB" for card in CARDS) + " | host, --offload |",
             "|---" * (len(CARDS) + 3) + "|"]
    samples = {}
    flags_of = {}
    host = {}
    for name in MODELS:
        shape = shape_of(name)
        cells = []
        samples[name] = {}
        flags_of[name] = {}
        for card, (size, world) in CARDS.items():
            found = next(fitting(shape, rl, 2, world, size * GB, None, config.length), None)
            cells.append(cell(*found) if found else "-")
            samples[name][card] = found[1] if found else 0
            flags_of[name][card] = found[0] if found else "-"
        host[name] = round(on_host(shape, RL(offload=True), 1) / GB, 1)
        params, _, _ = count_of(shape)
        lines.append(f"| {name} | {params / 1e9:.2f}B | {' | '.join(cells)} | {host[name]:.0f} GB |")
    return lines, dict(samples=samples, flags=flags_of, host=host)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    lines, numbers = table(config)
    print(f"the cheapest way that fits, and samples of {config.length:,} tokens in its cache:")
    print("\n".join(lines))
    return finish("fits", **numbers)


if __name__ == "__main__":
    main()
