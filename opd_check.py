"""
opd_check.py: will on-policy distillation work for this student and this teacher? Asked before
anything is spent.

On-policy distillation fails quietly: the teacher scores every token of the student's rollouts, and
where it would never have been it scores them badly or at random. What can be known beforehand,
cheaply, on some dozens of the student's own rollouts:

    audit           same tokenizer (by content), same stop ids, same chat template
    identity        the student scored as its own teacher, in packed rows: every log-ratio must be
                    0, or the numbers below are a bug
    accuracy        is there anything to learn? paired over problems
    overlap         on the student's prefixes, do the two agree on which tokens are likely at all?
                    (in good runs of arXiv 2604.13016 the shared top-16 holds 97-99% of both
                    models' mass)
    continuation    the student's rollouts are cut at some length and the teacher continues from
                    there: does it still do better than the student did? Where it does not, its
                    scores of what follows teach nothing
    cost            what a run would take

and a verdict: go, SFT first, shorten, or do not. What is asked of the teacher stands in
common/teacher.py, what is measured in common/overlap.py: opd.py uses both at every step.

    python opd_check.py --student runs/base --teacher runs/rl --task countdown
    torchrun --nproc_per_node=8 opd_check.py --student DIR --teacher DIR --task math500 \
        --max-new 8192
"""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import torch

import data
import pack
from common import hf
from common.flags import die, flags, positive
from common.moved import moved
from common.overlap import describe, means_of, measure
from common.reward import Rewards
from common.run import gather, start
from common.teacher import audit, load_teacher, stop_class, tokens_differ
from evaluate import SEED
from kernels import linear_logprob
from rollout import Sampler, prompt_ids
from stages import RL, collect, gather_groups
from train_gpt import GPT

@dataclass
class Config:
    student: str                         # a Hugging Face folder or a run
    teacher: str                         # the same, with the same tokenizer
    task: str = "countdown"              # a task of data/; the word after a colon is its variant
    n: int = 128                         # problems of its valid split
    samples: int = 4                     # rollouts of each
    max_new: int = 48                    # tokens of a rollout, at most
    k: int = 16                          # likely tokens that are compared
    cuts: int = 4                        # prefix lengths at which the teacher takes over
    shortest: int = 512                  # a prefix of at most this many tokens is never too long
    tokens: int = 100_000                # sampled tokens of the run whose cost is asked
    seed: int = 0                        # of the problems
    row_tokens: int = 4096               # tokens of one packed row
    slots: int = 0                       # sequences the sampler decodes at a time; 0: its choice
    workers: int = 2                     # reward processes
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where
    dtype: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 on CUDA, fp32 elsewhere
    threads: int = 0                     # CPU threads; 0: all

    # how the two sample: as evaluate.py does
    temperature = 1.0
    top_p = 1.0
    stream = False


def configure(argv):
    c = flags(Config, argv, __doc__)
    positive(c, "n samples max_new k cuts tokens row_tokens workers")
    return c


# what the verdict is made of. The first two are from pilot runs on models of 1M parameters, no law
COVERED = 0.8            # SFT first: less than this of the student's mass is on the teacher's top k
APART = 3.0              # or their KL at a token is above this, in nats
ALIKE = 0.01             # do not: the teacher is not better by this, or not by two standard errors
WORN = 0.2               # shorten: continuing, it gains less than this share of its whole gain


# -----------------------------------------------------------------------------
# the measurements


@torch.no_grad()
def scored(model, teacher, batches, k, stop, device):
    """-> (means of MEASURES by bucket, the largest |log-ratio| of the student scored as its own
    teacher, seconds of the teacher)."""
    sums = []
    worst = 0.0
    seconds = 0.0
    width = min(len(model.head_weight), len(teacher.head_weight))
    p_VD = model.head_weight[:width]
    q_VD = teacher.head_weight[:width]
    for batch in batches:
        batch = batch.to(device)
        hidden_ND = batch.hidden(model)
        logp_N, _ = linear_logprob(hidden_ND, model.head_weight, batch.targets_N)
        if len(logp_N):
            worst = max(worst, float((logp_N - batch.sampler_logp_N).abs().max()))
        begin = time.perf_counter()
        taught_ND = batch.hidden(teacher)
        logq_N, _ = linear_logprob(taught_ND, teacher.head_weight, batch.targets_N)
        logq_N.sum().item()                                      # until a GPU is done
        seconds += time.perf_counter() - begin
        sums.append(measure(hidden_ND, p_VD, taught_ND, q_VD, batch.sample_N, k, stop).cpu())
    parts = gather((sums, worst, seconds))
    means = means_of(torch.stack([s for part in parts for s in part[0]]))
    return means, max(part[1] for part in parts), sum(part[2] for part in parts)


