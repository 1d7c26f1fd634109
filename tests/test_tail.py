"""tail batching: rounds on a fake engine with a known law of lengths; two ranks; what fails; the
loop that uses them"""
import itertools
import json
import math
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import nanorl
import stages
import tail
import ttrl
from algos import advantage, make_loss
from bench import simulate
from bench.simulate import make_rounds, run
from common import run as run_folder
from common.metrics import kaplan_meier, length_bias, warnings
from common.reward import Rewards
from common.run import gather, newest
from rollout import Sample
from tail import Rounds
from train_gpt import GPT

ROOT = Path(__file__).resolve().parent.parent

# -----------------------------------------------------------------------------
# an engine without a model: the four names, and a response whose length is a function of its address


class Engine:
    """its samples' tokens are (position, round it was sampled in)"""
    def __init__(self, length, slots=10**9):
        self.length, self.slots, self.rows, self.round, self.sampled = length, slots, [], 0, 0

    def submit(self, problem, prompt, n, max_new, *, visit=0, resume=()):
        assert all(r.problem != problem for r in self.rows), "one launch of a problem at a time"
        taken = {s.index for s in resume}
        new = [Sample([], [], [], "aborted", problem, i, visit)
               for i in range(n + len(resume)) if i not in taken]
        rows = list(resume) + new[: n - len(resume)]
        self.rows += rows
        self.max_new = max_new

    def step(self):
        for s in self.rows[: self.slots]:
            s.tokens.append((len(s.tokens), self.round))
            self.sampled += 1
        over = [s for s in self.rows[: self.slots]
                if len(s.tokens) >= min(self.max_new, self.length(s.problem, s.visit, s.index))]
        gone = set(map(id, over))
        self.rows = [s for s in self.rows if id(s) not in gone]
        for s in over:
            s.finished = "stop"
        return over

    def abort(self, problem):
        out = [s for s in self.rows if s.problem == problem]
        self.rows = [s for s in self.rows if s.problem != problem]
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
    engine, rounds = engine or Engine(length), rounds or make_rounds(mode, prompts, n, **more)
    stream = fresh or ((i, 0) for i in itertools.count())
    kept, long = [], []
    for _ in range(count):
        round = rounds.plan(list(itertools.islice(stream, rounds.missing())))
        kept.append(list(run(rounds, engine, round, CAP)))
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
    """each launched prompt is trained once or waits in the queue; each token is in a kept sample,
    in the queue, or counted as wasted"""
    engine, kept = Engine(law(0.5, 0.5)), []
    state, wasted, launched = make_rounds(mode, PROMPTS, N), 0, set()
    stream = itertools.count()

    def fresh(k):
        ids = list(itertools.islice(stream, k))
        launched.update(ids)
        return [(i, 0) for i in ids]

    for _ in range(23):
        round = state.plan(fresh(state.missing()))
        kept += run(state, engine, round, CAP)
        wasted += state.wasted
    trained, queued = [g[0].problem for g in kept], [l.id for l in state.queue]
    assert len(trained) == 23 * PROMPTS and all(len(g) == N for g in kept)
    assert Counter(trained + queued) == Counter(launched), "no prompt lost, none trained twice"
    assert all(len({s.index for s in g}) == N and len({(s.problem, s.visit) for s in g}) == 1 for g in kept)
    held = sum(len(s.tokens) for l in state.queue for s in l.ended + l.unfinished)
    assert engine.sampled == sum(len(s.tokens) for g in kept for s in g) + wasted + held
    assert (wasted == 0) == (mode in ("off", "continue", "april"))
    assert (held == 0) == (mode in ("off", "race", "prompt"))


@pytest.mark.parametrize("mode", ["race", "prompt", "continue"])
def test_long_rounds_come_when_predicted(mode):
    """a quarter of a batch is deferred each short round, so every fifth round is long, and runs
    the queue in its order"""
    _, _, kept, long = play(mode, law(0.5, 0.5), 20)
    assert [i for i, x in enumerate(long) if x] == [4, 9, 14, 19]
    order = {}
    for i, part in enumerate(kept):
        order |= {g[0].problem: i for g in part}
    late = [p for p, i in order.items() if i in (4, 9)]
    assert all(max(p for p in late if order[p] == 4) < q for q in late
               if order[q] == 9), "first in, first out"


