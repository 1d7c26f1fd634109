"""
axes.py: which choice on each axis of algos.py a run takes: the row of --algo, overridden by every axis that
was given its own flag. What does not go together, or could have no effect, is refused with the reason.
"""
from dataclasses import asdict
from types import SimpleNamespace

from algos import ALGORITHMS
from common.flags import as_flag, die, without_effect

# what holds where neither the row nor a flag says anything
DEFAULTS = dict(dynamic=False, temperature=1.0, kl_coef=0.0, reset_every=0, clip_low=0.2,
                clip_high=0.2, length_power=1.0, power=1.0)


def unused(c):
    """-> {flag: the axis that leaves it nothing to say}"""
    found = {}
    if c.trust == "none":
        found |= dict(clip_low="trust", clip_high="trust")
    if c.ratio != "power":
        found |= dict(power="ratio", power_end="ratio")
    if c.aggregate != "length":
        found |= dict(length_power="aggregate")
    return found


def filled_in(config):
    """-> {flag: value} by --algo, for --help."""
    row = DEFAULTS | ALGORITHMS[config.algo]
    silent = unused(SimpleNamespace(**row))
    return {name: value for name, value in row.items() if name not in silent}


def with_algorithm(config):
    """The row of --algo, overridden by every axis that was given its own flag. What does not go
    together is refused, with the reason."""
    row = ALGORITHMS[config.algo]
    known = asdict(config)
    strange = [name for name in row if name not in known]
    if strange:
        die(f"--algo {config.algo} needs {as_flag(strange[0])}, which has no place in this "
            "script: take another row, and what else you want of this one by the flags of its axes")
    given = {name: value for name, value in known.items() if value not in ("", None)}
    defaults = {name: value for name, value in DEFAULTS.items() if name in known}
    c = type(config)(**{**known, **defaults, **row, **given})
    if c.power_end is None:
        c.power_end = c.power
    for name, axis in unused(c).items():
        if name in given:
            die(f"{as_flag(name)} says nothing here: --{axis} is {getattr(c, axis)}")
        setattr(c, name, None)
    without_effect(c, [
        ("cov_share", c.cov, "it is the share that --cov marks, and --cov is not given"),
        ("cov_coef", c.cov == "kl", "it is the coefficient of --cov kl"),
    ])
    for wrong, why in [
        (c.overlong > c.max_new, f"--overlong {c.overlong} is above --max-new {c.max_new}"),
        (c.clip_low and c.clip_low > 1,
         f"--clip-low {c.clip_low}: a ratio is never below 0, so give at most 1"),
        (c.trust == "probability" and c.ratio != "token",
         f"--trust probability is about the probability of a token, and --ratio is {c.ratio}"),
        (c.cov_share is not None and not 0 < c.cov_share < 1,
         f"--cov-share {c.cov_share} is a share of the tokens: give a number between 0 and 1"),
        (c.entropy_target and c.entropy_coef,
         "--entropy-target finds the coefficient by itself: leave --entropy-coef out"),
        (c.cov == "kl" and not several_updates(c),
         "--cov kl with one update per rollout: the old policy is the new one, so their KL has no "
         "gradient; give --epochs 2 or a --minibatch below --prompts, or --cov clip"),
    ]:
        if wrong:
            die(why)
    return c


def several_updates(c):
    """Is a rollout learned from in more than one update?"""
    return c.epochs > 1 or 0 < c.minibatch < c.prompts


def check_updates(c):
    """Refuses what only a second update of a rollout could feel. With one, every ratio is 1,
    whatever its form and wherever it is clipped. c: with the row filled in."""
    row = DEFAULTS | ALGORITHMS[c.algo]
    for name in ("ratio", "power", "power_end", "trust", "clip_low", "clip_high"):
        value = getattr(c, name)
        first = row.get("power") if name == "power_end" else None
        if not several_updates(c) and value is not None and value != row.get(name, first):
            die(f"{as_flag(name)} {value} has no effect with one update per rollout, where every "
                "ratio is 1: it needs more (nanorl.py: --minibatch below --prompts, or --epochs 2)")
