"""Batch normalization as a `flax.nnx` module: change the import, and nothing else.

Usage:

    from jbn.nnx import BatchNorm        # was: from flax.nnx import BatchNorm

    class Block(nnx.Module):
        def __init__(self, features, rngs):
            self.conv = nnx.Conv(features, features, (3, 3), use_bias=False, rngs=rngs)
            self.norm = BatchNorm(features, activation="relu", rngs=rngs)

        def __call__(self, x):
            return self.norm(self.conv(x), residual=x)

    block.train(); y = block(x)        # the batch's statistics; updates block.norm.mean and .var
    block.eval(); y = block(x)         # the running ones
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jbn import BNParams, BNState
from jbn._flax import replace_nnx
from jbn._flax.fold_nnx import Folded, fold
from jbn._flax.layer import bounds, check_features, feature_axis, left_to_flax, normalize, with_result_dtype
from jbn._flax.norm_mask_nnx import norm_mask
from jbn._flax.recalibrate_nnx import recalibrate
from jbn._flax.replace_shared import Replaced
from jbn._flax.signature import showing_constructor

__all__ = ["BatchNorm", "Folded", "Replaced", "fold", "norm_mask", "recalibrate", "replace"]


@showing_constructor(nnx.BatchNorm)
class BatchNorm(nnx.BatchNorm):
    """`flax.nnx.BatchNorm`, computed by `jbn.bn_train` and `jbn.bn_eval`.

    In training, with mean and variance of the batch taken over every axis of `x` but `axis`,

        y = activation((x − mean) / √(var + epsilon) · scale + bias + residual)
        self.mean, self.var ← momentum · (self.mean, self.var) + (1 − momentum) · (mean, var)

    With `use_running_average=True`, or after `model.eval()`, `mean` and `var` are `self.mean` and `self.var`,
    which stay as they are.

    Variables: `scale` and `bias`, `nnx.Param` of shape `(C,)` and dtype `param_dtype`, or None; `mean` and
    `var`, `nnx.BatchStat` of shape `(C,)`, float32. Names, shapes, dtypes and the order of random numbers are
    Flax's; checkpoints of one load in the other.

    Args:
      num_features: C.
      activation: None, or what is applied last: `"relu"`, `"relu6"`, `"leaky_relu"`, `"silu"`, `"hard_swish"`,
        `"gelu"` (by tanh, Flax's default), `"gelu_exact"`, `"mish"`, `"elu"`, `"sigmoid"`, `"tanh"`; or a function,
        which is called on the output (see `jbn.bn_train`).
      negative_slope: of `"leaky_relu"` below 0.
      virtual_batch_size: k normalizes each run of k examples with its own statistics (ghost batch norm);
        `mean` and `var` see the whole batch.
      unbiased: store the variance times n / max(n − 1, 1) in `var`, as PyTorch does.
      implementation: None chooses by platform; `"xla"` or `"triton"` never falls back.
      renorm: batch renormalization (Ioffe 2017, https://arxiv.org/abs/1702.03275; see `jbn.Renorm`): training is
        corrected towards the running statistics, so that it sees what inference will.
      r_max, d_max: the bounds of that correction, ≥ 1 and ≥ 0, for calls that name none. With 1 and 0 it is the plain
        layer, bit for bit; the paper begins there and reaches 3 and 5.
      **flax: every other argument of `flax.nnx.BatchNorm`, with its default; `rngs` is required.

    Where results differ from Flax's:
      * The variance does not cancel at large |mean| / std; `use_fast_variance` is accepted without effect.
      * A channel whose mask has no True position is normalized with `mean` and `var`, which then do not move.
        Flax: NaN.
      * Over `axis_name`, masked batches are weighted by their counts. Flax: the mean of the devices' means.
      * NaN at a masked position reaches no gradient of another position.
      * No gradient flows through the new `mean` and `var`.
      * A low-precision `dtype` is that of `y` alone: `x`, statistics and parameters are not rounded to it. A
        custom `promote_dtype` is called as in Flax, and does what it does.

    What `bn_train` does not take goes to Flax's own code: complex or integer `x`, another dtype than float16,
    bfloat16, float32 or float64, and several feature axes.

    Source: Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
    Internal Covariate Shift", https://arxiv.org/abs/1502.03167, algorithm 1.
    """

    def __init__(
        self,
        num_features: int,
        *,
        activation: str | Callable[[jax.Array], jax.Array] | None = None,
        negative_slope: float = 0.01,
        virtual_batch_size: int | None = None,
        unbiased: bool = False,
        implementation: str | None = None,
        renorm: bool = False,
        r_max: float | jax.Array | None = None,
        d_max: float | jax.Array | None = None,
        **flax: Any,
    ):
        super().__init__(num_features, **flax)
        self.activation = activation
        self.negative_slope = negative_slope
        self.virtual_batch_size = virtual_batch_size
        self.unbiased = unbiased
        self.implementation = implementation
        self.renorm = renorm
        self.r_max = r_max
        self.d_max = d_max

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
          x: any rank ≥ 1, `num_features` channels at `axis`.
          use_running_average: normalize with `mean` and `var` instead of the batch's own statistics; None: as
            the constructor, `train()`, `eval()` or `nnx.view` said last.
          mask: broadcastable to `x`, of lower rank by its last axes; where it is zero or False, `x` stays out of the
            statistics. (A layer before this one needs finite padding: see `jbn.bn_train`.)
          residual: of `x`'s shape, added before the activation.
          r_max, d_max: bounds of this call instead of the attributes, with `renorm`: numbers, or traced scalars such
            as `optax` schedules of the step. `nnx.view(model, r_max=…, d_max=…)` gives them to every layer.

        Returns:
          Array of `x`'s shape, in `dtype` (None: what `x`, statistics and parameters promote to).

        Raises:
          ValueError: `axis` out of range, a shape that does not fit, an unknown option, an option that a
            call left to Flax does not have, or bounds without `renorm`; each says which, and the remedy.
          TypeError: training with `renorm` and without a bound.
        """
        x = jnp.asarray(x)
        renorm = bounds(self, r_max, d_max)
        if use_running_average is None:
            use_running_average = self.use_running_average
        if left_to_flax(self, x, residual) or use_running_average is None:  # None: the error is Flax's
            return super().__call__(x, use_running_average, mask=mask)
        axis, remedy = feature_axis(self.axis, x), "make it with the channels of x"
        state = BNState(self.mean[...], self.var[...])
        check_features(x, axis, state.mean.size, f"num_features is {self.num_features}", remedy)
        scale = None if self.scale is None else self.scale[...]
        bias = None if self.bias is None else self.bias[...]
        if self.promote_dtype is promote_dtype:  # Flax's own rounds all five; here only the result
            mean, var = state
            x, dtype = with_result_dtype(x, self.dtype, mean, var, scale, bias)
        else:
            x, mean, var, scale, bias = self.promote_dtype((x, *state, scale, bias), dtype=self.dtype)
            x, dtype = with_result_dtype(x, self.dtype, scale, bias)
        y, state = normalize(
            self,
            BNParams(scale, bias),
            BNState(mean, var) if use_running_average else state,
            x,
            axis=axis,
            dtype=dtype,
            average=use_running_average,
            mask=mask,
            residual=residual,
            renorm=renorm,
        )
        if not use_running_average:
            self.mean[...], self.var[...] = state
        return y

    def set_view(
        self,
        use_running_average: bool | None = None,
        r_max: float | jax.Array | None = None,
        d_max: float | jax.Array | None = None,
    ):
        """Class method used by `nnx.view`.

        Args:
          use_running_average: whether to normalize with `mean` and `var` instead of the batch's own statistics.
          r_max, d_max: bounds of the correction with `renorm`.
        """
        super().set_view(use_running_average)
        if self.renorm:  # a view of a whole model passes plain layers by
            for name, bound in {"r_max": r_max, "d_max": d_max}.items():
                if bound is not None:  # a number is static, an array data
                    setattr(self, name, nnx.data(bound) if hasattr(bound, "dtype") else bound)


def replace(model: nnx.Module, **options: Any) -> Replaced:
    """Turns every `flax.nnx.BatchNorm` of a model into a `jbn.nnx.BatchNorm`, in place: no import has to change.

    Usage:

        model = TheirModel(rngs=nnx.Rngs(0))  # its layers are Flax's
        jbn.nnx.replace(model, axis_name="data")

    The layer stays the same object with the same variables, so that parameters, statistics, settings, sharding and
    other metadata, layers and variables that are shared, and an optimizer made before, all stay.

    Args:
      model: any module.
      **options: of `jbn.nnx.BatchNorm`, for every layer that is replaced: use_running_average, momentum, epsilon,
        dtype, axis_name, axis_index_groups, virtual_batch_size, unbiased, implementation, renorm, r_max, d_max. Layers
        keep what is not given, as well as axis and variables.

    Returns:
      `Replaced`. Left are layers that are ours, with the settings that they have, and subclasses, which may compute in
      their own way.

    Raises:
      TypeError: `model` is no module, or an option is not one of these.
      ValueError: the model has no batch norm, a value is out of range, or bounds come without renorm. After an error
        the model is as it was.
    """
    return replace_nnx.replace(model, BatchNorm, options)


def __dir__() -> list[str]:
    return __all__
