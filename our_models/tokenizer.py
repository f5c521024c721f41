"""The tokenizer of PMAT: latents of every modality, shared codes, and the atlas of personal codes.

DESIGN section 5.1 and 5.4. An item has `shared_digits` codes that are the same for everybody, from
all its modalities together, and `personal_digits` codes of a blend x(alpha) of its modalities.
Weights are resolved to a grid of G blends, so the codes of all items under all blends are one
static atlas [G, N, L_f], and decoding from it is exact. Modalities are those of the catalogue and,
with `pmat.with_behaviour`, one made of train histories.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import PMAT as PMATConfig
from config import Config
from model_parts.base import Recommender, TrainingData
from model_parts.cooccurrence import behaviour_vectors
from model_parts.fusion import even_weights, next_grid_points, simplex_grid
from model_parts.item_vectors import white_modality
from model_parts.quantisers import BlendQuantiser, ProductQuantiser, whitened_pca

# Items at most so many steps apart were taken together.
_WINDOW = 5
# Length of a behaviour vector, in units of the mean, of an item that met others by chance only.
_NEGLIGIBLE = 1e-3
# Blends at most, of which each has codes of all items.
_MOST_BLENDS = 2000


class PersonalTokenizer(Recommender):
    """Codes of all items under all blends of their modalities."""

    counts: Tensor  # [N] train interactions
    latents: Tensor  # [N, M, z] unit rows, zero where missing
    present: Tensor  # [N, M] bool
    grid: Tensor  # [G, M] blends
    corners: Tensor  # [M] blends of one modality alone
    towards: Tensor  # [M, G] the next blend with more of a modality; a corner keeps to itself
    shared_codes: Tensor  # [N, L_s]
    atlas: Tensor  # [G, N, L_f]; with late weights [M, N, L_f], each modality by itself

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__()
        self.own = own = config.pmat
        self.n_codes = own.codes
        n_items = config.n_items(catalogue)
        n_modalities = config.n_modalities(catalogue) + own.with_behaviour
        if own.shared_digits > n_modalities * own.latent:
            raise ValueError(
                f"pmat.shared_digits={own.shared_digits} is more than the {n_modalities} x "
                f"{own.latent} numbers they cut up (modalities x pmat.latent)"
            )
        grid = grid_of_blends(n_modalities, own)
        if own.personalised == "none":  # even, though thirds are no multiples of a half
            if own.grid < min(n_modalities, 2):
                raise ValueError("pmat.personalised=none needs pmat.grid=2 or more")
            grid[0] = 1 / n_modalities
        self.register_buffer("grid", grid)
        self.register_buffer("corners", grid.argmax(0))
        self.register_buffer("towards", next_grid_points(grid), persistent=False)
        self.register_buffer("counts", torch.ones(n_items))
        self.register_buffer("latents", torch.zeros(n_items, n_modalities, own.latent))
        self.register_buffer("present", torch.ones(n_items, n_modalities, dtype=torch.bool))
        self.register_buffer("shared_codes", torch.zeros(n_items, own.shared_digits).long())
        # with late weights a modality has digits and codebooks of its own, no more digits in all
        if own.fusion == "late":
            digits = largest_divisor(own.latent, max(own.personal_digits // n_modalities, 1))
            self.n_digits = own.shared_digits + n_modalities * digits
            self.register_buffer("atlas", torch.zeros(n_modalities, n_items, digits).long())
            self.quantisers = nn.ModuleList(
                BlendQuantiser(1, own.latent, digits, own.codes) for _ in range(n_modalities)
            )
        else:
            digits = digits_of_blends(own)
            self.n_digits = own.shared_digits + digits
            self.register_buffer("atlas", torch.zeros(len(grid), n_items, digits).long())
            self.quantiser = BlendQuantiser(n_modalities, own.latent, digits, own.codes)
        width = n_modalities * own.latent // max(own.shared_digits, 1) * own.shared_digits
        self.shared_quantiser = ProductQuantiser(width, max(own.shared_digits, 1), own.codes)

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Latents, shared codes and atlas. Fitted on items that occur in train; all are encoded.

        Raises ValueError without features.
        """
        self.counts.copy_(data.counts)
        self.learn_latents(data, generator)
        self.fit_codes(generator)

    def learn_latents(self, data: TrainingData, generator: torch.Generator) -> None:
        """Fill `latents` and `present`. Raises ValueError without features."""
        in_train = (self.counts > 0).cpu()  # features are made where they were read
        latents, present = item_latents(data, in_train, self.own, generator)
        self.latents.copy_(latents)
        self.present.copy_(present)

    @property
    def traits(self) -> Tensor:
        """What modality weights look at, [N, M, z]: here what IDs are made of."""
        return self.latents

    def fit_codes(self, generator: torch.Generator) -> None:
        """Codebooks, made for the blends in use, and codes of the latents as they are."""
        in_train = self.counts > 0
        if self.own.shared_digits:
            width = len(self.shared_quantiser.mean)
            together = whitened_pca(self.latents.flatten(1), in_train, width)
            together = F.pad(together, (0, width - together.shape[1]))
            self.shared_quantiser.fit(together[in_train], generator)
            self.shared_codes.copy_(self.shared_quantiser.encode(together))
        if self.own.fusion == "late":
            self._fit_by_modality(in_train, generator)
            return
        fitted = self.latents[in_train]
        in_use = 1 if self.own.personalised == "none" else len(self.grid)
        points = torch.randint(in_use, (4, len(fitted)), generator=generator)
        blends = (self.grid[points][..., None] * fitted).flatten(0, 1)  # [4 N, M, z]
        blends = blends[blends.flatten(1).norm(dim=1) > 0]  # all weight on a missing modality
        self.quantiser.fit(blends, generator)
        self.atlas.copy_(self.quantiser.atlas(self.latents, self.grid))

    def _fit_by_modality(self, in_train: Tensor, generator: torch.Generator) -> None:
        whole = self.grid.new_ones(1, 1)
        for m, quantiser in enumerate(self.quantisers):
            latents = self.latents[:, m : m + 1]
            known = in_train & self.present[:, m]
            quantiser.fit(latents[known if known.any() else in_train], generator)
            self.atlas[m] = quantiser.atlas(latents, whole)[0]

    def ids(self, points: Tensor, rows: Tensor) -> Tensor:
        """Codes of items under blends, both [P] -> [P, L_s + L_f]."""
        return torch.cat([self.shared_codes[rows], self.atlas[points, rows]], dim=1)

    def common_ids(self) -> Tensor:
        """Codes of all items for nobody in particular, [N, L]: under exactly even weights, which
        need not be on the grid; with late weights the digits of all modalities."""
        if self.own.fusion == "late":
            return torch.cat([self.shared_codes, *self.atlas], dim=1)
        personal = self.quantiser.atlas(self.latents, even_weights(self.grid))[0]
        return torch.cat([self.shared_codes, personal], dim=1)

    def describe(self) -> dict[str, Any]:
        """Adds the number of blends and the digits of an ID."""
        return super().describe() | {"blends": len(self.grid), "digits": self.n_digits}


