"""what every idea stands on: verdicts, shared starts, the bench; and the exact invariants of each idea"""
import importlib
import json
import math
import multiprocessing
import os
import runpy
import shutil
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import algos
import data
from bench import ideas
from common import evidence
from common.evidence import Claim, Idea, begin, finish, inside, interval, picture, t95, verdict
from ideas import darling, dupo, order, relex
from rollout import Sample
from stages import Settings, close, collect, learn, next_problems, setup

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


def wait_and_train(folder, said, ready):
    os.chdir(folder)
    said.put("here")
    with evidence.only_one(Path("runs/base")):
        said.put(ready.is_set())


def test_two_processes_that_want_the_same_start(here, capsys):
    """one trains, the other waits until it is done. (Two processes once wrote "first" and "second" into a
    queue, whose order nobody promises: on a busy machine the second came first.)"""
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    ready = context.Event()
    with evidence.only_one(Path("runs/base")):
        other = context.Process(target=wait_and_train, args=(here, said, ready))
        other.start()
        assert said.get(timeout=120) == "here"
        other.join(timeout=1)
        assert other.is_alive(), "it waits"
        ready.set()
    other.join(timeout=60)
    assert said.get(timeout=10) is True


@pytest.mark.parametrize("kind", ["base", "formats"])
def test_recipes_are_flags_of_train_gpt(kind):
    config = evidence.train_gpt.configure(evidence.RECIPES[kind].format(base="runs/ideas/base0").split())
    assert config.steps == (120 if kind == "formats" else evidence.train_gpt.Config.steps)


# -----------------------------------------------------------------------------
# the bench: runs what is missing, computes the verdict, writes records and the table


FAKE = '''
import json, sys
from pathlib import Path
seed = int(sys.argv[sys.argv.index("--seed") + 1])
if Path(f"stop{seed}").exists():
    print("something is wrong")
    sys.exit(3)
gain = GAINS[seed]
folder = Path(f"runs/ideas/NAME/seed_{seed}")
folder.mkdir(parents=True, exist_ok=True)
row = dict(idea="NAME", seed=seed, claim=CLAIM, gain=gain, se=0.5, table={"none": {"avg": 0.5}}, note="",
           minutes=1.5, gflops=50.0, commit="abc", smoke=False, source="text", changed=[])
(folder / "result.json").write_text(json.dumps(row))
points = dict(labels={"": ["step", "accuracy"]}, panels={"": {"none": [[0, 0.1], [1, 0.1 * gain]]}})
(folder / "points.json").write_text(json.dumps(points))
with open("made.txt", "a") as f:
    f.write(f"NAME {seed}\\n")
'''
HARNESS = Claim(paper="", says="RL beats the base", measured="accuracy against before", smallest=10.0,
                harness=True)


@pytest.fixture
def fakes(here, monkeypatch):
    """two ideas in a folder of their own: one is decided after three seeds, the other after five"""
    claims = {"harness": HARNESS, "thing": CLAIM}
    gains = {"harness": [20.0, 21.0, 22.0], "thing": [9.0, -1.0, 1.0, 5.0, 6.0]}
    (here / "ideas").mkdir()
    for name in claims:
        text = FAKE.replace("NAME", name).replace("CLAIM", repr(vars(claims[name])))
        (here / f"ideas/{name}.py").write_text(text.replace("GAINS", repr(gains[name])))
    (here / "ideas/__init__.py").touch()
    (here / "ideas/README.md").write_text(f"# Ideas\n\n{ideas.BEGIN}\n{ideas.END}\n\nafter\n")
    monkeypatch.setattr(ideas, "ROOT", here)
    monkeypatch.setattr(ideas, "RECORDS", here / "records/ideas")
    monkeypatch.setattr(ideas, "README", here / "ideas/README.md")
    monkeypatch.setattr(ideas, "claim_of", claims.get)
    monkeypatch.setattr(ideas, "source", lambda name: "text")
    return claims


