"""`jbn.nnx.replace`: to the bit what a model of our layers computes, and nothing else of the model is touched."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from layers import assert_equal, bf16, inputs

import jbn.nnx

OPTIONS = dict(virtual_batch_size=2, unbiased=True, momentum=0.5)
PATHS = ["again", "layers.1", "stacked"]  # of `Net`; a shared layer by the first name


class Net(nnx.Module):
    """Norms in a list, shared, stacked, and of settings of their own."""

    def __init__(self, norm, rngs, **options):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs), norm(4, use_scale=False, **options, rngs=rngs)])
        self.norm = norm(4, dtype=bf16, epsilon=0.1, scale_metadata={"tag": "decay"}, **options, rngs=rngs)
        self.again = self.norm

        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def create(rngs):
            return norm(4, **options, rngs=rngs)

        self.stacked = create(rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        x = self.again(self.norm(x))
        forward = nnx.scan(lambda layer, x: nnx.relu(layer(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return forward(self.stacked, x.astype(jnp.float32))


@nnx.jit
def step(model, x, dy):
    return nnx.value_and_grad(lambda model: jnp.sum(model(x) * dy))(model)


def test_whole_model():
    x, dy = inputs((8, 4))
    model, want = Net(nnx.BatchNorm, nnx.Rngs(0)), Net(jbn.nnx.BatchNorm, nnx.Rngs(0), **OPTIONS)
    optimizer = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param)
    step(model, x, dy)  # what was compiled before is not used again
    nnx.update(model, nnx.state(want))
    layers = [model.layers[1], model.norm, model.stacked]
    variables = [dict(vars(layer)) for layer in layers]
    assert jbn.nnx.replace(model, **OPTIONS) == (PATHS, {})
    assert model.again is model.norm is layers[1]
    for layer, before in zip(layers, variables, strict=True):
        assert type(layer) is jbn.nnx.BatchNorm
        for name in {*before} - {*OPTIONS, "_pytree__nodes"}:
            assert getattr(layer, name) is before[name], name
    assert model.norm.scale.get_metadata()["tag"] == "decay"
    for _ in range(2):
        got = [step(m, x, dy) for m in (model, want)]
        assert_equal(got[0][0], got[1][0])
        assert_equal(nnx.state(model), nnx.state(want))
    optimizer.update(model, got[0][1])  # made before
    model.eval()
    assert model.norm.use_running_average and model.layers[1].use_running_average
    left = "it is a jbn.nnx.BatchNorm already, with settings of its own"
    assert jbn.nnx.replace(model) == ([], dict.fromkeys(PATHS, left))


def test_arrays_stay_where_they_are(devices):
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,), devices=devices[:2])
    with jax.set_mesh(mesh):
        model = nnx.Sequential(nnx.BatchNorm(4, scale_metadata={"out_sharding": ("d",)}, rngs=nnx.Rngs(0)))
    scale, metadata = model.layers[0].scale, model.layers[0].scale.get_metadata()
    jbn.nnx.replace(model)
    assert model.layers[0].scale is scale and scale.get_metadata() == metadata
    assert scale[...].sharding == NamedSharding(mesh, P("d"))


def test_bounds_may_be_arrays():
    """They are data of the layer then; `nnx.view` gives others."""
    x = inputs((8, 4))[0]
    model = nnx.Sequential(nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    jbn.nnx.replace(model, renorm=True, r_max=jnp.float32(1), d_max=0.0)
    want = jbn.nnx.BatchNorm(4, renorm=True, r_max=1.0, d_max=0.0, rngs=nnx.Rngs(0))(x)
    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(model, x), want, rtol=1e-6, atol=1e-6)
    assert nnx.view(model, r_max=3.0).layers[0].r_max == 3.0


def test_a_model_that_is_a_batch_norm():
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    assert jbn.nnx.replace(layer, use_running_average=True) == ([""], {})
    assert type(layer) is jbn.nnx.BatchNorm and layer.use_running_average


class Sub(nnx.BatchNorm):
    def __call__(self, x, **options):
        return super().__call__(x, **options) + 1


def test_subclasses_are_left():
    model = nnx.Sequential(Sub(4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0)))
    before = dict(vars(model.layers[0]))
    assert jbn.nnx.replace(model, momentum=0.5) == (
        ["layers.1"],
        {
            "layers.0": "its class Sub is a subclass of BatchNorm, which may compute in its own way: let it inherit "
            "from jbn.nnx.BatchNorm"
        },
    )
    assert type(model.layers[0]) is Sub and vars(model.layers[0]) == before


@pytest.mark.parametrize(
    "options, kind, message",
    [
        (dict(moment=0.9), TypeError, "replace got moment=0.9, expected some of use_running_average, momentum, .*"),
        (dict(use_scale=False), TypeError, "got use_scale=False, .*: variables, axis and activation stay as the model"),
        (dict(virtual_batch_size=0), ValueError, "virtual_batch_size is 0, expected None or a positive integer"),
        (dict(d_max=3), ValueError, "replace got d_max=3 without renorm=True"),
    ],
)
def test_after_an_error_the_model_is_as_it_was(options, kind, message):
    model = Net(nnx.BatchNorm, nnx.Rngs(0))
    before = nnx.graphdef(model)
    with pytest.raises(kind, match=message):
        jbn.nnx.replace(model, **options)
    assert nnx.graphdef(model) == before


def test_nothing_to_replace():
    with pytest.raises(ValueError, match=r"model, a Linear, has no flax\.nnx\.BatchNorm: there is nothing to replace"):
        jbn.nnx.replace(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match=r"model is a State, .* give the model itself; .* jbn\.linen\.replacing"):
        jbn.nnx.replace(nnx.state(nnx.BatchNorm(2, rngs=nnx.Rngs(0))))
