"""
selfplay.py: one model poses problems and solves them (STP, arXiv 2502.00212).

Where most problems are too easy or too hard, few groups teach anything. So the model makes its own:

    Q                  3 7 12=43                a posed problem; ones of the test splits are dropped
    C3 7 12=43:        eight tries              one right of eight: barely solved
    poser              learns what it posed     if 0 < rate of right tries <= 1/4
    solver             learns what was right    of posed problems and of given ones

As in the paper both roles learn by imitating what was accepted (expert iteration), and harder
problems are posed as the solver gets better. Left out of the paper: a seed theorem for each
conjecture (here the prompt is a letter), its filters for trivial and its weights for diverse
conjectures (here no problem counts twice in a round), training anew at the end.
The paper: 28.5% of LeanWorkbook proved, 13.2% by expert iteration before it, 7B. Here: Countdown.
Arms sample as many texts, posed ones included: "expert" imitates right answers to given problems,
"rl" is dr_grpo on them. Control: "any" lets the poser learn whatever was solved at all.
All begin with the same lessons in posing and solving: of what the formats base poses it solves
one in eight at all. Asked are test problems with a target of 60 and more, most of which need a
product.

    python -m ideas.selfplay
    python -m bench ideas --names selfplay
"""
from dataclasses import dataclass, replace

import numpy as np

from common.evidence import Claim, Idea, begin, finish, picture, to_imitate
from common.flags import die, flags, positive
from common.reward import varies
from data import Problem, load
from data.formats import posed
from evaluate import evaluate, paired
from rollout import completion
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2502.00212", says="self-play: 28.5% of LeanWorkbook, expert iteration 13.2%, 7B",
              measured="accuracy on hard test problems against expert iteration, as many samples",
              smallest=2.0)
ARMS = ("rl", "expert", "selfplay", "any")
BARELY = 0.25                            # the highest rate at which a posed problem counts
POSER = 1_000_000                        # the number of "Q" as a problem; posed ones follow
HARD = 60                                # the smallest target of what is asked


@dataclass
class Config(Idea):
    lessons: int = 100                   # steps on texts that pose or solve, before all arms
    steps: int = 60                      # rounds per arm
    prompts: int = 32                    # problems per round; of selfplay some are paid for posing
    n: int = 8                           # tries at each
    posed: int = 32                      # texts that the poser writes per round, a multiple of n
    max_new: int = 48                    # tokens of a text, at most
    lr: float = 2e-3                     # AdamW, of rl
    imitate_lr: float = 2e-3             # of the others
    asked: int = 300                     # hard test problems at the end, 8 samples each

    def __post_init__(self):
        super().__post_init__()
        if self.smoke:
            self.posed, self.lessons = self.n, 2


# -----------------------------------------------------------------------------
# the idea


def pose(rl, count, number):
    """-> all that the poser wrote, and {number of a problem: (the problem, the text that poses it)}"""
    (texts,) = collect(rl, [Problem("Q", id=POSER)], count, reward=False)
    found = {}
    for s in texts:
        problem = posed(completion(s, rl.tok)) if s.finished == "stop" else None
        if problem:
            found.setdefault(problem.prompt, (problem, s))
    first = POSER + 1 + number * count                           # each its own number, in every round
    return texts, {first + i: (replace(problem, id=first + i), s)
                   for i, (problem, s) in enumerate(found.values())}


def counts(rate, arm):
    """Does the poser learn from a problem that this share of the tries solved?"""
    return 0 < rate <= (BARELY if arm == "selfplay" else 1.0)


def imitate(group):
    for s in group:
        s.advantage = float(s.reward > 0.5)


