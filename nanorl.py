"""
nanorl.py: the RL loop. problems -> rollouts -> rewards -> advantages -> packed updates -> next.

GRPO and its family in the open. The loop is `main` below, top to bottom; each stage that it names
is a function in stages.py. What the algorithms are: algos.py. Which prompts a step samples, where
the longest response would hold up all ranks: tail.py.

Left out of the usual recipe, and why:
- no second engine and no weight sync: the sampler reads the very tensors that the optimizer writes;
- no second forward for old log-probs: with one update per rollout the ratio is 1, so
  old = logp.detach(); with several (--epochs, --minibatch) they are computed once, before the
  first. The sampler's own log-probs enter the importance weight (--tis), never the ratio;
- no padding and no per-rank mean: rows are packed, every micro-batch back-propagates a SUM, and the
  one normaliser, global over ranks and micro-batches, divides once at the step; how the work is cut
  up never changes the result;
- no critic and, unless --kl-coef asks for one, no reference model.

    python nanorl.py                             a laptop: finds or trains the base, then learns
                                                 Countdown in minutes
    torchrun --nproc_per_node=8 nanorl.py        a node: a base of 100M, Countdown with 4 numbers
    python nanorl.py --algo gspo --minibatch 16  a row of the table, four updates per rollout
    python nanorl.py --init DIR --task gsm8k --max-new 1024
    torchrun --nproc_per_node=8 -- nanorl.py --tail-batching prompt
    python nanorl.py --data my.jsonl --reward my.py:score --init DIR
"""

import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

import algos
import kernels
import stages
import tail
from algos import Algo
from common import memory
from common.axes import check_updates, filled_in, several_updates, with_algorithm
from common.flags import die, flags, positive, without_effect
from common.metrics import sample_rows, status, summary, warnings
from common.moved import moved
from common.offload import load_state
from common.run import progress
from stages import (Common, advantage, check_flags, close, collect, due, evaluation, finish,
                    learn, next_problems, open_run, over, save, setup, share_visits, step,
                    stop_here, update)
from tail import Rounds, sample_step

# what a fork imports from here; some of it `main` itself does not need
__all__ = ["Config", "advantage", "close", "collect", "learn", "main", "next_problems",
           "open_run", "setup", "share_visits", "step", "update"]


@dataclass
class Config(Algo, Common):
    """this script"""
    data: str = ""          # your own prompts instead of --task: a .jsonl file of {prompt, gold?}
    reward: str = ""          # your own reward: my.py:score, a function (problem, text) -> float
    steps: int = 500                     # rollouts
    n: int = 16                          # samples per prompt
    epochs: int = 1                      # times each rollout is learned from
    minibatch: int = 0                   # prompts of one update; 0: all of the step
    dynamic: bool | None = None          # drop groups of equal rewards, sample others instead
    reset_every: int | None = None       # steps between resets of reference and optimizer; 0: never
    reset_patience: int = 0  # evaluations without a new best before such a reset; 0: never
    problems: int = 8192  # training problems, at most; a long run meets them again, with new noise

    # ---- tail batching and streaming, see tail.py
    tail_batching: Literal["off", "race", "prompt", "continue"] = "off"  # who races whom
    more_prompts: float = 1.25           # prompts launched per prompt wanted
    more_samples: float = 1.25           # the same for samples; mode race only
    stream: bool = False                 # a rank with nothing left to sample learns from its groups

    # ---- evaluation
    eval_every: int = 50                 # steps between evaluations; 0: only before and after
    eval_n: int = 200                    # validation problems per evaluation
    eval_k: int = 4                      # samples of each
    final_n: int = 1000          # test problems of the evaluations before and after

    # ---- does it fit a card
    dry_run: bool = False                # print what the run needs in memory, and stop
    card: float = 0.0                    # GB of the GPU that --dry-run is for; 0: the one that is here
    host: float = 0.0                    # GB of its host's memory; 0: this one's, or not asked


# flags that a run without --init, --task and --data begins with, by the device that is found: the
# plain command runs these, not the values above. What a user gives wins over them
RECIPES = {
    "cpu": dict(
        flags="--prompts 64 --n 4 --slots 256 --steps 540 --eval-every 90",
        about="two CPU cores: the base, then 540 steps, a few minutes together; test accuracy "
              "from 32-39% to 59-66%",
    ),
    "cuda": dict(
        flags="--init runs/mixed100m --task countdown:4 --prompts 128 --max-new 96 "
              "--row-tokens 16384 --lr 2e-4 --steps 300 --eval-every 50",
        about="eight GPUs: a base of 100M in about 10 minutes, then 300 steps in about 15 "
              "(an estimate, not measured yet)",
    ),
}


def recipe_of(config):
    """-> which row of RECIPES a run begins from; "" if it is given a model or a task.
    config: from the command line alone."""
    if config.init != Config.init or config.task != Config.task or config.data:
        return ""
    return "cuda" if config.device in ("auto", "cuda") and torch.cuda.is_available() else "cpu"


def recipe_flags(config):
    return RECIPES[recipe_of(config)]["flags"] if recipe_of(config) else ""


