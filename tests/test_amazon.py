"""Amazon's raw files, 2014 and 2023, in miniature: sequences, titles, features, refusals."""

from __future__ import annotations

import gzip
import json
import logging
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_readers
import data_utils
from data_readers import Options, RawChoices, read_amazon
from data_readers.amazon import remotes, review_files
from data_readers.amazon_items import IMAGE, read_products
from util import UserError

BEAUTY = Path(__file__).resolve().parents[2] / "shared" / "data" / "beauty"
NOTHING = Options(features="none")

# user, item, time; B0's second review by ann is not a second interaction
REVIEWS = [
    ("ann", "B0", 9),
    ("bob", "B0", 5),
    ("ann", "B1", 3),
    ("ann", "B2", 3),
    ("ann", "B0", 12),
]
META = """\
{'asin': 'B1', 'title': "Ann's \\"best\\" Soap &amp; Co", 'brand': 'Acme', \
'categories': [['Beauty', 'Soap', 'Bars'], ['Gifts']], 'description': 'Mild.\\n<b>Good</b>', \
'price': 3.5, 'related': None}
{'asin': 'XX', this line is of no item we want and is not looked at
{"asin": "B0", "title": "Brush", "categories": [["Beauty"]]}
"""


def pack(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()))
    return path


def review_2014(user: str, item: str, time: int, stars: float = 5.0) -> dict:
    return {"reviewerID": user, "asin": item, "reviewerName": "x", "helpful": [0, 0],
            "reviewText": "a \"b\" 'c'", "overall": stars, "summary": "s", "unixReviewTime": time,
            "reviewTime": "01 30, 2014"}  # fmt: skip


def review_2023(user: str, item: str, time: int, stars: float = 5.0) -> dict:
    return {"rating": stars, "title": "t", "text": "x\ny", "images": [], "asin": "variant",
            "parent_asin": item, "user_id": user, "timestamp": time, "helpful_vote": 0,
            "verified_purchase": True}  # fmt: skip


