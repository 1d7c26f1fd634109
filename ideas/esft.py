"""
esft.py: tune only the experts that a task uses (expert-specialised fine-tuning, arXiv 2407.01906).

In a mixture of experts a text meets few of them, and texts of one kind meet the same ones. So
before tuning on a task, its texts are read once, and each layer's experts are ranked by how much of
them was used there:

    by tokens    the share of all picks that went to expert e        chosen until the shares add up to 0.2
    by gate      the mean of what expert e counted                   until they add up to 0.1

Those chosen are trained; the other experts, the router and everything else stay as they are. The
best are taken first. As in the paper the shares of a layer sum to 1 (the authors' script divides by
sums over the layers). Left out: shared experts, which this block does not have.

The paper: DeepSeek-V2-Lite (64 experts, 6 picked), 5 to 15% of the experts: as good as tuning all
on the task, and less is forgotten. Here: 16 experts, 2 picked, 0.7M parameters, trained first on
the bytes of Python's own library and on three tasks, then tuned on one of these. (A task that is
new is out of reach of one or two experts of 16, whichever they are.) All arms tune that model on
the same texts for as many steps; each has that of two rates which learned better (texts are met
once, so the loss of a step is of unseen ones). "task" and "before" are the losses on that task and
on the rest. The control trains as many experts, drawn at random: it forgets less than tuning all
does as well, but if it learns as much, it does not matter which.

    python -m ideas.esft
    python -m bench ideas --names esft
"""
from dataclasses import dataclass, replace
from statistics import fmean

import torch

import data
from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data.documents import Documents
from train_gpt import GPT, evaluate, forward, packed_rows, scratch, steps

CLAIM = Claim(paper="2407.01906", says="tuning the 5 to 15% of experts that a task uses is as good as all",
              measured="loss on the task below random experts', or what is left of 0.02 above all's if less",
              smallest=1.0, unit="0.01 nats")
ARMS = ("all", "by tokens", "by gate", "random")         # baseline; idea twice; control
SHARES = {"by tokens": 0.2, "by gate": 0.1}
KNOWN = ("arith", "countdown")           # beside the library
TASK = "states"                          # known, too, and tuned
RATES = (3e-3, 1e-2)
BALANCE = 0.01                           # of the loss that keeps experts busy


@dataclass
class Config(Idea):
    steps: int = 300                     # of training before, 16 texts each
    every: int = 60                      # steps of tuning, for each arm and rate
    asked: int = 512                     # texts for each loss at the end


# -----------------------------------------------------------------------------
# the idea


def watched(model, row):
    """-> the loss of a row, and of each layer (probabilities, experts picked) of its tokens"""
    layers = [block.experts for block in model.blocks]
    for experts in layers:
        experts.seen = []
    loss = forward(model, row)
    found = [(p_TE[:len(row[0])], picked[:len(row[0])]) for e in layers for p_TE, picked in e.seen]
    for experts in layers:
        experts.seen = None
    return loss, found


@torch.no_grad()
def relevance(model, rows, kind):
    """-> (layers, experts): each one's share, of picks or of what they count"""
    total = 0
    for row in rows:
        _, found = watched(model, row)
        used = []
        for p_TE, picked in found:
            p_TK = p_TE.gather(1, picked)
            counts = p_TK if kind == "by gate" else torch.ones_like(p_TK)
            used.append(torch.zeros(p_TE.shape[1]).index_add_(0, picked.flatten(), counts.flatten()))
        total = total + torch.stack(used)
    return total / total.sum(1, keepdim=True)


def chosen(shares_LE, enough):
    """-> for each layer the fewest experts whose shares add up to `enough`"""
    found = []
    for shares in shares_LE:
        order = shares.argsort(descending=True)
        before = shares[order].cumsum(0) - shares[order]
        found.append(order[before < enough].tolist())
    return found


