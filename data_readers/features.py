"""Feature matrices: one .npy per modality, validated, missing rows found, standardised."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_readers.tables import Modality
from util import UserError

FIRST = ("visual", "text", "audio")  # the usual modalities lead, others follow by name
_BLOCK = 2**20  # entries converted at a time, 8 MB as float64: files may be larger than memory


def find_features(
    folder: Path,
    features: str = "auto",
    suffix: str = ".npy",
    renamed: dict[str, str] | None = None,
) -> dict[str, Path]:
    """Modality -> file for every `<name><suffix>` in the folder, visual, text and audio first.

    `features` is the setting of that name: all files, those of one modality, or none. `renamed`
    maps a name in the files to the modality it means. Raises UserError for a name with odd
    characters, for two files of one modality, and where the one that was asked for is not there.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(f"*{suffix}")) if features != "none" else ():
        stem = path.name.removesuffix(suffix)
        name = (renamed or {}).get(stem, stem)
        if not re.fullmatch(r"[\w-]+", name):
            raise UserError(f"{path}: {name!r} cannot name a modality; use letters, digits, _, -.")
        if name in found:
            raise UserError(
                f"{path} and {found[name].name} both hold modality {name!r}; remove one of them."
            )
        found[name] = path
    if features in ("auto", "none"):
        return in_order(found)
    if features not in found:
        raise UserError(
            f"{folder} has no {features}{suffix}, which data.features={features} asks for; "
            "add the file, or set data.features to auto or none."
        )
    return {features: found[features]}


def in_order(found: dict[str, Any]) -> dict[str, Any]:
    """The same entries by modality: visual, text and audio first, the others by name."""
    rank = {name: i for i, name in enumerate(FIRST)}
    return {name: found[name] for name in sorted(found, key=lambda n: (rank.get(n, len(FIRST)), n))}


def open_features(path: Path) -> np.ndarray:
    """[rows, d] memory map of a .npy file. Raises UserError unless it is a 2-D real array."""
    try:
        raw = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{path} is not a readable .npy array ({reason}); write it with "
            "numpy.save(path, array, allow_pickle=False)."
        ) from None
    if not isinstance(raw, np.ndarray) or raw.dtype.kind not in "fiu":
        kind = raw.dtype if isinstance(raw, np.ndarray) else "an .npz archive"
        raise UserError(f"{path} holds {kind}; save one array of float16, float32 or float64.")
    if raw.ndim != 2 or not raw.size:
        raise UserError(f"{path} has shape {raw.shape}; it must be [items, dimensions].")
    return raw


def load_modality(path: Path, rows: np.ndarray, n_items: int, *, wanted: str) -> Modality:
    """Rows `rows` [N'] of a feature file that must have `n_items` rows, standardised over them.

    `wanted` says in words where n_items comes from. Raises UserError for a wrong row count, an
    inf (or a number too large for float32), a row only partly NaN, and no present row at all.
    """
    raw = open_features(path)
    if len(raw) != n_items:
        raise UserError(
            f"{path} has {len(raw)} rows but {wanted} gives {n_items} items; "
            "write one row per item, all NaN where the item has none."
        )
    present = _present(raw, np.arange(len(raw)), path)[rows]
    if not present.any():
        rows_left = "every row" if len(rows) == len(raw) else "every row that k_core keeps"
        raise UserError(
            f"{path}: {rows_left} is NaN, so no item has this modality; remove the file."
        )
    return _scaled(raw, present, rows)


def pick_rows(raw: np.ndarray, rows: np.ndarray, path: Path) -> Modality:
    """Rows `rows` [N] of raw [R, d], -1 where an item has none, standardised over the others.

    Only those rows are read. Raises UserError for bad numbers, as `load_modality` does, and where
    no item has a row.
    """
    present = rows >= 0
    present[present] = _present(raw, rows[present], path)
    if not present.any():
        raise UserError(
            f"{path} has features of none of the {len(rows)} items; is it of another data set?"
        )
    return _scaled(raw, present, rows)


def standardise(raw: np.ndarray, present: np.ndarray) -> Modality:
    """Centre each column over the present rows, then one scale for all: mean square 1.

    One scale, not one per column, keeps the geometry: noise columns are not blown up.

    Args: raw [N, d], anything at all in missing rows; present [N] bool.
    """
    return _scaled(raw, present, np.arange(len(raw)))


def _scaled(raw: np.ndarray, present: np.ndarray, rows: np.ndarray) -> Modality:
    """Rows `rows` [N] of raw; `present` [N] tells which of them count."""
    count, width = int(present.sum()), raw.shape[1]
    mean = np.zeros(width)
    for block in _blocks(len(rows), width):
        mean += raw[rows[block][present[block]]].sum(axis=0, dtype=np.float64) / max(count, 1)
    out = np.zeros((len(rows), width), np.float32)
    square = 0.0
    for block in _blocks(len(rows), width):
        centred = raw[rows[block]].astype(np.float64) - mean
        centred[~present[block]] = 0
        out[block] = centred
        square += float((centred**2).sum()) / max(count * width, 1)
    # Spread below float32 resolution is rounding, not signal: a constant matrix becomes zeros.
    constant = square <= 1e-14 * float(mean @ mean) / width
    out *= 0 if constant else 1 / np.sqrt(square)
    return Modality(out, present)


def _present(raw: np.ndarray, rows: np.ndarray, path: Path) -> np.ndarray:
    """[N] bool: False where row `rows[i]` of raw is all NaN."""
    present = np.ones(len(rows), bool)
    for block in _blocks(len(rows), raw.shape[1]):
        with np.errstate(over="ignore"):
            values = raw[rows[block]].astype(np.float32)  # what overflows is inf to every model
        nan = np.isnan(values)
        missing = nan.all(axis=1)
        _refuse(nan.any(axis=1) & ~missing, rows[block], path, "NaN in part of its columns")
        _refuse(np.isinf(values).any(axis=1), rows[block], path, "an infinite value")
        present[block] = ~missing
    return present


def _refuse(bad: np.ndarray, rows: np.ndarray, path: Path, what: str) -> None:
    if bad.any():
        row = rows[int(np.argmax(bad))]
        raise UserError(
            f"{path}, row {row} (counted from 0) has {what}; "
            "mend the row, or make all of it NaN if the item lacks this modality."
        )


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, _BLOCK // width)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))
