"""Tasks: splits that cannot meet, documents that are a pure function of their number, checkers
that hostile text cannot fool or stall."""
import itertools
import json
import re
from dataclasses import asdict
from fractions import Fraction
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data
from data import mixed
from data import Problem, arith, countdown, laptop, states
from tests.work import units

TASKS = ["countdown", "countdown:search", "countdown:4", "countdown:search:4",
         "arith", "arith:5", "states", "states:8", "mixed"]


def content(prompt):
    """what a prompt asks, however it asks it: countdown's numbers have no order, and its two
    styles ask the same."""
    if prompt[0] not in "CS":
        return prompt
    numbers, target = prompt[1:-1].split("=")
    return sorted(map(int, numbers.split())).__repr__() + target


# --------------------------------------------------------------------------------------------------
# every task

@pytest.mark.parametrize("name", TASKS)
def test_splits_never_meet(name):
    """Text for pretraining that shows a test problem makes every later number a lie, and nobody notices."""
    task = data.load(name)
    asked = {split: {content(p.prompt) for seed in (0, 1) for p in task.problems(split, 80, seed)}
             for split in ("train", "valid", "test")}
    assert not asked["train"] & asked["valid"] and not asked["train"] & asked["test"]
    assert not asked["valid"] & asked["test"]
    for split in asked:
        others = set().union(*(asked[other] for other in asked if other != split))
        assert not others & {content(task.document(split, 5, i)[0]) for i in range(150)}


def test_both_styles_of_countdown_hold_out_the_same_problems():
    steps, search = data.load("countdown"), data.load("countdown:search")
    held_out = {content(p.prompt) for p in steps.problems("test", 1000, 0)}
    assert not held_out & {content(search.document("train", 0, i)[0]) for i in range(2000)}


@pytest.mark.parametrize("name", TASKS)
def test_problems_are_distinct_repeatable_and_nested(name):
    task = data.load(name)
    problems = task.problems("test", 101, 3)
    assert len(problems) == 101 and len({p.prompt for p in problems}) == 101
    assert [p.id for p in problems] == list(range(101))
    assert problems == data.load(name).problems("test", 101, 3)
    assert problems[:40] == task.problems("test", 40, 3)
    assert problems != task.problems("test", 101, 4)
    assert task.problems("test", 0, 3) == []
    for problem in problems:                          # they travel to workers and into files
        assert Problem(**json.loads(json.dumps(asdict(problem)))) == problem


@pytest.mark.parametrize("name", TASKS)
def test_document_is_a_function_of_its_number(name):
    """A resumed run, or rank 5 of 8, jumps to document i: it must be what an unbroken run would
    have read there."""
    task = data.load(name)
    documents = list(itertools.islice(task.corpus("train", 7), 50))
    again = data.load(name)
    assert [again.document("train", 7, i) for i in reversed(range(50))] == documents[::-1]
    assert len(set(documents)) > 45
    assert again.document("train", 8, 0) != documents[0] and again.document("valid", 7, 0) != documents[0]
    assert again.document("train", -1, 10**12)


@pytest.mark.parametrize("name", TASKS)
def test_documents_fit_the_small_alphabet(name):
    task, tok = data.load(name), data.tokenizer("chars")
    for i in range(200):
        prompt, completion = task.document("train", 0, i)
        text = prompt + completion
        assert tok.decode(tok.encode(text + tok.end)) == text + tok.end and tok.end not in text


@pytest.mark.parametrize("name", TASKS)
def test_the_reward_takes_every_document_that_is_right(name, monkeypatch):
    monkeypatch.setattr(arith, "SLIP", 0.0)
    monkeypatch.setattr(states, "SLIP", 0.0)
    task = data.load(name)
    for i in range(150):
        prompt, completion = task.document("train", 0, i)
        problem = asked_by(prompt)
        assert task.reward(problem, completion) == 1.0
        assert task.answer(completion) is not None
        assert prompt[0] not in "AM" or task.answer(completion) == problem.gold
    for problem in task.problems("test", 40, 0):  # and the gold, written the way the task wants answers
        text = problem.gold if problem.prompt[0] == "C" else "#" + problem.gold
        assert task.reward(problem, text) == 1.0
        assert task.same(task.answer(text), problem.gold)


