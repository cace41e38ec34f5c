"""Folding of a `flax.linen` model: its calls are watched while it is traced, and replaced by an interceptor."""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import unfreeze
from jax.experimental.xla_metadata import set_xla_metadata

from jbn._flax import fold_shared
from jbn._flax.check_model import check_model
from jbn._flax.fold_marks import Call, Marks
from jbn._flax.fold_pairs import Pair
from jbn._flax.fold_trace import foldable
from jbn._flax.nested import STATS, Path, at, put
from jbn._functions.batch_norm import BNParams, BNState

_folds = itertools.count()


class Folded(NamedTuple):
    """A linen model whose batch norms are in its layers.

    Attributes:
      apply: as the model's `apply`, for inference with the variables below.
      variables: those of the model, without the batch norms that were folded; layers that took one up have a `bias`,
        in a layer with `use_bias=False` too.
      folded: for each batch norm folded the layer it is in, by paths such as `"Block_0/BatchNorm_1"`.
      left: for each batch norm that runs as before the reason.
    """

    apply: Callable[..., Any]
    variables: Any
    folded: dict[str, str]
    left: dict[str, str]


def fold(model: nn.Module, variables: Any, *args: Any, **call: Any) -> Folded:
    """Rewrites a model for inference: batch norms go into the dense layers and convolutions before or behind them.

    The model is traced as `model.apply(variables, *args, **call)`. A batch norm (`jbn.linen.BatchNorm` or Flax's, on
    running averages) is folded into the `nn.Dense`, `nn.Conv` or `nn.ConvTranspose` whose output is its input, if
    nothing else reads that output (`jbn.fold_into_previous`); else into the one that alone reads its output, where that
    is exact (`jbn.fold_into_next`). Its residual and activation stay. Everything else runs as before, and `left` says
    why: a layer or value that is used elsewhere too, stacked weights, training mode, padding with zeros, a class with a
    `__call__` of its own, a layer that makes of its stored kernel another one (weight standardisation, quantisation).

    Then both models run on the arguments, in JAX's highest precision of products: a batch norm whose folding changes
    the outputs by more than √eps of their size (‖difference‖ / ‖output‖; eps of the coarsest dtype) is left as well,
    with the error seen.

    Usage:

        folded = jbn.linen.fold(model, variables, x, train=False)
        y = jax.jit(lambda v, x: folded.apply(v, x, train=False))(folded.variables, x)

    Args:
      model: any linen module.
      variables: as `model.init` returned them, trained; they are not changed. Boxes, as of `nn.with_partitioning`, are
        opened in the result.
      *args: of the call: arrays, an example; or `jax.ShapeDtypeStruct`s, for which normal numbers (zeros, where they
        are not floats) are drawn. Nothing is compared while arguments or variables are traced.
      **call: as well, and those of `apply`, such as `method` and `rngs`.

    Returns:
      `Folded`. Its `apply` takes the arguments of `model.apply`; call it as the model was traced here.

    Raises:
      TypeError: `model` is no linen module.
      ValueError: `variables` has no collections; from `apply`, if a folded batch norm is to run in training mode.

    Source: Jacob et al. (2018), section 3.2 (https://arxiv.org/abs/1712.05877).
    """
    check_model(model, nn.Module, "a flax.linen module", "call jbn.nnx.fold(model, x)")
    if {"params", STATS}.isdisjoint(variables):
        raise ValueError(
            f"variables has the entries {', '.join(variables) or '(none)'}, expected 'params' and "
            f"'{STATS}': give all that model.init returned"
        )
    plain = unfreeze(nn.meta.unbox(variables))
    marks, norms, axes, dtypes = Marks(), {}, {}, {}

    def watch(next_fun, args, kwargs, context):
        layer = context.module
        known = _known(layer)
        if context.method_name != "__call__" or known is None:
            return next_fun(*args, **kwargs)
        name = "/".join(layer.path)
        call = _call(layer, known, name, plain, args, kwargs)

        def run(x):
            y = next_fun(*((x, *args[1:]) if args else ()), **(kwargs if args else {**kwargs, first: x}))
            if known is nn.BatchNorm:
                dtypes[layer.path] = y.dtype
            return y

        first = "x" if known is nn.BatchNorm else "inputs"
        if known is nn.BatchNorm:
            norms[name] = layer.epsilon
        else:
            axes[name] = -2 if getattr(layer, "transpose_kernel", False) else -1
        return marks.around(call, run, args[0] if args else kwargs[first])

    def traced(variables, args, options):
        # jitted modules trace anew: old traces have no marks, or others
        with set_xla_metadata(jbn_fold=str(next(_folds))), nn.intercept_methods(watch):
            return model.apply(variables, *args, **options), None

    @functools.lru_cache(maxsize=1)
    def folded(done: tuple[Pair, ...]):
        biased: set[Path] = set()
        kept = {tuple(pair.norm.split("/")): dtypes[tuple(pair.norm.split("/"))] for pair in done}

        @jax.jit  # in one compilation
        def rewritten(variables):
            for pair in done:
                variables = _with_pair(variables, pair, norms[pair.norm], axes[pair.layer], biased)
            return variables

        def apply(variables, *args, **call):
            with nn.intercept_methods(_runner(kept, biased)):
                return model.apply(variables, *args, **call)

        return apply, rewritten(plain) if done else plain

    owners = [_owner(_keys(path)) for path, _ in jax.tree_util.tree_leaves_with_path(plain)]
    done, left = foldable(traced, plain, owners, args, call, marks, folded)
    return Folded(*folded(done), {pair.norm: pair.layer for pair in done}, left)


