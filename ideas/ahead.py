"""
ahead.py: learn which tokens come soon, beside which comes next (token order prediction,
2508.19228).

    text        a b c a | d        target of `a b` for the second head, over the vocabulary:
                    1 2   3        softmax of -distance:  c 1, a 1/e, d 1/e^2, all else nothing

TOP adds one unembedding to the model, for training only, and one loss: the cross-entropy of its
softmax with the softmax of W - distance, where a token next appears within W. Only the order of
the near ones matters: the weights fall by e per token, so 16 of them are all but one part in
10^7. MTP, in the form without parameters that the speedrun of nanoGPT uses, asks the same head
for the tokens 2 and 3 ahead as well, with weights [1, 1/2, 1/4] that end at [1, 0, 0] after a
third of the steps, two terms until the second third. The control has TOP's head and weights in a
random order of the same 16 tokens, drawn anew in each step: what it gains is not due to what
comes soonest.

The paper: 340M, 1.8B and 7B parameters; TOP is above plain prediction and MTP on most of nine
benchmarks. Left out: benchmarks (the loss of the next byte is measured), MTP with blocks of its
own, and the paper's window, whose length its published code leaves to the caller. Here: 0.16M
parameters, Muon, 2,048 bytes of Python's own library per step; all arms read the same.

    python -m ideas.ahead
    python -m bench ideas --names ahead --seeds 5
"""
from dataclasses import dataclass

import torch
from torch import nn

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from kernels import linear_logprob, packed_attention
from train_gpt import evaluate, forward, scratch, steps

CLAIM = Claim(paper="2508.19228", says="TOP beats next tokens and MTP on nine benchmarks, 340M to 7B",
              measured="final loss of the next byte below plain training's", smallest=2.0,
              unit="0.01 nats")
ARMS = ("plain", "TOP", "no order", "MTP")
W = 16                                   # tokens that the order is of
WEIGHTS = (1.0, 0.5, 0.25)               # MTP: of the tokens 1, 2 and 3 ahead
LR, MUON_LR = 1e-2, 1.4e-2


@dataclass
class Config(Idea):
    steps: int = 500                     # per arm, 2,048 bytes each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the ideas


def order_targets(tokens_T, ends_T, vocabulary, order):
    """-> (T, V): how soon each token comes after each place of the row, as a distribution. order[d] is the
    distance that token d + 1 ahead is taken to have; ends_T: where the text of each place ends."""
    T = len(tokens_T)
    places_T = torch.arange(T)
    target_TV = torch.full((T, vocabulary), -torch.inf)
    for distance in reversed(range(W)):                          # the nearest is written last
        ahead_T = places_T + 1 + order.index(distance)
        inside_T = ahead_T < ends_T
        target_TV[places_T[inside_T], tokens_T[ahead_T[inside_T]]] = float(-distance)
    return target_TV.softmax(-1).nan_to_num()                    # the last token of a text: nothing comes


def order_loss(model, hidden_TD, row, order):
    """-> the sum over places of the cross-entropy of the second head with what comes soon"""
    tokens_T, _, at_N, _, cu = row
    ends_T = torch.cat([torch.full((b - a,), b) for a, b in zip(cu, cu[1:])])
    target_NV = order_targets(tokens_T, ends_T, len(model.top.weight), order)[at_N]
    return -(target_NV * model.top(hidden_TD[at_N]).log_softmax(-1)).sum()


def weights(part):
    """part: of the training that is done -> MTP's weights of the tokens 1, 2 and 3 ahead"""
    stage, along = divmod(3 * part, 1)
    if stage == 0:
        return [1.0, 0.5, 0.25 * (1 - along)]
    return [1.0, 0.5 * (1 - along)] if stage == 1 else [1.0]


def ahead_loss(model, hidden_TD, row, weights):
    """-> the sum over places of -log p of the tokens 1, 2, ... ahead, by the same head"""
    tokens_T, _, at_N, _, cu = row
    ends_T = torch.cat([torch.full((b - a,), b) for a, b in zip(cu, cu[1:])])
    loss = 0.0
    for ahead, weight in enumerate(weights, 1):
        there_M = at_N[at_N + ahead < ends_T[at_N]]
        logp_M, _ = linear_logprob(hidden_TD[there_M], model.head_weight, tokens_T[there_M + ahead])
        loss = loss - weight * logp_M.sum()
    return loss


def hidden_of(model, row):
    tokens_T, positions_T, _, _, cu = row
    return model(tokens_T, positions_T, packed_attention(cu, max(b - a for a, b in zip(cu, cu[1:]))))


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config):
    model, document = scratch("tiny", config.seed)               # the same weights and texts for every arm
    document.config.eval_docs = config.asked
    rand = torch.Generator().manual_seed(config.seed)
    if arm in ("TOP", "no order"):
        model.top = nn.Linear(model.config.d_model, model.config.vocab_size, bias=False)
        nn.init.normal_(model.top.weight, std=model.config.d_model**-0.5, generator=rand)
    done = 0

    def loss_of(model, row):
        if arm == "plain":
            return forward(model, row)
        hidden_TD = hidden_of(model, row)
        if arm == "MTP":
            return ahead_loss(model, hidden_TD, row, weights(done / config.steps))
        order = torch.randperm(W, generator=rand).tolist() if arm == "no order" else list(range(W))
        return ahead_loss(model, hidden_TD, row, [1.0]) + order_loss(model, hidden_TD, row, order)

    optimizer = Optimizer(model, lr=LR, muon_lr=MUON_LR)
    for done, loss in steps(model, document, optimizer, config.steps, loss=loss_of):
        trial.point(arm, done, loss)
        if done % (config.steps // 6 or 1) == 0:
            trial.dot("held out", arm, done, evaluate(model, document)["loss"])
    return evaluate(model, document)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    gain = {arm: 100 * (results["plain"]["loss"] - results[arm]["loss"]) for arm in ARMS}
    picture(trial, x="step", y="loss that is trained, nats", **{"held out": ("step", "loss, nats per byte")})
    note = f"(in no order {gain['no order']:+.1f}, MTP {gain['MTP']:+.1f})"
    return finish(trial, (gain["TOP"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