def asked_by(prompt):
    """the problem that a prompt states, worked out from its text alone."""
    name = {"C": "countdown:steps:3", "S": "countdown:search:3", "A": "arith", "M": "states"}[prompt[0]]
    if prompt[0] in "CS":
        numbers, target = prompt[1:-1].split("=")
        return Problem(prompt, data={"task": name, "numbers": list(map(int, numbers.split())),
                                     "target": int(target)})
    if prompt[0] == "A":
        return Problem(prompt, str(eval(prompt[1:-1])), data={"task": name})  # our own text, never a model's
    ball, trades = prompt[1:-1].split(":")
    places = dict(zip(states.CUPS, states.CUPS))  # where each cup stands, by where it stood at first
    for a, b in trades.split():
        places = {first: {a: b, b: a}.get(now, now) for first, now in places.items()}
    return Problem(prompt, places[ball], data={"task": name})


@pytest.mark.parametrize("name", TASKS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(alphabet="0123456789+-*/=,#()<>abcde \n", max_size=60), which=st.integers(0, 3))
def test_noise_earns_nothing_and_raises_nothing(name, text, which):
    task = data.load(name)
    problem = task.problems("test", 4, 0)[which]
    reward = task.reward(problem, text)
    answer = task.answer(text)
    assert reward == 0.0 or answer is not None
    if answer is not None:
        hash(task.canon(answer))
        assert task.same(answer, answer)


@pytest.mark.parametrize("name", TASKS)
def test_hostile_text_costs_no_time(name):
    """A checker runs on whatever a model writes, a million times: 9**9**9, a megabyte of digits,
    brackets without end."""
    task = data.load(name)
    problem = task.problems("test", 1, 0)[0]
    texts = ["9" * 10**6, "#" + "9" * 10**6, "1+" * 10**5, "(" * 10**6, "#" * 10**6,
                 "1=1," * 10**5, " " * 10**6, "#" + "a" * 10**6, "-" * 10**6, "9**9**9**9=1",
                 "1/0=1,1+1=2", "#1/0=1", "(1/0)+1=2", "\u0663+\u0664=\u0667,\u0661+\u0661=\u0662",
                 "#\u0663", "\x00", "\ud800", "__import__('os')"]
    assert units(lambda: [task.reward(problem, text) for text in texts]) < 50
    assert [task.reward(problem, text) for text in texts] == [0.0] * len(texts)


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'countdown'.*arith, code, countdown.*mixed.*states"):
        data.load("countdwn")
    with pytest.raises(ValueError, match="'search'"):
        data.load("countdown:serch")
    for name in ["countdown:1", "countdown:99", "arith:x", "states:", "mixed:x",
                 "", "tokenizer", "__init__", "../data/arith"]:
        with pytest.raises(ValueError):
            data.load(name)
    with pytest.raises(ValueError, match="train, valid, test"):
        data.load("arith").problems("dev", 1, 0)


def test_a_space_that_is_used_up_says_so():
    with pytest.raises(ValueError, match="ask for fewer"):
        data.load("countdown:2").problems("test", 5000, 0)


# --------------------------------------------------------------------------------------------------
# countdown

PROBLEM = Problem("C3 7 12=43:", data={"task": "countdown:steps:3", "numbers": [3, 7, 12], "target": 43})
FOUR = Problem("", data={"numbers": [8, 3, 8, 3], "target": 24})


@pytest.mark.parametrize("text", ["12*3=36,36+7=43", "3*12=36,7+36=43",
                                  " 12*3=36,36+7=43\n", "3*12=(72/2),36+7=43"])
def test_right_steps(text):
    assert data.load("countdown").reward(PROBLEM, text) == 1.0


@pytest.mark.parametrize("text", [
    "", "12*3=36", "12*3=36,36+7=44", "12*3=37,37+7=44", "12*3=37,37+6=43",  # unfinished, or wrong on the way
    "12*3=36,36+7=43,43+0=43", "12*3=36,36+7=43,", ",12*3=36,36+7=43",              # too much
    "36+7=43", "40+3=43", "43=43", "12*3=36,37+6=43",                               # numbers from nowhere
    "12*3=36,36+7=43 ", "12*3 =36,36+7=43", "12*3=36;36+7=43",
    "12*3=36,12+31=43", "12+12=24,24+19=43", "12*3=36,36-36=0",  # a number twice, or a result
    "12*3+7=43", "12*3=36,36+7=43#", "#12*3=36,36+7=43", "1.2e1*3=36,36+7=43", "12*3=036,36+7=4_3"])
def test_wrong_steps(text):
    assert data.load("countdown").reward(PROBLEM, text) == float(text.strip() == "12*3=36,36+7=43")


