"""Bytes that the kernels load and store, counted by the interpreter, against the table of passes in kernels/README.md.

Counting a real shape takes minutes. So the interpreter counts smaller ones, which `kernels/traffic.py` must predict to
the byte; every real one is predicted then.
"""

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import compiled
import ml_dtypes
from interpreter import Traffic, run

from experiments.material import cases
from jbn.kernels import launches
from jbn.kernels.launches import Mask, Problem
from jbn.kernels.tiling import View
from jbn.kernels.traffic import traffic

PROCESSORS = 132
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# Real shapes cut down: of each a program still walks several tiles, or several programs share them.
VIEWS = {
    "ResNet's widest channels": View(1, 2 * 7 * 7, 512, 1),
    "a 3×3 norm of ResNet": View(1, 2 * 14 * 14, 256, 1),
    "few channels": View(1, 24 * 7 * 7, 64, 1),
    "channels that fill no tile": View(1, 3 * 14 * 14, 144, 1),
    "few and no power of two": View(1, 56 * 56, 24, 1),
    "dense": View(1, 160, 512, 1),
    "channels first": View(1, 3, 16, 28 * 28),
    "channels first, small images": View(1, 22, 64, 49),
    "four batches": View(4, 14 * 28, 64, 1),
}


def zeros(launch, shapes_and_dtypes):
    """Inputs and outputs of a launch."""
    inputs = [np.zeros(shape, dtype) for shape, dtype in shapes_and_dtypes]
    return inputs, [np.zeros(o.shape, DTYPES.get(o.dtype, o.dtype)) for o in launch.outputs]


def count(launch, *shapes_and_dtypes) -> Traffic:
    inputs, outputs = zeros(launch, shapes_and_dtypes)
    return run(launch.kernel, launch.programs, *inputs, *launch.numbers, *outputs, **launch.constants)


def pieces(view, dtype, residual=False, activation=None, mask=None, centred=True):
    """((launch, arrays that it is given), …) of the forward and of the backward pass."""
    full, vector = (tuple(view), DTYPES[dtype]), ((view.batch, view.channels), np.float32)
    vectors = (vector, vector, ((view.batch,), np.float32), vector, vector)
    seen = (tuple(view), bool)
    problem = Problem(
        view, dtype, view.rows, residual=residual, activation=activation, mask=mask, centred=centred, weight=bool(mask)
    )
    forward = [(launches.apply(problem, dtype, PROCESSORS), (full, *vectors, full))]
    backward = []
    if centred:
        forward.append((launches.moments(problem, PROCESSORS), (full, seen)))
        kept = dtype if residual and activation else None
        sums = launches.gradient_sums(problem, kept, PROCESSORS)
        backward.append((sums, (full, *vectors, full, seen, full)))
        if kept:
            problem = problem._replace(residual=False, activation=None)
    last = launches.gradient_input(problem, dtype, None, PROCESSORS)
    backward.append((last, (full, *vectors, vector, full, seen, full, vector, vector)))
    return forward, backward


TABLE = {  # of kernels/README.md: options, then passes over x: (read, written) forward and backward
    "plain": ({}, (2, 1), (4, 1)),
    "relu": ({"activation": "relu"}, (2, 1), (4, 1)),
    "residual": ({"residual": True}, (3, 1), (4, 1)),
    "residual, relu": ({"residual": True, "activation": "relu"}, (3, 1), (5, 2)),
}
INFERENCE = {
    "inference": ({"centred": False}, (1, 1), (1, 1)),
    "inference, relu": ({"centred": False, "activation": "relu"}, (1, 1), (2, 1)),
}


def predicted(launch, view, dtype) -> Traffic:
    size = np.dtype(DTYPES[dtype]).itemsize
    return traffic(launch, view, dict.fromkeys(("x", "residual", "dy", "y", "dx", "dz"), size))


def from_memory(found: Traffic) -> int:
    return found.loaded + found.stored - found.again


def view_of(case) -> View:
    axis = case.axis % len(case.shape)
    return View(1, math.prod(case.shape[:axis]), case.shape[axis], math.prod(case.shape[axis + 1 :]))


PREDICTED = [
    *(("dense", row) for row in (*TABLE, *INFERENCE)),
    *((name, "relu") for name in VIEWS if name != "dense"),
    ("channels first, small images", "residual, relu"),
]


@pytest.mark.parametrize("name, row", PREDICTED)
def test_prediction(name, row):
    """The interpreter counts what is predicted, to the byte."""
    view, (options, *_) = VIEWS[name], (TABLE | INFERENCE)[row]
    mask = {"relu": Mask("full"), "residual, relu": Mask("rows", period=view.rows)}.get(row)
    for launch, arrays in itertools.chain(*pieces(view, "bfloat16", mask=mask, **options)):
        assert count(launch, *arrays)[:2] == predicted(launch, view, "bfloat16")[:2]


# channels last in turn
@pytest.mark.parametrize(
    "name, dtype",
    [("few channels", "bfloat16"), ("dense", "float32"), ("channels first", "bfloat16"), ("channels first", "float32")],
)
def test_compiled(name, dtype):
    """In the binaries too what is of x's size is asked for once, by every warp in whole sectors, or not at all."""
    view = VIEWS[name]
    for launch, arrays in itertools.chain(*pieces(view, dtype, residual=True, activation="relu")):
        inputs, outputs = zeros(launch, arrays)
        report = compiled.run(launch, inputs, outputs)
        moved = [0, 0]
        for i, array in enumerate([*inputs, *outputs]):
            if array.shape == tuple(view):
                for j, (asked, touched) in enumerate([report[0::2], report[1::2]]):
                    assert asked[i] == touched[i] and asked[i] in (0, array.nbytes), (launch.kernel, i)
                    moved[j] += asked[i]
        table, size = predicted(launch, view, dtype)[:2], inputs[0].nbytes
        table = table[0] - predicted(launch, view, dtype).again, table[1]
        assert moved == [bytes_ // size * size for bytes_ in table]


CASES = {case.name: case for case in cases.GPU}


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_case(dtype):
    """At its real size: at most 2 % over the table, where x has over 1 MB."""
    size = np.dtype(DTYPES[dtype]).itemsize
    checked = 0
    for name, case in CASES.items():
        view = view_of(case)
        if view.size * size <= 1e6:
            continue
        checked += 1
        for mask, bytes_of_mask in (
            (None, 0),
            (Mask("full"), view.size),
            (Mask("rows", period=view.rows), view.rows),
        ):
            for row, (options, *table) in (TABLE | (INFERENCE if mask is None else {})).items():
                both = pieces(view, dtype, mask=mask, **options)
                # the moments read the mask, and both launches backward
                for launched, passes, reads in zip(both, table, (1, 2), strict=True):
                    floor = sum(passes) * view.size * size + reads * bytes_of_mask
                    found = sum(from_memory(predicted(launch, view, dtype)) for launch, _ in launched)
                    assert floor <= found <= 1.02 * floor, (name, mask, row, found / floor)
    assert checked > 50
