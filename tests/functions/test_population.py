"""Population statistics: exact over a data set, pooled by count, for functions and for both kinds of Flax model."""

import itertools
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close, assert_state

import jbn
from jbn import linen as jl
from jbn import nnx as jx
from jbn._flax.recalibrate_linen import recalibrate as recalibrate_linen
from jbn._flax.recalibrate_nnx import recalibrate as recalibrate_nnx
from jbn._functions.moments import population_state

ROWS, FEATURES, HIDDEN = 24, 3, 4
SPLITS = [[24], [12, 12], [1, 2, 3, 18], [2] * 12]


def data(seed=0, offset=5.0):
    return np.random.default_rng(seed).normal(offset, 2, (ROWS, FEATURES)).astype(np.float32)


def split(sizes, *arrays):
    """Batches of these sizes; several arrays give tuples."""
    cuts = np.cumsum(sizes)[:-1]
    parts = zip(*(np.split(a, cuts) for a in arrays), strict=True)
    return [part if len(part) > 1 else part[0] for part in parts]


def expected(x, mask=None, unbiased=False):
    n, mean, m2 = oracle.moments(x, -1, mask)
    return mean, m2 / np.maximum(n - unbiased, 1)


def check(stats, mean, var, n=ROWS):
    assert_state(jbn.BNState(stats["mean"], stats["var"]), jbn.BNState(mean, var), n=n)


@pytest.mark.parametrize("unbiased", [False, True])
def test_population_state(unbiased):
    x, mask = data(), np.ones((ROWS, FEATURES), bool)
    mask[5:, 0] = False
    parts = [jbn.moments(x[rows], mask=mask[rows]) for rows in np.split(np.arange(ROWS), 3)]
    state = population_state(jbn.merge(*parts), unbiased)
    assert isinstance(state, jbn.BNState)
    check(state._asdict(), *expected(x, mask, unbiased))
    check(population_state(jbn.moments(x), unbiased)._asdict(), *expected(x, None, unbiased))
    params = jbn.BNParams(np.ones(FEATURES, np.float32), None)
    mean, var = expected(x)
    assert_close(jbn.bn_eval(params, population_state(jbn.moments(x)), x), (x - mean) / np.sqrt(var + 1e-5), n=ROWS)


def test_population_state_of_nothing():
    state = population_state(jbn.moments(data(), mask=np.array([[True, False, True]])))
    assert float(state.mean[1]) == 0 and float(state.var[1]) == 1
    with pytest.raises(TypeError, match=r"moments is a tuple, expected jbn\.Moments: make it with jbn\.moments\(x\)"):
        population_state((1, 2, 3))


class Linen(nn.Module):
    """A batch norm on the data, one behind it on its output, one frozen, and some other state."""

    norm: type = jl.BatchNorm
    unbiased: bool = False

    @nn.compact
    def __call__(self, x, mask=None, train=False):
        options = {"unbiased": self.unbiased} if self.norm is jl.BatchNorm else {"use_fast_variance": False}
        x = self.norm(use_running_average=not train, name="first", **options)(x, mask=mask)
        calls = self.variable("other", "calls", jnp.zeros, (), int)
        calls.value += 1
        self.sow("intermediates", "x", x)
        x = nn.relu(nn.Dense(HIDDEN, name="dense")(x))
        x = self.norm(use_running_average=not train, name="second")(x, mask=mask)
        return self.norm(use_running_average=True, name="frozen")(x)


def noisy(tree, seed=3):
    """Values for leaves of these shapes, none of them an initial one."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype), tree)


def variables_of(model, *args, **call):
    shapes = jax.eval_shape(lambda key, *args: model.init(key, *args, **call), jax.random.key(0), *args)
    return noisy({k: v for k, v in shapes.items() if k != "intermediates"})


def second_input(variables, x, mask=None):
    """What the second layer sees of one batch: the first normalised with the batch's own statistics."""
    mean, var = expected(x, mask)
    f = lambda *path: np.asarray(variables["params"][path[0]][path[1]], float)  # noqa: E731
    y = (x - mean) / np.sqrt(var + 1e-5) * f("first", "scale") + f("first", "bias")
    return np.maximum(y @ f("dense", "kernel") + f("dense", "bias"), 0)


