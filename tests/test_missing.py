"""Items that lose a modality, and the benchmark that trains DGMRec on them."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import missing_modalities
from data_readers.missing import without_modality
from metrics import Ranks
from util import UserError


def present(dataset, name: str = "visual") -> np.ndarray:
    return dataset.catalogue.modalities[name].present


def test_the_share_is_taken_from_items_that_have_the_modality(task):
    before = present(task.dataset)
    poorer = without_modality(task.dataset, "visual", 0.4, seed=1)
    left = present(poorer)
    assert before.sum() - left.sum() == round(0.4 * before.sum())
    assert not (left & ~before).any(), "nothing appears"
    features = poorer.catalogue.modalities["visual"].features
    assert not features[~left].any(), "missing rows are zeros, as from every reader"
    np.testing.assert_allclose(features[left].mean(0), 0, atol=1e-6)
    other = poorer.catalogue.modalities["text"]
    assert other is task.dataset.catalogue.modalities["text"]
    assert poorer.fingerprint != task.dataset.fingerprint
    assert np.array_equal(present(task.dataset), before), "the data set itself stays whole"


def test_a_larger_share_takes_more_of_the_same_items_and_a_seed_others(task):
    few, many, others = (
        present(without_modality(task.dataset, "visual", share, seed))
        for share, seed in ((0.2, 1), (0.6, 1), (0.2, 2))
    )
    assert (few | ~many).all() and (few != many).any()
    assert (few != others).any()
    assert without_modality(task.dataset, "visual", 0.0, 1) is task.dataset


@pytest.mark.parametrize(
    ("name", "share", "message"),
    [("smell", 0.2, "no modality 'smell'"), ("visual", 1.0, "can not lose"),
     ("visual", -0.1, "can not lose")],
)  # fmt: skip
def test_what_can_not_be_taken_away_is_refused(task, name, share, message):
    with pytest.raises(UserError, match=message):
        without_modality(task.dataset, name, share, 1)


def test_users_are_chosen_by_what_their_target_lacks():
    ranks = Ranks(np.array([0, 3]), np.array([1.0, 2.0, 5.0]), np.array([0, 1, 3]),
                  np.array([1, 2, 3]))  # fmt: skip
    found = missing_modalities.lacking(ranks, np.array([True, True, False]))
    assert found.tolist() == [False, True]


def test_the_benchmark_prints_all_users_and_both_groups_for_each_rate(small_flags, capsys):
    flags = [*small_flags, "--set", "train.epochs=1"]
    missing_modalities.main(["--rates", "0,0.5", "--seeds", "1", *flags])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines if line.startswith("  ")]
    assert [row[:2] for row in rows] == 2 * [["all", "60"], ["target", "lacks"], ["target", "has"]]
    numbers = [int(row[3]) for row in rows if row[0] == "target"]
    assert numbers[0] + numbers[1] == 60 == numbers[2] + numbers[3]
    assert numbers[2] > numbers[0], "more targets lack it at a higher rate"
    assert any(line.startswith("50% of mock's visual taken away") for line in lines)
