"""Copy what is worth keeping of finished runs: settings, metrics, learning curve, ranks.

    python benchmarks/keep_record.py docs/results/beauty results/baseline_.../sasrec_seed42 ...
    python benchmarks/keep_record.py docs/results/beauty        # only print the table of records
    python benchmarks/keep_record.py docs/results/beauty --against bsarec

    python benchmarks/keep_record.py docs/results/beauty --restore results/beauty \
        --dataset ../shared/data/beauty                         # a folder for main.py --mode report

Each run becomes `<place>/<model>[-<label>]_seed<seed>/` of some 60 KB. `ranks.npz` is packed for
size, `unpack` reads it back: twice the masked rank (ties end in .5), how much further down the same
target is when seen items stay in, and the steps between user rows; user ids are the data set's.
"""

from __future__ import annotations

import json
import shutil
import sys
import zlib
from pathlib import Path

import numpy as np
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.command import Parser, command
from config import build_config
from experiments.modes import slug
from experiments.runs import RANKS, load_task, ordered_by_time, split_name
from metrics import Ranks, paired_bootstrap, per_user
from util import UserError, write_json, write_yaml

KEPT = ("metrics.json", "epochs.jsonl")
LOCAL = {"run": ("save_dir", "log_dir", "device"), "data": ("data_dir",)}  # of one machine only


def keep(run: Path, place: Path, label: str) -> Path:
    """Copy one run folder; returns the folder of the record. An ablation is labelled by its name.

    Raises UserError for a record, and where another run has that place already.
    """
    with np.load(run / RANKS, allow_pickle=False) as ranks:
        if "masked" not in ranks:
            raise UserError(f"{run} is a record already, not the folder of a run.")
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    label = label or slug(metrics["label"])
    name = metrics["model"] + (f"-{label}" if label else "")
    record = place / f"{name}_seed{metrics['seed']}"
    if (record / "metrics.json").exists():
        known = json.loads((record / "metrics.json").read_text(encoding="utf-8"))
        if known["test"] != metrics["test"]:
            raise UserError(f"{record} is the record of another run; give this one a --label.")
    record.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (run / file).exists():
            shutil.copy(run / file, record / file)
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    for section, keys in LOCAL.items():
        for key in keys:
            settings[section].pop(key, None)
    (record / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    pack(run / RANKS, record / RANKS)
    return record


def pack(ranks_file: Path, target: Path) -> None:
    """Write the ranks of a run in the small form of the records."""
    with np.load(ranks_file, allow_pickle=False) as ranks:
        users, masked, unmasked = ranks["users"], ranks["masked"], ranks["unmasked"]
        targets = ranks["targets"]
    doubled, below = np.rint(2 * masked), np.rint(2 * (unmasked - masked))
    kind = np.uint16 if doubled.max() < 2**16 and below.max() < 2**16 else np.uint32
    np.savez_compressed(
        target,
        user_steps=np.diff(users, prepend=0).astype(kind),
        masked_twice=doubled.astype(kind),
        seen_above_twice=below.astype(kind),
        targets_crc32=np.uint32(_checksum(targets)),
    )


def unpack(record: Path) -> dict[str, np.ndarray]:
    """Rows of users and both ranks of every target of a record, and a checksum of the target items
    in those made since there is one."""
    with np.load(record / "ranks.npz", allow_pickle=False) as packed:
        masked = packed["masked_twice"] / 2
        checksum = {"targets_crc32": packed["targets_crc32"]} if "targets_crc32" in packed else {}
        return checksum | {
            "users": np.cumsum(packed["user_steps"].astype(np.int64)),
            "masked": masked,
            "unmasked": masked + packed["seen_above_twice"] / 2,
        }


def table(place: Path, against: str = "") -> str:
    """Markdown table of all records, best valid NDCG@10 last: means over seeds under both maskings.

    With `against`, the name of a record without its seed, also the difference in NDCG@10 of every
    user (seen items masked, mean over the seeds each side has) with a 95 % bootstrap interval.
    Raises UserError where there is no record, or none of that name, or where records that are to
    be compared were tested in different ways.
    """
    groups: dict[str, list[Path]] = {}
    for record in _records(place):
        groups.setdefault(record.name.rpartition("_seed")[0], []).append(record)
    if against and against not in groups:
        raise UserError(
            f"--against {against}: {place} has no such record; there are {', '.join(groups)}."
        )
    theirs = _gains(groups[against]) if against else None
    if against:
        _check_alike([record for records in groups.values() for record in records])
    rows = sorted(_row(name, records, against, theirs) for name, records in groups.items())
    head = [
        "record", "seeds", "valid N@10", "R@10", "N@10", "R@10, unmasked", "N@10, unmasked",
        "parameters", "epochs",
    ] + [f"N@10 minus {against}"] * bool(against)  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + [line for _, line in rows])


