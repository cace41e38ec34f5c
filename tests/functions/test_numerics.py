"""Accuracy where naive formulas cancel, overflow or stagnate, from the first step with a fresh state."""

import functools

import driver
import jax
import ml_dtypes
import numpy as np
import oracle
import pytest

import jbn

pytestmark = pytest.mark.usefixtures("strict", "implementation")

train = jax.jit(
    functools.partial(jbn.bn_train, momentum=0.0),  # the new state is the batch's moments
    static_argnames=("axis", "virtual_batch_size"),
)


# relative error of a variance in float32, at |mean| / std up to 1e4; in kernels a mean of two may always be rounded the
# same way, where a GPU's 1 / 2 is off by a bit
SURE = {"xla": 1e-5, "kernels": 3e-4}
# error of x̂ at a large mean, in roundings of the mean, each half its last place; kernels round it more than once
ROUNDINGS = {"xla": 1, "kernels": 4}


def fresh(x, axis=-1):
    return jbn.bn_init(x.shape[axis])


def shifted(shape, ratio, axis=-1, seed=0):
    """float32 data whose channels have |mean|/std = ratio, of both signs and several magnitudes."""
    rng = np.random.default_rng(seed)
    x = np.moveaxis(rng.normal(size=shape), axis, -1)
    std = 10.0 ** rng.integers(-3, 4, x.shape[-1])
    x = (x + ratio * rng.choice([-1, 1], x.shape[-1])) * std
    return np.moveaxis(x, -1, axis).astype(np.float32)


def relative_error(got, want):
    return np.max(np.abs(np.asarray(got, np.float64) - want) / np.abs(want))


@pytest.mark.parametrize("ratio", [0, 1e2, 1e4])
@pytest.mark.parametrize(
    "shape, axis", [((4096, 8), -1), ((7, 31, 29, 5), -1), ((8, 6, 37, 11), 1), ((3, 5000), 0)], ids=str
)
def test_variance_does_not_cancel(shape, axis, ratio, implementation):
    x = shifted(shape, ratio, axis)
    y, state = train(*fresh(x, axis), x, axis=axis)
    n, mean, m2 = oracle.moments(x, axis)
    assert relative_error(state.var, m2 / n) < SURE[implementation]
    std = np.sqrt(m2 / n)
    assert np.max(np.abs(state.mean - mean) / (std + np.abs(mean))) < 1e-6
    params, before = fresh(x, axis)
    want = oracle.bn_train(x, *params, *before, axis=axis).y
    rounding = ROUNDINGS[implementation] * 2.0**-24 * np.max(np.abs(mean) / std)
    assert np.max(np.abs(y - want)) < 1e-5 * (1 + np.abs(want).max()) + rounding


@pytest.mark.parametrize("outlier", [1e6, -1e6, np.nan, np.inf])
def test_a_masked_first_row_changes_nothing(outlier, implementation):
    x = shifted((4096, 4), 1e4)
    mask = np.ones((4096, 1), bool)
    mask[0] = False
    x[0] = outlier
    _, state = train(*fresh(x), x, mask=mask)
    n, _, m2 = oracle.moments(x[1:])
    assert relative_error(state.var, m2 / n) < SURE[implementation]


@pytest.mark.parametrize("ratio", [0, 1e4])
@pytest.mark.parametrize("outliers", [[0], [1], [2048], [4095], [0, 4095], [0, 2048, 4095]], ids=str)
def test_outliers_cost_no_accuracy(outliers, ratio, implementation):
    rng = np.random.default_rng(1)
    x = (ratio + rng.normal(size=(4096, 4))).astype(np.float32)
    x[outliers] = 1e6
    _, state = train(*fresh(x), x)
    n, mean, m2 = oracle.moments(x)
    std = np.sqrt(m2 / n)
    assert relative_error(state.var, m2 / n) < SURE[implementation]
    assert np.max(np.abs(state.mean - mean) / (std + np.abs(mean))) < 1e-5


@pytest.mark.parametrize("rows", [1, 7, 1000, 4097])
def test_a_constant_channel_has_no_variance(rows):
    constants = np.array([0.1, 1e10, 3e38, -7, 0, -3e38, 1e-30], np.float32)
    x = np.tile(constants, (rows, 1))
    params = jbn.BNParams(*np.random.default_rng(0).normal(1, 1, (2, len(constants))).astype(np.float32))
    masks = [None, np.arange(rows)[:, None] % 3 > 0] if rows > 1 else [None]
    for mask in masks:
        y, state = train(params, fresh(x)[1], x, mask=mask)
        np.testing.assert_array_equal(state.var, 0)
        np.testing.assert_array_equal(state.mean, constants)
        np.testing.assert_array_equal(y, np.broadcast_to(params.bias, x.shape))


