"""Folding of a `flax.nnx` model: a copy of it is traced whose layers mark their calls, and a copy is rewritten."""

import functools
from typing import Any, NamedTuple

import jax
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype

from jbn._flax import fold_shared
from jbn._flax.check_model import check_model
from jbn._flax.fold_marks import Call, Marks
from jbn._flax.fold_pairs import Pair
from jbn._flax.fold_trace import foldable
from jbn._functions.batch_norm import BNParams, BNState


class Folded(NamedTuple):
    """An nnx model whose batch norms are in its layers.

    Attributes:
      model: a copy of the model for inference, in which a batch norm that was folded is a `FoldedNorm`, and layers
        that took one up have a bias.
      folded: for each batch norm folded the layer it is in, by paths such as `"blocks.0.norm1"`.
      left: for each batch norm that runs as before the reason.
    """

    model: Any
    folded: dict[str, str]
    left: dict[str, str]


class FoldedNorm(nnx.Module):
    """What is left of a batch norm whose affine map is in a layer: activation(x + residual), in its dtype."""

    def __init__(self, activation: Any, negative_slope: float, dtype: Any):
        self.activation = activation
        self.negative_slope = negative_slope
        self.dtype = dtype

    def __call__(self, x, use_running_average=None, *, residual=None, **_):
        """As the batch norm's; a mask and the like say nothing to inference.

        Raises:
          ValueError: `use_running_average=False`.
        """
        if use_running_average is not None and not use_running_average:
            raise ValueError(
                "this batch norm is folded for inference and was called with use_running_average=False: train the "
                "model that it was folded from"
            )
        return fold_shared.rest(x, residual, fold_shared.last(self), self.dtype)


def fold(model: nnx.Module, *args: Any, method: str = "__call__", **call: Any) -> Folded:
    """Rewrites a model for inference: batch norms go into the dense layers and convolutions before or behind them.

    The model is traced as `model(*args, **call)`. A batch norm (`jbn.nnx.BatchNorm` or Flax's, on running averages) is
    folded into the `nnx.Linear`, `nnx.Conv` or `nnx.ConvTranspose` whose output is its input, if nothing else reads
    that output (`jbn.fold_into_previous`); else into the one that alone reads its output, where that is exact
    (`jbn.fold_into_next`). Its residual and activation stay. Everything else runs as before, and `left` says why: a
    layer, weight or value that is used elsewhere too, stacked weights, training mode, padding with zeros, a class with
    a `__call__` of its own, a layer that makes of its stored kernel another one (weight standardisation, quantisation).

    Then both models run on the arguments, in JAX's highest precision of products: a batch norm whose folding changes
    the outputs by more than √eps of their size (‖difference‖ / ‖output‖; eps of the coarsest dtype) is left as well,
    with the error seen.

    Usage:

        model.eval()
        folded = jbn.nnx.fold(model, x)
        y = nnx.jit(folded.model)(x)

    Args:
      model: any module, in inference mode (`model.eval()`). It is not changed.
      *args: of the call: arrays, an example; or `jax.ShapeDtypeStruct`s, for which normal numbers (zeros, where they
        are not floats) are drawn. Nothing is compared while arguments or variables are traced.
      method: name of the method to call.
      **call: as well.

    Returns:
      `Folded`. Call its model as the model was traced here.

    Raises:
      TypeError: `model` is no nnx module.

    Source: Jacob et al. (2018), section 3.2 (https://arxiv.org/abs/1712.05877).
    """
    check_model(model, nnx.Module, "an nnx.Module", "call jbn.linen.fold(model, variables, x)")
    graphdef, state = nnx.split(model)
    marks = Marks()
    dtypes: dict[str, Any] = {}
    whole = _layers(model)
    shapes = {name: (x.mean if isinstance(x, nnx.BatchNorm) else x.kernel).shape for name, x in whole.items()}

    def traced(state, args, options):
        given = jax.tree.leaves(state)  # now: the twin's variables may be those of state
        twin = nnx.merge(graphdef, state)
        for name, layer in _layers(twin).items():
            layer.fold_name = name
            object.__setattr__(layer, "__class__", _marking(type(layer), marks, shapes, dtypes))
        y = getattr(twin, method)(*args, **options)
        after = jax.tree.leaves(nnx.state(twin))
        known = set(map(id, given))
        return y, [value for value in after if id(value) not in known]  # stored, to be read later

    @functools.lru_cache(maxsize=1)
    def folded(done: tuple[Pair, ...]):
        return _folded(model, done, dtypes)

    def apart(done: tuple[Pair, ...]):
        graphdef, others = nnx.split(folded(done))
        return lambda others, *args, **options: getattr(nnx.merge(graphdef, others), method)(*args, **options), others

    owners = [_owner(_keys(path)) for path, _ in jax.tree_util.tree_leaves_with_path(state)]
    done, left = foldable(traced, state, owners, args, call, marks, apart)
    return Folded(folded(done), {pair.norm: pair.layer for pair in done}, left)


