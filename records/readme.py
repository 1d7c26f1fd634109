"""
records/readme.py: writes into README.md what is counted or recorded, so that no number there is typed by hand.

    python records/readme.py

    lines of the files     rounded to tens, in the map
    <!-- speedrun -->      records/speedrun.md, as `python -m bench speedrun` wrote it, and records/speedrun.png if it is there
    <!-- bench -->         from records/bench/NAME.txt, what `python -m bench NAME | tee ...` printed: its command and its ratios
"""
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.__main__ import flat  # noqa: E402  (a script in a folder of its own finds the rest of the house one floor up)

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


def benchmarks():
    lines = []
    for path in sorted((ROOT / "records/bench").glob("*.txt")):
        said = path.read_text().strip().splitlines()
        command = next((line[5:] for line in said if line.startswith("---- ")), path.stem)
        for key, value in flat(json.loads(said[-1])):
            if RATIO.search(key):
                lines.append(f"| `python -m bench {command}` | {key.replace('_', ' ')} | {value:.3g} |")
    if not lines:
        return "No benchmark was recorded yet: `python -m bench NAME | tee records/bench/NAME.txt`."
    return "\n".join(["| command | number | value |", "|---|---|---|", *lines])


def filled(text):
    """README.md with everything brought up to date."""
    for name, block in (("speedrun", speedrun()), ("bench", benchmarks())):
        text = re.sub(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", lambda found, block=block: block + "\n", text, count=1, flags=re.S)
    return counted(text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    print("wrote README.md")
