"""
evaluate.py: how good is a model at a task? avg@k, pass@k, maj@k, each with its standard error over problems.

A score without its noise is a rumour: 200 problems sampled once are +-7 points. So every number here comes with the standard
error over problems, and the noise of the samples is addressed: the same problems get the same uniforms at every evaluation, and two
checkpoints are compared on paired draws.

Deleted: no leaderboard harness, no few-shot prompts, no greedy-only score that hides the spread.

    python evaluate.py --model runs/base --task countdown
    torchrun --nproc_per_node=8 -- evaluate.py --model DIR --task countdown --n 1000 --k 16
"""

import json
import math
import statistics
from dataclasses import dataclass

import data
from common import hf
from common.reward import Rewards
from common.run import die, flags, gather, positive, start
from rollout import Sampler
from train_gpt import GPT

SEED = 1_000_003                         # far from any training seed: an evaluation shares no noise with a rollout


@dataclass
class Config:
    model: str                           # a Hugging Face folder or a run
    task: str = "countdown"              # a task of data/, or a .jsonl file of {prompt, gold?}
    reward: str = ""                     # my.py:score, for prompts of your own; empty: the task's
    split: str = "test"                  # train, valid or test
    n: int = 1000                        # problems
    k: int = 4                           # samples of each
    max_new: int = 512                   # tokens of a sample, at most
    temperature: float = 1.0             # 0: greedy
    top_p: float = 1.0                   # 1: off
    workers: int = 2                     # reward processes
    slots: int = 0                       # rows the sampler decodes at a time; 0: its own choice
    seed: int = 0                        # of the problems
    device: str = "auto"                 # auto, cpu, cuda, mps
    dtype: str = "auto"                  # auto, fp32, bf16
    threads: int = 0                     # CPU threads; 0: all
    out: str = ""                        # a file for the samples, one JSON line each


def prompt_ids(problem, tok):
    """A problem's prompt as tokens: as a chat where the problem asks for one, with the beginning-of-text token where there is one."""
    text = tok.chat(problem.data["messages"]) if "messages" in problem.data else problem.prompt
    return data.begun(tok.encode(text), tok)


def completion(sample, tok):
    """The text of a sample without its stop token."""
    return tok.decode(sample.tokens[:-1] if sample.finished == "stop" else sample.tokens)


def pass_at(n, right, k):
    """The chance that k of these n samples, drawn without replacement, hold a right one: unbiased, unlike (1 - (1 - p)^k)."""
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def majority(task, texts, rewards):
    """The reward of the largest class of equivalent answers, the earliest on a tie; nothing answered: 0."""
    classes = data.classes(task, [task.answer(text) for text in texts])
    votes = [c for c in classes if c >= 0]
    if not votes:
        return 0.0
    winner = max(set(votes), key=lambda c: (votes.count(c), -c))
    return rewards[classes.index(winner)]


def evaluate(sampler, tok, task, rewards, problems, k, max_new, temperature=1.0, top_p=1.0, seed=SEED, samples=None):
    """-> {avg, avg_se, pass@1..k, maj, maj_se, truncated, no_answer, length}; every rank gets the same. rewards: a Rewards.
    samples: a list that takes one dict a sample, on the rank that drew it."""
    by_id = {p.id: p for p in problems}
    rows, got, left = [], {p.id: {} for p in problems}, 0
    ids = list(by_id)
    for i, group in sampler.stream([prompt_ids(p, tok) for p in problems], k, max_new, temperature, top_p, seed=seed, ids=ids):
        for s in group:
            rewards.put((s.problem, s.index), by_id[s.problem], completion(s, tok))
            left += 1
        got[ids[i]] = {"group": group}
    while left:
        for (problem, index), reward, _ in rewards.get(block=True):
            got[problem][index] = reward
            left -= 1
    can_vote = all(hasattr(task, name) for name in ("answer", "canon", "same"))
    for problem, found in got.items():
        if not found:
            continue
        group, scores = found["group"], [found[s.index] for s in found["group"]]
        texts = [completion(s, tok) for s in group]
        rows.append(dict(id=problem, scores=scores, length=sum(len(s.tokens) for s in group) / k,
                         truncated=sum(s.finished == "length" for s in group) / k,
                         no_answer=sum(task.answer(t) is None for t in texts) / k if can_vote else 0.0,
                         majority=majority(task, texts, scores) if can_vote else math.nan))
        if samples is not None:
            samples += [dict(problem=problem, index=s.index, prompt=by_id[problem].prompt, text=t, reward=r, finished=s.finished)
                        for s, t, r in zip(group, texts, scores)]
    rows = sorted((row for part in gather(rows) for row in part), key=lambda row: row["id"])
    right = [sum(r > 0.5 for r in row["scores"]) for row in rows]
    result = {"n": len(rows), "k": k}
    means = {"avg": [sum(row["scores"]) / k for row in rows], "maj": [row["majority"] for row in rows]}
    means |= {f"pass@{j}": [pass_at(k, c, j) for c in right] for j in (1 << e for e in range(k.bit_length())) if 1 < j <= k}
    for name, values in means.items():
        if name != "maj" or can_vote:
            result[name] = statistics.fmean(values)
            result[f"{name}_se"] = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    for name in ("truncated", "no_answer", "length"):
        result[name] = statistics.fmean(row[name] for row in rows)
    return result


def words(result):
    """One line for people."""
    line = f"avg@{result['k']} {result['avg']:.1%} +-{result['avg_se']:.1%}"
    for name in result:
        if name == "maj" or (name.startswith("pass@") and not name.endswith("_se")):
            shown = f"maj@{result['k']}" if name == "maj" else name
            line += f"  {shown} {result[name]:.1%} +-{result[f'{name}_se']:.1%}"
    return line + (f"  truncated {result['truncated']:.1%}  no answer {result['no_answer']:.1%}  length {result['length']:.0f}"
                   f"  ({result['n']} problems)")


def main(argv=None):
    # ---- config and init
    config = flags(Config, argv, __doc__)
    positive(config, "n k max_new workers")
    env = start(config.device, config.dtype, config.threads)
    try:
        folder = hf.find(config.model)
        model, tok = GPT.from_hf(folder, dtype=env.dtype, device=env.device), data.tokenizer(folder)
        task = data.load(config.task)
        rewards = Rewards(config.reward or config.task, workers=config.workers)
        problems = task.problems(config.split, config.n, config.seed)
        sampler = Sampler(model, tok.stop, tok, slots=config.slots or None)
        samples = [] if config.out else None
        # ---- sample, score, report
        result = evaluate(sampler, tok, task, rewards, problems, config.k, config.max_new, config.temperature, config.top_p,
                          samples=samples)
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
