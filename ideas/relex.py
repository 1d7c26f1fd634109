"""
relex.py: watch the first part of an RL run, and jump to its end (RELEX, arXiv 2605.21468).

The weights of an RL run move along one direction, and at a nearly constant speed. So a line fitted
to the first checkpoints says where they will be much later. For each tensor by itself:

    M[t] = w_t - w_0          the moves so far, one row per checkpoint seen
    v    = top eigenvector    of the Gram matrix M M^T, carried to the weights: the one direction
    c_t  = M[t] . v           how far along it; a line a + b t is fitted by least squares
    w_T  = w_0 + (a + b T) v  the end of the run, which was never trained

The paper's code (github.com/weizhepei/RELEX) fits the whole history, with an intercept. Left out:
higher ranks and curved fits, which gained nothing there. The paper: 15% of an RLVR run extrapolated
matches or exceeds the whole run, with Qwen2.5-Math-1.5B, Qwen3-4B-Base and Qwen3-8B-Base on math.
Here: Countdown, at a CONSTANT and low learning rate after the warm-up, since under decay the path
could not be linear in the step, and at nanorl.py's rate it bends more. Controls: the whole move so
far, and the last difference, extended as far without a fit; a random direction of the same length,
per tensor; and the path of fine-tuning, which is no RL. "late" fits from after the warm-up.

    python -m ideas.relex                              all arms, one seed
    python -m bench ideas --names relex                the verdict over seeds
"""
from dataclasses import dataclass

import numpy as np
import torch

from common.evidence import Claim, Idea, begin, finish, needs, picture
from common.flags import die, flags, positive
from evaluate import evaluate, paired
from rollout import Sample, prompt_ids
from stages import Settings, advantage, close, collect, learn, next_problems, setup

CLAIM = Claim(paper="2605.21468", says="15% of an RL run, extrapolated on one line, gain without training",
              measured="accuracy of 15% of a run extrapolated to its end, against these 15%", smallest=3.0)
WARMUP = 5                               # steps
SHARES = (0.15, 0.3, 0.5, 0.75, 1.0)     # of the run: the first two are seen, all are asked


@dataclass
class Config(Idea):
    task: str = "countdown"              # with a known solution to each problem, to be imitated
    steps: int = 200                     # of the run whose end is predicted
    every: int = 2                       # steps between the checkpoints that are seen
    prompts: int = 64                    # problems per step
    n: int = 4                           # samples of each
    max_new: int = 48                    # tokens of a sample, at most
    lr: float = 2e-4                     # AdamW, constant; at 1e-3 (seed 100) the path bends more
    asked: int = 400                     # test problems, 4 samples each, per point of the picture


# -----------------------------------------------------------------------------
# the idea


def direction(moves_TD):
    """-> the direction of length 1 that explains most of these moves, and the share of their squares that
    it explains. A tensor that never moved has none."""
    values, vectors = torch.linalg.eigh(moves_TD @ moves_TD.t())
    v_D = moves_TD.t() @ vectors[:, -1]
    length = v_D.norm()
    if length == 0:
        return v_D, 0.0
    return v_D / length, float(values[-1] / values.clamp(min=0).sum())


def line(steps, c):
    """Least squares -> slope, intercept, R^2."""
    slope, intercept = np.polyfit(steps, c, 1)
    left = np.sum((c - slope * steps - intercept) ** 2)
    spread = np.sum((c - c.mean()) ** 2)
    return slope, intercept, 1 - left / spread if spread else 0.0


class Rank1:
    """The line that the weights move on. path: {step: {name: tensor}}, the start at step 0."""

    def __init__(self, path, first=1, last=10**9):
        self.start = path[0]
        steps = [step for step in path if first <= step <= last]
        self.fits = {}
        for name, w in self.start.items():
            moves_TD = torch.stack([(path[step][name] - w).double().flatten() for step in steps])
            v_D, explained = direction(moves_TD)
            self.fits[name] = v_D, explained, *line(np.array(steps, float), (moves_TD @ v_D).numpy())

    def move(self, name, step):
        """-> where the line says that a tensor has moved to at this step"""
        v_D, _, slope, intercept, _ = self.fits[name]
        return ((intercept + slope * step) * v_D).view(self.start[name].shape)

    def at(self, step):
        return {name: (w + self.move(name, step)).float() for name, w in self.start.items()}


def extended(path, first, last, step):
    """The control that needs no fit: the way between two checkpoints, as far again as `step` is."""
    far = (step - last) / (last - first)
    return {name: w + (w - path[first][name]) * far for name, w in path[last].items()}


