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

Not found in the text that we could read: whether the paper clips before or after the power. Here
the power comes first, and the norm of what it makes is clipped at 1. The control is the other way,
p = 0.8.

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
POWERS = {"AdamW": 1.0, "p = 1.2": 1.2, "p = 0.8": 0.8}          # baseline; idea; control: the other way
# at seed 100. AdamW: of 3e-3, 1e-2, 3e-2, 600 steps; 1.2: of 1e-2, 3e-2; 0.8: of 3e-3, 1e-2, 200 steps
RATES = {"AdamW": 1e-2, "p = 1.2": 1e-2, "p = 0.8": 1e-2}


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
    optimizer = Optimizer(model, lr=RATES[arm])
    p = POWERS[arm]
    change = partial(power, p=p) if p != 1 else None             # p = 1 is train_gpt.py to the bit
    for step, loss in steps(model, document, optimizer, config.steps, gradient=change):
        trial.point(arm, step, loss)
    return evaluate(model, document)                             # on bytes that no arm has read


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, tuple(POWERS), config.steps)
    results = {arm: train(arm, trial, config) for arm in POWERS}
    gain = 100 * (results["AdamW"]["loss"] - results["p = 1.2"]["loss"])
    picture(trial, x="step", y="loss, nats per byte")
    return finish(trial, (gain, 0.0), results)                   # its error is the spread over seeds


if __name__ == "__main__":
    main()
