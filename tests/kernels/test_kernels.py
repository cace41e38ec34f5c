"""The Triton kernels, every option against NumPy float64.

They run in Triton's interpreter, and again compiled, their PTX on `machine`; with JBN_TEST_GPU=1 on a GPU instead.
"""

from itertools import cycle, product

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import compiled
import device
import interpreter
import ml_dtypes
import oracle
import problems
from driver import ON_GPU
from oracle import MORE_ACTIVATIONS
from problems import DTYPES, EPSILON, Drawn, check, cut, epsilon, execute, run_apply, run_moments, run_sums, summed

from jbn._op.activations import decoded
from jbn.kernels import launches
from jbn.kernels.launches import Mask, Problem
from jbn.kernels.tiling import Tiling, View, choose

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # masked NaN and overflow, in NumPy


RUN = {"gpu": device.run} if ON_GPU else {"interpreted": interpreter.execute, "compiled": compiled.run}


@pytest.fixture(autouse=True, params=RUN)
def where(request, monkeypatch):
    monkeypatch.setattr(problems, "run", RUN[request.param])
    return request.param


LAYOUTS = {"last": View(1, 150, 11, 1), "first": View(1, 6, 11, 25)}
ACTIVATIONS = [None, "relu", "relu6", "leaky_relu", "silu", "hard_swish"]


def crossed(these, those):
    """(where, *one of these, *one of those): all pairs, but compiled, which takes a second, those in turn."""
    pairs = {where: product(these, those) for where in RUN}
    if "compiled" in RUN:
        pairs["compiled"] = zip(these, cycle(those), strict=False)
    return [(where, *this, *that) for where in RUN for this, that in pairs[where]]


def single(values):
    """What `crossed` takes, of one argument."""
    return [(value,) for value in values]


# compiled, each layout is without a residual and with one
SHAPED = [("last", False), ("first", True), ("first", False), ("last", True)]


@pytest.mark.parametrize(
    "where, activation, layout, residual", crossed(single(ACTIVATIONS), SHAPED), indirect=["where"]
)
def test_activations(layout, activation, residual):
    drawn = Drawn(LAYOUTS[layout], residual=residual, activation=activation)
    drawn.scale *= 4  # beyond where relu6 and hard_swish bend
    check(drawn, keep=residual)


FAR = np.array([-np.inf, -1e30, -150, -30, 30, 150, 1e30, np.inf, np.nan], np.float32)
ENDS = {  # where these have others than 0 and z there
    "elu": ([-1] * 4, FAR[4:8]),
    "sigmoid": ([0] * 4, [1] * 4),
    "tanh": ([-1] * 4, [1] * 4),
    "leaky_relu(0.2)": (0.2 * FAR[:4], FAR[4:8]),
}


@pytest.mark.parametrize("name", MORE_ACTIVATIONS)
def test_more_activations(name):
    """One expression each, on z itself; far out nothing overflows."""
    activation, slope = decoded(name)
    z = np.concatenate([np.linspace(-12, 12, 247, dtype=np.float32), FAR]).reshape(1, 256, 1, 1)
    problem = Problem(
        View(*z.shape), "float32", 256, False, False, activation=activation, negative_slope=slope, centred=False
    )
    mean, ones, epsilons = np.zeros((1, 1), "f4"), np.ones((1, 1), "f4"), np.zeros(1, "f4")
    tiling, given = Tiling(64, 1, 2, 4), (mean, ones, epsilons, None, None)
    (y,) = execute(launches.apply(problem, "float32", 132, tiling), z, *given, None)
    launch = launches.gradient_input(problem, "float32", None, 132, tiling)
    dx, _ = execute(launch, z, *given, None, None, None, np.ones_like(z), None, None)
    near = z.astype(np.float64)[0, :247]
    for got, function in zip((y, dx), MORE_ACTIVATIONS[name], strict=True):
        np.testing.assert_allclose(got[0, :247], function(near), rtol=2e-6, atol=1e-6)
    y, dx = y[0, 247:, 0, 0], dx[0, 247:, 0, 0]
    below, above = ENDS.get(name, ([0] * 4, FAR[4:8]))
    np.testing.assert_allclose(y[:8], np.append(below, above), rtol=1e-6, atol=1e-9)
    flat = name in ("sigmoid", "tanh")
    slopes = [slope if activation == "leaky_relu" else 0] * 4 + [0 if flat else 1] * 4
    np.testing.assert_allclose(dx[:8], slopes, rtol=1e-6, atol=2e-7)
    assert np.isnan(y[8]) and (activation == "leaky_relu" or np.isnan(dx[8]))


