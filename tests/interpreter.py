"""
Triton kernels on a CPU.
"""
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def checks_interpreted(file):
    """Runs the check_* functions of a test file where Triton kernels run on the CPU: in a process of
    their own, since the interpreter is chosen when Triton is imported."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
               "-o", "python_functions=check_*", file]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    print(done.stdout[-300:])
