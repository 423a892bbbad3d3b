"""grpo_lite.evaluation.statistics against hand-derived numbers, enumeration, published tables and simulated truth."""

import dataclasses
import itertools
import json
import math
import statistics as stdlib_statistics
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grpo_lite.evaluation.statistics import (
    McNemar,
    PairedDifference,
    chance_to_find,
    mcnemar_exact,
    mean_pass_at_k,
    paired_bootstrap,
    pass_at_k,
    verdict,
    wilson_interval,
)

# --- pass@k ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        pytest.param(10, 3, 1, 0.3, id="k=1 is the plain rate"),
        pytest.param(10, 3, 5, 11 / 12, id="1 - C(7,5)/C(10,5) = 1 - 21/252"),
        pytest.param(4, 2, 2, 5 / 6, id="1 - C(2,2)/C(4,2) = 1 - 1/6"),
        pytest.param(5, 0, 5, 0.0, id="none right"),
        pytest.param(5, 1, 5, 1.0, id="all drawn, one right"),
        pytest.param(5, 3, 3, 1.0, id="fewer wrong ones than draws"),
        pytest.param(1, 1, 1, 1.0, id="one sample"),
    ],
)
def test_pass_at_k_equals_the_hand_derived_value(n: int, c: int, k: int, expected: float) -> None:
    assert pass_at_k(n, c, k) == expected


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_all_draws_that_hold_a_right_sample(n: int) -> None:
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, draws)), len(draws)))


def test_pass_at_k_agrees_with_the_product_published_by_chen_et_al() -> None:
    # Listing 1 of the paper: 1 - prod(1 - k / arange(n - c + 1, n + 1)).
    for n, c, k in [(200, 13, 1), (200, 13, 10), (200, 13, 100), (200, 190, 10), (200, 1, 100)]:
        published = 1.0 if n - c < k else 1.0 - float(np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))
        assert pass_at_k(n, c, k) == pytest.approx(published, rel=1e-12)


def test_pass_at_k_keeps_every_digit_where_subtracting_from_one_would_lose_them() -> None:
    # One right sample in a billion, two draws: exactly 2 in a billion. 1.0 - (1.0 - 2e-9) is off in the 8th digit.
    assert pass_at_k(10**9, 1, 2) == 2e-9


def test_pass_at_k_is_unbiased() -> None:
    # E over c ~ Binomial(n, p) must be 1 - (1-p)^k, whatever n >= k.
    n, k, p = 12, 5, 0.2
    mean = math.fsum(math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k) for c in range(n + 1))
    assert mean == pytest.approx(1 - (1 - p) ** k, rel=1e-12)


