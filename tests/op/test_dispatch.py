"""Which implementation a call compiles to: kernels for CUDA when asked for or measured to win, plain XLA otherwise."""

import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import plugin
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn._op import dispatch
from jbn._op.gpu import Device
from jbn._op.plan import Plan
from jbn._op.sync import Sync

X = jnp.ones((8, 7, 7, 64), jnp.bfloat16)
PARAMS, STATE = jbn.bn_init(64)


def kernels(f, *args, platform="cuda"):
    """Calls of Triton kernels in `f` lowered for a platform."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(r"custom_call @triton_kernel_call", text))


def train(implementation, **options):
    def step(params, x, dy):
        def f(params, x):
            return jbn.bn_train(params, STATE, x, implementation=implementation, **options)

        y, vjp, state = jax.vjp(f, params, x, has_aux=True)
        return y, state, vjp(dy)

    return step


@pytest.fixture
def on_cuda():
    try:
        import jbn._op.jax_triton  # noqa: F401
    except Exception as error:
        pytest.skip(f"jax-triton cannot be imported here: {error}")


OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "residual": {"residual": X, "activation": "silu"},
    "mask": {"mask": jnp.ones((8, 7, 7, 1), bool)},
    "virtual": {"virtual_batch_size": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_two_launches_forward_and_two_backward(on_cuda, name):
    assert kernels(train("triton", **OPTIONS[name]), PARAMS, X, X) == 4


def test_vmap_is_an_axis_of_the_same_kernels(on_cuda):
    assert kernels(jax.vmap(train("triton"), (None, 0, 0)), PARAMS, X[None].repeat(3, 0), X[None].repeat(3, 0)) == 4


def test_inference_is_one_launch(on_cuda):
    assert kernels(lambda x: jbn.bn_eval(PARAMS, STATE, x, implementation="triton"), X) == 1


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_default_is_xla(implementation):
    assert kernels(train(implementation), PARAMS, X, X) == 0


PLAN = Plan(3, 0, 1, True, None, jnp.dtype("bfloat16"), Sync(), may_partition=False, implementation=None)
WIN = dispatch.Win("NVIDIA H100", "bfloat16", "last", 50_000, "results.json")  # X has 50,176 bytes


@pytest.fixture
def measured(monkeypatch):
    """As if kernels had been measured to win on the GPU that stands for all."""
    monkeypatch.setattr(dispatch, "WINS", (WIN,))
    jax.clear_caches()  # `jit` knows nothing of the table
    yield
    jax.clear_caches()


def test_default_takes_kernels_where_they_were_measured_to_win(on_cuda, measured):
    assert kernels(train(None), PARAMS, X, X) == 4
    assert kernels(train("xla"), PARAMS, X, X) == 0
    assert jbn.explain(X, platform="cuda").reason == "measured to win from 0.05 MB on NVIDIA H100 (results.json)"


@pytest.mark.parametrize(
    "x, options",
    [(X[:7], {}), (X.astype(jnp.float32), {}), (X, {"axis": 1})],
    ids=["too small", "another dtype", "another layout"],
)
def test_default_is_xla_beside_the_table(measured, x, options):
    told = jbn.explain(x, platform="cuda", **options)
    assert told.implementation == "xla"
    assert told.reason.startswith("no measurement shows the kernels ahead for ")
    assert told.reason.endswith(f"{x.nbytes / 1e6} MB on NVIDIA H100")


def test_default_on_another_gpu_is_xla(measured, monkeypatch):
    monkeypatch.setattr(dispatch, "gpu", lambda _: Device("NVIDIA A100-SXM4-40GB", 108, "8.0"))
    assert dispatch.choose("moments", PLAN, "cuda", X, None).implementation == "xla"


def test_default_elsewhere_is_xla(measured):
    assert kernels(train(None), PARAMS, X, X, platform="cpu") == 0
    assert dispatch.choose("moments", PLAN, "tpu", X, None) == (
        "xla", "kernels are for GPUs, and this is compiled for tpu",
    )  # fmt: skip


def obstacles():
    """What stands in the way: patches of `_dispatch`, operands, and what is said of it."""
    wide = jax.ShapeDtypeStruct((8, 7, 7, 64), jnp.dtype("float64"))
    here = dict(gpu=lambda _: Device("NVIDIA H100", 132, "9.0"))
    yield "float64", {}, (wide, None), "dtype float64 is not among the kernels' (float16, bfloat16, float32)"
    yield "another operand in float64", {}, (X, wide), "dtype float64 is not among the kernels'"
    yield "empty", {}, (X[:0], None), "x of shape (0, 7, 7, 64) is empty"
    old = dict(gpu=lambda _: Device("NVIDIA H100 (V100)", 80, "7.0"))
    yield "old GPU", old, (X, None), "the GPU has compute capability 7.0, and the kernels need 8.0"
    old = dict(gpu=lambda _: Device("NVIDIA H100 (MI50)", 60, "gfx906"))
    yield "old AMD GPU", old, (X, None), "the GPU is gfx906, and the kernels are for gfx90a, gfx94, gfx95"
    absent = here | dict(packages=lambda _: "jax-triton is not installed: pip install 'jax[cuda12]' triton")
    yield "a package that is missing", absent, (X, None), "jax-triton is not installed: pip install"


OBSTACLES = {name: rest for name, *rest in obstacles()}


@pytest.mark.parametrize("name", OBSTACLES)
def test_obstacle(name, measured, monkeypatch):
    """Asked for by name, kernels that cannot run raise; the default falls back, and says why."""
    patches, operands, said = OBSTACLES[name]
    monkeypatch.setattr(dispatch, "covering", lambda *_: WIN)
    for attribute, value in patches.items():
        monkeypatch.setattr(dispatch, attribute, value)
    choice = dispatch.choose("moments", PLAN, "cuda", *operands)
    assert choice.implementation == "xla" and choice.reason.startswith(said)
    with pytest.raises(NotImplementedError, match=f"implementation='triton' cannot be used: {re.escape(said)}"):
        dispatch.choose("moments", PLAN._replace(implementation="triton"), "cuda", *operands)


def test_kernel_that_does_not_compile(on_cuda, measured, monkeypatch):
    """One piece falls back, or the call raises with the compiler's words."""
    from jbn._op import triton

    def broken(*_, **__):
        raise ValueError("PassManager::run failed\nand more")

    monkeypatch.setattr(triton.launches, "gradient_sums", broken)
    triton._failure.cache_clear()
    assert kernels(train(None), PARAMS, X, X) == 3
    told = jbn.explain(X, platform="cuda")
    said = "jbn_gradient_sums does not compile (ValueError: PassManager::run failed)"
    assert told.implementation == "triton" and told.notes[0] == f"backward: gradient_sums by xla: {said}"
    with pytest.raises(NotImplementedError, match=re.escape(said)):
        kernels(train("triton"), PARAMS, X, X)
    triton._failure.cache_clear()


