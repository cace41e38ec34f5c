"""The reductions as a CPU has them: rows cut into parts that are added to each other, against the float64 oracle."""

import re
from functools import partial
from itertools import cycle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import Case, draw, positional, precision, train
from oracle import ACTIVATIONS, assert_close, assert_grads, assert_state

import jbn
from jbn._op import xla_cpu
from jbn._op.plan import Plan
from jbn._op.sync import Sync

pytestmark = pytest.mark.usefixtures("strict")


@pytest.fixture
def small(monkeypatch):
    """However little there is, it is cut."""
    monkeypatch.setattr(xla_cpu, "LITTLE", 0)
    jax.clear_caches()  # `jit` knows nothing of it
    yield
    jax.clear_caches()


def parts(shape, numbers, axis=-1, batch=0):
    plan = Plan(axis % len(shape), batch, 1, True, None, jnp.dtype("float32"), Sync(), False, None)
    return xla_cpu._parts(plan, jax.ShapeDtypeStruct(shape, jnp.float32), numbers)


CUT = [  # shape, axis, parts of plain numbers and where an activation's derivative is in the loop
    ((32, 28, 28, 128), -1, 32, 8),
    ((9 * 11 * 17, 512), -1, 17, 9),
    ((15, 7, 7, 64), -1, 21, 7),
    ((2**22, 8), -1, 32, 8),
    ((30, 64, 28, 28), 1, 30, 10),
    ((8, 4, 9, 256), 2, 32, 8),
]


@pytest.mark.parametrize("shape, axis, plain, others", CUT, ids=str)
def test_rows_are_cut(shape, axis, plain, others):
    assert parts(shape, xla_cpu.PLAIN_PARTS, axis) == plain
    assert parts(shape, xla_cpu.PARTS, axis) == others
    assert parts((5, *shape), xla_cpu.PARTS, axis % len(shape) + 1, batch=1) == others


def test_many_batches_of_little_are_cut():
    """What both passes of a derivative compute would be kept: thrice x's bytes."""
    assert parts((1000, 64, 64), xla_cpu.PLAIN_PARTS, batch=1) == 32
    assert parts((1000, 64, 64), xla_cpu.PARTS, batch=1) == 8


WHOLE = {
    "little": ((2**15, 1), -1, 0),
    "few rows": ((3, 10**5), -1, 0),
    "no parts": ((2 * 97 * 89, 64), -1, 0),
    "channels first of all": ((64, 28, 28, 64), 0, 0),
    "few examples": ((3, 64, 100, 100), 1, 0),
    "few batches of little": ((8, 64, 64), -1, 1),
    "empty": ((0, 8), -1, 0),
}


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_reduced_as_it_is(name):
    shape, axis, batch = WHOLE[name]
    for numbers in (xla_cpu.PARTS, xla_cpu.PLAIN_PARTS, xla_cpu.HALF_PARTS):
        assert parts(shape, numbers, axis, batch) is None


def two_sums(lowered) -> int:
    """How many reductions have two results."""
    return len(re.findall(r"%\d+:2 = stablehlo.reduce\(", lowered.as_text()))


CASES = {
    "rank 2": Case((8 * 8 * 3, 5)),
    "rank 3": Case((9 * 2, 2, 3)),
    "images": Case((16, 6, 6, 4), scale=False),
    "odd parts": Case((9 * 11 * 13, 3), bias=False),
    "channels first": Case((16, 3, 6, 4), axis=1),
    "between rows": Case((8, 3, 4, 5), axis=2, residual=True, activation="relu"),
} | {f"residual, {act}": Case((16, 4, 6, 4), residual=True, activation=act) for act in ACTIVATIONS}


OTHERS = cycle([np.float16, ml_dtypes.bfloat16, np.float64])


