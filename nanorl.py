"""
nanorl.py: the RL loop. problems -> rollouts -> rewards -> advantages -> packed updates -> the next step.

GRPO and its family in the open. An algorithm is a row of choices on five independent axes (the table below), not a class;
a new one is a new row, a new choice is a function of a few lines.

Deleted from the usual recipe, and why:
- no second engine and no weight sync: the sampler reads the very tensors that the optimizer writes;
- no second forward for old log-probs: with one update per rollout the ratio is 1, so old = logp.detach(); with several
  (--epochs, --minibatch) they are computed once, before the first;
- no padding and no per-rank mean: rows are packed, every micro-batch back-propagates a SUM, and the one normaliser, global over
  ranks and micro-batches, divides once at the step; how the work is cut up never changes the result;
- no critic and, unless --kl-coef asks for one, no reference model.

    python nanorl.py                                       a laptop: finds or trains the base, then learns Countdown in minutes
    torchrun --nproc_per_node=8 nanorl.py                  a node: a base of 100M, then Countdown with 4 numbers
    python nanorl.py --algo gspo --minibatch 16            a row of the table, four updates a rollout
    python nanorl.py --init DIR --task gsm8k --max-new 1024
    torchrun --nproc_per_node=8 -- nanorl.py --tail-batching prompt        no rank waits for the longest response (pack.py, rounds)
    python nanorl.py --data my.jsonl --reward my.py:score --init DIR
"""

import math
import sys
import time
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

import data
import kernels
import pack
import rollout
import train_gpt
from common import hf, view
from common.optim import Optimizer
from common.reward import Rewards, check
from common.run import Run, all_sum, barrier, die, flags, gather, newest, positive, progress, start
from evaluate import completion, evaluate, prompt_ids, words
from kernels import linear_logprob, packed_attention
from rollout import Sampler
from train_gpt import GPT

# -----------------------------------------------------------------------------
# the five axes. 1, the baseline: rewards of a group -> advantages, always local to the group



def centred(r):
    """r - mean. Rewards that are all equal give exact zeros: r - r.mean() is 1e-17 for most numbers that are no dyadic fractions, and a
    step without signal would move the weights by its optimizer's momentum."""
    return r - r.mean() if varies(r) else np.zeros(len(r))


def varies(r):
    return not max(r) - min(r) <= 1e-9


BASELINES = {
    "group": lambda r: centred(r) / (r.std() + 1e-6),
    "mean": centred,
    "loo": lambda r: centred(r) * len(r) / max(1, len(r) - 1),               # r minus the mean of the others
}

# 2, the ratio: x = log pi - log pi_old of each prediction -> the log of the ratio that counts for it. A ratio of the whole response
# has the response's value in every token and the gradient of the token's own part, so that a token may have its own advantage;
# summed over a response whose advantage is uniform this is the gradient of the ratio itself


def of_sample(values_N, sample_N, lengths_S):
    """The mean over each sample's predictions, at each prediction."""
    return (values_N.new_zeros(len(lengths_S)).index_add_(0, sample_N, values_N) / lengths_S)[sample_N]


def sequence(x_N, sample_N, lengths_S, p):
    """GSPO: the geometric mean over the response."""
    return of_sample(x_N.detach(), sample_N, lengths_S) + x_N - x_N.detach()


def power(x_N, sample_N, lengths_S, p):
    """HolderPO: the power mean (mean rho^p)^(1/p); p = 1 arithmetic, 0 geometric, below 0 the smallest ratios decide. By
    log mean exp z = top + log1p(mean expm1(z - top)), true for any top: 0 while z is small, where the plain form cancels."""
    fixed_N = x_N.detach()
    mean_N = of_sample(fixed_N, sample_N, lengths_S)
    z_N = p * (fixed_N - mean_N)
    top_S = z_N.new_zeros(len(lengths_S)).scatter_reduce_(0, sample_N, z_N, "amax")
    top_N = torch.where(top_S > 1, top_S, 0.0)[sample_N]         # and the largest z where exp could overflow
    log_N = top_N + of_sample((z_N - top_N).expm1(), sample_N, lengths_S).log1p()
    share_N = (z_N - log_N).exp()                                # length * rho^p / sum rho^p: whose gradient counts
    return mean_N + (log_N / p if p else 0.0) + share_N * (x_N - fixed_N)


RATIOS = {
    "token": lambda x_N, sample_N, lengths_S, p: x_N,
    "sequence": sequence,
    "power": power,
}

# 3, the trust region: log-ratio and advantage of each prediction -> the objective, to be maximised

TRUSTS = {
    "clip": lambda x, A, low, high: torch.minimum(x.exp() * A, x.exp().clamp(1 - low, 1 + high) * A),        # PPO: no gradient outside
    "weight": lambda x, A, low, high: x.detach().exp().clamp(1 - low, 1 + high) * A * x,         # CISPO: a bounded one everywhere
    "none": lambda x, A, low, high: x.exp() * A,
}

# 4, aggregation: length of a response -> (weight of each of its tokens, its share of the normaliser)

AGGREGATES = {
    "token": lambda L, config: (1.0, L),                                     # DAPO: every token of the batch counts the same
    "sequence": lambda L, config: (1.0 / L, 1.0),                            # GRPO: every response does
    "constant": lambda L, config: (1.0 / config.max_new, 1.0),               # Dr. GRPO: a long answer is not discounted
    "length": lambda L, config: (L ** -config.length_power, L ** -config.length_power),      # VL Norm: w_i = L_i^-a / sum L_j^-a
}

# 5, regularisers: --kl-coef and the resets of its reference, --cov, --entropy-coef. They add up, so they are flags and no choices

# the table. Clips of cispo (no lower one) and holder, and the KL coefficient of prorl, are ours: their papers leave them open
ALGORITHMS = {
    #           baseline       ratio              trust          clips                         aggregation
    "grpo":    dict(baseline="group", ratio="token", trust="clip", clip_low=0.2, clip_high=0.2, aggregate="sequence"),
    "dapo":    dict(baseline="group", ratio="token", trust="clip", clip_low=0.2, clip_high=0.28, aggregate="token", dynamic=True),
    "dr_grpo": dict(baseline="mean", ratio="token", trust="clip", clip_low=0.2, clip_high=0.2, aggregate="constant"),
    "rloo":    dict(baseline="loo", ratio="token", trust="none", aggregate="constant"),
    "gspo":    dict(baseline="group", ratio="sequence", trust="clip", clip_low=3e-4, clip_high=4e-4, aggregate="sequence"),
    "cispo":   dict(baseline="group", ratio="token", trust="weight", clip_low=1.0, clip_high=4.0, aggregate="token"),
    "vl_norm": dict(baseline="mean", ratio="token", trust="clip", clip_low=0.2, clip_high=0.2, aggregate="length", length_power=1.0),
    "holder":  dict(baseline="group", ratio="power", trust="clip", clip_low=0.2, clip_high=0.2, aggregate="sequence", power=2.0,
                    power_end=-2.0),
    "prorl":   dict(baseline="group", ratio="token", trust="clip", clip_low=0.2, clip_high=0.4, aggregate="token", dynamic=True,
                    temperature=1.2, kl_coef=1e-3, reset_every=100),
}


