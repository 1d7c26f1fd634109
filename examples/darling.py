"""
darling.py: be right in a way that the others of your group are not (DARLING, arXiv 2509.02534).

A fork of nanorl.py. RL for accuracy alone makes the samples of a group ever more alike: pass@1
rises and pass@k does not. Here a right answer is worth more when few samples of its group gave
it: reward * (G - size of its class) / (G - 1).

    a a a b c x        rewards 1 1 1 1 1 0, G = 6:   3/5 3/5 3/5 5/5 5/5 0

What differs from nanorl.py is `distinctness`, and the lines of the loop around `advantage`. Left
out of the paper: its learned judge of what is "the same". Equal are answers that the task calls
equal (--same classes: 3*12 is 12*3); where a task has no answers to compare, a response is as
distinct as the share of its n-grams that no other has (--same ngrams). The deviation stays out of
the advantage (dr_grpo): it would blow up a group whose right answers are all one answer.

    python examples/darling.py                          two CPU cores; compare with `python nanorl.py`
    python examples/darling.py --same ngrams --name ngrams
    torchrun --nproc_per_node=8 -- examples/darling.py --init DIR --prompts 128
"""

import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

# a script in a folder of its own finds the rest of the repo one floor up
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
from algos import Algo, advantage, check_updates, with_algorithm  # noqa: E402
from common.flags import die, flags, positive, without_effect  # noqa: E402
from common.metrics import sample_rows, status, summary, warnings  # noqa: E402
from common.run import all_sum, progress  # noqa: E402
from rollout import completion  # noqa: E402
from stages import Common, check_flags, collect, due, finish, learn, next_problems  # noqa: E402
from stages import open_run, over, save, setup, share_visits, stop_here, test  # noqa: E402


@dataclass
class Config(Algo, Common):
    """DARLING"""
    name: str = "darling"                # the run: everything it writes lies in runs/NAME
    same: Literal["classes", "ngrams"] = "classes"  # what makes two answers one: the task, or n-grams
    ngram: int = 4                       # tokens of an n-gram
    minibatch: int = 0                   # prompts of one update; 0: all of the step
    steps: int = 120                     # rollouts
    n: int = 16                          # samples per prompt: those that a sample is compared with
    lr: float = 1e-3                     # AdamW
    problems: int = 8192                 # training problems, at most
    eval_every: int = 20                 # steps between evaluations; 0: only before and after
    eval_n: int = 200                    # validation problems of one
    eval_k: int = 16                     # samples of each: pass@k is what this is for
    final_n: int = 1000                  # test problems of the evaluation after


def configure(argv):
    c = flags(Config, argv, __doc__)
    positive(c, "steps prompts max_new problems row_tokens eval_n eval_k final_n save_every ngram workers")
    if c.n < 2:
        die("--n is 1: a group of one has no other to differ from; give at least 2")
    if c.minibatch > c.prompts:
        die(f"--minibatch {c.minibatch} is above --prompts {c.prompts}")
    c = with_algorithm(c)
    without_effect(c, [("ngram", c.same == "ngrams", "it is the n of --same ngrams")])
    check_updates(c)
    check_flags(c)
    return c


# -----------------------------------------------------------------------------
# the idea


def distinctness(group, task, texts, config):
    """-> for each sample of a group: 1 where no other is like it, 0 where all are."""
    if config.same == "classes":
        found = data.classes(task, [task.answer(text) for text in texts])
        size = Counter(found)
        others = len(group) - 1
        # -1, no answer, is no class: its reward is 0 anyway
        return np.array([1.0 if c < 0 else (len(group) - size[c]) / others for c in found])
    grams = [ngrams(s.tokens, config.ngram) for s in group]
    owners = Counter(gram for mine in grams for gram in mine)
    return np.array([sum(owners[gram] == 1 for gram in mine) / len(mine) for mine in grams])


def ngrams(tokens, n):
    return {tuple(tokens[i : i + n]) for i in range(max(1, len(tokens) - n + 1))}


def right_ways(task, texts, rewards):
    """How many different right answers a group holds."""
    found = data.classes(task, [task.answer(text) for text in texts])
    return len({c for c, r in zip(found, rewards) if c >= 0 and r > 0.5})


def mean_over_ranks(values):
    return all_sum(float(sum(values))) / max(1, all_sum(len(values)))


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config and init
    config = configure(argv)
    rl = setup(config)
    config = rl.config
    votes = all(hasattr(rl.task, name) for name in ("answer", "canon", "same"))
    if config.same == "classes" and not votes:
        die(f"--task {config.task} has no answers to compare: give --same ngrams")
    run = open_run(rl, sources=[__file__])
    if rl.step == 0:
        run.metrics(0, **test(rl, run, "eval", "before"))

    # ---- the loop
    bar = progress(config.steps, "darling", rl.step)
    while not over(rl):
        rl.step += 1
        start = time.perf_counter()

        # rollout
        groups, ways, factors = [], [], []
        for group in collect(rl, next_problems(rl, config.prompts), config.n):
            texts = [completion(s, rl.tok) for s in group]
            rewards = [s.reward for s in group]
            factor = distinctness(group, rl.task, texts, config)
            for s, d in zip(group, factor):
                s.reward *= float(d)                             # the advantage sees right and rare
            advantage(group, config)
            for s, r in zip(group, rewards):
                s.reward = r                                     # the log sees right
            groups.append(group)
            ways.append(right_ways(rl.task, texts, rewards) if votes else 0)
            factors += [d for d, r in zip(factor, rewards) if r > 0.5]

        # update
        stats = learn(rl, groups)
        share_visits(rl)

        # log, evaluate, save
        numbers = summary(rl, groups, stats, start)
        numbers |= dict(right_ways=mean_over_ranks(ways), distinct=mean_over_ranks(factors))
        run.log(f"{status(rl.step, config, numbers)}  right ways {numbers['right_ways']:.2f}  "
                f"distinct {numbers['distinct']:.2f}")
        for warning in warnings(rl.history, config):
            run.log(f"  warning: {warning}")
        run.pace(rl.step, rl.steps, numbers)
        bar.update()
        last = over(rl)
        if last:
            numbers |= test(rl, run, "test", "after")
        elif due(rl.step, config.eval_every):
            numbers |= test(rl, run, "eval", "  validation")
        run.metrics(rl.step, **numbers)
        run.samples(sample_rows(rl, groups))
        stopping = run.stopping()
        if last or stopping or due(rl.step, config.save_every):
            save(rl, run)
        if stopping and not last:
            stop_here(rl, run)
    bar.close()
    finish(rl, run)


if __name__ == "__main__":
    main()
