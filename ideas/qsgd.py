"""
qsgd.py: gradients of a few bits for the network, right on average (QSGD, arXiv 1610.02132).

Each worker sends its gradient in buckets of n numbers: one scale, and for each number a sign and
one of the levels 0/s, 1/s, ..., s/s of the scale. Which of the two levels around |v| / scale
is drawn, so that the mean is v itself:

    Q(v) = scale sign(v) l / s     l = floor(s |v| / scale + u),  u uniform in [0, 1)
    with the 2-norm for scale the variance is at most min(n / s^2, sqrt(n) / s) |v|^2

As in the paper's experiments the scale is the largest |v| of the bucket, 4 bits (s = 7) come in
buckets of 512 and 2 bits (s = 1) of 128, whose scales add 1/16 and 1/4 bit to each number, and the
rate is the one of 32 bits. There, matrices of less than 10,000 numbers stay whole; here all are
quantised, each in buckets of its own. Left out: Elias coding, which makes what is sent shorter
still, and the network itself: two workers are the two halves of a batch in one process, each
quantises its own, so time is not measured.

The paper: 4 bits train networks to full accuracy, 2 bits may lose some; ResNet-152 on 16 GPUs is
1.8 times as fast. Here: 0.16M parameters on the bytes of Python's own library, SGD with momentum as
there, and AdamW, whose second moment sees the noise. The control sends 4 bits, too, but always the
nearest level: smaller errors, the same ones each time. All arms of an optimizer share weights,
batches, steps and the rate: SGD's is the best of three for 32 bits on another seed (which three is
not known any more), AdamW's that of the other ideas here. Nothing is clipped: noise has length.

    python -m ideas.qsgd
    python -m bench ideas --names qsgd
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import evaluate, scratch, steps

CLAIM = Claim(paper="1610.02132", says="gradients of 4 bits train as well; ResNet-152 1.8 times as fast",
              measured="what is left of an allowance of 0.02 nats, SGD of 4 bits against 32", smallest=0.5,
              unit="0.01 nats")
LEVELS = {"32 bits": 0, "4 bits": 7, "2 bits": 1, "4 bits, nearest": 7}    # baseline; idea twice; control
BUCKETS = {"2 bits": 128}                # of the others: 512
RATES = {"SGD": 0.1, "AdamW": 1e-2}
WORKERS = 2


@dataclass
class Config(Idea):
    steps: int = 300                     # optimizer steps per arm, 2,048 bytes each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


def quantise(v, levels, generator=None, two_norm=False, bucket=512):
    """-> v as it arrives. Without a generator each number goes to the nearest level."""
    size = v.numel()
    rows_BN = F.pad(v.flatten(), (0, -size % bucket)).view(-1, bucket)
    scale_B1 = rows_BN.norm(dim=1, keepdim=True) if two_norm else rows_BN.abs().amax(1, keepdim=True)
    x_BN = rows_BN.abs() / scale_B1.clamp(min=1e-30) * levels
    u = 0.5 if generator is None else torch.rand(x_BN.shape, generator=generator)
    level_BN = (x_BN + u).floor().clamp(max=levels)
    return (rows_BN.sign() * level_BN * scale_B1 / levels).flatten()[:size].view_as(v)


class Sent(Optimizer):
    """The optimizer sees the sum of what the workers sent; a micro-batch is a worker's share."""

    def __init__(self, model, kind, arm, seed):
        super().__init__(model, lr=RATES[kind], clip=0)
        self.model = model
        self.kind = kind
        self.levels = LEVELS[arm]
        self.bucket = BUCKETS.get(arm, 512)
        self.generator = None if arm.endswith("nearest") else torch.Generator().manual_seed(seed)
        self.arrived = {}                                        # parameter -> the sum

    @torch.no_grad()
    def finish_micro_batch(self):
        for w in self.model.parameters():
            sent = w.grad
            if self.levels:
                sent = quantise(sent, self.levels, self.generator, bucket=self.bucket)
            self.arrived[w] = self.arrived[w] + sent if w in self.arrived else sent
            w.grad = None

    def reduce_grads(self):
        for w, total in self.arrived.items():
            w.grad = total
        self.arrived.clear()
        super().reduce_grads()

    def _adamw(self, s, scale, factor):
        if self.kind == "AdamW":
            super()._adamw(s, scale, factor)
            return
        s.m.mul_(0.9).add_(s.grad, alpha=scale)                  # SGD with momentum: one moment is used
        s.master.add_(s.m, alpha=-self.lr * factor)


# -----------------------------------------------------------------------------
# the trial


def halves(document):
    """As many rows, and so micro-batches, as there are workers."""
    tokens, _ = document("train", 0)
    document.config.row_tokens = document.config.batch // WORKERS * len(tokens)
    return document


def train(kind, arm, trial, config):
    model, document = scratch("tiny", config.seed)               # the same weights and batches for every arm
    document.config.eval_docs = config.asked
    optimizer = Sent(model, kind, arm, config.seed)
    for step, loss in steps(model, halves(document), optimizer, config.steps):
        trial.point(f"{kind}, {arm}", step, loss)
    bits = 32 if arm == "32 bits" else int(arm[0]) + 32 / optimizer.bucket
    return dict(evaluate(model, document), bits_per_number=bits)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    arms = [(kind, arm) for kind in RATES for arm in LEVELS]
    trial = begin(config, __file__, CLAIM, arms, config.steps)
    results = {(kind, arm): train(kind, arm, trial, config) for kind, arm in arms}
    cost = {(kind, arm): 100 * (result["loss"] - results[kind, "32 bits"]["loss"])
            for (kind, arm), result in results.items()}
    picture(trial, x="step", y="loss, nats per byte")
    table = {f"{kind}, {arm}": result for (kind, arm), result in results.items()}
    note = (f"(lost: nearest {cost['SGD', '4 bits, nearest']:+.1f}, 2 bits {cost['SGD', '2 bits']:+.1f}; "
            f"AdamW of 4 bits {cost['AdamW', '4 bits']:+.1f})")
    return finish(trial, (2 - cost["SGD", "4 bits"], 0.0), table, note)


if __name__ == "__main__":
    main()
