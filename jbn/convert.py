"""Batch norm weights from PyTorch and Keras and back, whose conventions differ; neither has to be installed.

| | Flax, jbn | PyTorch | Keras |
|---|---|---|---|
| names | scale, bias, mean, var | weight, bias, running_mean, running_var | gamma, beta, moving_mean, moving_variance |
| momentum: weight of | the old state, 0.99 | the new statistics, 0.1 | the old state, 0.99 |
| epsilon | 1e-5 | 1e-5 (`eps`) | 1e-3 |
| stored variance | Σ(x − mean)² / n | Σ(x − mean)² / (n − 1) | Σ(x − mean)² / n |

The running variance is a value like any other, and is converted as it is: n is not in a checkpoint. What differs is
how it moves on, which `unbiased` says to `bn_train`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from jbn._check import check_between
from jbn.functional import BNParams, BNState

Kind = Literal["linen", "nnx"]
Names = Mapping[str, Sequence[str | int]]  # of a PyTorch layer: its path in the Flax model
DENSE = ("weight", "bias")  # in a state_dict, of a convolution too
NORM = (*DENSE, "running_mean", "running_var", "num_batches_tracked")


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
      state_dict: names to tensors or NumPy arrays, of the layer or of a model that has it. bfloat16 tensors become
        float32.
      prefix: the layer's name in the model, such as `"layer1.0.bn1"`; "" for a layer's own state_dict.
      momentum: as given to the PyTorch layer, the weight of the *new* statistics; not in a state_dict.
      eps: as given to the PyTorch layer; not in a state_dict.

    Raises:
      KeyError: a running statistic is missing, as with `track_running_stats=False`.
      ValueError: `momentum` (None too: a cumulative average has no counterpart) or `eps` out of range.
    """
    if momentum is None:
        raise ValueError("momentum is None, PyTorch's cumulative average, which has no counterpart: give a number")
    check_between("momentum", momentum, 0, 1)
    check_between("eps", eps, 0, float("inf"))
    at = _inside(prefix)
    for name in ("running_mean", "running_var"):
        if at + name not in state_dict:
            near = ", ".join(sorted(k for k in state_dict if k.endswith(name))[:3]) or "none"
            raise KeyError(f"state_dict has no {at + name!r}: check prefix={prefix!r} (names like it: {near})")
    state = BNState(_array(state_dict[at + "running_mean"]), _array(state_dict[at + "running_var"]))
    params = BNParams(*(_array(state_dict[at + n]) if at + n in state_dict else None for n in ("weight", "bias")))
    return Layer(params, state, _complement(momentum), eps, unbiased=True)


def to_torch(layer: Layer, prefix: str = "") -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The reverse of `from_torch`.

    Returns:
      The state_dict, of NumPy arrays (`{k: torch.as_tensor(v) for …}` is what `load_state_dict` takes), and the
      arguments `eps`, `momentum` and `affine` for the layer's constructor. PyTorch has weight and bias together: of
      one alone the other is filled with 1 or 0.
    """
    at, (scale, bias) = _inside(prefix), layer.params
    mean, var = (np.asarray(v) for v in layer.state)
    weights = {}
    affine = scale is not None or bias is not None
    if affine:
        weights["weight"] = np.ones_like(mean) if scale is None else np.asarray(scale)
        weights["bias"] = np.zeros_like(mean) if bias is None else np.asarray(bias)
    weights |= {"running_mean": mean, "running_var": var, "num_batches_tracked": np.zeros((), np.int64)}
    options = {"eps": layer.epsilon, "momentum": _complement(layer.momentum), "affine": affine}
    return {at + name: value for name, value in weights.items()}, options


def from_keras(weights: Sequence[Any], config: Mapping[str, Any] | None = None) -> Layer:
    """A `keras.layers.BatchNormalization`.

    Args:
      weights: `layer.get_weights()`: gamma (with `scale`), beta (with `center`), moving mean, moving variance.
      config: `layer.get_config()`, of which momentum, epsilon, center and scale are read; what is missing has Keras's
        default (0.99, 1e-3, True, True).

    Raises:
      ValueError: the number of weights is not what `config` says.
    """
    config = {"momentum": 0.99, "epsilon": 1e-3, "center": True, "scale": True} | dict(config or {})
    expected = 2 + bool(config["scale"]) + bool(config["center"])
    if len(weights) != expected:
        raise ValueError(
            f"weights has {len(weights)} arrays, expected {expected} for scale={config['scale']} and "
            f"center={config['center']}: give layer.get_weights() and layer.get_config() of one layer"
        )
    check_between("config['momentum']", config["momentum"], 0, 1)
    check_between("config['epsilon']", config["epsilon"], 0, float("inf"))
    arrays = map(_array, weights)
    scale = next(arrays) if config["scale"] else None
    bias = next(arrays) if config["center"] else None
    return Layer(BNParams(scale, bias), BNState(*arrays), config["momentum"], config["epsilon"], unbiased=False)


def to_keras(layer: Layer) -> tuple[list[np.ndarray], dict[str, Any]]:
    """The reverse of `from_keras`: what `layer.set_weights` takes, and arguments of the layer's constructor."""
    scale, bias = layer.params
    arrays = [np.asarray(v) for v in (scale, bias, *layer.state) if v is not None]
    config = {"momentum": layer.momentum, "epsilon": layer.epsilon}
    return arrays, config | {"center": bias is not None, "scale": scale is not None}


