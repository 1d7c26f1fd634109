"""every flag of every script: its limits, what it changes, and where it would change nothing. Then
what a careless command line once did"""
import ast
import dataclasses
import io
import json
import pickle
import re
import shlex
import shutil
import sys
from contextlib import redirect_stdout
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import data
import evaluate
import nanorl
import opd
import opd_check
import rollout
import stages
import train_gpt
import ttrl
from bench import kill
from bench import opd as bench_opd
from common import files, flags, hf, run
from data import Problem
from test_ttrl import Letters

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = dict(nanorl=nanorl, ttrl=ttrl, opd=opd, train_gpt=train_gpt, evaluate=evaluate, rollout=rollout,
               opd_check=opd_check)
NEEDED = dict(opd="--teacher x", evaluate="--model x", rollout="--model x --prompt y",
              opd_check="--student x --teacher y")


def configure(script, words):
    found = SCRIPTS[script].configure([*NEEDED.get(script, "").split(), *shlex.split(words)])
    return found[0] if isinstance(found, tuple) else found


def refusal(capsys, function, *args):
    """-> the one line that it ends with; nothing is written"""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*args)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and error[0].startswith("error: "), error
    assert not Path("runs").exists(), "nothing half-written"
    return error[0]


# -----------------------------------------------------------------------------
# limits: values of each field that are taken, and that are refused: below, at and above each limit.
# A value may be followed by the flags that it needs; on and off are those of a switch

ANY = (["x"], [])
COUNT = (["1", "2"], ["0", "-1", "1.5", "x"])            # at least one
OFF = (["0", "1"], ["-1", "0.5"])                        # 0 turns it off
SIZE = (["0", "0.5", "7"], ["-0.1", "nan", "inf"])       # any number from 0
SHARE = (["0", "0.5", "1"], ["-0.01", "1.01"])           # of a whole
SIGNED = (["-2", "0", "2"], ["nan"])
SWITCH = (["on", "off"], [])
MINUTES = (["0.001", "9", "none"], ["0", "-1", "nan", "inf"])
SEED = (["0", "1", str(2**62)], ["-1", str(2**62 + 1), "1e30"])
TOP_P = (["0.001", "1"], ["0", "1.001", "2", "-1"])
NAME = (["a", "a/b", "-x"], ["", "/a", "a/", "a//b", ".", "..", "a/../b", "../a", "./a", "a/."])
DATE = (["2026-01-31"], ["2026-02-30", "today", "20260131", "2026-1-31"])
PLACE = (["auto", "cpu", "cuda", "mps"], ["gpu", "cuda:1", ""])
ROW = (["2 --max-new 1", "9999"], ["0", "-1", "1.5", "x", "8 --max-new 8"])
DTYPE = (["auto", "fp32", "bf16"], ["fp16", ""])

COMMON = dict(
    name=NAME, init=ANY, task=ANY, tokens=OFF, minutes=MINUTES, prompts=COUNT, max_new=COUNT, top_p=TOP_P,
    tis=(["0", "1", "2"], ["0.99", "-1", "0 --top-p 0.9"]), lr=SIZE, muon_lr=SIZE, warmup=OFF, decay=SHARE,
    weight_decay=SIZE, clip=SIZE, row_tokens=ROW, slots=OFF, workers=COUNT, save_every=COUNT, seed=SEED,
    date=DATE, checkpoint=SWITCH, offload=SWITCH, grads=(["auto", "whole", "sharded"], ["zero", ""]),
    device=PLACE, dtype=DTYPE, threads=OFF, deterministic=SWITCH, parity=SWITCH, resume=SWITCH, wandb=ANY)
ALGO = dict(
    algo=(["grpo", "dr_grpo"], ["gpro", ""]), baseline=(["loo", ""], ["none"]),
    ratio=(["sequence --minibatch 1", "token"], ["sequence", "all"]),
    trust=(["none --minibatch 1", "clip"], ["none", "all"]),
    clip_low=(["0 --minibatch 1", "1 --minibatch 1", "0.2"],
              ["1.01 --minibatch 1", "-0.1", "0.3", "0.2 --trust none --minibatch 1"]),
    clip_high=(["0 --minibatch 1", "9 --minibatch 1", "0.2"],
               ["-0.1", "0.3", "0.2 --trust none --minibatch 1"]),
    aggregate=(["length", "token"], ["mean"]),
    length_power=(["0 --aggregate length", "1 --aggregate length"], ["1", "-1 --aggregate length"]),
    power=(["-1 --ratio power --minibatch 1", "0 --ratio power --minibatch 1"], ["1", "x"]),
    power_end=(["-1 --ratio power --minibatch 1"], ["1"]), kl_coef=SIZE,
    reference_at=(["host --kl-coef 1", "sharded --kl-coef 1", "device"], ["host", "gpu"]),
    cov=(["clip", "kl --minibatch 1", ""], ["kl", "cut"]),
    cov_share=(["0.001 --cov clip", "0.999 --cov clip"], ["0 --cov clip", "1 --cov clip", "2", "0.5"]),
    cov_coef=(["2 --cov kl --minibatch 1", "0 --cov kl --minibatch 1"], ["2", "2 --cov clip", "-1"]),
    entropy_coef=SIGNED, entropy_target=(["0", "0.2", "9"], ["-1", "1 --entropy-coef 1"]),
    overlong=(["0", "47", "48"], ["49", "-1"]), temperature=(["0.01", "5"], ["0", "-1"]))
EVALS = dict(eval_every=OFF, eval_n=COUNT, eval_k=COUNT, final_n=COUNT)
ONE_UPDATE = (["token"], ["sequence"])                   # ttrl.py makes one update per rollout

