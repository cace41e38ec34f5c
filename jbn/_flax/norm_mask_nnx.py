"""Which parameters of an nnx model are those of norms."""

from typing import Any

import jax
from flax import nnx

NORMS = (nnx.BatchNorm, nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.InstanceNorm)


def norm_mask(model: nnx.Module, wrt: Any = nnx.Param) -> nnx.State:
    """A state as `nnx.state(model, wrt)`, with True in place of the scale or bias of a norm and False of all else.

    A norm is one of Flax's batch, layer, group, instance and RMS norms, ours, or of a class that inherits from them.

    Usage, as a mask or as labels:

        mask = jbn.nnx.norm_mask(model)
        optax.adamw(1e-3, mask=jax.tree.map(operator.not_, mask))  # no decay of norms
        optax.chain(optax.sgd(1e-3), optax.masked(optax.set_to_zero(), mask))  # norms are frozen

    The second leaves the parameters of norms as they are; running statistics stay after
    `model.set_attributes(nnx.BatchNorm, use_running_average=True)`, until `model.train()`.

    Args:
      model: any module.
      wrt: which variables, as for `nnx.Optimizer`.

    Raises:
      TypeError: `model` is no module, a state for instance, which does not say what has the variables.
      ValueError: among these variables there are none of a norm.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected an nnx.Module: give the model, not its state")
    norms = {path for path, node in nnx.iter_graph(model) if isinstance(node, NORMS)}
    state = nnx.state(model, wrt)
    mask = nnx.map_state(lambda path, _: path[:-1] in norms and path[-1] in ("scale", "bias"), state)
    if not any(jax.tree.leaves(mask)):
        raise ValueError(
            f"model, a {type(model).__name__}, has no norm with such variables: there is nothing to mask (norms are "
            f"{', '.join(norm.__name__ for norm in NORMS)} of flax.nnx)"
        )
    return mask
