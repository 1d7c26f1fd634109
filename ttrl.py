"""
ttrl.py: test-time reinforcement learning (arXiv 2504.16084). A majority vote instead of a label:
learn on the very questions of a test, without their answers.

    sample M answers of a question -> the largest class of equivalent answers is the label
    -> reward 1 for agreeing with it
    -> N of the M, drawn by lot, are trained on (baseline over the N, label from all M)
    -> the next questions

It works where a model is right more often than it is wrong in any one way: then the vote is better
than a sample, and learning from it moves every sample towards the vote, and the vote with them. It
cannot teach what the model never says, and past its best it only makes the model sure of itself. So
it watches the flips of the majority and its agreement with all earlier votes, keeps the best state,
and stops. And where the first votes are scattered, it does not begin: their majority is often wrong
in the model's own way, and a model that learns from it grows sure of that (--scattered).

Rules, written down because they decide which answer wins:
- no answer is no vote: it can never be the label and never agrees with one; a question with fewer
  than --min-votes votes is skipped;
- answers are one class if the task calls them equal ("1/2" and "0.5" do not split the vote); an
  answer joins the first class that it equals;
- a tie goes to the class whose first vote has the smallest index, and an index says nothing about
  length or speed;
- which N of the M are trained on is a seeded lot over indices, never "the first that were ready":
  those are the short ones.

True labels, where there are any, are for the metrics and for --reward label (the ceiling); `votes`
and the judges cannot see them.

Asked by most who meet it (more in docs/questions.md):
    does it train on the test?   on its questions, never on its answers; eval/unseen has neither
    better than what?            one sample after, than the vote before: maj@n, not avg@n
    when to stop?                it stops itself, and keeps the state that agrees with all votes most
    what is reward_acc?          near 1 on scattered answers whatever the label: read label_acc

Left out of the usual recipe: a reward for format (agreeing needs a readable answer anyway), a
reward model, a validation set with labels. Where the paper makes one optimizer step per question,
this makes one per rollout; its cosine is a line here, and there is no KL to a reference unless
--kl-coef asks for one (0.001 there). And no tail batching: every vote is waited for, since a race
would let the short answers elect the label.

    python ttrl.py                     a laptop: arithmetic questions, the embedded base
    python ttrl.py --reward label      the ceiling; also random, has_answer: is it only the format?
    python ttrl.py --data my.jsonl --task gsm8k --init DIR    your questions, read as gsm8k's
    torchrun --nproc_per_node=8 ttrl.py --preset aime --init DIR    AIME 2024 as in the paper
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np

import algos
import data
import stages
from algos import Algo
from common import view
from common.axes import check_updates, filled_in, with_algorithm
from common.flags import die, flags, positive, shares, truncation, without_effect
from common.metrics import sample_rows, summary, warnings
from common.moved import moved
from common.reward import Graders
from common.run import gather, out_of_time, progress
from evaluate import evaluate, largest, paired, tally, words
from rollout import completion
from stages import (Common, advantage, check_flags, collect, due, learn, next_problems, open_run, over,
                    save, setup, stop_here)


@dataclass
class Config(Algo, Common):
    """test-time RL"""
    name: str = ""                       # the run, in runs/NAME; empty: ttrl_REWARD
    preset: Literal["", "aime", "amc", "math500"] = ""  # the paper's settings for that test
    reward: Literal["majority", "label", "random", "has_answer"] = "majority"  # or a control
    passes: int = 18                     # over the questions, at most
    prompts: int = 25                    # questions per step, over all ranks
    lr: float = 1e-3                     # AdamW
    decay: float = 0.0                   # share of the steps, at the end, with linear decay to zero
    save_every: int = 20                 # steps between checkpoints

    # ---- the questions
    task: str = "arith"                  # a task of data/ with an answer() to vote on; task:variant
    split: Literal["test", "valid", "train"] = "test"  # of the task: where the questions come from
    data: str = ""                       # your own questions: a .jsonl file of {prompt, gold?}
    questions: int = 100                 # to learn on, at most
    unseen: str = ""                     # a task never trained on; empty: another split of --task
    unseen_n: int = 100                  # its questions; 0: none

    # ---- the vote
    votes: int = 64                      # M: samples that vote
    samples: int = 32                    # N: samples of these that are trained on
    min_votes: int = 4                   # a question with fewer readable answers is skipped
    judge: Literal["majority", "weighted", "soft", "abstain"] = "majority"  # how votes are counted
    abstain_share: float = 0.25          # --judge abstain: skip a lower share of the largest class
    abstain_entropy: float = 0.8         # or the votes' entropy a higher share of its maximum

    # ---- when to stop
    scattered: float = 0.5  # learn nothing if the first votes' largest class holds less of them; 0: learn
    patience: int = 3                    # stop after this many passes without change; 0: never
    settled: float = 0.02                # that is: at most this share of the majorities flipped

    # ---- the evaluation before and after
    eval_k: int = 16                     # samples of a question
    eval_temperature: float = 1.0        # of these samples
    eval_top_p: float = 1.0              # of these samples


PAPER = ("--votes 64 --samples 32 --min-votes 8 --prompts 8 --algo grpo --aggregate token "
         "--lr 5e-7 --weight-decay 0.01 --decay 0.97 --max-new 3072 --row-tokens 16384 "
         "--eval-temperature 0.6 --eval-top-p 0.95 --scattered 0 --patience 0 --save-every 40")
PRESETS = {
    "aime": f"{PAPER} --task aime:ttrl --questions 30 --passes 80 --warmup 10 --unseen amc:ttrl",
    "amc": f"{PAPER} --task amc:ttrl --questions 83 --passes 30 --warmup 10 --unseen aime:ttrl",
    "math500": f"{PAPER} --task math500:ttrl --questions 500 --passes 10 --warmup 20 --unseen amc:ttrl",
}


def configure(argv):
    """-> Config. What does not go together is refused, with the reason, and so is a flag without
    effect."""
    c = flags(Config, argv, __doc__, defaults=lambda config: PRESETS.get(config.preset, ""),
              recipe=lambda config: f"by --preset {config.preset}", filled=filled_in)
    c.name = c.name or f"ttrl_{c.reward}"
    positive(c, "questions votes min_votes prompts passes max_new eval_k save_every workers row_tokens")
    for wrong, why in [
        (c.samples < 2,
         f"--samples is {c.samples}: a group of one has no baseline, so no advantage; give at least 2"),
        (c.votes < c.samples,
         f"--votes {c.votes} is below --samples {c.samples}: those trained on are drawn from those "
         "that vote"),
        (c.min_votes > c.votes,
         f"--min-votes {c.min_votes} is above --votes {c.votes}: every question would be skipped"),
        (c.preset and c.init == Config.init,
         f"--preset {c.preset} needs a model: --init DIR (the paper: Qwen2.5-Math-7B)"),
    ]:
        if wrong:
            die(why)
    shares(c, "abstain_share abstain_entropy settled scattered")
    truncation(c, "eval_")
    preset = flags(Config, PRESETS.get(c.preset, "").split())
    without_effect(c, [
        ("abstain_share abstain_entropy", c.judge == "abstain", "it is a threshold of --judge abstain"),
        ("judge", c.judge != "soft" or c.reward == "majority",
         f"soft weighs rewards of votes, and --reward is {c.reward}"),
        ("settled", c.patience, "--patience 0 never stops a run for standing still"),
        ("unseen", c.unseen_n, "--unseen-n 0 asks no unseen questions"),
        ("split", not c.data, "--data brings the questions"),
    ], preset)
    c = with_algorithm(c)
    check_updates(c)
    check_flags(c)
    return c


# -----------------------------------------------------------------------------
# the vote. classes_M: the class of each vote's answer (data.classes); -1, no answer, never counts


def vote_entropy(shares):
    """Of the votes over their classes, in nats: 0 if all agree."""
    total = sum(shares.values())
    return -sum(v / total * math.log(v / total) for v in shares.values())


# the judges: (classes_M, logps_M, config) -> (label, rewards_M), or None to abstain
# logps_M: mean log-prob of a token of each sample


def majority(classes_M, logps_M, config):
    """The paper's: the largest class is the label, agreeing with it is worth 1."""
    label = largest(tally(classes_M))
    return label, [float(c == label) for c in classes_M]


