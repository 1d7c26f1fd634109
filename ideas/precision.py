"""
precision.py: few bits in training are like fewer parameters (precision laws, arXiv 2411.04330).

Weights are rounded to P bits in each forward pass while they are trained. The law says what that
costs: the model is as good as a whole one with fewer numbers,

    L = A / N_eff^a + E              N_eff = N (1 - exp(-P / g))

so a bit less costs a small model more than it costs a large one. It has one constant for the bits,
g. In the paper activations and the cache have constants of their own, and their factors multiply;
there is a term in the number of tokens (all runs here read the same) and one for rounding after
training: left out.

The paper: 465 runs, 30M to 220M parameters, 3 to 12 bits, one law fits all and predicts 1.7B. Here:
four sizes of 10k to 166k numbers in the blocks, 2 to 16 bits, one rate; rows of the blocks'
matrices are rounded to 2^P - 1 levels around 0 up to their largest number, the gradient passes as
if they were not. What is asked: each run is predicted from all others. The baseline has the same
constants and is the same law at one size M = 40,000, in the middle; what bits cost there they cost
at any size:

    L = A / N^a + E + A / M_eff^a - A / M^a  the baseline
    L = A / (N P)^a + E                      control: it is memory that counts, N times the bits
    L = A / N^a + E                          bits do not matter

    python -m ideas.precision            # long: 20 runs
    python -m bench ideas --names precision
"""
import math
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.func import functional_call

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import GPT, evaluate, scratch, steps

CLAIM = Claim(paper="2411.04330",
              says="bits act on the number of parameters: one law of 465 runs predicts 1.7B",
              measured="error of predicted losses below that of a law whose bits cost alike at any size",
              smallest=0.5, unit="0.01 nats")
WIDTHS = (32, 48, 64, 96)
BITS = (2, 3, 4, 6, 16)
MIDDLE = 4e4             # numbers in the blocks of a model between the smallest and the largest
LR = 1e-2


@dataclass
class Config(Idea):
    steps: int = 120                     # optimizer steps per run, 2,048 bytes each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# training in few bits


def rounded(w, bits):
    """-> w on 2^bits - 1 levels of each row, with the gradient of w"""
    most = 2**(bits - 1) - 1
    scale = w.detach().abs().amax(1, keepdim=True).clamp(min=1e-12) / most
    return w + ((w / scale).round() * scale - w).detach()


class Few(nn.Module):
    """A GPT whose blocks' matrices are seen in few bits."""

    def __init__(self, model, bits):
        super().__init__()
        self.model = model
        self.bits = bits

    @property
    def head_weight(self):
        return self.model.head_weight

    def forward(self, *inputs):
        seen = {name: rounded(w, self.bits) for name, w in self.model.named_parameters()
                if w.ndim == 2 and name.startswith("blocks")}
        return functional_call(self.model, seen, inputs)


def run(width, bits, config):
    """-> numbers of the blocks, and the loss at the end"""
    like, document = scratch("tiny", config.seed)
    document.config.eval_docs = config.asked
    c = replace(like.config, d_model=width, n_head=width // 16, n_kv_head=width // 16, d_ff=2 * width)
    model = Few(GPT(c).init_weights(config.seed, embedding=0.7), bits)
    for _ in steps(model, document, Optimizer(model, lr=LR), config.steps):
        pass
    return sum(w.numel() for w in model.model.blocks.parameters()), evaluate(model, document)["loss"]


# -----------------------------------------------------------------------------
# the laws: L = A u + E, with a and g in u


def effective(N, P, a, g):
    return (N * (1 - (-P / g).exp()))**-a


def additive(N, P, a, g):
    return N**-a + effective(MIDDLE, P, a, g) - MIDDLE**-a


def memory(N, P, a, g):
    return (N * P)**-a


def blind(N, P, a, g):
    return N**-a


LAWS = {"effective": effective, "additive": additive, "memory": memory, "blind": blind}


def fitted(law, N, P, L, fine=25):
    """-> a, g, A, E of least squares: a and g on a grid that closes in, A and E for each in closed form"""
    low = torch.tensor([0.02, 0.1], dtype=torch.double).log()
    high = torch.tensor([1.5, 10.0], dtype=torch.double).log()
    for _ in range(4):
        a, g = (torch.linspace(*ends, fine, dtype=torch.double).exp() for ends in zip(low, high))
        u = law(N, P, a.view(-1, 1, 1), g.view(1, -1, 1)).expand(fine, fine, -1)
        spread = u - u.mean(2, keepdim=True)
        A = ((spread * L).sum(2) / spread.square().sum(2)).clamp(min=0)
        E = L.mean() - A * u.mean(2)
        error = (L - A.unsqueeze(2) * u - E.unsqueeze(2)).square().mean(2)
        i, j = divmod(int(error.argmin()), fine)
        step = (high - low) / (fine - 1)
        center = torch.stack([a[i], g[j]]).log()
        low, high = center - step, center + step
    return a[i], g[j], A[i, j], E[i, j]


def predicted(law, N, P, L):
    """-> the loss of each run, from a fit to all others"""
    found = []
    for i in range(len(L)):
        others = torch.arange(len(L)) != i
        a, g, A, E = fitted(law, N[others], P[others], L[others])
        found.append(A * law(N[i], P[i], a, g) + E)
    return torch.stack(found)


# -----------------------------------------------------------------------------
# the trial


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    widths, all_bits = (WIDTHS[:2], BITS[::2]) if config.smoke else (WIDTHS, BITS)
    trial = begin(config, __file__, CLAIM, [f"{bits} bits" for bits in all_bits], len(widths))
    runs = []
    for bits in all_bits:
        for width in widths:
            N, loss = run(width, bits, config)
            runs.append((N, bits, loss))
            trial.point(f"{bits} bits", math.log10(N), loss)
    N, P, L = torch.tensor(runs, dtype=torch.double).t()
    table = {}
    for name, law in LAWS.items():
        guesses = predicted(law, N, P, L)
        table[name] = dict(error=float((guesses - L).square().mean().sqrt()))
        for loss, guess in zip(L.tolist(), guesses.tolist()):
            trial.dot("predictions", name, loss, guess)
    g = float(fitted(effective, N, P, L)[1])
    gain = 100 * (table["additive"]["error"] - table["effective"]["error"])
    control = 100 * (table["additive"]["error"] - table["memory"]["error"])
    picture(trial, x="log10 of the blocks' numbers", y="loss, nats per byte",
            predictions=("loss", "predicted from the others", "o"))
    return finish(trial, (gain, 0.0), table, f"(g {g:.2f}; N times bits {control:+.1f})")


if __name__ == "__main__":
    main()
