"""Statistics shared over a named axis are those of the whole batch: values, gradients, new state, derivatives."""

import functools

import jax
import meaning
import numpy as np
import oracle
import pytest
from cases import Case, draw, positional, train
from mapping import KINDS, spread
from oracle import assert_close, assert_grads, assert_state

import jbn

pytestmark = pytest.mark.usefixtures("strict")

CASE = Case((16, 3, 4), mask=(0, 2), residual=True, activation="silu", unbiased=True)
GROUPS = [[0, 2, 4, 6], [1, 3, 5, 7]]


@functools.cache
def inputs():
    """Device 3 has nothing valid, device 5 little, and all of channel 3 is hidden."""
    drawn = draw(CASE)
    drawn.mask[6:8] = drawn.mask[10:12, :, 1:] = drawn.mask[..., 3] = False
    return drawn


def synchronised(**more):
    f = train(CASE, axis_name="d", **more)
    return lambda arrays, state, mask, dy: f(arrays, state, mask)


def whole(rows=slice(None)):
    """The oracle's values and gradients of some of the rows as one batch."""
    arrays, _, mask = inputs()
    part = arrays | {k: arrays[k][rows] for k in ("x", "residual")}
    drawn = inputs()._replace(arrays=part, mask=mask[rows])
    args, options = positional(drawn), dict(mask=mask[rows], residual=part["residual"])
    values = oracle.bn_train(*args, **options, **CASE.options)
    return values, oracle.bn_train_grads(cotangent()[rows], *args, **options, **CASE.normalize_options)


def cotangent():
    return np.random.default_rng(7).normal(size=CASE.shape).astype(np.float32)


def check_state(got, want):
    """Of every device."""
    assert_state(got, jax.tree.map(lambda g, w: np.broadcast_to(w, g.shape), got, jbn.BNState(want.mean, want.var)),
                 n=CASE.rows)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_state(kind, devices):
    y, state = jax.jit(spread(kind, synchronised(), devices))(*inputs(), cotangent())
    want, _ = whole()
    assert_close(y, want.y, n=CASE.rows, factor=5)
    check_state(state, want)


def test_a_vmap_that_names_the_axis_need_not_map_the_state():
    """As with Flax: the statistics are the same for all, so `out_axes=None` takes them, and gradients pass."""
    x = np.random.default_rng(1).normal(size=(2, 8, 3)).astype(np.float32)
    params, state = jbn.bn_init(3)

    def shared(x, mask):
        f = functools.partial(jbn.bn_train, params, state, axis_name="d")
        return jax.vmap(lambda x, mask: f(x, mask=mask), axis_name="d", out_axes=(0, None))(x, mask)

    for mask in (np.ones((2, 8, 1), bool), np.arange(16).reshape(2, 8, 1) < 11):
        y, new = shared(x, mask)
        wanted, want = jbn.bn_train(params, state, x.reshape(16, 3), mask=mask.reshape(16, 1))
        assert_close(y.reshape(16, 3), wanted, n=16)
        assert_state(new, want, n=16)
        g = jax.grad(lambda x, mask=mask: (shared(x, mask)[0] ** 3).sum())(x)
        rows = functools.partial(jbn.bn_train, params, state, mask=mask.reshape(16, 1))
        want = jax.grad(lambda x, rows=rows: (rows(x)[0] ** 3).sum())(x.reshape(16, 3))
        assert_close(g.reshape(16, 3), want, n=16, factor=20)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, devices):
    """From outside, with respect to everything."""
    g, dy = spread(kind, synchronised(), devices), cotangent()

    def total(arrays):
        return (g(arrays, *inputs()[1:], dy)[0] * dy).sum()

    got = jax.jit(jax.grad(total))(inputs().arrays)
    _, want = whole()
    assert_grads(got, want, n=CASE.rows, factor=10)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_from_inside(kind, devices):
    """Each device's own loss: its x moves the statistics of all, so all losses' gradients come back."""
    f = train(CASE, axis_name="d")

    def local(arrays, state, mask, dy):
        own = {k: arrays[k] for k in ("x", "residual")}
        grads = jax.grad(lambda own: (f(arrays | own, state, mask)[0] * dy).sum())(own)
        return grads, f(arrays, state, mask)[1]

    got, _ = jax.jit(spread(kind, local, devices))(*inputs(), cotangent())
    _, want = whole()
    assert_grads(got, want, n=CASE.rows, factor=10)


def directions():
    rng = np.random.default_rng(9)
    return {k: rng.normal(size=a.shape).astype(a.dtype) for k, a in inputs().arrays.items()}


HIGHER = {  # of total(arrays) = Σ y²·dy, along t
    "jvp": lambda total, a, t: jax.jvp(total, (a,), (t,)),
    "forward over reverse": lambda total, a, t: jax.jvp(jax.grad(total), (a,), (t,)),
    "reverse over reverse": lambda total, a, t: jax.grad(
        lambda a: sum((g * t[k]).sum() for k, g in jax.grad(total)(a).items())
    )(a),
    "reverse over forward": lambda total, a, t: jax.grad(lambda a: jax.jvp(total, (a,), (t,))[1])(a),
}


def higher(g):
    """All of them, in one program, in which what several share is compiled once."""

    def derivatives(arrays, state, mask, dy, t):
        total = lambda arrays: (g(arrays, state, mask, dy)[0] ** 2 * dy).sum()  # noqa: E731
        return {mode: of(total, arrays, t) for mode, of in HIGHER.items()}

    return derivatives