@given(st.integers(1, 400), st.data())
def test_pass_at_k_stays_in_bounds_and_grows_with_k_and_with_c(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    value = pass_at_k(n, c, k)
    assert 0.0 <= value <= 1.0
    assert k == n or pass_at_k(n, c, k + 1) >= value
    assert c == n or pass_at_k(n, c + 1, k) >= value


@pytest.mark.parametrize(("n", "c", "k"), [(5, 6, 1), (5, -1, 1), (5, 2, 0), (5, 2, 6), (0, 0, 1), (5, 2.5, 1)])
def test_pass_at_k_refuses_impossible_numbers(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="needs"):
        pass_at_k(n, c, k)


def test_mean_pass_at_k_averages_over_problems() -> None:
    # k=2 of n=4: 0 right 0, 1 right 1/2, 2 right 5/6, 4 right 1 -> mean (0 + 1/2 + 5/6 + 1)/4 = 7/12.
    assert mean_pass_at_k([0, 1, 2, 4], n=4, k=2) == pytest.approx(7 / 12, rel=1e-15)


def test_mean_pass_at_k_without_problems_is_refused() -> None:
    with pytest.raises(ValueError, match="no problems"):
        mean_pass_at_k([], n=4, k=2)


# --- Wilson ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_equals_newcombes_table(successes: int, n: int, low: float, high: float) -> None:
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    interval = wilson_interval(successes, n)
    assert (round(interval.low, 4), round(interval.high, 4)) == (low, high)
    assert interval.rate == successes / n


@given(st.integers(1, 5000), st.data(), st.floats(0.5, 0.999))
def test_wilson_interval_mirrors_and_contains_the_rate(n: int, data: st.DataObject, confidence: float) -> None:
    successes = data.draw(st.integers(0, n))
    interval = wilson_interval(successes, n, confidence=confidence)
    mirrored = wilson_interval(n - successes, n, confidence=confidence)
    assert 0.0 <= interval.low <= interval.rate <= interval.high <= 1.0
    assert (interval.low, interval.high) == pytest.approx((1 - mirrored.high, 1 - mirrored.low), abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_numbers(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="needs n >= 1"):
        wilson_interval(successes, n)


# --- McNemar --------------------------------------------------------------------------------------------------------


def test_mcnemar_counts_what_was_lost_and_what_was_gained() -> None:
    before = [1] * 4 + [1] * 1 + [0] * 9 + [0] * 6
    after = [1] * 4 + [0] * 1 + [1] * 9 + [0] * 6
    # 1 of 10 changed for the worse: 2 (C(10,0) + C(10,1)) / 2^10 = 22/1024.
    result = mcnemar_exact(before, after)
    assert (result.b, result.c) == (1, 9)
    assert result.p_value == pytest.approx(22 / 1024, rel=1e-12)


@pytest.mark.parametrize(("b", "c"), [(b, c) for b in range(6) for c in range(6)])
def test_mcnemar_p_value_is_the_share_of_sign_flips_at_least_as_uneven(b: int, c: int) -> None:
    flips = list(itertools.product([0, 1], repeat=b + c))
    as_uneven = [f for f in flips if abs(sum(f) - (b + c) / 2) >= abs(b - (b + c) / 2)]
    result = mcnemar_exact([True] * b + [False] * c, [False] * b + [True] * c) if b + c else mcnemar_exact([1], [1])
    assert result.p_value == pytest.approx(len(as_uneven) / len(flips), rel=1e-12)


def test_mcnemar_without_a_changed_example_has_p_one() -> None:
    assert mcnemar_exact([True, False], [True, False]) == McNemar(b=0, c=0, p_value=1.0)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_mcnemar_swaps_b_and_c_with_its_arguments(pairs: list[tuple[bool, bool]]) -> None:
    before, after = zip(*pairs, strict=True)
    forth, back = mcnemar_exact(before, after), mcnemar_exact(after, before)
    assert (forth.b, forth.c, forth.p_value) == (back.c, back.b, pytest.approx(back.p_value, rel=1e-12))
    assert 0.0 < forth.p_value <= 1.0


def test_mcnemar_refuses_scores_that_are_neither_right_nor_wrong() -> None:
    with pytest.raises(ValueError, match="right or wrong"):
        mcnemar_exact([0.5, 1.0], [1.0, 1.0])


# --- paired bootstrap -----------------------------------------------------------------------------------------------


def bca_by_enumeration(differences: list[float], confidence: float) -> tuple[float, float]:
    """BCa interval of a mean (Efron & Tibshirani 1993, 14.3) from all n^n equally likely resamples."""
    n, normal = len(differences), stdlib_statistics.NormalDist()
    means = sorted(math.fsum(draw) / n for draw in itertools.product(differences, repeat=n))
    mean = math.fsum(differences) / n
    below = sum(m < mean - 1e-12 for m in means) + 0.5 * sum(abs(m - mean) <= 1e-12 for m in means)
    z0 = normal.inv_cdf(below / len(means))
    # Leaving example i out moves the mean by (d_i - mean) / (n - 1), so the acceleration is a third-moment ratio.
    deviations = [d - mean for d in differences]
    a = sum(d**3 for d in deviations) / (6 * sum(d**2 for d in deviations) ** 1.5)

    def endpoint(level: float) -> float:
        z = z0 + normal.inv_cdf(level)
        return float(np.quantile(means, normal.cdf(z0 + z / (1 - a * z))))

    return endpoint((1 - confidence) / 2), endpoint((1 + confidence) / 2)


def test_bootstrap_interval_is_the_bca_interval_of_all_resamples() -> None:
    differences = [-0.31, -0.02, 0.05, 0.13, 0.42, 1.7]  # skewed on purpose: BCa and percentile differ by 0.1 here
    before = [0.5, 0.1, 0.9, 0.2, 0.4, 0.3]
    after = [b + d for b, d in zip(before, differences, strict=True)]
    result = paired_bootstrap(before, after, seed=3, resamples=200_000, confidence=0.9)
    assert result.method == "bca"
    assert (result.low, result.high) == pytest.approx(bca_by_enumeration(differences, 0.9), abs=0.01)


def test_bootstrap_reports_means_difference_and_how_many_changed() -> None:
    result = paired_bootstrap([0, 1, 0, 0], [1, 1, 0, 1], seed=0)
    assert (result.before, result.after, result.difference, result.n, result.changed) == (0.25, 0.75, 0.5, 4, 2)
    assert (result.confidence, result.resamples) == (0.95, 10_000)


def test_bootstrap_of_many_examples_approaches_the_normal_interval() -> None:
    rng = np.random.default_rng(5)
    before, after = rng.normal(0, 1, 4000), rng.normal(0.2, 1, 4000)
    half = 1.959964 * float(np.std(after - before, ddof=1)) / math.sqrt(4000)
    result = paired_bootstrap(before, after, seed=0)
    # Monte Carlo error of an endpoint from 10,000 resamples is about 2.7 % of a standard error, 1.4 % of `half`.
    assert result.high - result.difference == pytest.approx(half, rel=0.06)
    assert result.difference - result.low == pytest.approx(half, rel=0.06)


def test_bootstrap_keeps_pairs_together() -> None:
    # Scores spread over 0..1000, every pair moves by 1 or 2: unpaired resampling would give an interval ~80 wide.
    before = np.linspace(0, 1000, 200)
    after = before + np.tile([1.0, 2.0], 100)
    result = paired_bootstrap(before, after, seed=0)
    assert 1.4 < result.low < 1.5 < result.high < 1.6


def test_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    before, after = [0.0, 0.3, 0.2, 0.9, 0.5], [0.5, 0.1, 0.8, 1.0, 0.7]
    first = paired_bootstrap(before, after, seed=1, resamples=200)
    assert first == paired_bootstrap(before, after, seed=1, resamples=200)
    assert first != paired_bootstrap(before, after, seed=2, resamples=200)


@pytest.mark.parametrize(
    ("before", "after", "difference", "changed"),
    [
        pytest.param([1, 0, 1], [1, 0, 1], 0.0, 0, id="nothing changed"),
        pytest.param([0, 0, 0], [1, 1, 1], 1.0, 3, id="all changed alike"),
        pytest.param([0], [1], 1.0, 1, id="one example"),
        pytest.param([0.1, 0.2, 0.7], [0.3, 0.4, 0.9], 0.2, 3, id="alike up to the last bit"),
        pytest.param([True, True], [False, False], -1.0, 2, id="bools, all lost"),
    ],
)
def test_equal_differences_give_the_point_they_all_share(
    before: list[float], after: list[float], difference: float, changed: int
) -> None:
    result = paired_bootstrap(before, after, seed=0)
    assert result.method == "constant"
    assert result.low == result.difference == result.high == pytest.approx(difference, rel=1e-12)
    assert result.changed == changed


def test_interval_is_defined_where_bca_is_not() -> None:
    # One resample, all of it above or below the mean: BCa's bias correction is infinite.
    result = paired_bootstrap([0.0, 0.0, 0.0], [0.1, 0.2, 0.9], seed=0, resamples=1)
    assert result.method == "percentile"
    assert result.low <= result.difference <= result.high


scores = st.one_of(
    st.sampled_from([0.0, 1.0, 0.5, 0.1, 0.3]),
    st.floats(-1e99, 1e99, allow_subnormal=True),
    st.floats(0, 1, allow_subnormal=True),
)


@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=12), st.integers(1, 60), st.floats(0.01, 0.999999))
@settings(max_examples=300, deadline=None)
def test_bootstrap_is_finite_around_the_difference_and_antisymmetric(
    pairs: list[tuple[float, float]], resamples: int, confidence: float
) -> None:
    before, after = zip(*pairs, strict=True)  # warnings are errors, so a warning fails here too
    forth = paired_bootstrap(before, after, seed=7, resamples=resamples, confidence=confidence)
    back = paired_bootstrap(after, before, seed=7, resamples=resamples, confidence=confidence)
    scale = max(map(abs, before + after))
    assert -2 * scale <= forth.low <= forth.difference <= forth.high <= 2 * scale
    assert forth.difference == -back.difference
    assert (forth.changed, forth.n) == (back.changed, back.n)
    if forth.method == back.method:  # a tie decided by the last bit may make one of the two fall back
        assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), rel=1e-6, abs=1e-6 * scale)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_bootstrap_of_right_and_wrong_stays_within_minus_one_and_one(pairs: list[tuple[bool, bool]]) -> None:
    before, after = zip(*pairs, strict=True)
    result = paired_bootstrap(before, after, seed=1, resamples=200)
    test = mcnemar_exact(before, after)
    assert -1.0 <= result.low <= result.high <= 1.0
    assert result.changed == test.b + test.c
    assert result.difference == pytest.approx((test.c - test.b) / len(pairs), abs=1e-12)


