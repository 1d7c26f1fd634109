"""
Tokenizers, all of them tiktoken Encodings: one fast implementation to trust, and ours are built
in code in a few lines each.

    bytes     256 bytes: any text, no surprises
    chars     printable ASCII and the newline, 100 ids with the special tokens: for small models on
              the tasks of this folder
    numbers   chars, and one token for each integer 10 .. 999 (digits are their own): arithmetic
              without spelling
    gpt2      the 50,257 of GPT-2; downloaded once by tiktoken
    a folder  one that `save` wrote, or a Hugging Face model's with a byte-level BPE in its
              tokenizer.json (Qwen, Llama 3, GPT-2)

    tok = tokenizer("chars")
    tok.encode("C3 7 12=43:");  tok.decode(ids);  tok.save(folder);  tokenizer(folder)

Left out of the usual recipe: training of tokenizers, offsets, truncation, padding, and the
beginning-of-text token that others add unasked. In our own vocabularies the special tokens come
FIRST, so <|end|> is id 0 in each and no vocabulary that grows can move it. A document is prompt +
completion + tok.end.

The foreign and the own meet in one file format: `save` writes a tokenizer.json too, so that what
is trained here is served anywhere.
"""
import difflib
import functools
import json
import os
import pathlib
import re
import sys
import unicodedata
from datetime import date

import jinja2
import regex                                     # tiktoken's own dependency: \p{L} and its like
import tiktoken
from jinja2.sandbox import ImmutableSandboxedEnvironment

SPECIAL = {"<|end|>": 0, "<|user|>": 1, "<|assistant|>": 2, "<|system|>": 3}
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
FILE = "nanorl_tokenizer.json"


