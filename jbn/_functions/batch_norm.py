"""Batch normalization as pure functions: parameters and running state go in, the output and new state come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.export import register_namedtuple_serialization
from jax.typing import ArrayLike, DTypeLike

from jbn._functions import checks
from jbn._functions.eager import one_program
from jbn._functions.renorm import Renorm, check_renorm, corrected
from jbn._functions.virtual import Virtual, check_virtual, each
from jbn._op.merging import Statistics, pool_along
from jbn._op.normalize import Running, Terms, normalize_eval, normalize_train
from jbn._op.partition import beside, like
from jbn._op.pieces import synchronise
from jbn._op.plan import Options, Plan, compute_dtype, row_count, where
from jbn._op.sync import Sync, splittable

Activation = (
    Literal["relu", "relu6", "leaky_relu", "silu", "hard_swish", "gelu", "gelu_exact", "mish", "elu", "sigmoid", "tanh"]
    | Callable[[jax.Array], jax.Array]
)
Implementation = Literal["xla", "triton"]
_TINY = float(jnp.finfo(jnp.float32).tiny)  # what is less may be 0 to a device


@partial(register_namedtuple_serialization, serialized_name="jbn.BNParams")  # in programs that are exported
class BNParams(NamedTuple):
    """Learned parameters.

    Attributes:
      scale: γ, `(C,)`, or None for 1.
      bias: β, `(C,)`, or None for 0.
    """

    scale: jax.Array | None
    bias: jax.Array | None


@partial(register_namedtuple_serialization, serialized_name="jbn.BNState")  # in programs that are exported
class BNState(NamedTuple):
    """Running statistics, `(C,)` each: exponential averages of the batches' mean and variance."""

    mean: jax.Array
    var: jax.Array


def bn_init(
    num_features: int, *, use_scale: bool = True, use_bias: bool = True, dtype: DTypeLike = jnp.float32
) -> tuple[BNParams, BNState]:
    """Parameters scale = 1, bias = 0 in `dtype`, and state mean = 0, var = 1.

    Args:
      num_features: C, the number of channels.
      use_scale: False leaves the scale out (None).
      use_bias: False leaves the bias out (None).
      dtype: of the parameters; the state is float32, or float64 for float64.

    Raises:
      TypeError, ValueError: if `num_features` is not a positive integer or `dtype` not a float.
    """
    channels = checks.check_positive("num_features", num_features, "a positive integer", "give x.shape[axis]")
    dtype = checks.check_dtype(dtype)
    params = BNParams(
        jnp.ones(channels, dtype) if use_scale else None, jnp.zeros(channels, dtype) if use_bias else None
    )
    kept = compute_dtype(dtype)
    return params, BNState(jnp.zeros(channels, kept), jnp.ones(channels, kept))


