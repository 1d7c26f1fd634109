"""
xent.py: find the prompt under which a text is likely (reverse prompting, arXiv 2506.06832).

A text s is given, a player writes a prompt x, and a judge, here the model that the player began as,
says what x was worth:

    xed(s | x) = xent(s) - xent(s | x)              xent: the sum of -log p over the tokens of s

    s            R12*3=36,36+7=43:                  the player reads this
    x, honest    C3 7 12=43:                        a problem that s solves
    x, copied    E12*3=36,36+7=43|C9 1 20=5:        s itself, and nothing was understood
Its exploit is to copy, and a rule repairs it: no words of s in x. In the authors' game "condense"
(xentlabs/xent) words that both have are removed from x before it counts. Here words are numbers,
which an honest prompt needs: runs of four tokens are removed instead. Left out: the limit of ten
tokens, other games. xent(s) is taken behind ":", a prompt that says nothing.

The paper proposes such games to measure what models know, and trains none. Here a player learns by
GRPO from its nats alone, after lessons in which most of a prompt is of another text; it is checked
by what no reward saw: is x a problem that s solves? "held" has the rule, "free" has none. Control:
in "other" prompts are paid by what they are worth to another text.

    python -m ideas.xent
    python -m bench ideas --names xent
"""
import re
from dataclasses import dataclass, replace

import numpy as np

from common.evidence import Claim, Idea, begin, finish, picture, to_imitate
from common.flags import flags, positive
from common.hf import find
from data import Problem, load
from data.formats import sibling
from evaluate import paired
from rollout import Sample, completion
from stages import Settings, advantage, close, collect, learn, next_problems, old_logprobs, setup
from train_gpt import GPT

CLAIM = Claim(paper="2506.06832", says="games scored by cross-entropy measure models; none is trained",
              measured="right prompts, paid by their own text's nats against another's", smallest=5.0)
ARMS = ("start", "free", "held", "other")
RUN = 4                                  # tokens in a row that a prompt may not share with its text
OWN = 0.25                               # of what lessons show, this share belongs to the text
EMPTY = ":"                              # a prompt that says nothing
ASKED = re.compile(r"C([0-9]{1,2}(?: [0-9]{1,2})*)=([0-9]{1,2}):$")


@dataclass
class Config(Idea):
    lessons: int = 100                   # steps on prompts of other texts, before all arms
    steps: int = 60                      # rollouts per arm
    prompts: int = 32                    # texts per rollout
    n: int = 8                           # prompts for each
    max_new: int = 28                    # tokens of one, at most
    lr: float = 2e-3                     # AdamW
    asked: int = 300                     # test texts at the end, 8 prompts for each

    def __post_init__(self):
        super().__post_init__()
        if self.smoke:
            self.lessons, self.max_new = 1, 8


# -----------------------------------------------------------------------------
# the idea


def xents(rl, judge, prompts, texts):
    """-> of each text the sum of -log p over its tokens, behind its prompt; both are tokens"""
    groups = [[Sample(x, s, [0.0] * len(s), "stop", i, 0, 0, advantage=1.0)]
              for i, (x, s) in enumerate(zip(prompts, texts))]
    known = old_logprobs(replace(rl, model=judge), groups)
    return np.array([-known[i, 0, 0].sum() for i in range(len(groups))])


def xed(rl, judge, prompts, texts):
    """-> of each text the nats that its prompt saves"""
    empty = rl.tok.encode(EMPTY)
    alone = xents(rl, judge, [empty] * len(texts), texts)
    return alone - xents(rl, judge, [x or empty for x in prompts], texts)


def without_shared(x, s):
    """-> x without the runs of RUN tokens that s has, too"""
    runs = {tuple(s[i:i + RUN]) for i in range(len(s) - RUN + 1)}
    marked = set()
    for i in range(len(x) - RUN + 1):
        if tuple(x[i:i + RUN]) in runs:
            marked |= {*range(i, i + RUN)}
    return [token for i, token in enumerate(x) if i not in marked]


def is_right(prompt, text, task):
    """Does the text solve the problem that this prompt ends in?"""
    found = ASKED.search(prompt)
    facts = found and dict(numbers=[int(x) for x in found[1].split()], target=int(found[2]))
    return bool(found) and task.reward(Problem(prompt, data=facts), text) == 1.0


