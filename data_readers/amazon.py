"""Amazon reviews as published, 2014 and 2023; all files of a category lie in one folder.

2014: `reviews_<Category>_5.json.gz` (5-core, or without `_5` whole), `meta_<Category>.json.gz`,
`image_features_<Category>.b`. 2023: `<Category>.jsonl.gz` and `meta_<Category>.jsonl.gz`. All may
be unzipped. Of several reviews of a product by one user the first counts, as in the 5-core files of
2023; those of 2014 have none. Pictures for an encoder are looked for in `images/<ASIN>.jpg`.
"""

from __future__ import annotations

import logging
import re
from array import array
from math import inf
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data_readers import cache
from data_readers.amazon_items import Product, read_images, read_products
from data_readers.download import Remote
from data_readers.interactions import DEFAULTS, Interactions, Options, arrange
from data_readers.jsonlines import Lines
from data_readers.sources import Items, RawChoices, Source, plan
from data_readers.tables import Catalogue, Dataset
from util import UserError

log = logging.getLogger("pmat")

DEFAULT = "2014/Beauty"
URL_2014 = "https://snap.stanford.edu/data/amazon/productGraph"
URL_2023 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw"
# user, item, rating, time
KEYS_2014 = ("reviewerID", "asin", "overall", "unixReviewTime")
KEYS_2023 = ("user_id", "parent_asin", "rating", "timestamp")
# their types: a bool is no number here
_KINDS = ((str,), (str,), (int, float), (int,))
_REVIEWS = re.compile(r"(reviews_\w+\.json|(?!reviews_|meta_)\w+\.jsonl)(\.gz)?")


class Files(NamedTuple):
    """What a folder has of one category."""

    category: str
    reviews: Path
    meta: Path | None
    images: Path | None


class Reviews(NamedTuple):
    """All reviews in file order, users and items numbered by first appearance."""

    rows: Interactions
    user_ids: list[str]
    item_ids: list[str]


def review_files(folder: Path, edition: str = "") -> list[Path]:
    """The review files of a folder, those of one edition (`Beauty`, `2014/Beauty`) if named."""
    year, _, category = edition.rpartition("/")
    by_stem = {  # zipped and unzipped are one: the last one wins
        _stem(path): path
        for path in sorted(folder.glob("*.json*"))
        if _REVIEWS.fullmatch(path.name) and category in ("", _category(path))
    }
    return [
        path
        for stem, path in by_stem.items()
        if f"{stem}_5" not in by_stem and year in ("", "2023" if ".jsonl" in path.name else "2014")
    ]


def find_files(folder: Path, edition: str = "") -> Files:
    """Raises UserError where the folder has the reviews of no category, or of several."""
    found = review_files(folder, edition)
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no review file"
        raise UserError(f"{folder} has {names}; name one category with data.edition.")
    category = _category(found[0])
    kind = "jsonl" if ".jsonl" in found[0].name else "json"
    meta = [folder / f"meta_{category}.{kind}{suffix}" for suffix in (".gz", "")]
    images = folder / f"image_features_{category}.b"
    return Files(
        category, found[0], next(filter(Path.is_file, meta), None),
        images if images.is_file() else None,
    )  # fmt: skip


def remotes(folder: Path, edition: str, features: str) -> list[Remote]:
    """The public files of an edition, the reviews first.

    Metadata come along unless no features are wanted, the image features (gigabytes) only if they
    are asked for. Raises UserError for an edition of another form than `2014/Beauty`.
    """
    year, _, category = (edition or DEFAULT).rpartition("/")
    if year not in ("", "2014", "2023") or not re.fullmatch(r"\w+", category):
        raise UserError(
            f"data.edition is {edition!r}; write a category of Amazon as 2014/Beauty or "
            "2023/All_Beauty."
        )
    if year == "2023":
        urls = [f"{URL_2023}/review_categories/{category}.jsonl.gz"]
        meta = f"{URL_2023}/meta_categories/meta_{category}.jsonl.gz"
    else:
        urls = [f"{URL_2014}/categoryFiles/reviews_{category}_5.json.gz"]
        meta = f"{URL_2014}/categoryFiles/meta_{category}.json.gz"
    if features != "none":
        urls.append(meta)
    if features == "visual" and year != "2023":
        urls.append(f"{URL_2014}/image_features/categoryFiles/image_features_{category}.b")
    return [Remote(url, folder / url.rpartition("/")[2]) for url in urls]


