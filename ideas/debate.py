"""
debate.py: answers that have read other answers, both rounds trained (MARTI, and arXiv 2601.22297).

Four answers to a problem; each then reads the three others, and answers again. The second answers
vote. One model plays all of them, and learns in both rounds by its own reward:

    C3 7 12=43:                         12*3=36,36+7=43     four of these
    D<a>;<b>;<c>|C3 7 12=43:            12*3=36,36+7=43     each reads three peers
    vote                                the most frequent second answer

On Countdown there is something to gain: whether a peer ends with 43 can be read, so one right peer
of three is enough, where a vote needs most. A group's baseline is the mean of its round: the four
second answers of a problem have four prompts, and are a group all the same.

MARTI (github.com/TsinghuaC3I/MARTI) claims multi-agent RL above single agents at the same budget,
and 66.7 on AIME with debates; before such training votes win. Self-debate RL (2601.22297) trains
first and debating answers of one model together, and claims better debates than of a model that was
trained on first answers alone; their tables we could not read. Left out: more than two rounds,
roles, rewards for agreeing. Arms sample as many answers. "plain" is dr_grpo with eight first
answers, and at the end votes over eight; "debate" in its row is what it votes if it debates all the
same, without having learned to. The control reads answers to ANOTHER problem. best-of-8 is what a
checker would pick. Equal are sampled answers; reading the peers comes on top.
All begin with the same lessons in reading peers: the formats base alone copies any of them.

    python -m ideas.debate
    python -m bench ideas --names debate
"""
from dataclasses import dataclass, replace

import numpy as np

from common.evidence import Claim, Idea, begin, finish, needs, picture, to_imitate
from common.flags import flags, positive
from data import load
from data.formats import peers
from evaluate import SEED, evaluate, majority, paired, pass_at
from rollout import completion
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="", says="MARTI: trained debates beat single agents on one budget, 66.7 on AIME",
              measured="the vote after a debate against a vote over as many plain answers", smallest=2.0)
ARMS = ("plain", "debate", "strangers")
FOUR = 4                                 # answers of a round
READER = 1_000_000                       # the numbers of second questions begin here


@dataclass
class Config(Idea):
    task: str = "countdown"              # with answers to vote on, whose prompts the base reads behind peers
    lessons: int = 150                   # steps on texts with peers, before all arms
    steps: int = 60                      # rollouts per arm
    prompts: int = 32                    # problems per rollout, eight answers each
    max_new: int = 48                    # tokens of an answer, at most
    lr: float = 2e-3                     # AdamW
    asked: int = 400                     # test problems at the end, eight answers each

    def __post_init__(self):
        super().__post_init__()
        self.max_new = 16 if self.smoke else self.max_new
        self.lessons = min(self.lessons, 2) if self.smoke else self.lessons


# -----------------------------------------------------------------------------
# the idea


def readers(problem, answers):
    """-> a problem for each answer: the same question, behind the three other answers"""
    first = READER + FOUR * problem.id                           # numbers of their own, in every step
    return [replace(problem, id=first + i, prompt=peers(problem.prompt, answers[:i] + answers[i + 1:]))
            for i in range(len(answers))]


def debate(rl, problems, strangers=False, seed=None):
    """-> {problem: its four first answers, and the four after reading}. strangers: what is read are the
    answers to another problem."""
    first = {group[0].problem: group for group in collect(rl, problems, FOUR, seed=seed)}
    texts = {id: [completion(s, rl.tok) for s in group] for id, group in first.items()}
    order = [p.id for p in problems]
    source = dict(zip(order, order[1:] + order[:1])) if strangers else dict(zip(order, order))
    asked = {p.id: readers(p, texts[source[p.id]]) for p in problems}
    again = collect(rl, [p for four in asked.values() for p in four], 1,
                    seed=None if seed is None else seed + 1)
    second = {s.problem: s for (s,) in again}
    return {id: (first[id], [second[p.id] for p in four]) for id, four in asked.items()}


def voted(rl, group):
    """-> the reward of what most of them answered"""
    return majority(rl.task, [completion(s, rl.tok) for s in group], [s.reward for s in group])


