"""A JAX primitive from a plain function: what each transformation means is derived from the function itself."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, mlir

from jbn._op import dispatch
from jbn._op.gpu import GPUS, INSTALL, gpu
from jbn._op.jax_internals import (
    batch_by_name,
    device_count,
    is_exported,
    is_own,
    lacks_mesh,
    lower_with_devices,
    name_partitioning,
    platforms,
    run_eagerly,
    varying,
)
from jbn._op.partition import split
from jbn._op.plan import Plan, is_explicit, is_symbolic
from jbn._op.rule_name import identity
from jbn._op.sync import vary


class _Definition(NamedTuple):
    """What a primitive is made of: the arguments of `primitive`."""

    name: str
    reference: Callable
    derivative: Callable
    combine: Callable | None
    cpu: Callable
    kernel: bool
    shared: bool


def primitive(
    name: str,
    reference: Callable,
    *,
    derivative: Callable | None = None,
    combine: Callable | None = None,
    cpu: Callable | None = None,
    kernel: bool = False,
    transpose: Callable | None = None,
    shared: bool = False,
) -> Callable:
    """Makes the primitive `jbn_<name>` whose value is `reference(plan, *operands)`.

    `reference` is written in jax.numpy over pytrees of arrays. It is the primitive's type rule (shapes, dtypes,
    shardings and varying axes follow from tracing it), its lowering, and what is differentiated, unless that is
    another function, `derivative`, equal to it wherever a derivative is to be had. Where it reduces over rows,
    `combine(plan, x, out, names)` merges what devices found of their own rows, over mesh axes `names`. `cpu` takes its
    place on a CPU where a device has its own part of x. With `kernel`, `triton` has a function of its name, that
    takes its place on a GPU where `dispatch` says so. `transpose` is the rule of one that is linear in some operands:
    `(cotangents, *flat, tree, plan)`, as jax asks for it. With `shared` the outputs are the same for all who share
    statistics, so that a vmap which names them leaves it unmapped.

    Returns:
      `bind(plan, *operands)`, which calls it on pytrees (None where an operand is absent) and returns the list of its
      outputs.
    """
    prim = Primitive(f"jbn_{name}")
    prim.multiple_results = True
    made = _Definition(name, reference, derivative or reference, combine, cpu or reference, kernel, shared)
    run_eagerly(prim)
    prim.def_effectful_abstract_eval(partial(_type_rule, made))
    ad.primitive_jvps[prim] = partial(_jvp, prim, made)
    if transpose:
        ad.primitive_transposes[prim] = transpose
    batch_by_name(prim, partial(_batch, prim, made))
    mlir.register_lowering(prim, partial(_lower, made))
    if cpu:
        mlir.register_lowering(prim, partial(_lower_for_cpu, made), platform="cpu")
    if kernel:
        for platform in GPUS:
            mlir.register_lowering(prim, partial(_lower_for_gpu, made, platform), platform=platform)
        lower_with_devices(prim)

    def bind(plan, *operands):
        flat, tree = jax.tree.flatten(operands)
        return prim.bind(*_vary_alike(flat), tree=tree, plan=plan)

    return bind


def _run(function: Callable, *flat, tree, plan: Plan) -> list[Any]:
    """`function(plan, *operands)`, flat."""
    return jax.tree.leaves(function(plan, *jax.tree.unflatten(tree, flat)))


@cache
def _shared(function: Callable) -> Any:
    """`_run` of a function that lasts: traced once for operands of a kind, lowered once in a program that calls it."""

    def run(*flat, tree, plan):
        return _run(function, *flat, tree=tree, plan=plan)

    run.__name__ = run.__qualname__ = f"bn_{function.__name__.lstrip('_')}"
    return jax.jit(run, static_argnames=("tree", "plan"))


def _type_rule(made: _Definition, *avals, **params):
    closed = _shared(made.reference).trace(*avals, **params).jaxpr
    return closed.out_avals, closed.effects


def _jvp(prim: Primitive, made: _Definition, primals, tangents, **params):
    moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def along(*moved):
        operands = list(primals)
        for i, value in zip(moving, moved, strict=True):
            operands[i] = value
        return _run(made.derivative, *operands, **params)

    _, out = jax.jvp(along, [primals[i] for i in moving], [tangents[i] for i in moving])
    return prim.bind(*primals, **params), out


def _batch(prim: Primitive, made: _Definition, name, size: int, flat, dims, *, tree, plan: Plan):
    if all(d is None for d in dims) and name not in plan.sync.names:
        out = prim.bind(*flat, tree=tree, plan=plan)
        return out, [None] * len(out)
    flat = [_to_front(v, d, size) for v, d in zip(flat, dims, strict=True)]
    # `spmd_axis_name` of a mesh axis: what is batched varies over it
    out = prim.bind(*_vary_alike(flat), tree=tree, plan=plan.batched(name))
    if made.shared and name in plan.sync.names and plan.sync.groups is None:
        return [value[0] for value in out], [None] * len(out)
    return out, [0] * len(out)


def _lower(made: _Definition, ctx, *values, tree, plan: Plan):
    """For any platform but a GPU."""
    if made.kernel and plan.implementation == "triton":
        raise NotImplementedError(
            f"implementation='triton' needs a CUDA or ROCm GPU, and this is compiled for {', '.join(platforms(ctx))}: "
            f"use implementation='xla', or None, which works on every device; for a GPU, {INSTALL}"
        )
    return _lower_as(made, made.reference, ctx, values, tree, plan)


def _lower_for_cpu(made: _Definition, ctx, *values, tree, plan: Plan):
    # it cuts x, at known places, which XLA would move between devices that it splits x over by itself
    if plan.implementation == "triton" or not _splits(ctx, plan) or is_symbolic(ctx.avals_in[0].shape):
        return _lower(made, ctx, *values, tree=tree, plan=plan)
    return _lower_as(made, made.cpu, ctx, values, tree, plan)


def _lower_for_gpu(made: _Definition, platform: str, ctx, *values, tree, plan: Plan):
    operands = jax.tree.unflatten(tree, ctx.avals_in)
    x, by_default = operands[0], plan.implementation is None
    lower_as = partial(_lower_as, made, ctx=ctx, values=values, tree=tree, plan=plan)
    if plan.implementation == "xla" or (by_default and not _divides(ctx, plan)):
        return lower_as(made.reference)
    watch = dispatch.watch.get() if by_default else None
    if watch is not None and _asks(ctx, plan):
        return lower_as(watch.noting(made.name, made.reference), uneven=made.reference, basis=watch.name)
    if watch is not None:
        watch.note(made.name, plan, _own_part(x))
        return lower_as(made.reference)
    measured = dispatch.Measured.on(gpu(platform).kind)  # at this moment, also where the compiler asks later

    def chosen(plan, *operands):
        # by what these are: inside a split, a device's part
        choice = dispatch.choose(made.name, plan, platform, *operands, measured=measured)
        triton = choice.implementation == "triton"
        return (dispatch.kernels(made.name, platform) if triton else made.reference)(plan, *operands)

    if plan.implementation == "triton":
        dispatch.choose(made.name, plan, platform, *operands)  # raises here, not while the compiler splits
    elif not dispatch.may_use_kernels(made.name, plan, x, measured):
        return lower_as(made.reference)
    uneven, basis = made.reference if by_default else chosen, dispatch.basis(made.name, plan, platform, x, measured)
    return lower_as(chosen, uneven=uneven, basis=basis)


def _lower_as(
    made: _Definition,
    function: Callable,
    ctx,
    values,
    tree,
    plan: Plan,
    uneven: Callable | None = None,
    basis: Any = None,
):
    """Lowers `function`, split over devices by rules of ours if need be; `uneven` where they do not divide x evenly.

    `basis` is what the function goes by besides its operands.
    """
    lasts = function in (made.reference, made.cpu)  # what is made for this call alone is nothing to keep
    local = partial(_shared(function) if lasts else partial(_run, function), tree=tree, plan=plan)
    alone = is_own(ctx) and not is_explicit(ctx.avals_in[0].sharding)
    if alone or not ((made.combine or function is not made.reference) and _splits(ctx, plan)):
        return mlir.lower_fun(local, multiple_results=True)(ctx, *values)
    merge = partial(made.combine, plan) if made.combine else None
    padded = partial(_run, uneven or function, tree=tree, plan=plan)
    local = split(local, padded, merge, plan, ctx.avals_in[0].sharding)
    out = mlir.lower_fun(local, multiple_results=True)(ctx, *values)
    unmeasured = plan._replace(options=None)  # of these `basis` has what matters
    parts = (made.name, function.__module__, function.__qualname__, unmeasured, tree, basis)
    name_partitioning(ctx, out, lambda mesh, compiled_for: identity(*parts, mesh, compiled_for))
    return out


def _splits(ctx, plan) -> bool:
    """Whether each device gets its own part of x by rules of ours.

    Over an automatic mesh they call back into this process, which exported code cannot: there XLA splits by itself. So
    it does where the program has no mesh, by whose axes alone rules can split, and inside an explicit one, where JAX
    (0.11 and later) cannot lower what a rule gives back.
    """
    by_compiler = not (is_exported(ctx) or lacks_mesh(ctx) or jax.sharding.get_abstract_mesh().explicit_axes)
    return plan.may_partition and (is_explicit(ctx.avals_in[0].sharding) or by_compiler)


def _divides(ctx, plan) -> bool:
    """Whether x is one device's own, or cut by rules of ours: by itself XLA would gather it for a kernel.

    What is exported may run on any number of devices, and on another GPU than kernels are compiled for.
    """
    return (is_own(ctx) or _splits(ctx, plan)) and not is_exported(ctx)


def _asks(ctx, plan) -> bool:
    """Whether it is the compiler that says what of x a device has."""
    return device_count(ctx) > 1 and _splits(ctx, plan) and not is_explicit(ctx.avals_in[0].sharding)


def _own_part(x) -> jax.ShapeDtypeStruct:
    """What of x a device has where an explicit mesh splits it."""
    return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape) if is_explicit(x.sharding) else x.shape, x.dtype)


def _to_front(value: jax.Array, dim: int | None, size: int) -> jax.Array:
    if dim is not None:
        return jax.numpy.moveaxis(value, dim, 0)
    # a mask keeps its own size; everything else is one value per batch
    return value[None] if value.dtype == bool else jax.numpy.broadcast_to(value, (size, *value.shape))


def _vary_alike(flat: Sequence[jax.Array]) -> list[jax.Array]:
    """Under `shard_map` with checks, operands that are equal on all devices are marked as varying like the rest."""
    union = frozenset().union(*map(varying, flat))
    return [vary(v, union) for v in flat]
