"""vmap over any of the arguments, of values and of derivatives, is a loop over them."""

import jax
import jax.numpy as jnp
import meaning
import numpy as np
import pytest
from beside import both
from cases import PROBLEMS, draw_mask, loss, problem
from test_transforms import check

import jbn

pytestmark = pytest.mark.usefixtures("strict")

DEAD = "mask, dead channel, residual, silu"
BATCHED = {
    "x": ("x",),
    "parameters": ("scale", "bias"),
    "both": ("x", "scale", "bias"),
    "residual": ("residual",),
    "state": ("mean", "var"),
    "everything": ("x", "scale", "bias", "residual", "mean", "var"),
}


def several(f):
    """Value, gradient, and gradient along the gradient."""

    def all_of(*args):
        gradient = lambda a: jax.grad(loss(f))(a, *args[1:])  # noqa: E731
        g = gradient(args[0])
        return f(*args), g, jax.jvp(gradient, args[:1], (g,))[1]

    return all_of


def stacked(arrays, keys, n=3, axis=0):
    """n different copies of the arrays named, and in_axes."""
    keys = [k for k in keys if k in arrays]
    batched = {k: np.stack([arrays[k] * (1 + 0.2 * i) for i in range(n)], axis) for k in keys}
    return arrays | batched, {k: axis if k in keys else None for k in arrays}


@pytest.mark.parametrize(
    "name, which",
    [(name, which) for name in PROBLEMS for which in ("x", "everything")]
    + [(name, which) for name in ("plain", DEAD) for which in ("parameters", "both", "state")]
    + [(DEAD, "residual"), ("eval", "parameters"), ("eval", "state")],
)
def test_over(name, which):
    with jax.enable_x64(True):

        def compute(bn):
            f, a, _ = problem(name, bn)
            a, in_axes = stacked(a, BATCHED[which])
            return meaning.run(jax.vmap(several(f), in_axes=(in_axes,)), a)

        check(*both(compute))


@pytest.mark.parametrize("name", [DEAD, "mask, virtual batches, hard_swish"])
@pytest.mark.parametrize("also_x", [False, True])
def test_over_the_mask(name, also_x):
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        masks = np.stack([draw_mask(PROBLEMS[name], rng) for _ in range(3)])

        def compute(bn):
            f, a, _ = problem(name, bn)
            a, in_axes = stacked(a, ("x",) if also_x else ())
            return meaning.run(jax.vmap(several(f), in_axes=(in_axes, 0)), a, masks)

        check(*both(compute))


@pytest.mark.parametrize("name", ["plain", DEAD])
def test_other_axes(name):
    """Batched along the last axis, out along the second."""
    with jax.enable_x64(True):

        def compute(bn):
            f, a, _ = problem(name, bn)
            a, in_axes = stacked(a, ("x", "scale"), axis=-1)
            return jax.jit(jax.vmap(lambda a: f(a)[0], in_axes=(in_axes,), out_axes=1))(a)

        check(*both(compute))


@pytest.mark.parametrize("name", ["plain", DEAD, "mask, virtual batches, hard_swish"])
@pytest.mark.parametrize("inner, outer", [("x", "parameters"), ("everything", "x"), ("parameters", "everything")])
def test_nested(name, inner, outer):
    with jax.enable_x64(True):

        def compute(bn):
            f, a, _ = problem(name, bn)
            a, inner_axes = stacked(a, BATCHED[inner], 2)
            a, outer_axes = stacked(a, BATCHED[outer], 3)
            return meaning.run(jax.vmap(jax.vmap(several(f), (inner_axes,)), (outer_axes,)), a)

        check(*both(compute))


@pytest.mark.parametrize("name", ["plain", DEAD])
def test_derivatives_of_a_vmapped_function(name):
    """The other order: grad, and reverse over reverse, outside."""
    with jax.enable_x64(True):

        def compute(bn):
            f, a, _ = problem(name, bn)
            a, in_axes = stacked(a, BATCHED["everything"])
            gradient = jax.grad(lambda a: jax.vmap(loss(f), (in_axes,))(a).sum())
            squares = lambda a: sum((v**2).sum() for v in gradient(a).values())  # noqa: E731
            return jax.jit(jax.value_and_grad(squares))(a)

        check(*both(compute))


def test_one_state_for_many_batches():
    """Where only x is batched, each batch has its own statistics, and so its own new state."""
    x = np.random.default_rng(0).normal(size=(4, 16, 3)).astype(np.float32)
    params, state = jbn.bn_init(3)
    y, new = jax.jit(jax.vmap(lambda x: jbn.bn_train(params, state, x)))(x)
    for i in range(4):
        one_y, one = jbn.bn_train(params, state, x[i])
        for got, want in ((y[i], one_y), (new.mean[i], one.mean), (new.var[i], one.var)):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert jnp.shape(new.mean) == (4, 3)
