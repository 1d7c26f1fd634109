"""
python -m bench opd: on-policy distillation in numbers, on Countdown, from a base and from
what RL made of it.

    losses      every loss from one student and one teacher: accuracy, share of the gap closed, tokens
                sampled against RL's for the same accuracy, direction of its gradient against the full
                KL's, bytes per token that a teacher elsewhere would send. All with one seed, the
                three best with three. With the `numbers` tokenizer K = 16 of 1,090, with `chars`
                K = 2 and 4 of 100
    controls    -0.5 on the least likely fifth of the tokens and no teacher; fine-tuning on the
                teacher's texts; RL with the same tokens; reverse distillation: the RL-trained student
                taught by its own base
    habits      what repeated tokens are told against others, and the overlap in good runs, as the
                runs above logged them
    verdicts    opd_check.py on seven pairs, two of them bad on purpose, and what came out when they
                were run all the same
    scoring     a teacher's log-probs on packed rows against padded batches of 64 in transformers,
                texts as they come and sorted by length

Runs are made with one thread, at most two minutes at a time, --parallel of them; one that needs
longer is stopped with a checkpoint and resumed. The same command again repeats nothing that is
done. Models that are not there are trained first: two bases, two teachers, and two students that
are worse on purpose.

    python -m bench opd
    python -m bench opd --base runs/base --teacher runs/rl
    python -m bench opd --parts losses,scoring --seeds 1

The first makes everything, in about 50 core-minutes, with tables in runs/opd/tables.md. The second
takes models that are there; the teacher's metrics are RL's curve.
"""
import contextlib
import io
import json
import math
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import data
import opd
import opd_check
import pack
import train_gpt
from algos import key
from bench import ROOT, alternate, finish, peer, ratio, show
from bench.algorithms import curve, metrics, run_all
from common import hf
from common.flags import as_flag, die, flags, positive
from common.reward import Rewards
from common.run import newest
from evaluate import SEED, evaluate, prompt_ids
from kernels import linear_logprob
from rollout import Sampler
from train_gpt import GPT

PARTS = ("losses", "controls", "habits", "verdicts", "scoring")


@dataclass
class Config:
    name: str = "opd"                # runs lie in runs/NAME/, the tables too
    base: str = ""                   # the student, with the numbers tokenizer; empty: trained here
    teacher: str = ""                # an RL run from it, whose metrics are RL's curve; empty: trained here
    chars_base: str = ""             # the same with the chars tokenizer
    chars_teacher: str = ""          # and its RL run
    parts: str = ",".join(PARTS)     # which of them
    seeds: int = 3                   # of the three best losses
    steps: int = 40                  # of a distillation
    prompts: int = 64                # per step
    n: int = 2                       # samples per prompt
    lr: float = 2e-3                 # of every distillation
    rl_steps: int = 150              # of RL: the teachers'
    eval_n: int = 200                # held-out problems of the curves
    final_n: int = 500               # and of the numbers in the tables
    check_n: int = 128               # problems of a check
    minutes: float = 2.0             # of a run, before it is stopped with a checkpoint and resumed
    parallel: int = 2                # runs at a time
    repeats: int = 5                 # timed scorings of each side


NUMBERS = {                          # row of the table: its flags
    "sampled": "--loss sampled",
    "sampled, baseline 16": "--loss sampled --baseline-k 16",
    "student_topk 16": "--loss student_topk --k 16",
    "teacher_topk 16, top-p 0.9": "--loss teacher_topk --k 16 --top-p 0.9",
    "tail 16": "--loss tail --k 16",
    "full, reverse": "--loss full",
    "full, forward": "--loss full --divergence forward",
    "full, jsd 0.5": "--loss full --divergence jsd",
}
CHARS = {"sampled": "--loss sampled",
         **{f"{loss} {k}": f"--loss {loss} --k {k}" for loss in ("student_topk", "teacher_topk", "tail")
            for k in (2, 4)}}


def slug(text):
    return "".join(c if c.isalnum() else "-" for c in text)


# -----------------------------------------------------------------------------
# runs


