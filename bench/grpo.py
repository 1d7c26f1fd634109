"""
python -m bench grpo: reinforcement learning here against TRL's GRPOTrainer, same weights, same prompts.

(1) one step: rollout, rewards, advantages, update, optimizer. Twice: with lengths as RL meets
them (most responses end early, a few ramble on to the cap), and with all lengths equal, where
only the work itself counts. Both sides train on every response.
(2) from one base checkpoint to one held-out accuracy on Countdown: TRL; ours with TRL's settings;
ours as nanorl.py does it by default. One evaluator, ours, looks at all of them, off the clock,
always with the same problems and the same noise.

What each side is given. TRL: its generate() backend (vLLM wants a GPU), a step in one batch (four
micro-batches made a tenth of a difference at most), no gradient checkpointing, no logs, no files.
Ours: as many slots as TRL's batch has rows, in (1) and where it runs TRL's settings. The clock is
CPU time on one thread, the time of our reward workers included, neither side's start-up. With a
GPU it is the wall clock, the model of (1) has Qwen3-0.6B's shape (but the small vocabulary) in
bf16 on both sides, and (2) is left out unless asked for.

TRL's settings in (2) are its defaults (dapo loss, groups of 8, no KL) but for what is meant for
models a thousand times larger. Learning rate and prompts per step are the best of seven tried
with TRL itself, one run each: 32 prompts at 1e-3, 2e-3, 3e-3; 16 at 1e-3, 2e-3; 8 at 1e-4, 3e-4.
The rate stays constant after 5 steps of warm-up, as ours does.

    python -m bench grpo --base runs/base
    python -m bench grpo --parts 1 --repeats 7
    python -m bench grpo --parts 2 --seeds 3 --target 0.5 --minutes 10
"""
import contextlib
import inspect
import math
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import nanorl
from algos import make_loss
from bench import finish, peer, ratio, show
from common import hf
from common.flags import die, flags, positive
from common.metrics import CLOCKS
from common.reward import Rewards
from evaluate import evaluate
from kernels import packed_attention
from rollout import Sampler
from train_gpt import GPT, GPTConfig


@dataclass
class Config:
    base: str = "runs/base"          # (2) starts from this run or Hugging Face folder
    parts: str = ""                  # which parts; empty: 12, on a GPU 1
    device: str = "auto"             # cpu, cuda, auto
    cases: str = "skewed,equal"      # (1) which laws of lengths
    repeats: int = 3                 # (1) timed steps of each side, after one that is not
    prompts: int = 8                 # (1) prompts per step
    n: int = 8                       # (1) samples per prompt
    cap: int = 512                   # (1) tokens of a response at most, skewed
    equal: int = 48                  # (1) tokens of every response, equal
    target: float = 0.0              # (2) held-out accuracy to reach; 0: the base's and 10 points
    seeds: int = 3                   # (2) runs of each side; the ratio is of their sums
    their_lr: float = 1e-3           # (2) learning rate of TRL's settings
    their_prompts: int = 32          # (2) prompts per step of TRL's settings
    their_n: int = 8                 # (2) samples per prompt of TRL's settings
    every: float = 2.0               # (2) seconds between two looks at the accuracy
    minutes: float = 1.5             # (2) minutes after which a run has not reached it
    eval_n: int = 200                # (2) held-out problems of a look, 4 samples of each
    seed: int = 0                    # weights, problems, samples


# -----------------------------------------------------------------------------
# the two sides


