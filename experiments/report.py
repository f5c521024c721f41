"""Tables and their figures from run folders: files and data are read, nothing is trained.

Every function takes the folder of a mode, so `--mode report` rebuilds what a mode wrote.
"""

from __future__ import annotations

import json
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import baseline_models
import our_models
from experiments import plots, plots_ids
from experiments.groups import user_groups
from experiments.personal import IDS, TIMELINE, WEIGHTS
from experiments.runs import METRICS, MODELS, RANKS, Task, load_ranks
from experiments.tables import Column, Table, write_table
from experiments.training import EPOCHS
from metrics import (
    Ranks,
    average_over_seeds,
    effect_size,
    holm,
    mean_std,
    paired_bootstrap,
    per_user,
)
from util import write_json

logger = getLogger("pmat")
COLUMNS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")
SIGNIFICANT = 0.05
PAIRED = "ndcg@10"  # the metric that is compared user by user


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
    runs = [
        Run(place, json.loads((place / METRICS).read_text(encoding="utf-8")))
        for place in places
        if (place / METRICS).exists()
    ]
    order = {name: index for index, name in enumerate(MODELS)}
    return sorted(
        runs, key=lambda r: (order.get(r.model, len(order)), r.label, r.seed, r.folder.name)
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


def caption(run: dict[str, Any]) -> str:
    """Data set, split, masking and ties of a run in one line."""
    data, protocol = run["dataset"], run["protocol"]
    masking = "seen items masked" if protocol["mask_seen"] else "seen items not masked"
    split = protocol.get("split", "leave-one-out")
    split = f"time-ordered {split}" if split == "leave-one-out" else f"split {split}"
    return (
        f"{data['name']}: {data['users']:,} users, {data['items']:,} items, "
        f"{data['interactions']:,} interactions; test part, {split}, full ranking, {masking}, "
        f"equal scores share the average rank, equal times: {protocol['tie_policy']}"
    )


def protocol(runs: list[Run]) -> str:
    """`caption` and the seeds, as sentences that open the caption of a table."""
    seeds = sorted({run.seed for run in runs})
    names = ", ".join(map(str, seeds))
    return f"{caption(runs[0].result)}; {'seeds' if len(seeds) > 1 else 'one run, seed'} {names}."


def text_table(runs: list[Run]) -> str:
    """Test metrics, one line per run, under a line that says how they were measured."""
    if not runs:
        return "No run has finished."
    names = [f"{run.model}: {run.label}" if run.label else run.model for run in runs]
    width = max(map(len, names)) + 2
    lines = [caption(runs[0].result)]
    lines.append(f"{'model':<{width}}{'seed':>6}" + "".join(f"{c:>11}" for c in COLUMNS))
    for name, run in zip(names, runs, strict=True):
        values = "".join(f"{run.result['test'][column]:>11.4f}" for column in COLUMNS)
        lines.append(f"{name:<{width}}{run.seed:>6}{values}")
    return "\n".join(lines)


# --------------------------------------------------------------------------- modes quick, baseline


def show(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """Print the runs of a folder, write nothing."""
    print(text_table(read_runs(folder)))
    return []


def write_baseline(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """Everything about the full models of a folder; returns the tables.

    `baseline_results.*` also go to `latest` as its newest copy, as does the bar chart.
    """
    runs = [run for run in read_runs(folder) if not run.label]
    print(text_table(runs))
    if not runs:
        return []
    found = entries(runs)
    main = baseline_table(found)
    tables = [main, group_table(found, task), *id_tables(found), efficiency_table(found)]
    content = {
        "caption": main.caption,
        "models": main.frame.to_dict("records"),
        "runs": [run.result for run in runs],
    }
    for place in _places(folder, latest):
        write_table(main, place)
        write_json(place / "baseline_results.json", content)
        plots.metric_bars(_bars(found), place / "baseline_top10_metrics")
    for table in tables[1:]:
        write_table(table, folder)
    curves = {entry.model: entry.epochs() for entry in found}
    plots.learning_curves(curves, folder / "learning_curves")
    for entry in found:
        draw_ids(entry, task, folder)
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


def _places(folder: Path, latest: Path | None) -> list[Path]:
    return [folder] if latest is None else [folder, latest]


def baseline_table(found: list[Entry]) -> Table:
    """Means and deviations over seeds, best NDCG@10 first, each model against the reference."""
    rows = [{"model": entry.model, "seeds": len(entry.runs), **_means(entry)} for entry in found]
    frame = pd.DataFrame(rows)
    best = reference(found)
    frame = frame.merge(_against(found, best), on="model", how="left")
    frame = frame.sort_values("ndcg@10", ascending=False, kind="stable", ignore_index=True)
    note = (
        f"Means{' ± standard deviations over seeds' if frame['seeds'].max() > 1 else ''}; best "
        "bold, second underlined"
    )
    if len(found) > 1:
        note += (
            f"; * NDCG@10 differs from that of {best.model} (the best baseline) at p < "
            f"{SIGNIFICANT} (paired bootstrap over users, Holm)."
        )
    columns = [Column("model", "Model", "s"), *(_metric(c) for c in COLUMNS)]
    all_runs = [run for entry in found for run in entry.runs]
    return Table("baseline_results", "Test metrics", f"{protocol(all_runs)} {note}", columns, frame)


def _metric(name: str) -> Column:
    titles = {"recall": "R", "ndcg": "N", "mrr": "MRR"}
    stem, _, k = name.partition("@")
    return Column(name, f"{titles[stem]}@{k}" if k else titles[stem], best=1)


def _means(entry: Entry) -> dict[str, float]:
    row: dict[str, float] = {}
    for name in (*COLUMNS, "hit_rate@10", "coverage@10", "cold_recall@10"):
        values = [run.result["test"].get(name) for run in entry.runs]
        if None not in values:
            row[name], row[f"{name} std"] = mean_std(values)
    return row


def reference(found: list[Entry]) -> Entry:
    """The best baseline on NDCG@10; the best of all where there is no baseline."""
    among = [entry for entry in found if entry.model in baseline_models.MODELS] or found
    return max(among, key=lambda entry: entry.users().mean())


def _against(found: list[Entry], best: Entry) -> pd.DataFrame:
    """Difference in NDCG@10 to `best` with a 95 % interval, Holm's p and Cohen's d."""
    theirs = best.users()
    rows = []
    for entry in found:
        if entry.model != best.model:
            ours = entry.users()
            compared = paired_bootstrap(ours, theirs)
            rows.append(
                {
                    "model": entry.model,
                    "compared with": best.model,
                    "ndcg@10 difference": compared.difference,
                    "low": compared.low,
                    "high": compared.high,
                    "p": compared.p_value,
                    "effect size": effect_size(ours, theirs),
                }
            )
    names = ["model", "compared with", "ndcg@10 difference", "low", "high", "p", "effect size"]
    frame = pd.DataFrame(rows, columns=names)
    frame["p (Holm)"] = holm(frame["p"].to_numpy(float)) if len(frame) else []
    frame["ndcg@10 mark"] = ["*" if p < SIGNIFICANT else "" for p in frame["p (Holm)"]]
    return frame


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
            row[f"{title} half"] = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        rows.append(row)
    return pd.DataFrame(rows)


# --------------------------------------------------------------------------- groups


def group_table(found: list[Entry], task: Task) -> Table:
    """NDCG@10 of the best baseline and of each of our models in groups of users."""
    best = reference(found)
    ours = [entry for entry in found if entry.model in our_models.MODELS and entry != best]
    values = {entry.model: entry.users() for entry in [best, *ours]}
    rows = []
    for name, members in user_groups(task, ranks_of(best.runs[0])).items():
        row: dict[str, Any] = {"group": name, "users": int(members.sum())}
        row |= {model: of_users[members].mean() for model, of_users in values.items()}
        for entry in ours:
            compared = paired_bootstrap(values[entry.model][members], values[best.model][members])
            row |= {
                f"{entry.model} difference": compared.difference,
                f"{entry.model} low": compared.low,
                f"{entry.model} high": compared.high,
            }
            outside = compared.low > 0 or compared.high < 0
            row[f"{entry.model} difference mark"] = "*" if outside else ""
        rows.append(row)
    columns = [Column("group", "Group", "s"), Column("users", "Users", ",")]
    columns += [Column(model, model) for model in values]
    columns += [Column(f"{entry.model} difference", f"Δ {entry.model}", "+.4f") for entry in ours]
    note = (
        f"NDCG@10, mean over seeds; Δ against {best.model}; * its 95 % interval (paired bootstrap "
        "over the users of the group, not corrected for the number of groups) leaves out 0."
    )
    runs = [run for entry in [best, *ours] for run in entry.runs]
    return Table(
        "group_results", "Where models help", f"{protocol(runs)} {note}", columns,
        pd.DataFrame(rows),
    )  # fmt: skip


# --------------------------------------------------------------------------- IDs and speed

QUALITY = (
    Column("uniqueness", "Unique", ".3f", 1),
    Column("uniqueness_per_user", "per user", ".3f"),
    Column("code_usage", "Codes used", ".3f"),
    Column("code_usage_worst_digit", "worst digit", ".3f"),
    Column("perplexity", "Perplexity", ".1f"),
    Column("semantic_consistency", "Consistency", ".3f", 1),
    Column("personalisation_discrimination", "Personal", ".3f", 1),
    Column("churn", "Churn", ".4f"),
)
SPEED = (
    Column("parameters", "Parameters", ",.0f"),
    Column("prepare_seconds", "Stage one s", ".1f"),
    Column("train_seconds", "Training s", ".1f"),
    Column("epochs", "Epochs", ".0f"),
    Column("peak_memory_mb", "Peak MB", ",.0f"),
    Column("id_generation_ms", "IDs ms", ".2f"),
    Column("latency_p50_ms", "1: p50 ms", ".2f", -1),
    Column("latency_p95_ms", "p95", ".2f"),
    Column("latency_p99_ms", "p99", ".2f"),
    Column("latency64_p50_ms", "64: p50 ms", ".1f", -1),
    Column("latency64_p95_ms", "p95", ".1f"),
    Column("latency64_p99_ms", "p99", ".1f"),
    Column("throughput_users_per_second", "Users/s", ",.0f", 1),
)


def id_tables(found: list[Entry]) -> list[Table]:
    """Quality of semantic IDs of the models that have any."""
    having = [entry for entry in found if entry.runs[0].result["id_quality"]]
    if not having:
        return []
    note = (
        "Unique: share of items whose ID no other item has; per user: under each user's own "
        "codes; consistency: Spearman of feature cosine and share of equal digits; personal: "
        "Spearman of code distance and modality-weight distance between users; churn: share of "
        "digits that change with one more item. Means over seeds; best bold, second underlined."
    )
    return [_facts(having, "id_quality", QUALITY, "ID quality", note)]


def efficiency_table(found: list[Entry]) -> Table:
    """Time to train and to answer, memory and size of all models."""
    machine = found[0].runs[0].result["environment"]
    note = (
        f"On {machine['device']}, {machine['threads']} threads. Latency of one request for the 10 "
        "best items of 1 and of 64 users, from histories in memory to lists in memory; users/s at "
        "64; peak MB of the process during the run. Means over seeds; best bold, second underlined."
    )
    return _facts(found, "efficiency", SPEED, "Efficiency", note)


def _facts(
    found: list[Entry], part: str, columns: tuple[Column, ...], title: str, note: str
) -> Table:
    """Means over seeds of one section of metrics.json; columns nobody has are left out."""
    rows = []
    for entry in found:
        row: dict[str, Any] = {"model": entry.model, "seeds": len(entry.runs)}
        for key in dict.fromkeys(key for run in entry.runs for key in run.result[part]):
            values = [run.result[part].get(key) for run in entry.runs]
            row[key] = np.nan if None in values else float(np.mean(values))
        rows.append(row)
    frame = pd.DataFrame(rows)
    kept = [c for c in columns if c.key in frame and frame[c.key].notna().any()]
    runs = [run for entry in found for run in entry.runs]
    return Table(
        part, title, f"{protocol(runs)} {note}", [Column("model", "Model", "s"), *kept], frame
    )


# --------------------------------------------------------------------------- mode ablation


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
    print(text_table(runs))
    table = ablation_table(found)
    content = {
        "caption": table.caption,
        "rows": table.frame.to_dict("records"),
        "runs": [run.result for run in runs],
    }
    for place in _places(folder, latest):
        write_table(table, place)
        write_json(place / "ablation_results.json", content)
    plots.ablation_bars(table.frame, folder / "ablation_bars")
    return [table]


def ablation_table(found: list[Entry]) -> Table:
    """Each ablation against its full model, seed by seed the same data and protocol.

    The difference is paired by user and averaged over the seeds that both have.
    """
    rows = []
    for full in (entry for entry in found if not entry.label):
        rows.append({"model": full.model, "variant": "full model", **_ablated(full)})
        for entry in found:
            if entry.model == full.model and entry.label:
                row = {"model": entry.model, "variant": entry.label, **_ablated(entry)}
                rows.append(row | _delta(entry, full))
    frame = pd.DataFrame(rows)
    tested = frame["p"].notna() if "p" in frame else pd.Series(False, index=frame.index)
    frame["p (Holm)"] = np.nan
    frame.loc[tested, "p (Holm)"] = holm(frame.loc[tested, "p"].to_numpy(float))
    frame["difference mark"] = ["*" if p < SIGNIFICANT else "" for p in frame["p (Holm)"]]
    columns = [
        Column("variant", "Variant", "s"), Column("model", "Model", "s"), _plain("recall@10"),
        _plain("ndcg@10"), Column("difference", "Δ N@10", "+.4f"), Column("low", "low", "+.4f"),
        Column("high", "high", "+.4f"), Column("p (Holm)", "p (Holm)", ".3f"),
    ]  # fmt: skip
    note = (
        "Δ: variant minus full model in NDCG@10, with a 95 % interval (paired bootstrap over "
        f"users, means over common seeds); * p < {SIGNIFICANT} after Holm over all rows. Nothing "
        "is bold: rows are compared with their full model, not ranked."
    )
    runs = [run for entry in found for run in entry.runs]
    return Table(
        "ablation_results", "Ablations", f"{protocol(runs)} {note}", columns, frame, rule="model"
    )


def _plain(name: str) -> Column:
    return _metric(name)._replace(best=0)


def _ablated(entry: Entry) -> dict[str, Any]:
    return {"seeds": len(entry.runs), **_means(entry)}


def _delta(entry: Entry, full: Entry) -> dict[str, float]:
    common = {run.seed for run in entry.runs} & {run.seed for run in full.runs}
    if not common:
        return {}
    ours, theirs = (
        one._replace(runs=[run for run in one.runs if run.seed in common]).users()
        for one in (entry, full)
    )
    compared = paired_bootstrap(ours, theirs)
    return {
        "difference": compared.difference,
        "low": compared.low,
        "high": compared.high,
        "p": compared.p_value,
        "effect size": effect_size(ours, theirs),
    }
