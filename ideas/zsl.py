"""
zsl.py: why does the loss fall ever slower? Zero-sum learning (2506.05447).

    dl_i   change of the loss of token i from step t to step 2t, on text that is not trained
    M      mean of |dl_i|                        how much the losses move
    D      1 - |sum dl_i| / sum |dl_i|           how much of that cancels: 0 none of it, 1 all of it
    |change of the mean loss| = M (1 - D)        exactly

Drawn over log steps, the log of the loss falls along a line, bends once (deceleration), and falls
along a flatter line. By the identity it is slower because losses move less, or because what some
tokens win others lose. The paper finds the second, zero-sum learning: D goes towards 1 as the line
bends, M falls little; larger models bend later, at a lower loss. So from the pairs (t, 2t) before
the kink to those after it, the logarithm of the slow-down is the sum of that of M and that of 1 -
D. The gain is the second above the first (its size: where losses move more, that is no reason).

The paper: OLMo models of 14M to 472M. Its kink is that of a smoothly broken power law; here two
lines that meet, by least squares. Left out: gradients that oppose each other, which its D of losses
stands for, and pairs of one step. Here: 0.16M parameters and `narrow` of 0.04M, AdamW at a constant
rate, since a rate that falls would shrink M by itself. D is also near 1 where there is nothing left
to learn, and no text has to be worse for it: the control, `shuffled`, reads the bytes of each
window in a random order, and can learn but their frequencies.

    python -m ideas.zsl
    python -m bench ideas --names zsl
"""
import math
from dataclasses import dataclass, replace

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data.documents import Documents
from kernels import linear_logprob, packed_attention
from train_gpt import GPT, packed_rows, scratch, steps

CLAIM = Claim(paper="2506.05447", says="loss slows down because tokens cancel, not because they stop moving",
              measured="slow-down that is due to cancelling above that due to smaller moves", smallest=10.0,
              unit="% (of a logarithm)")
ARMS = ("0.16M", "narrow", "shuffled")
NARROW = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64)
LR = 1e-2                                # AdamW
WARMUP = 10                              # steps


@dataclass
class Config(Idea):
    first: int = 10                      # step of the first look
    doublings: int = 6                   # looks at first * 2^(j/2) steps, to 2^doublings times the first
    batch: int = 16                      # windows of 128 bytes in a step
    asked: int = 128                     # windows whose tokens are looked at


# -----------------------------------------------------------------------------
# the measures


def interference(before_N, after_N):
    """-> (M, D) of the losses of the same tokens, in float64"""
    change_N = (after_N - before_N).double()
    moved = float(change_N.abs().mean())
    return moved, 1 - float(change_N.mean().abs()) / max(moved, 1e-300)


def kink(x, y):
    """-> the place in x where two lines that meet there fit y best; two points or more on either side"""
    x, y = (torch.tensor(values, dtype=torch.float64) for values in (x, y))

    def error(at):
        lines = torch.stack([torch.ones_like(x), x, (x - at).clamp(min=0)], dim=1)
        return float((lines @ torch.linalg.lstsq(lines, y).solution - y).square().sum())

    return min(x[2:-2].tolist(), key=error)


def slowdown(steps, losses):
    """steps: of the looks, every second twice the one before; losses: (looks, N) -> the kink's step, and of
    the slow-down from before to after it how much is less movement, and how much is cancelling: logarithms"""
    at = math.exp(kink([math.log(step) for step in steps], [math.log(float(one.mean())) for one in losses]))
    parts = {True: [], False: []}
    for i in range(len(steps) - 2):
        moved, cancelled = interference(losses[i], losses[i + 2])
        if steps[i + 2] <= at * 1.01 or steps[i] >= at * 0.99:
            parts[steps[i] >= at * 0.99].append((math.log(moved), math.log(1 - cancelled)))
    before, after = (torch.tensor(part).mean(0) for part in (parts[False], parts[True]))
    return at, *(before - after).tolist()


# -----------------------------------------------------------------------------
# the trial


@torch.no_grad()
def each_loss(model, document, asked):
    """-> (N): -log p of every token of the first held-out texts"""
    found = []
    docs = [document("valid", i) for i in range(asked)]
    for tokens_T, positions_T, at_N, targets_N, cu in packed_rows(docs, document.config.row_tokens, "cpu"):
        hidden_TD = model(tokens_T, positions_T, packed_attention(cu, max(b - a for a, b in zip(cu, cu[1:]))))
        found.append(-linear_logprob(hidden_TD[at_N], model.head_weight, targets_N)[0])
    return torch.cat(found)


def shuffled(document):
    """-> a document like it, the bytes of each text in an order of their own"""
    def read(split, i):
        tokens, trained = document(split, i)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(i))
        return [tokens[k] for k in order.tolist()], trained

    return Documents(read, document.config, document.tok)


def looks(config):
    first, last = (2, 2) if config.smoke else (config.first, config.doublings)
    return [round(first * 2**(j / 2)) for j in range(2 * last + 1)]


def train(arm, trial, config):
    """-> (looks, N) losses of each held-out token"""
    model, document = scratch("tiny", config.seed)
    document.config.batch = config.batch
    if arm == "narrow":
        model = GPT(replace(model.config, **NARROW)).init_weights(config.seed, embedding=0.7)
    if arm == "shuffled":
        document = shuffled(document)
    whens = looks(config)
    losses = []
    for step, _ in steps(model, document, Optimizer(model, lr=LR), whens[-1],
                         schedule=lambda step: min(1.0, (step + 1) / WARMUP)):
        trial.bar.update()
        if step in whens:
            losses.append(each_loss(model, document, config.asked))
            trial.dot("", arm, math.log2(step), losses[-1].double().mean().log())
            if len(losses) > 2:
                moved, cancelled = interference(losses[-3], losses[-1])
                trial.dot("cancelled, D", arm, math.log2(step), cancelled)
                trial.dot("moved, M", arm, math.log2(step), moved)
    return losses


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "first doublings batch asked")
    from_scratch(config)
    whens = looks(config)
    trial = begin(config, __file__, CLAIM, ARMS, whens[-1])
    results = {}
    for arm in ARMS:
        losses = train(arm, trial, config)
        at, less, cancelling = slowdown(whens, losses)
        bend = float(losses[min(range(len(whens)), key=lambda i: abs(whens[i] - at))].mean())
        results[arm] = dict(kink=at, there=bend, loss=float(losses[-1].mean()), moving=less,
                            cancelling=cancelling, above=100 * (cancelling - abs(less)))
    axes = "log2 of the step 2t", "from t to 2t"
    picture(trial, x="log2 of the step", y="log of the loss", **{"cancelled, D": axes, "moved, M": axes})
    above = {arm: row["above"] for arm, row in results.items()}
    note = (f"(narrow {above['narrow']:+.0f}, shuffled {above['shuffled']:+.0f}; the kink at "
            f"{results['0.16M']['there']:.2f} nats, narrow {results['narrow']['there']:.2f})")
    return finish(trial, (above["0.16M"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
