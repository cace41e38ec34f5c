"""`jbn.nnx.BatchNorm` against Flax's; where the two differ on purpose, against the oracle."""

import inspect
import itertools

import jax
import jax.numpy as jnp
import meaning
import numpy as np
import oracle
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from layers import COUNT, SPACE, assert_equal, assert_same, bf16, covering, draw_mask, f16, f32, f64, inputs, normal

from jbn import linen
from jbn.nnx import BatchNorm

BOOLEAN = SPACE | {"mask": [None, None, "full", "rows", "lower rank"]}  # Flax's nnx takes no other mask


def both(*args, **options):
    """A layer of ours and one of Flax's, with equal running statistics that are not those of a fresh layer."""
    layers = [cls(*args, **options, rngs=nnx.Rngs(0)) for cls in (BatchNorm, nnx.BatchNorm)]
    return [settle(layer) for layer in layers]


def settle(layer):
    rng = np.random.default_rng(1)
    for stat in (layer.mean, layer.var):
        stat[...] = jnp.asarray(rng.uniform(0.5, 2, stat.shape), stat[...].dtype)
    return layer


def split(layer):
    return nnx.split(layer, nnx.Param, nnx.BatchStat)


def differentiate(graph, params, stats, x, dy, *args, **kwargs):
    """y, the new statistics, and the gradients of sum(y · dy) by parameters and x."""

    def apply(params, x):
        layer = nnx.merge(graph, params, stats, copy=True)
        return layer(x, *args, **kwargs), nnx.state(layer, nnx.BatchStat)

    y, pullback, new = jax.vjp(apply, params, x, has_aux=True)
    return y, new, *pullback(dy.astype(y.dtype))


def steps(layers, x, dy, *args, **kwargs):
    """`differentiate` for each layer, in one program."""

    def run(x, dy):
        return [differentiate(*split(layer), x, dy, *args, **kwargs) for layer in layers]

    return meaning.run(run, x, dy)