@pytest.mark.parametrize("norm", [jl.BatchNorm, nn.BatchNorm])
@pytest.mark.parametrize("sizes", SPLITS, ids=len)
def test_linen(norm, sizes):
    x, model = data(), Linen(norm)
    variables = variables_of(model, x)
    kept = jax.tree.map(np.array, variables)
    got = recalibrate_linen(model, variables, iter(split(sizes, x)), train=True)
    check(got["batch_stats"]["first"], *expected(x))
    hidden = np.concatenate([second_input(kept, part) for part in split(sizes, x)])
    check(got["batch_stats"]["second"], *expected(hidden), n=100 * ROWS)
    untouched = lambda v: {**v, "batch_stats": v["batch_stats"]["frozen"]}  # noqa: E731
    jax.tree.map(np.testing.assert_array_equal, untouched(got), untouched(kept))
    jax.tree.map(np.testing.assert_array_equal, variables, kept)


@pytest.mark.parametrize("sizes", SPLITS, ids=len)
def test_masks_pool_by_count(sizes):
    x, mask = data(), np.random.default_rng(1).random((ROWS, 1)) < 0.6
    x[~mask[:, 0]] = np.nan
    model = Linen(unbiased=True)
    variables = variables_of(model, data())
    got = recalibrate_linen(model, variables, split(sizes, x, mask), train=True)
    check(got["batch_stats"]["first"], *expected(x, mask, unbiased=True))


def test_a_channel_of_which_nothing_is_seen_keeps_its_statistics():
    x, mask = data(), np.array([[True, False, True]])
    model = jl.BatchNorm()
    variables = variables_of(model, x, use_running_average=True)
    got = recalibrate_linen(model, variables, [x[:8], x[8:]], use_running_average=False, mask=mask)
    mean, var = expected(x)
    old = variables["batch_stats"]
    check(got["batch_stats"], *(np.where(mask[0], new, old[k]) for k, new in (("mean", mean), ("var", var))))


class SharedLinen(nn.Module):
    """One layer, called on x and on −3·x."""

    @nn.compact
    def __call__(self, x):
        norm = jl.BatchNorm(use_running_average=False, axis=0)
        return norm(x.T).T, norm(-3 * x.T[:, :2])


def test_shared_layers():
    x = data()
    variables = variables_of(SharedLinen(), x)
    batches = split([10, 14], x)
    seen = np.concatenate([np.concatenate([b, -3 * b[:2]]) for b in batches])
    got = recalibrate_linen(SharedLinen(), variables, batches)
    check(got["batch_stats"]["BatchNorm_0"], *expected(seen))


class Doubling(jl.BatchNorm):
    """A subclass that changes its input first."""

    @nn.compact
    def __call__(self, x, use_running_average=None, *, mask=None):
        return super().__call__(2 * x, use_running_average, mask=mask)


def test_a_subclass_counts_what_the_layer_itself_gets():
    x, model = data(), Doubling(use_running_average=False)
    got = recalibrate_linen(model, variables_of(model, x), split([8, 16], x))
    check(got["batch_stats"], *expected(2 * x))


class Scanned(nn.Module):
    """Two blocks stacked by scan, rematerialised, that share no variable."""

    @nn.compact
    def __call__(self, x):
        class Block(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                x = nn.Dense(FEATURES)(x)
                return jl.BatchNorm(use_running_average=False)(x), None

        stack = nn.scan(
            nn.remat(Block), variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True}, length=2
        )
        return stack()(x, None)[0]


