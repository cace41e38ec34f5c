"""The memory of `machine`, which raises at what a GPU would do in silence.

That is an access outside of its array, or not aligned; a byte of global memory written by two programs; two warps that
touch a byte of shared memory with no barrier between, one of them writing; and threads that write different values to
one place by one instruction. Shared memory starts as poison.

An access is of `width` bytes a thread, at multiples of that: `at` counts in them.
"""

from collections.abc import Sequence

import numpy as np
from sparse import Sparse

WARP = 32
SPACE = 40  # bits of an address within its array
NOBODY, SEVERAL = 0, -1  # programs and warps count from 1 where they are written down


class Memory:
    """Global memory: arrays, each in an address space of its own."""

    def __init__(self, arrays: Sequence[np.ndarray | Sparse]):
        self.arrays = [(a if isinstance(a, Sparse) else a.reshape(-1)).view(np.uint8) for a in arrays]
        self.addresses = [(i + 1) << SPACE for i in range(len(arrays))]
        self.writers = [
            Sparse(a.size, np.int32, NOBODY) if isinstance(a, Sparse) else np.zeros(a.size, np.int32)
            for a in self.arrays
        ]
        self.counts = np.zeros((4, len(arrays)), int)

    def locate(self, addresses, width: int):
        """(number of the array, places in it) of an access."""
        number = int(addresses[0] >> SPACE) - 1
        base = (number + 1) << SPACE
        if ((addresses - base) >> SPACE).any() or not 0 <= number < len(self.arrays):
            raise IndexError(f"no array is at {addresses}")
        return number, _places(addresses - base, width, self.arrays[number].size, f"array {number}")

    def count(self, threads, which: int, at, width: int, stored: bool) -> None:
        sectors = np.sort(threads // WARP + (at * width // 32) * WARP)  # a program has no more than 32 warps
        self.counts[int(stored), which] += at.size * width
        self.counts[2 + stored, which] += 32 * (1 + np.count_nonzero(sectors[1:] != sectors[:-1]))

    def load(self, which: int, at, width: int):
        return _grouped(self.arrays[which], width)[at]

    def change(self, which: int, at, content) -> None:
        """An atomic's store, which any program may make."""
        _grouped(self.arrays[which], content.dtype.itemsize)[at] = content.view(f"V{content.dtype.itemsize}")

    def store(self, program: int, which: int, at, content) -> None:
        """Content has a number of as many bytes as an access for each thread."""
        width = content.dtype.itemsize
        kept, writers = _grouped(self.arrays[which], width), _grouped(self.writers[which], width)
        before = writers[at].view(np.int32)
        if not ((before == NOBODY) | (before == program + 1)).all():
            raise RuntimeError(f"programs write the same bytes of array {which}, {program} among them")
        writers[at] = np.full(width, program + 1, np.int32).view(writers.dtype)
        kept[at] = content
        _check_same(kept[at], content)


class Shared:
    """A program's shared memory; since the last barrier, who read and wrote each byte."""

    def __init__(self, size: int):
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.readers, self.writers = np.zeros((2, size), np.int8)

    def barrier(self) -> None:
        self.readers.fill(NOBODY)
        self.writers.fill(NOBODY)

    def places(self, addresses, width: int):
        """Places of an access."""
        return _places(addresses, width, self.bytes.size, "shared memory")

    def load(self, at, warps, width: int):
        """`warps` are numbers from 1, one a thread."""
        warps = warps[:, None]
        readers, writers = (self._rows(a, width) for a in (self.readers, self.writers))
        _check_alone(writers.take(at, 0), warps)
        before = readers.take(at, 0)
        readers[at] = np.where((before == NOBODY) | (before == warps), warps, SEVERAL)
        within = readers.take(at, 0)  # of two warps in this one access the later
        if (within != warps).any():
            readers[at] = np.where(within == warps, warps, SEVERAL)
        return _grouped(self.bytes, width)[at]

    def store(self, at, warps, content) -> None:
        warps, width = warps[:, None], content.dtype.itemsize
        readers, writers = (self._rows(a, width) for a in (self.readers, self.writers))
        kept = _grouped(self.bytes, width)
        _check_alone(readers.take(at, 0), warps)
        before = writers.take(at, 0)
        if not ((before == NOBODY) | (before == warps)).all():  # several may write what is the same
            same = _bytes(kept[at]) == _bytes(content)
            _check_alone(np.where(same, NOBODY, before), warps)
        kept[at], writers[at] = content, warps
        _check_same(kept[at], content)

    @staticmethod
    def _rows(array, width: int):
        return array[: array.size // width * width].reshape(-1, width)


def _grouped(array, count: int):
    """So many elements at a time, as one without a meaning; what is left at the end is in no group."""
    whole = array if isinstance(array, Sparse) else array[: array.size // count * count]
    return whole.view(f"V{count * array.dtype.itemsize}")


def _bytes(numbers):
    return np.ascontiguousarray(numbers).view(np.uint8).reshape(len(numbers), -1)


def _places(at, width: int, size: int, where: str):
    if at.min() < 0 or at.max() + width > size:
        outside = (at < 0) | (at + width > size)
        raise IndexError(f"{width} bytes at {at[outside]} of {size}, {where}")
    unaligned = at & (width - 1)
    if unaligned.any():
        raise ValueError(f"{width} bytes at {at[unaligned != 0]} are not aligned, {where}")
    return at >> (width.bit_length() - 1)


def _check_alone(others, warps) -> None:
    if not ((others == NOBODY) | (others == warps)).all():
        raise RuntimeError("two warps share a byte with no barrier between")


def _check_same(kept, written) -> None:
    if kept.tobytes() != written.tobytes():
        raise RuntimeError("threads write different values to one place: which of them stays is not specified")
