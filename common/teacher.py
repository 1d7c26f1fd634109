"""
The teacher of a distillation: a second model, next to the one that learns.

    audit           may it teach? same tokenizer (by content), same stop ids, same chat template
    load_teacher    its weights, frozen
    texts           the gold of a file, and prompts that only the teacher sees
    sides           student and teacher at the same predictions of the same packed row

opd.py learns from it, opd_check.py asks beforehand whether that will work; neither has a server.
"""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

import data
import pack
from algos import key
from common import hf
from common.flags import die
from train_gpt import GPT


# -----------------------------------------------------------------------------
# the audit: may these two talk about the same tokens?

PROBES = ["C3 7 12=43:", "12*3=36,36+7=43", "Let x = 10,000. Then f(x) = x^2 - 1 and so on.\n\n    "
                                            "return x"]


def token_bytes(tok, i):
    try:
        return tok.encoding.decode_single_token_bytes(i)
    except (KeyError, OverflowError):
        return None                                              # a hole in the numbering


def tokens_differ(a, b):
    """Why an id of one tokenizer is not the same text to the other, or nothing. By content: folders
    and names do not matter."""
    if a.vocab_size != b.vocab_size:
        return f"{a.name} has {a.vocab_size:,} tokens, {b.name} has {b.vocab_size:,}"
    for i in range(a.vocab_size):
        one = token_bytes(a, i)
        two = token_bytes(b, i)
        if one != two:
            return f"id {i} is {one!r} in {a.name} and {two!r} in {b.name}"
    for text in PROBES:
        if a.encode(text) != b.encode(text):
            return f"they cut {text[:30]!r} into different tokens"
    return ""


def chat_differs(a, b):
    """Do their chat templates word the same talk differently? Then the teacher reads prompts that
    it was not trained on."""
    talk = [{"role": "user", "content": "1+1?"}]
    words = []
    for tok in (a, b):
        try:
            words.append(tok.chat(talk))
        except ValueError:
            words.append(None)                                   # a base model without a template
    return words[0] != words[1]


def stop_class(*toks):
    """All ids that end a response in any of these tokenizers: one action, whichever id a model
    prefers (arXiv 2609.20511)."""
    return sorted(set().union(*(tok.stop for tok in toks)))


def audit(tok, its):
    """-> the lines about what the two do not share, beyond the vocabulary."""
    lines = []
    if tok.stop != its.stop:
        lines.append(f"stop ids differ: {sorted(tok.stop)} and {sorted(its.stop)}; opd.py scores "
                     "them as one action (--eos-class)")
    if chat_differs(tok, its):
        lines.append("chat templates differ: prompts should be worded as the teacher's training "
                     "worded them")
    return lines


def load_teacher(folder, tok, env, width):
    """-> (model, its tokenizer), weights frozen. width: rows of the student's head. What cannot
    teach is refused, with the reason."""
    try:
        folder = hf.find(folder)
        its = data.tokenizer(folder)
        why = tokens_differ(tok, its)
        if why:
            raise ValueError(f"the teacher {folder} has another vocabulary than the student: "
                             f"{why}. Give one with the same tokenizer")
        model = GPT.from_hf(folder, dtype=env.dtype, device=env.device).requires_grad_(False)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    its.date = tok.date or its.date                  # both are told the same day
    bad = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if bad:
        die(f"the teacher {folder} has nan or inf in {bad[0]}: it cannot score anything; take an "
            "earlier checkpoint")
    if min(width, len(model.head_weight)) < tok.vocab_size:
        die(f"the teacher {folder} has a head of {len(model.head_weight)} rows for a vocabulary of "
            f"{tok.vocab_size}")
    return model, its


# -----------------------------------------------------------------------------
# texts: the gold of a file, and prompts that only the teacher sees


def read_gold(path, tok, longest):
    """-> [(prompt, response)] as tokens."""
    texts = []
    if not Path(path).is_file():
        raise FileNotFoundError(f"--gold {path}: no such file")
    for n, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            found = json.loads(line)
            prompt = data.begun(tok.encode(found["prompt"]), tok)
            response = tok.encode(found["response"]) + tok.encode(tok.end)
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f'--gold {path}, line {n}: not a JSON object with "prompt" and '
                             '"response"') from None
        size = len(prompt) + len(response)
        if not prompt or size > longest:
            raise ValueError(f"--gold {path}, line {n}: {size} tokens, and a row takes 2 to "
                             f"{longest} with a prompt")
        texts.append((prompt, response))
    if not texts:
        raise ValueError(f"--gold {path} is empty: give one text a line")
    return texts


def privileged(config, tok, problems, room):
    """{problem: prompt} of a teacher that knows more."""
    missing = sum(p.gold is None for p in problems)
    if missing:
        raise ValueError(f"--context {config.context}: {missing} of {len(problems)} problems have "
                         "no gold answer")
    found = {}
    for p in problems:
        known = p.gold if config.context == "gold" else p.gold[:-(-len(p.gold) // 2)]
        text = config.context_text.replace("{context}", known)
        if "messages" in p.data:         # into the last message, so that the template stays whole
            *before, last = p.data["messages"]
            content = text.replace("{prompt}", last["content"])
            text = tok.chat([*before, {**last, "content": content}])
        else:
            text = text.replace("{prompt}", p.prompt)
        found[p.id] = data.begun(tok.encode(text), tok)
        if len(found[p.id]) + config.max_new > room:
            raise ValueError(f"--context: a prompt of {len(found[p.id])} tokens and --max-new "
                             f"{config.max_new}; the teacher serves {room}")
    return found


# -----------------------------------------------------------------------------
# what it says of a batch


def teacher_hidden(taught, batch, contexts):
    """-> the teacher's hidden states at the batch's predictions. contexts: {problem: its own prompt}."""
    if not contexts:
        return batch.hidden(taught)
    device = batch.targets_N.device
    samples = [replace(s, prompt=contexts.get(s.problem, s.prompt)) for s in batch.samples]
    other = pack.rows([segment for s in samples for segment in pack.alone(s)]).to(device)
    place = {key(s): i for i, s in enumerate(batch.samples)}
    places = torch.tensor([place[key(s)] for s in other.samples], device=device)
    order_N = places[other.sample_N].argsort(stable=True)    # back in the order of the batch
    return other.hidden(taught)[order_N]


def sides(model, teacher, batch, hidden_ND, head_VD, contexts=None):
    """-> p, q: the hidden states of both at the same predictions, the rows of both heads that are
    tokens; and which predictions the teacher could not score."""
    taught = teacher or model
    with torch.no_grad():
        taught_ND = teacher_hidden(taught, batch, contexts)
        bad_N = ~taught_ND.isfinite().all(1)
        taught_ND = taught_ND.masked_fill(bad_N.unsqueeze(1), 0.0)
    width = min(len(head_VD), len(taught.head_weight))   # heads are padded, to different multiples
    p = SimpleNamespace(hidden_ND=hidden_ND, head_VD=head_VD[:width])
    q = SimpleNamespace(hidden_ND=taught_ND, head_VD=taught.head_weight[:width].detach())
    return p, q, bad_N