LIMITS = dict(
    nanorl=COMMON | ALGO | EVALS | dict(
        data=(["x.jsonl --reward y"], ["x.jsonl", "x.jsonl --reward y --task arith"]),
        reward=ANY, steps=COUNT, n=(["2"], ["1", "0"]), epochs=COUNT,
        minibatch=(["0", "1", "32 --prompts 32"], ["33 --prompts 32", "-1"]), dynamic=SWITCH,
        reset_every=(["0", "1 --kl-coef 1"], ["1", "-1"]),
        reset_patience=(["0", "1 --kl-coef 1"], ["1", "1 --kl-coef 1 --eval-every 0"]), problems=COUNT,
        tail_batching=(["off", "race", "prompt", "continue"], ["x", "continue --tis 0"]),
        more_prompts=(["1 --tail-batching race"], ["0.99 --tail-batching race", "2"]),
        more_samples=(["1 --tail-batching race"],
                      ["0.99 --tail-batching race", "2", "2 --tail-batching prompt"]),
        stream=(["on", "off"], ["on --minibatch 1", "on --epochs 2", "on --cov clip", "on --entropy-target 1",
                                 "on --grads sharded", "on --kl-coef 1 --reference-at sharded"]),
        dry_run=SWITCH, card=(["0", "24 --dry-run"], ["24", "-1"]), host=(["0", "64 --dry-run"], ["64"])),
    ttrl=COMMON | ALGO | dict(
        name=(["", "a"], NAME[1][1:]), preset=(["", "aime --init DIR"], ["aime", "aimee"]),
        task=ANY, split=(["test", "valid", "train"], ["x", "train --data x.jsonl"]),
        data=ANY, questions=COUNT,
        unseen=(["x"], ["x --unseen-n 0"]), unseen_n=OFF,
        votes=(["32", "64"], ["31", "0"]), samples=(["2", "64"], ["1", "65"]),
        min_votes=(["1", "64"], ["0", "65"]),
        reward=(["label", "random", "has_answer"], ["x"]),
        judge=(["soft", "weighted", "abstain", "abstain --reward label"], ["x", "soft --reward label"]),
        abstain_share=(["0 --judge abstain", "1 --judge abstain"], ["1.01 --judge abstain", "0.5"]),
        abstain_entropy=(["0 --judge abstain", "1 --judge abstain"], ["1.01 --judge abstain", "0.5"]),
        passes=COUNT, patience=OFF, settled=(["0", "1"], ["1.01", "0.5 --patience 0"]),
        scattered=(["0", "1"], ["1.01"]),
        eval_k=COUNT, eval_temperature=(["0", "1"], ["-1"]),
        eval_top_p=(["0.001", "1"], ["0", "1.001", "0.9 --eval-temperature 0"]),
        # of axes that need a second update
        ratio=ONE_UPDATE, trust=(["clip"], ["none"]), clip_low=(["0.2"], ["0.1"]),
        clip_high=(["0.2"], ["0.1"]),
        power=([], ["1", "1 --ratio power"]), power_end=([], ["1"]), cov=(["clip"], ["kl"]),
        cov_coef=(["1"], ["2", "2 --cov clip"])),
    opd=COMMON | EVALS | dict(
        teacher=(["x", "self --context gold"], ["", "self", "x --control fixed_negative"]),
        data=(["x.jsonl --reward y"], ["x.jsonl", "x.jsonl --reward y --task arith"]), reward=ANY,
        loss=(["full", "tail", "tail --control ''"], ["x", "full --control sft"]),
        k=(["1 --loss tail", "16"], ["0 --loss tail", "15", "15 --loss full"]),
        baseline_k=(["0", "1"], ["1 --loss full", "-1"]),
        divergence=(["forward --loss full", "jsd --loss full"], ["forward", "x"]),
        beta=(["0.01 --loss full --divergence jsd", "0.99 --loss full --divergence jsd"],
              ["0 --loss full --divergence jsd", "1 --loss full --divergence jsd", "0.4 --loss full"]),
        bound=(["0.1"], ["0", "4 --loss full"]),
        control=(["fixed_negative --teacher=", "sft"], ["x", "fixed_negative", "sft --teacher self",
                                                        "sft --gold task", "sft --reward-coef 1",
                                                        "sft --context gold"]),
        context=(["gold", "hint", "gold --teacher="], ["x"]),
        context_text=(["'{context}{prompt}' --context gold"], ["x --context gold", "'{context}{prompt}'"]),
        reward_coef=(["0", "1"], ["-1", "1 --n 1"]), kl_coef=(["0", "1"], ["-1", "1 --control sft"]),
        reference_at=(["host --kl-coef 1", "sharded --kl-coef 1"], ["host", "x"]),
        gold=(["task", "teacher", "x.jsonl"], ["teacher --teacher self --context gold"]),
        gold_share=(["0.01 --gold task", "4 --gold task"], ["0 --gold task", "4.01 --gold task", "1"]),
        mask_special=(["on"], ["on --control sft"]),
        eos_class=(["off"], ["off --teacher self --context gold", "off --control fixed_negative --teacher="]),
        horizon=(["0", "48"], ["49"]), horizon_steps=(["0", "1 --horizon 9"], ["1"]),
        teacher_at=(["host", "sharded"], ["x", "host --gold teacher", "host --teacher self --context gold"]),
        look_k=(["1"], ["0", "1 --control sft"]), repeat_n=(["1"], ["0", "1 --control sft"]),
        guard=(["0", "6"], ["5", "1"]), guard_rise=(["0", "1"], ["1.01", "0.5 --guard 0"]),
        steps=COUNT, n=COUNT,
        temperature=(["0.01"], ["0", "-1"]), problems=COUNT,
        tis=(["0", "1", "1 --loss full --reward-coef 1"], ["0.99", "0 --top-p 0.9", "1 --loss full",
                                                           "1 --control sft"])),
    train_gpt=dict(
        name=NAME, preset=(list(train_gpt.PRESETS), ["x"]), data=ANY, tokenizer=(["x"], ["x --init y"]),
        init=ANY,
        steps=COUNT, minutes=MINUTES,
        batch=COUNT, row_tokens=COUNT, seq_len=(["1 --data x.txt"], ["0 --data x.txt", "1"]),
        n_layer=(["1"], ["0", "1 --init y"]), n_head=(["2", "4"], ["0", "3", "8 --init y"]),
        n_kv_head=(["1", "3"], ["0", "4", "1 --init y"]), head_dim=(["2"], ["0", "1", "2 --init y"]),
        d_model=(["1"], ["0", "1 --init y"]), d_ff=(["1"], ["0", "1 --init y"]),
        max_len=(["1"], ["0", "1 --init y"]), rope_theta=(["0.1"], ["0", "-1", "1 --init y"]),
        tie_embeddings=(["on"], ["on --init y"]),
        lr=SIZE, muon=SWITCH, muon_lr=(["0", "1"], ["-1", "1 --no-muon"]),
        weight_decay=SIZE, clip=SIZE, temperature=(["0.5", "2"], ["0", "-1", "nan", "inf"]),
        warmup=SHARE, decay=SHARE, prompts=(["on"], ["on --data x.jsonl"]),
        eval_every=COUNT, eval_docs=COUNT, save_every=COUNT, target=SIZE, seed=SEED,
        date=(["2026-01-31 --data x.jsonl"], ["2026-01-31", "x --data x.jsonl"]),
        checkpoint=SWITCH, offload=SWITCH, grads=(["whole", "sharded"], ["auto", ""]), compile=SWITCH,
        device=PLACE, dtype=DTYPE, threads=OFF, deterministic=SWITCH, resume=SWITCH, wandb=ANY),
    evaluate=dict(
        model=ANY, task=ANY, reward=ANY, split=(["train"], ["x"]), n=COUNT, k=COUNT, max_new=COUNT,
        temperature=(["0", "1"], ["-1"]), top_p=(["0.001", "1"], ["0", "2", "0.9 --temperature 0"]),
        workers=COUNT,
        slots=OFF, seed=SEED, device=PLACE, dtype=DTYPE, threads=OFF,
        out=(["x.jsonl"], ["nosuch/x.jsonl", "."])),
    rollout=dict(
        model=ANY, prompt=(["x"], ["x --chat", ""]), chat=(["on --prompt="], ["on"]),
        n=(["1", "2"], ["0", "2 --chat --prompt="]), max_new=COUNT, temperature=(["0", "1"], ["-1"]),
        top_p=(["0.001", "1"], ["0", "2", "0.9 --temperature 0"]),
        top_k=(["0", "1"], ["-1", "1 --temperature 0"]),
        seed=(SEED[0], [*SEED[1], "1 --temperature 0"]), device=PLACE),
    opd_check=dict(
        student=ANY, teacher=ANY, task=ANY, n=COUNT, samples=COUNT, max_new=COUNT, k=COUNT, cuts=COUNT,
        shortest=OFF, tokens=COUNT, seed=SEED, row_tokens=COUNT, slots=OFF, workers=COUNT, device=PLACE,
        dtype=DTYPE, threads=OFF),
)
FIELDS = [(script, field.name) for script, module in SCRIPTS.items()
          for field in dataclasses.fields(module.Config)]


