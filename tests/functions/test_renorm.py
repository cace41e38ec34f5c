"""Batch renormalization: bn_train where nothing may be corrected, bn_eval where nothing is clipped, paper between."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import Case, draw, positional
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from oracle import assert_close, assert_state

import jbn

pytestmark = pytest.mark.usefixtures("strict")

CASES = {
    "plain": Case((12, 3)),
    "images, residual, relu, no scale": Case((4, 3, 2, 3), residual=True, activation="relu", scale=False),
    "mask, dead channel, no bias": Case((6, 3, 4), 1, (0, 1), True, bias=False, unbiased=True),
    "virtual batches, mask, silu": Case((8, 3), mask=(0,), activation="silu", virtual_batch_size=4),
    "virtual batches, shared mask, no parameters": Case(
        (3, 6, 4), 0, mask=(2,), residual=True, virtual_batch_size=3, scale=False, bias=False
    ),
}


def run(function, case, **more):
    def f(arrays, state, mask):
        params = jbn.BNParams(arrays.get("scale"), arrays.get("bias"))
        residual = arrays.get("residual")
        return function(params, state, arrays["x"], mask=mask, residual=residual, **case.options, **more)

    return f


def both_ways(f, inputs, *bounds):
    """y, new state and the gradients of Σ y·w; the bounds are traced."""

    def loss(arrays, *bounds):
        y, state = f(arrays, inputs.state, inputs.mask, *bounds)
        weights = np.random.default_rng(3).normal(size=y.shape).astype(np.float32)
        return (y * weights).sum(), (y, state)

    grads, (y, state) = jax.jit(jax.grad(loss, has_aux=True))(inputs.arrays, *bounds)
    return y, state, grads


def corrections(case, inputs, r_max, d_max, rows=slice(None)):
    """r and d of one batch, in float64."""
    x, state = np.moveaxis(inputs.arrays["x"], case.axis, -1), inputs.state
    x = np.moveaxis(x[rows], -1, case.axis)
    mask = None if inputs.mask is None else np.broadcast_to(inputs.mask, inputs.arrays["x"].shape)
    mask = None if mask is None else np.moveaxis(np.moveaxis(mask, case.axis, -1)[rows], -1, case.axis)
    n, mean, m2 = oracle.moments(x, case.axis, mask)
    running = np.sqrt(state.var.astype(float) + case.epsilon)
    r = np.clip(np.sqrt(m2 / np.maximum(n, 1) + case.epsilon) / running, 1 / r_max, r_max)
    d = np.clip((mean - state.mean) / running, -d_max, d_max)
    return np.where(n > 0, r, 1), np.where(n > 0, d, 0)


@pytest.mark.parametrize("name", CASES)
def test_without_correction_it_is_bn_train(name):
    """Bit for bit: values, state and gradients; with traced bounds too, but where sums are nested otherwise."""
    case, inputs = CASES[name], draw(CASES[name])
    want = both_ways(run(jbn.bn_train, case), inputs)
    got = both_ways(run(jbn.bn_train, case, renorm=jbn.Renorm(1, 0)), inputs)
    jax.tree.map(np.testing.assert_array_equal, got, want)

    def traced(arrays, state, mask, r_max, d_max):
        return run(jbn.bn_train, case, renorm=jbn.Renorm(r_max, d_max))(arrays, state, mask)

    got = both_ways(traced, inputs, jnp.float32(1), jnp.float32(0))
    equal = assert_close if case.virtual_batch_size else np.testing.assert_array_equal
    jax.tree.map(equal, got, want)


def test_without_correction_the_old_state_may_be_nan():
    case = Case((12, 3), momentum=0.0)
    inputs = draw(case)
    spoilt = inputs._replace(state=jbn.BNState(*(np.full(3, np.nan, np.float32) for _ in range(2))))

    def traced(arrays, state, mask, r_max, d_max):
        return run(jbn.bn_train, case, renorm=jbn.Renorm(r_max, d_max))(arrays, state, mask)

    got = both_ways(traced, spoilt, jnp.float32(1), jnp.float32(0))
    jax.tree.map(np.testing.assert_array_equal, got, both_ways(run(jbn.bn_train, case), inputs))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("r_max, d_max", [(1.5, 0.4), (float("inf"), float("inf"))])
def test_values_and_gradients(name, r_max, d_max):
    """As bn_train's with scale' = scale·r and bias' = bias + scale·d, where r and d are constants."""
    case, inputs = CASES[name], draw(CASES[name])
    y, state, grads = both_ways(run(jbn.bn_train, case, renorm=jbn.Renorm(r_max, d_max)), inputs)
    x, scale, bias, mean, var = positional(inputs)
    want_state = oracle.bn_train(*positional(inputs), mask=inputs.mask, **case.options)
    assert_state(state, want_state, n=case.rows)

    axis = case.axis
    size = case.virtual_batch_size or np.moveaxis(x, axis, -1).shape[0]
    dy = np.random.default_rng(3).normal(size=y.shape)
    last = lambda a: None if a is None else np.moveaxis(np.asarray(a), axis, -1)  # noqa: E731
    mask = last(None if inputs.mask is None else np.broadcast_to(inputs.mask, x.shape))
    total = {"scale": 0, "bias": 0}
    for start in range(0, len(last(x)), size):
        rows = slice(start, start + size)
        r, d = corrections(case, inputs, r_max, d_max, rows)
        part = lambda a: None if a is None else a[rows]  # noqa: B023, E731
        old_scale = np.ones(case.channels) if scale is None else scale
        args = (part(last(x)), old_scale * r, (0 if bias is None else bias) + old_scale * d, mean, var)
        options = dict(epsilon=case.epsilon, mask=part(mask), activation=case.activation)
        options["residual"] = part(last(inputs.arrays.get("residual")))
        assert_close(last(y)[rows], oracle.bn_train(*args, **options).y, np.float32, n=case.rows, factor=4)
        want = oracle.bn_train_grads(part(last(dy)), *args, **options)
        assert_close(last(grads["x"])[rows], want["x"], np.float32, n=case.rows, factor=10)
        if "residual" in grads:
            assert_close(last(grads["residual"])[rows], want["residual"], np.float32, factor=10)
        total["scale"] += r * want["scale"] + d * want["bias"]
        total["bias"] += want["bias"]
    for key in {"scale", "bias"} & grads.keys():
        assert_close(grads[key], total[key], n=case.rows, factor=10)


