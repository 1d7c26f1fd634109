"""
midtrain.py: what a base reads last decides what RL can make of it (OctoThinker, arXiv 2506.20512).

Stable, then decay: one run at a constant rate, and branches of it whose rate goes down to zero over
different texts; then the same RL on each. A branch costs little, so the texts can be chosen.

    plateau   S3 7 12=43:   #12*3=36,36+7=43                                          answers alone
    0%        S3 7 12=43:   #12*3=36,36+7=43
    5, 20%    S3 7 12=43:   12-3=9(9+7=16<9*7=63>)12*3=36(36+7=43#12*3=36,36+7=43     of the documents
    swapped   S3 7 12=43:   (what was thought about another problem)#12*3=36,36+7=43  20% of them

All in one prompt format, or the base without searches would have to guess what it is asked for.
Branches share the plateau and its optimizer, and train on as many tokens, to 2%, in as many steps;
20% of the documents hold half of them. In the control two documents exchange their searches: the
same texts, and no word of help, so what it gains is the format's and the longer sample's. Half of
the searches find the way at once, the others try dead ends first, at random (data/countdown.py).

The paper: Llamas of 1B to 8B, 200B tokens of mathematics at a constant rate, branches of 20B with
short, long, or both kinds of reasoning: 10 to 20% above the Llamas on 13 benchmarks of mathematics,
and after RL level with Qwen2.5; long reasoning makes RL less stable. So say summaries; its tables we
could not read. Left out: web text, instructions, other shares (nobody told us the paper's). Here:
0.5M parameters, Countdown; RL on problems that no document wrote out.

    python -m ideas.midtrain
    python -m bench ideas --names midtrain
"""
import math
import re
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

import numpy as np
import torch

import data
import train_gpt
from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import die, flags, positive
from common.optim import Optimizer
from data.documents import Documents
from evaluate import evaluate, paired
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2506.20512", says="reasoning in the decay: Llamas of 1B to 8B 10 to 20% better on math",
              measured="accuracy after RL, 20% searches in the decay against none", smallest=3.0)
SHARES = {"0%": 0.0, "5%": 0.05, "20%": 0.2, "swapped": 0.2}
SEARCHES = 10_000_000                    # where they begin in the corpus, far from the answers alone


@dataclass
class Config(Idea):
    task: str = "countdown:search"       # a task whose documents search, then answer behind "#"
    steps: int = 600                     # of the plateau, 64 documents each
    decay_steps: int = 400               # of each branch; one has as many tokens as one of the plateau
    rollouts: int = 60                   # of RL, per branch
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 192                   # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW, of RL
    asked: int = 400                     # test problems before and after RL, 4 samples each

    def __post_init__(self):
        super().__post_init__()
        if self.smoke:
            self.decay_steps, self.rollouts, self.max_new = 2, 2, 12


# -----------------------------------------------------------------------------
# the idea


def answer_alone(prompt, text):
    return prompt, "#" + text.rpartition("#")[2]


def exchanged(first, second):
    """-> two documents with each other's search; each keeps its prompt and its answer"""
    (p, text), (q, other) = first, second
    search, _, answer = text.rpartition("#")
    other_search, _, other_answer = other.rpartition("#")
    return (p, f"{other_search}#{answer}"), (q, f"{search}#{other_answer}")


def searches(read, swapped):
    """-> endless documents that search"""
    for i in count(SEARCHES, 2):
        pair = read(i), read(i + 1)
        yield from exchanged(*pair) if swapped else pair


def branch(arm, read, size, first, budget):
    """-> the documents of a decay, which train `budget` tokens together: a search whenever there are
    fewer of them than their share, or else the next answer, from place `first` on.
    read: place in the corpus -> document; size: text -> tokens"""
    long = searches(read, arm == "swapped")
    short = (answer_alone(*read(i)) for i in count(first))
    found = []
    thought = 0
    while budget > 0:
        due = thought < SHARES[arm] * len(found)
        found.append(next(long if due else short))
        thought += due
        budget -= size(found[-1][1])
    return found


# -----------------------------------------------------------------------------
# the trial


