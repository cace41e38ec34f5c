"""Virtual batches: runs of examples that are normalised each by itself, wherever the devices' shares of them end."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from jbn._functions.checks import check_positive
from jbn._op.partition import axes_of, full, ways
from jbn._op.plan import is_explicit
from jbn._op.sync import UNSPLIT, Sync


class Virtual(NamedTuple):
    """How the examples at hand make virtual batches."""

    examples: int  # their axis
    size: int  # of a virtual batch, as far as it is at hand
    sync: Sync  # who holds the rest of it; nobody where a member's examples are whole virtual batches
    members: int  # how many hold one virtual batch


def check_virtual(size, x, channel: int, sync: Sync) -> Virtual | None:
    """The virtual batches that were asked for, or None.

    Members of a named axis hold consecutive examples. Where these are fewer than a virtual batch, it is shared by as
    many members as make it full.
    """
    if size is None:
        return None
    size = check_positive("virtual_batch_size", size, "None or a positive integer", "give a divisor of the examples")
    if x.ndim < 2:
        raise ValueError(
            f"virtual_batch_size is {size}, but x of shape {x.shape} has no axis of examples to group: leave it out"
        )
    examples = 1 if channel == 0 else 0
    count = x.shape[examples]
    if count == 0 or (count == size and not sync.names):
        return None  # the whole is as good; of no examples there is no virtual batch
    if count % size == 0:
        return Virtual(examples, size, Sync(), 1)
    members, left_over = divmod(size, count)
    if sync.names and not left_over and sync.members % members == 0:
        if members == sync.members:
            return Virtual(examples, count, sync, members)
        if len(sync.names) == 1:
            return Virtual(examples, count, sync._replace(groups=_runs(sync, members), members=members), members)
    over = f" a member, of {sync.members} over axis_name={sync.names}" if sync.names else ""
    raise ValueError(
        f"virtual_batch_size is {size}, which does not divide the {count} examples{over} of x of shape {x.shape}: give "
        "a divisor, or drop the examples left over"
        + (", or a multiple of them that divides those of all members of one axis" if sync.names else "")
    )


def each(function: Callable, virtual: Virtual, x, residual, mask, implementation) -> tuple[jax.Array, Any]:
    """`function(x, residual, mask) -> (y, other)` of each virtual batch at hand: y as x is, the others stacked."""
    examples, size = virtual.examples, virtual.size
    given = [None if v is None else jnp.asarray(v) for v in (x, residual, mask)]
    along = [None if v is None or v.shape[examples] == 1 != x.shape[examples] else examples for v in given]
    parts = [v if at is None else _split(v, examples, size) for v, at in zip(given, along, strict=True)]
    # XLA may split one axis of an automatic mesh between virtual batches and the examples of each, which no rule of
    # ours can be asked about; without rules it sends nothing where a device has whole virtual batches. Kernels need
    # the rules, and over an explicit mesh the split above is one they understand.
    by_rules = implementation == "triton" or _explicit(x) is not None
    mapped = jax.vmap(function, along, (examples, 0), axis_name=None if by_rules else UNSPLIT)
    y, other = mapped(*parts)
    return lax.reshape(y, x.shape, out_sharding=_explicit(x)), other


def _split(value, examples: int, size: int):
    """(…, N, …) → (…, N / size, size, …); over an explicit mesh with the mesh's axes divided alike.

    Outer axes go to the virtual batches while they can, then axes to the examples of each, and what fits neither is
    gathered.
    """
    shape = value.shape
    new = (*shape[:examples], shape[examples] // size, size, *shape[examples + 1 :])
    sharding = _explicit(value)
    if sharding is None:
        return value.reshape(new)
    spec = full(sharding.spec, value.ndim)
    outer, inner = (), ()
    for name in axes_of(spec[examples]):
        if not inner and new[examples] % ways(sharding.mesh, (*outer, name)) == 0:
            outer = (*outer, name)
        elif size % ways(sharding.mesh, (*inner, name)) == 0:
            inner = (*inner, name)
    spec = P(*spec[:examples], outer or None, inner or None, *spec[examples + 1 :])
    return lax.reshape(value, new, out_sharding=sharding.update(spec=spec))


def _explicit(value):
    """The sharding in the value's type, where an explicit mesh says it."""
    sharding = jax.typeof(value).sharding
    return sharding if is_explicit(sharding) else None


def _runs(sync: Sync, members: int) -> tuple[tuple[int, ...], ...]:
    """Index groups of so many consecutive members, within the groups there are."""
    groups = sync.groups or (tuple(range(sync.members)),)
    return tuple(tuple(g[i : i + members]) for g in groups for i in range(0, len(g), members))
