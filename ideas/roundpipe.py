"""
roundpipe.py: a pipeline whose stages belong to no GPU (RoundPipe, arXiv 2604.27085), simulated.

A pipeline binds each stage to a GPU, so all wait for the one with the head, in Qwen3-1.7B three layers' work.
RoundPipe keeps weights on the host and deals any number of stages out in turn:

    GPU 0   F0 F0 F0   F3 F3 F3   B1 B1 B1        a stage: all micro-batches, one after another;
    GPU 1      F1 F1 F1   B4 B4 B4   B0 B0 B0     its weights come while the one before runs
    GPU 2         F2 F2 F2   B3 B3 B3   F0 F0 F0

Nothing runs here: a task starts when its GPU and what it needs is there. A layer takes 1 forward, 3
backward (the forward again, then 2), the head what was measured; the last stage keeps its forward.
Durations vary by 3%. RoundPipe's planner is its authors': of stage sizes up to 1.1 times the longest
layer, the least (stages x size). Others get their best cut, interleaved the best of 1 to 4 chunks.

The paper: 1.48 to 2.16 times as fast as others on 8 RTX 4090, 1.7B to 32B; its others wait for the host,
too: here is the share that scheduling has. Its authors' simulator (RoundPipe-artifact), in rounds of 8
micro-batches, has 1.10 to 1.24 over interleaved with a layer per stage, all in step. Weights are one step
old by default, which fills gaps by itself: it is compared with bound stages whose weights are as old.

    python -m ideas.roundpipe            # "in step": RoundPipe without old weights
    python -m bench ideas --names roundpipe
"""
import functools
import itertools
import math
import statistics
from dataclasses import dataclass

import numpy as np

from common.evidence import Claim, Idea, begin, finish, picture
from common.flags import flags, positive, without_effect

CLAIM = Claim(paper="2604.27085", says="1.48 to 2.16 times as fast as others on 8 GPUs, 1.7B to 32B",
              measured="steps per time over bound stages whose weights are as old, three models",
              smallest=10.0, unit="%")
ARMS = ("1F1B", "interleaved", "1F1B, a step late", "interleaved, a step late", "RoundPipe", "in step")
# layers, millions of numbers in one, the head's time in layers: as measured in RoundPipe-artifact
MODELS = {"Qwen3-1.7B": (28, 50.3, 2.97), "Llama3.1-8B": (32, 218.0, 2.01), "Qwen3-32B": (64, 487.0, 1.35)}
GPUS = 8
TOKENS = 4096                            # of a micro-batch
FLOPS, BYTES = 60e12, 25e9               # per second: a card computes, and gets weights from the host
STEPS = 5                                # simulated; the first and the last are not measured


@dataclass
class Config(Idea):
    steps: int = 16                      # micro-batches of a step: 8, 16, ... up to this many


def step_time(queues, last, jitter):
    """-> of a step. queues: the tasks of each GPU in order: (key, duration, keys that it waits for, time to
    bring its weights). last: the task that ends each step"""
    ends = {}
    at = [0] * len(queues)
    free = [0.0] * len(queues)
    began = [0.0] * len(queues)          # the stage before
    while any(i < len(queue) for i, queue in zip(at, queues)):
        for gpu, queue in enumerate(queues):
            while at[gpu] < len(queue) and all(need in ends for need in queue[at[gpu]][2]):
                key, length, needs, upload = queue[at[gpu]]
                start = max([free[gpu], *(ends[need] for need in needs)])
                if upload:               # it began with the stage before, on this GPU
                    start = began[gpu] = max(start, began[gpu] + upload)
                free[gpu] = ends[key] = start + length * jitter.lognormal(0, 0.03)
                at[gpu] += 1
    return (ends[last[-2]] - ends[last[0]]) / (len(last) - 2)


def layers_of(model):
    count, _, head = MODELS[model]
    return [1.0] * count + [head]


def best_cut(costs, last, parts):
    """-> ends of the stages whose largest cost is least, then their squares. last: costs in the last one"""
    @functools.cache
    def best(n, p):                      # of the first n layers in p stages
        if p == 0:
            return (0.0 if n == 0 else math.inf), 0.0, (0,)
        size = {i: sum((last if p == parts else costs)[i:n]) for i in range(n + 1)}
        tries = [(best(i, p - 1), size[i]) for i in size]
        return min((max(most, own), squares + own**2, (*ends, n)) for (most, squares, ends), own in tries)
    return best(len(costs), parts)[2]