def lines(records: list[dict]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Amazon 2014 with reviews and metadata."""
    path = tmp_path / "amazon"
    pack(path / "reviews_Tiny_5.json.gz", lines([review_2014(*row) for row in REVIEWS]))
    pack(path / "meta_Tiny.json.gz", META)
    return path


def write_images(path: Path, items: list[str], seed: int = 0) -> np.ndarray:
    records = np.zeros(len(items), IMAGE)
    records["asin"] = [item.ljust(10, "0") for item in items]
    records["features"] = np.random.default_rng(seed).normal(size=(len(items), 4096))
    path.write_bytes(records.tobytes())
    return records["features"]


# --------------------------------------------------------------------------- sequences


def test_reviews_of_2014_become_histories(folder: Path) -> None:
    data = read_amazon(folder, NOTHING)
    assert data.name == "amazon-Tiny"
    assert data.user_ids.tolist() == ["ann", "bob"]
    assert data.catalogue.item_ids.tolist() == ["B0", "B1", "B2"]  # by first appearance
    assert data.sequences.of(0).tolist() == [2, 3, 1]  # B1 and B2 tie and keep file order
    assert data.sequences.timestamps.tolist() == [3, 3, 9, 5]


def test_reviews_of_2023_read_the_same(tmp_path: Path, folder: Path) -> None:
    new = tmp_path / "new"
    pack(new / "Tiny.jsonl.gz", lines([review_2023(*row) for row in REVIEWS]))
    record = {"parent_asin": "B1", "title": "Soap", "categories": [], "main_category": "Beauty",
              "store": "Acme", "description": ["Mild.", "Good."], "details": {}}  # fmt: skip
    pack(new / "meta_Tiny.jsonl.gz", lines([record]))
    old, data = read_amazon(folder, NOTHING), read_amazon(new, NOTHING)
    for mine, other in zip(data.sequences, old.sequences, strict=True):
        np.testing.assert_array_equal(mine, other)
    assert data.catalogue.titles.tolist() == ["", "Soap", ""]
    assert data.catalogue.categories.tolist() == ["", "Beauty", ""]


def test_unzipped_files_and_times_of_zero_are_fine(tmp_path: Path) -> None:
    (tmp_path / "reviews_Tiny.json").write_text(
        lines([review_2014("u", "B1", 4), review_2014("u", "B0", 0)]) + "\n", encoding="utf-8"
    )
    data = read_amazon(tmp_path, NOTHING)
    assert data.sequences.of(0).tolist() == [2, 1]
    assert data.sequences.timestamps.tolist() == [0, 4]


def test_rating_threshold_and_core(tmp_path: Path) -> None:
    rows = [review_2014(u, i, t, 5) for t, u in enumerate("ab") for i in ("B0", "B1")]
    rows += [review_2014("a", "B2", 9, 5), review_2014("b", "B0", 0, 1)]
    pack(tmp_path / "reviews_Tiny_5.json.gz", lines(rows))
    core = read_amazon(tmp_path, Options(features="none", k_core=2))
    assert core.catalogue.item_ids.tolist() == ["B0", "B1"]
    liked = read_amazon(tmp_path, Options(features="none", min_rating=4))
    assert len(liked.sequences.items) == 4  # b's first review of B0 is a bad one


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text(min_size=1, max_size=4), st.text(min_size=1, max_size=3), st.integers(0, 5)
        ),
        min_size=1,
        max_size=12,
    )
)
def test_any_ids_and_times_keep_their_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, int]]
) -> None:
    rows = [(user.encode("utf-8", "replace").decode(), i.encode("utf-8", "replace").decode(), t)
            for user, i, t in rows]  # fmt: skip
    folder = tmp_path_factory.mktemp("amazon")
    pack(folder / "reviews_Tiny_5.json.gz", lines([review_2014(*row) for row in rows]))
    data = read_amazon(folder, NOTHING)
    for number, user in enumerate(dict.fromkeys(row[0] for row in rows)):
        in_time = sorted((row for row in rows if row[0] == user), key=lambda row: row[2])
        expected = list(dict.fromkeys(row[1] for row in in_time))
        found = data.catalogue.item_ids[data.sequences.of(number) - 1]
        # numpy drops NULs at the end of a string; no ASIN has any
        assert found.tolist() == [item.rstrip("\0") for item in expected]


@pytest.mark.slow
def test_beauty_has_its_published_size(tmp_path: Path) -> None:
    """The published interactions, written in the raw format of 2014 and read back."""
    if not BEAUTY.is_dir():
        pytest.skip("the Beauty folder is not here")
    table = pd.read_csv(BEAUTY / "interactions.csv", dtype=str)
    rows = zip(table["user_id"], table["item_id"], table["timestamp"].astype(int), strict=True)
    pack(tmp_path / "reviews_Beauty_5.json.gz", lines([review_2014(*row) for row in rows]))
    data = read_amazon(tmp_path, Options(features="none", k_core=5))
    sizes = data.sequences.n_users, data.catalogue.n_items, len(data.sequences.items)
    assert sizes == (22_363, 12_101, 198_502)


# --------------------------------------------------------------------------- metadata


def test_metadata_are_python_literals_or_json(folder: Path) -> None:
    found = read_products(folder / "meta_Tiny.json.gz", {"B0", "B1", "B2"})
    assert found["B1"].title == 'Ann\'s "best" Soap & Co'
    assert found["B1"].category == "Soap"
    assert found["B1"].text == ('Ann\'s "best" Soap & Co. Acme. Beauty > Soap > Bars. Mild. Good')
    assert found["B0"].category == "Beauty"
    half = pack(folder / "half.json.gz", '{"asin": "B0", "title": "a \\ud83d"}')
    assert read_products(half, {"B0"})["B0"].title == "a ?"
    assert "B2" not in found  # an item without metadata has no title, and stays
    assert read_amazon(folder, NOTHING).catalogue.titles.tolist()[2] == ""


def test_metadata_are_never_evaluated(tmp_path: Path) -> None:
    trap = tmp_path / "sprung"
    line = f"{{'asin': 'B0', 'title': __import__('pathlib').Path({str(trap)!r}).touch()}}\n"
    with pytest.raises(UserError, match=r"meta.json.gz, line 1: .*is no record"):
        read_products(pack(tmp_path / "meta.json.gz", line), {"B0"})
    assert not trap.exists()


@settings(max_examples=60, deadline=None)
@given(
    st.fixed_dictionaries(
        {"asin": st.just("B0")},
        optional={
            "title": st.one_of(st.none(), st.text(), st.integers(), st.lists(st.text())),
            "brand": st.one_of(st.none(), st.text()),
            "categories": st.one_of(
                st.none(),
                st.text(),
                st.dictionaries(st.text(), st.text(), max_size=1),
                st.lists(st.text(), max_size=3),
                st.lists(st.lists(st.text()), max_size=2),
            ),
            "description": st.one_of(st.none(), st.text(), st.lists(st.text())),
            "price": st.floats(allow_nan=False, allow_infinity=False),
        },
    ),
    st.booleans(),
)
def test_any_metadata_record_gives_plain_text(
    tmp_path_factory: pytest.TempPathFactory, record: dict, literal: bool
) -> None:
    text = repr(record) if literal else json.dumps(record)
    path = tmp_path_factory.mktemp("m") / "meta.json.gz"
    path.write_bytes(gzip.compress(text.encode("utf-8", "replace")))
    product = read_products(path, {"B0"})["B0"]
    for value in product:
        assert isinstance(value, str)
        assert value == " ".join(value.split())
    if isinstance(record.get("title"), str) and record["title"].isalnum():
        assert product.title == record["title"][:200]


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'asin': ", r"line 2: \"\{'asin':\" is no record"),
        ("[1, 2]", r"line 2: '\[1, 2\]' is no record"),
        (lines([{"reviewerID": "u", "asin": "B", "overall": 1.0}]), "'unixReviewTime' is missing"),
        (lines([review_2014("", "B", 1)]), "line 2: key 'reviewerID' is ''"),
        (lines([review_2014("u", "B", "soon")]), "line 2: key 'unixReviewTime' is 'soon'"),
        (lines([review_2014("u", "B", 1, None)]), "line 2: key 'overall' is None"),
        (lines([review_2014("u", "B", 1, float("nan"))]), "line 2: key 'overall' is nan"),
        (lines([review_2014("u", "B", 10**30)]), "line 2: key 'unixReviewTime' .*no time"),
        ("[" * 100_000, "line 2: .* is no record"),
    ],
)
def test_bad_reviews_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    path = pack(tmp_path / "reviews_T_5.json.gz", lines([review_2014("u", "B", 1)]) + line)
    with pytest.raises(UserError, match=message) as caught:
        read_amazon(tmp_path, NOTHING)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    good = lines([review_2014("u", "B", 1)]).encode()
    path = tmp_path / "reviews_T_5.json"
    path.write_bytes(good + good.replace(b'reviewerName": "x', b'reviewerName": "\xe9'))
    with pytest.raises(
        UserError, match=r"reviews_T_5.json, line 2: byte \d+ \(0xe9\) is not UTF-8"
    ):
        read_amazon(tmp_path, NOTHING)


@pytest.mark.parametrize("name", ["reviews_Tiny_5.json.gz", "meta_Tiny.json.gz"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "no gzip"])
def test_damaged_gzip_files_are_named_and_nothing_is_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, name: str, damage: str
) -> None:
    whole = (folder / name).read_bytes()
    flipped = whole[:-6] + bytes([whole[-6] ^ 255]) + whole[-5:]
    (folder / name).write_bytes(
        {"cut": whole[:-10], "flipped": flipped, "no gzip": b"<html>"}[damage]
    )
    asked = ["inspect", str(folder), "--data_dir", str(tmp_path / "data")]
    asked += ["--set", "data.k_core=0", "--set", "data.features=none"]
    assert data_utils.main(asked) == 2
    printed = capsys.readouterr()
    assert re.search(f"{name} is cut short or damaged .*download it again", printed.err)
    assert printed.err.count("\n") == 1 and not printed.out
    assert not (tmp_path / "data").exists()


def test_several_categories_need_a_name(folder: Path, tmp_path: Path) -> None:
    pack(folder / "reviews_Other_5.json.gz", lines([review_2014("u", "B", 1)]))
    pack(folder / "Tiny.jsonl.gz", lines([review_2023("u", "B", 1), review_2023("v", "B", 1)]))
    with pytest.raises(UserError, match=r"reviews_Other_5.json.gz, .*data.edition"):
        read_amazon(folder, NOTHING)
    for edition, users in (("Other", 1), ("2014/Tiny", 2), ("2023/Tiny", 2)):
        assert read_amazon(folder, NOTHING, None, RawChoices(edition)).sequences.n_users == users


def test_downloads_under_way_are_no_reviews(folder: Path) -> None:
    (folder / "reviews_Other_5.json.gz.part").touch()
    (folder / "reviews_Other_5.json.gz.lock").touch()
    assert [path.name for path in review_files(folder)] == ["reviews_Tiny_5.json.gz"]


# --------------------------------------------------------------------------- features


def test_image_features_follow_the_asin(folder: Path, tmp_path: Path) -> None:
    rows = [(u, f"B{n:09}", t) for t, (u, n) in enumerate([("a", 1), ("a", 2), ("b", 3), ("b", 1)])]
    pack(folder / "reviews_Tiny_5.json.gz", lines([review_2014(*row) for row in rows]))
    raw = write_images(folder / "image_features_Tiny.b", ["B000000003", "Z", "B000000001"])
    data = read_amazon(folder, Options(features="visual"))
    features, present = data.catalogue.modalities["visual"]
    assert data.catalogue.item_ids.tolist() == ["B000000001", "B000000002", "B000000003"]
    assert present.tolist() == [True, False, True]
    assert not features[1].any()
    away = raw[2] - raw[0]
    np.testing.assert_allclose(features[0] - features[2], away / np.sqrt((away**2).mean()) * 2,
                               rtol=1e-4, atol=1e-4)  # fmt: skip


def test_image_files_cut_short_or_of_something_else_are_refused(folder: Path) -> None:
    path = folder / "image_features_Tiny.b"
    write_images(path, ["B0", "B1"])
    whole = path.read_bytes()
    visual = Options(features="visual")
    path.write_bytes(whole[:-100])
    with pytest.raises(UserError, match=r"_Tiny.b ends 16294 bytes into record 2.*cut short"):
        read_amazon(folder, visual)
    path.write_bytes(whole[: IMAGE.itemsize] + whole[5 : IMAGE.itemsize + 5])
    with pytest.raises(UserError, match=r"_Tiny.b, record 2: .* is no ASIN"):
        read_amazon(folder, visual)
    write_images(path, ["Z"])
    with pytest.raises(UserError, match=r"_Tiny.b has features of none of the 3 items"):
        read_amazon(folder, visual)


def test_ready_features_win_and_are_matched_by_id(folder: Path, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    ready.mkdir()
    (ready / "items.csv").write_text("item_id\nB2\nother\nB0\n", encoding="utf-8")
    raw = np.array([[1.0, 2], [50, 60], [3, -4]], np.float32)
    np.save(ready / "text.npy", raw)
    data = read_amazon(folder, Options(), None, RawChoices(features_from=str(ready)))
    features, present = data.catalogue.modalities["text"]
    assert list(data.catalogue.modalities) == ["text"]
    assert present.tolist() == [True, False, True]
    centred = raw[[2, 0]] - raw[[2, 0]].mean(0)
    np.testing.assert_allclose(features[[0, 2]], centred / np.sqrt((centred**2).mean()), rtol=1e-6)


def test_missing_features_are_said_once_and_insisted_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("data_readers.encoders.installed", lambda *_: False)
    with caplog.at_level(logging.WARNING):
        assert not read_amazon(folder).catalogue.modalities
    assert "pip install -r requirements-features.txt" in caplog.text
    with pytest.raises(UserError, match=r"nothing to make visual features of"):
        read_amazon(folder, Options(features="visual"))
    with pytest.raises(UserError, match=r"features_from is nowhere"):
        read_amazon(folder, Options(), None, RawChoices(features_from="nowhere"))
    np.save(folder / "text.npy", np.eye(3))
    with pytest.raises(UserError, match=r"has text.npy but no items.csv.*item_id"):
        read_amazon(folder)


# --------------------------------------------------------------------------- by name


def test_the_name_amazon_finds_the_files(folder: Path, tmp_path: Path) -> None:
    first = data_readers.read("amazon", data_dir=tmp_path, features="none")
    again = data_readers.read("amazon", data_dir=tmp_path, features="none")
    assert isinstance(again.sequences.items.base, np.memmap)
    assert first.fingerprint == again.fingerprint
    assert data_readers.read(folder, data_dir=tmp_path, features="none").sequences.n_users == 2
    for raw in (RawChoices(), RawChoices("2014/Tiny")):  # dropped into data/ itself
        beside = data_readers.read("amazon", data_dir=folder, features="none", raw=raw)
        np.testing.assert_array_equal(beside.sequences.items, first.sequences.items)


def test_editions_name_their_public_files(tmp_path: Path) -> None:
    def names(edition: str, features: str) -> list[str]:
        return [remote.target.name for remote in remotes(tmp_path, edition, features)]

    assert names("", "auto") == ["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz"]
    assert names("Toys", "none") == ["reviews_Toys_5.json.gz"]
    assert names("2014/Toys", "visual")[2] == "image_features_Toys.b"
    assert names("2023/All_Beauty", "text") == ["All_Beauty.jsonl.gz", "meta_All_Beauty.jsonl.gz"]
    for wrong in ("2018/Toys", "2014/../x", "/"):
        with pytest.raises(UserError, match="write a category of Amazon as 2014/Beauty"):
            remotes(tmp_path, wrong, "auto")
