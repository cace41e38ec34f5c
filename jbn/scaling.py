"""Feature scaling: statistics of a data set, seen once, become a map of every feature that can be undone.

Usage:

    from jbn import scaling

    affine = scaling.fit("standardize", train_x)          # or an iterator of batches
    model_input = scaling.apply(affine, test_x)
    x = scaling.invert(affine, model_input)
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import register_namedtuple_serialization
from jax.typing import ArrayLike

from jbn._functions.checks import FLOATS, check_axis, check_input, check_mask
from jbn._functions.eager import one_program
from jbn._functions.moments import Moments, merge, moments
from jbn._op.merging import merge_stream
from jbn._op.partition import like
from jbn._op.plan import compute_dtype

__all__ = ["Affine", "apply", "fit", "invert", "unit_length"]

Kind = Literal["standardize", "min_max", "mean_normalize"]
KINDS = ("standardize", "min_max", "mean_normalize")


@partial(register_namedtuple_serialization, serialized_name="jbn.scaling.Affine")  # in programs that are exported
class Affine(NamedTuple):
    """The map y = (x − offset) / scale of each feature; `(C,)` each, in units of x.

    Attributes:
      scale: never 0.
      offset: subtracted first, so that nothing cancels where |offset| is large.
    """

    scale: jax.Array
    offset: jax.Array


class _Summary(NamedTuple):
    """What every kind needs of a part of the data; parts merge."""

    exponent: jax.Array  # (C,) integers
    moments: Moments  # of x / 2^exponent, whose squares neither overflow nor vanish
    low: jax.Array  # (C,), +∞ where nothing was seen
    high: jax.Array  # (C,), −∞ where nothing was seen


def fit(kind: Kind, x: ArrayLike | Iterable, *, axis: int = -1, mask: ArrayLike | None = None) -> Affine:
    """The map that scales each feature of the data seen.

    | kind               | y                                                 | range          |
    |--------------------|---------------------------------------------------|----------------|
    | `"standardize"`    | (x − mean) / √var, with var = Σ(x − mean)² / n    | mean 0, std 1  |
    | `"min_max"`        | (x − min) / (max − min)                           | 0 to 1         |
    | `"mean_normalize"` | (x − mean) / (max − min)                          | within ±1      |

    A constant feature has scale 1, so it becomes 0. A feature without any value (all masked) has scale 1 and offset
    0, so it stays as it is. A NaN that no mask hides makes its feature's offset NaN.

    Units do not matter as long as x, std and max − min are normal numbers of the result's dtype (in float32 1.2e-38 to
    3.4e38): a smaller spread counts as none, a larger one is infinite. The variance, which need not be one, is of x
    over a power of two.

    Args:
      kind: one of the above.
      x: an array of floats (float16, bfloat16, float32, float64) of any rank ≥ 1, C features along `axis`, all other
        axes being samples; or an iterable of such arrays, or of pairs `(array, mask)`, which is gone through once.
        Sharded arrays are reduced where they lie. A nested list of numbers is not an array: `jnp.asarray` makes it one.
      axis: position of the features.
      mask: bool, of x's rank and broadcastable to it; False marks a missing value. For one array only: each batch
        of an iterable brings its own.

    Returns:
      `Affine`, float32 (float64 for float64 data). Batches of any size give what the whole array gives, to rounding
      that grows with the logarithm of their number. Under `jit` x may be a list of batches.

    Raises:
      TypeError, ValueError: for an argument out of contract or an iterable without batches, naming it.

    Source: for the merging of batches, Chan, Golub, LeVeque (1979), Updating formulae and a pairwise algorithm for
    computing sample variances.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if _is_array(x):
        return _affine(kind, _summary(x, axis, mask))
    if not isinstance(x, Iterable):
        raise TypeError(f"x is a {type(x).__name__}, expected an array or an iterable of arrays")
    if mask is not None:
        raise ValueError(
            "mask came with an iterable of batches, expected None: let it yield pairs (batch, mask) instead"
        )
    total = merge_stream(_summaries(x, axis), _merged)
    if total is None:
        raise ValueError("x yielded no batch: give at least one (a generator that was used up yields none)")
    return _affine(kind, total)


