"""Figures of what is personal: modality weights, their drift, and the space of semantic IDs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from experiments.personal import PLANTED
from experiments.plots import COLOURS, DASHES, GREY, MARKERS, WIDTH, drawing, plain

LEADS = 0.5  # planted weight from which a modality counts as the user's leader
MAX_CATEGORIES = 6
MAX_POINTS = 3000  # of a t-SNE
SETTLED = 5  # items from which a user's weights are more than noise
AROUND = 8  # steps shown on each side of a planted drift


def weight_distribution(frame: pd.DataFrame, path: Path) -> None:
    """How modality weights spread over users; on mock by planted leader and against the plant.

    frame: the columns of `modality_weights.csv`.
    """
    names = [c for c in frame if c != "user_id" and not c.startswith(PLANTED)]
    planted = all(PLANTED + name in frame for name in names)
    if not planted:
        with drawing(path, 1, 1, (max(2.2, 1.1 * len(names)), 2.6)) as axes:
            _boxes(axes[0, 0], [frame[name] for name in names], names)
            axes[0, 0].set_ylabel("weight, mean over items")
        return
    groups = _planted_groups(frame, names)
    with drawing(path, 2, len(names), (2.35 * len(names), 4.6), sharey="row") as axes:
        for column, name in enumerate(names):
            parts = {group: frame[name][members] for group, members in groups.items()}
            _boxes(axes[0, column], list(parts.values()), list(parts))
            axes[0, column].set_title(f"weight of {name}")
            axes[0, column].set_xlabel("planted leader of the user")
            _against_plant(axes[1, column], frame[PLANTED + name], frame[name])
            axes[1, column].set_xlabel(f"planted weight of {name}")
        axes[0, 0].set_ylabel("learned weight")
        axes[1, 0].set_ylabel("learned weight")


def _planted_groups(frame: pd.DataFrame, names: list[str]) -> dict[str, pd.Series]:
    plant = frame[[PLANTED + name for name in names]]
    leader, strength = plant.to_numpy().argmax(1), plant.max(axis=1)
    groups = {name: (leader == i) & (strength >= LEADS) for i, name in enumerate(names)}
    groups["mixed"] = strength < LEADS
    return {name: members for name, members in groups.items() if members.any()}


def _boxes(axis: Axes, values: list[pd.Series], names: list[str]) -> None:
    drawn = axis.boxplot(
        values, tick_labels=names, widths=0.6, patch_artist=True, showfliers=False,
        medianprops={"color": "black"},
    )  # fmt: skip
    for index, box in enumerate(drawn["boxes"]):
        box.set_facecolor(COLOURS[index % len(COLOURS)] + "66")
    axis.set_ylim(0, 1)
    axis.grid(axis="x", visible=False)
    axis.tick_params(axis="x", length=0, rotation=30 if len(names) > 4 else 0)


def _against_plant(axis: Axes, planted: pd.Series, learned: pd.Series) -> None:
    axis.scatter(planted, learned, s=6, alpha=0.5, color=COLOURS[0], linewidths=0)
    axis.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle="--")
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    both = planted.std() > 0 and learned.std() > 0
    r = f"{np.corrcoef(planted, learned)[0, 1]:.2f}" if both else "–"
    axis.text(0.04, 0.93, f"r = {r}", transform=axis.transAxes)


# --------------------------------------------------------------------------- drift


def drift_timeline(frame: pd.DataFrame, path: Path) -> None:
    """How weights follow users: around planted drifts, or else of the users who moved most.

    frame: the columns of `modality_timeline.csv`.
    """
    if "planted step" in frame and (frame["planted step"] >= 0).any():
        _around_planted_drift(frame, path)
    else:
        _largest_moves(frame, path)


def _around_planted_drift(frame: pd.DataFrame, path: Path) -> None:
    """Weight of the modality that led before and of the one that leads after, mean over users.

    Beside it the users who never drift, around half of their history: their leader and another.
    """
    length = frame.groupby("user_id")["step"].transform("max")
    drifters = frame[frame["planted step"] >= 0]
    others = frame[frame["planted step"] < 0]
    names = _modalities(frame)
    another = dict(zip(names, names[1:] + names[:1], strict=True))
    others = others.assign(
        **{
            "planted step": (length[others.index] / 2).round(),
            "planted after": others["planted before"].map(another),
        }
    )
    panels = (
        ("users who drift", drifters, "items since the drift", ("led before", "leads after")),
        ("users who never drift", others, "items since half of the history", ("leads", "another")),
    )
    with drawing(path, 1, 2, (WIDTH, 2.7), sharey=True) as axes:
        for axis, (title, part, unit, labels) in zip(axes[0], panels, strict=True):
            axis.set_title(f"{title}, n = {part['user_id'].nunique()}")
            if len(part):
                _mean_lines(axis, part, labels)
                axis.legend(frameon=False, handlelength=3)
            axis.axvline(0, color="black", linewidth=0.8)
            axis.set_xlabel(unit)
        axes[0, 0].set_ylim(0, 1)
        axes[0, 0].set_ylabel("learned weight, mean over users")


def _modalities(frame: pd.DataFrame) -> list[str]:
    return [c for c in frame if c not in ("user_id", "step") and not c.startswith(PLANTED)]


def _mean_lines(axis: Axes, part: pd.DataFrame, labels: tuple[str, str]) -> None:
    relative = (part["step"] - part["planted step"]).astype(int)
    part = part.assign(relative=relative)[relative.abs() <= AROUND]
    columns = ("planted before", "planted after")
    for index, (label, column) in enumerate(zip(labels, columns, strict=True)):
        own = part[column].to_numpy()
        weights = part.assign(
            weight=[row[name] for name, row in zip(own, part.to_dict("records"), strict=True)]
        )
        found = weights.groupby("relative")["weight"].agg(["mean", "std", "count"])
        half = 1.96 * found["std"] / found["count"] ** 0.5  # nan, so no band, of one user alone
        axis.plot(
            found.index, found["mean"], color=COLOURS[index], linestyle=DASHES[index],
            marker=MARKERS[index], markersize=3.5, label=label,
        )  # fmt: skip
        axis.fill_between(
            found.index, found["mean"] - half, found["mean"] + half, color=COLOURS[index],
            alpha=0.15, linewidth=0,
        )  # fmt: skip


def _largest_moves(frame: pd.DataFrame, path: Path, n_users: int = 3) -> None:
    """All weights of the users whose weights range most once they have settled."""
    names = _modalities(frame)
    settled = frame[frame["step"] >= SETTLED] if (frame["step"] >= SETTLED).any() else frame
    spread = settled.groupby("user_id")[names].agg(lambda w: w.max() - w.min()).max(axis=1)
    movers = spread.sort_values(ascending=False).index[:n_users]
    with drawing(path, 1, len(movers), (WIDTH * len(movers) / 3, 2.4), sharey=True) as axes:
        for axis, user in zip(axes[0], movers, strict=True):
            part = frame[frame["user_id"] == user].sort_values("step")
            for index, name in enumerate(names):
                axis.plot(
                    part["step"], part[name], label=name, color=COLOURS[index % 7],
                    linestyle=DASHES[index % 7],
                )  # fmt: skip
            axis.set_title(plain(f"user {user}"))
            axis.set_xlabel("items seen")
        axes[0, 0].set_ylabel("learned weight")
        axes[0, 0].set_ylim(0, 1)
        axes[0, 0].legend(frameon=False, handlelength=3)


# --------------------------------------------------------------------------- ID space


def id_space(ids: pd.DataFrame, categories: dict[str, str], path: Path, seed: int = 0) -> None:
    """t-SNE of semantic IDs under the share of differing digits.

    Left: items under the ID without a user, by category. Right, where IDs depend on the user: the
    framed part of that map, with one item's ID for several users, the item whose IDs differ most.
    ids: the columns of `semantic_ids.csv`; categories: item_id -> label, may be empty.
    """
    ids = ids.assign(user_id=ids["user_id"].fillna("").astype(str))
    common = ids[ids["user_id"] == ""]
    if len(common) > MAX_POINTS:
        common = common.sample(MAX_POINTS, random_state=seed)
    personal = ids[(ids["user_id"] != "") & ids["item_id"].isin(common["item_id"])]
    star = _most_personal(personal)
    shown = personal[personal["item_id"] == star]
    points = _tsne(pd.concat([common, shown])["digits"], seed)
    labels = [categories.get(str(item), "") for item in common["item_id"]]
    panels = 2 if len(shown) else 1
    with drawing(path, 1, panels, (3.5 * panels, 3.6)) as axes:
        _by_category(axes[0, 0], points[: len(common)], labels)
        if len(shown):
            _one_item(axes[0, 1], points, len(common), shown, star)
            (left, right), (low, high) = axes[0, 1].get_xlim(), axes[0, 1].get_ylim()
            frame = Rectangle((left, low), right - left, high - low, fill=False, linewidth=0.8)
            axes[0, 0].add_patch(frame)
        for axis in axes[0]:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.grid(visible=False)


def _most_personal(personal: pd.DataFrame) -> str | None:
    """The item whose IDs differ in most digits, mean over users against the first one."""
    if personal.empty:
        return None
    differing = {}
    for item, texts in personal.groupby("item_id", sort=False)["digits"]:
        codes = np.array([text.split() for text in texts])
        differing[item] = (codes != codes[:1]).mean()
    return max(differing, key=differing.__getitem__)


def _tsne(digits: pd.Series, seed: int) -> np.ndarray:
    """[P, 2]; the distance of two IDs is the share of digits that differ."""
    from sklearn.manifold import TSNE

    codes = np.array([list(map(int, text.split())) for text in digits])
    distances = np.stack([(row != codes).mean(1) for row in codes]).astype(np.float32)
    perplexity = min(30.0, max(1.0, (len(codes) - 1) / 3))
    model = TSNE(
        metric="precomputed", init="random", perplexity=perplexity, random_state=seed, n_jobs=1
    )
    return model.fit_transform(distances)


def _by_category(axis: Axes, points: np.ndarray, labels: list[str]) -> None:
    counts = pd.Series([label for label in labels if label]).value_counts()
    names = list(counts.index[:MAX_CATEGORIES])
    rest = np.array([label not in names for label in labels])
    axis.scatter(*points[rest].T, s=7, color="#cccccc", linewidths=0)
    for index, name in enumerate(names):
        members = np.array([label == name for label in labels])
        axis.scatter(
            *points[members].T, s=12, color=COLOURS[index], marker=MARKERS[index],
            linewidths=0, label=plain(name[:28]),
        )  # fmt: skip
    axis.set_title("items, IDs without a user")
    if names:
        axis.legend(
            frameon=False, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.02),
            handletextpad=0.2, columnspacing=0.8,
        )  # fmt: skip


def _one_item(
    axis: Axes, points: np.ndarray, n_common: int, shown: pd.DataFrame, star: str | None
) -> None:
    axis.scatter(*points[:n_common].T, s=12, color="#bbbbbb", linewidths=0)
    own = points[n_common:]
    half = max(0.6 * np.ptp(own, axis=0).max(), 0.08 * np.ptp(points, axis=0).max(), 1e-6)
    middle = (own.max(0) + own.min(0)) / 2
    axis.set_xlim(middle[0] - half, middle[0] + half)
    axis.set_ylim(middle[1] - half, middle[1] + half)
    users = list(shown["user_id"])
    for index, (user, point) in enumerate(zip(users, own, strict=True)):
        axis.scatter(
            *point, s=110 - 70 * index / len(users), color=COLOURS[index % 7],
            marker=MARKERS[(index + index // 7) % 7], edgecolor="black", linewidth=0.6,
            zorder=3 + index,
            label=plain(f"user {user}"),
        )  # fmt: skip
    axis.set_title(plain(f"item {star} as different users have it"))
    axis.legend(
        frameon=False,
        fontsize=7,
        ncols=3,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.02),
        handletextpad=0.2,
        columnspacing=0.8,
    )
