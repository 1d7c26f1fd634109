"""
tail.py: tail batching (RollPacker, arXiv 2509.21009). No rank waits for the longest response.

Responses differ in length by 30x, so most of a rollout is spent waiting for a few of them. Here a
short round launches more prompts than it needs and ends when enough of them are done. What was too
long waits in a queue, and when the queue is a batch, a long round runs it:

    short round, 4 prompts wanted, 5 launched    aaa  bbbbb  cc  dddd | eeeee    4 are done, e waits
    long round, when the queue holds 4           eeeeeeeeee jjjjjjj ooooooooooooo tttttttt   no race

    --tail-batching   who races             an aborted sample     what is trained
    race              prompts and samples   is drawn anew         a prompt's short samples: biased
    prompt            prompts               is drawn once more,   everything once, in another order
                                            with the same noise
    continue          prompts               is resumed            everything once; its first tokens
                                                                  are of an older policy

A race that prefers short samples changes what is learned: length_bias in common/metrics.py
estimates how much.

Left out of the usual recipe, and why:
- a scheduler process: ranks exchange what is done every few steps, and all come to one decision;
- an engine: a Race needs submit, step, abort and live, so that bench/simulate.py can stand in.

    python nanorl.py --tail-batching prompt
    torchrun --nproc_per_node=8 -- nanorl.py --tail-batching prompt --stream --no-deterministic
"""

import math
import time
from collections import deque
from dataclasses import asdict, dataclass, field

import numpy as np

import pack
from algos import key, make_loss, weigh
from common.deal import shared_counter
from common.metrics import length_bias, varied
from common.moved import moved
from common.run import all_sum, gather
from rollout import Sample, prompt_ids
from stages import back_propagate, collect, elapsed, get_rewards, next_problems, share_visits

# -----------------------------------------------------------------------------
# a round, and what happens to the prompts in it


@dataclass
class Launch:
    """A prompt, from its first launch until its group is complete."""
    id: int
    visit: int                           # of its noise
    # what it had when it was deferred
    ended: list = field(default_factory=list)      # continue: its samples that had ended,
    unfinished: list = field(default_factory=list)  # and those that had not
    first: list = field(default_factory=list)      # race: [tokens, ended] of its first samples


@dataclass
class Round:
    launches: list
    want: int                            # the round ends when this many prompts are done
    n: int                               # samples of a prompt that are launched
    keep: int                            # and that make a group
    long: bool


@dataclass
class Racing:
    """A prompt of a round, on the rank that samples it."""
    place: int                           # in the round
    launch: Launch
    ended: list                          # samples that ended,
    came: list                           # those of them whose rewards are in, in that order
    cut: list                            # samples that were aborted
    group: list                          # of the prompt, once it counts


