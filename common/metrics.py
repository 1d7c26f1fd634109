"""
metrics.py: the numbers of a step, the line on the screen, the warnings that save a day, and the
samples that people read.

`summary` is what metrics.jsonl holds; the README explains each of its names and says when to worry.
"""

import math
import time
import zlib
from contextlib import contextmanager

import numpy as np

from common.reward import varies
from common.run import all_max, all_sum, gather
from rollout import completion

CLOCKS = ("rollout", "reward", "pack", "train", "opt", "idle")


class Clock(dict):
    """Seconds per stage. `with clock("train"):` adds to one; of nested stages only the innermost
    counts."""

    def __init__(self):
        super().__init__(dict.fromkeys(CLOCKS, 0.0))
        self.running = []          # the names of the stages that have begun, the innermost last
        self.since = 0.0

    def _turn(self):
        now = time.perf_counter()
        if self.running:
            self[self.running[-1]] += now - self.since
        self.since = now

    @contextmanager
    def __call__(self, name):
        self._turn()
        self.running.append(name)
        try:
            yield
        finally:
            self._turn()
            self.running.pop()

    def read(self):
        """-> {t_NAME: seconds since the last reading}, and begins anew."""
        times = {f"t_{name}": seconds for name, seconds in self.items()}
        self.update(dict.fromkeys(self, 0.0))
        return times


def merge_stats(parts):
    """Stats of micro-batches, ranks or updates as one: sums, but the largest of *_max and all
    numbers of *_all."""
    total = {}
    for part in parts:
        for name, value in part.items():
            if hasattr(value, "cpu"):                            # a tensor
                value = value.cpu().numpy()
            if name.endswith("_all"):
                total[name] = np.append(total.get(name, np.zeros(0, np.float32)), value)
            elif name.endswith("_max"):
                total[name] = max(total.get(name, 0.0), float(value))
            else:
                total[name] = total.get(name, 0.0) + float(value)
    return total


def varied(group):
    return varies([s.reward for s in group])


def summary(rl, groups, stats, start):
    """The numbers of a step, over all ranks; they are added to rl.history. groups: of this rank;
    stats: of learn() or update(); start: time.perf_counter() at the beginning of the step."""
    mine = [(s.reward, s.finished == "length", len(s.tokens), repeats(completion(s, rl.tok)))
            for g in in_order(groups) for s in g]
    every = [row for part in gather(mine) for row in part]
    reward, truncated, length, repetition = [math.nan] * 4
    if every:
        reward, truncated, length, repetition = (float(np.mean(column)) for column in zip(*every))

    # what --dynamic threw away took its time, too; what a race threw away is in `wasted`
    sampled = sum(tokens for _, _, tokens, _ in every) + all_sum(rl.dropped_tokens)
    rl.spent += sampled + all_sum(rl.wasted_tokens)
    flat = all_sum(sum(not varied(g) for g in groups) + rl.dropped)
    count = all_sum(len(groups) + rl.dropped)
    low, middle, high = [math.nan] * 3
    weights = stats.get("weight_all", ())
    if len(weights):
        low, middle, high = np.quantile(weights, (0.01, 0.5, 0.99))

    trained = stats.get("tokens", 0.0)
    per_token = {k: stats.get(k, 0.0) / max(1.0, trained)
                 for k in ("sampler_kl", "sampler_far", "clipped", "reference_kl")}
    times = rl.clock.read()
    numbers = dict(
        reward=reward,
        zero_var=flat / max(1, count),
        truncated=truncated,
        length=length,
        entropy=stats.get("entropy", math.nan) / max(1.0, trained),
        **per_token,
        sampler_max=stats.get("sampler_max", 0.0),
        weight_q01=low,
        weight_q50=middle,
        weight_q99=high,
        repetition=repetition,
        groups=count,
        tokens=sampled,
        trained_tokens=trained,
        grad_norm=stats["grad_norm"],
        skipped=rl.optimizer.skipped,
        spent=rl.spent,
        reward_failed=all_sum(sum(rl.workers.failed.values())),
        rollout_tok_s=sampled / rl.env.world / max(1e-9, times["t_rollout"]),
        train_tok_s=trained / rl.env.world / max(1e-9, times["t_train"]),
        t_step=time.perf_counter() - start,
        **times,
    )
    rl.seconds += all_max(numbers["t_step"])
    if rl.rounds:
        numbers |= rl.rounds.evidence()
    if rl.config.entropy_target:
        numbers["bonus"] = rl.bonus
    if rl.config.stream:
        numbers["streamed"] = all_sum(len(rl.early))
    rl.history.append(numbers)
    return numbers


def in_order(groups):
    """By problem and visit: they come in the order in which their rewards arrived, which no run
    repeats."""
    return sorted(groups, key=lambda g: (g[0].problem, g[0].visit))


def repeats(text):
    """Does the end of a text say the same thing again and again? zlib shrinks such a tail more
    than tenfold."""
    tail = text[-1000:].encode()
    return len(tail) > 100 and len(tail) / len(zlib.compress(tail)) > 10


# -----------------------------------------------------------------------------
# warnings: conditions on the numbers of all steps so far, the newest last


def no_signal(h):
    return len(h) >= 5 and all(m["zero_var"] == 1 for m in h[-5:])


def cut_short(h):
    return h[-1]["truncated"] > 0.5


def collapsed(h):
    return len(h) > 1 and h[-1]["entropy"] < 0.1 * h[0]["entropy"]


def falling_apart(h):
    return len(h) > 1 and h[-1]["entropy"] > 3 * h[0]["entropy"] and h[-1]["entropy"] > 0.5


