"""
tools.py: many turns. The model may call a calculator, and its answer comes back into the same row.

    T17*4=     [17*4]     68         #68
    prompt     a turn     the tool   the next turn
               sampled    forced     sampled            trained: what was sampled, and nothing else

A stop string, "]", ends a turn. If the text ends with a call by then, the tool's words are appended
as ids whose log-prob is nan, and the sample is resumed behind them: no text is tokenised twice, and
no word of the tool has a gradient. The reward comes at the end: is the number behind "#" right?

No paper claims this, and every report of an agent takes it for granted: does RL learn to call,
because calling helps? So the control is a tool that LIES: some other number of as many digits, and
a call is never right, a guess sometimes. What counts is the weaker half: how far calls rise with a
right tool, how far they fall with a lying one. In "none" nothing answers: the model writes the
tool's words itself, and calls rise for their form alone; the note says how far. All arms begin with
the same lessons: the formats base on texts of which half call and the others guess, wrongly in 60%.
Products up to 99, since that base copies no larger number. Asked are factors that no arm saw in
either order. What was said is in samples.html beside the picture, the tool's words underlined.

    python -m ideas.tools
    python -m bench ideas --names tools
"""
import json
import math
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace

import numpy as np

import data
from common import view
from common.evidence import Claim, Idea, begin, finish, picture, to_imitate
from common.flags import flags, positive
from common.metrics import sample_rows
from data.formats import CALLED, WRONG, called
from evaluate import evaluate, sample_and_score
from rollout import completion
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="", says="RL learns to call a tool that is right, and to stop calling one that lies",
              measured="calls: rise with a right tool, or fall with a lying one if less", smallest=10.0)
ARMS = ("right", "lies", "none")
STOP = "]"                               # ends a turn
LARGEST = 99                             # product
TASK = "formats:tool"                    # whose reward it is
LESSONS = 64                             # texts of a warm step


@dataclass
class Config(Idea):
    turns: int = 2                       # that a tool answers, at most
    steps: int = 50                      # rollouts per arm, after as many steps of lessons
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 32                    # tokens of a sample, the tool's among them, at most
    lr: float = 2e-3                     # AdamW


# -----------------------------------------------------------------------------
# problems, and texts that show how to answer


