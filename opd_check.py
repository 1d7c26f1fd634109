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

and a verdict: go, SFT first, shorten, or do not. What opd.py measures at every step, its guard, and
the readers of what it is given are here, too.

    python opd_check.py --student runs/base --teacher runs/rl --task countdown
    torchrun --nproc_per_node=8 opd_check.py --student DIR --teacher DIR --task math500 \
        --max-new 8192
"""

import json
import math
import statistics
import time
from dataclasses import dataclass
from typing import Literal
from pathlib import Path

import numpy as np
import torch

import data
import pack
from algos import predicting
from common import hf
from common.flags import die, flags, positive
from common.reward import Rewards
from common.run import gather, start
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
    tokens: int = 100_000                # sampled tokens of the run whose cost is told
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
# the audit: may these two talk about the same tokens?

PROBES = ["C3 7 12=43:", "12*3=36,36+7=43", "Let x = 10,000. Then f(x) = x^2 - 1 and so on.\n\n    "
                                            "return x"]


def token_bytes(tok, i):
    try:
        return tok.encoding.decode_single_token_bytes(i)
    except (KeyError, OverflowError):
        return None                                              # a hole in the numbering


def tokens_differ(a, b):
    """Why an id of one tokenizer is not the same text to the other, or nothing. By content: folders
    and names do not matter."""
    if a.vocab_size != b.vocab_size:
        return f"{a.name} has {a.vocab_size:,} tokens, {b.name} has {b.vocab_size:,}"
    for i in range(a.vocab_size):
        one = token_bytes(a, i)
        two = token_bytes(b, i)
        if one != two:
            return f"id {i} is {one!r} in {a.name} and {two!r} in {b.name}"
    for text in PROBES:
        if a.encode(text) != b.encode(text):
            return f"they cut {text[:30]!r} into different tokens"
    return ""


def chat_differs(a, b):
    """Do their chat templates word the same talk differently? Then the teacher reads prompts that
    it was not trained on."""
    talk = [{"role": "user", "content": "1+1?"}]
    words = []
    for tok in (a, b):
        try:
            words.append(tok.chat(talk))
        except ValueError:
            words.append(None)                                   # a base model without a template
    return words[0] != words[1]


def stop_class(*toks):
    """All ids that end a response in any of these tokenizers: one action, whichever id a model
    prefers (arXiv 2609.20511)."""
    return sorted(set().union(*(tok.stop for tok in toks)))


def load_teacher(folder, tok, env, width):
    """-> (model, its tokenizer), weights frozen. width: rows of the student's head. What cannot
    teach is refused, with the reason."""
    try:
        folder = hf.find(folder)
        its = data.tokenizer(folder)
        why = tokens_differ(tok, its)
        if why:
            raise ValueError(f"the teacher {folder} has another vocabulary than the student: "
                             f"{why}. Give one with the same tokenizer")
        model = GPT.from_hf(folder, dtype=env.dtype, device=env.device).requires_grad_(False)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    its.date = tok.date or its.date                  # both are told the same day
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        die(f"the teacher {folder} has nan or inf in {bad[0]}: it cannot score anything; take an "
            "earlier checkpoint")
    if min(width, len(model.head_weight)) < tok.vocab_size:
        die(f"the teacher {folder} has a head of {len(model.head_weight)} rows for a vocabulary of "
            f"{tok.vocab_size}")
    return model, its


# -----------------------------------------------------------------------------
# texts of a run: the gold of a file, and prompts that only the teacher sees


def read_gold(path, tok, longest):
    """-> [(prompt, response)] as tokens."""
    texts = []
    if not Path(path).is_file():
        raise FileNotFoundError(f"--gold {path}: no such file")
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            prompt = data.begun(tok.encode(found["prompt"]), tok)
            response = tok.encode(found["response"]) + tok.encode(tok.end)
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'--gold {path}, line {n}: not a JSON object with "prompt" and '
                             '"response"') from None
        size = len(prompt) + len(response)
        if not prompt or size > longest:
            raise ValueError(f"--gold {path}, line {n}: {size} tokens, and a row takes 2 to "
                             f"{longest} with a prompt")
        texts.append((prompt, response))
    if not texts:
        raise ValueError(f"--gold {path} is empty: give one text a line")
    return texts


def privileged(config, tok, problems, room):
    """{problem: prompt} of a teacher that knows more."""
    missing = sum(p.gold is None for p in problems)
    if missing:
        raise ValueError(f"--context {config.context}: {missing} of {len(problems)} problems have "
                         "no gold answer")
    found = {}
    for p in problems:
        known = p.gold if config.context == "gold" else p.gold[:-(-len(p.gold) // 2)]
        text = config.context_text.replace("{context}", known)
        if "messages" in p.data:         # into the last message, so that the template stays whole
            *before, last = p.data["messages"]
            content = text.replace("{prompt}", last["content"])
            text = tok.chat([*before, {**last, "content": content}])
        else:
            text = text.replace("{prompt}", p.prompt)
        found[p.id] = data.begun(tok.encode(text), tok)
        if len(found[p.id]) + config.max_new > room:
            raise ValueError(f"--context: a prompt of {len(found[p.id])} tokens and --max-new "
                             f"{config.max_new}; the teacher serves {room}")
    return found


# -----------------------------------------------------------------------------
# diagnostics: two distributions at the same places

# per place: overlap    share of the two top-k sets that is common
#            p_mass     the student's mass on what is common; q_mass the teacher's
#            covered    the student's mass on the teacher's top k: what a loss on that support sees
#            agreed     -KL(p || q), both renormalised on what is common: 0 is agreement, very
#                       negative an over-confident student
#            gap        |entropy of the teacher - entropy of the student|; p_entropy, q_entropy
#            kl         the whole reverse KL
#            p_stop, q_stop   probability of ending here
MEASURES = ("overlap", "p_mass", "q_mass", "covered", "agreed", "gap", "p_entropy", "q_entropy",
            "kl", "p_stop", "q_stop")
EDGES = (0, 4, 16, 64, 256, 1024, 4096)  # position buckets: 0-3, 4-15, ...
PROBED = 256                             # places of a packed row that are measured, evenly spread


def log_softmax(hidden_ND, head_VD, temperature=1.0):
    logits_NV = hidden_ND @ head_VD.t()
    if logits_NV.dtype != torch.float64:
        logits_NV = logits_NV.float()
    return (logits_NV / temperature).log_softmax(-1)


def in_top(logp_NV, k):
    return torch.zeros_like(logp_NV, dtype=torch.bool).scatter_(1, logp_NV.topk(k).indices, True)


def compare(logp_NV, logq_NV, k, stop):
    """-> (N, MEASURES)"""
    k = min(k, logp_NV.shape[1])
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    in_q = in_top(logq_NV, k)
    both = in_top(logp_NV, k) & in_q
    p_mass = (p_NV * both).sum(1)
    q_mass = (q_NV * both).sum(1)
    p_some = p_mass.clamp(min=1e-30)
    shared = torch.where(both, p_NV * (logp_NV - logq_NV), 0.0).sum(1) / p_some
    shared = shared - p_some.log() + q_mass.clamp(min=1e-30).log()
    p_entropy = -(p_NV * logp_NV).sum(1)
    q_entropy = -(q_NV * logq_NV).sum(1)
    found = dict(
        overlap=both.sum(1) / k,
        p_mass=p_mass,
        q_mass=q_mass,
        covered=(p_NV * in_q).sum(1),
        agreed=torch.where(p_mass > 0, -shared, 0.0),
        gap=(q_entropy - p_entropy).abs(),
        p_entropy=p_entropy,
        q_entropy=q_entropy,
        kl=(p_NV * (logp_NV - logq_NV)).sum(1),
        p_stop=p_NV[:, stop].sum(1),
        q_stop=q_NV[:, stop].sum(1),
    )
    return torch.stack([found[name] for name in MEASURES], dim=1)


def places(sample_N):
    """The position of each prediction in its response: 0, 1, 2, ... (sample_N counts up)."""
    lengths = torch.bincount(sample_N)
    starts = lengths.cumsum(0) - lengths
    return torch.arange(len(sample_N), device=sample_N.device) - starts[sample_N]


@torch.no_grad()
def measure(hidden_ND, head_VD, teacher_ND, teacher_VD, sample_N, k, stop, temperature=1.0):
    """-> (buckets, 1 + MEASURES): how many places of a packed row were measured in each bucket, and
    the sums over them."""
    device = sample_N.device
    chosen = torch.arange(0, len(sample_N), max(1, len(sample_N) // PROBED), device=device)
    edges = torch.tensor(EDGES[1:], device=device)
    bucket = torch.bucketize(places(sample_N)[chosen], edges, right=True)
    logp_NV = log_softmax(hidden_ND[chosen], head_VD, temperature)
    logq_NV = log_softmax(teacher_ND[chosen], teacher_VD, temperature)
    found = compare(logp_NV, logq_NV, k, stop)
    found = torch.cat([torch.ones_like(found[:, :1]), found], dim=1)
    return found.new_zeros(len(EDGES), found.shape[1]).index_add_(0, bucket, found)


def means_of(sums):
    """From measure()'s sums to {measure: mean, "measure/4": mean from position 4 on, up to the next
    edge}; what was not seen is left out."""
    sums = sums.reshape(-1, len(EDGES), 1 + len(MEASURES)).sum(0)
    buckets = {"": sums.sum(0)} | {f"/{edge}": part for edge, part in zip(EDGES, sums)}
    means = {}
    for name, (count, *totals) in buckets.items():
        if count:
            means |= {f"{m}{name}": float(total / count) for m, total in zip(MEASURES, totals)}
    return means


def repeated(tokens_N, sample_N, n):
    """Which tokens end an n-gram that their response has had before?"""
    place_N = places(sample_N)
    mixed = sample_N
    for back in range(n):                # a hash of the n tokens and their sample: it wraps around
        mixed = mixed * 1_000_003 + (tokens_N.roll(back) + 1)
    _, key = mixed.unique(return_inverse=True)
    here = torch.arange(len(key), device=key.device)
    early = torch.where(place_N >= n - 1, here, len(key))    # the first n - 1 have no n-gram yet
    first = torch.full_like(here, len(key)).scatter_reduce_(0, key, early, "amin")
    return (place_N >= n - 1) & (here > first[key])


def disagreement(batch, r_N, live_N, config):
    """Sums over the tokens that the teacher scored. r_N: log p - log q, 0 elsewhere."""
    again_N = repeated(batch.targets_N, batch.sample_N, config.repeat_n) & live_N
    return dict(
        live=live_N.sum(),
        advantage=-r_N.sum(),
        advantage_abs=r_N.abs().sum(),
        negative=(r_N > 0).sum(),
        cut=(r_N.abs() > config.bound).sum(),
        again=again_N.sum(),
        again_advantage=-(r_N * again_N).sum(),
    )


def by_sample(batch, values_N):
    """-> {(problem, index): the values of its tokens, for samples.jsonl}"""
    lengths = torch.bincount(batch.sample_N, minlength=len(batch.samples)).tolist()
    parts = values_N.cpu().double().round(decimals=4).split(lengths)
    return {(s.problem, s.index): part.tolist() for s, part in zip(batch.samples, parts)}


def pulls_of(hidden_ND):
    """Filled in by the backward: do the gradients of single tokens pull in one direction?"""
    device = hidden_ND.device
    stats = dict(
        pull_all=torch.zeros(hidden_ND.shape[1], device=device),
        pulls=torch.zeros((), device=device),
    )

    def note(grad_ND):
        stats["pull_all"].add_(grad_ND.float().sum(0))
        stats["pulls"].add_(grad_ND.float().norm(dim=1).sum())

    hidden_ND.register_hook(note)
    return stats


def diagnosis(stats, width):
    """The numbers of a step that a teacher adds, from the sums of stats. width: of the hidden states."""
    # |sum of the gradients of single tokens| / sum of their norms, at the head's input. Large
    # advantages and a small sum: tokens pull in all directions, as in failing runs (2604.13016)
    coherence = math.nan
    if stats.get("pulls"):
        pull = stats["pull_all"].reshape(-1, width).sum(0)
        coherence = float(np.linalg.norm(pull) / stats["pulls"])
    numbers = dict(
        gold=stats.get("gold", 0.0),
        teacher_nan=stats.get("teacher_nan", 0.0),
        coherence=coherence,
    )
    if not stats.get("live"):
        return numbers
    live = stats["live"]
    again = stats["again"]
    return numbers | dict(
        advantage=stats["advantage"] / live,
        advantage_abs=stats["advantage_abs"] / live,
        negative=stats["negative"] / live,
        cut=stats["cut"] / live,
        repeated=again / live,
        advantage_repeated=stats["again_advantage"] / again if again else math.nan,
        advantage_others=(stats["advantage"] - stats["again_advantage"]) / max(1.0, live - again),
        **means_of(torch.from_numpy(stats["look_all"])),
    )


# -----------------------------------------------------------------------------
# the guard of opd.py: does it still work?


def rising(values, n, least):
    """Has it risen for n steps? In thirds, each above the one before, because a single step is noise."""
    if len(values) < n:
        return False
    a, b, c = (float(np.mean(part)) for part in np.array_split(values[-n:], 3))
    return a < b < c and c - a >= least


def guard(history, config):
    """Why the run should end, or nothing. From the texts alone: a KL may rise while a student
    learns, and fall while it breaks."""
    if not config.guard:
        return ""
    for key, what, remedy in [
        ("repetition", "texts that repeat themselves",
         "give --kl-coef 0.01 or --gold teacher, or a --horizon"),
        ("truncated", "texts that are cut",
         "raise --max-new, see whether both stop by the same ids (opd_check.py), or --gold "
         "teacher"),
    ]:
        # what the horizon cuts is no failure
        values = [m[key] for m in history if key != "truncated" or m["max_new"] == config.max_new]
        if rising(values, config.guard, config.guard_rise):
            return (f"the share of {what} has risen for {config.guard} steps, to {values[-1]:.0%}: "
                    f"{remedy}")
    return ""


# -----------------------------------------------------------------------------
# the measurements


def audit(tok, its):
    """-> the lines about what the two do not share, beyond the vocabulary."""
    lines = []
    if tok.stop != its.stop:
        lines.append(f"stop ids differ: {sorted(tok.stop)} and {sorted(its.stop)}; opd.py scores "
                     "them as one action (--eos-class)")
    if chat_differs(tok, its):
        lines.append("chat templates differ: prompts should be worded as the teacher's training "
                     "worded them")
    return lines


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
        hidden_ND = predicting(model, batch)
        logp_N, _ = linear_logprob(hidden_ND, model.head_weight, batch.targets_N)
        if len(logp_N):
            worst = max(worst, float((logp_N - batch.old_logp_N).abs().max()))
        begin = time.perf_counter()
        taught_ND = predicting(teacher, batch)
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


def describe(k, means):
    """-> the lines about the overlap, whole and by position."""
    lines = []
    for edge in ("", *(f"/{e}" for e in EDGES)):
        if f"overlap{edge}" in means:
            m = {name: means[f"{name}{edge}"] for name in MEASURES}
            where = f" from position {edge[1:]}" if edge else ""
            lines.append(f"overlap{where}: {m['overlap']:.0%} of the top {k}, mass "
                         f"{m['p_mass']:.1%} of the student, {m['q_mass']:.1%} of the teacher; "
                         f"student on the teacher's {m['covered']:.1%}; KL {m['kl']:.3f}; entropy "
                         f"{m['p_entropy']:.2f} and {m['q_entropy']:.2f}; stop {m['p_stop']:.3f} "
                         f"and {m['q_stop']:.3f}")
    return lines


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config
    config = configure(argv)
    env = start(config.device, config.dtype, config.threads)

    def say(text):
        if env.master:
            print(text, flush=True)

    def done(word, reason, **numbers):
        say(f"verdict: {word}. {reason}")
        return dict(verdict=word, reason=reason, **numbers)

    # ---- both models; the audit
    try:
        folder, other = hf.find(config.student), hf.find(config.teacher)
        tok, its = data.tokenizer(folder), data.tokenizer(other)
        why = tokens_differ(tok, its)
        if why:
            return done("do not", f"the vocabularies differ: {why}")
        model = GPT.from_hf(folder, dtype=env.dtype, device=env.device).requires_grad_(False)
        if config.k > tok.vocab_size:
            raise ValueError(f"--k {config.k} is above the vocabulary of {tok.vocab_size}")
        task = data.load(config.task)
        problems = task.problems("valid", config.n, config.seed)
        if not problems:
            raise ValueError(f"--task {config.task} has no valid split to ask with")
        longest = max(len(prompt_ids(p, tok)) for p in problems) + config.max_new
        if longest > min(model.config.max_len, config.row_tokens):
            raise ValueError(f"a prompt and --max-new {config.max_new} take {longest} tokens, the "
                             f"model serves {model.config.max_len} and a row {config.row_tokens}")
    except (ValueError, FileNotFoundError) as e:
        die(e)
    teacher, its = load_teacher(config.teacher, tok, env, len(model.head_weight))
    if longest > teacher.config.max_len:
        die(f"a prompt and --max-new {config.max_new} take {longest} tokens, the teacher serves "
            f"{teacher.config.max_len}")
    for line in audit(tok, its):
        say(f"audit: {line}")
    stop = stop_class(tok, its)
    workers = Rewards(config.task, workers=config.workers)

    def sampled_by(m):
        sampler = Sampler(m, set(stop), tok, slots=config.slots or None, max_len=longest,
                          deterministic=env.deterministic)
        return RL(config, env, m, tok, task, sampler, workers, problems)

    student = sampled_by(model)
    better = sampled_by(teacher)

    # ---- rollouts of both, and the student's as the teacher sees them
    begin = time.perf_counter()
    groups = gather_groups(student, list(collect(student, problems, config.samples, seed=SEED)))
    sampling = time.perf_counter() - begin
    taught = gather_groups(better, list(collect(better, problems, config.samples, seed=SEED)))
    gain, gain_se = mean_se([mean_reward(b) - mean_reward(a) for a, b in zip(groups, taught)])
    one, one_se = mean_se([mean_reward(g) for g in groups])
    two, two_se = mean_se([mean_reward(g) for g in taught])
    say(f"accuracy: student {one:.1%} +-{one_se:.1%}, teacher {two:.1%} +-{two_se:.1%}, paired "
        f"{gain:+.1%} +-{gain_se:.1%}")
    for s in (s for g in groups for s in g):
        s.advantage = 1.0
    batches = pack.batches(groups, config.row_tokens, model.config, env.rank, env.world)
    means, identity, scoring = scored(model, teacher, batches, config.k, stop, env.device)
    say(f"identity: the student as its own teacher, largest |log-ratio| {identity:.1e}")
    for line in describe(config.k, means):
        say(line)

    # ---- does the teacher still know better in the middle of a student's text?
    continuation = []
    for cut in lengths_to_cut(config, groups):
        rows = continued(better, groups, cut)
        lead, se = mean_se([t - s for s, t in rows])
        continuation.append((cut, lead, se, len(rows)))
        say(f"continuation after {cut} tokens: teacher {lead:+.1%} +-{se:.1%} over the student "
            f"({len(rows)} rollouts)")
    workers.close()

    # ---- cost and verdict
    tokens = sum(len(s.tokens) for g in groups for s in g)
    size = sum(p.numel() for p in model.parameters())
    its_size = sum(p.numel() for p in teacher.parameters())
    say(f"cost of {config.tokens:,} sampled tokens: student {8 * size * config.tokens:.1e} FLOP "
        f"(sampling 2, learning 6 per weight), teacher {2 * its_size * config.tokens:.1e}; here "
        f"{sampling / tokens * config.tokens:.0f} s of sampling and "
        f"{scoring / tokens * config.tokens:.0f} s of scoring")
    tolerance = 1e-3 if env.dtype == torch.float32 else 0.5
    numbers = dict(gain=gain, gain_se=gain_se, student=one, teacher=two, identity=identity,
                   tolerance=tolerance, continuation=continuation, **means)
    word, reason = verdict(config, numbers)
    return done(word, reason, **numbers)


if __name__ == "__main__":
    main()