@pytest.mark.filterwarnings("ignore:scatter inputs")  # Flax: float64 statistics into float32 variables
@pytest.mark.parametrize("case", covering(BOOLEAN, COUNT, seed=1), ids=range(COUNT))
def test_same_as_flax(case):
    case = dict(case)
    (shape, axis), x_dtype, average, where, kind = (
        case.pop(name) for name in ("shape_axis", "x", "average", "average_in", "mask")
    )
    options = case | {"axis": axis} | ({"use_running_average": average} if where == "constructor" else {})
    called = average if where == "call" else None
    channel = axis if isinstance(axis, int) else axis[0]
    mask = draw_mask(kind, shape, channel, np.random.default_rng(2))
    dtypes = (x_dtype, case["dtype"], case["param_dtype"])
    with jax.enable_x64(f64 in dtypes):
        x, dy = inputs(shape, x_dtype)
        layers = both(shape[channel], **options)
        assert_equal(*map(nnx.state, layers))
        results = steps(layers, x, dy, called, mask=mask)
        # Flax's arithmetic is in `dtype`, to which it rounds x too.
        work = case["dtype"] or (f64 if f64 in dtypes else f32)
        assert_same(*results, work, n=x.size // x.shape[channel])


DTYPES = itertools.product([f16, bf16, f32], [None, f16, bf16, f32], [f16, bf16, f32], [True, False])


def test_result_dtypes():
    for x_dtype, dtype, param_dtype, use in DTYPES:
        options = dict(dtype=dtype, param_dtype=param_dtype, use_scale=use, use_bias=use)
        x = jax.ShapeDtypeStruct((4, 3), x_dtype)
        first, second = (jax.eval_shape(layer, x) for layer in both(3, use_running_average=True, **options))
        assert first == second, options


def test_signature():
    ours, theirs = (list(inspect.signature(cls.__call__).parameters) for cls in (BatchNorm, nnx.BatchNorm))
    assert ours == [*theirs, "residual", "r_max", "d_max"]
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'rngs'"):
        BatchNorm(3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'moment'"):
        BatchNorm(3, moment=0.9, rngs=nnx.Rngs(0))


def test_variables():
    ours, theirs = both(3, use_bias=False, param_dtype=bf16, scale_metadata={"tag": "weight decay"})
    for layer in (ours, theirs):
        assert type(layer.mean) is type(layer.var) is nnx.BatchStat
        assert type(layer.scale) is nnx.Param and layer.bias is None
    assert ours.scale.get_metadata() == theirs.scale.get_metadata()
    assert_equal(nnx.state(ours), nnx.state(theirs))


def test_mixed_precision_under_strict_promotion():
    layer = settle(BatchNorm(3, dtype=bf16, rngs=nnx.Rngs(0)))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        y = layer(inputs((4, 3), bf16)[0], mask=jnp.ones((3,), bool))
    assert y.dtype == bf16 and layer.var.dtype == f32


# Whole models.


class Block(nnx.Module):
    def __init__(self, norm, rngs):
        self.norm_1 = norm(4, scale_init=normal, rngs=rngs)
        self.dense = nnx.Linear(4, 4, rngs=rngs)
        self.norm_2 = norm(4, momentum=0.5, rngs=rngs)

    def __call__(self, x):
        return x + self.norm_2(self.dense(nnx.relu(self.norm_1(x))))


class Net(nnx.Module):
    def __init__(self, norm, rngs):
        self.dense = nnx.Linear(3, 4, rngs=rngs)
        self.block = Block(norm, rngs)
        self.norm = norm(4, bias_init=normal, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.block(self.dense(x)))


def nets():
    return [Net(norm, nnx.Rngs(0)) for norm in (BatchNorm, nnx.BatchNorm)]


@nnx.jit
def train_step(net, x, dy):
    def loss(net, x):
        return jnp.sum(net(x) * dy)

    value, (gradient, _) = nnx.value_and_grad(loss, argnums=(0, 1))(net, x)
    params = nnx.state(net, nnx.Param)
    nnx.update(net, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient))
    return value


def test_training_and_evaluation():
    """Two steps under nnx.jit and nnx.grad, then evaluation, which leaves the statistics alone."""
    x, dy = inputs((16, 3))[0], inputs((16, 4))[1]
    ours, theirs = nets()
    assert_equal(nnx.state(ours), nnx.state(theirs))
    for _ in range(2):
        assert_same(train_step(ours, x, dy), train_step(theirs, x, dy), n=16, factor=64)
    # a bias before batch norm has no gradient but rounding, of what is of order 1
    assert_same(nnx.state(ours), nnx.state(theirs), n=16, factor=64, scale=1)

    before = ours.norm.mean[...]
    results = []
    for net in (ours, theirs):
        view = nnx.view(net, use_running_average=True)
        net.eval()
        results.append(net(x))
        assert_equal(results[-1], view(x))
        net.train()
        assert np.any(net(x) != results[-1])
    assert_same(*results, n=16, factor=64)
    assert np.any(before != ours.norm.mean[...])


def test_split_and_merge():
    """State moves between a model of ours and one of Flax's."""
    x, dy = inputs((16, 3))[0], inputs((16, 4))[1]
    ours, theirs = nets()
    train_step(ours, x, dy)
    graph, state = nnx.split(ours)
    flax_graph, _ = nnx.split(theirs)
    results = []
    for model in (nnx.merge(graph, state), nnx.merge(flax_graph, state), nnx.clone(ours)):
        model.eval()
        results.append(model(x))
    assert_equal(results[0], results[2])
    assert_same(results[0], results[1], factor=16)


def test_tabulate():
    tables = [nnx.tabulate(net, jnp.ones((2, 3)), console_kwargs={"width": 160}) for net in nets()]
    assert tables[0] == tables[1]
    assert "block/norm_2" in tables[0]


def test_without_use_running_average():
    for layer in both(3, use_running_average=None):
        with pytest.raises(ValueError, match="No `use_running_average` argument was provided"):
            layer(jnp.ones((4, 3)))


def test_array_references():
    """Statistics kept in mutable references are updated in place, under a gradient too."""
    x, dy = inputs((8, 3))
    plain = settle(BatchNorm(3, rngs=nnx.Rngs(0)))
    held = nnx.with_vars(plain, ref=True, hijax=False, only=nnx.BatchStat)
    _, new, *_ = steps([plain], x, dy)[0]
    graph, params, stats = split(held)

    @jax.jit
    def run(params, stats, x):
        return jax.grad(lambda params: jnp.sum(nnx.merge(graph, params, stats)(x)))(params)

    run(params, stats, x)
    assert_same(held.mean[...], new["mean"][...], n=8)
    assert_same(held.var[...], new["var"][...], n=8)


# Lifted transformations.


def scan_over_layers(cls):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return cls(4, scale_init=normal, rngs=rngs)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(layer, x):
        return nnx.relu(layer(x))

    return create(nnx.Rngs(0)), forward


def scan_over_time(cls):
    @nnx.scan(in_axes=(nnx.StateAxes({nnx.Param: None, nnx.BatchStat: nnx.Carry}), 0), out_axes=0)
    def forward(layer, x):
        return layer(x)

    return cls(4, rngs=nnx.Rngs(0)), lambda layer, x: forward(layer, x.reshape(2, 4, 4)).reshape(8, 4)


def vmap_over_models(cls):
    @nnx.split_rngs(splits=2)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return cls(4, scale_init=normal, rngs=rngs)

    forward = nnx.vmap(lambda layer, x: layer(x), in_axes=(0, 0), out_axes=0)
    return create(nnx.Rngs(0)), lambda layer, x: forward(layer, x.reshape(2, 4, 4)).reshape(8, 4)


def vmap_over_batch(cls):
    forward = nnx.vmap(lambda layer, x: layer(x), in_axes=(None, 0), out_axes=0, axis_name="batch")
    layer = cls(4, axis_name="batch", rngs=nnx.Rngs(0))
    return layer, lambda layer, x: forward(layer, x.reshape(2, 4, 4)).reshape(8, 4)


def remat(cls):
    return cls(4, rngs=nnx.Rngs(0)), nnx.remat(lambda layer, x: layer(x))


@pytest.mark.parametrize(
    "build", [scan_over_layers, scan_over_time, vmap_over_models, vmap_over_batch, remat], ids=lambda f: f.__name__
)
def test_lifts(build):
    x, dy = inputs((8, 4))
    results = []
    for cls in (BatchNorm, nnx.BatchNorm):
        layer, forward = build(cls)

        @nnx.jit
        def run(layer, x, forward=forward):
            def loss(layer, x):
                y = forward(layer, x)
                return jnp.sum(y * dy), y

            return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, x)

        results.append((run(layer, x), nnx.state(layer)))
    assert_same(*results, n=8, factor=64)


