"""
ttrl.py: test-time reinforcement learning (arXiv 2504.16084). A majority vote instead of a label: learn on the very questions of a test,
without their answers.

    sample M answers of a question -> the largest class of equivalent answers is the label -> reward 1 for agreeing with it
    -> N of the M, drawn by lot, are trained on (baseline over the N, label from all M) -> the next questions

It works where a model is right more often than it is wrong in any one way: then the vote is better than a sample, and learning from it
moves every sample towards the vote, and the vote with them. It cannot teach what the model never says, and past its best it only
makes the model sure of itself; so it watches the flips of the majority and its agreement with all earlier votes, keeps the best
state, and stops.

Rules, written down because they decide who wins:
- no answer is no vote: it can never be the label and never agrees with one; a question with fewer than --min-votes votes is skipped;
- answers are one class if the task calls them equal ("1/2" and "0.5" do not split the vote); it joins the first class it equals;
- a tie goes to the class whose first vote has the smallest index, and an index says nothing about length or speed;
- which N of the M are trained on is a seeded lot over indices, never "the first that were ready": those are the short ones.

True labels, where there are any, are for the metrics and for --reward label (the ceiling); `votes` and the judges cannot see them.

Deleted from the usual recipe: a reward for format (agreeing needs a readable answer anyway), a reward model, a validation set with
labels. Where the paper makes one optimizer step a question, this makes one a rollout; its cosine is a line here, and there is no
KL to a reference (0.001 there).

    python ttrl.py                                             a laptop: arithmetic questions, the embedded base
    python ttrl.py --reward label                              the ceiling; also random, has_answer: is it only the format?
    python ttrl.py --data my.jsonl --task gsm8k --init DIR     your questions, answers read as gsm8k reads them
    torchrun --nproc_per_node=8 ttrl.py --preset aime --init DIR         AIME 2024 as in the paper (also amc, math500)
"""

import difflib
import json
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

import data
import nanorl
from common import view
from common.run import Run, all_max, barrier, die, flags, gather, positive, progress
from evaluate import completion, evaluate, words
from nanorl import (advantage, collect, elapsed, make_loss, next_problems, recent, restore, sample_rows, setup, share_visits, step, summary,
                    update, warnings)


