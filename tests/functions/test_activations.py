"""Activations: those that other files do not cross with every option, slopes, and functions in place of names."""

import functools

import jax
import jax.numpy as jnp
import meaning
import numpy as np
import oracle
import pytest
from beside import both
from cases import Case, draw, positional
from oracle import MORE_ACTIVATIONS, assert_close, assert_grads

import jbn
import jbn.linen
import jbn.nnx
from jbn._functions import autotune_measure
from jbn._functions.explain_traced import pieces
from jbn._op.activations import ACTIVATIONS, activation, decoded, encoded
from jbn._op.tables import Norm

pytestmark = pytest.mark.usefixtures("strict")

OPTIONS = {name: dict(zip(("activation", "negative_slope"), decoded(name), strict=True)) for name in MORE_ACTIVATIONS}
CASE = Case((6, 4, 3), mask=(0, 1), residual=True, virtual_batch_size=3)
INFINITE = np.array([-np.inf, np.inf])
FAR = np.array([-1e30, -1e4, -200, -20, 20, 200, 1e4, 1e30])


def cotangent(case):
    return np.random.default_rng(7).normal(size=case.shape)


def test_every_activation_is_tested():
    assert {None, *ACTIVATIONS, "leaky_relu(0.2)"} == set(oracle.EVERY_ACTIVATION)


def every(run):
    """`run(name)` of each, in one program, which takes arrays; compiling one takes as long as compiling it alone."""
    return jax.jit(lambda *args: {name: run(name)(*args) for name in MORE_ACTIVATIONS})


def trained(name, case=CASE, bn=jbn):
    options = case.options | (OPTIONS[name] if bn is jbn else dict(activation=name))

    def f(arrays, state, mask):
        params = jbn.BNParams(arrays["scale"], arrays["bias"])
        return bn.bn_train(params, state, arrays["x"], mask=mask, residual=arrays["residual"], **options)

    return f


@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_values_and_gradients(dtype):
    inputs, dy = draw(CASE, dtype), cotangent(CASE).astype(dtype)

    def run(name):
        def f(arrays, state, mask, dy):
            y, pull, _ = jax.vjp(lambda a: trained(name)(a, state, mask), arrays, has_aux=True)
            return y, pull(dy)[0]

        return f

    for name, (y, grads) in every(run)(*inputs, dy).items():
        options = CASE.normalize_options | dict(mask=inputs.mask, residual=inputs.arrays["residual"], activation=name)
        assert y.dtype == dtype
        assert_close(y, oracle.bn_train(*positional(inputs), **options).y, n=CASE.rows, factor=5)
        assert_grads(grads, oracle.bn_train_grads(dy, *positional(inputs), **options), n=CASE.rows, factor=10)


