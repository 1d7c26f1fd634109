"""
Keeping track: five things stand in a row, pairs of them trade places one after the other; what is the row at the end?

    Mcabed ad be ac:   ad cdbea,be cdeba,ac adebc#adebc      each trade again and the row after it; after "#" the answer

Nothing to calculate and nothing to look up, only a state to carry: the smallest task that is not mathematics and has one right
answer. (A scratchpad of rows alone is much harder: the model must also count which trade comes next.) As in arith.py the
documents slip now and then (two other things trade places), each in its own way: a majority can put it right.

    python -m data.states                  # or: python -m data.states 8 (eight trades in each problem)
"""
import re
import sys

from data import Problem, distinct, endless, show, split_of, stream, unknown_word

# difficulty
THINGS = "abcde"
TRADES = (2, 4)          # from .. to, unless the variant says so
SLIP = 0.12              # the chance that a trade of a document goes wrong


def task(*words):
    trades = TRADES
    for word in words:
        if not re.fullmatch("[1-9]|1[0-9]", word):
            raise unknown_word("states", word, [str(i) for i in range(1, 20)])
        trades = (int(word), int(word))
    return States(trades)


class States:
    def __init__(self, trades):
        self.trades = trades
        self.name = "states" if trades == TRADES else f"states:{trades[0]}"

    def draw(self, what, split, seed, i):
        rand = stream(what, split, seed, i)
        low, high = self.trades
        while True:
            things = list(THINGS)
            row = "".join(things.pop(int(rand() * len(things))) for _ in THINGS)
            trades = [pair(rand) for _ in range(low + int(rand() * (high - low + 1)))]
            text = f"{row} {' '.join(trades)}"
            if split_of(f"states {text}") == split:
                return text, row, trades, rand

    def problems(self, split, n, seed):
        def one(j):
            text, row, trades, _ = self.draw("states problem", split, seed, j)
            for two in trades:
                row = trade(row, two)
            return text, Problem(f"M{text}:", row, data={"task": self.name})
        return distinct(one, n)

    def document(self, split, seed, i):
        text, row, trades, rand = self.draw("states document", split, seed, i)
        rows = []
        for two in trades:
            row = trade(row, pair(rand) if rand() < SLIP else two)
            rows.append(f"{two} {row}")
        return f"M{text}:", f"{','.join(rows)}#{row}"

    def corpus(self, split, seed):
        return endless(self.document, split, seed)

    def answer(self, text):
        _, mark, last = text.rpartition("#")
        last = last.strip()
        return last if mark and re.fullmatch("[a-z]{1,26}", last) else None

    def reward(self, problem, text):
        return float(self.answer(text) == problem.gold)

    def canon(self, answer):
        return answer.strip()

    def same(self, a, b):
        return self.canon(a) == self.canon(b)


def pair(rand):
    a = int(rand() * len(THINGS))
    b = int(rand() * (len(THINGS) - 1))
    return THINGS[a] + THINGS[b + (b >= a)]


def trade(row, two):
    return row.translate({ord(two[0]): two[1], ord(two[1]): two[0]})


if __name__ == "__main__":
    show(task(*sys.argv[1:]))
