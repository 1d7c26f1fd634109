"""
python -m bench simulate: tail batching on a cluster that is not there. The scheduling code of
tail.py, unchanged, drives an engine of GPUs that are a formula: what does a round cost, who
waits, what is thrown away, and are the responses that are kept the responses of the model?

    python -m bench simulate
        two-level lognormal lengths, 128 GPUs, all modes; then the sensitivity table
    python -m bench simulate --trace lengths.csv --between 0.3
        real lengths: a CSV with a column GeneratedTokens, or a JSON list
    python -m bench simulate --cost steps.json --gpus 2
        a machine's own step times: {"rows": [1, 8], "seconds": [0.001, 0.002]}

Nothing is stepped token by token: between two events (a sample ends, enters, is aborted) a GPU's
live rows are the same, so the time of k steps has a closed form. A step costs the weights once,
each row's arithmetic where that is more, and the keys of every token in the cache. Prompts stay
on one GPU, as they do under torchrun. bias: mean length kept against that of plain rollouts of
the same prompts.
"""
import csv
import heapq
import itertools
import json
import math
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from bench import finish
from common import view
from common.flags import die, flags, positive
from tail import Launch, Race, Round, Rounds


@dataclass
class Config:
    trace: str = ""                  # real lengths: .csv with GeneratedTokens, or JSON, a list (of lists)
    gpus: int = 128                  # GPUs
    together: int = 0                # steps between two meetings of the GPUs, 16 as in nanorl.py; 0: none
    prompts: int = 128               # prompts per round
    n: int = 8                       # samples per prompt
    cap: int = 16384                 # the longest response
    median: float = 550.0            # of the lognormal lengths
    sigma: float = 1.1               # of their logarithm
    between: float = 0.5             # share of the log-variance that is between prompts; the rest is within
    more_prompts: float = 1.25       # launched over wanted
    more_samples: float = 1.25       # the same for samples, mode race
    rounds: int = 25                 # of each mode
    cost: str = ""  # a JSON file of measured step times; empty: the formula with the numbers below
    weights: float = 15.2e9          # bytes read by every step: 7B in bf16
    kv: float = 57344.0              # bytes per token in the cache
    bandwidth: float = 2.3e12        # bytes per second that are reached
    flops: float = 4e14              # the same for arithmetic
    overhead: float = 1e-3           # seconds per step that are neither
    slots: int = 1024                # rows per GPU
    table: bool = True               # the sensitivity table too
    endless: float = 0.002           # in that table: the share of responses that would never end
    seed: int = 0                    # of the lengths
    out: str = "simulate.png"        # the picture


# -----------------------------------------------------------------------------
# lengths: a function of (problem, visit), for all samples at once


def lognormal(config):
    def quantile(z):
        return config.median * np.exp(config.sigma * z)
    return quantile


def quantiles(lengths):
    """Of a trace: the same two-level normal numbers, sent through the trace's own distribution."""
    lengths, normal = np.sort(np.array(lengths, float)), NormalDist()
    grid = np.linspace(-4, 4, 801)
    return lambda z: np.interp(np.interp(z, grid, [normal.cdf(x) for x in grid]),
                               (np.arange(len(lengths)) + 0.5) / len(lengths), lengths)


def make_law(config, endless=0.0):
    """-> law(problem, visit): the lengths of its samples, as many as may be asked for. endless: a
    share of them runs to the cap."""
    most = 4 * config.n
    lengths = read(config.trace) if config.trace else None
    # by prompt: a prompt of the trace, its own lengths drawn again
    if lengths and isinstance(lengths[0], list):

        def law(problem, visit):
            own = lengths[problem % len(lengths)]
            pick = np.random.default_rng([config.seed, problem, visit, 1]).integers(len(own), size=most)
            return np.minimum(np.array(own)[pick], config.cap)
        return law
    quantile = quantiles(lengths) if lengths else lognormal(config)

    def law(problem, visit):
        prompt = np.random.default_rng([config.seed, problem]).standard_normal()
        rng = np.random.default_rng([config.seed, problem, visit, 1])
        own, never = rng.standard_normal(most), rng.random(most) < endless
        z = math.sqrt(config.between) * prompt + math.sqrt(1 - config.between) * own
        return np.where(never, config.cap, np.clip(np.round(quantile(z)), 1, config.cap)).astype(int)
    return law


