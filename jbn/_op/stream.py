"""A stream of parts merged as a balanced tree, so that rounding grows with the logarithm of their number."""

from collections.abc import Callable, Iterable
from typing import TypeVar

Part = TypeVar("Part")


def merge_stream(parts: Iterable[Part], merge: Callable[[Part, Part], Part]) -> Part | None:
    """All parts merged in order, holding only log₂ of them at a time; None of none.

    Parts meet only with others of their own weight, as digits of a binary counter carry: a small part is never
    added to a large sum, where its last bits would be lost.
    """
    waiting: list[tuple[int, Part]] = []  # sizes fall from left to right
    for part in parts:
        size = 1
        while waiting and waiting[-1][0] == size:
            part = merge(waiting.pop()[1], part)
            size *= 2
        waiting.append((size, part))
    if not waiting:
        return None
    _, total = waiting.pop()
    while waiting:
        total = merge(waiting.pop()[1], total)
    return total
