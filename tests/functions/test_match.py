"""`convert.match`: which layer is which, on torchvision's networks; and what it refuses to guess."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torchvision_networks
import torchvision_reference
from flax import nnx

from experiments.material.models import NnxResNet50, ResNet50, resnet50_names
from jbn import convert

REFERENCE = json.loads(torchvision_reference.FILE.read_text(encoding="utf-8"))
TOLD = {  # where dense layers see what is behind several layers, side by side
    "densenet121": {"features.norm5": "norm"},
    "googlenet": {"fc": "dense"},
}


def same_shapes(got, want):
    return jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, want)


@pytest.mark.parametrize("network", torchvision_reference.NETWORKS)
def test_torchvision(network):
    """Logits as torchvision's, and every tensor back."""
    shapes, want = REFERENCE[network]["shapes"], np.array(REFERENCE[network]["logits"])
    tensors, model = torchvision_reference.draw(shapes), torchvision_networks.NETWORKS[network]
    images = np.moveaxis(torchvision_reference.images(), 1, -1)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    names, hints = convert.match(tensors, variables, hints=TOLD.get(network))
    assert hints == ({"classifier.0": (512, 49)} if network == "vgg11_bn" else TOLD.get(network, {}))
    got = convert.model_from_torch(tensors, names, hints=hints)
    assert same_shapes(got, variables)
    logits = jax.jit(model.apply)(got, images)
    np.testing.assert_allclose(logits, want, rtol=0, atol=1e-4 * np.abs(want).max())
    back = convert.model_to_torch(got, names, hints=hints)
    assert list(back) == list(tensors)
    for name, value in back.items():
        if not name.endswith("num_batches_tracked"):
            assert np.array_equal(value, tensors[name]), name


RESNET50 = torchvision_reference.draw(REFERENCE["resnet50"]["shapes"])


def test_shortcuts_that_have_names():
    """Four pairs of ResNet-50 that neither shape nor order tells apart: names do, in either API."""
    linen, image = ResNet50(10), np.zeros((1, 32, 32, 3), np.float32)
    variables = jax.eval_shape(lambda key: linen.init(key, image, train=False), jax.random.key(0))
    assert convert.match(RESNET50, variables) == (resnet50_names(), {})
    state = nnx.state(nnx.eval_shape(lambda: NnxResNet50(10, rngs=nnx.Rngs(0))))
    assert convert.match(RESNET50, nnx.to_pure_dict(state), "nnx") == (resnet50_names("nnx"), {})


class Every(nn.Module):
    """Every kind of layer."""

    @nn.compact
    def __call__(self, tokens, images):
        x = nn.Embed(7, 4)(tokens) + self.param("token", nn.initializers.normal(), (1, 4))
        x = nn.LayerNorm()(x)
        x = nn.Dense(4, use_bias=False)(x)
        y = nn.Conv(6, (2, 1))(images)
        y = nn.Conv(6, (3, 3), feature_group_count=6)(y)
        y = nn.GroupNorm(2)(nn.BatchNorm(True, use_bias=False, use_scale=False)(y))
        y = nn.Conv(6, (1, 1))(y)
        y = nn.ConvTranspose(6, (2, 2), name="up")(nn.ConvTranspose(6, (2, 2), use_bias=False)(y))
        x = nn.Dense(3, use_bias=False)(x)
        return x, nn.Dense(5)(y.reshape(len(y), -1))


def every():
    """(state_dict, variables) of it."""
    shapes = {"token": (1, 4), "embed.weight": (7, 4), "a.norm.weight": (4,), "a.norm.bias": (4,)}
    shapes |= {
        "a.proj.weight": (4, 4),
        "c1.weight": (6, 3, 2, 1),
        "c1.bias": (6,),
        "c2.weight": (6, 1, 3, 3),
        "c2.bias": (6,),
    }
    shapes |= {"bn.running_mean": (6,), "bn.running_var": (6,), "gn.weight": (6,), "gn.bias": (6,)}
    shapes |= {"mix.weight": (6, 6, 1, 1), "mix.bias": (6,), "upper.weight": (6, 6, 2, 2)}
    shapes |= {
        "up.weight": (6, 6, 2, 2),
        "up.bias": (6,),
        "tail.weight": (3, 4),
        "head.weight": (5, 6 * 16),
        "head.bias": (5,),
    }
    model = Every()
    variables = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 2), int), np.zeros((1, 4, 4, 3), np.float32))
    return torchvision_reference.draw(shapes), variables


