"""
documents.py: what a model is pretrained or tuned on, one document at a time.

document(split, i) -> (tokens, trained) is a pure function of its address: resuming is one integer, and
ranks never overlap. `trained` marks the tokens that are predicted. --data says where they are from:

    a task              its corpus: a prompt and a completion (or more in turn), and only completions
                        are trained
    chat.jsonl          {messages: [{role, content}]} per line; only the assistant's words are trained
    text.txt            windows of one text
    stdlib              windows of the sources of Python's own library, a task to no other script
    a folder of .bin    windows of token shards, as the FineWeb speedruns write them
"""
import json
from pathlib import Path

import numpy as np

import data
from data import stdlib


class Documents:
    """document(split, i) -> (tokens, trained), a pure function of both, cut to a packed row.
    `trained` marks the tokens that are predicted."""

    def __init__(self, read, config, tok, about=""):
        self.read = read
        self.config = config
        self.tok = tok
        self.about = about                         # a line for the log: which corpus this is

    def __call__(self, split, i):
        tokens, trained = self.read(split, i)
        return tokens[:self.config.row_tokens], trained[:self.config.row_tokens]


def kind_of(name):
    """chats, shards, text or task: what --data says"""
    path = Path(name)
    if path.suffix == ".jsonl":
        return "chats"
    if path.is_dir() or path.suffix == ".bin":
        return "shards"
    if path.is_file() or path.suffix or name == "stdlib":
        return "text"
    return "shards" if "/" in name else "task"


def documents(config, tok):
    """-> document, and how many train documents there are (None: endless)."""
    path = Path(config.data)
    kind = kind_of(config.data)
    count = None
    about = ""
    if kind == "chats":
        read, count = _chats(path, tok, config)
    elif kind == "shards":
        read, count = _windows(*_shards(path), config)
    elif path.is_file():
        tokens = np.array(data.begun(tok.encode(path.read_text()), tok), dtype=np.int64)
        border = len(tokens) - len(tokens) // 20
        read, count = _windows([tokens[:border]], [tokens[border:]], config)
    elif path.suffix:
        raise FileNotFoundError(f"--data {config.data}: no such file")
    elif config.data == "stdlib":
        read, about = _library(tok, config)
    else:
        read = _completions(data.load(config.data), tok, config)
    return Documents(read, config, tok, about), count


def _completions(task, tok, config):
    end = tok.encode(tok.end)

    def read(split, i):
        prompt, *turns = task.document(split, config.seed, i)    # completion, prompt, completion, ...
        tokens = data.begun(tok.encode(prompt), tok)
        trained = [config.prompts] * len(tokens)
        for k, text in enumerate(turns):
            ids = tok.encode(text) + (end if k == len(turns) - 1 else [])
            tokens += ids
            trained += [k % 2 == 0 or config.prompts] * len(ids)
        return tokens, trained

    return read


def _library(tok, config):
    """Windows of seq_len bytes and one more, from anywhere in Python's library."""
    _fits_a_row(config)
    about = stdlib.library().about

    def read(split, i):
        tokens = data.begun(tok.encode(stdlib.window(split, config.seed, i, config.seq_len + 1)), tok)
        return tokens, [False] + [True] * (len(tokens) - 1)

    return read, about


def _fits_a_row(config):
    if config.seq_len >= config.row_tokens:
        raise ValueError(f"--seq-len {config.seq_len} and one token more would be cut to --row-tokens "
                         f"{config.row_tokens}: raise it, or lower --seq-len")


def _chats(path, tok, config):
    """{messages: [{role, content}]} per line; the assistant's words and their stop token are trained."""
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    chats = []
    for n, line in data.lines(path):
        try:
            messages = json.loads(line)["messages"]
            chats.append([{"role": m["role"], "content": m["content"], **m} for m in messages])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"--data {path}, line {n}: not a JSON object with a list "
                             "`messages`") from None
    if not chats:
        raise ValueError(f"--data {path} is empty: give one chat a line")
    held = max(1, len(chats) // 20) if len(chats) > 1 else 0
    splits = {"valid": chats[:held] or chats, "train": chats[held:]}

    def read(split, i):
        epoch, place = divmod(i, len(splits[split]))
        order = np.random.default_rng([config.seed, epoch]).permutation(len(splits[split]))
        messages = splits[split][order[place]]
        tokens = []
        trained = []
        done = ""
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = tok.chat(messages[:k])
            after = tok.chat(messages[:k + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError(f"--data {path}: the chat template rewrites earlier turns, which "
                                 "hides what to train; split the chats")
            for text, flag in ((before[len(done):], False), (after[len(before):], True)):
                ids = tok.encode(text)
                tokens += ids
                trained += [flag] * len(ids)
            done = after
        whole = data.begun(tokens, tok)  # a template may have written the first token already
        return whole, [False] * (len(whole) - len(tokens)) + trained

    return read, len(splits["train"])


def _shards(path):
    """.bin files as the FineWeb speedruns write them: 256 int32 (20240520, 1, number of tokens),
    then uint16 tokens. -> (train, valid)"""
    if not path.exists():
        raise FileNotFoundError(f"--data {path}: no such file or folder")
    files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"--data {path}: no .bin shards there")
    shards = []
    for file in files:
        header = np.fromfile(file, dtype=np.int32, count=256)
        if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
            raise ValueError(f"{file} is not a version 1 token shard (its header says "
                             f"{header[:2].tolist()}): download it again")
        tokens = np.memmap(file, dtype=np.uint16, mode="r", offset=1024)
        if len(tokens) != header[2]:
            raise ValueError(f"{file} holds {len(tokens):,} tokens, its header says {header[2]:,}: "
                             "it is cut short, download it again")
        shards.append(tokens)
    valid = [t for f, t in zip(files, shards) if "val" in f.name]
    train = [t for f, t in zip(files, shards) if "val" not in f.name]
    return train or shards, valid or shards[-1:]


def _windows(train, valid, config):
    """Windows of seq_len + 1 tokens, one after another through the shards; every token but a
    window's first is trained once per epoch."""
    size = config.seq_len
    splits = {"train": train, "valid": valid}
    counts = {split: [max(0, len(t) - 1) // size for t in parts] for split, parts in splits.items()}
    for split, count in counts.items():
        if sum(count) == 0:
            tokens = sum(len(t) for t in splits[split])
            raise ValueError(f"--data {config.data}: its {split} part has {tokens:,} tokens, "
                             "shorter than one sequence; lower --seq-len")
    _fits_a_row(config)

    def read(split, i):
        i %= sum(counts[split])
        for tokens, count in zip(splits[split], counts[split]):
            if i < count:
                window = tokens[i * size:(i + 1) * size + 1]
                return window.astype(np.int64).tolist(), [False] + [True] * size
            i -= count

    return read, sum(counts["train"])
