"""How a tensor is cut into tiles and programs: a pure function of shape, dtype and device."""

from typing import NamedTuple

# Each program reads its channels' vectors and writes their partial results, some 11 numbers a channel over the passes
# of x's size. Programs are few enough to keep that under 1.6 % of x.
BYTES_PER_CHANNEL_OF_A_PROGRAM = 700
# A mask of rows has three numbers more in the partial results, and is itself read again by each block of channels.
BYTES_WITH_A_MASK_OF_ROWS = 1600


class View(NamedTuple):
    """x as `(batch, outer, channels, inner)`, row-major: channels last has inner = 1."""

    batch: int
    outer: int
    channels: int
    inner: int

    @property
    def rows(self) -> int:
        """Values of a channel in one batch; row r is at outer r // inner, inner r % inner."""
        return self.outer * self.inner

    @property
    def size(self) -> int:
        return self.batch * self.rows * self.channels


class Tiling(NamedTuple):
    """Tiles are ROWS × CHANNELS; program (batch, split, block) walks tiles split, split + splits, … of its block.

    Kernels that reduce count tiles from the last row, the others from the first.
    """

    ROWS: int
    CHANNELS: int
    splits: int  # programs that share a block of channels
    warps: int

    def blocks(self, view: View) -> int:
        """Blocks of channels."""
        return _ceil(view.channels, self.CHANNELS)

    def programs(self, view: View) -> int:
        return view.batch * self.splits * self.blocks(view)

    def is_one_each(self, view: View) -> bool:
        """Whether no program has more than one tile."""
        return self.splits * self.ROWS >= view.rows


def choose(
    view: View,
    itemsize: int,
    processors: int,
    elements: int,
    resident: int,
    mask_of_rows: bool = False,
    warps: int = 8,
    wide: bool = True,
) -> Tiling:
    """The tiling for x of `itemsize` bytes an element, with tiles of that many elements, of `warps` if they are whole.

    Each block of channels reads a mask of rows again, so blocks that would be narrow are wider with one. Channels last,
    blocks are 64 bytes of channels wide, or 128 where x is large enough, few would be empty, and `wide` allows it.

    The device has `processors` multiprocessors, each of which holds `resident` programs at once: no program waits for
    another to end.
    """
    size = view.size * itemsize
    if view.inner == 1:
        width, wider = 64 // itemsize, 128 // itemsize
        used = view.channels / (_ceil(view.channels, wider) * wider)
        # the last program to arrive reads splits × CHANNELS partial results, twice as much in wide blocks; from so many
        # bytes of x on an H100 was faster with them nevertheless, in sums without a mask
        wide_from = 64e6 if itemsize == 2 or view.channels < 4 * wider else 6e6
        if wide and size >= wide_from and used > 0.8:
            width = wider
    elif mask_of_rows:
        width = 16
    else:
        width = 4 if view.inner >= 256 else 8
    width = min(width, _power_of_2(view.channels))
    height = min(elements // width, _power_of_2(view.rows))
    tiles = _ceil(view.rows, height)
    cost = BYTES_WITH_A_MASK_OF_ROWS if mask_of_rows else BYTES_PER_CHANNEL_OF_A_PROGRAM
    affordable = min(resident * processors, size // (cost * width))
    share = max(1, affordable // (view.batch * _ceil(view.channels, width)))
    splits = _ceil(tiles, _ceil(tiles, share))  # none of which has more than one tile less than another
    return Tiling(height, width, splits, max(1, height * width * warps // elements))


def stream(view: View, itemsize: int) -> Tiling:
    """The tiling for what is read and written once, channels last: a program for each tile of 4 KB, of four warps.

    Tiles are up to 256 bytes of channels wide. On an H100 that is up to 11 % faster than few programs with many tiles
    each, though every program loads its channels' vectors: L2 has them.
    """
    width = min(256 // itemsize, _power_of_2(view.channels))
    while width > 64 // itemsize and view.channels <= 0.8 * width * _ceil(view.channels, width):
        width //= 2
    height = min(4096 // itemsize // width, _power_of_2(view.rows))
    return Tiling(height, width, _ceil(view.rows, height), max(1, height * width * itemsize // 1024))


def alignment(count: int) -> int:
    """The largest power of two that divides it, up to 16."""
    return min(count & -count, 16)


def needs_wide_offsets(view: View, tiling: Tiling) -> bool:
    """Whether an offset passes 32 bits: within a batch, of masked-off elements too, or in a vector for each batch."""
    rows = (_ceil(view.rows, tiling.ROWS) + tiling.splits) * tiling.ROWS + view.inner
    return max(rows, view.batch) * (view.channels + tiling.CHANNELS) >= 2**31


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _power_of_2(n: int) -> int:
    """The smallest power of two ≥ n."""
    return 1 << max(n - 1, 0).bit_length()
