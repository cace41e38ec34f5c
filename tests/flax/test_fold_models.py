"""Whole models folded for inference: the same outputs, and a reason for every batch norm that stays."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import meaning
import numpy as np
import pytest
from flax import nnx
from layers import bf16, f32, small
from oracle import assert_close

import jbn.linen
import jbn.nnx
from experiments.material import models

Norm = functools.partial(jbn.linen.BatchNorm, use_running_average=True, epsilon=1e-2)
IMAGE = (2, 6, 6, 4)


def noisy(tree, seed=3):
    """Values for leaves of these shapes: vectors near 1, kernels that keep their input's scale."""
    rng = np.random.default_rng(seed)

    def draw(a):
        if a.ndim == 1:
            return jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype)
        return jnp.asarray(rng.standard_normal(a.shape, np.float32) * np.prod(a.shape[:-1]) ** -0.5, a.dtype)

    return jax.tree.map(draw, tree)


def image(shape=IMAGE, dtype=f32):
    return jnp.asarray(np.random.default_rng(0).normal(0.5, 1, shape), dtype)


def linen_fold(model, x, tolerance=1.0, **call):
    """(folded, left) of a model whose outputs stay as they are."""
    variables = noisy(jax.eval_shape(lambda key: model.init(key, x, **call), jax.random.key(0)))
    kept = jax.tree.map(np.array, variables)
    got = jbn.linen.fold(model, variables, jax.ShapeDtypeStruct(x.shape, x.dtype), **call)
    run = lambda new, old, x: (got.apply(new, x, **call), model.apply(old, x, **call))  # noqa: E731
    y, want = meaning.run(run, got.variables, variables, x)
    assert y.dtype == want.dtype
    assert_close(y, want, n=1000, factor=4 * tolerance)
    jax.tree.map(np.testing.assert_array_equal, variables, kept)
    paths = {"/".join(k.key for k in path[1:-1]) for path, _ in jax.tree_util.tree_leaves_with_path(got.variables)}
    assert not paths & got.folded.keys() and got.left.keys() <= paths
    return got.folded, got.left


LAYERS = {
    "dense": lambda x: Norm()(nn.Dense(5)(x)),
    "no bias": lambda x: Norm()(nn.Dense(5, use_bias=False)(x)),
    "by keyword": lambda x: Norm()(x=nn.Dense(5)(inputs=x)),
    "same": lambda x: Norm()(nn.Conv(5, (3, 3), strides=2)(x)),
    "grouped": lambda x: Norm()(nn.Conv(6, (3, 3), feature_group_count=2)(x)),
    "depthwise": lambda x: Norm()(nn.Conv(8, (3, 3), feature_group_count=4, use_bias=False)(x)),
    "transposed": lambda x: Norm()(nn.ConvTranspose(5, (3, 3), strides=(2, 2), use_bias=False)(x)),
    "transposed kernel": lambda x: Norm()(nn.ConvTranspose(5, (3, 3), transpose_kernel=True)(x)),
    "no parameters": lambda x: Norm(use_scale=False, use_bias=False)(nn.Dense(5)(x)),
    "residual, activation": lambda x: Norm(activation="silu")(nn.Dense(4, use_bias=False)(x), residual=x),
    "a slope": lambda x: Norm(activation="leaky_relu", negative_slope=0.2)(nn.Dense(5, use_bias=False)(x)),
    "residual, a function": lambda x: Norm(activation=nn.softplus)(nn.Dense(4, use_bias=False)(x), residual=x),
    "flax": lambda x: nn.BatchNorm(True)(nn.Dense(5)(x)),
    "remat": lambda x: nn.remat(Inner)()(x),
    "jit": lambda x: nn.jit(Inner)()(x),
    "scan over time": lambda x: nn.scan(
        Step, variable_broadcast=["params", "batch_stats"], split_rngs={"params": False}
    )()(x[0, 0], x)[1],
    "the layer behind": lambda x: nn.Dense(5, use_bias=False)(Norm()(x)),
    "a grouped one behind": lambda x: nn.Conv(6, (3, 3), feature_group_count=2, padding="VALID")(Norm()(x)),
    "one by one behind": lambda x: nn.Conv(6, (1, 1), strides=2)(Norm()(x)),
    "mixed padding": lambda x: Norm()(nn.Conv(5, (3, 3), padding=[(1, 1), 0])(x)),
    "padding of nothing": lambda x: nn.Conv(5, (3, 3), padding=[(0, 0), 0])(Norm()(x)),
    "both sides": lambda x: Norm()(nn.Dense(5, use_bias=False)(Norm()(x))),
    "between two": lambda x: nn.Dense(3)(Norm()(nn.Dense(5)(x))),
}


