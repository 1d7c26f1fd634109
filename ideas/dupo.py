"""
dupo.py: what to put in the place of a group that teaches nothing (DUPO, arXiv 2507.02592).

A group whose samples are all right, or all wrong, has no advantage and no gradient. Late in a run
most are such groups.

    alone        + . - . . + . .      . teaches nothing and stays in the batch (nanorl.py's own)
    resampled    + - + + - + - +      thrown away, others sampled until the batch is full (DAPO)
    duplicated   + - + + - + - +      thrown away, others of the same batch repeated in their place
    dropped      + - +                the control: thrown away, and nothing put there

Duplicating samples no token: the paper sees the batch of DAPO at a third to a half of its time.
But a repeated group is the same gradient again. If every group were repeated as often, the update
would be that of "dropped", exactly: only the divisor and the luck of the draw differ. So "dropped"
says whether the copies do anything.

Left out of the paper (WebSailor): the filter before RL, web search, many turns, the mean over
tokens, the deviation in the advantage, a clip that is higher above than below. The paper: 2 to 3
times faster than DAPO's dynamic sampling, Qwen2.5 as web agents. Here: Countdown, each arm until it
has sampled as many tokens; the right panel is the same by CPU seconds.

    python -m ideas.dupo
    python -m bench ideas --names dupo
"""
import time
from dataclasses import dataclass, replace

import numpy as np

from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import flags, positive
from evaluate import evaluate, paired
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2507.02592", says="duplicating what teaches is 2 to 3 times as fast as sampling more",
              measured="accuracy against resampling, at equal sampled tokens", smallest=2.0)
ARMS = ("alone", "resampled", "duplicated", "dropped")


@dataclass
class Config(Idea):
    task: str = "countdown"              # what is learned
    tokens: int = 250_000                # sampled tokens of each arm
    prompts: int = 32                    # groups per rollout
    n: int = 8                           # samples of each
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW
    asked: int = 400                     # test problems at the end, 8 samples each

    def __post_init__(self):
        super().__post_init__()
        self.tokens = min(self.tokens, 1000) if self.smoke else self.tokens


# -----------------------------------------------------------------------------
# the idea


def teaches(group):
    return any(s.advantage for s in group)


def duplicated(groups, count, rng):
    """-> `count` groups: those given, and some again; none a second time before all were repeated once."""
    copies = []
    while groups and len(groups) + len(copies) < count:
        copies += [groups[i] for i in rng.permutation(len(groups))]
    copies = copies[:count - len(groups)]
    # an address of its own for each copy: groups are put in order by it
    return groups + [[replace(s, visit=s.visit + 1000 + i) for s in group] for i, group in enumerate(copies)]


def batch(arm, rl, config, rng):
    """-> the groups to learn from, and all that were sampled for them"""
    sampled = []
    kept = []
    while True:
        missing = config.prompts - len(kept)
        for group in collect(rl, next_problems(rl, missing), config.n):
            advantage(group, rl.config)
            rl.spent += sum(len(s.tokens) for s in group)
            sampled.append(group)
            if arm == "alone" or teaches(group):
                kept.append(group)
        full = len(kept) == config.prompts or rl.spent >= config.tokens
        if arm != "resampled" or full:
            break
    return duplicated(kept, config.prompts, rng) if arm == "duplicated" else kept, sampled


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    rl = setup(Settings(**trial.settings(algo="dr_grpo", tokens=config.tokens, steps=config.tokens)),
               reward=trial.reward)
    rng = np.random.default_rng(config.seed)
    begun = time.process_time()
    updates = 0
    told = 0
    while rl.spent < config.tokens:
        groups, sampled = batch(arm, rl, config, rng)
        if groups:                                               # none of them may teach
            learn(rl, groups)
            updates += 1
        right = np.mean([s.reward for group in sampled for s in group])
        trial.dot("", arm, rl.spent, right)
        trial.dot("time", arm, time.process_time() - begun, right)
        trial.bar.update(min(rl.spent, config.tokens) - told)
        told = min(rl.spent, config.tokens)
    seconds = time.process_time() - begun
    asked = rl.task.problems("test", config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 8, config.max_new, scores=True)
    close(rl)
    return result | dict(updates=updates, seconds=seconds)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "tokens prompts n max_new asked")
    needs(config.task, "reward", "learning needs one")
    trial = begin(config, __file__, CLAIM, ARMS, config.tokens)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    table = {arm: {k: result[k] for k in ("avg", "pass@8", "updates", "seconds")}
             for arm, result in results.items()}
    others = [f"{arm} {paired(results['duplicated'], results[arm], 'avg')[0]:+.1f}"
              for arm in ("alone", "dropped")]
    picture(trial, x="sampled tokens", y="share of right samples",
            time=("CPU seconds", "share of right samples"))
    return finish(trial, paired(results["duplicated"], results["resampled"], "avg"), table,
                  note=f"(against {', '.join(others)})")


if __name__ == "__main__":
    main()
