"""Sums and gathers over the axes that share one batch: mapped axes by name, or vmapped ones by position."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Groups = tuple[tuple[int, ...], ...] | None


class Sync(NamedTuple):
    """Who shares the statistics: axes bound by a mapping, then leading axes that a vmap made of such a name."""

    names: tuple[str, ...] = ()
    groups: Groups = None  # index groups within the one name
    dims: tuple[tuple[int, Groups], ...] = ()  # position of a leading axis, and its groups

    def size(self) -> int:
        """How many members share, where no name has become a position."""
        if self.groups is not None:
            return len(self.groups[0])
        return int(lax.axis_size(self.names)) if self.names else 1

    def batched(self, name) -> "Sync":
        """The same sharing once a vmap has put one more axis in front, which may bind one of the names."""
        dims = tuple((position + 1, groups) for position, groups in self.dims)
        if name not in self.names:
            return self._replace(dims=dims)
        names = tuple(n for n in self.names if n != name)
        return Sync(names, None, (*dims, (0, self.groups)))


def gather(value: jax.Array, sync: Sync) -> jax.Array:
    """The values of all members, stacked along a new first axis."""
    if sync.groups is None:
        return lax.all_gather(value, sync.names, to="invarying")
    (name,) = sync.names
    if name in jax.sharding.get_abstract_mesh().manual_axes:
        return lax.all_gather(value, name, axis_index_groups=sync.groups)
    # vmap has no grouped gather: take everything, then the group's rows
    return lax.all_gather(value, name)[_peers(sync.groups)[lax.axis_index(name)]]


def add_across(values: tuple[jax.Array, ...], sync: Sync) -> tuple[jax.Array, ...]:
    """Each value summed over all members, in one collective."""
    if not sync.names and not sync.dims:
        return values
    stacked = jnp.stack(values)
    for position, groups in sync.dims:
        stacked = _add_along(stacked, position + 1, groups)
    if sync.groups is not None:
        stacked = jnp.sum(gather(stacked, sync), axis=0)
    elif sync.names:
        stacked = lax.psum(stacked, sync.names)
    return tuple(stacked)


def _peers(groups) -> jax.Array:
    """Row i: the members of the group that i is in."""
    table = {member: group for group in groups for member in group}
    return jnp.asarray([table[i] for i in range(len(table))])


def _add_along(value, axis, groups):
    if groups is None:
        return jnp.broadcast_to(jnp.sum(value, axis, keepdims=True), value.shape)
    peers = _peers(groups)
    rows = jnp.moveaxis(value, axis, 0)
    return jnp.moveaxis(jnp.sum(rows[peers], axis=1), 0, axis)
