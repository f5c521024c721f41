"""Modes: what `python main.py --mode NAME` runs. Found by name, imported on use."""

from __future__ import annotations

import importlib
from collections.abc import Callable

MODES = {
    "quick": "experiments.modes:quick",
    "baseline": "experiments.modes:baseline",
}


def find_mode(name: str) -> Callable:
    """The function of a mode. Raises KeyError for a name that is not in MODES."""
    module, function = MODES[name].split(":")
    return getattr(importlib.import_module(module), function)
