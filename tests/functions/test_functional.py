"""Values of bn_init, bn_train and bn_eval against the float64 oracle."""

import functools
import re

import jax
import meaning
import ml_dtypes
import numpy as np
import oracle
import pytest
from cases import Case, draw, evaluate, jitted, positional, precision, train
from oracle import ACTIVATIONS, assert_close, assert_state

import jbn

pytestmark = pytest.mark.usefixtures("strict", "implementation")

F16, BF16, F32, F64 = np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16), np.dtype("f4"), np.dtype("f8")
DIMENSIONS = (4, 3, 5, 2, 3)

CASES = {
    "plain": Case((4, 5, 3)),
    "no scale": Case(scale=False),
    "no bias": Case(bias=False),
    "no parameters": Case(scale=False, bias=False),
    "mask of rows": Case((6, 5, 3), mask=(0,)),
    "mask of columns": Case((4, 6, 3), mask=(1,)),
    "mask shared by channels": Case((4, 5, 3), mask=(0, 1)),
    "mask of everything": Case((4, 5, 3), mask=(0, 1, 2)),
    "mask of one value": Case(mask=()),
    "a dead channel": Case((5, 4, 3), mask=(0, 2), dead=True),
    "residual": Case((4, 5, 3), residual=True),
    "virtual batches": Case((6, 4, 3), virtual_batch_size=2),
    "virtual batches of one": Case((3, 4, 2), virtual_batch_size=1),
    "one virtual batch": Case((6, 3), virtual_batch_size=6),
    "virtual batches, channels first": Case((3, 6, 4), axis=0, virtual_batch_size=3),
    "virtual batches, masked": Case((6, 3, 4), mask=(0, 2), dead=True, virtual_batch_size=2, unbiased=True),
    "unbiased": Case((4, 5, 3), unbiased=True),
    "unbiased, masked": Case((8, 3), mask=(0, 1), dead=True, unbiased=True),
    "unbiased, one row": Case((1, 3), unbiased=True),
    "momentum 0": Case(momentum=0.0),
    "momentum 1": Case(momentum=1.0),
    "epsilon 0": Case((8, 3), epsilon=0.0),
    "epsilon 10": Case((8, 3), epsilon=10.0),
    "all at once": Case((6, 3, 4), 1, (0, 1, 2), True, True, "silu", 3, True, 0.5, 1e-2),
} | {
    f"{act}{' of a sum' * residual}": Case((5, 4, 3), axis=1, residual=residual, activation=act)
    for act in ACTIVATIONS
    if act
    for residual in (False, True)
}


def check_train(case, inputs, got, y_dtype=None):
    y, state = got
    want = oracle.bn_train(
        *positional(inputs), mask=inputs.mask, residual=inputs.arrays.get("residual"), **case.options
    )
    assert y.dtype == (y_dtype or inputs.arrays["x"].dtype)
    assert type(state) is jbn.BNState
    assert (state.mean.dtype, state.var.dtype) == (inputs.state.mean.dtype, inputs.state.var.dtype)
    arithmetic = F64 if inputs.arrays["x"].dtype == F64 else F32
    # 5: an x̂ of a few standard deviations, through a scale, a sum and an activation
    assert_close(y, want.y, coarser(y.dtype, arithmetic), case.rows, 5, case.axis)
    assert_state(state, want, coarser(state.mean.dtype, arithmetic), case.rows)


def coarser(a, b):
    return max(a, b, key=lambda dtype: ml_dtypes.finfo(dtype).eps)


@pytest.mark.parametrize("name", CASES)
def test_train(name):
    case = CASES[name]
    inputs = draw(case)
    check_train(case, inputs, jitted(train, case)(*inputs))


@pytest.mark.parametrize("rank, axis", [(r, axis) for r in range(1, 6) for axis in range(r)], ids=lambda v: f"{v}")
def test_every_rank_and_axis(rank, axis, implementation):
    """Counted from the end an axis is the same program."""
    case = Case(DIMENSIONS[:rank], axis, tuple(range(rank)), residual=True, activation="leaky_relu")
    inputs = draw(case, seed=rank)
    from_end = case._replace(axis=axis - rank)
    for make, args in ((train, inputs), (evaluate, inputs[:2])):
        here, there = (str(jax.make_jaxpr(make(c))(*args)) for c in (case, from_end))
        assert re.sub("0x[0-9a-f]+", "", there) == re.sub("0x[0-9a-f]+", "", here)
    run = meaning.run if implementation == "xla" else meaning.compiled
    check_train(case, inputs, run(train(case), *inputs))
    got = run(evaluate(case), *inputs[:2])
    residual = inputs.arrays["residual"]
    want = oracle.bn_eval(*positional(inputs), residual=residual, **case.eval_options)
    assert_close(got, want, factor=5, axis=case.axis)


