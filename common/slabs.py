"""
slabs.py: keys and values on a CPU. A slab per capacity: 32, 64, 128, ... keys per row. A full row
moves to the slab of twice the size.

    slab 32    [row][row][row]        rows stand side by side from 0, so attention over a slab is one
    slab 64    [ row  ][ row  ]       product per layer over [:rows, :longest]. Nothing is gathered, a
    slab 128   [    row     ]         long row does not make the short ones pay, and what moving costs
                                      is paid back as in any array that doubles

Its twin on a GPU is the Pool of pages.py, with the same methods: open and close a prefix, prefill,
enter, leave, grow, decode. A row holds one sequence, whose `slot` names it here.
"""

import math
from itertools import accumulate

import torch
import torch.nn.functional as F

from kernels import packed_attention

SMALLEST = 32                            # keys per row of the smallest slab


class Slab:
    def __init__(self, capacity, c, like):
        self.capacity = capacity
        self.like = like                 # a tensor of the weights' dtype and device
        self.size = 0                    # rows there is room for
        self.slots = []                  # of the sequences, row by row
        self.kv = like.new_zeros(2, c.n_layer, 0, c.n_kv_head, capacity, c.head_dim)  # (.., size, ..)
        self.mask = like.new_zeros(0, c.n_kv_head, 1, capacity)  # added to scores: 0 on keys, else -inf

    def _enlarge(self, size):
        kv, mask = self.kv, self.mask
        self.kv = kv.new_zeros(*kv.shape[:2], size, *kv.shape[3:])
        self.kv[:, :, : self.size] = kv
        self.mask = mask.new_full((size, *mask.shape[1:]), -math.inf)
        self.mask[: self.size] = mask
        self.size = size

    def add(self, slot, length):
        """-> its row, whose first `length` keys are visible; the caller fills them in."""
        r = len(self.slots)
        if r + 2 > self.size:            # never one row alone: see SlabView.advance
            self._enlarge(max(4, 2 * self.size))
        self.slots.append(slot)
        self.mask[r] = -math.inf
        self.mask[r, :, :, :length] = 0
        return r

    def remove(self, r):
        """The last row fills the hole. -> the slot that moved, or None."""
        last = len(self.slots) - 1
        slot = self.slots.pop()
        if r == last:
            return None
        self.kv[:, :, r] = self.kv[:, :, last]
        self.mask[r] = self.mask[last]
        self.slots[r] = slot
        return slot


