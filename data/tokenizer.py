"""
Tokenizers, all of them tiktoken Encodings: one fast implementation to trust, and ours are built in code in a few lines each.

    bytes     256 bytes: any text, no surprises
    chars     printable ASCII and the newline, 100 ids with the special tokens: for small models on the tasks of this folder
    numbers   chars, and one token for each integer 10 .. 999 (digits are their own): arithmetic without spelling
    gpt2      the 50,257 of GPT-2; downloaded once by tiktoken

    tok = tokenizer("chars");  tok.encode("C3 7 12=43:");  tok.decode(ids);  tok.save(folder);  tokenizer(folder)

What was deleted: training of tokenizers, offsets, truncation, padding, and the beginning-of-text token that others add unasked. In our
own vocabularies the special tokens come FIRST, so <|end|> is id 0 in each and no vocabulary that grows can move it.
A document is prompt + completion + tok.end.
"""
import difflib
import json
import os
import pathlib
import re

import tiktoken

SPECIAL = {"<|end|>": 0, "<|user|>": 1, "<|assistant|>": 2, "<|system|>": 3}
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
FILE = "nanorl_tokenizer.json"


class Tokenizer:
    """encode, decode, the ids that stop a completion, and the chat template. `encoding` is the tiktoken object itself."""

    def __init__(self, name, encoding, end, bos=None, alphabet=None):
        self.name, self.encoding, self.end, self.bos = name, encoding, end, bos
        self.stop = {encoding.encode_single_token(end)}
        self.vocab_size = encoding.n_vocab
        self.outside = alphabet and re.compile(f"[^{re.escape(alphabet)}]").search       # finds a character with no token

    def encode(self, text):
        """special tokens are parsed: "<|end|>" is one id. Nothing is added at either end."""
        if self.outside and (bad := self.outside(text)):
            raise ValueError(f"tokenizer {self.name!r} has no token for {bad[0]!r} (U+{ord(bad[0]):04X}, character {bad.start():,} of the "
                             "text): it knows printable ASCII and the newline; use 'bytes' for other text")
        return self.encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts):
        return [self.encode(text) for text in texts]       # tiktoken's own batch starts threads, and texts are short: slower

    def decode(self, ids):
        """never raises: half a character, or an id that a padded head may sample and no token has, becomes U+FFFD."""
        try:
            return self.encoding.decode(ids)
        except (KeyError, OverflowError):
            return b"".join(self._bytes(i) for i in ids).decode("utf-8", errors="replace")

    def _bytes(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except (KeyError, OverflowError):
            return "\ufffd".encode()

    def chat(self, messages):
        """
        messages: [{"role": "user", "content": "..."}, ...]. Ends ready for the assistant's words, unless they are the last message already.
        """
        text = ""
        for message in messages:
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"chat: unknown role {role!r}: one of system, user, assistant")
            for token in self.encoding.special_tokens_set:
                if token in content:             # it would be parsed as the real thing and end the turn
                    raise ValueError(f"chat: the content of a {role} message holds the special token {token}: remove it")
            text += self._turn(role) + content + (self.end if role == "assistant" or self.name != "gpt2" else "\n")
        return text if messages and messages[-1]["role"] == "assistant" else text + self._turn("assistant")

    def _turn(self, role):
        return f"{role}: " if self.name == "gpt2" else f"<|{role}|>"          # gpt2 has no tokens for roles

    def save(self, folder):
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        (path / FILE).write_text(json.dumps({"name": self.name, "vocab_size": self.vocab_size}) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# our own vocabularies. tiktoken cuts text by a regex, then merges bytes within each piece, lowest id first.

def build(name, pieces, tokens, alphabet=None):
    ranks = {token: len(SPECIAL) + i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=ranks, special_tokens=SPECIAL)
    return Tokenizer(name, encoding, "<|end|>", alphabet=alphabet)


def bytes_():
    return build("bytes", r"[\s\S]+", [bytes([i]) for i in range(256)])


def chars():
    return build("chars", r"[\s\S]+", [c.encode() for c in ALPHABET], ALPHABET)


def numbers():
    # runs of digits are cut in threes from the left. 10 .. 99 merge two digits, 100 .. 999 such a pair and a digit; a run with leading
    # zeros is not a number's name and stays in smaller pieces
    return build("numbers", r"[0-9]{1,3}|[^0-9]+", [c.encode() for c in ALPHABET] + [str(i).encode() for i in range(10, 1000)], ALPHABET)


def gpt2():
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:                     # requests' errors are OSErrors
        raise ValueError("tokenizer 'gpt2' has to be downloaded once, which failed "
                         f"({type(error).__name__}): go online, or point TIKTOKEN_CACHE_DIR at a machine's cache that has it") from error
    return Tokenizer("gpt2", encoding, "<|endoftext|>", bos=encoding.eot_token)


BY_NAME = {"bytes": bytes_, "chars": chars, "numbers": numbers, "gpt2": gpt2}


def tokenizer(name_or_folder):
    """by name, or from a folder that `save` wrote (a checkpoint is one)."""
    name = os.fspath(name_or_folder)
    if name in BY_NAME:
        return BY_NAME[name]()
    if os.path.isdir(name):
        return from_folder(pathlib.Path(name))
    near = difflib.get_close_matches(name, BY_NAME, 1, cutoff=0)
    raise ValueError(f"unknown tokenizer {name!r} (nor is it a folder): did you mean {near[0]!r}? known tokenizers: {', '.join(BY_NAME)}")


def from_folder(folder):
    # the one place that looks at files: a folder's own kind of tokenizer is told here by the files that it has
    path = folder / FILE
    if not path.exists():
        raise FileNotFoundError(f"no tokenizer in {folder}: it has no {FILE}; name one of {', '.join(BY_NAME)} instead")
    try:
        name = json.loads(path.read_text())["name"]
        return BY_NAME[name]()
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name a tokenizer ({type(error).__name__}: {error}): "
                         f'write {{"name": "chars"}} or another of {", ".join(BY_NAME)}') from error
