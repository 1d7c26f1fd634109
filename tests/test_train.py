"""pretraining and fine-tuning: smoke runs of the script, exact resume, two ranks equal to one,
what is trained, bad input"""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import train_gpt
from common import cpu
from common.optim import Optimizer
from train_gpt import GPT, Config, documents

ROOT = Path(__file__).resolve().parent.parent
TINY = ("--n-layer 2 --d-model 32 --n-head 2 --n-kv-head 1 --head-dim 16 --d-ff 48 "
        "--tokenizer chars --batch 16 --row-tokens 512 --eval-docs 16 --device cpu").split()


def run(tmp_path, monkeypatch, *argv):
    monkeypatch.chdir(tmp_path)
    train_gpt.main([*TINY, *argv])


def weights(folder):
    return {k: v for k, v in GPT.from_hf(folder).state_dict().items()}


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_script_trains_samples_and_leaves_a_folder(tmp_path):
    """a smoke run in a subprocess, as a user types it"""
    done = subprocess.run([sys.executable, ROOT / "train_gpt.py", *TINY,
                           "--steps", "6", "--eval-every", "3", "--threads", "1"],
                          cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/base"
    assert {"config.json", "metrics.jsonl", "log.txt", "curves.png",
            "ckpt"} <= {p.name for p in folder.iterdir()}
    metrics = rows(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert metrics[-1]["loss"] < metrics[0]["loss"] and "eval/bpb" in metrics[2]
    assert "->" in done.stdout and "bits/byte" in done.stdout
    assert "def packed_rows" in (folder / "log.txt").read_text(), (
        "the log begins with the source that made the run")


def test_resumed_equals_never_stopped_bit_for_bit(tmp_path, monkeypatch):
    """rung 11: stop after 4 of 8 steps, go on, compare weights, optimizer state and every logged loss"""
    common = ["--steps", "8", "--save-every", "4", "--eval-every", "4"]
    run(tmp_path, monkeypatch, "--name", "whole", *common)
    stop_after(4, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, monkeypatch, "--name", "parts", *common)
    assert stopped.value.code == 130
    monkeypatch.undo()
    run(tmp_path, monkeypatch, "--name", "parts", *common, "--resume")
    a, b = tmp_path / "runs/whole", tmp_path / "runs/parts"
    one, two = weights(a / "ckpt/step_8"), weights(b / "ckpt/step_8")
    assert all(torch.equal(one[k], two[k]) for k in one)
    states = [torch.load(d / "ckpt/step_8/state_0_of_1.pt")["optimizer"]["pieces"] for d in (a, b)]
    assert all(torch.equal(states[0][n]["m"], states[1][n]["m"]) for n in states[0])
    assert [m["loss"] for m in rows(a / "metrics.jsonl")] == [m["loss"] for m in rows(b / "metrics.jsonl")]


def stop_after(step, monkeypatch):
    stopping = train_gpt.Run.stopping
    calls = []
    monkeypatch.setattr(train_gpt.Run, "stopping",
                        lambda self: calls.append(1) or stopping(self) or len(calls) == step)


SCRIPT = "import sys, train_gpt; train_gpt.main(sys.argv[1:])"


def test_two_ranks_equal_one_and_a_run_moves_between_them(tmp_path, ranks, one_process):
    """rung 9 on the whole script: the global batch is the same documents however many ranks share
    it. Then two ranks take up what one left, resharded, and end where one would have"""
    common = [*TINY, "--steps", "4", "--save-every", "2", "--eval-every", "4",
              "--lr", "1e-3", "--muon-lr", "3e-3"]
    one_process(SCRIPT, "--name", "one", *common)
    ranks(2, SCRIPT, "--name", "two", *common)
    one, two = (weights(tmp_path / f"runs/{n}/ckpt/step_4") for n in ("one", "two"))
    # without the CPU's tricks a product's sums depend on its rows, and Muon enlarges that where a
    # singular value is small
    assert all(torch.allclose(one[k], two[k], atol=2e-4 if cpu.ON else 1e-3) for k in one)
    a, b = ([m["loss"] for m in rows(tmp_path / f"runs/{n}/metrics.jsonl")] for n in ("one", "two"))
    assert np.allclose(a, b, rtol=1e-4)
    for path in (tmp_path / "runs/one/ckpt/step_4").iterdir():       # as if it had been stopped after step 2
        path.unlink()
    (tmp_path / "runs/one/ckpt/step_4").rmdir()
    ranks(2, SCRIPT, "--name", "one", *common, "--resume")
    moved = weights(tmp_path / "runs/one/ckpt/step_4")
    assert all(torch.allclose(one[k], moved[k], atol=2e-4) for k in one)


def test_steps_is_the_loop_that_the_script_runs(tmp_path, monkeypatch):
    """an idea about pretraining stands on scratch() and steps(): with nothing changed they are
    the script, bit for bit"""
    monkeypatch.chdir(tmp_path)
    train_gpt.main("--preset small --steps 2 --device cpu --eval-docs 8".split())
    model, document = train_gpt.scratch("small")
    optimizer = Optimizer(model, lr=document.config.lr, muon_lr=document.config.muon_lr,
                          weight_decay=document.config.weight_decay)
    found = list(train_gpt.steps(model, document, optimizer, 2))
    ours, theirs = model.state_dict(), weights(tmp_path / "runs/small/ckpt/step_2")
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)
    metrics = rows(tmp_path / "runs/small/metrics.jsonl")
    assert found == [(m["step"], m["loss"]) for m in metrics]
    document.config.eval_docs = 8
    assert train_gpt.evaluate(model, document) == dict(loss=metrics[-1]["eval/loss"],
                                                       bpb=metrics[-1]["eval/bpb"])


def test_what_an_idea_may_change_in_a_step():
    """the gradient that it is shown is the mean, before clipping; its schedule and its loss
    count, the latter as a sum"""
    def train(**changes):
        model, document = train_gpt.scratch("small")
        document.config.batch = 4
        before = {k: v.clone() for k, v in model.state_dict().items()}
        numbers = {}
        for _, loss in train_gpt.steps(model, document, Optimizer(model), 1, numbers=numbers, **changes):
            numbers["loss"] = loss
        return numbers, {k: v - before[k] for k, v in model.state_dict().items()}

    def shown(model):
        norms.append(float(torch.stack([p.grad.square().sum() for p in model.parameters()]).sum().sqrt()))

    norms = []
    plain, moved = train()
    same, moved_too = train(gradient=shown)
    assert np.isclose(norms[0], plain["grad_norm"], rtol=1e-5)
    assert np.isclose(same["grad_norm"], plain["grad_norm"], rtol=1e-5)
    assert all(torch.allclose(moved[k], moved_too[k], atol=1e-5) for k in moved)
    assert any(v.any() for v in moved.values())
    flat, unmoved = train(gradient=lambda model: [p.grad.zero_() for p in model.parameters()])
    assert flat["grad_norm"] == 0 and not any(v.any() for v in unmoved.values())
    still, unmoved = train(schedule=lambda step: 0.0)
    assert still["lr"] == 0 and still["grad_norm"] == plain["grad_norm"]
    assert not any(v.any() for v in unmoved.values())
    twice, _ = train(loss=lambda model, row: 2 * train_gpt.forward(model, row))
    assert twice["loss"] == 2 * plain["loss"]
    assert np.isclose(twice["grad_norm"], 2 * plain["grad_norm"], rtol=1e-5)


def test_the_stop_token_is_trained():
    """a trainer that masks by the id of the padding also masks the stop token when the two share
    an id; the model then learns every word of an answer and never that it ends. Here a document's
    last trained token is its stop token"""
    tok = data.tokenizer("chars")
    document, _ = documents(Config(data="countdown"), tok)
    tokens, trained = document("train", 0)
    assert tokens[-1] in tok.stop and trained[-1]
    assert not trained[0] and documents(Config(data="countdown", prompts=True), tok)[0]("train", 0)[1][0]


def test_rows_lose_nothing_and_predict_the_next_token():
    docs = [(list(range(10 * n, 10 * n + n + 1)), [False] + [True] * n) for n in range(1, 9)]
    seen = []
    for tokens, positions, at, targets, cu in train_gpt.packed_rows(docs, 16, "cpu"):
        assert cu[-1] == len(tokens) <= 16
        assert (positions[[c for c in cu[:-1]]] == 0).all()
        assert torch.equal(tokens[at + 1], targets)
        seen += [tuple(tokens[a:b].tolist()) for a, b in zip(cu, cu[1:])]
    assert sorted(seen) == sorted(tuple(t) for t, _ in docs)


def test_chats_train_only_the_assistant(tmp_path):
    path = tmp_path / "chat.jsonl"
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "and"), ("assistant", "no")]
    chat = [dict(role=role, content=content) for role, content in turns]
    path.write_text(json.dumps(dict(messages=chat)) + "\n")
    tok = data.tokenizer("chars")
    tokens, trained = documents(Config(data=str(path)), tok)[0]("train", 0)
    assert tok.decode([t for t, on in zip(tokens, trained) if on]) == "yes<|end|>no<|end|>"
    assert tok.decode(tokens) == tok.chat(chat)