def clock(device, workers=()):
    """Seconds: by the wall on a GPU, all its work done; else of the CPU, of this process and of
    the reward workers. Linux has every process's clock under a number made of its pid; elsewhere
    the workers are left out (they were 1% of a step where they were measured)."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    total = time.process_time()
    for worker in workers:
        with contextlib.suppress(OSError):                       # a worker that has just ended
            total += time.clock_gettime((~worker.proc.pid << 3) | 2)
    return total


def our_side(folder, seed, device, words="", **settings):
    """-> rl, and go(problems) -> (groups, seconds): one step of nanorl, under these flags and settings."""
    config = flags(nanorl.Config, words.split())
    vars(config).update(settings, init=str(folder), seed=seed, device=device, threads=int(device == "cpu"))
    rl = nanorl.setup(config, reward=config.reward, task=config.data)
    loss = make_loss(rl.config)
    torch.use_deterministic_algorithms(False)  # setup turns it on; the peer is not to pay for it

    def go(problems):
        torch.use_deterministic_algorithms(rl.env.deterministic)
        start = clock(device, rl.workers.workers)
        groups = list(nanorl.collect(rl, problems, rl.config.n))
        for group in groups:
            nanorl.advantage(group, rl.config)
        nanorl.update(rl, groups, loss)
        nanorl.step(rl)
        took = clock(device, rl.workers.workers) - start
        torch.use_deterministic_algorithms(False)
        return groups, took
    return rl, go


def problems_of(rl, steps, prompts):
    """The problems of that many steps, as nanorl would take them."""
    return [problem for _ in range(steps) for problem in nanorl.next_problems(rl, prompts)]


def their_settings(config):
    """What nanorl is told in order to do what TRL does."""
    return dict(algo="dapo", clip_high=0.2, dynamic=False, prompts=config.their_prompts,
                n=config.their_n, lr=config.their_lr, slots=config.their_prompts * config.their_n)


def their_side(trl, folder, problems, score, after, prompts, n, max_new, lr, seed, device):
    """Runs a GRPOTrainer over problems, in order. after(model, lengths of the responses, seconds)
    -> continue? follows each step."""
    import datasets
    import transformers
    lengths, mark = [], 0.0

    def reward(completions, completion_ids, index, **_):
        lengths.extend(map(len, completion_ids))
        return [score(problems[i], text) for i, text in zip(index, completions)]

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            nonlocal mark
            took = clock(device) - mark  # since the end of the last step: nothing of it is left out
            control.should_training_stop = not after(model, list(lengths), took)
            lengths.clear()
            mark = clock(device)

    tok = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    tok.pad_token = "<|system|>"                                 # any token but the stop
    args = trl.grpo_config.GRPOConfig(
        f"{folder}/trl", per_device_train_batch_size=prompts * n,
        num_generations=n, max_completion_length=max_new, temperature=1.0,
        learning_rate=lr, lr_scheduler_type="constant_with_warmup", warmup_steps=5,
        max_steps=len(problems) // prompts, beta=0.0, bf16=device == "cuda", use_cpu=device == "cpu",
        gradient_checkpointing=False, shuffle_dataset=False, report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=seed)
    rows = datasets.Dataset.from_list([dict(prompt=p.prompt, index=i) for i, p in enumerate(problems)])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    trainer = trl.grpo_trainer.GRPOTrainer(model, reward, args, rows, processing_class=tok,
                                           callbacks=[Watch()])
    trainer.remove_callback(transformers.PrinterCallback)
    mark = clock(device)
    trainer.train()


# -----------------------------------------------------------------------------
# (1) one step


SHAPES = {                           # layers, heads, key heads, their size, d_model, d_ff
    "cpu": (5, 4, 2, 32, 128, 384),
    "cuda": (28, 16, 8, 128, 1024, 3072),
}


def rambling(tok, seed, shape=SHAPES["cpu"], often=0.03, hazard=1 / 26):
    """A random model whose responses have a known law of lengths: each token is the last with
    probability `hazard`; `often` as likely as that, the response wanders off into a set of tokens
    that has no way out, and runs to its cap. hazard 0: all run to it.

    Two coordinates of the residual stream are kept free of all else and say which of the two states
    the last token is in; the head reads them. The rest is noise and costs what it costs in any model."""
    model = GPT(GPTConfig(tok.vocab_size, *shape, 4096, 10000.0)).init_weights(seed)
    c, g, (stop,) = model.config, torch.Generator().manual_seed(seed), tok.stop
    lost, strength = slice(c.vocab_size - 90, c.vocab_size), 50 * (c.d_model / 128) ** 0.5
    wander = often * hazard
    # what the softmax sums to, where all others have logit 0
    others = (c.vocab_size - 91) / (1 - hazard - wander)
    unit = c.d_model**0.5  # what the final norm makes of a coordinate that outweighs the rest
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("out.weight", "down.weight")):
                p.copy_(torch.randn(p.shape, generator=g) * 0.1 * p.shape[1] ** -0.5)
                p[:2] = 0
        for p in (model.embed.weight, model.head_weight):
            p[:, :2] = 0
        model.head_weight.mul_(0.1)
        model.embed.weight[:, 0] = strength
        model.embed.weight[lost, 0], model.embed.weight[lost, 1] = 0, strength
        model.head_weight[:, 1] = -30 / unit                         # lost: only the lost
        model.head_weight[lost, 1] = 0
        model.head_weight[lost, 0] = math.log(wander * others / 90) / unit if wander else -30 / unit
        model.head_weight[stop, 0] = math.log(hazard * others) / unit if hazard else -30 / unit
    return model


def score(problem, text):
    """Noise: every response has an advantage, so both sides train on all of them."""
    import zlib
    return zlib.crc32(text.encode()) % 1000 / 1000


def same_inputs(folder, model, tok, problems):
    """Both sides see the same tokens and make the same logits of them, or there is nothing to compare."""
    import transformers
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for p in problems:
        assert theirs(p.prompt).input_ids == tok.encode(p.prompt), (
            f"the two tokenizers disagree about {p.prompt!r}")
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tok.encode(problems[0].prompt)
    T = len(prompt)
    with torch.no_grad():
        a = hf_model(torch.tensor([prompt])).logits[0]
        b = model(torch.tensor(prompt), torch.arange(T), packed_attention([0, T], T)) @ model.head_weight.t()
    apart = float((a - b).abs().max())
    assert apart < 1e-3, f"the two sides' logits differ by {apart}"


def alternating(config, trl, folder, hazard, cap):
    """A step of TRL, a step of ours on the same prompts, and so on. -> seconds and lengths of
    each side, ours by stage."""
    tok = data.tokenizer("numbers")
    model = rambling(tok, config.seed, SHAPES[config.device], hazard=hazard)
    model.save_hf(folder, tok)
    Path(folder, "score.py").write_text(inspect.getsource(score))
    rl, go = our_side(folder, config.seed, config.device, task="countdown",
                      reward=f"{folder}/score.py:score", algo="dapo", clip_high=0.2,
                      dynamic=False, prompts=config.prompts, n=config.n, max_new=cap,
                      lr=1e-6, slots=config.prompts * config.n, problems=1024, eval_n=1, final_n=1)
    problems = problems_of(rl, config.repeats + 1, config.prompts)
    seconds, lengths, stages = {"ours": [], "TRL": []}, {"ours": [], "TRL": []}, dict.fromkeys(CLOCKS, 0.0)

    def after(theirs, their_lengths, their_seconds):
        at = len(seconds["ours"]) * config.prompts
        rl.clock.update(dict.fromkeys(CLOCKS, 0.0))
        groups, took = go(problems[at:at + config.prompts])
        for k, v in rl.clock.items():
            stages[k] += v
        seconds["ours"].append(took)
        lengths["ours"] += [len(s.tokens) for group in groups for s in group]
        seconds["TRL"].append(their_seconds)
        lengths["TRL"] += their_lengths
        return True

    if trl:
        same_inputs(folder, model, tok, problems)
        their_side(trl, folder, problems, score, after, config.prompts,
                   config.n, cap, 1e-6, config.seed, config.device)
    else:
        for _ in range(config.repeats + 1):
            after(None, [], 0.0)
    rl.workers.close()
    return {side: s[1:] for side, s in seconds.items()}, lengths, stages


def one_step(config, trl):
    result = {}
    for name, hazard, cap, bar in (("skewed", 1 / 26, config.cap, 4), ("equal", 0.0, config.equal, 1.5)):
        if name not in config.cases.split(","):
            continue
        with tempfile.TemporaryDirectory() as folder:
            seconds, lengths, stages = alternating(config, trl, folder, hazard, cap)
        sides = ("ours", "TRL") if trl else ("ours",)
        mean = {side: statistics.fmean(lengths[side]) for side in sides}
        print(f"(1) {name}: {config.prompts} prompts x {config.n}, cap {cap}, mean length "
              + ", ".join(f"{side} {m:.1f} (longest {max(lengths[side])})" for side, m in mean.items()))
        for side in sides:
            show(f"a step of {side}", seconds[side])
        total = sum(stages.values())
        print("  ours: " + ", ".join(f"{k} {v / total:.0%}" for k, v in stages.items()))
        result[f"{name}_seconds"] = statistics.median(seconds["ours"])
        if trl:
            noise = sum(statistics.variance(lengths[side]) / len(lengths[side]) for side in sides) ** 0.5
            assert abs(mean["ours"] - mean["TRL"]) <= 4 * noise, (
                "the two sides do not sample the same lengths")
            result[f"{name}_times_faster"] = ratio(seconds["TRL"], seconds["ours"])
            print(f"  {result[f'{name}_times_faster']:.2f}x TRL (bar: {bar}x)", flush=True)
    return result


# -----------------------------------------------------------------------------
# (2) to one accuracy


def examiner(config, folder):
    """-> look(model) -> the held-out accuracy of its weights, which are copied into a model of
    the examiner's own."""
    model, tok, task = GPT.from_hf(folder), data.tokenizer(folder), data.load("countdown")
    problems, rewards = task.problems("test", config.eval_n, config.seed), Rewards("countdown", workers=1)
    sampler = Sampler(model, tok.stop, tok, slots=256, max_len=128)

    def look(other):
        with tempfile.TemporaryDirectory() as copy:
            if isinstance(other, GPT):
                other.save_hf(copy)
            else:
                other.save_pretrained(copy)
            hf.load(copy, hf.read_config(copy), dict(model.named_parameters()))
        return evaluate(sampler, tok, task, rewards, problems, 4, 48)["avg"]
    return look