def finished(folder, last):
    """Is a run over, checkpoint and all? last: its last step, or None for one that may end sooner
    (by its guard)."""
    rows, there = metrics(folder), newest(folder)
    if not rows or there is None or there[1] != rows[-1]["step"]:
        return False
    return rows[-1]["step"] >= last if last else rows[-1]["step"] > 0 and "test/avg" in rows[-1]


def job(script, config, name, last, words):
    """-> (folder, argv, the step it ends with)"""
    folder = Path("runs", config.name, name)
    argv = [sys.executable, str(ROOT / script), "--name", f"{config.name}/{name}",
            "--threads", "1", "--device", "cpu", *words.split()]
    return folder, argv, last


def make(jobs, config):
    """All of them to their end, in pieces of --minutes. -> names that failed."""
    failed = []
    while True:
        left = [(folder, argv + ["--resume"] * (folder / "config.json").exists())
                for folder, argv, last in jobs if not finished(folder, last) and folder.name not in failed]
        if not left:
            return failed
        for _, argv in left:
            print("  " + " ".join(["python", *argv[1:]]))
        failed += run_all(left, config)


def models(config, parts):
    """Trains what is missing. -> {name: folder}"""
    found = {"base": config.base, "teacher": config.teacher, "chars_base": config.chars_base,
             "chars_teacher": config.chars_teacher}
    wanted = ["base", "teacher"]
    wanted += ["chars_base", "chars_teacher"] if {"losses", "verdicts"} & set(parts) else []
    wanted += ["weak", "stranger"] if "verdicts" in parts else []
    words = {"base": "", "chars_base": "--tokenizer chars", "weak": "--steps 150",
             "stranger": "--steps 300 --data arith"}
    steps = train_gpt.Config.steps
    last = {"base": steps, "chars_base": steps, "weak": 150, "stranger": 300}
    rl = (f"--steps {config.rl_steps} --eval-every 10 --eval-n {config.eval_n} "
          f"--final-n {config.final_n} --save-every 10 --workers 1 --task countdown")
    first = [job("train_gpt.py", config, k, last[k], words[k]) for k in wanted
             if not found.get(k) and k in words]
    failed = make(first, config)
    found |= {folder.name: str(folder) for folder, _, _ in first}
    pairs = [(k, b) for k, b in (("teacher", "base"), ("chars_teacher", "chars_base"))
             if k in wanted and not found[k]]
    second = [job("nanorl.py", config, k, config.rl_steps, f"--init {found[b]} {rl}") for k, b in pairs]
    failed += make(second, config)
    found |= {folder.name: str(folder) for folder, _, _ in second}
    if failed:
        die(f"could not train {', '.join(failed)}: see runs/{config.name}/*.txt")
    return {k: found[k] for k in wanted}


def distil(config, name, student, teacher, words, seed=0):
    flags = (f"--init {student} --task countdown --steps {config.steps} --prompts {config.prompts} "
             f"--n {config.n} --lr {config.lr} --eval-n {config.eval_n} --final-n {config.final_n} "
             f"--seed {seed} --workers 1 --eval-every 10 --save-every 10 ")
    flags += words if "--control" in words else f"--repeat-n 2 {words}"
    return job("opd.py", config, f"{slug(name)}-{seed}", None,
               flags + (f" --teacher {teacher}" if teacher else ""))


def ends(folder):
    """-> accuracy after the run on the test split, its error, tokens sampled, the metrics."""
    rows = metrics(folder)
    return SimpleNamespace(after=rows[-1]["test/avg"], se=rows[-1]["test/avg_se"],
                           tokens=rows[-1]["spent"], rows=rows)


def reached(rows, target):
    """Tokens at which a curve first is at `target`, by straight lines between evaluations; inf:
    never, nan: no curve."""
    if not rows:
        return math.nan
    tokens, accuracy = curve(rows)
    above = np.flatnonzero(accuracy >= target)
    if not len(above):
        return math.inf
    i = above[0]
    if i == 0:
        return float(tokens[0])
    return float(np.interp(target, accuracy[i - 1:i + 1], tokens[i - 1:i + 1]))