@dataclass
class Config:
    name: str = ""                       # the run: everything it writes lies in runs/NAME; empty: ttrl_REWARD
    preset: Literal["", "aime", "amc", "math500"] = ""  # the paper's settings for that test; flags given beside it win
    init: str = "runs/base"              # a Hugging Face folder or a run
    task: str = "arith"                  # a task of data/ with an answer() to vote on; the word after a colon is its variant
    split: Literal["test", "valid", "train"] = "test"  # of the task: where the questions come from
    data: str = ""                       # your own questions instead: a .jsonl file of {prompt, gold?}, answers read as --task reads them
    questions: int = 100                 # to learn on, at most
    unseen: str = ""                     # a task for the questions never trained on; empty: another split of --task
    unseen_n: int = 100                  # of those; 0: none
    votes: int = 64                      # M: samples that vote
    samples: int = 32                    # N: samples of these that are trained on
    min_votes: int = 4                   # a question with fewer readable answers is skipped
    reward: Literal["majority", "label", "random", "has_answer"] = "majority"  # the vote; or a control: true label, a coin, format
    judge: Literal["majority", "weighted", "soft", "abstain"] = "majority"  # how votes are counted; see the four functions
    abstain_share: float = 0.25          # --judge abstain: skip if the largest class has less than this share of the votes
    abstain_entropy: float = 0.8         # or if the votes' entropy is above this share of its maximum
    algo: str = "dr_grpo"                # a row of nanorl.py's table
    aggregate: str = ""                  # its aggregation, if another: token, sequence, constant
    entropy_coef: float = 0.0            # bonus on the entropy of the policy; may be negative
    tis: float = 2.0                     # truncate the importance weight between sampler and trainer here; 0: no weight
    prompts: int = 25                    # questions a step, over all ranks
    passes: int = 18                     # over the questions, at most
    budget: float = 0.0                  # stop before this many seconds of training, evaluation apart; 0: no limit
    patience: int = 3                    # stop after this many passes in a row that changed nothing (see idle); 0: never
    settled: float = 0.02                # that is: this share of the majorities, or fewer, flipped
    max_new: int = 48                    # tokens of a sample, at most; look at `truncated` before anything else
    temperature: float = 1.0             # of the rollout, and of the log-probs that are trained
    top_p: float = 1.0                   # 1: off; otherwise corrected by the mass it kept
    eval_k: int = 16                     # samples of a question in the evaluation before and after
    eval_temperature: float = 1.0        # of these
    eval_top_p: float = 1.0              # of these
    tail_batching: str = "off"           # nothing else: rounds that end early would let the short answers elect the label
    lr: float = 1e-3                     # AdamW
    muon_lr: float = 0.0                 # Muon for the matrices of the blocks, with this learning rate; 0: AdamW for all
    warmup: int = 5                      # steps of linear warm-up
    decay: float = 0.0                   # share of the steps, at the end, with linear decay to zero
    weight_decay: float = 0.0            # decoupled, matrices only
    clip: float = 1.0                    # global norm of the gradient; 0: no clipping
    row_tokens: int = 4096               # tokens of one packed row of the update
    slots: int = 0                       # rows the sampler decodes at a time; 0: from the device
    workers: int = 2                     # processes of each rank that compare with true labels, for the metrics
    save_every: int = 20                 # steps between checkpoints
    seed: int = 0                        # questions, samples and lots
    checkpoint: bool = False             # recompute blocks in the backward: memory for time
    device: str = "auto"                 # auto, cpu, cuda, mps
    dtype: str = "auto"                  # auto (bf16 on CUDA, fp32 elsewhere), fp32, bf16
    threads: int = 0                     # CPU threads; 0: all cores, shared by the ranks
    deterministic: bool | None = None    # repeatable bit for bit; none: on CPU
    resume: bool = False                 # go on with runs/NAME
    wandb: str = ""                      # a wandb project, if curves should go there too


PAPER = ("--votes 64 --samples 32 --min-votes 8 --prompts 8 --algo grpo --aggregate token --lr 5e-7 --weight-decay 0.01 --decay 0.97 "
         "--max-new 3072 --row-tokens 16384 --eval-temperature 0.6 --eval-top-p 0.95 --patience 0 --save-every 40")
PRESETS = {
    "aime": f"{PAPER} --task aime:ttrl --questions 30 --passes 80 --warmup 10 --unseen amc:ttrl",
    "amc": f"{PAPER} --task amc:ttrl --questions 83 --passes 30 --warmup 10 --unseen aime:ttrl",
    "math500": f"{PAPER} --task math500:ttrl --questions 500 --passes 10 --warmup 20 --unseen amc:ttrl",
}


# what nanorl.py's stages read of it, under the same names
SHARED = ("name init task algo aggregate entropy_coef tis prompts max_new temperature top_p lr muon_lr warmup decay weight_decay clip "
          "row_tokens slots workers seed checkpoint device dtype threads deterministic").split()


# -----------------------------------------------------------------------------
# the vote. classes_M: the class of each vote's answer (data.classes), -1 for no answer, which nothing below ever counts


def tally(classes_M, weights_M=None):
    """{class: its votes, or their weights}"""
    shares = {}
    for c, w in zip(classes_M, weights_M if weights_M is not None else [1] * len(classes_M)):
        if c >= 0:
            shares[c] = shares.get(c, 0) + w
    return shares


def largest(shares):
    """The class with most votes; on a tie the smallest number, which is the one that was answered first."""
    return max(shares, key=lambda c: (shares[c], -c))


