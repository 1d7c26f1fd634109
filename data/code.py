r'''
Code as an answer: a function is asked for, and its tests say whether it is right. Files have the layout of
HumanEval or of MBPP.

    code                 a dozen tiny problems of our own, written out below; all of them in every split
    code:NAME            your file, once --from has checked it; one row in 14 is valid, one in 14 is test
    code:NAME:all        the same, and all rows in every split: for a file that is a benchmark

    python -m data.code --from HumanEval.jsonl.gz    # makes code:humaneval of rows that pass their own tests
    python -m data.code                              # what a problem looks like, how fast they are checked

A row of HumanEval has prompt (imports, a signature, a docstring), entry_point, canonical_solution (the body)
and test (a program that defines check(candidate)). A row of MBPP has text or prompt, code, test_list, and
test_setup_code or test_imports or neither.

Where the program is in a model's text:
    1. HumanEval, and the first line that is not blank is indented: the text continues the prompt, up to its
       first line that is not indented. A base model writes on and on; that is where it is cut.
    2. Else a fenced block: the last one that defines a function that the tests call, or the last one if none
       does. A block that never ends goes to the end of the text.
    3. Else the text as it is.
A program of 2 and 3 is run after the prompt of HumanEval, or the set-up of MBPP, whose imports and helpers it
may use.

The reward is 1 if all tests pass, else 0. Nothing is run here: common/sandbox.py holds the program and its
tests. Only literals cross from one to the other, so --from leaves out rows whose tests need other objects.

Left out of the usual recipe: a share of the tests as a reward (it pays for special cases), and pass@k by a
formula (evaluate.py counts it).
'''
import ast
import gzip
import json
import os
import re
import time
from pathlib import Path
from random import Random

from common.sandbox import Sandbox
from data import Problem, endless, split_of
from data.download import command
from data.questions import pick, roots, rows

SANDBOX = Sandbox()                  # its worker starts with the first reward
FENCE = re.compile(r"^[ \t]*```[^`\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.M | re.S)
INDENTED = re.compile(r"(?:[ \t]*\n)*[ \t]+[^\s`]")             # the first line is indented, and no fence


def task(name="", *words):
    if not name:
        return Code("code", TINY, "data/code.py", open_to_all=True)
    for word in words:
        if word != "all":
            raise ValueError(f"task 'code:{name}' has no variant {word!r}; known variants: all")
    path = find(name)
    return Code(":".join(["code", name, *words]), rows(path, "task_id"), path, open_to_all="all" in words)


def find(name):
    """the file that --from made of NAME.jsonl"""
    for root in roots():
        if (root / "code" / f"{name}.jsonl").is_file():
            return root / "code" / f"{name}.jsonl"
    folders = " or ".join(str(root / "code") for root in roots())
    make = "run python -m data.code --from FILE, with a HumanEval or MBPP file of that name"
    raise FileNotFoundError(f"no {name}.jsonl in {folders}: {make}")


class Code:
    def __init__(self, name, rows, path, open_to_all):
        self.name = name
        self.open = open_to_all
        self.rows = [problem(row, i, name, path) for i, row in enumerate(rows)]

    def part(self, split):
        if split not in ("train", "valid", "test"):
            raise ValueError(f"unknown split {split!r}: one of train, valid, test")
        if self.open:
            return list(self.rows)
        found = [p for p in self.rows if split_of(f"code {p.prompt}") == split]
        return found or self.rows[-1:]         # too few rows for the hash: the last one stands in

    def problems(self, split, n, seed):
        found = self.part(split)
        Random(seed).shuffle(found)
        return found[:n]

    def document(self, split, seed, i):
        """the i-th (prompt, solution). Every epoch has an order of its own."""
        found = self.part(split)
        Random(f"{split} {seed} {i // len(found)}").shuffle(found)
        chosen = found[i % len(found)]
        return chosen.prompt, chosen.gold

    def corpus(self, split, seed):
        return endless(self.document, split, seed)

    def reward(self, problem, text):
        return float(judge(problem, text).passed)


def judge(problem, text):
    """Verdict(passed, why): the reward, and a word for a person"""
    asked = problem.data
    return SANDBOX.run(program(problem, text), asked["tests"], asked["names"], asked["setup"])


# --------------------------------------------------------------------------------------------------
# rows

def problem(row, i, task, path):
    try:
        if "entry_point" in row:
            return humaneval(row, i, task)
        return mbpp(row, i, task)
    except (KeyError, TypeError, AttributeError, SyntaxError) as error:
        where = f"{path}, row {i + 1} (task {row['task_id']})"
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{where} is in neither HumanEval's nor MBPP's layout ({what})") from None


def humaneval(row, i, task):
    prompt = row["prompt"]
    name = row["entry_point"]
    request = "Complete this program. Answer with all of it in one fenced block."
    chat = f"{request}\n\n```python\n{prompt.rstrip()}\n```"
    facts = {
        "task": task,
        "continues": True,                     # an indented text is the rest of the prompt
        "setup": closed(prompt),
        "tests": f"{row['test']}\n\ncheck({name})\n",
        "names": [name],
        "messages": [{"role": "user", "content": chat}],
    }
    return Problem(prompt, row["canonical_solution"], i, facts)


def mbpp(row, i, task):
    tests = "\n".join(row["test_list"]).replace("\r\n", "\n")
    code = row["code"].replace("\r\n", "\n")
    setup = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    request = "Answer with all of your code in one fenced block."
    text = f"{pick(row, 'text', 'prompt').strip()}\nYour code should pass these tests:\n\n{tests}"
    defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    named = {node.id for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Name)}
    if not defined & named:
        raise TypeError("no test calls a function of its code")
    facts = {
        "task": task,
        "continues": False,
        "setup": setup.replace("\r\n", "\n"),
        "tests": tests,
        "names": sorted(defined & named),
        "messages": [{"role": "user", "content": f"{text}\n\n{request}"}],
    }
    return Problem(f"{text}\n\n", code, i, facts)


