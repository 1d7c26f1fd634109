"""
moe.py: many small experts instead of few large ones (fine-grained experts, arXiv 2402.07871).

A block's SwiGLU becomes E experts, of which a router picks K for each token (common/experts.py:
Qwen3-MoE's shape, its folders in and out; sampled and trained by the same core as every model here).
Granularity G says how finely the same numbers are cut: an expert is d_ff / G wide, and there are
8 G of them, of which G are picked. Whatever G, a token costs what it costs in the dense block, and
the model has eight times the numbers there:

    dense       [----------------]
    G = 1       [----------------]  1 of 8
    G = 4       [----][----][----][----]  4 of 32: 35,960 sets of experts instead of 8

Only the router grows: D E numbers. It is left out of "equal FLOPs" by many, so the control is G = 1
with experts so much wider that a token costs as much as with G = 4, router included. The arm with
zero-computation experts is LongCat-Flash's (2509.01322): 8 of 24 experts give a token back as it is,
3 are picked, 2 of them real on average, and the router chooses which token gets less.

The paper: experts as large as the dense layer "not optimal at almost any computational budget" (its
abstract and its authors' library, llm-random, were read). Router as there: the softmax of all E, not
made to sum to 1, and a loss of 0.01 E sum_e (picks of e per token) (mean p_e). Left out: the law with
G^-gamma, capacity and the tokens it drops, LongCat's controller of biases and its shortcut. Here:
0.16M parameters in the dense arm, the bytes of Python's own library; all share batches, steps and
the rate, which is the best of three for AdamW and the dense model on another seed. "busiest": share
of tokens of the most used expert times E / K; "real": experts that compute, per token.

    python -m ideas.moe
    python -m bench ideas --names moe
"""
import time
from dataclasses import dataclass, replace

import torch
from torch import nn

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.experts import Experts
from common.flags import flags, positive
from common.optim import Optimizer
from train_gpt import GPT, SparseBlock, evaluate, forward, packed_rows, scratch, steps

CLAIM = Claim(paper="2402.07871", says="experts of a dense layer's size are not optimal at almost any budget",
              measured="final loss of granularity 4 below that of 1, same batches and FLOPs",
              smallest=1.0, unit="0.01 nats")
ARMS = ("dense", "G = 1", "G = 2", "G = 4", "G = 1, wider", "zero")   # "G = 1, wider": the control
TIMES = 8                # the experts' numbers, over those of the dense layer
ZERO = 8                 # experts without computation, beside 16
BALANCE = 0.01           # of the loss that keeps experts busy
LR = 1e-2


@dataclass
class Config(Idea):
    steps: int = 200                     # optimizer steps per arm, 2,048 bytes each
    asked: int = 512                     # windows of 128 bytes for the loss at the end


# -----------------------------------------------------------------------------
# the idea


def shape_of(arm, dense):
    """-> the config of an arm. A token's cost there: 3 D d_ff numbers, and D E of the router."""
    if arm == "dense":
        return dense
    G = {"G = 2": 2, "G = 4": 4, "zero": 2}.get(arm, 1)
    width = dense.d_ff
    if arm == "G = 1, wider":
        width += TIMES * (4 - 1) // 3
    return replace(dense, d_ff=width, n_expert=TIMES * G, n_active=G, norm_gates=False)


class WithZero(Experts):
    """The last ZERO experts give back what they get; one more is picked for each token."""
    on_every_row = Experts.on_their_rows     # there is nothing to save where all of them compute

    def __init__(self, c):
        super().__init__(c)
        self.router = nn.Linear(c.d_model, c.n_expert + ZERO, bias=False)
        self.active = c.n_active + 1

    def route(self, x_TD):
        gate_TK, expert_TK = super().route(x_TD)
        return gate_TK, expert_TK.clamp(max=self.count)

    def matrices(self):
        return [[*each, None] for each in super().matrices()]

    def one(self, gate_up, down, x):
        return x if gate_up is None else super().one(gate_up, down, x)


class ZeroBlock(SparseBlock):
    def __init__(self, c):
        super().__init__(c)
        self.experts = WithZero(c)


