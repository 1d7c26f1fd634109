"""
What every script stands on: a device and a process group, a run folder, checkpoints.

There is no trainer that owns the loop: the loop is yours, these are its tools.

    config = flags(Config, argv, __doc__)      # common/flags.py
    env = start(config.device)                 # one process, or one of many under torchrun
    run = Run(f"runs/{config.name}", config, env, resume=config.resume, sources=[__file__])
    run.rewind(step)                           # once, at the start: the files end where the weights begin
    for step in ...:
        run.metrics(step, loss=loss)
        if run.stopping():                     # SIGTERM or Ctrl-C on any rank: all of them leave together
            run.save(step, write, state)
            run.bye(step)

Left out of the usual recipe: a checkpoint has no collectives and no "latest" pointer. Each rank
writes its own file under another name, syncs it and renames it, and a folder counts when every file
of it is there (common/files.py). So a kill at any instruction leaves either the old checkpoint or
the new one, and a rank that hangs can never drag the others into half a save.
"""
import atexit
import dataclasses
import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
import types
from datetime import date, timedelta
from importlib import metadata
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from common import cpu, machine
from common.files import (checkpoints, complete, discard, disk_error, drop_rows_after, jsonable, newest,
                          read_state, replace_folder, run_config, sweep, write_checkpoint, write_whole)
from common.flags import as_flag, die
from common.moved import moved
from common.watch import Watch

__getattr__ = moved(__name__)

# ------------------------------------------------------------------------------
# device and process group

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def start(device="auto", dtype="auto", threads=0, deterministic=None, begun=0):
    """
    -> where this process runs: rank, local_rank, world, master, device, dtype, deterministic,
    threads, pace (common/machine.py). begun: the threads of a run that is resumed, see threads_of_resumed
    """
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    kind = _kind(device)
    if dtype != "auto" and dtype not in DTYPES:
        die(f"--dtype is {dtype!r}: expected auto|{'|'.join(DTYPES)}")
    if dtype == "auto":
        dtype = "bf16" if kind == "cuda" else "fp32"
    deterministic = kind == "cpu" if deterministic is None else bool(deterministic)

    if kind == "cuda":
        _prepare_cuda(local_rank, deterministic)
    if kind == "cpu":
        # before the first thread: numbers below 1e-38 cost ten times the others
        torch.set_flush_denormal(True)
    follow = not deterministic or same_bits(kind, DTYPES[dtype])
    chosen = machine.use(machine.threads_for(threads, begun, kind, follow))
    # on a GPU a few operations have no deterministic form (cumsum of floats): warn there, do not stop
    mode = "warn" if kind == "cuda" else "error"
    # what use_deterministic_algorithms does, without the compiler, whose import takes a second
    torch.set_deterministic_debug_mode(mode if deterministic else "default")
    # a debugging aid that would fill every torch.empty
    torch.utils.deterministic.fill_uninitialized_memory = False

    place = torch.device("cuda", local_rank) if kind == "cuda" else torch.device(kind)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=timedelta(minutes=10),
                                device_id=place if kind == "cuda" else None)
        atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        if world > 1:
            Watch(rank, world).start()
    return types.SimpleNamespace(rank=rank, local_rank=local_rank, world=world, master=rank == 0,
                                 device=place, dtype=DTYPES[dtype], deterministic=deterministic,
                                 threads=chosen, pace=machine.Pace())


def same_bits(kind, dtype):
    """Does every number of threads give the same bits? oneDNN's fp32 products do, and so do our sums"""
    return kind == "cpu" and dtype == torch.float32 and cpu.ON and cpu.ONEDNN


def _kind(device):
    """auto -> the fastest kind that this torch sees; what it does not see is refused"""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(kind for kind in have if have[kind])
    if device not in have:
        die(f"--device is {device!r}: expected auto|cpu|cuda|mps")
    if not have[device]:
        die(f"--device is {device}, but this torch ({torch.__version__}) sees no {device} device: "
            "use --device cpu, or install another torch")
    return device


def _prepare_cuda(local_rank, deterministic):
    if local_rank >= torch.cuda.device_count():
        die(f"process {local_rank} of this node has no GPU: {torch.cuda.device_count()} seen; "
            "lower --nproc_per_node")
    if not torch.cuda.is_initialized() and "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
        # ragged batches fragment the pool
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(local_rank)
    torch.set_float32_matmul_precision("high")