def test_fine_tuning_starts_from_a_run(tmp_path, monkeypatch):
    run(tmp_path, monkeypatch, "--steps", "2", "--name", "first")
    path = tmp_path / "chat.jsonl"
    chats = [[dict(role="user", content=f"{i}+1"), dict(role="assistant", content=str(i + 1))]
             for i in range(40)]
    path.write_text("".join(json.dumps(dict(messages=chat)) + "\n" for chat in chats))
    train_gpt.main(["--steps", "3", "--name", "second", "--init", "runs/first", "--data", str(path),
                    "--batch", "16", "--no-muon", "--lr", "1e-3", "--device", "cpu"])
    assert (rows(tmp_path / "runs/second/metrics.jsonl")[-1]["loss"]
            < rows(tmp_path / "runs/second/metrics.jsonl")[0]["loss"])


def shard(path, n, vocab=50257, header=None):
    head = np.zeros(256, dtype=np.int32)
    head[:3] = 20240520, 1, n if header is None else header
    tokens = (np.random.default_rng(0).zipf(1.3, n) % vocab).astype(np.uint16)
    path.write_bytes(head.tobytes() + tokens.tobytes())
    return tokens


def test_gpt2_preset_takes_twenty_steps_on_synthetic_shards(tmp_path, monkeypatch):
    """the preset's own flags, its model made small; the vocabulary stands in for gpt2's, which
    needs a download"""
    folder = tmp_path / "fineweb"
    folder.mkdir()
    shard(folder / "fineweb_train_000001.bin", 6000, vocab=100)
    shard(folder / "fineweb_val_000000.bin", 3000, vocab=100)
    run(tmp_path, monkeypatch, "--preset", "gpt2", "--data", str(folder),
        "--steps", "20", "--seq-len", "64", "--batch", "4", "--eval-every", "20")
    metrics = rows(tmp_path / "runs/gpt2/metrics.jsonl")
    assert len(metrics) == 20 and metrics[-1]["loss"] < metrics[0]["loss"]
    assert "target 3.28" in (tmp_path / "runs/gpt2/log.txt").read_text()


