"""What `help` shows of the modules' constructors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Kind = TypeVar("Kind", bound=type)
# Flax's own arguments whose type Python writes out as all that its name stands for
NAMES = {
    "dtype": "DTypeLike | None",
    "param_dtype": "DTypeLike",
    "bias_init": "Initializer",
    "scale_init": "Initializer",
    "parent": "Module | Scope | None",
}


def showing_constructor(flax: type) -> Callable[[Kind], Kind]:
    """A class whose signature is its `__init__`'s, with the arguments of Flax's class in place of `**flax`.

    nnx's metaclass hides it, and in linen's a type fills a line. Set once linen has made the class, as that wraps what
    it finds in one.
    """

    def shown(kind: Kind) -> Kind:
        kind.__signature__ = _Constructor(flax)
        return kind

    return shown


class _Constructor:
    """Each subclass has its own, and instances none: what calls an instance has `__call__`."""

    def __init__(self, flax: type):
        self.flax = flax

    def __get__(self, instance: Any, owner: type) -> inspect.Signature:
        if instance is not None:
            raise AttributeError("__signature__")
        own = list(inspect.signature(owner.__init__).parameters.values())[1:]
        if any(each.name == "flax" for each in own):
            named = {each.name for each in own}
            theirs = inspect.signature(self.flax.__init__).parameters.values()
            own = [each for each in own if each.name != "flax"]
            own += [each for each in theirs if each.kind is each.KEYWORD_ONLY and each.name not in named]
        return inspect.Signature([each.replace(annotation=NAMES.get(each.name, each.annotation)) for each in own])
