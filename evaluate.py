"""
evaluate.py: how good is a model at a task? avg@k, pass@k, maj@k, each with its standard error.

A score without its noise is a rumour: 200 problems sampled once are +-7 points. So every number here
comes with the standard error over problems, and the noise of the samples is addressed: the same
problems get the same uniforms at every evaluation, and two checkpoints are compared on paired draws.

Left out of the usual recipe: a leaderboard harness, few-shot prompts, a greedy-only score that
hides the spread.

    python evaluate.py --model runs/base --task countdown
    torchrun --nproc_per_node=8 -- evaluate.py --model DIR --task countdown --n 1000 --k 16
"""

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import data
from common import hf
from common.flags import die, flags, positive, truncation
from common.reward import Rewards
from common.run import gather, start
from rollout import Sampler, completion, prompt_ids
from train_gpt import GPT

SEED = 1_000_003                         # far from any training seed: no noise is shared with a rollout


@dataclass
class Config:
    model: str                           # a Hugging Face folder or a run
    task: str = "countdown"              # a task of data/, or a .jsonl file of {prompt, gold?}
    reward: str = ""                     # my.py:score, for prompts of your own; empty: the task's
    split: Literal["train", "valid", "test"] = "test"  # of the task
    n: int = 1000                        # problems
    k: int = 4                           # samples per problem
    max_new: int = 512                   # tokens per sample, at most
    temperature: float = 1.0             # 0: greedy
    top_p: float = 1.0                   # 1: off
    workers: int = 2                     # reward processes
    slots: int = 0                       # rows the sampler decodes at a time; 0: its own choice
    seed: int = 0                        # of the problems
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    threads: int = 0                     # CPU threads; 0: all
    out: str = ""                        # a file for the samples, one JSON line each


def configure(argv):
    """-> Config. What does not go together is refused, with the reason."""
    c = flags(Config, argv, __doc__)
    positive(c, "n k max_new workers")
    truncation(c)
    if c.out and (Path(c.out).is_dir() or not Path(c.out).parent.is_dir()):
        die(f"--out {c.out}: give a file, in a folder that is there")
    return c


def pass_at(n, right, k):
    """
    The chance that k of these n samples, drawn without replacement, hold a right one. Unbiased, which
    1 - (1 - p)^k is not.
    """
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def tally(classes_M, weights_M=None):
    """-> {class: its votes, or their weights}. Class -1, no answer, is no vote."""
    shares = {}
    if weights_M is None:
        weights_M = [1] * len(classes_M)
    for c, w in zip(classes_M, weights_M):
        if c >= 0:
            shares[c] = shares.get(c, 0) + w
    return shares


def largest(shares):
    """The class with most votes; on a tie the smallest number, which was answered first."""
    return max(shares, key=lambda c: (shares[c], -c))


def majority(task, texts, rewards):
    """The reward of the largest class of equivalent answers; 0 without answers."""
    classes = data.classes(task, [task.answer(text) for text in texts])
    votes = tally(classes)
    return rewards[classes.index(largest(votes))] if votes else 0.0


def evaluate(sampler, tok, task, rewards, problems, k, max_new, temperature=1.0, top_p=1.0, seed=SEED,
             samples=None, scores=False):
    """
    -> {avg, avg_se, pass@1..k, maj, maj_se, truncated, no_answer, length}; every rank gets the same.
    rewards: a Rewards. samples: a list that takes one dict per sample, on the rank that drew it.
    scores: adds those of each problem, {metric: {problem: score}}, for paired().
    """
    groups, found = sample_and_score(sampler, tok, rewards, problems, k, max_new, temperature, top_p, seed)
    can_vote = all(hasattr(task, name) for name in ("answer", "canon", "same"))
    by_id = {problem.id: problem for problem in problems}
    rows = []
    for problem, group in groups.items():
        texts = [completion(s, tok) for s in group]
        own = [found[problem, s.index] for s in group]
        rows.append(dict(
            id=problem,
            scores=own,
            length=sum(len(s.tokens) for s in group) / k,
            truncated=sum(s.finished == "length" for s in group) / k,
            no_answer=sum(task.answer(text) is None for text in texts) / k if can_vote else 0.0,
            majority=majority(task, texts, own) if can_vote else math.nan))
        if samples is not None:
            samples += [dict(problem=problem, index=s.index, prompt=by_id[problem].prompt, text=text,
                             reward=reward, finished=s.finished)
                        for s, text, reward in zip(group, texts, own)]
    rows = [row for part in gather(rows) for row in part]
    return summary(sorted(rows, key=lambda row: row["id"]), k, can_vote, scores)


