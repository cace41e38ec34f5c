"""Layers as matching sees them: of a state_dict what each may be, of Flax's variables what each is."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jbn._functions.convert_parts import FLAT, HINTS, LEAVES, STATS, TENSORS, flax_role, leaves

Shape = tuple[int, ...]
Path = tuple[str | int, ...]
SAME = {  # what two authors call one thing, beside what Flax and PyTorch call their layers
    "bn": ("batch", "norm"),
    "ln": ("layer", "norm"),
    "gn": ("group", "norm"),
    "fc": ("dense",),
    "linear": ("dense",),
    "embedding": ("embed",),
    "downsample": ("shortcut",),
    "skip": ("shortcut",),
    "proj": ("shortcut",),
}

BARE = ("embedding", "parameter")  # have one array


class Form(NamedTuple):
    """What decides whether two layers may be one: a role, and shapes as Flax has them, None for what is not there."""

    role: str
    shape: Shape
    bias: Shape | None = None
    scale: Shape | None = None

    def __str__(self) -> str:
        missing = [f"no {name}" for name in ("scale", "bias") if getattr(self, name) is None]
        missing = missing if self.role == "batch norm" else missing[1:]
        return f"{self.role} {self.shape}" + (
            f" with {' and '.join(missing)}" if missing and self.role not in BARE else ""
        )


class Layer(NamedTuple):
    """A layer of either side."""

    name: str  # in messages, and of PyTorch's in `names`
    path: Path  # of Flax's in `names`
    words: tuple[str, ...]  # the parts of its path
    forms: dict[Form, Any]  # with the hint that says so to `model_from_torch`; of Flax's one


def torch_layers(state_dict: Mapping[str, Any], hints: Mapping[str, Any]) -> list[Layer]:
    """In order of definition."""
    groups: dict[str, dict[str, Shape]] = {}
    for name, value in state_dict.items():
        prefix, _, leaf = name.rpartition(".")
        groups.setdefault(prefix, {})[leaf] = tuple(np.shape(value))
    found = []
    for prefix, shapes in groups.items():
        own = {leaf: shapes[leaf] for leaf in (*TENSORS, *STATS) if leaf in shapes}
        layer = "weight" in own or "running_mean" in own
        if layer:
            found.append(Layer(prefix, (), tuple(prefix.split(".")), _torch_forms(own, hints.get(prefix))))
        for leaf, shape in shapes.items():
            if not layer or leaf not in own:
                name = f"{prefix}.{leaf}" if prefix else leaf
                found.append(Layer(name, (), tuple(name.split(".")), {Form("parameter", shape): None}))
    return found


def _torch_forms(shapes: dict[str, Shape], hint: Any) -> dict[Form, Any]:
    """All that it may be, the likeliest first, or that is left of it by a hint."""
    weight, bias = shapes.get("weight", ()), shapes.get("bias")
    if "running_mean" in shapes:
        return {Form("batch norm", shapes["running_mean"], bias, weight or None): hint}
    forms: dict[Form, Any] = {}
    if len(weight) < 2:
        forms[Form("norm", weight, bias)] = "norm"
    elif len(weight) == 2:
        forms[Form("dense", weight[::-1], bias)] = None if bias else "dense"
        if bias is None:
            forms[Form("embedding", weight)] = "embedding"
    else:
        first, second, *window = weight
        sure = hint == "transposed" or bias not in (None, (first,))  # else only where Flax's name says so
        if not sure:
            forms[Form("convolution", (*window, second, first), bias)] = None
        for role in ("transposed", "convolution")[: 1 + sure]:
            forms[Form(role, (*window, first, second), bias)] = "transposed"
    if isinstance(hint, tuple):
        return {form: hint for form in forms if form.role in FLAT}
    return {form: said for form, said in forms.items() if hint is None or hint == said or form.role in HINTS[hint]}


def flax_layers(trees: list[Mapping[Any, Any]]) -> list[Layer]:
    """By path. What is not floating, as an nnx model's random state, is no weight."""
    groups: dict[Path, dict[Any, Any]] = {}
    for tree in trees:
        for path, value in leaves(tree):
            if jnp.issubdtype(value.dtype, jnp.floating):
                groups.setdefault(path[:-1], {})[path[-1]] = value
    found = []
    for path, values in groups.items():
        role = flax_role(values, None)
        shapes = {leaf: tuple(value.shape) for leaf, value in values.items()}
        if role is not None:
            first = next(shapes[leaf] for leaf in ("kernel", "embedding", "mean", "scale") if leaf in shapes)
            form = Form(role, first, shapes.get("bias"), shapes.get("scale") if role == "batch norm" else None)
            if role == "convolution" and path and str(path[-1]).startswith("ConvTranspose"):  # as linen names them
                form = form._replace(role="transposed")
            found.append(_flax_layer(path, form))
        own = LEAVES[role] if role else ()
        bare = [leaf for leaf in shapes if leaf not in own]
        found += [_flax_layer((*path, leaf), Form("parameter", shapes[leaf])) for leaf in bare]
    return found


def _flax_layer(path: Path, form: Form) -> Layer:
    return Layer("/".join(map(str, path)), path, tuple(map(str, path)), {form: None})


def stem(word: str | int) -> tuple[str, int | None]:
    """A name without the number at its end, and that."""
    found = re.fullmatch(r"(.*?)_?(\d+)", str(word))
    return (found[1], int(found[2])) if found else (str(word), None)


def likeness(ours: Layer, theirs: Layer) -> tuple[int, float]:
    """How many names of the paths are equal; then the share of words that both have, numbers apart."""
    equal = {w for w in ours.words if not w.isdigit()} & {w for w in theirs.words if not w.isdigit()}
    a, b = _vocabulary(ours), _vocabulary(theirs)
    return len(equal), len(a & b) / max(len(a | b), 1)


def _vocabulary(layer: Layer) -> set[str]:
    words = (w.lower() for word in layer.words for w in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", word))
    return {same for word in words for same in SAME.get(word, (word,))}
