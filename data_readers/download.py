"""Public files over HTTP: resumed after a cut, checked, and named only when they are whole."""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from data_readers.jobs import Progress, alone
from util import UserError

log = logging.getLogger("pmat")

_BLOCK = 2**20  # bytes read at a time
_TIMEOUT = 30  # seconds without a byte
_PAUSE = 1.0  # seconds before a cut download goes on
_MB = 10**6


class Remote(NamedTuple):
    """A public file and where it belongs."""

    url: str
    target: Path
    md5: str = ""  # as published, empty where nobody publishes one


class _NoAnswer(Exception):
    """A server that cannot be reached or does not have the file."""


def obtain(remotes: list[Remote], what: str) -> None:
    """Download those that are not there yet.

    Raises UserError where that is not possible: one sentence with every name, address and folder.
    """
    missing = [remote for remote in remotes if not remote.target.exists()]
    for remote in missing:
        try:
            _make_folder(remote.target.parent)
            fetch(remote)
        except _NoAnswer as reason:
            left = [remote for remote in missing if not remote.target.exists()]
            files = " and ".join(f"{remote.target.name} from {remote.url}" for remote in left)
            raise UserError(
                f"{what}: {left[0].target.name} is not here and cannot be downloaded ({reason}); "
                f"put {files} into {left[0].target.parent}."
            ) from None


def obtain_archive(remote: Remote, folder: Path, names: tuple[str, ...]) -> None:
    """Download a zip file and unpack those of its files that are called one of `names` to `folder`.

    A zip file that was put there by hand is taken, and stays. The folder appears whole or not at
    all. Raises UserError.
    """
    _make_folder(folder.parent)
    with alone(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():  # another process was faster
            return
        by_hand = remote.target.exists()
        obtain([remote], folder.name)
        _unpack(remote.target, folder, names)
        if not by_hand:
            remote.target.unlink()


def _unpack(archive: Path, folder: Path, names: tuple[str, ...]) -> None:
    partial = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with zipfile.ZipFile(archive) as content:
            for member in content.infolist():
                name = Path(member.filename).name  # whatever folder the archive wants it in
                if name in names:
                    with content.open(member) as source, open(partial / name, "wb") as file:
                        shutil.copyfileobj(source, file, _BLOCK)
        os.replace(partial, folder)
    except (zipfile.BadZipFile, EOFError, zlib.error) as error:
        raise UserError(f"{archive} is damaged ({error}); remove it and run again.") from None
    except OSError as error:
        raise UserError(f"Cannot unpack {archive} to {folder}: {error.strerror}.") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def fetch(remote: Remote) -> None:
    """Download to `<target>.part`, check, rename. A part left by a cut or a kill is gone on with.

    Raises UserError for a wrong checksum (the part is then removed) and a disk that is full.
    """
    part = remote.target.with_name(f"{remote.target.name}.part")
    with alone(part.with_suffix(".lock")):
        if remote.target.exists():  # another process was faster
            return
        log.info("downloading %s", remote.url)
        while not _transfer(remote.url, part):
            time.sleep(_PAUSE)
        found = _md5(part) if remote.md5 else ""
        if found != remote.md5:
            _discard(part)
            raise UserError(
                f"{remote.url} gave a file with MD5 {found} where {remote.md5} is published; "
                "nothing was kept: try again, or get it by hand."
            )
        os.replace(part, remote.target)
        _discard(part)


def _transfer(url: str, part: Path) -> bool:
    """Get what `part` still lacks. False when it was cut but got on, so that trying again helps."""
    before = part.stat().st_size if part.exists() else 0
    try:
        with _open(url, part, before) as answer:
            return _receive(answer, part)
    except urllib.error.HTTPError as error:
        if error.code == 416 and before:  # nothing comes after it: whole, or of another file
            if _total(error.headers) == before:
                return True
            _discard(part)
            return False
        raise _NoAnswer(f"the server says {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException) as error:
        if part.exists() and part.stat().st_size > before:
            log.info("%s was cut at %.1f MB: going on", url, part.stat().st_size / _MB)
            return False
        raise _NoAnswer(getattr(error, "reason", None) or error) from None


def _open(url: str, part: Path, have: int) -> http.client.HTTPResponse:
    """Ask for what comes after the bytes we have, if the file is still the same one."""
    request = urllib.request.Request(url, headers={"User-Agent": "pmat-mcrl"})
    tag = _tag_file(part)
    if have:
        request.add_header("Range", f"bytes={have}-")
        if tag.exists():
            request.add_header("If-Range", tag.read_text(encoding="ascii"))
    return urllib.request.urlopen(request, timeout=_TIMEOUT)


def _receive(answer: http.client.HTTPResponse, part: Path) -> bool:
    """Append a partial answer (206) to the part, or start it afresh from a whole one."""
    if "html" in answer.headers.get("Content-Type", ""):
        raise _NoAnswer("a web page came instead of the file")
    resumed = answer.status == 206
    if not resumed:
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
        _discard(part)
        if version and not version.startswith("W/"):  # a weak tag cannot vouch for bytes
            _write(_tag_file(part), version.encode("ascii", "ignore"), "wb")
    have = part.stat().st_size if resumed else 0
    if resumed and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        raise _NoAnswer("the server sent another part than it was asked for")
    total = _total(answer.headers)
    progress = Progress(part.stem, total // _MB, " MB", have // _MB)
    while block := answer.read(_BLOCK):
        _write(part, block, "ab")
        have += len(block)
        progress.add(have // _MB - progress.done)
    if total and have != total:
        raise ConnectionError(f"{have} of {total} bytes came")
    if not have:
        _write(part, b"", "ab")
    return True


def _total(headers: http.client.HTTPMessage) -> int:
    """Bytes of the whole file; 0 where the server does not say."""
    whole = re.search(r"/(\d+)$", headers.get("Content-Range", ""))
    return int(whole[1] if whole else headers.get("Content-Length", 0))


def _write(path: Path, data: bytes, mode: str) -> None:
    try:
        with open(path, mode) as file:
            file.write(data)
    except OSError as error:  # not to be taken for a broken connection
        raise UserError(f"Cannot write {path}: {error.strerror}.") from None


def _tag_file(part: Path) -> Path:
    return part.with_suffix(".tag")


def _discard(part: Path) -> None:
    """Remove the part and what belongs to it."""
    for path in (part, _tag_file(part)):
        path.unlink(missing_ok=True)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot create {folder}: {error.strerror}.") from None


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)  # what the publishers give; guards against damage
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
