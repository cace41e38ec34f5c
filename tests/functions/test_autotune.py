"""`autotune`: what it finds in a program, how it measures it, and what None makes of the outcome."""

import functools
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import driver
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.interpreters.mlir import _platform_specific_lowerings
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from jbn._functions import autotune_measure as measuring
from jbn._op import dispatch, tables, xla
from jbn._op.tables import Norm, Times

autotune = sys.modules["jbn._functions.autotune"]
ROOT = Path(__file__).parents[2]
PARAMS, STATE = jbn.bn_init(8)
X = np.random.default_rng(0).normal(1, 2, (16, 3, 8)).astype(np.float32)
PLAIN = Norm(X.shape, 2, 0, "float32", "float32", None, None, None, True)
FASTER = {"forward": Times(1.0, 2.0), "backward": Times(1.0, 3.0)}


def train(x, residual=None, **options):
    return jbn.bn_train(PARAMS, STATE, x, residual=residual, **options)[0]


def loss(x, **options):
    return (train(x, **options) ** 2).sum()


@pytest.fixture
def tuned(tmp_path, monkeypatch):
    """`autotune` as on a GPU, into a folder of the test's, where kernels take FASTER."""
    monkeypatch.setattr(autotune, "default_platform", lambda: "cuda")
    monkeypatch.setattr(measuring, "links", lambda norm: 1)
    monkeypatch.setattr(
        measuring, "timed", lambda p, _: (FASTER["forward"], FASTER["backward"] if p.linearize else None)
    )
    for name in ("_known", "_folders", "_agreed"):
        monkeypatch.setattr(tables, name, {})
    yield functools.partial(jbn.autotune, path=tmp_path, progress=False)
    jax.clear_caches()


@pytest.fixture
def launched(monkeypatch):
    """Pieces lower here as for CUDA, with plain jnp as the kernels; yields their names and the shapes of their x."""
    shapes = []

    def kernels(name, platform):
        def piece(plan, x, *operands):
            shapes.append((name, x.shape))
            return getattr(xla, name)(plan, x, *operands)

        return piece

    monkeypatch.setattr(dispatch, "kernels", kernels)
    monkeypatch.setattr(dispatch, "obstacle", lambda *_, **__: None)
    for primitive, entry in _platform_specific_lowerings["cuda"].items():
        if primitive.name.startswith("jbn_"):
            monkeypatch.setitem(_platform_specific_lowerings["cpu"], primitive, entry)
    jax.clear_caches()
    return shapes


def test_kernels_by_what_was_measured(tuned, monkeypatch, capsys):
    """On the CPU that passes for a GPU: one jitted function before and after, a network's step with two batch norms."""

    @jax.jit
    def step(x):
        def f(x):
            y = train(x, activation="relu")
            return (train(jnp.sin(y), y, activation="relu") ** 2).sum()

        return jax.value_and_grad(f)(x)

    with driver.installed() as calls:
        before = step(X)
        assert not calls
        found = tuned(step, X, progress=True)
        measured = len(calls)
        after = step(X)
        assert len(calls) > measured > 0
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
        told = jbn.explain(X, activation="relu", platform="cuda")
        assert told.implementation == "triton"
        row = re.escape(f"row 16×3×8 float32 of {found.file}, ") + r"\d{4}-\d\d-\d\d"
        assert re.fullmatch(f"measured forward 2.00× as fast by kernels as by XLA, {row}", told.reason)
    assert {(row.norm.residual, row.norm.activation) for row in found.rows} == {(None, "relu"), ("float32", "relu")}
    lines = str(found).splitlines()
    assert lines[0] == "NVIDIA H100: kernels ahead in 2 of 2 batch norms, 2 measured now"
    assert re.search(
        r"16×3×8 float32, residual, relu +1.0 : 2.0 +kernels, 2.00× +1.0 : 3.0 +kernels, 3.00×", str(found)
    )
    shown = capsys.readouterr().err
    assert "jbn.autotune: 2 of 2 timed: 16×3×8 float32" in shown and "kernels, 2.00×; backward" in shown


def found(f, *args):
    """The batch norms in a program, and whether gradients are taken."""
    return autotune.batch_norms(f, args)


def stacked(n=2):
    return np.stack([X] * n)


def in_scan(x):
    return jax.lax.scan(lambda c, x: (c + loss(x), None), 0.0, jnp.stack([x, x]))[0]


def in_cond(x):
    return jax.lax.cond(x.sum() > 0, lambda x: loss(x, activation="silu"), lambda x: loss(x, activation="relu"), x)


