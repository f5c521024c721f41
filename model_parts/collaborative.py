"""The part static graph models share: user and item vectors, pairs to learn from, features.

These models know a user by a row of a table and by train interactions in graphs; they do not read
the history of a batch. At test, where sequence models see the valid item, they do not, unless
`with_interactions` adds it to the graph.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts.base import Batch, Recommender, TrainingData
from model_parts.graphs import SparseGraph, Table, draw_negatives, interaction_edges, symmetric


class Triples(NamedTuple):
    """Users with an item they took and one they did not; items from 0."""

    users: Tensor  # [P]
    positives: Tensor  # [P]
    negatives: Tensor  # [P]


class GraphRecommender(Recommender):
    """Ranks by the inner product of `vectors()`, which are made once for all users and kept.

    `bipartite` is the binary matrix of train interactions [U, N], `normalised` the same with
    weights 1 / sqrt(d_u d_i); the user table gets its rows in `prepare`, since a catalogue does not
    say how many users there are.
    """

    examples = "prefixes"
    bucketed: ClassVar[bool] = False

    def __init__(self, n_items: int, width: int) -> None:
        super().__init__()
        self.users = Table(width)
        self.items = nn.Parameter(torch.empty(n_items, width))
        self.bipartite, self.normalised = SparseGraph(), SparseGraph()
        self._vectors: tuple[Tensor, Tensor] | None = None
        self.register_load_state_dict_post_hook(lambda model, _: model.forget())

    def prepare(self, data: TrainingData, generator: torch.Generator) -> None:
        """The user-item graph of train, and the user table."""
        self._connect(data.train, data.n_users)
        self.users.fill(self.first_users(data.n_users, generator))

    def _connect(self, interactions: Any, n_users: int) -> None:
        shape = (n_users, len(self.items))
        self.bipartite.fill(interaction_edges(interactions), shape)
        self.normalised.fill(symmetric(self.bipartite.edges().cpu(), shape), shape)
        self.forget()

    def with_interactions(self, interactions: Any) -> GraphRecommender:
        """A copy that shares the parameters and propagates along these interactions.

        Only the user-item graph is new. Graphs among users or among items, and what else `prepare`
        and the epochs made of train, belong to what was learnt and stay.
        """
        self.forget()
        shared = {id(parameter): parameter for parameter in self.parameters()}
        model = copy.deepcopy(self, shared)
        model._connect(interactions, len(self.users.weight))
        return model

    def first_users(self, n_users: int, generator: torch.Generator) -> Tensor:
        """What the user table starts from: Xavier uniform, [U, d]."""
        rows = torch.empty(n_users, self.items.shape[1])
        return nn.init.xavier_uniform_(rows, generator=generator)

    def begin_epoch(self, epoch: int, generator: torch.Generator) -> None:
        """Vectors made before are out of date."""
        self.forget()

    def triples(self, batch: Batch) -> Triples:
        """The targets of a batch with one random item each that the user does not have in train.

        The first item of a history is no target of any prefix, so it comes along with the second. A
        user with a single train item is in the graph, but in no triple.
        """
        self.forget()
        rows, steps = torch.nonzero(batch.targets, as_tuple=True)
        second = batch.lengths == 1
        users = torch.cat([batch.users[rows], batch.users[second]])
        positives = torch.cat([batch.targets[rows, steps], batch.items[second, 0]]) - 1
        return Triples(users, positives, draw_negatives(self.bipartite, users))

    def vectors(self) -> tuple[Tensor, Tensor]:
        """User vectors [U, d] and item vectors [N, d] under the present weights."""
        raise NotImplementedError(f"{type(self).__name__} has no vectors")

    def score(self, batch: Batch) -> Tensor:
        """[B, N] inner products; the vectors are made at the first call after training."""
        if self._vectors is None or self.training:
            with torch.no_grad():
                self._vectors = self.vectors()
        users, items = self._vectors
        return users[batch.users] @ items.T

    def forget(self) -> None:
        """The weights change: `score` has to make the vectors again."""
        self._vectors = None


def bpr(users: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """-mean log sigmoid(<u, p> - <u, n>) of vectors [P, d]."""
    return -F.logsigmoid((users * (positives - negatives)).sum(1)).mean()


def mean_of_others(parts: list[Tensor], m: int) -> Tensor:
    """Mean of all tensors of the list but the m-th."""
    others = parts[:m] + parts[m + 1 :]
    return sum(others) / len(others)


def item_features(model: str, catalogue: Any) -> tuple[list[Tensor], Tensor]:
    """Feature matrices [N, d_m] with missing rows at the mean of the others, presence [N, M].

    Raises ValueError for a catalogue without features.
    """
    if not catalogue.modalities:
        raise ValueError(
            f"{model} needs item features and this data set has none: add a feature file such as "
            "text.npy, or leave the model out with --model."
        )
    features, known = [], []
    for matrix, has in catalogue.modalities.values():
        has = torch.tensor(has, dtype=torch.bool)
        matrix = torch.tensor(matrix, dtype=torch.float32)
        mean = matrix[has].mean(0) if bool(has.any()) else matrix.new_zeros(matrix.shape[1])
        features.append(torch.where(has[:, None], matrix, mean))
        known.append(has)
    return features, torch.stack(known, dim=1)
