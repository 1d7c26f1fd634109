"""docs/cluster.md: the commands of two nodes, here as two launchers on one machine, and what they
must not change"""
import json
import math
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import nanorl
from train_gpt import GPT

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def flags(tiny_base):
    tiny_base(60)
    return ("--init base --data my.jsonl --reward my.py:score --device cpu --threads 1 --prompts 5 "
            "--n 4 --max-new 10 --steps 2 --lr 1e-2 --eval-n 4 --final-n 4 --eval-every 0 "
            "--save-every 1 --warmup 1 --workers 1 --row-tokens 128 --muon-lr 1e-2").split()


def launch(words):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *words], env=env, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


def last(name):
    return json.loads(Path(f"runs/{name}/metrics.jsonl").read_text().splitlines()[-1])


@pytest.mark.timeout(900)      # five interpreters that start: seconds on two free cores, minutes on busy ones
def test_two_nodes_equal_one_process(flags):
    """two launchers that meet at an address, a rank each: AdamW sharded by rows, Muon's matrices
    dealt, and the same weights in the end. Without the -- before the script the launcher reads
    our --n as short for --nnodes, finds that it could be --node-rank too, and stops"""
    script = str(ROOT / "nanorl.py")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    nodes = [launch(["-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}",
                     "--nproc_per_node=1", "--master_addr=127.0.0.1", f"--master_port={port}", "--",
                     script, *flags, "--name", "two"]) for node in range(2)]
    try:
        nanorl.main([*flags, "--name", "one"])
        for process in nodes:
            out, _ = process.communicate(timeout=600)
            assert process.returncode == 0, out
    finally:
        for process in nodes:
            process.kill()
    assert len(list(Path("runs/two/ckpt/step_2").glob("state_*_of_2.pt"))) == 2, (
        "a rank writes its own share of the optimizer")
    base, one, two = (GPT.from_hf(path).state_dict()
                      for path in ("base", "runs/one/ckpt/step_2", "runs/two/ckpt/step_2"))
    # compared with the way they went: where a gradient is nearly 0, both optimizers make whole
    # steps of its rounding
    for k in base:
        assert (0 < (one[k] - base[k]).norm()
                and (one[k] - two[k]).norm() < 0.01 * (one[k] - base[k]).norm()), k
    a, b = last("one"), last("two")
    assert all(math.isclose(a[k], b[k], rel_tol=1e-4)
               for k in ("reward", "length", "entropy", "grad_norm", "test/avg"))


def test_the_page_names_flags_that_exist():
    """torchrun takes flags with dashes or underscores; a word that it does not know would end the
    job on every node"""
    text = (ROOT / "docs/cluster.md").read_text().replace("\\\n", " ")
    lines = [line.split("torchrun", 1)[1].split(";")[0] for line in text.splitlines()
             if "torchrun --" in line]
    from torch.distributed.run import get_args_parser
    known = {s.lstrip("-").replace("-", "_") for action in get_args_parser()._actions
             for s in action.option_strings}
    assert len(lines) == 4
    for line in lines:
        launcher, ours = line.split(" -- ")
        assert {word.replace("-", "_") for word in re.findall(r"--([\w-]+)", launcher)} <= known, launcher
        assert ({word.replace("-", "_") for word in re.findall(r"--([\w-]+)", ours)}
                <= set(nanorl.Config.__dataclass_fields__)), ours