# ------------------------------------------------------------------------------
# collectives: the identity where there is no group, so one process runs the same lines as eight

def _reduce(x, op):
    if not dist.is_initialized():
        return x
    place = "cuda" if dist.get_backend() == "nccl" else "cpu"
    if not torch.is_tensor(x):
        dtype = torch.int64 if isinstance(x, int) else torch.float64
        t = torch.tensor(x, device=place, dtype=dtype)
        dist.all_reduce(t, op)
        return t.item()
    t = x if x.device.type == place else x.to(place)
    dist.all_reduce(t, op)
    return x if t is x else x.copy_(t)


def all_sum(x):
    """the sum over ranks of a number, or of a tensor (in place, and returned)"""
    return _reduce(x, dist.ReduceOp.SUM)


def all_max(x):
    """the largest over ranks, elementwise in a tensor; otherwise as all_sum"""
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


def progress(total, desc, done=0):
    """a bar on stderr, of rank 0 only; a log file gets a line every half minute"""
    other_rank = int(os.environ.get("RANK", "0")) != 0
    seconds = 0.2 if sys.stderr.isatty() else 30
    return tqdm(total=total, desc=desc, initial=done, file=sys.stderr,
                disable=other_rank, mininterval=seconds, dynamic_ncols=True)


# ------------------------------------------------------------------------------
# how log.txt begins

def _git(*words):
    try:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, check=False,
                              text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _command(*extra):
    """the command line of this process as a user would type it"""
    words = [w for w in sys.orig_argv[1:] if w != "-u"]
    words = [w for w in words if w not in extra] + list(extra)
    if "RANK" not in os.environ:
        return shlex.join(["python", *words])
    world = int(os.environ["WORLD_SIZE"])
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    nodes = world // local
    many = [f"--nnodes={nodes}"] if nodes > 1 else []
    return shlex.join(["torchrun", *many, f"--nproc_per_node={local}", *words])


