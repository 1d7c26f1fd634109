"""
sinks.py: why do heads look at the first token, where there is nothing to see (2410.10781)?

    softmax              w_j = e^s_j / sum e^s             they must sum to one: a head that wants
                                                           nothing puts it all somewhere
    sigmoid              w_j = 1 / (1 + e^-s_j)            need not sum to anything
    sigmoid / sum        the same, divided by its sum      the control: sigmoid that has to sum to one
    softpick             relu(e^s_j - 1) / sum |e^s - 1|   may be all zeros (2504.20966)

The paper: sinks appear as models learn, in small ones too, and with sigmoid weights that are not
normalised they do not, up to 1B. A head sinks if its weight on the first token, as a part of the
absolute weights of each query, is above 0.3 on average; the gain is the share of such heads, with
softmax less with sigmoid. If the sum is the cause, `sigmoid / sum` sinks like softmax does. The
picture has the mean weight on the first token, the table the loss too. At this size no head sinks
even with softmax (CLAIM.scale): what stands here is the measure, the weights and their prices.

Here: 3 layers of 4 heads, AdamW, windows of 127 bytes of Python's own library behind one token that
is the same in all: a text that begins anywhere has no first token to sink into. QK-norm is off in
all arms, since it bounds s. Both sigmoids are those of the published program, without a bias on s.
Left out: biases of keys, other kernels, softpick's case for fewer bits.

    python -m ideas.sinks
    python -m bench ideas --names sinks
"""
from dataclasses import dataclass, replace
from itertools import groupby

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data.documents import Documents
from data.stdlib import window
from train_gpt import GPT, evaluate, packed_rows, scratch, steps

CLAIM = Claim(paper="2410.10781", says="no head sinks with sigmoid weights that are not normalised, up to 1B",
              measured="share of heads that sink, softmax less sigmoid", smallest=10.0,
              scale="0 of 12 heads sink in 700 steps of softmax: 9% is the most that one has, 30% a sink")
FIRST = "<|user|>"                       # its id means nothing else in this corpus
SINKS = 0.3                              # a head with this much on the first token
LR = 1e-2                                # AdamW


@dataclass
class Config(Idea):
    steps: int = 700                     # per arm
    batch: int = 16                      # windows of 127 bytes in each
    asked: int = 256                     # windows for the losses and the sinks


# -----------------------------------------------------------------------------
# the weights: scores are minus infinity where a query must not look


def softmax(scores):
    return scores.softmax(-1)


def sigmoid(scores):
    return scores.sigmoid()


def sigmoid_sum(scores):
    weights = sigmoid(scores)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-20)


def softpick(scores):
    """e^s - 1 is scaled by e^-m, or it would overflow; where a query must not look it would be -1, so
    nothing is put there."""
    seen = scores > -torch.inf
    m = scores.amax(-1, keepdim=True).clamp(min=0)
    less = torch.where(seen, (scores - m).exp() - (-m).exp(), 0.0)
    return less.relu() / (less.abs().sum(-1, keepdim=True) + 1e-6)


ARMS = {"softmax": softmax, "sigmoid": sigmoid, "sigmoid / sum": sigmoid_sum, "softpick": softpick}


# -----------------------------------------------------------------------------
# a model that attends by them


class Explicit(GPT):
    """GPT with attention written out, by any of the weights. Texts begin where positions do."""
    weights_of = staticmethod(softmax)
    first = None                         # a list for each layer: the weights (heads) on each first token

    def forward(self, tokens_T, positions_T, attend):
        starts = (positions_T == 0).nonzero()[:, 0].tolist()
        lengths = [b - a for a, b in zip(starts, [*starts[1:], len(positions_T)])]
        runs = [(L, len(list(run))) for L, run in groupby(lengths)]      # a row has its texts by length

        def explicit(layer, q, k, v):
            parts = zip(*(x.split([L * n for L, n in runs]) for x in (q, k, v)))
            return torch.cat([self.equal(*part, L, layer) for part, (L, n) in zip(parts, runs)])

        return super().forward(tokens_T, positions_T, explicit)

    def equal(self, q, k, v, L, layer):
        """Texts of length L: (n L, heads, head_dim), as many heads for keys as for queries."""
        # (n, heads, L, head_dim)
        q, k, v = (x.view(-1, L, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        ahead = torch.ones(L, L, dtype=torch.bool).triu(1)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        weights = self.weights_of(scores.masked_fill(ahead, -torch.inf))
        if self.first is not None:
            part = weights / weights.abs().sum(-1, keepdim=True).clamp(min=1e-9)
            self.first[layer].extend(part[:, :, 1:, 0].mean(2))  # the first query has nowhere else to look
        return (weights @ v).transpose(1, 2).flatten(0, 1)


def marked(document):
    """-> windows with one more token in front, the same for all"""
    c = document.config
    first = document.tok.encode(FIRST)

    def read(split, i):
        tokens = first + document.tok.encode(window(split, c.seed, i, c.seq_len))
        return tokens, [False] + [True] * (len(tokens) - 1)

    return Documents(read, c, document.tok)


@torch.no_grad()
def on_the_first(model, document, asked):
    """-> (layers, heads): the mean weight on the first token"""
    model.first = [[] for _ in model.blocks]
    docs = [document("valid", i) for i in range(asked)]
    for tokens_T, positions_T, *_ in packed_rows(docs, document.config.row_tokens, "cpu"):
        model(tokens_T, positions_T, None)
    weights = torch.stack([torch.stack(texts).mean(0) for texts in model.first])
    model.first = None
    return weights


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    shape, document = scratch("tiny", config.seed)
    document = marked(document)
    document.config.batch = config.batch
    document.config.eval_docs = config.asked
    # the same first weights and texts for every arm
    model = Explicit(replace(shape.config, qk_norm=False)).init_weights(config.seed, embedding=0.7)
    model.weights_of = ARMS[arm]
    for step, loss in steps(model, document, Optimizer(model, lr=LR), config.steps):
        trial.point(arm, step, loss)
        if step % (config.steps // 10 or 1) == 0:
            first = on_the_first(model, document, config.asked // 4 or 1)
            trial.dot("first token", arm, step, first.mean())
    first = on_the_first(model, document, config.asked)
    return dict(evaluate(model, document), sinks=100 * float((first > SINKS).float().mean()),
                first=float(first.mean()), largest=float(first.max()))


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps batch asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, tuple(ARMS), config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    picture(trial, x="step", y="loss, nats per byte",
            **{"first token": ("step", "mean weight on the first token")})
    share = {arm: row["sinks"] for arm, row in results.items()}
    note = f"(heads that sink, in %: {', '.join(f'{arm} {value:.0f}' for arm, value in share.items())})"
    return finish(trial, (share["softmax"] - share["sigmoid"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
