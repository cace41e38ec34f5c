"""How every figure looks: type, colours that colour-blind readers tell apart, bands for deviation."""

from typing import Any

from experiments.record import require

# Okabe & Ito 2008: told apart with every common colour deficiency
BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY = (
    "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9",
)  # fmt: skip
INK, GREY, FAINT = "#222222", "#6B6B6B", "#D9D9D9"
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
