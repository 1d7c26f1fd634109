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
    parity    1,000 tokens sampled and trained, as it is and with --parity: how far their log-probs are
              apart, in which steps a row's bits follow the rows beside it, and what parity costs
    speedrun  ten steps of the 100M pretraining: tokens per second, mfu
"""
import json
import os
import re
import shlex
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

TESTS = "-m pytest -q -m gpu -k 'not parity' tests/test_gpu.py"          # which is a part of its own
PARTS = {                                # seconds at most; the command, and the tiny one
    "tests": (150, TESTS, TESTS),
    "decode": (120, "-m bench rollout --parts f --repeats 1", "-m bench rollout --parts f"),
    "kernels": (120, "-m bench kernels --repeats 3 --no-compile", "kernels.py"),
    "step": (120, "-m bench gpu --part step", "-m bench gpu --part step --tiny"),
    "offload": (90, "-m bench gpu --part offload", "-m bench gpu --part offload --tiny"),
    "parity": (120, "-m bench gpu --part parity", "-m bench gpu --part parity --tiny"),
    "speedrun": (90, "-m bench gpu --part speedrun", "-m bench gpu --part speedrun --tiny"),
}


@dataclass
class Config:
    minutes: float = 7.0                 # of all parts; one that would begin later is left for the next call
    out: str = "runs/gpu"                # the folder of gpu.json and gpu.md, and of what the parts write
    tiny: bool = False                   # tiny shapes, any device
    part: Literal["", "step", "offload", "parity", "speedrun"] = ""  # one, in this process


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


def both(config):
    """As it is and with --parity, each in a process of its own: cuBLAS reads its switches once."""
    found = {}
    for name, on in (("as it is", False), ("with parity", True)):
        code = f"from bench.gpu import sides; sides({on}, {config.tiny})"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        if not torch.cuda.is_available():
            env["TRITON_INTERPRET"] = "1"
        done = subprocess.run([sys.executable, "-c", code], env=env, check=True, stdout=subprocess.PIPE,
                              text=True)
        print(done.stdout)
        found[name] = json.loads(done.stdout.splitlines()[-1])
    price = {f"price of {what}": found["with parity"][what] / found["as it is"][what]
             for what in ("a decode step", "an update")}
    return found | price


def sides(on, tiny):
    """Prints what sampler and trainer say of the same tokens, and the milliseconds of each."""
    import kernels
    from bench.rollout import LARGE
    from common import cpu, parity
    from rollout import Sampler
    from train_gpt import GPT, GPTConfig
    on_gpu = torch.cuda.is_available()
    shape = GPTConfig(61, 1, 2, 1, 16, 32, 32, 256, 1e4) if tiny else LARGE["0.6B"][0]
    rows = (1, 2) if tiny else parity.ROWS
    cpu.ON = False                       # on a CPU, a rehearsal: its stand-ins run in the sampler alone
    parity.prepare(on)
    torch.manual_seed(0)
    model = GPT(shape).to("cuda" if on_gpu else "cpu", torch.bfloat16 if on_gpu else torch.float32)
    with torch.no_grad():                                # init_weights leaves a block the identity
        for p in model.parameters():
            p.normal_(std=p.shape[1] ** -0.5) if p.ndim == 2 else p.fill_(1.0)
    if on:
        parity.use(model, kernels)
        print(parity.FOUND)
    with torch.inference_mode():
        unlike = parity.trial(model, kernels, rows)

    count, n, max_new = (1, 2, 2) if tiny else (8, 4, 32)
    prompts = [[(7 * i + j * j) % 61 for j in range(3 + 37 * i)] for i in range(count)]
    sampler = Sampler(model, (), slots=count * n - 1, max_len=512 if on_gpu else 64, paged=True)
    sampler.generate(prompts, n, max_new, temperature=0.8)           # captures and compiles
    begin = sampler.steps_done
    start = now()
    groups = sampler.generate(prompts, n, max_new, temperature=0.8, seed=1)
    decode_ms = (now() - start) * 1e3 / (sampler.steps_done - begin)
    apart, update_ms = trained(model, groups)
    print(json.dumps({"unlike": unlike, "tokens": len(apart), "not equal": int((apart != 0).sum()),
                      "largest": float(apart.max()), "a decode step": decode_ms, "an update": update_ms}))


def trained(model, groups):
    """-> sampled less trained log-probs of these groups, and milliseconds of forward and backward"""
    import pack
    from kernels import linear_logprob
    apart = []
    for turn in range(2):                                            # the first compiles
        start = now()
        for batch in pack.batches(groups, 1024, model.config, share=True):
            batch = batch.to(model.head_weight.device)
            hidden_ND = batch.hidden(model)
            logp_N, _ = linear_logprob(hidden_ND, model.head_weight, batch.targets_N, 0.8)
            logp_N.sum().backward()
            if turn:
                apart.append((logp_N.detach() - batch.sampler_logp_N).abs())
    return torch.cat(apart), (now() - start) * 1e3


def now():
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def speedrun(config):
    import train_gpt
    size = "--preset mixed100m --eval-docs 64"
    if config.tiny:
        size = "--preset small --batch 4 --eval-docs 4"
    train_gpt.main(f"{size} --steps 10 --name hundred --eval-every 1000 --save-every 1000".split())
    lines = Path("runs/hundred/metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return {k: last[k] for k in ("tokens_per_second", "mfu", "t_train", "t_opt", "loss") if k in last}


def one_part(config):
    Path(config.out).mkdir(parents=True, exist_ok=True)
    os.chdir(config.out)
    shutil.rmtree("runs", ignore_errors=True)            # of a call that failed
    made = {"step": step, "parity": both, "speedrun": speedrun,
            "offload": lambda config: step(config, "--offload")}
    return finish(config.part, **made[config.part](config))


# -----------------------------------------------------------------------------
# all of them


def run(name, command, limit, out):
    """-> {ok, seconds, numbers or what it said last}"""
    argv = [sys.executable, *shlex.split(command)]
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