def test_inside_scan_and_remat():
    x, model = data(), Scanned()
    variables = variables_of(model, x)
    batches = split([10, 14], x)
    got = jax.tree.leaves(recalibrate_linen(model, variables, batches)["batch_stats"])
    assert [v.shape for v in got] == [(2, FEATURES)] * 2
    (dense,) = (block["Dense_0"] for block in variables["params"].values())
    first = [np.float64(b) @ dense["kernel"][0] + dense["bias"][0] for b in batches]
    mean, var = expected(np.concatenate(first))
    check({"mean": got[0][0], "var": got[1][0]}, mean, var, n=10 * ROWS)


class Recurrent(nn.Module):
    """One layer, applied to each of four steps by scan, which carries its statistics on."""

    @nn.compact
    def __call__(self, x):
        def step(norm, carry, x):
            return carry, norm(x)

        broadcast = {"variable_broadcast": "params", "split_rngs": {"params": False}}
        scan = nn.scan(step, variable_carry="batch_stats", **broadcast)
        return scan(jl.BatchNorm(use_running_average=False), None, x)[1]


def test_a_layer_carried_through_scan():
    x = np.random.default_rng(0).normal(5, 2, (4, ROWS, FEATURES)).astype(np.float32)
    one = variables_of(jl.BatchNorm(), x, use_running_average=True)
    variables = {kind: {"BatchNorm_0": values} for kind, values in one.items()}  # Flax cannot init a carry
    got = recalibrate_linen(Recurrent(), variables, [x[:, :10], x[:, 10:]])["batch_stats"]
    check(got["BatchNorm_0"], *expected(x.reshape(-1, FEATURES)))


def test_an_ensemble_by_vmap():
    """Each member has statistics of its own data."""
    ensemble = nn.vmap(jl.BatchNorm, variable_axes={"params": 0, "batch_stats": 0}, split_rngs={"params": True})
    x, model = data(), ensemble(use_running_average=False)
    x = np.stack([x, 3 * x])
    got = recalibrate_linen(model, variables_of(model, x), [x[:, :10], x[:, 10:]])["batch_stats"]
    for i in range(2):
        check({k: v[i] for k, v in got.items()}, *expected(x[i]))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(jnp.ones_like(x))
        return jl.BatchNorm(use_running_average=False)(x)


def test_each_batch_has_random_numbers_of_its_own():
    """Of 2 rows a mask of dropout has means 0, 1 or 2 alone; over 20 batches of one mask so would the pool."""
    x, rngs = np.ones((2, 64), np.float32), {"dropout": jax.random.key(1)}
    variables = Dropped().init({"params": jax.random.key(0), **rngs}, x)
    means = recalibrate_linen(Dropped(), variables, [x] * 20, rngs=rngs)["batch_stats"]["BatchNorm_0"]["mean"]
    assert len(np.unique(means)) > 5
    model = nnx.Sequential(nnx.Dropout(0.5, rngs=nnx.Rngs(1)), jx.BatchNorm(64, rngs=nnx.Rngs(0)))
    recalibrate_nnx(model, [x] * 20)
    assert len(np.unique(model.layers[1].mean[...])) > 5
    assert int(model.layers[0].rngs.count[...]) == 0


class Nnx(nnx.Module):
    """As Linen, and a layer that is called twice."""

    def __init__(self, norm=jx.BatchNorm, **options):
        rngs = nnx.Rngs(0)
        self.first, self.shared = norm(FEATURES, rngs=rngs, **options), norm(FEATURES, rngs=rngs)
        self.dense, self.second = nnx.Linear(FEATURES, HIDDEN, rngs=rngs), norm(HIDDEN, rngs=rngs)
        self.tied = self.shared
        self.calls = nnx.Cache(jnp.zeros((), int))
        self.blocks = nnx.List([norm(HIDDEN, rngs=rngs)])

    def __call__(self, x, mask=None):
        self.shared(x, mask=mask), self.tied(-3 * x, mask=mask)
        self.calls[...] += 1
        x = nnx.relu(self.dense(self.first(x, mask=mask)))
        return self.blocks[0](self.second(x, mask=mask), use_running_average=True)


