"""the task of keys, values and a question, and the preset that learns it"""
import pytest

import data
import train_gpt
from data import recall
from data.documents import documents


def test_the_answer_stands_behind_the_key():
    task = data.load("recall")
    for problem in task.problems("test", 40, 0):
        text, key = problem.prompt[:-2], problem.prompt[-1]
        assert problem.prompt[-2] == "?" and text.count(key) == 1
        assert problem.gold == text[text.index(key) + 1]
        assert 64 <= len(text) <= 512
        assert sorted(c for c in text if c in recall.KEYS) == sorted(recall.KEYS), "each key once"
        assert task.reward(problem, problem.gold) == task.reward(problem, problem.gold + "?A") == 1.0
        wrong = recall.VALUES[recall.VALUES.index(problem.gold) - 1]
        assert task.reward(problem, wrong) == task.reward(problem, "") == task.reward(problem, "A") == 0.0
        assert task.answer("A") is None and task.answer(problem.gold) == problem.gold


def test_64_symbols_and_all_of_them_have_a_token():
    symbols = recall.KEYS + recall.VALUES + "?"
    assert len(set(symbols)) == 64
    assert len(data.tokenizer("chars").encode(symbols)) == 64


def test_training_documents_begin_short_and_grow():
    """on long texts from the start nothing was learned in 200 steps; short ones are learned in 100"""
    task = data.load("recall")
    sizes = [len(task.document("train", 0, i)[0]) - 2 for i in (0, 1, recall.RAMP // 2, recall.RAMP * 3 // 4)]
    assert max(sizes[:2]) <= recall.FIRST < sizes[2] < sizes[3] < recall.LONGEST
    late = [len(task.document("train", 0, recall.RAMP + i)[0]) - 2 for i in range(60)]
    assert min(late) < 120 and max(late) > 450
    held_out = [len(task.document("valid", 0, i)[0]) - 2 for i in range(60)]
    assert min(held_out) >= 64 and max(held_out) > 450


def test_only_answers_are_trained_and_the_end():
    config = train_gpt.configure(["--preset", "recall"])
    document, count = documents(config, data.tokenizer("chars"))
    tokens, trained = document("valid", 0)
    tok = document.tok
    turns = data.load("recall").document("valid", config.seed, 0)
    assert count is None and tok.decode(tokens) == "".join(turns) + tok.end
    assert tok.decode([t for t, on in zip(tokens, trained) if on]) == "".join(turns[1::2]) + tok.end
    assert len(turns) == 2 * recall.QUESTIONS


def test_a_length_of_ones_own():
    task = data.load("recall:96")
    assert task.name == "recall:96"
    assert {len(p.prompt) for p in task.problems("test", 20, 0)} == {98}
    with pytest.raises(ValueError, match="no variant 'x'"):
        data.load("recall:x")
    with pytest.raises(ValueError, match="no variant '3'"):
        data.load("recall:3")


def test_splits_share_no_text():
    task = data.load("recall")
    train = {task.document("train", 0, recall.RAMP + i)[0][:-2] for i in range(100)}
    test = {p.prompt[:-2] for p in task.problems("test", 100, 0)}
    assert not train & test