def accuracy(folder, split, n, cache):
    """A model's accuracy on Countdown, with the problems and the noise of every evaluation;
    remembered in a file."""
    known = json.loads(cache.read_text()) if cache.exists() else {}
    key = f"{hf.find(folder)} {split} {n}"
    if key not in known:
        model = GPT.from_hf(hf.find(folder))
        tok = data.tokenizer(hf.find(folder))
        task = data.load("countdown")
        rewards = Rewards("countdown", workers=1)
        result = evaluate(Sampler(model, tok.stop, tok, max_len=256), tok,
                          task, rewards, task.problems(split, n, 0), 4, 48)
        rewards.close()
        known[key] = [result["avg"], result["avg_se"]]
        cache.write_text(json.dumps(known))
    return known[key]


# -----------------------------------------------------------------------------
# gradients: the direction of each loss on the same rollouts


def cosines(student, teacher, rows, n=128, samples=4):
    """{row: (cosine with the full reverse KL's gradient, over all weights; norm against its)} on
    n x samples rollouts of the student."""
    folder = hf.find(student)
    model, tok = GPT.from_hf(folder), data.tokenizer(folder)
    q = GPT.from_hf(hf.find(teacher)).requires_grad_(False)
    prompts = [prompt_ids(p, tok) for p in data.load("countdown").problems("valid", n, 0)]
    sampler, drawn, gradients = Sampler(model, tok.stop, tok, max_len=256), {}, {}
    for row, words in {"full, reverse": "--loss full", **rows}.items():
        config = opd.configure(["--teacher", str(teacher), *words.split()])
        if config.top_p not in drawn:
            drawn[config.top_p] = sampler.generate(prompts, samples, 48, top_p=config.top_p, seed=SEED)
            opd.set_advantages(config, drawn[config.top_p])
        loss = opd.make_loss(config, model, q, stop=sorted(tok.stop))
        model.zero_grad()
        for batch in pack.batches(drawn[config.top_p], 4096, model.config):
            loss(batch, batch.hidden(model), model.head_weight)[0].backward()
        gradients[row] = torch.cat([p.grad.flatten() for p in model.parameters()])
    whole = gradients["full, reverse"]
    return {row: float(torch.cosine_similarity(g, whole, dim=0)) for row, g in gradients.items()}


# -----------------------------------------------------------------------------
# the parts: each makes its runs and returns lines of markdown and numbers


def losses(config, found, cache):
    lines, numbers = [], {}
    for kind, rows, student, teacher in [("numbers", NUMBERS, found["base"], found["teacher"]),
                                         ("chars", CHARS, found["chars_base"], found["chars_teacher"])]:
        jobs = {(row, 0): distil(config, f"{kind} {row}", student, teacher, words)
                for row, words in rows.items()}
        failed = make(list(jobs.values()), config)
        if kind == "numbers":
            order = sorted(rows, key=lambda row: -ends(jobs[row, 0][0]).after
                           if jobs[row, 0][0].name not in failed else 0.0)
            more = {(row, seed): distil(config, f"{kind} {row}", student, teacher, rows[row], seed)
                    for row in order[:3] for seed in range(1, config.seeds)}
            failed += make(list(more.values()), config)
            jobs |= more
        before, best = (accuracy(folder, "test", config.final_n, cache) for folder in (student, teacher))
        low, high = (accuracy(folder, "valid", config.eval_n, cache)[0] for folder in (student, teacher))
        target = low + 0.8 * (high - low)
        rl = metrics(Path(teacher))
        budget = rl[-1].get("spent", 0) if rl else 0
        rl_needs = reached(rl, target)
        direction, vocabulary = cosines(student, teacher, rows), data.tokenizer(hf.find(student)).vocab_size
        lines += ["", f"Losses, `{kind}` tokenizer ({vocabulary:,} tokens): student "
                  f"{before[0]:.1%} +-{before[1]:.1%}, teacher {best[0]:.1%} +-{best[1]:.1%}; RL "
                  f"reached 80% of the gap after {rl_needs:,.0f} of {budget:,} sampled tokens", "",
                  "| loss | accuracy | gap closed | tokens | RL needs | to "
                  "80% of the gap | RL needs | cosine | bytes a token | seeds |", "|---" * 10 + "|"]
        for row, words in rows.items():
            runs = [ends(folder) for (name, _), (folder, _, _) in jobs.items()
                    if name == row and folder.name not in failed]
            if not runs:
                continue
            after = statistics.fmean(r.after for r in runs)
            se = statistics.stdev(r.after for r in runs) / len(runs) ** 0.5 if len(runs) > 1 else runs[0].se
            needs = [reached(r.rows, target) for r in runs]
            need = statistics.fmean(needs)
            c = opd.configure(["--teacher", "x", *words.split()])
            closed = (after - before[0]) / (best[0] - before[0])
            # RL that never gets there counts as its whole budget
            spent = statistics.fmean(r.tokens for r in runs)
            same = min(reached(rl, statistics.fmean(r.rows[-1]["eval/avg"] for r in runs)), budget) / spent
            fewer = min(rl_needs, budget) / need
            lines.append(f"| {row} | {after:.1%} +-{se:.1%} | {closed:.0%} | {spent:,.0f} | {same:.1f} "
                         f"x | {f'{need:,.0f}' if math.isfinite(need) else 'never'} | {fewer:.1f} x | "
                         f"{direction[row]:.3f} | {opd.bytes_a_token(c, vocabulary):,} | {len(runs)} |")
            numbers |= {f"{kind} {row} accuracy": after, f"{kind} {row} gap": closed,
                        f"{kind} {row} RL / OPD tokens": same, f"{kind} {row} RL / OPD tokens to 80%": fewer}
    return lines, numbers