def read_amazon(
    path: str | Path,
    options: Options = DEFAULTS,
    cache_dir: Path | None = None,
    choices: RawChoices = RawChoices(),  # noqa: B008 (frozen)
) -> Dataset:
    """Read one category, through the cache where `cache_dir` is given. Raises UserError."""
    path = Path(path)
    files = find_files(path, choices.edition)
    own = {}
    if images := files.images:
        make = lambda items: read_images(images, items.ids)  # noqa: E731
        own["visual"] = Source("image features", (images,), make)
    sources = plan(
        path, options.features, choices, cache_dir,
        own=own, pictures=path / "images", described=files.meta is not None,
    )  # fmt: skip
    if files.meta is None:
        log.warning("%s has no meta_%s: titles are empty", path, files.category)
    raw = [file for file in (files.reviews, files.meta) if file]
    layout = {"layout": "amazon", "sources": {m: s.identity for m, s in sources.items()}}
    key = cache.fingerprint(
        [*raw, *(file for source in sources.values() for file in source.files)],
        {**layout, **options.identity()},
        cache_dir,
    )
    name = f"amazon-{files.category}"
    build = lambda: _build(files, name, sources, options, key)  # noqa: E731
    return cache.prepared(cache_dir, name, key, build)


def _build(
    files: Files, name: str, sources: dict[str, Source], options: Options, key: str
) -> Dataset:
    reviews = read_reviews(files.reviews)
    n_items = len(reviews.item_ids)
    arranged = arrange(reviews.rows, n_items, options, Lines(files.reviews), once=True)
    ids = np.array(reviews.item_ids)[arranged.items]
    found = read_products(files.meta, set(ids.tolist())) if files.meta else {}
    products = [found.get(item, Product()) for item in ids.tolist()]
    if files.meta and len(found) < len(ids):
        log.info("%s says nothing of %d items", files.meta, len(ids) - len(found))
    titles, categories = (
        np.array([product[column] for product in products], dtype=str) for column in (0, 1)
    )
    items = Items(ids, titles, categories, [product.text for product in products])
    modalities = {modality: source.make(items) for modality, source in sources.items()}
    users = np.array(reviews.user_ids)[arranged.users]
    catalogue = Catalogue(ids, titles, categories, modalities)
    return Dataset(name, users, arranged.sequences, catalogue, None, None, key)


# --------------------------------------------------------------------------- reviews


class _Codes(dict):
    """Numbers for keys, in order of first appearance."""

    def __missing__(self, key: str) -> int:
        self[key] = code = len(self)
        return code


def read_reviews(path: Path) -> Reviews:
    """Raises UserError naming line and key for a record that lacks one or has the wrong type."""
    users, items = _Codes(), _Codes()
    # Typed arrays, not lists: 30 million reviews take 24 bytes each
    columns = array("i"), array("i"), array("d"), array("q")
    keys, lines = None, Lines(path)
    for line, raw in lines:
        record = lines.parse(line, raw)
        keys = keys or (KEYS_2014 if "reviewerID" in record else KEYS_2023)
        user, item, rating, time = (record.get(key) for key in keys)
        for key, value, kind in zip(keys, (user, item, rating, time), _KINDS, strict=True):
            if type(value) not in kind or value in ("", inf, -inf) or value != value:
                shown = f"is {value!r}" if key in record else "is missing"
                raise lines.fault(line, f"key {key!r} {shown}")
        if abs(rating) > 1e300:  # an integer may be larger than any float
            raise lines.fault(line, f"key {keys[2]!r} is {str(rating)[:20]}..., which is no rating")
        if abs(time) >= 2**63:
            raise lines.fault(line, f"key {keys[3]!r} is {time!r}, which is no time")
        for column, value in zip(columns, (users[user], items[item], rating, time), strict=True):
            column.append(value)
    if not users:
        raise UserError(f"{path} has no reviews; download it again.")
    codes = (np.frombuffer(column, np.dtype(column.typecode)) for column in columns)
    user_codes, item_codes, ratings, times = codes
    rows = Interactions(user_codes, item_codes, times, ratings, None)
    return Reviews(rows, list(users), list(items))


# --------------------------------------------------------------------------- names


def _stem(path: Path) -> str:
    return path.name.partition(".json")[0]


def _category(path: Path) -> str:
    return _stem(path).removeprefix("reviews_").removesuffix("_5")
