"""test-time RL: votes, judges, lots, the metrics' identity, what labels may touch, the best
state, controls, bad input"""
import json
import math
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import stages
import ttrl
from common.axes import with_algorithm
from common.reward import Graders
from common.run import Run
from data import Problem
from ttrl import (Config, Own, configure, ended, idle, means, next_questions, record, remember, rewards,
                  subsample, votes)
from train_gpt import GPT


class Fractions:
    """answers after "=", equal as numbers"""
    name = "fractions"

    def answer(self, text):
        return text.partition("=")[2] if "=" in text else None

    def canon(self, answer):
        return Fraction(answer) if answer else answer

    def same(self, a, b):
        return self.canon(a) == self.canon(b)


def ballot(texts, logps=None, **kw):
    return votes(Fractions(), texts, logps or [-1.0] * len(texts), Config(**{"min_votes": 1, **kw}))


# -----------------------------------------------------------------------------
# votes


def test_nothing_never_wins():
    """a parser gave "" for every response that was cut before its answer, the vote counted it as
    a string like any other, it won, and whoever said nothing was rewarded for agreeing"""
    b = ballot(["cut", "cut", "=", "=7", "cut"])
    assert b.answer == "7" and b.rewards_M == [0, 0, 0, 1, 0]
    assert b.classes_M == [-1, -1, -1, 0, -1] and b.counts == [("7", 1)]


def test_equal_answers_are_one_vote():
    """votes counted by string, rewards by value: "1/2" and "0.5" split the vote that they would
    have won together, against a 3 that has fewer friends than the two of them"""
    b = ballot(["=1/2", "=3", "=0.5", "=3", "=2/4"])
    assert b.answer == "1/2" and b.rewards_M == [1, 0, 1, 0, 1] and b.counts == [("1/2", 3), ("3", 2)]


def test_a_tie_goes_to_the_first_vote_whatever_its_length():
    assert ballot(["=2", "=1", "=1", "=2"]).answer == "2"
    assert ballot(["no", "=1", "=2" + " " * 50, "=2", "=1"]).answer == "1"


def test_too_few_votes_are_skipped_and_counted():
    b = ballot(["=1", "=1", "no", "no"], min_votes=3)
    assert b.rewards_M is None and b.why == "too_few" and b.answer == "1", "who leads stays a metric"
    assert ballot(["=1", "=1", "=2", "no"], min_votes=3).rewards_M == [1, 1, 0, 0]
    none = ballot(["no", "no"])
    assert none.rewards_M is None and none.label == -1 and none.answer is None
    rows = [record(i, x, x.rewards_M, [0.0] * len(x.classes_M)) for i, x in enumerate([b, none])]
    assert means(rows)["too_few"] == 2 and means(rows)["answered"] == 0.25 and "reward_acc" not in means(rows)


def test_the_judges_differ_where_they_should():
    texts, logps = ["=1", "=1", "=1", "=2", "=2", "no"], [-3.0, -3.0, -3.0, -0.1, -0.1, 0.0]
    assert ballot(texts, logps).answer == "1"
    assert ballot(texts, logps, judge="weighted").answer == "2"
    assert ballot(texts, logps, judge="weighted").rewards_M == [0, 0, 0, 1, 1, 0]
    assert ballot(texts, logps, judge="soft").rewards_M == [0.6, 0.6, 0.6, 0.4, 0.4, 0]
    assert ballot(texts, logps, judge="abstain", abstain_entropy=1.0, abstain_share=0.7).why == "abstained"
    assert ballot(texts, logps, judge="abstain", abstain_entropy=0.3, abstain_share=0.1).why == "abstained"
    assert ballot(texts, logps, judge="abstain", abstain_entropy=0.5,
                  abstain_share=0.6).rewards_M == [1, 1, 1, 0, 0, 0]


