"""How every figure looks: type, colours that colour-blind readers tell apart, bands for deviation."""

import math
from typing import Any

import numpy as np

from experiments.framework.record import require

# Okabe & Ito 2008: told apart with every common colour deficiency
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
INK, GREY, FAINT = "#222222", "#6B6B6B", "#D9D9D9"
NORM_COLORS = {"batch norm": BLUE, "no norm": VERMILION}
DASHES = (0, (4, 3))
GAP = {"wspace": 0.09}  # between small multiples

STYLE: dict[str, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "figure.titlesize": 11,
    "figure.titleweight": "bold",
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "lines.linewidth": 1.6,
    "text.color": INK,
    "svg.hashsalt": "jbn",  # the same results give the same file
    "svg.fonttype": "none",
}


def pyplot() -> Any:
    """matplotlib.pyplot in our style, drawing to files only."""
    require("matplotlib")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    pyplot.style.use(STYLE)
    return pyplot


def band(axes: Any, x: Any, mean: Any, deviation: Any, color: str, **line: Any) -> None:
    """A curve, and mean ± deviation as a band around it."""
    axes.plot(x, mean, color=color, **line)
    axes.fill_between(x, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)


def lines(axes: Any, x: Any, curves: Any, color: str, label: str | None = None, **line: Any) -> None:
    """The mean over seeds of `curves` (seeds, len(x)) with its 95 % bootstrap interval as a band.

    `label` is written at the curve's right end, in its colour. Where a seed is None or NaN, so is the mean.
    """
    from scipy import stats

    values = np.asarray(curves, np.float64)  # None becomes NaN
    mean = values.mean(0)
    axes.plot(x, mean, color=color, **line)
    if len(values) > 1:
        told = {"n_resamples": 999, "method": "percentile", "rng": np.random.default_rng(0)}
        bounds = stats.bootstrap((values,), np.mean, axis=0, **told).confidence_interval
        axes.fill_between(x, bounds.low, bounds.high, color=color, alpha=0.2, linewidth=0)
    if label is not None and np.isfinite(mean).any():
        last = np.flatnonzero(np.isfinite(mean))[-1]
        name(axes, x[last], mean[last], label, color)


def name(axes: Any, x: float, y: float, text: str, color: str, **where: Any) -> None:
    """Writes `text` beside a point, in its curve's colour: what a legend would say, where the eye is."""
    where = {"xytext": (4, 0), "va": "center", **where}
    axes.annotate(text, (x, y), textcoords="offset points", color=color, weight="bold", annotation_clip=False, **where)


def names(axes: Any, x: float, curves: dict[str, tuple[float, str]], gap: float = 11, **where: Any) -> None:
    """`name` for several curves (text → height, colour) that end at `x`; where they would collide, `gap` points apart.

    To be called when the panel's limits are set.
    """
    axes.figure.draw_without_rendering()  # for the layout
    order = sorted(curves, key=lambda text: curves[text][0])
    heights = [axes.transData.transform((x, curves[text][0]))[1] * 72 / axes.figure.dpi for text in order]
    placed = apart(heights, gap)
    aside = -4 if where.get("ha") == "right" else 4
    for text, height, place in zip(order, heights, placed, strict=True):
        name(axes, x, *curves[text][:1], text, curves[text][1], xytext=(aside, place - height), **where)


def apart(heights: list[float], gap: float) -> list[float]:
    """Ascending heights moved, as little as groups of them must be, until neighbours are `gap` apart."""
    groups: list[list[float]] = []
    for height in heights:
        groups.append([height])
        while len(groups) > 1 and ends(groups[-1], gap)[0] - ends(groups[-2], gap)[1] < gap:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [float(place) for group in groups for place in np.linspace(*ends(group, gap), len(group))]


def ends(group: list[float], gap: float) -> tuple[float, float]:
    """Lowest and highest place of a group that keeps its mean, its members `gap` apart."""
    middle, half = float(np.mean(group)), gap * (len(group) - 1) / 2
    return middle - half, middle + half


def key(axes: Any, colors: dict[str, str], x: float = 0.03, y: float = 0.97, **where: Any) -> None:
    """Writes each text in its curve's colour, one under another from (x, y), fractions of the panel.

    For curves that lie too close for a name beside each; in the order of the curves, top first.
    """
    where = {"va": "top", "weight": "bold", **where}
    for row, (text, color) in enumerate(colors.items()):
        down = -12 * row if where["va"] == "top" else 12 * (len(colors) - 1 - row)
        axes.annotate(text, (x, y), (0, down), "axes fraction", "offset points", color=color, **where)


def samples(axes: Any, drawn: dict[str, dict[str, Any]], **where: Any) -> None:
    """A legend that shows how each line or dot is drawn (text → what `Line2D` takes)."""
    from matplotlib.lines import Line2D

    if "ncols" in where:  # beyond, no phone has room
        where["ncols"] = min(where["ncols"], 4)
    handles = [Line2D([], [], label=text, **style) for text, style in drawn.items()]
    where = {"frameon": False, "fontsize": 8, "handlelength": 2.2, "borderaxespad": 0.2, **where}
    axes.legend(handles=handles, **where)


def decades(axes: Any) -> None:
    """Ticks for a y axis of logarithms to base 10: powers of ten, with 2 and 5 times these where they are few."""
    low, high = axes.get_ylim()
    factors = (1, 2, 5) if high - low < 3 else (1,)
    apart = max(1, math.ceil((high - low) / 7))
    powers = range(apart * math.floor(low / apart), math.ceil(high) + 1, apart)
    ticks = [power + math.log10(factor) for power in powers for factor in factors]
    axes.set_yticks([tick for tick in ticks if low <= tick <= high])
    far = max(abs(low), abs(high)) > 4
    axes.yaxis.set_major_formatter(lambda value, _: f"$10^{{{value:.0f}}}$" if far else f"{10**value:g}")
    axes.set_ylim(low, high)
