"""What a run is called in a report: its method and its data set."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etpo.config import IGNORED_KEYS

# overrides that never tell methods apart: they name the seed, the data or the algorithm itself
APART = {*IGNORED_KEYS, "seed", "algorithm"}
APART |= {"environment.dataset", "environment.path", "environment.target"}


Choices = tuple[str, dict[str, str]]  # a run's algorithm and overrides


def overrides_of(arguments: Sequence[str]) -> dict[str, str]:
    """Key -> value of a command line's overrides; `~key` has an empty value."""
    pairs = (argument.partition("=") for argument in arguments)
    return {key.lstrip("+"): value for key, _, value in pairs}


def method_labels(runs: Sequence[Choices], others: Sequence[Choices] = ()) -> list[str]:
    """For every run its algorithm and the overrides in which runs of that algorithm differ.

    An override is named by the last part of its key, or by the whole key where two that differ
    end alike: `etpo eta=0.3`. `others`, as cells that are not finished, count for what differs, so
    that a label does not change as a study goes on.
    """
    differing = {
        algorithm: differing_keys([o for a, o in (*runs, *others) if a == algorithm])
        for algorithm, _ in runs
    }
    keys = set().union(*differing.values())
    ends = [key.rpartition(".")[2] for key in keys]
    short = {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)}
    labels = []
    for algorithm, own in runs:
        told = [key for key in sorted(differing[algorithm]) if key in own]
        labels.append(" ".join([algorithm, *(f"{short[key]}={own[key]}" for key in told)]))
    return labels


def differing_keys(overrides: Sequence[dict[str, str]]) -> set[str]:
    """The keys that do not have one value, or none, in all of `overrides`."""
    keys = set().union(*overrides) - APART
    return {key for key in keys if len({own.get(key) for own in overrides}) > 1}


def dataset_label(summary: dict[str, Any], overrides: dict[str, str]) -> str:
    """The data set's name; a CSV file's stem; a mixture's names; else the environment's name."""
    dataset = summary["dataset"]
    if dataset == "csv" and "environment.path" in overrides:
        return Path(overrides["environment.path"]).stem
    if isinstance(dataset, list):
        return "+".join(dataset)
    return dataset or summary["environment"]
