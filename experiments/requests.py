"""What was asked for, and the run folder it goes to: new, or one to resume."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from logging import getLogger
from pathlib import Path
from typing import IO, Any, NamedTuple

import yaml

from config import Config, ConfigError, build_config, dataset_name, differences, value_of
from experiments.runs import CONFIG
from experiments.training import comparable
from util import UserError, claim, from_first, new_run_folder, rank, say, write_yaml

logger = getLogger("pmat")
REQUEST, UNFINISHED = "request.yaml", "unfinished"
# Settings that do not change results: a resumed run may have others.
MAY_CHANGE = {
    "run.device", "run.save_dir", "run.log_dir", "train.num_workers", "data.data_dir",
    "hyper.trials",
}  # fmt: skip


# Flags that say nothing in other modes.
OF_MODES = {
    "run.source": ("report",), "hyper.join": ("hyper",), "hyper.trials": ("hyper", "full"),
    "hyper.startup": ("hyper", "full"), "full.sizes": ("full",), "full.size_seconds": ("full",),
    "full.case_users": ("full",),
}  # fmt: skip


class Request(NamedTuple):
    """What the user asked for: settings by dotted key, before presets fill in the rest."""

    flags: dict[str, Any]  # from the command line
    overlay: dict[str, Any]  # from --config
    resume: str | None  # None: start afresh; "": newest unfinished run; else the run's folder

    def config(self, model: str | None = None, changes: dict[str, Any] | None = None) -> Config:
        """All settings, with the presets of `model`; `changes` by dotted key beat all others."""
        return build_config(self.flags | (changes or {}), self.overlay, model)

    def check_mode(self) -> None:
        """Raises UserError for a flag that the mode would ignore, and for a label."""
        run = self.config().run
        if run.label:  # tables of models leave runs with a label out
            raise UserError(
                f"run.label={run.label}: labels are given by the modes to the runs they make; "
                "leave it out."
            )
        mode = run.mode
        for key in self.flags.keys() & OF_MODES.keys():
            if mode not in OF_MODES[key]:
                right = " or ".join(f"--mode {name}" for name in OF_MODES[key])
                raise UserError(f"{key} belongs to {right}, not to --mode {mode}.")

    def without(self, key: str) -> Request:
        """The same request with one setting left out."""
        flags, overlay = (
            {k: v for k, v in part.items() if k != key} for part in (self.flags, self.overlay)
        )
        return self._replace(flags=flags, overlay=overlay)

    def models(self, default: tuple[str, ...]) -> tuple[str, ...]:
        """The models the user named, or else `default`."""
        if "run.model" not in self.flags | self.overlay:
            return default
        return tuple(name.strip() for name in self.config().run.model.split(","))


def announce(config: Config) -> None:
    """Log the settings that make this run special."""
    changed = differences(config)
    logger.info(
        "Settings that differ from the defaults: %s",
        ", ".join(f"{key}={value}" for key, value in changed.items()) or "none",
    )


# --------------------------------------------------------------------------- run folders


@contextlib.contextmanager
def open_folder(request: Request, config: Config) -> Iterator[Path]:
    """A new run folder, or the one to resume; nobody else can resume it meanwhile.

    When a mistake of the user ends the run before anything is trained, the folder goes again.
    """
    with contextlib.ExitStack() as held:
        folder = None
        if rank() == 0:
            folder, lock = _resumable(request, config) or _new_folder(request, config)
            held.enter_context(lock)
        folder = Path(from_first(str(folder)))
        try:
            yield folder
        except (UserError, ConfigError):
            if rank() == 0 and _is_barren(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise


def finish(folder: Path, failed: list[Path]) -> None:
    """Say where everything is; without failures there is nothing left to resume."""
    if not failed:
        (folder / UNFINISHED).unlink(missing_ok=True)
    say(f"\nEverything is in {folder}")


def _new_folder(request: Request, config: Config) -> tuple[Path, IO[str]]:
    label = f"{config.run.mode}_{dataset_name(config.data.dataset)}"
    folder = new_run_folder(config.run.save_dir, label)
    write_yaml(folder / REQUEST, {"flags": request.flags, "overlay": request.overlay})
    lock = _claim(folder)
    (folder / UNFINISHED).touch()  # last: from here on --resume finds it
    return folder, lock


def _claim(folder: Path) -> IO[str]:
    lock = claim(folder / REQUEST)
    if lock is None:
        raise UserError(f"--resume {folder}: another process is working on that run.")
    return lock


def _is_barren(folder: Path) -> bool:
    """Whether it holds nothing but settings."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name for path in files} <= {REQUEST, UNFINISHED, CONFIG}


def _resumable(request: Request, config: Config) -> tuple[Path, IO[str]] | None:
    """The folder to go on with and the hold on it."""
    if request.resume is None:
        return None
    folder = Path(request.resume)
    if request.resume:  # it was read already, so it is a run folder
        logger.info("Resuming %s", folder)
        return folder, _claim(folder)
    folders = [path.parent for path in Path(config.run.save_dir).glob(f"*/{UNFINISHED}")]
    for folder in sorted(folders, key=lambda f: f.stat().st_mtime, reverse=True):
        # passed over: a run of another version, or one that is still going on
        with contextlib.suppress(UserError, ConfigError):
            if _identity(read_request(folder).config()) == _identity(config):
                lock = _claim(folder)
                logger.info("Resuming %s", folder)
                return folder, lock
    logger.info(
        "No unfinished run with these settings in %s; starting afresh.", config.run.save_dir
    )
    return None


def _identity(config: Config) -> dict[str, Any]:
    run_settings = (config.run.mode, config.run.model, config.run.seeds)
    tables = {"full": asdict(config.full), "startup": config.hyper.startup}
    return comparable(config) | {"asked": run_settings} | tables


def read_request(folder: Path) -> Request:
    """What the run in `folder` was asked to do. Raises UserError when it is no run folder."""
    try:
        stored = yaml.safe_load((folder / REQUEST).read_text(encoding="utf-8"))
        return Request(dict(stored["flags"]), dict(stored["overlay"]), str(folder))
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder} is no run folder (no readable {REQUEST}); name one with --resume or --from."
        ) from None


def resumed_request(folder: str, request: Request, flag: str = "--resume ") -> Request:
    """The stored request of `folder`; the flags given now must not contradict it.

    Where and on what to run (device, log folder) may change. Raises UserError naming the key and
    the `flag` that brought the folder in.
    """
    stored = read_request(Path(folder))
    known, given = stored.overlay | stored.flags, request.overlay | request.flags
    for key in given.keys() - MAY_CHANGE:
        # what was not given then comes from presets, which differ by model, but for these sections
        comes_from_presets = key not in known and key.split(".")[0] not in ("run", "data")
        before, now = (value_of(one.config(), key) for one in (stored, request))
        if comes_from_presets or before != now:
            shown = "what its presets say" if comes_from_presets else before
            raise UserError(
                f"{flag}{folder}: that run has {key}={shown}, not {now}; leave the flag out or "
                "start a new run."
            )
    kept = {key: value for key, value in request.flags.items() if key in MAY_CHANGE}
    return stored._replace(flags=stored.flags | kept)
