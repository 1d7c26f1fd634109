"""
mup.py: find the learning rate on a narrow model and use it on a wide one (muP; 2203.03466).

A step of Adam moves each weight by about its rate, whatever the gradient. A matrix that reads n
numbers adds n such moves, so what it writes changes n times as much: the best rate falls with the
width, and has to be searched again at each. muP changes the model so that it does not. m times as
wide as where the rate was found,

                    matrices of the blocks      head                        embedding, norms
    begin           variance 1 / reads          as narrow; output times 1/m as narrow
    rate            1/m                         as narrow                   as narrow

(the paper's rules for Adam, with the multiplier at the head). Attention's 1/sqrt(d) stays: heads are
as wide as before, there are more of them. At m = 1 it is the usual model to the bit, so that one
search serves all arms. The paper: rates found at 40M parameters beat those published for 6.7B, for
7% of its cost; 2404.05728 found that it works mostly, and not where norms have gains that are
trained (as here), nor for Lion.

Here: 3 blocks, 32 wide, five rates; then 128 wide at the best, half and twice of it. What hides half
of the effect is switched off in all arms: QK-norm, and matrices that begin at zero. `standard` uses
the rate as it is; `all slower` is the control, 1/m for everything: a wide model wants smaller rates,
and that alone might be enough. The gain is at the rate that was found, without another search. Left
out: biases (there are none), depth, batch size, and Step Law (2503.04715), which fits the rate to
parameters and tokens instead.

    python -m ideas.mup
    python -m bench ideas --names mup
"""
from dataclasses import dataclass, replace

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import GPT, evaluate, scratch, steps

CLAIM = Claim(paper="2203.03466", says="the best rate of 40M parameters is that of 6.7B, by muP",
              measured="loss below the standard model's, 4 times as wide, both at the narrow one's best rate",
              smallest=2.0, unit="0.01 nats")
ARMS = ("standard", "muP", "all slower")
NARROW = 32
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2, 6.4e-2)
EMBEDDING = 0.7                          # its standard deviation at the beginning, as in train_gpt.py


@dataclass
class Config(Idea):
    steps: int = 120                     # of each run
    batch: int = 16                      # windows of 128 bytes in each
    wide: int = 4                        # times the narrow width
    asked: int = 256                     # windows of 128 bytes for the losses


# -----------------------------------------------------------------------------
# the idea


class Divided(GPT):
    """What the head is given, divided by m."""
    m = 1

    def forward(self, tokens_T, positions_T, attend):
        hidden_TD = super().forward(tokens_T, positions_T, attend)
        return hidden_TD / self.m if self.m > 1 else hidden_TD


class Slower(Optimizer):
    """AdamW with 1/m of the rate for the matrices of the blocks, or for everything."""

    def __init__(self, model, lr, m, everything=False):
        super().__init__(model, lr=lr, weight_decay=0)
        self.m = m
        self.everything = everything

    def _adamw(self, s, scale, factor):
        slower = self.everything or (s.param.ndim == 2 and s.name.startswith("blocks."))
        super()._adamw(s, scale, factor / self.m if slower else factor)


def built(arm, config, m):
    """-> a model, m times as wide as the narrow one, and its optimizer for a rate"""
    shape, document = scratch("tiny", config.seed)
    width = NARROW * m
    c = replace(shape.config, d_model=width, n_head=width // 16, n_kv_head=width // 16, d_ff=2 * width,
                qk_norm=False)
    model = Divided(c)
    model.m = m if arm == "muP" else 1
    rand = torch.Generator().manual_seed(config.seed)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            reads = p.shape[1] // model.m if name.startswith("head") else p.shape[1]
            std = EMBEDDING if name.startswith("embed") else reads ** -0.5
            p.data = torch.randn(p.shape, generator=rand) * std

    def optimizer_of(rate):
        return Slower(model, rate, 1 if arm == "standard" else m, everything=arm == "all slower")

    document.config.batch = config.batch
    document.config.eval_docs = config.asked
    return model, document, optimizer_of


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config, m, rate):
    model, document, optimizer_of = built(arm, config, m)
    for step, loss in steps(model, document, optimizer_of(rate), config.steps):
        trial.bar.update()
    loss = evaluate(model, document)["loss"]
    name = arm if m > 1 else "narrow"
    trial.dot("", name, rate, loss)
    return loss


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps batch wide asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ("all",), (len(RATES) + 3 * len(ARMS)) * config.steps)
    narrow = {rate: train("standard", trial, config, 1, rate) for rate in RATES}
    best = min(narrow, key=narrow.get)
    results = {}
    for arm in ARMS:
        wide = {rate: train(arm, trial, config, config.wide, rate) for rate in (best / 2, best, 2 * best)}
        results[arm] = dict(rate=best, loss=wide[best], half=wide[best / 2], twice=wide[2 * best])
    gain = {arm: 100 * (results["standard"]["loss"] - row["loss"]) for arm, row in results.items()}
    picture(trial, x="rate", y="loss at the end, nats per byte")
    lowest = ", ".join(f"{arm} {min(list(row.values())[1:]):.2f}" for arm, row in results.items())
    note = f"(all slower {gain['all slower']:+.1f}; the rate {best:g}; the lowest of three: {lowest})"
    return finish(trial, (gain["muP"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