class Inner(nn.Module):
    @nn.compact
    def __call__(self, x):
        return Norm()(nn.Dense(4, use_bias=False)(x))


class Step(nn.Module):
    @nn.compact
    def __call__(self, carry, x):
        y = nn.relu(Norm()(nn.Dense(4)(x)))
        return carry + y[0], y


@pytest.mark.parametrize("name", LAYERS)
def test_linen(name):
    folded, left = linen_fold(small(LAYERS[name]), image())
    assert len(folded) == (2 if name == "both sides" else 1) and not left


JITTED = nn.jit(Inner)  # one for all: what it was traced for is kept


def test_linen_jitted_modules():
    """However often a jitted class was traced before, in this model or another, by itself or inside."""
    inside = small(lambda x: JITTED(name="a")(x))
    behind_another = small(lambda x: JITTED(name="a")(Norm()(nn.Dense(4)(x))))
    for _ in range(2):
        assert linen_fold(inside, image()) == ({"a/BatchNorm_0": "a/Dense_0"}, {})
        assert len(linen_fold(behind_another, image())[0]) == 2
        assert linen_fold(JITTED(), image()) == ({"BatchNorm_0": "Dense_0"}, {})


def test_linen_two_of_a_jitted_class():
    """They share a trace, so neither can be told apart in it."""
    folded, left = linen_fold(small(lambda x: JITTED(name="b")(JITTED(name="a")(x))), image())
    assert not folded and left.keys() == {"a/BatchNorm_0", "b/BatchNorm_0"}
    assert "a/Dense_0: its jitted module was traced for others too" in left["a/BatchNorm_0"]
    assert left["b/BatchNorm_0"] == "it runs in a jitted module that was traced for a/BatchNorm_0"


def test_linen_ensemble():
    """A lifted module at the root has its variables to itself."""
    model = nn.vmap(Inner, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})()
    folded, left = linen_fold(model, image())
    assert not folded and left == {"BatchNorm_0": "its variables are stacked, by scan or vmap over layers"}


def test_linen_partitioned():
    """Boxes of the variables are opened."""
    boxed = nn.with_partitioning(nn.initializers.lecun_normal(), (None, None))
    model, x = small(lambda x: Norm()(nn.Dense(5, kernel_init=boxed)(x))), image()
    variables = model.init(jax.random.key(0), x)
    got = jbn.linen.fold(model, variables, x)
    assert (got.folded, got.left) == ({"BatchNorm_0": "Dense_0"}, {})
    assert isinstance(variables["params"]["Dense_0"]["kernel"], nn.Partitioned)
    assert isinstance(got.variables["params"]["Dense_0"]["kernel"], jax.Array)
    assert_close(got.apply(got.variables, x), model.apply(variables, x), n=4)


class Custom(nn.Dense):
    def __call__(self, x):
        return 2 * super().__call__(x)


class CustomNorm(jbn.linen.BatchNorm):
    def __call__(self, x):
        return super().__call__(x) ** 2


def used_twice(x):
    y = nn.Dense(4)(x)
    return Norm()(y) + y


def called_elsewhere(x):
    dense = nn.Dense(4)
    return Norm()(dense(x)) + dense(2 * x)


def two_sources(x):
    norm = Norm()
    return norm(nn.Dense(4)(x)) + norm(nn.Dense(4)(x))


def tied(x):
    dense = nn.Dense(3)
    return Norm()(dense(x)) @ dense.variables["params"]["kernel"].T