# Over devices.


def over_vmap(f):
    return jax.vmap(f, in_axes=(None, None, 0, 0), out_axes=(0, None, None, 0), axis_name="d")


def over_shard_map(f):
    def per_device(params, stats, x, dy):
        y, new, params_bar, x_bar = f(params, stats, x[0], dy[0])
        return y[None], new, params_bar, x_bar[None]

    mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    shards, one = P("d"), P()
    specs = dict(in_specs=(one, one, shards, shards), out_specs=(shards, one, one, shards))
    return jax.shard_map(per_device, mesh=mesh, **specs)


def over_pmap(f):
    return jax.pmap(f, in_axes=(None, None, 0, 0), axis_name="d", devices=jax.devices()[:4])


@pytest.mark.parametrize(
    "over, groups", [(over_vmap, None), (over_shard_map, None), (over_pmap, None), (over_pmap, [[0, 2], [1, 3]])]
)
def test_axis_name(over, groups, devices):
    x, dy = inputs((4, 6, 3))
    results = []
    for layer in both(3, axis_name="d", axis_index_groups=groups):
        graph, params, stats = split(layer)

        def train(*args, graph=graph):
            y, new, params_bar, x_bar = differentiate(graph, *args)
            if over is not over_shard_map:  # where the transpose of replication has summed it
                params_bar = jax.lax.psum(params_bar, "d")
            return y, new, params_bar, x_bar

        results.append(jax.jit(over(train))(params, stats, x, dy))
    assert_same(*results, n=24, factor=8)


def test_axis_index_groups_without_axis_name():
    """Without a name to group, Flax pays no heed."""
    assert_same(*steps(both(3, axis_index_groups=[[0], [1]]), *inputs((4, 3))), n=4)


# What is left to Flax, and what is not.

LEFT = [
    (dict(), jnp.complex64, (4, 3, 2), "x of dtype complex64", "use one of float16, bfloat16, float32, float64"),
    (dict(), jnp.int32, (4, 3, 2), "x of dtype int32", "use one of float16"),
    (dict(dtype=jnp.complex64), f32, (4, 3, 2), "dtype complex64", "use one of float16"),
    (dict(axis=(1, -1), use_running_average=True), f32, (4, 2, 1), r"axis=\(1, -1\)", "reshape x to a single"),
]


@pytest.mark.parametrize("options, dtype, shape, reason, remedy", LEFT)
@pytest.mark.filterwarnings("ignore:Casting complex", "ignore:scatter inputs")  # to float32 statistics
def test_left_to_flax(options, dtype, shape, reason, remedy):
    x = (10 * inputs(shape)[0]).astype(dtype)
    results = []
    for layer in both(2, **options):
        y = layer(x)
        results.append((y, nnx.state(layer)))
    assert_equal(*results)


