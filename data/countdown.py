"""
Countdown: reach a target from n numbers with + - * /, every number used exactly once.

    steps     C3 7 12=43:   12*3=36,36+7=43
    search    S3 7 12=43:   12-3=9(9+7=16<9*7=63>)12*3=36(36+7=43#12*3=36,36+7=43
              a walk through the tree of steps: "(" goes down, "<" and ">" say how a last step
              missed, ")" goes back up; the answer follows "#". Its length has a heavy tail: half of
              the documents go straight to the answer, one in fifty tries thirty dead ends or more
              first.

Documents are made backwards: random steps over random numbers, and where they arrive is the
target. So the text is right, costs microseconds, and still shows only one of the solutions of a
problem whose search the model has to do in its head: imitation alone stays far from perfect,
which is room for reinforcement learning. The checker knows no expression and calls no eval: it
takes one line of steps, does exact rational arithmetic on numbers of at most nine digits, and
crosses numbers off a list.

    python -m data.countdown               # or: python -m data.countdown search 4
"""
import re
import sys
import zlib
from fractions import Fraction

from data import Problem, distinct, endless, show, split_of, stream, unknown_word

# difficulty
NUMBERS = 3              # how many, unless the variant says so
LARGEST = 25             # of the numbers given: 1 .. LARGEST
# of every result in a document. They are natural numbers there; the checker takes any rational
MAX_VALUE = 99
# a letter twice is drawn twice as often. A problem is asked once, however many ways lead to it, and
# most of the different ones need - or *, while "/" is seldom possible
OPS = "+--**//"
NOISE = 0.0              # the share of documents whose steps are right and miss the target
# the tail of `search`
TAIL = 1.1               # at least k dead ends with probability (k + 1) ** -TAIL
SEARCH_CHARS = 200       # a completion is at most this times n long

INTEGER = "-?[0-9]{1,9}"
# a fraction wears parentheses: 8/(3/2) and (8/3)/2 differ
OPERAND = rf"({INTEGER}|\({INTEGER}/[0-9]{{1,9}}\))"
STEP = re.compile(rf"{OPERAND}([-+*/]){OPERAND}={OPERAND}")


def task(*words):
    style, n = "steps", NUMBERS
    for word in words:
        if word in ("steps", "search"):
            style = word
        elif re.fullmatch("[2-8]", word):
            n = int(word)
        else:
            raise unknown_word("countdown", word, ["steps", "search", *"2345678"])
    return Countdown(style, n)


class Countdown:
    def __init__(self, style, n):
        self.name = f"countdown:{style}:{n}"
        self.style, self.n = style, n
        self.tag = "S" if style == "search" else "C"

    def draw(self, what, split, seed, i):
        rand = stream(what, split, seed, i)
        while True:
            numbers = [1 + int(rand() * LARGEST) for _ in range(self.n)]
            steps, target = derive(numbers, rand)
            key = f"countdown {sorted(numbers)} {target}"
            if split_of(key) == split and (split != "train"
                                           or in_text(key) == (what == "countdown document")):
                return key, numbers, target, steps, rand

    def problems(self, split, n, seed):
        def one(j):
            key, numbers, target, steps, _ = self.draw("countdown problem", split, seed, j)
            facts = {"task": self.name, "numbers": numbers, "target": target}
            return key, Problem(self.prompt(numbers, target), ",".join(steps), data=facts)
        return distinct(one, n)

    def prompt(self, numbers, target):
        return f"{self.tag}{' '.join(map(str, numbers))}={target}:"

    def document(self, split, seed, i):
        _, numbers, target, steps, rand = self.draw("countdown document", split, seed, i)
        if NOISE and rand() < NOISE:
            steps, _ = derive(numbers, rand)
        if self.style == "steps":
            return self.prompt(numbers, target), ",".join(steps)
        return self.prompt(numbers, target), search(numbers, target, steps, rand)

    def corpus(self, split, seed):
        return endless(self.document, split, seed)

    # ----------------------------------------------------------------------------------------------
    # checking

    def answer(self, text):
        """the steps, if there are well-formed ones; whether they are right is the reward's business."""
        if self.style == "search":
            _, mark, text = text.rpartition("#")
            if not mark:
                return None
        text = text.strip()
        return text if parse(text) else None

    def reward(self, problem, text):
        answer = self.answer(text)
        return float(answer is not None
                     and solves(parse(answer), problem.data["numbers"], problem.data["target"]))

    def canon(self, answer):
        """3*12 and 12*3 are one, and so are two independent steps in either order."""
        steps = parse(answer)
        if not steps:
            return answer
        return tuple(sorted((op, *(sorted((a, b)) if op in "+*" else (a, b)), result)
                            for a, op, b, result in steps))

    def same(self, a, b):
        return self.canon(a) == self.canon(b)


