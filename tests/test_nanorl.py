"""the RL loop: it learns, ranks, resume, resets, several updates a rollout, warnings, bad input
(losses: test_algorithms.py)"""
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import algos
import data
import nanorl
from bench import algorithms
from common import deal, run
from common.metrics import repeats, warnings
from common.run import newest
from nanorl import Config
from train_gpt import GPT

ROOT = Path(__file__).resolve().parent.parent


# -----------------------------------------------------------------------------
# the loop, on a random tiny model and a reward that has variance: how often the text says "1"


@pytest.fixture
def own(tiny_base):
    tiny_base(60)
    return ("--init base --data my.jsonl --reward my.py:score --device cpu "
            "--threads 1 --prompts 5 --n 4 --max-new 10 --steps 4 --row-tokens 128 --eval-n 4 "
            "--final-n 4 --eval-every 2 --save-every 2 --lr 1e-2 --warmup 1 --workers 1").split()


def metrics(name="rl"):
    return [json.loads(line) for line in Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()]


def weights(folder):
    return GPT.from_hf(folder).state_dict()


@pytest.mark.pictures
def test_own_prompts_and_reward_learn(own, capsys):
    """a task nobody wrote a file for; the contract's metrics; the sampler's log-probs are the
    trainer's (rung 13)"""
    nanorl.main([*own, "--steps", "12", "--eval-every", "0", "--prompts", "16"])
    m = metrics()
    assert m[-1]["reward"] > 1.5 * m[1]["reward"], "more digits than before"
    for key in ("step reward zero_var truncated length entropy sampler_kl "
                "t_rollout t_reward t_pack t_train t_opt t_idle test/avg").split():
        assert key in m[-1], key
    # the problems before and after are others than those on the way: one name for both would draw
    # a jump that no model made
    assert [row["step"] for row in m if "test/avg" in row] == [0, 12]
    assert [row["step"] for row in m if "eval/avg" in row] == [0]
    assert max(row["sampler_max"] for row in m[1:]) < 1e-5
    assert m[1]["t_rollout"] > 0 and m[1]["t_train"] > 0
    samples = [json.loads(line) for line in Path("runs/rl/samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 * 16
    assert {"step", "problem", "index", "prompt", "text", "pieces", "logprobs",
            "advantage", "reward", "finished"} == set(samples[0])
    assert Path("runs/rl/curves.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "reward" in out and out.index("before: avg@4") < out.index("after: avg@4")


@pytest.mark.parametrize("algo", algos.ALGORITHMS)
def test_every_row_learns(own, algo):
    """two updates a rollout: more digits than before, whatever clips and weights"""
    nanorl.main([*own, "--algo", algo, "--steps", "6", "--eval-every", "0",
                 "--save-every", "10", "--prompts", "16", "--minibatch", "8"])
    m = metrics()
    assert m[-1]["reward"] > 2 * m[1]["reward"]


def stop_after(step, monkeypatch):
    calls = []
    monkeypatch.setattr(run.Run, "stopping", lambda self: calls.append(1) or len(calls) == step)


@pytest.mark.parametrize("algo", [
    "--algo dr_grpo",
    "--algo prorl --kl-coef 0.1 --reset-every 2 --epochs 2 "
    "--minibatch 3 --cov kl --save-every 3 --reset-patience 1",
    "--algo holder --minibatch 2 --tokens 100000",
])
def test_resumed_equals_never_stopped_bit_for_bit(own, monkeypatch, algo):
    """rung 11: weights, moments, visits, the reference, what schedules count, and every number
    that is not a time"""
    own += algo.split()
    nanorl.main([*own, "--name", "whole"])
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(SystemExit) as stopped:
            nanorl.main([*own, "--name", "parts"])
    assert stopped.value.code == 130
    nanorl.main([*own, "--name", "parts", "--resume"])
    one, two = weights("runs/whole/ckpt/step_4"), weights("runs/parts/ckpt/step_4")
    assert all(torch.equal(one[k], two[k]) for k in one)

    def timeless(rows):
        return [{k: v for k, v in m.items() if not k.startswith("t_") and "tok_s" not in k} for m in rows]

    assert timeless(metrics("whole")) == timeless(metrics("parts"))


SCRIPT = "import sys, nanorl; nanorl.main(sys.argv[1:])"


@pytest.mark.parametrize("algo", [
    "--algo dapo",
    "--algo holder --minibatch 2 --cov clip --cov-share 0.1",
    "--algo prorl --kl-coef 0.1 --epochs 2 --cov kl --top-p 0.9",
])
def test_two_ranks_equal_one(own, ranks, one_process, algo):
    """rung 9: an odd number of prompts over two ranks, one rollout and one to three updates"""
    argv = [*own, *algo.split(), "--steps", "1", "--eval-every", "0", "--save-every", "1"]
    one_process(SCRIPT, *argv, "--name", "one")
    ranks(2, SCRIPT, *argv, "--name", "two")
    one, two = weights("runs/one/ckpt/step_1"), weights("runs/two/ckpt/step_1")
    start = weights("base")
    assert any(not torch.equal(one[k], start[k]) for k in one)
    assert all(torch.allclose(one[k], two[k], atol=5e-5) for k in one)
    a, b = metrics("one")[-1], metrics("two")[-1]
    assert all(math.isclose(a[k], b[k], rel_tol=1e-4)
               for k in ("reward", "length", "entropy", "zero_var", "grad_norm", "test/avg"))


def test_rewards_of_a_group_that_moved_are_nobodys(own, monkeypatch):
    """A group leaves while a sample of it is being scored, and is scored once more where it goes
    on. The first score must not reach whoever uses the workers next, an evaluation or another
    sampler: it knows nothing of that sample."""
    jobs = []                  # the newest first, one at a time, and none while rows are sampled

    def get(block=False):
        return [(jobs.pop(), 1.0, None)] if jobs and not rl.sampler.live else []

    config = nanorl.Config(init="base", device="cpu", threads=1, n=3, max_new=90,
                           row_tokens=512, eval_n=1, final_n=1, deterministic=False)
    rl = nanorl.setup(config, reward="my.py:score", task="my.jsonl")
    rl.workers.close()
    rl.workers = SimpleNamespace(put=lambda key, *_: jobs.append(key), get=get, forget=jobs.clear)
    store = torch.distributed.HashStore()
    rl.sampler.store = store
    step = rl.sampler.step

    def asked():                          # a rank asks, and is gone: what it asked for comes back
        if rl.sampler.steps_done == 31:
            store.add("rollout/5/requests", 1)
        return step()
    rl.sampler.step = asked
    monkeypatch.setattr(deal, "calls", iter([5]))
    groups = list(nanorl.collect(rl, rl.problems[:6], 3))
    assert {g[0].problem for g in groups} == {p.id for p in rl.problems[:6]}
    assert all([s.index for s in g] == [0, 1, 2] for g in groups)
    assert all(s.reward == 1 for g in groups for s in g), "nor does it stand for that of the copy"
    assert store.add("rollout/5/offers", 0) and not jobs and rl.sampler.live == 0


def test_the_stop_token_gets_gradient(own):
    """three projects masked the stop token that was sampled, because its id is also the
    padding's: their models never learned to stop. Here a reward for ending early makes ending
    early likelier"""
    Path("my.py").write_text("def score(problem, text):\n    return -len(text) / 10\n")
    nanorl.main([*own, "--steps", "10", "--prompts", "16", "--eval-every", "0"])
    m = metrics()
    assert m[-1]["length"] < 0.8 * m[1]["length"]


def test_rewards_that_are_all_equal_change_no_weight(own):
    Path("my.py").write_text("def score(problem, text):\n    return 1.0\n")
    nanorl.main([*own, "--steps", "2", "--eval-every", "0"])
    before, after = weights("base"), weights("runs/rl/ckpt/step_2")
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert metrics()[-1]["zero_var"] == 1


def test_dynamic_sampling_fills_the_batch_with_groups_that_differ(own):
    """a quarter of the problems always score the same; dapo drops their groups and takes others,
    and says how many"""
    Path("my.py").write_text("def score(problem, text):\n    return 1.0 "
                             "if int(problem.prompt[9:-1]) % 4 == 0 else sum(map(ord, text))\n")
    nanorl.main([*own, "--algo", "dapo", "--steps", "2", "--eval-every", "0"])
    for m in metrics()[1:]:
        assert m["groups"] > 5 and 0 < m["zero_var"] < 1
        assert math.isclose((1 - m["zero_var"]) * m["groups"], 5)


def test_several_updates_a_rollout(own):
    """5 prompts in minibatches of 2 are three updates, twice over six: a bigger move than one
    update's, and ratios that leave their clip"""
    nanorl.main([*own, "--steps", "1", "--eval-every", "0", "--name", "one"])
    nanorl.main([*own, "--steps", "1", "--eval-every", "0", "--name", "six",
                 "--minibatch", "2", "--epochs", "2"])
    far = {name: sum(float((w - b).abs().sum())
                     for w, b in zip(weights(f"runs/{name}/ckpt/step_1").values(), weights("base").values()))
           for name in ("one", "six")}
    assert far["six"] > 1.5 * far["one"]
    assert metrics("one")[-1]["clipped"] == 0 < metrics("six")[-1]["clipped"]


def test_reference_is_reset_when_held_out_accuracy_stalls(own, capsys):
    """a reward that nothing improves: the second evaluation is no better than the first, so the
    policy becomes its own reference"""
    Path("my.py").write_text("def score(problem, text):\n    return sum(map(ord, text)) % 7 / 100\n")
    nanorl.main([*own, "--steps", "5", "--algo", "prorl", "--kl-coef", "0.5", "--eval-every", "1",
                 "--reset-every", "0", "--reset-patience", "2", "--lr", "1e-9"])
    m = metrics()
    values = [row["eval/avg"] for row in m[1:-1]]
    assert capsys.readouterr().out.count("its own reference") >= 1, values


def test_kl_grows_and_a_reset_ends_it(own):
    nanorl.main([*own, "--steps", "4", "--algo", "prorl", "--reset-every", "3", "--eval-every", "0"])
    kl = [row["reference_kl"] for row in metrics()[1:]]
    assert (kl[0] == 0 < kl[1] < kl[2]
            and kl[3] == 0), "measured before the update, so step 4 sees the reference of step 3"


def test_a_run_ends_after_its_tokens(own):
    """a budget of sampled tokens, dropped groups included, is what algorithms can be compared at"""
    nanorl.main([*own, "--steps", "50", "--tokens", "500", "--eval-every", "0"])
    m = metrics()
    spent = [row["length"] * row["groups"] * 4 for row in m[1:]]
    assert sum(spent) >= 500 > sum(spent[:-1]) and "test/avg" in m[-1]
    assert Path(f"runs/rl/ckpt/step_{m[-1]['step']}/meta.json").exists()


def test_truncated_sampling_is_weighed(own):
    """with top-p the sampler draws from pi / kept: the weight of a token is kept, whose
    quantiles are logged"""
    nanorl.main([*own, "--steps", "1", "--eval-every", "0", "--top-p", "0.7"])
    m = metrics()[-1]
    assert 0.6 < m["weight_q01"] < m["weight_q50"] < m["weight_q99"] < 1
    nanorl.main([*own, "--steps", "1", "--eval-every", "0", "--name", "all"])
    m = metrics("all")[-1]
    assert abs(m["weight_q01"] - 1) < 1e-4 and abs(m["weight_q99"] - 1) < 1e-4


def test_killed_run_goes_on_from_its_last_checkpoint(own):
    """kill -9 in mid-step: at most --save-every steps are lost, and --resume goes on as if
    nothing had happened"""
    argv = [*own, "--steps", "7", "--eval-every", "0"]
    process = subprocess.Popen([sys.executable, ROOT / "nanorl.py", *argv],
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in process.stdout:
        if line.startswith("step 5/"):
            process.kill()
            break
    process.wait()
    assert newest("runs/rl")[1] >= 4
    nanorl.main([*argv, "--resume"])
    assert [m["step"] for m in metrics()] == list(range(8))


# -----------------------------------------------------------------------------
# warnings: each is triggered


def history(**changes):
    calm = dict(zero_var=0.3, truncated=0.0, entropy=1.0, sampler_kl=1e-9, repetition=0.0)
    return [calm] * 6 + [{**calm, **changes}]


@pytest.mark.parametrize("changes, words", [
    (dict(truncated=0.6), "--max-new 48"),
    (dict(entropy=0.05), "entropy fell"),
    (dict(entropy=3.5), "entropy rose"),
    (dict(sampler_kl=0.02), "sampler and trainer disagree"),
    (dict(repetition=0.2), "repeating"),
])
def test_each_warning_begins_once(changes, words):
    (warning,) = warnings(history(**changes), Config())
    assert words in warning
    assert warnings(history(**changes) + [history(**changes)[-1]], Config()) == [], "not again while it lasts"
    assert warnings(history(), Config()) == []


def test_five_steps_without_a_difference_are_worth_a_word():
    flat = dict(zero_var=1.0, truncated=0.0, entropy=1.0, sampler_kl=0.0, repetition=0.0)
    assert warnings([flat] * 4, Config()) == []
    assert "nothing to learn from" in warnings([flat] * 5, Config())[0]


def test_a_short_limit_is_not_silent(own, capsys):
    """a trainer with a default limit of 256 tokens truncated nearly every answer of its own quick
    start: reward 0, loss 0, no word. Here the limit is named in the first step's output"""
    nanorl.main([*own, "--steps", "1", "--max-new", "2", "--eval-every", "0"])
    assert "Raise --max-new" in capsys.readouterr().out


def test_repetition_is_seen_in_the_tail():
    assert repeats("so " * 400) and repeats("a different beginning, then " + "again " * 300)
    assert not repeats("12*3=36,36+7=43") and not repeats("".join(chr(33 + i * 7 % 90) for i in range(900)))


def test_epochs_come_in_new_orders_with_new_visits():
    """the same noise at every epoch would sample the same answers to the same questions again"""
    rl = SimpleNamespace(config=Config(), problems=[data.Problem("", id=i) for i in range(10)])

    def take(at, count):
        rl.cursor = at
        return [p.id for p in nanorl.next_problems(rl, count)], rl.cursor

    (first, _), (second, _) = take(0, 10), take(10, 10)
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    for at in range(5, 10):
        got, after = take(at, 6)
        assert (len(set(got)) == 6
                and got[:10 - at] == first[at:]), "a problem that a step has already is passed over"
        assert set(got) | set((first + second)[at:after]) == set(got)


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize("argv, words", [
    (["--data", "empty.jsonl"], "empty.jsonl is empty"),
    (["--data", "bad.jsonl"], "line 2"),
    (["--data", "nothere.jsonl"], "nothere.jsonl"),
    (["--reward", "my.py:scroe"], "scroe"),
    (["--reward", "nothere.py:score"], "nothere.py"),
    (["--reward", ""], "--reward"),
    (["--row-tokens", "16"], "--row-tokens"),
    (["--n", "1"], "--n"),
    (["--algo", "gpro"], "grpo"),
    (["--max-nwe", "3"], "--max-new"),
    (["--prompts", "0"], "--prompts"),
    (["--init", "nowhere"], "nowhere"),
    (["--ratio", "sequnce"], "sequence"),
    (["--algo", "rloo", "--clip-high", "0.3"], "--trust is none"),
    (["--minibatch", "6"], "--minibatch 6"),
    (["--cov", "kl"], "no gradient"),
])
def test_bad_input_is_one_line(own, capsys, argv, words):
    Path("empty.jsonl").write_text("")
    Path("bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    with pytest.raises(SystemExit) as stopped:
        nanorl.main([*own, *argv])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0], error
    assert not Path("runs").exists(), "nothing half-written"


def test_resume_into_another_config_is_refused(own, capsys):
    nanorl.main([*own, "--steps", "1", "--eval-every", "0"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        nanorl.main([*own, "--steps", "1", "--eval-every", "0", "--lr", "1e-4", "--resume"])
    assert stopped.value.code == 2 and "--lr was 0.01, is 0.0001" in capsys.readouterr().err


def test_dry_run_prints_the_budget_and_writes_nothing(own, capsys):
    nanorl.main([*own, "--dry-run"])
    out = capsys.readouterr().out
    assert all(word in out for word in ("weights", "gradients", "optimizer shard",
                                        "KV cache", "activations", "together"))
    assert not Path("runs").exists()


# -----------------------------------------------------------------------------
# the benchmark of all rows


def test_benchmark_of_all_rows_runs_resumes_and_repeats_nothing(own, capsys):
    """two rows on a tiny budget: a table, one picture; a run that is there is not made again, and
    one that was stopped goes on"""
    argv = ("--init base --rows dr_grpo,holder --tasks countdown:steps --max-new 8 --seeds 1 --tokens 150 "
            "--prompts 4 --n 4 --updates 2 --eval-every 1 --eval-n 4 --final-n 4 --k 2").split()
    numbers = algorithms.main(argv)
    out = capsys.readouterr().out
    assert numbers["left"] == numbers["failed"] == 0, out
    assert "2 runs, 2 to make" in out and "| dr_grpo |" in out and "| holder |" in out
    assert numbers["countdown:steps dr_grpo speed"] == 1
    assert Path("runs/algorithms/algorithms.png").stat().st_size > 1000
    shutil.rmtree("runs/algorithms/countdown-steps-holder-0/ckpt")
    again = algorithms.main(argv)
    assert again | {"gflops_per_core": 0} == numbers | {"gflops_per_core": 0}
    assert "2 runs, 1 to make" in capsys.readouterr().out


def test_benchmark_stops_what_takes_too_long(own, capsys):
    argv = ("--init base --rows grpo --tasks countdown:steps --max-new 8 "
            "--seeds 1 --tokens 1000000 --prompts 4 --n 4 --updates 1 "
            "--eval-every 50 --eval-n 4 --final-n 4 --k 2 --minutes").split()
    for minutes in ("0.1", "0.4", "1.6"):                # on a busy machine the first step comes late
        assert algorithms.main([*argv, minutes])["left"] == 1
        out = capsys.readouterr().out
        if "stopped before its first step" not in out:
            break
    assert "stopped at its time" in out
    assert newest("runs/algorithms/countdown-steps-grpo-0"), "with a checkpoint"


@pytest.mark.parametrize("argv, words", [
    (["--rows", "gpro"], "gpro"),
    (["--max-new", "48"], "one number for each of the 2 tasks"),
    (["--k", "3"], "power of two"),
    (["--init", "nowhere"], "nowhere is not there"),
])
def test_benchmark_refuses(own, capsys, argv, words):
    with pytest.raises(SystemExit) as stopped:
        algorithms.main(["--init", "base", *argv])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0]


def test_a_recipe_says_what_it_is_for(monkeypatch):
    """The row for GPUs fills in a model and a task, so that a look at the finished flags found a run with a
    model of its own, and its line never reached the log."""
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        config, about = nanorl.configure([])
        assert about == nanorl.RECIPES["cuda" if there else "cpu"]["about"]
        assert nanorl.configure(["--init", "somewhere"])[1] == ""
    assert config.init == "runs/mixed100m"
