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
every user; scores cover the last candidates of the walk and not only its beam; in the presets token
vectors start as their codewords (`start_from_codewords`), at random in the paper; all modalities by
default, each whitened by itself (`features=text` is the paper's). Long histories: the loop cuts the
windows, see experiments. No item id is treated as an end of sequence (the official evaluator loses
one item that way).
Checked against: Beauty R@10 .0757 / N@10 .0436 with sentence-T5 features (ACERec's re-run), .0787 /
.0452 with the authors' OpenAI features and exact scoring; seen items not masked in either.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from model_parts.backbone import Positions, PreNormBlock, at_last, init_weights
from model_parts.base import Batch, Recommender, TrainingData
from model_parts.decoding import (
    digit_cross_entropy,
    digit_heads,
    graph_walk,
    score_all_items,
    similarity_graph,
    token_rows,
)
from model_parts.dropout import Dropout
from model_parts.item_vectors import chosen_modalities, item_vectors, rows_in_train
from model_parts.quantisers import ProductQuantiser, projected_codewords
from model_parts.residual import colliding_share
from model_parts.trie import NOT_FOUND

_WALK_SEED = 2024
_INIT_STD = 0.02
# Of token vectors that start as codewords: so long that the first, noisy steps do not undo them.
_CODEWORD_STD = 0.3


class RPG(Recommender):
    """Semantic IDs from text, a causal Transformer on them, m digit heads on top."""

    name = "rpg"
    ablations = {
        "random codes": {"rpg.tokenizer": "random"},
        "random code vectors at first": {"rpg.start_from_codewords": False},
    }
    search_space = {
        "train.lr": (1e-3, 1e-2, "log"),
        "rpg.temperature": [0.03, 0.05, 0.07],
        "rpg.digits": [8, 16, 32, 64],
    }

    codes: Tensor  # [N, m] int64, row i-1 is item i

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        super().__init__()
        own = config.rpg
        self.own = own
        self.n_codes = own.codes
        n_items = config.n_items(catalogue)
        # row 0 is padding, code c of digit j is row c + K j + 1, the last row is the paper's EOS
        self.tokens = nn.Embedding(own.digits * own.codes + 2, own.width, padding_idx=0)
        self.positions = Positions(config.data.max_history, own.width, from_end=False)
        self.dropout = Dropout(own.embedding_dropout)
        self.blocks = nn.ModuleList(
            PreNormBlock(own.width, own.heads, own.inner, 0.0, own.attention_dropout)
            for _ in range(own.layers)
        )
        self.norm = nn.LayerNorm(own.width, eps=1e-12)
        self.heads = nn.Linear(own.width, own.digits * own.width)  # W_1..W_m in one product
        self.register_buffer("codes", torch.zeros(n_items, own.digits, dtype=torch.int64))
        self._graph: Tensor | None = None
        self.register_load_state_dict_post_hook(lambda model, _: model.forget_graph())
        self._init_weights()

    def _init_weights(self) -> None:
        init_weights(self, _INIT_STD)
        for block in self.blocks:  # GPT-2: residual branches start smaller the deeper the network
            for layer in (block.attention.project_out, block.feed_forward.contract):
                nn.init.normal_(layer.weight, std=_INIT_STD / math.sqrt(2 * self.own.layers))
        nn.init.zeros_(self.heads.weight)
        bound = 1 / math.sqrt(self.own.width)
        nn.init.uniform_(self.heads.bias, -bound, bound)

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
        elif self.own.start_from_codewords:  # as long as they would be, so that only codes differ
            rows = torch.randn(len(self.tokens.weight) - 2, self.own.width, generator=generator)
            with torch.no_grad():
                self.tokens.weight[1:-1] = rows.to(self.tokens.weight) * _CODEWORD_STD
        self.codes.copy_(codes)
        self.forget_graph()

    def _quantise(self, white: Tensor, fit_rows: Tensor, generator: torch.Generator) -> Tensor:
        """White vectors [N, d] -> codes [N, m]: filled up to a multiple of m, OPQ."""
        digits = self.own.digits
        # zeros, since the last components are those of the last modality, none to spare; the
        # quantiser mixes the directions
        white = F.pad(white, (0, -white.shape[1] % digits))
        quantiser = ProductQuantiser(white.shape[1], digits, self.own.codes)
        codes = quantiser.fit(white[fit_rows], generator).encode(white)
        if self.own.start_from_codewords:
            rows = projected_codewords(quantiser.codebooks, self.own.width, generator)
            with torch.no_grad():
                self.tokens.weight[1:-1] = rows * _CODEWORD_STD * math.sqrt(self.own.width)
        return codes

    # ----------------------------------------------------------------- network

    def encode(self, batch: Batch) -> Tensor:
        """[B, T, d], the state after each position."""
        B, T = batch.items.shape
        present = batch.items > 0
        tokens = token_rows(self.codes[batch.items[present] - 1], self.own.codes) + 1
        vectors = F.embedding_bag(tokens, self.tokens.weight, mode="mean")  # [P, d]
        x = vectors.new_zeros(B, T, self.own.width).masked_scatter(present[:, :, None], vectors)
        x = self.dropout(x + self.positions(batch.lengths, T))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def digit_tokens(self) -> Tensor:
        """The token table as unit vectors of each digit, [m, K, d]."""
        rows = self.tokens.weight[1:-1].view(self.own.digits, self.own.codes, self.own.width)
        return F.normalize(rows.float(), dim=2)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the next item's digits, mean over positions and digits (eq. 3)."""
        self.forget_graph()
        wanted = batch.targets > 0
        states = self.encode(batch)[wanted]  # [P, d]
        tokens = self.digit_tokens() / self.own.temperature
        codes = self.codes[batch.targets[wanted] - 1]
        head = self.heads
        return {"digits": digit_cross_entropy(states, head.weight, head.bias, tokens, codes)}

    # ----------------------------------------------------------------- items

    def score(self, batch: Batch) -> Tensor:
        """[B, N] mean log-probability of the digits; `NOT_FOUND` where a graph walk did not come,
        which is still above items that were seen."""
        last = at_last(self.encode(batch), batch.lengths)
        heads = digit_heads(last, self.heads.weight, self.heads.bias)  # [B, m, d]
        tokens = self.digit_tokens() / self.own.temperature
        logits = torch.bmm(heads.transpose(0, 1), tokens.transpose(1, 2))  # [m, B, K]
        table = torch.log_softmax(logits.float(), dim=2).transpose(0, 1)  # [B, m, K]
        if self.own.decoding == "exhaustive":
            return score_all_items(table, self.codes)
        generator = torch.Generator().manual_seed(_WALK_SEED)
        pool = graph_walk(
            table, self.codes, self.graph(), self.own.beams, self.own.steps, generator
        )
        scores = table.new_full((len(table), len(self.codes)), NOT_FOUND)
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

    def item_ids(self, batch: Batch | None = None) -> Tensor:
        """The codes, [N, m]: the same for every user."""
        return self.codes

    def describe(self) -> dict[str, Any]:
        """Adds the share of items whose ID nobody else has."""
        return super().describe() | {"unique_ids": 1 - colliding_share(self.codes)}
