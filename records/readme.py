"""
records/readme.py: writes into README.md and records/bench.md what is counted or recorded, so that
no number there is typed by hand.

    python records/readme.py

    README.md
        lines of the files     rounded to tens, in the map
        <!-- fits -->          the table of `python -m bench fits`
        <!-- speedrun -->      records/speedrun.md, as `python -m bench speedrun` wrote it, and its picture
    records/bench.md
        <!-- bench -->         from records/bench/NAME.txt, what `python -m bench NAME | tee ...`
                               printed: its tables, or else its ratios; and NAME.png. A line "# ..."
                               of the file is a note that goes with them
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))          # a script in a folder of its own finds the rest one floor up
from bench import fits  # noqa: E402
from bench.__main__ import flat  # noqa: E402

# of a benchmark's numbers, those that a reader asks for
RATIO = re.compile(r"times|vs_|_x$|speed$|accuracy$| se$|closed|cosine|^gflops")


def counted(text):
    """The map with the lines of each file today; a file that is missing keeps its row for the
    one who adds it."""
    def row(found):
        path = ROOT / found[1]
        lines = int(found[2])
        if path.is_file():
            lines = round(len(path.read_text().splitlines()), -1)
        return f"| `{found[1]}` | {lines} |"
    return re.sub(r"^\| `([\w/]+\.py)` \| (\d+) \|", row, text, flags=re.M)


def speedrun():
    path = ROOT / "records/speedrun.md"
    if not path.is_file():
        return ("The speedrun was not recorded yet: `./speedrun.sh`, "
                "then copy `runs/speedrun.md` and `runs/speedrun.png` to `records/`.")
    text = path.read_text().strip()
    if path.with_suffix(".png").is_file():
        text += "\n\n![the stages of the speedrun](records/speedrun.png)"
    return text


def tables(printed):
    """The tables that a benchmark printed, each under the line that says what it is."""
    out, heading = [], ""
    for line, before in zip(printed, ["", *printed]):
        if line.startswith("|"):
            out += [line] if before.startswith("|") else ["", heading, "", line]
        elif line.strip():
            heading = line
    return out[1:]


def benchmarks():
    """Tables as they were printed, with a picture if there is one; of a benchmark without
    tables its ratios."""
    folded, ratios, remarks = [], [], []
    for path in sorted((ROOT / "records/bench").glob("*.txt")):
        lines = path.read_text().strip().splitlines()
        notes = [line[2:] for line in lines if line.startswith("# ")]
        printed = [line for line in lines if not line.startswith("# ")]
        command = next((line[5:] for line in printed if line.startswith("---- ")), path.stem)
        found = tables(printed)
        if found:
            folded += [f"<details><summary><code>python -m bench {command}</code></summary>",
                       "", *notes, "", *found, ""]
            if path.with_suffix(".png").is_file():
                folded += [f"![{path.stem}](bench/{path.stem}.png)", ""]
            folded += ["</details>", ""]
            continue
        for key, value in flat(json.loads(printed[-1])):
            if RATIO.search(key):
                ratios.append(f"| `python -m bench {command}` | {key.replace('_', ' ')} | {value:.3g} |")
        remarks += [f"- `python -m bench {command}`: {note}" for note in notes]
    if ratios:
        ratios = ["| command | number | value |", "|---|---|---|", *ratios, "", *remarks]
    if not folded and not ratios:
        return "No benchmark was recorded yet: `python -m bench NAME | tee records/bench/NAME.txt`."
    return "\n".join(folded + ratios).strip()


def filled(text):
    """A page with everything brought up to date. What has no marker on it stays."""
    makers = {"fits": lambda: "\n".join(fits.table(fits.Config())[0]),
              "speedrun": speedrun, "bench": benchmarks}
    for name in re.findall(r"<!-- (\w+) -->\n", text):
        if name in makers:
            marked = rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)"
            block = makers[name]() + "\n"
            text = re.sub(marked, lambda found, block=block: block, text, count=1, flags=re.S)
    return counted(text)


if __name__ == "__main__":
    for page in ("README.md", "records/bench.md"):
        path = ROOT / page
        path.write_text(filled(path.read_text()))
        print(f"wrote {page}")
