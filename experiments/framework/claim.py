"""A claim, the interval of its measured effect, and the rule, written before the run, that judges it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 9999
FEWEST_SEEDS = 5
LEVEL = 1e-12  # relative to the largest sample: means this close are equal but for rounding
DIGITS = 9  # of the largest sample: beyond these processors may differ
SUPPORTED, NOT_SUPPORTED, CONTRADICTED = "supported", "not supported", "contradicted"
NOT_JUDGED = "not judged"  # a quick run checks the machinery, on too few seeds to say anything


@dataclasses.dataclass(frozen=True)
class Rule:
    """The verdict on an effect whose interval is [low, high], by where that interval lies.

    Wholly within `supported` (a closed range): supported. Wholly within `contradicted`: contradicted. Else, across
    a border or between the two ranges: not supported.
    """

    supported: tuple[float, float]
    contradicted: tuple[float, float]

    def verdict(self, low: float, high: float) -> str:
        """One of the three verdicts."""
        for verdict, (least, most) in ((SUPPORTED, self.supported), (CONTRADICTED, self.contradicted)):
            if least <= low and high <= most:
                return verdict
        return NOT_SUPPORTED

    def told(self, unit: str = "") -> str:
        """The rule in words, its borders in the unit of the effect."""
        return f"{span(self.supported, unit)} supported, {span(self.contradicted, unit)} contradicted"


def span(bounds: tuple[float, float], unit: str) -> str:
    """A range, as people write it."""
    low, high = (f"{float(f'{bound:.3g}'):,g}" for bound in bounds)
    if math.isinf(bounds[0]):
        return f"≤ {high}{counted(bounds[1], unit)}"
    if math.isinf(bounds[1]):
        return f"≥ {low}{counted(bounds[0], unit)}"
    return f"{low} to {high}{counted(bounds[1], unit)}"


def counted(value: float, unit: str) -> str:
    """The unit as it follows a value: one point, two points."""
    return unit.removesuffix("s") if abs(value) == 1 and unit in (" points", " decades") else unit


@dataclasses.dataclass(frozen=True)
class Claim:
    """One sentence that a measurement can support or contradict.

    Attributes:
      says: the claim.
      source: who claims it, and where (paper, year, section or figure).
      effect: what is measured for each seed, in words.
      rule: judges the interval of the effect.
      unit: of the effect, as it follows the number (" points", "×"); empty of a pure number.
      ratio: the effect is a ratio: its mean and interval are taken of logarithms.
    """

    says: str
    source: str
    effect: str
    rule: Rule
    unit: str = ""
    ratio: bool = False


def interval(samples: Sequence[float], *, ratio: bool = False) -> tuple[float, float, float]:
    """(low, mean, high): the samples' mean and its 95 % interval; of ratios the geometric mean, and of logarithms.

    Each bound is the further one of two: of the bias-corrected, accelerated bootstrap (Efron 1987), which follows the
    samples' skew, and of Student's t, since of few samples the bootstrap alone covers too little (of six, 87 %).

    The result is the samples' alone, whatever their order and the processor: the resamples are the same every time;
    means of theirs within `LEVEL` of the samples' own count as equal to it, where rounding would put them on one side
    or the other, which the bias correction counts; and what is returned has `DIGITS` digits.

    Raises:
      ValueError: fewer than two samples, one that is not finite, or a ratio that is not positive.
    """
    from scipy import stats

    values = np.asarray(samples, np.float64)
    if values.ndim != 1 or len(values) < 2 or not np.isfinite(values).all() or (ratio and (values <= 0).any()):
        wanted = "positive" if ratio else "finite"
        raise ValueError(f"samples must be two or more {wanted} numbers, one for each seed, got {samples}")
    values = np.sort(np.log(values) if ratio else values)
    largest = 1.0 if ratio else float(np.abs(values).max()) or 1.0  # a difference of logarithms is relative already
    level, middle = LEVEL * largest, values.mean()
    low = high = 0.0
    if np.ptp(values) > 2 * len(values) * level:  # else they are all the same: nothing to resample

        def deviation(sample: Any, axis: int) -> Any:
            return level * np.rint(sample.mean(axis) / level)

        told = {"n_resamples": RESAMPLES, "confidence_level": CONFIDENCE, "rng": np.random.default_rng(0)}
        bounds = stats.bootstrap((values - middle,), deviation, method="BCa", **told).confidence_interval
        t = stats.t.interval(CONFIDENCE, len(values) - 1, 0, stats.sem(values))
        low, high = min(bounds.low, t[0]), max(bounds.high, t[1])
    found = (float(middle + each) for each in (low, 0.0, high))
    found = map(math.exp, found) if ratio else found
    low, middle, high = (rounded(each, each if ratio else largest) for each in found)
    return low, middle, high


def rounded(value: float, largest: float) -> float:
    """`value` with the decimals that `largest` has in `DIGITS` digits."""
    decimals = DIGITS - 1 - round(math.log10(largest))
    # means of few decimals often end in a 5 there: three digits more are right whatever the processor, and decide
    return round(round(value, decimals + 3), decimals)


def judge(claim: Claim, samples: Sequence[float], quick: bool) -> dict[str, Any]:
    """The finding on a claim, as the results hold it: all that a report says about it.

    Raises:
      ValueError: too few seeds to judge by.
    """
    if len(samples) < FEWEST_SEEDS and not quick:
        raise ValueError(f"a claim is judged on {FEWEST_SEEDS} seeds or more, got {len(samples)}")
    low, middle, high = interval(samples, ratio=claim.ratio)
    return {
        **dataclasses.asdict(claim),
        "rule": claim.rule.told(claim.unit),
        "samples": list(map(float, samples)),
        "low": low,
        "mean": middle,
        "high": high,
        "verdict": NOT_JUDGED if quick else claim.rule.verdict(low, high),
    }


def shown(finding: dict[str, Any]) -> str:
    """The effect of a finding and its interval, as people read it: `1.9× (1.6 to 2.2)`."""
    low, middle, high = (number(finding[key]) for key in ("low", "mean", "high"))
    return f"{middle}{finding['unit']} ({low} to {high})"


def number(value: float) -> str:
    """Three significant digits, without an exponent where that is short."""
    rounded = float(f"{value:.2e}")  # first: else 0.9996 and 1 would differ in decimals
    if rounded == 0:
        return "0"
    if 0.001 <= abs(rounded) < 100_000:
        decimals = 0 if abs(rounded) >= 100 else 2 - math.floor(math.log10(max(abs(rounded), 0.1)))
        return f"{rounded:,.{decimals}f}"
    return f"{rounded:.1e}"
