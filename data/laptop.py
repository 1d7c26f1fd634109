"""
The text of the laptop record (records/README.md): what brings a small model to Countdown soonest.

    Countdown   of a problem's solutions always the plainest: one thing to learn, and no choice
                among the two or three that most problems have
    sums        those of data/arith.py without their slips. Their numbers are small and so learned
                early, and Countdown's larger ones follow. 40% of the first 20,000 documents, 8% of
                the others: once they are learned they only cost time

    python -m data.laptop
"""
from itertools import product

from data import arith, show, stream
from data.countdown import Countdown, combine

EARLY = 20_000           # documents with many sums
MANY = 0.4
FEW = 0.08


def task():
    return Laptop()


class Laptop(Countdown):
    """Countdown with three numbers, written otherwise"""

    def __init__(self):
        super().__init__("steps", 3)
        self.name = "laptop"
        self.sums = arith.task()

    def document(self, split, seed, i):
        if stream("laptop document", split, seed, i)() < (MANY if i < EARLY else FEW):
            text, _, order, _ = self.sums.draw("arith document", split, seed, i)
            return f"A{text}=", arith.work(order, lambda: 1.0)        # no chance is below the one of a slip
        _, numbers, target, _, _ = self.draw("countdown document", split, seed, i)
        return self.prompt(numbers, target), plainest(numbers, target)


def plainest(numbers, target):
    """The two steps whose operations come earliest in "+-*/"; of two alike, the earlier last one."""
    a, b, c = sorted(numbers, reverse=True)
    found = []
    for (x, y, rest), (i, first), (j, last) in product(
            [(a, b, c), (a, c, b), (b, c, a)], enumerate("+-*/"), enumerate("+-*/")):
        made = combine(x, y, first)
        end = made and combine(made[1], rest, last)
        if end and end[1] == target:
            found.append((i + j, j, f"{made[0]},{end[0]}"))
    return min(found, key=lambda way: way[:2])[2]


if __name__ == "__main__":
    show(task())
