"""Candidates that take turns, so that whatever else the machine does meets all; and what is told of a figure."""

import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np


def take_turns(
    steps: Mapping[str, Callable[[], Any]], turns: int, rng: np.random.Generator, warm_up: int = 3
) -> dict[str, np.ndarray]:
    """Seconds of each candidate at each turn; who follows whom is drawn anew each turn."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(warm_up + turns):
        for name in map(str, rng.permutation(list(steps))):
            step, start = steps[name], time.perf_counter()
            step()
            if turn >= warm_up:
                times[name].append(time.perf_counter() - start)
    return {name: np.array(seconds) for name, seconds in times.items()}


def quartiles(name: str, values: np.ndarray, median: str | None = None) -> dict[str, float]:
    """Median and quartiles, by the names of their columns; that of the median is `name`, or what is given."""
    low, middle, high = map(float, np.quantile(values, (0.25, 0.5, 0.75)))
    between = f"{name}_" if name else ""
    return {median or name: middle, f"{between}lower_quartile": low, f"{between}upper_quartile": high}


def told(row: dict[str, Any], name: str = "speedup") -> str:
    """A ratio, and its quartiles in brackets."""
    return f"{row[name]:.2f}× ({row[f'{name}_lower_quartile']:.2f}–{row[f'{name}_upper_quartile']:.2f})"


def dots(axes: Any, rows: list[dict[str, Any]], y: Any, name: str = "speedup", **style: Any) -> None:
    """Draws a dot for each row's median and a line between its quartiles, at these heights."""
    middle = np.array([row[name] for row in rows])
    ends = np.array([[row[f"{name}_{end}_quartile"] for row in rows] for end in ("lower", "upper")])
    axes.errorbar(middle, y, xerr=np.abs(ends - middle), fmt="o", **style)