def test_a_round_ends_with_the_sample_that_decides_it():
    """prompt i has samples of i + 1 tokens: the 8 shortest of 10 prompts are in after 8 steps,
    and nobody decodes a ninth"""
    rounds, engine, kept, _ = play("prompt", lambda problem, visit, index: problem + 1, 1)
    assert [g[0].problem for g in kept[0]] == list(range(8)) and [l.id for l in rounds.queue] == [8, 9]
    assert engine.sampled == N * (sum(range(1, 9)) + 2 * 8) and rounds.wasted == N * 2 * 8


def test_race_keeps_the_first_samples_of_a_prompt_and_draws_deferred_ones_anew():
    """4 of 5 samples count; a deferred prompt comes back under another visit, so under other noise"""
    rounds, _, kept, _ = play("race", lambda problem, visit, index: problem + (9 if index == 1 else index), 5)
    assert all([s.index for s in g] == [0, 2, 3, 4] for g in groups(kept[:4]))
    assert {s.visit for g in kept[4] for s in g} == {1}
    assert {s.visit for g in groups(kept[:4]) for s in g} == {0}
    assert all([s.index for s in g] == [0, 1, 2, 3] for g in kept[4]), "no race in a long round"


def test_prompt_repeats_what_was_aborted_and_continue_goes_on():
    """prompt: the restart has the visit of the first launch, and all its tokens are of the long round's
    policy. continue: tokens of two rounds in one sample, those that had ended are not sampled again"""
    _, _, kept, _ = play("prompt", law(0, 1), 5)
    assert all(s.visit == 0 and {r for _, r in s.tokens} == {4} for g in kept[4] for s in g)
    _, _, kept, _ = play("continue", law(0, 1), 5)
    ages = [{r for _, r in s.tokens} for g in kept[4] for s in g]
    assert any(len(a) == 2 and 4 in a for a in ages), "went on in the long round"
    assert any(len(a) == 1 and 4 not in a for a in ages), "was ready before"
    assert all([p for p, _ in s.tokens] == list(range(len(s.tokens))) for g in groups(kept) for s in g)