def read(path):
    try:
        if path.endswith(".csv"):
            with open(path, newline="") as f:
                lengths = [int(row["GeneratedTokens"]) for row in csv.DictReader(f)]
        else:
            lengths = json.loads(Path(path).read_text())
        if not lengths or not all(type(n) is int or (isinstance(n, list) and n) for n in lengths):
            raise ValueError("it holds no lengths")
    except (OSError, ValueError, KeyError) as e:
        die(f"--trace {path}: {getattr(e, 'strerror', None) or e}: a "
            ".csv with a column GeneratedTokens, or a JSON list of lengths")
    return lengths


# -----------------------------------------------------------------------------
# what a step costs: (fixed part by live rows, part of each token in the cache, part of each
# sample that enters); and what a meeting does

# seconds that a file of measured times may give beside those of its rows
FURTHER = ("token", "enter", "meet")


def make_cost(config):
    if config.cost:
        try:
            measured = json.loads(Path(config.cost).read_text())
            rows, seconds, (token, enter, meet) = (measured["rows"], measured["seconds"],
                                                   (measured.get(k, 0.0) for k in FURTHER))
        except (OSError, ValueError, KeyError) as e:
            die(f'--cost {config.cost}: {e}: it must hold {{"rows": [...], "seconds": [...]}}')
        return (lambda n: float(np.interp(n, rows, seconds))), token, enter, meet
    params = config.weights / 2

    def step(n):
        return config.overhead + max(config.weights / config.bandwidth, 2 * params * n / config.flops)

    return step, config.kv / config.bandwidth, 0.0, 0.0


# -----------------------------------------------------------------------------
# the engine: submit, step, abort, live, and a clock


@dataclass(eq=False)
class Sample:
    problem: int
    index: int
    visit: int
    length: int                      # that it will have
    tokens: range                    # that it has: only their number counts
    finished: str = "aborted"
    reward: float = math.nan


class GPU:
    def __init__(self):
        self.rows = []
        self.waiting = deque()
        self.since = 0.0
        self.context = 0
        self.busy = 0.0
        self.spans = []
        self.version = 0