def bound(model, M, chunks, late, jitter):
    """1F1B, or interleaved: stage s belongs to GPU s mod GPUS."""
    forward, S = layers_of(model), GPUS * chunks
    cut = best_cut([4 * t for t in forward], [3 * t for t in forward], S)
    size = [sum(forward[a:b]) for a, b in zip(cut, cut[1:])]
    queues = [[] for _ in range(GPUS)]
    rounds = [M * STEPS] if late else [M] * STEPS                # without a pause, or with one after each
    for step, count in enumerate(rounds):
        for gpu, queue in enumerate(queues):
            begun = done = 0
            ahead = (GPUS - 1 - gpu) * (1 if chunks == 1 else 2) + (chunks - 1) * GPUS
            for _ in range(2 * count * chunks):
                back = begun == count * chunks or begun - done > min(ahead, count * chunks)
                i = done if back else begun
                m = i // (GPUS * chunks) * GPUS + i % GPUS       # with one chunk: i
                chunk = i // GPUS % chunks
                s = GPUS * (chunks - 1 - chunk if back else chunk) + gpu
                length = size[s] * ((2 if s == S - 1 else 3) if back else 1)
                needs = [("F", step, s - 1, m)] if s else []
                if back:
                    needs = [("B", step, s + 1, m) if s < S - 1 else ("F", step, s, m)]
                queue.append((("B" if back else "F", step, s, m), length, needs, 0.0))
                done, begun = done + back, begun + (not back)
    ends = [("B", 0, 0, M * (k + 1) - 1) if late else ("B", k, 0, M - 1) for k in range(STEPS)]
    return step_time(queues, ends, jitter)


def grouped(layers, cost, most):
    groups = [[]]
    for layer in layers:
        if sum(cost[i] for i in groups[-1]) + cost[layer] > most + 1e-9:
            groups.append([])
        groups[-1].append(layer)
    return groups


def plan(forward, limit=1.1):
    """-> stages of one step: (kind, layers); the first backward stage computes its own forward."""
    backward = [3 * t for t in forward]
    n, found = len(forward), []
    sums = {sum(cost[i:j]) for cost in (forward, backward) for i in range(n) for j in range(i + 1, n + 1)}
    for most in sorted(s for s in sums if 1 <= s / max(backward) <= limit + 1e-9):
        behind = grouped(reversed(range(n)), backward, most)
        ahead = grouped(reversed(range(min(behind[0]))), forward, most)[::-1]
        behind = behind[:1] + grouped(range(min(behind[0])), backward, most)[::-1]
        stages = [("F", sorted(g)) for g in ahead] + [("B", sorted(g)) for g in behind]
        found.append((max(len(stages), GPUS) * most, len(stages), stages))
    return min(found)[2]


def dealt(model, M, late, jitter):
    """RoundPipe: each stage of each step goes to the next GPU in turn."""
    forward = layers_of(model)
    stages = plan(forward)
    upload = (2 / BYTES) / (2 * TOKENS / FLOPS)                  # of a layer's numbers, in its forward's time
    queues = [[] for _ in range(GPUS)]
    for turn in range(STEPS * len(stages)):
        step, s = divmod(turn, len(stages))
        kind, layers = stages[s]
        work = sum(forward[i] for i in layers)
        for m in range(M):
            needs = [(step, s - 1, m)] if s else []
            if m == 0 and step > late:           # its weights: of the last step, or of the one before
                needs += [(step - 1 - late, b, M - 1) for b, (back, of) in enumerate(stages)
                          if back == "B" and set(of) & set(layers)]
            length = work * (1 if kind == "F" else 3)
            queues[turn % GPUS].append(((step, s, m), length, needs, upload * work * (m == 0)))
    ends = [(step, len(stages) - 1, M - 1) for step in range(STEPS)]
    return step_time(queues, ends, jitter)


def host_traffic(model):
    """-> GB of a step in 16 bits: the weights of all stages, and gradients; none, if stages are bound"""
    forward = layers_of(model)
    moved = [forward[i] * (2 if kind == "B" else 1) for kind, layers in plan(forward) for i in layers]
    return sum(moved) * MODELS[model][1] * 2e-3


def speed(arm, model, M, seed):
    forward = layers_of(model)
    jitter = np.random.default_rng(seed)
    if arm in ARMS[4:]:
        time = dealt(model, M, arm == "RoundPipe", jitter)
    else:
        chunks = [v for v in range(1, 5 if arm.startswith("interl") else 2) if v * GPUS <= len(forward)]
        time = min(bound(model, M, v, arm.endswith("late"), jitter) for v in chunks)
    return M * 4 * sum(forward) / GPUS / time


def faster(table, arm, *others):
    """-> in percent, than the best of others"""
    return 100 * statistics.geometric_mean(table[arm][m] / max(table[other][m] for other in others)
                                           for m in MODELS) - 100


def main(argv=None):
    config = flags(Config, argv, __doc__)
    positive(config, "steps")
    without_effect(config, [("init", False, "nothing is trained here")])
    counts = range(GPUS, max(config.steps, GPUS) + 1, GPUS)
    trial = begin(config, __file__, CLAIM, ARMS, len(counts))
    table = {}
    for arm, M in itertools.product(ARMS, counts):
        table[arm] = {model: speed(arm, model, M, config.seed) for model in MODELS}
        trial.point(arm, M, 100 * table[arm]["Llama3.1-8B"])
    picture(trial, x="micro-batches of a step, Llama3.1-8B", y="speed, % of GPUs that never wait")
    note = (f"(both in step {faster(table, ARMS[5], *ARMS[:2]):+.0f}, late against in step "
            f"{faster(table, ARMS[4], *ARMS[:2]):+.0f}; {host_traffic('Llama3.1-8B'):.0f} GB per step of 8B)")
    return finish(trial, (faster(table, ARMS[4], *ARMS[2:4]), 0.0), table, note)


if __name__ == "__main__":
    main()