@dataclass
class Config:
    name: str = "rl"                     # the run: everything it writes lies in runs/NAME
    init: str = "runs/base"              # a Hugging Face folder or a run; runs/base and runs/mixed100m are trained first if not there
    task: str = "countdown"              # a task of data/; the word after a colon is its variant
    data: str = ""                       # your own prompts instead: a .jsonl file of {prompt, gold?}
    reward: str = ""                     # your own reward: my.py:score, a function (problem, text) -> float
    algo: Literal[*ALGORITHMS] = "dr_grpo"  # a row of the table; each axis has its own flag below
    baseline: Literal["", *BASELINES] = ""  # advantage: (r - mean) / std of the group; r - mean; leave one out
    ratio: Literal["", *RATIOS] = ""     # importance ratio: of the token; geometric mean of the response; power mean of the response
    trust: Literal["", *TRUSTS] = ""     # trust region: PPO's clip; clipped weights that keep the gradient; none
    clip_low: float | None = None        # the ratio is clipped below 1 - this
    clip_high: float | None = None       # and above 1 + this
    aggregate: Literal["", *AGGREGATES] = ""  # mean over tokens; over sequences of their mean; sum over --max-new; sums by length^-a
    length_power: float | None = None    # the a of --aggregate length: 0 every token, 1 every response counts the same
    power: float | None = None           # the p of --ratio power at the start of the run; may be negative
    power_end: float | None = None       # and at its end; may be negative
    kl_coef: float | None = None         # KL (k3) to a reference, at first the model of --init
    reset_every: int | None = None       # steps until the policy becomes the reference and the optimizer forgets; 0: never
    reset_patience: int = 0              # the same after this many evaluations without a new best; 0: never
    cov: Literal["", "clip", "kl"] = ""  # tokens whose log-prob and advantage vary together most: no gradient, or a KL to the old policy
    cov_share: float = 2e-3              # how many of the tokens of a rollout those are
    cov_coef: float = 1.0                # the coefficient of --cov kl
    entropy_coef: float = 0.0            # bonus on the entropy of the policy; may be negative
    dynamic: bool | None = None          # drop groups whose rewards are all equal and sample others in their place
    overlong: int = 0                    # soft penalty on the last this many tokens before --max-new; 0: off
    tis: float = 2.0                     # truncate the importance weight between sampler and trainer here; 0: no weight
    epochs: int = 1                      # times a rollout is learned from
    minibatch: int = 0                   # prompts of one update; 0: all of the step
    steps: int = 500                     # rollouts
    tokens: int = 0                      # end after this many sampled tokens, if that is sooner than --steps; 0: no limit
    prompts: int = 32                    # prompts a step, over all ranks
    n: int = 16                          # samples of a prompt
    max_new: int = 48                    # tokens of a sample, at most; look at `truncated` before anything else
    temperature: float | None = None     # of the rollout, and of the log-probs that are trained; 1 unless the row says otherwise
    top_p: float = 1.0                   # 1: off; otherwise corrected by the mass it kept
    problems: int = 8192                 # training problems, at most; the epochs repeat them with new noise
    lr: float = 2e-3                     # AdamW
    muon_lr: float = 0.0                 # Muon for the matrices of the blocks, with this learning rate; 0: AdamW for all
    warmup: int = 5                      # steps of linear warm-up
    decay: float = 0.6                   # share of the steps, at the end, with linear decay to zero
    weight_decay: float = 0.0            # decoupled, matrices only
    clip: float = 1.0                    # global norm of the gradient; 0: no clipping
    row_tokens: int = 4096               # tokens of one packed row of the update
    slots: int = 0                       # rows the sampler decodes at a time; 0: from the device
    tail_batching: Literal["off", "race", "prompt", "continue"] = "off"  # do not wait for the longest responses (see pack.py's rounds)
    more_prompts: float = 1.25           # of those rounds: prompts launched over prompts wanted
    more_samples: float = 1.25           # and samples, in the mode race
    stream: bool = False                 # a rank that has nothing left to sample learns from its complete groups meanwhile
    workers: int = 2                     # reward processes of each rank
    eval_every: int = 50                 # steps between evaluations; 0: only before and after
    eval_n: int = 200                    # problems of one, of the valid split
    eval_k: int = 4                      # samples of each
    final_n: int = 1000                  # problems of the evaluations before and after, of the test split
    save_every: int = 50                 # steps between checkpoints
    seed: int = 0                        # problems and samples
    checkpoint: bool = False             # recompute blocks in the backward: memory for time
    device: str = "auto"                 # auto, cpu, cuda, mps
    dtype: str = "auto"                  # auto (bf16 on CUDA, fp32 elsewhere), fp32, bf16
    threads: int = 0                     # CPU threads; 0: all cores, shared by the ranks
    deterministic: bool | None = None    # repeatable bit for bit; none: on CPU
    dry_run: bool = False                # print what the run needs in memory, and stop
    resume: bool = False                 # go on with runs/NAME
    wandb: str = ""                      # a wandb project, if curves should go there too


# what runs without flags, by what is found; flags given beside it win
HARDWARE = {
    "cpu": ("--prompts 64 --n 4 --slots 256 --steps 1120 --eval-every 100",
            "two CPU cores: the base in 2 minutes, then 1,120 steps in 3; held-out accuracy from about 36% to about 67%"),
    "cuda": ("--init runs/mixed100m --task countdown:4 --prompts 128 --max-new 96 --row-tokens 16384 --lr 2e-4 --steps 300 --eval-every 50",
             "eight GPUs: a base of 100M in about 10 minutes, then 300 steps in about 15 (an estimate: nobody has measured it yet)"),
}


# -----------------------------------------------------------------------------
# from rewards to a loss


def advantage(group, config):
    """Fills sample.advantage of one group. A sample that ran over its soft limit pays before the baseline is taken."""
    r = np.array([s.reward for s in group])
    if config.overlong:
        over = np.array([len(s.tokens) - (config.max_new - config.overlong) for s in group])
        r = r - np.clip(over / config.overlong, 0, 1)
    for s, a in zip(group, BASELINES[config.baseline](r)):
        s.advantage = float(a)


def address(s):
    return s.problem, s.visit, s.index


def stored(known, batch):
    """What is known of each sample by its address, one number a prediction, for the predictions of a batch."""
    parts = [known[address(s)] for s in batch.samples]
    return kernels.to_device(np.concatenate([np.zeros(0, np.float32), *parts]), torch.float32, batch.targets_N.device)


