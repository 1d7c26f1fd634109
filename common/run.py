"""
The ground every script stands on: flags from a Config, a device and a process group, a run folder, checkpoints.

A script's flags are the fields of one flat dataclass at its top; the comment beside a field is its help. There is no
argparse parser to keep in step with it, no YAML, no trainer that owns the loop: the loop is yours, these are its tools.

    config = flags(Config, argv, __doc__)             # --batch-size 8, --no-compile, --help
    env = start(config.device)                        # one process, or one of many under torchrun: the same code
    run = Run(f"runs/{config.name}", config, env, resume=config.resume, free=("steps",), sources=[__file__])
    run.rewind(step)                                  # once, before the first step: the files end where the weights begin
    for step in ...:
        run.metrics(step, loss=loss)
        if run.stopping():                            # SIGTERM or Ctrl-C on any rank: all of them leave together
            run.save(step, write, state)
            run.bye(step)

Deleted from the usual recipe: a checkpoint has no collectives and no "latest" pointer. Each rank writes its own file
aside, syncs it and renames it, and a folder counts when every file of it is there. So a kill at any instruction leaves
either the old checkpoint or the new one, and a rank that hangs can never drag the others into half a save.
"""
import ast
import atexit
import contextlib
import dataclasses
import difflib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import tokenize
import types
import typing
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm


def die(message):
    """the end of every bad input: one line that says what is wrong, where, and what to do"""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


# ---------------------------------------------------------------------------------------------------------------------
# flags: a dataclass is the parser

def _comments(Config):
    """field -> the comment at the end of its line, read from the class's own source"""
    try:
        source = textwrap.dedent(inspect.getsource(Config))
    except (OSError, TypeError):       # a class typed into a prompt has no source: flags without help texts
        return {}
    on_line = {t.start[0]: t.string.lstrip("# ") for t in tokenize.generate_tokens(io.StringIO(source).readline)
               if t.type == tokenize.COMMENT}
    fields = [node for node in ast.parse(source).body[0].body if isinstance(node, ast.AnnAssign)]
    return {node.target.id: on_line.get(node.end_lineno, "") for node in fields}


def _kinds(hint):
    """int | None -> ([int], True)"""
    members = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return [m for m in members if m is not type(None)], type(None) in members


def _expected(kinds, optional):
    words = [str(c) for k in kinds for c in (typing.get_args(k) or (k.__name__,))]
    return "|".join(words + ["none"] * optional)


def _value(flag, text, hint, default, signed):
    kinds, optional = _kinds(hint)
    if optional and text.lower() == "none":
        return None
    for kind in kinds:
        if typing.get_origin(kind) is typing.Literal:
            for choice in typing.get_args(kind):
                if text == str(choice):
                    return choice
        elif kind is str:
            return text
        else:
            try:
                number = float(text)
                # 1e6 is a fine way to write an int, 1.5 is not; big ints must not pass through a float
                value = number if kind is float else int(number) if number.is_integer() and "e" in text.lower() else int(text)
            except (ValueError, OverflowError):
                continue
            if not math.isfinite(value) and value != default:
                die(f"--{flag} is {text}: must be a finite number")
            if value < 0 and not signed and (default is None or default is dataclasses.MISSING or default >= 0):
                die(f"--{flag} is {text}: must be 0 or more")
            return value
    near = difflib.get_close_matches(text, _expected(kinds, optional).split("|"), 1)
    die(f"--{flag} is {text!r}: expected {_expected(kinds, optional)}" + (f" (did you mean {near[0]}?)" if near else ""))


def _help(doc, rows):
    print((doc or "").strip() + "\n\nflags:" if doc else "flags:")
    left, middle = (max(len(row[i]) for row in rows) for i in (0, 1))
    for row in rows:
        print(f"  {row[0]:<{left}}  {row[1]:<{middle}}  {row[2]}".rstrip())
    raise SystemExit(0)


