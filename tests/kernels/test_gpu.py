"""The whole op by kernels: with JBN_TEST_GPU=1 on a GPU, elsewhere on a CPU that passes for one (`driver`)."""

from functools import partial
from itertools import cycle, product

import driver
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from cases import PROBLEMS, draw, evaluate, positional, train
from driver import ON_GPU
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn.linen import BatchNorm


@pytest.fixture(scope="module", autouse=True)
def gpu():
    with driver.gpu() as calls:
        yield calls


def step(case, implementation):
    """jitted (y, new state, gradients) of a case and a cotangent."""
    f = evaluate(case, implementation=implementation) if case is PROBLEMS["eval"] else None
    trained = train(case, implementation=implementation)

    @jax.jit
    def run(arrays, state, mask, dy):
        if f is not None:
            y, vjp = jax.vjp(lambda arrays: f(arrays, state), arrays)
            return y, state, vjp(dy)[0]
        y, vjp, new = jax.vjp(lambda arrays: trained(arrays, state, mask), arrays, has_aux=True)
        return y, new, vjp(dy)[0]

    return run


DTYPES = ["float16", "bfloat16", "float32"]
WHOLE = list(product(PROBLEMS, DTYPES))
if not ON_GPU:  # where a case takes seconds: each problem in one dtype in turn, and the first in all
    WHOLE = list(dict.fromkeys([*product(["plain"], DTYPES), *zip(PROBLEMS, cycle(DTYPES), strict=False)]))


@pytest.mark.parametrize("name, dtype", WHOLE)
def test_whole_op(name, dtype, gpu):
    """Kernels and XLA agree with the oracle's y, and with each other in state and gradients."""
    case = PROBLEMS[name]._replace(shape=tuple((8 if ON_GPU else 3) * n for n in PROBLEMS[name].shape))
    inputs = draw(case, jnp.dtype(dtype))
    dy = np.random.default_rng(3).normal(size=case.shape).astype(jnp.dtype(dtype))
    arguments = (inputs.arrays, inputs.state, inputs.mask, dy)
    kernels, plain = (step(case, which)(*arguments) for which in ("triton", "xla"))
    assert ON_GPU or gpu  # calls of kernels
    rows = case.rows
    for got, want in zip(jax.tree.leaves(kernels), jax.tree.leaves(plain), strict=True):
        assert got.dtype == want.dtype
        oracle.assert_close(got, np.asarray(want, np.float64), n=rows, factor=4, axis=case.axis)
    if name == "plain":
        want = oracle.bn_train(*positional(inputs), **case.options)
        oracle.assert_close(kernels[0], want.y, n=rows, axis=case.axis)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 56, 56, 64), (32, 7, 7, 2048), (4096, 1024), (100_003, 3)])
def test_the_same_bits_every_run_while_other_streams_are_busy(shape):
    torch = pytest.importorskip("torch")
    x, residual, dy = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3))
    params, state = jbn.bn_init(shape[-1])

    @jax.jit
    def run(params, x, residual, dy):
        def f(params, x, residual):
            return jbn.bn_train(params, state, x, residual=residual, activation="relu", implementation="triton")

        y, vjp, new = jax.vjp(f, params, x, residual, has_aux=True)
        return y, new, vjp(dy)

    def bits():
        return [np.asarray(v).tobytes() for v in jax.tree.leaves(run(params, x, residual, dy))]

    first = bits()
    busy, streams = torch.randn(2048, 2048, device="cuda"), [torch.cuda.Stream() for _ in range(3)]
    for i in range(100):
        for stream in streams[: i % 4]:
            with torch.cuda.stream(stream):
                for _ in range(4):
                    busy @ busy
        assert bits() == first, f"run {i}"
    torch.cuda.synchronize()


@pytest.mark.gpu
def test_default_runs():
    x = jnp.ones((8, 4))
    y, _ = jax.jit(jbn.bn_train)(*jbn.bn_init(4), x)
    np.testing.assert_array_equal(y, 0)
    assert jbn.explain(x).platform == "cuda"
    assert jbn.explain(x, implementation="triton").implementation == "triton"


def descend(f):
    return lambda x: jax.lax.fori_loop(0, 2, lambda _, x: x - 0.1 * jax.grad(f)(x), x)


