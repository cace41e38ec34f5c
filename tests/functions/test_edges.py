"""What must not touch anything else: empty batches, masked and non-finite values, and repeatability."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import Case, Inputs, draw, evaluate, jitted, positional, train
from oracle import ACTIVATIONS, assert_close, assert_state

import jbn

pytestmark = pytest.mark.usefixtures("strict", "implementation")


@pytest.mark.parametrize("shape, axis", [((0, 3), -1), ((0, 4, 3), -1), ((3, 0, 4), 0), ((0, 3, 4), 1)])
def test_empty_batch_leaves_the_state(shape, axis):
    case = Case(shape, axis)
    inputs = draw(case)
    y, state = jitted(train, case)(*inputs)
    assert y.shape == shape
    assert_same_bits(state, inputs.state)
    assert jitted(evaluate, case)(inputs.arrays, inputs.state).shape == shape


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_nothing_valid_is_inference(momentum):
    case = Case((6, 3), mask=(0,), momentum=momentum)
    inputs = draw(case)._replace(mask=np.zeros((6, 1), bool))
    y, state = jitted(train, case)(*inputs)
    assert_close(y, oracle.bn_eval(*positional(inputs), **case.eval_options), factor=5, axis=case.axis)
    assert_same_bits(state, inputs.state)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_what_has_no_weight_is_left_out(momentum, traced, bad):
    """The old state at momentum 0, the batch's statistics at 1."""
    inputs = draw(Case((6, 3)))
    arrays, (mean, var) = inputs.arrays, inputs.state
    if momentum:
        arrays = arrays | {"x": spoil(arrays["x"], -1, bad)}
    else:
        mean, var = (np.where(np.arange(3) == 1, np.float32(bad), v) for v in (mean, var))

    def step(momentum):
        return jbn.bn_train(jbn.BNParams(arrays["scale"], arrays["bias"]), jbn.BNState(mean, var), arrays["x"],
                            momentum=momentum)  # fmt: skip

    _, state = jax.jit(step)(momentum) if traced else step(momentum)
    want = oracle.bn_train(arrays["x"], arrays["scale"], arrays["bias"], mean, var, momentum=momentum)
    assert np.isfinite(want.mean).all() and np.isfinite(want.var).all()
    assert_state(state, want, n=6)


def test_one_row_is_its_own_mean():
    case = Case((1, 3), momentum=0.0)
    inputs = draw(case)
    y, state = jitted(train, case)(*inputs)
    np.testing.assert_array_equal(y[0], inputs.arrays["bias"])
    np.testing.assert_array_equal(state.mean, inputs.arrays["x"][0])
    np.testing.assert_array_equal(state.var, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("case", [Case((6, 4, 3)), Case((6, 3, 4), 1, virtual_batch_size=2, activation="silu")])
def test_a_bad_channel_touches_no_other(case, bad):
    inputs = draw(case)
    spoiled = inputs.arrays | {"x": spoil(inputs.arrays["x"], case.axis, bad)}
    others = np.array([0, 2])
    f, g = jitted(train, case), jitted(evaluate, case)
    (y, state), (clean_y, clean_state) = f(spoiled, inputs.state), f(inputs.arrays, inputs.state)
    evaluated = g(spoiled, inputs.state), g(inputs.arrays, inputs.state)
    for got, want in ((y, clean_y), evaluated):
        np.testing.assert_array_equal(*(np.take(np.asarray(a), others, case.axis) for a in (got, want)))
    for got, want in zip(state, clean_state, strict=True):
        np.testing.assert_array_equal(got[others], want[others])
        assert not np.isfinite(got[1])


def spoil(x, axis, bad):
    """One element of channel 1."""
    x = np.moveaxis(x.copy(), axis, -1)
    x[(2, *(1,) * (x.ndim - 2), 1)] = bad
    return np.moveaxis(x, -1, axis)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_what_is_masked_touches_no_other(act, bad):
    case = Case((8, 3), mask=(0, 1), residual=True, activation=act, virtual_batch_size=4)
    inputs = draw(case)
    inputs.mask[0], inputs.mask[3, 1] = False, False  # a first row is where a pivot would be taken from
    x, residual = (np.where(inputs.mask, inputs.arrays[k], bad) for k in ("x", "residual"))
    inputs = Inputs(inputs.arrays | {"x": x, "residual": residual}, *inputs[1:])
    y, state = jitted(train, case)(*inputs)
    want = oracle.bn_train(*positional(inputs), mask=inputs.mask, residual=residual, **case.options)
    assert_close(np.where(inputs.mask, y, 0), np.where(inputs.mask, want.y, 0), n=case.rows, factor=5)
    assert_state(state, want, n=case.rows)


def test_same_executable_same_bits():
    case = Case((512, 7), mask=(0,), residual=True, activation="silu")
    inputs = draw(case)
    f = jitted(train, case)
    assert_same_bits(f(*inputs), f(*inputs))


def assert_same_bits(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_no_examples_have_no_virtual_batches():
    params, state = jbn.bn_init(3)
    y, new = jbn.bn_train(params, state, np.zeros((0, 3), np.float32), virtual_batch_size=4)
    assert y.shape == (0, 3)
    np.testing.assert_array_equal(new.mean, state.mean)
    np.testing.assert_array_equal(new.var, state.var)


def test_a_loss_that_squares_before_it_masks():
    """Its cotangent at a masked NaN is 0 · NaN, which must stay there."""
    params, state = jbn.bn_init(3)
    x = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
    mask = np.arange(6)[:, None] != 2
    bad = np.where(mask, x, np.nan).astype(np.float32)

    def loss(params, x):
        y, _ = jbn.bn_train(params, state, x, mask=mask, activation="silu")
        return jnp.where(mask, y**2, 0).sum()

    got, want = (jax.grad(loss, (0, 1))(params, a) for a in (bad, x))
    np.testing.assert_allclose(got[0].scale, want[0].scale, rtol=1e-5)
    np.testing.assert_allclose(got[0].bias, want[0].bias, rtol=1e-5)
    np.testing.assert_allclose(got[1][mask[:, 0]], want[1][mask[:, 0]], atol=1e-6)