def test_rationals_are_exact_and_unambiguous():
    """8/(3-8/3) is the famous way to 24 from 8 3 8 3; in floating point it is 23.999999999999996."""
    task = data.load("countdown:4")
    assert task.reward(FOUR, "8/3=(8/3),3-(8/3)=(1/3),8/(1/3)=24") == 1.0
    assert task.reward(FOUR, "8/3=(16/6),3-(8/3)=(2/6),8/(1/3)=24") == 1.0
    assert task.reward(FOUR, "8/3=8/3,3-8/3=1/3,8/1/3=24") == 0.0
    assert task.reward(FOUR, "8/3=(266666667/100000000),3-(8/3)=(1/3),8/(1/3)=24") == 0.0
    negative = Problem("", data={"numbers": [3, 7, 12], "target": 8})
    assert data.load("countdown").reward(negative, "3-7=-4,-4+12=8") == 1.0
    assert data.load("countdown").reward(negative, "3-7=-4,12--4=16") == 0.0


def test_a_number_given_twice_may_be_used_twice_and_no_more():
    twice = Problem("", data={"numbers": [5, 5, 2], "target": 20})
    task = data.load("countdown")
    assert task.reward(twice, "5+5=10,10*2=20") == 1.0
    assert task.reward(twice, "5*2=10,10+10=20") == 0.0
    assert task.reward(twice, "2*5=10,5*2=10,10+10=20") == 0.0


def test_documents_say_a_sum_in_one_order_only():
    """With 12+3 and 3+12 in the text a base learned to add late, or with one seed in five not within
    its steps: sums of three numbers came out right in 29% of the samples, where other seeds had
    48%, and RL ended at 55% instead of 69%. The checker takes both orders, as ever."""
    for name in ["countdown", "countdown:search", "arith"]:
        for i in range(200):
            text = data.load(name).document("train", 0, i)[1]
            for a, b in re.findall(r"([0-9]+)[+*]([0-9]+)=", text):
                assert int(a) >= int(b), text
    assert data.load("countdown").reward(PROBLEM, "3*12=36,7+36=43") == 1.0


def value(node):
    """an oracle that shares nothing with the checker: a nested tuple of numbers and operations,
    worked out by recursion."""
    if not isinstance(node, tuple):
        return Fraction(node)
    op, a, b = node[0], value(node[1]), value(node[2])
    return a / b if op == "/" else {"+": a + b, "-": a - b, "*": a * b}[op]


def written(x):
    return str(x) if x.denominator == 1 else f"({x.numerator}/{x.denominator})"


@settings(max_examples=150, deadline=None)
@given(numbers=st.lists(st.integers(1, 25), min_size=3, max_size=5),
       ops=st.lists(st.sampled_from("+-*/"), min_size=4, max_size=4),
       at=st.integers(0, 10**6), change=st.sampled_from("0123456789+-*/=,()"))
def test_any_right_chain_is_taken_and_any_change_to_it_refused(numbers, ops, at, change):
    node, lines = numbers[0], []
    for number, op in zip(numbers[1:], ops):
        a = value(node)
        node = (op, node, number)
        lines.append(f"{written(a)}{op}{number}={written(value(node))}")
    text, target = ",".join(lines), value(node)
    if target.denominator != 1:
        return
    problem = Problem("", data={"numbers": numbers, "target": int(target)})
    task = data.load("countdown")
    assert task.reward(problem, text) == 1.0
    at %= len(text)
    mutant = text[:at] + change + text[at + 1:]
    if task.reward(problem, mutant) == 1.0:  # then it must be another right chain: 5*1 for 5/1, and the like
        assert right_by_trying(mutant, numbers, target)


def right_by_trying(text, numbers, target):
    """reads nothing: writes every step that could be next, and looks which one the text has."""
    pool = [Fraction(x) for x in numbers]
    for line in text.split(","):
        left, _, result = line.partition("=")
        for i, j in itertools.permutations(range(len(pool)), 2):
            op = left[len(written(pool[i])):][:1]
            if (op in list("+-*/") and left == written(pool[i]) + op + written(pool[j])
                    and (op != "/" or pool[j])):
                made = value((op, pool[i], pool[j]))
                pool = [x for k, x in enumerate(pool) if k not in (i, j)] + [made]
                break
        else:
            return False
        if Fraction(result.strip("()")) != made:
            return False
    return pool == [target]


def test_search_is_answered_after_its_last_mark():
    task = data.load("countdown:search")
    assert task.reward(PROBLEM, "12-3=9(9+7=16<9*7=63>)12*3=36(36+7=43#12*3=36,36+7=43") == 1.0
    assert task.reward(PROBLEM, "#1+1=2#12*3=36,36+7=43") == 1.0
    # found, not said
    assert task.reward(PROBLEM, "12*3=36(36+7=43") == 0.0 and task.answer("12*3=36(36+7=43") is None
    assert task.reward(PROBLEM, "12*3=36(36+7=43#12*3=36,36+7=44") == 0.0
    assert task.reward(PROBLEM, "12*3=36(36+7=43#12*3=36,36+7=43#") == 0.0


