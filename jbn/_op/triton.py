"""The pieces of the op as Triton kernels, launched through jax-triton: same arguments and results as `jbn._op.xla`.

Arrays are seen as `(B, N, C, S)` by reshapes alone, so nothing is transposed or copied on the way in or out.
"""

# what is not imported where packages are missing is not used there: `failure` comes first
# pyright: reportPossiblyUnboundVariable=false

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from jbn._op.activations import decoded
from jbn._op.gpu import INSTALL, Device, gpu
from jbn._op.plan import Coefficients, Plan

try:
    from jbn.kernels import launches
    from jbn.kernels.tiling import View
    from jbn.kernels.traffic import traffic

    NO_TRITON: str | None = None
except ImportError as error:
    NO_TRITON = f"triton cannot be imported ({error}): {INSTALL}"
try:
    from jbn._op.jax_triton import jax_triton

    MISSING: str | None = NO_TRITON
except ImportError as error:  # without a GPU's packages, but for triton, launches can still be told
    MISSING = f"jax-triton cannot be imported ({str(error).split(':')[0]}): {INSTALL}"


class Runner:
    """Runs a launch through jax-triton on a platform; scratch is among its outputs, zeroed by the call where asked."""

    def __init__(self, platform: str):
        self.device = gpu(platform)

    @property
    def processors(self) -> int:
        return self.device.processors

    @property
    def capability(self) -> int:
        return self.device.capability

    def __call__(self, launch, *arrays):
        wide = self.device.architecture.startswith("gfx")  # a warp there has 64 threads
        return jax_triton.triton_call(
            *arrays,
            *(np.float32(n) if isinstance(n, float) else n for n in launch.numbers),
            kernel=launch.kernel,
            name=launch.kernel.__name__,
            out_shape=[jax.ShapeDtypeStruct(o.shape, jnp.dtype(o.dtype)) for o in launch.outputs],
            grid=(launch.programs,),
            num_warps=max(1, launch.tiling.warps // 2) if wide else launch.tiling.warps,
            compute_capability=None if wide else self.capability,
            zeroed_outputs=tuple(i for i, o in enumerate(launch.outputs) if o.zeroed),
            **launch.constants,
        )


class Recorder(Runner):
    """Keeps what would be launched, and runs nothing."""

    def __init__(self, device: Device):
        self.device, self.launches = device, []

    def __call__(self, launch, *arrays):
        self.launches.append(launch)
        return [jnp.zeros(o.shape, o.dtype) for o in launch.outputs]


def launches_of(name: str, plan: Plan, device: Device, x, *operands) -> list:
    """(launch, bytes loaded, bytes stored) of what a piece launches on a device for operands of these shapes.

    What programs load one after the other, and a cache has, counts once.
    """
    recorder = Recorder(device)
    outputs = jax.eval_shape(functools.partial(globals()[name], plan, runner=recorder), x, *operands)
    large = {"x": x, "y": outputs[0], "dx": outputs[0], "dz": outputs[-1]}
    if name != "moments":
        _, residual, *rest = operands
        dy, kept = (rest[i] if len(rest) > i else None for i in (1, 3))
        large |= {"residual": residual, "dy": dy} if kept is None else {"dy": kept}
    sizes = {k: jnp.dtype(v.dtype).itemsize for k, v in large.items() if v is not None}
    found = [(launch, traffic(launch, _view(plan, x.shape), sizes)) for launch in recorder.launches]
    return [(launch, moved.loaded - moved.again, moved.stored) for launch, moved in found]


def piece(name: str, platform: str):
    """The function of a piece of the op, for a platform."""
    return functools.partial(globals()[name], runner=Runner(platform))


def failure(name: str, plan: Plan, platform: str, x, *operands) -> str | None:
    """Why a piece cannot be compiled for operands of these shapes, or None if it can."""
    if MISSING is not None:
        return MISSING
    flat, tree = jax.tree.flatten((x, *operands))
    return _failure(name, plan, platform, tree, tuple((v.shape, jnp.dtype(v.dtype)) for v in flat))


@functools.cache  # what is compiled here is kept by jax-triton too, so that the call itself need not
def _failure(name: str, plan: Plan, platform: str, tree, kinds) -> str | None:
    operands = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*kind) for kind in kinds])
    function = functools.partial(piece(name, platform), plan)
    if not gpu(platform).here and platform == "rocm":
        return None  # its compiler asks the device
    try:
        jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,))
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        return f"jbn_{name} does not compile ({type(error).__name__}: {message})"
    return None


