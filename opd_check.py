"""
opd_check.py: will on-policy distillation work for this student and this teacher? Asked before anything is spent.

On-policy distillation fails quietly: the teacher scores every token of the student's rollouts, and where it would never have been it
scores them badly or at random. What can be known beforehand, cheaply, on some dozens of the student's own rollouts:

    audit           same tokenizer (by content), same stop ids, same chat template
    identity        the student scored as its own teacher, in packed rows: every log-ratio must be 0, or the numbers below are a bug
    accuracy        is there anything to learn? paired over problems
    overlap         on the student's prefixes, do the two agree on which tokens are likely at all? (in good runs of arXiv 2604.13016 the
                    shared top-16 holds 97-99% of both models' mass)
    continuation    the student's rollouts are cut at some length and the teacher goes on from there: does it still do better than the
                    student did? Where it does not, its scores of what follows teach nothing
    cost            what a run would take

and a verdict: go, SFT first, shorten, or do not. The functions in the upper half are also the diagnostics of opd.py, at every step.

    python opd_check.py --student runs/base --teacher runs/rl --task countdown
    torchrun --nproc_per_node=8 opd_check.py --student DIR --teacher DIR --task math500 --max-new 8192
"""

import math
import statistics
import time
from dataclasses import dataclass
from types import SimpleNamespace

import torch

import data
import pack
from common import hf
from common.reward import Rewards
from common.run import die, flags, gather, positive, start
from evaluate import SEED, completion, prompt_ids
from kernels import linear_logprob
from nanorl import CLOCKS, collect, predicting
from rollout import Sampler
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
    shortest: int = 512                  # a prefix of at most this many tokens is never called too long
    tokens: int = 100_000                # sampled tokens of the run whose cost is told
    seed: int = 0                        # of the problems
    row_tokens: int = 4096               # tokens of one packed row
    slots: int = 0                       # rows the sampler decodes at a time; 0: its own choice
    workers: int = 2                     # reward processes
    device: str = "auto"                 # auto, cpu, cuda, mps
    dtype: str = "auto"                  # auto, fp32, bf16
    threads: int = 0                     # CPU threads; 0: all


# what the verdict is made of. The first two are from pilot runs on models of 1M parameters and no law
COVERED = 0.8            # SFT first: the student has less than this of its mass on the teacher's top k
APART = 3.0              # or their KL at a token is above this, in nats
ALIKE = 0.01             # do not: the teacher's accuracy is not this much above the student's, or not by two standard errors
WORN = 0.2               # shorten: teacher-continued accuracy gains less than this share of what it gains from the start


# -----------------------------------------------------------------------------
# the audit: may these two talk about the same tokens?

PROBES = ["C3 7 12=43:", "12*3=36,36+7=43", "Let x = 10,000. Then f(x) = x^2 - 1 and so on.\n\n    return x"]


def token_bytes(tok, i):
    try:
        return tok.encoding.decode_single_token_bytes(i)
    except (KeyError, OverflowError):
        return None                                              # a hole in the numbering


def tokens_differ(a, b):
    """Why an id of one tokenizer is not the same text to the other, or nothing. By content: folders and names do not matter."""
    if a.vocab_size != b.vocab_size:
        return f"{a.name} has {a.vocab_size:,} tokens, {b.name} has {b.vocab_size:,}"
    for i in range(a.vocab_size):
        one, two = token_bytes(a, i), token_bytes(b, i)
        if one != two:
            return f"id {i} is {one!r} in {a.name} and {two!r} in {b.name}"
    for text in PROBES:
        if a.encode(text) != b.encode(text):
            return f"they cut {text[:30]!r} into different tokens"
    return ""


def chat_differs(a, b):
    """Do their chat templates word the same talk differently? Then the teacher reads prompts that it was not trained on."""
    talk = [{"role": "user", "content": "1+1?"}]
    words = []
    for tok in (a, b):
        try:
            words.append(tok.chat(talk))
        except ValueError:
            words.append(None)                                   # a base model without a template
    return words[0] != words[1]


def stop_class(*toks):
    """All ids that end a response in any of these tokenizers: one action, whoever prefers which id (arXiv 2609.20511)."""
    return sorted(set().union(*(tok.stop for tok in toks)))


def load_teacher(folder, tok, env, width):
    """-> (model, its tokenizer), weights frozen. width: rows of the student's head. What cannot teach is refused, with the reason."""
    try:
        folder = hf.find(folder)
        its = data.tokenizer(folder)
        why = tokens_differ(tok, its)
        if why:
            raise ValueError(f"the teacher {folder} has another vocabulary than the student: {why}. Give one with the same tokenizer")
        model = GPT.from_hf(folder, dtype=env.dtype, device=env.device).requires_grad_(False)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        die(f"the teacher {folder} has nan or inf in {bad[0]}: it cannot score anything; take an earlier checkpoint")
    if min(width, len(model.head_weight)) < tok.vocab_size:
        die(f"the teacher {folder} has a head of {len(model.head_weight)} rows for a vocabulary of {tok.vocab_size}")
    return model, its