def read_by_a_condition(x):
    """The body closes over a value too, so that condition and body take different ones."""
    dense = nn.Dense(3)
    y, step = Norm()(dense(x)), 1 + x[0, 0, 0, 0] ** 2
    limit = dense.variables["params"]["kernel"]
    return y + jax.lax.while_loop(lambda n: n < jnp.abs(limit).sum(), lambda n: n + step, 0.0)


def stacked(x):
    axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
    return nn.scan(Step, variable_axes=axes, split_rngs=split, length=3)()(x[0, 0], image((3, 6, 6, 4)))[1]


REFUSED = {
    "used elsewhere": (used_twice, "the output of Dense_0 is used elsewhere too"),
    "a layer called elsewhere": (called_elsewhere, "Dense_0 is also called without it"),
    "two sources": (two_sources, "it is shared by Dense_0 and Dense_1"),
    "tied weights": (tied, "the weights of Dense_0 are used elsewhere too"),
    "stacked": (stacked, "its variables are stacked, by scan or vmap over layers"),
    "no layer": (lambda x: Norm()(nn.relu(nn.Dense(4)(x))), "its input is not the output of a dense layer"),
    "an activation before a layer": (
        lambda x: nn.Dense(3)(Norm(activation="relu")(x)),
        "its input is not .*, and it has an activation or a residual",
    ),
    "zeros around": (lambda x: nn.Conv(3, (3, 3))(Norm()(x)), "Conv_0: with padding='SAME' it sees zeros around"),
    "zeros of a strided one": (lambda x: nn.Conv(3, (1, 1), padding=1)(Norm()(x)), "with padding=1 it sees zeros"),
    "transposed behind": (lambda x: nn.ConvTranspose(3, (3, 3))(Norm()(x)), "outputs of a transposed convolution see"),
    "mixed zeros around": (
        lambda x: nn.Conv(3, (3, 3), padding=[(1, 0), 0])(Norm()(x)),
        r"Conv_0: with padding=\(\(1, 0\), 0\) it sees zeros around",
    ),
    "zeros between": (
        lambda x: nn.Conv(3, (3, 3), padding=0, input_dilation=(2, 1))(Norm()(x)),
        r"Conv_0: with input_dilation=\(2, 1\) it sees zeros between",
    ),
    "zeros between, at one point": (
        lambda x: nn.Conv(3, (1, 1), padding=0, input_dilation=2)(Norm()(x)),
        "Conv_0: with input_dilation=2 it sees zeros between",
    ),
    "read by a loop's condition": (read_by_a_condition, "the weights of Dense_0 are used elsewhere too"),
    "a masked kernel behind": (
        lambda x: nn.Conv(3, (1, 1), mask=jnp.ones((1, 1, 4, 3)))(Norm()(x)),
        "Conv_0: its kernel is masked",
    ),
    "another axis": (lambda x: Norm(axis=1)(nn.Dense(4)(x)), "axis=1, not the last"),
    "several axes": (lambda x: nn.BatchNorm(True, axis=(2, 3))(nn.Dense(4)(x)), r"axis=\(2, 3\), not the last"),
    "a layer of its own": (lambda x: Norm()(Custom(4)(x)), "its input is not the output of a dense layer"),
    "a norm of its own": (lambda x: CustomNorm(True)(nn.Dense(4)(x)), "its class CustomNorm has a __call__ of its own"),
    "another layer": (lambda x: Norm()(nn.DenseGeneral(4)(x)), "its input is not the output of a dense layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_linen_leaves(name):
    function, reason = REFUSED[name]
    folded, left = linen_fold(small(function), image())
    assert not folded
    (why,) = left.values()
    assert re.search(reason, why), why


def test_linen_shared_pairs():
    """A layer and a batch norm that are always called together fold however often."""

    def siamese(x):
        dense, norm = nn.Dense(4, use_bias=False), Norm()
        return norm(dense(x)) - norm(dense(x**2))

    assert linen_fold(small(siamese), image()) == ({"BatchNorm_0": "Dense_0"}, {})


def test_linen_half_precision():
    model = small(lambda x: Norm(dtype=bf16, activation="relu")(nn.Conv(8, (3, 3), dtype=bf16)(x)))
    assert linen_fold(model, image(dtype=bf16), tolerance=4)[0] == {"BatchNorm_0": "Conv_0"}
    mixed = small(lambda x: Norm(dtype=f32)(nn.Dense(8, dtype=bf16)(x)))
    linen_fold(mixed, image(), tolerance=float(jnp.finfo(bf16).eps / jnp.finfo(f32).eps))


def test_linen_training_mode():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return jbn.linen.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))

    x = image()
    variables = Model().init(jax.random.key(0), x, False)
    got = jbn.linen.fold(Model(), variables, x, True, mutable=["batch_stats"])
    assert got.folded == {} and "fold what inference runs" in got.left["BatchNorm_0"]
    got = jbn.linen.fold(Model(), variables, x, train=False)
    with pytest.raises(ValueError, match="batch norm BatchNorm_0 is folded for inference and was called in training"):
        got.apply(got.variables, x, train=True)