def test_the_controls():
    b, truth = ballot(["=1", "=1", "=2", "no"]), [0.0, 0.0, 1.0, 0.0]
    by = {name: rewards(Config(reward=name), b, truth, (0, 3, 1))
          for name in ("majority", "label", "random", "has_answer")}
    assert by["majority"] == [1, 1, 0, 0] and by["label"] == truth and by["has_answer"] == [1, 1, 1, 0]
    coins = [rewards(Config(reward="random"), b, truth, (0, i, 1)) for i in range(500)]
    assert abs(np.mean(coins) - 0.5) < 0.05
    assert coins == [rewards(Config(reward="random"), b, truth, (0, i, 1)) for i in range(500)]


def test_the_lot_knows_no_length():
    """the first 32 of 64 were kept after another part of the program had sorted the 64 by length:
    the model trained on short answers only. Here responses that stand in order of length keep
    their mean length, at every address a lot of its own"""
    lengths = np.arange(64)
    kept = [subsample(64, 32, (0, problem, visit)) for problem in range(200) for visit in range(5)]
    assert all(len(set(k)) == 32 and k == sorted(k) for k in kept)
    assert abs(np.mean([lengths[k].mean() for k in kept]) - lengths.mean()) < 0.5
    assert np.abs(np.bincount(np.concatenate(kept), minlength=64) / 1000 - 0.5).max() < 0.08
    assert len({tuple(k) for k in kept}) == 1000
    assert subsample(64, 32, (0, 7, 2)) == subsample(64, 32, (0, 7, 2))
    assert subsample(8, 8, (0, 0, 0)) == list(range(8))


def test_reward_accuracy_is_an_identity():
    """a wrong label is not a wrong reward: it only misjudges those who agreed with it and those
    who were right. 300 random groups"""
    rng = np.random.default_rng(0)
    seen = set()
    for i in range(300):
        answers = rng.integers(-1, rng.integers(1, 7), 16)
        texts = ["no" if a < 0 else f"={a}" for a in answers]
        truth = [float(a == 1) for a in answers]
        b = ballot(texts)
        row = record(i, b, b.rewards_M, truth)
        if b.rewards_M is None:
            continue
        right = row["label_acc"] == 1
        seen.add(right)
        assert right == (b.answer == "1") and row["avg"] == np.mean(answers == 1)
        assert row["pass"] == (1 in answers)
        assert row["majority_ratio"] == max(np.mean(answers == a) for a in range(7))
        assert math.isclose(row["reward_acc"], 1 if right else 1 - row["majority_ratio"] - row["avg"])
    assert seen == {True, False}


# -----------------------------------------------------------------------------
# what only earlier visits know


def visit(memory, counts, right="1"):
    texts = [f"={a}" for a, n in counts.items() for _ in range(n)]
    b = ballot(texts)
    return remember(Fractions(), memory, record(0, b, b.rewards_M, [float(t == f"={right}") for t in texts]))


def test_flips_and_extinction():
    memory = {}
    first, second = visit(memory, {"2": 3, "1": 2, "9": 1}), visit(memory, {"2/1": 4, "1": 2})
    assert math.isnan(first["flips"]) and second["flips"] == 0 and second["extinct"] == 0
    third, fourth = visit(memory, {"5": 4, "2": 2}), visit(memory, {"1": 6})
    assert third["flips"] == 1 and third["extinct"] == 1
    assert fourth["flips"] == 1 and fourth["extinct"] == 0
    assert dict(memory[0]["pool"]) == {"2": 9, "1": 10, "9": 1, "5": 4}
    never = {}
    visit(never, {"2": 6})
    assert visit(never, {"3": 6})["extinct"] == 0, "what was never there cannot die out"


def test_agreement_with_all_votes_rises_when_it_sharpens_and_falls_when_it_drifts():
    """the majority ratio calls a collapse progress: all answers equal, ratio 1. All votes so far
    still know better"""
    memory = {}
    rows = [visit(memory, counts)
            for counts in ({"1": 6, "2": 3, "3": 1}, {"1": 8, "2": 2}, {"1": 9, "2": 1}, {"7": 10})]
    assert [row["consensus"] for row in rows] == [0.6, 0.8, 0.9, 0.0] and rows[-1]["majority_ratio"] == 1