def bn_train(
    params: BNParams,
    state: BNState,
    x: ArrayLike,
    *,
    axis: int = -1,
    momentum: float | jax.Array = 0.99,
    epsilon: float | jax.Array = 1e-5,
    mask: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    dtype: DTypeLike | None = None,
    virtual_batch_size: int | None = None,
    unbiased: bool = False,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    implementation: Implementation | None = None,
    renorm: Renorm | None = None,
) -> tuple[jax.Array, BNState]:
    """Normalises `x` with its own statistics, and moves the running state towards them.

    y = activation(scale · (x − mean) / √(var + epsilon) + bias + residual), where mean and var = Σ(x − mean)² / n are
    taken over all axes but `axis`, where `mask` is True; new state = momentum · state + (1 − momentum) · statistics.
    Units do not matter where every (x − mean)² is finite, in float32 |x − mean| < 1.8e19, and standard deviations are
    beyond 1e-15; kernels need Σ(x − mean)² to be finite too. Past that the new var is infinite, and x̂ is 0.
    In float32 the mean is rounded, as x was, and y errs by up to scale · 6e-8 · |mean| / std: what is left of the mean
    would be one more vector for kernels to read and devices to exchange.

    Args:
      params: `BNParams`, vectors `(C,)` or None.
      state: `BNState`, vectors `(C,)`; the new state has its dtypes.
      x: float16, bfloat16, float32 or float64, any rank ≥ 1, C channels along `axis`. Statistics and arithmetic are
        float32 (float64 for float64).
      axis: position of the channels.
      momentum: weight of the old state, in [0, 1] (PyTorch's is that of the new). 0 leaves the old state out, 1 the
        statistics, even where that is NaN or inf.
      epsilon: added to the variance, ≥ 0, in squared units of x.
      mask: bool, of x's rank and broadcastable to it: which positions enter the statistics. All are normalised. A
        channel without any is normalised with the running state, which then stays. A masked position that is not
        finite reaches no other, in values or gradients of this function. A layer before it is another matter: the
        gradient of its kernel is 0 · NaN where padding is NaN, so give the network jnp.where(mask, x, 0).
      residual: of x's shape, added before the activation.
      activation: None, or what is applied last, in the arithmetic of the map: "relu", "relu6", "leaky_relu", "silu",
        "hard_swish" and "mish" as in `jax.nn`; "gelu" by tanh, as `jax.nn.gelu` is by default, "gelu_exact" by erf,
        as PyTorch's is; "elu" (alpha 1), "sigmoid", "tanh". For a backward pass nothing is kept for it. Any function
        may be given in place of a name, and is called on y, of y's dtype, outside: JAX keeps what it needs.
      negative_slope: of "leaky_relu" below 0; a number that is known at tracing.
      dtype: of y; None for x's.
      virtual_batch_size: k normalises each run of k examples along the first axis that is not `axis` with its own
        statistics (ghost batch norm, Hoffer et al. 2017); the state sees the merged ones. Devices that hold whole runs
        send each other nothing for y. With `axis_name` members' examples are consecutive, and a run of k may be shared
        by several of them.
      unbiased: the state keeps var · n / max(n − 1, 1), as PyTorch does. y always uses the biased one.
      axis_name: one or several axes bound by `shard_map`, `pmap` or `vmap`, whose members share the statistics,
        weighted by their counts (what several of them hold counts several times). Without it they are each member's
        own. (Under plain `jit` they are global.) A name of `vmap` inside `shard_map` needs its `check_vma=False`.
      axis_index_groups: with one `axis_name`: equal groups of its indices that share statistics among themselves.
      implementation: "xla", "triton", or None to choose; a named one never falls back.
      renorm: `jbn.Renorm(r_max, d_max)` corrects y towards the running state (batch renormalization, Ioffe 2017).

    Returns:
      y, of x's shape, and the new state, which carries no gradient.

    Raises:
      TypeError, ValueError: for an argument out of contract, naming it, at tracing.

    Source: Ioffe, Szegedy (2015), Batch Normalization, algorithm 1 (https://arxiv.org/abs/1502.03167).
    """
    inside, outside = checks.check_activation(activation, negative_slope)
    plan, *arrays = _prepare(params, state, x, axis, epsilon, residual, inside, dtype, implementation)
    *_, x, _, residual = arrays
    mask = checks.check_mask(mask, x)
    momentum = checks.check_between("momentum", momentum, 0, 1)
    sync = checks.check_names(axis_name, axis_index_groups)
    virtual = check_virtual(virtual_batch_size, x, plan.channel, sync)
    renorm = check_renorm(renorm)
    plan = plan._replace(centred=True, options=Options.of(inside, residual, mask))
    known = isinstance(momentum, float | int)
    count = row_count(plan, x)
    mixes = mask is None and isinstance(count, int) and count > 0 and known and _TINY <= momentum < 1
    fixed = _Training(plan, sync, virtual, checks.check_flag("unbiased", unbiased), mixes)
    # of a number its rest to 1 is exact
    y, state = _train(fixed, *arrays, mask, momentum, 1 - momentum if known else None, renorm)
    return called(outside, y), state


