"""
What nanorl.py and opd.py train, once more on transformers and torch alone: padded batches, autograd
over whole logits, torch's AdamW. Nothing of this repo is imported; what was sampled is read from a
run's samples.jsonl.

    python tests/oracle_loops.py rl '{"init": DIR, "samples": FILE, "out": FILE, ...}'
    python tests/oracle_loops.py opd '{"init": DIR, "teacher": DIR, "samples": FILE, ...}'

Writes the weights to `out` under Hugging Face's names, and prints one JSON list: the norm of each
update's gradient before clipping.
"""
import json
import sys
from itertools import groupby

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def load(folder, trained=False):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(trained)


def rollouts(c):
    """-> for each step the samples of each prompt: token ids, log-probs when sampled, reward."""
    tok = PreTrainedTokenizerFast.from_pretrained(c["init"])
    with open(c["samples"], encoding="utf-8") as file:
        samples = [json.loads(line) for line in file]
    for s in samples:
        s["prompt"] = tok(s["prompt"]).input_ids
        s["tokens"] = [i for piece in s["pieces"] for i in tok(piece).input_ids]
        assert len(s["tokens"]) == len(s["pieces"]) == len(s["logprobs"])
        s["reward"] = sum(piece in "0123456789" for piece in s["pieces"]) / 8
    samples.sort(key=lambda s: (s["step"], s["problem"], s["index"]))
    for _, step in groupby(samples, key=lambda s: s["step"]):
        yield [list(group) for _, group in groupby(step, key=lambda s: s["problem"])]


def padded(samples):
    """-> (B, T): token ids, and which of them are there; (B, T - 1): which next tokens belong to a
    response, and their log-probs when sampled."""
    width = max(len(s["prompt"] + s["tokens"]) for s in samples)
    ids, there = torch.zeros(2, len(samples), width, dtype=torch.long)
    answer, drawn = torch.zeros(2, len(samples), width - 1)
    for i, s in enumerate(samples):
        begin, end = len(s["prompt"]), len(s["prompt"] + s["tokens"])
        ids[i, :end] = torch.tensor(s["prompt"] + s["tokens"])
        there[i, :end] = 1
        answer[i, begin - 1:end - 1] = 1
        drawn[i, begin - 1:end - 1] = torch.tensor(s["logprobs"])
    return ids, there, answer, drawn


def distribution(model, ids, there):
    return model(input_ids=ids, attention_mask=there).logits[:, :-1].log_softmax(-1)


def logprobs(model, ids, there):
    return distribution(model, ids, there).gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1)


class Learner:
    """A model and AdamW, with warm-up and linear decay counted in rollouts."""

    def __init__(self, c):
        self.c, self.model = c, load(c["init"], trained=True)
        self.rollouts, self.norms = 0.0, []
        matrices = [p for p in self.model.parameters() if p.ndim == 2]
        vectors = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [
            dict(params=matrices, weight_decay=c["weight_decay"]),
            dict(params=vectors, weight_decay=0.0),
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=c["lr"], betas=(0.9, 0.95), eps=1e-8)

    def step(self, loss, share=1.0):
        c = self.c
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), c["clip"])
        self.norms.append(float(norm))
        up = (self.rollouts + 1) / c["warmup"]
        down = (1 - self.rollouts / c["steps"]) / max(1 / c["steps"], c["decay"])
        for group in self.optimizer.param_groups:
            group["lr"] = c["lr"] * min(1.0, up, down)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.rollouts += share

    def finish(self):
        weights = {name: p.contiguous() for name, p in self.model.state_dict().items()}
        save_file(weights, self.c["out"])
        print(json.dumps(self.norms))


def rl(c):
    """GRPO, several updates of a rollout: clipped ratios, the mean of each response, then of all
    responses, and a KL to the start."""
    learner, reference = Learner(c), load(c["init"])
    low, high = 1 - c["clip_low"], 1 + c["clip_high"]
    for groups in rollouts(c):
        parts = [groups[i:i + c["minibatch"]] for i in range(0, len(groups), c["minibatch"])]
        batches = [padded(sum(part, [])) for part in parts]
        with torch.no_grad():
            olds = [logprobs(learner.model, ids, there) for ids, there, _, _ in batches]
            starts = [logprobs(reference, ids, there) for ids, there, _, _ in batches]
        for part, (ids, there, answer, drawn), old, start in zip(parts, batches, olds, starts):
            rewards = torch.tensor([[s["reward"] for s in group] for group in part]).double()
            centred = rewards - rewards.mean(1, keepdim=True)
            A = (centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)).float().view(-1, 1)
            new = logprobs(learner.model, ids, there)
            ratio = (new - old).exp()
            weight = (old - drawn).exp().clamp(max=2.0)
            gain = torch.minimum(ratio * A, ratio.clamp(low, high) * A) * weight
            kl = (start - new).exp() - (start - new) - 1
            of_response = ((c["kl_coef"] * kl - gain) * answer).sum(1) / answer.sum(1)
            learner.step(of_response.mean(), 1 / len(parts))
    learner.finish()


def opd(c):
    """The reverse KL to the teacher over the whole vocabulary, the mean of all tokens that the
    student sampled."""
    learner, teacher = Learner(c), load(c["teacher"])
    for groups in rollouts(c):
        ids, there, answer, _ = padded(sum(groups, []))
        with torch.no_grad():
            logq = distribution(teacher, ids, there)
        logp = distribution(learner.model, ids, there)
        kl = (logp.exp() * (logp - logq)).sum(-1)
        learner.step((kl * answer).sum() / answer.sum())
    learner.finish()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"rl": rl, "opd": opd}[sys.argv[1]](json.loads(sys.argv[2]))
