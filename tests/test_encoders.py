"""Encoders: what is kept, what is said when a package is missing, and real ones where installed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_readers import Options, RawChoices, encoders, read_movielens
from data_readers.folder import read_items
from data_readers.vectors import encode, key_of
from util import UserError

BEAUTY = Path(__file__).resolve().parents[2] / "shared" / "data" / "beauty"


class Fake:
    """An encoder with a known answer that counts what it was asked for and may break."""

    def __init__(self, breaks_after: int = 10**9) -> None:
        self.seen: list[Any] = []
        self.loaded = 0
        self.breaks_after = breaks_after

    def load(self, *_: object) -> Any:
        self.loaded += 1
        return self.make

    def make(self, rows: list) -> np.ndarray:
        if len(self.seen) + len(rows) > self.breaks_after:
            raise KeyboardInterrupt
        self.seen += rows
        return np.array([[len(str(row)), 1] for row in rows], np.float32)


def run(fake: Fake, words: list[str], cache: Path | None, model: str = "fake") -> np.ndarray:
    keys = [key_of(word.encode()) if word else b"" for word in words]
    return encode(keys, words, fake.load, model, cache)


# --------------------------------------------------------------------------- kept vectors


def test_equal_rows_are_encoded_once_and_empty_ones_never() -> None:
    fake = Fake()
    found = run(fake, ["ab", "", "abc", "ab"], None)
    np.testing.assert_array_equal(found, [[2, 1], [np.nan, np.nan], [3, 1], [2, 1]])
    assert fake.seen == ["ab", "abc"]


def test_what_is_known_is_not_encoded_again(tmp_path: Path) -> None:
    run(Fake(), ["a", "bb"], tmp_path)
    again, more, other = Fake(), Fake(), Fake()
    np.testing.assert_array_equal(run(again, ["bb", "a"], tmp_path), [[2, 1], [1, 1]])
    assert not again.loaded  # the model is not even loaded
    run(more, ["a", "ccc"], tmp_path)
    assert more.seen == ["ccc"]
    run(other, ["a"], tmp_path, model="other")
    assert other.seen == ["a"]


def test_a_killed_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_readers.vectors._SHARD", 10)
    words = [f"w{n}" for n in range(35)]
    with pytest.raises(KeyboardInterrupt):
        run(Fake(breaks_after=25), words, tmp_path)
    rest = Fake()
    assert len(run(rest, words, tmp_path)) == 35
    assert rest.seen == words[20:]


def test_broken_files_are_made_again(tmp_path: Path) -> None:
    run(Fake(), ["a"], tmp_path)
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:-3])
    again = Fake()
    np.testing.assert_array_equal(run(again, ["a"], tmp_path), [[1, 1]])
    assert again.seen == ["a"]


def test_where_nothing_can_be_kept_there_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    assert len(run(Fake(), ["a"], tmp_path / "file")) == 1
    assert "encoded features are not kept" in caplog.text


# --------------------------------------------------------------------------- packages and names


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "TEXT_NEEDS", {"no_such_module": "no-such-package"})
    assert not encoders.installed("any", "text")
    with pytest.raises(UserError, match=r"need the package no-such-package .*requirements-feat"):
        encoders.encode_texts(["x"], "any")


def test_a_model_is_known_by_its_name_or_its_files(tmp_path: Path) -> None:
    assert encoders.identity("all-MiniLM-L6-v2") == "all-MiniLM-L6-v2"
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"1")
    here = encoders.identity(str(tmp_path / "here"))
    assert here == encoders.identity(str(tmp_path / "there"))
    (tmp_path / "here" / "weights").write_bytes(b"2")
    assert here != encoders.identity(str(tmp_path / "here"))
    weights = encoders.identity(f"resnet50:{tmp_path / 'here' / 'weights'}")
    assert weights.startswith("resnet50-")
    with pytest.raises(UserError, match=r"none.pth, from which resnet50 is to take its weights"):
        encoders.identity("resnet50:none.pth")


def movies(path: Path) -> Path:
    path.mkdir()
    (path / "ratings.csv").write_text(
        "userId,movieId,rating,timestamp\n1,1,5,1\n1,2,5,2\n1,3,5,3\n", encoding="utf-8"
    )
    (path / "movies.csv").write_text(
        "movieId,title,genres\n1,One,Drama\n2,Two,Comedy\n3,Three,\n", encoding="utf-8"
    )
    return path


def test_posters_are_found_by_movie_and_broken_ones_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = movies(tmp_path / "ml")
    (folder / "posters").mkdir()
    for name in ("2.jpg", "3.PNG", "1.jpg", "9.jpg"):
        (folder / "posters" / name).write_bytes(name.encode())

    def load(_: str) -> Any:
        return lambda files: np.array(
            [[float(file.stem), 0] if file.stem != "1" else [np.nan] * 2 for file in files]
        )

    monkeypatch.setattr(encoders, "_image_encoder", load)
    with caplog.at_level(logging.WARNING):
        data = read_movielens(folder, Options(features="visual"))
    features, present = data.catalogue.modalities["visual"]
    assert present.tolist() == [False, True, True]  # 9 was rated by nobody
    assert features[1, 0] < 0 < features[2, 0]
    assert "1.jpg and 0 more hold no readable picture" in caplog.text


def test_auto_takes_the_encoders_that_are_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = movies(tmp_path / "ml")
    monkeypatch.setattr(encoders, "installed", lambda model, modality: modality == "text")
    monkeypatch.setattr(encoders, "_text_encoder", lambda _: lambda texts: np.eye(3)[: len(texts)])
    fingerprints = set()
    for model in ("one", "two"):
        data = read_movielens(folder, Options(), None, RawChoices(text_encoder=model))
        assert list(data.catalogue.modalities) == ["text"]
        fingerprints.add(data.fingerprint)
    assert len(fingerprints) == 2  # other encoders are other data


# --------------------------------------------------------------------------- real encoders


def packaged(model: str, modality: str) -> None:
    if not encoders.installed(model, modality) or encoders._packaged(model) is None:
        pytest.skip(f"the packages with {model} are not installed")


@pytest.mark.slow
def test_titles_of_beauty_give_its_text_features(tmp_path: Path) -> None:
    packaged("all-MiniLM-L6-v2", "text")
    if not BEAUTY.is_dir():
        pytest.skip("the Beauty folder is not here")
    rows = np.random.default_rng(0).choice(12_101, 1000, replace=False)
    titles = read_items(BEAUTY / "items.csv").titles[rows].tolist()
    known = np.load(BEAUTY / "text.npy")[rows].astype(np.float32)
    found = encoders.encode_texts(titles, "all-MiniLM-L6-v2", tmp_path)
    cosine = (found * known).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(known, axis=1)
    # text.npy is of the same network rounded to 8 bits: 3 of all 12,101 titles are below 0.999
    assert np.mean(cosine >= 0.999) > 0.998
    assert cosine.min() > 0.998


@pytest.mark.slow
def test_pictures_that_look_alike_are_neighbours(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    packaged(encoders.LITE, "visual")
    rng = np.random.default_rng(0)
    files: list[Path | None] = []
    for kind in ("noise", "stripes", "plain"):
        for copy in range(3):
            pixels = {
                "noise": rng.integers(0, 255, (90, 120, 3)),
                "stripes": np.tile(np.arange(120) // 8 % 2 * 200, (90, 1))[:, :, None]
                + [0, 20, 50],
                "plain": np.full((90, 120, 3), 120) + rng.integers(0, 9, 3),
            }[kind].astype(np.uint8)
            files.append(tmp_path / f"{kind}{copy}.png")
            image.fromarray(np.roll(pixels, copy, axis=1)).save(files[-1])
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    found = encoders.encode_images([*files, None, tmp_path / "broken.jpg"], encoders.LITE)
    assert found.shape == (11, 1280)
    assert np.isnan(found[9:]).all()
    unit = found[:9] / np.linalg.norm(found[:9], axis=1, keepdims=True)
    likeness = unit @ unit.T - 2 * np.eye(9)
    assert (likeness.argmax(axis=1) // 3 == np.arange(9) // 3).all()
