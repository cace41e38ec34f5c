"""What a PyTorch layer is, by its tensors: and what they leave open has to be said."""

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import pairwise
from math import isqrt
from typing import Any, Literal, NamedTuple

import numpy as np

from jbn._functions.convert_layers import inside

Kind = Literal["linen", "nnx"]
Names = Mapping[str, Sequence[str | int]]  # of a PyTorch layer: its path in the Flax model
Hint = Literal["dense", "norm", "embedding", "transposed"] | tuple[int, ...]
TENSORS = ("weight", "bias")  # of a layer in a state_dict
STATS = ("running_mean", "running_var", "num_batches_tracked")
LEAVES = {  # of a layer in Flax
    "batch norm": ("scale", "bias", "mean", "var"),
    "norm": ("scale", "bias"),
    "embedding": ("embedding",),
    "dense": ("kernel", "bias"),
    "convolution": ("kernel", "bias"),
    "transposed": ("kernel", "bias"),
    "parameter": (),  # of no layer: its path ends in its own name
}
HINTS = {
    "dense": ("dense",),
    "norm": ("norm", "batch norm"),
    "embedding": ("embedding",),
    "transposed": ("transposed",),
}
FLAT = ("dense", "norm", "batch norm")  # what may see flattened feature maps


class Part(NamedTuple):
    """A layer, by its PyTorch name."""

    prefix: str
    role: str  # a key of LEAVES
    inputs: int
    outputs: int


def part_of(state_dict: Mapping[str, Any], prefix: str, hint: Any) -> Part:
    """What a PyTorch layer is, by what it has; refused where that leaves it open."""
    if prefix in state_dict:
        return checked_hint(Part(prefix, "parameter", 0, 0), hint)
    at = inside(prefix)
    shape = {name: np.shape(state_dict[at + name]) for name in (*TENSORS, *STATS) if at + name in state_dict}
    seen = f"{at}weight has shape {shape.get('weight')}"
    if stats := next((shape[name] for name in STATS[:2] if name in shape), None):
        return checked_hint(Part(prefix, "batch norm", stats[0], stats[0]), hint)
    if "weight" not in shape:
        raise KeyError(f"state_dict has no {at + 'weight'!r}, expected by names")
    first, *others = shape["weight"] or (1,)
    if not others:
        if hint != "norm" and not isinstance(hint, tuple):
            raise ValueError(
                f"{seen} and no running statistics: a layer or group norm is converted with hints={{{prefix!r}: "
                "'norm'}; a batch norm with track_running_stats=False has no state, which Flax's needs"
            )
        return checked_hint(Part(prefix, "norm", first, first), hint)
    if len(others) == 1 and hint == "embedding":
        return Part(prefix, "embedding", first, others[0])
    if len(others) == 1:
        if "bias" not in shape and hint is None:
            raise ValueError(
                f"{seen} and there is no bias: nn.Linear(bias=False) and nn.Embedding look alike, give "
                f"hints={{{prefix!r}: 'dense'}} or 'embedding'"
            )
        return checked_hint(Part(prefix, "dense", others[0], first), hint)
    if hint == "transposed":
        return Part(prefix, "transposed", first, others[0])
    if shape.get("bias", (first,)) != (first,):
        raise ValueError(
            f"{seen} and the bias {shape['bias']}, as of a transposed convolution: give hints={{{prefix!r}: "
            "'transposed'}"
        )
    return checked_hint(Part(prefix, "convolution", others[0], first), hint)


def flax_role(leaves: Mapping[str, Any], hint: Any) -> str | None:
    """What a Flax layer with these variables is."""
    if "kernel" in leaves:
        return "dense" if leaves["kernel"].ndim == 2 else "transposed" if hint == "transposed" else "convolution"
    telling = {"mean": "batch norm", "embedding": "embedding", "scale": "norm"}
    return next((role for leaf, role in telling.items() if leaf in leaves), None)


def checked_hint(part: Part, hint: Any) -> Part:
    """The part, if what was said of it can be."""
    if isinstance(hint, tuple):
        if part.role not in FLAT or np.prod(hint, dtype=int) != part.inputs or len(hint) < 2:
            raise ValueError(
                f"hints[{part.prefix!r}] is {hint}, sizes (C, *window) of what is flattened for a dense layer or norm, "
                f"and {part.prefix} is a {part.role} of {part.inputs} inputs: give sizes whose product that is"
            )
    elif hint is not None and part.role not in HINTS[hint]:
        raise ValueError(f"hints[{part.prefix!r}] is {hint!r}, and {part.prefix} is a {part.role}: leave it out")
    return part


