"""What the two Flax modules share: their calls of `bn_train`, and those left to Flax; axes, masks, result dtypes."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jbn._functions.batch_norm import BNParams, BNState, bn_eval, bn_train
from jbn._functions.checks import FLOATS, activation_name, check_axis
from jbn._functions.renorm import Renorm
from jbn._op.activations import NEGATIVE_SLOPE

NOT_ASKED = {
    "activation": None,
    "virtual_batch_size": None,
    "unbiased": False,
    "implementation": None,
    "renorm": False,
}


def bounds(layer: Any, r_max: Any, d_max: Any) -> Renorm | None:
    """With `renorm` the bounds of the call, or else those of the layer.

    Raises:
      ValueError: bounds without `renorm`. (One that is missing with it is for `bn_train` to say, which inference does
        not reach.)
    """
    found = Renorm(layer.r_max if r_max is None else r_max, layer.d_max if d_max is None else d_max)
    if layer.renorm:
        return found
    given = " and ".join(f"{name}={value!r}" for name, value in found._asdict().items() if value is not None)
    if given:
        raise ValueError(f"BatchNorm got {given} with renorm=False: set renorm=True, or leave the bounds out")
    return None


def normalize(
    layer: Any,
    params: BNParams,
    state: BNState,
    x: jax.Array,
    *,
    axis: int,
    dtype: Any,
    average: bool,
    mask: jax.Array | None,
    residual: jax.Array | None,
    renorm: Renorm | None,
    alone: bool = False,
) -> tuple[jax.Array, BNState]:
    """y and the new state, by the layer's attributes; the state as it was with `average`, on which y is then based.

    `alone`: whatever shares statistics or splits the batch does not exist here.
    """
    options: dict[str, Any] = dict(
        axis=axis,
        epsilon=layer.epsilon,
        residual=residual,
        activation=layer.activation,
        negative_slope=layer.negative_slope,
        dtype=dtype,
        implementation=layer.implementation,
    )
    if average:
        return bn_eval(params, state, x, **options), state
    shared = layer.axis_name is not None and not alone
    return bn_train(
        params,
        state,
        x,
        momentum=layer.momentum,
        mask=full_rank_mask(mask, x),
        virtual_batch_size=None if alone else layer.virtual_batch_size,
        unbiased=layer.unbiased,
        axis_name=layer.axis_name if shared else None,
        axis_index_groups=layer.axis_index_groups if shared else None,
        renorm=renorm,
        **options,
    )


def left_to_flax(layer: Any, x: jax.Array, residual: jax.Array | None) -> bool:
    """Whether this call is one that Flax's own batch norm serves and `bn_train` does not.

    Raises:
      ValueError: it is, and it asks for something that only `bn_train` has.
    """
    reason, remedy = _reason(layer, x)
    asked = {name: getattr(layer, name) for name in NOT_ASKED}
    asked = {name: value for name, value in asked.items() if value is not NOT_ASKED[name]}
    if callable(layer.activation):
        asked["activation"] = f"function {activation_name(layer.activation)}"
    if layer.negative_slope != NEGATIVE_SLOPE:
        asked["negative_slope"] = layer.negative_slope
    if residual is not None:
        asked["residual"] = f"array of shape {jnp.shape(residual)}"
    if reason and asked:
        arguments = ", ".join(f"{name}={value!r}" for name, value in asked.items())
        raise ValueError(
            f"BatchNorm got {arguments} together with {reason}, which is left to Flax's own batch norm, "
            f"where that does not exist: {remedy}, or do without {' and '.join(asked)}"
        )
    return bool(reason)


def _reason(layer: Any, x: jax.Array) -> tuple[str, str]:
    for name, dtype in (("x of dtype", x.dtype), ("dtype", layer.dtype), ("param_dtype", layer.param_dtype)):
        if dtype is not None and jnp.dtype(dtype).name not in FLOATS:
            return f"{name} {jnp.dtype(dtype)}", f"use one of {', '.join(FLOATS)}"
    if len(feature_axes(layer.axis, x)) != 1:
        return f"axis={layer.axis!r}", "reshape x to a single feature axis"
    if not getattr(layer, "force_float32_reductions", True):  # linen alone has it
        return "force_float32_reductions=False", "leave force_float32_reductions at True"
    return "", ""


def feature_axis(axis: Any, x: jax.Array) -> int:
    """The one feature axis, counted from the front; Flax also takes it inside a tuple."""
    (one,) = feature_axes(axis, x)
    return one


def feature_axes(axis: Any, x: jax.Array) -> set[int]:
    """One or several, as Flax takes them, counted from the front."""
    return {check_axis(each, x) for each in (axis if isinstance(axis, Iterable) else (axis,))}


def check_features(x: jax.Array, axis: int, features: int, given: str, remedy: str) -> None:
    """As many channels as the layer's variables have.

    Raises:
      ValueError: x has others; `given` says where the layer's are from.
    """
    if x.shape[axis] != features:
        raise ValueError(
            f"x has shape {x.shape}, of {x.shape[axis]} channels along axis {axis}, and {given}: {remedy}, or give the "
            "axis of the channels"
        )


def full_rank_mask(mask: Any, x: jax.Array) -> jax.Array | None:
    """Flax's mask, of any dtype and of lower rank as in NumPy's broadcasting, as `bn_train` takes it.

    Raises:
      ValueError: it does not broadcast to `x`, or, of lower rank, it would by its first axes as well.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask).astype(bool)
    missing = x.ndim - mask.ndim
    leading = missing > 0 and mask.shape == x.shape[: mask.ndim]
    fits = missing >= 0 and all(m in (1, n) for m, n in zip(mask.shape, x.shape[missing:], strict=True))
    added = f"mask[..., {', '.join(['None'] * missing)}]"
    if fits and leading and mask.size > 1:
        raise ValueError(
            f"mask has shape {mask.shape}, which are both the first and the last sizes of x of shape {x.shape}: give "
            f"{added} where its axes are the first, as of examples, or mask[None] where they are the last"
        )
    if not fits:
        remedy = f"give {added}, if its axes are the first" if leading else "give 1 or x's size along each axis"
        raise ValueError(f"mask has shape {mask.shape}, which does not broadcast to x of shape {x.shape}: {remedy}")
    return jnp.expand_dims(mask, tuple(range(missing)))


def with_result_dtype(x: jax.Array, dtype: Any, *variables: jax.Array | None) -> tuple[jax.Array, Any]:
    """`x`, and the dtype of the result: the one asked for, or what `x` and the variables promote to.

    `bn_train` computes in the precision of `x`, so a float64 result needs a float64 `x`.
    """
    if dtype is None:
        dtype = jnp.result_type(x, *(each for each in variables if each is not None))
    return (x.astype(dtype) if jnp.dtype(dtype) == jnp.float64 else x), dtype
