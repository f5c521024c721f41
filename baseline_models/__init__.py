"""Baselines by name; each file is imported on use, so one broken model cannot stop the others."""

from __future__ import annotations

import importlib
from typing import Any

MODELS = {
    "popularity": "baseline_models.popularity:Popularity",
    "sasrec": "baseline_models.sasrec:SASRec",
    "bsarec": "baseline_models.bsarec:BSARec",
    "rpg": "baseline_models.rpg:RPG",
    "tiger": "baseline_models.tiger:TIGER",
    "letter": "baseline_models.letter:LETTER",
    "cofirec": "baseline_models.cofirec:CoFiRec",
    "fusid": "baseline_models.fusid:FusID",
    "mmq": "baseline_models.mmq:MMQ",
    "pctx": "baseline_models.pctx:Pctx",
}
_BY_CLASS = {target.split(":")[1]: target for target in MODELS.values()}


def __getattr__(name: str) -> Any:
    """`from baseline_models import RPG` imports that model's file only."""
    if name not in _BY_CLASS:
        raise AttributeError(f"baseline_models has no {name}; it has {', '.join(_BY_CLASS)}")
    module, _, class_name = _BY_CLASS[name].partition(":")
    return getattr(importlib.import_module(module), class_name)