class Tokenizer:
    """encode, decode, the ids that stop a completion, and the chat template. `encoding` is the
    tiktoken object itself."""
    asks_date = False                            # does its chat template ask for today's date?
    date = ""

    def __init__(self, name, encoding, end, bos=None, alphabet=None):
        self.name, self.encoding, self.end, self.bos = name, encoding, end, bos
        self.stop = {encoding.encode_single_token(end)}
        self.vocab_size = encoding.n_vocab
        # finds a character with no token
        self.outside = alphabet and re.compile(f"[^{re.escape(alphabet)}]").search
        self.special = encoding.special_tokens_set                   # what a message must not contain

    def encode(self, text):
        """special tokens are parsed: "<|end|>" is one id. Nothing is added at either end."""
        if self.outside and (bad := self.outside(text)):
            raise ValueError(f"tokenizer {self.name!r} has no token for {bad[0]!r} "
                             f"(U+{ord(bad[0]):04X}, character {bad.start():,} of the text): it "
                             "knows printable ASCII and the newline; use 'bytes' for other text")
        return self.encoding.encode(text, allowed_special="all")

    def encode_batch(self, texts):
        # tiktoken's own batch starts threads, and texts are short: slower
        return [self.encode(text) for text in texts]

    def decode(self, ids):
        """never raises: half a character, or an id that a padded head may sample and no token
        has, becomes U+FFFD."""
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
        messages: [{"role": "user", "content": "..."}, ...]. Ends ready for the assistant's words,
        unless they are the last message already.
        """
        text = ""
        for message in self._checked(messages):
            role, content = message["role"], message["content"]
            if role not in ("system", "user", "assistant"):
                raise ValueError(f"chat: unknown role {role!r}: one of system, user, assistant")
            text += self._turn(role) + content + (self.end if role == "assistant"
                                                  or self.name != "gpt2" else "\n")
        return text if messages and messages[-1]["role"] == "assistant" else text + self._turn("assistant")

    def _checked(self, messages):
        for message in messages:
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise ValueError("chat: a message needs a role and a "
                                 f"content that are text: {str(message)[:80]}")
            for token in self.special:
                if token in message["content"]:  # it would be parsed as the real thing and end the turn
                    raise ValueError(f"chat: the content of a {message['role']} "
                                     f"message holds the special token {token}: remove it")
        return messages

    def _turn(self, role):
        return f"{role}: " if self.name == "gpt2" else f"<|{role}|>"          # gpt2 has no tokens for roles

    def save(self, folder):
        """our own few words, and the same vocabulary as a tokenizer.json for everyone else."""
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        whole, config = as_tokenizer_json(self)
        about = {"name": self.name, "vocab_size": self.vocab_size}
        # a student that also stops by its teacher's ids
        if self.stop != {self.encoding.encode_single_token(self.end)}:
            about["stop"] = sorted(self.stop)
        (path / FILE).write_text(json.dumps(about) + "\n")
        (path / "tokenizer.json").write_text(whole)
        (path / "tokenizer_config.json").write_text(config)


def begun(ids, tok):
    """ids behind the beginning-of-text token, where the tokenizer has one and they do not begin
    with it already (a chat template may have written it). The one rule for every text that a
    model reads from its start: prompts, documents, chats, gold."""
    return ids if tok.bos is None or ids[:1] == [tok.bos] else [tok.bos, *ids]


# --------------------------------------------------------------------------------------------------
# our own vocabularies. tiktoken cuts text by a regex, then merges bytes within each piece, lowest
# id first.

def build(name, pieces, tokens, alphabet=None):
    ranks = {token: len(SPECIAL) + i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(name, pat_str=pieces, mergeable_ranks=ranks, special_tokens=SPECIAL)
    return Tokenizer(name, encoding, "<|end|>", alphabet=alphabet)


def bytes_():
    return build("bytes", r"[\s\S]+", [bytes([i]) for i in range(256)])


def chars():
    return build("chars", r"[\s\S]+", [c.encode() for c in ALPHABET], ALPHABET)


def numbers():
    # runs of digits are cut in threes from the left. 10 .. 99 merge two digits, 100 .. 999 such a
    # pair and a digit; a run with leading zeros is not a number's name and stays in smaller
    # pieces
    return build("numbers", r"[0-9]{1,3}|[^0-9]+",
                 [c.encode() for c in ALPHABET] + [str(i).encode() for i in range(10, 1000)], ALPHABET)


def gpt2():
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:                     # requests' errors are OSErrors
        raise ValueError("tokenizer 'gpt2' has to be downloaded once, "
                         f"which failed ({type(error).__name__}): go online, "
                         "or point TIKTOKEN_CACHE_DIR at a machine's cache that has it") from error
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
    raise ValueError(f"unknown tokenizer {name!r} (nor is it a folder): "
                     f"did you mean {near[0]!r}? known tokenizers: {', '.join(BY_NAME)}")


def from_folder(folder):
    # the one place that looks at files: a folder's own kind of tokenizer is told here by the
    # files that it has
    path = folder / FILE
    if not path.exists():
        if (folder / "tokenizer.json").exists():
            return foreign(folder)
        raise FileNotFoundError(f"no tokenizer in {folder}: it has no "
                                f"{FILE} and no tokenizer.json; name one of {', '.join(BY_NAME)}")
    try:
        about = json.loads(path.read_text())
        tok = BY_NAME[about["name"]]()
        tok.stop |= {int(i) for i in about.get("stop", ())}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} does not name a tokenizer ({type(error).__name__}: {error}): "
                         f'write {{"name": "chars"}} or another of {", ".join(BY_NAME)}') from error
    say_what_was_read(folder, tok)
    return tok


def say_what_was_read(folder, tok):
    """A tokenizer.json beside our own file is for everyone else. If it is damaged, or says something
    else, it may be the one that was meant."""
    path = folder / "tokenizer.json"
    if not path.exists() or os.environ.get("RANK", "0") != "0":
        return
    try:
        same = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"] == vocabulary(tok)
    except (ValueError, KeyError, TypeError):
        same = False
    if not same:
        print(f"note: the tokenizer was read from {folder / FILE} ({tok.name}). The tokenizer.json beside "
              "it is damaged or another one, and was not read", file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# a Hugging Face folder's tokenizer. Its files are kept as bytes, so that a run that started from
# them can be saved when they are gone.

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
         "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")
# what ByteLevel with use_regex means
GPT2_PIECES = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""


@functools.cache
def unicode_of_bytes():
    """tokenizer.json writes a byte as a printable character: itself where it is one, else one of
    the code points from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}


