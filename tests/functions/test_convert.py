"""Weights from PyTorch and Keras, and back: names, conventions, and a whole ResNet-50."""

import sys

import jax
import ml_dtypes
import numpy as np
import oracle
import pytest
from flax import nnx
from jax._src import compiler
from oracle import assert_close

import jbn
from experiments.material.models import NnxResNet50, ResNet50, resnet50_names
from jbn import convert

C = 4


def weights(seed=0):
    """scale, bias, mean, var"""
    rng = np.random.default_rng(seed)
    draws = rng.uniform(0.5, 2, C), rng.normal(size=C), rng.normal(size=C), rng.uniform(0.2, 3, C)
    return [v.astype(np.float32) for v in draws]


def torch_dict(prefix=""):
    names = ("weight", "bias", "running_mean", "running_var")
    tensors = {prefix + name: value for name, value in zip(names, weights(), strict=True)}
    return tensors | {prefix + "num_batches_tracked": np.array(7)}


class Tensor:
    """What a torch tensor is to us: bfloat16 has no NumPy form, one that needs gradients none before `detach`."""

    def __init__(self, array, dtype="torch.float32", detached=False):
        self.array, self.dtype, self.detached = array, dtype, detached

    def detach(self):
        return Tensor(self.array, self.dtype, True)

    def cpu(self):
        return self

    def float(self):
        return Tensor(self.array, "torch.float32", self.detached)

    def __array__(self, dtype=None, copy=None):
        if not self.detached or self.dtype == "torch.bfloat16":
            raise TypeError("not available as an array")
        return self.array


class Module:
    """What a torch module and a Keras layer are to us."""

    def state_dict(self):
        return torch_dict()

    def get_weights(self):
        return weights()


@pytest.mark.parametrize("prefix", ["", "layer1.0.bn1", "layer1.0.bn1."])
@pytest.mark.parametrize("dtype", [None, "torch.float32", "torch.bfloat16"])
def test_from_torch(prefix, dtype):
    tensors = torch_dict("layer1.0.bn1." if prefix else "")
    if dtype:
        tensors = {k: Tensor(v, dtype) for k, v in tensors.items()}
    got = convert.from_torch(tensors, prefix, momentum=0.3, eps=1e-4)
    assert isinstance(got.params, jbn.BNParams) and isinstance(got.state, jbn.BNState)
    for value, want in zip((*got.params, *got.state), weights(), strict=True):
        np.testing.assert_array_equal(value, want)
    assert got[2:] == (0.7, 1e-4, True)
    assert convert.from_torch(tensors, prefix)[2:] == (0.9, 1e-5, True)


def test_training_goes_on_as_in_torch():
    """running ← (1 − 0.1)·running + 0.1·new, with the unbiased variance."""
    params, state, momentum, epsilon, unbiased = convert.from_torch(torch_dict())
    x = np.random.default_rng(1).normal(size=(6, C)).astype(np.float32)
    y, new = jbn.bn_train(params, state, x, momentum=momentum, epsilon=epsilon, unbiased=unbiased)
    scale, bias, mean, var = weights()
    assert_close(new.mean, 0.9 * mean + 0.1 * x.mean(0, dtype=float), n=6)
    assert_close(new.var, 0.9 * var + 0.1 * x.var(0, dtype=float, ddof=1), n=6)
    assert_close(y, oracle.bn_train(x, scale, bias, mean, var).y, n=6)


