"""
evol.py: learn from a vote, but pay more for what was said in another way (EVOL-RL, arXiv 2509.15194).

Test-time RL pays for agreeing with the majority, and the samples grow ever more alike. Here the
vote gives only the sign of the reward, novelty its size:

    agrees with the majority    0.5 ... 1          the more novel, the higher
    another answer              -1 ... -0.5        the more novel, the less punished
    no answer                   -1

    novelty = 1 - (mean similarity to one's own set + highest similarity to any other) / 2

scaled to 0 .. 1 inside each of the two sets of all votes. Formula as in the paper's own code
(YujunZhou/EVOL-RL, semantic_novelty.py): where all of a set are equally novel they stand in the
middle; a set of one counts as novel; a single answer among all votes gets -1, too.

Left out of the paper: its embedding model of 4B (similar here: cosine of counts of three
characters), the bonus on entropy, the small KL, clip-higher (one update per rollout has no clip).
The paper: trained on AIME24 without labels, Qwen3-4B-Base on AIME25: pass@1 4.6 to 16.4, pass@16
18.5 to 37.9, against the vote alone. Here: Countdown, which has many right ways. What is voted on
is the whole solution: inside the majority only the order of numbers and steps can be new, and
another right way is "another answer", which novelty punishes less.
Arms share base, questions, noise and rollouts; test questions that no arm was trained on. Whatever
slows learning down keeps pass@16 high, so the gain is the smaller one of pass@16 and accuracy: the
paper has both. Controls: without novelty; with its rewards dealt out at random inside each set.

    python -m ideas.evol
    python -m bench ideas --names evol
"""
from collections import Counter
from dataclasses import dataclass

import numpy as np

import data
from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import die, flags, positive
from common.reward import varies
from evaluate import evaluate, paired
from rollout import completion
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2509.15194",
              says="vote and novelty: AIME25 pass@1 4.6 to 16.4, pass@16 18.5 to 37.9, Qwen3-4B-Base",
              measured="pass@16 or accuracy, whichever gains less, against the vote alone", smallest=2.0)
ARMS = ("vote", "evol", "signs", "shuffled")     # signs: without novelty
LETTERS = 3                              # of a gram


@dataclass
class Config(Idea):
    task: str = "countdown"              # with answers to vote on, and many right ones
    questions: int = 48                  # that are trained on, without their answers
    passes: int = 10                     # over them
    prompts: int = 24                    # questions per rollout
    votes: int = 32                      # samples of a question
    n: int = 16                          # of them, those that are trained on
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW
    asked: int = 400                     # other test questions at the end, 16 samples each

    def __post_init__(self):
        super().__post_init__()
        if self.smoke:
            self.questions, self.passes, self.votes = 3, 1, 6


# -----------------------------------------------------------------------------
# the idea


def similarity(texts):
    """-> cosine of the counts of three characters, between all texts"""
    grams = [Counter(text[i:i + LETTERS] for i in range(max(1, len(text) - LETTERS + 1))) for text in texts]
    known = {gram: i for i, gram in enumerate(sorted(set().union(*grams)))}
    counts = np.zeros((len(texts), len(known)))
    for row, found in zip(counts, grams):
        for gram, count in found.items():
            row[known[gram]] = count
    counts /= np.linalg.norm(counts, axis=1, keepdims=True)
    return counts @ counts.T


def novelty(similar, sets):
    """sets: to which each belongs. -> its place in its set, 0 .. 1"""
    raw = np.zeros(len(sets))
    others = ~np.eye(len(sets), dtype=bool)
    for i in range(len(sets)):
        own = others[i] & (sets == sets[i])
        near = own if own.any() else others[i]
        raw[i] = 1 - (similar[i, near].mean() + similar[i, others[i]].max()) / 2
    places = np.ones(len(sets))                      # a set of one
    for which in set(sets):
        members = sets == which
        low, high = raw[members].min(), raw[members].max()
        if members.sum() > 1:
            places[members] = (raw[members] - low) / (high - low) if varies(raw[members]) else 0.5
    return places


