r"""
GSM8K: 7,473 and 1,319 word problems of grade school, with solutions in plain English. The answer
is a whole number, nearly always.

    python -m data.gsm8k                     # from OpenAI's repository, MIT licence, 5 MB

The solutions come with the marks of a calculator (48/2=<<48/2=24>>24) and end in "#### 24". For
fine-tuning the marks go, and the end is what the prompt asks for: \boxed{24}.
"""
import re

from data.download import command
from data.questions import Questions, find, main, rows

HOME = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math/data"
SOURCES = {split: (f"gsm8k/{split}.jsonl", f"{HOME}/{split}.jsonl") for split in ("train", "test")}


def load(path):
    return [one(row, path) for row in rows(path, "question", "answer")]


def one(row, path):
    solution, mark, answer = row["answer"].rpartition("####")
    if not mark or not answer.strip():
        raise ValueError(f"{path}: an answer without #### in the end: "
                         f"{row['answer'][-60:]!r}; is this GSM8K?")
    answer = answer.strip()
    return (row["question"], answer.replace(",", ""),
            f"{re.sub('<<[^<>]*>>', '', solution).strip()}\nThe answer is \\boxed{{{answer}}}.")


def task(*words):
    return Questions("gsm8k", lambda split: load(find("gsm8k", SOURCES[split][0])), words)


if __name__ == "__main__":
    command(lambda argv: main("gsm8k", SOURCES, load, argv))
