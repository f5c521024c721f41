"""Comparisons as tables: models, ablations, groups of users, semantic IDs, speed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

import baseline_models
import our_models
from experiments.groups import user_groups
from experiments.personal import QUALITY_USERS
from experiments.report import COLUMNS, Entry, Run, informed, protocol, ranks_of
from experiments.runs import VALID_IN_GRAPH, Task
from experiments.tables import P_VALUE, Column, Table
from metrics import effect_size, holm, mean_std, paired_bootstrap
from util import machine_name

SIGNIFICANT = 0.05
USERS_ONLY = "by a paired bootstrap over users, which leaves out how training runs differ"
FEWEST = 20  # users on whom models are compared
FEWEST_DIFFERENT = 10  # of them with whom two models do not do equally well
COMPARED = ("difference", "low", "high", "p", "effect size")
INFORMED = "valid item in graph"  # column: whether a row is such a second line

# --------------------------------------------------------------------------- models


def baseline_table(found: list[Entry]) -> Table:
    """Means and deviations over seeds, best NDCG@10 first, each model against the reference."""
    rows = [
        {"model": entry.model, "seeds": len(entry.runs), INFORMED: False, **_means(entry)}
        for entry in found
    ]
    second = [row for entry in found for row in _informed_row(entry)]
    frame = pd.DataFrame(rows + second)
    best = reference(found)
    frame = frame.merge(_against(found, best), on="model", how="left")
    frame = frame.sort_values(
        [INFORMED, "ndcg@10"], ascending=[True, False], kind="stable", ignore_index=True
    )
    note = (
        f"Means{' ± standard deviations over seeds' if frame['seeds'].max() > 1 else ''}; best "
        "bold, second underlined."
    )
    if len(found) > 1 and len(best.users()) < FEWEST:
        note += f" Fewer than {FEWEST} users: no differences were tested."
    elif len(found) > 1:
        note += (
            f" NDCG@10 above (*) or below (†) that of {best.model}{_role(best)} at "
            f"p < {SIGNIFICANT}, {USERS_ONLY}, Holm."
        )
    if second:
        note += (
            " Rows 'valid item in graph': the same weights with the valid item added to the "
            "user-item graph, as sequence models read it at test; not compared."
        )
    note += _still_rising(found)
    columns = [Column("model", "Model", "s"), *(_metric(c) for c in COLUMNS)]
    if frame["seeds"].nunique() > 1:
        columns.insert(1, Column("seeds", "Seeds", ",.0f"))
    all_runs = [run for entry in found for run in entry.runs]
    return Table(
        "baseline_results", "Test metrics", f"{protocol(all_runs)} {note}", columns, frame,
        rule=INFORMED, apart=INFORMED,
    )  # fmt: skip


def _still_rising(found: list[Entry]) -> str:
    """A sentence on models whose best epoch is their last one with every seed, if there are any."""
    names = [e.model for e in found if all(_stopped_by_limit(run.result) for run in e.runs)]
    if not names:
        return ""
    return (
        f" Best at the last epoch of their schedule, so that more training might raise them: "
        f"{', '.join(names)}."
    )


def _stopped_by_limit(result: dict[str, Any]) -> bool:
    speed = result["efficiency"]
    return speed["epochs"] > 0 and speed["best_epoch"] == speed["epochs"]


def _over_seeds(found: list[Entry]) -> str:
    return "Means over seeds. " if max(len(entry.runs) for entry in found) > 1 else ""


def _informed_row(entry: Entry) -> list[dict[str, Any]]:
    """The second line of a model that reads no history; nothing for others."""
    if not all(VALID_IN_GRAPH in run.result for run in entry.runs):
        return []
    name, seeds = informed(entry.model), len(entry.runs)
    return [{"model": name, "seeds": seeds, INFORMED: True, **_means(entry, VALID_IN_GRAPH)}]


def _metric(name: str) -> Column:
    titles = {"recall": "R", "ndcg": "N", "mrr": "MRR"}
    stem, _, k = name.partition("@")
    return Column(name, f"{titles[stem]}@{k}" if k else titles[stem], best=1)


def _means(entry: Entry, part: str = "test") -> dict[str, float]:
    row: dict[str, float] = {}
    for name in (*COLUMNS, "hit_rate@10", "coverage@10", "cold_recall@10"):
        values = [run.result[part].get(name) for run in entry.runs]
        if None not in values:
            row[name], row[f"{name} std"] = mean_std(values)
    return row


def reference(found: list[Entry]) -> Entry:
    """The best baseline by NDCG@10 on valid; the best of all where there is no baseline. (Chosen
    on test, it would owe its place to luck in part, for which Holm's p does not allow.)"""
    among = [entry for entry in found if entry.model in baseline_models.MODELS] or found
    return max(among, key=lambda e: np.mean([run.result["valid"]["ndcg@10"] for run in e.runs]))


def _role(best: Entry) -> str:
    return ", the baseline that is best on valid," * (best.model in baseline_models.MODELS)


def _against(found: list[Entry], best: Entry) -> pd.DataFrame:
    """Difference in NDCG@10 to `best` with a 95 % interval, Holm's p and Cohen's d."""
    theirs = best.users()
    rows = []
    for entry in found:
        if entry.model != best.model:
            row = {"model": entry.model, "compared with": best.model}
            rows.append(row | compared(entry.users(), theirs))
    frame = pd.DataFrame(rows, columns=["model", "compared with", *COMPARED])
    frame = with_holm(frame).rename(columns={"difference": "ndcg@10 difference"})
    sure = frame["p (Holm)"] < SIGNIFICANT
    frame["ndcg@10 mark"] = _marks(frame["ndcg@10 difference"], sure)
    return frame


def _marks(differences: Any, sure: Any) -> list[str]:
    """* where a difference is surely above 0, † where surely below."""
    return [
        ("" if not s else "*" if d > 0 else "†") for d, s in zip(differences, sure, strict=True)
    ]


def compared(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """`COMPARED` of two models on the same users [E]; nothing where no interval can be relied on:
    of fewer than `FEWEST` users, or where the two differ with fewer than `FEWEST_DIFFERENT`, but
    for two models that are the same."""
    different = np.count_nonzero(ours != theirs)
    if len(ours) < FEWEST or 0 < different < FEWEST_DIFFERENT:
        return {}
    found = paired_bootstrap(ours, theirs)
    values = (found.difference, found.low, found.high, found.p_value, effect_size(ours, theirs))
    return dict(zip(COMPARED, values, strict=True))


def with_holm(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with all `COMPARED` columns and Holm's p over the rows that were compared."""
    missing = [name for name in COMPARED if name not in frame]
    frame = frame.assign(**dict.fromkeys([*missing, "p (Holm)"], np.nan))
    tested = frame["p"].notna()
    if tested.any():
        frame.loc[tested, "p (Holm)"] = holm(frame.loc[tested, "p"].to_numpy(float))
    return frame


# --------------------------------------------------------------------------- groups


def group_table(found: list[Entry], task: Task) -> Table:
    """NDCG@10 of the best baseline and of each of our models in groups of users."""
    best = reference(found)
    ours = [entry for entry in found if entry.model in our_models.MODELS and entry != best]
    values = {entry.model: entry.users() for entry in [best, *ours]}
    rows = []
    for name, members in user_groups(task, ranks_of(best.runs[0])).items():
        row: dict[str, Any] = {"group": name, "users": int(members.sum())}
        row |= {model: of_users[members].mean() for model, of_users in values.items()}
        for entry in ours:
            found_here = compared(values[entry.model][members], values[best.model][members])
            # there is a column even if no group is large enough
            low, high = (found_here.get(key, np.nan) for key in ("low", "high"))
            row |= {
                f"{entry.model} difference": found_here.get("difference", np.nan),
                f"{entry.model} low": low,
                f"{entry.model} high": high,
                f"{entry.model} difference mark": "*" * (low > 0) + "†" * (high < 0),
            }
        rows.append(row)
    columns = [Column("group", "Group", "s"), Column("users", "Users", ",")]
    columns += [Column(model, model) for model in values]
    columns += [Column(f"{entry.model} difference", f"Δ {entry.model}", "+.4f") for entry in ours]
    note = f"NDCG@10. {_over_seeds([best, *ours])}"
    if ours:
        note += (
            f"Δ against {best.model}{_role(best).rstrip(',')}; * its 95 % interval is above 0, † "
            f"below: {USERS_ONLY} and is not corrected for the number of groups; – fewer than "
            f"{FEWEST} users, or fewer than {FEWEST_DIFFERENT} with whom the two differ. What "
            "weights of the user add is in the ablations, not here: the models of this table "
            "differ in more than that. "
        )
    note += (
        "Short, long, missing most and least: at or beyond the quartiles; planted: the taste that "
        "the mock generator gave. Nothing is bold."
    )
    runs = [run for entry in [best, *ours] for run in entry.runs]
    return Table(
        "group_results", "Groups of users", f"{protocol(runs)} {note}", columns,
        pd.DataFrame(rows),
    )  # fmt: skip


# --------------------------------------------------------------------------- IDs and speed

QUALITY = (
    Column("uniqueness", "Unique", ".3f", 1),
    Column("uniqueness_per_user", "per user", ".3f"),
    Column("code_usage", "Codes used", ".3f"),
    Column("code_usage_worst_digit", "worst digit", ".3f"),
    Column("perplexity", "Perplexity", ".1f"),
    Column("semantic_consistency", "Consistency", ".3f", 1),
    Column("personalisation_discrimination", "Personal", ".3f", 1),
    Column("churn", "Churn", ".4f"),
)
SPEED = (
    Column("parameters", "Parameters", ",.0f"),
    Column("prepare_seconds", "Stage one s", ".1f"),
    Column("train_seconds", "Training s", ".1f"),
    Column("epochs", "Epochs", ".0f"),
    Column("peak_memory_mb", "Peak MB", ",.0f"),
    Column("id_generation_ms", "IDs ms", ".2f"),
    Column("latency_p50_ms", "1: p50 ms", ".2f", -1),
    Column("latency_p95_ms", "p95", ".2f"),
    Column("latency_p99_ms", "p99", ".2f"),
    Column("latency64_p50_ms", "64: p50 ms", ".1f", -1),
    Column("latency64_p95_ms", "p95", ".1f"),
    Column("latency64_p99_ms", "p99", ".1f"),
    Column("throughput_users_per_second", "Users/s", ",.0f", 1),
)


def id_tables(found: list[Entry]) -> list[Table]:
    """Quality of semantic IDs of the models that have any."""
    having = [entry for entry in found if entry.runs[0].result["id_quality"]]
    if not having:
        return []
    note = (
        "Unique: share of items whose ID no other item has; per user: under each user's own "
        "codes; consistency: Spearman of feature cosine and share of equal digits; personal: "
        "Spearman of code distance and modality-weight distance between users; churn: share of "
        "digits, also of those that all users share, that change with one more item. The last "
        "digit of tiger and cofirec only tells equal IDs apart. Of personal IDs, all but Unique "
        f"are of {QUALITY_USERS} users at most, one by one. {_over_seeds(having)}Highest Unique, "
        "Consistency and Personal bold, second underlined; the others are not ranked."
    )
    return [_facts(having, "id_quality", QUALITY, "ID quality", note)]


def efficiency_table(found: list[Entry]) -> Table:
    """Time to train and to answer, memory and size of all models.

    Of a model whose seeds ran on several machines, only those on the machine of the first. Rows of
    several machines are not ranked and say which is whose.
    """
    found = [
        entry._replace(runs=[run for run in entry.runs if machine(run) == machine(entry.runs[0])])
        for entry in found
    ]
    machines = dict.fromkeys(machine(entry.runs[0]) for entry in found)
    alone = len(machines) == 1
    note = (
        (f"On {next(iter(machines))}. " if alone else "")
        + "Stage one: what comes before the first epoch; "
        "epochs: how many were run; peak MB: the most memory of the run, less what the process "
        "held before it, – where the run was resumed; IDs ms: coding the whole catalogue for one "
        "user. Latency of one request for the 10 best items of 1 and of 64 users, from histories "
        "in memory to lists in memory, no p99 of fewer than 100 calls; users/s at 64. "
        f"{_over_seeds(found)}"
        + (
            "Fastest bold, second underlined."
            if alone
            else "Nothing is bold, since rows were measured on different machines: between them "
            "speed and memory compare nothing."
        )
    )
    speed = SPEED if alone else tuple(column._replace(best=0) for column in SPEED)
    table = _facts(found, "efficiency", speed, "Efficiency", note)
    if alone:
        return table
    frame = table.frame.assign(machine=[machine(entry.runs[0]) for entry in found])
    return table._replace(frame=frame, columns=[*table.columns, Column("machine", "Machine", "s")])


def machine(run: Run) -> str:
    """What a run was made on, and in which precision."""
    where = run.result["environment"]
    precision = where.get("training", "float32")
    begun = f", begun on {where['begun_on']}" if "begun_on" in where else ""
    return f"{machine_name(where)}, {where['threads']} threads, training in {precision}{begun}"


def _facts(
    found: list[Entry], part: str, columns: tuple[Column, ...], title: str, note: str
) -> Table:
    """Means over seeds of one section of metrics.json; columns nobody has are left out."""
    rows = []
    for entry in found:
        row: dict[str, Any] = {"model": entry.model, "seeds": len(entry.runs)}
        for key in dict.fromkeys(key for run in entry.runs for key in run.result[part]):
            values = [run.result[part].get(key) for run in entry.runs]
            row[key] = np.nan if None in values else float(np.mean(values))
        rows.append(row)
    frame = pd.DataFrame(rows)
    kept = [c for c in columns if c.key in frame and frame[c.key].notna().any()]
    runs = [run for entry in found for run in entry.runs]
    return Table(
        part, title, f"{protocol(runs)} {note}", [Column("model", "Model", "s"), *kept], frame
    )


# --------------------------------------------------------------------------- ablations


def ablation_table(found: list[Entry]) -> Table:
    """Each ablation against its full model, seed by seed the same data and protocol.

    The difference is paired by user and averaged over the seeds that both have.
    """
    rows = []
    for full in (entry for entry in found if not entry.label):
        rows.append({"model": full.model, "variant": "full model", **_ablated(full)})
        for entry in found:
            if entry.model == full.model and entry.label:
                row = {"model": entry.model, "variant": entry.label, **_ablated(entry)}
                rows.append(row | _delta(entry, full))
    frame = with_holm(pd.DataFrame(rows))
    frame["difference mark"] = _marks(frame["difference"], frame["p (Holm)"] < SIGNIFICANT)
    columns = [
        Column("variant", "Variant", "s"), Column("model", "Model", "s"),
        plain_metric("recall@10"), plain_metric("ndcg@10"),
        Column("difference", "Δ N@10", "+.4f"), Column("low", "low", "+.4f"),
        Column("high", "high", "+.4f"), Column("p (Holm)", "p (Holm)", P_VALUE),
    ]  # fmt: skip
    note = (
        "Every variant is trained anew. Δ: variant minus full model in NDCG@10 with the seeds both "
        f"have (– where they have none), with a 95 % interval {USERS_ONLY}; the interval is not "
        f"corrected, * (above) and † (below) are: p < {SIGNIFICANT} after Holm over all rows. "
        "Nothing is bold: "
        "rows are compared with their full model, not ranked."
    )
    runs = [run for entry in found for run in entry.runs]
    return Table(
        "ablation_results", "Ablations", f"{protocol(runs)} {note}", columns, frame, rule="model"
    )


def plain_metric(name: str) -> Column:
    """The column of a metric in a table that ranks nothing."""
    return _metric(name)._replace(best=0)


def _ablated(entry: Entry) -> dict[str, Any]:
    return {"seeds": len(entry.runs), **_means(entry)}


def _delta(entry: Entry, full: Entry) -> dict[str, float]:
    common = {run.seed for run in entry.runs} & {run.seed for run in full.runs}
    if not common:
        return {}
    ours, theirs = (
        one._replace(runs=[run for run in one.runs if run.seed in common]).users()
        for one in (entry, full)
    )
    return compared(ours, theirs)
