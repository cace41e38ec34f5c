"""A folded model beside the one it was folded from, on an example: what changes the outputs is not folded."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import core
from jax.extend.core import Jaxpr, jaxprs_in_params

from jbn._flax.fold_pairs import Pair
from jbn._functions.checks import FLOATS


def checked(
    found: Sequence[Pair],
    error: Callable[[tuple[Pair, ...], list], float],
    jaxpr: Jaxpr,
    arrays: Sequence[Any],
    variables: Any,
) -> tuple[tuple[Pair, ...], dict[str, str]]:
    """The pairs that the model may be folded by, and for every other norm the error seen.

    Args:
      found: what looks right.
      error: of the model's outputs on an example when folded by these pairs, relative to them.
      jaxpr: of the model; the largest error is √eps of the coarsest dtype in it.
      arrays, variables: the example, and the model's own; while they are traced nothing can be compared.
    """
    drawn = example(arrays)
    if drawn is None or example(jax.tree.leaves(variables)) is None:
        return tuple(found), {}
    most = max((float(jnp.finfo(dtype).eps) for dtype in _dtypes(jaxpr) if dtype.name in FLOATS), default=0) ** 0.5
    left: dict[str, str] = {}

    @functools.cache
    def off(some: tuple[Pair, ...]) -> float:
        return error(some, drawn)

    def right(some: tuple[Pair, ...], together: bool = False) -> tuple[Pair, ...]:
        if not some or off(some) <= most:
            return some
        if together or len(some) == 1:
            for pair in some:
                left[pair.norm] = (
                    f"folded into {pair.layer} it changes the outputs on the example by {off(some):.1e} of their "
                    f"size, more than rounding does ({most:.1e})"
                )
            return ()
        half = len(some) // 2
        return right(some[:half]) + right(some[half:])

    return right(right(tuple(found)), together=True), left


def _dtypes(jaxpr: Jaxpr) -> Iterator[Any]:
    for value in (*jaxpr.invars, *(out for eqn in jaxpr.eqns for out in eqn.outvars)):
        yield getattr(value.aval, "dtype", jnp.dtype(bool))
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            yield from _dtypes(inner)


def relative_error(want: Any, got: Any) -> jax.Array:
    """The largest ‖got − want‖ / ‖want‖ of the arrays that both trees have at a place; ∞ where NaN or ∞ differ."""
    others = dict(jax.tree_util.tree_leaves_with_path(got))
    both = [
        (jnp.asarray(a), jnp.asarray(others[path]))
        for path, a in jax.tree_util.tree_leaves_with_path(want)
        if path in others
    ]
    floats = [pair for pair in both if jnp.issubdtype(pair[0].dtype, jnp.inexact)]
    return jnp.max(jnp.stack([jnp.float32(0), *(_relative(*pair) for pair in floats or both)]))


def _relative(want: jax.Array, got: jax.Array) -> jax.Array:
    wide = jnp.result_type(want.dtype, jnp.float32)
    want, got = want.astype(wide), got.astype(wide)
    finite = jnp.isfinite(want) & jnp.isfinite(got)
    same = jnp.all(finite | (want == got) | (jnp.isnan(want) & jnp.isnan(got)))
    want, difference = jnp.where(finite, want, 0), jnp.where(finite, got - want, 0)
    unit = jnp.max(jnp.abs(want), initial=0)
    unit = jnp.where(unit > 0, unit, 1)
    off, size = (jnp.sqrt(jnp.sum(jnp.abs(v / unit) ** 2)) for v in (difference, want))
    return jnp.where(same, jnp.where(off == 0, 0, off / size), jnp.inf).astype(jnp.float32)


def example(arrays: Sequence[Any]) -> list | None:
    """The arrays, standard normal numbers or zeros for shapes alone; None while they are traced."""
    if any(isinstance(each, core.Tracer) for each in arrays):
        return None

    def drawn(number: int, given: Any) -> Any:
        if not isinstance(given, jax.ShapeDtypeStruct):
            return given
        if jnp.issubdtype(given.dtype, jnp.inexact):
            return jax.random.normal(jax.random.key(number), given.shape, given.dtype)
        return jnp.zeros(given.shape, given.dtype)

    return [drawn(number, given) for number, given in enumerate(arrays)]
