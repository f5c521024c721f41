"""Raw files in, `tables.Dataset` out. `read` finds out which reader a name or path needs."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

from data_readers.folder import read_folder
from data_readers.interactions import Options
from data_readers.mmrec import inter_file, read_mmrec
from data_readers.mock import make_mock
from data_readers.tables import Dataset
from util import UserError

__all__ = ["Options", "make_mock", "read", "read_folder", "read_mmrec"]

NAMES = ("mock", "amazon", "movielens", "mmrec")


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
) -> Dataset:
    """Read the data set of that name (under `data_dir`) or path.

    Args:
        mock: arguments of `make_mock` as a dict or dataclass; `seed` is added.
        min_rating: drop interactions rated below; 0 keeps all.
        k_core: drop users and items until each has so many interactions; 0 drops none.
        tie_policy: "file" or "shuffle" (by `seed`), the order of equal timestamps of a user.
        features: "auto" loads the feature files found, "none" leaves them unread.
        use_cache: keep prepared arrays under `data_dir/cache`, memory-mapped when read again.

    Raises:
        UserError: one sentence naming file, line and remedy; nothing is left half-written.
    """
    options = Options(min_rating, k_core, tie_policy, seed, features)
    if str(path_or_name) == "mock":
        return _mock(mock or {}, options)
    root = Path(data_dir).expanduser()
    folder = _find(str(path_or_name), root)
    # The raw folder is never written to, not even when data_dir lies inside it.
    outside = folder.resolve() not in (root / "cache").resolve().parents
    cache_dir = root / "cache" if use_cache and outside else None
    reader = read_folder if (folder / "interactions.csv").is_file() else read_mmrec
    return reader(folder, options, cache_dir)


def _mock(settings: Any, options: Options) -> Dataset:
    if options.min_rating > 0 or options.k_core > 0:
        raise UserError(
            "mock data has no ratings and no rare items; set min_rating and k_core to 0."
        )
    if dataclasses.is_dataclass(settings):
        settings = dataclasses.asdict(settings)
    dataset = make_mock(**{"seed": options.seed, **settings})
    if options.features == "none":
        dataset = dataset._replace(catalogue=dataset.catalogue._replace(modalities={}))
    return dataset


def _find(name: str, root: Path) -> Path:
    """The folder to read. Raises UserError saying what was looked for, where, and what is near."""
    places = [root / name] if name in NAMES else [Path(name).expanduser(), root / name]
    for place in places:
        if _readable(place):
            return place
    inside = dict.fromkeys(child for place in places for child in _children(place))
    if len(inside) == 1:  # data/mmrec/baby is meant by mmrec while it is the only one
        return next(iter(inside))
    if inside:
        listed = ", ".join(map(str, inside))
        raise UserError(f"dataset {name!r} could be any of {listed}; name one of them.")
    looked = " and ".join(dict.fromkeys(map(str, places)))
    raise UserError(
        f"dataset {name!r} was not found: looked for interactions.csv or a .inter file "
        f"in {looked}; {_hint(name, root)}"
    )


def _hint(name: str, root: Path) -> str:
    """What may have been meant: a known name, or for a path a data set beside it."""
    place = Path(name).expanduser()
    beside = {child.name: str(child) for child in _children(place.parent)} if "/" in name else {}
    known = {known: known for known in NAMES if known != name}
    known |= {child.name: child.name for child in _children(root)} | beside
    near = difflib.get_close_matches(place.name, known, n=3)
    if near:
        return f"did you mean {' or '.join(known[found] for found in near)}?"
    return f"known are {', '.join(known.values())}."


def _readable(folder: Path) -> bool:
    return os.path.isdir(folder) and (  # unlike Path.is_dir False for names that cannot be
        (folder / "interactions.csv").is_file() or inter_file(folder) is not None
    )


def _children(folder: Path) -> list[Path]:
    """Sub-folders that hold a data set."""
    children = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    return [child for child in children if child.name != "cache" and _readable(child)]
