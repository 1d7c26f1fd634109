"""
xquant.py: keep what keys and values are made of, in few bits (XQuant, arXiv 2508.10395).

A cache holds the keys and the values of each layer. Both are products of the same normed input X,
which has half as many numbers where there are as many key heads as query heads. So X is kept
instead, in few bits, and keys and values are made again when they are needed: compute for memory.

    KV               K, V      in b bits:  2 D b per token and layer
    X                Q(X)      in b bits:  D b;  K = Q(X) Wk,  V = Q(X) Wv
    across layers    the residual stream h of one layer is much like that of the one before:
                     h'_l = h'_(l-1) + Q(h_l - h'_(l-1)),  and X is the norm of h'_l

Q is uniform, between the smallest and the largest of a group of 64 numbers, whose two ends take 16
bits each (half a bit per number): a token's numbers for X, h and V, a channel's of 64 tokens for K.
Keys are rounded before the rotary turn, as KVQuant (2401.18079) does: after it 2 bits lost six
times as much. Left out: grouped heads, for which the paper caches an SVD; the window of fresh
tokens that stay whole; that its first layers have more bits; time (making keys again is slow on a
CPU). We could read its abstract and two ports. They subtract normed inputs across layers; here h
was better in 2 bits, not in 3.

The paper: 7.7 times less memory with less than 0.1 of perplexity lost (0.018 nats, where it is
5.5), 10 to 12.5 times across layers; Llama and Mistral. Here: the start `recall` (2 layers of 64,
four heads of each kind), whose answers are found in the text or nowhere; no training. The loss is
of answers; X in 4 bits is compared with KV in 2, 288 bits with 320. The control turns X by a random
rotation before it is rounded: if that is as good, it is the number of bits that helps and not what
X looks like.

    python -m ideas.xquant
    python -m bench ideas --names xquant
"""
from dataclasses import dataclass
from functools import partial

import torch

from common import cpu
from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.hf import find
from kernels import linear, qk_norm_rope
from train_gpt import GPT, Block, evaluate, scratch

CLAIM = Claim(paper="2508.10395",
              says="7.7 times less memory for 0.1 of perplexity, better than KV in few bits",
              measured="loss of answers with X in 4 bits below that with KV in 2, the same memory",
              smallest=2.0, unit="0.01 nats")
ARMS = ("KV", "X", "across layers", "X, turned")         # baseline; idea twice; control
BITS = (2, 3, 4, 8)
GROUP = 64


@dataclass
class Config(Idea):
    asked: int = 64                      # documents of up to 512 tokens, 8 questions each


# -----------------------------------------------------------------------------
# the idea


def rounded(x, bits, channels=False):
    """-> (T, N) as its levels say. channels: a group is GROUP tokens of a channel, not a token's numbers"""
    if channels:
        return torch.cat([rounded(part.t(), bits).t() for part in x.split(GROUP)])
    groups = x.unflatten(1, (-1, min(GROUP, x.shape[1])))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=1e-12)
    return (((groups - low) / step).round() * step + low).flatten(1)


class Cached(Block):
    """Keys and values as they come back from the cache; queries as ever."""

    def __init__(self, c, arm, bits, shared):
        super().__init__(c)
        self.arm = arm
        self.bits = bits
        self.shared = shared             # of all layers: the stream as the last one's cache has it

    def stored(self, x_TD, normed_TD, layer):
        """-> the normed input, as the cache has it"""
        if self.arm == "X":
            return rounded(normed_TD, self.bits)
        if self.arm == "X, turned":
            turn = self.shared["turn"]
            return rounded(normed_TD @ turn, self.bits) @ turn.t()
        before = self.shared["stream"] if layer else torch.zeros_like(x_TD)
        self.shared["stream"] = before + rounded(x_TD - before, self.bits)
        return self.attn_norm(self.shared["stream"])

    def forward(self, x_TD, cos_T, sin_T, attend, layer):
        normed_TD = self.attn_norm(x_TD)
        kept_TD = normed_TD if self.arm in ("KV", "whole") else self.stored(x_TD, normed_TD, layer)
        width = self.heads * self.head_dim
        q = linear(normed_TD, self.qkv.weight[:width])
        k, v = linear(kept_TD, self.qkv.weight[width:]).chunk(2, 1)
        if self.arm == "KV":
            k = rounded(k, self.bits, channels=True)
            v = rounded(v, self.bits)
        q, k, v = (each.view(len(x_TD), -1, self.head_dim) for each in (q, k, v))
        q, k = qk_norm_rope(q, k, self.q_norm.weight, self.k_norm.weight, cos_T, sin_T, self.eps)
        x_TD = x_TD + linear(attend(layer, q, k, v).flatten(1), self.out.weight)
        return x_TD + self.mlp(self.mlp_norm(x_TD), cpu.Tensors(self))


def memory(arm, bits, c):
    """-> bits per token and layer"""
    numbers = 2 * c.n_kv_head * c.head_dim if arm == "KV" else c.d_model
    return numbers * (bits + 32 / GROUP)


def with_cache(folder, arm, bits, seed=0):
    model = GPT.from_hf(folder)
    D = model.config.d_model
    g = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(D, D, generator=g))[0]
    twin = GPT(model.config, partial(Cached, arm=arm, bits=bits, shared={"turn": turn}))
    twin.load_state_dict(model.state_dict())
    return twin


# -----------------------------------------------------------------------------
# the trial


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, len(BITS))
    folder = find(trial.base("recall"))
    _, document = scratch("recall", config.seed)
    document.config.eval_docs = config.asked
    table = {"whole": {"loss": evaluate(GPT.from_hf(folder), document)["loss"]}}
    for arm in ARMS:
        table[arm] = {}
        for bits in BITS:
            model = with_cache(folder, arm, bits, config.seed)
            table[arm][f"{bits} bits"] = loss = evaluate(model, document)["loss"]
            trial.point(arm, memory(arm, bits, model.config), loss)
    gain = 100 * (table["KV"]["2 bits"] - table["X"]["4 bits"])
    turned = 100 * (table["KV"]["2 bits"] - table["X, turned"]["4 bits"])
    across = 100 * (table["X"]["2 bits"] - table["across layers"]["2 bits"])
    picture(trial, x="bits per token and layer", y="loss of answers, nats")
    note = f"(turned {turned:+.1f}; across layers at 2 bits {across:+.1f})"
    return finish(trial, (gain, 0.0), table, note)


if __name__ == "__main__":
    main()
