"""
evolve.py: how much of each model goes into one, searched by evolution (2403.13187), and what a
tenth of its evaluations can do (MERGE^3, 2502.10436).

    w_0 + c_1 t_1 + c_2 t_2 + c_3 t_3         t_i: what RL on task i changed; c: searched by CMA-ES

Each c has to be tried on problems, and that is all the cost. MERGE^3 tries it on few, and says what
the others would be: problem j is right for a model of abilities h with the chance sigmoid(a_j h -
b_j), a, b and h fitted to the answers of models that are known (here the start, and the three runs
on their way). The h of a merge is a mix of its models', fitted to its answers on the few (here with
a prior at their mean). Its accuracy is that of the answers on what was seen, and of the chances on
what was not (mp-IRT, as in the published program).

Arms: `mean` is c = 1/3; `all` searches on all problems; `irt` on a tenth, drawn at random; the
control, `few`, on the same tenth by its share of right answers: if that ends as high, item response
is not what saves. The answers of known models are not counted: in the paper they are public. First
paper: a merge of 7B models above earlier ones of 70B in Japanese. Second: as good with 50 times
fewer evaluations. Left out: stacks of layers, TIES and DARE, hundreds of known models (here ten).

    python -m ideas.evolve
    python -m bench ideas --names evolve
"""
import statistics
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils import parameters_to_vector

from common.evidence import Claim, Idea, begin, finish, picture
from common.flags import flags, positive
from evaluate import evaluate, paired
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2502.10436", says="item response: as good a merge on 50 times fewer evaluations, 7B",
              measured="mean accuracy on three tasks above the same search without item response",
              smallest=2.0)
TASKS = ("countdown", "arith", "states")
ARMS = ("mean", "all", "irt", "few")
SPREAD = 0.3                             # of the first candidates around 1/3
SKILLS = 2                               # dimensions of an ability: with one, any ability is a mix


@dataclass
class Config(Idea):
    steps: int = 60                      # rollouts of RL on each task
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW
    tried: int = 60                      # coefficients that a search tries
    asked: int = 200                     # problems of each task to search on, and others for the test


# -----------------------------------------------------------------------------
# evolution, and item response


