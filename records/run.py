"""
records/run.py: makes the log of a record attempt, old and new alternating, a run of each for every seed.

    python records/run.py --track laptop --out records/laptop/mine.jsonl
    python records/run.py --track laptop --out records/laptop/mine.jsonl --old ../record
    python records/run.py --track 1gpu --start Qwen2.5-0.5B-Instruct --seeds 2 --out records/1gpu/mine.jsonl

The first line is for the first record of a track, the second runs beside a checkout of the record,
the third is of a track that begins with a model: a folder, whose weights' sha256 goes into the log.

What a side runs stands in its own checkout, in records/TRACK/commands.txt: one script and its
flags per line, SEED for the seed, START for the model to begin with, the model that counts in the
run named last. A line may begin with torchrun and its own flags, up to "--". The clock is the
sum of the seconds by stage in the runs' metrics.jsonl, so that installation, start-up, evaluation
and saving are outside. The judge, for both sides, is this checkout's evaluate.py.

Finished runs are not repeated: the same command goes on where it was stopped.
"""
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import verify  # noqa: E402  (both are scripts of this folder; ours come from one floor up)

from common.flags import die, flags  # noqa: E402
from common.machine import gflops  # noqa: E402


@dataclass
class Config:
    out: str                             # the log, one JSON line a run
    track: str = "laptop"                # laptop, 1gpu or 8gpu
    old: str = ""                        # a checkout of the record to beat
    start: str = ""                      # the folder of the model that 1gpu and 8gpu begin with
    seeds: int = 5                       # runs of each side
    gpus: int = 0                        # ranks under torchrun; 0: one process


def seconds_of(folder):
    """-> {stage: seconds} of a run, from its metrics."""
    found = dict.fromkeys(verify.STAGES, 0.0)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "t_rollout" not in row:                               # pretraining has no rollout
            found["pretraining"] += sum(row.get(key, 0.0) for key in ("t_pack", "t_train", "t_opt"))
            continue
        for stage in ("rollout", "reward", "pack", "idle"):
            found[stage] += row[f"t_{stage}"]
        found["update"] += row["t_train"] + row["t_opt"]
    return found


def call(words, cwd, checkout):
    env = {**os.environ, "PYTHONPATH": str(checkout)}
    done = subprocess.run([sys.executable, *words], cwd=cwd, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        die(f"{' '.join(words)} ended with {done.returncode}; the same "
            "command goes on with the runs that are left")
    return done.stdout


def attempt(config, checkout, seed):
    """One run of one side. -> (commands, seconds, {accuracy and its standard error})"""
    track = verify.TRACKS[config.track]
    path = checkout / "records" / config.track / "commands.txt"
    if not path.is_file():
        die(f"{path} is not there: one script and its flags a line")
    commands = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    with tempfile.TemporaryDirectory() as folder:
        seconds = dict.fromkeys(verify.STAGES, 0.0)
        for command in commands:
            words = command.replace("SEED", str(seed)).split()
            words = [config.start if word == "START" else word for word in words]
            launch = ["--standalone", f"--nproc_per_node={config.gpus}", "--"] if config.gpus else []
            if words[0] == "torchrun":
                end = words.index("--") + 1
                launch, words = words[1:end], words[end:]
            if launch:
                launch = ["-m", "torch.distributed.run", *launch]
            script, *rest = words
            call([*launch, str(checkout / script), *rest], folder, checkout)
            run = Path(folder, "runs", rest[rest.index("--name") + 1])
            seconds = {stage: seconds[stage] + s for stage, s in seconds_of(run).items()}
        said = call([str(HERE.parent / "evaluate.py"), "--model", str(run), "--task", track["task"],
                     "--n", str(track["n"]), "--k", str(track["k"]), "--max-new", str(track["max_new"])],
                    folder, HERE.parent)
        found = json.loads(said.splitlines()[-1])
        return (commands, {k: round(s, 2) for k, s in seconds.items()},
                {"accuracy": found["avg"], "se": found["avg_se"]})


def weights(folder):
    """-> which model this is: its folder's name, and the sha256 of its weights."""
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        die(f"--start {folder}: no folder with *.safetensors in it")
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as f:
            while block := f.read(1 << 20):
                digest.update(block)
    return {"name": Path(folder).resolve().name, "sha256": digest.hexdigest()}


def git(checkout):
    """-> the commit, marked where files differ from it."""
    def say(*words):
        return subprocess.run(["git", *words], cwd=checkout, capture_output=True, text=True).stdout.strip()

    return ((say("rev-parse", "HEAD") or "no git")
            + " and changes" * bool(say("status", "--porcelain", "--untracked-files=no")))


def machine():
    import torch
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{cores} cores of {names[0] if names else platform.processor() or platform.machine()}"


def main(argv=None):
    config = flags(Config, argv, __doc__)
    if config.track not in verify.TRACKS:
        die(f"--track {config.track!r}: one of {', '.join(verify.TRACKS)}")
    begins = verify.TRACKS[config.track]["start"]
    if bool(begins) != bool(config.start):
        die(f"--track {config.track} begins with {begins or 'random weights'}: "
            + (f"give --start, the folder of {begins}" if begins else "leave --start out"))
    config.start = str(Path(config.start).resolve()) if begins else ""
    start = {"start": weights(config.start)} if begins else {}
    sides = {"old": Path(config.old).resolve()} if config.old else {}
    sides["new"] = HERE.parent
    out, track = Path(config.out), verify.TRACKS[config.track]
    done = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    out.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(config.seeds):
        for side, checkout in sides.items():
            if any((run["side"], run["seed"]) == (side, seed) for run in done):
                continue
            begin = time.time()
            commands, seconds, judged = attempt(config, checkout, seed)
            row = dict(track=config.track, side=side, seed=seed, started=begin,
                       machine=machine(), gflops=round(gflops(), 1), commit=git(checkout), commands=commands,
                       seconds=seconds, problems=verify.problems_of(config.track),
                       **{key: track[key] for key in ("n", "k", "max_new")}, **judged, **start)
            with open(out, "a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"{side}, seed {seed}: {sum(seconds.values()):.1f} s, {judged['accuracy']:.1%}", flush=True)


if __name__ == "__main__":
    main()
