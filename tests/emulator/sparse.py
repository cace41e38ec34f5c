"""Arrays as large as one likes for `machine`, of which only what is touched takes memory."""

import copy
from collections import defaultdict

import numpy as np

PAGE = 4096  # bytes


class Sparse:
    """A flat array that holds `fill` until it is written to; indexed by arrays of integers."""

    def __init__(self, size: int, dtype, fill):
        self.size, self.dtype = size, np.dtype(dtype)
        self.pages = defaultdict(np.full(PAGE // self.dtype.itemsize, fill, self.dtype).copy)

    def view(self, dtype) -> "Sparse":
        """The same memory, as another kind of numbers."""
        other = copy.copy(self)
        other.dtype = np.dtype(dtype)
        other.size = self.size * self.dtype.itemsize // other.dtype.itemsize
        return other

    def __getitem__(self, at):
        found = np.empty(np.shape(at), self.dtype)
        for page, chosen, places in self._pages(at):
            found[chosen] = page[places]
        return found

    def __setitem__(self, at, values) -> None:
        values = np.broadcast_to(values, np.shape(at))
        for page, chosen, places in self._pages(at):
            page[places] = values[chosen]

    def _pages(self, at):
        """(page, which of the indices are in it, where) of each page."""
        numbers, places = np.divmod(at, PAGE // self.dtype.itemsize)
        for number in np.unique(numbers).tolist():
            chosen = numbers == number
            yield self.pages[number].view(self.dtype), chosen, places[chosen]
