"""Batch norm folded into the linear layer before or behind it, so that inference pays nothing for it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jbn._functions import checks
from jbn._functions.batch_norm import BNParams, BNState
from jbn._functions.eager import one_program
from jbn._op.plan import compute_dtype


def fold_into_previous(
    params: BNParams,
    state: BNState,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    axis: int = -1,
    epsilon: float | jax.Array = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Weights of the layer *before* a batch norm, dense or convolution, with which the norm is gone.

    With a = scale / √(var + epsilon): kernel' = a · kernel along the output channels, and bias' = (bias − mean) · a +
    the norm's bias; so layer'(x) = bn_eval(params, state, layer(x)) for every x. Exact (to rounding) for every dense
    layer and convolution: strided, dilated, padded in any way, grouped, depthwise, transposed.

    Args:
      params: `BNParams` of the batch norm, vectors `(C,)` or None.
      state: `BNState` of the batch norm, vectors `(C,)`.
      kernel: floats, C output channels along `axis`: Flax's `(inputs, C)` and `(*window, inputs / groups, C)`.
      bias: of the layer, `(C,)`, or None.
      axis: position of the output channels in `kernel`; −2 for a Flax `ConvTranspose` with `transpose_kernel=True`.
      epsilon: the batch norm's.

    Returns:
      kernel' and bias', in kernel's dtype, computed in float32 (float64 for float64); the layer has a bias now.

    Raises:
      TypeError, ValueError: for an argument out of contract, naming it.

    Source: Jacob et al. (2018), Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, section 3.2 and eq. 14 (https://arxiv.org/abs/1712.05877).
    """
    kernel = _kernel(kernel)
    out = checks.check_axis(axis, kernel)
    channels = kernel.shape[out]
    epsilon = _checked(params, state, epsilon, channels, kernel, axis)
    return _fold_into_previous(out, params, state, kernel, _bias(bias, channels), epsilon)


@partial(one_program, static_argnums=0)
def _fold_into_previous(out, params, state, kernel, bias, epsilon):
    slope, shift = _map(params, state, epsilon, compute_dtype(kernel.dtype))
    folded = kernel.astype(slope.dtype) * _along(slope, out, kernel.ndim)
    moved = shift if bias is None else bias.astype(slope.dtype) * slope + shift
    return folded.astype(kernel.dtype), moved.astype(kernel.dtype)


def fold_into_next(
    params: BNParams,
    state: BNState,
    kernel: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    epsilon: float | jax.Array = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """Weights of the layer *behind* a batch norm, dense or convolution, with which the norm is gone.

    With a = scale / √(var + epsilon) and c = the norm's bias − a · mean: kernel' = a · kernel along the input channels,
    and bias' = bias + Σ c · kernel over inputs and window; so layer'(x) = layer(bn_eval(params, state, x)).

    Exact (to rounding) where the layer is applied to the norm's output itself, without an activation between, and
    every output sees the whole window: dense layers, and convolutions, grouped, depthwise, strided and with dilated
    kernels too, with padding "VALID", "CIRCULAR" or "REFLECT". Not with padding by zeros ("SAME", integers), where c
    must not reach the border: pad with `−c / a` there, the value that the norm maps to 0, and convolve "VALID". Nor
    for a convolution that spreads its input with zeros (`input_dilation`), or a transposed one, whose outputs see
    different parts of the window.

    Args:
      params: `BNParams` of the batch norm, vectors `(C,)` or None.
      state: `BNState` of the batch norm, vectors `(C,)`.
      kernel: floats, Flax's `(C, outputs)` and `(*window, C / groups, outputs)`; the groups follow from C.
      bias: of the layer, `(outputs,)`, or None.
      epsilon: the batch norm's.

    Returns:
      kernel' and bias', in kernel's dtype, computed in float32 (float64 for float64); the layer has a bias now.

    Raises:
      TypeError, ValueError: for an argument out of contract, naming it.
    """
    kernel = _kernel(kernel)
    inputs, outputs = kernel.shape[-2:]
    channels = state.mean.size if isinstance(state, BNState) else 0  # else refused right below
    checks.check_vectors("state", state, BNState, channels, kernel, -2)
    groups = channels // max(inputs, 1)
    if channels != groups * inputs or groups == 0 or outputs % groups:
        raise ValueError(
            f"kernel has shape {kernel.shape}, expected (..., {channels} / groups, outputs) for a batch norm of "
            f"{channels} channels, with outputs a multiple of groups"
        )
    epsilon = _checked(params, state, epsilon, channels, kernel, -2)
    return _fold_into_next(params, state, kernel, _bias(bias, outputs), epsilon)


@one_program
def _fold_into_next(params, state, kernel, bias, epsilon):
    slope, shift = _map(params, state, epsilon, compute_dtype(kernel.dtype))
    inputs, outputs = kernel.shape[-2:]
    groups = slope.size // inputs

    def per_weight(vector):
        """(C,) → (C / groups, outputs): the group of an output has inputs of its own."""
        return jnp.repeat(vector.reshape(groups, inputs).T, outputs // groups, axis=1)

    wide = kernel.astype(slope.dtype)
    spread = (1,) * (kernel.ndim - 2) + (inputs, outputs)
    moved = jnp.sum(wide * per_weight(shift).reshape(spread), axis=tuple(range(kernel.ndim - 1)))
    if bias is not None:
        moved += bias.astype(slope.dtype)
    return (wide * per_weight(slope).reshape(spread)).astype(kernel.dtype), moved.astype(kernel.dtype)


def _checked(params, state, epsilon, channels, kernel, axis):
    checks.check_vectors("params", params, BNParams, channels, kernel, axis)
    checks.check_vectors("state", state, BNState, channels, kernel, axis)
    return checks.check_between("epsilon", epsilon, 0, float("inf"))


def _map(params, state, epsilon, kind) -> tuple[jax.Array, jax.Array]:
    """a and c of y = a·x + c, `(C,)`."""
    mean, var = (jnp.asarray(v).astype(kind) for v in state)
    slope = lax.rsqrt(var + jnp.asarray(epsilon).astype(kind))
    if params.scale is not None:
        slope *= jnp.asarray(params.scale).astype(kind)
    shift = -mean * slope
    return slope, shift if params.bias is None else shift + jnp.asarray(params.bias).astype(kind)


def _kernel(kernel) -> jax.Array:
    dtype = jnp.result_type(kernel)
    if dtype.name not in checks.FLOATS:
        raise TypeError(f"kernel has dtype {dtype.name}, expected one of {', '.join(checks.FLOATS)}: cast it")
    kernel = jnp.asarray(kernel)
    if kernel.ndim < 2:
        raise ValueError(f"kernel has shape {kernel.shape}, expected rank >= 2: (..., inputs, outputs)")
    return kernel


def _bias(bias, channels) -> jax.Array | None:
    if bias is not None and jnp.shape(bias) != (channels,):
        raise ValueError(f"bias has shape {jnp.shape(bias)}, expected ({channels},), the kernel's output channels")
    return None if bias is None else jnp.asarray(bias)


def _along(vector, axis: int, rank: int) -> jax.Array:
    return lax.expand_dims(vector, tuple(a for a in range(rank) if a != axis))
