"""Batch renormalization: training sees what inference will, for batches that are small or not independent."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jbn._functions import checks
from jbn._functions.batch_norm import Activation, BNParams, BNState, Implementation, bn_train
from jbn._functions.virtual import check_virtual, each
from jbn._op.partition import beside
from jbn._op.plan import choose, compute_dtype


def brn_train(
    params: BNParams,
    state: BNState,
    x: ArrayLike,
    *,
    r_max: float | jax.Array,
    d_max: float | jax.Array,
    axis: int = -1,
    momentum: float | jax.Array = 0.99,
    epsilon: float | jax.Array = 1e-5,
    mask: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    activation: Activation | None = None,
    dtype: DTypeLike | None = None,
    virtual_batch_size: int | None = None,
    unbiased: bool = False,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, BNState]:
    """Normalises `x` with its own statistics, corrected towards the running state, which moves as in `bn_train`.

    With σ_B = √(var_B + epsilon) of the batch and σ = √(var + epsilon) of the state given,

        r = clip(σ_B / σ, 1 / r_max, r_max)         d = clip((mean_B − mean) / σ, −d_max, d_max)
        y = activation(scale · (r · (x − mean_B) / σ_B + d) + bias + residual)

    where r and d are constants for the gradient. Where neither is clipped, y is `bn_eval`'s under the state given, so
    inference sees what training saw. With r_max=1 and d_max=0 this is `bn_train`, bit for bit: begin so, then relax
    both (the paper reaches 3 and 5). Where the bounds are traced it is that still, but to the last rounding of a sum
    with virtual batches, or with a residual and no bias.

    Args:
      r_max: largest correction of the scale, ≥ 1; may be traced, e.g. an optax schedule of the step.
      d_max: largest correction of the mean in running standard deviations, ≥ 0; may be traced.

    The other arguments, dtypes, results and errors are those of `bn_train`. Each virtual batch has its own r and d; a
    channel without data has r = 1 and d = 0. Inference is `bn_eval`.

    Source: Ioffe (2017), Batch Renormalization, algorithm 1 (https://arxiv.org/abs/1702.03275); the running average is
    of the variance, where the paper's is of σ, so that one state serves both.
    """
    x = checks.check_input(x)
    channel = checks.check_axis(axis, x)
    checks.check_vectors("params", params, BNParams, x.shape[channel], x, axis)
    checks.check_vectors("state", state, BNState, x.shape[channel], x, axis)
    r_max = checks.check_between("r_max", r_max, 1, float("inf"))
    d_max = checks.check_between("d_max", d_max, 0, float("inf"))
    mask = checks.check_mask(mask, x)
    names = checks.check_names(axis_name, axis_index_groups)
    virtual = check_virtual(virtual_batch_size, x, channel, names)
    kind = compute_dtype(x.dtype)
    running = jax.tree.map(lambda v: lax.stop_gradient(beside(jnp.asarray(v).astype(kind), x, channel)), state)
    params = BNParams(*(None if v is None else beside(jnp.asarray(v), x, channel) for v in params))
    sync = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
    common = {"axis": axis, "epsilon": epsilon, "implementation": implementation}
    shaping = common | {"activation": activation, "dtype": dtype}

    def corrected(x, mask, **sync) -> BNParams:
        """Parameters that make r · x̂ + d of x̂ before scale and bias."""
        # momentum 0: the new state is the batch's statistics, by bn_train's own arithmetic, or where there are none the
        # old state, for which r = 1 and d = 0; jit computes neither this y nor the statistics a second time
        unused = BNParams(None, None)
        _, batch = bn_train(unused, running, lax.stop_gradient(x), mask=mask, momentum=0.0, **common, **sync)
        wide, high, most = (jnp.asarray(v).astype(kind) for v in (epsilon, r_max, d_max))
        std, running_std = jnp.sqrt(batch.var + wide), jnp.sqrt(running.var + wide)
        # without room for a correction there is none, even where the state is NaN
        r = lax.stop_gradient(choose(high > 1, jnp.clip(std / running_std, 1 / high, high), 1))
        d = (batch.mean - running.mean) / running_std
        d = lax.stop_gradient(choose(most > 0, jnp.clip(d, -most, most), 0))
        scale, bias = (None if v is None else v.astype(kind) for v in params)
        d = d if scale is None else scale * d
        return BNParams(r if scale is None else scale * r, d if bias is None else bias + d)

    moving = {"momentum": momentum, "unbiased": unbiased, "virtual_batch_size": virtual_batch_size}
    identity = all(isinstance(v, float | int) for v in (r_max, d_max)) and r_max == 1 and d_max == 0
    new_params = params if virtual or identity else corrected(x, mask, **sync)
    y, new_state = bn_train(new_params, state, x, mask=mask, residual=residual, **shaping, **moving, **sync)
    if virtual and not identity:  # of that y nothing is computed under jit either
        shared = {"axis_name": virtual.sync.names or None, "axis_index_groups": virtual.sync.groups}

        def normalized(x, residual, mask):
            own = corrected(x, mask, **shared)
            return bn_train(own, running, x, mask=mask, residual=residual, **shaping, **shared)

        if virtual.members > 1:
            y, _ = normalized(x, residual, mask)
        else:
            y, _ = each(normalized, virtual, x, residual, mask, implementation)
    return y, new_state
