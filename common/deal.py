"""
deal.py: the prompts of one call, shared out to the ranks, and fed to a sampler.

Where a run has to repeat itself, ranks take prompts in turn. Otherwise each takes the next one from
a counter that all of them share. When that has run out, a rank without sequences asks for some, and
a busy one parts with half of its groups. Noise is addressed, so a sample continues anywhere: its
tokens travel, its keys are computed again.

The counters of one call, in the store where ranks meet:

    taken     256    prompts
    done      251    groups that need nothing more: when all are done, no rank waits any longer
    requests    3    of ranks without sequences
    offers      2    parcels of groups from busy ranks. Whoever is without sequences takes one that
                     is still there, even one of its own, so that a rank may leave while others wait

The loop of a call, whatever the caller does with the samples:

    with Feed(sampler, prompts, n, limits) as feed:
        while feed.busy:
            while feed.more and ...:                     # room, as the caller sees it
                feed.admit()
            feed.rebalance()
            for sample in feed.step():
                if feed.complete(sample.problem):
                    yield feed.finish(sample.problem)
"""

import pickle
import time
from itertools import count

import torch.distributed as dist

calls = count()          # of share() in this process; ranks make the same, so it names their counters
PIECE = 1 << 22          # bytes: a store breaks the connection over a value of more than 8 MB
REBALANCE_EVERY = 8      # steps between two looks at the requests of other ranks
PAUSE = 0.003            # seconds: what was requested takes REBALANCE_EVERY steps to come


class SharedPrompts:
    """An iterator over the prompts that this rank samples. Without a store: every `world`-th, and
    no group moves."""

    def __init__(self, order, store=None, name="", rank=0, world=1):
        self.order = order
        self.store = store
        self.name = name
        self.turns = iter(order[rank::world])
        self.requested = False           # a request of this rank is open
        self.seen = set()                # numbers of the parcels that were taken, here or elsewhere

    def count(self, what, n=0):
        """Adds to a counter of this call. -> what it says now"""
        return self.store.add(f"{self.name}/{what}", n)

    def __iter__(self):
        return self

    def __next__(self):
        if self.store is None:
            return next(self.turns)
        place = self.count("taken", 1) - 1
        if place >= len(self.order):
            raise StopIteration
        return self.order[place]

    def done(self, n=1):
        """That many of this rank's groups need nothing more."""
        if self.store is not None and n:
            self.count("done", n)

    def all_done(self):
        return self.store is None or self.count("done") >= len(self.order)

    def wanted(self):
        """Is there a request that no parcel answers yet?"""
        return self.store is not None and self.count("offers") < self.count("requests")

    def offer(self, groups):
        """Groups for whoever takes them."""
        parcel = pickle.dumps(groups)
        key = f"{self.name}/parcel/{self.count('offers', 1)}"
        pieces = [parcel[start : start + PIECE] for start in range(0, len(parcel), PIECE)]
        for i, piece in enumerate(pieces):
            self.store.set(f"{key}/{i}", piece)
        self.store.set(key, str(len(pieces)))

    def receive(self):
        """-> the groups of a parcel that is still there, or []."""
        offers = 0 if self.store is None else self.count("offers")
        for number in range(1, offers + 1):
            key = f"{self.name}/parcel/{number}"
            if number in self.seen or not self.store.check([key]):
                continue
            self.seen.add(number)
            if self.store.add(f"{key}/takers", 1) == 1:
                return self._open(key)
        return []

    def _open(self, key):
        pieces = [f"{key}/{i}" for i in range(int(self.store.get(key)))]
        groups = pickle.loads(b"".join(self.store.get(piece) for piece in pieces))
        for piece in pieces:             # or the store would grow with every call
            self.store.delete_key(piece)
        return groups

    def request(self):
        """This rank has no sequences. -> the groups that came, [] if none has come yet"""
        if self.store is None:
            return []
        if not self.requested:
            self.count("requests", 1)
        groups = self.receive()
        self.requested = not groups
        return groups


