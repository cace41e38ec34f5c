"""Which layer of a Flax model is which of a PyTorch model: by kind and shape, by order, by names, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, NamedTuple

from jbn._functions.convert_forms import Form, Layer, Path, flax_layers, likeness, stem, torch_layers
from jbn._functions.convert_layers import check_state_dict
from jbn._functions.convert_parts import (
    Hint,
    Kind,
    Names,
    check_hints,
    check_kind,
    check_names,
    check_order,
    check_variables,
    flattened,
    part_of,
)

SHOWN = 6  # layers named in a message


class Match(NamedTuple):
    """Which layer is which, as `model_from_torch` and `model_to_torch` take it.

    Attributes:
      names: for each PyTorch layer, in order of definition, its path in the Flax model.
      hints: for some of them what a state_dict does not say.
    """

    names: dict[str, Path]
    hints: dict[str, Hint]


def match(
    state_dict: Mapping[str, Any],
    variables: Mapping[Any, Any],
    kind: Kind = "linen",
    *,
    names: Names | None = None,
    hints: Mapping[str, Hint] | None = None,
) -> Match:
    """Finds which layer of a PyTorch model is which of a Flax model of the same layers.

    Layers may be one that are of a kind and have equal shapes, once they are Flax's. Of several the order decides:
    PyTorch's is that of definition, in which a state_dict is; of Flax's siblings whose names differ by a number alone
    (`Conv_0` and `Conv_1`, `blocks[0]` and `blocks[1]`), and of all in them, the smaller number is first. (Linen
    numbers layers as they are constructed: in `nn.Dense(4)(nn.Dense(4)(x))` the outer one is first.) Where order
    leaves several, layers are drawn to those that are known and stand in one module with them: of Flax's, if PyTorch
    defines its layers one after another, or of PyTorch's, if Flax has its layers in one. Last, names decide, where two
    are more alike than either is like any other that is left. Nothing else is guessed. A dense layer right behind a
    convolution or norm of C channels, with C times a square number of inputs, is taken to see flattened feature maps.

    Usage:

        names, hints = jbn.convert.match(tensors, variables)  # look at them
        variables = jbn.convert.model_from_torch(tensors, names, hints=hints)
        tensors = jbn.convert.model_to_torch(variables, names, hints=hints)

    Args:
      state_dict: names to tensors or NumPy arrays, in order of definition, as `module.state_dict()` has them.
      variables: of linen, what `model.init` returned; of nnx, `nnx.to_pure_dict(nnx.state(model))`. Shapes suffice
        (`jax.eval_shape`), values are not read.
      kind: `"linen"` or `"nnx"`.
      names: of some PyTorch layers, or bare parameters, the path in the Flax model, if it is known.
      hints: as for `model_from_torch`. A transposed convolution is known by linen's automatic name, `ConvTranspose_0`,
        or else needs one, unless its bias tells.

    Raises:
      TypeError: `state_dict` or `variables` is no mapping.
      KeyError: `names` has a layer, or a path, that is not there.
      ValueError: layers of some kind and shape are not as many on one side as on the other; the order leaves nothing
        for a layer; it is open which of several a layer is, which are listed; what a layer sees is left open (see
        `model_from_torch`); `names` leads a layer to one of another kind or shape.
    """
    check_state_dict(state_dict)
    trees = check_variables(variables, check_kind(kind))
    given = {name: tuple(path) for name, path in check_names(names or {}).items()}
    theirs, ours = torch_layers(state_dict, hints or {}), flax_layers(trees)
    hints = check_hints(hints or {}, {layer.name for layer in theirs}, "state_dict")
    _check_given(given, theirs, ours)
    by_path = {path: name for name, path in given.items()}
    found = [
        [
            place
            for place, layer in enumerate(theirs)
            if layer.forms.keys() & our.forms.keys()
            and (our.path == given[layer.name] if layer.name in given else our.path not in by_path)
        ]
        for our in ours
    ]
    _check_left(found, theirs, ours)
    before = _order(ours)
    _narrow(found, before, theirs, ours)
    while _together(found, theirs, ours) or _alike(found, theirs, ours):
        _narrow(found, before, theirs, ours)
    if any(len(places) > 1 for places in found):
        raise ValueError(_ambiguous(found, theirs, ours))
    of = {places[0]: our for our, places in zip(ours, found, strict=True)}
    paths = {layer.name: of[place].path for place, layer in enumerate(theirs)}
    said = {}
    for place, layer in enumerate(theirs):
        form = next(form for form in layer.forms if form in of[place].forms)
        if layer.forms[form] is not None:
            said[layer.name] = layer.forms[form]
    parts = [part_of(state_dict, name, said.get(name)) for name in paths]
    hints = {**flattened(parts, hints), **hints}
    check_order(parts, hints)
    return Match(paths, {**said, **hints})


def _check_given(given: Mapping[str, Path], theirs: list[Layer], ours: list[Layer]) -> None:
    by_name, by_path = {layer.name: layer for layer in theirs}, {layer.path: layer for layer in ours}
    for name, path in given.items():
        if name not in by_name:
            near = ", ".join(list(by_name)[:SHOWN])
            raise KeyError(f"names has {name!r}, which state_dict has not: give names of its layers ({near}, …)")
        if path not in by_path:
            raise KeyError(
                f"names leads {name!r} to {'/'.join(map(str, path))}, where variables has no layer: give the path of "
                "the module that has the weights"
            )
        layer, our = by_name[name], by_path[path]
        if not layer.forms.keys() & our.forms.keys():
            raise ValueError(
                f"names leads {name}, {_forms(layer)}, to {our.name}, {_forms(our)}: give layers of one kind and shape"
            )


def _check_left(found: list[list[int]], theirs: list[Layer], ours: list[Layer]) -> None:
    """That layers of a kind are as many on either side."""
    forms: dict[Form, tuple[list[Layer], list[Layer]]] = {}
    known = {form for our in ours for form in our.forms}
    for side, layers in enumerate((theirs, ours)):
        for layer in layers:
            form = next((form for form in layer.forms if form in known), next(iter(layer.forms)))
            forms.setdefault(form, ([], []))[side].append(layer)
    wrong = {form: sides for form, sides in forms.items() if len(sides[0]) != len(sides[1])}
    if not wrong or (len(theirs) == len(ours) and all(found) and len({*chain(*found)}) == len(theirs)):
        return  # where a layer may be of two forms, their counts say nothing yet
    lines = [
        f"{form}: {_listed(a)} in state_dict, {_listed(b)} in variables" for form, (a, b) in list(wrong.items())[:SHOWN]
    ]
    transposed = "; a transposed convolution that Flax does not call ConvTranspose_0 needs the hint 'transposed'"
    raise ValueError(
        f"state_dict has {len(theirs)} layers and variables has {len(ours)}, and of {len(wrong)} kinds they have not "
        f"equally many; {'; '.join(lines)}. Shapes are Flax's. If it is the state_dict of this model, build the Flax "
        "model with the same sizes, and take what it does not have out of state_dict"
        + (transposed if any(form.role == "convolution" for form in wrong) else "")
    )


def _order(ours: list[Layer]) -> list[list[int]]:
    """For each layer those before it: of siblings that differ by a number alone, the smaller number is first."""
    before: list[list[int]] = [[] for _ in ours]
    for i, a in enumerate(ours):
        for j, b in enumerate(ours):
            pair = next(((x, y) for x, y in zip(a.path, b.path, strict=False) if x != y), None)
            if pair is not None:
                (name, number), (other, other_number) = map(stem, pair)
                if name == other and number is not None and other_number is not None and number < other_number:
                    before[j].append(i)
    return before


def _narrow(found: list[list[int]], before: list[list[int]], theirs: list[Layer], ours: list[Layer]) -> None:
    """Takes away what order forbids, and what as many others need; until nothing changes."""
    for our in range(len(ours)):
        _keep(found, our, lambda _: True, theirs, ours)
    changed = True
    while changed:
        sizes = [len(places) for places in found]
        for later, earlier in enumerate(before):
            for first in earlier:
                if found[later][0] <= found[first][0]:
                    _keep(found, later, lambda place, low=found[first][0]: place > low, theirs, ours)
                if found[first][-1] >= found[later][-1]:
                    _keep(found, first, lambda place, high=found[later][-1]: place < high, theirs, ours)
        groups: dict[tuple[int, ...], list[int]] = {}
        for our, places in enumerate(found):
            groups.setdefault(tuple(places), []).append(our)
        for places, group in groups.items():
            if len(places) <= len(group):
                needed = {*group[: len(places)]}  # one more would find none left
                for our in {our for place in places for our in _may_be(found, place)} - needed:
                    _keep(found, our, lambda place, taken=places: place not in taken, theirs, ours)
        for place in range(len(theirs)):
            if len(only := _may_be(found, place)) == 1:
                found[only.pop()] = [place]
        changed = sizes != [len(places) for places in found]


def _may_be(found: list[list[int]], place: int) -> set[int]:
    return {our for our, places in enumerate(found) if place in places}


def _keep(
    found: list[list[int]], our: int, kept: Callable[[int], bool], theirs: list[Layer], ours: list[Layer]
) -> None:
    found[our] = [place for place in found[our] if kept(place)]
    if not found[our]:
        form = next(iter(ours[our].forms))
        alike = [layer for layer in theirs if form in layer.forms]
        raise ValueError(
            f"variables has {ours[our].name}, {form}, and none of {_listed(alike)} of state_dict is left for it in an "
            "order of definition that is that of the numbers in Flax's names: give names of some layers"
        )


def _together(found: list[list[int]], theirs: list[Layer], ours: list[Layer]) -> bool:
    """Whether layers are drawn to those that they stand with: in a module of Flax's, or of PyTorch's."""
    known = {places[0]: our for our, places in enumerate(found) if len(places) == 1}
    size = sum(map(len, found))
    for members in _modules(ours).values():  # which PyTorch defines one after another
        seen = [found[our][0] for our in members if len(found[our]) == 1]
        low, high = (max(seen) - len(members), min(seen) + len(members)) if seen else (-1, len(theirs))
        _draw(found, {our: [place for place in found[our] if low < place < high] for our in members})
    inner: dict[Path, list[int]] = {}
    for place, layer in enumerate(theirs):
        inner.setdefault(layer.words[:-1], []).append(place)
    for places in inner.values():  # which are in one module of Flax's
        parents = {ours[known[place]].path[:-1] for place in places if place in known}
        if len(parents) == 1:
            (parent,) = parents
            apart = {our for our, layer in enumerate(ours) if layer.path[:-1] != parent}
            drawn = {our: [place for place in found[our] if place not in places] for our in apart}
            if all(_may_be(found, place) - apart for place in places):
                _draw(found, drawn)
    return sum(map(len, found)) < size


def _modules(layers: list[Layer]) -> dict[Path, list[int]]:
    """What is in each module, at any depth."""
    modules: dict[Path, list[int]] = {}
    for place, layer in enumerate(layers):
        for depth in range(1, len(layer.path)):
            modules.setdefault(layer.path[:depth], []).append(place)
    return modules


def _draw(found: list[list[int]], drawn: dict[int, list[int]]) -> None:
    if all(drawn.values()):  # else the two models are not so alike
        for our, places in drawn.items():
            found[our] = places


def _alike(found: list[list[int]], theirs: list[Layer], ours: list[Layer]) -> bool:
    """Whether two were made one, the most alike that are each more like the other than like any other that is left."""
    scores = {
        (our, place): likeness(ours[our], theirs[place])
        for our, places in enumerate(found)
        if len(places) > 1
        for place in places
    }
    for (our, place), score in sorted(scores.items(), key=lambda item: item[1], reverse=True):
        if all(score > other for pair, other in scores.items() if (pair[0] == our) != (pair[1] == place)):
            found[our] = [place]
            return True
    return False


def _ambiguous(found: list[list[int]], theirs: list[Layer], ours: list[Layer]) -> str:
    groups: dict[tuple[int, ...], list[Layer]] = {}
    for our, places in zip(ours, found, strict=True):
        if len(places) > 1:
            groups.setdefault(tuple(places), []).append(our)
    lines = [
        f"{_listed(group)} may be {_listed([theirs[place] for place in places])}" for places, group in groups.items()
    ]
    (places, group), *_ = groups.items()
    return (
        f"neither kind, shape and order nor names say which layer is which: {'; '.join(lines[:SHOWN])}. Give some of "
        f"them, e.g. names={{{theirs[places[0]].name!r}: {group[0].path}}} if that is so"
    )


def _forms(layer: Layer) -> str:
    return " or ".join(map(str, layer.forms))


def _listed(layers: list[Layer]) -> str:
    more = f" and {len(layers) - SHOWN} more" if len(layers) > SHOWN else ""
    return ", ".join(layer.name for layer in layers[:SHOWN]) + more if layers else "none"
