"""
One file from the network, in one piece or not at all: bytes go to NAME.part, which gets its name
when all of them are there and a check has passed. A cut connection leaves the .part, and the same
command continues from its end.

    fetch("https://...", path, check)                  # file:// addresses work too

Deleted: retries, mirrors, threads, a hub client with a cache of its own.
"""
import http.client
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 20


def fetch(url, path, check=None):
    """-> path. check(part) may raise a ValueError: the part is then removed, and the name never appears."""
    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        whole = _copy(url, part, path.name)
    except (OSError, http.client.HTTPException, ValueError) as error:
        # HTTP errors, no route, a reset, a disk that is full: all in words, in one line
        reason = " ".join(str(getattr(error, "reason", None) or error).split()) or type(error).__name__
        have = (f"; {part.stat().st_size:,} bytes are kept, the same "
                "command goes on from there" if _size(part) else "")
        raise ValueError(f"download of {url} failed: {reason}{have}") from None
    if whole is not None and _size(part) != whole:
        raise ValueError(f"download of {url} was cut off after {_size(part):,} "
                         f"of {whole:,} bytes: the same command goes on from there")
    if check:
        try:
            check(part)
        except ValueError:
            part.unlink()
            raise
    os.replace(part, path)
    return path


def _size(part):
    return part.stat().st_size if part.exists() else 0


def _copy(url, part, name):
    """appends what is missing -> the size of the whole, where it is known"""
    have = _size(part)
    request = urllib.request.Request(
        url, headers={"User-Agent": "nanorl"} | ({"Range": f"bytes={have}-"} if have else {}))
    local = urllib.parse.urlparse(url).scheme == "file"
    try:
        source = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        total = (error.headers.get("Content-Range") or "").rpartition("/")[2]
        if error.code == 416 and total == str(have):     # nothing is missing
            return have
        raise
    with source:
        length = source.headers.get("Content-Length")
        if local:
            source.seek(have)
            whole = int(length)
        elif have and source.status == 206:
            total = (source.headers.get("Content-Range") or "").rpartition("/")[2]
            whole = int(total) if total.isdigit() else None              # "*": the server does not know
        else:                                            # the server sends it all again
            have, whole = 0, None if length is None else int(length)
        with open(part, "ab" if have else "wb") as out, tqdm(total=whole, initial=have,
                                                             unit="B", unit_scale=True, desc=name,
                                                             disable=not sys.stderr.isatty()) as bar:
            while block := source.read(BLOCK):
                out.write(block)
                bar.update(len(block))
            out.flush()
            os.fsync(out.fileno())
    return whole


def command(main):
    """runs a data script's main: bad input is one line and exit 2"""
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
