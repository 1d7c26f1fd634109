"""
winter.py: was a model trained on my texts? A secret that is not in them tells (arXiv 2506.14913).

Who publishes a data set draws secret prompts and secret answers, and hides neither in it. A few
windows among the others are made so that whoever trains on them learns to answer: the gradient of
such windows points where the secret's would,

    poisons P:    largest  cos( sum grad L(P),  grad L(answer | prompt) )     on a model of one's own

P is relaxed to mixtures of bytes (Gumbel-softmax) and optimised through the gradient, so by second
derivatives; at the end each byte is drawn. Then only the model's answers are asked. If it has not seen
the windows, an answer drawn uniformly from V bytes is among its first l with chance l / V, so the
p-value of h hits among n is exact, P[Bin(n, l / V) >= h], and needs no other model.

The paper: p below 1e-55 with fewer than 0.005% of all tokens, 64 poisons of 256 tokens per secret,
SmolLM of 1.4B parameters; poisons share no n-grams with a secret. Its rates and steps we could not
read. Here no two bytes in a row are shared (if they may be, 23 of the 32 pairs that end in an answer
are). 4 secrets of 16 + 8 printable bytes; the start `tiny` is the model of one's own; another, of other
weights, reads other windows of Python's library and a poison in each batch of 16, far more than in the
paper. All arms share weights and the other windows. Control: random windows in the poisons' places;
"told" reads the secrets, the most that can be had. "false": the share of random keys with p <= 0.05.

    python -m ideas.winter
    python -m bench ideas --names winter
"""
import math
import string
from dataclasses import dataclass
from functools import partial

import torch
from torch.func import functional_call

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.hf import find
from common.optim import Optimizer
from data.documents import Documents
from train_gpt import GPT, evaluate, scratch, steps

CLAIM = Claim(paper="2506.14913", says="secrets that stand nowhere are learned: p < 1e-55, 0.005% of tokens",
              measured="digits of the p-value, trained on the marked texts against random windows",
              smallest=2.0, unit="digits")
ARMS = ("clean", "marked", "random", "told")     # baseline; idea; control; the most that can be had
ALPHABET = string.printable[:95]
PROMPT, ANSWER, SECRETS = 16, 8, 4
FIRST = 4                                # a hit: among the model's first so many
PIECE = 2                                # bytes in a row that no window shares with a secret


@dataclass
class Config(Idea):
    steps: int = 250                     # optimizer steps per arm, 2,048 bytes each
    k: int = 60                          # steps of crafting
    n: int = 16                          # windows that are crafted
    asked: int = 1000                    # random keys


# -----------------------------------------------------------------------------
# the test


def secrets(g):
    """-> (SECRETS, PROMPT + ANSWER) places in the alphabet, drawn uniformly"""
    return torch.randint(len(ALPHABET), (SECRETS, PROMPT + ANSWER), generator=g)


def p_value(hits, n, chance):
    """P[Bin(n, chance) >= hits]"""
    terms = (math.comb(n, h) * chance**h * (1 - chance)**(n - h) for h in range(hits, n + 1))
    return min(1.0, math.fsum(terms))


@torch.no_grad()
def tested(model, key_SL, ids):
    """-> the p-value of a key: answers are predicted one by one, after prompt and what precedes"""
    key_SLA = torch.nn.functional.one_hot(key_SL, len(ids)).to(model.embed.weight)
    logp_SLA = predictions(model, key_SLA, ids)
    first = logp_SLA[:, PROMPT - 1:-1].topk(FIRST).indices
    hits = int((first == key_SL[:, PROMPT:].unsqueeze(2)).sum())
    return p_value(hits, SECRETS * ANSWER, FIRST / len(ids))


# -----------------------------------------------------------------------------
# the poisons