@pytest.mark.parametrize("n", [3, 4])
def test_search_has_a_heavy_tail_under_a_stated_cap(n):
    """Tail batching, packing and continuous batching are all about uneven lengths: with even ones
    they show nothing."""
    task = data.load(f"countdown:search:{n}")
    lengths = sorted(len(completion) for _, completion in itertools.islice(task.corpus("train", 0), 5000))
    assert lengths[-1] >= 10 * lengths[2500]
    assert lengths[-1] <= countdown.SEARCH_CHARS * n
    assert lengths[4950] >= 5 * lengths[2500]    # a tail, not one accident


def test_search_walks_only_through_true_steps():
    task = data.load("countdown:search:4")
    for i in range(300):
        prompt, completion = task.document("train", 1, i)
        target = int(prompt[:-1].split("=")[1])
        walk, _, answer = completion.partition("#")
        misses = 0
        for step in walk.replace("(", ",").replace(")", ",").replace("<", "<,").replace(">", ">,").split(","):
            a, op, b, result = countdown.parse(step.rstrip("<>"))[0] if step else (0, "+", 0, 0)
            assert result == value((op, int(a), int(b)))
            if step.endswith(("<", ">")):
                misses += 1
                assert result < target if step[-1] == "<" else result > target
        assert (")" in walk) == (misses > 0)
        assert walk.replace("(", ",").endswith(answer)


def test_noise_is_text_that_is_true_and_misses(monkeypatch):
    monkeypatch.setattr(countdown, "NOISE", 0.5)
    task = data.load("countdown")
    right = 0
    for i in range(1000):
        prompt, completion = task.document("train", 0, i)
        numbers, target = prompt[1:-1].split("=")
        numbers = list(map(int, numbers.split()))
        steps = countdown.parse(completion)
        assert countdown.solves(steps, numbers, steps[-1][3])
        right += countdown.solves(steps, numbers, int(target))
    assert 480 < right < 620


# --------------------------------------------------------------------------------------------------
# arith, states, mixed

@pytest.mark.parametrize("name", ["arith", "arith:8", "states", "states:9"])
def test_gold_is_what_the_prompt_asks(name):
    for problem in data.load(name).problems("test", 60, 0):
        assert problem.gold == asked_by(problem.prompt).gold


def test_arith_answers():
    task = data.load("arith")
    assert task.answer("12+7=19#49") == "49" and task.answer("#1#-07") == "-07" and task.answer("49") is None
    assert task.answer("#4 9") is None and task.answer("#") is None and task.answer("#4.0") is None
    assert task.same("49", "049") and task.same("-0", "0") and not task.same("49", "94")
    problem = Problem("", gold="49")
    assert task.reward(problem, "nonsense#049") == 1.0 and task.reward(problem, "12+7=49") == 0.0


@pytest.mark.parametrize("name, module", [("arith", arith), ("states", states)])
def test_slips_are_as_frequent_as_stated_and_differ(name, module, monkeypatch):
    """The vote has something to say only where errors scatter: the same question, asked again,
    must not slip to the same answer."""
    def rewards():
        task = data.load(name)
        golds = []
        for i in range(1000):
            prompt, completion = task.document("train", 0, i)
            golds.append(completion.rpartition("#")[2])
        return golds
    slipped = rewards()
    monkeypatch.setattr(module, "SLIP", 0.0)
    exact = rewards()
    share = sum(a == b for a, b in zip(slipped, exact)) / 1000
    assert 0.4 < share < 0.8
    if name == "arith":
        misses = [int(a) - int(b) for a, b in zip(slipped, exact) if a != b]
        assert max(misses.count(m) for m in set(misses)) < 0.3 * len(misses)


def test_states_example():
    task = data.load("states:3")
    assert states.trade("c", "ad") == "c" and states.trade("c", "bc") == "b"
    assert states.trade("b", "bd") == "d"
    problem = Problem("Mc:ad bc bd:", "d")
    assert asked_by(problem.prompt).gold == "d"
    assert task.reward(problem, "cad=c,cbc=b,bbd=d#d") == 1.0
    assert task.reward(problem, "cad=c,cbc=b,bbd=d#b") == 0.0
    assert task.reward(problem, "d") == 0.0 and task.answer("cad=c,cbc=b,bbd=d") is None


