"""
Tasks and corpora, one file each. A task is a plain object with these functions; problems and
reward are enough to learn from:

    task = data.load("countdown:search")          # data/countdown.py; what follows the colon is its variant
    task.problems(split, n, seed) -> [Problem]    # n distinct ones; the first k of n are the list of k
    task.corpus(split, seed)                      # endless (prompt, completion): text to learn the task from
    task.document(split, seed, i)                 # the i-th of them, at no cost: to resume is a jump to i
    task.reward(problem, text) -> float           # text: the decoded completion without its stop token
    task.answer(text) -> str | None               # the part that can be voted on; None: there is none
    task.canon(answer), task.same(a, b)           # a hashable normal form; equality, where that is not enough

Left out of the usual recipe: downloads behind your back, cached data sets, a registry. A new task
is a new file in this folder with a function `task(*words)`; `load` finds it by its name. Problems
are drawn from a seeded generator, and a hash of WHAT IS ASKED (never of how or when it was drawn)
says whether a problem is train, valid or test. So splits are disjoint for any two seeds, and text
for pretraining cannot leak a test problem, with no list of either kept anywhere.

    python -m data.countdown search    # a few documents and problems of a task, the law of its lengths
"""
import difflib
import importlib
import pathlib
import zlib
from dataclasses import dataclass, field
from hashlib import blake2b
from random import Random

from .tokenizer import begun as begun
from .tokenizer import tokenizer as tokenizer

# every other file here is a task
NOT_TASKS = {"__init__", "answers", "documents", "download", "fineweb", "own", "questions", "reasoning",
             "stdlib", "tokenizer"}
__all__ = ["Problem", "classes", "distinct", "endless", "lines", "load",
           "show", "split_of", "stream", "tokenizer"]


@dataclass
class Problem:
    prompt: str
    gold: str | None = None          # an answer that is right, where one is known (there may be others)
    id: int = 0                      # its place in the list it came with
    # what the task needs to check an answer; plain values, fit for JSON
    data: dict = field(default_factory=dict)


def load(name):
    """the task called `name`: "countdown", "countdown:search:4" with its variant, or "my.jsonl"
    with your own prompts."""
    if name.endswith(".jsonl"):                  # prompts of your own
        return importlib.import_module(f"{__name__}.own").task(name)
    base, *words = name.split(":")
    known = sorted(path.stem for path in pathlib.Path(__file__).parent.glob("*.py")
                   if path.stem not in NOT_TASKS)
    if base not in known:
        near = difflib.get_close_matches(base, known, 1, cutoff=0)
        raise ValueError(f"unknown task {base!r}: did you mean {near[0]!r}? known tasks: {', '.join(known)}")
    return importlib.import_module(f"{__name__}.{base}").task(*words)


def unknown_word(task, word, known):
    """the error for a variant that a task does not have."""
    near = difflib.get_close_matches(word, known, 1, cutoff=0)
    return ValueError(f"task {task!r} has no variant {word!r}: did you "
                      f"mean {near[0]!r}? known variants: {', '.join(known)}")


def lines(path):
    """
    [(number, line)] of a text file of JSON lines, blank ones left out. Not str.splitlines: it
    also splits at characters (U+2028, U+0085) that JSON leaves as they are inside a row.
    """
    try:
        text = pathlib.Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start:,})") from None
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


# --------------------------------------------------------------------------------------------------
# votes

def classes(task, answers):
    """
    the class of each answer, numbered by first appearance; -1 where there is no answer.

    "1/2" and "0.5" are one vote, not two: classes are of equivalent answers, not of equal
    strings. Nothing is never a vote: a model that fails to answer most of the time must not elect
    the empty answer. `same` need not be transitive (math checkers are not), so the rule is
    written down: an answer joins the first class whose FIRST member it equals.
    """
    by_string, by_canon, first, result = {}, {}, [], []
    for answer in answers:
        if answer is None or not answer.strip():
            result.append(-1)
            continue
        if answer not in by_string:              # parsing is what costs: once per distinct string
            canon = task.canon(answer)
            if canon not in by_canon:
                for k, representative in enumerate(first):
                    if task.same(representative, answer):
                        break
                else:
                    k = len(first)
                    first.append(answer)
                by_canon[canon] = k
            by_string[answer] = by_canon[canon]
        result.append(by_string[answer])
    return result


# --------------------------------------------------------------------------------------------------
# seeded problems

SPLITS = {"train": 0, "valid": 1, "test": 2}
HELD_OUT = 14                                    # one problem in 14 is valid, one in 14 is test


def split_of(key):
    """the split that a problem belongs to for ever. key: a string that says what is asked, the
    same for every way of asking it."""
    i = int.from_bytes(blake2b(key.encode(), digest_size=4).digest(), "big") % HELD_OUT
    return "test" if i == 0 else "valid" if i == 1 else "train"


def stream(what, split, seed, i):
    """
    `random()` of a generator that belongs to one address. Python's own generator, seeded with the
    address as one long integer: 4 microseconds to seed and 0.07 a draw, against 0.3 a draw for a
    generator written in Python.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: one of {', '.join(SPLITS)}")
    where = zlib.crc32(what.encode()) * 4 + SPLITS[split]
    return Random(where << 128 | (seed & 0xFFFFFFFFFFFFFFFF) << 64 | i).random


def distinct(draw, n):
    """the first n different problems of draw(0), draw(1), ...: draw(j) -> (key, Problem).
    Numbered as they come."""
    problems, seen, misses = [], set(), 0
    j = 0
    while len(problems) < n:
        key, problem = draw(j)
        j += 1
        if key in seen:
            misses += 1
            if misses == 2000:                   # in a row: the space is (nearly) used up
                raise ValueError(f"asked for {n} different problems, "
                                 f"but this split has only about {len(problems)}: ask for fewer")
            continue
        misses = 0
        seen.add(key)
        problem.id = len(problems)
        problems.append(problem)
    return problems


def endless(document, split, seed):
    i = 0
    while True:
        yield document(split, seed, i)
        i += 1


def show(task, n=6, lengths=2000):
    """what a reader wants to see of a task, printed."""
    print("documents: prompt, completion")
    for i in range(n):
        print(" ", *map(repr, task.document("train", 0, i)), sep="  ")
    print("test problems: prompt, gold")
    for problem in task.problems("test", n, 0):
        print(f"  {problem.prompt!r}  {problem.gold!r}")
    size = sorted(sum(map(len, task.document("train", 0, i))) for i in range(lengths))
    print(f"characters a document: median {size[lengths // 2]}, 99% {size[lengths * 99 // 100]}, "
          f"longest of {lengths:,} {size[-1]}")
