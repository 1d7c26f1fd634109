"""
stages.py: what every loop is made of. Each stage is a function of `rl`, the state that they share.

    setup          a model, a task, a sampler, an optimizer; what a user got wrong is
                   reported here, before anything is written
    open_run       a run folder; with --resume, rl as the last checkpoint left it
    next_problems  the next problems of an endless list
    collect        n samples per problem, yielded group by group with their rewards
    advantage      (algos.py) fills the samples
    update         the gradient: packs the groups of all ranks, gives each rank its
                   share, back-propagates sums
    step           sums them over ranks; one division, clipping, the optimizer
    learn          all updates of a rollout: update and step, once per mini-batch and epoch
    evaluation     avg@k of the model as it is
    save           a checkpoint

A loop is these, top to bottom, as nanorl.py has them: read its main first. Left out of the usual
recipe: a trainer that owns the loop, and callbacks to get back into it.
"""

import math
from dataclasses import MISSING, dataclass, field, fields, replace

import numpy as np
import torch

import data
import kernels
import pack
import train_gpt
from algos import Algo, key, make_loss, weigh
from algos import advantage as advantage         # a stage too, so it can be had from here
from common import hf, memory, parity, view
from common.axes import with_algorithm
from common.deal import Feed
from common.entropy import covariant, entropy_bonus
from common.flags import check_run, check_sampling, die, positive, shares
from common.machine import Machine
from common.metrics import Clock, in_order, merge_stats, recent
from common.moved import moved
from common.offload import load_state, place_blocks, state_of
from common.optim import Optimizer
from common.reward import Rewards, check
from common.run import Run, gather, out_of_time, start, threads_of_resumed, with_date
from evaluate import evaluate, words
from kernels import linear_logprob
from rollout import Sample, Sampler, completion, prompt_ids
from train_gpt import GPT

# -----------------------------------------------------------------------------
# what a run is told, and what it knows


@dataclass
class Common(Machine):
    """every loop"""                     # device, threads and the like: common/machine.py
    name: str = "rl"                     # the run: everything it writes lies in runs/NAME
    init: str = "runs/base"    # a Hugging Face folder, or a run; missing bases are trained first
    task: str = "countdown"              # a task of data/; the word after a colon is its variant
    tokens: int = 0          # end after this many sampled tokens, if that comes first; 0: no limit
    prompts: int = 32                    # prompts per step, over all ranks
    max_new: int = 48  # tokens of a sample, at most; look at `truncated` before anything else
    top_p: float = 1.0                   # 1: off; below it, importance weights correct the truncation
    tis: float = 2.0                     # cap on the importance weight trainer / sampler; 0: no weight

    # ---- the optimizer
    lr: float = 2e-3                     # AdamW
    muon_lr: float = 0.0                 # Muon for the matrices of the blocks; 0: AdamW for all
    warmup: int = 5                      # steps of linear warm-up
    decay: float = 0.6                   # share of the steps, at the end, with linear decay to zero
    weight_decay: float = 0.0            # decoupled, matrices only
    clip: float = 1.0                    # global norm of the gradient; 0: no clipping

    # ---- the run
    slots: int = 0          # sequences that the sampler decodes at a time; 0: from the device
    workers: int = 2                     # reward processes of each rank
    save_every: int = 50                 # steps between checkpoints
    seed: int = 0                        # problems and samples
    parity: bool = False  # log-probs of sampler and trainer equal to the bit, on CUDA; slower

    # flags that some loops have, read here for all of them. Where a loop has none of that name, the
    # value below holds: an attribute without a type is no field of a dataclass, so no flag
    aggregate = "token"
    kl_coef = 0.0
    reference_at = "device"
    entropy_coef = 0.0
    entropy_target = 0.0
    cov = ""
    epochs = 1
    minibatch = 0
    stream = False
    dry_run = False
    eval_n = 0
    eval_k = 4
    final_n = 0


@dataclass
class Settings(Algo, Common):
    """For a loop without a command line: an idea, a bench, a test."""
    steps: int = 100                     # rollouts
    n: int = 8                           # samples per prompt
    problems: int = 8192                 # training problems, at most


def saved(default=MISSING, factory=MISSING):
    return field(default=default, default_factory=factory, metadata=dict(saved=True))


