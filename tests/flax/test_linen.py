"""`jbn.linen.BatchNorm` against Flax's; where the two differ on purpose, against the oracle."""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import meaning
import numpy as np
import oracle
import pytest
from flax import errors
from jax.sharding import PartitionSpec as P
from layers import COUNT, SPACE, assert_equal, assert_same, bf16, covering, draw_mask, f16, f32, f64, inputs, normal

from jbn.linen import BatchNorm


def both(*args, **options):
    return [cls(*args, **options) for cls in (BatchNorm, nn.BatchNorm)]


def init(model, x, *args, **kwargs):
    """Jitted, so that only what the variables need is computed."""
    return inits([model], x, *args, **kwargs)[0]


def inits(models, x, *args, **kwargs):
    """`init` of each model, in one program."""
    return meaning.run(lambda: [model.init(jax.random.key(0), x, *args, **kwargs) for model in models])


def differentiate(model, variables, x, dy, *args, **kwargs):
    """y, the new variables, and the gradients of sum(y · dy) by parameters and x."""

    def apply(params, x):
        return model.apply({**variables, "params": params}, x, *args, mutable=["batch_stats"], **kwargs)

    y, pullback, new = jax.vjp(apply, variables.get("params", {}), x, has_aux=True)
    return y, new, *pullback(dy.astype(y.dtype))


def steps(models, variables, x, dy, *args, **kwargs):
    """`differentiate` for each model, on the same variables, in one program."""
    run = lambda *a: [differentiate(model, *a, *args, **kwargs) for model in models]  # noqa: E731
    return meaning.run(run, variables, x, dy)


def settled(variables, seed=1):
    """`variables` with running statistics that are not those of a fresh layer, in their dtype."""
    rng = np.random.default_rng(seed)
    stats = jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 2, a.shape), a.dtype), variables["batch_stats"])
    return {**variables, "batch_stats": stats}