def weighted(classes_M, logps_M, config):
    """A vote counts as much as the model believed in it: the geometric mean of its tokens'
    probabilities. (The probability of the whole sequence would let the shortest answer outvote all
    others.)"""
    label = largest(tally(classes_M, np.exp(logps_M)))
    return label, [float(c == label) for c in classes_M]


def soft(classes_M, logps_M, config):
    """No winner takes all: an answer is worth its share of the votes, so a close second still counts."""
    shares = tally(classes_M)
    return largest(shares), [shares.get(c, 0) / sum(shares.values()) for c in classes_M]


def abstain(classes_M, logps_M, config):
    """The majority, where there is one: silent if the largest class is small or the votes are all
    over the place."""
    shares = tally(classes_M)
    votes = sum(shares.values())
    torn = vote_entropy(shares) > config.abstain_entropy * math.log(max(2, votes))
    if max(shares.values()) < config.abstain_share * votes or torn:
        return None
    return majority(classes_M, logps_M, config)


JUDGES = {"majority": majority, "weighted": weighted, "soft": soft, "abstain": abstain}


def votes(task, texts_M, logps_M, config):
    """What one question's samples say. Sees texts and log-probs, never a true label. rewards_M
    None: skipped, for `why`."""
    answers_M = [task.answer(text) for text in texts_M]
    classes_M = data.classes(task, answers_M)
    shares = tally(classes_M)
    label = largest(shares) if shares else -1            # a metric even where nothing is rewarded
    rewards_M = None
    why = ""
    if sum(shares.values()) < config.min_votes:
        why = "too_few"
    else:
        verdict = JUDGES[config.judge](classes_M, logps_M, config)
        if verdict:
            label, rewards_M = verdict
        else:
            why = "abstained"
    first = {c: answers_M[classes_M.index(c)] for c in shares}
    counts = [(first[c], shares[c]) for c in sorted(shares)]
    return SimpleNamespace(classes_M=classes_M, label=label, rewards_M=rewards_M, why=why,
                           answer=first.get(label), counts=counts)


