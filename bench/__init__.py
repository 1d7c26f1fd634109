"""
What every benchmark shares. The rule: the real peer, in the same run, on the same weights; what
both sides compute is compared before anything is timed; sides alternate; medians and the spread;
one JSON line last. Times are CPU seconds of this process, because the wall clock of a shared
machine measures its other users. With each table stands how fast a core is here, for a time alone
says nothing on another machine.

    python -m bench NAME [flags]    one benchmark: a file of this folder
    python -m bench all             those that fit in a few minutes each, and all ratios in one table
"""
import importlib
import json
import os
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# read when numpy is first imported; a benchmark's one thread is one thread
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def peer(name):
    """The module `name` of a peer, or None where it is not installed.

    Our kernels.py has the name of a package on PyPI that transformers and trl look for: as long
    as the repo's root is on the path they would find ours and import names it does not have. So
    ours is hidden while a peer is imported; if the real package is installed the peer keeps it,
    and our own modules hold ours already."""
    import kernels as ours
    path, sys.path = sys.path, [p for p in sys.path if Path(p or ".").resolve() != ROOT]
    del sys.modules["kernels"]
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as e:
        if name.split(".")[0] not in (e.name or "") and e.name != name:
            raise
        return None
    finally:
        sys.path = path
        sys.modules["kernels"] = ours
        importlib.invalidate_caches()


def alternate(sides, repeats):
    """{name: function} -> {name: CPU seconds of each run}; one untimed run of each first, then in turn."""
    seconds = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            start = time.process_time()
            run()
            if turn:
                seconds[name].append(time.process_time() - start)
    return seconds


def show(name, seconds, per=1.0, unit="s"):
    """One line of a table: the median (and the range) of seconds, or of `per` units per second."""
    values = sorted(per / s if unit.endswith("/s") else s for s in seconds)
    print(f"  {name:<44} {statistics.median(values):12,.4g} {unit}   ({values[0]:,.4g} .. {values[-1]:,.4g})")


def ratio(slow, fast):
    """How many times faster: the median over the pairs that ran next to each other."""
    return statistics.median(a / b for a, b in zip(slow, fast))


def finish(name, **numbers):
    """The last two lines of every benchmark: how fast a core is here, and the numbers for scripts."""
    from common import machine           # it imports numpy: not before OPENBLAS_NUM_THREADS is set
    speed = machine.gflops(seconds=2.0)
    numbers["gflops_per_core"] = speed
    print(f"this machine: {speed:.0f} GFLOP/s per core (torch, fp32, 1,024^3, one thread, best of 5)")
    print(json.dumps({"bench": name,
                      **{k: round(v, 4) if isinstance(v, float) else v for k, v in numbers.items()}}))
    return numbers
