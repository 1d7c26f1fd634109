"""
python -m bench NAME [flags] | all: see bench/__init__.py. Exit code 2 for an unknown name.

`all` runs the short ones, each in a process of its own and stopped at six minutes, reads what the long
ones said last from records/bench/NAME.txt, and ends with all their numbers in one table. To record one:

    python -m bench algorithms | tee records/bench/algorithms.txt
"""
import importlib
import json
import os
import signal
import subprocess
import sys
import threading

from bench import ROOT
from common.flags import die

# what `all` runs, with the flags that make it fit; whole benchmarks of hours are read from their records
SHORT = {"train": "", "rollout": "--sizes 4M --parts abde", "pack": "",
         "grpo": "--parts 1", "kernels": "", "simulate": ""}
LONG = ("grpo", "algorithms", "tail", "opd")
MINUTES = 6
LIBRARY = {"__init__", "__main__"}


def child(name, words):
    """The benchmark in a process of its own, what it prints passed on. -> its numbers; a text
    where there are none."""
    process = subprocess.Popen([sys.executable, "-m", "bench", name, *words.split()],
                               stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True)
    late = []

    def stop():                          # with the workers it started: they are of its session
        late.append(True)
        os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(60 * MINUTES, stop)
    timer.start()
    last = ""
    try:
        for last in process.stdout:
            print(last, end="", flush=True)
        process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if late:
        return f"stopped at {MINUTES} minutes"
    return numbers(last) if process.returncode == 0 else f"ended with {process.returncode}"


def numbers(line):
    """The JSON line that a benchmark ends with, or what is wrong with it."""
    try:
        found = json.loads(line)
    except ValueError:
        return "its last line is no JSON"
    return found if isinstance(found, dict) else "its last line is no JSON"


def recorded(name):
    path = ROOT / "records" / "bench" / f"{name}.txt"
    if not path.is_file():
        return f"not recorded here yet: python -m bench {name} | tee {path.relative_to(ROOT)}"
    return numbers((path.read_text().strip() or " ").splitlines()[-1])


def flat(found, before=""):
    """{"a": {"b": 1.5}} -> ("a b", 1.5)"""
    for key, value in found.items():
        if isinstance(value, dict):
            yield from flat(value, f"{before}{key} ")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield before + key, value


def table(results):
    """[(benchmark, where from, numbers or a text)] -> lines"""
    lines = []
    for name, source, found in results:
        rows = [("", found)] if isinstance(found, str) else list(flat(found))
        for key, value in rows:
            lines.append(f"  {name:<11} {source:<9} {key:<56} {value:.4g}" if key
                         else f"  {name:<11} {source:<9} {value}")
    return lines


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    known = sorted(p.stem for p in (ROOT / "bench").glob("*.py") if p.stem not in LIBRARY)
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\nbenchmarks: {', '.join(known)}")
        return
    if argv[0] != "all" and argv[0] not in known:
        die(f"no benchmark {argv[0]!r}: one of {', '.join(known)}, or all")
    if argv[0] != "all":
        print(f"---- {' '.join(argv)}", flush=True)
        importlib.import_module(f"bench.{argv[0]}").main(argv[1:])
        return
    if len(argv) > 1:
        die(f"all takes no flags, and {argv[1]!r} is one: give them to a benchmark by its name")
    results = []
    for name in [name for name in SHORT if name in known]:
        results.append((name, "now", child(name, SHORT[name])))
    results += [(name, "recorded", recorded(name)) for name in LONG if name in known]
    print("---- all")
    print("\n".join(table(results)))
    if any(isinstance(found, str) for _, source, found in results if source == "now"):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