def test_windows_visit_every_token_of_every_shard_once(tmp_path):
    parts = [shard(tmp_path / f"train_{i}.bin", n) for i, n in enumerate((1000, 517))]
    shard(tmp_path / "val_0.bin", 300)
    document, count = documents(Config(data=str(tmp_path), seq_len=100), None)
    assert count == 9 + 5
    windows = [document("train", i)[0] for i in range(count)]
    assert [t for w in windows for t in w[1:]] == [*parts[0][1:901].tolist(), *parts[1][1:501].tolist()]
    assert document("train", count) == document("train", 0)


def bad(tmp_path, monkeypatch, capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, monkeypatch, *argv)
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and error[0].startswith("error: "), error
    return error[0]


@pytest.mark.parametrize("argv, words", [
    (["--stesp", "3"], "--steps"),
    (["--steps", "-1"], "--steps"),
    (["--steps", "0"], "--steps"),
    (["--data", "nothere.txt"], "nothere.txt"),
    (["--data", "nothere"], "unknown task"),
    (["--data", "short.txt", "--tokenizer", "bytes"], "--seq-len"),
    (["--data", "empty.jsonl"], "is empty"),
    (["--data", "bad.jsonl"], "line 2"),
    (["--data", "half.bin"], "cut short"),
    (["--init", "nowhere"], "nowhere"),
    (["--tokenizer", "charz"], "chars"),
    (["--n-head", "3", "--n-kv-head", "2"], "--n-kv-head"),
    (["--head-dim", "15"], "--head-dim"),
])
def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys, argv, words):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n{"messages": \n')
    shard(tmp_path / "half.bin", 400, header=500)
    assert words in bad(tmp_path, monkeypatch, capsys, *argv)
    assert not (tmp_path / "runs").exists(), "nothing half-written"


def test_a_checkpoint_of_another_config_is_refused(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, "--steps", "2")
    capsys.readouterr()
    assert "--d-ff was 48, is 64" in bad(tmp_path, monkeypatch, capsys,
                                         "--steps", "2", "--d-ff", "64", "--resume")
    assert "--resume" in bad(tmp_path, monkeypatch, capsys, "--steps", "2")


def test_pretraining_that_diverged_ends_in_one_line(tmp_path, monkeypatch, capsys):
    def stuck(self, **settings):
        raise FloatingPointError("the gradient was not finite 5 steps in a row")
    monkeypatch.setattr(train_gpt.Optimizer, "step", stuck)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, monkeypatch)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: step 1: the gradient was not finite 5 steps in a row. runs/base stays as its last "
        "checkpoint left it")


def test_a_loss_at_a_temperature_ends_sharper(tmp_path, monkeypatch):
    """the same steps at --temperature 3: what is sampled at 1 is less uncertain, which no division of
    the loss could do, since Adam would not notice it"""
    entropy = {}
    for temperature in (1, 3):
        run(tmp_path, monkeypatch, "--data", "countdown", "--steps", "40", "--lr", "1e-2", "--threads", "1",
            "--temperature", str(temperature), "--name", f"at{temperature}")
        model = GPT.from_hf(tmp_path / f"runs/at{temperature}/ckpt/step_40")
        document, _ = documents(Config(data="countdown", tokenizer="chars"), data.tokenizer("chars"))
        docs = [document("valid", i) for i in range(32)]
        row = next(train_gpt.packed_rows(docs, 4096, torch.device("cpu")))
        tokens_T, positions_T, at_N, targets_N, cu = row
        with torch.no_grad():
            attend = train_gpt.packed_attention(cu, max(len(ids) for ids, _ in docs))
            hidden_ND = model(tokens_T, positions_T, attend)[at_N]
            entropy_N = train_gpt.linear_logprob(hidden_ND, model.head_weight, targets_N)[1]
        entropy[temperature] = float(entropy_N.mean())
    assert entropy[3] < 0.8 * entropy[1]
