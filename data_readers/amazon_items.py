"""What Amazon's files say of products: titles and texts out of metadata, image features."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_readers.features import pick_rows
from data_readers.jsonlines import Lines
from data_readers.tables import Modality
from util import UserError

IMAGE = np.dtype([("asin", "S10"), ("features", "<f4", (4096,))])  # a record of the .b files
LONGEST_TITLE, LONGEST_TEXT = 200, 2000  # characters; encoders read less
_FIRST_KEY = re.compile(rb"""\s*\{\s*['"](?:parent_)?asin['"]:\s*['"]([^'"]*)['"]""")


class Product(NamedTuple):
    """What the metadata say of an item."""

    title: str = ""
    category: str = ""  # coarse, to colour plots by
    text: str = ""  # title, brand, categories and description, for an encoder


def read_products(path: Path, wanted: set[str]) -> dict[str, Product]:
    """What a meta file says of the items in `wanted`. Raises UserError naming the line.

    Python literals are slow to parse, so a line that begins with another item's ASIN is skipped.
    """
    found: dict[str, Product] = {}
    lines = Lines(path)
    for line, raw in lines:
        first = _FIRST_KEY.match(raw)
        if first and first[1].decode("utf-8", "replace") not in wanted:
            continue
        record = lines.parse(line, raw)
        asin = record.get("parent_asin") or record.get("asin")
        if not isinstance(asin, str):
            raise lines.fault(line, "it has neither 'asin' nor 'parent_asin'")
        if asin in wanted and asin not in found:
            found[asin] = _product(record)
    return found


def _product(record: dict[str, Any]) -> Product:
    title = _text(record.get("title"))
    path = record.get("categories")
    if isinstance(path, list) and path and isinstance(path[0], list):  # 2014: several, main first
        path = path[0]
    levels = [level for level in map(_text, path if isinstance(path, list) else [path]) if level]
    levels = levels or [_text(record.get("main_category"))]
    parts = [title, _text(record.get("brand") or record.get("store")), " > ".join(levels)]
    parts.append(_text(record.get("description")))
    category = levels[1] if len(levels) > 1 else levels[0]
    text = ". ".join(filter(None, parts))
    limits = (title, LONGEST_TITLE), (category, LONGEST_TITLE), (text, LONGEST_TEXT)
    return Product(*(words[:limit].rstrip() for words, limit in limits))


def _text(value: Any) -> str:
    """Plain text of a field that may be absent, a list, or hold HTML."""
    if isinstance(value, list):
        value = " ".join(map(str, value))
    if not isinstance(value, str):
        return ""
    value = value.encode("utf-8", "replace").decode()  # JSON can hold halves of a character
    return " ".join(re.sub(r"<[^>]*>", " ", html.unescape(value)).split())


# --------------------------------------------------------------------------- image features


def read_images(path: Path, ids: np.ndarray) -> Modality:
    """Features of the items `ids` [N] out of a .b file, of which only their records are read.

    Raises UserError for a file that ends inside a record or holds something else.
    """
    whole, rest = divmod(path.stat().st_size, IMAGE.itemsize)
    if rest or not whole:
        raise UserError(
            f"{path} ends {rest} bytes into record {whole + 1}, which needs {IMAGE.itemsize}; "
            "it was cut short: download it again."
        )
    records = np.memmap(path, IMAGE, mode="r")
    names = records["asin"].tolist()
    odd = next((row for row, name in enumerate(names) if not name.isalnum()), None)
    if odd is not None:
        raise UserError(
            f"{path}, record {odd + 1}: {names[odd]!r} is no ASIN; download the file again."
        )
    row_of = {name.decode(): row for row, name in enumerate(names)}
    rows = np.array([row_of.get(item, -1) for item in ids.tolist()])
    return pick_rows(records["features"], rows, path)
