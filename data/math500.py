r"""
MATH: problems of American high-school competitions. test is MATH-500, five hundred that are never
trained on; train is what is left of the 12,500, levels 3 to 5: the easy ones are solved by every
model that is worth training, and say nothing.

    python -m data.math500                   # from OpenAI's PRM800K repository, MIT licence, 11 MB

That split moved 4,500 of the old test problems to train. Do not evaluate on the old test set what
was trained here.
"""
from data.download import command
from data.questions import Questions, find, main, pick, rows

HOME = "https://github.com/openai/prm800k/raw/main/prm800k/math_splits"
SOURCES = {split: (f"math/{split}.jsonl", f"{HOME}/{split}.jsonl") for split in ("train", "test")}
# the same rows as another repository keeps them
OTHERS = {"train": "math/MATH_train.json", "test": "ttrl/MATH-TTT.json"}
EASIEST = 3


def load(path, easiest=1):
    loaded = []
    for row in rows(path, "answer"):
        question, level = pick(row, "problem", "prompt", "question"), str(pick(row, "level", "source") or "")
        if question is None:
            raise ValueError(f"{path}: a row without a problem: is this MATH?")
        if not level[-1:].isdigit() or int(level[-1]) >= easiest:  # 5, "Level 5" and "MATH-Level5" are met
            loaded.append((question, row["answer"], str(row.get("solution") or "")))
    return loaded


def task(*words):
    def split_rows(split):
        return load(find("math500", SOURCES[split][0], OTHERS[split]), EASIEST if split == "train" else 1)
    return Questions("math500", split_rows, words)


if __name__ == "__main__":
    command(lambda argv: main("math500", SOURCES, load, argv))
