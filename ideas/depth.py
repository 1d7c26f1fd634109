"""
depth.py: let deep blocks join later (ProRes, 2603.05369; architecture warm-up, 2606.16768).

    x = x + a(l, t) attention(norm(x))              a(l, t) = min(t / (T l), 1), block l of L, step t
    x = x + a(l, t) mlp(norm(x))                    block 1 is whole after T steps, block L after T L

ProRes: deep blocks wait until what they read has settled. With T L = 24% of the steps, as in the
paper (T = 1,000, 24 blocks, 100,000 steps). `reverse` is the control: as many factors, as long, the
deepest first; and a = 1 is the usual block to the bit. The paper: perplexity 12.36 to 11.74 at 350M
(0.05 nats) on C4, with AdamW and pre-norm, the rate tuned for each arm: here each has the lower loss
of two rates. In all arms QK-norm is off and no matrix begins at zero, or there is little to settle.

Architecture warm-up has the deeper half of the blocks begin with every matrix zero, out of the
optimizer, and adds them group by group: "all paths start from zero". So they do, and they stay:
a zero matrix passes nothing forward and nothing backward, and what a block writes is a product of
two of them, so that the gradient of each is zero (a test shows it for all, gains too). `zero blocks`
is that arm: a model of half the depth, whatever is unlocked. How the paper escapes was not found.
From it too: the largest eigenvalue of P^-1/2 H P^-1/2 (H the Hessian, P Adam's sqrt(v) + eps), by
power iteration that begins with the last vector, five products H v a time; here H v is a difference
of two gradients. Adam is at its edge where it is 38 / rate.

    python -m ideas.depth
    python -m bench ideas --names depth
"""
from dataclasses import dataclass, replace

import torch

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from kernels import linear, qk_norm_rope, rms_norm, swiglu
from train_gpt import GPT, Block, evaluate, forward, packed_rows, scratch, steps, targets_of

CLAIM = Claim(paper="2603.05369", says="ProRes: perplexity 12.36 to 11.74 at 350M, 14.67 to 14.30 at 130M",
              measured="final loss below the plain model's, each at the better of two rates", smallest=2.0,
              unit="0.01 nats")
ARMS = ("plain", "ProRes", "reverse", "zero blocks")
SHAPE = dict(n_layer=8, n_head=3, n_kv_head=3, d_model=48, d_ff=96, qk_norm=False)       # 0.2M parameters
RATES = (5e-3, 1.5e-2)                   # AdamW
SETTLED = 0.24                           # of the steps, until all blocks are whole
PRODUCTS = 5                             # H v for each look at the curvature


@dataclass
class Config(Idea):
    steps: int = 200                     # per arm and rate
    batch: int = 16                      # windows of 128 bytes in each
    asked: int = 512                     # windows for the losses at the end


# -----------------------------------------------------------------------------
# the ideas


class Scaled(Block):
    """Block with a factor on what it adds."""
    factor = 1.0

    def forward(self, x_TD, cos_T, sin_T, attend, layer):
        qkv = linear(rms_norm(x_TD, self.attn_norm.weight, self.eps), self.qkv.weight, self.qkv.bias)
        heads = qkv.view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = heads.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = qk_norm_rope(q, k, None, None, cos_T, sin_T, self.eps)
        added = linear(attend(layer, q, k, v).flatten(1), self.out.weight, strided=True)
        x_TD = x_TD + self.factor * added
        normed = rms_norm(x_TD, self.mlp_norm.weight, self.eps)
        hidden = swiglu(linear(normed, self.gate_up.weight, strided=True))
        return x_TD + self.factor * linear(hidden, self.down.weight, strided=True)


def factors(arm, step, total, blocks):
    """-> a(l, t) of each block, the first one first"""
    if arm not in ("ProRes", "reverse"):
        return [1.0] * blocks
    first = max(1.0, SETTLED * total / blocks)                   # T
    found = [min(step / (first * l), 1.0) for l in range(1, blocks + 1)]
    return found if arm == "ProRes" else found[::-1]


