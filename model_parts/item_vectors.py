"""Features of items as one matrix: what tokenizers are fitted on.

    modalities = chosen_modalities(catalogue, "all", "TIGER", "tiger.tokenizer=random")
    vectors, known = item_vectors(modalities, fit_rows, width, whiten=False)

Statistics come from the rows in `fit_rows` (items of the train part) only; all are transformed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model_parts.quantisers import whitened_pca


def chosen_modalities(
    catalogue: Any, features: str, model: str, way_out: str = ""
) -> dict[str, tuple[Tensor, Tensor]]:
    """Name -> (features [N, d_m], present [N]): the text, or all modalities (also without text).

    Raises ValueError for a catalogue without features; `way_out` is a setting that needs none.
    """
    modalities = getattr(catalogue, "modalities", None) or {}
    if not modalities:
        random = f", or use random codes with --set {way_out}" if way_out else ""
        raise ValueError(
            f"{model} needs item features to build semantic IDs and this data set has none: add a "
            f"feature file such as text.npy{random}."
        )
    if features == "text" and "text" in modalities:
        modalities = {"text": modalities["text"]}
    return {
        name: (torch.tensor(matrix, dtype=torch.float32), torch.tensor(has, dtype=torch.bool))
        for name, (matrix, has) in modalities.items()
    }


def rows_in_train(train: Any, n_items: int) -> Tensor:
    """[N] bool, items that the train part contains."""
    found = torch.zeros(n_items, dtype=torch.bool)
    found[torch.tensor(train.items, dtype=torch.long) - 1] = True
    return found


def item_vectors(
    modalities: dict[str, tuple[Tensor, Tensor]], fit_rows: Tensor, width: int, whiten: bool
) -> tuple[Tensor, Tensor]:
    """Principal components of each modality side by side [N, d], and which items have any [N].

    At most `width` components a modality (0: 512 of wide features, else 128). Whitened, all
    components have variance 1; otherwise those of a modality keep their proportions and have
    variance 1 on average, so that coarse differences come first. Missing parts are zero.
    """
    parts = []
    for name, (features, has) in modalities.items():
        kept = width or _usual_width(features.shape[1])
        white = white_modality(name, features, has & fit_rows, kept)
        parts.append(
            (white if whiten else _recoloured(features, white, has & fit_rows)) * has[:, None]
        )
    return torch.cat(parts, dim=1), torch.stack([has for _, has in modalities.values()]).any(0)


def white_modality(
    name: str, features: Tensor, fit_rows: Tensor, width: int, explained: float = 1.0
) -> Tensor:
    """`quantisers.whitened_pca`; its ValueError names the modality."""
    try:
        return whitened_pca(features, fit_rows, width, explained)
    except ValueError as error:
        raise ValueError(
            f"features '{name}': {error}; take the file out, or mend it and run again."
        ) from None


def _recoloured(features: Tensor, white: Tensor, fit_rows: Tensor) -> Tensor:
    """White components [N, p] with their proportions restored, mean variance 1."""
    centred = features[fit_rows] - features[fit_rows].mean(0)
    # a component's scale is that of its projection: white^T centred has rows scale * axis
    scales = torch.linalg.vector_norm(white[fit_rows].T @ centred, dim=1)
    return white * (scales / scales.square().mean().sqrt())


def _usual_width(width: int) -> int:
    """RPG's choice: 512 of 3072-d OpenAI embeddings, 128 of 768-d sentence-T5."""
    return 512 if width > 1024 else 128