def test_when_to_stop():
    config = Config(settled=0.02, patience=2, minutes=1.0)

    def why(own, config=config, seconds=0.0):
        return ended(SimpleNamespace(config=config, own=own, seconds=seconds))

    assert idle(dict(flips=0.01, vote_entropy=0.5), 0.5, config)
    assert not idle(dict(flips=0.01, vote_entropy=0.4), 0.5, config), "it still gathers votes"
    assert not idle(dict(flips=0.1, vote_entropy=0.5), 0.5, config)
    assert not idle(dict(vote_entropy=1.0), math.inf, config)
    assert "--patience 2" in why(Own(still=2))
    assert "--minutes 1" in why(Own(), seconds=60.0)
    assert why(Own(still=1), seconds=59.9) == "" == why(Own(still=9), Config(patience=0), seconds=1e9)
    assert "--max-new 48" in why(Own(mute=True))


def test_an_epoch_leaves_no_question_out_and_asks_none_twice_in_a_step():
    """thirty questions, eight a step: the last two questions of an epoch and six of the next
    would share a step, and a question among both would be lost; dropping the rest instead would
    never ask the last six of an order"""
    rl = SimpleNamespace(config=SimpleNamespace(seed=0, prompts=8),
                         problems=[data.Problem("", id=i) for i in range(30)], cursor=0)
    steps = []
    while rl.cursor < 60:
        steps.append([p.id for p in next_questions(rl)])
    assert [len(s) for s in steps] == [8, 8, 8, 6] * 2
    assert sorted(sum(steps[:4], [])) == sorted(sum(steps[4:], [])) == list(range(30))


def test_a_question_without_a_label_asks_no_grader():
    asked = []
    workers = SimpleNamespace(put=lambda key, p, text: asked.append(key),
                              get=lambda block=False: [(k, 1.0, None) for k in asked], failed={}, close=None)
    graders = Graders(workers)
    graders.put((0, 0), Problem("a"), "x")
    graders.put((1, 0), Problem("b", "7"), "x")
    (key, reward, _), (other, known, _) = graders.get(block=True)
    assert asked == [(1, 0)] and key == (0, 0) and math.isnan(reward) and (other, known) == ((1, 0), 1.0)


# -----------------------------------------------------------------------------
# the loop: a random tiny model, and answers that such a model gives. The task exists only here,
# so it is graded in this process


class Letters:
    """the answer is which third of the alphabet the first character is in, where it is printable"""
    name, mute = "letters", False

    def problems(self, split, n, seed):
        base = {"train": 0, "valid": 100, "test": 200}[split]
        return [Problem(f"question {base + i}:", str((base + i) % 3), i) for i in range(n)]

    def answer(self, text):
        return None if self.mute or not text.strip() else str(ord(text.strip()[0]) % 3)

    def canon(self, answer):
        return int(answer)

    def same(self, a, b):
        return int(a) == int(b)

    def reward(self, problem, text):
        return float(self.answer(text) == problem.gold)


class Here:
    """reward workers without processes"""

    def __init__(self, spec, workers=1):
        self.task, self.done, self.failed, self.log = data.load(spec), [], {}, print

    def put(self, key, problem, text):
        self.done.append((key, self.task.reward(problem, text), None))

    def get(self, block=False):
        done, self.done = self.done, []
        return done

    def forget(self):
        self.done = []

    close = forget


def letters_only(patch):
    load = data.load
    patch(data, "load", lambda name: Letters() if name == "letters" else load(name))
    patch(stages, "check", lambda spec: None)
    patch(stages, "Rewards", Here)


ARGV = ("--init base --task letters --device cpu --threads 1 --questions 10 "
        "--unseen-n 6 --prompts 4 --votes 8 --samples 4 --min-votes 2 --max-new 4 --passes 2 "
        "--eval-k 4 --row-tokens 128 --save-every 2 --lr 1e-2 --warmup 1 --patience 0 --scattered 0").split()


@pytest.fixture
def own(tiny_base, monkeypatch):
    tiny_base()
    letters_only(monkeypatch.setattr)
    return ARGV


def metrics(name="ttrl_majority"):
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return GPT.from_hf(folder).state_dict()


def equal(a, b):
    a, b = weights(a), weights(b)
    return all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.pictures