def covariant(groups, config):
    """-> 1 for the predictions that most lower the entropy, else 0: those with the largest (log-prob - mean) (advantage - mean) of the
    whole batch. From the sampler's log-probs, so it is known before any backward; a tie goes to the lower address."""
    samples = [s for g in groups for s in g]
    trained = [~np.isnan(s.logprobs) for s in samples]
    logp = np.concatenate([np.zeros(0), *[np.array(s.logprobs)[on] for s, on in zip(samples, trained)]])
    A = np.concatenate([np.zeros(0), *[np.broadcast_to(s.advantage, len(on))[on] for s, on in zip(samples, trained)]])
    top = np.zeros(len(logp), np.float32)
    if len(logp):
        cov = (logp - logp.mean()) * (A - A.mean())
        top[np.argsort(-cov, kind="stable")[:math.ceil(config.cov_share * len(cov))]] = 1
    ends = np.cumsum([on.sum() for on in trained])
    return {address(s): part for s, part in zip(samples, np.split(top, ends))}


def predicting(model, batch):
    """-> hidden_ND: the hidden states that predict."""
    return model(batch.tokens_T, batch.positions_T, packed_attention(batch.cu_seqlens, batch.max_len, batch.parent))[batch.at_N]


def make_loss(config, at=0.0, old=None, marked=None, reference=None):
    """-> loss(batch, hidden_ND, head_VD) -> (sum to be minimised, stats as sums). at: the share of the run that is over. old: log-probs
    before the first of several updates; marked: from covariant(), both by address. reference: a model for --kl-coef."""
    c = config
    p = None if c.power is None else c.power + at * (c.power_end - c.power)

    def loss(batch, hidden_ND, head_VD):
        logp_N, entropy_N = linear_logprob(hidden_ND, head_VD, batch.targets_N, c.temperature)
        # one update a rollout: the policy that sampled is this one
        old_N = logp_N.detach() if old is None else stored(old, batch)
        # no bincount: on a GPU it waits for the largest number
        lengths_S = batch.weight_N.new_zeros(len(batch.samples)).index_add_(0, batch.sample_N, torch.ones_like(batch.weight_N))
        lengths_S = lengths_S.clamp(min=1)
        x_N = logp_N - old_N
        logratio_N = RATIOS[c.ratio](x_N, batch.sample_N, lengths_S, p)
        objective_N = TRUSTS[c.trust](logratio_N, batch.advantage_N, c.clip_low, c.clip_high)
        if c.cov == "clip":
            objective_N = objective_N * (1 - stored(marked, batch))
        elif c.cov == "kl":
            objective_N = objective_N - c.cov_coef * stored(marked, batch) * x_N.abs()
        apart_N = old_N - batch.old_logp_N                       # trainer against sampler: rounding, or a bug
        trust_N = apart_N + batch.kept_N                         # truncation sampled from pi / kept where kept is less than 1
        if c.tis:
            objective_N = objective_N * trust_N.exp().clamp(max=c.tis)
        k3_N = torch.zeros_like(logp_N)
        if c.kl_coef:
            with torch.no_grad():
                reference_N, _ = linear_logprob(predicting(reference, batch), reference.head_weight, batch.targets_N, c.temperature)
            k3_N = (reference_N - logp_N).expm1() - (reference_N - logp_N)
        total = -(batch.weight_N * (objective_N + c.entropy_coef * entropy_N - c.kl_coef * k3_N)).sum()
        with torch.no_grad():
            ratio_N = logratio_N.exp()
            outside_N = (ratio_N < 1 - c.clip_low) | (ratio_N > 1 + c.clip_high) if c.trust != "none" else ratio_N < 0
            stats = dict(tokens=len(logp_N), entropy=entropy_N.sum(), sampler_kl=(apart_N.expm1() - apart_N).sum(),
                         sampler_far=(apart_N.abs() > 0.1).sum(), sampler_max=apart_N.abs().max() if len(apart_N) else 0.0,
                         clipped=outside_N.sum(), reference_kl=k3_N.sum(), weight_all=trust_N.exp())
        return total, stats

    return loss


# -----------------------------------------------------------------------------
# the stages: setup, collect, update, step; learn is all updates of a rollout


def setup(config, problems=None):
    """-> rl: everything a loop needs, in one namespace. What a user can get wrong is told here, before anything is written.
    problems: to train on, instead of the task's."""
    env = start(config.device, config.dtype, config.threads, config.deterministic)
    config = with_algorithm(config)
    source = config.init
    if source.startswith("runs/") and source[5:] in train_gpt.PRESETS and not newest(source):
        if config.dry_run:
            die(f"--dry-run: {source} is not trained yet; give a model by --init")
        if env.master:
            print(f"no base in {source} yet: training it first (python train_gpt.py --preset {source[5:]})", flush=True)
        train_gpt.main(["--preset", source[5:]] + ["--resume"] * Path(source, "config.json").exists())
        if env.device.type == "cuda":                            # what it held is neither this run's peak nor lost to its pool
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    try:
        folder = hf.find(source)
        tok = data.tokenizer(folder)
        place = torch.device("cpu") if config.dry_run else env.device                    # a dry run takes nothing of the GPU
        model = GPT.from_hf(folder, dtype=env.dtype, device=place)
        task = data.load(config.data or config.task)
        if config.data and not config.reward:
            raise ValueError("--data needs --reward my.py:score: what is a good answer to your prompts?")
        reward = config.reward or config.task
        check(reward)
        problems = problems or task.problems("train", config.problems, config.seed)
        valid, test = task.problems("valid", config.eval_n, config.seed), task.problems("test", config.final_n, config.seed)
        need = max(len(prompt_ids(p, tok)) for p in [*problems, *valid, *test]) + config.max_new
        if need > config.row_tokens:
            raise ValueError(f"--row-tokens {config.row_tokens} is below one sample: a prompt and --max-new take {need}")
        if need > model.config.max_len:
            raise ValueError(f"a prompt and --max-new {config.max_new} take {need} tokens, the model serves {model.config.max_len}")
        model.checkpoint = config.checkpoint
        # on the host between updates, on the device while one lasts
        reference = GPT.from_hf(folder, dtype=env.dtype).requires_grad_(False) if config.kl_coef else None
        optimizer = Optimizer(model, lr=config.lr, muon_lr=config.muon_lr or None, weight_decay=config.weight_decay, clip=config.clip)
        if place.type == "cuda":
            rehearse(model, optimizer, reference, config, need)
        sampler = Sampler(model, tok.stop, tok, slots=config.slots or None, max_len=need, deterministic=env.deterministic)
        if sampler.paged and sampler.storage.most < need:
            raise ValueError(f"what an update leaves of the GPU holds {sampler.storage.most} tokens of keys and values, one sample may "
                             f"take {need}: lower --row-tokens, or give --checkpoint")
        if config.stream and env.deterministic:
            raise ValueError("--stream adds up in the order of the clock: give --no-deterministic, too")
    except (ValueError, FileNotFoundError) as e:
        die(e)
    except torch.cuda.OutOfMemoryError:
        die(f"an update of --row-tokens {config.row_tokens} does not fit on the GPU: lower it, or give --checkpoint (--dry-run lists what "
            "a run needs)")
    return SimpleNamespace(config=config, env=env, model=model, tok=tok, task=task, problems=problems, valid=valid, test=test,
                           sampler=sampler, optimizer=optimizer, workers=Rewards(reward, workers=config.workers),
                           reference=reference, rounds=None, normaliser=0.0, updates=0.0, spent=0, best=-math.inf, stalled=0, visits={},
                           late=[], clock=dict.fromkeys(CLOCKS, 0.0))


