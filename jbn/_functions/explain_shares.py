"""What `explain` is given: shapes in the place of arrays, and what of them one device holds."""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import core
from jax.sharding import AxisType, NamedSharding

from jbn._functions import checks
from jbn._functions.virtual import Virtual
from jbn._op.partition import full, ways


def abstract(name: str, value: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an array or a jax.ShapeDtypeStruct: make it one")
    traced = isinstance(value, core.Tracer)
    sharding = jax.typeof(value).sharding if traced else getattr(value, "sharding", None)
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    return jax.ShapeDtypeStruct(value.shape, dtype, sharding=sharding)


def division(x) -> tuple[list[int], list[int]]:
    """How many parts each axis of x has, and the axes that are gathered since theirs would be uneven."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return [1] * x.ndim, []
    asked = [ways(sharding.mesh, entry) for entry in full(sharding.spec, x.ndim)]
    even = [w if n % w == 0 else 1 for n, w in zip(x.shape, asked, strict=True)]
    return even, [a for a, (w, n) in enumerate(zip(asked, even, strict=True)) if w != n]


def unsplit(x, parts: list[int], gathered: list[int], virtual: Virtual | None) -> str | None:
    """Why the default leaves a sharded x to XLA, which cannot split it for a kernel."""
    for axis in gathered:
        return f"axis {axis} of x, {x.shape[axis]} long, is not divided evenly, and uneven parts are for XLA"
    if virtual is not None and math.prod(parts) > 1 and AxisType.Explicit not in x.sharding.mesh.axis_types:
        return "XLA alone splits virtual batches over an automatic mesh, and would gather x for a kernel"
    return None


def part(value, whole, parts: list[int]) -> jax.ShapeDtypeStruct:
    """One device's part of an array that lies like x."""
    if len(value.shape) != len(whole.shape):
        return value  # which `bn_train` refuses, with the reason
    shape = [n // p if n == size else n for n, size, p in zip(value.shape, whole.shape, parts, strict=True)]
    return jax.ShapeDtypeStruct(tuple(shape), value.dtype)


def named_axes(axis_name: str | Sequence[str] | None, size: int | None) -> list[tuple[str, int]]:
    """The named axes with sizes; how `size`, of all of them, is spread over several does not matter."""
    if size is not None:
        remedy = "give the number of members, or leave it out"
        size = checks.check_positive("axis_size", size, "None or a positive integer", remedy)
        if axis_name is None:
            raise ValueError(f"axis_size is {size}, but axis_name is None: name the axis, or leave it out")
    names = checks.axis_names(axis_name)
    sizes = [jax.device_count() if size is None else size, *(1 for _ in names[1:])]
    return list(zip(names, sizes, strict=False))