def built(arm, config):
    shape, document = scratch("tiny", config.seed)
    document.config.batch = config.batch
    document.config.eval_docs = config.asked
    model = GPT(replace(shape.config, **SHAPE), block=Scaled).init_weights(config.seed, embedding=0.7)
    rand = torch.Generator().manual_seed(config.seed)
    for l, block in enumerate(model.blocks):
        for matrix in (block.out.weight, block.down.weight):     # zeros until here
            matrix.data = torch.randn(matrix.shape, generator=rand) * matrix.shape[1] ** -0.5
        if arm == "zero blocks" and l >= len(model.blocks) // 2:
            for matrix in (block.qkv, block.out, block.gate_up, block.down):
                matrix.weight.data.zero_()
    return model, document


# -----------------------------------------------------------------------------
# the curvature


def power_iteration(gradient, scales, vector, size=1e-2):
    """gradient: a list of steps away from here -> the gradients there. -> the largest eigenvalue of
    S H S, S diagonal, and its vector, to begin with the next time"""
    for _ in range(PRODUCTS):
        norm = torch.stack([v.square().sum() for v in vector]).sum().sqrt()
        vector = [v / norm for v in vector]
        moved = [size * s * v for s, v in zip(scales, vector)]
        ahead = gradient(moved)
        behind = gradient([-m for m in moved])
        after = [s * (a - b) / (2 * size) for s, a, b in zip(scales, ahead, behind)]
        value = float(torch.stack([(v * a).sum() for v, a in zip(vector, after)]).sum())
        vector = after
    return value, vector


def curvature(model, optimizer, document, vector):
    """-> the largest eigenvalue of the Hessian as Adam sees it, on the first batch; its vector"""
    # text that was read: a byte that never had a gradient has a P of eps alone
    docs = [document("train", i) for i in range(document.config.batch)]
    row = next(packed_rows(docs, document.config.row_tokens, "cpu"))
    weights = list(model.parameters())
    here = [w.detach().clone() for w in weights]
    shards = {id(s.param): s for s in optimizer.shards}
    left = 1 - optimizer.betas[1] ** optimizer.steps
    roots = [(shards[id(w)].v / left).sqrt().add(optimizer.eps).rsqrt().view_as(w) for w in weights]

    def gradient(moved):
        for w, h, m in zip(weights, here, moved):
            w.data.copy_(h + m)
        found = torch.autograd.grad(forward(model, row) / targets_of(docs), weights, materialize_grads=True)
        for w, h in zip(weights, here):
            w.data.copy_(h)
        return found

    if vector is None:
        rand = torch.Generator().manual_seed(0)
        vector = [torch.randn(w.shape, generator=rand) for w in weights]
    return power_iteration(gradient, roots, vector, size=1e-3)


# -----------------------------------------------------------------------------
# the trial


def train(arm, trial, config, rate):
    model, document = built(arm, config)
    optimizer = Optimizer(model, lr=rate)
    done = 0
    vector = None

    def scaled(model, row):
        for block, factor in zip(model.blocks, factors(arm, done, config.steps, len(model.blocks))):
            block.factor = factor
        return forward(model, row)

    for done, loss in steps(model, document, optimizer, config.steps, loss=scaled):
        trial.bar.update()
        if rate == RATES[0]:
            trial.dot("", arm, done, loss)
        if rate == RATES[0] and arm in ARMS[:2] and done in (config.steps // 10, config.steps // 2):
            value, vector = curvature(model, optimizer, document, vector)
            trial.dot("curvature", arm, done, value * rate)
    for block in model.blocks:
        block.factor = 1.0
    return evaluate(model, document)["loss"]


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps batch asked")
    from_scratch(config)
    rates = RATES[:1] if config.smoke else RATES
    trial = begin(config, __file__, CLAIM, ARMS, len(rates) * config.steps)
    results = {}
    for arm in ARMS:
        losses = {f"at {rate:g}": train(arm, trial, config, rate) for rate in rates}
        results[arm] = dict(loss=min(losses.values()), **losses)
    gain = {arm: 100 * (results["plain"]["loss"] - row["loss"]) for arm, row in results.items()}
    picture(trial, x="step", y=f"loss at rate {RATES[0]:g}, nats per byte",
            curvature=("step", "largest eigenvalue times rate"))
    note = f"(reverse {gain['reverse']:+.1f}, zero blocks {gain['zero blocks']:+.1f})"
    return finish(trial, (gain["ProRes"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
