"""Did training help, and how certain is that: pass@k, paired bootstrap, McNemar's test, Wilson's interval, verdict.

Called by `evaluate` on the scores of base and adapter over the same held-out prompts. Needs no torch; scipy is
imported inside the functions that use it. All results are frozen dataclasses of plain numbers and strings, so that
`json.dumps(dataclasses.asdict(result), allow_nan=False)` always works. Impossible arguments raise ValueError.
"""

import math
import operator
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, SupportsIndex

import numpy as np
import numpy.typing as npt

Scores = Sequence[float] | Sequence[bool] | npt.NDArray[Any]
VerdictLabel = Literal["significant gain", "significant loss", "no significant gain"]

# Elements that one batch of resamples may hold (32 MiB of float64): scipy otherwise builds resamples × n at once.
_BATCH_ELEMENTS = 2**22


@dataclass(frozen=True)
class Proportion:
    """A success rate with Wilson's score interval."""

    successes: int
    n: int
    rate: float
    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class PairedDifference:
    """Mean score after minus mean score before on the same `n` examples, with a bootstrap interval.

    `changed` counts the examples whose score moved. `method` says where the interval comes from: "bca"; "percentile"
    where BCa is undefined; "constant" where every example moved by the same amount and resampling can show no spread.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    confidence: float
    n: int
    changed: int
    resamples: int
    method: Literal["bca", "percentile", "constant"]


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: `b` examples right before and wrong after, `c` wrong before and right after."""

    b: int
    c: int
    p_value: float


@dataclass(frozen=True)
class Verdict:
    """What the numbers allow one to say: a label and one plain sentence."""

    label: VerdictLabel
    sentence: str


def pass_at_k(n: SupportsIndex, c: SupportsIndex, k: SupportsIndex) -> float:
    """Estimate without bias the chance that at least one of `k` samples is right, from `c` right ones among `n`.

    1 − C(n−c, k) / C(n, k), evaluated in integers and rounded once, so it is exact for any `n`.

    Raises:
        ValueError: unless 0 ≤ c ≤ n and 1 ≤ k ≤ n.

    Source: Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.
    """
    n, c, k = _whole("n", n), _whole("c", c), _whole("k", k)
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass_at_k(n={n}, c={c}, k={k}): needs 0 <= c <= n and 1 <= k <= n")
    # C(n−c, k) / C(n, k) is symmetric in c and k; choosing the smaller keeps the integers short.
    few, many = min(c, k), max(c, k)
    all_draws = math.comb(n, few)
    return (all_draws - math.comb(n - many, few)) / all_draws


def mean_pass_at_k(counts: Iterable[SupportsIndex], n: SupportsIndex, k: SupportsIndex) -> float:
    """Average `pass_at_k` over problems, each sampled `n` times, from the number of right samples of each.

    Raises:
        ValueError: without problems, or as `pass_at_k` does.
    """
    estimates = [pass_at_k(n, c, k) for c in counts]
    if not estimates:
        raise ValueError("mean_pass_at_k: no problems to average over")
    return math.fsum(estimates) / len(estimates)


def wilson_interval(successes: SupportsIndex, n: SupportsIndex, *, confidence: float = 0.95) -> Proportion:
    """Give the success rate with Wilson's score interval, which stays inside [0, 1] and works at 0 and n successes.

    Raises:
        ValueError: unless 0 ≤ successes ≤ n and n ≥ 1.
    """
    from scipy.stats import binomtest

    successes, n = _whole("successes", successes), _whole("n", n)
    if not (n >= 1 and 0 <= successes <= n):
        raise ValueError(f"wilson_interval(successes={successes}, n={n}): needs n >= 1 and 0 <= successes <= n")
    confidence = _level(confidence)
    interval = binomtest(successes, n).proportion_ci(confidence_level=confidence, method="wilson")
    return Proportion(successes, n, successes / n, float(interval.low), float(interval.high), confidence)


