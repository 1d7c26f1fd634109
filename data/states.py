"""
The shell game: a ball lies under one of four cups, two cups trade places, then another two; under
which cup does it end?

    Mc:ad bc bd:    cad=c,cbc=b,bbd=d#d    where the ball is, the trade, where it is then; after
                                           "#" the answer

Nothing to calculate, only a state to carry: the smallest task that is not mathematics and has one
right answer. As in arith.py the documents slip now and then (the ball is lost sight of), each in
its own way: a majority can put it right. (A state that is harder to carry, such as the whole row
of cups, is learnt late and all at once, or with another seed not at all.)

    python -m data.states                  # or: python -m data.states 8 (eight trades in each problem)
"""
import re
import sys

from data import Problem, distinct, endless, show, split_of, stream, unknown_word

# difficulty
CUPS = "abcd"
TRADES = (3, 6)          # from .. to, unless the variant says so
SLIP = 0.15              # the chance that after a trade of a document the ball is thought to be anywhere


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
            ball = CUPS[int(rand() * len(CUPS))]
            trades = [pair(rand) for _ in range(low + int(rand() * (high - low + 1)))]
            text = f"{ball}:{' '.join(trades)}"
            if split_of(f"states {text}") == split:
                return text, ball, trades, rand

    def problems(self, split, n, seed):
        def one(j):
            text, ball, trades, _ = self.draw("states problem", split, seed, j)
            for two in trades:
                ball = trade(ball, two)
            return text, Problem(f"M{text}:", ball, data={"task": self.name})
        return distinct(one, n)

    def document(self, split, seed, i):
        text, ball, trades, rand = self.draw("states document", split, seed, i)
        steps = []
        for two in trades:
            after = CUPS[int(rand() * len(CUPS))] if rand() < SLIP else trade(ball, two)
            steps.append(f"{ball}{two}={after}")
            ball = after
        return f"M{text}:", f"{','.join(steps)}#{ball}"

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
    a, b = int(rand() * len(CUPS)), int(rand() * (len(CUPS) - 1))
    return "".join(sorted(CUPS[a] + CUPS[b + (b >= a)]))


def trade(ball, two):
    return two[1] if ball == two[0] else two[0] if ball == two[1] else ball


if __name__ == "__main__":
    show(task(*sys.argv[1:]))
