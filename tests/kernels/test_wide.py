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
    "first": View(2, 3, 5, 3 * 2**29),
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

    def __init__(self, view: View, mask: str, parts):
        """`parts`: (batch, splits, block) each."""
        self.view, self.mask = view, mask
        self.tiling = Tiling(ROWS, CHANNELS, math.ceil(view.rows / ROWS), 4)
        self.problem = Problem(
            view, DTYPE, 1, residual=True, activation="relu", mask=MASKS[mask](view.rows), weight=True
        )
        self.parts = [self.part(*part) for part in parts]

    def part(self, batch, splits, block):
        rows = np.concatenate([np.arange(i * ROWS, min((i + 1) * ROWS, self.view.rows)) for i in splits])
        channels = np.arange(block * CHANNELS, min((block + 1) * CHANNELS, self.view.channels))
        small = View(1, len(rows), len(channels), 1)
        drawn = Drawn(small, DTYPE, MASKS[self.mask](len(rows)), residual=True, activation="relu", seed=block)
        first = batch * self.tiling.splits
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

    def run(self, launch, *arrays, backwards=False):
        """Runs the parts' programs, counted from the end where the kernel does so."""
        assert launch.constants["WIDE"]
        outputs = [
            Sparse(math.prod(o.shape), DTYPES.get(o.dtype, o.dtype), 0 if o.zeroed else np.nan) for o in launch.outputs
        ]
        chosen = [i for part in self.parts for i in part.programs]
        chosen = [launch.programs - 1 - i for i in chosen] if backwards else chosen
        compiled.run(launch, arrays, outputs, chosen=chosen)
        return outputs

    def moments(self):
        return self.run(launches.moments(self.problem, 132, self.tiling), self.given()[0], self.seen())

    def sums(self):
        residual, dy = (self.tensor(lambda drawn, n=n: getattr(drawn, n)) for n in ("residual", "dy"))
        launch = launches.gradient_sums(self.problem, DTYPE, 132, self.tiling)
        return self.run(launch, *self.given(), residual, self.seen(), dy)

    def partial(self, array, part, fields):
        """What a part's only program has handed on, (fields, channels)."""
        split = int(part.rows[0]) // ROWS
        field = (part.batch * self.tiling.splits + split) * fields + np.arange(fields)
        return array[field[:, None] * self.view.channels + part.channels]


def ends(view):
    """The first, a middle and the last tile."""
    splits, blocks = math.ceil(view.rows / ROWS), math.ceil(view.channels / CHANNELS)
    return (0, [0], 0), (1, [splits // 2 + 1], blocks // 2), (1, [splits - 1], blocks - 1)


@pytest.mark.parametrize(
    "layout, mask", [("last", "none"), ("last", "full"), ("first", "none"), ("first", "full"), ("first", "rows")]
)
def test_every_kernel(layout, mask):
    """On each tile by itself; a mask of rows is walked alike in both layouts."""
    large = Large(MANY_ROWS[layout], mask, ends(MANY_ROWS[layout]))
    x, *vectors = large.given()
    residual, dy = (large.tensor(lambda drawn, n=n: getattr(drawn, n)) for n in ("residual", "dy"))
    *_, moments, _ = large.moments()
    *_, dz, sums, _ = large.sums()
    launch = launches.apply(large.problem, DTYPE, 132, large.tiling)
    (y,) = large.run(launch, x, *vectors, residual, backwards=True)
    weight = large.vector(lambda part: part.vectors()[2])
    both = [large.vector(lambda part, n=n: part.drawn.backward()[n][0]) for n in ("bias", "scale")]
    launch = launches.gradient_input(large.problem, DTYPE, DTYPE, 132, large.tiling)
    dx, again = large.run(launch, x, *vectors, weight, residual, large.seen(), dy, *both, backwards=True)
    for part in large.parts:
        rows, at = len(part.rows), large.elements(part)
        count, mean, m2 = (v[0] for v in part.drawn.moments())
        wanted = [np.where(count > 0, mean, 0), m2, *([] if mask == "none" else [count])]
        assert_close(large.partial(moments, part, len(wanted)), wanted, n=rows)
        grads = part.drawn.backward()
        total, product = large.partial(sums, part, 2)
        assert_close(total, grads["bias"][0], n=rows)
        assert_close(product / np.sqrt(part.vectors()[1] + EPSILON), grads["scale"][0], n=rows)
        assert_close(y[at], part.drawn.forward().reshape(part.shape), n=rows)
        assert_close(dx[at], grads["x"].reshape(part.shape), n=rows, factor=2)
        for kept in (dz, again):
            assert_close(kept[at], grads["residual"].reshape(part.shape), n=rows)


@pytest.mark.parametrize("layout, mask", [("last", "full"), ("first", "none")])
def test_merging(layout, mask):
    """So many channels that all of a channel's programs can run, and the last of them merges."""
    view = MANY_CHANNELS[layout]
    large = Large(view, mask, [(0, [0, 1], 0), (1, [0, 1], math.ceil(view.channels / CHANNELS) - 1)])
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