def made():
    return sorted(Path("made.txt").read_text().split("\n"))[1:]


def checked(capsys):
    with pytest.raises(SystemExit) as stopped:
        ideas.main(["--check"])
    return stopped.value.code, capsys.readouterr().out


def test_bench_runs_what_is_missing_and_two_more_where_it_is_undecided(fakes, capsys):
    numbers = ideas.main([])
    assert made() == [f"harness {i}" for i in range(3)] + [f"thing {i}" for i in range(5)]
    assert numbers["verdicts"] == dict(harness="holds here", thing="undecided") and not numbers["failed"]
    record = json.loads(Path("records/ideas/thing.json").read_text())
    assert record["verdict"] == "undecided" and [row["gain"] for row in record["seeds"]] == [9, -1, 1, 5, 6]
    assert {"minutes", "gflops", "commit", "table", "se"} <= set(record["seeds"][0])
    assert Path("records/ideas/thing.png").stat().st_size > 1000
    table = Path("ideas/README.md").read_text()
    assert "| **holds here** |" in table and "1.5 CPU minutes per seed" in table
    assert "accuracy against none: +4 +-5" in table and 'src="../records/ideas/thing.png"' in table
    assert "2 files, 2 with a record: 1 " in table and "1 undecided" in table and "1 holds here" in table
    assert table.index("### Is there anything to see?") < table.index("### More") < table.index("[thing]"), (
        "an idea that is in no group comes last")
    assert table.endswith("\n\nafter\n"), "what stands around the table stays"

    ideas.main(["--seeds", "5", "--names", "thing"])
    capsys.readouterr()
    ideas.main([])
    assert len(made()) == 8 and "runs to make" not in capsys.readouterr().out, "nothing is run twice"
    assert checked(capsys) == (0, "2 records: verdicts, claims, pictures and the table agree\n")
    Path("records/ideas/thing.json").unlink()
    ideas.write_table()
    assert "| no record yet | **[thing]" in Path("ideas/README.md").read_text()
    code, out = checked(capsys)
    assert code == 0 and out.endswith("the table agree; not measured yet: thing\n")


def test_bench_continues_after_a_failure(fakes, capsys):
    Path("stop1").touch()
    numbers = ideas.main(["--names", "harness"])
    assert not numbers["verdicts"] and numbers["failed"] == 1 and made() == ["harness 0", "harness 2"]
    assert "harness, seed 1: failed with 3, see runs/ideas/harness/seed_1.txt" in capsys.readouterr().out
    assert Path("runs/ideas/harness/seed_1.txt").read_text() == "something is wrong\n"
    assert not Path("records/ideas/harness.json").exists(), "a record has its three seeds"
    Path("stop1").unlink()
    ideas.main(["--names", "harness"])
    assert made() == ["harness 0", "harness 1", "harness 2"]


def raise_next(errors):
    for error in errors:
        raise error


def test_bench_that_is_stopped_ends_its_runs(fakes, monkeypatch, capsys):
    """Ctrl-C while two runs are on their way: both are told, and nothing is left running"""
    Path("ideas/thing.py").write_text("import time\ntime.sleep(600)\n")
    begun = []
    begin_one = ideas.begin
    monkeypatch.setattr(ideas, "begin", lambda *job: begun.append(begin_one(*job)) or begun[-1])
    interrupts = iter([KeyboardInterrupt])
    monkeypatch.setattr(ideas.time, "sleep", lambda s: raise_next(interrupts))
    with pytest.raises(SystemExit) as stopped:
        ideas.main(["--names", "thing"])
    assert stopped.value.code == 130 and "the same command continues" in capsys.readouterr().out
    assert len(begun) == 2 and all(process.poll() is not None for process, *_ in begun)


