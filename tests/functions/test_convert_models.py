"""Models from PyTorch compute in Flax what they computed there; what a state_dict leaves open has to be said."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import assert_close

from jbn import convert

RNG = np.random.default_rng(0)


def normal(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def layer(name, *shape):
    return {f"{name}.weight": normal(*shape), f"{name}.bias": normal(shape[0])}


def batch_norm(name, n):
    stats = {f"{name}.running_mean": normal(n), f"{name}.running_var": RNG.uniform(0.5, 2, n).astype(np.float32)}
    return layer(name, n) | stats | {f"{name}.num_batches_tracked": np.array(0)}


def equal(got, want):
    assert got.keys() == want.keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, want[name])


CONV = layer("conv", 3, 2, 1, 1)  # to 3 channels
NAMES = {name: (name,) for name in ("conv", "bn", "fc")}


class Flat(nn.Module):
    """conv, flatten, batch norm, dense."""

    norm: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(3, (1,) * (x.ndim - 2), name="conv")(x).reshape(len(x), -1)
        if self.norm:
            x = nn.BatchNorm(True, epsilon=0, name="bn")(x)
        return nn.Dense(5, name="fc")(x)


@pytest.mark.parametrize("window", [(2, 4), (4,), (2, 1, 2)])
@pytest.mark.parametrize("norm", [True, False])
def test_flattened_feature_maps(window, norm):
    """Against PyTorch's order written out: (N, C, *window) flattened."""
    n = 3 * int(np.prod(window))
    tensors = layer("conv", 3, 2, *(1 for _ in window)) | (batch_norm("bn", n) if norm else {}) | layer("fc", 5, n)
    x = normal(2, 2, *window)
    weight, bias = tensors["conv.weight"].reshape(3, 2), tensors["conv.bias"]
    y = (np.einsum("oi,ni...->no...", weight, x) + bias.reshape(3, *(1 for _ in window))).reshape(2, -1)
    if norm:
        y = (y - tensors["bn.running_mean"]) / np.sqrt(tensors["bn.running_var"]) * tensors["bn.weight"]
        y += tensors["bn.bias"]
    want = y @ tensors["fc.weight"].T + tensors["fc.bias"]
    names = {name: path for name, path in NAMES.items() if norm or name != "bn"}
    hints = {name: (3, *window) for name in names if name != "conv"}
    variables = convert.model_from_torch(tensors, names, hints=hints)
    assert_close(Flat(norm).apply(variables, np.moveaxis(x, 1, -1)), want, np.float32, n=n, factor=8)
    equal(convert.model_to_torch(variables, names, hints=hints), tensors)