def test_cumulative_average_as_in_torch():
    """momentum=None there: each batch counts as much as any before it, from whatever count the checkpoint has."""
    tensors = torch_dict()
    params, state, _, epsilon, unbiased = convert.from_torch(tensors)
    batches = np.random.default_rng(1).normal(2, 3, (4, 6, C)).astype(np.float32)

    @jax.jit
    def step(state, n, x):
        return jbn.bn_train(params, state, x, momentum=n / (n + 1), epsilon=epsilon, unbiased=unbiased)[1], n + 1

    for first in (int(tensors["num_batches_tracked"]), 0):
        new, n = state, first
        mean, var = (np.float64(v) for v in weights()[2:])
        for tracked, x in enumerate(batches, first + 1):
            new, n = step(new, n, x)
            mean += (x.mean(0, dtype=float) - mean) / tracked
            var += (x.var(0, dtype=float, ddof=1) - var) / tracked
        np.testing.assert_allclose(new.mean, mean, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(new.var, var, rtol=1e-6)


def test_arrays_are_their_own_and_nothing_is_compiled(monkeypatch):
    """A program for each shape would take seconds for a network; torch's tensors may go on being trained in place."""
    monkeypatch.setattr(compiler, "backend_compile_and_load", lambda *_, **__: pytest.fail("something is compiled"))
    tensors = {k: v.copy() for k, v in torch_dict().items()}
    got = convert.from_torch(tensors)
    for value in tensors.values():
        value[...] = 7
    for value, want in zip((*got.params, *got.state), weights(), strict=True):
        np.testing.assert_array_equal(value, want)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype):
    """Running statistics would stick in it, at whichever door they come in."""
    tensors = {k: v if v.ndim == 0 else v.astype(dtype) for k, v in torch_dict("bn.").items()}
    arrays = [v.astype(dtype) for v in weights()]
    model = convert.model_from_torch(tensors, {"bn": ("Norm",)})
    for tree in (convert.from_torch(tensors, "bn")[:2], convert.from_keras(arrays)[:2], model):
        for got in jax.tree.leaves(tree):
            assert got.dtype == np.float32
    np.testing.assert_array_equal(model["batch_stats"]["Norm"]["var"], arrays[3].astype(np.float32))


def test_what_the_other_library_lacks_is_refused():
    ours, keras = convert.from_torch(torch_dict()), convert.from_keras(weights())
    with pytest.raises(ValueError, match=r"unbiased=True, and Keras's .* give layer\._replace\(unbiased=False\)"):
        convert.to_keras(ours)
    with pytest.raises(ValueError, match=r"unbiased=False, and PyTorch's .* give layer\._replace\(unbiased=True\)"):
        convert.to_torch(keras)
    assert len(convert.to_keras(ours._replace(unbiased=False))[0]) == 4
    assert len(convert.to_torch(keras._replace(unbiased=True))[0]) == 5


@pytest.mark.parametrize("prefix", ["", "net.bn"])
def test_torch_round_trip(prefix):
    tensors = torch_dict(prefix and prefix + ".")
    layer = convert.from_torch(tensors, prefix)
    back, options = convert.to_torch(layer, prefix)
    assert options == {"eps": 1e-5, "momentum": 0.1, "affine": True}
    assert list(back) == list(tensors)
    assert all(isinstance(v, np.ndarray) for v in back.values())
    for name, value in back.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(value, tensors[name])
    assert convert.from_torch(back, prefix, momentum=options["momentum"], eps=options["eps"])[2:] == layer[2:]


def test_torch_without_parameters():
    tensors = {k: v for k, v in torch_dict().items() if k not in ("weight", "bias")}
    layer = convert.from_torch(tensors)
    assert layer.params == (None, None)
    back, options = convert.to_torch(layer)
    assert list(back) == list(tensors) and options["affine"] is False
    scale, *_ = weights()
    back, _ = convert.to_torch(layer._replace(params=jbn.BNParams(scale, None)))
    np.testing.assert_array_equal(back["weight"], scale)
    np.testing.assert_array_equal(back["bias"], np.zeros(C))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_keras(scale, center):
    arrays = [v for v, kept in zip(weights(), (scale, center, True, True), strict=True) if kept]
    config = {"name": "bn", "momentum": 0.8, "epsilon": 2e-3, "scale": scale, "center": center}
    layer = convert.from_keras(arrays, config | {"axis": -1, "synchronized": False, "renorm": False})
    values = [v for v in (*layer.params, *layer.state) if v is not None]
    for got, want in zip(values, arrays, strict=True):
        np.testing.assert_array_equal(got, want)
    assert (layer.params.scale is not None, layer.params.bias is not None) == (scale, center)
    assert layer[2:] == (0.8, 2e-3, False)
    back, options = convert.to_keras(layer)
    assert options == {k: v for k, v in config.items() if k != "name"}
    for got, want in zip(back, arrays, strict=True):
        np.testing.assert_array_equal(got, want)


