"""BSARec: self-attention beside a frequency filter; the strongest baseline others reproduced.

Paper: Shin et al., An Attentive Inductive Bias for Sequential Recommendation beyond the
Self-Attention, AAAI 2024. Reproduced: per block
    h = alpha * filter(x) + (1 - alpha) * attention(x),  filter(x) = low(x) + beta^2 * high(x)
with residual, dropout and LayerNorm around both (eqs. 6-10), feed-forward, full-softmax
cross-entropy, one example for every prefix of the train history (the filter is not causal, so a
loss at every position would leak). Differs: the official code filters the window of 50 with its
padded positions, whose states are learned position vectors; here padding is zero. The filter is
then the corner of a circulant matrix and no work is done on padding (a prefix has 7 items on
average, not 50). Prefixes of length 0 (predict the first item from nothing) are left out.
Checked against: the official log on Beauty, R@10 .1008 / N@10 .0611, and an independent re-run over
5 seeds, .1004 / .0609 (seen items masked).
"""

from __future__ import annotations

from typing import Any

from torch import nn

from config import Config
from model_parts.backbone import FrequencyBlock, init_weights
from model_parts.sequential import SequentialRecommender


class BSARec(SequentialRecommender):
    """SASRec's embeddings, loss and scores around BSARec blocks."""

    name = "bsarec"
    examples = "prefixes"
    search_space = {
        "train.lr": (3e-4, 1e-3, "log"),
        "bsarec.alpha": [0.1, 0.3, 0.5, 0.7, 0.9],
        "bsarec.cutoff": [1, 3, 5, 7, 9],
        "bsarec.temperature": [0.0, 0.04, 0.06, 0.1],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own, window = config.bsarec, config.data.max_history
        blocks = nn.ModuleList(
            FrequencyBlock(window, own.cutoff, own.alpha, own.width, own.heads, own.dropout)
            for _ in range(own.layers)
        )
        n_items = config.n_items(catalogue)
        super().__init__(n_items, window, own.width, own.dropout, own.temperature, blocks)
        init_weights(self)
