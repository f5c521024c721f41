"""RPG: long unordered semantic IDs, all digits predicted in parallel from one state.

Paper: Hou et al., Generating Long Semantic IDs in Parallel for Recommendation, KDD 2025
(arXiv 2506.05781). Reproduced: whitened PCA of text features and OPQ fitted on train items only; an
item enters as the mean of its m token embeddings; GPT-2 blocks with learned positions; one head a
digit, g_j(s) = s + SiLU(W_j s + b_j) with W_j = 0 at first; cosine logits over temperature against
the tied token rows; cross-entropy averaged over positions and digits; exact scores of all items, or
the walk on the item graph. Size at the paper's setting (m 32, d 448): 13,581,824 parameters.
Differs: PCA too is fitted on train items; k-means restarts empty clusters, where faiss splits large
ones; an item without text gets random codes, since the mean vector would give all of them one ID;
an item is always its own neighbour in the graph; the walk starts from the same random items for
every user; scores cover the last candidates of the walk and not only its beam. Long histories: the
loop cuts the windows, see experiments. No item id is treated as an end of sequence (the official
evaluator loses one item that way).
Checked against: Beauty R@10 .0757 / N@10 .0436 with sentence-T5 features (ACERec's re-run), .0787 /
.0452 with the authors' OpenAI features and exact scoring; seen items not masked in either.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from model_parts.base import Batch, TrainingData
from model_parts.decoding import graph_walk, similarity_graph
from model_parts.item_vectors import chosen_modalities, item_vectors, rows_in_train
from model_parts.parallel import ParallelRecommender
from model_parts.quantisers import ProductQuantiser, projected_codewords

_WALK_SEED = 2024
# Of token vectors that start as codewords: so long that the first, noisy steps do not undo them.
_CODEWORD_STD = 0.3


class RPG(ParallelRecommender):
    """Semantic IDs from text, a causal Transformer on them, m digit heads on top."""

    name = "rpg"
    ablations = {"random codes": {"rpg.tokenizer": "random"}}
    search_space = {
        "train.lr": (1e-3, 1e-2, "log"),
        "rpg.temperature": [0.03, 0.05, 0.07],
        "rpg.digits": [8, 16, 32, 64],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own = config.rpg
        super().__init__(config.n_items(catalogue), own, own.digits, config.data.max_history)
        self._graph: Tensor | None = None
        self.register_load_state_dict_post_hook(lambda model, _: model.forget_graph())

    # ----------------------------------------------------------------- tokenizer

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Give every item its codes; nothing is fitted on items that train does not contain."""
        shape = (data.n_items, self.own.digits)
        codes = torch.randint(self.own.codes, shape, generator=generator)
        if self.own.tokenizer == "opq":
            in_train = rows_in_train(data.train, data.n_items)
            modalities = chosen_modalities(
                data.catalogue, self.own.features, "RPG", "rpg.tokenizer=random"
            )
            white, present = item_vectors(modalities, in_train, self.own.pca, whiten=True)
            codes[present] = self._quantise(white, in_train & present, generator)[present]
        self.codes.copy_(codes)
        self.forget_graph()

    def _quantise(self, white: Tensor, fit_rows: Tensor, generator: torch.Generator) -> Tensor:
        """White vectors [N, d] -> codes [N, m]: cut to a multiple of m, OPQ."""
        digits = self.own.digits
        width = white.shape[1] - white.shape[1] % digits
        # too few components for m digits: zeros fill up, and the quantiser mixes the directions
        white = white[:, :width] if width else F.pad(white, (0, digits - white.shape[1]))
        quantiser = ProductQuantiser(white.shape[1], digits, self.own.codes)
        codes = quantiser.fit(white[fit_rows], generator).encode(white)
        if self.own.start_from_codewords:
            rows = projected_codewords(quantiser.codebooks, self.own.width, generator)
            with torch.no_grad():
                self.tokens.weight[1:-1] = rows * _CODEWORD_STD * math.sqrt(self.own.width)
        return codes

    # ----------------------------------------------------------------- items

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """See the base class; weights are about to change."""
        self.forget_graph()
        return super().loss(batch)

    def score(self, batch: Batch) -> Tensor:
        """[B, N] mean log-probability of each item's digits; -inf where a graph walk was not."""
        if self.own.decoding == "exhaustive":
            return super().score(batch)
        table = self.log_probabilities(batch)
        generator = torch.Generator().manual_seed(_WALK_SEED)
        pool = graph_walk(
            table, self.codes, self.graph(), self.own.beams, self.own.steps, generator
        )
        scores = table.new_full((len(table), len(self.codes)), float("-inf"))
        return scores.scatter_reduce(1, pool.items, pool.scores, "amax")

    @torch.no_grad()
    def graph(self) -> Tensor:
        """[N, edges] neighbours of every item under the present weights, built when needed."""
        if self._graph is None or self._graph.device != self.codes.device:
            tokens = self.digit_tokens().float()
            cosines = torch.bmm(tokens, tokens.transpose(1, 2))  # [m, K, K]
            self._graph = similarity_graph(self.codes, (cosines + 1) / 2, self.own.edges)
        return self._graph

    def forget_graph(self) -> None:
        """To be called when codes, weights or `edges` have changed."""
        self._graph = None