def search(value, middle, spread, total, seed):
    """CMA-ES (1604.00772, rank mu): candidates come from a normal distribution, which moves to the better
    half of them, takes their shape, and widens while it walks in one direction. -> its middle at the end"""
    n = len(middle)
    rng = np.random.default_rng(seed)
    size = 4 + int(3 * np.log(n))
    weights = np.log((size + 1) / 2) - np.log(np.arange(1, size // 2 + 1))
    weights /= weights.sum()
    mass = 1 / (weights**2).sum()
    walk = (mass + 2) / (n + mass + 5)
    turn = 2 * (mass - 2 + 1 / mass) / ((n + 2) ** 2 + mass)
    chance = np.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))    # the length of a path without a direction
    shape = np.eye(n)
    path = np.zeros(n)                                           # where the shape is round
    for _ in range(max(1, total // size)):
        drawn = rng.multivariate_normal(middle, spread**2 * shape, size)
        order = np.argsort([-value(c) for c in drawn])
        moves = (drawn[order[:len(weights)]] - middle) / spread
        move = weights @ moves
        lengths, axes = np.linalg.eigh(shape)
        straight = axes @ (axes.T @ move / np.sqrt(lengths))
        path = (1 - walk) * path + np.sqrt(walk * (2 - walk) * mass) * straight
        middle = middle + spread * move
        shape = (1 - turn) * shape + turn * (moves.T * weights) @ moves
        spread *= np.exp(walk / (1 + walk) * (np.linalg.norm(path) / chance - 1))
    return middle


def items(right_MN):
    """right: 0 or 1 of M known models on N problems -> a_j h of each model (M, N), and b (N)"""
    M, N = right_MN.shape
    rand = torch.Generator().manual_seed(0)
    middle = torch.eye(SKILLS)[:, :1]                    # of a: the first ability helps everywhere
    h = torch.randn(M, SKILLS, generator=rand) * 0.1
    a = torch.randn(SKILLS, N, generator=rand) * 0.1 + middle
    h, a, b = (x.requires_grad_() for x in (h, a, torch.zeros(N)))
    optimizer = torch.optim.Adam([h, a, b], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        # normal priors, or a and b end nowhere where all answers agree
        prior = h.square().sum() + (a - middle).square().sum() + b.square().sum()
        (F.binary_cross_entropy_with_logits(h @ a - b, right_MN, reduction="sum") + prior / 2).backward()
        optimizer.step()
    return (h @ a).detach(), b.detach()


def estimate(right_n, seen, parents_PN, b):
    """-> the accuracy of a merge on all problems, by its answers on some. parents: a_j h of each"""
    mix = middle = torch.ones(len(parents_PN)) / len(parents_PN)
    for _ in range(20):                                  # Newton's steps: the loss is convex in the mix
        chances = (mix @ parents_PN - b).sigmoid()
        slope = parents_PN[:, seen] @ (chances[seen] - right_n) + mix - middle
        bend = (parents_PN * chances * (1 - chances))[:, seen] @ parents_PN[:, seen].t()
        mix = mix - torch.linalg.solve(bend + torch.eye(len(mix)), slope)
    chances = (mix @ parents_PN - b).sigmoid()
    chances[seen] = right_n
    return float(chances.mean())


# -----------------------------------------------------------------------------
# the trial


def run(task, trial, config):
    """-> the run after RL on this task, and its weights at four places, the start first"""
    rl = setup(Settings(**trial.settings(algo="dr_grpo", task=task)), reward=trial.reward)
    path = [parameters_to_vector(rl.model.parameters()).detach()]
    for step in range(1, config.steps + 1):
        groups = list(collect(rl, next_problems(rl, config.prompts), config.n))
        for group in groups:
            advantage(group, rl.config)
        learn(rl, groups)
        if step % max(1, config.steps // 3) == 0:
            path.append(parameters_to_vector(rl.model.parameters()).detach())
        trial.point(task, step, statistics.fmean(s.reward for group in groups for s in group))
    return rl, path


def ask(rl, vector, split, chosen, k, config):
    """-> evaluate() of these weights on some of the problems"""
    weights = list(rl.model.parameters())
    for p, part in zip(weights, vector.split([p.numel() for p in weights])):
        p.data.copy_(part.view(p.shape))
    problems = rl.task.problems(split, config.asked, config.seed)
    problems = [problems[i] for i in chosen]
    return evaluate(rl.sampler, rl.tok, rl.task, rl.workers, problems, k, config.max_new, scores=True)


def right(rl, vector, chosen, config):
    scores = ask(rl, vector, "valid", chosen, 1, config)["scores"]["avg"]
    return torch.tensor([float(score) for score in scores.values()])


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps prompts max_new tried asked")
    tasks = TASKS[:1] if config.smoke else TASKS
    trial = begin(config, __file__, CLAIM, tasks, config.steps)
    runs, paths = zip(*[run(task, trial, config) for task in tasks])
    start = paths[0][0]
    changes = torch.stack([path[-1] for path in paths]) - start
    everything = np.arange(config.asked)
    drawn = np.random.default_rng(config.seed).permutation(config.asked)
    few = np.sort(drawn[:config.asked // 10 or 1])       # answers come by the problems' number
    known = [start, *(vector for path in paths for vector in path[1:])]
    ends = [i * len(paths[0][1:]) for i in range(1, len(tasks) + 1)]     # among the known
    theories = [items(torch.stack([right(rl, w, everything, config) for w in known])) for rl in runs]

    def merged(c):
        return start + torch.tensor(c, dtype=start.dtype) @ changes

    def share(c, chosen):
        return statistics.fmean(float(right(rl, merged(c), chosen, config).mean()) for rl in runs)

    def by_theory(c):
        return statistics.fmean(estimate(right(rl, merged(c), few, config), few, skill[ends], b)
                                for rl, (skill, b) in zip(runs, theories))

    values = {"all": partial(share, chosen=everything), "irt": by_theory,
              "few": partial(share, chosen=few)}
    middle = np.full(len(tasks), 1 / len(tasks))
    best = {"mean": middle}
    for arm, value in values.items():
        best[arm] = search(value, middle, SPREAD, 1 if config.smoke else config.tried, config.seed)
    results, table = {}, {}
    for arm, c in best.items():
        results[arm] = [ask(rl, merged(c), "test", everything, 4, config) for rl in runs]
        table[arm] = dict(zip(tasks, c), avg=statistics.fmean(result["avg"] for result in results[arm]))
    gain = [paired(a, b, "avg") for a, b in zip(results["irt"], results["few"])]
    noise = sum(se**2 for _, se in gain) ** 0.5 / len(tasks)
    above = {arm: 100 * (row["avg"] - table["few"]["avg"]) for arm, row in table.items()}
    for rl in runs:
        close(rl)
    picture(trial, x="rollout", y="share of right samples")
    note = f"(all {above['all']:+.1f}, the mean {above['mean']:+.1f})"
    return finish(trial, (statistics.fmean(one for one, _ in gain), noise), table, note=note)


if __name__ == "__main__":
    main()