@dataclass
class RL:
    """What the stages share. Fields that are `saved` are in a checkpoint."""
    config: object                       # with the row of --algo filled in
    env: object                          # rank, world, device, dtype
    model: GPT
    tok: object
    task: object                         # of data/
    sampler: Sampler
    workers: Rewards                     # reward processes
    problems: list = field(default_factory=list)     # to train on
    valid_problems: list = field(default_factory=list)       # validation, during the run: eval/*
    test_problems: list = field(default_factory=list)        # before and after it: test/*
    optimizer: Optimizer | None = None
    reference: GPT | None = None         # for --kl-coef: see --reference-at
    rounds: object = None                # tail.Rounds, for --tail-batching
    own: object = None                   # what a script adds: a dataclass, saved whole
    steps: int = 0                       # rollouts of the whole run
    longest: int = 0                     # tokens of the longest prompt, and --max-new

    step: int = saved(0)                 # rollouts that were learned from
    progress: float = saved(0.0)         # rollouts and fractions of one, for the schedules
    cursor: int = saved(0)               # problems taken from the endless list
    spent: int = saved(0)                # tokens sampled
    seconds: float = saved(0.0)          # of all steps, evaluations apart: the same on every rank
    visits: dict = saved(factory=dict)   # problem -> times it was completed: part of its noise
    late: list = saved(factory=list)     # problems that were put off: see tail.py
    best: float = saved(-math.inf)       # the highest eval/avg
    stalled: int = saved(0)              # evaluations since then
    bonus: float = saved(0.0)            # the next coefficient of --entropy-target
    history: list = saved(factory=list)  # the numbers of earlier steps

    # of the step that is being made
    normaliser: float = 0.0              # what the sums will be divided by
    early: dict = field(default_factory=dict)        # --stream: groups learned early -> their stats
    dropped: int = 0                     # groups that --dynamic threw away,
    dropped_tokens: int = 0              # and their tokens
    wasted_tokens: int = 0               # tokens that a round threw away
    clock: Clock = field(default_factory=Clock)      # seconds per stage


# -----------------------------------------------------------------------------
# the beginning


def check_flags(c):
    """What holds of the flags of every loop. Its own are checked in a script's `configure`."""
    positive(c, "prompts max_new row_tokens save_every workers")
    shares(c, "decay")
    check_run(c)
    check_sampling(c)
    memory.check_flags(c)


def setup(config, problems=None, reward=None, longest=0, task=None, teacher="",
          teacher_at="device"):
    """-> RL
    problems  to train on, instead of the task's
    reward    a task or my.py:score, instead of config.task's own
    longest   tokens of the longest prompt that will come, if above these
    task      instead of config.task
    teacher   a model that the caller loads later, and needs room for
    """
    parity.prepare(config.parity)
    env = start(config.device, config.dtype, config.threads, config.deterministic, threads_of_resumed(config))
    if isinstance(config, Algo):
        config = with_algorithm(config)
    check_flags(config)                  # for a loop without a command line
    if config.stream and env.deterministic:
        die("--stream adds up in the order of the clock: give --no-deterministic, too")
    try:
        task = data.load(task or config.task)
        reward = reward or config.task
        check(reward)
        if config.parity and not config.dry_run:
            parity.check(env.device)
    except (ValueError, FileNotFoundError) as e:
        die(e)
    train_gpt.train_missing(config.init, env, dry_run=config.dry_run)
    try:
        folder = hf.find(config.init)
        tok = data.tokenizer(folder)
        # a dry run takes the shape alone
        place = torch.device("meta") if config.dry_run else env.device
        model = GPT.from_hf(folder, dtype=env.dtype, device=place)
        model.checkpoint = config.checkpoint
        if problems is None:
            problems = task.problems("train", config.problems, config.seed)
        valid = task.problems("valid", config.eval_n, config.seed) if config.eval_n else []
        final = task.problems("test", config.final_n, config.seed) if config.final_n else []

        chats = any("messages" in p.data for p in [*problems, *valid, *final])
        config = with_date(config, tok, chats)
        prompts = [len(prompt_ids(p, tok)) for p in [*problems, *valid, *final]]
        need = max([longest, *prompts]) + config.max_new         # tokens of the longest sample
        memory.check_lengths(config, model.config, need)
        if config.dry_run:
            return RL(config, env, model, tok, task, None, None, problems, longest=need)
        if config.parity:
            parity.use(model, kernels)
        reference = None
        if config.kl_coef:
            reference = GPT.from_hf(folder, dtype=env.dtype).requires_grad_(False)
            place_blocks(reference, config.reference_at, env)
        # who needs what of a GPU: the teacher, an update, and keys and values get what they leave
        room = memory.room_for(teacher, teacher_at, env, model.head_weight.element_size())
        optimizer = memory.make_optimizer(model, reference, config, need, env)
        sampler = memory.make_sampler(model, tok, config, need, env)
        del room                                                 # the teacher's own tensors take it
    except (ValueError, FileNotFoundError) as e:
        die(e)
    except torch.cuda.OutOfMemoryError:
        die(f"an update of --row-tokens {config.row_tokens} does not fit on the GPU: lower it, "
            "or give --checkpoint or --offload (--dry-run lists what a run needs)")
    workers = Rewards(reward, workers=config.workers)
    return RL(config, env, model, tok, task, sampler, workers, problems, valid, final,
              optimizer, reference, steps=getattr(config, "steps", 0), longest=need)


