"""The judge is judged: what it lets pass and what not. Its gradients are in test_gradients.py."""

import ml_dtypes
import numpy as np
import pytest
from oracle import Result, assert_close, assert_grads, assert_state, bn_train_grads

RIGHT = np.random.default_rng(0).normal(size=(6, 4))
SMALL = RIGHT * 10.0 ** -np.arange(4)  # channels of several magnitudes


def refused(check, *args, **options):
    with pytest.raises(AssertionError, match="times what is allowed"):
        check(*args, **options)


@pytest.mark.parametrize("dtype, value", [(np.float16, 1e-3), (ml_dtypes.bfloat16, 0.03), (np.float32, 9e-7)])
def test_zeros_are_not_small_numbers(dtype, value):
    refused(assert_close, np.zeros(3, dtype), np.full(3, value))
    assert_close(np.full(3, value).astype(dtype), np.full(3, value))


def test_each_channel_by_itself():
    for axis in (-1, 0):
        want = np.moveaxis(SMALL, -1, axis)
        assert_close(want.astype(np.float32), want, axis=axis)
        for channel in range(4):
            got = want + 2e-6 * np.max(np.abs(SMALL[:, channel])) * np.moveaxis(
                np.eye(4)[channel] * np.ones((6, 1)), -1, axis
            )
            refused(assert_close, got.astype(np.float32), want, axis=axis)
    assert_close((SMALL + 1e-7).astype(np.float32), SMALL, axis=None)


def test_what_values_were_summed_from_is_forgiven():
    want = np.array([1e-9, 1.0])
    refused(assert_close, np.float32([1e-7, 1]), want, scale=0)
    refused(assert_close, np.float32([1e-7, 1]), want, scale=np.array([1e-3, 1]))
    assert_close(np.float32([1e-7, 1]), want, scale=1)


@pytest.mark.parametrize("got", [np.nan, np.inf, -np.inf, 1.0])
@pytest.mark.parametrize("want", [np.nan, np.inf, -np.inf, 1.0])
def test_what_is_not_finite(got, want):
    arrays = np.array([got, 2.0]), np.array([want, 2.0])
    if got == want or (np.isnan(got) and np.isnan(want)):
        assert_close(*arrays)
    else:
        refused(assert_close, *arrays)


def test_states_and_gradients():
    mean, var = np.array([0.0, 1e-3]), np.array([1.0, 1e-6])
    want = Result(None, mean, var)
    assert_state(Result(None, np.float32(mean + 1e-7 * np.sqrt(var)), np.float32(var)), want)
    refused(assert_state, Result(None, np.float32(mean + 1e-7), np.float32(var)), want)
    refused(assert_state, Result(None, np.float32(mean), np.float32(var + 1e-7)), want)
    dy = np.random.default_rng(1).normal(size=RIGHT.shape)
    want = bn_train_grads(dy, RIGHT, np.ones(4), np.zeros(4), np.zeros(4), np.ones(4))
    for key in ("x", "scale", "bias", "residual"):
        assert_grads({key: want[key].astype(np.float32)}, want)
        refused(assert_grads, {key: np.zeros_like(want[key])}, want)
