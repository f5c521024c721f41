"""Does PMAT find what the mock data planted, and is it worth anything?

    python benchmarks/planted_truth.py [--seeds 3] [--more] [--set key=value ...]

Trains PMAT and each control of its modality weights on mock data (with `--more` other ways to use
a user, too): the mock preset, but more users, longer histories and short IDs, the same data for all
seeds of the model. Prints
- Spearman correlation of each user's learned mean alpha with the planted one, per modality;
- how many personal digits of the same item differ between users with different planted weights,
  and between users with (nearly) equal ones;
- how well the drift test tells users that drifted from the others: area under the ROC curve of the
  p-values, and the share of false alarms at p <= .01;
- NDCG@10 of PMAT minus that of each control, paired over users, mean over seeds, 95 % interval.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command, read_settings
from config import build_config
from data_utils import history_batch
from experiments.runs import RANKS, Task, load_model, load_ranks, load_task, run
from metrics import average_over_seeds, paired_bootstrap, per_user
from model_parts.base import Batch
from model_parts.drift import detect_drift
from our_models.pmat import PMAT

CONTROLS = ("even weights", "item weights", "random weights", "weights of another user")
MORE = ("user weights", "late weights on fixed digits", "user vector as prefix")
# Few digits: where an ID can not hold everything about an item, it matters what it holds.
SETTINGS = {
    "mock.n_users": 1000,
    "mock.history_min": 20,
    "mock.history_max": 40,
    "pmat.shared_digits": 0,
    "pmat.personal_digits": 2,
}
APART, TOGETHER = 0.6, 0.1  # distance of planted weights that count as different and as equal


def settings(given: dict[str, Any], control: str | None, law: str) -> dict[str, Any]:
    """Dotted keys of one run; random weights follow the law of what PMAT learned."""
    chosen = PMAT.ablations[control] if control else {}
    if control == "random weights":
        chosen = chosen | {"pmat.law": law}
    return {"run.mode": "baseline", "run.model": "pmat"} | SETTINGS | given | chosen


def final_weights(task: Task) -> np.ndarray:
    """Planted weights at the end of each history, [U, M]."""
    truth = task.dataset.truth
    return np.where(truth.drift_steps[:, None] >= 0, truth.drifted_weights, truth.user_weights)


def histories(task: Task, model: PMAT) -> Batch:
    """All test users with their train and valid items."""
    window = model.positions.table.num_embeddings
    users = task.split.test.users
    return Batch(*map(torch.from_numpy, history_batch(task.split.train_and_valid, users, window)))


@torch.no_grad()
def recovered(task: Task, model: PMAT) -> list[float]:
    """Spearman of learned with planted weights, per modality of the catalogue."""
    learned = model.modality_weights_of(histories(task, model)).numpy()
    planted = final_weights(task)[task.split.test.users]
    return [float(spearmanr(learned[:, m], planted[:, m])[0]) for m in range(planted.shape[1])]


@torch.no_grad()
def differing_digits(task: Task, model: PMAT, pairs: int = 400) -> tuple[float, float]:
    """Share of personal digits that differ between users far apart, and close together."""
    ids = model.item_ids(histories(task, model))[:, :, model.own.shared_digits :]  # [U, N, L]
    planted = final_weights(task)[task.split.test.users]
    distance = np.linalg.norm(planted[:, None] - planted[None], axis=2)
    rng, found = np.random.default_rng(0), []
    for wanted in (distance > APART, np.triu(distance < TOGETHER, 1)):
        rows = np.argwhere(wanted)
        rows = rows[rng.choice(len(rows), min(pairs, len(rows)), replace=False)]
        found.append(float((ids[rows[:, 0]] != ids[rows[:, 1]]).float().mean()))
    return found[0], found[1]


def drift_found(task: Task, model: PMAT) -> tuple[float, float]:
    """AUC of the drift test over users, and its false alarms at p <= .01."""
    steps, generator = task.dataset.truth.drift_steps, torch.Generator().manual_seed(0)
    sequences = task.dataset.sequences
    p = []
    for user in range(sequences.n_users):
        rows = torch.tensor(sequences.of(user)).long() - 1
        p.append(detect_drift(model.traits[rows], model.present[rows], generator).p_value)
    p, moved = np.array(p), steps >= 0
    ranks = rankdata(-p)
    positives, negatives = moved.sum(), (~moved).sum()
    area = (ranks[moved].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    return float(area), float((p[~moved] <= 0.01).mean())


@command
def main(arguments: list[str] | None = None) -> None:
    """Train, measure, print."""
    parser = Parser(__doc__)
    parser.add_number("--seeds", 3, "runs of each kind")
    parser.add_argument("--more", action="store_true", help=f"also with {', '.join(MORE)}")
    parser.add_settings()
    found = parser.parse_args(arguments)
    given = read_settings(found.set, "run.seed")
    controls = CONTROLS + MORE * found.more
    task = load_task(build_config(settings(given, None, "")))
    users: dict[str | None, list[np.ndarray]] = {}
    with tempfile.TemporaryDirectory() as place:
        for seed in range(42, 42 + found.seeds):
            law = ""
            for control in (None, *controls):
                config = build_config(settings(given | {"run.seed": seed}, control, law))
                folder = Path(place) / f"{control}_{seed}"
                folder.mkdir()
                result = run(config, task, folder)
                ndcg = per_user(load_ranks(folder / RANKS, config.train.mask_seen), "ndcg", 10)
                users.setdefault(control, []).append(ndcg)
                print(f"seed {seed}  {control or 'PMAT':30s} N@10 {ndcg.mean():.4f}", flush=True)
                if control is None:
                    law = ",".join(map(str, result["description"]["law"]))
                    model, _ = load_model(folder, task.dataset.catalogue)
                    names = list(task.dataset.catalogue.modalities)
                    shown = zip(names, recovered(task, model), strict=True)
                    print("  Spearman:", ", ".join(f"{name} {r:.2f}" for name, r in shown))
                    far, near = differing_digits(task, model)
                    print(f"  digits that differ: {far:.3f} far apart, {near:.3f} close together")
                    area, alarms = drift_found(task, model)
                    print(f"  drift: AUC {area:.3f}, false alarms {alarms:.3f}", flush=True)
    own = average_over_seeds(users[None])
    print(f"\nPMAT N@10 {own.mean():.4f}; minus each control (95 % interval over users):")
    for control in controls:
        gap = paired_bootstrap(own, average_over_seeds(users[control]))
        print(f"  {control:30s} {gap.difference:+.4f} ({gap.low:+.4f} to {gap.high:+.4f})")


if __name__ == "__main__":
    sys.exit(main())
