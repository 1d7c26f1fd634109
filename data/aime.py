"""
AIME 2024, both papers: thirty problems, whole numbers from 0 to 999 as answers, which the papers
write with three digits ("025").

    python -m data.aime       # from HuggingFaceH4/aime_2024, as the hub's dataset viewer sends it
    data.load("aime:ttrl")    # every split is the thirty questions: test-time RL

Thirty problems are a coin that is thrown thirty times: one more solved is three points. Report
avg@k with its standard error.
"""
from data.download import command
from data.questions import Questions, find, main, triples

VIEWER = ("https://datasets-server.huggingface.co/rows?dataset=HuggingFaceH4/aime_2024"
          "&config=default&split=train&offset=0&length=100")
SOURCES = {"test": ("aime/test.json", VIEWER)}


def load(path):
    return triples(path, "AIME")


def task(*words):
    return Questions("aime", lambda split: load(find("aime", SOURCES[split][0], "ttrl/AIME-TTT.json")),
                     words, splits=("test",))


if __name__ == "__main__":
    command(lambda argv: main("aime", SOURCES, load, argv))
