"""
AMC 12 of 2022 and 2023: 83 problems, reworded so that the answer is a number and not a letter, kept as decimals ("142.0").

    python -m data.amc                       # from the hub's AI-MO/aimo-validation-amc, as its dataset viewer sends it
    data.load("amc:ttrl")                    # every split is these questions: test-time RL
"""
from data.download import command
from data.questions import Questions, find, main, pick, rows

VIEWER = "https://datasets-server.huggingface.co/rows?dataset=AI-MO/aimo-validation-amc&config=default&split=train&offset=0&length=100"
SOURCES = {"test": ("amc/test.json", VIEWER)}


def load(path):
    loaded = [(pick(row, "problem", "prompt", "question"), row["answer"], str(row.get("solution") or "")) for row in rows(path, "answer")]
    if any(question is None for question, _, _ in loaded):
        raise ValueError(f"{path}: a row without a problem: is this AMC?")
    return loaded


def task(*words):
    return Questions("amc", lambda split: load(find("amc", SOURCES[split][0], "ttrl/AMC-TTT.json")), words, splits=("test",))


if __name__ == "__main__":
    command(lambda argv: main("amc", SOURCES, load, argv))
