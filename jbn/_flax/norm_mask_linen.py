"""Which parameters of a linen model are those of norms."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.core import FrozenDict, freeze, unfreeze


def norm_mask(params: Mapping[str, Any]) -> Any:
    """A tree of `params`' structure, True where a leaf is the scale or bias of a norm.

    A norm is a module whose parameters are called scale and bias, and are nothing else: Flax's batch, layer, group,
    instance and RMS norms and ours, and no other layer of Flax's; modules of one's own with such parameters too.

    Usage, as a mask or as labels:

        optax.adamw(1e-3, mask=lambda p: jax.tree.map(operator.not_, jbn.linen.norm_mask(p)))  # no decay of norms
        optax.chain(optax.sgd(1e-3), optax.masked(optax.set_to_zero(), jbn.linen.norm_mask))  # norms are frozen

    The second leaves the parameters of norms as they are; running statistics stay with `use_running_average=True`,
    which `jbn.linen.replacing(use_running_average=True)` says to any model.

    Args:
      params: a model's parameters, `variables["params"]`, or gradients.

    Raises:
      TypeError: `params` is no mapping, a model for instance.
      ValueError: it is `variables`, with params in it; or there is no norm.
    """
    if not isinstance(params, Mapping):
        raise TypeError(f"params is a {type(params).__name__}, expected a mapping: give variables['params']")
    if "params" in params:
        raise ValueError(f"params has the entries {', '.join(params)}, as variables have: give variables['params']")
    mask = _mask(unfreeze(params) if isinstance(params, FrozenDict) else params)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"params, of {', '.join(list(params)[:5])}, have no norm, a module of scale and bias alone: there is "
            "nothing to mask"
        )
    return freeze(mask) if isinstance(params, FrozenDict) else mask


def _mask(tree: Mapping[str, Any]) -> dict[str, Any]:
    inner = {name: value for name, value in tree.items() if isinstance(value, Mapping)}
    norm = not inner and set(tree) <= {"scale", "bias"}  # names, for optax may have masked leaves away
    return {
        name: _mask(value) if name in inner else jax.tree.map(lambda _: norm, value) for name, value in tree.items()
    }