@pytest.mark.parametrize("options, dtype, shape, reason, remedy", LEFT)
def test_left_to_flax_has_no_extras(options, dtype, shape, reason, remedy):
    x = jnp.ones(shape, dtype)
    for extra, asked in [
        (dict(activation="relu"), "activation='relu'"),
        (dict(virtual_batch_size=2), "virtual_batch_size=2"),
        (dict(unbiased=True), "unbiased=True"),
        (dict(implementation="xla"), "implementation='xla'"),
        (dict(renorm=True), "renorm=True"),
    ]:
        with pytest.raises(ValueError, match=f"got {asked} together with {reason}.*{remedy}.*or do without"):
            BatchNorm(2, **options, **extra, rngs=nnx.Rngs(0))(x)
    with pytest.raises(ValueError, match=f"residual=.*together with {reason}.*{remedy}"):
        BatchNorm(2, **options, rngs=nnx.Rngs(0))(x, residual=x)


@pytest.mark.parametrize("train", [True, False])
def test_custom_promote_dtype(train):
    """It is called as in Flax, and what it returns is used: here, half precision for the input alone."""

    def promote(values, *, dtype):
        seen.append((len(values), dtype))
        x, *others = values
        return x.astype(f16), *others

    seen = []
    x, dy = inputs((16, 3))
    layers = both(3, promote_dtype=promote, dtype=f32, use_running_average=not train)
    assert_same(*steps(layers, x, dy), f16)
    assert seen == [(5, f32)] * 2


def test_identity_promote_dtype_is_linen():
    """To the bit, statistics included."""
    x = inputs((16, 3), f16)[0]
    layer = BatchNorm(3, dtype=f16, promote_dtype=lambda values, dtype: values, rngs=nnx.Rngs(0))
    other = linen.BatchNorm(use_running_average=False, dtype=f16)
    y, new = other.apply(other.init(jax.random.key(0), x), x, mutable=["batch_stats"])
    assert_equal(layer(x), y)
    assert_equal({"mean": layer.mean[...], "var": layer.var[...]}, new["batch_stats"])


# What Flax does not have.


def vectors(layer):
    return layer.scale[...], layer.bias[...], layer.mean[...], layer.var[...]


def check(layer, x, mask=None, residual=None, **options):
    """One training step and its gradients against the oracle."""
    dy = inputs(x.shape, seed=5)[1]
    y, new, params_bar, x_bar = steps([settle(layer)], x, dy, mask=mask, residual=residual)[0]
    arguments = (np.asarray(x), *vectors(layer))
    options = dict(epsilon=layer.epsilon, mask=mask, residual=residual) | options
    n = x.size // x.shape[-1]
    want = oracle.bn_train(*arguments, momentum=layer.momentum, **options)
    bars = oracle.bn_train_grads(dy, *arguments, **{k: v for k, v in options.items() if k != "unbiased"})
    oracle.assert_close(y, want.y, n=n)
    oracle.assert_state(oracle.Result(None, new["mean"][...], new["var"][...]), want, n=n)
    got = {"x": x_bar, "scale": params_bar["scale"][...], "bias": params_bar["bias"][...]}
    oracle.assert_grads(got, bars, n=n, factor=4)


@pytest.mark.parametrize(
    "options",
    [
        dict(activation="relu", residual=True),
        dict(virtual_batch_size=4, unbiased=True, residual=True),
        dict(unbiased=True),
        dict(implementation="xla"),
    ],
    ids=lambda options: "-".join(options),
)
def test_extras(options):
    x, residual = inputs((8, 3, 4))[0], inputs((8, 3, 4), seed=3)[0]
    options = dict(options)
    residual = residual if options.pop("residual", False) else None
    layer = BatchNorm(4, **options, rngs=nnx.Rngs(0))
    options.pop("implementation", None)
    check(layer, x, residual=residual, **options)


def test_extras_with_running_statistics():
    x, residual = inputs((4, 3))[0], inputs((4, 3), seed=3)[0]
    options = dict(activation="hard_swish", virtual_batch_size=3, unbiased=True)  # the last two are idle
    layer = settle(BatchNorm(3, use_running_average=True, **options, rngs=nnx.Rngs(0)))
    want = oracle.bn_eval(x, *vectors(layer), residual=residual, activation="hard_swish")
    oracle.assert_close(layer(x, residual=residual), want, factor=2)


def test_functions_for_activation():
    x, residual = inputs((4, 3))[0], inputs((4, 3), seed=3)[0]
    for options, f in ((dict(activation=nnx.softplus), nnx.softplus), LEAKY):
        layer, plain = (settle(BatchNorm(3, use_running_average=True, **o, rngs=nnx.Rngs(0))) for o in (options, {}))
        oracle.assert_close(layer(x, residual=residual), f(plain(x, residual=residual)))


