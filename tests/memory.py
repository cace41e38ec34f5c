"""The memory of `machine`, which raises at what a GPU would do in silence.

That is an access outside of its array, or not aligned; a byte of global memory written by two programs; two warps that
touch a byte of shared memory with no barrier between, one of them writing; and threads that write different values to
one place by one instruction. Shared memory starts as poison.
"""

from collections.abc import Sequence

import numpy as np
from sparse import Sparse

WARP = 32
SPACE = 40  # bits of an address within its array
NOBODY, SEVERAL = -1, -2


class Memory:
    """Global memory: arrays, each in an address space of its own."""

    def __init__(self, arrays: Sequence[np.ndarray | Sparse]):
        self.arrays = [a.bytes() if isinstance(a, Sparse) else a.reshape(-1).view(np.uint8) for a in arrays]
        self.addresses = [(i + 1) << SPACE for i in range(len(arrays))]
        self.writers = [
            Sparse(a.size, np.int32, NOBODY) if isinstance(a, Sparse) else np.full(a.size, NOBODY, np.int32)
            for a in self.arrays
        ]
        self.counts = np.zeros((4, len(arrays)), int)

    def locate(self, addresses, width: int):
        """(number of the array, (threads, width) indices of bytes) of an access."""
        which = np.unique(addresses >> SPACE) - 1
        if len(which) != 1 or not 0 <= which[0] < len(self.arrays):
            raise IndexError(f"no array is at {addresses}")
        (number,) = which
        return number, _places(addresses & (2**SPACE - 1), width, self.arrays[number].size, f"array {number}")

    def count(self, threads, which: int, at, stored: bool) -> None:
        sectors = np.unique(threads // WARP + (at[:, 0] // 32) * WARP)  # a program has no more than 32 warps
        self.counts[int(stored), which] += at.size
        self.counts[2 + stored, which] += 32 * len(sectors)

    def load(self, which: int, at):
        return self.arrays[which][at]

    def store(self, program: int, which: int, at, content) -> None:
        if not np.isin(self.writers[which][at], (NOBODY, program)).all():
            raise RuntimeError(f"programs write the same bytes of array {which}, {program} among them")
        self.writers[which][at] = program
        self.arrays[which][at] = content
        _check_same(self.arrays[which][at], content)


class Shared:
    """A program's shared memory; since the last barrier, who read and wrote each byte."""

    def __init__(self, size: int):
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.barrier()

    def barrier(self) -> None:
        self.readers, self.writers = (np.full(self.bytes.size, NOBODY) for _ in range(2))

    def places(self, addresses, width: int):
        """(threads, width) indices of bytes of an access."""
        return _places(addresses, width, self.bytes.size, "shared memory")

    def load(self, at, warps):
        _check_alone(self.writers[at], warps)
        before = self.readers[at]
        self.readers[at] = np.where((before == NOBODY) | (before == warps), warps, SEVERAL)
        within = self.readers[at]  # of two warps in this one access the later
        self.readers[at] = np.where(within == warps, warps, SEVERAL)
        return self.bytes[at]

    def store(self, at, warps, content) -> None:
        _check_alone(self.readers[at], warps)
        # several may write what is the same
        _check_alone(np.where(self.bytes[at] == content, NOBODY, self.writers[at]), warps)
        self.bytes[at], self.writers[at] = content, warps
        _check_same(self.bytes[at], content)


def _places(at, width: int, size: int, where: str):
    outside = (at < 0) | (at + width > size)
    if outside.any():
        raise IndexError(f"{width} bytes at {at[outside]} of {size}, {where}")
    if (at % width).any():
        raise ValueError(f"{width} bytes at {at[at % width != 0]} are not aligned, {where}")
    return at[:, None] + np.arange(width)


def _check_alone(others, warps) -> None:
    if not ((others == NOBODY) | (others == warps)).all():
        raise RuntimeError("two warps share a byte with no barrier between")


def _check_same(kept, written) -> None:
    if (kept != written).any():
        raise RuntimeError("threads write different values to one place: which of them stays is not specified")
