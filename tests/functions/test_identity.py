"""The transform undone: identity parameters, and the way back."""

import jax
import ml_dtypes
import numpy as np
import pytest
from oracle import assert_close

import jbn
from jbn._functions.inverse import denormalize, identity_params

pytestmark = pytest.mark.usefixtures("strict")

C = 3


def vectors(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    params = jbn.BNParams(rng.uniform(0.5, 2, C).astype(dtype), rng.normal(size=C).astype(dtype))
    return params, jbn.BNState(rng.normal(size=C).astype(dtype), rng.uniform(0.1, 4, C).astype(dtype))


def data(shape, dtype=np.float32):
    return np.random.default_rng(1).normal(2, 3, shape).astype(dtype)


@pytest.mark.parametrize("shape, axis", [((6, C), -1), ((2, C, 4), 1), ((C, 5), 0), ((C,), 0)])
@pytest.mark.parametrize("epsilon", [0.0, 1e-5, 0.1])
def test_identity(shape, axis, epsilon):
    _, state = vectors()
    x = data(shape)
    params = identity_params(state, epsilon=epsilon)
    assert_close(params.scale, np.sqrt(state.var.astype(float) + epsilon))
    np.testing.assert_array_equal(params.bias, state.mean)
    assert_close(jbn.bn_eval(params, state, x, axis=axis, epsilon=epsilon), x, n=9)


def test_identity_of_a_batch():
    """With the batch's own statistics, training leaves x as it is."""
    x = data((32, C))
    state = jbn.BNState(*(np.float32(v) for v in (x.mean(0, dtype=float), x.var(0, dtype=float))))
    params = identity_params(state, epsilon=1e-3)
    y, _ = jbn.bn_train(params, state, x, epsilon=1e-3)
    assert_close(y, x, n=32)


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_round_trip(scale, bias):
    params, state = vectors()
    params = jbn.BNParams(params.scale if scale else None, params.bias if bias else None)
    x = data((2, 4, C))
    for axis in (-1, 0, 1):
        xt = np.moveaxis(x, -1, axis)
        y = jbn.bn_eval(params, state, xt, axis=axis, epsilon=1e-2)
        back = jax.jit(lambda y, a=axis: denormalize(params, state, y, axis=a, epsilon=1e-2))(y)
        assert_close(back, xt, n=16)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dtypes(dtype):
    wide = np.float64 if dtype == np.float64 else np.float32
    with jax.enable_x64(dtype == np.float64):
        params, state = vectors(wide)
        y = data((6, C), dtype)
        x = denormalize(params, state, y, epsilon=1e-2)
        assert x.dtype == dtype
        std = np.sqrt(state.var.astype(float) + 1e-2)
        assert_close(x, (y.astype(float) - params.bias) / params.scale * std + state.mean, dtype)
        assert identity_params(state).scale.dtype == wide


def test_gradients_pass():
    """∂x/∂y = std / scale; every argument has one."""
    params, state = vectors()
    y = data((C,))
    jac = jax.jacrev(lambda y: denormalize(params, state, y, epsilon=0.5))(y)
    assert_close(jac, np.diag(np.sqrt(state.var.astype(float) + 0.5) / params.scale))
    grads = jax.grad(lambda *args: denormalize(*args).sum(), argnums=(0, 1))(params, state, y)
    assert all(np.all(np.isfinite(g)) and np.any(g != 0) for g in jax.tree.leaves(grads))


def test_no_way_back_from_scale_zero():
    _, state = vectors()
    params = jbn.BNParams(np.zeros(C, np.float32), np.zeros(C, np.float32))
    assert not np.any(np.isfinite(denormalize(params, state, np.zeros((2, C), np.float32))))


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda p, s: identity_params(s, epsilon=-1.0), ValueError, "epsilon is -1.0, expected a number >= 0"),
        (lambda p, s: identity_params(p, epsilon=0.1), TypeError, r"state is a BNParams, expected jbn\.BNState"),
        (lambda p, s: identity_params(s._replace(var=None)), TypeError, r"state\.var has dtype None"),
        (lambda p, s: identity_params(s._replace(var=s.var[:1])), ValueError, r"state\.var has shape \(1,\)"),
        (lambda p, s: denormalize(s, p, data((2, C))), TypeError, r"params is a BNState, expected jbn\.BNParams"),
        (lambda p, s: denormalize(p, s, data((C, 2))), ValueError, r"params\.scale has shape \(3,\), expected \(2,\)"),
        (lambda p, s: denormalize(p, s, data((2, C)), axis=2), ValueError, "axis is 2, out of range"),
        (lambda p, s: denormalize(p, s, np.zeros((2, C), int)), TypeError, "x has dtype int"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call(*vectors())