def routed(model, row, loss):
    """-> loss(model, row), and of each sparse block (probabilities, experts chosen) of the row's tokens"""
    sparse = [block.experts for block in model.blocks if isinstance(block, SparseBlock)]
    for experts in sparse:
        experts.seen = []
    value = loss(model, row)
    found = [(p_TE[:len(row[0])], expert_TK[:len(row[0])]) for e in sparse for p_TE, expert_TK in e.seen]
    for experts in sparse:
        experts.seen = None
    return value, found


def used(p_TE, expert_TK):
    """-> how often each expert was picked, per token"""
    return torch.bincount(expert_TK.flatten(), minlength=p_TE.shape[1]) / len(expert_TK)


def balanced(model, row):
    """The loss of a row, with the gradient of E sum_e (picks of e) (mean p of e), which is least where
    all are equal."""
    value, found = routed(model, row, forward)
    for p_TE, expert_TK in found:
        extra = p_TE.shape[1] * (used(p_TE, expert_TK) * p_TE.mean(0)).sum()
        value = value + BALANCE * len(row[3]) * (extra - extra.detach())
    return value


# -----------------------------------------------------------------------------
# the trial


def model_of(arm, like, seed):
    block = ZeroBlock if arm == "zero" else None                 # None: as the config says
    return GPT(shape_of(arm, like), block).init_weights(seed, embedding=0.7)


def busy(model, document):
    """-> how much busier than the mean the busiest expert is, and how many compute, per token"""
    docs = [document("valid", i) for i in range(min(32, document.config.eval_docs))]
    row = next(packed_rows(docs, len(docs) * len(docs[0][0]), "cpu"))
    with torch.no_grad():
        _, found = routed(model, row, forward)
    shares = [used(p_TE, chosen) / chosen.shape[1] for p_TE, chosen in found]
    most = max((float(share.max() * len(share)) for share in shares), default=1.0)
    real = [(chosen < model.config.n_expert).sum(1).float().mean() for _, chosen in found]
    return dict(busiest=most, real=float(sum(real)) / max(1, len(real)))


def train(arm, trial, config):
    like, document = scratch("tiny", config.seed)                # the same batches for every arm
    document.config.eval_docs = config.asked
    document.config.batch = min(16, config.asked)                # three windows with --smoke
    model = model_of(arm, like.config, config.seed)
    for step, loss in steps(model, document, Optimizer(model, lr=LR), config.steps, loss=balanced):
        trial.point(arm, step, loss)
    size = sum(p.numel() for p in model.parameters()) / 1e6
    return dict(evaluate(model, document), millions=size, **busy(model, document))


def speed(config, turns=8):
    """-> tokens per CPU second of 8 experts, 2 of them, over those of the dense model: forward and
    backward of a row of 4,096 tokens, in turns"""
    like, document = scratch("tiny", config.seed)
    sparse = replace(like.config, n_expert=8, n_active=2)
    models = [GPT(c).init_weights(0, embedding=0.7) for c in (like.config, sparse)]
    docs = [document("train", i) for i in range(4 if config.smoke else 4096 // 128)]
    row = next(packed_rows([(t[:128], on[:128]) for t, on in docs], 4096, "cpu"))
    seconds = [[], []]
    for _ in range(1 if config.smoke else turns):
        for model, took in zip(models, seconds):
            began = time.process_time()
            forward(model, row).backward()
            took.append(time.process_time() - began)
    dense, with_experts = map(min, seconds)
    return dense / with_experts


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    results = {arm: train(arm, trial, config) for arm in ARMS}
    loss = {arm: 100 * result["loss"] for arm, result in results.items()}
    picture(trial, x="step", y="loss, nats per byte")
    below = {arm: loss["G = 1"] - value for arm, value in loss.items()}
    note = (f"(wider {below['G = 1, wider']:+.1f}, dense {below['dense']:+.1f}, G = 2 {below['G = 2']:+.1f}, "
            f"zero {below['zero']:+.1f}; 8 experts have {speed(config):.2f} of the dense speed)")
    return finish(trial, (below["G = 4"], 0.0), results, note)


if __name__ == "__main__":
    main()
