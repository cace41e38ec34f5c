"""Whole models from PyTorch and back: where each layer goes, and what a state_dict does not say of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jbn._functions.batch_norm import BNParams, BNState
from jbn._functions.convert_layers import Layer, array, check_state_dict, from_torch, inside, numpy, to_torch
from jbn._functions.convert_match import match
from jbn._functions.convert_parts import (
    LEAVES,
    TENSORS,
    Hint,
    Kind,
    Names,
    Part,
    channels_first,
    channels_last,
    check_hints,
    check_kind,
    check_names,
    check_order,
    check_variables,
    checked_hint,
    flax_role,
    leaves,
    part_of,
    tensors_of,
)


def model_from_torch(
    state_dict: Mapping[str, Any],
    names: Names | None = None,
    kind: Kind = "linen",
    hints: Mapping[str, Hint] | None = None,
    *,
    variables: Mapping[Any, Any] | None = None,
) -> dict[Any, Any]:
    """The variables of a Flax model from a PyTorch model's state_dict.

    Args:
      state_dict: names to tensors or NumPy arrays. Batch norms are known by their running statistics, dense layers by
        a weight `(outputs, inputs)` and a bias, convolutions, which may be grouped, by a weight of higher rank
        `(outputs, inputs / groups, *window)`; Flax has `(inputs, outputs)` and `(*window, inputs / groups, outputs)`.
        Half precision becomes float32.
      names: for each PyTorch layer its path in the Flax model, as `match` finds them; for a bare parameter, which is in
        no such layer, the path that ends in its own name.
      kind: `"linen"` or `"nnx"`.
      hints: for some PyTorch layers what a state_dict does not say. `"dense"`: a dense layer without bias;
        `"embedding"`: `nn.Embedding`, whose weight looks alike and becomes `embedding`, `(entries, features)`;
        `"norm"`: a layer or group norm; `"transposed"`: a transposed convolution, whose kernel becomes that of Flax's
        `ConvTranspose` with `transpose_kernel=False` (without the hint it is that with True); sizes `(C, H, W)`, for a
        dense layer or norm of flattened feature maps: PyTorch flattens in that order, Flax in the order (H, W, C).
        Where a layer's inputs are not as many as the channels before it, and there was a convolution, that has to be
        said; `"dense"` and `"norm"` deny it.
      variables: of the Flax model, or their shapes: `names`, of which some or none may be given, and `hints` are then
        found by `match`.

    Returns:
      For linen `{"params": …, "batch_stats": …}`; for nnx the nested dict that `nnx.replace_by_pure_dict` takes:

          state = nnx.state(model)
          variables = nnx.to_pure_dict(state)
          nnx.replace_by_pure_dict(state, model_from_torch(state_dict, kind="nnx", variables=variables))
          nnx.update(model, state)

    Raises:
      TypeError: `state_dict` is no mapping, a module for instance.
      KeyError: `names` has a layer that `state_dict` lacks.
      ValueError: two names lead to one path, `state_dict` has weights that belong to no layer of `names` or whose
        layer it leaves open, or that are NaN, or a hint does not fit; with `variables`, what `match` raises.
    """
    check_state_dict(state_dict)
    check_kind(kind)
    if variables is not None:
        names, hints = match(state_dict, variables, kind, names=names, hints=hints)
    if names is None:
        raise TypeError("names is None, and so is variables: give the names, or the variables by which to find them")
    for name, value in state_dict.items():
        if np.isnan(numpy(value)).any():
            raise ValueError(f"state_dict has NaN in {name}: give weights of a training that did not diverge")
    hints = check_hints(hints or {}, check_names(names))
    order = {name: place for place, name in enumerate(state_dict)}
    parts = [part_of(state_dict, prefix, hints.get(prefix)) for prefix in names]
    check_order(sorted(parts, key=lambda part: min(order[name] for name in tensors_of(part) if name in order)), hints)

    params, stats = _trees(kind)
    for prefix, role, *_ in parts:
        at, path, hint = inside(prefix), names[prefix], hints.get(prefix)
        if role == "parameter":
            _put(params, path[:-1], {path[-1]: array(state_dict[prefix])})
            continue
        if role == "batch norm":
            layer = from_torch(state_dict, prefix)
            _put(stats, path, {name: channels_last(v, hint) for name, v in layer.state._asdict().items()})
            _put(params, path, {n: channels_last(v, hint) for n, v in layer.params._asdict().items() if v is not None})
            continue
        values = [numpy(state_dict[at + name]) for name in TENSORS if at + name in state_dict]
        if role == "norm":
            values = [channels_last(value, hint) for value in values]
        elif role == "dense":
            values[0] = channels_last(values[0].T, hint)
        elif role == "convolution":
            values[0] = np.transpose(values[0], (*range(2, values[0].ndim), 1, 0))
        elif role == "transposed":
            window = tuple(range(2, values[0].ndim))
            values[0] = np.transpose(np.flip(values[0], window), (*window, 0, 1))
        _put(params, path, dict(zip(LEAVES[role], map(array, values), strict=False)))
    used = {name for part in parts for name in tensors_of(part)}
    if left := sorted(set(state_dict) - used):
        raise ValueError(f"state_dict has {len(left)} entries that no name leads to: {', '.join(left[:5])}: add them")
    return params if kind == "nnx" else {"params": params, "batch_stats": stats}


def model_to_torch(
    variables: Mapping[Any, Any], names: Names, kind: Kind = "linen", hints: Mapping[str, Hint] | None = None
) -> dict[str, np.ndarray]:
    """The reverse of `model_from_torch`: a state_dict of NumPy arrays, batch norms with `num_batches_tracked` 0.

    Args:
      variables: of linen, `{"params": …, "batch_stats": …}`; of nnx, `nnx.to_pure_dict(nnx.state(model))`.
      names: as for `model_from_torch`, layers in the order of the model.
      kind: `"linen"` or `"nnx"`.
      hints: as for `model_from_torch`; embeddings and norms are known by their names here.

    Raises:
      TypeError: `variables` is no mapping, a model for instance.
      KeyError: `names` has a layer that `variables` lacks.
      ValueError: two names lead to one path, `variables` has entries that no name leads to, what a layer sees is left
        open, or a hint does not fit.
    """
    trees = check_variables(variables, check_kind(kind))
    hints = check_hints(hints or {}, check_names(names))
    left = {path: value for tree in trees for path, value in leaves(tree)}
    tensors: dict[str, np.ndarray] = {}
    parts = []
    for prefix, path in names.items():
        at, hint = inside(prefix), hints.get(prefix)
        if tuple(path) in left:
            tensors[prefix] = np.asarray(left.pop(tuple(path)))
            continue
        inner = [leaf for *start, leaf in left if start == list(path)]
        found: dict[str, Any] = {leaf: np.asarray(left[(*path, leaf)]) for leaf in inner}
        role = flax_role(found, hint)
        if role is None:
            shown = "/".join(map(str, path))
            raise KeyError(f"variables has no kernel, embedding, scale or mean at {shown}, expected by names")
        own: dict[str, Any] = {name: found[name] for name in LEAVES[role] if name in found}
        for name in own:
            del left[(*path, name)]
        first = next(iter(own.values()))
        inputs = first.shape[0 if role == "dense" else -1]
        parts.append(checked_hint(Part(prefix, role, inputs, first.shape[-1]), hint))
        own |= {name: channels_first(value, hint) for name, value in own.items() if (role, name) != ("dense", "bias")}
        if role == "batch norm":
            params, state = BNParams(own.get("scale"), own.get("bias")), BNState(own["mean"], own["var"])
            tensors |= to_torch(Layer(params, state, 0.9, 1e-5, unbiased=True), prefix)[0]
            continue
        if role in ("dense", "convolution"):
            kernel = own["kernel"]
            own["kernel"] = kernel.transpose(kernel.ndim - 1, kernel.ndim - 2, *range(kernel.ndim - 2))
        elif role == "transposed":
            window = tuple(range(own["kernel"].ndim - 2))
            own["kernel"] = np.flip(own["kernel"], window).transpose(-2, -1, *window)
        tensors |= {at + ("bias" if name == "bias" else "weight"): value for name, value in own.items()}
    check_order(parts, hints)
    if left:
        shown = ", ".join("/".join(map(str, path)) for path in sorted(left, key=str)[:5])
        raise ValueError(f"variables has {len(left)} entries that no name leads to: {shown}: add them")
    return tensors


def _trees(kind: str) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """Where params and statistics go: nnx has them in one tree."""
    params: dict[Any, Any] = {}
    return params, params if kind == "nnx" else {}


def _put(tree: dict[Any, Any], path: Sequence[str | int], value: dict[Any, Any]) -> None:
    if value:
        for name in path:
            tree = tree.setdefault(name, {})
        tree.update(value)
