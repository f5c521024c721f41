"""Figures, as PDF for papers and PNG for screens. Colours can be told apart by everybody.

Every function draws from plain data, writes `path`.pdf and `path`.png and shows nothing else.
Plots of semantic IDs and modality weights are in plots_ids.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, MaxNLocator

from util import atomic_path

# Okabe and Ito's palette, and dashes and markers for print without colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#999999"
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8,
    "ytick.labelsize": 8, "legend.fontsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True,
    "pdf.fonttype": 42, "lines.linewidth": 1.4,
}  # fmt: skip
WIDTH = 7.0  # inches, the text width of a page
MAX_LINES = 6  # of one panel that can still be told apart


@contextlib.contextmanager
def drawing(
    path: Path, rows: int, columns: int, size: tuple[float, float], **more: Any
) -> Iterator[np.ndarray]:
    """Axes [rows, columns] of one figure in the project's style, saved at the end."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained", **more
        )
        try:
            yield axes
            save(figure, path)
        finally:
            plt.close(figure)


def save(figure: Figure, path: Path) -> None:
    """Write `path`.pdf and `path`.png, and close the figure."""
    for ending in ("pdf", "png"):
        metadata = {"CreationDate": None} if ending == "pdf" else None  # same data, same bytes
        with atomic_path(path.parent / f"{path.name}.{ending}") as temporary:
            figure.savefig(temporary, format=ending, dpi=200, metadata=metadata)
    plt.close(figure)


