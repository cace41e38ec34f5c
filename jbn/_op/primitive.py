"""A JAX primitive from a plain function: what each transformation means is derived from the function itself."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax._src.custom_partitioning import _sharding_callbacks
from jax._src.dispatch import apply_primitive, prim_requires_devices_during_lowering
from jax.extend.core import Primitive
from jax.extend.mlir import ir
from jax.interpreters import ad, batching, mlir

from jbn._op import dispatch
from jbn._op.gpu import GPUS, INSTALL, gpu
from jbn._op.partition import is_typed, split
from jbn._op.plan import is_symbolic
from jbn._op.rule_name import identity
from jbn._op.sync import vary


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

    def run(*flat, tree, plan, function=reference):
        return jax.tree.leaves(function(plan, *jax.tree.unflatten(tree, flat)))

    def type_rule(*avals, **params):
        closed = jax.make_jaxpr(functools.partial(run, **params))(*avals)
        return closed.out_avals, closed.effects

    def jvp(primals, tangents, **params):
        moving = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

        def along(*moved):
            operands = list(primals)
            for i, value in zip(moving, moved, strict=True):
                operands[i] = value
            return run(*operands, **params, function=derivative or reference)

        _, out = jax.jvp(along, [primals[i] for i in moving], [tangents[i] for i in moving])
        return prim.bind(*primals, **params), out

    def batching_rule(axis_data, flat, dims, *, tree, plan):
        if all(d is None for d in dims) and axis_data.name not in plan.sync.names:
            out = prim.bind(*flat, tree=tree, plan=plan)
            return out, [None] * len(out)
        flat = [_to_front(v, d, axis_data.size) for v, d in zip(flat, dims, strict=True)]
        out = prim.bind(*flat, tree=tree, plan=plan.batched(axis_data.name))
        if shared and axis_data.name in plan.sync.names and plan.sync.groups is None:
            return [value[0] for value in out], [None] * len(out)
        return out, [0] * len(out)

    def lowering(ctx, *values, tree, plan, function=reference, uneven=None, basis=None):
        local = functools.partial(run, tree=tree, plan=plan, function=function)
        if not ((combine or function is not reference) and _splits(ctx, plan)):
            return mlir.lower_fun(local, multiple_results=True)(ctx, *values)
        merge = functools.partial(combine, plan) if combine else None
        padded = functools.partial(local, function=uneven) if uneven else local
        local = split(local, padded, merge, plan, ctx.avals_in[0].sharding)
        out = mlir.lower_fun(local, multiple_results=True)(ctx, *values)
        unmeasured = plan._replace(options=None)  # of these `basis` has what matters
        _name_rule(ctx, out, name, function.__module__, function.__qualname__, unmeasured, tree, basis)
        return out

    def gpu_lowering(platform, ctx, *values, tree, plan):
        operands = jax.tree.unflatten(tree, ctx.avals_in)
        x, by_default = operands[0], plan.implementation is None
        if plan.implementation == "xla" or (by_default and not _divides(ctx, plan)):
            return lowering(ctx, *values, tree=tree, plan=plan)
        watch = dispatch.watch.get() if by_default else None
        if watch is not None and _asks(ctx, plan):
            noting, basis = watch.noting(name, reference), watch.name
            return lowering(ctx, *values, tree=tree, plan=plan, function=noting, uneven=reference, basis=basis)
        if watch is not None:
            watch.note(name, plan, _own_part(x))
            return lowering(ctx, *values, tree=tree, plan=plan)
        measured = dispatch.Measured.on(gpu(platform).kind)  # at this moment, also where the compiler asks later

        def chosen(plan, *operands):
            # by what these are: inside a split, a device's part
            choice = dispatch.choose(name, plan, platform, *operands, measured=measured)
            triton = choice.implementation == "triton"
            return (dispatch.kernels(name, platform) if triton else reference)(plan, *operands)

        if plan.implementation == "triton":
            dispatch.choose(name, plan, platform, *operands)  # raises here, not while the compiler splits
        elif not dispatch.may_use_kernels(name, plan, x, measured):
            return lowering(ctx, *values, tree=tree, plan=plan)
        uneven, basis = reference if by_default else chosen, dispatch.basis(name, plan, platform, x, measured)
        return lowering(ctx, *values, tree=tree, plan=plan, function=chosen, uneven=uneven, basis=basis)

    def other_lowering(ctx, *values, tree, plan, function=reference):
        if kernel and plan.implementation == "triton":
            platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
            raise NotImplementedError(
                f"implementation='triton' needs a CUDA or ROCm GPU, and this is compiled for {platforms}: use "
                f"implementation='xla', or None, which works on every device; for a GPU, {INSTALL}"
            )
        return lowering(ctx, *values, tree=tree, plan=plan, function=function)

    def cpu_lowering(ctx, *values, tree, plan):
        # it cuts x, at known places, which XLA would move between devices that it splits x over by itself
        function = cpu if _splits(ctx, plan) and not is_symbolic(ctx.avals_in[0].shape) else reference
        return other_lowering(ctx, *values, tree=tree, plan=plan, function=function)

    prim.def_impl(functools.partial(apply_primitive, prim))
    prim.def_effectful_abstract_eval(type_rule)
    ad.primitive_jvps[prim] = jvp
    if transpose:
        ad.primitive_transposes[prim] = transpose
    batching.fancy_primitive_batchers[prim] = batching_rule
    mlir.register_lowering(prim, other_lowering)
    if cpu:
        mlir.register_lowering(prim, cpu_lowering, platform="cpu")
    if kernel:
        for platform in GPUS:
            mlir.register_lowering(prim, functools.partial(gpu_lowering, platform), platform=platform)
        prim_requires_devices_during_lowering.add(prim)  # as custom_partitioning does, which is inside

    def bind(plan, *operands):
        flat, tree = jax.tree.flatten(operands)
        return prim.bind(*_vary_alike(flat), tree=tree, plan=plan)

    return bind


def _splits(ctx, plan) -> bool:
    """Whether each device gets its own part of x by rules of ours.

    Over an automatic mesh they call back into this process, which exported code cannot: there XLA splits by itself.
    """
    return plan.sharded and (is_typed(ctx.avals_in[0].sharding) or not _exported(ctx))


def _divides(ctx, plan) -> bool:
    """Whether x is one device's own, or cut by rules of ours: by itself XLA would gather it for a kernel.

    What is exported may run on any number of devices, and on another GPU than kernels are compiled for.
    """
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        own = context.manual_axes >= set(context.mesh.axis_names)
    else:
        own = getattr(context, "num_devices", 1) == 1
    return (own or _splits(ctx, plan)) and not _exported(ctx)


def _asks(ctx, plan) -> bool:
    """Whether it is the compiler that says what of x a device has."""
    devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
    return devices > 1 and _splits(ctx, plan) and not is_typed(ctx.avals_in[0].sharding)


def _own_part(x) -> jax.ShapeDtypeStruct:
    """What of x a device has where an explicit mesh splits it."""
    return jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape) if is_typed(x.sharding) else x.shape, x.dtype)


def _exported(ctx) -> bool:
    return ctx.module_context.lowering_parameters.for_export


def _name_rule(ctx, out: Sequence[ir.Value], *parts) -> None:
    """Names the rule, which the compiler asks how to split, by what it depends on.

    JAX names it by an address, so that no process would find in its compilation cache what another left there. The name
    stands twice in the program, since a setting of JAX's takes the first out of what the cache goes by.
    """
    call: Any = out[0].owner
    if call.name != "stablehlo.custom_call" or call.attributes["call_target_name"].value != "CustomSPMDPartitioning":
        return  # on one device, or explicitly split, there is no rule
    rule = _sharding_callbacks[call.attributes["backend_config"].value.encode()]
    name = identity(*parts, tuple(rule.mesh.shape.items()), rule.module_context.platforms)
    call.attributes["backend_config"] = ir.StringAttr.get(name)
    call.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get({"jbn_rule": ir.StringAttr.get(name)})
    # one of several that are alike answers for all, and lives as long as any program that may ask it
    ctx.module_context.add_keepalive(_sharding_callbacks.setdefault(name.encode(), rule))


def _to_front(value: jax.Array, dim: int | None, size: int) -> jax.Array:
    if dim is not None:
        return jax.numpy.moveaxis(value, dim, 0)
    # a mask keeps its own size; everything else is one value per batch
    return value[None] if value.dtype == bool else jax.numpy.broadcast_to(value, (size, *value.shape))


def _vary_alike(flat: Sequence[jax.Array]) -> list[jax.Array]:
    """Under `shard_map` with checks, operands that are equal on all devices are marked as varying like the rest."""
    union = frozenset().union(*(jax.typeof(v).mat.varying for v in flat))
    return [vary(v, union) for v in flat]
