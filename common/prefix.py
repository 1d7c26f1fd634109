"""
prefix.py: what sequences continue from. It is computed before they enter the batch, a chunk in each
step, so that a long prompt does not hold up those that run.

    a prompt, three samples, the first of which is resumed with the tokens it has:

    Prefix(prompt)                 samples 1 and 2: computed once for both
      Prefix(prompt + tokens)      sample 0: begins with the prompt's keys and computes the rest

Keys and values lie in the sampler's storage, until the last sequence that needs them has entered. What
a sequence continues from once it has is a copy of its own, or shared pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(eq=False)
class Prefix:
    tokens: list[int]
    prompt: Prefix | None = None         # whose keys it begins with, if it is more than a prompt
    waiting: int = 0                     # of a prompt: the samples of it that have not entered
    done: int = 0                        # keys computed so far
    hidden: torch.Tensor | None = None   # of the last token, once all keys are computed
    cache: object = None                 # the keys and values, as the storage holds them; None: none

    @property
    def root(self):
        return self.prompt or self

    def longer(self, tokens):
        """-> the prompt and these tokens of a sample."""
        return Prefix(self.root.tokens + tokens, self.root) if tokens else self.root


class Prefixes:
    """Computes them, and holds them in the storage while they are needed."""

    def __init__(self, model, storage, chunk, multiple):
        self.model = model
        self.storage = storage
        self.chunk = chunk               # tokens between two decode steps
        self.multiple = multiple         # rows of a product are padded to that

    def compute(self, prefixes):
        """The next chunk of these, which are the first in line, as one packed row. -> was there any?"""
        pieces = []                      # (prefix, begin, end)
        budget = self.chunk
        for prefix in prefixes:
            prefix = self._first(prefix)
            if not self._open(prefix):
                break
            if prefix.hidden is not None or any(prefix is p for p, _, _ in pieces):
                continue
            # chunks end where the prefix's own length says, not the budget: the same sums in any
            # company
            todo = min(len(prefix.tokens) - prefix.done, self.chunk - prefix.done % self.chunk)
            if pieces and todo > budget:
                break
            pieces.append((prefix, prefix.done, prefix.done + todo))
            budget -= todo
        if not pieces:
            return False

        tokens, positions, last = [], [], []
        for prefix, begin, end in pieces:
            tokens += prefix.tokens[begin:end]
            positions += range(begin, end)
            last.append(len(tokens) - 1)
        padding = [0] * (-len(tokens) % self.multiple)
        device = self.model.head_weight.device
        tokens_T = torch.tensor(tokens + padding, device=device)
        positions_T = torch.tensor(positions + padding, device=device)
        hidden_TD = self.model(tokens_T, positions_T, self.storage.prefill(pieces))
        for (prefix, _, end), i in zip(pieces, last):
            prefix.done = end
            if end == len(prefix.tokens):
                prefix.hidden = hidden_TD[i].clone()
        return True

    def _first(self, prefix):
        """What has to be computed before this can be: its prompt, if others continue from it too."""
        prompt = prefix.prompt
        if prefix.cache is None and prompt is not None and prompt.hidden is None:
            if prompt.waiting > 1 or prompt.cache is not None:
                return prompt
        return prefix

    def _open(self, prefix):
        """-> has it a place in the storage?"""
        if prefix.cache is None:
            prompt = prefix.prompt
            if prompt is not None and prompt.cache is None:
                prompt = None            # no other needs the mere prompt
            return self.storage.open(prefix, prompt)
        return True

    def close(self, prefix):
        if prefix.cache is not None:
            self.storage.close(prefix)
        prefix.cache = None
        prefix.hidden = None
        prefix.done = 0

    def entered(self, prefix):
        """A sequence that continues from it has a copy of it now."""
        prompt = prefix.root
        prompt.waiting -= 1
        if prefix is not prompt:
            self.close(prefix)
        if not prompt.waiting:
            self.close(prompt)

    # --- where the storage is small

    def make_way(self, prefixes):
        """Nothing runs, and the first of these cannot enter: those that it does not need hold its pages.
        They are computed again later. -> may it enter now?"""
        first = prefixes[0]
        needed = first if first.cache is not None else first.root
        others = [p for prefix in prefixes for p in (prefix, prefix.root)
                  if p is not needed and p.cache is not None]
        for p in others:
            self.close(p)
        if first.cache is None and first is not needed:
            if needed.cache is None or not self.storage.open(first, needed):
                self.close(needed)       # there are not enough pages for both, even so
                self.storage.open(first)
        return bool(others) and first.hidden is not None

    def give_up_one(self, prefixes):
        """The last of these that has a place in the storage loses it. -> was there one?"""
        for prefix in reversed(prefixes):
            for p in (prefix, prefix.root):
                if p.cache is not None:
                    self.close(p)
                    return True
        return False
