"""
AMC 12 of 2022 and 2023: 83 problems, reworded so that the answer is a number and not a letter,
kept as decimals ("142.0").

    python -m data.amc       # from AI-MO/aimo-validation-amc, as the hub's dataset viewer sends it
    data.load("amc:ttrl")    # every split is these questions: test-time RL
"""
from data.download import command
from data.questions import Questions, find, main, triples

VIEWER = ("https://datasets-server.huggingface.co/rows?dataset=AI-MO/aimo-validation-amc"
          "&config=default&split=train&offset=0&length=100")
SOURCES = {"test": ("amc/test.json", VIEWER)}


def load(path):
    return triples(path, "AMC")


def task(*words):
    return Questions("amc", lambda split: load(find("amc", SOURCES[split][0], "ttrl/AMC-TTT.json")),
                     words, splits=("test",))


if __name__ == "__main__":
    command(lambda argv: main("amc", SOURCES, load, argv))
