"""Mode `full`: all experiments in one folder, and one report of them.

Runs are shared: the full models of the ablations and of the MCRL comparison are those of the
baseline table. Whatever is finished is never done again after --resume.
"""

from __future__ import annotations

import json
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from config import MODE_MODELS, Config, ConfigError, dataset_name
from experiments import comparisons, mcrl, plots, report, results
from experiments.case_study import CASES, case_tables, write_case_study
from experiments.document import Section, write_document
from experiments.efficiency import latencies
from experiments.hyper import search_and_test, write_hyper
from experiments.modes import ablation_jobs, conduct, model_jobs, run_jobs
from experiments.requests import MAY_CHANGE, Request, read_request
from experiments.runs import MODELS, Task, list_length, load_task, model_class, stage_one
from experiments.search import import_optuna
from experiments.tables import Column, Table, write_table
from metrics import latency_summary
from util import (
    Stopwatch,
    UserError,
    environment,
    machine_name,
    pick_device,
    rank,
    seed_everything,
    write_json,
)

logger = getLogger("pmat")
_SMALLEST = 20  # items of a mock catalogue, as `mock.n_items` has it
SEARCH, SIZES = "hyper", "latency_by_size.json"
PATHS = {"data.dataset", "data.features_from", "data.text_encoder", "data.image_encoder"}


def full(request: Request) -> int:
    """Baselines, ablations, MCRL, search, speed, case study, report; returns failed runs."""
    # mistakes are better said before hours of training
    import_optuna()
    sizes(request.config())
    return conduct(request, request.models(tuple(MODELS)), train_everything)


def train_everything(request: Request, task: Task, folder: Path) -> list[Path]:
    """All parts in turn; one that fails is reported and the others go on."""
    names = request.models(tuple(MODELS))
    jobs = model_jobs(request, names, folder)
    ablated = [n for n in MODE_MODELS["ablation"] if n in names] or list(names)
    ablated = [n for n in ablated if model_class(n).ablations]
    jobs += [job for job in ablation_jobs(request, ablated, folder) if job not in jobs]
    failed = run_jobs(request, jobs, task)
    searched = [n for n in MODE_MODELS["hyper"] if n in names]
    searched = searched or [n for n in names if model_class(n).search_space][:1]
    if searched:
        narrow = request._replace(flags=request.flags | {"run.model": ",".join(searched)})
        try:
            failed += search_and_test(narrow, task, folder / SEARCH)
        except UserError as error:  # such as a space that the command leaves nothing of
            logger.error("search: %s", error)
            failed.append(folder / SEARCH)
    if rank() == 0:
        measure_sizes(request, names, task, folder)
        try:
            write_case_study(report.entries(report.read_runs(folder)), task, folder)
        except Exception as error:  # it must not cost the others their report
            logger.error("case study: %s", error, exc_info=error)
            failed.append(folder / CASES)
    return failed


# --------------------------------------------------------------------------- latency and size


def measure_sizes(request: Request, names: tuple[str, ...], task: Task, folder: Path) -> None:
    """`latency_by_size.json`: p50, p95, p99 of one request in mock catalogues of growing size.

    Models are prepared but not trained, which changes what they answer and not how long it takes.
    Sizes are `full.sizes`, up to the first one whose preparation took over `full.size_seconds`.
    What another machine measured, or failed, is measured again.
    """
    path, here = folder / SIZES, _machine(request.config())
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    tasks: dict[int, Task] = {}
    for name in names:
        known = done.pop(name, [])
        if not known or known[0].get("machine") != here:
            known = _sizes_of(request.config(name), task, tasks, here)
        if known:
            done[name] = known
        write_json(path, done)


def _machine(config: Config) -> str:
    found = environment(pick_device(config.run.device), "off")
    return f"{machine_name(found)}, {found['threads']} threads"


