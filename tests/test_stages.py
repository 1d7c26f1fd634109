"""the stages, called one by one as a fork would call them: collect with its continuations,
checkpoints of rl, paired scores"""
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import stages
from algos import advantage, make_loss
from common.metrics import Clock
from evaluate import paired
from rollout import Sample, completion
from stages import Settings, collect, next_problems, open_run, save, setup, share_visits, step, update


@pytest.fixture
def rl(tiny_base):
    tiny_base(12)
    made = setup(Settings(init="base", device="cpu", threads=1, max_new=12, row_tokens=256,
                          workers=1, steps=4), reward="my.py:score", task="my.jsonl")
    yield made
    made.workers.close()


def groups_of(rl, count=3, n=2, **more):
    found = list(collect(rl, rl.problems[:count], n, **more))
    return {g[0].problem: g for g in found}


# --------------------------------------------------------------------------------------------------
# collect(resume=): trees, turns and tools are built on it


def test_two_branches_of_one_sample_share_its_stem_and_part_after_it(rl):
    """a branch that drew the noise of the sample it came from would only say the same again; one
    that forgot the log-probs of its stem would train those tokens as if they had been forced"""
    stem = groups_of(rl)[rl.problems[0].id][0]
    stem = replace(stem, tokens=stem.tokens[:5], logprobs=stem.logprobs[:5],
                   finished="aborted", reward=math.nan)
    group = groups_of(rl, 1, resume={stem.problem: [stem, stem, stem]})[stem.problem]
    assert [s.index for s in group] == [0, 1, 2], "three resumed and none fresh"
    assert all(s.tokens[:5] == stem.tokens and s.logprobs[:5] == stem.logprobs for s in group)
    assert len({tuple(s.tokens) for s in group}) == 3, "each draws noise of its own"
    assert all(len(s.tokens) <= 12 for s in group), "max_new counts the tokens that they begin with"
    assert not any(math.isnan(s.reward) for s in group)


def test_what_a_tool_said_has_no_gradient(rl):
    """the tokens of a tool's answer were trained as the model's own in three projects"""
    forced = rl.tok.encode("21514#")
    group = groups_of(rl, 1, resume={rl.problems[0].id: [forced, forced]})[rl.problems[0].id]
    assert all(s.tokens[:6] == forced and all(map(math.isnan, s.logprobs[:6])) for s in group)
    for s in group:
        s.advantage = 1.0
        del s.tokens[6:], s.logprobs[6:]                         # nothing is left but what was forced
    stats = update(rl, [group], make_loss(stages.with_algorithm(rl.config)))
    assert stats.get("tokens", 0) == 0
    assert all(p.grad is None or not p.grad.any() for p in rl.model.parameters())


def test_the_last_token_of_a_stop_string_is_in_the_text(rl):
    free = groups_of(rl, 1)[rl.problems[0].id][0]
    word = rl.tok.decode(free.tokens[3:5])
    rl.visits.clear()
    stopped = groups_of(rl, 1, stop_strings=[word])[rl.problems[0].id][0]
    assert stopped.finished == "stop" and completion(stopped, rl.tok).endswith(word)


def test_a_turn_is_not_scored(rl, monkeypatch):
    monkeypatch.setattr(rl.workers, "put", lambda *args: pytest.fail("it went to the workers"))
    group = groups_of(rl, 2, reward=False)
    assert len(group) == 2 and all(math.isnan(s.reward) for g in group.values() for s in g)


def test_an_evaluation_through_collect_moves_nothing(rl):
    """its noise is its own, and the rollout after it is the one that would have come without it"""
    first = groups_of(rl)
    rl.visits.clear()
    asked = groups_of(rl, seed=77)
    again = groups_of(rl, seed=77)
    assert rl.visits == {} and rl.spent == 0
    before = dict(rl.clock)
    groups_of(rl, seed=77)
    assert dict(rl.clock) == before, "no second of it is counted as rollout"
    after = groups_of(rl)
    tokens = [{p: [s.tokens for s in g] for p, g in groups.items()}
              for groups in (first, after, asked, again)]
    assert tokens[0] == tokens[1] and tokens[2] == tokens[3] != tokens[0]
    assert all(s.visit == 0 for g in asked.values() for s in g) and set(rl.visits.values()) == {1}


def test_other_lengths_than_the_configs(rl):
    assert all(len(s.tokens) <= 3 for g in groups_of(rl, max_new=3).values() for s in g)


# --------------------------------------------------------------------------------------------------
# rl


@dataclass
class Own:
    turns: int = 0


