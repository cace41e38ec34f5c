"""The Triton kernels over several devices: each on its own part of x, one collective between two launches.

Lowered for CUDA, and run on CPU devices with Triton's interpreter in the place of the launch.
"""

import functools
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hlo import in_order
from jax._src.interpreters import mlir
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close, assert_grads, assert_state

import jbn
from jbn._op import dispatch, xla

pytest.importorskip("triton", reason="Triton is not installed")
pytest.importorskip("jbn._op.jax_triton", reason="jax-triton is not installed", exc_type=Exception)

from interpreter import run

from jbn._op import triton

SHAPE = (16, 4, 8)
LOCAL = "tensor<2x4x8xf32>"
PIECES = ("moments", "apply", "gradient_sums", "gradient_sums_keeping", "gradient_input")
ONE_AT_A_TIME = threading.Lock()
WAYS = ("shard_map", "shard_map unchecked", "explicit", "automatic")


def data():
    rng = np.random.default_rng(0)
    x, residual, dy = rng.normal(1, 2, (3, *SHAPE)).astype(np.float32)
    scale, bias = rng.uniform(0.5, 1.5, (2, SHAPE[-1])).astype(np.float32)
    mask = rng.random((*SHAPE[:2], 1)) < 0.7
    mask[2:4] = False  # device 1 has nothing valid
    return x, residual, dy, scale, bias, mask


def step(x, residual, dy, scale, bias, mask, axis_name=None, implementation="triton"):
    """y, new state, and gradients of x, residual, scale and bias."""
    _, state = jbn.bn_init(SHAPE[-1])

    def f(x, residual, scale, bias):
        options = dict(activation="relu", axis_name=axis_name, implementation=implementation)
        return jbn.bn_train(jbn.BNParams(scale, bias), state, x, mask=mask, residual=residual, **options)

    y, pull, state = jax.vjp(f, x, residual, scale, bias, has_aux=True)
    return y, state, pull(dy)


def spread(way, devices, implementation="triton"):
    """The step in one of the ways, the mesh, and placed arguments."""
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((8,), ("d",), axis_types=(kind,), devices=devices)
    rows, whole = P("d"), P()
    specs = (rows, rows, rows, whole, whole, rows)
    given = [jax.device_put(v, NamedSharding(mesh, spec)) for v, spec in zip(data(), specs, strict=True)]
    if not way.startswith("shard_map"):
        return jax.jit(functools.partial(step, implementation=implementation)), mesh, given
    checked = way == "shard_map"

    def local(*args):
        y, state, (dx, dresidual, dscale, dbias) = step(*args, axis_name="d", implementation=implementation)
        if not checked:  # checked, JAX sums the gradients of what is the same everywhere by itself
            dscale, dbias = jax.lax.psum((dscale, dbias), "d")
        return y, state, (dx, dresidual, dscale, dbias)

    out = (rows, whole, (rows, rows, whole, whole))
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out, check_vma=checked)), mesh, given


@pytest.mark.parametrize("way", WAYS[:3])
def test_kernels_are_called_on_the_part_of_a_device(way, devices):
    """moments, gather, apply; gradient sums, sum, x̄."""
    f, mesh, given = spread(way, devices)
    with jax.set_mesh(mesh):
        text = f.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"custom_call @triton_kernel_call\(.*? : \((tensor<[^,)]*>)", text)
    assert calls == [LOCAL] * 4
    order = [step for step in in_order(text) if step == "triton_kernel_call" or step.startswith("all_")]
    called = [place for place, step in enumerate(order) if step == "triton_kernel_call"]
    assert order[called[0] : called[1]] == ["triton_kernel_call", "all_gather"]
    assert "all_reduce" in order[called[2] : called[3]]


