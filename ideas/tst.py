"""
tst.py: first read bags of tokens, then tokens (token superposition training, arXiv 2605.06546).

For the first r of the steps a position is a bag of s tokens in a row: what goes in is the mean of
their embeddings, what is predicted are the s tokens of the next bag, the loss the mean of s cross
entropies:

    s = 4    (i m p o) (r t _ d) (a t a ,)       the mean of r, t, _ and d  ->  a, t, a and ,

Then plain training, with the same weights, moments and schedule. A step costs the same throughout
and reads s times the bytes in the first phase, so arms with s > 1 have read more text at the end.
Left out: nothing. The paper: 270M to 3B and a mixture of 10B, s = 6 to 16, r = 0.2 to 0.4: at 3B a
loss of 2.676 against 2.808 for the same compute; at equal data it loses. Here: 0.16M parameters,
Muon, bytes of Python's own library, milder s and r. `more data` is plain training on as many bytes
as the first bag arm reads, at more compute (the paper loses to it). The control, `no mean`, feeds
only the last token of a bag and predicts the next s all the same: what it gains is not due to the
superposition.

    python -m ideas.tst
    python -m bench ideas --names tst
"""
from dataclasses import dataclass, replace

import torch
from torch.func import functional_call

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data.documents import Documents
from data.stdlib import window
from kernels import linear_logprob, packed_attention
from train_gpt import evaluate, scratch, steps, trapezoid

CLAIM = Claim(paper="2605.06546", says="bags of tokens first: 2.676 against 2.808 at 3B, same compute",
              measured="final loss with s = 2, r = 0.2 below plain training's, same compute", smallest=1.0,
              unit="0.01 nats")
ARMS = {"plain": (1, 0.0), "s=2 r=.2": (2, 0.2), "s=4 r=.3": (4, 0.3),          # s, r
        "no mean": (2, 0.2), "more data": (1, 0.0)}
MORE = 1.2                               # 0.2 * 2 + 0.8: the bytes of s=2 r=.2 over plain training's
LR, MUON_LR = 1e-2, 1.4e-2


@dataclass
class Config(Idea):
    steps: int = 500                     # per arm, 2,048 positions each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


def bags(document, s):
    """-> a document like it, of windows s times as long: all but the first bag is predicted."""
    c = document.config
    size = (c.seq_len + 1) * s

    def read(split, i):
        tokens = document.tok.encode(window(split, c.seed, i, size))
        whole = len(tokens) - len(tokens) % s                    # a window that lost a piece of a character
        return tokens[:whole], [False] * s + [True] * (whole - s)

    return Documents(read, replace(c, row_tokens=c.row_tokens * s), document.tok)


def bag_loss(model, row, s, mean=True):
    """-> the sum over all predicted tokens of -log p given the bags before theirs."""
    tokens_T, _, _, _, cu = row
    tokens_BS = tokens_T.view(-1, s)
    cu_bags = [c // s for c in cu]
    lengths = [b - a for a, b in zip(cu_bags, cu_bags[1:])]
    positions_B = torch.cat([torch.arange(n) for n in lengths])
    into_BSD = model.embed(tokens_BS)
    into_BD = into_BSD.mean(1) if mean else into_BSD[:, -1]
    # the same model with another table, of which every row is read once
    hidden_BD = functional_call(model, {"embed.weight": into_BD}, (
        torch.arange(len(into_BD)), positions_B, packed_attention(cu_bags, max(lengths))))
    last = torch.tensor(cu_bags[1:]) - 1                         # the last bag of a text predicts nothing
    predicts = torch.ones(len(into_BD), dtype=torch.bool).index_fill(0, last, False)
    targets_NS = tokens_BS[1:][predicts[:-1]]
    hidden_ND = hidden_BD[predicts].repeat_interleave(s, dim=0)
    logp_N, _ = linear_logprob(hidden_ND, model.head_weight, targets_NS.flatten())
    return -logp_N.sum()


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    s, r = ARMS[arm]
    model, document = scratch("tiny", config.seed)               # the same weights for every arm
    document.config.eval_docs = config.asked
    optimizer = Optimizer(model, lr=LR, muon_lr=MUON_LR)
    total = round(config.steps * (MORE if arm == "more data" else 1))
    switch = round(r * total)

    def rate(step):
        return trapezoid(step, total, document.config)

    def loss_of_bags(model, row):
        return bag_loss(model, row, s, mean=arm != "no mean")

    for step, loss in steps(model, bags(document, s), optimizer, switch, loss=loss_of_bags, schedule=rate):
        trial.point(arm, step, loss)
    for step, loss in steps(model, document, optimizer, total, begin=switch):
        if step <= config.steps:
            trial.point(arm, step, loss)
    return evaluate(model, document)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, tuple(ARMS), config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    gain = {arm: 100 * (results["plain"]["loss"] - results[arm]["loss"]) for arm in ARMS}
    picture(trial, x="step", y="loss, nats per byte")
    note = (f"(s=4 r=.3 {gain['s=4 r=.3']:+.1f}, no mean {gain['no mean']:+.1f}, plain on as many bytes "
            f"{gain['more data']:+.1f})")
    return finish(trial, (gain["s=2 r=.2"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