def test_second_derivatives():
    """Of the whole layer, against what JAX makes of plain jax.numpy."""
    case = Case((6, 3), residual=True)
    inputs, dy = draw(case, np.float64), cotangent(case)

    def run(bn):
        def of(name):
            def f(arrays, state, mask, dy):
                def loss(arrays):
                    y, _ = trained(name, case, bn)(arrays, state, mask)
                    return (jnp.sin(y) * dy).sum()

                return jax.jvp(jax.grad(loss), (arrays,), (jax.tree.map(jnp.cos, arrays),))[1]

            return f

        return every(of)

    with jax.enable_x64(True):
        got, want = both(lambda bn: meaning.run(run(bn), *inputs, dy))
    for name in MORE_ACTIVATIONS:
        for key, value in got[name].items():
            assert_close(value, want[name][key], n=case.rows, factor=100, axis=None)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_out(dtype):
    """Nothing overflows, in derivatives of any order, and at infinity all have their limits."""
    with jax.enable_x64(dtype == np.float64):
        z = jnp.asarray(np.concatenate([FAR, INFINITE, [np.nan]]), dtype)

        def orders(name):
            def f(z):
                of = activation(name)
                value, slope = jax.vmap(jax.grad(of.value)), jax.vmap(jax.grad(of.slope))
                return of.value(z), of.slope(z), value(z), slope(z), jax.vmap(jax.grad(jax.grad(of.slope)))(z)

            return f

        found = every(orders)(z)
    for name, values in found.items():
        value, slope, *others = (np.asarray(v, np.float64) for v in values)
        assert np.isnan(value[-1]) and (np.isnan(slope[-1]) or name == "leaky_relu(0.2)"), name
        with np.errstate(over="ignore"):
            want, wanted = (f(FAR.astype(dtype).astype(np.float64)) for f in limited(name))
        np.testing.assert_allclose(value[:-3], want, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(slope[:-3], wanted, rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(others[0][:-3], wanted, rtol=1e-5, atol=1e-6, err_msg=name)
        assert all(np.isfinite(v[:-1]).all() for v in (slope, *others)), name
        ends = {"elu": (-1, np.inf), "sigmoid": (0, 1), "tanh": (-1, 1), "leaky_relu(0.2)": INFINITE}
        np.testing.assert_allclose(value[-3:-1], ends.get(name, (0, np.inf)), atol=1e-37, err_msg=name)


def limited(name):
    """Value and derivative, as the oracle has them where it does not multiply 0 and inf itself."""
    value, slope = MORE_ACTIVATIONS[name]
    if name not in ("gelu", "gelu_exact", "mish"):
        return value, slope
    near = lambda z: np.clip(z, -100, 100)  # noqa: E731
    return (lambda z: np.where(np.abs(z) < 100, value(near(z)), np.maximum(z, 0))), (
        lambda z: np.where(np.abs(z) < 100, slope(near(z)), z > 0)
    )


def test_strings():
    """One string for each activation, which keys and files may have; equal where programs are."""
    for name in ACTIVATIONS:
        assert encoded(name, 0.01) == name and decoded(name) == (name, 0.01)
    for slope in (0.2, -1.0, 1e-20, float(np.float32(0.3))):
        assert decoded(encoded("leaky_relu", slope)) == ("leaky_relu", slope)
    assert encoded("leaky_relu", 0.2) == "leaky_relu(0.2)"
    assert encoded("leaky_relu", 0.0) == "relu"  # at -inf too
    assert encoded(None, 0.01) is None and decoded(None) == (None, 0.01)


def plans(**options):
    params, state = jbn.bn_init(3)
    x = np.zeros((4, 3), np.float32)
    jaxpr = jax.make_jaxpr(lambda x: jbn.bn_train(params, state, x, **options)[0])(x)
    return [piece.plan for piece in pieces(jaxpr.jaxpr)]


def test_the_slope_is_part_of_every_key():
    """Of plans, which rules, lowerings and choices go by, and of rows of measurements."""
    for slope, name in ((0.01, "leaky_relu"), (0.2, "leaky_relu(0.2)")):
        found = plans(activation="leaky_relu", negative_slope=slope)
        assert {p.activation for p in found} == {p.options.activation for p in found} == {name}
        norm = Norm.of(found[0], np.zeros((4, 3), np.float32))
        assert norm.activation == name
        measured = jax.make_jaxpr(autotune_measure.layer(norm, "xla"))(autotune_measure.drawn(norm, 0)).jaxpr
        assert {piece.plan.activation for piece in pieces(measured)} == {name}


def test_functions_are_called_outside():
    """As if by the caller, bit for bit; what they close over has gradients; and explain says so."""
    params, state = jbn.bn_init(3)
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    slope = jnp.float32(0.3)

    def loss(slope, x, inside):
        prelu = lambda y: jnp.where(y > 0, y, slope.astype(y.dtype) * y)  # noqa: E731
        options = dict(residual=x, dtype=jnp.bfloat16)
        y, _ = jbn.bn_train(params, state, x, activation=prelu if inside else None, **options)
        z = jbn.bn_eval(params, state, x, activation=prelu if inside else None, **options)
        y, z = (y, z) if inside else (prelu(y).astype(y.dtype), prelu(z).astype(z.dtype))
        return (y * z).astype(jnp.float32).sum()

    got, want = (jax.value_and_grad(loss, (0, 1))(slope, x, inside) for inside in (True, False))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert {p.activation for p in plans(activation=jnp.sin)} == {None}

    told = jbn.explain(x, activation=jax.nn.silu)
    (note,) = told.notes
    assert note == (
        "activation silu is a function: JAX applies it outside, which is not among launches and bytes; "
        "activation='silu' is applied inside"
    )
    assert told.floor == jbn.explain(x).floor
    (note,) = jbn.explain(x, activation=functools.partial(jnp.clip, min=0)).notes
    assert note == "activation partial is a function: JAX applies it outside, which is not among launches and bytes"
    assert not jbn.explain(x, activation="leaky_relu", negative_slope=0.2).notes


ERRORS = [
    (
        dict(activation="swish"),
        ValueError,
        r"activation is 'swish', expected None, a function or one of relu, .*tanh: ",
    ),
    (dict(activation=3), ValueError, r"activation is 3, expected None, a function or one of relu"),
    (dict(activation=["relu"]), ValueError, r"activation is \['relu'\], expected None"),
    (
        dict(activation=lambda y: y[:1]),
        ValueError,
        r"<lambda> returned an array of shape \(1, 3\), expected .*\(8, 3\)",
    ),
    (
        dict(activation=lambda y: (y, y)),
        ValueError,
        r"returned a tuple, expected y's shape \(8, 3\): call what changes",
    ),
    (
        dict(negative_slope=0.2),
        ValueError,
        r"negative_slope is 0\.2 with activation=None, expected that of 'leaky_relu'",
    ),
    (dict(activation="relu", negative_slope=0.2), ValueError, "with activation='relu', .*: leave it out, or give"),
    (dict(activation=jax.nn.relu, negative_slope=0.2), ValueError, "with activation=relu, expected"),
    (dict(activation="leaky_relu", negative_slope=np.nan), ValueError, "negative_slope is nan, expected a number in"),
    (dict(activation="leaky_relu", negative_slope=np.inf), ValueError, "negative_slope is inf, expected a number in"),
    (
        dict(activation="leaky_relu", negative_slope="0.2x"),
        TypeError,
        "negative_slope is '0.2x', expected a real number",
    ),
    (
        dict(activation="leaky_relu", negative_slope=np.ones(3)),
        ValueError,
        r"negative_slope has shape \(3,\), expected",
    ),
]


@pytest.mark.parametrize("options, kind, message", ERRORS)
def test_errors(options, kind, message):
    params, state = jbn.bn_init(3)
    x = np.ones((8, 3), np.float32)
    for call in (jbn.bn_train, jbn.bn_eval, lambda _, __, x, **options: jbn.explain(x, **options)):
        with pytest.raises(kind, match=message) as caught:
            call(params, state, x, **options)
        assert "0x" not in str(caught.value)


def test_a_traced_slope():
    params, state = jbn.bn_init(3)
    x = np.ones((8, 3), np.float32)
    f = jax.jit(lambda slope: jbn.bn_eval(params, state, x, activation="leaky_relu", negative_slope=slope))
    with pytest.raises(
        TypeError, match=r"negative_slope is traced, expected a number .*: give a float, or learn it in a"
    ):
        f(0.2)
