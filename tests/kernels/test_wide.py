"""The compiled kernels on x of more than 2³¹ elements, in memory of which only what is touched is there.

A few programs of millions run, on the first, a middle and the last tile; the oracle has these tiles alone.
"""

import math
from typing import NamedTuple

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import compiled
from oracle import assert_close
from problems import DTYPES, EPSILON, Drawn
from sparse import Sparse

from jbn.kernels import launches
from jbn.kernels.launches import Mask, Problem
from jbn.kernels.tiling import Tiling, View

DTYPE = "bfloat16"
ROWS, CHANNELS = 64, 8
MASKS = {
    "none": lambda rows: None,
    "full": lambda rows: Mask("full"),
    "rows": lambda rows: Mask("rows", period=rows),
}
MANY_ROWS = {  # what is beyond 2³¹: rows · channels; channels first also channels · S, and the rows by themselves
    "last": View(2, 2**23 + 70, 1000, 1),
    "first": View(2, 3, 5, 3 * 2**29 + 2),
}
MANY_CHANNELS = {"last": View(2, 70, 2**25 + 5, 1), "first": View(2, 2, 2**26 + 5, 35)}


class Part(NamedTuple):
    """Rows of a block of channels, in one batch, and what is drawn for them."""

    batch: int
    rows: np.ndarray
    channels: np.ndarray
    drawn: Drawn
    programs: list[int]

    @property
    def shape(self):
        return len(self.rows), len(self.channels)

    def vectors(self):
        """mean, var and 1 / count, (channels,) each."""
        mean, var, weight = self.drawn.coefficients()
        if weight is None:
            weight = np.full_like(mean, 1 / len(self.rows))
        return mean[0], var[0], weight[0]


class Large:
    """A view with some parts of it: arrays are poison everywhere else."""

    def __init__(self, view: View, mask: str, parts, from_end: bool = False):
        """`parts`: (batch, splits, block) each.

        Tiles are counted from the first row and programs from the last batch, or, `from_end`, the other way round.
        """
        self.view, self.mask, self.from_end = view, mask, from_end
        self.tiling = Tiling(ROWS, CHANNELS, math.ceil(view.rows / ROWS), 4)
        self.problem = Problem(
            view, DTYPE, 1, residual=True, activation="relu", mask=MASKS[mask](view.rows), weight=True
        )
        self.parts = [self.part(*part) for part in parts]

    def part(self, batch, splits, block):
        starts = [self.view.rows - (i + 1) * ROWS if self.from_end else i * ROWS for i in splits]
        rows = np.concatenate([np.arange(max(i, 0), min(i + ROWS, self.view.rows)) for i in starts])
        channels = np.arange(block * CHANNELS, min((block + 1) * CHANNELS, self.view.channels))
        small = View(1, len(rows), len(channels), 1)
        drawn = Drawn(small, DTYPE, MASKS[self.mask](len(rows)), residual=True, activation="relu", seed=block)
        first = (batch if self.from_end else self.view.batch - 1 - batch) * self.tiling.splits
        programs = [(first + split) * self.tiling.blocks(self.view) + block for split in splits]
        return Part(batch, rows, channels, drawn, programs)

    def elements(self, part):
        """Where x, `(B, N, C, S)`, has a part."""
        n, s = np.divmod(part.rows[:, None], self.view.inner)
        return ((part.batch * self.view.outer + n) * self.view.channels + part.channels) * self.view.inner + s

    def channels(self, part):
        return part.batch * self.view.channels + part.channels

    def tensor(self, values, dtype=DTYPE, poison=np.nan):
        array = Sparse(self.view.size, DTYPES.get(dtype, dtype), poison)
        for part in self.parts:
            array[self.elements(part)] = values(part.drawn).reshape(part.shape)
        return array

    def tensors(self, *names):
        return (self.tensor(lambda drawn, name=name: getattr(drawn, name)) for name in names)

    def vector(self, values):
        array = Sparse(self.view.batch * self.view.channels, np.float32, np.nan)
        for part in self.parts:
            array[self.channels(part)] = values(part)
        return array

    def seen(self):
        if self.mask == "full":
            return self.tensor(lambda drawn: drawn.mask, "bool", False)
        array = Sparse(self.view.batch * self.view.rows, bool, False)
        for part in self.parts:
            if self.mask == "rows":
                array[part.batch * self.view.rows + part.rows] = part.drawn.mask[0]
        return array

    def given(self):
        """x, then the vectors of the affine map."""
        mean, var = (self.vector(lambda part, i=i: part.vectors()[i]) for i in range(2))
        scale, bias = (self.vector(lambda part, n=n: getattr(part.drawn, n)[0]) for n in ("scale", "bias"))
        epsilon = np.full(self.view.batch, EPSILON, np.float32)
        return self.tensor(lambda drawn: drawn.x), mean, var, epsilon, scale, bias

    def run(self, launch, *arrays):
        """Runs the parts' programs."""
        assert launch.constants["WIDE"]
        outputs = [
            Sparse(math.prod(o.shape), DTYPES.get(o.dtype, o.dtype), 0 if o.zeroed else np.nan) for o in launch.outputs
        ]
        chosen = [i for part in self.parts for i in part.programs]
        compiled.run(launch, arrays, outputs, chosen=chosen)
        return outputs

    def moments(self):
        return self.run(launches.moments(self.problem, 132, self.tiling), self.given()[0], self.seen())

    def sums(self):
        residual, dy = self.tensors("residual", "dy")
        launch = launches.gradient_sums(self.problem, DTYPE, 132, self.tiling)
        return self.run(launch, *self.given(), residual, self.seen(), dy)

    def outputs(self):
        """y, x̄ and z̄ of the second launches, by each part's own statistics and sums."""
        x, *vectors = self.given()
        residual, dy = self.tensors("residual", "dy")
        (y,) = self.run(launches.apply(self.problem, DTYPE, 132, self.tiling), x, *vectors, residual)
        weight = self.vector(lambda part: part.vectors()[2])
        sums = [self.vector(lambda part, n=n: part.drawn.backward()[n][0]) for n in ("bias", "scale")]
        launch = launches.gradient_input(self.problem, DTYPE, DTYPE, 132, self.tiling)
        return y, *self.run(launch, x, *vectors, weight, residual, self.seen(), dy, *sums)

    def partial(self, array, part, fields):
        """What a part's only program has handed on, (fields, channels)."""
        [program] = part.programs
        field = program // self.tiling.blocks(self.view) * fields + np.arange(fields)
        return array[field[:, None] * self.view.channels + part.channels]


