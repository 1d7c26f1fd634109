"""
fp4.py: products of 4-bit floats, right on average (MXFP4, arXiv 2502.20586), and two other recipes.

E2M1 knows 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; a block shares a scale. It is emulated in
fp32: what is measured is the loss, never the time.

    MXFP4     blocks of 32, the scale a power of two; |x| / scale is below 8, above 6 it is cut. The
              operands of the products of the backward pass: times 3/4 (nothing is cut), the level
              above or below drawn so that the mean is x, times 4/3. Before it they are turned along
              the sum by a Hadamard matrix with random signs: (a S H)(b S H)^T = a b^T, and spread
    NVFP4     2505.19115: blocks of 16, scales E4M3 and one per tensor; forward nearest, backward
              drawn but for weights. Its rule: too few bits below sqrt(3) of the gradient "over noise"
    Quartet   2505.14669: MXFP4 forward, too, turned; there the scale of least error (normal x)

The code of all three was read. Left out: a last stretch in more bits; Hadamard matrices of 64 (32, as
Quartet's); head, embeddings and attention stay whole, as there. Here: 0.16M parameters, bytes of Python's
library; equal weights, batches, rate. Control: MXFP4 with nearest levels, which err less, but to one side.

    python -m ideas.fp4
    python -m bench ideas --names fp4
"""
from dataclasses import dataclass
from functools import cache, partial, reduce

import torch
import torch.nn.functional as F

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from kernels import linear, qk_norm_rope, swiglu
from train_gpt import GPT, Block, evaluate, forward, packed_rows, scratch, steps

CLAIM = Claim(paper="2502.20586", says="backward products in MXFP4 are near-lossless, GPT to 6.7B",
              measured="what is left of an allowance of 0.02 nats, MXFP4 backward against fp32",
              smallest=0.5, unit="0.01 nats")
# (the forward's operands, the backward's, turned?); baseline; idea; control; and others
ARMS = {"fp32": ("", "", False), "MXFP4": ("", "mx drawn", True), "MXFP4, nearest": ("", "mx", True),
        "MXFP4, not turned": ("", "mx drawn", False), "NVFP4": ("nv", "nv drawn", False),
        "Quartet": ("quest", "mx drawn", True)}
SIZE = 32                # of MXFP4's blocks, and of a Hadamard matrix, which is its own inverse
H = reduce(torch.kron, [torch.tensor([[1.0, 1.0], [1.0, -1.0]])] * 5) * SIZE**-0.5
LEAST_ERROR = 2.92247856 / 6             # Quartet's scale for a standard deviation of 1
LR = 1e-2


@dataclass
class Config(Idea):
    steps: int = 150                     # optimizer steps per arm, 2,048 bytes each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


def level(x, u=0.5):
    """-> the E2M1 number below or above x; u: uniform in [0, 1), or 0.5 for the nearest"""
    size = x.abs()
    step = torch.where(size >= 4, 2.0, torch.where(size >= 2, 1.0, 0.5))
    return (size / step).add_(u).floor_().mul_(step).clamp_(max=6).copysign_(x)


def scale_of(blocks, kind):
    if kind == "quest":
        return 2 ** (LEAST_ERROR * blocks.std(1, keepdim=True, correction=0) + 1e-8).log2().floor()
    largest = blocks.abs().amax(1, keepdim=True).clamp(min=1e-20)
    if kind.startswith("nv"):
        whole = largest.max() / (6 * 448)                        # E4M3 ends at 448
        return (largest / 6 / whole).to(torch.float8_e4m3fn).float().clamp(min=2**-9) * whole
    power = 2 ** (largest.log2().floor() - 2)
    return power * 4 / 3 if kind.endswith("drawn") else power


def rounded(x, kind, generator):
    """-> x as 4 bits say it, and where it was not cut"""
    if not kind:
        return x, None
    blocks = x.reshape(-1, 16 if kind.startswith("nv") else SIZE)
    scale = scale_of(blocks, kind)
    u = torch.rand(blocks.shape, generator=generator) if kind.endswith("drawn") else 0.5
    seen = blocks / scale
    return (level(seen, u) * scale).view_as(x), (seen.abs() <= 6).view_as(x)


def turned(x):
    return (x.reshape(-1, SIZE) @ H).view_as(x)