class Cluster:
    def __init__(self, gpus, law, cost, slots, prompt=128, together=0):
        """together: steps between two meetings of the ranks, so that a step takes as long as on
        the slowest; 0: they do not meet."""
        self.gpus, self.law, self.slots, self.prompt = [GPU() for _ in range(gpus)], law, slots, prompt
        self.step_cost, self.token_cost, self.enter_cost, self.meet_cost = cost
        self.now = 0.0
        self.live = 0
        self.sampled = 0
        self.events = []
        self.next = itertools.count()
        self.turn = itertools.count()
        self.home, self.together, self.since_start, self.last = {}, together, 0, 0.0  # problem -> its GPU

    def submit(self, problem, prompt, n, max_new, *, visit=0, resume=()):
        gpu = self.home[problem] = self.gpus[next(self.turn) % len(self.gpus)]
        lengths, taken = self.law(problem, visit), {s.index for s in resume}
        new = [Sample(problem, i, visit, int(lengths[i]), range(0))
               for i in range(n + len(taken)) if i not in taken][: n - len(resume)]
        self._advance(gpu)
        gpu.waiting.extend([*resume, *new])
        self.live += n
        self._fill(gpu)

    def step(self):
        """To the next moment at which samples end."""
        if self.together:
            return self._all()
        while True:
            when, _, gpu, version = heapq.heappop(self.events)
            if version == gpu.version:
                break
        self.now = when
        self._advance(gpu, min(s.length - len(s.tokens) for s in gpu.rows))
        return self._ended(gpu)

    def _all(self):
        busy = [gpu for gpu in self.gpus if gpu.rows]
        k = min(s.length - len(s.tokens) for gpu in busy for s in gpu.rows)
        alone = [gpu.since - self.now + self.seconds(gpu, k) for gpu in busy]
        self.now += max(alone)
        self.since_start, self.last = self.since_start + k, max(self.step_cost(len(gpu.rows)) for gpu in busy)
        for gpu, seconds in zip(busy, alone):
            gpu.busy -= max(alone) - seconds         # it waits for the slowest
            self._advance(gpu, k)
        return [s for gpu in busy for s in self._ended(gpu)]

    def close(self):
        """The end of a round: what decided it is known at the next meeting, and until then all continue."""
        if self.together:
            late = -self.since_start % self.together
            self.now += late * self.last + (self.since_start + late) // self.together * self.meet_cost
            self.since_start = 0

    def _ended(self, gpu):
        ended = [s for s in gpu.rows if len(s.tokens) == s.length]
        gpu.rows = [s for s in gpu.rows if len(s.tokens) < s.length]
        for s in ended:
            s.finished = "stop"
        self.live -= len(ended)
        self._fill(gpu)
        return ended

    def abort(self, problem):
        gpu = self.home[problem]
        self._advance(gpu)
        out = [s for s in (*gpu.rows, *gpu.waiting) if s.problem == problem]
        gpu.rows = [s for s in gpu.rows if s.problem != problem]
        gpu.waiting = deque(s for s in gpu.waiting if s.problem != problem)
        self.live -= len(out)
        self._fill(gpu)
        return out

    def seconds(self, gpu, k):
        n = len(gpu.rows)
        return k * self.step_cost(n) + self.token_cost * (k * gpu.context + n * k * (k - 1) / 2)

    def _advance(self, gpu, k=None):
        """The rows of a GPU have what they have by now: k steps, or as many whole ones as fit."""
        n = len(gpu.rows)
        if n:
            if k is None:            # c n k^2 / 2 + (step + c context - c n / 2) k = time, for k
                a, b = self.token_cost * n / 2, self.step_cost(n) + self.token_cost * (gpu.context - n / 2)
                t = max(0.0, self.now - gpu.since)
                k = int((math.sqrt(b * b + 4 * a * t) - b) / (2 * a) + 1e-6) if a else int(t / b + 1e-6)
                k = min(k, min(s.length - len(s.tokens) for s in gpu.rows) - 1)  # what ends, ends in step()
            for s in gpu.rows:
                s.tokens = range(len(s.tokens) + k)
            self.sampled += n * k
            gpu.context += n * k
            gpu.busy += max(0.0, self.now - gpu.since)
            if self.now > gpu.since:
                gpu.spans.append((gpu.since, self.now, n))
        gpu.since = max(gpu.since, self.now)

    def _fill(self, gpu):
        while gpu.waiting and len(gpu.rows) < self.slots:
            gpu.rows.append(gpu.waiting.popleft())
            gpu.since += self.enter_cost
            gpu.busy += self.enter_cost
        gpu.version += 1
        if gpu.rows:
            gpu.context = sum(self.prompt + len(s.tokens) for s in gpu.rows)
            k = min(s.length - len(s.tokens) for s in gpu.rows)
            heapq.heappush(self.events, (gpu.since + self.seconds(gpu, k), next(self.next), gpu, gpu.version))


# -----------------------------------------------------------------------------
# the modes: plain rollouts, those of tail.py, and one more, whose deferred prompts are resumed in
# the very next round

MODES = ("off", "race", "prompt", "continue", "april")


class April(Rounds):
    """There are no long rounds (APRIL, arXiv 2509.18521)."""

    def missing(self, want=None):
        want = want or self.prompts
        return math.ceil(self.more * want) - min(want, len(self.queue))

    def plan(self, fresh, want=None):
        want = want or self.prompts
        launches = self.queue[:want] + [Launch(*x) for x in fresh]
        self.queue = self.queue[want:]
        return Round(launches, min(want, len(launches)), self.n, self.n, long=False)