def test_a_result_of_another_claim_is_run_again(fakes):
    ideas.main(["--names", "harness"])
    fakes["harness"].smallest = 11.0
    try:
        assert ideas.result("harness", 0) is None
    finally:
        fakes["harness"].smallest = 10.0
    assert ideas.result("harness", 0)["gain"] == 20.0


@pytest.mark.parametrize("other", [{"changed": ["steps"]}, {"source": "another"}])
def test_a_result_of_other_flags_or_of_another_text_is_no_seed(fakes, other):
    """`python -m ideas.thing --steps 5` for a look, or an edit of the file: its number stood as seed 0 of the
    record from then on."""
    ideas.main(["--names", "harness"])
    path = Path("runs/ideas/harness/seed_0/result.json")
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | other))
    assert ideas.result("harness", 0) is None and ideas.result("harness", 1)["gain"] == 21.0


def test_an_unknown_idea_is_named(fakes, capsys):
    with pytest.raises(SystemExit) as stopped:
        ideas.main(["--names", "thin"])
    assert stopped.value.code == 2 and "did you mean 'thing'" in capsys.readouterr().err


@pytest.mark.parametrize("what, said", [
    ("claim", "the CLAIM of ideas/thing.py was changed after its record"),
    ("verdict", "it says 'holds here', its seeds say 'undecided'"),
    ("gain", "it says 'undecided', its seeds say 'holds here'"),
    ("seeds", "undecided: 2 more seeds are to be run"),
    ("two", "2 seeds; 3 at least"),
    ("chosen", "its seeds are [0, 1, 2, 3, 9]: 0, 1, 2, ..., each once"),
    ("picture", "no thing.png beside it"),
    ("table", "the table of ideas/README.md is not what the records say"),
    ("gone", "there is no ideas/thing.py"),
    ("none", "what can be seen in points is not known: no record of the harness harness"),
    ("harness", "its smallest gain, 2 points, is not below what harness shows here, 1 at least"),
])
def test_check_finds_what_was_changed(fakes, capsys, monkeypatch, what, said):
    def run_here(jobs):
        for name, seed in jobs:
            monkeypatch.setattr(sys, "argv", ["x", "--seed", str(seed)])
            runpy.run_path(f"ideas/{name}.py")
        return []

    monkeypatch.setattr(ideas, "run_all", run_here)              # without a process for each
    ideas.main([])
    path = Path("records/ideas/thing.json")
    record = json.loads(path.read_text())
    if what == "claim":
        fakes["thing"] = Claim(**{**vars(CLAIM), "smallest": 1.0})
    if what == "verdict":
        record["verdict"] = "holds here"
    if what == "gain":
        for row in record["seeds"]:
            row["gain"] = 4.0 + row["seed"]
    if what == "seeds":
        record["seeds"] = record["seeds"][:3]
    if what == "chosen":
        record["seeds"][4]["seed"] = 9
    if what == "two":
        record["seeds"] = record["seeds"][:2]
    path.write_text(json.dumps(record))
    if what == "picture":
        Path("records/ideas/thing.png").unlink()
    if what == "table":
        Path("ideas/README.md").write_text(Path("ideas/README.md").read_text().replace("+4 +-", "+40 +-"))
    if what == "none":
        Path("records/ideas/harness.json").unlink()
    if what == "gone":
        Path("ideas/thing.py").unlink()
    if what == "harness":
        path = Path("records/ideas/harness.json")
        harness = json.loads(path.read_text())
        for row in harness["seeds"]:
            row["gain"] = 1.0
        harness["verdict"] = "holds here, but small"
        path.write_text(json.dumps(harness))
    code, out = checked(capsys)
    assert code == 1 and said in out, out


def test_needs_scale_is_said_by_the_claim():
    claim = Claim(paper="x", says="x", measured="x", smallest=1.0, scale="the base solves 0 of 400")
    assert ideas.word(claim, [5.0, 5.1, 5.2]) == "needs scale"


# -----------------------------------------------------------------------------
# the ideas that there are