def test_votes_gather_and_everything_is_said(own, capsys):
    ttrl.main([*own, "--passes", "12", "--save-every", "50"])
    m = metrics()
    steps = [row for row in m if "majority_ratio" in row]
    assert len(steps) == 36
    assert (np.mean([s["majority_ratio"] for s in steps[-3:]])
            > 1.2 * np.mean([s["majority_ratio"] for s in steps[:3]]))
    for key in ("step reward zero_var truncated length entropy sampler_kl "
                "t_rollout majority_ratio label_acc reward_acc avg pass answered "
                "vote_entropy flips extinct consensus too_few abstained spent seconds").split():
        assert key in steps[-1], key
    assert max(s["sampler_max"] for s in steps) < 1e-5
    for where in ("trained", "unseen"):
        for key in ("avg", "avg_se", "maj", "maj_se", "pass@4", "pass@4_se", "truncated", "no_answer"):
            assert f"eval/{where}/{key}" in m[0] and f"eval/{where}/{key}" in m[-1]
    out = capsys.readouterr().out
    assert "does avg@4 after pass maj@4 before? " in out and "(paired)" in out
    result = json.loads(Path("runs/ttrl_majority/result.json").read_text())
    before, after = result["trained"]
    assert math.isclose(result["gain"]["trained"][0], after["avg"] - before["avg"], abs_tol=1e-9)
    assert len(before["scores"]["avg"]) == 10
    assert Path("runs/ttrl_majority/curves.png").stat().st_size > 1000
    samples = [json.loads(line) for line in Path("runs/ttrl_majority/samples.jsonl").read_text().splitlines()]
    assert {s["reward"] for s in samples} == {0.0, 1.0}
    assert {s["advantage"] is None for s in samples} == {True, False}


def test_labels_do_not_touch_the_weights(own):
    """the same questions with right labels, wrong ones and none: equal weights, unless the
    ceiling is asked for"""
    for name, gold in (("right", lambda p: p.gold), ("wrong", lambda p: "2"), ("none", lambda p: None)):
        rows = [{"prompt": p.prompt, "gold": gold(p)} for p in Letters().problems("train", 10, 0)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        ttrl.main([*own, "--data", f"{name}.jsonl", "--name", name])
    assert equal("runs/right/ckpt/step_6", "runs/wrong/ckpt/step_6")
    assert equal("runs/right/ckpt/step_6", "runs/none/ckpt/step_6")
    assert not equal("runs/right/ckpt/step_6", "base")
    assert "label_acc" not in metrics("none")[1] and "majority_ratio" in metrics("none")[1]

    def label_acc(name):
        return [row["label_acc"] for row in metrics(name)[1:-1]]

    assert label_acc("right") != label_acc("wrong")
    assert not any(k.startswith("eval/trained") for k in metrics("none")[-1])
    assert "eval/unseen/avg" in metrics("none")[-1]
    for name in ("right", "wrong"):
        ttrl.main([*own, "--data", f"{name}.jsonl", "--name", f"{name}_label",
                   "--reward", "label", "--unseen-n", "0"])
    assert not equal("runs/right_label/ckpt/step_6", "runs/wrong_label/ckpt/step_6")


def test_a_constant_reward_changes_no_weight(own, monkeypatch):
    monkeypatch.setattr(ttrl, "rewards", lambda config, ballot, truth_M, address: [1.0] * len(truth_M))
    ttrl.main([*own, "--passes", "1"])
    assert equal("runs/ttrl_majority/ckpt/step_3", "base")


def test_the_controls_stand_beside_each_other(own, capsys):
    for reward in ("label", "random", "has_answer"):
        ttrl.main([*own, "--reward", reward, "--passes", "1"])
    ttrl.main([*own, "--reward", "random", "--passes", "1", "--lr", "1e-3", "--name", "another"])
    capsys.readouterr()
    ttrl.main([*own, "--passes", "1"])
    table = capsys.readouterr().out.partition("beside each other")[2].splitlines()[1:]
    assert [line.split()[0] for line in table] == ["has_answer", "label", "majority",
                                                   "random"], "the other learning rate is no control"
    assert all("trained" in line and "unseen" in line and "+-" in line for line in table)


def stop_after(step, monkeypatch):
    calls = []
    monkeypatch.setattr(Run, "stopping", lambda self: calls.append(1) or len(calls) == step)


def test_resumed_equals_never_stopped_bit_for_bit(own, monkeypatch):
    """in the middle of an epoch: weights, every number that is not a time, what earlier visits
    know, and the state kept"""
    ttrl.main([*own, "--name", "whole"])
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        with pytest.raises(SystemExit) as stopped:
            ttrl.main([*own, "--name", "parts"])
    assert stopped.value.code == 130
    ttrl.main([*own, "--name", "parts", "--resume"])
    assert equal("runs/whole/ckpt/step_6", "runs/parts/ckpt/step_6")

    def timeless(rows):
        return [{k: v for k, v in m.items()
                 if not k.startswith("t_") and "tok_s" not in k and k != "seconds"} for m in rows]

    assert timeless(metrics("whole")) == timeless(metrics("parts"))
    one, two = (json.loads(Path(f"runs/{name}/result.json").read_text()) for name in ("whole", "parts"))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items()
                                                                if k != "seconds"}
    (best,) = Path("runs/whole/best").iterdir()
    assert equal(best, Path("runs/parts/best") / best.name)


