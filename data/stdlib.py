"""
The *.py files of Python's own library: twelve megabytes of text that every machine has already.

A document is a window of --seq-len bytes and one more, cut where its address (split, seed, i) says: so
a short run reads from all over the library. Each file is train, valid or test by a hash of its name.
Left out: tests (tables of numbers and other alphabets, in files of their own size) and what was
installed beside the library. Another Python has another library, so `about` says which it was.

    python train_gpt.py --preset tiny
    python -m data.stdlib                  # what this Python has, and three windows
"""
import functools
import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from data import split_of, stream

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
FEWEST = 100             # files: a library of fewer is not all there


@dataclass(frozen=True)
class Library:
    texts: dict          # split -> bytes, its files one after another
    about: str           # one line: which library this is


def sources(root):
    """-> [(name, path)] of the library's files, sorted by name."""
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        # config-3.11-x86_64-linux-gnu: how this one Python was built
        if not LEFT_OUT & set(parts) and not parts[0].startswith("config-"):
            found.append(("/".join(parts), path))
    return sorted(found)


@functools.cache
def library(root=None):
    root = Path(root or sysconfig.get_path("stdlib"))
    files = sources(root) if root.is_dir() else []
    if len(files) < FEWEST:
        raise ValueError(f"--data stdlib: the library of Python {platform.python_version()} is there without "
                         f"its sources ({root} holds {len(files)} *.py files): take another Python, or "
                         "--data FILE with a text of your own")
    texts = {"train": [], "valid": [], "test": []}
    digest = hashlib.sha256()
    for name, path in files:
        text = path.read_bytes()
        texts[split_of(f"stdlib {name}")].append(text)
        digest.update(text)
    texts = {split: b"".join(parts) for split, parts in texts.items()}
    size = sum(map(len, texts.values()))
    return Library(texts, f"the library of Python {platform.python_version()}: {len(files)} files, "
                          f"{size:,} bytes, sha256 {digest.hexdigest()}")


def window(split, seed, i, size):
    """-> text of `size` bytes; where a character was cut at an end, without the pieces of it."""
    text = library().texts[split]
    start = int(stream("stdlib", split, seed, i)() * (len(text) - size))
    return text[start:start + size].decode(errors="ignore")


def show():
    print(library().about)
    for i in range(3):
        print(repr(window("train", 0, i, 129)))


if __name__ == "__main__":
    show()
