"""
Who died? Every rank says each second that it lives, and at its end what ended it.

    Watch(rank, world).start()                   # once, after the process group is there

One that raised, or is silent for GONE seconds, is named by the others, and they stop. Without this,
a collective would let them wait for minutes and then blame the wire. What is said goes through the
store that the process group met at: one key per rank, `alive/3`, whose value is a count while it
lives, then "done" or "raised ValueError: ...".
"""
import atexit
import contextlib
import itertools
import os
import re
import sys
import threading
import time

import torch.distributed as dist

GONE = 40.0                        # seconds without a sign of life
SUSPECT = 5.0                      # the same, once another rank broke a collective of this one


class Watch:
    def __init__(self, rank, world):
        self.rank = rank
        self.others = [r for r in range(world) if r != rank]
        # a connection of its own: the other may be busy waiting
        self.store = dist.distributed_c10d._get_default_store().clone()
        self.limit = GONE
        self.leaving = threading.Event()               # this rank is about to end
        self.lost = threading.Event()                  # the store does not answer any more
        self.thread = threading.Thread(target=self._listen, daemon=True)
        self.next_hook = sys.excepthook

    def start(self):
        self.thread.start()
        sys.excepthook = self._raised
        atexit.register(self._done)

    # --- in the thread, once a second

    def _listen(self):
        heard = {r: ("", time.monotonic()) for r in self.others}  # the last word of each, and when
        try:
            for beat in itertools.count():
                if self.leaving.wait(1.0):
                    return
                self._say(beat)
                for r in self.others:
                    self._check(r, heard)
        except RuntimeError:  # rank 0 holds the store where torchrun does not, and may end first
            self.lost.set()

    def _check(self, r, heard):
        old, since = heard[r]
        key = f"alive/{r}"
        word = self.store.get(key).decode() if self.store.check([key]) else ""
        silent = time.monotonic() - since
        if word != old:
            heard[r] = word, time.monotonic()
        elif word != "done" and silent > self.limit:
            word = f"died: no sign of life for {silent:.0f} s"
        if word.startswith(("raised", "died")):
            self._blame(r, word)
            os._exit(1)

    # --- at the end of this rank

    def _raised(self, kind, e, trace):
        """the excepthook: say what ended this rank, unless another rank did"""
        words = re.search("connection|peer|gloo|nccl|socket|store", f"{kind} {e}", re.IGNORECASE)
        if isinstance(e, RuntimeError) and words:
            # a collective that another rank broke: the thread names that rank and ends this process
            self.limit = SUSPECT
            self.thread.join(15.0)
            if self.lost.is_set():
                self._blame(0, "died, and the store with it")
        else:
            self._stop_listening()
            self._say(f"raised {kind.__name__}: {e}".splitlines()[0])
            time.sleep(2.5)                # the store may be ours, and the others have to read this
        self.leaving.set()
        self.next_hook(kind, e, trace)

    def _done(self):
        if not self.leaving.is_set() and not self.lost.is_set():
            self._stop_listening()
            with contextlib.suppress(RuntimeError):
                self._say("done")

    def _stop_listening(self):
        """A thread that is still asking the store when the interpreter ends takes the process with it
        ("terminate called without an active exception"): on a busy machine an answer takes seconds."""
        self.leaving.set()
        self.thread.join(30.0)

    # --- words

    def _say(self, word):
        self.store.set(f"alive/{self.rank}", str(word))

    def _blame(self, r, what):
        print(f"error: rank {r} {what}. The others stop; --resume continues from the last checkpoint",
              file=sys.stderr, flush=True)
