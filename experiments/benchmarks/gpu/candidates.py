"""The candidates in JAX: what each computes, as one jitted step of several layers that wait for one another."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax import lax

import jbn
import jbn.linen
from experiments.benchmarks.gpu.tasks import PASSES, Task
from experiments.benchmarks.gpu.timing import Prepared
from jbn._functions.autotune_measure import chain

MOMENTUM, EPSILON = 0.9, 1e-5
IMPLEMENTATIONS: dict[str, Any] = {"jbn triton": "triton", "jbn xla": "xla", "jbn": None}
NAMES = (*IMPLEMENTATIONS, "flax.linen", "copy")


def prepare(name: str, task: Task, count: int) -> Prepared:
    """Steps of `count` layers."""
    make = jax.jit(functools.partial(draw, task))  # once for all seeds
    if name == "copy":
        copy, xs = jax.jit(lambda xs: [-x for x in xs]), [make(i) for i in range(count)]
        return {"forward": lambda: copy(xs)}, jax.block_until_ready, []
    layer = functools.partial(flax_layer if name == "flax.linen" else jbn_layer, name, task)
    channels = task.shape[task.axis]
    scale, bias = scale_and_bias(channels)
    state = jnp.zeros(channels), jnp.ones(channels)
    inputs = [(scale, bias, make(10 + i), make(30 + i) if task.fused == "add + relu" else None) for i in range(count)]
    cotangents = [make(50 + i) for i in range(count)]

    of = functions(layer, state)
    run = {each: jax.jit(chain(of[each])) for each in PASSES}
    pullbacks = [jax.jit(of["linearized"])(given)[0] for given in inputs]
    pairs = list(zip(inputs, cotangents, strict=True))
    steps = {
        "forward": lambda: run["forward"](inputs),
        "backward": lambda: run["backward"](list(zip(pullbacks, cotangents, strict=True))),
        "both": lambda: run["both"](pairs),
    }
    y, _, _, _, _, dx, *dresidual = steps["both"]()[0]
    seen = jax.jit(fingerprint)(inputs[0][2], cotangents[0], y, dx, *(v for v in dresidual if v is not None))
    return steps, jax.block_until_ready, [float(v) for v in seen]


def functions(layer: Callable[..., Any], state: Any) -> dict[str, Callable[[Any], Any]]:
    """A layer's passes, each to its results and what comes late; "linearized" makes what the backward pass is given."""

    def forward(given):
        y, new = layer(state, *given)
        return (y, *new), new[0]

    def linearized(given):
        y, pullback, _ = jax.vjp(lambda *given: layer(state, *given), *given, has_aux=True)
        return pullback, y

    def backward(given):
        pullback, cotangent = given
        out = pullback(cotangent)
        return out, out[1]

    def both(given):
        given, cotangent = given
        y, pullback, new = jax.vjp(lambda *given: layer(state, *given), *given, has_aux=True)
        # a network's cotangent comes after y: else XLA fuses the passes, which there it cannot
        y, cotangent = lax.optimization_barrier((y, cotangent))
        out = pullback(cotangent)
        return (y, *new, *out), out[1]

    return {"forward": forward, "linearized": linearized, "backward": backward, "both": both}


def scale_and_bias(channels: int) -> tuple[jax.Array, jax.Array]:
    """A layer's parameters."""
    return 1 + 0.25 * noise((channels,), 1), 0.25 * noise((channels,), 2)


def jbn_layer(name: str, task: Task, state: Any, scale: Any, bias: Any, x: Any, residual: Any) -> Any:
    """(y, new state)."""
    return jbn.bn_train(
        jbn.BNParams(scale, bias),
        jbn.BNState(*state),
        x,
        axis=task.axis,
        momentum=MOMENTUM,
        epsilon=EPSILON,
        residual=residual,
        activation=None if task.fused == "alone" else "relu",
        implementation=IMPLEMENTATIONS[name],
    )


