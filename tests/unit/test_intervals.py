"""Intervals, samples and paired comparisons against statsmodels, scipy and arithmetic by hand."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama2.evaluate.comparison import compare, holm, mcnemar, smallest_difference
from llama2.evaluate.intervals import Interval, mean_interval, standard_error, weighted_mean, wilson
from llama2.evaluate.strata import apportion, sample


@pytest.fixture(scope="module")
def scores() -> tuple[np.ndarray[Any, Any], list[str]]:
    """240 right or wrong answers in 30 clusters of unequal size, correlated within each."""
    random = np.random.default_rng(18)
    of = random.integers(0, 30, 240)
    ease = random.normal(size=30)
    right = (ease[of] + random.normal(size=240) > 0).astype(float)
    return right, [f"passage {c}" for c in of]


def test_standard_error_is_that_of_statsmodels(scores: tuple[Any, list[str]]) -> None:
    from statsmodels.stats.weightstats import DescrStatsW

    values, _ = scores
    found = mean_interval(values.tolist(), proportion=False)
    described = DescrStatsW(values)
    assert found.se == pytest.approx(described.std_mean, rel=1e-12)
    assert (found.low, found.high) == pytest.approx(described.zconfint_mean(), rel=1e-12)
    assert (found.n, found.clusters, found.method) == (240, None, "normal")


def test_clustered_standard_error_is_that_of_statsmodels(scores: tuple[Any, list[str]]) -> None:
    import statsmodels.api as sm

    values, clusters = scores
    numbers = [int(name.split()[1]) for name in clusters]
    fit = sm.OLS(values, np.ones(len(values))).fit(cov_type="cluster", cov_kwds={"groups": numbers})
    found = mean_interval(values.tolist(), clusters, proportion=True)
    assert found.se == pytest.approx(fit.bse[0], rel=1e-12)
    assert (found.low, found.high) == pytest.approx(fit.conf_int()[0], rel=1e-12)
    assert found.clusters == 30
    assert found.se > 1.3 * standard_error(values.tolist())  # these clusters do correlate


def test_clusters_of_one_and_samples_of_a_question_give_the_plain_formula() -> None:
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    assert standard_error(values, list("abcdef")) == pytest.approx(standard_error(values), rel=1e-14)
    # three questions, sampled twice each: their means are 1/2, 1/2, 1/2 … of pairs (0 1), (1 0), (1 0)
    assert standard_error(values, list("aabbcc")) == 0
    # means 1, 1/2, 0: s² = 1/4, so the error is √(1/4 / 3)
    assert standard_error([1, 1, 0, 1, 0, 0], list("aabbcc")) == pytest.approx(math.sqrt(1 / 12))


@pytest.mark.parametrize(("right", "n"), [(0, 20), (7, 20), (20, 20), (50, 99), (1, 1)])
def test_wilson_is_that_of_statsmodels(right: int, n: int) -> None:
    from statsmodels.stats.proportion import proportion_confint

    found = mean_interval([1.0] * right + [0.0] * (n - right), proportion=True)
    assert found.method == "Wilson"
    assert (found.low, found.high) == pytest.approx(proportion_confint(right, n, method="wilson"), abs=1e-12)


def test_wilson_where_no_value_differs_and_clusters_count_once() -> None:
    assert mean_interval([0.0] * 500, proportion=True).high == pytest.approx(wilson(0, 500)[1])
    clustered = mean_interval([1.0] * 500, ["a", "b"] * 250, proportion=True)
    assert (clustered.low, clustered.high) == pytest.approx(wilson(1, 2))
    assert mean_interval([0.0, 1.0] * 50, proportion=True).method == "normal"  # from 100 on


def test_one_value_has_an_infinite_error_that_json_shows_as_null() -> None:
    found = mean_interval([0.4], proportion=False)
    assert (found.se, found.low, found.high) == (math.inf, -math.inf, math.inf)
    assert found.to_json() == {
        "mean": 0.4, "se": None, "low": None, "high": None, "n": 1, "clusters": None, "method": "normal",
    }  # fmt: skip
    assert Interval.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="no values"):
        mean_interval([], proportion=True)


def test_mean_of_a_group() -> None:
    parts = [Interval(0.2, 0.03, 0, 0, 100, None, ""), Interval(0.6, 0.04, 0, 0, 300, None, "")]
    plain = weighted_mean(parts)
    assert (plain.mean, plain.se) == (pytest.approx(0.4), pytest.approx(0.025))  # √(3² + 4²) / 2
    assert (plain.low, plain.high) == pytest.approx((0.4 - 1.959964 * 0.025, 0.4 + 1.959964 * 0.025), abs=1e-7)
    weighted = weighted_mean(parts, [100, 300])
    assert (weighted.mean, weighted.n) == (pytest.approx(0.5), 400)  # (20 + 180) / 400
    assert weighted.se == pytest.approx(math.sqrt(3**2 + 12**2) / 400)


def test_paired_difference_is_that_of_scipy_and_statsmodels(scores: tuple[Any, list[str]]) -> None:
    import statsmodels.api as sm
    from scipy import stats

    a, clusters = scores
    random = np.random.default_rng(4)
    b = np.where(random.random(240) < 0.2, 1 - a, a)
    ids = [f"item {i}" for i in range(240)]
    found = compare(dict(zip(ids, a.tolist(), strict=True)), dict(zip(ids[::-1], b[::-1].tolist(), strict=True)))
    assert found.se == pytest.approx(stats.sem(a - b), rel=1e-12)
    assert found.difference == pytest.approx((a - b).mean(), rel=1e-12)
    assert found.correlation == pytest.approx(stats.pearsonr(a, b).statistic, rel=1e-12)
    assert (found.only_a, found.only_b) == (int((a > b).sum()), int((a < b).sum()))
    assert found.test == "McNemar, exact"
    of = dict(zip(ids, clusters, strict=True))
    clustered = compare(dict(zip(ids, a.tolist(), strict=True)), dict(zip(ids, b.tolist(), strict=True)), of)
    numbers = [int(name.split()[1]) for name in clusters]
    fit = sm.OLS(a - b, np.ones(240)).fit(cov_type="cluster", cov_kwds={"groups": numbers})
    assert clustered.se == pytest.approx(fit.bse[0], rel=1e-12)
    assert clustered.p == pytest.approx(fit.pvalues[0], rel=1e-9)
    assert (clustered.test, clustered.clusters) == ("normal", 30)


@pytest.mark.parametrize("counts", [(0, 0), (0, 5), (0, 6), (3, 3), (12, 25), (700, 640)])
def test_mcnemar_is_that_of_statsmodels(counts: tuple[int, int]) -> None:
    from statsmodels.stats.contingency_tables import mcnemar as oracle

    table = [[10, counts[0]], [counts[1], 10]]
    assert mcnemar(*counts) == pytest.approx(oracle(table, exact=True).pvalue, rel=1e-12)


def test_mcnemar_of_more_pairs_than_a_float_can_count() -> None:
    assert mcnemar(7000, 7042) == pytest.approx(math.erfc((42 - 1) / math.sqrt(14042) / math.sqrt(2)), rel=1e-3)


def test_smallest_difference_is_that_of_statsmodels() -> None:
    from statsmodels.stats.power import NormalIndPower

    effect = NormalIndPower().solve_power(nobs1=969, alpha=0.05, power=0.8, ratio=0)
    assert smallest_difference(1 / math.sqrt(969)) == pytest.approx(effect, rel=1e-4)
    # six items on one side alone: 2 / 2^6 = 0.03; five: 0.06
    same = compare({"1": 1.0, "2": 0.0}, {"1": 1.0, "2": 0.0})
    assert (same.se, same.p, same.smallest) == (0, 1.0, 3.0)


def test_a_comparison_needs_the_same_items() -> None:
    with pytest.raises(ValueError, match="same items"):
        compare({"1": 1.0}, {"2": 1.0})
    with pytest.raises(ValueError, match="same items"):
        compare({}, {})


def test_holm_is_that_of_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    p = {"piqa": 0.03, "boolq": 0.001, "copa": 0.04, "mmlu": 0.9, "arc": 0.0301}
    assert list(holm(p).values()) == pytest.approx(multipletests(list(p.values()), method="holm")[1])
    assert list(holm(p)) == list(p)
    assert holm({}) == {}


def test_a_sample_by_largest_remainders() -> None:
    # shares of ten: 5, 3.75, 1.25 → 5, 3, 1 and one more to the largest remainder, .75
    assert apportion({"a": 40, "b": 30, "c": 10}, 10, 0) == {"a": 5, "b": 4, "c": 1}
    # shares of ten of a thousand: 9.8, .1, .1: the small ones get one each, and the large one the rest
    assert apportion({"a": 980, "b": 10, "c": 10}, 10, 0) == {"b": 1, "c": 1, "a": 8}
    assert sum(apportion({"a": 5, "b": 5, "c": 5}, 2, 7).values()) == 2  # fewer than strata


def test_a_sample_is_seeded_and_not_the_first() -> None:
    strata = ["easy"] * 70 + ["hard"] * 30
    drawn = sample(100, 20, 1, strata)
    assert Counter(strata[i] for i in drawn) == {"easy": 14, "hard": 6}
    assert drawn == sample(100, 20, 1, strata) != sample(100, 20, 2, strata)
    assert drawn != list(range(20))
    assert set(sample(100, 10, 1)) < set(sample(100, 11, 1))
    assert sample(5, 9, 1) == [0, 1, 2, 3, 4]
    assert sample(0, 9, 1) == []


def test_each_item_is_drawn_equally_often() -> None:
    times = Counter(i for seed in range(2000) for i in sample(10, 3, seed))
    # 600 each, with a standard deviation of √(2000 · 0.3 · 0.7) = 20.5
    assert all(abs(times[i] - 600) < 5 * 20.5 for i in range(10))


@given(st.dictionaries(st.text(max_size=3), st.integers(1, 60), min_size=1), st.integers(1, 200), st.integers(0, 9))
def test_shares_of_a_sample(sizes: dict[str, int], limit: int, seed: int) -> None:
    total = sum(sizes.values())
    limit = min(limit, total)
    seats = apportion(sizes, limit, seed)
    assert sum(seats.values()) == limit
    assert seats.keys() == sizes.keys()
    assert all(0 <= seats[name] <= sizes[name] for name in sizes)
    if limit >= len(sizes):
        assert min(seats.values()) >= 1
    if all(Fraction(size * limit, total) >= 1 for size in sizes.values()):  # the quota rule
        assert all(abs(seats[name] - Fraction(size * limit, total)) < 1 for name, size in sizes.items())
