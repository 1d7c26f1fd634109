"""
pages.py: keys and values on a GPU. A pool of small pages, sized once and never freed, since CUDA
graphs know its addresses; and a table of pages per sequence.

    prompt of 40 tokens, pages     table 0   [3][7][12][20]    3 and 7 are full: both sequences share them
    of 16, two samples             table 1   [3][7][15]        12, 15: the prompt's last 8 keys, copied

Its twin on a CPU is the Slabs of slabs.py, with the same methods: open and close a prefix, prefill,
enter, leave, grow, decode.
"""

from itertools import accumulate

import numpy as np
import torch

from kernels import continued_attention, decode_attention, packed_attention, picked

PAGE = 32                # a sequence wastes half a page, and a shared page is rarely copied


class Pages:
    """`total` things: taken one by one, shared by reference count, free when the last owner lets
    go. The pages of a pool, and the slots of the sampler's batch."""

    def __init__(self, total):
        self.owners = [0] * total
        self.unowned = list(reversed(range(total)))

    @property
    def left(self):
        return len(self.unowned)

    def take(self):
        page = self.unowned.pop()
        self.owners[page] = 1
        return page

    def share(self, page):
        assert self.owners[page], f"page {page} has no owner: it cannot be shared"
        self.owners[page] += 1
        return page

    def free(self, page):
        assert self.owners[page], f"page {page} is freed twice"
        self.owners[page] -= 1
        if not self.owners[page]:
            self.unowned.append(page)


