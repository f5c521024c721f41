"""One figure for each theorem, drawn from the curves of theory.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.plots import COLOURS, DASHES, save

_MEASURED = {"color": COLOURS[0], "linestyle": DASHES[0], "marker": "o", "markersize": 3}
_BOUND = {"color": COLOURS[1], "linestyle": DASHES[1]}


def all_figures(curves: dict[str, Any], folder: Path) -> None:
    """Write theorem_1 to theorem_6 as PDF and PNG into `folder`."""
    drawn = {
        1: _drift(curves["1"]),
        2: _updates(curves["2"], curves["dial"]),
        3: _consistency(curves["3"], curves["dial"]),
        4: _discrimination(curves["4"]),
        5: _levels(curves["5"]),
        6: _retrieval(curves["6"]),
    }
    for number, figure in drawn.items():
        save(figure, folder / f"theorem_{number}")


def _panels(count: int, width: float = 3.4) -> tuple[Figure, list[Axes]]:
    figure, panels = plt.subplots(1, count, figsize=(width * count, 2.9), layout="constrained")
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(which="both", labelsize=8)
    return figure, list(panels)


def _label(panel: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    panel.set_title(title, fontsize=9)
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    if legend:
        panel.legend(fontsize=7.5, frameon=False)


def _drift(curves: dict[str, Any]) -> Figure:
    figure, (first, second, third) = _panels(3)
    gaps = np.geomspace(1e-3, 1, 60)
    first.plot(gaps, np.ones_like(gaps), label="codes of the counter-example", color=COLOURS[0])
    for constant, colour, dash in zip((1, 10, 100), COLOURS[1:], DASHES[1:], strict=False):
        claim = np.where(constant * gaps < 1.15, constant * gaps, np.nan)
        first.plot(gaps, claim, label=f"C = {constant}", color=colour, linestyle=dash)
    first.set_xscale("log")
    first.set_ylim(0, 1.75)
    _label(
        first, "as first worded: fails for every C", r"$\|\alpha_u-\alpha_v\|$", "share of digits"
    )
    pairs = curves["pairs"]
    second.plot(pairs["distance"], pairs["differ"], label="differ", **_MEASURED)
    second.plot(pairs["distance"], pairs["bound"], label="margins allow it", **_BOUND)
    second.set_ylim(0, 1.05)
    _label(second, "two users, trained model", r"$\|\alpha_u-\alpha_v\|$", "share of digits")
    places = curves["places"]
    third.plot(places["step"], places["differ"], label="differ", **_MEASURED)
    third.plot(places["step"], places["bound"], label="bound", **_BOUND)
    _label(third, "on average over places", r"step $\|v\|$", "share of digits")
    return figure


def _updates(curves: dict[str, Any], dial: dict[str, Any]) -> Figure:
    figure, (first, second, third) = _panels(3)
    for panel, name in ((first, "contraction"), (second, "tracking")):
        found = curves[name]
        panel.plot(found["measured"], label="measured", **_MEASURED)
        panel.plot(found["bound"], label="bound", **_BOUND)
    first.set_yscale("log")
    _label(first, r"two starts, $\lambda=0.3$", "update", "distance of weights")
    _label(second, r"tracking a moving target, $\lambda=0.3$", "update", "distance to target")
    third.plot(dial["margin"], dial["churn"], label="measured", **_MEASURED)
    third.plot(dial["margin"], dial["churn_bound"], label="bound", **_BOUND)
    third.set_xscale("log")
    _label(third, "changes of a digit per history", "hysteresis margin $h$", "changes")
    return figure


def _consistency(curves: dict[str, Any], dial: dict[str, Any]) -> Figure:
    figure, (first, second, third) = _panels(3)
    first.plot(dial["margin"], dial["lost"], label="measured", **_MEASURED)
    first.plot(dial["margin"], dial["lost_bound"], label=r"bound $h/\|\alpha\|$", **_BOUND)
    first.set_xscale("log")
    first.set_yscale("log")
    _label(first, "what hysteresis costs", "hysteresis margin $h$", "cosine lost")
    second.plot(dial["churn"], dial["lost"], **_MEASURED)
    for place, margin in enumerate(dial["margin"]):
        if place % 2 == 0:
            second.annotate(
                f"$h={margin:g}$", (dial["churn"][place], dial["lost"][place]),
                xytext=(5, 5), textcoords="offset points", fontsize=7,
            )  # fmt: skip
    _label(second, "stable or faithful", "changes of a digit", "cosine lost", legend=False)
    values = np.array(curves["p_values"])
    share = np.arange(1, len(values) + 1) / len(values)
    third.step(values, share, where="post", label="shuffled histories", color=COLOURS[0])
    third.plot([0, 1], [0, 1], label="level of the test", **_BOUND)
    _label(third, "false alarms", "level", "share of alarms")
    return figure


def _discrimination(curves: dict[str, Any]) -> Figure:
    figure, (first, second) = _panels(2, 3.8)
    prefix = curves["prefix"]
    digits = np.arange(1, len(prefix["loss"]) + 1)
    first.plot(digits, prefix["loss"], label="loss", **_MEASURED)
    first.plot(digits, prefix["bound"], label=r"bound: mean $\log(1+$ collisions$)$", **_BOUND)
    first.set_ylim(bottom=0)
    first.set_xticks(digits)
    _label(first, "items told apart by few digits", "digits used", "loss (nats)")
    margin = curves["margin"]
    order = np.argsort(margin["loss"])
    losses = np.array(margin["loss"])[order]
    second.scatter(margin["loss"], margin["measured"], s=8, color=COLOURS[0], label="measured")
    bound = np.array(margin["bound"])[order]
    second.plot(losses, bound, label=r"bound $\tau\log\,1/(e^{\ell}-1)$", **_BOUND)
    second.axvline(np.log(2), color="0.6", linewidth=0.8)
    second.set_xscale("log")
    _label(second, "items against their own codewords", r"loss $\ell$", "margin (cosine)")
    return figure


def _levels(curves: dict[str, Any]) -> Figure:
    figure, (first, second, third) = _panels(3)
    found = curves["alignment"]
    first.plot(found["cosine"], found["similarity"], label="measured", **_MEASURED)
    first.plot(found["cosine"], found["similarity_bound"], label="bound", **_BOUND)
    _label(first, "similarity of two items, user to user", "cosine of modalities", "change")
    second.plot(found["cosine"], found["digits"], label="modalities side by side", **_MEASURED)
    second.plot(
        found["cosine"], found["digits_of_sums"], label="modalities added", color=COLOURS[2],
        linestyle=DASHES[2], marker="s", markersize=3,
    )  # fmt: skip
    second.set_ylim(bottom=0)
    _label(second, "digits that differ between users", "cosine of modalities", "share of digits")
    decrease = curves["levels"]["decrease"]
    names = [name for name in decrease if name != "task"]
    third.barh(names[::-1], [decrease[n] for n in names[::-1]], color=COLOURS[0])
    third.locator_params(axis="x", nbins=4)
    third.axvline(0, color="0.3", linewidth=0.8)
    _label(third, "one step along each level", "fall of the task's loss", "", legend=False)
    return figure


def _retrieval(curves: dict[str, Any]) -> Figure:
    figure, panels = _panels(3)
    titles = {
        "operations": ("multiply-adds and look-ups", "operations"),
        "milliseconds": ("one request, measured", "milliseconds"),
        "bytes": ("memory", "megabytes"),
    }
    for panel, (name, (title, unit)) in zip(panels, titles.items(), strict=True):
        for place, (way, values) in enumerate(curves[name].items()):
            scale = 1e-6 if name == "bytes" else 1.0
            style = {"color": COLOURS[place], "linestyle": DASHES[place]}
            panel.plot(curves["items"], np.array(values) * scale, label=way, **style)
        panel.set_xscale("log")
        panel.set_yscale("log")
        _label(panel, title, "items", unit)
    return figure
