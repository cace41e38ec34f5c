"""What the pieces of the op take: what is fixed at tracing, and the vectors of the affine map."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jbn._op.sync import Sync


class Options(NamedTuple):
    """What of a batch norm not all of its pieces see, and measurements of it go by."""

    activation: str | None  # as in `Plan`
    residual: str | None  # its dtype
    mask: tuple[int, ...] | None  # the axes that it varies along, counted from the last, below 0

    @classmethod
    def of(cls, activation, residual, mask) -> "Options":
        varies = None if mask is None else tuple(a - mask.ndim for a, n in enumerate(mask.shape) if n != 1)
        return cls(activation, None if residual is None else residual.dtype.name, varies)


class Plan(NamedTuple):
    """What is fixed at tracing; hashable."""

    channel: int  # position of the channel axis in x
    batch: int  # leading axes of x, each index of which is a batch of its own
    count: int  # divides sums; 1 where `Coefficients.weight` does
    centred: bool  # statistics are x's own, so derivatives flow through them
    activation: str | None  # as `activations.encoded` has it
    dtype: jnp.dtype  # of y
    sync: Sync
    may_partition: bool  # whether `jit` may split x over devices, by rules of our own
    implementation: str | None  # "triton": kernels, or an error; "xla"; None for what measurements say
    options: Options | None = None  # of the batch norm that a piece is of, if it is of one

    def batched(self, name) -> "Plan":
        """The plan once a vmap, of an axis called `name` or None, has put one more batch axis in front."""
        return self._replace(channel=self.channel + 1, batch=self.batch + 1, sync=self.sync.batched(name))


class Coefficients(NamedTuple):
    """The vectors of the affine map: y = scale · (x − mean) / √(var + epsilon) + bias."""

    mean: jax.Array  # (*batch, C)
    var: jax.Array  # (*batch, C)
    weight: jax.Array | None  # (*batch, C), 1 / count where the count is data
    epsilon: jax.Array  # (*batch, 1)
    scale: jax.Array | None  # (*batch, C)
    bias: jax.Array | None  # (*batch, C)


def rows(plan: Plan, ndim: int) -> tuple[int, ...]:
    """The axes that a channel's statistics are taken over."""
    return tuple(a for a in range(plan.batch, ndim) if a != plan.channel)


def row_count(plan: Plan, x) -> int:
    """How many values a channel of x has."""
    return math.prod(x.shape[a] for a in rows(plan, x.ndim))


def known_count(plan: Plan, x, like):
    """`row_count`: an integer, or where that is symbolic data, of `like`'s shape and dtype."""
    count = row_count(plan, x)
    return count if isinstance(count, int) else jnp.full_like(like, count)


def is_symbolic(shape) -> bool:
    """Whether a dimension is known only to be some positive integer, as `jax.export` may have it."""
    return not all(isinstance(n, int) for n in shape)


def size_in_bytes(value) -> int:
    """What an array, or a description of one, takes in memory."""
    return math.prod(value.shape) * jnp.dtype(value.dtype).itemsize


def in_megabytes(count: int) -> str:
    """Bytes as they are told, of whatever size, exactly: "9.633792 MB", of 10⁶ bytes."""
    return f"{count / 1e6:.6f}".rstrip("0").rstrip(".") + " MB"


def compute_dtype(dtype) -> jnp.dtype:
    """float32, or float64 for float64: what statistics and arithmetic use."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")


def is_explicit(sharding) -> bool:
    """Whether an explicit mesh says, in a type, how an array is split, or that it is not; else the compiler decides."""
    return sharding.mesh.are_all_axes_explicit or is_split(sharding)


def is_split(sharding) -> bool:
    """Whether an explicit mesh splits an array."""
    return any(entry is not None for entry in sharding.spec)


def where(condition, value, otherwise):
    """`jnp.where`, over an explicit mesh too, where it asks that all three are sharded alike: as `value` is."""
    sharding, other = (jax.typeof(v).sharding for v in (value, condition))
    if is_explicit(sharding):
        condition = jax.reshard(jnp.broadcast_to(condition, value.shape), sharding)
        if jnp.ndim(otherwise):
            otherwise = jax.reshard(jnp.broadcast_to(otherwise, value.shape), sharding)
    elif is_split(other):  # a mask alone
        condition = jax.reshard(condition, NamedSharding(other.mesh, PartitionSpec()))
    return jnp.where(condition, value, otherwise)