@pytest.mark.parametrize("constant", [0.1, 1e10, 3e38, -7])
def test_a_constant_channel_first_and_in_virtual_batches(constant):
    x = np.full((6, 2, 35), constant, np.float32)
    params, before = fresh(x, 1)
    y, state = train(params, before, x, axis=1, virtual_batch_size=2)
    np.testing.assert_array_equal(state.var, 0)
    np.testing.assert_array_equal(y, 0)


def test_gradients_at_a_large_mean():
    x = (1e4 + np.random.default_rng(0).normal(size=(2048, 4))).astype(np.float32)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    params, state = fresh(x)
    pull = jax.jit(lambda x, p: jax.vjp(lambda x, p: train(p, state, x)[0], x, p)[1](dy))
    dx, (dscale, dbias) = pull(x, params)
    want = oracle.bn_train_grads(dy, x, *params, *state)
    tolerance = 4 * 2**-24 * 1e4  # x̂ is that sure, as above
    for got, key in ((dx, "x"), (dscale, "scale"), (dbias, "bias")):
        assert np.max(np.abs(got - want[key])) < tolerance * (1 + np.abs(want[key]).max()), key


@pytest.mark.parametrize("axis", [-1, 0])
def test_many_rows_do_not_stagnate(axis, implementation):
    """A count in float32 ends at 2²⁴, and a plain running sum has taken 3.5 for 4 by then: either is off by 6 %."""
    if implementation == "kernels" and axis == -1 and not driver.ON_GPU:
        pytest.skip("emulated it takes 10 s, and what merges counts is the same in both layouts")
    n = 2**24 + 2**20
    x = np.random.default_rng(0).random(n, np.float32) + 3
    shape = (n, 1) if axis == -1 else (1, n)
    x = x.reshape(shape)
    moments = jax.jit(lambda *args: jbn.bn_train(*args, axis=axis, momentum=0.0)[1])  # nothing computes y
    state = moments(*fresh(x, axis), x)
    assert relative_error(state.mean, x.mean(dtype=np.float64)) < 1e-6
    assert relative_error(state.var, x.var(dtype=np.float64)) < 1e-4


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [1000, 60000])
def test_half_precision_sums_past_65504(dtype, value):
    rng = np.random.default_rng(0)
    x = (value * (1 + 0.02 * rng.normal(size=(3000, 3)))).astype(dtype)
    y, state = train(*fresh(x), x)
    n, mean, m2 = oracle.moments(x)
    assert relative_error(state.mean, mean) < 1e-6
    assert relative_error(state.var, m2 / n) < 1e-5
    params, before = fresh(x)
    oracle.assert_close(y, oracle.bn_train(x, *params, *before).y, dtype, n=3000)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_counts_past_their_integers(dtype):
    """4099 rows, most of them valid: neither half type can count that far."""
    x = np.random.default_rng(0).normal(3, 1, (4099, 2)).astype(dtype)
    mask = np.random.default_rng(1).random((4099, 2)) < 0.9
    _, state = train(*fresh(x), x, mask=mask)
    n, mean, m2 = oracle.moments(x, -1, mask)
    assert relative_error(state.mean, mean) < 1e-5
    assert relative_error(state.var, m2 / n) < 1e-5


def test_float64_is_float64():
    with jax.enable_x64(True):
        x = 1e6 + np.random.default_rng(0).normal(size=(1000, 3))
        params, state = jbn.bn_init(3, dtype=np.float64)
        _, state = train(params, state, x)
        n, mean, m2 = oracle.moments(x)
        assert relative_error(state.mean, mean) < 1e-14
        assert relative_error(state.var, m2 / n) < 1e-12


@pytest.mark.parametrize("tiny", [1e-15, 1e-8])
def test_small_values_keep_their_mean(tiny):
    x = np.random.default_rng(0).normal(3, 1, (512, 2)).astype(np.float32) * np.float32(tiny)
    _, state = train(*fresh(x), x)
    n, mean, m2 = oracle.moments(x)
    assert relative_error(state.mean, mean) < 1e-6
    assert relative_error(state.var, m2 / n) < 1e-5