def moments(plan: Plan, x, mask, *, runner):
    """Over the rows of each channel: `mean, Σ(x − mean)² / count`, and the count before them where there is a mask."""
    view = _view(plan, x.shape)
    mask, geometry = _mask(plan, view, x.shape, mask)
    problem = _problem(plan, view, x, geometry)
    launch = launches.moments(problem, runner.processors, capability=runner.capability)
    count, mean, var, *_ = runner(launch, x, _or(mask, x))
    found = (mean, var) if mask is None else (count, mean, var)
    return tuple(_vector(plan, x, v) for v in found)


def apply(plan: Plan, x, coef: Coefficients, residual, mask=None, *, runner):
    """y = activation(scale · (x − mean) · rstd + bias + residual)."""
    del mask  # every position is normalised
    problem = _problem(plan, _view(plan, x.shape), x, None, coef, residual)
    launch = launches.apply(problem, plan.dtype.name, runner.processors)
    (y,) = runner(launch, x, *_vectors(coef), _or(residual, x))
    return (y.reshape(x.shape),)


def gradient_sums(plan: Plan, x, coef: Coefficients, residual, mask, dy, *, runner):
    """`Σ z̄, Σ z̄ · x̂` over the rows of each channel, where z̄ = activation'(z) · ȳ."""
    return _gradient_sums(plan, x, coef, residual, mask, dy, None, runner)[:2]


def gradient_sums_keeping(plan: Plan, x, coef: Coefficients, residual, mask, dy, *, runner):
    """`gradient_sums`, and z̄ in the residual's dtype behind them."""
    return _gradient_sums(plan, x, coef, residual, mask, dy, residual.dtype.name, runner)


def _gradient_sums(plan, x, coef, residual, mask, dy, kept, runner):
    view = _view(plan, x.shape)
    mask, geometry = _mask(plan, view, x.shape, mask)
    problem = _problem(plan, view, x, geometry, coef, residual)
    launch = launches.gradient_sums(problem, kept, runner.processors, capability=runner.capability)
    total, product, dz, *_ = runner(launch, x, *_vectors(coef), _or(residual, x), _or(mask, x), dy)
    return _vector(plan, x, total), _vector(plan, x, product), dz.reshape(x.shape) if kept else dz


def gradient_input(plan: Plan, x, coef: Coefficients, residual, mask, dy, sums, kept=None, *, runner):
    """x̄ = scale · rstd · (z̄ − [mask] · (Σz̄ + x̂ · Σz̄x̂) / count), and z̄ behind it where there is a residual.

    z̄ where it was `kept` is all that is read beside x and mask.
    """
    if kept is not None:
        straight = plan._replace(activation=None)
        return *gradient_input(straight, x, coef, None, mask, kept, sums, runner=runner), kept
    view = _view(plan, x.shape)
    mask, geometry = _mask(plan, view, x.shape, mask)
    problem = _problem(plan, view, x, geometry, coef, residual)
    kept = residual.dtype.name if residual is not None and plan.activation is not None else None
    launch = launches.gradient_input(problem, x.dtype.name, kept, runner.processors)
    total, product = sums or (coef.mean, coef.mean)
    dx, dz = runner(
        launch, x, *_vectors(coef), _or(coef.weight, coef.mean), _or(residual, x), _or(mask, x), dy, total, product
    )
    dx = dx.reshape(x.shape)
    if residual is None:
        return (dx,)
    # without an activation ȳ is z̄
    return dx, dz.reshape(x.shape) if kept else dy.astype(residual.dtype)


def _problem(plan: Plan, view, x, mask, coef: Coefficients | None = None, residual=None):
    activation, negative_slope = decoded(plan.activation)
    return launches.Problem(
        view,
        x.dtype.name,
        count=plan.count,
        scale=coef is not None and coef.scale is not None,
        bias=coef is not None and coef.bias is not None,
        residual=residual is not None,
        activation=activation,
        negative_slope=negative_slope,
        mask=mask,
        weight=coef is not None and coef.weight is not None,
        centred=plan.centred,
    )


def _or(value: jax.Array | None, absent: jax.Array) -> jax.Array:
    """An array that the kernel does not read stands in for None, which jax-triton does not take."""
    return absent if value is None else value


def _vectors(coef: Coefficients):
    return coef.mean, coef.var, coef.epsilon, _or(coef.scale, coef.mean), _or(coef.bias, coef.mean)


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