def continued(rl, groups, cut):
    """rl's model continues the first `cut` tokens of every rollout that is longer. -> [(the
    rollout's reward, the continuation's)] of all ranks."""
    by_id = {p.id: p for p in rl.problems}
    longer = {}
    for g in groups:
        found = [s for s in g if len(s.tokens) > cut]
        if found:
            longer[g[0].problem] = found
    stems = {id: [s.tokens[:cut] for s in found] for id, found in longer.items()}
    rows = []
    for g in collect(rl, [by_id[id] for id in longer], 1, resume=stems, seed=SEED + cut):
        rows += [(s.reward, end.reward) for s, end in zip(longer[g[0].problem], g)]
    return [row for part in gather(rows) for row in part]


def mean_se(values):
    if not values:
        return math.nan, math.inf
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return statistics.fmean(values), se


def mean_reward(group):
    return statistics.fmean(s.reward for s in group)


def lengths_to_cut(config, groups):
    """Up to --cuts prefix lengths, doubling, to the longest that a quarter of the rollouts reach."""
    lengths = sorted(len(s.tokens) for g in groups for s in g)
    cut = max(1, lengths[3 * len(lengths) // 4] - 1)
    cuts = []
    while cut and len(cuts) < config.cuts:
        cuts.append(cut)
        cut //= 2
    return cuts[::-1]


def verdict(config, m):
    """-> (word, reason). m: the measured numbers."""
    gain, se = m["gain"], m["gain_se"]
    if m["identity"] > m["tolerance"]:
        return "do not", (f"the student scored as its own teacher is off by {m['identity']:.1e} in "
                          "a log-prob: fix the scoring first")
    if gain < max(ALIKE, 2 * se):
        return "do not", f"the teacher is not better: {gain:+.1%} +-{se:.1%} over the student"
    if m["covered"] < COVERED or m["kl"] > APART:
        return "SFT first", (f"on the student's prefixes the two disagree: {m['covered']:.0%} of "
                             f"its mass is on the teacher's top {config.k}, KL {m['kl']:.2f} nats "
                             "per token. Fine-tune on the teacher's texts (opd.py --control sft)")
    for cut, lead, _, _ in m["continuation"]:
        if cut > config.shortest and lead < WORN * gain:
            return "shorten", (f"after {cut} tokens of the student's the teacher gains only "
                               f"{lead:+.1%}: opd.py --horizon {cut}")
    return "go", (f"{gain:+.1%} to learn, {m['covered']:.0%} of the student's mass on the "
                  f"teacher's top {config.k}, KL {m['kl']:.2f} per token")


# -----------------------------------------------------------------------------
# what main is made of


def say(env, text):
    if env.master:
        print(text, flush=True)


def conclude(env, word, reason, numbers):
    say(env, f"verdict: {word}. {reason}")
    return dict(verdict=word, reason=reason, **numbers)


def open_student(config, env, tok):
    """-> (model, task, problems, tokens of the longest text). What cannot be asked is refused."""
    model = GPT.from_hf(hf.find(config.student), dtype=env.dtype, device=env.device)
    if config.k > tok.vocab_size:
        raise ValueError(f"--k {config.k} is above the vocabulary of {tok.vocab_size}")
    task = data.load(config.task)
    problems = task.problems("valid", config.n, config.seed)
    if not problems:
        raise ValueError(f"--task {config.task} has no valid split to ask with")
    longest = max(len(prompt_ids(p, tok)) for p in problems) + config.max_new
    if longest > min(model.config.max_len, config.row_tokens):
        raise ValueError(f"a prompt and --max-new {config.max_new} take {longest} tokens, the model "
                         f"serves {model.config.max_len} and a row {config.row_tokens}")
    return model.requires_grad_(False), task, problems, longest


def open_teacher(config, env, tok, student, longest):
    """-> (model, its tokenizer)."""
    teacher, its = load_teacher(config.teacher, tok, env, len(student.head_weight))
    if longest > teacher.config.max_len:
        die(f"a prompt and --max-new {config.max_new} take {longest} tokens, the teacher serves "
            f"{teacher.config.max_len}")
    return teacher, its


def sampler_of(config, env, model, tok, stop, longest):
    return Sampler(model, set(stop), tok, slots=config.slots or None, max_len=longest,
                   deterministic=env.deterministic)


def sampled(rl):
    """-> the groups of all ranks, with their rewards."""
    groups = collect(rl, rl.problems, rl.config.samples, seed=SEED)
    return gather_groups(rl, list(groups))


def accuracies(env, groups, taught):
    """-> the numbers of the verdict about rewards; the teacher's gain is paired over problems."""
    student = [mean_reward(group) for group in groups]
    teacher = [mean_reward(group) for group in taught]
    gain, gain_se = mean_se([b - a for a, b in zip(student, teacher)])
    one, one_se = mean_se(student)
    two, two_se = mean_se(teacher)
    say(env, f"accuracy: student {one:.1%} +-{one_se:.1%}, teacher {two:.1%} +-{two_se:.1%}, paired "
             f"{gain:+.1%} +-{gain_se:.1%}")
    return dict(gain=gain, gain_se=gain_se, student=one, teacher=two)


def lead_after(teacher, groups, cut):
    """-> (cut, what the teacher gains when it continues from there, its standard error, rollouts)."""
    rows = continued(teacher, groups, cut)
    lead, se = mean_se([its_reward - reward for reward, its_reward in rows])
    say(teacher.env, f"continuation after {cut} tokens: teacher {lead:+.1%} +-{se:.1%} over the "
                     f"student ({len(rows)} rollouts)")
    return cut, lead, se, len(rows)


def cost(config, student, teacher, sampling, scoring):
    """-> a line. sampling, scoring: seconds per sampled token here."""
    size = sum(p.numel() for p in student.parameters())
    its_size = sum(p.numel() for p in teacher.parameters())
    return (f"cost of {config.tokens:,} sampled tokens: student {8 * size * config.tokens:.1e} FLOP "
            f"(sampling 2, learning 6 per weight), teacher {2 * its_size * config.tokens:.1e}; here "
            f"{sampling * config.tokens:.0f} s of sampling and "
            f"{scoring * config.tokens:.0f} s of scoring")


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config
    config = configure(argv)
    env = start(config.device, config.dtype, config.threads)

    # ---- both models; the audit
    try:
        tok = data.tokenizer(hf.find(config.student))
        why = tokens_differ(tok, data.tokenizer(hf.find(config.teacher)))
        if why:
            return conclude(env, "do not", f"the vocabularies differ: {why}", {})
        model, task, problems, longest = open_student(config, env, tok)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    teacher, its = open_teacher(config, env, tok, model, longest)
    for line in audit(tok, its):
        say(env, f"audit: {line}")

    # ---- rollouts of both
    stop = stop_class(tok, its)
    workers = Rewards(config.task, workers=config.workers)
    sampler = sampler_of(config, env, model, tok, stop, longest)
    student = RL(config, env, model, tok, task, sampler, workers, problems)
    sampler = sampler_of(config, env, teacher, tok, stop, longest)
    better = RL(config, env, teacher, tok, task, sampler, workers, problems)
    begin = time.perf_counter()
    groups = sampled(student)
    sampling = time.perf_counter() - begin
    numbers = accuracies(env, groups, sampled(better))

    # ---- the student's rollouts as the teacher sees them
    for s in [s for group in groups for s in group]:
        s.advantage = 1.0
    batches = pack.batches(groups, config.row_tokens, model.config, env.rank, env.world)
    means, identity, scoring = scored(model, teacher, batches, config.k, stop, env.device)
    say(env, f"identity: the student as its own teacher, largest |log-ratio| {identity:.1e}")
    for line in describe(config.k, means):
        say(env, line)

    # ---- does the teacher still know better in the middle of a student's text?
    continuation = [lead_after(better, groups, cut) for cut in lengths_to_cut(config, groups)]
    workers.close()

    # ---- cost and verdict
    tokens = sum(len(s.tokens) for group in groups for s in group)
    say(env, cost(config, model, teacher, sampling / tokens, scoring / tokens))
    numbers |= dict(identity=identity, tolerance=1e-3 if env.dtype == torch.float32 else 0.5,
                    continuation=continuation, **means)
    word, reason = verdict(config, numbers)
    return conclude(env, word, reason, numbers)


__getattr__ = moved(__name__)            # names that a fork may know from here


if __name__ == "__main__":
    main()