LEAKY = dict(activation="leaky_relu", negative_slope=0.2), lambda y: nnx.leaky_relu(y, 0.2)


def test_options_reach_the_error_of_bn_train():
    for options, match in [
        (dict(activation="swish"), "activation"),
        (dict(implementation="cuda"), "implementation"),
        (dict(axis_name="nowhere"), "axis_name"),
        (dict(virtual_batch_size=3), "virtual_batch_size"),
        (dict(axis=2), "axis"),
    ]:
        with pytest.raises(ValueError, match=match):
            BatchNorm(3, **options, rngs=nnx.Rngs(0))(jnp.ones((4, 3)))


# Where we differ on purpose.


@pytest.mark.parametrize("use_fast_variance", [True, False])
def test_variance_does_not_cancel(use_fast_variance):
    x = jnp.asarray(np.random.default_rng(0).normal(1e4, 1, (256, 3)), f32)
    layer = BatchNorm(3, use_fast_variance=use_fast_variance, momentum=0.0, rngs=nnx.Rngs(0))
    y = layer(x)
    np.testing.assert_allclose(layer.var[...], np.var(np.float64(x), 0), rtol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-3)


def test_fully_masked_channel():
    x, _ = inputs((8, 3))
    mask = np.ones((8, 3), bool)
    mask[:, 1] = False
    check(BatchNorm(3, rngs=nnx.Rngs(0)), x, mask=mask)
    layer = settle(BatchNorm(3, rngs=nnx.Rngs(0)))
    before = [stat[...] for stat in (layer.mean, layer.var)]
    layer(x, mask=mask)
    for stat, old in zip((layer.mean, layer.var), before, strict=True):
        assert stat[1] == old[1] and stat[0] != old[0]


def test_nan_under_a_mask_reaches_no_gradient():
    x, _ = inputs((8, 3))
    mask = np.random.default_rng(4).random((8, 3)) < 0.6
    check(BatchNorm(3, rngs=nnx.Rngs(0)), jnp.where(mask, x, jnp.nan), mask=mask)


def test_unequal_masks_over_devices_are_weighted_by_count():
    x, _ = inputs((4, 6, 3))
    mask = np.random.default_rng(4).random((4, 6, 1)) < np.array([1, 0.7, 0.3, 0])[:, None, None]
    layer = settle(BatchNorm(3, axis_name="d", rngs=nnx.Rngs(0)))
    want = oracle.bn_train(np.reshape(x, (24, 3)), *vectors(layer), epsilon=layer.epsilon, mask=mask.reshape(24, 1))
    forward = nnx.vmap(lambda layer, x, mask: layer(x, mask=mask), in_axes=(None, 0, 0), axis_name="d")
    y = forward(layer, x, mask)
    oracle.assert_close(y.reshape(24, 3), want.y, n=24)
    oracle.assert_state(oracle.Result(None, layer.mean[...], layer.var[...]), want, n=24)


def test_no_gradient_through_new_statistics():
    x, _ = inputs((8, 3))
    graph, params, stats = split(BatchNorm(3, rngs=nnx.Rngs(0)))

    def statistics(params, x):
        layer = nnx.merge(graph, params, stats, copy=True)
        layer(x)
        return jnp.sum(layer.mean[...]) + jnp.sum(layer.var[...])

    for gradient in jax.tree.leaves(jax.grad(statistics, argnums=(0, 1))(params, x)):
        assert not np.any(gradient)


def test_low_precision_rounds_the_output_alone():
    """Neither 1001 nor 1.001 exists in bfloat16."""
    layer = BatchNorm(3, dtype=bf16, rngs=nnx.Rngs(0))
    layer.mean[...] = jnp.full(3, 1001.0)
    layer.scale[...] = jnp.full(3, 1.001)
    x = jnp.asarray(1001 + inputs((8, 3))[0])
    layer.eval()
    y = layer(x)
    assert y.dtype == bf16
    oracle.assert_close(y, oracle.bn_eval(x, *vectors(layer)))
    want = oracle.bn_train(x, *vectors(layer), epsilon=layer.epsilon, momentum=layer.momentum)
    layer.train()
    oracle.assert_close(layer(x), want.y)
    assert layer.mean.dtype == layer.var.dtype == f32
    oracle.assert_state(oracle.Result(None, layer.mean[...], layer.var[...]), want, n=8)
