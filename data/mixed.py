"""
All tasks of this folder in one corpus: one small base model serves every demonstration.

Each document is of a task drawn by fixed shares; the first letter of a prompt says which, so that
nothing else has to. Problems come from the tasks in turn and carry the name of theirs. Left out
of the usual recipe: a mixture by tokens. Shares are of documents, and the long ones of `search`
take more of the text than their share says.

    python -m data.mixed
"""
from dataclasses import replace

from data import endless, load, show, stream, unknown_word

# the share of documents; they add up to 1
SHARES = {"countdown:steps": 0.61, "countdown:search": 0.02, "arith": 0.30, "states": 0.07}


def task(*words):
    for word in words:
        if word not in "2345678" or len(word) != 1:
            raise unknown_word("mixed", word, [*"2345678"])
    return Mixed(*words[-1:])


class Mixed:
    def __init__(self, numbers=None):
        self.name = f"mixed:{numbers}" if numbers else "mixed"   # how many numbers Countdown has
        self.tasks = [load(f"{name}:{numbers}" if numbers and name.startswith("countdown") else name)
                      for name in SHARES]
        self.by_name = {task.name: task for task in self.tasks}

    def document(self, split, seed, i):
        u = stream("mixed document", split, seed, i)()
        for task, share in zip(self.tasks, SHARES.values()):
            u -= share
            if u < 0:
                break
        return task.document(split, seed, i)

    def corpus(self, split, seed):
        return endless(self.document, split, seed)

    def problems(self, split, n, seed):
        each = [task.problems(split, -(-n // len(self.tasks)), seed) for task in self.tasks]
        return [replace(problem, id=i)
                for i, problem in enumerate([problem for turn in zip(*each) for problem in turn][:n])]

    def reward(self, problem, text):
        return self.by_name[problem.data["task"]].reward(problem, text)

    # an answer says by its form whose it is: no text has one in two of the tasks that means
    # different things

    def answer(self, text):
        return next((answer for task in self.tasks if (answer := task.answer(text)) is not None), None)

    def canon(self, answer):
        for task in self.tasks:
            canon = task.canon(answer)
            if canon != answer:
                return canon
        return answer

    def same(self, a, b):
        return self.canon(a) == self.canon(b)


if __name__ == "__main__":
    show(task())