def closed(prompt):
    """a prompt as a whole program: a signature that has no docstring gets a body"""
    try:
        compile(prompt, "prompt", "exec")
        return prompt
    except SyntaxError:
        return f"{prompt.rstrip()}\n    pass\n"


# --------------------------------------------------------------------------------------------------
# the program in a model's text: the rule is at the top of this file

def program(problem, text):
    asked = problem.data
    text = text.replace("\r\n", "\n")
    if not (asked["continues"] and INDENTED.match(text)):
        text = fenced(text, asked["names"])
    if asked["continues"] and INDENTED.match(text):    # a block, too, may hold the body alone
        return f"{problem.prompt.rstrip()}\n{indented_part(text)}"
    return f"{asked['setup']}\n\n{text}"


def fenced(text, names):
    blocks = FENCE.findall(text)
    calls = "|".join(map(re.escape, names))
    defining = [block for block in blocks if re.search(rf"^\s*def\s+(?:{calls})\b", block, re.M)]
    return (defining or blocks or [text])[-1]


def indented_part(text):
    kept = []
    for line in text.split("\n"):
        if line.strip() and line[0] not in " \t":
            break
        kept.append(line)
    return "\n".join(kept) + "\n"


# --------------------------------------------------------------------------------------------------
# files

def take(file):
    """checks a file, and keeps the rows whose own solution passes where code:NAME finds them -> NAME"""
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"--from {file}: no such file")
    name = file.name.split(".")[0].lower()
    path = roots()[-1] / "code" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        data = file.read_bytes()
        part.write_bytes(gzip.decompress(data) if file.suffix == ".gz" else data)
        found = rows(part, "task_id")
        good = [row for i, row in enumerate(found) if passes(row, i, file)]
        if not good:
            raise ValueError(f"--from {file}: no row whose own solution passes its tests")
        part.write_text("".join(json.dumps(row) + "\n" for row in good))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    print(f"{path}: {len(good):,} of {len(found):,} rows")
    return name


def passes(row, i, file):
    """does a row's own solution pass? What does not is named"""
    try:
        asked = problem(row, i, "code", file)
    except ValueError as error:
        print(f"left out: {error}")
        return False
    verdict = judge(asked, asked.gold)
    if not verdict.passed:
        print(f"left out: task {row['task_id']}: its own solution: {verdict.why}")
    return verdict.passed


def speed(made, seconds=3.0):
    """checks solutions until the time is over -> (per second, per second of CPU time)"""
    SANDBOX.close()                            # the CPU time of a worker is known when it has ended
    done = 0
    start = time.perf_counter()
    used = sum(os.times()[:4])
    while time.perf_counter() - start < seconds:
        asked = made.rows[done % len(made.rows)]
        assert made.reward(asked, asked.gold) == 1.0, f"task {asked.id}: its own solution does not pass"
        done += 1
    SANDBOX.close()
    return done / (time.perf_counter() - start), done / (sum(os.times()[:4]) - used)


def main(argv):
    if argv and (argv[0] != "--from" or len(argv) != 2):
        raise ValueError("usage: python -m data.code [--from FILE]")
    made = task(take(argv[1]), "all") if argv else task()
    for shown in made.problems("test", 2, 0):
        print(f"\n{shown.prompt}\n-> {shown.gold}")
    per_second, per_core = speed(made)
    rates = f"{per_second:.0f} solutions checked per second, {per_core:.0f} per second of CPU time"
    print(f"{made.name}: {len(made.rows):,} problems; {rates}")


# --------------------------------------------------------------------------------------------------
# a dozen of our own, six in each layout

def ask_humaneval(signature, words, body, *tests):
    """signature: "double(x)"; words: its docstring; tests: what `candidate` must satisfy"""
    name = signature.split("(")[0]
    return {
        "task_id": f"tiny/{name}", "entry_point": name,
        "prompt": f'def {signature}:\n    """{words}"""\n',
        "canonical_solution": "".join(f"    {line}\n" for line in body.split("\n")),
        "test": "def check(candidate):\n" + "".join(f"    {line}\n" for line in tests),
    }


