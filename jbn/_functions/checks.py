"""What arguments may be: every error names the argument, what came, and what to do."""

import contextlib
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, lax

from jbn._op.activations import ACTIVATIONS, NEGATIVE_SLOPE, encoded
from jbn._op.sync import Sync, bound

FLOATS = ("float16", "bfloat16", "float32", "float64")
IMPLEMENTATIONS = (None, "xla", "triton")


def check_input(x) -> jax.Array:
    """x as an array of a supported dtype and rank ≥ 1."""
    x, dtype = _typed("x", x)
    if dtype.name not in FLOATS:
        remedy = "cast it, e.g. x.astype(jnp.float32)"
        if jnp.issubdtype(dtype, jnp.complexfloating):
            remedy = "normalise real and imaginary parts apart, or use jbn.linen/jbn.nnx, which leave it to Flax"
        raise TypeError(f"x has dtype {dtype.name}, expected one of {', '.join(FLOATS)}: {remedy}")
    x = _array("x", x)
    _check_rank(x)
    return x


def _check_rank(x) -> None:
    if x.ndim == 0:
        raise ValueError("x is a scalar, expected rank >= 1 with channels along `axis`: add axes, e.g. x[None, None]")


def check_axis(axis, x) -> int:
    """The position of the channel axis, ≥ 0."""
    _check_rank(x)
    try:
        position = _integer(axis)
    except TypeError:
        raise TypeError(
            f"axis is {axis!r}, expected one integer that is known at tracing: give it, and move or reshape several "
            "channel axes into one"
        ) from None
    if not -x.ndim <= position < x.ndim:
        raise ValueError(
            f"axis is {axis}, out of range for x of shape {x.shape}: give one of {-x.ndim} to {x.ndim - 1}"
        )
    return position % x.ndim


def check_mask(mask, x):
    """The mask as a bool array of x's rank, or None."""
    if mask is None:
        return None
    mask = _array("mask", _typed("mask", mask)[0])
    if mask.dtype != bool:
        raise TypeError(f"mask has dtype {mask.dtype.name}, expected bool: convert it, e.g. mask.astype(bool)")
    if mask.ndim != x.ndim:
        raise ValueError(
            f"mask has shape {mask.shape}, of rank {mask.ndim}, expected rank {x.ndim} for x of shape {x.shape}: "
            "add axes of size 1 where it is the same along x, e.g. mask[..., None]"
        )
    if any(m not in (1, n) for m, n in zip(mask.shape, x.shape, strict=True)):
        raise ValueError(
            f"mask has shape {mask.shape}, which does not broadcast to x of shape {x.shape}: give 1 or x's size"
        )
    return mask


def check_residual(residual, x):
    """The residual as a float array of x's shape, or None."""
    if residual is None:
        return None
    residual, dtype = _typed("residual", residual)
    if dtype.name not in FLOATS:
        raise TypeError(f"residual has dtype {dtype.name}, expected one of {', '.join(FLOATS)}: cast it")
    residual = _array("residual", residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {residual.shape}, expected x's shape {x.shape}: broadcast it first")
    return residual


def check_vectors(name: str, value, kind: type, channels: int, x, axis):
    """`params` or `state`: the NamedTuple `kind`, each vector as a float array of shape (C,)."""
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} is a {type(value).__name__}, expected jbn.{kind.__name__}: params come first, then state, "
            "as jbn.bn_init returns them"
        )
    vectors = []
    for field, vector in zip(value._fields, value, strict=True):
        if vector is None and name == "params":
            vectors.append(None)
            continue
        known = "None"
        if vector is not None:
            vector, dtype = _typed(f"{name}.{field}", vector)
            known = dtype.name
        if vector is None or known not in FLOATS:
            raise TypeError(f"{name}.{field} has dtype {known}, expected one of {', '.join(FLOATS)}: cast it")
        if jnp.shape(vector) != (channels,):
            raise ValueError(
                f"{name}.{field} has shape {jnp.shape(vector)}, expected ({channels},) for x of shape {x.shape} with "
                f"axis={axis}: make it with jbn.bn_init({channels}), or give the axis of the channels"
            )
        vectors.append(_array(f"{name}.{field}", vector))
    return kind(*vectors)


def check_activation(activation, negative_slope) -> tuple[str | None, Callable | None]:
    """What the op applies, as a plan has it, and the function that is called on y instead; one of them is None."""
    name = activation if isinstance(activation, str) else None
    if activation is not None and not callable(activation) and name not in ACTIVATIONS:
        raise ValueError(
            f"activation is {activation!r}, expected None, a function or one of {', '.join(ACTIVATIONS)}: give any "
            "other as a function, such as jax.nn.softplus"
        )
    if isinstance(negative_slope, core.Tracer):
        raise TypeError(
            "negative_slope is traced, expected a number that is known at tracing: give a float, or learn it in a "
            "function, activation=lambda y: jnp.where(y > 0, y, slope * y)"
        )
    negative_slope = float(check_between("negative_slope", negative_slope, -1e30, 1e30))
    if name != "leaky_relu" and negative_slope != NEGATIVE_SLOPE:
        shown = activation_name(activation)
        raise ValueError(
            f"negative_slope is {negative_slope} with activation={shown}, expected that of 'leaky_relu': leave it out, "
            "or give activation='leaky_relu'"
        )
    return encoded(name, negative_slope), activation if callable(activation) else None