def given(name, value):
    """the words that give a field this value"""
    flag = name.replace("_", "-")
    first, _, more = value.partition(" ")
    if first in ("on", "off") and name != "tail_batching":
        return f"--{flag} {more}" if first == "on" else f"--no-{flag} {more}"
    if value.startswith("'"):
        return f"--{flag}={value}"
    return f"--{flag}={first} {more}"


@pytest.mark.parametrize("script, name", FIELDS)
def test_limits(script, name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    taken, refused = LIMITS[script][name]
    for value in taken:
        configure(script, given(name, value))
    for value in refused:
        words = given(name, value)
        error = refusal(capsys, configure, script, words)
        named = re.findall(r"--(?:no-)?[a-z][\w-]*", words)
        assert any(flag in error for flag in named), f"{words}: {error}"


def test_no_limit_is_of_a_flag_that_is_gone():
    assert {(script, name) for script, rows in LIMITS.items() for name in rows} == set(FIELDS)


# -----------------------------------------------------------------------------
# what is written down elsewhere still starts: presets, recipes, the speedrun, pages, benchmarks


def commands():
    """(script, words) of every command of ours"""
    found = [("nanorl", recipe["flags"]) for recipe in nanorl.RECIPES.values()]
    found += [("ttrl", f"--preset {name} --init DIR") for name in ttrl.PRESETS]
    found += [("train_gpt", f"--preset {name}") for name in train_gpt.PRESETS]
    found += [("opd", f"--teacher x {words}") for words in (bench_opd.NUMBERS | bench_opd.CHARS).values()]
    found += [(script.__name__, words.format(home="x")) for script, words in kill.KINDS.values()]
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("records/*.md"), ROOT / "speedrun.sh",
             *ROOT.glob("records/*/commands.txt")]
    text = "\n".join(page.read_text() for page in pages)
    text += "\n".join(ast.get_docstring(ast.parse(p.read_text())) or ""
                      for p in ROOT.glob("*.py"))
    text = text.replace("\\\n", " ")
    for script, words in re.findall(r"\b(\w+)\.py((?: +(?:--)?[^\s`;|#]+)*)", text):
        words = re.split(r"  |\)| \(", words.strip())[0]                 # a comment beside it
        if words.count('"') % 2 or words.count("'") % 2:                # the end of a shell's own quotes
            words = re.split("[\"']", words)[0]
        if script in SCRIPTS and words.startswith("--") and "..." not in words:
            found.append((script, words))
    return found