PARAMETERS = {"scale": (True, False), "bias": (False, True), "neither": (False, False)}


@pytest.mark.parametrize(
    "where, dtype, layout, parameters",
    crossed(list(product(DTYPES, LAYOUTS)), single(PARAMETERS)),
    indirect=["where"],
)
def test_dtypes_and_parameters(layout, dtype, parameters):
    scale, bias = PARAMETERS[parameters]
    check(Drawn(LAYOUTS[layout], dtype, residual=True, activation="relu", scale=scale, bias=bias))


MASKS = {
    "full": (View(2, 150, 5, 1), Mask("full")),
    "full, one for all batches": (View(2, 150, 5, 1), Mask("full", shared=True)),
    "full, channels first": (View(2, 6, 5, 25), Mask("full")),
    "rows": (View(2, 150, 5, 1), Mask("rows", period=150)),
    "examples": (View(2, 150, 5, 1), Mask("rows", divisor=10, period=15)),
    "last of the axes, one for all": (View(2, 150, 5, 1), Mask("rows", shared=True, period=10)),
    "examples, channels first": (View(2, 6, 5, 25), Mask("rows", divisor=25, period=6)),
    "positions, channels first": (View(2, 6, 5, 25), Mask("rows", period=25)),
}


@pytest.mark.parametrize("where, name, splits", crossed(single(MASKS), [(3,), (1,)]), indirect=["where"])
def test_masks(name, splits):
    """With a channel, or a batch, that the mask hides altogether, and NaN and Inf at some that it hides."""
    view, mask = MASKS[name]
    drawn = Drawn(view, mask=mask, residual=True, activation="silu")
    if mask.kind == "full":
        drawn.mask[:, :, -1] = False
    elif not mask.shared:
        drawn.mask[-1] = False
    hidden = np.flatnonzero(~drawn.seen)
    drawn.x.reshape(-1)[hidden[0::6]] = np.nan
    drawn.dy.reshape(-1)[hidden[0::6]] = np.nan  # 0 · NaN of a loss that masks y after squaring it
    drawn.x.reshape(-1)[hidden[1::6]] = np.inf
    drawn.residual.reshape(-1)[hidden[2::6]] = -np.inf
    check(drawn, cut(view, splits))


# of one row both layouts are the same
RAGGED = dict.fromkeys(RUN, tuple(product([(1, "last"), *product([2, 49], LAYOUTS)], [1, 3, 65, 127, 200])))
if "compiled" in RUN:  # where 3, 65 and 127 channels have one kernel, and the layouts come in turn
    alike = product([(1, "last"), (2, "last"), (49, "first")], [3, 65, 127])
    RAGGED["compiled"] = [*alike, ((1, "last"), 1), ((49, "last"), 1), ((2, "first"), 200), ((49, "last"), 200)]


@pytest.mark.parametrize(
    "where, rows, layout, channels",
    [(where, *of, channels) for where in RUN for of, channels in RAGGED[where]],
    indirect=["where"],
)
def test_ragged(rows, channels, layout, where):
    # two values may be close to each other: then their std is small beside the rounding of their mean; of one value
    # 1/std is 30, and what should be z̄ - z̄ is, compiled, a fused product's rounding
    factor = 16 if rows == 2 or (rows == 1 and where != "interpreted") else 1
    view = View(1, rows, channels, 1) if layout == "last" else View(1, 1, channels, rows)
    check(Drawn(view, activation="silu"), cut(view, 2, 16, 64), factor=factor)