def test_a_checkpoint_keeps_what_is_marked_and_nothing_else(rl, tmp_path):
    """four loops packed and unpacked a tuple of thirteen names, each in its own order"""
    rl.own = Own()
    run = open_run(rl, sources=[__file__])
    for group in collect(rl, next_problems(rl, 4), 2):
        advantage(group, rl.config)
        update(rl, [group], make_loss(rl.config))
    step(rl)
    share_visits(rl)
    rl.step, rl.spent, rl.best, rl.own = 1, 99, 0.5, Own(7)
    rl.history.append(dict(reward=1.0))
    save(rl, run)
    run.close()
    made = setup(replace(rl.config, resume=True), reward="my.py:score", task="my.jsonl")
    made.own = Own()
    again = open_run(made, sources=[])
    again.close()
    made.workers.close()
    for name in ("step", "progress", "cursor", "spent", "visits", "best", "history", "own"):
        assert getattr(made, name) == getattr(rl, name), name
    assert made.cursor == 4 and made.progress == 1.0 and len(made.visits) == 4
    assert all(torch.equal(a, b) for a, b in zip(rl.model.parameters(), made.model.parameters()))
    assert next_problems(made, 4) != next_problems(replace(made, cursor=0), 4)


def test_a_run_is_refused_before_anything_is_written(tiny_base, capsys):
    """--top-p 2 was refused by the sampler, after the run folder had been made"""
    tiny_base(4)
    for words, flags in [("--top-p 2", dict(top_p=2.0)), ("--top-p 0", dict(top_p=0.0)),
                         ("--temperature 0", dict(temperature=0.0)), ("--tis 0.5", dict(tis=0.5))]:
        with pytest.raises(SystemExit) as stopped:
            setup(Settings(init="base", device="cpu", threads=1, **flags),
                  reward="my.py:score", task="my.jsonl")
        error = capsys.readouterr().err.strip().splitlines()
        assert stopped.value.code == 2 and len(error) == 1 and words in error[0] and not Path("runs").exists()


def test_several_arms_in_one_process(tiny_base):
    tiny_base(4)
    for _ in range(2):
        rl = setup(Settings(init="base", device="cpu", threads=1, max_new=4),
                   reward="my.py:score", task="my.jsonl")
        assert len(list(collect(rl, rl.problems, 2))) == 3
        workers = rl.workers.workers
        stages.close(rl)
        assert rl.model is None and all(w.proc.poll() is not None for w in workers)


def test_nested_clocks_count_once(monkeypatch):
    """idle seconds inside a rollout were subtracted by hand from what other clocks had gained meanwhile"""
    now = iter([0.0, 1.0, 3.0, 6.0])
    monkeypatch.setattr("common.metrics.time.perf_counter", lambda: next(now))
    clock = Clock()
    with clock("rollout"):
        with clock("idle"):
            pass
    assert clock["rollout"] == 1.0 + 3.0 and clock["idle"] == 2.0
    assert clock.read()["t_rollout"] == 4.0 and clock["rollout"] == 0.0


def test_paired_scores():
    """points over problems; the problems' own difficulty cancels, which the errors of two means do not"""
    before = dict(scores=dict(avg={"1": 0.0, "2": 0.5, "3": 1.0}))
    after = dict(scores=dict(avg={"1": 0.1, "2": 0.6, "3": 1.1}))
    gain, se = paired(after, before)
    assert math.isclose(gain, 10) and se < 1e-9
    assert json.loads(json.dumps(before))["scores"]["avg"]["1"] == 0.0, "the keys survive a file"


def test_a_samples_reward_may_be_nan_and_still_be_in(rl, monkeypatch):
    """a question without a label has the reward nan, which also means that it is not in yet"""
    jobs = []
    monkeypatch.setattr(rl.workers, "put", lambda key, *_: jobs.append(key))
    monkeypatch.setattr(rl.workers, "get", lambda block=False: [(jobs.pop(), math.nan, None)] if jobs else [])
    found = groups_of(rl, 2)
    assert len(found) == 2
    assert all(isinstance(s, Sample) and math.isnan(s.reward) for g in found.values() for s in g)


def test_a_run_that_diverged_ends_in_one_line(rl, capsys):
    """gradients that are not finite five times in a row ended nanorl.py, ttrl.py and opd.py in a traceback;
    train_gpt.py named the tuple of its last checkpoint"""
    (group,) = groups_of(rl, 1).values()
    rl.step = 7
    for _ in range(4):
        advantage(group, rl.config)
        stages.learn(rl, [spoiled(group)])
    with pytest.raises(SystemExit) as ended:
        stages.learn(rl, [spoiled(group)])
    error = capsys.readouterr().err.strip()
    assert ended.value.code == 2 and error.count("\n") == 0
    assert error.startswith("error: step 7: the gradient was not finite 5 steps in a row")
    assert "runs/rl stays as its last checkpoint left it" in error


def spoiled(group):
    for s in group:
        s.advantage = math.inf
    return group
