"""common/view.py: a picture from whatever numbers a run has"""
import json
import math
import shutil
import subprocess
from pathlib import Path

import matplotlib.figure
import matplotlib.image
import numpy as np
import pytest

from common import view

pytestmark = pytest.mark.pictures


def run(folder, rows):
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
    return folder


def rl(n=60, up=0.0):
    for s in range(1, n + 1):
        row = {"step": s, "reward": s / n + up, "loss": None if s == 3 else 0.1,
               "length": 10 + s, "entropy": 1 / s, "sampler_kl": 1e-6 * s,
               "zero_var": 0.5, "truncated": 0.0, "t_rollout": 1.0, "t_train": 0.5, "note": "a word"}
        if s % 20 == 0:
            row |= {"eval/avg": 0.5, "eval/avg_se": 0.02, "eval/pass@4": 0.8}
        if s in (1, n):
            row |= {"test/avg": 0.2 + s / n / 10, "test/avg_se": 0.02}
        yield row


def shape(path):
    return matplotlib.image.imread(path).shape[:2]


def test_curves_of_an_rl_run(tmp_path):
    path = view.curves(run(tmp_path / "a", rl()))
    assert path == tmp_path / "a/curves.png" and shape(path)[0] > 300
    found = view.panels({"a": view.read(tmp_path / "a")})
    titles = [t for t, _, _ in found]
    assert [k for _, k, _ in found[1:3]] == [["eval/avg", "eval/pass@4"],
                                             ["test/avg"]], "two sets of problems are two panels"
    assert titles[0] == "reward" and titles[1].startswith("eval") and titles[2].startswith("test")
    assert "standard error" in titles[1] and "standard error" in titles[2]
    assert "bits per byte" not in titles and "length (tokens)" in titles


def test_an_axis_says_its_numbers_themselves(tmp_path, monkeypatch):
    """lengths of 12.01 to 12.04 stood on the axis as 0.01 to 0.04, with "+1.2e1" in small print above"""
    above = []
    save = matplotlib.figure.Figure.savefig
    def look(self, *args, **kwargs):
        self.canvas.draw()
        above.extend(ax.yaxis.get_major_formatter().get_offset() for ax in self.axes if ax.get_visible())
        save(self, *args, **kwargs)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", look)
    view.curves(run(tmp_path / "a", [{"step": s, "length": 12.01 + s / 1000} for s in range(30)]))
    assert above == [""]


