"""
The name of our kernels.py is also a package's on PyPI, one that transformers and trl import
wherever its metadata says that it is installed. With the repo's root first on the path, as it is
in every script of ours, they would get ours and end in "cannot import name ..." deep inside code
that nobody here wrote; and hiding ours for good would break whatever of our own asks for it later.
"""
import importlib.util
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent

# whatever transformers takes from the package: a class, a decorator, or a decorator with arguments
STAND_IN = """
class Thing:
    def __init__(self, *a, **k): pass
    def __call__(self, *a, **k): return a[0] if a else self
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return Thing
"""

NAIVE = """
import sys
sys.path.append(sys.argv[1])
import kernels
import transformers.modeling_layers
"""

THROUGH_PEER = """
import sys
from importlib.metadata import version
from pathlib import Path
sys.path.append(sys.argv[1])
assert version("kernels"), "the trap is not armed"
import kernels
from bench import peer
path = list(sys.path)
module = peer("transformers.modeling_layers")
assert module.GradientCheckpointingLayer.__module__ == "transformers.modeling_layers"
assert sys.path == path
import common.optim                                # whoever of ours asks for it afterwards still gets ours
assert sys.modules["kernels"] is kernels and Path(kernels.__file__).parent == Path(sys.argv[2])
assert peer("no_such_package_anywhere") is None
assert sys.modules["kernels"] is kernels and sys.path == path
print("fine")
"""


@pytest.fixture
def site(tmp_path):
    """A folder like site-packages in which `kernels` is installed, in a version that transformers
    accepts, as far as metadata goes."""
    text = (Path(importlib.util.find_spec("transformers").origin).parent
            / "utils" / "import_utils.py").read_text()
    version = re.search(r'KERNELS_MIN_VERSION = "(.+)"', text)
    info = tmp_path / "site" / "kernels.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\n"
                                   f"Version: {version[1] if version else '0.18.2'}\n")
    return tmp_path / "site"


def test_a_peer_lands_in_our_file_unless_it_is_hidden(site, one_process):
    with pytest.raises(AssertionError, match="cannot import name .* from 'kernels'"):
        one_process(NAIVE, site)
    assert one_process(THROUGH_PEER, site, ROOT) == "fine\n"


def test_a_peer_gets_the_real_package_where_there_is_one(site, one_process):
    (site / "kernels").mkdir()
    (site / "kernels" / "__init__.py").write_text(STAND_IN)
    held = ("from transformers.integrations import hub_kernels as h\n"
            "print([x.__name__ for x in vars(h).values() if x.__class__ is type])\n")
    said, names = one_process(THROUGH_PEER + held, site, ROOT).splitlines()
    assert said == "fine" and "Thing" in names
