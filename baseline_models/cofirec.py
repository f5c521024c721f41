"""CoFiRec: one token for each level of what is known of an item, from coarse to fine.

Paper: Wei et al., CoFiRec: Coarse-to-Fine Tokenization for Generative Recommendation (arXiv
2511.22707); only its abstract, summaries and a re-run could be read. Reproduced: an ID is a fixed
sequence of semantic levels, category, title, description, each quantised by a VQ codebook of its
own, and a collaborative token at last; the generator writes it from coarse to fine, with LETTER's
ranking-guided loss.
Levels here are the modalities that the data have: `category` first, then `text`, then the others
in the order of the catalogue (pictures and sound say more than words), at last the collaborative
token, made of co-occurrence in train (the paper takes the vectors of a trained CF model).
`order=fine` turns the levels round. A modality that an item lacks is the zero vector, so that all
such items share a code; an item without any feature gets random ones.
Differs: a digit that tells items with equal codes apart comes after all levels (independent levels
collide more than residual ones); a VQ is a VQ-VAE of a number of steps, its codebook fitted anew
every 50 of them. Generator: see tiger.py.
Checked against: Beauty R@10 .0627 / N@10 .0321 (a re-run with 30 beams; the paper's own table could
not be obtained); seen items not masked.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from config import Config
from model_parts.base import TrainingData
from model_parts.cooccurrence import behaviour_vectors
from model_parts.generative import Seq2SeqRecommender
from model_parts.item_vectors import chosen_modalities, item_vectors, rows_in_train
from model_parts.residual import RQVAE, train_autoencoder, with_collision_digit

_FIRST = ("category", "text")


class CoFiRec(Seq2SeqRecommender):
    """Independent codebooks of ordered levels, and T5."""

    name = "cofirec"
    ablations = {
        "digits among all codes": {"cofirec.among": "all"},
        "no collaborative token": {"cofirec.collaborative": False},
        "fine to coarse": {"cofirec.order": "fine"},
        "plain loss": {"cofirec.temperature": 1.0},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "cofirec.codes": [32, 64, 128, 256, 512],
        "cofirec.temperature": [0.7, 0.8, 0.9, 1.0],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own = config.cofirec
        levels = config.n_modalities(catalogue) + own.collaborative
        super().__init__(config.n_items(catalogue), own, levels + 1)  # the last: collisions
        self.temperature = own.temperature

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Quantise every level by itself; nothing is fitted on items outside train."""
        modalities = chosen_modalities(data.catalogue, "all", "CoFiRec")
        in_train = rows_in_train(data.train, data.n_items)
        codes, known = [], torch.zeros(data.n_items, dtype=torch.bool)
        for name in coarse_to_fine(modalities):
            vectors, has = item_vectors({name: modalities[name]}, in_train, 0, whiten=False)
            codes.append(self._quantise(vectors, in_train & has, generator))
            known |= has
        random = torch.randint(self.n_codes, (len(codes), data.n_items), generator=generator)
        levels = torch.where(known, torch.stack(codes), random)
        if self.own.collaborative:
            behaviour = behaviour_vectors(
                data.train, data.n_items, self.own.behaviour, self.own.window, generator
            )
            levels = torch.cat([levels, self._collaborative(*behaviour, generator)[None]])
        if self.own.order == "fine":
            levels = levels.flip(0)
        self.set_codes(with_collision_digit(levels.T, self.n_codes), data.counts)

    def _collaborative(self, vectors: Tensor, met: Tensor, generator: torch.Generator) -> Tensor:
        """The last level [N]; random where no two items were ever met together."""
        if not met.any():
            return torch.randint(self.n_codes, (len(vectors),), generator=generator)
        return self._quantise(vectors, met, generator)

    def _quantise(self, vectors: Tensor, fit_rows: Tensor, generator: torch.Generator) -> Tensor:
        """Vectors [N, d] -> codes [N] of a codebook trained on the rows in `fit_rows` [N]."""
        own = self.own
        model = RQVAE(vectors.shape[1], own.latent, 1, own.codes, own.hidden, own.depth, generator)
        train_autoencoder(model, vectors[fit_rows], generator, own.tokenizer_steps)
        return model.encode(vectors)[:, 0]


def coarse_to_fine(names: Any) -> list[str]:
    """Names of modalities: category, text, then the others as they come."""
    first = [name for name in _FIRST if name in names]
    return first + [name for name in names if name not in first]
