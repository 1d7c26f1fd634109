"""the rules of the speedrun, as far as a machine can check them"""
import json
import sys
from pathlib import Path

import pytest

from common.flags import flags

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))
import run as attempts  # noqa: E402  (scripts of records/, as they find each other)
import verify  # noqa: E402


PROBLEMS = verify.problems_of


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(verify, "problems_of", lambda track: "these")


def log(n=5, sides=("new",), seconds=300.0, accuracy=0.56):
    rows = []
    for seed in range(n):
        for i, side in enumerate(sides):
            took = (seconds if side == "new" else 400.0) + seed
            rows.append(dict(track="laptop", side=side, seed=seed, started=10.0 * seed + i,
                             machine="2 cores of a kind", commit=f"{side}abc",
                             commands=["train_gpt.py --name base"], accuracy=accuracy + 0.01 * (seed % 2),
                             seconds={"pretraining": 100.0, "rollout": took - 100, "update": 0.0},
                             problems="these", n=1000, k=4, max_new=48))
    return rows


def said(rows, others=False):
    return " / ".join(verify.faults(rows, others))


def test_a_record_and_its_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "laptop" / "first.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in log()))
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    verify.main([str(path)])
    assert capsys.readouterr().out.strip() == ("| 302 +-1 s | 56.4% +-0.2% | 5 | 2 cores of a kind "
                                               "| newabc | [first.jsonl](laptop/first.jsonl) |")
    assert verify.faults(log(sides=("old", "new")), True) == []


@pytest.mark.parametrize("path", sorted((ROOT / "records").glob("*/*.jsonl")),
                         ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_records_in_the_table(path, monkeypatch):
    """Each log that is kept passes, on the problems as they are drawn today, and its row in the
    table is what it says."""
    monkeypatch.setattr(verify, "problems_of", PROBLEMS)
    runs = verify.read(path)
    assert verify.faults(runs, any(run["side"] == "old" for run in runs)) == []
    assert verify.line(runs, path) in (ROOT / "records" / "README.md").read_text().splitlines()


@pytest.mark.parametrize("rows, others, words", [
    (log(4), False, "4 seeds"),
    (log(accuracy=0.3), False, "not above 50%"),
    (log(accuracy=0.497), False, "not above 50%"),      # the mean is above, by less than its noise
    (log(), True, "the track has a record"),
    (log(sides=("old", "new"), seconds=400.0), True, "not faster"),
    ([row | {"started": row["side"] + str(row["seed"])} for row in log(sides=("old", "new"))],
     True, "do not alternate"),
    (log() + [log()[0] | {"seed": 9, "machine": "another"}], False, "more than one machine"),
    (log() + [log()[0] | {"seed": 9, "commit": "b"}], False, "one commit"),
    (log() + [log()[0] | {"seed": 9, "problems": "easier"}], False, "track's problems"),
    (log() + [log()[0] | {"seed": 9, "k": 1}], False, "track's problems"),
    (log() + [log()[0] | {"seed": 9, "seconds": {"rollout": 9.0}}], False, "from random weights"),
    (log() + [log()[0] | {"seed": 9, "seconds": {"pretraining": 9.0, "rollout": 1.0, "idle": -1.0}}],
     False, "cannot be"),
    ([row | {"track": "phone"} for row in log()], False, "no track 'phone'"),
])
def test_every_rule_says_why(rows, others, words):
    assert words in said(sorted(rows, key=lambda row: row["started"]), others)


def from_a_model(n=2, accuracy=0.53, se=0.012, **changes):
    """a log of the track 1gpu"""
    rows = []
    for row in log(n, **{key: changes.pop(key) for key in ("sides", "seconds") if key in changes}):
        rows.append(row | dict(track="1gpu", n=1319, max_new=1024, accuracy=accuracy, se=se,
                               commands=["nanorl.py --name rl --init START"],
                               seconds={"rollout": row["seconds"]["rollout"], "update": 100.0},
                               start={"name": "Qwen2.5-0.5B-Instruct", "sha256": "a"}) | changes)
    return rows


def test_a_record_that_begins_with_a_model(tmp_path, monkeypatch, capsys):
    assert verify.faults(from_a_model(), False) == []
    assert verify.faults(from_a_model(sides=("old", "new")), True) == []
    path = tmp_path / "1gpu" / "first.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(row) + "\n" for row in from_a_model()))
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    verify.main([str(path)])
    assert capsys.readouterr().out.startswith("| 300 +-0 s | 53.0% +-0.0% | 2 |")


@pytest.mark.parametrize("rows, others, words", [
    (from_a_model(1), False, "1 seeds, at least 2"),
    (from_a_model(accuracy=0.52), False, "seed 0: accuracy 52.0% +-1.2%, the lower end"),
    (from_a_model()[:1] + from_a_model(accuracy=0.51)[1:], False, "seed 1: accuracy 51.0%"),   # one of two
    (from_a_model(se=0.0), False, "+-0.0%"),
    (from_a_model(start={"name": "another", "sha256": "a"}), False, "do not begin with Qwen2.5"),
    (from_a_model()[:1] + from_a_model(start={"name": "Qwen2.5-0.5B-Instruct", "sha256": "b"})[1:], False,
     "different weights"),
    (from_a_model(commands=["nanorl.py --init runs/tuned"]), False, "another model than START"),
    (from_a_model(sides=("old", "new"), seconds=401.0), True, "not each new run is faster"),
    (from_a_model(seconds=100.0), False, "from Qwen2.5-0.5B-Instruct on"),                     # no rollout
])
def test_every_rule_of_a_track_that_begins_with_a_model(rows, others, words):
    assert words in said(sorted(rows, key=lambda row: row["started"]), others)


def test_without_the_tracks_questions_it_is_one_line(tmp_path, monkeypatch, capsys):
    def gone(track):
        raise FileNotFoundError("no gsm8k/test.jsonl: run python -m data.gsm8k")
    monkeypatch.setattr(verify, "problems_of", gone)
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in from_a_model()))
    with pytest.raises(SystemExit) as e:
        verify.main([str(path)])
    assert e.value.code == 2 and "python -m data.gsm8k" in capsys.readouterr().err


