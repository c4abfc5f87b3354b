"""Interquartile means and bootstrap intervals."""

import numpy as np
import pytest

from etpo.studies.statistics import (
    RESAMPLES,
    iqm,
    iqm_curve,
    iqm_estimate,
    probability_of_improvement,
)


def test_the_iqm_omits_a_quarter_at_each_end():
    assert iqm(np.array([100.0, 1, 2, 3, -50])) == 2  # 5 / 4, rounded down: one at each end
    assert iqm(np.array([0.0, 1, 2, 3, 4, 5, 6, 99])) == 3.5
    assert iqm(np.array([1.0, 2, 9])) == 4
    assert iqm(np.array([1.0, 2]), np.array([9.0, -9])) == 1.5  # of all strata together


def test_the_interval_is_the_percentile_bootstrap():
    values = np.array([0.1, 0.4, 0.5, 0.7, 0.95, 0.2])
    found = iqm_estimate([values])
    rng = np.random.default_rng(1)
    means = np.sort(rng.choice(values, (20000, 6)), axis=1)[:, 1:5].mean(axis=1)
    assert found.value == pytest.approx(0.45)
    assert (found.low, found.high) == pytest.approx(np.quantile(means, (0.025, 0.975)), abs=0.02)
    assert iqm_estimate([values]) == found  # to the digit


def test_strata_are_resampled_among_themselves():
    separate = iqm_estimate([np.array([0.0, 0.0]), np.array([1.0, 1.0])])
    assert separate == (0.5, 0.5, 0.5)
    mixed = iqm_estimate([np.array([0.0, 0.0, 1.0, 1.0])])
    assert (mixed.low, mixed.high) == (0, 1)


def test_no_interval_from_a_single_run():
    value, *ends = iqm_estimate([np.array([0.5]), np.array([1.0, 0.9])])
    assert value == pytest.approx(0.8)
    assert np.isnan(ends).all()
    assert np.isnan(iqm_estimate([np.array([])])).all()


def test_a_curve_has_an_estimate_per_iteration():
    curves = np.array([[0.0, 0.0, 0.0, 8.0], [1.0, 2.0, 3.0, 4.0]])
    middle, low, high = iqm_curve(curves)
    assert middle == pytest.approx([0.0, 2.5])
    for position in (0, 1):
        alone = iqm_estimate([curves[position]])
        assert (low[position], high[position]) == pytest.approx(alone[1:])
    middle, low, high = iqm_curve(curves[:, :1])
    assert middle.tolist() == [0, 1]
    assert np.isnan(low).all()
    assert low.shape == high.shape == (2,)


def test_the_probability_of_improvement():
    x, y = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0])
    # pairs: 1>0, 1<2, 2>0, 2=2, 3>0, 3>2
    assert probability_of_improvement([(x, y)]).value == pytest.approx(4.5 / 6)
    assert probability_of_improvement([(y, x)]).value == pytest.approx(1.5 / 6)
    always = (np.array([5.0, 6.0]), np.array([0.0, 1.0]))
    both = probability_of_improvement([(x, y), always])
    assert both.value == pytest.approx((4.5 / 6 + 1) / 2)
    assert 0.5 <= both.low < both.value < both.high == 1
    assert probability_of_improvement([always]) == (1, 1, 1)
    assert np.isnan(probability_of_improvement([])).all()


def test_the_interval_of_a_probability_resamples_both_methods():
    x, y = np.array([0.0, 1.0]), np.array([0.0, 1.0])
    found = probability_of_improvement([(x, y)])
    # x = (1, 1) and y = (0, 0) have probability 1/16
    assert found == (0.5, 0.0, 1.0)
    assert RESAMPLES >= 1000
