"""
python -m bench gpu: everything that only a GPU can tell, in the order of what is worth most. Each part is
a process of its own with a limit of its own, so that one failure loses nothing.

    python -m bench gpu --minutes 7      writes OUT/gpu.json and OUT/gpu.md after every part
    python -m bench gpu --minutes 7      again: what is missing or failed; what is there is kept
    python -m bench gpu --tiny           the same on tiny shapes, on a CPU too: a rehearsal of this script

    tests     pytest -m gpu: every kernel against its twin, graphs, waits, memory
    decode    a decode step against the roofline (bench rollout --parts f)
    kernels   log-probs, attention and small kernels against torch and Liger (bench kernels)
    step      GRPO steps of a 0.6B shape: seconds by stage, its peak of memory beside --dry-run's
    offload   the same with --offload: what the way to the host costs
    product   has a row of a product the same bits whatever else is in the batch? Twice, as it is and
              without room for split-K, and what that costs: the question before any promise of parity
    speedrun  ten steps of the 100M pretraining: tokens per second, mfu
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bench import ROOT, finish
from common.files import write_whole
from common.flags import flags

PARTS = {                                # seconds at most; the command, and the tiny one
    "tests": (150, "-m pytest -q -m gpu tests/test_gpu.py", "-m pytest -q -m gpu tests/test_gpu.py"),
    "decode": (120, "-m bench rollout --parts f --repeats 1", "-m bench rollout --parts f"),
    "kernels": (120, "-m bench kernels --repeats 3 --no-compile", "kernels.py"),
    "step": (120, "-m bench gpu --part step", "-m bench gpu --part step --tiny"),
    "offload": (90, "-m bench gpu --part offload", "-m bench gpu --part offload --tiny"),
    "product": (60, "-m bench gpu --part product", "-m bench gpu --part product --tiny"),
    "speedrun": (90, "-m bench gpu --part speedrun", "-m bench gpu --part speedrun --tiny"),
}
# no room for split-K, which adds in another order for few rows than for many; read at the first CUDA call
ONE_ORDER = {"CUBLAS_WORKSPACE_CONFIG": ":16:8", "CUBLASLT_WORKSPACE_SIZE": "1"}
ROWS = (1, 2, 3, 8, 17, 64, 300, 4096)


@dataclass
class Config:
    minutes: float = 7.0                 # of all parts; one that would begin later is left for the next call
    out: str = "runs/gpu"                # the folder of gpu.json and gpu.md, and of what the parts write
    tiny: bool = False                   # tiny shapes, any device
    part: Literal["", "step", "offload", "product", "speedrun"] = ""  # one, in this process


# -----------------------------------------------------------------------------
# the parts that are no benchmark of their own


def folder_of(tiny):
    """A random model of the 0.6B shape with a small tokenizer, made once."""
    import data
    from bench.rollout import LARGE, SHAPES
    from train_gpt import GPT
    folder = Path("gpu_tiny" if tiny else "gpu_0.6B")
    if not folder.exists():
        shape = SHAPES["4M"] if tiny else LARGE["0.6B"][0]
        model = GPT(shape).init_weights(0)
        model.to(torch.float32 if tiny else torch.bfloat16).save_hf(folder, data.tokenizer("numbers"))
    return folder


def step(config, words=""):
    """Three GRPO steps; the first one warms up."""
    import nanorl
    name = "offload" if words else "step"
    size = "--prompts 2 --n 2 --max-new 8 --row-tokens 256" if config.tiny else (
        "--prompts 32 --n 16 --max-new 512 --row-tokens 16384")
    nanorl.main(f"""--init {folder_of(config.tiny)} --task countdown {size} {words} --steps 3
                    --eval-every 0 --eval-n 1 --eval-k 2 --final-n 1 --workers 2 --name {name}
                    --lr 1e-6 --entropy-coef 1e-4""".split())
    rows = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    log = Path("runs", name, "log.txt").read_text()
    memory = re.search(r"memory: ([\d.]+) GB at the peak, ([\d.]+) by --dry-run", log)
    seconds = {k: v for k, v in rows[-1].items() if k.startswith("t_") or k.endswith("_tok_s")}
    peak = dict(peak_gb=float(memory[1]), dry_run_gb=float(memory[2])) if memory else {}
    return seconds | peak


def product(config):
    """Both ways, each in a process of its own."""
    found = {}
    for name, more in (("as it is", {}), ("one order", ONE_ORDER)):
        code = f"from bench.gpu import rows_alike; rows_alike({config.tiny})"
        env = {**os.environ, "PYTHONPATH": str(ROOT), **more}
        done = subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.PIPE,
                              text=True)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    slower = [b / a for a, b in zip(found["as it is"]["ms"], found["one order"]["ms"])]
    return {name: dict(unlike=part["unlike"]) for name, part in found.items()} | dict(
        price_of_one_row=slower[0], price_of_4096=slower[-1])


def rows_alike(tiny):
    """Prints for how many (matrix, rows) row 0 has other bits than alone, and milliseconds by rows."""
    from bench.rollout import LARGE, SHAPES
    device = "cuda" if torch.cuda.is_available() else "cpu"
    c = SHAPES["4M"] if tiny else LARGE["0.6B"][0]
    if device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    heads = c.n_head * c.head_dim
    shapes = [(heads + 2 * c.n_kv_head * c.head_dim, c.d_model), (c.d_model, heads), (2 * c.d_ff, c.d_model),
              (c.d_model, c.d_ff), (c.vocab_size, c.d_model)]
    torch.manual_seed(0)
    rows = ROWS[:4] if tiny else ROWS
    unlike = []
    ms = [0.0] * len(rows)
    for N, K in shapes:
        w = torch.randn(N, K, device=device, dtype=torch.bfloat16) * K**-0.5
        x = torch.randn(rows[-1], K, device=device, dtype=torch.bfloat16)
        alone = x[:1] @ w.t()
        for i, M in enumerate(rows):
            y = x[:M] @ w.t()
            if not torch.equal(y[:1], alone):
                unlike.append([N, K, M])
            if device == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                x[:M] @ w.t()
            if device == "cuda":
                torch.cuda.synchronize()
            ms[i] += (time.perf_counter() - start) * 100
    print(json.dumps(dict(unlike=unlike, ms=ms)))


def speedrun(config):
    import train_gpt
    size = "--preset mixed100m --steps 10"
    if config.tiny:
        size = "--preset small --steps 2 --batch 4 --eval-docs 4"
    train_gpt.main(f"{size} --name hundred --eval-every 1000 --save-every 1000".split())
    lines = Path("runs/hundred/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return {k: last[k] for k in ("tokens_per_second", "mfu", "t_train", "t_opt", "loss") if k in last}


def one_part(config):
    Path(config.out).mkdir(parents=True, exist_ok=True)
    os.chdir(config.out)
    shutil.rmtree("runs", ignore_errors=True)            # of a call that failed
    made = {"step": step, "product": product, "speedrun": speedrun,
            "offload": lambda config: step(config, "--offload")}
    return finish(config.part, **made[config.part](config))


# -----------------------------------------------------------------------------
# all of them


def run(name, command, limit, out):
    """-> {ok, seconds, numbers or what it said last}"""
    argv = [sys.executable, *command.split()]
    if "bench gpu" in command:
        argv += ["--out", str(out / name)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = time.monotonic()
    with open(out / f"{name}.log", "w") as log:
        process = subprocess.Popen(argv, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)   # with what it started
    text = (out / f"{name}.log").read_text().strip() or "nothing was printed"
    last = text.splitlines()[-1]
    found = dict(ok=code == 0, seconds=round(time.monotonic() - start, 1), ended=code, said=last[-300:])
    if code == 0 and last.startswith("{"):
        found["numbers"] = json.loads(last)
    return found


def page(results, device):
    """-> a Markdown table."""
    from bench.__main__ import flat
    lines = [f"# {device}, torch {torch.__version__}", "", "| part | number | value |", "|---|---|---|"]
    for name, found in results.items():
        lines.append(f"| {name} | {'ended' if found['ok'] else 'failed'} | {found['seconds']} s |")
        numbers = list(flat(found.get("numbers", {})))
        if not numbers:
            said = found["said"].replace("|", "/") if found["ok"] else f"{found['ended']}: {name}.log"
            lines.append(f"| {name} | said | {said} |")
        lines += [f"| {name} | {key} | {value:.4g} |" for key, value in numbers]
    return "\n".join(lines) + "\n"


def main(argv=None):
    config = flags(Config, argv, __doc__)
    if config.part:
        return one_part(config)
    out = Path(config.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    path = out / "gpu.json"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    results = json.loads(path.read_text()) if path.exists() else {}
    end = time.monotonic() + 60 * config.minutes
    for name, (limit, command, tiny_command) in PARTS.items():
        if results.get(name, {}).get("ok"):
            print(f"{name}: there already", flush=True)
            continue
        left = end - time.monotonic()
        if left < 5:
            print(f"{name}: no time left, for the next call", flush=True)
            continue
        chosen = tiny_command if config.tiny else command
        results[name] = run(name, chosen, min(limit, left), out)
        text = json.dumps(results, indent=1)
        write_whole(path, lambda f, text=text: f.write(text.encode()))
        (out / "gpu.md").write_text(page(results, device))
        print(f"{name}: {results[name]['ended']} after {results[name]['seconds']} s", flush=True)
    print(f"wrote {path} and gpu.md")
    return finish("gpu", **{name: found["ok"] for name, found in results.items()})


if __name__ == "__main__":
    main()
