"""First derivatives of bn_train and bn_eval against the analytic float64 oracle, itself checked by differences."""

import functools

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import Case, draw, evaluate, positional, train
from oracle import ACTIVATIONS, assert_close, assert_grads

import jbn

pytestmark = pytest.mark.usefixtures("strict", "implementation")

CASES = {
    "plain": Case((8, 3)),
    "channels first": Case((3, 4, 5), axis=0),
    "no scale": Case((8, 3), scale=False),
    "no bias": Case((8, 3), bias=False),
    "no parameters": Case((8, 3), scale=False, bias=False),
    "mask of rows": Case((6, 4, 3), mask=(0,)),
    "dead channel": Case((6, 4, 3), mask=(0, 2), dead=True),
    "residual": Case((4, 3, 5), axis=1, residual=True),
    "virtual batches": Case((6, 4, 3), virtual_batch_size=2),
    "virtual batches, dead channel": Case((6, 3, 4), 1, (0, 1), True, True, "silu", virtual_batch_size=3),
    "one row": Case((1, 3)),
    "rank 1": Case((3,)),
} | {
    f"{act}{' of a masked sum' * full}": Case(
        (5, 4, 3), mask=(0, 1, 2) if full else None, residual=full, activation=act
    )
    for act in ACTIVATIONS
    if act
    for full in (False, True)
}


def cotangent(case):
    return np.random.default_rng(7).normal(size=case.shape)


def pull(f):
    """(dy, first, *rest) -> gradients of sum(dy · f(first, *rest)) with respect to `first`, in one executable."""
    return jax.jit(lambda dy, a, *rest: jax.vjp(lambda a: f(a, *rest), a)[1](dy)[0])


@functools.cache
def pulled(make, case, **more):
    """Of y, by `train` or `evaluate`, compiled once for each case."""
    f = make(case, **more)
    return pull((lambda *args: f(*args)[0]) if make is train else f)


def train_grads(case, inputs, dy, **more):
    return pulled(train, case, **more)(dy, *inputs)


def oracle_options(inputs):
    return dict(mask=inputs.mask, residual=inputs.arrays.get("residual"))


def want_train(case, inputs, dy):
    return oracle.bn_train_grads(dy, *positional(inputs), **oracle_options(inputs), **case.normalize_options)


def want_eval(case, inputs, dy):
    residual = inputs.arrays.get("residual")
    return oracle.bn_eval_grads(dy, *positional(inputs), residual=residual, **case.eval_options)


def check(case, arrays, got, want, dtype=None):
    """10: products of a few factors, each of some standard deviations."""
    assert {key: g.dtype for key, g in got.items()} == {key: arrays[key].dtype for key in got}
    assert_grads(got, want, dtype, case.rows, 10, case.axis)


@pytest.mark.parametrize("name", CASES)
def test_oracle_against_differences(name):
    """The judge is judged: its gradients against central differences of its values."""
    case = CASES[name]
    inputs, dy = draw(case, np.float64), cotangent(case)

    def trained(arrays, state):
        moved = inputs._replace(arrays=arrays, state=state)
        return oracle.bn_train(*positional(moved), **oracle_options(moved), **case.options).y

    def evaluated(arrays, state):
        moved = inputs._replace(arrays=arrays, state=state)
        residual = arrays.get("residual")
        return oracle.bn_eval(*positional(moved), residual=residual, **case.eval_options)

    differences(trained, dy, inputs.arrays, inputs.state, want_train(case, inputs, dy), keys=inputs.arrays)
    want = want_eval(case, inputs, dy)
    differences(evaluated, dy, inputs.arrays, inputs.state, want, keys=[*inputs.arrays, "mean", "var"])


