"""Batch normalization in NumPy float64, in two passes: what every other file here is measured against.

It shares nothing with the code under test. `backward` is the analytic gradient; test_gradients.py checks it
against finite differences of `forward`.
"""

import math
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Result(NamedTuple):
    y: np.ndarray
    mean: np.ndarray  # running mean after the step, (C,)
    var: np.ndarray  # running variance after the step, (C,)


def _sigmoid(z):
    return 0.5 * (1 + np.tanh(z / 2))


ACTIVATIONS = {  # name: (value, derivative); those that other files cross with all options
    None: (lambda z: z, lambda z: np.ones_like(z)),
    "relu": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "relu6": (lambda z: np.clip(z, 0, 6), lambda z: ((z > 0) & (z < 6)) * 1.0),
    "leaky_relu": (lambda z: np.where(z > 0, z, 0.01 * z), lambda z: np.where(z > 0, 1.0, 0.01)),
    "silu": (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    "hard_swish": (
        lambda z: z * np.clip(z + 3, 0, 6) / 6,
        lambda z: np.where(z <= -3, 0.0, np.where(z >= 3, 1.0, (2 * z + 3) / 6)),
    ),
}


def _by_tanh(z):
    return 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))


def _by_erf(z):
    return 0.5 * np.vectorize(math.erfc, otypes=[float])(-z / np.sqrt(2))


def _of_softplus(z):
    return np.tanh(np.logaddexp(0, z))


MORE_ACTIVATIONS = {
    "gelu": (
        lambda z: z * _by_tanh(z),
        lambda z: _by_tanh(z) * (1 + 2 * z * (1 - _by_tanh(z)) * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * z**2)),
    ),
    "gelu_exact": (
        lambda z: z * _by_erf(z),
        lambda z: _by_erf(z) + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi),
    ),
    "mish": (
        lambda z: z * _of_softplus(z),
        lambda z: _of_softplus(z) + z * (1 - _of_softplus(z) ** 2) * _sigmoid(z),
    ),
    "elu": (lambda z: np.where(z > 0, z, np.expm1(z)), lambda z: np.where(z > 0, 1, np.exp(z))),
    "sigmoid": (_sigmoid, lambda z: _sigmoid(z) * _sigmoid(-z)),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "leaky_relu(0.2)": (lambda z: np.where(z > 0, z, 0.2 * z), lambda z: np.where(z > 0, 1, 0.2)),
}
EVERY_ACTIVATION = ACTIVATIONS | MORE_ACTIVATIONS


def f64(a):
    return None if a is None else np.asarray(a).astype(np.float64)


def moments(x, axis=-1, mask=None):
    """(count, mean, m2), each of shape (C,), of the True positions of `mask`."""
    rows, valid = _rows(x, axis), _rows(_full(mask, x), axis)
    count, mean, m2 = _moments(rows, valid != 0)
    return count[0, 0], mean[0, 0], m2[0, 0]


def bn_train(
    x,
    scale,
    bias,
    mean,
    var,
    *,
    axis=-1,
    momentum=0.99,
    epsilon=1e-5,
    mask=None,
    residual=None,
    activation=None,
    virtual_batch_size=None,
    unbiased=False,
):
    """Value and new running state."""
    x, scale, bias, mean, var, residual = map(f64, (x, scale, bias, mean, var, residual))
    with np.errstate(invalid="ignore", over="ignore"):
        xhat, *_ = _normalized(x, mean, var, axis, epsilon, mask, virtual_batch_size)
        z = _back(_affine(xhat, scale, bias), x, axis) + (0 if residual is None else residual)
        y = EVERY_ACTIVATION[activation][0](z)
    n, batch_mean, m2 = moments(x, axis, mask)
    batch_var = m2 / np.maximum(n - 1 if unbiased else n, 1)
    weight = np.where(n > 0, momentum, 1)  # nothing valid: the state stays
    return Result(y, _mixed(weight, mean, batch_mean), _mixed(weight, var, batch_var))


def _mixed(weight, old, new):
    """weight · old + (1 − weight) · new, of which what has no weight is left out, whatever it is."""
    with np.errstate(invalid="ignore"):
        return np.where(weight == 0, new, np.where(weight == 1, old, weight * old + (1 - weight) * new))


