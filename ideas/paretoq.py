"""
paretoq.py: train weights through their rounding, at 1 to 4 bits (ParetoQ, arXiv 2502.02631).

A trained model goes on training while each matrix of its blocks is used rounded: the numbers
below are kept, the levels are what the layers see, and the gradient passes the rounding as if it
were not there. Every row has a scale a, learned with the weights (w' is w / a, cut at the ends):

    1 bit           a sign(w)                                  a begins as mean |w|
    1.58 bits       a round(1.5 w') / 1.5        3 levels      max |w|       no wider than the weights:
    2 bits          a (round(2 w' - 1/2) + 1/2) / 2   4        max |w|       "stretched", no level at 0
    3, 4 bits       a round(w')           8, 16 levels         max |w| / (2^(bits - 1) - 1)

All of it is as in the authors' code, the factor on the scale's gradient included; embeddings,
head and norms stay whole. Left out: their search of how a budget is best shared between whole and
rounded training.

The paper: training moves the weights by 10 to 20% at 3 and 4 bits, which stay close to those that
they began with, and by about 40% at 2 and below, which have to learn others; MobileLLM and Llama 3
up to 8B. (Read in summaries. One says that the rate was 1e-5 at 3 and 4 bits and 2e-5 at 1.58,
which by itself moves weights further.) Here: 0.16M parameters, the shared start `tiny`, the same
steps and rate for all. "moved" is how far the unrounded weights of the blocks went, in percent of
their norm (which norm the paper's percents are of we could not read); "untrained" is the loss
before the first step, nearest levels only. The claim is a jump: the step from 3 bits to 2 moves
more than that from 4 to 3. The control is 3 bits by the way of 2, stretched: if it has moved as far
as 2 bits, the jump is due to the levels' shape and not to their number.

    python -m ideas.paretoq
    python -m bench ideas --names paretoq
"""
from dataclasses import dataclass

from torch import nn
from torch.func import functional_call

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.hf import find
from common.optim import Optimizer
from train_gpt import GPT, evaluate, scratch, steps

CLAIM = Claim(paper="2502.02631", says="training moves weights 10 to 20% at 3 and 4 bits, 40% at 2",
              measured="how much more the step from 3 to 2 bits moves weights than that from 4 to 3",
              smallest=1.0, unit="% of their norm")
BITS = {"whole": 32, "4 bits": 4, "3 bits": 3, "2 bits": 2, "1.58 bits": 1.58, "1 bit": 1,
        "3 bits, stretched": 3}          # baseline; idea; control
LR = 2e-3


@dataclass
class Config(Idea):
    steps: int = 150                     # optimizer steps per arm, 2,048 bytes each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


def through(x, rounded):
    """The rounded number, with the gradient of the one before."""
    return x + (rounded - x).detach()


def first_scale(w, bits, stretched):
    """-> (rows, 1)"""
    if bits == 1:
        return w.abs().mean(1, keepdim=True)
    largest = w.abs().amax(1, keepdim=True)
    return largest if stretched else largest / (2 ** (bits - 1) - 1)


def levels(w, scale, bits, stretched):
    """-> the weights that the layers see"""
    scale = scale.clamp(min=1e-5)
    if bits == 1:
        passed = w.clamp(-scale.detach(), scale.detach())
        return scale * w.sign() + (passed - passed.detach())
    if stretched:
        count = 1.5 if bits == 1.58 else 2 ** (bits - 1)
        shift = 0.0 if bits == 1.58 else 0.5
        x = (w / scale).clamp(-0.99, 0.99)
        return scale * through(x, ((x * count - shift).round() + shift) / count)
    x = (w / scale).clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return scale * through(x, x.round())


class Rounded(nn.Module):
    """A GPT whose blocks use the levels of their matrices."""

    def __init__(self, model, arm):
        super().__init__()
        self.model = model
        self.bits = BITS[arm]
        self.stretched = arm.endswith("stretched") or self.bits in (1.58, 2)
        found = {name: w for name, w in model.named_parameters() if w.ndim == 2 and name.startswith("blocks")}
        self.matrices = found if self.bits < 32 else {}
        first = [first_scale(w.detach(), self.bits, self.stretched) for w in self.matrices.values()]
        self.scales = nn.ParameterList(first)

    @property
    def head_weight(self):
        return self.model.head_weight

    def rounded(self):
        seen = {}
        for (name, w), scale in zip(self.matrices.items(), self.scales):
            most = max(1, 2 ** (int(self.bits) - 1) - 1)
            slow = (w.numel() * most) ** -0.5                    # of the scale's gradient alone
            scale = through(scale * slow, scale)
            seen[name] = levels(w, scale, self.bits, self.stretched)
        return seen

    def forward(self, *inputs):
        return functional_call(self.model, self.rounded(), inputs)


# -----------------------------------------------------------------------------
# the trial


def moved(model, start):
    """-> how far the matrices of the blocks are from those of the start, in percent of their norm"""
    before = [w for name, w in start.items() if w.ndim == 2 and name.startswith("blocks")]
    after = [w for name, w in model.state_dict().items() if w.ndim == 2 and name.startswith("blocks")]
    way = sum((a - b).square().sum() for a, b in zip(after, before))
    return 100 * float((way / sum(b.square().sum() for b in before)).sqrt())


def train(arm, folder, trial, config):
    _, document = scratch("tiny", config.seed + 1000)            # windows that the start did not have
    document.config.eval_docs = config.asked
    model = GPT.from_hf(find(folder))
    start = {name: w.clone() for name, w in model.state_dict().items()}
    rounded = Rounded(model, arm)
    untrained = evaluate(rounded, document)["loss"]
    for step, loss in steps(rounded, document, Optimizer(rounded, lr=LR), config.steps):
        trial.point(arm, step, loss)
    result = dict(evaluate(rounded, document), untrained=untrained, moved=moved(model, start))
    if BITS[arm] < 32:
        trial.dot("distance", "stretched" if arm.endswith("stretched") else "its own way", BITS[arm],
                  result["moved"])
    return result


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, tuple(BITS), config.steps)
    folder = trial.base("tiny")
    results = {arm: train(arm, folder, trial, config) for arm in BITS}
    way = {arm: result["moved"] for arm, result in results.items()}
    gain = (way["2 bits"] - way["3 bits"]) - (way["3 bits"] - way["4 bits"])
    control = way["3 bits, stretched"] - way["3 bits"]
    picture(trial, x="step", y="loss, nats per byte", distance=("bits", "moved, % of the norm"))
    return finish(trial, (gain, 0.0), results, note=f"(3 bits stretched, against 3 bits: {control:+.1f})")


if __name__ == "__main__":
    main()