# -----------------------------------------------------------------------------
# diagnostics: two distributions at the same places

# per place: overlap    share of the two top-k sets that is common
#            p_mass     the student's mass on what is common; q_mass the teacher's
#            covered    the student's mass on the teacher's top k: what a loss on that support can see of the student
#            agreed     -KL(p || q), both renormalised on what is common: 0 is agreement, very negative an over-confident student
#            gap        |entropy of the teacher - entropy of the student|; p_entropy, q_entropy
#            kl         the whole reverse KL
#            p_stop, q_stop   probability of ending here
MEASURES = ("overlap", "p_mass", "q_mass", "covered", "agreed", "gap", "p_entropy", "q_entropy", "kl", "p_stop", "q_stop")
EDGES = (0, 4, 16, 64, 256, 1024, 4096)                          # position buckets: 0-3, 4-15, ...
PROBED = 256                                                     # places of a packed row that are looked at, evenly spread


def log_softmax(hidden_ND, head_VD, temperature=1.0):
    logits_NV = (hidden_ND @ head_VD.t()).to(torch.float64 if hidden_ND.dtype == torch.float64 else torch.float32)
    return (logits_NV / temperature).log_softmax(-1)


def compare(logp_NV, logq_NV, k, stop):
    """-> (N, MEASURES)"""
    k = min(k, logp_NV.shape[1])
    p_NV, q_NV = logp_NV.exp(), logq_NV.exp()
    in_p, in_q = (torch.zeros_like(x, dtype=torch.bool).scatter_(1, x.topk(k).indices, True) for x in (logp_NV, logq_NV))
    both = in_p & in_q
    p_mass, q_mass = (p_NV * both).sum(1), (q_NV * both).sum(1)
    shared = torch.where(both, p_NV * (logp_NV - logq_NV), 0.0).sum(1) / p_mass.clamp(min=1e-30) \
        - p_mass.clamp(min=1e-30).log() + q_mass.clamp(min=1e-30).log()
    p_entropy, q_entropy = -(p_NV * logp_NV).sum(1), -(q_NV * logq_NV).sum(1)
    return torch.stack([both.sum(1) / k, p_mass, q_mass, (p_NV * in_q).sum(1), torch.where(p_mass > 0, -shared, 0.0),
                        (q_entropy - p_entropy).abs(), p_entropy, q_entropy, (p_NV * (logp_NV - logq_NV)).sum(1),
                        p_NV[:, stop].sum(1), q_NV[:, stop].sum(1)], dim=1)


def places(sample_N):
    """The position of each prediction in its response: 0, 1, 2, ... (sample_N counts up)."""
    lengths = torch.bincount(sample_N)
    return torch.arange(len(sample_N), device=sample_N.device) - (lengths.cumsum(0) - lengths)[sample_N]