@pytest.mark.parametrize("first", ["bn", "fc"])
def test_what_may_be_flattened_is_refused(first):
    """In both directions; behind a norm of flattened maps as well, though its features are as many."""
    norm = batch_norm("bn", 12) if first == "bn" else {}
    tensors = CONV | norm | layer("fc", 5, 12)
    names = {name: path for name, path in NAMES.items() if norm or name != "bn"}
    deny = "'norm'" if norm else "'dense'"
    message = (
        rf"{first} takes 12 features behind conv, which gives 3: .* hints={{'{first}': \(C, H, W\)}} .* else {deny}"
    )
    denied = {"bn": "norm", "fc": "dense"}
    every = {name: denied[name] for name in names if name != "conv"}
    variables = convert.model_from_torch(tensors, names, hints=every)
    equal(convert.model_to_torch(variables, names, hints={first: denied[first]}), tensors)
    for call in (
        lambda **o: convert.model_from_torch(tensors, names, **o),
        lambda **o: convert.model_to_torch(variables, names, **o),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        if norm:
            with pytest.raises(ValueError, match="fc takes 12 features behind bn, which gives 12: PyTorch flattens"):
                call(hints={"bn": (3, 2, 2)})


def test_nothing_is_asked_where_it_is_plain():
    """Features as many as the channels before them; dense layers alone; a norm of feature maps, concatenated or not."""
    names = {**NAMES, "bn2": ("bn2",), "conv2": ("conv2",)}
    tensors = CONV | batch_norm("bn", 3) | batch_norm("bn2", 6) | layer("conv2", 4, 6, 1, 1) | layer("fc", 5, 4)
    assert convert.model_from_torch(tensors, names)
    dense = layer("fc", 5, 12) | layer("fc2", 2, 7)
    assert convert.model_from_torch(dense, {"fc": ("a",), "fc2": ("b",)})


def test_embedding_and_dense_without_bias():
    """Their weights look alike."""
    tensors = {"emb.weight": normal(7, 4), "fc.weight": normal(4, 4)}
    names = {"emb": ("Embed_0",), "fc": ("Dense_0",)}
    for name in names:
        said = {"emb": "embedding", "fc": "dense"}
        del said[name]
        with pytest.raises(
            ValueError, match=rf"{name}\.weight .* no bias: .* give hints={{'{name}': 'dense'}} or 'embedd"
        ):
            convert.model_from_torch(tensors, names, hints=said)
    variables = convert.model_from_torch(tensors, names, hints={"emb": "embedding", "fc": "dense"})

    class Model(nn.Module):
        @nn.compact
        def __call__(self, tokens):
            return nn.Dense(4, use_bias=False)(nn.Embed(7, 4)(tokens))

    tokens = np.array([3, 0, 6])
    want = tensors["emb.weight"][tokens] @ tensors["fc.weight"].T
    assert_close(Model().apply(variables, tokens), want, np.float32, n=4)
    equal(convert.model_to_torch(variables, names), tensors)


def test_layer_norm():
    tensors = layer("norm", 4)
    variables = convert.model_from_torch(tensors, {"norm": ("n",)}, hints={"norm": "norm"})
    equal(variables["params"]["n"], {"scale": tensors["norm.weight"], "bias": tensors["norm.bias"]})
    equal(convert.model_to_torch(variables, {"norm": ("n",)}), tensors)


@pytest.mark.parametrize("flipped", [True, False])
def test_transposed_convolution(flipped):
    """y[o, i·stride + j] = Σ x[c, i] · weight[c, o, j], PyTorch's definition."""
    weight, bias, x = normal(2, 3, 4), normal(3), normal(1, 2, 5)
    want = np.zeros((1, 3, 2 * 4 + 4)) + bias[:, None]
    for i in range(5):
        want[:, :, 2 * i : 2 * i + 4] += np.einsum("nc,coj->noj", x[:, :, i], weight)
    tensors, names = {"up.weight": weight, "up.bias": bias}, {"up": ("up",)}
    with pytest.raises(ValueError, match=r"up\.weight .* and the bias \(3,\), as of a transposed .*'up': 'transposed'"):
        convert.model_from_torch(tensors, names)
    hints = {"up": "transposed"}
    variables = convert.model_from_torch(tensors, names, hints=hints)
    if flipped:
        y = nn.ConvTranspose(3, (4,), (2,), padding="VALID").apply(
            {"params": variables["params"]["up"]}, x.transpose(0, 2, 1)
        )
    else:  # without the hint, as where weights are square and none can tell
        kernel = jnp.transpose(weight, (2, 1, 0))
        square = convert.model_from_torch({"up.weight": weight}, names)["params"]["up"]["kernel"]
        np.testing.assert_array_equal(square, kernel)
        up = nn.ConvTranspose(3, (4,), (2,), padding="VALID", transpose_kernel=True)
        y = up.apply({"params": {"kernel": square, "bias": bias}}, x.transpose(0, 2, 1))
    assert_close(jnp.moveaxis(y, -1, 1), want, np.float32, n=8, factor=4)
    equal(convert.model_to_torch(variables, names, hints=hints), tensors)


FC = layer("fc", 5, 12)


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda: convert.model_from_torch(FC | layer("a", 5, 12), {"fc": ("x", 1), "a": ["x", 1]}),
            ValueError,
            "names leads 'fc' and 'a' to one path, x/1: give each a path of its own",
        ),
        (
            lambda: convert.model_to_torch({"params": {"x": {"kernel": FC["fc.weight"]}}}, {"fc": ("x",), "a": ("x",)}),
            ValueError,
            "names leads 'fc' and 'a' to one path, x",
        ),
        (
            lambda: convert.model_from_torch(FC, {"fc": "Dense_0"}),
            TypeError,
            r"'Dense_0', .* give a tuple, e\.g\. \('Dense_0',",
        ),
        (
            lambda: convert.model_from_torch(FC, {"fc": ("x",)}, hints={"gc": "dense"}),
            ValueError,
            "hints has 'gc', which names has not",
        ),
        (
            lambda: convert.model_from_torch(FC, {"fc": ("x",)}, hints={"fc": "flat"}),
            ValueError,
            r"hints\['fc'\] is 'flat', expected one of 'dense', 'norm', 'embedding', 'transposed' or sizes",
        ),
        (
            lambda: convert.model_from_torch(FC, {"fc": ("x",)}, hints={"fc": (3, 2, 3)}),
            ValueError,
            r"hints\['fc'\] is \(3, 2, 3\), .* fc is a dense of 12 inputs: give sizes whose product that is",
        ),
        (
            lambda: convert.model_from_torch(FC, {"fc": ("x",)}, hints={"fc": "norm"}),
            ValueError,
            r"hints\['fc'\] is 'norm', and fc is a dense: leave it out",
        ),
        (
            lambda: convert.model_from_torch(CONV, {"conv": ("x",)}, hints={"conv": "embedding"}),
            ValueError,
            r"hints\['conv'\] is 'embedding', and conv is a convolution: leave it out",
        ),
        (
            lambda: convert.model_to_torch(nn.Dense(3), {}),
            TypeError,
            "is a Dense, .* what model.init returned",
        ),
        (lambda: convert.model_to_torch(nn.Dense(3), {}, "nnx"), TypeError, "give nnx.to_pure_dict"),
        (
            lambda: convert.model_to_torch({"fc": {}}, {}),
            KeyError,
            "no 'params' but fc: give {'params'.*kind='nnx'",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
