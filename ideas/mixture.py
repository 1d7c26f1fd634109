"""
mixture.py: how much of each domain to train on, from a law fitted to small runs (2507.09404).

    L_k(h) = E_k + 1 / (C_k1 h_1^g_k1 + ... + C_kn h_n^g_kn)  [+ A_k / N^a + B_k / D^b]

L_k is the loss on domain k, h the shares of the domains in what is read. The last two terms know
nothing of h: at one size N and length D they are a part of E_k, and the best shares are the same
for a larger model that reads more. So twelve small runs on random shares, a law for each domain,
the shares that minimise the mean of the four losses, and a run of four times the parameters, as
long as the small ones: much shorter ones have hardly begun on some domains.

The paper: laws of 160 runs of 412M to 1.4B on seven domains give the losses at 3B and 7B within 0.3
to 4.5%, and the best shares "instead of costly trial and error". Trial and error with the same
twelve runs is the baseline: `tried` takes the best of them. The control uses all twelve without a
law: `three` is the mean of the best three. `uniform` has tried nothing. Left out: the joint law,
where A and B depend on h; the fit over N and D; basin-hopping (here Adam from 32 starts on a Huber
loss) and mirror descent (here Adam). Nine numbers of a domain from twelve runs is little: the note
has the error where they were fitted, and how many pairs of the larger runs the law puts in order.

    python -m ideas.mixture
    python -m bench ideas --names mixture
"""
import functools
from dataclasses import dataclass, replace
from itertools import combinations

import torch
import torch.nn.functional as F

import data
from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data.documents import Documents
from data.stdlib import window
from train_gpt import GPT, evaluate, scratch, steps

CLAIM = Claim(paper="2507.09404", says="laws of runs up to 1.4B give the loss at 7B and the best shares",
              measured="mean loss of four domains below that on the best shares tried", smallest=0.5,
              unit="0.01 nats")
ARMS = ("tried", "law", "three", "uniform")
DOMAINS = ("countdown:steps", "arith", "states", "stdlib")
SMALL = dict(n_layer=2, n_head=2, n_kv_head=2, d_model=32, d_ff=64)      # 0.04M parameters; the larger: 0.16M
LEAST = 0.05                             # share of a domain, in what is tried and in what is searched
RUNS = 12
STARTS, FIT = 32, 1500                   # of a fit, and its steps
LR, MUON_LR = 1e-2, 1.4e-2


@dataclass
class Config(Idea):
    steps: int = 240                     # of each run
    batch: int = 16                      # windows of 128 bytes in a step
    asked: int = 256                     # windows of each domain, for the losses


# -----------------------------------------------------------------------------
# the idea


def losses_of(law, shares_RN):
    """-> (runs, starts, domains): what the law says; its numbers are logarithms, so all are positive"""
    E, C, g = law
    weighted = C.exp() * shares_RN[:, None, None] ** g.exp()
    return E.exp() + 1 / weighted.sum(-1)


def fitted(shares_RN, losses_RK, total, seed):
    """-> a law for each of K domains; of several starts the one that ends nearest to the losses"""
    domains = losses_RK.shape[1]
    rand = torch.Generator().manual_seed(seed)
    size = (STARTS, domains, shares_RN.shape[1])
    E = (losses_RK.min(0).values * torch.rand(size[:2], generator=rand, dtype=torch.float64)).log()
    C = torch.randn(size, generator=rand, dtype=torch.float64)
    g = torch.randn(size, generator=rand, dtype=torch.float64) - 1
    law = [p.requires_grad_() for p in (E, C, g)]

    def distance():
        said = losses_of(law, shares_RN)
        return F.huber_loss(said, losses_RK[:, None].expand_as(said), delta=0.02, reduction="none").mean(0)

    minimise(distance, law, total)
    best = distance().argmin(0)
    return [p.detach()[best, torch.arange(domains)][None] for p in law]


def best_shares(law, domains, total):
    """-> the shares, none below LEAST, with the lowest mean of the domains' losses"""
    z = torch.zeros(domains, dtype=torch.float64, requires_grad=True)
    minimise(lambda: losses_of(law, floored(z.softmax(0))[None]).mean(), [z], total)
    return floored(z.detach().softmax(0))


