"""common/flags.py: a dataclass is the parser, its comments are the help, also of what it
inherits; names that moved say where to"""
import importlib
import subprocess
import sys
import types
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import pytest

from common.flags import die, flags, positive
from common.moved import MOVED, moved

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Config:
    name: str = "test"                               # the folder under runs/
    steps: int = 10                                  # optimizer steps
    lr: float = 1e-3                                 # peak rate
    algo: Literal["grpo", "dapo"] = "grpo"           # row of the table
    layers: Literal[2, 4] = 2                        # depth
    cap: int | None = None                           # most tokens, none for no cap
    power: float | None = None                       # exponent; may be negative
    floor: float = -1.0                              # lower end
    compile: bool = False                            # faster, later
    batch_size: int = 8                              # problems a step
    resume: bool = False                             # go on


def refused(capsys, *argv):
    """the one line a bad command line ends with"""
    with pytest.raises(SystemExit) as e:
        flags(Config, list(argv))
    assert e.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    return err


# --------------------------------------------------------------------------------------------------
# flags

def test_flags_are_parsed():
    c = flags(Config, ["--steps", "3", "--lr=2e-4", "--algo", "dapo", "--layers=4", "--cap", "none",
                       "--compile", "--batch-size=2", "--floor", "-2.5", "--power=-2", "--name", "-x"])
    assert (c.steps, c.lr, c.algo, c.layers, c.cap, c.compile,
            c.batch_size) == (3, 2e-4, "dapo", 4, None, True, 2)
    assert (c.floor, c.power, c.name) == (-2.5, -2.0, "-x") and isinstance(c.power, float)
    assert flags(Config, []) == Config()
    assert flags(Config, ["--compile", "--no-compile"]).compile is False
    assert flags(Config, ["--cap", "7"]).cap == 7
    big = flags(Config, ["--steps", "1e6", "--cap", "9007199254740993"])      # the second is no float64
    assert big.steps == 1_000_000 and isinstance(big.steps, int) and big.cap == 9007199254740993


def test_a_misspelt_flag_names_the_nearest(capsys):
    assert "--steps" in refused(capsys, "--stesp", "3").split("did you mean")[1]
    assert "--batch-size" in refused(capsys, "--batch_size", "3").split("did you mean")[1]
    assert "--no-compile" in refused(capsys, "--no-compil").split("did you mean")[1]


@pytest.mark.parametrize("argv, words", [
    (["--steps", "-1"], ["--steps is -1:", "0 or more"]),
    (["--steps=1.5"], ["--steps", "1.5", "int"]),
    (["--steps", "inf"], ["--steps", "inf", "int"]),
    (["--lr", "fast"], ["--lr", "fast", "float"]),
    (["--lr", "nan"], ["--lr is nan", "finite"]),
    (["--lr", "-0.1"], ["--lr is -0.1:", "0 or more"]),
    (["--cap", "-4"], ["--cap is -4:", "0 or more"]),
    (["--cap", "some"], ["--cap", "some", "int|none"]),
    (["--algo", "dap"], ["--algo", "grpo|dapo", "did you mean dapo"]),
    (["--layers", "3"], ["--layers", "2|4"]),
    (["--steps"], ["--steps needs a value: int"]),
    (["--steps", "--lr", "1"], ["--steps needs a value: int"]),
    (["--compile=yes"], ["--compile", "--no-compile"]),
    (["train.txt"], ["train.txt", "not a flag"]),
    (["-s", "3"], ["-s", "not a flag"]),
])
def test_bad_values_are_one_line(capsys, argv, words):
    message = refused(capsys, *argv)
    for word in words:
        assert word in message


def test_help_shows_every_flag_with_its_comment(capsys):
    with pytest.raises(SystemExit) as e:
        flags(Config, ["--help"], doc="\nwhat this script does\n")
    assert e.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "what this script does"
    rows = [line for line in lines if line.startswith("  --")]
    assert len(rows) == 11
    row = next(r for r in rows if r.startswith("  --batch-size"))
    assert "int" in row and "8" in row and "problems a step" in row
    assert "grpo|dapo" in next(r for r in rows if "--algo" in r)
    assert any("--compile, --no-compile" in r for r in rows)
    assert len({r.index("(") for r in rows}) == 1, "the columns are aligned"


