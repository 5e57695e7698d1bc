"""Statistics of comparisons, against plain loops, textbook values and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from smidgen.common.errors import StudyError
from smidgen.studies.statistics.equivalence_tests import equivalence
from smidgen.studies.statistics.holm_correction import holm
from smidgen.studies.statistics.paired_differences import paired_difference, t_p, wilcoxon_p
from smidgen.studies.statistics.per_example import mcnemar_p, permutation_p
from smidgen.studies.statistics.stratified_means import stratified_mean
from smidgen.studies.statistics.study_power import detection_power, pairs_needed, smallest_difference
from smidgen.studies.statistics.summaries import summary

NAN = math.nan


def test_a_summary_knows_which_way_is_worse():
    found = summary([3.0, 1.0, 2.0])
    assert (found.mean, found.sd, found.worst, found.count) == (2.0, 1.0, 1.0, 3)
    assert summary([3.0, 1.0], higher_is_better=False).worst == 3.0
    assert summary([5.0]).sd is None
    assert summary([]) is None


def test_a_difference_is_the_mean_over_tasks_of_means_over_seeds():
    a, b = [[0.9, 0.8, NAN], [0.5, 0.5, 0.5]], [[0.7, 0.7, 0.1], [0.6, 0.4, 0.5]]
    found = paired_difference(a, b)
    assert found.mean == pytest.approx(((0.2 + 0.1) / 2 + (-0.1 + 0.1 + 0.0) / 3) / 2)
    assert (found.pairs, found.missing) == (5, 1)
    low, high = found.interval
    assert low < found.mean < high
    back = paired_difference(b, a)
    assert back.mean == pytest.approx(-found.mean)
    assert (back.t_p, back.wilcoxon_p) == (found.t_p, found.wilcoxon_p)
    assert back.interval == pytest.approx((-high, -low), abs=0.01)
    shifted = paired_difference(np.add(a, 7.0).tolist(), np.add(b, 7.0).tolist())
    assert shifted.interval == pytest.approx(found.interval)


def test_the_interval_is_that_of_all_resamples_of_seeds():
    d = [[0.1, 0.3, 0.8], [-0.2, 0.0, 0.3]]
    each = [[np.mean(rows) for rows in itertools.product(row, repeat=3)] for row in d]
    means = [(x + y) / 2 for x in each[0] for y in each[1]]
    found = paired_difference(d, np.zeros((2, 3)).tolist())
    tail = stats.norm.sf(math.sqrt(3 / 2) * stats.t.isf(0.025, 2 * (3 - 1)))  # Hesterberg's
    assert tail < 0.025
    assert found.interval == pytest.approx(tuple(np.quantile(means, [tail, 1 - tail])), abs=0.04)


def test_the_interval_of_one_task_is_that_of_the_t_distribution():
    d = [0.1, 0.3, 0.8]
    found = paired_difference([d], [[0.0] * 3])
    told = stats.ttest_1samp(d, 0.0).confidence_interval(0.95)
    assert found.interval == pytest.approx((told.low, told.high))


def test_differences_that_are_equal_but_for_rounding_are_equal():
    a = [[0.8, 0.9, 0.7, 0.3]]
    found = paired_difference(a, [[x - 0.1 for x in a[0]]])
    assert (found.t_p, found.interval) == (None, None)
    assert found.mean == pytest.approx(0.1)
    assert equivalence([np.subtract(a[0], [x - 0.1 for x in a[0]]).round(12)], 0.02) is None


def test_what_gives_no_interval_says_why():
    found = paired_difference([[0.9], [0.8]], [[0.7], [0.7]])
    assert (found.interval, found.t_p) == (None, None)
    assert found.why == "one seed for each task: chance cannot be told from difference"
    assert found.tasks_p == pytest.approx(stats.ttest_1samp([0.2, 0.1], 0.0).pvalue)
    assert paired_difference([[NAN]], [[1.0]]) is None
    equal = paired_difference([[1.0, 2.0]], [[0.5, 1.5]])
    assert (equal.t_p, equal.wilcoxon_p, equal.interval, equal.tasks_p) == (None, None, None, None)
    assert equal.why == "the difference is the same with every seed: chance cannot be told from difference"
    with pytest.raises(StudyError, match=r"\(1, 2\) and \(1, 1\)"):
        paired_difference([[1.0, 2.0]], [[1.0]])
    with pytest.raises(StudyError, match="infinite"):
        paired_difference([[1.0, math.inf]], [[1.0, 2.0]])


def test_what_varies_between_tasks_is_not_chance_on_these_tasks():
    d = np.array([[0.10, 0.11, 0.12], [-0.05, -0.04, -0.06], [0.30, 0.31, 0.29]])
    found = paired_difference(d.tolist(), np.zeros_like(d).tolist())
    assert found.t_p < 1e-4  # certain on these
    assert found.tasks_p > 0.2  # not on others
    assert found.tasks_p == pytest.approx(stats.ttest_1samp(d.mean(1), 0.0).pvalue)
    told = stats.ttest_1samp(d.mean(1), 0.0).confidence_interval(0.95)
    assert found.tasks_interval == pytest.approx((told.low, told.high))
    low, high = found.interval
    assert found.mean - 0.02 < low < high < found.mean + 0.02


def test_the_stratified_mean_against_plain_loops():
    rows = [np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0]), np.array([])]
    found = stratified_mean(rows)
    parts = [stats.tvar(row) / len(row) for row in rows[:2]]
    assert found.mean == pytest.approx((7 / 3 + 0.5) / 2)
    assert found.se == pytest.approx(math.sqrt(sum(parts)) / 2)
    assert found.df == pytest.approx(sum(parts) ** 2 / (parts[0] ** 2 / 2 + parts[1] ** 2 / 1))
    assert (found.count, found.tasks) == (5, 2)
    one = stratified_mean([rows[0]])  # of one task: the ordinary t
    assert (one.se, one.df) == (pytest.approx(stats.sem(rows[0])), pytest.approx(2.0))
    alone = stratified_mean([rows[0], np.array([3.0])])  # a task of one seed has the others' variance
    assert alone.se == pytest.approx(math.sqrt(stats.tvar(rows[0]) * (1 / 3 + 1)) / 2)
    assert stratified_mean([np.array([])]) is None
    a, b = np.random.default_rng(5).normal(size=(2, 7))
    welch = stats.ttest_ind(a, -b, equal_var=False)  # the sum of two means is zero
    of_two = stratified_mean([a, b])
    assert 2 * stats.t.sf(abs(of_two.mean) / of_two.se, of_two.df) == pytest.approx(welch.pvalue)


def test_missing_runs_leave_all_answers_about_the_same_mean():
    a = [[0.5, 0.51, 0.52, 0.5, 0.49, 0.5], [0.9, 0.92, NAN, NAN, NAN, NAN]]
    found = paired_difference(a, [[0.6] * 6, [0.5] * 6])
    assert found.mean == pytest.approx((np.mean(a[0]) - 0.6 + 0.41) / 2)
    assert found.mean > 0  # though most pairs are below
    low, high = found.interval
    assert 0 < low < found.mean < high
    same = equivalence([np.subtract(a[0], 0.6), np.subtract(a[1], 0.5)], 0.02)
    assert same.interval[0] < found.mean < same.interval[1]
    assert same.verdict == "better"


def test_on_several_tasks_one_in_twenty_is_an_alarm():
    rng, alarms, others = np.random.default_rng(6), [], []
    for _ in range(1500):
        spread = rng.uniform(0.5, 2.0, size=(4, 1))
        tasks = rng.normal(size=(4, 1))
        d = spread * rng.normal(size=(4, 3))
        alarms.append(paired_p(d) < 0.05)
        others.append(t_p((d + tasks).mean(1)) < 0.05)
    assert np.mean(alarms) == pytest.approx(0.05, abs=0.02)
    assert np.mean(others) == pytest.approx(0.05, abs=0.02)


def paired_p(d):
    found = stratified_mean(list(d))
    return 2 * stats.t.sf(abs(found.mean) / found.se, found.df)


def test_wilcoxon_needs_six_pairs():
    d = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    assert wilcoxon_p(d) is None
    six = np.append(d, 0.6)
    assert wilcoxon_p(six) == pytest.approx(2 / 2**6)  # all signs alike
    assert wilcoxon_p(six) == pytest.approx(stats.wilcoxon(six).pvalue)


def test_under_no_difference_one_in_twenty_is_an_alarm():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(2000, 12))
    for test in (t_p, wilcoxon_p):
        assert np.mean([test(row) < 0.05 for row in draws]) == pytest.approx(0.05, abs=0.015)
    assert np.mean([t_p(row + 1.0) < 0.05 for row in draws[:200]]) > 0.8  # and a real one is seen
    family = np.array([[t_p(row) for row in group] for group in draws.reshape(500, 4, 12)])
    alone = np.mean((family < 0.05).any(1))
    together = np.mean([min(holm(dict(zip("abcd", row, strict=True))).values()) < 0.05 for row in family])
    assert alone > 0.13
    assert together == pytest.approx(0.05, abs=0.025)


def test_the_bootstrap_interval_covers_the_truth_nearly_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), {5: [], 30: []}
    for seeds in covered:
        for _ in range(150):
            d = rng.normal(0.3, 1.0, size=(3, seeds))
            low, high = paired_difference(d.tolist(), np.zeros_like(d).tolist()).interval
            covered[seeds].append(low <= 0.3 <= high)
    assert 0.87 <= np.mean(covered[5]) <= 0.98
    assert np.mean(covered[30]) == pytest.approx(0.95, abs=0.045)


def test_mcnemar_by_hand():
    a = [True] * 8 + [False] * 2 + [True] * 5
    b = [False] * 8 + [True] * 2 + [True] * 5
    tail = sum(math.comb(10, k) for k in range(3)) / 2**10
    assert mcnemar_p(a, b) == mcnemar_p(b, a) == pytest.approx(2 * tail)
    assert mcnemar_p(a, a) is None
    with pytest.raises(StudyError, match="15 and 1 examples"):
        mcnemar_p(a, [True])


def test_a_metric_that_is_no_mean_is_compared_on_the_same_examples():
    def spread(said, right):
        return float(np.std(np.subtract(said, right)))

    rng = np.random.default_rng(2)
    right = rng.normal(size=60).tolist()
    a, b, c = (np.add(right, rng.normal(size=60) * s).tolist() for s in (2.0, 1.0, 1.0))
    assert permutation_p(spread, a, b, right) == permutation_p(spread, b, a, right) == 1 / 200
    mixed = [x if i % 2 else y for i, (x, y) in enumerate(zip(a, c, strict=True))]
    other = [y if i % 2 else x for i, (x, y) in enumerate(zip(a, c, strict=True))]
    assert permutation_p(spread, mixed, other, right) > 0.05
    assert permutation_p(spread, a, a, right) is None
    assert permutation_p(lambda said, right: 0.5, a, b, right) == 1.0
    with pytest.raises(StudyError, match="2 and 1 answers to 2 examples"):
        permutation_p(spread, [1, 2], [1], [1, 2])
    with pytest.raises(StudyError, match="not finite"):
        permutation_p(lambda said, right: NAN, a, b, right)


def test_the_permutation_test_is_that_of_all_exchanges():
    def share(said, right):
        return float(np.mean([x == y for x, y in zip(said, right, strict=True)]))

    right, a, b = [1] * 9, [1] * 8 + [0], [1, 0, 0, 1, 0, 0, 1, 0, 1]
    told, far = share(a, right) - share(b, right), 0
    for swap in itertools.product((False, True), repeat=9):
        one = [y if s else x for s, x, y in zip(swap, a, b, strict=True)]
        other = [x if s else y for s, x, y in zip(swap, a, b, strict=True)]
        far += abs(share(one, right) - share(other, right)) >= told - 1e-12
    assert permutation_p(share, a, b, right, draws=4000) == pytest.approx(far / 2**9, abs=0.02)


def test_holm_by_hand():
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": None})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02, "e": None})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}
    for odd in (NAN, 1.2, -0.1):
        with pytest.raises(StudyError, match="of 'b' must lie in 0..1"):
            holm({"a": 0.1, "b": odd})


def test_two_one_sided_tests():
    d = [0.01, -0.01, 0.005, 0.0, -0.004, 0.002]
    found = equivalence([d], 0.02)
    by_scipy = max(
        stats.ttest_1samp(d, -0.02, alternative="greater").pvalue, stats.ttest_1samp(d, 0.02, alternative="less").pvalue
    )
    assert found.p == pytest.approx(by_scipy)
    assert (found.equivalent, found.different, found.verdict) == (True, False, "equivalent")
    low, high = found.interval
    assert -0.02 < low < high < 0.02
    edge = max(abs(low), abs(high))
    assert equivalence([d], edge * 1.001).equivalent
    assert not equivalence([d], edge * 0.999).equivalent
    assert equivalence([d], 0.001).verdict == "cannot tell"
    shifted = [x + 0.1 for x in d]
    assert equivalence([shifted], 0.02).verdict == "better"
    assert equivalence([shifted], 0.02, higher_is_better=False).verdict == "worse"
    small = [x / 100 + 0.01 for x in d]
    assert (equivalence([small], 0.02).equivalent, equivalence([small], 0.02).different) == (True, True)
    assert equivalence([[0.1]], 0.02) is None
    assert equivalence([[0.0, 0.0]], 0.02) is None  # no spread tells chance
    assert equivalence([[0.5, 0.5]], 0.02) is None
    with pytest.raises(StudyError, match="above 0, found 0"):
        equivalence([d], 0)
    with pytest.raises(StudyError, match="infinite"):
        equivalence([[0.1, math.inf]], 0.02)


def test_at_the_margin_one_in_twenty_is_called_equivalent():
    draws = np.random.default_rng(3).normal(1.0, 1.0, size=(2000, 20))
    called = np.mean([equivalence([row], 1.0).equivalent for row in draws])
    assert called == pytest.approx(0.05, abs=0.015)


def test_power_is_that_of_simulated_studies():
    rng = np.random.default_rng(4)
    smallest = smallest_difference(1.0, 12)
    seen = np.mean(stats.ttest_1samp(rng.normal(smallest, 1.0, size=(4000, 12)), 0.0, axis=1).pvalue < 0.05)
    assert seen == pytest.approx(0.8, abs=0.025)
    assert smallest_difference(3.0, 12) == pytest.approx(3 * smallest)
    assert pairs_needed(1.0, 1.0001 * smallest) == 12
    assert pairs_needed(1.0, 0.9999 * smallest) == 13
    assert pairs_needed(1.0, 0.5) == 34  # the textbook's
    assert detection_power(0.0, 10) == pytest.approx(0.05)
    for effect, pairs in ((0.5, 3), (0.3, 50), (2.0, 4)):
        edge, shift = stats.t.ppf(0.975, pairs - 1), effect * math.sqrt(pairs)
        told = stats.nct.sf(edge, pairs - 1, shift) + stats.nct.cdf(-edge, pairs - 1, shift)
        assert detection_power(effect, pairs) == pytest.approx(told, abs=1e-6)
    assert detection_power(8.0, 2) > 0.5  # where scipy's gives nan
    assert smallest_difference(1.0, 2) > smallest_difference(1.0, 3) > smallest
    assert smallest_difference(1.0, 12, 4) > smallest  # fewer degrees of freedom
    draws = rng.normal(smallest_difference(1.0, 6, 2), 1.0, size=(3000, 2, 3))
    pooled = np.sqrt(draws.var(axis=2, ddof=1).mean(1) / 6)
    assert np.mean(2 * stats.t.sf(abs(draws.mean((1, 2))) / pooled, 4) < 0.05) == pytest.approx(0.8, abs=0.025)
    assert smallest_difference(1.0, 4, 4) is None
    assert pairs_needed(1.0, 1.0, 4) > pairs_needed(1.0, 1.0)
    assert (smallest_difference(1.0, 1), smallest_difference(0.0, 5)) == (None, 0.0)
    assert pairs_needed(1.0, 1e-4) is None
    with pytest.raises(StudyError, match="difference of 0"):
        pairs_needed(1.0, 0.0)