def test_nominal_coverage_holds_on_simulated_accuracy() -> None:
    # True gain: P(gained) - P(lost) = 0.25 - 0.10 = 0.15 on 100 examples, 400 worlds (binomial error 1.1 %).
    rng = np.random.default_rng(11)
    covered = 0
    for world in range(400):
        kind = rng.choice(3, size=100, p=[0.25, 0.10, 0.65])
        before, after = kind == 1, kind == 0
        result = paired_bootstrap(before, after, seed=world, resamples=400)
        covered += result.low <= 0.15 <= result.high
    assert 0.91 <= covered / 400 <= 0.98


def test_verdict_calls_a_gain_by_mistake_no_more_often_than_promised() -> None:
    # No true effect on 12 to 60 examples, 400 worlds. Two-sided 5 %, so a false gain in 2.5 %; bound at + 2 errors.
    rng = np.random.default_rng(12)
    false_gains = 0
    for world in range(400):
        before, after = rng.random((2, int(rng.integers(12, 60)))) < 0.4
        difference = paired_bootstrap(before, after, seed=world, resamples=400)
        false_gains += verdict(difference, mcnemar_exact(before, after)).label == "significant gain"
    assert false_gains / 400 <= 0.04


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param([], [], id="empty"),
        pytest.param([1.0], [1.0, 0.0], id="unequal number"),
        pytest.param([[1.0, 0.0]], [[1.0, 1.0]], id="two-dimensional"),
        pytest.param([float("nan")], [1.0], id="nan"),
        pytest.param([1.0], [float("inf")], id="infinite"),
        pytest.param([1.0], [1e300], id="would overflow when cubed"),
    ],
)
def test_scores_that_cannot_be_paired_are_refused(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="paired scores"):
        paired_bootstrap(before, after, seed=0)
    with pytest.raises(ValueError, match="paired scores"):
        mcnemar_exact(before, after)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, float("nan")])