def test_help_shows_what_a_script_fills_in_later(capsys):
    """--trust (None) and --temperature (None): a reader of --help could not see with what a run would
    begin, since the row of --algo filled it in"""
    with pytest.raises(SystemExit):
        flags(Config, ["--algo", "dapo", "--help"],
              filled=lambda config: {"cap": 7 if config.algo == "dapo" else 3, "steps": 1})
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]
    shown = {row[0]: next(word for word in row if word.startswith("(")) for row in rows}
    assert shown["--cap"] == "(7)" and shown["--steps"] == "(10)", "what has a value keeps it"
    assert flags(Config, [], filled=lambda config: {"cap": 7}).cap is None, "for --help alone"


def test_a_field_without_default_is_required(capsys):
    @dataclass
    class Needs:
        model: str       # a folder
    assert flags(Needs, ["--model", "x"]).model == "x"
    with pytest.raises(SystemExit):
        flags(Needs, [])
    assert "--model is required: a folder" in capsys.readouterr().err


def test_what_is_below_one_is_refused(capsys):
    positive(Config(), "steps batch_size")
    with pytest.raises(SystemExit) as e:
        positive(Config(steps=3, batch_size=0), "steps batch_size")
    assert e.value.code == 2 and capsys.readouterr().err == "error: --batch-size is 0: give at least 1\n"


# --------------------------------------------------------------------------------------------------
# inheritance: a script's own flags, on top of what every loop has

@dataclass
class Common:
    """What every loop has."""
    init: str = "runs/base"                          # the model to start from
    steps: int = 100                                 # updates
    lr: float = 1e-3                                 # peak rate; may be negative
    # ---- sampling
    n: int = 8                                       # samples per prompt
    top_p: float = 1.0                               # 1: off


@dataclass
class Algo:
    algo: Literal["grpo", "dapo"] = "grpo"           # row of the table


@dataclass
class Script(Algo, Common):
    data: str = ""                                   # prompts of your own
    steps: int = 30                                  # updates, fewer here
    lr: float = 1e-4
    # ---- pictures
    draw: bool = True                                # curves.png at the end


def shown(capsys, Config, *argv, **more):
    """--help, without the column widths: [(group, flag, default, comment)]"""
    with pytest.raises(SystemExit) as e:
        flags(Config, [*argv, "--help"], **more)
    assert e.value.code == 0
    found, group = [], None
    for line in capsys.readouterr().out.splitlines():
        if not line.startswith("  --"):
            group = line or group
            continue
        usage, _, rest = line.partition("(")
        default, _, comment = rest.partition(")")
        found.append((group, usage.split()[0].rstrip(","), default, comment.strip()))
    return found


def test_help_of_a_config_that_inherits(capsys):
    """the own flags first, also those declared again, then each ancestor's; a comment that is not
    repeated is the ancestor's"""
    assert shown(capsys, Script) == [
        ("flags:", "--data", '""', "prompts of your own"),
        ("flags:", "--steps", "30", "updates, fewer here"),
        ("flags:", "--lr", "0.0001", "peak rate; may be negative"),
        ("pictures:", "--draw", "True", "curves.png at the end"),
        ("flags of Algo:", "--algo", "grpo", "row of the table"),
        ("What every loop has:", "--init", "runs/base", "the model to start from"),
        ("sampling:", "--n", "8", "samples per prompt"),
        ("sampling:", "--top-p", "1.0", "1: off"),
    ]


def test_values_of_a_config_that_inherits(capsys):
    c = flags(Script, ["--n", "3", "--algo", "dapo", "--lr", "-1", "--no-draw"])
    assert c == Script(n=3, algo="dapo", lr=-1.0, draw=False) and c.steps == 30 and c.init == "runs/base"
    with pytest.raises(SystemExit):
        flags(Script, ["--top-p", "-1"])
    assert "--top-p is -1:" in capsys.readouterr().err


def test_a_required_flag_among_inherited_defaults(capsys):
    """a field without default cannot follow those of an ancestor, except as a keyword"""
    @dataclass(kw_only=True)
    class Needs(Common):
        teacher: str                                 # who is asked

    @dataclass
    class AlsoNeeds(Common):
        _: KW_ONLY
        teacher: str                                 # who is asked
    for cls in (Needs, AlsoNeeds):
        assert flags(cls, ["--teacher", "big", "--n", "2"]) == cls(teacher="big", n=2)
        assert shown(capsys, cls)[0][1:] == ("--teacher", "required", "who is asked")
        with pytest.raises(SystemExit):
            flags(cls, ["--n", "2"])
        assert capsys.readouterr().err == "error: --teacher is required: who is asked\n"


def test_a_default_without_its_type_is_told_to_the_author():
    """`steps = 5` under a dataclass that inherits `steps: int` changes nothing, and Python says nothing"""
    @dataclass
    class Short(Common):
        steps = 5
    with pytest.raises(TypeError, match="steps = 5 changes no default"):
        flags(Short, [])


