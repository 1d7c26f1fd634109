"""
darling.py: be right in a way that the others of your group are not (DARLING, arXiv 2509.02534).

RL for accuracy alone makes the samples of a group ever more alike: pass@1 rises and pass@k does
not. Here a right answer is worth more when few of its group gave it: reward * (G - size of its
class) / (G - 1).

    a a a b c x        rewards 1 1 1 1 1 0, G = 6:    3/5 3/5 3/5 5/5 5/5 0

If all of a group are one answer, every reward is 0, and so is every advantage: such a group
teaches nothing. The deviation stays out of the advantage (dr_grpo): it would blow up a group whose
right answers are nearly all one answer.

Left out of the paper: its learned judge of what is "the same" (an embedding model of 4B), because
the task can say it (3*12 is 12*3); several updates per rollout.
The paper: higher pass@1 and higher pass@k than GRPO on competition math, Qwen3-4B-Base among the
models; how much higher stands in tables that we could not read. Here: Countdown, which has many
right ways. All arms share the base, the problems, the noise and the number of rollouts; the
questions at the end were seen by none. RL itself makes samples alike, so whatever slows it down
keeps pass@16 high: the gain counts only while accuracy is not down by more than ALLOWED.

    python -m ideas.darling                              all arms, one seed
    python -m bench ideas --names darling                the verdict over seeds
    python -m ideas.darling --init DIR --task math500    your model
"""
from collections import Counter
from dataclasses import dataclass

import numpy as np

import data
from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import flags, positive
from evaluate import evaluate, paired
from rollout import completion
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2509.02534", says="right and rare rewarded: pass@k up, accuracy not down",
              measured="pass@16 against plain RL, or what is left of 1 point of accuracy if that is less",
              smallest=1.0)
# baseline; idea; control: the same weights, dealt out among the right samples of the group
ARMS = ("plain", "darling", "shuffled")
ALLOWED = 1.0                            # points of accuracy


@dataclass
class Config(Idea):
    task: str = "countdown"              # a task that can tell when two answers are the same
    steps: int = 100                     # rollouts per arm
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW, warm-up and decay as in nanorl.py
    asked: int = 300                     # test problems at the end, 16 samples each


# -----------------------------------------------------------------------------
# the idea


def rarity(group, rl):
    """-> for each sample of a group: 1 where no other gave its answer, 0 where all did."""
    found = data.classes(rl.task, [rl.task.answer(completion(s, rl.tok)) for s in group])
    size = Counter(found)
    # -1, no answer, is no class: its reward is 0 anyway
    return np.array([1.0 if c < 0 else (len(group) - size[c]) / (len(group) - 1) for c in found])


def ways(group, rl):
    """How many different right answers a group holds."""
    found = data.classes(rl.task, [rl.task.answer(completion(s, rl.tok)) for s in group])
    return len({c for c, s in zip(found, group) if c >= 0 and s.reward > 0.5})


# -----------------------------------------------------------------------------
# the trial


def paid(group, arm, rl, rng):
    """-> what the samples of a group are paid for being right."""
    if arm == "plain":
        return np.ones(len(group))
    weights = rarity(group, rl)
    if arm == "shuffled":
        right = [i for i, s in enumerate(group) if s.reward > 0.5]
        weights[right] = rng.permutation(weights[right])
    return weights


def train(arm, trial, config):
    rl = setup(Settings(**trial.settings(algo="dr_grpo")), reward=trial.reward)
    rng = np.random.default_rng(config.seed)
    for step in range(config.steps):
        groups = []
        for group in collect(rl, next_problems(rl, config.prompts), config.n):
            rewards = [s.reward for s in group]
            for s, weight in zip(group, paid(group, arm, rl, rng)):
                s.reward *= weight                               # the advantage sees right and rare
            advantage(group, rl.config)
            for s, reward in zip(group, rewards):
                s.reward = reward                                # the picture shows right
            groups.append(group)
        learn(rl, groups)
        trial.point(arm, step, np.mean([s.reward for group in groups for s in group]))
        trial.dot("ways", arm, step, np.mean([ways(group, rl) for group in groups]))
    asked = rl.task.problems("test", config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 16, config.max_new, scores=True)
    close(rl)
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps prompts max_new asked")
    needs(config.task, "answer canon same", "whoever pays for a rare answer must see when two are the same")
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    more, more_se = paired(results["darling"], results["plain"], "pass@16")
    cost, cost_se = paired(results["darling"], results["plain"], "avg")
    gain = min((more, more_se), (cost + ALLOWED, cost_se))
    table = {arm: {k: result[k] for k in ("avg", "pass@16", "maj")} for arm, result in results.items()}
    picture(trial, x="rollout", y="share of right samples",
            ways=("rollout", "different right answers per group"))
    return finish(trial, gain, table,
                  note=f"(pass@16 {more:+.1f} +-{more_se:.1f}, accuracy {cost:+.1f} +-{cost_se:.1f})")


if __name__ == "__main__":
    main()
