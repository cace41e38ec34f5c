"""Models of Flax's layers inside `jbn.linen.replacing`: to the bit what the same models of our layers compute."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import meaning
import pytest
from jax.sharding import PartitionSpec as P
from layers import assert_equal, assert_same, bf16, inputs, small

import jbn.linen

OPTIONS = dict(virtual_batch_size=2, unbiased=True, momentum=0.5)  # each changes what comes out


class Block(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(self.norm(use_running_average=False)(nn.Dense(4)(x))), None


class InSetup(nn.Module):
    norm: type

    def setup(self):
        self.layers = [nn.Dense(4), self.norm(use_running_average=False, use_bias=False, dtype=bf16)]

    def __call__(self, x, _=None):
        return self.layers[1](self.layers[0](x)), None


def of(norm, lift):
    """A block, nested or lifted if that is said, and a norm at the top of the model."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            split, axes = {"params": True}, {"params": 0, "batch_stats": 0}
            if lift == "scan":
                x, _ = nn.scan(Block, axes, split_rngs=split, length=2)(norm)(x, None)
            elif lift == "vmap":
                x, _ = nn.vmap(Block, variable_axes=axes, split_rngs=split)(norm)(x.reshape(2, 4, 4))
                x = x.reshape(8, 4)
            elif lift == "vmap of the layer":
                layer = nn.vmap(norm, variable_axes=axes, split_rngs=split)
                x = layer(use_running_average=False)(x.reshape(2, 4, 4)).reshape(8, 4)
            elif lift:
                block = {"remat": nn.remat(Block), "jit": nn.jit(Block), "setup": InSetup}[lift]
                x, _ = block(norm)(x)
            return norm(use_running_average=False, name="last")(x)

    return Model()


def results(model, variables, x, dy=None):
    """y, the new statistics and, for a dy, the gradients."""

    def run(params, x):
        return model.apply({**variables, "params": params}, x, mutable=["batch_stats"])

    def loss(params, x):
        y, updates = run(params, x)
        return jnp.sum(y * dy), (y, updates)

    program = run if dy is None else jax.value_and_grad(loss, (0, 1), has_aux=True)
    return meaning.run(program, variables["params"], x)


def init(model, x):
    return meaning.run(lambda: model.init(jax.random.key(0), x))


OURS = functools.partial(jbn.linen.BatchNorm, **OPTIONS)
OURS.__name__ = "BatchNorm"  # of a class that is lifted


@pytest.mark.parametrize("lift", [None, "setup", "scan", "vmap", "vmap of the layer", "remat", "jit"])
def test_whole_models(lift):
    x, dy = inputs((8, 4))
    dy = dy if lift in (None, "remat") else None
    model = of(nn.BatchNorm, lift)
    variables = init(model, x)
    with jbn.linen.replacing(**OPTIONS) as seen:
        assert_equal(init(model, x), variables)
        got = results(model, variables, x, dy)
    assert_equal(got, results(of(OURS, lift), variables, x, dy))
    inner = {"setup": "layers_1", "vmap of the layer": "VmapBatchNorm_0"}.get(lift, "BatchNorm_0")
    assert {path.split("/")[-1] for path in seen.replaced} == ({"last", inner} if lift else {"last"})
    assert not seen.left


def test_what_jit_has_compiled():
    """Before, inside, under other options, and after: each what it is by itself."""
    x = inputs((8, 4))[0]
    model, traced = nn.BatchNorm(False), []
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    def step(variables, x):
        traced.append(None)
        return model.apply(variables, x, mutable=["batch_stats"])[1]["batch_stats"]["var"]

    def ours(**options):
        with jbn.linen.replacing(**options):
            return step(variables, x)

    flax, plain, halves = step(variables, x), ours(momentum=0.5), ours(momentum=0.5, unbiased=True)
    assert len(traced) == 3 and len({float(v[0]) for v in (flax, plain, halves)}) == 3
    assert_equal((step(variables, x), ours(momentum=0.5), ours(unbiased=True, momentum=0.5)), (flax, plain, halves))
    assert len(traced) == 3, "equal options share a program"

    around = jax.jit(lambda variables, x: step(variables, x))
    with jbn.linen.replacing(unbiased=True):
        unbiased = around(variables, x)
    assert_same([unbiased, around(variables, x)], [ours(unbiased=True), flax], n=8)


def test_traced_bounds():
    """Options may be values of the program around; then no other shares it."""
    x = inputs((8, 4))[0]
    model = nn.BatchNorm(False)
    variables = model.init(jax.random.key(0), x)

    @jax.jit
    def step(bound):
        with jbn.linen.replacing(renorm=True, r_max=bound, d_max=0.0):
            return jax.jit(lambda v: model.apply(v, x, mutable=["batch_stats"])[0])(variables)

    for bound in (1.0, 3.0):
        ours = jbn.linen.BatchNorm(False, renorm=True, r_max=bound, d_max=0.0)
        assert_equal(step(bound), jax.jit(lambda v, m=ours: m.apply(v, x, mutable=["batch_stats"])[0])(variables))


def test_it_is_left_as_it_was():
    """After an error inside too; a bound layer is Flax's again."""
    x = inputs((8, 4))[0]
    layer = nn.BatchNorm(False, momentum=0.9)
    bound = layer.bind(layer.init(jax.random.key(0), x), mutable=["batch_stats"])
    before = dict(vars(bound))
    with pytest.raises(ValueError, match="virtual_batch_size"), jbn.linen.replacing(virtual_batch_size=3, momentum=0.5):
        bound(x)
    with jbn.linen.replacing(unbiased=True):
        bound(x)
    assert type(bound) is nn.BatchNorm and "unbiased" not in vars(bound)
    assert {name: vars(bound)[name] for name in before} == before