def test_linen_digits():
    folded, left = linen_fold(models.DigitsCNN(), image((2, 28, 28, 1)), train=False)
    assert folded == {f"BatchNorm_{i}": f"Conv_{i}" for i in range(4)} and not left


def test_linen_resnet50():
    folded, left = linen_fold(models.ResNet50(num_classes=10), image((1, 32, 32, 3)), tolerance=16, train=False)
    assert len(folded) == 53 and not left
    assert folded["Bottleneck_3/norm_shortcut"] == "Bottleneck_3/conv_shortcut"


# nnx


def nnx_fold(model, x, tolerance=1.0):
    nnx.update(model, noisy(nnx.state(model, nnx.Not(nnx.RngState))))
    model.eval()
    before = jax.tree.map(np.array, nnx.state(model))
    got = jbn.nnx.fold(model, jax.ShapeDtypeStruct(x.shape, x.dtype))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(model), before)
    graph, state = nnx.split((got.model, model))
    y, want = meaning.run(lambda state, x: [each(x) for each in nnx.merge(graph, state)], state, x)
    assert_close(y, want, n=1000, factor=4 * tolerance)
    norms = {".".join(map(str, p)) for p, n in nnx.iter_graph(got.model) if isinstance(n, nnx.BatchNorm)}
    assert norms == got.left.keys()
    return got.folded, got.left


class Net(nnx.Module):
    """Parts given by name, and how they are called."""

    def __init__(self, call, **parts):
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def __call__(self, x):
        return self.call(self, x)


def parts(norm=jbn.nnx.BatchNorm, **options):
    rngs = nnx.Rngs(0)
    return dict(
        dense=nnx.Linear(4, 4, use_bias=False, rngs=rngs),
        conv=nnx.Conv(4, 4, (3, 3), feature_group_count=2, rngs=rngs),
        valid=nnx.Conv(4, 6, (3, 3), padding="VALID", use_bias=False, rngs=rngs),
        spread=nnx.Conv(4, 6, (1, 1), padding=0, input_dilation=2, rngs=rngs),
        up=nnx.ConvTranspose(4, 4, (3, 3), strides=(2, 2), transpose_kernel=True, rngs=rngs),
        norm=norm(4, epsilon=1e-2, rngs=rngs, **options),
    )


NNX = {
    "dense": (lambda m, x: m.norm(m.dense(x)), "dense"),
    "by keyword": (lambda m, x: m.norm(x=m.dense(inputs=x)), "dense"),
    "grouped": (lambda m, x: m.norm(m.conv(x)), "conv"),
    "transposed": (lambda m, x: m.norm(m.up(x)), "up"),
    "residual": (lambda m, x: m.norm(m.dense(x), residual=x), "dense"),
    "behind": (lambda m, x: m.valid(m.norm(x)), "valid"),
    "together twice": (lambda m, x: m.norm(m.dense(x)) + m.norm(m.dense(2 * x)), "dense"),
    "remat": (lambda m, x: nnx.remat(lambda m, x: m.norm(m.dense(x)))(m, x), "dense"),
    "jit": (lambda m, x: nnx.jit(lambda m, x: m.norm(m.dense(x)))(m, x), "dense"),
    "zeros around": (lambda m, x: m.conv(m.norm(x)), "conv: with padding='SAME' it sees zeros"),
    "zeros between": (lambda m, x: m.spread(m.norm(x)), "spread: with input_dilation=2 it sees zeros between"),
    "used elsewhere": (lambda m, x: (lambda y: m.norm(y) + y)(m.dense(x)), "output of dense is used elsewhere"),
    "weights elsewhere": (lambda m, x: m.norm(m.dense(x)) @ m.dense.kernel[...].T, "weights of dense are used else"),
    "called elsewhere": (lambda m, x: m.norm(m.dense(x)) + m.dense(2 * x), "dense is also called without it"),
    "no layer": (lambda m, x: m.norm(nnx.relu(m.dense(x))), "its input is not the output"),
}


