"""
dion.py: turn only the few largest directions of the momentum, and keep the rest for later (Dion,
2504.05295).

Muon turns all singular values of a matrix's momentum into 1, which takes products of whole
matrices. Dion takes r directions, found by one round of power iteration that begins where the last
step's ended:

    B = M + G                        the momentum, m x n
    P = orthonormal columns of B Q   by QR; Q, n x r, is kept
    R = B^T P
    M = B - (1 - mu) P R^T           error feedback: what was not applied stays
    Q = R with columns of norm 1
    W = W - lr sqrt(m / n) P Q^T

Left out: its distributed form, which is why it exists (only P and R travel), and weight decay.
Embeddings, head and norms are AdamW's, as in the paper. The paper: models of 160M to 3B; Dion at
rank 1/4 keeps up with Muon, better the larger the model, and is ahead of AdamW. Here: 0.16M
parameters, the bytes of Python's own library, rank 16 of 64. The control is Dion without error
feedback (M = mu B): what it gains is not due to it. Muon is shown beside them. Rates were tried on
another seed, RATES says which: AdamW's for all weights together, the others' for the matrices alone.
state_per_weight: how many numbers an optimizer keeps for each weight of the matrices.

    python -m ideas.dion
    python -m bench ideas --names dion
"""
from dataclasses import dataclass

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import evaluate, scratch, steps

CLAIM = Claim(paper="2504.05295", says="Dion at a quarter of the rank is ahead of AdamW, 160M to 3B",
              measured="final loss below AdamW's", smallest=2.0, unit="0.01 nats")
ARMS = ("AdamW", "Dion", "no feedback", "Muon")
# The best of three tried at seed 100, all steps. AdamW: 1.627 at 3e-3, 1.551 at 1e-2, 1.578 at 3e-2. Dion:
# 1.588 at 1e-2, 1.565 at 3e-2, 1.691 at 6e-2. No feedback: 1.616 at 1e-2, 1.615 at 3e-2, 1.726
# at 6e-2. Muon: the base's
RATES = {"AdamW": 1e-2, "Dion": 3e-2, "no feedback": 3e-2, "Muon": 1.4e-2}
LR = 1e-2                                # of everything else


@dataclass
class Config(Idea):
    steps: int = 600                     # optimizer steps per arm, 2,048 bytes each
    rank: int = 16                       # directions per step
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


class Dion(Optimizer):
    def __init__(self, model, rank, lr, matrix_lr, feedback=True):
        self.rank_kept = rank
        self.feedback = feedback
        self.Q = {}                                              # matrix -> n x r
        super().__init__(model, lr=lr, muon_lr=matrix_lr)

    def start(self, s):
        """-> Q for the first step, random"""
        g = torch.Generator().manual_seed(len(self.Q))
        n = s.param.shape[1]
        return torch.randn(n, min(self.rank_kept, *s.param.shape), generator=g)

    def update_matrix(self, s, scale, factor):
        m, n = s.param.shape
        if s.name not in self.Q:
            self.Q[s.name] = self.start(s)
        B = (s.m + s.grad * scale).view(m, n)
        if not B.any():                                          # Q = 0 / |0| would lose the random start
            return
        P = torch.linalg.qr(B @ self.Q[s.name]).Q
        R = B.t() @ P
        if self.feedback:
            M = B - (1 - self.momentum) * (P @ R.t())
        else:
            M = self.momentum * B
        s.m.copy_(M.reshape(-1))
        self.Q[s.name] = R / (R.norm(dim=0) + 1e-8)
        update = P @ self.Q[s.name].t()
        s.master.add_(update.reshape(-1), alpha=-self.muon_lr * factor * (m / n) ** 0.5)


# -----------------------------------------------------------------------------
# the trial


def optimizer_of(arm, model, rank):
    if arm == "AdamW":
        return Optimizer(model, lr=RATES[arm])
    if arm == "Muon":
        return Optimizer(model, lr=LR, muon_lr=RATES[arm])
    return Dion(model, rank, LR, RATES[arm], feedback=arm == "Dion")


def train(arm, trial, config):
    model, document = scratch("tiny", config.seed)               # the same weights and batches for every arm
    document.config.eval_docs = config.asked
    optimizer = optimizer_of(arm, model, config.rank)
    for step, loss in steps(model, document, optimizer, config.steps):
        trial.point(arm, step, loss)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    state = matrices * (2 if arm == "AdamW" else 1)              # two moments, or a momentum
    if isinstance(optimizer, Dion):
        state += sum(Q.numel() for Q in optimizer.Q.values())
    return dict(evaluate(model, document), state_per_weight=state / matrices)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked rank")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    gain = {arm: 100 * (results["AdamW"]["loss"] - results[arm]["loss"]) for arm in ARMS}
    picture(trial, x="step", y="loss, nats per byte")
    note = f"(without feedback {gain['no feedback']:+.1f}, Muon {gain['Muon']:+.1f})"
    return finish(trial, (gain["Dion"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
