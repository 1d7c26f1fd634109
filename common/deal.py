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
            ended = feed.step()
            for group in feed.complete(ended):           # or those of them whose rewards are in
                yield group
"""

import pickle
import time
from itertools import count

import torch.distributed as dist

calls = count()          # of deal_out() in this process; ranks make the same, so it names their counters
PIECE = 1 << 22          # bytes: a store breaks the connection over a value of more than 8 MB
REBALANCE_EVERY = 8      # steps between two looks at the requests of other ranks
PAUSE = 0.003            # seconds: what was requested takes REBALANCE_EVERY steps to come


class SharedPrompts:
    """An iterator over the prompts that this rank samples: the next one that no rank has taken. And
    the way of groups to other ranks."""

    def __init__(self, order, store, name=""):
        self.order = order
        self.store = store
        self.name = name
        self.requested = False           # a request of this rank is open
        self.seen = set()                # numbers of the parcels that were taken, here or elsewhere

    def count(self, what, n=0):
        """Adds to a counter of this call. -> what it says now"""
        return self.store.add(f"{self.name}/{what}", n)

    def __iter__(self):
        return self

    def __next__(self):
        place = self.count("taken", 1) - 1
        if place >= len(self.order):
            raise StopIteration
        return self.order[place]

    def done(self, n=1):
        """That many of this rank's groups need nothing more."""
        if n:
            self.count("done", n)

    def all_done(self):
        return self.count("done") >= len(self.order)

    def wanted(self):
        """Is there a request that no parcel answers yet?"""
        return self.count("offers") < self.count("requests")

    def offer(self, groups):
        """Groups for the rank that takes them."""
        parcel = pickle.dumps(groups)
        key = f"{self.name}/parcel/{self.count('offers', 1)}"
        pieces = [parcel[start : start + PIECE] for start in range(0, len(parcel), PIECE)]
        for i, piece in enumerate(pieces):
            self.store.set(f"{key}/{i}", piece)
        self.store.set(key, str(len(pieces)))

    def receive(self):
        """-> the groups of a parcel that is still there, or []."""
        for number in range(1, self.count("offers") + 1):
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
        if not self.requested:
            self.count("requests", 1)
        groups = self.receive()
        self.requested = not groups
        return groups


def shared_counter(world):
    """-> add(k), which says what it comes to over all ranks. Every call makes a new counter, so all
    ranks make the same calls."""
    store = dist.distributed_c10d._get_default_store() if world > 1 else dist.HashStore()
    name = f"count/{next(calls)}"
    return lambda k: store.add(name, k)


