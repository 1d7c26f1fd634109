"""
AdamW and Muon, sharded over ranks (ZeRO-1 and ZeRO-2), their state on the device or on the host.

Every rank holds the whole model in its working precision; the fp32 masters and moments are sharded.
A step is

    gradients summed in fp32 -> reduced to the rank that owns them -> clip, update the shard
    -> weights gathered back in place

so that a weight's address never changes, and sampler and trainer keep reading the same tensors.

    Muon   matrices of the blocks, dealt whole (orthogonalising needs the whole matrix), the largest
           first, each to the rank that has least
    AdamW  the rest (embeddings, head, norms, biases; or everything), each cut flat into `world` equal slices

    grads="whole"     each rank sums its own gradients; ranks meet once, at the step
    grads="sharded"   they meet after every micro-batch, bucket by bucket while the backward runs, so
                      that no rank ever holds a whole fp32 gradient
    offload           sums, masters and moments live on the host (common/offload.py)

The result is the same to rounding. One process runs the same lines; its collectives are no-ops. If the
weights are fp32 and stay, the master IS the weight, no copy. Left out of the usual recipe: parameter
groups, closures, foreach paths, schedulers. The caller passes this step's learning-rate factor.
"""

import functools
import weakref

import torch
import torch.distributed as dist

from common.cpu import matmul_t, one_thread
from common.offload import Host
from common.sharded import BUCKET, Sharded, all_gather, pieces, reduce_scatter

