"""
pma.py: average the checkpoints of a plateau instead of annealing (pre-trained model averaging,
arXiv 2505.12082).

    learning rate   ____________________         constant: one run, a checkpoint every `every` steps
                   /               \\    \\        annealed: the same run until `from`, then down to zero
                                 o o o o o       pma: the mean of the checkpoints from there on

At a constant rate weights jump around in a valley; their mean lies closer to its floor, and so does
a run whose rate goes down. All arms have read the same bytes at the end. The mean is the simple one
(SMA), which the paper recommends over its weighted ones. "As good as annealing" is a claim that
nothing is lost: the gain is what is left of an allowance of 0.02 nats above the annealed run; the
note has the last checkpoint above it, which is all that there was to lose. The control: a mean of
points that scatter is also shorter than each of them, so the last checkpoint is shrunk, matrix by
matrix, to the norms of the mean.

The paper: dense and mixture models of 411M to over 200B parameters; about ten checkpoints, merged
at a constant rate, are as good as annealing and predict it, with 15% less compute. Left out:
picking up a run that diverged. Here: 0.16M parameters, Muon, 900 steps of 2,048 bytes of Python's
own library.

    python -m ideas.pma
    python -m bench ideas --names pma
"""
from dataclasses import dataclass

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import evaluate, scratch, steps

CLAIM = Claim(paper="2505.12082", says="the mean of a plateau is as good as annealing, 411M to 200B",
              measured="what is left of an allowance of 0.02 nats above the annealed run", smallest=1.0,
              unit="0.01 nats")
ARMS = ("constant", "annealed", "pma", "shrunk")
ALLOWED = 2.0                            # 0.01 nats
LR, MUON_LR = 1e-2, 1.4e-2


@dataclass
class Config(Idea):
    steps: int = 900                     # of the plateau, 2,048 bytes each
    share: float = 0.4                   # of them at the end: annealed, or averaged
    every: int = 36                      # steps between checkpoints: ten of them
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


def mean_of(checkpoints):
    """-> the weights that lie in the middle of these; summed in float64."""
    return {name: torch.stack([c[name].double() for c in checkpoints]).mean(0).float()
            for name in checkpoints[0]}


def shrunk(last, mean):
    """-> the last checkpoint, each tensor at the norm that the mean has: the control"""
    return {name: w * (mean[name].norm() / w.norm().clamp(min=1e-12)) for name, w in last.items()}


# -----------------------------------------------------------------------------
# the trial


def begun(config):
    model, document = scratch("tiny", config.seed)
    document.config.eval_docs = config.asked
    return model, document, Optimizer(model, lr=LR, muon_lr=MUON_LR)


def copied(weights):
    return {name: w.clone() for name, w in weights.items()}


def plateau(trial, config, fork):
    """-> the checkpoints after `fork`, and all that an annealed run needs to begin there."""
    model, document, optimizer = begun(config)
    warmup = max(1, config.steps // 50)
    checkpoints = []
    start = None

    def rate(step):
        return min(1.0, (step + 1) / warmup)

    for step, loss in steps(model, document, optimizer, config.steps, schedule=rate):
        trial.point("constant", step, loss)
        if step == fork:
            state = optimizer.state_dict()
            state["pieces"] = {name: {k: v.clone() if torch.is_tensor(v) else v for k, v in piece.items()}
                               for name, piece in state["pieces"].items()}
            start = copied(model.state_dict()), state
        if step > fork and (config.steps - step) % config.every == 0:
            checkpoints.append(copied(model.state_dict()))
            # what the mean would be worth if training ended here
            if len(checkpoints) in (1, 4, 7):
                trial.dot("held out", "pma", step, loss_of(mean_of(checkpoints), config))
                trial.dot("held out", "constant", step, loss_of(checkpoints[-1], config))
    return checkpoints, start


def anneal(trial, config, fork, start):
    """-> the weights of the same run, from `fork` on with a rate that goes to zero."""
    weights, state = start
    model, document, optimizer = begun(config)
    model.load_state_dict(weights)
    optimizer.load_state_dict([state])

    def rate(step):
        return (config.steps - step) / (config.steps - fork)

    for step, loss in steps(model, document, optimizer, config.steps, begin=fork, schedule=rate):
        trial.point("annealed", step, loss)
    return model.state_dict()


def loss_of(weights, config):
    model, document, _ = begun(config)
    model.load_state_dict(weights)
    return evaluate(model, document)["loss"]


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked every")
    from_scratch(config)
    fork = config.steps - max(1, int(config.share * config.steps))
    trial = begin(config, __file__, CLAIM, ARMS[:1], 2 * config.steps - fork)
    checkpoints, start = plateau(trial, config, fork)
    last = checkpoints[-1]
    mean = mean_of(checkpoints)
    ends = {"constant": last, "annealed": anneal(trial, config, fork, start), "pma": mean,
            "shrunk": shrunk(last, mean)}
    table = {arm: {"loss": loss_of(weights, config)} for arm, weights in ends.items()}
    for arm in ("constant", "annealed", "pma"):
        trial.dot("held out", arm, config.steps, table[arm]["loss"])
    above = {arm: 100 * (table[arm]["loss"] - table["annealed"]["loss"]) for arm in ends}
    picture(trial, x="step", y="loss, nats per byte", **{"held out": ("step", "loss, nats per byte")})
    note = f"(above annealing: the last checkpoint {above['constant']:+.1f}, shrunk {above['shrunk']:+.1f})"
    return finish(trial, (ALLOWED - above["pma"], 0.0), table, note=note)


if __name__ == "__main__":
    main()
