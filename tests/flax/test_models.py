"""The example networks take Flax's BatchNorm and ours alike, and are what their papers say."""

import functools

import flax.linen
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jbn.linen
import jbn.nnx
from experiments.material import cases, models

PARAMETERS = 25_557_032
LINEN = {"flax": flax.linen.BatchNorm, "jbn": jbn.linen.BatchNorm}
NNX = {"flax": flax.nnx.BatchNorm, "jbn": jbn.nnx.BatchNorm}
IMAGES = jnp.zeros((2, 32, 32, 3))


def shapes(tree):
    """{path: (shape, dtype)} of the leaves."""
    return {
        jax.tree_util.keystr(path): (leaf.shape, leaf.dtype) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@functools.cache
def linen_variables(norm):
    model = models.ResNet50(norm=norm)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), IMAGES, train=False))


def linen_step(norm, variables, images, labels):
    """(variables, loss) after one step of SGD."""
    model = models.ResNet50(norm=norm)

    def loss(params):
        logits, updates = model.apply({**variables, "params": params}, images, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), updates

    (value, updates), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
    params = jax.tree.map(lambda p, g: p - 0.1 * g, variables["params"], gradient)
    return {"params": params, **updates}, value


def nnx_model(norm):
    return nnx.eval_shape(lambda: models.NnxResNet50(norm=norm, rngs=nnx.Rngs(0)))


def nnx_step(model, images, labels):
    """The loss of one step of SGD, which `model` has then taken."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()

    model.train()
    value, gradient = nnx.value_and_grad(loss)(model)
    nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), gradient))
    return value


@pytest.mark.parametrize("norm", LINEN)
def test_linen_resnet50_trains(norm):
    before = linen_variables(LINEN[norm])
    assert size(before["params"]) == PARAMETERS
    step = functools.partial(linen_step, LINEN[norm])
    after, loss = jax.eval_shape(step, before, IMAGES, jnp.zeros(2, jnp.int32))
    assert shapes(after) == shapes(before)
    assert loss.shape == ()


def test_linen_variables_are_flax_s():
    assert shapes(linen_variables(jbn.linen.BatchNorm)) == shapes(linen_variables(flax.linen.BatchNorm))


@pytest.mark.parametrize("norm", NNX)
def test_nnx_resnet50_trains(norm):
    model = nnx_model(NNX[norm])
    before = shapes(nnx.state(model))
    assert size(nnx.state(model, nnx.Param)) == PARAMETERS
    loss = nnx.eval_shape(nnx_step, model, IMAGES, jnp.zeros(2, jnp.int32))
    assert shapes(nnx.state(model)) == before
    assert loss.shape == ()


def test_nnx_variables_are_flax_s():
    assert shapes(nnx.state(nnx_model(jbn.nnx.BatchNorm))) == shapes(nnx.state(nnx_model(flax.nnx.BatchNorm)))


def test_a_block_computes_the_same_with_either_norm():
    x = jax.random.normal(jax.random.key(0), (4, 6, 6, 8))

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def outputs(linen_norm, nnx_norm):
        block = models.Bottleneck(4, 2, lambda **kwargs: linen_norm(use_running_average=False, **kwargs))
        y, variables = block.init_with_output(jax.random.key(1), x)
        trained = jax.tree.map(lambda leaf: leaf + 0.5, variables)  # the last scale is 0 at first
        y, updates = block.apply(trained, x, mutable=["batch_stats"])
        rngs = nnx.Rngs(0)
        nnx_block = models.NnxBottleneck(
            8, 4, 2, lambda features, **kwargs: nnx_norm(features, rngs=rngs, **kwargs), None, rngs
        )
        nnx_block.norm3.scale[...] += 0.5
        return y, updates["batch_stats"], nnx_block(x), nnx.state(nnx_block, nnx.BatchStat)

    ours = jax.tree.leaves(outputs(jbn.linen.BatchNorm, jbn.nnx.BatchNorm))
    flaxs = jax.tree.leaves(outputs(flax.linen.BatchNorm, flax.nnx.BatchNorm))
    for our, flax_s in zip(ours, flaxs, strict=True):
        np.testing.assert_allclose(our, flax_s, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("stride", [1, 2])
def test_patches_convolution_is_a_convolution(stride):
    x = jax.random.normal(jax.random.key(0), (2, 9, 8, 3))
    kernel = jax.random.normal(jax.random.key(1), (3, 2, 3, 5))
    strides, padding = (stride, stride), ((1, 1), (0, 2))
    found = models.patches_convolution(x, kernel, strides, padding)
    expected = jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_digits_network_without_norm_has_biases_and_no_statistics():
    images = jnp.zeros((1, 28, 28, 1))
    plain, normed = (
        jax.eval_shape(functools.partial(model.init, train=False), jax.random.key(0), images)
        for model in (models.DigitsCNN(norm=None), models.DigitsCNN())
    )
    assert set(plain) == {"params"}
    assert set(plain["params"]["Conv_0"]) == {"kernel", "bias"}
    assert set(normed) == {"params", "batch_stats"}
    assert set(normed["params"]["Conv_0"]) == {"kernel"}


def test_resnet50_cases_are_the_inputs_of_the_model_s_norms():
    seen = []

    def watch(next_method, args, kwargs, context):
        if isinstance(context.module, flax.linen.BatchNorm):
            seen.append(args[0].shape)
        return next_method(*args, **kwargs)

    model = models.ResNet50()
    with flax.linen.intercept_methods(watch):
        jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((2, 224, 224, 3)), train=False))
    assert seen == [case.shape for case in cases.resnet50(2)]


@pytest.mark.parametrize("stages", [1, 2, None])
def test_checkpoints_change_no_variable(stages):
    plain, saving = (
        jax.eval_shape(models.ResNet50(10, stages=stages, policy=policy).init, jax.random.key(0), IMAGES)
        for policy in (None, models.POLICY)
    )
    assert plain == saving


def test_checkpoints_change_no_gradient():
    """Of one stage, on small images."""
    images = jax.random.normal(jax.random.key(0), IMAGES.shape)
    variables = jax.jit(models.ResNet50(10, stages=1).init)(jax.random.key(0), images)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(model, variables):
        def loss(params):
            y, updates = model.apply({**variables, "params": params}, images, mutable=["batch_stats"])
            return (y**2).mean(), updates

        return jax.grad(loss, has_aux=True)(variables["params"])

    found, wanted = (
        jax.tree.leaves(gradients(models.ResNet50(10, stages=1, policy=policy), variables))
        for policy in (models.POLICY, None)
    )
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_counts_of_batch_norms():
    assert len(cases.resnet50(32)) == 53
    assert len(cases.inverted_residuals(cases.MOBILENET_V2, 32)) == 52
    assert len(cases.inverted_residuals(cases.EFFICIENTNET_B0, 32)) == 49


def test_every_case_is_named_once():
    for listed in (cases.CPU, cases.GPU):
        assert len({case.name for case in listed}) == len(listed)
    assert [case for case in cases.CPU if case not in cases.GPU] == []
    assert cases.channels_first(cases.CPU[0]) == ("32×64×56×56", (32, 64, 56, 56), 1)
    assert sum(case.axis == 1 for case in cases.GPU) == 5
