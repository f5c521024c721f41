"""Prepared data sets on disk: memory-mapped, keyed by a hash of raw bytes and options."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data_readers.tables import Catalogue, Dataset, Modality, Sequences
from util import UserError, write_json

log = logging.getLogger("pmat")

FORMAT = 4  # raise it when a reader or the layout below changes what it stores
_LARGE = 2**26  # bytes; smaller files are hashed anew each time
_SETTLED = 5  # seconds
_ABANDONED = 3600  # seconds after which a half-written cache is taken for a killed run's
_warned: set[Path] = set()


def fingerprint(files: Iterable[Path], options: dict, cache_dir: Path | None = None) -> str:
    """Hex hash of the files' names and bytes, the options and the cache format.

    A large file is read only once: with `cache_dir` its hash is kept there and holds as long as
    its size and time of change do. Raises UserError for a file that cannot be read.
    """
    digest = hashlib.blake2b(json.dumps([FORMAT, options], sort_keys=True).encode(), digest_size=16)
    for path in sorted(files):
        try:
            state = path.stat()
            digest.update(f"\n{path.name} {state.st_size}\n".encode())
            if state.st_size >= _LARGE:
                digest.update(_remembered(path, state, cache_dir))
            else:
                digest.update(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}); check it.") from None
    return digest.hexdigest()


def _remembered(path: Path, state: os.stat_result, cache_dir: Path | None) -> bytes:
    """Hash of a large file's bytes, from `cache_dir/hashes.json` where that knows it."""
    book = cache_dir and cache_dir / "hashes.json"
    name, stamp = str(path.resolve()), [state.st_size, state.st_mtime_ns]
    known = _read_json(book).get(name) if book else None
    if isinstance(known, list) and known[:2] == stamp:
        return bytes.fromhex(known[2])
    with open(path, "rb") as file:
        digest = hashlib.blake2b(digest_size=16)
        while chunk := file.read(2**22):
            digest.update(chunk)
    # A file changed within the last seconds may change again without its time showing it.
    if book and time.time() - state.st_mtime > _SETTLED:
        with contextlib.suppress(UserError):  # no cache can be kept there: `store` will say so
            write_json(book, {**_read_json(book), name: [*stamp, digest.hexdigest()]})
    return digest.digest()


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def prepared(cache_dir: Path | None, name: str, key: str, build: Callable[[], Dataset]) -> Dataset:
    """The data set `name` with fingerprint `key`: from the cache, else built and stored there.

    cache_dir None means no cache. A cache that cannot be written only costs a warning. Warnings of
    `build` are kept, too, and given again whenever the data set is read.
    """
    if cache_dir is None:
        return build()
    target = cache_dir / f"{re.sub(r'[^A-Za-z0-9_.]+', '-', name).strip('-.')}-{key[:12]}"
    found = load(target, key)
    if found is not None:
        for said in _read_json(target / "meta.json").get("warnings", []):
            log.warning("%s", said)
        return found
    with _noted() as warnings:
        dataset = build()
    found = load(target, key) if store(target, dataset, warnings) else dataset
    return found or dataset


@contextlib.contextmanager
def _noted() -> Iterator[list[str]]:
    """What the reader warns of meanwhile, such as rows that were dropped."""
    said: list[str] = []
    listener = logging.Handler(logging.WARNING)
    listener.emit = lambda record: said.append(record.getMessage())
    log.addHandler(listener)
    try:
        yield said
    finally:
        log.removeHandler(listener)


def store(target: Path, dataset: Dataset, warnings: list[str]) -> bool:
    """Write to a sibling, then rename: readers see all of it or nothing. False if not possible."""
    partial = target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}")
    try:
        partial.mkdir(parents=True)
        _sweep(target)
        arrays = _arrays(dataset)
        for stem, array in arrays.items():
            np.save(partial / f"{stem}.npy", array, allow_pickle=False)
        meta = {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "warnings": warnings,
            "modalities": list(dataset.catalogue.modalities),
            "arrays": {stem: [list(a.shape), a.dtype.str] for stem, a in arrays.items()},
        }
        (partial / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")
        if target.exists():  # broken, or it would have been loaded: move it out of the way first
            os.rename(target, target.with_name(f"{target.name}.tmp-{uuid.uuid4().hex[:8]}"))
        os.rename(partial, target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            return True  # another process was faster
        if target.parent not in _warned:
            _warned.add(target.parent)
            log.warning("%s: no cache is kept there (%s)", target.parent, error.strerror or error)
        return False
    return True


def load(target: Path, key: str) -> Dataset | None:
    """The stored data set, its arrays mapped read-only; None if absent, incomplete or broken."""
    try:
        meta = json.loads((target / "meta.json").read_text(encoding="utf-8"))
        arrays = {
            stem: _open(target / f"{stem}.npy", *form) for stem, form in meta["arrays"].items()
        }
        if meta["fingerprint"] != key:
            return None
        sequences = Sequences(*(arrays[field] for field in Sequences._fields))
        if sequences.offsets[-1] != len(sequences.items):
            return None
        modalities = {
            name: Modality(arrays[f"features-{name}"], arrays[f"present-{name}"])
            for name in meta["modalities"]
        }
        text = (arrays[field] for field in ("item_ids", "titles", "categories"))
        return Dataset(
            name=meta["name"],
            user_ids=arrays["user_ids"],
            sequences=sequences,
            catalogue=Catalogue(*text, modalities),
            labels=arrays.get("labels"),
            truth=None,
            fingerprint=key,
        )
    except (OSError, ValueError, EOFError, KeyError, TypeError, AttributeError):
        return None


def _open(path: Path, shape: list[int], dtype: str) -> np.ndarray:
    array = np.load(path, mmap_mode="r", allow_pickle=False)
    if list(array.shape) != shape or array.dtype.str != dtype:
        raise ValueError(f"{path} is not what meta.json says")
    return np.asarray(array)


def _arrays(dataset: Dataset) -> dict[str, np.ndarray]:
    catalogue = dataset.catalogue
    arrays = {"user_ids": dataset.user_ids, **dataset.sequences._asdict()}
    arrays |= {field: getattr(catalogue, field) for field in ("item_ids", "titles", "categories")}
    if dataset.labels is not None:
        arrays["labels"] = dataset.labels
    for name, modality in catalogue.modalities.items():
        arrays |= {f"features-{name}": modality.features, f"present-{name}": modality.present}
    return arrays


def _sweep(target: Path) -> None:
    """Remove what killed runs left half-written, and broken caches that were moved away."""
    for path in target.parent.glob(f"{target.name}.tmp-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED:
            shutil.rmtree(path, ignore_errors=True)
