"""Batch normalization in plain jax.numpy and lax's collectives: what jax itself derives, batches and lowers.

For comparing transformations; `oracle.py` judges the values. Inputs are finite.
"""

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    None: lambda z: z,
    "relu": jax.nn.relu,
    "relu6": jax.nn.relu6,
    "leaky_relu": jax.nn.leaky_relu,
    "silu": jax.nn.silu,
    "hard_swish": jax.nn.hard_swish,
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda z: jax.nn.gelu(z, approximate=False),
    "mish": jax.nn.mish,
    "elu": jax.nn.elu,
    "sigmoid": jax.nn.sigmoid,
    "tanh": jnp.tanh,
    "leaky_relu(0.2)": lambda z: jax.nn.leaky_relu(z, 0.2),
}


def bn_train(
    params,
    state,
    x,
    *,
    axis=-1,
    momentum=0.99,
    epsilon=1e-5,
    mask=None,
    residual=None,
    activation=None,
    virtual_batch_size=None,
    unbiased=False,
    axis_name=None,
    axis_index_groups=None,
):
    across = _across(axis_name, axis_index_groups)
    rows = _grouped(x, axis, virtual_batch_size)
    valid = jnp.ones_like(rows, bool)
    if mask is not None:
        valid = _grouped(jnp.broadcast_to(mask, x.shape), axis, virtual_batch_size)
    running = jax.lax.stop_gradient(state)
    _, mean, var = _moments(rows, valid, running, _across(None, None) if virtual_batch_size else across)
    y = _finish(params, x, rows, mean, var, axis, epsilon, residual, activation)
    rows, valid = (a.reshape(1, -1, a.shape[-1]) for a in (rows, valid))
    n, mean, var = jax.lax.stop_gradient(_moments(rows, valid, running, across))
    n, mean, var = n[0, 0], mean[0, 0], var[0, 0]
    if unbiased:
        var = var * jnp.where(n > 0, n / jnp.maximum(n - 1, 1), 1)
    weight = jnp.where(n > 0, momentum, 1).astype(x.dtype)
    old = type(state)(*running)
    return y, type(state)(weight * old.mean + (1 - weight) * mean, weight * old.var + (1 - weight) * var)


def bn_eval(params, state, x, *, axis=-1, epsilon=1e-5, residual=None, activation=None):
    rows = _grouped(x, axis, None)
    mean, var = (a[None, None] for a in state)
    return _finish(params, x, rows, mean, var, axis, epsilon, residual, activation)


def _finish(params, x, rows, mean, var, axis, epsilon, residual, activation):
    scale, bias = params
    z = (rows - mean) / jnp.sqrt(var + epsilon)
    z = z if scale is None else z * scale[None, None]
    z = z if bias is None else z + bias[None, None]
    z = jnp.moveaxis(z.reshape(jnp.moveaxis(x, axis, -1).shape), -1, axis)
    return ACTIVATIONS[activation](z if residual is None else z + residual)


def _grouped(a, axis, virtual_batch_size):
    a = jnp.moveaxis(a, axis, -1)
    return a.reshape(a.shape[0] // virtual_batch_size if virtual_batch_size else 1, -1, a.shape[-1])


def _moments(rows, valid, running, across):
    """Two passes; the running state where nothing is valid."""
    n = across(valid.sum(1, keepdims=True).astype(rows.dtype))
    mean = across(jnp.where(valid, rows, 0).sum(1, keepdims=True)) / jnp.maximum(n, 1)
    var = across(jnp.where(valid, (rows - mean) ** 2, 0).sum(1, keepdims=True)) / jnp.maximum(n, 1)
    old_mean, old_var = (a[None, None] for a in running)
    return n, jnp.where(n > 0, mean, old_mean), jnp.where(n > 0, var, old_var)


def _across(name, groups):
    """The sum over the members of a named axis, or over those of the own group."""
    if name is None:
        return lambda v: v
    if groups is None:
        return lambda v: jax.lax.psum(v, name)
    peers = jnp.array([group for i in range(sum(map(len, groups))) for group in groups if i in group])
    return lambda v: jax.lax.all_gather(v, name)[peers[jax.lax.axis_index(name)]].sum(0)
