"""
muon.py: is there anything to see at all? Muon against AdamW, on the model that ideas about
pretraining share.

The verdicts of the other files about pretraining are worth something only where their set-up (0.16M
parameters, bytes of Python's own library, 16 x 128 of them per step) shows a large effect that is
known to be there. So this gain must be larger than the smallest gain of any other CLAIM in the same
unit: `python -m bench ideas --check`. Muon takes the momentum of a matrix and turns all its
singular values into 1. The control takes the same momentum, without turning, at the same size: what
it gains is not due to the turning. Learning rates were tried on another seed; RATES says which;
embeddings, head and norms are AdamW's in all.

    python -m ideas.muon
    python -m bench ideas --names muon
"""
from dataclasses import dataclass

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import evaluate, scratch, steps

CLAIM = Claim(paper="", says="Muon trains faster than AdamW", measured="final loss below AdamW's",
              smallest=5.0, unit="0.01 nats", harness=True)
ARMS = ("AdamW", "Muon", "no turning")
# of the blocks' matrices, at seed 100. Muon: the base's; no turning: of 1.4e-2, 4e-2, 200 steps
RATES = {"AdamW": None, "Muon": 1.4e-2, "no turning": 1.4e-2}
LR = 1e-2                                # of everything else; of all in the arm AdamW: of 3e-3, 1e-2, 3e-2


@dataclass
class Config(Idea):
    steps: int = 600                     # optimizer steps per arm, 2,048 bytes each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


class Scaled(Optimizer):
    """Momentum, scaled to the size that Muon's update of this matrix has."""

    def update_matrix(self, s, scale, factor):
        grad = s.grad * scale
        s.m.lerp_(grad, 1 - self.momentum)
        update = grad.lerp(s.m, self.momentum)
        rows, columns = s.param.shape
        # an orthogonal matrix has the norm sqrt(min(rows, columns))
        update *= min(rows, columns) ** 0.5 / (update.norm() + 1e-12)
        s.master.add_(update, alpha=-self.muon_lr * factor * 0.2 * max(rows, columns) ** 0.5)


def train(arm, trial, config):
    model, document = scratch("tiny", config.seed)               # the same weights and batches for every arm
    document.config.eval_docs = config.asked
    kind = Scaled if arm == "no turning" else Optimizer
    optimizer = kind(model, lr=LR, muon_lr=RATES[arm])
    for step, loss in steps(model, document, optimizer, config.steps):
        trial.point(arm, step, loss)
    return evaluate(model, document)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    gain = 100 * (results["AdamW"]["loss"] - results["Muon"]["loss"])
    control = 100 * (results["AdamW"]["loss"] - results["no turning"]["loss"])
    picture(trial, x="step", y="loss, nats per byte")
    return finish(trial, (gain, 0.0), results, note=f"(without turning {control:+.1f})")


if __name__ == "__main__":
    main()