def share(sampler, limits):
    """{id: tokens at most} -> the SharedPrompts of these ids. The longest come first, so that no
    long one runs alone at the end: by their limits, and where a run need not repeat itself by their
    mean length at the last visit."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    name = f"rollout/{next(calls)}"
    expected = {} if sampler.deterministic else sampler.expected
    order = sorted(limits, key=lambda id: -expected.get(id, limits[id]))
    if sampler.deterministic or (world == 1 and sampler.store is None):
        return SharedPrompts(order, rank=rank, world=world)
    store = sampler.store or dist.distributed_c10d._get_default_store()
    # A rank expects what it has sampled itself. But the counter is a place in one order: with an
    # order per rank, prompts would be sampled twice or never.
    if store.add(f"{name}/came", 1) == 1:
        store.set(f"{name}/order", pickle.dumps(order))
    return SharedPrompts(pickle.loads(store.get(f"{name}/order")), store, name)


class Feed:
    """Takes the prompts of one call to a sampler and keeps their groups, until all are done on
    every rank. Used in a `with`: left early, what is in flight leaves the sampler, and no rank
    waits for it."""

    def __init__(self, sampler, prompts, n, limits, *, visits=None, resume=None, wait=True,
                 **settings):
        """prompts {id: tokens}, n samples each; limits {id: tokens of a sample, at most}; visits
        {id: visit}, 0 where it has none. resume {id: what submit() resumes}: the group of id is
        exactly these. wait: without sequences, wait for some from other ranks. settings: those of
        submit()."""
        self.sampler = sampler
        self.prompts = prompts
        self.limits = limits
        self.visits = visits or {}
        self.resume = resume or {}
        self.wait = wait
        self.settings = settings
        self.size = {id: len(self.resume.get(id, ())) or n for id in prompts}    # of its group
        self.shared = share(sampler, limits)
        self.groups = {}                 # id -> its finished samples, of the groups that are here
        self.arrived = []                # finished samples of groups that came from another rank
        self.more = True                 # there may be prompts that no rank has taken
        self.left = True                 # samples may still come, from here or from other ranks

    @property
    def busy(self):
        return self.left or bool(self.groups)

    def admit(self):
        """The next prompt joins the sampler's queue, if one is left."""
        id = next(self.shared, None)
        self.more = id is not None
        if self.more:
            self._submit(id, self.size[id], self.resume.get(id, ()))

    def _submit(self, id, n, resume):
        self.groups[id] = []
        visit = self.visits.get(id, 0)
        self.sampler.submit(id, self.prompts[id], n, self.limits[id], visit=visit, resume=resume,
                            **self.settings)

    def rebalance(self):
        """Once no prompt is left to take: a rank with sequences looks now and then for a request
        and parts with half of its groups; a rank without sequences makes one."""
        if self.more:
            return
        if self.sampler.live:
            self.left = True
            if self.sampler.steps_done % REBALANCE_EVERY == 0 and self.shared.wanted():
                self._offer_half()
        else:
            self.left = self.wait and self._receive()

    def _offer_half(self):
        late = self.sampler.finished()   # the next step() hands them back, so their groups stay
        unfinished = [id for id in self.groups if not self.complete(id) and id not in late]
        parcel = [(id, self.groups[id], self.sampler.abort(id)) for id in unfinished[1::2]]
        if parcel:
            self.shared.offer(parcel)
        for id, _, _ in parcel:
            del self.groups[id]

    def _receive(self):
        """-> whether something came or may come"""
        parcel = self.shared.request()
        for id, finished, unfinished in parcel:
            self.arrived += finished
            self._submit(id, len(unfinished), unfinished)
        if parcel:
            return True
        waiting = not self.shared.all_done()
        if waiting:
            time.sleep(PAUSE)
        return waiting

    def step(self):
        """One step of the sampler. -> an iterator over the samples that ended, here or before their
        group came; each is in its group by then"""
        samples = self.arrived + self.sampler.step()
        self.arrived = []
        for sample in samples:
            self.groups[sample.problem].append(sample)
            yield sample

    def complete(self, id):
        return len(self.groups[id]) == self.size[id]

    def finish(self, id):
        """The group needs nothing more. -> its samples in order"""
        self.shared.done()
        return sorted(self.groups.pop(id), key=lambda s: s.index)

    def interrupt(self):
        """After Ctrl-C. -> {id: its samples so far} of the groups that are here, and of those that
        no rank has: the rest of the prompts, and parcels on the way to a rank that may be leaving
        too. The sampler starts afresh."""
        for id in self.shared:
            self.groups[id] = []
        while parcel := self.shared.receive():
            for id, finished, unfinished in parcel:
                self.groups[id] = finished + unfinished
        for sample in self.arrived + self.sampler.salvage():
            self.groups[sample.problem].append(sample)
        self.shared.done(len(self.groups))
        found = self.groups
        self.groups = {}
        return found

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is KeyboardInterrupt:
            self.interrupt()
        self.shared.done(len(self.groups))
        for id in self.groups:
            self.sampler.abort(id)
        self.groups = {}