def pay(arm, rl, judge, groups, texts):
    """Fills the rewards. texts: {problem: the tokens that its prompts are for}"""
    flat = [s for group in groups for s in group]
    prompts = [rl.tok.encode(completion(s, rl.tok)) for s in flat]
    if arm != "free":
        prompts = [without_shared(x, texts[s.problem]) for x, s in zip(prompts, flat)]
    ids = sorted(texts)
    judged = dict(zip(ids, ids[1:] + ids[:1] if arm == "other" else ids))
    scored = [texts[judged[s.problem]] for s in flat]
    for s, nats in zip(flat, xed(rl, judge, prompts, scored)):
        s.reward = float(nats)


# -----------------------------------------------------------------------------
# the trial


def to_read(task, split, n, seed):
    """-> solutions as problems of the player; a solution is the gold"""
    return [Problem(f"R{p.gold}:", p.gold, p.id) for p in task.problems(split, n, seed)]


def lesson(task, number, seed, tok):
    """-> 64 prompts to be imitated, as groups; every other one has a solution in front. The problem, and
    that solution, are of the text that is read with a chance of OWN each, of another text else."""
    rng = np.random.default_rng([seed, number])
    groups = []
    for i in range(64 * number, 64 * number + 64):
        (own, text), (prompt, other) = (task.document("train", seed, 2 * i + k) for k in range(2))
        prompt = own if rng.random() < OWN else prompt
        shown = text if rng.random() < OWN else other
        groups.append([to_imitate(f"R{text}:", sibling(prompt, shown) if i % 2 else prompt, i, tok)])
    return groups


def taught(trial, config):
    """-> the folder of the model that all arms begin with"""
    # --tis 0: nobody sampled these texts
    settings = Settings(**trial.settings(init=trial.base("formats"), steps=config.lessons, tis=0.0))
    rl = setup(settings, reward=trial.reward)
    for number in range(config.lessons):
        learn(rl, lesson(rl.task, number, config.seed, rl.tok))
    folder = str(trial.folder / "taught")
    rl.model.save_hf(folder, rl.tok)
    close(rl)
    return folder


def rate(group, texts, rl):
    """-> the share of its prompts that are right"""
    text = rl.tok.decode(texts[group[0].problem])
    return np.mean([is_right(completion(s, rl.tok), text, rl.task) for s in group])


def ask(rl, judge, config):
    """-> what prompts for the texts of the test are worth"""
    asked = to_read(rl.task, "test", config.asked, config.seed)
    texts = {p.id: rl.tok.encode(p.gold) for p in asked}
    groups = [*collect(rl, asked, 8, reward=False, seed=config.seed)]
    right = {group[0].problem: rate(group, texts, rl) for group in groups}
    pairs = [(rl.tok.encode(completion(s, rl.tok)), texts[s.problem]) for group in groups for s in group]
    copied = np.mean([without_shared(x, s) != x for x, s in pairs])
    nats = float(xed(rl, judge, *zip(*pairs)).mean())
    return dict(right=np.mean([*right.values()]), nats=nats, copied=copied, scores=dict(right=right))


def train(arm, trial, config, start):
    read = to_read(load("countdown"), "train", 64 if config.smoke else 4096, config.seed)
    rl = setup(Settings(**trial.settings(init=start, algo="grpo")), problems=read, reward=trial.reward)
    judge = GPT.from_hf(find(trial.base("formats")))
    for number in range(config.steps if arm != "start" else 0):
        problems = next_problems(rl, config.prompts)
        texts = {p.id: rl.tok.encode(p.gold) for p in problems}
        groups = list(collect(rl, problems, config.n, reward=False))
        pay(arm, rl, judge, groups, texts)
        for group in groups:
            advantage(group, rl.config)
        learn(rl, groups)
        trial.point(arm, number, np.mean([s.reward for group in groups for s in group]))
        trial.dot("right", arm, number, np.mean([rate(group, texts, rl) for group in groups]))
    result = ask(rl, judge, config)
    close(rl)
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "lessons steps prompts n max_new asked")
    trial = begin(config, __file__, CLAIM, ARMS[1:], config.steps)
    start = taught(trial, config)
    results = {arm: train(arm, trial, config, start) for arm in ARMS}
    table = {arm: {k: result[k] for k in ("right", "nats", "copied")} for arm, result in results.items()}
    others = [f"{arm} {paired(results['held'], results[arm], 'right')[0]:+.1f}" for arm in ARMS[:2]]
    picture(trial, x="rollout", y="nats saved, by its own rule", right=("rollout", "share of right prompts"))
    return finish(trial, paired(results["held"], results["other"], "right"), table,
                  note=f"(against {', '.join(others)})")


if __name__ == "__main__":
    main()
