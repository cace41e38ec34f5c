"""Folded layers give what layer and batch norm gave one after the other."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import meaning
import ml_dtypes
import numpy as np
import pytest
from oracle import assert_close

import jbn
from jbn._functions.folding import fold_into_next, fold_into_previous

C, EPSILON = 4, 1e-2
conv = functools.partial(nn.Conv, C)

BEFORE = {  # name: (layer, shape of x, axis of the output channels in its kernel)
    "dense": (nn.Dense(C), (3, 5), -1),
    "dense on a sequence": (nn.Dense(C, use_bias=False), (2, 3, 5), -1),
    "1-d": (conv((3,), padding="SAME"), (2, 7, 3), -1),
    "2-d, strided, zeros around": (conv((3, 3), strides=2, padding=1, use_bias=False), (2, 7, 6, 3), -1),
    "3-d, dilated": (conv((2, 2, 2), kernel_dilation=2, padding="VALID"), (1, 4, 4, 4, 2), -1),
    "circular": (conv((3, 3), padding="CIRCULAR"), (2, 5, 5, 3), -1),
    "grouped": (conv((3, 3), feature_group_count=2), (2, 5, 5, 6), -1),
    "depthwise": (conv((3, 3), feature_group_count=2), (2, 5, 5, 2), -1),
    "transposed": (nn.ConvTranspose(C, (3, 3), strides=(2, 2)), (2, 4, 4, 3), -1),
    "transposed kernel": (nn.ConvTranspose(C, (3, 3), strides=(2, 2), transpose_kernel=True), (2, 4, 4, 3), -2),
}
BEHIND = {  # layers whose x has C channels
    "dense": (nn.Dense(5), (3, C)),
    "dense without bias": (nn.Dense(5, use_bias=False), (2, 3, C)),
    "2-d, strided": (nn.Conv(3, (3, 2), strides=2, padding="VALID"), (2, 7, 6, C)),
    "1-d, dilated": (nn.Conv(3, (3,), kernel_dilation=2, padding="VALID"), (2, 9, C)),
    "circular": (nn.Conv(3, (3, 3), padding="CIRCULAR"), (2, 5, 5, C)),
    "reflect": (nn.Conv(3, (3, 3), padding="REFLECT"), (2, 5, 5, C)),
    "grouped": (nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID"), (2, 5, 5, C)),
    "depthwise": (nn.Conv(2 * C, (3, 3), feature_group_count=C, padding="VALID"), (2, 5, 5, C)),
}


def norm(scale=True, bias=True, seed=0):
    rng = np.random.default_rng(seed)
    params = jbn.BNParams(
        rng.uniform(0.5, 2, C).astype(np.float32) if scale else None,
        rng.normal(size=C).astype(np.float32) if bias else None,
    )
    return params, jbn.BNState(rng.normal(size=C).astype(np.float32), rng.uniform(0.2, 3, C).astype(np.float32))


NORMS = norm(), norm(scale=False), norm(bias=False)


def layer_and_input(layer, shape, dtype=np.float32):
    rng = np.random.default_rng(1)
    x = rng.normal(1, 1, shape).astype(dtype)
    params = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), dtype), params), x


def folded(layer, kernel, bias):
    """The layer, which has a bias now, on the folded weights."""
    return functools.partial(layer.clone(use_bias=True).apply, {"params": {"kernel": kernel, "bias": bias}})


@pytest.mark.parametrize("name", BEFORE)
def test_layer_before(name):
    layer, shape, axis = BEFORE[name]
    weights, x = layer_and_input(layer, shape)

    def outputs(norms, weights, x):
        for params, state in norms:
            want = jbn.bn_eval(params, state, layer.apply({"params": weights}, x), epsilon=EPSILON)
            kernel, bias = fold_into_previous(
                params, state, weights["kernel"], weights.get("bias"), axis=axis, epsilon=EPSILON
            )
            assert kernel.shape == weights["kernel"].shape and bias.shape == (C,)
            yield folded(layer, kernel, bias)(x), want

    for got, want in meaning.run(lambda *a: list(outputs(*a)), NORMS, weights, x):
        assert_close(got, want, n=weights["kernel"].size)


@pytest.mark.parametrize("name", BEHIND)
def test_layer_behind(name):
    layer, shape = BEHIND[name]
    weights, x = layer_and_input(layer, shape)

    def outputs(norms, weights, x):
        for params, state in norms:
            want = layer.apply({"params": weights}, jbn.bn_eval(params, state, x, epsilon=EPSILON))
            kernel, bias = fold_into_next(params, state, weights["kernel"], weights.get("bias"), epsilon=EPSILON)
            assert kernel.shape == weights["kernel"].shape
            yield folded(layer, kernel, bias)(x), want

    for got, want in meaning.run(lambda *a: list(outputs(*a)), NORMS, weights, x):
        assert_close(got, want, n=weights["kernel"].size)


def test_layer_behind_with_zeros_around():
    """Not exact, as documented, until x is padded with what the norm maps to 0."""
    layer, (params, state) = nn.Conv(3, (3, 3), padding="SAME"), norm()
    weights, x = layer_and_input(layer, (2, 5, 5, C))
    want = layer.apply({"params": weights}, jbn.bn_eval(params, state, x, epsilon=EPSILON))
    kernel, bias = fold_into_next(params, state, weights["kernel"], weights["bias"], epsilon=EPSILON)
    got = folded(layer, kernel, bias)(x)
    assert_close(got[:, 1:-1, 1:-1], want[:, 1:-1, 1:-1], n=kernel.size)
    assert np.max(np.abs(got - want)) > 0.1
    zero = state.mean - params.bias * np.sqrt(state.var + EPSILON) / params.scale
    padded = np.broadcast_to(zero, (2, 7, 7, C)).copy()
    padded[:, 1:-1, 1:-1] = x
    assert_close(folded(layer.clone(padding="VALID"), kernel, bias)(padded), want, n=kernel.size)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize("function", [fold_into_previous, fold_into_next])
def test_dtypes(function, dtype):
    """Weights keep their dtype and lose no more than its rounding."""
    with jax.enable_x64(dtype == np.float64):
        rng = np.random.default_rng(0)
        kernel, bias = rng.normal(size=(C, C)).astype(dtype), rng.normal(size=C).astype(dtype)
        params, state = norm()
        slope = params.scale / np.sqrt(state.var.astype(float) + EPSILON)
        shift = params.bias - state.mean * slope
        wide = kernel.astype(float)
        if function is fold_into_previous:
            want = wide * slope, bias * slope + shift
        else:
            want = wide * slope[:, None], bias.astype(float) + shift @ wide
        for got, value in zip(function(params, state, kernel, bias, epsilon=EPSILON), want, strict=True):
            assert got.dtype == dtype
            assert_close(got, value, dtype, n=C)


def test_several_feature_axes():
    """A DenseGeneral whose norm runs over its last axis."""
    rng = np.random.default_rng(0)
    kernel, x = rng.normal(size=(5, 3, C)).astype(np.float32), rng.normal(size=(2, 5)).astype(np.float32)
    params, state = norm()
    got, bias = fold_into_previous(params, state, kernel, epsilon=EPSILON)
    dense = functools.partial(jnp.einsum, "ni,ijc->njc", x)
    assert_close(dense(got) + bias, jbn.bn_eval(params, state, dense(kernel), epsilon=EPSILON), n=5)


def test_under_transformations():
    params, state = norm()
    kernel = np.random.default_rng(0).normal(size=(2, 3, C)).astype(np.float32)
    each = jax.jit(jax.vmap(lambda k: fold_into_previous(params, state, k)))(kernel)
    for i in range(2):
        for got, want in zip((each[0][i], each[1][i]), fold_into_previous(params, state, kernel[i]), strict=True):
            assert_close(got, want)
    grads = jax.grad(lambda *a: sum(v.sum() for v in fold_into_previous(*a)), argnums=(0, 1, 2))(
        params, state, kernel[0]
    )
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda p, s: fold_into_previous(p, s, np.ones((3, 5))),
            ValueError,
            r"params\.scale has shape \(4,\), expected \(5,\)",
        ),
        (
            lambda p, s: fold_into_previous(s, p, np.ones((3, C))),
            TypeError,
            r"params is a BNState, expected jbn\.BNParams",
        ),
        (lambda p, s: fold_into_previous(p, s, np.ones((3, C), int)), TypeError, "kernel has dtype int"),
        (lambda p, s: fold_into_previous(p, s, np.ones(C)), ValueError, r"kernel has shape \(4,\), expected rank >= 2"),
        (
            lambda p, s: fold_into_previous(p, s, np.ones((3, C)), np.ones(3)),
            ValueError,
            r"bias has shape \(3,\), expected \(4,\)",
        ),
        (lambda p, s: fold_into_previous(p, s, np.ones((3, C)), axis=2), ValueError, "axis is 2, out of range"),
        (lambda p, s: fold_into_previous(p, s, np.ones((3, C)), epsilon=-1), ValueError, "epsilon is -1"),
        (lambda p, s: fold_into_next(p, s, np.ones((3, 5))), ValueError, r"kernel has shape \(3, 5\).* 4 channels"),
        (lambda p, s: fold_into_next(p, s, np.ones((2, 5))), ValueError, "with outputs a multiple of groups"),
        (lambda p, s: fold_into_next(p, s, np.ones((C, 5)), np.ones(4)), ValueError, r"bias has shape \(4,\)"),
        (
            lambda p, s: fold_into_next(p, (1, 2), np.ones((1, 5))),
            TypeError,
            r"state is a tuple, expected jbn\.BNState",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call(*norm())