# --------------------------------------------------------------------------------------------------
# defaults that are this machine's, or a preset's

def test_a_recipe_stands_before_the_users_words(capsys):
    recipe = ["--n", "4", "--top-p=0.9", "--steps", "30", "--no-draw"]
    assert flags(Script, ["--n", "2"], defaults=recipe) == Script(n=2, top_p=0.9, draw=False)
    assert flags(Script, ["--n", "2"], defaults=" ".join(recipe)) == Script(n=2, top_p=0.9, draw=False)
    rows = {row[1]: row[2] for row in shown(capsys, Script, "--n", "2", defaults=recipe, recipe="on cpu")}
    assert rows["--n"] == "4, on cpu" and rows["--top-p"] == "0.9, on cpu"
    assert rows["--draw"] == "False, on cpu"
    assert rows["--steps"] == "30" and rows["--lr"] == "0.0001", "what is the class's own is not marked"


def test_a_recipe_that_depends_on_the_users_words(capsys):
    @dataclass(kw_only=True)
    class Preset(Common):
        model: str                                   # required
        preset: Literal["small", "large"] = "small"  # a size
    words = {"small": "--n 2", "large": "--n 20 --steps 1000"}
    more = {"defaults": lambda c: words[c.preset], "recipe": lambda c: f"--preset {c.preset}"}
    assert flags(Preset, ["--model", "m"], **more).n == 2
    c = flags(Preset, ["--model", "m", "--preset", "large", "--n", "5"], **more)
    assert (c.n, c.steps) == (5, 1000)
    rows = {row[1]: row[2] for row in shown(capsys, Preset, "--preset", "large", **more)}
    assert rows["--n"] == "20, --preset large" and rows["--steps"] == "1000, --preset large"
    assert rows["--model"] == "required"


@pytest.mark.parametrize("lines", [0, 1])
def test_help_into_head_ends_quietly(lines):
    """the reader of the pipe leaves first"""
    code = ("import sys\nsys.path.insert(0, sys.argv[1])\nfrom common.flags import flags\n"
            "from dataclasses import dataclass\n@dataclass\nclass Config:\n"
            "    a: int = 1\nflags(Config, ['--help'], 'words\\n' * 100000)")
    p = subprocess.Popen([sys.executable, "-c", code, str(ROOT)], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    assert [p.stdout.readline() for _ in range(lines)] == ["words\n"] * lines
    p.stdout.close()
    assert p.stderr.read() == "" and p.wait() == 0


# --------------------------------------------------------------------------------------------------
# names that moved

def test_a_moved_name_says_where_it_is(monkeypatch):
    module = types.ModuleType("old_place")
    module.here = 1
    monkeypatch.setitem(MOVED, "old_place", {"f": "common.new_place", "g": "common.new_place:better",
                                             "h": "= 2 * f(x)"})
    module.__getattr__ = moved("old_place")
    monkeypatch.setitem(sys.modules, "old_place", module)
    from old_place import here
    assert here == 1
    with pytest.raises(ImportError) as e:
        from old_place import f  # noqa: F401
    assert str(e.value) == "old_place.f moved to common.new_place: from common.new_place import f"
    with pytest.raises(ImportError, match="from common.new_place import better"):
        from old_place import g  # noqa: F401
    with pytest.raises(ImportError, match=r"^old_place.h is gone: write 2 \* f\(x\)$"):
        from old_place import h  # noqa: F401
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from old_place import nothing  # noqa: F401
    assert not hasattr(module, "f") and getattr(module, "f", 7) == 7
    with pytest.raises(AttributeError, match="moved to common.new_place"):
        assert module.f
    with pytest.raises(AttributeError, match="'old_place' has no attribute 'nothing'"):
        assert module.nothing


@pytest.mark.parametrize("module", MOVED)
def test_what_left_a_file_is_where_it_says(module):
    """a fork of an older nanorl imports these names from there"""
    for name, place in MOVED[module].items():
        if name not in vars(importlib.import_module(module)):
            with pytest.raises(ImportError, match=rf"{module}.{name} (moved to|is gone: write) ") as e:
                exec(f"from {module} import {name}")
            if not place.startswith("= "):
                exec(str(e.value).split(": ")[1])


def test_flags_need_no_torch():
    code = "import sys\nimport common.flags\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_die_is_one_line(capsys):
    with pytest.raises(SystemExit) as e:
        die("--n is 1: give at least 2")
    assert e.value.code == 2 and capsys.readouterr() == ("", "error: --n is 1: give at least 2\n")
