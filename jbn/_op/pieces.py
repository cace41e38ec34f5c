"""The pieces of the op as primitives: moments, apply, the tangent map, and the two halves of its transpose."""

import jax
from jax.interpreters import ad
from jax.sharding import NamedSharding

from jbn._op import xla, xla_cpu
from jbn._op.merging import Statistics, merge_across
from jbn._op.plan import Plan, known_count
from jbn._op.primitive import primitive
from jbn._op.sync import Sync, add_across


def _merge_devices(plan: Plan, x, out, names):
    static = len(out) == 2
    own = Statistics(known_count(plan, x, out[-1]) if static else out[0], *out[-2:])
    seen = merge_across(own, Sync.over((names,)))
    return list(seen[1:] if static else seen)


def _add_devices(_plan: Plan, _x, out, names):
    return [*add_across(tuple(out[:2]), Sync.over((names,))), *out[2:]]


def _merge_members(plan: Plan, count, mean, var):
    seen = merge_across(Statistics(plan.count if count is None else count, mean, var), plan.sync)
    return seen[1:] if count is None else seen


def _tangent_transpose(cotangents, *flat, tree, plan):
    """The backward pass. The map in ẋ is self-adjoint up to the mask, so sums and x̄ are all there is to it."""
    x, coef, residual, mask, moved = tree.unflatten(flat)
    (dy,) = cotangents
    wanted = [m is not None and ad.is_undefined_primal(m) for m in moved]
    dx = dscale = dbias = dresidual = kept = None
    if type(dy) is not ad.Zero:
        sums = ()
        if wanted[1] or wanted[2] or ((wanted[0] or wanted[3]) and plan.centred):
            if residual is not None and plan.activation and plan.implementation != "xla":
                # z̄ is the residual's cotangent, and of ȳ, residual and activation all that x̄ needs: kernels keep it;
                # for XLA, which is chosen later if at all, it is dead code, as that computes it anew for nothing
                *sums, kept = gradient_sums_keeping(plan, x, coef, residual, mask, dy)
            else:
                sums = gradient_sums(plan, x, coef, residual, mask, dy)
            dbias, dscale = sums
        if wanted[0] or (wanted[3] and kept is None):
            sums = add_across(tuple(sums), plan.sync)
            dx, *rest = gradient_input(plan, x, coef, residual, mask, dy, sums, kept)
            dresidual = rest[0] if rest else None
        else:
            dresidual = kept
    found = zip((dx, dscale, dbias, dresidual), moved, wanted, strict=True)
    linear = [_typed(value, m) if want else None for value, m, want in found if m is not None]
    # one entry per operand: None for those the map is not linear in
    return [None] * (len(flat) - len(linear)) + linear


def _typed(cotangent, operand):
    """The cotangent sharded as its operand's type says; over an explicit mesh a replicated scale needs that."""
    if cotangent is None:
        return None
    found, wanted = jax.typeof(cotangent).sharding, operand.aval.sharding.spec
    return cotangent if found.spec == wanted else jax.reshard(cotangent, NamedSharding(found.mesh, wanted))


moments = primitive("moments", xla.moments, combine=_merge_devices, cpu=xla_cpu.moments, kernel=True)
apply = primitive("apply", xla.apply, derivative=xla.apply_masked, kernel=True)
gradient_sums = primitive(
    "gradient_sums", xla.gradient_sums, combine=_add_devices, cpu=xla_cpu.gradient_sums, kernel=True
)
gradient_sums_keeping = primitive(
    "gradient_sums_keeping",
    xla.gradient_sums_keeping,
    combine=_add_devices,
    cpu=xla_cpu.gradient_sums_keeping,
    kernel=True,
)
gradient_input = primitive("gradient_input", xla.gradient_input, kernel=True)
tangent = primitive("tangent", xla.tangent, transpose=_tangent_transpose)
_merge = primitive("merge", _merge_members, shared=True)


def local_moments(plan: Plan, x, mask) -> Statistics:
    """Statistics of this member's rows, `(*batch, C)`; the count is an integer unless mask or shape make it data."""
    seen = moments(plan, x, mask)
    return Statistics(known_count(plan, x, seen[-1]), *seen) if mask is None else Statistics(*seen)


def synchronise(plan: Plan, own: Statistics) -> Statistics:
    """Statistics of the rows of all that share, each with `own`.

    A primitive, though no kernel: a derivative under vmap may be traced where the axis that vmap named is bound no
    more, and then only a batching rule of our own knows what it is.
    """
    if not plan.sync.names:
        return own
    if isinstance(own.count, int):
        return Statistics(own.count * plan.sync.members, *_merge(plan._replace(count=own.count), None, *own[1:]))
    return Statistics(*_merge(plan, *own))
