"""The pieces of the op as Triton kernels, launched through jax-triton: same arguments and results as `jbn._xla`.

Arrays are seen as `(B, N, C, S)` by reshapes alone, so nothing is transposed or copied on the way in or out. Where two
tensors of x's size can be had for the price of one, as z̄ from the gradient sums, `keep` asks for it.
"""

# what is not imported where packages are missing is not used there: `check` comes first
# pyright: reportPossiblyUnboundVariable=false

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jbn._plan import Coefficients, Plan

try:
    from jbn.kernels import launches
    from jbn.kernels.tiling import View

    import jax_triton  # isort: skip  (raises without a GPU's packages; the above need triton alone)
except ImportError as error:  # without a GPU's packages: `supports` says so
    _missing: str | None = str(error).split(":")[0]
else:
    _missing = None

DTYPES = ("float16", "bfloat16", "float32")
PROCESSORS = 132  # of an H100 or H200, where there is no device to ask
CAPABILITY = 80  # PTX for it runs on all later devices too; where there is no device to ask


def supports(plan: Plan, x, *operands) -> str | None:
    """Why the kernels cannot do this, or None if they can; `operands` are what a piece takes beside x."""
    if _missing is not None:
        return f"jax-triton cannot be imported ({_missing}): pip install 'jbn[cuda12]' or 'jbn[cuda13]'"
    kinds = [jnp.dtype(v.dtype).name for v in (x, *jax.tree.leaves(operands), plan)]
    for kind in kinds:
        if kind not in (*DTYPES, "bool"):
            return f"dtype {kind} is not among the kernels' ({', '.join(DTYPES)})"
    if x.size == 0:
        return f"x of shape {x.shape} is empty"
    capability = _device()[1]
    if capability < 80:
        return f"the GPU has compute capability {capability / 10}, and the kernels need 8.0"
    return None


def check(plan: Plan, x, *operands) -> None:
    """Raises NotImplementedError if the kernels cannot do this."""
    reason = supports(plan, x, *operands)
    if reason is not None:
        raise NotImplementedError(
            f"implementation='triton' cannot be used: {reason}; implementation='xla', or None, works here too"
        )


def moments(plan: Plan, x, mask):
    """Σ over the rows of each channel: `mean, Σ(x − mean)²`, and the count before them where there is a mask."""
    view = _view(plan, x.shape)
    mask, geometry = _mask(plan, view, x.shape, mask)
    launch = launches.moments(_problem(plan, view, x, geometry), _device()[0])
    count, mean, m2, *_ = _call(launch, x, _or(mask, x))
    found = (mean, m2) if mask is None else (count, mean, m2)
    return tuple(_vector(plan, x, v) for v in found)


def apply(plan: Plan, x, coef: Coefficients, residual, mask=None):
    """y = activation(scale · (x − mean) · rstd + bias + residual)."""
    del mask  # every position is normalised
    problem = _problem(plan, _view(plan, x.shape), x, None, coef, residual)
    launch = launches.apply(problem, plan.dtype.name, _device()[0])
    (y,) = _call(launch, x, *_vectors(coef), _or(residual, x))
    return (y.reshape(x.shape),)


def gradient_sums(plan: Plan, x, coef: Coefficients, residual, mask, dy, keep=False):
    """`Σ z̄, Σ z̄ · x̂` over the rows of each channel, where z̄ = activation'(z) · ȳ; with `keep`, z̄ behind them.

    z̄ has the residual's dtype, or ȳ's. It is the residual's cotangent, and for x̄ all that is needed of ȳ, residual
    and activation: `gradient_input(plan without activation, x, coef, None, mask, z̄, sums)`.
    """
    view = _view(plan, x.shape)
    mask, geometry = _mask(plan, view, x.shape, mask)
    problem = _problem(plan, view, x, geometry, coef, residual)
    kept = _or(residual, dy).dtype.name if keep else None
    launch = launches.gradient_sums(problem, kept, _device()[0])
    total, product, dz, *_ = _call(launch, x, *_vectors(coef), _or(residual, x), _or(mask, x), dy)
    sums = _vector(plan, x, total), _vector(plan, x, product)
    return (*sums, dz.reshape(x.shape)) if keep else sums


