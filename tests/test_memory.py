"""a small card: what lives on the host, gradients in shards, what a run needs beforehand, counted"""
import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import algos
import nanorl
import pack
import train_gpt
from bench import fits, gpu
from common import cpu, memory, offload, sharded
from common.optim import Optimizer
from kernels import linear_logprob
from rollout import Sample
from test_cuda_path import SHAPE, tiny
from test_optim import net
from train_gpt import GPT, GPTConfig

CPU = SimpleNamespace(device=torch.device("cpu"), world=1, rank=0)


# -----------------------------------------------------------------------------
# --offload


def trained(model, way, steps=4, **kw):
    """-> the optimizer after a few steps of two micro-batches each, and what the steps said"""
    optimizer = Optimizer(model, lr=1e-2, weight_decay=0.1, clip=0.7, offload="offload" in way, **kw)
    g = torch.Generator().manual_seed(1)
    said = []
    for _ in range(steps):
        for _ in range(2):
            model(torch.randint(0, 11, (5,), generator=g)).backward()
            optimizer.finish_micro_batch()
        said.append(optimizer.step(divide=10))
    return optimizer, said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("muon_lr", [None, 1e-2])
def test_offload_changes_no_bit(monkeypatch, dtype, muon_lr):
    """masters, moments and sums in second buffers: weights, norms and the saved state are those of
    the run without, also where a tensor needs several buffers (of 8 numbers here)"""
    monkeypatch.setattr(offload, "BUFFER", 32)
    found = []
    for way in ("whole", "whole-offload"):
        model = net().to(dtype)
        optimizer, said = trained(model, way, muon_lr=muon_lr)
        found.append((model.state_dict(), said, optimizer.state_dict()))
    (a, said_a, state_a), (b, said_b, state_b) = found
    assert said_a == said_b and not any(s["skipped"] for s in said_a)
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert state_a["pieces"].keys() == state_b["pieces"].keys()
    for name, piece in state_a["pieces"].items():
        for key in ("master", "m", "v"):
            one, two = piece[key], state_b["pieces"][name][key]
            assert (one is two is None) or torch.equal(one, two), (name, key)


def test_offload_leaves_nothing_on_the_device():
    """a gradient goes as soon as it is complete; masters and moments share no memory with the weights,
    which stay where they are"""
    model = net().bfloat16()
    addresses = [p.data_ptr() for p in model.parameters()]
    optimizer = Optimizer(model, offload=True)
    model(torch.arange(5)).backward()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert [p.data_ptr() for p in model.parameters()] == addresses
    rooms = {s.master.untyped_storage().data_ptr() for s in optimizer.shards}
    assert len(rooms) == 1 and not rooms & set(addresses), "one room on the host"
    numbers = sum(p.numel() for p in model.parameters())
    assert optimizer.shards[0].master.untyped_storage().nbytes() == 16 * numbers, "16 bytes per parameter"


def test_offload_skips_and_resets_as_without():
    """a step without signal, one that is not finite, one after zero_grad: the sums begin anew"""
    states = []
    for offloaded in (False, True):
        model = net()
        optimizer = Optimizer(model, lr=1e-2, offload=offloaded)
        model(torch.arange(5)).backward()
        optimizer.zero_grad()
        (model(torch.arange(3)) * float("inf")).backward()
        assert optimizer.step()["skipped"]
        assert optimizer.step(divide=0)["skipped"]
        model(torch.arange(4)).backward()
        optimizer.step()
        optimizer.reset()
        assert not any(s.m.any() for s in optimizer.shards)
        states.append(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states)))


def test_a_failure_beside_the_backward_is_raised_at_the_step():
    """it happens on another thread: it must not be lost, nor hang the copies behind it"""
    host = offload.Host(torch.device("cpu"))
    for _ in range(3 * offload.BUFFERS):
        host.add(torch.zeros(3), torch.ones(4))              # sizes that do not fit
    with pytest.raises(RuntimeError, match="size"):
        host.settle()


