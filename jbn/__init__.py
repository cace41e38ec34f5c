"""Batch normalization for JAX: pure functions on explicit state, exact moments, every transformation."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from jbn._functions.autotune import autotune
from jbn._functions.autotune_table import Tuning
from jbn._functions.batch_norm import BNParams, BNState, bn_eval, bn_init, bn_train
from jbn._functions.explain import Explanation, explain
from jbn._functions.folding import fold_into_next, fold_into_previous
from jbn._functions.inverse import denormalize, identity_params
from jbn._functions.moments import Moments, merge, moments, population_state
from jbn._functions.renorm import Renorm

if TYPE_CHECKING:
    from jbn import convert, scaling

__version__ = "0.1.0"
__all__ = [
    "BNParams",
    "BNState",
    "Explanation",
    "Moments",
    "Renorm",
    "Tuning",
    "autotune",
    "bn_eval",
    "bn_init",
    "bn_train",
    "convert",
    "denormalize",
    "explain",
    "fold_into_next",
    "fold_into_previous",
    "identity_params",
    "merge",
    "moments",
    "population_state",
    "scaling",
]


def __getattr__(name: str) -> ModuleType:
    """The doors, imported when first asked for: Flax takes a while, and whoever trains converts nothing."""
    if name in ("convert", "linen", "nnx", "scaling"):
        return importlib.import_module(f"jbn.{name}")
    raise AttributeError(f"module 'jbn' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__", "linen", "nnx"]