# -----------------------------------------------------------------------------
# the trial


def ask(rl, arm, config):
    """-> a result as evaluate()'s: the vote, that after a debate, the mean of the answers of each round, and
    what a checker picks"""
    asked = rl.task.problems("test", config.asked, config.seed)
    found = debate(rl, asked, strangers=arm == "strangers", seed=SEED)
    rewards = {id: [[s.reward for s in four] for four in rounds] for id, rounds in found.items()}
    votes = {str(id): voted(rl, second) for id, (_, second) in found.items()}
    first, second = np.mean([*rewards.values()], axis=(0, 2))
    right = [sum(r > 0.5 for r in one + two) for one, two in rewards.values()]
    vote = np.mean([*votes.values()])
    result = {"maj": vote, "debate": vote, "first": first, "second": second,
              "best of 8": np.mean([pass_at(2 * FOUR, count, 2 * FOUR) for count in right]),
              "scores": {"maj": votes, "debate": votes}}
    if arm == "plain":
        k = 2 * FOUR
        eight = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, k, config.max_new, scores=True)
        result |= {"maj": eight["maj"], "best of 8": eight["pass@8"]}
        result["scores"]["maj"] = eight["scores"]["maj"]
    return result


def rollout(rl, arm, config):
    """-> groups, each with a baseline of its own"""
    problems = next_problems(rl, config.prompts)
    if arm == "plain":
        return list(collect(rl, problems, 2 * FOUR))
    rounds = debate(rl, problems, strangers=arm == "strangers").values()
    return [group for pair in rounds for group in pair]


def lesson(tasks, number, seed, tok):
    """-> 48 texts to be imitated, as groups"""
    groups = []
    for i in range(48):
        prompt, text = tasks[i % len(tasks)].document("train", seed, number * 48 + i)
        groups.append([to_imitate(prompt, text, i, tok)])
    return groups


def taught(trial, config):
    """-> the folder of the model that all arms begin with"""
    # --tis 0: nobody sampled these texts
    settings = trial.settings(init=trial.base("formats"), steps=config.lessons, tis=0.0)
    rl = setup(Settings(**settings), reward=trial.reward)
    tasks = [load(f"formats:{kind}") for kind in ("plain", "peers", "peers", "peers")]
    for number in range(config.lessons):
        learn(rl, lesson(tasks, number, config.seed, rl.tok))
    folder = trial.folder / "taught"
    rl.model.save_hf(folder, rl.tok)
    close(rl)
    return str(folder)


def train(arm, trial, config, start):
    longest = FOUR * config.max_new + 64                         # a prompt with three peers
    rl = setup(Settings(**trial.settings(init=start, algo="dr_grpo")), reward=trial.reward, longest=longest)
    for number in range(config.steps):
        groups = rollout(rl, arm, config)
        for group in groups:
            advantage(group, rl.config)
        learn(rl, groups)
        one, two = (groups, groups) if arm == "plain" else (groups[::2], groups[1::2])
        trial.point(arm, number, np.mean([s.reward for group in one for s in group]))
        trial.dot("second", arm, number, np.mean([s.reward for group in two for s in group]))
    result = ask(rl, arm, config)
    close(rl)
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "lessons steps prompts max_new asked")
    needs(config.task, "answer canon same", "there is a vote on answers")
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    start = taught(trial, config)
    results = {arm: train(arm, trial, config, start) for arm in ARMS}
    keys = ("maj", "debate", "first", "second", "best of 8")
    table = {arm: {k: result[k] for k in keys} for arm, result in results.items()}
    other, _ = paired(results["debate"], results["strangers"], "maj")
    untrained, _ = paired(results["debate"], results["plain"], "debate")
    picture(trial, x="rollout", y="share of right first answers",
            second=("rollout", "share of right second answers"))
    return finish(trial, paired(results["debate"], results["plain"], "maj"), table,
                  note=f"(against strangers {other:+.1f}, plain that debates {untrained:+.1f})")


if __name__ == "__main__":
    main()