class Race:
    """A round on this rank's engine, one decode step at a time."""

    def __init__(self, round, engine, mine=None, room=math.inf):
        """mine: this rank's places in the round, launched while fewer than `room` samples live."""
        self.round = round
        self.engine = engine
        self.waiting = deque(range(len(round.launches)) if mine is None else mine)
        self.room = room
        self.racing = {}                 # id -> Racing
        self.taken = 0                   # prompts that count so far, on all ranks

    def launch(self, prompts, max_new, **settings):
        """Launches what there is room for. prompts: {id: tokens}; settings: submit's. -> samples that
        ended in an earlier round."""
        brought = []
        while self.waiting and self.engine.live < self.room:
            place = self.waiting.popleft()
            launch = self.round.launches[place]
            self.racing[launch.id] = Racing(place, launch, list(launch.ended), [], [], [])
            brought += launch.ended
            missing = self.round.n - len(launch.ended)
            if missing:                  # or all had ended, but the last too late for its round
                self.engine.submit(launch.id, prompts[launch.id], missing, max_new,
                                   visit=launch.visit, resume=launch.unfinished, **settings)
        return brought

    def step(self):
        """A decode step. -> the samples that ended, in the order of launching."""
        if not self.engine.live:
            return []
        ended = sorted(self.engine.step(), key=lambda s: (self.racing[s.problem].place, s.index))
        for s in ended:
            self.racing[s.problem].ended.append(s)
        return ended

    def rewarded(self, samples):
        """The rewards of these samples are in. -> places of the prompts that are done by it."""
        done = []
        for s in samples:
            prompt = self.racing[s.problem]
            prompt.came.append(s)
            if len(prompt.came) == self.round.keep:
                done.append(prompt.place)
                if self.round.n > self.round.keep:     # the others of this prompt lost the race
                    prompt.cut = self.engine.abort(s.problem)
        return done

    def claim(self, done, add=None):
        """done: (step, place) of this rank's prompts. -> the groups of those that count. Ranks meet
        here, and the earlier decode step wins, then the earlier launch; or they share a counter, and
        take prompts as they come: add(k) adds to it and says where it is."""
        if add:
            counted = [x for x in done if add(1) <= self.round.want]
            self.taken = add(0)
        else:
            every = sorted(x for part in gather(done) for x in part)
            first = set(every[: self.round.want - self.taken])
            counted = [x for x in done if x in first]
            self.taken += len(first)
        groups = []
        for _, place in counted:
            prompt = self.racing[self.round.launches[place].id]
            prompt.group = sorted(prompt.came[: self.round.keep], key=lambda s: s.index)
            groups.append(prompt.group)
        return groups

    def close(self):
        """Aborts what does not count."""
        for id, prompt in self.racing.items():
            if not prompt.group:
                prompt.cut += self.engine.abort(id)


# -----------------------------------------------------------------------------
# which round comes next


class Rounds:
    """The queue of deferred prompts, and what recent rounds say about their bias."""
    NUMBERS = ("long", "wasted", "older", "bias")

    def __init__(self, mode, prompts, n, more_prompts=1.25, more_samples=1.25):
        """prompts, n: what a round yields. more_*: how many times that is launched."""
        self.mode = mode
        self.prompts = prompts
        self.n = n
        self.more = more_prompts
        self.launched = math.ceil(more_samples * n) if mode == "race" else n
        self.queue = []                  # Launches, first in, first out
        self.window = deque(maxlen=20)   # of recent rounds, the records that length_bias() takes
        # of the last round, over all ranks
        self.long = False
        self.wasted = 0                  # tokens thrown away
        self.older = 0                   # tokens of groups that an earlier policy sampled
        self.bias = math.nan if mode == "race" else 0.0    # at the last long round

    def missing(self, want=None):
        """How many new prompts the next round takes: none, if it is long. want: fewer prompts than
        usual, to fill up a step."""
        want = want or self.prompts
        if want == self.prompts and len(self.queue) >= want:
            return 0
        return math.ceil(self.more * want)

    def plan(self, fresh, want=None):
        """-> the next Round, a long one without fresh prompts. fresh: (id, visit) of the missing
        ones, or of as many as there are outside the queue."""
        want = want or self.prompts
        self.long = not fresh
        launches = [Launch(*x) for x in fresh]
        if self.long:
            launches = self.queue[:want]
            self.queue = self.queue[want:]
        n = self.n if self.long else self.launched
        return Round(launches, min(want, len(launches)), n, self.n, self.long)

    def settle(self, race, max_new):
        """After a race: who is queued, with what; and the evidence. All ranks come to the same."""
        records = []
        deferred = {}
        wasted = 0
        older = 0
        for id, prompt in race.racing.items():
            launch = prompt.launch
            seen = [[len(s.tokens), 1] for s in prompt.ended]
            seen += [[len(s.tokens), 0] for s in prompt.cut]
            sampled = sum(n for n, _ in seen)
            if prompt.group:
                lengths = [len(s.tokens) for s in prompt.group]
                records.append([lengths, launch.first or seen, bool(launch.first)])
                wasted += sampled - sum(lengths)
                older += sum(len(s.tokens) for s in launch.ended + launch.unfinished)
            elif self.mode == "continue":
                deferred[id] = Launch(id, launch.visit, prompt.ended, prompt.cut)
            else:
                deferred[id] = launch
                wasted += sampled
                if self.mode == "race":  # another draw; the mode prompt repeats this one
                    deferred[id] = Launch(id, launch.visit + 1, first=launch.first or seen)
        parts = gather((records, deferred, wasted, older, set(race.racing) - set(deferred)))
        self.window.append(sorted(record for part in parts for record in part[0]))
        deferred = {id: launch for part in parts for id, launch in part[1].items()}
        self.wasted = sum(part[2] for part in parts)
        self.older = sum(part[3] for part in parts)
        counted = set().union(*(part[4] for part in parts))
        self.queue += [deferred.get(x.id, x) for x in race.round.launches if x.id not in counted]
        # after a whole period, with those in it that were deferred
        if self.mode == "race" and (race.round.long or not self.queue):
            self.bias = length_bias([record for part in self.window for record in part], max_new)

    def evidence(self):
        """Is the tail between prompts, where racing them is harmless, or within them? Variances of
        log length say."""
        logs = [np.log(lengths) for part in self.window for lengths, _, _ in part]
        within = float(np.mean([x.var(ddof=1) for x in logs])) if logs else math.nan
        between = math.nan
        if len(logs) > 1:
            between = float(np.var([x.mean() for x in logs], ddof=1)) - within / self.n
        trained = sum(sum(lengths) for lengths, _, _ in self.window[-1])
        return dict(length_between=between, length_within=within, length_bias=self.bias,
                    queue=len(self.queue), long=int(self.long), older=self.older / max(1, trained),
                    wasted=self.wasted / max(1, self.wasted + trained))

    def state_dict(self):
        """Plain numbers, strings and lists."""
        queue = [asdict(launch) for launch in self.queue]
        numbers = {name: getattr(self, name) for name in self.NUMBERS}
        return dict(queue=queue, window=list(self.window), **numbers)

    def load_state_dict(self, state):
        self.queue = [Launch(**launch) for launch in state["queue"]]
        for launch in self.queue:
            launch.ended = [Sample(**s) for s in launch.ended]
            launch.unfinished = [Sample(**s) for s in launch.unfinished]
        self.window = deque(state["window"], maxlen=20)
        for name in self.NUMBERS:
            setattr(self, name, state[name])


