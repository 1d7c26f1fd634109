"""
cartridges.py: a short trained cache in place of a long text (Cartridges, arXiv 2506.06266).

Who asks many questions about one text pays for its keys and values each time. Here a cache of 16
places is trained instead, once per text: the weights stay, the 16 keys and values of each layer
learn. They begin as those of the text's first 16 tokens, the first of them stays. What is trained
matters:

    self-study    ask about the text: what the model answers with the whole text in its context is
                  what it should answer with the cache
                  sum_t p(t | text, question) log q(t | cache, question)
    next token    predict the text itself after the cache: it learns the letters, not what is asked

In the paper a model writes the questions itself, from five kinds of requests, and the cache learns
from its answers' 20 likeliest tokens; here the text is a list of keys and values, a question is a
key, and all tokens count. Two caches laid side by side can be asked about both texts, though
neither was trained so. Adam and its rate are those of the authors' code.

The paper: as good as the whole text with 38.6 times less memory, Llama 8B on texts of 100k to 484k
tokens; next-token training is not competitive. Here: the start `recall`, texts of 256 tokens with
16 keys, so 16 times less; asked with the text, with its first 16 tokens, with the trained caches.
Training asks two keys, one after the other; the test asks for the second of pairs that were not
among them.

    python -m ideas.cartridges
    python -m bench ideas --names cartridges
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.hf import find
from data.recall import KEYS, VALUES, one_of, shuffled
from train_gpt import GPT, scratch

CLAIM = Claim(paper="2506.06266", says="as good as the whole text with 38.6 times less memory, Llama 8B",
              measured="what is left of an allowance of 5 points, a cache of 16 against a text of 256",
              smallest=1.0)
ARMS = ("self-study", "next token")      # idea; control. The text and its first 16 need no training
PLACES = 16
LENGTH = 256
ASKED = 16                               # keys of a text
TEXTS = 12                               # in pairs that share no key


@dataclass
class Config(Idea):
    steps: int = 300                     # of training the caches, all texts at once
    lr: float = 2e-2                     # Adam


# -----------------------------------------------------------------------------
# texts and caches


def text_of(seed, i):
    """-> a text like recall's, with half of the keys, and {key: value}; 2 j and 2 j + 1 share none"""
    half = i % 2 * ASKED
    keys = shuffled(KEYS, data.stream("cartridges keys", "test", seed, i // 2))[half:half + ASKED]
    rand = data.stream("cartridges", "test", seed, i)
    parts = [key + one_of(VALUES, rand) for key in keys]
    found = dict(parts)
    for _ in range(LENGTH - 2 * len(keys)):
        parts[int(rand() * len(parts))] += one_of(VALUES, rand)
    return "".join(parts), found


def behind(cache, seen=None):
    """-> attend() of B sequences as long as each other behind a cache
    (layers, 2, B, heads, places, width). seen: a list that takes the keys and values of each layer"""
    def attend(layer, q, k, v):
        B = cache.shape[2]
        q, k, v = (x.view(B, -1, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if seen is not None:
            seen.append(torch.stack([k, v]))
        k, v = (torch.cat([old, new], 2) for old, new in zip(cache[layer], (k, v)))
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        grouped = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)
        return o.transpose(1, 2).flatten(0, 1)

    return attend


def continued(model, cache, tokens_BL, seen=None):
    """-> log-probs (B, L, V) of what follows each token, behind a cache"""
    B, L = tokens_BL.shape
    positions = torch.arange(cache.shape[4], cache.shape[4] + L).repeat(B)
    hidden = model(tokens_BL.flatten(), positions, behind(cache, seen))
    return (hidden @ model.head_weight.t()).log_softmax(-1).view(B, L, -1)


@torch.no_grad()
def cache_of(model, tokens_BL):
    """-> the keys and values of texts"""
    c = model.config
    empty = torch.zeros(c.n_layer, 2, len(tokens_BL), c.n_kv_head, 0, c.head_dim)
    seen = []
    continued(model, empty, tokens_BL, seen)
    return torch.stack(seen)


def for_each(cache, times):
    """-> a cache of each text, for as many questions about it"""
    return cache.repeat_interleave(times, 2)


# -----------------------------------------------------------------------------
# the idea


def turns(first_BQ2, answers_BQ, shift):
    """-> (B, Q, 5): another question, its answer, and the question"""
    others = first_BQ2.roll(shift, 1), answers_BQ.roll(shift, 1).unsqueeze(2)
    return torch.cat([*others, first_BQ2], 2)


def trained(model, texts_BL, questions_BQ2, answers_BQ, arm, config, tick):
    """-> (layers, 2, B, heads, PLACES, width), all texts at once"""
    B, Q, _ = questions_BQ2.shape
    whole = cache_of(model, texts_BL)
    cache = whole[..., :PLACES, :].clone()
    free = cache[..., 1:, :].clone().requires_grad_()            # the first place stays
    with torch.no_grad():
        told = continued(model, for_each(whole, Q), questions_BQ2.flatten(0, 1))[:, -1]
    taught = told.exp().view(B, Q, -1)
    optimizer = torch.optim.Adam([free], lr=config.lr)
    for step in range(config.steps):
        now = torch.cat([cache[..., :1, :], free], 4)
        if arm == "self-study":
            shift = 2 + step % (Q - 2)           # by 1: the pairs that are asked at the end
            asked = turns(questions_BQ2, answers_BQ, shift).flatten(0, 1)
            logp = continued(model, for_each(now, Q), asked).view(B, Q, asked.shape[1], -1)
            both = taught.roll(shift, 1) * logp[:, :, 1] + taught * logp[:, :, -1]
            loss = -both.sum(2).mean() / 2
        else:
            logp = continued(model, now, texts_BL[:, :-1])
            loss = -logp.gather(2, texts_BL[:, 1:].unsqueeze(2)).mean()
        free.grad, = torch.autograd.grad(loss, free)
        optimizer.step()
        tick(step, loss.detach())
    return torch.cat([cache[..., :1, :], free.detach()], 4)


# -----------------------------------------------------------------------------
# the trial


@torch.no_grad()
def accuracy(model, cache, turns_BQL, answers_BQ):
    """-> percent; turns: questions, the last token of each is followed by the answer"""
    logp = continued(model, for_each(cache, turns_BQL.shape[1]), turns_BQL.flatten(0, 1))[:, -1]
    return 100 * float((logp.argmax(1) == answers_BQ.flatten()).float().mean())


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, ARMS, config.steps)
    model = GPT.from_hf(find(trial.base("recall"))).requires_grad_(False)
    tok = scratch("recall", config.seed)[1].tok
    pairs = [text_of(config.seed, i) for i in range(TEXTS)]
    texts = torch.tensor([tok.encode(text) for text, _ in pairs])
    first = torch.tensor([[tok.encode(f"?{key}") for key in found] for _, found in pairs])
    answers = torch.tensor([[tok.encode(value)[0] for value in found.values()] for _, found in pairs])
    second = turns(first, answers, 1)
    whole = cache_of(model, texts)
    caches = {"text": whole, "first 16": whole[..., :PLACES, :]}
    for arm in ARMS:
        caches[arm] = trained(model, texts, first, answers, arm, config,
                              lambda x, y, arm=arm: trial.point(arm, x, y))
    table = {arm: dict(second=accuracy(model, cache, second, answers),
                       first=accuracy(model, cache, first, answers)) for arm, cache in caches.items()}
    for arm, cache in caches.items():            # its neighbor's cache before its own, or behind it
        swapped = cache.unflatten(2, (-1, 2)).flip(3).flatten(2, 3)
        pairs = (swapped, cache), (cache, swapped)
        both = [accuracy(model, torch.cat(pair, 4), second, answers) for pair in pairs]
        table[arm]["composed"] = sum(both) / 2
    gain = table["self-study"]["second"] - table["text"]["second"] + 5
    picture(trial, x="step", y="loss, nats")
    others = (f"{arm} {table[arm]['second']:.0f}%" for arm in ("next token", "first 16"))
    note = f"({', '.join(others)})"
    return finish(trial, (gain, 0.0), table, note)


if __name__ == "__main__":
    main()
