"""What is in no state_dict: whether the layers of two models have equal epsilons, momenta and activations."""

import itertools
from collections.abc import Mapping
from typing import Any

from jbn._functions.convert_layers import complement
from jbn._functions.convert_parts import Names, check_names
from jbn._op.activations import decoded, encoded

ACTIVATIONS = {  # PyTorch's classes, those that no setting changes, and our names
    "ReLU": "relu",
    "ReLU6": "relu6",
    "SiLU": "silu",
    "Hardswish": "hard_swish",
    "Mish": "mish",
    "Sigmoid": "sigmoid",
    "Tanh": "tanh",
}


def check_settings(module: Any, model: Any, names: Names) -> None:
    """Compares epsilon of norms, and momentum and activation of batch norms, of a PyTorch model and a Flax model.

    Epsilons are to be equal, and momenta to sum to 1: PyTorch's is the weight of the new statistics, Flax's that of the
    old ones. Where a batch norm of ours is given the name of an activation, and PyTorch's is followed by one in an
    `nn.Sequential`, they are to be the same (`jbn.convert` has the names); elsewhere PyTorch's modules do not say.

    Usage, of nnx and of linen, whose layers are met where they are called:

        names, _ = jbn.convert.match(module.state_dict(), variables, kind)
        jbn.convert.check_settings(module, model, names)

        layers = {}
        def meet(next_fun, args, kwargs, context):
            layers[context.module.path] = context.module
            return next_fun(*args, **kwargs)
        with nn.intercept_methods(meet):
            jax.eval_shape(model.apply, variables, x)
        jbn.convert.check_settings(module, layers, names)

    Args:
      module: the PyTorch model, of which `named_modules()` is read.
      model: the nnx model; or a mapping of paths to layers, of linen as above.
      names: for each PyTorch layer its path in the Flax model, as `match` finds them.

    Raises:
      TypeError: `module` is no PyTorch module, a state_dict for instance.
      KeyError: `names` leads a norm to where the Flax model has none.
      ValueError: settings differ; with the layers, both values, and what to build Flax's with.
    """
    if not hasattr(module, "named_modules"):
        raise TypeError(f"module is a {type(module).__name__}, expected a PyTorch module: give the model itself")
    # one that is used twice, as an activation often is, stands at each of its places
    modules, wrong = dict(module.named_modules(remove_duplicate=False)), []
    for name, path in check_names(names).items():
        theirs: Any = modules.get(name)
        if not hasattr(theirs, "eps"):
            continue
        layer = _at(model, tuple(path), name)
        wanted: dict[str, Any] = {"epsilon": theirs.eps}
        if hasattr(theirs, "momentum"):
            wanted["momentum"] = None if theirs.momentum is None else complement(theirs.momentum)
        for setting, value in wanted.items():
            if (found := getattr(layer, setting)) != value:
                asked = "one for each batch, n / (n + 1)" if value is None else value
                wrong.append(f"{name} asks for {setting}={asked}, {'/'.join(map(str, path))} has {found}")
        asked = _activation(_behind(modules, name))
        if asked and isinstance(getattr(layer, "activation", None), str):
            found = encoded(layer.activation, layer.negative_slope)
            if found != asked:
                wrong.append(f"{name} asks for {_options(asked)}, {'/'.join(map(str, path))} has {_options(found)}")
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise ValueError(f"settings differ: {'; '.join(wrong[:6])}{more}: build the Flax layers with what is asked for")


def _behind(modules: dict[str, Any], name: str) -> Any:
    """What follows a module in its nn.Sequential, or None."""
    parent = name.rpartition(".")[0]
    if type(modules.get(parent)).__name__ != "Sequential":
        return None
    children = [other for other in modules if other and other.rpartition(".")[0] == parent]
    return modules.get(dict(itertools.pairwise(children)).get(name, ""))


def _activation(module: Any) -> str | None:
    """What of ours a PyTorch module is, as `encoded` has it, or None."""
    kind = type(module).__name__
    if kind == "LeakyReLU":
        return encoded("leaky_relu", module.negative_slope)
    if kind == "GELU":
        return "gelu" if module.approximate == "tanh" else "gelu_exact"
    if kind == "ELU" and module.alpha == 1:
        return "elu"
    return ACTIVATIONS.get(kind)


def _options(encoded: str | None) -> str:
    """An activation as a layer is given it."""
    name, slope = decoded(encoded)
    return f"activation={name!r}" + (f", negative_slope={slope}" if name == "leaky_relu" else "")


def _at(model: Any, path: tuple[str | int, ...], name: str) -> Any:
    layer: Any = model.get(path) if isinstance(model, Mapping) else model
    for key in () if isinstance(model, Mapping) else path:
        layer = layer[key] if isinstance(key, int) else getattr(layer, key, None)
    if not hasattr(layer, "epsilon"):
        shown = "/".join(map(str, path))
        raise KeyError(
            f"names leads {name!r} to {shown}, where model has no norm: give the model that it was matched with"
        )
    return layer
