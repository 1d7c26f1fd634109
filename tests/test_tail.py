"""tail batching: rounds on a fake engine with a known law of lengths; two ranks; what fails; the loop that uses them"""
import itertools
import math
import random
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from pack import Rounds, as_they_come, longer

# -----------------------------------------------------------------------------
# an engine without a model: the four names, and a response whose length is a function of its address


@dataclass
class Sample:
    problem: int
    index: int
    visit: int
    tokens: list = field(default_factory=list)                   # (position, round it was sampled in)
    finished: str = "aborted"
    reward: float = math.nan


class Engine:
    def __init__(self, length, slots=10**9):
        self.length, self.slots, self.rows, self.round, self.sampled = length, slots, [], 0, 0

    def submit(self, problem, prompt, n, max_new, *, visit=0, resume=()):
        assert all(r.problem != problem for r in self.rows), "one launch of a problem at a time"
        taken = {s.index for s in resume}
        rows = list(resume) + [Sample(problem, i, visit) for i in range(n + len(resume)) if i not in taken][: n - len(resume)]
        self.rows += rows
        self.max_new = max_new

    def step(self):
        for s in self.rows[: self.slots]:
            s.tokens.append((len(s.tokens), self.round))
            self.sampled += 1
        over = [s for s in self.rows[: self.slots] if len(s.tokens) >= min(self.max_new, self.length(s.problem, s.visit, s.index))]
        gone = set(map(id, over))
        self.rows = [s for s in self.rows if id(s) not in gone]
        for s in over:
            s.finished = "stop"
        return over

    def abort(self, problem):
        out, self.rows = [s for s in self.rows if s.problem == problem], [s for s in self.rows if s.problem != problem]
        return out

    @property
    def live(self):
        return len(self.rows)


def law(between, within, median=12, seed=0):
    """Two-level lognormal: log length = log median + a prompt's part + a sample's own."""
    def length(problem, visit, index):
        prompt = random.Random(f"{seed} {problem}").gauss(0, between)
        own = random.Random(f"{seed} {problem} {visit} {index}").gauss(0, within)
        return max(1, round(median * math.exp(prompt + own)))
    return length


PROMPTS, N, CAP = 8, 4, 160


def play(mode, length, count, prompts=PROMPTS, n=N, epoch=None, engine=None, rounds=None, fresh=None, **more):
    """`count` rounds on an engine. -> rounds, engine, kept groups of each round, [was it long]"""
    engine, rounds = engine or Engine(length), rounds or Rounds(mode, prompts, n, **more)
    stream = fresh or ((i, 0) for i in itertools.count())
    kept, long = [], []
    for _ in range(count):
        round = rounds.plan(lambda k: list(itertools.islice(stream, k)))
        kept.append([g for g in rounds.run(engine, round, {l.id: [1] for l in round.launches}, CAP) if g])
        long.append(round.long)
        engine.round += 1
        assert engine.live == 0
    return rounds, engine, kept, long


def groups(kept):
    return [g for part in kept for g in part]


# -----------------------------------------------------------------------------
# scheduling


@pytest.mark.parametrize("mode", ["off", "race", "prompt", "continue", "april"])
def test_every_round_yields_a_batch_and_nothing_is_lost(mode):
    """each launched prompt is trained once or waits in the queue; each token is in a kept sample, in the queue, or counted as wasted"""
    engine, kept = Engine(law(0.5, 0.5)), []
    state, wasted, launched = Rounds(mode, PROMPTS, N), 0, set()
    stream = itertools.count()

    def fresh(k):
        ids = list(itertools.islice(stream, k))
        launched.update(ids)
        return [(i, 0) for i in ids]

    for _ in range(23):
        round = state.plan(fresh)
        kept += [g for g in state.run(engine, round, {l.id: [1] for l in round.launches}, CAP) if g]
        wasted += state.wasted
    trained, queued = [g[0].problem for g in kept], [l.id for l in state.queue]
    assert len(trained) == 23 * PROMPTS and all(len(g) == N for g in kept)
    assert Counter(trained + queued) == Counter(launched), "no prompt lost, none trained twice"
    assert all(len({s.index for s in g}) == N and len({(s.problem, s.visit) for s in g}) == 1 for g in kept)
    held = sum(len(s.tokens) for l in state.queue for s in l.have + l.resume)
    assert engine.sampled == sum(len(s.tokens) for g in kept for s in g) + wasted + held
    assert (wasted == 0) == (mode in ("off", "continue", "april"))
    assert (held == 0) == (mode in ("off", "race", "prompt"))


