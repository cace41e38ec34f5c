"""Single batch norms from PyTorch and Keras and back."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jbn._functions.batch_norm import BNParams, BNState
from jbn._functions.checks import check_between

KERAS_CALLS = {  # options of Keras's layer that are arguments of ours, and where they go
    "axis": "give that axis to bn_train and bn_eval",
    "renorm": "give bn_train a jbn.Renorm or Flax modules renorm=True, leave the weights of renorm out of weights",
    "virtual_batch_size": "give it to bn_train",
    "synchronized": "under jit statistics are global anyway, in shard_map give bn_train an axis_name",
}


class Layer(NamedTuple):
    """A batch norm: `bn_train(params, state, x, momentum=…, epsilon=…, unbiased=…)` goes on where the other stopped."""

    params: BNParams
    state: BNState
    momentum: float  # weight of the old state
    epsilon: float
    unbiased: bool


def from_torch(state_dict: Mapping[str, Any], prefix: str = "", *, momentum: float = 0.1, eps: float = 1e-5) -> Layer:
    """A `torch.nn.BatchNorm1d`, `2d`, `3d` or `SyncBatchNorm`.

    Args:
      state_dict: names to tensors or NumPy arrays, of the layer or of a model that has it. Half precision becomes
        float32, in which running statistics move.
      prefix: the layer's name in the model, such as `"layer1.0.bn1"`; "" for a layer's own state_dict.
      momentum: as given to the PyTorch layer, the weight of the *new* statistics; not in a state_dict.
      eps: as given to the PyTorch layer; not in a state_dict.

    PyTorch's `momentum=None`, the average over all batches so far, is `bn_train` with `momentum=n / (n + 1)`, where n,
    the number of batches before this one, may be traced: it starts from `num_batches_tracked`.

    Raises:
      TypeError: `state_dict` is no mapping, a module for instance.
      KeyError: a running statistic is missing, as with `track_running_stats=False`.
      ValueError: `momentum` (None too, for a layer's momentum is one number) or `eps` out of range; tensors of several
        shapes, or a negative variance.
    """
    check_state_dict(state_dict)
    if momentum is None:
        raise ValueError(
            "momentum is None, PyTorch's average over all batches so far, whose weight changes from batch to batch: "
            "leave it out, and train with bn_train(..., momentum=n / (n + 1), unbiased=True), where n counts the "
            "batches before this one, from state_dict's num_batches_tracked on"
        )
    check_between("momentum", momentum, 0, 1)
    check_between("eps", eps, 0, float("inf"))
    at = inside(prefix)
    for name in ("running_mean", "running_var"):
        if at + name not in state_dict and any(at + other in state_dict for other in ("weight", "bias")):
            raise KeyError(
                f"state_dict has weights of {prefix!r} and no {at + name!r}: a layer with track_running_stats=False "
                "has no running statistics and normalises with the batch's own at inference too: take its weight and "
                "bias as jbn.BNParams, the state of jbn.bn_init, and call bn_train always"
            )
        if at + name not in state_dict:
            near = ", ".join(sorted(k for k in state_dict if k.endswith(name))[:3]) or "none"
            raise KeyError(f"state_dict has no {at + name!r}: check prefix={prefix!r} (names like it: {near})")
    names = [at + name for name in ("weight", "bias", "running_mean", "running_var")]
    found = [array(state_dict[name]) if name in state_dict else None for name in names]
    return _layer("state_dict", names, found, complement(momentum), eps, unbiased=True)


def to_torch(layer: Layer, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The reverse of `from_torch`.

    Returns:
      The state_dict, of NumPy arrays (`{k: torch.as_tensor(v) for …}` is what `load_state_dict` takes), and the
      arguments `eps`, `momentum` and `affine` for the layer's constructor. PyTorch has weight and bias together: of
      one alone the other is filled with 1 or 0.

    Raises:
      TypeError: `layer` is none.
      ValueError: `unbiased` is False, which PyTorch's layer does not have.
    """
    _check_layer(layer)
    if not layer.unbiased:
        raise ValueError(
            "layer has unbiased=False, and PyTorch's batch norm stores the unbiased variance when it trains on: if "
            "that may be (inference is the same), give layer._replace(unbiased=True)"
        )
    at, (scale, bias) = inside(prefix), layer.params
    mean, var = (np.asarray(v) for v in layer.state)
    weights = {}
    affine = scale is not None or bias is not None
    if affine:
        weights["weight"] = np.ones_like(mean) if scale is None else np.asarray(scale)
        weights["bias"] = np.zeros_like(mean) if bias is None else np.asarray(bias)
    weights |= {"running_mean": mean, "running_var": var, "num_batches_tracked": np.zeros((), np.int64)}
    options = {"eps": layer.epsilon, "momentum": complement(layer.momentum), "affine": affine}
    return {at + name: value for name, value in weights.items()}, options


def from_keras(weights: Sequence[Any], config: Mapping[str, Any] | None = None) -> Layer:
    """A `keras.layers.BatchNormalization`.

    Args:
      weights: `layer.get_weights()`: gamma (with `scale`), beta (with `center`), moving mean, moving variance.
      config: `layer.get_config()`, of which momentum, epsilon, center and scale are read; what is missing has Keras's
        default (0.99, 1e-3, True, True).

    Raises:
      TypeError: `weights` is the layer.
      ValueError: the number of weights is not what `config` says, or it has an option that is given to `bn_train`, not
        kept with the layer: an axis other than the last, renorm, virtual_batch_size, synchronized; arrays of several
        shapes, or a negative variance.
    """
    if hasattr(weights, "get_weights"):
        raise TypeError(f"weights is a {type(weights).__name__}: give layer.get_weights(), layer.get_config()")
    config = {"momentum": 0.99, "epsilon": 1e-3, "center": True, "scale": True} | dict(config or {})
    for name, remedy in KERAS_CALLS.items():
        value = config.get(name)
        if value is not None and value is not False and value not in (-1, [-1], (-1,)):
            raise ValueError(
                f"config has {name}={value!r}, which a Layer does not keep: {remedy}, and take {name!r} out of config"
            )
    expected = 2 + bool(config["scale"]) + bool(config["center"])
    if len(weights) != expected:
        raise ValueError(
            f"weights has {len(weights)} arrays, expected {expected} for scale={config['scale']} and "
            f"center={config['center']}: give layer.get_weights() and layer.get_config() of one layer"
        )
    check_between("config['momentum']", config["momentum"], 0, 1)
    check_between("config['epsilon']", config["epsilon"], 0, float("inf"))
    arrays = map(array, weights)
    scale = next(arrays) if config["scale"] else None
    bias = next(arrays) if config["center"] else None
    names = ["gamma", "beta", "moving_mean", "moving_variance"]
    return _layer("weights", names, [scale, bias, *arrays], config["momentum"], config["epsilon"], unbiased=False)


def to_keras(layer: Layer) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The reverse of `from_keras`: what `layer.set_weights` takes, and arguments of the layer's constructor.

    Raises:
      TypeError: `layer` is none.
      ValueError: `unbiased` is True, which Keras's layer does not have.
    """
    _check_layer(layer)
    if layer.unbiased:
        raise ValueError(
            "layer has unbiased=True, and Keras's batch norm stores the biased variance when it trains on: if that may "
            "be (inference is the same), give layer._replace(unbiased=False)"
        )
    scale, bias = layer.params
    arrays = [np.asarray(v) for v in (scale, bias, *layer.state) if v is not None]
    config = {"momentum": layer.momentum, "epsilon": layer.epsilon}
    return arrays, config | {"center": bias is not None, "scale": scale is not None}


def check_state_dict(state_dict: Any) -> None:
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"state_dict is a {type(state_dict).__name__}, expected a mapping of names to tensors: give "
            "module.state_dict()"
        )


def _check_layer(layer: Any) -> None:
    if not isinstance(layer, Layer):
        raise TypeError(
            f"layer is a {type(layer).__name__}, expected jbn.convert.Layer: give jbn.convert.Layer(params, state, "
            "momentum, epsilon, unbiased)"
        )


def _layer(argument: str, names: Sequence[str], found: Sequence[Any], *options: float, unbiased: bool) -> Layer:
    """Of scale, bias, mean, variance, the first two of which may be None; `options` are momentum and epsilon."""
    shapes = {name: value.shape for name, value in zip(names, found, strict=True) if value is not None}
    if len(set(shapes.values())) > 1 or any(len(shape) != 1 for shape in shapes.values()):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise ValueError(f"{argument} has {told}, expected one shape (C,): give the arrays of one batch norm")
    scale, bias, mean, var = found
    if np.min(var, initial=0) < 0:
        raise ValueError(
            f"{argument} has {names[-1]} with {np.min(var)}, expected no number below 0: check that the arrays are in "
            "order"
        )
    return Layer(BNParams(scale, bias), BNState(mean, var), *options, unbiased=unbiased)


def inside(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else prefix + "."


def complement(momentum: float) -> float:
    return round(1 - momentum, 15)  # 1 − 0.9 is not the float 0.1


def numpy(value: Any) -> np.ndarray:
    """Of a tensor or array; tensors have methods, so that torch is not imported."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none
            value = value.float()
    return np.asarray(value)


def array(value: Any):
    """A tensor or array as JAX's, half precision as float32."""
    found = numpy(value)
    kind = np.float32 if found.dtype in (jnp.float16, jnp.bfloat16) else found.dtype
    # a copy, as JAX shares memory with NumPy where it can; `jnp.asarray` would compile a program for each shape
    return jax.device_put(np.array(found, kind))