NAMED = jax.checkpoint_policies.save_only_these_names("bn_input", "bn_stats")
TRANSFORMS = {
    "grad": jax.grad,
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),)),
    "linearize": lambda f: lambda x: jax.linearize(f, x)[1](jnp.cos(x)),
    "jvp of jvp": lambda f: lambda x: jax.jvp(lambda x: jax.jvp(f, (x,), (jnp.cos(x),))[1], (x,), (x,)),
    "grad of grad": lambda f: jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum()),
    "hessian": lambda f: lambda x: jax.hessian(lambda d: f(x * jnp.exp(d)[:, None, None]))(jnp.zeros(3)),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    "vmap of vmap": lambda f: lambda x: jax.vmap(jax.vmap(f))(jnp.arange(1, 5.0).reshape(2, 2, 1, 1, 1) + x),
    "map": lambda f: lambda x: jax.lax.map(jax.grad(f), jnp.stack([x, 2 * x])),
    "cond": lambda f: jax.grad(lambda x: jax.lax.cond(x.sum() > 0, f, lambda x: f(-x), x)),
    "fori_loop": descend,
    "remat": lambda f: jax.grad(jax.checkpoint(f, policy=NAMED)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transformations_of_a_scan(name):
    x = jax.random.normal(jax.random.key(0), (3, 64, 8))
    params, state = jbn.bn_init(8)

    def loss(implementation):
        def body(carry, x):
            y, carry = jbn.bn_train(params, carry, x, implementation=implementation, activation="silu")
            return carry, jnp.sum(y**3)

        return lambda x: jax.lax.scan(body, state, x)[1].sum()

    kernels, plain = (jax.jit(TRANSFORMS[name](loss(which)))(x) for which in ("triton", "xla"))
    for a, b in zip(jax.tree.leaves(kernels), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3)


def test_training_steps():
    """Of a network with a shortcut, in bfloat16, by optax: the same as with XLA, up to rounding."""

    class Network(nn.Module):
        implementation: str

        @nn.compact
        def __call__(self, x):
            norm = partial(BatchNorm, use_running_average=False, dtype=jnp.bfloat16, implementation=self.implementation)
            dense = partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16)
            x = norm(activation="relu")(dense(32)(x))
            x = norm(activation="relu")(dense(32)(x), residual=x)
            return nn.Dense(1)(x)

    x = jax.random.normal(jax.random.key(0), (96, 8))
    optimizer = optax.adam(1e-2)

    def train(implementation):
        network = Network(implementation)
        variables = Network("xla").init(jax.random.key(1), x)
        params, stats = variables["params"], variables["batch_stats"]

        def loss(params, stats):
            y, new = network.apply({"params": params, "batch_stats": stats}, x, mutable=["batch_stats"])
            return jnp.mean((y[:, 0] - jnp.sin(x[:, 0])) ** 2), new["batch_stats"]

        def step(carry, _):
            params, stats, state = carry
            (value, stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), stats, state), value

        return jax.jit(lambda carry: jax.lax.scan(step, carry, length=5))((params, stats, optimizer.init(params)))

    ((_, stats, _), losses), ((_, plain_stats, _), plain_losses) = train("triton"), train("xla")
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, plain_losses, rtol=0.02)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=0.05, atol=0.01), stats, plain_stats)


@pytest.mark.parametrize("kind", ["automatic", "explicit", "manual"])
def test_two_devices_share_statistics(kind):
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    if kind == "automatic" and not ON_GPU:
        pytest.skip("needs two GPUs: XLA's partitioner knows no callbacks")
    axis_type = AxisType.Explicit if kind == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,), devices=jax.devices()[:2])
    x = jax.random.normal(jax.random.key(0), (64, 5, 5, 32))
    params, state = jbn.bn_init(32)

    def run(x, **options):
        def f(x):
            return jbn.bn_train(params, state, x, implementation="triton", **options)

        y, vjp, new = jax.vjp(f, x, has_aux=True)
        return y, new, vjp(jnp.cos(y))

    alone = jax.tree.leaves(jax.jit(run)(x))
    if kind == "manual":
        specs = P("data"), P(), (P("data"),)
        run = jax.shard_map(partial(run, axis_name="data"), mesh=mesh, in_specs=P("data"), out_specs=specs)
    with jax.set_mesh(mesh):
        split = jax.tree.leaves(jax.jit(run)(jax.device_put(x, NamedSharding(mesh, P("data")))))
    for a, b in zip(split, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
