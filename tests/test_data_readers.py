"""Raw files in, sequences and features out; bad files get one sentence with line and remedy."""

from __future__ import annotations

import csv
import errno
import logging
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_readers
from config import Mock
from data_readers import Options, RawChoices, cache, make_mock, read_folder, read_mmrec
from data_readers.interactions import k_core
from util import UserError

ROWS = [("u1", "b", 5), ("u2", "a", 1), ("u1", "a", 3), ("u1", "c", 3), ("u2", "c", 9)]
ITEMS = ["a", "b", "c"]
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_folder(
    path: Path, rows: list[tuple], items: list[str], features: dict[str, np.ndarray] | None = None
) -> Path:
    """A data set in the folder layout; rows are (user, item, timestamp[, rating])."""
    path.mkdir(parents=True, exist_ok=True)
    header = ["user_id", "item_id", "timestamp", "rating"]
    width = max(map(len, rows))
    with open(path / "interactions.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header[:width], *rows])
    with open(path / "items.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["item_id", "title"], *((i, f"title {i}") for i in items)])
    for name, array in (features or {}).items():
        np.save(path / f"{name}.npy", array)
    return path


def read(folder: Path, **choices: object) -> data_readers.Dataset:
    """Read a folder data set without a cache."""
    return read_folder(folder, Options(**choices))


# --------------------------------------------------------------------------- folder layout


def test_histories_are_in_time_order_and_ties_in_file_order(tmp_path: Path) -> None:
    data = read(write_folder(tmp_path / "d", ROWS, ITEMS))
    assert data.user_ids.tolist() == ["u1", "u2"]
    # items are numbered by their row in items.csv, from 1; u1's a and c tie at time 3
    assert data.sequences.of(0).tolist() == [1, 3, 2]
    assert data.sequences.of(1).tolist() == [1, 3]
    assert data.sequences.timestamps.tolist() == [3, 3, 5, 1, 9]
    assert data.catalogue.item_ids.tolist() == ITEMS
    assert data.catalogue.titles[0] == "title a"


def test_shuffled_ties_depend_on_the_seed_only(tmp_path: Path) -> None:
    rows = [("u", f"i{n}", 7) for n in range(30)]
    folder = write_folder(tmp_path / "d", rows, [f"i{n}" for n in range(30)])
    first, again, other = (
        read(folder, tie_policy="shuffle", seed=seed).sequences.items.tolist() for seed in (1, 1, 2)
    )
    assert first == again != other
    assert sorted(first) == list(range(1, 31))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_order_of_rows_gives_the_same_histories(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    rows = data.draw(
        st.lists(
            st.tuples(st.sampled_from("xyz"), st.sampled_from(ITEMS), st.integers(0, 10**12)),
            min_size=1,
            max_size=20,
            unique_by=lambda row: (row[0], row[2]),  # no ties: the order is then unique
        )
    )
    folder = write_folder(tmp_path_factory.mktemp("d"), data.draw(st.permutations(rows)), ITEMS)
    found = read(folder)
    for user, name in enumerate(found.user_ids):
        expected = [ITEMS.index(i) + 1 for u, i, _ in sorted(rows, key=lambda r: r[2]) if u == name]
        assert found.sequences.of(user).tolist() == expected


def test_ids_stay_text(tmp_path: Path) -> None:
    data = read(write_folder(tmp_path / "d", [("007", "01", 1), ("7", "1", 2)], ["01", "1"]))
    assert data.user_ids.tolist() == ["007", "7"]
    assert data.sequences.items.tolist() == [1, 2]


def test_without_timestamps_the_file_order_counts(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    text = "user_id,item_id\nu,c\nv,a\nu,a\nu,c\n"
    (folder / "interactions.csv").write_text(text, encoding="utf-8")
    data = read(folder)
    assert data.sequences.of(0).tolist() == [3, 1, 3]  # a repeat is one more step
    assert data.sequences.timestamps.tolist() == [-3, -2, -1, -1]
    assert not data.sequences.timed


def test_files_of_other_editors_read_the_same(tmp_path: Path) -> None:
    """A byte order mark, Windows line ends, blank lines, decimals, quotes and further columns."""
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    text = '\ufeff"user_id",item_id,note,timestamp\r\nNA,b,"x, y",2e1\r\n\r\nNA,a,,1.5\r\n'
    (folder / "interactions.csv").write_bytes(text.encode())
    data = read(folder)
    assert data.user_ids.tolist() == ["NA"]
    assert data.sequences.of(0).tolist() == [1, 2]


def test_low_ratings_and_rare_items_go_with_their_features(tmp_path: Path) -> None:
    rows = [
        (u, i, t, 5) for t, (u, i) in enumerate([("p", "a"), ("p", "b"), ("q", "a"), ("q", "b")])
    ]
    rows += [("q", "c", 9, 1)]
    features = np.array([[1.0, 0], [0, 1], [9, 9]])
    folder = write_folder(tmp_path / "d", rows, ITEMS, {"text": features})
    assert len(read(folder, min_rating=3).sequences.items) == 4
    core = read(folder, k_core=2)
    assert core.catalogue.item_ids.tolist() == ["a", "b"]
    alone = write_folder(tmp_path / "alone", rows[:-1], ITEMS[:2], {"text": features[:2]})
    expected = read(alone).catalogue.modalities["text"].features
    np.testing.assert_array_equal(core.catalogue.modalities["text"].features, expected)
    with pytest.raises(UserError, match="no interaction is left"):
        read(folder, k_core=5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=40), st.integers(1, 4))
def test_the_core_is_the_largest_that_holds(rows: list[tuple[int, int]], k: int) -> None:
    left = list(enumerate(rows))
    while True:  # one row at a time: whatever the order, the same rows remain
        users, items = (Counter(row[side] for _, row in left) for side in (0, 1))
        weak = [entry for entry in left if users[entry[1][0]] < k or items[entry[1][1]] < k]
        if not weak:
            break
        left.remove(weak[0])
    columns = np.array(rows, dtype=int).reshape(-1, 2)
    assert np.flatnonzero(k_core(columns[:, 0], columns[:, 1], k)).tolist() == [i for i, _ in left]


def test_repeated_rows_are_dropped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        data = read(write_folder(tmp_path / "d", [*ROWS, ROWS[0], ("u1", "b", 8)], ITEMS))
    assert data.sequences.of(0).tolist() == [1, 3, 2, 2]  # a later visit is no duplicate
    assert "line 7" in caplog.text


def test_features_are_centred_scaled_and_missing_rows_zero(tmp_path: Path) -> None:
    raw = np.array([[1000.0, 2], [3000, 6], [np.nan, np.nan]], dtype=np.float16)
    part = read(write_folder(tmp_path / "d", ROWS, ITEMS, {"audio": raw})).catalogue.modalities
    features, present = part["audio"]
    assert features.dtype == np.float32
    assert present.tolist() == [True, True, False]
    assert not features[2].any()
    np.testing.assert_allclose(features[:2].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(np.square(features[:2]).mean(), 1, rtol=1e-5)


def test_modalities_come_in_a_fixed_order(tmp_path: Path) -> None:
    names = ("audio", "colour", "text", "visual")
    folder = write_folder(tmp_path / "d", ROWS, ITEMS, dict.fromkeys(names, np.eye(3)))
    assert list(read(folder).catalogue.modalities) == ["visual", "text", "audio", "colour"]
    assert not read(folder, features="none").catalogue.modalities
    assert list(read(folder, features="text").catalogue.modalities) == ["text"]
    (folder / "visual.npy").unlink()
    with pytest.raises(UserError, match=r"has no visual.npy, which data.features=visual asks for"):
        read(folder, features="visual")


# --------------------------------------------------------------------------- mmrec layout


def write_mmrec(path: Path, lines: list[str], rows: int = 4) -> Path:
    """A small MMRec folder with visual features."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tiny.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    np.save(path / "image_feat.npy", np.random.default_rng(0).normal(size=(rows, 3)))
    return path


def test_a_row_of_test_does_not_repeat_one_of_train(tmp_path: Path) -> None:
    head = "userID\titemID\ttimestamp\tx_label"
    lines = [head, "5\t0\t1\t0", "5\t1\t2\t0", "5\t1\t2\t0", "5\t1\t2\t2"]
    data = read_mmrec(write_mmrec(tmp_path / "d", lines))
    assert data.sequences.of(0).tolist() == [1, 2, 2] and data.labels.tolist() == [0, 0, 2]


def test_mmrec_keeps_its_own_split(tmp_path: Path) -> None:
    lines = ["userID\titemID\tx_label", "5\t0\t0", "5\t2\t2", "9\t3\t0", "5\t1\t1", "5\t3\t2"]
    data = read_mmrec(write_mmrec(tmp_path / "d", lines))
    assert data.sequences.of(0).tolist() == [1, 3, 2, 4]  # file order, numbers from 1
    assert data.labels.tolist() == [0, 2, 1, 2, 0]
    assert data.catalogue.n_items == 4
    assert list(data.catalogue.modalities) == ["visual"]


def test_mmrec_item_r_has_feature_row_r(tmp_path: Path) -> None:
    """Items without interactions stay; image_feat is visual and leads."""
    folder = write_mmrec(tmp_path / "d", ["userID\titemID", "5\t2"], rows=4)
    raw = np.arange(8.0).reshape(4, 2)
    np.save(folder / "audio_feat.npy", raw)
    data = read_mmrec(folder)
    assert data.labels is None
    assert data.sequences.items.tolist() == [3]
    assert list(data.catalogue.modalities) == ["visual", "audio"]
    features = data.catalogue.modalities["audio"].features
    np.testing.assert_allclose(features, (raw - raw.mean(0)) / raw.std(0), rtol=1e-6)


@pytest.mark.parametrize("name", ["unixReviewTime", "timestamp:float", "review_time", "created_at"])
def test_times_under_another_name_are_not_ignored(tmp_path: Path, name: str) -> None:
    folder = write_mmrec(tmp_path / "d", [f"userID\titemID\t{name}", "5\t2\t7"])
    with pytest.raises(UserError, match="looks like times"):
        read_mmrec(folder)
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "interactions.csv").write_text(f"user_id,item_id,{name}\na,b,7\n")
    with pytest.raises(UserError, match="looks like times"):
        read_folder(tmp_path / "e")


def test_mmrec_feature_files_must_agree(tmp_path: Path) -> None:
    folder = write_mmrec(tmp_path / "d", ["userID\titemID", "5\t2"], rows=4)
    np.save(folder / "text_feat.npy", np.eye(5))
    with pytest.raises(UserError, match=r"differ in rows \(image_feat.npy 4, text_feat.npy 5\)"):
        read_mmrec(folder)
    (folder / "text_feat.npy").rename(folder / "visual_feat.npy")
    with pytest.raises(UserError, match="both hold modality 'visual'"):
        read_mmrec(folder)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["userID\titemID\tx_label", "1\t0\t3"], r"line 2, column 'x_label': 3 is not 0"),
        (["userID\titemID\tx_label", "1\t9\t0"], r"line 2, column 'itemID': 9 is outside the 4"),
        (["userID\titemID", "1\t0", "1\t-1"], r"line 3, column 'itemID': -1 is outside the 4"),
        (["userID\titemID", "1\t0.5"], r"line 2, column 'itemID': 0.5 is not a whole number"),
        (["userID\tx_label", "1\t0"], r"line 1: column 'itemID' is missing"),
    ],
)
def test_mmrec_faults_name_the_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_mmrec(write_mmrec(tmp_path / "d", lines))


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("user_id,timestamp\nu,1\n", "line 1: column 'item_id' is missing"),
        ("user_id,item_id,timestamp\nu,a,1\nu,b,soon\n", "line 3, column 'timestamp': 'soon'"),
        ("user_id,item_id,timestamp\nu,a,1\n\nu,b,\n", "line 4, column 'timestamp': is empty"),
        ("user_id,item_id,timestamp\nu,a,inf\n", "line 2, column 'timestamp': inf is not finite"),
        ("user_id,item_id,timestamp\nu,a,1e20\n", "column 'timestamp': 1e\\+20 does not fit"),
        ("user_id,item_id,rating\nu,a,5\nu,b,good\n", "line 3, column 'rating': 'good' is not"),
        ("user_id,item_id,timestamp\nu,a,1\n,b,2\n", "line 3, column 'user_id': .*empty"),
        ("user_id,item_id,timestamp\nu,a,1\nu, b,2\n", "line 3, column 'item_id': ' b' .*space"),
        ("user_id,item_id,timestamp\nu,a,1\nv\0,b,2\n", "line 3, column 'user_id': .*NUL byte"),
        ("user_id,item_id,timestamp\nu,z,1\n", "line 2, column 'item_id': 'z' is not in items"),
        ("user_id,item_id,timestamp\nu,a,1,9\n", "line 2: 4 fields where the header has 3"),
        ('user_id,item_id,timestamp\nu,a,1\nu,"b,2\n', "line 3: .* unclosed quote"),
        ("user_id,item_id,item_id\nu,a,b\n", "line 1: column 'item_id' appears twice"),
        ("user_id,item_id,timestamp\n", "has a header but no rows"),
        ("", "is empty"),
    ],
)
def test_bad_interactions_are_refused(tmp_path: Path, content: str, message: str) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    (folder / "interactions.csv").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read(folder)
    assert "\n" not in str(caught.value)
    assert "interactions.csv" in str(caught.value)


def test_bytes_that_are_not_utf8_are_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    (folder / "items.csv").write_bytes(b"item_id,title\na,caf\xe9\nb,x\nc,y\n")
    with pytest.raises(UserError, match=r"items.csv, line 2: byte 6 .* is not UTF-8"):
        read(folder)


def test_an_item_listed_twice_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, [*ITEMS, "a"])
    with pytest.raises(UserError, match=r"items.csv, line 5, column 'item_id'"):
        read(folder)


def test_a_title_that_swallows_the_rows_below_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    rows = "".join(f"i{n},title {n}\n" for n in range(20_000))  # more than csv reads by default
    (folder / "items.csv").write_text(f'item_id,title\na,x\nb,"y\n{rows}c,"z"\n', encoding="utf-8")
    with pytest.raises(UserError, match=r"items.csv, line 3, column 'title': .*unclosed quote"):
        read(folder)


def test_a_rating_threshold_needs_ratings(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"interactions.csv has no column 'rating'.*min_rating"):
        read(write_folder(tmp_path / "d", ROWS, ITEMS), min_rating=3)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4)), r"text.npy has 2 rows but items.csv gives 3 items"),
        (np.zeros(3), r"text.npy has shape \(3,\); it must be \[items, dimensions\]"),
        (np.full((3, 2), np.nan), r"text.npy: every row is NaN"),
        (
            np.array([[1, 2], [np.inf, 1], [0, 0.0]]),
            r"text.npy, row 1 \(counted from 0\) has an infinite",
        ),
        (
            np.array([[1, 2], [np.nan, 1], [0, 0.0]]),
            r"text.npy, row 1 \(counted from 0\) has NaN in part",
        ),
        (np.array([["x"], ["y"], ["z"]]), r"text.npy holds <U1"),
    ],
)
def test_bad_features_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS, {"text": array})
    with pytest.raises(UserError, match=message):
        read(folder)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickled_features_are_never_loaded(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    np.save(folder / "text.npy", np.array([[Trap(tmp_path / "sprung")]] * 3), allow_pickle=True)
    with pytest.raises(UserError, match=r"text.npy is not a readable .*allow_pickle=False"):
        read(folder)
    assert not (tmp_path / "sprung").exists()


def test_an_unknown_data_set_gets_a_hint(tmp_path: Path) -> None:
    beauty, toys = (write_folder(tmp_path / name, ROWS, ITEMS) for name in ("beauty", "toys"))
    for wrong, hint in [
        ("mok", "did you mean mock"),
        ("beuty", "did you mean beauty"),
        (str(tmp_path / "beuty"), f"did you mean {beauty}"),
        (str(tmp_path), f"could be any of {beauty}, {toys}"),
        ("x" * 300, "known are mock, .*, beauty, toys"),
    ]:
        with pytest.raises(UserError, match=hint):
            data_readers.read(wrong, data_dir=tmp_path)


def test_settings_of_raw_files_are_refused_for_prepared_ones(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    for raw in (RawChoices(edition="ml-1m"), RawChoices(features_from="x")):
        with pytest.raises(UserError, match=r"holds prepared data; it is for the raw files"):
            data_readers.read(folder, data_dir=tmp_path, raw=raw)


# --------------------------------------------------------------------------- cache


def cached(folder: Path, cache: Path, **choices: object) -> data_readers.Dataset:
    """Read through a cache."""
    return data_readers.read(folder, data_dir=cache, **choices)


def test_the_second_read_is_mapped_from_the_cache(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS, {"text": np.eye(3)})
    before = sorted(path.name for path in folder.iterdir())
    first, second = cached(folder, tmp_path / "data"), cached(folder, tmp_path / "data")
    assert isinstance(second.sequences.items.base, np.memmap)
    assert first.fingerprint == second.fingerprint
    for mine, stored in zip(first.sequences, second.sequences, strict=True):
        np.testing.assert_array_equal(mine, stored)
    np.testing.assert_array_equal(
        first.catalogue.modalities["text"].features, second.catalogue.modalities["text"].features
    )
    assert sorted(path.name for path in folder.iterdir()) == before  # only read


def test_warnings_come_with_every_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_folder(tmp_path / "d", [*ROWS, ROWS[0]], ITEMS)
    for _ in range(2):
        caplog.clear()
        cached(folder, tmp_path / "data")
        assert caplog.text.count("dropped 1 rows that repeat an earlier") == 1


def test_changed_files_or_options_are_read_anew(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    prints = {cached(folder, tmp_path / "data").fingerprint}
    prints.add(cached(folder, tmp_path / "data", k_core=2).fingerprint)
    write_folder(folder, [*ROWS, ("u3", "a", 1)], ITEMS)
    changed = cached(folder, tmp_path / "data")
    assert len(prints | {changed.fingerprint}) == 3
    assert changed.sequences.n_users == 3


def test_large_files_are_hashed_once_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_LARGE", 10)
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    file = folder / "interactions.csv"
    long_ago = time.time() - 100
    os.utime(file, (long_ago, long_ago))
    first = cached(folder, tmp_path / "data").fingerprint
    file.write_bytes(file.read_bytes().replace(b"u1,b", b"u1,c"))  # of the same size
    second = cached(folder, tmp_path / "data").fingerprint
    assert first != second
    os.utime(file, (long_ago, long_ago))  # its old time: taken for the file it was
    assert cached(folder, tmp_path / "data").fingerprint == first
    (tmp_path / "data" / "cache" / "hashes.json").write_text("{", encoding="utf-8")
    assert cached(folder, tmp_path / "data").fingerprint == second


@pytest.mark.parametrize("pattern", ["*.npy", "meta.json"])
@pytest.mark.parametrize("length", [0, 130, None])
def test_a_broken_cache_is_rebuilt(tmp_path: Path, pattern: str, length: int | None) -> None:
    """Files cut short, or lost."""
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    expected = cached(folder, tmp_path / "data").sequences.items.tolist()
    for file in (tmp_path / "data").rglob(pattern):
        if length is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:length])
    found = cached(folder, tmp_path / "data")
    assert found.sequences.items.tolist() == expected
    assert isinstance(found.sequences.items.base, np.memmap)  # stored anew


def test_where_no_cache_can_be_kept_there_is_only_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    (tmp_path / "file").touch()
    assert cached(folder, tmp_path / "file").sequences.n_users == 2
    assert f"{tmp_path / 'file' / 'cache'}: no cache is kept there" in caplog.text

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert cached(folder, tmp_path / "data").sequences.n_users == 2
    assert "No space left" in caplog.text
    assert not list((tmp_path / "data" / "cache").iterdir())  # nothing half-written


def test_the_raw_folder_is_never_written_to(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    before = sorted(folder.rglob("*"))
    for inside in (folder, folder / "data"):
        assert cached(folder, inside).sequences.n_users == 2
    assert sorted(folder.rglob("*")) == before


def test_a_refused_data_set_leaves_no_cache(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS, {"text": np.eye(2)})
    with pytest.raises(UserError):
        cached(folder, tmp_path / "data")
    assert not (tmp_path / "data").exists()


# --------------------------------------------------------------------------- mock


def test_mock_is_the_same_for_the_same_seed() -> None:
    first, again, other = (make_mock(n_users=30, n_items=40, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_mock_takes_the_settings_and_the_run_seed(tmp_path: Path) -> None:
    mock = Mock(n_users=20, n_items=30, dims={"visual": 4, "text": 5})
    data = data_readers.read("mock", data_dir=tmp_path, mock=mock, seed=3)
    bare = data_readers.read("mock", data_dir=tmp_path, mock=mock, seed=4, features="none")
    assert (data.sequences.n_users, data.catalogue.n_items) == (20, 30)
    widths = {name: part.features.shape for name, part in data.catalogue.modalities.items()}
    assert widths == {"visual": (30, 4), "text": (30, 5)}
    assert not bare.catalogue.modalities
    text = data_readers.read("mock", data_dir=tmp_path, mock=mock, seed=3, features="text")
    assert list(text.catalogue.modalities) == ["text"]
    assert data.sequences.items.tolist() != bare.sequences.items.tolist()
    assert not list(tmp_path.iterdir())


def test_more_mock_users_meet_the_same_items() -> None:
    few, many = (make_mock(n_users=n, n_items=40).catalogue.modalities for n in (10, 50))
    for name in few:
        np.testing.assert_array_equal(few[name].features, many[name].features)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n_items": 10}, "n_items must be at least twice history_min"),
        ({"history_min": 9, "history_max": 8}, "history_max must not be below"),
        ({"dims": {"text": 0}}, "dims must name"),
    ],
)
def test_impossible_mock_sizes_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_mock(**settings)


def test_mock_histories_have_no_repeats_and_rising_times() -> None:
    data = make_mock(n_users=25, n_items=30, history_min=6, history_max=12)
    for user in range(25):
        items = data.sequences.of(user)
        assert 6 <= len(items) == len(set(items.tolist())) <= 12
        assert items.min() >= 1
        assert items.max() <= 30
    assert (np.diff(data.sequences.timestamps[: data.sequences.lengths[0]]) > 0).all()


def test_mock_items_lack_some_modalities_but_never_all() -> None:
    parts = make_mock(n_users=20, n_items=400, missing_share=0.4).catalogue.modalities
    present = np.stack([part.present for part in parts.values()])
    assert 0.25 < 1 - present.mean() < 0.45
    assert present.any(axis=0).all()


def test_mock_users_choose_by_their_leading_modality() -> None:
    """Items of one history are alike in the modality that leads and not in the others."""
    data = make_mock(n_users=300, n_items=300, drift_share=0.0, missing_share=0.0)
    names = list(data.catalogue.modalities)
    for leading in names:
        likeness = []
        for part in data.catalogue.modalities.values():
            unit = part.features / np.linalg.norm(part.features, axis=1, keepdims=True)
            users = np.flatnonzero(data.truth.user_groups == leading)
            pairs = [unit[data.sequences.of(u) - 1] for u in users]
            likeness.append(np.mean([(rows @ rows.T).mean() for rows in pairs]))
        assert names[int(np.argmax(likeness))] == leading


def test_mock_drift_changes_the_planted_weights() -> None:
    truth = make_mock(n_users=200, n_items=60, drift_share=0.5).truth
    drifts = truth.drift_steps >= 0
    moved = np.abs(truth.user_weights - truth.drifted_weights).sum(axis=1) > 0
    assert 0.35 < drifts.mean() < 0.65
    assert (moved == drifts).all()
    np.testing.assert_allclose(truth.user_weights.sum(axis=1), 1, rtol=1e-5)


def test_mock_drift_shows_in_the_histories() -> None:
    """Neighbours in a history grow alike in the modality that leads from the drift step on."""
    data = make_mock(n_users=300, n_items=300, history_min=12, drift_share=1.0, missing_share=0.0)
    parts = [
        part.features / np.linalg.norm(part.features, axis=1, keepdims=True)
        for part in data.catalogue.modalities.values()
    ]
    before, after = [], []
    for user, step in enumerate(data.truth.drift_steps):
        assert 0 < step < data.sequences.lengths[user]
        rows = parts[data.truth.drifted_weights[user].argmax()][data.sequences.of(user) - 1]
        likeness = (rows[1:] * rows[:-1]).sum(axis=1)
        before += likeness[: step - 1].tolist()
        after += likeness[step:].tolist()
    assert np.mean(after) > np.mean(before) + 0.1


@pytest.mark.slow
def test_a_large_mock_catalogue_takes_bounded_time() -> None:
    start = time.process_time()
    data = make_mock(n_users=512, n_items=200_000)
    assert time.process_time() - start < 15
    assert data.catalogue.n_items == 200_000
    assert len(np.unique(data.sequences.items)) > 3000  # not only a few candidates


# --------------------------------------------------------------------------- real data


@pytest.mark.parametrize(("name", "sizes", "labels"), [
    ("beauty", (22_363, 12_101, 198_502), None),
    ("tiktok", (9_308, 6_710, 68_722), [59_541, 6_130, 3_051]),
    ("lfm2k", (1_858, 1_425, 56_345), [44_327, 4_799, 7_219]),
    ("movielens-small", (671, 9_066, 100_004), None),
    ("movielens-1m", (6_040, 3_706, 1_000_209), None),
])  # fmt: skip
def test_public_data_sets_have_their_published_sizes(
    name: str, sizes: tuple, labels: list[int] | None
) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not here")
    data = data_readers.read(REAL / name, data_dir="data", use_cache=False)
    found = (data.sequences.n_users, data.catalogue.n_items, len(data.sequences.items))
    assert found == sizes
    assert (None if data.labels is None else np.bincount(data.labels).tolist()) == labels
    for features, present in data.catalogue.modalities.values():
        assert len(features) == data.catalogue.n_items
        np.testing.assert_allclose(np.square(features[present]).mean(), 1, rtol=1e-4)
