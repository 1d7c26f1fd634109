"""
gzero.py: what a hint changes is a signal, and its answers are better ones (G-Zero, arXiv 2605.09959).

No judge, no vote, no reward. a is an answer without the hint, c one with it:

    H12*3=36|C3 7 12=43:   c        delta = mean log p(a | q) - mean log p(a | q, h)
    C3 7 12=43:            a        large: the hint says that a should have been another answer

    keep the half of the pairs with the lower delta, and prefer c to a, both behind q ALONE:
    loss = -log sigmoid(beta ((log p - log p_start)(c) - (log p - log p_start)(a))), means per token

As in the paper's code (Chengsong-Huang/G-Zero): lengths normalised, beta 2, the upper half of delta
thrown away (a hint that gives the answer away; there of the whole pool, here of each rollout). Left
out: temperature 0.7, filters of malformed texts, and the proposer, a model that learns to write
questions and hints with a large delta. A model of this size cannot write them: hints are the first
steps of known solutions, so this is half of the paper, and less than "zero data".
The paper: Qwen3-8B-Base and Llama-3.1-8B-Instruct improve on chat and on AIME 25 without any verifier; its
tables we could not read. Here: Countdown; asked without hints. Does delta know what is difficult (its
rank correlation with the pass rate without a hint)? Does DPO raise what is right without a hint?
"sft" imitates the same chosen answers; controls: "upper", the half that the paper throws away, and
"stranger", a hint that belongs to another problem.

    python -m ideas.gzero
    python -m bench ideas --names gzero
"""
from dataclasses import dataclass, replace

import numpy as np

from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import die, flags, positive
from data.formats import hint
from evaluate import evaluate, paired
from rollout import prompt_ids
from stages import Settings, close, collect, learn, next_problems, old_logprobs, setup

CLAIM = Claim(paper="2605.09959", says="preferring hinted answers: better without any verifier, 8B",
              measured="accuracy without hints, after DPO against before", smallest=2.0)
ARMS = ("dpo", "sft", "upper", "stranger")
BETA = 2.0


@dataclass
class Config(Idea):
    task: str = "countdown"              # whose prompts the base reads behind a hint, with known solutions
    steps: int = 40                      # updates
    prompts: int = 64                    # pairs of each
    max_new: int = 48                    # tokens of an answer, at most
    lr: float = 5e-4                     # AdamW
    sft_lr: float = 5e-4                 # of sft
    probes: int = 200                    # problems for the rank correlation, 16 samples each
    asked: int = 400                     # test problems at the end, 8 samples each

    def __post_init__(self):
        super().__post_init__()
        if self.smoke:
            self.probes, self.max_new = 6, 16


# -----------------------------------------------------------------------------
# the idea


def hinted(problems, arm="dpo"):
    """-> the same problems behind the first steps of their solutions, or of another's"""
    golds = [p.gold for p in problems]
    if arm == "stranger":
        golds = golds[1:] + golds[:1]
    return [replace(p, prompt=hint(p.prompt, gold.split(",")[0])) for p, gold in zip(problems, golds)]


def mean_logp(rl, samples):
    """-> mean log-prob per token of these samples now, each behind its own prompt"""
    groups = [[replace(s, problem=number, visit=0, index=0, advantage=1.0)]
              for number, s in enumerate(samples)]
    known = old_logprobs(rl, groups)
    return np.array([known[number, 0, 0].mean() for number in range(len(samples))])


def deltas(rl, answers, hints):
    """-> of each answer, how much less likely its hint makes it. hints: as hinted() has them"""
    behind = [replace(s, prompt=prompt_ids(p, rl.tok)) for s, p in zip(answers, hints)]
    return mean_logp(rl, answers) - mean_logp(rl, behind)