def sown(m, x):
    y = m.dense(x)
    m.sow(nnx.Intermediate, "seen", y)
    return m.norm(y)


def cached(m, x):
    m.last[...] = y = m.dense(x)
    return m.norm(y)


def kept(m, x):
    m.array = nnx.data(y := m.dense(x))
    return m.norm(y)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("call", [sown, cached, kept])
@pytest.mark.parametrize("wrap", [lambda call: call, nnx.jit, nnx.remat], ids=["", "jit", "remat"])
def test_nnx_stored_values(call, wrap):
    """What the call leaves in the model is read too, after it."""
    stored = dict(last=nnx.Variable(jnp.zeros(IMAGE)), array=nnx.data(jnp.zeros(IMAGE)))
    folded, left = nnx_fold(Net(wrap(call), **parts(), **stored), image())
    assert not folded and "the output of dense is used elsewhere too" in left["norm"]


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    call, layer = NNX[name]
    folded, left = nnx_fold(Net(call, **parts()), image())
    assert folded == {"norm": layer} if not left else layer in left["norm"]


def test_nnx_activation_and_flax():
    call = NNX["residual"][0]
    assert nnx_fold(Net(call, **parts(activation="hard_swish")), image())[0] == {"norm": "dense"}
    for last in (dict(activation="leaky_relu", negative_slope=0.2), dict(activation=nnx.softplus)):
        assert nnx_fold(Net(call, **parts(**last)), image())[0] == {"norm": "dense"}
    assert nnx_fold(Net(NNX["grouped"][0], **parts(nnx.BatchNorm)), image())[0] == {"norm": "conv"}


def test_nnx_tied_kernels_and_shared_modules():
    """A kernel in two layers stays; a module that two names lead to is one."""
    given = parts()
    given["other"] = nnx.Linear(4, 4, use_bias=False, rngs=nnx.Rngs(1))
    given["other"].kernel = given["dense"].kernel
    for call in (lambda m, x: m.norm(m.other(x)) + m.dense(x), lambda m, x: m.norm(m.dense(x)) + m.other(x)):
        folded, left = nnx_fold(Net(call, **given), image())
        assert not folded and "are used elsewhere too" in left["norm"]
    given = parts()
    given["again"] = given["norm"]
    assert nnx_fold(Net(lambda m, x: m.again(m.dense(x)), **given), image())[0] == {"again": "dense"}


def test_nnx_training_mode():
    model = Net(NNX["dense"][0], **parts())
    model.train()
    assert "fold what inference runs" in jbn.nnx.fold(model, image()).left["norm"]
    model.eval()
    got = jbn.nnx.fold(model, image())
    with pytest.raises(ValueError, match="folded for inference and was called with use_running_average=False"):
        got.model.norm(image(), use_running_average=False)


def test_nnx_stacked_layers():
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return Net(NNX["dense"][0], dense=nnx.Linear(4, 4, rngs=rngs), norm=jbn.nnx.BatchNorm(4, rngs=rngs))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return nnx.relu(layer(x))

    folded, left = nnx_fold(Net(lambda m, x: forward(m.stack, x), stack=create(nnx.Rngs(0))), image())
    assert not folded and left == {"stack.norm": "its variables are stacked, by scan or vmap over layers"}


def test_nnx_resnet50():
    model = nnx.eval_shape(lambda: models.NnxResNet50(10, rngs=nnx.Rngs(0)))
    folded, left = nnx_fold(model, image((1, 32, 32, 3)), tolerance=16)
    assert len(folded) == 53 and not left
    assert folded["blocks.3.norm_shortcut"] == "blocks.3.conv_shortcut"
