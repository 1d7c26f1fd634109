"""
A dataclass is the parser: its fields are the flags, and the comment beside a field is its help.

    @dataclass
    class Config(Common):                  # what every loop has; a field of it may be declared again
        n: int = 8                         # samples per prompt
        compile: bool = True               # faster, later

    config = flags(Config, argv, __doc__)                              # --n 4, --no-compile, --help
    config = flags(Config, argv, __doc__, ["--n", "4"], "on cpu")      # --help: --n int (4, on cpu)

--help lists a script's own flags first, then those of each class it inherits from. A comment line
`# ---- title` between two fields begins a group there.

Left out of the usual recipe: argparse, whose parser has to be kept in step with the config by hand,
and YAML, which moves a typing error from the first second of a run to wherever the value is used.
This file imports neither torch nor any file of ours.
"""
import ast
import dataclasses
import difflib
import functools
import inspect
import io
import math
import os
import shlex
import sys
import textwrap
import tokenize
import types
import typing
from datetime import date
from pathlib import Path


def die(message):
    """the end of every bad input: one line that says what is wrong, where, and what to do"""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def as_flag(name):
    """a field as a user types it: --batch-size"""
    return f"--{name.replace('_', '-')}"


def positive(config, names):
    """refuses the first of these flags that is below 1"""
    for name in names.split():
        if getattr(config, name) < 1:
            die(f"{as_flag(name)} is {getattr(config, name)}: give at least 1")


def shares(config, names):
    """refuses the first of these flags that is no share of a whole, 0 to 1"""
    for name in names.split():
        if not 0 <= getattr(config, name) <= 1:
            die(f"{as_flag(name)} is {getattr(config, name)}: it is a share, give 0 to 1")


def check_minutes(minutes):
    """refuses a --minutes that leaves no time for a step; None is no limit"""
    if minutes is not None and not minutes > 0:
        die(f"--minutes is {minutes:g}: a run needs more than 0; leave it out for no limit")


def truncation(config, prefix=""):
    """refuses a --top-p that is none, and one without effect beside temperature 0, which is greedy"""
    flag = as_flag(f"{prefix}top_p")
    top_p = getattr(config, f"{prefix}top_p")
    if not 0 < top_p <= 1:
        die(f"{flag} {top_p}: more than 0, at most 1 (1 is off)")
    greedy = getattr(config, f"{prefix}temperature") == 0
    if greedy and top_p < 1:
        die(f"{flag} {top_p} has no effect: temperature 0 takes the likeliest token anyway")


def check_sampling(config):
    """refuses rollouts that nothing can be learned from, and a --top-p or --tis that would bend what is"""
    truncation(config)
    if not config.temperature:
        die("--temperature 0 samples the same answer again and again: groups need variety, give a number "
            "above 0")
    if 0 < config.tis < 1:
        die(f"--tis {config.tis} would cut the weight where sampler and trainer agree: give 1 or more, or 0 "
            "for no weight")
    if config.top_p < 1 and not config.tis:
        die("--top-p below 1 with --tis 0: what is sampled is not what is trained, and nothing would correct "
            "it")


def check_name(name):
    """refuses a --name that is no folder within runs/"""
    parts = name.split("/")
    if any(part in ("", ".", "..") or not part.isprintable() for part in parts):
        die(f"--name {name!r} is no name of a run: it becomes the folder runs/NAME, so give a word, or "
            "words with a / between them, none of them . or ..")
    for i in range(len(parts) + 1):
        folder = Path("runs", *parts[:i])
        if folder.exists() and not folder.is_dir():
            die(f"{folder} is a file, not a run folder: choose another --name")


def check_day(day):
    """refuses a --date that is no day"""
    try:
        known = not day or date.fromisoformat(day).isoformat() == day
    except ValueError:
        known = False
    if not known:
        die(f"--date {day!r} is no day: give it as 2026-01-31")


def check_run(config):
    """what holds of the flags of every run folder"""
    check_name(config.name)
    check_minutes(config.minutes)
    check_day(config.date)


def without_effect(config, rows, base=None):
    """
    Refuses a flag that would change nothing under the other flags. rows: (flags, do they act?, why
    they do not). Given is what differs from `base`, the Config that a preset alone makes, or else
    from the defaults of the class.
    """
    for names, acts, why in rows:
        for name in names.split():
            value = getattr(config, name)
            if acts or value == getattr(base or type(config), name):
                continue
            said = f"{as_flag(name)} {value}"
            if isinstance(value, bool):
                said = as_flag(name if value else f"no_{name}")
            die(f"{said} has no effect: {why}")