@cache
def questions(held_out):
    """-> those that arms learn from, or those that are asked: one pair in seven, in both orders"""
    pairs = [(a, b) for a in range(2, LARGEST) for b in range(2, LARGEST // a + 1)]
    mine = [p for p in pairs if (data.split_of(f"times {min(p)} {max(p)}") != "train") == held_out]
    return [data.Problem(f"T{a}*{b}=", str(a * b), i, {"task": TASK}) for i, (a, b) in enumerate(mine)]


def lesson(i, rng, tok):
    """-> a text to be imitated: a call, or a guess that is wrong more often than right"""
    p, other = rng.choice(questions(held_out=False), 2)
    guess = other.gold if rng.random() < WRONG else p.gold
    text = f"[{p.prompt[1:-1]}]{p.gold}#{p.gold}" if rng.random() < CALLED else f"#{guess}"
    return to_imitate(p.prompt, text, i, tok)


# -----------------------------------------------------------------------------
# the idea


def reply(text, arm, rng):
    """-> what the tool says to a text that ends with a call, or None"""
    said = called(text)
    if said is None or arm != "lies":
        return said
    while True:
        other = str(rng.integers(10 ** (len(said) - 1), 10 ** len(said)))
        if other != said:
            return other


def answered(s, arm, rl, rng):
    """-> the sample with the tool's words behind it, or None where it asks for none or has no room"""
    words = reply(completion(s, rl.tok), arm, rng)
    ids = rl.tok.encode(words or "")
    if not ids or len(s.tokens) + len(ids) >= rl.config.max_new:
        return None
    return replace(s, tokens=s.tokens + ids, logprobs=s.logprobs + [math.nan] * len(ids), kept=None)


def play(rl, problems, n, arm, turns, rng, seed=None):
    """-> {problem: its n samples}, each all turns in one"""
    stops = () if arm == "none" else (STOP,)
    first = collect(rl, problems, n, stop_strings=stops, reward=False, seed=seed)
    groups = {group[0].problem: group for group in first}
    waiting = [s for group in groups.values() for s in group]    # who may have called in the last turn
    for turn in range(1, turns + 1) if stops else ():
        calls = {}
        for s in filter(None, [answered(s, arm, rl, rng) for s in waiting]):
            calls.setdefault(s.problem, []).append(s)
        waiting = []
        more = collect(rl, [p for p in problems if p.id in calls], n, resume=calls, reward=False,
                       stop_strings=stops if turn < turns else (), seed=None if seed is None else seed + turn)
        for group in more if calls else ():
            for s, called_as in zip(group, calls[group[0].problem]):
                s = replace(s, index=called_as.index, visit=called_as.visit)     # as in its first turn
                groups[s.problem][s.index] = s
                waiting.append(s)
    return groups


def talks(rl, problems, arm, config):
    """-> a sampler to evaluate.py, whose samples have turns"""
    def stream(prompts, k, max_new, temperature, top_p, seed, ids):
        rng = np.random.default_rng([config.seed, rl.step])
        groups = play(rl, problems, k, arm, config.turns, rng, seed)
        yield from ((place, groups[id]) for place, id in enumerate(ids))
    return SimpleNamespace(stream=stream)


# -----------------------------------------------------------------------------
# the trial


def ask(rl, arm, config):
    """-> accuracy on factors that nobody saw, and the share of answers that call"""
    asked = questions(held_out=True)[:4 if config.smoke else None]
    rows = []
    sampler = talks(rl, asked, arm, config)
    result = evaluate(sampler, rl.tok, rl.task, rl.workers, asked, 8, config.max_new, samples=rows)
    return result["avg"], np.mean(["[" in row["text"] for row in rows])


def write_down(rl, groups, arm, folder):
    with open(folder / "samples.jsonl", "a") as f:
        for row in sample_rows(rl, groups):
            f.write(json.dumps(row | dict(prompt=f"{arm}: {row['prompt']}")) + "\n")


def train(arm, trial, config):
    settings = trial.settings(init=trial.base("formats"), task=TASK, tis=0.0, steps=2 * config.steps)
    rl = setup(Settings(**settings), problems=questions(held_out=False), reward=trial.reward)
    rng = np.random.default_rng(config.seed)                     # the same lessons for all arms
    for _ in range(config.steps):
        learn(rl, [[lesson(i, rng, rl.tok)] for i in range(LESSONS)])
    before = ask(rl, arm, config)
    for number in range(1, config.steps + 1):
        rl.step = number
        problems = next_problems(rl, config.prompts)
        sampler = talks(rl, problems, arm, config)
        found, rewards = sample_and_score(sampler, rl.tok, rl.workers, problems, config.n, config.max_new,
                                          1.0, 1.0, None)
        groups = [*found.values()]
        for group in groups:
            for s in group:
                s.reward = rewards[s.problem, s.index]
            advantage(group, rl.config)
        learn(rl, groups)
        trial.point(arm, number, np.mean([*rewards.values()]))
        trial.dot("calls", arm, number, np.mean(["[" in completion(s, rl.tok) for g in groups for s in g]))
        if number % 10 == 0 or number == config.steps:
            write_down(rl, groups, arm, trial.folder)
    after = ask(rl, arm, config)
    close(rl)
    return before, after                             # accuracy and calls, each


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "turns steps prompts n max_new")
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    (trial.folder / "samples.jsonl").unlink(missing_ok=True)     # of an earlier call
    results = {arm: train(arm, trial, config) for arm in ARMS}
    keys = ("avg_before", "calls_before", "avg", "calls")
    table = {arm: dict(zip(keys, before + after)) for arm, (before, after) in results.items()}
    calls = {arm: 100 * (row["calls"] - row["calls_before"]) for arm, row in table.items()}
    picture(trial, x="rollout", y="share of right samples", calls=("rollout", "share of answers that call"))
    view.samples(trial.folder)
    more = 100 * (table["right"]["avg"] - table["none"]["avg"])
    return finish(trial, (min(calls["right"], -calls["lies"]), 0.0), table,
                  note=f"(calls without a tool {calls['none']:+.1f}, accuracy above it {more:+.1f})")


if __name__ == "__main__":
    main()
