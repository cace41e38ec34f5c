"""Rows of the results of `experiments overhead`, which all have the same columns."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from experiments.benchmarks.turns import quartiles

COLUMNS = (
    "kind", "what", "interface", "platform", "candidate", "unit", "median", "lower_quartile", "upper_quartile",
    "over", "over_lower_quartile", "over_upper_quartile", "beside", "trace", "lower", "compile",
)  # fmt: skip


def row(
    told: dict[str, Any], name: str, found: Mapping[str, Sequence[float]], beside: str | None, **more: Any
) -> dict[str, Any]:
    """Median and quartiles over turns of a candidate, and of its ratio, within turns, to the candidate `beside` it."""
    mine = np.asarray(found[name], np.float64)
    filled = {**dict.fromkeys(COLUMNS), **told, "candidate": name, **quartiles("", mine, "median"), **more}
    if beside is not None:
        filled |= {"beside": beside, **quartiles("over", mine / np.asarray(found[beside], np.float64))}
    return filled
