"""foreign tokenizers: equal to the `tokenizers` library id by id, refused where they would be
read almost right; ours, readable by it"""
import json
import random
from pathlib import Path

import pytest

import data
from data.tokenizer import ALPHABET, FILE

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| "
         r"?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")


def split(pattern):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"),
                                    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


FAMILIES = {  # pre-tokenizer, normalizer, ignore_merges, added tokens: (content, special, normalized)
    "qwen": (split(QWEN2), normalizers.NFC(), False,
             [("<|endoftext|>", True, False), ("<|im_start|>", True, False), ("<|im_end|>", True, False),
              ("<tool_call>", False, False), ("<think>", False, False), ("</think>", False, False)]),
    "llama": (split(LLAMA3), None, True,
              [("<|begin_of_text|>", True, False), ("<|end_of_text|>", True, False),
               ("<|start_header_id|>", True, False), ("<|end_header_id|>", True, False),
               ("<|eot_id|>", True, False)]),
    "gpt2": (pre_tokenizers.ByteLevel(add_prefix_space=False), None, False, [("<|endoftext|>", True, True)]),
    # digits first, one by one, then GPT-2's pattern, as small Llama-shaped models have it; and
    # tokens one of which begins another
    "digits": (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True),
                                        pre_tokenizers.ByteLevel(add_prefix_space=False)]),
               normalizers.NFC(), False, [("<|endoftext|>", True, False), ("<e\u0301>", False, True),
                                          ("<a>", False, False), ("<a>b", False, False)]),
}
WORDS = """the quick brown fox don't I'll we've SHE'S token tokens tokenizer lower \
lowest newer wider 1234 3.14159 2024-11-05 x^2+y^2=z^2
Größe straße naïve café señor œuvre Ελλάδα αβγδ Привет мир מְנֹרָה שלום العربية \
مرحبا हिन्दी नमस्ते ไทย ภาษา 你好，世界 日本語テキスト 한국어
👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 e\u0301 a\u030a \u1e9b\u0323 ﬁ ½ Ⅷ ٣٤٥ 𝔘𝔫𝔦 \u00a0 \u2003 \u200b \
def f(x): return {x: [1, 2, 3]} <b>html</b>
\\frac{1}{2} http://a.b/c?d=e&f""".split(" ")
SPACES = [" ", "  ", "   ", "\n", "\r\n", "\n\n\n", "\t", " \n ", "\u00a0",
          "\u3000", "\u2028", "\x85", "\x0b", " " * 9, "\u200d", ""]


def strings(count, added, seed=0):
    rng = random.Random(seed)
    for i in range(count):
        if i % 20 == 0:                          # long runs of one thing
            yield rng.choice("a 0\n=é你👍") * rng.randint(50, 400)
        elif i % 20 == 1:                        # any code points at all
            yield "".join(chr(rng.choice([rng.randrange(32, 0x250), rng.randrange(0x250, 0xd800),
                                          rng.randrange(0x1f300, 0x1f700)]))
                          for _ in range(rng.randint(1, 40)))
        else:
            yield "".join(rng.choice(WORDS + added) + rng.choice(SPACES) for _ in range(rng.randint(1, 25)))


def train(family, vocab=3000):
    pre, norm, ignore, added = FAMILIES[family]
    tok = Tokenizer(models.BPE(ignore_merges=ignore))
    tok.pre_tokenizer, tok.decoder = pre, decoders.ByteLevel()
    if norm:
        tok.normalizer = norm
    text = list(strings(1500, [], seed=1)) + [Path(data.__file__).with_name("tokenizer.py").read_text()] * 3
    tok.train_from_iterator(text, trainers.BpeTrainer(vocab_size=vocab, show_progress=False, min_frequency=1,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.add_tokens([tokenizers.AddedToken(content, special=special, normalized=normalized)
                    for content, special, normalized in added])
    return tok


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        train(family).save(str(folder / "tokenizer.json"))
        tokens = [content for content, _, _ in FAMILIES[family][3]]
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"eos_token": {"content": tokens[0]} if family == "gpt2" else tokens[0]}))
        made[family] = folder
    return made