NAMES = ideas.known()


def test_what_is_recorded_here_is_true():
    """every verdict computed again from its seeds, the claims unchanged, the table as it would be printed"""
    assert ideas.faults() == []
    assert sum(bool(ideas.claim_of(name).scale) for name in NAMES) <= 6, "three per issue at most"


@pytest.mark.parametrize("name", NAMES)
def test_an_idea_is_short_and_says_what_it_is(name):
    text = (ROOT / f"ideas/{name}.py").read_text()
    claim = ideas.claim_of(name)
    assert len(text.splitlines()) <= 200 and text.startswith(f'"""\n{name}.py: ')
    assert claim.paper in text.split('"""')[1] and f"python -m ideas.{name}" in text.split('"""')[1]
    assert claim.smallest > 0 and claim.says and claim.measured


@pytest.mark.parametrize("name", NAMES)
def test_an_idea_runs(name, here):
    """two steps of each arm on a random tiny model, with everything that a whole run leaves"""
    module = importlib.import_module(f"ideas.{name}")
    row = module.main(["--smoke"])
    assert math.isfinite(row["gain"]) and len(row["table"]) >= 3
    folder = here / f"runs/ideas/{name}/smoke_0"
    assert 1000 < (folder / "picture.png").stat().st_size <= evidence.MOST
    assert json.loads((folder / "result.json").read_text())["smoke"]


@pytest.mark.parametrize("name, words, said", [
    ("darling", "--task code", "--task code has no answer and no canon and no same: whoever pays"),
    ("relex", "--task arith", "--task arith has no solution: the path of fine-tuning imitates one"),
    ("relex", "--steps 15", "--steps 15: give a multiple of --every 2"),
    ("dupo", "--tokens 0", "--tokens is 0: give at least 1"),
    ("order", "--task countdwn", "did you mean 'countdown'"),
])
def test_bad_input_is_one_line_before_anything_is_trained(name, words, said, here, capsys, monkeypatch):
    monkeypatch.setattr(evidence, "shared", lambda *args: pytest.fail("a start was trained"))
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"ideas.{name}").main(words.split())
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and said in error and error.count("\n") == 1
    assert not Path("runs").exists(), "nothing half-written"


# --- darling


class Digits:
    """the answer is the first digit; 1 and 7 are the same to it"""
    def answer(self, text):
        return next((c for c in text if c.isdigit()), None)

    def canon(self, answer):
        return "1" if answer == "7" else answer

    def same(self, a, b):
        return self.canon(a) == self.canon(b)


def group_of(texts, tok, rewards=None):
    rewards = rewards or [1.0] * len(texts)
    return [Sample([], tok.encode(text), [0.0] * len(text), "length", 0, i, 0, reward=r)
            for i, (text, r) in enumerate(zip(texts, rewards))]


@pytest.fixture
def rl():
    return SimpleNamespace(task=Digits(), tok=data.tokenizer("chars"))


def test_darling_pays_for_what_others_have_not(rl):
    """three times one answer, two others, one without: as the picture in darling.py"""
    group = group_of(["1", "7", "1x", "2", "3", "x"], rl.tok)
    assert np.allclose(darling.rarity(group, rl), [3 / 5] * 3 + [1, 1, 1])
    assert darling.ways(group_of(["1", "7", "2", "x"], rl.tok, [1, 1, 0, 0]), rl) == 1


def test_darling_gives_nothing_where_all_agree_and_is_plain_where_none_do(rl):
    assert not darling.rarity(group_of(["1"] * 4, rl.tok), rl).any()
    assert (darling.rarity(group_of("1234", rl.tok), rl) == 1).all()