def ask_mbpp(text, code, *tests):
    name = code.removeprefix("def ").split("(")[0]
    return {"task_id": f"tiny/{name}", "text": text, "code": code, "test_list": list(tests)}


TINY = [
    ask_humaneval(
        "middle(items)", "The middle item of a list of odd length.",
        "return items[len(items) // 2]",
        "assert candidate([1, 5, 2]) == 5",
        "assert candidate(['a']) == 'a'",
        "assert candidate([4, 3, 2, 1, 0]) == 2"),
    ask_humaneval(
        "vowels(text)", "How many of a, e, i, o, u are in a text, large or small.",
        "return sum(letter in 'aeiou' for letter in text.lower())",
        "assert candidate('Hello') == 2",
        "assert candidate('xyz') == 0",
        "assert candidate('AEIOU aeiou') == 10"),
    ask_humaneval(
        "running_sums(numbers)", "The list of the sums of the first 1, 2, 3, ... numbers.",
        "sums = []\n"
        "for number in numbers:\n"
        "    sums.append(number + (sums[-1] if sums else 0))\n"
        "return sums",
        "assert candidate([1, 2, 3]) == [1, 3, 6]",
        "assert candidate([]) == []",
        "assert candidate([5, -5, 2]) == [5, 0, 2]"),
    ask_humaneval(
        "mean(numbers)", "The mean of numbers; ValueError if there are none.",
        "if not numbers:\n"
        "    raise ValueError('no numbers')\n"
        "return sum(numbers) / len(numbers)",
        "assert abs(candidate([1, 2]) - 1.5) < 1e-9",
        "assert abs(candidate([0.1] * 10) - 0.1) < 1e-9",
        "try:",
        "    candidate([])",
        "except ValueError:",
        "    return",
        "assert False"),
    ask_humaneval(
        "count_words(text)", "A dict from each word of a text to how often it occurs.",
        "from collections import Counter\n"
        "return Counter(text.split())",
        "assert candidate('a b a') == {'a': 2, 'b': 1}",
        "assert candidate('') == {}"),
    ask_humaneval(
        "is_prime(n)", "Whether n is a prime number.",
        "return n > 1 and all(n % d for d in range(2, int(n ** 0.5) + 1))",
        "primes = [n for n in range(-3, 30) if candidate(n)]",
        "assert primes == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]",
        "assert candidate(1_000_003) is True",
        "assert candidate(1_000_001) is False"),
    ask_mbpp(
        "Write a function that rotates a list to the left by k places.",
        "def rotate(items, k):\n"
        "    k %= len(items) or 1\n"
        "    return items[k:] + items[:k]",
        "assert rotate([1, 2, 3, 4], 1) == [2, 3, 4, 1]",
        "assert rotate([], 3) == []",
        "assert rotate([1, 2], 5) == [2, 1]"),
    ask_mbpp(
        "Write a function that says whether the brackets ()[]{} in a text are balanced.",
        "def balanced(text):\n"
        "    stack = []\n"
        "    for letter in text:\n"
        "        if letter in '([{':\n"
        "            stack.append(')]}'['([{'.index(letter)])\n"
        "        elif letter in ')]}' and (not stack or stack.pop() != letter):\n"
        "            return False\n"
        "    return not stack",
        "assert balanced('a(b[c]{d})') is True",
        "assert balanced('(]') is False",
        "assert balanced('((') is False"),
    ask_mbpp(
        "Write a function for the greatest common divisor of two numbers.",
        "def divisor(a, b):\n"
        "    while b:\n"
        "        a, b = b, a % b\n"
        "    return abs(a)",
        "assert divisor(12, 18) == 6",
        "assert divisor(7, 0) == 7",
        "assert divisor(b=35, a=21) == 7"),
    ask_mbpp(
        "Write a function for the set of letters that two words share.",
        "def shared(one, two):\n"
        "    return set(one) & set(two)",
        "assert shared('abc', 'bcd') == {'b', 'c'}",
        "assert shared('a', 'b') == set()",
        "assert len(shared('xyz', 'zyx')) == 3"),
    ask_mbpp(
        "Write a function that flattens a list of lists, however deep.",
        "def flatten(items):\n"
        "    if not isinstance(items, list):\n"
        "        return [items]\n"
        "    return [leaf for item in items for leaf in flatten(item)]",
        "assert flatten([1, [2, [3, []]], 4]) == [1, 2, 3, 4]",
        "assert flatten([]) == []",
        "assert flatten([['a'], 'b']) == ['a', 'b']"),
    ask_mbpp(
        "Write a function that writes a number from 1 to 3999 in Roman numerals.",
        "def roman(n):\n"
        "    text = ''\n"
        "    values = 1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1\n"
        "    for value, letters in zip(values, 'M CM D CD C XC L XL X IX V IV I'.split()):\n"
        "        text += letters * (n // value)\n"
        "        n %= value\n"
        "    return text",
        "assert roman(1994) == 'MCMXCIV'",
        "assert roman(4) == 'IV'",
        "assert roman(3999) == 'MMMCMXCIX'"),
]


if __name__ == "__main__":
    command(main)
