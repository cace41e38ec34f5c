"""How a piece is split over the devices of a `jit`: each does its own rows, and sums of them meet in one collective.

Elementwise pieces of plain jax.numpy need nothing of the kind, XLA splits them by itself; kernels do.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jbn._op.plan import Plan, is_explicit, rows


def split(local: Callable, uneven: Callable, combine: Callable | None, plan: Plan, sharding) -> Callable:
    """A function of flat operands that computes `local` on each device, merged by `combine(x, out, names)`, if any.

    The first operand is x, of which `sharding` is the type's. Operands and outputs have its rank (1 where a mask is the
    same all along), or are vectors `(*batch, C)`. On one device it is `local` itself. Where the devices do not divide x
    evenly, `uneven`, which computes the same, takes its place.
    """

    def merged(function, names, *flat):
        out = function(*flat)
        return combine(flat[0], out, names) if combine and names else out

    if is_explicit(sharding):  # which has to be even
        return _by_type(partial(merged, local), local, plan, sharding)
    return _by_compiler(merged, local, uneven, plan, reduces=combine is not None)


def _by_type(merged: Callable, local: Callable, plan: Plan, sharding) -> Callable:
    """Over an explicit mesh: x's type says how it is split."""

    def run(*flat):
        shape = flat[0].shape
        unsplit = [jax.ShapeDtypeStruct(value.shape, value.dtype) for value in flat]
        found = [_spec(plan, sharding.spec, shape, o.shape) for o in jax.eval_shape(local, *unsplit)]
        given = [_spec(plan, sharding.spec, shape, value.shape) for value in flat]
        return jax.shard_map(
            partial(merged, _row_names(plan, sharding.spec)),
            mesh=sharding.mesh,
            in_specs=tuple(given),
            out_specs=found,
            check_vma=False,
        )(*(jax.reshard(v, NamedSharding(sharding.mesh, spec)) for v, spec in zip(flat, given, strict=True)))

    return run


def _by_compiler(merged: Callable, local: Callable, uneven: Callable, plan: Plan, reduces: bool) -> Callable:
    """Over an automatic mesh: the compiler decides how x is split, and asks."""

    def partition(mesh, operands, results):
        x = operands[0]
        asked = full(x.sharding.spec, len(x.shape))
        even = tuple(s if n % ways(mesh, s) == 0 else None for s, n in zip(asked, x.shape, strict=True))
        # a device's part of an uneven axis is padded, and padding must not be counted: gather that axis instead
        spec = even if reduces else asked
        given = tuple(NamedSharding(mesh, _spec(plan, spec, x.shape, o.shape)) for o in operands)
        found = [NamedSharding(mesh, _spec(plan, spec, x.shape, r.shape)) for r in results]
        function = local if even == asked else uneven
        return mesh, partial(merged, function, _row_names(plan, spec)), found, given

    def rule(_, operands, results):
        """Operands and results in einsum-like notation, by which shardings propagate."""
        shape = operands[0].shape
        factors = [f"d{a}" for a in range(len(shape))]
        vector = [*factors[: plan.batch], factors[plan.channel]]

        def factors_of(index, own):
            alike = factors if len(own) == len(shape) else vector
            return " ".join(f if n == shape[int(f[1:])] else f"o{index}{f}" for f, n in zip(alike, own, strict=True))

        left = ", ".join(factors_of(i, o.shape) for i, o in enumerate(operands))
        right = ", ".join(factors_of("r", r.shape) for r in results)
        # rows that a result has, as z̄ beside its sums, are no reduction to the compiler
        kept = right.replace(",", "").split()
        summed = tuple(factors[a] for a in rows(plan, len(shape)) if reduces and factors[a] not in kept)
        return (f"{left} -> {right}", {"reduction_factors": summed}) if summed else f"{left} -> {right}"

    op = custom_partitioning(lambda *flat: local(*flat))
    op.def_partition(partition, sharding_rule=rule)
    return op


def _row_names(plan: Plan, spec) -> tuple[str, ...]:
    return tuple(name for a in rows(plan, len(spec)) for name in axes_of(spec[a]))


def beside(vector: jax.Array, x: jax.Array, channel: int) -> jax.Array:
    """A vector over the channels of x; over an explicit mesh resharded where what splits it splits x in another way."""
    split, spec = jax.typeof(vector).sharding, full(jax.typeof(x).sharding.spec, x.ndim)
    used = {name for entry in spec for name in axes_of(entry)}
    given, wanted = split.spec[0], spec[channel]
    if given in (None, wanted) or (wanted is None and used.isdisjoint(axes_of(given))):
        return vector
    return jax.reshard(vector, NamedSharding(split.mesh, P(wanted)))


def like(value: jax.Array | None, x: jax.Array) -> jax.Array | None:
    """A mask or a residual; over an explicit mesh it is resharded as x is, along the axes that it varies along."""
    sharding = jax.typeof(x).sharding
    if value is None or not is_explicit(sharding):
        return value
    own = _along(full(sharding.spec, x.ndim), x.shape, value.shape)
    return jax.reshard(value, NamedSharding(sharding.mesh, own))


def full(spec, ndim: int) -> tuple:
    """A spec with an entry for each axis."""
    return (*spec, *(None,) * (ndim - len(spec)))


def axes_of(entry) -> tuple[str, ...]:
    """The mesh axes that one entry of a spec splits over."""
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def ways(mesh, entry) -> int:
    """How many parts an axis is split into."""
    return math.prod(mesh.shape[name] for name in axes_of(entry))


def _vector_spec(plan: Plan, spec) -> P:
    return P(*spec[: plan.batch], spec[plan.channel])


def _spec(plan: Plan, spec, shape, own) -> P:
    alike = spec if len(own) == len(shape) else _vector_spec(plan, spec)
    full = shape if len(own) == len(shape) else (*shape[: plan.batch], shape[plan.channel])
    return _along(alike, full, own)


def _along(spec, shape, own) -> P:
    """The part of a spec for `shape` that is for `own`, which has its rank, and 1 where it is the same all along."""
    return P(*(s if have == want else None for s, have, want in zip(spec, own, shape, strict=True)))