def test_every_kind():
    tensors, variables = every()
    told = {"head": (6, 4, 4), "tail": "dense", "up": "transposed"}
    names, hints = convert.match(tensors, variables, hints=told)
    assert names == {
        "token": ("token",),
        "embed": ("Embed_0",),
        "a.norm": ("LayerNorm_0",),
        "a.proj": ("Dense_0",),
        "c1": ("Conv_0",),
        "c2": ("Conv_1",),
        "bn": ("BatchNorm_0",),
        "gn": ("GroupNorm_0",),
        "mix": ("Conv_2",),
        "upper": ("ConvTranspose_0",),
        "up": ("up",),
        "tail": ("Dense_1",),
        "head": ("Dense_2",),
    }
    found = {"embed": "embedding", "a.norm": "norm", "a.proj": "dense", "gn": "norm", "upper": "transposed"}
    assert hints == told | found
    got = convert.model_from_torch(tensors, variables=variables, hints=told)
    assert same_shapes(got, variables)
    np.testing.assert_array_equal(got["params"]["token"], tensors["token"])
    back = convert.model_to_torch(got, names, hints=hints)
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value)
    with pytest.raises(ValueError, match=r"tail takes 4 features behind up, which gives 6: .* hints={'tail': "):
        convert.match(tensors, variables, hints={k: v for k, v in told.items() if k != "tail"})


def dense(count, *sizes):
    return {
        f"net.{i}.{leaf}": np.ones(shape)
        for i in range(count)
        for leaf, shape in (("weight", sizes), ("bias", sizes[:1]))
    }


def flax(*names, shape=(2, 3)):
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)  # noqa: E731
    return {"params": {name: {"kernel": leaf(*shape[::-1]), "bias": leaf(shape[0])} for name in names}}


def test_numbers_are_numbers():
    """The eleventh is not the second; siblings of other names have no order."""
    names = [f"Dense_{i}" for i in range(12)]
    found = convert.match(dense(12, 2, 3), flax(*sorted(names))).names
    assert list(found.values()) == [(name,) for name in names]


def test_nothing_is_guessed():
    """Two layers of no order and of names that say nothing. One name is enough, whichever way round."""
    tensors, variables = dense(2, 2, 3), flax("left", "right")
    message = r"neither kind, .* left, right may be net\.0, net\.1\. Give .* names={'net\.0': \('left',\)} if that is"
    with pytest.raises(ValueError, match=message):
        convert.match(tensors, variables)
    assert convert.match(tensors, variables, names={"net.1": ["left"]}).names == {
        "net.0": ("right",),
        "net.1": ("left",),
    }
    assert convert.model_from_torch(tensors, {"net.0": ("left",)}, variables=variables)["params"].keys() == {
        "left",
        "right",
    }


def test_what_is_flattened():
    """Square maps behind a convolution; other sizes are asked for, and rows of embeddings have one order."""
    conv = {"conv.weight": np.ones((2, 3, 1, 1))}
    variables = flax("Dense_0", shape=(5, 8))
    variables["params"]["Conv_0"] = {"kernel": np.ones((1, 1, 3, 2))}
    fc = {"fc.weight": np.ones((5, 8)), "fc.bias": np.ones(5)}
    assert convert.match(conv | fc, variables).hints == {"fc": (2, 4)}
    assert convert.match(conv | fc, variables, hints={"fc": "dense"}).hints == {"fc": "dense"}
    wide = flax("Dense_0", shape=(5, 6))
    wide["params"]["Conv_0"] = variables["params"]["Conv_0"]
    with pytest.raises(
        ValueError, match=r"fc takes 6 features behind conv, which gives 2: .* hints={'fc': \(C, H, W\)}"
    ):
        convert.match(conv | {"fc.weight": np.ones((5, 6)), "fc.bias": np.ones(5)}, wide)
    variables["params"] |= {"Conv_0": {"embedding": np.ones((3, 2))}}
    assert convert.match({"tokens.weight": np.ones((3, 2))} | fc, variables).hints == {"tokens": "embedding"}