def controls(config, found, cache):
    base, teacher = found["base"], found["teacher"]
    jobs = {"distillation (sampled)": distil(config, "numbers sampled", base, teacher, NUMBERS["sampled"]),
            "fixed negative, no teacher": distil(config, "fixed negative",
                                                 base, "", "--control fixed_negative"),
            "fine-tuning on the teacher's texts": distil(config, "sft", base, teacher, "--control sft"),
            "reverse: RL-trained, taught by its base": distil(config, "reverse",
                                                              teacher, base, "--loss sampled")}
    failed = make(list(jobs.values()), config)
    before, best = (accuracy(folder, "test", config.final_n, cache) for folder in (base, teacher))
    lines = ["", f"Controls: base {before[0]:.1%} +-{before[1]:.1%}, teacher {best[0]:.1%} +-{best[1]:.1%}",
             "", "| run | before | after | tokens |", "|---" * 4 + "|"]
    numbers = {}
    for name, (folder, _, _) in jobs.items():
        if folder.name not in failed:
            r = ends(folder)
            start = best if name.startswith("reverse") else before
            lines.append(f"| {name} | {start[0]:.1%} | {r.after:.1%} +-{r.se:.1%} | {r.tokens:,} |")
            numbers[name] = r.after
    rl, own = metrics(Path(teacher)), ends(jobs["distillation (sampled)"][0])
    if rl:
        tokens, held = curve(rl)
        same = float(np.interp(own.tokens, tokens, held))
        lines.append(f"| RL with as many tokens (valid split) | {held[0]:.1%} "
                     f"| {same:.1%} | {own.tokens:,} |")
        numbers["RL, same tokens"] = same
    return lines, numbers