class Race:
    """Seconds, looks, and when the target was reached: when the mean of two looks in a row was at or
    above it, since one look is +-2 points. Means stand at the middle of their two looks, and between
    two means the accuracy is a line."""

    def __init__(self, config, look, target, start):
        self.config, self.look, self.target = config, look, target
        self.seconds, self.steps, self.reached = 0.0, 0, None
        self.curve = [(0.0, start)]
        self.means = [(0.0, start)]

    def add(self, seconds, model):
        """After a step. -> continue?"""
        self.seconds += seconds
        self.steps += 1
        over = self.seconds > 60 * self.config.minutes
        if over or self.seconds >= self.curve[-1][0] + self.config.every:
            self.curve.append((self.seconds, self.look(model)))
            (t0, a0), (t1, a1) = self.curve[-2:]
            self.means.append(((t0 + t1) / 2, (a0 + a1) / 2))
            (t0, a0), (t1, a1) = self.means[-2:]
            if a1 >= self.target:
                self.reached = t0 + (t1 - t0) * (self.target - a0) / (a1 - a0) if a1 > a0 else t1
        return not over and self.reached is None


def race(config, trl, side, folder, seed, look, target, start):
    """One side from the base to the target. -> Race"""
    run = Race(config, look, target, start)
    defaults = side == "ours, our defaults"
    settings = {} if defaults else their_settings(config)
    words = nanorl.RECIPES[config.device]["flags"] if defaults else ""  # as `python nanorl.py` without flags
    rl, go = our_side(folder, seed, config.device, words,
                      **settings | dict(task="countdown", eval_n=1, final_n=1))
    if side == "TRL":                          # the problems that ours would see, in the same order
        rl.workers.close()
        problems = problems_of(rl, 1000, config.their_prompts)
        their_side(trl, folder, problems, rl.task.reward,
                   lambda model, lengths, seconds: run.add(seconds, model), config.their_prompts,
                   config.their_n, rl.config.max_new, config.their_lr, seed, config.device)
        return run
    if not defaults:
        rl.optimizer.betas = (0.9, 0.999)                        # TRL's
    going = True
    while going:
        _, took = go(nanorl.next_problems(rl, rl.config.prompts))
        going = run.add(took, rl.model)
    rl.workers.close()
    return run


