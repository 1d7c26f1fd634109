"""
The peers of `python -m bench rollout` that live in processes of their own, vLLM and llama2.c, each played by
a stand-in that keeps their side of the bargain: what is sent, what is compared, what is refused.
"""
import json
import random
import stat
import sys
from pathlib import Path

import pytest

from bench import rollout
from bench.peers import llama2c, vllm
from train_gpt import GPTConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = GPTConfig(vocab_size=97, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, d_model=32, d_ff=48,
                  max_len=640, rope_theta=1e4, tie_embeddings=True, norm_eps=1e-6)


def last_numbers(capsys):
    """-> all that a benchmark printed, and its JSON line"""
    out = capsys.readouterr().out
    return out, json.loads(out.strip().splitlines()[-1])


@pytest.fixture(autouse=True)
def threads():
    import torch
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# -----------------------------------------------------------------------------
# vLLM

# it knows the names and arguments that the child uses, and no others; its tokens are arbitrary, its log-probs
# those of the weights in the folder, `off` apart
FAKE = '''
import random, sys
from types import SimpleNamespace
__version__ = "0.0.fake"

class SamplingParams:
    def __init__(self, *, temperature, max_tokens, ignore_eos, logprobs, detokenize):
        assert temperature == 1.0 and ignore_eos and logprobs == 0
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, *, model, skip_tokenizer_init, dtype, max_num_seqs, max_model_len,
                 enable_prefix_caching):
        print("an engine is talkative")                         # not into the pipe
        assert dtype == "float32" and max_num_seqs == 4 and max_model_len <= 640
        sys.path.append({root!r})
        from train_gpt import GPT
        self.gpt = GPT.from_hf(model)
        self.rng = random.Random(0)

    def generate(self, prompts, settings, use_tqdm):
        return [self.one(p["prompt_token_ids"], s.max_tokens) for p, s in zip(prompts, settings)]

    def one(self, prompt, n):
        import torch
        from kernels import packed_attention
        new = [self.rng.randrange(97) for _ in range(n)]
        row = torch.tensor(prompt + new)
        with torch.no_grad():
            h = self.gpt(row, torch.arange(len(row)), packed_attention([0, len(row)], len(row)))
            logp = (h @ self.gpt.head_weight.t()).log_softmax(-1)
        at = range(len(prompt) - 1, len(row) - 1)
        found = [{{t: SimpleNamespace(logprob=float(logp[i, t]) + {off})}} for i, t in zip(at, new)]
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=tuple(new), logprobs=found)])
'''


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(rollout.SHAPES, "4M", SMALL)
    monkeypatch.setattr(rollout, "WIDTHS", (4,))
    monkeypatch.setattr(rollout.machine, "allowed", lambda: {0})     # two threads spin beside other tests
    monkeypatch.setattr(rollout, "skewed", lambda rng, n: [rng.randrange(2, 12) for _ in range(n)])
    return "--parts g --sizes 4M --requests 6 --repeats 1".split()


def install(folder, monkeypatch, off=0.0):
    (folder / "vllm").mkdir()
    (folder / "vllm" / "__init__.py").write_text(FAKE.format(root=str(ROOT), off=off))
    monkeypatch.setenv("PYTHONPATH", str(folder))


@pytest.mark.parametrize("off", [0.0, 0.25])
def test_vllm_gets_the_requests_and_its_log_probs_are_compared(small, tmp_path, monkeypatch, capsys, off):
    install(tmp_path, monkeypatch, off)
    rollout.main([*small, "--vllm", sys.executable])
    out, numbers = last_numbers(capsys)
    assert "vLLM 0.0.fake" in out and "vLLM, 4 sequences" in out
    found = numbers["engines_4M"]
    assert found["vs_vllm"] > 0
    assert found["apart"] == pytest.approx(off, abs=1e-5)


def test_without_vllm_ours_stands_alone(small, capsys):
    rollout.main(small)
    out, numbers = last_numbers(capsys)
    assert "vLLM is not here (--vllm PYTHON" in out
    assert "vs_vllm" not in numbers["engines_4M"] and numbers["engines_4M"]["tokens_per_second"] > 0


def test_what_is_no_python_with_vllm_is_refused_before_anything_runs(tmp_path, monkeypatch, capfd):
    (tmp_path / "vllm").mkdir()                      # half installed: it wants a package that is not there
    (tmp_path / "vllm" / "__init__.py").write_text("import torchvision_that_is_missing")
    words = {"/no/such/python": "no Python that runs", str(tmp_path): "no Python that runs",
             "/bin/true": "no vllm to import there", sys.executable: "torchvision_that_is_missing"}
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    for python, why in words.items():
        with pytest.raises(SystemExit) as stopped:
            rollout.main(["--vllm", python])
        out, err = capfd.readouterr()
        assert stopped.value.code == 2 and out == ""
        assert len(err.splitlines()) == 1 and f"--vllm {python}" in err and why in err


