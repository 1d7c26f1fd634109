"""python -m bench NAME [flags] | all: see bench/__init__.py. Exit code 2 for an unknown name."""
import importlib
import sys

from bench import ROOT
from common.run import die

SHORT = ("train", "rollout", "pack", "grpo", "kernels", "simulate")      # what `all` runs, each in a few minutes


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    known = sorted(p.stem for p in (ROOT / "bench").glob("*.py") if not p.stem.startswith("_"))
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__}\n\nbenchmarks: {', '.join(known)}")
        return
    if argv[0] != "all" and argv[0] not in known:
        die(f"no benchmark {argv[0]!r}: one of {', '.join(known)}, or all")
    results = {}
    for name in [n for n in SHORT if n in known] if argv[0] == "all" else [argv[0]]:
        print(f"---- {name}")
        results[name] = importlib.import_module(f"bench.{name}").main(argv[1:])
    if argv[0] == "all":
        print("---- all")
        for name, numbers in results.items():
            for key, value in numbers.items():
                print(f"  {name:<10} {key:<48} {value:.4g}" if isinstance(value, float) else f"  {name:<10} {key:<48} {value}")


if __name__ == "__main__":
    main()