@pytest.mark.parametrize("mode", ["race", "prompt", "continue"])
def test_long_rounds_come_when_predicted(mode):
    """a quarter of a batch is deferred each short round, so every fifth round is long, and runs the queue in its order"""
    _, _, kept, long = play(mode, law(0.5, 0.5), 20)
    assert [i for i, x in enumerate(long) if x] == [4, 9, 14, 19]
    order = {}
    for i, part in enumerate(kept):
        order |= {g[0].problem: i for g in part}
    late = [p for p, i in order.items() if i in (4, 9)]
    assert all(max(p for p in late if order[p] == 4) < q for q in late if order[q] == 9), "first in, first out"


def test_a_round_ends_with_the_sample_that_decides_it():
    """prompt i has samples of i + 1 tokens: the 8 shortest of 10 prompts are in after 8 steps, and nobody decodes a ninth"""
    rounds, engine, kept, _ = play("prompt", lambda problem, visit, index: problem + 1, 1)
    assert [g[0].problem for g in kept[0]] == list(range(8)) and [l.id for l in rounds.queue] == [8, 9]
    assert engine.sampled == N * (sum(range(1, 9)) + 2 * 8) and rounds.wasted == N * 2 * 8


def test_race_keeps_the_first_samples_of_a_prompt_and_draws_deferred_ones_anew():
    """4 of 5 samples count; a deferred prompt comes back under another visit, so under other noise"""
    rounds, _, kept, _ = play("race", lambda problem, visit, index: problem + (9 if index == 1 else index), 5)
    assert all([s.index for s in g] == [0, 2, 3, 4] for g in groups(kept[:4]))
    assert {s.visit for g in kept[4] for s in g} == {1} and {s.visit for g in groups(kept[:4]) for s in g} == {0}
    assert all([s.index for s in g] == [0, 1, 2, 3] for g in kept[4]), "no race in a long round"


def test_prompt_repeats_what_was_aborted_and_continue_goes_on():
    """prompt: the restart has the visit of the first launch, and all its tokens are of the long round's policy. continue: tokens of two
    rounds in one sample, those that had ended are not sampled again"""
    _, _, kept, _ = play("prompt", law(0, 1), 5)
    assert all(s.visit == 0 and {r for _, r in s.tokens} == {4} for g in kept[4] for s in g)
    _, _, kept, _ = play("continue", law(0, 1), 5)
    ages = [{r for _, r in s.tokens} for g in kept[4] for s in g]
    assert any(len(a) == 2 and 4 in a for a in ages), "went on in the long round"
    assert any(len(a) == 1 and 4 not in a for a in ages), "was ready before"
    assert all([p for p, _ in s.tokens] == list(range(len(s.tokens))) for g in groups(kept) for s in g)


