"""
treepo.py: sample answers as a tree, and compare each with its siblings (TreePO, arXiv 2508.17445).

A response is sampled in segments. After each one a live path splits, as long as the budget of
leaves lasts, so that what leaves share is decoded once:

    prompt --- a --- b --- c1 .         leaf    path       r   subgroups it stands in
                      \\--- c2 .         c1     a b c1     1   all, those of a, those of a b
            \\-- d .                     c2     a b c2     0   all, those of a, those of a b
                                        d      d          0   all

    advantage = mean over these subgroups of (r - their mean):  c1 = (2/3 + 1/2 + 1/2) / 3
A subgroup of one leaf says nothing and is left out. The root splits into 2 to 8; then each path in
two, while leaves are left, in equal shares; a path that ended hands its two to those that live. If
all ended early, a finished path is cut where one of its segments began, and sampled again from
there (here: to its end, without more splits). Formula and rules of multimodal-art-projection/TreePO,
its configuration "average". Left out: whitening over the batch (advantages stay local to a group),
stopping at repetition, splits weighted by log-probs, DAPO around it.
The paper: 58.2% on math, 46.6% with GRPO, Qwen2.5-7B; sampling then takes 22 to 43% fewer GPU hours
as a tree. Here: each arm until it has decoded as many tokens. What a path is prefilled with again
at each segment is counted apart: an engine that keeps the cache has it for nothing, ours does not.
A path that ends early has no more splits, so leaves are longer than independent samples.
Controls: the tree without subgroups, and with the paths given to other leaves.

    python -m ideas.treepo
"""
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np

from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import die, flags, positive
from evaluate import evaluate, paired
from stages import Settings, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2508.17445", says="trees of samples: 58.2% on math, 46.6% with GRPO, Qwen2.5-7B",
              measured="accuracy of trees against independent samples, at equal decoded tokens", smallest=2.0)
ARMS = ("independent", "tree", "one group", "shuffled")
SPLITS = 2                               # of a path after the root


@dataclass
class Config(Idea):
    task: str = "countdown:search"       # with long answers, that may share a beginning
    tokens: int = 160_000                # decoded tokens of each arm
    prompts: int = 16                    # problems per rollout
    n: int = 8                           # leaves of each
    segment: int = 12                    # tokens
    max_new: int = 192                   # tokens of a leaf, at most
    lr: float = 2e-3                     # AdamW
    asked: int = 300                     # test problems at the end, 4 samples each

    def __post_init__(self):
        super().__post_init__()
        if self.smoke:
            self.tokens, self.segment, self.max_new = 200, 4, 12


# -----------------------------------------------------------------------------
# the idea


def subgroup_advantages(paths, rewards):
    """paths: of each leaf, one tuple of segments"""
    paid = [[] for _ in paths]
    for depth in range(max(map(len, paths))):
        subgroups = defaultdict(list)
        for i, path in enumerate(paths):
            subgroups[path[:depth]].append(i)
        for members in subgroups.values():
            mean = np.mean([rewards[i] for i in members])
            for i in members:
                if depth == 0 or len(members) > 1:
                    paid[i].append(rewards[i] - mean)
    return [float(np.mean(p)) for p in paid]


def children(live, ended, left, first, rng):
    """-> how many continue each of `live` paths. ended: others, since the last split; left: leaves to come"""
    if first:
        return [min(left, int(rng.integers(2, 9)))]
    share, more = divmod(min(left, SPLITS * (live + ended)), live)
    return [share + (i < more) for i in range(live)]