@pytest.mark.parametrize("view", [View(1, 391, 60, 1), View(1, 1, 60, 391)], ids=LAYOUTS)
def test_many_rows(view):
    """Enough programs for several steps of the merge, 16 in each; the last one has a row too few."""
    drawn, tiling = Drawn(view, activation="silu"), Tiling(8, 64, 40, 8)
    _, mean, m2 = run_moments(drawn, tiling)
    oracle.assert_moments((mean, m2), drawn.moments(), n=view.rows)
    total, product, _ = run_sums(drawn, tiling)
    oracle.assert_grads({"bias": total, "scale": product}, drawn.backward(), None, view.rows, axis=2)


@pytest.mark.parametrize("name", ["full", "full, channels first"])
def test_wide_offsets(name):
    """The same with 64-bit offsets, which the shape does not ask for; else kernels of test_masks."""
    view, mask = MASKS[name]
    view = view._replace(channels=11)
    drawn, tiling = Drawn(view, mask=mask, residual=True, activation="silu"), cut(view, 3)
    mean, var, weight = drawn.coefficients()
    vectors = mean, var, epsilon(drawn), drawn.scale, drawn.bias
    for launch, arrays in [
        (launches.moments(drawn.problem(), 132, tiling), (drawn.x, drawn.mask)),
        (launches.apply(drawn.problem(), "float32", 132, tiling), (drawn.x, *vectors, drawn.residual)),
        (
            launches.gradient_input(drawn.problem(weight=True), "float32", "float32", 132, tiling),
            (drawn.x, *vectors, weight, drawn.residual, drawn.mask, drawn.dy, mean, mean),
        ),
    ]:
        narrow = execute(launch, *arrays)
        wide = execute(launch._replace(constants=launch.constants | dict(WIDE=True)), *arrays)
        for a, b in zip(narrow, wide, strict=True):
            np.testing.assert_array_equal(a, b)


def test_blocks_of_channels():
    """64 bytes wide, or 128 from a size of x on, unless few of their channels would be there."""

    def width(rows, channels, itemsize, **options):
        return choose(View(1, rows, channels, 1), itemsize, 132, 4096, 2, **options).CHANNELS

    assert [width(rows, 256, 2) for rows in (124999, 125000)] == [32, 64]
    assert [width(rows, 128, 4) for rows in (11718, 11719)] == [16, 32]
    assert [width(rows, 64, 4) for rows in (249999, 250000)] == [16, 32]
    assert width(10**6, 80, 2) == 32 and width(10**6, 256, 2, wide=False) == 32


def test_offsets_beyond_32_bits():
    """Whether they are asked for."""
    tiling = Tiling(64, 64, 132, 8)
    assert not launches.needs_wide_offsets(View(1, 2**20, 1024, 1), tiling)
    assert launches.needs_wide_offsets(View(1, 2**21, 1024, 1), tiling)
    assert launches.needs_wide_offsets(View(1, 2**11, 1024, 2**10), tiling)
    assert launches.needs_wide_offsets(View(2**21, 1, 1024, 1), tiling)


def test_given_statistics():
    """Inference: x̄ = scale · rstd · z̄, which reads no x without an activation."""
    for activation in (None, "silu"):
        drawn = Drawn(LAYOUTS["last"], activation=activation)
        mean, var = drawn.running
        problem = drawn.problem(centred=False)
        vectors = (mean, var, epsilon(drawn), drawn.scale, drawn.bias)
        tiling = cut(drawn.view)
        options = dict(axis=1, epsilon=EPSILON, activation=activation)
        parameters = drawn.scale[0], drawn.bias[0], mean[0], var[0]
        (y,) = execute(launches.apply(problem, "float32", 132, tiling), drawn.x, *vectors, None)
        oracle.assert_close(y[0], oracle.bn_eval(drawn.x[0], *parameters, **options), axis=1)
        x = drawn.x if activation else None
        launch = launches.gradient_input(problem, "float32", None, 132, tiling)
        dx, _ = execute(launch, x, *vectors, None, None, None, drawn.dy, None, None)
        oracle.assert_close(dx[0], oracle.bn_eval_grads(drawn.dy[0], drawn.x[0], *parameters, **options)["x"], axis=1)


