"""What a call of one batch norm takes: eagerly, and under `jit` where the layer is small."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

import jbn
import jbn.linen
import jbn.nnx
from experiments.benchmarks import turns as turns_of
from experiments.benchmarks.costs.networks import FLAX, FUSED, NORMS, OURS, square
from experiments.benchmarks.costs.rows import row

FLAX_RELU = "Flax, then relu"
BESIDE = {FLAX: FLAX, OURS: FLAX, FLAX_RELU: FLAX_RELU, FUSED: FLAX_RELU}
Call = Callable[[], Any]


def shape_name(shape: tuple[int, ...]) -> str:
    """As people write it."""
    return "×".join(map(str, shape))


# `apply(params, state, x)` returns y and, in training, the new running statistics; the other, for some features, the
# first params and state.
Layer = tuple[Callable[[Any, Any, Any], Any], Callable[[int], tuple[Any, Any]]]


def linen_layer(candidate: str, train: bool) -> Layer:
    """A layer of linen."""
    relu = {"activation": "relu"} if candidate == FUSED else {}
    layer = NORMS["linen"].get(candidate, flax.linen.BatchNorm)(use_running_average=not train, **relu)
    after = flax.linen.relu if candidate == FLAX_RELU else lambda y: y

    def apply(params: Any, state: Any, x: Any) -> Any:
        variables = {"params": params, "batch_stats": state}
        if not train:
            return after(layer.apply(variables, x)), None
        y, updates = layer.apply(variables, x, mutable=["batch_stats"])
        return after(y), updates["batch_stats"]

    def begin(features: int) -> tuple[Any, Any]:
        variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, features)))
        return variables["params"], variables["batch_stats"]

    return apply, begin


def functional_layer(candidate: str, train: bool) -> Layer:
    """The same by `bn_train` and `bn_eval`; beside them stands Flax's linen."""
    if candidate not in (OURS, FUSED):
        return linen_layer(candidate, train)
    function = functools.partial(
        jbn.bn_train if train else jbn.bn_eval, activation="relu" if candidate == FUSED else None
    )

    def apply(params: Any, state: Any, x: Any) -> Any:
        return function(params, state, x) if train else (function(params, state, x), None)

    return apply, jbn.bn_init


def nnx_call(candidate: str, train: bool, x: jax.Array) -> Call:
    """An eager call of an nnx module, which keeps its running statistics itself."""
    relu = {"activation": "relu"} if candidate == FUSED else {}
    layer = NORMS["nnx"].get(candidate, flax.nnx.BatchNorm)(x.shape[-1], rngs=flax.nnx.Rngs(0), **relu)
    layer.train() if train else layer.eval()
    if candidate == FLAX_RELU:
        return lambda: jax.block_until_ready(flax.nnx.relu(layer(x)))
    return lambda: jax.block_until_ready(layer(x))


def eager_call(layer: Callable[[str, bool], Layer], candidate: str, train: bool, x: jax.Array) -> Call:
    """An eager call of a layer that has its variables as an argument."""
    apply, begin = layer(candidate, train)
    params, state = begin(x.shape[-1])
    return lambda: jax.block_until_ready(apply(params, state, x))


INTERFACES: dict[str, Callable[[str, bool, jax.Array], Call]] = {
    "linen": functools.partial(eager_call, linen_layer),
    "nnx": nnx_call,
    "functional": functools.partial(eager_call, functional_layer),
}


def eager(shape: tuple[int, ...], turns: int, calls: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A row for each interface, mode and candidate."""
    x = jnp.asarray(rng.standard_normal(shape, np.float32))
    rows = []
    for interface, make in INTERFACES.items():
        for mode in ("training", "inference"):
            taken = take_turns({name: make(name, mode == "training", x) for name in BESIDE}, turns, calls, rng)
            told = {"kind": "eager", "what": f"{shape_name(shape)}, {mode}", "interface": interface, "unit": "µs"}
            rows += [row(told, name, taken, beside) for name, beside in BESIDE.items()]
    return rows


# Losses of y and an array of its shape. Of the first ȳ is that array, as of a layer behind it is one; of the second it
# is 2y/n, which XLA computes from x again wherever it is used.
LOSSES = {"gradient": lambda y, dy: jnp.sum(y * dy), "gradient of y²": lambda y, _: square(y)}
JITTED = ("forward", *LOSSES, "inference")


def jitted_call(layer: Callable[[str, bool], Layer], candidate: str, what: str, x: jax.Array) -> Call:
    """A jitted call: forward in training mode, the same with gradients, or inference."""
    apply, begin = layer(candidate, what != "inference")
    params, state = begin(x.shape[-1])
    if what not in LOSSES:
        run = jax.jit(apply)
        return lambda: jax.block_until_ready(run(params, state, x))

    def loss(params: Any, state: Any, x: Any, dy: Any) -> Any:
        y, state = apply(params, state, x)
        return LOSSES[what](y, dy), state

    step, dy = jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True)), jnp.flip(x)
    return lambda: jax.block_until_ready(step(params, state, x, dy))


def jitted(shape: tuple[int, ...], turns: int, calls: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A row for each interface, pass and candidate."""
    x = jnp.asarray(rng.standard_normal(shape, np.float32))
    rows = []
    for interface, layer in (("linen", linen_layer), ("functional", functional_layer)):
        for what in JITTED:
            taken = take_turns({name: jitted_call(layer, name, what, x) for name in BESIDE}, turns, calls, rng)
            told = {"kind": "jit", "what": f"{shape_name(shape)}, {what}", "interface": interface, "unit": "µs"}
            rows += [row(told, name, taken, beside) for name, beside in BESIDE.items()]
    return rows


def take_turns(
    candidates: Mapping[str, Call], turns: int, calls: int, rng: np.random.Generator
) -> dict[str, list[float]]:
    """Microseconds of a call at each turn, the mean of `calls`; who follows whom is drawn anew each turn."""
    for call in candidates.values():  # compiles
        call()
        call()
    repeated = {name: functools.partial(several, call, calls) for name, call in candidates.items()}
    taken = turns_of.take_turns(repeated, turns, rng, warm_up=0)
    return {name: (1e6 * seconds / calls).tolist() for name, seconds in taken.items()}


def several(call: Call, calls: int) -> None:
    """So many calls."""
    for _ in range(calls):
        call()