def paired_bootstrap(
    before: Scores, after: Scores, *, seed: int, resamples: SupportsIndex = 10_000, confidence: float = 0.95
) -> PairedDifference:
    """Bootstrap the mean of after − before over examples, keeping each example's two scores together.

    Args:
        before: one score per example (bool or number), in the same order as `after`.
        after: the same examples' scores after training.
        seed: of the resampling; the same seed gives the same interval.

    Returns:
        The difference with a BCa interval. It contains the difference, and is a single point where all differences are
        equal; `verdict` does not mistake that for certainty.

    Raises:
        ValueError: for scores that are empty, of unequal number, or not finite.
    """
    old, new = _paired_scores(before, after)
    confidence, resamples = _level(confidence), _whole("resamples", resamples)
    if resamples < 1:
        raise ValueError(f"resamples={resamples}: needs at least 1")
    differences = new - old
    mean = float(np.mean(differences))
    # Equal moves can differ in the last bit (0.3 − 0.1 and 0.4 − 0.2): that is rounding, no spread.
    rounding = 1e-12 * float(np.max(np.abs([old, new])))
    method: Literal["bca", "percentile", "constant"] = "constant"
    low = high = mean
    if float(np.ptp(differences)) > rounding:
        low, high, method = _bootstrap_mean(differences, mean, seed, resamples, confidence)
    return PairedDifference(
        before=float(np.mean(old)),
        after=float(np.mean(new)),
        difference=mean,
        low=low,
        high=high,
        confidence=confidence,
        n=len(differences),
        changed=int(np.count_nonzero(np.abs(differences) > rounding)),
        resamples=resamples,
        method=method,
    )