@pytest.mark.parametrize("size, calls", [(0, 4), (1 + 4 * 2 * 4 * 8, 0)], ids=["won", "too small"])
def test_the_default_goes_by_the_part_of_a_device(size, calls, devices, monkeypatch):
    """x is large enough in either case, its parts in one."""
    win = dispatch.Win("NVIDIA H100", "float32", "last", size, "results.json")
    monkeypatch.setattr(dispatch, "WINS", (win,))
    jax.clear_caches()  # `jit` knows nothing of the table
    f, mesh, given = spread("explicit", devices, implementation=None)
    with jax.set_mesh(mesh):
        text = f.trace(*given).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@triton_kernel_call") == calls
    told = jbn.explain(given[0], mask=given[-1], residual=given[1], activation="relu", platform="cuda")
    assert told.implementation == ("triton" if calls else "xla")
    jax.clear_caches()


def interpreted(launch, *arrays):
    """A launch, in the interpreter, on the host."""
    shapes = [jax.ShapeDtypeStruct(o.shape, jnp.dtype(o.dtype)) for o in launch.outputs]

    def host(*arrays):
        outputs = [np.zeros(s.shape, s.dtype) for s in shapes]
        with ONE_AT_A_TIME:  # the interpreter patches Triton
            run(launch.kernel, launch.programs, *map(np.array, arrays), *launch.numbers, *outputs, **launch.constants)
        return outputs

    return jax.pure_callback(host, shapes, *arrays)


@pytest.fixture
def on_cpu(monkeypatch):
    """The pieces lower on a CPU too as they do for CUDA."""
    lowerings = mlir._platform_specific_lowerings
    pieces = {p: rule for p, rule in lowerings["cuda"].items() if p.name in {f"jbn_{name}" for name in PIECES}}
    assert len(pieces) == len(PIECES)
    for piece, rule in pieces.items():
        monkeypatch.setitem(lowerings["cpu"], piece, rule)
    jax.clear_caches()
    yield
    jax.clear_caches()


def check(f, mesh, given):
    """Values, state and gradients are the oracle's."""
    with jax.set_mesh(mesh):
        y, state, grads = jax.block_until_ready(f(*given))
    x, residual, dy, scale, bias, mask = data()
    args, options = (x, scale, bias, np.zeros(8), np.ones(8)), dict(mask=mask, residual=residual)
    want = oracle.bn_train(*args, **options, activation="relu")
    wanted = oracle.bn_train_grads(dy, *args, **options, activation="relu")
    rows = 64
    assert_close(y, want.y, n=rows, factor=5)
    assert_state(state, want, n=rows)
    assert_grads(dict(zip(("x", "residual", "scale", "bias"), grads, strict=True)), wanted, n=rows, factor=10)


@pytest.mark.parametrize("way", WAYS[:3])
def test_in_the_interpreter(way, devices, on_cpu, monkeypatch):
    runner = functools.partial(interpreted)
    runner.processors, runner.capability = 4, 90
    monkeypatch.setattr(
        dispatch, "kernels", lambda name, platform: functools.partial(getattr(triton, name), runner=runner)
    )
    check(*spread(way, devices))


