"""A whole training run as one function that can be jitted and vmapped: the steps are one `lax.scan`."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.material.data import Split


class Schedule(NamedTuple):
    """How long to train, and how often to evaluate: after every `evaluate_every` of the `steps`."""

    steps: int
    batch_size: int
    evaluate_every: int


class History(NamedTuple):
    """Training loss at each step, what `evaluate` found after each `evaluate_every` steps, and the last variables."""

    loss: Array
    found: Any
    variables: Any


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Mean cross-entropy in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step_of(
    model: nn.Module, optimizer: optax.GradientTransformation, around: Callable[..., Any] = lambda loss: loss
) -> Callable[..., Any]:
    """`step((params, stats, optimizer's state), images, labels)` → the same after it, and the loss in float32.

    `around` wraps what is differentiated, a function of the parameters, in `jax.checkpoint` for instance.
    """

    def train_step(carry: Any, images: Array, labels: Array) -> tuple[Any, Array]:
        params, stats, opt_state = carry

        def loss(params: Any) -> tuple[Array, Any]:
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
            )
            return cross_entropy(logits.astype(jnp.float32), labels), updates["batch_stats"]

        (value, stats), gradient = jax.value_and_grad(around(loss), has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    return train_step


def accuracy(model: nn.Module, x: Any, labels: Array) -> Callable[[Any], Array]:
    """A function of variables: the fraction of `x` that the model, in inference, labels rightly."""

    def evaluate(variables: Any) -> Array:
        logits: Any = model.apply(variables, x, train=False)
        # argmax of NaN is class 0: count an answer only where there is one
        return ((logits.argmax(-1) == labels) & jnp.isfinite(logits).all(-1)).mean()

    return evaluate


def train(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    data: Split,
    key: Array,
    schedule: Schedule,
    *,
    loss: Callable[[Array, Array], Array] = cross_entropy,
    evaluate: Callable[[Any], Any] | None = None,
) -> History:
    """Trains `model` on `loss(outputs, targets)`, threading its running statistics; all randomness is from `key`.

    `model` is called as `model(x, train=True or False)`, with statistics, if any, in "batch_stats", and the random
    key "dropout" in training. `evaluate(variables)` defaults to the accuracy on the whole test set.
    """
    evaluate = evaluate or accuracy(model, data.test_x, data.test_y)
    initial, shuffles = jax.random.split(key)
    noise = jax.random.fold_in(key, 2)
    variables = model.init(initial, jax.tree.map(lambda leaf: leaf[:1], data.train_x), train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})

    def step(carry: Any, index: Array) -> tuple[Any, Array]:
        params, stats, opt_state, count = carry

        def loss_and_stats(params: Any) -> tuple[Array, Any]:
            x, y = jax.tree.map(lambda leaf: leaf[index], (data.train_x, data.train_y))
            outputs, updates = model.apply(
                {"params": params, "batch_stats": stats},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": jax.random.fold_in(noise, count)},
            )
            return loss(outputs, y), updates.get("batch_stats", {})

        (value, stats), gradient = jax.value_and_grad(loss_and_stats, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state, count + 1), value

    def steps_and_test(carry: Any, indices: Array) -> tuple[Any, tuple[Array, Any]]:
        carry, values = jax.lax.scan(step, carry, indices)
        params, stats, *_ = carry
        return carry, (values, evaluate({"params": params, "batch_stats": stats}))

    order = data_order(shuffles, len(data.train_y), schedule)
    start = (params, stats, optimizer.init(params), jnp.int32(0))
    (params, stats, *_), (values, found) = jax.lax.scan(steps_and_test, start, order)
    return History(values.reshape(-1), found, {"params": params, "batch_stats": stats})


def data_order(key: Array, examples: int, schedule: Schedule) -> Array:
    """Indices (evaluations, evaluate_every, batch_size): a fresh shuffle each epoch, its remainder dropped."""
    steps, batch_size, evaluate_every = schedule
    if not 0 < batch_size <= examples:
        raise ValueError(f"batch_size must be from 1 to the {examples} examples there are, got {batch_size}")
    if steps % evaluate_every:
        raise ValueError(f"steps ({steps}) must be a multiple of evaluate_every ({evaluate_every})")
    per_epoch = examples // batch_size
    keys = jax.random.split(key, -(-steps // per_epoch))
    epochs = jax.vmap(lambda key: jax.random.permutation(key, examples))(keys)
    batches = epochs[:, : per_epoch * batch_size].reshape(-1, batch_size)
    return batches[:steps].reshape(-1, evaluate_every, batch_size)


def seeds(configuration: dict[str, Any]) -> Array:
    """A random key for each of the configuration's `seeds`, from its `seed`: the same for every method compared."""
    return jax.random.split(jax.random.key(configuration["seed"]), configuration["seeds"])


def at_best(every: Callable[..., Any], configuration: dict[str, Any], settings: Any, *data: Any) -> dict[str, Any]:
    """What `every(keys, settings, *data)`, a dict, has on the measured seeds at the setting that other seeds choose.

    `every` is a run, jitted and batched over pairs of a key and a setting: a learning rate, or a row of several
    numbers. Each of `settings` is tried on the first `choosing_seeds`; the other seeds are measured at that of the
    lowest mean "error". The result has the measured seeds first, the "setting", and its "error_of_choice".
    """
    keys, tried, choosing = seeds(configuration), np.array(settings, np.float32), configuration["choosing_seeds"]
    found = wait(every(jnp.repeat(keys[:choosing], len(tried)), np.concatenate([tried] * choosing), *data))
    errors = np.reshape(found["error"], (choosing, -1)).mean(0)
    best, measured = tried[errors.argmin()], keys[choosing:]
    chosen = {"setting": best, "error_of_choice": errors.min()}
    return {**chosen, **wait(every(measured, np.stack([best] * len(measured)), *data))}


def wait(tree: Any) -> Any:
    """`jax.block_until_ready` that hears Ctrl-C while it waits."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(tree)):
        time.sleep(0.01)
    return jax.block_until_ready(tree)
