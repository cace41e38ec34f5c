"""What the Flax modules refuse: the message names what came, as it came, and the remedy is theirs."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import assert_close

import jbn
import jbn.linen
import jbn.nnx

X = np.random.default_rng(0).normal(size=(10, 16, 4)).astype(np.float32)


def linen(x, mask=None, **options):
    layer = jbn.linen.BatchNorm(use_running_average=False, **options)
    return layer.init_with_output(jax.random.key(0), x, mask=mask)[0]


def of_nnx(x, mask=None, **options):
    return jbn.nnx.BatchNorm(x.shape[-1], rngs=nnx.Rngs(0), **options)(x, mask=mask)


def recalibrated(x, mask=None):
    model = jbn.linen.BatchNorm(use_running_average=False)
    variables = model.init(jax.random.key(0), x)
    return jbn.linen.recalibrate(
        nn.Sequential([Masked(mask)]), {k: {"layers_0": {"norm": v}} for k, v in variables.items()}, [x]
    )


class Masked(nn.Module):
    mask: np.ndarray

    @nn.compact
    def __call__(self, x):
        return jbn.linen.BatchNorm(use_running_average=False, name="norm")(x, mask=self.mask)


@pytest.mark.parametrize("call", [linen, of_nnx, recalibrated])
@pytest.mark.parametrize(
    "mask, shape, message",
    [
        (
            (10, 16),
            X.shape,
            r"shape \(10, 16\), which does not .* \(10, 16, 4\): give mask\[\.\.\., None\], if its axes",
        ),
        (
            (10,),
            X.shape,
            r"shape \(10,\), which does not .*: give mask\[\.\.\., None, None\], if its axes are the first",
        ),
        ((7, 4), X.shape, r"shape \(7, 4\), which does not broadcast .*: give 1 or x's size along each axis"),
        ((1, 10, 16, 4), X.shape, r"shape \(1, 10, 16, 4\), which does not broadcast .*: give 1 or x's size"),
        (
            (4,),
            (4, 4),
            r"shape \(4,\), which are both the first and the last .* mask\[\.\.\., None\] where .* or mask\[None\]",
        ),
        ((4, 4), (4, 4, 4), r"shape \(4, 4\), which are both the first and the last sizes of x of shape \(4, 4, 4\)"),
    ],
)
def test_masks(call, mask, shape, message):
    with pytest.raises(ValueError, match="mask has " + message):
        call(np.resize(X, shape), np.ones(mask, bool))


@pytest.mark.parametrize("call", [linen, of_nnx])
def test_masks_of_lower_rank(call):
    """By the last axes, as in Flax, where the first are others; one value is one however it is read."""
    mask = np.random.default_rng(1).random((16, 4)) < 0.7
    for given, full in ((mask, mask[None]), (np.ones(1, bool), None), (np.array(True), None)):
        assert_close(call(X, given), call(X, full), n=160)


def test_channels():
    layer = jbn.nnx.BatchNorm(16, rngs=nnx.Rngs(0))
    message = (
        r"x has shape \(10, 16, 4\), of 4 channels along axis 2, and num_features is 16: make it with the channels of x"
    )
    for average in (False, True):
        with pytest.raises(ValueError, match=message + ", or give the axis of the channels"):
            layer(X, use_running_average=average)
    bare = jbn.linen.BatchNorm(use_running_average=True, use_bias=False, use_scale=False)
    variables = bare.init(jax.random.key(0), X)
    with pytest.raises(
        ValueError, match=r"of 3 channels .* batch_stats/mean has shape \(4,\): initialise the model for"
    ):
        bare.apply(variables, X[..., :3])


@pytest.mark.parametrize("call", [linen, of_nnx])
def test_an_activation_with_what_is_left_to_flax(call):
    x = X.astype(np.complex64)
    with pytest.raises(ValueError, match="got activation='function relu' together with x of dtype complex64") as caught:
        call(x, activation=nn.relu)
    assert "0x" not in str(caught.value)
    with pytest.raises(ValueError, match=r"got negative_slope=0\.2 together with x of dtype complex64"):
        call(x, negative_slope=0.2)
    with pytest.raises(ValueError, match="activation is 'swish', expected None, a function or one of relu"):
        call(X, activation="swish")


def test_traced_integers():
    """As momentum and epsilon, which Flax takes too."""
    want = linen_step(0, 1)
    for got, w in zip(jax.tree.leaves(jax.jit(linen_step)(0, 1)), jax.tree.leaves(want), strict=True):
        assert_close(got, w, n=160)
    with pytest.raises(TypeError, match="momentum has dtype bool, expected a real scalar: cast it"):
        jax.jit(linen_step)(True, 1)


def linen_step(momentum, epsilon):
    layer = jbn.linen.BatchNorm(use_running_average=False, momentum=momentum, epsilon=epsilon)
    return layer.apply(jbn.linen.BatchNorm(True).init(jax.random.key(0), X), X, mutable=["batch_stats"])


def test_recalibrate_with_labels():
    """Batches of a data set that has them."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return jbn.linen.BatchNorm(use_running_average=not train)(x)

        def logits(self, x):
            return self(x, train=True)

    class NnxModel(nnx.Module):
        def __init__(self):
            self.norm = jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.norm(x)

    batches = [(X, np.zeros(10))]
    variables = Model().init(jax.random.key(0), X)
    message = (
        r"batches gave a tuple of 2, and the model is called as {}: .* give the inputs alone, e\.g\. \(x for x, y in"
    )
    for method in ("logits", Model.logits):
        with pytest.raises(TypeError, match=message.format(r"logits\(x\)")):
            jbn.linen.recalibrate(Model(), variables, batches, method=method)
    with pytest.raises(TypeError, match=message.format(r"__call__\(x, train=False\)")):
        jbn.linen.recalibrate(Model(), variables, batches, train=True)
    with pytest.raises(TypeError, match=message.format(r"__call__\(x\)")):
        jbn.nnx.recalibrate(NnxModel(), batches)
    with pytest.raises(TypeError, match=r"batches gave one argument, .* got an unexpected keyword argument 'training'"):
        jbn.linen.recalibrate(Model(), variables, [X], training=True)
    assert jbn.linen.recalibrate(Model(), variables, [X], method="logits")