def vote_entropy(shares):
    """Of the votes over their classes, in nats: 0 if all agree."""
    total = sum(shares.values())
    return -sum(v / total * math.log(v / total) for v in shares.values())


# the judges: (classes_M, logps_M, config) -> (label, rewards_M), or None to abstain. logps_M: mean log-prob of a token of each sample


def majority(classes_M, logps_M, config):
    """The paper's: the largest class is the label, agreeing with it is worth 1."""
    label = largest(tally(classes_M))
    return label, [float(c == label) for c in classes_M]


def weighted(classes_M, logps_M, config):
    """A vote counts as much as the model believed in it: the geometric mean of its tokens' probabilities. (The probability of the
    whole sequence would let the shortest answer outvote all others.)"""
    label = largest(tally(classes_M, np.exp(logps_M)))
    return label, [float(c == label) for c in classes_M]


def soft(classes_M, logps_M, config):
    """No winner takes all: an answer is worth its share of the votes, so a close second still counts."""
    shares = tally(classes_M)
    return largest(shares), [shares.get(c, 0) / sum(shares.values()) for c in classes_M]


def abstain(classes_M, logps_M, config):
    """The majority, where there is one: silent if the largest class is small or the votes are all over the place."""
    shares = tally(classes_M)
    votes = sum(shares.values())
    torn = vote_entropy(shares) > config.abstain_entropy * math.log(max(2, votes))
    if max(shares.values()) < config.abstain_share * votes or torn:
        return None
    return majority(classes_M, logps_M, config)


JUDGES = {"majority": majority, "weighted": weighted, "soft": soft, "abstain": abstain}


def votes(task, texts_M, logps_M, config):
    """What one question's samples say. Sees texts and log-probs, never a true label. rewards_M None: skipped, for `why`."""
    answers_M = [task.answer(text) for text in texts_M]
    classes_M = data.classes(task, answers_M)
    shares = tally(classes_M)
    label, rewards_M = largest(shares) if shares else -1, None   # who leads is a metric even where nobody is rewarded for it
    why = "too_few" if sum(shares.values()) < config.min_votes else ""
    if not why:
        verdict = JUDGES[config.judge](classes_M, logps_M, config)
        label, rewards_M = verdict or (label, None)
        why = "" if verdict else "abstained"
    first = {c: answers_M[classes_M.index(c)] for c in shares}
    return SimpleNamespace(classes_M=classes_M, label=label, rewards_M=rewards_M, why=why, answer=first.get(label),
                           counts=[(first[c], shares[c]) for c in sorted(shares)])


def rewards(config, ballot, truth_M, address):
    """The reward of each sample, None where the question is skipped: the same questions in every arm, or a control would learn from what
    the vote leaves out. Only --reward label looks at the truth."""
    if config.reward == "majority" or ballot.rewards_M is None:
        return ballot.rewards_M
    if config.reward == "label":
        return list(truth_M)
    if config.reward == "random":
        return (np.random.default_rng([*address, 1]).random(len(ballot.classes_M)) < 0.5).astype(float).tolist()
    return [float(c >= 0) for c in ballot.classes_M]             # has_answer: the format alone


def lot(m, n, address):
    """N of the M, by the question's address (seed, problem, visit): no length, no order of arrival has a say."""
    return sorted(np.random.default_rng([*address, 0]).permutation(m)[:n].tolist())


# -----------------------------------------------------------------------------
# metrics: what the votes say, and beside it what true labels say, where there are any


