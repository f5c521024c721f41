"""Case study: what a personalised model does for single users, in words a reader can check."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import our_models
from config import Config
from experiments.personal import batch_of, extreme_users, modality_weights, weight_names
from experiments.report import Entry, protocol
from experiments.runs import BEST, Task, load_model
from experiments.tables import Column, Table
from model_parts.base import Recommender, mask_items
from util import write_json

CASES = "case_study.json"
HISTORY, LISTED = 5, 5  # items shown of a history and of a list


def write_case_study(found: list[Entry], task: Task, folder: Path) -> None:
    """`case_study.json` for our best model, on valid, that weighs modalities by user; none, no
    file. Of users there are `full.case_users`, or more where there are more modalities."""
    ours = [entry for entry in found if entry.model in our_models.MODELS]
    for entry in sorted(ours, key=_on_valid, reverse=True):
        place = entry.runs[0].folder
        if not (place / BEST).exists():
            continue
        model, config = load_model(place, task.dataset.catalogue)
        histories = task.split.train_and_valid
        users = np.flatnonzero(histories.lengths > 0)
        weights = modality_weights(model, histories, users, config)
        if weights is not None:
            shown = max(config.full.case_users, weights.shape[1])
            users = extreme_users(users, weights, shown)[:shown]
            said = {"protocol": protocol(entry.runs[:1])}
            write_json(folder / CASES, said | _cases(model, config, task, users))
            return


def _on_valid(entry: Entry) -> float:
    return float(np.mean([run.result["valid"]["ndcg@10"] for run in entry.runs]))


@torch.inference_mode()
def _cases(model: Recommender, config: Config, task: Task, users: np.ndarray) -> dict[str, Any]:
    """The users, and the item whose IDs differ most among them."""
    dataset, histories = task.dataset, task.split.train_and_valid
    weights = modality_weights(model, histories, users, config)
    codes = model.item_ids(batch_of(model, histories, users, config.data.max_history)).cpu().numpy()
    names, cases = weight_names(dataset, weights.shape[1]), []
    for index, user in enumerate(users.tolist()):
        alpha = dict(zip(names, weights[index].tolist(), strict=True))
        cases.append(_case(model, config, task, user) | {"weights": alpha})
    star = None
    if codes.ndim == 3:
        nothing = np.zeros(codes.shape[1], dtype=int)
        differing = sum(((a != b).sum(1) for a, b in combinations(codes, 2)), start=nothing)
        item = int(differing.argmax())
        star = {
            "item": _item(task, item + 1),
            "ids": [codes[index, item].tolist() for index in range(len(users))],
        }
    return {"model": model.name, "users": cases, "item": star}


def _case(model: Recommender, config: Config, task: Task, user: int) -> dict[str, Any]:
    dataset, histories = task.dataset, task.split.train_and_valid
    batch = batch_of(model, histories, np.array([user]), config.data.max_history)
    seen = torch.from_numpy(histories.of(user).astype(np.int64))[None].to(batch.items)
    scores = mask_items(model.score(batch), seen)
    best = (scores.topk(min(LISTED, scores.shape[1]), dim=1).indices[0] + 1).tolist()
    position = np.flatnonzero(task.split.test.users == user)
    wanted: list[int] = []
    if len(position):
        start, end = task.split.test.offsets[position[0] : position[0] + 2]
        wanted = task.split.test.items[start:end].tolist()
    return {
        "user_id": str(dataset.user_ids[user]),
        "history": [_item(task, item) for item in histories.of(user)[-HISTORY:].tolist()],
        "recommended": [_item(task, item) | {"is_target": item in wanted} for item in best],
        "target": [_item(task, item) for item in wanted],
    }


def _item(task: Task, item: int) -> dict[str, str]:
    catalogue = task.dataset.catalogue
    return {
        "item_id": str(catalogue.item_ids[item - 1]),
        "title": str(catalogue.titles[item - 1]),
        "category": str(catalogue.categories[item - 1]),
    }


# --------------------------------------------------------------------------- tables


def case_tables(folder: Path) -> list[Table]:
    """The stored case study as two tables; none without one."""
    path = folder / CASES
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    said = (
        f"{content['protocol']} Model {content['model']}, of ours the best on valid; users who "
        "weigh each modality most."
    )
    tables = [_user_table(content, said)]
    if content["item"]:
        tables.append(_id_table(content, said))
    return tables


def _user_table(content: dict[str, Any], said: str) -> Table:
    rows = []
    for case in content["users"]:
        weights = ", ".join(f"{name} {value:.2f}" for name, value in case["weights"].items())
        listed = case["recommended"]
        for line in range(max(len(case["history"]), len(listed))):
            rows.append(
                {
                    "user": f"{case['user_id']} ({weights})" if line == 0 else "",
                    "history": _name(case["history"], line),
                    "recommended": _name(listed, line),
                    "hit": "yes" if line < len(listed) and listed[line]["is_target"] else "",
                    "target": _name(case["target"], line),
                    "case": case["user_id"],
                }
            )
    columns = [
        Column("user", "User (modality weights)", "s"), Column("history", "Newest history", "s"),
        Column("recommended", "Recommended", "s"), Column("hit", "Hit", "s"),
        Column("target", "Test item", "s"),
    ]  # fmt: skip
    note = f"{said} Histories oldest first, lists best first, seen items left out. Nothing is bold."
    return Table("case_users", "Users", note, columns, pd.DataFrame(rows), rule="case")


def _id_table(content: dict[str, Any], said: str) -> Table:
    star = content["item"]
    first = star["ids"][0]
    rows = [
        {
            "user": case["user_id"],
            "digits": " ".join(map(str, digits)),
            "differs": sum(a != b for a, b in zip(digits, first, strict=True)),
        }
        for case, digits in zip(content["users"], star["ids"], strict=True)
    ]
    columns = [
        Column("user", "User", "s"), Column("digits", "Digits of the ID", "s"),
        Column("differs", "Digits unlike the first user's", "d"),
    ]  # fmt: skip
    name = _name([star["item"]], 0)
    note = f"{said} The item whose IDs differ most among them: {name}. Nothing is bold."
    return Table("case_ids", "One item, several users", note, columns, pd.DataFrame(rows))


def _name(items: list[dict[str, str]], line: int) -> str:
    """`title [category]`, or the id where there is no title; empty beyond the end."""
    if line >= len(items):
        return ""
    item = items[line]
    title = item["title"] or item["item_id"]
    title = title if len(title) <= 48 else f"{title[:47]}…"
    return f"{title} [{item['category']}]" if item["category"] else title