def flax_layer(_: str, task: Task, state: Any, scale: Any, bias: Any, x: Any, residual: Any) -> Any:
    """(y, new state)."""
    norm = nn.BatchNorm(
        use_running_average=False, axis=task.axis, momentum=MOMENTUM, epsilon=EPSILON, dtype=jnp.dtype(task.dtype)
    )
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": state[0], "var": state[1]},
    }
    y: Any
    y, updates = norm.apply(variables, x, mutable=["batch_stats"])
    if residual is not None:
        y = y + residual
    y = y if task.fused == "alone" else nn.relu(y)
    return y, (updates["batch_stats"]["mean"], updates["batch_stats"]["var"])


def draw(task: Task, seed: Any) -> jax.Array:
    """x and the like: of mean 1 and deviation 2."""
    return (1 + 2 * noise(task.shape, seed)).astype(task.dtype)


def noise(shape: tuple[int, ...], seed: Any) -> jax.Array:
    """Uniform numbers of mean 0 and deviation 1, by a hash that PyTorch's candidate computes too (Knuth 6.4)."""
    count = 1
    for n in shape:
        count *= n
    bits = (lax.iota(jnp.uint32, count) + jnp.uint32(seed) * jnp.uint32(7919)) * jnp.uint32(2654435761)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(2246822519)
    return (((bits >> 8).astype(jnp.float32) / 2**24 - 0.5) * 12**0.5).reshape(shape)


def fingerprint(x: Any, dy: Any, y: Any, dx: Any, *dresidual: Any) -> list[Any]:
    """A few numbers in which results that differ would differ."""
    x, dy, y, dx, *rest = (v.astype(jnp.float32) for v in (x, dy, y, dx, *dresidual))
    return [(y * y).mean(), (y * x).mean(), (dx * dx).mean(), (dx * dy).mean(), *((r * dy).mean() for r in rest)]


Stepped = tuple[Callable[[], Any], Callable[[Any], Any], int | None]


def prepare_step(name: str, batch: int, size: int = 224) -> Stepped:
    """A training step of ResNet-50 in bfloat16 with SGD and momentum; what waits for it; bytes that it is to take."""
    return lower_step(name, batch, size)()


def lower_step(name: str, batch: int, size: int = 224, named: str = "") -> Callable[[], Stepped]:
    """What compiles and prepares a training step: until it is called the device is not used.

    With `named` the backward pass has the batch norms' inputs and statistics alone, and recomputes what follows them:
    of "all" the network in one checkpoint, or of "segments", each in one of its own.
    """
    from experiments.material.models import POLICY, ResNet50
    from experiments.material.train import step_of

    of = {"dtype": jnp.bfloat16, "policy": POLICY if named == "segments" else None}
    if name == "flax.linen":
        model = ResNet50(norm=nn.BatchNorm, **of)
    else:
        norm = functools.partial(jbn.linen.BatchNorm, implementation=IMPLEMENTATIONS[name])
        model = ResNet50(norm=norm, fused=True, **of)
    optimizer = optax.sgd(0.1, momentum=0.9)
    around = {"around": functools.partial(jax.checkpoint, policy=POLICY)} if named == "all" else {}

    def begin(key: jax.Array) -> tuple[Any, jax.Array, jax.Array]:
        images = draw(Task("", (batch, size, size, 3)), 0)
        variables = model.init(key, images[:1], train=True)
        params, stats = variables["params"], variables["batch_stats"]
        return (params, stats, optimizer.init(params)), images, jnp.arange(batch) % 1000

    train = jax.jit(step_of(model, optimizer, **around), donate_argnums=0)
    lowered = train.lower(*jax.eval_shape(begin, jax.eval_shape(lambda: jax.random.key(0))))

    def prepare() -> Stepped:
        compiled = lowered.compile()
        kept, images, labels = jax.jit(begin)(jax.random.key(0))
        state = [kept]

        def step() -> Any:
            state[0], value = compiled(state[0], images, labels)
            return value

        return step, jax.block_until_ready, planned_memory(compiled)

    return prepare


def planned_memory(compiled: Any) -> int | None:
    """Bytes that a compiled program takes with what it is given and gives, as XLA planned them."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes


def peak_memory() -> int | None:
    """Bytes of device memory that this process held at once."""
    found = jax.devices()[0].memory_stats()
    return found and found.get("peak_bytes_in_use")
