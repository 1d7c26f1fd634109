"""
fim.py: learn to fill in the middle by moving it to the end (arXiv 2207.14255).

Half of the documents are cut at two random characters, and their middle is written last:

    prefix middle suffix   ->   <PRE> prefix <SUF> suffix <MID> middle       (PSM, half of them)
                                <PRE> <SUF> suffix <MID> prefix middle       (SPM, the other half)

The loss is on everything, as it was. The paper calls this free: at 50M to 6.9B parameters, half of
100B tokens moved, the loss left to right is the one of a model that saw no such document. Here:
0.16M parameters, Muon, windows of 128 bytes of Python's own library, three of the four special ids
as sentinels (a moved window is three bytes shorter, so that all arms read as many tokens). Left
out: the end token after the middle (nothing here asks where a middle stops), and cuts between lines
or tokens, which are the same for bytes. "Free" is a claim that nothing is lost, so the gain is what
is left of an allowance of 0.03 nats. What is won is in the note: the share of a middle's bytes that
is right, given what is on both sides, against the plain model given the left side. The control is
moved the same, with the suffix of another window: what it wins of the middle is not due to seeing
what follows.

    python -m ideas.fim
    python -m bench ideas --names fim
"""
from dataclasses import dataclass, replace

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data import stream
from data.documents import Documents
from data.stdlib import window
from kernels import packed_attention
from train_gpt import evaluate, packed_rows, scratch, steps

CLAIM = Claim(paper="2207.14255", says="filling in is free: as good left to right, 50M to 6.9B",
              measured="what is left of an allowance of 0.03 nats, left to right", smallest=1.0,
              unit="0.01 nats")
ARMS = ("plain", "fim", "wrong suffix")
PRE, SUF, MID = "<|user|>", "<|assistant|>", "<|system|>"        # their ids mean nothing else in this corpus
ALLOWED = 3.0                            # 0.01 nats
LR, MUON_LR = 1e-2, 1.4e-2


@dataclass
class Config(Idea):
    steps: int = 900                     # per arm, 16 windows of 128 bytes each
    share: float = 0.5                   # of the windows: moved
    asked: int = 512                     # windows for the losses at the end


# -----------------------------------------------------------------------------
# the idea


def cut(text, draw):
    """-> prefix, middle, suffix: cut at two places, uniformly"""
    a, b = sorted(int(draw() * (len(text) + 1)) for _ in range(2))
    return text[:a], text[a:b], text[b:]


def moved(prefix, middle, suffix, spm):
    if spm:
        return f"{PRE}{SUF}{suffix}{MID}{prefix}{middle}"
    return f"{PRE}{prefix}{SUF}{suffix}{MID}{middle}"


def mixed(document, share, wrong=False):
    """-> a document like it: a share of its windows moved."""
    c = document.config

    def read(split, i):
        draw = stream("fim", split, c.seed, i)
        if split == "train" and draw() < share:
            spm = draw() < 0.5
            prefix, middle, suffix = cut(window(split, c.seed, i, c.seq_len - 2), draw)
            if wrong:
                suffix = other(split, c, i, len(suffix))
            text = moved(prefix, middle, suffix, spm)
        else:
            text = window(split, c.seed, i, c.seq_len + 1)
        tokens = document.tok.encode(text)
        return tokens, [False] + [True] * (len(tokens) - 1)

    return Documents(read, c, document.tok)


def other(split, c, i, length):
    """-> the end of a window that has nothing to do with window i"""
    text = window(split, c.seed + 1_000_003, i, c.seq_len - 2)
    return text[len(text) - length:]


# -----------------------------------------------------------------------------
# the trial


@torch.no_grad()
def filled(model, document, asked, both, wrong=False):
    """-> share of the bytes of the middles that are the model's first choice. both: it sees what follows"""
    c = document.config
    docs = []
    for i in range(asked):
        text = window("test", c.seed, i, c.seq_len - 2)
        prefix, middle, suffix = cut(text, stream("fim", "test", c.seed, i))
        if not middle or not prefix:
            continue
        if wrong:
            suffix = other("test", c, i, len(suffix))
        text = moved(prefix, middle, suffix, spm=False) if both else prefix + middle
        tokens = document.tok.encode(text)
        size = len(document.tok.encode(middle))
        docs.append((tokens, [False] * (len(tokens) - size) + [True] * size))
    right = total = 0
    for tokens_T, positions_T, at_N, targets_N, cu in packed_rows(docs, c.row_tokens, "cpu"):
        attend = packed_attention(cu, max(b - a for a, b in zip(cu, cu[1:])))
        hidden_ND = model(tokens_T, positions_T, attend)[at_N]
        right += int(((hidden_ND @ model.head_weight.t()).argmax(-1) == targets_N).sum())
        total += len(targets_N)
    return right / max(1, total)


def train(arm, trial, config):
    model, document = scratch("tiny", config.seed)               # the same weights for every arm
    document.config.eval_docs = config.asked
    read = document if arm == "plain" else mixed(document, config.share, wrong=arm == "wrong suffix")
    optimizer = Optimizer(model, lr=LR, muon_lr=MUON_LR)
    for step, loss in steps(model, read, optimizer, config.steps):
        trial.point(arm, step, loss)
    both = arm != "plain"
    asked = replace(document.config, row_tokens=8192)
    middles = filled(model, Documents(document.read, asked, document.tok), 2 * config.asked, both,
                     wrong=arm == "wrong suffix")
    return dict(evaluate(model, document), middle=100 * middles)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    cost = 100 * (results["fim"]["loss"] - results["plain"]["loss"])
    middles = ", ".join(f"{arm} {results[arm]['middle']:.1f}%" for arm in ARMS)
    picture(trial, x="step", y="loss of what is read, nats per token")
    return finish(trial, (ALLOWED - cost, 0.0), results, note=f"(bytes of the middle right: {middles})")


if __name__ == "__main__":
    main()
