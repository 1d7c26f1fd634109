"""
order.py: can right and wrong answers be batched apart? (A question from a reading list; no paper.)

A rollout is packed into rows. With one update per rollout the order of the rows is nothing: sums
commute. With four, the first update is a quarter of the rows, and the second begins where the
first left the model. pack.plan(order=) has three orders, and the reverse of one is the control:

    length     L L l l | l l s s | ...     long answers first, as nanorl.py packs them: the baseline
    right      + + + + | + + - - | - - - - right ones first, then wrong ones, each in rows of its own
    wrong      - - - - | - - + + | + + + + the control: apart just the same, the other way round
    mixed      + - - + | - + + - | ...     a row of many right ones beside a row of few

Apart, an update only pushes up, or only pushes down, so that what should cancel does not: the
parts of a sentence that right and wrong answers share are pushed far one way, and later back. The
clip of the ratio then cuts what comes back.

All arms share the base, the problems, the noise and the number of rollouts and updates. The
normaliser of an update is the number of its samples.

    python -m ideas.order
    python -m bench ideas --names order
"""
from dataclasses import dataclass

import numpy as np

import pack
from algos import make_loss, weigh
from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import flags, positive
from evaluate import evaluate, paired
from stages import Settings, advantage, close, collect, next_problems, old_logprobs, setup, step

CLAIM = Claim(paper="", says="right and wrong answers in updates of their own learn less than mixed ones",
              measured="accuracy of mixed against right before wrong", smallest=2.0)
ARMS = ("length", "right", "wrong", "mixed")
ORDERS = {"length": "length", "right": "correct", "wrong": "correct", "mixed": "mixed"}
ROW = 512                                # tokens of a packed row: 10 to 20 rows per rollout


@dataclass
class Config(Idea):
    task: str = "countdown"              # what is learned
    steps: int = 100                     # rollouts per arm
    updates: int = 4                     # of a rollout
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 1e-3                     # AdamW
    asked: int = 400                     # test problems at the end, 8 samples each


# -----------------------------------------------------------------------------
# the idea


def rows_in_order(rl, groups, arm):
    """-> the packed rows of a rollout, those that teach, in the order of this arm."""
    weigh(groups, rl.config)                                     # those without an advantage weigh nothing
    rows = pack.batches(groups, ROW, rl.model.config, order=ORDERS[arm])
    return rows[::-1] if arm == "wrong" else rows


def gradient(rl, row, loss):
    """Adds the gradient of a row, as a sum, and its samples to what the step divides by."""
    rl.normaliser += sum(s.divisor for s in row.samples)
    value, stats = loss(row, row.hidden(rl.model), rl.model.head_weight)
    value.backward()
    rl.optimizer.finish_micro_batch()
    return float(stats["clipped"]) / stats["tokens"]


def learn(rl, groups, arm, updates):
    """-> the share of the tokens that the clip cut, of each update."""
    if not any(s.advantage for group in groups for s in group):
        return [0.0]
    loss = make_loss(rl.config, old=old_logprobs(rl, groups))
    rows = rows_in_order(rl, groups, arm)
    cut = []
    parts = np.array_split(np.arange(len(rows)), min(updates, len(rows)))
    for part in parts:
        cut.append(np.mean([gradient(rl, rows[i], loss) for i in part]))
        step(rl, 1 / len(parts))
    return cut


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    rl = setup(Settings(**trial.settings(algo="dr_grpo")), reward=trial.reward)
    for rollout in range(config.steps):
        groups = list(collect(rl, next_problems(rl, config.prompts), config.n))
        for group in groups:
            advantage(group, rl.config)
        cut = learn(rl, groups, arm, config.updates)
        trial.point(arm, rollout, np.mean([s.reward for group in groups for s in group]))
        trial.dot("clip", arm, rollout, np.mean(cut))
    asked = rl.task.problems("test", config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 8, config.max_new, scores=True)
    close(rl)
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps updates prompts n max_new asked")
    needs(config.task, "reward", "learning needs one")
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    table = {arm: {k: result[k] for k in ("avg", "pass@8")} for arm, result in results.items()}
    reverse, noise = paired(results["mixed"], results["wrong"], "avg")
    picture(trial, x="rollout", y="share of right samples",
            clip=("rollout", "share of tokens outside the clip"))
    return finish(trial, paired(results["mixed"], results["right"], "avg"), table,
                  note=f"(against wrong before right {reverse:+.1f} +-{noise:.1f})")


if __name__ == "__main__":
    main()