def make_rounds(mode, prompts, n, more_prompts=1.25, more_samples=1.25):
    if mode == "off":                # every prompt that is launched is wanted
        return Rounds("prompt", prompts, n, more_prompts=1.0)
    if mode == "april":
        return April("continue", prompts, n, more_prompts)
    return Rounds(mode, prompts, n, more_prompts, more_samples)


def run(rounds, engine, round, max_new, mine=None, every=1, room=math.inf):
    """A round on an engine whose samples need no reward: as tail.collect_round does it. Yields
    this rank's groups."""
    race = Race(round, engine, mine, room)
    prompts = {launch.id: [1] for launch in round.launches}
    try:
        while race.taken < round.want:
            done = []
            for step in range(every):
                ended = race.launch(prompts, max_new)
                idle = not engine.live
                ended += race.step()
                done += [(step, place) for place in race.rewarded(ended)]
                if idle:
                    break
            yield from race.claim(done)
    finally:
        race.close()
    rounds.settle(race, max_new)


def simulate(config, mode, law, cost, rounds=None):
    """-> numbers of a mode, and its cluster with the spans in which each GPU had work."""
    cluster = Cluster(config.gpus, law, cost, config.slots, together=config.together)
    state = make_rounds(mode, config.prompts, config.n, config.more_prompts, config.more_samples)
    stream, plain, kept, wasted, times, own = itertools.count(), [], [], 0, [], 0.0

    def fresh(k):
        out = [(next(stream), 0) for _ in range(k)]
        plain.extend(float(np.mean(law(id, 0)[: config.n])) for id, _ in out)
        return out

    for _ in range(rounds or config.rounds):
        begin, clock = cluster.now, time.process_time()
        round = state.plan(fresh(state.missing()))
        for group in run(state, cluster, round, config.cap):
            kept += [len(s.tokens) for s in group]
        cluster.close()
        own += time.process_time() - clock
        times.append((cluster.now - begin, round.long))
        wasted += state.wasted
    total = sum(t for t, _ in times)
    short, long = [[t for t, l in times if l == kind] for kind in (False, True)]
    return dict(seconds=total / len(times), short=float(np.mean(short)),
                long=float(np.mean(long)) if long else math.nan,
                idle=1 - sum(g.busy for g in cluster.gpus) / (len(cluster.gpus) * total),
                wasted=wasted / max(1, cluster.sampled),
                bias=float(np.mean(kept)) / float(np.mean(plain)) - 1,
                measured=state.bias, per_token=total / sum(kept),
                fifth=sum(t for t, _ in times[:5]), cpu=own / len(times)), cluster


# (prompts, samples)
FACTORS = [(1, 1), (1, 1.125), (1, 1.25), (1, 1.5), (1.125, 1), (1.25, 1), (1.5, 1), (1.25, 1.25)]
CAPS = (8192, 16384, 32768)


def sensitivity(config, cost):
    """-> {cap: {factors: seconds of a round over that of plain}}; as the paper does, the mean
    over whole periods, long rounds included."""
    found = {}
    for cap in CAPS:
        for p, s in FACTORS:
            c = Config(**{**vars(config), "cap": cap, "more_prompts": p, "more_samples": s})
            period = round(1 / (p - 1)) + 1 if p > 1 else 1
            rounds = 3 * period if p > 1 else 8
            found.setdefault(cap, {})[p, s] = simulate(c, "race", make_law(c, config.endless),
                                                       cost, rounds)[0]["seconds"]
        found[cap] = {k: v / found[cap][1, 1] for k, v in found[cap].items()}
    return found


