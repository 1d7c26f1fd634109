"""
opd.py: on-policy distillation. The student samples, a teacher scores every token; a dense signal where a reward is one number a text.

    rollouts of the student -> the teacher's log-probs of them, in the same packed rows -> one of the losses below -> the next step

p is the student, q the teacher, r = log p - log q, always at the student's own prefixes. What is minimised is the reverse KL,
sum p r, at every token, with no gradient through the sampling of the prefix; the losses differ in how much of the vocabulary they
look at, which is what a teacher has to send: one number a token, K of them, or all. Each has zero gradient where p = q.

It is brittle. So every step logs how far the two overlap and where, a guard stops a run whose texts begin to repeat or to run into
the limit, and opd_check.py asks beforehand whether it will work. A loss that falls says nothing: look at the accuracy.

Deleted from the usual recipe, and why:
- no teacher server: the teacher scores the very Batch that is learned from, in one forward, so any support set costs a gather;
- no discounted sum of later rewards: a discount above 0 has bought nothing but variance (arXiv 2603.25562, and Thinking Machines);
- no KL that is back-propagated at the sampled token: the expected gradient of r itself is 0;
- no top-k KL without renormalisation, tail or stop-gradient: its gradient is not 0 at p = q.

    python opd.py --teacher runs/rl                                              a laptop: the base learns what RL taught another
    torchrun --nproc_per_node=8 opd.py --init DIR --teacher DIR --teacher-at sharded --task math500 --max-new 4096 --lr 1e-6
    python opd.py --teacher runs/rl --loss student_topk --k 16
    python opd.py --control fixed_negative                                       is it the teacher at all?
    python opd.py --control sft --teacher runs/rl                                fine-tuning on the teacher's own texts
    python opd.py --init runs/rl --teacher runs/base                             reverse: should lose what RL taught
    python opd.py --context gold --init DIR --task gsm8k                         the teacher is the student who sees the answer
"""

import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import data
import kernels
import nanorl
import opd_check
import pack
from common import view
from common.optim import Optimizer
from common.run import Run, all_sum, die, flags, gather, positive, progress
from evaluate import evaluate, prompt_ids, words
from kernels import linear_logprob, linear_logprob_at, linear_topk
from nanorl import (BASELINES, address, collect, next_problems, predicting, recent, restore, sample_rows, setup, share_visits, step,
                    summary, update, warnings)
from opd_check import load_teacher, log_softmax, look, looked, repeated, stop_class
from rollout import Sample, Sampler
from ttrl import keep

# -----------------------------------------------------------------------------
# the losses. p, q: SimpleNamespaces of hidden_ND and head_VD; s: what else is known of the predictions. -> value_N, to be minimised.

NOWHERE = -1e30          # the log-prob of a column that is out of the game, for both models: p = 0 and r = 0 there


def merged(side, ids_NK, logp_NK, s):
    """Where several ids stop, they are one action: out of the columns, and their sum is one more column."""
    if s.stop is None:
        return logp_NK
    return torch.cat([logp_NK.masked_fill(torch.isin(ids_NK, s.stop), NOWHERE), ending(side, s)], dim=1)


def ending(side, s):
    """(N, 1): log-prob of stopping, by whichever id."""
    ids = s.stop.expand(len(side.hidden_ND), -1).contiguous()
    return linear_logprob_at(side.hidden_ND, side.head_VD, ids, s.temperature).logsumexp(1, keepdim=True)


def top(side, k, s):
    ids_NK, logp_NK = linear_topk(side.hidden_ND, side.head_VD, k, s.temperature)
    return ids_NK, merged(side, ids_NK, logp_NK, s)


def at(side, ids_NK, s):
    return merged(side, ids_NK, linear_logprob_at(side.hidden_ND, side.head_VD, ids_NK, s.temperature), s)


def of_target(side, s):
    """-> log-prob of the sampled token (of stopping, if it stops) and the entropy."""
    logp_N, entropy_N = linear_logprob(side.hidden_ND, side.head_VD, s.targets_N, s.temperature)
    if s.stop is not None:
        logp_N = torch.where(torch.isin(s.targets_N, s.stop), ending(side, s).squeeze(1), logp_N)
    return logp_N, entropy_N


def bounded(r, s):
    return r.detach().clamp(-s.bound, s.bound)


def sampled(p, q, s):
    """A policy gradient whose reward is -r at the sampled token. Unbiased, and all that a teacher sends is one number. The baseline
    E[-r], over the student's top K, takes variance away where the two are far apart (arXiv 2605.07865) and nothing else."""
    advantage_N = -bounded(s.logp_N - s.logq_N, s)
    if s.baseline:
        ids_NK, logp_NK = top(p, s.baseline, s)
        advantage_N = advantage_N + (logp_NK.exp() * bounded(logp_NK - at(q, ids_NK, s), s)).sum(1).detach()
    return -s.trust_N * advantage_N * s.logp_N


