"""Vectors that took long to make, kept by content: what is known is never made a second time."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np

from data_readers.jobs import Progress, alone
from util import atomic_path

log = logging.getLogger("pmat")

_SHARD = 1024  # rows made between two writes to disk: what a killed run loses at most


def key_of(content: bytes) -> bytes:
    """32 hex digits to know some content by."""
    return hashlib.blake2b(content, digest_size=16).hexdigest().encode()


def encode(
    keys: list[bytes],
    rows: list,
    load: Callable[[], Callable[[list], np.ndarray]],
    model: str,
    cache_dir: Path | None,
) -> np.ndarray:
    """[n, d] float32 vectors of `rows`: equal keys share one, an empty key has none and gets NaN.

    Args:
        load: gives the function that makes [m, d] vectors of m rows; called only when needed.
        model: what the vectors depend on besides the keys.
        cache_dir: vectors of one model share a folder in it; None keeps nothing.
    """
    folder = _folder(cache_dir, model)
    with alone(folder / "lock") if folder else contextlib.nullcontext():
        known = _stored(folder) if folder else {}
        new = {key: row for key, row in zip(keys, rows, strict=True) if key and key not in known}
        make = load() if new else None
        progress = Progress(f"encoding with {model}", len(new))
        for start in range(0, len(new), _SHARD):
            part = list(new)[start : start + _SHARD]
            vectors = make([new[key] for key in part])
            shard = np.zeros(len(part), [("key", "S32"), ("vector", "<f4", vectors.shape[1:])])
            shard["key"], shard["vector"] = part, vectors
            if folder:
                _store(folder, shard)
            known |= zip(part, shard["vector"], strict=True)
            progress.add(len(part))
    missing = np.full(len(next(iter(known.values()), [0])), np.nan, np.float32)
    return np.stack([known.get(key, missing) for key in keys])


def _folder(cache_dir: Path | None, model: str) -> Path | None:
    """Where vectors of this model are kept; None where nothing can be."""
    if cache_dir is None:
        return None
    folder = cache_dir / f"encoded-{key_of(model.encode()).decode()[:12]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
    except OSError as error:
        log.warning("%s: encoded features are not kept (%s)", folder, error.strerror)
        return None
    return folder


def _stored(folder: Path) -> dict[bytes, np.ndarray]:
    known: dict[bytes, np.ndarray] = {}
    for path in sorted(folder.glob("*.npy")):
        with contextlib.suppress(OSError, ValueError, EOFError):  # a broken shard is made again
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
            known |= zip(shard["key"].tolist(), np.asarray(shard["vector"]), strict=True)
    return known


def _store(folder: Path, shard: np.ndarray) -> None:
    name = key_of(b"".join(shard["key"].tolist())).decode()[:16]
    with atomic_path(folder / f"{name}.npy") as temporary, open(temporary, "wb") as file:
        np.save(file, shard, allow_pickle=False)