def only(chosen_by_layer):
    """-> what steps() calls with the gradients: those of other weights become zero, so that they stay"""
    def hook(model):
        for name, w in model.named_parameters():
            keep = torch.zeros_like(w)
            if name.endswith(("experts.gate_up.weight", "experts.down.weight")):
                layer = int(name.split(".")[1])
                experts = keep.view(model.config.n_expert, -1)
                experts[chosen_by_layer[layer]] = 1
            w.grad *= keep
    return hook


# -----------------------------------------------------------------------------
# the trial


def texts(document, names, library):
    """-> a document like it: of these tasks in turn, and of the library every second time, if it is asked
    for"""
    tasks = [data.load(name) for name in names]

    def read(split, i):
        if library and i % 2:
            return document(split, i // 2)
        i = i // 2 if library else i
        prompt, *rest = tasks[i % len(tasks)].document(split, document.config.seed, i)
        tokens = document.tok.encode(prompt + "".join(rest) + "\n")
        return tokens, [False] + [True] * (len(tokens) - 1)

    return Documents(read, document.config, document.tok)


def balanced(model, row):
    """The loss, and what keeps experts busy: E sum_e (share of e) (mean p of e)."""
    loss, found = watched(model, row)
    for p_TE, picked in found:
        share = torch.bincount(picked.flatten(), minlength=p_TE.shape[1]) / picked.numel()
        loss = loss + BALANCE * len(row[3]) * p_TE.shape[1] * (share * p_TE.mean(0)).sum()
    return loss


def tuned(arm, rate, start, pick, task, trial, config):
    """-> the mean loss of the last quarter of an arm's steps, and its model after them"""
    model = GPT(start.config)
    model.load_state_dict(start.state_dict())
    optimizer = Optimizer(model, lr=rate)
    losses = []
    for step, loss in steps(model, task, optimizer, config.every, gradient=only(pick) if pick else None):
        trial.point(f"{arm}, {rate:g}", step, loss)
        losses.append(loss)
    return fmean(losses[3 * len(losses) // 4:]), model


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps every asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, [(arm, rate) for arm in ARMS for rate in RATES], config.every)
    like, document = scratch("tiny", config.seed)
    document.config.eval_docs = config.asked
    known = texts(document, KNOWN, library=True)
    first = texts(document, (*KNOWN, TASK), library=True)
    task = texts(document, (TASK,), library=False)
    start = GPT(replace(like.config, n_expert=16, n_active=2, norm_gates=False))
    start.init_weights(config.seed, embedding=0.7)
    for _ in steps(start, first, Optimizer(start, lr=1e-2), config.steps, loss=balanced):
        pass
    docs = [task("train", i) for i in range(min(256, config.asked))]
    rows = list(packed_rows(docs, task.config.row_tokens, "cpu"))
    picks = {arm: chosen(relevance(start, rows, arm), share) for arm, share in SHARES.items()}
    g = torch.Generator().manual_seed(config.seed)
    picks["random"] = [torch.randperm(16, generator=g)[:len(layer)].tolist() for layer in picks["by tokens"]]

    def scores(model):
        return dict(task=evaluate(model, task)["loss"], before=evaluate(model, known)["loss"])

    table = {}
    for arm in ARMS:
        tried = [tuned(arm, rate, start, picks.get(arm), task, trial, config) for rate in RATES]
        _, best = min(tried, key=lambda each: each[0])
        trained = 16 if arm == "all" else sum(map(len, picks[arm])) / len(start.blocks)
        table[arm] = scores(best) | dict(experts=trained)
    table["no tuning"] = scores(start) | dict(experts=0)
    picture(trial, x="step of tuning", y="loss on the task")
    below = 100 * (table["random"]["task"] - table["by tokens"]["task"])
    against = 100 * (table["all"]["task"] - table["by tokens"]["task"])
    kept = 100 * (table["all"]["before"] - table["by tokens"]["before"])
    note = f"(random {below:+.1f}; all: task {against:+.1f}, what was known {kept:+.1f})"
    return finish(trial, (min(below, 2 + against), 0.0), table, note)


if __name__ == "__main__":
    main()