def grid_of_blends(n_modalities: int, own: PMATConfig) -> Tensor:
    """Blends of modalities with steps of 1 / pmat.grid, [G, M].

    Raises ValueError where they are too many for codes of all items under each of them.
    """
    count = math.comb(own.grid + n_modalities - 1, n_modalities - 1)
    if count > _MOST_BLENDS:
        raise ValueError(
            f"pmat.grid={own.grid} gives {count:,} blends of {n_modalities} modalities, and all "
            f"items have codes under each; set it so low that there are {_MOST_BLENDS:,} at most"
        )
    return simplex_grid(n_modalities, own.grid)


def item_latents(
    data: TrainingData, in_train: Tensor, own: PMATConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Latents [N, M, z] and presence [N, M] of the catalogue's modalities, and of behaviour.

    Raises ValueError without features.
    """
    latents, present = whitened_latents(
        data.catalogue, in_train, own.latent, generator, own.explained
    )
    if own.with_behaviour:
        vectors, known = behaviour_vectors(data.train, data.n_items, own.latent, _WINDOW, generator)
        known = known & (vectors.norm(dim=1) > _NEGLIGIBLE)  # the rest is rounding noise
        turned = F.normalize(vectors, dim=1) @ random_rotation(own.latent, generator)
        latents = torch.cat([latents, (turned * known[:, None])[:, None]], dim=1)
        present = torch.cat([present, known[:, None]], dim=1)
    return latents, present


def whitened_latents(
    catalogue: Any,
    in_train: Tensor,
    width: int,
    generator: torch.Generator,
    explained: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Unit latents of each modality [N, M, width], zero where missing, and presence [N, M].

    Raises ValueError for a catalogue without features.
    """
    modalities = getattr(catalogue, "modalities", None) or {}
    if not modalities:
        raise ValueError("PMAT needs item features (text.npy, visual.npy, ...) to make IDs of.")
    latents, present = [], []
    for name, (features, known) in modalities.items():
        known = torch.tensor(known, dtype=torch.bool)
        features = torch.tensor(features, dtype=torch.float32)
        white = white_modality(name, features, in_train & known, width, explained)
        white = F.pad(white, (0, width - white.shape[1]))
        # a random rotation spreads the principal components evenly over sub-vectors
        turned = white @ random_rotation(width, generator)
        latents.append(F.normalize(turned, dim=1) * known[:, None])
        present.append(known)
    return torch.stack(latents, dim=1), torch.stack(present, dim=1)


def digits_of_blends(own: PMATConfig) -> int:
    """Digits of a blend. Raises ValueError where it cannot be cut into so many."""
    if own.latent % own.personal_digits:
        raise ValueError(
            f"pmat.latent={own.latent} is no multiple of pmat.personal_digits={own.personal_digits}"
        )
    return own.personal_digits


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)


def random_rotation(width: int, generator: torch.Generator) -> Tensor:
    """An orthogonal matrix [width, width]."""
    return torch.linalg.qr(torch.randn(width, width, generator=generator))[0]