# flags that may differ on --resume: they change when something is done, where, or by how many, and
# the result by rounding at most
FREE = ("eval_every", "save_every", "threads", "workers", "wandb", "minutes", "patience", "offload",
        "grads", "checkpoint", "reference_at", "teacher_at")


def open_run(rl, sources):
    """-> the run folder. sources: the files whose text its log keeps. With --resume rl is as the
    last checkpoint left it; a run that was stopped before its first one begins again."""
    config = rl.config
    run = Run(f"runs/{config.name}", config, rl.env, resume=config.resume, free=FREE,
              sources=sources)
    rl.workers.log = run.log
    run.log_machine()
    count = len(rl.problems)
    if config.prompts > count:
        run.log(f"--prompts {config.prompts} is more than the {count} problems there are: "
                f"a step holds {count}")
    states = run.restore(rl.model, rl.optimizer) if config.resume else None
    if states:
        for name, value in states[0]["kept"].items():
            setattr(rl, name, value)
        if rl.reference:
            load_state(rl.reference, states[0]["reference"], rl.env)
        if rl.rounds:
            rl.rounds.load_state_dict(states[0]["rounds"])
        if rl.own:
            rl.own = replace(rl.own, **states[0]["own"])
    return run


def save(rl, run, history=50):
    """A checkpoint: the model's folder, and one state file per rank. history: how many of the
    last steps it keeps."""
    state = {f.name: getattr(rl, f.name) for f in fields(rl) if f.metadata.get("saved")}
    state["history"] = recent(rl.history, history)
    parts = dict(optimizer=rl.optimizer.state_dict(), kept=state)
    reference = state_of(rl.reference, rl.env) if rl.reference else None
    if rl.env.master:
        parts["reference"] = reference
        parts["rounds"] = rl.rounds.state_dict() if rl.rounds else None
        parts["own"] = dict(vars(rl.own)) if rl.own else {}
    run.save(rl.step, lambda folder: rl.model.save_hf(folder, rl.tok), parts)


# -----------------------------------------------------------------------------
# problems, and samples of them


def next_problems(rl, count):
    """-> the next `count` different problems of the endless list: the training problems, in a new
    order every epoch. One that this step has already, at the turn of an epoch, is passed over."""
    order = None
    order_of = None
    found = {}
    while len(found) < min(count, len(rl.problems)):
        epoch, place = divmod(rl.cursor, len(rl.problems))
        if epoch != order_of:
            order = np.random.default_rng([rl.config.seed, epoch]).permutation(len(rl.problems))
            order_of = epoch
        problem = rl.problems[order[place]]
        found[problem.id] = problem
        rl.cursor += 1
    return list(found.values())


def collect(rl, problems, n, resume=None, max_new=None, stop_strings=(), reward=True, seed=None):
    """Yields the groups of this rank as they finish, rewards in. Rewards run in worker processes
    while sampling continues.

    resume  {id: Samples or token lists}: the group of id is exactly these, in this order.
            Entry j is sample j and draws noise of its own from here on, so that several may
            begin with the same text. A Sample keeps its log-probs (nan: forced, and not
            trained); plain tokens are forced. max_new counts the tokens that an entry begins
            with.
    reward  False: not scored; a segment, or a turn.
    seed    of an evaluation: that noise, visit 0, and nothing of rl moves.
    """
    c = rl.config
    sampler = rl.sampler
    clock = rl.clock if seed is None else Clock()
    visits = rl.visits if seed is None else {}
    by_id = {p.id: p for p in problems}
    prompts = {id: prompt_ids(p, rl.tok) for id, p in by_id.items()}
    limits = dict.fromkeys(by_id, max_new or c.max_new)
    branches = {}
    for id, entries in (resume or {}).items():
        branches[id] = [replace(entry, index=j) if isinstance(entry, Sample) else entry
                        for j, entry in enumerate(entries)]

    # with --stream a rank without sequences has better to do than to wait for some
    feed = Feed(sampler, prompts, n, limits, visits=visits, resume=branches, wait=not c.stream,
                stop_strings=stop_strings, seed=c.seed if seed is None else seed,
                temperature=c.temperature, top_p=c.top_p)
    try:
        with feed:
            while feed.busy:
                with clock("rollout" if feed.prompts_left or sampler.live else "idle"):
                    ready = feed.step()                          # samples that ended
                with clock("reward"):
                    wait = feed.only_rewards_missing
                    ready = get_rewards(rl, by_id, ready, wait) if reward else ready
                for group in feed.complete(ready):
                    visits[group[0].problem] = group[0].visit + 1
                    yield group
    finally:
        rl.workers.forget()                                      # what is still pending