def nnx_model(*args, **options):
    model = Nnx(*args, **options)
    nnx.update(model, noisy(nnx.state(model)))
    return model


def pure(model):
    return jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))


@pytest.mark.parametrize("norm", [jx.BatchNorm, nnx.BatchNorm])
@pytest.mark.parametrize("sizes", SPLITS, ids=len)
def test_nnx(norm, sizes):
    x, model = data(), nnx_model(norm, use_fast_variance=False)
    kept, types = pure(model), [type(m) for _, m in nnx.iter_graph(model)]
    assert recalibrate_nnx(model, iter(split(sizes, x))) is None
    got = pure(model)
    check(got["first"], *expected(x))
    check(got["shared"], *expected(np.concatenate([x, -3 * x])))
    hidden = np.concatenate([second_input({"params": kept}, part) for part in split(sizes, x)])
    check(got["second"], *expected(hidden), n=100 * ROWS)
    for tree in (got, kept):
        for layer in ("first", "second", "shared"):
            del tree[layer]["mean"], tree[layer]["var"]
    jax.tree.map(np.testing.assert_array_equal, got, kept)
    assert [type(m) for _, m in nnx.iter_graph(model)] == types


def test_nnx_masks_pool_by_count():
    x, mask = data(), np.random.default_rng(1).random((ROWS, 1)) < 0.6
    x[~mask[:, 0]] = np.nan
    model = nnx_model(unbiased=True)
    recalibrate_nnx(model, split([3, 21], x, mask))
    check(pure(model)["first"], *expected(x, mask, unbiased=True))


class NnxDoubling(jx.BatchNorm):
    def __call__(self, x, *args, **options):
        return super().__call__(2 * x, *args, **options)


def test_nnx_subclass_counts_what_the_layer_itself_gets():
    x, model = data(), NnxDoubling(FEATURES, rngs=nnx.Rngs(0))
    recalibrate_nnx(model, split([8, 16], x))
    check(pure(model), *expected(2 * x))


class NnxStack(nnx.Module):
    """Two layers by vmap, applied by scan, inside a jit of the model's own."""

    def __init__(self):
        @nnx.split_rngs(splits=2)
        @nnx.vmap
        def make(rngs):
            return jx.BatchNorm(FEATURES, rngs=rngs, scale_init=nnx.initializers.normal(1.0))

        self.layers = make(nnx.Rngs(0))

    @nnx.jit
    def __call__(self, x):
        return nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


def test_nnx_inside_scan_and_jit():
    x, model = data(), NnxStack()
    recalibrate_nnx(model, split([10, 14], x))
    mean, var = expected(x)
    assert model.layers.mean[...].shape == (2, FEATURES)
    check({"mean": model.layers.mean[...][0], "var": model.layers.var[...][0]}, mean, var)
    scale = np.abs(model.layers.scale[...][0])  # the standard deviation of what the second layer sees
    assert_close(model.layers.mean[...][1], np.zeros(FEATURES), n=ROWS, scale=scale)
    assert np.all(np.abs(model.layers.var[...][1] - np.square(model.layers.scale[...][0])) < 1e-4)


def test_nnx_method():
    class Named(nnx.Module):
        def __init__(self):
            self.norm = jx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))

        def encode(self, x, *, factor):
            return self.norm(factor * x)

    x, model = data(), Named()
    recalibrate_nnx(model, [x], method="encode", factor=2)
    check(pure(model.norm), *expected(2 * x))


