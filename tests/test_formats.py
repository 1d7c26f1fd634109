"""data/formats.py: what the base is tuned on before it is asked to use a hint, a sibling, peers or a tool"""
import re
from collections import Counter

import pytest

import data
from data import formats
from data.documents import documents as documents_of
from train_gpt import configure

KINDS = [*formats.SHARES]
DRESSED = ["plain", "hint", "sibling", "peers"]
CORE = re.compile(r"(?:[HED](.*)\|)?(C[0-9 ]+=[0-9]+:)")


def parts(prompt):
    """-> what it is dressed in, and the prompt of countdown in it"""
    return CORE.fullmatch(prompt).groups()


def solves(prompt, text):
    """by countdown's own checker"""
    numbers, target = parts(prompt)[1][1:-1].split("=")
    problem = data.Problem(prompt, data={"numbers": list(map(int, numbers.split())), "target": int(target)})
    return data.load("countdown").reward(problem, text) == 1


def documents(kind, n=300, split="train"):
    task = data.load(f"formats:{kind}" if kind else "formats")
    return [task.document(split, 0, i) for i in range(n)]


def test_shares_add_up_and_are_kept():
    assert sum(formats.SHARES.values()) == pytest.approx(1)
    letters = Counter(prompt[0] for prompt, _ in documents("", 4000))
    for letter, kind in zip("CHEDQT", formats.SHARES):
        assert letters[letter] / 4000 == pytest.approx(formats.SHARES[kind], abs=0.03)


@pytest.mark.parametrize("kind", DRESSED)
def test_every_dressed_document_ends_in_a_solution(kind):
    assert all(solves(prompt, completion) for prompt, completion in documents(kind))


def test_a_hint_is_the_first_step_of_the_solution_and_a_sibling_is_one():
    for prompt, completion in documents("hint"):
        assert completion.startswith(parts(prompt)[0] + ",")
    for prompt, completion in documents("sibling"):
        assert solves(prompt, parts(prompt)[0])


def test_a_third_of_the_peers_are_right_and_the_others_are_well_formed():
    right = []
    for prompt, _ in documents("peers", 600):
        texts = parts(prompt)[0].split(";")
        assert len(texts) in (2, 3)
        right += [solves(prompt, text) for text in texts]
        assert all(data.load("countdown").answer(text) for text in texts)
    assert sum(right) / len(right) == pytest.approx(1 / 3, abs=0.05)


def test_half_of_the_products_are_called_for_and_most_others_are_wrong():
    called, right = [], []
    for prompt, completion in documents("tool", 800):
        a, b = map(int, prompt[1:-1].split("*"))
        said = int(completion.rpartition("#")[2])
        called.append(completion.startswith("["))
        if called[-1]:
            assert completion == f"[{a}*{b}]{a * b}#{a * b}" and formats.called(f"[{a}*{b}]") == str(a * b)
        else:
            right.append(said == a * b)
    assert sum(called) / len(called) == pytest.approx(0.5, abs=0.06)
    assert sum(right) / len(right) == pytest.approx(0.4, abs=0.08)


def test_what_is_posed_is_never_held_out():
    """A model that poses problems and learns from them must not meet a test problem on the way"""
    assert all(formats.posed(completion) for prompt, completion in documents("posed"))
    for split in ("valid", "test"):
        for problem in data.load("countdown").problems(split, 200, 0):
            assert formats.posed(problem.prompt[1:-1]) is None
    posed = formats.posed(" 3 7 12=43")
    assert posed is None or posed.prompt == "C3 7 12=43:"
    for text in ("", "3 7=21", "3 7 12", "3 7 12=143", "3 7 26=10", "0 7 12=19", "3 7 12=43:", "3 7 12=43,"):
        assert formats.posed(text) is None


@pytest.mark.parametrize("text, said", [
    ("[12*3]", "36"), ("1+[999*99]", "98901"), ("[12*3", None), ("[12+3]", None), ("[12*3]36", None),
    ("", None), ("[1234567*3]", None)])
def test_the_calculator_answers_a_call_at_the_end(text, said):
    assert formats.called(text) == said


def test_prompts_are_dressed_as_in_the_corpus():
    assert formats.hint("C3 7 12=43:", "12*3=36") == "H12*3=36|C3 7 12=43:"
    assert formats.sibling("C3 7 12=43:", "12*3=36,36+7=43") == "E12*3=36,36+7=43|C3 7 12=43:"
    assert formats.peers("C3 7 12=43:", ["a", "b"]) == "Da;b|C3 7 12=43:"


@pytest.mark.parametrize("kind", DRESSED)
def test_problem_j_asks_what_problem_j_of_countdown_asks(kind):
    for split in ("train", "test"):
        mine = data.load(f"formats:{kind}").problems(split, 60, 4)
        theirs = data.load("countdown").problems(split, 60, 4)
        assert [parts(p.prompt)[1] for p in mine] == [p.prompt for p in theirs]
        assert [p.gold for p in mine] == [p.gold for p in theirs]


@pytest.mark.parametrize("name", ["formats", *(f"formats:{kind}" for kind in KINDS if kind != "posed")])
def test_problems_are_distinct_nested_and_rewarded(name):
    task = data.load(name)
    problems = task.problems("test", 50, 3)
    assert len({p.prompt for p in problems}) == 50 and [p.id for p in problems] == list(range(50))
    assert problems[:20] == task.problems("test", 20, 3) != task.problems("test", 20, 4)
    for p in problems:
        text = f"#{p.gold}" if p.prompt[0] == "T" else p.gold
        assert task.reward(p, text) == 1 and task.answer(text) and task.reward(p, "") == 0
        assert p.prompt[0] != "T" or task.reward(p, f"[1*2]2{text}") == 1
        assert p.prompt[0] == "T" or task.reward(p, f"{text},1+1=2") == 0


def test_splits_never_meet():
    for kind in [*DRESSED, "tool"]:
        task = data.load(f"formats:{kind}")
        asked = {split: {re.sub(r"^[HED].*\|", "", p.prompt) for p in task.problems(split, 100, 0)}
                 for split in ("train", "valid", "test")}
        for split, others in ((s, set(asked) - {s}) for s in asked):
            told = {re.sub(r"^[HED].*\|", "", prompt) for prompt, _ in documents(kind, 150, split)}
            assert not any((asked[split] | told) & asked[other] for other in others)


def test_votes_are_by_value():
    task = data.load("formats")
    assert task.same(task.answer("[12*3]36#36"), task.answer("#36")) and task.answer("#x") is None
    assert task.same("12*3=36,36+7=43", "3*12=36,7+36=43") and not task.same("12*3=36", "12+3=15")


def test_bad_input():
    with pytest.raises(ValueError, match="did you mean 'peers'"):
        data.load("formats:peer")
    with pytest.raises(ValueError, match="one prompt, Q"):
        data.load("formats:posed").problems("train", 2, 0)


def test_it_is_a_corpus_that_train_gpt_takes():
    config = configure("--data formats".split())
    document, count = documents_of(config, data.tokenizer("numbers"))
    assert count is None
    tokens, trained = document("train", 5)
    assert any(trained) and not trained[0] and tokens[-1] == 0