def mcnemar_exact(before: Scores, after: Scores) -> McNemar:
    """Test whether right answers changed in one direction more than chance would (two-sided, exact binomial).

    Args:
        before: one bool, 0 or 1 per example, in the same order as `after`.
        after: the same examples after training.

    Raises:
        ValueError: for results that are empty, of unequal number, or neither 0 nor 1.
    """
    from scipy.stats import binomtest

    old, new = _paired_scores(before, after)
    if not np.isin([old, new], (0.0, 1.0)).all():
        raise ValueError("mcnemar_exact: results must be right or wrong (True/False, 1/0)")
    b = int(np.count_nonzero(old > new))
    c = int(np.count_nonzero(old < new))
    # Nothing changed, so there is no evidence of an effect, and binomtest needs at least one trial.
    p_value = float(binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0
    return McNemar(b, c, p_value)


CHANGED = 0.25  # share of problems whose answer turns from right to wrong or back, where nothing is known of it


def chance_to_find(gain: float, n: int, changed: float = CHANGED) -> float:
    """Return how often `n` problems show a gain that there is: the power of McNemar's exact test at 5 %.

    Args:
        gain: the share right after training minus that before; at most `changed`.
        n: problems, scored once before and once after.
        changed: share of them whose answer turns from right to wrong or back. The fewer, the clearer a gain.

    >>> round(chance_to_find(0.05, 200), 2), round(chance_to_find(0.05, 1319), 2)
    (0.25, 0.95)
    """
    from scipy.stats import binom

    if not 0 < gain <= changed <= 1 or n < 1:
        raise ValueError(f"gain {gain}, changed {changed} and n {n} are given; 0 < gain <= changed <= 1 <= n is needed")
    turned = np.arange(n + 1)  # how many answers turn
    most = binom.isf(0.025, turned, 0.5)  # more for the better than this is significant
    is_significant = binom.sf(most, turned, (1 + gain / changed) / 2)
    return float(np.sum(binom.pmf(turned, n, changed) * is_significant))


def power_line(n: int) -> str:
    """Return what an evaluation on `n` problems can still find, as a line.

    >>> power_line(200).partition(" (")[0]
    'evaluation: with 200 problems a gain of 5 points is found in 2 of 10 runs, of 10 points in 8 of 10'
    """
    five, ten = (round(10 * chance_to_find(gain, n)) for gain in (0.05, 0.10))
    return (
        f"evaluation: with {n} problems a gain of 5 points is found in {five} of 10 runs, of 10 points in {ten} of 10 "
        "(if a quarter of the answers change; estimated)"
    )


def verdict(
    difference: PairedDifference, test: McNemar | None = None, *, score: str = "held-out score", cause: str = ""
) -> Verdict:
    """Say whether the change is a significant gain, a significant loss, or neither.

    Significant means all of: the interval excludes 0; McNemar's p-value, where given, is at most 1 − confidence; and
    enough examples changed. The bootstrap alone is overconfident on a handful. With m changed examples no exact
    sign test can get below 2^(1−m), so at 95 % at least six have to change.

    Args:
        difference: from `paired_bootstrap`.
        test: from `mcnemar_exact` on the same examples, where the scores are right or wrong.
        score: what was measured, as the sentence names it.
        cause: what the change comes from where training had several stages; the sentence begins with it.
    """
    alpha = 1.0 - difference.confidence
    doubt = ""
    if 2.0 ** (1 - difference.changed) > alpha:
        doubt = f"; only {difference.changed} changed, too few to tell from chance"
    elif test is not None and test.p_value > alpha:
        doubt = "; McNemar's test cannot tell it from chance"
    label: VerdictLabel = "no significant gain"
    if not doubt and difference.low > 0.0:
        label = "significant gain"
    elif not doubt and difference.high < 0.0:
        label = "significant loss"
    what = f"{cause}: the {score}" if cause else f"The {score}"
    return Verdict(label, _sentence(label, difference, test, what, doubt))


def _sentence(label: VerdictLabel, d: PairedDifference, test: McNemar | None, what: str, doubt: str) -> str:
    examples = "1 example" if d.n == 1 else f"{d.n} examples"
    if d.changed == 0:
        return f"{what} is {d.before:.3f} before and after, nothing changed in {examples}: {label}."
    went = {"significant gain": "rose", "significant loss": "fell", "no significant gain": "went"}[label]
    p_value = ""
    if test is not None:
        p_value = f", McNemar p = {test.p_value:.2g}" if test.p_value >= 1e-12 else ", McNemar p < 1e-12"
    interval = f"{d.confidence * 100:g} % interval {d.low:+z.3f} to {d.high:+z.3f}"
    return (
        f"{what} {went} from {d.before:.3f} to {d.after:.3f} "
        f"({d.difference:+z.3f}, {interval}{p_value}, {examples}){doubt}: {label}."
    )


def _bootstrap_mean(
    differences: npt.NDArray[np.float64], mean: float, seed: int, resamples: int, confidence: float
) -> tuple[float, float, Literal["bca", "percentile"]]:
    """Interval of the mean of `differences`, (low, high, method), always finite and around `mean`."""
    from scipy.stats import bootstrap

    # The mean is linear, so resampling the differences is the paired bootstrap, at half the memory of paired=True.
    settings: dict[str, Any] = {"confidence_level": confidence, "n_resamples": resamples, "vectorized": True}
    settings["batch"] = max(1, _BATCH_ELEMENTS // len(differences))
    # With few resamples or extreme values BCa's correction can be 0/0 or overflow: scipy then warns and returns NaN.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        bca = bootstrap((differences,), np.mean, method="BCa", rng=np.random.default_rng(seed), **settings)
        low, high = (float(x) for x in bca.confidence_interval)
        if low <= mean <= high:  # False for NaN
            return low, high, "bca"
        low, high = np.quantile(bca.bootstrap_distribution, ((1 - confidence) / 2, (1 + confidence) / 2))
    return min(float(low), mean), max(float(high), mean), "percentile"


def _paired_scores(before: Scores, after: Scores) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    old, new = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    if old.ndim != 1 or new.ndim != 1 or len(old) != len(new):
        raise ValueError(f"paired scores: one per example on both sides, got shapes {old.shape} and {new.shape}")
    if not len(old):
        raise ValueError("paired scores: no examples to compare")
    # False for NaN too; and squares and cubes of sane scores cannot overflow.
    if not (np.abs([old, new]) < 1e100).all():
        raise ValueError("paired scores: every score must be a finite number (below 1e100)")
    return old, new


def _level(confidence: float) -> float:
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence={confidence}: needs a number between 0 and 1, such as 0.95")
    return float(confidence)


def _whole(name: str, value: SupportsIndex) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(f"{name}={value!r}: needs a whole number") from None
