"""
chunks.py: what is each step of a solution worth? Ask rollouts that continue from it (StepWiser,
arXiv 2508.19229, its value half).

GRPO pays all tokens of a response alike. Here it is cut after each step, and M rollouts from there
say how good the place is.

    C3 7 12=43:        12*3=36,      36+7=44
    right afterwards   Q0 = 1/4      Q1 = 3/4        r = 0
    difference              +1/2            -3/4          Q_k - Q_(k-1)
    ratio                   good            bad           good if Q_k / Q_(k-1) > gamma, 0.8

Q0 is the mean of the group, the last value the reward itself. Differences of a response add up to
GRPO's advantage: only their place changes. The labels of "ratio" are +1 and -1, minus their mean at
the group's same step (ours: the paper gives them to its judge).
The same values can search: draw a step, throw it away if no rollout from it is right, draw again.

Left out of the paper: its judge, a language model trained by RL to explain a step and to agree with
such labels (so the verdict is on the values, as in VinePPO); learned segmentation (a step ends at a
comma); its other labels, of which the value plus the progress of the best of n does best, by 1.4
points. M is 16 there, 4 here. The paper: the judge reaches 61.9 on ProcessBench, 39.7 without RL
and explanations, 7B. Here: each arm until it has sampled as many tokens, the rollouts of the values
included. Control: values that belong to another step of the group.

    python -m ideas.chunks
"""
from dataclasses import dataclass

import numpy as np

from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import flags, positive, shares
from evaluate import SEED, evaluate, paired
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2508.19229", says="a judge taught by rollouts from steps: ProcessBench 39.7 to 61.9, 7B",
              measured="accuracy of a step's credit against plain, at equal sampled tokens", smallest=2.0)
ARMS = ("plain", "difference", "ratio", "shuffled")
MARK = ","                               # a step ends with it
TRIES = 5                                # steps that the search draws for a problem, at most


@dataclass
class Config(Idea):
    task: str = "countdown"              # with steps that end at a comma
    tokens: int = 250_000                # sampled tokens of each arm
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    k: int = 4                           # rollouts from the end of a step
    gamma: float = 0.8                   # a step is good if it leaves more than this share of the value
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW
    asked: int = 400                     # test problems at the end, 8 samples each

    def __post_init__(self):
        super().__post_init__()
        self.tokens = min(self.tokens, 200) if self.smoke else self.tokens


# -----------------------------------------------------------------------------
# the idea


def ends(tokens, tok):
    """-> how many tokens there are at the end of each step; the last one ends the response"""
    return [i + 1 for i, t in enumerate(tokens[:-1]) if MARK in tok.decode([t])] + [len(tokens)]


def prefixes(group, tok):
    """-> the different texts that end with a step, of a group; those that several share come once"""
    return sorted({tuple(s.tokens[:end]) for s in group for end in ends(s.tokens, tok)[:-1]})


def values(rl, problems, asked, k, seed=None):
    """asked: {problem: prefixes} -> {(problem, prefix): share of right rollouts from it}, tokens taken"""
    resume = {id: [list(p) for p in each for _ in range(k)] for id, each in asked.items() if each}
    found = {}
    spent = 0
    for group in collect(rl, [p for p in problems if p.id in resume], k, resume=resume, seed=seed):
        id = group[0].problem
        spent += sum(len(s.tokens) - len(prefix) for s, prefix in zip(group, resume[id]))
        for i, prefix in enumerate(asked[id]):
            found[id, prefix] = np.mean([s.reward for s in group[i * k:(i + 1) * k]])
    return found, spent


def difference(path):
    """path: the values before the first step, after it, and so on up to the reward"""
    return np.diff(path)


def ratio(path, gamma):
    return np.where(np.array(path[1:]) > gamma * np.array(path[:-1]), 1.0, -1.0)


