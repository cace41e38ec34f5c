"""`convert.check_settings`: epsilon, momentum and activation of layers that were matched."""

from types import SimpleNamespace

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import nnx

from jbn import convert
from jbn.nnx import BatchNorm


class Torch:
    """What a PyTorch model is to us: its modules by name, with their settings."""

    def __init__(self, eps=1e-3, momentum=0.1):
        self.modules = {
            "": SimpleNamespace(),
            "fc": SimpleNamespace(),
            "bn": SimpleNamespace(eps=eps, momentum=momentum),
            "ln": SimpleNamespace(eps=1e-5),
        }

    def named_modules(self, *, remove_duplicate=True):
        """As PyTorch's: of a module that is there twice the first place alone, unless all are asked for."""
        seen = set()
        for name, module in self.modules.items():
            if not remove_duplicate or id(module) not in seen:
                seen.add(id(module))
                yield name, module


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(True, epsilon=1e-3, momentum=0.9)(nn.Dense(3)(x))
        return nn.LayerNorm(epsilon=1e-5)(x)


def linen():
    """The layers, met where they are called, and names."""
    layers = {}

    def meet(next_fun, args, kwargs, context):
        layers[context.module.path] = context.module
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(meet):
        jax.eval_shape(Linen().init, jax.random.key(0), np.ones((2, 3), np.float32))
    return layers, {"fc": ("Dense_0",), "bn": ("BatchNorm_0",), "ln": ("LayerNorm_0",), "token": ("token",)}


def plain_nnx():
    rngs = nnx.Rngs(0)
    norm, other = nnx.BatchNorm(3, epsilon=1e-3, momentum=0.9, rngs=rngs), nnx.LayerNorm(3, epsilon=1e-5, rngs=rngs)
    model = nnx.Sequential(nnx.Linear(3, 3, rngs=rngs), norm, other)
    return model, {name: ["layers", i] for i, name in enumerate(("fc", "bn", "ln"))}


@pytest.mark.parametrize("made", [linen, plain_nnx])
def test_settings(made):
    model, names = made()
    convert.check_settings(Torch(), model, names)
    at = "/".join(map(str, names["bn"]))
    with pytest.raises(ValueError, match=rf"differ: bn asks for epsilon=1e-05, {at} has 0\.001: build the Flax layers"):
        convert.check_settings(Torch(eps=1e-5), model, names)
    with pytest.raises(ValueError, match=rf"differ: bn asks for momentum=0\.99, {at} has 0\.9: build"):
        convert.check_settings(Torch(momentum=0.01), model, names)
    with pytest.raises(ValueError, match=r"bn asks for momentum=one for each batch, n / \(n \+ 1\), .* has 0\.9"):
        convert.check_settings(Torch(momentum=None), model, names)


def torch_class(name, **settings):
    return type(name, (SimpleNamespace,), {})(**settings)


BEHIND = {
    "relu": torch_class("ReLU"),
    "relu6": torch_class("ReLU6"),
    "silu": torch_class("SiLU"),
    "hard_swish": torch_class("Hardswish"),
    "mish": torch_class("Mish"),
    "sigmoid": torch_class("Sigmoid"),
    "tanh": torch_class("Tanh"),
    "elu": torch_class("ELU", alpha=1.0),
    "gelu_exact": torch_class("GELU", approximate="none"),
    "gelu": torch_class("GELU", approximate="tanh"),
    "leaky_relu": torch_class("LeakyReLU", negative_slope=0.2),
}


def test_an_activation_that_is_used_twice_is_behind_both():
    relu, module = torch_class("ReLU"), Torch()
    module.modules = {
        "": SimpleNamespace(),
        "net": torch_class("Sequential"),
        "net.first": relu,
        "net.bn": module.modules["bn"],
        "net.act": relu,
        "net.last": torch_class("Sigmoid"),
    }
    norm = BatchNorm(3, epsilon=1e-3, momentum=0.9, activation="relu", rngs=nnx.Rngs(0))
    convert.check_settings(module, nnx.Sequential(norm), {"net.bn": ("layers", 0)})
    with pytest.raises(ValueError, match=r"net\.bn asks for activation='relu', layers/0 has activation='sigmoid'"):
        norm.activation = "sigmoid"
        convert.check_settings(module, nnx.Sequential(norm), {"net.bn": ("layers", 0)})


def test_activations():
    """What follows a batch norm in a Sequential; elsewhere, and what is none of ours, says nothing."""

    def check(behind, kind="Sequential", **options):
        module, norm = Torch(), BatchNorm(3, epsilon=1e-3, momentum=0.9, rngs=nnx.Rngs(0), **options)
        module.modules = {
            "": SimpleNamespace(),
            "net": torch_class(kind),
            "net.bn": module.modules["bn"],
            "net.act": behind,
        }
        convert.check_settings(module, nnx.Sequential(norm), {"net.bn": ("layers", 0)})

    for name, behind in BEHIND.items():
        slope = dict(negative_slope=0.2) if name == "leaky_relu" else {}
        check(behind, activation=name, **slope)
        check(behind, kind="Block", activation="mish" if name == "relu" else "relu")
        check(behind)
        check(behind, activation=nnx.softplus)
        other = "mish" if name == "relu" else "relu"
        asked = f"activation='{name}'" + (", negative_slope=0.2" if slope else "")
        with pytest.raises(ValueError, match=f"net.bn asks for {asked}, layers/0 has activation='{other}': build"):
            check(behind, activation=other)
    with pytest.raises(ValueError, match=r"negative_slope=0\.2, layers/0 has activation='leaky_relu', .*slope=0\.01: "):
        check(BEHIND["leaky_relu"], activation="leaky_relu")
    check(torch_class("ELU", alpha=2.0), activation="elu")
    check(torch_class("Conv2d"), activation="relu")


def test_errors():
    model, names = plain_nnx()
    with pytest.raises(TypeError, match="module is a dict, expected a PyTorch module: give the model itself"):
        convert.check_settings({}, model, names)
    with pytest.raises(KeyError, match="names leads 'bn' to layers/0, where model has no norm"):
        convert.check_settings(Torch(), model, names | {"bn": ("layers", 0), "fc": ("layers", 1)})
    with pytest.raises(KeyError, match="names leads 'ln' to a/b, where model has no norm"):
        convert.check_settings(Torch(), {}, {"ln": ("a", "b")})
