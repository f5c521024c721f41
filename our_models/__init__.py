"""Our models by name; each file is imported on use."""

from __future__ import annotations

MODELS = {
    "pmat": "our_models.pmat:PMAT",
}