def gradient_input(plan: Plan, x, coef: Coefficients, residual, mask, dy, sums):
    """x̄ = scale · rstd · (z̄ − [mask] · (Σz̄ + x̂ · Σz̄x̂) / count), and z̄ behind it where there is a residual."""
    view = _view(plan, x.shape)
    mask, geometry = _mask(plan, view, x.shape, mask)
    problem = _problem(plan, view, x, geometry, coef, residual)
    kept = residual.dtype.name if residual is not None and plan.activation is not None else None
    launch = launches.gradient_input(problem, x.dtype.name, kept, _device()[0])
    total, product = sums or (coef.mean, coef.mean)
    dx, dz = _call(
        launch, x, *_vectors(coef), _or(coef.weight, coef.mean), _or(residual, x), _or(mask, x), dy, total, product
    )
    dx = dx.reshape(x.shape)
    if residual is None:
        return (dx,)
    # without an activation ȳ is z̄
    return dx, dz.reshape(x.shape) if kept else dy.astype(residual.dtype)


def _problem(plan: Plan, view, x, mask, coef: Coefficients | None = None, residual=None):
    return launches.Problem(
        view,
        x.dtype.name,
        count=plan.count,
        scale=coef is not None and coef.scale is not None,
        bias=coef is not None and coef.bias is not None,
        residual=residual is not None,
        activation=plan.activation,
        mask=mask,
        weight=coef is not None and coef.weight is not None,
        centred=plan.centred,
    )


def _call(launch, *arrays):
    """Outputs of a launch. Scratch is among them, and zeroed by the call itself where it has to be."""
    return jax_triton.triton_call(
        *arrays,
        *(np.float32(n) if isinstance(n, float) else n for n in launch.numbers),
        kernel=launch.kernel,
        name=launch.kernel.__name__,
        out_shape=[jax.ShapeDtypeStruct(o.shape, jnp.dtype(o.dtype)) for o in launch.outputs],
        grid=(launch.programs,),
        num_warps=launch.tiling.warps,
        compute_capability=_device()[1],
        zeroed_outputs=tuple(i for i, o in enumerate(launch.outputs) if o.zeroed),
        **launch.constants,
    )


def _or(value: jax.Array | None, absent: jax.Array) -> jax.Array:
    """An array that the kernel does not read stands in for None, which jax-triton does not take."""
    return absent if value is None else value


def _vectors(coef: Coefficients):
    return coef.mean, coef.spread, coef.epsilon, _or(coef.scale, coef.mean), _or(coef.bias, coef.mean)


def _vector(plan: Plan, x, value):
    """(B, C) → (*batch, C)."""
    return value.reshape(*x.shape[: plan.batch], x.shape[plan.channel])


def _view(plan: Plan, shape):
    before, after = shape[plan.batch : plan.channel], shape[plan.channel + 1 :]
    return View(math.prod(shape[: plan.batch]), math.prod(before), shape[plan.channel], math.prod(after))


def _mask(plan: Plan, view, shape, mask):
    """The mask, (B or 1, …), and how it lies; of full size where it cannot be walked as it is."""
    if mask is None:
        return None, None
    batch, channel = plan.batch, plan.channel
    if all(n == 1 for n in mask.shape[:batch]):
        mask, shared = mask.reshape((1,) * batch + mask.shape[batch:]), view.batch > 1
    else:
        mask, shared = jnp.broadcast_to(mask, shape[:batch] + mask.shape[batch:]), False
    rows = [a for a in range(batch, len(shape)) if a != channel]
    varies = [i for i, a in enumerate(rows) if mask.shape[a] != 1] or [-1]
    neighbours = varies[-1] - varies[0] == len(varies) - 1
    if mask.shape[channel] == 1 and shape[channel] != 1 and neighbours:
        after = rows[varies[-1] + 1 :]  # the mask is the same along these, and repeats along those before
        geometry = launches.Mask(
            "rows", shared, math.prod(shape[a] for a in after), math.prod(mask.shape[a] for a in rows)
        )
    else:
        mask, geometry = jnp.broadcast_to(mask, mask.shape[:batch] + shape[batch:]), launches.Mask("full", shared)
    return mask, geometry


@functools.cache
def _device() -> tuple[int, int]:
    """Multiprocessors and compute capability of the first CUDA device, or defaults."""
    try:
        device = jax.devices("cuda")[0]
    except RuntimeError:
        return PROCESSORS, CAPABILITY
    return device.core_count, round(10 * float(device.compute_capability))