def test_training_may_have_a_kernel_that_inference_lacks(on_cuda, measured, monkeypatch):
    """One piece, compiled for either."""
    from jbn._op import triton

    monkeypatch.setattr(triton, "failure", lambda name, plan, *_: None if plan.centred else "no such kernel")
    told = jbn.explain(X, platform="cuda")
    assert [len(found) for found in told.launches.values()] == [2, 2, 0]
    assert told.notes[0] == "inference: apply by xla: no such kernel"
    monkeypatch.setattr(triton, "failure", lambda name, plan, *_: "no such kernel" if plan.centred else None)
    told = jbn.explain(X, platform="cuda")
    assert told.notes[:2] == ("forward: moments by xla: no such kernel", "forward: apply by xla: no such kernel")


GOOD = {"jax": "0.11.2", "triton": "3.6.0", "jax-triton": "0.3.1"}


@pytest.mark.parametrize(
    "platform, change, said",
    [
        ("cuda", {}, None),
        ("rocm", {}, None),
        ("rocm", {"triton": "3.7.0"}, "jax-triton 0.3.1 compiles for ROCm with triton 3.6 alone, and triton 3.7.0 is"),
        ("cuda", {"jax": "0.12.0.1", "triton": "3.9.0"}, None),
        ("cuda", {"jax-triton": "0.4.1"}, None),
        (
            "cuda",
            {"jax-triton": "0.4.1", "jax": "0.12.0.1"},
            "jax-triton 0.4.1 does not work with jax 0.12.0.1: pip install",
        ),
        ("cuda", {"jax-triton": "0.2.0"}, "jax-triton 0.2.0 is too old, 0.3.1 is the oldest that works: pip install"),
        ("cuda", {"triton": "3.5.1+git1"}, "triton 3.5.1+git1 is too old, 3.6 is the oldest that works: pip install"),
    ],
)
def test_versions(platform, change, said):
    found = dispatch.unusable(GOOD | change, platform)
    assert found is said or found.startswith(said)