def rewards(config, ballot, truth_M, lot):
    """The reward of each sample, None where the question is skipped: the same questions in every
    arm, or a control would learn from what the vote leaves out. Only `label` looks at the truth.
    lot: the question's own, (seed, problem, visit)."""
    if config.reward == "majority" or ballot.rewards_M is None:
        return ballot.rewards_M
    if config.reward == "label":
        return list(truth_M)
    if config.reward == "random":
        coins_M = np.random.default_rng([*lot, 1]).random(len(ballot.classes_M))
        return (coins_M < 0.5).astype(float).tolist()
    return [float(c >= 0) for c in ballot.classes_M]     # has_answer: the format alone


def subsample(m, n, lot):
    """N of the M, by the question's lot: no length, no order of arrival has a say."""
    return sorted(np.random.default_rng([*lot, 0]).permutation(m)[:n].tolist())


# -----------------------------------------------------------------------------
# metrics: what the votes say, and what true labels say, where there are any


def record(problem, ballot, rewards_M, truth_M):
    """The numbers of one question at one visit. truth_M: nan without labels. With binary rewards
    for agreeing and a transitive equality
        reward_acc = 1 if the label is right, else 1 - majority_ratio - avg:
    with a wrong label only those samples are judged wrongly that agreed with it or were right. So a
    wrong label still rewards well where the answers are scattered, and that is why learning from
    votes works at all."""
    m = len(truth_M)
    counts = dict(enumerate(n for _, n in ballot.counts))
    size = ballot.classes_M.count(ballot.label) if ballot.label >= 0 else 0
    right = truth_M[ballot.classes_M.index(ballot.label)] > 0.5 if size else False
    labelled = not any(map(math.isnan, truth_M))
    reward_acc = math.nan
    if rewards_M:
        reward_acc = 1 - float(np.mean(np.abs(np.subtract(rewards_M, truth_M))))
    return dict(
        problem=problem,
        why=ballot.why,
        answer=ballot.answer,
        counts=ballot.counts,
        majority_ratio=size / m,
        answered=sum(counts.values()) / m,
        vote_entropy=vote_entropy(counts) if counts else math.nan,
        avg=float(np.mean(truth_M)),
        label_acc=float(right) if labelled else math.nan,
        reward_acc=reward_acc,
        **{"pass": float(max(truth_M) > 0.5) if labelled else math.nan},
    )


