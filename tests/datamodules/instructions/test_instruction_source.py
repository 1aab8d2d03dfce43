import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from datamodules.instructions.benchmarks import COMMONSENSE, COMMONSENSE_TRAIN, MATH, MATH_TRAIN
from datamodules.instructions.reading import source
from datamodules.instructions.reading.source import BLOB_IDS, LocalFiles, PinnedFiles, blob_id
from datamodules.shared.user_cache import default_cache_directory
from fourier_moe.errors import UserError

FILE = "dataset/boolq/test.json"
CONTENT = b'[{"instruction": "?"}]'


def git_blob(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def server(monkeypatch):
    """A web server; `answers` are by path, `asked` the paths asked for."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked.append(self.path)
            content = self.server.answers.get(self.path)
            fault = self.server.faults.pop(0) if self.server.faults else None
            if content is None or isinstance(fault, int):
                self.send_error(fault or 404)
                return
            start = int(self.headers.get("Range", "bytes=0-")[len("bytes=") : -1]) if self.server.ranges else 0
            self.server.sent.append(start)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start + self.server.missing))
            self.end_headers()
            self.wfile.write(content[start : start + 5] if fault == "drop" else content[start:])

        def log_message(self, *args):
            pass

    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.asked, server.missing = {f"/{FILE}": CONTENT}, [], 0
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    server.faults, server.ranges, server.sent = [], True, []
    monkeypatch.setattr("fourier_moe.files.retrying.FIRST_WAIT_SECONDS", 0.0)
    monkeypatch.setattr(source, "BASE_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setitem(BLOB_IDS, FILE, git_blob(CONTENT))
    yield server
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once_checked_and_kept(server, tmp_path):
    files = PinnedFiles(tmp_path)
    assert not files.has(FILE)
    path = files.get(FILE)
    assert path.read_bytes() == CONTENT
    assert path.is_relative_to(tmp_path)
    assert PinnedFiles(tmp_path).get(FILE) == path
    assert PinnedFiles(tmp_path).has(FILE)
    assert server.asked == [f"/{FILE}"]
    assert [file.name for file in path.parent.iterdir()] == ["test.json"]


def test_a_damaged_file_in_the_cache_is_fetched_again(server, tmp_path):
    path = PinnedFiles(tmp_path).get(FILE)
    path.write_bytes(CONTENT[:-1])
    assert PinnedFiles(tmp_path).get(FILE).read_bytes() == CONTENT
    assert len(server.asked) == 2


@pytest.mark.parametrize("content", [b"<html>log in first</html>", b""])
def test_other_content_is_refused_and_not_kept(server, tmp_path, content):
    server.answers[f"/{FILE}"] = content
    with pytest.raises(ValueError, match=rf"{FILE} from http.* is not the file of commit.*{git_blob(content)}"):
        PinnedFiles(tmp_path).get(FILE)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_interrupted_transfer_leaves_nothing(server, tmp_path):
    server.answers[f"/{FILE}"], server.missing = CONTENT[:5], len(CONTENT) - 5
    with pytest.raises((ValueError, RuntimeError), match=FILE):
        PinnedFiles(tmp_path).get(FILE)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("fault", [500, 503, 429, "drop"])
def test_one_fault_is_got_over(server, tmp_path, fault):
    server.faults = [fault]
    assert PinnedFiles(tmp_path).get(FILE).read_bytes() == CONTENT


@pytest.mark.parametrize(("ranges", "sent"), [(True, [0, 5, 10]), (False, [0, 0, 0])])
def test_a_dropped_transfer_is_resumed_where_the_server_can(server, tmp_path, ranges, sent):
    server.faults, server.ranges = ["drop", "drop"], ranges
    assert PinnedFiles(tmp_path).get(FILE).read_bytes() == CONTENT
    assert server.sent == sent


def test_a_transfer_that_keeps_breaking_off_is_not_called_another_file(server, tmp_path):
    server.faults = ["drop"] * 9
    server.ranges = False
    with pytest.raises(UserError, match=r"be fetched .*ended after 5 of 22 bytes\).*--data.base_url.*--data.directory"):
        PinnedFiles(tmp_path).get(FILE)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_mirror_is_asked_instead(server, tmp_path, monkeypatch):
    mirror, server.answers = f"{source.BASE_URL}/mirror/", {f"/mirror/{FILE}": CONTENT}
    monkeypatch.setattr(source, "BASE_URL", "http://127.0.0.1:9")
    assert PinnedFiles(tmp_path, mirror).get(FILE).read_bytes() == CONTENT


def test_a_missing_file_and_no_network_name_the_way_out(server, tmp_path):
    server.answers.clear()
    with pytest.raises(UserError, match=r"dataset/boolq/test.json cannot be fetched .*404.* give --data.directory"):
        PinnedFiles(tmp_path).get(FILE)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=r"cannot be fetched .*refused.* give --data.directory"):
        PinnedFiles(tmp_path).get(FILE)


def test_the_users_cache_directory_is_xdgs(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_directory() == tmp_path / "fourier_moe"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert default_cache_directory() == Path("~/.cache/fourier_moe").expanduser()


@pytest.mark.parametrize("place", ["dataset/boolq", "boolq"])
def test_local_files_may_lie_with_or_without_the_first_folder(tmp_path, place):
    (tmp_path / place).mkdir(parents=True)
    (tmp_path / place / "test.json").write_bytes(CONTENT)
    assert LocalFiles(tmp_path).get(FILE) == tmp_path / place / "test.json"
    assert LocalFiles(tmp_path).has(FILE)


def test_a_missing_local_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has no dataset/boolq/test.json \(nor boolq/test.json\)"):
        LocalFiles(tmp_path).get(FILE)


def test_blob_id_is_gits(tmp_path):
    (tmp_path / "hello").write_bytes(b"hello\n")
    assert blob_id(tmp_path / "hello") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


def test_every_file_of_the_tables_is_pinned():
    files = [row.test_file for row in (*COMMONSENSE.values(), *MATH.values())] + [
        row.file for row in (*COMMONSENSE_TRAIN, *MATH_TRAIN)
    ]
    assert sorted(files) == sorted(BLOB_IDS)