def test_students_t():
    """the tables' 1% points, and the far tails"""
    for df, t in ((4, 3.7469), (9, 2.8214), (30, 2.4573)):
        assert verify.tail(t, df) == pytest.approx(0.01, rel=1e-3)
    assert verify.tail(0, 5) == pytest.approx(0.5)
    assert verify.tail(-3.7469, 4) == pytest.approx(0.99, rel=1e-4)
    assert verify.tail(200, 4) < 1e-8
    assert verify.below([1.0, 1.0], [2.0, 2.0]) == 0.0 == 1 - verify.below([2.0, 2.0], [2.0, 2.0])


@pytest.mark.parametrize("text, words", [(None, "no such log"), ("", "is empty"), ("{", "line 1: not a JSON"),
                                         ('{"track": "laptop"}', "it has no side"),
                                         ('{"track": "1gpu"}', "se, start")])
def test_bad_input_is_one_line(tmp_path, capsys, text, words):
    path = tmp_path / "log.jsonl"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as e:
        verify.main([str(path)])
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.startswith("error: ")
    assert err.count("\n") == 1 and words in err


def test_problems_are_named_by_what_they_ask(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setitem(verify.TRACKS["laptop"], "n", 20)
    first = verify.problems_of("laptop")
    assert first == verify.problems_of("laptop") and len(first) == 16
    monkeypatch.setitem(verify.TRACKS["laptop"], "n", 21)
    assert verify.problems_of("laptop") != first


# --------------------------------------------------------------------------------------------------
# making a log

def test_old_and_new_alternate_and_nothing_is_run_twice(tmp_path, monkeypatch, capsys):
    ran = []

    def attempt(config, checkout, seed):
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append((checkout.name, seed))
        return ["train_gpt.py"], {"pretraining": 1.0, "rollout": 2.0}, {"accuracy": 0.5, "se": 0.01}
    monkeypatch.setattr(attempts, "attempt", attempt)
    monkeypatch.setattr(attempts.verify, "problems_of", lambda track: "these")
    (tmp_path / "record").mkdir()
    words = ["--out", str(tmp_path / "a/log.jsonl"), "--old", str(tmp_path / "record"), "--seeds", "2"]
    with pytest.raises(KeyboardInterrupt):
        attempts.main(words)
    ran.insert(0, None)      # the limit is past
    attempts.main(words)
    here = ROOT.name
    assert ran[1:] == [("record", 0), (here, 0), ("record", 1), (here, 1)]
    rows = verify.read(tmp_path / "a/log.jsonl")
    assert [row["side"] for row in rows] == ["old", "new", "old", "new"]
    assert set(verify.FIELDS) <= set(rows[0])


def test_a_run_of_a_side(tmp_path, monkeypatch):
    """its commands with the seed put in, in one empty folder; the clock leaves evaluation and
    start-up out; the judge is this checkout's"""
    (tmp_path / "records/laptop").mkdir(parents=True)
    (tmp_path / "records/laptop/commands.txt").write_text("# words\ntrain_gpt.py --name b --seed SEED\n"
                                                          "nanorl.py --name r --seed SEED\n")
    rows = {"b": dict(t_pack=1, t_train=2, t_opt=3),
            "r": dict(t_rollout=10, t_reward=1, t_pack=1, t_train=4, t_opt=1, t_idle=2, t_step=99)}
    calls = []

    def call(words, cwd, checkout):
        calls.append((Path(words[0]).name, words[1:]))
        if "--model" in words:
            assert Path(words[0]).parent == ROOT and checkout == ROOT
            return 'words\n{"avg": 0.5, "avg_se": 0.01}\n'
        name = words[words.index("--name") + 1]
        folder = Path(cwd, "runs", name)
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 0, "eval/avg": 1})
                                              + "\n" + json.dumps(rows[name]) + "\n")
    monkeypatch.setattr(attempts, "call", call)
    commands, seconds, judged = attempts.attempt(attempts.Config(out="x"), tmp_path, 7)
    assert [c[0] for c in calls] == ["train_gpt.py", "nanorl.py", "evaluate.py"]
    assert calls[0][1] == ["--name", "b", "--seed", "7"]
    assert seconds == {"pretraining": 6, "rollout": 10, "reward": 1, "pack": 1, "update": 5, "idle": 2}
    assert judged == {"accuracy": 0.5, "se": 0.01}
    assert commands == ["train_gpt.py --name b --seed SEED", "nanorl.py --name r --seed SEED"]


