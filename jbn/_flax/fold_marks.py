"""Marks around the calls of layers and batch norms, by which a jaxpr shows where each begins and ends."""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name

TAG = "jbn_fold"
MARK = re.compile(rf"{TAG}_(\d+)_(in|out)")
SCOPE = re.compile(rf"{TAG}_(\d+)\b")


class Call(NamedTuple):
    """One call of a batch norm or of a layer that may take one up."""

    module: str
    is_norm: bool
    refuses: str = ""  # why this module cannot be folded, whatever is around it
    refuses_behind: str = ""  # of a layer: why a batch norm before it cannot be folded into it; of a norm: its own why
    transposed: bool = False  # of a convolution


class Marks:
    """The calls of one trace, by number."""

    def __init__(self):
        self.calls: list[Call] = []

    def around(self, call: Call, function: Callable[[Any], Any], x: Any) -> Any:
        """`function(x)`, marked as this call."""
        number = len(self.calls)
        self.calls.append(call)
        with jax.named_scope(f"{TAG}_{number}"):
            x = checkpoint_name(x, f"{TAG}_{number}_in")
            return checkpoint_name(function(x), f"{TAG}_{number}_out")