@pytest.fixture
def spied(monkeypatch):
    """Names of pieces, and the shapes of x that kernels, here plain jnp, are traced for; in the default's table too."""
    shapes = {}

    def kernels(name, platform):
        def piece(plan, x, *operands):
            shapes.setdefault(name, set()).add(x.shape)
            return getattr(xla, name)(plan, x, *operands)

        return piece

    monkeypatch.setattr(dispatch, "kernels", kernels)
    monkeypatch.setattr(dispatch, "obstacle", lambda *_, **__: None)
    monkeypatch.setattr(dispatch, "WINS", (dispatch.Win("", "float32", "last", 0, "a test"),))
    jax.clear_caches()
    yield shapes
    jax.clear_caches()


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_split_by_the_compiler(implementation, devices, on_cpu, spied):
    """Over an automatic mesh, where no callback survives: plain jnp as the kernels, split by their rules."""
    f, mesh, given = spread("automatic", devices, implementation)
    check(f, mesh, given)
    text = f.lower(*given).compile().as_text()
    assert re.findall(r"= (\S+?)\{\S* all-gather\(", text) == ["f32[8,3,8]"], "moments, and nothing of x's size"
    assert len(re.findall(r" all-reduce\(", text)) == 1
    part = (SHAPE[0] // 8, *SHAPE[1:])
    assert spied == {name: {SHAPE, part} for name in PIECES if name != "gradient_sums"}


@pytest.mark.parametrize("implementation", [None, "triton"])
def test_uneven_parts(implementation, devices, on_cpu, spied):
    """The default leaves them to XLA; kernels asked for by name take padded parts, but where they reduce."""
    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Auto,), devices=devices[:3])

    def uneven(implementation, x, residual, dy, *rest):
        x, residual, dy = (jax.lax.with_sharding_constraint(v, NamedSharding(mesh, P("d"))) for v in (x, residual, dy))
        return step(x, residual, dy, *rest, implementation=implementation)

    def gathers(implementation):
        text = jax.jit(functools.partial(uneven, implementation)).lower(*data()).compile().as_text()
        return len(re.findall(r"= f32\[18,4,8\]\S* all-gather\(", text))

    check(jax.jit(functools.partial(uneven, implementation)), mesh, data())
    part = (6, *SHAPE[1:])  # of 16, the last one padded
    elementwise = {SHAPE} if implementation is None else {SHAPE, part}
    assert spied["apply"] == spied["gradient_input"] == elementwise
    assert spied["moments"] == spied["gradient_sums_keeping"] == {SHAPE}
    assert gathers(implementation) <= gathers("xla")


def test_the_default_where_xla_alone_splits(devices, spied):
    """Virtual batches, meshes that are partly manual, and what is exported, would gather x for a kernel."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2, devices=devices)
    params, state = jbn.bn_init(SHAPE[-1])
    x = jax.device_put(data()[0], NamedSharding(mesh, P("a")))

    def lowered(names=None, **options):
        spied.clear()
        f = lambda x: jbn.bn_train(params, state, x, axis_name="a" if names else None, **options)[0]  # noqa: E731
        if names:
            f = jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names=names)
        jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))
        return set(spied)

    assert lowered() == lowered(names={"a", "b"}) == {"moments", "apply"}
    assert lowered(names={"a"}) == lowered(virtual_batch_size=4) == set()
    told = jbn.explain(x, virtual_batch_size=4, platform="cuda")
    assert told.implementation == "xla"
    assert told.reason == "XLA alone splits virtual batches over an automatic mesh, and would gather x for a kernel"
    spied.clear()
    one = jax.jit(lambda x: jbn.bn_train(params, state, x)[0])
    jax.export.export(one, platforms=("cuda",))(jax.ShapeDtypeStruct(SHAPE, np.float32))
    assert not spied
    one.trace(data()[0]).lower(lowering_platforms=("cuda",))
    assert set(spied) == {"moments", "apply"}


def test_explain_tells_of_uneven_parts(devices, spied):
    mesh = jax.make_mesh((3,), ("d",), axis_types=(AxisType.Auto,), devices=devices[:3])
    x = jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=NamedSharding(mesh, P("d")))
    told = jbn.explain(x, platform="cuda")
    assert told.implementation == "xla"
    assert told.reason == "axis 0 of x, 16 long, is not divided evenly, and uneven parts are for XLA"


def test_the_table_is_that_of_the_lowering(devices, on_cpu, spied, monkeypatch):
    """What the compiler asks later goes by what its name says, not by rows that came since."""
    f, mesh, given = spread("automatic", devices, implementation=None)
    with jax.set_mesh(mesh):
        lowered = f.lower(*given)
        monkeypatch.setattr(dispatch, "WINS", ())
        lowered.compile()
    assert (SHAPE[0] // 8, *SHAPE[1:]) in spied["moments"]
