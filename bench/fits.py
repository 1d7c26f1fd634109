"""
python -m bench fits: which model trains on which GPU. Arithmetic of common/memory.py (what
--dry-run prints), not a measurement.

Full fine-tuning in bf16 with fp32 masters and moments, blocks recomputed, rows of 8,192 tokens,
64 sequences of 2,048 in the cache at least (the sampler takes what is left), half of each its
prompt. 10% of the card is kept for the allocator.
"""
from dataclasses import dataclass

from bench import finish
from common.flags import flags
from common.memory import budget
from nanorl import Config as RL
from train_gpt import GPTConfig


@dataclass
class Config:
    row_tokens: int = 8192               # tokens of a packed row
    sequences: int = 64                  # in the KV cache
    length: int = 2048                   # tokens of one, prompt and response


CARDS = (8, 16, 24, 80, 141)             # GB
MODELS = {                               # vocabulary, layers, heads, kv heads, head dim, width, ff, tied
    "Qwen2.5-0.5B": (151936, 24, 14, 2, 64, 896, 4864, True),
    "Qwen3-0.6B": (151936, 28, 16, 8, 128, 1024, 3072, True),
    "Llama-3.2-1B": (128256, 16, 32, 8, 64, 2048, 8192, True),
    "Qwen2.5-1.5B": (151936, 28, 12, 2, 128, 1536, 8960, True),
    "Qwen3-1.7B": (151936, 28, 16, 8, 128, 2048, 6144, True),
    "Llama-3.2-3B": (128256, 28, 24, 8, 128, 3072, 8192, True),
    "Qwen3-4B": (151936, 36, 32, 8, 128, 2560, 9728, True),
    "Qwen2.5-7B": (152064, 28, 28, 4, 128, 3584, 18944, False),
    "Qwen3-8B": (151936, 36, 32, 8, 128, 4096, 12288, False),
}


def table(config):
    """-> the lines of a table, and {model: GiB}."""
    rl, numbers = RL(row_tokens=config.row_tokens, checkpoint=True, max_new=config.length // 2), {}
    lines = ["| model | 1 GPU | with a reference | 8 GPUs | with a reference "
             "| smallest card: 1 GPU, +ref; 8 GPUs, +ref |", "|---|---|---|---|---|---|"]
    for name, (V, layers, heads, kv, hd, width, ff, tied) in MODELS.items():
        shape = GPTConfig(V, layers, heads, kv, hd, width, ff, 32768, 1e6, tie_embeddings=tied)
        need = [sum(budget(shape, rl, 2, world, config.sequences, config.length, reference).values())
                for world in (1, 8) for reference in (False, True)]
        fits = [next((str(c) for c in CARDS if n <= 0.9 * c * 1e9), "-") for n in need]
        numbers[name] = [round(n / 2**30, 1) for n in need]
        lines.append(f"| {name} | " + " | ".join(f"{n:.1f}" for n in numbers[name])
                     + f" | {', '.join(fits[:2])}; {', '.join(fits[2:])} |")
    return lines, numbers


def main(argv=None):
    lines, numbers = table(flags(Config, argv, __doc__))
    print("GiB of one GPU, and the smallest card of 8, 16, 24, 80, 141 GB that holds it", *lines, sep="\n")
    return finish("fits", **numbers)


if __name__ == "__main__":
    main()
