"""
Tasks by the hundred: the procedural tasks of the package reasoning-gym.

    --task gym:chain_sum                     # any of them
    --task gym:chain_sum:max_terms=3         # with a setting of its own: easier, harder
    python -m data.gym [WORD]                # lists them, with an example each

The package asks, and its score_answer judges what stands between the last <answer> tags, or else
the whole text; many tasks pay for a part. Votes are by words. What is left out, and why: reasoning.py.
"""
import zlib

from tqdm import tqdm

from data import Problem, distinct, reasoning, stream
from data.download import command

INSTRUCTION = "Put the final answer alone between <answer> and </answer>."
SPLITS = ("train", "train", "valid", "test")     # of a question, by its hash


def task(name="", *settings):
    return Gym(name, settings, reasoning.dataset(name, settings))


class Gym:
    def __init__(self, kind, settings, dataset):
        self.name, self.kind, self.dataset = ":".join(["gym", kind, *settings]), kind, dataset

    def draw(self, split, seed, j):
        rand = stream(self.name, split, seed, j)
        for _ in range(2000):
            self.dataset.seed = self.dataset.config.seed = number = int(rand() * 2**31)
            entry = self.dataset[number % reasoning.SIZE]
            if SPLITS[zlib.crc32(entry["question"].encode()) % 4] == split:
                text = f"{entry['question']}\n\n{INSTRUCTION}"
                return text, Problem(f"{text}\n\n", reasoning.gold(entry), data={
                    "task": self.name, "entry": entry, "messages": [{"role": "user", "content": text}]})
        raise ValueError(f"{self.name} has too few questions: none is of its {split} split")

    def problems(self, split, n, seed):
        def one(j):
            bar.update()
            return self.draw(split, seed, j)
        with tqdm(total=n, desc=self.name, delay=5, leave=False) as bar:
            return distinct(one, n)

    def answer(self, text):
        return text.rpartition("<answer>")[2].partition("</answer>")[0].strip() or None

    def reward(self, problem, text):
        answer = self.answer(text)
        if not answer or not reasoning.harmless(self.kind, answer):
            return 0.0
        try:
            return float(self.dataset.score_answer(answer, problem.data["entry"]))
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return 0.0                           # an answer that it cannot read

    def canon(self, answer):
        return " ".join(answer.split())

    def same(self, a, b):
        return self.canon(a) == self.canon(b)


def shown(name):
    if name in reasoning.LEFT_OUT:
        return [f"left out: {reasoning.LEFT_OUT[name]}"]
    text, problem = task(name).draw("train", 0, 0)
    return [repr(text[:300]), repr(problem.gold)]


def main(words):
    for name in [name for name in reasoning.names() if all(word in name for word in words)]:
        print(f"gym:{name}", *shown(name), sep="\n    ")


if __name__ == "__main__":
    command(main)