def play(rl, arm, number, config):
    """A round of self-play -> groups with advantages: the solver's, and the poser's at the end"""
    texts, found = pose(rl, config.posed, number)
    room = config.prompts - config.posed // config.n             # what posing took is not there to solve
    chosen = [problem for problem, _ in found.values()][:room // 2]
    problems = chosen + next_problems(rl, room - len(chosen))
    groups = list(collect(rl, problems, config.n))
    for s in texts:
        s.advantage = s.reward = 0.0
    for group in groups:
        imitate(group)
        rate = np.mean([s.reward > 0.5 for s in group])
        if group[0].problem in found and counts(rate, arm):
            _, text = found[group[0].problem]
            text.advantage = text.reward = 1.0
    return groups + [texts]


# -----------------------------------------------------------------------------
# the trial


def lesson(tasks, number, seed, tok):
    """-> 64 texts to be imitated, as groups"""
    groups = []
    for i in range(64):
        prompt, text = tasks[i % len(tasks)].document("train", seed, number * 64 + i)
        groups.append([to_imitate(prompt, text, i, tok)])
    return groups


def taught(trial, config):
    """-> the folder of the model that all arms begin with"""
    # --tis 0: nobody sampled these texts
    settings = trial.settings(init=trial.base("formats"), steps=config.lessons, tis=0.0)
    rl = setup(Settings(**settings), reward=trial.reward)
    tasks = [load("formats:posed"), load("formats:plain")]
    for number in range(config.lessons):
        learn(rl, lesson(tasks, number, config.seed, rl.tok))
    folder = trial.folder / "taught"
    rl.model.save_hf(folder, rl.tok)
    close(rl)
    return str(folder)


def given(rl, arm, config):
    groups = list(collect(rl, next_problems(rl, config.prompts), config.n))
    for group in groups:
        if arm == "rl":
            advantage(group, rl.config)
        else:
            imitate(group)
    return groups


def hard(task, count, seed):
    """-> at most `count` test problems with a high target: about one in eight has one"""
    return [p for p in task.problems("test", 8 * count, seed) if p.data["target"] >= HARD][:count]


def train(arm, trial, config, start):
    settings = trial.settings(init=start, task="countdown", algo="dr_grpo")
    if arm != "rl":
        settings |= dict(lr=config.imitate_lr, aggregate="token")
    rl = setup(Settings(**settings), reward=trial.reward)
    for number in range(config.steps):
        groups = play(rl, arm, number, config) if arm in ("selfplay", "any") else given(rl, arm, config)
        learn(rl, groups)
        solved = groups
        if arm in ("selfplay", "any"):
            *solved, texts = groups
            own = [g for g in solved if g[0].problem > POSER]
            trial.dot("posed", f"{arm}: solved at all", number, share(own, lambda r: r.any()))
            trial.dot("posed", f"{arm}: barely", number, sum(s.reward for s in texts) / max(1, len(own)))
        trial.point(arm, number, np.mean([s.reward for group in solved for s in group]))
        trial.dot("signal", arm, number, share(solved, varies))
    asked = hard(rl.task, config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 8, config.max_new, scores=True)
    usual = rl.task.problems("test", config.asked, config.seed)
    all_avg = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, usual, 4, config.max_new)["avg"]
    close(rl)
    return result | dict(all=all_avg)


def share(groups, what):
    return np.mean([bool(what(np.array([s.reward for s in group]))) for group in groups]) if groups else 0.0


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "lessons steps prompts n posed max_new asked")
    if config.posed % config.n or config.posed // config.n >= config.prompts:
        die(f"--posed {config.posed}: give a multiple of --n {config.n}, below --prompts times it: what is "
            "posed is paid for by problems that are not tried")
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    start = taught(trial, config)
    results = {arm: train(arm, trial, config, start) for arm in ARMS}
    table = {arm: {k: result[k] for k in ("avg", "pass@8", "all")} for arm, result in results.items()}
    others = [f"{arm} {paired(results['selfplay'], results[arm], 'avg')[0]:+.1f}" for arm in ("rl", "any")]
    picture(trial, x="round", y="share of right answers", signal=("round", "groups whose rewards differ"),
            posed=("round", "share of the posed problems"))
    return finish(trial, paired(results["selfplay"], results["expert"], "avg"), table,
                  note=f"(against {', '.join(others)})")


if __name__ == "__main__":
    main()