def test_keras_defaults():
    assert convert.from_keras(weights())[2:] == (0.99, 1e-3, False)


def test_neither_is_imported():
    assert not {"torch", "keras", "tensorflow"} & sys.modules.keys()


def resnet50_state_dict():
    """Names, order and shapes of torchvision's; the values are small integers that tell positions apart."""
    shapes = {}

    def add(conv, norm, outputs, inputs, window):
        shapes[f"{conv}.weight"] = (outputs, inputs, window, window)
        shapes.update({f"{norm}.{v}": (outputs,) for v in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{norm}.num_batches_tracked"] = ()

    add("conv1", "bn1", 64, 3, 7)
    inputs = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True), 1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            sizes = (width, inputs, 1), (width, width, 3), (4 * width, width, 1)
            for i, size in enumerate(sizes, 1):
                add(f"{name}.conv{i}", f"{name}.bn{i}", *size)
            if block == 0:
                add(f"{name}.downsample.0", f"{name}.downsample.1", 4 * width, inputs, 1)
            inputs = 4 * width
    shapes |= {"fc.weight": (1000, 2048), "fc.bias": (1000,)}
    return {
        name: (np.arange(np.prod(shape, dtype=int)) % 251 + i).astype(np.float32).reshape(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def test_resnet50():
    tensors = resnet50_state_dict()
    assert sum(v.size for k, v in tensors.items() if k.endswith(("weight", "bias"))) == 25_557_032
    got = convert.model_from_torch(tensors, resnet50_names())
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    want = jax.eval_shape(lambda key, x: ResNet50().init(key, x, train=False), jax.random.key(0), image)
    shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype.name), tree)  # noqa: E731
    assert shapes(got) == shapes(want)

    params, stats = got["params"], got["batch_stats"]
    equal = np.testing.assert_array_equal
    equal(np.moveaxis(tensors["conv1.weight"], (2, 3, 1, 0), (0, 1, 2, 3)), params["Conv_0"]["kernel"])
    equal(tensors["fc.weight"].T, params["Dense_0"]["kernel"])
    equal(tensors["fc.bias"], params["Dense_0"]["bias"])
    for theirs, ours, conv, norm in [
        ("layer1.0.{}1", "Bottleneck_0", "Conv_0", "BatchNorm_0"),
        ("layer2.0.{}2", "Bottleneck_3", "Conv_1", "BatchNorm_1"),
        ("layer4.2.{}3", "Bottleneck_15", "Conv_2", "BatchNorm_2"),
    ]:
        kernel = tensors[theirs.format("conv") + ".weight"]
        equal(np.einsum("oihw->hwio", kernel), params[ours][conv]["kernel"])
        equal(tensors[theirs.format("bn") + ".weight"], params[ours][norm]["scale"])
        equal(tensors[theirs.format("bn") + ".bias"], params[ours][norm]["bias"])
        equal(tensors[theirs.format("bn") + ".running_mean"], stats[ours][norm]["mean"])
        equal(tensors[theirs.format("bn") + ".running_var"], stats[ours][norm]["var"])
    shortcut = tensors["layer3.0.downsample.0.weight"]
    equal(np.einsum("oihw->hwio", shortcut), params["Bottleneck_7"]["conv_shortcut"]["kernel"])
    equal(tensors["layer3.0.downsample.1.running_var"], stats["Bottleneck_7"]["norm_shortcut"]["var"])


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_resnet50_round_trip(kind):
    """What goes to Flax comes back, every name and value; what came is what the model has."""
    tensors = resnet50_state_dict()
    names = resnet50_names(kind)
    got = convert.model_from_torch(tensors, names, kind)
    back = convert.model_to_torch(got, names, kind)
    assert back.keys() == tensors.keys()
    for name, value in back.items():
        if not name.endswith("num_batches_tracked"):
            np.testing.assert_array_equal(value, tensors[name])
    if kind == "nnx":
        model = nnx.eval_shape(lambda: NnxResNet50(rngs=nnx.Rngs(0)))
        shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype.name), tree)  # noqa: E731
        assert shapes(got) == shapes(nnx.to_pure_dict(nnx.state(model)))
        state = nnx.state(model)
        nnx.replace_by_pure_dict(state, got)
        nnx.update(model, state)
        np.testing.assert_array_equal(
            model.blocks[7].norm_shortcut.var[...], tensors["layer3.0.downsample.1.running_var"]
        )
        np.testing.assert_array_equal(model.dense.kernel[...], tensors["fc.weight"].T)