def test_output_dtype():
    drawn = Drawn(LAYOUTS["last"], "float32")
    y = run_apply(drawn, cut(drawn.view), "bfloat16")
    assert y.dtype == ml_dtypes.bfloat16
    oracle.assert_close(y, drawn.forward(), axis=2)


@pytest.mark.parametrize("layout", ["last", "first"])
@pytest.mark.parametrize("mask", [None, Mask("full")])
def test_large_mean(layout, mask, where):
    """|mean| / std = 1e4: the variance is within 1e-4, as a lane's values each round its mean by up to 5e-4 of std.

    A mask leaves fewer values to a lane, and a GPU's division rounds too.
    """
    view = View(1, 4096, 8, 1) if layout == "last" else View(1, 16, 8, 256)
    drawn = Drawn(view, mask=mask)
    drawn.x = np.random.default_rng(1).normal(1e4, 1, view).astype(np.float32)
    for splits in (1, 5) if where != "compiled" else (5,):
        _, mean, m2 = run_moments(drawn, Tiling(64, 8, splits, 4))
        wanted = drawn.moments()
        np.testing.assert_allclose(mean, wanted[1], rtol=3e-7)
        np.testing.assert_allclose(
            m2, wanted[2], rtol=(1e-4 if mask is None else 2e-4) if where == "interpreted" else 3e-4
        )


@pytest.mark.parametrize("row", [0, 4095])
@pytest.mark.parametrize("value", [1e6, -1e6])
def test_outlier(row, value):
    drawn = Drawn(View(1, 4096, 8, 1))
    drawn.x[0, row] = value
    for splits in (1, 64):
        _, mean, m2 = run_moments(drawn, Tiling(64, 8, splits, 4))
        _, mean64, m264 = drawn.moments()
        std = np.sqrt(m264 / 4096)
        assert np.max(np.abs(mean - mean64) / std) < 1e-6
        np.testing.assert_allclose(m2, m264, rtol=1e-5)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e10, 3e38, -3e38])
@pytest.mark.parametrize("mask", [None, Mask("full"), Mask("rows", period=300)])
def test_constant_channels(value, mask, where):
    """Exactly: the mean is the value and the variance 0, whatever masked positions hold."""
    drawn = Drawn(View(1, 300, 8, 1), mask=mask)
    drawn.x[:] = np.where(drawn.seen, np.float32(value), np.nan)
    for splits in (1, 3) if where != "compiled" else (3,):
        _, mean, m2 = run_moments(drawn, Tiling(32, 8, splits, 4))
        np.testing.assert_array_equal(mean, np.full_like(mean, np.float32(value)))
        np.testing.assert_array_equal(m2, np.zeros_like(m2))


def test_not_finite():
    """A NaN that is not masked makes its own channel NaN, and no other."""
    drawn = Drawn(View(1, 300, 8, 1))
    drawn.x[0, 7, 2] = np.nan
    _, mean, m2 = run_moments(drawn, Tiling(32, 8, 3, 4))
    for vector in (mean, m2):
        np.testing.assert_array_equal(np.isnan(vector[0]), np.arange(8) == 2)
    np.testing.assert_array_equal(np.isnan(run_apply(drawn, cut(drawn.view))[0, :, 2]).all(), True)


CHOSEN = [View(3, 300, 40, 1), View(1, 2, 40, 300), View(7, 2, 100, 1), View(1, 700, 24, 1)]


@pytest.mark.parametrize("where, view, dtype", crossed(single(CHOSEN), single(DTYPES)), indirect=["where"])
def test_chosen_tilings(view, dtype):
    """What `choose` gives for real shapes works too, here for small ones and few processors."""
    drawn = Drawn(view, dtype)
    _, mean, m2 = summed(drawn, *execute(launches.moments(drawn.problem(), 4), drawn.x, None)[:3])
    oracle.assert_moments((mean, m2), drawn.moments(), n=view.rows)
