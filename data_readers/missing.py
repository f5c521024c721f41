"""Items that lose a modality, to see what a model makes of missing features."""

from __future__ import annotations

import numpy as np

from data_readers.features import standardise
from data_readers.tables import Dataset
from util import UserError


def without_modality(dataset: Dataset, name: str, share: float, seed: int) -> Dataset:
    """The data set in which `share` of the items that have modality `name` lack it.

    Which items is drawn by `seed`: a larger share takes it from the same items and some more. What
    is left is standardised anew, so that nothing of the hidden rows remains. The arrays of
    `dataset` are not changed. Raises UserError for a modality the data set does not have, and for a
    share that is not in [0, 1) or leaves no item with it.
    """
    catalogue = dataset.catalogue
    if name not in catalogue.modalities:
        known = ", ".join(catalogue.modalities) or "none"
        raise UserError(f"{dataset.name} has no modality {name!r}; it has: {known}.")
    features, present = catalogue.modalities[name]
    having = np.flatnonzero(present)
    hidden = np.random.default_rng(seed).permutation(having)[: round(share * len(having))]
    if not 0 <= share < 1 or len(hidden) == len(having):
        raise UserError(f"{share:g} of the {len(having)} items can not lose {name}; some keep it.")
    if not len(hidden):
        return dataset
    left = present.copy()
    left[hidden] = False
    modalities = catalogue.modalities | {name: standardise(features, left)}
    return dataset._replace(
        catalogue=catalogue._replace(modalities=modalities),
        fingerprint=f"{dataset.fingerprint} without {name} of {share:g} by {seed}",
    )
