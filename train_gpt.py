"""
train_gpt.py: the compact model (Qwen3 shape), its pretraining and its fine-tuning on chats.

The model is a function of (tokens, positions, attend). Its input is one flat ragged row of
tokens, sequences one after another; `attend(layer, q, k, v)` is handed in by the caller and is
the only place where sequences see each other. A trainer passes packed attention, the sampler
passes attention over its cache: the model never learns which.

Left out of the usual recipe, and why:
- no batch dimension and no padding: rows are packed to a token budget, so every position is a real
  token;
- no logits: the model returns hidden states, the loss goes through linear_logprob on the rows that
  predict;
- no data loader process: document i is a pure function of (seed, i), so resuming is one integer and
  ranks never overlap.

    python train_gpt.py                                    the embedded base: 0.5M parameters, about
                                                           a minute on two cores
    torchrun --nproc_per_node=8 train_gpt.py --preset mixed100m
    torchrun --nproc_per_node=8 train_gpt.py --preset gpt2 --data data/fineweb
                                                           the 124M run nanoGPT readers know
    python train_gpt.py --init DIR --data chat.jsonl       fine-tuning; only the assistant's turns
                                                           are trained
"""

import math
import time
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import data
import kernels
from common import cpu, hf, machine, numpy_row, view
from common.experts import Experts
from common.files import newest, run_config
from common.flags import check_run, die, flags, positive, shares, without_effect
from common.machine import Machine
from common.moved import moved
from common.optim import Optimizer
from common.run import (Run, all_max, all_sum, barrier, out_of_time, progress, start,
                        threads_of_resumed, with_date)
