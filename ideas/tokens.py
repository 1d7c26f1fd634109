"""
tokens.py: how much text should a token hold? (compute-optimal tokenization, 2605.01188)

    compute   = 6 * parameters * tokens          what a run costs, attention added
    loss      in bits per BYTE                   a token is what the tokenizer says it is

The more bytes a token holds, the more text a model reads for the same compute, and the more there is
to know of each. The paper trained 988 models of 50M to 7B with tokens of chosen length: for the best
loss parameters grow with the BYTES of the text, not with its tokens (20 tokens per parameter is an
artefact of one tokenizer), and the best length falls as compute grows. The law takes budgets times
lengths times sizes: that needs scale. What is cheap is one budget, and that is measured here: bits per
byte of four vocabularies at the same compute and the same model, but for its table and head.

Byte pair encoding is learned from Python's own library, merges stay in words, and each text is 384
bytes for every arm, so that all see as far back. Each arm takes as many tokens per step, and steps
until the compute of `bytes` is used up. The control, `shuffled`, has as many tokens in its vocabulary
as 1,024, learned where the letters of each word were shuffled: as large a table and head, but shorter
tokens. Left out: the law, latent tokens (BLT), by which the paper sets any length, other languages.

    python -m ideas.tokens
    python -m bench ideas --names tokens
"""
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import regex
import tiktoken

from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from data.documents import Documents
from data.stdlib import window
from data.tokenizer import Tokenizer
from train_gpt import GPT, evaluate, scratch, steps

CLAIM = Claim(paper="2605.01188", says="bytes, not tokens, per parameter; the best length falls with compute",
              measured="bits per byte with 1,024 tokens below that of bytes, at equal compute", smallest=2.0,
              unit="0.01 bits",
              scale="the law took 988 models of 50M to 7B; here is one budget of 10^12 operations")
ARMS = {"bytes": 256, "512": 512, "1,024": 1024, "2,048": 2048, "shuffled": 1024}        # and an end token
WORDS = r" ?[A-Za-z_]+| ?[0-9]+| ?[^\sA-Za-z_0-9]+|\s+"
LEARN = 200_000                          # bytes to learn merges from
LENGTH = 384                             # bytes of a text
LR, MUON_LR = 1e-2, 1.4e-2


@dataclass
class Config(Idea):
    steps: int = 500                     # of the arm `bytes`
    batch: int = 2048                    # tokens of a step, about
    asked: int = 200                     # texts for the losses


# -----------------------------------------------------------------------------
# the tokenizers


def learned(words, total):
    """words: {bytes: how often} -> the tokens, single bytes first, in the order in which they were merged"""
    texts = [[bytes([byte]) for byte in word] for word in words]
    times = list(words.values())
    tokens = [bytes([byte]) for byte in range(256)]
    found = Counter()
    where = defaultdict(set)

    def count(i, sign):
        for pair in zip(texts[i], texts[i][1:]):
            found[pair] += sign * times[i]
            where[pair].add(i)

    for i in range(len(texts)):
        count(i, 1)
    while len(tokens) < total and found:
        left, right = max(found, key=found.get)
        if not found[left, right]:
            break
        tokens += [left + right] * (left + right not in tokens)
        for i in where[left, right]:
            count(i, -1)
            joined = []
            for token in texts[i]:
                if joined and (joined[-1], token) == (left, right):
                    joined[-1] += token
                else:
                    joined.append(token)
            texts[i] = joined
            count(i, 1)
        del found[left, right]
    return tokens


def tokenizer(total, seed, shuffled=False, size=LEARN):
    """-> one of so many tokens and its end token"""
    text = window("train", seed, 1_000_000, size)                # far from what is trained on
    words = [word.encode() for word in regex.findall(WORDS, text)]
    if shuffled:
        rand = random.Random(seed)
        words = [bytes(rand.sample(word, len(word))) for word in words]
    tokens = learned(Counter(words), total)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    encoding = tiktoken.Encoding("bpe", pat_str=WORDS, mergeable_ranks=ranks,
                                 special_tokens={"<|end|>": len(ranks)})
    return Tokenizer("bpe", encoding, "<|end|>")


# -----------------------------------------------------------------------------
# the trial


def texts(document, tok, batch):
    """-> the same texts by any tokenizer"""
    c = replace(document.config, batch=batch)

    def read(split, i):
        tokens = tok.encode(window(split, c.seed, i, LENGTH))
        return tokens, [False] + [True] * (len(tokens) - 1)

    return Documents(read, c, tok)


def cost(model, lengths):
    """-> floating point operations per step on texts of these lengths"""
    c = model.config
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed"))
    squares = sum(n**2 for n in lengths)
    return 6 * weights * sum(lengths) + 6 * c.n_layer * c.n_head * c.head_dim * squares


def built(arm, config):
    """-> the model, its texts, and what a step costs"""
    shape, document = scratch("tiny", config.seed)
    document.config.eval_docs = config.asked
    size = 2000 if config.smoke else LEARN
    tok = tokenizer(ARMS[arm], config.seed, arm == "shuffled", size)
    model = GPT(replace(shape.config, vocab_size=tok.vocab_size)).init_weights(config.seed, embedding=0.7)
    sample = [len(tok.encode(window("train", config.seed, i, LENGTH))) for i in range(50)]
    batch = max(1, round(config.batch * len(sample) / sum(sample)))
    return model, texts(document, tok, batch), cost(model, sample) * batch / len(sample)


def train(arm, trial, config, budget):
    """budget: operations; None: what the steps of this arm cost, which is returned"""
    model, document, each = built(arm, config)
    budget = budget or each * config.steps
    total = max(1, round(budget / each))
    for step, loss in steps(model, document, Optimizer(model, lr=LR, muon_lr=MUON_LR), total):
        trial.dot("", arm, step * each / 1e12, loss)
    trial.bar.update()
    read = [document("valid", i) for i in range(config.asked)]
    bytes_each = LENGTH / (sum(len(tokens) for tokens, _ in read) / len(read))
    return dict(evaluate(model, document), length=bytes_each, steps=total,
                megabytes=total * document.config.batch * LENGTH / 1e6), budget


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps batch asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, tuple(ARMS), 1)
    results = {}
    budget = None
    for arm in ARMS:
        results[arm], budget = train(arm, trial, config, budget)
        trial.dot("bits", arm, results[arm]["length"], results[arm]["bpb"])
    gain = {arm: 100 * (results["bytes"]["bpb"] - row["bpb"]) for arm, row in results.items()}
    picture(trial, x="10^12 operations", y="loss, nats per token", bits=("bytes of a token", "bits per byte"))
    note = "(" + ", ".join(f"{arm} {gain[arm]:+.1f}" for arm in list(ARMS)[1:]) + ")"
    return finish(trial, (gain["1,024"], 0.0), results, note=note)


if __name__ == "__main__":
    main()