def fullest(config, longest):
    """A row full of the longest prompts, shared by their responses. -> tokens of a prompt, its responses, prompts; of those 0, if the
    row does not hold one with two responses."""
    P = max(1, longest - config.max_new)
    L = longest - P
    k = min(config.n, (config.row_tokens - P) // L)
    return P, k, config.row_tokens // (P + k * L) if k > 1 else 0


def rehearse(model, optimizer, reference, config, need):
    """Full rows forward and backward, times zero, and their gradients summed over ranks and forgotten. After it the allocator holds
    what an update needs, and what the card has left can go to the sampler's keys for good. Two rows: of responses alone, which has the
    most predictions, and of the longest prompts shared by theirs, whose keys are read, and kept, once for each response."""
    device, n = model.head_weight.device, max(1, config.row_tokens // need)
    P, k, prompts = fullest(config, need)

    def sample(P, i, j):
        return rollout.Sample([0] * P, [0] * (need - P), [0.0] * (need - P), "length", i, j, 0, advantage=0.0)

    rows = pack.batches([sample(1, i, 0) for i in range(n)], n * need, model.config, share=False)
    if prompts:
        groups = [[sample(P, i, j) for j in range(k)] for i in range(prompts)]
        rows += pack.batches(groups, config.row_tokens, model.config, share=True)[:1]
    for batch in rows:
        batch = batch.to(device)
        if reference:
            with torch.no_grad():
                linear_logprob(predicting(reference.to(device), batch), reference.head_weight, batch.targets_N)
        logp_N, entropy_N = linear_logprob(predicting(model, batch), model.head_weight, batch.targets_N)
        (0 * (logp_N.sum() + entropy_N.sum())).backward()
    optimizer.reduce_grads()
    optimizer.zero_grad()
    if reference:
        reference.to("cpu")


def restore(rl, run):
    """Weights and optimizer as the run's last checkpoint has them. -> the rest of its state, as rank 0 saved it; None: the run was stopped
    before its first, and begins again."""
    found = run.latest()
    run.rewind(found[1] if found else -1)
    if found:
        rl.model.load_hf(found[0])
        states = run.load(found[0])
        rl.optimizer.load_state_dict([s["optimizer"] for s in states])
        return states[0]


COUNTERS = ("visits", "late", "updates", "spent", "best", "stalled")     # of rl, kept in checkpoints
CLOCKS = ("rollout", "reward", "pack", "train", "opt", "idle")
EVERY = 16                               # decode steps between two meetings of ranks whose prompts race


def with_algorithm(config):
    """The row of --algo, overridden by every axis that was given its own flag. What does not go together is refused, with the reason."""
    defaults = dict(dynamic=False, temperature=1.0, kl_coef=0.0, reset_every=0, clip_low=0.2, clip_high=0.2, length_power=1.0, power=1.0)
    given = {k: v for k, v in asdict(config).items() if v not in ("", None)}
    c = type(config)(**{**asdict(config), **defaults, **ALGORITHMS[config.algo], **given})
    c.power_end = c.power if c.power_end is None else c.power_end
    for name, axis, idle in [("clip_low", "trust", c.trust == "none"), ("clip_high", "trust", c.trust == "none"),
                             ("power", "ratio", c.ratio != "power"), ("power_end", "ratio", c.ratio != "power"),
                             ("length_power", "aggregate", c.aggregate != "length")]:
        if idle and name in given:
            die(f"--{name.replace('_', '-')} says nothing here: --{axis} is {getattr(c, axis)}")
        setattr(c, name, None if idle else getattr(c, name))
    several = c.epochs > 1 or 0 < c.minibatch < c.prompts
    for wrong, why in [
        (c.epochs < 1, "--epochs is 0: give at least 1"),
        (c.minibatch > c.prompts, f"--minibatch {c.minibatch} is above --prompts {c.prompts}, and an update holds no more than a rollout"),
        (c.overlong > c.max_new, f"--overlong {c.overlong} is above --max-new {c.max_new}"),
        (not c.temperature, "--temperature 0 samples the same answer again and again: groups need variety, give a number above 0"),
        (c.clip_low and c.clip_low > 1, f"--clip-low {c.clip_low}: a ratio is never below 0, so give at most 1"),
        (0 < c.tis < 1, f"--tis {c.tis} would cut the weight where sampler and trainer agree: give 1 or more, or 0 for no weight"),
        (c.top_p < 1 and not c.tis, "--top-p below 1 with --tis 0: what is sampled is not what is trained, and nothing would correct it"),
        ((c.reset_every or c.reset_patience) and not c.kl_coef, "--reset-every and --reset-patience need a reference: give --kl-coef"),
        (c.reset_patience and not c.eval_every, "--reset-patience counts evaluations, and --eval-every 0 makes none"),
        (c.cov and not 0 < c.cov_share < 1, f"--cov-share {c.cov_share} is a share of the tokens: give a number between 0 and 1"),
        (min(c.more_prompts, c.more_samples) < 1, "--more-prompts and --more-samples: launch at least what is wanted, 1"),
        (c.tail_batching == "continue" and not c.tis, "--tail-batching continue with --tis 0: tokens of an older policy, and no weight"),
        (c.stream and (several or c.cov), "--stream learns before the rollout is whole: not with --cov, which chooses from all of it, nor "
                                          "with --minibatch or --epochs, whose first update would change what is still sampled"),
        (c.cov == "kl" and not several, "--cov kl with one update a rollout: the old policy is the new one, so their KL has no gradient; "
                                        "give --epochs 2 or a --minibatch below --prompts, or --cov clip"),
    ]:
        if wrong:
            die(why)
    return c


def next_problems(rl, at, count):
    """-> `count` different problems from place `at` of the endless list on, and the place after them. The list is the training
    problems in a new order every epoch; one that a step has already, at the turn of an epoch, is passed over."""
    epoch_of, order, out = None, None, {}
    while len(out) < min(count, len(rl.problems)):
        epoch, place = divmod(at, len(rl.problems))
        if epoch != epoch_of:
            epoch_of, order = epoch, np.random.default_rng([rl.config.seed, epoch]).permutation(len(rl.problems))
        problem, at = rl.problems[order[place]], at + 1
        out[problem.id] = problem
    return list(out.values()), at


def collect(rl, problems, n):
    """Yields the groups of this rank as they finish, rewards in. Rewards run in worker processes while sampling goes on."""
    c, sampler, clock = rl.config, rl.sampler, rl.clock
    by_id, groups, scored = {p.id: p for p in problems}, {}, {}  # scored: the indices whose reward is in, and that may be nan
    ids = list(by_id)
    mine, more, left = sampler.deal([c.max_new] * len(ids), ids), True, True

    def score(s):
        rl.workers.put((s.problem, s.index, s.visit), by_id[s.problem], completion(s, rl.tok))

    def submit(id, n, resume=()):
        sampler.submit(id, prompt_ids(by_id[id], rl.tok), n, c.max_new, seed=c.seed, visit=rl.visits.get(id, 0), temperature=c.temperature,
                       top_p=c.top_p, resume=resume)
        scored[id] = {s.index for s in groups[id] if not math.isnan(s.reward)}
        for s in groups[id]:                                     # a group that began on another rank
            if s.index not in scored[id]:
                score(s)

    while more or groups or left:
        begin = time.perf_counter()
        while more and sampler.live < sampler.slots + n:         # no further ahead: another rank may be free sooner
            i = next(mine, None)
            more = i is not None
            if more:
                groups[ids[i]] = []
                submit(ids[i], n)
        sampling = sampler.live > 0
        # with --stream a rank without rows has better to do than to wait for some
        left = more or ((sampling or not c.stream) and sampler.even(mine, groups, n, submit))
        for s in sampler.step() if sampling else ():
            groups[s.problem].append(s)
            score(s)
        now = time.perf_counter()
        clock["rollout" if sampling else "idle"] += now - begin
        for (problem, index, visit), reward, _ in rl.workers.get(block=not left and bool(groups)):      # left: of rows, here or elsewhere
            if problem not in groups or visit != rl.visits.get(problem, 0):
                continue                                         # the group has moved, and is scored where it is now
            next(s for s in groups[problem] if s.index == index).reward = reward
            scored[problem].add(index)
            if len(scored[problem]) == n:
                rl.visits[problem] = rl.visits.get(problem, 0) + 1
                mine.end()
                yield sorted(groups.pop(problem), key=lambda s: s.index)
        clock["reward"] += time.perf_counter() - now
    rl.workers.forget()                                          # those of groups that moved


def next_round(rl, at, want):
    """-> a round of tail batching, and the place in the endless list after it. A problem that comes up while it still waits in the queue
    from an epoch before is put off until it does not."""
    by_id = {p.id: p for p in rl.problems}

    def fresh(count):
        nonlocal at
        busy = {launch.id for launch in rl.rounds.queue}
        late, rl.late, out = rl.late, [], []
        while len(out) < min(count, len(rl.problems) - len(busy)):
            if not late:
                left = len(rl.problems) - at % len(rl.problems)  # of this epoch, so that none of them is passed over at its turn
                problems, at = next_problems(rl, at, min(count - len(out), left))
                late = [p.id for p in problems]
            id = late.pop(0)
            (rl.late if id in busy or id in out else out).append(id)
        rl.late += late
        return [(id, rl.visits.get(id, 0)) for id in out]

    round = rl.rounds.plan(fresh, want)
    return round, {launch.id: by_id[launch.id] for launch in round.launches}, at


def shared_counter(rl):
    """-> add(k), which says what it comes to over all ranks; a new one at each call, as every rank makes the same calls."""
    key = f"count/{next(rollout.calls)}"
    if rl.env.world > 1:
        store = dist.distributed_c10d._get_default_store()
        return lambda k: store.add(key, k)
    return lambda k, total=[0]: total.append(total.pop() + k) or total[0]


def collect_round(rl, round, by_id):
    """The same as collect for a round that may end before its last prompt. None: this rank has nothing left to sample, others have."""
    c, sampler, clock, world, waiting = rl.config, rl.sampler, rl.clock, rl.env.world, {}
    ids = list(by_id)
    meet = pack.in_order(round.want) if rl.env.deterministic or world == 1 else pack.as_they_come(round.want, shared_counter(rl))

    def claim(done):
        begin = time.perf_counter()
        found = meet(done)
        clock["idle"] += time.perf_counter() - begin
        return found

    def rewarded(block):
        begin, ready = time.perf_counter(), []
        for key, reward, _ in rl.workers.get(block):
            ready.append(waiting.pop(key))
            ready[-1].reward = reward
        clock["reward"] += time.perf_counter() - begin
        return ready

    def score(ended, idle):
        for s in ended:
            if math.isnan(s.reward):
                waiting[s.problem, s.index] = s
                rl.workers.put((s.problem, s.index), by_id[s.problem], completion(s, rl.tok))
        if rl.env.deterministic:                                 # a sample is in when it ended, whenever its reward comes
            return ended
        return [s for s in ended if not math.isnan(s.reward)] + rewarded(block=idle and world == 1)

    running = rl.rounds.run(sampler, round, {id: prompt_ids(p, rl.tok) for id, p in by_id.items()}, c.max_new, claim=claim, score=score,
                            mine=range(rl.env.rank, len(ids), world), every=EVERY if world > 1 else 1, room=sampler.slots + c.n,
                            seed=c.seed, temperature=c.temperature, top_p=c.top_p)
    while True:
        begin, other = time.perf_counter(), clock["idle"] + clock["reward"]
        group = next(running, False)
        clock["rollout"] += time.perf_counter() - begin - (clock["idle"] + clock["reward"] - other)
        if group is False:
            break
        while group and any(math.isnan(s.reward) for s in group):
            rewarded(block=True)
        if group:
            rl.visits[group[0].problem] = group[0].visit + 1
        yield group
    rl.workers.forget()                                          # those of samples that lost


def groups_of(rl, at, want):
    """-> this rank's groups of a step as they finish, each with its rewards, and the place after them. None, where --stream can use it:
    nothing is left to sample here, others have."""
    c = rl.config
    if rl.rounds:
        round, by_id, at = next_round(rl, at, want)
        return collect_round(rl, round, by_id), at
    problems, at = next_problems(rl, at, want)

    def until_all():
        yield from collect(rl, problems, c.n)
        if c.stream:
            add = shared_counter(rl)
            add(1)
            while add(0) < rl.env.world:
                yield None
        else:
            begin = time.perf_counter()
            barrier()
            rl.clock["idle"] += time.perf_counter() - begin
    return until_all(), at


def share_visits(rl):
    """Every rank knows the visits of every problem: it may meet another rank next time."""
    for part in gather(rl.visits):
        rl.visits = {k: max(rl.visits.get(k, 0), part.get(k, 0)) for k in rl.visits | part}


def everyone(rl, groups):
    """The groups of all ranks, by their address: the same list everywhere, however many ranks there are."""
    begin = time.perf_counter()
    parts = gather(groups)                                       # waits for the slowest rank
    rl.clock["idle"] += time.perf_counter() - begin if rl.env.world > 1 else 0.0
    return sorted((g for part in parts for g in part), key=lambda g: (g[0].problem, g[0].visit))


def together(parts):
    """Stats of micro-batches, ranks or updates as one: sums, but the largest of *_max and all numbers of *_all."""
    total = {}
    for part in parts:
        for k, v in part.items():
            if k.endswith("_all"):
                total[k] = np.append(total.get(k, np.zeros(0, np.float32)), v)
            else:
                total[k] = max(total.get(k, 0.0), float(v)) if k.endswith("_max") else total.get(k, 0.0) + float(v)
    return total


def batches(rl, groups, rank, ranks):
    """A rank's packed rows. A response without advantage adds nothing to the gradient: unless another term needs it, it counts in the
    normaliser and costs no forward."""
    c = rl.config
    trained = groups if c.entropy_coef or c.kl_coef else [[s for s in g if s.advantage] for g in groups]
    trained = [g for g in trained if g]
    return pack.batches(trained, c.row_tokens, rl.model.config, rank, ranks) if trained else []


def update(rl, groups, loss):
    """One update's gradient from the groups of all ranks, each rank passing its own. -> stats as sums over ranks."""
    return backward(rl, everyone(rl, groups), loss)


def backward(rl, groups, loss, ahead=None):
    """Packs the groups of all ranks, gives each rank its share, back-propagates the sums. -> stats as sums over ranks. ahead: {address:
    stats} of the groups that a rank has back-propagated already: they count in the normaliser, and that is all that is left of them."""
    c, parts = rl.config, list((ahead or {}).values())
    rl.normaliser += sum(AGGREGATES[c.aggregate](len(s.tokens), c)[1] for g in groups for s in g)
    if ahead is not None:
        over = {k for part in gather(set(ahead)) for k in part}
        groups = [g for g in groups if address(g[0]) not in over]
    parts.append(accumulate(rl, groups, loss, rl.env.rank, rl.env.world))
    return together(gather(together(parts)))


def accumulate(rl, groups, loss, rank, ranks):
    """This rank's gradients of its share of the groups, as sums. -> stats, as sums"""
    c, clock, parts = rl.config, rl.clock, []
    begin = time.perf_counter()
    micro = batches(rl, groups, rank, ranks)
    for batch in micro:
        weights = [AGGREGATES[c.aggregate](len(s.tokens), c)[0] for s in batch.samples]
        batch.weight_N = torch.tensor(weights)[batch.sample_N] if weights else batch.weight_N
    clock["pack"] += time.perf_counter() - begin
    for batch in micro:
        begin = time.perf_counter()
        batch = batch.to(rl.env.device)
        value, stats = loss(batch, predicting(rl.model, batch), rl.model.head_weight)
        value.backward()
        parts.append(stats)
        clock["train"] += time.perf_counter() - begin
    begin = time.perf_counter()                                  # read only now: until the last row is under way nothing waits for a GPU
    parts = [{k: v.cpu().numpy() if torch.is_tensor(v) else v for k, v in stats.items()} for stats in parts]
    clock["train"] += time.perf_counter() - begin
    return together(parts)


def stream(rl, group):
    """The gradient of one complete group, before the others are sampled: sums are divided at the step, so when does not matter."""
    if rl.reference:
        rl.reference.to(rl.env.device)
    return accumulate(rl, [group], make_loss(rl.config, elapsed(rl), reference=rl.reference), 0, 1)


@torch.no_grad()
def score(rl, groups):
    """-> the log-probs of the policy as it is now, of every sample that is trained, by address; of all ranks."""
    begin, mine = time.perf_counter(), {}
    for batch in batches(rl, groups, rl.env.rank, rl.env.world):
        batch = batch.to(rl.env.device)
        logp_N, _ = linear_logprob(predicting(rl.model, batch), rl.model.head_weight, batch.targets_N, rl.config.temperature)
        lengths = torch.bincount(batch.sample_N, minlength=len(batch.samples)).tolist()
        mine |= {address(s): part.numpy() for s, part in zip(batch.samples, logp_N.cpu().split(lengths))}
    rl.clock["train"] += time.perf_counter() - begin
    return {k: v for part in gather(mine) for k, v in part.items()}


def elapsed(rl):
    """The share of the run that is over: of --steps, or of --tokens where those are used up sooner."""
    return max(rl.updates / rl.config.steps, rl.spent / rl.config.tokens if rl.config.tokens else 0.0)


def step(rl, share=1.0):
    """The one division, the clipping, the update, the gathering of the weights. A step without signal moves nothing. share: of a rollout,
    when it is learned from in several steps; schedules count rollouts."""
    begin = time.perf_counter()
    c = rl.config
    factor = min(1.0, (rl.updates + 1) / max(1, c.warmup))
    if c.decay:                                                  # without one, not even the last of several updates per rollout decays
        factor = min(factor, (1 - elapsed(rl)) / max(1 / c.steps, c.decay))
    stats = rl.optimizer.step(divide=rl.normaliser, factor=max(0.0, factor))
    rl.normaliser, rl.updates = 0.0, rl.updates + share
    rl.clock["opt"] += time.perf_counter() - begin
    return stats


def learn(rl, groups, ahead=None):
    """Every update of a rollout: minibatches by address, so that ranks do not matter, --epochs times. -> stats of them all. ahead: what
    stream() did."""
    c, groups = rl.config, everyone(rl, groups)
    size = c.minibatch or max(1, len(groups))
    parts = [groups[i:i + size] for i in range(0, max(1, len(groups)), size)] * c.epochs
    loss = make_loss(c, elapsed(rl), score(rl, groups) if len(parts) > 1 else None, covariant(groups, c) if c.cov else None, rl.reference)
    if rl.reference:
        rl.reference.to(rl.env.device)
    done = []
    for part in parts:
        stats = backward(rl, part, loss, ahead)
        done.append(stats | step(rl, 1 / len(parts)))
    if rl.reference:
        rl.reference.to("cpu")
    return together(done) | {"grad_norm": sum(s["grad_norm"] for s in done) / len(done)}


def reset(rl):
    """ProRL: the policy becomes its own reference, so the KL is 0 again, and the optimizer forgets its moments."""
    rl.reference.load_state_dict(rl.model.state_dict())
    rl.optimizer.reset()


# -----------------------------------------------------------------------------
# what is logged, and the warnings that save a day


def varied(group):
    return varies([s.reward for s in group])


def summary(rl, groups, dropped, stats, seconds, lost=0):
    """The numbers of a step, over all ranks. dropped: groups that --dynamic sampled and threw away; lost: their tokens, which took
    time like all others."""
    mine = [(s.reward, s.finished == "length", len(s.tokens), repeats(completion(s, rl.tok))) for g in groups for s in g]
    every = [row for part in gather(mine) for row in part]
    reward, truncated, length, repetition = (float(np.mean(column)) for column in zip(*every)) if every else [math.nan] * 4
    sampled = sum(n for _, _, n, _ in every) + all_sum(lost)
    tokens = max(1.0, stats.get("tokens", 0.0))
    low, middle, high = np.quantile(weight, (0.01, 0.5, 0.99)) if len(weight := stats.get("weight_all", ())) else [math.nan] * 3
    flat = all_sum(sum(not varied(g) for g in groups) + dropped)
    count = all_sum(len(groups) + dropped)
    clock = {f"t_{k}": v for k, v in rl.clock.items()}
    rl.clock.update(dict.fromkeys(CLOCKS, 0.0))
    return dict(reward=reward, zero_var=flat / max(1, count), truncated=truncated, length=length,
                entropy=stats.get("entropy", math.nan) / tokens,
                **{k: stats.get(k, 0.0) / tokens for k in ("sampler_kl", "sampler_far", "clipped", "reference_kl")},
                sampler_max=stats.get("sampler_max", 0.0), weight_q01=low, weight_q50=middle, weight_q99=high,
                repetition=repetition, groups=count, tokens=sampled, trained_tokens=stats.get("tokens", 0.0),
                rollout_tok_s=sampled / rl.env.world / max(1e-9, clock["t_rollout"]),
                train_tok_s=stats.get("tokens", 0.0) / rl.env.world / max(1e-9, clock["t_train"]), t_step=seconds, **clock)


def repeats(text):
    """Does the end of a text say the same thing again and again? zlib shrinks such a tail more than tenfold."""
    tail = text[-1000:].encode()
    return len(tail) > 100 and len(tail) / len(zlib.compress(tail)) > 10


def warnings(history, config):
    """The lines that a step deserves, from the numbers of all steps so far (the last is the newest). A warning is given when its
    condition begins, not again while it lasts."""
    conditions = [
        (lambda h: len(h) >= 5 and all(m["zero_var"] == 1 for m in h[-5:]),
         "no group had two different rewards for 5 steps: there is nothing to learn from. The task is too hard or too easy for this model "
         "(look at reward), or the reward does not read the answer (look at samples.jsonl)"),
        (lambda h: h[-1]["truncated"] > 0.5,
         f"more than half of the responses were cut at --max-new {config.max_new}: their rewards say nothing. Raise --max-new"),
        (lambda h: len(h) > 1 and h[-1]["entropy"] < 0.1 * h[0]["entropy"],
         "the entropy fell below a tenth of what it was: the samples of a group will soon be equal. Lower --lr, raise --clip-high or "
         "give --entropy-coef"),
        (lambda h: len(h) > 1 and h[-1]["entropy"] > 3 * h[0]["entropy"] and h[-1]["entropy"] > 0.5,
         "the entropy rose to three times what it was: the policy is falling apart. Lower --lr"),
        (lambda h: h[-1]["sampler_kl"] > 0.01 and not h[-1].get("older"),        # tokens of an older policy are meant to differ
         "sampler and trainer disagree (KL above 0.01): a sampler in lower precision, or a bug"),
        (lambda h: abs(h[-1].get("length_bias", 0.0)) > 0.05,
         f"the kept responses are {abs(history[-1].get('length_bias', 0.0)):.0%} shorter than those drawn: a race selects where the "
         "responses to a prompt differ in length. --tail-batching prompt or continue does not"),
        (lambda h: h[-1]["repetition"] > 0.1,
         "more than a tenth of the responses end by repeating themselves (their tails shrink tenfold under zlib)"),
    ]
    now = [c(history) for c, _ in conditions]
    before = [len(history) > 1 and c(history[:-1]) for c, _ in conditions]
    return [text for (_, text), a, b in zip(conditions, now, before) if a and not b]


def recent(history, last=50):
    """What a checkpoint keeps of it: the warnings look at the first step and at the last ones."""
    return history[:1] + history[1:][-last:]


def status(at, config, m):
    """One line a step, reward first: a loss of a policy gradient says nothing."""
    return (f"step {at}/{config.steps}  reward {m['reward']:.3f}  zero-var {m['zero_var']:.0%}  truncated {m['truncated']:.0%}  "
            f"length {m['length']:.1f}  entropy {m['entropy']:.3f}  kl {m['sampler_kl']:.1e}  "
            f"rollout {m['rollout_tok_s']:,.0f} tok/s {m['t_rollout']:.2f}s  update {m['train_tok_s']:,.0f} tok/s {m['t_train']:.2f}s")


def sample_rows(rl, at, groups):
    """16 samples of a step, as they will be read: text, the token pieces and their log-probs."""
    by_id = {p.id: p for p in rl.problems}
    chosen = [s for g in groups for s in g][:: max(1, sum(map(len, groups)) // 16)][:16]
    return [dict(step=at, problem=s.problem, index=s.index, prompt=by_id[s.problem].prompt, text=completion(s, rl.tok),
                 pieces=[rl.tok.decode([t]) for t in s.tokens], logprobs=s.logprobs, advantage=s.advantage, reward=s.reward,
                 finished=s.finished) for s in chosen]


# -----------------------------------------------------------------------------
# memory: what a run needs of a GPU, before it is started


def budget(shape, config, width, world, slots, longest, reference=False):
    """{what: bytes of one rank}. shape: a GPTConfig; width: bytes of a weight. Weights and gradients are whole on every rank, masters
    and moments sharded; the KV cache takes what its tokens take, at most this; activations are those of one packed row."""
    with torch.device("meta"):
        params = sum(p.numel() for p in GPT(shape).parameters())
    half = width < 4
    heads = shape.n_head * shape.head_dim
    kv_heads = shape.n_kv_head * shape.head_dim
    # kept for the backward, numbers a token and layer: two norms in and out, q k v twice (before and after the rotation), the attention's
    # output, gate and up, their product
    kept = 4 * shape.d_model + 2 * (heads + 2 * kv_heads) + heads + 3 * shape.d_ff
    layers = shape.n_layer * shape.d_model + kept if config.checkpoint else shape.n_layer * kept
    # where prompts are shared, the keys and values of one are gathered once for each of its responses
    P, k, prompts = fullest(config, longest)
    gathered = config.row_tokens + prompts * k * P if half and prompts else 0
    gathered *= 2 * kv_heads * (1 if config.checkpoint else shape.n_layer)
    largest = shape.vocab_size * shape.d_model
    pages = slots * -(-(longest + rollout.Pool.horizon) // rollout.PAGE) + 1
    parts = {"weights": params * width,
             # fp32 sums, and one half-precision gradient that is about to be added to its own
             "gradients": params * 4 + (largest * width if half else 0),
             "optimizer shard": params * (12 if half else 8) // world,           # fp32 master (where the weight is not it), two moments
             "KV cache": (pages * rollout.PAGE if half else slots * longest) * 2 * shape.n_layer * kv_heads * width,
             "activations": (config.row_tokens * layers + gathered) * width,
             # a tile of logits and its gradient, and two sums of the hidden states' gradient; or logits, exponentials, gradient
             "head": min(kernels.BACKWARD_TILE, config.row_tokens * shape.vocab_size) * 6 + 8 * config.row_tokens * shape.d_model if half
                     else 3 * 4 * kernels.CHUNK}
    if reference:
        parts["reference"] = params * width
    return parts


def memory(rl):
    parts = budget(rl.model.config, rl.config, rl.model.head_weight.element_size(), rl.env.world, rl.sampler.slots, rl.sampler.max_len,
                   bool(rl.reference))
    if rl.sampler.device.type == "cuda":                         # the pool is there, and was cut to what the card has
        parts["KV cache"] = rl.sampler.storage.k.nbytes + rl.sampler.storage.v.nbytes
    return parts


def print_budget(rl):
    parts = memory(rl)
    print(f"memory of one rank of {rl.env.world}, {rl.env.dtype}:")
    for name, size in parts.items():
        print(f"  {name:<16} {size / 2**30:8.3f} GiB")
    print(f"  {'together':<16} {sum(parts.values()) / 2**30:8.3f} GiB")


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config
    argv = list(sys.argv[1:] if argv is None else argv)
    kind = "cuda" if flags(Config, argv, __doc__).device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"
    settings, expected = HARDWARE[kind]
    own = any(word.split("=")[0] in ("--init", "--task", "--data") for word in argv)
    config = flags(Config, argv if own else settings.split() + argv, __doc__)
    positive(config, "steps prompts n max_new problems row_tokens eval_n eval_k final_n save_every workers")
    if config.n < 2:
        die("--n is 1: a group of one has no baseline, so no advantage; give at least 2")

    # ---- init
    rl = setup(config)
    config, env = rl.config, rl.env
    if config.tail_batching != "off":
        rl.rounds = pack.Rounds(config.tail_batching, config.prompts, config.n, config.more_prompts, config.more_samples)
    if config.dry_run:
        print_budget(rl)
        return
    run = Run(f"runs/{config.name}", config, env, resume=config.resume, free=("eval_every", "save_every", "threads", "workers", "wandb"),
              sources=[m.__file__ for m in (sys.modules[__name__], rollout, pack)])
    rl.workers.log = run.log
    begin, at, history = 0, 0, []                                # at: how many problems were taken from the endless list
    state = restore(rl, run) if config.resume else None
    if state:
        begin, at, history = (state[k] for k in ("step", "at", "history"))
        vars(rl).update({k: state[k] for k in COUNTERS})
        if rl.reference:
            rl.reference.load_state_dict(state["reference"])
        if rl.rounds:
            rl.rounds.load_state_dict(state["rounds"])
    size = sum(p.numel() for p in rl.model.parameters()) / 1e6
    run.log(f"{config.algo} on {config.data or config.task} from {config.init}: {size:.2f}M parameters, {config.prompts} x "
            f"{config.n} samples a step, {env.world} x {env.device}, {kernels.backend(env.device)}")
    if not own:
        run.log(f"on {expected}")

    def test(name, problems, said):
        result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, problems, config.eval_k, config.max_new)
        run.log(f"{said}: {words(result)}")
        return {f"{name}/{k}": v for k, v in result.items()}

    def save(done):
        run.save(done, lambda folder: rl.model.save_hf(folder, rl.tok),
                 dict(optimizer=rl.optimizer.state_dict(), step=done, at=at, history=recent(history), **{k: vars(rl)[k] for k in COUNTERS},
                      reference=rl.reference.state_dict() if rl.reference and env.master else None,
                      rounds=rl.rounds.state_dict() if rl.rounds and env.master else None))

    # ---- the loop
    if begin == 0:
        before = test("test", rl.test, "before") | test("eval", rl.valid, "  held out")
        rl.best = before["eval/avg"]
        run.metrics(0, **before)
    bar = progress(config.steps, "rl")
    bar.update(begin)
    now, over = begin, lambda: now >= config.steps or 0 < config.tokens <= rl.spent
    while not over():
        now, clock = now + 1, time.perf_counter()
        groups, ahead, dropped, lost, sampled, tries = [], {}, 0, 0, 0, 0
        while all_sum(len(groups)) < config.prompts and tries < (4 if config.dynamic else 1):
            missing = config.prompts - all_sum(len(groups))
            found, at = groups_of(rl, at, missing)
            for group in found:
                if group is None:                                # nothing left to sample here: learn, or wait for the others
                    todo = next((g for g in groups if address(g[0]) not in ahead), None) if config.stream else None
                    if todo:
                        ahead[address(todo[0])] = stream(rl, todo)
                    else:
                        time.sleep(0.001)
                    continue
                sampled += sum(len(s.tokens) for s in group)
                if config.dynamic and not varied(group):
                    dropped += 1
                    lost += sum(len(s.tokens) for s in group)
                    continue
                advantage(group, config)
                groups.append(group)
            share_visits(rl)                                     # the next try may draw a problem again, on another rank
            tries += 1
            sampled += rl.rounds.wasted if rl.rounds and env.master else 0
        stats = learn(rl, groups, ahead if config.stream else None)
        rl.spent += all_sum(sampled)

        # ---- log
        numbers = summary(rl, groups, dropped, stats, time.perf_counter() - clock, lost)
        numbers |= rl.rounds.evidence() if rl.rounds else {}
        numbers |= {"streamed": all_sum(len(ahead))} if config.stream else {}
        history.append(numbers)
        numbers["grad_norm"], numbers["skipped"], numbers["spent"] = stats["grad_norm"], rl.optimizer.skipped, rl.spent
        numbers["reward_failed"] = all_sum(sum(rl.workers.failed.values()))
        bar.update()
        run.log(status(now, config, numbers))
        if now == begin + 1 and env.device.type == "cuda":
            predicted = sum(memory(rl).values())
            run.log(f"  memory: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB at the peak, {predicted / 2**30:.2f} by --dry-run")
        for warning in warnings(history, config):
            run.log(f"  warning: {warning}")
        last = over()
        if config.eval_every and now % config.eval_every == 0 and not last:
            numbers |= test("eval", rl.valid, "  held out")
            avg = numbers["eval/avg"]
            rl.best, rl.stalled = (avg, 0) if avg > rl.best else (rl.best, rl.stalled + 1)
        if last:
            numbers |= test("test", rl.test, "after")
        if (config.reset_every and now % config.reset_every == 0) or (config.reset_patience and rl.stalled >= config.reset_patience):
            reset(rl)
            rl.best, rl.stalled = -math.inf, 0
            run.log("  the policy is its own reference from here on, and the optimizer starts afresh")
        run.metrics(now, **numbers)
        run.samples(sample_rows(rl, now, groups))
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
