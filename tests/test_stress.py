"""
the sampler under load: 10,000 random submits, aborts, resumes and preemptions on a pool that is too small.
No page leaks, no token is lost, and every sample has the tokens that it has alone
"""
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch

from kernels import packed_attention, truncated, uniform
from rollout import Sample, Sampler
from tests.models import random_matrices
from train_gpt import GPT, GPTConfig

V, STOP, SEED = 40, 3, 5
OPERATIONS = 10_000
SLOTS, PAGES = 6, 9          # page 0 is padding's: 8 pages of 32 tokens for six sequences of up to 160 tokens


def small():
    return random_matrices(GPT(GPTConfig(V, 1, 2, 1, 8, 16, 16, 200, 1e4)))


@dataclass
class Asked:
    """One submit(), and what became of its samples: each index is in exactly one of the three."""
    problem: int
    prompt: list
    n: int
    settings: dict           # of submit()
    max_new: int
    flying: set = field(default_factory=set)
    aborted: dict = field(default_factory=dict)      # index -> Sample: it may be resumed
    ended: dict = field(default_factory=dict)


class Load:
    def __init__(self, sampler, seed):
        self.sampler = sampler
        self.lot = random.Random(seed)
        self.asked = {}                  # problem -> Asked, of all time
        self.done = Counter()            # operations that did something

    def some(self, holds):
        found = [a for a in self.asked.values() if holds(a)]
        return self.lot.choice(found) if found else None

    # --- operations. -> did it do anything?

    def submit(self):
        lot = self.lot
        if self.sampler.live > 16:
            return False
        problem, n = len(self.asked), lot.randint(1, 4)
        prompt = [lot.randrange(V) for _ in range(lot.choice([1, 5, 31, 32, 33, 60]))]
        settings = dict(seed=SEED, visit=lot.randrange(3), temperature=lot.choice([1.0, 1.0, 0.7, 0.0]))
        settings |= lot.choice([{}, {}, {}, dict(top_k=5), dict(top_p=0.8)])
        a = Asked(problem, prompt, n, settings, lot.choice([1, 8, 30, 60, 100]), set(range(n)))
        self.asked[problem] = a
        self.sampler.submit(problem, prompt, n, a.max_new, **settings)
        return True

    def abort(self):
        a = self.some(lambda a: a.flying)
        if a is None:
            return False
        for s in self.sampler.abort(a.problem):
            assert s.problem == a.problem and s.index in a.flying and s.finished == "aborted"
            assert len(s.tokens) == len(s.logprobs) < a.max_new and STOP not in s.tokens
            a.flying.remove(s.index)
            a.aborted[s.index] = s
        return True                      # what stays in flight has ended: the next step() hands it back

    def resume(self):
        a = self.some(lambda a: a.aborted and not a.flying)
        if a is None or self.sampler.live > 16:
            return False
        back = [a.aborted.pop(index) for index in list(a.aborted)]
        self.lot.shuffle(back)
        a.flying |= {s.index for s in back}
        self.sampler.submit(a.problem, a.prompt, len(back), a.max_new, resume=back, **a.settings)
        return True

    def preempt(self):
        self.sampler._end_batch()        # as where no page is left: nothing is in the batch alone
        if not self.sampler.running:
            return False
        self.sampler._preempt()
        return True

    def step(self):
        for s in self.sampler.step():
            a = self.asked[s.problem]
            assert s.index in a.flying, "nobody asked for it, or it comes twice"
            a.flying.remove(s.index)
            a.ended[s.index] = s
        return True

    def run(self, operations):
        names = ["submit", "abort", "resume", "preempt", "step"]
        for number in range(operations):
            name = self.lot.choices(names, [20, 3, 6, 2, 69])[0]
            self.done[name] += torch.inference_mode()(getattr(self, name))()
            assert self.sampler.live == sum(len(a.flying) for a in self.asked.values() if a.flying)
            if number % 50 == 0:
                nothing_leaks(self.sampler)
        while any(a.aborted for a in self.asked.values()) or self.sampler.live:
            self.resume()                # at the end everything is wanted: every sample ends
            self.step()
        nothing_leaks(self.sampler)


def nothing_leaks(sampler):
    """slots and pages: each is free, or is held by those who say so, and by nobody else"""
    assert sampler.free.left + len(sampler.running) == sampler.slots
    assert all(s.slot == slot for slot, s in sampler.running.items())
    storage = sampler.storage
    if not sampler.paged:
        assert set(storage.places) == set(sampler.running)
        assert all(slab.slots[row] == slot for slot, (slab, row) in storage.places.items())
        assert sum(len(slab.slots) for slab in storage.slabs.values()) == len(sampler.running)
        return
    owners = [s for s in (*sampler.waiting, *sampler.running.values())]
    prefixes = {id(p): p for s in owners for p in (s.prefix, s.prefix.root) if p.cache is not None}
    held = Counter([0])                  # padding's
    for pages in (*storage.owned.values(), *(p.cache for p in prefixes.values())):
        held.update(pages)
    assert set(storage.owned) == set(sampler.running)
    assert storage.pages.owners == [held[page] for page in range(PAGES)]
    assert sorted(storage.pages.unowned) == [page for page in range(PAGES) if not held[page]]