class Product(torch.autograd.Function):
    """x w^T; the width of x, and the rows of w, are multiples of 32."""

    @staticmethod
    def forward(ctx, x_TD, w_ND, arm, generator):
        ahead, ctx.behind, ctx.turn = ARMS[arm]
        ctx.generator = generator
        if ahead == "quest":
            x_TD, w_ND = turned(x_TD), turned(w_ND)
        ctx.of_w = ahead if ahead == "nv" else ctx.behind        # NVFP4's weights are never drawn
        (x, x_kept), (w, w_kept) = (rounded(each, ahead, generator) for each in (x_TD, w_ND))
        ctx.kept = [x_kept, w_kept] if ahead == "quest" else None
        ctx.save_for_backward(*([x, w] if ctx.kept else [x_TD, w_ND]))
        return x @ w.t()

    @staticmethod
    def backward(ctx, g_TN):
        x_TD, w_ND = ctx.saved_tensors
        found = [product(g_TN, w_ND.t(), ctx, ctx.of_w),
                 product(g_TN.t(), x_TD.t(), ctx, ctx.behind)]
        if ctx.kept:                     # the gradient of what was cut is 0; then it is turned back
            found = [turned(g * kept) for g, kept in zip(found, ctx.kept)]
        return *found, None, None


def product(a, b, ctx, kind):
    """a b^T, both rounded along the sum; kind: of b"""
    more = -a.shape[1] % SIZE
    a, b = F.pad(a, (0, more)), F.pad(b, (0, more))
    if ctx.turn:
        signs = torch.randint(2, (a.shape[1],), generator=ctx.generator) * 2.0 - 1
        a, b = turned(a * signs), turned(b * signs)
    return rounded(a, ctx.behind, ctx.generator)[0] @ rounded(b, kind, ctx.generator)[0].t()


class FourBits(Block):
    def __init__(self, c, arm, generator):
        super().__init__(c)
        self.way = arm, generator

    def product(self, x, w):
        return linear(x, w) if self.way[0] == "fp32" else Product.apply(x, w, *self.way)

    def forward(self, x_TD, cos_T, sin_T, attend, layer):
        heads = self.product(self.attn_norm(x_TD), self.qkv.weight).view(len(x_TD), -1, self.head_dim)
        q, k, v = heads.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos_T, sin_T, self.eps)
        x_TD = x_TD + self.product(attend(layer, q, k, v).flatten(1), self.out.weight)
        hidden = swiglu(self.product(self.mlp_norm(x_TD), self.gate_up.weight))
        return x_TD + self.product(hidden, self.down.weight)


# -----------------------------------------------------------------------------
# the trial


@cache
def errors(kind, draws=100):
    """-> percent of a block's largest number that is lost on average, and of all that is changed"""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(256, SIZE, generator=g)
    seen = torch.stack([rounded(x, kind, g)[0] for _ in range(draws if kind.endswith("drawn") else 1)])
    lost = ((x - seen.mean(0)) / x)[x.abs() == x.abs().amax(1, keepdim=True)].mean()
    return dict(bias=100 * float(lost), error=100 * float((seen - x).square().mean().sqrt()))


def over_noise(model, arm, document, seed):
    """-> the norm of a step's gradient over that of what 4 bits add to it"""
    twins = [in_bits(model, kind, seed) for kind in ("fp32", arm)]
    row = next(packed_rows([document("train", i) for i in range(document.config.batch)], 4096, "cpu"))
    for twin in twins:
        forward(twin, row).backward()
    exact, noisy = (torch.cat([w.grad.flatten() for w in twin.blocks.parameters()]) for twin in twins)
    return float(exact.norm() / (noisy - exact).norm())


def in_bits(model, arm, seed):
    """-> a copy of a model, with the products of an arm"""
    block = partial(FourBits, arm=arm, generator=torch.Generator().manual_seed(seed))
    twin = GPT(model.config, block)
    twin.load_state_dict(model.state_dict())
    return twin


def train(arm, trial, config):
    like, document = scratch("tiny", config.seed)                # every arm's weights and batches
    document.config.eval_docs = config.asked
    document.config.batch = min(16, config.asked)                # three windows with --smoke
    model = in_bits(like, arm, config.seed)
    for step, loss in steps(model, document, Optimizer(model, lr=LR), config.steps):
        trial.point(arm, step, loss)
    result = evaluate(model, document)
    if arm == "fp32":
        return result
    return {**result, **errors(ARMS[arm][1]), "over noise": over_noise(model, arm, document, config.seed)}


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, tuple(ARMS), config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    cost = {arm: 100 * (found["loss"] - results["fp32"]["loss"]) for arm, found in results.items()}
    picture(trial, x="step", y="loss, nats per byte")
    note = f"(nearest costs {cost['MXFP4, nearest']:+.1f}, Quartet {cost['Quartet']:+.1f})"
    return finish(trial, (2 - cost["MXFP4"], 0.0), results, note)


if __name__ == "__main__":
    main()