def evolved(texts, agrees, arm, rng):
    """agrees: True, False, or None without an answer. -> rewards"""
    rewards = np.full(len(texts), -1.0)
    valid = [i for i, a in enumerate(agrees) if a is not None]
    if len(valid) < 2:
        return rewards
    sets = np.array([agrees[i] for i in valid])
    places = novelty(similarity([texts[i] for i in valid]), sets)
    if arm == "signs":
        places[:] = 0.5
    for which in (True, False) if arm == "shuffled" else ():
        places[sets == which] = rng.permutation(places[sets == which])
    rewards[valid] = np.where(sets, 0.5, -1.0) + places / 2
    return rewards


def judge(group, arm, rl, config, rng):
    """Fills the rewards. -> the samples that are trained on; none where nobody answered"""
    texts = [completion(s, rl.tok) for s in group]
    classes = data.classes(rl.task, [rl.task.answer(text) for text in texts])
    votes = Counter(c for c in classes if c >= 0)
    if not votes:
        return []
    winner = max(votes, key=lambda c: (votes[c], -c))
    agrees = [c == winner if c >= 0 else None for c in classes]
    paid = [float(a is True) for a in agrees]
    if arm != "vote":
        paid = evolved(texts, agrees, arm, rng)
    for s, reward in zip(group, paid):
        s.reward = float(reward)
    return group[:config.n]


def ways(group, rl):
    """How many different right answers a group holds."""
    found = data.classes(rl.task, [rl.task.answer(completion(s, rl.tok)) for s in group])
    return len({c for c, s in zip(found, group) if c >= 0 and s.reward > 0.5})


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config, steps):
    task = data.load(config.task)
    problems = task.problems("test", config.questions + config.asked, config.seed)
    mine, others = problems[:config.questions], problems[config.questions:]
    rl = setup(Settings(**trial.settings(algo="grpo", steps=steps)), problems=mine, reward=trial.reward)
    rng = np.random.default_rng(config.seed)
    for step in range(steps):
        groups = []
        right = []
        different = []
        for group in collect(rl, next_problems(rl, config.prompts), config.votes):
            right.append(np.mean([s.reward for s in group]))     # true rewards: for the picture alone
            different.append(ways(group, rl))
            trained = judge(group, arm, rl, config, rng)
            if trained:
                advantage(trained, rl.config)
                groups.append(trained)
        if groups:
            learn(rl, groups)
        trial.point(arm, step, np.mean(right))
        trial.dot("ways", arm, step, np.mean(different))
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, others, 16, config.max_new, scores=True)
    seen = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, mine, 16, config.max_new)
    close(rl)
    return result | {"own avg": seen["avg"], "own pass@16": seen["pass@16"]}


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "questions passes prompts votes n max_new asked")
    if config.n > config.votes:
        die(f"--n {config.n} is above --votes {config.votes}: they are some of these")
    needs(config.task, "answer canon same", "there is a vote on answers")
    steps = max(1, config.passes * config.questions // config.prompts)
    trial = begin(config, __file__, CLAIM, ARMS, steps)
    results = {arm: train(arm, trial, config, steps) for arm in ARMS}
    keys = ("avg", "pass@16", "maj", "own avg", "own pass@16")
    table = {arm: {k: result[k] for k in keys} for arm, result in results.items()}
    more, more_se = paired(results["evol"], results["vote"], "pass@16")
    right, right_se = paired(results["evol"], results["vote"], "avg")
    control = " and ".join(f"{arm} {paired(results['evol'], results[arm], 'pass@16')[0]:+.1f}"
                           for arm in ("signs", "shuffled"))
    picture(trial, x="rollout", y="share of right samples",
            ways=("rollout", f"different right answers in {config.votes}"))
    return finish(trial, min((more, more_se), (right, right_se)), table,
                  note=f"(pass@16 {more:+.1f} +-{more_se:.1f}, accuracy {right:+.1f} +-{right_se:.1f}; "
                       f"pass@16 against {control})")


if __name__ == "__main__":
    main()