def test_over_devices(devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = data()
    batches = [jax.device_put(part, NamedSharding(mesh, P("data"))) for part in split([8, 16], x)]
    model, twin = Linen(), nnx_model()
    variables = variables_of(model, x)
    check(recalibrate_linen(model, variables, batches, train=True)["batch_stats"]["first"], *expected(x))
    recalibrate_nnx(twin, batches)
    check(pure(twin)["first"], *expected(x))


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_long_stream_of_small_batches(kind):
    """Rounding does not grow with the number of batches, nor does the variance cancel."""
    x = np.random.default_rng(0).normal(1000, 1, (1000, 2, FEATURES)).astype(np.float32)
    if kind == "linen":
        model = jl.BatchNorm(use_running_average=False)
        stats = recalibrate_linen(model, variables_of(model, x[0]), x_of(x))["batch_stats"]
    else:
        model = jx.BatchNorm(FEATURES, rngs=nnx.Rngs(0))
        recalibrate_nnx(model, x_of(x))
        stats = pure(model)
    mean, var = expected(x.reshape(-1, FEATURES))
    np.testing.assert_allclose(stats["mean"], mean, rtol=1e-6)
    np.testing.assert_allclose(stats["var"], var, rtol=1e-4)


def x_of(batches):
    yield from batches


def calls():
    """(recalibrate on some batches, what its statistics are now) for linen and nnx."""
    x, linen, model = data(), Linen(), nnx_model()
    variables = variables_of(linen, x)
    return {
        "linen": (
            lambda *a, **k: recalibrate_linen(linen, variables, *a, **({"train": True} | k)),
            lambda: jax.tree.map(np.array, variables),
        ),
        "nnx": (lambda *a, **k: recalibrate_nnx(model, *a, **k), lambda: pure(model)),
    }


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_errors_leave_the_model_as_it_was(kind):
    run, now = calls()[kind]
    before, x = now(), data()

    def broken():
        yield x
        raise OSError("disk")

    class Short(list):
        def __len__(self):
            return 5

    for batches, options, error, message in [
        ([], {}, ValueError, "batches yielded none: give at least one"),
        (iter([]), {"num_batches": 3}, ValueError, "batches yielded none"),
        (iter([x, x]), {"num_batches": 3}, ValueError, "ended after 2 of 3, and the model stays.*num_batches=2"),
        (Short([x, x]), {}, ValueError, "ended after 2 of 5"),
        (broken(), {}, OSError, "disk"),
        (x, {}, TypeError, r"batches is an array of shape \(24, 3\).*into a list"),
        (3, {}, TypeError, "batches is a int, expected an iterable"),
        ([x], {"num_batches": 0}, ValueError, "num_batches is 0"),
        ([x], {"num_batches": 1.5}, TypeError, "num_batches is 1.5"),
        (
            [x, x.astype(np.complex64)],
            {},
            (TypeError, ValueError),
            "(first|shared) got x of dtype complex64.*no moments",
        ),
    ]:
        with pytest.raises(error, match=message):
            run(batches, **options)
        jax.tree.map(np.testing.assert_array_equal, now(), before)


def test_no_layer_in_training_mode():
    x, model, twin = data(), Linen(), nnx_model()
    variables = variables_of(model, x)
    with pytest.raises(ValueError, match=r"no batch norm ran in training mode.*train=True.*model\.train\(\)"):
        recalibrate_linen(model, variables, [x], train=False)
    with pytest.raises(ValueError, match="variables has no batch_stats of first"):
        recalibrate_linen(model, {"params": variables["params"]}, [x], train=True)
    twin.eval()
    with pytest.raises(ValueError, match="no batch norm ran in training mode"):
        recalibrate_nnx(twin, [x])
    with pytest.raises(ValueError, match="no batch norm ran in training mode"):
        recalibrate_nnx(nnx.Linear(FEATURES, 1, rngs=nnx.Rngs(0)), [x])


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_num_batches_takes_no_more(kind):
    run, now = calls()[kind]
    x = data()
    got = run(itertools.repeat(x), num_batches=3)
    got = now() if got is None else got["batch_stats"]
    check(got["first"], *expected(x))


def test_progress_bar(capsys, monkeypatch):
    run, _ = calls()["linen"]
    pytest.importorskip("rich")
    run([data(), data()], progress=True)
    assert "Recalibrating" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match="progress=True needs rich: pip install rich"):
        run([data()], progress=True)