class Foreign:
    """
    The same names as Tokenizer, over a Hugging Face folder. Three stages: added tokens are cut out
    of the text (the longest one wins where several begin), what is left is normalised, and tiktoken
    does the rest. Where the folder cuts by several patterns in turn, all but the last cut here.
    """

    # added: {token: its entry}
    def __init__(self, name, encoding, added, normal_form, cuts, end, stop, bos, template, words, files):
        self.name, self.encoding, self.end, self.bos = name, encoding, end, bos
        self.stop, self.first_stop = set(stop), frozenset(stop)
        self.normal_form = normal_form
        self.cuts = cuts
        self.template = template
        self.words = words
        self.files = files
        templates = [files.get(name, b"") for name in ("chat_template.jinja", "tokenizer_config.json")]
        self.asks_date = template is not None and any(b"strftime_now" in text for text in templates)
        self.date = date.today().isoformat()     # of strftime_now; a run puts its first day here
        self.vocab_size = encoding.n_vocab
        self.ids = {token: a["id"] for token, a in added.items()}
        # raw text is searched for tokens that say `normalized: false`, normalised text for the
        # others, in their normal form too
        late = {self._normal(token): token for token, a in added.items()
                if a.get("normalized", not a.get("special"))}
        self.raw, self.normalised = _any_of(added.keys() - set(late.values())), _any_of(late)
        self.ids |= {form: self.ids[token] for form, token in late.items()}
        # <think> may be in a message
        self.special = frozenset(token for token, a in added.items() if a.get("special"))

    def encode(self, text):
        """added tokens are parsed. Nothing is added at either end."""
        ids = []
        for i, part in enumerate(self.raw.split(text) if self.raw else [text]):
            if i % 2:                            # re.split with a group: every second part is a match
                ids.append(self.ids[part])
                continue
            part = self._normal(part)
            for j, piece in enumerate(self.normalised.split(part) if self.normalised else [part]):
                if j % 2:
                    ids.append(self.ids[piece])
                elif piece:
                    self._ordinary(piece, ids)
        return ids

    def _normal(self, text):
        return unicodedata.normalize(self.normal_form, text) if self.normal_form else text

    def _ordinary(self, text, ids):
        pieces = [text]
        for cut in self.cuts:
            pieces = [piece for whole in pieces for piece in _isolate(cut, whole)]
        for piece in pieces:
            ids += self.encoding.encode_ordinary(piece)

    encode_batch = Tokenizer.encode_batch
    decode = Tokenizer.decode
    _bytes = Tokenizer._bytes
    _checked = Tokenizer._checked

    def chat(self, messages):
        """the folder's own template. A base model has none and gets the words alone, a blank line
        after each message."""
        self._checked(messages)
        more = not messages or messages[-1]["role"] != "assistant"
        if self.template is None:
            return "".join(m["content"] + (self.end if m["role"] == "assistant" else "\n\n")
                           for m in messages)
        try:
            return self.template.render(messages=messages, add_generation_prompt=more,
                                        tools=None, documents=None, strftime_now=self._day,
                                        **self.words)
        except Exception as error:                   # a program of others: 1 / 0 and endless recursion too
            raise ValueError(f"chat: the template of {self.name} does not take these messages: "
                             f"{type(error).__name__}: {' '.join(str(error).split())}") from None

    def _day(self, form):
        return date.fromisoformat(self.date).strftime(form)

    def save(self, folder):
        path = pathlib.Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            (path / name).write_bytes(content)
        # a student that also stops by its teacher's ids: servers read them from this file
        if self.stop != self.first_stop:
            known = json.loads(self.files.get("generation_config.json", b"{}"))
            (path / "generation_config.json").write_text(
                json.dumps(known | {"eos_token_id": sorted(self.stop)}, indent=2) + "\n")


