"""Ours beside plain jax.numpy: of the reference every release of JAX makes the same, so one Python computes it."""

import functools
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import kept
import numpy as np
import reference

import jbn

TESTS = Path(__file__).parents[1]


def both(compute: Callable[[Any], Any]) -> tuple[Any, Any]:
    """`compute(bn)` of ours and, kept for this test, of the reference; called once in a test."""
    test = os.environ["PYTEST_CURRENT_TEST"].rpartition(" ")[0]
    want = kept.always((test, written()), lambda: jax.tree.map(np.asarray, compute(reference)))
    return compute(jbn), want


@functools.cache
def written() -> str:
    """A hash of the tests as they stand."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in sorted(TESTS.rglob("*.py")))).hexdigest()
