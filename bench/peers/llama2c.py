"""
llama2.c, the reference of small models on one thread (github.com/karpathy/llama2.c). Its run.c is not
in here: `--llama2c` names it, or a program made of it. What is here is its file of weights, written from
our model, and a vocabulary whose pieces are numbers, so that its text can be read back as tokens.
"""
import os
import resource
import shutil
import struct
import subprocess
from pathlib import Path

import torch

from common.flags import die

BOS = 1              # it begins with that token, and ends where it is sampled
FLAGS = {"gcc -Ofast": ["-Ofast"], "gcc -Ofast -march=native": ["-Ofast", "-march=native"]}


def find(path):
    """-> that path, to run.c or to a program; dies with one line where it is neither"""
    found = Path(path).resolve()
    if not found.is_file():
        die(f"--llama2c {path}: no such file; it wants run.c of llama2.c, or a program made of it")
    if found.suffix != ".c" and not os.access(found, os.X_OK):
        die(f"--llama2c {path}: neither C (its name would end with .c) nor a program that may be run")
    return found


def programs(source, folder):
    """{name: program}, each compiled into the folder; a program stays as it is. Without gcc: none"""
    if source.suffix != ".c":
        return {source.name: source}
    if not shutil.which("gcc"):
        return {}
    made = {}
    for name, flags in FLAGS.items():
        made[name] = Path(folder) / name.replace(" ", "_")
        command = ["gcc", *flags, "-o", made[name], source, "-lm"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["gcc says nothing"])[0]
            die(f"--llama2c {source}: gcc could not compile it: {why[:200]}")
    return made


def interleaved(weight, head_dim):
    """Rows of a q or k matrix: we rotate number i of a head with number i + head_dim / 2, it with i + 1."""
    return weight.view(-1, 2, head_dim // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tensors(model):
    """All weights, in the order of its file."""
    c = model.config
    q_rows, k_rows = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    layers = [block.qkv.weight.split((q_rows, k_rows, k_rows)) for block in model.blocks]
    gate_up = [block.gate_up.weight.split((c.d_ff, c.d_ff)) for block in model.blocks]
    yield model.embed.weight
    yield from (block.attn_norm.weight for block in model.blocks)
    yield from (interleaved(q, c.head_dim) for q, _, _ in layers)
    yield from (interleaved(k, c.head_dim) for _, k, _ in layers)
    yield from (v for _, _, v in layers)
    yield from (block.out.weight for block in model.blocks)
    yield from (block.mlp_norm.weight for block in model.blocks)
    yield from (gate for gate, _ in gate_up)
    yield from (block.down.weight for block in model.blocks)
    yield from (up for _, up in gate_up)
    yield model.norm.weight
    # cosines and sines of all positions: older versions read them, newer ones skip them
    inv_freq = c.rope_theta ** (-torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim)
    angles = torch.outer(torch.arange(c.max_len, dtype=torch.float64), inv_freq)
    yield angles.cos().float()
    yield angles.sin().float()


def write(model, folder):
    """model.bin and tokenizer.bin, as its programs want them."""
    c = model.config
    assert c.tie_embeddings and not c.qk_norm and c.norm_eps == 1e-5 and c.n_head * c.head_dim == c.d_model
    with open(Path(folder) / "model.bin", "wb") as file:
        file.write(struct.pack("7i", c.d_model, c.d_ff, c.n_layer, c.n_head, c.n_kv_head, c.vocab_size,
                               c.max_len))
        for tensor in tensors(model):
            file.write(tensor.detach().contiguous().numpy().tobytes())
    pieces = [f"{token} ".encode() for token in range(c.vocab_size)]
    with open(Path(folder) / "tokenizer.bin", "wb") as file:
        file.write(struct.pack("i", max(map(len, pieces))))
        for piece in pieces:
            file.write(struct.pack("fi", 0.0, len(piece)) + piece)


def run(program, folder, steps):
    """Greedy, so many steps. -> its tokens, and the CPU seconds of its process"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([program, "model.bin", "-t", "0", "-n", str(steps)], cwd=folder,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        die(f"--llama2c: {program.name} ended with {done.returncode}: {done.stderr.strip()[-200:]}")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [int(word) for word in done.stdout.split()], seconds