# --------------------------------------------------------------------------------------------------
# what a class says of its fields: the comments and titles in its source

@dataclasses.dataclass
class Flag:
    name: str                              # as a user types it: batch-size
    field: dataclasses.Field
    hint: object                           # int, int | None, Literal["a", "b"]
    help: str                              # the comment beside the field
    group: tuple[type, str]                # the class that declares it, the title above it there

    @property
    def kinds(self):
        """the types that a value may have; None is not among them, see `optional`"""
        union = typing.get_origin(self.hint) in (typing.Union, types.UnionType)
        members = typing.get_args(self.hint) if union else (self.hint,)
        return [member for member in members if member is not type(None)]

    @property
    def optional(self):
        return type(None) in typing.get_args(self.hint)

    @property
    def switch(self):
        return bool in self.kinds

    @property
    def required(self):
        return self.field.default is dataclasses.MISSING

    @property
    def signed(self):
        """may it be negative? only where the default is, or where the comment says so"""
        default = self.field.default
        return isinstance(default, (int, float)) and default < 0 or "may be negative" in self.help

    @property
    def expected(self):
        words = []
        for kind in self.kinds:
            words += map(str, typing.get_args(kind) or [kind.__name__])
        return "|".join(words + ["none"] * self.optional)


@functools.cache
def _declared(cls):
    """{field: (its comment, the title it stands under)} of the fields that a class declares"""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # a class typed into a prompt has no source: no help texts
        return {name: ("", "") for name in cls.__dict__.get("__annotations__", {})}
    body = ast.parse(source).body[0].body
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    titles = {row: token.string.strip("#- ") for row, token in comments.items()
              if token.string.startswith("# ----") and not token.line[:token.start[1]].strip()}
    found = {}
    for node in body:
        if isinstance(node, ast.AnnAssign):
            beside = comments.get(node.end_lineno)
            above = [row for row in titles if row < node.lineno]
            help = beside.string.lstrip("# ") if beside else ""
            found[node.target.id] = help, titles[max(above)] if above else ""
    return found


def _read(Config):
    """{flag: Flag}, in the order of --help: a class's own fields before those that it inherits"""
    ancestors = [cls for cls in Config.__mro__ if dataclasses.is_dataclass(cls)]
    declared = {cls: _declared(cls) for cls in ancestors}
    hints = typing.get_type_hints(Config)
    fields = {field.name: field for field in dataclasses.fields(Config)}
    found = {}
    for cls in ancestors:
        for name, (help, title) in declared[cls].items():
            flag = name.replace("_", "-")
            if flag in found:                          # declared again by a class before this one
                found[flag].help = found[flag].help or help
            elif name in fields:
                found[flag] = Flag(flag, fields[name], hints[name], help, (cls, title))
    for flag in found.values():
        name, default = flag.field.name, flag.field.default
        written = getattr(Config, name, default)
        if written is not default and written != default:
            raise TypeError(f"{name} = {written!r} changes no default: a dataclass needs the type again, "
                            f"{name}: TYPE = {written!r}")
    return found


# --------------------------------------------------------------------------------------------------
# words -> values

LARGEST = 2**62                            # seeds and counts become numbers of 64 bits


def _number(flag, text, kind):
    """the number that this text is, or None"""
    try:
        number = float(text)
        if kind is float:
            value = number
        elif number.is_integer() and "e" in text.lower():
            value = int(number)            # 1e6 is a fine way to write an int, 1.5 is not
        else:
            value = int(text)              # big ints must not pass through a float
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(value) and value != flag.field.default:
        die(f"--{flag.name} is {text}: must be a finite number")
    if value < 0 and not flag.signed:
        die(f"--{flag.name} is {text}: must be 0 or more")
    if isinstance(value, int) and abs(value) > LARGEST:
        die(f"--{flag.name} is {text}: must be at most 2^62")
    return value


