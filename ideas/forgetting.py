"""
forgetting.py: what is left of the old when something new is learned? (RL's Razor, arXiv 2509.04259)

One model that knows three tasks is made better at one of them, in three ways that end at the same
accuracy. What happened to the other two?

    rl    samples of its own, paid for being right
    sft   texts that the trained rl model wrote, the right ones: fixed, from elsewhere
    opd   samples of its own, scored token by token by the trained rl model

The paper: at equal accuracy on the new task RL forgets less than SFT (Qwen2.5-3B-Instruct on math,
science and tools), and whatever the method, forgetting follows

    KL(start || now) on prompts of the NEW task

about as a parabola (R^2 0.71 over its language models). Being on-policy is the cause. So opd,
taught by the same model that wrote the texts of sft, is the control: it should forget as little as
rl. "own" is another one: fine-tuning on right texts that the START wrote, fixed, but near to it.

Left out of the paper: sweeps of rates (each arm has one, chosen alike), its oracle, its toy on digits.
Here: the base knows arithmetic, a machine of states, and Countdown, which is the task to improve. The
arms are compared at the highest accuracy that rl and sft both reached; a control shows its end else.

    python -m ideas.forgetting
    python -m bench ideas --names forgetting
"""
from dataclasses import dataclass, replace

import numpy as np

import data
import opd
from common.evidence import Claim, Idea, begin, finish, picture
from common.flags import die, flags, positive
from common.reward import Rewards
from evaluate import evaluate
from stages import (Settings, advantage, close, collect, learn, next_problems, old_logprobs, setup, step,
                    update)

CLAIM = Claim(paper="2509.04259", says="RL forgets less than SFT at equal new accuracy, Qwen2.5-3B-Instruct",
              measured="accuracy kept on the old tasks, RL against SFT on its texts", smallest=2.0)
ARMS = ("rl", "sft", "opd", "own")
NEW = "countdown"
OLD = ("arith", "states")


@dataclass
class Config(Idea):
    steps: int = 60                      # rollouts per arm
    every: int = 10                      # steps between two looks
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 64                    # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW, of rl
    sft_lr: float = 1e-3                 # of sft and own
    opd_lr: float = 2e-3                 # of opd
    asked: int = 150                     # test problems of each task at a look, 4 samples each
    probes: int = 100                    # prompts of the new task for the KL, 4 samples of the start each

    def __post_init__(self):
        super().__post_init__()
        if self.smoke:
            self.probes, self.every = self.prompts, self.steps


# -----------------------------------------------------------------------------
# the idea


def at_accuracy(path, accuracy):
    """path: (new, old, ...) from the start on -> what was left of the old when `new` first reached this"""
    for (before, kept_before, *_), (new, kept, *_) in zip(path, path[1:]):
        if new >= accuracy:
            share = (accuracy - before) / (new - before) if new > before else 1.0
            return kept_before + np.clip(share, 0, 1) * (kept - kept_before)
    return path[-1][1]


def common_accuracy(paths):
    """the highest accuracy on the new task that every path reaches"""
    return min(max(new for new, *_ in path) for path in paths)


def parabola(kls, forgotten):
    """-> R^2 of a x + b x^2 through the start, where nothing is forgotten"""
    x, y = np.array(kls), np.array(forgotten)
    columns = np.stack([x, x**2], axis=1)
    left = y - columns @ np.linalg.lstsq(columns, y, rcond=None)[0]
    spread = np.sum((y - y.mean()) ** 2)
    return 1 - np.sum(left**2) / spread if spread else 0.0


def kl_from_start(rl, probes):
    """probes: groups that the start wrote -> mean over tokens of log start - log now"""
    for s in (s for group in probes for s in group):
        s.advantage = 1.0                                        # or they would be left out
    now = old_logprobs(rl, probes)
    parts = [np.array(s.logprobs) - now[s.problem, s.visit, s.index] for group in probes for s in group]
    return float(np.mean(np.concatenate(parts)))


# -----------------------------------------------------------------------------
# the trial


def look(rl, old, config, probes):
    """-> new accuracy, old accuracy (the mean of the old tasks), KL from the start"""
    found = []
    for task, rewards, asked in old:
        found.append(evaluate(rl.sampler, rl.tok, task, rewards, asked, 4, config.max_new)["avg"])
    asked = rl.task.problems("test", config.asked, config.seed)
    new = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 4, config.max_new)["avg"]
    return new, float(np.mean(found)), kl_from_start(rl, probes)


