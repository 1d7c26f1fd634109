"""speedrun.sh: its stages, with a python that only writes down what it was asked; and the table
and picture at its end"""
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

import data
from bench import __main__ as bench
from bench import speedrun
from common.flags import flags
from train_gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
PYTHON = """#!/usr/bin/env bash
if [ "$1" = -c ]; then echo "${GPUS:-0}"; exit; fi
echo "$*" >> calls.txt
case "$*" in *"${FAIL:-nothing}"*) exit 130;; esac
for script in "$@"; do case "$script" in *.py) break;; esac; done
case "$script $*" in
    train_gpt.py*"--name small"*|train_gpt.py*"--preset small"*) run=small ;;
    train_gpt.py*mixed100m*) run=mixed100m ;; train_gpt.py*) run=base ;;
    nanorl.py*) run=rl ;; ttrl.py*) run=ttrl_majority ;; opd.py*) run=opd ;; *) exit 0 ;;
esac
mkdir -p runs/$run/ckpt; echo '{}' > runs/$run/config.json
"""


@pytest.fixture
def go(tmp_path):
    for name in ("speedrun.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    python = tmp_path / ".venv/bin/python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    subprocess.run("cat pyproject.toml constraints.txt | cksum > .venv/installed.plain",
                   shell=True, cwd=tmp_path, check=True)

    def go(*words, code=0, **env):
        (tmp_path / "calls.txt").unlink(missing_ok=True)
        done = subprocess.run(["bash", tmp_path / "speedrun.sh", *words],
                              capture_output=True, text=True, env={**os.environ, **env})
        assert done.returncode == code, done.stderr
        calls = tmp_path / "calls.txt"
        return [line for line in calls.read_text().splitlines()] if calls.exists() else done.stderr
    return go


def scripts(calls):
    return [next(word for word in call.split() if word.endswith(".py") or word == "speedrun")
            for call in calls]


ALL = ["train_gpt.py", "nanorl.py", "ttrl.py", "train_gpt.py", "opd.py", "speedrun"]


def test_all_stages_in_order_and_none_twice(go):
    assert scripts(go()) == ALL
    assert scripts(go()) == ["speedrun"], "a second call only draws the table"
    assert scripts(go("rl", "table")) == ["speedrun"]


def test_a_second_call_goes_on_where_the_first_stopped(go, tmp_path):
    calls = go(code=130, FAIL="nanorl.py")
    assert scripts(calls) == ALL[:2]
    (tmp_path / "runs/rl/ckpt").mkdir(parents=True)
    (tmp_path / "runs/rl/config.json").write_text("{}")
    calls = go()
    assert scripts(calls) == ALL[1:] and calls[0].endswith("--resume") and "--resume" not in calls[1]
    assert [line.split()[:2] for line in (tmp_path / "runs/speedrun.txt").read_text().splitlines()][:3] == [
        ["base", "done"], ["rl", "stopped"], ["rl", "done"]]


def test_a_run_that_was_removed_is_made_again(go, tmp_path):
    go()
    shutil.rmtree(tmp_path / "runs/rl")
    calls = go()
    assert scripts(calls) == ["nanorl.py", "speedrun"] and "--resume" not in calls[0]


def test_stages_alone_flags_of_one_and_gpus(go):
    assert go("rl", RL_FLAGS="--steps 5") == ["nanorl.py --device cpu --steps 5"]
    calls = go("base", "opd", GPUS="4")
    assert all(call.startswith("-m torch.distributed.run --standalone --nproc_per_node=4 -- ")
               for call in calls)
    assert "--preset mixed100m" in calls[0] and "--device" not in calls[0]


def test_a_wrong_stage_is_one_line(go):
    said = go("rll", code=2)
    assert said.startswith("error: ") and said.count("\n") == 1 and "ttrl" in said


@pytest.mark.parametrize("gpus", ["0", "8"])
def test_every_flag_of_every_stage_exists(go, gpus):
    """the real scripts' Configs read what the stages give them"""
    import importlib
    for call in go(GPUS=gpus):
        words = call.split()
        name = next((word for word in words if word.endswith(".py")), None)
        if name and (ROOT / name).exists():
            flags(importlib.import_module(name[:-3]).Config, words[words.index(name) + 1:])


# --------------------------------------------------------------------------------------------------
# the table and the picture

@pytest.fixture
def runs(tmp_path, monkeypatch):
    """what the stages leave behind, as far as the table looks at it: tiny random models of no use"""
    monkeypatch.chdir(tmp_path)
    tok = data.tokenizer("numbers")
    model = GPT(GPTConfig(tok.vocab_size, 1, 1, 1, 8, 16, 24, 128, 10000.0)).init_weights(0)
    config = {"base": {}, "small": {}, "rl": dict(init="runs/base", task="countdown", max_new=6),
              "opd": dict(init="runs/small", task="countdown", max_new=6),
              "ttrl_majority": dict(init="runs/base", task="arith", max_new=6, questions=4)}
    rows = {"base": [dict(tokens_per_second=100.0, t_train=2.0, t_pack=0.5, loss=1.0),
                     {"eval/bpb": 2.0, "loss": 0.5}],
            "ttrl_majority": [dict(tokens=50, avg=0.5, t_rollout=1.0, t_step=1.0)]}
    for name, fields in config.items():
        folder = tmp_path / "runs" / name / "ckpt" / "step_1"
        folder.mkdir(parents=True)
        model.save_hf(folder, tok)
        (folder / "meta.json").write_text('{"step": 1, "world": 1}')
        (folder / "state_0_of_1.pt").write_text("")
        (tmp_path / "runs" / name / "config.json").write_text(json.dumps(fields))
        some = rows.get(name, [dict(tokens=700, reward=0.1, t_rollout=1.0)])
        (tmp_path / "runs" / name / "metrics.jsonl").write_text(
            "".join(json.dumps(dict(step=i, **r)) + "\n" for i, r in enumerate(some)))
    (tmp_path / "runs/speedrun.txt").write_text("rl stopped 20\nrl done 22\n")
    return tmp_path


def test_the_table_and_the_picture(runs, capsys):
    found = speedrun.main("--n 3 --k 2 --device cpu --threads 1".split())
    lines = (runs / "runs/speedrun.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["base", "rl", "ttrl",
                                                                  "student", "opd", "together"]
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
             for line in lines[2:]}
    assert cells["rl"][1] and cells["rl"][3:] == ["42", "700"], "a stage that was stopped once has both times"
    assert cells["base"][1] == "" and cells["base"][3:] == ["2", "250"]
    assert cells["ttrl"][0] == "arith" and (runs / "runs/speedrun.png").stat().st_size > 5000
    assert found["seconds"] == pytest.approx(42 + 2.5 + 1 + 1 + 1)
    assert capsys.readouterr().out.count("runs/base") == 2, "once a task, though it stands in two rows"