def record(problem, ballot, rewards_M, truth_M):
    """The numbers of one question at one visit. truth_M: nan without labels. With binary rewards for agreeing and a transitive equality
        reward_acc = 1 if the label is right, else 1 - majority_ratio - avg:
    with a wrong label only those are judged wrongly who agreed with it, and those who were right. So a wrong label still rewards
    well where the answers are scattered, and that is why learning from votes works at all."""
    m, counts = len(truth_M), dict(enumerate(n for _, n in ballot.counts))
    size = ballot.classes_M.count(ballot.label) if ballot.label >= 0 else 0
    row = dict(problem=problem, why=ballot.why, answer=ballot.answer, counts=ballot.counts, majority_ratio=size / m,
               answered=sum(counts.values()) / m, vote_entropy=vote_entropy(counts) if counts else math.nan)
    labelled = not any(map(math.isnan, truth_M))
    right = truth_M[ballot.classes_M.index(ballot.label)] > 0.5 if size else False
    row["avg"] = float(np.mean(truth_M))
    row["pass"] = float(max(truth_M) > 0.5) if labelled else math.nan
    row["label_acc"] = float(right) if labelled else math.nan
    row["reward_acc"] = 1 - float(np.mean(np.abs(np.subtract(rewards_M, truth_M)))) if rewards_M else math.nan
    return row


def remember(task, memory, row):
    """Adds to a record what only earlier visits know, then notes this visit.
    flip       the majority is another one than at the last visit
    consensus  the share of today's votes for the winner of ALL votes so far: it rises while the model sharpens and falls when the
               model drifts to something else, however sure of it, since the past still votes. The best state is chosen by it
    extinct    right answers were among the votes of an earlier visit and are not today: what nobody says, nobody can learn"""
    past = memory.setdefault(row["problem"], dict(answer=None, right=False, pool=[]))
    classes = data.classes(task, [answer for answer, _ in past["pool"] + row["counts"]])
    pool, today, kept = {}, {}, {}
    for i, ((answer, n), c) in enumerate(zip(past["pool"] + row["counts"], classes)):
        pool[c] = pool.get(c, 0) + n
        today[c] = today.get(c, 0) + n * (i >= len(past["pool"]))
        kept.setdefault(c, answer)
    votes_today = sum(today.values())
    row["consensus"] = today[largest(pool)] / votes_today * row["answered"] if votes_today else 0.0
    both = past["answer"] is not None and row["answer"] is not None
    row["flips"] = float(not task.same(past["answer"], row["answer"])) if both else math.nan
    row["extinct"] = float(past["right"] and not row["pass"]) if not math.isnan(row["pass"]) else math.nan
    memory[row["problem"]] = dict(answer=row["answer"] if row["answer"] is not None else past["answer"],
                                  right=past["right"] or row["pass"] == 1, pool=[(kept[c], pool[c]) for c in sorted(pool)])
    return row


MEANS = ("majority_ratio", "label_acc", "reward_acc", "avg", "pass", "answered", "vote_entropy", "flips", "extinct", "consensus")


def means(rows):
    """{metric: mean over the questions that have it}; a metric that no question has is left out."""
    found = {k: [row[k] for row in rows if not math.isnan(row.get(k, math.nan))] for k in MEANS}
    out = {k: float(np.mean(v)) for k, v in found.items() if v}
    return out | {why: sum(row["why"] == why for row in rows) for why in ("too_few", "abstained")}


def idle(whole, lowest, config):
    """Did a pass change nothing? The majorities stand, and the votes around them gather by less than 0.03 nats."""
    return whole.get("flips", 1.0) <= config.settled and whole.get("vote_entropy", math.inf) > lowest - 0.03


def ended(config, still, mute, spent, seconds):
    """Why the run is over before its passes are, or nothing. `seconds`: of the last step; the next would take as long."""
    if mute:
        clear = " and a clear majority" if config.judge == "abstain" else ""
        return (f"no question had --min-votes {config.min_votes} readable answers{clear}: look at `truncated` and raise --max-new "
                f"{config.max_new}, or begin with a model that answers in the way --task {config.task} reads")
    if config.patience and still >= config.patience:
        return f"for --patience {still} passes at most {config.settled:.0%} of the majorities flipped and the votes gathered no further"
    if config.budget and spent + seconds > config.budget:
        return f"--budget {config.budget:g} s: {spent:.1f} are spent, another step would pass it"
    return ""