def test_confidence_outside_zero_and_one_is_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        paired_bootstrap([0, 1], [1, 1], seed=0, confidence=confidence)
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson_interval(1, 2, confidence=confidence)


def test_zero_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        paired_bootstrap([0, 1], [1, 1], seed=0, resamples=0)


# --- verdict --------------------------------------------------------------------------------------------------------


def difference_of(before: list[int], after: list[int]) -> tuple[PairedDifference, McNemar]:
    return paired_bootstrap(before, after, seed=0), mcnemar_exact(before, after)


def test_clear_gain_is_called_one_with_its_figures() -> None:
    result = verdict(*difference_of([0] * 30 + [1] * 20, [1] * 20 + [0] * 10 + [1] * 20), score="strict accuracy")
    assert result.label == "significant gain"
    # 20 of 50 gained, none lost: p = 2 / 2^20 = 1.9e-06.
    assert result.sentence.startswith("The strict accuracy rose from 0.400 to 0.800 (+0.400, 95 % interval +0.2")
    assert result.sentence.endswith("McNemar p = 1.9e-06, 50 examples): significant gain.")


def test_clear_loss_is_called_one() -> None:
    result = verdict(*difference_of([1] * 20 + [0] * 30, [0] * 50))
    assert result.label == "significant loss"
    assert "fell from 0.400 to 0.000" in result.sentence


