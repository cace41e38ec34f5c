"""Sums and gathers over the axes that share one batch: mapped axes by name, or vmapped ones by position."""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jbn._op.jax_internals import varying

UNSPLIT = "jbn_unsplit"  # an axis name, bound where XLA alone is to say how arrays are split over devices

Groups = tuple[tuple[int, ...], ...] | None


class Sync(NamedTuple):
    """Who shares the statistics: axes bound by a mapping, then leading axes that a vmap made of such a name."""

    names: tuple[str | tuple[str, ...], ...] = ()  # what lies in an inner tuple is one axis to a collective
    groups: Groups = None  # index groups within the one name
    dims: tuple[tuple[int, Groups], ...] = ()  # position of a leading axis, and its groups
    members: int = 1  # how many share in all

    @classmethod
    def over(cls, names: tuple, groups: Groups = None) -> "Sync":
        """Sharing over axes that are bound here. Their sizes are taken now: a derivative may be traced elsewhere."""
        return cls(names, groups, (), len(groups[0]) if groups else math.prod(map(lax.axis_size, names)))

    def batched(self, name) -> "Sync":
        """The same sharing once a vmap has put one more axis in front, which may bind one of the names."""
        dims = tuple((position + 1, groups) for position, groups in self.dims)
        if name not in self.names:
            return self._replace(dims=dims)
        names = tuple(n for n in self.names if n != name)
        return Sync(names, None, (*dims, (0, self.groups)), self.members)


def gather(value: jax.Array, sync: Sync) -> jax.Array:
    """The values of all members, stacked along a new first axis; the same for each member, as far as JAX can tell."""
    manual = tuple(name for name in sync.names if name in jax.sharding.get_abstract_mesh().manual_axes)
    value = vary(value, manual)
    _check_mappings(sync, value)
    if sync.groups is not None:
        (name,) = sync.names
        if manual:
            return lax.all_gather(value, name, axis_index_groups=sync.groups)
        # vmap has no grouped gather: take everything, then the group's rows
        return lax.all_gather(value, name)[_peers(sync.groups)[lax.axis_index(name)]]
    every = value
    if manual:
        # unchecked, JAX knows of nothing that varies, and the transpose of an "invarying" gather would be wrong
        checked = not varying(value).isdisjoint(manual)
        every = lax.all_gather(value, manual, to="invarying" if checked else "varying")
    for name in sync.names:
        if name not in manual:  # vmap gathers one axis at a time
            every = lax.all_gather(every, name)
    return every.reshape(-1, *value.shape)


def add_across(values: tuple[jax.Array, ...], sync: Sync) -> tuple[jax.Array, ...]:
    """Each value summed over all members, in one collective."""
    if not sync.names and not sync.dims:
        return values
    stacked = jnp.stack(values)
    for position, groups in sync.dims:
        axis, size = position + 1, stacked.shape[position + 1]
        stacked = to_members(jnp.sum(members_along(stacked, axis, groups), axis=0), axis, groups, size)
    if sync.groups is not None:
        stacked = jnp.sum(gather(stacked, sync), axis=0)
    elif sync.names:
        flat = tuple(n for name in sync.names for n in (name if isinstance(name, tuple) else (name,)))
        manual = jax.sharding.get_abstract_mesh().manual_axes
        stacked = vary(stacked, [name for name in flat if name in manual])
        _check_mappings(sync, stacked)
        stacked = lax.psum(stacked, flat)
    return tuple(stacked)


def _check_mappings(sync: Sync, value: jax.Array) -> None:
    """Raises where JAX has no collective: over a vmapped axis, under the checks of `shard_map`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    vmapped = [name for name in sync.names if not isinstance(name, tuple) and name not in manual]
    if vmapped and varying(value):
        raise ValueError(
            f"axis_name has {vmapped[0]!r}, which vmap binds, in a shard_map, whose checks know no collective over it: "
            "give shard_map(…, check_vma=False), or make that axis one of x's rows and leave the name out"
        )


def vary(value: jax.Array, names: Iterable[Any]) -> jax.Array:
    """Under `shard_map` with checks, a value that is equal on all devices along `names` marked as varying there."""
    missing = tuple(sorted(set(names) - varying(value)))
    return lax.pcast(value, missing, to="varying") if missing else value


def _peers(groups) -> jax.Array:
    """Row i: the members of the group that i is in."""
    table = {member: group for group in groups for member in group}
    return jnp.asarray([table[i] for i in range(len(table))])


def members_along(value: jax.Array, axis: int, groups: Groups) -> jax.Array:
    """What the members along `axis` hold, stacked along the first axis: of all, or behind it of each one's group."""
    rows = jnp.moveaxis(value, axis, 0)
    return rows if groups is None else jnp.moveaxis(rows[_peers(groups)], 1, 0)


def to_members(shared: jax.Array, axis: int, groups: Groups, size: int) -> jax.Array:
    """What members have in common, as each of the `size` along `axis` holds it: undoes `members_along`."""
    if groups is None:
        shared = jnp.broadcast_to(shared, (size, *shared.shape))
    return jnp.moveaxis(shared, 0, axis)


def splittable() -> bool:
    """Whether `jit` may split arrays by our rules here: not in `shard_map` or `pmap`, where shards are local."""
    return not (jax.sharding.get_abstract_mesh().manual_axes or bound(UNSPLIT))


def bound(name) -> bool:
    """Whether an axis of this name is mapped over here."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    except jax.errors.InconclusiveDimensionOperation:
        pass  # an axis of symbolic size
    return True
