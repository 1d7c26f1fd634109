"""
records/readme.py: writes into README.md what is counted or recorded, so that no number there is typed by hand.

    python records/readme.py

    lines of the files     rounded to tens, in the map
    <!-- fits -->          the table of `python -m bench fits`
    <!-- speedrun -->      records/speedrun.md, as `python -m bench speedrun` wrote it, and records/speedrun.png if it is there
    <!-- bench -->         from records/bench/NAME.txt, what `python -m bench NAME | tee ...` printed: its tables, or else its ratios;
                           records/bench/NAME.png is shown with them
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench import fits  # noqa: E402  (a script in a folder of its own finds the rest of the house one floor up)
from bench.__main__ import flat  # noqa: E402

RATIO = re.compile(r"times|vs_|_x$|speed$|accuracy$| se$|closed|cosine")      # of a benchmark's numbers, those that a reader asks for


def counted(text):
    """The map with the lines of each file as they are now; a file that is not there keeps its row for the one who adds it."""
    def row(found):
        path = ROOT / found[1]
        lines = round(len(path.read_text().splitlines()), -1) if path.is_file() else int(found[2])
        return f"| `{found[1]}` | {lines} |"
    return re.sub(r"^\| `([\w/]+\.py)` \| (\d+) \|", row, text, flags=re.M)


def speedrun():
    path, picture = ROOT / "records/speedrun.md", ROOT / "records/speedrun.png"
    if not path.is_file():
        return "The speedrun was not recorded yet: `./speedrun.sh`, then copy `runs/speedrun.md` and `runs/speedrun.png` to `records/`."
    return path.read_text().strip() + ("\n\n![the stages of the speedrun](records/speedrun.png)" if picture.is_file() else "")


def tables(said):
    """The tables that a benchmark printed, each under the line that says what it is."""
    out, heading = [], ""
    for line, before in zip(said, ["", *said]):
        if line.startswith("|"):
            out += [line] if before.startswith("|") else ["", heading, "", line]
        elif line.strip():
            heading = line
    return out[1:]


def benchmarks():
    """Tables as they were printed, with a picture if there is one; of a benchmark without tables its ratios."""
    folded, lines = [], []
    for path in sorted((ROOT / "records/bench").glob("*.txt")):
        said = path.read_text().strip().splitlines()
        command = next((line[5:] for line in said if line.startswith("---- ")), path.stem)
        found, picture = tables(said), path.with_suffix(".png")
        if found:
            folded += [f"<details><summary><code>python -m bench {command}</code></summary>", "", *found, ""]
            folded += [f"![{path.stem}](records/bench/{picture.name})", ""] * picture.is_file() + ["</details>", ""]
            continue
        for key, value in flat(json.loads(said[-1])):
            if RATIO.search(key):
                lines.append(f"| `python -m bench {command}` | {key.replace('_', ' ')} | {value:.3g} |")
    if not folded and not lines:
        return "No benchmark was recorded yet: `python -m bench NAME | tee records/bench/NAME.txt`."
    return "\n".join(folded + (["| command | number | value |", "|---|---|---|", *lines] if lines else [])).strip()


def filled(text):
    """README.md with everything brought up to date."""
    blocks = {"fits": "\n".join(fits.table(fits.Config())[0]), "speedrun": speedrun(), "bench": benchmarks()}
    for name, block in blocks.items():
        text = re.sub(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", lambda found, block=block: block + "\n", text, count=1, flags=re.S)
    return counted(text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    print("wrote README.md")
