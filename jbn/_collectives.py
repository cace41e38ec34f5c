"""Sums and gathers over the axes that share one batch: mapped axes by name, or vmapped ones by position."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

Groups = tuple[tuple[int, ...], ...] | None


class Sync(NamedTuple):
    """Who shares the statistics: axes bound by a mapping, then leading axes that a vmap made of such a name."""

    names: tuple[str | tuple[str, ...], ...] = ()  # what lies in an inner tuple is one axis to a collective
    groups: Groups = None  # index groups within the one name
    dims: tuple[tuple[int, Groups], ...] = ()  # position of a leading axis, and its groups

    def size(self) -> int:
        """How many members share, before a vmap has turned a name into a position."""
        return len(self.groups[0]) if self.groups else math.prod(lax.axis_size(name) for name in self.names)

    def batched(self, name) -> "Sync":
        """The same sharing once a vmap has put one more axis in front, which may bind one of the names."""
        dims = tuple((position + 1, groups) for position, groups in self.dims)
        if name not in self.names:
            return self._replace(dims=dims)
        names = tuple(n for n in self.names if n != name)
        return Sync(names, None, (*dims, (0, self.groups)))


def gather(value: jax.Array, sync: Sync) -> jax.Array:
    """The values of all members, stacked along a new first axis; the same for each member, as far as JAX can tell."""
    manual = tuple(name for name in sync.names if name in jax.sharding.get_abstract_mesh().manual_axes)
    if sync.groups is not None:
        (name,) = sync.names
        if manual:
            return lax.all_gather(value, name, axis_index_groups=sync.groups)
        # vmap has no grouped gather: take everything, then the group's rows
        return lax.all_gather(value, name)[_peers(sync.groups)[lax.axis_index(name)]]
    every = value
    if manual:
        # unchecked, JAX knows of nothing that varies, and the transpose of an "invarying" gather would be wrong
        checked = not jax.typeof(value).mat.varying.isdisjoint(manual)
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
        stacked = _add_along(stacked, position + 1, groups)
    if sync.groups is not None:
        stacked = jnp.sum(gather(stacked, sync), axis=0)
    elif sync.names:
        flat = (n for name in sync.names for n in (name if isinstance(name, tuple) else (name,)))
        stacked = lax.psum(stacked, tuple(flat))
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