def student_topk(p, q, s):
    """The exact gradient sum p r dlog p, cut to the student's top K. Stop-gradient weights, so it is 0 at p = q whatever is cut."""
    ids_NK, logp_NK = top(p, s.k, s)
    r_NK = bounded(logp_NK - at(q, ids_NK, s), s)
    return (logp_NK.detach().exp() * r_NK * logp_NK).sum(1)


def teacher_topk(p, q, s):
    """KL(p || q), both renormalised on the teacher's top K (local support matching). Blind to what the student has elsewhere, so it
    is meant for --top-p 0.9 rollouts and for students whose mass is there (`covered` of the diagnostics)."""
    ids_NK, logq_NK = top(q, s.k, s)
    logp_NK, logq_NK = at(p, ids_NK, s).log_softmax(1), logq_NK.log_softmax(1)
    return (logp_NK.exp() * (logp_NK - logq_NK)).sum(1)


def with_tail(logp_NK):
    """One more column: everything else. Near a mass of 1 the difference is rounding, and is not believed."""
    return torch.cat([logp_NK, (1 - logp_NK.exp().sum(1, keepdim=True)).clamp(min=1e-6).log()], dim=1)


def tail(p, q, s):
    """KL on K + 1 outcomes: the student's top K and the rest as one. d sum p r = sum p r dlog p, since these p do add up to 1."""
    ids_NK, logp_NK = top(p, s.k, s)
    logp_NK, logq_NK = with_tail(logp_NK), with_tail(at(q, ids_NK, s))
    return ((logp_NK.exp() * (logp_NK - logq_NK)).detach() * logp_NK).sum(1)


def divergence(logp_NV, logq_NV, s):
    """reverse: sum p (log p - log q), the nearest mode; forward: p and q exchanged, all modes; jsd: both against their mixture."""
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    if s.divergence == "reverse":
        return (p_NV * (logp_NV - logq_NV)).sum(1)
    if s.divergence == "forward":
        return (q_NV * (logq_NV - logp_NV)).sum(1)
    logm_NV = torch.logaddexp(logp_NV + math.log(1 - s.beta), logq_NV + math.log(s.beta))
    return (s.beta * q_NV * (logq_NV - logm_NV) + (1 - s.beta) * p_NV * (logp_NV - logm_NV)).sum(1)


