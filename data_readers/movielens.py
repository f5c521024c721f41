"""MovieLens as published: the CSV files of ml-25m, ml-latest and ml-latest-small, ml-1m's .dat.

Items are the movies somebody rated, by movieId. Their text is the title, the genres and the tags
that fit best: by genome scores where the edition has them, else those that users gave most.
Pictures for an encoder are looked for in `posters/<movieId>.jpg`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from data_readers import cache
from data_readers.download import Remote
from data_readers.interactions import DEFAULTS, Interactions, Options, arrange
from data_readers.parsing import CSV, REAL, TEXT, WHOLE, Form, Table, dataset_name, read_table
from data_readers.sources import Items, RawChoices, Source, plan
from data_readers.tables import Catalogue, Dataset
from util import UserError

DEFAULT = "ml-latest-small"
URL = "https://files.grouplens.org/datasets/movielens"
# edition -> MD5 of the zip file; ml-latest and ml-latest-small are renewed now and then
EDITIONS = {
    "ml-latest-small": "",
    "ml-latest": "",
    "ml-25m": "6b51fb2759a8657d3bfcbfc42b592ada",
    "ml-1m": "c4d9eecfca2ab87c1945afe126590906",
}
RATINGS = {"userId": WHOLE, "movieId": WHOLE, "rating": REAL, "timestamp": WHOLE}
MOVIES = {"movieId": WHOLE, "title": TEXT, "genres": TEXT}
TAGS = ("tags.csv", "genome-scores.csv", "genome-tags.csv")
UNPACKED = ("ratings.csv", "movies.csv", *TAGS, "ratings.dat", "movies.dat", "README.txt", "README")
BEST_TAGS = 10  # tags of a movie's text
RELEVANT = 0.5  # genome score from which a tag counts


class Movies(NamedTuple):
    """What is known of the movies that somebody rated."""

    titles: list[str]  # [N]
    genres: list[list[str]]  # [N]


def ratings_file(folder: Path) -> Path | None:
    """ratings.csv or ratings.dat, where the movies file is beside it."""
    for kind in ("csv", "dat"):
        if (folder / f"ratings.{kind}").is_file() and (folder / f"movies.{kind}").is_file():
            return folder / f"ratings.{kind}"
    return None


def remote(folder: Path, edition: str) -> Remote:
    """The zip file of an edition, to lie in `folder`. Raises UserError for an unknown one."""
    edition = edition or DEFAULT
    if edition not in EDITIONS:
        raise UserError(f"data.edition is {edition!r}; MovieLens has {', '.join(EDITIONS)}.")
    name = f"{edition}.zip"
    return Remote(f"{URL}/{name}", folder / name, EDITIONS[edition])


def read_movielens(
    path: str | Path,
    options: Options = DEFAULTS,
    cache_dir: Path | None = None,
    choices: RawChoices = RawChoices(),  # noqa: B008 (frozen)
) -> Dataset:
    """Read one edition, through the cache where `cache_dir` is given. Raises UserError."""
    path = Path(path)
    ratings = ratings_file(path)
    if ratings is None:
        raise UserError(f"{path} lacks ratings.csv and movies.csv (or .dat); put them there.")
    sources = plan(
        path, options.features, choices, cache_dir,
        own={}, pictures=path / "posters", described=True,
    )  # fmt: skip
    movies = path / f"movies{ratings.suffix}"
    raw = [ratings, movies, *filter(Path.is_file, (path / name for name in TAGS))]
    layout = {"layout": "movielens", "sources": {m: s.identity for m, s in sources.items()}}
    key = cache.fingerprint(
        [*raw, *(file for source in sources.values() for file in source.files)],
        {**layout, **options.identity()},
        cache_dir,
    )
    name = dataset_name(path, path.resolve().name)
    build = lambda: _build(ratings, movies, name, sources, options, key)  # noqa: E731
    return cache.prepared(cache_dir, name, key, build)


def _build(
    ratings: Path, movies: Path, name: str, sources: dict[str, Source], options: Options, key: str
) -> Dataset:
    rows, user_ids, item_ids, source = _read_ratings(ratings)
    arranged = arrange(rows, len(item_ids), options, source, once=True)
    del rows
    wanted = item_ids[arranged.items]
    known = read_movies(movies, wanted)
    tags = read_tags(movies.parent, wanted) if sources else [[]] * len(wanted)
    parts = zip(known.titles, map(", ".join, known.genres), map(", ".join, tags), strict=True)
    ids = wanted.astype(str)
    titles = np.array(known.titles, dtype=str)
    categories = np.array([(genres or [""])[0] for genres in known.genres], dtype=str)
    texts = [". ".join(filter(None, part)) for part in parts]
    described = Items(ids, titles, categories, texts)
    modalities = {modality: source.make(described) for modality, source in sources.items()}
    catalogue = Catalogue(ids, titles, categories, modalities)
    names = user_ids[arranged.users].astype(str)
    return Dataset(name, names, arranged.sequences, catalogue, None, None, key)


def _read_ratings(path: Path) -> tuple[Interactions, np.ndarray, np.ndarray, Table]:
    """Ratings in file order, the ids behind their codes, and the emptied table to name lines by.

    Narrow copies outlive the table: 25 million ratings take 24 bytes each instead of 48.
    """
    table = _read(path, RATINGS)
    users, user_ids = pd.factorize(table.whole("userId"))
    items, item_ids = pd.factorize(table.whole("movieId"), sort=True)
    rows = Interactions(
        users.astype(np.int32), items.astype(np.int32),
        table.frame["timestamp"].to_numpy(copy=True), table.frame["rating"].to_numpy(copy=True),
        None,
    )  # fmt: skip
    return rows, user_ids, item_ids, table._replace(frame=pd.DataFrame())


def _read(path: Path, columns: dict[str, str]) -> Table:
    """A file of either form; the .dat files have no header."""
    form = Form("::", tuple(columns), _encoding(path)) if path.suffix == ".dat" else CSV
    return read_table(path, columns, form=form)


def _encoding(path: Path) -> str:
    """Titles of ml-1m are Latin-1, those of later editions UTF-8."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


