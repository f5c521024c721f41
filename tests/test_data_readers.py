"""Raw files in, sequences and features out; bad files get one sentence with line and remedy."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_readers
from data_readers import Options, make_mock, read_folder, read_mmrec
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
    assert core.catalogue.modalities["text"].features.shape == (2, 2)
    with pytest.raises(UserError, match="no interaction is left"):
        read(folder, k_core=5)


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


# --------------------------------------------------------------------------- mmrec layout


def write_mmrec(path: Path, lines: list[str], rows: int = 4) -> Path:
    """A small MMRec folder with visual features."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tiny.inter").write_text("\n".join(lines) + "\n", encoding="utf-8")
    np.save(path / "image_feat.npy", np.random.default_rng(0).normal(size=(rows, 3)))
    return path


def test_mmrec_keeps_its_own_split(tmp_path: Path) -> None:
    lines = ["userID\titemID\tx_label", "5\t0\t0", "5\t2\t2", "9\t3\t0", "5\t1\t1", "5\t3\t2"]
    data = read_mmrec(write_mmrec(tmp_path / "d", lines))
    assert data.sequences.of(0).tolist() == [1, 3, 2, 4]  # file order, numbers from 1
    assert data.labels.tolist() == [0, 2, 1, 2, 0]
    assert data.catalogue.n_items == 4
    assert list(data.catalogue.modalities) == ["visual"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["userID\titemID\tx_label", "1\t0\t3"], r"line 2, column 'x_label': 3 is not 0"),
        (["userID\titemID\tx_label", "1\t9\t0"], r"line 2, column 'itemID': 9 is outside the 4"),
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
        ("user_id,item_id,timestamp\nu,a,1\n,b,2\n", "line 3, column 'user_id': .*empty"),
        ("user_id,item_id,timestamp\nu,z,1\n", "line 2, column 'item_id': 'z' is not in items"),
        ("user_id,item_id,timestamp\nu,a,1,9\n", "line 2: 4 fields where the header has 3"),
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


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4)), r"text.npy .*2.*3"),
        (np.zeros(3), r"text.npy"),
        (
            np.array([[1, 2], [np.inf, 1], [0, 0.0]]),
            r"text.npy, row 1 \(counted from 0\) has an infinite",
        ),
        (
            np.array([[1, 2], [np.nan, 1], [0, 0.0]]),
            r"text.npy, row 1 \(counted from 0\) has NaN in part",
        ),
        (np.array([[1, "x"], [2, "y"], [3, "z"]], dtype=object), r"text.npy"),
    ],
)
def test_bad_features_are_refused(tmp_path: Path, array: np.ndarray, message: str) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS, {"text": array})
    with pytest.raises(UserError, match=message):
        read(folder)


def test_an_unknown_data_set_gets_a_hint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean mock"):
        data_readers.read("mok", data_dir=tmp_path)


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


def test_changed_files_or_options_are_read_anew(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    prints = {cached(folder, tmp_path / "data").fingerprint}
    prints.add(cached(folder, tmp_path / "data", k_core=2).fingerprint)
    write_folder(folder, [*ROWS, ("u3", "a", 1)], ITEMS)
    changed = cached(folder, tmp_path / "data")
    assert len(prints | {changed.fingerprint}) == 3
    assert changed.sequences.n_users == 3


def test_a_broken_cache_is_rebuilt(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "d", ROWS, ITEMS)
    expected = cached(folder, tmp_path / "data").sequences.items.tolist()
    for file in (tmp_path / "data").rglob("*.npy"):
        file.write_bytes(b"broken")
    assert cached(folder, tmp_path / "data").sequences.items.tolist() == expected


# --------------------------------------------------------------------------- mock


def test_mock_is_the_same_for_the_same_seed() -> None:
    first, again, other = (make_mock(n_users=30, n_items=40, seed=seed) for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint


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


@pytest.mark.parametrize(("name", "sizes"), [
    ("beauty", (22_363, 12_101, 198_502)),
    ("tiktok", (9_308, 6_710, 68_722)),
    ("lfm2k", (1_858, 1_425, 56_345)),
    ("movielens-small", (671, 9_066, 100_004)),
])  # fmt: skip
def test_public_data_sets_have_their_published_sizes(name: str, sizes: tuple) -> None:
    if not (REAL / name).is_dir():
        pytest.skip(f"{REAL / name} is not here")
    data = data_readers.read(REAL / name, data_dir="data", features="none", use_cache=False)
    found = (data.sequences.n_users, data.catalogue.n_items, len(data.sequences.items))
    assert found == sizes