# -----------------------------------------------------------------------------
# the groups of a step: what nanorl's loop asks for

EVERY = 16                               # decode steps between two meetings of racing ranks
TRIES = 4                                # of --dynamic to fill a step


def sample_step(rl):
    """Yields this rank's groups of a step as they are complete, rewards in. Whoever takes a group
    fills its advantages before asking for the next: --stream learns from it."""
    c = rl.config
    if c.dynamic or c.stream or rl.rounds:       # flags that are off by default
        yield from special_step(rl)
        return
    yield from collect(rl, next_problems(rl, c.prompts), c.n)


def special_step(rl):
    """The same by rounds, with --stream, or with --dynamic: groups whose rewards are all equal are
    dropped, and others sampled in their place."""
    c = rl.config
    groups_of = collect_round if rl.rounds else collect_all
    handed = []
    rl.early = {}
    rl.dropped = 0
    rl.dropped_tokens = 0
    rl.wasted_tokens = 0
    for _ in range(TRIES if c.dynamic else 1):
        missing = c.prompts - all_sum(len(handed))
        if missing <= 0:
            break
        for group in groups_of(rl, missing, handed):
            if c.dynamic and not varied(group):
                rl.dropped += 1
                rl.dropped_tokens += sum(len(s.tokens) for s in group)
                continue
            handed.append(group)
            yield group
        if rl.rounds and rl.env.master:
            rl.wasted_tokens += rl.rounds.wasted
        with rl.clock("idle"):
            share_visits(rl)             # another rank may draw one of these problems next


