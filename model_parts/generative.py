"""What models that write semantic IDs share: a subclass supplies the codes of items in `prepare`.

    class MyModel(Seq2SeqRecommender):          # or DecoderRecommender
        def __init__(self, config, catalogue=None):
            super().__init__(config.n_items(catalogue), config.my_model, digits=4)
        def prepare(self, data, generator):
            self.set_codes(codes)               # [N, L]

`own`, the settings of the model, has what `config.Seq2Seq` or `config.DecoderOnly` declare. To be
overridden where a model differs: `history_codes` and `target_codes` (IDs that depend on the
context), `identifiers` (several IDs an item), `history_rows` (other tokens in front).
`temperature` divides the logits of the loss, not of scores.

Row K j + c of the token table is code c of digit j; `special` rows follow. A digit is predicted
among its own K codes, and the token rows are the output weights, too. With `own.among = existing`
it is predicted among the codes with which an ID that exists can go on, in the loss and in the beam
search: which IDs exist is known, and a short training should not be spent on learning it.

Items that share an ID share its probability: P(item) = P(ID) P(item | ID), by train counts.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model_parts.backbone import init_weights
from model_parts.base import Batch, Recommender
from model_parts.beam import beam_search
from model_parts.decoding import token_rows
from model_parts.residual import colliding_share
from model_parts.seq2seq import Cache, DecoderOnly, EncoderDecoder, Memory, keep_beams
from model_parts.trie import Trie

# Interactions that an item is taken to have had besides those of train, among items with its ID.
_PRIOR = 0.3


class GenerativeRecommender(Recommender):
    """Token table, loss on digits and beam search around a network that writes IDs."""

    codes: Tensor  # [N, L] int64, row i-1 is item i
    interactions: Tensor  # [N] of train
    share: Tensor  # [N] log P(item | its ID), 0 where no other item has it

    def __init__(
        self, n_items: int, own: Any, digits: int, network: nn.Module, special: int, scale: float
    ) -> None:
        """`scale` multiplies the logits."""
        super().__init__()
        self.own, self.digits, self.n_codes, self.scale = own, digits, own.codes, scale
        self.temperature = 1.0
        self.tokens = nn.Embedding(digits * own.codes + special, own.width)
        self.network = network
        self.register_buffer("codes", torch.zeros(n_items, digits, dtype=torch.int64))
        self.register_buffer("interactions", torch.zeros(n_items))
        self.register_buffer("share", torch.zeros(n_items))
        self._trie: Trie | None = None
        self.register_load_state_dict_post_hook(lambda model, _: model.forget_trie())

    # ----------------------------------------------------------------- IDs

    def set_codes(self, codes: Tensor, interactions: Tensor | None = None) -> None:
        """The IDs of all items [N, L]; items that share one share its probability as they share
        `interactions` [N], by default those given before."""
        self.codes.copy_(codes)
        if interactions is not None:
            self.interactions.copy_(interactions)
        group = torch.unique(self.codes, dim=0, return_inverse=True)[1]
        own = self.interactions + _PRIOR
        whole = torch.zeros_like(own).index_add(0, group, own)
        self.share.copy_((own / whole[group]).log())
        self.forget_trie()

    def identifiers(self) -> tuple[Tensor, Tensor]:
        """Every valid ID [I, L] and the item it belongs to [I], 0-based."""
        return self.codes, torch.arange(len(self.codes), device=self.codes.device)

    def trie(self) -> Trie:
        """The tree of valid IDs, built when needed."""
        if self._trie is None or self._trie.owners.device != self.codes.device:
            self._trie = Trie(*self.identifiers(), len(self.codes))
        return self._trie

    def forget_trie(self) -> None:
        """To be called when IDs have changed."""
        self._trie = None

    def history_codes(self, batch: Batch) -> Tensor:
        """[B, T, L], the ID of every item of the history; anything at padding."""
        return self.codes[(batch.items - 1).clamp(min=0)]

    # ----------------------------------------------------------------- tokens

    def code_rows(self, codes: Tensor) -> Tensor:
        """Rows of the token table of codes [P, L] or [B, T, L]."""
        return token_rows(codes.flatten(0, -2), self.n_codes).view_as(codes)

    def digit_logits(self, states: Tensor) -> Tensor:
        """States [P, L, d], the l-th predicts digit l -> logits [L, P, K]."""
        words = self.tokens.weight[: self.digits * self.n_codes].view(self.digits, self.n_codes, -1)
        return torch.bmm(states.transpose(0, 1), words.transpose(1, 2)) * self.scale

    def digit_loss(self, states: Tensor, codes: Tensor) -> Tensor:
        """Cross-entropy of codes [P, L] given states [P, L, d], mean over targets and digits."""
        logits = self.digit_logits(states).float() / self.temperature
        if self.own.among == "existing":
            logits = logits.masked_fill(~self.trie().allowed(codes, self.n_codes), float("-inf"))
        return F.cross_entropy(logits.flatten(0, 1), codes.T.flatten())

    # ----------------------------------------------------------------- scores

    def read(self, batch: Batch) -> tuple[Memory, Tensor]:
        """The history as the network remembers it, and the first input of decoding."""
        raise NotImplementedError

    def n_beams(self, batch: Batch) -> Tensor:
        """[B]: `beams` and one for each item of the history, which may be masked afterwards; other
        models lose no place of a list to items that are masked either."""
        return self.own.beams + batch.lengths

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """[B, N] log-probability of each item that a beam ended at, `NOT_FOUND` elsewhere."""
        memory, start = self.read(batch)
        trie = self.trie()
        existing = self.own.among == "existing"
        beams = beam_search(Writer(self, memory, start), trie, self.n_beams(batch), existing)
        return trie.item_scores(beams.leaves, beams.scores) + self.share

    def item_ids(self, batch: Batch | None = None) -> Tensor:
        """The codes, [N, L]: the same for every user."""
        return self.codes

    def describe(self) -> dict[str, Any]:
        """Adds the share of items whose ID nobody else has."""
        return super().describe() | {"unique_ids": 1 - colliding_share(self.codes)}


class Writer:
    """`beam.Decoder` of a model for the histories of one batch; good for one search."""

    def __init__(self, model: GenerativeRecommender, memory: Memory, start: Tensor) -> None:
        self.model, self.memory, self.first = model, memory, start
        self.cache: Cache | None = None
        self.digit = 0

    def start(self) -> Tensor:
        """See `beam.Decoder`."""
        return self._next(self.first)

    def advance(self, parents: Tensor, codes: Tensor) -> Tensor:
        """See `beam.Decoder`."""
        self.cache = keep_beams(self.cache, parents)
        rows = codes + self.model.n_codes * (self.digit - 1)
        return self._next(self.model.tokens(rows)[:, :, None])

    def _next(self, inputs: Tensor) -> Tensor:
        # [B, W, 1, d] -> log-probabilities of the next digit [B, W, K]
        states, self.cache = self.model.network.decode(inputs, self.memory, self.cache)
        first = self.digit * self.model.n_codes
        words = self.model.tokens.weight[first : first + self.model.n_codes]
        self.digit += 1
        logits = states[:, :, 0] @ words.T * self.model.scale
        return torch.log_softmax(logits.float(), dim=2)


# --------------------------------------------------------------------------- encoder-decoder


class Seq2SeqRecommender(GenerativeRecommender):
    """TIGER's generator: the newest `own.history` items in, the next item's ID out."""

    examples = "prefixes"

    def __init__(self, n_items: int, own: Any, digits: int, special: int = 1) -> None:
        network = EncoderDecoder(
            own.width, own.layers, own.attention_heads, own.head_width, own.inner, own.dropout
        )
        super().__init__(n_items, own, digits, network, special, scale=own.width**-0.5)

    def target_codes(self, batch: Batch) -> Tensor:
        """[B, L], the ID of the item after each history."""
        last = batch.targets.gather(1, (batch.lengths - 1)[:, None])
        return self.codes[last[:, 0] - 1]

    def history_rows(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Token rows [B, T L + 1] of the history and an end token, and which are real."""
        rows = F.pad(self.code_rows(self.history_codes(batch)).flatten(1), (0, 1))
        end = batch.lengths * self.digits
        rows.scatter_(1, end[:, None], self.digits * self.n_codes)
        return rows, torch.arange(rows.shape[1], device=rows.device) <= end[:, None]

    def read(self, batch: Batch) -> tuple[Memory, Tensor]:
        """See the base class."""
        rows, present = self.history_rows(newest_items(batch, self.own.history))
        return self.network.encode(self.tokens(rows), present)

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the next item's digits, each given the true ones before it."""
        return {"digits": self.target_loss(batch, *self.read(batch))}

    def target_loss(self, batch: Batch, memory: Memory, start: Tensor) -> Tensor:
        """That loss, given the history as the network remembers it."""
        codes = self.target_codes(batch)
        given = torch.cat(
            [start[:, 0], self.tokens(self.code_rows(codes))[:, :-1]], dim=1
        )  # [B, L, d]
        states, _ = self.network.decode(given[:, None], memory)
        return self.digit_loss(states[:, 0], codes)


