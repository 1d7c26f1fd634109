"""
opd.py: on-policy distillation. The student samples and a teacher scores every token: one signal per
token instead of one reward per response.

    rollouts of the student -> the teacher's log-probs of them, in the same packed rows
    -> one of the losses below -> the next step

p is the student, q the teacher, r = log p - log q, always at the student's own prefixes. What is
minimised is the reverse KL, sum p r, at every token, with no gradient through the sampling of the
prefix. The losses differ in how much of the vocabulary they look at, which is what a teacher has to
send: one number per token, K of them, or all. Each has zero gradient where p = q.

It is brittle. So every step logs how far the two overlap and where, a guard stops a run whose texts
begin to repeat or to run into the limit, and opd_check.py asks beforehand whether it will work.
A loss that falls says nothing: look at the accuracy.

Asked by most who meet it (more in docs/questions.md):
    which KL?                    the reverse one, at the student's own prefixes: --loss, --divergence
    over which tokens?           all that were sampled, the stop token too, none of the prompt
    what if tokenizers differ?   refused, with the first id that differs

Left out of the usual recipe, and why:
- no teacher server: the teacher scores the very Batch that is learned from, in one forward, so any
  support set costs a gather;
- no discounted sum of later rewards: a discount above 0 has bought nothing but variance
  (arXiv 2603.25562, and Thinking Machines);
- no KL that is back-propagated at the sampled token: the expected gradient of r itself is 0;
- no top-k KL without renormalisation, tail or stop-gradient: its gradient is not 0 at p = q.

    python opd.py --teacher runs/rl                       the base learns what RL taught another
    torchrun --nproc_per_node=8 opd.py --init DIR --teacher DIR --teacher-at sharded \
        --task math500 --max-new 4096 --row-tokens 8192 --lr 1e-6
    python opd.py --teacher runs/rl --loss student_topk --k 16
    python opd.py --control fixed_negative                is it the teacher at all?
    python opd.py --control sft --teacher runs/rl         fine-tuning on the teacher's own texts
    python opd.py --init runs/rl --teacher runs/base      reverse: should lose what RL taught
    python opd.py --context gold --init DIR --task gsm8k  the student teaches, and sees the answer
"""

import math
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

import common.overlap
import common.teacher
import kernels
import stages
from algos import BASELINES, k3_to
from common import memory
from common.flags import die, flags, positive, shares, without_effect
from common.metrics import sample_rows, summary, warnings
from common.overlap import (by_sample, diagnosis, disagreement, guard, log_softmax, measure,
                            pulls_of)
from common.offload import place_blocks
from common.run import gather, progress
from common.teacher import audit, load_teacher, privileged, read_gold, sides, stop_class
from kernels import linear_logprob, linear_logprob_at, linear_topk
from rollout import Sample, Sampler, prompt_ids
from stages import (RL, Common, check_flags, collect, due, evaluation, finish, next_problems,
                    open_run, over, save, setup, share_visits, step, stop_here, update)
from train_gpt import GPT

# -----------------------------------------------------------------------------
# the losses -> value_N, to be minimised
# p, q: namespaces of hidden_ND and head_VD; s: what else is known of the predictions

NOWHERE = -1e30          # log-prob of a column that is out for both models: p = 0 and r = 0 there


def merged(side, ids_NK, logp_NK, s):
    """Where several ids stop, they are one action: out of the columns, and their sum is one more column."""
    if s.stop is None:
        return logp_NK
    rest_NK = logp_NK.masked_fill(torch.isin(ids_NK, s.stop), NOWHERE)
    return torch.cat([rest_NK, ending(side, s)], dim=1)


def ending(side, s):
    """(N, 1): log-prob of stopping, by whichever id."""
    ids = s.stop.expand(len(side.hidden_ND), -1).contiguous()
    logp_NK = linear_logprob_at(side.hidden_ND, side.head_VD, ids, s.temperature)
    return logp_NK.logsumexp(1, keepdim=True)


def top(side, k, s):
    ids_NK, logp_NK = linear_topk(side.hidden_ND, side.head_VD, k, s.temperature)
    return ids_NK, merged(side, ids_NK, logp_NK, s)


def logp_on(side, ids_NK, s):
    logp_NK = linear_logprob_at(side.hidden_ND, side.head_VD, ids_NK, s.temperature)
    return merged(side, ids_NK, logp_NK, s)


