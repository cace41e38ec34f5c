"""What a rule that XLA calls back depends on, in a few letters that are the same in every process.

JAX's compilation cache goes by a program's text. A rule is not in the text, so what it will do has to be named there:
else a program would be loaded that was compiled by another rule, or, named by an address, never be found again.
"""

import functools
import hashlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

ARITHMETIC = ("jax_enable_x64", "jax_default_matmul_precision", "jax_numpy_dtype_promotion")  # settings it may go by
PACKAGES = ("jbn", "jax", "jaxlib", "triton", "jax-triton")


def identity(*parts: Any) -> str:
    """A digest of these, by what they print as, of our code, the packages below it and the settings at this moment."""
    settings = [getattr(jax.config, name) for name in ARITHMETIC]
    return hashlib.sha256(repr((_code(), settings, parts)).encode()).hexdigest()


@functools.cache
def _code() -> str:
    """Of our sources, which say more than a version, and of the packages that translate them."""
    digest = hashlib.sha256(repr([_version(package) for package in PACKAGES]).encode())
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _sources() -> Iterator[Path]:
    package = Path(__file__).parents[1]
    for folder in (package, package / "kernels"):  # which is a link, that a search does not follow
        yield from sorted(folder.rglob("*.py"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