def model_from_torch(state_dict: Mapping[str, Any], names: Names, kind: Kind = "linen") -> dict[Any, Any]:
    """The variables of a Flax model from a PyTorch model's state_dict.

    Args:
      state_dict: names to tensors or NumPy arrays. Batch norms are known by their running statistics, dense layers by
        a weight `(outputs, inputs)`, convolutions, which may be grouped, by one of higher rank `(outputs, inputs /
        groups, *window)`; Flax has `(inputs, outputs)` and `(*window, inputs / groups, outputs)`. Not for transposed
        convolutions, whose weights look alike.
      names: for each PyTorch layer its path in the Flax model, as `resnet50_names` gives them.
      kind: `"linen"` or `"nnx"`.

    Returns:
      For linen `{"params": …, "batch_stats": …}`; for nnx the nested dict that `nnx.replace_by_pure_dict` takes:

          state = nnx.state(model)
          nnx.replace_by_pure_dict(state, model_from_torch(state_dict, resnet50_names("nnx"), "nnx"))
          nnx.update(model, state)

    Raises:
      KeyError: `names` has a layer that `state_dict` lacks.
      ValueError: `state_dict` has weights that belong to no layer of `names`, or weights of unknown shape.
    """
    params, stats = _trees(_check_kind(kind))
    used = set()
    for prefix, path in names.items():
        own = {k.removeprefix(_inside(prefix)): k for k in state_dict if k.startswith(_inside(prefix))}
        is_norm = "running_mean" in own or "running_var" in own
        used.update(own[name] for name in (NORM if is_norm else DENSE) if name in own)
        if is_norm:
            layer = from_torch(state_dict, prefix)
            _put(stats, path, layer.state._asdict())
            _put(params, path, {k: v for k, v in layer.params._asdict().items() if v is not None})
            continue
        if "weight" not in own:
            raise KeyError(f"state_dict has no {_inside(prefix) + 'weight'!r}, expected by names")
        weight = _array(state_dict[own["weight"]])
        if weight.ndim < 2:
            raise ValueError(f"{own['weight']} has shape {weight.shape}, expected that of a dense layer or convolution")
        dense = {"kernel": jnp.transpose(weight, (*range(2, weight.ndim), 1, 0))}
        if "bias" in own:
            dense["bias"] = _array(state_dict[own["bias"]])
        _put(params, path, dense)
    if left := sorted(set(state_dict) - used):
        raise ValueError(f"state_dict has {len(left)} entries that no name leads to: {', '.join(left[:5])}: add them")
    return params if kind == "nnx" else {"params": params, "batch_stats": stats}