def of_target(side, s):
    """-> log-prob of the sampled token (of stopping, if it stops) and the entropy."""
    logp_N, entropy_N = linear_logprob(side.hidden_ND, side.head_VD, s.targets_N, s.temperature)
    if s.stop is not None:
        logp_N = torch.where(torch.isin(s.targets_N, s.stop), ending(side, s).squeeze(1), logp_N)
    return logp_N, entropy_N


def bounded(r, s):
    return r.detach().clamp(-s.bound, s.bound)


def sampled(p, q, s):
    """A policy gradient whose reward is -r at the sampled token. Unbiased, and all that a teacher
    sends is one number. The baseline E[-r], over the student's top K, takes variance away where the
    two are far apart (arXiv 2605.07865) and nothing else."""
    advantage_N = -bounded(s.logp_N - s.logq_N, s)
    if s.baseline:
        ids_NK, logp_NK = top(p, s.baseline, s)
        r_NK = bounded(logp_NK - logp_on(q, ids_NK, s), s)
        advantage_N = advantage_N + (logp_NK.exp() * r_NK).sum(1).detach()
    return -s.trust_N * advantage_N * s.logp_N


def student_topk(p, q, s):
    """The exact gradient sum p r dlog p, cut to the student's top K. Its weights carry no gradient,
    so it is 0 at p = q whatever is cut."""
    ids_NK, logp_NK = top(p, s.k, s)
    r_NK = bounded(logp_NK - logp_on(q, ids_NK, s), s)
    return (logp_NK.detach().exp() * r_NK * logp_NK).sum(1)


def teacher_topk(p, q, s):
    """KL(p || q), both renormalised on the teacher's top K (local support matching). Blind to what
    the student has elsewhere, so it is meant for --top-p 0.9 rollouts and for students whose mass
    is there (`covered` of the diagnostics)."""
    ids_NK, logq_NK = top(q, s.k, s)
    logq_NK = logq_NK.log_softmax(1)
    logp_NK = logp_on(p, ids_NK, s).log_softmax(1)
    return (logp_NK.exp() * (logp_NK - logq_NK)).sum(1)


def with_tail(logp_NK):
    """One more column: everything else. Near a mass of 1 the difference is rounding, and is not believed."""
    rest_N1 = 1 - logp_NK.exp().sum(1, keepdim=True)
    return torch.cat([logp_NK, rest_N1.clamp(min=1e-6).log()], dim=1)


def tail(p, q, s):
    """KL on K + 1 outcomes: the student's top K and the rest as one. d sum p r = sum p r dlog p,
    since these p do add up to 1."""
    ids_NK, logp_NK = top(p, s.k, s)
    logp_NK = with_tail(logp_NK)
    logq_NK = with_tail(logp_on(q, ids_NK, s))
    return ((logp_NK.exp() * (logp_NK - logq_NK)).detach() * logp_NK).sum(1)


def divergence(logp_NV, logq_NV, s):
    """reverse: sum p (log p - log q), the nearest mode; forward: p and q exchanged, all modes; jsd:
    both against their mixture."""
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    if s.divergence == "reverse":
        return (p_NV * (logp_NV - logq_NV)).sum(1)
    if s.divergence == "forward":
        return (q_NV * (logq_NV - logp_NV)).sum(1)
    logm_NV = torch.logaddexp(logp_NV + math.log(1 - s.beta), logq_NV + math.log(s.beta))
    return (s.beta * q_NV * (logq_NV - logm_NV) + (1 - s.beta) * p_NV * (logp_NV - logm_NV)).sum(1)