def equal_or_tied(model, a, s, other):
    """Equal; or parted where the uniform fell on the border of two tokens, or two were as likely, within
    rounding. -> were they equal?"""
    if s.tokens == other.tokens:
        return True
    t = next(t for t, (x, y) in enumerate(zip(s.tokens, other.tokens)) if x != y)
    x, y = s.tokens[t], other.tokens[t]
    prefix = a.prompt + s.tokens[:t]
    T = len(prefix)
    with torch.no_grad():
        hidden = model(torch.tensor(prefix), torch.arange(T), packed_attention([0, T], T))[-1]
        logits = hidden.double() @ model.head_weight.double().t()
    temperature = a.settings["temperature"]
    if temperature == 0:
        assert abs(float(logits[x] - logits[y])) < 1e-5, "parted without a tie"
        return False
    p = (logits / temperature).softmax(0)
    if "top_k" in a.settings or "top_p" in a.settings:
        top_k = torch.tensor([a.settings.get("top_k", 0)])
        top_p = torch.tensor([a.settings.get("top_p", 1.0)])
        p = truncated(p.unsqueeze(0), top_k, top_p)[0][0]
        p = p / p.sum()
    cdf = [0.0, *p.cumsum(0).tolist()]
    u = float(uniform(SEED, s.visit, s.problem, s.index, t))
    assert min(abs(border - u) for border in (*cdf[x:x + 2], *cdf[y:y + 2])) < 1e-5, "parted without a tie"
    return False


def submit(sampler, a, indices):
    """samples by their address, which alone decides their noise"""
    fresh = [Sample(a.prompt, [], [], "aborted", a.problem, index, a.settings["visit"]) for index in indices]
    sampler.submit(a.problem, a.prompt, len(fresh), a.max_new, resume=fresh, **a.settings)


def in_peace(model, asked):
    """-> {(problem, index): the sample, made where nothing is aborted and nothing is short}"""
    sampler = Sampler(model, {STOP}, slots=64, exact=True)
    for a in asked:
        submit(sampler, a, range(a.n))
    found = {}
    while sampler.live:
        found |= {(s.problem, s.index): s for s in sampler.step()}
    return found


def by_itself(sampler, a, index):
    """the sample in a sampler where nothing else is"""
    submit(sampler, a, [index])
    while sampler.live:
        for s in sampler.step():
            return s


KINDS = dict(pages=dict(paged=True, pages=PAGES), slabs=dict(exact=False), exact=dict(exact=True))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_ten_thousand_operations(kind):
    model = small()
    sampler = Sampler(model, {STOP}, slots=SLOTS, **kind)
    preempted, preempt = [], sampler._preempt
    sampler._preempt = lambda: (preempted.append(1), preempt())
    load = Load(sampler, seed=1)
    load.run(OPERATIONS if sampler.paged else OPERATIONS // 5)
    done = load.done
    assert all(done[name] for name in ("submit", "abort", "resume", "preempt", "step")), done
    if sampler.paged:
        assert len(preempted) > done["preempt"] + 30, "some are preempted because no page is left"

    # no token is lost, none is of another sample, and the log-probs are those of the tokens
    peace = in_peace(model, load.asked.values())
    parted = []
    for a in load.asked.values():
        assert sorted(a.ended) == list(range(a.n)), "every sample ends once"
        for index, s in a.ended.items():
            assert len(s.tokens) == len(s.logprobs) and (s.prompt, s.visit) == (a.prompt, a.settings["visit"])
            assert s.finished == ("stop" if s.tokens[-1] == STOP else "length") and STOP not in s.tokens[:-1]
            other = peace[a.problem, index]
            if equal_or_tied(model, a, s, other):
                assert s.finished == other.finished
                assert torch.allclose(torch.tensor(s.logprobs), torch.tensor(other.logprobs), atol=1e-4)
                assert (s.kept is None) == (other.kept is None)
                if s.kept is not None:
                    assert torch.allclose(torch.tensor(s.kept), torch.tensor(other.kept), atol=1e-4)
            else:
                parted.append(s)
    print(dict(done), f"{len(preempted)} preemptions, {len(peace)} samples, {len(parted)} parted at a tie")
    assert len(parted) <= len(peace) / 200

    alone = Sampler(model, {STOP}, slots=1, exact=True)
    for problem, index in load.lot.sample(list(peace), 60):
        a = load.asked[problem]
        equal_or_tied(model, a, by_itself(alone, a, index), peace[problem, index])


@pytest.mark.parametrize("prompt, begun, n, max_new", [(80, 60, 2, 70), (100, 30, 3, 55), (120, 30, 2, 32)])
def test_what_fits_alone_ends(prompt, begun, n, max_new):
    """The pool holds one of these sequences, but not beside the prompt that its siblings wait for: that was
    computed, given back and computed again for ever."""
    sampler = Sampler(small(), (), slots=SLOTS, paged=True, pages=PAGES)
    old = [Sample([1] * prompt, [2] * begun, [0.0] * begun, "aborted", 0, i, 0) for i in range(n)]
    sampler.submit(0, [1] * prompt, n, max_new, resume=old)
    ended = [s for _ in range(60 * n) for s in sampler.step()]
    assert len(ended) == n and all(len(s.tokens) == max_new for s in ended) and sampler.live == 0
    nothing_leaks(sampler)


def test_prefixes_further_back_make_way():
    """Nothing runs, the first prompt is computed, and the prompts behind it hold all pages but one: the last
    gave its page back, and took it again before the first could enter."""
    sampler = Sampler(small(), (), slots=8, paged=True, pages=PAGES)
    for problem in range(9):
        sampler.submit(problem, [1] * 30, 1, 9)
    ended = [s for _ in range(200) for s in sampler.step()]
    assert len(ended) == 9 and sampler.live == 0
    nothing_leaks(sampler)
