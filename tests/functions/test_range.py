"""Units do not matter: x over all magnitudes whose squared distances are float32's, where their sum may be none.

Times a power of two, with an epsilon times its square, x gives the same y; statistics and gradients the oracle says.
"""

import functools

import driver
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, draw, positional, train
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from mapping import spread
from oracle import assert_close, assert_grads, assert_state

import jbn
from jbn._op import merging, xla_cpu

pytestmark = pytest.mark.usefixtures("strict")

UNITS = [2.0**60, 2.0**-51]  # standard deviations 2.3e18 and 8.9e-16

CASES = {
    "cut into parts": Case((1040, 32)),
    "little": Case((160, 3)),
    "channels first": Case((8, 3, 16), 1, residual=True, activation="silu"),
    "mask": Case((160, 3), mask=(0, 1), dead=True, residual=True, activation="relu"),
    "virtual": Case((256, 3), virtual_batch_size=128, unbiased=True),
    "virtual, mask": Case((256, 3), mask=(0,), virtual_batch_size=128, activation="leaky_relu"),
}


def scaled(case, unit, x=None):
    """(case, inputs) in a unit; residual, scale and bias have y's."""
    inputs = draw(case)
    x = inputs.arrays["x"] if x is None else x
    state = jbn.BNState(inputs.state.mean * np.float32(unit), inputs.state.var * np.float32(unit) ** 2)
    arrays = inputs.arrays | {"x": x * np.float32(unit)}
    return case._replace(epsilon=case.epsilon * unit**2), inputs._replace(arrays=arrays, state=state)


def cotangent(case):
    return np.random.default_rng(7).normal(size=case.shape).astype(np.float32)


@functools.cache
def compiled(case):
    @jax.jit
    def run(epsilon, arrays, state, mask, dy):
        f = train(case._replace(epsilon=epsilon))
        y, pull, new = jax.vjp(lambda arrays: f(arrays, state, mask), arrays, has_aux=True)
        return y, new, pull(dy)[0]

    return run


def check(case, inputs, y, state, grads=None):
    options = dict(mask=inputs.mask, residual=inputs.arrays.get("residual"))
    want = oracle.bn_train(*positional(inputs), **options, **case.options)
    assert np.isfinite(want.var.astype(np.float32)).all()
    assert_close(y, want.y, n=case.rows, factor=5, axis=case.axis)
    assert_state(state, want, n=case.rows)
    if grads is not None:
        wanted = oracle.bn_train_grads(cotangent(case), *positional(inputs), **options, **case.normalize_options)
        assert_grads(grads, wanted, n=case.rows, factor=10, axis=case.axis)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("name", CASES)
def test_values_state_and_gradients(name, unit):
    assert (CASES[name].rows * CASES[name].channels > xla_cpu.LITTLE) == (name == "cut into parts")
    case, inputs = scaled(CASES[name], unit)
    y, state, grads = compiled(CASES[name])(np.float32(case.epsilon), *inputs, cotangent(case))
    check(case, inputs, y, state, grads)


@pytest.mark.parametrize("name", ["cut into parts", "little"])
def test_most_values_are_zero(name):
    """So that the rows looked at first tell nothing of the rest."""
    x = draw(CASES[name]).arrays["x"]
    x[::2] = x[-1] = 0
    case, inputs = scaled(CASES[name], UNITS[0], x)
    check(case, inputs, *compiled(CASES[name])(np.float32(case.epsilon), *inputs, cotangent(case)))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", ["shard_map", "sums", "vmap", "jit"])
def test_over_devices(way, masked, devices, monkeypatch):
    if way == "sums":
        monkeypatch.setattr(merging, "GATHER_LIMIT", 0)
    case, inputs = scaled(Case((160, 3), mask=(0, 1) if masked else None), UNITS[0])
    arrays, state, mask = inputs
    if way == "jit":
        rows = NamedSharding(jax.make_mesh((8,), ("d",), (jax.sharding.AxisType.Auto,)), P("d"))
        y, new = jax.jit(train(case))(arrays | {"x": jax.device_put(arrays["x"], rows)}, state, mask)
    else:
        f = train(case, axis_name="d")
        whole = spread(
            "shard_map" if way == "sums" else way, lambda a, s, m, _: f(a, s, m if masked else None), devices
        )
        given = np.ones((160, 1), bool) if mask is None else mask
        y, new = jax.jit(whole)(arrays, state, given, cotangent(case))
    new = jax.tree.map(lambda v: v if v.ndim == 1 else v[0], new)
    check(case, inputs, y, new)


def test_second_derivatives():
    """In a unit u they are 1 / u² of those in 1."""
    case = Case((40, 2))

    @jax.jit
    def run(epsilon, unit, arrays, state, dy):
        def loss(x):
            y, _ = train(case._replace(epsilon=epsilon))(arrays | {"x": x}, state)
            return (y**3 * dy).sum()

        x = arrays["x"]
        along = jnp.flip(x)
        forward = jax.jvp(jax.grad(loss), (x,), (along,))[1]
        return forward * unit, jax.grad(lambda x: (jax.grad(loss)(x) * along).sum())(x) * unit

    found = []
    for unit in (1.0, *UNITS):
        scaled_case, (arrays, state, _) = scaled(case, unit)
        found.append(run(np.float32(scaled_case.epsilon), np.float32(unit), arrays, state, cotangent(case)))
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            assert_close(got, want, n=case.rows, factor=10)


def test_kernels_show_what_they_cannot():
    """They hand on a sum: where it is infinite, so is the variance, of that channel alone."""
    case, inputs = scaled(CASES["little"], 1.0)
    inputs.arrays["x"][:, 1] *= 2.0**60
    with driver.gpu():
        y, state = jax.jit(train(case, implementation="triton"))(inputs.arrays, inputs.state)
    assert np.isinf(state.var).tolist() == [False, True, False]
    want = oracle.bn_train(*positional(inputs), **case.options)
    assert_close(y[:, ::2], want.y[:, ::2], n=case.rows, factor=5)
