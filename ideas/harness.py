"""
harness.py: is there anything to see at all? RL against the base it begins from.

No paper. The verdicts of the other files are worth something only where the set-up that they share
(Countdown, the base, 32 problems x 8 samples per rollout) shows a large effect that is known to be
there. So this gain must be larger than the smallest gain of any other CLAIM in points, by its
interval over seeds: `python -m bench ideas --check`. The control is RL on the same rewards, given
to the wrong samples: what it gains is not learned from what was right.

    python -m ideas.harness
    python -m bench ideas --names harness
"""
from dataclasses import dataclass

import numpy as np

from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import flags, positive
from evaluate import evaluate, paired
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="", says="RL beats the base that it begins from",
              measured="accuracy after RL against before", smallest=10.0, harness=True)
ARMS = ("base", "rl", "shuffled")


@dataclass
class Config(Idea):
    task: str = "countdown"              # what is learned
    steps: int = 100                     # rollouts
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW
    asked: int = 300                     # test problems, 16 samples each


def train(arm, trial, config):
    rl = setup(Settings(**trial.settings(algo="dr_grpo")), reward=trial.reward)
    rng = np.random.default_rng(config.seed)
    for step in range(config.steps if arm != "base" else 0):
        groups = []
        for group in collect(rl, next_problems(rl, config.prompts), config.n):
            rewards = [s.reward for s in group]
            order = rng.permutation(len(group)) if arm == "shuffled" else range(len(group))
            for s, i in zip(group, order):
                s.reward = rewards[i]
            advantage(group, rl.config)
            groups.append(group)
        learn(rl, groups)
        trial.point(arm, step, np.mean([s.reward for group in groups for s in group]))
    asked = rl.task.problems("test", config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 16, config.max_new, scores=True)
    close(rl)
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps prompts max_new asked")
    needs(config.task, "reward", "learning needs one")
    trial = begin(config, __file__, CLAIM, ARMS[1:], config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    control, control_se = paired(results["shuffled"], results["base"], "avg")
    table = {arm: {k: result[k] for k in ("avg", "pass@16")} for arm, result in results.items()}
    picture(trial, x="rollout", y="share of right samples")
    return finish(trial, paired(results["rl"], results["base"], "avg"), table,
                  note=f"(shuffled rewards {control:+.1f} +-{control_se:.1f})")


if __name__ == "__main__":
    main()