@pytest.mark.parametrize("case", covering(SPACE, COUNT), ids=range(COUNT))
def test_same_as_flax(case):
    case = dict(case)
    (shape, axis), x_dtype, average, where, kind = (
        case.pop(name) for name in ("shape_axis", "x", "average", "average_in", "mask")
    )
    options = case | {"axis": axis} | ({"use_running_average": average} if where == "constructor" else {})
    train = average if where == "call" else None
    channel = axis if isinstance(axis, int) else axis[0]
    mask = draw_mask(kind, shape, channel, np.random.default_rng(2))
    dtypes = (x_dtype, case["dtype"], case["param_dtype"])
    with jax.enable_x64(f64 in dtypes):
        x, dy = inputs(shape, x_dtype)
        layers = both(**options)
        first = inits(layers, x, train, mask=mask)
        assert_equal(*first)
        results = steps(layers, settled(first[0]), x, dy, train, mask=mask)
        # Flax takes 1/√(var + epsilon) of its float32 running variance in float32.
        work = f64 if (case["dtype"] or x_dtype) == f64 and not average else f32
        assert_same(*results, work, n=x.size // x.shape[channel])


@pytest.mark.parametrize("shape, axis", [((7,), 0), ((1, 4), -1), ((5, 1), -1)])
def test_smallest_inputs(shape, axis):
    x, dy = inputs(shape)
    layers = both(use_running_average=False, axis=axis, epsilon=0.5)
    assert_same(*steps(layers, init(layers[1], x), x, dy))


DTYPES = itertools.product([f16, bf16, f32], [None, f16, bf16, f32], [f16, bf16, f32], [True, False])


def test_result_dtypes():
    for x_dtype, dtype, param_dtype, use in DTYPES:
        options = dict(dtype=dtype, param_dtype=param_dtype, use_scale=use, use_bias=use)
        x = jax.ShapeDtypeStruct((4, 3), x_dtype)
        first, second = (
            jax.eval_shape(functools.partial(layer.init_with_output, jax.random.key(0)), x)
            for layer in both(True, **options)
        )
        assert first == second, options


def test_fields_begin_with_those_of_flax():
    """Positional construction means the same, and `parent` and `name` stay last."""
    ours, theirs = ([(f.name, f.default) for f in dataclasses.fields(cls)] for cls in (BatchNorm, nn.BatchNorm))
    known = [f for f in ours if f in theirs]
    extra = [f for f in ours if f not in theirs]
    assert known == theirs
    assert extra == [
        ("activation", None),
        ("negative_slope", 0.01),
        ("virtual_batch_size", None),
        ("unbiased", False),
        ("implementation", None),
        ("renorm", False),
        ("r_max", None),
        ("d_max", None),
    ]
    assert [layer.epsilon for layer in both(True, 1, 0.5, 1e-3)] == [1e-3, 1e-3]


def test_mixed_precision_under_strict_promotion():
    x, _ = inputs((4, 3), bf16)
    layer = BatchNorm(use_running_average=False, dtype=bf16)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        y, variables = layer.init_with_output(jax.random.key(0), x)
        y, new = layer.apply(variables, x, mask=jnp.ones((3,), bool), mutable=["batch_stats"])
    assert y.dtype == bf16 and new["batch_stats"]["var"].dtype == f32


# Whole models.


class Block(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        x = nn.relu(self.norm(use_running_average=not train, scale_init=normal)(x))
        return x + self.norm(momentum=0.5)(nn.Dense(4)(x), not train)


class Net(nn.Module):
    norm: type

    @nn.compact
    def __call__(self, x, train):
        x = self.norm()(nn.Dense(4)(x), use_running_average=not train)
        x = Block(self.norm)(Block(self.norm)(x, train), train)
        return self.norm(name="last", bias_init=normal)(x, not train)


NETS = Net(BatchNorm), Net(nn.BatchNorm)


def test_automatic_names_and_random_numbers():
    """Names, shapes, and every initial value, to the bit."""
    ours, theirs = inits(NETS, jnp.ones((2, 3)), False)
    assert_equal(ours, theirs)
    assert set(ours["params"]) == {"Dense_0", "BatchNorm_0", "Block_0", "Block_1", "last"}
    assert set(ours["params"]["Block_0"]) == {"BatchNorm_0", "Dense_0", "BatchNorm_1"}


@pytest.mark.parametrize("train", [True, False])
def test_nested_model(train):
    x, dy = inputs((16, 3))[0], inputs((16, 4))[1]
    variables = settled(init(NETS[1], x, train))
    # behind another batch norm means are 0 but for rounding, of what is of order 1
    assert_same(*steps(NETS, variables, x, dy, train), n=16, factor=64, scale=1)


def test_tabulate():
    table = functools.partial(nn.tabulate, rngs=jax.random.key(0), console_kwargs={"width": 200})
    tables = [table(net)(jnp.ones((2, 3)), True) for net in NETS]
    assert tables[0] == tables[1]
    assert "Block_1/BatchNorm_0" in tables[0]


@pytest.mark.parametrize("dtype", [f32, jnp.complex64])
def test_captured_intermediates(dtype):
    """A call is captured once, also where it is left to Flax."""
    x = jnp.arange(12).reshape(4, 3).astype(dtype)
    caught = []
    for layer in both(use_running_average=True):
        variables = init(layer, x)
        caught.append(layer.apply(variables, x, capture_intermediates=True, mutable=["intermediates"])[1])
    assert_same(*jax.tree.map(jnp.real, caught))
    assert len(caught[0]["intermediates"]["__call__"]) == 1


def test_errors_are_those_of_flax():
    x = jnp.ones((4, 3))
    variables = init(nn.BatchNorm(True), x)
    for cls in (BatchNorm, nn.BatchNorm):
        with pytest.raises(ValueError, match='"use_running_average" must be passed'):
            cls().apply(variables, x)
        with pytest.raises(ValueError, match='"use_running_average" was passed to the constructor and at'):
            cls(True).apply(variables, x, True)
        with pytest.raises(errors.ModifyScopeVariableError, match='Cannot update variable "mean"'):
            cls(False).apply(variables, x)
        with pytest.raises(errors.ScopeCollectionNotFound, match='access "mean"'):
            cls(True).apply({"params": variables["params"]}, x)
        with pytest.raises(errors.CallCompactUnboundModuleError):
            cls(True)(x)


# Lifted transformations.


def scan_over_layers(cls):
    """A stack: parameters and statistics of its own for each layer."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.relu(cls(use_running_average=False)(nn.Dense(4)(x))), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
            return nn.scan(Layer, variable_axes=axes, split_rngs=split, length=3)()(x, None)[0]

    return Stack()


def scan_over_time(cls):
    """One layer at each step: statistics are carried."""

    class Cell(nn.Module):
        @nn.compact
        def __call__(self, carry, x):
            y = cls(use_running_average=False)(x + carry)
            return nn.tanh(y), y

    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            lift = functools.partial(nn.scan, variable_broadcast="params", variable_carry="batch_stats")
            if self.is_initializing():  # what is carried has to be there before
                return Cell(name="cell")(x, x)[1]
            xs = jnp.stack([x, 2 * x, x**2])
            return lift(Cell, split_rngs={"params": False})(name="cell")(jnp.zeros_like(x), xs)[1][-1]

    return Recurrent()


def remat(cls):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(cls)(use_running_average=False)(nn.remat(nn.Dense)(4)(x))

    return Model()


def vmap_over_models(cls):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes, split = {"params": 0, "batch_stats": 0}, {"params": True}
            lift = nn.vmap(cls, variable_axes=axes, split_rngs=split)
            return lift(use_running_average=False, scale_init=normal)(x.reshape(2, 4, 4)).reshape(8, 4)

    return Model()


def vmap_over_batch(cls):
    """Shared statistics, synchronized over the mapped axis."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": None, "batch_stats": None}
            lift = nn.vmap(cls, variable_axes=axes, split_rngs={"params": False}, axis_name="batch")
            return lift(use_running_average=False, axis_name="batch")(x.reshape(2, 4, 4)).reshape(8, 4)

    return Model()


@pytest.mark.parametrize("build", [scan_over_layers, scan_over_time, remat, vmap_over_models, vmap_over_batch])
def test_lifts(build):
    x, dy = inputs((8, 4))
    models = [build(cls) for cls in (BatchNorm, nn.BatchNorm)]
    variables = inits(models, x)
    assert_equal(*variables)
    assert_same(*steps(models, settled(variables[1]), x, dy), n=8, factor=64, scale=1)  # likewise


# Over devices.


def over_vmap(f):
    return jax.vmap(f, in_axes=(None, 0, 0), axis_name="d")


def over_vmap_to_one_state(f):
    return jax.vmap(f, in_axes=(None, 0, 0), out_axes=(0, None, None, 0), axis_name="d")


def over_shard_map(f):
    def per_device(variables, x, dy):
        y, stats, params_bar, x_bar = f(variables, x[0], dy[0])
        return y[None], stats, params_bar, x_bar[None]

    mesh = jax.make_mesh((4,), ("d",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    shards, one = P("d"), P()
    specs = dict(in_specs=(one, shards, shards), out_specs=(shards, one, one, shards))
    return jax.shard_map(per_device, mesh=mesh, **specs)


def over_pmap(f):
    return jax.pmap(f, in_axes=(None, 0, 0), axis_name="d", devices=jax.devices()[:4])


@pytest.mark.parametrize(
    "over, groups",
    [
        (over_vmap, None),
        (over_vmap_to_one_state, None),
        (over_shard_map, None),
        (over_pmap, None),
        (over_pmap, [[0, 2], [1, 3]]),
    ],
)
def test_axis_name(over, groups, devices):
    x, dy = inputs((4, 6, 3))
    layers = both(use_running_average=False, axis_name="d", axis_index_groups=groups)
    variables = inits(layers, x[0])  # axis_name is not bound here
    assert_equal(*variables)

    def train(layer, *args):
        y, new, params_bar, x_bar = differentiate(layer, *args)
        if over is not over_shard_map:  # where the transpose of replication has summed it
            params_bar = jax.lax.psum(params_bar, "d")
        return y, new, params_bar, x_bar

    mapped = [over(functools.partial(train, layer)) for layer in layers]
    results = jax.jit(lambda *args: [f(*args) for f in mapped])(settled(variables[1]), x, dy)
    assert_same(*results, n=24, factor=8)


def test_axis_index_groups_without_axis_name():
    """Without a name to group, Flax pays no heed."""
    x, dy = inputs((4, 3))
    layers = both(use_running_average=False, axis_index_groups=[[0], [1]])
    assert_same(*steps(layers, init(layers[1], x), x, dy), n=4)


# What is left to Flax.

LEFT = [
    (dict(), jnp.complex64, "x of dtype complex64", "use one of float16, bfloat16, float32, float64"),
    (dict(), jnp.int32, "x of dtype int32", "use one of float16"),
    (dict(dtype=jnp.complex64), f32, "dtype complex64", "use one of float16"),
    (dict(param_dtype=jnp.complex64), jnp.complex64, "x of dtype complex64", "use one of float16"),
    (dict(axis=(1, -1)), f32, r"axis=\(1, -1\)", "reshape x to a single feature axis"),
    (
        dict(force_float32_reductions=False, param_dtype=bf16),
        bf16,
        "force_float32_reductions=False",
        "leave force",
    ),
]


@pytest.mark.parametrize("options, dtype, reason, remedy", LEFT)
def test_left_to_flax(options, dtype, reason, remedy):
    x = (10 * inputs((4, 3, 2))[0]).astype(dtype)
    layers = both(use_running_average=False, **options)
    variables = inits(layers, x)
    assert_equal(*variables)
    assert_equal(*jax.jit(lambda v: [layer.apply(v, x, mutable=["batch_stats"]) for layer in layers])(variables[0]))


@pytest.mark.parametrize("options, dtype, reason, remedy", LEFT)
def test_left_to_flax_has_no_extras(options, dtype, reason, remedy):
    x = jnp.ones((4, 3, 2), dtype)
    for extra, asked in [
        (dict(activation="relu"), "activation='relu'"),
        (dict(virtual_batch_size=2), "virtual_batch_size=2"),
        (dict(unbiased=True), "unbiased=True"),
        (dict(implementation="xla"), "implementation='xla'"),
        (dict(renorm=True), "renorm=True"),
    ]:
        with pytest.raises(ValueError, match=f"got {asked} together with {reason}.*{remedy}.*or do without"):
            BatchNorm(use_running_average=False, **options, **extra).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match=rf"residual='array of shape \(4, 3, 2\)' together with {reason}.*{remedy}"):
        BatchNorm(use_running_average=False, **options).init(jax.random.key(0), x, residual=x)


@pytest.mark.parametrize("axis", [3, -4, (0, 3)])
def test_axis_out_of_range(axis):
    with pytest.raises(ValueError, match=r"out of range for x of shape .*give one of -3 to 2"):
        BatchNorm(use_running_average=False, axis=axis).init(jax.random.key(0), jnp.ones((2, 3, 4)))


# What Flax does not have.


def oracle_arguments(variables):
    params, stats = variables["params"], variables["batch_stats"]
    return params["scale"], params["bias"], stats["mean"], stats["var"]


def check(layer, x, mask=None, residual=None, seed=0, **options):
    """One training step and its gradients against the oracle."""
    variables = settled(init(layer, x))
    dy = inputs(x.shape, seed=5)[1]
    y, new, params_bar, x_bar = steps([layer], variables, x, dy, mask=mask, residual=residual)[0]
    arguments = (np.asarray(x), *oracle_arguments(variables))
    options = dict(epsilon=layer.epsilon, mask=mask, residual=residual) | options
    n = x.size // x.shape[-1]
    want = oracle.bn_train(*arguments, momentum=layer.momentum, **options)
    bars = oracle.bn_train_grads(dy, *arguments, **{k: v for k, v in options.items() if k != "unbiased"})
    oracle.assert_close(y, want.y, n=n)
    oracle.assert_state(oracle.Result(None, **new["batch_stats"]), want, n=n)
    oracle.assert_grads({"x": x_bar, "scale": params_bar["scale"], "bias": params_bar["bias"]}, bars, n=n, factor=4)


@pytest.mark.parametrize(
    "options",
    [
        dict(activation="relu", residual=True),
        dict(activation="silu"),
        dict(virtual_batch_size=2),
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
    layer = BatchNorm(use_running_average=False, **options)
    options.pop("implementation", None)
    check(layer, x, residual=residual, **options)


def test_extras_with_running_statistics():
    x, residual = inputs((4, 3))[0], inputs((4, 3), seed=3)[0]
    layer = BatchNorm(True, activation="hard_swish", virtual_batch_size=3, unbiased=True)  # the last two are idle
    variables = settled(init(layer, x))
    y = layer.apply(variables, x, residual=residual)
    want = oracle.bn_eval(x, *oracle_arguments(variables), residual=residual, activation="hard_swish")
    oracle.assert_close(y, want, factor=2)


def test_functions_for_activation():
    x, residual = inputs((4, 3))[0], inputs((4, 3), seed=3)[0]
    variables = settled(init(BatchNorm(True), x))
    for options, f in ((dict(activation=nn.softplus), nn.softplus), LEAKY):
        y = BatchNorm(True, **options).apply(variables, x, residual=residual)
        oracle.assert_close(y, f(BatchNorm(True).apply(variables, x, residual=residual)))


LEAKY = dict(activation="leaky_relu", negative_slope=0.2), lambda y: nn.leaky_relu(y, 0.2)


def test_options_reach_the_error_of_bn_train():
    x = jnp.ones((4, 3))
    for options, match in [
        (dict(activation="swish"), "activation"),
        (dict(implementation="cuda"), "implementation"),
        (dict(axis_name="nowhere"), "axis_name"),
        (dict(virtual_batch_size=3), "virtual_batch_size"),
    ]:
        variables = init(BatchNorm(False), x)
        with pytest.raises(ValueError, match=match):
            BatchNorm(False, **options).apply(variables, x, mutable=["batch_stats"])


def test_initialization_on_one_example():
    """Like the axis name, the virtual batch size is not asked for then."""
    layer = BatchNorm(use_running_average=False, virtual_batch_size=4, axis_name="nowhere")
    x = jnp.ones((1, 3))
    assert_equal(init(layer, x), init(nn.BatchNorm(False), x))


# Where we differ on purpose.


@pytest.mark.parametrize("use_fast_variance", [True, False])
def test_variance_does_not_cancel(use_fast_variance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1e4, 1, (256, 3)), f32)
    layer = BatchNorm(use_running_average=False, use_fast_variance=use_fast_variance, momentum=0.0)
    y, variables = layer.init_with_output(jax.random.key(0), x)
    _, new = layer.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(new["batch_stats"]["var"], np.var(np.float64(x), 0), rtol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-3)


def test_fully_masked_channel():
    x, _ = inputs((8, 3))
    mask = np.ones((8, 3), bool)
    mask[:, 1] = False
    layer = BatchNorm(use_running_average=False)
    check(layer, x, mask=mask)
    variables = settled(init(layer, x))
    _, new = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
    for name, old in variables["batch_stats"].items():
        assert new["batch_stats"][name][1] == old[1] and new["batch_stats"][name][0] != old[0]


def test_nan_under_a_mask_reaches_no_gradient():
    x, _ = inputs((8, 3))
    mask = np.random.default_rng(4).random((8, 3)) < 0.6
    check(BatchNorm(use_running_average=False), jnp.where(mask, x, jnp.nan), mask=mask)


def test_unequal_masks_over_devices_are_weighted_by_count():
    x, _ = inputs((4, 6, 3))
    mask = np.random.default_rng(4).random((4, 6, 1)) < np.array([1, 0.7, 0.3, 0])[:, None, None]
    layer = BatchNorm(use_running_average=False, axis_name="d")
    variables = settled(init(layer, x[0]))

    def train(x, mask):
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    y, new = jax.jit(jax.vmap(train, axis_name="d", out_axes=(0, None)))(x, mask)
    want = oracle.bn_train(np.reshape(x, (24, 3)), *oracle_arguments(variables), epsilon=1e-5, mask=mask.reshape(24, 1))
    oracle.assert_close(y.reshape(24, 3), want.y, n=24)
    oracle.assert_state(oracle.Result(None, **new["batch_stats"]), want, n=24)


def test_no_gradient_through_new_statistics():
    x, _ = inputs((8, 3))
    layer = BatchNorm(use_running_average=False)
    variables = init(layer, x)

    def statistics(params, x):
        _, new = layer.apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return sum(map(jnp.sum, jax.tree.leaves(new)))

    for gradient in jax.tree.leaves(jax.grad(statistics, argnums=(0, 1))(variables["params"], x)):
        assert not np.any(gradient)