from data.documents import documents, kind_of
from kernels import (linear, linear_logprob, packed_attention, qk_norm_rope, rms_norm,
                     rope_tables, swiglu, uniform)
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
    rope_scaling: dict | None = None  # Hugging Face's: rope_type linear | llama3 | yarn, and its numbers
    norm_eps: float = 1e-6
    qkv_bias: bool = False            # Qwen2, Qwen2.5
    qk_norm: bool = True              # Qwen3; both off: Llama 3
    tie_embeddings: bool = False
    n_expert: int = 0                 # Qwen3-MoE: experts of a block; 0: one SwiGLU
    n_active: int = 0                 # of them, for each token; together they are d_ff wide
    norm_gates: bool = True           # what they count sums to 1


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps)


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads = c.n_head
        self.kv_heads = c.n_kv_head
        self.head_dim = c.head_dim
        self.eps = c.norm_eps
        self.attn_norm = RMSNorm(c.d_model, c.norm_eps)
        self.qkv = nn.Linear(c.d_model, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.qkv_bias)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.out = nn.Linear(c.n_head * c.head_dim, c.d_model, bias=False)
        self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
        self.gate_up = nn.Linear(c.d_model, 2 * c.d_ff, bias=False)
        self.down = nn.Linear(c.d_ff, c.d_model, bias=False)

    def forward(self, x_TD, cos_T, sin_T, attend, layer):
        w = cpu.Tensors(self)  # w.out is self.out.weight
        qkv = linear(rms_norm(x_TD, w.attn_norm, self.eps), w.qkv, w.qkv_bias)
        heads = qkv.view(-1, self.heads + 2 * self.kv_heads, self.head_dim)  # (T, heads, head_dim)
        q, k, v = heads.split_with_sizes((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = qk_norm_rope(q, k, w.q_norm, w.k_norm, cos_T, sin_T, self.eps)
        x_TD = x_TD + linear(attend(layer, q, k, v).flatten(1), w.out, strided=True)
        return x_TD + self.mlp(rms_norm(x_TD, w.mlp_norm, self.eps), w)

    def mlp(self, x_TD, w):
        return linear(swiglu(linear(x_TD, w.gate_up, strided=True)), w.down, strided=True)


class SparseBlock(Block):
    """Qwen3-MoE: experts in place of the SwiGLU."""

    def __init__(self, c):
        super().__init__(c)
        del self.gate_up, self.down
        self.experts = Experts(c)

    def mlp(self, x_TD, w):
        return self.experts(x_TD)


class GPT(nn.Module):
    def __init__(self, config, block=None):
        super().__init__()
        self.config = c = config
        block = block or (SparseBlock if c.n_expert else Block)
        weight = torch.empty(c.vocab_size, c.d_model)
        if not weight.is_meta:                   # there it would import half of torch, for a second
            weight.normal_()
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)
        self.blocks = nn.ModuleList(block(c) for _ in range(c.n_layer))
        self.norm = RMSNorm(c.d_model, c.norm_eps)
        self.head = None if c.tie_embeddings else nn.Linear(c.d_model, c.vocab_size, bias=False)
        self.checkpoint = False  # recompute each block in the backward: memory for time
        self.compiled = False    # its blocks went through torch.compile
        self._rope = None

    @property
    def head_weight(self):  # (V, D), tied or not
        return self.embed.weight if self.config.tie_embeddings else self.head.weight

    def forward(self, tokens_T, positions_T, attend):
        if self._rope is None or self._rope[0].device != tokens_T.device:
            inv_freq, scale = hf.rope_frequencies(self.config)
            self._rope = inv_freq.to(tokens_T.device), scale
        x_TD = F.embedding(tokens_T, self.embed.weight)
        x_TD, positions_T, attend = cpu.padded(x_TD, positions_T, attend)
        cos_T, sin_T = rope_tables(positions_T, *self._rope)  # (T, head_dim/2)
        if self.compiled:  # a row's attend holds its lengths: compiled in, each row would recompile
            attend = torch.compiler.disable(attend)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint and torch.is_grad_enabled():
                x_TD = checkpoint(block, x_TD, cos_T, sin_T, attend, layer, use_reentrant=False)
            else:
                x_TD = block(x_TD, cos_T, sin_T, attend, layer)
        return self.norm(x_TD[: len(tokens_T)])  # (T, D): hidden states; the head is the caller's

    def lone_row(self, keys, values):
        """-> forward() of a single token, for the sampler: a copy of this model in numpy where the
        two agree, else the model."""
        return numpy_row.lone_row(self, keys, values, Block, packed_attention, (globals(), vars(kernels)))

    @torch.no_grad()
    def init_weights(self, seed, embedding=0.02):
        """Normal with 1/sqrt(fan in), and the embedding as `embedding` says; what writes into the
        residual stream starts at zero, so each block starts as the identity."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                std = embedding if "embed" in name else p.shape[1] ** -0.5
                if name.endswith(("out.weight", "down.weight")):
                    std = 0.0
                p.copy_(torch.randn(p.shape, generator=g) * std)
            elif name.endswith("bias"):
                p.zero_()
        return self

    @classmethod
    def from_hf(cls, folder, dtype=None, device="cpu"):
        c = hf.read_config(folder)
        with torch.device("meta"):
            model = cls(GPTConfig(**c))
        dtype = dtype or torch.float32
        # what to_empty() does, without the second of imports that empty_like() takes on "meta"
        model._apply(lambda p: torch.empty(p.shape, dtype=dtype, device=device))
        if torch.device(device).type != "meta":
            hf.load(folder, c, dict(model.named_parameters()))
        return model

    def load_hf(self, folder):
        """The weights of a folder, in place: whoever reads these tensors reads the new ones."""
        hf.load(folder, asdict(self.config), dict(self.named_parameters()))

    def save_hf(self, folder, tokenizer=None):
        stop = tokenizer.stop if tokenizer else None
        parameters = dict(self.named_parameters())
        hf.save(folder, asdict(self.config), parameters, self.embed.weight.dtype, eos=stop)
        if tokenizer:
            tokenizer.save(folder)


@torch.no_grad()
def sample(model, prompt, max_new, stop=(), temperature=1.0, seed=0, problem=0, index=0,
           visit=0):
    """The oracle: one sequence, no cache, the whole prefix run again for every token. The sampler
    must give the same."""
    device = model.embed.weight.device
    tokens = list(prompt)
    for t in range(max_new):
        T = len(tokens)
        tokens_T = torch.tensor(tokens, device=device)
        hidden_TD = model(tokens_T, torch.arange(T, device=device), packed_attention([0, T], T))
        logits = (hidden_TD[-1] @ model.head_weight.t()).float()
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
class Config(Machine):
    """pretraining"""
    name: str = "base"                   # the run: everything it writes lies in runs/NAME
    preset: Literal["base", "small", "tiny", "recall", "mixed100m", "gpt2"] = "base"  # flags; others win
    data: str = "mixed"                  # a task, stdlib, a text file, chats (.jsonl), .bin shards
    tokenizer: str = "numbers"           # chars, numbers, bytes, gpt2, a folder; --init has its own
    init: str = ""                       # a Hugging Face folder or a run; it brings its shape
    steps: int = 1200                    # optimizer steps
    batch: int = 64                      # documents per step, over all ranks
    seq_len: int = 1024                  # tokens of a document cut from a text or from shards
    prompts: bool = False                # train on the prompts of a task, too

    # ---- the model
    n_layer: int = 3                     # blocks
    n_head: int = 6                      # query heads
    n_kv_head: int = 2                   # key and value heads
    head_dim: int = 16                   # width of a head
    d_model: int = 96                    # width of the residual stream
    d_ff: int = 256                      # width of the SwiGLU
    max_len: int = 4096                  # positions the model promises to serve
    rope_theta: float = 10000.0          # base of the rotary waves
    tie_embeddings: bool = False         # one matrix for embedding and head

    # ---- the optimizer
    lr: float = 2e-2                     # AdamW: embeddings, head, norms; with --no-muon everything
    muon: bool = True                    # Muon for the matrices of the blocks
    muon_lr: float = 1.4e-2              # its learning rate
    weight_decay: float = 0.1            # decoupled, matrices only
    clip: float = 1.0                    # global norm of the gradient; 0: no clipping
    temperature: float = 1.0             # of the loss: above 1, what is sampled at 1 is sharper
    warmup: float = 0.02                 # share of the steps to warm up
    decay: float = 0.5                   # share of the steps to decay to zero, linearly, at the end

    # ---- the run
    eval_every: int = 200                # steps between evaluations on the valid split
    eval_docs: int = 512                 # documents of one
    save_every: int = 400                # steps between checkpoints
    target: float = 0.0                  # a validation loss to compare the last one with
    seed: int = 0                        # weights and data
    grads: Literal["whole", "sharded"] = "whole"  # on each rank: whole, or reduced meanwhile
    compile: bool = False                # torch.compile the blocks


PRESETS = {
    "base": "",
    "small": "--name small --steps 800 --d-model 64 --n-head 4 --d-ff 192",
    "tiny": "--name tiny --data stdlib --tokenizer bytes --d-model 64 --n-head 4 --n-kv-head 4 "
            "--d-ff 128 --steps 900 --batch 16 --seq-len 128",
    "recall": "--name recall --data recall --tokenizer chars --n-layer 2 --d-model 64 --n-head 4 "
              "--n-kv-head 4 --d-ff 128 --steps 600 --batch 48 --lr 1e-2 --weight-decay 0 --decay 0.3",
    "mixed100m": "--name mixed100m --data mixed:4 --n-layer 12 --n-head 12 --n-kv-head 4 "
                 "--head-dim 64 --d-model 768 --d-ff 2048 --steps 4000 --batch 2048 --row-tokens "
                 "32768 --lr 2e-3 --muon-lr 1e-2 --weight-decay 0.1",
    "gpt2": "--name gpt2 --data data/fineweb --tokenizer gpt2 --n-layer 12 --n-head 12 --n-kv-head "
            "12 --head-dim 64 --d-model 768 --d-ff 2048 --seq-len 1024 --batch 512 --row-tokens "
            "32768 --steps 5100 --lr 2e-3 --muon-lr 1e-2 --weight-decay 0.1 --decay 0.4 "
            "--tie-embeddings --eval-docs 2560 --target 3.28",
}


# flags that may differ on --resume
FREE = ("minutes", "eval_every", "save_every", "threads", "compile", "wandb", "offload", "grads",
        "checkpoint")


def configure(argv):
    """-> Config. What does not go together is refused, with the reason, and so is a flag without
    effect."""
    c = flags(Config, argv, __doc__, defaults=lambda config: PRESETS[config.preset],
              recipe=lambda config: f"by --preset {config.preset}")
    positive(c, "steps batch row_tokens seq_len n_layer n_head n_kv_head head_dim d_model d_ff max_len "
                "eval_every eval_docs save_every")
    shares(c, "warmup decay")
    check_run(c)
    if c.n_head % c.n_kv_head:
        die(f"--n-head {c.n_head} is not a multiple of --n-kv-head {c.n_kv_head}")
    if c.head_dim % 2:
        die(f"--head-dim {c.head_dim} is odd: rotary positions turn pairs")
    if not c.temperature:
        die("--temperature 0 of a loss divides by 0: give a number above 0; above 1 the model ends sharper")
    if not c.rope_theta:
        die("--rope-theta 0 is no base of a wave: give a number above 0, 10000 is usual")
    kind = kind_of(c.data)
    preset = flags(Config, PRESETS[c.preset].split())
    without_effect(c, [
        ("tokenizer n_layer n_head n_kv_head head_dim d_model d_ff max_len rope_theta tie_embeddings",
         not c.init, f"--init {c.init} brings it"),
        ("muon_lr", c.muon, "--no-muon leaves every weight to AdamW, at --lr"),
        ("prompts", kind == "task", f"--data {c.data} is no task, and its tokens are chosen otherwise"),
        ("seq_len", kind in ("shards", "text"), f"--data {c.data} comes in documents of its own"),
        ("date", kind == "chats", f"--data {c.data} holds no chats"),
    ], preset)
    return c


# -----------------------------------------------------------------------------
# rows


def packed_rows(docs, budget, device):
    """Documents -> rows of at most `budget` tokens: (tokens_T, positions_T, at_N, targets_N,
    cu_seqlens). The tokens at at_N predict targets_N."""
    for row in pack([len(tokens) for tokens, _ in docs], budget):
        row.sort(key=lambda i: len(docs[i][0]))  # equal lengths side by side: one attention call
        tokens, positions, at, targets, cu = [], [], [], [], [0]
        for i in row:
            ids, trained = docs[i]
            predicted = [t for t in range(1, len(ids)) if trained[t]]
            at += [cu[-1] + t - 1 for t in predicted]
            targets += [ids[t] for t in predicted]
            tokens += ids
            positions += range(len(ids))
            cu.append(cu[-1] + len(ids))
        # one copy to the device, and nothing waits for it
        flat = kernels.to_device(tokens + positions + at + targets, torch.int64, device)
        yield *flat.split([len(tokens), len(tokens), len(at), len(at)]), cu


def as_many(rows, device):
    """-> the rows, as many on every rank: an empty one predicts nothing and takes part in
    reductions."""
    rows = list(rows)
    token = torch.zeros(1, dtype=torch.int64, device=device)
    return rows + [(token, token, token[:0], token[:0], [0, 1])] * (all_max(len(rows)) - len(rows))


# -----------------------------------------------------------------------------
# loss and steps


def forward(model, row, temperature=1.0):
    """-> the sum of -log p over the row's targets."""
    tokens_T, positions_T, at_N, targets_N, cu = row
    attend = packed_attention(cu, max(b - a for a, b in zip(cu, cu[1:])))
    hidden_ND = model(tokens_T, positions_T, attend)[at_N]
    logp_N, _ = linear_logprob(hidden_ND, model.head_weight, targets_N, temperature)
    return -logp_N.sum()


def targets_of(docs):
    return sum(sum(trained[1:]) for _, trained in docs)


@torch.no_grad()
def evaluate(model, document, rank=0, world=1):
    """-> {loss: mean per token, bpb: bits per byte} of what is trained, on the first documents of
    the valid split. The end token costs its bits and is no text: its letters are not among the
    bytes, or a short text would look half as hard as it is."""
    config, tok = document.config, document.tok
    docs = [document("valid", i) for i in range(rank, config.eval_docs, world)]
    rows = packed_rows(docs, config.row_tokens, model.head_weight.device)
    loss = all_sum(sum(float(forward(model, row)) for row in rows))
    count = all_sum(targets_of(docs))
    silent = tok.stop | {i for word in tok.special for i in tok.encode(word)}
    size = 0
    for tokens, trained in docs:
        ids = [t for t, on in zip(tokens[1:], trained[1:]) if on and t not in silent]
        size += len(tok.decode(ids).encode())
    return dict(loss=loss / max(1, count), bpb=loss / math.log(2) / max(1, all_sum(size)))


def trapezoid(step, total, config):
    """The learning rate's factor: warm up, hold, decay linearly to zero."""
    up = config.warmup * total
    down = config.decay * total
    return min(1.0, (step + 1) / max(1.0, up), (total - step) / max(1.0, down))


def steps(model, document, optimizer, total, begin=0, loss=forward, schedule=None, gradient=None,
          numbers=None):
    """Trains; yields (step, mean loss per trained token) after each step.
    loss      (model, row of packed_rows) -> a sum over the row's targets
    schedule  step, from 0 -> the learning rate's factor, instead of trapezoid()
    gradient  called with the model when each p.grad is the step's mean, before clipping
    numbers   a dict that takes what metrics.jsonl says of a step"""
    config = document.config
    device = model.head_weight.device
    rank, world = optimizer.rank, optimizer.world
    if gradient and (world > 1 or model.head_weight.dtype != torch.float32):
        raise ValueError("gradient= needs whole fp32 gradients: one process, fp32 weights")
    for step in range(begin, total):
        started = time.perf_counter()
        ids = range(step * config.batch + rank, (step + 1) * config.batch, world)
        docs = [document("train", i) for i in ids]
        count = all_sum(targets_of(docs))        # the one normaliser, over ranks and rows
        packed = time.perf_counter()

        loss_sum = torch.zeros((), device=device)
        rows = packed_rows(docs, config.row_tokens, device)
        if optimizer.sharded:
            rows = as_many(rows, device)
        for row in rows:
            row_loss = loss(model, row)
            row_loss.backward()
            optimizer.finish_micro_batch()
            loss_sum += row_loss.detach()
        trained = time.perf_counter()

        factor = schedule(step) if schedule else trapezoid(step, total, config)
        divide = count
        if gradient and count:
            for p in model.parameters():
                p.grad /= count
            gradient(model)
            divide = 1
        taken = optimizer.step(divide=divide, factor=factor)
        mean = all_sum(float(loss_sum)) / max(1, count)
        ended = time.perf_counter()

        if numbers is not None:
            tokens = all_sum(sum(len(t) for t, _ in docs))
            used = machine.mfu(model, docs, ended - started) if device.type == "cuda" else None
            numbers.clear()
            numbers.update(
                loss=mean,
                grad_norm=taken["grad_norm"],
                lr=factor * optimizer.lr,
                tokens_per_second=tokens / (ended - started),
                t_pack=packed - started,
                t_train=trained - packed,
                t_opt=ended - trained,
                skipped=optimizer.skipped,
            )
            if used:
                numbers["mfu"] = used
        yield step + 1, mean


# -----------------------------------------------------------------------------
# the beginning, and the lines on the screen


def setup(config, device, dtype):
    """-> model, document, number of train documents. What a user can get wrong ends here."""
    c = config
    try:
        source = hf.find(c.init) if c.init else None
        tok = data.tokenizer(source or c.tokenizer)
        c = with_date(c, tok, kind_of(c.data) == "chats")
        if source:
            model = GPT.from_hf(source, dtype=dtype, device=device)
        else:
            names = {f.name for f in fields(GPTConfig)}
            shape = GPTConfig(tok.vocab_size, **{k: v for k, v in vars(c).items() if k in names})
            # a large one moves little, step by step
            embedding = 0.02 if c.tie_embeddings else 0.7
            model = GPT(shape).init_weights(c.seed, embedding).to(device, dtype)
        kernels.backend(device)
        document, count = documents(c, tok)
        document("train", 0)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    model.checkpoint = c.checkpoint
    if c.compile:
        model.compiled = True
        # tells the compiler, too
        torch.use_deterministic_algorithms(torch.are_deterministic_algorithms_enabled(),
                                           warn_only=device.type == "cuda")
        for block in model.blocks:
            block.compile(dynamic=True)
    return model, document, count


def new_optimizer(model, config):
    try:
        return Optimizer(model, lr=config.lr, muon_lr=config.muon_lr if config.muon else None,
                         weight_decay=config.weight_decay, clip=config.clip, grads=config.grads,
                         offload=config.offload)
    except ValueError as e:
        die(e)


def scratch(preset, seed=0):
    """-> (model, document) of a preset, new, on a CPU: where an idea about pretraining begins."""
    config = configure(["--preset", preset, "--seed", str(seed)])
    model, document, _ = setup(config, torch.device("cpu"), torch.float32)
    return model, document


def status(step, config, m):
    used = f"  mfu {m['mfu']:.1%}" if "mfu" in m else ""
    return (f"step {step}/{config.steps}  loss {m['eval/loss']:.4f}  bits/byte {m['eval/bpb']:.4f}  "
            f"train {m['loss']:.4f}  grad {m['grad_norm']:.2f}  {m['tokens_per_second']:,.0f} tok/s{used}")


def show(run, model, document):
    """How the model continues the first documents of the valid split."""
    tok = document.tok
    for i in range(6):
        tokens, trained = document("valid", i)
        cut = max(1, trained.index(True)) if True in trained else len(tokens)
        prompt = tokens[:min(cut, 256)]
        text = sample(model, prompt, 96, stop=tok.stop, seed=document.config.seed, index=i)
        run.log(f"  {tok.decode(prompt)!r} -> {tok.decode(text)!r}")


# -----------------------------------------------------------------------------


def main(argv=None):
    # ---- config and init
    config = configure(argv)
    env = start(config.device, config.dtype, config.threads, config.deterministic, threads_of_resumed(config))
    model, document, count = setup(config, env.device, env.dtype)
    config = document.config                     # with the date that its chats are told
    optimizer = new_optimizer(model, config)
    run = Run(f"runs/{config.name}", config, env, resume=config.resume, free=FREE,
              sources=[__file__, kernels.__file__])
    run.log_machine()
    states = run.restore(model, optimizer) if config.resume else None
    begin = states[0]["step"] if states else 0
    seconds = states[0]["seconds"] if states else 0.0
    end = begin if out_of_time(config, seconds) else config.steps
    size = sum(p.numel() for p in model.parameters()) / 1e6
    many = f"{count:,}" if count else "endless"
    run.log(f"{size:.2f}M parameters, vocabulary {document.tok.vocab_size}, {config.data}, {many} "
            f"documents, from step {begin} to {config.steps}")
    if document.about:
        run.log(document.about)

    # ---- the loop
    loss_of = partial(forward, temperature=config.temperature)
    bar = progress(config.steps, "train", begin)
    step = begin
    numbers = {}
    held_out = None
    try:
        for step, loss in steps(model, document, optimizer, end, begin, loss_of, numbers=numbers):
            bar.set_postfix_str(f"loss {loss:.3f}, {numbers['tokens_per_second']:,.0f} tok/s")
            bar.update()
            run.pace(step, config.steps, numbers)

            # evaluate
            seconds += all_max(numbers["t_pack"] + numbers["t_train"] + numbers["t_opt"])
            last = step == config.steps or bool(out_of_time(config, seconds))
            if last or step % config.eval_every == 0:
                held_out = evaluate(model, document, env.rank, env.world)
                numbers |= {f"eval/{k}": v for k, v in held_out.items()}
                run.log(status(step, config, numbers))
            run.metrics(step, **numbers)

            # save: a signal to any rank ends all of them after this step
            stopping = run.stopping()
            if last or stopping or step % config.save_every == 0:
                state = dict(optimizer=optimizer.state_dict(), step=step, seconds=seconds)
                run.save(step, lambda folder: model.save_hf(folder, document.tok), state)
            if stopping and not last:
                run.bye(step)
            if last:
                break
    except FloatingPointError as e:
        bar.close()
        die(f"step {step + 1}: {e}. {run.folder} stays as its last checkpoint left it")
    bar.close()

    # ---- samples, pictures, and where the model lies
    if config.target and not held_out:           # a finished run, resumed: nothing was trained
        held_out = evaluate(model, document, env.rank, env.world)
    barrier()                                    # until the slowest rank has written the checkpoint
    if step < config.steps:
        run.log(f"stopped after step {step} of {config.steps}: {out_of_time(config, seconds)}")
    if env.master:
        if config.target:
            reached = "reached" if held_out["loss"] <= config.target else "not reached"
            run.log(f"validation loss {held_out['loss']:.4f}, target {config.target}: {reached}")
        show(run, model, document)
        view.curves(run.folder)
        run.log(f"wrote {run.folder}: curves.png, and the model in {run.latest()[0]} (a Hugging "
                "Face folder)")
    run.close()


def trained(folder):
    """Is there a model, and not that of a run which was interrupted? --minutes may end one early."""
    found = newest(folder)
    config = run_config(folder)          # nothing, where it is no run of ours
    return bool(found) and (config.get("minutes") is not None or found[1] >= config.get("steps", 0))


def train_missing(folder, env, dry_run=False):
    """runs/base and its like are trained where a run that begins with one does not find it."""
    preset = folder.removeprefix("runs/")
    if preset == folder or preset not in PRESETS or trained(folder):
        return
    if dry_run:
        die(f"--dry-run: {folder} is not trained yet; give a model by --init")
    if env.master:
        print(f"no whole base in {folder} yet: training it first (python train_gpt.py --preset "
              f"{preset})", flush=True)
    begun = Path(folder, "config.json").exists()
    main(["--preset", preset] + ["--resume"] * begun)
    machine.use(env.threads)                     # again: the base had Threads of its own
    if env.device.type == "cuda":
        # what it held is neither this run's peak nor lost to its pool
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


__getattr__ = moved(__name__)            # names that a fork may know from here


if __name__ == "__main__":
    main()