def activation_name(activation) -> str:
    """An activation in an error: a function by its name, without its address."""
    return getattr(activation, "__name__", type(activation).__name__) if callable(activation) else repr(activation)


def check_dtype(dtype) -> jnp.dtype:
    """A supported dtype (float64 counts as float32 while JAX has 64 bits off)."""
    try:
        known = jax.dtypes.canonicalize_dtype(dtype)
    except TypeError:
        raise TypeError(f"dtype is {dtype!r}, expected one of {', '.join(FLOATS)}: give one of these") from None
    if known.name not in FLOATS:
        raise TypeError(f"dtype is {known.name}, expected one of {', '.join(FLOATS)}: give one of these")
    return known


def check_positive(name: str, value, expected: str, remedy: str) -> int:
    """An integer ≥ 1."""
    try:
        number = _integer(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, expected {expected}: {remedy}") from None
    if number < 1:
        raise ValueError(f"{name} is {value!r}, expected {expected}: {remedy}")
    return number


def check_flag(name: str, value) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} is {value!r}, expected True or False, known at tracing: give one of them")
    return bool(value)


def check_implementation(implementation) -> None:
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}, expected None, 'xla' or 'triton': None chooses by itself"
        )


def check_between(name: str, value, low: float, high: float):
    """A real scalar in [low, high]; checked where its value is known at tracing."""
    bounds = f"in [{low:g}, {high:g}]" if math.isfinite(high) else f">= {low:g}"
    if getattr(value, "shape", ()) != ():
        raise ValueError(f"{name} has shape {value.shape}, expected a scalar: take one of its entries")
    if isinstance(value, core.Tracer):
        if jnp.issubdtype(value.dtype, jnp.integer):
            return value.astype(float)
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"{name} has dtype {value.dtype}, expected a real scalar: cast it")
        return value
    try:
        if isinstance(value, str | bytes):
            raise TypeError  # which float() would read
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}, expected a real number {bounds}: give one, or a float scalar") from None
    if not low <= number <= high:
        raise ValueError(f"{name} is {value}, expected a number {bounds}: give one")
    return value if isinstance(value, float | int) or hasattr(value, "dtype") else number


def check_names(axis_name, groups) -> Sync:
    """Who shares the statistics: the bound axis names, and their groups as tuples."""
    names = axis_names(axis_name)
    for name in names:
        if _several(name) or isinstance(name, int) or not isinstance(name, Hashable):
            raise TypeError(
                f"axis_name is {axis_name!r}, expected None, a name or a sequence of names: give e.g. 'data'"
            )
        if not bound(name):
            raise ValueError(
                f"axis_name has {name!r}, which is not bound here: call inside shard_map, pmap or "
                f"vmap(axis_name={name!r}), or leave axis_name out (under jit with sharded arrays statistics are "
                "global without it)"
            )
    if len(set(names)) != len(names):
        raise ValueError(f"axis_name is {axis_name!r}, expected each name once: leave out the repeated one")
    if groups is None:
        return Sync.over(names)
    if len(names) != 1:
        raise ValueError(
            f"axis_index_groups came with axis_name={axis_name!r}, expected exactly one name: groups index one axis"
        )
    try:
        found = tuple(tuple(operator.index(i) for i in group) for group in groups)
    except TypeError:
        raise TypeError(
            f"axis_index_groups is {groups!r}, expected lists of integers: give the indices of each group, e.g. "
            "[[0, 1], [2, 3]]"
        ) from None
    size = lax.axis_size(names[0])
    if sorted(i for group in found for i in group) != list(range(size)) or len({len(g) for g in found}) != 1:
        raise ValueError(
            f"axis_index_groups is {[list(g) for g in found]}, expected groups of one size that hold each index of "
            f"axis {names[0]!r}, 0 to {size - 1}, once"
        )
    return Sync.over(names, found)


def axis_names(axis_name) -> tuple:
    """None, a name or a sequence of names as a tuple."""
    return () if axis_name is None else tuple(axis_name) if _several(axis_name) else (axis_name,)


def _several(axis_name) -> bool:
    return isinstance(axis_name, Sequence) and not isinstance(axis_name, str)


def _integer(value) -> int:
    """`operator.index`, to which True is 1.

    Raises:
      TypeError: it is no integer.
    """
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def _typed(name: str, value) -> tuple[Any, jnp.dtype]:
    """`value` and its dtype if JAX knows that, else an array of the numbers that it lists or holds, and its dtype."""
    if hasattr(value, "dtype") and not isinstance(value, jax.Array):
        with contextlib.suppress(TypeError):
            return value, jnp.result_type(value)
    found = _array(name, value)
    return found, found.dtype


def _array(name: str, value) -> jax.Array:
    """`jnp.asarray`, which takes its time where there is nothing to do."""
    if isinstance(value, jax.Array):
        return value
    try:
        return jnp.asarray(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} is a {type(value).__name__} that makes no array, expected numbers in lists of one length, or an "
            "array: give e.g. jnp.zeros((8, 3))"
        ) from None