def _runner(norms: dict[Path, Any], biased: set[Path]) -> Callable:
    """Adds the biases that layers got, and leaves of a folded batch norm its residual and activation."""

    def run(next_fun, args, kwargs, context):
        layer = context.module
        if context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if layer.path in biased:
            y = next_fun(*args, **kwargs)
            bias = layer.get_variable("params", "bias").astype(y.dtype)
            return y + jnp.expand_dims(bias, range(y.ndim - 1))
        if layer.path in norms:
            x, average, residual = _arguments(*args, **kwargs)
            if not nn.merge_param("use_running_average", layer.use_running_average, average):
                raise ValueError(
                    f"batch norm {'/'.join(layer.path)} is folded for inference and was called in training mode: "
                    "train the model and the variables it was folded from"
                )
            return fold_shared.rest(x, residual, fold_shared.last(layer), norms[layer.path])
        return next_fun(*args, **kwargs)

    return run


def _known(layer: nn.Module) -> type | None:
    """The class of Flax that a module is, if it may take part."""
    for kind in (nn.BatchNorm, nn.Dense, nn.Conv, nn.ConvTranspose):
        if isinstance(layer, kind):
            return kind if kind is nn.BatchNorm or type(layer).__call__ is kind.__call__ else None
    return None


def _call(layer: Any, known: type, name: str, variables: Any, args: tuple, kwargs: dict) -> Call:
    if known is nn.BatchNorm:
        x, average, residual = _arguments(*args, **kwargs)
        return fold_shared.norm_call(
            name,
            layer,
            x,
            own=fold_shared.redefined(type(layer), nn.BatchNorm),
            average=nn.merge_param("use_running_average", layer.use_running_average, average),
            mean=at(variables.get(STATS, {}), layer.path).get("mean", ()),
            residual=residual,
        )
    kernel = at(variables.get("params", {}), layer.path).get("kernel", ())
    window = None if known is nn.Dense else jnp.shape(kernel)[:-2]
    own = layer.get_variable("params", "kernel", kernel)
    return fold_shared.layer_call(name, layer, kernel, window, known is nn.ConvTranspose, jnp.shape(own))


def _arguments(x, use_running_average=None, *, residual=None, **_):
    return x, use_running_average, residual


def _with_pair(variables: Any, pair: Pair, epsilon: Any, axis: int, biased: set[Path]) -> Any:
    """The variables once the layer of a pair has taken up its batch norm."""
    norm, layer = (tuple(name.split("/")) for name in (pair.norm, pair.layer))
    params, stats = variables["params"], variables[STATS]
    learned, state = at(params, norm), BNState(**at(stats, norm))
    learned = BNParams(learned.get("scale"), learned.get("bias"))
    own = at(params, layer)
    kernel, bias = fold_shared.weights(pair, learned, state, epsilon, own["kernel"], own.get("bias"), axis)
    if "bias" not in own:
        biased.add(layer)
    params = put(put(params, norm, None), layer, {**own, "kernel": kernel, "bias": bias})
    whole = {**variables, "params": params, STATS: put(stats, norm, None)}
    return {name: tree for name, tree in whole.items() if tree}


def _owner(keys: list[str]) -> tuple[str, str]:
    """The module whose variable is there, and what it calls a parameter."""
    return "/".join(keys[1:-1]), keys[-1] if keys[0] == "params" else "/".join(keys)


def _keys(path: tuple) -> list[str]:
    return [getattr(key, "key", str(key)) for key in path]
