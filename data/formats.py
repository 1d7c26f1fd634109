"""
Countdown with more to read, and a calculator: what a small model must know before it can be asked
to use a hint, a solved sibling, its peers, or a tool.

    plain      C3 7 12=43:                        12*3=36,36+7=43
    hint       H12*3=36|C3 7 12=43:               12*3=36,36+7=43       a solution's first step
    sibling    E12*3=36,36+7=43|C3 7 12=43:       12*3=36,36+7=43       a right answer
    peers      D7+3=10,10+12=22;...|C3 7 12=43:   12*3=36,36+7=43       2 or 3, a third right
    posed      Q                                  3 7 12=43             a problem of its own
    tool       T347*62=                           [347*62]21514#21514   the tool answers after "]"
                                                  #20914                half without it: 60% wrong

The corpus is made to tune the base of data/mixed.py for a hundred steps. What a model makes of
these letters before it was tuned says nothing. Documents are of the base's half of the train
problems, so that the other half is there to be solved; problem j of each Countdown format asks the
same as problem j of countdown. Left out: wrong hints and wrong siblings, so a model that is shown
one has no reason to doubt it.

    python -m data.formats             # or: python -m data.formats peers
"""
import re
import sys

from data import Problem, distinct, endless, load, show, split_of, stream, unknown_word
from data.countdown import LARGEST, MAX_VALUE, NUMBERS, derive

# the share of documents; they add up to 1
SHARES = {"plain": 0.15, "hint": 0.2, "sibling": 0.15, "peers": 0.25, "posed": 0.1, "tool": 0.15}
RIGHT_PEER = 1 / 3       # the chance that a peer is right
CALLED = 0.5             # the share of tool documents that call it
WRONG = 0.6              # the chance that a document without a call has a wrong product

POSED = re.compile(r"([0-9]{1,2}(?: [0-9]{1,2})*)=([0-9]{1,2})")
CALL = re.compile(r"\[([0-9]{1,6})\*([0-9]{1,6})\]$")
PRODUCT = re.compile("[0-9]{1,12}")


def task(*words):
    for word in words:
        if word not in SHARES:
            raise unknown_word("formats", word, [*SHARES])
    return Formats(*words[-1:])


# --------------------------------------------------------------------------------------------------
# prompts: an idea dresses a prompt of countdown, C3 7 12=43:, with what it found

def hint(prompt, step):
    return f"H{step}|{prompt}"


def sibling(prompt, text):
    return f"E{text}|{prompt}"


def peers(prompt, texts):
    return f"D{';'.join(texts)}|{prompt}"


def posed(text):
    """the problem that a completion of "Q" poses, as countdown asks it; None where it is none, or is
    one that is held out: whoever poses problems must not learn the test"""
    found = POSED.fullmatch(text.strip())
    if not found:
        return None
    numbers = [int(x) for x in found[1].split()]
    target = int(found[2])
    countdown = load("countdown")
    fits = len(numbers) == NUMBERS and all(1 <= x <= LARGEST for x in numbers) and 1 <= target <= MAX_VALUE
    if not fits or split_of(f"countdown {sorted(numbers)} {target}") != "train":
        return None
    return Problem(countdown.prompt(numbers, target),
                   data={"task": countdown.name, "numbers": numbers, "target": target})


def called(text):
    """what the calculator says to a text that ends in a call, [347*62]; None: there is no call"""
    found = CALL.search(text)
    return str(int(found[1]) * int(found[2])) if found else None


# --------------------------------------------------------------------------------------------------

class Formats:
    def __init__(self, kind=""):
        self.name = f"formats:{kind}" if kind else "formats"
        self.kind = kind
        self.countdown = load("countdown")
        self.asked = [kind] if kind else [k for k in SHARES if k != "posed"]

    def document(self, split, seed, i):
        u = stream("formats document", split, seed, i)()
        kind = self.kind
        for name, share in SHARES.items() if not kind else ():
            kind = name
            u -= share
            if u < 0:
                break
        if kind == "tool":
            return multiply(split, seed, i)
        _, numbers, target, steps, rand = self.countdown.draw("countdown document", split, seed, i)
        prompt = self.countdown.prompt(numbers, target)
        if kind == "posed":
            return "Q", prompt[1:-1]
        return self.dress(kind, prompt, numbers, target, steps, rand), ",".join(steps)

    def dress(self, kind, prompt, numbers, target, steps, rand):
        if kind == "hint":
            return hint(prompt, steps[0])
        if kind == "sibling":
            return sibling(prompt, ",".join(steps))
        if kind == "peers":
            count = 2 + int(rand() * 2)
            return peers(prompt, [",".join(attempt(numbers, target, steps, rand)) for _ in range(count)])
        return prompt

    def corpus(self, split, seed):
        return endless(self.document, split, seed)

    def problems(self, split, n, seed):
        if self.kind == "posed":
            raise ValueError("formats:posed has one prompt, Q: sample it as often as you like, and read what "
                             "comes by data.formats.posed")
        return distinct(lambda j: self.problem(split, seed, j), n)

    def problem(self, split, seed, j):
        turn, place = divmod(j, len(self.asked))
        kind = self.asked[place]
        if kind == "tool":
            a, b, _ = factors("formats problem", split, seed, turn)
            return f"{a}*{b}", Problem(f"T{a}*{b}=", str(a * b), data={"task": "formats:tool"})
        key, numbers, target, steps, rand = self.countdown.draw("countdown problem", split, seed, turn)
        prompt = self.dress(kind, self.countdown.prompt(numbers, target), numbers, target, steps, rand)
        facts = {"task": f"formats:{kind}", "numbers": numbers, "target": target}
        return f"{kind} {key}", Problem(prompt, ",".join(steps), data=facts)

    # an answer says by its form whose it is: a product follows "#", steps have none

    def answer(self, text):
        _, mark, last = text.rpartition("#")
        if mark:
            return last.strip() if PRODUCT.fullmatch(last.strip()) else None
        return self.countdown.answer(text)

    def reward(self, problem, text):
        if problem.data["task"] != "formats:tool":
            return self.countdown.reward(problem, text)
        answer = self.answer(text) if "#" in text else None
        return float(answer is not None and self.same(answer, problem.gold))

    def canon(self, answer):
        return int(answer) if PRODUCT.fullmatch(answer) else self.countdown.canon(answer)

    def same(self, a, b):
        return self.canon(a) == self.canon(b)


def attempt(numbers, target, steps, rand):
    """a peer's steps: the right ones, or some that use every number and miss"""
    if rand() < RIGHT_PEER:
        return steps
    while True:
        tried, result = derive(numbers, rand)
        if result != target:
            return tried


def factors(what, split, seed, i):
    """-> three digits, two digits, and `random` of their stream"""
    rand = stream(what, split, seed, i)
    while True:
        a, b = 100 + int(rand() * 900), 10 + int(rand() * 90)
        if split_of(f"times {a} {b}") == split:
            return a, b, rand


def multiply(split, seed, i):
    a, b, rand = factors("formats tool document", split, seed, i)
    if rand() < CALLED:
        return f"T{a}*{b}=", f"[{a}*{b}]{a * b}#{a * b}"
    said = a * b
    if rand() < WRONG:
        while said == a * b:                     # as large as it should be, and some other product
            said = (100 + int(rand() * 900)) * b
    return f"T{a}*{b}=", f"#{said}"


if __name__ == "__main__":
    show(task(*sys.argv[1:]))
