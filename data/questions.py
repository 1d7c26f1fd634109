r"""
What the mathematics tasks share: a file of questions with one right answer each. gsm8k.py, math500.py,
aime.py and amc.py say where their files come from and what their rows are called; the rest is here.

    task.problems(split, n, seed)    # the first n of the split in an order of the seed's, at most all
    problem.prompt                   # the question and one line of instruction, for a model that
                                     # continues text
    problem.data["messages"]         # the same as a chat, for a tokenizer with a template:
                                     # tok.chat(messages)

Files are looked for in the folder that NANORL_DATA names, then in ~/.cache/nanorl, where
`python -m data.gsm8k` puts them. valid is carved out of train by a hash of the question. A small
test without a train split (AIME, AMC) has the variant `:ttrl`, in which all splits are the same
questions: test-time RL trains on what it is tested on, without looking at the answers.
"""
import json
import os
import sys
from pathlib import Path
from random import Random

from data import Problem, answers, endless, lines, split_of, unknown_word
from data import load as load_task
from data.download import fetch

INSTRUCTION = "Think step by step and put the final answer in \\boxed{}."


class Questions:
    """rows(split) -> [(question, answer, worked solution or "")]"""

    def __init__(self, name, rows, words=(), splits=("train", "valid", "test")):
        for word in words:
            if word != "ttrl":
                raise unknown_word(name, word, ["ttrl"])
        self.name, self.rows, self.splits = ":".join([name, *words]), rows, splits
        self.open = "ttrl" in words
        self.read, self.orders = {}, {}

    def all(self, split):
        if split not in ("train", "valid", "test"):
            raise ValueError(f"unknown split {split!r}: one of train, valid, test")
        if self.open:
            split = "test"
        if split not in self.splits:
            raise ValueError(f"{self.name} is a test and has no {split} "
                             f"split: train without its answers on {self.name}:ttrl")
        if split not in self.read:
            rows, seen = [], set()
            for question, answer, solution in self.rows("test" if split == "test" else "train"):
                key = " ".join(question.split())
                # a question that comes twice counts once; without an answer, not at all
                if key in seen or not answer.strip():
                    continue
                seen.add(key)
                if split == "test" or (split_of(f"{self.name} {key}") == "valid") == (split == "valid"):
                    rows.append((question.strip(), answer.strip(), solution.strip()))
            self.read[split] = rows
        return self.read[split]

    def order(self, split, seed, epoch):
        rows = self.all(split)
        key = (split, seed, epoch)
        if key not in self.orders:
            self.orders = {key: Random(f"{split} {seed} {epoch}").sample(range(len(rows)), len(rows))}
        return self.orders[key]

    def problems(self, split, n, seed):
        rows = self.all(split)
        return [self.problem(rows[k], i) for i, k in enumerate(self.order(split, seed, 0)[:n])]

    def problem(self, row, i=0):
        text = f"{row[0]}\n\n{INSTRUCTION}"
        return Problem(text + "\n\n", row[1], i,
                       {"task": self.name, "messages": [{"role": "user", "content": text}]})

    def document(self, split, seed, i):
        """the i-th (prompt, worked solution); an answer without one stands alone. Every epoch has
        an order of its own."""
        rows = self.all(split)
        row = rows[self.order(split, seed, i // len(rows))[i % len(rows)]]
        return self.problem(row).prompt, row[2] or f"\\boxed{{{row[1]}}}"

    def corpus(self, split, seed):
        return endless(self.document, split, seed)

    def answer(self, text):
        return answers.extract(text)

    def reward(self, problem, text):
        answer = answers.extract(text)
        return float(answer is not None and answers.same(problem.gold, answer))

    def canon(self, answer):
        return answers.canon(answer)

    def same(self, a, b):
        return answers.same(a, b)


# --------------------------------------------------------------------------------------------------
# files

def roots():
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nanorl"
    return [Path(os.environ["NANORL_DATA"]), cache] if os.environ.get("NANORL_DATA") else [cache]


def find(task, *names):
    """the first of these files that is there"""
    for root in roots():
        for name in names:
            if (root / name).is_file():
                return root / name
    raise FileNotFoundError(f"no {names[0]} in {' or '.join(map(str, roots()))}: "
                            f"run python -m data.{task}, online or with --from FILE")


def rows(path, *fields):
    """a JSON array, JSON lines, or what the hub's dataset viewer sends -> dicts that have all the
    fields, as text"""
    text = [line for _, line in lines(path)]
    try:
        if text and (text[0].lstrip().startswith("[") or text[0].strip() == "{"):
            found = json.loads("\n".join(text))
            found = found if isinstance(found, list) else [found]
        else:
            found = [json.loads(line) for line in text]
        if len(found) == 1 and isinstance(found[0].get("rows"), list):
            found = [row["row"] for row in found[0]["rows"]]
        for row in found:
            for field in fields:
                row[field] = str(row[field])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of {{{', '.join(fields)}}} "
                         f"objects ({type(error).__name__}: {error})") from None
    if not found:
        raise ValueError(f"{path} holds no rows: get it again")
    return found


def pick(row, *names):
    """the first of several names for the same field; each source has its own"""
    return next((row[name] for name in names if name in row), None)


def triples(path, name):
    """[(question, answer, solution)] of a file in the usual columns"""
    found = [(pick(row, "problem", "prompt", "question"), row["answer"], str(row.get("solution") or ""))
             for row in rows(path, "answer")]
    if any(question is None for question, _, _ in found):
        raise ValueError(f"{path}: a row without a problem: is this {name}?")
    return found


def main(task, sources, load, argv=None):
    """
    python -m data.TASK                  downloads what is missing, says from where, shows a problem
    python -m data.TASK --from FILE ...  takes files that are here; "train" in a file's name says
                                         which split it is
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    cache = roots()[-1]
    if argv and (argv[0] != "--from" or len(argv) < 2):
        raise ValueError(f"usage: python -m data.{task} [--from FILE ...]")
    given = {}
    for file in argv[1:]:
        split = "train" if "train" in Path(file).name and "train" in sources else "test"
        if not Path(file).is_file():
            raise FileNotFoundError(f"--from {file}: no such file")
        given[split] = Path(file).resolve()
    for split, (name, url) in sources.items():
        if argv and split not in given:
            continue
        path = cache / name
        if split in given:
            load(given[split])
            # what is left of a download is of another file
            for old in (path, path.with_name(path.name + ".part")):
                old.unlink(missing_ok=True)
            url = given[split].as_uri()
        print(f"{path}: from {url}")
        fetch(url, path, load)
    made = load_task(task)
    for split in made.splits:
        try:
            print(f"{split}: {len(made.all(split)):,} questions")
        except FileNotFoundError as error:
            print(f"{split}: {error}")
    problem = made.problems("test" if "test" in given or not given else "train", 1, 0)[0]
    print(f"\n{problem.prompt}gold: {problem.gold}")