class Pool:
    # steps between two looks at what has ended: a look makes the GPU wait. The overrun is cut off
    check_every = 8
    share = 0.8              # of what an update left of the GPU; the rest is room for prefill

    def __init__(self, c, dtype, device, slots, max_len, pages=None, page=None):
        if page is None:                 # flash-attn reads no others
            page = 256 if picked("decode", device.type) == "flash" else PAGE
        self.page = page
        self.c = c
        self.device = device
        longest = -(-(max_len + self.check_every) // page)
        if pages is None:
            pages = slots * longest + 1
            if device.type == "cuda":
                pages = min(pages, self._pages_that_fit(dtype))
        shape = c.n_layer, pages, page, c.n_kv_head, c.head_dim
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)
        # what kernels read: the pages and lengths of the sequences in the order of the batch
        self.table = torch.zeros(slots, longest, dtype=torch.int32, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        # on the host, of each slot: its pages, and how many of them are written down
        self.host_table = np.zeros((slots, longest), dtype=np.int32)
        self.known = [0] * slots
        self.most = (pages - 3) * page - self.check_every        # tokens: the longest that fits alone
        self.clear()

    def _pages_that_fit(self, dtype):
        """What an update left of the GPU, less some."""
        c = self.c
        page_bytes = 2 * c.n_layer * self.page * c.n_kv_head * c.head_dim * dtype.itemsize
        free = torch.cuda.mem_get_info(self.device)[0]
        pages = int(self.share * free) // page_bytes
        if pages < 5:
            raise ValueError(f"the GPU has {free / 2**30:.2f} GiB left: no room for keys and values. Take a "
                             "smaller model")
        return pages

    def clear(self):
        self.pages = Pages(self.k.shape[1])
        self.pages.take()                # page 0: where the padding of a batch writes
        self.owned = {}                  # slot -> its pages
        self.k.zero_()                   # in place: graphs know the addresses
        self.v.zero_()

    # --- prefixes

    def _fork(self, cache, length):
        """The same keys again: full pages shared, the last partial one copied. Takes one page at
        most."""
        full = length // self.page
        pages = [self.pages.share(p) for p in cache[:full]]
        if length % self.page:
            copy = self.pages.take()
            self.k[:, copy] = self.k[:, cache[full]]
            self.v[:, copy] = self.v[:, cache[full]]
            pages.append(copy)
        return pages

    def open(self, prefix, parent=None):
        """-> was there room?"""
        need = -(-len(prefix.tokens) // self.page)
        if self.pages.left < need + 1:
            return False
        prefix.cache = self._fork(parent.cache, parent.done) if parent else []
        prefix.done = parent.done if parent else 0
        while len(prefix.cache) < need:
            prefix.cache.append(self.pages.take())
        return True

    def close(self, prefix):
        for p in prefix.cache:
            self.pages.free(p)

    def prefill(self, pieces):
        """pieces: (prefix, begin, end), one after another in a packed row. -> attend"""
        cu = [0, *accumulate(end - begin for _, begin, end in pieces)]
        write = self._places(pieces)
        read = None
        if any(begin for _, begin, _ in pieces):         # some continue: what they see is in the pool
            read = self._places([(prefix, 0, end) for prefix, _, end in pieces])
            attention = continued_attention(cu, [0, *accumulate(end for _, _, end in pieces)])
        else:
            attention = packed_attention(cu, max(end for _, _, end in pieces))

        def attend(layer, q, k, v):
            keys = self.k[layer].view(-1, *k.shape[1:])
            values = self.v[layer].view(-1, *v.shape[1:])
            keys.index_copy_(0, write, k[: len(write)])
            values.index_copy_(0, write, v[: len(write)])
            if read is not None:
                k, v = keys.index_select(0, read), values.index_select(0, read)
            return attention(layer, q, k, v)
        return attend

    def _places(self, pieces):
        """Where the keys of these tokens lie in the pool."""
        places = []
        for prefix, begin, end in pieces:
            of_pages = torch.tensor(prefix.cache).unsqueeze(1) * self.page + torch.arange(self.page)
            places.append(of_pages.view(-1)[begin:end])
        return torch.cat(places).to(self.device)

    # --- sequences

    def enter(self, prefix, slot, running):
        """-> was there room?"""
        # a page for what is copied, one to continue on, one for each other sequence: or it is
        # preempted at once
        if self.pages.left < 2 + running:
            return False
        self.owned[slot] = self._fork(prefix.cache, len(prefix.tokens))
        self.host_table[slot] = 0
        self.known[slot] = 0
        return True

    def leave(self, slot):
        for p in self.owned.pop(slot):
            self.pages.free(p)

    def grow(self, sequence):
        """Pages for the steps until the next look. -> were there enough?"""
        pages = self.owned[sequence.slot]
        while len(pages) * self.page < sequence.cached + self.check_every:
            if not self.pages.left:
                return False
            pages.append(self.pages.take())
        return True

    def decode(self, sequences, size):
        """-> the slots in the order of the batch, the view of its steps, and how many steps it is
        valid for."""
        order = [s.slot for s in sorted(sequences, key=lambda s: s.entered)]
        for slot in order:               # new pages only: all of a long sequence take longer than a step
            pages = self.owned[slot]
            self.host_table[slot, self.known[slot] : len(pages)] = pages[self.known[slot] :]
            self.known[slot] = len(pages)
        width = max(self.known[slot] for slot in order)
        table = np.zeros((size, width), np.int32)
        table[: len(order)] = self.host_table[order, :width]
        self.table[:size, :width].copy_(torch.from_numpy(table))
        return order, PagesView(self, size), self.check_every


class PagesView:
    """The pool in the steps of a batch. It holds the table's whole width, since a graph's addresses
    are fixed: kernels read as far as a sequence's length says."""

    def __init__(self, pool, size):
        self.pool = pool
        self.table_B = pool.table[:size]
        self.lengths_B = pool.lengths[:size]

    def advance(self, position_B):
        self.lengths_B.copy_(position_B)

    def attend(self, layer, q, k, v):
        k_pages, v_pages = self.pool.k[layer], self.pool.v[layer]
        return decode_attention(q, k, v, k_pages, v_pages, self.table_B, self.lengths_B)


# -----------------------------------------------------------------------------
# CUDA graphs: a decode step of a small model is all launches; replayed, it is one


def recorded(step, sizes):
    """-> an iterator over (size, CUDA graph of step(size)), the largest first, so that the smaller
    ones live in its memory."""
    pool = torch.cuda.graph_pool_handle()
    aside = torch.cuda.Stream()          # one: libraries keep a workspace for each stream
    for size in reversed(sizes):
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):   # compiles kernels, and libraries take their workspace
            for _ in range(2):
                step(size)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the process group's thread keeps asking meanwhile
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step(size)
        yield size, graph
