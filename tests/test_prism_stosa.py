"""The battery of every model for PRISM on its other host, which MODELS does not list."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import test_every_model as battery

from config import Config

fitted, planted = battery.fitted, battery.planted  # they build with the `tiny` below


@pytest.fixture(scope="session")
def tiny(tiny) -> Callable[..., Config]:
    def make(
        model: str = "prism", settings: dict[str, Any] | None = None, dropout: bool = True
    ) -> Config:
        return tiny(model, {"prism.host": "stosa"} | (settings or {}), dropout)

    return make


def checks() -> list[Any]:
    """All tests of the battery, with their marks but for the list of models."""
    return [
        pytest.param(check, id=name, marks=[m for m in check.pytestmark if m.name != "parametrize"])
        for name, check in vars(battery).items()
        if name.startswith("test_")
    ]


@pytest.mark.parametrize("check", checks())
def test_stosa_holds_too(check, request):
    wanted = set(inspect.signature(check).parameters) - {"name"}
    check("prism", **{fixture: request.getfixturevalue(fixture) for fixture in wanted})
