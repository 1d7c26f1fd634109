"""
mathematics: what a text answers, when two answers are the same, and real questions, where the
folder that NANORL_DATA names has them

    # how long the votes of 512 x 64 answers take (equality: test_equality.py)
    NANORL_DATA=/data python tests/test_math.py
"""
import itertools
import json
import math
import os
import random
import subprocess
import sys
import time
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path

import pytest
from test_equality import habit, real_answers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from data import Problem, answers, gsm8k  # noqa: E402
from data.answers import canon, extract, same  # noqa: E402
from tests.work import units  # noqa: E402

REAL = os.environ.get("NANORL_DATA")
real = pytest.mark.skipif(not REAL, reason="NANORL_DATA names no folder")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """our own equality, without the library behind it"""
    monkeypatch.setattr(answers, "have_math_verify", lambda: False)


# --------------------------------------------------------------------------------------------------
# extraction

@pytest.mark.parametrize("text, answer", [
    (r"first \boxed{3}, no: \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
    (r"\boxed{\text{A}} #### 5", r"\text{A}"),                        # the order of the three is fixed
    (r"\boxed{ \sqrt{\frac{a}{b}} } and so on } {", r"\sqrt{\frac{a}{b}}"),
    (r"set \boxed{\{1, 2\}}", r"\{1, 2\}"),
    ("24+48 = 72\n#### 72\n", "72"), ("#### 1\nno\n#### 1,234", "1,234"),
    ("So the answer is 3.5. That was easy", "3.5"),
    ("The final answer is $\\frac{3}{4}$. I hope it is correct.", "$\\frac{3}{4}$"),
    ("**The answer is: 12**", "12"), ("The answer is 1. No, the answer is 2", "2"),
    (r"\boxed{7} then \boxed{8 is cut", "7"), (r"\boxed{\boxed{4}}", "4"),
    (r"\boxed{} the answer is 4", "4"), (r"\fbox{9}", "9"),
    (r"\boxed{\begin{pmatrix} 1 \\{2} \end{pmatrix}} done}", r"\begin{pmatrix} 1 \\{2} \end{pmatrix}"),
])
def test_extraction(text, answer):
    assert extract(text) == answer


@pytest.mark.parametrize("text", ["", "42", "x = 42, so we compute 17 * 3 = 51", r"\boxed{",
                                  r"\boxed{}", r"\boxed{  }", "####", "####  \n", "the answer is",
                                  "the answer is .", r"\boxed" + "{" * 5000, "answer is: ."])
def test_no_answer_is_none(text):
    """
    A text that was cut off has no box. A grader that then takes its last number lets it vote with
    whatever it was computing, and one that returns an empty string lets silence win the vote;
    both happened.
    """
    assert extract(text) is None


# --------------------------------------------------------------------------------------------------
# equality

EQUAL = [
    ("025", "25"), ("142.0", "142"), ("1/2", "0.5"), ("0.5", r"\frac12"), (r"\dfrac{1}{2}", r"\frac{2}{4}"),
    ("1,234", "1234"), (r"10,\!000", "10000"), ("14{,}916", "14916"), (r"\$18.90", "18.9"),
    (r"50\%", "50"), (r"50\%", "0.5"), (r"90^\circ", "90"), (r"10\text{ cm}", "10"),
    (r"864 \mbox{ inches}^2", "864"), ("12 cm", "12"), (r"x=5", "5"), (r"x \in [-2,7]", "[-2,7]"),
    (r"11 \frac{2}{3}", r"\frac{35}{3}"), ("1 4/5", "1.8"), (r"-1\frac{1}{2}", "-1.5"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt2}"), (r"\sqrt{8}", r"2\sqrt{2}"), (r"\sqrt{16}", "4"),
    (r"\sqrt[3]{-27}", "-3"), (r"\sqrt{6+2\sqrt5}", r"1+\sqrt{5}"), ("sqrt(3)/2", r"\frac{\sqrt3}{2}"),
    (r"\frac{\pi}{2}", "pi/2"), ("3+2i", "2i + 3"), (r"x^2+x-2", "(x+2)(x-1)"),
    (r"2 \sin 5x \cos x", r"2\sin(5x)\cos(x)"), (r"\sin^2 t", r"(\sin t)^2"),
    (r"\sin 30^\circ", "1/2"), (r"\log_2 8", "3"), (r"5!", "120"), (r"\binom{5}{2}", "10"),
    (r"2^{10}", "1024"), (r"0.\overline{3}", "1/3"), (r"0.1\overline{6}", "1/6"),
    ("0.333333", "1/3"), (r"\text{Evelyn}", "evelyn"), (r"\text{(B)}", "B"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\pi/2)"), ("1,-2", "-2, 1"), (r"\{1,2\}", "2,1"),
    (r"12\text{ and }13", "13,12"), ("(1,2)", "1,2"), (r"1 \pm \sqrt{19}", r"1-\sqrt{19}, 1+\sqrt{19}"),
    (r"(-\infty,1)\cup[3,\infty)", r"[3,\infty) \cup (-\infty, 1)"),
    (r"(-\infty,1)", "x<1"), ("[2,5)", r"2 \le x < 5"),
    (r"\begin{pmatrix} 1/2 \\ -1 \end{pmatrix}", r"\begin{bmatrix}0.5\\-1\end{bmatrix}"),
    ("5x - 7y + 4 = 0", "10x-14y+8=0"), ("y=2x+3", "2x-y+3=0"), ("52_8", "52_{8}"),
    ("5:6", r"\frac{5}{6}"), (r"\boxed{7}", "7"), (r"\mathbf{2340}", "2340"),
    (r"\displaystyle \text{May}", "may"), (r"\sqrt{x^2}", "|x|"), (r"2^{2005}", r"2\cdot 2^{2004}"),
    (r"\$\dfrac23 \approx \$0.67", "2/3"), (r"4\sqrt{2}\text{ feet}", r"\sqrt{32}"), ("−3", "-3"),
    (r"\left( 2, \frac{1}{3} \right)", "(x, y) = (2, 1/3)"), (r"(3,\pi)", r"(r, \theta) = (3, \pi)"),
    ("AB=12", "A B = 12"), ("K=8", "k = 8"), ("x=1.5", r"\frac{3}{2} = x"),
    (r"(-\infty,1)\cup(1,3)\cup(3,\infty)",
     r"\left(\left(-\infty, 1\right) \cup \left(1, 3\right)\right) \cup \left(3, \infty\right)"),
    (r"\{1\pm\sqrt{5},-2\}", r"\left\{-2, 1 - \sqrt{5}, \sqrt{5} + 1\right\}"),
    ("1, 2", r"x = 2 \text{ or } x = 1"),
]
DIFFERENT = [
    ("1/2", "1/3"), ("0.33", "1/3"), ("0.666666", "2/3"), ("-5", "5"),
    ("(1,2)", "(2,1)"), ("[1,2]", "(1,2)"), ("(1,2]", "[1,2)"), ("1,2", "1,2,3"),
    ("1,1,2", "1,2,2"), (r"\sqrt{2}", "1.41"), (r"\sqrt{x^2}", "x"), ("x+1", "x+2"), ("x+1", "y+1"),
    (r"\text{May}", r"\text{June}"), ("A", "B"), (r"\pi", "3.14"), (r"2\pi", r"\pi^2"),
    (r"(-\infty,1)", r"(1,\infty)"), (r"(-1,1)\cup[3,\infty)", r"(\infty,1)\cup[3,-1)"),
    ("x<1", "x>1"), (r"x<1", r"x \le 1"), ("2x=3", "3x=2"), ("3+2i", "3-2i"),
    (r"10^{-12}", r"2\cdot10^{-12}"), (r"2^{2005}", r"2^{2006}"), ("", "0"), ("", "5"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}"),
    ("1,800", "1,800,0"), ("100", "1,0,0"), ("(1,2)", "(x,y) = (2,1)"), ("x = 4", "4x = 16"),
    ("4", "4x = 16"), ("x=4", "x-4=0"), (r"\frac{1}{0}", "0"), (r"\frac{1}{0}", r"\frac{2}{0}"),
]


@pytest.mark.parametrize("a, b", EQUAL)
def test_equal(a, b):
    assert same(a, b) and same(b, a)


@pytest.mark.parametrize("a, b", DIFFERENT)
def test_different(a, b):
    assert not same(a, b) and not same(b, a) and canon(a) != canon(b)


def test_points_at_which_letters_are_compared_are_in_no_relation():
    """
    letters once stood for numbers at even distances (x, y, z: a, a + d, a + 2d), so that x + z
    was 2y and one plane was another. Of all small combinations of four letters that are
    neighbours in the alphabet, none may be zero, nor two be proportional.
    """
    for letters in ("xyz", "abcd", "pqr", "xyzw"):
        sums = {}
        for k in itertools.product(range(-3, 4), repeat=len(letters)):
            if next((c for c in k if c), 0) <= 0 or math.gcd(*k) != 1:
                continue
            text = "+".join(f"({c}){letter}" for c, letter in zip(k, letters)) + "=0"
            assert canon(text) not in sums, (text, sums.get(canon(text)))
            sums[canon(text)] = text
    assert not same("x + y + z = 0", "x - y + z = 0") and not same("a+c", "2b")
    assert same("x+y+z=0", "-x-y-z=0")


def test_what_was_dropped_still_tells_apart():
    """a name and a base are no part of the normal form; where both answers have one, they have to agree"""
    assert not same("x=1", "y=1") and not same("52_8", "52_9") and same("1", "y=1") and same("52", "52_9")


def test_numbers_are_rationals_and_hash_as_one():
    """"1/2" and "0.5" split the vote of a grader that votes by string and rewards by value; AIME
    says 025 and AMC says 142.0"""
    assert len({canon(text) for text in ("1/2", "0.5", ".5", r"\frac12",
                                         r"\frac{2}{4}", r"\dfrac{1}{2}", "0.50")}) == 1
    assert canon("025") == canon("25") == 25 and canon("142.0") == 142 and canon("0.1") == Fraction(1, 10)
    task = data.load("math500")
    assert data.classes(task, ["1/2", None, "0.5", "", "3", r"\frac12",
                               "0.333333", "1/3"]) == [0, -1, 0, -1, 1, 0, 2, 2]


@pytest.mark.parametrize("text", [
    "9" * 390 + "^" + "9" * 8, "2^{2^{2^{2^{2^2}}}}", "2500!!!", "9^9^9^9", "(" * 300, "{" * 399,
    r"\sqrt" * 60 + "2", r"\frac" * 80, "1/" * 190 + "0", "(" * 39 + "1" + ")" * 39 + "^{99999}",
    "__import__('os').system('echo')", "x" * 100_000, "1," * 199, r"\begin{pmatrix}" + "1&" * 150, "\\" * 399,
    "\ud800", "٣٤", "0" * 399, "-" * 399, "|" * 399, "1e999", "∞-∞", "∞/∞", "0^0", "0^{-1}", r"\log 0",
    r"\tan 90^\circ", "i^i^i^i", "²", "a_{" * 99, "(((x^{9999}+1)^{99})^{99})", r"\text{" * 50, "1.2.3.4",
    "$" * 399, "%", "\\%", ",", "()", "[]", "{}", "=", "<", "a=b=c=d", r"0.\overline{}", "." * 399,
])
def test_hostile_text_costs_milliseconds(text):
    """a model is rewarded for what it writes, so it will write this; every size is bounded before
    anything is computed"""
    def judge():
        hash(canon(text))
        for other in ("1", "x+1", r"\frac{1}{2}", text + "1"):
            same(text, other)
            same(other, text)
        extract(f"\\boxed{{{text}}} #### {text} the answer is {text}")
        assert same(text, text)

    assert units(judge) < 300


def test_long_texts_are_searched_in_linear_time():
    for unit in (r"\boxed{", "answer is ", "#### ", "{", r"\boxed{1} "):
        text = unit * (1_000_000 // len(unit))
        assert units(lambda text=text: extract(text)) < 1000


def test_math_verify_is_asked_only_about_what_is_not_understood(monkeypatch):
    asked = []
    monkeypatch.setattr(answers, "by_math_verify", lambda a, b: asked.append((a, b)) or True)
    assert not same("1/2", "1/3") and not same("x+1", "x+2") and not same("cats", "dogs") and not asked
    assert same(r"\int_0^1 x", "1/2") and asked == [(r"\int_0^1 x", "1/2")]


def test_math_verify_answers_where_it_is_installed(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(answers, "have_math_verify", lambda: True)
    # its first import on a busy machine takes more than two seconds
    monkeypatch.setattr(answers, "PATIENCE", 60)
    assert same(r"\int_0^1 x dx", "1/2") and not same(r"\int_0^1 x dx", "1/3")


# --------------------------------------------------------------------------------------------------
# tasks, on rows that are made up

@pytest.fixture
def folder(tmp_path, monkeypatch):
    """every file of every task in its own format, in the folder that NANORL_DATA names"""
    def write(name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)

    def lines(rows):
        return "\n".join(map(json.dumps, rows)) + "\n"

    write("gsm8k/train.jsonl", lines({"question": f"How many are {i} and 1?",
                                      "answer": f"{i}+1=<<{i}+1={i + 1}>>{i + 1}\n#### {i + 1:,}"}
                                     for i in range(1500)))
    write("gsm8k/test.jsonl", lines({"question": f"Test {i}?", "answer": f"#### {i}"} for i in range(20)))
    write("math/train.jsonl", lines({"problem": f"Q{i}", "solution": f"so \\boxed{{{i}}}", "answer": str(i),
        "level": 1 + i % 5} for i in range(500)))
    write("ttrl/MATH-TTT.json", json.dumps([{"prompt": f"T{i}", "answer": str(i),
                                             "source": "math", "id": str(i)} for i in range(10)]))
    write("aime/test.json", json.dumps(
        {"rows": [{"row_idx": i, "row": {"problem": f"A{i}", "answer": f"{i:03}"}} for i in range(5)]}))
    write("ttrl/AMC-TTT.json", json.dumps([{"prompt": f"B{i}", "answer": float(i)}
                                           for i in range(5)] + [{"prompt": "none", "answer": ""}]))
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


@pytest.mark.parametrize("name", ["gsm8k", "math500", "aime", "amc", "aime:ttrl", "math500:ttrl"])
def test_problems(folder, name):
    task = data.load(name)
    problems = task.problems("test", 4, 0)
    assert len(problems) == 4 and problems == data.load(name).problems("test", 4, 0)
    assert [p.id for p in problems] == [0, 1, 2, 3]
    assert task.problems("test", 3, 0) == problems[:3] and task.problems("test", 4, 1) != problems
    assert 5 <= len(task.problems("test", 1000, 0)) <= 20                # all there are
    for problem in problems:
        assert Problem(**json.loads(json.dumps(asdict(problem)))) == problem
        assert problem.data["messages"][0]["content"] + "\n\n" == problem.prompt
        assert "\\boxed{}" in problem.prompt
        assert task.reward(problem, f"it is \\boxed{{{problem.gold}}}") == 1.0
        assert task.reward(problem, problem.gold) == 0.0
        assert task.reward(problem, r"\boxed{-77}") == 0.0 and task.answer("no idea") is None


def test_splits_never_meet_and_test_is_kept_apart(folder):
    task = data.load("gsm8k")
    prompts = {split: {p.prompt for p in task.problems(split, 10_000, 0)}
               for split in ("train", "valid", "test")}
    assert not prompts["train"] & prompts["valid"] and not prompts["train"] & prompts["test"]
    assert len(prompts["train"]) + len(prompts["valid"]) == 1500 and 40 < len(prompts["valid"]) < 120
    with pytest.raises(ValueError, match="no train split.*aime:ttrl"):
        data.load("aime").problems("train", 1, 0)
    assert {p.prompt for p in data.load("aime:ttrl").problems("train", 5, 0)} == {
        p.prompt for p in data.load("aime").problems("test", 5, 0)}


def test_easy_levels_and_rows_without_an_answer_are_left_out(folder):
    task = data.load("math500")
    golds = {int(p.gold) for split in ("train", "valid") for p in task.problems(split, 1000, 0)}
    assert golds == {i for i in range(500) if i % 5 >= 2}
    # one row of the real MATH file has the answer ""
    assert len(data.load("amc").problems("test", 100, 0)) == 5


def test_worked_solutions_for_fine_tuning(folder):
    task = data.load("gsm8k")
    prompt, solution = task.document("train", 0, 3)
    assert "<<" not in solution and "####" not in solution and task.answer(solution)
    assert task.reward(next(p for p in task.problems("train", 2000, 0) if p.prompt == prompt),
                       solution) == 1.0
    n = len(task.all("train"))
    first, second = ([task.document("train", 0, i)[0] for i in range(k * n, (k + 1) * n)] for k in (0, 1))
    assert sorted(first) == sorted(second) and first != second and len(set(first)) == n
    assert data.load("gsm8k").document("train", 0, n + 5) == task.document("train", 0, n + 5)


def test_lines_end_where_json_says(folder):
    """str.splitlines also cuts at U+2028, U+0085 and others, which JSON leaves as they are inside
    a row: a sound file was called damaged"""
    rows = [{"question": f"a\u2028b\x85c\x0b {i}", "answer": f"#### {i}"} for i in range(3)]
    (folder / "gsm8k/test.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False)
                                                         for row in rows), encoding="utf-8")
    assert {p.gold for p in data.load("gsm8k").problems("test", 9, 0)} == {"0", "1", "2"}
    (folder / "gsm8k/test.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(ValueError, match="test.jsonl is not UTF-8"):
        data.load("gsm8k").problems("test", 9, 0)


def test_files_at_hand_are_not_glued_to_a_download_that_was_cut(folder, tmp_path, monkeypatch):
    """the start of one file and the end of another pass for a whole one where the rows' ends
    happen to meet"""
    monkeypatch.setenv("NANORL_DATA", "")
    part = tmp_path / "cache/nanorl/gsm8k/test.jsonl.part"
    part.parent.mkdir(parents=True)
    whole = (folder / "gsm8k/test.jsonl").read_bytes()
    part.write_bytes(whole[:whole.index(b"\n") + 1].replace(b"Test", b"Else"))
    gsm8k.main("gsm8k", gsm8k.SOURCES, gsm8k.load, ["--from", str(folder / "gsm8k/test.jsonl")])
    assert part.with_suffix("").read_bytes() == whole and not part.exists()


def test_missing_files_name_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("NANORL_DATA", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("gsm8k", "math500", "aime", "amc"):
        with pytest.raises(FileNotFoundError, match=f"run python -m data.{name}") as error:
            data.load(name).problems("test", 1, 0)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no variant"):
        data.load("gsm8k:easy")


def test_command_line(folder, tmp_path):
    def run(*words):
        env = {**os.environ, "NANORL_DATA": "", "XDG_CACHE_HOME": str(tmp_path / "home")}
        return subprocess.run([sys.executable, "-m", *words], capture_output=True,
                              text=True, env=env, cwd=ROOT)
    done = run("data.gsm8k", "--from", str(folder / "gsm8k/train.jsonl"), str(folder / "gsm8k/test.jsonl"))
    assert done.returncode == 0 and "test: 20 questions" in done.stdout, done.stderr
    kept = (tmp_path / "home/nanorl/gsm8k/test.jsonl").read_text()
    for words in (["--from", "/nowhere.jsonl"], ["--from", str(folder / "aime/test.json")], ["--form", "x"]):
        done = run("data.gsm8k", *words)
        assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert (tmp_path / "home/nanorl/gsm8k/test.jsonl").read_text() == kept


# --------------------------------------------------------------------------------------------------
# real questions

@real
def test_every_real_gold_answer_earns_its_reward():
    for name, count in (("gsm8k", 1319), ("math500", 500), ("aime", 30), ("amc", 83)):
        task = data.load(name)
        problems = task.problems("test", 10_000, 0)
        assert len(problems) == count
        for problem in problems:
            assert task.reward(problem, f"So \\[ \\boxed{{{problem.gold}}} \\]") == 1.0, problem.gold
    for name in ("gsm8k", "math500"):
        task = data.load(name)
        by_prompt = {p.prompt: p for p in task.problems("train", 10_000, 0)}
        for i in range(300):
            prompt, solution = task.document("train", 0, i)
            assert task.reward(by_prompt[prompt], solution) == 1.0


@real
def test_no_real_test_question_is_in_train():
    for name in ("gsm8k", "math500"):
        task = data.load(name)
        asked = [{" ".join(question.split()) for question, _, _ in task.all(split)}
                 for split in ("train", "valid", "test")]
        assert not asked[2] & (asked[0] | asked[1])
        assert len(asked[0]) + len(asked[1]) > 7000


@real
def test_real_answers_are_understood():
    _, distinct = real_answers(REAL)
    raw = [answer for answer in distinct if answers.read(answer).kind == "raw"]
    assert len(raw) < 0.002 * len(distinct), raw


def votes(rows, distinct, seed=0, groups=512, n=64):
    """groups of answers as a model gives them: about six different ones, a few of them the same
    in another spelling"""
    rng = random.Random(seed)
    table = []
    for _ in range(groups):
        pool = [rng.choice(distinct if rng.random() < 0.4 else rows) for _ in range(5)]
        spelled = habit(pool[0], rng) or pool[0]
        table.append(rng.choices([*pool, spelled], [32, 12, 6, 3, 3, 8], k=n))
    return table


@real
def test_votes_of_512_groups_are_counted_in_time():
    """150 ms on one quiet core, some 25 units. What costs is parsing: once per distinct string"""
    task, table = data.load("math500"), votes(*real_answers(REAL))
    classes = []

    def count():
        answers.read.cache_clear()
        classes[:] = [data.classes(task, group) for group in table]

    assert min(units(count) for _ in range(3)) < 100 and sum(len(set(group)) for group in table) / 512 > 5
    assert all(len(set(c)) <= len(set(group)) for c, group in zip(classes, table))


if __name__ == "__main__":
    task, table, times = data.load("math500"), votes(*real_answers(REAL)), []
    for _ in range(7):
        answers.read.cache_clear()
        clock = time.process_time()
        for group in table:
            data.classes(task, group)
        times.append(time.process_time() - clock)
    print(f"votes of 512 x 64: {sorted(times)[3] * 1000:.0f} ms (median of 7)")
