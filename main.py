"""The only entry point: `python main.py --mode quick --model sasrec --dataset mock`."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from config import MODES, Config, ConfigError, closest, read_pairs, read_yaml, value_of


class _Parser(argparse.ArgumentParser):
    """Errors of one line with the nearest known word, exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message[:1].upper()}{message[1:]}.")

    def parse_strictly(self, arguments: list[str] | None) -> argparse.Namespace:
        """Like `parse_args`, with a hint for a flag nobody knows."""
        found, rest = self.parse_known_args(arguments)
        if rest:
            known = [option for action in self._actions for option in action.option_strings]
            raise ConfigError(f"There is no flag '{rest[0]}'.{closest(rest[0], known)}")
        return found


# flag -> (dotted key, type, help); {} stands for the default in config.py
FLAGS: dict[str, tuple[str, type, str]] = {
    "mode": ("run.mode", str, f"{', '.join(MODES)} (default {{}})"),
    "dataset": (
        "data.dataset",
        str,
        "mock, amazon, movielens, mmrec (data/mmrec), or a folder (default {})",
    ),
    "model": (
        "run.model",
        str,
        "one, or several with commas where a mode compares them (default {}; baseline: all)",
    ),
    "epochs": (
        "train.epochs",
        int,
        "passes over the train set (quick 2, theory 3, else the model's preset)",
    ),
    "batch_size": ("train.batch_size", int, "examples per step (quick 64, else the preset)"),
    "lr": ("train.lr", float, "learning rate ({} where the model's preset names none)"),
    "device": ("run.device", str, "auto, cpu or cuda (default {})"),
    "seed": (
        "run.seed",
        int,
        "first random seed of the models; the data have data.seed (default {})",
    ),
    "seeds": ("run.seeds", int, "runs per model, with seeds seed, seed+1, ... (default {})"),
    "save_dir": ("run.save_dir", str, "folder of the results (default {})"),
    "log_dir": ("run.log_dir", str, "folder of experiment.log (default {})"),
    "data_dir": ("data.data_dir", str, "folder of the data sets (default {})"),
    "trials": ("hyper.trials", int, "mode hyper: trials of the study (default {})"),
    "from": ("run.source", str, "mode report: the run folder to rebuild tables and figures of"),
    "num_workers": ("train.num_workers", int, "batches prefetched by a thread (default {})"),
}


def parser() -> argparse.ArgumentParser:
    """All flags; a flag that is not given leaves the presets alone."""
    parser = _Parser(
        description="PMAT-MCRL: personalised, dynamic, multimodal semantic IDs.",
        epilog="Modes and models: README.md. Settings: config.py. For example: python main.py "
        "--mode baseline --model sasrec,bsarec --dataset path/to/folder --set train.patience=3",
        allow_abbrev=False,
    )
    defaults = Config()
    for flag, (key, kind, note) in FLAGS.items():
        note = note.format(value_of(defaults, key))
        parser.add_argument(f"--{flag}", type=kind, help=note)
    parser.add_argument(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="mixed precision in training (default on; evaluation never has it)",
    )
    parser.add_argument(
        "--mask_seen", "--mask-seen", action=argparse.BooleanOptionalAction,
        help="leave items of the history out of the ranking (default yes)",
    )  # fmt: skip
    parser.add_argument("--config", metavar="FILE.yaml", help="settings that overlay config.py")
    parser.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="one setting of config.py, such as rpg.digits=16; may be repeated",
    )
    parser.add_argument(
        "--resume", nargs="?", const="", metavar="RUN",
        help="go on with RUN, or with the newest unfinished run of the same settings",
    )  # fmt: skip
    return parser


def settings(found: argparse.Namespace) -> dict[str, Any]:
    """Dotted key -> value of everything given on the command line."""
    given: dict[str, Any] = {**read_pairs(found.set)}  # first, a flag of its own beats --set
    for flag, (key, _, _) in FLAGS.items():
        if getattr(found, flag) is not None:
            given[key] = getattr(found, flag)
    if found.amp is not None:
        given["train.amp"] = "auto" if found.amp else "off"
    if found.mask_seen is not None:
        given["train.mask_seen"] = found.mask_seen
    return given


def main(arguments: list[str] | None = None) -> int:
    """Run what the flags ask for. 0 done, 1 a model failed, 2 the user's mistake, 130 stopped."""
    try:
        found = parser().parse_strictly(arguments)
        flags, overlay = settings(found), read_yaml(found.config) if found.config else {}
        # torch takes a second or two to import: not needed for --help or a misspelt flag
        from experiments import start

        return start(flags, overlay, found.resume)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # while torch is imported; later, the run says how to go on
        return 130


def __getattr__(name: str) -> Any:
    """`main.train_mcrl_model` and `main.run_mcrl_experiment`, where users of old scripts look."""
    if name in {"train_mcrl_model", "run_mcrl_experiment"}:
        from experiments import mcrl

        return getattr(mcrl, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if __name__ == "__main__":
    sys.exit(main())
