"""Pctx: several semantic IDs an item, chosen for every interaction by the history before it.

Paper: Pctx: Tokenizing Personalized Context for Generative Recommendation (arXiv 2510.21276), with
its official code read. Reproduced: a context encoder trained on train prefixes (DuoRec: causal
Transformer, cross-entropy over all items, two contrastive terms); the contexts of each item brought
down by k-means to a number that grows with its frequency (Gamma-sized groups); contexts fused with
features, .5 each, both whitened; residual k-means of three digits and one against collisions; equal
and rare IDs of an item merged; with probability gamma any ID of the item instead of the one its
context leads to, in histories and targets; T5; an item's score is the sum over its IDs; several
random readings of a history vote at test.
Differs: contexts of a history come from one pass over its newest items, not from a window each; the
rarest ID is merged first and counts are renewed each time; the fourth digit is given after merging;
features are all modalities, up to 128 whitened components each beside half as many of the context,
so that with several modalities a context weighs less than beside the paper's one text; an item that
train lacks gets the mean context; digits as in tiger.py; beams only go on to IDs that exist and
votes are counted by item (the official code lets an item appear twice and counts beams that are no
item); the number of votes is that of beams, not ten, and there is a vote on valid, too; random
readings repeat for equal histories, so that scores do; dropout is the same everywhere in the
context encoder and training is by steps; no end token.
Checked against: no number for Beauty 2014 by the authors (a re-run has R@10 .0737 / N@10 .0405,
masked, 30 beams); the published gain over TIGER is 9 to 16 % N@10 on Amazon 2023, so compare with
TIGER of this project. Random IDs instead of those of the context cost the authors 3 to 5 %.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from config import Pctx as Settings
from model_parts.base import Batch, TrainingData
from model_parts.contexts import (
    Condensed,
    ContextEncoder,
    condense,
    contexts_per_item,
    every_context,
    fixed_uniform,
    merge_rare,
    train_contexts,
)
from model_parts.contrastive import RandomPrefixes
from model_parts.generative import Seq2SeqRecommender, newest_items
from model_parts.item_vectors import chosen_modalities, item_vectors
from model_parts.quantisers import whitened_pca
from model_parts.residual import ResidualQuantiser, with_collision_digit
from model_parts.stage_one import seeded
from model_parts.trie import NOT_FOUND

# Principal components of contexts and of each modality that IDs are made of.
_CONTEXT_WIDTH, _FEATURE_WIDTH = 64, 128
# What the probability of an item counts beside its votes: it decides between equal ones.
_TIE_BREAK = 1e-4


class PersonalIDs(nn.Module):
    """The semantic IDs of all items, several each, and which contexts lead to which of them.

    Everything is sorted by item: contexts `begin[i] .. begin[i+1]-1` and IDs
    `first[i] .. first[i+1]-1` are those of item i.
    """

    vectors: Tensor  # [C, d] condensed contexts
    begin: Tensor  # [N + 1]
    id_of_context: Tensor  # [C], which ID a context stands for
    codes: Tensor  # [F, L]
    first: Tensor  # [N + 1]
    weights: Tensor  # [F] train interactions of each ID, at least 1

    def __init__(self, n_items: int, width: int, digits: int) -> None:
        super().__init__()
        one_each = torch.arange(n_items + 1)
        self.register_buffer("vectors", torch.zeros(n_items, width))
        self.register_buffer("begin", one_each)
        self.register_buffer("id_of_context", one_each[:-1].clone())
        self.register_buffer("codes", torch.zeros(n_items, digits, dtype=torch.int64))
        self.register_buffer("first", one_each.clone())
        self.register_buffer("weights", torch.ones(n_items, dtype=torch.float64))

    def fill(self, **tables: Tensor) -> None:
        """Replace tables by others, of any length."""
        for name, table in tables.items():
            setattr(self, name, table.to(getattr(self, name)))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # how many IDs there are is known after stage one only
        known = {name: prefix + name for name in self._buffers}
        self.fill(**{name: state[key] for name, key in known.items() if key in state})
        super()._load_from_state_dict(state, prefix, *rest)

    @property
    def owners(self) -> Tensor:
        """[F], the item of each ID."""
        items = torch.arange(len(self.first) - 1, device=self.first.device)
        return items.repeat_interleave(self.first.diff())

    def nearest(self, rows: Tensor, contexts: Tensor) -> Tensor:
        """The ID of items [P] that each was met with in contexts [P, d]: [P]."""
        sizes = self.begin.diff()[rows]
        point = torch.arange(len(rows), device=rows.device).repeat_interleave(sizes)
        place = torch.arange(len(point), device=rows.device) - (sizes.cumsum(0) - sizes)[point]
        candidate = self.begin[rows][point] + place
        distance = (contexts[point] - self.vectors[candidate]).square().sum(1)
        widest = int(sizes.max()) if len(rows) else 1
        table = distance.new_full((len(rows), widest), float("inf"))
        table[point, place] = distance
        return self.id_of_context[self.begin[rows] + table.argmin(1)]

    def drawn(self, rows: Tensor, uniform: Tensor) -> Tensor:
        """An ID of items [P], by its share of the interactions; uniform [P] in [0, 1) decides."""
        mass = self.weights.cumsum(0)
        before = torch.cat([mass.new_zeros(1), mass])
        begin, end = before[self.first[rows]], before[self.first[rows + 1]]
        found = torch.searchsorted(mass, begin + uniform * (end - begin), right=True)
        return found.clamp(max=self.first[rows + 1] - 1)

    @property
    def main(self) -> Tensor:
        """[N], the most frequent ID of each item."""
        n_items = len(self.first) - 1
        best = self.weights.new_zeros(n_items).scatter_reduce(0, self.owners, self.weights, "amax")
        index = torch.arange(len(self.codes), device=self.codes.device)
        candidate = torch.where(self.weights == best[self.owners], index, len(index))
        start = index.new_full((n_items,), len(index))
        return start.scatter_reduce(0, self.owners, candidate, "amin")


# --------------------------------------------------------------------------- tokenizer


def make_ids(
    condensed: Condensed, features: Tensor, own: Settings, generator: torch.Generator
) -> dict[str, Tensor]:
    """Tables of `PersonalIDs` from condensed contexts and item features [N, f].

    Contexts are fused with the features of their item and quantised; contexts of one item with
    equal codes become one ID, rare IDs join the nearest one of their item (`merge_rare`), and a
    last digit tells IDs of different items apart.
    """
    n_items = len(features)
    fused = fuse(condensed, features, own.blend)
    quantiser = ResidualQuantiser(fused.shape[1], own.digits - 1, own.codes)
    quantiser.fit(fused[condensed.counts > 0], generator)
    coarse = quantiser.encode(fused)
    labels = torch.cat([condensed.owners[:, None], coarse], dim=1)
    ids, id_of_context = torch.unique(labels, dim=0, return_inverse=True)  # sorted by item
    counts = torch.zeros(len(ids)).index_add_(0, id_of_context, condensed.counts.float())
    shares = condensed.counts.clamp(min=1).float()
    sums = torch.zeros(len(ids), condensed.vectors.shape[1])
    sums.index_add_(0, id_of_context, condensed.vectors * shares[:, None])
    vectors = sums / torch.zeros(len(ids)).index_add_(0, id_of_context, shares)[:, None]
    into = merge_by_item(ids[:, 0], counts, vectors, own.rare)
    kept = into == torch.arange(len(ids))
    number = kept.cumsum(0) - 1  # of an ID among those kept
    weights = torch.zeros(int(kept.sum())).index_add_(0, number[into], counts)
    return {
        "vectors": condensed.vectors,
        "begin": _starts(condensed.owners, n_items),
        "id_of_context": number[into][id_of_context],
        "codes": with_collision_digit(ids[kept, 1:], own.codes),
        "first": _starts(ids[kept, 0], n_items),
        "weights": weights.clamp(min=1),
    }


def fuse(condensed: Condensed, features: Tensor, blend: float) -> Tensor:
    """x = [a W context; (1 - a) features of the item], W whitening to at most 64 components."""
    fitted = condensed.counts > 0
    white = whitened_pca(condensed.vectors, fitted, _CONTEXT_WIDTH)
    return torch.cat([blend * white, (1 - blend) * features[condensed.owners]], dim=1)


def merge_by_item(owners: Tensor, counts: Tensor, vectors: Tensor, least: float) -> Tensor:
    """`merge_rare` for every item: owners [F] ascending -> [F], the ID each one is merged into."""
    into = torch.arange(len(owners))
    sizes = torch.unique_consecutive(owners, return_counts=True)[1]
    ends = sizes.cumsum(0)[sizes > 1]
    for begin, end in zip((ends - sizes[sizes > 1]).tolist(), ends.tolist(), strict=True):
        into[begin:end] = begin + merge_rare(counts[begin:end], vectors[begin:end], least)
    return into


def _starts(owners: Tensor, n_items: int) -> Tensor:
    # where each item begins in a table sorted by owner, [N + 1]
    return torch.searchsorted(owners, torch.arange(n_items + 1))


# --------------------------------------------------------------------------- model


class Pctx(Seq2SeqRecommender):
    """T5 on personal IDs."""

    name = "pctx"
    ablations = {
        "digits among all codes": {"pctx.among": "all"},
        "one ID": {"pctx.start": 1, "pctx.step": 0},
        "no merging": {"pctx.rare": 0.0},
        "random IDs": {"pctx.replace": 1.0},
        "one reading": {"pctx.passes": 1},
    }
    search_space = {
        "train.lr": (3e-4, 3e-3, "log"),
        "pctx.replace": [0.3, 0.5, 0.7, 0.9],
        "pctx.step": [2, 3, 4],
        "pctx.dropout": [0.1, 0.2, 0.3],
    }

    def __init__(self, config: Config, catalogue: Any = None) -> None:
        own, n_items = config.pctx, config.n_items(catalogue)
        super().__init__(n_items, own, own.digits)
        # one more, so that a target can stand behind a full history
        self.window = min(own.history, config.data.max_history) + 1
        self.encoder = ContextEncoder(
            n_items, self.window, own.context, own.context_layers, own.context_heads,
            own.context_dropout,
        ).eval().requires_grad_(False)  # fmt: skip
        self.ids = PersonalIDs(n_items, own.context, own.digits)
        self.reading = 0

    def train(self, mode: bool = True) -> Pctx:
        """The context encoder is trained in stage one only."""
        super().train(mode)
        self.encoder.eval()
        return self

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """Contexts and IDs, from train interactions only. Raises ValueError without features."""
        own = self.own
        modalities = chosen_modalities(data.catalogue, "all", "Pctx")
        rows, counts = torch.tensor(data.train.items, dtype=torch.long) - 1, data.counts
        features, _ = item_vectors(modalities, counts > 0, _FEATURE_WIDTH, whiten=True)
        with seeded(generator):
            train_contexts(
                self.encoder, RandomPrefixes(data.train, self.window), own.tokenizer_steps,
                own.context_batch, own.context_lr, own.contrast, own.temperature, generator,
            )  # fmt: skip
        contexts = every_context(self.encoder, data.train, self.window)
        wanted = contexts_per_item(counts, own.groups, own.start, own.step, own.kappa)
        self.ids.fill(
            **make_ids(condense(contexts, rows, wanted, generator), features, own, generator)
        )
        self.set_codes(self.ids.codes[self.ids.main], counts)

    # ----------------------------------------------------------------- which ID

    def identifiers(self) -> tuple[Tensor, Tensor]:
        """All IDs of all items."""
        return self.ids.codes, self.ids.owners

    def history_codes(self, batch: Batch) -> Tensor:
        """[B, T, L], each item by the ID that its context leads to, or a random one of its IDs."""
        seen = batch.items > 0
        with torch.no_grad():
            contexts = self.encoder(batch.items)[seen]
        codes = self.codes.new_zeros(*batch.items.shape, self.digits)
        codes[seen] = self._personal_codes(batch.items[seen] - 1, contexts, seen.nonzero()[:, 1])
        return codes

    def target_codes(self, batch: Batch) -> Tensor:
        """[B, L]; the context of a target includes the target, as that of every train item does."""
        batch = newest_items(batch, self.own.history)
        targets = batch.targets.gather(1, (batch.lengths - 1)[:, None])
        items = F.pad(batch.items, (0, 1)).scatter(1, batch.lengths[:, None], targets)
        with torch.no_grad():
            contexts = self.encoder.last(items)
        return self._personal_codes(targets[:, 0] - 1, contexts, batch.lengths)

    def _personal_codes(self, rows: Tensor, contexts: Tensor, places: Tensor) -> Tensor:
        # items [P] met in contexts [P, d] at places [P] of their histories -> [P, L]
        if self.training:
            choice, which = torch.rand(2, len(rows), device=rows.device, dtype=torch.float64)
        else:  # the same whenever the same history is read
            choice, which = (fixed_uniform(rows, places, self.reading, use) for use in (0, 1))
        exact, drawn = self.ids.nearest(rows, contexts), self.ids.drawn(rows, which)
        return self.ids.codes[torch.where(choice < self.own.replace, drawn, exact)]

    # ----------------------------------------------------------------- scores

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """[B, N]: of one reading the log-probability, summed over IDs; of several the votes."""
        readings = []
        for reading in range(self.own.passes):
            self.reading = reading
            readings.append(super().score(batch))
        return readings[0] if len(readings) == 1 else votes(readings, self.n_beams(batch))

    def describe(self) -> dict[str, Any]:
        """Adds IDs per item and the size of the frozen context encoder."""
        return super().describe() | {
            "ids_per_item": len(self.ids.codes) / len(self.codes),
            "context_parameters": sum(p.numel() for p in self.encoder.parameters()),
        }


def votes(readings: list[Tensor], places: Tensor) -> Tensor:
    """Sum over readings [B, N] of 1 / log2(rank + 2), rank 0 for the best, of each user's first
    `places` [B].

    0 for items that no reading found; equal votes are ordered by mean probability.
    """
    total = torch.zeros_like(readings[0])
    for scores in readings:
        values, items = scores.topk(min(int(places.max()), scores.shape[1]), dim=1)
        ranks = torch.arange(values.shape[1], device=scores.device)
        weights = 1 / (ranks + 2).log2()
        found = (values > NOT_FOUND) & (ranks < places[:, None])
        likely = _TIE_BREAK * values.exp() / len(readings)
        total.scatter_add_(1, items, (weights + likely) * found)
    return total