def to_accuracy(config, trl):
    try:
        source = hf.find(config.base)
        tok, model = data.tokenizer(source), GPT.from_hf(source)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    total, missed, result = {}, set(), {}
    with tempfile.TemporaryDirectory() as folder:
        model.save_hf(folder, tok)                               # with the tokenizer.json that TRL wants
        look = examiner(config, folder)
        start = look(model)
        target = config.target or start + 0.1
        print(f"(2) {source}: {start:.1%} of {config.eval_n} held-out problems x 4, to {target:.1%}",
              flush=True)
        for seed in range(config.seed, config.seed + config.seeds):
            for side in ("ours, our defaults", "ours, TRL's settings") + (("TRL",) if trl else ()):
                run = race(config, trl, side, folder, seed, look, target, start)
                if run.reached is None:
                    missed.add(side)
                total[side] = total.get(side, 0.0) + (run.reached or run.seconds)
                said = f"{run.reached:6.1f} s" if run.reached else f"not in {run.seconds:.0f} s"
                print(f"  {side:<22} {said}, {run.steps} steps of {run.seconds / run.steps:.2f} s:  "
                      + " ".join(f"{a:.1%}" for _, a in run.curve[1:]), flush=True)
    for side, seconds in total.items():
        key = {"ours, our defaults": "default_recipe", "ours, TRL's settings": "same_settings",
               "TRL": "their"}[side]
        result[f"{key}_seconds"], result[f"{key}_reached"] = seconds / config.seeds, side not in missed
        if trl and side != "TRL":
            result[f"{key}_times_faster"] = total["TRL"] / seconds
            bound = "at least " if "TRL" in missed else "at most " if side in missed else ""
            print(f"  {side}: {bound}{total['TRL'] / seconds:.2f}x faster "
                  f"than TRL (bar: {5 if key == 'default_recipe' else 1.5}x)")
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "repeats prompts cap equal seeds their_prompts eval_n")
    if config.device == "auto":
        config.device = "cuda" if torch.cuda.is_available() else "cpu"
    if config.device not in SHAPES or (config.device == "cuda" and not torch.cuda.is_available()):
        die(f"--device {config.device}: " + ("no GPU is here" if config.device == "cuda"
                                             else f"one of auto, {', '.join(SHAPES)}"))
    config.parts = config.parts or ("12" if config.device == "cpu" else "1")
    if config.device == "cpu":
        torch.set_num_threads(1)
    trl = peer("trl.trainer.grpo_trainer") and peer("trl.trainer")
    if trl:
        transformers = peer("transformers")
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        # between trl and transformers, none of a reader's business
        warnings.filterwarnings("ignore", category=FutureWarning)
    else:
        print("trl is not installed (pip install trl): ours alone")
    result = one_step(config, trl) if "1" in config.parts else {}
    if "2" in config.parts:
        result |= to_accuracy(config, trl)
    return finish("grpo", **result)


if __name__ == "__main__":
    main()