def test_rooms_share_no_page(monkeypatch, capsys):
    """CUDA locks whole pages: of two small tensors on one page the second was refused. And an error
    that was only printed was raised by the next kernel, whatever that was, since the runtime keeps it"""
    codes = [0, 0, 712]
    locked, forgotten = [], []
    fake = SimpleNamespace(cudaHostRegister=lambda at, size, how: locked.append((at, size)) or codes.pop(0),
                           cudaHostUnregister=lambda at: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: fake)
    monkeypatch.setattr(offload, "forget_error", forgotten.append)
    gpu_like = SimpleNamespace(type="cuda")
    owner = net()
    rooms = [offload.pinned(owner, numbers, gpu_like) for numbers in (3, 5000, 7)]
    assert [len(room) for room in rooms] == [3, 5000, 7] and not any(room.any() for room in rooms)
    pages = [range(at // offload.PAGE, (at + size) // offload.PAGE) for at, size in locked]
    assert all(at % offload.PAGE == size % offload.PAGE == 0 for at, size in locked)
    assert len(set().union(*pages)) == sum(map(len, pages)) and [at for at, _ in locked] == [
        room.data_ptr() for room in rooms]
    assert forgotten == [gpu_like] and "CUDA error 712" in capsys.readouterr().out


def test_gradients_have_one_taker():
    """distillation's guard makes a new optimizer for the same model: the old one's hook went on
    summing beside it"""
    model = net()
    old = Optimizer(model, lr=1e-2, offload=True)
    new = Optimizer(model, lr=1e-2, offload=True)
    model(torch.arange(5)).backward()
    assert not old.step()["grad_norm"] and new.step()["grad_norm"] > 0


def test_a_closed_optimizer_gives_its_memory_back():
    """hooks of a model point at its optimizer by weak references: or both would stay for ever"""
    import weakref
    model = net()
    optimizer = Optimizer(model, offload=True)
    gone = weakref.ref(optimizer.host)
    del optimizer
    assert gone() is None
    model(torch.arange(5)).backward()                        # and nothing takes the gradients
    assert model.norm.grad is not None


def test_a_host_without_memory_is_one_line(monkeypatch, capsys, tiny_base):
    """what is needed and what is there, before a run folder is made"""
    tiny_base(8)
    monkeypatch.setattr(offload, "host_free", lambda: 1000)
    for main, words in ((nanorl.main, OWN), (train_gpt.main, "--data arith --tokenizer chars --steps 1")):
        with pytest.raises(SystemExit) as stopped:
            main([*shlex.split(words), "--offload", "--device", "cpu"])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert stopped.value.code == 2 and not Path("runs").exists()
        assert re.match(r"error: --offload needs [\d.]+ GB of this host's memory .*, and 0.0 GB are", error)


OWN = ("--init base --data my.jsonl --reward my.py:score --device cpu --threads 1 --prompts 5 --n 4 "
       "--max-new 10 --steps 2 --lr 1e-2 --eval-n 4 --final-n 4 --eval-every 0 --save-every 1 --warmup 1 "
       "--workers 1 --row-tokens 128 --muon-lr 1e-2")


def checkpoint(name, step):
    return GPT.from_hf(f"runs/{name}/ckpt/step_{step}").state_dict()


def test_a_run_offloaded_and_resumed_without_is_the_run(tiny_base):
    """the same checkpoint files, bit for bit on a CPU: offload, grads and checkpoint may change at a
    resume"""
    tiny_base(60)
    nanorl.main([*OWN.split(), "--name", "plain"])
    nanorl.main([*OWN.split(), "--name", "away", "--offload"])
    plain, away = checkpoint("plain", 2), checkpoint("away", 2)
    assert all(torch.equal(plain[k], away[k]) for k in plain)
    for path in Path("runs/away/ckpt").glob("step_2"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    nanorl.main([*OWN.split(), "--name", "away", "--checkpoint", "--resume"])
    resumed = checkpoint("away", 2)
    assert all(torch.equal(plain[k], resumed[k]) for k in plain)


# -----------------------------------------------------------------------------
# gradients in shards


MACHINES = """
import os, sys, torch
os.environ["LOCAL_WORLD_SIZE"] = sys.argv[3]
sys.path.insert(0, sys.argv[2])
from test_optim import net
from common import sharded
from common.optim import Optimizer
from common.run import start
sharded.BUCKET = 8                        # of the smallest: pieces of a tensor, and several buckets
env = start("cpu", threads=1)
model = net()
muon_lr = 1e-2 if sys.argv[4] == "muon" else None
optimizer = Optimizer(model, lr=1e-2, muon_lr=muon_lr, weight_decay=0.1, clip=0.7,
                      grads="sharded" if env.world > 1 else "whole", offload=sys.argv[5] == "offload")
g = torch.Generator().manual_seed(1)
kept = []
for step in range(3):
    for micro in range(2):
        xs = torch.randint(0, 11, (8,), generator=g).split(2)
        for x in xs if env.world == 1 else [xs[env.rank]]:
            model(x).backward()
        optimizer.finish_micro_batch()
    if env.world > 1:
        kept.append(sum(b.sums.numel() for b in optimizer.sharded.buckets if b.sums is not None))
        assert all(p.grad is None for p in model.parameters())
        assert optimizer.sharded.count == 4 // int(sys.argv[3])
    optimizer.step(divide=16)
torch.save(dict(model=model.state_dict(), kept=kept), f"{sys.argv[1]}/{env.world}_{env.rank}.pt")
"""


@pytest.mark.timeout(900)
@pytest.mark.parametrize("local, optimizer, where", [(2, "adamw", "device"), (2, "muon", "device"),
                                                     (2, "muon", "offload"), (4, "muon", "device")])
def test_two_machines_equal_one_process(tmp_path, ranks, one_process, local, optimizer, where):
    """two local groups of two ranks, or one of four: reduced inside a machine per bucket, between
    machines once; no rank keeps more than its machine's share of the sums"""
    here = __file__.rsplit("/", 1)[0]
    ranks(4, MACHINES, tmp_path, here, local, optimizer, where, timeout=600)
    one_process(MACHINES, tmp_path, here, local, optimizer, where, timeout=600)
    one, *four = (torch.load(tmp_path / f"{n}.pt") for n in ("1_0", "4_0", "4_1", "4_2", "4_3"))
    size = sum(p.numel() for p in one["model"].values())
    for rank in four:
        for name, p in one["model"].items():
            assert torch.allclose(p, rank["model"][name], atol=2e-6), name
            assert torch.equal(four[0]["model"][name], rank["model"][name]), name
        if optimizer == "adamw":
            assert max(rank["kept"]) <= size / local + 40, "its share, and padding"
    if optimizer == "muon":        # matrices are whole: together it is the model, once per machine
        assert sum(rank["kept"][0] for rank in four) <= 4 / local * size + 160


def test_one_process_has_nobody_to_share_with(capsys, tiny_base):
    tiny_base(8)
    with pytest.raises(SystemExit) as stopped:
        nanorl.main([*OWN.split(), "--grads", "sharded"])
    assert stopped.value.code == 2
    assert "--grads sharded has no effect in one process" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_buckets_follow_the_backward():
    """the head's gradient is complete first, the embedding's last; a bucket that waits for a late
    tensor would hold back all behind it"""
    model = tiny()
    optimizer = Optimizer(model)
    names = [s.name for bucket in sharded.backwards(optimizer.shards) for s in bucket]
    assert names[0] == "head.weight" and names[-1] == "embed.weight"
    assert sorted(names) == sorted(s.name for s in optimizer.shards)
    seen = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    batch = row_of(model)
    hidden_ND = batch.hidden(model)
    linear_logprob(hidden_ND, model.head_weight, batch.targets_N)[0].sum().backward()
    layers = [[re.search(r"blocks\.(\d+)", n)[1] for n in order if "blocks" in n] for order in (seen, names)]
    assert seen[0] == names[0] and seen[-1] == names[-1] and layers[0] == layers[1]


def row_of(model, T=64, n=4, **kw):
    samples = [Sample([1], [2 + i] * (T // n - 1), [-1.0] * (T // n - 1), "length", i, 0, 0, advantage=0.5)
               for i in range(n)]
    (batch,) = pack.batches(samples, T, model.config, share=False, **kw)
    return batch


TABLE = """
import sys
import nanorl
*words, rows = sys.argv[1:]
for row in rows.split(";"):
    name, more = row.split(":")
    nanorl.main([*words, *more.split(), "--name", name])
"""
# what a row of the algorithm table takes beside --grads sharded; prorl takes it all
BESIDE = {"prorl": "--reference-at sharded --reset-every 1 --offload"}


@pytest.mark.timeout(900)
def test_two_ranks_equal_one_for_every_algorithm(tiny_base, ranks, one_process):
    """rows dealt out, an empty one where a rank has fewer, two updates a rollout; a reference whose
    blocks are gathered for each row, reset, and saved whole. Both processes run the whole table"""
    tiny_base(60)
    words = [*OWN.split(), "--minibatch", "3", "--final-n", "1"]
    two = [f"two_{row}:--algo {row} --grads sharded {BESIDE.get(row, '')}" for row in algos.ALGORITHMS]
    resets = {"prorl": "--reset-every 1"}
    one = [f"one_{row}:--algo {row} {resets.get(row, '')}" for row in algos.ALGORITHMS]
    ranks(2, TABLE, *words, ";".join(two), timeout=600)
    one_process(TABLE, *words, ";".join(one), timeout=600)
    base = GPT.from_hf("base").state_dict()
    for row in algos.ALGORITHMS:
        a, b = checkpoint(f"one_{row}", 2), checkpoint(f"two_{row}", 2)
        for k in base:
            assert 0 < (a[k] - base[k]).norm(), (row, k)
            assert (a[k] - b[k]).norm() < 0.01 * (a[k] - base[k]).norm(), (row, k)
    states = [torch.load(Path(f"runs/{n}_prorl/ckpt/step_2/state_0_of_{w}.pt"))["reference"] for n, w in
              (("one", 1), ("two", 2))]
    assert all(torch.allclose(states[0][k], states[1][k], atol=1e-4) for k in states[0])
    assert all(torch.equal(states[1][k], b[k]) for b in [checkpoint("two_prorl", 2)] for k in b), (
        "the policy became its own reference")


ROWS = """
import sys
import train_gpt
train_gpt.main(sys.argv[1:])
"""


@pytest.mark.timeout(900)
def test_two_ranks_pretrain_as_one(tmp_path, monkeypatch, ranks, one_process):
    """documents of unequal lengths make more rows on one rank than on the other: the other runs an
    empty one, or both would wait for ever"""
    monkeypatch.chdir(tmp_path)
    words = ("--data arith --tokenizer chars --n-layer 2 --n-head 2 --n-kv-head 1 --head-dim 8 --d-model 16 "
             "--d-ff 24 --steps 4 --batch 5 --row-tokens 30 --eval-docs 4 --eval-every 9 --save-every 9 "
             "--device cpu --threads 1 --max-len 64").split()
    ranks(2, ROWS, *words, "--grads", "sharded", "--name", "two", timeout=600)
    one_process(ROWS, *words, "--name", "one", timeout=600)
    one, two = checkpoint("one", 4), checkpoint("two", 4)
    assert all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)
    losses = [[json.loads(line)["loss"] for line in Path(f"runs/{n}/metrics.jsonl").read_text().splitlines()]
              for n in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# -----------------------------------------------------------------------------
# a model that only scores


@pytest.mark.parametrize("where", ["device", "host", "sharded"])
def test_a_lodged_model_scores_the_same(where):
    """and takes a new state wherever it lives: ProRL's reference becomes the policy"""
    one, other = tiny(), tiny(1)
    model = offload.place_blocks(tiny().requires_grad_(False), where, CPU)
    batch = row_of(one)
    for twin in (one, other):
        with torch.no_grad():
            assert torch.equal(batch.hidden(model), batch.hidden(twin))
        offload.load_state(model, other.state_dict(), CPU)
    state = offload.state_of(model, CPU)
    assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())


def test_a_block_is_whole_only_while_it_runs():
    """each rank keeps its part of every tensor of a block, flat"""
    env = SimpleNamespace(device=torch.device("cpu"), world=2, rank=1)
    model = tiny()
    whole = model.blocks[0].qkv.weight.detach().clone()
    offload.place_blocks(model, "sharded", env)
    part = model.blocks[0].qkv.weight.data
    assert torch.equal(part, whole.flatten()[whole.numel() // 2 :])
    held = sum(p.untyped_storage().nbytes() for p in model.blocks.parameters())
    assert held <= sum(4 * p.whole.numel() for p in model.blocks.parameters()) // 2 + 64


# -----------------------------------------------------------------------------
# the arithmetic, counted


def kept_by(model, batch):
    """-> bytes of the storages that a forward keeps for its backward, weights apart"""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage       # alive, so that its address is its own
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        hidden_ND = batch.hidden(model)
    hidden_ND.sum().backward()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("kw", [{}, dict(d_ff=320), dict(qk_norm=False, qkv_bias=True, n_head=8, head_dim=8),
                                dict(d_model=128, n_kv_head=1, n_layer=4),
                                dict(d_ff=256, n_expert=8, n_active=2)])
def test_activations_are_as_counted(checkpoint, kw, monkeypatch):
    """within 10% of what torch holds on a CPU; recomputed, one block's come on top in the backward. Norms
    as they are defined: those of common/norms.py keep less."""
    monkeypatch.setattr(cpu, "training", lambda x: False)
    model = tiny(**kw | dict(max_len=2048))
    model.checkpoint = checkpoint
    config = nanorl.Config(row_tokens=1024, checkpoint=checkpoint, max_new=255)
    counted = kept_by(model, row_of(model, 1024))
    if checkpoint:
        counted += 4 * 1024 * memory.kept_by_layer(model.config, False)
    promised = 4 * memory.activations(model.config, config, False, 256)
    assert abs(promised - counted) < 0.1 * counted, (promised, counted)


@pytest.mark.parametrize("offloaded", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_optimizer_are_as_counted(dtype, offloaded):
    """exactly: by storage, after a backward"""
    model = tiny().to(dtype)
    width = model.head_weight.element_size()
    config = nanorl.Config(row_tokens=64, offload=offloaded)
    parts = memory.fixed(model.config, config, width, 1, 64)
    optimizer = Optimizer(model, offload=offloaded)
    batch = row_of(model)
    linear_logprob(batch.hidden(model), model.head_weight, batch.targets_N)[0].sum().backward()
    largest = max(p.nbytes for p in model.parameters())

    def storages(tensors, but=()):
        found = [x.untyped_storage() for x in tensors if x is not None]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in found}
        return sum(size for address, size in sizes.items() if address not in but)

    weights = [p.data_ptr() for p in model.parameters()]
    assert parts["weights"] == storages(model.parameters())

    state = [x for s in optimizer.shards for x in (s.master, s.m, s.v, s.total)]
    sums = [x for p in model.parameters() for x in (p.grad, getattr(p, "grad32", None))]
    if offloaded:
        assert parts["gradients"] == largest and not storages(sums) and parts["optimizer shard"] == 0
        buffers = offload.BUFFERS * offload.BUFFER
        assert memory.on_host(model.config, config, 1) == storages(state, weights) + buffers
    else:
        assert parts["optimizer shard"] == storages(state, weights)
        assert parts["gradients"] == storages(sums) + (largest if dtype == torch.bfloat16 else 0)
        assert memory.on_host(model.config, config, 1) == 0


def test_the_cache_is_counted_by_its_pool():
    """tokens that the arithmetic promises are those that a pool of so many bytes has"""
    from rollout import Pool
    shape = GPTConfig(**SHAPE)
    pool = Pool(shape, torch.bfloat16, torch.device("cpu"), 4, 400, pages=9)
    assert pool.k.nbytes + pool.v.nbytes == 9 * pool.page * memory.token_bytes(shape, 2)


# -----------------------------------------------------------------------------
# --dry-run


@pytest.fixture
def model_folder(tiny_base, monkeypatch):
    """a folder whose config is Qwen2.5-0.5B's and whose weights nobody reads"""
    tiny_base(8)
    from common import hf
    monkeypatch.setattr(hf, "read_config", lambda folder: vars(fits.shape_of("Qwen2.5-0.5B")))
    monkeypatch.setattr(hf, "load", lambda *args: pytest.fail("a dry run reads no weights"))


DRY = ("--init base --data my.jsonl --reward my.py:score --device cpu --max-new 1000 --row-tokens 8192 "
       "--n 16 --dry-run")


def dry(capsys, words):
    nanorl.main([*DRY.split(), *words.split()])
    return capsys.readouterr().out


def test_a_card_that_is_not_here(model_folder, capsys):
    out = dry(capsys, "--card 24 --host 64")
    assert "it fits" in out and re.search(r"leaves the cache [\d,]+ tokens: [\d,]+ samples of", out)
    out = dry(capsys, "--card 8 --host 16")
    lines = out.split("the cheapest first:\n")[1].splitlines()
    assert lines and all("--" in line and "samples in the cache" in line for line in lines)
    assert "--offload" in out and not Path("runs").exists()
    for line in lines:                                       # what it says is true
        words, samples = re.fullmatch(r"  (.*?)  +([\d,]+) samples in the cache", line).groups()
        again = dry(capsys, f"{words} --card 8 --host 16")
        assert "it fits" in again and f"tokens: {samples} samples of" in again


def test_the_cache_of_a_card_is_counted_in_pages(model_folder, capsys):
    """the table multiplied slots by tokens, while a pool takes whole pages and room for what is cut off"""
    shape = fits.shape_of("Qwen2.5-0.5B")
    out = dry(capsys, "--card 24 --host 64 --slots 400")
    size, longest = re.search(r"KV cache +([\d.]+).*", out)[1], re.search(r"of up to ([\d,]+)", out)[1]
    longest = int(longest.replace(",", ""))
    paged = memory.full_cache(shape, 2, 400, longest, paged=True)
    assert float(size) == pytest.approx(paged / 1e9, abs=1e-3)
    assert paged > 1.01 * memory.full_cache(shape, 2, 400, longest, paged=False)


def test_a_host_that_is_too_small(model_folder, capsys):
    out = dry(capsys, "--card 8 --host 4")
    assert "--offload" not in out.split("it does not fit")[1]
    out = dry(capsys, "--card 8 --host 4 --offload --row-tokens 2048")
    assert re.search(r"it does not fit: the host has 4 GB, and \d+\.\d are needed", out)


def test_a_card_below_the_weights(model_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        dry(capsys, "--card 0.5")
    assert stopped.value.code == 2
    error, = capsys.readouterr().err.strip().splitlines()
    least = float(re.search(r"the smallest that would do has ([\d.]+) GB, with --", error)[1])
    assert 1 < least < 8


def test_no_flag_is_of_no_use(model_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        nanorl.configure(["--card", "24"])
    assert stopped.value.code == 2 and "it is for --dry-run" in capsys.readouterr().err


# -----------------------------------------------------------------------------
# what fits which card


def test_the_table_of_what_fits(capsys):
    """the design's targets: the smallest card for full fine-tuning with a cache of 16 samples of
    1,024 tokens at least"""
    fits.main([])
    out = capsys.readouterr().out
    numbers = json.loads(out.strip().splitlines()[-1])
    assert len([line for line in out.splitlines() if line.startswith("| ")]) >= len(fits.MODELS) + 1
    targets = [("Qwen2.5-0.5B", "8", 8), ("Qwen2.5-1.5B", "12", 25), ("Qwen2.5-3B", "24", 50),
               ("Qwen2.5-7B", "24", 123), ("Qwen2.5-14B", "80", 237), ("Qwen3-8B", "8 x 80", 132),
               ("Qwen2.5-14B", "8 x 80", 237)]
    for model, card, host in targets:
        assert numbers["samples"][model][card] >= 16, (model, card)
        assert numbers["host"][model] <= host, (model, numbers["host"][model])
    assert "--offload" not in numbers["flags"]["Qwen2.5-3B"]["80"]


def test_the_page_has_the_table():
    """docs/memory.md is copied from the arithmetic, never typed"""
    page = (Path(__file__).resolve().parent.parent / "docs/memory.md").read_text()
    shown = page.split("<!-- fits -->\n")[1].split("<!-- end -->")[0].splitlines()
    assert shown == fits.table(fits.Config())[0]


@pytest.mark.parametrize("model", ["Qwen2.5-0.5B", "Qwen2.5-1.5B"])
def test_the_commands_for_gsm8k_fit(model):
    """those of docs/memory.md, on the cards of 12 and 24 GB that they stand below, with a prompt of up to
    300 tokens and a host of 32 GB; without their flags they would not"""
    page = (Path(__file__).resolve().parent.parent / "docs/memory.md").read_text()
    commands = page.split(f"# {model}-Instruct, 12 GB and 24 GB")[1].splitlines()[1:3]
    shape = fits.shape_of(model)

    def left(words, card):
        config, _ = nanorl.configure(words)
        longest = config.max_new + 300
        parts = memory.fixed(shape, config, 2, 1, longest)
        assert memory.on_host(shape, config, 1) < 32e9
        return memory.samples_left(parts, shape, 2, card * 1e9, longest)

    for card, command in zip((12, 24), commands):
        words = command.removeprefix("python nanorl.py ").split()
        assert left(words, card) >= memory.FEW, command
    plain = [w for w in commands[0].split()[2:] if w not in ("--checkpoint", "--offload")]
    assert left(plain, 12) < memory.FEW


# -----------------------------------------------------------------------------
# the script for the day with a GPU


@pytest.mark.timeout(1800)
def test_the_gpu_script_rehearsed(tmp_path, monkeypatch, capsys):
    """every part of it to its end, on tiny shapes; one that fails and one that hangs lose nothing, and
    a second call takes what is missing and keeps what is there"""
    parts = {name: (400, *rest) for name, (_, *rest) in gpu.PARTS.items()}
    monkeypatch.setattr(gpu, "PARTS", {"fails": (60, "x", "-m no.such.module"),
                                       "hangs": (2, "x", "-m http.server 0"), **parts})
    words = ["--tiny", "--out", str(tmp_path / "out"), "--minutes", "25"]
    gpu.main(words)
    results = json.loads((tmp_path / "out/gpu.json").read_text())
    assert {name: found["ok"] for name, found in results.items()} == {
        "fails": False, "hangs": False, **dict.fromkeys(parts, True)}, results
    numbers = {name: found.get("numbers") for name, found in results.items()}
    assert numbers["step"]["t_train"] > 0 and numbers["offload"]["t_opt"] > 0
    assert numbers["parity"]["with parity"]["not equal"] == 0 < numbers["parity"]["price of an update"]
    assert numbers["speedrun"]["tokens_per_second"] > 0
    trained = Path(tmp_path / "out/speedrun/runs/hundred/metrics.jsonl").read_text().splitlines()
    assert json.loads(trained[-1])["step"] == 10
    assert "stopped after 2 s" in results["hangs"]["ended"]
    page = (tmp_path / "out/gpu.md").read_text()
    assert "| offload | t_train |" in page and "| fails | failed |" in page and "no.such.module" not in page
    capsys.readouterr()
    monkeypatch.setattr(gpu, "PARTS", gpu.PARTS | {"fails": (60, "x", "-m this")})
    gpu.main(words)
    said = capsys.readouterr().out
    assert "parity: there already" in said and "fails: 0 after" in said