@functools.cache
def higher_alone():
    f = train(CASE)
    return meaning.run(higher(lambda *args: f(*args[:3])), *inputs(), cotangent(), directions())


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_and_second_derivatives(kind, devices):
    """Those of the same function on one device."""
    run = meaning.run if kind == "vmap" else meaning.compiled
    found = run(higher(spread(kind, synchronised(), devices)), *inputs(), cotangent(), directions())
    for mode, want in higher_alone().items():
        print(mode)  # which pytest shows of what fails
        for a, b in zip(*map(jax.tree.leaves, (found[mode], want)), strict=True):
            assert_close(a, b, n=CASE.rows, factor=20)


@pytest.mark.parametrize("kind", KINDS)
def test_axis_index_groups(kind, devices):
    """Each group is a batch of its own: values, states, gradients."""
    g = spread(kind, synchronised(axis_index_groups=GROUPS), devices, varying_state=True)
    dy = cotangent()

    def total(arrays):
        y, state = g(arrays, *inputs()[1:], dy)
        return (y * dy).sum(), (y, state)

    got, (y, state) = jax.jit(jax.grad(total, has_aux=True))(inputs().arrays)
    summed = {"scale": 0, "bias": 0}
    for group in GROUPS:
        rows = np.concatenate([[2 * i, 2 * i + 1] for i in group])
        want, grads = whole(rows)
        assert_close(y[rows], want.y, n=CASE.rows, factor=5)
        check_state(jax.tree.map(lambda s, group=group: s[np.array(group)], state), want)
        for key in ("x", "residual"):
            assert_close(got[key][rows], grads[key], n=CASE.rows, factor=10)
        summed = {k: v + grads[k] for k, v in summed.items()}
    for key, value in summed.items():
        assert_close(got[key], value, n=CASE.rows, factor=10)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_name_statistics_are_local(kind, devices):
    f = train(CASE)
    g = spread(kind, lambda arrays, state, mask, dy: f(arrays, state, mask), devices, varying_state=True)
    y, state = jax.jit(g)(*inputs(), cotangent())
    for i in range(8):
        want, _ = whole(slice(2 * i, 2 * i + 2))
        assert_close(y[2 * i : 2 * i + 2], want.y, n=CASE.rows, factor=5)
        check_state(jax.tree.map(lambda s, i=i: s[i], state), want)


@pytest.mark.parametrize("kind", KINDS)
def test_virtual_batches_share_the_state(kind, devices):
    """Each run of rows has its own statistics; the state sees those of all devices."""
    case = CASE._replace(virtual_batch_size=1)
    f = train(case, axis_name="d")
    g = spread(kind, lambda arrays, state, mask, dy: f(arrays, state, mask), devices)
    y, state = jax.jit(g)(*inputs(), cotangent())
    args, options = positional(inputs()), dict(mask=inputs().mask, residual=inputs().arrays["residual"])
    want = oracle.bn_train(*args, **options, **case.options)
    assert_close(y, want.y, n=CASE.rows, factor=5)
    check_state(state, want)


@pytest.mark.parametrize("kind", KINDS)
def test_moments(kind, devices):
    def local(arrays, state, mask, dy):
        seen = jbn.moments(arrays["x"], mask=mask, axis_name="d")
        return arrays["x"], jbn.BNState(seen.mean, seen.m2)

    _, got = jax.jit(spread(kind, local, devices))(*inputs(), cotangent())
    _, mean, m2 = oracle.moments(inputs().arrays["x"], -1, inputs().mask)
    check_state(got, oracle.Result(None, mean, m2))


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_channel(kind, devices):
    """No variance but the rounding of its mean, squared; and no NaN next to overflow."""
    constants = np.array([0.1, 1e10, -7, 3e38], np.float32)
    arrays = inputs().arrays | {"x": np.broadcast_to(constants, CASE.shape)}
    f = functools.partial(jbn.bn_train, momentum=0.0, axis_name="d")

    def local(arrays, state, mask, dy):
        return f(jbn.BNParams(arrays["scale"], arrays["bias"]), state, arrays["x"], mask=mask)

    mask = inputs().mask.copy()
    mask[0] = True
    y, state = jax.jit(spread(kind, local, devices))(arrays, inputs().state, mask, cotangent())
    eps = np.finfo(np.float32).eps
    assert np.all(np.asarray(state.var) <= (4 * eps * np.abs(constants.astype(float))) ** 2)
    np.testing.assert_allclose(state.mean, np.broadcast_to(constants, np.shape(state.mean)), rtol=4 * eps)
    assert np.all(np.isfinite(y))


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_mean(kind, devices):
    x = (1e4 + np.random.default_rng(0).normal(size=CASE.shape)).astype(np.float32)
    f = functools.partial(jbn.bn_train, momentum=0.0, axis_name="d")

    def local(arrays, state, mask, dy):
        return f(jbn.BNParams(arrays["scale"], arrays["bias"]), state, arrays["x"], mask=mask)

    mask = np.ones_like(inputs().mask)
    _, state = jax.jit(spread(kind, local, devices))(inputs().arrays | {"x": x}, inputs().state, mask, cotangent())
    n, _, m2 = oracle.moments(x)
    # not 1e-5 as on one device: 24 values a device, whose means float32 holds to 6e-4
    np.testing.assert_allclose(state.var, np.broadcast_to(m2 / n, np.shape(state.var)), rtol=1e-3)
