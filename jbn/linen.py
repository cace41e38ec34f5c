"""Batch normalization as a `flax.linen` module: change the import, and nothing else.

Usage:

    from jbn.linen import BatchNorm        # was: from flax.linen import BatchNorm

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            y = nn.Conv(x.shape[-1], (3, 3), use_bias=False)(x)
            return BatchNorm(activation="relu")(y, use_running_average=not train, residual=x)

    y, updates = block.apply(variables, x, train=True, mutable=["batch_stats"])
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jbn import BNParams, BNState
from jbn._flax import replace_linen
from jbn._flax.fold_linen import Folded, fold
from jbn._flax.layer import bounds, check_features, feature_axis, left_to_flax, normalize, with_result_dtype
from jbn._flax.norm_mask_linen import norm_mask
from jbn._flax.recalibrate_linen import recalibrate
from jbn._flax.replace_shared import Replaced
from jbn._flax.signature import showing_constructor
from jbn._op.jax_internals import without_wrappers

__all__ = ["BatchNorm", "Folded", "Replaced", "fold", "norm_mask", "recalibrate", "replacing"]

_flax_call = without_wrappers(nn.BatchNorm.__call__)


@showing_constructor(nn.BatchNorm)
class BatchNorm(nn.BatchNorm):
    """`flax.linen.BatchNorm`, computed by `jbn.bn_train` and `jbn.bn_eval`.

    In training, with mean and variance taken over every axis of `x` but `axis`,

        y = activation((x − mean) / √(var + epsilon) · scale + bias + residual)
        batch_stats ← momentum · batch_stats + (1 − momentum) · (mean, var)

    With `use_running_average=True`, `mean` and `var` are those of `batch_stats`, which stay as they are.
    During initialization they stay too, and `axis_name` and `virtual_batch_size` have no effect.

    Variables: `params/scale` and `params/bias`, shape `(C,)`, dtype `param_dtype`; `batch_stats/mean` and
    `batch_stats/var`, shape `(C,)`, float32 (float64 after a float64 batch). Names, shapes, dtypes, the order
    of random numbers and automatic names (`BatchNorm_0`) are Flax's; checkpoints of one load in the other.

    Every attribute of `flax.linen.BatchNorm`, in its order and with its default, then:

    Attributes:
      activation: None, or what is applied last: `"relu"`, `"relu6"`, `"leaky_relu"`, `"silu"`, `"hard_swish"`,
        `"gelu"` (by tanh, Flax's default), `"gelu_exact"`, `"mish"`, `"elu"`, `"sigmoid"`, `"tanh"`; or a function,
        which is called on the output (see `jbn.bn_train`).
      negative_slope: of `"leaky_relu"` below 0.
      virtual_batch_size: k normalizes each run of k examples with its own statistics (ghost batch norm);
        `batch_stats` sees the whole batch.
      unbiased: store the variance times n / max(n − 1, 1) in `batch_stats`, as PyTorch does.
      implementation: None chooses by platform; `"xla"` or `"triton"` never falls back.
      renorm: batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275; see `jbn.Renorm`): training is
        corrected towards the running statistics, so that it sees what inference will.
      r_max, d_max: the bounds of that correction, ≥ 1 and ≥ 0, for calls that name none. With 1 and 0 it is the plain
        layer, bit for bit; the paper begins there and reaches 3 and 5.

    Where results differ from Flax's:
      * The variance does not cancel at large |mean| / std; `use_fast_variance` is accepted without effect.
      * A channel whose mask has no True position is normalized with the running statistics, which then do not
        move. Flax: NaN.
      * Over `axis_name`, masked batches are weighted by their counts. Flax: the mean of the devices' means.
      * NaN at a masked position reaches no gradient of another position.
      * No gradient flows through the new `batch_stats`.

    What `bn_train` does not take goes to Flax's own code: complex or integer `x`, another dtype than float16,
    bfloat16, float32 or float64, several feature axes, and `force_float32_reductions=False`.

    Source: Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", https://arxiv.org/abs/1502.03167, algorithm 1.
    """

    activation: str | Callable[[jax.Array], jax.Array] | None = None
    negative_slope: float = 0.01
    virtual_batch_size: int | None = None
    unbiased: bool = False
    implementation: str | None = None
    renorm: bool = False
    r_max: float | jax.Array | None = None
    d_max: float | jax.Array | None = None

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        use_running_average: bool | None = None,
        *,
        mask: jax.Array | None = None,
        residual: jax.Array | None = None,
        r_max: float | jax.Array | None = None,
        d_max: float | jax.Array | None = None,
    ) -> jax.Array:
        """Normalizes `x`.

        Args:
          x: any rank ≥ 1, channels at `axis`.
          use_running_average: normalize with `batch_stats` instead of the batch's own statistics. Given here
            or to the constructor, not to both.
          mask: broadcastable to `x`, of lower rank by its last axes; where it is zero or False, `x` stays out of the
            statistics. (A layer before this one needs finite padding: see `jbn.bn_train`.)
          residual: of `x`'s shape, added before the activation.
          r_max, d_max: bounds of this call instead of the attributes, with `renorm`: numbers, or traced scalars such
            as `optax` schedules of the step.

        Returns:
          Array of `x`'s shape, in `dtype` (None: what `x`, scale and bias promote to).

        Raises:
          ValueError: `axis` out of range, a shape that does not fit, an unknown option, an option that a
            call left to Flax does not have, or bounds without `renorm`; each says which, and the remedy.
          TypeError: training with `renorm` and without a bound.
        """
        x = jnp.asarray(x)
        renorm = bounds(self, r_max, d_max)
        if left_to_flax(self, x, residual):
            return _flax_call(self, x, use_running_average, mask=mask)
        use_running_average = nn.merge_param("use_running_average", self.use_running_average, use_running_average)
        axis = feature_axis(self.axis, x)
        shape = (x.shape[axis],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        remedy = "initialise the model for such x"
        check_features(x, axis, mean.value.size, f"batch_stats/mean has shape {mean.value.shape}", remedy)
        params = BNParams(
            self.param("scale", self.scale_init, shape, self.param_dtype) if self.use_scale else None,
            self.param("bias", self.bias_init, shape, self.param_dtype) if self.use_bias else None,
        )
        stats_dtype = jnp.dtype(x.dtype if self.dtype is None else self.dtype)
        x, dtype = with_result_dtype(x, self.dtype, *params)
        state = BNState(mean.value, var.value)
        initializing = self.is_initializing()  # on any batch, outside any axis_name: the statistics stay
        if not use_running_average:
            # Flax's running statistics become float64 with the first float64 batch, and are never below float32.
            wide = jnp.float64 if jnp.float64 in (stats_dtype, mean.value.dtype) else jnp.float32
            state = BNState(state.mean.astype(wide), state.var.astype(wide))
        y, state = normalize(
            self,
            params,
            state,
            x,
            axis=axis,
            dtype=dtype,
            average=use_running_average,
            mask=mask,
            residual=residual,
            renorm=renorm,
            alone=initializing,
        )
        if not (use_running_average or initializing):
            mean.value, var.value = state
        return y


def replacing(**options: Any) -> AbstractContextManager[Replaced]:
    """Inside, every `flax.linen.BatchNorm` of any model computes as `jbn.linen.BatchNorm`: no import has to change.

    Usage:

        model = TheirModel()  # its layers are Flax's
        with jbn.linen.replacing(virtual_batch_size=32) as seen:
            y, updates = jax.jit(train_step)(variables, x)

    Variables, their names and random numbers are those of the model without. Layers may be nested, lifted (`nn.scan`,
    `nn.vmap`, `nn.remat`, `nn.jit`), and called in functions that JAX traces. Being inside is part of JAX's keys: what
    was compiled outside is not used inside, nor the other way round, nor under other options; so enter it around the
    calls of a jitted function, or in that function. Outside all is as it was. Contexts may be nested, the innermost
    decides. It holds for the thread that enters it.

    Args:
      **options: of `jbn.linen.BatchNorm`, for every layer: momentum, epsilon, dtype, axis_name, axis_index_groups,
        virtual_batch_size, unbiased, implementation, renorm, r_max, d_max. `use_running_average` holds whatever the
        model says: True freezes the statistics. Layers keep what is not given, as well as axis and variables.

    Yields:
      `Replaced`, which fills while models are traced inside (a program compiled inside before is not traced again).
      Left are layers that are ours, and subclasses, which may compute in their own way.

    Raises:
      TypeError: an option that is not one of these.
      ValueError: a value out of range, or bounds without renorm.
    """
    return replace_linen.replacing(BatchNorm, options)


def __dir__() -> list[str]:
    return __all__
