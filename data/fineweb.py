"""
FineWeb, ten billion tokens of web text, already cut into GPT-2 tokens by the people of the
NanoGPT speedruns: what `train_gpt.py --preset gpt2` reads. One shard is 100M tokens (200 MB); the
preset takes 1.3 billion, 13 of them and the valid one.

    python -m data.fineweb 13    # into data/fineweb; again, or after a cut, continues where it stopped
    python -m data.fineweb 2 --to /big/disk --from file:///mirror/of/the/shards
"""
import struct
from pathlib import Path

from data.download import command, fetch

SOURCE = "https://huggingface.co/datasets/kjj0/fineweb10B-gpt2/resolve/main"
SHARDS = 103                                           # of train, numbered from 1
USAGE = ("usage: python -m data.fineweb N [--to FOLDER] [--from URL]   "
         "(N: train shards, 1 to 103; 13 for the gpt2 preset)")


def whole(part):
    """256 int32 (20240520, 1, the number of tokens), then that many uint16"""
    with open(part, "rb") as f:
        head = f.read(12)
    magic, version, tokens = struct.unpack("<3i", head) if len(head) == 12 else (0, 0, 0)
    if (magic, version) != (20240520, 1) or part.stat().st_size != 1024 + 2 * tokens:
        raise ValueError(f"{part.name.removesuffix('.part')}: what came "
                         "is no token shard of version 1; is the address right?")


def main(argv):
    words, to, source = list(argv), "data/fineweb", SOURCE
    for flag in ("--to", "--from"):
        if flag in words:
            at = words.index(flag)
            if at + 1 == len(words):
                raise ValueError(f"{flag} needs a value. {USAGE}")
            to, source = (words[at + 1], source) if flag == "--to" else (to, words[at + 1])
            del words[at:at + 2]
    if len(words) != 1 or not words[0].isdigit() or not 1 <= int(words[0]) <= SHARDS:
        raise ValueError(USAGE)
    for name in ["fineweb_val_000000.bin"] + [f"fineweb_train_{i:06}.bin"
                                              for i in range(1, int(words[0]) + 1)]:
        fetch(f"{source.rstrip('/')}/{name}", Path(to) / name, whole)
    print(f"{to}: {words[0]} train shards and the valid one; next: python train_gpt.py "
          f"--preset gpt2 --data {to}")


if __name__ == "__main__":
    command(main)