@pytest.mark.parametrize("name, dtype", [(name, dtype) for name in CASES for dtype in (np.float32, next(OTHERS))])
def test_values_and_gradients(name, dtype, small):
    case = CASES[name]
    inputs = draw(case, dtype)
    dy = np.random.default_rng(7).normal(size=case.shape)
    options = dict(residual=inputs.arrays.get("residual"))
    with precision(dtype):

        def run(arrays, state):
            (y, new), pull = jax.vjp(lambda arrays: train(case)(arrays, state), arrays)
            return y, new, pull((jnp.asarray(dy, y.dtype), jax.tree.map(jnp.zeros_like, new)))[0]

        lowered = jax.jit(run).lower(inputs.arrays, inputs.state)
        assert two_sums(lowered) == 2, "forward and backward"
        y, state, grads = lowered.compile()(inputs.arrays, inputs.state)
    want = oracle.bn_train(*positional(inputs), **options, **case.options)
    wanted = oracle.bn_train_grads(dy.astype(dtype), *positional(inputs), **options, **case.normalize_options)
    assert_close(y, want.y, n=case.rows, factor=5)
    assert_state(state, want, n=case.rows)
    assert_grads(grads, wanted, n=case.rows, factor=10, axis=case.axis)


@partial(jax.jit, static_argnames="axis")
def moments(x, axis=-1):
    found = jbn.moments(x, axis=axis)
    return found.mean, found.m2


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4])
@pytest.mark.parametrize("rows", [8 * 8 * 8 * 8, 16 * 15 * 14])
@pytest.mark.parametrize("first", [False, True])
def test_nothing_cancels(rows, ratio, first, small):
    rng = np.random.default_rng(0)
    x = ((rng.normal(size=(rows, 6)) + ratio) * 10.0 ** np.arange(-3, 3)).astype(np.float32)
    n, mean, m2 = oracle.moments(x)
    got_mean, got_m2 = moments(x.reshape(16, -1, 6).swapaxes(1, 2), 1) if first else moments(x)
    assert np.max(np.abs(got_m2 / m2 - 1)) < 1e-5
    assert np.max(np.abs(got_mean - mean) / (np.sqrt(m2 / n) + np.abs(mean))) < 1e-6


@pytest.mark.parametrize("outliers", [[0], [511], [1024, 4095], [0, 512, 1024, 1536, 2048, 2560, 3072, 3584]], ids=str)
def test_outliers_cost_no_accuracy(outliers, small):
    x = (1e4 + np.random.default_rng(1).normal(size=(4096, 4))).astype(np.float32)
    x[outliers, :2] = 1e6
    n, mean, m2 = oracle.moments(x)
    got_mean, got_m2 = moments(x)
    assert np.max(np.abs(got_m2 / m2 - 1)) < 1e-5
    assert np.max(np.abs(got_mean - mean) / (np.sqrt(m2 / n) + np.abs(mean))) < 1e-6


def test_constants_are_exact(small):
    constants = np.array([0.1, 1e10, 3e38, -7, 0, -3e38, 1e-30], np.float32)
    mean, m2 = moments(np.tile(constants, (8 * 9 * 10, 1)))
    np.testing.assert_array_equal(mean, constants)
    np.testing.assert_array_equal(m2, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_channel_touches_no_other(bad, small):
    x, dy = np.random.default_rng(0).normal(size=(2, 8 * 8 * 8, 3)).astype(np.float32)
    _, state = jbn.bn_init(3)

    @jax.jit
    def run(x):
        y, pull = jax.vjp(lambda x: jbn.bn_train(jbn.BNParams(None, None), state, x)[0], x)
        return y, pull(dy)[0]

    good, spoilt = run(x), run(np.where((np.arange(512)[:, None] == 77) & (np.arange(3) == 1), np.float32(bad), x))
    for before, after in zip(good, spoilt, strict=True):
        np.testing.assert_array_equal(before[:, ::2], after[:, ::2])
        assert not np.isfinite(after[:, 1]).any()


FEW = [1, 2, 3, 16, 128, 256]
BEYOND = 260  # by two passes


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4])
@pytest.mark.parametrize("n", [*FEW[1:], BEYOND])
def test_nothing_of_few_rows_cancels(n, ratio):
    x = ((np.random.default_rng(0).normal(size=(n, 6)) + ratio) * 10.0 ** np.arange(-3, 3)).astype(np.float32)
    _, mean, m2 = oracle.moments(x)
    got_mean, got_m2 = moments(x)
    assert np.max(np.abs(got_m2 / m2 - 1)) < 4e-6
    assert np.max(np.abs(got_mean - mean) / (np.sqrt(m2 / n) + np.abs(mean))) < 1e-6