def _sizes_of(
    config: Config, task: Task, tasks: dict[int, Task], here: str
) -> list[dict[str, Any]]:
    rows = []
    for size in sizes(config):
        try:
            if size not in tasks:
                tasks[size] = _mock_of_size(config, task, size)
            watch = Stopwatch()
            device = pick_device(config.run.device)
            seed_everything(config.run.seed)
            model = model_class(config.run.model)(config, tasks[size].dataset.catalogue).to(device)
            stage_one(model, tasks[size], config)
            prepared = watch.seconds
            users, histories = tasks[size].split.test.users, tasks[size].split.train_and_valid
            with torch.inference_mode():
                found = latencies(
                    model, histories, users, config, device, list_length(tasks[size]), 1
                )
        except Exception as error:  # one model must not cost the others their place
            logger.warning("%s with %d items: %s", config.run.model, size, error)
            break
        logger.info("%s, %d items: %.2f ms", config.run.model, size, 1000 * np.median(found))
        rows.append(
            {
                "model": config.run.model,
                "items": size,
                "prepare_seconds": prepared,
                "machine": here,
            }
            | latency_summary(found)
        )
        if prepared > config.full.size_seconds:
            break
    return rows


def sizes(config: Config) -> list[int]:
    """The numbers of `full.sizes`. Raises ConfigError for what is none."""
    try:
        found = sorted({int(part) for part in config.full.sizes.split(",") if part.strip()})
    except ValueError:
        raise ConfigError(
            f"full.sizes wants numbers with commas such as 500,2000, not '{config.full.sizes}'."
        ) from None
    if found and found[0] < _SMALLEST:
        raise ConfigError(f"full.sizes: {found[0]} items are too few, {_SMALLEST} the least.")
    return found


def _mock_of_size(config: Config, task: Task, size: int) -> Task:
    """A mock data set with the modalities of the real one, narrow where they are wide."""
    parts = task.dataset.catalogue.modalities
    dims = {name: min(part.features.shape[1], 64) for name, part in parts.items()}
    changed = {"n_users": 200, "n_items": size, "dims": dims or dict(config.mock.dims)}
    changed |= {"history_min": 8, "history_max": 30}
    own = type(config.mock)(**(vars(config.mock) | changed))
    plain = {"dataset": "mock", "min_rating": 0.0, "k_core": 0, "features": "auto"}
    data = type(config.data)(**(vars(config.data) | plain))
    return load_task(type(config)(**(vars(config) | {"mock": own, "data": data})))


def size_table(rows: list[dict[str, Any]]) -> Table:
    """Median latency by model (rows) and catalogue size (columns)."""
    frame = pd.DataFrame(rows).pivot(index="model", columns="items", values="p50_ms")
    order = [name for name in MODELS if name in frame.index]
    frame = frame.loc[order].rename(columns=str).reset_index()
    columns = [Column("model", "Model", "s")]
    columns += [Column(c, f"{int(c):,} items", ".2f", -1) for c in frame if c != "model"]
    note = (
        f"On {rows[0].get('machine', 'a machine without a name')}. "
        "Median ms of one request for the 10 best items (100 calls, fewer of slow models, one "
        "user, mock catalogues, models prepared but not trained, one run, so that differences "
        "below a factor of two say little); – not measured, as preparing a smaller catalogue took "
        "too long (full.size_seconds) or this size failed, which experiment.log tells; fastest "
        "bold, second underlined. Not a quality measurement: no split, masking or ties are "
        "involved."
    )
    return Table("latency_by_size", "Latency and catalogue size", note, columns, frame)


# --------------------------------------------------------------------------- report