def chosen_half(delta, arm):
    """-> the places of the pairs that are kept"""
    order = np.argsort(delta, kind="stable")
    half = max(1, len(order) // 2)
    return order[-half:] if arm == "upper" else order[:half]


def prefer(rl, pairs, started):
    """-> groups whose policy gradient is DPO's: d loss = -beta sigmoid(-beta m) d m, m the difference of
    the means per token. started: mean log-probs of the start, (pairs, 2)"""
    now = mean_logp(rl, [s for pair in pairs for s in pair]).reshape(-1, 2)
    c, a = (now - started).T
    pull = BETA / (1 + np.exp(BETA * (c - a)))
    return [[replace(s, problem=number, visit=0, index=place, advantage=float(sign * x))
             for place, (s, sign) in enumerate(zip(pair, (1, -1)))]
            for number, (pair, x) in enumerate(zip(pairs, pull))]


# -----------------------------------------------------------------------------
# the trial


def ranks(values):
    """Places in order; equal values share the mean of theirs."""
    values = np.array(values)
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def rank_correlation(x, y):
    x, y = ranks(x), ranks(y)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() and y.std() else 0.0


def knows_difficulty(rl, trial, config):
    """-> rank correlation of delta, the mean over 16 answers, with the share of them that is right"""
    problems = rl.task.problems("valid", config.probes, config.seed)
    groups = {g[0].problem: g for g in collect(rl, problems, 16, seed=config.seed)}
    flat = [s for p in problems for s in groups[p.id]]
    hints = [p for p in hinted(problems) for _ in groups[p.id]]
    delta = deltas(rl, flat, hints).reshape(len(problems), -1).mean(1)
    right = [np.mean([s.reward for s in groups[p.id]]) for p in problems]
    for x, y in zip(right, delta):
        trial.dot("delta", "start", x, y)
    return rank_correlation(delta, right)


def make_pairs(rl, arm, config):
    """-> [(with the hint, without)], both behind the plain prompt; all sampled by the start. Answers this
    short are often the same twice: nothing to prefer, so the half is taken of pairs that differ."""
    pairs = []
    for _ in range(20 * config.steps):                           # or until there are enough
        problems = sorted(next_problems(rl, config.prompts), key=lambda p: p.id)
        hints = hinted(problems, arm)
        plain = [g[0] for g in sorted(collect(rl, problems, 1, reward=False), key=lambda g: g[0].problem)]
        shown = [g[0] for g in sorted(collect(rl, hints, 1, reward=False), key=lambda g: g[0].problem)]
        differ = [i for i in range(len(plain)) if plain[i].tokens != shown[i].tokens]
        if differ:
            delta = deltas(rl, [plain[i] for i in differ], [hints[i] for i in differ])
            for i in (differ[place] for place in chosen_half(delta, arm)):
                pairs.append((replace(shown[i], prompt=plain[i].prompt), plain[i]))
        if len(pairs) >= config.steps * config.prompts:
            return pairs
    die(f"a hint changes too few answers: {len(pairs)} pairs that differ in {20 * config.steps} rollouts")


def train(arm, trial, config):
    settings = trial.settings(init=trial.base("formats"), algo="grpo", tis=0.0, decay=0.5)
    if arm == "sft":
        settings["lr"] = config.sft_lr
    longest = 2 * config.max_new + 64
    rl = setup(Settings(**settings), reward=trial.reward, longest=longest)
    asked = rl.task.problems("test", config.asked, config.seed)

    def ask():
        return evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 8, config.max_new, scores=True)

    before = ask() if arm == "dpo" else None                     # all arms begin alike
    known = knows_difficulty(rl, trial, config) if arm == "dpo" else None
    pairs = make_pairs(rl, arm, config)
    started = mean_logp(rl, [s for pair in pairs for s in pair]).reshape(-1, 2)
    for number in range(config.steps):
        own = slice(number * config.prompts, (number + 1) * config.prompts)
        if arm == "sft":
            groups = [[replace(c, problem=place, visit=0, index=0, advantage=1.0)]
                      for place, (c, _) in enumerate(pairs[own])]
        else:
            groups = prefer(rl, pairs[own], started[own])
        learn(rl, groups)
        now = mean_logp(rl, [s for pair in pairs[own] for s in pair]).reshape(-1, 2)
        trial.point(arm, number, np.mean((now - started[own]) @ [1, -1]))
    after = ask()
    close(rl)
    return before, after, known


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps prompts max_new probes asked")
    needs(config.task, "solution", "a hint is the first step of one")
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    start, _, known = results["dpo"]
    ends = {"start": start} | {arm: after for arm, (_, after, _) in results.items()}
    table = {arm: {k: result[k] for k in ("avg", "pass@8", "maj")} for arm, result in ends.items()}
    others = [f"{arm} {paired(ends[arm], start, 'avg')[0]:+.1f}" for arm in ARMS[1:]]
    picture(trial, x="update", y="margin of the chosen answers, nats per token",
            delta=("share of right samples without the hint", "delta, nats per token", "o"))
    return finish(trial, paired(ends["dpo"], start, "avg"), table,
                  note=f"({', '.join(others)}; rank correlation of delta and the pass rate {known:+.2f})")


if __name__ == "__main__":
    main()
