"""
Small models whose numbers are random where init_weights leaves zeros, which would hide things.
"""
import torch


@torch.no_grad()
def random_matrices(model, seed=0):
    """-> the model, all matrices drawn anew"""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2:
            p.copy_(torch.randn(p.shape, generator=g) * p.shape[1] ** -0.5 * 1.5)
    return model


@torch.no_grad()
def nudged(model, seed, size, matrices_only=False):
    """-> the model, every number moved by about `size`"""
    g = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim == 2 or not matrices_only:
            p.add_(torch.randn(p.shape, generator=g) * size)
    return model
