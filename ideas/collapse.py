"""
collapse.py: models trained on what models wrote, with a verifier in between (arXiv 2406.07515).

A model writes answers, the next one learns from these alone, and so on. Unfiltered, errors are
learned like all the rest. A verifier that throws away some of the wrong ones turns this around,
even if it is often mistaken itself:

    p right answers      the verifier keeps a right one with chance f, a wrong one with chance g
    right among kept     p f / (p f + (1 - p) g)          here f = 1 - noise, g = noise

What decides is this share, measurable before the next model is trained. In the paper's theory
(Gaussian classes, linear models) there is a breakdown point: above 1/2 the next model is perfect,
below it useless, the same as p f > (1 - p) g. A language model copies shares instead: here the
share predicts the accuracy that comes next, and the note says how well, over all arms.

Left out of the paper: its theory, its beams, one generation alone (here there are four).
The paper: transformers that compute eigenvalues, and Llama-2-7B that writes summaries, both get
worse on their own texts, and better with verifiers that are imperfect; their numbers stand in tables
that we could not read. Here: 0.1M parameters and arithmetic with steps, whose real texts slip
themselves. Each generation begins from the same fresh weights and sees as many texts, of other
samples of the same problems (less than a third kept: fewer, more often). Control: a coin, which
throws away as much and knows nothing.

    python -m ideas.collapse
    python -m bench ideas --names collapse
"""
from dataclasses import dataclass

import numpy as np
import torch

import data
import train_gpt
from common.evidence import Claim, Idea, begin, finish, from_scratch, picture
from common.flags import flags, positive
from common.optim import Optimizer
from common.reward import Rewards
from data.documents import Documents
from evaluate import evaluate, paired, sample_and_score
from rollout import Sampler

CLAIM = Claim(paper="2406.07515", says="an imperfect verifier prevents collapse: eigenvalues, summaries",
              measured="accuracy after 4 generations, a verifier wrong in 20% against none", smallest=5.0)
NOISE = {"none": None, "coin": 0.5, "40% wrong": 0.4, "20% wrong": 0.2, "perfect": 0.0}
TASK = "arith"
RECIPE = (f"--data {TASK} --tokenizer chars --n-layer 2 --d-model 64 --n-head 4 --n-kv-head 4 --d-ff 128 "
          "--batch 64")
CHUNK = 500                              # problems that are answered before the verifier counts
MAX_NEW = 48                             # tokens of an answer, at most


@dataclass
class Config(Idea):
    steps: int = 200                     # of each generation
    texts: int = 2500                    # that it learns from
    generations: int = 4                 # after the one that read real texts
    asked: int = 300                     # test problems, 4 samples each

    def __post_init__(self):
        super().__post_init__()
        if self.smoke:
            self.texts, self.generations = 6, 1


# -----------------------------------------------------------------------------
# the idea


def keeps(right, noise, rng):
    """What a verifier that is mistaken in a share `noise` of its verdicts lets through; None: no verifier."""
    return noise is None or right != (rng.random() < noise)


def share_kept_right(p, noise):
    """-> right among kept, where a share p of what was written is right"""
    if noise is None:
        return p
    kept_right = p * (1 - noise)
    return kept_right / max(1e-12, kept_right + (1 - p) * noise)


def written(writer, problems, noise, config, rng, seed):
    """-> the answers that the verifier kept, and the share of all that was right"""
    sampler, tok, rewards = writer
    kept = []
    right = []
    for first in range(0, len(problems), CHUNK):
        some = problems[first:first + CHUNK]
        groups, scores = sample_and_score(sampler, tok, rewards, some, 1, MAX_NEW, 1.0, 1.0, seed)
        for id, (s,) in sorted(groups.items()):
            right.append(scores[id, 0] > 0.5)
            if keeps(right[-1], noise, rng):
                kept.append(s)
        if len(kept) >= config.texts:
            break
    return kept[:config.texts], float(np.mean(right))


def corpus(samples, document):
    """-> a document like it: these answers, in turn."""
    def read(split, i):
        s = samples[i % len(samples)]
        return s.prompt + s.tokens, [False] * len(s.prompt) + [True] * len(s.tokens)
    return Documents(read, document.config, document.tok)


# -----------------------------------------------------------------------------
# the trial


def trained(config, samples=None, bar=None):
    """-> a model of the same fresh weights, after the real corpus or after these answers"""
    given = configured(config)
    model, document, _ = train_gpt.setup(given, torch.device("cpu"), torch.float32)
    optimizer = Optimizer(model, lr=given.lr, muon_lr=given.muon_lr)
    read = corpus(samples, document) if samples else document
    for _ in train_gpt.steps(model, read, optimizer, config.steps):
        if bar is not None:
            bar.update()
    return model


def configured(config):
    return train_gpt.configure([*RECIPE.split(), "--steps", str(config.steps), "--seed", str(config.seed)])


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps texts generations asked")
    from_scratch(config)
    trial = begin(config, __file__, CLAIM, (*NOISE,), config.steps * config.generations)
    task = data.load(TASK)
    tok = data.tokenizer("chars")
    rewards = Rewards(trial.reward or TASK, workers=1)
    problems = task.problems("train", 3 * config.texts, config.seed)
    asked = task.problems("test", config.asked, config.seed)

    def ask(model):
        sampler = Sampler(model, tok.stop, tok)
        return sampler, evaluate(sampler, tok, task, rewards, asked, 4, MAX_NEW, scores=True)

    first = ask(trained(config))
    results = {"real texts": first[1]}
    pairs = []
    for arm, noise in NOISE.items():
        rng = np.random.default_rng(config.seed)
        sampler, result = first
        trial.dot("", arm, 0, result["avg"])
        for number in range(1, config.generations + 1):
            samples, p = written((sampler, tok, rewards), problems, noise, config, rng, seed=number)
            sampler, result = ask(trained(config, samples, trial.bar))
            trial.dot("", arm, number, result["avg"])
            predicted = share_kept_right(p, noise)
            trial.dot("share", arm, predicted, result["avg"])
            pairs.append((predicted, result["avg"]))
        results[arm] = result
    rewards.close()
    table = {arm: {k: result[k] for k in ("avg", "maj", "pass@4")} for arm, result in results.items()}
    spread = np.std(np.array(pairs), axis=0).min()
    r = np.corrcoef(np.array(pairs).T)[0, 1] if spread else 0.0
    picture(trial, x="generation", y="accuracy on test problems",
            share=("right among the texts it learned from, predicted", "accuracy on test problems", "o"))
    return finish(trial, paired(results["20% wrong"], results["none"], "avg"), table,
                  note=f"(the predicted share and the accuracy after it: r = {r:.2f})")


if __name__ == "__main__":
    main()
