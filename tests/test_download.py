"""Downloads from a local server that cuts, changes, lies and refuses."""

from __future__ import annotations

import hashlib
import io
import shutil
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import data_readers
from data_readers import RawChoices, amazon, download, movielens
from data_readers.download import Remote, fetch, obtain
from util import UserError

CONTENT = bytes(range(256)) * 8192  # 2 MB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files`; `cuts` holds after how many bytes the next answers break off."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.cuts: list[int] = []
        self.ranges = True
        self.asked: list[tuple[str, str | None]] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(BaseHTTPRequestHandler):
    """Range requests with ETag, as file servers answer them."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server, name, wanted = self.server, self.path[1:], self.headers.get("Range")
        server.asked.append((name, wanted))
        body = server.files.get(name)
        if body is None:
            self.send_error(404)
            return
        tag = f'"{hashlib.md5(body).hexdigest()}"'
        start = int(wanted[6:-1]) if wanted and server.ranges else 0
        if start and self.headers.get("If-Range", tag) != tag:
            start = 0
        if start and start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", tag)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        end = server.cuts.pop(0) + start if server.cuts else len(body)
        self.wfile.write(body[start:end])
        self.close_connection = end < len(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(download, "_PAUSE", 0.0)
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --------------------------------------------------------------------------- one file


def test_a_file_arrives_whole(server: Server, tmp_path: Path) -> None:
    server.files = {"f.gz": CONTENT, "empty": b""}
    for name, content in server.files.items():
        fetch(Remote(server.url(name), tmp_path / name, hashlib.md5(content).hexdigest()))
        assert (tmp_path / name).read_bytes() == content
    assert names(tmp_path) == ["empty", "f.gz"]


def test_a_cut_download_goes_on_where_it_was_cut(server: Server, tmp_path: Path) -> None:
    server.files, server.cuts = {"f": CONTENT}, [1_200_000, 300_000]
    fetch(Remote(server.url("f"), tmp_path / "f", MD5))
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.asked] == [None, "bytes=1200000-", "bytes=1500000-"]


def test_the_part_of_a_killed_run_is_used(server: Server, tmp_path: Path) -> None:
    server.files = {"f": CONTENT}
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    fetch(Remote(server.url("f"), tmp_path / "f", MD5))
    assert server.asked == [("f", "bytes=1000-")]
    (tmp_path / "f").unlink()
    (tmp_path / "f.part").write_bytes(CONTENT)  # killed between the last byte and the new name
    fetch(Remote(server.url("f"), tmp_path / "f", MD5))
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_file_that_changed_meanwhile_is_begun_anew(server: Server, tmp_path: Path) -> None:
    server.files, server.cuts = {"f": b"old" * 1000}, [1500, 0]
    with pytest.raises(UserError):
        obtain([Remote(server.url("f"), tmp_path / "f")], "test")
    assert (tmp_path / "f.part").stat().st_size == 1500
    server.files = {"f": b"new" * 1000}
    fetch(Remote(server.url("f"), tmp_path / "f"))
    assert (tmp_path / "f").read_bytes() == b"new" * 1000


def test_a_server_without_ranges_sends_all_again(server: Server, tmp_path: Path) -> None:
    server.files, server.cuts, server.ranges = {"f": CONTENT}, [5000], False
    fetch(Remote(server.url("f"), tmp_path / "f", MD5))
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused_and_nothing_kept(server: Server, tmp_path: Path) -> None:
    server.files = {"f": CONTENT[:-1]}
    with pytest.raises(UserError, match=f"MD5 .* where {MD5} is published; nothing was kept"):
        fetch(Remote(server.url("f"), tmp_path / "f", MD5))
    assert not names(tmp_path)


def test_two_processes_share_one_download(server: Server, tmp_path: Path) -> None:
    server.files = {"f": CONTENT}
    threads = [
        threading.Thread(target=fetch, args=(Remote(server.url("f"), tmp_path / "f", MD5),))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(server.asked) == 1
    assert (tmp_path / "f").read_bytes() == CONTENT


# --------------------------------------------------------------------------- data sets


def test_without_a_network_every_file_is_named(server: Server, tmp_path: Path) -> None:
    server.shutdown()
    server.server_close()
    files = [Remote(server.url(name), tmp_path / "data" / name) for name in ("one.gz", "two.gz")]
    with pytest.raises(UserError) as caught:
        obtain(files, "amazon")
    message = str(caught.value)
    for part in ("amazon", "one.gz", "two.gz", files[0].url, files[1].url, str(tmp_path / "data")):
        assert part in message
    assert "\n" not in message
    assert not names(tmp_path / "data")


def test_a_file_the_server_lacks_is_said(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the server says 404"):
        obtain([Remote(server.url("x"), tmp_path / "x")], "amazon")


def zipped(files: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


ARCHIVE = {
    "ml-latest-small/ratings.csv": "userId,movieId,rating,timestamp\n1,2,3,4\n",
    "ml-latest-small/movies.csv": "movieId,title,genres\n2,Two,Drama\n",
    "../../escaped.txt": "never unpacked",
}


def test_movielens_is_downloaded_and_unpacked(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movielens, "URL", server.url("ml"))
    server.files = {"ml/ml-latest-small.zip": zipped(ARCHIVE)}
    for _ in range(2):
        data = data_readers.read("movielens", data_dir=tmp_path, features="none")
        assert data.catalogue.titles.tolist() == ["Two"]
    assert len(server.asked) == 1
    assert names(tmp_path / "movielens") == ["ml-latest-small"]
    assert names(tmp_path / "movielens" / "ml-latest-small") == ["movies.csv", "ratings.csv"]


def test_an_archive_put_there_by_hand_is_taken_and_stays(server: Server, tmp_path: Path) -> None:
    home = tmp_path / "movielens"
    for folder, edition in ((home, "ml-25m"), (tmp_path, "")):  # named or not, there or above
        folder.mkdir(exist_ok=True)
        (folder / "ml-25m.zip").write_bytes(zipped(ARCHIVE))
        choice = RawChoices(edition)
        data = data_readers.read("movielens", data_dir=tmp_path, features="none", raw=choice)
        assert data.catalogue.titles.tolist() == ["Two"]
        assert (folder / "ml-25m.zip").is_file() and (home / "ml-25m").is_dir()
        shutil.rmtree(home)
    assert not server.asked


def test_a_folder_without_ratings_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "movielens" / "ml-25m" / "posters").mkdir(parents=True)
    with pytest.raises(UserError, match=r"ml-25m is there but lacks ratings.csv and movies.csv"):
        data_readers.read("movielens", data_dir=tmp_path, raw=RawChoices("ml-25m"))
    assert names(tmp_path / "movielens" / "ml-25m") == ["posters"]


def test_a_damaged_archive_leaves_no_folder(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movielens, "URL", server.url("ml"))
    monkeypatch.setitem(movielens.EDITIONS, "ml-1m", "")
    server.files = {"ml/ml-1m.zip": zipped(ARCHIVE)[:-30]}
    with pytest.raises(UserError, match=r"ml-1m.zip is damaged .*remove it"):
        data_readers.read("movielens", data_dir=tmp_path, raw=RawChoices("ml-1m"))
    assert not (tmp_path / "movielens" / "ml-1m").exists()


def test_amazon_downloads_only_what_is_missing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(amazon, "URL_2014", server.url("a"))
    folder = tmp_path / "amazon"
    folder.mkdir()
    review = '{"reviewerID": "u", "asin": "B", "overall": 5.0, "unixReviewTime": 1}\n'
    (folder / "reviews_Toys_5.json").write_text(review, encoding="utf-8")
    with pytest.raises(UserError, match=r"meta_Toys.json.gz is not here and cannot be downloaded"):
        data_readers.read("amazon", data_dir=tmp_path, raw=RawChoices("2014/Toys"))
    read = data_readers.read(
        "amazon", data_dir=tmp_path, features="none", raw=RawChoices("2014/Toys")
    )
    assert read.sequences.n_users == 1
    assert [name for name, _ in server.asked] == ["a/categoryFiles/meta_Toys.json.gz"]