def check_order(parts: Sequence[Part], hints: Mapping[str, Hint]) -> None:
    """Refuses a layer that may see flattened feature maps, unless a hint says so or denies it."""
    parts = [part for part in parts if part.role != "parameter"]
    convolved, flat, before = False, False, None
    for part, behind in zip(parts, [*parts[1:], None], strict=True):
        rows = part.role == "dense" or (part.role in FLAT and (behind is None or behind.role == "dense"))
        if rows and convolved and before and part.prefix not in hints and (flat or part.inputs != before.outputs):
            deny = "dense" if part.role == "dense" else "norm"
            raise ValueError(
                f"{part.prefix} takes {part.inputs} features behind {before.prefix}, which gives {before.outputs}: "
                "PyTorch flattens feature maps in the order (C, H, W), Flax in the order (H, W, C). Give "
                f"hints={{{part.prefix!r}: (C, H, W)}} with their sizes if it sees flattened ones, else {deny!r}"
            )
        convolved |= part.role in ("convolution", "transposed")
        flat = part.role != "dense" and isinstance(hints.get(part.prefix), tuple)  # a norm keeps the order
        before = part


def flattened(parts: Sequence[Part], hints: Mapping[str, Hint]) -> dict[str, Hint]:
    """Sizes of the feature maps that dense layers see flattened: square ones, of the channels right before them."""
    found: dict[str, Hint] = {}
    convolved, parts = False, [part for part in parts if part.role != "parameter"]
    for before, part in pairwise(parts):
        convolved |= before.role in ("convolution", "transposed")
        positions, rest = divmod(part.inputs, before.outputs)
        square = rest == 0 and positions > 1 and isqrt(positions) ** 2 == positions
        maps = convolved and before.role not in ("dense", "embedding") and before.prefix not in hints
        if part.role == "dense" and maps and square and part.prefix not in hints:
            found[part.prefix] = (before.outputs, positions)
    return found


def channels_last(value: Any, hint: Any) -> Any:
    """The first axis, if the hint has its sizes, from (C, *window), flattened, to (*window, C)."""
    if not isinstance(hint, tuple):
        return value
    return np.moveaxis(value.reshape(*hint, *value.shape[1:]), 0, len(hint) - 1).reshape(value.shape)


def channels_first(value: Any, hint: Any) -> Any:
    """The reverse of `channels_last`."""
    if not isinstance(hint, tuple):
        return value
    channels, *window = hint
    return np.moveaxis(value.reshape(*window, channels, *value.shape[1:]), len(window), 0).reshape(value.shape)


def tensors_of(part: Part) -> list[str]:
    """The names that a state_dict may have of it."""
    if part.role == "parameter":
        return [part.prefix]
    leaves = (*TENSORS, *STATS) if part.role == "batch norm" else TENSORS[:1] if part.role == "embedding" else TENSORS
    return [inside(part.prefix) + leaf for leaf in leaves]


def leaves(tree: Mapping[Any, Any], path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Paths and arrays of nested dicts."""
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, (*path, name))
        else:
            yield (*path, name), value


def check_hints(hints: Mapping[str, Any], names: Container[str], where: str = "names") -> Mapping[str, Any]:
    for prefix, hint in hints.items():
        if prefix not in names:
            raise ValueError(f"hints has {prefix!r}, which {where} has not: give hints of layers in {where}")
        if not isinstance(hint, tuple) and hint not in HINTS:
            words = ", ".join(map(repr, HINTS))
            raise ValueError(
                f"hints[{prefix!r}] is {hint!r}, expected one of {words} or sizes (C, H, W) of what is flat"
            )
    return hints


def check_names(names: Names) -> Names:
    taken: dict[tuple, str] = {}
    for prefix, path in names.items():
        if isinstance(path, str):
            raise TypeError(f"names[{prefix!r}] is {path!r}, expected a path: give a tuple, e.g. ({path!r},)")
        if (other := taken.setdefault(tuple(path), prefix)) != prefix:
            shown = "/".join(map(str, path))
            raise ValueError(f"names leads {other!r} and {prefix!r} to one path, {shown}: give each a path of its own")
    return names


def check_variables(variables: Any, kind: str) -> list[Mapping[Any, Any]]:
    """The trees of a model's variables."""
    if not isinstance(variables, Mapping):
        give = "nnx.to_pure_dict(nnx.state(model))" if kind == "nnx" else "what model.init returned"
        raise TypeError(f"variables is a {type(variables).__name__}, expected a mapping: give {give}")
    if kind == "linen" and "params" not in variables:
        raise KeyError(
            f"variables has no 'params' but {', '.join(map(str, variables))}: give {{'params': …, 'batch_stats': …}}, "
            "or kind='nnx' for a model of nnx"
        )
    return [variables] if kind == "nnx" else [variables["params"], variables.get("batch_stats", {})]


def check_kind(kind: str) -> str:
    if kind not in ("linen", "nnx"):
        raise ValueError(f"kind is {kind!r}, expected 'linen' or 'nnx': give the Flax API that the model is written in")
    return kind