class Graders:
    """Stands before the reward workers: a question without a label is answered at once, with nan."""

    def __init__(self, workers):
        self.workers, self.blank, self.failed, self.close = workers, [], workers.failed, workers.close

    def put(self, key, problem, text):
        if problem.gold is None:
            self.blank.append((key, math.nan, None))
        else:
            self.workers.put(key, problem, text)

    def get(self, block=False):
        blank, self.blank = self.blank, []
        return blank + self.workers.get(block=block and not blank)

    def forget(self):
        self.blank = []
        self.workers.forget()


# -----------------------------------------------------------------------------
# the questions, and the state that is kept


def questions(config):
    """-> (those to learn on, those never trained on). What a user can get wrong about them ends here."""
    try:
        task = data.load(config.task)
        if not all(hasattr(task, name) for name in ("answer", "canon", "same")):
            raise ValueError(f"--task {config.task} has no answer(): nothing to vote on. Give a task that reads answers, and questions "
                             "of your own by --data")
        own = data.load(config.data) if config.data else None
        asked = own.rows[:config.questions] if own else task.problems(config.split, config.questions, config.seed)
        if not asked:
            raise ValueError(f"no questions in the {config.split} split of {config.task}: give another --split or --task")
        unlabelled = sum(p.gold is None for p in asked)
        if config.reward == "label" and unlabelled:
            raise ValueError(f"--reward label, but {unlabelled} of {len(asked)} questions have no gold: vote instead, or add it")
        other = data.load(config.unseen) if config.unseen else task
        split = "test" if config.unseen or config.split != "test" or config.data else "valid"
        known = {p.prompt for p in asked}
        unseen = [p for p in (other.problems(split, config.unseen_n, config.seed) if config.unseen_n else []) if p.prompt not in known]
    except (ValueError, FileNotFoundError) as e:
        die(e)
    return asked, unseen


def take(rl, at, count):
    """The next `count` questions, or fewer at the end of a pass: none is left out, none comes twice in a step."""
    return next_problems(rl, at, min(count, len(rl.problems) - at % len(rl.problems)))[0]


def keep(rl, folder, at):
    """The weights of now as FOLDER/best/step_AT, a Hugging Face folder; those kept before go when these are whole."""
    if rl.env.master:
        best = Path(folder, "best")
        aside, final = best / f"step_{at}.tmp", best / f"step_{at}"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        rl.model.save_hf(aside, rl.tok)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(aside, final)
        for older in best.iterdir():
            if older != final:
                shutil.rmtree(older)
    barrier()


# -----------------------------------------------------------------------------
# before and after


def test(rl, config, problems):
    """avg, maj, pass at --eval-k with standard errors, and each question's own score for the paired comparison. {} without labels."""
    known, samples = [p for p in problems if p.gold is not None], []
    if not known:
        return {}
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, known, config.eval_k, config.max_new, config.eval_temperature,
                      config.eval_top_p, samples=samples)
    scores = {}
    for s in sorted((s for part in gather(samples) for s in part), key=lambda s: (s["problem"], s["index"])):
        scores[str(s["problem"])] = scores.get(str(s["problem"]), 0.0) + s["reward"] / config.eval_k
    return result | {"scores": scores}


def gain(before, after):
    """(mean, standard error over questions) of after - before, paired: the questions' own difficulty cancels."""
    d = [after["scores"][k] - before["scores"][k] for k in before["scores"]]
    return float(np.mean(d)), float(np.std(d, ddof=1) / math.sqrt(len(d))) if len(d) > 1 else math.nan