def habits(config, found, cache):
    """From what the runs of the losses logged: the first and the last quarter of their steps."""
    lines = ["", "Habits of the runs: mass of both on the shared top 16, and "
             "the advantage of tokens that repeat a pair; first and last quarter of the steps", "",
             "| run | overlap | student's mass | teacher's mass | KL "
             "| repeated | advantage, repeated | others | ratio | coherence |", "|---" * 10 + "|"]
    numbers = {}
    for name in ("numbers sampled", "numbers tail 16", "numbers full, reverse", "reverse"):
        folder = Path("runs", config.name, f"{slug(name)}-0")
        rows = [row for row in metrics(folder) if "overlap" in row]
        quarter = max(1, len(rows) // 4)
        for when, part in (("first", rows[:quarter]), ("last", rows[-quarter:])) if rows else ():
            mean = {k: statistics.fmean([row[k] for row in part if row.get(k) is not None] or [math.nan])
                    for k in ("overlap", "p_mass", "q_mass", "kl", "repeated",
                              "advantage_repeated", "advantage_others", "coherence")}
            less = mean["advantage_others"] / mean["advantage_repeated"]
            lines.append(f"| {name}, {when} | {mean['overlap']:.0%} | "
                         f"{mean['p_mass']:.1%} | {mean['q_mass']:.1%} | {mean['kl']:.3f} "
                         f"| {mean['repeated']:.1%} | {mean['advantage_repeated']:.3f} | "
                         f"{mean['advantage_others']:.3f} | {less:.1f} | {mean['coherence']:.2f} |")
            numbers |= {f"{name} {when} {k}": mean[k]
                        for k in ("p_mass", "q_mass")} | {f"{name} {when} others/repeated": less}
    return lines, numbers


def verdicts(config, found, cache):
    pairs = {  # student, teacher, and the run that may be there from above
        "base <- its RL run": ("base", "teacher", "numbers sampled"),
        "chars base <- its RL run": ("chars_base", "chars_teacher", "chars sampled"),
        "RL run <- its base": ("teacher", "base", "reverse"),
        "base <- itself": ("base", "base", "itself"),
        "short-trained base <- RL run": ("weak", "teacher", "weak"),
        "stranger (arithmetic only) <- RL run": ("stranger", "teacher", "stranger"),
        "base <- RL run of another tokenizer": ("base", "chars_teacher", None),
    }
    jobs = {name: distil(config, run, found[a], found[b], "--loss sampled")
            for name, (a, b, run) in pairs.items() if run}
    failed = make(list(jobs.values()), config)
    lines = ["", "Does opd_check.py know beforehand? Success: half of the gap closed, of at least two points",
             "", "| student <- teacher | verdict | gain to expect | covered "
             "| KL | before | after | success | right |", "|---" * 9 + "|"]
    hits = 0
    for name, (a, b, _) in pairs.items():
        told = io.StringIO()
        words = (f"--student {found[a]} --teacher {found[b]} --n {config.check_n} "
                 "--threads 1 --workers 1 --device cpu")
        with contextlib.redirect_stdout(told):
            m = opd_check.main(words.split())
        Path("runs", config.name, f"check-{slug(name)}.txt").write_text(told.getvalue())
        expected = m["verdict"] in ("go", "shorten")
        if name in jobs and jobs[name][0].name not in failed:
            before, best = (accuracy(found[x], "test", config.final_n, cache)[0] for x in (a, b))
            after = ends(jobs[name][0]).after
            success = best - before >= 0.02 and after - before >= 0.5 * (best - before)
            shown = f"{before:.1%} | {after:.1%}"
        else:
            success, shown = False, "- | refused"
        hits += success == expected
        lines.append(f"| {name} | {m['verdict']} | {m.get('gain', math.nan):+.1%} "
                     f"| {m.get('covered', math.nan):.1%} | {m.get('kl', math.nan):.2f} | {shown} "
                     f"| {'yes' if success else 'no'} | {'yes' if success == expected else 'no'} |")
    lines += ["", f"{hits} of {len(pairs)} verdicts were right (go or "
              "shorten: it works; SFT first or do not: it does not)"]
    return lines, {"verdicts right": hits, "pairs": len(pairs)}


def scoring(config, found, cache):
    """The same numbers from both, then the time of each, alternating."""
    transformers = peer("transformers")
    torch.set_num_threads(1)
    folder = hf.find(found["teacher"])
    model, tok = GPT.from_hf(folder).requires_grad_(False), data.tokenizer(folder)
    lines, numbers = ["", "Scoring by the teacher, CPU seconds of one thread (median, range)", ""], {}
    for style, max_new, n in (("steps", 48, 64), ("search", 320, 32)):
        prompts = [prompt_ids(p, tok) for p in data.load(f"countdown:{style}").problems("valid", n, 0)]
        groups = Sampler(model, tok.stop, tok, max_len=512).generate(prompts, 4, max_new, seed=SEED)
        opd.set_advantages(opd.Config(), groups)
        flat = [s for g in groups for s in g]

        def ours(groups=groups):
            out = {}
            with torch.no_grad():
                for batch in pack.batches(groups, 4096, model.config):
                    logp_N, _ = linear_logprob(batch.hidden(model), model.head_weight, batch.targets_N)
                    lengths = torch.bincount(batch.sample_N, minlength=len(batch.samples)).tolist()
                    out |= {key(s): part for s, part in zip(batch.samples, logp_N.split(lengths))}
            return out

        if transformers is None:
            lines.append("transformers is not installed: ours alone")
            sides = {"ours": ours}
        else:
            theirs_model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32).eval()

            def theirs(flat, theirs_model=theirs_model, size=64):
                out = {}
                with torch.no_grad():
                    for a in range(0, len(flat), size):
                        rows = [s.prompt + s.tokens for s in flat[a:a + size]]
                        longest = max(map(len, rows))
                        ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
                        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
                        logp = theirs_model(input_ids=ids,
                                            attention_mask=mask).logits[:, :-1].float().log_softmax(-1)
                        logp = logp.gather(2, ids[:, 1:, None]).squeeze(2)
                        for s, row in zip(flat[a:a + size], logp):
                            out[key(s)] = row[len(s.prompt) - 1:len(s.prompt) - 1 + len(s.tokens)]
                return out

            by_length = sorted(flat, key=lambda s: len(s.prompt) + len(s.tokens))
            one, two = ours(), theirs(flat)
            worst = max(float((one[k] - two[k]).abs().max()) for k in one)
            if worst > 1e-3 or one.keys() != two.keys():
                die(f"the two sides disagree by {worst:.1e}: nothing to time")
            sides = {"transformers, as they come": lambda f=theirs, x=flat: f(x), "ours, packed": ours,
                     "transformers, by length": lambda f=theirs, x=by_length: f(x)}
        tokens = sum(len(s.prompt) + len(s.tokens) for s in flat)
        padded = sum(max(len(s.prompt) + len(s.tokens) for s in flat[a:a + 64]) * len(flat[a:a + 64])
                     for a in range(0, len(flat), 64))
        print(f"scoring {len(flat)} texts of countdown:{style}, {tokens:,} "
              f"tokens, {padded:,} with padding in batches of 64")
        seconds = alternate(sides, config.repeats)
        for name, values in seconds.items():
            show(name, values)
            lines.append(f"- {style}, {tokens:,} tokens ({padded:,} padded), {name}: "
                         f"{statistics.median(values):.3f} s ({min(values):.3f} .. {max(values):.3f})")
        for name in sorted(seconds.keys() - {"ours, packed", "ours"}):
            faster = numbers[f"{style}, against {name}"] = ratio(seconds[name], seconds["ours, packed"])
            lines.append(f"- {style}: {faster:.2f} times as fast as {name}; "
                         f"largest difference of a log-prob {worst:.1e}")
    return lines, numbers