def disagree(h):
    # tokens of an older policy are meant to differ
    return h[-1]["sampler_kl"] > 0.01 and not h[-1].get("older")


def biased(h):
    return abs(h[-1].get("length_bias", 0.0)) > 0.05


def repeating(h):
    return h[-1]["repetition"] > 0.1


def warnings(history, config):
    """The warnings that a step deserves. Each is given when its condition begins, and not again
    while it lasts."""
    bias = abs(history[-1].get("length_bias", 0.0))
    texts = {
        no_signal: "no group had two different rewards for 5 steps: there is nothing to learn from. The "
                   "task is too hard or too easy for this model (look at reward), or the reward does not "
                   "read the answer (look at samples.jsonl)",
        cut_short: f"more than half of the responses were cut at --max-new {config.max_new}: their "
                   "rewards say nothing. Raise --max-new",
        collapsed: "the entropy fell below a tenth of what it was: the samples of a group will soon be "
                   "equal. Lower --lr, give --entropy-target or --entropy-coef",
        falling_apart: "the entropy rose to three times what it was: the policy is falling apart. "
                       "Lower --lr",
        disagree: "sampler and trainer disagree (KL above 0.01): a sampler in lower precision, or a bug",
        biased: f"the kept responses are {bias:.0%} shorter than those drawn: a race selects where the "
                "responses to a prompt differ in length. --tail-batching prompt or continue does not",
        repeating: "more than a tenth of the responses end by repeating themselves (their tails shrink "
                   "tenfold under zlib)",
    }
    begun = [holds for holds in texts if holds(history) and not (history[:-1] and holds(history[:-1]))]
    return [texts[holds] for holds in begun]


def recent(history, last=50):
    """What a checkpoint keeps of the history: the warnings look at the first step and at the last
    ones."""
    return history[:1] + history[1:][-last:]


# -----------------------------------------------------------------------------
# tail batching: does a race prefer short samples?


def kaplan_meier(seen):
    """[tokens, ended] of samples, some of them aborted -> lengths in order, and for each the estimated
    share of all samples that is longer (E. L. Kaplan and P. Meier, 1958, JASA 53)."""
    lengths, ended = np.array(sorted(seen, key=lambda x: (x[0], -x[1])), float).T
    at_risk = np.arange(len(lengths), 0, -1)
    return lengths, np.cumprod(1 - ended / at_risk)


def median(seen):
    lengths, longer = kaplan_meier(seen)
    below = longer <= 0.5
    return max(1.0, lengths[np.argmax(below)] if below[-1] else lengths[-1])


def length_bias(records, most):
    """How much longer trained responses are than all that were drawn (below 0: shorter). records: for
    each prompt the lengths of its group, [tokens, ended] of the samples of its first launch, which
    nothing selected, and whether there was another. An aborted sample would have become as long as
    others that came so far, in units of its prompt's median: prompts differ, and the race sees the
    short ones first. most: where a response is cut."""
    scales = []
    pool = []
    for group, first, again in records:
        seen = first + [[n, 1] for n in group] if again else first
        scale = median(seen)
        scales.append(scale)
        pool += [[n / scale, ended] for n, ended in seen]
    lengths, longer = kaplan_meier(pool)
    areas = longer[:-1] * np.diff(lengths)           # under the curve, between two lengths
    beyond = np.append(np.cumsum(areas[::-1])[::-1], 0.0)
    drawn = []
    for (_, first, _), scale in zip(records, scales):
        i = np.searchsorted(lengths, [n / scale for n, _ in first], "right") - 1
        rest = np.divide(beyond[i], longer[i], out=np.zeros(len(i)), where=longer[i] > 0) * scale
        whole = [n if ended else min(most, n + more) for (n, ended), more in zip(first, rest)]
        drawn.append(np.mean(whole))
    trained = np.mean([np.mean(group) for group, _, _ in records])
    return float(trained / np.mean(drawn)) - 1


# -----------------------------------------------------------------------------
# for people


def status(step, config, m):
    """One line per step, reward first: a loss of a policy gradient says nothing."""
    return (f"step {step}/{config.steps}  reward {m['reward']:.3f}  zero-var {m['zero_var']:.0%}  "
            f"truncated {m['truncated']:.0%}  length {m['length']:.1f}  entropy {m['entropy']:.3f}  "
            f"kl {m['sampler_kl']:.1e}  rollout {m['rollout_tok_s']:,.0f} tok/s {m['t_rollout']:.2f}s  "
            f"update {m['train_tok_s']:,.0f} tok/s {m['t_train']:.2f}s")


def sample_rows(rl, groups):
    """16 samples of a step for samples.jsonl: text, the token pieces and their log-probs. They are
    whole groups, so that what was right stands beside what was wrong; of a group of more than 16,
    every second or third sample."""
    by_id = {p.id: p for p in rl.problems}
    groups = in_order(groups)
    count = max(1, 16 // max(map(len, groups), default=1))
    chosen = [s for g in groups[:: max(1, len(groups) // count)][:count] for s in g[:: -(-len(g) // 16)]]
    return [dict(
        step=rl.step,
        problem=s.problem,
        index=s.index,
        prompt=by_id[s.problem].prompt,
        text=completion(s, rl.tok),
        pieces=[rl.tok.decode([t]) for t in s.tokens],
        logprobs=[None if math.isnan(x) else x for x in s.logprobs],     # forced: there is none
        advantage=s.advantage,
        reward=s.reward,
        finished=s.finished,
    ) for s in chosen]
