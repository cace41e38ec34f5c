"""The pieces of the op as primitives: moments, apply, the tangent map, and the two halves of its transpose."""

from jax.interpreters import ad

from jbn import _xla
from jbn._collectives import add_across
from jbn._primitive import primitive
from jbn._xla import Plan


def _batched(plan: Plan, name) -> Plan:
    return plan._replace(channel=plan.channel + 1, batch=plan.batch + 1, sync=plan.sync.batched(name))


_, moments = primitive("moments", _xla.moments, _batched)
_, apply = primitive("apply", _xla.apply, _batched)
_, gradient_sums = primitive("gradient_sums", _xla.gradient_sums, _batched)
_, gradient_input = primitive("gradient_input", _xla.gradient_input, _batched)
_tangent_p, tangent = primitive("tangent", _xla.tangent, _batched)


def _tangent_transpose(cotangents, *flat, tree, plan):
    """The backward pass. The map in ẋ is self-adjoint up to the mask, so sums and x̄ are all there is to it."""
    x, coef, residual, mask, moved = tree.unflatten(flat)
    (dy,) = cotangents
    wanted = [m is not None and ad.is_undefined_primal(m) for m in moved]
    dx = dscale = dbias = dresidual = None
    if type(dy) is not ad.Zero:
        sums = None
        if wanted[1] or wanted[2] or ((wanted[0] or wanted[3]) and plan.centred):
            sums = gradient_sums(plan, x, coef, residual, mask, dy)
            dbias, dscale = sums
        if wanted[0] or wanted[3]:
            sums = add_across(sums, plan.sync) if plan.centred else None
            dx, *rest = gradient_input(plan, x, coef, residual, mask, dy, sums)
            dresidual = rest[0] if rest else None
    found = [value if want else None for value, want in zip((dx, dscale, dbias, dresidual), wanted, strict=True)]
    # one entry per operand: None for those the map is not linear in
    linear = [f for f, m in zip(found, moved, strict=True) if m is not None]
    return [None] * (len(flat) - len(linear)) + linear


ad.primitive_transposes[_tangent_p] = _tangent_transpose
