"""What only a GPU shows: the whole op by kernels, the same bits every run beside other work, several devices."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import PROBLEMS, draw, evaluate, positional, train
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def jax_triton():
    pytest.importorskip("jax_triton", reason="jax-triton is not installed", exc_type=ImportError)


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


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_whole_op(name, dtype):
    """Kernels and XLA agree with the oracle's y, and with each other in state and gradients."""
    case = PROBLEMS[name]._replace(shape=tuple(8 * n for n in PROBLEMS[name].shape))
    inputs = draw(case, jnp.dtype(dtype))
    dy = np.random.default_rng(3).normal(size=case.shape).astype(jnp.dtype(dtype))
    arguments = (inputs.arrays, inputs.state, inputs.mask, dy)
    kernels, plain = (step(case, which)(*arguments) for which in ("triton", "xla"))
    rows = case.rows
    for got, want in zip(jax.tree.leaves(kernels), jax.tree.leaves(plain), strict=True):
        assert got.dtype == want.dtype
        oracle.assert_close(got, np.asarray(want, np.float64), n=rows, factor=4)
    if name == "plain":
        want = oracle.bn_train(*positional(inputs), **case.options)
        oracle.assert_close(kernels[0], want.y, n=rows)


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


def test_default_runs():
    x = jnp.ones((8, 4))
    y, _ = jax.jit(jbn.bn_train)(*jbn.bn_init(4), x)
    np.testing.assert_array_equal(y, 0)
    assert jbn.explain(x).platform == "cuda"
    assert jbn.explain(x, implementation="triton").implementation == "triton"


TRANSFORMS = {
    "grad": jax.grad,
    "grad of grad": lambda f: jax.grad(lambda x: (jax.grad(f)(x) ** 2).sum()),
    "vmap of grad": lambda f: lambda x: jax.vmap(jax.grad(f))(jnp.stack([x, 2 * x])),
    "jvp": lambda f: lambda x: jax.jvp(f, (x,), (jnp.cos(x),)),
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


def test_two_devices_share_statistics():
    if jax.device_count() < 2:
        pytest.skip("needs two GPUs")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    x = jax.random.normal(jax.random.key(0), (64, 14, 14, 32))
    params, state = jbn.bn_init(32)

    @jax.jit
    def run(x):
        y, vjp, new = jax.vjp(lambda x: jbn.bn_train(params, state, x, implementation="triton"), x, has_aux=True)
        return y, new, vjp(jnp.cos(y))

    alone = jax.tree.leaves(run(x))
    split = jax.tree.leaves(run(jax.device_put(x, NamedSharding(mesh, P("data")))))
    for a, b in zip(split, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