@pytest.mark.parametrize("mode", ["prompt", "continue"])
def test_unbiased_modes_train_what_plain_rollouts_train(mode):
    """the proof: at a fixed policy the samples trained over whole periods are, one for one, those of plain rollouts, because a restart
    repeats its noise (or goes on) and what is deferred comes back. So no length is preferred, whatever the law"""
    for between, within in ((0, 1), (0.7, 0.7), (1, 0)):
        rounds, _, kept, long = play(mode, law(between, within), 25)
        while rounds.queue:                                      # drain
            round = rounds.plan(lambda k: [])
            kept.append([g for g in rounds.run(Engine(law(between, within)), round, {l.id: [1] for l in round.launches}, CAP) if g])
        ids = {g[0].problem for g in groups(kept)}
        _, _, plain, _ = play("off", law(between, within), len(ids) // PROMPTS)
        address = lambda kept: sorted((s.problem, s.visit, s.index, len(s.tokens)) for g in groups(kept) for s in g)  # noqa: E731
        assert address(kept) == address(plain)


def true_mean(length, n=10000):
    return np.mean([min(CAP, length(10**6 + i, 0, 0)) for i in range(n)])


@pytest.mark.parametrize("between, within, low, high", [(0, 1, -0.40, -0.15), (1, 0, -0.07, 0.07)])
def test_race_is_biased_where_the_tail_is_within_prompts(between, within, low, high):
    """on a known law: the kept responses are a quarter shorter or more when samples of a prompt differ, as long when they do not; what is
    measured without knowing the law agrees"""
    length = law(between, within)
    rounds, _, kept, _ = play("race", length, 60)
    mean = np.mean([len(s.tokens) for g in groups(kept) for s in g])
    assert low < mean / true_mean(length) - 1 < high
    assert abs(rounds.bias - (mean / true_mean(length) - 1)) < 0.12
    seen = rounds.evidence()
    assert (seen["length_within"] > seen["length_between"]) == (within > between)


def test_noise_drawn_anew_would_prefer_the_short():
    """why a restart of the mode prompt repeats its noise: with new noise a prompt is trained on short groups it was lucky to get, and on
    average ones where it was not"""
    class Forgetful(Engine):
        def submit(self, problem, prompt, n, max_new, *, visit=0, resume=()):
            super().submit(problem, prompt, n, max_new, visit=self.round)
    length = law(0, 1)
    _, _, same, _ = play("prompt", length, 60)
    _, _, anew, _ = play("prompt", length, 60, engine=Forgetful(length))
    mean = lambda kept: np.mean([len(s.tokens) for g in groups(kept) for s in g])  # noqa: E731
    assert mean(anew) < 0.92 * mean(same)
    assert abs(mean(same) / true_mean(length) - 1) < 0.09, "three standard errors of so many samples"


def test_lengths_of_what_was_aborted_are_estimated():
    """exponential lengths, half of them aborted at a random time: the mean of those that ended is half the truth"""
    rng = np.random.default_rng(0)
    true, limit = rng.exponential(100, 20000), rng.exponential(100, 20000)
    seen = [(min(a, b), int(a <= b)) for a, b in zip(true, limit)]
    n, share = longer(seen)
    mean = np.sum(np.diff(n, prepend=0) * np.concatenate(([1.0], share[:-1])))
    assert abs(mean / 100 - 1) < 0.08 and np.mean([n for n, over in seen if over]) < 60


def test_the_queue_survives_a_stop():
    """state_dict in mid-period, a new Rounds: the same rounds as one that was never stopped"""
    for mode in ("race", "prompt", "continue"):
        whole, _, kept, _ = play(mode, law(0.5, 0.5), 12)
        stream = ((i, 0) for i in itertools.count())
        engine = Engine(law(0.5, 0.5))
        first, _, begin, _ = play(mode, None, 3, engine=engine, fresh=stream)
        again = Rounds(mode, PROMPTS, N)
        again.load_state_dict(first.state_dict())
        _, _, end, _ = play(mode, None, 9, engine=engine, rounds=again, fresh=stream)
        lengths = lambda kept: [[(s.problem, s.visit, s.index, s.tokens) for s in g] for g in groups(kept)]  # noqa: E731
        assert lengths(begin + end) == lengths(kept) and again.evidence() == whole.evidence()


def test_few_problems_go_round():
    """20 problems and rounds of 10: when all that is left waits in the queue, the queue is the round"""
    left = list(range(15))

    def fresh(k):
        taken, left[:] = left[:k], left[k:]
        return [(i, 0) for i in taken]
    rounds, engine, kept = Rounds("prompt", 8, N), Engine(law(0.5, 0.5)), []
    while left or rounds.queue:
        round = rounds.plan(fresh)
        kept += [g for g in rounds.run(engine, round, {l.id: [1] for l in round.launches}, CAP) if g]
    assert sorted(g[0].problem for g in kept) == list(range(15))


def test_rewards_decide_when_a_sample_is_in():
    """a prompt whose rewards come late loses to others, though its samples ended first"""
    slow, waiting = 2, []

    def score(ended, idle):
        waiting.extend((s, 30 if s.problem == slow else 0) for s in ended)
        waiting[:] = [(s, n - 1) for s, n in waiting]
        out = [s for s, n in waiting if n < 0 or idle]
        waiting[:] = [(s, n) for s, n in waiting if not any(s is o for o in out)]
        return out
    rounds = Rounds("prompt", PROMPTS, N)
    round = rounds.plan(lambda k: [(i, 0) for i in range(k)])
    engine = Engine(lambda problem, visit, index: 3 + problem)
    kept = [g[0].problem for g in rounds.run(engine, round, {i: [1] for i in range(10)}, CAP, score=score) if g]
    assert slow not in kept and len(kept) == PROMPTS and slow in [l.id for l in rounds.queue]


def test_samples_wait_for_room():
    """fewer slots than samples: prompts are submitted as places become free, those that were not begun are queued untouched"""
    rounds, engine = Rounds("prompt", PROMPTS, N), Engine(law(0.5, 0.5), slots=8)
    round = rounds.plan(lambda k: [(i, 0) for i in range(k)])
    most = []
    for g in rounds.run(engine, round, {i: [1] for i in range(10)}, CAP, room=8 + 1):
        most.append(engine.live)
    assert len(most) == PROMPTS and max(most) <= 8 + N and len(rounds.queue) == 2


def test_a_consumer_that_leaves_frees_the_engine():
    rounds, engine = Rounds("prompt", PROMPTS, N), Engine(law(0.5, 0.5))
    round = rounds.plan(lambda k: [(i, 0) for i in range(k)])
    running = rounds.run(engine, round, {i: [1] for i in range(10)}, CAP)
    next(running)
    running.close()
    assert engine.live == 0


def test_a_shared_counter_lets_in_as_many_as_are_wanted():
    box = [0]

    def add(k):
        box[0] += k
        return box[0]
    one, two = as_they_come(3, add), as_they_come(3, add)
    assert one([(1, 0), (1, 1)]) == ([(1, 0), (1, 1)], 2)
    assert two([(1, 2), (1, 3)]) == ([(1, 2)], 4)
    assert one([]) == ([], 4)
