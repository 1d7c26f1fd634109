"""
Arithmetic with a scratchpad: work out an expression in integers, one step at a time, and end
with the answer.

    A(2+3)*4-8=   3+2=5,5*4=20,20-8=12#12

In a sum or product the larger number comes first, so that half as many have to be learned.

One right answer per question, so that votes make sense. The documents SLIP: now and then a step's
result is any number, and the work continues from there. A model that learns from them slips as
often, each time somewhere else. So one sample in two is wrong while the majority is right: the
gap that a majority vote, test-time training and a reward can all close. (Hard sums, and slips to
the numbers next to the right one, would make a model wrong in the same way every time, and there
a vote has nothing to say.)

    python -m data.arith                   # or: python -m data.arith 5 (five numbers in each expression)
"""
import re
import sys

from data import Problem, distinct, endless, show, split_of, stream, unknown_word

# difficulty
LEAVES = (3, 4)          # numbers in an expression, from .. to, unless the variant says so
LARGEST = 9              # of the numbers given: 1 .. LARGEST
MAX_VALUE = 20  # of every result on the way; the smallest is 1, since nothing comes back from 0 in a product
SLIP = 0.18              # the chance that a step of a document comes out as any number

INTEGER = re.compile("-?[0-9]{1,18}")


def task(*words):
    leaves = LEAVES
    for word in words:
        if not re.fullmatch("[2-9]", word):
            raise unknown_word("arith", word, [*"23456789"])
        leaves = (int(word), int(word))
    return Arith(leaves)


class Arith:
    def __init__(self, leaves):
        self.leaves = leaves
        self.name = "arith" if leaves == LEAVES else f"arith:{leaves[0]}"

    def draw(self, what, split, seed, i):
        rand = stream(what, split, seed, i)
        low, high = self.leaves
        while True:
            order = []
            grown = grow(low + int(rand() * (high - low + 1)), order, rand)
            if grown and split_of(f"arith {grown[0]}") == split:
                return grown[0], grown[1], order, rand

    def problems(self, split, n, seed):
        def one(j):
            text, value, _, _ = self.draw("arith problem", split, seed, j)
            return text, Problem(f"A{text}=", str(value), data={"task": self.name})
        return distinct(one, n)

    def document(self, split, seed, i):
        text, _, order, rand = self.draw("arith document", split, seed, i)
        return f"A{text}=", work(order, rand)

    def corpus(self, split, seed):
        return endless(self.document, split, seed)

    def answer(self, text):
        _, mark, last = text.rpartition("#")
        last = last.strip()
        return last if mark and INTEGER.fullmatch(last) else None

    def reward(self, problem, text):
        answer = self.answer(text)
        return float(answer is not None and self.same(answer, problem.gold))

    def canon(self, answer):
        return int(answer) if INTEGER.fullmatch(answer) else answer

    def same(self, a, b):
        return self.canon(a) == self.canon(b)


# --------------------------------------------------------------------------------------------------

def grow(leaves, order, rand):
    """
    a random expression: (text, value, how loosely it binds), or None where no operation fits.
    `order` collects it in the order of working: numbers and operations, each after what it needs.
    """
    if leaves == 1:
        value = 1 + int(rand() * LARGEST)
        order.append(value)
        return str(value), value, 0
    split = 1 + int(rand() * (leaves - 1))
    left = grow(split, order, rand)
    right = left and grow(leaves - split, order, rand)
    if not right:
        return None
    (a_text, a, a_binds), (b_text, b, b_binds) = left, right
    fits = "+" * (a + b <= MAX_VALUE) + "-" * (a > b) + "*" * (a * b <= MAX_VALUE)
    if not fits:
        return None
    op = fits[int(rand() * len(fits))]
    order.append(op)
    binds = 1 if op == "*" else 2
    if a_binds > binds:
        a_text = f"({a_text})"
    if b_binds >= binds:
        b_text = f"({b_text})"
    return f"{a_text}{op}{b_text}", calculate(a, op, b), binds


def calculate(a, op, b):
    return a + b if op == "+" else a - b if op == "-" else a * b


def work(order, rand):
    """the scratchpad, slips and all."""
    stack, steps = [], []
    for x in order:
        if isinstance(x, int):
            stack.append(x)
            continue
        b, a = stack.pop(), stack.pop()
        result = calculate(a, x, b)
        if rand() < SLIP:
            result = 1 + int(rand() * MAX_VALUE)
        if x in "+*":
            a, b = max(a, b), min(a, b)
        steps.append(f"{a}{x}{b}={result}")
        stack.append(result)
    return f"{','.join(steps)}#{stack[0]}"


if __name__ == "__main__":
    show(task(*sys.argv[1:]))
