"""The modes that train lists of runs: each run in a folder of its own, tables from the folders."""

from __future__ import annotations

import re
from collections.abc import Callable
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from config import MODE_MODELS, Config, ConfigError, build_config, read_yaml
from experiments import find_writer
from experiments.report import read_runs
from experiments.requests import Request, announce, finish, open_folder, read_request
from experiments.runs import (
    CONFIG,
    METRICS,
    MODELS,
    RANKS,
    Task,
    load_task,
    model_class,
    refuse_other_data,
    run,
)
from experiments.training import Stopped, comparable, refuse_other
from util import UserError, from_first, rank, say

logger = getLogger("pmat")
# What mode report may be told: which run, and where its data are now.
REPORT_FLAGS = {"run.mode", "run.source", "run.log_dir", "data.dataset", "data.data_dir"}
# A part of a mode: trains into a folder and returns the folders of the runs that failed.
Part = Callable[[Request, Task, Path], list[Path]]


class Job(NamedTuple):
    """One run to be made."""

    place: Path
    model: str
    seed: int
    changes: dict[str, Any] = {}  # settings that make it an ablation, and its label


# --------------------------------------------------------------------------- modes


def quick(request: Request) -> int:
    """One model, few epochs, one table: does everything work? Returns the number of failed runs."""
    model = request.config().run.model
    if "," in model:
        raise ConfigError(f"--mode quick runs one model, not {model}; --mode baseline compares.")

    def part(request: Request, task: Task, folder: Path) -> list[Path]:
        jobs = _alone(model_jobs(request, (model,), folder), folder)
        return run_jobs(request, jobs, task, isolate=False)

    return conduct(request, (model,), part)


def baseline(request: Request) -> int:
    """Every registered model (or those in --model), `--seeds` runs each, compared.

    Returns the number of failed runs; a model that fails is reported and the others go on.
    """
    return conduct(request, request.models(tuple(MODELS)), train_models)


def ablation(request: Request) -> int:
    """The declared ablations of the chosen models against the full models.

    Returns the number of failed runs. Raises ConfigError for a model that declares none.
    """
    names = request.models(MODE_MODELS["ablation"])
    for name in names:
        if not model_class(name).ablations:
            known = ", ".join(model for model in MODELS if model_class(model).ablations)
            raise ConfigError(f"--model {name} declares no ablations; these do: {known}.")
    return conduct(request, names, train_ablations)


def rebuild(request: Request) -> int:
    """Mode report: tables and figures of a finished or unfinished folder again; trains nothing."""
    source = request.config().run.source
    if not source:
        raise UserError("--mode report: name the run folder with --from results/...")
    folder = Path(source)
    stored = read_request(folder)
    given = request.overlay | request.flags
    idle = given.keys() - REPORT_FLAGS
    if idle:
        raise UserError(
            f"--mode report: {min(idle)} is of a run that trains; the run in {folder} is as it is."
        )
    here = {key: value for key, value in given.items() if key.startswith("data.")}
    config = stored._replace(flags=stored.flags | here).config()
    write = find_writer(config.run.mode)
    if write is None:
        raise UserError(f"--from {source}: mode {config.run.mode} has no tables to rebuild.")
    task = load_task(config)
    if not list(folder.rglob(METRICS)):
        raise UserError(f"--from {source}: no run in it has finished; go on with --resume {source}")
    _check_same_data(folder, task)
    write(folder, task, None)
    if config.run.mode != "quick":  # its table is only printed
        say(f"\nTables and figures are in {folder}")
    return 0


def _check_same_data(folder: Path, task: Task) -> None:
    test = task.split.test
    for made in read_runs(folder):
        sizes = made.result["dataset"]
        found = (task.dataset.sequences.n_users, task.dataset.catalogue.n_items)
        if found != (sizes["users"], sizes["items"]):
            raise UserError(
                f"{made.folder} was made with {sizes['users']} users and {sizes['items']} items, "
                f"the data set has {found[0]} and {found[1]} now; name the right --data_dir."
            )
        with np.load(made.folder / RANKS, allow_pickle=False) as stored:
            if not np.array_equal(stored["targets"], test.items):
                raise UserError(
                    f"{made.folder} was tested on other items than are held out now; name the "
                    "right --data_dir, with files as they were."
                )
        refuse_other_data(made.folder, task)  # groups of users depend on features, too