def test_what_is_missing_is_left_out(runs, capsys):
    shutil.rmtree(runs / "runs/opd")
    speedrun.main("--n 2 --k 1 --device cpu --threads 1".split())
    assert "opd is left out" in capsys.readouterr().out
    shutil.rmtree(runs / "runs")
    with pytest.raises(SystemExit) as e:
        speedrun.main([])
    assert e.value.code == 2


# --------------------------------------------------------------------------------------------------
# python -m bench all

def test_bench_all_reads_children_and_records(tmp_path, monkeypatch, capsys):
    (tmp_path / "bench").mkdir()
    (tmp_path / "records/bench").mkdir(parents=True)
    for name in ("train", "pack", "kernels", "tail", "__init__", "__main__"):
        (tmp_path / f"bench/{name}.py").write_text("")
    (tmp_path / "records/bench/tail.txt").write_text(
        'words\n{"bench": "tail", "race": {"times": 2.5}, "fine": true}\n\n')
    said = {"train": {"bench": "train", "times": 1.5}, "pack": "stopped at 6 minutes", "kernels": {}}
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "child", lambda name, words: said[name])
    with pytest.raises(SystemExit) as e:
        bench.main(["all"])
    out = capsys.readouterr().out
    assert e.value.code == 1, "one of the short ones has no numbers"
    assert [line.split() for line in out.splitlines()[1:]] == [
        ["train", "now", "times", "1.5"], ["pack", "now", "stopped", "at", "6", "minutes"],
        ["tail", "recorded", "race", "times", "2.5"]]
    (tmp_path / "records/bench/tail.txt").unlink()
    assert "not recorded" in bench.recorded("tail")


def test_a_child_that_hangs_is_stopped(tmp_path, monkeypatch):
    """with everything that it started: as long as the sleeper has the pipe, nobody would come
    back from reading it"""
    (tmp_path / "hang").write_text("#!/usr/bin/env bash\nsleep 600 &\necho '{}'\nwait\n")
    (tmp_path / "hang").chmod(0o755)
    monkeypatch.setattr(bench, "MINUTES", 1 / 60)
    monkeypatch.setattr(bench.sys, "executable", str(tmp_path / "hang"))
    assert "stopped" in bench.child("train", "")