def differences(f, dy, arrays, state, want, keys, step=1e-6):
    for key in keys:
        everything = arrays | state._asdict()
        direction = np.random.default_rng(3).normal(size=everything[key].shape)

        def loss(t, key=key, everything=everything, direction=direction):
            moved = everything | {"mean": state.mean, "var": state.var, key: everything[key] + t * direction}
            return np.sum(dy * f(moved, jbn.BNState(moved["mean"], moved["var"])))

        slope = (loss(step) - loss(-step)) / (2 * step)
        np.testing.assert_allclose(np.sum(want[key] * direction), slope, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", CASES)
def test_train(name):
    case = CASES[name]
    inputs, dy = draw(case), cotangent(case)
    check(case, inputs.arrays, train_grads(case, inputs, dy), want_train(case, inputs, dy))


@pytest.mark.parametrize("name", ["plain", "no scale", "channels first", "residual", "relu", "silu of a masked sum"])
def test_eval(name):
    """An ordinary differentiable function, of its state too."""
    case = CASES[name]
    inputs, dy = draw(case), cotangent(case)
    f = evaluate(case)
    got, state = pull(lambda pair: f(*pair))(dy, inputs[:2])
    check(case, inputs.arrays | inputs.state._asdict(), got | state._asdict(), want_eval(case, inputs, dy))


@pytest.mark.parametrize("name", ["plain", "silu of a masked sum", "virtual batches, dead channel"])
def test_float64(name):
    case = CASES[name]
    inputs, dy = draw(case, np.float64), cotangent(case)
    with jax.enable_x64(True):
        check(case, inputs.arrays, train_grads(case, inputs, dy), want_train(case, inputs, dy))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("y_dtype", [None, np.float32])
def test_half_precision(dtype, y_dtype):
    """Gradients have the dtype of what they belong to; only they, and dy, are rounded to it."""
    case = CASES["silu of a masked sum"]
    inputs, dy = draw(case, dtype), cotangent(case).astype(y_dtype or dtype)
    got = train_grads(case, inputs, dy, dtype=y_dtype)
    check(case, inputs.arrays, got, want_train(case, inputs, dy))


def test_low_precision_output_of_float32():
    case = Case((6, 4, 3), residual=True, activation="silu")
    inputs, dy = draw(case), cotangent(case).astype(ml_dtypes.bfloat16)
    got = train_grads(case, inputs, dy, dtype=ml_dtypes.bfloat16)
    check(case, inputs.arrays, got, want_train(case, inputs, dy))


@pytest.mark.parametrize("name", ["plain", "dead channel", "virtual batches, dead channel"])
def test_no_gradient_through_the_state(name):
    """The new state carries none, and y none to the old one, though it normalises dead channels."""
    case = CASES[name]
    inputs = draw(case)
    f = train(case)

    def from_new_state(arrays, state):
        new = f(arrays, state, inputs.mask)[1]
        return new.mean.sum() + new.var.sum()

    grads = jax.jit(jax.grad(from_new_state, argnums=(0, 1)))(*inputs[:2])
    grads = *grads, jax.jit(jax.grad(lambda s: (f(inputs.arrays, s, inputs.mask)[0] ** 2).sum()))(inputs.state)
    for g in jax.tree.leaves(grads):
        np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_what_is_masked_touches_no_other(act, bad):
    """Where x is masked and not finite, x̂ counts as 0 in every derivative; the cotangent there does count."""
    case = Case((8, 3), mask=(0, 1), residual=True, activation=act)
    inputs, dy = draw(case), cotangent(case)
    inputs.mask[0], inputs.mask[3, 1] = False, False
    inputs = inputs._replace(arrays=inputs.arrays | {"x": np.where(inputs.mask, inputs.arrays["x"], bad)})
    got = train_grads(case, inputs, dy)
    check(case, inputs.arrays, got, want_train(case, inputs, dy))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_a_masked_residual_that_no_loss_sees_touches_no_other(act):
    case = Case((8, 3), mask=(0,), residual=True, activation=act)
    inputs, dy = draw(case), cotangent(case)
    inputs.mask[0] = False
    dy[0] = 0
    want = want_train(case, inputs, dy)
    inputs.arrays["residual"][0] = np.nan
    got = train_grads(case, inputs, dy)
    check(case, inputs.arrays, {k: got[k] for k in ("scale", "bias")}, want)
    for key in ("x", "residual"):
        assert_close(got[key][1:], want[key][1:], n=case.rows, factor=10)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("make", [train, evaluate])
def test_a_bad_channel_touches_no_other(make, bad):
    case = Case((8, 3), activation="silu")
    inputs, dy = draw(case), cotangent(case)
    spoiled = inputs.arrays | {"x": inputs.arrays["x"].copy()}
    spoiled["x"][2, 1] = bad
    got, want = (pulled(make, case)(dy, arrays, inputs.state) for arrays in (spoiled, inputs.arrays))
    for key in want:
        np.testing.assert_array_equal(got[key][..., [0, 2]], want[key][..., [0, 2]])


@pytest.mark.parametrize("shape", [(0, 3), (4, 0, 3)])
def test_empty_batch(shape):
    case = Case(shape, residual=True, activation="relu")
    inputs = draw(case)
    got = train_grads(case, inputs, np.zeros(shape))
    assert {k: g.shape for k, g in got.items()} == {k: a.shape for k, a in inputs.arrays.items()}
    np.testing.assert_array_equal(got["scale"], 0)
    np.testing.assert_array_equal(got["bias"], 0)
