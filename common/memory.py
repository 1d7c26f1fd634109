"""
memory.py: what a run needs of a GPU. Known before it is started (--dry-run), and then claimed by one
trial update, so that what the card has left can go to the sampler's keys and values for good.
"""

import torch

import kernels
import pack
import rollout
from algos import predicting
from common.pages import PAGE, Pool
from kernels import linear_logprob
from train_gpt import GPT

GIB = 2**30


def fullest_row(config, longest):
    """A row full of the longest prompts, shared by their responses. -> tokens of a prompt, its
    responses, prompts; the last is 0 if the row does not hold one with two responses."""
    P = max(1, longest - config.max_new)
    L = longest - P
    k = min(config.n, (config.row_tokens - P) // L)
    return P, k, config.row_tokens // (P + k * L) if k > 1 else 0


def budget(shape, config, width, world, slots, longest, reference=False):
    """{what: bytes per rank}. shape: a GPTConfig; width: bytes of a weight. Weights and gradients
    are whole on every rank, masters and moments sharded. The KV cache takes what its tokens take,
    at most this; activations are those of one packed row."""
    with torch.device("meta"):
        params = sum(p.numel() for p in GPT(shape).parameters())
    half = width < 4
    heads = shape.n_head * shape.head_dim
    kv_heads = shape.n_kv_head * shape.head_dim

    # kept for the backward, numbers per token and layer: two norms in and out, q k v twice
    # (before and after the rotation), the attention's output, gate and up, their product
    kept = 4 * shape.d_model + 2 * (heads + 2 * kv_heads) + heads + 3 * shape.d_ff
    layers = shape.n_layer * kept
    if config.checkpoint:
        layers = shape.n_layer * shape.d_model + kept

    # where prompts are shared, the keys and values of one are gathered once for each of its
    # responses
    P, k, prompts = fullest_row(config, longest)
    gathered = 0
    if half and prompts:
        kept_layers = 1 if config.checkpoint else shape.n_layer
        gathered = (config.row_tokens + prompts * k * P) * 2 * kv_heads * kept_layers

    pages = slots * -(-(longest + Pool.check_every) // PAGE) + 1
    cached = pages * PAGE if half else slots * longest
    largest = shape.vocab_size * shape.d_model
    tile = min(kernels.BACKWARD_TILE, config.row_tokens * shape.vocab_size)
    parts = {
        "weights": params * width,
        # fp32 sums, and one half-precision gradient that is about to be added to its own
        "gradients": params * 4 + (largest * width if half else 0),
        # fp32 masters, unless the weights are those, and two moments
        "optimizer shard": params * (12 if half else 8) // world,
        "KV cache": cached * 2 * shape.n_layer * kv_heads * width,
        "activations": (config.row_tokens * layers + gathered) * width,
        # a tile of logits and its gradient, and two sums of the hidden states' gradient; or
        # logits, exponentials, gradient
        "head": tile * 6 + 8 * config.row_tokens * shape.d_model if half else 3 * 4 * kernels.CHUNK,
    }
    if reference:
        parts["reference"] = params * width
    return parts


def needed(rl):
    width = rl.model.head_weight.element_size()
    parts = budget(rl.model.config, rl.config, width, rl.env.world, rl.sampler.slots, rl.sampler.max_len,
                   bool(rl.reference))
    if rl.sampler.device.type == "cuda":  # the pool is there, and was cut to what the card has
        parts["KV cache"] = rl.sampler.storage.k.nbytes + rl.sampler.storage.v.nbytes
    return parts


def table(rl):
    parts = needed(rl)
    lines = [f"memory of one rank of {rl.env.world}, {rl.env.dtype}:"]
    for name, size in [*parts.items(), ("together", sum(parts.values()))]:
        lines.append(f"  {name:<16} {size / GIB:8.3f} GiB")
    return "\n".join(lines)


def compare(rl, run):
    """The peak of the first step beside what --dry-run says."""
    if rl.env.device.type == "cuda" and len(rl.history) == 1:
        peak = torch.cuda.max_memory_allocated()
        predicted = sum(needed(rl).values())
        run.log(f"  memory: {peak / GIB:.2f} GiB at the peak, {predicted / GIB:.2f} by --dry-run")


def trial_update(model, optimizer, reference, config, longest):
    """Full rows forward and backward, times zero, and their gradients summed over ranks and
    forgotten. After it the allocator holds what an update needs. Two rows: of responses alone,
    which has the most predictions, and of the longest prompts shared by theirs, whose keys are
    read, and kept, once for each response."""
    device = model.head_weight.device

    def sample(P, i, j):
        L = longest - P
        return rollout.Sample([0] * P, [0] * L, [0.0] * L, "length", i, j, 0, advantage=0.0)

    n = max(1, config.row_tokens // longest)
    rows = pack.batches([sample(1, i, 0) for i in range(n)], n * longest, model.config, share=False)
    P, k, prompts = fullest_row(config, longest)
    if prompts:
        groups = [[sample(P, i, j) for j in range(k)] for i in range(prompts)]
        rows += pack.batches(groups, config.row_tokens, model.config, share=True)[:1]
    for batch in rows:
        batch = batch.to(device)
        if reference:
            with torch.no_grad():
                theirs_ND = predicting(reference.to(device), batch)
                linear_logprob(theirs_ND, reference.head_weight, batch.targets_N)
        hidden_ND = predicting(model, batch)
        logp_N, entropy_N = linear_logprob(hidden_ND, model.head_weight, batch.targets_N)
        (0 * (logp_N.sum() + entropy_N.sum())).backward()
    optimizer.reduce_grads()
    optimizer.zero_grad()
    if reference:
        reference.to("cpu")