def full(p, q, s):
    """Every token of the vocabulary, in chunks that are computed again in the backward: (N, V) never exists."""
    rows = max(16, (kernels.CHUNK if p.hidden_ND.device.type == "cpu" else kernels.TILE) // len(p.head_VD))

    def classed(logp_NV):
        if s.stop is None:
            return logp_NV
        rest = torch.ones(logp_NV.shape[1], dtype=torch.bool, device=logp_NV.device).index_fill_(0, s.stop, False)
        return torch.cat([logp_NV[:, rest], logp_NV[:, s.stop].logsumexp(1, keepdim=True)], dim=1)

    def piece(hidden_ND, head_VD, taught_ND):
        logp_NV, logq_NV = log_softmax(hidden_ND, head_VD, s.temperature), log_softmax(taught_ND, q.head_VD, s.temperature)
        return divergence(classed(logp_NV), classed(logq_NV), s)

    return torch.cat([checkpoint(piece, p.hidden_ND[a:a + rows], p.head_VD, q.hidden_ND[a:a + rows], use_reentrant=False)
                      for a in range(0, len(p.hidden_ND), rows)])


LOSSES = {"sampled": sampled, "student_topk": student_topk, "teacher_topk": teacher_topk, "tail": tail, "full": full}


def bytes_a_token(config, vocabulary):
    """What a teacher elsewhere would send for a token of the student's: fp32 log-probs, and int32 ids where they are its own."""
    return {"sampled": 4 + 4 * config.baseline_k, "student_topk": 4 * config.k, "tail": 4 * config.k, "teacher_topk": 8 * config.k,
            "full": 4 * vocabulary}[config.loss]


@dataclass
class Config:
    name: str = "opd"                    # the run: everything it writes lies in runs/NAME
    init: str = "runs/base"              # the student: a Hugging Face folder or a run
    teacher: str = ""                    # the same, with the same tokenizer; empty with --context: the student as it starts; self: as it is
    task: str = "countdown"              # a task of data/; the word after a colon is its variant
    data: str = ""                       # your own prompts instead: a .jsonl file of {prompt, gold?}
    reward: str = ""                     # your own reward: my.py:score; with a task it is measured, and learned from by --reward-coef
    loss: Literal[*LOSSES] = "sampled"   # see the functions above
    k: int = 16                          # the K of student_topk, teacher_topk (there 32 in its paper) and tail
    baseline_k: int = 0                  # --loss sampled: baseline over the student's top this many; 0: none
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"  # --loss full
    beta: float = 0.5                    # the teacher's share of the mixture of --divergence jsd
    bound: float = 5.0                   # log-ratios are cut here where they are weights (sampled, student_topk)
    control: Literal["", "fixed_negative", "sft"] = ""  # no teacher, -0.5 on the least likely fifth; learn the teacher's texts, no rollouts
    context: Literal["", "gold", "hint"] = ""  # what only the teacher's prompt holds: the gold answer, or its first half
    context_text: str = "{context}\n{prompt}"  # and how
    reward_coef: float = 0.0             # task reward beside the teacher's: this times (reward - mean of the group)
    kl_coef: float = 0.0                 # KL (k3) to the student as it starts
    gold: str = ""                       # texts to learn beside: a .jsonl file of {prompt, response}; task: gold answers; teacher: its own
    gold_share: float = 0.25             # of those, for every rollout
    mask_special: bool = False           # no signal at sampled special tokens, stop ids apart: templates differ in them
    eos_class: bool = True               # all stop ids of both tokenizers are one action, for both models
    horizon: int = 0                     # rollouts end after this many tokens; 0: after --max-new
    horizon_steps: int = 0               # and the horizon grows to --max-new in this many steps; 0: it stays
    teacher_at: Literal["device", "sharded", "host"] = "device"  # where the teacher is between two updates
    look_k: int = 16                     # the k of the diagnostics
    repeat_n: int = 4                    # a token repeats if the last this many were in its text before; short texts want 2
    guard: int = 12                      # stop when truncation or repetition has risen for this many steps; 0: never
    guard_rise: float = 0.1              # by at least this share of the texts
    tis: float = 2.0                     # truncate the importance weight between sampler and trainer here; 0: no weight
    steps: int = 60                      # rollouts
    tokens: int = 0                      # end after this many sampled tokens, if that is sooner than --steps; 0: no limit
    prompts: int = 64                    # prompts a step, over all ranks
    n: int = 2                           # samples of a prompt
    max_new: int = 48                    # tokens of a sample, at most; look at `truncated` before anything else
    temperature: float = 1.0             # of the rollout, and of both models' log-probs
    top_p: float = 1.0                   # 1: off; otherwise corrected by the mass it kept (sampled)
    problems: int = 4096                 # training problems; the epochs repeat them with new noise
    lr: float = 2e-3                     # AdamW
    muon_lr: float = 0.0                 # Muon for the matrices of the blocks, with this learning rate; 0: AdamW for all
    warmup: int = 5                      # steps of linear warm-up
    decay: float = 0.5                   # share of the steps, at the end, with linear decay to zero
    weight_decay: float = 0.0            # decoupled, matrices only
    clip: float = 1.0                    # global norm of the gradient; 0: no clipping
    row_tokens: int = 4096               # tokens of one packed row
    slots: int = 0                       # rows the sampler decodes at a time; 0: from the device
    workers: int = 2                     # reward processes of each rank
    eval_every: int = 10                 # steps between evaluations; 0: only before and after
    eval_n: int = 200                    # problems of one, of the valid split
    eval_k: int = 4                      # samples of each
    final_n: int = 1000                  # problems of the evaluations before and after, of the test split
    save_every: int = 20                 # steps between checkpoints
    seed: int = 0                        # problems and samples
    checkpoint: bool = False             # recompute blocks in the backward: memory for time
    device: str = "auto"                 # auto, cpu, cuda, mps
    dtype: str = "auto"                  # auto (bf16 on CUDA, fp32 elsewhere), fp32, bf16
    threads: int = 0                     # CPU threads; 0: all cores, shared by the ranks
    deterministic: bool | None = None    # repeatable bit for bit; none: on CPU
    resume: bool = False                 # go on with runs/NAME
    wandb: str = ""                      # a wandb project, if curves should go there too


# what nanorl.py's stages read of it, under the same names
SHARED = ("name init task data reward kl_coef tis steps tokens prompts n max_new temperature top_p problems lr muon_lr warmup decay "
          "weight_decay clip row_tokens slots workers eval_n final_n seed checkpoint device dtype threads deterministic").split()


def configure(argv):
    """-> (config, the nanorl.Config that its stages read). What does not go together is refused, with the reason."""
    c = flags(Config, argv, __doc__)
    positive(c, "k look_k prompts n steps max_new row_tokens eval_n eval_k final_n save_every workers repeat_n")
    for wrong, why in [
        (not c.teacher and not c.context and c.control != "fixed_negative", "no --teacher: give a model, or --context gold, or --control"),
        (c.control == "fixed_negative" and (c.teacher or c.context), "--control fixed_negative is the run without a teacher: leave it out"),
        (c.control == "sft" and c.teacher == "self", "--control sft learns a teacher's texts: give another model than self"),
        (c.control and (c.gold or c.reward_coef), f"--control {c.control} is a run of one signal: leave --gold and --reward-coef out"),
        (c.control == "sft" and c.context, "--control sft samples from the teacher, which reads no --context there: leave it out"),
        (c.gold == "teacher" and c.teacher in ("", "self"), "--gold teacher needs a --teacher that is another model"),
        (c.teacher_at != "device" and "teacher" in (c.gold, c.control.replace("sft", "teacher")),
         f"--teacher-at {c.teacher_at}: a teacher that samples has CUDA graphs, which need weights that stay where they are; leave it out"),
        (c.teacher == "self" and not c.context, "--teacher self without --context is its own equal: every signal is 0"),
        (c.divergence != "reverse" and c.loss != "full", f"--divergence {c.divergence} needs the whole vocabulary: --loss full"),
        (c.baseline_k and c.loss != "sampled", f"--baseline-k belongs to --loss sampled, and --loss is {c.loss}"),
        (not 0 < c.beta < 1, f"--beta {c.beta} is a share of the mixture: give a number between 0 and 1"),
        (not 0 < c.gold_share <= 4, f"--gold-share {c.gold_share}: give a number above 0, at most 4"),
        (c.bound <= 0, "--bound 0 leaves no signal: give a number above 0"),
        (c.reward_coef and c.n < 2, "--reward-coef needs groups to compare in: give --n 2 or more"),
        (c.horizon > c.max_new, f"--horizon {c.horizon} is above --max-new {c.max_new}"),
        (c.horizon_steps and not c.horizon, "--horizon-steps without --horizon: grow from where?"),
        (0 < c.guard < 6, f"--guard {c.guard}: a rise is told from noise in 6 steps or more; 0 turns it off"),
        (c.context and ("{context}" not in c.context_text or "{prompt}" not in c.context_text),
         "--context-text must hold {context} and {prompt}"),
    ]:
        if wrong:
            die(why)
    return c, nanorl.Config(**{k: getattr(c, k) for k in SHARED}, algo="dr_grpo", aggregate="token", trust="none")


# -----------------------------------------------------------------------------
# the teacher: on its batch, and at rest


def sides(model, teacher, batch, hidden_ND, head_VD, contexts=None):
    """-> p, q: the hidden states of both at the same predictions, the rows of both heads that are tokens; and which of them the
    teacher could not score. contexts: {problem: the prompt that only the teacher sees}."""
    taught = teacher or model
    with torch.no_grad():
        if contexts:
            samples = [replace(s, prompt=contexts.get(s.problem, s.prompt)) for s in batch.samples]
            other = pack.rows([segment for s in samples for segment in pack.alone(s)]).to(hidden_ND.device)
            place = {address(s): i for i, s in enumerate(batch.samples)}
            owner_N = torch.tensor([place[address(s)] for s in other.samples], device=hidden_ND.device)[other.sample_N]
            theirs_ND = predicting(taught, other)[owner_N.argsort(stable=True)]      # back in the order of the batch
        else:
            theirs_ND = predicting(taught, batch)
        bad_N = ~theirs_ND.isfinite().all(1)
        theirs_ND = theirs_ND.masked_fill(bad_N.unsqueeze(1), 0.0)
    width = min(len(head_VD), len(taught.head_weight))           # heads are padded, to different multiples
    return (SimpleNamespace(hidden_ND=hidden_ND, head_VD=head_VD[:width]),
            SimpleNamespace(hidden_ND=theirs_ND, head_VD=taught.head_weight[:width].detach()), bad_N)


def rest(teacher, config, env):
    """After an update: stay, go to the host, or keep only this rank's part of every tensor."""
    if teacher is None or config.teacher_at == "device":
        return
    if config.teacher_at == "host":
        teacher.to("cpu")
        return
    for p in teacher.parameters():
        p.whole = p.shape
        flat = F.pad(p.data.flatten(), (0, -p.numel() % env.world))
        p.data = flat.view(env.world, -1)[env.rank].clone()


def wake(teacher, config, env):
    """Before an update: whole and on the device again."""
    if teacher is None or config.teacher_at == "device":
        return
    if config.teacher_at == "host":
        teacher.to(env.device)
        return
    for p in teacher.parameters():
        parts = [p.data]
        if env.world > 1:
            parts = [torch.empty_like(p.data) for _ in range(env.world)]
            torch.distributed.all_gather(parts, p.data)
        p.data = torch.cat(parts)[:p.whole.numel()].view(p.whole)


# -----------------------------------------------------------------------------
# the loss of a batch


def make_loss(config, model, teacher, stop=(), special=(), contexts=None, reference=None, told=None):
    """-> loss(batch, hidden_ND, head_VD) -> (sum to be minimised, stats as sums). Samples with index below 0 are gold: learned as they are.
    batch.advantage_N: what the task's reward or a control adds; the teacher's part is made here. told: a dict that takes what it said
    of every token, log q - log p, by (problem, index)."""
    c, D = config, model.config.d_model
    told = {} if told is None else told

    def loss(batch, hidden_ND, head_VD):
        N, device = len(batch.targets_N), hidden_ND.device
        if N == 0:                                               # a rank out of work
            return linear_logprob(hidden_ND, head_VD, batch.targets_N)[0].sum(), {}
        taught = c.control == ""
        p = SimpleNamespace(hidden_ND=hidden_ND, head_VD=head_VD)
        if taught:
            p, q, bad_N = sides(model, teacher, batch, hidden_ND, head_VD, contexts)
        s = SimpleNamespace(targets_N=batch.targets_N, temperature=c.temperature, k=c.k, baseline=c.baseline_k, bound=c.bound,
                            divergence=c.divergence, beta=c.beta, stop=torch.tensor(stop, device=device) if len(stop) > 1 else None)
        s.logp_N, entropy_N = of_target(p, s)
        gold_N = torch.tensor([x.index < 0 for x in batch.samples], device=device)[batch.sample_N]
        with torch.no_grad():
            # the sampler drew one id of the class: compare with that one
            exact_N = s.logp_N if s.stop is None else linear_logprob(hidden_ND, head_VD, batch.targets_N, c.temperature)[0]
            apart_N = torch.where(gold_N, 0.0, exact_N - batch.old_logp_N)
            s.trust_N = (apart_N + batch.kept_N).exp().clamp(max=c.tis) if c.tis else torch.ones_like(apart_N)

        # what the teacher says; where it says nothing sensible, and at special tokens, there is no signal
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
            with torch.no_grad():
                reference_N, _ = linear_logprob(predicting(reference, batch), reference.head_weight, batch.targets_N, c.temperature)
            x_N = reference_N - s.logp_N
            k3_N = torch.where(gold_N, 0.0, x_N.expm1() - x_N)
        total = (batch.weight_N * (value_N + c.kl_coef * k3_N)).sum()

        # ---- stats
        with torch.no_grad():
            drawn_N = ~gold_N
            stats = dict(tokens=N, entropy=entropy_N.sum(), sampler_kl=(apart_N.expm1() - apart_N).sum(),
                         sampler_far=(apart_N.abs() > 0.1).sum(), sampler_max=apart_N.abs().max(), reference_kl=k3_N.sum(),
                         weight_all=(apart_N + batch.kept_N).exp(), drawn=drawn_N.sum(), gold=gold_N.sum())
            if taught:
                r_N = torch.where(live_N, s.logp_N - s.logq_N, 0.0)
                again_N = repeated(batch.targets_N, batch.sample_N, c.repeat_n) & live_N
                stats |= dict(live=live_N.sum(), teacher_nan=(bad_N & drawn_N).sum(), advantage=-r_N.sum(), advantage_abs=r_N.abs().sum(),
                              negative=(r_N > 0).sum(), cut=(r_N.abs() > c.bound).sum(), again=again_N.sum(),
                              again_advantage=-(r_N * again_N).sum(),
                              look_all=look(p.hidden_ND, p.head_VD, q.hidden_ND, q.head_VD, batch.sample_N, c.look_k, list(stop),
                                            c.temperature).flatten())
                lengths = torch.bincount(batch.sample_N, minlength=len(batch.samples)).tolist()
                told_N = (-r_N).cpu().double().round(decimals=4)
                told.update({(x.problem, x.index): part.tolist() for x, part in zip(batch.samples, told_N.split(lengths))})
        if hidden_ND.requires_grad:                              # filled in by the backward: do the tokens pull in one direction?
            stats |= dict(pull_all=torch.zeros(D, device=device), pulls=torch.zeros((), device=device))

            def note(grad_ND):
                stats["pull_all"].add_(grad_ND.float().sum(0))
                stats["pulls"].add_(grad_ND.float().norm(dim=1).sum())
            hidden_ND.register_hook(note)
        return total, stats

    return loss


def diagnosis(stats, width):
    """The numbers of a step that a teacher adds, from the sums of stats. width: of the hidden states."""
    pull = stats.get("pull_all", np.zeros(width)).reshape(-1, width).sum(0)
    # |sum of the gradients of single tokens| / sum of their norms, at the head's input. Large advantages and a small sum: the tokens
    # pull in all directions, which is how failing runs look (arXiv 2604.13016)
    numbers = dict(gold=stats.get("gold", 0.0), teacher_nan=stats.get("teacher_nan", 0.0),
                   coherence=float(np.linalg.norm(pull) / stats["pulls"]) if stats.get("pulls") else math.nan)
    if not stats.get("live"):
        return numbers
    live, again = stats["live"], stats["again"]
    mean = stats["advantage"] / live
    others = (stats["advantage"] - stats["again_advantage"]) / max(1.0, live - again)
    return numbers | dict(
        advantage=mean, advantage_abs=stats["advantage_abs"] / live, negative=stats["negative"] / live, cut=stats["cut"] / live,
        repeated=again / live, advantage_repeated=stats["again_advantage"] / again if again else math.nan, advantage_others=others,
        **looked(torch.from_numpy(stats["look_all"])))


# -----------------------------------------------------------------------------
# what is learned from


def horizon(config, now):
    """Tokens of a rollout at step `now`."""
    if not config.horizon:
        return config.max_new
    grown = min(1.0, now / config.horizon_steps) if config.horizon_steps else 0.0
    return round(config.horizon + grown * (config.max_new - config.horizon))


def dress(config, groups):
    """Fills sample.advantage, a list so that a zero is trained too: the teacher's part comes in the loss."""
    for group in groups:
        A = config.reward_coef * BASELINES["mean"](np.array([s.reward for s in group])) if config.reward_coef else np.zeros(len(group))
        for s, a in zip(group, A):
            s.advantage = [float(a)] * len(s.tokens)
    if config.control == "fixed_negative":
        # the least likely fifth of the tokens of all ranks: a threshold from the sampler's log-probs, before any backward
        all_logps = np.concatenate([np.zeros(0), *[part for part in gather(np.array([x for g in groups for s in g for x in s.logprobs]))]])
        limit = np.nanquantile(all_logps, 0.2) if len(all_logps) else 0.0
        for s in (s for g in groups for s in g):
            s.advantage = [-0.5 if x <= limit else 0.0 for x in s.logprobs]


def as_gold(prompt, tokens, problem, number):
    return Sample(list(prompt), list(tokens), [0.0] * len(tokens), "stop", problem, -1 - number, 0, advantage=[0.0] * len(tokens))


def read_gold(path, tok, longest):
    """-> [(prompt, response)] as tokens."""
    rows = []
    if not Path(path).is_file():
        raise FileNotFoundError(f"--gold {path}: no such file")
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
            prompt = data.begun(tok.encode(row["prompt"]), tok)
            rows.append((prompt, tok.encode(row["response"]) + tok.encode(tok.end)))
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'--gold {path}, line {n}: not a JSON object with "prompt" and "response"') from None
        if not rows[-1][0] or sum(map(len, rows[-1])) > longest:
            raise ValueError(f"--gold {path}, line {n}: {sum(map(len, rows[-1]))} tokens, and a row takes 2 to {longest} with a prompt")
    if not rows:
        raise ValueError(f"--gold {path} is empty: give one text a line")
    return rows


