"""TIGER: an encoder-decoder writes the semantic ID of the next item, digit by digit.

Paper: Rajput et al., Recommender Systems with Generative Retrieval, NeurIPS 2023 (arXiv
2305.05065); there is no official code. Reproduced: residual codes of item features from coarse to
fine, an extra digit that tells items with equal codes apart; T5 from scratch on the tokens of the
newest 20 items, one example for every prefix, token cross-entropy; beam search. Default: residual
k-means instead of the paper's RQ-VAE (`tokenizer=rqvae`), which reached more in independent re-runs
(RecBoard, 5 seeds: R@10 .0698 against .0669) and takes seconds; random codes are the paper's own
control. Size at the paper's setting: 4,590,976 parameters (derived; the paper says about 13 M for
the same sizes, which nobody could reproduce).
Differs: beams only continue to IDs that exist (GRID found .0597 constrained, .0609 free); a digit
is predicted among its own codes, in the presets among those with which an ID that exists can go on
(`among`, model_parts/generative.py), and no end token is written, since all IDs are equally long;
no user token by default (`user_tokens=2000` as in the paper; GRID found none to be best); the
RQ-VAE is trained for a number of steps on standardised components with AdamW, codebooks are fitted
anew every 50 of them (with the paper's Adagrad on raw unit vectors it collapsed in re-runs); items
without features get random codes.
Checked against: Beauty R@10 .0648 / N@10 .0384 (paper), .0698 / .0385 (RecBoard, residual k-means);
seen items not masked.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from model_parts.base import Batch, TrainingData
from model_parts.generative import Seq2SeqRecommender
from model_parts.item_vectors import chosen_modalities, item_vectors, rows_in_train
from model_parts.residual import RQVAE, ResidualQuantiser, train_autoencoder, with_collision_digit


class TIGER(Seq2SeqRecommender):
    """Residual codes of item features, and T5."""

    name = "tiger"
    ablations = {
        "digits among all codes": {"tiger.among": "all"},
        "random codes": {"tiger.tokenizer": "random"},
        "RQ-VAE codes": {"tiger.tokenizer": "rqvae"},
        "user tokens": {"tiger.user_tokens": 2000},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "tiger.dropout": [0.1, 0.2, 0.3],
        "tiger.digits": [2, 3, 4],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own = config.tiger
        # users hash to tokens of their own; without, all share the last row, which ends a history
        special = 1 + (own.user_tokens if own.user_tokens > 1 else 0)
        super().__init__(config.n_items(catalogue), own, own.digits + 1, special)

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Codes of all items; nothing is fitted on items that train does not contain."""
        shape = (data.n_items, self.own.digits)
        codes = torch.randint(self.n_codes, shape, generator=generator)
        if self.own.tokenizer != "random":
            modalities = chosen_modalities(
                data.catalogue, self.own.features, "TIGER", "tiger.tokenizer=random"
            )
            in_train = rows_in_train(data.train, data.n_items)
            vectors, known = item_vectors(modalities, in_train, 0, whiten=False)
            codes[known] = self._quantise(vectors, in_train & known, generator)[known]
        self.set_codes(with_collision_digit(codes, self.n_codes), data.counts)

    def _quantise(self, vectors: Tensor, fit_rows: Tensor, generator: torch.Generator) -> Tensor:
        """Vectors [N, d] -> codes [N, digits]."""
        own, width = self.own, vectors.shape[1]
        if own.tokenizer == "kmeans":
            quantiser = ResidualQuantiser(width, own.digits, own.codes)
            return quantiser.fit(vectors[fit_rows], generator).encode(vectors)
        model = RQVAE(width, own.latent, own.digits, own.codes, own.hidden, own.depth, generator)
        train_autoencoder(model, vectors[fit_rows], generator, own.tokenizer_steps)
        return model.encode(vectors)

    def history_rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """With user tokens, that of the user comes first."""
        rows, present = super().history_rows(batch)
        if self.own.user_tokens > 1:
            first = self.digits * self.n_codes + 1
            user = first + batch.users % self.own.user_tokens
            rows = torch.cat([user[:, None], rows], dim=1)
            present = F.pad(present, (1, 0), value=True)
        return rows, present