def _folded(model: nnx.Module, done: tuple[Pair, ...], dtypes: dict[str, Any]) -> nnx.Module:
    """A copy of the model, folded by these pairs; `dtypes` of the norms' outputs."""
    copy = nnx.clone(model)
    layers = _layers(copy)

    @jax.jit  # in one compilation
    def rewritten(weights):
        for pair in done:
            norm, layer = layers[pair.norm], layers[pair.layer]
            own, (scale, offset, mean, var) = weights[pair.layer], weights[pair.norm]
            axis = -2 if getattr(layer, "transpose_kernel", False) else -1
            learned, seen = BNParams(scale, offset), BNState(mean, var)
            weights = {**weights, pair.layer: fold_shared.weights(pair, learned, seen, norm.epsilon, *own, axis)}
        return {pair.layer: weights[pair.layer] for pair in done}

    taking_part = {name: layers[name] for pair in done for name in (pair.norm, pair.layer)}
    for name, (kernel, bias) in rewritten({name: _weights(layer) for name, layer in taking_part.items()}).items():
        layer = layers[name]
        layer.kernel[...] = kernel
        layer.use_bias = True
        if layer.bias is None:
            layer.bias = nnx.Param(bias)
        else:
            layer.bias[...] = bias
    for pair in done:
        norm = layers[pair.norm]
        remains = FoldedNorm(*fold_shared.last(norm), dtypes[pair.norm])
        vars(norm).clear()
        object.__setattr__(norm, "__class__", FoldedNorm)  # wherever it is referred to
        vars(norm).update(vars(remains))
    return copy


def _layers(model: nnx.Module) -> dict[str, Any]:
    """Modules that may take part, by path, each once."""
    return {".".join(map(str, path)): node for path, node in nnx.iter_graph(model) if _known(type(node))}


def _known(kind: type) -> type | None:
    """The class of Flax that a module's is, if it may take part."""
    for known in (nnx.BatchNorm, nnx.Linear, nnx.Conv, nnx.ConvTranspose):
        if issubclass(kind, known):
            return known if known is nnx.BatchNorm or kind.__call__ is known.__call__ else None
    return None


def _marking(kind: type, marks: Marks, shapes: dict[str, tuple], dtypes: dict[str, Any]) -> type:
    """`kind` whose calls are marked; of one trace, and so not kept."""
    known: Any = _known(kind)
    own = fold_shared.redefined(kind, nnx.BatchNorm) if known is nnx.BatchNorm else ""

    class Marking(kind):
        def __call__(self, *args, **options):
            first = "x" if known is nnx.BatchNorm else "inputs"
            x, *args = args if args else (options.pop(first),)

            def run(x):
                y = super(Marking, self).__call__(x, *args, **options)
                dtypes[self.fold_name] = y.dtype
                return y

            call = _norm_call if known is nnx.BatchNorm else _layer_call
            return marks.around(call(self, x, *args, **options), run, x)

    def _norm_call(layer, x, use_running_average=None, *, residual=None, **_) -> Call:
        average = layer.use_running_average if use_running_average is None else use_running_average
        mean = jax.ShapeDtypeStruct(shapes[layer.fold_name], layer.mean.get_raw_value().dtype)
        call = fold_shared.norm_call(layer.fold_name, layer, x, own=own, average=average, mean=mean, residual=residual)
        if not call.refuses and layer.promote_dtype is not promote_dtype:
            return call._replace(refuses="it has a promote_dtype of its own")
        return call

    def _layer_call(layer, *_, **__) -> Call:
        kernel = layer.kernel.get_raw_value()  # what is made of it as it is read belongs to the call
        window = None if known is nnx.Linear else kernel.shape[:-2]
        transposed, stored = known is nnx.ConvTranspose, shapes[layer.fold_name]
        return fold_shared.layer_call(layer.fold_name, layer, kernel, window, transposed, stored)

    Marking.__name__ = kind.__name__
    return Marking


def _weights(layer: Any) -> tuple:
    names = ("scale", "bias", "mean", "var") if isinstance(layer, nnx.BatchNorm) else ("kernel", "bias")
    return tuple(None if getattr(layer, name) is None else getattr(layer, name)[...] for name in names)


def _owner(keys: list[str]) -> tuple[str, str]:
    """The module whose variable is there, and its name."""
    return ".".join(keys[:-1]), keys[-1]


def _keys(path: tuple) -> list[str]:
    return [str(key.key) for key in path if hasattr(key, "key")]  # not what leads into the variable