def right_texts(rl, config):
    """-> right answers of this model to train problems, as many as an arm samples, at most"""
    groups = [group for _ in range(config.steps)
              for group in collect(rl, next_problems(rl, config.prompts), config.n)]
    right = [s for group in groups for s in group if s.reward > 0.5 and s.finished == "stop"]
    return right or die(f"{rl.config.init} wrote no right answer to {NEW}: there is nothing to imitate")


def rounds(arm, rl, config, texts, teacher):
    """Trains; yields after each step."""
    rng = np.random.default_rng(config.seed)
    taught = opd.Config(teacher="teacher", loss="full", tis=0.0)
    size = config.prompts * config.n
    for _ in range(config.steps):
        if arm in ("rl", "opd"):
            groups = list(collect(rl, next_problems(rl, config.prompts), config.n))
        else:
            drawn = rng.integers(len(texts), size=size)
            groups = [[replace(texts[i], problem=number, visit=0, index=0, advantage=1.0)]
                      for number, i in enumerate(drawn)]
        if arm == "opd":
            opd.set_advantages(taught, groups)
            update(rl, groups, opd.make_loss(taught, rl.model, teacher))
            step(rl)
        else:
            for group in groups if arm == "rl" else ():
                advantage(group, rl.config)
            learn(rl, groups)
        yield


def train(arm, trial, config, old, texts=None, teacher=None):
    """-> the run at its end, and its path"""
    rates = dict(rl=config.lr, opd=config.opd_lr)
    own = dict(lr=rates.get(arm, config.sft_lr), aggregate="constant" if arm == "rl" else "token",
               tis=2.0 if arm in rates else 0.0)                 # nobody here sampled the texts of sft
    rl = setup(Settings(**trial.settings(task=NEW, **own)), reward=trial.reward)
    asked = rl.task.problems("valid", config.probes, config.seed)
    probes = list(collect(rl, asked, 4, reward=False, seed=config.seed))
    path = [look(rl, old, config, probes)]
    if arm == "own":
        texts = right_texts(rl, config)
    for number, _ in enumerate(rounds(arm, rl, config, texts, teacher), 1):
        trial.bar.update()
        if number % config.every == 0:
            path.append(look(rl, old, config, probes))
    for new, kept, kl in path:
        trial.dot("", arm, new, kept)
        trial.dot("KL", arm, kl, path[0][1] - kept)
    return rl, path


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps every prompts n max_new asked probes")
    if config.steps % config.every:
        die(f"--steps {config.steps}: give a multiple of --every {config.every}")
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    tasks = {name: data.load(name) for name in OLD}
    old = [(task, Rewards(trial.reward or name, workers=1), task.problems("test", config.asked, config.seed))
           for name, task in tasks.items()]
    run, path = train("rl", trial, config, old)
    paths = {"rl": path}
    texts = right_texts(run, config)
    for arm in ARMS[1:]:
        other, paths[arm] = train(arm, trial, config, old, texts, run.model)
        close(other)
    close(run)
    for _, rewards, _ in old:
        rewards.close()
    accuracy = common_accuracy([paths["rl"], paths["sft"]])      # "own" may not get far
    kept = {arm: at_accuracy(path, accuracy) for arm, path in paths.items()}
    points = [(kl, path[0][1] - left) for path in paths.values() for _, left, kl in path]
    table = {arm: dict(new=path[-1][0], old=path[-1][1], kl=path[-1][2], kept=kept[arm])
             for arm, path in paths.items()}
    table["start"] = dict(new=path[0][0], old=path[0][1], kl=0.0, kept=path[0][1])
    picture(trial, x="accuracy on Countdown", y="accuracy on the old tasks",
            KL=("KL(start || now) per token", "accuracy that was lost"))
    return finish(trial, (100 * (kept["rl"] - kept["sft"]), 0.0), table,
                  note=f"(at {accuracy:.0%} new; opd {100 * (kept['opd'] - kept['sft']):+.1f}, "
                       f"R^2 of forgetting on KL {parabola(*zip(*points)):.2f})")


if __name__ == "__main__":
    main()