def full(p, q, s):
    """Every token of the vocabulary, in chunks that are computed again in the backward: (N, V)
    never exists."""
    numbers = kernels.CHUNK if p.hidden_ND.device.type == "cpu" else kernels.TILE
    size = max(16, numbers // len(p.head_VD))

    def classed(logp_NV):
        if s.stop is None:
            return logp_NV
        other = torch.ones(logp_NV.shape[1], dtype=torch.bool, device=logp_NV.device)
        other[s.stop] = False
        return torch.cat([logp_NV[:, other], logp_NV[:, s.stop].logsumexp(1, keepdim=True)], dim=1)

    def chunk(hidden_ND, head_VD, taught_ND):
        logp_NV = log_softmax(hidden_ND, head_VD, s.temperature)
        logq_NV = log_softmax(taught_ND, q.head_VD, s.temperature)
        return divergence(classed(logp_NV), classed(logq_NV), s)

    parts = []
    for hidden_ND, taught_ND in zip(p.hidden_ND.split(size), q.hidden_ND.split(size)):
        parts.append(checkpoint(chunk, hidden_ND, p.head_VD, taught_ND, use_reentrant=False))
    return torch.cat(parts)


LOSSES = {
    "sampled": sampled,
    "student_topk": student_topk,
    "teacher_topk": teacher_topk,
    "tail": tail,
    "full": full,
}


TOP_K = ("student_topk", "teacher_topk", "tail")                # these read --k


def bytes_a_token(config, vocabulary):
    """What a teacher elsewhere would send per token of the student's: fp32 log-probs, and int32 ids
    where they are its own."""
    return {
        "sampled": 4 + 4 * config.baseline_k,
        "student_topk": 4 * config.k,
        "tail": 4 * config.k,
        "teacher_topk": 8 * config.k,
        "full": 4 * vocabulary,
    }[config.loss]


@dataclass
class Config(Common):
    """distillation"""
    name: str = "opd"                    # the run: everything it writes lies in runs/NAME
    init: str = "runs/base"              # the student: a Hugging Face folder or a run
    teacher: str = ""                    # a model; self: the student as it is; "": as it starts
    data: str = ""                       # your prompts instead: a .jsonl file of {prompt, gold?}
    reward: str = ""                     # your own: my.py:score; learned from by --reward-coef only
    steps: int = 60                      # rollouts
    prompts: int = 64                    # prompts per step, over all ranks
    n: int = 2                           # samples per prompt
    temperature: float = 1.0             # of the rollout, and of both models' log-probs
    problems: int = 4096                 # training problems; the epochs repeat them with new noise
    decay: float = 0.5                   # share of the steps, at the end, with linear decay to zero
    kl_coef: float = 0.0                 # KL (k3) to the student as it starts
    reference_at: Literal["device", "host", "sharded"] = "device"  # where its blocks are between uses
    reward_coef: float = 0.0             # adds this times (reward - mean of the group)
    control: Literal["", "fixed_negative", "sft"] = ""  # -0.5 on the unlikely; the teacher's texts
    save_every: int = 20                 # steps between checkpoints

    # ---- the loss
    loss: Literal[*LOSSES] = "sampled"   # see the functions above
    k: int = 16                          # K of student_topk, tail, teacher_topk (32 in its paper)
    baseline_k: int = 0                  # --loss sampled: baseline over the top this many; 0: none
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"  # --loss full
    beta: float = 0.5                    # the teacher's share of the mixture of --divergence jsd
    bound: float = 5.0                   # cuts log-ratios that are weights (sampled, student_topk)
    mask_special: bool = False           # no signal at special tokens that are no stop ids
    eos_class: bool = True               # all stop ids of both tokenizers are one action, for both

    # ---- what the teacher sees, and where it is
    context: Literal["", "gold", "hint"] = ""  # only the teacher sees the answer, or its first half
    context_text: str = "{context}\n{prompt}"  # and how
    teacher_at: Literal["device", "sharded", "host"] = "device"  # where its blocks are between uses

    # ---- texts that are given
    gold: str = ""                       # texts: a .jsonl of {prompt, response}, or task, teacher
    gold_share: float = 0.25             # of those, for every rollout

    # ---- length, and the guard
    horizon: int = 0                     # rollouts end after this many tokens; 0: after --max-new
    horizon_steps: int = 0               # and it grows to --max-new in this many steps; 0: it stays
    guard: int = 12                      # stop when texts get worse for this many steps; 0: never
    guard_rise: float = 0.1              # truncated or repeating: by at least this share of them

    # ---- evaluation
    eval_every: int = 10                 # steps between evaluations; 0: only before and after
    eval_n: int = 200                    # validation problems of one
    eval_k: int = 4                      # samples of each
    final_n: int = 1000                  # test problems of the evaluations before and after
    look_k: int = 16                     # the k of the diagnostics
    repeat_n: int = 4                    # a token repeats if it ends an n-gram seen before


def configure(argv):
    """-> Config. What does not go together is refused, with the reason, and so is a flag without
    effect."""
    c = flags(Config, argv, __doc__)
    positive(c, "k look_k prompts n steps max_new problems row_tokens eval_n eval_k final_n save_every "
                "workers repeat_n")
    teacher_writes = c.gold == "teacher" or c.control == "sft"
    for wrong, why in [
        (not c.teacher and not c.context and c.control != "fixed_negative",
         "no --teacher: give a model, or --context gold, or --control"),
        (c.control == "fixed_negative" and (c.teacher or c.context),
         "--control fixed_negative is the run without a teacher: leave it out"),
        (c.control == "sft" and c.teacher == "self",
         "--control sft learns a teacher's texts: give another model than self"),
        (c.control and (c.gold or c.reward_coef),
         f"--control {c.control} is a run of one signal: leave --gold and --reward-coef out"),
        (c.control == "sft" and c.context,
         "--control sft samples from the teacher, which reads no --context there: leave it out"),
        (c.gold == "teacher" and c.teacher in ("", "self"),
         "--gold teacher needs a --teacher that is another model"),
        (c.teacher_at != "device" and teacher_writes,
         f"--teacher-at {c.teacher_at}: a teacher that samples has CUDA graphs, which need weights "
         "that stay where they are; leave it out"),
        (c.teacher == "self" and not c.context,
         "--teacher self without --context is its own equal: every signal is 0"),
        (c.data and not c.reward,
         "--data needs --reward my.py:score: what is a good answer to your prompts?"),
        (c.divergence != "reverse" and c.loss != "full",
         f"--divergence {c.divergence} needs the whole vocabulary: --loss full"),
        (c.baseline_k and c.loss != "sampled",
         f"--baseline-k belongs to --loss sampled, and --loss is {c.loss}"),
        (not 0 < c.beta < 1,
         f"--beta {c.beta} is a share of the mixture: give a number between 0 and 1"),
        (not 0 < c.gold_share <= 4,
         f"--gold-share {c.gold_share}: give a number above 0, at most 4"),
        (c.bound <= 0, "--bound 0 leaves no signal: give a number above 0"),
        (c.reward_coef and c.n < 2, "--reward-coef needs groups to compare in: give --n 2 or more"),
        (c.horizon > c.max_new, f"--horizon {c.horizon} is above --max-new {c.max_new}"),
        (c.horizon_steps and not c.horizon, "--horizon-steps without --horizon: grow from where?"),
        (0 < c.guard < 6,
         f"--guard {c.guard}: a rise is told from noise in 6 steps or more; 0 turns it off"),
        (c.context and ("{context}" not in c.context_text or "{prompt}" not in c.context_text),
         "--context-text must hold {context} and {prompt}"),
    ]:
        if wrong:
            die(why)
    shares(c, "guard_rise")
    control = f"--control {c.control} learns without a teacher's log-probs"
    weighed = c.loss == "sampled" or c.reward_coef or c.control == "fixed_negative"
    without_effect(c, [
        ("task", not c.data, "--data brings the problems, and --reward the reward"),
        ("loss k bound beta look_k repeat_n mask_special", not c.control, control),
        ("k", c.loss in TOP_K, f"--loss {c.loss} looks at no top k ({', '.join(TOP_K)} do)"),
        ("bound", c.loss in ("sampled", "student_topk"), f"--loss {c.loss} has no weights to cut"),
        ("beta", c.divergence == "jsd", "it is for --divergence jsd"),
        ("tis", weighed and c.control != "sft", "it weighs sampled tokens: those of --loss sampled, of "
         "--reward-coef and of --control fixed_negative"),
        ("kl_coef", c.control != "sft", "--control sft learns given texts alone"),
        ("context_text", c.context, "--context is not given"),
        ("gold_share", c.gold, "--gold is not given"),
        ("teacher_at eos_class", c.control != "fixed_negative" and c.teacher != "self",
         "there is no second model"),
        ("guard_rise", c.guard, "--guard 0 never stops a run"),
    ])
    check_flags(c)
    return c


# -----------------------------------------------------------------------------
# the loss of a batch


def make_loss(config, model, teacher, stop=(), special=(), contexts=None, reference=None,
              log_ratios=None):
    """-> loss(batch, hidden_ND, head_VD) -> (sum to be minimised, stats as sums). Samples with
    index below 0 are gold: learned as they are. batch.advantage_N: what the task's reward or a
    control adds; the teacher's part is made here. log_ratios: a dict that takes log q - log p of
    every token, by (problem, index)."""
    c = config
    taught = c.control == ""

    def loss(batch, hidden_ND, head_VD):
        device = hidden_ND.device
        if len(batch.targets_N) == 0:                    # a rank out of work
            meet(teacher, reference, batch)
            return linear_logprob(hidden_ND, head_VD, batch.targets_N)[0].sum(), {}

        p = SimpleNamespace(hidden_ND=hidden_ND, head_VD=head_VD)
        if taught:
            p, q, bad_N = sides(model, teacher, batch, hidden_ND, head_VD, contexts)
        s = SimpleNamespace(
            targets_N=batch.targets_N,
            temperature=c.temperature,
            k=c.k,
            baseline=c.baseline_k,
            bound=c.bound,
            divergence=c.divergence,
            beta=c.beta,
            stop=torch.tensor(stop, device=device) if len(stop) > 1 else None,
        )

        s.logp_N, entropy_N = of_target(p, s)
        gold_N = torch.tensor([x.index < 0 for x in batch.samples], device=device)[batch.sample_N]
        with torch.no_grad():
            # the sampler drew one id of the class: compare with that one
            exact_N = s.logp_N
            if s.stop is not None:
                exact_N, _ = linear_logprob(hidden_ND, head_VD, batch.targets_N, c.temperature)
            gap_N = torch.where(gold_N, 0.0, exact_N - batch.sampler_logp_N)
            s.trust_N = torch.ones_like(gap_N)
            if c.tis:
                s.trust_N = (gap_N + batch.kept_N).exp().clamp(max=c.tis)

        # what the teacher says; no signal where that is not a number, nor at special tokens
        value_N = torch.zeros_like(s.logp_N)
        live_N = ~gold_N
        if taught:
            live_N = live_N & ~bad_N
            if len(special):
                live_N = live_N & ~torch.isin(batch.targets_N, torch.tensor(special, device=device))
            with torch.no_grad():
                s.logq_N, _ = of_target(q, s)
            value_N = torch.where(live_N, LOSSES[c.loss](p, q, s), 0.0)
        value_N = torch.where(gold_N, -s.logp_N, value_N - s.trust_N * batch.advantage_N * s.logp_N)
        k3_N = torch.zeros_like(value_N)
        if c.kl_coef:
            k3_N = torch.where(gold_N, 0.0, k3_to(reference, batch, s.logp_N, c.temperature))
        total = (batch.weight_N * (value_N + c.kl_coef * k3_N)).sum()

        with torch.no_grad():
            stats = dict(
                tokens=len(batch.targets_N),
                entropy=entropy_N.sum(),
                sampler_kl=(gap_N.expm1() - gap_N).sum(),
                sampler_far=(gap_N.abs() > 0.1).sum(),
                sampler_max=gap_N.abs().max(),
                reference_kl=k3_N.sum(),
                weight_all=(gap_N + batch.kept_N).exp(),
                drawn=(~gold_N).sum(),
                gold=gold_N.sum(),
            )
            if taught:
                r_N = torch.where(live_N, s.logp_N - s.logq_N, 0.0)
                stats |= disagreement(batch, r_N, live_N, c)
                stats["teacher_nan"] = (bad_N & ~gold_N).sum()
                sums = measure(p.hidden_ND, p.head_VD, q.hidden_ND, q.head_VD, batch.sample_N,
                               c.look_k, list(stop), c.temperature)
                stats["look_all"] = sums.flatten()
                if log_ratios is not None:
                    log_ratios.update(by_sample(batch, -r_N))
        if hidden_ND.requires_grad:
            stats |= pulls_of(hidden_ND)
        return total, stats

    return loss


def meet(teacher, reference, batch):
    """A rank without work takes part where blocks are gathered from all ranks."""
    for model in (teacher, reference):
        if model is not None:
            with torch.no_grad():
                batch.hidden(model)


# -----------------------------------------------------------------------------
# what is learned from


def horizon(config, step):
    """Tokens of a rollout at a step."""
    if not config.horizon:
        return config.max_new
    grown = min(1.0, step / config.horizon_steps) if config.horizon_steps else 0.0
    return round(config.horizon + grown * (config.max_new - config.horizon))


def set_advantages(config, groups):
    """Fills sample.advantage, a list so that zeros are trained: the loss adds the teacher's part."""
    for group in groups:
        values = np.zeros(len(group))
        if config.reward_coef:
            values = config.reward_coef * BASELINES["mean"](np.array([s.reward for s in group]))
        for s, value in zip(group, values):
            s.advantage = [float(value)] * len(s.tokens)
    if config.control == "fixed_negative":
        # the least likely fifth of the tokens of all ranks, by the sampler's log-probs
        samples = [s for g in groups for s in g]
        logps = np.array([x for s in samples for x in s.logprobs])
        all_logps = np.concatenate([np.zeros(0), *gather(logps)])
        limit = np.nanquantile(all_logps, 0.2) if len(all_logps) else 0.0
        for s in samples:
            s.advantage = [-0.5 if x <= limit else 0.0 for x in s.logprobs]


def as_gold(prompt, tokens, problem, number):
    zeros = [0.0] * len(tokens)
    return Sample(list(prompt), list(tokens), zeros, "stop", problem, -1 - number, 0,
                  advantage=list(zeros))


def gold_groups(rl, problems, texts, writer, max_new):
    """The gold of a step, each text a group of its own: from the file, the task, or the teacher.
    Rank 0's; the teacher writes on all ranks. A share above 1 / n asks for more texts than the step
    has problems: then the teacher writes several of some, and a task repeats its one."""
    config = rl.config
    count = max(1, round(config.gold_share * config.prompts * config.n))
    each, more = divmod(count, len(problems))
    if writer:
        found = list(collect(writer, problems[:more], each + 1, max_new=max_new)) if more else []
        if each:
            found += collect(writer, problems[more:], each, max_new=max_new)
        return written(found)
    if not rl.env.master:
        return []
    if texts:                                            # in turn, from the top again at the end
        turns = range((rl.step - 1) * count, rl.step * count)
        return [[as_gold(*texts[i % len(texts)], -1 - i, 0)] for i in turns]
    found = []
    for i, p in enumerate(problems):
        response = rl.tok.encode(p.gold) + rl.tok.encode(rl.tok.end)
        for number in range(each + (i < more)):
            found.append([as_gold(prompt_ids(p, rl.tok), response, p.id, number)])
    return found


def written(groups):
    """The teacher's rollouts as gold; one that never ended teaches nothing about ending."""
    ended = [s for g in groups for s in g if s.finished == "stop"]
    return [[as_gold(s.prompt, s.tokens, s.problem, s.index)] for s in ended]


# -----------------------------------------------------------------------------
# the stages of a step


@dataclass
class Own:
    """What a checkpoint keeps of this script."""
    best_step: int = 0                   # whose weights lie in best/
    writer_visits: dict = field(default_factory=dict)            # of the teacher as a sampler


@dataclass
class Lessons:
    """What the student learns from."""
    teacher: GPT | None                  # None: the student itself, or no teacher
    stop: list                           # ids that end a response
    special: list                        # ids that get no signal
    contexts: dict | None                # problem -> the prompt that only the teacher sees
    texts: list | None                   # the gold of a file
    writer: RL | None                    # the teacher as a sampler


def prepare(rl):
    """-> Lessons. What a user can get wrong about them ends here."""
    config = rl.config
    try:
        teacher = add_teacher(rl)
        contexts, texts = add_texts(rl, teacher)
    except (ValueError, FileNotFoundError) as e:
        rl.workers.close()
        die(e)
    except SystemExit:
        rl.workers.close()
        raise
    special = set()
    if config.mask_special:
        special = {i for word in getattr(rl.tok, "special", ()) for i in rl.tok.encode(word)}
    stop = sorted(rl.tok.stop)
    writer = add_writer(rl, teacher)
    return Lessons(teacher, stop, sorted(special - rl.tok.stop), contexts, texts, writer)


def add_teacher(rl):
    """-> the teacher, if it is a model of its own. Its stop ids join the student's."""
    config = rl.config
    if config.control == "fixed_negative" or config.teacher == "self":
        return None
    width = len(rl.model.head_weight)
    teacher, its_tok = load_teacher(config.teacher or config.init, rl.tok, rl.env, width)
    for line in audit(rl.tok, its_tok) if rl.env.master else ():
        print(f"audit: {line}")
    if rl.sampler.max_len > teacher.config.max_len:
        raise ValueError(f"a prompt and --max-new take {rl.sampler.max_len} tokens, the teacher "
                         f"serves {teacher.config.max_len}")
    if config.eos_class:
        rl.tok.stop = set(stop_class(rl.tok, its_tok))   # saved with the student
        rl.sampler.stop = set(rl.tok.stop)
        rl.sampler.reset()
    return place_blocks(teacher, config.teacher_at, rl.env)


def add_texts(rl, teacher):
    """-> the prompts that only the teacher sees, the gold of a file: None where there are none."""
    config = rl.config
    k = config.k if config.loss in TOP_K else 0
    look_k = 0 if config.control else config.look_k
    if max(k, config.baseline_k, look_k) > rl.tok.vocab_size:
        raise ValueError(f"--k {config.k}, --baseline-k {config.baseline_k}, --look-k {config.look_k}: "
                         f"the vocabulary has {rl.tok.vocab_size} tokens")
    if config.gold == "task" and any(p.gold is None for p in rl.problems):
        raise ValueError("--gold task: not every problem has a gold answer; give a file")
    contexts = None
    texts = None
    if config.context:
        room = min((teacher or rl.model).config.max_len, config.row_tokens)
        contexts = privileged(config, rl.tok, rl.problems, room)
    if config.gold not in ("", "task", "teacher"):
        texts = read_gold(config.gold, rl.tok, config.row_tokens)
    return contexts, texts


def add_writer(rl, teacher):
    """-> the teacher as a sampler, with noise of its own; all else is the student's."""
    config = rl.config
    if config.control != "sft" and config.gold != "teacher":
        return None
    sampler = Sampler(teacher, set(rl.tok.stop), rl.tok, slots=config.slots or None,
                      max_len=rl.sampler.max_len, deterministic=rl.env.deterministic)
    return replace(rl, sampler=sampler, visits={}, config=replace(config, seed=config.seed + 1))


def sample_groups(rl, lessons, max_new):
    """-> the groups of a step, and those that are learned from. The student samples, or for
    --control sft the teacher."""
    config = rl.config
    problems = next_problems(rl, config.prompts)
    if config.control == "sft":
        groups = list(collect(lessons.writer, problems, config.n, max_new=max_new))
        return groups, written(groups)
    groups = list(collect(rl, problems, config.n, max_new=max_new))
    set_advantages(config, groups)
    if config.gold:
        return groups, groups + gold_groups(rl, problems, lessons.texts, lessons.writer, max_new)
    return groups, groups


def unscored(stats):
    return stats.get("drawn", 0) and stats.get("teacher_nan", 0) == stats["drawn"]


def give_up(rl, run, untouched):
    """Saves the state before the step that has no score, its problems still to come, and ends."""
    rl.optimizer.zero_grad()
    rl.normaliser = 0.0
    rl.cursor, rl.visits, rl.own.writer_visits = untouched
    rl.step -= 1
    save(rl, run, history=max(50, rl.config.guard))
    rl.workers.close()
    die(f"step {rl.step + 1}: the teacher's log-probs are nan at every token. The last good state "
        f"is {run.latest()[0]}")


def note_visits(rl, writer):
    share_visits(rl)
    if writer:
        share_visits(writer)
        rl.own.writer_visits = writer.visits


def add_numbers(numbers, stats, config, max_new, width):
    """What distillation adds to the numbers of a step, in place: they are in rl.history already."""
    numbers |= diagnosis(stats, width) | dict(max_new=max_new)
    if max_new < config.max_new:                 # what the horizon cuts was not meant to end
        numbers |= dict(beyond=numbers["truncated"], truncated=0.0)


def status(step, config, m):
    """One line per step, reward first."""
    taught = ""
    if "overlap" in m:
        taught = (f"overlap {m['overlap']:.0%}  mass {m['p_mass']:.1%}/{m['q_mass']:.1%}  KL "
                  f"{m['kl']:.3f}  coherence {m['coherence']:.2f}  ")
    return (f"step {step}/{config.steps}  reward {m['reward']:.3f}  truncated {m['truncated']:.0%}  "
            f"repeat {m['repetition']:.0%}  length {m['length']:.1f}  entropy {m['entropy']:.3f}  "
            f"{taught}rollout {m['t_rollout']:.2f}s  update {m['t_train']:.2f}s")


def log_step(rl, run, numbers):
    run.log(status(rl.step, rl.config, numbers))
    for warning in warnings(rl.history, rl.config):
        run.log(f"  warning: {warning}")
    if numbers.get("teacher_nan"):
        run.log(f"  warning: the teacher's log-probs are nan at {numbers['teacher_nan']:.0f} "
                "tokens: those are left out")


def samples_of(rl, groups, log_ratios):
    """-> rows for samples.jsonl, with the teacher's log-ratios of all ranks."""
    disagreements = {k: v for part in gather(log_ratios) for k, v in part.items()}
    log_ratios.clear()
    rows = sample_rows(rl, groups)
    for row in rows:
        row["disagreement"] = disagreements.get((row["problem"], row["index"]))
    return rows


def keep_best(rl, run, avg):
    rl.best = avg
    rl.own.best_step = rl.step
    run.keep_best(rl.step, lambda folder: rl.model.save_hf(folder, rl.tok))


def go_back(rl, run, reason):
    """The guard ends a run in its best state. Masters and moments are those of the state that is
    left, so the optimizer is a new one."""
    if not rl.config.eval_every:
        run.log(f"stopped after step {rl.step}: {reason}. The weights stay as they are: "
                "--eval-every 0 says of no state that it is better")
        return
    rl.model.load_hf(Path(run.folder, "best", f"step_{rl.own.best_step}"))
    grads = rl.optimizer.grads
    rl.optimizer = None                  # its memory first
    rl.optimizer = memory.new_optimizer(rl.model, rl.config, grads)
    rl.history.clear()
    run.log(f"stopped after step {rl.step}: {reason}. Back to the best state, of step "
            f"{rl.own.best_step}")


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config and init: the student and its stages; what it learns from
    config = configure(argv)
    second = config.control != "fixed_negative" and config.teacher != "self"
    rl = setup(config, reward=config.reward, task=config.data, teacher_at=config.teacher_at,
               teacher=(config.teacher or config.init) if second else "")
    rl.own = Own()
    lessons = prepare(rl)
    teacher, writer = lessons.teacher, lessons.writer
    log_ratios = {}
    loss = make_loss(config, rl.model, teacher, lessons.stop, lessons.special, lessons.contexts,
                     rl.reference, log_ratios)
    files = [__file__, common.teacher.__file__, common.overlap.__file__, stages.__file__]
    run = open_run(rl, sources=files)
    if writer:
        writer.visits = rl.own.writer_visits
    name = config.teacher or ("none" if teacher is None else "the student as it starts")
    run.log(f"{config.control or config.loss} on {config.data or config.task}: student "
            f"{config.init}, teacher {name}, {config.prompts} x {config.n} samples per step, "
            f"{rl.env.world} x {rl.env.device}")

    # ---- before
    if rl.step == 0:
        before = evaluation(rl, run, "test", "before")
        before |= evaluation(rl, run, "eval", "  validation")
        run.metrics(0, spent=0, **before)
        keep_best(rl, run, before["eval/avg"])

    # ---- the loop
    bar = progress(config.steps, "opd", rl.step)
    reason = ""
    while not over(rl) and not reason:
        untouched = rl.cursor, dict(rl.visits), dict(writer.visits) if writer else {}
        rl.step += 1
        start = time.perf_counter()

        # rollout: the student samples, or for --control sft the teacher; gold comes on top
        max_new = horizon(config, rl.step)
        groups, learned = sample_groups(rl, lessons, max_new)

        # update: the teacher scores the rows that are learned from
        stats = update(rl, learned, loss)
        if unscored(stats):
            bar.close()
            give_up(rl, run, untouched)
        stats |= step(rl)
        note_visits(rl, writer)

        # log
        numbers = summary(rl, groups, stats, start)
        add_numbers(numbers, stats, config, max_new, rl.model.config.d_model)
        log_step(rl, run, numbers)
        run.pace(rl.step, rl.steps, numbers)
        bar.update()

        # the guard looks at the texts
        reason = guard(rl.history, config)
        last = over(rl) or bool(reason)

        # evaluate
        if due(rl.step, config.eval_every) and not last:
            numbers |= evaluation(rl, run, "eval", "  validation")
            if numbers["eval/avg"] > rl.best:
                keep_best(rl, run, numbers["eval/avg"])
        if reason:
            go_back(rl, run, reason)
        if last:
            numbers |= evaluation(rl, run, "test", "after")
            numbers |= evaluation(rl, run, "eval", "  validation")
        run.metrics(rl.step, **numbers)
        run.samples(samples_of(rl, groups, log_ratios))

        # save: a signal to any rank ends all of them after this step
        stopping = run.stopping()
        if last or stopping or due(rl.step, config.save_every):
            save(rl, run, history=max(50, config.guard))
        if stopping and not last:
            stop_here(rl, run)
    bar.close()
    finish(rl, run)                                      # pictures, and where the model lies


if __name__ == "__main__":
    main()