def test_darling_raises_what_is_rare_and_right(rl):
    """four times the same right answer, one other, three wrong: all right ones go up, the rare one most; the
    control pays the same sum to others"""
    group = group_of(["1"] * 4 + ["2", "x", "x", "x"], rl.tok)
    paid = np.array([1.0] * 5 + [0] * 3) * darling.rarity(group, rl)
    A = algos.BASELINES["mean"](paid)
    assert A[4] > 2 * A[0] > 0 > A[7]
    rng = np.random.default_rng(1)
    for s, right in zip(group, [1.0] * 5 + [0.0] * 3):
        s.reward = right
    dealt = darling.paid(group, "shuffled", rl, rng)
    own = darling.paid(group, "darling", rl, rng)
    assert sorted(dealt[:5]) == sorted(own[:5]) and (dealt[5:] == own[5:]).all(), "among the right ones"
    assert (darling.paid(group, "plain", rl, rng) == 1).all()


# --- relex


def straight_path():
    """two tensors that move on a line each, at a constant speed, and one that never moves"""
    g = torch.Generator().manual_seed(0)
    start = {name: torch.randn(4, 3, generator=g) for name in ("a", "b", "still")}
    way = {"a": torch.randn(4, 3, generator=g), "b": torch.randn(4, 3, generator=g)}
    way["still"] = torch.zeros(4, 3)
    return {step: {name: w + step / 2 * way[name] for name, w in start.items()} for step in range(0, 21, 2)}


def test_relex_finds_the_end_of_a_straight_path():
    """what a run on a line will be at step 20 is known from its first three checkpoints, exactly"""
    path = straight_path()
    fit = relex.Rank1(path, last=6)
    for name, w in fit.at(20).items():
        assert torch.allclose(w, path[20][name], atol=1e-5)
    assert fit.fits["a"][1] == pytest.approx(1) and fit.fits["a"][4] == pytest.approx(1)
    assert torch.equal(fit.at(20)["still"], path[0]["still"]) and fit.fits["still"][1] == 0.0
    for first in (0, 4):
        for name, w in relex.extended(path, first, 6, 20).items():
            assert torch.allclose(w, path[20][name], atol=1e-5), "there the controls are as good"


def test_relex_by_hand():
    """moves (3, 4), (6, 8), (9, 12) and a little across: the direction is (0.6, 0.8), 5 further each step"""
    start = torch.zeros(2)
    path = {step: {"w": torch.tensor([3.0, 4.0]) * step} for step in (0, 1, 2, 3)}
    path[0] = {"w": start}
    v, explained, slope, intercept, r2 = relex.Rank1(path).fits["w"]
    assert torch.allclose(v.abs(), torch.tensor([0.6, 0.8], dtype=torch.float64))
    assert abs(slope) == pytest.approx(5) and intercept == pytest.approx(0, abs=1e-9)
    assert explained == pytest.approx(1) and r2 == pytest.approx(1)
    path[3]["w"] = torch.tensor([9.0, 12.0]) + torch.tensor([-4.0, 3.0])     # 5 across, after 15 along
    v, explained, *_ = relex.Rank1(path).fits["w"]
    moves = np.array([[3, 4], [6, 8], [5, 15]])
    values = np.linalg.svd(moves, compute_uv=False) ** 2
    assert explained == pytest.approx(values[0] / values.sum())


def test_relex_keeps_out_the_steps_before_the_first():
    """a path that bends after step 4: fitted from there on it is straight again"""
    path = straight_path()
    for step in range(6, 21, 2):
        path[step] = {name: path[0][name] + (path[2][name] - path[0][name]) * (step - 3) for name in path[0]}
    late = relex.Rank1(path, first=6, last=12)
    assert torch.allclose(late.at(20)["a"], path[20]["a"], atol=1e-4)
    assert not torch.allclose(relex.Rank1(path, last=12).at(20)["a"], path[20]["a"], atol=1e-2)