def model_to_torch(variables: Mapping[Any, Any], names: Names, kind: Kind = "linen") -> dict[str, np.ndarray]:
    """The reverse of `model_from_torch`: a state_dict of NumPy arrays, batch norms with `num_batches_tracked` 0.

    Args:
      variables: of linen, `{"params": …, "batch_stats": …}`; of nnx, `nnx.to_pure_dict(nnx.state(model))`.
      names: as for `model_from_torch`.
      kind: `"linen"` or `"nnx"`.

    Raises:
      KeyError: `names` has a layer that `variables` lacks.
      ValueError: `variables` has entries that no name leads to.
    """
    trees = [variables] if _check_kind(kind) == "nnx" else [variables["params"], variables.get("batch_stats", {})]
    left = {path: value for tree in trees for path, value in _leaves(tree)}
    tensors: dict[str, np.ndarray] = {}
    for prefix, path in names.items():
        is_norm = (*path, "mean") in left
        known = ("scale", "bias", "mean", "var") if is_norm else ("kernel", "bias")
        own = {name: left.pop((*path, name)) for name in known if (*path, name) in left}
        if is_norm:
            layer = Layer(
                BNParams(own.get("scale"), own.get("bias")), BNState(own["mean"], own["var"]), 0.9, 1e-5, True
            )
            tensors |= to_torch(layer, prefix)[0]
            continue
        if "kernel" not in own:
            raise KeyError(f"variables has no kernel and no mean at {'/'.join(map(str, path))}, expected by names")
        kernel = np.asarray(own["kernel"])
        tensors[_inside(prefix) + "weight"] = kernel.transpose(
            kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2)
        )
        if "bias" in own:
            tensors[_inside(prefix) + "bias"] = np.asarray(own["bias"])
    if left:
        shown = ", ".join("/".join(map(str, path)) for path in sorted(left, key=str)[:5])
        raise ValueError(f"variables has {len(left)} entries that no name leads to: {shown}: add them")
    return tensors


def resnet50_names(kind: Kind = "linen") -> dict[str, tuple[str | int, ...]]:
    """For every layer of torchvision's ResNet-50 its path in `ResNet50` or `NnxResNet50` of `experiments/models.py`."""
    linen = _check_kind(kind) == "linen"
    names: dict[str, tuple[str | int, ...]] = (
        {"conv1": ("Conv_0",), "bn1": ("BatchNorm_0",), "fc": ("Dense_0",)}
        if linen
        else {"conv1": ("conv",), "bn1": ("norm",), "fc": ("dense",)}
    )
    blocks = [(stage, block) for stage, count in enumerate((3, 4, 6, 3), 1) for block in range(count)]
    for number, (stage, block) in enumerate(blocks):
        theirs, ours = f"layer{stage}.{block}", (f"Bottleneck_{number}",) if linen else ("blocks", number)
        for i in range(3):
            names[f"{theirs}.conv{i + 1}"] = (*ours, f"Conv_{i}" if linen else f"conv{i + 1}")
            names[f"{theirs}.bn{i + 1}"] = (*ours, f"BatchNorm_{i}" if linen else f"norm{i + 1}")
        if block == 0:
            names[f"{theirs}.downsample.0"] = (*ours, "conv_shortcut")
            names[f"{theirs}.downsample.1"] = (*ours, "norm_shortcut")
    return names


def _check_kind(kind: str) -> str:
    if kind not in ("linen", "nnx"):
        raise ValueError(f"kind is {kind!r}, expected 'linen' or 'nnx': give the Flax API that the model is written in")
    return kind


def _trees(kind: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Where params and statistics go: nnx has them in one tree."""
    params: dict[Any, Any] = {}
    return params, params if kind == "nnx" else {}


def _leaves(tree: Mapping[Any, Any], path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


def _inside(prefix: str) -> str:
    return prefix if not prefix or prefix.endswith(".") else prefix + "."


def _complement(momentum: float) -> float:
    return round(1 - momentum, 15)  # 1 − 0.9 is not the float 0.1


def _array(value: Any):
    """A tensor or array as JAX's; tensors are asked by their methods, so that torch is not imported."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none
            value = value.float()
    return jnp.asarray(np.asarray(value))


def _put(tree: dict[Any, Any], path: Sequence[str | int], value: dict[str, Any]) -> None:
    if value:
        for name in path:
            tree = tree.setdefault(name, {})
        tree.update(value)