def apply(affine: Affine, x: ArrayLike, *, axis: int = -1) -> jax.Array:
    """y = (x − offset) / scale along `axis`; of x's shape and dtype, computed in float32 (float64 for float64)."""
    return _mapped(_there, affine, x, axis)


def invert(affine: Affine, y: ArrayLike, *, axis: int = -1) -> jax.Array:
    """x = y · scale + offset along `axis`: undoes `apply` to rounding, constant features too; y's shape and dtype."""
    return _mapped(_back, affine, y, axis)


def unit_length(x: ArrayLike, *, axis: int = -1) -> jax.Array:
    """x / √Σx², the sum taken along `axis`: each sample's features as a vector of Euclidean length 1.

    Args:
      x: floats of any rank ≥ 1, a sample's features along `axis`.
      axis: position of the features.

    Returns:
      Array of x's shape and dtype, computed in float32 (float64 for float64) without overflow or underflow of the
      squares. A sample of zeros stays zeros; there the gradient is finite and arbitrary.

    Raises:
      TypeError, ValueError: for an argument out of contract, naming it.
    """
    x = check_input(x)
    return _unit_length(x, check_axis(axis, x))


@partial(one_program, static_argnums=1)
def _unit_length(x, axis):
    wide = x.astype(compute_dtype(x.dtype))
    # A power of two common to the sample keeps the squares in range, and cancels out of value and gradient alike.
    step = 2.0 ** (jnp.finfo(wide.dtype).maxexp * 5 // 8)
    largest = jnp.max(jnp.abs(wide), axis, keepdims=True, initial=0)
    wide *= lax.stop_gradient(jnp.where(largest > step**0.5, 1 / step, jnp.where(largest < step**-0.5, step, 1.0)))
    squares = jnp.sum(jnp.square(wide), axis, keepdims=True)
    return (wide * lax.rsqrt(jnp.where(squares > 0, squares, 1))).astype(x.dtype)


def _is_array(x) -> TypeGuard[jax.Array]:
    return hasattr(x, "dtype") and hasattr(x, "shape")


def _summaries(batches, axis):
    features = None
    for number, batch in enumerate(batches):
        x, mask = batch if isinstance(batch, tuple) and len(batch) == 2 else (batch, None)
        if not _is_array(x):
            raise TypeError(
                f"x yielded a {type(x).__name__} as batch {number}, expected an array or a pair (array, mask): "
                "convert it, e.g. with jnp.asarray"
            )
        try:
            part = _summary(x, axis, mask)
        except (TypeError, ValueError) as error:
            error.add_note(f"This is batch {number} of x; a batch with a mask is a pair (array, mask) among others.")
            raise
        features = part.low.size if features is None else features
        if part.low.size != features:
            raise ValueError(
                f"batch {number} of x has shape {x.shape}, with {part.low.size} features along axis={axis}, "
                f"expected {features} as in the first batch"
            )
        yield part


def _summary(x, axis, mask) -> _Summary:
    x = check_input(x)
    return _summarize(x, check_mask(mask, x), check_axis(axis, x))


@partial(jax.jit, static_argnums=2)
def _summarize(x, mask, axis) -> _Summary:
    mask = like(mask, x)
    rows = tuple(a for a in range(x.ndim) if a != axis)
    wide = x.astype(compute_dtype(x.dtype))
    low = jnp.min(wide, rows, initial=jnp.inf, where=mask)
    high = jnp.max(wide, rows, initial=-jnp.inf, where=mask)
    exponent, far = _exponent(jnp.where(low <= high, jnp.maximum(-low, high), 0))

    plain = moments(x, axis=axis, mask=mask)

    def scaled():
        return moments(wide * lax.expand_dims(_power(-exponent, wide.dtype), rows), axis=axis, mask=mask)

    seen = lax.cond(far, scaled, lambda: plain)  # scaled in any case, x would be written to memory
    return _Summary(exponent, seen._replace(count=jnp.broadcast_to(seen.count, seen.mean.shape)), low, high)


@jax.jit
def _merged(a: _Summary, b: _Summary) -> _Summary:
    dtype = max(a.low.dtype, b.low.dtype, key=lambda dtype: dtype.itemsize)
    a, b = _as_of(a, dtype), _as_of(b, dtype)
    exponent = jnp.maximum(a.exponent, b.exponent)

    def of(part: _Summary) -> Moments:
        count, mean, m2 = part.moments
        least = jnp.finfo(mean.dtype).minexp
        ratio = _power(jnp.maximum(part.exponent - exponent, least), mean.dtype)
        return Moments(count, mean * ratio, m2 * ratio * ratio)

    return _Summary(exponent, merge(of(a), of(b)), jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high))