def report(config, results):
    """The lines that a run ends with."""
    lines, k = [], config.eval_k
    for name, (before, after) in results.items():
        if before:
            d, se = gain(before, after)
            lines += [f"{name}, before: {words(before)}", f"{name}, after:  {words(after)}",
                      f"{name}: avg@{k} {d:+.1%} +-{se:.1%} (paired)"]
    before, after = results["trained"]
    if before:
        verdict = "yes" if after["avg"] > before["maj"] else "no"
        lines.append(f"does avg@{k} after pass maj@{k} before? {verdict}: {after['avg']:.1%} +-{after['avg_se']:.1%} against "
                     f"{before['maj']:.1%} +-{before['maj_se']:.1%}")
    return lines


def beside(config):
    """The controls beside each other: every ended run here that differs from this one in reward, judge or seed alone."""
    free = ("name", "reward", "judge", "seed", "resume", "threads", "workers", "save_every", "wandb")
    rows, like = [], {k: v for k, v in asdict(config).items() if k not in free}
    for path in sorted(Path("runs").glob("*/result.json")):
        other, result = json.loads((path.parent / "config.json").read_text()), json.loads(path.read_text())
        if {k: other.get(k) for k in like} == json.loads(json.dumps(like)):
            rows.append((other["reward"] if other["reward"] != "majority" else f"majority ({other['judge']})", other["seed"], result))
    if len(rows) < 2:
        return []
    lines = [f"beside each other, avg@{config.eval_k} after - before (paired):"]
    ceiling = {seed: result["gain"]["trained"][0] for name, seed, result in rows if name == "label" and "trained" in result["gain"]}
    for name, seed, result in sorted(rows, key=lambda row: row[:2]):
        parts = [f"{where} {d:+.1%} +-{se:.1%}" for where, (d, se) in result["gain"].items()]
        if ceiling.get(seed, 0) > 0 and "trained" in result["gain"]:
            parts.append(f"{result['gain']['trained'][0] / ceiling[seed]:.0%} of the gain with true labels")
        lines.append(f"  {name:<20} seed {seed}  {', '.join(parts)}")
    return lines


def status(at, steps, config, m):
    """One line a step. With labels, the paper's four: is the label right, the reward, a sample, any of them?"""
    known = (f"label right {m['label_acc']:.0%}  reward right {m.get('reward_acc', math.nan):.0%}  avg@{config.votes} {m['avg']:.1%}  "
             f"pass {m['pass']:.0%}  extinct {m['extinct']:.0%}  " if "label_acc" in m else "")
    return (f"step {at}/{steps}  reward {m['reward']:.3f}  majority {m['majority_ratio']:.0%}  {known}flips {m.get('flips', 0):.0%}  "
            f"skipped {m['too_few'] + m['abstained']}  answered {m['answered']:.0%}  truncated {m['truncated']:.0%}  "
            f"length {m['length']:.1f}  entropy {m['entropy']:.3f}  rollout {m['t_rollout']:.2f}s  update {m['t_train']:.2f}s")


# -----------------------------------------------------------------------------