def test_names_that_are_equal():
    tensors = {**dense(1, 2, 3), "query.weight": np.ones((2, 3)), "query.bias": np.ones(2)}
    assert convert.match(tensors, flax("query", "other")).names == {"net.0": ("other",), "query": ("query",)}


def test_what_is_no_weight():
    """Random state of an nnx model."""
    model = nnx.Sequential(nnx.Linear(3, 2, rngs=nnx.Rngs(0)), nnx.Dropout(0.1, rngs=nnx.Rngs(1)))
    state = nnx.to_pure_dict(nnx.state(model))
    assert convert.match(dense(1, 2, 3), state, "nnx").names == {"net.0": ("layers", 0)}


NAN = dense(2, 2, 3) | {"net.1.bias": np.array([0, np.nan])}


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (
            lambda: convert.match(dense(2, 2, 3), flax("a")),
            ValueError,
            r"has 2 layers and variables has 1, .* dense \(3, 2\): net\.0, net\.1 in state_dict, a in variables\. Sh",
        ),
        (
            lambda: convert.match(dense(1, 2, 4), flax("a")),
            ValueError,
            r"of 2 kinds .*; dense \(4, 2\): net\.0 in state_dict, none in variables; dense \(3, 2\): none in .*, a in",
        ),
        (
            lambda: convert.match({"a.weight": np.ones((3, 5, 2))}, {"params": {"up": {"kernel": np.ones((2, 3, 5))}}}),
            ValueError,
            r"convolution \(2, 5, 3\) with no bias: a in .* not call ConvTranspose_0 needs the hint 'transposed'",
        ),
        (
            lambda: convert.match(dense(2, 2, 3), flax("a", "b"), names={"net.0": ("a",), "net.1": ("c",)}),
            KeyError,
            r"names leads 'net\.1' to c",
        ),
        (
            lambda: convert.match(RESNET50, flax("a")),
            ValueError,
            r"has 107 layers and variables has 1, .* batch norm \(64\,\): bn1, .* and 1 more in state_dict, none in",
        ),
        (
            lambda: convert.match({**dense(1, 2, 3), "net.1.running_mean": np.ones(2)}, flax("a")),
            ValueError,
            r"batch norm \(2,\) with no scale and no bias: net\.1 in state_dict, none in variables",
        ),
        (
            lambda: convert.match(
                {
                    f"{n}.{leaf}": v
                    for n in "ab"
                    for leaf, v in (("weight", np.ones((1 + (n == "a"), 3))), ("bias", np.ones(1 + (n == "a"))))
                },
                {"params": {**flax("Dense_1")["params"], **flax("Dense_0", shape=(1, 3))["params"]}},
            ),
            ValueError,
            r"variables has Dense_\d, dense \(3, .\), and none of . of state_dict is left .*: give names of some",
        ),
        (
            lambda: convert.match(dense(1, 2, 3), flax("a"), names={"net": ("a",)}),
            KeyError,
            r"names has 'net', which state_dict has not: give names of its layers \(net\.0",
        ),
        (
            lambda: convert.match(dense(1, 2, 3), flax("a"), names={"net.0": ("b",)}),
            KeyError,
            r"names leads 'net\.0' to b, where variables has no layer",
        ),
        (
            lambda: convert.match(dense(1, 2, 3), flax("a", shape=(3, 2)), names={"net.0": ("a",)}),
            ValueError,
            r"names leads net\.0, dense \(3, 2\), to a, dense \(2, 3\): give layers of one kind and shape",
        ),
        (
            lambda: convert.match(dense(1, 2, 3), flax("a"), hints={"b": "dense"}),
            ValueError,
            "hints has 'b', which state_dict has not",
        ),
        (
            lambda: convert.match(dense(1, 2, 3), flax("a")["params"]),
            KeyError,
            "variables has no 'params' but a: give",
        ),
        (
            lambda: convert.match(nn.Dense(3), flax("a")),
            TypeError,
            r"state_dict is a Dense, .*: give\s+module\.state_dict",
        ),
        (
            lambda: convert.model_from_torch(NAN, variables=flax("Dense_0", "Dense_1")),
            ValueError,
            r"state_dict has NaN in net\.1\.bias: give weights of a training that did not diverge",
        ),
        (
            lambda: convert.model_from_torch(NAN),
            TypeError,
            "names is None, and so is variables: give the names, or the",
        ),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