def _versions():
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("numpy", "triton"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "none"
    return ", ".join(f"{k} {v}" for k, v in found.items())


def _head(env, sources):
    """how log.txt begins: what a reader of an old log needs to make the run again"""
    commit = _git("rev-parse", "HEAD")
    dirty = _git("status", "--porcelain", "--untracked-files=no")
    on_gpu = env.device.type == "cuda"
    device = torch.cuda.get_device_name(env.device) if on_gpu else platform.machine()
    where = f"{env.device} ({device}), {env.world} processes, {env.dtype}, {torch.get_num_threads()} threads"
    lines = [f"versions: {_versions()}", f"device: {where}", f"command: {_command()}"]
    if commit:
        lines.append(f"commit: {commit}{' with uncommitted changes' if dirty else ''}")
    for source in map(Path, sources):
        lines.append(f"source of {source.name}:\n{source.read_text(encoding='utf-8')}")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------
# a run: its folder, its files, its checkpoints, its end

def resumed(config):
    """-> what config.json says of the run that this one resumes; {} for a new one, and where there is
    no run or a damaged one, which Run says"""
    return run_config(f"runs/{config.name}") if config.resume else {}


def with_date(config, tok, chats):
    """
    -> Config. A chat template may ask for today's date, as Llama 3.2's does. It gets the day on
    which the run began, which the config keeps: resumed tomorrow, the run asks the same.
    """
    if not (chats and tok.asks_date):
        if config.date:
            why = "its chat template asks for no date" if chats else "there are no chats"
            die(f"--date {config.date} has no effect: {why}")
        return config
    day = config.date or resumed(config).get("date", "")
    tok.date = broadcast(day or date.today().isoformat())
    return dataclasses.replace(config, date=tok.date)


def threads_of_resumed(config):
    """-> the threads of the run that this one resumes, which its config.json holds; 0: a new run"""
    count = resumed(config).get("threads", 0)
    return count if isinstance(count, int) and count > 0 else 0


def out_of_time(config, seconds):
    """-> why a run ends here, if its steps took --minutes so far; else "" """
    if config.minutes is None or seconds < 60 * config.minutes:
        return ""
    return f"--minutes {config.minutes:g} are over; with more of them --resume continues"


class Run:
    """
    runs/NAME: config.json, metrics.jsonl, samples.jsonl, log.txt, ckpt/step_N, best/step_N.
    Rank 0 writes, the others stay silent
    """

    def __init__(self, folder, config, env, resume=False, free=(), sources=()):
        """free: flags that a resumed run may change. sources: the files that log.txt begins with"""
        self.folder = Path(folder)
        self.ckpt = self.folder / "ckpt"
        self.env = env
        self.saved = None              # the step of the last checkpoint, if it is this run's state
        self.files = {}
        self.wandb = None
        self.signalled = False
        self.handlers = {}             # signal -> what handled it before
        problem = None
        if env.master:                 # the others wait for its verdict
            problem = self._refusal(config, resume, {"resume", *free})
            problem = problem or self._open(config, sources)
        problem = broadcast(problem)
        if problem:
            if env.master:
                die(problem)
            raise SystemExit(2)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._handle)

    def _refusal(self, config, resume, free):
        """what is wrong, in one line, before a single file is written; or None"""
        folder = self.folder
        if folder.exists() and not folder.is_dir():
            return f"{folder} is a file, not a run folder: choose another --name"
        if resume and not (folder / "config.json").exists():
            return (f"--resume: {folder} holds no run to continue: leave --resume out to start it, "
                    "or correct --name")
        # half a config.json is all that a process leaves which is killed at once: there is no run yet
        begun = folder.exists() and any(path.name != "config.json.tmp" for path in folder.iterdir())
        if not resume and begun:
            return f"{folder} exists already: continue it with --resume, or choose another --name"
        if getattr(config, "wandb", ""):
            try:
                import wandb  # noqa: F401
            except ImportError:
                return "--wandb is given, but the package is not installed: pip install wandb"
        return self._changed(config, free) if resume else None

    def _changed(self, config, free):
        """how the config that made this folder differs from the one given, in one line; or None"""
        path = self.folder / "config.json"
        fields = {f.name: f.default for f in dataclasses.fields(config)}
        try:
            old = json.loads(path.read_text())
        except ValueError:
            old = None
        if not isinstance(old, dict):
            return f"{path} is damaged: start again under another --name"
        unknown = [as_flag(name) for name in old if name not in fields]
        if unknown:
            return (f"--resume: {self.folder} was made by another version of this script, "
                    f"with {', '.join(unknown)}, which this one does not know. "
                    "Resume it with that version, or choose another --name")
        changed = []
        for name, default in fields.items():
            was = old.get(name, default)       # a field younger than the run counts as its default
            new = getattr(config, name)
            if name not in free and json.dumps(was, default=str) != json.dumps(new, default=str):
                changed.append(f"{as_flag(name)} was {was}, is {new}")
        if changed:
            return (f"--resume: {self.folder} was made with another config: {'; '.join(changed)}. "
                    "Give the old values, or another --name")
        return None

    def _open(self, config, sources):
        """makes the folder and its files; returns what is wrong with the disk, or None"""
        folder = self.folder
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        if "threads" in fields and self.env.world == 1 and self.env.device.type == "cpu":
            fields["threads"] = self.env.threads.most            # what a resume begins with
        text = json.dumps(fields, indent=1, default=str) + "\n"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "config.json", lambda f: f.write(text.encode()))
            self.ckpt.mkdir(exist_ok=True)
            sweep(folder)
            for name in ("metrics.jsonl", "samples.jsonl", "log.txt"):
                self._append(name)
        except OSError as e:
            return f"cannot write to {folder}: {e.strerror}; choose another --name or make room"
        if getattr(config, "wandb", ""):
            import wandb
            note = folder / "wandb_id.txt"     # so that --resume continues the same curves
            known = note.read_text().strip() if note.exists() else None
            self.wandb = wandb.init(project=config.wandb, name=folder.name, dir=folder, config=fields,
                                    resume="allow", id=known)
            note.write_text(self.wandb.id + "\n")
        self.files["log.txt"].write(_head(self.env, sources))
        return None

    # --- words and numbers

    def _append(self, name):
        # half a character, as a byte-level tokenizer may decode to, is written as its JSON escape
        self.files[name] = open(self.folder / name, "a", encoding="utf-8", errors="backslashreplace",
                                buffering=1)

    def log(self, text):
        if self.env.master:
            tqdm.write(text, file=sys.stdout)          # above a bar, if there is one
            sys.stdout.flush()
            self.files["log.txt"].write(text + "\n")

    def _rows(self, name, rows):
        if self.env.master:
            lines = [json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in rows]
            self.files[name].write("".join(lines))
            self.files[name].flush()           # a reader sees the step when it has happened

    def metrics(self, step, **numbers):
        self._rows("metrics.jsonl", [{"step": step, **numbers}])
        if self.wandb:
            self.wandb.log(jsonable(numbers), step=step)

    def samples(self, rows):
        self._rows("samples.jsonl", rows)

    def rewind(self, step):
        """
        forget what came after this step: rows, later checkpoints, a half-written last line.
        Every rank calls it
        """
        if self.env.master:
            for name in ("metrics.jsonl", "samples.jsonl"):
                self.files[name].close()
                drop_rows_after(step, self.folder / name)
                self._append(name)
            for later, path in checkpoints(self.folder):
                if later > step:
                    discard(path)
        barrier()      # no rank may save into a folder that is just being removed
        self.saved = step if complete(self.ckpt / f"step_{step}") else None

    # --- checkpoints

    def save(self, step, write, state, keep=2):
        """
        Every rank calls it; no rank waits for another. write(folder): rank 0's model files; state:
        this rank's own. Between two saves there must be a collective, as every training step has,
        so that ranks are never two saves apart.
        """
        if step == self.saved:             # the periodic save and the last one may fall on the same step
            return
        try:
            write_checkpoint(self.folder, step, self.env.rank, self.env.world, write, state)
        except Exception as e:
            reason, last = disk_error(e), newest(self.folder)
            if reason is None:
                raise
            then = (f"continue from step {last[1]} with --resume" if last
                    else "start again under another --name")
            die(f"could not write {self.ckpt}/step_{step}: {reason}. Nothing of it is left; make room, then "
                f"{then}")
        self.saved = step
        if self.env.master:
            whole = [path for _, path in checkpoints(self.folder) if complete(path)]
            # with a slower rank still writing, one more than `keep` waits for the next save
            for path in whole[:-keep]:
                discard(path)

    def keep_best(self, step, write):
        """
        write(folder) fills FOLDER/best/step_N, which no later checkpoint removes. The one kept
        before goes when this one is whole. Every rank calls it, and waits for rank 0.
        """
        if self.env.master:
            replace_folder(self.folder / "best", f"step_{step}", write)
        barrier()

    def latest(self):
        return newest(self.folder)

    def restore(self, model, optimizer):
        """
        the last checkpoint, in place; what was written after it is forgotten. -> every rank's state, or
        None where no checkpoint was written yet
        """
        found = self.latest()
        states = None
        if found:
            model.load_hf(found[0])
            states = self.load(found[0])
            optimizer.load_state_dict([state["optimizer"] for state in states])
        self.rewind(found[1] if found else -1)
        return states

    def load(self, path):
        """every rank's state, on the CPU, mapped and not read: a rank touches only what it needs"""
        path = Path(path)
        world = complete(path)
        if not world:
            die(f"{path} is not a complete checkpoint: its meta.json or a state file is missing")
        try:
            return [read_state(path / f"state_{r}_of_{world}.pt") for r in range(world)]
        except ValueError as e:
            die(e)

    # --- the end

    def _handle(self, signum, frame):
        if self.signalled and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signalled = True

    def log_machine(self):
        """on a CPU, once: what the times of this run depend on, and what its bits do not"""
        env = self.env
        if env.master and env.device.type == "cpu":
            self.log(machine.introduced(env, same_bits(env.device.type, env.dtype)))

    def pace(self, step, steps, numbers):
        """
        Once per step, on every rank: how long it takes here, and whether that has changed. The number
        of threads follows the cores that other processes leave free. numbers: those of the step
        """
        if self.env.device.type == "cpu":
            for line in machine.after_step(self.env, step, steps, numbers):
                self.log(line)

    def stopping(self):
        """once at the end of a step, on every rank: has any of them been told to stop?"""
        return bool(all_max(int(self.signalled)))

    def bye(self, step):
        self.log(f"stopped after step {step}. To continue: {_command('--resume')}")
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
