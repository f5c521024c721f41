"""What modes baseline and ablation write into their folders, and mode report writes again."""

from __future__ import annotations

import re
import shutil
from logging import getLogger
from pathlib import Path
from typing import Any

import pandas as pd

import our_models
from experiments import comparisons, plots, plots_ids
from experiments.personal import IDS, TIMELINE, WEIGHTS
from experiments.report import Entry, entries, read_runs, text_table, unfinished, with_missing
from experiments.runs import Task
from experiments.tables import Table, write_table
from util import say, write_json

logger = getLogger("pmat")


def write_baseline(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """Everything about the full models of a folder; returns the tables.

    `baseline_results.*` also go to `latest` as its newest copy, as does the bar chart.
    """
    runs = [run for run in read_runs(folder) if not run.label]
    if not runs:
        say(text_table(runs))
        return []
    found = entries(runs)
    missing = [name for name in unfinished(folder) if "--" not in name]  # ablations have a table
    main = with_missing(comparisons.baseline_table(found), missing)
    tables = [
        main,
        comparisons.group_table(found, task),
        *comparisons.id_tables(found),
        comparisons.efficiency_table(found),
    ]
    content = {
        "caption": main.caption,
        "models": main.frame.to_dict("records"),
        "runs": [run.result for run in runs],
    }
    for place in _places(folder, latest):
        write_table(main, place)
        write_json(place / "baseline_results.json", content)
    plots.metric_bars(_bars(found), folder / "baseline_top10_metrics")
    if latest is not None:
        for figure in folder.glob("baseline_top10_metrics.*"):
            shutil.copy(figure, latest)
    for table in tables[1:]:
        write_table(table, folder)
    curves = {entry.model: entry.epochs() for entry in found}
    plots.learning_curves(curves, folder / "learning_curves")
    for entry in found:
        draw_ids(entry, task, folder)
    say(text_table(runs))  # last, as whoever reads it may have gone
    return tables


def draw_ids(entry: Entry, task: Task, folder: Path) -> None:
    """ID space, modality weights and their drift of a model's first seed, where it has them."""
    place, catalogue = entry.runs[0].folder, task.dataset.catalogue
    if (place / WEIGHTS).exists():
        weights = pd.read_csv(place / WEIGHTS, dtype={"user_id": str})
        plots_ids.weight_distribution(weights, folder / f"modality_weights_{entry.model}")
    if (place / TIMELINE).exists():
        timeline = pd.read_csv(place / TIMELINE, dtype={"user_id": str})
        plots_ids.drift_timeline(timeline, folder / f"drift_timeline_{entry.model}")
    if (place / IDS).exists():
        ids = pd.read_csv(place / IDS, dtype=str, keep_default_na=False)
        categories = dict(
            zip(catalogue.item_ids.tolist(), catalogue.categories.tolist(), strict=True)
        )
        plots_ids.id_space(ids, categories, folder / f"id_space_{entry.model}")


def _bars(found: list[Entry]) -> pd.DataFrame:
    """One row per model: mean and half a 95 % interval over users of the metrics at 10."""
    rows = []
    for entry in found:
        row: dict[str, Any] = {"model": entry.model, "ours": entry.model in our_models.MODELS}
        for title, name, k in (
            ("Recall@10", "recall", 10), ("NDCG@10", "ndcg", 10), ("MRR", "mrr", None),
        ):  # fmt: skip
            values = entry.users(name, k)
            row[title] = values.mean()
            spread = values.std(ddof=1) if len(values) > 1 else float("nan")
            row[f"{title} half"] = 1.96 * spread / len(values) ** 0.5
        rows.append(row)
    return pd.DataFrame(rows)


def write_ablation(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """`ablation_results.*` and their bars; returns the table."""
    runs = read_runs(folder)
    found = entries(runs, ablations=True)
    with_ablations = {entry.model for entry in found if entry.label}
    found = [entry for entry in found if entry.model in with_ablations]
    runs = [run for entry in found for run in entry.runs]
    if not any(not entry.label for entry in found):
        logger.warning("No full model with ablations has finished: no ablation table yet.")
        return []
    names = {made.model for made in runs}
    missing = [name for name in unfinished(folder) if re.split("--|_seed", name)[0] in names]
    table = with_missing(comparisons.ablation_table(found), missing)
    content = {
        "caption": table.caption,
        "rows": table.frame.to_dict("records"),
        "runs": [run.result for run in runs],
    }
    for place in _places(folder, latest):
        write_table(table, place)
        write_json(place / "ablation_results.json", content)
    plots.ablation_bars(table.frame, folder / "ablation_bars")
    say(text_table(runs))
    return [table]


def _places(folder: Path, latest: Path | None) -> list[Path]:
    return [folder] if latest is None else [folder, latest]