def flags(Config, argv=None, doc=""):
    """
    argv -> Config. Negative numbers are refused where the default is not negative (a step count, a rate, a size), unless
    the field's comment says "may be negative". nan and inf are refused too, except where inf is the default.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    hints, comments = typing.get_type_hints(Config), _comments(Config)
    fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(Config)}
    switches = {flag for flag, f in fields.items() if bool in _kinds(hints[f.name])[0]}
    names = [*fields, *(f"no-{flag}" for flag in switches), "help"]
    values = {}
    while argv:
        word = argv.pop(0)
        if word in ("--help", "-h"):
            _help(doc, [(f"--{flag}, --no-{flag}" if flag in switches else f"--{flag} {_expected(*_kinds(hints[f.name]))}",
                         "(required)" if f.default is dataclasses.MISSING else f"({f.default})" if f.default != "" else '("")',
                         comments.get(f.name, "")) for flag, f in fields.items()])
        if not word.startswith("--"):
            die(f"{word!r} is not a flag: everything is given as --flag value (--help lists them)")
        flag, given, text = word[2:].partition("=")
        off = flag not in fields and flag.startswith("no-") and flag[3:] in switches
        if flag in switches or off:
            if given:
                die(f"--{flag} takes no value: say --{flag.removeprefix('no-')} or --no-{flag.removeprefix('no-')}")
            values[fields[flag[3:] if off else flag].name] = not off
            continue
        if flag not in fields:
            near = difflib.get_close_matches(flag.replace("_", "-"), names, 1, cutoff=0.4)
            die(f"--{flag} is no flag of this script" + (f"; did you mean --{near[0]}?" if near else "") + " (--help lists them)")
        field = fields[flag]
        if not given:
            if not argv or argv[0].startswith("--"):
                die(f"--{flag} needs a value: {_expected(*_kinds(hints[field.name]))}")
            text = argv.pop(0)
        signed = "may be negative" in comments.get(field.name, "")
        values[field.name] = _value(flag, text, hints[field.name], field.default, signed)
    for flag, f in fields.items():
        if f.default is dataclasses.MISSING and f.name not in values:
            die(f"--{flag} is required: {comments.get(f.name) or _expected(*_kinds(hints[f.name]))}")
    return Config(**values)


def positive(config, names):
    """refuses the first of these flags that is below 1"""
    for name in names.split():
        if getattr(config, name) < 1:
            die(f"--{name.replace('_', '-')} is {getattr(config, name)}: give at least 1")


# ---------------------------------------------------------------------------------------------------------------------
# device and process group

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def start(device="auto", dtype="auto", threads=0, deterministic=None):
    """where this process runs: SimpleNamespace(rank, local_rank, world, master, device, dtype, deterministic)"""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kind = next(k for k in have if have[k]) if device == "auto" else device
    if kind not in have:
        die(f"--device is {device!r}: expected auto|cpu|cuda|mps")
    if not have[kind]:
        die(f"--device is {kind}, but this torch ({torch.__version__}) sees no {kind} device: use --device cpu, or install another torch")
    if dtype != "auto" and dtype not in DTYPES:
        die(f"--dtype is {dtype!r}: expected auto|{'|'.join(DTYPES)}")
    deterministic = kind == "cpu" if deterministic is None else bool(deterministic)

    if kind == "cuda":
        if local_rank >= torch.cuda.device_count():
            die(f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} seen; lower --nproc_per_node")
        if not torch.cuda.is_initialized() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
            os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")    # ragged batches fragment the pool
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(local_rank)
        torch.set_float32_matmul_precision("high")
    if kind == "cpu":
        torch.set_flush_denormal(True)                           # before the first thread: numbers below 1e-38 cost ten times the others
    if threads:
        torch.set_num_threads(threads)
    elif kind == "cpu" and "RANK" in os.environ:
        # torchrun sets OMP_NUM_THREADS=1, which leaves cores idle when the ranks are fewer
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", world))))
    # on a GPU a few operations have no deterministic form (cumsum of floats): warn there, do not stop
    torch.use_deterministic_algorithms(deterministic, warn_only=kind == "cuda")
    torch.utils.deterministic.fill_uninitialized_memory = False    # a debugging aid that would fill every torch.empty

    place = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=10),
                                device_id=place if kind == "cuda" else None)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        if world > 1:
            _watch(rank, world)
    precision = DTYPES[dtype] if dtype != "auto" else torch.bfloat16 if kind == "cuda" else torch.float32
    return types.SimpleNamespace(rank=rank, local_rank=local_rank, world=world, master=rank == 0, device=place,
                                 dtype=precision, deterministic=deterministic)


GONE = 40.0                                            # seconds without a sign of life


def _watch(rank, world):
    """Every rank says each second that it lives, and at its end what ended it. One that raised, or is silent for GONE seconds, is named
    by the others, and they stop: a collective alone would let them wait for minutes and then blame the wire."""
    store = dist.distributed_c10d._get_default_store().clone()         # a connection of its own: the other may be busy waiting
    hook, leaving, limit, lost = sys.excepthook, threading.Event(), [GONE], threading.Event()

    def name(r, what):
        print(f"error: rank {r} {what}. The others stop; --resume goes on from the last checkpoint", file=sys.stderr, flush=True)

    def look():
        seen = {r: ("", time.monotonic()) for r in range(world) if r != rank}
        try:
            for beat in itertools.count():
                if leaving.wait(1.0):
                    return
                store.set(f"alive/{rank}", str(beat))
                for r, (old, since) in seen.items():
                    word = store.get(f"alive/{r}").decode() if store.check([f"alive/{r}"]) else ""
                    silent = time.monotonic() - since
                    if word != old:
                        seen[r] = word, time.monotonic()
                    elif word != "done" and silent > limit[0]:
                        word = f"died: no sign of life for {silent:.0f} s"
                    if word.startswith(("raised", "died")):
                        name(r, word)
                        os._exit(1)
        except RuntimeError:                           # rank 0 holds the store where torchrun does not, and may end first
            lost.set()

    def ended(kind, e, trace):
        if isinstance(e, RuntimeError) and re.search("connection|peer|gloo|nccl|socket|store", f"{kind} {e}", re.IGNORECASE):
            limit[0] = 5.0                             # another rank broke this one's collective: look closer, and name it
            thread.join(15.0)
            if lost.is_set():
                name(0, "died, and the store with it")
        else:
            leaving.set()
            thread.join(3.0)
            store.set(f"alive/{rank}", f"raised {kind.__name__}: {e}".splitlines()[0])
            time.sleep(2.5)                            # the store may be ours, and the others have to read this
        leaving.set()
        hook(kind, e, trace)

    def done():
        if not leaving.is_set() and not lost.is_set():
            leaving.set()
            thread.join(3.0)
            with contextlib.suppress(RuntimeError):
                store.set(f"alive/{rank}", "done")

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    sys.excepthook = ended
    atexit.register(done)


ONEDNN = torch.backends.mkldnn.is_available()
PRODUCT = torch.ops.mkldnn._linear_pointwise.default if ONEDNN else None         # the overload: to find it costs as much as an addition
FEW = 4                                                # rows of x: with fewer the BLAS starts sooner,
LARGE = 1 << 18                                        # which weighs less than how slowly it reads a w of so many numbers from memory
# numpy's BLAS multiplies one row up to twice as fast as both. Only where it was told to keep to one thread: its threads and torch's
# wait for work by spinning, each on the cores of the other, and a step takes ten times as long
ONE = os.environ.get("OPENBLAS_NUM_THREADS", os.environ.get("OMP_NUM_THREADS")) == "1"


def spare(rows, like):
    """How many rows to add so that oneDNN has met their number before. It compiles each product for its shape, which takes longer than
    the product, and the rows of ragged batches would be new at every step."""
    return -rows % 64 if ONEDNN and rows > 256 and like.is_cpu and like.dtype == torch.float32 else 0


def times(x, w):
    """x w^T. Two fp32 matrices on a CPU go to oneDNN: the BLAS that torch links takes its AVX2 path on AMD, and oneDNN is 1.3 to
    2.4 times as fast there. It also sums each row in the same order whatever the number of rows. No autograd: see kernels.linear."""
    if ONE and len(x) == 1 and x.is_cpu and x.dtype == w.dtype == torch.float32 and torch.is_inference_mode_enabled():
        return torch.from_numpy(x.numpy() @ w.detach().numpy().T)
    if ONEDNN and x.is_cpu and (len(x) >= FEW or w.numel() >= LARGE) and x.dtype == w.dtype == torch.float32:
        return PRODUCT(x, w, None, "none", [], "")
    return F.linear(x, w)


# ---------------------------------------------------------------------------------------------------------------------
# collectives: the identity where there is no group, so one process runs the same lines as eight

def _reduce(x, op):
    if not dist.is_initialized():
        return x
    place = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    if not torch.is_tensor(x):
        t = torch.tensor(x, device=place, dtype=torch.int64 if isinstance(x, int) else torch.float64)
        dist.all_reduce(t, op)
        return t.item()
    t = x if x.device.type == place.type else x.to(place)
    dist.all_reduce(t, op)
    return x if t is x else x.copy_(t)


def all_sum(x):
    """the sum over ranks of a number, or of a tensor (in place, and returned)"""
    return _reduce(x, dist.ReduceOp.SUM)


def all_max(x):
    """the largest over ranks of a number, or elementwise of a tensor (in place, and returned)"""
    return _reduce(x, dist.ReduceOp.MAX)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def gather(obj):
    """[the object of rank 0, of rank 1, ...], on every rank"""
    if not dist.is_initialized():
        return [obj]
    out = [None] * dist.get_world_size()
    dist.all_gather_object(out, obj)
    return out


def broadcast(obj, src=0):
    if not dist.is_initialized():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src)
    return box[0]


def progress(total, desc):
    """a bar on stderr, of rank 0 only; a log file that is no terminal gets a line every half minute"""
    return tqdm(total=total, desc=desc, file=sys.stderr, disable=int(os.environ.get("RANK", "0")) != 0, dynamic_ncols=True,
                mininterval=0.2 if sys.stderr.isatty() else 30)


# ---------------------------------------------------------------------------------------------------------------------
# files that are whole or not there

def _sync(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _put(path, fill):
    """write aside, sync, rename, sync the folder: after this line the file survives a power cut"""
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as f:
        fill(f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(aside, path)
    _sync(path.parent)


def _complete(folder):
    """the checkpoint's world size if every file of it is there, else 0; meta.json is the last file that rank 0 writes"""
    try:
        world = json.loads((folder / "meta.json").read_text())["world"]
    except (OSError, ValueError, KeyError):
        return 0
    return world if all((folder / f"state_{r}_of_{world}.pt").exists() for r in range(world)) else 0


