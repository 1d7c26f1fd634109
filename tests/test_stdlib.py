"""the corpus that every machine has: Python's own library, and the preset that reads it"""
import platform

import pytest
import torch

import data
import train_gpt
from common.optim import Optimizer
from data import stdlib
from tests.test_train import rows, weights

SMALL = "--preset tiny --eval-docs 4 --device cpu".split()


@pytest.fixture
def no_sources(tmp_path, monkeypatch):
    """a library as an embedded Python has it: byte code in a zip file, a handful of files beside it"""
    (tmp_path / "site.py").write_text("x = 1\n")
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    stdlib.library.cache_clear()
    yield tmp_path
    stdlib.library.cache_clear()


def test_every_file_is_in_one_split_and_tests_in_none(tmp_path):
    root = tmp_path / "lib"
    texts = {f"pack/m{i}.py": f"# file {i} ends here\n" for i in range(300)}
    for name in [*texts, "test/test_a.py", "pack/tests/b.py", "site-packages/torch.py", "pack/notes.txt"]:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(texts.get(name, f"LEFT OUT {name}\n"))
    found = stdlib.library(str(root))
    whole = b"".join(found.texts.values()).decode()
    assert "LEFT OUT" not in whole
    assert sorted(whole.splitlines()) == sorted(text.strip() for text in texts.values())
    train = len(found.texts["train"])
    assert min(map(len, found.texts.values())) > 0 and train > 0.7 * len(whole)
    assert platform.python_version() in found.about and "300 files" in found.about
    before = found.about
    stdlib.library.cache_clear()
    (root / "pack/m7.py").write_text("# another 7 ends here\n")
    after = stdlib.library(str(root)).about
    assert after.rpartition("sha256")[2] != before.rpartition("sha256")[2], "the hash is of what is read"


def test_a_window_is_a_function_of_its_address_and_of_its_split():
    """the same address, the same text; and no window of valid is a text of train"""
    texts = stdlib.library().texts
    seen = [stdlib.window("train", 0, i, 129) for i in range(50)]
    assert seen == [stdlib.window("train", 0, i, 129) for i in range(50)]
    assert len(set(seen)) == 50 and seen[0] != stdlib.window("train", 1, 0, 129)
    for split in ("train", "valid", "test"):
        text = stdlib.window(split, 0, 3, 129).encode()
        assert text in texts[split]
    assert texts["train"].count(stdlib.window("valid", 0, 3, 129).encode()) == 0


def test_a_character_cut_in_two_is_left_out(monkeypatch):
    """windows are cut at bytes: half a character at an end would be no text, and the model would be
    asked to predict the other half of it"""
    text = "é".encode() * 400
    monkeypatch.setattr(stdlib, "library", lambda: stdlib.Library(dict(train=text), ""))
    found = {stdlib.window("train", 0, i, 129) for i in range(20)}
    assert found == {"é" * 64}
    tok = data.tokenizer("bytes")
    config = train_gpt.configure(["--preset", "tiny"])
    tokens, trained = train_gpt.documents(config, tok)[0]("train", 0)
    assert len(tokens) == len(trained) == 128 and tok.decode(tokens) == "é" * 64
    assert trained == [False] + [True] * 127


def test_the_preset_reads_sixteen_times_128_and_has_three_blocks_of_64():
    model, document = train_gpt.scratch("tiny")
    size = sum(p.numel() for p in model.parameters())
    assert len(model.blocks) == 3 and model.config.d_model == 64 and 150_000 < size < 170_000
    docs = [document("train", i) for i in range(document.config.batch)]
    assert train_gpt.targets_of(docs) == 16 * 128
    assert "sha256" in document.about


def test_ideas_words_are_the_script_to_the_bit(tmp_path, monkeypatch):
    """a baseline made of scratch(), Optimizer and steps() has the weights of `python train_gpt.py` at
    the same settings: what an idea is compared with is the core, not a loop of its own"""
    monkeypatch.chdir(tmp_path)
    train_gpt.main([*SMALL, "--steps", "3", "--seed", "5", "--no-muon", "--lr", "3e-3",
                    "--weight-decay", "0"])
    model, document = train_gpt.scratch("tiny", 5)
    losses = [loss for _, loss in train_gpt.steps(model, document, Optimizer(model, lr=3e-3), 3)]
    theirs = weights(tmp_path / "runs/tiny/ckpt/step_3")
    ours = model.state_dict()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    assert losses == [m["loss"] for m in rows(tmp_path / "runs/tiny/metrics.jsonl")]
    assert "sha256" in (tmp_path / "runs/tiny/log.txt").read_text()


def test_a_block_of_ones_own_takes_the_place_of_every_block():
    """GPT(config, block=): an idea about blocks changes no line of the model"""
    class Identity(train_gpt.Block):
        def forward(self, x_TD, cos_T, sin_T, attend, layer):
            return x_TD

    model, _ = train_gpt.scratch("tiny")
    ours = train_gpt.GPT(model.config, block=Identity).init_weights(0, 0.7)
    tokens = torch.arange(8)
    hidden = ours(tokens, tokens, None)
    assert torch.equal(hidden, ours.norm(ours.embed(tokens)))


def test_no_sources_is_one_line(no_sources, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train_gpt.main([*SMALL, "--steps", "2"])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1, error
    assert "without its sources" in error[0] and "--data FILE" in error[0]
    assert not (tmp_path / "runs").exists()


def test_it_is_a_corpus_and_no_task():
    with pytest.raises(ValueError, match="unknown task"):
        data.load("stdlib")
    config = train_gpt.configure(["--preset", "tiny", "--row-tokens", "128"])
    with pytest.raises(ValueError, match="--seq-len"):
        train_gpt.documents(config, data.tokenizer("bytes"))
