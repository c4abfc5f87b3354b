"""Estimates over seeds: interquartile means and bootstrap intervals (Agarwal et al. 2021).

"Deep RL at the edge of the statistical precipice", arXiv 2108.13264. A stratum holds the runs of
one data set. Runs are resampled within their stratum.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap, trim_mean

RESAMPLES, CONFIDENCE, SEED = 5000, 0.95, 0


class Estimate(NamedTuple):
    """A value and its 95% interval; nan if unknown."""

    value: float
    low: float
    high: float

    def columns(self, name: str) -> dict[str, float]:
        """Name the three numbers as in `table.csv`."""
        return dict(zip((name, f"{name}_low", f"{name}_high"), self, strict=True))


def iqm(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the mean of all strata's values without the lowest and highest floor(n / 4)."""
    return trim_mean(np.concatenate(strata, axis=axis), 0.25, axis=axis)


def iqm_estimate(strata: Sequence[np.ndarray]) -> Estimate:
    """Estimate the IQM over the runs of all strata, float [runs] each."""
    return estimate([stratum for stratum in strata if len(stratum)], iqm)


def iqm_curve(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the IQM over runs and its interval; float [iterations, runs] -> [iterations] each."""
    return iqm(curves), *interval([curves], iqm)


def probability_of_improvement(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> Estimate:
    """Estimate P(X > Y) + P(X = Y) / 2 of two runs, averaged over data sets.

    `pairs` holds the scores of X and of Y, float [runs] each, on every data set.
    """
    return estimate([x for x, _ in pairs] + [y for _, y in pairs], improvement)


def improvement(*strata: np.ndarray, axis: int = -1) -> np.ndarray:
    """Compute the probability of improvement from all X, followed by all Y."""
    strata = [np.moveaxis(stratum, axis, -1) for stratum in strata]
    count, shares = len(strata) // 2, []
    for x, y in zip(strata[:count], strata[count:], strict=True):
        x, y = x[..., :, None], y[..., None, :]
        shares.append(((x > y) + 0.5 * (x == y)).mean(axis=(-2, -1)))
    return np.mean(shares, axis=0)


def estimate(strata: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]) -> Estimate:
    """Return the value and the interval of `statistic`; nan without strata."""
    if not strata:
        return Estimate(np.nan, np.nan, np.nan)
    return Estimate(float(statistic(*strata)), *map(float, interval(strata, statistic)))


def interval(
    strata: Sequence[np.ndarray], statistic: Callable[..., np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the percentile bootstrap interval of `statistic`; runs are on the last axis.

    The interval is nan if a stratum has a single run.
    """
    if any(stratum.shape[-1] < 2 for stratum in strata):
        unknown = np.full(strata[0].shape[:-1], np.nan)
        return unknown, unknown
    rng = np.random.default_rng(SEED)
    settings = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "method": "percentile"}
    found = bootstrap(tuple(strata), statistic, axis=-1, vectorized=True, rng=rng, **settings)
    return found.confidence_interval.low, found.confidence_interval.high
