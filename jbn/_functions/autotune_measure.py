"""One batch norm by kernels and by XLA: the same results, and how long each takes."""

import functools
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import SingleDeviceSharding

from jbn._functions.batch_norm import BNParams, BNState, bn_eval, bn_train
from jbn._op.activations import decoded
from jbn._op.tables import Norm, Times

IMPLEMENTATIONS: tuple[Any, ...] = ("triton", "xla")
ROUNDS = 9
SECONDS = 0.004  # of one round
CACHE = 256 * 2**20  # bytes: a layer's inputs come from memory, not from a cache that the one before filled
DIGITS = {"float16": 4 * 2.0**-10, "bfloat16": 4 * 2.0**-7, "float32": 1e-4}  # of the largest value: what is rounding
LOWERING = threading.Lock()  # Triton's compiler is not known to be safe in several threads
clock: Callable[[], float] = time.perf_counter


class Prepared(NamedTuple):
    """Compiled programs, of several layers that wait for one another, as in a network.

    The passes are programs apart, as in a network, where other layers come between them: in one program XLA would fuse
    passes that there it cannot.
    """

    norm: Norm
    layers: int
    draw: Callable  # seed → a layer's inputs
    run: dict[tuple[str, str], Callable]  # implementation, "forward" or "backward": layers' inputs → layers' outputs
    linearize: dict[str, Callable]  # implementation: a layer's inputs → what its backward pass is given
    compare: dict[str, Callable]  # pass: two layers' outputs → of each largest difference and value


def prepare(norm: Norm, backward: bool, device: Any) -> Prepared:
    """Compiles all that is run, for one device; in a thread that is in no mesh, whatever the caller's is in.

    Raises:
      Exception: as JAX, Triton or XLA have it.
    """
    for dtype in (norm.dtype, norm.out, norm.residual):
        if dtype not in (None, *DIGITS):
            raise NotImplementedError(f"dtype {dtype} is not among the kernels' ({', '.join(DIGITS)})")
    if math.prod(norm.shape) == 0:
        raise NotImplementedError(f"x of shape {norm.shape} is empty")
    layers = links(norm)
    draw, seed = functools.partial(drawn, norm), jax.ShapeDtypeStruct((), jnp.uint32)
    given = _on(device, jax.eval_shape(draw, seed))
    run, linearize, out = {}, {}, {}
    for name in IMPLEMENTATIONS:
        forward = layer(norm, name)
        run[name, "forward"], _ = _compiled(chain(forward), [given] * layers)
        out["forward"] = jax.eval_shape(forward, given)[0]
        if backward:
            linearize[name], pull = _compiled(linearized(norm, name), given)
            run[name, "backward"], found = _compiled(chain(pulled), [(_on(device, pull), given[-1])] * layers)
            out["backward"] = found[0]
    compare = {each: _compiled(differences, _on(device, v), _on(device, v))[0] for each, v in out.items()}
    return Prepared(norm, layers, _compiled(draw, _on(device, seed))[0], run, linearize, compare)


def _compiled(f: Callable, *shapes: Any) -> tuple[Callable, Any]:
    """A program, and what it gives in shapes."""
    with LOWERING:
        lowered = jax.jit(f).lower(*shapes)
    return lowered.compile(), lowered.out_info


def _on(device: Any, shapes: Any) -> Any:
    kept = SingleDeviceSharding(device)
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=kept), shapes)


