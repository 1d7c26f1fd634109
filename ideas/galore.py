"""
galore.py: Adam with the moments of a few directions (GaLore 2403.03507, APOLLO 2412.05270).

A matrix's gradient G has m x n numbers (m <= n here, else the other way round) and Adam keeps two
more for each.

    GaLore    P = the first r left singular vectors of G, found anew every 200 steps; Adam keeps the moments
              of P^T G, r x n, and the weights move by alpha P Adam(P^T G)
    APOLLO    R = a random r x m matrix, drawn anew every 200 steps; Adam on R G says only how much each
              channel j moves, s_j = |Adam(RG)_j| / |(RG)_j|, and the weights move along s_j G_j; the norm
              of the update may grow by 1% per step at most

Read in the code of GaLore, and for APOLLO in a port of its code: GaLore's alpha is 0.25, moments
are kept when P changes, as if they were of the new one; both act on the matrices of the blocks
only. Here the first P waits for a gradient that is not zero: `out` and `down` begin at zero, and so
does all that flows back through them. Left out: quantised projections, the randomised SVD of GaLore
2, APOLLO's rank 1 with one scale per matrix. The papers: GaLore's perplexity after pretraining
Llama 1B on C4 is 15.64 against AdamW's 15.56, at a quarter of the rank; APOLLO's project page, for
7B after 150K steps: 8-bit Adam 14.61, 8-bit GaLore 14.65, APOLLO 13.02. state_per_weight counts as
APOLLO's paper does: P is kept, R is drawn again from its seed. Here: 0.16M parameters, rank 16 of
64. The control moves along G without the channels' scales, each update at the size of APOLLO's:
what it gains is due to the size of the steps alone. Embeddings, head and norms are AdamW's in all
arms. Rates were tried on another seed, RATES says which: AdamW's for all weights together, the
others' for the matrices alone.

    python -m ideas.galore
    python -m bench ideas --names galore
"""
from dataclasses import dataclass

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import evaluate, scratch, steps

CLAIM = Claim(paper="2412.05270", says="random R at 7B: perplexity 13.02 against 8-bit GaLore's 14.65",
              measured="final loss below GaLore's", smallest=1.0, unit="0.01 nats")
ARMS = ("AdamW", "GaLore", "APOLLO", "unscaled", "Muon")
# The best tried at seed 100, all steps. AdamW: 1.627 at 3e-3, 1.551 at 1e-2, 1.578 at 3e-2. GaLore: 1.727 at
# 2e-2, 1.654 at 4e-2, 1.667 at 8e-2. APOLLO: 1.607 at 1.5e-2, 1.559 at 3e-2, 1.525 at 6e-2, 1.568 at 1e-1.
# Unscaled: 1.730 at 1e-2, 1.630 at 2e-2, 1.590 at 4e-2, 1.709 at 8e-2
# Muon, which is shown beside them: the base's
RATES = {"AdamW": 1e-2, "GaLore": 4e-2, "APOLLO": 6e-2, "unscaled": 4e-2, "Muon": 1.4e-2}
LR = 1e-2                                # of everything else
ALPHA = 0.25                             # GaLore's scale


@dataclass
class Config(Idea):
    steps: int = 600                     # optimizer steps per arm, 2,048 bytes each
    rank: int = 16                       # directions whose moments are kept
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


class LowRank(Optimizer):
    """Kept of a matrix: the projection, both moments of the projected gradient, and one norm."""

    def __init__(self, model, arm, rank, lr, matrix_lr, gap=200):
        self.arm = arm
        self.rank_kept = rank
        self.gap = gap
        self.kept = {}                                           # name -> the state of a matrix
        super().__init__(model, lr=lr, muon_lr=matrix_lr)

    def project(self, G, generator):
        """-> the r x m matrix that G (m x n, m <= n) is multiplied with."""
        if self.arm == "GaLore":
            U, _, _ = torch.linalg.svd(G, full_matrices=False)
            return U[:, :self.rank_kept].t().contiguous()
        return torch.randn(self.rank_kept, len(G), generator=generator) / self.rank_kept ** 0.5

    def adam(self, state, low):
        b1, b2 = self.betas
        state["m"].lerp_(low, 1 - b1)
        state["v"].lerp_(low.square(), 1 - b2)
        root = (state["v"] / (1 - b2**self.steps)).sqrt().add_(self.eps)
        return state["m"] / (1 - b1**self.steps) / root

    def update_matrix(self, s, scale, factor):
        if s.name not in self.kept and not s.grad.any():         # P would be rows of the identity, for long
            return
        G = (s.grad * scale).view(s.param.shape)
        tall = G.shape[0] > G.shape[1]
        G = G.t() if tall else G
        state = self.kept.setdefault(s.name, {"P": None, "norm": 0.0, "seed": len(self.kept)})
        if state["P"] is None or (self.steps - 1) % self.gap == 0:
            generator = torch.Generator().manual_seed(self.steps * 1000 + state["seed"])
            state["P"] = self.project(G, generator)
        low = state["P"] @ G                                     # (r, n)
        if "m" not in state:
            state["m"] = torch.zeros_like(low)
            state["v"] = torch.zeros_like(low)
        adam = self.adam(state, low)
        if self.arm == "GaLore":
            update = ALPHA * (state["P"].t() @ adam)
        else:
            update = self.limited(state, G * (adam.norm(dim=0) / (low.norm(dim=0) + 1e-8)))
        if self.arm == "unscaled":
            update = G * (update.norm() / (G.norm() + 1e-12))
        update = update.t() if tall else update
        s.master.add_(update.reshape(-1), alpha=-self.muon_lr * factor)

    def limited(self, state, update):
        """Its norm grows by 1% per step at most."""
        norm = float(update.norm())
        most = 1.01 * state["norm"]
        if 0 < most < norm:
            update = update * (most / norm)
            norm = most
        state["norm"] = norm
        return update

    def numbers(self):
        """-> how many numbers are kept, of all matrices: of a random R its seed, beside the last norm"""
        count = 0
        for state in self.kept.values():
            count += state["m"].numel() + state["v"].numel()
            count += state["P"].numel() if self.arm == "GaLore" else 2
        return count


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    model, document = scratch("tiny", config.seed)               # the same weights and batches for every arm
    document.config.eval_docs = config.asked
    if arm == "AdamW":
        optimizer = Optimizer(model, lr=RATES[arm])
    elif arm == "Muon":
        optimizer = Optimizer(model, lr=LR, muon_lr=RATES[arm])
    else:
        optimizer = LowRank(model, arm, config.rank, LR, RATES[arm])
    for step, loss in steps(model, document, optimizer, config.steps):
        trial.point(arm, step, loss)
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    usual = {"AdamW": 2 * matrices, "Muon": matrices}            # two moments, or a momentum
    state = usual[arm] if arm in usual else optimizer.numbers()
    return dict(evaluate(model, document), state_per_weight=state / matrices)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked rank")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    loss = {arm: 100 * results[arm]["loss"] for arm in ARMS}
    picture(trial, x="step", y="loss, nats per byte")
    note = (f"(against AdamW {loss['AdamW'] - loss['APOLLO']:+.1f}, unscaled against GaLore "
            f"{loss['GaLore'] - loss['unscaled']:+.1f}, Muon {loss['GaLore'] - loss['Muon']:+.1f})")
    return finish(trial, (loss["GaLore"] - loss["APOLLO"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
