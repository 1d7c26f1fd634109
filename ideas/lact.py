"""
lact.py: a window of attention, and weights trained on what left it (LaCT, arXiv 2505.23884).

Attention sees the last 64 tokens. Beside it each layer has a small SwiGLU whose weights learn while
the text is read, in large chunks: a chunk asks it, then it learns the chunk's keys and values.

    f(x) = W1 (silu(W0 x) * W2 x)               o_t = attention_t + norm(f(q_t))
    after a chunk:   W <- W - grad_W sum_t rate_t (-<f(k_t), v_t>),  each row back to its length

As in the authors' code: the gradient in closed form, all three matrices, a rate per token and
matrix by softplus, silu and unit length for q and k, silu for v. Left out: momentum and Muon for W,
options there, several heads, scales of q and k, a gate of the output. Two things are ours, because
attend() sees no more than q, k and v: the rate reads v, and q and k are turned back first, so that
a pair is the same anywhere (an option there). The first rate is 0.1, not 0.001: texts are short.

The paper: language models of 760M and 3B with 32k tokens, chunks of 2,048, trained from scratch, better
than other recurrent memories. Here: keys and values (data/recall.py), two layers of 64, chunks of 64.
From scratch full attention answered 16% after 400 steps, so all arms begin with the start `recall`, which
finds everything by full attention, and train on the same texts of 64 to 512 tokens. A memory begins at a
tenth of its norm, not to drown the rest. Control: the same matrices, which do not learn.

    python -m ideas.lact
    python -m bench ideas --names lact
"""
import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.hf import find, rope_frequencies
from common.optim import Optimizer
from data.documents import Documents, documents
from data.recall import RAMP
from kernels import linear_logprob, packed_attention, rope_tables
from train_gpt import GPT, RMSNorm, packed_rows, scratch, steps

CLAIM = Claim(paper="2505.23884", says="window and fast weights, a chunk at a time: ahead of other memories",
              measured="right answers about 512 tokens, window and memory against the window alone",
              smallest=5.0)
ARMS = ("full", "window", "memory", "still")     # the most there is; baseline; idea; control
WINDOW = CHUNK = 64
RATE = 0.1


@dataclass
class Config(Idea):
    steps: int = 200                     # optimizer steps per arm
    batch: int = 8                       # texts per step
    asked: int = 128                     # texts of 512 tokens at the end, 8 questions each


# -----------------------------------------------------------------------------
# the idea


class Memory(nn.Module):
    """The weights that a text begins with, and what makes its rates."""

    def __init__(self, c, still):
        super().__init__()
        width = c.n_head * c.head_dim
        drawn = (torch.randn(width, width) * width**-0.5 for _ in range(3))
        self.w0, self.w1, self.w2 = map(nn.Parameter, drawn)
        self.rates = nn.Linear(width, 3)
        nn.init.constant_(self.rates.bias, math.log(math.expm1(RATE)))
        self.norm = RMSNorm(width, c.norm_eps)
        nn.init.constant_(self.norm.weight, 0.1)
        self.still = still

    def forward(self, q, k, v, real_BL):
        """(B, L, D) of texts of up to L tokens, real ones first -> what it says about each q"""
        rates = F.softplus(self.rates(v)) * real_BL.unsqueeze(2)
        q, k = (F.normalize(F.silu(x), dim=2) for x in (q, k))
        v = F.silu(v)
        weights = [w.expand(len(q), -1, -1) for w in (self.w0, self.w1, self.w2)]
        said = []
        for parts in zip(*(x.split(CHUNK, 1) for x in (q, k, v, rates))):
            said.append(answer(weights, parts[0]))
            if not self.still:
                weights = learned(weights, *parts[1:])
        return self.norm(torch.cat(said, 1))


def answer(weights, x):
    w0, w1, w2 = (w.transpose(1, 2) for w in weights)
    return (F.silu(x @ w0) * (x @ w2)) @ w1