class SlabView:
    """One slab in the steps of a batch: `advance` once per step, then `attend` in each layer."""

    def __init__(self, slab, c, start, longest, exact):
        self.slab = slab
        self.rows = len(slab.slots)
        self.span = slice(start, start + self.rows)          # its sequences in the batch
        self.longest = longest                               # keys of its longest row
        self.exact = exact
        self.n_head = c.n_head
        self.head_dim = c.head_dim
        self.sharing = c.n_head // c.n_kv_head               # query heads per key head
        self.scale = c.head_dim**-0.5
        self.heads = self.rows * c.n_kv_head                 # key heads of all rows: a product each
        first = torch.arange(self.heads, device=slab.like.device).mul_(slab.capacity)
        self.first = first.view(self.rows, c.n_kv_head)      # the place of each head's first key
        self.write = None                                    # (heads), the place of the new keys
        self.length = 0                                      # keys that attention looks at
        self.k, self.v = slab.kv.flatten(2, 4).unbind()      # of a layer: (heads x capacity, head_dim)

    def advance(self, position_B):
        """Room for one more key in each row, and attention as far as the longest row needs."""
        self.longest += 1
        if self.write is None:
            self.write = (self.first + position_B[self.span].unsqueeze(1)).view(-1)
        else:
            self.write += 1
        self.slab.mask.view(-1).index_fill_(0, self.write, 0.0)
        # exact: the slab's full length, which does not depend on other rows; and never a batch of
        # one product, which BLAS computes by another routine
        capacity = self.slab.capacity
        length = capacity if self.exact else min(capacity, -(-self.longest // 32) * 32)
        if length != self.length:
            self._look_at(length)

    def _look_at(self, length):
        self.length = length
        self.products = N = max(self.heads, 2 if self.exact else 1)
        self.mask_N1L = self.slab.mask.flatten(0, 1)[:N, :, :length]
        keys, values = self.slab.kv.flatten(2, 3)[:, :, :N, :length]
        self.keys_NdL = keys.transpose(2, 3).unbind()
        self.values_NLd = values.unbind()

    def attend(self, layer, q, k, v):
        if self.rows != q.shape[0]:
            q, k, v = q[self.span], k[self.span], v[self.span]
        self.k[layer].index_copy_(0, self.write, k.reshape(-1, self.head_dim))
        self.v[layer].index_copy_(0, self.write, v.reshape(-1, self.head_dim))
        q_NGd = q.reshape(-1, self.sharing, self.head_dim)
        if self.heads < self.products:
            q_NGd = torch.cat((q_NGd, q_NGd))
        scores_NGL = torch.baddbmm(self.mask_N1L, q_NGd, self.keys_NdL[layer], alpha=self.scale)
        o_NGd = torch.bmm(scores_NGL.softmax(-1), self.values_NLd[layer])
        if self.heads < self.products:
            o_NGd = o_NGd[: self.heads]
        return o_NGd.view(self.rows, self.n_head, self.head_dim)


class SlabsView:
    """All slabs in the steps of a batch, and the rows that fill it up to its size."""

    def __init__(self, views, padding):
        self.views = views
        self.padding = padding           # what attention gives for those, or None: there are none

    def advance(self, position_B):
        for view in self.views:
            view.advance(position_B)

    def attend(self, layer, q, k, v):
        parts = [view.attend(layer, q, k, v) for view in self.views]
        if self.padding is not None:
            parts.append(self.padding)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class Slabs:
    check_every = 1      # steps between two looks at what has ended: a look costs nothing here

    def __init__(self, c, like, exact):
        self.c = c
        self.like = like
        self.exact = exact
        self.clear()

    def clear(self):
        self.slabs = {}                  # capacity -> Slab
        self.places = {}                 # slot -> (slab, row)

    # --- prefixes

    def open(self, prefix, parent=None):
        c = self.c
        P = len(prefix.tokens)
        prefix.cache = self.like.new_empty(2, c.n_layer, c.n_kv_head, P, c.head_dim)
        if parent:
            prefix.done = parent.done
            prefix.cache[:, :, :, : parent.done] = parent.cache
        return True

    def close(self, prefix):
        """The caller drops the cache."""

    def prefill(self, pieces):
        """pieces: (prefix, start, end), one after another in a packed row. -> attend"""
        cu = [0, *accumulate(end - start for _, start, end in pieces)]
        new = self.like.new_empty(2, self.c.n_layer, self.c.n_kv_head, cu[-1], self.c.head_dim)
        copied = []                      # pieces that are not all of their prefix
        for (prefix, start, end), a, b in zip(pieces, cu, cu[1:]):
            if end - start < len(prefix.tokens):
                copied.append((prefix, start, end, a, b))
            else:
                prefix.cache = new[:, :, :, a:b]         # a view: the row stays while one of them waits
        continued = [piece for piece in copied if piece[1]]
        # exact: a call for pieces of one length that begin a prefix, which it sums one by one; a call
        # over several lengths may sum in an order that depends on all of them
        together = None
        begun = {}                       # length -> the rows of those pieces
        if not self.exact and not continued:
            together = packed_attention(cu, max(end for _, _, end in pieces))
        else:
            for (_, start, end), a, b in zip(pieces, cu, cu[1:]):
                if not start:
                    begun.setdefault(end, []).append(torch.arange(a, b))
        rows_of_begun = [torch.stack(rows) for rows in begun.values()]

        def attend(layer, q, k, v):
            new[0, layer] = k[: cu[-1]].transpose(0, 1)
            new[1, layer] = v[: cu[-1]].transpose(0, 1)
            for prefix, start, end, a, b in copied:
                prefix.cache[:, layer, :, start:end] = new[:, layer, :, a:b]
            if together:
                return together(layer, q, k, v)
            shared = q.shape[1] != k.shape[1]
            o = torch.zeros_like(q)
            for rows_BL in rows_of_begun:
                qkv_BHLd = [x[rows_BL].transpose(1, 2) for x in (q, k, v)]
                o_BHLd = F.scaled_dot_product_attention(*qkv_BHLd, is_causal=True, enable_gqa=shared)
                o[rows_BL] = o_BHLd.transpose(1, 2)
            for prefix, start, end, a, b in continued:
                k_all, v_all = prefix.cache[:, layer, None, :, :end]     # (1, kv heads, end, hd)
                o_piece = F.scaled_dot_product_attention(
                    q[a:b].transpose(0, 1).unsqueeze(0), k_all, v_all,
                    attn_mask=causal(end - start, end, q.device), enable_gqa=shared)
                o[a:b] = o_piece.squeeze(0).transpose(0, 1)
            return o
        return attend

    # --- sequences

    def _slab(self, keys):
        capacity = SMALLEST
        while capacity < keys:
            capacity *= 2
        if capacity not in self.slabs:
            self.slabs[capacity] = Slab(capacity, self.c, self.like)
        return self.slabs[capacity]

    def enter(self, prefix, slot, running):
        P = len(prefix.tokens)
        slab = self._slab(P + 1)
        r = slab.add(slot, P)
        slab.kv[:, :, r, :, :P] = prefix.cache
        self.places[slot] = slab, r
        return True

    def leave(self, slot):
        slab, r = self.places.pop(slot)
        moved = slab.remove(r)
        if moved is not None:
            self.places[moved] = slab, r

    def grow(self, sequence):
        """Room for one more key. -> there is always some"""
        slab, r = self.places[sequence.slot]
        if sequence.cached + 1 > slab.capacity:
            bigger = self._slab(sequence.cached + 1)
            new_r = bigger.add(sequence.slot, sequence.cached)
            bigger.kv[:, :, new_r, :, : slab.capacity] = slab.kv[:, :, r]
            self.leave(sequence.slot)
            self.places[sequence.slot] = bigger, new_r
        return True

    def row(self, slot):
        """-> its keys and its values, an array per layer."""
        slab, r = self.places[slot]
        keys, values = slab.kv[:, :, r].numpy()
        return list(keys), list(values)

    def decode(self, sequences, size):
        """-> the slots in the order of the batch, the view of its steps, and how many steps it is
        valid for."""
        c = self.c
        cached = {s.slot: s.cached for s in sequences}
        order, views, valid_for = [], [], math.inf
        for _, slab in sorted(self.slabs.items()):
            if slab.slots:
                longest = max(cached[slot] for slot in slab.slots)
                valid_for = min(valid_for, slab.capacity - longest)
                views.append(SlabView(slab, c, len(order), longest, self.exact))
                order += slab.slots
        padding = None
        if size > len(order):
            padding = self.like.new_zeros(size - len(order), c.n_head, c.head_dim)
        return order, SlabsView(views, padding), valid_for


def causal(queries, keys, device):
    """The mask of the last `queries` of `keys` positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
