"""How moments of disjoint parts combine.

Moments form a commutative monoid: those of two parts give those of the whole, and empty ones change nothing. With
δ = mean_b − mean_a and n = n_a + n_b: mean = mean_a + δ·n_b/n and m2 = m2_a + m2_b + δ²·n_a·n_b/n (Chan, Golub,
LeVeque 1979, eq. 2.1).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from jbn._op.plan import choose
from jbn._op.sync import Sync, add_across, gather, members_along, to_members

Part = TypeVar("Part")
GATHER_LIMIT = 2**20  # bytes that one gather may bring to a device; beyond, two sums of constant size are cheaper


class Moments(NamedTuple):
    """Moments of each channel.

    Attributes:
      count: number of values, `()` where all channels have as many, else `(C,)`.
      mean: Σx / count, `(C,)`; 0 where count is 0.
      m2: Σ(x − mean)², `(C,)`: the sum of squared deviations, in squared units of x. In float32 it is infinite for
        standard deviations past 1.8e19 / √count, and 0 below 1e-19: take moments of x times a power of two then.
    """

    count: jax.Array | int
    mean: jax.Array
    m2: jax.Array

    def variance(self, unbiased: bool = False) -> jax.Array:
        """m2 / count, or with `unbiased` m2 / max(count − 1, 1) (Bessel); 0 for an empty channel. Shape `(C,)`."""
        count = jnp.asarray(self.count, self.m2.dtype)
        return self.m2 / jnp.maximum(count - 1 if unbiased else count, 1)


def merge_across(own: Moments, sync: Sync) -> Moments:
    """Moments of all members' rows.

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
    every = gather(sent, sync)
    return merge_along(Moments(own.count, every[:, 0], every[:, 1]) if static else Moments(*jnp.unstack(every, axis=1)))


def _each(own: Moments, f: Callable) -> Moments:
    """f of every array; a static count stays."""
    return Moments(own.count if isinstance(own.count, int) else f(own.count), f(own.mean), f(own.m2))


def _merge_by_sums(own: Moments, members: int, sync: Sync) -> Moments:
    if isinstance(own.count, int):
        count = own.count * members
        (mean,) = add_across((own.mean / members,), sync)
    else:
        count, total = add_across((own.count, own.count * own.mean), sync)
        mean = total / jnp.maximum(count, 1)
    (m2,) = add_across((own.m2 + own.count * jnp.square(own.mean - mean),), sync)
    return Moments(count, mean, m2)


def pool_along(parts: Moments) -> Moments:
    """Merges moments stacked along their first axis, a count for each channel, by sums, which XLA splits over devices.

    The pivot, a mean of one of the parts, makes it exact for a constant channel.
    """
    count = jnp.sum(parts.count, 0, keepdims=True)
    lowest = float(jnp.finfo(parts.mean.dtype).min)  # finite, for those who debug infinities
    pivot = jnp.max(parts.mean, 0, keepdims=True, where=parts.count > 0, initial=lowest)
    pivot = choose(pivot > lowest, pivot, 0)  # none; not by the count, whose sum can then travel with the next one
    mean = pivot + jnp.sum(parts.count * (parts.mean - pivot), 0, keepdims=True) / jnp.maximum(count, 1)
    m2 = jnp.sum(parts.m2 + parts.count * jnp.square(parts.mean - mean), 0)
    return Moments(count[0], mean[0], m2)


def merge_along(members: Moments) -> Moments:
    """Merges moments stacked along their first axis, pairwise; a static count is that of each one."""
    size = members.mean.shape[0]
    if size == 1:
        return Moments(
            members.count if isinstance(members.count, int) else members.count[0],
            members.mean[0],
            members.m2[0],
        )
    half = size // 2

    def part(start, stop):
        return Moments(
            members.count if isinstance(members.count, int) else members.count[start:stop],
            members.mean[start:stop],
            members.m2[start:stop],
        )

    merged = merge_along(merge_two(part(0, half), part(half, 2 * half)))
    return merged if size % 2 == 0 else merge_two(merged, merge_along(part(size - 1, size)))


def merge_two(a: Moments, b: Moments) -> Moments:
    """Moments of two disjoint parts; an empty one leaves the other as it is, to the bit."""
    count = a.count + b.count
    weight = b.count / (max(count, 1) if isinstance(count, int) else jnp.maximum(count, 1))
    only_a, only_b = b.count == 0, a.count == 0
    delta = choose(only_a | only_b, jnp.zeros_like(a.mean), b.mean - a.mean)

    def pick(of_a, of_b, of_both):
        return choose(only_b, of_b, choose(only_a, of_a, of_both))

    mean = pick(a.mean, b.mean, a.mean + delta * weight)
    m2 = pick(a.m2, b.m2, a.m2 + b.m2 + jnp.square(delta) * (a.count * weight))
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
