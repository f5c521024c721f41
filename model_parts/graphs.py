"""Sparse graphs of users and items: built from train, kept in buffers, propagated cheaply.

A graph is stored by rows (row i gathers w_ij x_j) and by columns, so that its transpose and its
gradient cost the same as itself. Nothing is dense but blocks of rows, nothing is kept in files, and
a node without edges gets zeros.

Letters: E edges, R rows, C columns, N items, U users, d width, k neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows, and numbers (64 MB of floats), held at once while rows are compared with all others. Sparse
# products are fastest a few hundred columns wide.
_BLOCK_ROWS, _BLOCK_NUMBERS = 256, 16_000_000
# Redraws of a negative that the user has; a user of nearly all items keeps what comes last.
_REDRAWS = 100
# Keeps the root of a degree of 0 finite, as the official codes do.
_NO_DEGREE = 1e-7


class Edges(NamedTuple):
    """Entries of a sparse matrix in any order; entries of one place add up."""

    rows: Tensor  # [E] int64
    columns: Tensor  # [E] int64
    weights: Tensor  # [E] float32

    def scaled(self, factor: float | Tensor) -> Edges:
        """The same edges with all weights times `factor`."""
        return self._replace(weights=self.weights * factor)

    def where(self, chosen: Tensor) -> Edges:
        """The edges that `chosen` [E] (bool, or numbers of edges) picks."""
        return Edges(*(field[chosen] for field in self))

    def cpu(self) -> Edges:
        """The same edges in main memory, where graphs are put together."""
        return Edges(*(field.cpu() for field in self))


def joined(*parts: Edges) -> Edges:
    """The sum of sparse matrices."""
    return Edges(*(torch.cat(field) for field in zip(*parts, strict=True)))


# --------------------------------------------------------------------------- modules


class Elastic(nn.Module):
    """Own tensors have as many rows as the data say: loading gives them the stored shape."""

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        for name, tensor in {**self._parameters, **self._buffers}.items():
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.shape[1:] == tensor.shape[1:]:
                tensor.data = tensor.data.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class Table(Elastic):
    """A trainable table [rows, d] without rows until `fill`: a model is built before users are
    counted. The parameter stays the same object, so an optimiser may hold it already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(0, width))

    @torch.no_grad()
    def fill(self, rows: Tensor) -> None:
        """Start from `rows` [any, d]."""
        self.weight.data = rows.to(self.weight)


