"""
common/optim.py: AdamW and Muon, sharded over ranks (ZeRO-1).

Every rank holds the whole model in its working precision; the fp32 masters and moments are dealt out. A step is
    gradients summed in fp32 -> reduced to the rank that owns them -> clip, update the shard -> weights gathered back in place
so that a weight's address never changes and sampler and trainer go on reading the same tensors.

    Muon   matrices of the blocks, dealt whole (orthogonalising needs the whole matrix), biggest first to the emptiest rank
    AdamW  the rest (embeddings, head, norms, biases; or everything), each cut flat into `world` equal slices

One process runs the same lines; its collectives are no-ops. When the weights are fp32 the master IS the weight, no copy.
Deleted: parameter groups, closures, foreach paths, schedulers. The caller passes this step's learning-rate factor.
"""

import torch
import torch.distributed as dist

from common.run import times

# five rounds of the Polar Express (arXiv 2505.16932): the best quintics in turn for singular values in [1e-3, 1]
POLAR = [(8.28721201814563, -23.595886519098837, 17.300387312530933), (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
         (3.9486908534822946, -2.908902115962949, 0.5518191394370137), (3.3184196573706015, -2.488488024314874, 0.51004894012372),
         (2.300652019954817, -1.6689039845747493, 0.4188073119525673)]


def orthogonalize(m):
    """The nearest (semi-)orthogonal matrix, roughly: all singular values of m pushed to about 1."""
    x = m.to(torch.bfloat16 if m.is_cuda else torch.float32)
    tall = x.shape[0] > x.shape[1]
    x = x.t() if tall else x
    x = x / (x.norm() * 1.01 + 1e-7)                             # the margin keeps rounding inside the interval of the quintics
    if x.dtype == torch.float32 and x.shape[1] >= 2 * x.shape[0]:
        return _by_gram(x, tall).to(m.dtype)
    for a, b, c in POLAR:
        xx = times(x, x)                                         # symmetric, so times(xx, xx) is its square
        x = a * x + times(b * xx + c * times(xx, xx), x.t())
    return (x.t() if tall else x).to(m.dtype)


def _by_gram(x, tall):
    """The same rounds on the small matrix g = x x^T: each multiplies x from the left by q = a + b g + c g^2, and g by q from both sides.
    Needs fp32: g squares the singular values. x is multiplied out after two rounds and g made anew from it: the first quintics stretch
    what rounding left of the small singular values 8 times each, and a g that has drifted from x x^T would stretch them without end."""
    for rounds in (POLAR[:2], POLAR[2:]):
        g, product = times(x, x), None
        for a, b, c in rounds:
            q = b * g + c * times(g, g)
            q.diagonal().add_(a)
            product = q if product is None else times(q, product)
            g = times(times(q, g), q)
        x = times(product, x.t())
    return x.t() if tall else x


class Shard:
    """What each rank owns of one parameter: ranges[r] = (lo, hi) of the flat tensor; all or nothing for a Muon matrix."""

    def __init__(self, name, param, owner, rank, world):
        self.name, self.param, self.owner, self.muon = name, param, owner, owner is not None
        size = param.numel()
        cut = [min(size, r * -(-size // world)) for r in range(world + 1)]
        self.ranges = [(0, size) if r == owner else (size, size) for r in range(world)] if self.muon else list(zip(cut, cut[1:]))
        self.start, self.end = self.ranges[rank]
        mine = param.data.view(-1)[self.start:self.end]
        self.master = mine if param.dtype == torch.float32 else mine.float()
        self.m = torch.zeros_like(self.master)
        self.v = None if self.muon else torch.zeros_like(self.master)
        self.grad = None                                         # fp32, of this slice, summed over ranks and micro-batches


BUCKET = 1 << 24                                                 # numbers that travel in one collective: 64 MB of fp32


def buckets(shards, world):
    """Shards that travel together: a hundred small collectives cost more than a small model's whole step. The k-th matrices of all
    Muon owners stay together, so that a bucket is about equally wide on every rank."""
    turns, rounds = [0] * world, {}
    for s in sorted((s for s in shards if s.muon), key=lambda s: -s.param.numel()):
        rounds.setdefault(turns[s.owner], []).append(s)
        turns[s.owner] += 1
    found, room = [], 0
    for unit in [[s] for s in shards if not s.muon] + list(rounds.values()):
        size = sum(s.param.numel() for s in unit)
        if size > room or unit[0].param.dtype != found[-1][0].param.dtype:
            found, room = found + [[]], BUCKET
        found[-1] += unit
        room -= size
    return found


class Optimizer:
    def __init__(self, model, lr=1e-3, muon_lr=None, betas=(0.9, 0.95), momentum=0.95, weight_decay=0.0, eps=1e-8, clip=1.0,
                 reduce="step"):
        """muon_lr None: AdamW for everything. reduce="micro" sums over ranks after every micro-batch (reduce_grads),
        which needs no full fp32 gradient, and an equal number of micro-batches on all ranks."""
        self.lr, self.muon_lr, self.betas, self.momentum = lr, muon_lr, betas, momentum
        self.weight_decay, self.eps, self.clip, self.reduce = weight_decay, eps, clip, reduce
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self.steps, self.bad_in_a_row, self.skipped = 0, 0, 0
        named = list(model.named_parameters())
        muon = [(n, p) for n, p in named if muon_lr is not None and p.ndim == 2 and n.startswith("blocks.")]
        load, owner = [0] * self.world, {}
        for n, p in sorted(muon, key=lambda item: -item[1].numel()):
            owner[n] = load.index(min(load))
            load[owner[n]] += p.numel()
        self.shards = [Shard(n, p, owner.get(n), self.rank, self.world) for n, p in named]
        self.buckets = buckets(self.shards, self.world)
        if reduce == "step":                                     # half-precision gradients are summed in fp32 as they appear
            for n, p in named:
                if p.dtype != torch.float32:
                    p.grad32 = None
                    p.register_post_accumulate_grad_hook(_fold)

    # -------------------------------------------------------------------------
    # gradients

    @torch.no_grad()
    def reduce_grads(self):
        """Sums the accumulated gradients over ranks into each owner's slice and clears them."""
        for bucket in self.buckets:
            fulls = []                                           # flat fp32 gradients of this rank's micro-batches
            for s in bucket:
                full = getattr(s.param, "grad32", None)
                full = full if full is not None else s.param.grad
                fulls.append((torch.zeros_like(s.param, dtype=torch.float32) if full is None else full.float()).view(-1))
                s.param.grad = None
                if hasattr(s.param, "grad32"):
                    s.param.grad32 = None
            for s, mine in zip(bucket, self._scatter(bucket, fulls)):
                s.grad = mine if s.grad is None else s.grad.add_(mine)

    def _scatter(self, bucket, fulls):
        """-> this rank's slice of every gradient, summed over ranks: row r of the buffer is what rank r owns, laid side by side."""
        if self.world == 1:
            return fulls
        rows = [torch.cat([full[slice(*s.ranges[r])] for s, full in zip(bucket, fulls)]) for r in range(self.world)]
        sent = fulls[0].new_zeros(self.world, max(map(len, rows)))                     # (world, width)
        for r, row in enumerate(rows):
            sent[r, :len(row)] = row
        got = torch.empty_like(sent[0])
        dist.reduce_scatter_tensor(got, sent.view(-1))
        return got[:len(rows[self.rank])].split([s.end - s.start for s in bucket])

    def zero_grad(self):
        for s in self.shards:
            s.grad = s.param.grad = None
            if hasattr(s.param, "grad32"):
                s.param.grad32 = None

    # -------------------------------------------------------------------------
    # the step

    @torch.no_grad()
    def step(self, divide=1.0, factor=1.0):
        """Divides the summed gradient by `divide`, clips its global norm, updates with lr * factor.
        -> dict(grad_norm, skipped). A zero `divide` is a step without signal: nothing moves. A non-finite gradient
        is skipped and counted; the fifth in a row raises FloatingPointError."""
        if divide == 0:
            self.zero_grad()
            return dict(grad_norm=0.0, skipped=True)
        self.reduce_grads()
        # in fp64 on a CPU, where ranks must agree to the bit; a GPU would write the whole gradient out once more, and MPS has none
        square = torch.stack([(s.grad.double() if s.grad.device.type == "cpu" else s.grad).square().sum() for s in self.shards]).sum()
        if self.world > 1:
            dist.all_reduce(square)
        norm = float(square.sqrt()) / divide                     # the one host sync of a step
        if not norm < float("inf"):
            self.zero_grad()
            self.skipped += 1
            self.bad_in_a_row += 1
            if self.bad_in_a_row == 5:
                raise FloatingPointError("the gradient was not finite 5 steps in a row: lower --lr, or look at the last samples")
            return dict(grad_norm=norm, skipped=True)
        self.bad_in_a_row = 0
        if norm == 0:                                            # no signal: not even momentum or weight decay moves a weight
            self.zero_grad()
            return dict(grad_norm=0.0, skipped=True)
        self.steps += 1
        scale = 1 / divide * (min(1.0, self.clip / norm) if self.clip else 1.0)
        for s in self.shards:
            if s.end > s.start:
                grad = s.grad * scale
                self._muon(s, grad, factor) if s.muon else self._adamw(s, grad, factor)
            s.grad = None
        self._gather()
        return dict(grad_norm=norm, skipped=False)

    def _adamw(self, s, grad, factor):
        b1, b2 = self.betas
        lr = self.lr * factor
        s.m.lerp_(grad, 1 - b1)
        s.v.lerp_(grad.square(), 1 - b2)
        if self.weight_decay and s.param.ndim == 2:
            s.master.mul_(1 - lr * self.weight_decay)
        root = (s.v / (1 - b2**self.steps)).sqrt_().add_(self.eps)
        s.master.addcdiv_(s.m, root, value=-lr / (1 - b1**self.steps))

    def _muon(self, s, grad, factor):
        lr = self.muon_lr * factor
        s.m.lerp_(grad, 1 - self.momentum)
        update = orthogonalize(grad.lerp(s.m, self.momentum).view(s.param.shape)).reshape(-1)
        if self.weight_decay:
            s.master.mul_(1 - lr * self.weight_decay)
        rows, cols = s.param.shape                               # 0.2 sqrt(max): the update has the size of AdamW's (arXiv 2502.16982)
        s.master.add_(update, alpha=-lr * 0.2 * max(rows, cols) ** 0.5)

    def _gather(self):
        """Every rank gets everyone's updated slices, written into the weights in place."""
        for bucket in self.buckets:
            for s in bucket:
                if s.end > s.start and s.param.dtype != torch.float32:
                    s.param.data.view(-1)[s.start:s.end] = s.master.to(s.param.dtype)
            if self.world == 1:
                continue
            flats = [s.param.data.view(-1) for s in bucket]
            widths = [[s.ranges[r][1] - s.ranges[r][0] for s in bucket] for r in range(self.world)]
            sent = flats[0].new_zeros(max(map(sum, widths)))
            sent[:sum(widths[self.rank])] = torch.cat([flat[s.start:s.end] for s, flat in zip(bucket, flats)])
            got = sent.new_empty(self.world, len(sent))          # (world, width)
            dist.all_gather_into_tensor(got.view(-1), sent)
            for r in range(self.world):
                for s, flat, piece in zip(bucket, flats, got[r, :sum(widths[r])].split(widths[r])):
                    flat[slice(*s.ranges[r])] = piece

    # -------------------------------------------------------------------------
    # state: each rank saves its own slices; any number of ranks can take them up again

    def state_dict(self):
        pieces = {s.name: dict(start=s.start, end=s.end, master=s.master.clone(), m=s.m, v=s.v) for s in self.shards if s.end > s.start}
        return dict(steps=self.steps, skipped=self.skipped, bad_in_a_row=self.bad_in_a_row, pieces=pieces)

    @torch.no_grad()
    def load_state_dict(self, states):
        """states: the state dicts of ALL ranks that saved, however many those were."""
        self.steps, self.skipped, self.bad_in_a_row = (states[0][k] for k in ("steps", "skipped", "bad_in_a_row"))
        for s in self.shards:
            covered = 0
            for state in states:
                piece = state["pieces"].get(s.name)
                if piece is None:
                    continue
                lo, hi = max(s.start, piece["start"]), min(s.end, piece["end"])
                if lo >= hi:
                    continue
                into, of = slice(lo - s.start, hi - s.start), slice(lo - piece["start"], hi - piece["start"])
                for key in ("master", "m", "v"):
                    if getattr(s, key) is not None:
                        if piece[key] is None:
                            raise ValueError(f"the checkpoint trained {s.name} with another optimizer (Muon or AdamW)")
                        getattr(s, key)[into] = piece[key][of].to(s.master.device)
                covered += hi - lo
            if covered != s.end - s.start:
                raise ValueError(f"the checkpoint's optimizer state covers {covered} of {s.end - s.start} numbers of {s.name}")
        self._gather()

    def reset(self):
        """Forgets the moments and the step count (ProRL's hard reset)."""
        self.steps = 0
        for s in self.shards:
            s.m.zero_()
            if s.v is not None:
                s.v.zero_()


def _fold(param):
    """Adds a half-precision gradient into its fp32 sum as soon as it is complete."""
    if param.grad32 is None:
        param.grad32 = param.grad.float()
    else:
        param.grad32.add_(param.grad)
    param.grad = None