def _ids(config):
    """the stop ids that a config names: one, or several (<|eot_id|> ends a turn, <|end_of_text|> a text)"""
    ids = config.get("eos_token_id")
    return {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}


def _any_of(tokens):
    # alternatives are tried in order: the longest first
    tokens = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("(" + "|".join(map(re.escape, tokens)) + ")") if tokens else None


def _isolate(pattern, text):
    """what matches and what lies between, in order"""
    at = 0
    for match in pattern.finditer(text):
        if match.end() > match.start():
            if match.start() > at:
                yield text[at:match.start()]
            yield match[0]
            at = match.end()
    if at < len(text):
        yield text[at:]


def foreign(folder):
    """a Hugging Face folder -> Foreign. ValueError in one line for what it is not."""
    path = folder / "tokenizer.json"
    files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).is_file()}
    spec, config, generation, model = (_parsed(folder, name) for name in (
        "tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"))
    try:
        core, added = spec["model"], {a["content"]: a for a in spec.get("added_tokens") or []}
        for token, a in added.items():
            if a.get("lstrip") or a.get("rstrip") or a.get("single_word"):
                raise ValueError(f"{path}: the added token {token!r} "
                                 "eats white space or wants a whole word, which is not done here")
        normal_form = _normal_form(path, spec.get("normalizer"))
        cuts, last = _cuts(path, spec.get("pre_tokenizer"))
        if core.get("type", "BPE") != "BPE" or core.get("byte_fallback") or core.get("end_of_word_suffix") \
                or core.get("continuing_subword_prefix"):
            raise ValueError(
                f"{path} is not a byte-level BPE (it is "
                f"{core.get('type', 'BPE')}{' with byte fallback' if core.get('byte_fallback') else ''}): "
                "Qwen, Llama 3 and GPT-2 have one")
        ranks, unreachable = _ranks(path, core, added)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a tokenizer.json ({type(error).__name__}: "
                         f"{error}): download or copy it again") from None
    # the special tokens that tiktoken is told of are those it only has to decode: text is
    # searched for them before it sees any
    special = unreachable | {token: a["id"] for token, a in added.items()}
    try:
        encoding = tiktoken.Encoding(str(folder), pat_str=last, mergeable_ranks=ranks, special_tokens=special)
    except ValueError as error:                  # the library beneath knows fewer patterns than others
        raise ValueError(f"{path}: its pattern cannot be read ({' '.join(str(error).split())})") from None

    def word(key):
        token = config.get(key)
        return token.get("content") if isinstance(token, dict) else token

    stop = _ids(generation) | _ids(model)
    end = word("eos_token")
    if end is None:
        if not stop:
            raise ValueError(f"{folder} names no token that ends a text: "
                             "give tokenizer_config.json an eos_token")
        end = {i: token for token, i in special.items()}.get(min(stop), f"id {min(stop)}")
    if end not in special:
        raise ValueError(f"{folder}: its eos_token {end!r} is none of the added tokens of tokenizer.json")
    words = {key: word(key) or "" for key in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return Foreign(str(folder), encoding, added, normal_form, cuts, end, stop | {special[end]},
                   special.get(words["bos_token"]), _template(folder, config, files), words, files)


def _parsed(folder, name):
    try:
        parsed = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / name} is not JSON ({error}): download or copy it again") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"{folder / name} is not a JSON object: download or copy it again")
    return parsed


def _normal_form(path, normalizer):
    steps = (normalizer["normalizers"] if normalizer
             and normalizer["type"] == "Sequence" else [normalizer] if normalizer else [])
    if any(step["type"] not in ("NFC", "NFKC", "NFD", "NFKD") for step in steps) or len(steps) > 1:
        raise ValueError(f"{path} is not a plain byte-level BPE: it normalises by "
                         f"{', '.join(step['type'] for step in steps)}, only NFC and its like are done here")
    return steps[0]["type"] if steps else None


