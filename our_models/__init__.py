"""Our models by name; each file is imported on use."""

from __future__ import annotations

MODELS = {
    "pmat": "our_models.pmat:PMAT",
    "mcrl": "our_models.mcrl:MCRL",
    "pmat_mcrl": "our_models.mcrl:PMATWithMCRL",
}