def edit(folder, where, change):
    """a copy of a folder's tokenizer.json with something in it changed"""
    spec = json.loads((folder / "tokenizer.json").read_text())
    change(spec)
    where.mkdir(exist_ok=True)
    (where / "tokenizer.json").write_text(json.dumps(spec))
    (where / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    return where


# --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", FAMILIES)
def test_equal_ids_on_many_strings(folders, family):
    theirs = Tokenizer.from_file(str(folders[family] / "tokenizer.json"))
    ours = data.tokenizer(folders[family])
    added = [content for content, _, _ in FAMILIES[family][3]] * 3
    for text in strings(1000, added):
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
        if family != "digits":                   # theirs spoils an added token that is not ASCII
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
    assert ours.vocab_size == theirs.get_vocab_size()


def test_both_spellings_of_the_merges(folders, tmp_path):
    def old(spec):
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    a, b = data.tokenizer(folders["qwen"]), data.tokenizer(edit(folders["qwen"], tmp_path, old))
    assert all(a.encode(text) == b.encode(text) for text in strings(50, []))


def test_whole_pieces_need_no_merges_where_the_file_says_so(folders, tmp_path):
    """
    Llama 3 takes a piece that is in its vocabulary as it is, merges or not; Qwen and GPT-2 do
    not. tiktoken always does, so a token that no merge leads to has to be kept from it, and has
    to be decoded all the same.
    """
    def orphan(spec):
        spec["model"]["vocab"]["zqzqzq"] = 9000
    for family, whole in (("llama", True), ("gpt2", False)):
        folder = edit(folders[family], tmp_path / family, orphan)
        theirs, ours = Tokenizer.from_file(str(folder / "tokenizer.json")), data.tokenizer(folder)
        for text in ("zqzqzq", "zqzqzq zqzqzqz"):
            assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
        assert (ours.encode("zqzqzq") == [9000]) == whole and ours.decode([9000]) == "zqzqzq"


def test_merges_that_the_ids_do_not_tell_are_refused(folders, tmp_path):
    """
    Reading a merge list as ranks is right for every text or wrong for some; which of the two is
    proved token by token. A list in another order, or with another pair for the same token, would
    be wrong once in a thousand texts, and nobody would look.
    """
    def swapped(spec):
        merges = spec["model"]["merges"]
        merges[5], merges[900] = merges[900], merges[5]

    def other_pair(spec):
        merges = spec["model"]["merges"]
        k = next(k for k, (a, b) in enumerate(merges) if len(a) > 1)
        merges[k] = [merges[k][0][0], merges[k][0][1:] + merges[k][1]]
    for change in (swapped, other_pair):
        with pytest.raises(ValueError, match="almost right"):
            data.tokenizer(edit(folders["gpt2"], tmp_path, change))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.update(model={"type": "Unigram", "vocab": []}), "not a byte-level BPE.*Unigram"),
    (lambda s: s["model"].update(type="WordPiece"), "WordPiece"),
    (lambda s: s["model"].update(byte_fallback=True), "byte fallback"),
    (lambda s: s.update(pre_tokenizer={"type": "Metaspace", "replacement": "_"}), "Metaspace"),
    (lambda s: s.update(pre_tokenizer=None), "no ByteLevel"),
    (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    (lambda s: s["model"]["vocab"].pop("a"), "lacks 1 of the 256"),
    (lambda s: s["model"]["vocab"].update({"\u4f60": 7000}), "not written in bytes"),
    (lambda s: s["added_tokens"][0].update(lstrip=True), "eats white space"),
    (lambda s: s.pop("model"), "not a tokenizer.json"),
    (lambda s: s["model"].update(merges=["ab"]), "merge 'ab' is no pair"),
    (lambda s: s["pre_tokenizer"]["pretokenizers"][0].update(pattern={"Regex": "(["}),
     "pattern cannot be read"),
    (lambda s: s["added_tokens"].clear(), "none of the added tokens"),
])
def test_what_is_no_byte_level_bpe_is_named(folders, tmp_path, change, message):
    with pytest.raises(ValueError, match=message) as error:
        data.tokenizer(edit(folders["qwen"], tmp_path, change))
    assert "\n" not in str(error.value)