def links(norm: Norm) -> int:
    """How many layers there are, each with inputs of its own."""
    size = jnp.dtype(norm.dtype).itemsize * math.prod(norm.shape)
    return min(8, -(-CACHE // size))


def _one(norm: Norm, implementation: Any) -> Callable:
    """(y, new state) of a batch norm."""
    activation, negative_slope = decoded(norm.activation)
    options: dict[str, Any] = dict(
        axis=norm.axis - norm.batch,
        activation=activation,
        negative_slope=negative_slope,
        dtype=norm.out,
        implementation=implementation,
    )

    def one(params, state, x, residual, mask):
        if norm.training:
            return bn_train(params, state, x, mask=mask, residual=residual, **options)
        return bn_eval(params, state, x, residual=residual, **options), state

    for _ in range(norm.batch):
        one = jax.vmap(one, (None, None, 0, 0, 0))
    return one


def layer(norm: Norm, implementation: Any) -> Callable:
    """Of what is `drawn` a batch norm's results by name, and what comes late."""
    one = _one(norm, implementation)

    def run(given):
        params, state, x, residual, mask, _ = given
        y, new = one(params, state, x, residual, mask)
        return {"y": y, "the state": new}, new.mean if norm.training else y

    return run


def linearized(norm: Norm, implementation: Any) -> Callable:
    """Of what is `drawn` the backward pass, with what the forward pass keeps for it."""
    one = _one(norm, implementation)

    def run(given):
        params, state, x, residual, mask, _ = given

        def f(params, x, residual):
            return one(params, state, x, residual, mask)

        return jax.vjp(f, params, x, residual, has_aux=True)[1]

    return run


def pulled(given: Any) -> Any:
    """The gradients by name, of a backward pass and the cotangent of y, and what comes late."""
    pull, dy = given
    dparams, dx, dresidual = pull(dy)
    gradients = {"params": dparams, "x": dx, "the residual": dresidual}
    return {f"the gradient of {k}": v for k, v in gradients.items()}, dparams.bias


def chain(layer: Callable) -> Callable:
    """The results of layers, each of which waits for a late, small one of the layer before."""
    each = jax.jit(layer)  # traced and lowered once

    def run(given):
        outputs, late = [], None
        for inputs in given:
            if late is not None:
                inputs, late = lax.optimization_barrier((inputs, late))
            out, late = each(inputs)
            outputs.append(out)
        return outputs

    return run


def drawn(norm: Norm, seed: Any) -> tuple[Any, ...]:
    """Parameters, state, x, residual, mask and the cotangent of y.

    Rows alternate about the mean, so that no value is so near to where an activation bends that rounding decides on
    its slope, and no sum cancels.
    """
    x, channels = jnp.dtype(norm.dtype), norm.shape[norm.axis]
    along = [a for a in range(norm.batch, len(norm.shape)) if a != norm.axis]
    turn = sum((lax.broadcasted_iota(jnp.uint32, norm.shape, a) for a in along), jnp.uint32(0)) % 2
    sign = 1 - 2 * jnp.broadcast_to(turn, norm.shape).astype(jnp.float32)
    scale, bias = 0.75 + 0.5 * noise((channels,), seed), 0.1 * noise((channels,), seed + 1)
    residual = mask = None
    if norm.residual is not None:
        residual = (sign * noise(norm.shape, seed + 2)).astype(norm.residual)
    if norm.mask is not None:
        mask = (lax.iota(jnp.uint32, math.prod(norm.mask)) % 7 != 3).reshape(norm.mask)
    dy = 0.5 * sign + 2 * noise(norm.shape, seed + 3)
    values = (1 + sign * (1.5 + noise(norm.shape, seed + 4))).astype(x)
    state = BNState(jnp.ones(channels), jnp.full(channels, 4.0))
    return BNParams(scale, bias), state, values, residual, mask, dy.astype(norm.out)


def noise(shape: tuple[int, ...], seed: Any) -> jax.Array:
    """Numbers in [0, 1), by a multiplicative hash (Knuth 6.4), which compiles in no time."""
    bits = lax.iota(jnp.uint32, math.prod(shape)) + jnp.asarray(seed, jnp.uint32) * jnp.uint32(7919)
    bits *= jnp.uint32(2654435761)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
    return ((bits >> 8).astype(jnp.float32) / 2**24).reshape(shape)


def differences(a: Any, b: Any) -> Any:
    """Of each value the largest difference, and b's largest."""

    def pair(a, b):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        return jnp.stack([jnp.max(jnp.abs(a - b)), jnp.max(jnp.abs(b))])

    return jax.tree.map(pair, a, b)


def disagreement(prepared: Prepared, inputs: list[Any]) -> str | None:
    """Where kernels and XLA differ by more than rounding, or None."""
    for each, compare in prepared.compare.items():
        ours, theirs = (prepared.run[name, each](_given(prepared, name, each, inputs)) for name in IMPLEMENTATIONS)
        for a, b in zip(ours, theirs, strict=True):
            found = jax.device_get(compare(a, b))
            for name, value in b.items():
                for (error, largest), like in zip(jax.tree.leaves(found[name]), jax.tree.leaves(value), strict=True):
                    allowed = DIGITS[like.dtype.name] * largest
                    if not error <= allowed:  # nor is NaN
                        return f"kernels and XLA differ in {name} by {error:.2g}, and {allowed:.2g} is rounding"
    return None


def _given(prepared: Prepared, name: str, each: str, inputs: list[Any]) -> list[Any]:
    """What a pass of an implementation is given."""
    if each == "forward":
        return inputs
    return [(prepared.linearize[name](given), given[-1]) for given in inputs]


def timed(prepared: Prepared, inputs: list[Any]) -> tuple[Times, Times | None]:
    """Microseconds of a layer, of the forward and of the backward pass: medians over rounds in which all take turns.

    A round queues many calls and waits for the last, so that the device's own time counts.
    """
    given = {key: _given(prepared, *key, inputs) for key in prepared.run}
    calls = {key: _calls(run, given[key]) for key, run in prepared.run.items()}
    found: dict[tuple[str, str], list[float]] = {key: [] for key in calls}
    for _ in range(ROUNDS):
        for key, count in calls.items():
            seconds = _seconds(prepared.run[key], given[key], count)
            found[key].append(1e6 * seconds / count / prepared.layers)
    middle = {key: statistics.median(values) for key, values in found.items()}
    forward, backward = (_times(middle, each) for each in ("forward", "backward"))
    assert forward is not None
    return forward, backward


def _times(middle: dict[tuple[str, str], float], each: str) -> Times | None:
    found: Iterable[float | None] = (middle.get((name, each)) for name in IMPLEMENTATIONS)
    triton, xla = found
    return None if triton is None or xla is None else Times(round(triton, 3), round(xla, 3))


def _calls(run: Callable, inputs: list[Any]) -> int:
    """How many calls fill a round."""
    _seconds(run, inputs, 1)  # memory and code are there then
    return max(3, min(100, int(SECONDS / max(1e-6, _seconds(run, inputs, 1)))))


def _seconds(run: Callable, inputs: list[Any], count: int) -> float:
    started, out = clock(), None
    for _ in range(count):
        out = run(inputs)
    jax.block_until_ready(out)
    return clock() - started