def _value(flag, text):
    if flag.optional and text.lower() == "none":
        return None
    for kind in flag.kinds:
        if kind is str:
            return text
        if typing.get_origin(kind) is typing.Literal:
            chosen = [choice for choice in typing.get_args(kind) if text == str(choice)]
            if chosen:
                return chosen[0]
            continue
        number = _number(flag, text, kind)
        if number is not None:
            return number
    near = difflib.get_close_matches(text, flag.expected.split("|"), 1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    die(f"--{flag.name} is {text!r}: expected {flag.expected}{hint}")


def _unknown(word, known):
    names = [*known, *(f"no-{flag.name}" for flag in known.values() if flag.switch), "help"]
    near = difflib.get_close_matches(word.replace("_", "-"), names, 1, cutoff=0.4)
    hint = f"; did you mean --{near[0]}?" if near else ""
    die(f"--{word} is no flag of this script{hint} (--help lists them)")


def _parse(known, words):
    """-> {field: value}, and whether --help was among the words. What follows it is not read"""
    words, values = list(words), {}
    while words:
        word = words.pop(0)
        if word in ("--help", "-h"):
            return values, True
        if not word.startswith("--"):
            die(f"{word!r} is not a flag: everything is given as --flag value (--help lists them)")
        name, equals, text = word[2:].partition("=")
        turned_on = known.get(name.removeprefix("no-"))
        off = name not in known and turned_on is not None and turned_on.switch
        flag = turned_on if off else known.get(name)
        if flag is None:
            _unknown(name, known)
        if flag.switch:
            if equals:
                die(f"--{name} takes no value: say --{flag.name} or --no-{flag.name}")
            values[flag.field.name] = not off
            continue
        if not equals:
            if not words or words[0].startswith("--"):
                die(f"--{name} needs a value: {flag.expected}")
            text = words.pop(0)
        values[flag.field.name] = _value(flag, text)
    return values, False


def flags(Config, argv=None, doc="", defaults=(), recipe="by default here", filled=None):
    """
    argv -> Config. Negative numbers are refused where the default is not negative (a step count, a
    rate, a size), unless the field's comment says "may be negative". nan and inf are refused too,
    except where inf is the default.

    defaults: words that stand before the user's, such as a preset; --help shows their values
    instead of the class's, and `recipe` beside them. Either may also be a function of the Config
    that the user's words alone would make, where the preset depends on them; a required field that
    is not given is None there.

    filled: a function of the Config -> {field: value} that the script fills in later, where nothing is
    given; --help shows these values, too.
    """
    known = _read(Config)
    given, asked_for_help = _parse(known, sys.argv[1:] if argv is None else argv)
    missing = [flag for flag in known.values() if flag.required and flag.field.name not in given]
    if callable(defaults) or callable(recipe):
        alone = Config(**{flag.field.name: None for flag in missing}, **given)
        defaults = defaults(alone) if callable(defaults) else defaults
        recipe = recipe(alone) if callable(recipe) else recipe
    preset, _ = _parse(known, shlex.split(defaults) if isinstance(defaults, str) else defaults)
    if asked_for_help:
        words = {**dict.fromkeys(flag.field.name for flag in missing), **preset, **given}
        later = filled(Config(**words)) if filled else {}
        _show(_help(Config, known, doc, preset, recipe, later))
    for flag in missing:
        if flag.field.name not in preset:
            die(f"--{flag.name} is required: {flag.help or flag.expected}")
    return Config(**{**preset, **given})


# --------------------------------------------------------------------------------------------------
# --help

def _row(flag, preset, recipe, later):
    usage = f"--{flag.name}, --no-{flag.name}" if flag.switch else f"--{flag.name} {flag.expected}"
    name, default = flag.field.name, flag.field.default
    if name in preset and preset[name] != default:
        return usage, f"({preset[name]}, {recipe})", flag.help
    if flag.required:
        return usage, "(required)", flag.help
    if default in (None, ""):
        default = later.get(name, default)
    return usage, '("")' if default == "" else f"({default})", flag.help


def _heading(cls, title, Config):
    """above a group: the title in the source, or else what the class says of itself"""
    said = cls.__dict__.get("__doc__") or ""
    made = said.startswith(f"{cls.__name__}(")         # by dataclass, where there is no docstring
    if not title and not made:
        title = said.strip().partition("\n")[0]
    if title:
        return title.rstrip(".:") + ":"
    return "flags:" if cls is Config else f"flags of {cls.__name__}:"


def _help(Config, known, doc, preset, recipe, later):
    rows = {name: _row(flag, preset, recipe, later) for name, flag in known.items()}
    usage = max((len(row[0]) for row in rows.values()), default=0)
    default = max((len(row[1]) for row in rows.values()), default=0)
    lines = [doc.strip(), ""] if doc else []
    for group in dict.fromkeys(flag.group for flag in known.values()):
        lines.append(_heading(*group, Config))
        for name, flag in known.items():
            if flag.group == group:
                row = rows[name]
                lines.append(f"  {row[0]:<{usage}}  {row[1]:<{default}}  {row[2]}".rstrip())
        lines.append("")
    return "\n".join(lines).rstrip()


def _show(text):
    try:
        print(text, flush=True)
    except BrokenPipeError:                # --help | head: the reader has seen enough
        # or the interpreter's last flush would raise again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise SystemExit(0)
