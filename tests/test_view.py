"""common/view.py: a picture from whatever numbers a run has"""
import json
import math

import matplotlib.image
import numpy as np
import pytest

from common import view


def run(folder, rows):
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")
    return folder


def rl(n=60, up=0.0):
    for s in range(1, n + 1):
        row = {"step": s, "reward": s / n + up, "loss": None if s == 3 else 0.1, "length": 10 + s, "entropy": 1 / s, "sampler_kl": 1e-6 * s,
               "zero_var": 0.5, "truncated": 0.0, "t_rollout": 1.0, "t_train": 0.5, "note": "a word"}
        if s % 20 == 0:
            row |= {"eval/countdown/avg@4": 0.5, "eval/countdown/avg@4_se": 0.02, "eval/countdown/pass@4": 0.8}
        yield row


def shape(path):
    return matplotlib.image.imread(path).shape[:2]


def test_curves_of_an_rl_run(tmp_path):
    path = view.curves(run(tmp_path / "a", rl()))
    assert path == tmp_path / "a/curves.png" and shape(path)[0] > 300
    titles = [t for t, _, _ in view.panels({"a": view.read(tmp_path / "a")})]
    assert titles[0] == "reward" and titles[1].startswith("eval countdown") and "standard error" in titles[1]
    assert "bits per byte" not in titles and "length (tokens)" in titles


def test_missing_keys_and_damaged_rows(tmp_path):
    folder = run(tmp_path / "a", [{"step": 1, "loss": 2.0}, {"loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 1.0}])
    with open(folder / "metrics.jsonl", "a") as f:
        f.write('{"step": 4, "lo')
    assert view.read(folder) == {"loss": ([1, 3], [2.0, 1.0])}
    assert shape(view.curves(folder))[1] < shape(view.curves(run(tmp_path / "b", rl())))[1], "one panel is narrower than many"


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
])
def test_bad_input_is_one_line(tmp_path, capsys, make, words):
    argv = make(tmp_path)
    with pytest.raises(SystemExit) as e:
        view.main(argv)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.rglob("*.png"))


def test_an_evaluations_size_is_not_drawn_beside_its_accuracy(tmp_path, monkeypatch):
    """1,000 problems on the axis of accuracies made every accuracy a line at zero; and the seconds of a whole step, stacked on those of its
    stages, doubled the step"""
    import matplotlib.axes
    drawn = []
    for name in ("plot", "stackplot", "fill_between"):
        plain = getattr(matplotlib.axes.Axes, name)
        monkeypatch.setattr(matplotlib.axes.Axes, name, lambda self, *a, plain=plain, **k: drawn.append((a, k)) or plain(self, *a, **k))
    run = tmp_path / "run"
    run.mkdir()
    rows = [{"step": s, "reward": 0.1, "eval/avg": 0.5, "eval/avg_se": 0.01, "eval/n": 1000, "eval/k": 4, "eval/length": 300.0,
             "t_rollout": 1.0, "t_train": 2.0, "t_step": 700.0} for s in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    view.curves(run)
    assert drawn
    numbers = [x for a, _ in drawn for part in a[1:] if hasattr(part, "__len__") and not isinstance(part, str) for x in np.ravel(part)]
    assert max(numbers) < 100