def main(argv=None):
    config = flags(Config, argv, __doc__)
    parts = config.parts.split(",")
    for part in parts:
        if part not in PARTS:
            die(f"--parts: no part {part!r}; known: {', '.join(PARTS)}")
    positive(config, "seeds steps prompts n rl_steps eval_n final_n check_n parallel repeats")
    for flag in ("base", "teacher", "chars_base", "chars_teacher"):
        if getattr(config, flag):
            try:
                hf.find(getattr(config, flag))
            except FileNotFoundError as e:
                die(f"{as_flag(flag)}: {e}")
    Path("runs", config.name).mkdir(parents=True, exist_ok=True)
    cache, begin = Path("runs", config.name, "accuracies.json"), time.monotonic()
    found = models(config, parts)
    lines, numbers = [f"python -m bench opd {' '.join(argv or [])}".strip()], {}
    for part in parts:
        print(f"-- {part}")
        more, its = globals()[part](config, found, cache)
        print("\n".join(more), flush=True)
        lines, numbers = lines + more, numbers | {f"{part}: {k}": v for k, v in its.items()}
    Path("runs", config.name, "tables.md").write_text("\n".join(lines) + "\n")
    print(f"wrote runs/{config.name}/tables.md after {(time.monotonic() - begin) / 60:.1f} minutes")
    return finish("opd", **numbers)


if __name__ == "__main__":
    main()
