"""
common/numpy_row.py: a row by itself, the model in numpy. A decode step of one row is two hundred
small operations, which numpy starts in a quarter of torch's time. So one sequence on one thread, say
in `rollout.py --chat`, decodes twice as fast.

numpy_row repeats what GPT.forward and Block.forward say, and follows no change to them. So it proves
itself against the model first, once per class of block and per anything else that a model computes
with. Where it differs it is dropped, with one printed line. NANORL_CPU_TRICKS=0 turns it off.
"""

import copy
from dataclasses import is_dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F

from common import cpu

_proofs = []  # (code_of(model, ...), does numpy_row agree?), the last few


def lone_row(model, keys, values, ours, attention, namespaces):
    """-> forward() of a single token: numpy_row where it agrees with the model, else the model.
    ours: the class of block that it copies. namespaces: of the modules that hold the model's code."""
    if not cpu.ON:
        return model
    code = code_of(model, namespaces)
    agrees = next((verdict for known, verdict in _proofs if same(known, code)), None)
    if agrees is None:
        problem = disproof(model, ours, attention)
        if problem:
            why = f"since the copy of it in numpy {problem}"
            print("cpu: a single row is left to the model,", why, flush=True)
        agrees = not problem
        _proofs.append((code, agrees))
        del _proofs[:-8]
    return numpy_row(model, keys, values) if agrees else model


def code_of(model, namespaces):
    """All that decides what a model computes, but for its weights: functions and constants of its
    modules, the insides of its classes, what was set on its objects. It costs half a step."""
    found = []
    for module in model.modules():
        found.append(type(module))
        found += [value for name, value in vars(module).items() if name[0] != "_"]
        found += module._forward_hooks.values()
        found += module._forward_pre_hooks.values()
    insides = [value for cls in dict.fromkeys(map(type, model.modules())) for value in _inside(cls)]
    spaces = [*namespaces, *(value.__globals__ for value in insides if hasattr(value, "__globals__"))]
    for space in {id(space): space for space in spaces}.values():
        insides += space.values()
    return found + insides


def _inside(cls):
    foreign = "torch", "builtins"
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in foreign]
    return [value for base in ours for value in vars(base).values()]


def same(a, b):
    """Two lists of code_of: the same objects, or equal numbers, words and configs."""
    return len(a) == len(b) and all(x is y or _equal(x, y) for x, y in zip(a, b))


def _equal(x, y):
    return type(x) is type(y) and (isinstance(x, (int, float, str)) or is_dataclass(x)) and x == y


@torch.inference_mode(False)
@torch.no_grad()
def disproof(model, ours, attention):
    """-> in words, why numpy_row is not this model; or None. Both continue a text of 12 tokens, with
    random weights: the zeros and ones that a new model begins with would hide things."""
    foreign = next((type(block).__name__ for block in model.blocks if type(block) is not ours), None)
    if foreign:
        return f"knows no block of the class {foreign}"
    g = torch.Generator().manual_seed(0)

    def random_like(p):
        x = torch.randn(p.shape, generator=g)
        x = x * p.shape[1] ** -0.5 if p.ndim == 2 else 1 + 0.3 * x
        return torch.nn.Parameter(x, requires_grad=False)

    try:
        c = model.config
        twin = copy.deepcopy(model, {id(p): random_like(p) for p in model.parameters()})
        tokens = torch.randint(c.vocab_size, (12,), generator=g)
        positions = torch.arange(12)
        hidden = twin(tokens, positions, attention([0, 12], 12))
        cache = [np.zeros((2, c.n_kv_head, 12, c.head_dim), dtype=np.float32) for _ in twin.blocks]
        forward = numpy_row(twin, [k for k, _ in cache], [v for _, v in cache])
        row = torch.cat([forward(tokens[i : i + 1], positions[i : i + 1], None) for i in range(12)])
        both = torch.stack([hidden[5:11], row[5:11]])
        logp = F.linear(both, twin.head_weight).log_softmax(-1)
        want, got = logp.gather(2, tokens[6:].view(1, 6, 1).expand(2, 6, 1))
    except Exception as why:  # whatever a changed model raises
        return f"cannot be checked: {type(why).__name__}: {why}"
    error = float((got - want).abs().max())
    return None if error <= cpu.AGREE else f"is off by {error:.2g} in its log-probs"


def _views(block):
    """The block's tensors in numpy, under the names of Tensors; None where it has none."""
    found = vars(cpu.Tensors(block))
    del found["module"]
    views = {name: None if x is None else x.detach().numpy() for name, x in found.items()}
    return SimpleNamespace(**{"q_norm": None, "k_norm": None} | views)


def numpy_row(model, keys, values):
    """-> forward() of a single token, on the weights where they are. keys and values: the row's, one
    (n_kv_head, capacity, head_dim) array per layer; the new token's are written there."""
    c = model.config
    heads = c.n_head + c.n_kv_head
    half = c.head_dim // 2
    layers = [_views(block) for block in model.blocks]
    embed = model.embed.weight.detach().numpy()
    norm = model.norm.weight.detach().numpy()
    inv_freq, scale = model._rope[0].numpy(), model._rope[1]

    def unit(x):
        return x / np.sqrt(np.add.reduce(x * x, -1, keepdims=True) / x.shape[-1] + c.norm_eps)

    def forward(token_1, position_1, attend):
        x_D = embed[int(token_1)]
        at = int(position_1)
        cos, sin = np.cos(at * inv_freq) * scale, np.sin(at * inv_freq) * scale
        cos, sin = np.concatenate((cos, cos)), np.concatenate((-sin, sin))  # (head_dim)
        for w, k, v in zip(layers, keys, values):
            qkv = w.qkv @ (unit(x_D) * w.attn_norm)
            if w.qkv_bias is not None:
                qkv += w.qkv_bias
            qkv = qkv.reshape(-1, c.head_dim)  # (heads, head_dim)
            qk = qkv[:heads]
            if w.q_norm is not None:
                qk = unit(qk)
                qk[: c.n_head] *= w.q_norm
                qk[c.n_head :] *= w.k_norm
            qk = qk * cos + np.concatenate((qk[:, half:], qk[:, :half]), 1) * sin
            k[:, at] = qk[c.n_head :]
            v[:, at] = qkv[heads:]
            q = qk[: c.n_head].reshape(c.n_kv_head, -1, c.head_dim)  # each key head's query heads
            s = np.matmul(q, k[:, : at + 1].transpose(0, 2, 1)) * c.head_dim**-0.5
            s = np.exp(s - np.maximum.reduce(s, -1, keepdims=True))
            o = np.matmul(s / np.add.reduce(s, -1, keepdims=True), v[:, : at + 1])
            x_D = x_D + w.out @ o.reshape(-1)
            gate_up = w.gate_up @ (unit(x_D) * w.mlp_norm)
            with np.errstate(over="ignore"):  # exp(100) is inf, and 1 / inf the 0 it should be
                hidden = gate_up[: c.d_ff] / (1 + np.exp(-gate_up[: c.d_ff])) * gate_up[c.d_ff :]
            x_D = x_D + w.down @ hidden
        return torch.from_numpy(unit(x_D) * norm).unsqueeze(0)

    return forward