NAMED = jax.checkpoint_policies.save_only_these_names("bn_input", "bn_stats")
BATCHED = PLAIN._replace(shape=(2, *X.shape), axis=3, batch=1)
PROGRAMS = {
    "a call": (train, X, {PLAIN: False}),
    "jit": (jax.jit(train), X, {PLAIN: False}),
    "a call that was lowered before": (jax.jit(jax.grad(loss)), X, {PLAIN: True}),
    "a shape in the place of x": (jax.grad(loss), jax.ShapeDtypeStruct(X.shape, X.dtype), {PLAIN: True}),
    "grad of grad": (jax.grad(lambda x: (jax.grad(loss)(x) ** 2).sum()), X, {PLAIN: True}),
    "scan": (jax.grad(in_scan), X, {PLAIN: True}),
    "cond": (in_cond, X, {PLAIN._replace(activation=a): False for a in ("silu", "relu")}),
    "remat": (jax.grad(jax.checkpoint(loss, policy=NAMED)), X, {PLAIN: True}),
    "vmap": (jax.vmap(jax.grad(loss)), stacked(), {BATCHED: True}),
    "virtual batches": (
        lambda x: train(x, virtual_batch_size=4), X, {BATCHED._replace(shape=(4, 4, 3, 8)): False},
    ),
    "a mask": (lambda x: train(x, mask=np.ones((16, 1, 1), bool)), X, {PLAIN._replace(mask=(16, 1, 1)): False}),
    "a mask of virtual batches": (
        lambda x: train(x, mask=np.ones((16, 3, 1), bool), virtual_batch_size=4), X,
        {BATCHED._replace(shape=(4, 4, 3, 8), mask=(4, 4, 3, 1)): False},
    ),
    "inference": (lambda x: jbn.bn_eval(PARAMS, STATE, x), X, {PLAIN._replace(training=False): False}),
    "dtypes": (
        lambda x: train(x.astype(jnp.bfloat16), residual=x.astype(jnp.float16), dtype=jnp.float32), X,
        {PLAIN._replace(dtype="bfloat16", residual="float16"): False},
    ),
    "channels first": (
        lambda x: jbn.bn_train(*jbn.bn_init(3), x, axis=1)[0], X, {PLAIN._replace(axis=1): False},
    ),
    "not None's": (lambda x: train(x, implementation="xla") + train(x, activation="relu"), X,
                   {PLAIN._replace(activation="relu"): False}),
    "no batch norm": (lambda x: jbn.moments(x), X, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_what_is_in_a_program(name, launched):
    f, x, wanted = PROGRAMS[name]
    if name == "a call that was lowered before":
        f.lower(x)
    assert found(f, x) == wanted
    assert launched == [], "nothing is chosen meanwhile"


NORMS = {norm: gradient for _, _, found in PROGRAMS.values() for norm, gradient in found.items()}


@pytest.mark.parametrize("norm", NORMS, ids=map(str, range(len(NORMS))))
def test_what_is_measured_is_the_batch_norm_itself(norm, launched):
    given = jax.eval_shape(functools.partial(measuring.drawn, norm), jax.ShapeDtypeStruct((), np.uint32))
    assert found(measuring.layer(norm, None), given) == {norm: False}

    def both(given):
        return measuring.pulled((measuring.linearized(norm, None)(given), given[-1]))

    assert found(both, given) == {norm: True}


@pytest.mark.parametrize("way", ["explicit", "automatic", "shard_map", "manual in part"])
def test_what_a_device_has(way, devices, launched):
    """Of each batch norm the part, however arrays are split; nothing where XLA alone can split them."""
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2, devices=devices)
    x = jax.device_put(X, NamedSharding(mesh, P(("a", "b"))))
    f = jax.grad(functools.partial(loss, activation="relu"))
    if way == "shard_map":
        f = jax.shard_map(f, mesh=mesh, in_specs=P(("a", "b")), out_specs=P(("a", "b")))
    if way == "manual in part":
        f = jax.shard_map(f, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
    with jax.set_mesh(mesh):
        seen = found(jax.jit(f), x)
    assert seen == ({} if way == "manual in part" else {PLAIN._replace(shape=(2, 3, 8), activation="relu"): True})


def test_over_an_automatic_mesh(devices, launched, tuned):
    """From finding to choosing, by the parts that the compiler makes; twice, as old rules must not answer."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(AxisType.Auto,), devices=devices)
    x = jax.device_put(X, NamedSharding(mesh, P("d")))
    step = jax.jit(jax.grad(loss))
    with jax.set_mesh(mesh):
        want = step(x)
        for _ in range(2):
            rows = tuned(step, x, ignore_cache=True).rows
            assert [(row.norm, row.failed) for row in rows] == [(PLAIN._replace(shape=(2, 3, 8)), None)]
        launched.clear()
        np.testing.assert_allclose(step(x), want, rtol=1e-5, atol=1e-6)
    assert {name for name, shape in launched if shape == (2, 3, 8)} == {
        "moments", "apply", "gradient_sums", "gradient_input"
    }  # fmt: skip


def test_a_function_of_nnx(launched, tuned):
    model = jbn.nnx.BatchNorm(8, rngs=nnx.Rngs(0))

    @nnx.jit
    def step(model, x):
        return nnx.grad(lambda model, x: (model(x) ** 2).sum())(model, x)

    assert [row.norm for row in tuned(step, model, X).rows] == [PLAIN]


def test_what_is_known_is_not_measured_again(launched, tuned, monkeypatch):
    assert tuned(train, X).measured == 1
    assert tuned(train, X).measured == 0
    assert tuned(train, X, ignore_cache=True).measured == 1
    step = jax.grad(loss)
    assert tuned(step, X).measured == 1, "the backward pass was not"
    assert tuned(step, X).rows == tuned(train, X).rows


def wrong(error):
    """Kernels with an error in one value."""

    def kernels(name, platform):
        def piece(plan, x, *operands):
            first, *rest = getattr(xla, name)(plan, x, *operands)
            if name == "gradient_input":
                first = first.at[(-1,) * first.ndim].multiply(1 + error)
            return first, *rest

        return piece

    return kernels


def test_kernels_that_disagree(launched, tuned, monkeypatch):
    """In one value of the last row; not where that is rounding."""
    monkeypatch.setattr(dispatch, "kernels", wrong(0.01))
    (row,) = tuned(jax.grad(loss), X).rows
    assert re.fullmatch(r"kernels and XLA differ in the gradient of x by \S+, and \S+ is rounding", row.failed)
    assert row.forward is None and not row.won(False) and not row.won(True)
    assert row.failed in str(tuned(jax.grad(loss), X)), "and what failed is tried again"
    monkeypatch.setattr(dispatch, "kernels", wrong(1e-6))
    found = tuned(jax.grad(loss), X)
    assert found.measured == 1 and found.rows[0].failed is None


def test_kernels_that_fail(launched, tuned, monkeypatch):
    def kernels(name, platform):
        raise ValueError("PassManager::run failed\nand more")

    monkeypatch.setattr(dispatch, "kernels", kernels)
    found = tuned(train, X)
    assert found.rows[0].failed == "ValueError: PassManager::run failed"
    assert "kernels ahead in 0 of 1 batch norms" in str(found) and "PassManager::run failed" in str(found)
    with jax.enable_x64(True):
        found = tuned(train, X.astype(np.float64))
    assert found.rows[0].failed == "dtype float64 is not among the kernels' (float16, bfloat16, float32)"


def test_what_is_interrupted_loses_nothing(launched, tuned, monkeypatch):
    done = []

    def timed(prepared, inputs):
        if done:
            raise KeyboardInterrupt
        done.append(prepared.norm)
        return FASTER["forward"], None

    monkeypatch.setattr(measuring, "timed", timed)
    f = lambda x: train(x) + train(x, activation="relu")  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        tuned(f, X)
    monkeypatch.setattr(measuring, "timed", lambda *_: (FASTER["forward"], None))
    assert tuned(f, X).measured == 1


def test_a_failure_while_timing(launched, tuned, monkeypatch):
    def timed(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 7 GB")

    monkeypatch.setattr(measuring, "timed", timed)
    assert tuned(train, X).rows[0].failed == "JaxRuntimeError: RESOURCE_EXHAUSTED: 7 GB"


def test_times_are_medians_of_a_layer(monkeypatch):
    """By a clock that a program moves: all take turns, the first call of each does not count."""
    now, order = [0.0], []

    def program(name, microseconds):
        def run(inputs):
            order.append(name)
            now[0] += 1e-6 * microseconds * (100 if len(order) % 5 == 0 else 1)

        return run

    monkeypatch.setattr(measuring, "clock", lambda: now[0])
    run = {
        ("triton", "forward"): program("tf", 200), ("xla", "forward"): program("xf", 400),
        ("triton", "backward"): program("tb", 600), ("xla", "backward"): program("xb", 1000),
    }  # fmt: skip
    monkeypatch.setattr(measuring, "SECONDS", 0.001)
    linearize = dict.fromkeys(measuring.IMPLEMENTATIONS, lambda _: None)
    prepared = measuring.Prepared(PLAIN, 2, lambda seed: None, run, linearize, {})
    assert measuring._calls(lambda _: now.__setitem__(0, now[0] + 1e-4), []) == 10
    assert measuring._calls(lambda _: now.__setitem__(0, now[0] + 1e-2), []) == 3
    monkeypatch.setattr(measuring, "_calls", lambda run, inputs: 1)
    assert measuring.timed(prepared, []) == (Times(100, 200), Times(300, 500))
    assert order[:4] == ["tf", "xf", "tb", "xb"] and len(order) == 4 * measuring.ROUNDS


@pytest.mark.parametrize("shape, axis", [((64, 5, 6), 2), ((63, 6, 5), 1), ((4, 16, 3, 6), 3)])
def test_no_number_is_where_an_activation_bends(shape, axis):
    """Nor is a sum near 0, so that two implementations differ by rounding alone."""
    norm = Norm(shape, axis, len(shape) - 3, "float32", "float32", None, "float32", None, True)
    (scale, bias), _, x, residual, _, dy = jax.device_get(measuring.drawn(norm, 3))
    rows = tuple(a for a in range(norm.batch, len(shape)) if a != axis)
    beside = [-1 if a == axis else 1 for a in range(len(shape))]
    xhat = (x - x.mean(rows, keepdims=True)) / x.std(rows, keepdims=True)
    z = scale.reshape(beside) * xhat + bias.reshape(beside)
    for value in (z, z + residual):
        for bend in (-3, 0, 3, 6):
            assert np.abs(value - bend).min() > 0.05
        assert 0.3 < (value > 0).mean() < 0.7
    for total, terms in ((dy.sum(rows), dy), ((dy * xhat).sum(rows), dy * xhat)):
        assert (np.abs(total) > 0.1 * np.abs(terms).sum(rows)).all()


def test_bad_arguments(launched, tuned, tmp_path):
    with pytest.raises(TypeError, match="f is a ndarray, expected a function: give the training step, then its"):
        tuned(X)
    with pytest.raises(TypeError, match="path is 3, expected None or a folder: give its name"):
        tuned(train, X, path=3)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ValueError, match=r"path is '.*file/below', where no file can be written \(Not a dir"):
        tuned(train, X, path=file / "below")
    with pytest.raises(ValueError, match="f has no batch norm that implementation=None decides on, expected at least"):
        tuned(lambda x: train(x, implementation="xla"), X)


def test_without_a_gpu():
    with pytest.raises(RuntimeError, match="autotune needs a GPU, and JAX's default here is cpu: call it where f is"):
        jbn.autotune(train, X)


PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import jbn
from jbn._functions import autotune_measure as measuring
from jbn._op.tables import Row, Times

autotune = sys.modules["jbn._functions.autotune"]
autotune.default_platform = lambda: "cuda"

def measure(norms, progress):
    assert jax.process_index() == 0
    return [Row(norm, Times(1, 2), None, None, "2026-01-02", "") for norm in norms]

autotune.measure = measure
def f(x):
    return jbn.bn_train(*jbn.bn_init(8), x)[0]

class Lowered:  # for CUDA, which is not here
    def __call__(self, x):
        return f(x)

    def lower(self, x):
        return jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))

x = np.ones((4, 8), np.float32)
def tell():
    print(jbn.explain(x, platform="cuda").reason)

tell()
print(jbn.autotune(Lowered(), x).measured)
tell()
try:
    jbn.autotune(Lowered(), x, path=sys.argv[3])
except RuntimeError as error:
    print(error)
"""


def test_two_processes_go_by_what_the_first_measured(tmp_path):
    """Each has a cache folder of its own, and what is in the second's does not count."""
    folders = [tmp_path / name / "jbn" for name in ("first", "second")]
    file = tmp_path / "file"
    file.touch()
    norm = Norm((4, 8), 1, 0, "float32", "float32", None, None, None, True)
    row = autotune.Row(norm, Times(1, 9), None, None, "2025-01-01", "")
    folders[1].mkdir(parents=True)
    tables.write(folders[1] / "nvidia-h100.json", "NVIDIA H100", [row])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index), str(file / "below")],
            cwd=ROOT,
            env=os.environ | {"XDG_CACHE_HOME": str(folder.parent), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index, folder in enumerate(folders)
    ]
    try:
        printed = [process.communicate(timeout=120)[0].splitlines() for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0]
    told = [[line for line in lines if "Gloo" not in line] for lines in printed]
    nothing = "no measurement shows the kernels ahead for float32, channels last, 0.000128 MB on NVIDIA H100"
    assert told[0][0] == nothing
    assert told[1][0].startswith(f"{nothing}: the row in {folders[1]}/nvidia-h100.json is left out, as the 2 processes")
    agreed = "measured forward 2.00× as fast by kernels as by XLA, row 4×8 float32 of "
    for _, measured, reason, error in told:
        assert (measured, reason) == ("1", f"{agreed}{folders[0]}/nvidia-h100.json, 2026-01-02")
        assert re.match("autotune failed in the first process: ValueError: path is '.*below', where no file", error)