def deal_out(sampler, limits):
    """{id: tokens at most} -> an iterator over the ids that this rank samples, and the SharedPrompts
    behind it, None where ranks take prompts in turn and no group moves. The longest come first, so
    that no long one runs alone at the end: by their limits, and where a run need not repeat itself
    by their mean length at the last visit."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    name = f"rollout/{next(calls)}"
    expected = {} if sampler.deterministic else sampler.expected
    order = sorted(limits, key=lambda id: -expected.get(id, limits[id]))
    if sampler.deterministic or (world == 1 and sampler.store is None):
        return iter(order[rank::world]), None
    store = sampler.store or dist.distributed_c10d._get_default_store()
    # A rank expects what it has sampled itself. But the counter is a place in one order: with an
    # order per rank, prompts would be sampled twice or never.
    if store.add(f"{name}/came", 1) == 1:
        store.set(f"{name}/order", pickle.dumps(order))
    shared = SharedPrompts(pickle.loads(store.get(f"{name}/order")), store, name)
    return shared, shared


class Feed:
    """Takes the prompts of one call to a sampler and keeps their groups, until all are done on
    every rank. Used in a `with`: left early, what is in flight leaves the sampler, and no rank
    waits for it."""

    def __init__(self, sampler, prompts, n, limits, *, visits=None, resume=None, wait=True,
                 ahead=None, **settings):
        """prompts {id: tokens}, n samples each; limits {id: tokens of a sample, at most}; visits
        {id: visit}, 0 where it has none. resume {id: what submit() resumes}: the group of id is
        exactly these. wait: without sequences, wait for some from other ranks. ahead: how many samples
        may wait for a slot, where another rank may be free earlier; n, unless it is given. settings:
        those of submit()."""
        self.sampler = sampler
        self.prompts = prompts
        self.limits = limits
        self.visits = visits or {}
        self.resume = resume or {}
        self.wait = wait
        self.room = sampler.slots + (n if ahead is None else ahead)
        self.settings = settings
        self.size = {id: len(self.resume.get(id, ())) or n for id in prompts}    # of its group
        self.coming, self.shared = deal_out(sampler, limits)
        self.groups = {}                 # id -> its finished samples, of the groups that are here
        self.ready = {}                  # id -> the indices of those that need nothing more
        self.arrived = []                # finished samples of groups that came from another rank
        self.prompts_left = True         # there may be prompts that no rank has taken
        self.samples_left = True         # samples may still come, from here or from other ranks

    @property
    def busy(self):
        return self.samples_left or bool(self.groups)

    @property
    def only_rewards_missing(self):
        return not self.samples_left and bool(self.groups)

    def step(self):
        """Prompts join the sampler's queue while there is room, then it makes a step. -> the samples
        that ended, here or before their group came"""
        while self.prompts_left and self.sampler.live < self.room:
            id = next(self.coming, None)
            self.prompts_left = id is not None
            if self.prompts_left:
                self._submit(id, self.size[id], self.resume.get(id, ()))
        if not self.prompts_left:
            self.samples_left = self.sampler.live > 0
            if self.shared:
                self._rebalance()
        ended = self.arrived + self.sampler.step()
        self.arrived = []
        for sample in ended:
            self.groups[sample.problem].append(sample)
        return ended

    def complete(self, ready):
        """These samples need nothing more. -> an iterator over the groups that are complete by that,
        each in order"""
        for s in ready:
            if self._is_here(s):
                self.ready[s.problem].add(s.index)
        for id in dict.fromkeys(s.problem for s in ready):
            if id in self.groups and len(self.ready[id]) == self.size[id]:
                group = sorted(self.groups.pop(id), key=lambda s: s.index)
                self.sampler.expected[id] = sum(len(s.tokens) for s in group) / len(group)
                if self.shared:
                    self.shared.done()
                yield group

    def _is_here(self, sample):
        """False if its group has moved to another rank since, or has come back as a copy."""
        return any(sample is there for there in self.groups.get(sample.problem, ()))

    def _submit(self, id, n, resume):
        self.groups[id] = []
        self.ready[id] = set()
        visit = self.visits.get(id, 0)
        self.sampler.submit(id, self.prompts[id], n, self.limits[id], visit=visit, resume=resume,
                            **self.settings)

    # --- between ranks

    def _rebalance(self):
        """Once no prompt is left to take: a rank with sequences looks now and then for a request
        and parts with half of its groups; a rank without sequences makes one."""
        if not self.sampler.live:
            self.samples_left = self.wait and self._receive()
        elif self.sampler.steps_done % REBALANCE_EVERY == 0 and self.shared.wanted():
            self._offer_half()

    def _offer_half(self):
        late = self.sampler.finished()   # this step() hands them back, so their groups stay
        unfinished = [id for id, group in self.groups.items()
                      if len(group) < self.size[id] and id not in late]
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

    # --- the end

    def interrupt(self):
        """After Ctrl-C. -> {id: its samples so far} of the groups that are here, and of those that
        no rank has: the rest of the prompts, and parcels on the way to a rank that may be leaving
        too. The sampler starts afresh."""
        for id in self.coming:
            self.groups[id] = []
        while parcel := self.shared.receive() if self.shared else []:
            for id, finished, unfinished in parcel:
                self.groups[id] = finished + unfinished
        for sample in self.arrived + self.sampler.salvage():
            self.groups[sample.problem].append(sample)
        found = self.groups
        self._let_go()
        return found

    def _let_go(self):
        if self.shared:
            self.shared.done(len(self.groups))
        self.groups = {}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is KeyboardInterrupt:
            self.interrupt()
        for id in self.groups:
            self.sampler.abort(id)
        self._let_go()