def write_full(folder: Path, task: Task, latest: Path | None = None) -> list[Table]:
    """All tables and figures of all parts, and report.html and report.md around them."""
    baseline = results.write_baseline(folder, task, latest)
    if not baseline:
        return []
    ablations = results.write_ablation(folder, task, latest)
    asked = read_request(folder).models(tuple(MODELS))
    joint = mcrl.CHECKPOINTS.keys() <= set(asked)
    comparison = mcrl.write_comparison(folder, task, latest) if joint else []
    (folder / SEARCH).mkdir(exist_ok=True)
    search = write_hyper(folder / SEARCH, task, latest)
    rows = _size_rows(folder)
    speed = [size_table(rows)] if rows else []
    for table in speed:
        write_table(table, folder)
    if rows:
        plots.latency_curves(rows, folder / "latency_by_size")
    cases = case_tables(folder)
    by_name = {table.name: table for table in baseline}
    groups, ids = by_name["group_results"], by_name.get("id_quality")
    sections = [
        _how_it_was_made(folder),
        Section(
            "Comparison of models", [], [by_name["baseline_results"]],
            [(folder / "baseline_top10_metrics.png",
              "Test metrics; intervals are of each model alone, differences are in the table."),
             (folder / "learning_curves.png",
              "Valid NDCG@10 over epochs, first seed; orange: the one kept, grey: other models.")],
        ),
        Section("Groups of users", [], [groups]),
        Section("Ablations", [], ablations,
                [(folder / "ablation_bars.png", "What each ablation changes in NDCG@10.")]),
        Section("Contrastive learning (MCRL)", [], comparison,
                [(folder / "mcrl_losses.png", _LOSSES)]),
        Section("Search", [], search, _all(folder / SEARCH, "hyper_*.png", _TRIALS)),
        Section("Semantic IDs", [], [ids] if ids else [], _all(folder, "id_space_*.png", _SPACE)),
        Section("Modality weights", [], [], _all(folder, "modality_weights_*.png", _WEIGHTS)),
        Section("Drift of interest", [], [], _all(folder, "drift_timeline_*.png", _DRIFT)),
        Section("Efficiency", [], [by_name["efficiency"], *speed],
                [(folder / "latency_by_size.png", "Latency against catalogue size.")]),
        Section("Case study", [], cases),
    ]  # fmt: skip
    name = report.read_runs(folder)[0].result["dataset"]["name"]
    write_document(folder, f"Experiments on {name}", sections)
    return [*baseline, *ablations, *comparison, *search, *speed, *cases]


_TRIALS = (
    "Search, {} (history: valid NDCG@10 of the trials in turn; slices: against each setting; "
    "importance: how much of its variance a setting explains, fANOVA)."
)
_SPACE = (
    "{}: t-SNE of semantic IDs, distance = share of digits that differ; colours: categories (on "
    "mock the topic of the visual features only), grey: the rest. Where IDs are personal, on the "
    "right the part in the frame: of the items shown, the one whose IDs differ most from what the "
    "first user has, as users code it who weigh a modality most, two for each. Axes have "
    "no unit, maps of different models cannot be compared. First seed."
)
_LOSSES = (
    "Weighted parts of the loss of pmat_mcrl, first seed; every part has a scale of its own, none "
    "begins at 0."
)
_WEIGHTS = (
    "{}: modality weights of users, mean over items, first seed; whiskers up to 1.5 times the box, "
    "without outliers."
)
_DRIFT = (
    "{}: modality weights while users move on, first seed. Where drift was planted: means over "
    "users with 95 % intervals over them, far from the middle of fewer users, with longer "
    "histories. Elsewhere: of those with the longest histories, the users whose weights range most."
)


def _all(folder: Path, pattern: str, caption: str) -> list[tuple[Path, str]]:
    stem = pattern.split("*")[0]
    return [
        (p, caption.format(p.stem.removeprefix(stem).replace("_", " ")))
        for p in sorted(folder.glob(pattern))
    ]


def _size_rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / SIZES
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    return [row for rows in content.values() for row in rows]


def _how_it_was_made(folder: Path) -> Section:
    """Protocol, settings of the command, machine, and how to repeat it."""
    runs, stored = report.read_runs(folder), read_request(folder)
    unsaid = MAY_CHANGE - {"hyper.trials"}
    asked = {k: v for k, v in (stored.overlay | stored.flags).items() if k not in unsaid}
    for key in PATHS & asked.keys():  # a report goes to others: no path of this machine
        asked[key] = dataset_name(asked[key])
    first = runs[0].result["environment"]
    machines = dict.fromkeys(map(comparisons.machine, runs))
    failed = report.unfinished(folder)
    failed += [f"{SEARCH}/{name}" for name in report.unfinished(folder / SEARCH)]
    text = [
        report.protocol(runs),
        "Model selection on valid NDCG@10; tokenizers, graphs and statistics saw the train part "
        "only. Every number is measured by the runs in this folder.",
        "Settings of the command: " + (", ".join(f"{k}={v}" for k, v in asked.items()) or "none"),
        f"Machine: {'; also '.join(machines)} ({first['platform']}, Python {first['python']}, "
        f"torch {first['torch']}).",
        f"Rebuild tables and figures: python main.py --mode report --from results/{folder.name}",
    ]
    if failed:
        text.append(f"Not finished, so missing from the tables: {', '.join(failed)}.")
    return Section("How this was made", text)