def test_the_innermost_context_decides():
    x = inputs((8, 4))[0]
    model = nn.BatchNorm(False)
    variables = model.init(jax.random.key(0), x)
    run = lambda: model.apply(variables, x, mutable=["batch_stats"])[1]  # noqa: E731
    with jbn.linen.replacing(momentum=0.5) as outer:
        want = run()
        with jbn.linen.replacing(momentum=0.0) as inner:
            assert jnp.any(run()["batch_stats"]["mean"] != want["batch_stats"]["mean"])
            with jbn.linen.replacing(momentum=0.5) as equal:
                assert_equal(run(), want)
        assert_equal(run(), want)
    assert [seen.replaced for seen in (outer, inner, equal)] == [[""], [""], [""]] and not outer.left | inner.left


class Sub(nn.BatchNorm):
    @nn.compact
    def __call__(self, x, **options):
        return super().__call__(x, **options) + 1


def test_what_is_left():
    x = inputs((8, 4))[0]
    model = small(lambda x: jbn.linen.BatchNorm(False)(Sub(False)(x)))
    variables = model.init(jax.random.key(0), x)
    want = model.apply(variables, x, mutable=["batch_stats"])
    with jbn.linen.replacing(virtual_batch_size=2) as seen:
        assert_equal(model.apply(variables, x, mutable=["batch_stats"]), want)
    assert not seen.replaced
    assert seen.left == {
        "Sub_0": "its class Sub is a subclass of BatchNorm, which may compute in its own way: let it inherit from "
        "jbn.linen.BatchNorm",
        "BatchNorm_0": "it is a jbn.linen.BatchNorm already, with settings of its own",
    }


def test_statistics_are_frozen_whatever_the_model_says():
    x = inputs((8, 4))[0]
    model = small(
        lambda x: nn.BatchNorm()(x, False) + nn.BatchNorm(False)(x) + nn.BatchNorm()(x, use_running_average=0)
    )
    variables = model.init(jax.random.key(0), x)
    with jbn.linen.replacing(use_running_average=True):
        y, updates = model.apply(variables, x, mutable=["batch_stats"])
    assert_equal(updates["batch_stats"], variables["batch_stats"])
    assert jnp.allclose(y, 3 * x / jnp.sqrt(1 + 1e-5), rtol=1e-6)


def test_over_devices(devices):
    """A model that knows nothing of devices has the statistics of all."""
    x = inputs((8, 4))[0]
    model = small(lambda x: nn.BatchNorm(False)(x))
    variables = model.init(jax.random.key(0), x)
    mesh = jax.make_mesh((2,), ("d",), (jax.sharding.AxisType.Auto,), devices=devices[:2])

    def run(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])

    spread = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(P(), P("d")), out_specs=(P("d"), P())))
    with jbn.linen.replacing(axis_name="d"):
        y, updates = spread(variables, x)
    whole, want = jbn.linen.BatchNorm(False).apply(
        {k: v["BatchNorm_0"] for k, v in variables.items()}, x, mutable=["batch_stats"]
    )
    assert jnp.allclose(y, whole, atol=1e-5)
    assert jnp.allclose(updates["batch_stats"]["BatchNorm_0"]["var"], want["batch_stats"]["var"], rtol=1e-5)


def test_with_what_else_is_done_to_models():
    """Recalibration, folding, interceptors, captures and tables see a layer of ours, once."""
    x = inputs((8, 4))[0] * 2 + 1
    model = small(lambda x: nn.BatchNorm(False)(nn.Dense(4)(x)))
    variables = model.init(jax.random.key(0), x)
    kinds = []

    def watch(next_fun, args, kwargs, context):
        kinds.append(type(context.module))
        return next_fun(*args, **kwargs)

    with jbn.linen.replacing(unbiased=True), nn.intercept_methods(watch):
        _, found = model.apply(variables, x, mutable=["batch_stats", "intermediates"], capture_intermediates=True)
        assert kinds.count(jbn.linen.BatchNorm) == 1 and nn.BatchNorm not in kinds
        assert len(found["intermediates"]["BatchNorm_0"]["__call__"]) == 1
        exact = jbn.linen.recalibrate(model, variables, [x])
    y = x @ variables["params"]["Dense_0"]["kernel"]
    assert jnp.allclose(exact["batch_stats"]["BatchNorm_0"]["var"], y.var(0, ddof=1), rtol=1e-5)
    with jbn.linen.replacing(use_running_average=True):
        assert jbn.linen.fold(model, exact, x).folded == {"BatchNorm_0": "Dense_0"}


@pytest.mark.parametrize(
    "options, kind, message",
    [
        (dict(moment=0.9), TypeError, "replacing got moment=0.9, expected some of use_running_average, momentum, .*"),
        (dict(activation="relu"), TypeError, "got activation='relu', .*: variables, axis and activation stay as the"),
        (dict(momentum=2), ValueError, r"momentum is 2, expected a number in \[0, 1\]"),
        (dict(epsilon=-1), ValueError, "epsilon is -1, expected a number >= 0"),
        (dict(dtype=int), TypeError, "dtype is int"),
        (dict(virtual_batch_size=0), ValueError, "virtual_batch_size is 0, expected None or a positive"),
        (dict(implementation="cuda"), ValueError, "implementation is 'cuda'"),
        (dict(r_max=3), ValueError, "replacing got r_max=3 without renorm=True: add it, or leave the bounds out"),
        (dict(renorm=True, r_max=0.5), ValueError, "r_max is 0.5, expected a number >= 1"),
    ],
)
def test_errors(options, kind, message):
    with pytest.raises(kind, match=message), jbn.linen.replacing(**options):
        raise AssertionError("entered")
