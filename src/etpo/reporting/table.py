"""Scores of runs -> one row per data set and method, and one per method over all data sets."""

import pandas as pd

from etpo.errors import ConfigError
from etpo.reporting.read import Raw
from etpo.reporting.statistics import Estimate, iqm_estimate, probability_of_improvement

PER_DATASET = (
    "final",
    "greedy",
    "best",
    "held_out_auc",
    "area",
    "steps_95",
    "steps_90",
    "seconds",
    "final_normalised",
    "greedy_normalised",
)
OVER_DATASETS = ("final_normalised", "greedy_normalised", "area")
COMPARED = ("final_normalised", "area")  # what the probability of improvement is of
COUNTS = ("reached_95", "reached_90", "collapses")  # runs


def method_order(methods: pd.Series, compare_with: str | None) -> list[str]:
    """The method that others are compared with, `etpo` or the first by default; then the rest.

    Raises ConfigError where no run has the method `compare_with`.
    """
    names = sorted(set(methods))
    if compare_with is not None and compare_with not in names:
        raise ConfigError(f"compare_with={compare_with}: allowed: {', '.join(names)}")
    first = compare_with or ("etpo" if "etpo" in names else names[0])
    return [first, *(name for name in names if name != first)]


def make_table(scores: pd.DataFrame, methods: list[str], references: pd.DataFrame) -> pd.DataFrame:
    """All rows of a report; `kind` tells them apart.

    method: a method on a data set; reference: a model's ROC AUC on it (`references`: dataset,
    model, auc); all: a method over all data sets. An estimate x has the columns x, x_low, x_high.
    """
    rows = []
    for dataset, runs in scores.groupby("dataset"):
        for method in methods:
            if (runs["method"] == method).any():
                rows.append(dataset_row(dataset, method, runs[runs["method"] == method]))
        for _, model in references[references["dataset"] == dataset].iterrows():
            names = {"kind": "reference", "dataset": dataset, "method": model["model"]}
            rows.append(names | {"held_out_auc": model["auc"]})
    for method in methods:
        rows.append(overall_row(scores, method, methods[0]))
    return pd.DataFrame(rows).astype(dict.fromkeys(["seeds", "datasets", *COUNTS], "Int64"))


def dataset_row(dataset: str, method: str, runs: pd.DataFrame) -> dict[str, object]:
    """Estimates over the seeds of one method on one data set."""
    row = {"kind": "method", "dataset": dataset, "method": method, "seeds": len(runs)}
    for name in PER_DATASET:
        row |= columns(name, iqm_estimate([runs[name].dropna().to_numpy()]))
    return row | {name: int(runs[name].sum()) for name in COUNTS}


def overall_row(scores: pd.DataFrame, method: str, compared: str) -> dict[str, object]:
    """Estimates over all runs of a method, and how often they are better than `compared`'s."""
    own, other = (
        dict(list(scores[scores["method"] == m].groupby("dataset"))) for m in (method, compared)
    )
    row = {
        "kind": "all",
        "dataset": "all",
        "method": method,
        "seeds": sum(map(len, own.values())),
        "datasets": len(own),
    }
    for name in OVER_DATASETS:
        row |= columns(name, iqm_estimate([r[name].dropna().to_numpy() for r in own.values()]))
    for name in COMPARED:
        pairs = [
            (own[dataset][name].to_numpy(), other[dataset][name].to_numpy())
            for dataset in own
            if dataset in other and method != compared
        ]
        row |= columns(f"improves_{name}", probability_of_improvement(pairs))
    return row | {"collapses": int(sum(runs["collapses"].sum() for runs in own.values()))}


def columns(name: str, estimate: Estimate) -> dict[str, float]:
    """The three columns of an estimate."""
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def cautions(raw: Raw, methods: list[str]) -> list[str]:
    """What keeps rows of the table from being comparable, one sentence each."""
    told = []
    for dataset, runs in raw.summary.groupby("dataset"):
        low, high = runs["env_steps"].min(), runs["env_steps"].max()
        if low != high:
            told.append(
                f"{dataset}: runs have {low} to {high} actions; the curve area is of the first "
                f"{low}, the final reward of each run's own end"
            )
    datasets = {m: set(runs["dataset"]) for m, runs in raw.summary.groupby("method")}
    for method in methods[1:]:
        if datasets[method] != datasets[methods[0]]:
            told.append(f"{method} and {methods[0]} were not run on the same data sets")
    return told