class Trees:
    """The trees of some problems, grown by a segment at a time. ended: {problem: [(leaf, path)]}"""

    def __init__(self, rl, problems, config, rng):
        self.rl, self.problems, self.config, self.rng = rl, problems, config, rng
        self.ended = {p.id: [] for p in problems}
        self.live = {p.id: [([], ())] for p in problems}         # what it begins with, and its path
        self.split = {p.id: 1 for p in problems}                 # paths after the last split
        self.named = Counter()                                   # segments that begin at a path
        self.tokens = Counter()                                  # decoded, prefilled

    def child(self, id, path):
        self.named[id, path] += 1
        return *path, self.named[id, path]

    def sample(self, begun, most):
        """Continues all of begun: {problem: [(what it begins with, its path)]}, up to `most` tokens."""
        self.live = {p.id: [] for p in self.problems}
        resume = {id: [entry for entry, _ in each] for id, each in begun.items() if each}
        asked = [p for p in self.problems if p.id in resume]
        for group in collect(self.rl, asked, 1, resume=resume, max_new=most):
            for s, (entry, path) in zip(group, begun[group[0].problem]):
                before = len(getattr(entry, "tokens", entry))
                self.tokens["decoded"] += len(s.tokens) - before
                self.tokens["prefilled"] += len(s.prompt) + before
                over = s.finished == "stop" or len(s.tokens) >= self.config.max_new
                (self.ended if over else self.live)[s.problem].append((s, path))

    def grow(self):
        c = self.config
        for most in range(c.segment, c.max_new + 1, c.segment):
            begun = {}
            for id, paths in self.live.items():
                ended = self.split[id] - len(paths)
                left = c.n - len(self.ended[id])
                counts = children(len(paths), ended, left, most == c.segment, self.rng) if paths else []
                self.split[id] = sum(counts)
                begun[id] = [(entry, self.child(id, path))
                             for (entry, path), count in zip(paths, counts) for _ in range(count)]
            self.sample(begun, most)
        self.sample({id: [self.cut_again(id) for _ in range(c.n - len(ended))]
                     for id, ended in self.ended.items()}, c.max_new)

    def cut_again(self, id):
        """-> a finished path without its last segments, to be sampled again from there"""
        s, path = self.ended[id][self.rng.integers(len(self.ended[id]))]
        keep = int(self.rng.integers(min(len(path), -(-len(s.tokens) // self.config.segment))))
        end = keep * self.config.segment
        stem = replace(s, tokens=s.tokens[:end], logprobs=s.logprobs[:end], kept=None)
        return stem, self.child(id, path[:keep])


def rollout(arm, rl, problems, config, rng):
    """-> groups with advantages; the tokens that took"""
    trees = Trees(rl, problems, config, rng)
    if arm == "independent":
        trees.sample({p.id: [([], (i,)) for i in range(config.n)] for p in problems}, config.max_new)
    else:
        trees.grow()
    groups = []
    for leaves in trees.ended.values():
        group = [replace(s, index=i) for i, (s, _) in enumerate(leaves)]
        paths = [path for _, path in leaves]
        if arm == "shuffled":
            paths = [paths[i] for i in rng.permutation(len(paths))]
        if arm == "one group":
            paths = [path[:1] for path in paths]
        for s, a in zip(group, subgroup_advantages(paths, [s.reward for s in group])):
            s.advantage = a
        groups.append(group)
    return groups, trees.tokens


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    rl = setup(Settings(**trial.settings(algo="dr_grpo", tokens=config.tokens, steps=config.tokens)),
               reward=trial.reward)
    rng = np.random.default_rng(config.seed)
    taken = Counter()
    while rl.spent < config.tokens:
        groups, tokens = rollout(arm, rl, next_problems(rl, config.prompts), config, rng)
        taken.update(tokens, leaves=sum(map(len, groups)))
        trial.bar.update(min(taken["decoded"], config.tokens) - rl.spent)
        rl.spent = taken["decoded"]
        learn(rl, groups)
        trial.dot("", arm, rl.spent, np.mean([s.reward for group in groups for s in group]))
    asked = rl.task.problems("test", config.asked, config.seed)
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 4, config.max_new, scores=True)
    close(rl)
    leaves = taken["leaves"]
    return result | dict(leaves=leaves, **{k: taken[k] / leaves for k in ("decoded", "prefilled")})


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "tokens prompts n segment max_new asked")
    if config.max_new % config.segment or config.n < 2:
        die(f"--max-new {config.max_new}: give whole segments of --segment {config.segment}; --n: at least 2")
    needs(config.task, "reward", "the leaves are scored by one")
    trial = begin(config, __file__, CLAIM, ARMS, config.tokens)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    table = {arm: {k: result[k] for k in ("avg", "pass@4", "leaves", "decoded", "prefilled")}
             for arm, result in results.items()}
    control = paired(results["tree"], results["one group"], "avg")[0]
    picture(trial, x="decoded tokens", y="share of right samples")
    return finish(trial, paired(results["tree"], results["independent"], "avg"), table,
                  note=f"({control:+.1f} against one group)")


if __name__ == "__main__":
    main()
