"""Trie and beam search: exact where they may be, nothing but existing items, brute force agrees."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model_parts.base import Batch
from model_parts.beam import beam_search
from model_parts.generative import DecoderRecommender, Seq2SeqRecommender
from model_parts.trie import NOT_FOUND, Trie

quick = settings(max_examples=20, deadline=None, derandomize=True)
SIZES = {
    "width": 16, "layers": 2, "inner": 32, "dropout": 0.0, "codes": 5, "beams": 1000,
    "among": "all",
}  # fmt: skip


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def some_codes(n_items: int = 40, digits: int = 3, n_codes: int = 5, seed: int = 0) -> Tensor:
    return torch.randint(n_codes, (n_items, digits), generator=random(seed))


class Table:
    """A decoder whose next digit depends on the whole prefix through fixed random numbers."""

    def __init__(self, n_users: int, digits: int, n_codes: int) -> None:
        self.tables = [
            torch.log_softmax(torch.randn(n_users, n_codes**d, n_codes, generator=random(d)), dim=2)
            for d in range(digits)
        ]
        self.n_codes, self.prefix = n_codes, torch.zeros(n_users, 1, dtype=torch.int64)
        self.digit = 0

    def start(self) -> Tensor:
        return self.tables[0]

    def advance(self, parents: Tensor, codes: Tensor) -> Tensor:
        self.digit += 1
        self.prefix = self.prefix.gather(1, parents) * self.n_codes + codes
        rows = self.prefix[:, :, None].expand(-1, -1, self.n_codes)
        return self.tables[self.digit].gather(1, rows)

    def exact(self, codes: Tensor) -> Tensor:
        """[B, I] log-probability of every ID."""
        total, prefix = 0.0, torch.zeros(len(codes), dtype=torch.int64)
        for digit, table in enumerate(self.tables):
            total = total + table[:, prefix, codes[:, digit]]
            prefix = prefix * self.n_codes + codes[:, digit]
        return total


def all_owners(codes: Tensor) -> Tensor:
    return torch.arange(len(codes))


# ---- trie --------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 6), st.integers(0, 10_000))
def test_a_walk_through_the_trie_meets_every_id_and_no_other(n, digits, n_codes, seed) -> None:
    codes = some_codes(n, digits, n_codes, seed)
    trie = Trie(codes, all_owners(codes), n)
    walks = {(): 0}
    for level in range(digits):
        further = {}
        for prefix, node in walks.items():
            found = trie.children(level, torch.tensor([[node]]))
            for rank, code in enumerate(found.codes[0, 0].tolist()):
                if found.exist[0, 0, rank]:
                    further[(*prefix, code)] = int(found.first) + rank
        walks = further
    assert set(walks) == set(map(tuple, codes.tolist()))
    for item, own in enumerate(codes.tolist()):  # and the leaf is the one of that item
        assert trie.leaf_of_id[item] == walks[tuple(own)]


def test_a_trie_without_ids_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Trie(torch.empty(0, 3, dtype=torch.int64), torch.empty(0, dtype=torch.int64), 4)


# ---- search ------------------------------------------------------------------------------------


@quick
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_a_full_beam_equals_brute_force(n, digits, n_codes, seed) -> None:
    codes = some_codes(n, digits, n_codes, seed)
    trie, decoder = Trie(codes, all_owners(codes), n), Table(3, digits, n_codes)
    beams = beam_search(decoder, trie, width=10_000)
    assert (beams.scores.diff(dim=1) <= 0).all()
    found = trie.item_scores(beams.leaves, beams.scores)
    torch.testing.assert_close(found, decoder.exact(codes))


def test_a_user_finds_alone_what_is_found_beside_wider_beams() -> None:
    codes, widths = some_codes(30), torch.tensor([2, 9, 1, 5])
    trie = Trie(codes, all_owners(codes), 30)
    together = beam_search(Table(4, 3, 5), trie, widths)
    for user, width in enumerate(widths.tolist()):
        alone = beam_search(Table(4, 3, 5), trie, width)
        assert torch.equal(together.leaves[user, :width], alone.leaves[user])
        assert torch.equal(together.scores[user, :width], alone.scores[user])
        assert together.scores[user, width:].isneginf().all()


@pytest.mark.parametrize("width", [1, 2, 7])
def test_a_narrow_beam_equals_the_search_written_out_in_python(width: int) -> None:
    codes, decoder = some_codes(30), Table(4, 3, 5)
    valid = set(map(tuple, codes.tolist()))
    beams = beam_search(decoder, Trie(codes, all_owners(codes), 30), width)
    for user in range(4):
        kept = {(): 0.0}
        for digit in range(3):
            grown = {}
            for (prefix, score), code in product(kept.items(), range(5)):
                longer = (*prefix, code)
                if any(own[: digit + 1] == longer for own in valid):
                    row = sum(c * 5 ** (digit - 1 - i) for i, c in enumerate(prefix))
                    grown[longer] = score + float(decoder.tables[digit][user, row, code])
            kept = dict(sorted(grown.items(), key=lambda pair: -pair[1])[:width])
        ids = sorted(valid)
        assert [ids[leaf] for leaf in beams.leaves[user]] == list(kept)
        torch.testing.assert_close(beams.scores[user], torch.tensor(list(kept.values())))


def test_only_items_that_exist_are_found_and_the_rest_say_so() -> None:
    codes = torch.tensor([[0, 0], [0, 1], [4, 2]])
    trie, decoder = Trie(codes, all_owners(codes), 3), Table(2, 2, 5)
    beams = beam_search(decoder, trie, width=1)  # one ID a user
    scores = trie.item_scores(beams.leaves, beams.scores)
    for user in range(2):
        winner = scores[user].argmax()
        torch.testing.assert_close(scores[user, winner], decoder.exact(codes)[user, winner])
        assert (scores[user] == NOT_FOUND).sum() == 2


@quick
@given(st.integers(1, 60), st.integers(1, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_a_full_beam_among_existing_ids_equals_brute_force(n, digits, n_codes, seed) -> None:
    codes = some_codes(n, digits, n_codes, seed)
    trie, decoder = Trie(codes, all_owners(codes), n), Table(3, digits, n_codes)
    beams = beam_search(decoder, trie, width=10_000, existing=True)
    allowed = trie.allowed(codes, n_codes)  # [L, N, K]
    wanted, prefix = 0.0, torch.zeros(n, dtype=torch.int64)
    for digit, table in enumerate(decoder.tables):
        given_it_exists = table[:, prefix].masked_fill(~allowed[digit], float("-inf"))
        own = codes[None, :, digit, None].expand(3, -1, 1)
        wanted = wanted + given_it_exists.log_softmax(2).gather(2, own)[..., 0]
        prefix = prefix * n_codes + codes[:, digit]
    torch.testing.assert_close(trie.item_scores(beams.leaves, beams.scores), wanted)


def test_the_last_digit_is_asked_for_where_there_is_a_choice_alone() -> None:
    codes = torch.tensor([[0, 0], [0, 1], [1, 2], [2, 0], [3, 3]])
    decoder, asked = Table(2, 2, 5), []
    advance = decoder.advance
    decoder.advance = lambda parents, codes: asked.append(codes) or advance(parents, codes)
    beam_search(decoder, Trie(codes, all_owners(codes), 5), width=4, existing=True)
    assert [codes.tolist() for codes in asked] == [[[0], [0]]]


def test_probabilities_of_an_items_ids_add_up() -> None:
    codes = torch.tensor([[0, 0], [1, 1], [1, 2], [2, 0], [3, 3]])
    owners = torch.tensor([0, 1, 0, 0, 2])
    trie, decoder = Trie(codes, owners, 4), Table(2, 2, 5)
    beams = beam_search(decoder, trie, width=50)
    scores = trie.item_scores(beams.leaves, beams.scores)
    single = decoder.exact(codes)
    expected = torch.stack([single[:, owners == item].logsumexp(1) for item in range(3)], dim=1)
    torch.testing.assert_close(scores[:, :3], expected)
    assert (scores[:, 3] == NOT_FOUND).all()  # an item without an ID


def test_items_that_share_an_id_tie() -> None:
    codes = torch.tensor([[0, 1], [0, 1], [2, 2]])
    trie, decoder = Trie(codes, all_owners(codes), 3), Table(2, 2, 5)
    beams = beam_search(decoder, trie, width=9)
    torch.testing.assert_close(trie.item_scores(beams.leaves, beams.scores), decoder.exact(codes))


# ---- with the networks -------------------------------------------------------------------------


def make_model(kind: str, n_items: int = 40, **sizes: Any):
    torch.manual_seed(0)
    if kind == "seq2seq":
        own = SimpleNamespace(**SIZES | {"attention_heads": 2, "head_width": 4, "history": 20})
        model = Seq2SeqRecommender(n_items, own, digits=3)
    else:
        own = SimpleNamespace(**SIZES | {"heads": 2})
        model = DecoderRecommender(n_items, own, digits=3, max_history=8)
    for name, value in sizes.items():
        setattr(own, name, value)
    model.set_codes(torch.unique(some_codes(300), dim=0)[:n_items])
    return model.eval()


def make_batch(n_items: int = 40) -> Batch:
    lengths = torch.tensor([8, 5, 1, 0])
    inside = torch.arange(8) < lengths[:, None]
    items = torch.randint(1, n_items + 1, (4, 8), generator=random(3)) * inside
    return Batch(torch.arange(4), items, lengths, torch.zeros_like(items))


@torch.no_grad()
@pytest.mark.parametrize("among", ["all", "existing"])
@pytest.mark.parametrize("kind", ["seq2seq", "decoder"])
def test_scores_of_a_full_beam_are_the_losses_of_all_items(kind: str, among: str) -> None:
    model, batch = make_model(kind, among=among), make_batch()
    scores = model.score(batch)
    for user in range(3):  # the last one has no history, so no training example
        length = int(batch.lengths[user])
        for item in (1, 7, 40):
            history = batch.items[user : user + 1, :length]
            targets = torch.zeros_like(history)
            targets[0, -1] = item
            example = Batch(batch.users[:1], history, batch.lengths[user : user + 1], targets)
            loss = 3 * model.loss(example)["digits"]  # a mean over three digits
            torch.testing.assert_close(-scores[user, item - 1], loss, atol=1e-4, rtol=1e-4)
    whole = scores.exp().sum(1)  # what is given to IDs that no item has is lost
    if among == "existing":
        torch.testing.assert_close(whole, torch.ones(4))
    else:
        assert whole.max() < 0.9


@torch.no_grad()
@pytest.mark.parametrize("among", ["all", "existing"])
@pytest.mark.parametrize("kind", ["seq2seq", "decoder"])
def test_a_narrow_beam_scores_a_few_items_as_the_full_one_does(kind: str, among: str) -> None:
    batch = make_batch()
    narrow = make_model(kind, beams=6, among=among).score(batch)
    full = make_model(kind, among=among).score(batch)
    found = narrow > NOT_FOUND
    assert torch.equal(found.sum(1), 6 + batch.lengths), "seen items may take that many"
    torch.testing.assert_close(narrow[found], full[found], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["seq2seq", "decoder"])
def test_new_codes_get_a_new_trie(kind: str) -> None:
    model, batch = make_model(kind), make_batch()
    before = model.score(batch)
    other = make_model(kind)
    other.set_codes(model.codes.flip(0))
    model.load_state_dict(other.state_dict())
    assert not torch.allclose(model.score(batch), before)
    torch.testing.assert_close(model.score(batch), other.score(batch))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["seq2seq", "decoder"])
def test_items_with_one_id_share_its_probability_as_they_share_interactions(kind: str) -> None:
    model, batch = make_model(kind), make_batch()
    codes, interactions = model.codes.clone(), torch.zeros(40)
    codes[1], interactions[:2] = codes[0], torch.tensor([0.7, 2.7])  # .3 each are added
    model.set_codes(codes, interactions)
    together = model.score(batch).exp()
    torch.testing.assert_close(together[:, 1], 3 * together[:, 0])
    model.set_codes(codes.flip(0))  # interactions stay, the pair is another one
    pair = model.score(batch).exp()[:, 38:]
    torch.testing.assert_close(pair[:, 0], pair[:, 1])


def test_codes_that_are_allowed_go_on_to_an_id() -> None:
    codes = torch.unique(some_codes(60), dim=0)
    found = Trie(codes, all_owners(codes), len(codes)).allowed(codes, 5)  # [L, P, K]
    for digit in range(codes.shape[1]):
        for own, prefix in enumerate(codes[:, :digit]):
            followers = codes[(codes[:, :digit] == prefix).all(1), digit]
            expected = torch.isin(torch.arange(5), followers)
            assert torch.equal(found[digit, own], expected)


@torch.no_grad()
def test_only_the_newest_items_are_read() -> None:
    model, batch = make_model("seq2seq", history=3), make_batch()
    changed = batch._replace(items=batch.items.clone())
    changed.items[0, :5] = 1  # the first five of eight
    torch.testing.assert_close(model.score(changed), model.score(batch))
    changed.items[0, 5] = 1 + changed.items[0, 5] % 40
    assert not torch.allclose(model.score(changed)[0], model.score(batch)[0])
