"""
context.py: ask a model far beyond the length it was trained at (interpolation 2306.15595, YaRN
2309.00071).

A rotary position turns pair i of a head by position / theta^(2i/d): waves of 6 to 20,000 tokens
here. Trained at 128 tokens, the long waves were seen over a part of their turn only; asked at s
times that length,

    none      goes on turning, into angles that were never seen
    linear    divides every position by s: no angle is new, and the short waves, which tell neighbours apart,
              are squeezed too
    NTK       theta * s^(d / (d - 2)): the longest wave stretched by s, the shortest hardly
    YaRN      waves that turned more than 32 times within the trained length stay, those that turned less than
              once are stretched by s, between them the ramp of the authors' code, linear in the pair's index
              (their text has one in turns); logits are multiplied by (0.1 ln s + 1)^2

Asked without tuning, and after 60 steps of tuning at the new length; RATES says which rates were
tried. The control is `none` tuned as long: a gain that it shows, too, is due to the tuning. Left
out: dynamic scaling, which chooses s from the length asked. The paper: Llama 2 7B taken from 4k to
64k in 400 steps, and in 200 more from there to 128k (the authors' script), with 10 times fewer
tokens and 2.5 times fewer steps than earlier ways; here all get as many, and the loss is compared.
Here: 0.16M parameters, bytes of Python's own library, 128 to 1,024; the loss is over the bytes
after the first 128 of each window.

    python -m ideas.context
    python -m bench ideas --names context
"""
import math
from dataclasses import dataclass, replace

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.hf import find
from common.optim import Optimizer
from data.documents import Documents
from data.stdlib import window
from kernels import linear_logprob, packed_attention
from train_gpt import GPT, packed_rows, scratch, steps

CLAIM = Claim(paper="2309.00071", says="10x fewer tokens, 2.5x fewer steps than others, Llama 2 to 128k",
              measured="loss at 8 times the trained length after 60 steps, below linear's",
              smallest=2.0, unit="0.01 nats")
WAYS = ("none", "linear", "NTK", "YaRN")
# of tuning: the loss at 1,024 of seed 11, 24 windows, at 3e-4, 1e-3, 3e-3. YaRN 1.383, 1.363, 1.385;
# linear 2.285, 2.009, 1.727, and 1.787 at 1e-2; the other two were not tried and have linear's
RATES = {"none": 3e-3, "linear": 3e-3, "NTK": 3e-3, "YaRN": 1e-3}
TRAINED = 128                            # bytes of a window, of the preset `tiny`


@dataclass
class Config(Idea):
    steps: int = 60                      # of tuning, 4,096 bytes each
    asked: int = 64                      # windows of 1,024 bytes for the loss, and twice as many of 512


# -----------------------------------------------------------------------------
# the idea


def stretched(shape, way, s):
    """-> the GPTConfig of a model that is asked at s times the length it was trained at."""
    if way == "NTK":
        d = shape.head_dim
        return replace(shape, rope_theta=shape.rope_theta * s ** (d / (d - 2)))
    if way == "linear":
        return replace(shape, rope_scaling=dict(rope_type="linear", factor=s))
    if way == "YaRN":                    # the ramp from 1 to 32 turns and the temperature are its defaults
        return replace(shape, rope_scaling=dict(rope_type="yarn", factor=s,
                                                original_max_position_embeddings=TRAINED))
    return shape


# -----------------------------------------------------------------------------
# the trial


def windows(document, length, rows):
    """-> a document like it, of windows of another length; `rows` of them are a step."""
    config = replace(document.config, seq_len=length, batch=rows, row_tokens=rows * (length + 1))

    def read(split, i):
        tokens = document.tok.encode(window(split, config.seed, i, length + 1))
        return tokens, [False] + [True] * (len(tokens) - 1)

    return Documents(read, config, document.tok)


@torch.no_grad()
def far_loss(model, document, asked):
    """-> nats per byte after the first TRAINED of each window, and the curve over positions."""
    length = document.config.seq_len
    total = torch.zeros(length, dtype=torch.float64)
    seen = torch.zeros(length, dtype=torch.float64)
    docs = [document("test", i) for i in range(asked)]
    for tokens_T, positions_T, at_N, targets_N, cu in packed_rows(docs, document.config.row_tokens, "cpu"):
        attend = packed_attention(cu, max(b - a for a, b in zip(cu, cu[1:])))
        hidden_ND = model(tokens_T, positions_T, attend)[at_N]
        logp_N, _ = linear_logprob(hidden_ND, model.head_weight, targets_N)
        total.index_add_(0, positions_T[at_N], -logp_N.double())
        seen.index_add_(0, positions_T[at_N], torch.ones_like(logp_N, dtype=torch.float64))
    return float(total[TRAINED:].sum() / seen[TRAINED:].sum()), (total / seen.clamp(min=1)).tolist()


def ask(way, trial, config, base, document):
    """-> {metric: loss} of one way, at 4 and 8 times the trained length, before and after tuning."""
    numbers = {}
    for s in (4, 8):
        length = s * TRAINED
        model = GPT(stretched(base.config, way, s))
        model.load_state_dict(base.state_dict())
        longer = windows(document, length, 1 if config.smoke else 4096 // length)
        asked = config.asked * 8 // s
        numbers[f"{length}"], curve = far_loss(model, longer, asked)
        if s == 8:
            for end in range(64, length + 1, 64):
                trial.dot("before tuning", way, end, math.fsum(curve[end - 64:end]) / 64)
        optimizer = Optimizer(model, lr=RATES[way])
        for step, loss in steps(model, longer, optimizer, config.steps, schedule=constant):
            trial.bar.update()
            if s == 8:
                trial.dot("", way, step, loss)
        numbers[f"{length} tuned"], _ = far_loss(model, longer, asked)
    return numbers


def constant(step):
    return 1.0


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, WAYS, 2 * config.steps)
    base = GPT.from_hf(find(trial.base("tiny")))
    _, document = scratch("tiny", config.seed)
    table = {way: ask(way, trial, config, base, document) for way in WAYS}
    gain = 100 * (table["linear"]["1024 tuned"] - table["YaRN"]["1024 tuned"])
    control = 100 * (table["none"]["1024 tuned"] - table["YaRN"]["1024 tuned"])
    picture(trial, x="step of tuning at 1,024", y="loss, nats per byte",
            **{"before tuning": ("position", "loss, nats per byte")})
    return finish(trial, (gain, 0.0), table, note=f"(below no scaling, tuned: {control:+.1f})")


if __name__ == "__main__":
    main()
