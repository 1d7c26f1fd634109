"""
Files that are whole or not there, and the checkpoint folders made of them.

    write_whole(path, fill)       # a kill or a power cut leaves the old file or the new one
    write_checkpoint(run_folder, step, rank, world, write, state)
    newest(run_folder)            # -> (path, step) of the last checkpoint that is whole, or None

A checkpoint is a folder RUN/ckpt/step_N: the model's files, one state file per rank, and meta.json,
which is written last and removed first, and says how many ranks there were. The folder counts when
meta.json and every rank's file are there, so nothing points at "the latest", and nothing can point
at half a checkpoint. A state is plain data: to read it never runs what is written in it.

common/run.py decides when one is written and what it says to the user. This file imports nothing
of ours.
"""
import json
import math
import os
import pickle
import re
import shutil
from pathlib import Path

import torch


# ------------------------------------------------------------------------------
# writing

def sync(path):
    """what was written to this file or folder is on the disk when this returns"""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path, fill):
    """write under another name, sync, rename, sync the folder: the file survives a power cut"""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as f:
        fill(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
    sync(path.parent)


def disk_error(e):
    """the system's reason if writing failed, else None; torch and safetensors wrap it"""
    while e is not None:
        if isinstance(e, OSError):
            return e.strerror or str(e)
        by_torch = "inline_container" in str(e) and not isinstance(e.__context__, OSError)
        if by_torch or "(os error " in str(e):             # the second: by safetensors
            return str(e)
        e = e.__cause__ or e.__context__
    return None


# ------------------------------------------------------------------------------
# checkpoint folders

def complete(folder):
    """the checkpoint's world size if every file of it is there, else 0; meta.json is written last"""
    try:
        world = json.loads((folder / "meta.json").read_text())["world"]
    except (OSError, ValueError, KeyError):
        return 0
    whole = all((folder / f"state_{r}_of_{world}.pt").exists() for r in range(world))
    return world if whole else 0


def checkpoints(run_folder):
    """(step, path) of all checkpoint folders, complete or not, oldest first"""
    paths = (Path(run_folder) / "ckpt").glob("step_*")
    found = [(re.fullmatch(r"step_(\d+)", path.name), path) for path in paths]
    return sorted((int(match[1]), path) for match, path in found if match)


def newest(run_folder):
    """(path, step) of a run's last complete checkpoint, or None"""
    whole = [(path, step) for step, path in checkpoints(run_folder) if complete(path)]
    return whole[-1] if whole else None


def run_config(run_folder):
    """-> what a run's config.json says; {} where there is none, or a damaged one"""
    try:
        said = json.loads(Path(run_folder, "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def ended_runs(config, free):
    """-> [(config.json, result.json)] of the ended runs that differ from this config in the flags `free`
    alone"""
    ours = json.loads(json.dumps({name: value for name, value in vars(config).items() if name not in free}))
    found = []
    for path in sorted(Path("runs").glob("*/result.json")):
        theirs = run_config(path.parent)
        if {name: theirs.get(name) for name in ours} == ours:
            found.append((theirs, json.loads(path.read_text())))
    return found


def discard(folder):
    """removes a checkpoint. The marker goes first: half a removal must not leave what counts as one"""
    (folder / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def sweep(run_folder, current=None):
    """removes what a crash left behind, except the checkpoint of the step that the ranks write now"""
    for step, path in checkpoints(run_folder):
        if step != current and not complete(path):
            discard(path)
    for aside in (run_folder / "ckpt").glob("*.tmp"):
        shutil.rmtree(aside, ignore_errors=True)


def write_checkpoint(run_folder, step, rank, world, write, state):
    """
    This rank's part of RUN/ckpt/step_N: rank 0's write(folder) makes the model's files, then comes
    every rank's state, then the marker that makes it a checkpoint. If it fails, the half-written folder
    goes and the others stay; a rank that is still writing here fails in its turn
    """
    final = run_folder / "ckpt" / f"step_{step}"
    aside = final.with_name(f"step_{step}.tmp")
    try:
        final.mkdir(parents=True, exist_ok=True)
        sync(final.parent)
        if rank == 0:
            sweep(run_folder, step)
            aside.mkdir()
            write(aside)
            for path in [p for p in aside.rglob("*") if p.is_file()]:
                sync(path)
            for path in aside.iterdir():
                os.replace(path, final / path.name)
            aside.rmdir()
        state = plain(state)
        write_whole(final / f"state_{rank}_of_{world}.pt", lambda f: torch.save(state, f))
        if rank == 0:
            meta = json.dumps({"step": step, "world": world})
            write_whole(final / "meta.json", lambda f: f.write(meta.encode()))
    except Exception:
        shutil.rmtree(aside, ignore_errors=True)
        discard(final)
        raise


def read_state(path):
    """a rank's state, on the CPU, mapped and not read: a rank touches only what it needs"""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors, numbers, strings and lists. Reading it would run code that is "
            "written in it, so it is not read: begin under another --name (--init takes the model alone)"
        ) from None
    except (RuntimeError, EOFError) as e:
        said = str(e).partition("\n")[0][:100]
        raise ValueError(f"{path} is damaged ({said}): remove {path.parent}, and --resume takes the "
                         "checkpoint before it") from None


def replace_folder(place, name, write):
    """write(folder) fills PLACE/NAME; what stood in PLACE before goes when that is whole"""
    final = place / name
    aside = place / f"{name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(aside, final)
    for older in place.iterdir():
        if older != final:
            shutil.rmtree(older)


# ------------------------------------------------------------------------------
# rows of JSON

def drop_rows_after(step, path):
    """forgets the rows of later steps, and the half-written last line of a killed process"""
    # bytes, because str.splitlines also splits at characters that JSON leaves in a row
    lines = path.read_bytes().splitlines()
    kept = [line + b"\n" for line in lines if _step(line) <= step]
    write_whole(path, lambda f: f.write(b"".join(kept)))


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):     # the half line of a killed process
        return math.inf


# ------------------------------------------------------------------------------
# what is written: plain data

def plain(x, where="state"):
    """
    A state as tensors, numbers, strings and what holds them: lists, tuples, dicts. What numpy made
    becomes Python's own. So a checkpoint can be read without running what is written in it.
    """
    if torch.is_tensor(x) or x is None:
        return x
    if hasattr(x, "tolist"):                   # an array of numpy, or a number
        return x.tolist()
    if type(x) in (bool, int, float, str):
        return x
    if isinstance(x, dict):
        return {plain(k, f"{where}, a key"): plain(v, f"{where}.{k}") for k, v in x.items()}
    if type(x) in (list, tuple):
        return type(x)(plain(v, f"{where}[{i}]") for i, v in enumerate(x))
    raise TypeError(f"{where} is a {type(x).__name__}: a checkpoint keeps tensors, numbers, strings, "
                    "lists and dicts; keep vars(it), and make it anew from them")


def jsonable(x):
    """JSON has no nan and no tensors: nan and inf become null"""
    if isinstance(x, dict):
        return {k: jsonable(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [jsonable(v) for v in x]
    if hasattr(x, "tolist"):           # numpy and torch, scalars too
        return jsonable(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x
