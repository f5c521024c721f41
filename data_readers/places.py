"""Which folder a name or path means, which layout it has, and a download where it is empty."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from data_readers import amazon, movielens
from data_readers.download import obtain, obtain_archive
from util import UserError

_SHOWN = 10  # data sets that a message names
RAW = ("amazon", "movielens")  # layouts of raw public files
NAMES = ("mock", *RAW, "mmrec")


def layout(folder: Path) -> str | None:
    """What a folder holds: folder, mmrec, movielens or amazon; None for nothing we can read."""
    if not os.path.isdir(folder):  # unlike Path.is_dir False for names that cannot be
        return None
    if (folder / "interactions.csv").is_file():
        return "folder"
    if any(folder.glob("*.inter")):
        return "mmrec"
    if movielens.ratings_file(folder):
        return "movielens"
    return "amazon" if amazon.review_files(folder) else None


def raw_folder(name: str, root: Path, edition: str, features: str) -> Path:
    """The folder of amazon or movielens under `root`: what is there, or else downloaded.

    An edition that is named is looked for and downloaded; without a name one is only where there is
    nothing. Raises UserError where several are meant or the download is not possible.
    """
    home = root / name
    if not edition and (found := _unpacked(name, root)):
        return _only(name, found)
    if name == "movielens":
        return _movielens(home, edition)
    home = next(
        (f for f in (home, root) if amazon.review_files(f, edition or amazon.DEFAULT)), home
    )
    remotes = amazon.remotes(home, edition, features)
    if amazon.review_files(home, edition or amazon.DEFAULT):
        remotes = remotes[1:]  # the first are the reviews, which may go by other names
    obtain([it for it in remotes if not it.target.with_suffix("").exists()], name)
    return home


def _unpacked(name: str, root: Path) -> list[Path]:
    """Folders of raw files in `root/name`, else wherever else in `root` somebody put them."""
    home = root / name
    found = [home] if layout(home) else _children(home)
    return found or [folder for folder in (root, *_children(root)) if layout(folder) == name]


def _movielens(home: Path, edition: str) -> Path:
    """The folder of an edition, unpacked from a zip file that is there or else is downloaded."""
    zipped = [
        place / f"{name}.zip"
        for place in (home, home.parent)
        for name in movielens.EDITIONS
        if edition in ("", name) and (place / f"{name}.zip").is_file()
    ]
    if zipped and not edition:
        edition = _only("movielens", zipped).stem
    edition = edition or movielens.DEFAULT
    folder = home / edition
    for ready in (folder, home.parent / edition):
        if layout(ready):
            return ready
    if folder.exists():
        raise UserError(
            f"{folder} is there but lacks ratings.csv and movies.csv (or .dat): put them there, or "
            "move it away and run again to download it."
        )
    place = zipped[0].parent if zipped else home
    obtain_archive(movielens.remote(place, edition), folder, movielens.UNPACKED)
    return folder


def find(name: str, root: Path) -> Path:
    """The folder to read. Raises UserError saying what was looked for, where, and what is near."""
    places = [root / name] if name in NAMES else [Path(name).expanduser(), root / name]
    for place in places:
        if layout(place):
            return place
    inside = dict.fromkeys(child for place in places for child in _children(place))
    if inside:  # data/mmrec/baby is meant by mmrec while it is the only one
        return _only(name, list(inside))
    looked = " and ".join(dict.fromkeys(map(str, places)))
    raise UserError(
        f"dataset {name!r} was not found: looked for interactions.csv, a .inter file or "
        f"raw files in {looked}; {_hint(name, root)}"
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
    shown = list(known.values())[:_SHOWN]
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"known are {', '.join(shown)}{more}."


def _only(name: str, found: list[Path]) -> Path:
    if len(found) > 1:
        listed = ", ".join(map(str, found))
        raise UserError(f"dataset {name!r} could be any of {listed}; name one of them.")
    return found[0]


def _children(folder: Path) -> list[Path]:
    """Sub-folders that hold a data set."""
    children = sorted(folder.iterdir()) if os.path.isdir(folder) else []
    return [child for child in children if child.name != "cache" and layout(child)]