def test_a_run_that_died_before_its_first_checkpoint_begins_again(own, monkeypatch):
    """the numbers before the first step were written twice: once by the run that died, once by
    the one that went on"""
    own = [*own, "--passes", "1", "--name", "again"]
    with monkeypatch.context() as patch:
        patch.setattr(ttrl, "collect", lambda *a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ttrl.main(own)
    ttrl.main([*own, "--resume"])
    assert [m["step"] for m in metrics("again")].count(0) == 1


def test_the_state_kept_is_the_one_that_agreed_most(own, monkeypatch, capsys):
    """the second of three epochs agrees most: its weights are the ones evaluated, and the only ones kept"""
    agreement, step = iter([0.5, 0.9, 0.4]), means
    monkeypatch.setattr(ttrl, "means", lambda rows: step(
        rows) | (dict(consensus=next(agreement)) if len(rows) == 10 else {}))
    ttrl.main([*own, "--passes", "3", "--save-every", "6"])
    assert [p.name for p in Path("runs/ttrl_majority/best").iterdir()] == ["step_6"]
    assert equal("runs/ttrl_majority/best/step_6", "runs/ttrl_majority/ckpt/step_6")
    assert not equal("runs/ttrl_majority/best/step_6", "runs/ttrl_majority/ckpt/step_9")
    assert "the state kept after step 6 of 9" in capsys.readouterr().out


def test_it_stops_itself(own, capsys):
    ttrl.main([*own, "--passes", "9", "--minutes", "1e-5", "--name", "short"])
    assert "stopped after step 1: --minutes" in capsys.readouterr().out
    assert Path("runs/short/result.json").exists()
    ttrl.main([*own, "--passes", "9", "--patience", "2", "--settled", "1",
               "--lr", "1e-9", "--name", "settled"])
    out = capsys.readouterr().out
    assert "for --patience 2 passes" in out and metrics("settled")[-1]["step"] < 27


def test_a_model_that_never_answers_is_told_what_to_change(own, capsys, monkeypatch):
    monkeypatch.setattr(Letters, "mute", True)
    ttrl.main([*own, "--passes", "5"])
    out = capsys.readouterr().out
    assert "no question had --min-votes 2 readable answers" in out and "--max-new 4" in out
    assert metrics()[-1]["step"] == 3 and metrics()[1]["too_few"] == 4
    assert equal("runs/ttrl_majority/ckpt/step_3", "base")


SCRIPT = """
import sys
from tests.test_ttrl import letters_only
import ttrl
letters_only(setattr)
ttrl.main(sys.argv[1:])
"""


def test_two_ranks_equal_one(own, ranks):
    argv = [*own, "--passes", "1"]
    ranks(2, SCRIPT, *argv, "--name", "two")
    ttrl.main([*argv, "--name", "one"])
    one, two, base = weights("runs/one/ckpt/step_3"), weights("runs/two/ckpt/step_3"), weights("base")
    assert all(torch.allclose(one[k], two[k], atol=5e-5) for k in one)
    assert any(not torch.equal(one[k], base[k]) for k in one)
    for a, b in zip(metrics("one"), metrics("two")):
        for key in ("reward", "majority_ratio", "reward_acc", "consensus",
                    "too_few", "eval/trained/avg", "eval/unseen/maj"):
            assert (key in a) == (key in b) and (key not in a
                                                 or math.isclose(a[key], b[key], rel_tol=1e-6)), key


# -----------------------------------------------------------------------------
# settings and bad input


@pytest.mark.parametrize("name, n, passes", [("aime", 30, 80), ("amc", 83, 30), ("math500", 500, 10)])
def test_presets_are_the_papers(name, n, passes):
    config = with_algorithm(configure(["--preset", name, "--init", "DIR"]))
    assert (config.task, config.questions, config.passes) == (f"{name}:ttrl", n, passes)
    assert (config.votes, config.samples, config.prompts, config.lr,
            config.max_new) == (64, 32, 8, 5e-7, 3072)
    assert (config.temperature, config.eval_temperature, config.eval_top_p,
            config.eval_k) == (1.0, 0.6, 0.95, 16)
    assert (config.algo, config.baseline, config.aggregate, config.reward,
            config.data) == ("grpo", "group", "token", "majority", "")
    assert configure(["--preset", name, "--init", "DIR", "--lr", "1e-6"]).lr == 1e-6


@pytest.mark.parametrize("argv, words", [
    (["--task", "bare"], "has no answer()"),
    (["--data", "empty.jsonl"], "empty.jsonl is empty"),
    (["--data", "nothere.jsonl"], "nothere.jsonl"),
    (["--task", "void"], "no questions in the test split of void"),
    (["--questions", "0"], "--questions"),
    (["--samples", "9"], "--votes 8 is below --samples 9"),
    (["--samples", "1"], "--samples is 1"),
    (["--min-votes", "9"], "--min-votes 9 is above"),
    (["--tail-batching", "race"], "--tail-batching is no flag"),
    (["--reward", "lable"], "did you mean label?"),
    (["--algo", "grpoo"], "did you mean grpo?"),
    (["--aggregate", "tokens"], "did you mean token?"),
    (["--data", "bare.jsonl", "--reward", "label"], "have no gold"),
    (["--preset", "aime", "--init", "runs/base"], "--preset aime needs a model"),
    (["--row-tokens", "8"], "--row-tokens 8"),
    (["--init", "nowhere"], "nowhere"),
])
def test_bad_input_is_one_line(own, capsys, monkeypatch, argv, words):
    Path("empty.jsonl").write_text("")
    Path("bare.jsonl").write_text('{"prompt": "a"}\n')
    bare, void, load = SimpleNamespace(name="bare"), Letters(), data.load
    void.problems = lambda split, n, seed: []
    monkeypatch.setattr(data, "load", lambda name: {"bare": bare, "void": void}.get(name) or load(name))
    with pytest.raises(SystemExit) as stopped:
        ttrl.main([*own, *argv])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0], error
    assert not Path("runs").exists(), "nothing half-written"


def test_scattered_votes_teach_nothing(own, capsys):
    """A base that had not learned to add was asked to learn from its own votes: 59% of its majorities
    were wrong, and after test-time RL 98% of the votes agreed, most of them wrongly."""
    ttrl.main([*own, "--passes", "5", "--scattered", "0.99"])
    out = capsys.readouterr().out
    assert "the votes are scattered" in out and "--scattered 0.99 wants more" in out
    assert metrics()[-1]["step"] == 3, "one pass of ten questions, four per step"
    assert equal("runs/ttrl_majority/ckpt/step_3", "base")


def test_true_labels_learn_from_scattered_votes(own, capsys):
    ttrl.main([*own, "--passes", "2", "--scattered", "0.99", "--reward", "label"])
    assert "scattered" not in capsys.readouterr().out
    assert not equal("runs/ttrl_label/ckpt/step_6", "base")