def get_rewards(rl, problems, ended, wait=False):
    """Sends samples that ended to the workers, where the task's reward or a function of yours runs.
    -> the samples whose rewards are in; a reward may be nan. problems: by id. wait: for one."""
    # a group that another rank handed over may have its rewards; nan is none yet
    ready = [s for s in ended if not math.isnan(s.reward)]
    for s in ended:
        if math.isnan(s.reward):
            name = (s.problem, s.index, s)       # two numbers for the log, and the sample itself
            rl.workers.put(name, problems[s.problem], completion(s, rl.tok))
    for (_, _, sample), reward, _ in rl.workers.get(block=wait):
        sample.reward = reward
        ready.append(sample)
    return ready


def share_visits(rl):
    """Every rank knows the visits of every problem: it may meet another rank next time."""
    for part in gather(rl.visits):
        rl.visits = {k: max(rl.visits.get(k, 0), part.get(k, 0)) for k in rl.visits | part}


def gather_groups(rl, groups):
    """The groups of all ranks, by problem and visit: the same list everywhere, however many ranks
    there are."""
    with rl.clock("idle"):                                       # waits for the slowest rank
        parts = gather(groups)
    return in_order([g for part in parts for g in part])


# -----------------------------------------------------------------------------
# the update: sums now, one division at the end


def learn(rl, groups):
    """Every update of a rollout: one, unless --minibatch or --epochs ask for more; mini-batches by
    problem and visit, the same for any number of ranks. -> stats of them all."""
    c = rl.config
    everyone = gather_groups(rl, groups)
    share_visits(rl)
    count = max(1, len(everyone))        # a step without groups is an update, too: of nothing
    size = c.minibatch or count
    parts = [everyone[i : i + size] for i in range(0, count, size)] * c.epochs
    old = old_logprobs(rl, everyone) if len(parts) > 1 else None
    marked = covariant(everyone, c) if c.cov else None
    if c.entropy_target:
        coef, rl.bonus = entropy_bonus(rl.bonus, everyone, c)
        c = replace(c, entropy_coef=coef)
    loss = make_loss(c, elapsed(rl), old, marked, rl.reference)
    done = []
    for part in parts:
        stats = update(rl, part, loss, gathered=True)
        done.append(stats | step(rl, 1 / len(parts)))
    return merge_stats(done) | {"grad_norm": sum(s["grad_norm"] for s in done) / len(done)}


def update(rl, groups, loss, gathered=False):
    """The gradient of one update from the groups of all ranks: each rank gets its share and
    back-propagates sums; ranks meet in Optimizer.step. -> stats as sums over ranks. gathered:
    groups are those of all ranks already; otherwise each rank passes its own."""
    c = rl.config
    if not gathered:
        groups = gather_groups(rl, groups)
    # all ranks hold the groups of all ranks here, so each comes to the same normaliser. A sample of
    # weight 0, because its advantage is 0, counts in it and is not packed
    weigh(groups, c)
    for group in groups:
        for s in group:
            rl.normaliser += s.divisor
    if c.stream:         # what a rank has learned early counts in the normaliser alone
        learned = {k for part in gather(set(rl.early)) for k in part}
        groups = [g for g in groups if key(g[0]) not in learned]
    with rl.clock("pack"):
        batches = pack.batches(groups, c.row_tokens, rl.model.config, rl.env.rank, rl.env.world)
    stats = back_propagate(rl, batches, loss)
    mine = merge_stats([*rl.early.values(), stats])              # early: empty without --stream
    return merge_stats(gather(mine))