class SparseGraph(Elastic):
    """A sparse matrix [R, C] that multiplies dense ones, empty until `fill`."""

    offsets: Tensor  # [R + 1] int32, where the edges of each row begin
    columns: Tensor  # [E] int32, ascending within a row
    weights: Tensor  # [E] float32
    back_offsets: Tensor  # [C + 1] the same by columns
    back_rows: Tensor  # [E]
    back_weights: Tensor  # [E]

    def __init__(self) -> None:
        super().__init__()
        for name in ("offsets", "columns", "back_offsets", "back_rows"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int32))
        for name in ("weights", "back_weights"):
            self.register_buffer(name, torch.zeros(0))

    @torch.no_grad()
    def fill(self, edges: Edges, shape: tuple[int, int]) -> SparseGraph:
        """Store `edges`, those of one place added up."""
        device = self.weights.device
        edges = _coalesced(edges.cpu(), shape[1])
        by_column = edges.columns.argsort(stable=True)
        stored = {
            "offsets": _offsets(edges.rows, shape[0]),
            "columns": edges.columns.int(),
            "weights": edges.weights.float(),
            "back_offsets": _offsets(edges.columns, shape[1]),
            "back_rows": edges.rows[by_column].int(),
            "back_weights": edges.weights[by_column].float(),
        }
        for name, value in stored.items():
            setattr(self, name, value.to(device))
        return self

    def forward(self, x: Tensor) -> Tensor:
        """[C, d] -> [R, d]: row i is sum_j w_ij x_j."""
        return _SparseProduct.apply(x, *self._forth(), *self._back())

    def transposed(self, x: Tensor) -> Tensor:
        """[R, d] -> [C, d]: the transpose times x."""
        return _SparseProduct.apply(x, *self._back(), *self._forth())

    def _forth(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.offsets, self.columns, self.weights

    def _back(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.back_offsets, self.back_rows, self.back_weights

    def row_degrees(self) -> Tensor:
        """[R] edges of each row."""
        return self.offsets.diff()

    def column_degrees(self) -> Tensor:
        """[C] edges of each column."""
        return self.back_offsets.diff()

    def edges(self) -> Edges:
        """All edges by row, then column."""
        rows = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        rows = rows.repeat_interleave(self.row_degrees())
        return Edges(rows, self.columns.long(), self.weights)

    def contains(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether there is an edge at each of P places, by bisection: [P], [P] -> [P] bool."""
        low, end = self.offsets[rows].long(), self.offsets[rows + 1].long()
        if not len(self.columns):
            return low < end
        high, last = end, len(self.columns) - 1
        for _ in range(int(self.row_degrees().max()).bit_length()):
            middle = (low + high) // 2
            before = (low < high) & (self.columns[middle.clamp(max=last)] < columns)
            low, high = torch.where(before, middle + 1, low), torch.where(before, high, middle)
        return (low < end) & (self.columns[low.clamp(max=last)] == columns)


class _SparseProduct(torch.autograd.Function):
    """A sparse matrix times a dense one; its gradient is the transpose times the gradient.

    An embedding bag with weights is that product, and several times faster than torch's sparse
    formats on a CPU; its own gradient is not, hence this function.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, *graph: Tensor) -> Tensor:
        ctx.save_for_backward(*graph[3:])
        return _bag(x.float(), *graph[:3])  # in float32 also under autocast

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return _bag(upstream, *ctx.saved_tensors), *[None] * 6


def _bag(x: Tensor, offsets: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(
        index, x.contiguous(), offsets, mode="sum", per_sample_weights=weights,
        include_last_offset=True,
    )  # fmt: skip


def _coalesced(edges: Edges, n_columns: int) -> Edges:
    places, inverse = torch.unique(edges.rows * n_columns + edges.columns, return_inverse=True)
    weights = torch.zeros(len(places)).index_add_(0, inverse, edges.weights.float())
    return Edges(places // n_columns, places % n_columns, weights)


def _offsets(sorted_or_not: Tensor, n: int) -> Tensor:
    counts = torch.bincount(sorted_or_not, minlength=n)
    return F.pad(counts.cumsum(0), (1, 0)).int()


# --------------------------------------------------------------------------- users and items


def interaction_edges(train: Any) -> Edges:
    """(user, item) of every train interaction, both from 0, repeats once, weights 1."""
    offsets = torch.tensor(train.offsets, dtype=torch.long)
    users = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
    items = torch.tensor(train.items, dtype=torch.long) - 1
    span = int(items.max()) + 1 if len(items) else 1
    places = torch.unique(users * span + items)
    return Edges(places // span, places % span, torch.ones(len(places)))


def symmetric(edges: Edges, shape: tuple[int, int]) -> Edges:
    """Weights w_ui / sqrt(d_u d_i), with the row and column sums of `edges` as degrees."""
    rows = torch.zeros(shape[0]).index_add_(0, edges.rows, edges.weights) + _NO_DEGREE
    columns = torch.zeros(shape[1]).index_add_(0, edges.columns, edges.weights) + _NO_DEGREE
    return edges.scaled(rows.rsqrt()[edges.rows] * columns.rsqrt()[edges.columns])


def symmetric_by_rows(edges: Edges, n: int) -> Edges:
    """D^-1/2 S D^-1/2 of a square S, D its row sums; rows without weight stay empty."""
    sums = torch.zeros(n).index_add_(0, edges.rows, edges.weights)
    root = torch.where(sums > 0, sums.clamp(min=_NO_DEGREE).rsqrt(), 0.0)
    return edges.scaled(root[edges.rows] * root[edges.columns])


def propagate(
    graph: SparseGraph, users: Tensor, items: Tensor, layers: int
) -> tuple[Tensor, Tensor]:
    """LightGCN on the bipartite graph [U, N]: means over layers 0..layers of both sides."""
    user_sum, item_sum = users, items
    for _ in range(layers):
        users, items = graph(items), graph.transposed(users)
        user_sum, item_sum = user_sum + users, item_sum + items
    return user_sum / (layers + 1), item_sum / (layers + 1)


def repeated(graph: SparseGraph, x: Tensor, layers: int) -> Tensor:
    """graph^layers x, the last layer only."""
    for _ in range(layers):
        x = graph(x)
    return x


def row_means(graph: SparseGraph, x: Tensor) -> Tensor:
    """Mean of x [C, d] over the edges of each row of a binary graph, [R, d]; 0 without edges."""
    return graph(x) / graph.row_degrees().clamp(min=1)[:, None]


def column_means(graph: SparseGraph, x: Tensor) -> Tensor:
    """Mean of x [R, d] over the edges of each column of a binary graph, [C, d]."""
    return graph.transposed(x) / graph.column_degrees().clamp(min=1)[:, None]


def isolated(edges: Edges, lonely: Tensor) -> Edges:
    """Nodes `lonely` [R] bool keep nothing but an edge of weight 1 to themselves."""
    touched = lonely[edges.rows] | lonely[edges.columns]
    own = torch.nonzero(lonely)[:, 0]
    return joined(edges.where(~touched), Edges(own, own, torch.ones(len(own))))


def draw_negatives(graph: SparseGraph, users: Tensor) -> Tensor:
    """One random item (from 0) for each of P users that is not in the user's row of `graph`."""
    n_items = len(graph.back_offsets) - 1
    items = torch.randint(n_items, users.shape, device=users.device)
    for _ in range(_REDRAWS):
        again = torch.nonzero(graph.contains(users, items))[:, 0]
        if not len(again):
            break
        items[again] = torch.randint(n_items, again.shape, device=users.device)
    return items


def kept_edges(edges: Edges, share: float, generator: torch.Generator) -> Edges:
    """ceil(E share) edges drawn without repeats with p ~ 1 / sqrt(d_u d_i) (degree-sensitive)."""
    count = -int(-len(edges.rows) * share // 1)
    users, items = torch.bincount(edges.rows), torch.bincount(edges.columns)
    log_p = -0.5 * (users[edges.rows].log() + items[edges.columns].log())
    # the largest of log p + Gumbel noise are a draw without repeats
    noise = torch.rand(len(log_p), generator=generator).clamp(min=1e-20)
    return edges.where((log_p - (-noise.log()).log()).topk(count).indices)


# --------------------------------------------------------------------------- neighbours


class Neighbours(NamedTuple):
    """The k best of each row, best first; `values` is -inf where there are fewer."""

    values: Tensor  # [R, k]
    columns: Tensor  # [R, k]

    def edges(self, floor: float = float("-inf")) -> Edges:
        """One edge for each neighbour whose value is above `floor`."""
        rows = torch.arange(len(self.values), device=self.values.device)
        rows = rows[:, None].expand_as(self.values)
        there = self.values > floor
        return Edges(rows[there], self.columns[there], self.values[there])


@torch.no_grad()
def nearest(vectors: Tensor, k: int, present: Tensor | None = None) -> Neighbours:
    """The k rows of largest cosine, itself first: vectors [R, d] -> [R, min(k, R)].

    More than k rows may equal a row; it is among its own all the same, unless it is zero. Rows that
    are not `present` are nobody's neighbours and have none.
    """
    unit = F.normalize(vectors, dim=1)

    def cosines(rows: Tensor) -> Tensor:
        block = unit[rows] @ unit.T
        if present is not None:
            block = block.masked_fill_(~(present[rows][:, None] & present), float("-inf"))
        own = block[torch.arange(len(rows)), rows]
        block[torch.arange(len(rows)), rows] = torch.where(own > 0, own + 1, own)  # before equals
        return block

    found = _best_of_blocks(cosines, len(vectors), k)
    return found._replace(values=found.values.clamp(max=1))


@torch.no_grad()
def co_occurrence(graph: SparseGraph, k: int, by_items: bool = False) -> Neighbours:
    """The k other users with most items in common, and how many (`by_items`: the other way round).

    Counts are the off-diagonal of R R^T (or R^T R) of the binary matrix, a block of rows at a time;
    a pair without anything in common does not count.
    """
    offsets, index = (
        (graph.back_offsets, graph.back_rows) if by_items else (graph.offsets, graph.columns)
    )
    others = graph.transposed if by_items else graph
    n, n_shared = len(offsets) - 1, len(graph.offsets if by_items else graph.back_offsets) - 1

    def counts(rows: Tensor) -> Tensor:
        degrees = offsets.diff()[rows]
        mine = index[offsets[rows[0]] : offsets[rows[-1] + 1]].long()
        columns = torch.arange(len(rows), device=mine.device).repeat_interleave(degrees)
        taken = torch.zeros(n_shared, len(rows), device=mine.device)
        taken[mine, columns] = 1.0
        shared = others(taken).T.contiguous()  # [b, n]
        shared[torch.arange(len(rows), device=mine.device), rows.to(mine.device)] = 0.0
        return shared.masked_fill_(shared == 0, float("-inf"))

    return _best_of_blocks(counts, n, k, n_shared)


def _best_of_blocks(
    block: Callable[[Tensor], Tensor], n: int, k: int, widest: int = 0
) -> Neighbours:
    """`block(rows)` is [b, n]; rows come in blocks that keep b max(n, widest) bounded."""
    size, k = max(1, min(_BLOCK_ROWS, _BLOCK_NUMBERS // max(n, widest, 1))), min(k, n)
    # one tensor for all: many small ones between large blocks would leave holes in the heap
    values, columns = torch.empty(n, k), torch.empty(n, k, dtype=torch.long)
    for rows in torch.arange(n).split(size):
        best = block(rows).topk(k, dim=1)
        values[rows], columns[rows] = best.values.cpu(), best.indices.cpu()
    return Neighbours(values, columns)
