"""Modes: what `python main.py --mode NAME` runs. Found by name, imported on use."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

MODES = {
    "quick": "experiments.modes:quick",
    "baseline": "experiments.modes:baseline",
    "ablation": "experiments.modes:ablation",
    "hyper": "experiments.hyper:hyper",
    "mcrl": "experiments.mcrl:run_mcrl_experiment",
    "full": "experiments.full:full",
    "theory": "experiments.theory:run_theory",
    "report": "experiments.modes:rebuild",
}


# What a mode makes of its folder after training, and mode report again: (folder, task, latest).
WRITERS = {
    "quick": "experiments.report:show",
    "baseline": "experiments.results:write_baseline",
    "ablation": "experiments.results:write_ablation",
    "hyper": "experiments.hyper:write_hyper",
    "mcrl": "experiments.mcrl:write_comparison",
    "full": "experiments.full:write_full",
}


def find_mode(name: str) -> Callable:
    """The function of a mode. Raises KeyError for a name that is not in MODES."""
    return _find(MODES[name])


def find_writer(mode: str) -> Callable | None:
    """What writes the tables and figures of a mode; None for a mode that has none."""
    return _find(WRITERS[mode]) if mode in WRITERS else None


def _find(target: str) -> Callable:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def start(flags: dict[str, Any], overlay: dict[str, Any], resume: str | None) -> int:
    """Run the mode that the settings ask for; returns the exit code of the program.

    0 done, 1 a model failed, 2 a mistake the user can mend, 130 stopped by a signal.
    """
    from experiments.requests import Request, resumed_request
    from experiments.training import Stopped
    from util import UserError, pick_device, process_group, start_logging

    try:
        request = Request(flags, overlay, resume)
        if resume:
            request = resumed_request(resume, request)
        request.check_mode()
        config = request.config()
        with process_group(pick_device(config.run.device)):
            start_logging(config.run.log_dir)
            failed = find_mode(config.run.mode)(request)
        return 1 if failed else 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt):
        print("\nStopped. Add --resume to the same command to go on.", file=sys.stderr)
        return 130