def back_propagate(rl, batches, loss):
    """Adds the gradients of these micro-batches to those that are there. -> stats as sums"""
    parts = []
    with rl.clock("train"):
        for batch in batches:
            batch = batch.to(rl.env.device)
            total, stats = loss(batch, batch.hidden(rl.model), rl.model.head_weight)
            total.backward()
            rl.optimizer.finish_micro_batch()
            parts.append(stats)
        # only now, when all rows are launched: to read a number waits for the GPU
        return merge_stats(parts)


def step(rl, part=1.0):
    """The one division, the clipping, the optimizer. A step without signal moves nothing. part:
    of a rollout, when it is learned from in several steps; schedules count rollouts."""
    c = rl.config
    with rl.clock("opt"):
        factor = min(1.0, (rl.progress + 1) / max(1, c.warmup))
        if c.decay:      # at least over the last rollout, however small a share is asked for
            factor = min(factor, (1 - elapsed(rl)) / max(1 / rl.steps, c.decay))
        try:
            stats = rl.optimizer.step(divide=rl.normaliser, factor=max(0.0, factor))
        except FloatingPointError as e:
            die(f"step {rl.step}: {e}. runs/{c.name} stays as its last checkpoint left it")
    rl.normaliser = 0.0
    rl.progress += part
    return stats


def elapsed(rl):
    """The share of the run that is over: of its steps, or of --tokens where those are used up
    first."""
    share = rl.progress / rl.steps
    return max(share, rl.spent / rl.config.tokens) if rl.config.tokens else share


@torch.no_grad()
def old_logprobs(rl, groups):
    """-> {key: log-probs of the policy as it is now}, of every sample that is trained, on all
    ranks."""
    c = rl.config
    weigh(groups, c)                     # those of weight 0 are left out here, too
    mine = {}
    with rl.clock("train"):
        for batch in pack.batches(groups, c.row_tokens, rl.model.config, rl.env.rank, rl.env.world):
            batch = batch.to(rl.env.device)
            hidden_ND = batch.hidden(rl.model)
            logp_N, _ = linear_logprob(hidden_ND, rl.model.head_weight, batch.targets_N, c.temperature)
            lengths = torch.bincount(batch.sample_N, minlength=len(batch.samples)).tolist()
            parts = logp_N.cpu().split(lengths)
            mine |= {key(s): part.numpy() for s, part in zip(batch.samples, parts)}
    return {k: v for part in gather(mine) for k, v in part.items()}


# -----------------------------------------------------------------------------
# around the loop


def over(rl):
    """After its steps, or after --tokens or --minutes, which metrics.summary counts."""
    c = rl.config
    used_up = 0 < c.tokens <= rl.spent
    return rl.step >= rl.steps or used_up or bool(out_of_time(c, rl.seconds))


def due(step, every):
    return every > 0 and step % every == 0


def evaluation(rl, run, name, title):
    """-> {NAME/metric: value} of the model as it is, at temperature 1 whatever the run samples at.
    name: "test", the test problems, before and after a run; "eval", the validation problems."""
    problems = rl.test_problems if name == "test" else rl.valid_problems
    c = rl.config
    result = evaluate(rl.sampler, rl.tok, rl.task, rl.workers, problems, c.eval_k, c.max_new)
    run.log(f"{title}: {words(result)}")
    return {f"{name}/{k}": v for k, v in result.items()}


def stop_here(rl, run):
    """Ctrl-C or SIGTERM on any rank: all of them leave after this step, which is saved."""
    rl.workers.close()
    run.bye(rl.step)


def finish(rl, run):
    """Pictures, and where the model lies."""
    rl.workers.close()
    why = out_of_time(rl.config, rl.seconds)
    if why and rl.step < rl.steps:
        run.log(f"stopped after step {rl.step} of {rl.steps}: {why}")
    if rl.env.master:
        view.pages(run.folder)
        run.log(f"wrote {run.folder}: curves.png, samples.html, and the model in "
                f"ckpt/step_{rl.step} (a Hugging Face folder)")
    run.close()


def close(rl):
    """Workers and memory, for several runs in one process. A closed rl cannot sample or learn."""
    rl.workers.close()
    rl.model = rl.sampler = rl.optimizer = rl.reference = None
    rl.early.clear()
    if rl.env.device.type == "cuda":
        torch.cuda.empty_cache()


__getattr__ = moved(__name__)            # names that a fork may know from here
