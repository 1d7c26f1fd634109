"""
train_gpt.py: the compact model (Qwen3 shape), its pretraining and its fine-tuning on chats.

The model is a function of (tokens, positions, attend). Its input is one flat ragged row of tokens, sequences one after
another; `attend(layer, q, k, v)` is handed in by the caller and is the only place where sequences see each other. A trainer
passes packed attention, the sampler passes attention over its cache: the model never learns which.

Deleted from the usual recipe, and why:
- no batch dimension and no padding: rows are packed to a token budget, so every position is a real token;
- no logits: the model returns hidden states, the loss goes through linear_logprob on the rows that predict;
- no data loader process: document i is a pure function of (seed, i), so resuming is one integer and ranks never overlap.

    python train_gpt.py                                    the embedded base: 1.3M parameters, two minutes on two cores
    torchrun --nproc_per_node=8 train_gpt.py --preset mixed100m
    torchrun --nproc_per_node=8 train_gpt.py --preset gpt2 --data data/fineweb   the 124M run nanoGPT readers know
    python train_gpt.py --init DIR --data chat.jsonl       fine-tuning; only the assistant's turns are trained
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
import kernels
from common import hf, view
from common.optim import Optimizer
from common.run import Run, all_sum, barrier, die, flags, positive, progress, spare, start
from kernels import linear, linear_logprob, packed_attention, qk_norm_rope, rms_norm, rope_tables, swiglu, uniform
from pack import pack

# -----------------------------------------------------------------------------
# the model


@dataclass
class GPTConfig:
    vocab_size: int
    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    d_model: int
    d_ff: int
    max_len: int
    rope_theta: float
    rope_scaling: dict | None = None     # Hugging Face's dict: rope_type linear | llama3 | yarn and its numbers
    norm_eps: float = 1e-6
    qkv_bias: bool = False               # Qwen2, Qwen2.5
    qk_norm: bool = True                 # Qwen3; both off: Llama 3
    tie_embeddings: bool = False


def rope_frequencies(c):
    """-> inv_freq (head_dim/2) and the factor on cos and sin (yarn's attention temperature; 1 elsewhere)."""
    inv = 1.0 / c.rope_theta ** (torch.arange(0, c.head_dim, 2, dtype=torch.float32) / c.head_dim)
    s = c.rope_scaling
    if s is None:
        return inv, 1.0
    kind, factor = s["rope_type"], s["factor"]
    if kind == "linear":
        return inv / factor, 1.0
    if kind == "llama3":                                         # long waves interpolated, short ones kept, a ramp between
        turns = s["original_max_position_embeddings"] * inv / (2 * math.pi)      # full turns within the original context
        keep = ((turns - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])).clamp(0, 1)
        return inv * (keep + (1 - keep) / factor), 1.0
    if kind == "yarn":                                           # the same idea, the ramp linear in the dimension's index
        def index(turns):
            return c.head_dim * math.log(s["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))
        low, high = index(s.get("beta_fast") or 32), index(s.get("beta_slow") or 1)
        if s.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, c.head_dim - 1)
        ramp = ((torch.arange(c.head_dim // 2) - low) / max(high - low, 1e-3)).clamp(0, 1)
        return inv * (1 - ramp + ramp / factor), s.get("attention_factor") or 0.1 * math.log(factor) + 1.0
    raise ValueError(f"rope_scaling type {kind!r} is not known here; known: linear, llama3, yarn")


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


def weight(block, name, kind="weight"):
    """block.NAME.weight, found without nn.Module's __getattr__: of one row, a step takes as long for ten of those as for a product."""
    return block._modules[name]._parameters[kind]


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim, self.eps = c.n_head, c.n_kv_head, c.head_dim, c.norm_eps
        self.qk_norm = c.qk_norm
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.qkv = nn.Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.qkv_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.out = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=False)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x_TD, cos_T, sin_T, attend, layer):
        qkv = linear(rms_norm(x_TD, weight(self, "attn_norm"), self.eps), weight(self, "qkv"), weight(self, "qkv", "bias"))
        heads = qkv.view(-1, self.heads + 2 * self.kv_heads, self.head_dim)
        q, k, v = heads.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), dim=1)      # (T, heads, head_dim)
        norms = (weight(self, "q_norm"), weight(self, "k_norm")) if self.qk_norm else (None, None)
        q, k = qk_norm_rope(q, k, *norms, cos_T, sin_T, self.eps)
        x_TD = x_TD + linear(attend(layer, q, k, v).flatten(1), weight(self, "out"), rows=False)
        hidden = swiglu(linear(rms_norm(x_TD, weight(self, "mlp_norm"), self.eps), weight(self, "gate_up"), rows=False))
        return x_TD + linear(hidden, weight(self, "down"), rows=False)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.checkpoint = False                                  # recompute each block in the backward: memory for time
        self.compiled = False                                    # its blocks are
        self._rope = None

    @property
    def head_weight(self):                                       # (V, D), tied or not
        return weight(self, "embed" if self.config.tie_embeddings else "head")

    def forward(self, tokens_T, positions_T, attend):
        if self._rope is None or self._rope[0].device != tokens_T.device:
            inv_freq, scale = rope_frequencies(self.config)
            self._rope = inv_freq.to(tokens_T.device), scale
        x_TD, T = F.embedding(tokens_T, weight(self, "embed")), len(tokens_T)
        more = spare(T, x_TD)                                    # rows of zeros that no sequence sees
        if more:
            x_TD, positions_T, inner = F.pad(x_TD, (0, 0, 0, more)), F.pad(positions_T, (0, more)), attend
            attend = lambda layer, q, k, v: F.pad(inner(layer, q[:T], k[:T], v[:T]), (0, 0, 0, 0, 0, more))  # noqa: E731
        cos_T, sin_T = rope_tables(positions_T, *self._rope)     # (T, head_dim/2)
        if self.compiled:                                        # a row's attend holds its lengths: compiled in, each row would recompile
            attend = torch.compiler.disable(attend)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, cos_T, sin_T, attend, layer, use_reentrant=False)
            else:
                x_TD = block(x_TD, cos_T, sin_T, attend, layer)
        return self.norm(x_TD[:T])                               # (T, D): hidden states; the head is the caller's

    def alone(self, keys, values):
        """-> forward() of a single token, in numpy. Of one row a decode step is two hundred operations on a few hundred numbers each, and
        numpy starts one in a quarter of torch's time. It reads the weights where they are. keys and values: those of the row, one
        (n_kv_head, capacity, head_dim) array a layer; the new token's are written there."""
        c, heads, half = self.config, self.config.n_head + self.config.n_kv_head, self.config.head_dim // 2
        view = lambda module, kind="weight": None if getattr(module, kind, None) is None else getattr(module, kind).detach().numpy()  # noqa: E731
        layers = [SimpleNamespace(qkv=view(b.qkv), bias=view(b.qkv, "bias"), out=view(b.out), gate_up=view(b.gate_up), down=view(b.down),
                                  attn_norm=view(b.attn_norm), mlp_norm=view(b.mlp_norm), q_norm=view(b.q_norm), k_norm=view(b.k_norm))
                  for b in self.blocks]
        embed, norm, inv_freq, scale = view(self.embed), view(self.norm), self._rope[0].numpy(), self._rope[1]

        def unit(x):
            return x / np.sqrt(np.add.reduce(x * x, -1, keepdims=True) / x.shape[-1] + c.norm_eps)

        def forward(token_1, position_1, attend):
            x_D, at = embed[int(token_1)], int(position_1)
            cos, sin = np.cos(at * inv_freq) * scale, np.sin(at * inv_freq) * scale
            cos, sin = np.concatenate((cos, cos)), np.concatenate((-sin, sin))             # (head_dim)
            for w, k, v in zip(layers, keys, values):
                qkv = w.qkv @ (unit(x_D) * w.attn_norm)
                if w.bias is not None:
                    qkv += w.bias
                qkv = qkv.reshape(-1, c.head_dim)                                          # (heads, head_dim)
                qk = qkv[:heads]
                if w.q_norm is not None:
                    qk = unit(qk)
                    qk[: c.n_head] *= w.q_norm
                    qk[c.n_head :] *= w.k_norm
                qk = qk * cos + np.concatenate((qk[:, half:], qk[:, :half]), 1) * sin
                k[:, at], v[:, at] = qk[c.n_head :], qkv[heads:]
                q = qk[: c.n_head].reshape(c.n_kv_head, -1, c.head_dim)                    # a key head and the query heads that share it
                s = np.matmul(q, k[:, : at + 1].transpose(0, 2, 1)) * c.head_dim**-0.5
                s = np.exp(s - np.maximum.reduce(s, -1, keepdims=True))
                o = np.matmul(s / np.add.reduce(s, -1, keepdims=True), v[:, : at + 1])
                x_D = x_D + w.out @ o.reshape(-1)
                gate_up = w.gate_up @ (unit(x_D) * w.mlp_norm)
                with np.errstate(over="ignore"):                                           # exp(100) is inf, and 1 / inf the 0 it should be
                    hidden = gate_up[: c.d_ff] / (1 + np.exp(-gate_up[: c.d_ff])) * gate_up[c.d_ff :]
                x_D = x_D + w.down @ hidden
            return torch.from_numpy(unit(x_D) * norm).unsqueeze(0)

        return forward

    @torch.no_grad()
    def init_weights(self, seed):
        """Normal with 1/sqrt(fan in); what writes into the residual stream starts at zero, so each block starts as the identity."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = 0.0 if name.endswith(("out.weight", "down.weight")) else 0.02 if "embed" in name else p.shape[1] ** -0.5
                p.copy_(torch.randn(p.shape, generator=g) * std)
            elif name.endswith("bias"):
                p.zero_()
        return self

    @classmethod
    def from_hf(cls, folder, dtype=None, device="cpu"):
        c = hf.read_config(folder)
        with torch.device("meta"):
            model = cls(GPTConfig(**c))
        model = model.to(dtype or torch.float32).to_empty(device=device)
        hf.load(folder, c, dict(model.named_parameters()))
        return model

    def load_hf(self, folder):
        """The weights of a folder, in place: whoever reads these tensors reads the new ones."""
        hf.load(folder, asdict(self.config), dict(self.named_parameters()))

    def save_hf(self, folder, tokenizer=None):
        dtype = self.embed.weight.dtype
        hf.save(folder, asdict(self.config), dict(self.named_parameters()), dtype, eos=tokenizer.stop if tokenizer else None)
        if tokenizer:
            tokenizer.save(folder)


@torch.no_grad()
def sample(model, prompt, max_new, stop=(), temperature=1.0, seed=0, problem=0, index=0, visit=0):
    """The oracle: one sequence, no cache, the whole prefix run again for every token. The sampler must give the same."""
    tokens, device = list(prompt), model.embed.weight.device
    for t in range(max_new):
        T = len(tokens)
        hidden = model(torch.tensor(tokens, device=device), torch.arange(T, device=device), packed_attention([0, T], T))[-1]
        logits = (hidden @ model.head_weight.t()).float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            cdf = (logits / temperature).softmax(-1).cumsum(-1)
            u = uniform(seed, visit, problem, index, t, device=device) * cdf[-1]
            token = min(int(torch.searchsorted(cdf, u, right=True)), logits.numel() - 1)
        tokens.append(token)
        if token in stop:
            break
    return tokens[len(prompt):]


# -----------------------------------------------------------------------------
# config


@dataclass
class Config:
    name: str = "base"                   # the run: everything it writes lies in runs/NAME
    preset: Literal["base", "small", "mixed100m", "gpt2"] = "base"  # a set of flags; flags given beside it win
    data: str = "mixed"                  # a task (its corpus), a text file, a folder of .bin token shards, or chats in a .jsonl file
    tokenizer: str = "numbers"           # chars, numbers, bytes, gpt2, or a folder; with --init the folder's own
    init: str = ""                       # a Hugging Face folder or a run to start from; its shape then wins over the flags
    steps: int = 1060                    # optimizer steps
    batch: int = 64                      # documents a step, over all ranks
    row_tokens: int = 4096               # tokens of one packed row (a micro-batch)
    seq_len: int = 1024                  # tokens of a document cut from a text or from shards; longer documents are cut to it
    n_layer: int = 5                     # blocks
    n_head: int = 4                      # query heads
    n_kv_head: int = 2                   # key and value heads
    head_dim: int = 32                   # width of a head
    d_model: int = 128                   # width of the residual stream
    d_ff: int = 384                      # width of the SwiGLU
    max_len: int = 4096                  # positions the model promises to serve
    rope_theta: float = 10000.0          # base of the rotary waves
    tie_embeddings: bool = False         # one matrix for embedding and head
    lr: float = 1e-2                     # AdamW: embeddings, head, norms (and everything with --no-muon)
    muon: bool = True                    # Muon for the matrices of the blocks
    muon_lr: float = 3e-2                # its learning rate
    weight_decay: float = 0.0            # decoupled, matrices only
    clip: float = 1.0                    # global norm of the gradient; 0: no clipping
    warmup: float = 0.02                 # share of the steps to warm up
    decay: float = 0.5                   # share of the steps to decay to zero, linearly, at the end
    prompts: bool = False                # train on the prompts of a task too, not on completions alone
    eval_every: int = 200                # steps between evaluations on the valid split
    eval_docs: int = 512                 # documents of one
    save_every: int = 400                # steps between checkpoints
    target: float = 0.0                  # a validation loss to compare the last one with, printed at the end
    seed: int = 0                        # weights and data
    checkpoint: bool = False             # recompute blocks in the backward: memory for time
    compile: bool = False                # torch.compile the blocks
    device: str = "auto"                 # auto, cpu, cuda, mps
    dtype: str = "auto"                  # auto (bf16 on CUDA, fp32 elsewhere), fp32, bf16
    threads: int = 0                     # CPU threads; 0: all cores, shared by the ranks
    deterministic: bool | None = None    # repeatable bit for bit; none: on CPU
    resume: bool = False                 # go on with runs/NAME
    wandb: str = ""                      # a wandb project, if curves should go there too


PRESETS = {
    "base": "",
    "small": "--name small --n-layer 3 --d-model 64 --n-head 2 --n-kv-head 1 --d-ff 192",
    "mixed100m": "--name mixed100m --data mixed:4 --n-layer 12 --n-head 12 --n-kv-head 4 --head-dim 64 --d-model 768 --d-ff 2048 "
                 "--steps 4000 --batch 2048 --row-tokens 32768 --lr 2e-3 --muon-lr 1e-2 --weight-decay 0.1",
    "gpt2": "--name gpt2 --data data/fineweb --tokenizer gpt2 --n-layer 12 --n-head 12 --n-kv-head 12 --head-dim 64 --d-model 768 "
            "--d-ff 2048 --seq-len 1024 --batch 512 --row-tokens 32768 --steps 5100 --lr 2e-3 --muon-lr 1e-2 --weight-decay 0.1 "
            "--decay 0.4 --tie-embeddings --eval-docs 2560 --target 3.28",
}

# -----------------------------------------------------------------------------
# data: document(split, i) -> (tokens, trained), a pure function of its address. `trained` marks the tokens that are predicted.


def documents(config, tok):
    """-> document(split, i), and how many train documents there are (None: endless)."""
    path = Path(config.data)
    if path.suffix == ".jsonl":
        return _chats(path, tok, config)
    if path.is_dir() or path.suffix == ".bin":
        return _windows(*_shards(path), config)
    if path.is_file():
        tokens = np.array(data.begun(tok.encode(path.read_text()), tok), dtype=np.int64)
        held = len(tokens) // 20
        return _windows([tokens[:len(tokens) - held]], [tokens[len(tokens) - held:]], config)
    if path.suffix:
        raise FileNotFoundError(f"--data {config.data}: no such file")
    task = data.load(config.data)
    end = tok.encode(tok.end)

    def document(split, i):
        prompt, completion = task.document(split, config.seed, i)
        prompt = data.begun(tok.encode(prompt), tok)
        completion = tok.encode(completion) + end
        return prompt + completion, [config.prompts] * len(prompt) + [True] * len(completion)

    return document, None


def _chats(path, tok, config):
    """{messages: [{role, content}]} a line; the assistant's words and their stop token are trained, nothing else."""
    if not path.is_file():
        raise FileNotFoundError(f"--data {path}: no such file")
    chats = []
    for n, line in data.lines(path):
        try:
            chats.append([{"role": m["role"], "content": m["content"], **m} for m in json.loads(line)["messages"]])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise ValueError(f"--data {path}, line {n}: not a JSON object with a list `messages`") from None
    if not chats:
        raise ValueError(f"--data {path} is empty: give one chat a line")
    held = max(1, len(chats) // 20) if len(chats) > 1 else 0
    splits = {"valid": chats[:held] or chats, "train": chats[held:]}

    def document(split, i):
        rows = splits[split]
        order = np.random.default_rng([config.seed, i // len(rows)]).permutation(len(rows))      # a new order every epoch
        messages, tokens, trained, done = rows[order[i % len(rows)]], [], [], ""
        for k, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = tok.chat(messages[:k]), tok.chat(messages[:k + 1])
            if not (before.startswith(done) and after.startswith(before)):
                raise ValueError(f"--data {path}: the chat template rewrites earlier turns, which hides what to train; split the chats")
            for text, flag in ((before[len(done):], False), (after[len(before):], True)):
                ids = tok.encode(text)
                tokens, trained = tokens + ids, trained + [flag] * len(ids)
            done = after
        whole = data.begun(tokens, tok)                          # a template may have written the beginning-of-text token, or not
        return whole, [False] * (len(whole) - len(tokens)) + trained

    return document, len(splits["train"])


def _shards(path):
    """.bin files as the FineWeb speedruns write them: 256 int32 (20240520, 1, number of tokens), then uint16 tokens."""
    files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"--data {path}: no .bin shards there")
    shards = []
    for file in files:
        header = np.fromfile(file, dtype=np.int32, count=256)
        if len(header) < 256 or header[0] != 20240520 or header[1] != 1:
            raise ValueError(f"{file} is not a version 1 token shard (its header says {header[:2].tolist()}): download it again")
        tokens = np.memmap(file, dtype=np.uint16, mode="r", offset=1024)
        if len(tokens) != header[2]:
            raise ValueError(f"{file} holds {len(tokens):,} tokens, its header says {header[2]:,}: it is cut short, download it again")
        shards.append(tokens)
    valid = [t for f, t in zip(files, shards) if "val" in f.name]
    train = [t for f, t in zip(files, shards) if "val" not in f.name]
    return train or shards, valid or shards[-1:]


def _windows(train, valid, config):
    """Windows of seq_len + 1 tokens, one after another through the shards; every token but a window's first is trained once an epoch."""
    splits = {"train": train, "valid": valid}
    counts = {split: [max(0, len(t) - 1) // config.seq_len for t in parts] for split, parts in splits.items()}
    for split, count in counts.items():
        if sum(count) == 0:
            tokens = sum(len(t) for t in splits[split])
            raise ValueError(f"--data {config.data}: its {split} part has {tokens:,} tokens, shorter than one sequence; lower --seq-len")

    def document(split, i):
        i %= sum(counts[split])
        for tokens, count in zip(splits[split], counts[split]):
            if i < count:
                window = tokens[i * config.seq_len:(i + 1) * config.seq_len + 1]
                return window.astype(np.int64).tolist(), [False] + [True] * config.seq_len
            i -= count

    return document, sum(counts["train"])


def packed_rows(docs, budget, device):
    """Documents -> rows of at most `budget` tokens: (tokens_T, positions_T, cu_seqlens, at_N, targets_N)."""
    for row in pack([len(tokens) for tokens, _ in docs], budget):
        row.sort(key=lambda i: len(docs[i][0]))                  # equal lengths side by side: one attention call
        tokens, positions, at, targets, cu = [], [], [], [], [0]
        for i in row:
            ids, trained = docs[i]
            at += [cu[-1] + t - 1 for t in range(1, len(ids)) if trained[t]]     # the token before predicts
            targets += [ids[t] for t in range(1, len(ids)) if trained[t]]
            tokens += ids
            positions += range(len(ids))
            cu.append(cu[-1] + len(ids))
        flat = kernels.to_device(tokens + positions + at + targets, torch.int64, device)     # one copy, and nobody waits for it
        yield *flat.split([len(tokens), len(tokens), len(at), len(at)]), cu


# -----------------------------------------------------------------------------
# loss


def forward(model, row):
    """-> the sum of -log p over the row's targets."""
    tokens_T, positions_T, at_N, targets_N, cu = row
    attend = packed_attention(cu, max(b - a for a, b in zip(cu, cu[1:])))
    hidden_ND = model(tokens_T, positions_T, attend)[at_N]
    logp_N, _ = linear_logprob(hidden_ND, model.head_weight, targets_N)
    return -logp_N.sum()


@torch.no_grad()
def evaluate(model, document, config, env, tok):
    """-> mean loss a token and bits per byte of what is trained, on the first documents of the valid split. The end token costs its bits
    and is no text: its letters are not among the bytes, or a short text would look half as hard as it is."""
    docs = [document("valid", i) for i in range(env.rank, config.eval_docs, env.world)]
    docs = [(tokens[:config.row_tokens], trained[:config.row_tokens]) for tokens, trained in docs]
    loss = sum(float(forward(model, row)) for row in packed_rows(docs, config.row_tokens, env.device))
    count = sum(sum(trained[1:]) for _, trained in docs)
    silent = tok.stop | {i for word in tok.special for i in tok.encode(word)}
    texts = ([t for t, on in zip(tokens[1:], trained[1:]) if on and t not in silent] for tokens, trained in docs)
    size = sum(len(tok.decode(ids).encode()) for ids in texts)
    loss, count, size = all_sum(loss), all_sum(count), all_sum(size)
    return loss / max(1, count), loss / math.log(2) / max(1, size)


def schedule(step, config):
    """Warm up, hold, decay linearly to zero."""
    up, down = config.warmup * config.steps, config.decay * config.steps
    return min(1.0, (step + 1) / max(1.0, up), (config.steps - step) / max(1.0, down))


PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "4090": 165e12, "3090": 71e12, "L40": 181e12, "B200": 2250e12}  # dense bf16 FLOP/s


def mfu(model, tokens, squares, seconds):
    """Model FLOPs of this rank's tokens over what its GPU could do; None where the GPU's peak is not known."""
    peak = next((v for k, v in PEAK.items() if torch.cuda.is_available() and k in torch.cuda.get_device_name()), None)
    c = model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("embed") or c.tie_embeddings)
    return peak and (6 * weights * tokens + 6 * c.n_layer * c.n_head * c.head_dim * squares) / seconds / peak


# -----------------------------------------------------------------------------


def setup(config, env):
    """-> model, tokenizer, document, and the number of train documents. Everything a user can get wrong is told here."""
    try:
        source = hf.find(config.init) if config.init else None
        tok = data.tokenizer(source or config.tokenizer)
        if source:
            model = GPT.from_hf(source, dtype=env.dtype, device=env.device)
        else:
            shape = GPTConfig(tok.vocab_size, config.n_layer, config.n_head, config.n_kv_head, config.head_dim, config.d_model, config.d_ff,
                              config.max_len, config.rope_theta, tie_embeddings=config.tie_embeddings)
            model = GPT(shape).init_weights(config.seed).to(env.device, env.dtype)
        kernels.backend(env.device)
        document, count = documents(config, tok)
        document("train", 0)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    model.checkpoint = config.checkpoint
    if config.compile:
        model.compiled = True
        for block in model.blocks:
            block.compile(dynamic=True)
    return model, tok, document, count


def main(argv=None):
    # ---- config
    argv = list(sys.argv[1:] if argv is None else argv)
    config = flags(Config, argv, __doc__)
    config = flags(Config, PRESETS[config.preset].split() + argv, __doc__)
    positive(config, "steps batch row_tokens seq_len n_layer n_head n_kv_head d_model d_ff eval_every save_every")
    if config.n_head % config.n_kv_head:
        die(f"--n-head {config.n_head} is not a multiple of --n-kv-head {config.n_kv_head}")
    if config.head_dim % 2:
        die(f"--head-dim {config.head_dim} is odd: rotary positions turn pairs")

    # ---- init
    env = start(config.device, config.dtype, config.threads, config.deterministic)
    model, tok, document, count = setup(config, env)
    run = Run(f"runs/{config.name}", config, env, resume=config.resume, free=("eval_every", "save_every", "threads", "compile", "wandb"),
              sources=[__file__, kernels.__file__])
    begin, found = 0, run.latest() if config.resume else None
    if found:
        model.load_hf(found[0])
    optimizer = Optimizer(model, lr=config.lr, muon_lr=config.muon_lr if config.muon else None, weight_decay=config.weight_decay,
                          clip=config.clip)
    if found:
        states = run.load(found[0])
        optimizer.load_state_dict([state["optimizer"] for state in states])
        begin = states[0]["step"]
    if config.resume:
        run.rewind(begin)
    size = sum(p.numel() for p in model.parameters())
    run.log(f"{size / 1e6:.2f}M parameters, vocabulary {tok.vocab_size}, {config.data}, "
            f"{f'{count:,} documents' if count else 'endless documents'}, from step {begin} to {config.steps}")

    def save(step):
        run.save(step, lambda folder: model.save_hf(folder, tok), dict(optimizer=optimizer.state_dict(), step=step))

    # ---- train
    bar = progress(config.steps, "train")
    bar.update(begin)
    loss = bpb = math.nan
    for step in range(begin, config.steps):
        clock = time.perf_counter()
        ids = range(step * config.batch + env.rank, (step + 1) * config.batch, env.world)
        docs = [document("train", i) for i in ids]
        docs = [(tokens[:config.row_tokens], trained[:config.row_tokens]) for tokens, trained in docs]
        total = all_sum(sum(sum(trained[1:]) for _, trained in docs))            # the one normaliser, over ranks and rows
        packed = time.perf_counter()
        train_loss = torch.zeros((), device=env.device)
        for row in packed_rows(docs, config.row_tokens, env.device):
            row_loss = forward(model, row)
            row_loss.backward()
            train_loss += row_loss.detach()
        trained = time.perf_counter()
        try:
            stats = optimizer.step(divide=total, factor=schedule(step, config))
        except FloatingPointError as e:
            die(f"step {step + 1}: {e}. The last checkpoint holds: {run.latest() or 'none was written yet'}")
        train_loss = all_sum(float(train_loss)) / max(1, total)
        now = time.perf_counter()

        # ---- log
        tokens = sum(len(t) for t, _ in docs)
        rate = all_sum(tokens) / (now - clock)
        used = mfu(model, tokens, sum(len(t) ** 2 for t, _ in docs), now - clock) if env.device.type == "cuda" else None
        numbers = dict(loss=train_loss, grad_norm=stats["grad_norm"], lr=schedule(step, config) * config.lr, tokens_per_second=rate,
                       t_pack=packed - clock, t_train=trained - packed, t_opt=now - trained, skipped=optimizer.skipped)
        if used:
            numbers["mfu"] = used
        last = step + 1 == config.steps
        if (step + 1) % config.eval_every == 0 or last:
            loss, bpb = evaluate(model, document, config, env, tok)
            numbers.update({"eval/loss": loss, "eval/bpb": bpb})
            run.log(f"step {step + 1}/{config.steps}  loss {loss:.4f}  bits/byte {bpb:.4f}  train {train_loss:.4f}  "
                    f"grad {stats['grad_norm']:.2f}  {rate:,.0f} tok/s" + (f"  mfu {used:.1%}" if used else ""))
        run.metrics(step + 1, **numbers)
        bar.set_postfix_str(f"loss {train_loss:.3f}, {rate:,.0f} tok/s")
        bar.update()
        stopping = run.stopping()
        if (step + 1) % config.save_every == 0 or last or stopping:
            save(step + 1)
        if stopping and not last:
            run.bye(step + 1)
    bar.close()

    # ---- samples
    if config.target and math.isnan(loss):                       # a finished run, resumed: nothing was trained just now
        loss, bpb = evaluate(model, document, config, env, tok)
    barrier()                                                    # the last checkpoint counts when the slowest rank has written
    if env.master:
        if config.target:
            run.log(f"validation loss {loss:.4f}, target {config.target}: {'reached' if loss <= config.target else 'not reached'}")
        for i in range(6):
            tokens, trained = document("valid", i)
            cut = max(1, trained.index(True)) if True in trained else len(tokens)
            prompt = tokens[:min(cut, 256)]
            text = tok.decode(sample(model, prompt, 96, stop=tok.stop, seed=config.seed, index=i))
            run.log(f"  {tok.decode(prompt)!r} -> {text!r}")
        view.curves(run.folder)
        run.log(f"wrote {run.folder}: curves.png, and the model in {run.latest()[0]} (a Hugging Face folder)")
    run.close()


if __name__ == "__main__":
    main()