def bn_train_grads(
    dy,
    x,
    scale,
    bias,
    mean,
    var,
    *,
    axis=-1,
    epsilon=1e-5,
    mask=None,
    residual=None,
    activation=None,
    virtual_batch_size=None,
    given=False,
):
    """Gradients of sum(dy * y) with respect to x, scale, bias and residual.

    With g = dy·act'(z), r = scale/std and sums over all n' normalised positions of a channel,
    dx = r·(g − valid/n·(Σg + x̂·Σg·x̂)): every position is normalised, only valid ones moved the statistics; `given`
    if none did because there is no mask but other statistics.
    """
    x, scale, bias, mean, var, residual, dy = map(f64, (x, scale, bias, mean, var, residual, dy))
    with np.errstate(invalid="ignore", over="ignore"):
        xhat, rstd, n, valid = _normalized(x, mean, var, axis, epsilon, mask, virtual_batch_size)
        if not given:  # a masked NaN or Inf is nothing in derivatives
            xhat = np.where(valid | np.isfinite(_grouped(x, axis, virtual_batch_size)), xhat, 0)
        z = _back(_affine(xhat, scale, bias), x, axis) + (0 if residual is None else residual)
        dz = dy * EVERY_ACTIVATION[activation][1](z)
        if activation in ("relu", "relu6"):  # which lets through or not: what it does not is not even NaN
            dz = np.where(ACTIVATIONS[activation][1](z) > 0, dz, 0)
    g = _grouped(dz, axis, virtual_batch_size)
    sum_g, sum_gx = g.sum(1, keepdims=True), (g * xhat).sum(1, keepdims=True)
    r = rstd * (1 if scale is None else scale)
    dx = r * (g - np.where(valid, (sum_g + xhat * sum_gx) / np.maximum(n, 1), 0))
    return {
        "x": _back(dx, x, axis),
        "scale": sum_gx.sum((0, 1)),
        "bias": sum_g.sum((0, 1)),
        "residual": dz,
        "dy": dy,  # this and the next are no gradients, but what `assert_grads` asks for
        "rstd": rstd.max((0, 1)),
        "slope": np.abs(r).max((0, 1)),
    }


def bn_eval(x, scale, bias, mean, var, *, axis=-1, epsilon=1e-5, residual=None, activation=None):
    return bn_train(
        x,
        scale,
        bias,
        mean,
        var,
        axis=axis,
        epsilon=epsilon,
        residual=residual,
        activation=activation,
        mask=np.zeros((1,) * np.ndim(x), bool),  # nothing valid: the running state normalises
    ).y


def bn_eval_grads(dy, x, scale, bias, mean, var, *, axis=-1, epsilon=1e-5, residual=None, activation=None):
    """Gradients of sum(dy * y), here of the running mean and variance too."""
    grads = bn_train_grads(
        dy,
        x,
        scale,
        bias,
        mean,
        var,
        axis=axis,
        epsilon=epsilon,
        residual=residual,
        activation=activation,
        mask=np.zeros((1,) * np.ndim(x), bool),
        given=True,
    )
    rstd = 1 / np.sqrt(f64(var) + epsilon)
    r = rstd * (1 if scale is None else f64(scale))
    return grads | {"mean": -r * grads["bias"], "var": -0.5 * r * rstd * grads["scale"]}


def _normalized(x, mean, var, axis, epsilon, mask, virtual_batch_size):
    """x̂ (G, M, C), its 1/std and count (G, 1, C), and validity (G, M, C), for G virtual batches of M rows."""
    rows = _grouped(x, axis, virtual_batch_size)
    valid = _grouped(_full(mask, x), axis, virtual_batch_size) != 0
    n, batch_mean, m2 = _moments(rows, valid)
    center = np.where(n > 0, batch_mean, mean)
    rstd = 1 / np.sqrt(np.where(n > 0, m2 / np.maximum(n, 1), var) + epsilon)
    return (rows - center) * rstd, rstd, n, valid


def _moments(rows, valid):
    n = valid.sum(1, keepdims=True, dtype=np.float64)
    mean = np.where(valid, rows, 0).sum(1, keepdims=True) / np.maximum(n, 1)
    with np.errstate(invalid="ignore", over="ignore"):
        m2 = np.where(valid, (rows - mean) ** 2, 0).sum(1, keepdims=True)
    return n, mean, m2


def _affine(xhat, scale, bias):
    return xhat * (1 if scale is None else scale) + (0 if bias is None else bias)


def _full(mask, x):
    return np.ones(np.shape(x)) if mask is None else np.broadcast_to(mask, np.shape(x)).astype(float)


