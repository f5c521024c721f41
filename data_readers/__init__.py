"""Raw files in, `tables.Dataset` out. `read` finds out which reader a name or path needs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from data_readers import places
from data_readers.amazon import read_amazon
from data_readers.folder import read_folder
from data_readers.interactions import Options
from data_readers.mmrec import read_mmrec
from data_readers.mock import make_mock
from data_readers.movielens import read_movielens
from data_readers.sources import RawChoices
from data_readers.tables import Dataset
from util import UserError

__all__ = [
    "Options", "RawChoices", "make_mock", "read", "read_amazon", "read_folder", "read_mmrec",
    "read_movielens",
]  # fmt: skip


def read(
    path_or_name: str | Path,
    *,
    data_dir: str | Path,
    mock: Any = None,
    min_rating: float = 0.0,
    k_core: int = 0,
    tie_policy: str = "file",
    seed: int = 42,
    features: str = "auto",
    use_cache: bool = True,
    raw: RawChoices = RawChoices(),  # noqa: B008 (frozen)
) -> Dataset:
    """Read the data set of that name (under `data_dir`) or path.

    Raw files of amazon and movielens that are not there are downloaded.

    Args:
        mock: arguments of `make_mock` as a dict or dataclass; `seed` is added.
        min_rating: drop interactions rated below; 0 keeps all.
        k_core: drop users and items until each has so many interactions; 0 drops none.
        tie_policy: "file" or "shuffle" (by `seed`), the order of equal timestamps of a user.
        features: "auto" loads all there are, "text" and "visual" only those, "none" none.
        use_cache: keep prepared arrays under `data_dir/cache`, memory-mapped when read again.
        raw: what only raw files leave open, such as the edition and the encoders.

    Raises:
        UserError: one sentence naming file, line and remedy; nothing is left half-written.
    """
    options = Options(min_rating, k_core, tie_policy, seed, features)
    name = str(path_or_name)
    if name == "mock":
        return _mock(mock or {}, options)
    root = Path(data_dir).expanduser()
    if name in places.RAW:
        folder = places.raw_folder(name, root, raw.edition, features)
    else:
        folder = places.find(name, root)
    # A folder given by its path is never written to, not even when data_dir lies inside it.
    outside = name in places.RAW or folder.resolve() not in (root / "cache").resolve().parents
    cache_dir = root / "cache" if use_cache and outside else None
    layout = places.layout(folder)
    if layout in places.RAW:
        if raw.edition and layout == "movielens" and name != layout:
            raise UserError(
                f"data.edition is {raw.edition!r}, but {folder} is given by its path; leave it out."
            )
        reader = read_amazon if layout == "amazon" else read_movielens
        return reader(folder, options, cache_dir, raw)
    _refuse_raw(raw, folder)
    reader = read_folder if layout == "folder" else read_mmrec
    return reader(folder, options, cache_dir)


def _refuse_raw(raw: RawChoices, folder: Path) -> None:
    for key in ("edition", "features_from"):
        if value := getattr(raw, key):
            raise UserError(
                f"data.{key} is {value!r}, but {folder} holds prepared data; it is for the raw "
                "files of amazon and movielens."
            )


def _mock(settings: Any, options: Options) -> Dataset:
    if options.min_rating > 0 or options.k_core > 0:
        raise UserError(
            "mock data has no ratings and no rare items; set min_rating and k_core to 0."
        )
    if dataclasses.is_dataclass(settings):
        settings = dataclasses.asdict(settings)
    dataset = make_mock(**{"seed": options.seed, **settings})
    if options.features == "auto":
        return dataset
    parts = dataset.catalogue.modalities
    kept = {modality: part for modality, part in parts.items() if modality == options.features}
    if not kept and options.features != "none":
        raise UserError(
            f"mock data have no {options.features}: data.features is one of auto, none, "
            f"{', '.join(parts)}."
        )
    return dataset._replace(catalogue=dataset.catalogue._replace(modalities=kept))