@torch.no_grad()
def look(hidden_ND, head_VD, teacher_ND, teacher_VD, sample_N, k, stop, temperature=1.0):
    """-> (buckets, 1 + MEASURES): how many places of a row were looked at in each bucket, and the sums over them."""
    chosen = torch.arange(0, len(sample_N), max(1, len(sample_N) // PROBED), device=sample_N.device)
    bucket = torch.bucketize(places(sample_N)[chosen], torch.tensor(EDGES[1:], device=sample_N.device), right=True)
    found = compare(log_softmax(hidden_ND[chosen], head_VD, temperature), log_softmax(teacher_ND[chosen], teacher_VD, temperature), k, stop)
    found = torch.cat([torch.ones_like(found[:, :1]), found], dim=1)
    return found.new_zeros(len(EDGES), found.shape[1]).index_add_(0, bucket, found)


def looked(sums):
    """From look()'s sums to {measure: mean, "measure/4": mean from position 4 on, up to the next edge}; what was not seen is left out."""
    sums, out = sums.reshape(-1, len(EDGES), 1 + len(MEASURES)).sum(0), {}
    for name, row in [("", sums.sum(0)), *((f"/{edge}", row) for edge, row in zip(EDGES, sums))]:
        if row[0]:
            out |= {f"{m}{name}": float(value / row[0]) for m, value in zip(MEASURES, row[1:])}
    return out


def repeated(tokens_N, sample_N, n):
    """Which tokens end an n-gram that their response has had before?"""
    at = places(sample_N)
    mixed = sample_N
    for back in range(n):                                        # wraps around like any hash, over the n tokens and whose they are
        mixed = mixed * 1_000_003 + (tokens_N.roll(back) + 1)
    _, key = mixed.unique(return_inverse=True)
    here = torch.arange(len(key), device=key.device)
    early = torch.where(at >= n - 1, here, len(key))             # the first n - 1 tokens have no n-gram yet
    first = torch.full_like(here, len(key)).scatter_reduce_(0, key, early, "amin")
    return (at >= n - 1) & (here > first[key])


# -----------------------------------------------------------------------------
# the measurements


def audit(tok, its):
    """-> the lines about what the two do not share, beyond the vocabulary."""
    lines = []
    if tok.stop != its.stop:
        lines.append(f"stop ids differ: {sorted(tok.stop)} and {sorted(its.stop)}; opd.py scores them as one action (--eos-class)")
    if chat_differs(tok, its):
        lines.append("chat templates differ: prompts should be worded as the teacher's training worded them")
    return lines


@torch.no_grad()
def scored(model, teacher, batches, k, stop, device):
    """-> (means of MEASURES by bucket, the largest |log-ratio| of the student scored as its own teacher, seconds of the teacher)."""
    sums, worst, seconds = [], 0.0, 0.0
    for batch in batches:
        batch = batch.to(device)
        hidden = predicting(model, batch)
        logp_N, _ = linear_logprob(hidden, model.head_weight, batch.targets_N)
        if len(logp_N):
            worst = max(worst, float((logp_N - batch.old_logp_N).abs().max()))
        begin = time.perf_counter()
        taught = predicting(teacher, batch)
        linear_logprob(taught, teacher.head_weight, batch.targets_N)[0].sum().item()
        seconds += time.perf_counter() - begin
        width = min(len(model.head_weight), len(teacher.head_weight))
        sums.append(look(hidden, model.head_weight[:width], taught, teacher.head_weight[:width], batch.sample_N, k, stop).cpu())
    parts = gather((sums, worst, seconds))
    return looked(torch.stack([s for part in parts for s in part[0]])), max(p[1] for p in parts), sum(p[2] for p in parts)


def rollouts(config, model, tok, workers, sampler, problems):
    """-> the groups of all ranks, rewards in."""
    how = SimpleNamespace(max_new=config.max_new, seed=SEED, temperature=1.0, top_p=1.0, stream=False)
    rl = SimpleNamespace(config=how, model=model, tok=tok, sampler=sampler, workers=workers, visits={}, clock=dict.fromkeys(CLOCKS, 0.0))
    groups = list(collect(rl, problems, config.samples))
    return sorted((g for part in gather(groups) for g in part), key=lambda g: g[0].problem)


def continued(config, tok, workers, sampler, groups, by_id, cut):
    """The teacher goes on from the first `cut` tokens of every rollout that is longer. -> [(student's reward, teacher's)] of all ranks."""
    longer = {s.problem * config.samples + s.index: s for g in groups for s in g if len(s.tokens) > cut}
    rows, left, ids, prompts = [], 0, list(longer), [s.prompt + s.tokens[:cut] for s in longer.values()]
    for i, (end,) in sampler.stream(prompts, 1, config.max_new - cut, seed=SEED + cut, ids=ids):
        s = longer[ids[i]]
        end.tokens = s.tokens[:cut] + end.tokens
        workers.put(ids[i], by_id[s.problem], completion(end, tok))
        left += 1
    while left:
        for key, reward, _ in workers.get(block=True):
            rows.append((longer[key].reward, reward))
            left -= 1
    return [row for part in gather(rows) for row in part]


def mean_se(values):
    se = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return (statistics.fmean(values), se) if values else (math.nan, math.inf)


def lengths_to_cut(config, groups):
    """Up to --cuts prefix lengths, doubling, to the longest that a quarter of the rollouts reach."""
    lengths = sorted(len(s.tokens) for g in groups for s in g)
    cut, cuts = max(1, lengths[3 * len(lengths) // 4] - 1), []
    while cut and len(cuts) < config.cuts:
        cuts.append(cut)
        cut //= 2
    return cuts[::-1]


def verdict(config, m):
    """-> (word, reason). m: the measured numbers."""
    gain, se = m["gain"], m["gain_se"]
    if m["identity"] > m["tolerance"]:
        return "do not", f"the student scored as its own teacher is off by {m['identity']:.1e} in a log-prob: fix the scoring first"
    if gain < max(ALIKE, 2 * se):
        return "do not", f"the teacher is not better: {gain:+.1%} +-{se:.1%} over the student"
    if m["covered"] < COVERED or m["kl"] > APART:
        return "SFT first", (f"on the student's prefixes the two disagree: {m['covered']:.0%} of its mass is on the teacher's top "
                             f"{config.k}, KL {m['kl']:.2f} nats a token. Fine-tune on the teacher's texts (opd.py --control sft)")
    for cut, ahead, _, _ in m["continuation"]:
        if cut > config.shortest and ahead < WORN * gain:
            return "shorten", f"after {cut} tokens of the student's the teacher gains only {ahead:+.1%}: opd.py --horizon {cut}"
    return "go", f"{gain:+.1%} to learn, {m['covered']:.0%} of the student's mass on the teacher's top {config.k}, KL {m['kl']:.2f} a token"


def main(argv=None):
    # ---- config
    config = flags(Config, argv, __doc__)
    positive(config, "n samples max_new k cuts tokens row_tokens workers")
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
            raise ValueError(f"a prompt and --max-new {config.max_new} take {longest} tokens, the model serves {model.config.max_len} "
                             f"and a row {config.row_tokens}")
    except (ValueError, FileNotFoundError) as e:
        die(e)
    teacher, its = load_teacher(config.teacher, tok, env, len(model.head_weight))
    if longest > teacher.config.max_len:
        die(f"a prompt and --max-new {config.max_new} take {longest} tokens, the teacher serves {teacher.config.max_len}")
    for line in audit(tok, its):
        say(f"audit: {line}")
    stop = stop_class(tok, its)
    sampler, better = (Sampler(m, set(stop), tok, slots=config.slots or None, max_len=longest, deterministic=env.deterministic)
                       for m in (model, teacher))
    workers, by_id = Rewards(config.task, workers=config.workers), {p.id: p for p in problems}

    # ---- rollouts of both, and the student's as the teacher sees them
    begin = time.perf_counter()
    groups = rollouts(config, model, tok, workers, sampler, problems)
    sampling = time.perf_counter() - begin
    taught = rollouts(config, teacher, tok, workers, better, problems)
    gain, gain_se = mean_se([statistics.fmean(t.reward for t in b) - statistics.fmean(s.reward for s in a) for a, b in zip(groups, taught)])
    one, two = (mean_se([statistics.fmean(s.reward for s in g) for g in gs]) for gs in (groups, taught))
    say(f"accuracy: student {one[0]:.1%} +-{one[1]:.1%}, teacher {two[0]:.1%} +-{two[1]:.1%}, paired {gain:+.1%} +-{gain_se:.1%}")
    for s in (s for g in groups for s in g):
        s.advantage = 1.0
    batches = pack.batches(groups, config.row_tokens, model.config, env.rank, env.world)
    means, identity, scoring = scored(model, teacher, batches, config.k, stop, env.device)
    say(f"identity: the student as its own teacher, largest |log-ratio| {identity:.1e}")
    for edge in ("", *(f"/{e}" for e in EDGES)):
        if f"overlap{edge}" in means:
            m = {k: means[f"{k}{edge}"] for k in MEASURES}
            say(f"overlap{' from position ' + edge[1:] if edge else ''}: {m['overlap']:.0%} of the top {config.k}, mass "
                f"{m['p_mass']:.1%} of the student, {m['q_mass']:.1%} of the teacher; student on the teacher's {m['covered']:.1%}; "
                f"KL {m['kl']:.3f}; entropy {m['p_entropy']:.2f} and {m['q_entropy']:.2f}; stop {m['p_stop']:.3f} and {m['q_stop']:.3f}")

    # ---- does the teacher still know better in the middle of a student's text?
    continuation = []
    for cut in lengths_to_cut(config, groups):
        rows = continued(config, tok, workers, better, groups, by_id, cut)
        ahead, se = mean_se([t - s for s, t in rows])
        continuation.append((cut, ahead, se, len(rows)))
        say(f"continuation after {cut} tokens: teacher {ahead:+.1%} +-{se:.1%} over the student ({len(rows)} rollouts)")
    workers.close()

    # ---- cost and verdict
    tokens = sum(len(s.tokens) for g in groups for s in g)
    size, its_size = (sum(p.numel() for p in m.parameters()) for m in (model, teacher))
    say(f"cost of {config.tokens:,} sampled tokens: student {8 * size * config.tokens:.1e} FLOP (sampling 2, learning 6 a weight), teacher "
        f"{2 * its_size * config.tokens:.1e}; here {sampling / tokens * config.tokens:.0f} s of sampling and "
        f"{scoring / tokens * config.tokens:.0f} s of scoring")
    numbers = dict(gain=gain, gain_se=gain_se, student=one[0], teacher=two[0], identity=identity, continuation=continuation,
                   tolerance=1e-3 if env.dtype == torch.float32 else 0.5, **means)
    word, reason = verdict(config, numbers)
    return done(word, reason, **numbers)


if __name__ == "__main__":
    main()