def sample_and_score(sampler, tok, rewards, problems, k, max_new, temperature, top_p, seed):
    """-> {problem: its samples} and {(problem, index): reward}, of the problems that this rank
    sampled."""
    by_id = {problem.id: problem for problem in problems}
    prompts = [prompt_ids(problem, tok) for problem in problems]
    ids = list(by_id)
    groups, scores = {}, {}
    waiting = 0
    for i, group in sampler.stream(prompts, k, max_new, temperature, top_p, seed=seed, ids=ids):
        groups[ids[i]] = group
        for s in group:
            rewards.put((s.problem, s.index), by_id[s.problem], completion(s, tok))
            waiting += 1
    while waiting:
        for key, reward, _ in rewards.get(block=True):
            scores[key] = reward
            waiting -= 1
    return groups, scores


def summary(rows, k, can_vote, scores):
    """The mean of each number over problems, and of the scores the standard error over problems."""
    means = {"avg": [sum(row["scores"]) / k for row in rows]}
    if can_vote:
        means["maj"] = [row["majority"] for row in rows]
    right = [sum(score > 0.5 for score in row["scores"]) for row in rows]
    for j in (1 << e for e in range(1, k.bit_length())):               # 2, 4, 8, ... up to k
        means[f"pass@{j}"] = [pass_at(k, count, j) for count in right]
    result = {"n": len(rows), "k": k}
    for name, values in means.items():
        spread = statistics.stdev(values) if len(values) > 1 else math.nan
        result[name] = statistics.fmean(values)
        result[f"{name}_se"] = spread / math.sqrt(len(values))
    for name in ("truncated", "no_answer", "length"):
        result[name] = statistics.fmean(row[name] for row in rows)
    if scores:
        ids = [str(row["id"]) for row in rows]
        result["scores"] = {name: dict(zip(ids, values)) for name, values in means.items()}
    return result


def paired(after, before, metric="avg"):
    """
    -> (mean, standard error over problems) of after - before in points, from two results with scores.
    Paired: the problems' own difficulty cancels.
    """
    first = before["scores"][metric]
    last = after["scores"][metric]
    gains = [100 * (last[id] - first[id]) for id in first]
    spread = statistics.stdev(gains) if len(gains) > 1 else math.nan
    return statistics.fmean(gains), spread / math.sqrt(len(gains))


def words(result):
    """One line for people."""
    line = f"avg@{result['k']} {result['avg']:.1%} +-{result['avg_se']:.1%}"
    for name in result:
        if name == "maj" or (name.startswith("pass@") and not name.endswith("_se")):
            shown = f"maj@{result['k']}" if name == "maj" else name
            line += f"  {shown} {result[name]:.1%} +-{result[f'{name}_se']:.1%}"
    line += f"  truncated {result['truncated']:.1%}  no answer {result['no_answer']:.1%}"
    return line + f"  length {result['length']:.0f}  ({result['n']} problems)"


def main(argv=None):
    # ---- config and init
    config = configure(argv)
    env = start(config.device, config.dtype, config.threads)
    try:
        folder = hf.find(config.model)
        model = GPT.from_hf(folder, dtype=env.dtype, device=env.device)
        tok = data.tokenizer(folder)
        task = data.load(config.task)
        rewards = Rewards(config.reward or config.task, workers=config.workers)
        problems = task.problems(config.split, config.n, config.seed)
        sampler = Sampler(model, tok.stop, tok, slots=config.slots or None)
        samples = [] if config.out else None
        # ---- sample, score, report
        result = evaluate(sampler, tok, task, rewards, problems, config.k, config.max_new, config.temperature,
                          config.top_p, samples=samples)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    rewards.close()
    if config.out:
        rows = [row for part in gather(samples) for row in part]
    if env.master:
        if config.out:
            with open(config.out, "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)
        print(words(result))
        print(json.dumps({k: round(v, 5) if isinstance(v, float) else v for k, v in result.items()}))
    return result


if __name__ == "__main__":
    main()
