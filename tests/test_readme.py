"""README.md says what is true: the map, the loop, the commands, the metrics, the links, and the
four diffs that make it yours"""
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import data
from common.flags import flags
from tests.models import nudged
from train_gpt import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "records"))
import readme  # noqa: E402  (a script of records/)

PAGES = ["README.md", "AGENTS.md", "CONTRIBUTING.md", "CHANGES.md"]
PAGES += sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").glob("*.md"))
PAGES += ["records/README.md", "records/negative.md"]
# their commands are of their time
RECORDS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "records").glob("*.md"))
TEXT = (ROOT / "README.md").read_text()
BENCHES = (ROOT / "records/bench.md").read_text()


def test_the_map_is_true():
    """every file of the root has a row, with its lines within a twentieth:
    `python records/readme.py` counts them again"""
    rows = {name: int(lines) for name, lines in re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", TEXT, re.M)}
    here = {p.name for p in ROOT.glob("*.py")} | {f"common/{p.name}" for p in (ROOT / "common").glob("*.py")
                                                  if p.stem != "__init__"}
    assert here <= set(rows), f"no row: {here - set(rows)}"
    for name in here:
        lines = len((ROOT / name).read_text().splitlines())
        assert abs(rows[name] - lines) <= max(10, lines / 20), (
            f"{name}: {lines} lines, the map says {rows[name]}: python records/readme.py")


def test_what_is_recorded_is_what_is_shown():
    """the tables between the markers are those of records/: edit the record and run
    `python records/readme.py`, never the number"""
    def blocks(text):
        return re.findall(r"<!-- (\w+) -->\n(.*?)<!-- end -->", text, re.S)
    assert [name for name, _ in blocks(TEXT)] == ["speedrun", "fits"]
    assert [name for name, _ in blocks(BENCHES)] == ["bench"]
    assert blocks(readme.filled(TEXT)) == blocks(TEXT)
    assert blocks(readme.filled(BENCHES)) == blocks(BENCHES)


def test_every_record_says_of_which_commit_it_is():
    """a number without its commit is a rumour: the base that most runs start from has changed
    with the optimizer"""
    pages = [p for p in (ROOT / "records").glob("*.md")
             if p.name not in ("bench.md", "definitions.md", "equality.md")]
    for path in [*pages, *(ROOT / "records/bench").glob("*.txt")]:
        assert re.search(r"[Mm]easured at `?[0-9a-f]{7,9}`?", path.read_text()), path.name


def test_records_become_tables(tmp_path, monkeypatch):
    (tmp_path / "records/bench").mkdir(parents=True)
    (tmp_path / "kernels.py").write_text("x = 1\n" * 43)
    text = ("| `kernels.py` | 900 | 45 |\n| `later.py` | 70 | 1 |\n<!-- speedrun -->\n<!-- end -->\n"
            "<!-- bench -->\nold\n<!-- end -->\n<!-- other -->\nkept\n<!-- end -->\n")
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    assert "not recorded yet" in readme.filled(text) and "No benchmark" in readme.filled(text)
    assert "old" not in readme.filled(text)
    (tmp_path / "records/speedrun.md").write_text("| stage |\n")
    (tmp_path / "records/bench/pack.txt").write_text(
        '---- pack --parts c\nwords\n{"bench": "pack", "times_padded": 4.9231, "tok_s": 1}\n')
    found = readme.filled(text)
    assert "| `kernels.py` | 40 | 45 |" in found and "| `later.py` | 70 | 1 |" in found
    assert "<!-- speedrun -->\n| stage |\n<!-- end -->" in found
    assert "| `python -m bench pack --parts c` | times padded | 4.92 |" in found and "tok" not in found
    assert "<!-- other -->\nkept\n<!-- end -->" in found
    assert readme.filled(found) == found
    # a table with its heading and its note; a note of a benchmark without tables stands below the ratios
    table = "# Measured at abc1234.\n---- tail\nwords\n\ntwo ranks\n\n| mode |\n|---|\n| race |\n"
    (tmp_path / "records/bench/tail.txt").write_text(table + '{"bench": "tail", "race": 1.5}\n')
    pack = tmp_path / "records/bench/pack.txt"
    pack.write_text("# Measured at def5678.\n" + pack.read_text())
    found = readme.filled(text)
    assert ("tail</code></summary>\n\nMeasured at abc1234.\n\ntwo ranks\n"
            "\n| mode |\n|---|\n| race |\n" in found)
    assert found.index("4.92 |") < found.index("- `python -m bench pack --parts c`: Measured at def5678.")


@pytest.mark.parametrize("page", sorted({*PAGES, *RECORDS}))
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    heads = {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
             for head in re.findall(r"^#+ (.+)$", text, re.M)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in heads, f"{page}: no heading {target}"
        elif not target.startswith("http"):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: no file {target}"


# --------------------------------------------------------------------------------------------------
# the loop near the top

def test_the_loop_runs(tmp_path, monkeypatch):
    """twelve lines, saved as a file: two steps from a tiny base, each with its mean reward"""
    loop, = re.findall(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    assert len(loop.splitlines()) == 12 and TEXT.index(loop) < TEXT.index("**Contents:**")
    for word in ("setup(", "next_problems(", "collect(", "advantage(", "update(", "step("):
        assert word in loop
    monkeypatch.chdir(tmp_path)
    logged("train_gpt", "--n-layer 1 --d-model 16 --n-head 1 --n-kv-head 1 "
           "--d-ff 24 --steps 2 --batch 4 --eval-docs 4", "base")
    (tmp_path / "loop.py").write_text(
        loop.replace("range(100)", "range(2)").replace("prompts=32", "prompts=32, max_new=8, workers=1"))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "loop.py"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len([float(line) for line in done.stdout.splitlines()]) == 2


def test_it_stays_short():
    assert len(TEXT.splitlines()) <= 420 and len((ROOT / "AGENTS.md").read_text().splitlines()) <= 60


# --------------------------------------------------------------------------------------------------
# commands

def commands(text):
    """every command in a fenced block or in backticks, without its comment"""
    fences = re.findall(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)
    blocks = [line for kind, block in fences if not kind for line in block.replace("\\\n", " ").splitlines()]
    found = [line.split("  #")[0].strip() for line in [*blocks, *re.findall(r"`([^`\n]+)`", text)]]
    found = [line for line in found if re.match(r"(\./|python |torchrun )", line)]
    # those are patterns, no commands
    return [line for line in found if not any(word in line for word in ("...", "NAME", " RUN"))]


COMMANDS = sorted({line for page in PAGES for line in commands((ROOT / page).read_text())})


def test_commands_are_found():
    assert len(COMMANDS) > 25 and "python nanorl.py --name mine" in COMMANDS
    assert any(line.startswith("torchrun") for line in COMMANDS)


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_can_be_read(line):
    """the file is there, and its Config takes every flag; a script that another change brings is
    left to that change"""
    line = line.replace("--trust spo", "--trust clip")           # the diff above that command adds spo
    words = shlex.split(line.split("|")[0].replace("SEED", "0"))
    if words[0] == "torchrun":
        if len(words) > 2:
            assert (words[2] == "--"
                    or "--n" not in words), f"{line}: torchrun would take --n for one of its own flags"
            words = ["python", *[word for word in words if word != "--"][2:]]
        else:
            words = words[:1]
    if words[0].startswith("./"):
        script = ROOT / words[0]
        assert script.exists()
        assert set(words[1:]) <= {"--install", "dev", "gym", "base", "rl", "ttrl", "student", "opd", "table"}
        return
    if words[1:2] == ["-m"]:
        module, words = words[2], words[2:]
        if module == "bench" and words[1:] and words[1] != "all":
            module, words = f"bench.{words[1]}", words[1:]
    elif len(words) > 1:
        module, words = words[1].removesuffix(".py").replace("/", "."), words[1:]
    else:
        return
    path = ROOT / f"{module.replace('.', '/')}.py"
    if module in ("opd", "opd_check", "bench.tail", "bench.opd", "bench.simulate") and not path.exists():
        pytest.skip(f"{module} is not here")
    assert path.exists() or (path.with_suffix("") / "__main__.py").exists(), line
    if words[1:] and module.split(".")[0] not in ("records", "common", "data") and words[1] != "all":
        flags(importlib.import_module(module).Config, words[1:])


# --------------------------------------------------------------------------------------------------
# diffs

DIFFS = re.findall(r"^```diff\n(--- .*?)^```", TEXT, re.M | re.S)
TRY = """
import json, math, sys
from pathlib import Path
import torch
import algos, data, nanorl, train_gpt
from common import view
from train_gpt import GPT, GPTConfig
view.pages = lambda folder: None
tok = data.tokenizer("numbers")
model = GPT(GPTConfig(tok.vocab_size, 4, 2, 1, 16, 32, 48, 256, 10000.0)).init_weights(0)
g = torch.Generator().manual_seed(0)
for p in model.parameters():
    p.data.add_(torch.randn(p.shape, generator=g) * 0.05)
model.save_hf("base", tok)
Path("digits.py").write_text("def score(problem, text):\\n"
                             "    return sum(c in '0123456789' for c in text) / 8\\n")

# the task
task = data.load("sort")
a, b = task.problems("train", 30, 0), task.problems("test", 30, 0)
assert task.reward(a[0], a[0].gold) == 1 and task.reward(a[0], a[0].gold[::-1] + " 1") == 0
assert not {p.prompt for p in a} & {p.prompt for p in b}
document, _ = train_gpt.documents(train_gpt.Config(data="sort"), tok)
assert sum(document("train", 3)[1]) > 5

def run(*words):
    nanorl.main(["--init", "base", "--device", "cpu", "--threads", "1", "--workers", "1",
                 "--prompts", "6", "--n", "4", "--steps", "1", "--max-new", "12", "--problems", "12",
                 "--eval-n", "2", "--eval-k", "1", "--final-n", "2", "--eval-every", "0", *words])
    name = words[words.index("--name") + 1]
    return [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()][-1]

# attention: the sampler over its cache and the trainer over packed rows agree, and the layers
# without positions are in both
m = run("--name", "task", "--task", "sort", "--reward", "digits.py:score", "--max-new", "16")
assert m["sampler_max"] < 1e-5
from kernels import packed_attention
tokens = torch.tensor([7, 8, 9])
assert all(torch.equal(model.blocks[layer](x, cos, sin, packed_attention([0, 3], 3), layer),
                       model.blocks[layer](x, one, zero, packed_attention([0, 3], 3), layer))
           == (layer == 2) for layer in range(4)
           for x, cos, sin, one, zero in [(model.embed(tokens), torch.rand(3, 8), torch.rand(3, 8),
                                           torch.ones(3, 8), torch.zeros(3, 8))])

# the reward
import minus
problem = data.load("countdown").problems("train", 1, 0)[0]
assert minus.score(problem, problem.gold) == 1 - problem.gold.count("-") / 3 and minus.score(problem, "") == 0
assert run("--name", "reward", "--reward", "minus.py:score")["reward_failed"] == 0

# the loss: where the ratio is within, as PPO; outside, a way back
x, A = torch.tensor([0.0, 0.5, -0.5], requires_grad=True), torch.tensor([1.0, 1.0, -1.0])
slope, = torch.autograd.grad(algos.TRUSTS["spo"](x, A, 0.2, 0.2, x).sum(), x)
assert slope[0] == 1 and slope[1] < 0 < slope[2]
m = run("--name", "loss", "--trust", "spo", "--reward", "digits.py:score", "--minibatch", "3", "--lr", "1e-2")
assert m["grad_norm"] > 0 and math.isfinite(m["clipped"])
print("all four")
"""


def test_the_diffs_apply_and_run(tmp_path):
    """a task, a reward, a loss and an attention, each in ten lines or fewer, all in one tree"""
    assert len(DIFFS) == 4
    for name in ("common", "data"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    for i, diff in enumerate(DIFFS):
        changed = [line for line in diff.splitlines() if re.match(r"[+-](?![+-]{2} )", line)]
        assert 1 <= len(changed) <= 10, diff
        (tmp_path / f"{i}.diff").write_text(diff)
        done = subprocess.run(["git", "apply", f"{i}.diff"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{done.stderr}\n{diff}"
    done = subprocess.run([sys.executable, "-c", TRY], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "all four" in done.stdout, done.stdout[-2000:] + done.stderr[-4000:]


# --------------------------------------------------------------------------------------------------
# metrics

@pytest.fixture
def base(tmp_path, monkeypatch):
    tok = data.tokenizer("numbers")
    shape = GPTConfig(tok.vocab_size, 1, 1, 1, 8, 16, 24, 512, 10000.0)
    model = nudged(GPT(shape).init_weights(0), 0, 0.05)
    model.save_hf(tmp_path / "base", tok)
    (tmp_path / "digits.py").write_text("def score(problem, text):\n"
                                        "    return sum(c in '0123456789' for c in text) / 8\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def logged(script, words, name):
    importlib.import_module(script).main([*words.split(), "--device", "cpu",
                                          "--threads", "1", "--name", name])
    rows = [json.loads(line) for line in Path("runs", name, "metrics.jsonl").read_text().splitlines()]
    return {key for row in rows for key in row}


def described():
    """the names in the first cells of the tables, and what the rows say of others like them"""
    cells = [line.split("|")[1]
             for line in TEXT.split("## Every metric")[1].split("## What fits")[0].splitlines()
             if line.startswith("| ")]
    return {name for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def plain(key):
    """eval/trained/avg_se -> eval/avg, test/avg -> eval/avg, pass@16 -> pass@2, overlap/64 -> overlap"""
    key = re.sub(r"^(eval/(trained|unseen)|test)/", "eval/", key).removesuffix("_se")
    return re.sub(r"/\d+$", "", re.sub(r"pass@\d+", "pass@2", key))


RL = ("--init base --prompts 4 --n 4 --max-new 10 --steps 2 --workers 1 "
      "--eval-every 1 --eval-n 3 --eval-k 2 --reward digits.py:score")


def test_every_metric_is_described(base):
    from nanorl import Config
    names = described()
    runs = {"pretraining": ("train_gpt", "--n-layer 1 --d-model 16 --n-head 1 "
                            "--n-kv-head 1 --d-ff 24 --steps 2 --batch 4 --eval-docs 4"),
            "rl": ("nanorl", f"{RL} --problems 16 --final-n 3 --row-tokens 256"),
            "vote": ("ttrl", "--init base --questions 4 --unseen-n 2 --votes 4 --samples 2 --min-votes 1 "
                     "--prompts 2 --passes 2 --eval-k 2 --max-new 30 --workers 1 --row-tokens 512")}
    if "tail_batching" in Config.__dataclass_fields__:
        runs["tail"] = ("nanorl", f"{RL} --problems 16 --final-n 3 --row-tokens 256 --tail-batching prompt")
    if (ROOT / "opd.py").exists():
        runs["teacher"] = ("opd", "--init base --teacher base --prompts 4 --max-new 10 --steps 2 "
                           "--workers 1 --eval-every 1 --eval-n 2 --eval-k 2 --final-n 2 --problems 16")
    for name, (script, words) in runs.items():
        missing = {plain(key) for key in logged(script, words, name)} - names - {"step"}
        assert not missing, f"{script} logs what README.md does not describe: {sorted(missing)}"


# --------------------------------------------------------------------------------------------------
# docs/bugs.md

def test_every_bug_has_a_public_thread_and_a_test_that_exists():
    """a promise without a test is a hope: each row names its tests, and each name is a function that is
    here"""
    text = (ROOT / "docs/bugs.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| what")]
    assert len(rows) >= 15
    for row in rows:
        told, why, held = (cell.strip() for cell in row.strip("|").rsplit("|", 2))
        assert "https://github.com/" in told or "seen in the code" in told, told
        names = re.findall(r"`tests/(\w+\.py)::(test_\w+)`", held)
        assert why and names, told
        for file, name in names:
            assert f"\ndef {name}(" in (ROOT / "tests" / file).read_text(), f"{file} has no {name}"