def in_rows(texts, document, **changed):
    """-> these documents as train_gpt reads them. changed: of its flags"""
    def read(split, i):
        prompt, text = map(document.tok.encode, texts[i % len(texts)])
        return prompt + text + [*document.tok.stop], [False] * len(prompt) + [True] * (len(text) + 1)
    return Documents(read, replace(document.config, **changed), document.tok)


def pretrain(model, optimizer, rows, total, trial):
    for _ in train_gpt.steps(model, rows, optimizer, total):
        trial.bar.update()


def bases(trial, config):
    """-> {arm: the folder of its base}: the plateau once, then each branch from its end"""
    shape = "--n-layer 1 --d-model 32 --batch 8" if config.smoke else ""
    given = train_gpt.configure([*shape.split(), "--data", config.task, "--seed", str(config.seed)])
    model, document, _ = train_gpt.setup(given, torch.device("cpu"), torch.float32)
    optimizer = Optimizer(model, lr=given.lr, muon_lr=given.muon_lr)
    tok = document.tok
    read = partial(data.load(config.task).document, "train", config.seed)

    def size(text):
        return len(tok.encode(text)) + 1                         # and where it ends

    texts = [answer_alone(*read(i)) for i in range(config.steps * given.batch)]
    pretrain(model, optimizer, in_rows(texts, document, decay=0.0), config.steps, trial)
    fork = deepcopy((model.state_dict(), optimizer.state_dict()))
    budget = sum(size(text) for _, text in texts) / config.steps * config.decay_steps
    folders = {}
    for arm in SHARES:
        weights, state = deepcopy(fork)
        model.load_state_dict(weights)
        optimizer.load_state_dict([state])
        own = branch(arm, read, size, len(texts), budget)
        batch = math.ceil(len(own) / config.decay_steps)
        rows = in_rows(own, document, batch=batch, warmup=0.0, decay=1.0)
        pretrain(model, optimizer, rows, config.decay_steps, trial)
        folders[arm] = str(trial.folder / arm.strip("%"))
        model.save_hf(folders[arm], tok)
    return folders


def reinforce(arm, trial, config, folder):
    """-> results before and after RL"""
    same = {name: getattr(config, name) for name in "task prompts max_new lr seed threads".split()}
    rl = setup(Settings(init=folder, algo="dr_grpo", steps=config.rollouts, workers=1, **same,
                        problems=64 if config.smoke else 8192), reward=trial.reward)
    asked = rl.task.problems("test", config.asked, config.seed)

    def ask():
        return evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 4, config.max_new, scores=True)

    before = ask()
    for number in range(config.rollouts):
        groups = list(collect(rl, next_problems(rl, config.prompts), config.n))
        for group in groups:
            advantage(group, rl.config)
        learn(rl, groups)
        samples = [s for group in groups for s in group]
        trial.point(arm, number, np.mean([s.reward for s in samples]))
        trial.dot("length", arm, number, np.mean([len(s.tokens) for s in samples]))
    after = ask()
    close(rl)
    return before, after


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps decay_steps rollouts prompts n max_new asked")
    from_scratch(config)
    if not re.fullmatch("countdown:search(:[2-8])?", config.task):
        die(f"--task {config.task}: its documents show no search, those of countdown:search do")
    ticks = config.rollouts + config.decay_steps + config.steps // len(SHARES)
    trial = begin(config, __file__, CLAIM, tuple(SHARES), ticks)
    results = {arm: reinforce(arm, trial, config, folder) for arm, folder in bases(trial, config).items()}
    table = {arm: dict(before=before["avg"]) | {k: after[k] for k in ("avg", "pass@4", "length")}
             for arm, (before, after) in results.items()}
    start, none = results["0%"]
    began = paired(results["20%"][0], start, "avg")[0]
    others = [f"{arm} {paired(results[arm][1], none, 'avg')[0]:+.1f}" for arm in ("5%", "swapped")]
    picture(trial, x="rollout", y="share of right samples", length=("rollout", "tokens per sample"))
    return finish(trial, paired(results["20%"][1], none, "avg"), table,
                  note=f"({', '.join(others)}; before RL 20% {began:+.1f})")


if __name__ == "__main__":
    main()