@pytest.mark.parametrize("name", ["plain", "mask, dead channel, no bias"])
def test_unclipped_it_is_bn_eval(name):
    """What training sees is what inference will see."""
    case, inputs = CASES[name], draw(CASES[name])
    y, _ = run(jbn.bn_train, case, renorm=jbn.Renorm(1e6, 1e6))(inputs.arrays, inputs.state, inputs.mask)
    params = jbn.BNParams(inputs.arrays.get("scale"), inputs.arrays.get("bias"))
    want = jbn.bn_eval(params, inputs.state, inputs.arrays["x"], **case.eval_options)
    assert_close(y, want, n=case.rows, factor=10)


def test_no_gradient_reaches_the_state():
    case, inputs = CASES["plain"], draw(CASES["plain"])
    f = run(jbn.bn_train, case, renorm=jbn.Renorm(2.0, 1.0))

    def loss(state):
        y, new = f(inputs.arrays, state, None)
        return (y**2).sum() + new.var.sum() + new.mean.sum()

    grads = jax.grad(loss)(inputs.state)
    jax.tree.map(lambda g: np.testing.assert_array_equal(g, 0), grads)


def test_traced_bounds_of_a_schedule():
    """One executable for all steps; the bounds are what the schedule says."""
    case, inputs = CASES["plain"], draw(CASES["plain"])
    schedule = optax.schedules.linear_schedule(1.0, 3.0, 4)
    traces = []

    @jax.jit
    def step(number):
        traces.append(number)
        f = run(jbn.bn_train, case, renorm=jbn.Renorm(schedule(number), schedule(number) - 1))
        return f(inputs.arrays, inputs.state, None)[0]

    for number in range(3):
        bound = float(schedule(number))
        want = run(jbn.bn_train, case, renorm=jbn.Renorm(bound, bound - 1))(inputs.arrays, inputs.state, None)[0]
        assert_close(step(jnp.int32(number)), want)
    assert len(traces) == 1