def test_missing_packages(monkeypatch):
    def version(package):
        if package == "jax-triton":
            raise importlib.metadata.PackageNotFoundError(package)
        return GOOD[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    dispatch.packages.cache_clear()
    named = "pip install 'jax[cuda12]' triton 'jax-triton>=0.3.1,<0.4' (or 'jax[cuda13]')"  # all on PyPI
    assert dispatch.packages("cuda") == f"jax-triton is not installed: {named}"
    dispatch.packages.cache_clear()


@pytest.fixture
def on_rocm(on_cuda, monkeypatch):
    """jax-triton asks the plugin what GPU there is: a stand-in says gfx942."""
    plugin.replace(monkeypatch)


@pytest.mark.parametrize("name", OPTIONS)
def test_rocm(on_rocm, name):
    """All four launches compile for gfx942; with a Triton for which jax-triton does not, this is said."""
    if dispatch.packages("rocm") is None:
        assert kernels(train("triton", **OPTIONS[name]), PARAMS, X, X, platform="rocm") == 4
    else:
        with pytest.raises(NotImplementedError, match=r"compiles for ROCm with triton 3\.6 alone"):
            kernels(train("triton", **OPTIONS[name]), PARAMS, X, X, platform="rocm")


def test_float64_has_no_kernel():
    with jax.enable_x64(True):
        x = X.astype(jnp.float64)
        with pytest.raises(NotImplementedError, match="dtype float64 is not among the kernels'"):
            kernels(train("triton"), PARAMS, x, x)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_raise(platform):
    message = rf"needs a CUDA or ROCm GPU, and this is compiled for {platform}: use"
    with pytest.raises(NotImplementedError, match=message):
        kernels(train("triton"), PARAMS, X, X, platform=platform)


def fused(implementation):
    def f(params, x, residual):
        return jbn.bn_train(params, STATE, x, residual=residual, activation="relu", implementation=implementation)

    def step(params, x, residual, dy):
        y, vjp, state = jax.vjp(f, params, x, residual, has_aux=True)
        return y, state, vjp(dy)

    return step


def test_tracing_asks_no_measurement(monkeypatch):
    """Lowering alone does, so that whatever was traced before goes by new rows."""
    monkeypatch.setattr(dispatch.tables, "of", lambda kind: pytest.fail("asked for measurements"))
    traced = jax.jit(fused(None)).trace(PARAMS, X, X, X)
    assert "jbn_gradient_sums_keeping" in str(traced.jaxpr)
    with pytest.raises(pytest.fail.Exception, match="asked for measurements"):
        traced.lower(lowering_platforms=("cuda",))


def test_what_kernels_may_keep_costs_xla_nothing():
    """The same work and memory as where there is no choice."""
    found = []
    for implementation in (None, "xla"):
        compiled = jax.jit(fused(implementation)).lower(PARAMS, X, X, X).compile()
        found.append((compiled.cost_analysis()["bytes accessed"], compiled.memory_analysis().temp_size_in_bytes))
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_kept_cotangent_over_devices(devices, kind):
    """The backward of a fused residual where kernels may run: the same sharded as alone, in one all-reduce."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2, devices=devices)
    params, state = jbn.bn_init(6)
    x, residual, dy = (jax.random.normal(jax.random.key(i), (8, 4, 6)) for i in range(3))

    @jax.jit
    def run(params, x, residual, dy):
        def f(params, x, residual):
            return jbn.bn_train(params, state, x, residual=residual, activation="silu")

        _, vjp, _ = jax.vjp(f, params, x, residual, has_aux=True)
        return vjp(dy)

    alone = run(params, x, residual, dy)
    with jax.set_mesh(mesh):
        split = [jax.device_put(v, NamedSharding(mesh, P("a", "b"))) for v in (x, residual, dy)]
        found = run(params, *split)
        text = run.lower(params, *split).compile().as_text()
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1