def remember(task, memory, entry):
    """Adds to a record what only earlier visits know, then notes this visit.
    flip       the majority is another one than at the last visit
    consensus  the share of today's votes for the winner of ALL votes so far: it rises while the
               model sharpens and falls when it drifts to something else, however sure of it, since
               the past still votes. The best state is chosen by it
    extinct    right answers were among the votes of an earlier visit and are not today: what is
               never said cannot be learned"""
    past = memory.setdefault(entry["problem"], dict(answer=None, right=False, pool=[]))
    votes_by_answer = past["pool"] + entry["counts"]
    answers = [answer for answer, _ in votes_by_answer]
    counts = [n for _, n in votes_by_answer]
    classes = data.classes(task, answers)
    earlier = len(past["pool"])
    pool = tally(classes, counts)
    today = tally(classes[earlier:], counts[earlier:])
    entry["consensus"] = 0.0
    if today:
        entry["consensus"] = today.get(largest(pool), 0) / sum(today.values()) * entry["answered"]
    entry["flips"] = math.nan
    entry["extinct"] = math.nan
    if past["answer"] is not None and entry["answer"] is not None:
        entry["flips"] = float(not task.same(past["answer"], entry["answer"]))
    if not math.isnan(entry["pass"]):
        entry["extinct"] = float(past["right"] and not entry["pass"])
    memory[entry["problem"]] = dict(
        answer=past["answer"] if entry["answer"] is None else entry["answer"],
        right=past["right"] or entry["pass"] == 1,
        pool=[(answers[classes.index(c)], pool[c]) for c in sorted(pool)],
    )
    return entry


MEANS = ("majority_ratio", "label_acc", "reward_acc", "avg", "pass", "answered", "vote_entropy",
         "flips", "extinct", "consensus")


def means(entries):
    """{metric: mean over the questions that have it}; a metric that no question has is left out."""
    found = {}
    for k in MEANS:
        values = [entry[k] for entry in entries if not math.isnan(entry.get(k, math.nan))]
        if values:
            found[k] = float(np.mean(values))
    for why in ("too_few", "abstained"):
        found[why] = sum(entry["why"] == why for entry in entries)
    return found


def idle(whole, lowest, config):
    """Did a pass change nothing? The majorities stand, and the votes around them gather by less
    than 0.03 nats."""
    gathered = whole.get("vote_entropy", math.inf) <= lowest - 0.03
    return whole.get("flips", 1.0) <= config.settled and not gathered


def ended(rl):
    """Why the run is over before its passes are, or nothing."""
    config = rl.config
    own = rl.own
    if own.mute:
        clear = " and a clear majority" if config.judge == "abstain" else ""
        return (f"no question had --min-votes {config.min_votes} readable answers{clear}: look at "
                f"`truncated` and raise --max-new {config.max_new}, or begin with a model that "
                f"answers in the way --task {config.task} reads")
    if own.hopeless:
        return (f"the votes are scattered: the largest class holds {own.hopeless:.0%} of them in the mean, "
                f"and --scattered {config.scattered:g} wants more, since such a majority is often wrong. "
                "Train the model further first, or learn from labels")
    if config.patience and own.still >= config.patience:
        return (f"for --patience {own.still} passes at most {config.settled:.0%} of the majorities "
                "flipped and the votes gathered no further")
    return out_of_time(config, rl.seconds)