def test_mixed_draws_by_its_shares_and_hands_on():
    task = data.load("mixed")
    tags = [task.document("train", 0, i)[0][0] for i in range(4000)]
    for tag, share in zip("CSAM", mixed.SHARES.values()):
        assert abs(tags.count(tag) / 4000 - share) < 0.03
    problems = task.problems("test", 10, 0)
    assert "".join(p.prompt[0] for p in problems) == "CSAMCSAMCS"
    assert task.answer("1+2=3#3") == "3" and task.answer("ab#ba") == "ba"
    assert task.answer("1+2=3,3*3=9") == "1+2=3,3*3=9"
    assert task.same("3", "03") and task.same("1+2=3,3*3=9", "2+1=3,3*3=9") and not task.same("3", "ba")


def test_the_text_of_the_laptop_record_is_right_and_always_the_plainest():
    """one solution of a problem, whatever the order of its numbers and whichever document asks;
    its sums do not slip; and what it writes out is never asked in training or at the end"""
    task, plain = data.load("laptop"), data.load("countdown")
    written = {}
    sums = 0
    for i in range(3000):
        prompt, text = task.document("train", 0, i)
        if prompt[0] == "A":
            sums += 1
            assert eval(prompt[1:-1]) == int(text.split("#")[1]), prompt
            continue
        numbers, target = prompt[1:-1].split("=")
        numbers = list(map(int, numbers.split()))
        assert countdown.solves(countdown.parse(text), numbers, int(target)), f"{prompt}{text}"
        assert written.setdefault(content(prompt), text) == text
    assert abs(sums / 3000 - laptop.MANY) < 0.03
    late = [task.document("train", 0, laptop.EARLY + i)[0][0] for i in range(2000)]
    assert abs(late.count("A") / 2000 - laptop.FEW) < 0.02
    assert laptop.plainest([1, 2, 3], 6) == "3+2=5,5+1=6"
    for split in ("train", "test"):
        assert not set(written) & {content(p.prompt) for p in plain.problems(split, 1500, 0)}


# --------------------------------------------------------------------------------------------------
# votes

def test_equal_answers_are_one_class_in_order_of_appearance():
    task = data.load("arith")
    assert data.classes(task, ["7", "8", "07", "9", "8"]) == [0, 1, 0, 2, 1]
    assert data.classes(task, []) == []


def test_nothing_is_never_a_vote():
    """Majority voting once elected the empty string: most samples had run out of room, and "no
    answer" was their common answer."""
    task = data.load("arith")
    answers = [task.answer(text) for text in ["12+3=15,15*", "12+3", "", "1#15", "#", "9"]]
    assert data.classes(task, answers) == [-1, -1, -1, 0, -1, -1]
    assert data.classes(task, [None, "", "  ", "\n"]) == [-1] * 4


def test_a_vote_is_for_a_value_not_for_a_string():
    """
    Votes counted by string, rewards given by equivalence: "1/2" and "0.5" split their vote, and a
    wrong answer with fewer friends won the label. Here their normal forms differ as well, so that
    only `same` knows.
    """
    fake = SimpleNamespace(canon=lambda a: a, same=lambda a, b: Fraction(a) == Fraction(b))
    assert data.classes(fake, ["1/2", "2", "0.5", "2", "2/4"]) == [0, 1, 0, 1, 0]


def test_the_first_match_wins_where_equality_is_not_transitive():
    near = SimpleNamespace(canon=lambda a: a, same=lambda a, b: abs(int(a) - int(b)) <= 1)
    assert data.classes(near, ["1", "3", "2", "4", "0"]) == [0, 1, 0, 1, 0]
    assert data.classes(near, ["1", "2", "3"]) == [0, 0, 1]  # 3 is near 2, but 2 does not stand for its class


def test_each_distinct_string_is_parsed_once():
    seen = []
    counting = SimpleNamespace(canon=lambda a: seen.append(a) or int(a), same=lambda a, b: False)
    assert data.classes(counting, ["1", "2", "1", "01", "2"] * 100) == [0, 1, 0, 0, 1] * 100
    assert sorted(seen) == ["01", "1", "2"]


def test_no_train_problem_is_written_out_in_a_document():
    """a base that has read the solutions of all problems of a small space recalls them: its
    reward rises in training, not held out"""
    task = data.load("countdown")
    written = {content(task.document("train", seed, i)[0]) for seed in (0, 1) for i in range(5000)}
    to_solve = {content(p.prompt) for p in task.problems("train", 5000, 0)}
    assert len(written) > 4000 and not written & to_solve