def configure(argv):
    """-> (config, what its recipe is for). What does not go together is refused, with the reason,
    and so is a flag without effect."""
    c = flags(Config, argv, __doc__, defaults=recipe_flags,
              recipe=lambda config: f"on {recipe_of(config)}", filled=filled_in)
    positive(c, "steps prompts n max_new problems row_tokens eval_n eval_k final_n save_every "
                "workers epochs")

    # the recipe of the bare command line: c.init is filled in by now
    recipe = recipe_of(flags(Config, argv))
    c = with_algorithm(c)

    if c.data and not c.reward:
        die("--data needs --reward my.py:score: what is a good answer to your prompts?")
    for wrong, why in [
        (c.n < 2,
         "--n is 1: a group of one has no baseline, so no advantage; give at least 2"),
        (c.minibatch > c.prompts,
         f"--minibatch {c.minibatch} is above --prompts {c.prompts}, and an update holds no more "
         "than a rollout"),
        ((c.reset_every or c.reset_patience) and not c.kl_coef,
         "--reset-every and --reset-patience need a reference: give --kl-coef"),
        (c.reset_patience and not c.eval_every,
         "--reset-patience counts evaluations, and --eval-every 0 makes none"),
        (min(c.more_prompts, c.more_samples) < 1,
         "--more-prompts and --more-samples: launch at least what is wanted, 1"),
        (c.tail_batching == "continue" and not c.tis,
         "--tail-batching continue with --tis 0: resumed tokens come from an older policy, and "
         "nothing would correct them"),
        (c.stream and (several_updates(c) or c.cov or c.entropy_target),
         "--stream learns before the rollout is whole: not with --cov or --entropy-target, which "
         "choose from all of it, nor with --minibatch or --epochs, whose first update would change "
         "what is still sampled"),
    ]:
        if wrong:
            die(why)

    without_effect(c, [
        ("task", not c.data, "--data brings the problems, and --reward the reward"),
        ("card host", c.dry_run, "it is for --dry-run"),
        ("more_prompts more_samples", c.tail_batching != "off", "it is for --tail-batching"),
        ("more_samples", c.tail_batching == "race",
         f"--tail-batching {c.tail_batching} launches no more samples than --n; race does"),
    ])
    check_updates(c)
    check_flags(c)
    return c, RECIPES[recipe]["about"] if recipe else ""


def reset(rl):
    """ProRL: the policy becomes its own reference, so the KL is 0 again, and the optimizer forgets
    its moments."""
    load_state(rl.reference, rl.model.state_dict(), rl.env)
    rl.optimizer.reset()


def reset_if_due(rl, run, numbers):
    """Every --reset-every steps, or when --reset-patience evaluations brought no new best."""
    c = rl.config
    if numbers.get("eval/avg", -math.inf) > rl.best:
        rl.best = numbers["eval/avg"]
        rl.stalled = 0
    elif "eval/avg" in numbers:
        rl.stalled += 1
    patience = c.reset_patience and rl.stalled >= c.reset_patience
    if due(rl.step, c.reset_every) or patience:
        reset(rl)
        rl.best = -math.inf
        rl.stalled = 0
        run.log("  the policy is its own reference from here on, and the optimizer starts afresh")


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config and init
    config, about = configure(argv)
    rl = setup(config, reward=config.reward, task=config.data)
    config = rl.config                                           # with the day that a chat may ask for
    if config.tail_batching != "off":
        rl.rounds = Rounds(config.tail_batching, config.prompts, config.n,
                           config.more_prompts, config.more_samples)
    if config.dry_run:
        if rl.env.master:
            print(memory.table(rl))
        return
    files = [__file__, algos.__file__, stages.__file__, tail.__file__]
    run = open_run(rl, sources=files)
    size = sum(p.numel() for p in rl.model.parameters()) / 1e6
    run.log(f"{config.algo} on {config.data or config.task} from {config.init}: "
            f"{size:.2f}M parameters, {config.prompts} x {config.n} samples per step, "
            f"{rl.env.world} x {rl.env.device}, {kernels.backend(rl.env.device)}")
    if about:
        run.log(f"on {about}")

    # ---- before
    if rl.step == 0:
        before = evaluation(rl, run, "test", "before")
        before |= evaluation(rl, run, "eval", "  validation")
        rl.best = before["eval/avg"]
        run.metrics(0, **before)

    # ---- the loop
    bar = progress(config.steps, "rl", rl.step)
    while not over(rl):             # --steps, or --tokens or --minutes if they are used up first
        rl.step += 1
        start = time.perf_counter()

        # rollout: n samples per prompt; a group arrives when all its rewards are in. sample_step
        # is collect(rl, next_problems(rl, config.prompts), config.n), and what tail.py has if asked
        groups = []
        for group in sample_step(rl):
            advantage(group, config)                             # reward minus the group's baseline
            groups.append(group)

        # update: pack into rows, share out over ranks, back-propagate sums; one division, clip, step
        stats = learn(rl, groups)

        # log: the reward comes first. summary also counts the tokens and seconds that over() looks
        # at, and adds a line to rl.history
        numbers = summary(rl, groups, stats, start)
        run.log(status(rl.step, config, numbers))
        for warning in warnings(rl.history, config):
            run.log(f"  warning: {warning}")
        memory.compare(rl, run)          # on a GPU, once: the peak against what --dry-run says
        run.pace(rl.step, rl.steps, numbers)                     # on a CPU: how long will it take?
        bar.update()

        # evaluate
        last = over(rl)
        if last:
            numbers |= evaluation(rl, run, "test", "after")
        elif due(rl.step, config.eval_every):
            numbers |= evaluation(rl, run, "eval", "  validation")
        reset_if_due(rl, run, numbers)
        run.metrics(rl.step, **numbers)
        run.samples(sample_rows(rl, groups))

        # save: a signal to any rank ends all of them after this step
        stopping = run.stopping()
        if last or stopping or due(rl.step, config.save_every):
            save(rl, run)
        if stopping and not last:
            stop_here(rl, run)
    bar.close()
    finish(rl, run)                                          # pictures, and where the model lies


__getattr__ = moved(__name__)            # names that a fork may know from here


if __name__ == "__main__":
    main()