# -----------------------------------------------------------------------------
# the questions, and the state of a checkpoint


def questions(config):
    """-> (those to learn on, those never trained on). What a user can get wrong about them ends here."""
    try:
        task = data.load(config.task)
        if not all(hasattr(task, name) for name in ("answer", "canon", "same")):
            raise ValueError(f"--task {config.task} has no answer(): nothing to vote on. Give a "
                             "task that reads answers, and questions of your own by --data")
        if config.data:
            asked = data.load(config.data).rows[:config.questions]
        else:
            asked = task.problems(config.split, config.questions, config.seed)
        if not asked:
            raise ValueError(f"no questions in the {config.split} split of {config.task}: give "
                             "another --split or --task")
        unlabelled = sum(p.gold is None for p in asked)
        if config.reward == "label" and unlabelled:
            raise ValueError(f"--reward label, but {unlabelled} of {len(asked)} questions have no "
                             "gold: vote instead, or add it")
        other = data.load(config.unseen) if config.unseen else task
        split = "test" if config.unseen or config.split != "test" or config.data else "valid"
        unseen = other.problems(split, config.unseen_n, config.seed) if config.unseen_n else []
    except (ValueError, FileNotFoundError) as e:
        die(e)
    known = {p.prompt for p in asked}
    return asked, [p for p in unseen if p.prompt not in known]


@dataclass
class Own:
    """What a checkpoint keeps of this script."""
    memory: dict = field(default_factory=dict)       # question -> its earlier votes: see remember()
    seen: list = field(default_factory=list)         # the records of this pass
    still: int = 0                                   # passes in a row that changed nothing
    mute: bool = False                               # a whole pass of questions was skipped
    hopeless: float = 0.0                            # the largest class's share, where that ends the run
    lowest: float = math.inf                         # vote entropy of a pass
    best_step: int = 0                               # whose weights lie in best/
    best_consensus: float = -1.0
    before: dict | None = None                       # the evaluations before


def next_questions(rl):
    """The next questions, or fewer at the end of a pass: none is left out, none comes twice in a step."""
    left = len(rl.problems) - rl.cursor % len(rl.problems)
    return next_problems(rl, min(rl.config.prompts, left))


# -----------------------------------------------------------------------------
# before and after


def evaluation(rl, problems):
    """-> avg, maj, pass at --eval-k, and each question's scores for `paired`. {} without labels."""
    config = rl.config
    known = [p for p in problems if p.gold is not None]
    if not known:
        return {}
    return evaluate(rl.sampler, rl.tok, rl.task, rl.workers, known, config.eval_k, config.max_new,
                    config.eval_temperature, config.eval_top_p, scores=True)


def evaluations(rl, unseen):
    return {"trained": evaluation(rl, rl.problems), "unseen": evaluation(rl, unseen)}


def gain(before, after):
    """-> what paired() says, as a share instead of points."""
    points, se = paired(after, before, "avg")
    return points / 100, se / 100


def numbers_of(results):
    """{eval/trained/avg: ...} for metrics.jsonl"""
    return {f"eval/{name}/{k}": v for name, result in results.items() for k, v in result.items()
            if k != "scores"}


def report(config, results):
    """The lines that a run ends with."""
    lines = []
    k = config.eval_k
    for name, (before, after) in results.items():
        if before:
            d, se = gain(before, after)
            lines += [f"{name}, before: {words(before)}", f"{name}, after:  {words(after)}",
                      f"{name}: avg@{k} {d:+.1%} +-{se:.1%} (paired)"]
    before, after = results["trained"]
    if before:
        verdict = "yes" if after["avg"] > before["maj"] else "no"
        lines.append(f"does avg@{k} after pass maj@{k} before? {verdict}: {after['avg']:.1%} "
                     f"+-{after['avg_se']:.1%} against {before['maj']:.1%} "
                     f"+-{before['maj_se']:.1%}")
    return lines


