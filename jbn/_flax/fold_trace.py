"""A model traced once, the pairs that are in the trace, and these tried beside it: the same for linen and nnx."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun

from jbn._flax.fold_check import checked, relative_error
from jbn._flax.fold_linear import Owner
from jbn._flax.fold_marks import Marks
from jbn._flax.fold_pairs import Pair, pairs


def foldable(
    traced: Callable[[Any, tuple, dict], tuple[Any, Any]],
    variables: Any,
    owners: Sequence[Owner],
    args: tuple,
    call: dict,
    marks: Marks,
    folded: Callable[[tuple[Pair, ...]], tuple[Callable[..., Any], Any]],
) -> tuple[tuple[Pair, ...], dict[str, str]]:
    """The pairs that a model is folded by, and for every other batch norm the reason.

    Args:
      traced: runs the model on variables, arguments and options, its calls marked; returns its outputs, and what it
        stores, to be read later.
      variables, args, call: what it is traced with.
      owners: for each array among the variables, the module whose it is and its name there.
      marks: of the trace.
      folded: what runs the model folded by these pairs, and the variables that it then has.
    """
    arrays, join = _arrays_apart(args, call)

    def run(variables, arrays):
        return traced(variables, *join(arrays))

    precise = jax.default_matmul_precision("highest")
    with precise:
        closed, shapes = jax.make_jaxpr(run, return_shape=True)(variables, arrays)
    found, left = pairs(closed, [*owners, *[None] * len(arrays)], marks)

    def error(done: tuple[Pair, ...], drawn: list) -> float:
        apply, others = folded(done)

        @jax.jit
        def compare(variables, others, arrays):
            flat = jaxpr_as_fun(closed)(*jax.tree.leaves((variables, arrays)))
            want, _ = jax.tree.unflatten(jax.tree.structure(shapes), flat)
            args, options = join(arrays)
            return relative_error(want, apply(others, *args, **options))

        with precise:
            return float(compare(variables, others, drawn))

    done, wrong = checked(found, error, closed.jaxpr, arrays, variables)
    return done, left | wrong


def _arrays_apart(args: tuple, call: dict) -> tuple[list, Callable[[list], tuple[tuple, dict]]]:
    """The arrays among the arguments, to be traced, and what puts them back beside the others."""
    leaves, tree = jax.tree.flatten((args, call))
    places = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

    def join(arrays: list) -> tuple[tuple, dict]:
        whole = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            whole[place] = array
        return jax.tree.unflatten(tree, whole)

    return [leaves[place] for place in places], join
