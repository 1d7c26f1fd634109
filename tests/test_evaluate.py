"""evaluation: unbiased pass@k, votes by equivalence, standard errors, the same numbers on
one rank and two"""
import itertools
import json
import math

import pytest

import evaluate
from evaluate import majority, pass_at


def test_pass_at_k_is_the_share_of_subsets_with_a_right_one():
    for n, right, k in [(8, 3, 2), (8, 0, 4), (8, 8, 1), (6, 1, 6), (5, 2, 4)]:
        subsets = list(itertools.combinations([1] * right + [0] * (n - right), k))
        assert math.isclose(pass_at(n, right, k), sum(any(s) for s in subsets) / len(subsets))


class Halves:
    def answer(self, text):
        return text or None

    def canon(self, answer):
        return answer

    def same(self, a, b):
        return {a, b} == {"1/2", "0.5"} or a == b


def test_equivalent_answers_vote_together_and_silence_does_not():
    """a vote by strings lets 3 lose against 1/2 + 0.5, and an empty answer win against all: both
    were seen in real graders"""
    assert majority(Halves(), ["", "", "", "1/2", "3", "0.5"], [0, 0, 0, 1, 0, 1]) == 1
    assert majority(Halves(), ["3", "3", "1/2"], [0, 0, 1]) == 0
    assert majority(Halves(), ["", ""], [0, 0]) == 0
    assert majority(Halves(), ["7", "3", "3", "7"], [1, 0, 0, 1]) == 1, "the earliest wins a tie"


@pytest.fixture
def base(tmp_path):
    import data
    from train_gpt import GPT, GPTConfig
    tok = data.tokenizer("chars")
    model = GPT(GPTConfig(tok.vocab_size, 2, 2, 1, 16, 32, 48, 256, 10000.0)).init_weights(0)
    model.save_hf(tmp_path / "base", tok)
    return tmp_path / "base"


SCRIPT = "import sys, evaluate; evaluate.main(sys.argv[1:])"


def test_script_prints_a_line_and_json_and_two_ranks_agree_with_one(base, tmp_path, ranks, one_process):
    argv = ["--model", base, "--task", "arith", "--n", 9, "--k", 4, "--max-new", 12,
            "--device", "cpu", "--threads", 1, "--out", "out.jsonl"]
    line, numbers = one_process(SCRIPT, *argv).strip().splitlines()
    assert line.startswith("avg@4") and "pass@4" in line and "maj@4" in line
    numbers = json.loads(numbers)
    assert numbers["n"] == 9 and numbers["truncated"] > 0.5 and 0 <= numbers["avg"] <= numbers["pass@4"]
    rows = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert len(rows) == 36
    assert ranks(2, SCRIPT, *argv)[0].strip().splitlines()[-1] == json.dumps(numbers)


@pytest.mark.parametrize("argv, words",
                         [(["--model", "nowhere"], "nowhere"), (["--task", "contdown"], "countdown"),
                          (["--k", "0"], "--k"), (["--reward", "nothere.py:f"], "nothere.py")])
def test_bad_input_is_one_line(base, tmp_path, monkeypatch, capsys, argv, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--model", str(base), "--n", "2", "--device", "cpu", "--threads", "1", *argv])
    error = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(error) == 1 and words in error[0], error