def write_result(rl, run, results):
    """result.json, which view.compare_runs reads; the comparison; pictures."""
    gains = {name: gain(*pair) for name, pair in results.items() if pair[0]}
    found = dict(step=rl.own.best_step, steps=rl.step, seconds=rl.seconds, gain=gains, **results)
    Path(run.folder, "result.json").write_text(json.dumps(found) + "\n")
    for line in view.compare_runs(rl.config):
        run.log(line)
    view.pages(run.folder)


def status(step, steps, config, m):
    """One line per step. With labels, the paper's four: is the label right, the reward, a sample, any?"""
    known = ""
    if "label_acc" in m:
        known = (f"label right {m['label_acc']:.0%}  "
                 f"reward right {m.get('reward_acc', math.nan):.0%}  "
                 f"avg@{config.votes} {m['avg']:.1%}  pass {m['pass']:.0%}  extinct {m['extinct']:.0%}  ")
    return (f"step {step}/{steps}  reward {m['reward']:.3f}  majority {m['majority_ratio']:.0%}  "
            f"{known}flips {m.get('flips', 0):.0%}  skipped {m['too_few'] + m['abstained']}  "
            f"answered {m['answered']:.0%}  truncated {m['truncated']:.0%}  length {m['length']:.1f}  "
            f"entropy {m['entropy']:.3f}  rollout {m['t_rollout']:.2f}s  update {m['t_train']:.2f}s")


def introduce(rl, run, unseen):
    """The lines that a run begins with."""
    config = rl.config
    judge = ""
    if config.reward == "majority" and config.judge != "majority":
        judge = f" ({config.judge})"
    run.log(f"reward {config.reward}{judge}, on {len(rl.problems)} questions of "
            f"{config.data or config.task} from {config.init}: {config.votes} votes, "
            f"{config.samples} trained on, {config.prompts} questions per step, at most "
            f"{config.passes} passes, {rl.env.world} x {rl.env.device}")
    if not unseen:
        run.log("no unseen questions to compare with: give --unseen TASK")
    unlabelled = sum(p.gold is None for p in rl.problems)
    if unlabelled:
        run.log(f"{unlabelled} questions have no gold: metrics that need labels leave them out")


# -----------------------------------------------------------------------------
# the stages of a step


def elect(rl, group):
    """The vote on one question. -> the samples that are trained on, with their rewards (none where
    it is skipped), and its record."""
    config = rl.config
    truth_M = [s.reward for s in group]                  # for the metrics: the votes decide
    logps_M = [float(np.nanmean(s.logprobs)) for s in group]
    ballot = votes(rl.task, [completion(s, rl.tok) for s in group], logps_M, config)
    lot = (config.seed, group[0].problem, group[0].visit)
    rewards_M = rewards(config, ballot, truth_M, lot)
    for i, s in enumerate(group):
        s.reward = rewards_M[i] if rewards_M else 0.0
    chosen = []
    if rewards_M:
        chosen = [group[i] for i in subsample(config.votes, config.samples, lot)]
    return chosen, record(group[0].problem, ballot, rewards_M, truth_M)


def remember_all(rl, records):
    """-> the records of all ranks, with what earlier visits know."""
    found = [entry for part in gather(records) for entry in part]
    found.sort(key=lambda entry: entry["problem"])
    return [remember(rl.task, rl.own.memory, entry) for entry in found]


def scattered(rl):
    """In the first pass: how small a share of the votes the largest class of a question has, in the
    mean, if that is too small to learn from; else 0."""
    config = rl.config
    if config.reward != "majority" or rl.cursor > len(rl.problems):
        return 0.0
    share = float(np.mean([entry["majority_ratio"] for entry in rl.own.seen]))
    return share if share < config.scattered else 0.0


