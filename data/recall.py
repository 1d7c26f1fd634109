"""
Keys, values and a question: what stood behind this key?

    Kab7TxQ4mR0pd...?T   x        32 keys, 31 values and the question mark: 64 symbols

A text is keys in random order, each once, each followed by its value and by values that mean nothing;
64 to 512 tokens. There is nothing to know and nothing to calculate: an answer is found in the text, or
nowhere. So it shows what an attention, a cache or a memory keeps of a text, apart from all else.

A model learns it all at once, when its two layers find each other (one looks one token back, the
other looks for what that found), and on long texts that may not happen for thousands of steps. So
training documents begin short and grow, and each asks several questions: the first RAMP documents of
the train split are shorter than the rest. Problems, and all other splits, are of full length.

    python -m data.recall                  # or: python -m data.recall 256 (tokens of every text)
    python train_gpt.py --preset recall
"""
import re
import string
import sys

from data import Problem, distinct, endless, show, split_of, stream, unknown_word

KEYS = string.ascii_uppercase + "012345"
VALUES = string.ascii_lowercase + "6789+"
SHORTEST, LONGEST = 64, 512      # tokens of a text
QUESTIONS = 8                    # of a training document, after its text
FIRST = 8                        # tokens of the first training documents
RAMP = 18_000                    # training documents until they are of full length


def task(*words):
    for word in words:
        if not re.fullmatch("[0-9]{1,5}", word) or not 4 <= int(word):
            raise unknown_word("recall", word, ["64", "128", "256", "512"])
    return Recall(*map(int, words[-1:]))


class Recall:
    def __init__(self, length=None):
        self.name = f"recall:{length}" if length else "recall"
        self.shortest = length or SHORTEST
        self.longest = length or LONGEST

    def sizes(self, split, i):
        """-> the tokens that the text of document i has, at least and at most."""
        if split != "train" or i >= RAMP:
            return self.shortest, self.longest
        longest = FIRST * (self.longest / FIRST) ** (i / RAMP)
        return min(self.shortest, int(longest)), int(longest)

    def text(self, what, split, seed, i, low, high):
        """-> a text, {key: value}, and the generator that made them."""
        rand = stream(what, split, seed, i)
        while True:
            length = low + int(rand() * (high - low + 1))
            keys = shuffled(KEYS, rand)[:length // 2]
            parts = [key + one_of(VALUES, rand) for key in keys]
            found = dict(parts)
            for _ in range(length - 2 * len(keys)):              # values that mean nothing
                parts[int(rand() * len(parts))] += one_of(VALUES, rand)
            text = "".join(parts)
            if split_of(f"recall {text}") == split:
                return text, found, rand

    def document(self, split, seed, i):
        """-> text and question, answer, question, answer, ..."""
        text, found, rand = self.text("recall document", split, seed, i, *self.sizes(split, i))
        turns = []
        for key in shuffled(list(found), rand)[:QUESTIONS]:
            turns += [f"?{key}", found[key]]
        return text + turns[0], *turns[1:]

    def corpus(self, split, seed):
        return endless(self.document, split, seed)

    def problems(self, split, n, seed):
        def one(j):
            text, found, rand = self.text("recall problem", split, seed, j, self.shortest, self.longest)
            key = one_of(list(found), rand)
            return text + key, Problem(f"{text}?{key}", found[key], data={"task": self.name})
        return distinct(one, n)

    def answer(self, text):
        return text[:1] if text[:1] and text[:1] in VALUES else None

    def reward(self, problem, text):
        return float(self.answer(text) == problem.gold)

    def canon(self, answer):
        return answer

    def same(self, a, b):
        return a == b


def one_of(items, rand):
    return items[int(rand() * len(items))]


def shuffled(items, rand):
    return sorted(items, key=lambda item: rand())


if __name__ == "__main__":
    show(task(*sys.argv[1:]))
