"""
Your own prompts: a .jsonl file of {"prompt": ..., "gold": ... or nothing} lines, and a reward
function of yours.

    python nanorl.py --data my.jsonl --reward my.py:score

    def score(problem, text):                    # in my.py
        return float(problem.gold in text)

One line in seven is held out (by a hash of the prompt, half of those valid, half test); with too few
lines the last one stands in. There is no answer() here: what an answer is, only your reward knows.
"""
import json
import pathlib
from random import Random

from data import Problem, lines, split_of


def task(path):
    return Own(path)


class Own:
    def __init__(self, path):
        self.name, self.rows = f"own:{path}", []
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"--data {path}: no such file")
        for n, line in lines(path):
            try:
                row = json.loads(line)
                prompt, gold = row["prompt"], row.get("gold")
            except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
                raise ValueError(f'--data {path}, line {n}: not a JSON '
                                 f'object with a "prompt": {line[:60]!r}') from None
            if not isinstance(prompt, str) or not prompt:
                raise ValueError(f"--data {path}, line {n}: the prompt must be a text that is not empty")
            self.rows.append(Problem(prompt, None if gold is None else str(gold),
                                     len(self.rows), {"task": self.name}))
        if not self.rows:
            raise ValueError(f"--data {path} is empty: give one problem a line")

    def problems(self, split, n, seed):
        part = [p for p in self.rows if split_of(f"own {p.prompt}") == split]
        if not part and split != "train":  # too few lines for the hash: the last one stands in
            part = self.rows[-1:]
        part = part or self.rows
        Random(seed).shuffle(part)
        return part[:n]