def test_missing_keys_and_damaged_rows(tmp_path):
    folder = run(tmp_path / "a", [{"step": 1, "loss": 2.0}, {"loss": 1.0},
                                  {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')
    assert view.read(folder) == {"loss": ([1, 3], [2.0, 1.0])}
    assert shape(view.curves(folder))[1] < shape(view.curves(run(tmp_path / "b", rl())))[1], (
        "one panel is narrower than many")


def test_smoothing_keeps_the_level():
    assert view.smooth([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    soft = view.smooth([math.sin(i) + 5 for i in range(1000)])
    assert len(soft) == 1000 and all(4.8 < v < 5.2 for v in soft[20:])


def test_overlay_prints_its_path(tmp_path, capsys):
    run(tmp_path / "a", rl())
    run(tmp_path / "b", rl(30, up=0.1))
    run(tmp_path / "c", [{"step": 1, "bpb": 2.0}, {"step": 2, "bpb": 1.0}])
    view.main([str(tmp_path / n) for n in "abc"])
    path = capsys.readouterr().out.strip()
    assert path == str(tmp_path / "overlay-a-b-c.png") and shape(path)[0] > 300


@pytest.mark.parametrize("make, words", [
    (lambda d: [], "python -m common.view"),
    (lambda d: [str(d / "nothing")], "no metrics.jsonl"),
    (lambda d: [str(run(d / "empty", []))], "no numbers"),
    (lambda d: [str(run(d / "odd", [{"step": 1, "temperature_outside": 3.0}]))], "none of the known"),
    (lambda d: [str(run(d / "good", rl(5))), str(d / "nothing")], "no metrics.jsonl"),
    (lambda d: [str(run(d / "good", rl(5))), "--html"], "give two folders or more"),
    (lambda d: ["--html"], "python -m common.view"),
    (lambda d: [str(run(d / "good", rl(5))), str(run(d / "other", rl(5))), "--htm"], "python -m common.view"),
])
def test_bad_input_is_one_line(tmp_path, capsys, make, words):
    argv = make(tmp_path)
    with pytest.raises(SystemExit) as e:
        view.main(argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.startswith("error: ")
    assert err.count("\n") == 1 and words in err
    assert not list(tmp_path.rglob("*.png")) and not list(tmp_path.rglob("*.html"))


def test_an_evaluations_size_is_not_drawn_beside_its_accuracy(tmp_path, monkeypatch):
    """1,000 problems on the axis of accuracies made every accuracy a line at zero; and the
    seconds of a whole step, stacked on those of its stages, doubled the step"""
    import matplotlib.axes
    drawn = []
    for name in ("plot", "stackplot", "fill_between"):
        plain = getattr(matplotlib.axes.Axes, name)
        monkeypatch.setattr(matplotlib.axes.Axes, name,
                            lambda self, *a, plain=plain, **k: drawn.append((a, k)) or plain(self, *a, **k))
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": s, "reward": 0.1, "eval/avg": 0.5, "eval/avg_se": 0.01,
             "eval/n": 1000, "eval/k": 4, "eval/length": 300.0,
             **({} if s == 2 else {"test/avg": 0.4, "test/avg_se": 0.01, "test/n": 1000}),
             "t_rollout": 1.0, "t_train": 2.0, "t_step": 700.0} for s in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view.curves(run)
    assert drawn
    numbers = [x for a, _ in drawn for part in a[1:]
               if hasattr(part, "__len__") and not isinstance(part, str) for x in np.ravel(part)]
    assert max(numbers) < 100


# --------------------------------------------------------------------------------------------------
# the page of samples

def sample(step, index, reward, text="7+1=8", finished="stop", **more):
    pieces = [*text, "<|end|>"]
    return {"step": step, "problem": 9, "index": index, "prompt": "C1 7=8:",
            "text": text, "pieces": pieces, "logprobs": [-0.25] * len(pieces),
            "advantage": reward - 0.5, "reward": reward, "finished": finished, **more}


def paged(folder, rows, tail=""):
    run(folder, rl(5))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return view.samples(folder)


def inside(page):
    return json.loads(page.read_text().split('id="rows">')[1].split("</script>")[0])


def test_the_page_holds_all_rows_and_loads_nothing(tmp_path):
    rows = [sample(1, 0, 1.0), sample(1, 1, 0.0), sample(2, 0, 1.0, "</script><b>3", "length")]
    page = paged(tmp_path / "a<b", rows, tail='{"step": 3, "pie')
    assert view.pages(tmp_path / "a<b") == [tmp_path / "a<b/curves.png", page]
    assert inside(page) == {"rows": rows, "note": ""}, (
        "a sample that says </script> does not end the page, a half line is left out")
    text = page.read_text()
    assert text.count("</script>") == 2 and "a&lt;b" in text
    assert not any(word in text for word in ("http:", "https:", "src=", "@import", "<link", "fetch(", "url("))


def test_a_run_without_samples_has_no_page(tmp_path):
    run(tmp_path / "a", rl(5))
    assert view.pages(tmp_path / "a") == [tmp_path / "a/curves.png"]
    assert paged(tmp_path / "b", [{"step": 1, "words": "not a sample"}]) is None
    assert not list(tmp_path.rglob("*.html"))


def test_a_long_run_is_thinned_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "MOST", 100)
    found = inside(paged(tmp_path / "a", [sample(s, i, 1.0) for s in range(1, 61) for i in range(2)]))
    steps = [row["step"] for row in found["rows"]]
    assert steps[0] == 1 and steps[-1] == 60 and sum(len(row["pieces"]) for row in found["rows"]) <= 100
    assert len(steps) == 2 * len(set(steps)) and "720 tokens" in found["note"]


JAVASCRIPT = """
const text = require("fs").readFileSync(process.argv[1], "utf8");
eval(text.split("<script>")[1].split("</script>")[0].replace('"use strict";', "") + `
const rows = JSON.parse(text.split('id="rows">')[1].split("</script>")[0]).rows;
const none = { step: "", low: "", high: "", truncated: "", words: "" };
const kept = f => rows.filter(row => keep(row, { ...none, ...f })).map(row => rows.indexOf(row));
console.log(JSON.stringify({
  all: kept({}), step: kept({ step: "1" }), right: kept({ low: "0.5" }), wrong: kept({ high: "0.5" }),
  cut: kept({ truncated: "yes" }), whole: kept({ truncated: "no" }), words: kept({ words: "9" }),
  colours: colours(rows), one: values(rows[0], "advantage"), apart: values(rows[3], "disagreement"),
  siblings: siblings(rows).map(group => group.map(row => rows.indexOf(row))), mean: mean(siblings(rows)[0]),
  no_teacher: values(rows[0], "disagreement"), scale: scale(rows, "advantage"),
  tints: [tint(0.5, 0.5), tint(-5, 0.5), tint(0, 0.5), tint(null, 0.5)] }));`);
"""


def awkward(folder):
    return paged(folder, [sample(1, 0, 1.0), sample(1, 1, 0.0), sample(2, 0, 1.0, "9+1=8", "length"),
                          sample(3, 0, 0.0, "8", disagreement=[-0.25, None], advantage=[0.0, 0.0])])


def test_what_the_page_shows(tmp_path):
    """the script of the page without the page: its filters and colours are functions of rows"""
    node = shutil.which("node")
    if not node:
        pytest.skip("no node")
    done = subprocess.run([node, "-e", JAVASCRIPT, awkward(tmp_path / "a")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["all"], found["step"], found["right"],
            found["wrong"]) == ([0, 1, 2, 3], [0, 1], [0, 2], [1, 3])
    assert (found["cut"], found["whole"], found["words"]) == ([2], [0, 1, 3], [2])
    assert found["siblings"] == [[0, 1], [2], [3]] and found["mean"] == 0.5
    assert found["colours"] == ["disagreement", "advantage", "logprobs"]
    assert found["one"] == [0.5] * 6, "one advantage of a sample is every token's"
    assert found["apart"] == [-0.25, None] and found["no_teacher"] == [None] * 6 and found["scale"] == 0.5
    blue, red, *nothing = found["tints"]
    assert blue == "rgb(60 120 230 / 0.60)" and red == "rgb(225 60 50 / 0.60)" and nothing == ["", ""]


def test_the_page_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no browser")
    page = awkward(tmp_path / "a")

    def shown(at):
        words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu",
                 f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
        done = subprocess.run([*words, f"file://{page}{at}"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    last, right = shown(""), shown("#step=&low=0.5&colour=logprobs")
    assert (last.count("<article") == 1 and "1 of 4 samples" in last
            and "225 60 50" in last), "it opens at the last step, disagreement red"
    assert right.count("<article") == 3 and right.count('<article class="worse other"') == 1, (
        "the wrong sibling of a right sample stands beside it, pale")
    assert "2 of 4 samples" in right and "truncated</span>" in right


# --------------------------------------------------------------------------------------------------
# the page that compares runs

def compared(folder, names="ab", tasks=("countdown", "countdown")):
    folders = []
    for i, (name, task) in enumerate(zip(names, tasks)):
        one = run(folder / name, rl(60, up=0.1 * i))
        (one / "config.json").write_text(json.dumps({"name": name, "task": task, "lr": 0.1 * i, "n": 2}))
        rows = [sample(2, 0, 1.0, f"{name}</script>"), sample(2, 1, float(i))]
        rows += [sample(3, 0, 0.0) | {"prompt": f"only {name}"}]
        (one / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        folders.append(one)
    return folders


def test_a_page_of_two_runs(tmp_path, capsys):
    view.main([*map(str, compared(tmp_path)), "--html"])
    page = Path(capsys.readouterr().out.strip())
    assert page == tmp_path / "compare-a-b.html"
    text = page.read_text()
    assert text.count("</script>") == 2
    assert not any(word in text for word in ("http:", "https:", "src=", "@import", "<link", "fetch(", "url("))
    found = inside(page)
    assert [r["name"] for r in found["runs"]] == ["a", "b"] and found["note"] == ""
    assert found["differ"] == [["lr", [0.0, 0.1]]]
    assert found["same"] == [["task", ["countdown"] * 2], ["n", [2, 2]]], "a run's name is no choice"
    charts = {chart["title"]: chart["lines"] for chart in found["charts"]}
    assert [line["run"] for line in charts["reward"]] == [0, 1]
    assert charts["reward"][0]["values"][:2] == [0.016667, 0.033333]
    assert charts["avg, eval: valid split, +- standard error"][1]["errors"] == [0.02] * 3
    assert charts["seconds per step"][0]["values"] == [1.5] * 60
    problem, = found["problems"]                 # not those prompts that one run alone sampled
    assert problem["prompt"] == "C1 7=8:" and "1 problems" in found["found"]
    (step, group), = problem["visits"][1]
    assert step == 2 and [(s["index"], s["reward"], s["text"]) for s in group] == [
        (0, 1.0, "b</script>"), (1, 1.0, "7+1=8")]


def test_runs_of_different_tasks_have_curves_alone(tmp_path, capsys):
    view.main([*map(str, compared(tmp_path, tasks=("countdown", "arith"))), "--html"])
    found = inside(Path(capsys.readouterr().out.strip()))
    assert "different tasks (countdown, arith)" in found["note"] and found["charts"]
    assert found["problems"] == found["differ"] == found["same"] == []


def test_a_page_of_long_runs_is_thinned(tmp_path, monkeypatch):
    monkeypatch.setattr(view, "POINTS", 20)
    monkeypatch.setattr(view, "PROBLEMS", 2)
    folders = compared(tmp_path)
    for folder in folders:
        rows = [sample(s, 0, 1.0) | {"prompt": f"C{s}"} for s in range(1, 6)]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = inside(view.compare(folders, {f.name: view.read(f) for f in folders}))
    assert found["charts"][0]["lines"][0]["steps"] == list(range(1, 61, 3))
    assert [p["prompt"] for p in found["problems"]] == ["C1", "C4"]
    assert found["found"] == "5 problems were sampled by two runs or more; one in 3 of them is here."


COMPARE = """
const text = require("fs").readFileSync(process.argv[1], "utf8");
eval(text.split("<script>")[1].split("</script>")[0].replace('"use strict";', "") + `
const line = { steps: [1, 3, 5], values: [1, 2, 3], errors: [] };
console.log(JSON.stringify({
  ticks: [ticks(0, 1, 5), ticks(12.01, 12.04, 5), ticks(-3, 220, 5)],
  powers: [powers(1e-6, 1e-2), powers(0.003, 0.07)],
  near: [-9, 1.9, 2.1, 4, 99].map(x => nearest(line.steps, x)), read: reading(line, 4.9),
  short: [null, 0, 1e-12, 0.123456, 1234567].map(short),
  soft: smooth([...Array(200).keys()]).slice(-2) }));`);
"""


def test_what_the_page_of_two_runs_calculates(tmp_path):
    node = shutil.which("node")
    if not node:
        pytest.skip("no node")
    folders = compared(tmp_path)
    page = view.compare(folders, {f.name: view.read(f) for f in folders})
    done = subprocess.run([node, "-e", COMPARE, page], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ticks"] == [[0, 0.2, 0.4, 0.6, 0.8, 1], [12.01, 12.02, 12.03, 12.04],
                              [0, 50, 100, 150, 200]]
    assert found["powers"] == [[1e-6, 1e-5, 1e-4, 1e-3, 1e-2], [0.005, 0.01, 0.02, 0.05]]
    assert found["near"] == [0, 0, 1, 1, 2] and found["short"] == ["–", "0", "1e-12", "0.12346", "1234600"]
    assert found["read"] == {"step": 5, "value": 3, "mean": 3, "error": None}
    assert found["soft"] == view.smooth(list(map(float, range(200))))[-2:], "the same mean as curves.png"


def test_the_page_of_two_runs_in_a_browser(tmp_path):
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not browser:
        pytest.skip("no browser")
    folders = compared(tmp_path)
    page = view.compare(folders, {f.name: view.read(f) for f in folders})
    words = [browser, "--headless=new", "--no-sandbox", "--disable-gpu",
             f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run([*words, f"file://{page}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("<figure>") == 9 and done.stdout.count("<article") == 4
    assert "--lr" in done.stdout and "b&lt;/script&gt;" in done.stdout