def test_shared_over_devices(devices):
    """With an axis name r and d are those of the whole batch; groups share among themselves."""
    case = Case((16, 3))
    inputs, mesh = draw(case), Mesh(np.array(devices[:4]), ("data",))
    f = run(jbn.bn_train, case, renorm=jbn.Renorm(1.5, 0.5))
    want = f(inputs.arrays, inputs.state, None)

    def mapped(**options):
        g = run(jbn.bn_train, case, renorm=jbn.Renorm(1.5, 0.5), **options)
        specs = ({"x": P("data"), "scale": P(), "bias": P()}, P())
        grouped = "axis_index_groups" in options
        out = P("data"), P("data") if grouped else P()
        f = lambda arrays, state: g(arrays, state, None)  # noqa: E731
        shard = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=out, check_vma=not grouped)
        return jax.jit(shard)(inputs.arrays, inputs.state)

    y, state = mapped(axis_name="data")
    assert_close(y, want[0], n=16)
    assert_close(state.var, want[1].var, n=16)
    y, _ = mapped(axis_name="data", axis_index_groups=[[0, 1], [2, 3]])
    for rows in (slice(0, 8), slice(8, 16)):
        half = inputs.arrays | {"x": inputs.arrays["x"][rows]}
        assert_close(y[rows], f(half, inputs.state, None)[0], n=16)


def test_statistics_are_reduced_once():
    case, inputs = CASES["plain"], draw(CASES["plain"])
    count = lambda f: jax.jit(f).lower(*inputs).compile().as_text().count(" reduce(")  # noqa: E731
    assert count(run(jbn.bn_train, case, renorm=jbn.Renorm(2, 1))) == count(run(jbn.bn_train, case)) > 0


@pytest.mark.parametrize(
    "options, kind, message",
    [
        ({"renorm": jbn.Renorm(0.5, 0)}, ValueError, "r_max is 0.5, expected a number >= 1"),
        ({"renorm": jbn.Renorm(1, -1)}, ValueError, "d_max is -1, expected a number >= 0"),
        ({"renorm": jbn.Renorm(np.ones(3), 0)}, ValueError, r"r_max has shape \(3,\), expected a scalar"),
        ({"renorm": (3, 5)}, TypeError, r"renorm is \(3, 5\), expected None or .*: give e.g. jbn.Renorm\(3.0, 5.0\)"),
        ({"renorm": jbn.Renorm(1, None)}, TypeError, "d_max is None, expected a real number >= 0: give one"),
        ({"renorm": jbn.Renorm(1, 0), "axis": 2}, ValueError, "axis is 2, out of range"),
        ({"renorm": jbn.Renorm(1, 0), "virtual_batch_size": 5}, ValueError, "virtual_batch_size is 5, which does not"),
        ({"renorm": jbn.Renorm(1, 0), "activation": "swish"}, ValueError, "activation is 'swish'"),
        ({"renorm": jbn.Renorm(1, 0), "epsilon": -1.0}, ValueError, "epsilon is -1.0"),
    ],
)
def test_errors(options, kind, message):
    params, state = jbn.bn_init(3)
    with pytest.raises(kind, match=message):
        jbn.bn_train(params, state, np.ones((12, 3), np.float32), **options)