def test_our_own_commands_start(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = set(commands())
    assert len(written) > 50
    for script, words in written:
        words = re.sub(r"\b(SEED|S)\b", "0", words.removesuffix("LOSS"))
        words = words.replace("--trust spo", "--trust none")
        words = re.sub(r"--reward majority\|label\|random \[.*", "--reward label", words).removeprefix("-- ")
        try:
            SCRIPTS[script].configure(shlex.split(words))
        except SystemExit:
            pytest.fail(f"{script}.py {words}")


# -----------------------------------------------------------------------------
# the ten, and their like


def test_a_name_stays_in_runs(tmp_path, monkeypatch, capsys):
    """--name afile/../../x wrote beside runs/, and a file in the way was a traceback"""
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/afile").write_text("")
    for name, words in [("afile/../../x", ". or .."), ("afile/x", "runs/afile is a file"),
                        ("afile", "runs/afile is a file"), ("a\nb", "no name of a run")]:
        with pytest.raises(SystemExit) as stopped:
            flags.check_name(name)
        error = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and words in error and "\n" not in error
    flags.check_name("new/one")
    assert [p.name for p in Path("runs").iterdir()] == ["afile"]


RL = ("--init base --data my.jsonl --reward my.py:score --device cpu --threads 1 --prompts 3 --n 3 "
      "--max-new 6 --steps 2 --row-tokens 128 --eval-n 2 --eval-k 2 --final-n 2 --eval-every 1 "
      "--save-every 9 --lr 1e-2 --warmup 1 --workers 1 --slots 4 --problems 12").split()


@pytest.mark.parametrize("more, words", [
    (["--task", "nosuch"], "--task nosuch has no effect: --data brings the problems"),
    (["--task", "countdown:x"], "has no effect"),
    (["--cov-share", "2"], "--cov-share 2.0 has no effect"),
    (["--data=", "--reward=", "--task", "nosuch"], "unknown task 'nosuch'"),
    (["--data=", "--reward=", "--task", "countdown:x"], "no variant 'x'"),
    (["--top-p", "0"], "--top-p 0.0"), (["--top-p", "2"], "--top-p 2.0"),
    (["--date", "2026-01-31"], "there are no chats"),
    (["--stream"], "--no-deterministic"),
])
def test_nothing_is_written_before_all_is_checked(tiny_base, capsys, more, words):
    """a task beside --data was never looked at; --top-p 2 left a run folder behind"""
    tiny_base(12)
    assert words in refusal(capsys, nanorl.main, [*RL, *more])


def test_a_base_is_not_trained_for_a_task_that_is_none(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stages.train_gpt, "main", None)
    assert "unknown task" in refusal(capsys, nanorl.main, ["--task", "contdown", "--init", "runs/base",
                                                           "--device", "cpu"])


def test_a_base_that_is_missing_is_trained_or_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    env = run.start("cpu", threads=1)
    asked = []
    monkeypatch.setattr(train_gpt, "main", asked.append)
    for folder in ("somewhere", "runs/other", "base"):
        train_gpt.train_missing(folder, env)
    assert not asked, "only runs/PRESET is known"
    train_gpt.train_missing("runs/small", env)
    Path("runs/small").mkdir(parents=True)
    Path("runs/small/config.json").write_text("{}")
    train_gpt.train_missing("runs/small", env)
    assert asked == [["--preset", "small"], ["--preset", "small", "--resume"]]
    with pytest.raises(SystemExit):
        train_gpt.train_missing("runs/small", env, dry_run=True)
    assert "runs/small is not trained yet" in capsys.readouterr().err and len(asked) == 2


def test_a_base_that_was_interrupted_is_no_base(tmp_path, monkeypatch):
    """Ctrl-C in the middle of the first training left a checkpoint, and from then on every run began,
    without a word, from a base of a few hundred steps."""
    monkeypatch.chdir(tmp_path)
    env = run.start("cpu", threads=1)
    train_gpt.main("--preset small --steps 2 --batch 2 --eval-docs 2 --threads 1".split())
    config = Path("runs/small/config.json")
    saved = json.loads(config.read_text())
    asked = []
    monkeypatch.setattr(train_gpt, "main", asked.append)
    train_gpt.train_missing("runs/small", env)
    assert not asked
    config.write_text(json.dumps(saved | {"steps": 900}))
    train_gpt.train_missing("runs/small", env)
    assert asked == [["--preset", "small", "--resume"]]
    config.write_text(json.dumps(saved | {"steps": 900, "minutes": 1.0}))
    train_gpt.train_missing("runs/small", env)
    assert len(asked) == 1, "--minutes ended it, as it was told"


def test_a_step_says_what_it_holds(tiny, capsys):
    """--prompts above the problems there are: a step was smaller, and no line said so"""
    nanorl.main([*RL, "--prompts", "9", "--problems", "4", "--steps", "1"])
    lines = Path("runs/rl/log.txt").read_text().splitlines()
    said = [line for line in lines if line.startswith("--prompts 9")]
    assert said == ["--prompts 9 is more than the 4 problems there are: a step holds 4"]
    nanorl.main([*RL, "--steps", "1", "--name", "fits"])
    assert "problems there are" not in Path("runs/fits/log.txt").read_text().rpartition('"""')[2]


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"vocab": {"a": 1}}}', "\xff"])
def test_which_tokenizer_was_read_is_said(tmp_path, capsys, content):
    """a damaged or foreign tokenizer.json beside our own file: the other was taken without a word"""
    data.tokenizer("chars").save(tmp_path)
    data.tokenizer(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "tokenizer.json").write_text(content, encoding="latin-1")
    assert data.tokenizer(tmp_path).name == "chars"
    error = capsys.readouterr().err.strip()
    assert "nanorl_tokenizer.json (chars)" in error and "was not read" in error and "\n" not in error
    (tmp_path / "tokenizer.json").unlink()
    data.tokenizer(tmp_path)
    assert capsys.readouterr().err == ""


