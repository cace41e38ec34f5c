"""How moments of disjoint parts combine.

Moments form a commutative monoid: those of two parts give those of the whole, and empty ones change nothing. With
δ = mean_b − mean_a and n = n_a + n_b: mean = mean_a + δ·n_b/n and m2 = m2_a + m2_b + δ²·n_a·n_b/n (Chan, Golub,
LeVeque 1979, eq. 2.1).
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import register_namedtuple_serialization

from jbn._op.plan import where
from jbn._op.sync import Sync, add_across, gather, members_along, to_members

Part = TypeVar("Part")
GATHER_LIMIT = 2**20  # bytes that one gather may bring to a device; beyond, two sums of constant size are cheaper


@partial(register_namedtuple_serialization, serialized_name="jbn.Moments")  # in programs that are exported
class Moments(NamedTuple):
    """Moments of each channel.

    Attributes:
      count: number of values, `()` where all channels have as many, else `(C,)`.
      mean: Σx / count, `(C,)`; 0 where count is 0.
      m2: Σ(x − mean)², `(C,)`: the sum of squared deviations, in squared units of x. In float32 it is infinite for
        standard deviations past 1.8e19 / √count, and wrong below 1e-15: take moments of x times a power of two then.
    """

    count: jax.Array | float
    mean: jax.Array
    m2: jax.Array

    def variance(self, unbiased: bool = False) -> jax.Array:
        """m2 / count, or with `unbiased` m2 / max(count − 1, 1) (Bessel); 0 for an empty channel. Shape `(C,)`."""
        count = jnp.asarray(self.count, self.m2.dtype)
        return self.m2 / jnp.maximum(count - 1 if unbiased else count, 1)


class Statistics(NamedTuple):
    """What layers carry of each channel: the variance, which may fit where m2 does not."""

    count: jax.Array | int
    mean: jax.Array
    var: jax.Array  # Σ(x − mean)² / count; 0 where count is 0

    def variance(self, unbiased: bool = False) -> jax.Array:
        """As `Moments` has it."""
        if not unbiased:
            return self.var
        count = jnp.asarray(self.count, self.var.dtype)
        return self.var * (count / jnp.maximum(count - 1, 1))


def merge_across(own: Statistics, sync: Sync) -> Statistics:
    """Statistics of all members' rows.

    By one gather, merged in a fixed order, as long as that is small; else by two sums, of which the second is over
    squared distances from the common mean, so that it does not cancel either.
    """
    for axis, groups in sync.dims:
        every = merge_along(_each(own, lambda v, a=axis, g=groups: members_along(v, a, g)))
        own = _each(every, lambda v, a=axis, g=groups, size=own.mean.shape[axis]: to_members(v, a, g, size))
    if not sync.names:
        return own
    static = isinstance(own.count, int)
    members = Sync.over(sync.names, sync.groups).members
    sent = jnp.stack(own[1:] if static else own)
    if sync.groups is None and members * sent.size * sent.dtype.itemsize > GATHER_LIMIT:
        return _merge_by_sums(own, members, sync)
    every = jnp.unstack(gather(sent, sync), axis=1)
    return merge_along(Statistics(own.count, *every) if static else Statistics(*every))


def _each(own: Statistics, f: Callable) -> Statistics:
    """f of every array; a static count stays."""
    return Statistics(own.count if isinstance(own.count, int) else f(own.count), f(own.mean), f(own.var))


def _merge_by_sums(own: Statistics, members: int, sync: Sync) -> Statistics:
    if isinstance(own.count, int):
        count, share = own.count * members, 1 / members
        (mean,) = add_across((own.mean / members,), sync)
    else:
        count, total = add_across((own.count, own.count * own.mean), sync)
        mean, share = total / jnp.maximum(count, 1), own.count / jnp.maximum(count, 1)
    off = own.mean - mean
    (var,) = add_across((share * own.var + share * off * off,), sync)
    return Statistics(count, mean, var)


def pool_along(parts: Statistics) -> Statistics:
    """Merges statistics stacked along their first axis, a count for each channel, by sums that XLA splits over devices.

    The pivot, a mean of one of the parts, makes it exact for a constant channel.
    """
    count = jnp.sum(parts.count, 0, keepdims=True)
    lowest = float(jnp.finfo(parts.mean.dtype).min)  # finite, for those who debug infinities, as jnp.max is not
    pivot = lax.reduce_max(where(parts.count > 0, parts.mean, lowest), (0,))[None]
    pivot = where(pivot > lowest, pivot, 0)  # none; not by the count, whose sum can then travel with the next one
    size = jnp.maximum(count, 1)
    mean = pivot + jnp.sum(parts.count * (parts.mean - pivot), 0, keepdims=True) / size
    share, off = parts.count / size, parts.mean - mean
    # from the left: the square of an empty part's distance, whose mean is 0, may be infinite
    var = jnp.sum(share * parts.var + share * off * off, 0)
    return Statistics(count[0], mean[0], var)


def merge_along(members: Statistics) -> Statistics:
    """Merges statistics stacked along their first axis, pairwise; a static count is that of each one."""
    size = members.mean.shape[0]
    if isinstance(members.count, int):
        count, share = members.count * size, 1 / size
    else:
        total = jnp.sum(members.count, 0, keepdims=True)
        count, share = total[0], members.count / jnp.maximum(total, 1)
    # counts and m2 are as good in any unit: in that of the whole, whose m2 is then its variance
    whole = _merge_pairs(Moments(share, members.mean, members.var * share))
    return Statistics(count, whole.mean, whole.m2)


def _merge_pairs(parts: Moments) -> Moments:
    """Moments stacked along their first axis, a count for all or for each."""
    size = parts.mean.shape[0]

    def part(at):
        return Moments(
            parts.count if isinstance(parts.count, float | int) else parts.count[at], parts.mean[at], parts.m2[at]
        )

    if size == 1:
        return part(0)
    half = size // 2
    merged = _merge_pairs(merge_two(part(slice(half)), part(slice(half, 2 * half))))
    return merged if size % 2 == 0 else merge_two(merged, part(size - 1))


def merge_two(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint parts; an empty one leaves the other as it is, to the bit. Counts may be in any unit."""
    count = a.count + b.count
    weight = b.count / (count or 1 if isinstance(count, int | float) else jnp.where(count > 0, count, 1))
    only_a, only_b = b.count == 0, a.count == 0
    delta = where(only_a | only_b, jnp.zeros_like(a.mean), b.mean - a.mean)

    def pick(of_a, of_b, of_both):
        return where(only_b, of_b, where(only_a, of_a, of_both))

    mean = pick(a.mean, b.mean, a.mean + delta * weight)
    m2 = pick(a.m2, b.m2, a.m2 + b.m2 + (delta * a.count) * (delta * weight))
    return Moments(count, mean, m2)


def merge_stream(parts: Iterable[Part], merge: Callable[[Part, Part], Part]) -> Part | None:
    """All parts merged in order as a balanced tree, holding only log₂ of them at a time; None of none.

    Parts meet only with others of their own weight, as digits of a binary counter carry: a small part is never
    added to a large sum, where its last bits would be lost, and rounding grows with the logarithm of their number.
    """
    waiting: list[tuple[int, Part]] = []  # sizes fall from left to right
    for part in parts:
        size = 1
        while waiting and waiting[-1][0] == size:
            part = merge(waiting.pop()[1], part)
            size *= 2
        waiting.append((size, part))
    if not waiting:
        return None
    _, total = waiting.pop()
    while waiting:
        total = merge(waiting.pop()[1], total)
    return total
