"""
memory.py: what a run needs of a GPU and of its host. Known before it is started (--dry-run), and then
claimed by one trial update, so that what the card has left can go to the sampler's keys and values
for good: the cache is what is left, never a constant.

    python nanorl.py --init DIR --dry-run                       this run on the card that is here
    python nanorl.py --init DIR --dry-run --card 24 --host 64   on one that is not
"""

import functools
import itertools
import math
from dataclasses import replace

import torch

import kernels
import pack
import rollout
from common import hf
from common.flags import die, without_effect
from common.offload import BUFFER, BUFFERS, GB, host_free
from common.optim import Optimizer
from common.pages import PAGE, Pool
from common.run import all_sum
from common.sharded import BUCKET, local_ranks
from kernels import linear_logprob
from train_gpt import GPT, GPTConfig

USABLE = 0.9             # of a card: the rest is CUDA's own, and holes between blocks of memory
FEW = 16                 # samples that the cache must hold at least: below, decoding is all waiting

# -----------------------------------------------------------------------------
# flags


def check_flags(c):
    """What the flags alone say."""
    without_effect(c, [("reference_at", c.kl_coef, "there is no reference: give --kl-coef")])
    if c.max_new >= c.row_tokens:        # known before a missing base is trained; prompts are not
        die(f"--row-tokens {c.row_tokens} is below one sample: --max-new alone takes {c.max_new}")
    for flag, value in (("--grads", c.grads), ("--reference-at", c.reference_at)):
        # a rank that learns alone has nobody to meet in the middle of a backward
        if c.stream and value == "sharded":
            die(f"--stream with {flag} sharded: a rank that learns before the others are done has nobody to "
                "reduce with; leave one of the two out")


def check_lengths(c, shape, need):
    """Refuses what the longest sample, of `need` tokens with its prompt, does not fit into."""
    if need > c.row_tokens:
        raise ValueError(f"--row-tokens {c.row_tokens} is below one sample: a prompt and --max-new take "
                         f"{need}")
    if need > shape.max_len:
        raise ValueError(f"a prompt and --max-new {c.max_new} take {need} tokens, the model serves "
                         f"{shape.max_len}")


# -----------------------------------------------------------------------------
# arithmetic