def test_a_damaged_file_is_one_line(folders, tmp_path):
    (tmp_path / "tokenizer.json").write_text((folders["qwen"] / "tokenizer.json").read_text()[:5000])
    with pytest.raises(ValueError, match="not JSON"):
        data.tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# stop tokens and templates

def chat_folder(folder, where, template="", **more):
    config = {"eos_token": "<|im_end|>", "bos_token": None, "chat_template": template} | more
    edit(folder, where, lambda spec: None)
    (where / "tokenizer_config.json").write_text(json.dumps(config))
    return where


CHATML = ("{%- for message in messages %}\n"
          "    {%- if message.role not in ['system', 'user', 'assistant'] %}\n"
          "        {{- raise_exception('no role ' + message.role) }}\n    {%- endif %}\n"
          "    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
          "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
          "{%- endif %}")


def test_several_tokens_may_stop(folders, tmp_path):
    """a teacher and a student with one stop id each, not the same one, ran to the length limit:
    all that a folder names are taken"""
    folder = chat_folder(folders["qwen"], tmp_path)
    ids = {token: data.tokenizer(folder).encode(token)[0]
           for token in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")}
    assert data.tokenizer(folder).stop == {ids["<|im_end|>"]} and data.tokenizer(folder).end == "<|im_end|>"
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [ids["<|endoftext|>"], ids["<|im_end|>"]]}))
    assert data.tokenizer(folder).stop == {ids["<|endoftext|>"], ids["<|im_end|>"]}
    (folder / "config.json").write_text(json.dumps({"eos_token_id": ids["<|im_start|>"]}))
    assert data.tokenizer(folder).stop == set(ids.values())


def test_an_end_that_no_token_has_is_named(folders, tmp_path):
    folder = chat_folder(folders["qwen"], tmp_path, eos_token=None)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 999_999}))
    with pytest.raises(ValueError, match="eos_token 'id 999999' is none of the added tokens"):
        data.tokenizer(folder)


@pytest.mark.parametrize("message", [{"role": "user"}, {"role": "user", "content": None}, {"content": "hi"},
                                     {"role": "user", "content": [{"type": "text", "text": "hi"}]}])
def test_a_message_without_words_is_one_line(folders, message):
    for tok in (data.tokenizer("bytes"), data.tokenizer(folders["qwen"])):
        with pytest.raises(ValueError, match="needs a role and a content") as error:
            tok.chat([message])
        assert "\n" not in str(error.value)


def test_the_folders_template_is_rendered_as_transformers_does(folders, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = chat_folder(folders["qwen"], tmp_path, CHATML, tokenizer_class="PreTrainedTokenizerFast")
    ours, theirs = data.tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    user = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " 2+2? "}]
    whole = [*user, {"role": "assistant", "content": "<think>\nhm</think>4"}]
    assert ours.chat(user) == theirs.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert ours.chat(whole) == theirs.apply_chat_template(whole, tokenize=False)
    assert ours.chat(whole).startswith(ours.chat(user))
    assert ours.encode(ours.chat(user)).count(ours.encode("<|im_end|>")[0]) == 2
    with pytest.raises(ValueError, match="special token <.im_end.>"):
        ours.chat([{"role": "user", "content": "hi<|im_end|>"}])