def plain(text: str) -> str:
    """Text of the user's data as a label: dollar signs begin no formula, underscores hide none."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text  # legends leave such names out


def _hide_rest(axes: np.ndarray, used: int) -> None:
    """Hide the panels after the first `used`; the ones above them then carry the x-axis."""
    for index, axis in enumerate(axes.ravel()):
        axis.set_visible(index < used)
        if index + axes.shape[1] >= used:
            axis.tick_params(labelbottom=True)


# --------------------------------------------------------------------------- results


def metric_bars(frame: pd.DataFrame, path: Path) -> None:
    """Bars of every metric at 10, best first, with 95 % intervals over users.

    frame: `model`, `ours` (bool: hatched), and for each metric its mean and `<metric> half`.
    """
    metrics = [c for c in frame if f"{c} half" in frame]
    frame = frame.sort_values(metrics[min(1, len(metrics) - 1)], ignore_index=True)
    height = 0.9 + 0.24 * len(frame)
    with drawing(path, 1, len(metrics), (WIDTH, height), sharey=True) as axes:
        for axis, metric in zip(axes[0], metrics, strict=True):
            bars = axis.barh(
                frame["model"], frame[metric], xerr=frame[f"{metric} half"], height=0.7,
                color=[COLOURS[1] if ours else COLOURS[5] for ours in frame["ours"]],
                edgecolor="black", linewidth=0.5,
                error_kw={"elinewidth": 0.8, "capsize": 2},
            )  # fmt: skip
            for bar, ours in zip(bars, frame["ours"], strict=True):
                bar.set_hatch("///" if ours else "")
            axis.set_title(metric)
            axis.set_xlim(left=0)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
        axes[0][0].figure.supxlabel(
            "test, mean with 95 % interval over users, not over training runs"
            + ("; hatched: ours" if frame["ours"].any() else ""),
            fontsize=8,
        )


def ablation_bars(frame: pd.DataFrame, path: Path) -> None:
    """What each ablation changes in NDCG@10, with 95 % intervals; one panel per model.

    frame: `model`, `variant`, `difference`, `low`, `high`, `difference mark`, `ndcg@10`.
    """
    rows = frame[frame["difference"].notna()] if "difference" in frame else frame[:0]
    models = list(dict.fromkeys(rows["model"]))
    if not models:
        return
    counts = [int((rows["model"] == model).sum()) for model in models]
    height = 0.8 + sum(0.5 + 0.24 * count for count in counts)
    with drawing(
        path, len(models), 1, (WIDTH, height), sharex=True, height_ratios=[c + 1 for c in counts]
    ) as axes:
        for axis, model in zip(axes[:, 0], models, strict=True):
            part = rows[rows["model"] == model].sort_values("difference", ignore_index=True)
            full = frame[(frame["model"] == model) & (frame["variant"] == "full model")]
            errors = [part["difference"] - part["low"], part["high"] - part["difference"]]
            sure = part["difference mark"] != ""
            axis.barh(
                part["variant"], part["difference"], xerr=errors, height=0.7, linewidth=0.5,
                color=[COLOURS[0] if s else "white" for s in sure], edgecolor=COLOURS[0],
                error_kw={"elinewidth": 0.8, "capsize": 2},
            )  # fmt: skip
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_title(f"{model} (full model: {full['ndcg@10'].iloc[0]:.4f})", loc="left")
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
        axes[-1, 0].set_xlabel(
            "NDCG@10, variant minus full model, same seeds\n"
            "95 % interval over users; filled: p < 0.05 after Holm"
        )


# --------------------------------------------------------------------------- training


def learning_curves(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Valid NDCG@10 by epoch, one panel per model with all others in grey behind it.

    curves: model -> rows of `epochs.jsonl`; models without epochs are left out.
    """
    lines = {}
    for model, rows in curves.items():
        points = [(row["epoch"], row["valid"]["ndcg@10"]) for row in rows if "valid" in row]
        if points:
            lines[model] = np.array(points).T
    if not lines:
        return
    columns = min(4, len(lines))
    n_rows = -(-len(lines) // columns)
    size = (max(WIDTH * columns / 4, 4.5), 0.6 + 1.5 * n_rows)
    with drawing(path, n_rows, columns, size, sharex=True, sharey=True) as axes:
        flat = axes.ravel()
        for axis, model in zip(flat, lines, strict=False):
            for epochs, values in lines.values():
                axis.plot(epochs, values, color="#d0d0d0", linewidth=0.8)
            epochs, values = lines[model]
            axis.plot(epochs, values, color=COLOURS[0], marker="." if len(epochs) < 20 else "")
            best = values.argmax()
            axis.plot(epochs[best], values[best], "o", color=COLOURS[1], markersize=5)
            last = " (last)" if best == len(values) - 1 else ""
            axis.set_title(f"{model}: {values[best]:.4f}{last}")
        _hide_rest(axes, len(lines))
        flat[0].xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        flat[0].set_ylim(0, 1.1 * max(values.max() for _, values in lines.values()) or 1)
        figure = flat[0].figure
        figure.supxlabel("epoch (orange: the one that is kept, grey: other models)", fontsize=9)
        figure.supylabel("valid NDCG@10", fontsize=9)


def loss_curves(epochs: list[dict[str, Any]], path: Path) -> None:
    """Every part of the loss over epochs, weighted, one panel each: they differ a lot in size.

    epochs are the rows of `epochs.jsonl`.
    """
    if not epochs:
        return
    names = list(epochs[0]["parts"])
    columns = min(len(names), 3)
    n_rows = -(-len(names) // columns)
    size = (WIDTH * columns / 3, 0.4 + 1.8 * n_rows)
    with drawing(path, n_rows, columns, size, sharex=True) as axes:
        for index, name in enumerate(names):
            axis = axes.ravel()[index]
            style = {"color": COLOURS[index % 7], "linestyle": DASHES[index % 7]}
            values = [row["parts"][name] for row in epochs]
            marker = MARKERS[index % 7] if len(epochs) < 20 else ""
            numbers = [row["epoch"] for row in epochs]
            axis.plot(numbers, values, marker=marker, markersize=3.5, **style)
            axis.set_title(name)
        _hide_rest(axes, len(names))
        axes[0, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, 0].figure.supxlabel("epoch", fontsize=9)
        axes[0, 0].figure.supylabel("weighted loss", fontsize=9)


# --------------------------------------------------------------------------- speed


def latency_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Median latency of one request against the number of items, both on log scales.

    rows: `model`, `items`, `p50_ms`. Panels of at most MAX_LINES models, slowest first.
    """
    frame = pd.DataFrame(rows)
    order = frame.groupby("model")["p50_ms"].max().sort_values(ascending=False).index.tolist()
    n_panels = -(-len(order) // MAX_LINES)
    panels = [part.tolist() for part in np.array_split(order, n_panels)]
    columns = min(2, n_panels)
    n_rows = -(-n_panels // columns)
    size = (WIDTH * columns / 2, 0.3 + 3.1 * n_rows)
    with drawing(path, n_rows, columns, size, sharex=True, sharey=True) as axes:
        for axis, models in zip(axes.ravel(), panels, strict=False):
            for index, model in enumerate(models):
                part = frame[frame["model"] == model].sort_values("items")
                axis.plot(
                    part["items"], part["p50_ms"], label=model, color=COLOURS[index],
                    linestyle=DASHES[index], marker=MARKERS[index], markersize=4,
                )  # fmt: skip
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.set_xticks(sorted(frame["items"].unique()))
            axis.yaxis.set_major_locator(_round_numbers(frame["p50_ms"]))
            axis.minorticks_off()
            axis.xaxis.set_major_formatter("{x:,.0f}")
            axis.yaxis.set_major_formatter("{x:g}")
            axis.legend(
                frameon=False, handlelength=3, ncols=2, loc="lower center",
                bbox_to_anchor=(0.5, 1.0),
            )  # fmt: skip
        _hide_rest(axes, len(panels))
        axes[0, 0].figure.supylabel("median latency of one user, ms", fontsize=9)
        axes[0, 0].figure.supxlabel("items in the catalogue", fontsize=9)


# --------------------------------------------------------------------------- search


def search_history(trials: pd.DataFrame, path: Path) -> None:
    """Valid NDCG@10 of every trial and the best so far. trials: `number`, `state`, `value`."""
    with drawing(path, 1, 1, (4.5, 2.6)) as axes:
        axis = axes[0, 0]
        known = trials[trials["value"].notna()].sort_values("number")
        for state, marker, colour in (("COMPLETE", "o", COLOURS[0]), ("PRUNED", "x", COLOURS[1])):
            part = known[known["state"] == state]
            if len(part):
                axis.scatter(
                    part["number"], part["value"], marker=marker, color=colour, s=22,
                    label=f"{state.lower()} ({len(part)})",
                )  # fmt: skip
        done = known[known["state"] == "COMPLETE"]
        axis.step(
            done["number"], done["value"].cummax(), where="post", color="black", linewidth=1,
            label="best so far",
        )  # fmt: skip
        axis.set_xlabel("trial")
        axis.set_ylabel("valid NDCG@10")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False)


def search_importance(importance: dict[str, float], path: Path) -> None:
    """Share of the variance over trials that each setting explains (fANOVA)."""
    names = sorted(importance, key=importance.__getitem__)
    with drawing(path, 1, 1, (4.5, 0.9 + 0.26 * len(names))) as axes:
        axis = axes[0, 0]
        axis.barh(names, [importance[name] for name in names], color=COLOURS[0], height=0.7)
        axis.set_xlabel("importance")
        axis.set_xlim(0, 1)
        axis.grid(axis="y", visible=False)
        axis.tick_params(axis="y", length=0)


def search_slices(trials: pd.DataFrame, logarithmic: list[str], path: Path) -> None:
    """Value against every setting of the search, one panel each.

    trials: `state`, `value`, and one column per setting (`section.key`).
    """
    names = [c for c in trials if "." in c]
    columns = min(3, len(names))
    n_rows = -(-len(names) // columns)
    with drawing(path, n_rows, columns, (WIDTH * columns / 3, 0.4 + 1.9 * n_rows), sharey=True) as (
        axes
    ):
        for axis, name in zip(axes.ravel(), names, strict=False):
            _slice(axis, trials, name, name in logarithmic)
        _hide_rest(axes, len(names))
        axes[0, 0].figure.supylabel("valid NDCG@10", fontsize=9)
        axes[0, 0].figure.legend(
            *axes[0, 0].get_legend_handles_labels(), frameon=False, ncols=2,
            loc="outside upper right",
        )  # fmt: skip


def _round_numbers(values: pd.Series) -> Locator:
    """Where a logarithmic axis has ticks: the closer together the values, the more."""
    spread = values.max() / values.min()
    if spread <= 2.5:
        return MaxNLocator(3)
    return LogLocator(subs=(1, 3) if spread > 100 else (1, 2, 5))


def _slice(axis: Axes, trials: pd.DataFrame, name: str, logarithmic: bool) -> None:
    if not pd.api.types.is_numeric_dtype(trials[name]):
        trials = trials.assign(**{name: trials[name].astype(str)})
    for state, marker, colour in (("COMPLETE", "o", COLOURS[0]), ("PRUNED", "x", COLOURS[1])):
        part = trials[(trials["state"] == state) & trials["value"].notna()]
        label = {"label": state.lower()} if len(part) else {}
        axis.scatter(part[name], part["value"], marker=marker, color=colour, s=18, **label)
    if logarithmic:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(_round_numbers(trials[name]))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    axis.set_xlabel(name)