def _as_of(part: _Summary, dtype) -> _Summary:
    """The summary of data of a wider dtype."""
    exponent = part.exponent.astype(f"int{jnp.finfo(dtype).bits}")
    moments, low, high = jax.tree.map(lambda value: value.astype(dtype), part[1:])
    return _Summary(exponent, moments, low, high)


@partial(one_program, static_argnums=0)
def _affine(kind: Kind, seen: _Summary) -> Affine:
    count, mean, _ = seen.moments
    unit = _power(seen.exponent, mean.dtype)
    if kind == "standardize":
        var = seen.moments.variance()
        spread = jnp.where(var > 0, jnp.sqrt(jnp.where(var > 0, var, 1)) * unit, 0)
    else:
        varies = seen.high > seen.low
        spread = jnp.where(varies, seen.high, 0) - jnp.where(varies, seen.low, 0)
    # devices divide by a subnormal number as by 0; NaN is not less, and stays
    scale = jnp.where(spread < jnp.finfo(mean.dtype).tiny, 1, spread)
    offset = jnp.where(count > 0, seen.low, 0) if kind == "min_max" else mean * unit
    return Affine(scale, offset)


def _exponent(largest):
    """⌊log₂⌋ of each feature's largest |x|; 0 where x may stay as it is. And whether any is not 0.

    A feature of zeros, or without any value, has the least: no reason to scale, and merged, the other part's is taken.
    """
    info = jnp.finfo(largest.dtype)
    bits = lax.bitcast_convert_type(jnp.maximum(largest, info.tiny), f"int{info.bits}")
    exponent = jnp.minimum((bits >> info.nmant) + info.minexp - 1, -info.minexp)  # so that 2^−exponent is normal too
    # within, the square of the largest number's last bit over 2³⁰ rows does not vanish, nor do 2⁴⁰ squares overflow
    near = (exponent >= -info.maxexp * 3 // 16) & (exponent < info.maxexp * 5 // 16)
    exponent = jnp.where(near, 0, exponent)
    return exponent, jnp.any((largest > 0) & ~near)


def _power(exponent, dtype):
    """2^exponent, exactly: a device's own power may be off by a rounding."""
    info = jnp.finfo(dtype)
    return lax.bitcast_convert_type((exponent - info.minexp + 1) << info.nmant, dtype)


def _there(x, scale, offset):
    return (x - offset) / scale


def _back(y, scale, offset):
    return y * scale + offset


def _mapped(function, affine, x, axis) -> jax.Array:
    x = check_input(x)
    axis = check_axis(axis, x)
    if not isinstance(affine, Affine):
        raise TypeError(f"affine is a {type(affine).__name__}, expected jbn.scaling.Affine, as fit returns it")
    vectors = []
    for name, vector in zip(affine._fields, affine, strict=True):
        vector = jnp.asarray(vector)
        if (kind := vector.dtype.name) not in FLOATS:
            raise TypeError(f"affine.{name} has dtype {kind}, expected one of {', '.join(FLOATS)}: cast it")
        if vector.shape != (x.shape[axis],):
            raise ValueError(
                f"affine.{name} has shape {vector.shape}, expected ({x.shape[axis]},) for x of shape {x.shape} with "
                f"axis={axis}: give the axis of the features"
            )
        vectors.append(vector)
    return _run(function, axis, x, *vectors)


@partial(one_program, static_argnums=(0, 1))
def _run(function, axis, x, *vectors):
    rows = tuple(a for a in range(x.ndim) if a != axis)
    wide = jnp.float64 if "float64" in (x.dtype.name, *(v.dtype.name for v in vectors)) else jnp.float32
    return function(x.astype(wide), *(lax.expand_dims(v.astype(wide), rows) for v in vectors)).astype(x.dtype)


def __dir__() -> list[str]:
    return __all__