def _rows(a, axis):
    return _grouped(a, axis, None)


def _grouped(a, axis, virtual_batch_size):
    """(G, M, C): channels last, the first other axis cut into runs of `virtual_batch_size`."""
    a = np.moveaxis(f64(a), axis, -1)
    groups = a.shape[0] // virtual_batch_size if virtual_batch_size else 1
    return a.reshape(groups, int(np.prod(a.shape[:-1])) // groups, a.shape[-1])


def _back(rows, x, axis):
    shape = np.moveaxis(np.asarray(x), axis, -1).shape
    return np.moveaxis(rows.reshape(shape), -1, axis)


def tolerance(dtype, n=1):
    """Rounding to `dtype`, plus a sum over n elements accumulated in no less than float32."""
    eps = float(ml_dtypes.finfo(dtype).eps)
    accumulator = min(eps, float(np.finfo(np.float32).eps))
    return 4 * eps + 4 * accumulator * np.sqrt(n)


def assert_close(got, want, dtype=None, n=1, factor=1.0, axis=-1, scale=None):
    """To each value and, where values cancel, to the largest finite one of its channel; NaN and Inf must be equal.

    Channels lie along `axis`; None, and any vector, is one. `scale` takes the place of the largest, one for each
    channel: what a value was summed from. Nothing else is forgiven but what has no normal number.
    """
    dtype = np.dtype(np.asarray(got).dtype if dtype is None else dtype)
    got, want = f64(got), f64(want)
    assert got.shape == want.shape, (got.shape, want.shape)
    finite, info = np.isfinite(want), ml_dtypes.finfo(dtype)
    if scale is None:
        rows = None if axis is None or want.ndim == 1 else tuple(a for a in range(want.ndim) if a != axis % want.ndim)
        scale = np.max(np.abs(want), rows, keepdims=True, initial=0, where=finite)
    elif 0 < np.ndim(scale) < want.ndim:
        scale = np.expand_dims(scale, tuple(a for a in range(want.ndim) if a != axis % want.ndim))
    smallest = float(info.smallest_subnormal if dtype == np.float16 else info.tiny)  # XLA has no others subnormal
    with np.errstate(invalid="ignore"):
        limit = factor * tolerance(dtype, n) * (np.abs(want) + scale) + smallest
        same = (got == want) | (np.isnan(got) & np.isnan(want))
        share = np.where(finite, np.abs(got - want) / limit, np.where(same, 0, np.inf))
    off = ~(share <= 1)
    if off.any():
        at = np.unravel_index(np.argmax(np.nan_to_num(share, nan=np.inf)), want.shape)
        raise AssertionError(
            f"{off.sum()} of {want.size} values are off, at most that at {at}: {got[at]}, where {want[at]} is right, "
            f"by {share[at]:.3g} times what is allowed"
        )


def assert_state(got, want, dtype=None, n=1, factor=1.0):
    """Running statistics, each channel by itself: a mean is as sure as x is large, a variance as it is itself."""
    assert_close(got.mean, want.mean, dtype, n, factor, scale=np.sqrt(want.var))
    assert_close(got.var, want.var, dtype, n, factor, scale=0)


def assert_moments(got, want, dtype=None, n=1, factor=1.0):
    """(mean, m2) as (count, mean, m2) has them, likewise."""
    count, mean, m2 = want
    assert_close(got[0], mean, dtype, n, factor, scale=np.sqrt(m2 / np.maximum(count, 1)))
    assert_close(got[1], m2, dtype, n, factor, scale=0)


def assert_grads(got, want, dtype=None, n=1, factor=1.0, axis=-1):
    """Gradients as `bn_train_grads` has them, each channel by itself, to what they were summed from.

    These are ȳ times numbers of order 1, act'(z) and x̂, which may cancel themselves.
    """
    dy = np.where(np.isfinite(want["dy"]), np.abs(want["dy"]), 0)
    rows = tuple(a for a in range(dy.ndim) if a != axis % dy.ndim)
    largest, norm = np.max(dy, rows), np.sqrt(np.sum(dy**2, rows))
    scales = {"x": want["slope"] * largest, "scale": norm, "bias": norm, "residual": largest}
    scales |= {"mean": want["slope"] * norm, "var": want["slope"] * want["rstd"] * norm}
    for key, value in got.items():
        assert_close(value, want[key], dtype, n, factor, axis, scales[key])