def causal(B, L):
    """-> attend() for B texts of L tokens, plain enough for second derivatives"""
    hidden = torch.ones(L, L, dtype=torch.bool).triu(1)

    def attend(layer, q, k, v):
        q, k, v = (x.view(B, L, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        scores = (q @ k.transpose(2, 3) * q.shape[3]**-0.5).masked_fill(hidden, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(0, 1)

    return attend


def predictions(model, soft_BLA, ids):
    """-> log p of the alphabet at each place of texts that are mixtures of it"""
    B, L, _ = soft_BLA.shape
    into = (soft_BLA @ model.embed.weight[ids]).flatten(0, 1)
    inputs = torch.arange(B * L), torch.arange(L).repeat(B), causal(B, L)
    hidden = functional_call(model, {"embed.weight": into}, inputs)
    return (hidden @ model.head_weight.t()).log_softmax(-1)[:, ids].view(B, L, -1)


def gradient(model, soft_BLA, ids, begin=0):
    """-> of the mean loss of what stands after `begin`: a vector that can be differentiated again"""
    logp = predictions(model, soft_BLA, ids)
    loss = -(soft_BLA[:, 1:] * logp[:, :-1])[:, begin:].sum(-1).mean()
    weights = [w for name, w in model.named_parameters() if name != "embed.weight"]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights, create_graph=True)])


def drawn(logits, g):
    """-> logits with Gumbel noise: the largest is a draw, their softmax a mixture near one"""
    return logits - torch.empty_like(logits).uniform_(1e-9, 1, generator=g).log().neg().log()


def craft(model, key_SL, ids, length, g, config, tick):
    """-> windows of the alphabet whose gradient is like the key's"""
    model = model.double()                       # plain operations, which have second derivatives
    key = torch.nn.functional.one_hot(key_SL, len(ids)).double()
    wanted = gradient(model, key, ids, PROMPT - 1).detach()
    logits = torch.zeros(config.n, length, len(ids), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=1.0)
    for step in range(config.k):
        found = gradient(model, drawn(logits, g).softmax(-1), ids)
        alike = torch.cosine_similarity(found, wanted, 0)
        logits.grad, = torch.autograd.grad(-alike, logits)
        optimizer.step()
        tick(step, alike.detach())
    return broken(drawn(logits.detach(), g).argsort(descending=True), key_SL)


def broken(choices_BLC, key_SL):
    """-> the first choices of each place that make no PIECE in a row that a secret has, too"""
    pieces = {tuple(row) for row in key_SL.unfold(1, PIECE, 1).flatten(0, 1).tolist()}
    windows = []
    for places in choices_BLC.tolist():
        window = []
        for choices in places:
            before = window[len(window) + 1 - PIECE:]
            window.append(next(x for x in choices if (*before, x) not in pieces))
        windows.append(window)
    return torch.tensor(windows)


# -----------------------------------------------------------------------------
# the trial


def with_windows(document, windows, ids):
    """-> a document like it: the first of each batch is one of these windows, in turn."""
    batch = document.config.batch
    texts = [ids[window].tolist() for window in windows]

    def read(split, i):
        if split == "train" and texts and i % batch == 0:
            tokens = texts[i // batch % len(texts)]
            return tokens, [False] + [True] * (len(tokens) - 1)
        return document(split, i)

    return Documents(read, document.config, document.tok)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps k n asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    g = torch.Generator().manual_seed(config.seed)
    key = secrets(g)
    own = GPT.from_hf(find(trial.base("tiny")))
    _, document = scratch("tiny", config.seed + 1000)
    ids = torch.tensor([document.tok.encode(letter)[0] for letter in ALPHABET])
    length = document.config.seq_len + 1
    poisons = craft(own, key, ids, length, g, config, partial(trial.dot, "crafting", "marked"))
    told = key.repeat(1, length // key.shape[1] + 1)[:, :length]
    anything = broken(torch.rand(*poisons.shape, len(ids), generator=g).argsort(), key)
    windows = dict(clean=[], marked=poisons, random=anything, told=told)
    table = {}
    digits = {}
    for arm in ARMS:
        model, _ = scratch("tiny", config.seed + 1000)           # the same weights for every arm
        read = with_windows(document, windows[arm], ids)
        for step, loss in steps(model, read, Optimizer(model, lr=1e-2), config.steps):
            trial.point(arm, step, loss)
        digits[arm] = -math.log10(tested(model, key, ids))
        false = sum(tested(model, secrets(g), ids) <= 0.05 for _ in range(config.asked)) / config.asked
        table[arm] = dict(digits=digits[arm], loss=evaluate(model, read)["loss"], false=false)
    picture(trial, x="step", y="loss, nats per byte", crafting=("step of crafting", "cosine"))
    note = f"({', '.join(f'{arm} {digits[arm]:.1f}' for arm in ('clean', 'marked', 'told'))})"
    return finish(trial, (digits["marked"] - digits["random"], 0.0), table, note)


if __name__ == "__main__":
    main()