def _cuts(path, pre):
    """-> the patterns that cut first, compiled, and the last one, which is tiktoken's business"""
    steps = pre["pretokenizers"] if pre and pre["type"] == "Sequence" else [pre] if pre else []
    patterns, byte_level = [], False
    for step in steps:
        kind = step["type"]
        if (kind == "Split" and (step["behavior"],
                                 bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))):
            pattern = step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])
            patterns.append((pattern, step["behavior"] == "Isolated"))
        elif kind == "Digits":
            patterns.append((r"\p{N}" if step["individual_digits"] else r"\p{N}+", True))
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            byte_level = True
            if step.get("use_regex", True):
                patterns.append((GPT2_PIECES, True))
        else:
            raise ValueError(f"{path} is not a byte-level BPE that can be read here: it cuts text by {kind}"
                             f"{' with a prefix space' if kind == 'ByteLevel' else ''}")
    if not byte_level:
        raise ValueError(f"{path} is not a byte-level BPE: it has no ByteLevel among its pre-tokenizers")
    if not patterns:
        return [], r"[\s\S]+"
    *first, (pattern, isolated) = patterns
    if not all(alone for _, alone in first):
        raise ValueError(f"{path} drops text between two cuts (behavior "
                         "Removed, not last), which is not done here")
    # tiktoken drops what no alternative matches; what lies between two matches is a piece of its
    # own in `Isolated`
    last = f"{pattern}|(?:(?!{pattern})[\\s\\S])+" if isolated else pattern
    try:
        return [regex.compile(p) for p, _ in first], last
    except regex.error as error:
        raise ValueError(f"{path}: its pattern cannot be read ({error})") from None


def _ranks(path, core, added):
    """
    -> {bytes: id} for tiktoken, and {text: id} of what no text can ever become.

    The two libraries say the same in different words: a merge list names PAIRS in order, tiktoken
    merges any two neighbours whose union has the lowest id. They agree on every text if, for each
    token, merging its own bytes by lower ids alone ends in two parts that are a pair of the list,
    and the pairs come in the order of the ids. That is checked here, token by token; a file where
    it does not hold is refused, because it would be read almost right.
    """
    to_byte = {character: byte for byte, character in unicode_of_bytes().items()}
    ranks = {}
    for token, i in core["vocab"].items():
        if token not in added:
            try:
                ranks[bytes([to_byte[character] for character in token])] = i
            except KeyError:
                raise ValueError(f"{path} is not a byte-level BPE: its "
                                 f"token {token!r} is not written in bytes") from None
    lacking = 256 - sum(bytes([b]) in ranks for b in range(256))
    if lacking:
        raise ValueError(f"{path} lacks {lacking} of the 256 single bytes: "
                         "it cannot write every text, so it is no byte-level BPE")
    pairs = {}                                   # token -> {its left part: the place in the list}
    for place, merge in enumerate(core["merges"]):
        parts = merge.split(" ") if isinstance(merge, str) else merge  # both spellings of the list
        if len(parts) != 2:
            raise ValueError(f"{path} is not a tokenizer.json (its merge "
                             f"{merge!r} is no pair): download or copy it again")
        left, right = parts
        pairs.setdefault(left + right, {})[left] = place
    before, unreachable = -1, {}
    for token, i in sorted(core["vocab"].items(), key=lambda item: item[1]):
        if len(token) == 1 or token in added:
            continue
        parts = merged([to_byte[character] for character in token], ranks, i)
        place = pairs.get(token, {}).get(token[:parts[0]]) if len(parts) == 2 else None
        if len(parts) == 2 and place is None:
            raise ValueError(f"{path}: its merges make {token!r} otherwise "
                             "than the ids of its tokens say: it would be read almost right")
        if place is not None:
            if place < before:
                raise ValueError(f"{path}: its merges are not in the "
                                 f"order of its ids (at {token!r}): it would be read almost right")
            before = place
        elif not core.get("ignore_merges"):      # in the vocabulary, but no text is merged to it
            whole = bytes([to_byte[character] for character in token])
            unreachable[whole.decode("utf-8", errors="replace")] = ranks.pop(whole)
    return ranks, unreachable


