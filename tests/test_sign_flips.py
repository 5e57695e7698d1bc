"""Scores of two runs on the same examples: Fisher's own count, a plain loop, and how often chance is an alarm."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from smidgen.common.errors import DataError
from smidgen.studies.statistics.sign_flips import flip_signs

# Heights of Darwin's fifteen pairs of maize plants, crossed less self-fertilised, in eighths of an inch (Fisher 1935)
MAIZE = np.array([49, -67, 8, 16, 6, 23, 28, 41, 14, 29, 56, 24, 75, 60, -48])


def by_chance(count, trials, rate):
    """Whether so many of the trials may be chance, at a true rate."""
    return stats.binomtest(count, trials, rate).pvalue > 1e-4


def test_darwins_maize_as_fisher_counted():
    # 1,726 of the 32,768 sums lie as far from zero as the one that was seen: 5.267 %
    found = flip_signs(MAIZE, np.zeros(15), draws=2**15)
    assert found.exact
    assert found.p == pytest.approx(1726 / 32768)
    assert found.mean == pytest.approx(314 / 15)
    sampled = flip_signs(MAIZE, np.zeros(15))
    assert not sampled.exact
    assert sampled.p == pytest.approx(1726 / 32768, abs=0.01)


def test_all_flips_are_the_plain_loop():
    d = np.array([0.3, -0.1, 0.8, 0.4, 0.25, -0.05])
    sums = [sum(s * x for s, x in zip(signs, d, strict=True)) for signs in itertools.product((1, -1), repeat=6)]
    plain = sum(abs(s) >= abs(d.sum()) - 1e-12 for s in sums) / 64
    found = flip_signs(d + 1, np.ones(6))
    assert (found.p, found.mean) == (pytest.approx(plain), pytest.approx(d.mean()))
    one_way = sum(s >= d.sum() - 1e-12 for s in sums) / 64
    assert found.p == pytest.approx(2 * one_way)  # twice that of one side


def test_flips_that_fit_the_draws_are_all_counted():
    for size, exact in ((13, True), (14, False)):  # 2^13 = 8,192 of 9,999
        first, second = (flip_signs(MAIZE[:size], np.zeros(size), seed=seed) for seed in (0, 1))
        assert first.exact == exact
        assert (first.p == second.p) == exact


def test_swap_shift_order_and_seed():
    a, b = np.random.default_rng(0).normal(size=(2, 40))
    found = flip_signs(a, b)
    assert flip_signs(a, b) == found
    assert flip_signs(b, a).p == pytest.approx(found.p)
    assert flip_signs(b, a).mean == pytest.approx(-found.mean)
    assert flip_signs(a + 5, b + 5).p == pytest.approx(found.p)
    order = np.random.default_rng(1).permutation(40)
    assert flip_signs(a[order], b[order]).p == pytest.approx(found.p, abs=0.03)
    assert flip_signs(a[order], b).p != pytest.approx(found.p, abs=0.001)  # other pairs


def test_near_the_t_test_where_scores_are_normal():
    a, b = np.random.default_rng(2).normal(size=(2, 3000)) + np.array([[0.05], [0.0]])
    assert flip_signs(a, b, draws=4000).p == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)


def test_equal_and_single_scores():
    assert flip_signs([1.0] * 40, [1.0] * 40).p == 1.0
    assert flip_signs([2.0] * 4, [1.0] * 4).p == pytest.approx(2 / 2**4)  # all signs alike
    assert flip_signs([2.0], [1.0]).p == 1.0


def test_without_a_difference_one_in_twenty_is_an_alarm():
    rng = np.random.default_rng(3)
    exact = [flip_signs(a, b).p for a, b in rng.normal(size=(500, 2, 9))]
    levels = 2 * np.arange(1, 2**8) / 2**9  # that 2^9 flips can reach
    assert by_chance(sum(p <= 0.05 for p in exact), 500, levels[levels <= 0.05].max())

    sampled = [flip_signs(a, b, draws=499).p for a, b in rng.normal(size=(700, 2, 30))]
    assert by_chance(sum(p <= 0.05 for p in sampled), 700, 0.05)
    assert not by_chance(sum(p / 2 <= 0.05 for p in sampled), 700, 0.05)  # one side taken for two is seen


def test_skewed_scores_of_unlike_examples_keep_the_level():
    rng = np.random.default_rng(4)
    ease = rng.exponential(size=(600, 1, 20))  # what both runs owe to the example
    pairs = ease * (1 + 0.2 * rng.normal(size=(600, 2, 20)))
    assert by_chance(sum(flip_signs(a, b, draws=499).p <= 0.05 for a, b in pairs), 600, 0.05)
    unpaired = [stats.ttest_ind(a, b).pvalue for a, b in pairs]
    assert not by_chance(sum(p <= 0.05 for p in unpaired), 600, 0.05)  # pairs that are forgotten are seen


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        ([1.0, 2.0], [1.0], r"the same examples.*found \(2,\), \(1,\)"),
        ([], [], "the same examples"),
        ([[1.0]], [[1.0]], r"found \(1, 1\)"),
        ([1.0, math.nan, 2.0], [1.0, 2.0, math.inf], "2 of 3 lack one"),
    ],
)
def test_what_cannot_be_paired_is_refused(a, b, said):
    with pytest.raises(DataError, match=said):
        flip_signs(a, b)


def test_too_few_draws_are_refused():
    with pytest.raises(DataError, match="needs 100 draws.*found 10"):
        flip_signs([1.0, 2.0], [2.0, 1.0], draws=10)
