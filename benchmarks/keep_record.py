"""Copy what is worth keeping of finished runs: settings, metrics, learning curve, ranks.

    python benchmarks/keep_record.py docs/results/beauty results/baseline_.../sasrec_seed42 ...
    python benchmarks/keep_record.py docs/results/beauty        # only print the table of records

Each run becomes `<place>/<model>[-<label>]_seed<seed>/` of some 60 KB. `ranks.npz` is packed for
size, `unpack` reads it back: twice the masked rank (ties end in .5), how much further down the same
target is when seen items stay in, and the steps between user rows; user ids are the data set's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import yaml

KEPT = ("metrics.json", "epochs.jsonl")
LOCAL = {"run": ("save_dir", "log_dir", "device"), "data": ("data_dir",)}  # of one machine only


def keep(run: Path, place: Path, label: str) -> Path:
    """Copy one run folder; returns the folder of the record."""
    metrics = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    name = metrics["model"] + (f"-{label}" if label else "")
    record = place / f"{name}_seed{metrics['seed']}"
    record.mkdir(parents=True, exist_ok=True)
    for file in KEPT:
        if (run / file).exists():
            shutil.copy(run / file, record / file)
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    for section, keys in LOCAL.items():
        for key in keys:
            settings[section].pop(key, None)
    (record / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    pack(run / "ranks.npz", record / "ranks.npz")
    return record


def pack(ranks_file: Path, target: Path) -> None:
    """Write the ranks of a run in the small form of the records."""
    with np.load(ranks_file, allow_pickle=False) as ranks:
        users, masked, unmasked = ranks["users"], ranks["masked"], ranks["unmasked"]
    doubled, below = np.rint(2 * masked), np.rint(2 * (unmasked - masked))
    kind = np.uint16 if doubled.max() < 2**16 and below.max() < 2**16 else np.uint32
    np.savez_compressed(
        target,
        user_steps=np.diff(users, prepend=0).astype(kind),
        masked_twice=doubled.astype(kind),
        seen_above_twice=below.astype(kind),
    )


def unpack(record: Path) -> dict[str, np.ndarray]:
    """Rows of users and both ranks of every target of a record."""
    with np.load(record / "ranks.npz", allow_pickle=False) as packed:
        masked = packed["masked_twice"] / 2
        return {
            "users": np.cumsum(packed["user_steps"].astype(np.int64)),
            "masked": masked,
            "unmasked": masked + packed["seen_above_twice"] / 2,
        }


def table(place: Path) -> str:
    """Markdown table of all records, best valid NDCG@10 last: test metrics under both maskings."""
    found = [
        (path.parent.name, json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(place.glob("*/metrics.json"))
    ]
    found.sort(key=lambda pair: pair[1]["valid"]["ndcg@10"])
    lines = [
        "| record | valid N@10 | R@10 | N@10 | R@10, unmasked | N@10, unmasked | parameters "
        "| epochs |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, run in found:
        both = run["test_by_masking"]
        cells = [run["valid"]["ndcg@10"]]
        cells += [both[m][k] for m in ("masked", "unmasked") for k in ("recall@10", "ndcg@10")]
        shown = " | ".join(f"{value:.4f}" for value in cells)
        speed = run["efficiency"]
        lines.append(f"| {name} | {shown} | {speed['parameters']:,} | {speed['epochs']} |")
    return "\n".join(lines)


def main() -> None:
    """Copy the runs named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("place", type=Path)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument(
        "--label", default="", help="what sets these runs apart, such as random-codes"
    )
    arguments = parser.parse_args()
    for run in arguments.runs:
        keep(run, arguments.place, arguments.label)
    print(table(arguments.place))


if __name__ == "__main__":
    main()
