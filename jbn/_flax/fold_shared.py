"""What folding of linen and nnx models shares: which layers take a batch norm up, and what of the norm remains."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jbn._flax.fold_marks import Call
from jbn._flax.fold_pairs import Pair
from jbn._flax.layer import feature_axes
from jbn._functions.batch_norm import BNParams, BNState, called
from jbn._functions.checks import FLOATS, check_activation
from jbn._functions.folding import fold_into_next, fold_into_previous
from jbn._op.activations import NEGATIVE_SLOPE, activation
from jbn._op.plan import compute_dtype

STACKED = "its variables are stacked, by scan or vmap over layers"
PADS_NOTHING = ("VALID", "CIRCULAR", "REFLECT")  # or nothing that is not of the image


def norm_call(module: str, layer: Any, x: Any, *, own: str, average: Any, mean: Any, residual: Any) -> Call:
    """The call of a batch norm, and why it cannot be folded; `own`: what its class does in its own way."""
    if own:
        why = f"its class {type(layer).__name__} has a {own} of its own"
    elif not average:
        why = "it normalises with the batch's own statistics: fold what inference runs (train=False; model.eval())"
    elif x.dtype.name not in FLOATS or feature_axes(layer.axis, x) != {x.ndim - 1}:
        why = f"it normalises x of shape {x.shape}, dtype {x.dtype.name}, with axis={layer.axis!r}, not the last"
    elif jnp.shape(mean) != x.shape[-1:]:
        why = STACKED
    else:
        why = ""
    bare = getattr(layer, "activation", None) is None and residual is None
    return Call(module, True, why, "" if bare else "it has an activation or a residual")


def redefined(kind: type, flax: type) -> str:
    """A method of Flax's class that a subclass, not one of ours, has changed, or ""."""
    fields = getattr(flax, "__dataclass_fields__", {})
    for owner in kind.__mro__:
        if owner in flax.__mro__ or owner.__module__ in ("jbn.linen", "jbn.nnx"):
            continue
        for name, value in vars(owner).items():
            method = (callable(value) or isinstance(value, property)) and name not in fields
            if name == "__call__" or (method and not name.startswith("__") and hasattr(flax, name)):
                return name
    return ""


def layer_call(
    module: str, layer: Any, kernel: Any, window: tuple[int, ...] | None, transposed: bool, other: tuple[int, ...]
) -> Call:
    """The call of a dense layer (`window` None) or convolution, and why a batch norm cannot be folded into it.

    `other`: the kernel's shape outside this call, or in it, where loops over layers stack them.
    """
    refuses = ""
    if jnp.shape(kernel) != other:
        refuses = STACKED
    elif jnp.result_type(kernel).name not in FLOATS:
        refuses = f"its kernel has dtype {jnp.result_type(kernel).name}"
    behind = ""
    if transposed:
        behind = "the outputs of a transposed convolution see different parts of the window"
    elif window is not None:
        padding = layer.padding
        if isinstance(padding, str):
            pads = padding not in PADS_NOTHING
        else:  # a number, or one or two for each dimension
            pads = any(np.any(np.asarray(each)) for each in (padding if isinstance(padding, Iterable) else (padding,)))
        if isinstance(padding, str) and all(size == 1 for size in window):
            pads = False  # "SAME" and "CAUSAL" pad by the window
        if pads:
            behind = f"with padding={padding!r} it sees zeros around, which the batch norm before it did not make"
        elif np.any(np.asarray(layer.input_dilation or 1) != 1):
            dilation = f"input_dilation={layer.input_dilation!r}"
            behind = f"with {dilation} it sees zeros between, which the batch norm before it did not make"
        elif layer.mask is not None:
            behind = "its kernel is masked"
    return Call(module, False, refuses, behind, transposed)


def weights(
    pair: Pair, params: BNParams, state: BNState, epsilon: Any, kernel: Any, bias: Any, axis: int
) -> tuple[jax.Array, jax.Array]:
    """The layer's kernel and bias once it has taken the batch norm up."""
    if pair.layer_first:
        return fold_into_previous(params, state, kernel, bias, axis=axis, epsilon=epsilon)
    return fold_into_next(params, state, kernel, bias, epsilon=epsilon)


def last(norm: Any) -> tuple[Any, float]:
    """Activation of a batch norm and its negative slope, as `bn_eval` takes them; Flax's have none."""
    return getattr(norm, "activation", None), getattr(norm, "negative_slope", NEGATIVE_SLOPE)


def rest(x: jax.Array, residual: jax.Array | None, last: tuple[Any, float], dtype: Any) -> jax.Array:
    """What is left of a batch norm whose affine map is in a layer: activation(x + residual), in its dtype."""
    name, outside = check_activation(*last)
    if residual is None and name is None:
        return called(outside, x.astype(dtype))
    wide = compute_dtype(x.dtype)
    z = x.astype(wide) if residual is None else x.astype(wide) + residual.astype(wide)
    return called(outside, (z if name is None else activation(name).value(z)).astype(dtype))