# five rounds of the Polar Express (arXiv 2505.16932): the best quintics in turn for singular
# values in [1e-3, 1]
POLAR = [(8.28721201814563, -23.595886519098837, 17.300387312530933),
         (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
         (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
         (3.3184196573706015, -2.488488024314874, 0.51004894012372),
         (2.300652019954817, -1.6689039845747493, 0.4188073119525673)]


# On a CPU a matrix of at most so many numbers is multiplied on one thread: a call of oneDNN takes
# longer there than the product
SMALL = 1 << 17


def orthogonalize(m):
    """The nearest (semi-)orthogonal matrix, roughly: all singular values of m pushed to about 1."""
    x = m.to(torch.bfloat16 if m.is_cuda else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    with one_thread():
        # the margin keeps rounding inside the interval of the quintics
        x = x / (x.norm() * 1.01 + 1e-7)
        if not x.is_cpu or x.numel() <= SMALL:
            for a, b, c in POLAR:
                xx = x @ x.t()
                x = torch.addmm(x, torch.addmm(xx, xx, xx, beta=b, alpha=c), x, beta=a)
            return (x.t() if tall else x).to(m.dtype)
    x = _by_gram(x) if x.shape[1] >= 2 * x.shape[0] else _large(x)
    return (x.t() if tall else x).to(m.dtype)


def _large(x):
    """The same rounds in oneDNN's products, on all threads."""
    for a, b, c in POLAR:
        xx = matmul_t(x, x)                          # symmetric, so matmul_t(xx, xx) is its square
        x = a * x + matmul_t(b * xx + c * matmul_t(xx, xx), x.t())
    return x


def _by_gram(x):
    """The same rounds on the small matrix g = x x^T: each multiplies x from the left by q = a + b
    g + c g^2, and g by q from both sides. Needs fp32: g squares the singular values. x is
    multiplied out after two rounds and g made anew from it: the first quintics stretch what
    rounding left of the small singular values 8 times each, and a g that has drifted from x x^T
    would stretch them without end."""
    for rounds in (POLAR[:2], POLAR[2:]):
        g, product = matmul_t(x, x), None
        for a, b, c in rounds:
            q = b * g + c * matmul_t(g, g)
            q.diagonal().add_(a)
            product = q if product is None else matmul_t(q, product)
            g = matmul_t(matmul_t(q, g), q)
        x = matmul_t(product, x.t())
    return x


class Shard:
    """
    What each rank owns of one parameter: ranges[r] = (start, end) of the flat tensor. Of a Muon
    matrix the owner has all, the others nothing.
    """

    def __init__(self, name, param, owner, rank, world):
        self.name = name
        self.param = param
        self.owner = owner                         # a rank, or None: AdamW
        self.muon = owner is not None
        size = param.numel()
        if self.muon:
            self.ranges = [(0, size) if r == owner else (size, size) for r in range(world)]
        else:
            cuts = [min(size, r * -(-size // world)) for r in range(world + 1)]
            self.ranges = list(zip(cuts, cuts[1:]))
        self.start, self.end = self.ranges[rank]
        self.size = self.end - self.start
        self.total = None   # --offload: on the host, the sum of this rank's own whole gradients
        self.summed = False                        # is anything in it?
        self.grad = None    # fp32, of this slice, summed over ranks and micro-batches

    @property
    def mine(self):
        return self.param.data.view(-1)[self.start:self.end]

    def stay(self):
        """Master and moments beside the weight."""
        self.master = self.mine if self.param.dtype == torch.float32 else self.mine.float()
        self.m = torch.zeros_like(self.master)
        self.v = None if self.muon else torch.zeros_like(self.master)

    def move(self, room):
        """Master and moments on the host. room: a list of what is left there, from the front."""
        self.master = carve(room, self.size).copy_(self.mine)
        self.m = carve(room, self.size)
        self.v = None if self.muon else carve(room, self.size)


def carve(room, size):
    part, room[0] = room[0][:size], room[0][size:]
    return part


PART = 1 << 24    # numbers that are updated at a time


def buckets(shards, world):
    """
    Shards that travel together: a hundred small collectives cost more than a small model's whole
    step. The k-th matrices of all Muon owners stay together, so that a bucket is about equally wide
    on every rank.
    """
    matrices = sorted((s for s in shards if s.muon), key=lambda s: -s.param.numel())
    turns = [0] * world                            # matrices of each rank so far
    rounds = {}                                    # k -> the k-th matrix of each rank
    for s in matrices:
        rounds.setdefault(turns[s.owner], []).append(s)
        turns[s.owner] += 1
    found = []
    room = 0
    for unit in [[s] for s in shards if not s.muon] + list(rounds.values()):
        size = sum(s.param.numel() for s in unit)
        if size > room or unit[0].param.dtype != found[-1][0].param.dtype:
            found.append([])
            room = BUCKET
        found[-1] += unit
        room -= size
    return found


class Optimizer:
    def __init__(self, model, lr=1e-3, muon_lr=None, betas=(0.9, 0.95), momentum=0.95, weight_decay=0.0,
                 eps=1e-8, clip=1.0, grads="whole", offload=False):
        """muon_lr None: AdamW for everything. grads, offload: see above; with grads="sharded" every rank
        calls finish_micro_batch() after each backward, equally often."""
        self.lr = lr
        self.muon_lr = muon_lr
        self.betas = betas
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.eps = eps
        self.clip = clip
        self.grads = grads
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        self.steps = 0
        self.skipped = 0                           # steps with a gradient that was not finite
        self.bad_in_a_row = 0
        named = list(model.named_parameters())
        self.device = named[0][1].device
        owner = self._owners(named) if muon_lr is not None else {}
        self.shards = [Shard(name, p, owner.get(name), self.rank, self.world) for name, p in named]
        self.buckets = buckets(self.shards, self.world)
        # parameters that are several matrices, one below the other: those of a block's experts
        self.stacks = {f"{path}.{name}": count for path, module in model.named_modules()
                       for name, count in getattr(module, "stacks", {}).items()}
        self.host = Host(self.device) if offload else None
        self.sharded = None
        if grads == "sharded" and self.world == 1:
            raise ValueError("--grads sharded has no effect in one process, which has nobody to share with: "
                             "leave it out, or take --offload")
        if grads == "sharded":
            self.sharded = Sharded(self.shards, self.rank, self.world, self.device, self.host)
        if self.host:
            self._move()
        else:
            for s in self.shards:
                s.stay()
        for s in self.shards:
            self._take_over(s)

    @torch.no_grad()
    def _move(self):
        """Masters, moments and sums to the host."""
        ours = self.sharded.buckets if self.sharded else self.shards
        if self.sharded:
            ours = [bucket for bucket in ours if self.sharded.mine(bucket)]
            numbers = sum(bucket.numbers for bucket in ours)
        else:
            numbers = sum(s.param.numel() for s in ours)
        numbers += sum(s.size * (2 if s.muon else 3) for s in self.shards)
        room = [self.host.room(numbers)]
        for s in self.shards:
            s.move(room)
        for part in ours:
            if self.sharded:
                part.sums = carve(room, part.numbers)
            else:
                part.total = carve(room, part.param.numel())

    def _take_over(self, s):
        """What becomes of a gradient when it is complete. A model's gradients have one taker: the
        optimizer that was made last."""
        if getattr(s.param, "taker", None):
            s.param.taker.remove()
            s.param.taker = None
        if self.sharded or self.host:
            # a strong reference would tie model and optimizer together in a cycle
            take = functools.partial(_arrived, weakref.ref(self), self.shards.index(s))
        elif s.param.dtype != torch.float32:       # summed in fp32 as they appear
            s.param.grad32 = None
            take = _fold
        else:
            return
        s.param.taker = s.param.register_post_accumulate_grad_hook(take)

    def _owners(self, named):
        """{matrix of a block: the rank that owns it}: the largest first, each to the rank that has
        least"""
        matrices = [(name, p) for name, p in named if p.ndim == 2 and name.startswith("blocks.")]
        load = [0] * self.world
        owner = {}
        for name, p in sorted(matrices, key=lambda item: -item[1].numel()):
            owner[name] = load.index(min(load))
            load[owner[name]] += p.numel()
        return owner

    # -------------------------------------------------------------------------
    # gradients

    @torch.no_grad()
    def finish_micro_batch(self):
        """After each backward; with grads="sharded" ranks meet here."""
        if self.sharded:
            self.sharded.flush()

    @torch.no_grad()
    def reduce_grads(self):
        """Sums the accumulated gradients over ranks into each owner's slice and clears them."""
        if self.sharded:
            self.sharded.finish()
            return
        if self.host:
            self.host.settle()
        for bucket in self.buckets:
            fulls = [self._take_gradient(s) for s in bucket]
            for s, mine in zip(bucket, self._scatter(bucket, fulls)):
                s.grad = mine.cpu() if self.host else mine

    def _take_gradient(self, s):
        """-> the flat fp32 gradient of this rank's micro-batches, which is then forgotten."""
        if self.host:
            full = s.total if s.summed else s.total.zero_()
            s.summed = False
            return full if self.world == 1 else full.to(self.device)
        full = getattr(s.param, "grad32", None)
        if full is None:
            full = s.param.grad
        if full is None:
            full = torch.zeros_like(s.param, dtype=torch.float32)
        _forget_gradient(s.param)
        return full.float().view(-1)

    def _scatter(self, bucket, fulls):
        """
        -> this rank's slice of every gradient, summed over ranks. Row r of the buffer is what rank
        r owns of all of them, laid side by side.
        """
        if self.world == 1:
            return fulls
        rows = []
        for r in range(self.world):
            rows.append(torch.cat([full[slice(*s.ranges[r])] for s, full in zip(bucket, fulls)]))
        sent = fulls[0].new_zeros(self.world, max(map(len, rows)))  # (world, width)
        for r, row in enumerate(rows):
            sent[r, :len(row)] = row
        got = torch.empty_like(sent[0])
        reduce_scatter(got, sent.view(-1))
        return got[:len(rows[self.rank])].split([s.size for s in bucket])

    def zero_grad(self):
        if self.sharded:
            self.sharded.forget()
        if self.host:
            self.host.settle()
        for s in self.shards:
            s.grad = None
            s.summed = False
            _forget_gradient(s.param)

    # -------------------------------------------------------------------------
    # the step

    @torch.no_grad()
    def step(self, divide=1.0, factor=1.0):
        """
        Divides the summed gradient by `divide`, clips its global norm, updates with lr * factor.
        -> dict(grad_norm, skipped). A zero `divide` is a step without signal: nothing moves. A
        non-finite gradient is skipped and counted; the fifth in a row raises FloatingPointError.
        """
        if divide == 0:
            self.zero_grad()
            return dict(grad_norm=0.0, skipped=True)
        self.reduce_grads()
        norm = self._norm() / divide
        if not norm < float("inf"):
            self.zero_grad()
            self.skipped += 1
            self.bad_in_a_row += 1
            if self.bad_in_a_row == 5:
                raise FloatingPointError("the gradient was not finite 5 steps in a row: "
                                         "lower --lr, or look at the last samples")
            return dict(grad_norm=norm, skipped=True)
        self.bad_in_a_row = 0
        if norm == 0:  # no signal: not even momentum or weight decay moves a weight
            self.zero_grad()
            return dict(grad_norm=0.0, skipped=True)
        self.steps += 1
        clip = min(1.0, self.clip / norm) if self.clip else 1.0
        scale = 1 / divide * clip
        for s in self.shards:
            if s.size:
                update = self.update_matrix if s.muon else self._adamw
                update(s, scale, factor)
                self._write(s)
            s.grad = None
        self._gather()
        return dict(grad_norm=norm, skipped=False)

    def _norm(self):
        """of the whole gradient, over all ranks; the one host sync of a step"""
        squares = []
        with one_thread():
            for s in self.shards:
                grad = s.param.new_zeros(0, dtype=torch.float32) if s.grad is None else s.grad
                for _, part in pieces(grad, BUCKET):
                    # in fp64 on a CPU, where ranks must agree to the bit; a GPU would write the whole
                    # gradient out once more, and MPS has no fp64
                    part = part.double() if part.device.type == "cpu" else part
                    squares.append(part.square().sum())
        square = torch.stack(squares).sum()
        if self.world > 1:
            square = square.to(self.device)
            dist.all_reduce(square)
        return float(square.sqrt())

    def _adamw(self, s, scale, factor):
        b1, b2 = self.betas
        lr = self.lr * factor
        # in parts, or the largest tensor would be there three times more
        parts = [x.split(PART) for x in (s.master, s.m, s.v, s.grad)]
        for master, m, v, grad in zip(*parts):
            grad = grad * scale
            m.lerp_(grad, 1 - b1)
            v.lerp_(grad.square(), 1 - b2)
            if self.weight_decay and s.param.ndim == 2:
                master.mul_(1 - lr * self.weight_decay)
            root = (v / (1 - b2**self.steps)).sqrt_().add_(self.eps)
            master.addcdiv_(m, root, value=-lr / (1 - b1**self.steps))

    def update_matrix(self, s, scale, factor):
        """Muon, of one whole matrix of a block; s.grad * scale is its gradient, flat. An idea about
        optimizers puts its own in this place."""
        lr = self.muon_lr * factor
        grad = s.grad * scale
        s.m.lerp_(grad, 1 - self.momentum)
        update = grad.lerp(s.m, self.momentum).view(s.param.shape)
        # on the card, one matrix at a time, also where its state lives on the host
        matrices = update.to(self.device).chunk(self.stacks.get(s.name, 1))
        update = torch.cat([orthogonalize(m) for m in matrices]).to(update.device).reshape(-1)
        if self.weight_decay:
            s.master.mul_(1 - lr * self.weight_decay)
        # 0.2 sqrt(max(rows, columns)): the update has the size of AdamW's (arXiv 2502.16982)
        s.master.add_(update, alpha=-lr * 0.2 * max(matrices[0].shape) ** 0.5)

    def _write(self, s):
        """The master, rounded, into the weight."""
        if self.host:
            self.host.bring(s.mine, s.master)
        elif s.param.dtype != torch.float32:
            s.mine.copy_(s.master)

    def _gather(self):
        """Every rank gets everyone's updated slices, written into the weights in place."""
        if self.host:
            self.host.settle()
        for bucket in self.buckets if self.world > 1 else ():
            self._exchange(bucket)

    def _exchange(self, bucket):
        flats = [s.param.data.view(-1) for s in bucket]
        widths = [[s.ranges[r][1] - s.ranges[r][0] for s in bucket] for r in range(self.world)]
        sent = flats[0].new_zeros(max(map(sum, widths)))
        sent[:sum(widths[self.rank])] = torch.cat([flat[s.start:s.end] for s, flat in zip(bucket, flats)])
        got = sent.new_empty(self.world, len(sent))  # (world, width)
        all_gather(got.view(-1), sent)
        for r in range(self.world):
            for s, flat, piece in zip(bucket, flats, got[r, :sum(widths[r])].split(widths[r])):
                flat[slice(*s.ranges[r])] = piece

    # -------------------------------------------------------------------------
    # state: each rank saves its own slices; any number of ranks can load them

    def state_dict(self):
        pieces = {s.name: dict(start=s.start, end=s.end, master=s.master.clone(), m=s.m, v=s.v)
                  for s in self.shards if s.size}
        return dict(steps=self.steps, skipped=self.skipped, bad_in_a_row=self.bad_in_a_row, pieces=pieces)

    @torch.no_grad()
    def load_state_dict(self, states):
        """states: the state dicts of ALL ranks that saved, however many those were."""
        self.steps = states[0]["steps"]
        self.skipped = states[0]["skipped"]
        self.bad_in_a_row = states[0]["bad_in_a_row"]
        for s in self.shards:
            pieces = [state["pieces"][s.name] for state in states if s.name in state["pieces"]]
            covered = sum(_load_piece(s, piece) for piece in pieces)
            if covered != s.size:
                raise ValueError(f"the checkpoint's optimizer state covers {covered} of "
                                 f"{s.size} numbers of {s.name}")
        for s in self.shards:
            self._write(s)
        self._gather()

    def reset(self):
        """Forgets the moments and the step count (ProRL's hard reset)."""
        self.steps = 0
        for s in self.shards:
            s.m.zero_()
            if s.v is not None:
                s.v.zero_()


def _load_piece(s, piece):
    """Copies what this shard owns of a saved slice. -> how many numbers that were."""
    start = max(s.start, piece["start"])
    end = min(s.end, piece["end"])
    if start >= end:
        return 0
    ours = slice(start - s.start, end - s.start)
    theirs = slice(start - piece["start"], end - piece["start"])
    for key in ("master", "m", "v"):
        if getattr(s, key) is None:
            continue
        if piece[key] is None:
            raise ValueError(f"the checkpoint trained {s.name} with another optimizer (Muon or AdamW)")
        getattr(s, key)[ours] = piece[key][theirs].to(s.master.device)
    return end - start


def _forget_gradient(param):
    param.grad = None
    if hasattr(param, "grad32"):
        param.grad32 = None


def _fold(param):
    """Adds a half-precision gradient into its fp32 sum as soon as it is complete."""
    if param.grad32 is None:
        param.grad32 = param.grad.float()
    else:
        param.grad32.add_(param.grad)
    param.grad = None


def _arrived(optimizer, index, param):
    """A gradient is complete: to its bucket, or to the host, while the backward goes on."""
    optimizer = optimizer()
    if optimizer is None:
        return
    s = optimizer.shards[index]
    if optimizer.sharded:
        optimizer.sharded.arrive(s.name)
        return
    optimizer.host.add(s.total, param.grad.reshape(-1), first=not s.summed)
    s.summed = True
    param.grad = None