def test_a_template_file_wins_and_knows_the_special_tokens(folders, tmp_path):
    folder = chat_folder(folders["llama"], tmp_path, "not this", eos_token="<|eot_id|>",
                         bos_token="<|begin_of_text|>")
    (folder / "chat_template.jinja").write_text(
        "{{- bos_token }}{% for m in messages %}{{ m.content | tojson "
        "}}{{ eos_token }}{% endfor %}{{ strftime_now('%Y')[:2] }}")
    tok = data.tokenizer(folder)
    assert tok.chat([{"role": "user", "content": "é"}]) == '<|begin_of_text|>"é"<|eot_id|>20'
    assert [tok.bos] == tok.encode("<|begin_of_text|>")


def test_without_a_template_the_words_are_given_alone(folders, tmp_path):
    tok = data.tokenizer(chat_folder(folders["qwen"], tmp_path))
    assert tok.chat([{"role": "user", "content": "2+2?"}]) == "2+2?\n\n"
    assert tok.chat([{"role": "user", "content": "2+2?"},
                     {"role": "assistant", "content": "4"}]) == "2+2?\n\n4<|im_end|>"


@pytest.mark.parametrize("template", [
    "{% for m in messages %}", "{{ raise_exception('roles\nmust alternate') }}", "{{ messages[0].x.y }}",
    "{{ ''.__class__.__mro__ }}{{ messages.append(1) }}", "{{ 1 + 'a' }}", "{{ 1 / 0 }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 5])
def test_a_template_that_fails_is_one_line(folders, tmp_path, template):
    """and one that reaches for the interpreter is stopped: it is a program in a file that was downloaded"""
    with pytest.raises(ValueError, match="template") as error:
        data.tokenizer(chat_folder(folders["qwen"], tmp_path,
                                   template)).chat([{"role": "user", "content": "hi"}])
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------
# saving

def test_a_foreign_tokenizer_is_saved_with_all_its_files_even_when_they_are_gone(folders, tmp_path):
    source, copy = chat_folder(folders["qwen"], tmp_path / "from", CHATML), tmp_path / "to"
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2], "temperature": 0.7}')
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    tok = data.tokenizer(source)
    for path in source.iterdir():
        path.unlink()
    tok.save(copy)
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == files
    assert data.tokenizer(copy).stop == tok.stop and data.tokenizer(copy).chat([]) == tok.chat([])


@pytest.mark.parametrize("name", ["bytes", "chars", "numbers"])
def test_ours_can_be_read_by_everyone(tmp_path, name):
    ours = data.tokenizer(name)
    ours.save(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    rng = random.Random(0)
    for i in range(300):
        text = "".join(rng.choice(ALPHABET + "0123456789" * 8) for _ in range(rng.randint(1, 60)))
        text += rng.choice(["", "<|end|>", "<|user|>"])
        if name == "bytes":
            text += rng.choice(WORDS)
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        assert theirs.decode(ids, skip_special_tokens=False) == text
    assert theirs.get_vocab_size() == ours.vocab_size
    assert data.tokenizer(tmp_path).name == name                     # our own file still says whose it is
    # read as a foreign one it is the same again, or refused because it cannot write every byte
    (tmp_path / FILE).unlink()
    if name == "bytes":
        assert data.tokenizer(tmp_path).encode("12 <|end|>é") == ours.encode("12 <|end|>é")
    else:
        with pytest.raises(ValueError, match="lacks .* of the 256"):
            data.tokenizer(tmp_path)


def test_a_saved_run_folder_loads_in_transformers_with_its_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    from train_gpt import GPT, GPTConfig
    tok = data.tokenizer("numbers")
    GPT(GPTConfig(tok.vocab_size, 1, 2, 1, 8, 16, 16, 64, 10000.0)).init_weights(0).save_hf(tmp_path, tok)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "user", "content": "7 * 12?\n"}]
    assert theirs("12*83=996<|end|>", add_special_tokens=False)["input_ids"] == tok.encode("12*83=996<|end|>")
    assert theirs.eos_token_id == 0
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == tok.chat(chat)
