"""Population statistics: the running state that a whole data set would give, from its moments."""

import jax.numpy as jnp

from jbn._functions.batch_norm import BNState
from jbn._functions.moments import Moments


def population_state(moments: Moments, unbiased: bool = False) -> BNState:
    """The state of exact statistics: mean = Σx / n and var = Σ(x − mean)² / n of all that `moments` saw.

    Args:
      moments: of the data set, as `jbn.moments` gives them for one array and `jbn.merge` for several.
      unbiased: var = Σ(x − mean)² / max(n − 1, 1) instead, as Ioffe and Szegedy do and PyTorch stores.

    Returns:
      `BNState`, vectors `(C,)` in the moments' dtype. A channel of which nothing was seen gets mean 0 and var 1, as
      from `bn_init`.

    Raises:
      TypeError: if `moments` is not `Moments`.

    Source: Ioffe, Szegedy (2015), Batch Normalization, algorithm 2, step 10 (https://arxiv.org/abs/1502.03167),
    with one variance over all values in place of the mean of the batches' variances.
    """
    if not isinstance(moments, Moments):
        raise TypeError(f"moments is a {type(moments).__name__}, expected jbn.Moments: make it with jbn.moments(x)")
    seen = jnp.asarray(moments.count) > 0
    return BNState(jnp.where(seen, moments.mean, 0), jnp.where(seen, moments.variance(unbiased), 1))
