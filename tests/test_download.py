"""downloads: whole or not there; a cut one goes on from its end; one line says why it stopped"""
import http.server
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data import fineweb
from data.download import fetch

ROOT = Path(__file__).resolve().parent.parent


def shard(tokens=5000, claimed=None):
    return struct.pack("<256i", 20240520, 1, tokens if claimed is None else claimed,
                       *[0] * 253) + bytes(range(250)) * (2 * tokens // 250)


@pytest.fixture
def mirror(tmp_path):
    folder = tmp_path / "mirror"
    folder.mkdir()
    for name in ("fineweb_val_000000.bin", "fineweb_train_000001.bin", "fineweb_train_000002.bin"):
        (folder / name).write_bytes(shard())
    return folder


def run(*words):
    return subprocess.run([sys.executable, "-m", "data.fineweb", *map(str, words)],
                          capture_output=True, text=True, cwd=ROOT)


def test_shards_come_whole_and_once(mirror, tmp_path):
    to = tmp_path / "shards"
    done = run(2, "--to", to, "--from", mirror.as_uri())
    assert done.returncode == 0 and "train_gpt.py --preset gpt2" in done.stdout, done.stderr
    assert sorted(p.name for p in to.iterdir()) == sorted(p.name for p in mirror.iterdir())
    assert all(p.read_bytes() == (mirror / p.name).read_bytes() for p in to.iterdir())
    times = {p: p.stat().st_mtime_ns for p in to.iterdir()}
    assert run(2, "--to", to, "--from", mirror.as_uri()).returncode == 0
    assert times == {p: p.stat().st_mtime_ns for p in to.iterdir()}


def test_what_train_gpt_reads_is_what_came(mirror, tmp_path):
    from train_gpt import Config, documents
    fineweb.main(["1", "--to", str(tmp_path / "shards"), "--from", mirror.as_uri()])
    document, count = documents(Config(data=str(tmp_path / "shards"), seq_len=64), None)
    assert count == 4999 // 64 and len(document("train", 0)[0]) == 65


@pytest.mark.parametrize("words, message", [
    ([], "usage"), (["0"], "usage"), (["104"], "usage"), (["two"], "usage"), (["1", "--too", "x"], "usage"),
    (["1", "--to"], "--to needs a value"),
])
def test_bad_words(words, message):
    done = run(*words)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_or_wrong_file_is_one_line_and_leaves_no_name(mirror, tmp_path):
    to = tmp_path / "shards"
    (mirror / "fineweb_train_000001.bin").write_bytes(b"<html>not found</html>")
    for n, message in ((1, "no token shard"), (3, "no token shard")):
        done = run(n, "--to", to, "--from", mirror.as_uri())
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
        assert [p.name for p in to.iterdir()] == ["fineweb_val_000000.bin"]
    done = run(1, "--to", to, "--from", "file:///nowhere")
    assert done.returncode == 2 and "No such file" in done.stderr and done.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------
# a server that hangs up in the middle

CONTENT = bytes(range(256)) * 4000


class Server(http.server.BaseHTTPRequestHandler):
    cut, ranges, code, told = 0, True, 0, True
    asked = []

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1]) if self.ranges else 0
        Server.asked.append(start)
        if self.code:
            self.send_error(self.code)
            return
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start and self.told:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        self.wfile.write(CONTENT[start:start + self.cut] if self.cut else CONTENT[start:])

    def log_message(self, *words):
        pass


@pytest.fixture
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Server.cut, Server.ranges, Server.code, Server.told, Server.asked = 0, True, 0, True, []
    yield f"http://127.0.0.1:{server.server_port}/file.bin"
    server.shutdown()


def test_a_cut_download_goes_on_from_its_end(address, tmp_path):
    path, part = tmp_path / "new" / "file.bin", tmp_path / "new" / "file.bin.part"
    Server.cut = 400_000
    for have in (400_000, 800_000):
        with pytest.raises(ValueError, match="goes on from there") as error:
            fetch(address, path)
        assert "\n" not in str(error.value) and not path.exists() and part.stat().st_size == have
    assert fetch(address, path) == path and path.read_bytes() == CONTENT and not part.exists()
    assert Server.asked == [0, 400_000, 800_000]


def test_a_server_without_ranges_sends_it_all_again(address, tmp_path):
    Server.ranges, Server.cut = False, 1000
    with pytest.raises(ValueError, match="cut off|failed"):
        fetch(address, tmp_path / "f")
    Server.cut = 0
    assert fetch(address, tmp_path / "f").read_bytes() == CONTENT


def test_a_server_that_does_not_say_how_much_there_is(address, tmp_path):
    Server.told = False
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    assert fetch(address, tmp_path / "f").read_bytes() == CONTENT


def test_a_part_that_was_whole_already_gets_its_name(address, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT)
    assert fetch(address, tmp_path / "f").read_bytes() == CONTENT


def test_errors_of_the_network_are_one_line(address, tmp_path):
    Server.code = 404
    for url in (address, "http://127.0.0.1:1/x", "http://no.such.host.invalid/x",
                "nonsense", "file:///no/such/file"):
        with pytest.raises(ValueError, match="download of .* failed") as error:
            fetch(url, tmp_path / "f")
        assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def test_a_file_that_fails_its_check_is_not_kept(address, tmp_path):
    def check(part):
        raise ValueError("not what it should be")
    with pytest.raises(ValueError, match="not what it should be"):
        fetch(address, tmp_path / "f", check)
    assert not os.listdir(tmp_path)