def fullest_row(config, longest):
    """A row full of the longest prompts, shared by their responses. -> tokens of a prompt, its
    responses, prompts; the last is 0 if the row does not hold one with two responses."""
    P = max(1, longest - config.max_new)
    L = longest - P
    k = min(config.n, (config.row_tokens - P) // L)
    return P, k, config.row_tokens // (P + k * L) if k > 1 else 0


@functools.cache
def _counts(*shape):
    with torch.device("meta"):
        model = GPT(GPTConfig(*shape))
    sizes = [p.numel() for p in model.parameters()]
    return sum(sizes), max(sizes), sum(p.numel() for p in model.blocks.parameters())


def count_of(shape):
    """-> parameters of a model, of its largest tensor, of its blocks."""
    return _counts(*vars(replace(shape, rope_scaling=None)).values())


def beside(shape, where, width, world):
    """-> bytes on the device of a model that only scores, beside the one that learns: see place_blocks()."""
    params, _, blocks = count_of(shape)
    if where == "device":
        return params * width
    one = blocks // shape.n_layer
    share = blocks // world if where == "sharded" else 0
    return (params - blocks + one + share) * width


def kept_by_layer(shape, half):
    """-> numbers that a block keeps for its backward, per token. Checked against what torch holds on a
    CPU, with and without the kernels."""
    d, f = shape.d_model, shape.d_ff
    # rows as their experts see them, what experts say of them, and the router
    experts = 2 * shape.n_active * d + 3 * shape.n_expert if shape.n_expert else 0
    heads = shape.n_head * shape.head_dim
    kv_heads = shape.n_kv_head * shape.head_dim
    if half:
        # two norms in and out; q k v before the rotation, q k after it; the attention's output; gate
        # and up, and their product
        return 4 * d + (heads + 2 * kv_heads) + (heads + kv_heads) + heads + 3 * f + experts
    # the twins keep what lies between their steps, too
    norms = shape.n_head + shape.n_kv_head if shape.qk_norm else 0
    each = 4 if shape.qk_norm else 3
    return (6 * d + each * (heads + kv_heads) + 4 * f + shape.n_head + norms + 4 * shape.head_dim + 2
            + experts)


def activations(shape, config, half, longest):
    """-> numbers that one packed row keeps for its backward."""
    kept = kept_by_layer(shape, half)
    layers = shape.n_layer * kept
    if config.checkpoint:
        layers = shape.n_layer * shape.d_model + kept
    numbers = config.row_tokens * (layers + 2 * shape.d_model)   # and the last norm, in and out

    # where prompts are shared, the keys and values of one are gathered once for each of its
    # responses
    P, k, prompts = fullest_row(config, longest)
    if half and prompts:
        kv_heads = shape.n_kv_head * shape.head_dim
        kept_layers = 1 if config.checkpoint else shape.n_layer
        numbers += (config.row_tokens + prompts * k * P) * 2 * kv_heads * kept_layers
    return numbers


def sharded(config, world):
    """Are gradients sharded? auto: with --offload; else a trial update decides, whole if that fits."""
    return world > 1 and (config.grads == "sharded" or config.grads == "auto" and config.offload
                          and not config.stream)


def gradients(shape, config, width, world):
    """-> bytes of gradients on the device: fp32 sums, and what is about to be added to its own."""
    params, largest, _ = count_of(shape)
    arriving = largest * width if width < 4 or config.offload else 0
    if sharded(config, world):             # three buckets on their way, each also in fp32
        arriving = largest * width + 3 * min(BUCKET, params) * (width + 4)
        return arriving + (0 if config.offload else params * 4 // ranks_beside(world))
    return arriving if config.offload else arriving + params * 4


def ranks_beside(world):
    """The ranks that share out the sums of gradients of a machine, also of one that is not here."""
    return local_ranks(world, unsaid=min(world, 8))


def on_host(shape, config, world, width=2):
    """-> bytes of the host that one rank takes."""
    params, _, blocks = count_of(shape)
    taken = 0
    if config.kl_coef and config.reference_at == "host":
        taken += blocks * width
    if config.offload:
        sums = params * 4 // (ranks_beside(world) if sharded(config, world) else 1)
        taken += sums + params * 12 // world + BUFFERS * BUFFER
    return taken


def fixed(shape, config, width, world, longest):
    """{what: bytes per rank on the device}, but for the cache. shape: a GPTConfig; width: bytes of a
    weight; longest: tokens of the longest sample."""
    params, _, _ = count_of(shape)
    half = width < 4
    tile = min(kernels.BACKWARD_TILE, config.row_tokens * shape.vocab_size)
    parts = {
        "weights": params * width,
        "gradients": gradients(shape, config, width, world),
        # fp32 masters, unless the weights are those, and two moments
        "optimizer shard": 0 if config.offload else params * (12 if half else 8) // world,
        "activations": activations(shape, config, half, longest) * width,
        # a tile of logits and its gradient, and two sums of the hidden states' gradient; or
        # logits, exponentials, gradient
        "head": tile * 6 + 8 * config.row_tokens * shape.d_model if half else 3 * 4 * kernels.CHUNK,
    }
    if config.kl_coef:
        parts["reference"] = beside(shape, config.reference_at, width, world)
    return parts


def token_bytes(shape, width):
    """Keys and values of a token."""
    return 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * width


def full_cache(shape, width, slots, longest, paged):
    """-> bytes of a cache in which every slot is full: the most that it can take."""
    tokens = slots * longest
    if paged:                            # whole pages, with room for what is cut off
        pages = slots * -(-(longest + Pool.check_every) // PAGE) + 1
        tokens = pages * PAGE
    return tokens * token_bytes(shape, width)


# -----------------------------------------------------------------------------
# does it fit, and what would make it fit


def samples_left(parts, shape, width, card, longest):
    """-> samples of `longest` tokens for which a card of so many bytes has room beside the parts."""
    left = Pool.share * (USABLE * card - sum(parts.values()))
    return int(left // (token_bytes(shape, width) * longest))


def smallest_card(parts, shape, width, longest):
    """-> bytes of a card that holds the parts and a cache of a few samples."""
    cache = FEW * longest * token_bytes(shape, width) / Pool.share
    return (sum(parts.values()) + cache) / USABLE


def ways(config, world, longest):
    """Yields (words, config) in the order of what they cost: as it is; smaller rows, a little speed;
    gradients sharded, a few percent of an update; recomputing, a third of it; offload, the way to
    the host and back for each row and step. The first of two that are equal otherwise is cheaper."""
    rows = [config.row_tokens]
    while rows[-1] // 2 >= max(longest, min(2048, config.row_tokens)):
        rows.append(rows[-1] // 2)
    several = world > 1 and not config.stream
    kinds = ("auto", "sharded") if several else ("auto",)
    for offload, checkpoint, grads in itertools.product((False, True), (False, True), kinds):
        if offload < config.offload or checkpoint < config.checkpoint:
            continue
        if config.grads == "sharded" and grads == "auto" and world > 1:
            continue
        for row_tokens in rows:
            way = replace(config, row_tokens=row_tokens, grads=grads, checkpoint=checkpoint, offload=offload)
            yield changes(config, way), way


def changes(config, way):
    """-> the flags that make this way of a config, in words."""
    words = []
    if way.row_tokens < config.row_tokens:
        words.append(f"--row-tokens {way.row_tokens}")
    if way.grads == "sharded" and config.grads != way.grads and not way.offload:
        words.append("--grads sharded")
    if way.checkpoint and not config.checkpoint:
        words.append("--checkpoint")
    if way.offload and not config.offload:
        words.append("--offload")
    return " ".join(words)


def fitting(shape, config, width, world, card, host, longest):
    """Yields (words, samples in the cache) of each way that fits a card and a host of so many bytes;
    host None: not asked."""
    for words, parts in held(shape, config, width, world, host, longest):
        samples = samples_left(parts, shape, width, card, longest)
        if samples >= FEW:
            yield words, samples


def held(shape, config, width, world, host, longest):
    """Yields (words, parts) of the ways that fit the host."""
    for words, way in ways(config, world, longest):
        taken = on_host(shape, way, world, width) * ranks_beside(world)
        if host is None or taken <= host:
            yield words, fixed(shape, way, width, world, longest)


def smallest(shape, config, width, world, host, longest):
    """-> (bytes of the smallest card that any way fits, its words); infinity if the host is in the way."""
    found = [(math.inf, "")]
    for words, parts in held(shape, config, width, world, host, longest):
        found.append((smallest_card(parts, shape, width, longest), words))
    return min(found, key=lambda pair: pair[0])


def table(rl):
    """-> the text of --dry-run: what this run takes, what is left for the cache, and if it does not
    fit, which flags would make it."""
    c = rl.config
    shape = rl.model.config
    world = rl.env.world
    card, host = card_and_host(rl)
    half = c.dtype == "bf16" or c.dtype == "auto" and (card or rl.env.dtype == torch.bfloat16)
    width = 2 if half else 4
    parts = fixed(shape, c, width, world, rl.longest)
    slots = c.slots or rollout.SLOTS
    wanted = full_cache(shape, width, slots, rl.longest, paged=card > 0)
    taken = on_host(shape, c, world, width) * ranks_beside(world)

    lines = [f"one rank of {world}, {'bf16' if half else 'fp32'}, rows of {c.row_tokens:,} tokens, samples "
             f"of up to {rl.longest:,} with their prompts; GB:"]
    for name, size in [*parts.items(), ("together", sum(parts.values()))]:
        lines.append(f"  {name:<16} {size / GB:8.3f}")
    lines.append(f"  {'KV cache':<16} {wanted / GB:8.3f}  at most: {slots} sequences (--slots) of full "
                 "length")
    lines.append(f"  {'host':<16} {taken / GB:8.3f}  of all ranks of a machine")
    if card:
        lines += verdict(shape, c, width, world, card, host, rl.longest)
    else:
        lines.append("--card 24 --host 64 says whether it fits a GPU of 24 GB and a host of 64")
    return "\n".join(lines)


def card_and_host(rl):
    """-> bytes of the card and of the host that a dry run is for; 0: no card, None: any host."""
    c = rl.config
    if c.host:
        host = c.host * GB
    else:
        host = None if c.card else host_free()
    if c.card:
        return c.card * GB, host
    if rl.env.device.type != "cuda":
        return 0, host
    return torch.cuda.get_device_properties(rl.env.device).total_memory, host


def verdict(shape, c, width, world, card, host, longest):
    """-> lines: does it fit this card, and what would make it?"""
    parts = fixed(shape, c, width, world, longest)
    least, words = smallest(shape, c, width, world, host, longest)
    would_do = f"the smallest that would do has {least / GB:.1f} GB{', with ' * bool(words)}{words}"
    if parts["weights"] > card:
        die(f"a card of {card / GB:.3g} GB does not hold the weights, {parts['weights'] / GB:.1f} GB: "
            f"{would_do}")
    samples = max(0, samples_left(parts, shape, width, card, longest))
    lines = [f"a card of {card / GB:.3g} GB, {USABLE:.0%} of it used, leaves the cache {samples * longest:,} "
             f"tokens: {samples:,} samples of {longest:,}"]
    found = list(fitting(shape, c, width, world, card, host, longest))
    if found and not found[0][0]:
        return [*lines, "it fits"]
    taken = on_host(shape, c, world, width) * ranks_beside(world)
    if host is not None and taken > host:
        return [*lines, f"it does not fit: the host has {host / GB:.3g} GB, and {taken / GB:.1f} are needed; "
                "--offload is what takes them"]
    if not found:
        return [*lines, f"it does not fit, and no flag makes it: of cards, {would_do}"]
    lines.append(f"it does not fit with {FEW} samples in the cache. What makes it fit, the cheapest first:")
    return lines + [f"  {words:<48} {samples:,} samples in the cache" for words, samples in found]


def compare(rl, run):
    """The peak of the first step beside what --dry-run says."""
    if rl.env.device.type != "cuda" or len(rl.history) != 1:
        return
    width = rl.model.head_weight.element_size()
    c = replace(rl.config, grads="sharded" if rl.optimizer.sharded else "whole")
    parts = fixed(rl.model.config, c, width, rl.env.world, rl.longest)
    # the pool is there, and was cut to what the card has
    predicted = sum(parts.values()) + rl.sampler.storage.k.nbytes + rl.sampler.storage.v.nbytes
    peak = torch.cuda.max_memory_allocated()
    run.log(f"  memory: {peak / GB:.2f} GB at the peak, {predicted / GB:.2f} by --dry-run")


# -----------------------------------------------------------------------------
# the trial update


def room_for(folder, where, env, width):
    """-> room on a GPU for a second model that is loaded later: kept until the cache has its size,
    then forgotten, so that the allocator has it ready. folder "": none."""
    if not folder or env.device.type != "cuda":
        return None
    shape = GPTConfig(**hf.read_config(hf.find(folder)))
    return torch.empty(beside(shape, where, width, env.world), dtype=torch.uint8, device=env.device)


def new_optimizer(model, config, grads):
    return Optimizer(model, lr=config.lr, muon_lr=config.muon_lr or None, weight_decay=config.weight_decay,
                     clip=config.clip, grads=grads, offload=config.offload)


def make_optimizer(model, reference, config, longest, env):
    """-> the optimizer, after a trial update on a GPU: what it needs is then held by the allocator."""
    on_gpu = env.device.type == "cuda"
    grads = config.grads
    if grads == "auto":
        grads = "sharded" if sharded(config, env.world) else "whole"
        if grads == "whole" and on_gpu and env.world > 1 and not config.stream:
            grads = tried(model, reference, config, longest, env)
    optimizer = new_optimizer(model, config, grads)
    if on_gpu:
        trial_update(model, optimizer, reference, config, longest)
    return optimizer


def make_sampler(model, tok, config, longest, env):
    """-> the sampler: on a GPU its keys and values get what the trial update left."""
    sampler = rollout.Sampler(model, tok.stop, tok, slots=config.slots or None, max_len=longest,
                              deterministic=env.deterministic)
    if sampler.paged and sampler.storage.most < longest:
        raise ValueError(f"what an update leaves of the GPU holds {sampler.storage.most} tokens of keys and "
                         f"values, one sample may take {longest}: lower --row-tokens, or give --checkpoint "
                         "or --offload")
    return sampler


def tried(model, reference, config, longest, env):
    """-> whole, if whole gradients fit on every rank and leave room for a few samples in the cache,
    else sharded. Ranks meet only behind it: one of them may have run out of memory."""
    optimizer = new_optimizer(model, config, "whole")
    cache = FEW * longest * token_bytes(model.config, model.head_weight.element_size())
    try:
        trial_rows(model, optimizer, reference, config, longest)
        fits = Pool.share * torch.cuda.mem_get_info(env.device)[0] >= cache
    except torch.cuda.OutOfMemoryError:
        fits = False
    optimizer.zero_grad()
    del optimizer
    torch.cuda.empty_cache()
    if all_sum(int(fits)) == env.world:
        return "whole"
    if env.master:
        print("whole gradients leave no room for a cache: --grads sharded", flush=True)
    return "sharded"


def trial_rows(model, optimizer, reference, config, longest):
    """Full rows forward and backward, times zero. Two: of responses alone, which has the most
    predictions, and of the longest prompts shared by theirs, whose keys are read, and kept, once for
    each response."""

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
        batch = batch.to(model.head_weight.device)
        hidden_ND = batch.hidden(model)
        logp_N, entropy_N = linear_logprob(hidden_ND, model.head_weight, batch.targets_N)
        if reference:
            with torch.no_grad():
                theirs_ND = batch.hidden(reference)
                linear_logprob(theirs_ND, reference.head_weight, batch.targets_N)
        (0 * (logp_N.sum() + entropy_N.sum())).backward()
        optimizer.finish_micro_batch()


def trial_update(model, optimizer, reference, config, longest):
    """The rows, and their gradients summed over ranks and forgotten. After it the allocator holds
    what an update needs."""
    trial_rows(model, optimizer, reference, config, longest)
    optimizer.reduce_grads()
    optimizer.zero_grad()