def credit(group, known, arm, config, tok, rng):
    """Fills the advantages of a group, one per token. known: values() of its prefixes"""
    mean = np.mean([s.reward for s in group])
    own = {p: value for (id, p), value in known.items() if id == group[0].problem}
    if arm == "shuffled":
        own = dict(zip(own, rng.permutation([*own.values()])))
    cuts = [ends(s.tokens, tok) for s in group]
    paths = [[mean, *(own[tuple(s.tokens[:end])] for end in cut[:-1]), s.reward]
             for s, cut in zip(group, cuts)]
    paid = [ratio(path, config.gamma) if arm == "ratio" else difference(path) for path in paths]
    if arm == "ratio":
        means = [np.mean([p[k] for p in paid if k < len(p)]) for k in range(max(map(len, paid)))]
        paid = [p - means[:len(p)] for p in paid]
    for s, cut, p in zip(group, cuts, paid):
        s.advantage = np.repeat(p, np.diff([0, *cut])).tolist()


# -----------------------------------------------------------------------------
# search


def by_steps(rl, problems, k):
    """A first step that no rollout from it can finish is thrown away, and another one drawn. -> after
    each draw (tokens per problem, share of problems with a right rollout)"""
    spent = 0
    solved = set()
    curve = []
    for turn in range(2 * TRIES)[::2]:
        left = [p for p in problems if p.id not in solved]
        steps = {}
        for (s,) in collect(rl, left, 1, stop_strings=(MARK,), reward=False, seed=SEED + turn):
            spent += len(s.tokens)
            if MARK in rl.tok.decode(s.tokens[-1:]) and len(s.tokens) < rl.config.max_new:
                steps[s.problem] = [tuple(s.tokens)]
        known, tokens = values(rl, left, steps, k, seed=SEED + turn + 1)
        spent += tokens
        solved |= {id for (id, _), value in known.items() if value > 0}
        curve.append((spent / len(problems), len(solved) / len(problems)))
    return curve


def independent(rl, problems, count):
    groups = list(collect(rl, problems, count, seed=SEED))
    tokens = np.cumsum(np.sum([[len(s.tokens) for s in group] for group in groups], axis=0))
    right = np.array([[s.reward > 0.5 for s in group] for group in groups])
    solved = np.logical_or.accumulate(right, axis=1).mean(axis=0)
    return [*zip(tokens / len(problems), solved)]


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    rl = setup(Settings(**trial.settings(algo="dr_grpo", tokens=config.tokens, steps=config.tokens)),
               reward=trial.reward)
    rng = np.random.default_rng(config.seed)
    while rl.spent < config.tokens:
        before = rl.spent
        problems = next_problems(rl, config.prompts)
        groups = list(collect(rl, problems, config.n))
        rl.spent += sum(len(s.tokens) for group in groups for s in group)
        if arm == "plain":
            for group in groups:
                advantage(group, rl.config)
        else:
            cuts = {group[0].problem: prefixes(group, rl.tok) for group in groups}
            known, spent = values(rl, problems, cuts, config.k)
            rl.spent += spent
            for group in groups:
                credit(group, known, arm, config, rl.tok, rng)
        learn(rl, groups)
        rl.step += 1
        trial.dot("", arm, rl.spent, np.mean([s.reward for group in groups for s in group]))
        trial.bar.update(min(rl.spent, config.tokens) - before)
    asked = rl.task.problems("test", config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 8, config.max_new, scores=True)
    if arm == "plain":
        for name, curve in (("by steps", by_steps(rl, asked, config.k)),
                            ("independent", independent(rl, asked, 4 * TRIES))):
            for x, y in curve:
                trial.dot("search", name, x, y)
    close(rl)
    return result | dict(updates=rl.step)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "tokens prompts n k max_new asked")
    shares(config, "gamma")
    needs(config.task, "reward", "the rollouts from a step are scored by one")
    trial = begin(config, __file__, CLAIM, ARMS, config.tokens)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    table = {arm: {k: result[k] for k in ("avg", "pass@8", "updates")} for arm, result in results.items()}
    tokens, solved = trial.panels["search"]["by steps"][-1]
    other = np.interp(tokens, *zip(*trial.panels["search"]["independent"]))
    picture(trial, x="sampled tokens", y="share of right samples",
            search=("sampled tokens per problem", "share solved, with the checker"))
    control = paired(results["difference"], results["shuffled"], "avg")[0]
    return finish(trial, paired(results["difference"], results["plain"], "avg"), table,
                  note=f"({control:+.1f} against shuffled; search solves {solved:.0%}, samples {other:.0%})")


if __name__ == "__main__":
    main()