def restore(place: Path, folder: Path, dataset: str, mode: str) -> None:
    """Make a run folder of mode `baseline` or `ablation` out of records, for mode report.

    Semantic IDs and modality weights of users are not in records, so their figures are not drawn.
    Raises UserError where there is no record, or where records are not of this data set.
    """
    records = _records(place)
    request = {"run.mode": mode, "data.dataset": dataset}
    config = build_config(request)
    task = load_task(config)
    test, user_ids = task.split.test, task.dataset.user_ids
    owners = np.repeat(test.users, np.diff(test.offsets))
    for record in records:
        target = folder / record.name
        result = json.loads((record / "metrics.json").read_text(encoding="utf-8"))
        name = record.name.rpartition("_seed")[0]
        result["label"] = name.removeprefix(result["model"]).removeprefix("-").replace("-", " ")
        result["protocol"]["split"] = split_name(task.dataset)  # as it is called now
        result["protocol"]["timed"] = ordered_by_time(task.dataset)
        ranks = unpack(record)
        checksum = ranks.pop("targets_crc32", None)  # older records have none
        same = np.array_equal(ranks["users"], owners) and checksum in (None, _checksum(test.items))
        if not same or result["protocol"]["tie_policy"] != config.data.tie_policy:
            raise UserError(
                f"{record} is not of --dataset {dataset}, or was read with other settings."
            )
        target.mkdir(parents=True, exist_ok=True)
        write_json(target / "metrics.json", result)
        if (record / "epochs.jsonl").exists():
            shutil.copy(record / "epochs.jsonl", target)
        np.savez_compressed(
            target / "ranks.npz", user_ids=user_ids[owners], targets=test.items, **ranks
        )
    write_yaml(folder / "request.yaml", {"flags": request, "overlay": {}})


def _check_alike(records: list[Path]) -> None:
    """Raise UserError unless all records are of the same users, in the same order of time."""
    found = []
    for record in records:
        result = json.loads((record / "metrics.json").read_text(encoding="utf-8"))
        counts = [result["dataset"][key] for key in ("users", "items", "interactions")]
        found.append((*counts, result["protocol"]["tie_policy"], unpack(record)["users"].tobytes()))
    for record, facts in zip(records, found, strict=True):
        if facts != found[0]:
            raise UserError(
                f"{records[0]} and {record} were not tested alike (users, items, interactions, "
                "tie_policy); keep them in different folders."
            )


def _checksum(items: np.ndarray) -> int:
    return zlib.crc32(items.astype(np.int64).tobytes())


def _records(place: Path) -> list[Path]:
    """Folders of all records, by name. Raises UserError where there is none."""
    found = [path.parent for path in sorted(place.glob("*/metrics.json"))]
    if not found:
        raise UserError(
            f"{place} holds no records: name a folder that does, or runs to keep there."
        )
    return found


def _row(
    name: str, records: list[Path], against: str, theirs: np.ndarray | None
) -> tuple[float, str]:
    runs = [json.loads((r / "metrics.json").read_text(encoding="utf-8")) for r in records]
    valid = [run["valid"]["ndcg@10"] for run in runs]
    cells = [f"{np.mean(valid):.4f}"]
    for masking in ("masked", "unmasked"):
        for metric in ("recall@10", "ndcg@10"):
            values = [run["test_by_masking"][masking][metric] for run in runs]
            spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
            cells.append(f"{np.mean(values):.4f}{spread}")
    speed = runs[0]["efficiency"]
    epochs = sorted({run["efficiency"]["epochs"] for run in runs})
    cells += [
        f"{speed['parameters']:,}",
        " to ".join(map(str, epochs[:1] + epochs[1:][-1:])),
    ]
    if theirs is not None:
        cells.append("" if name == against else _difference(_gains(records), theirs))
    return float(np.mean(valid)), f"| {name} | {len(runs)} | {' | '.join(cells)} |"


def _difference(ours: np.ndarray, theirs: np.ndarray) -> str:
    found = paired_bootstrap(ours, theirs)
    return f"{found.difference:+.4f} ({found.low:+.4f} to {found.high:+.4f})"


def _gains(records: list[Path]) -> np.ndarray:
    """NDCG@10 of every user, mean over records; users come in the same order in all of them."""
    return np.mean([_gain_of(unpack(record)) for record in records], axis=0)


def _gain_of(record: dict[str, np.ndarray]) -> np.ndarray:
    users, counts = np.unique(record["users"], return_counts=True)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    ranks = Ranks(users, record["masked"], offsets, np.ones(len(record["masked"]), dtype=int))
    return per_user(ranks, "ndcg", 10)


@command
def main(arguments: list[str] | None = None) -> None:
    """Copy the runs named on the command line."""
    parser = Parser(__doc__)
    parser.add_argument("place", type=Path, help="folder of the records")
    parser.add_argument("runs", type=Path, nargs="*", help="folders of finished runs to keep there")
    parser.add_argument(
        "--label", default="", help="what sets these runs apart, such as random-codes"
    )
    parser.add_argument(
        "--against", default="", help="record that others are compared with, without its seed"
    )
    parser.add_argument("--restore", type=Path, help="run folder to make of the records")
    parser.add_argument("--dataset", help="restore: the data set that the records are of")
    parser.add_argument(
        "--mode", default="baseline", choices=("baseline", "ablation"),
        help="restore: tables of it (default baseline)",
    )  # fmt: skip
    asked = parser.parse_args(arguments)
    if asked.restore:
        if asked.runs or not asked.dataset:
            raise UserError("--restore wants --dataset, what the records are of, and no runs.")
        restore(asked.place, asked.restore, asked.dataset, asked.mode)
        print(f"Now: python main.py --mode report --from {asked.restore}")
        return
    for run in asked.runs:
        for file in ("metrics.json", "config.yaml", RANKS):
            if not (run / file).exists():
                raise UserError(f"{run} is no finished run: it has no {file}.")
    for run in asked.runs:
        keep(run, asked.place, asked.label)
    print(table(asked.place, asked.against))


if __name__ == "__main__":
    sys.exit(main())