def picture(path, clusters, table):
    figure, axes = view.pyplot().subplots(1, len(clusters) + bool(table),
                                     figsize=(4.2 * (len(clusters) + bool(table)), 4),
                                     layout="constrained", squeeze=False)
    end = clusters["off"][1]                  # the first five rounds of each, on the same clock
    most = max(n for c, _, _ in clusters.values() for g in c.gpus for *_, n in g.spans)
    for ax, (mode, (cluster, fifth, idle)) in zip(axes[0], clusters.items()):
        grid = np.zeros((len(cluster.gpus), 600))
        for y, gpu in enumerate(cluster.gpus):
            for a, b, n in gpu.spans:
                if b <= fifth:
                    grid[y, int(a / end * 600) : max(int(a / end * 600) + 1, int(b / end * 600))] = n
        ax.imshow(np.where(grid, grid, np.nan), aspect="auto", extent=(0, end, len(cluster.gpus), 0),
                  cmap="viridis_r", vmin=0, vmax=most, interpolation="nearest")
        ax.axvline(fifth, color="black", linewidth=1)
        ax.set(title=f"{'plain' if mode == 'off' else mode}: 5 rounds, idle {idle:.0%}",
               xlabel="seconds", ylabel="GPU")
    if table:
        ax = axes[0][-1]
        for i, (cap, row) in enumerate(table.items()):
            ax.bar(np.arange(len(FACTORS)) + 0.27 * (i - 1), [row[f] for f in FACTORS],
                   0.27, label=f"cap {cap // 1024}k", color=view.COLORS[i])
        ax.set_xticks(range(len(FACTORS)), [f"{p:g}\n{s:g}" for p, s in FACTORS], fontsize=7)
        ax.set(title="rollout time over plain", xlabel="times the prompts, times the samples")
        ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)
    view.pyplot().close(figure)


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "gpus prompts n cap rounds slots")
    if (not 0 <= config.between <= 1 or min(config.more_prompts, config.more_samples) < 1
            or config.more_samples > 4):
        die("--between is a share, from 0 to 1; --more-prompts and --more-samples are 1 or more, "
            "--more-samples at most 4")
    law, cost = make_law(config), make_cost(config)
    found, clusters = {}, {}
    print(f"{config.prompts} x {config.n} samples a round, at most {config.cap} "
          f"tokens, {config.gpus} GPUs, {config.rounds} rounds\n\n| mode | seconds a round | over "
          f"plain | short | long | GPUs idle | tokens wasted | bias | as measured |\n{'|---' * 9}|")
    for mode in MODES:
        r, clusters[mode] = simulate(config, mode, law, cost)
        found[mode] = r
        ratio = r["seconds"] / found["off"]["seconds"]
        print(f"| {'plain' if mode == 'off' else mode} | {r['seconds']:.4g} "
              f"| {ratio:.3f} | {r['short']:.4g} | {r['long']:.4g} | {r['idle']:.1%} "
              f"| {r['wasted']:.1%} | {r['bias']:+.1%} | {r['measured']:+.1%} |", flush=True)
    numbers = {f"{mode} over plain": found[mode]["seconds"] / found["off"]["seconds"] for mode in MODES[1:]}
    numbers |= {f"{mode} bias": found[mode]["bias"] for mode in MODES[1:]}
    numbers["continue over race"] = found["continue"]["seconds"] / found["race"]["seconds"]
    table = sensitivity(config, cost) if config.table and not config.trace else {}
    if table:
        print("\nrollout time over plain, mode race, by how many times the prompts and the "
              f"samples are launched; {config.endless:.1%} of the responses never end\n\n| cap | "
              + " | ".join(f"{p:g}, {s:g}" for p, s in FACTORS) + " |\n" + "|---" * (len(FACTORS) + 1) + "|")
        for cap, row in table.items():
            print(f"| {cap} | " + " | ".join(f"{row[f]:.2f}" for f in FACTORS) + " |")
            numbers[f"both 1.25, cap {cap}"] = row[1.25, 1.25]
    picture(config.out, {mode: (clusters[mode], found[mode]["fifth"], found[mode]["idle"])
                         for mode in ("off", "race", "continue")}, table)
    print(f"wrote {config.out}")
    return finish("simulate", **numbers)


if __name__ == "__main__":
    main()