def test_relex_goes_as_far_at_random():
    path = straight_path()
    fit = relex.Rank1(path)
    there = relex.random_direction(fit, 20, 0)
    for name in path[0]:
        length = (fit.at(20)[name] - path[0][name]).norm()
        assert torch.allclose((there[name] - path[0][name]).norm(), length, rtol=1e-4)
    assert not torch.allclose(there["a"], fit.at(20)["a"], atol=0.1)


# --- what a batch is made of: dupo, order


@pytest.fixture
def tiny(here):
    """tiny() -> the same small RL run each time, and a rollout of it with advantages"""
    runs = []

    def make():
        config = Settings(init=evidence.random_model("base", here), steps=4, prompts=6, n=4, max_new=8,
                          lr=1e-2, warmup=1, decay=0.0, workers=1, threads=1)
        rl = setup(config, reward=evidence.easy_reward(here))
        runs.append(rl)
        groups = list(collect(rl, next_problems(rl, 6), 4))
        for group in groups:
            algos.advantage(group, rl.config)
        return rl, groups
    yield make
    for rl in runs:
        close(rl)


def weights_of(rl):
    return torch.cat([p.detach().flatten() for p in rl.model.parameters()])


def test_dupo_repeats_none_twice_before_all_were_repeated_once():
    groups = [[Sample([1], [2], [0.0], "stop", i, 0, 0, advantage=1.0)] for i in range(3)]
    rng = np.random.default_rng(0)
    for count, most in ((3, 1), (5, 2), (6, 2), (8, 3)):
        found = dupo.duplicated(groups, count, rng)
        times = [sum(g[0].problem == i for g in found) for i in range(3)]
        assert len(found) == count and max(times) == most and min(times) >= most - 1
        assert len({algos.key(g[0]) for g in found}) == count, "each copy is a sample of its own"
    assert dupo.duplicated([], 4, rng) == []


def test_dupo_is_dropping_where_every_group_is_repeated_as_often(tiny):
    """the copies of all groups add the same gradient again, and the division takes it back"""
    ends = []
    for times in (1, 2):
        rl, groups = tiny()
        groups = [g for g in groups if dupo.teaches(g)]
        assert len(groups) >= 2
        learn(rl, dupo.duplicated(groups, times * len(groups), np.random.default_rng(0)))
        ends.append(weights_of(rl))
    assert torch.allclose(*ends, atol=1e-5)


def test_order_is_nothing_to_a_single_update(tiny, monkeypatch):
    """and something to two: the second begins where the first one left the model"""
    monkeypatch.setattr(order, "ROW", 64)
    ends = {}
    for updates in (1, 2):
        for arm in order.ARMS:
            rl, groups = tiny()
            order.learn(rl, groups, arm, updates)
            ends[arm, updates] = weights_of(rl)
    for arm in order.ARMS:
        assert torch.allclose(ends[arm, 1], ends["length", 1], atol=1e-4)
    assert not torch.allclose(ends["right", 2], ends["wrong", 2], atol=1e-3)


def test_order_counts_one_rollout_however_few_its_rows(tiny, monkeypatch):
    """with fewer rows than updates each update counted as 1 / updates of a rollout, and the schedule fell
    behind"""
    monkeypatch.setattr(order, "ROW", 4096)
    rl, groups = tiny()
    before = rl.progress
    cut = order.learn(rl, groups, "length", 4)
    assert len(cut) < 4 and rl.progress - before == pytest.approx(1.0)


def test_order_puts_right_ones_first_last_or_in_between(tiny, monkeypatch):
    monkeypatch.setattr(order, "ROW", 64)
    rl, groups = tiny()
    rows = {arm: [{s.reward for s in row.samples} for row in order.rows_in_order(rl, groups, arm)]
            for arm in order.ARMS}
    assert {1.0} in rows["right"] and {0.0} in rows["right"] and len(rows["right"]) > 3
    assert rows["right"] == sorted(rows["right"], key=lambda found: found != {1.0})
    assert rows["wrong"] == rows["right"][::-1] and {0.0, 1.0} in rows["mixed"]