def ends(view):
    """The first, a middle and the last tile; a batch's statistics are those of one part, or of parts drawn alike."""
    splits, blocks = math.ceil(view.rows / ROWS), math.ceil(view.channels / CHANNELS)
    return (0, [0], 0), (0, [splits // 2 + 1], blocks // 2), (1, [splits - 1], blocks - 1)


@pytest.mark.parametrize(
    "layout, mask", [("last", "none"), ("last", "full"), ("first", "none"), ("first", "full"), ("first", "rows")]
)
def test_every_kernel(layout, mask):
    """On each tile by itself; a mask of rows is walked alike in both layouts."""
    view = MANY_ROWS[layout]
    first, second = (Large(view, mask, ends(view), from_end) for from_end in (True, False))
    *_, moments, _ = first.moments()
    *_, kept, sums, _ = first.sums()
    for part in first.parts:
        count, mean, m2 = (v[0] for v in part.drawn.moments())
        wanted, grads = [np.where(count > 0, mean, 0), m2, *([] if mask == "none" else [count])], part.drawn.backward()
        assert_close(first.partial(moments, part, len(wanted)), wanted, n=len(part.rows))
        total, product = first.partial(sums, part, 2)
        assert_close(total, grads["bias"][0], n=len(part.rows))
        assert_close(product / np.sqrt(part.vectors()[1] + EPSILON), grads["scale"][0], n=len(part.rows))
        assert_close(kept[first.elements(part)], grads["residual"].reshape(part.shape), n=len(part.rows))
    y, dx, dz = second.outputs()
    for part in second.parts:
        at, grads = second.elements(part), part.drawn.backward()
        assert_close(y[at], part.drawn.forward().reshape(part.shape), n=len(part.rows))
        assert_close(dx[at], grads["x"].reshape(part.shape), n=len(part.rows), factor=2)
        assert_close(dz[at], grads["residual"].reshape(part.shape), n=len(part.rows))


@pytest.mark.parametrize("layout, mask", [("last", "full"), ("first", "none")])
def test_merging(layout, mask):
    """So many channels that all of a channel's programs can run, and the last of them merges."""
    view = MANY_CHANNELS[layout]
    large = Large(view, mask, [(0, [0, 1], 0), (1, [0, 1], math.ceil(view.channels / CHANNELS) - 1)], from_end=True)
    count, mean, var, *_ = large.moments()
    total, product, *_ = large.sums()
    for part in large.parts:
        at, grads, wanted = large.channels(part), part.drawn.backward(), [v[0] for v in part.drawn.moments()]
        if mask != "none":
            np.testing.assert_array_equal(count[at], wanted[0])
        assert_close(mean[at], wanted[1], n=view.rows)
        assert_close(var[at], wanted[2] / np.maximum(wanted[0], 1), n=view.rows)
        assert_close(total[at], grads["bias"][0], n=view.rows)
        assert_close(product[at], grads["scale"][0], n=view.rows)
