"""Bytes that the kernels load and store, counted by the interpreter, against DESIGN's table of passes over x."""

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import ml_dtypes
from interpreter import Traffic, run

from jbn.kernels import launches
from jbn.kernels.launches import Mask, Problem
from jbn.kernels.tiling import View

PROCESSORS = 132
DTYPES = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}

# Real shapes with fewer rows: just over 1 MB in bfloat16, where vectors and partial results weigh most.
VIEWS = {
    "ResNet's widest channels": View(1, 6 * 7 * 7, 2048, 1),
    "a 3×3 norm of ResNet": View(1, 12 * 14 * 14, 256, 1),
    "few channels": View(1, 3 * 56 * 56, 64, 1),
    "channels that fill no tile": View(1, 20 * 14 * 14, 144, 1),
    "few and no power of two": View(1, 7 * 56 * 56, 24, 1),
    "dense": View(1, 640, 1024, 1),
    "channels first": View(1, 3, 64, 3136),
    "channels first, small images": View(1, 22, 512, 49),
    "four batches": View(4, 3136, 64, 1),
}


def count(launch, *shapes_and_dtypes) -> Traffic:
    inputs = [np.zeros(shape, dtype) for shape, dtype in shapes_and_dtypes]
    outputs = [np.zeros(o.shape, DTYPES.get(o.dtype, o.dtype)) for o in launch.outputs]
    return run(launch.kernel, launch.programs, *inputs, *launch.numbers, *outputs, **launch.constants)


def passes(view, dtype, residual=False, activation=None, mask=None, centred=True):
    """(forward, backward) traffic in units of x's bytes: [loaded, stored] each."""
    full, vector = (tuple(view), DTYPES[dtype]), ((view.batch, view.channels), np.float32)
    vectors = (vector, vector, ((view.batch,), np.float32), vector, vector)
    seen = (tuple(view), bool)
    problem = Problem(
        view, dtype, view.rows, residual=residual, activation=activation, mask=mask, centred=centred, weight=bool(mask)
    )
    forward = [count(launches.apply(problem, dtype, PROCESSORS), full, *vectors, full)]
    backward = []
    if centred:
        forward.append(count(launches.moments(problem, PROCESSORS), full, seen))
        kept = dtype if residual and activation else None
        launch = launches.gradient_sums(problem, kept, PROCESSORS)
        backward.append(count(launch, full, *vectors, full, seen, full))
        if kept:
            problem = problem._replace(residual=False, activation=None)
    launch = launches.gradient_input(problem, dtype, None, PROCESSORS)
    backward.append(count(launch, full, *vectors, vector, full, seen, full, vector, vector))
    size = view.size * np.dtype(DTYPES[dtype]).itemsize
    return [np.sum(found, axis=0) / size for found in (forward, backward)]


def check(view, dtype, forward, backward, over=0.02, **options):
    """Loaded and stored together are at most 2 % over the floor, and not under it."""
    assert view.size * np.dtype(DTYPES[dtype]).itemsize > 1e6
    for found, floor in zip(passes(view, dtype, **options), (forward, backward), strict=True):
        assert (found >= floor).all()
        assert found.sum() <= (1 + over) * sum(floor), (found, floor)


@pytest.mark.parametrize("name", VIEWS)
def test_plain(name):
    check(VIEWS[name], "bfloat16", (2, 1), (4, 1), activation="relu")


def test_float32():
    check(View(1, 1600, 256, 1), "float32", (2, 1), (4, 1), activation="relu")


@pytest.mark.parametrize("name", ["dense", "channels first"])
def test_residual(name):
    check(VIEWS[name], "bfloat16", (3, 1), (4, 1), residual=True)
    check(VIEWS[name], "bfloat16", (3, 1), (5, 2), residual=True, activation="relu")


def test_masks():
    view = VIEWS["dense"]
    # y needs no mask; a full one takes a byte where bfloat16 takes two
    check(view, "bfloat16", (2.5, 1), (5, 1), mask=Mask("full"))
    # each block of channels reads one of rows again: a byte for 64 of x, which L2 holds
    check(view, "bfloat16", (2, 1), (4, 1), over=0.04, mask=Mask("rows", period=view.rows))


def test_given_statistics():
    check(VIEWS["dense"], "bfloat16", (1, 1), (2, 1), centred=False, activation="relu")
    check(VIEWS["dense"], "bfloat16", (1, 1), (1, 1), centred=False)
