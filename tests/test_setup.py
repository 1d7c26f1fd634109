"""the set-up files hold together, and imports point down only"""
import ast
import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["speedrun.sh", "test.sh", ".ci/run"]


def test_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["name"] == "nanorl" and project["project"]["requires-python"] == ">=3.11"
    assert set(project["project"]["optional-dependencies"]) == {"gpu", "dev", "bench", "math", "gym", "wandb"}
    assert project["tool"]["setuptools"]["py-modules"] == [], "it installs dependencies only"
    assert "MIT" in (ROOT / "LICENSE").read_text()


def test_what_is_asked_for_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [d for group in (project["dependencies"], extras["dev"]) for d in group]
    pins = re.findall(r"^([\w-]+)==\S+$", (ROOT / "constraints.txt").read_text(), re.M)
    assert {re.match(r"[\w-]+", d)[0] for d in asked} <= set(pins)


@pytest.mark.parametrize("script", SCRIPTS)
def test_shell_scripts(script):
    path = ROOT / script
    assert os.access(path, os.X_OK), "it has its run bit"
    assert path.read_text().startswith("#!/usr/bin/env bash\n") and "set -euo pipefail" in path.read_text()
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_ci_runs_the_tests_and_nothing_else():
    lines = [line for line in (ROOT / ".ci/run").read_text().splitlines()
             if line and not line.startswith("#")]
    assert lines == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', "exec ./test.sh"]


def test_the_workflow_runs_the_tests_and_nothing_else():
    text = (ROOT / ".github/workflows/test.yml").read_text()
    assert re.findall(r"- run: (.*)", text) == ["./test.sh"] and "run: |" not in text
    assert set(re.findall(r"uses: (\S+)@", text)) == {"actions/checkout", "actions/setup-python"}
    oldest = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert f'python-version: "{oldest.removeprefix(">=")}"' in text


def test_files_that_are_run_first_are_there():
    from tests.conftest import LONG
    assert all((ROOT / f"tests/{name}.py").exists() for name in LONG)
    assert "-n 2 --dist loadfile --no-loadscope-reorder" in (ROOT / "test.sh").read_text()


def test_an_old_python_is_said(tmp_path):
    """in a copy, so that no .venv is made or found here"""
    (tmp_path / "speedrun.sh").write_text((ROOT / "speedrun.sh").read_text())
    old = tmp_path / "python3.8"
    old.write_text("#!/usr/bin/env bash\nexit 1\n")
    old.chmod(0o755)
    done = subprocess.run(["bash", tmp_path / "speedrun.sh"], capture_output=True,
                          text=True, env={**os.environ, "PYTHON": str(old)})
    assert done.returncode == 2 and "Python 3.11" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()


# --------------------------------------------------------------------------------------------------
# the house: a file imports from lower rows only

ROWS = [      # the bottom first; a row may name files that are not written yet
    ["common.jail"],
    ["common.sandbox"],
    ["common.flags", "common.files", "common.watch", "common.cpu", "common.machine", "common.backend",
     "common.moved", "common.offload", "common.sharded",
     "data"],
    ["common.run", "common.parity", "common.norms", "common.numpy_row"],
    ["kernels", "common.optim", "common.hf"],
    ["pack", "common.reward", "common.view", "common.deal", "common.experts"],
    ["train_gpt", "common.slabs", "common.pages", "common.prefix"],
    ["rollout"],
    ["algos", "evaluate", "common.metrics", "common.overlap"],
    ["common.memory", "common.evidence", "common.teacher", "common.axes", "common.entropy"],
    ["stages"],
    ["tail", "opd_check"],
    ["nanorl", "ttrl", "opd"],
    ["ideas"],
]
HEIGHT = {name: i for i, row in enumerate(ROWS) for name in row}
ANYTHING = ("tests", "bench")


def place(module):
    """the row entry that a module belongs to: data.countdown is data; None: not ours"""
    parts = module.split(".")
    return next((".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in HEIGHT), None)


def imports(source, module):
    """every module named by an import, also inside functions; relative ones made absolute"""
    package = module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[:len(package) - node.level + 1] if node.level else [])
            base = ".".join(part for part in (base, node.module or "") if part)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def upward(source, module):
    """what a file imports from its own row or from above"""
    here = place(module)
    return {there for there in map(place, imports(source, module))
            if there and there != here and HEIGHT[there] >= HEIGHT[here]}


def siblings(source, module):
    """the other ideas that an idea imports"""
    found = {name.split(".")[1] for name in imports(source, module) if name.startswith("ideas.")}
    return found - {module.split(".")[1]}


def ours():
    """every file that has a place in the drawing, relative to the root"""
    patterns = ("*.py", "common/*.py", "data/**/*.py", "ideas/*.py")
    return [path.relative_to(ROOT) for pattern in patterns for path in ROOT.glob(pattern)]


def test_upward_imports_are_found():
    assert upward("import kernels\nfrom common.flags import die\nimport torch.data", "train_gpt") == set()
    assert upward("def f():\n    from nanorl import update", "rollout") == {"nanorl"}
    assert upward("from common import optim", "kernels") == {"common.optim"}
    assert upward("from . import view", "common.run") == {"common.view"}
    assert upward("from .tokenizer import x\nimport data", "data.countdown") == set()
    assert upward("from ..common.run import x", "data.countdown") == {"common.run"}
    assert upward("import common.reward as r", "pack") == {"common.reward"}
    assert upward("from common.watch import Watch\nfrom common.flags import die", "common.run") == set()
    for module, below in (("common.watch", "common.flags"), ("common.cpu", "data"),
                          ("data.countdown", "common.flags")):
        assert upward(f"import {below}", module) == {below}, "nothing in the bottom row imports another of it"
    assert upward("import stages, rollout\nfrom common import evidence", "ideas.darling") == set()
    assert upward("from ideas import darling", "nanorl") == {"ideas"}


def test_ideas_that_import_each_other_are_found():
    assert siblings("import nanorl\nfrom common.flags import die", "ideas.darling") == set()
    assert siblings("from ideas.spo import trust", "ideas.darling") == {"spo"}
    assert siblings("from . import spo",
                    "ideas.darling") == siblings("import ideas.spo", "ideas.darling") == {"spo"}


def test_ideas_never_import_each_other():
    for path in ours():
        if path.parts[0] == "ideas":
            found = siblings((ROOT / path).read_text(), f"ideas.{path.stem}")
            assert not found, f"{path} imports {', '.join(sorted(found))}: an idea stands on the core alone"


def test_arrows_point_down():
    files = ours()
    assert Path("common/run.py") in files
    for path in files:
        if path.name == "__init__.py" and path.parent.name in ("common", "ideas"):
            assert (ROOT / path).read_text() == "", (
                f"{path.parent} is a folder of files, not a package with a face")
            continue
        module = ".".join(path.with_suffix("").parts).removesuffix(".__init__") or "data"
        assert place(module), f"{path} has no row in the drawing: give it one"
        up = upward((ROOT / path).read_text(), module if path.name != "__init__.py" else module + ".__init__")
        # rollout takes any model; only its main() makes one, which is a row below anyway
        assert not up, f"{path} imports {', '.join(sorted(up))}, which is not below it"


def test_nothing_below_imports_tests_or_bench():
    for path in ours():
        named = {name.split(".")[0] for name in imports((ROOT / path).read_text(), path.stem)}
        assert not named & set(ANYTHING), f"{path} imports {named & set(ANYTHING)}"
