"""what every idea stands on: verdicts, shared starts, the bench; and the exact invariants of each idea"""
import json
import math
import multiprocessing
import os
import shutil
import statistics
from pathlib import Path

import pytest

from common import evidence
from common.evidence import Claim, Idea, begin, finish, inside, interval, picture, t95, verdict

ROOT = Path(__file__).resolve().parent.parent
CLAIM = Claim(paper="0000.00000", says="it helps", measured="accuracy against none", smallest=2.0)


# -----------------------------------------------------------------------------
# the verdict


def test_students_t_is_the_one_in_the_tables():
    """two-sided, 95%, by the number of seeds; one degree of freedom is Cauchy's, two have a closed form"""
    for n, known in ((2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (6, 2.571), (8, 2.365), (31, 2.042)):
        assert t95(n) == pytest.approx(known, abs=6e-4)
    assert inside(3.0, 1) == pytest.approx(2 / math.pi * math.atan(3))
    assert inside(3.0, 2) == pytest.approx(3 / math.sqrt(2 + 9))


@pytest.mark.parametrize("gains, word", [
    ([3.0, 4.0, 5.0], "holds here"),
    ([1.0, 1.1, 0.9], "holds here, but small"),
    ([-3.0, -4.0, -5.0], "reversed here"),
    ([0.1, -0.1, 0.0], "not seen here"),
    ([9.0, -1.0, 1.0], "undecided"),
    ([1.0, -1.0, 6.0, 0.0, 2.0], "undecided"),
    ([5.0], "undecided"),
])
def test_the_verdict_is_computed(gains, word):
    assert verdict(gains, 2.0) == word


def test_the_interval_is_of_the_mean_over_seeds():
    mean, half = interval([1.0, 2.0, 6.0])
    assert mean == 3.0
    assert half == pytest.approx(4.3027 * statistics.stdev([1, 2, 6]) / 3**0.5, rel=1e-4)
    assert interval([1.0]) == (1.0, math.inf)


# -----------------------------------------------------------------------------
# a trial


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trial_of(**flags):
    return begin(Idea(**flags), "ideas/thing.py", CLAIM, ("none", "thing"), 3)


def test_a_trial_leaves_a_picture_and_a_result(here, capsys):
    trial = trial_of(smoke=True)
    for arm in trial.arms:
        for x in range(3):
            trial.point(arm, x, 2 * x)
        trial.dot("other", arm, 1, 1)
    assert trial.bar.n == 6
    picture(trial, "step", "accuracy", other=("x", "y", "o"))
    finish(trial, (1.5, 0.5), {"none": {"avg": 0.25}, "thing": {"avg": 0.5}}, "as expected")
    folder = here / "runs/ideas/thing/smoke_0"
    row = json.loads((folder / "result.json").read_text())
    assert row["gain"] == 1.5 and row["table"]["thing"]["avg"] == 0.5 and row["claim"]["smallest"] == 2.0
    assert 1000 < (folder / "picture.png").stat().st_size <= evidence.MOST
    out = capsys.readouterr().out
    assert "it helps | here, seed 0: accuracy against none +1.50 +-0.50 points as expected" in out
    assert "  none   avg 0.25" in out


def test_a_gain_that_is_no_number_is_no_result(here, capsys):
    trial = trial_of(smoke=True)
    with pytest.raises(SystemExit):
        finish(trial, (math.nan, 0.0), {"none": {"avg": 0.25}})
    assert "not finite" in capsys.readouterr().err and not (trial.folder / "result.json").exists()


def test_a_new_call_forgets_the_result_of_the_last(here):
    """a call that is interrupted must not leave the number of an earlier one behind as its own"""
    folder = here / "runs/ideas/thing/seed_4"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text("{}")
    trial_of(seed=4)
    assert not (folder / "result.json").exists()


def test_one_process_is_enough(here, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as stopped:
        trial_of()
    assert stopped.value.code == 2 and "one process" in capsys.readouterr().err


@pytest.mark.parametrize("task, words, said", [
    ("countdow", "answer", "did you mean 'countdown'"),
    ("code", "answer canon", "no answer and no canon: why"),
])
def test_what_a_task_lacks_is_said_in_one_line(here, capsys, task, words, said):
    with pytest.raises(SystemExit) as stopped:
        evidence.needs(task, words, "why")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert not Path("runs").exists()
    assert evidence.needs("arith", "answer canon same gold reward", "why").name == "arith"


def test_a_curve_is_smoothed_by_its_neighbours():
    assert evidence.smooth([1.0] * 7) == [1.0] * 7
    assert evidence.smooth([0.0, 3.0, 0.0]) == [1.5, 1.0, 1.5]
    assert evidence.mean_curve([[(0, 1), (1, 2)], [(0, 3), (1, 6)]]) == [(0, 2), (1, 4)]


# -----------------------------------------------------------------------------
# shared starts


TINY = "--n-layer 1 --n-head 2 --n-kv-head 1 --head-dim 8 --d-model 16 --d-ff 24 --batch 2 --eval-docs 2"


@pytest.fixture
def recipes(here, monkeypatch):
    monkeypatch.setattr(evidence, "RECIPES", {"base": f"{TINY} --steps 4 --save-every 2",
                                              "formats": "--init {base} --data arith --steps 2 --batch 2"})
    return here


def test_a_start_is_trained_once_and_stands_on_another(recipes, monkeypatch):
    folder = Path(evidence.shared("formats", 3))
    assert folder == Path("runs/ideas/formats3")
    config = json.loads((folder / "config.json").read_text())
    assert config["init"] == "runs/ideas/base3" and config["seed"] == 3
    monkeypatch.setattr(evidence.train_gpt, "main", lambda argv: pytest.fail("trained again"))
    assert evidence.shared("formats", 3) == str(folder)


def test_a_start_that_was_interrupted_is_resumed(recipes, monkeypatch):
    """half a base has a checkpoint, too: it must not pass for a whole one"""
    evidence.shared("base", 0)
    whole = (recipes / "runs/ideas/base0/ckpt/step_4/model.safetensors").read_bytes()
    shutil.rmtree(recipes / "runs/ideas/base0/ckpt/step_4")
    assert evidence.newest("runs/ideas/base0")[1] == 2
    evidence.shared("base", 0)
    assert (recipes / "runs/ideas/base0/ckpt/step_4/model.safetensors").read_bytes() == whole


def test_a_start_of_another_recipe_is_refused(recipes, monkeypatch, capsys):
    evidence.shared("base", 0)
    monkeypatch.setitem(evidence.RECIPES, "base", f"{TINY} --steps 4 --save-every 2 --lr 1e-3")
    with pytest.raises(SystemExit):
        evidence.shared("base", 0)
    assert "made by another recipe (lr differ)" in capsys.readouterr().err


def wait_and_train(folder, order):
    os.chdir(folder)
    with evidence.only_one(Path("runs/base")):
        order.put("second")


def test_two_processes_that_want_the_same_start(here, capsys):
    """one trains, the other waits until it is done"""
    context = multiprocessing.get_context("spawn")
    order = context.Queue()
    with evidence.only_one(Path("runs/base")):
        other = context.Process(target=wait_and_train, args=(here, order))
        other.start()
        other.join(timeout=8)
        assert other.is_alive(), "it waits"
        order.put("first")
    other.join(timeout=60)
    assert [order.get(timeout=10), order.get(timeout=10)] == ["first", "second"]


@pytest.mark.parametrize("kind", ["base", "formats"])
def test_recipes_are_flags_of_train_gpt(kind):
    config = evidence.train_gpt.configure(evidence.RECIPES[kind].format(base="runs/ideas/base0").split())
    assert config.steps == (120 if kind == "formats" else 1500)
