"""
sdpo.py: a model that is shown a right answer teaches itself without it (SDPO, arXiv 2601.20802).

GRPO pays a whole response alike. Here the same model reads the response again, with a right answer
of its own group in front of it, and says token by token what it would rather have written:

    student   C3 7 12=43:                    12 * 7 = 84 ...         what it sampled
    teacher   E12*3=36,36+7=43|C3 7 12=43:   12 * 7                  the same tokens
                                                  ^ it would have said 3 here

    loss = mean over these tokens of JSD(p, q), p the student, q the teacher, no gradient through q

Formula as in the paper's code (lasgroup/SDPO): Jensen-Shannon with weights 1/2, every sample reads
the first right sample of its group that is not itself, samples without one are left out, the
teacher is a moving average of the student (0.05 a step); no reward besides. "weighted" (SC-SDPO,
arXiv 2605.27765) weighs questions by sqrt(p (1 - p)) of their pass rate p; that the mean weight of a
step is 1 is ours. Left out: top 100 and a tail (here the whole vocabulary), feedback of compilers,
importance weights (one update per rollout), a teacher that is mixed in the logits instead.

The paper: more accurate than GRPO on science, tool use and code, Qwen3-8B and OLMo3-7B among the
models, by how much stands in figures that we could not read; SC-SDPO: 3.2 points above SDPO,
Qwen3-8B. Here: Countdown, from a base that was tuned to read a sibling (data/formats.py). The
control reads a WRONG sibling: it is distilled as much, and knows nothing.

    python -m ideas.sdpo
    python -m bench ideas --names sdpo
"""
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import flags, positive
from common.teacher import sides
from data import begun
from data.formats import sibling
from evaluate import evaluate, paired
from opd import full
from rollout import completion
from stages import Settings, advantage, close, collect, learn, next_problems, setup, step, update

CLAIM = Claim(paper="2601.20802", says="taught by one's own right sibling: above GRPO, Qwen3-8B, OLMo3-7B",
              measured="accuracy against GRPO, at as many samples", smallest=2.0)
ARMS = ("grpo", "sdpo", "weighted", "wrong")
AVERAGE = 0.05                           # how fast the teacher follows the student, per step


@dataclass
class Config(Idea):
    task: str = "countdown"              # whose prompts the base reads behind a sibling
    steps: int = 60                      # rollouts per arm
    prompts: int = 32                    # problems per rollout
    n: int = 8                           # samples of each
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 2e-3                     # AdamW, of grpo
    distill_lr: float = 2e-3             # of the others
    asked: int = 400                     # test problems at the end, 8 samples each


# -----------------------------------------------------------------------------
# the idea


def readers(group, arm):
    """-> [(samples, what their teacher reads)]: the first right sample of the group that is not their
    own. "wrong": the same samples, and the first wrong one."""
    right = [s for s in group if s.reward > 0.5]
    wrong = [s for s in group if s.reward <= 0.5]
    found = {}
    for s in group:
        if any(x is not s for x in right):
            shown = next((x for x in (wrong if arm == "wrong" else right) if x is not s), None)
            if shown:
                found.setdefault(shown.index, []).append(s)
    by_index = {s.index: s for s in group}
    return [(samples, by_index[index]) for index, samples in found.items()]


def question_weights(groups, arm):
    """-> for each question what its loss counts, 1 on average"""
    rates = np.array([np.mean([s.reward > 0.5 for s in group]) for group in groups])
    if arm != "weighted":
        return np.ones(len(groups))
    weights = np.sqrt(rates * (1 - rates))
    return weights / weights.mean() if weights.any() else weights


def lesson(groups, problems, arm, tok):
    """-> the groups to distil, each of one teacher's prompt, and {its number: that prompt}. What the
    loss of a sample counts is its advantage."""
    prompts = {p.id: p.prompt for p in problems}
    parts = []
    contexts = {}
    for group, weight in zip(groups, question_weights(groups, arm)):
        for place, (samples, shown) in enumerate(readers(group, arm)):
            # a problem has two teachers at most: the first right sample reads the second one
            number = -1 - group[0].problem if place else group[0].problem
            text = sibling(prompts[group[0].problem], completion(shown, tok))
            contexts[number] = begun(tok.encode(text), tok)
            for s in samples:
                s.problem = number
                s.advantage = float(weight)
            parts.append(samples)
    return parts, contexts


def make_loss(model, teacher, contexts):
    kind = SimpleNamespace(temperature=1.0, stop=None, divergence="jsd", beta=0.5)

    def loss(batch, hidden_ND, head_VD):
        if not len(batch.targets_N):
            return hidden_ND.sum(), {}
        p, q, _ = sides(model, teacher, batch, hidden_ND, head_VD, contexts)
        apart_N = full(p, q, kind)
        total = (batch.weight_N * batch.advantage_N * apart_N).sum()
        return total, dict(tokens=len(apart_N), apart=apart_N.detach().sum())
    return loss


@torch.no_grad()
def follow(teacher, model):
    for old, new in zip(teacher.parameters(), model.parameters()):
        old.lerp_(new, AVERAGE)


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    settings = trial.settings(init=trial.base("formats"), algo="grpo")
    if arm != "grpo":
        settings |= dict(lr=config.distill_lr, aggregate="token")
    rl = setup(Settings(**settings), reward=trial.reward)
    teacher = deepcopy(rl.model).requires_grad_(False)
    for number in range(config.steps):
        problems = next_problems(rl, config.prompts)
        groups = list(collect(rl, problems, config.n))
        trial.point(arm, number, np.mean([s.reward for group in groups for s in group]))
        if arm == "grpo":
            for group in groups:
                advantage(group, rl.config)
            learn(rl, groups)
            continue
        parts, contexts = lesson(groups, problems, arm, rl.tok)
        stats = update(rl, parts, make_loss(rl.model, teacher, contexts))
        step(rl)
        follow(teacher, rl.model)
        if stats.get("tokens"):
            trial.dot("teacher", arm, number, stats["apart"] / stats["tokens"])
    asked = rl.task.problems("test", config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 8, config.max_new, scores=True)
    close(rl)
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps prompts n max_new asked")
    needs(config.task, "reward", "a sibling is right or wrong by one")
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    table = {arm: {k: result[k] for k in ("avg", "pass@8", "maj")} for arm, result in results.items()}
    others = [f"{arm} {paired(results['sdpo'], results[arm], 'avg')[0]:+.1f}" for arm in ARMS[2:]]
    picture(trial, x="rollout", y="share of right samples",
            teacher=("rollout", "JSD of student and teacher per token"))
    return finish(trial, paired(results["sdpo"], results["grpo"], "avg"), table,
                  note=f"(against {', '.join(others)})")


if __name__ == "__main__":
    main()
