"""MovieLens files in miniature, .csv and .dat, and the real ml-latest-small where it is at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data_readers
from data_readers import Options, RawChoices, read_folder, read_movielens
from data_readers.movielens import read_tags
from util import UserError

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
NOTHING = Options(features="none")
RATINGS = "userId,movieId,rating,timestamp\n7,30,3.5,20\n7,2,4.0,10\n9,30,0.5,0\n7,100,5.0,10\n"
MOVIES = '''\
movieId,title,genres
1,Nobody Rated It (1990),Drama
2,"Misérables, Les (1995)",Drama|Musical
30,"""Great"" Cats",(no genres listed)
'''
TAGS = """\
userId,movieId,tag,timestamp
1,2,France,5
2,2,france ,6
1,2,"sad, long",7
1,30,cats,8
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An edition with ratings, movies and tags; nothing is known of movie 100."""
    path = tmp_path / "movielens" / "ml-tiny"
    path.mkdir(parents=True)
    for name, text in {"ratings": RATINGS, "movies": MOVIES, "tags": TAGS}.items():
        (path / f"{name}.csv").write_text(text, encoding="utf-8")
    return path


def write_dat(path: Path) -> Path:
    """The same data in the form of ml-1m: no header, no quotes, Latin-1."""
    path.mkdir()
    ratings = RATINGS.partition("\n")[2].replace(",", "::")
    (path / "ratings.dat").write_text(ratings, encoding="utf-8")
    (path / "movies.dat").write_bytes(
        "1::Nobody Rated It (1990)::Drama\n2::Misérables, Les (1995)::Drama|Musical\n"
        '30::"Great" Cats::(no genres listed)\n'.encode("latin-1")
    )
    return path


# --------------------------------------------------------------------------- sequences and titles


def test_ratings_become_histories(folder: Path) -> None:
    data = read_movielens(folder, NOTHING)
    assert data.name == "ml-tiny"
    assert data.user_ids.tolist() == ["7", "9"]
    assert data.catalogue.item_ids.tolist() == ["2", "30", "100"]  # rated ones, by number
    assert data.sequences.of(0).tolist() == [1, 3, 2]  # 2 and 100 tie and keep file order
    assert data.sequences.timestamps.tolist() == [10, 10, 20, 0]
    assert data.catalogue.titles.tolist() == ["Misérables, Les (1995)", '"Great" Cats', ""]
    assert data.catalogue.categories.tolist() == ["Drama", "", ""]


def test_dat_files_read_the_same(folder: Path, tmp_path: Path) -> None:
    mine = read_movielens(folder, NOTHING)
    other = read_movielens(write_dat(tmp_path / "d"), NOTHING)
    for left, right in zip(mine.sequences, other.sequences, strict=True):
        np.testing.assert_array_equal(left, right)
    for left, right in zip(mine.catalogue[:3], other.catalogue[:3], strict=True):
        assert left.tolist() == right.tolist()


def test_later_dat_files_are_utf8(tmp_path: Path) -> None:
    folder = write_dat(tmp_path / "d")
    (folder / "movies.dat").write_text("2::Misérables::Drama\n", encoding="utf-8")
    assert read_movielens(folder, NOTHING).catalogue.titles[0] == "Misérables"


def test_rating_threshold_core_and_ties(folder: Path) -> None:
    liked = read_movielens(folder, Options(features="none", min_rating=4))
    assert liked.sequences.lengths.tolist() == [2, 0]
    with pytest.raises(UserError, match="no interaction is left"):
        read_movielens(folder, Options(features="none", k_core=3))
    orders = {
        tuple(read_movielens(folder, Options(0, 0, "shuffle", seed, "none")).sequences.items[:2])
        for seed in range(20)
    }
    assert orders == {(1, 3), (3, 1)}


ROW = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(0, 10**9))


@settings(max_examples=30, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=25, unique_by=lambda row: row[::2]), st.booleans())
def test_any_ratings_come_back_in_time_order(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[int, int, int]], dat: bool
) -> None:
    folder = tmp_path_factory.mktemp("ml")
    sep, header = ("::", "") if dat else (",", "userId,movieId,rating,timestamp\n")
    kind = "dat" if dat else "csv"
    body = "".join(sep.join(map(str, (u, i, 3.5, t))) + "\n" for u, i, t in rows)
    (folder / f"ratings.{kind}").write_text(header + body, encoding="utf-8")
    movies = "" if dat else "movieId,title,genres\n"
    (folder / f"movies.{kind}").write_text(movies + sep.join(("1", "One", "x")), encoding="utf-8")
    data = read_movielens(folder, NOTHING)
    for number, user in enumerate(dict.fromkeys(row[0] for row in rows)):
        expected = [str(i) for u, i, _ in sorted(rows, key=lambda row: row[2]) if u == user]
        found = data.catalogue.item_ids[data.sequences.of(number) - 1].tolist()
        assert found == list(
            dict.fromkeys(expected)
        )  # who rates a movie again is not counted twice


# --------------------------------------------------------------------------- tags


def test_the_tags_most_given_lead(folder: Path) -> None:
    assert read_tags(folder, np.array([30, 2, 100])) == [["cats"], ["france", "sad, long"], []]


def test_genome_scores_win_over_tags(folder: Path) -> None:
    tags = "tagId,tag\n1,dull\n2,tense\n3,epic\n"
    (folder / "genome-tags.csv").write_text(tags, encoding="utf-8")
    (folder / "genome-scores.csv").write_text(
        "movieId,tagId,relevance\n2,1,0.1\n2,2,0.7\n2,3,0.9\n", encoding="utf-8"
    )
    assert read_tags(folder, np.array([2, 30])) == [["epic", "tense"], []]


def test_texts_join_title_genres_and_tags(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def encode(texts: list[str], *_: object) -> np.ndarray:
        seen.extend(texts)
        return np.eye(3, dtype=np.float32)

    monkeypatch.setattr("data_readers.encoders.encode_texts", encode)
    read_movielens(folder, Options(features="text"))
    assert seen == [
        "Misérables, Les (1995). Drama, Musical. france, sad, long", '"Great" Cats. cats', "",
    ]  # fmt: skip


# --------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ratings.csv", RATINGS + "x,1,3,4\n", "line 6, column 'userId': 'x' is not a number"),
        ("ratings.csv", RATINGS + "1.5,1,3,4\n", "line 6, column 'userId': 1.5 is not a whole"),
        ("ratings.csv", RATINGS + "1,1,3\n", "line 6, column 'timestamp': is empty"),
        ("ratings.csv", RATINGS + "1,1,3,4,5\n", "line 6: 5 fields where the header has 4"),
        ("ratings.csv", "user,item\n1,2\n", "column 'userId' is missing"),
        ("movies.csv", MOVIES + "2,Again,\n", "line 5, column 'movieId': 2 is given a second time"),
        ("movies.csv", "", "movies.csv is empty"),
    ],
)
def test_bad_files_are_named_by_line(folder: Path, name: str, content: str, message: str) -> None:
    (folder / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        read_movielens(folder, NOTHING)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1::2::3::4::5\n", "line 5: 5 fields where there are 4 columns"),
        ("1::2::three::4\n", "line 5, column 'rating': 'three' is not a number"),
        ("1::2::3\n", "line 5, column 'timestamp': is empty"),
    ],
)
def test_bad_dat_files_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    folder = write_dat(tmp_path / "d")
    with open(folder / "ratings.dat", "a", encoding="utf-8") as file:
        file.write(line)
    with pytest.raises(UserError, match=message):
        read_movielens(folder, NOTHING)


def test_repeated_ratings_are_dropped(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with open(folder / "ratings.csv", "a", encoding="utf-8") as file:
        file.write("9,30,0.5,0\n9,30,4.0,8\n7,2,1.0,3\n")
    data = read_movielens(folder, NOTHING)
    assert data.sequences.of(0).tolist() == [1, 3, 2]
    assert data.sequences.timestamps.tolist() == [3, 10, 20, 0]  # the first in time counts
    assert "dropped 3 rows that repeat an earlier user and item, first at line 3" in caplog.text
    liked = read_movielens(folder, Options(features="none", min_rating=4))
    assert liked.sequences.lengths.tolist() == [1, 0]  # whose first rating was low did not like it


def test_csv_files_must_be_utf8(folder: Path) -> None:
    (folder / "movies.csv").write_bytes(MOVIES.encode("latin-1"))
    with pytest.raises(UserError, match=r"movies.csv, line 3: byte 7 .*0xe9\) is not UTF-8"):
        read_movielens(folder, NOTHING)


# --------------------------------------------------------------------------- by name


def test_the_name_movielens_finds_the_edition(folder: Path, tmp_path: Path) -> None:
    for raw in (RawChoices(), RawChoices("ml-tiny")):
        data = data_readers.read("movielens", data_dir=tmp_path, features="none", raw=raw)
        assert data.name == "ml-tiny"
    folder.rename(tmp_path / "ml-tiny")  # dropped into data/ itself
    for raw in (RawChoices(), RawChoices("ml-tiny")):
        data = data_readers.read("movielens", data_dir=tmp_path, features="none", raw=raw)
        assert data.name == "ml-tiny"
    (tmp_path / "ml-tiny").rename(tmp_path / "movielens" / "other")
    write_dat(tmp_path / "movielens" / "dat")
    with pytest.raises(UserError, match=r"could be any of .*/dat, .*/other"):
        data_readers.read("movielens", data_dir=tmp_path, features="none")


def test_an_edition_must_exist_and_belong(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'ml-3m'; MovieLens has ml-latest-small, .*ml-25m"):
        data_readers.read("movielens", data_dir=tmp_path, raw=RawChoices("ml-3m"))
    with pytest.raises(UserError, match=r"data.edition is 'ml-1m', but .* is given by its path"):
        data_readers.read(folder, data_dir=tmp_path, features="none", raw=RawChoices("ml-1m"))


def test_changed_tags_are_read_anew(folder: Path, tmp_path: Path) -> None:
    def fingerprint() -> str:
        return data_readers.read(folder, data_dir=tmp_path, features="none").fingerprint

    before = fingerprint()
    assert fingerprint() == before
    (folder / "tags.csv").write_text(TAGS + "3,30,dogs,9\n", encoding="utf-8")
    assert fingerprint() != before


def test_ml_latest_small_equals_the_prepared_folder() -> None:
    """The same ratings as `movielens-small`, whose features it takes by movieId."""
    raw, ready = REAL / "movielens-raw" / "ml-latest-small", REAL / "movielens-small"
    if not raw.is_dir() or not ready.is_dir():
        pytest.skip("the MovieLens folders are not here")
    options = Options(k_core=5)
    mine = read_movielens(raw, options, None, RawChoices(features_from=str(ready)))
    other = read_folder(ready, options)
    for user in range(mine.sequences.n_users):
        left = mine.catalogue.item_ids[mine.sequences.of(user) - 1]
        assert left.tolist() == other.catalogue.item_ids[other.sequences.of(user) - 1].tolist()
    names = {item: row for row, item in enumerate(other.catalogue.item_ids.tolist())}
    rows = [names[item] for item in mine.catalogue.item_ids.tolist()]
    assert mine.catalogue.titles.tolist() == other.catalogue.titles[rows].tolist()
    for modality, part in mine.catalogue.modalities.items():
        features, present = other.catalogue.modalities[modality]
        assert part.present.tolist() == present[rows].tolist()
        np.testing.assert_allclose(part.features, features[rows], atol=1e-5)
