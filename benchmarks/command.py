"""What the scripts of this folder share: their flags, and one line for a mistake, as in main.py."""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable
from typing import NoReturn

from config import ConfigError, read_pairs
from experiments.training import Stopped
from util import UserError

CHOSEN = ("run.mode", "run.model", "data.dataset")  # by a script or a flag of its own, not by --set
Number = Callable[[str], float]  # a type of argparse


def command(main: Callable[..., int | None]) -> Callable[..., int]:
    """Make of `main(arguments)` a function that returns the exit code: 2 for a user's mistake,
    130 when it was interrupted."""

    @functools.wraps(main)
    def run(arguments: list[str] | None = None) -> int:
        try:
            return main(arguments) or 0
        except (ConfigError, UserError) as error:
            print(f"error: {error}", file=sys.stderr)
        except OSError as error:
            if error.filename is None:  # not of a file that the user named
                raise
            print(f"error: {error.filename}: {error.strerror}.", file=sys.stderr)
        except (Stopped, KeyboardInterrupt):
            print("Stopped.", file=sys.stderr)
            return 130
        return 2

    return run


def number(kind: type[int] | type[float], low: float, high: float = math.inf) -> Number:
    """Reads a finite number within [low, high]."""
    name = "a whole number" if kind is int else "a number"
    limits = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if low <= value <= high and value != math.inf:
            return value
        raise argparse.ArgumentTypeError(f"wants {name} {limits}, not '{text}'")

    return read


positive_int = number(int, 1)
share = number(float, 0, 1)


class Parser(argparse.ArgumentParser):
    """Flags of a script, described by the first line of its documentation."""

    def __init__(self, documentation: str) -> None:
        super().__init__(description=documentation.splitlines()[0], allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, where argparse would print all flags and exit."""
        raise UserError(f"{message[:1].upper()}{message[1:]} (--help lists all flags).")

    def add_number(
        self, flag: str, default: float | None, note: str, kind: Number = positive_int
    ) -> None:
        """A flag for one number; the default None stands for all."""
        note = f"{note} (default {'all' if default is None else default})"
        self.add_argument(flag, type=kind, default=default, metavar="N", help=note)

    def add_settings(self) -> None:
        """The flag of main.py for one setting; `read_settings` reads what was given."""
        self.add_argument(
            "--set", metavar="KEY=VALUE", action="append", default=[],
            help="one setting of config.py; may be repeated",
        )  # fmt: skip


def read_settings(texts: list[str], *chosen: str) -> dict[str, str]:
    """Dotted key -> text of `--set` flags.

    Raises ConfigError for CHOSEN and `chosen`, which would be overruled or would spoil the figures.
    """
    given = read_pairs(texts)
    for key in (*CHOSEN, *chosen):
        if key in given:
            raise ConfigError(f"--set {key}: the script chooses it, or has a flag for it (--help).")
    return given