def gold_groups(rl, config, problems, texts, writer, now):
    """The gold of a step, each text a group of its own: from the file, from the tasks, or from the teacher. Rank 0's; the teacher writes
    on all ranks. A share above 1 / n asks for more texts than the step has problems: the teacher then writes several of some, and a task,
    which has one for each, repeats it."""
    count = max(1, round(config.gold_share * config.prompts * config.n))
    each, more = divmod(count, len(problems))
    if writer:
        found = list(collect(writer, problems[:more], each + 1)) if more else []
        return written(found + (list(collect(writer, problems[more:], each)) if each else []))
    if not rl.env.master:
        return []
    if texts:                                                    # in turn, from the top again at the end
        return [[as_gold(*texts[i % len(texts)], -1 - i, 0)] for i in range((now - 1) * count, now * count)]
    end = rl.tok.encode(rl.tok.end)
    return [[as_gold(prompt_ids(p, rl.tok), rl.tok.encode(p.gold) + end, p.id, again)]
            for i, p in enumerate(problems) for again in range(each + (i < more))]


def written(groups):
    """Rollouts of the teacher as gold; one that never came to an end teaches nothing about ending."""
    return [[as_gold(s.prompt, s.tokens, s.problem, s.index)] for g in groups for s in g if s.finished == "stop"]


