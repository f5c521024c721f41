"""Tables from run folders. Only files are read, so tables can be rebuilt without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.runs import METRICS, RANKS, load_ranks
from metrics import average_over_seeds, holm, mean_std, paired_bootstrap, per_user
from util import atomic_path, write_json

COLUMNS = ("recall@5", "recall@10", "recall@20", "ndcg@5", "ndcg@10", "ndcg@20", "mrr")


def read_runs(folders: list[Path]) -> list[dict[str, Any]]:
    """The metrics of finished runs."""
    return [json.loads((folder / METRICS).read_text(encoding="utf-8")) for folder in folders]


def text_table(folders: list[Path]) -> str:
    """Test metrics, one line per run, under a line that says how they were measured."""
    runs = read_runs(folders)
    lines = [caption(runs[0]), f"{'model':<12}{'seed':>6}" + "".join(f"{c:>11}" for c in COLUMNS)]
    for run in runs:
        values = "".join(f"{run['test'][column]:>11.4f}" for column in COLUMNS)
        lines.append(f"{run['model']:<12}{run['seed']:>6}{values}")
    return "\n".join(lines)


def caption(run: dict[str, Any]) -> str:
    """Data set, split, masking and ties of a run in one line."""
    data, protocol = run["dataset"], run["protocol"]
    masking = "seen items masked" if protocol["mask_seen"] else "seen items not masked"
    return (
        f"{data['name']}: {data['users']:,} users, {data['items']:,} items, "
        f"{data['interactions']:,} interactions; test, full ranking, {masking}, "
        f"ties in time: {protocol['tie_policy']}"
    )


def write_baseline(folders: list[Path], folder: Path, latest: Path, mask_seen: bool) -> None:
    """`baseline_results.csv/.json/.tex` in the run folder, and as the latest copy in `latest`.

    Mean and standard deviation over seeds; each model is compared with the best one on NDCG@10,
    averaged over seeds, by a paired bootstrap over users with Holm's correction.
    """
    runs = read_runs(folders)
    frame = pd.DataFrame([{"model": r["model"], "seed": r["seed"], **r["test"]} for r in runs])
    table = _means(frame)
    table = table.merge(_significance(runs, folders, mask_seen), on="model", how="left")
    table = table.sort_values("ndcg@10", ascending=False)
    content = {"caption": caption(runs[0]), "models": table.to_dict("records"), "runs": runs}
    for place in (folder, latest):
        with atomic_path(place / "baseline_results.csv") as path:
            table.to_csv(path, index=False)
        write_json(place / "baseline_results.json", content)
        with atomic_path(place / "baseline_results.tex") as path:
            path.write_text(_latex(table, caption(runs[0])), encoding="utf-8")


def _means(frame: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for model, runs in frame.groupby("model", sort=False):
        row: dict[str, Any] = {"model": model, "seeds": len(runs)}
        for column in COLUMNS:
            row[column], row[f"{column} std"] = mean_std(runs[column].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def _significance(runs: list[dict], folders: list[Path], mask_seen: bool) -> pd.DataFrame:
    """Difference in NDCG@10 to the best model, with a 95 % interval and Holm's p."""
    users: dict[str, list[np.ndarray]] = {}
    for run, folder in zip(runs, folders, strict=True):
        ranks = load_ranks(folder / RANKS, mask_seen)
        users.setdefault(run["model"], []).append(per_user(ranks, "ndcg", 10))
    means = {model: average_over_seeds(values) for model, values in users.items()}
    best = max(means, key=lambda model: means[model].mean())
    rows = []
    for model in means:
        if model != best:
            found = paired_bootstrap(means[model], means[best])
            rows.append(
                {
                    "model": model,
                    "ndcg@10 minus best": found.difference,
                    "low": found.low,
                    "high": found.high,
                    "p": found.p_value,
                }
            )
    frame = pd.DataFrame(rows, columns=["model", "ndcg@10 minus best", "low", "high", "p"])
    frame["p (Holm)"] = holm(frame["p"].to_numpy()) if len(frame) else []
    return frame


def _latex(table: pd.DataFrame, text: str) -> str:
    """Booktabs table: best bold, second underlined."""
    order = {c: table[c].rank(ascending=False, method="min") for c in COLUMNS}
    lines = [
        r"\begin{table}[t]",
        rf"\caption{{{_escape(text)}. Mean over seeds; best bold, second underlined.}}",
        r"\begin{tabular}{l" + "r" * len(COLUMNS) + "}",
        r"\toprule",
        "Model & " + " & ".join(c.replace("recall", "R").replace("ndcg", "N") for c in COLUMNS)
        + r" \\",
        r"\midrule",
    ]  # fmt: skip
    for index, row in table.iterrows():
        cells = []
        for column in COLUMNS:
            mark = {1: r"\textbf{%s}", 2: r"\underline{%s}"}.get(int(order[column][index]), "%s")
            cells.append(mark % f"{row[column]:.4f}".lstrip("0"))
        lines.append(f"{_escape(row['model'])} & " + " & ".join(cells) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}", ""]
    return "\n".join(lines)


def _escape(text: str) -> str:
    for character in "&%$#_{}":
        text = text.replace(character, "\\" + character)
    return text
