"""Derivatives of every mode and order are those that jax makes of plain jax.numpy batch norm.

In float64, where a wrong rule cannot pass for rounding.
"""

import jax
import meaning
import numpy as np
import oracle
import pytest
import reference
from beside import both
from cases import PROBLEMS, loss, problem

import jbn

pytestmark = pytest.mark.usefixtures("strict")


def second(outer, inner):
    """A second derivative along t, and then along t again or as a gradient."""
    return lambda f, a, t: outer(lambda a: inner(f, a, t), a, t)


def rev(f, a, t):
    return jax.grad(f)(a)


def fwd(f, a, t):
    return jax.jvp(f, (a,), (t,))[1]


def along(f, a, t):
    """∇f · t, by reverse mode."""
    return jax.tree.reduce(lambda s, x: s + x, jax.tree.map(lambda g, t: (g * t).sum(), jax.grad(f)(a), t))


# What is asked together is one program, in which what several share is compiled once.
TRANSFORMS = {
    "values and first derivatives": {
        "value": lambda f, a, t: f(a),
        "grad": lambda f, a, t: rev(loss(f), a, t),
        "jvp": lambda f, a, t: jax.jvp(f, (a,), (t,)),
        "vjp": lambda f, a, t: jax.vjp(f, a)[1](f(a)),
        "linearize": lambda f, a, t: jax.linearize(f, a)[1](t),
        "linearize, transposed": lambda f, a, t: jax.linear_transpose(jax.linearize(f, a)[1], a)(f(a)),
        "checkpoint": lambda f, a, t: rev(loss(jax.checkpoint(f)), a, t),
    },
    "jacobians": {
        "jacfwd": lambda f, a, t: jax.jacfwd(f)(a),
        "jacrev": lambda f, a, t: jax.jacrev(f)(a),
        "hessian": lambda f, a, t: jax.hessian(lambda x: loss(f)(a | {"x": x}))(a["x"]),
    },
    "second derivatives": {
        "forward over forward": lambda f, a, t: second(fwd, fwd)(loss(f), a, t),
        "forward over reverse": lambda f, a, t: second(fwd, rev)(loss(f), a, t),
        "reverse over forward": lambda f, a, t: second(rev, fwd)(loss(f), a, t),
        "reverse over reverse": lambda f, a, t: second(rev, along)(loss(f), a, t),
        "checkpoint": lambda f, a, t: second(fwd, rev)(loss(jax.checkpoint(f)), a, t),
    },
}


def check(got, want):
    got, want = jax.tree.leaves(got), jax.tree.leaves(want)
    for g, w in zip(got, want, strict=True):
        oracle.assert_close(g, w, np.float64, n=100, factor=100)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("group", TRANSFORMS)
def test_like_plain_jnp(group, name):
    with jax.enable_x64(True):

        def compute(bn):
            f, a, t = problem(name, bn)
            return meaning.run(lambda a, t: {key: of(f, a, t) for key, of in TRANSFORMS[group].items()}, a, t)

        got, want = both(compute)
        for transform in TRANSFORMS[group]:
            print(transform)  # which pytest shows of what fails
            check(got[transform], want[transform])


def test_without_jit():
    with jax.enable_x64(True):
        f, a, t = problem("plain")
        g, _, _ = problem("plain", reference)
        check(jax.value_and_grad(loss(f))(a), jax.value_and_grad(loss(g))(a))
        check(jax.jvp(f, (a,), (t,)), jax.jvp(g, (a,), (t,)))


@pytest.mark.parametrize("dtype", [np.float16, "bfloat16"])
def test_half_precision_tangents_keep_their_dtypes(dtype):
    """Forward mode, and forward over reverse, through the casts."""
    x = jax.numpy.asarray(np.random.default_rng(0).normal(size=(8, 3)), dtype)
    params, state = jbn.bn_init(3)

    def f(x, params):
        return jbn.bn_train(params, state, x, activation="silu")[0]

    y, dy = jax.jit(lambda *a: jax.jvp(f, a, a))(x, params)
    assert y.dtype == dy.dtype == x.dtype
    total = lambda *a: f(*a).astype(np.float32).sum()  # noqa: E731
    grads, second = jax.jit(lambda *a: jax.jvp(jax.grad(total, (0, 1)), a, a))(x, params)
    for g, s, a in zip(*map(jax.tree.leaves, (grads, second, (x, params))), strict=True):
        assert g.dtype == s.dtype == a.dtype
        assert np.all(np.isfinite(np.asarray(s, np.float32)))


@pytest.mark.parametrize(
    "order",
    [second(fwd, fwd), second(fwd, rev), second(rev, fwd), second(rev, along)],
    ids=["forward over forward", "forward over reverse", "reverse over forward", "reverse over reverse"],
)
def test_second_derivatives_beside_a_masked_nan(order):
    """A hidden NaN row changes no derivative of what a loss sees."""
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(6, 2))
        mask = np.arange(6)[:, None] > 0
        params, state = jbn.bn_init(2, dtype=np.float64)

        def scalar(x):
            y, _ = jbn.bn_train(params, state, x, mask=mask, activation="silu")
            return (y[1:] ** 3).sum()

        f = jax.jit(lambda x, t: order(scalar, x, t))
        spoiled, tangent = x.copy(), np.random.default_rng(1).normal(size=x.shape)
        spoiled[0] = np.nan
        got, want = (np.atleast_2d(f(x, tangent)) for x in (spoiled, x))
        seen = slice(1, None) if want.shape == x.shape else slice(None)
        np.testing.assert_allclose(got[seen], want[seen], rtol=1e-12, atol=1e-12)