def test_a_command_may_ask_for_ranks(tmp_path, monkeypatch):
    """a line that begins with torchrun is started by the torchrun of this Python, the next one is not"""
    (tmp_path / "records/laptop").mkdir(parents=True)
    (tmp_path / "records/laptop/commands.txt").write_text(
        "torchrun --standalone --nproc_per_node=2 -- train_gpt.py --name b\nnanorl.py --name r\n")
    calls = []

    def call(words, cwd, checkout):
        calls.append([Path(word).name if word.endswith(".py") else word for word in words])
        return 'words\n{"avg": 0.5, "avg_se": 0.01}\n'
    monkeypatch.setattr(attempts, "call", call)
    monkeypatch.setattr(attempts, "seconds_of", lambda run: {"pretraining": 1.0})
    monkeypatch.setattr(attempts.verify, "STAGES", ("pretraining",))
    attempts.attempt(attempts.Config(out="x"), tmp_path, 0)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    assert calls[0] == [*torchrun, "train_gpt.py", "--name", "b"]
    assert calls[1] == ["nanorl.py", "--name", "r"]


def test_a_track_begins_with_its_model(tmp_path, monkeypatch, capsys):
    """START in the commands is the folder that was given; the log says which weights it holds"""
    seen = []

    def attempt(config, checkout, seed):
        seen.append(config.start)
        return ["nanorl.py --init START"], {"rollout": 2.0}, {"accuracy": 0.6, "se": 0.01}
    monkeypatch.setattr(attempts, "attempt", attempt)
    monkeypatch.setattr(attempts.verify, "problems_of", lambda track: "these")
    model = tmp_path / "Qwen2.5-0.5B-Instruct"
    model.mkdir()
    words = ["--track", "1gpu", "--seeds", "2", "--out", str(tmp_path / "log.jsonl")]
    for more, why in (([], "begins with Qwen2.5-0.5B-Instruct: give --start"),
                      (["--start", str(model)], "no folder with *.safetensors"),
                      (["--start", str(model), "--track", "laptop"], "random weights: leave --start out")):
        with pytest.raises(SystemExit) as e:
            attempts.main([*words, *more])
        assert e.value.code == 2 and why in capsys.readouterr().err and not (tmp_path / "log.jsonl").exists()
    (model / "model.safetensors").write_bytes(b"abc")
    attempts.main([*words, "--start", str(model)])
    assert seen == [str(model)] * 2
    rows = verify.read(tmp_path / "log.jsonl")
    assert verify.faults(rows, False) == []
    assert rows[0]["start"]["sha256"].startswith("ba7816bf"), "sha256 of abc"


@pytest.mark.parametrize("track", verify.TRACKS)
def test_the_commands_of_a_track_can_be_read(track):
    import importlib
    for line in (ROOT / "records" / track / "commands.txt").read_text().splitlines():
        if not line.startswith("#"):
            script, *words = line.replace("SEED", "3").split(" -- ")[-1].split()
            assert flags(importlib.import_module(script[:-3]).Config, words).seed == 3