def minimise(value, numbers, total):
    optimizer = torch.optim.Adam(numbers, lr=0.05)
    for step in range(total):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / total)
        optimizer.zero_grad()
        value().sum().backward()
        optimizer.step()


def floored(shares):
    return LEAST + (1 - LEAST * shares.shape[-1]) * shares


# -----------------------------------------------------------------------------
# the domains, and documents of them in given shares


load = functools.cache(data.load)


def text_of(domain, split, seed, i, size):
    """-> text i of a domain, of `size` bytes: a window of the library, or problems one after another"""
    if domain == "stdlib":
        return window(split, seed, i, size)
    text = ""
    while len(text) < size:
        # lines so far: no problem is in two texts
        text += "".join(load(domain).document(split, seed, size * i + text.count("\n"))) + "\n"
    return text[:size]


def mixed(document, shares):
    """-> a document like it, of a domain drawn by the shares; all mixtures share the texts of a domain"""
    c = document.config

    def read(split, i):
        u = data.stream("mixture", split, c.seed, i)()
        for domain, share in zip(DOMAINS, shares):
            u -= float(share)
            if u < 0:
                break
        tokens = document.tok.encode(text_of(domain, split, c.seed, i, c.seq_len + 1))
        return tokens, [False] + [True] * (len(tokens) - 1)

    return Documents(read, c, document.tok)


# -----------------------------------------------------------------------------
# the trial


def train(shares, config, **shape):
    """-> the losses on the four domains, and (step, loss) of the training"""
    model, document = scratch("tiny", config.seed)
    document.config.eval_docs = config.asked
    document.config.batch = config.batch
    if shape:
        model = GPT(replace(model.config, **shape)).init_weights(config.seed, embedding=0.7)
    optimizer = Optimizer(model, lr=LR, muon_lr=MUON_LR)
    curve = list(steps(model, mixed(document, shares), optimizer, config.steps))
    losses = [evaluate(model, mixed(document, one))["loss"] for one in torch.eye(len(DOMAINS))]
    return torch.tensor(losses, dtype=torch.float64), curve


def drawn(seed):
    """-> shares of the small runs, uniform over all that have no domain below LEAST; the first is uniform"""
    rand = data.stream("mixture shares", "train", seed, 0)
    shares = -torch.tensor([[rand() for _ in DOMAINS] for _ in range(RUNS)], dtype=torch.float64).log()
    shares[0] = 1
    return floored(shares / shares.sum(1, keepdim=True))


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps asked batch")
    from_scratch(config)
    runs, total = (3, 5) if config.smoke else (RUNS, FIT)
    trial = begin(config, __file__, CLAIM, ("all",), runs + len(ARMS))
    shares = drawn(config.seed)[:runs]
    losses = torch.empty(runs, len(DOMAINS), dtype=torch.float64)
    for run, one in enumerate(shares):
        losses[run], _ = train(one, config, **SMALL)
        trial.bar.update()
    law = fitted(shares, losses, total, config.seed)
    order = losses.mean(1).argsort()
    chosen = {"tried": shares[order[0]], "law": best_shares(law, len(DOMAINS), total),
              "three": shares[order[:3]].mean(0), "uniform": shares[0]}
    said = {arm: float(losses_of(law, one[None]).mean()) for arm, one in chosen.items()}
    results = {}
    for arm, one in chosen.items():
        each, curve = train(one, config)
        trial.panels.setdefault("", {})[arm] = curve
        trial.dot("law", arm, said[arm], each.mean())
        trial.bar.update()
        results[arm] = dict(loss=float(each.mean()), said=said[arm], code=float(one[-1]))
    gain = {arm: 100 * (results["tried"]["loss"] - row["loss"]) for arm, row in results.items()}
    pairs = sum((said[a] < said[b]) == (gain[a] > gain[b]) for a, b in combinations(ARMS, 2))
    error = 100 * float(((losses_of(law, shares)[:, 0] - losses) / losses).abs().mean())
    picture(trial, x="step", y="loss of what is read, nats per byte",
            law=("mean loss that the law says, small", "mean loss found, larger", "o"))
    note = (f"(three {gain['three']:+.2f}, uniform {gain['uniform']:+.2f}; the law's error {error:.2f}%, "
            f"{pairs} of 6 pairs in its order)")
    return finish(trial, (gain["law"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