# --------------------------------------------------------------------------- movies and tags


def read_movies(path: Path, wanted: np.ndarray) -> Movies:
    """Titles and genres of the movies `wanted` [N]; empty for those that the file does not have."""
    table = _read(path, MOVIES)
    ids = table.whole("movieId")
    table.check("movieId", ~pd.Series(ids).duplicated().to_numpy(), "{} is given a second time")
    frame = table.frame[["title", "genres"]].set_axis(ids, axis=0).reindex(wanted, fill_value="")
    genres = [
        [] if listed in ("", "(no genres listed)") else listed.split("|")
        for listed in frame["genres"].str.strip()
    ]
    return Movies(frame["title"].str.strip().tolist(), genres)


def read_tags(folder: Path, wanted: np.ndarray) -> list[list[str]]:
    """Up to BEST_TAGS tags of each movie `wanted` [N], the best first; maybe none."""
    scores = folder / "genome-scores.csv"
    if scores.is_file() and (folder / "genome-tags.csv").is_file():
        ranked = _genome(scores, folder / "genome-tags.csv")
    elif (folder / "tags.csv").is_file():
        ranked = _given(folder / "tags.csv")
    else:
        return [[]] * len(wanted)
    ranked = ranked.sort_values("weight", ascending=False, kind="stable")
    best = ranked.groupby("movieId", sort=False).head(BEST_TAGS).groupby("movieId")["tag"].agg(list)
    return [tags if isinstance(tags, list) else [] for tags in best.reindex(wanted)]


def _genome(scores: Path, names: Path) -> pd.DataFrame:
    """movieId, tag and weight, the tag genome's relevance."""
    table = read_table(scores, {"movieId": WHOLE, "tagId": WHOLE, "relevance": REAL})
    tags = read_table(names, {"tagId": WHOLE, "tag": TEXT}).frame
    frame = table.frame[table.frame["relevance"] >= RELEVANT]
    frame = frame.merge(tags, on="tagId")
    return frame.rename(columns={"relevance": "weight"})


def _given(path: Path) -> pd.DataFrame:
    """movieId, tag and weight, the number of users who gave that tag."""
    frame = read_table(path, {"movieId": WHOLE, "tag": TEXT}).frame
    frame = frame.assign(tag=frame["tag"].str.strip().str.lower())
    return frame.groupby(["movieId", "tag"], sort=False).size().rename("weight").reset_index()