def test_a_model_of_the_other_kind():
    theirs, other = nn.Dense(3), nnx.Linear(4, 3, rngs=nnx.Rngs(0))
    variables = theirs.init(jax.random.key(0), X)
    for call, remedy in (
        (lambda: jbn.linen.fold(other, variables, X), r"a flax\.linen module: .* call jbn\.nnx\.fold"),
        (lambda: jbn.nnx.fold(theirs, X), r"an nnx\.Module: .* call jbn\.linen\.fold"),
        (lambda: jbn.linen.recalibrate(other, variables, [X]), r"a flax\.linen module: .* call jbn\.nnx\.recalibrate"),
        (lambda: jbn.nnx.recalibrate(theirs, [X]), r"an nnx\.Module: .* call jbn\.linen\.recalibrate"),
        (lambda: jbn.nnx.replace(theirs), r"an nnx\.Module: .* enter jbn\.linen\.replacing"),
    ):
        with pytest.raises(TypeError, match=rf"model is a (Dense|Linear), expected {remedy}"):
            call()
    with pytest.raises(
        ValueError, match=r"variables has the entries kernel, bias, .* give all that model\.init returned"
    ):
        jbn.linen.fold(theirs, variables["params"], X)


def test_nan_in_padding_before_another_layer():
    """The layer's own gradients are finite; those of a kernel before it once padding is, and they are the same then."""
    mask = np.arange(16)[None, :, None] < np.arange(1, 11)[:, None, None]

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return jbn.linen.BatchNorm(use_running_average=False)(nn.Dense(3)(x), mask=mask)

    variables = Model().init(jax.random.key(0), X)

    def gradients(x):
        def loss(params):
            y = Model().apply({**variables, "params": params}, x, mutable=["batch_stats"])[0]
            return jnp.sum(jnp.where(mask, y, 0) ** 3)

        return jax.grad(loss)(variables["params"])

    padded = np.where(mask, X, np.nan)
    bad, good, want = (gradients(x) for x in (padded, jnp.where(mask, padded, 0), X))
    assert np.all(np.isnan(bad["Dense_0"]["kernel"]))
    for grads in (bad, good):
        assert_close(grads["BatchNorm_0"]["scale"], want["BatchNorm_0"]["scale"], n=160)
    assert_close(good["Dense_0"]["kernel"], want["Dense_0"]["kernel"], n=160, factor=16)
