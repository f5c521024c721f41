"""Mode `theory`: bounds of theory_analysis.md beside what they bound.

On random instances and on a PMAT (theorem 5: a PMAT with MCRL) trained for a few epochs; section 7
says which parts have a check. Writes `theory.json` with all numbers, and a figure for each theorem.
A violated bound makes the mode fail.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from config import Config
from experiments import bounds, bounds_learning, bounds_retrieval, bounds_updates, theory_plots
from experiments.modes import Request, announce, finish, open_folder, run_once
from experiments.runs import Task, load_model, load_task
from experiments.theory_levels import levels
from experiments.theory_model import (
    Trained,
    array,
    discrimination,
    discrimination_inputs,
    drift_of_ids,
    even_weights,
    prefix_losses,
    retrieval,
)
from experiments.theory_random import Checks, alignment, random_checks
from experiments.theory_server import Followed, consistency, dial, follow, updates
from our_models.mcrl import PMATWithMCRL
from our_models.pmat import PMAT
from util import UserError, rank, say, write_json

LEGEND = """
< measured is at most the bound, > at least, = equal to it (shares of a sample within four standard
errors); says: share of instances on which the bound beats the trivial one; tight: the smaller mean
over the larger (near 0 a check has little power: what is measured could be much worse and still be
allowed)."""

THEORY = "theory.json"
TITLES = {
    1: "semantic drift",
    2: "update stability",
    3: "consistency",
    4: "discriminability",
    5: "multi-task synergy",
    6: "retrieval complexity",
}
_MARGINS = np.array([0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.2])
_COSINES = np.array([0.0, 0.25, 0.5, 0.75, 0.9, 0.97, 0.99])
_STEPS = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.4])
_CATALOGUES = (1_000, 3_000, 10_000, 30_000, 100_000)


def run_theory(request: Request) -> int:
    """Train both models shortly, check all bounds; returns the number of violated bounds.

    Raises UserError for settings that the theorems say nothing about.
    """
    config = request.config(PMAT.name)
    _refuse(request, config)
    task = load_task(config)
    if len(task.dataset.catalogue.modalities) < 2:
        raise UserError("--mode theory is about blends: the data need at least two modalities.")
    announce(config)
    with open_folder(request, config) as folder:
        places = [folder / model.name for model in (PMAT, PMATWithMCRL)]
        for place in places:
            run_once(request.config(place.name), config.run.seed, task, place, isolate=False)
        violated = _conclude(folder, places, task, config) if rank() == 0 else 0
        if rank() == 0:
            finish(folder, [])
    return violated


def _refuse(request: Request, config: Config) -> None:
    asked = (request.overlay | request.flags).get("run.model", PMAT.name)
    if asked != PMAT.name:
        raise UserError(
            f"--mode theory trains {PMAT.name} and {PMATWithMCRL.name}; leave --model out."
        )
    if config.pmat.fusion != "early":
        raise UserError("--mode theory: with pmat.fusion=late codes do not depend on users.")
    if config.pmat.personalised in ("none", "random"):
        raise UserError(
            f"--mode theory: pmat.personalised={config.pmat.personalised} has no attention to "
            "speak about; choose user_item, user or item."
        )
    if config.pmat.temperature or config.pmat.beta:
        raise UserError(
            "--mode theory: theorems 3, 4 and 6 are about scores that are sums over digits; leave "
            "pmat.temperature and pmat.beta at 0."
        )


def _conclude(folder: Path, places: list[Path], task: Task, config: Config) -> int:
    streams = [np.random.default_rng([config.run.seed, part]) for part in range(4)]
    model, joint = (load_model(place, task.dataset.catalogue)[0] for place in places)
    assert isinstance(model, PMAT) and isinstance(joint, PMATWithMCRL)
    train, window = task.split.train, config.data.max_history
    on_random = random_checks(streams[0])
    try:
        seen = Trained(model, train, window, streams[1])
        users = Followed(seen, streams[1])
        pulled, pulls = levels(joint, train, window, streams[2])
    except ValueError as error:
        raise UserError(f"--mode theory: {error}.") from error
    on_model = {
        1: drift_of_ids(seen, streams[1]),
        2: updates(users),
        3: consistency(users, streams[1]),
        4: discrimination(seen),
        5: pulled,
        6: retrieval(seen, streams[1]),
    }
    content = {
        "dataset": task.dataset.name,
        "random instances": _summaries(on_random),
        "trained model": _summaries(on_model),
        "curves": _curves(seen, users, pulls, streams[3]),
    }
    write_json(folder / THEORY, content)
    write_json(Path(config.run.save_dir) / THEORY, content)
    theory_plots.all_figures(content["curves"], folder)
    return _print(content)


def _summaries(checks: Checks) -> dict[str, dict[str, Any]]:
    return {
        f"theorem {number}": {check.name: check.summary() for check in checks[number]}
        for number in sorted(checks)
    }


def _print(content: dict[str, Any]) -> int:
    """The table of bounds; returns how many are violated."""
    violated = 0
    for place in ("random instances", "trained model"):
        say(f"\n{place}, means over instances")
        say(f"{'':54}{'bound':>12}{'measured':>12}{'trivial':>12}{'tight':>7}{'says':>6}")
        for number, (theorem, checks) in enumerate(content[place].items(), start=1):
            say(f"{theorem}: {TITLES[number]}")
            for name, found in checks.items():
                sign = {"lower": ">", "upper": "<", "equal": "="}[found["kind"]]
                values = (_number(found[column]) for column in ("bound", "measured", "trivial"))
                bad = f"  VIOLATED {found['violations']} times" if found["violations"] else ""
                violated += bool(bad)
                columns = "".join(f"{value:>12}" for value in values)
                say(
                    f"  {name:50} {sign}{columns} {found['tightness']:6.2f}"
                    f" {found['informative']:5.0%}{bad}"
                )
    say(LEGEND)
    return violated


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1e5 else f"{value:.5g}"


# --------------------------------------------------------------------------- curves of the figures


def _curves(
    seen: Trained, users: Followed, pulls: dict[str, Any], rng: np.random.Generator
) -> dict[str, Any]:
    return {
        "1": _drift_curves(seen, rng),
        "2": _update_curves(seen, users),
        "3": {"p_values": np.sort(users.p_values).tolist()},
        "4": _code_curves(seen),
        "5": {"alignment": alignment(rng, _COSINES), "levels": pulls},
        "6": _retrieval_curves(seen, rng),
    } | {"dial": dial(users, _MARGINS)}


def _drift_curves(seen: Trained, rng: np.random.Generator) -> dict[str, Any]:
    checks = {check.name: check for check in drift_of_ids(seen, rng)}
    distance = checks["fused vectors as far apart as weights"].measured.ravel()
    differ = checks["digits that differ, by margins"]
    order = np.argsort(distance)
    groups = np.array_split(order, 12)
    binned = [
        [x.ravel()[g].mean() for g in groups] for x in (distance, differ.measured, differ.bound)
    ]
    modalities = seen.weights.shape[-1]
    starts = rng.dirichlet(np.ones(modalities), 20)
    unit = np.array([1.0, -1.0] + [0.0] * (modalities - 2)) / np.sqrt(2)
    n_codes = seen.model.own.codes
    places = [bounds.crossings(seen.atlas, seen.r, n_codes, starts, s * unit)[0] for s in _STEPS]
    return {
        "pairs": dict(zip(("distance", "differ", "bound"), binned, strict=True)),
        "places": {
            "step": _STEPS.tolist(),
            "differ": [check.measured.mean() for check in places],
            "bound": [check.bound.mean() for check in places],
        },
    }


def _update_curves(seen: Trained, users: Followed, rate: float = 0.3) -> dict[str, Any]:
    """One item of one user on two servers, the second of which starts with even weights."""
    even = even_weights(array(seen.model.present))
    ours, other = (
        follow(seen, users.histories[0], rate, 0.0, start=start).weights[:, 0]
        for start in (None, even)
    )
    pair = bounds_updates.contraction(ours, other, rate)
    tracked = bounds_updates.tracking(other, users.targets[0][:, 0], rate)
    return {
        "contraction": {"measured": pair.measured.tolist(), "bound": pair.bound.tolist()},
        "tracking": {"measured": tracked.measured.tolist(), "bound": tracked.bound.tolist()},
    }


def _code_curves(seen: Trained, temperature: float = 0.05) -> dict[str, Any]:
    cosines = discrimination_inputs(seen)[0]
    own = np.arange(len(cosines))
    nearest, _ = bounds_learning.separation(cosines, own, temperature)
    losses = bounds_learning.info_nce(cosines, own, temperature)
    prefixes = prefix_losses(seen)
    return {
        "prefix": {
            "loss": [check.measured.mean() for check in prefixes],
            "bound": [check.bound.mean() for check in prefixes],
        },
        "margin": {
            "loss": losses.tolist(),
            "measured": nearest.measured.tolist(),
            "bound": nearest.bound.tolist(),
        },
    }


def _retrieval_curves(seen: Trained, rng: np.random.Generator) -> dict[str, Any]:
    own, n_modalities = seen.model.own, seen.present.shape[1]
    blends = len(seen.model.grid)
    digits = own.shared_digits + own.personal_digits
    times = [
        latency(n, digits, own.codes, own.width, n_modalities, blends, own.attention, rng)
        for n in _CATALOGUES
    ]
    sizes = [
        bounds_retrieval.memory(
            n, own.shared_digits, own.personal_digits, own.codes, own.width, blends, n_modalities,
            own.latent,
        )
        for n in _CATALOGUES
    ]  # fmt: skip
    counts = [
        bounds_retrieval.work(
            n,
            digits,
            own.codes,
            own.width,
            blends,
            n_modalities,
            own.attention,
            own.personal_digits,
        )
        for n in _CATALOGUES
    ]
    ways = ("dense", "table", "atlas")
    return {
        "items": list(_CATALOGUES),
        "milliseconds": {way: [time[way] for time in times] for way in ways},
        "operations": {way: [count[way] for count in counts] for way in (*ways, "no atlas")},
        "bytes": {name: [size[name] for size in sizes] for name in sizes[0]},
    }


@torch.no_grad()
def latency(
    n: int, digits: int, codes: int, width: int, modalities: int, blends: int, attention: int,
    rng: np.random.Generator, repeats: int = 15,
) -> dict[str, float]:  # fmt: skip
    """Milliseconds of one request for n items with random codes, best of `repeats`."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, np.float32))

    items, words, state = draw(n, width), draw(digits * codes, width), draw(width)
    keys, query = draw(n, modalities * attention), draw(modalities, attention)
    grid = draw(blends, modalities)
    tokens = torch.from_numpy(rng.integers(digits * codes, size=(n, digits)))
    atlas = torch.from_numpy(rng.integers(digits * codes, size=(blends, n, digits)))
    rows = torch.arange(n)

    def table(look_up: torch.Tensor) -> torch.Tensor:
        return F.embedding_bag(look_up, (words @ state)[:, None], mode="sum")

    def by_atlas() -> torch.Tensor:
        logits = (keys.view(n, modalities, attention) * query).sum(2)
        points = (torch.softmax(logits, 1) @ grid.T).argmax(1)
        return table(atlas[points, rows])

    ways = {"dense": lambda: items @ state, "table": lambda: table(tokens), "atlas": by_atlas}
    found = {}
    for name, way in ways.items():
        seconds = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            way()
            seconds.append(time.perf_counter() - begin)
        found[name] = 1000 * min(seconds[1:])
    return found
