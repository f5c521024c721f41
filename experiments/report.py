"""What a folder of finished runs holds, and how it was measured, in words.

Everything that makes tables starts here: files are read, nothing is trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.runs import (
    METRICS,
    MODELS,
    RANKS,
    UNTIMED,
    VALID_IN_GRAPH,
    Task,
    load_ranks,
)
from experiments.tables import Table
from experiments.training import EPOCHS
from metrics import Ranks, average_over_seeds, per_user
from util import UserError, say

COLUMNS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")


class Run(NamedTuple):
    """One finished run."""

    folder: Path
    result: dict[str, Any]  # metrics.json

    @property
    def model(self) -> str:
        """Its registered name."""
        return self.result["model"]

    @property
    def label(self) -> str:
        """The ablation it is, empty for the full model."""
        return self.result.get("label", "")

    @property
    def seed(self) -> int:
        """The seed of the model."""
        return self.result["seed"]

    def epochs(self) -> list[dict[str, Any]]:
        """The rows of its `epochs.jsonl`; none for a model that does not train."""
        path = self.folder / EPOCHS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return [json.loads(line) for line in lines]


class Entry(NamedTuple):
    """What stands in one row: a model or one of its ablations, with all its seeds."""

    model: str
    label: str
    runs: list[Run]

    def users(self, name: str = "ndcg", k: int | None = 10) -> np.ndarray:
        """[E] metric of every user, mean over seeds."""
        return average_over_seeds([per_user(ranks_of(run), name, k) for run in self.runs])

    def epochs(self) -> list[dict[str, Any]]:
        """Those of the first seed."""
        return self.runs[0].epochs()


def read_runs(folder: Path) -> list[Run]:
    """Finished runs in `folder` and right below it, models in the order they are registered."""
    places = [folder, *(path for path in folder.iterdir() if path.is_dir())]
    runs = [Run(place, _stored(place / METRICS)) for place in places if (place / METRICS).exists()]
    _same_protocol(runs)
    order = {name: index for index, name in enumerate(MODELS)}
    return sorted(
        runs, key=lambda r: (order.get(r.model, len(order)), r.label, r.seed, r.folder.name)
    )


def _stored(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{path} is damaged ({error}); delete it and repeat that run with --resume."
        ) from None


def unfinished(folder: Path) -> list[str]:
    """Names of the folders of runs in `folder` that were begun and have no result."""
    places = [path for path in folder.iterdir() if path.is_dir() and "_seed" in path.name]
    return sorted(place.name for place in places if not (place / METRICS).exists())


def with_missing(table: Table, missing: list[str]) -> Table:
    """The table, whose caption names runs that have no result."""
    if not missing:
        return table
    said = f"{table.caption} Failed or not finished: {', '.join(missing)}."
    return table._replace(caption=said)


def _same_protocol(runs: list[Run]) -> None:
    """Raise UserError for runs that were measured in different ways: no table may hold both."""
    for other in runs[1:]:
        for part in ("dataset", "protocol"):
            first, second = runs[0].result[part], other.result[part]
            for key in first.keys() & second.keys():
                if first[key] != second[key]:
                    raise UserError(
                        f"{runs[0].folder} and {other.folder} differ in {key} ({first[key]} and "
                        f"{second[key]}); put runs of one protocol in one folder."
                    )
    held_out = [(ranks.users, ranks.targets) for ranks in map(ranks_of, runs)]
    for other, arrays in zip(runs[1:], held_out[1:], strict=True):
        if not all(map(np.array_equal, held_out[0], arrays)):
            raise UserError(
                f"{runs[0].folder} and {other.folder} were tested on other items, as with another "
                "data.seed and tie_policy=shuffle; put runs of one protocol in one folder."
            )


def entries(runs: list[Run], ablations: bool = False) -> list[Entry]:
    """Runs by model; with `ablations`, by model and label, else full models only."""
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        if ablations or not run.label:
            found.setdefault((run.model, run.label), []).append(run)
    return [Entry(model, label, same) for (model, label), same in found.items()]


def ranks_of(run: Run) -> Ranks:
    """Its stored ranks under the masking it reports."""
    return load_ranks(run.folder / RANKS, run.result["protocol"]["mask_seen"])


# --------------------------------------------------------------------------- words


_TIES = {
    "file": "equal time stamps in the order of the file",
    "shuffle": "equal time stamps in a seeded random order",
}


def caption(run: dict[str, Any]) -> str:
    """Data set, split, masking and ties of a run in one line."""
    data, protocol = run["dataset"], run["protocol"]
    masking = "seen items masked" if protocol["mask_seen"] else "seen items not masked"
    split = protocol.get("split", "leave-one-out")
    timed = protocol.get("timed", split != UNTIMED)
    ties = f", {_TIES[protocol['tie_policy']]}" if timed else ""
    split = {"leave-one-out": "time-ordered leave-one-out", UNTIMED: UNTIMED}.get(
        split, f"split {split}"
    )
    return (
        f"{data['name']}: {data['users']:,} users, {data['items']:,} items, "
        f"{data['interactions']:,} interactions; test part, {split}, full ranking, {masking}, "
        f"equal scores share the average rank{ties}"
    )


def protocol(runs: list[Run]) -> str:
    """`caption` and the seeds, as sentences that open the caption of a table."""
    seeds = sorted({run.seed for run in runs})
    names = ", ".join(map(str, seeds))
    rows: dict[tuple[str, str], list[int]] = {}
    for run in runs:
        rows.setdefault((run.model, run.label), []).append(run.seed)
    if any(sorted(row) != seeds for row in rows.values()):
        names += " (not every row has all of them)"
    return f"{caption(runs[0].result)}; {'seeds' if len(seeds) > 1 else 'one run, seed'} {names}."


def text_table(runs: list[Run]) -> str:
    """Test metrics, one line per run, under a line that says how they were measured."""
    if not runs:
        return "No run has finished."
    rows = []
    for run in runs:
        name = f"{run.model}: {run.label}" if run.label else run.model
        rows.append((name, run.seed, run.result["test"]))
        if VALID_IN_GRAPH in run.result:
            rows.append((informed(name), run.seed, run.result[VALID_IN_GRAPH]))
    width = max(len(name) for name, *_ in rows) + 2
    lines = [caption(runs[0].result)]
    lines.append(f"{'model':<{width}}{'seed':>6}" + "".join(f"{c:>11}" for c in COLUMNS))
    for name, seed, metrics in rows:
        values = "".join(f"{metrics[column]:>11.4f}" for column in COLUMNS)
        lines.append(f"{name:<{width}}{seed:>6}{values}")
    return "\n".join(lines)


def informed(name: str) -> str:
    """What the second line of a model that reads no history is called."""
    return f"{name}, valid item in graph"


def show(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """Print the runs of a folder, write nothing."""
    say(text_table(read_runs(folder)))
    return []