def bn_eval(
    params: BNParams,
    state: BNState,
    x: ArrayLike,
    *,
    axis: int = -1,
    epsilon: float | jax.Array = 1e-5,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    dtype: DTypeLike | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Normalises `x` with the running state: y = activation(scale · (x − mean) / √(var + epsilon) + bias + residual).

    Arguments, dtypes and errors are those of `bn_train`; every array argument, the state too, carries its gradient.

    Source: Ioffe, Szegedy (2015), Batch Normalization, algorithm 2 (https://arxiv.org/abs/1502.03167).
    """
    inside, outside = checks.check_activation(activation, negative_slope)
    arguments = _prepare(params, state, x, axis, epsilon, residual, inside, dtype, implementation)
    return called(outside, _eval(*arguments))


def called(function: Callable | None, y: jax.Array) -> jax.Array:
    """function(y), if there is one, in y's dtype.

    Raises:
      ValueError: it returns something else than an array of y's shape.
    """
    if function is None:
        return y
    found = function(y)
    if getattr(found, "shape", None) != y.shape:
        got = f"an array of shape {found.shape}" if hasattr(found, "shape") else f"a {type(found).__name__}"
        raise ValueError(
            f"activation {checks.activation_name(function)} returned {got}, expected y's shape {y.shape}: call what "
            "changes it on the output of batch norm"
        )
    return jnp.asarray(found, y.dtype)


class _Training(NamedTuple):
    """What of a call in training is fixed at tracing."""

    plan: Plan
    sync: Sync
    virtual: Virtual | None
    unbiased: bool
    mixes: bool  # whether old state and statistics both have a weight, in every channel


def _prepare(params, state, x, axis, epsilon, residual, activation, dtype, implementation) -> tuple:
    """What training and inference share, checked: the plan, then `(params, state, x, epsilon, residual)` as arrays."""
    x = checks.check_input(x)
    channel = checks.check_axis(axis, x)
    params = checks.check_vectors("params", params, BNParams, x.shape[channel], x, axis)
    state = checks.check_vectors("state", state, BNState, x.shape[channel], x, axis)
    residual = checks.check_residual(residual, x)
    epsilon = checks.check_between("epsilon", epsilon, 0, float("inf"))
    checks.check_implementation(implementation)
    plan = Plan(
        channel,
        batch=0,
        count=1,
        centred=False,
        activation=activation,
        dtype=x.dtype if dtype is None else checks.check_dtype(dtype),
        sync=Sync(),
        may_partition=splittable(),
        implementation=implementation,
        options=Options.of(activation, residual, None),
    )
    return plan, params, state, x, epsilon, residual


@partial(one_program, static_argnums=0)
def _train(fixed: _Training, params, state, x, epsilon, residual, mask, momentum, rest, renorm):
    plan, sync, virtual, unbiased, mixes = fixed
    mask = like(mask, x)
    terms = _terms(plan, params, x, epsilon, residual)
    state = jax.tree.map(lax.stop_gradient, state)
    running = _running(plan, state, x)

    def normalize(plan, x, terms, mask):
        if renorm is not None:
            terms = corrected(renorm, plan, x, terms, mask, running)
        return normalize_train(plan, x, terms, mask, running)

    if virtual is None:
        y, seen = normalize(plan._replace(sync=sync), x, terms, mask)
    else:
        y, seen = _normalize_virtual(normalize, plan, virtual, sync, x, terms, mask)
    move = partial(_mixed if mixes else _moved, seen.count, momentum, rest)
    return y, BNState(move(state.mean, seen.mean), move(state.var, seen.variance(unbiased)))


@partial(one_program, static_argnums=0)
def _eval(plan: Plan, params, state, x, epsilon, residual):
    return normalize_eval(plan, x, _terms(plan, params, x, epsilon, residual), _running(plan, state, x))


def _terms(plan: Plan, params: BNParams, x, epsilon, residual) -> Terms:
    """The parameters in the dtype of the arithmetic, and the residual, which lie as x does."""
    kind = compute_dtype(x.dtype)
    scale, bias = (None if v is None else beside(v.astype(kind), x, plan.channel) for v in params)
    return Terms(scale, bias, like(residual, x), jnp.asarray(epsilon).astype(kind)[None])


def _running(plan: Plan, state: BNState, x) -> Running:
    return Running(*(beside(v.astype(compute_dtype(x.dtype)), x, plan.channel) for v in state))


def _normalize_virtual(
    normalize: Callable, plan: Plan, virtual: Virtual, sync: Sync, x, terms: Terms, mask
) -> tuple[jax.Array, Statistics]:
    """y, each virtual batch normalised by itself, and the moments of all of them."""
    if virtual.members > 1:
        y, seen = normalize(plan._replace(sync=virtual.sync), x, terms, mask)
        if virtual.sync == sync:
            return y, seen
        share = seen._replace(count=seen.count / virtual.members)
        return y, synchronise(plan._replace(sync=sync), share)

    def of_one(x, residual, mask):
        return normalize(plan._replace(may_partition=splittable()), x, terms._replace(residual=residual), mask)

    y, seen = each(of_one, virtual, x, terms.residual, mask, plan.implementation)
    return y, synchronise(plan._replace(sync=sync), pool_along(jax.tree.map(lax.stop_gradient, seen)))


def _mixed(count, momentum, rest, old, new):
    """momentum · old + (1 − momentum) · new, of positive weights; without gradient, in old's dtype."""
    del count
    kind = _kind(old, new)
    keep, take = (jnp.asarray(weight).astype(kind) for weight in (momentum, rest))
    return lax.stop_gradient((keep * old.astype(kind) + take * beside(new, old, 0).astype(kind)).astype(old.dtype))


def _moved(count, momentum, rest, old, new):
    """`_mixed`, where there were any statistics; a weight may be 0 and what it is of NaN or inf."""
    kind = _kind(old, new)
    count, new = beside(jnp.asarray(count), old, 0), beside(new, old, 0)
    keep = jnp.asarray(momentum).astype(kind)
    take = 1 - keep if rest is None else jnp.asarray(rest).astype(kind)
    keep, take = (jnp.where(count > 0, w, otherwise) for w, otherwise in ((keep, 1), (take, 0)))

    def weighted(weight, value):
        return where(weight > 0, weight * value, 0)

    mixed = weighted(keep.astype(kind), old.astype(kind)) + weighted(take.astype(kind), new.astype(kind))
    return lax.stop_gradient(mixed.astype(old.dtype))


def _kind(old, new) -> jnp.dtype:
    return compute_dtype(old.dtype if old.dtype == jnp.float64 else new.dtype)
