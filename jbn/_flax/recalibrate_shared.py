"""What recalibration of linen and nnx models shares: going through the batches, and pooling what layers saw."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jbn._flax.layer import feature_axes, feature_axis, full_rank_mask
from jbn._functions.batch_norm import BNState
from jbn._functions.checks import FLOATS, check_positive
from jbn._functions.moments import Moments, merge, moments, population_state
from jbn._op.merging import merge_stream


def pool(step: Callable[[Any, int], Any], batches: Iterable, num_batches: int | None, progress: bool) -> Any:
    """The moments that `step(args, number)` gives for each batch, merged: a pytree of `Moments`."""
    batches, expected = _checked(batches, num_batches)
    taken = _taken(batches, expected)
    if progress:
        taken = _with_bar(taken, expected)
    total = merge_stream((step(args, number) for number, args in enumerate(taken)), _merge_trees)
    if total is None:
        raise ValueError("batches yielded none: give at least one (a generator that was used up yields none)")
    return total


def layer_moments(layer: Any, x: Any, mask: Any, name: str) -> Moments:
    """Moments of what a Flax batch norm called `name` was given, the count `(C,)` as well."""
    x = jnp.asarray(x)
    if x.dtype.name not in FLOATS or len(feature_axes(layer.axis, x)) != 1:
        raise ValueError(
            f"batch norm {name} got x of dtype {x.dtype.name} with axis={layer.axis!r}, expected one of "
            f"{', '.join(FLOATS)} and a single feature axis: recalibrate has no moments of anything else"
        )
    if layer.axis_name is not None and layer.axis_index_groups is not None:
        raise ValueError(
            f"batch norm {name} has axis_index_groups={layer.axis_index_groups!r}, expected None: build the model "
            "without them, its variables are the same"
        )
    mask = full_rank_mask(mask, x)
    seen = moments(x, axis=feature_axis(layer.axis, x), mask=mask, axis_name=layer.axis_name)
    return seen._replace(count=jnp.broadcast_to(seen.count, seen.mean.shape))


def check_arguments(function: Callable, name: str, args: tuple, options: dict[str, Any]) -> None:
    """That a batch is what the model's method takes.

    Raises:
      TypeError: it is not, as where labels are in it.
    """
    signature = inspect.signature(function)
    try:
        signature.bind(*args, **options)
    except TypeError as error:
        given = f"a tuple of {len(args)}" if len(args) > 1 else "one argument"
        raise TypeError(
            f"batches gave {given}, and the model is called as {name}{signature}: {error}. A tuple becomes as many "
            "arguments: give the inputs alone, e.g. (x for x, y in batches), and what is the same for all by keyword"
        ) from None


def empty_like(mean: jax.Array) -> Moments:
    """Moments of nothing; a layer stacked by `scan` or `vmap` has leading axes."""
    return Moments(*(jnp.zeros_like(mean) for _ in range(3)))


def new_state(old: BNState, seen: Moments, unbiased: bool) -> BNState:
    """The population's statistics in the old dtypes; a channel of which nothing was seen keeps its own."""
    new = population_state(seen, unbiased)
    return BNState(*(jnp.where(seen.count > 0, n, o).astype(o.dtype) for n, o in zip(new, old, strict=True)))


def nothing_trained() -> ValueError:
    return ValueError(
        "no batch norm ran in training mode, so there is nothing to recalibrate: with linen pass the argument that "
        "says so to the model (e.g. train=True); with nnx call model.train() before"
    )


@jax.jit
def _merge_trees(a, b):
    return jax.tree.map(merge, a, b, is_leaf=lambda leaf: isinstance(leaf, Moments))


def _checked(batches: Any, num_batches: int | None) -> tuple[Iterable, int | None]:
    """The batches, and how many of them there have to be, if that is known."""
    if hasattr(batches, "dtype") or not isinstance(batches, Iterable):
        kind = f"an array of shape {batches.shape}" if hasattr(batches, "dtype") else f"a {type(batches).__name__}"
        raise TypeError(f"batches is {kind}, expected an iterable of batches: put a single one into a list")
    if num_batches is None:
        return batches, len(batches) if hasattr(batches, "__len__") else None  # type: ignore[arg-type]
    remedy = "give how many batches to take, or None for all"
    return batches, check_positive("num_batches", num_batches, "None or a positive integer", remedy)


def _taken(batches: Iterable, expected: int | None) -> Iterator[tuple]:
    """The arguments of each call: a tuple is several."""
    taken = 0
    for batch in batches:
        yield batch if isinstance(batch, tuple) else (batch,)
        taken += 1
        if taken == expected:
            return
    if expected and taken:
        raise ValueError(
            f"batches ended after {taken} of {expected}, and the model stays as it was: give as many, or say "
            f"num_batches={taken}"
        )


def _with_bar(taken: Iterator, total: int | None) -> Iterator:
    try:
        from rich.progress import track
    except ImportError:
        raise ImportError("progress=True needs rich: pip install rich, or leave progress out") from None
    yield from track(taken, "Recalibrating", total)