# -----------------------------------------------------------------------------
# a checkpoint is read, never run


class Trap:
    def __reduce__(self):
        return exec, ("open('sprung', 'w')",)


def test_a_pickled_state_is_refused_and_its_code_does_not_run(tiny, capsys):
    nanorl.main([*RL, "--steps", "2", "--max-new", "5"])
    state = Path("runs/rl/ckpt/step_2/state_0_of_1.pt")
    whole = state.read_bytes()
    for write, words in [(torch.save, "Reading it would run code"), (None, "is damaged"),
    (pickle, "is damaged")]:
        if write is torch.save:
            torch.save({"kept": Trap()}, state)
        else:
            state.write_bytes(pickle.dumps(Trap()) if write else whole[:2000])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            nanorl.main([*RL, "--steps", "2", "--max-new", "5", "--resume"])
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stopped.value.code == 2 and len(error) == 1 and words in error[0] and str(state) in error[0]
        assert not Path("sprung").exists()
    GPT = train_gpt.GPT
    assert GPT.from_hf(hf.find("runs/rl")), "--init and --model read the weights alone"


def test_a_folder_of_pickled_weights_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text("{}")
    torch.save(Trap(), "theirs/pytorch_model.bin")
    assert "no .safetensors" in refusal(capsys, evaluate.main, ["--model", "theirs", "--device", "cpu"])
    assert not Path("sprung").exists()


def test_a_state_is_plain():
    state = {"a": np.float64(0.5), "b": [np.arange(3), (np.bool_(True), None)], 3: {"c": torch.ones(2)}}
    plain = files.plain(state)
    assert plain["a"] == 0.5 and type(plain["a"]) is float
    assert plain["b"] == [[0, 1, 2], (True, None)] and plain[3]["c"] is state[3]["c"]
    with pytest.raises(TypeError, match=r"state\.x\[1\] is a set"):
        files.plain({"x": [1, {2}]})


# -----------------------------------------------------------------------------
# the date of a chat template