def privileged(config, tok, problems, room):
    """{problem: prompt} of a teacher that knows more."""
    missing = sum(p.gold is None for p in problems)
    if missing:
        raise ValueError(f"--context {config.context}: {missing} of {len(problems)} problems have no gold answer")
    found = {}
    for p in problems:
        known = p.gold if config.context == "gold" else p.gold[:-(-len(p.gold) // 2)]
        text = config.context_text.replace("{context}", known)
        if "messages" in p.data:                                 # into the last message, so that the template stays whole
            *before, last = p.data["messages"]
            text = tok.chat([*before, {**last, "content": text.replace("{prompt}", last["content"])}])
        else:
            text = text.replace("{prompt}", p.prompt)
        found[p.id] = data.begun(tok.encode(text), tok)
        if len(found[p.id]) + config.max_new > room:
            raise ValueError(f"--context: a prompt of {len(found[p.id])} tokens and --max-new {config.max_new}; the teacher serves {room}")
    return found


# -----------------------------------------------------------------------------
# the guard


def rising(values, n, least):
    """Has it risen for n steps? In thirds, each above the one before, because a single step is noise."""
    if len(values) < n:
        return False
    a, b, c = (float(np.mean(part)) for part in np.array_split(values[-n:], 3))
    return a < b < c and c - a >= least


def guard(history, config):
    """Why the run should end, or nothing. From the texts alone: a KL may rise while a student learns, and fall while it breaks."""
    if not config.guard:
        return ""
    for key, what, remedy in [
        ("repetition", "texts that repeat themselves", "give --kl-coef 0.01 or --gold teacher, or a --horizon"),
        ("truncated", "texts that are cut", "raise --max-new, see whether both stop by the same ids (opd_check.py), or --gold teacher"),
    ]:
        # what the horizon cuts is no failure
        values = [m[key] for m in history if key != "truncated" or m["max_new"] == config.max_new]
        if rising(values, config.guard, config.guard_rise):
            return f"the share of {what} has risen for {config.guard} steps, to {values[-1]:.0%}: {remedy}"
    return ""


def status(at, config, m):
    """One line a step, reward first."""
    taught = (f"overlap {m['overlap']:.0%}  mass {m['p_mass']:.1%}/{m['q_mass']:.1%}  KL {m['kl']:.3f}  coherence {m['coherence']:.2f}  "
              if "overlap" in m else "")
    return (f"step {at}/{config.steps}  reward {m['reward']:.3f}  truncated {m['truncated']:.0%}  repeat {m['repetition']:.0%}  "
            f"length {m['length']:.1f}  entropy {m['entropy']:.3f}  {taught}rollout {m['t_rollout']:.2f}s  update {m['t_train']:.2f}s")


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config
    config, below = configure(list(sys.argv[1:] if argv is None else argv))

    # ---- init: the student and its stages; the teacher; what else there is to learn from
    rl = setup(below)
    env, width = rl.env, len(rl.model.head_weight)
    if max(config.k * (config.loss in ("student_topk", "teacher_topk", "tail")), config.baseline_k) > rl.tok.vocab_size:
        rl.workers.close()
        die(f"--k {config.k}, --baseline-k {config.baseline_k}: the vocabulary has {rl.tok.vocab_size} tokens")
    teacher, stop = None, sorted(rl.tok.stop)
    if config.control != "fixed_negative" and config.teacher != "self":
        teacher, its = load_teacher(config.teacher or config.init, rl.tok, env, width)
        for line in opd_check.audit(rl.tok, its) if env.master else ():
            print(f"audit: {line}")
        if config.eos_class:
            stop = stop_class(rl.tok, its)
            rl.tok.stop = set(stop)                              # saved with the student: evaluate.py and servers stop by the same ids
            rl.sampler.stop = set(stop)
            rl.sampler.reset()
    special = sorted({i for word in getattr(rl.tok, "special", ()) for i in rl.tok.encode(word)} - set(stop)) if config.mask_special else []
    contexts, texts, writer = None, None, None
    try:
        shape = (teacher or rl.model).config
        if config.context:
            contexts = privileged(config, rl.tok, rl.problems, min(shape.max_len, config.row_tokens))
        if config.gold not in ("", "task", "teacher"):
            texts = read_gold(config.gold, rl.tok, config.row_tokens)
        if config.gold == "task" and any(p.gold is None for p in rl.problems):
            raise ValueError("--gold task: not every problem has a gold answer; give a file")
        if teacher and rl.sampler.max_len > shape.max_len:
            raise ValueError(f"a prompt and --max-new take {rl.sampler.max_len} tokens, the teacher serves {shape.max_len}")
    except (ValueError, FileNotFoundError) as e:
        rl.workers.close()
        die(e)
    if config.control == "sft" or config.gold == "teacher":      # the teacher as a sampler, with noise of its own
        by = Sampler(teacher, set(stop), rl.tok, slots=config.slots or None, max_len=rl.sampler.max_len, deterministic=env.deterministic)
        writer = SimpleNamespace(**{**vars(rl), "sampler": by, "visits": {}, "config": replace(rl.config, seed=config.seed + 1)})
    told = {}
    loss = make_loss(config, rl.model, teacher, stop, special, contexts, rl.reference, told)
    rest(teacher, config, env)

    run = Run(f"runs/{config.name}", config, env, resume=config.resume, free=("eval_every", "save_every", "threads", "workers", "wandb"),
              sources=[m.__file__ for m in (sys.modules[__name__], opd_check, nanorl)])
    rl.workers.log = run.log
    begin, at, history, best = 0, 0, [], dict(step=0, avg=-1.0)
    state = restore(rl, run) if config.resume else None
    if state:
        begin, at, history, best, rl.visits, rl.updates, rl.spent = (state[k] for k in (
            "step", "at", "history", "best", "visits", "updates", "spent"))
        if writer:
            writer.visits = state["writer"]
    name = config.teacher or ("none" if teacher is None else "the student as it starts")
    run.log(f"{config.control or config.loss} on {config.data or config.task}: student {config.init}, teacher {name}, {config.prompts} x "
            f"{config.n} samples a step, {env.world} x {env.device}")

    def test(name, problems, said):
        result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, problems, config.eval_k, config.max_new)
        run.log(f"{said}: {words(result)}")
        return {f"{name}/{k}": v for k, v in result.items()}

    def save(done):
        run.save(done, lambda folder: rl.model.save_hf(folder, rl.tok),
                 dict(optimizer=rl.optimizer.state_dict(), step=done, at=at, history=recent(history, max(50, config.guard)), best=best,
                      visits=rl.visits,
                      updates=rl.updates, spent=rl.spent, writer=writer.visits if writer else {}))

    # ---- before
    if begin == 0:
        before = test("test", rl.test, "before") | test("eval", rl.valid, "  held out")
        run.metrics(0, spent=0, **before)
        best = dict(step=0, avg=before["eval/avg"])
        keep(rl, run.folder, 0)

    # ---- the loop
    bar = progress(config.steps, "opd")
    bar.update(begin)
    now, reason = begin, ""
    over = lambda: now >= config.steps or 0 < config.tokens <= rl.spent  # noqa: E731
    while not over() and not reason:
        now, clock = now + 1, time.perf_counter()
        untouched = at, dict(rl.visits), dict(writer.visits) if writer else {}
        problems, at = next_problems(rl, at, config.prompts)
        rl.config.max_new = horizon(config, now)
        wake(teacher, config, env)
        if config.control == "sft":
            groups = list(collect(writer, problems, config.n))
            learned = written(groups)
        else:
            groups = list(collect(rl, problems, config.n))
            dress(config, groups)
            learned = groups + (gold_groups(rl, config, problems, texts, writer, now) if config.gold else [])
        if rl.reference:
            rl.reference.to(env.device)
        stats = update(rl, learned, loss)
        if rl.reference:
            rl.reference.to("cpu")
        rest(teacher, config, env)
        if stats.get("drawn", 0) and stats.get("teacher_nan", 0) == stats["drawn"]:
            rl.optimizer.zero_grad()
            rl.normaliser = 0.0
            at, rl.visits, writers = untouched                   # the state before this step, with its problems still to come
            if writer:
                writer.visits = writers
            save(now - 1)
            bar.close()
            rl.workers.close()
            die(f"step {now}: the teacher's log-probs are nan at every token. The last good state is {run.latest()[0]}")
        said = {k: v for part in gather(told) for k, v in part.items()}
        told.clear()
        stats |= step(rl)
        rl.spent += all_sum(sum(len(s.tokens) for g in groups for s in g))
        for side in (rl, writer) if writer else (rl,):
            share_visits(side)

        # ---- log
        numbers = summary(rl, groups, 0, stats, time.perf_counter() - clock) | diagnosis(stats, rl.model.config.d_model)
        numbers |= dict(grad_norm=stats["grad_norm"], skipped=rl.optimizer.skipped, spent=rl.spent, max_new=rl.config.max_new)
        if rl.config.max_new < config.max_new:                   # what the horizon cuts was not meant to end
            numbers |= dict(beyond=numbers["truncated"], truncated=0.0)
        history.append(numbers)
        bar.update()
        run.log(status(now, config, numbers))
        for warning in warnings(history, rl.config):
            run.log(f"  warning: {warning}")
        if numbers.get("teacher_nan"):
            run.log(f"  warning: the teacher's log-probs are nan at {numbers['teacher_nan']:.0f} tokens: those are left out")
        reason = guard(history, config)
        last = over() or bool(reason)
        if config.eval_every and now % config.eval_every == 0 and not last:
            numbers |= test("eval", rl.valid, "  held out")
            if numbers["eval/avg"] > best["avg"]:
                best = dict(step=now, avg=numbers["eval/avg"])
                keep(rl, run.folder, now)
        if reason and not config.eval_every:
            run.log(f"stopped after step {now}: {reason}. The weights stay as they are: --eval-every 0 says of no state that it is better")
        elif reason:
            kept = Path(run.folder, "best", f"step_{best['step']}")
            rl.model.load_hf(kept)
            history = []                                         # masters and moments are those of the state that is left: new ones
            rl.optimizer = Optimizer(rl.model, config.lr, config.muon_lr or None, weight_decay=config.weight_decay, clip=config.clip)
            run.log(f"stopped after step {now}: {reason}. Back to the best state, of step {best['step']}")
        if last:
            numbers |= test("test", rl.test, "after") | test("eval", rl.valid, "  held out")
        run.metrics(now, **numbers)
        run.samples([row | {"disagreement": said.get((row["problem"], row["index"]))} for row in sample_rows(rl, now, groups)])
        stopping = run.stopping()
        if now % config.save_every == 0 or last or stopping:
            save(now)
        if stopping and not last:
            rl.workers.close()
            run.bye(now)
    bar.close()
    rl.workers.close()
    if env.master:
        view.pages(run.folder)
        run.log(f"wrote {run.folder}: curves.png, samples.html, and the model in ckpt/step_{now} (a Hugging Face folder)")
    run.close()


if __name__ == "__main__":
    main()
