"""The folder layout: interactions.csv, items.csv, one `<modality>.npy` each, maybe dataset.yaml.

The row order of items.csv is the row order of the feature files; item r of it becomes item r + 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_readers import cache
from data_readers.features import find_features, load_modality
from data_readers.interactions import DEFAULTS, Interactions, Options, arrange
from data_readers.parsing import (
    CSV,
    ID,
    REAL,
    TEXT,
    WHOLE,
    Table,
    check_ids,
    dataset_name,
    read_table,
    refuse_misnamed_times,
)
from data_readers.tables import Catalogue, Dataset
from util import UserError

LONGEST_TITLE = 10_000  # characters; beyond it a quote was left open and swallowed the rows below
_KEPT_TITLE = 200  # characters: all titles take the room of the longest one


class ItemRows(NamedTuple):
    """The catalogue in file order, before anything is dropped."""

    ids: np.ndarray  # [N] str
    titles: np.ndarray  # [N] str
    categories: np.ndarray  # [N] str


def read_folder(
    path: str | Path, options: Options = DEFAULTS, cache_dir: Path | None = None
) -> Dataset:
    """Read a data folder, through the cache where `cache_dir` is given. Raises UserError."""
    path = Path(path)
    features = find_features(path, options.features)
    if features and not (path / "items.csv").is_file():
        raise UserError(
            f"{path} has {next(iter(features.values())).name} but no items.csv: its rows have no "
            "names; add items.csv with one row per feature row, or set features to none."
        )
    optional = [path / "items.csv", path / "dataset.yaml"]
    files = [path / "interactions.csv", *filter(Path.is_file, optional), *features.values()]
    name = dataset_name(path, path.resolve().name)
    key = cache.fingerprint(files, {"layout": "folder", **options.identity()}, cache_dir)
    build = lambda: _build(path, name, features, options, key)  # noqa: E731
    return cache.prepared(cache_dir, name, key, build)


def _build(path: Path, name: str, features: dict[str, Path], options: Options, key: str) -> Dataset:
    columns = {"user_id": ID, "item_id": ID, "timestamp": WHOLE, "rating": REAL}
    table = read_table(path / "interactions.csv", columns, optional=("timestamp", "rating"))
    if "timestamp" not in table.frame:
        refuse_misnamed_times(path / "interactions.csv", CSV)
    user_codes, user_ids = _by_appearance(table.frame["user_id"])
    items = read_items(path / "items.csv") if (path / "items.csv").is_file() else None
    if items is None:
        item_codes, ids = _by_appearance(table.frame["item_id"])
        items = ItemRows(ids, np.zeros(len(ids), "<U1"), np.zeros(len(ids), "<U1"))
    else:
        item_codes = _look_up(table, items.ids)

    columns = {
        name: table.frame[name].to_numpy()
        for name in ("timestamp", "rating")
        if name in table.frame
    }
    raw = Interactions(
        user_codes, item_codes, columns.get("timestamp"), columns.get("rating"), None
    )
    arranged = arrange(raw, len(items.ids), options, table)
    modalities = {
        modality: load_modality(file, arranged.items, len(items.ids), wanted="items.csv")
        for modality, file in features.items()
    }
    catalogue = Catalogue(*(column[arranged.items] for column in items), modalities)
    users = user_ids[arranged.users]
    return Dataset(name, users, arranged.sequences, catalogue, arranged.labels, None, key)


def read_items(path: Path) -> ItemRows:
    """Ids, titles and coarse categories of items.csv. Raises UserError for an id given twice."""
    columns = dict.fromkeys(("item_id", "title", "categories", "category", "genres"), TEXT)
    table = read_table(path, columns, optional=tuple(columns)[1:])
    ids = table.frame["item_id"]
    check_ids(table, "item_id", ids, np.arange(len(ids)))
    twice = ids.duplicated().to_numpy()
    if twice.any():
        row = int(np.argmax(twice))
        first = table.line(int(np.argmax(ids == ids[row])))
        problem = f"{ids[row]!r} was already given in line {first}; remove one of the two"
        raise table.fault(row, "item_id", problem)
    nothing = pd.Series([""] * len(ids), dtype=object)
    titles = table.frame.get("title", nothing)
    short = (titles.str.len() <= LONGEST_TITLE).to_numpy()
    if not short.all():
        problem = f"is longer than {LONGEST_TITLE} characters; look for an unclosed quote"
        raise table.fault(int(np.argmin(short)), "title", problem)
    own = next((name for name in ("categories", "category") if name in table.frame), "")
    if own:  # "Beauty > Makeup > Nails": the second level tells most
        parts = table.frame[own].str.split(">", n=2)
        labels = parts.str[1].fillna(parts.str[0])
    else:
        labels = table.frame.get("genres", nothing).str.split("|", n=1).str[0]
    short = (column.str.strip().str[:_KEPT_TITLE] for column in (titles, labels))
    return ItemRows(*(_text_array(column) for column in (ids, *short)))


def _by_appearance(column: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Codes [R] that count up in order of first appearance, and the id [K] of each code."""
    codes, seen = pd.factorize(column.cat.codes.to_numpy())
    return codes, _text_array(column.cat.categories[seen])


def _look_up(table: Table, item_ids: np.ndarray) -> np.ndarray:
    """[R] rows of items.csv. Raises UserError for an id that is not there."""
    column = table.frame["item_id"].cat
    known = pd.Index(item_ids.astype(object)).get_indexer(column.categories.astype(object))
    rows = known[column.codes.to_numpy()]
    table.check("item_id", rows >= 0, "{} is not in items.csv; add it there or remove the row")
    return rows


def _text_array(values: pd.Series | pd.Index) -> np.ndarray:
    """[n] fixed-width str: unlike an object array it can be saved and mapped without pickle."""
    return np.asarray(values, dtype=object).astype(str)
