"""The serving API against PMAT itself, and what an update may and may not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from config import Config
from experiments.runs import Task
from model_parts.base import Batch, TrainingData
from model_parts.drift import NO_DRIFT
from our_models.mcrl import MCRL
from our_models.pmat import PMAT
from our_models.serving import Server
from util import seed_everything

# One mode of weights each, and every part of a score that does not come from digits.
MODELS: dict[str, dict[str, Any]] = {
    "user_item": {},
    "user": {"pmat.personalised": "user"},
    "none": {"pmat.personalised": "none"},
    "random": {"pmat.personalised": "random"},
    "permuted": {"pmat.personalised": "permuted"},
    "warm items": {"pmat.dynamic": False},
    "residual and prefix": {"pmat.beta": 0.5, "pmat.prefix": True},
    "no shared digits": {"pmat.shared_digits": 0},
    "cosines": {"pmat.temperature": 0.1},
}
USERS = range(8)


@pytest.fixture(scope="module")
def serve(tiny: Callable[..., Config], task: Task) -> Callable[..., Server]:
    """`serve("user_item", rate=1.0)` -> a new server of an untrained model with fitted codes."""
    made: dict[str, PMAT] = {}

    def make(name: str = "user_item", **settings: Any) -> Server:
        if name not in made:
            seed_everything(7)
            config = tiny("pmat", {"pmat.grid": 4} | MODELS[name], dropout=False)
            train, catalogue = task.split.train, task.dataset.catalogue
            made[name] = PMAT(config, catalogue)
            data = TrainingData(train, catalogue, train.n_users, catalogue.n_items)
            made[name].prepare(data, torch.Generator().manual_seed(7))
        return Server(made[name], task.split.train, **settings)

    return make


def batch(user: int, history: list[int]) -> Batch:
    """As data_utils would make it."""
    items = torch.tensor([history])
    return Batch(torch.tensor([user]), items, torch.tensor([len(history)]), items * 0)


def history(server: Server, user: int) -> list[int]:
    begin, end = server.histories.offsets[user : user + 2]
    return server.histories.items[begin:end].tolist()


def unlike(server: Server, user: int, n: int = 4) -> list[int]:
    """Items not in the history that are alike in one modality: they move the weights."""
    latents = server.model.latents[:, 1]
    closest = (latents @ latents[user]).argsort(descending=True) + 1
    return [i for i in closest.tolist() if i not in history(server, user)][:n]


def personal(server: Server, ids: Tensor) -> Tensor:
    return ids[:, server.model.own.shared_digits :]


# ---- a state just made -------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(MODELS))
def test_new_state_is_the_model(serve: Callable[..., Server], name: str) -> None:
    server = serve(name)
    for user in USERS:
        one = batch(user, history(server, user))
        assert torch.equal(server.item_ids(user), server.model.item_ids(one)[0])
        expected = server.model.score(one)[0].detach()
        assert torch.allclose(server.scores(user), expected, atol=1e-5)
        # items that share all digits tie, so compare what the lists are worth
        listed = server.model.recommend(one, 10)[0]
        found = server.recommend(user, 10)
        assert torch.allclose(expected[found - 1], expected[listed - 1], atol=1e-5)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_user_without_history_is_the_model_too(serve: Callable[..., Server], name: str) -> None:
    server = serve(name)
    nobody = len(server.histories.offsets)
    nothing = Batch(torch.tensor([nobody]), *torch.zeros(3, 1, 1, dtype=torch.long))
    nothing = nothing._replace(lengths=torch.zeros(1, dtype=torch.long))
    expected = server.model.score(nothing)[0].detach()
    assert torch.allclose(server.scores(nobody), expected, atol=1e-5)


def test_recommendations_are_unseen_and_unique(serve: Callable[..., Server]) -> None:
    server = serve()
    for user in USERS:
        server.update(user, unlike(server, user), force=True)
        found = server.recommend(user, 20).tolist()
        assert len(set(found)) == 20
        assert not set(found) & set(server.states[user].history)
    with pytest.raises(ValueError, match="not seen yet"):
        server.recommend(0, 50)


def test_history_longer_than_the_window(serve: Callable[..., Server]) -> None:
    server = serve(rate=1.0, margin=0.0)
    server.update(0, list(range(1, 31)), force=True)
    newest = server.states[0].history[-16:]
    assert torch.equal(server.item_ids(0), server.model.item_ids(batch(0, newest))[0])
    assert not set(server.recommend(0, 5).tolist()) & set(range(1, 31))


def test_user_without_history(serve: Callable[..., Server]) -> None:
    server = serve(rate=1.0, margin=0.0)
    empty = Batch(
        torch.tensor([999]), torch.zeros(1, 1).long(), torch.tensor([0]), torch.zeros(1, 1).long()
    )
    assert torch.equal(server.item_ids(999), server.model.item_ids(empty)[0])
    assert len(server.recommend(999, 50)) == 50
    assert server.update(999, [1]).p_value == 1.0
    server.update(999, [2, 3], force=True)
    assert torch.equal(server.item_ids(999), server.model.item_ids(batch(999, [1, 2, 3]))[0])


# ---- updates -----------------------------------------------------------------------------------


def test_a_test_does_not_depend_on_who_was_served_before(serve: Callable[..., Server]) -> None:
    found = []
    for order in ((0, 1, 2), (2, 1, 0)):
        server = serve(growth=1.0)
        assert server.update(0, []) == NO_DRIFT  # nothing new, nothing to test
        found.append({user: server.update(user, unlike(server, user)).p_value for user in order})
    assert found[0] == found[1]
    assert any(p < 1 for p in found[0].values())


@pytest.mark.parametrize("name", list(MODELS))
def test_full_step_is_a_full_recomputation(serve: Callable[..., Server], name: str) -> None:
    server = serve(name, rate=1.0, margin=0.0)
    changed = 0
    for user in USERS:
        before = server.item_ids(user)
        for items in (unlike(server, user), [5, 6]):
            server.update(user, items, force=True)
            one = batch(user, server.states[user].history[-16:])
            assert torch.equal(server.item_ids(user), server.model.item_ids(one)[0])
            expected = server.model.score(one)[0].detach()
            assert torch.allclose(server.scores(user), expected, atol=1e-5)
        changed += int((server.item_ids(user) != before).sum())
    follows = name in ("user_item", "user", "residual and prefix", "no shared digits", "cosines")
    assert bool(changed) == follows


def test_shared_digits_never_change(serve: Callable[..., Server]) -> None:
    server = serve(rate=1.0, margin=0.0)
    shared = server.model.own.shared_digits
    for user in USERS:
        before = server.item_ids(user)
        server.update(user, unlike(server, user), force=True)
        after = server.item_ids(user)
        assert torch.equal(before[:, :shared], after[:, :shared])


def test_update_without_drift_leaves_ids_alone(serve: Callable[..., Server]) -> None:
    server = serve(p_value=0.0)
    for user in USERS:
        before, scores = server.item_ids(user), server.scores(user)
        weights = server.states[user].items.weights
        server.update(user, unlike(server, user))
        assert torch.equal(server.item_ids(user), before)
        assert torch.equal(server.states[user].items.weights, weights)
        assert not torch.equal(server.scores(user), scores)  # the history still counts


def test_drift_moves_weights_and_starts_anew(serve: Callable[..., Server]) -> None:
    server = serve(p_value=1.0, rate=0.25, margin=0.0)
    before = server.item_ids(0), server._of(0).items.weights
    drift = server.update(0, unlike(server, 0))
    state = server.states[0]
    assert state.start == drift.cut > 0
    wanted = server._weights(0, state.history)[0]
    assert torch.allclose(state.items.weights - wanted, 0.75 * (before[1] - wanted), atol=1e-6)
    later = server.update(0, unlike(server, 0, 8)[4:])
    assert later.cut >= drift.cut


def test_first_items_make_codes_anew_and_later_ones_do_not(serve: Callable[..., Server]) -> None:
    server, other = serve(settled=3), serve()
    items = unlike(server, 0, 4)
    for n, item in enumerate(items, start=1):
        before = server.item_ids(999)
        server.update(999, [item])
        fresh = other._fresh(999, items[:n])
        if n <= 3:
            assert torch.equal(personal(server, server.item_ids(999)), fresh.items.codes)
            assert server.states[999].history == items[:n]
        else:
            assert torch.equal(server.item_ids(999), before)


def test_cosines_follow_codes_that_moved(serve: Callable[..., Server]) -> None:
    server = serve("cosines", rate=1.0, margin=0.0)
    server.scores(0)  # lengths of the vectors are kept from here on
    server.update(0, unlike(server, 0), force=True)
    fresh = serve("cosines")
    fresh.states[0] = fresh._fresh(0, list(server.states[0].history))
    torch.testing.assert_close(server.scores(0), fresh.scores(0), atol=1e-5, rtol=1e-5)


def test_tests_get_rarer_as_a_history_grows(
    serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    tested: list[int] = []
    monkeypatch.setattr(
        Server, "_detect", lambda _, state: tested.append(len(state.history)) or NO_DRIFT
    )
    for growth, expected in (
        (1.0, list(range(1, 13))),
        (2.0, [1, 2, 4, 8]),
        (1.5, [1, 2, 3, 5, 8, 12]),
    ):
        tested.clear()
        server = serve(growth=growth, settled=0)
        for item in range(1, 13):
            server.update(999, [item])
        assert tested == expected


def test_threshold_replaces_the_test(serve: Callable[..., Server]) -> None:
    never, always = (serve(threshold=t, p_value=p) for t, p in ((1e9, 1.0), (1e-9, 0.0)))
    for server in (never, always):
        server.update(0, unlike(server, 0))
    assert never.states[0].start == 0
    assert always.states[0].start > 0


def test_margin_keeps_digits_and_every_change_pays(serve: Callable[..., Server]) -> None:
    flips = []
    for margin in (0.0, 0.05, 0.2, 9.0):
        server = serve(rate=1.0, margin=margin)
        model, total = server.model, 0
        for user in USERS:
            old = server._of(user).items.codes
            server.update(user, unlike(server, user), force=True)
            new, weights = server.states[user].items.codes, server.states[user].items.weights
            points = model.grid[(weights.T[:, None] - model.grid).norm(dim=2).argmin(1)].T
            tables = (model.quantiser.tables(model.latents) * points[:, None, :, None]).sum(0)
            score = [tables.gather(2, c.T[..., None])[..., 0].T for c in (old, new)]
            gain = (score[1] - score[0]) * old.shape[1] ** 0.5
            assert (gain[old != new] > margin - 1e-6).all()
            best = (tables.max(2).values.T - score[0]) * old.shape[1] ** 0.5
            assert (best[old == new] <= margin + 1e-5).all()
            total += int((old != new).sum())
        flips.append(total)
    assert flips == sorted(flips, reverse=True)
    assert flips[0] > flips[2]
    assert flips[-1] == 0


# ---- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("item", [0, 51, -1])
def test_unknown_items_are_refused_and_nothing_changes(
    serve: Callable[..., Server], item: int
) -> None:
    server = serve()
    server.item_ids(0)
    before = list(server.states[0].history)
    with pytest.raises(ValueError, match="1 to 50"):
        server.update(0, [3, item])
    assert server.states[0].history == before


def test_late_weights_are_refused(tiny: Callable[..., Config], task: Task) -> None:
    model = PMAT(tiny("pmat", {"pmat.fusion": "late"}), task.dataset.catalogue)
    with pytest.raises(ValueError, match="late"):
        Server(model, task.split.train)


def test_users_and_items_are_whole_numbers(serve) -> None:
    server = serve()
    with pytest.raises(TypeError):
        server.recommend("u1", 3)
    with pytest.raises(TypeError):
        server.update(0, [2.7])
    with pytest.raises(ValueError, match="from 0"):
        server.item_ids(-1)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"permutations": 50}, "takes 99 permutations"),
        ({"permutations": 0, "p_value": 1.0}, "permutations"),
        ({"rate": 2.0}, "rate"),
        ({"growth": 0.5}, "growth"),
        ({"margin": -1.0}, "margin"),
    ],
)
def test_settings_with_which_nothing_would_work_are_refused(serve, settings, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        serve(**settings)


def test_the_number_of_recommendations_is_a_count(serve) -> None:
    server = serve()
    with pytest.raises(ValueError, match="asked for -1"):
        server.recommend(0, -1)
    with pytest.raises(TypeError):
        server.recommend(0, 2.5)
    assert len(server.recommend(0, 0)) == 0


def test_only_pmat_is_served(tiny, task) -> None:
    model = MCRL(tiny("mcrl"), task.dataset.catalogue)
    with pytest.raises(TypeError, match="not a MCRL"):
        Server(model, task.split.train)


def test_drift_of_topics_is_a_choice(serve, task) -> None:
    model = serve().model
    first = model.item_ids()[:, 0]
    common = first.bincount().argsort(descending=True)[:2]
    old, new = (torch.nonzero(first == topic)[:, 0] + 1 for topic in common)
    history = [int(old[i % len(old)]) for i in range(10)]
    later = [int(new[i % len(new)]) for i in range(5)]
    nobody = task.split.train.n_users  # starts with nothing
    server = Server(model, task.split.train, by="topics")
    server.update(nobody, history)
    assert server.update(nobody, later).p_value < 0.05
    with pytest.raises(ValueError, match="coherence or topics"):
        Server(model, task.split.train, by="mood")
