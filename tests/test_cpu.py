"""
common/cpu.py's promise: nothing there changes a result beyond rounding, without it everything
runs, and what repeats the model's arithmetic is dropped as soon as it no longer is the model's.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernels
from common import cpu, norms, numpy_row
from rollout import Sampler
from train_gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
SHAPE = dict(vocab_size=61, n_layer=4, n_head=4, n_kv_head=2, head_dim=16,
             d_model=64, d_ff=96, max_len=400, rope_theta=1e4)


@pytest.fixture(autouse=True)
def tricks(monkeypatch):
    """These tests need them on, whatever the environment says."""
    monkeypatch.setattr(cpu, "ON", True)
    monkeypatch.setenv("NANORL_CPU_TRICKS", "1")


def rand(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def random_model(**more):
    model = GPT(GPTConfig(**SHAPE | more))
    for i, p in enumerate(model.parameters()):
        p.data = rand(*p.shape, seed=i) * (1.5 * p.shape[1] ** -0.5 if p.ndim == 2 else 0.3) + (p.ndim == 1)
    return model


# -----------------------------------------------------------------------------
# the same numbers with and without


@pytest.mark.parametrize("cu, parent", [
    ([0, 1], [-1]), ([0, 3, 3, 4, 21, 38], [-1] * 5), ([0, 7, 10, 11, 19, 24], [-1, 0, 0, 0, -1]),
    ([0, 40, 57, 75, 90], [-1, -1, 0, 1])])
def test_buckets_are_the_loop_forward_and_backward(cu, parent):
    leaves = [rand(cu[-1], heads, 8, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2)]
    longest = max(b - a for a, b in zip(cu, cu[1:]))
    g = rand(cu[-1], 4, 8, dtype=torch.float64)
    sides = []
    for packed in cpu.packed_attention, kernels.packed_attention_torch:
        o = packed(cu, longest, parent)(0, *leaves)
        sides.append([o, *torch.autograd.grad(o, leaves, g)])
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("shape", [{}, dict(qk_norm=False, qkv_bias=True)], ids=str)
def test_a_training_row_is_the_same_without(monkeypatch, shape):
    """Enough tokens for spare rows, segments of many lengths; loss and every gradient."""
    model = random_model(**shape)
    lengths = [5, 7, 33, 20, 7, 1, 64, 13, 2, 150]
    cu = [0]
    for n in lengths:
        cu.append(cu[-1] + n)
    tokens = torch.randint(61, (cu[-1],), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(n) for n in lengths])
    sides = []
    for on in True, False:
        monkeypatch.setattr(cpu, "ON", on)
        hidden = model(tokens, positions, kernels.packed_attention(cu, max(lengths)))
        logp, entropy = kernels.linear_logprob(hidden, model.head_weight, tokens.roll(-1))
        sides.append([logp.detach(), entropy.detach(),
                      *torch.autograd.grad(logp.sum() + entropy.sum(), list(model.parameters()))])
    for a, b in zip(*sides):
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


def test_gradients_of_a_norm_and_a_rotation():
    """Against autograd in float64. A row near the origin, where eps counts, and one far from it."""
    x = rand(7, 24) * torch.logspace(-4, 3, 7).unsqueeze(1)
    tables = kernels.rope_tables(torch.arange(7), 1 / 100 ** (torch.arange(8) / 8))
    q, k = rand(7, 4, 16), rand(7, 2, 16)
    norm = ((x, rand(24)), norms.norm, kernels.rms_norm_torch, ())
    rope = ((q, k, rand(16), rand(16, seed=1)), norms.norm_rope, kernels.qk_norm_rope_torch, tables)
    for leaves, ours, definition, more in norm, rope:
        found = []
        for dtype, run in (torch.float32, ours), (torch.float64, definition):
            inputs = [leaf.to(dtype).requires_grad_() for leaf in leaves]
            out = run(*inputs, *(table.to(dtype) for table in more), 1e-6)
            out = [out] if torch.is_tensor(out) else out
            up = [rand(*o.shape, seed=2).to(dtype) for o in out]
            found.append(torch.autograd.grad(out, inputs, up))
        for a, b in zip(*found):
            assert float((a - b).abs().max() / b.abs().max()) < 1e-6


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("truncated", [{}, dict(top_p=0.9, top_k=30)], ids=str)
def test_the_sampler_samples_the_same_without(monkeypatch, exact, truncated):
    """Log-probs to 1e-5, and the tokens until two candidates tie: here none does."""
    model = random_model()
    sides = []
    for on in True, False:
        monkeypatch.setattr(cpu, "ON", on)
        groups = Sampler(model, {5}, slots=6, exact=exact).generate([[1, 2, 3], [4] * 20, [7]], n=3,
                                                                    max_new=30, seed=3, **truncated)
        sides.append([s for group in groups for s in group])
    for a, b in zip(*sides):
        assert a.tokens == b.tokens
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)


def test_the_switch_is_read_from_the_environment(one_process, monkeypatch):
    code = "from common import cpu; import torch; print(cpu.ON, cpu.fp32(torch.ones(1)))"
    assert one_process(code).split() == ["True", "True"]
    monkeypatch.setenv("NANORL_CPU_TRICKS", "0")
    assert one_process(code).split() == ["False", "False"]


def test_large_tensors_ask_for_large_pages(one_process, monkeypatch):
    """torch reads this before its first tensor. What a user has set stays, and without the tricks
    nothing is set."""
    name = "THP_MEM_ALLOC_ENABLE"
    code = f"from common import cpu; import os; print(os.environ.get('{name}'))"
    monkeypatch.delenv(name, raising=False)
    assert one_process(code).split() == ["1"]
    monkeypatch.setenv(name, "0")
    assert one_process(code).split() == ["0"]
    monkeypatch.delenv(name)
    monkeypatch.setenv("NANORL_CPU_TRICKS", "0")
    assert one_process(code).split() == ["None"]


def test_it_stands_at_the_bottom():
    """cpu.py and backend.py import nothing of ours: both could be copied into another project."""
    for name in "cpu", "backend":
        code = (f"import sys, common.{name}; print(sorted(m for m in "
                "sys.modules if m.split('.')[0] in sys.argv[1].split()))")
        ours = " ".join(["common", "data", *(p.stem for p in ROOT.glob("*.py"))])
        done = subprocess.run([sys.executable, "-c", code, ours], cwd=ROOT,
                              capture_output=True, text=True, check=True)
        assert done.stdout.strip() == str(["common", f"common.{name}"])


# -----------------------------------------------------------------------------
# a copy of the arithmetic follows no change to it, so it must not outlive one


def test_every_stand_in_agrees_with_its_definition(capsys):
    assert cpu.stands_for(cpu.packed_attention, kernels.packed_attention_torch)
    assert cpu.stands_for(cpu.logprob, kernels.logprob_torch)
    assert cpu.stands_for(cpu.rms_norm, kernels.rms_norm_torch)
    assert cpu.stands_for(cpu.qk_norm_rope, kernels.qk_norm_rope_torch)
    assert cpu.stands_for(norms.norm, kernels.rms_norm_torch)
    assert cpu.stands_for(norms.norm_rope, kernels.qk_norm_rope_torch)
    assert cpu.stands_for(cpu.swiglu, kernels.swiglu_torch)
    assert cpu.stands_for(cpu.draw, kernels.draw_torch, kernels.truncated, kernels.inverse_cdf)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name, change", [
    ("rms_norm_torch", lambda was: lambda x, weight, eps: was(x, weight, 1.1 * eps)),
    ("qk_norm_rope_torch", lambda was: lambda q, k, wq, wk, cos, sin, eps: was(q, k, wq, wk, cos, -sin, eps)),
    ("swiglu_torch", lambda was: lambda x: 1.001 * was(x)),
    ("draw_torch", lambda was: lambda z, u, t, k=None, p=None: was(2 * z, u, t, k, p)),
    ("packed_attention_torch",
     lambda was: lambda cu, m, parent=None: lambda layer, q, k, v: was(cu, m, parent)(layer, 1.01 * q, k, v)),
])
def test_a_changed_definition_is_what_runs(monkeypatch, capsys, name, change):
    """Someone edits the plain function, as the file invites them to; on a CPU its stand-in must
    not go on with the old one."""
    changed = change(getattr(kernels, name))
    changed.__name__ = "changed"
    monkeypatch.setattr(kernels, name, changed)
    x = rand(9, 24) * 0.01
    q, k, ones = rand(9, 4, 16), rand(9, 2, 16), torch.ones(16)
    tables = kernels.rope_tables(torch.arange(9), 1 / 100 ** (torch.arange(8) / 8))
    calls = {
        "rms_norm_torch": (kernels.rms_norm, (x, torch.ones(24), 1e-6)),
        "qk_norm_rope_torch": (kernels.qk_norm_rope, (q, k, ones, ones, *tables, 1e-6)),
        "swiglu_torch": (kernels.swiglu, (x,)),
        "draw_torch": (kernels.draw, (x, torch.full((9,), 0.5), torch.ones(9))),
        "packed_attention_torch": (lambda *qkv: kernels.packed_attention([0, 4, 9], 5)(0, *qkv), (q, k, k)),
    }
    public, args = calls[name]
    for mode in torch.inference_mode, torch.enable_grad:
        with mode():
            got = public(*args)
            want = changed([0, 4, 9], 5)(0, *args) if name.startswith("packed") else changed(*args)
        for a, b in zip(*((x,) if torch.is_tensor(x) else x for x in (got, want))):
            assert torch.equal(a, b)
    said = capsys.readouterr().out.splitlines()
    assert 1 <= len(said) == len(set(said)) <= 2         # one for the sampler, one for the trainer
    for line in said:
        assert line.startswith("cpu: its ") and "differs from changed: by up to" in line


LONE_ROW = '''
import inspect, json, sys, textwrap, types
from pathlib import Path
import torch, torch.nn.functional as F
sys.path.insert(0, sys.argv[1])
sys.path.insert(0, sys.argv[1] + "/tests")
import kernels, train_gpt
from common import cpu, numpy_row
from rollout import Sampler
from test_cpu import random_model
from train_gpt import Block, RMSNorm

torch.set_num_threads(1)
used, was = [], numpy_row.numpy_row
numpy_row.numpy_row = lambda model, *args: used.append(model) or was(model, *args)
readme = Path(sys.argv[1], "README.md").read_text()
nope = readme[readme.index("@@", readme.index("+++ b/train_gpt.py")):]
nope = nope[nope.index("\\n") + 1 : nope.index("```")].splitlines()

def edited(find, put):
    """Block.forward with its text changed, as an editor would"""
    text = textwrap.dedent(inspect.getsource(original))
    assert text.count(find) == 1, find
    space = {}
    exec(text.replace(find, put), vars(train_gpt), space)
    return space["forward"]

def block(find, put):
    return lambda model: setattr(Block, "forward", edited(find, put))

def by_readme(model):
    before = "\\n".join(line[5:] for line in nope if line[0] == " ")
    after = "\\n".join(line[5:] for line in nope)
    Block.forward = edited(before, after)

def instance(model):
    model.blocks[2].forward = types.MethodType(
        edited("layer, q, k, v)", "layer, q, k, 0.5 * v)"), model.blocks[2])

def subclass(model):
    class Mine(Block):
        pass
    for b in model.blocks:
        b.__class__ = Mine

def hook(model):
    model.blocks[1].register_forward_hook(lambda module, args, out: 1.1 * out)

def eps(model):
    model.blocks[1].eps = 0.1

def centred(x, w, eps):
    return kernels.rms_norm(x - x.mean(-1, keepdim=True), w, eps)

def relu2(x):
    gate, up = x.chunk(2, -1)
    return F.relu(gate) ** 2 * up

original = Block.forward
parts = [(train_gpt, "rms_norm"), (train_gpt, "swiglu"), (kernels, "rms_norm_torch"),
         (kernels, "swiglu_torch"),
         (kernels, "packed_attention_torch"), (RMSNorm, "forward"), (Block, "forward")]
plain = [(owner, name, getattr(owner, name)) for owner, name in parts]
CHANGES = {
    "the README's NoPE": by_readme,
    "a scaled score": block("attend(layer, q, k, v)", "attend(layer, 0.5 * q, k, v)"),
    "a changed norm": lambda model: setattr(train_gpt, "rms_norm", centred),
    "a changed MLP": lambda model: setattr(train_gpt, "swiglu", relu2),
    "the norm's definition": lambda model: setattr(
        kernels, "rms_norm_torch", lambda x, w, eps: F.layer_norm(x, w.shape, w, None, eps)),
    "the MLP's definition": lambda model: setattr(kernels, "swiglu_torch", relu2),
    "the last norm": lambda model: setattr(RMSNorm, "forward", lambda self, x: rms(x, self.weight, 0.5)),
    "one block's own forward": instance, "a class of block of one's own": subclass,
    "a hook": hook, "one block's eps": eps,
}
rms = kernels.rms_norm

def gap(model, sampler):
    (sample,), = sampler.generate([[3, 1, 4, 1, 5]], 1, 40, seed=1)
    row = torch.tensor(sample.prompt + sample.tokens)
    hidden = model(row, torch.arange(len(row)), kernels.packed_attention([0, len(row)], len(row)))
    begin = len(sample.prompt)
    logp, _ = kernels.linear_logprob(hidden[begin - 1 : -1], model.head_weight, row[begin:])
    return float((logp - torch.tensor(sample.logprobs)).abs().max())

found = {}
for name, change in CHANGES.items():
    for when in "before", "after":
        model = random_model()
        sampler = Sampler(model, (), slots=1, exact=False)
        unchanged = gap(model, sampler) if when == "after" else 0.0
        lone = sum(m is model for m in used)
        print(f"case {name}, {when}", flush=True)
        change(model)
        if when == "before":
            sampler = Sampler(model, (), slots=1, exact=False)
        changed = gap(model, sampler)
        found[f"{name}, {when}"] = dict(
            unchanged=unchanged, lone=lone, changed=changed, still=sum(m is model for m in used) - lone)
        for owner, attribute, value in plain:
            setattr(owner, attribute, value)
model = random_model()
print("case none, at the end")
changed = gap(model, Sampler(model, (), slots=1, exact=False))
found["none"] = dict(changed=changed, lone=sum(m is model for m in used))
print(json.dumps(found))
'''


@pytest.fixture(scope="module")
def lone():
    """-> what each change gave, and what was printed during it. One process on one thread, where
    a single row is numpy's."""
    done = subprocess.run([sys.executable, "-c", LONE_ROW, str(ROOT)],
                          env={**os.environ, "OMP_NUM_THREADS": "1", "NANORL_CPU_TRICKS": "1"},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    *text, last = done.stdout.splitlines()
    cases = {}
    for line in text:
        if line.startswith("case "):
            cases[line[5:]] = said = []
        elif line.startswith("cpu: a single row"):
            said.append(line)
    return json.loads(last), cases


CHANGES = ["the README's NoPE", "a scaled score", "a changed norm", "a changed MLP",
           "the norm's definition", "the MLP's definition", "the last norm",
           "one block's own forward", "a class of block of one's own", "a hook", "one block's eps"]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_single_row_is_decoded_by_the_model_that_is_trained(lone, change, when):
    """With the README's NoPE applied, OMP_NUM_THREADS=1 python rollout.py decoded by a copy of
    the block in numpy, which had never seen the change: log-probs 0.13 off the trainer's after 60
    steps of training, over 4 on random weights, and no word. A change must be noticed whether it
    was there when the sampler was built or came later."""
    found, said = lone
    case = found[f"{change}, {when}"]
    assert case["changed"] < 1e-4 and case["unchanged"] < 1e-4
    assert (case["lone"] > 0) == (when == "after"), (
        "the row was not numpy's before the change: this test would see nothing")
    lines = [len(said[f"{change}, {moment}"]) for moment in ("before", "after")]
    assert case["still"] == 0 and max(lines) == lines[0] == 1, "what is dropped is said once"


def test_a_single_row_is_numpys_again_once_the_model_is_as_it_was(lone):
    found, said = lone
    assert found["none"]["lone"] > 0 and found["none"]["changed"] < 1e-5 and not said["none, at the end"]


def test_the_proof_sees_a_small_change():
    """A scale off by 2% in the last of four layers; an eps of 1e-4; and blocks that begin as the
    identity are no hiding place. It moves neither weights nor random state."""
    model = random_model()
    models = model, GPT(model.config).init_weights(0)
    weights = [p.clone() for p in model.parameters()]
    state = torch.get_rng_state()
    block = type(model.blocks[0])

    def scaled(*args):
        attend = kernels.packed_attention(*args)
        return lambda layer, q, k, v: attend(layer, q * (1.02 if layer == 3 else 1), k, v)

    for each in models:
        assert numpy_row.disproof(each, block, kernels.packed_attention) is None
        assert "is off by" in numpy_row.disproof(each, block, scaled)
    model.blocks[0].eps = 1e-4
    assert "is off by" in numpy_row.disproof(model, block, kernels.packed_attention)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


def test_two_threads_do_not_share_their_rotations():
    """The wide tables of the last step were kept in one global, set and read in two steps: of two
    samplers in two threads one rotated by the other's positions, now and then, and no run alone did."""
    from concurrent.futures import ThreadPoolExecutor

    def rotations(shift):
        angles = torch.arange(8.0).unsqueeze(1) + shift
        wrong = 0
        for _ in range(2000):
            cos_T, sin_T = angles.cos(), angles.sin()
            cos, sin = cpu.wide_tables(cos_T, sin_T)
            wrong += not torch.equal(cos[:, 0, :1], cos_T) or not torch.equal(sin[:, 0, 1:], sin_T)
        return wrong
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            assert sum(pool.map(rotations, (0.0, 100.0))) == 0
    finally:
        sys.setswitchinterval(interval)
