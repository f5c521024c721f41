"""The MMRec layout: `<name>.inter` (tab-separated) and `image_feat.npy`, `text_feat.npy`, ...

Item id r is row r of the feature files and becomes item r + 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from data_readers import cache
from data_readers.features import find_features, load_modality, open_features
from data_readers.interactions import DEFAULTS, Interactions, Options, arrange
from data_readers.parsing import (
    ID,
    REAL,
    WHOLE,
    Form,
    Table,
    dataset_name,
    read_table,
    refuse_misnamed_times,
)
from data_readers.tables import TEST, TRAIN, VALID, Catalogue, Dataset
from util import UserError

SUFFIX = "_feat.npy"
RENAMED = {"image": "visual"}
MOST_ITEMS = 10_000_000  # without features an id beyond this is a raw id, not a row number


def inter_file(folder: Path) -> Path | None:
    """The *.inter file of a folder, `<folder name>.inter` if there are several; None if none.

    Raises UserError where several are there and none has that name.
    """
    found = sorted(folder.glob("*.inter"))
    named = [path for path in found if path.stem == folder.resolve().name]
    if len(found) > 1 and not named:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} has several .inter files ({names}); keep the one to read.")
    return (named or found or [None])[0]


def read_mmrec(
    path: str | Path, options: Options = DEFAULTS, cache_dir: Path | None = None
) -> Dataset:
    """Read an MMRec folder, through the cache where `cache_dir` is given. Raises UserError."""
    path = Path(path)
    source = inter_file(path)
    if source is None:
        raise UserError(f"{path} has no .inter file; put <name>.inter there.")
    features = find_features(path, options.features, SUFFIX, RENAMED)
    files = [source, *filter(Path.is_file, [path / "dataset.yaml"]), *features.values()]
    name = dataset_name(path, source.stem)
    layout = {"layout": "mmrec", "modalities": list(features)}
    key = cache.fingerprint(files, {**layout, **options.identity()}, cache_dir)
    build = lambda: _build(source, name, features, options, key)  # noqa: E731
    return cache.prepared(cache_dir, name, key, build)


def _build(
    source: Path, name: str, features: dict[str, Path], options: Options, key: str
) -> Dataset:
    columns = {"userID": ID, "itemID": WHOLE, "rating": REAL, "timestamp": WHOLE, "x_label": WHOLE}
    table = read_table(
        source, columns, form=Form("\t"), optional=("rating", "timestamp", "x_label")
    )
    if "timestamp" not in table.frame:
        refuse_misnamed_times(source, Form("\t"))
    codes, seen = pd.factorize(table.frame["userID"].cat.codes.to_numpy())
    user_ids = np.asarray(table.frame["userID"].cat.categories[seen], dtype=object).astype(str)
    items = table.whole("itemID")
    n_items = _count_items(table, items, features)
    raw = Interactions(
        users=codes,
        items=items,
        timestamps=_optional(table, "timestamp"),
        ratings=_optional(table, "rating"),
        labels=_labels(table),
    )
    arranged = arrange(raw, n_items, options, table)
    modalities = {
        modality: load_modality(file, arranged.items, n_items, wanted=source.name)
        for modality, file in features.items()
    }
    blank = np.zeros(len(arranged.items), "<U1")
    catalogue = Catalogue(arranged.items.astype(str), blank, blank, modalities)
    users = user_ids[arranged.users]
    return Dataset(name, users, arranged.sequences, catalogue, arranged.labels, None, key)


def _count_items(table: Table, items: np.ndarray, features: dict[str, Path]) -> int:
    """N: the feature rows, which must cover every id; without features the largest id + 1."""
    rows = {file: len(open_features(file)) for file in features.values()}
    if len(set(rows.values())) > 1:
        listed = ", ".join(f"{file.name} {count}" for file, count in rows.items())
        raise UserError(
            f"{table.path.parent}: feature files differ in rows ({listed}); "
            "each must have one row per item."
        )
    limit = min(rows.values(), default=MOST_ITEMS)
    where = f"the {limit} rows of {min(rows).name}" if rows else f"{MOST_ITEMS} possible ids"
    table.check(
        "itemID", (items >= 0) & (items < limit),
        f"{{}} is outside {where}; ids must be row numbers from 0",
    )  # fmt: skip
    return limit if rows else int(items.max()) + 1


def _optional(table: Table, column: str) -> np.ndarray | None:
    return table.frame[column].to_numpy() if column in table.frame else None


def _labels(table: Table) -> np.ndarray | None:
    if "x_label" not in table.frame:
        return None
    labels = table.whole("x_label")
    allowed = np.isin(labels, (TRAIN, VALID, TEST))
    table.check("x_label", allowed, "{} is not 0 (train), 1 (valid) or 2 (test); mend the cell")
    return labels.astype(np.int8)
