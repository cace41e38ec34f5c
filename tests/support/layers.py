"""What the tests of the two Flax modules share: the options a layer is built and called with, inputs, comparisons."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
from jax.nn import initializers

bf16, f16, f32, f64 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64
normal = initializers.normal(1.0)

SPACE = {  # every value meets a shuffled choice of the others
    "shape_axis": [
        ((8, 5), -1),
        ((6, 4, 3), 1),
        ((3, 9), 0),
        ((2, 3, 4, 5), -1),
        ((4, 3, 2), (-1,)),
        ((2, 3, 2, 2, 3), -4),
    ],
    "x": [f32, f32, f32, bf16, f16, f64],
    "dtype": [None, None, f32, bf16, f16, f64],
    "param_dtype": [f32, f32, f32, bf16, f64],
    "momentum": [0.0, 0.9, 0.99, 1.0],
    "epsilon": [1e-5, 1e-2],
    "use_bias": [True, True, False],
    "use_scale": [True, True, False],
    "bias_init": [initializers.zeros, normal],
    "scale_init": [initializers.ones, normal],
    "use_fast_variance": [True, False],
    "average_in": ["constructor", "call"],
    "average": [False, False, True],
    "mask": [None, None, "full", "rows", "lower rank", "int", "float"],
}
COUNT = 24


def covering(space, count, seed=0):
    rng = np.random.default_rng(seed)
    columns = {name: rng.permutation(np.resize(np.arange(len(values)), count)) for name, values in space.items()}
    return [{name: space[name][column[i]] for name, column in columns.items()} for i in range(count)]


def draw_mask(kind, shape, axis, rng):
    """At least three positions of each channel stay."""
    if kind is None:
        return None
    size = {"rows": shape[:1] + (1,) * (len(shape) - 1), "lower rank": shape[1:]}.get(kind, shape)
    while True:
        mask = rng.random(size) < 0.7
        kept = np.moveaxis(np.broadcast_to(mask, shape), axis, -1).reshape(-1, shape[axis]).sum(0)
        if kept.min() >= 3:
            return mask.astype({"int": np.int32, "float": np.float32}.get(kind, bool))


def assert_same(got, want, dtype=None, n=1, factor=4, scale=None):
    """Equal trees of equal dtypes, to rounding in the coarser of `dtype` and each leaf's; `scale`: as in the oracle."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert g.dtype == w.dtype
        coarser = max(g.dtype, dtype or g.dtype, key=lambda d: float(jnp.finfo(d).eps))
        oracle.assert_close(g, w, coarser, n, factor, axis=None, scale=scale)  # the channels may be anywhere


def assert_equal(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def inputs(shape, dtype=f32, seed=0):
    """x and dy."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(1, 2, shape), dtype), jnp.asarray(rng.normal(0, 1, shape), f32)


def small(function):
    """A linen model from `function(x)`."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return function(x)

    return Model()