@pytest.mark.parametrize("name", ["plain", "no scale", "no parameters", "residual", "silu", "relu6 of a sum"])
def test_eval(name):
    case = CASES[name]
    inputs = draw(case)
    got = jitted(evaluate, case)(inputs.arrays, inputs.state)
    residual = inputs.arrays.get("residual")
    want = oracle.bn_eval(*positional(inputs), residual=residual, **case.eval_options)
    assert_close(got, want, factor=5, axis=case.axis)


@pytest.mark.parametrize(
    "x_dtype, dtype",
    [
        (F16, None),
        (BF16, None),
        (F64, None),
        (F32, BF16),
        (F32, F16),
        (BF16, F32),
        (F16, BF16),
        (F64, F32),
        (F32, F64),
    ],
    ids=str,
)
def test_dtypes(x_dtype, dtype):
    case = Case((8, 4, 3), mask=(0, 1), residual=True, activation="hard_swish")
    inputs = draw(case, x_dtype)
    with precision(F64 if F64 in (x_dtype, dtype) else F32):
        check_train(case, inputs, jitted(train, case, dtype=dtype)(*inputs), dtype)
        y = jitted(evaluate, case, dtype=dtype)(inputs.arrays, inputs.state)
    want = oracle.bn_eval(*positional(inputs), residual=inputs.arrays["residual"], **case.eval_options)
    assert y.dtype == (dtype or x_dtype)
    assert_close(y, want, coarser(y.dtype, F64 if x_dtype == F64 else F32), factor=5)


@pytest.mark.parametrize("dtype", [F16, BF16, F64], ids=str)
def test_state_keeps_its_dtype(dtype):
    case = Case((8, 3))
    inputs = draw(case)
    inputs = inputs._replace(state=jbn.BNState(*(a.astype(dtype) for a in inputs.state)))
    with precision(dtype):
        check_train(case, inputs, jitted(train, case)(*inputs))


@pytest.mark.parametrize("dtype", [F16, BF16, F64], ids=str)
def test_parameters_of_another_dtype_than_x(dtype):
    case = Case((8, 3))
    inputs = draw(case)
    for name in ("scale", "bias"):
        inputs.arrays[name] = inputs.arrays[name].astype(dtype)
    with precision(dtype):
        check_train(case, inputs, jitted(train, case)(*inputs))


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_init(dtype):
    with precision(dtype):
        params, state = jbn.bn_init(3, dtype=dtype)
    wide = F64 if dtype == F64 else F32
    for array, value, want in [
        (params.scale, 1, dtype),
        (params.bias, 0, dtype),
        (state.mean, 0, wide),
        (state.var, 1, wide),
    ]:
        assert array.dtype == want
        np.testing.assert_array_equal(np.asarray(array, F64), np.full(3, value))
    assert type(params) is jbn.BNParams and type(state) is jbn.BNState


def test_init_without_parameters():
    params, _ = jbn.bn_init(3, use_scale=False)
    assert params.scale is None and params.bias.shape == (3,)
    params, _ = jbn.bn_init(3, use_bias=False)
    assert params.scale.shape == (3,) and params.bias is None


def test_defaults():
    """momentum 0.99, epsilon 1e-5, channels last, nothing else."""
    x = draw(Case((8, 3))).arrays["x"]
    params, state = jbn.bn_init(3)
    y, new = jbn.bn_train(params, state, x)
    want = oracle.bn_train(x, *params, *state, momentum=0.99, epsilon=1e-5)
    assert_close(y, want.y, n=8, factor=5)
    assert_state(new, want, n=8, factor=5)
    assert_close(jbn.bn_eval(params, new, x), oracle.bn_eval(x, *params, *new, epsilon=1e-5), factor=5)


def test_running_state_after_many_steps():
    """m·old + (1 − m)·new, in closed form: an average of the batches with weights (1 − m)·mᵏ."""
    momentum, steps = 0.8, 12
    x = np.random.default_rng(0).normal(3, 2, (steps, 16, 2)).astype(F32)
    params, state = jbn.bn_init(2)
    step = jax.jit(functools.partial(jbn.bn_train, momentum=momentum))
    for batch in x:
        _, state = step(params, state, batch)
    weights = (1 - momentum) * momentum ** np.arange(steps)[::-1, None]
    x = x.astype(F64)
    want = jbn.BNState((weights * x.mean(1)).sum(0), momentum**steps + (weights * x.var(1)).sum(0))
    assert_state(state, want, n=steps * 16)


def test_traced_momentum_and_epsilon():
    case = Case((8, 3), momentum=0.3, epsilon=0.1)
    inputs = draw(case)
    params = jbn.BNParams(inputs.arrays["scale"], inputs.arrays["bias"])
    traced = jax.jit(lambda m, e: jbn.bn_train(params, inputs.state, inputs.arrays["x"], momentum=m, epsilon=e))
    check_train(case, inputs, traced(0.3, 0.1))


def test_without_jit():
    case = CASES["all at once"]
    inputs = draw(case)
    check_train(case, inputs, train(case)(*inputs))