def configure(argv):
    """-> (config, the nanorl.Config that its stages read)."""
    preset = flags(Config, argv, __doc__).preset
    config = flags(Config, PRESETS.get(preset, "").split() + argv, __doc__)
    config.name = config.name or f"ttrl_{config.reward}"
    positive(config, "questions votes min_votes prompts passes max_new eval_k save_every workers row_tokens")
    if config.samples < 2:
        die(f"--samples is {config.samples}: a group of one has no baseline, so no advantage; give at least 2")
    if config.votes < config.samples:
        die(f"--votes {config.votes} is below --samples {config.samples}: those trained on are drawn from those that vote")
    if config.min_votes > config.votes:
        die(f"--min-votes {config.min_votes} is above --votes {config.votes}: every question would be skipped")
    if config.tail_batching != "off":
        die(f"--tail-batching {config.tail_batching}: here every vote is waited for, since a race would let the short answers elect the "
            "label; leave it out")
    if preset and config.init == Config.init:
        die(f"--preset {preset} needs a model: --init DIR (the paper: Qwen2.5-Math-7B)")
    row = nanorl.ALGORITHMS.get(config.algo, {})
    idle = [word for word, there in [("samples other questions where all rewards are equal", row.get("dynamic")),
                                     ("resets its reference", row.get("reset_every"))] if there]
    if idle:
        die(f"--algo {config.algo} {' and '.join(idle)}, which has no place here, where each question has its vote: give --algo grpo, "
            "and what else you want of it by --aggregate")
    for flag, known in (("algo", nanorl.ALGORITHMS), ("aggregate", ["", *nanorl.AGGREGATES])):
        if getattr(config, flag) not in known:
            near = difflib.get_close_matches(getattr(config, flag), known, 1, cutoff=0)[0]
            die(f"--{flag} is {getattr(config, flag)!r}: one of {', '.join(filter(None, known))} (did you mean {near}?)")
    return config, nanorl.Config(**{k: getattr(config, k) for k in SHARED}, n=config.samples, eval_n=0, final_n=0)