@pytest.mark.parametrize("mode", ["prompt", "continue"])
def test_unbiased_modes_train_what_plain_rollouts_train(mode):
    """the proof: at a fixed policy the samples trained over whole periods are, one for one, those
    of plain rollouts, because a restart repeats its noise (or goes on) and what is deferred comes
    back. So no length is preferred, whatever the law"""
    for between, within in ((0, 1), (0.7, 0.7), (1, 0)):
        rounds, _, kept, long = play(mode, law(between, within), 25)
        while rounds.queue:                                      # drain
            round = rounds.plan([])
            kept.append(list(run(rounds, Engine(law(between, within)), round, CAP)))
        ids = {g[0].problem for g in groups(kept)}
        _, _, plain, _ = play("off", law(between, within), len(ids) // PROMPTS)

        def address(kept):
            return sorted((s.problem, s.visit, s.index, len(s.tokens)) for g in groups(kept) for s in g)

        assert address(kept) == address(plain)


def true_mean(length, n=10000):
    return np.mean([min(CAP, length(10**6 + i, 0, 0)) for i in range(n)])


@pytest.mark.parametrize("between, within, low, high", [(0, 1, -0.40, -0.15), (1, 0, -0.07, 0.07)])
def test_race_is_biased_where_the_tail_is_within_prompts(between, within, low, high):
    """on a known law: the kept responses are a quarter shorter or more when samples of a prompt
    differ, as long when they do not; what is measured without knowing the law agrees"""
    length = law(between, within)
    rounds, _, kept, _ = play("race", length, 60)
    mean = np.mean([len(s.tokens) for g in groups(kept) for s in g])
    assert low < mean / true_mean(length) - 1 < high
    assert abs(rounds.bias - (mean / true_mean(length) - 1)) < 0.12
    seen = rounds.evidence()
    assert (seen["length_within"] > seen["length_between"]) == (within > between)


def test_noise_drawn_anew_would_prefer_the_short():
    """why a restart of the mode prompt repeats its noise: with new noise a prompt is trained on
    short groups it was lucky to get, and on average ones where it was not"""
    class Forgetful(Engine):
        def submit(self, problem, prompt, n, max_new, *, visit=0, resume=()):
            super().submit(problem, prompt, n, max_new, visit=self.round)
    length = law(0, 1)
    _, _, same, _ = play("prompt", length, 60)
    _, _, anew, _ = play("prompt", length, 60, engine=Forgetful(length))

    def mean(kept):
        return np.mean([len(s.tokens) for g in groups(kept) for s in g])

    assert mean(anew) < 0.92 * mean(same)
    assert abs(mean(same) / true_mean(length) - 1) < 0.09, "three standard errors of so many samples"


def test_lengths_of_what_was_aborted_are_estimated():
    """exponential lengths, half of them aborted at a random time: the mean of those that ended is
    half the truth"""
    rng = np.random.default_rng(0)
    true, limit = rng.exponential(100, 20000), rng.exponential(100, 20000)
    seen = [(min(a, b), int(a <= b)) for a, b in zip(true, limit)]
    n, share = kaplan_meier(seen)
    mean = np.sum(np.diff(n, prepend=0) * np.concatenate(([1.0], share[:-1])))
    assert abs(mean / 100 - 1) < 0.08 and np.mean([n for n, over in seen if over]) < 60


def test_kaplan_meier_by_hand():
    """of three samples one ends at 1, one is aborted at 2, one ends at 3: two thirds are longer
    than 1, and after 2 one sample stands for all of them. Where nothing was aborted it is the
    plain share, and what keeps everything has no bias"""
    lengths, longer = kaplan_meier([[3, 1], [1, 1], [2, 0]])
    assert lengths.tolist() == [1, 2, 3] and longer.tolist() == pytest.approx([2 / 3, 2 / 3, 0])
    assert kaplan_meier([[n, 1] for n in (5, 7, 7, 9)])[1].tolist() == pytest.approx([0.75, 0.5, 0.25, 0])
    whole = [[[2, 4, 9], [[2, 1], [4, 1], [9, 1]], False], [[1, 1, 3], [[1, 1], [1, 1], [3, 1]], False]]
    assert length_bias(whole, CAP) == pytest.approx(0)
    cut = [[[2, 4], [[2, 1], [4, 1], [4, 0]], False] for _ in range(3)]
    assert length_bias(cut, CAP) == pytest.approx(-0.1), (
        "no sample came further than 4, so what was aborted there counts as 4")


def test_the_queue_survives_a_stop():
    """state_dict in mid-period, a new Rounds: the same rounds as one that was never stopped"""
    for mode in ("race", "prompt", "continue"):
        whole, _, kept, _ = play(mode, law(0.5, 0.5), 12)
        stream = ((i, 0) for i in itertools.count())
        engine = Engine(law(0.5, 0.5))
        first, _, begin, _ = play(mode, None, 3, engine=engine, fresh=stream)
        again = Rounds(mode, PROMPTS, N)
        # plain data: no object of ours in it
        again.load_state_dict(json.loads(json.dumps(first.state_dict())))
        _, _, end, _ = play(mode, None, 9, engine=engine, rounds=again, fresh=stream)

        def lengths(kept):
            return [[(s.problem, s.visit, s.index, list(map(tuple, s.tokens))) for s in g]
                    for g in groups(kept)]

        assert lengths(begin + end) == lengths(kept) and again.evidence() == whole.evidence()


def test_few_problems_go_round():
    """20 problems and rounds of 10: when all that is left waits in the queue, the queue is the round"""
    left = list(range(15))

    def fresh(k):
        taken, left[:] = left[:k], left[k:]
        return [(i, 0) for i in taken]
    rounds, engine, kept = Rounds("prompt", 8, N), Engine(law(0.5, 0.5)), []
    while left or rounds.queue:
        kept += run(rounds, engine, rounds.plan(fresh(rounds.missing())), CAP)
    assert sorted(g[0].problem for g in kept) == list(range(15))


def test_rewards_decide_when_a_sample_is_in():
    """a prompt whose rewards come late loses to others, though its samples ended first"""
    slow, waiting = 2, []
    rounds, engine = Rounds("prompt", PROMPTS, N), Engine(lambda problem, visit, index: 3 + problem)
    race = tail.Race(rounds.plan([(i, 0) for i in range(10)]), engine)
    while race.taken < PROMPTS:
        ended = race.launch({i: [1] for i in range(10)}, CAP) + race.step()
        waiting += [(s, 30 if s.problem == slow else 0) for s in ended]
        waiting, ready = [(s, n - 1) for s, n in waiting if n], [s for s, n in waiting if not n]
        race.claim([(0, place) for place in race.rewarded(ready)])
    race.close()
    rounds.settle(race, CAP)
    kept = [p.launch.id for p in race.racing.values() if p.group]
    assert slow not in kept and len(kept) == PROMPTS and slow in [l.id for l in rounds.queue]


def test_samples_wait_for_room():
    """fewer slots than samples: prompts are submitted as places become free, those that were not
    begun are queued untouched"""
    rounds, engine = Rounds("prompt", PROMPTS, N), Engine(law(0.5, 0.5), slots=8)
    round = rounds.plan([(i, 0) for i in range(10)])
    most = []
    for _ in run(rounds, engine, round, CAP, room=8 + 1):
        most.append(engine.live)
    assert len(most) == PROMPTS and max(most) <= 8 + N and len(rounds.queue) == 2


def test_a_consumer_that_leaves_frees_the_engine():
    rounds, engine = Rounds("prompt", PROMPTS, N), Engine(law(0.5, 0.5))
    running = run(rounds, engine, rounds.plan([(i, 0) for i in range(10)]), CAP)
    next(running)
    running.close()
    assert engine.live == 0


def test_a_shared_counter_lets_in_as_many_as_are_wanted():
    box = [0]

    def add(k):
        box[0] += k
        return box[0]
    rounds, engine = Rounds("prompt", 3, N), Engine(law(0.5, 0.5))
    race = tail.Race(rounds.plan([(i, 0) for i in range(4)], 3), engine)
    race.launch({i: [1] for i in range(4)}, CAP)
    while engine.live:
        race.rewarded(race.step())

    def claim(*done):
        return [group[0].problem for group in race.claim(done, add)], race.taken
    assert claim((1, 0), (1, 1)) == ([0, 1], 2)
    assert claim((1, 2), (1, 3)) == ([2], 4)
    assert claim() == ([], 4)


# -----------------------------------------------------------------------------
# ranks: each has an engine of its own and half of the prompts

def seven_rounds(rank, world):
    """-> a line a round: which samples were kept, what is queued, and the evidence."""
    state, engine, stream, lines = Rounds("race", PROMPTS, N), Engine(law(0.5, 0.5)), itertools.count(), []
    for _ in range(7):
        round = state.plan([(next(stream), 0) for _ in range(state.missing())])
        got = list(run(state, engine, round, CAP, mine=range(rank, len(round.launches), world), every=16))
        kept = sorted((g[0].problem, g[0].visit, [s.index for s in g]) for part in gather(got) for g in part)
        lines.append(f"{kept} {[(l.id, l.visit) for l in state.queue]} {round.long} {state.evidence()}")
    return lines


def test_two_ranks_race_as_one(ranks):
    """events are exchanged every 16 steps, and what counts is the step at which a prompt was
    done: the same prompts win on two ranks as on one, the same are queued in the same order, and
    the evidence is the same"""
    code = (f"import sys; sys.path[:0] = {[str(ROOT), str(ROOT / 'tests')]}; "
            "import test_tail as t, common.run as run\n"
            "env = run.start('cpu', threads=1); print(*t.seven_rounds(env.rank, env.world), sep='\\n')")
    one, two = seven_rounds(0, 1), ranks(2, code)
    assert two[0].splitlines() == two[1].splitlines() == one


DEATH = """
import os, signal, sys
import common.watch as watch, nanorl, rollout
watch.GONE = 5.0
step, count = rollout.Sampler.step, [0]
def dies(self):
    count[0] += 1
    if os.environ["RANK"] == "1" and count[0] == 700:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self)
rollout.Sampler.step = dies
nanorl.main(sys.argv[1:])
"""


def test_a_rank_that_dies_is_named_and_the_run_goes_on(own, ranks):
    """killed in the middle of a rollout, while the others wait in a collective, whose own error is about
    a socket: within a minute they stop with the rank's name, and --resume goes on, here with one rank"""
    argv = [*own, "--tail-batching", "race", "--steps", "20", "--save-every", "1"]
    with pytest.raises(AssertionError, match="rank 1 died: no sign of life"):
        ranks(2, DEATH, *argv)
    last = newest("runs/rl")[1]
    assert 1 <= last < 20
    nanorl.main([*argv, "--resume"])
    assert [m["step"] for m in metrics()] == list(range(21))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_raises_is_named(ranks, tmp_path, rank):
    """rank 0 holds the store through which ranks speak, and stays until its last word was read"""
    code = ("import sys, common.run as run\nenv = run.start('cpu', threads=1)\n"
            "sys.stderr = open(f'said_{env.rank}', 'w', buffering=1)\nfor i in range(9):\n"
            "    run.gather(i)\n    if i == 5 and env.rank == int(sys.argv[1]):\n"
            "        raise ValueError('out of memory, say')")
    with pytest.raises(AssertionError, match="ended with 1"):
        ranks(2, code, rank)
    assert f"error: rank {rank} raised ValueError: out of memory, say" in (
        tmp_path / f"said_{1 - rank}").read_text()


# -----------------------------------------------------------------------------
# the RL loop


@pytest.fixture
def own(tiny_base):
    """a random tiny model, prompts and a reward of one's own"""
    tiny_base(23)
    return ("--init base --data my.jsonl --reward my.py:score --device cpu "
            "--threads 1 --prompts 4 --n 4 --max-new 120 --steps 6 --row-tokens 512 --eval-n 4 "
            "--final-n 4 --eval-every 0 --save-every 9 --lr 1e-3 --warmup 1 --workers 1").split()


def metrics(name="rl"):
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return GPT.from_hf(folder).state_dict()


@pytest.mark.parametrize("mode", ["race", "prompt", "continue"])
def test_resumed_equals_never_stopped(own, monkeypatch, mode):
    """stopped with a queue: the long round that comes next runs the same prompts, with the
    tokens they had"""
    own += ["--tail-batching", mode]
    nanorl.main([*own, "--name", "whole"])
    with monkeypatch.context() as patch:
        calls = []
        patch.setattr(run_folder.Run, "stopping", lambda self: calls.append(1) or len(calls) == 3)
        with pytest.raises(SystemExit):
            nanorl.main([*own, "--name", "parts"])
    assert metrics("parts")[-1]["queue"] == 3
    nanorl.main([*own, "--name", "parts", "--resume"])
    one, two = weights("runs/whole/ckpt/step_6"), weights("runs/parts/ckpt/step_6")
    assert all(torch.equal(one[k], two[k]) for k in one)
    m = metrics("whole")
    assert [row["long"] for row in m[1:]] == [0, 0, 0, 0, 1, 0] and all(row["groups"] == 4 for row in m[1:])
    assert m[5]["older"] > 0 if mode == "continue" else m[1]["wasted"] > 0
    assert max(row["sampler_max"] for row in m[1:5]) < 1e-5, (
        "in a short round every token is of the policy that is trained")


def test_two_ranks_equal_one(own, ranks):
    """rung 9 with a race: the same rounds, gradients and, after a whole period, weights. At a
    small rate: Adam's first steps turn the rounding of a gradient near zero into a step of +-lr,
    and at 1e-3 that is enough to flip a token of the rounds after it"""
    own += ["--tail-batching", "prompt", "--steps", "5", "--lr", "1e-4"]
    nanorl.main([*own, "--name", "one"])
    ranks(2, "import sys, nanorl; nanorl.main(sys.argv[1:])", *own, "--name", "two")
    one, two = weights("runs/one/ckpt/step_5"), weights("runs/two/ckpt/step_5")
    assert all(torch.allclose(one[k], two[k], atol=5e-5) for k in one)
    one, two = metrics("one"), metrics("two")
    assert [m.get("queue") for m in one] == [m.get("queue") for m in two]
    assert [m["grad_norm"] for m in one[1:]] == pytest.approx([m["grad_norm"] for m in two[1:]], rel=1e-4)


def test_a_problem_that_comes_up_while_it_waits_is_put_off():
    """3 epochs of 11 problems: each is launched once an epoch, though some wait in the queue when
    the next epoch comes to them"""
    rl = SimpleNamespace(config=nanorl.Config(), problems=[data.Problem("", id=i) for i in range(11)],
                         visits={}, late=[], rounds=Rounds("prompt", 4, 2), cursor=0)
    launched, engine = Counter(), Engine(law(0.5, 0.5))
    while rl.cursor < 33 or rl.late:
        round = rl.rounds.plan(tail.fresh_problems(rl, rl.rounds.missing()))
        assert len({l.id for l in round.launches}) == len(round.launches), "different ones"
        launched.update((l.id, l.visit) for l in round.launches if not round.long)
        for g in run(rl.rounds, engine, round, CAP):
            rl.visits[g[0].problem] = g[0].visit + 1
    at = rl.cursor
    assert at >= 33 and max(launched.values()) == 1, "no noise twice"
    assert all(at // 11 <= sum(p == i for p, _ in launched) <= -(-at // 11) for i in range(11))


def ready(**settings):
    return nanorl.setup(nanorl.Config(init="base", data="my.jsonl", reward="my.py:score",
                                      device="cpu", threads=1, max_new=30, row_tokens=512,
                                      n=4, prompts=3, final_n=4, eval_n=4, **settings))


def test_a_step_gives_up_after_four_tries(own):
    """--dynamic where no group can differ: 4 times 3 problems are sampled and dropped; the next
    step begins to count again"""
    Path("my.py").write_text("def score(problem, text):\n    return 1.0\n")
    rl = ready(dynamic=True)
    for step in (1, 2):
        assert list(nanorl.sample_step(rl)) == []
        assert rl.dropped == 12 and rl.dropped_tokens >= 12 * 4
        assert rl.cursor == sum(rl.visits.values()) == 12 * step
    rl.workers.close()


def test_a_step_counts_the_tokens_that_a_race_throws_away(own):
    rl = ready(tail_batching="prompt")
    rl.rounds = Rounds("prompt", 3, 4)
    assert len(list(nanorl.sample_step(rl))) == 3
    rl.workers.close()
    assert rl.rounds.wasted > 0 and rl.wasted_tokens == rl.rounds.wasted and len(rl.rounds.queue) == 1


# -----------------------------------------------------------------------------
# --stream


def test_spare_time_goes_into_groups_that_were_handed_out(own):
    """one at a time, each once, and none in a step without --stream"""
    for on in (True, False):
        rl = ready(stream=on, deterministic=False)
        handed = list(nanorl.sample_step(rl))
        for group in handed:
            nanorl.advantage(group, rl.config)
        seen = []
        for _ in range(4):
            tail.meanwhile(rl, handed)
            seen.append(len(rl.early))
        rl.workers.close()
        assert seen == ([1, 2, 3, 3] if on else [0] * 4)


def test_streaming_is_exact(own):
    """the gradient of groups that are back-propagated one by one before the rollout is whole is
    that of the batch: sums, one division. Here for three of five, in fp32, in parts of 1e-6 of
    its largest entry"""
    config = nanorl.Config(init="base", data="my.jsonl", reward="my.py:score", device="cpu", threads=1,
                           max_new=30, row_tokens=512, n=4, stream=True, deterministic=False,
                           algo="grpo", aggregate="token", kl_coef=0.1, final_n=4, eval_n=4)
    rl = nanorl.setup(config, reward=config.reward, task=config.data)
    groups = list(nanorl.collect(rl, rl.problems[:5], 4))
    for g in groups:
        advantage(g, rl.config)
    grads, totals = [], []
    for early in ([], groups[:3]):
        rl.normaliser = 0.0
        rl.early.clear()
        for g in early:
            tail.learn_early(rl, g)
        stats = stages.update(rl, groups, make_loss(rl.config, reference=rl.reference))
        grads.append([p.grad.clone() for p in rl.model.parameters()])
        totals.append((rl.normaliser, stats["tokens"], round(stats["entropy"], 2)))
        rl.model.zero_grad()
    rl.workers.close()
    assert totals[0] == totals[1]
    for a, b in zip(*grads):
        assert (a - b).abs().max() <= 1e-6 * max(1.0, a.abs().max()) and a.abs().max() > 0


@pytest.mark.parametrize("more", [[], ["--tail-batching", "prompt", "--more-prompts", "1"]])
def test_a_rank_with_nothing_left_streams(own, ranks, more):
    """two ranks, one of which samples slowly: the other learns from its groups meanwhile, and the
    weights are those of a step without"""
    slow = ("import os, sys, time, rollout, nanorl\nfrom common import deal\nstep = rollout.Sampler.step\n"
            "def late(self):\n    time.sleep(0.01 * int(os.environ.get('RANK', '0')))\n"
            "    return step(self)\nrollout.Sampler.step = late\n"
            "rank, world = int(os.environ.get('RANK', '0')), int(os.environ.get('WORLD_SIZE', '1'))\n"
            "deal.deal_out = lambda sampler, limits: (iter(list(limits)[rank::world]), None)\n"
            "nanorl.main(sys.argv[1:])")
    own += ["--steps", "1", "--prompts", "6", *more]
    nanorl.main([*own, "--name", "one"])
    ranks(2, slow, *own, "--name", "two", "--stream", "--no-deterministic")
    assert metrics("two")[-1]["streamed"] > 0
    one, two, base = weights("runs/one/ckpt/step_1"), weights("runs/two/ckpt/step_1"), weights("base")
    assert all(torch.allclose(one[k], two[k], atol=5e-5) for k in one)
    assert any(not torch.equal(one[k], base[k]) for k in one)


def test_groups_that_move_to_a_rank_without_rows(own, ranks):
    """two ranks on the shared counter, one of which samples slowly: half of what one has goes to
    the other, samples scored here and there, and the step is that of one process"""
    slow = ("import os, sys, time, rollout, nanorl\nfrom common.deal import SharedPrompts\n"
            "step, give = rollout.Sampler.step, SharedPrompts.offer\ndef late(self):\n"
            "    time.sleep(0.01 * int(os.environ.get('RANK', '0')))\n    return step(self)\n"
            "def told(self, groups):\n    print('gives', len(groups))\n    give(self, groups)\n"
            "rollout.Sampler.step, SharedPrompts.offer = late, told\nnanorl.main(sys.argv[1:])")
    own += ["--steps", "1", "--prompts", "6"]
    nanorl.main([*own, "--name", "one"])
    said = ranks(2, slow, *own, "--name", "two", "--no-deterministic")
    assert any("gives" in out for out in said)
    one, two, base = weights("runs/one/ckpt/step_1"), weights("runs/two/ckpt/step_1"), weights("base")
    assert all(torch.allclose(one[k], two[k], atol=5e-5) for k in one)
    assert any(not torch.equal(one[k], base[k]) for k in one)
    assert metrics("one")[-1]["reward"] == pytest.approx(metrics("two")[-1]["reward"], abs=1e-6)


# -----------------------------------------------------------------------------
# bad input, a warning, rewards that nobody wants


@pytest.mark.parametrize("argv, words", [
    (["--tail-batching", "rase"], "did you mean race"),
    (["--tail-batching", "race", "--more-prompts", "0.5"], "at least what is wanted"),
    (["--tail-batching", "continue", "--tis", "0"], "--tis 0"),
    (["--stream"], "--no-deterministic"),
    (["--stream", "--no-deterministic", "--cov", "clip"], "--cov"),
    (["--stream", "--no-deterministic", "--minibatch", "2"], "--minibatch"),
    (["--stream", "--no-deterministic", "--epochs", "2"], "--epochs"),
])
def test_bad_input_is_one_line(own, capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        nanorl.main([*own, *argv])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0], error
    assert not Path("runs").exists()


def test_votes_are_not_raced(own, capsys):
    """test-time RL: the first votes that are in are the short ones, so a race would let them
    elect the label. So it has no such flag"""
    with pytest.raises(SystemExit) as stopped:
        ttrl.main(["--init", "base", "--tail-batching", "race"])
    assert stopped.value.code == 2 and "--tail-batching is no flag" in capsys.readouterr().err


def test_a_biased_race_is_worth_a_word():
    calm = dict(zero_var=0.3, truncated=0.0, entropy=1.0, sampler_kl=1e-9,
                repetition=0.0, length_bias=math.nan)
    assert warnings([calm, calm], nanorl.Config()) == []
    (words,) = warnings([calm, {**calm, "length_bias": -0.21}], nanorl.Config())
    assert "21% shorter" in words and "--tail-batching prompt" in words
    older = {**calm, "sampler_kl": 0.1, "older": 0.4}
    assert warnings([calm, older], nanorl.Config()) == [], "tokens of an older policy are meant to differ"


def test_forgotten_rewards_do_not_come_back(own):
    Path("my.py").write_text("import time\ndef score(problem, text):\n"
                             "    time.sleep(0.2)\n    return float(text)\n")
    rewards = Rewards("my.py:score", workers=1)
    problem = data.Problem("", id=0)
    for i in range(4):
        rewards.put((0, i), problem, str(i))
    while not rewards.workers or not rewards.workers[0].jobs:
        rewards._pump(wait=True)
    rewards.forget()
    rewards.put((1, 0), problem, "7")
    assert [(key, value) for key, value, _ in rewards.get(block=True)] == [((1, 0), 7.0)]
    assert rewards.get(block=True) == []
    rewards.close()


# -----------------------------------------------------------------------------
# the simulator


def test_a_simulated_gpu_is_an_engine():
    """one GPU whose step takes a second, whatever its rows: rounds take as many seconds as the
    token-by-token engine takes steps, and keep the same samples"""
    length = law(0.5, 0.5)

    def lengths(problem, visit):
        return [min(CAP, length(problem, visit, i)) for i in range(9)]

    class Cluster(simulate.Cluster):
        round = 0

    class Counting(Engine):
        now = 0

        def step(self):
            self.now += 1
            return super().step()

    for mode in ("off", "race", "prompt", "continue", "april"):
        seen = []
        for engine in (Cluster(1, lengths, (lambda n: 1.0, 0.0, 0.0, 0.0), 999), Counting(length)):
            clock, stream, rounds = [], ((i, 0) for i in itertools.count()), make_rounds(mode, PROMPTS, N)
            for _ in range(11):
                _, _, (kept,), _ = play(mode, None, 1, engine=engine, rounds=rounds, fresh=stream)
                clock.append((round(engine.now, 6),
                              sorted((s.problem, s.visit, s.index, len(s.tokens)) for g in kept for s in g)))
            seen.append(clock)
        assert seen[0] == seen[1]


@pytest.mark.parametrize("trace", ["", "lengths.csv", "lengths.json"])
def test_simulate_prints_a_table_and_a_picture(tmp_path, monkeypatch, capsys, trace):
    monkeypatch.chdir(tmp_path)
    Path("lengths.csv").write_text("TIMESTAMP,GeneratedTokens\n" + "".join(f"0,{n}\n" for n in range(1, 200)))
    Path("lengths.json").write_text(json.dumps([[n, n + 5, 3 * n] for n in range(1, 60)]))
    argv = "--gpus 4 --prompts 8 --n 4 --rounds 5 --cap 512 --median 20 --no-table".split()
    numbers = simulate.main([*argv, *(["--trace", trace] if trace else [])])
    assert 0 < numbers["race over plain"] < 2 and numbers["prompt bias"] == numbers["continue bias"] == 0
    assert "| continue |" in capsys.readouterr().out and Path("simulate.png").stat().st_size > 1000


@pytest.mark.parametrize("argv, words", [
    (["--trace", "nowhere.csv"], "nowhere.csv"),
    (["--trace", "other.csv"], "GeneratedTokens"),
    (["--cost", "nowhere.json"], "nowhere.json"),
    (["--between", "2"], "--between"),
    (["--gpus", "0"], "--gpus"),
])
def test_simulate_refuses(tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    Path("other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(SystemExit) as stopped:
        simulate.main(argv)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0]


def test_ranks_that_meet_go_on_to_their_next_meeting():
    """What a rank decides the others learn when they meet. A simulator without that promised
    races 10% more than they gave."""
    def lengths(problem, visit):
        return [20] * 8

    for together, seconds in ((0, 20.0), (16, 32.0 + 2 * 0.5), (4, 20.0 + 5 * 0.5)):
        cluster = simulate.Cluster(2, lengths, (lambda n: 1.0, 0.0, 0.0, 0.5), 999, together=together)
        for problem in range(2):
            cluster.submit(problem, [1], 8, 99)
        while cluster.live:
            cluster.step()
        cluster.close()
        assert cluster.now == seconds, together


def test_prompts_go_to_all_simulated_gpus():
    """The count that dealt prompts to GPUs once also numbered events, two for each prompt: every
    second GPU stood idle for ever."""
    cluster = simulate.Cluster(4, lambda problem, visit: [5] * 8, (lambda n: 1.0, 0.0, 0.0, 0.0), 999)
    for problem in range(8):
        cluster.submit(problem, [1], 2, 99)
    assert [len(gpu.rows) for gpu in cluster.gpus] == [4] * 4