def collect_all(rl, count, handed):
    """The groups of the next `count` problems. With --stream it ends when every rank has none left."""
    yield from collect(rl, next_problems(rl, count), rl.config.n)
    if rl.config.stream:
        add = shared_counter(rl.env.world)
        add(1)
        while add(0) < rl.env.world:
            meanwhile(rl, handed)


def collect_round(rl, count, handed):
    """The same for a round, which may end before its last prompt."""
    world = rl.env.world
    round = rl.rounds.plan(fresh_problems(rl, rl.rounds.missing(count)), count)
    by_id = {p.id: p for p in rl.problems}
    prompts = {launch.id: prompt_ids(by_id[launch.id], rl.tok) for launch in round.launches}
    mine = range(rl.env.rank, len(prompts), world)
    race = Race(round, rl.sampler, mine, rl.sampler.slots + rl.config.n)
    add = None if rl.env.deterministic or world == 1 else shared_counter(rl.env.world)
    try:
        while race.taken < round.want:
            done = []
            for step in range(EVERY if world > 1 else 1):
                places, idle = race_step(rl, race, prompts, by_id)
                done += [(step, place) for place in places]
                if idle:
                    break
            with rl.clock("idle"):
                groups = race.claim(done, add)
            for group in groups:
                await_rewards(rl, group, by_id)
                rl.visits[group[0].problem] = group[0].visit + 1
                yield group
            if idle and race.taken < round.want:
                meanwhile(rl, handed)
    finally:
        race.close()
    with rl.clock("idle"):
        rl.rounds.settle(race, rl.config.max_new)
    rl.workers.forget()                  # the rewards of samples that lost


def race_step(rl, race, prompts, by_id):
    """A decode step. -> places of the prompts that are done by it, and whether this rank had nothing
    to sample. To be repeatable, a sample is in when it ended; faster is: when its reward is."""
    c = rl.config
    with rl.clock("rollout"):
        ended = race.launch(prompts, c.max_new, seed=c.seed, temperature=c.temperature, top_p=c.top_p)
        idle = not rl.sampler.live
        ended += race.step()
    with rl.clock("reward"):
        wait = idle and not ended and rl.env.world == 1 and not rl.env.deterministic
        scored = get_rewards(rl, by_id, ended, wait)
    return race.rewarded(ended if rl.env.deterministic else scored), idle


def await_rewards(rl, group, by_id):
    with rl.clock("reward"):
        while any(math.isnan(s.reward) for s in group):
            get_rewards(rl, by_id, [], wait=True)


def fresh_problems(rl, count):
    """-> (id, visit) of the next `count` problems, fewer if there are fewer. One that still waits in
    the queue from an epoch before is put off until it does not."""
    busy = {launch.id for launch in rl.rounds.queue}
    coming = rl.late                     # what was put off comes first
    rl.late = []
    found = []
    while len(found) < min(count, len(rl.problems) - len(busy)):
        if not coming:
            # no further than this epoch, or some were passed over at its turn
            left = len(rl.problems) - rl.cursor % len(rl.problems)
            coming = [p.id for p in next_problems(rl, min(count - len(found), left))]
        id = coming.pop(0)
        if id in busy or id in found:
            rl.late.append(id)
        else:
            found.append(id)
    rl.late += coming
    return [(id, rl.visits.get(id, 0)) for id in found]


def meanwhile(rl, handed):
    """Nothing is left to sample here, but elsewhere there is. With --stream this rank learns from a
    group that it handed out."""
    for group in handed if rl.config.stream else ():
        if key(group[0]) not in rl.early:
            learn_early(rl, group)
            return
    time.sleep(0.001)


def learn_early(rl, group):
    """The gradient of one complete group, before the others are sampled: sums are divided at the step,
    so when does not matter. In the normaliser it counts later, in update()."""
    loss = make_loss(rl.config, elapsed(rl), reference=rl.reference)
    weigh([group], rl.config)
    batches = pack.batches([group], rl.config.row_tokens, rl.model.config)
    rl.early[key(group[0])] = back_propagate(rl, batches, loss)


__getattr__ = moved(__name__)            # names that a fork may know from here