def test_small_change_is_no_significant_gain() -> None:
    difference, test = difference_of([0] * 50 + [1] * 50, [1] * 10 + [0] * 40 + [0] * 8 + [1] * 42)
    assert difference.low < 0.0 < difference.high
    assert verdict(difference).label == verdict(difference, test).label == "no significant gain"
    assert "went from 0.500 to 0.520" in verdict(difference, test).sentence


def test_nothing_changed_is_said_so() -> None:
    result = verdict(*difference_of([1, 0, 1, 0], [1, 0, 1, 0]))
    assert result.label == "no significant gain"
    assert "is 0.500 before and after, nothing changed in 4 examples" in result.sentence


@pytest.mark.parametrize(
    ("changed", "label"), [(1, "no significant gain"), (5, "no significant gain"), (6, "significant gain")]
)
def test_a_handful_of_changed_examples_never_is_a_significant_gain(changed: int, label: str) -> None:
    # All moved alike, so the interval is a point clear of 0. Sign test: 2^(1-5) = 0.0625, 2^(1-6) = 0.03125.
    result = verdict(paired_bootstrap([0.0] * changed, [0.25] * changed, seed=0))
    assert result.label == label
    assert ("too few" in result.sentence) == (label == "no significant gain")


def test_interval_clear_of_zero_does_not_outvote_mcnemar() -> None:
    difference, test = difference_of([1] * 1 + [0] * 7 + [1] * 12, [0] * 1 + [1] * 7 + [1] * 12)
    assert difference.low > 0.0  # 7 gained, 1 lost: the bootstrap is sure,
    assert test.p_value == pytest.approx(2 * 9 / 256)  # the exact test, at 0.07, is not
    assert verdict(difference).label == "significant gain"
    refused = verdict(difference, test)
    assert refused.label == "no significant gain"
    assert "McNemar's test cannot tell it from chance" in refused.sentence


def test_results_serialise_to_strict_json() -> None:
    before, after = np.array([0, 1, 0, 1, 1]), np.array([1, 1, 1, 1, 0])
    difference = paired_bootstrap(before, after, seed=0, resamples=np.int64(100), confidence=np.float64(0.9))
    test = mcnemar_exact(before, after)
    for result in (difference, test, wilson_interval(np.int64(3), np.int64(5)), verdict(difference, test)):
        text = json.dumps(dataclasses.asdict(result), allow_nan=False)
        assert type(result)(**json.loads(text)) == result


def test_importing_the_module_loads_neither_torch_nor_scipy() -> None:
    code = "import sys, grpo_lite.evaluation.statistics; sys.exit(any(m in sys.modules for m in ('torch', 'scipy')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_power_is_that_of_simulated_evaluations() -> None:
    """200 problems, 15 % turn right and 10 % turn wrong: a gain of 5 points with a quarter of the answers changing."""
    rng = np.random.default_rng(0)
    draws = rng.random((2000, 200))
    better, worse = (draws < 0.15).sum(axis=1), ((draws >= 0.15) & (draws < 0.25)).sum(axis=1)
    found = 0
    for b, c in zip(better, worse, strict=True):
        test = mcnemar_exact([True] * c + [False] * b, [False] * c + [True] * b)
        found += test.p_value <= 0.05 and b > c
    assert chance_to_find(0.05, 200) == pytest.approx(found / 2000, abs=0.03)  # three standard errors


@pytest.mark.parametrize("gain, changed, n", [(0.3, 0.25, 10), (0.0, 0.25, 10), (0.1, 0.25, 0)])
def test_an_impossible_gain_is_refused(gain: float, changed: float, n: int) -> None:
    with pytest.raises(ValueError, match="0 < gain <= changed <= 1 <= n is needed"):
        chance_to_find(gain, n, changed)
