"""what every test shares: the repo root first on the path (the scripts are not installed), one
thread, no stray torchrun variables"""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)
from common import view  # noqa: E402  (found on the path that was set above)

for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
    os.environ.pop(name, None)


# whole files go to one of two processes: the long ones first, or one process waits for the other's last
LONG = ("test_kill", "test_memory", "test_tail", "test_ideas", "test_nanorl", "test_opd", "test_ttrl",
        "test_matrix", "test_cluster")


def pytest_collection_modifyitems(items):
    places = {name: i for i, name in enumerate(LONG)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONG)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Drawing takes four fifths of a tiny run: curves.png is drawn where a test looks at it"""
    if not request.node.get_closest_marker("pictures"):
        monkeypatch.setattr(view, "curves", lambda folder: None)


# the same for a process that runs one of our scripts
NO_PICTURES = """
from common import view
view.curves = lambda folder: None
"""


def without_pictures(code):
    return NO_PICTURES + code if ".main(" in code else code


@pytest.fixture
def ranks(tmp_path):
    """ranks(n, code, *args): runs `code` in n processes of one gloo group, as torchrun would; ->
    what each printed"""
    def go(n, code, *args, timeout=600):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = str(s.getsockname()[1])
        env = {**os.environ, "WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": port, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        started = [subprocess.Popen([sys.executable, "-c", without_pictures(code), *map(str, args)],
                                    env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, cwd=tmp_path,
                                    text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                   for r in range(n)]
        try:
            out = [p.communicate(timeout=timeout) for p in started]
        finally:
            for p in started:
                p.kill()
        for r, (p, (stdout, stderr)) in enumerate(zip(started, out)):
            assert p.returncode == 0, f"rank {r} ended with {p.returncode}:\n{stderr}"
        return [stdout for stdout, _ in out]
    return go


@pytest.fixture
def one_process(tmp_path):
    """one_process(code, *args): the same code as `ranks` without a group"""
    def go(code, *args, timeout=600):
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", without_pictures(code), *map(str, args)], env=env,
                              cwd=tmp_path, text=True, capture_output=True, timeout=timeout, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout
    return go


@pytest.fixture
def tiny_base(tmp_path, monkeypatch):
    """tiny_base(prompts): a random tiny model in ./base; and so many prompts of one's own, with a
    reward that has variance (digits)"""
    def make(prompts=0):
        import data
        from tests.models import nudged
        from train_gpt import GPT, GPTConfig
        tok = data.tokenizer("chars")
        shape = GPTConfig(tok.vocab_size, 2, 2, 1, 16, 32, 48, 256, 10000.0)
        model = nudged(GPT(shape).init_weights(0), 0, 0.05, matrices_only=True)
        model.save_hf(tmp_path / "base", tok)
        if prompts:
            rows = [json.dumps(dict(prompt=f"question {i}:")) + "\n" for i in range(prompts)]
            (tmp_path / "my.jsonl").write_text("".join(rows))
            (tmp_path / "my.py").write_text("def score(problem, text):\n"
                                            "    return sum(c in '0123456789' for c in text) / 8\n")
        monkeypatch.chdir(tmp_path)
    return make
