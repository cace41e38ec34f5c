"""What is private in JAX and Flax, or in all but name, and of use here: a new release of theirs breaks this file alone.

One function each, with what it is for; `tests/repo/test_imports.py` sees to it that nothing else goes there.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax._src.custom_partitioning import _sharding_callbacks
from jax._src.dispatch import apply_primitive, prim_requires_devices_during_lowering
from jax._src.mesh import thread_resources
from jax.extend.core import Jaxpr, JaxprEqn, Primitive
from jax.extend.mlir import ir
from jax.interpreters import batching

Method = TypeVar("Method", bound=Callable)


def run_eagerly(prim: Primitive) -> None:
    """Lets a primitive be called outside `jit`: it is then compiled by itself."""
    prim.def_impl(functools.partial(apply_primitive, prim))


def batch_by_name(prim: Primitive, rule: Callable) -> None:
    """Registers `rule(name, size, operands, dims, **params)`; JAX's public batchers are not told the axis' name."""

    def batcher(axis, operands, dims, **params):
        return rule(axis.name, axis.size, operands, dims, **params)

    batching.fancy_primitive_batchers[prim] = batcher


def lower_with_devices(prim: Primitive) -> None:
    """Has a primitive lowered once its devices are known, as `custom_partitioning`, which is inside, needs it."""
    prim_requires_devices_during_lowering.add(prim)


def platforms(ctx: Any) -> Sequence[str]:
    """What a lowering is for: one platform or, of an export, several."""
    return ctx.platforms or ctx.module_context.platforms


def is_exported(ctx: Any) -> bool:
    """Whether what is lowered leaves this process (`jax.export`), where nothing can be called back."""
    return ctx.module_context.lowering_parameters.for_export


def is_own(ctx: Any) -> bool:
    """Whether the arrays of what is lowered are one device's own: on a single device, or inside `shard_map`."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return context.manual_axes >= set(context.mesh.axis_names)
    return device_count(ctx) == 1


def device_count(ctx: Any) -> int:
    """For how many devices a program is lowered; 1 inside `shard_map`, whose parts are each one device's."""
    return getattr(ctx.module_context.axis_context, "num_devices", 1)


def lacks_mesh(ctx: Any) -> bool:
    """Whether a program for several devices names no mesh: inside `jax.set_mesh`, when no argument lies on the mesh."""
    context = ctx.module_context.axis_context
    named = hasattr(context, "manual_axes") or getattr(context, "abstract_mesh", None) is not None
    return device_count(ctx) > 1 and not named and thread_resources.env.physical_mesh.empty


def name_partitioning(ctx: Any, out: Sequence[ir.Value], name: Callable[[dict[str, int], Sequence[str]], str]) -> None:
    """Names the rule for splitting `out`'s operation over devices: `name(sizes of the mesh's axes, platforms)`.

    JAX names it by an address, so that no process would find in its compilation cache what another left there. The name
    stands twice in the program, since a setting of JAX's takes the first out of what the cache goes by.
    """
    call: Any = out[0].owner
    if call.name != "stablehlo.custom_call" or call.attributes["call_target_name"].value != "CustomSPMDPartitioning":
        return  # on one device, or explicitly split, there is no rule
    rule = _sharding_callbacks[call.attributes["backend_config"].value.encode()]
    new = name(dict(rule.mesh.shape), rule.module_context.platforms)
    call.attributes["backend_config"] = ir.StringAttr.get(new)
    call.attributes["mhlo.frontend_attributes"] = ir.DictAttr.get({"jbn_rule": ir.StringAttr.get(new)})
    # one of several that are alike answers for all, and lives as long as any program that may ask it
    ctx.module_context.add_keepalive(_sharding_callbacks.setdefault(new.encode(), rule))


def varying(value: Any) -> frozenset:
    """The mesh axes over which a value differs between devices, as `shard_map` with checks tracks it; else none."""
    return jax.typeof(value).mat.varying


def scope_of(eqn: JaxprEqn) -> str:
    """The `jax.named_scope`s that an equation was traced in, by which a call of a layer is told from others."""
    return str(eqn.source_info.name_stack)


def checkpoint_name_of(eqn: JaxprEqn) -> str | None:
    """What an equation was called by `jax.ad_checkpoint.checkpoint_name`, whose names mark values here."""
    return str(eqn.params["name"]) if eqn.primitive.name == "name" else None


def handed_in(eqn: JaxprEqn, inner: Jaxpr, taken: list) -> list:
    """What of an equation's arguments a jaxpr inside it takes, by which values are followed into control flow."""
    if eqn.primitive.name == "cond":  # its branches lack the index
        return taken[1:]
    if eqn.primitive.name != "while":
        return taken
    test, body = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    if inner is eqn.params["cond_jaxpr"].jaxpr:
        return [*taken[:test], *taken[test + body :]]
    return taken[test:]


def without_wrappers(method: Method) -> Method:
    """A method of a linen module below Flax's wrapper: called inside another, it is captured and tabulated once."""
    return inspect.unwrap(method)  # type: ignore[return-value]
