"""
memorize.py: how many bits does a model hold? Counted on texts that mean nothing (2505.24832).

    N texts of S symbols, each one of V, drawn at random: N S log2 V bits, and nothing to understand.
    A model that is asked for them needs -log2 p(text) bits more. So it holds

        sum over texts of  max(0, S log2 V + log2 p(text))       and that by its parameters: the capacity

The paper: more texts do not help once a model is full, at 3.5 to 3.6 bits per parameter for any
shape of 100,000 to 20 million parameters (3.51 trained in bf16, 3.83 in fp32: twice the bits hold
9% more), after a million steps of 2,048 texts. "As much per parameter" and "bf16 loses little" are
what can be asked in minutes, since a model that still learns is not full: the gain is what is left
of an allowance of 15%, twice the paper's 8%, for what is lost when the weights are rounded to bf16
after each step. `smaller` and `smallest` have 0.43 and 0.29 of the parameters, and as many texts
for each of them: their bits per parameter should be the same. The controls: `unseen` are texts that
no model has read (there is nothing to hold), and `fewer bits` is rounded to 5 bits of mantissa
instead of 8, which is to show that rounding can be seen at all.

Here: V = 64, S = 32, as many texts as twice 3.6 bits per parameter are, Muon. Left out: text of a
language, where the bits that a larger model saves are taken off; several N, for the plateau.

    python -m ideas.memorize
    python -m bench ideas --names memorize
"""
import functools
import math
from dataclasses import dataclass, replace

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data.documents import Documents
from kernels import linear_logprob, packed_attention
from train_gpt import GPT, packed_rows, scratch, steps

CLAIM = Claim(paper="2505.24832", says="a model holds 3.83 bits per parameter in fp32 and 3.51 in bf16",
              measured="what is left of an allowance of 15% for what bf16 loses of the bits", smallest=5.0,
              unit="% of them")
ALLOWED = 15.0
# arm -> width and bits of the mantissa that weights are rounded to
ARMS = {"fp32": (32, None), "bf16": (32, 8), "fewer bits": (32, 5), "smaller": (20, None),
        "smallest": (16, None)}
V, S = 64, 32
FULL = 3.6                               # bits per parameter, as the paper found
LR, MUON_LR = 1e-2, 2e-2


@dataclass
class Config(Idea):
    steps: int = 1200                    # per arm
    batch: int = 128                     # texts in each


# -----------------------------------------------------------------------------
# the idea


def text(seed, i):
    """-> text i: the begin token V, and S symbols"""
    rand = torch.Generator().manual_seed(seed * 1_000_003 + i)
    return [V, *torch.randint(V, (S,), generator=rand).tolist()]


def endless(document, texts, seed):
    """-> a document of these texts, over and over, each time in another order"""
    known = [text(seed, i) for i in range(texts)]

    @functools.cache
    def order_of(epoch):
        return torch.randperm(texts, generator=torch.Generator().manual_seed(seed + epoch)).tolist()

    def read(split, i):
        epoch, place = divmod(i, texts)
        return known[order_of(epoch)[place]], [False] + [True] * S

    return Documents(read, document.config, document.tok)


@torch.no_grad()
def held(model, texts, row_tokens):
    """-> bits of these texts that the model holds"""
    bits = []
    docs = [(tokens, [False] + [True] * S) for tokens in texts]
    for tokens_T, positions_T, at_N, targets_N, cu in packed_rows(docs, row_tokens, "cpu"):
        hidden_TD = model(tokens_T, positions_T, packed_attention(cu, S + 1))
        logp_N, _ = linear_logprob(hidden_TD[at_N], model.head_weight, targets_N)
        bits.append(logp_N.double().view(-1, S).sum(1) / math.log(2))
    return float((S * math.log2(V) + torch.cat(bits)).clamp(min=0).sum())


def rounded(w, mantissa):
    """-> w to the nearest number with so many bits of mantissa, the one before the point among them"""
    fraction, exponent = torch.frexp(w)
    return torch.ldexp((fraction * 2**mantissa).round() / 2**mantissa, exponent)


# -----------------------------------------------------------------------------
# the trial


def size(model):
    return sum(p.numel() for p in model.parameters())


def built(width, config):
    shape, document = scratch("tiny", config.seed)
    c = replace(shape.config, vocab_size=V + 1, n_layer=2, n_head=2, n_kv_head=2, head_dim=width // 2,
                d_model=width, d_ff=2 * width)
    document.config.batch = config.batch
    return GPT(c).init_weights(config.seed, embedding=0.7), document


def train(arm, trial, config):
    width, mantissa = ARMS[arm]
    model, document = built(width, config)
    count = 8 if config.smoke else round(2 * FULL * size(model) / (S * math.log2(V)))
    read = endless(document, count, config.seed)
    known = [text(config.seed, i) for i in range(count)]
    others = [text(config.seed + 1, i) for i in range(count)]
    optimizer = Optimizer(model, lr=LR, muon_lr=MUON_LR, weight_decay=0)
    for step, loss in steps(model, read, optimizer, config.steps):
        if mantissa:
            for p in model.parameters():
                p.data.copy_(rounded(p.data, mantissa))
        trial.bar.update()
        if step % (config.steps // 10 or 1) == 0:
            bits = held(model, known, document.config.row_tokens)
            trial.dot("", arm, step, bits / size(model))
    bits = held(model, known, document.config.row_tokens)
    return dict(bits=bits / size(model), unseen=held(model, others, document.config.row_tokens) / size(model),
                parameters=size(model), texts=count, epochs=config.steps * config.batch / count)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps batch")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, tuple(ARMS), config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    bits = {arm: row["bits"] for arm, row in results.items()}
    lost = {arm: 100 * (1 - bits[arm] / max(bits["fp32"], 1e-9)) for arm in ARMS}
    picture(trial, x="step", y="bits held per parameter")
    note = (f"(bits per parameter: fp32 {bits['fp32']:.2f}, smaller {bits['smaller']:.2f} and "
            f"{bits['smallest']:.2f}, unseen {results['fp32']['unseen']:.2f}; fewer bits lose "
            f"{lost['fewer bits']:.0f}%)")
    return finish(trial, (ALLOWED - lost["bf16"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