@pytest.mark.parametrize("n", FEW[2:])
@pytest.mark.parametrize("rows", [(0,), (0, -1), (0, "middle")], ids=str)
def test_outliers_among_few_cost_what_is_promised(n, rows):
    """Where two of the three typical rows lie far out, all others lie far from the pivot."""
    x = (1e4 + np.random.default_rng(1).normal(size=(n, 4))).astype(np.float32)
    x[[n // 2 if row == "middle" else row for row in rows], :2] = 1e6
    _, mean, m2 = oracle.moments(x)
    got_mean, got_m2 = moments(x)
    assert np.max(np.abs(got_m2 / m2 - 1)) < (1 + n / 2) * 4 * np.finfo(np.float32).eps
    assert np.max(np.abs(got_mean - mean) / (np.sqrt(m2 / n) + np.abs(mean))) < 1e-6


@pytest.mark.parametrize("n", FEW)
def test_few_constants_are_exact(n):
    constants = np.array([0.1, 1e10, 3e38, -7, 0, -3e38, 1e-30], np.float32)
    mean, m2 = moments(np.tile(constants, (n, 1)))
    np.testing.assert_array_equal(mean, constants)
    np.testing.assert_array_equal(m2, 0)


@pytest.mark.parametrize("size", [1e-14, 9e18], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("n", [2, 16, 256, 8 * 32 * 32])
def test_rows_of_any_size(n, channels, size, request):
    """Far out, squares of distances from the pivot add up to more than float32 has, though the variance does not."""
    if n > xla_cpu.FEW:
        request.getfixturevalue("small")
    x = (np.where(np.arange(n) % 2, -1, 1) * np.linspace(0.9, 1, n) * size)[:, None].astype(np.float32)
    x = np.tile(x, (1, channels))
    _, mean, m2 = oracle.moments(x)
    plan = Plan(1, 0, n, True, None, jnp.dtype("float32"), Sync(), False, None)
    got_mean, got_var = jax.jit(partial(xla_cpu.moments, plan, mask=None))(x)
    np.testing.assert_allclose(got_var, m2 / n, rtol=1e-5)
    np.testing.assert_allclose(got_mean, mean, atol=1e-6 * size)


def test_x_is_read_once():
    """As compiled: one loop over x makes both moments, and one over x and ȳ both sums."""
    _, state = jbn.bn_init(64)

    def step(x, scale, bias, dy):
        def f(x, scale, bias):
            return jbn.bn_train(jbn.BNParams(scale, bias), state, x)

        y, pull, _ = jax.vjp(f, x, scale, bias, has_aux=True)
        return y, pull(dy)

    x, vector = jax.ShapeDtypeStruct((32, 14, 14, 64), jnp.float32), jax.ShapeDtypeStruct((64,), jnp.float32)
    lowered = jax.jit(step).lower(x, vector, vector, x)
    assert two_sums(lowered) == 2 and "stablehlo.case" not in lowered.as_text()
    text = lowered.compile().as_text()
    entry = text[text.index("ENTRY") :]
    readers = re.findall(r"= (\(.*\)|\S+) fusion\(.*%x[.\d]*[,)]", re.sub(r"\{[\d,]*\}", "", entry))
    sums = ["(f32[196,64], f32[196,64])"] * 2  # of 6272 rows in 32 parts
    parts = ["f32[1,64]", "f32[196,64]"]  # the pivot, and a part's own
    assert sorted(readers) == sorted([*parts, *sums, *["f32[32,14,14,64]"] * 2])