def learned(weights, k, v, rates):
    """-> the weights after one step up the gradient of sum_t rate_t <f(k_t), v_t>"""
    w0, w1, w2 = weights
    gate, up = k @ w0.transpose(1, 2), k @ w2.transpose(1, 2)
    slope = torch.sigmoid(gate) * (1 + gate * (1 - torch.sigmoid(gate)))
    back = v @ w1
    r0, r1, r2 = rates.unsqueeze(3).unbind(2)
    steps_up = [(back * up * slope * r0).transpose(1, 2) @ k,
                (v * r1).transpose(1, 2) @ (F.silu(gate) * up),
                (back * F.silu(gate) * r2).transpose(1, 2) @ k]
    return [F.normalize(w + step, dim=2) * w.norm(dim=2, keepdim=True) for w, step in zip(weights, steps_up)]


def turned_back(x, cos, sin):
    """-> x (T, heads, width) as it was before its rotary position"""
    a, b = x.chunk(2, 2)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], 2)


def attention(model, arm, cu):
    """-> attend() of a row of texts, padded to the length of the longest"""
    lengths = [b - a for a, b in pairwise(cu)]
    if arm == "full":
        return packed_attention(cu, max(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])
    cos, sin = (t.unsqueeze(1) for t in rope_tables(positions, *rope_frequencies(model.config)))
    real_BL = pad_sequence([torch.ones(n) for n in lengths], batch_first=True)
    near = torch.ones(max(lengths), max(lengths), dtype=torch.bool).tril().triu(1 - WINDOW)

    def padded(x):
        return pad_sequence(x.split(lengths), batch_first=True)

    def attend(layer, q, k, v):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        heads = [padded(x).transpose(1, 2) for x in (q, k, v)]
        o = F.scaled_dot_product_attention(*heads, attn_mask=near).transpose(1, 2)
        if arm != "window":
            q, k = turned_back(q, cos, sin), turned_back(k, cos, sin)
            said = model.memories[layer](*(padded(x).flatten(2) for x in (q, k, v)), real_BL)
            o = o + said.view_as(o)
        return o[real_BL.bool()]

    return attend


# -----------------------------------------------------------------------------
# the trial


def long_texts(document, config):
    """-> a document like recall's: long, none that the start has read; asked are 512 tokens"""
    longest, _ = documents(replace(document.config, data="recall:512"), document.tok)

    def read(split, i):
        return document(split, i + 2 * RAMP) if split == "train" else longest(split, i)

    document.config.batch = config.batch
    return Documents(read, document.config, document.tok)


def hidden_of(model, arm, row):
    tokens_T, positions_T, at_N, _, cu = row
    return model(tokens_T, positions_T, attention(model, arm, cu))[at_N]


@torch.no_grad()
def right(model, arm, document, asked):
    """-> percent of the answers of the valid split"""
    found = []
    docs = [document("valid", i) for i in range(asked)]
    for row in packed_rows(docs, document.config.row_tokens, "cpu"):
        logits = hidden_of(model, arm, row) @ model.head_weight.t()
        found.append(logits.argmax(1) == row[3])
    return 100 * float(torch.cat(found).float().mean())


def train(arm, trial, config):
    model = GPT.from_hf(find(trial.base("recall")))      # the same start and batches for every arm
    document = long_texts(scratch("recall", config.seed)[1], config)
    if arm in ("memory", "still"):
        torch.manual_seed(config.seed)
        model.memories = nn.ModuleList(Memory(model.config, arm == "still") for _ in model.blocks)

    def loss(model, row):
        return -linear_logprob(hidden_of(model, arm, row), model.head_weight, row[3])[0].sum()

    optimizer = Optimizer(model, lr=1e-2, muon_lr=1.4e-2)
    for step, value in steps(model, document, optimizer, config.steps, loss=loss):
        trial.point(arm, step, value)
    return dict(right=right(model, arm, document, config.asked))


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps batch asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    table = {arm: train(arm, trial, config) for arm in ARMS}
    score = {arm: row["right"] for arm, row in table.items()}
    picture(trial, x="step", y="loss of answers, nats")
    note = f"(still {score['still'] - score['window']:+.1f}, full {score['full'] - score['window']:+.1f})"
    return finish(trial, (score["memory"] - score["window"], 0.0), table, note)


if __name__ == "__main__":
    main()