# --------------------------------------------------------------------------- how a mode goes


def conduct(request: Request, names: tuple[str, ...], part: Part) -> int:
    """Read the data, let `part` train into the run folder, write tables and figures from it.

    Names of models are checked before anything is read or written. Returns the number of failures.
    """
    for name in names:
        model_class(name)
    config = request.config()
    task = load_task(config)
    announce(config)
    with open_folder(request, config) as folder:
        failed = part(request, task, folder)
        if rank() == 0:
            find_writer(config.run.mode)(folder, task, Path(config.run.save_dir))
            finish(folder, failed)
    return len(failed)


def train_models(request: Request, task: Task, folder: Path) -> list[Path]:
    """The part of mode baseline."""
    jobs = model_jobs(request, request.models(tuple(MODELS)), folder)
    return run_jobs(request, _alone(jobs, folder), task)


def train_ablations(request: Request, task: Task, folder: Path) -> list[Path]:
    """The part of mode ablation: full models first, then what is taken away."""
    names = [n for n in request.models(MODE_MODELS["ablation"]) if model_class(n).ablations]
    return run_jobs(request, ablation_jobs(request, names, folder), task)


def model_jobs(request: Request, names: tuple[str, ...], folder: Path) -> list[Job]:
    """Every model with every seed."""
    return [
        Job(folder / f"{name}_seed{seed}", name, seed)
        for name in names
        for seed in seeds_of(request.config())
    ]


def _alone(jobs: list[Job], folder: Path) -> list[Job]:
    """A single run goes into the folder of the mode itself."""
    return [jobs[0]._replace(place=folder)] if len(jobs) == 1 else jobs


def ablation_jobs(request: Request, names: list[str], folder: Path) -> list[Job]:
    """Full models under the names mode baseline gives them, and every declared ablation.

    An ablation whose settings are those of the full model, as presets may have it, is left out.
    """
    jobs = []
    for name in names:
        full = comparable(request.config(name))
        variants = {"": {}} | model_class(name).ablations
        for label, overrides in variants.items():
            if label and comparable(request.config(name, overrides)) == full:
                continue
            part = f"{name}--{slug(label)}" if label else name
            changes = {**overrides, "run.label": label} if label else {}
            jobs += [
                Job(folder / f"{part}_seed{seed}", name, seed, changes)
                for seed in seeds_of(request.config())
            ]
    return jobs


def slug(label: str) -> str:
    """The name of an ablation as it stands in names of folders."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")


def seeds_of(config: Config) -> range:
    """The seeds of the runs of each model."""
    return range(config.run.seed, config.run.seed + config.run.seeds)


def run_jobs(request: Request, jobs: list[Job], task: Task, isolate: bool = True) -> list[Path]:
    """Run what is not finished yet; returns the folders of those that failed."""
    for job in jobs:  # so that tables made before all are finished can name what is missing
        job.place.mkdir(parents=True, exist_ok=True)
    return [
        job.place
        for job in jobs
        if not run_once(request.config(job.model, job.changes), job.seed, task, job.place, isolate)
    ]


def run_once(config: Config, seed: int, task: Task, folder: Path, isolate: bool) -> bool:
    """Whether the run of this folder is finished now; with `isolate`, failures are only logged.

    Raises UserError where it was finished with other settings or on other data.
    """
    config.run.seed = seed
    if from_first((folder / METRICS).exists()):
        made = build_config(overlay=read_yaml(str(folder / CONFIG)))
        refuse_other(folder, comparable(made), comparable(config))
        refuse_other_data(folder, task)
        return True
    folder.mkdir(parents=True, exist_ok=True)
    label = f" ({config.run.label})" if config.run.label else ""
    logger.info("\n%s%s, seed %d", config.run.model, label, seed)
    try:
        run(config, task, folder)
    except (Stopped, KeyboardInterrupt):
        raise
    except Exception as error:
        if not isolate:
            raise
        traceback = None if isinstance(error, UserError) else error
        logger.error("%s%s failed: %s", config.run.model, label, error, exc_info=traceback)
        return False
    return True
