"""
common/norms.py: RMSNorm and its rotation on a CPU in fp32, their gradients by hand.

    y = x / size, size = sqrt(mean x^2 + eps)       dx = (g - y mean(g y)) / size
    turned: (a cos - b sin, b cos + a sin)          back: the same with -sin

F.rms_norm is nine small operations there, and autograd keeps and undoes each. What is here is proved
against the definitions of kernels.py at the first use, gradients included, as all of common/cpu.py is.
"""

import torch

from common import cpu


class Norm(torch.autograd.Function):
    """RMSNorm of each row. F.rms_norm keeps every small step of it for the backward."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        size = cpu.root_mean_square(x, eps)
        y = x / size
        ctx.save_for_backward(y, size, weight)
        return y * weight

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, size, weight = ctx.saved_tensors
        return norm_backward(grad * weight, y, size), (grad * y).flatten(0, -2).sum(0), None


def norm_backward(grad, y, size):
    """What a row gains along itself changes its size alone, which is divided away."""
    along = (grad * y).sum(-1, keepdim=True).div_(-y.shape[-1])
    return grad.addcmul(y, along).div_(size)


def norm(x, weight, eps):
    return Norm.apply(x, weight, eps)


class NormRope(torch.autograd.Function):
    """RMSNorm and rotation of all heads, query and key heads together."""

    @staticmethod
    def forward(ctx, x_THd, weight_Hd, cos, sin, eps):
        size = cpu.root_mean_square(x_THd, eps)
        y = x_THd / size
        ctx.save_for_backward(y, size, weight_Hd, cos, sin)
        return turned(y * weight_Hd, cos, sin)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        y, size, weight_Hd, cos, sin = ctx.saved_tensors
        grad = turned(grad, cos, -sin)                       # back
        return norm_backward(grad * weight_Hd, y, size), (grad * y).sum(0), None, None, None


def turned(x, cos, sin):
    return (x * cos).addcmul_(x.roll(x.shape[-1] // 2, -1), sin)


def norm_rope(q, k, q_weight, k_weight, cos_T, sin_T, eps):
    heads = q.shape[1], k.shape[1]
    weight_Hd = torch.cat([w.expand(n, -1) for w, n in zip((q_weight, k_weight), heads)])
    x = NormRope.apply(torch.cat((q, k), 1), weight_Hd, *cpu.wide_tables(cos_T, sin_T), eps)
    return x.split_with_sizes(heads, 1)


def _norm_probe(rand):
    return (rand(6, 24) * 1e-2).requires_grad_(), rand(24).requires_grad_(), 1e-6


def _norm_rope_probe(rand):
    *leaves, cos, sin, eps = cpu.PROBES["qk_norm_rope"](rand)
    return *(x.requires_grad_() for x in leaves), cos, sin, eps


cpu.PROBES["norm"] = _norm_probe
cpu.PROBES["norm_rope"] = _norm_rope_probe