def test_an_engine_that_ends_says_why(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text(
        "SamplingParams = None\ndef LLM(**_): raise MemoryError('full')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="vLLM ended with 1: MemoryError: full"):
        vllm.Engine(sys.executable, tmp_path, 4, 64)


# -----------------------------------------------------------------------------
# llama2.c

# reads the two files as run.c does: a header of seven numbers, its order of tensors, neighbours rotated
PROGRAM = '''#!{python}
import struct, sys
import numpy as np
_, path, t, zero, n, steps = sys.argv
assert (path, t, zero, n) == ("model.bin", "-t", "0", "-n")
data = open(path, "rb").read()
D, F, L, H, KV, V, S = struct.unpack("7i", data[:28])
numbers = np.frombuffer(data, np.float32, offset=28)
def take(*shape):
    global numbers
    size = int(np.prod(shape))
    found, numbers = numbers[:size].reshape(shape), numbers[size:]
    return found
d, kv = D // H, D // H * KV
embed, norm1, wq, wk, wv = take(V, D), take(L, D), take(L, D, D), take(L, kv, D), take(L, kv, D)
wo, norm2, w1 = take(L, D, D), take(L, D), take(L, F, D)
w2, w3, last = take(L, D, F), take(L, F, D), take(D)
cos, sin = take(S, d // 2), take(S, d // 2)
assert len(numbers) == 0
pieces = open("tokenizer.bin", "rb").read()[4:]
words = []
while pieces:
    score, length = struct.unpack("fi", pieces[:8])
    words.append(pieces[8 : 8 + length].decode())
    pieces = pieces[8 + length :]
def norm(x, w):
    return w * x / np.sqrt((x * x).mean() + 1e-5)
def turn(x, at):
    a, b = x.reshape(-1, d // 2, 2).transpose(2, 0, 1)
    c, s = cos[at], sin[at]
    return np.stack([a * c - b * s, a * s + b * c], -1).reshape(-1, d)
keys, values, token = [[] for _ in range(L)], [[] for _ in range(L)], 1
for at in range(int(steps)):
    x = embed[token]
    for l in range(L):
        y = norm(x, norm1[l])
        q = turn(wq[l] @ y, at)
        keys[l].append(turn(wk[l] @ y, at))
        values[l].append((wv[l] @ y).reshape(-1, d))
        k, v = (np.repeat(np.stack(z, 1), H // KV, 0) for z in (keys[l], values[l]))
        e = np.exp(np.einsum("hd,htd->ht", q, k) / d**0.5)
        x = x + wo[l] @ np.einsum("ht,htd->hd", e / e.sum(1, keepdims=True), v).ravel()
        y = norm(x, norm2[l])
        g = w1[l] @ y
        x = x + w2[l] @ (g / (1 + np.exp(-g)) * (w3[l] @ y))
    token = int((embed @ norm(x, last)).argmax())
    print(words[token], end="")
'''


@pytest.fixture
def fifteen(monkeypatch):
    shape = GPTConfig(vocab_size=211, n_layer=2, n_head=4, n_kv_head=2, head_dim=8, d_model=32, d_ff=48,
                      max_len=300, rope_theta=1e4, tie_embeddings=True, norm_eps=1e-5, qk_norm=False)
    monkeypatch.setitem(rollout.SHAPES, "15M", shape)


def test_llama2c_reads_our_weights_and_says_the_same_tokens(fifteen, tmp_path, capsys):
    program = tmp_path / "run"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    rollout.main(["--parts", "c", "--repeats", "1", "--llama2c", str(program)])
    out, numbers = last_numbers(capsys)
    assert "100% of greedy tokens equal" in out and numbers["alone"]["vs_run"] > 0


def test_without_llama2c_or_gcc_the_bench_says_so(fifteen, tmp_path, monkeypatch, capsys):
    source = tmp_path / "run.c"
    source.write_text("int main() { return 0; }")
    monkeypatch.setenv("PATH", str(tmp_path))
    for words, said in (([], "llama2.c is not here"), (["--llama2c", str(source)], "gcc is not here")):
        rollout.main(["--parts", "c", "--repeats", "1", *words])
        out, numbers = last_numbers(capsys)
        assert said in out and not [name for name in numbers["alone"] if name.startswith("vs_")]


def test_what_is_not_llama2c_is_refused(tmp_path, capfd):
    plain = tmp_path / "notes.txt"
    plain.write_text("no program")
    for path, why in ((tmp_path / "run.c", "no such file"), (plain, "neither C")):
        with pytest.raises(SystemExit) as stopped:
            rollout.main(["--llama2c", str(path)])
        out, err = capfd.readouterr()
        assert stopped.value.code == 2 and out == "" and len(err.splitlines()) == 1 and why in err
    if not llama2c.shutil.which("gcc"):
        pytest.skip("no gcc")
    broken = tmp_path / "broken.c"
    broken.write_text("this is no C")
    with pytest.raises(SystemExit):
        llama2c.programs(broken, tmp_path)
    assert "gcc could not compile it" in capfd.readouterr().err


# -----------------------------------------------------------------------------
# all benchmarks


def test_every_benchmark_says_how_fast_the_machine_is(capsys):
    from bench import finish
    finish("anything", times=random.random())
    out, numbers = last_numbers(capsys)
    assert numbers["gflops_per_core"] > 0
    assert f"this machine: {numbers['gflops_per_core']:.0f} GFLOP/s per core" in out
