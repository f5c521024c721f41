"""What a trained model says about users and items: modality weights, semantic IDs, their quality.

Everything here goes through the contract (`item_ids`, `modality_weights_of`), so it holds for any
model; a model without semantic IDs or without weights writes nothing.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from config import Config
from data_utils import Dataset, Sequences, eval_order, history_batch
from metrics import churn, id_quality, uniqueness
from model_parts.base import Batch, Recommender
from util import atomic_path

WEIGHTS, IDS, TIMELINE = "modality_weights.csv", "semantic_ids.csv", "modality_timeline.csv"
PLANTED = "planted "  # columns of the true weights on mock
QUALITY_USERS = 32  # whose codes the ID metrics look at
QUALITY_NUMBERS = 20_000_000  # digits of users and items held at once: fewer users beyond
TIMELINE_USERS = 200  # of those who drift and of the others, whose weights are followed
MAX_PERSONAL_ROWS = 500_000  # of semantic_ids.csv
USERS_PER_MODALITY = 2  # whose personal IDs are written: those who weigh that modality most


def batch_of(model: Recommender, histories: Sequences, users: np.ndarray, window: int) -> Batch:
    """The newest items of these users, on the device of the model."""
    tensors = [*model.parameters(), *model.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    return Batch(*map(torch.from_numpy, history_batch(histories, users, window))).to(device)


def modality_weights(
    model: Recommender,
    histories: Sequences,
    users: np.ndarray,
    config: Config,
    owners: np.ndarray | None = None,
) -> np.ndarray | None:
    """[E, M] mean weights after the histories `users`; None without such weights.

    `owners` [histories] says whose they are where there are several histories of one user.
    """
    weights = None
    for rows in eval_order(histories, users, config.train.eval_batch_size):
        batch = batch_of(model, histories, users[rows], config.data.max_history)
        if owners is not None:
            batch = batch._replace(users=torch.from_numpy(owners[users[rows]]).to(batch.users))
        found = model.modality_weights_of(batch)
        if found is None:
            return None
        if weights is None:
            weights = np.zeros((len(users), found.shape[1]), np.float32)
        weights[rows] = found.float().cpu().numpy()
    return weights


# --------------------------------------------------------------------------- quality


@torch.inference_mode()
def measured_ids(
    model: Recommender, dataset: Dataset, histories: Sequences, config: Config
) -> dict[str, float] | None:
    """`id_quality` of metrics.json, None without semantic IDs.

    Where IDs depend on the user, all but `uniqueness` are of QUALITY_USERS users spread over the
    data set, and these are added: `uniqueness_per_user`, `churn` (share of digits that change when
    one more item arrives) and `personalisation_discrimination`.
    """
    model.eval()
    everybody = model.item_ids()
    if everybody is None:
        return None
    shared = everybody.cpu().numpy()
    parts = [part.features for part in dataset.catalogue.modalities.values()]
    features = np.concatenate(parts, axis=1) if parts else None
    users = _spread(np.flatnonzero(histories.lengths > 1), QUALITY_NUMBERS // max(shared.size, 1))
    if not len(users):
        return id_quality(shared, model.n_codes, features)
    codes = _codes(model, histories, users, config)
    if codes is None or codes.ndim == 2:
        return id_quality(shared, model.n_codes, features)
    alphas = modality_weights(model, histories, users, config)
    before = _codes(model, without_newest(histories), users, config)
    found = id_quality(codes, model.n_codes, features, alphas=alphas)
    of_users = {"uniqueness_per_user": found["uniqueness"], "churn": churn(before, codes).mean()}
    return found | {"uniqueness": uniqueness(shared)} | {k: float(v) for k, v in of_users.items()}


def _spread(users: np.ndarray, most: int) -> np.ndarray:
    count = min(len(users), QUALITY_USERS, max(most, 2))
    return users[np.linspace(0, len(users) - 1, count).astype(int)] if count else users


def _codes(
    model: Recommender, histories: Sequences, users: np.ndarray, config: Config
) -> np.ndarray | None:
    codes = model.item_ids(batch_of(model, histories, users, config.data.max_history))
    return None if codes is None else codes.cpu().numpy()


def without_newest(histories: Sequences) -> Sequences:
    """Every history but its last item."""
    lengths = np.maximum(histories.lengths - 1, 0)
    kept = np.ones(len(histories.items), dtype=bool)
    kept[histories.offsets[1:][histories.lengths > 0] - 1] = False
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Sequences(histories.items[kept], offsets, histories.timestamps[kept])


# --------------------------------------------------------------------------- files


@torch.inference_mode()
def write_personal(
    folder: Path, model: Recommender, dataset: Dataset, histories: Sequences, config: Config
) -> None:
    """`modality_weights.csv`, `semantic_ids.csv` and `modality_timeline.csv` of a trained model.

    A model without modality weights or without semantic IDs leaves the files out.
    """
    model.eval()
    users = np.flatnonzero(histories.lengths > 0)
    weights = modality_weights(model, histories, users, config)
    if weights is not None:
        _write_csv(_weights_frame(dataset, users, weights), folder / WEIGHTS)
        _write_csv(_timeline_frame(model, dataset, histories, config), folder / TIMELINE)
    codes = model.item_ids()
    if codes is not None:
        blocks = {"": codes.cpu().numpy()}
        blocks |= _personal_ids(model, dataset, histories, config, extreme_users(users, weights))
        _write_ids(folder / IDS, dataset, blocks)


def extreme_users(
    users: np.ndarray, weights: np.ndarray | None, each: int = USERS_PER_MODALITY
) -> np.ndarray:
    """Those who weigh each modality most, `each` of them, modalities taking turns.

    weights [E, M] of these users [E]; the first few users without weights.
    """
    if weights is None:
        return users[:each]
    order = np.argsort(-weights, axis=0, kind="stable")[:each]
    return users[list(dict.fromkeys(order.ravel().tolist()))]


def _write_csv(frame: pd.DataFrame, target: Path) -> None:
    with atomic_path(target) as path:
        frame.to_csv(path, index=False, float_format="%.5f")


def _weights_frame(dataset: Dataset, users: np.ndarray, weights: np.ndarray) -> pd.DataFrame:
    """user_id and one column per modality, mean over items.

    On mock also `planted <modality>`, the true weights in force at the end of the history.
    """
    names = list(dataset.catalogue.modalities)
    frame = pd.DataFrame(weights, columns=weight_names(dataset, weights.shape[1]))
    frame.insert(0, "user_id", dataset.user_ids[users])
    if _planted(dataset):
        frame[[PLANTED + name for name in names]] = dataset.truth.drifted_weights[users]
    return frame


def _planted(dataset: Dataset) -> bool:
    """Whether tastes were planted for the modalities there are; `data.features` may have fewer."""
    truth, names = dataset.truth, dataset.catalogue.modalities
    return truth is not None and truth.drifted_weights.shape[1] == len(names)


def _personal_ids(
    model: Recommender, dataset: Dataset, histories: Sequences, config: Config, users: np.ndarray
) -> dict[str, np.ndarray]:
    """user_id -> codes [N, L] of these users; nothing where IDs are the same for all."""
    users = users[: MAX_PERSONAL_ROWS // dataset.catalogue.n_items]
    codes = _codes(model, histories, users, config) if len(users) else None
    if codes is None or codes.ndim == 2:
        return {}
    return dict(zip(dataset.user_ids[users].tolist(), codes, strict=True))


def _write_ids(target: Path, dataset: Dataset, blocks: dict[str, np.ndarray]) -> None:
    """item_id, user_id (empty: the ID without a user), digits separated by blanks."""
    with (
        atomic_path(target) as path,
        open(path, "w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(["item_id", "user_id", "digits"])
        for user, rows in blocks.items():
            for item, digits in zip(dataset.catalogue.item_ids, rows.tolist(), strict=True):
                writer.writerow([item, user, " ".join(map(str, digits))])


def _timeline_frame(
    model: Recommender, dataset: Dataset, histories: Sequences, config: Config
) -> pd.DataFrame:
    """Weights after each of the newest steps of the longest histories.

    user_id, step (items seen), one column per modality; on mock also `planted step` (-1: the user
    never drifts), and the modality that leads before and after it.
    """
    names, truth = list(dataset.catalogue.modalities), dataset.truth
    users = _longest(histories, None if truth is None else truth.drift_steps)
    window = config.data.max_history
    ends = [np.arange(max(1, n - window + 1), n + 1) for n in histories.lengths[users]]
    steps, owners = np.concatenate(ends), np.repeat(users, [len(part) for part in ends])
    parts = [histories.of(u)[max(0, t - window) : t] for u, t in zip(owners, steps, strict=True)]
    items = np.concatenate(parts)
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
    prefixes = Sequences(items, offsets, np.zeros(len(items), np.int64))
    weights = modality_weights(model, prefixes, np.arange(len(owners)), config, owners)
    frame = pd.DataFrame(weights, columns=weight_names(dataset, weights.shape[1]))
    frame.insert(0, "user_id", dataset.user_ids[owners])
    frame.insert(1, "step", steps)
    if _planted(dataset):
        leaders = np.array(names)
        frame["planted step"] = truth.drift_steps[owners]
        frame["planted before"] = leaders[truth.user_weights[owners].argmax(1)]
        frame["planted after"] = leaders[truth.drifted_weights[owners].argmax(1)]
    return frame


def _longest(histories: Sequences, drift_steps: np.ndarray | None) -> np.ndarray:
    """Users with the longest histories: as many drifters as others where that is known."""
    order = np.argsort(-histories.lengths, kind="stable")
    order = order[histories.lengths[order] > 0]
    if drift_steps is None:
        return order[:TIMELINE_USERS]
    drifts = drift_steps[order] >= 0
    return np.concatenate([order[drifts][:TIMELINE_USERS], order[~drifts][:TIMELINE_USERS]])


def weight_names(dataset: Dataset, width: int) -> list[str]:
    """Names of `width` modality weights: those of the catalogue, then what a model adds itself."""
    return [*dataset.catalogue.modalities, *("behaviour",) * width][:width]
