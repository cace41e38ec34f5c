"""Where a figure can be cut, so that a narrow page shows it in parts at full size: rows, then columns of panels."""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

NARROW = 331  # points: the room for a figure on a phone of 375 pixels
NAMED = "parts: "
MARGIN, WIDER = 3, 1.06  # points; browsers set text as wide as this, beside matplotlib


class Box(NamedTuple):
    """What stands together in a figure, in points from its upper left corner, as SVG has it.

    `labelled`: it has a scale of its own on its left; `scaled`: below; `spine` and `floor`: where its panel itself
    begins and ends.
    """

    left: float
    top: float
    right: float
    bottom: float
    labelled: bool = True
    scaled: bool = True
    spine: float = 0.0
    floor: float = 0.0


# A part of a figure: left, top, width and height of what is shown side by side, labels before panels they belong to.
Part = list[tuple[float, float, float, float]]


def parts(figure: Any) -> list[Part]:
    """The parts, in reading order.

    A row of panels without a scale below stays with the row under it. A panel that shares the scale of the one on its
    left stays with it while both are no wider than `NARROW`; else it begins a part, with that scale once more. Text
    that stands over several panels is a row of its own.
    """
    figure.draw_without_rendering()  # lays it out; text is as large as it was when drawn last
    width, height = 72 * figure.get_figwidth(), 72 * figure.get_figheight()
    found = sorted(boxes(figure), key=lambda box: box.top)
    rows: list[list[Box]] = []
    for box in found:
        above = rows[-1] if rows else []
        if above and (box.top <= max(each.bottom for each in above) or not all(each.scaled for each in above)):
            above.append(box)
        else:
            rows.append([box])
    lowest = [max(box.bottom for box in row) for row in rows]
    highest = [min(box.top for box in row) for row in rows]
    cuts = [0.0, *((low + high) / 2 for low, high in zip(lowest, highest[1:], strict=False)), height]
    cut = [
        part
        for row, (top, bottom) in zip(rows, itertools.pairwise(cuts), strict=False)
        for part in columns(row, top, bottom, width)
    ]
    return cut if len(cut) > 1 else [[(0.0, 0.0, width, height)]]


def columns(row: list[Box], top: float, bottom: float, width: float) -> Iterator[Part]:
    """The parts of one row."""
    groups: list[list[Box]] = []
    for box in sorted(row, key=lambda box: box.left):
        if groups and box.left <= max(each.right for each in groups[-1]):
            groups[-1].append(box)
        else:
            groups.append([box])
    ends = [max(box.right for box in group) for group in groups]
    cuts = [0.0, *((end + group[0].left) / 2 for end, group in zip(ends, groups[1:], strict=False))]
    cuts.append(min(width, ends[-1] + MARGIN))
    part: Part = []
    scale = (0.0, top, 0.0, 0.0)
    for group, (left, right) in zip(groups, itertools.pairwise(cuts), strict=True):
        labelled = [box for box in group if box.labelled]
        if labelled:  # what is written below the panel is not its scale
            spine, floor = min(box.spine for box in labelled), max(box.floor for box in labelled)
            scale = (left, top, spine - left, floor + MARGIN - top)
        shown = sum(each[2] for each in part)
        if part and (labelled or shown + right - left > NARROW):
            yield part
            part = []
        if part:  # beside what it follows: one box
            begins = part[-1][0]
            part[-1] = (begins, top, right - begins, bottom - top)
        else:
            part = [] if labelled or groups[0] is group else [scale]
            part.append((left, top, right - left, bottom - top))
    yield part


def boxes(figure: Any) -> Iterator[Box]:
    """Panels with all that is written at them, and what is written over several, of a figure and the figures in it."""
    unit, height = 72 / figure.dpi, 72 * figure.get_figheight()

    def box(extent: Any, *told: Any) -> Box:
        return Box(extent.x0 * unit, height - extent.y1 * unit, extent.x1 * unit, height - extent.y0 * unit, *told)

    for axes in figure.axes:
        if (extent := axes.get_tightbbox()) is not None:
            labelled = axes.yaxis.get_tick_params()["labelleft"]
            scaled, inner = axes.xaxis.get_tick_params()["labelbottom"], axes.bbox
            yield box(extent, labelled, scaled, inner.x0 * unit, height - inner.y0 * unit)
    figures = [figure]
    while figures:
        each = figures.pop()
        figures += each.subfigs
        for text in (*each.texts, *each.legends):  # titles of figures are among their texts
            found = box(text.get_window_extent())
            yield found._replace(right=found.left + WIDER * (found.right - found.left))


def written(cut: list[Part]) -> str:
    """Parts as a line of text: parts end with `;`, boxes with `,`."""
    boxes = ((" ".join(f"{round(number, 1):g}" for number in box) for box in part) for part in cut)
    return NAMED + "; ".join(map(", ".join, boxes))


def read(text: str) -> list[Part]:
    """What `written` made a line of; nothing of another line."""
    if not text.startswith(NAMED):
        return []
    boxes = ([map(float, box.split()) for box in part.split(",")] for part in text.removeprefix(NAMED).split(";"))
    return [[(left, top, width, height) for left, top, width, height in part] for part in boxes]
