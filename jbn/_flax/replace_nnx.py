"""Flax's batch norms of an nnx model turned into ours, in place."""

import inspect
from typing import Any

from flax import nnx

from jbn._flax.check_model import check_model
from jbn._flax.replace_shared import Replaced, check_options, left


def replace(model: nnx.Module, ours: type[nnx.BatchNorm], options: dict[str, Any]) -> Replaced:
    """As `jbn.nnx.replace`; `ours` is the class that layers get."""
    check_options("replace", options)
    check_model(model, nnx.Module, "an nnx.Module", "enter jbn.linen.replacing()")
    nodes = {".".join(map(str, path)): node for path, node in nnx.iter_graph(model)}  # each once
    norms = {path: node for path, node in nodes.items() if isinstance(node, nnx.BatchNorm)}
    if not norms:
        raise ValueError(
            f"model, a {type(model).__name__}, has no flax.nnx.BatchNorm: there is nothing to replace (layers are "
            "found where attributes lead to them)"
        )
    done = Replaced([path for path, norm in norms.items() if type(norm) is nnx.BatchNorm], {})
    for path, norm in norms.items():
        if path not in done.replaced:
            done.left[path] = left(type(norm), nnx.BatchNorm, ours)
    own = inspect.signature(ours.__init__).parameters.values()
    settings = {p.name: p.default for p in own if p.kind is p.KEYWORD_ONLY} | options
    for path in done.replaced:
        for name, value in settings.items():  # an array is data to nnx, all else is static
            setattr(norms[path], name, nnx.data(value) if hasattr(value, "dtype") else value)
        object.__setattr__(norms[path], "__class__", ours)  # wherever it is referred to
    return done
