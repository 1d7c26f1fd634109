"""
common/experts.py: a mixture of experts in place of a block's one SwiGLU, in Qwen3-MoE's shape.

    router     p = softmax(R x) over all E experts; the K largest count, and are made to sum to 1
    experts    y = sum over those K of p_e down_e (silu(gate_e x) * up_e x)

    tokens       a   b   c   d         K = 2 of E = 3
    chosen       02  12  01  02
    by expert    a c d | b c | a b d   one product per expert, on the rows that chose it
    back         a = p_0 y_0 + p_2 y_2, ...

A token meets d_ff numbers in all, d_ff / K of each expert, so d_ff means what it means in a dense
block: the cost of a token. The matrices of all experts lie one below the other in one parameter.

Left out of the usual recipe, and why: no capacity, so no token is ever dropped; no shared expert,
as in Qwen3; no expert parallelism, each rank holds all experts; no balancing loss in here: who
trains from new weights sets `seen` to a list and finds there what was routed.
"""

import torch
from torch import nn

from common import cpu
from kernels import linear, swiglu

GRAPHED = 1024           # rows up to which a GPU runs every expert on every row, without asking it anything


class Experts(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.count = c.n_expert
        self.active = c.n_active
        self.norm_gates = c.norm_gates
        width = c.d_ff // c.n_active
        self.router = nn.Linear(c.d_model, c.n_expert, bias=False)
        self.gate_up = nn.Linear(c.d_model, c.n_expert * 2 * width, bias=False)
        self.down = nn.Linear(width, c.n_expert * c.d_model, bias=False)
        # how many matrices a parameter is: Muon turns each by itself
        self.stacks = {"gate_up.weight": c.n_expert, "down.weight": c.n_expert}
        self.seen = None         # a list takes (probabilities, experts chosen) of each call

    def forward(self, x_TD):
        gate_TK, expert_TK = self.route(x_TD)
        if x_TD.is_cuda and torch.is_inference_mode_enabled() and len(x_TD) <= GRAPHED:
            return self.on_every_row(x_TD, gate_TK, expert_TK)
        return self.on_their_rows(x_TD, gate_TK, expert_TK)

    def route(self, x_TD):
        """-> what each token's experts count, and which they are"""
        p_TE = self.logits(x_TD).softmax(-1)
        gate_TK, expert_TK = p_TE.topk(self.active, dim=-1)
        if self.seen is not None:
            self.seen.append((p_TE, expert_TK))
        if self.norm_gates:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdim=True)
        return gate_TK.to(x_TD.dtype), expert_TK

    def logits(self, x_TD):
        return linear(x_TD, self.router.weight).float()

    def on_their_rows(self, x_TD, gate_TK, expert_TK):
        gate_up, down = self.matrices()
        take, back, rooms = by_expert(expert_TK.flatten(), len(down), x_TD)
        rows = Deal.apply(x_TD, take // self.active, back, self.active)
        parts = zip(gate_up, down, rows.split(rooms))
        found = [self.one(*matrices, part) for *matrices, part in parts if len(part)]
        y_TKD = cpu.PutBack.apply(torch.cat(found), back).view(*expert_TK.shape, -1)
        return (y_TKD * gate_TK.unsqueeze(2)).sum(1)

    def one(self, gate_up, down, x):
        # not strided: silu of a transposed narrow matrix rounds otherwise, and rows differ in their number
        return linear(swiglu(linear(x, gate_up)), down)

    def on_every_row(self, x_TD, gate_TK, expert_TK):
        """The same at E / K times the work: a CUDA graph cannot ask how many rows an expert has."""
        gate_up, down = (w.view(self.count, -1, w.shape[1]) for w in (self.gate_up.weight, self.down.weight))
        weight_TE = gate_TK.new_zeros(len(x_TD), self.count).scatter(1, expert_TK, gate_TK)
        hidden = swiglu((x_TD @ gate_up.transpose(1, 2)).flatten(0, 1))
        y_ETD = hidden.view(self.count, len(x_TD), -1) @ down.transpose(1, 2)
        return torch.einsum("te,etd->td", weight_TE, y_ETD)

    def matrices(self):
        """-> those of each expert. unbind: its backward is one copy, that of indexing one per expert."""
        return [w.view(self.count, -1, w.shape[1]).unbind() for w in (self.gate_up.weight, self.down.weight)]


class Deal(torch.autograd.Function):
    """Each token to the places of its K experts. Spare places are copies that no gradient comes from, so
    the backward is a gather too: several times faster on a CPU than index_add."""

    @staticmethod
    def forward(ctx, x_TD, token, back, K):
        ctx.save_for_backward(back)
        ctx.K = K
        return x_TD.index_select(0, token)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        return grad.index_select(0, back).view(-1, ctx.K, grad.shape[1]).sum(1), None, None, None


def by_expert(chosen, count, like):
    """-> take: the places of `chosen` in order of their experts, with spare ones that fill up each
    expert's room; back: where each place went; rooms: rows of each expert. On a CPU a room is a size
    of few, for which oneDNN sums a row in the same order in any company."""
    counts = torch.bincount(chosen, minlength=count)
    sizes = counts.tolist()
    rooms = [room(n) for n in sizes] if cpu.fp32(like) else sizes
    spare = torch.tensor(rooms, device=chosen.device) - counts
    order = chosen.argsort(stable=True)
    shift = (spare.cumsum(0) - spare).repeat_interleave(counts)
    place = torch.arange(len(chosen), device=chosen.device) + shift
    take = torch.zeros(sum(rooms), dtype=torch.int64, device=chosen.device)
    take[place] = order
    back = torch.empty_like(order)
    back[order] = place
    return take, back, rooms


def room(n):
    least = cpu.FEW * torch.get_num_threads()
    return -(-cpu.bucket(n) // least) * least if n else 0