def random_direction(fit, step, seed):
    """As far as the fit goes, tensor by tensor, but anywhere."""
    g = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(w.shape, generator=g, dtype=torch.float64) for name, w in fit.start.items()}
    return {name: (w + noise[name] / noise[name].norm() * fit.move(name, step).norm()).float()
            for name, w in fit.start.items()}


# -----------------------------------------------------------------------------
# the trial


def solutions(rl, problems):
    """-> a group for each problem: its known solution, to be imitated."""
    end = rl.tok.encode(rl.tok.end)
    groups = []
    for p in problems:
        tokens = rl.tok.encode(p.gold) + end
        groups.append([Sample(prompt_ids(p, rl.tok), tokens, [0.0] * len(tokens), "stop", p.id, 0, 0,
                              reward=1.0, advantage=1.0)])
    return groups


def run(kind, trial, config):
    """-> the run and its path, {step: weights}. kind: "rl", or "sft" on known solutions."""
    tis = 2.0 if kind == "rl" else 0.0                           # nobody sampled a known solution
    rl = setup(Settings(**trial.settings(warmup=WARMUP, decay=0.0, tis=tis)), reward=trial.reward)
    path = {0: weights(rl.model)}
    for step in range(1, config.steps + 1):
        problems = next_problems(rl, config.prompts)
        groups = list(collect(rl, problems, config.n)) if kind == "rl" else solutions(rl, problems)
        if kind == "rl":
            for group in groups:
                advantage(group, rl.config)
        learn(rl, groups)
        if step % config.every == 0:
            path[step] = weights(rl.model)
        trial.bar.update()
    return rl, path


def weights(model):
    return {name: w.clone() for name, w in model.state_dict().items()}


def ask(rl, state, config):
    """-> evaluate() of these weights, on test problems that no run has seen."""
    rl.model.load_state_dict(state)
    asked = rl.task.problems("test", config.asked, config.seed)
    return evaluate(rl.sampler, rl.tok, rl.task, rl.workers, asked, 4, config.max_new, scores=True)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps every prompts max_new asked")
    if config.steps % config.every or config.steps < 2 * config.every:
        die(f"--steps {config.steps}: give a multiple of --every {config.every}, twice it at least")
    needs(config.task, "solution", "the path of fine-tuning imitates one")
    trial = begin(config, __file__, CLAIM, ("rl", "sft"), config.steps)
    rl, path = run("rl", trial, config)
    sft, sft_path = run("sft", trial, config)
    close(sft)

    # ---- the lines through what was seen
    end = config.steps
    stops = [max(2, round(share * end / config.every)) * config.every for share in SHARES]
    early, third, *_ = stops
    fits = {"relex 15%": Rank1(path, last=early), "relex 30%": Rank1(path, last=third)}
    late = Rank1(path, min(WARMUP + 1, early - config.every), early)
    sft_fit = Rank1(sft_path, last=third)
    for arm, fit in {"rl": fits["relex 30%"], "sft": sft_fit}.items():
        for _, explained, _, _, straight in fit.fits.values():
            trial.dot("tensors", f"{arm}, 30%", explained, straight)

    # ---- the run, and where the lines lead
    states = {("rl", step): path[step] for step in [0, *stops]}
    states |= {(arm, step): fit.at(step) for arm, fit in fits.items() for step in stops}
    states |= {("late 15%", end): late.at(end), ("sft", end): sft_path[end],
               ("sft line", end): sft_fit.at(end),
               ("whole move", end): extended(path, 0, early, end),
               ("last difference", end): extended(path, early - config.every, early, end),
               ("random", end): random_direction(fits["relex 15%"], end, config.seed)}
    results = {}
    for (arm, step), state in states.items():
        results[arm, step] = ask(rl, state, config)
        trial.dot("", arm, step, results[arm, step]["avg"])
    close(rl)
    found = results["relex 15%", end]
    whole, noise = paired(found, results["rl", end], "avg")
    table = {f"{arm} at {step}": {"avg": result["avg"], "pass@4": result["pass@4"]}
             for (arm, step), result in results.items() if arm == "rl" or step == end}
    picture(trial, x="step", y="accuracy on test problems",
            tensors=("variance that one direction explains", "R^2 of the line along it", "o"))
    return finish(trial, paired(found, results["rl", early], "avg"), table,
                  note=f"(against the whole run {whole:+.1f} +-{noise:.1f})")


if __name__ == "__main__":
    main()