def main(argv=None):
    # ---- config
    config, below = configure(list(sys.argv[1:] if argv is None else argv))
    asked, unseen = questions(config)
    below.steps = config.passes * -(-len(asked) // config.prompts)

    # ---- init
    rl = setup(below, asked + unseen)
    rl.problems, rl.workers, env = asked, Graders(rl.workers), rl.env
    run = Run(f"runs/{config.name}", config, env, resume=config.resume,
              free=("save_every", "threads", "workers", "wandb", "budget", "patience"),
              sources=[sys.modules[__name__].__file__, nanorl.__file__])
    rl.workers.workers.log = run.log
    begin, at, spent, history, memory, seen = 0, 0, 0.0, [], {}, []
    still, mute, lowest, best, before = 0, False, math.inf, dict(step=0, consensus=-1.0), None
    state = restore(rl, run) if config.resume else None
    if state:
        begin, at, spent, history, memory, seen, still, mute, lowest, best, before, rl.visits, rl.updates = (state[k] for k in (
            "step", "at", "spent", "history", "memory", "seen", "still", "mute", "lowest", "best", "before", "visits", "updates"))
    judge = f" ({config.judge})" if config.reward == "majority" and config.judge != "majority" else ""
    run.log(f"reward {config.reward}{judge}, on {len(asked)} questions of {config.data or config.task} from {config.init}: "
            f"{config.votes} votes, {config.samples} trained on, {config.prompts} questions a step, at most {config.passes} passes, "
            f"{env.world} x {env.device}")
    if not unseen:
        run.log("no unseen questions to compare with: give --unseen TASK")
    if any(p.gold is None for p in asked):
        run.log(f"{sum(p.gold is None for p in asked)} questions have no gold: metrics that need labels leave them out")

    def save(done):
        run.save(done, lambda folder: rl.model.save_hf(folder, rl.tok),
                 dict(optimizer=rl.optimizer.state_dict(), step=done, at=at, spent=spent, history=recent(history), memory=memory, seen=seen,
                      still=still, mute=mute, lowest=lowest, best=best, before=before, visits=rl.visits, updates=rl.updates))

    # ---- before
    if before is None:
        before = {"trained": test(rl, config, asked), "unseen": test(rl, config, unseen)}
        for name, result in before.items():
            if result:
                run.log(f"{name}, before: {words(result)}")
        run.metrics(0, **{f"eval/{name}/{k}": v for name, result in before.items() for k, v in result.items() if k != "scores"})

    # ---- the loop
    steps, now = rl.config.steps, begin
    end = ended(config, still, mute, spent, 0.0)
    bar = progress(steps, "ttrl")
    bar.update(begin)
    while now < steps and not end:
        now, clock = now + 1, time.perf_counter()
        groups, trained, rows = [], [], []
        todo = take(rl, at, config.prompts)
        for group in collect(rl, todo, config.votes):
            counting = time.perf_counter()
            truth_M = [s.reward for s in group]                  # for the metrics; what follows is decided by the votes
            logps_M = [float(np.nanmean(s.logprobs)) for s in group]
            ballot = votes(rl.task, [completion(s, rl.tok) for s in group], logps_M, config)
            address = (config.seed, group[0].problem, group[0].visit)
            rewards_M = rewards(config, ballot, truth_M, address)
            for i, s in enumerate(group):
                s.reward = rewards_M[i] if rewards_M else 0.0
            if rewards_M:
                chosen = [group[i] for i in lot(config.votes, config.samples, address)]
                advantage(chosen, rl.config)
                trained.append(chosen)
            groups.append(group)
            rows.append(record(group[0].problem, ballot, rewards_M, truth_M))
            rl.clock["reward"] += time.perf_counter() - counting
        at += len(todo)
        stats = update(rl, trained, make_loss(rl.config, elapsed(rl)))           # elapsed: a power that is annealed
        stats |= step(rl)
        share_visits(rl)
        rows = [remember(rl.task, memory, row) for row in sorted((r for part in gather(rows) for r in part), key=lambda r: r["problem"])]

        # ---- log
        seconds = all_max(time.perf_counter() - clock)
        spent += seconds
        numbers = summary(rl, groups, 0, stats, seconds) | means(rows) | dict(grad_norm=stats["grad_norm"], spent=spent)
        history.append(numbers)
        bar.update()
        run.log(status(now, steps, config, numbers))
        for warning in warnings(history, rl.config):
            run.log(f"  warning: {warning}")
        run.metrics(now, **numbers)
        run.samples(sample_rows(rl, now, groups))

        # ---- judge the pass, by votes alone
        seen += rows
        if at % len(asked) == 0:
            whole, seen = means(seen), []
            if whole["consensus"] > best["consensus"]:
                best = dict(step=now, consensus=whole["consensus"])
                keep(rl, run.folder, now)
            still = still + 1 if idle(whole, lowest, config) else 0
            lowest = min(lowest, whole.get("vote_entropy", math.inf))
            run.log(f"  pass {at // len(asked)}: majority {whole['majority_ratio']:.1%}  agreement with all votes "
                    f"{whole['consensus']:.1%}  flips {whole.get('flips', math.nan):.1%}  vote entropy "
                    f"{whole.get('vote_entropy', math.nan):.3f}  idle {still}")
            mute = whole["too_few"] + whole["abstained"] == len(asked)
        end = ended(config, still, mute, spent, seconds)
        stopping = run.stopping()
        if now % config.save_every == 0 or end or now == steps or stopping:
            save(now)
        if stopping and now < steps and not end:
            rl.workers.close()
            run.bye(now)
    bar.close()

    # ---- after
    if end:
        run.log(f"stopped after step {now}: {end}")
    kept = Path(run.folder, "best", f"step_{best['step']}")
    if kept.exists():
        rl.model.load_hf(kept)
        run.log(f"evaluating the state kept after step {best['step']} of {now}, the one that agreed most with all votes: {kept}")
    results = {"trained": (before["trained"], test(rl, config, asked)), "unseen": (before["unseen"], test(rl, config, unseen))}
    rl.workers.close()
    run.metrics(now, **{f"eval/{name}/{k}": v for name, (_, result) in results.items() for k, v in result.items() if k != "scores"})
    for line in report(config, results):
        run.log(line)
    if env.master:
        gains = {name: gain(*pair) for name, pair in results.items() if pair[0]}
        found = dict(step=best["step"], steps=now, spent=spent, gain=gains, **results)
        Path(run.folder, "result.json").write_text(json.dumps(found) + "\n")
        for line in beside(config):
            run.log(line)
        view.pages(run.folder)
    run.close()


if __name__ == "__main__":
    main()
