"""
darling.py: be right in a way that the others of your group are not (DARLING, arXiv 2509.02534). A fork of nanorl.py.

RL for accuracy alone makes the samples of a group ever more alike: pass@1 rises and pass@k does not. Here a right answer is worth
more when few siblings gave it: reward * (G - its class) / (G - 1), where its class is how many of the G siblings are equal to it.

    a a a b c x        rewards 1 1 1 1 1 0, G = 6:   3/5 3/5 3/5 5/5 5/5 0

What differs from nanorl.py is `distinctness` and the lines of the loop around `advantage`; everything else is imported. Deleted from
the paper: its learned judge of what is "the same". Equal are answers that the task calls equal (--same classes: 3*12 is 12*3);
where a task has no answers to compare, a response is as distinct as the share of its n-grams that no sibling has (--same ngrams).
The deviation stays out of the advantage (dr_grpo): a group whose right answers are all one answer would otherwise be blown up.

    python examples/darling.py                             two CPU cores, Countdown, beside `python nanorl.py`
    python examples/darling.py --same ngrams --name ngrams
    torchrun --nproc_per_node=8 examples/darling.py --init DIR --prompts 128
"""

import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402  (a script in a folder of its own finds the rest of the house one floor up)
import nanorl  # noqa: E402
from common import view  # noqa: E402
from common.run import Run, all_sum, die, flags, positive  # noqa: E402
from evaluate import completion, evaluate, words  # noqa: E402


@dataclass
class Config:
    name: str = "darling"                # the run: everything it writes lies in runs/NAME
    init: str = "runs/base"              # a Hugging Face folder or a run; runs/base is trained first if it is not there
    task: str = "countdown"              # a task of data/; the word after a colon is its variant
    same: Literal["classes", "ngrams"] = "classes"  # what makes two answers one: the task's equality, or shared n-grams
    ngram: int = 4                       # tokens of an n-gram
    algo: Literal[*nanorl.ALGORITHMS] = "dr_grpo"  # a row of the table in nanorl.py
    minibatch: int = 0                   # prompts of one update; 0: all of the step
    steps: int = 120                     # rollouts
    prompts: int = 32                    # prompts a step, over all ranks
    n: int = 16                          # samples of a prompt: the siblings
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 1e-3                     # AdamW
    row_tokens: int = 4096               # tokens of one packed row of the update
    eval_every: int = 20                 # steps between evaluations; 0: only before and after
    eval_n: int = 200                    # held-out problems of one
    eval_k: int = 16                     # samples of each: pass@k is what this is for
    seed: int = 0                        # problems and samples
    threads: int = 0                     # CPU threads; 0: all cores, shared by the ranks
    device: str = "auto"                 # auto, cpu, cuda, mps


# -----------------------------------------------------------------------------
# the idea


def distinctness(group, task, texts, config):
    """-> for each sample of a group: 1 where no sibling is like it, 0 where all are."""
    if config.same == "classes":
        found = data.classes(task, [task.answer(text) for text in texts])
        size = Counter(found)                                    # -1, no answer, is no class: its reward is 0 anyway
        return np.array([1.0 if c < 0 else (len(group) - size[c]) / (len(group) - 1) for c in found])
    grams = [{tuple(s.tokens[i:i + config.ngram]) for i in range(max(1, len(s.tokens) - config.ngram + 1))} for s in group]
    owners = Counter(gram for mine in grams for gram in mine)
    return np.array([sum(owners[gram] == 1 for gram in mine) / len(mine) for mine in grams])


def right_ways(task, texts, rewards):
    """How many different right answers a group holds."""
    return len({c for c, r in zip(data.classes(task, [task.answer(text) for text in texts]), rewards) if c >= 0 and r > 0.5})


def main(argv=None):
    # ---- config and init
    config = flags(Config, argv, __doc__)
    positive(config, "steps prompts max_new row_tokens eval_n eval_k ngram")
    if config.n < 2:
        die("--n is 1: a sample without siblings is like nobody; give at least 2")
    rl = nanorl.setup(nanorl.Config(**{k: v for k, v in asdict(config).items() if k in nanorl.Config.__dataclass_fields__}))
    votes = all(hasattr(rl.task, name) for name in ("answer", "canon", "same"))
    if config.same == "classes" and not votes:
        die(f"--task {config.task} has no answers to compare: give --same ngrams")
    run = Run(f"runs/{config.name}", config, rl.env, sources=[__file__, nanorl.__file__])
    at, history = 0, []

    def test(name, problems):
        result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, problems, config.eval_k, config.max_new)
        run.log(f"{name}: {words(result)}")
        return {f"{name}/{k}": v for k, v in result.items()}

    # ---- the loop
    run.metrics(0, **test("eval", rl.valid))
    for now in range(1, config.steps + 1):
        clock, groups, ways, factors = time.perf_counter(), [], [], []
        problems, at = nanorl.next_problems(rl, at, config.prompts)
        for group in nanorl.collect(rl, problems, config.n):
            texts, rewards = [completion(s, rl.tok) for s in group], [s.reward for s in group]
            factor = distinctness(group, rl.task, texts, config)
            for s, d in zip(group, factor):
                s.reward = s.reward * float(d)                   # the advantage sees right and rare
            nanorl.advantage(group, rl.config)
            for s, r in zip(group, rewards):
                s.reward = r                                     # the log sees right
            ways.append(right_ways(rl.task, texts, rewards) if votes else 0)
            factors += [d for d, r in zip(factor, rewards) if r > 0.5]
            groups.append(group)
        stats = nanorl.learn(rl, groups)
        nanorl.share_visits(rl)

        # ---- log
        numbers = nanorl.summary(rl, groups, 0, stats, time.perf_counter() - clock)
        numbers["right_ways"] = all_sum(float(sum(ways))) / max(1, all_sum(len(ways)))
        numbers["distinct"] = all_sum(float(sum(factors))) / max(1, all_sum(len(factors)))
        history.append(numbers)
        run.log(f"{nanorl.status(now, config, numbers)}  right ways {numbers['right_ways']:.2f}  distinct {numbers['distinct']:.2f}")
        for warning in nanorl.warnings(history, rl.config):
            run.log(f"  warning: {warning}")
        last = now == config.steps
        if last or (config.eval_every and now % config.eval_every == 0):
            numbers |= test("test", rl.test) if last else test("eval", rl.valid)
        run.metrics(now, **numbers, grad_norm=stats["grad_norm"])
        run.samples(nanorl.sample_rows(rl, now, groups))
        if last or run.stopping():
            run.save(now, lambda folder: rl.model.save_hf(folder, rl.tok), dict(optimizer=rl.optimizer.state_dict(), step=now))
            break
    rl.workers.close()
    if rl.env.master:
        view.pages(run.folder)
    run.log(f"wrote {run.folder}: the model is in ckpt/step_{now} (a Hugging Face folder)")
    run.close()


if __name__ == "__main__":
    main()
