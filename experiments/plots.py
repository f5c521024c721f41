"""Figures, as PDF for papers and PNG for screens. Colours can be told apart by everybody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from util import atomic_path

# Okabe and Ito's palette, and dashes for print without colour
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)))


def loss_curves(epochs: list[dict[str, Any]], path: Path) -> None:
    """Every part of the loss over epochs, weighted, one panel each: they differ a lot in size.

    epochs are the rows of `epochs.jsonl`; writes `path`.pdf and `path`.png.
    """
    names = list(epochs[0]["parts"])
    figure, panels = plt.subplots(
        1, len(names), figsize=(2.4 * len(names), 2.4), squeeze=False, layout="constrained"
    )
    for index, (panel, name) in enumerate(zip(panels[0], names, strict=True)):
        style = {"color": COLOURS[index % 7], "linestyle": DASHES[index % 7]}
        panel.plot(
            [row["epoch"] for row in epochs], [row["parts"][name] for row in epochs], **style
        )
        panel.set_title(name, fontsize=10)
        panel.set_xlabel("epoch")
    panels[0][0].set_ylabel("weighted loss")
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write `path`.pdf and `path`.png, and close the figure."""
    for ending in ("pdf", "png"):
        with atomic_path(path.with_suffix(f".{ending}")) as temporary:
            figure.savefig(temporary, format=ending, dpi=200)
    plt.close(figure)