def test_a_converted_convolution_computes_the_same():
    """Against a sum written out in PyTorch's layouts, NCHW and OIHW."""
    rng = np.random.default_rng(0)
    weight, bias, x = rng.normal(size=(C, 3, 2, 2)), rng.normal(size=C), rng.normal(size=(1, 3, 4, 4))
    windows = np.lib.stride_tricks.sliding_window_view(x, (2, 2), (2, 3))  # n, i, rows, columns, h, w
    want = np.einsum("nirchw,oihw->norc", windows, weight) + bias[:, None, None]
    tensors = {"conv.weight": weight.astype(np.float32), "conv.bias": bias.astype(np.float32)}
    got = convert.model_from_torch(tensors, {"conv": ("Conv_0",)})["params"]["Conv_0"]
    numbers = jax.lax.conv_dimension_numbers((1, 4, 4, 3), got["kernel"].shape, ("NHWC", "HWIO", "NHWC"))
    nhwc = np.moveaxis(x, 1, -1).astype(np.float32)
    y = jax.lax.conv_general_dilated(nhwc, got["kernel"], (1, 1), "VALID", dimension_numbers=numbers) + got["bias"]
    assert_close(np.moveaxis(y, -1, 1), want, np.float32, n=12)


DENSE = {"a.weight": np.ones((2, 2)), "a.bias": np.ones(2)}


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda: convert.from_torch(torch_dict("a.bn."), "b"), KeyError, r"no 'b\.running_mean'.*a\.bn\.running_mean"),
        (lambda: convert.from_torch(Module()), TypeError, r"state_dict is a Module, .*: give module\.state_dict\(\)"),
        (lambda: convert.model_from_torch(Module(), {}), TypeError, r"is a Module, .*: give module\.state_dict\(\)"),
        (
            lambda: convert.from_torch({"bn.weight": 0, "bn.bias": 0}, "bn"),
            KeyError,
            r"no 'bn\.running_mean': a layer with track_running_stats=False .* call bn_train always",
        ),
        (
            lambda: convert.from_keras(Module()),
            TypeError,
            r"weights is a Module: give layer\.get_weights\(\), layer\.get_c",
        ),
        (
            lambda: convert.from_keras(weights(), {"axis": 1}),
            ValueError,
            "axis=1, .*: give that axis to bn_train and bn",
        ),
        (lambda: convert.from_keras(weights(), {"axis": [0]}), ValueError, r"axis=\[0\], .*: give that axis"),
        (lambda: convert.from_keras(weights(), {"axis": 0}), ValueError, "axis=0, .*: give that axis"),
        (
            lambda: convert.from_keras([*weights(), 0, 0], {"renorm": True}),
            ValueError,
            "renorm=True, .*: give bn_train a jbn.Renorm or Flax modules renorm=True, leave the weights of renorm out",
        ),
        (
            lambda: convert.from_keras(weights(), {"virtual_batch_size": 8}),
            ValueError,
            "virtual_batch_size=8, .* bn_train",
        ),
        (lambda: convert.from_keras(weights(), {"synchronized": True}), ValueError, "synchronized=True, .* axis_name"),
        (lambda: convert.from_torch({}), KeyError, r"no 'running_mean': check prefix='' \(names like it: none\)"),
        (
            lambda: convert.from_torch(torch_dict(), momentum=None),
            ValueError,
            r"momentum is None, .* momentum=n / \(n \+ 1\)",
        ),
        (lambda: convert.from_torch(torch_dict(), momentum=2), ValueError, r"momentum is 2, expected .* in \[0, 1\]"),
        (lambda: convert.from_torch(torch_dict(), eps=-1), ValueError, "eps is -1"),
        (lambda: convert.from_keras(weights(), {"scale": False}), ValueError, "4 arrays, expected 3 for scale=False"),
        (
            lambda: convert.from_torch(torch_dict("a.") | {"a.running_var": np.ones(7)}, "a"),
            ValueError,
            r"a\.running_var \(7,\), expected one shape \(C,\)",
        ),
        (
            lambda: convert.from_torch(torch_dict() | {"running_var": -np.ones_like(torch_dict()["running_mean"])}),
            ValueError,
            r"running_var with -1\.0, expected no number below 0",
        ),
        (
            lambda: convert.from_keras([np.ones((1, 3)), *weights()[1:]]),
            ValueError,
            r"weights has gamma \(1, 3\), .* expected one shape \(C,\)",
        ),
        (lambda: convert.to_torch(jbn.bn_init(3)), TypeError, r"layer is a tuple, expected jbn\.convert\.Layer"),
        (lambda: convert.to_keras(jbn.bn_init(3)), TypeError, r"layer is a tuple, expected jbn\.convert\.Layer"),
        (lambda: convert.from_keras(weights(), {"momentum": -1}), ValueError, r"config\['momentum'\] is -1"),
        (lambda: convert.model_from_torch({}, {"a": ("A",)}), KeyError, r"no 'a\.weight', expected by names"),
        (
            lambda: convert.model_from_torch(DENSE | {"b.weight": 0}, {"a": ("A",)}),
            ValueError,
            "1 entries that no name leads to: b.weight",
        ),
        (
            lambda: convert.model_from_torch({"a.weight": np.ones(2)}, {"a": ("A",)}),
            ValueError,
            r"a\.weight has shape \(2,\) and no running statistics: .* hints={'a': 'norm'}; a batch norm with",
        ),
        (
            lambda: convert.model_from_torch(
                DENSE | dict.fromkeys(("a.weight_scale", "a.proj.weight"), np.ones((2, 2))), {"a": ("A",)}
            ),
            ValueError,
            r"2 entries that no name leads to: a\.proj\.weight, a\.weight_scale",
        ),
        (
            lambda: convert.model_from_torch(torch_dict("a.") | {"a.proj.weight": np.ones((2, 2))}, {"a": ("A",)}),
            ValueError,
            r"1 entries that no name leads to: a\.proj\.weight",
        ),
        (
            lambda: convert.model_to_torch({"params": {"A": {"kernel": np.ones((2, 2)), "gain": 1}}}, {"a": ("A",)}),
            ValueError,
            "1 entries that no name leads to: A/gain",
        ),
        (lambda: convert.model_to_torch({}, {}, "keras"), ValueError, "kind is 'keras', expected 'linen' or 'nnx'"),
        (
            lambda: convert.model_to_torch({}, {"a": ("A", 0)}, "nnx"),
            KeyError,
            "no kernel, embedding, scale or mean at A/0, expected",
        ),
        (
            lambda: convert.model_to_torch(
                {"params": {"A": {"kernel": np.ones((2, 2))}, "B": {"bias": 0}}}, {"a": ("A",)}
            ),
            ValueError,
            "1 entries that no name leads to: B/bias",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