def in_text(key):
    """Half of the train problems are written out in documents, the other half are there to be
    solved. With three numbers there are only some 30,000 problems: a base that has read them all
    recalls them, and a reward for recalling teaches nothing that holds out."""
    return zlib.crc32(key.encode()) % 2 == 0


def parse(text):
    """'12*3=36,36+7=43' -> [(12, '*', 3, 36), (36, '+', 7, 43)], or None. Time and size are
    bounded before anything is read."""
    if len(text) > 500:
        return None
    steps = []
    for part in text.split(","):
        step = STEP.fullmatch(part)
        if not step:
            return None
        a, b, result = (number(step[i]) for i in (1, 3, 4))
        if a is None or b is None or result is None:
            return None
        steps.append((a, step[2], b, result))
    return steps


def number(text):
    if text[0] != "(":
        return int(text)
    above, below = map(int, text[1:-1].split("/"))
    return Fraction(above, below) if below else None


def solves(steps, numbers, target):
    pool = list(numbers)                         # what may still be used: each entry once
    for a, op, b, result in steps:
        for x in (a, b):
            if x not in pool:
                return False
            pool.remove(x)
        if op == "/" and b == 0:
            return False
        right = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else Fraction(a) / b
        if result != right:
            return False
        pool.append(result)
    return pool == [target]  # one thing left: so all numbers were used, and no result was left over


# --------------------------------------------------------------------------------------------------
# writing documents

def one_step(pool, rand):
    """takes two numbers out of the pool and puts a result in; returns its text. Some op is
    always possible."""
    a, b = pool.pop(int(rand() * len(pool))), pool.pop(int(rand() * len(pool)))
    while True:
        op = OPS[int(rand() * len(OPS))]
        made = combine(a, b, op)
        if made:
            pool.append(made[1])
            return made[0]


def combine(a, b, op):
    """('12*3=36', 36), or None where the result is no natural number or too large. The larger number
    comes first, in sums and products too, so that half as many of them have to be learned."""
    a, b = max(a, b), min(a, b)
    if op == "/":
        if a % b:
            return None
        result = a // b
    else:
        result = a + b if op == "+" else a - b if op == "-" else a * b
    return (f"{a}{op}{b}={result}", result) if 0 < result <= MAX_VALUE else None


def derive(numbers, rand):
    """random steps that use every number: (['12*3=36', '36+7=43'], 43)."""
    pool, steps = list(numbers), []
    while len(pool) > 1:
        steps.append(one_step(pool, rand))
    return steps, pool[0]


def search(numbers, target, steps, rand):
    """dead ends first, as many as the tail says and the cap allows, then the known way, then the answer."""
    end = "(".join(steps) + "#" + ",".join(steps)
    room = SEARCH_CHARS * len(numbers) - len(end)
    dead = int((1 - rand()) ** (-1 / TAIL)) - 1
    text = ""
    while dead > 0:
        branch, leaves = wander(list(numbers), target, rand, dead)
        if len(text) + len(branch) > room:
            break
        text += branch
        dead -= max(leaves, 1)
    return text + end


def wander(pool, target, rand, limit):
    """one branch of the tree that does not reach the target, with at most `limit` misses:
    (text, how many)."""
    if len(pool) == 2:
        misses = []
        for op in "+-*/":
            made = combine(*pool, op)
            if made and made[1] != target:
                misses.append(made[0] + ("<" if made[1] < target else ">"))
        while len(misses) > min(limit, 3):       # drop at random down to the limit; their order stays
            misses.pop(int(rand() * len(misses)))
        return "".join(misses), len(misses)
    text, leaves = one_step(pool, rand) + "(", 0
    for _ in range(1 if len(pool) == 2 else 2):  # two numbers left: one look at them; more: two branches
        branch, more = wander(list(pool), target, rand, limit - leaves)
        text, leaves = text + branch, leaves + more
        if leaves >= limit:
            break
    return text + ")", leaves


if __name__ == "__main__":
    show(task(*sys.argv[1:]))