def merged(token, ranks, limit):
    """the lengths of the parts in which merging by ids below `limit` leaves these bytes"""
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 1:
        best, at = limit, -1
        for k in range(len(parts) - 1):
            rank = ranks.get(parts[k] + parts[k + 1], limit)
            if rank < best:
                best, at = rank, k
        if at < 0:
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return [len(part) for part in parts]


# --------------------------------------------------------------------------------------------------
# chat templates: a program in a file that was downloaded, so it runs in jinja's sandbox

def _template(folder, config, files):
    source = config.get("chat_template")
    if isinstance(source, list):                 # several, by name
        source = next((one["template"] for one in source if one.get("name") == "default"), None)
    if "chat_template.jinja" in files:
        source = files["chat_template.jinja"].decode("utf-8", errors="replace")
    if not source:
        return None
    if not isinstance(source, str):
        raise ValueError(f"{folder}: its chat template is no text: {str(source)[:60]}")

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    world = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                          extensions=["jinja2.ext.loopcontrols"])
    world.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    world.globals["raise_exception"] = raise_exception
    try:
        return world.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"{folder}: its chat template cannot be read "
                         f"({' '.join(str(error).split())})") from None


# --------------------------------------------------------------------------------------------------
# our own vocabularies for everyone else

def vocabulary(tok):
    """{token as tokenizer.json writes it: id}"""
    letters = unicode_of_bytes()
    special = sorted((tok.encoding.encode_single_token(token), token) for token in tok.special)
    found = {token: i for i, token in special}
    for i in range(tok.encoding.n_vocab):
        if not tok.encoding.is_special_token(i):
            found["".join(letters[b] for b in tok.encoding.decode_single_token_bytes(i))] = i
    return found


@functools.lru_cache(maxsize=4)
def as_tokenizer_json(tok):
    """-> the texts of tokenizer.json and tokenizer_config.json. The merges are found again from
    the ids: each token's last one."""
    letters = unicode_of_bytes()
    encoding = tok.encoding
    ranks = {encoding.decode_single_token_bytes(i): i for i in range(encoding.n_vocab)
             if not encoding.is_special_token(i)}
    special = sorted((encoding.encode_single_token(token), token) for token in encoding.special_tokens_set)
    merges = []
    for token, i in ranks.items():
        if len(token) > 1:
            parts = merged(token, ranks, i)
            if len(parts) == 2:
                merges.append([token[:parts[0]], token[parts[0]:]])
    whole = dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None,
        added_tokens=[dict(id=i, content=token, single_word=False, lstrip=False,
                           rstrip=False, normalized=False, special=True) for i, token in special],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Split", pattern=dict(Regex=encoding._pat_str), behavior="Isolated", invert=False),
            dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)]),
        decoder=dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False),
        model=dict(type="BPE", dropout=None, unk_token=None,
                   continuing_subword_prefix=None, end_of_word_suffix=None, fuse_unk=False,
                   byte_fallback=False, ignore_merges=False, vocab=vocabulary(tok),
                   merges=[["".join(letters[b] for b in part) for part in pair] for pair in merges]))
    turn = "{{ m.role }}: {{ m.content }}" if tok.name == "gpt2" else "<|{{ m.role }}|>{{ m.content }}"
    close = ("{% if m.role == 'assistant' %}" + tok.end
             + "{% else %}{{ '\\n' }}{% endif %}" if tok.name == "gpt2" else tok.end)
    template = ("{% for m in messages %}" + turn + close + "{% endfor %}{% if add_generation_prompt %}"
                + ("{{ 'assistant: ' }}" if tok.name == "gpt2" else "<|assistant|>") + "{% endif %}")
    config = dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=tok.end,
                  clean_up_tokenization_spaces=False, chat_template=template)
    return json.dumps(whole, ensure_ascii=False) + "\n", json.dumps(config, indent=2) + "\n"