def newest_items(batch: Batch, history: int) -> Batch:
    """The same batch with at most `history` items of each user, still left-aligned."""
    T = batch.items.shape[1]
    if history >= T:
        return batch
    first = (batch.lengths - history).clamp(min=0)
    place = first[:, None] + torch.arange(history, device=first.device)
    return Batch(
        batch.users,
        batch.items.gather(1, place),
        batch.lengths.clamp(max=history),
        batch.targets.gather(1, place),
    )


# --------------------------------------------------------------------------- decoder only


class DecoderRecommender(GenerativeRecommender):
    """GPT-2 on the IDs of a history in a row; a loss on every item but the first."""

    examples = "positions"

    def __init__(self, n_items: int, own: Any, digits: int, max_history: int) -> None:
        positions = 1 + (max_history + 1) * digits
        network = DecoderOnly(own.width, own.layers, own.heads, own.inner, own.dropout, positions)
        super().__init__(n_items, own, digits, network, special=1, scale=1.0)
        init_weights(self)

    def _with_begin(self, codes: Tensor) -> Tensor:
        # [B, T, L] -> [B, 1 + T L, d], a begin token first
        begin = self.tokens.weight[-1].expand(len(codes), 1, -1)
        return torch.cat([begin, self.tokens(self.code_rows(codes)).flatten(1, 2)], dim=1)

    def read(self, batch: Batch) -> tuple[Memory, Tensor]:
        """See the base class."""
        x = self._with_begin(self.history_codes(batch))
        end = batch.lengths * self.digits
        return self.network.encode(x, torch.arange(x.shape[1], device=x.device) <= end[:, None])

    def loss(self, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy of the digits of every item but the first, given all before them."""
        last = batch.targets.gather(1, (batch.lengths - 1)[:, None])
        items = F.pad(batch.items, (0, 1)).scatter(1, batch.lengths[:, None], last)
        codes = self.history_codes(batch._replace(items=items))  # [B, T + 1, L]
        states = self.network(self._with_begin(codes)[:, :-1]).unflatten(1, codes.shape[1:])
        wanted = batch.targets > 0
        return {"digits": self.digit_loss(states[:, 1:][wanted], codes[:, 1:][wanted])}