def judge_pass(rl, run):
    """Keeps the best state so far, and counts the passes that changed nothing."""
    own = rl.own
    whole = means(own.seen)
    own.hopeless = scattered(rl)
    own.seen = []
    if whole["consensus"] > own.best_consensus:
        own.best_step = rl.step
        own.best_consensus = whole["consensus"]
        run.keep_best(rl.step, lambda folder: rl.model.save_hf(folder, rl.tok))
    own.still = own.still + 1 if idle(whole, own.lowest, rl.config) else 0
    own.lowest = min(own.lowest, whole.get("vote_entropy", math.inf))
    own.mute = whole["too_few"] + whole["abstained"] == len(rl.problems)
    flips = whole.get("flips", math.nan)
    entropy = whole.get("vote_entropy", math.nan)
    run.log(f"  pass {rl.cursor // len(rl.problems)}: majority {whole['majority_ratio']:.1%}  "
            f"agreement with all votes {whole['consensus']:.1%}  flips {flips:.1%}  "
            f"vote entropy {entropy:.3f}  idle {own.still}")


def load_best(rl, run):
    best = Path(run.folder, "best", f"step_{rl.own.best_step}")
    if best.exists():
        rl.model.load_hf(best)
        run.log(f"evaluating the state kept after step {rl.own.best_step} of {rl.step}, the one "
                f"that agreed most with all votes: {best}")


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config and init
    config = configure(argv)
    asked, unseen = questions(config)
    rl = setup(config, problems=asked + unseen)
    config = rl.config                                   # with the axes of --algo filled in
    rl.problems = asked
    rl.workers = Graders(rl.workers)
    rl.steps = config.passes * -(-len(asked) // config.prompts)
    rl.own = Own()
    run = open_run(rl, sources=[__file__, stages.__file__, algos.__file__])
    own = rl.own
    introduce(rl, run, unseen)

    # ---- before
    if own.before is None:
        own.before = evaluations(rl, unseen)
        for name, result in own.before.items():
            if result:
                run.log(f"{name}, before: {words(result)}")
        run.metrics(0, **numbers_of(own.before))

    # ---- the loop
    reason = ended(rl)
    bar = progress(rl.steps, "ttrl", rl.step)
    while not over(rl) and not reason:
        rl.step += 1
        start = time.perf_counter()

        # rollout and vote: all samples of a question elect its label, a subsample is trained on
        groups = []
        trained = []
        records = []
        for group in collect(rl, next_questions(rl), config.votes):
            with rl.clock("reward"):
                chosen, found = elect(rl, group)
            if chosen:
                advantage(chosen, config)
                trained.append(chosen)
            groups.append(group)
            records.append(found)

        records = remember_all(rl, records)
        own.seen += records
        if scattered(rl):
            trained = []

        # update: back-propagate sums; one division, clip, step
        stats = learn(rl, trained)

        # log
        numbers = summary(rl, groups, stats, start)
        numbers |= means(records) | dict(seconds=rl.seconds)
        run.log(status(rl.step, rl.steps, config, numbers))
        for warning in warnings(rl.history, config):
            run.log(f"  warning: {warning}")
        run.pace(rl.step, rl.steps, numbers)
        run.metrics(rl.step, **numbers)
        run.samples(sample_rows(rl, groups))
        bar.update()

        # at the end of a pass: did it change anything? By votes alone
        if rl.cursor % len(asked) == 0:
            judge_pass(rl, run)
        reason = ended(rl)

        # save: a signal to any rank ends all of them after this step
        stopping = run.stopping()
        last = over(rl) or bool(reason)
        if last or stopping or due(rl.step, config.save_every):
            save(rl, run)
        if stopping and not last:
            stop_here(rl, run)
    bar.close()

    # ---- after: the state that agreed most with all votes
    if reason:
        run.log(f"stopped after step {rl.step}: {reason}")
    load_best(rl, run)
    after = evaluations(rl, unseen)
    rl.workers.close()
    numbers = numbers_of(after)
    # a run that is resumed at its end adds no second row
    if numbers and rl.env.master and not view.has(run.folder, rl.step, numbers):
        run.metrics(rl.step, **numbers)
    results = {name: (own.before[name], after[name]) for name in after}
    for line in report(config, results):
        run.log(line)
    if rl.env.master:
        write_result(rl, run, results)
    run.close()


__getattr__ = moved(__name__)            # names that a fork may know from here


if __name__ == "__main__":
    main()
