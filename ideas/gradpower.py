"""
gradpower.py: raise every gradient to a power before the optimizer sees it (GradPower, arXiv
2505.24275).

    g  <-  sign(g) |g|^p        p = 1.2 before AdamW; p = 1 changes nothing

Large entries count more, small and noisy ones less: one line, no state. Left out: the paper's other
optimizers. The paper: AdamPower ends with a lower loss than Adam at 66M to 2B parameters on C4 and
OpenWebText, most where the learning rate warms up, stays and decays. Here: 0.16M parameters on the
bytes of Python's own library, that schedule; all arms share initial weights, batches and steps;
learning rates were tried on another seed, RATES says which; losses are compared at the end of
training only.

Muon is shown beside them. Not found in the text that we could read: whether the paper clips before
or after the power. Here the power comes first, and the norm of what it makes is clipped at 1. The
control is the other way, p = 0.8. state_per_weight: how many numbers an optimizer keeps for each
weight of the matrices.

    python -m ideas.gradpower
    python -m bench ideas --names gradpower
"""
from dataclasses import dataclass
from functools import partial

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import evaluate, scratch, steps

CLAIM = Claim(paper="2505.24275", says="AdamPower ends below Adam, 66M to 2B parameters on C4",
              measured="final loss below AdamW's", smallest=1.0, unit="0.01 nats")
POWERS = {"AdamW": 1.0, "p = 1.2": 1.2, "p = 0.8": 0.8, "Muon": 1.0}     # the third: the control
# The best at seed 100, all steps, of 3e-3, 1e-2, 3e-2. AdamW: 1.627, 1.551, 1.578; p = 1.2: 1.643, 1.551,
# 1.558; p = 0.8: 1.607, 1.533, 1.583. Muon: the base's
RATES = {"AdamW": 1e-2, "p = 1.2": 1e-2, "p = 0.8": 1e-2, "Muon": 1e-2}
MUON_LR = 1.4e-2


@dataclass
class Config(Idea):
    steps: int = 600                     # optimizer steps per arm, 2,048 bytes each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


def power(model, p):
    """On the mean gradient, before clipping: elsewhere gradients are sums, and the power of a sum is
    another method."""
    for w in model.parameters():
        w.grad = w.grad.sign() * w.grad.abs() ** p


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    model, document = scratch("tiny", config.seed)               # the same weights and batches for every arm
    document.config.eval_docs = config.asked
    muon_lr = MUON_LR if arm == "Muon" else None
    optimizer = Optimizer(model, lr=RATES[arm], muon_lr=muon_lr)
    p = POWERS[arm]
    change = partial(power, p=p) if p != 1 else None             # p = 1 is train_gpt.py to the bit
    for step, loss in steps(model, document, optimizer, config.steps, gradient=change):
        trial.point(arm, step, loss)
    found = evaluate(model, document)                            # on bytes that no arm has read
    return dict(found, state_per_weight=1 if muon_lr else 2)     # a momentum, or two moments


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, tuple(POWERS), config.steps)
    results = {arm: train(arm, trial, config) for arm in POWERS}
    gain, muon = (100 * (results["AdamW"]["loss"] - results[arm]["loss"]) for arm in ("p = 1.2", "Muon"))
    picture(trial, x="step", y="loss, nats per byte")
    # the error of a gain is the spread over seeds
    return finish(trial, (gain, 0.0), results, note=f"(Muon {muon:+.1f})")


if __name__ == "__main__":
    main()