def asking(folder):
    """a Hugging Face folder whose chats begin with today's date, and a model for it"""
    tok = data.tokenizer("bytes")
    shape = train_gpt.GPTConfig(tok.vocab_size, 2, 2, 1, 16, 32, 48, 256, 10000.0)
    train_gpt.GPT(shape).init_weights(0).save_hf(folder, tok)
    (folder / "nanorl_tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%d %b %Y') }} " + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


class Day(date):
    now = "2026-01-31"

    @classmethod
    def today(cls):
        return cls.fromisoformat(cls.now)


def test_the_date_of_a_chat_is_the_day_on_which_the_run_began(tmp_path, monkeypatch, capsys):
    """resumed after midnight, a run trained on other prompts than before, and no file knew"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "date", Day)
    monkeypatch.setattr(sys.modules["data.tokenizer"], "date", Day)
    asking(tmp_path / "base")
    chats = [[dict(role="user", content=f"{i}+1"),
    dict(role="assistant", content=str(i + 1))] for i in range(9)]
    Path("chat.jsonl").write_text("".join(json.dumps(dict(messages=chat)) + "\n" for chat in chats))
    argv = ("--init base --data chat.jsonl --steps 2 --batch 2 --eval-docs 2 --device cpu "
            "--name tuned").split()
    train_gpt.main(argv)
    assert json.loads(Path("runs/tuned/config.json").read_text())["date"] == "2026-01-31"
    assert "31 Jan 2026" in Path("runs/tuned/log.txt").read_text()
    monkeypatch.setattr(Day, "now", "2026-02-01")
    train_gpt.main([*argv, "--resume"])          # a finished run: only its samples are shown again
    assert json.loads(Path("runs/tuned/config.json").read_text())["date"] == "2026-01-31"
    assert "Feb" not in Path("runs/tuned/log.txt").read_text()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train_gpt.main([*argv, "--resume", "--date", "2026-02-01"])
    assert "--date was 2026-01-31, is 2026-02-01" in capsys.readouterr().err
    train_gpt.main([*argv[:-1], "again", "--date", "2026-01-31"])
    same = [Path(f"runs/{name}/ckpt/step_2/model.safetensors").read_bytes() for name in ("tuned", "again")]
    assert same[0] == same[1]


def test_a_date_that_no_template_asks_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = SimpleNamespace(date="2026-01-31")
    error = refusal(capsys, run.with_date, config, data.tokenizer("chars"), True)
    assert "--date 2026-01-31 has no effect: its chat template asks for no date" in error


# -----------------------------------------------------------------------------
# tiny runs


def quiet(*args, **more):
    return None


class Here:
    """reward workers without processes: the share of digits, for any other reward of letters"""

    def __init__(self, spec, workers=1):
        self.spec = spec
        self.done = []
        self.failed = {}
        self.log = print

    def put(self, key, problem, text):
        wanted = "0123456789" if self.spec in ("my.py:score", "countdown") else "aeiouAEIOU+-*/"
        self.done.append((key, sum(c in wanted for c in text) / 8, None))

    def get(self, block=False):
        done = self.done
        self.done = []
        return done

    def forget(self):
        self.done = []

    close = forget


@pytest.fixture
def tiny(tiny_base, monkeypatch):
    """a random model in ./base, another in ./other; rewards in this process; no pictures"""
    tiny_base(12)
    model = train_gpt.GPT.from_hf("base")
    for p in model.parameters():
        p.data.mul_(1.2)
    model.save_hf(Path("other"), data.tokenizer("chars"))
    rows = [dict(prompt=f"what is {i}:", gold=str(i)) for i in range(12)]
    Path("golds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("other.jsonl").write_text(Path("my.jsonl").read_text().replace("question", "Q"))
    Path("text.txt").write_text("some words, " * 1800)
    for module in (stages, evaluate, opd_check):
        monkeypatch.setattr(module, "Rewards", Here)
    monkeypatch.setattr(stages, "check", quiet)
    monkeypatch.setattr(stages.view, "pages", quiet)
    monkeypatch.setattr(train_gpt, "show", quiet)
    monkeypatch.setattr(run, "_git", quiet)
    monkeypatch.setattr("os.fsync", quiet)


class Numbers(Letters):
    """other questions, and another answer"""

    def problems(self, split, n, seed):
        return [Problem(f"ask {split} {i + seed}:", str(i % 2), i) for i in range(n)]

    def answer(self, text):
        return str(ord(text[0]) % 2) if text else None


def load(name, found=data.load):
    return {"letters": Letters, "numbers": Numbers}[name]() if name in ("letters", "numbers") else found(name)


TINY = dict(
    nanorl=shlex.join(RL),
    ttrl="--init base --task letters --device cpu --threads 1 --questions 4 --unseen-n 2 --prompts 4 "
         "--votes 6 --samples 4 --min-votes 2 --max-new 4 --passes 3 --eval-k 2 --row-tokens 128 "
         "--save-every 9 --lr 1e-2 --warmup 1 --patience 0 --scattered 0",
    opd="--init base --teacher other --data my.jsonl --reward my.py:score --device cpu --threads 1 "
        "--prompts 3 --n 2 --max-new 6 --steps 2 --row-tokens 128 --eval-n 2 --eval-k 2 --final-n 2 "
        "--eval-every 1 --save-every 9 --lr 1e-2 --warmup 1 --workers 1 --slots 4",
    train_gpt="--data arith --tokenizer chars --n-layer 1 --n-head 2 --n-kv-head 1 --head-dim 8 --d-model 16 "
              "--d-ff 24 --steps 3 --batch 3 --eval-docs 3 --eval-every 1 --save-every 9 --device cpu "
              "--threads 1",
    evaluate="--model base --task countdown --n 3 --k 2 --max-new 6 --device cpu --threads 1 --workers 1",
    rollout="--model base --prompt 12 --max-new 9 --device cpu",
    opd_check="--student base --teacher other --n 2 --samples 2 --max-new 6 --cuts 2 --device cpu "
              "--threads 1",
)
TIMES = re.compile(r"t_\w+|\w*tok_s|tokens_per_second|seconds")


def results(script, words):
    """A tiny run. -> its numbers without times; {file: content} of its checkpoints and of --out"""
    for folder in ("runs", "out"):
        shutil.rmtree(folder, ignore_errors=True)
    Path("out").mkdir()
    said = io.StringIO()
    with redirect_stdout(said):
        found = SCRIPTS[script].main(shlex.split(f"{TINY[script]} {words}"))
    if script == "rollout":
        return said.getvalue(), {}
    if found is None:
        texts = [p.read_text() for p in Path().glob("runs/**/metrics.jsonl")]
        found = [json.loads(line) for text in texts for line in text.splitlines()]
        found = [{k: v for k, v in row.items() if not TIMES.fullmatch(k)} for row in found]
    files = {}
    for path in [*Path().glob("runs/**/*"), *Path().glob("out/*")]:
        if path.is_file() and (path.parts[0] == "out" or {"ckpt", "best"} & set(path.parts)):
            files[str(path)] = b"" if path.suffix == ".pt" else path.read_bytes()    # a state knows times
    return json.dumps(found, sort_keys=True), files


# -----------------------------------------------------------------------------
# what each field changes: metrics, files, time or memory. A setting under which it can be seen in a
# tiny run, beside what both runs are given; or, where a tiny run cannot show it, the reason in words

PLACES = dict(
    device=("time", "where it runs"), threads=("time", "of the CPU's products"),
    slots=("time", "how many sequences are decoded at once; results do not depend on it"),
    workers=("time", "rewards are scored side by side"),
    dtype=("metrics", "--dtype bf16"), wandb=("files", "curves go to another place, too"))
COMMON_EFFECTS = PLACES | dict(
    name=("files", "--name another"), init=("metrics", "--init other"),
    task=("metrics", "--task arith", "--data= --reward="),
    tokens=("metrics", "--tokens 1"), minutes=("metrics", "--minutes 1e-9"),
    prompts=("metrics", "--prompts 2"), max_new=("metrics", "--max-new 5"),
    top_p=("metrics", "--top-p 0.5"),
    tis=("metrics", "--tis 1", "--tail-batching continue --more-prompts 3 --lr 0.1 --steps 4"),
    lr=("metrics", "--lr 1e-3"), muon_lr=("metrics", "--muon-lr 1e-2"), warmup=("metrics", "--warmup 3"),
    decay=("metrics", "--decay 1", "--steps 3"), weight_decay=("metrics", "--weight-decay 9"),
    clip=("metrics", "--clip 1e-4", "--steps 3 --muon-lr 0 --decay 0"),
    row_tokens=("memory", "of one forward and backward; results differ by rounding alone"),
    save_every=("files", "--save-every 1"), seed=("metrics", "--seed 1"),
    date=("metrics", "of chats with a template that asks: test_the_date_of_a_chat..."),
    checkpoint=("memory", "activations are computed again in the backward"),
    offload=("memory", "of the device: it is the host's"),
    grads=("memory", "of gradients, with several ranks"),
    deterministic=("time", "of a GPU, where repeatable sums are slower"),
    parity=("metrics", "sampler_kl on a GPU is 0: test_parity_of_sampler_and_trainer"),
    resume=("files", "continues those that are there: test_..resumed_equals_never_stopped"))
SECOND = "--epochs 3 --lr 1e-2 --decay 0 --max-new 12"             # ratios leave 1
ALGO_EFFECTS = dict(
    algo=("metrics", "--algo grpo"), baseline=("metrics", "--baseline group"),
    ratio=("metrics", "--ratio sequence", SECOND), trust=("metrics", "--trust none", SECOND),
    clip_low=("metrics", "--clip-low 0", SECOND), clip_high=("metrics", "--clip-high 0", SECOND),
    aggregate=("metrics", "--aggregate sequence", "--max-new 30"),
    length_power=("metrics", "--length-power 0", "--aggregate length"),
    power=("metrics", "--power 5", f"--ratio power {SECOND} --power-end 1"),
    power_end=("metrics", "--power-end 5", f"--ratio power {SECOND} --steps 3"),
    kl_coef=("metrics", "--kl-coef 1"), reference_at=("memory", "of the reference between two uses"),
    cov=("metrics", "--cov kl --cov-share 0.5", SECOND),
    cov_share=("metrics", "--cov-share 0.9", f"--cov kl {SECOND}"),
    cov_coef=("metrics", "--cov-coef 9", f"--cov kl --cov-share 0.5 {SECOND}"),
    entropy_coef=("metrics", "--entropy-coef 1"), entropy_target=("metrics", "--entropy-target 9"),
    overlong=("metrics", "--overlong 3"),
    temperature=("metrics", "--temperature 2"))
EVAL_EFFECTS = dict(eval_every=("metrics", "--eval-every 0"), eval_n=("metrics", "--eval-n 1"),
                    eval_k=("metrics", "--eval-k 3"), final_n=("metrics", "--final-n 1", "--data= --reward="))
LOOP_EFFECTS = dict(
    data=("metrics", "--data other.jsonl"), reward=("metrics", "--reward my.py:other"),
    steps=("metrics", "--steps 3"), n=("metrics", "--n 4"), problems=("metrics", "--problems 3"))
REFUSED = ("refused", "one update per rollout: every ratio is 1")

EFFECTS = dict(
    nanorl=COMMON_EFFECTS | ALGO_EFFECTS | EVAL_EFFECTS | LOOP_EFFECTS | dict(
        epochs=("metrics", "--epochs 2"), minibatch=("metrics", "--minibatch 1"),
        dynamic=("metrics", "--dynamic", "--max-new 1 --n 2"),
        reset_every=("metrics", "--reset-every 1", "--kl-coef 1"),
        reset_patience=("metrics", "--reset-patience 1", "--kl-coef 1 --steps 6"),
        tail_batching=("metrics", "--tail-batching prompt"),
        more_prompts=("metrics", "--more-prompts 3", "--tail-batching prompt"),
        more_samples=("metrics", "--more-samples 3", "--tail-batching race"),
        stream=("metrics", "--stream", "--no-deterministic"), dry_run=("files", "--dry-run"),
        card=("files", "of --dry-run, which writes none"),
        host=("files", "of --dry-run, which writes none")),
    ttrl=COMMON_EFFECTS | ALGO_EFFECTS | dict(
        preset=("metrics", "a set of flags: test_presets_are_the_papers"), task=("metrics", "--task numbers"),
        split=("metrics", "--split train"), data=("metrics", "--data golds.jsonl"),
        questions=("metrics", "--questions 3"), unseen=("metrics", "--unseen numbers"),
        unseen_n=("metrics", "--unseen-n 3"), votes=("metrics", "--votes 5"),
        samples=("metrics", "--samples 3"),
        min_votes=("metrics", "--min-votes 6"), reward=("metrics", "--reward random"),
        judge=("metrics", "--judge soft"),
        abstain_share=("metrics", "--abstain-share 1", "--judge abstain --abstain-entropy 1"),
        abstain_entropy=("metrics", "--abstain-entropy 0", "--judge abstain"),
        prompts=("metrics", "--prompts 2"),
        passes=("metrics", "--passes 2"),
        patience=("metrics", "--patience 1 --settled 1", "--lr 0 --passes 6"),
        settled=("metrics", "--settled 1", "--patience 1 --lr 0 --passes 4"),
        scattered=("metrics", "--scattered 1"),
        eval_k=("metrics", "--eval-k 3"),
        eval_temperature=("metrics", "--eval-temperature 0"), eval_top_p=("metrics", "--eval-top-p 0.1"),
        ratio=REFUSED, trust=REFUSED, clip_low=REFUSED, clip_high=REFUSED, power=REFUSED, power_end=REFUSED,
        cov_coef=("refused", "one update per rollout: cov kl has no gradient"),
        cov=("metrics", "clip marks what is in its band, and a tiny run has nothing there"),
        cov_share=("metrics", "the same"),
        tis=("metrics", "it caps a weight that only rounding, bf16 or --top-p moves from 1")),
    opd=COMMON_EFFECTS | EVAL_EFFECTS | LOOP_EFFECTS | dict(
        teacher=("metrics", "--teacher base"), loss=("metrics", "--loss full"),
        k=("metrics", "--k 2", "--loss tail"), baseline_k=("metrics", "--baseline-k 4"),
        divergence=("metrics", "--divergence forward", "--loss full"),
        beta=("metrics", "--beta 0.1", "--loss full --divergence jsd"), bound=("metrics", "--bound 1e-3"),
        control=("metrics", "--control sft"), context=("metrics", "--context gold", "--data golds.jsonl"),
        context_text=("metrics", "--context-text '{prompt}{context}'", "--context gold --data golds.jsonl"),
        reward_coef=("metrics", "--reward-coef 9"), kl_coef=("metrics", "--kl-coef 9"),
        reference_at=("memory", "of the reference between two uses"),
        gold=("metrics", "--gold task", "--data golds.jsonl"),
        gold_share=("metrics", "--gold-share 2", "--gold task --data golds.jsonl"),
        mask_special=("metrics", "--mask-special", "--max-new 20"),
        eos_class=("metrics", "where the two stop by different ids: test_stop_ids_are_one_action"),
        horizon=("metrics", "--horizon 3"), horizon_steps=("metrics", "--horizon-steps 2", "--horizon 3"),
        teacher_at=("memory", "of the teacher between two updates"), look_k=("metrics", "--look-k 2"),
        repeat_n=("metrics", "--repeat-n 1"), guard=("metrics", "of six steps and more: test_guard"),
        guard_rise=("metrics", "of six steps and more: test_guard"),
        temperature=("metrics", "--temperature 2"),
        tis=("metrics", "it caps a weight that only rounding, bf16 or --top-p moves from 1")),
    train_gpt=PLACES | dict(
        name=("files", "--name another"), preset=("metrics", "a set of flags: test_our_own_commands_start"),
        data=("metrics", "--data countdown"), tokenizer=("metrics", "--tokenizer numbers"),
        init=("metrics", "--init base", "STANDARD"), steps=("metrics", "--steps 4"),
        minutes=("metrics", "--minutes 1e-9"),
        batch=("metrics", "--batch 4"),
        row_tokens=("memory", "of one forward and backward"),
        seq_len=("metrics", "--seq-len 9", "--data text.txt"), n_layer=("metrics", "--n-layer 2"),
        n_head=("metrics", "--n-head 4"), n_kv_head=("metrics", "--n-kv-head 2"),
        head_dim=("metrics", "--head-dim 4"),
        d_model=("metrics", "--d-model 24"), d_ff=("metrics", "--d-ff 16"), max_len=("files", "--max-len 99"),
        rope_theta=("metrics", "--rope-theta 9"), tie_embeddings=("metrics", "--tie-embeddings"),
        lr=("metrics", "--lr 1e-3"), muon=("metrics", "--no-muon"), muon_lr=("metrics", "--muon-lr 1"),
        weight_decay=("metrics", "--weight-decay 9"), clip=("metrics", "--clip 1e-4"),
        temperature=("metrics", "--temperature 2"), warmup=("metrics", "--warmup 1"),
        decay=("metrics", "--decay 0"), prompts=("metrics", "--prompts"),
        eval_every=("metrics", "--eval-every 3"), eval_docs=("metrics", "--eval-docs 2"),
        save_every=("files", "--save-every 1"), target=("files", "a line of log.txt at the end"),
        seed=("metrics", "--seed 1"), date=("metrics", "of chats: test_the_date_of_a_chat..."),
        checkpoint=("memory", "activations are computed again in the backward"),
        offload=("memory", "of the device: it is the host's"),
        grads=("memory", "of gradients, with several ranks"),
        compile=("time", "torch.compile the blocks"), deterministic=("time", "of a GPU"),
        resume=("files", "continues those that are there: test_resumed_equals_never_stopped_bit_for_bit")),
    evaluate=PLACES | dict(
        dtype=("memory", "of the weights"), model=("metrics", "--model other"),
        task=("metrics", "--task arith"), reward=("metrics", "--reward my.py:other"),
        split=("metrics", "--split valid"), n=("metrics", "--n 4"), k=("metrics", "--k 3"),
        max_new=("metrics", "--max-new 5"), temperature=("metrics", "--temperature 0"),
        top_p=("metrics", "--top-p 0.1"),
        seed=("metrics", "--seed 1", "--split train"), out=("files", "--out out/texts.jsonl")),
    rollout=dict(
        model=("metrics", "--model other"), prompt=("metrics", "--prompt 21"),
        chat=("metrics", "a talk: it asks for words"),
        n=("metrics", "--n 2"), max_new=("metrics", "--max-new 5"),
        temperature=("metrics", "--temperature 0"),
        top_p=("metrics", "--top-p 0.1"), top_k=("metrics", "--top-k 1"), seed=("metrics", "--seed 1"),
        device=PLACES["device"]),
    opd_check=PLACES | dict(
        dtype=("memory", "of the weights"), student=("metrics", "--student other --teacher base"),
        teacher=("metrics", "--teacher base"),
        task=("metrics", "--task arith"), n=("metrics", "--n 3"), samples=("metrics", "--samples 3"),
        max_new=("metrics", "--max-new 5"), k=("metrics", "--k 2"),
        cuts=("metrics", "--cuts 1", "--max-new 16"),
        shortest=("metrics", "of texts above 512 tokens: test_verdicts"),
        tokens=("metrics", "a line about the cost"),
        seed=("metrics", "--seed 1", "--task arith"), row_tokens=("memory", "of one forward")),
)
STANDARD = "--tokenizer numbers --n-layer 3 --n-head 6 --n-kv-head 2 --head-dim 16 --d-model 96 --d-ff 256"
# a loop is run for the fields of its own; those that all loops share are seen in nanorl.py
SHARED = {"ttrl": COMMON_EFFECTS | ALGO_EFFECTS,
          "opd": COMMON_EFFECTS | EVAL_EFFECTS | LOOP_EFFECTS}
SEEN = [(script, name) for script, rows in EFFECTS.items() for name, row in rows.items()
        if row[1].startswith("--") and row is not SHARED.get(script, {}).get(name)]


def test_every_field_changes_something_and_it_is_written_which():
    for script, name in FIELDS:
        kind, how, *_ = EFFECTS[script][name]
        assert kind in ("metrics", "files", "time", "memory", "refused") and how, (script, name)


@pytest.fixture(scope="module")
def seen():
    """(script, words that both runs are given) -> what the run without the field left"""
    return {}


@pytest.mark.parametrize("script, name", SEEN)
def test_what_a_field_changes(tiny, monkeypatch, seen, script, name):
    monkeypatch.setattr(data, "load", load)
    kind, setting, *beside = EFFECTS[script][name]
    both = " ".join(beside).replace("STANDARD", STANDARD)
    if (script, both) not in seen:
        seen[script, both] = results(script, both)
    numbers, files = results(script, f"{both} {setting}")
    if kind == "metrics":
        assert numbers != seen[script, both][0], f"{script}.py {both} {setting}"
    else:
        assert files != seen[script, both][1], f"{script}.py {both} {setting}"