def _steps(run_folder):
    """(step, path) of all checkpoint folders, complete or not, oldest first"""
    found = [(re.fullmatch(r"step_(\d+)", p.name), p) for p in (Path(run_folder) / "ckpt").glob("step_*")]
    return sorted((int(m[1]), p) for m, p in found if m)


def newest(run_folder):
    """(path, step) of a run's last complete checkpoint, or None: for those who read a run and do not own it"""
    return max(((p, step) for step, p in _steps(run_folder) if _complete(p)), key=lambda found: found[1], default=None)


def _disk_error(e):
    """the system's reason if writing failed, else None: torch and safetensors wrap it in errors of their own"""
    while e is not None:
        if isinstance(e, OSError):
            return e.strerror or str(e)
        if "(os error " in str(e) or ("inline_container" in str(e) and not isinstance(e.__context__, OSError)):
            return str(e)
        e = e.__cause__ or e.__context__
    return None


def _discard(folder):
    # the marker goes first: a folder killed in mid-removal must not count as a checkpoint
    (folder / "meta.json").unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _clean(x):
    """JSON has no nan and no tensors: nan and inf become null"""
    if isinstance(x, dict):
        return {k: _clean(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        return [_clean(v) for v in x]
    if hasattr(x, "tolist"):           # numpy and torch, scalars too
        return _clean(x.tolist())
    return None if isinstance(x, float) and not math.isfinite(x) else x


def _git(*words):
    try:
        done = subprocess.run(["git", *words], capture_output=True, check=False, text=True, cwd=Path(__file__).parent, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _command(*extra):
    """the command line of this process as a user would type it"""
    words = [w for w in sys.orig_argv[1:] if w != "-u"]
    words = [w for w in words if w not in extra] + list(extra)
    if "RANK" not in os.environ:
        return shlex.join(["python", *words])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    nodes = int(os.environ["WORLD_SIZE"]) // local
    return shlex.join(["torchrun", *[f"--nnodes={nodes}"] * (nodes > 1), f"--nproc_per_node={local}", *words])


def _versions():
    """one line: what a reader of an old log needs first"""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return ", ".join(f"{k} {v}" for k, v in found.items())


# ---------------------------------------------------------------------------------------------------------------------
# a run: its folder, its files, its checkpoints, its end

class Run:
    """runs/NAME: config.json, metrics.jsonl, samples.jsonl, log.txt, ckpt/step_N. Rank 0 writes, the others stay silent"""

    def __init__(self, folder, config, env, resume=False, free=(), sources=()):
        self.folder, self.env, self.saved, self.files, self.wandb = Path(folder), env, None, {}, None
        self.signalled, self.handlers = False, {}
        self.ckpt = self.folder / "ckpt"
        problem = broadcast(self._open(config, resume, {"resume", *free}, sources) if env.master else None)
        if problem:
            if env.master:
                die(problem)
            raise SystemExit(2)
        if threading.current_thread() is threading.main_thread():
            self.handlers = {s: signal.signal(s, self._handle) for s in (signal.SIGTERM, signal.SIGINT)}

    def _open(self, config, resume, free, sources):
        """returns what is wrong, before a single file is written"""
        folder, new = self.folder, {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        if folder.exists() and not folder.is_dir():
            return f"{folder} is a file, not a run folder: choose another --name"
        if resume and not (folder / "config.json").exists():
            return f"--resume: {folder} holds no run to go on with: leave --resume out to start it, or correct --name"
        if not resume and folder.exists() and any(folder.iterdir()):
            return f"{folder} exists already: go on with it by --resume, or choose another --name"
        if resume:
            try:
                old = json.loads((folder / "config.json").read_text())
            except ValueError:
                return f"{folder / 'config.json'} is damaged: start again under another --name"
            # a field younger than the run counts as its default then
            old = {f.name: old.get(f.name, f.default) for f in dataclasses.fields(config)}
            changed = [f"--{k.replace('_', '-')} was {old[k]}, is {new[k]}" for k in new
                       if k not in free and json.dumps(old[k], default=str) != json.dumps(new[k], default=str)]
            if changed:
                return f"--resume: {folder} was made with another config: {'; '.join(changed)}. Give the old values, or another --name"
        if getattr(config, "wandb", ""):
            try:
                import wandb
            except ImportError:
                return "--wandb is given, but the package is not installed: pip install wandb"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _put(folder / "config.json", lambda f: f.write(json.dumps(new, indent=1, default=str).encode() + b"\n"))
            self.ckpt.mkdir(exist_ok=True)
            self._sweep()
            for name in ("metrics.jsonl", "samples.jsonl", "log.txt"):
                self._append(name)
        except OSError as e:
            return f"cannot write to {folder}: {e.strerror}; choose another --name or make room"
        if getattr(config, "wandb", ""):
            note = folder / "wandb_id.txt"     # so that --resume goes on with the same curves
            self.wandb = wandb.init(project=config.wandb, name=folder.name, dir=folder, config=new, resume="allow",
                                    id=note.read_text().strip() if note.exists() else None)
            note.write_text(self.wandb.id + "\n")
        commit, dirty = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
        device = torch.cuda.get_device_name(self.env.device) if self.env.device.type == "cuda" else platform.machine()
        where = f"{self.env.device} ({device}), {self.env.world} processes, {self.env.dtype}, {torch.get_num_threads()} threads"
        head = [f"versions: {_versions()}", f"device: {where}", f"command: {_command()}"]
        if commit:
            head.append(f"commit: {commit}{' with uncommitted changes' if dirty else ''}")
        for source in sources:
            head.append(f"source of {Path(source).name}:\n{Path(source).read_text(encoding='utf-8')}")
        self.files["log.txt"].write("\n".join(head) + "\n")

    # --- words and numbers

    def _append(self, name):
        # half a character, as a byte-level tokenizer may decode to, is written as its JSON escape
        self.files[name] = open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace", buffering=1)

    def log(self, text):
        if self.env.master:
            tqdm.write(text, file=sys.stdout)          # above a bar, if there is one
            sys.stdout.flush()
            self.files["log.txt"].write(text + "\n")

    def _rows(self, name, rows):
        if self.env.master:
            self.files[name].write("".join(json.dumps(_clean(row), ensure_ascii=False) + "\n" for row in rows))
            self.files[name].flush()           # a reader sees the step when it has happened

    def metrics(self, step, **numbers):
        self._rows("metrics.jsonl", [{"step": step, **numbers}])
        if self.wandb:
            self.wandb.log(_clean(numbers), step=step)

    def samples(self, rows):
        self._rows("samples.jsonl", rows)

    def rewind(self, step):
        """forget what came after this step (rows, later checkpoints, a half-written last line). Every rank calls it"""
        if self.env.master:
            for name in ("metrics.jsonl", "samples.jsonl"):
                # bytes, because str.splitlines also splits at characters that JSON leaves inside a row
                kept = [line + b"\n" for line in (self.folder / name).read_bytes().splitlines() if _step(line) <= step]
                self.files[name].close()
                _put(self.folder / name, lambda f, kept=kept: f.write(b"".join(kept)))
                self._append(name)
            for later, path in _steps(self.folder):
                if later > step:
                    _discard(path)
        barrier()      # nobody may save into a folder that is just being removed
        self.saved = step if _complete(self.ckpt / f"step_{step}") else None

    # --- checkpoints

    def _sweep(self, current=None):
        """remove what a crash left behind; the folder being written now belongs to all ranks and stays"""
        for step, path in _steps(self.folder):
            if step != current and not _complete(path):
                _discard(path)
        for aside in self.ckpt.glob("*.tmp"):
            shutil.rmtree(aside, ignore_errors=True)

    def save(self, step, write, state, keep=2):
        """
        Every rank calls it; no rank waits for another. write(folder): rank 0's model files; state: this rank's own.
        It needs one collective somewhere between two saves, as every training step has, so that ranks are never two apart.
        """
        if step == self.saved:             # the periodic save and the last one may fall on the same step
            return
        final, aside = self.ckpt / f"step_{step}", self.ckpt / f"step_{step}.tmp"
        try:
            final.mkdir(parents=True, exist_ok=True)
            _sync(self.ckpt)
            if self.env.master:
                self._sweep(step)
                aside.mkdir()
                write(aside)
                for path in [p for p in aside.rglob("*") if p.is_file()]:
                    _sync(path)
                for path in aside.iterdir():
                    os.replace(path, final / path.name)
                aside.rmdir()
            _put(final / f"state_{self.env.rank}_of_{self.env.world}.pt", lambda f: torch.save(state, f))
            if self.env.master:
                meta = json.dumps({"step": step, "world": self.env.world})
                _put(final / "meta.json", lambda f: f.write(meta.encode()))
        except Exception as e:
            # the half-written folder goes, the checkpoints before it stay; a rank still writing here fails in its turn
            shutil.rmtree(aside, ignore_errors=True)
            _discard(final)
            reason, last = _disk_error(e), newest(self.folder)
            if reason is None:
                raise
            go_on = f"go on from step {last[1]} with --resume" if last else "start again under another --name"
            die(f"could not write {final}: {reason}. Nothing of it is left; make room, then {go_on}")
        self.saved = step
        if self.env.master:
            whole = [path for _, path in _steps(self.folder) if _complete(path)]
            for path in whole[:-keep]:     # with a slower rank still writing, one more than `keep` waits for the next save
                _discard(path)

    def latest(self):
        return newest(self.folder)

    def load(self, path):
        """every rank's state, on the CPU, mapped and not read: a rank touches only what it needs of the others"""
        path, world = Path(path), _complete(Path(path))
        if not world:
            die(f"{path} is not a complete checkpoint: its meta.json or a state file is missing")
        return [_load(path / f"state_{r}_of_{world}.pt") for r in range(world)]

    # --- the end

    def _handle(self, signum, frame):
        if self.signalled and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled = True

    def stopping(self):
        """once at the end of a step, on every rank: has any of them been told to stop?"""
        return bool(all_max(int(self.signalled)))

    def bye(self, step):
        self.log(f"stopped after step {step}. To go on: {_command('--resume')}")
        self.close()
        raise SystemExit(130)

    def close(self):
        for f in self.files.values():
            f.close()
        for s, handler in self.handlers.items():
            signal.signal(s, handler)
        if self.wandb:
            self.wandb.finish()
        self.files, self.handlers, self.wandb = {}, {}, None


def _step(line):
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):     # the half line of a killed process
        return math.inf


def _load(path):
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError:     # a state with objects of ours in it; a run folder is trusted like the code beside it
        return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
