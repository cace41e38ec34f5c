"""Training steps of networks whose batch norms are Flax's, ours, or ours with what follows them inside."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import optax

import jbn
import jbn.linen
import jbn.nnx
from experiments.material.models import ResNet50, norm_relu
from experiments.material.train import step_of

FLAX, OURS, FUSED = "Flax", "jbn", "jbn fused"
NORMS: dict[str, dict[str, Any]] = {
    "linen": {FLAX: flax.linen.BatchNorm, OURS: jbn.linen.BatchNorm, FUSED: jbn.linen.BatchNorm},
    "nnx": {FLAX: flax.nnx.BatchNorm, OURS: jbn.nnx.BatchNorm, FUSED: jbn.nnx.BatchNorm},
}

# A function to be jitted, and what it is given, as shapes.
Step = tuple[Callable[..., Any], tuple[Any, ...]]


class Network(NamedTuple):
    """How to make its training step: interface → (candidate, small: of a few layers) → a function that is new."""

    name: str
    steps: dict[str, Callable[[str, bool], Step]]


class Stack(flax.linen.Module):
    """Layers without a bias of their own, dense or 1×1 convolutions, each followed by batch norm and relu."""

    layers: int
    convolutions: bool
    norm: Callable[..., Any]
    fused: bool

    @flax.linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        norm = functools.partial(self.norm, use_running_average=False)
        for _ in range(self.layers):
            if self.convolutions:
                x = flax.linen.Conv(x.shape[-1], (1, 1), use_bias=False)(x)
            else:
                x = flax.linen.Dense(x.shape[-1], use_bias=False)(x)
            x = norm_relu(norm, self.fused, x)
        return x


class NnxStack(flax.nnx.Module):
    """`Stack` of dense layers for flax.nnx."""

    def __init__(self, layers: int, features: int, norm: Callable[..., Any], rngs: flax.nnx.Rngs):
        linear = functools.partial(flax.nnx.Linear, features, features, use_bias=False, rngs=rngs)
        self.linears = flax.nnx.List([linear() for _ in range(layers)])
        self.norms = flax.nnx.List([norm(features, rngs=rngs) for _ in range(layers)])

    def __call__(self, x: jax.Array, then: Callable[[jax.Array], jax.Array]) -> jax.Array:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = then(norm(linear(x)))
        return x


def square(y: jax.Array) -> jax.Array:
    """A loss."""
    return jnp.mean(y * y)


def linen(module: Callable[..., Any], x: jax.ShapeDtypeStruct, candidate: str, small: bool) -> Step:
    """Loss, gradients and new running statistics of a linen module, made as `module(norm=…, fused=…, small=…)`."""
    model = module(norm=NORMS["linen"][candidate], fused=candidate == FUSED, small=small)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)

    def step(params: Any, stats: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            y, updates = model.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return square(y), updates["batch_stats"]

        return jax.value_and_grad(loss, has_aux=True)(params)

    return step, (variables["params"], variables["batch_stats"], x)


def nnx(x: jax.ShapeDtypeStruct, candidate: str, small: bool) -> Step:
    """The same of dense layers in nnx, as a function of the parameters and of the rest."""
    norm, then = NORMS["nnx"][candidate], flax.nnx.relu
    if candidate == FUSED:
        norm, then = functools.partial(norm, activation="relu"), lambda y: y
    layers, features = depth(small), x.shape[-1]
    model = flax.nnx.eval_shape(lambda: NnxStack(layers, features, norm, flax.nnx.Rngs(0)))
    graph, params, rest = flax.nnx.split(model, flax.nnx.Param, ...)

    def step(params: Any, rest: Any, x: jax.Array) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            model = flax.nnx.merge(graph, params, rest, copy=True)
            value = square(model(x, then))
            return value, flax.nnx.state(model, flax.nnx.BatchStat)

        return jax.value_and_grad(loss, has_aux=True)(params)

    return step, (params, rest, x)


def functional(x: jax.ShapeDtypeStruct, candidate: str, small: bool) -> Step:
    """The same of dense layers by `bn_train`; beside it stands Flax's linen."""
    if candidate == FLAX:
        return linen(functools.partial(stack, convolutions=False), x, candidate, small)
    features = x.shape[-1]
    weights = [jax.ShapeDtypeStruct((features, features), x.dtype)] * depth(small)
    params, state = jax.eval_shape(lambda: jbn.bn_init(features))
    activation, then = ("relu", lambda y: y) if candidate == FUSED else (None, jax.nn.relu)

    def step(weights: Any, params: Any, states: Any, x: jax.Array) -> Any:
        def loss(weights: Any, params: Any) -> tuple[jax.Array, Any]:
            y, new = x, []
            for weight, scale_bias, state in zip(weights, params, states, strict=True):
                y, state = jbn.bn_train(scale_bias, state, y @ weight, activation=activation)
                y = then(y)
                new.append(state)
            return square(y), new

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(weights, params)

    return step, (weights, [params] * len(weights), [state] * len(weights), x)


def depth(small: bool) -> int:
    """Layers of a stack."""
    return 2 if small else 20


def stack(*, small: bool, **how: Any) -> Stack:
    """A stack of layers in linen."""
    return Stack(layers=depth(small), **how)


def resnet50(batch: int, size: int, candidate: str, small: bool) -> Step:
    """A training step of ResNet-50 with SGD and momentum; `small` asks for small images."""
    size = 32 if small else size
    model = ResNet50(norm=NORMS["linen"][candidate], fused=candidate == FUSED)
    images = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    labels = jax.ShapeDtypeStruct((batch,), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    optimizer = optax.sgd(0.1, momentum=0.9)

    train = step_of(model, optimizer)

    def step(params: Any, stats: Any, state: Any, images: jax.Array, labels: jax.Array) -> Any:
        return train((params, stats, state), images, labels)

    params = variables["params"]
    return step, (params, variables["batch_stats"], jax.eval_shape(optimizer.init, params), images, labels)


def networks() -> list[Network]:
    """Those of which programs are made; many small layers first."""
    x = jax.ShapeDtypeStruct((4096, 64), jnp.float32)
    images = jax.ShapeDtypeStruct((32, 16, 16, 64), jnp.float32)
    dense, convolutional = (functools.partial(stack, convolutions=each) for each in (False, True))
    return [
        Network(
            "20 × dense",
            {
                "linen": functools.partial(linen, dense, x),
                "nnx": functools.partial(nnx, x),
                "functional": functools.partial(functional, x),
            },
        ),
        Network("20 × 1×1 convolution", {"linen": functools.partial(linen, convolutional, images)}),
        Network("ResNet-50", {"linen": functools.partial(resnet50, 16, 224)}),
    ]
