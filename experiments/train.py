"""A whole training run as one function that can be jitted and vmapped: the steps are one `lax.scan`."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import Array

from experiments.data import Digits


class Schedule(NamedTuple):
    """How long to train: every `evaluate_every` of the `steps`, accuracy is taken on the whole test set."""

    steps: int
    batch_size: int
    evaluate_every: int


class History(NamedTuple):
    """Training loss (nats) at each step, and test accuracy (0 to 1) after each `evaluate_every` steps."""

    loss: Array
    accuracy: Array


def train(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    digits: Digits,
    key: Array,
    schedule: Schedule,
) -> History:
    """Trains `model` on cross-entropy, threading its running statistics; all randomness is from `key`.

    `model` is called as `model(images, train=True or False)`, with statistics, if any, in "batch_stats".
    """
    initial, shuffles = jax.random.split(key)
    variables = model.init(initial, digits.train_images[:1], train=False)
    params, stats = variables["params"], variables.get("batch_stats", {})

    def step(carry: Any, index: Array) -> tuple[Any, Array]:
        params, stats, opt_state = carry

        def loss_and_stats(params: Any) -> tuple[Array, Any]:
            images, labels = digits.train_images[index], digits.train_labels[index]
            logits, updates = model.apply(
                {"params": params, "batch_stats": stats}, images, train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            return loss, updates.get("batch_stats", {})

        (loss, stats), gradient = jax.value_and_grad(loss_and_stats, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    def steps_and_test(carry: Any, indices: Array) -> tuple[Any, History]:
        carry, loss = jax.lax.scan(step, carry, indices)
        params, stats, _ = carry
        logits: Any = model.apply({"params": params, "batch_stats": stats}, digits.test_images, train=False)
        # argmax of NaN is class 0: count an answer only where there is one
        right = (logits.argmax(-1) == digits.test_labels) & jnp.isfinite(logits).all(-1)
        return carry, History(loss, right.mean())

    order = data_order(shuffles, len(digits.train_labels), schedule)
    _, history = jax.lax.scan(steps_and_test, (params, stats, optimizer.init(params)), order)
    return History(history.loss.reshape(-1), history.accuracy)


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


def wait(tree: Any) -> Any:
    """`jax.block_until_ready` that hears Ctrl-C while it waits."""
    while not all(leaf.is_ready() for leaf in jax.tree.leaves(tree)):
        time.sleep(0.01)
    return jax.block_until_ready(tree)
