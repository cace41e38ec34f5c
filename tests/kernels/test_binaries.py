"""What the kernels compile to, for GPUs that need not be here: spills, accesses, registers; and how they lower.

That is the same wherever a release of Triton compiles the same source. What `python -m experiments binaries` found is
committed with names that say both, and is looked at here; a sixteenth is compiled again, and all that has no record.
"""

import base64
import re
import zlib
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import jax
import jax.numpy as jnp
import kept

from experiments.benchmarks import binaries
from experiments.benchmarks.binaries import DTYPES, REGISTERS, VECTORS, VIEWS, representative, widths
from experiments.benchmarks.in_flight import FLIGHT, PROCESSORS, holds, in_flight
from experiments.framework.lines import read
from experiments.framework.record import Options, Results
from experiments.material import models
from jbn.kernels import launches
from jbn.kernels.binaries import TARGETS, Binary, compile_launch, name_of
from jbn.kernels.launches import ITEMSIZE, Problem
from jbn.kernels.tiling import Tiling, View
from jbn.linen import BatchNorm

RESULTS = Path(__file__).parents[2] / "experiments/results/cpu"
RECORDED = {row["binary"]: row for path in RESULTS.rglob("binaries.json") for row in Results.read(path).rows}
AGAIN = "0"  # names that begin so, of 16 digits: of other launches, once kernels change


@pytest.fixture(autouse=True)
def recorded_binaries(monkeypatch):
    """What has no record is compiled once, for every test that looks at it."""

    def binary(launch, arrays, target):
        name = name_of(launch, arrays, target)
        row = RECORDED.get(name)
        if row and not name.startswith(AGAIN):
            return read_back(row, launch)
        found = kept.always(("binary", name), lambda: compile_launch(launch, arrays, target))
        assert row is None or found == read_back(row, launch), "`python -m experiments binaries` makes the record"
        return found

    monkeypatch.setattr(binaries, "compile_launch", binary)


def read_back(row, launch):
    loads, stores = (accesses(row[column]) for column in ("loads_bytes", "stores_bytes"))
    return Binary(
        launch.kernel.__name__, row["target"], row["registers"], row["spilled"], row["shared_bytes"], loads, stores
    )


def accesses(shown: str) -> tuple[int, ...]:
    """What `widths` shows."""
    pairs = (map(int, pair.split("×")) for pair in shown.split())
    return tuple(sorted(width for width, count in pairs for _ in range(count)))


def check(layout, dtype, name, launch, binary):
    where = (layout, dtype, name, binary)
    assert binary.spilled == 0, where
    if layout != "unaligned":
        # per tile, x's loads and the output's stores; a mask's byte goes with two bytes of x
        narrow = 8 if "mask" in name else 16
        elements = launch.tiling.ROWS * launch.tiling.CHANNELS
        accesses = elements * np.dtype(jnp.dtype(dtype)).itemsize // (launch.tiling.warps * 32 * 16)
        assert sum(width == 16 for width in binary.loads) >= accesses, where
        # of elements two or one byte wide there are only a mask's of rows
        assert "mask of rows" in name or min(binary.loads) >= min(4, narrow), where
        if name.startswith(("apply", "input")):
            assert set(binary.stores) == {16}, where
    if binary.target.startswith("sm_"):
        threads = 32 * launch.tiling.warps
        # allotted in steps of 8 a thread; what the tile choice counts on
        allotted = -(-binary.registers // 8) * 8
        assert allotted * threads * launch.resident <= REGISTERS, where
    if binary.target == "sm_90" and layout in ("last", "first") and "mask" not in name:
        # an H100's memory is not what is waited for: its copy moves at most 3.0 TB/s
        assert in_flight(launch, binary, VIEWS[layout], ITEMSIZE[dtype]).ceiling >= 4.3e12, where


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", VIEWS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_binary(target, layout, dtype):
    for row in binaries.compiled((target,), (layout,), (dtype,)):
        check(*row[:-1])


@pytest.mark.parametrize("target", TARGETS)
def test_the_longest_activations(target):
    for layout, name, activation in (
        ("last", "sums, residual, gelu", "gelu"),
        ("unaligned", "input, mask, residual, gelu_exact", "gelu_exact"),
    ):
        launch, arrays = representative(VIEWS[layout], "float32", activation)[name]
        check(layout, "float32", name, launch, binaries.compile_launch(launch, arrays, target))


FEW = View(1, 32 * 7 * 7, 2048, 1)  # one program for a block of channels


@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_long_activations_without_a_residual(target):
    """Each had spilled for sm_100, or had half as much in flight."""
    for layout, view, dtype, activation, kind in (
        ("last", VIEWS["last"], "float32", "tanh", "sums"),
        ("few", FEW, "bfloat16", "gelu", "sums"),
        ("first", VIEWS["first"], "bfloat16", "mish", "sums"),
        ("first", VIEWS["first"], "bfloat16", "mish", "input"),
    ):
        problem = Problem(view, dtype, view.rows, activation=activation)
        if kind == "sums":
            launch = launches.gradient_sums(problem, None, PROCESSORS, capability=int(target[3:]))
            arrays = dtype, *VECTORS, dtype, "bool", dtype
        else:
            launch = launches.gradient_input(problem, dtype, None, PROCESSORS)
            arrays = dtype, *VECTORS, "float32", dtype, "bool", dtype, "float32", "float32"
        check(layout, dtype, kind, launch, binaries.compile_launch(launch, arrays, target))


def test_a_wider_residual_fits():
    """z̄ in float32 beside 16 bits: by whole tiles a multiprocessor would hold half of the programs counted on."""
    problem = Problem(VIEWS["last"], "bfloat16", VIEWS["last"].rows, residual=True, activation="relu")
    launch = launches.gradient_sums(problem, "float32", PROCESSORS, capability=90)
    arrays = "bfloat16", *VECTORS, "float32", "bool", "bfloat16"
    check("last", "bfloat16", "sums", launch, binaries.compile_launch(launch, arrays, "sm_90"))


@pytest.mark.parametrize("view", [View(1, 2**22, 1024, 1), View(1, 2**10, 1024, 2**12)], ids=["last", "first"])
def test_beyond_32_bits(view):
    """x of 2³² elements: offsets have 64 bits, and what is checked above holds."""
    for name, (launch, arrays) in representative(view, "bfloat16", target="sm_90").items():
        if name in ("moments", "apply", "sums, relu", "sums, residual, relu", "input, relu"):
            assert launch.constants["WIDE"]
            check("wide", "bfloat16", name, launch, binaries.compile_launch(launch, arrays, "sm_90"))


def test_bytes_in_flight_follow_from_tile_and_residents():
    """moments of 4 KiB tiles, four at once, in 528 programs: four a multiprocessor, fewer if memory ends."""
    launch, _ = representative(VIEWS["last"], "bfloat16", target="sm_90")["moments"]
    assert launch.tiling == (64, 32, 66, 4) and launch.constants["UNROLL"] == 4 and launch.programs == 4 * 132

    def modelled(registers, shared):
        return in_flight(launch, Binary("", "sm_90", registers, 0, shared, (), ()), VIEWS["last"], 2)

    assert modelled(96, 0) == (4, 4 * 4 * 4096, pytest.approx(4 * 4 * 4096 * 132 / 800e-9))
    assert modelled(96, 100 * 1024).resident == 2
    assert modelled(255, 0).resident == 2
    # a residual is read as x is, and y written
    stream, _ = representative(VIEWS["last"], "float32")["apply, residual, silu"]
    found = in_flight(stream, Binary("", "sm_90", 48, 0, 0, (), ()), VIEWS["last"], 4)
    assert found == (10, 10 * 2 * 4096, pytest.approx(10 * 2 * 4096 * 132 / 800e-9 * 3 / 2))


def test_programs_that_fit_are_those_that_a_driver_counts():
    """As the driver of an H100 did for each launch that was measured there."""
    launch, _ = representative(VIEWS["last"], "bfloat16")["moments"]
    found = {(run["registers"], run["tiling"][3], run["resident"]) for run in read([FLIGHT]) if run["kind"] == "run"}
    assert len(found) > 20
    for registers, warps, resident in found:
        binary = Binary("", "sm_90", registers, 0, 0, (), ())
        assert holds(launch._replace(tiling=Tiling(64, 32, 1, warps)), binary) == resident


def test_the_command_shows_every_binary(tmp_path):
    results = Results("binaries")
    binaries.run(Options(quick=True), results)
    assert results.summary == {
        "binaries": 14,
        "spilling": 0,
        "registers_most": max(r["registers"] for r in results.rows),
    }
    assert binaries.table(results).row_count == 14
    assert [row["launch"] for row in results.rows if row["of_a_copy"]] == list(binaries.MEASURED)
    assert all(row["ceiling_tbs"] > 0 and row["in_flight_bytes"] > 0 for row in results.rows)
    assert widths((16, 4, 16)) == "16×2 4×1" and accesses("16×2 4×1") == (4, 16, 16)
    assert accesses(widths(())) == ()
    results.save(tmp_path, binaries.figure)


def test_names_tell_binaries_apart():
    known = representative(VIEWS["last"], "bfloat16")
    launch, arrays = known["moments"]
    numbers = {"numbers": (2**31, *launch.numbers[1:])}
    changes = {}, numbers, {"constants": launch.constants | {"UNROLL": 3}}, {"kernel": known["apply"][0].kernel}
    names = {name_of(launch._replace(**change), arrays, "sm_90") for change in changes}
    names |= {name_of(launch, arrays, "sm_80"), name_of(launch, ("float32", "bool"), "sm_90")}
    assert len(names) == 6
    assert name_of(launch._replace(numbers=(launch.numbers[0] + 1, *launch.numbers[1:])), arrays, "sm_90") in names


def lowered(function, *arguments) -> tuple[str, list[str]]:
    """Text for platform cuda, and the names of the kernels that it calls, in order."""
    text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r'@triton_kernel_call\(.*?backend_config = "(.*?)", ', text)
    return text, [_kernel(call) for call in calls]


def _kernel(config: str) -> str:
    plain = re.sub(r"\\([0-9A-Fa-f]{2})", lambda m: chr(int(m.group(1), 16)), config.replace("\\\\", "\\5C"))
    try:
        packed = plain.encode("latin-1")
        content = zlib.decompress(packed)
    except zlib.error:
        content = zlib.decompress(base64.b64decode(plain))
    return re.search(rb"jbn_\w+?(?=\W)", content).group().decode()


@pytest.mark.parametrize("shape, channel", [((4, 8, 8, 64), 3), ((4, 64, 8, 8), 1)])
def test_lowering(shape, channel):
    """Two launches forward, two backward, one for inference; x itself goes in, reshaped outputs come out."""
    pytest.importorskip("jbn._op.jax_triton", reason="jax-triton is not installed", exc_type=ImportError)
    from jbn._op import triton
    from jbn._op.plan import Coefficients, Plan
    from jbn._op.sync import Sync

    runner = triton.Runner("cuda")
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    vector = jax.ShapeDtypeStruct((64,), jnp.float32)
    epsilon = jax.ShapeDtypeStruct((1,), jnp.float32)
    mask = jax.ShapeDtypeStruct((4, 1, 1, 1), jnp.bool)
    plan = Plan(
        channel, 0, 256, True, "relu", jnp.dtype("bfloat16"), Sync(), may_partition=False, implementation="triton"
    )

    def train(x, mask, epsilon, scale, bias, residual, dy):
        _, mean, var = triton.moments(plan, x, mask, runner=runner)
        coef = Coefficients(mean, var, None, epsilon, scale, bias)
        (y,) = triton.apply(plan, x, coef, residual, runner=runner)
        *sums, dz = triton.gradient_sums_keeping(plan, x, coef, residual, mask, dy, runner=runner)
        straight = plan._replace(activation=None)
        (dx,) = triton.gradient_input(straight, x, coef, None, mask, dz, sums, runner=runner)
        return y, dx, dz

    def infer(x, mean, var, epsilon, scale, bias):
        coef = Coefficients(mean, var, None, epsilon, scale, bias)
        return triton.apply(plan, x, coef, None, runner=runner)

    text, kernels = lowered(train, x, mask, epsilon, vector, vector, x, x)
    assert kernels == ["jbn_moments", "jbn_apply", "jbn_gradient_sums", "jbn_gradient_input"]
    assert set(re.findall(r"stablehlo\.(\w+)", text)) == {"custom_call", "reshape"}
    text, kernels = lowered(infer, x, vector, vector, epsilon, vector, vector)
    assert kernels == ["jbn_apply"]
    assert set(re.findall(r"stablehlo\.(\w+)", text)) == {"custom_call", "reshape"}


def test_resnet_step(monkeypatch):
    """ResNet-50's step lowers to two launches forward and two backward a norm, on x as the convolutions left it."""
    pytest.importorskip("jbn._op.jax_triton", reason="jax-triton is not installed", exc_type=ImportError)
    from jax_triton import triton_lib

    def uncompiled(module, *_):  # what kernels compile to is looked at above
        (name,) = re.findall(r"tt\.func public @(\w+)", str(module))
        return triton_lib.CompilationResult("", name, shared_mem_bytes=0, ttgir=None, llir=None)

    monkeypatch.setattr(triton_lib, "compile_ttir_inplace", uncompiled)
    monkeypatch.setattr(triton_lib, "_COMPILED_KERNEL_CACHE", {})
    norm = partial(BatchNorm, use_running_average=False, dtype=jnp.bfloat16, implementation="triton")
    network = models.ResNet50(norm=norm, dtype=jnp.bfloat16, fused=True)
    images = jnp.zeros((32, 224, 224, 3), jnp.bfloat16)
    variables = jax.eval_shape(network.init, jax.random.key(0), images)

    def step(variables, images):
        def loss(params):
            logits, updates = network.apply({**variables, "params": params}, images, mutable=["batch_stats"])
            return (logits.astype(jnp.float32) ** 2).mean(), updates

        (value, updates), gradient = jax.value_and_grad(loss, has_aux=True)(variables["params"])
        return jax.tree.map(lambda p, g: p - g, variables["params"], gradient), updates, value

    text, kernels = lowered(step, variables, images)
    names = ("jbn_moments", "jbn_apply", "jbn_gradient_sums", "jbn_gradient_input")
    assert Counter(kernels) == dict.fromkeys(names, 53)
    large = Counter(re.findall(r"stablehlo\.(\w+).*-> tensor<32x\d+x\d+x\d+x(bf16|f32)>", text))
    # nothing but reshapes stands between convolutions and kernels; a sum is of a block's two cotangents
    assert {kind for kind, dtype in large if dtype == "bf16"} <= {
        "convolution", "reshape", "add", "pad", "slice", "convert", "broadcast_in_dim",
    }  # fmt: skip
    # the mean over positions, in float32, and its cotangent
    assert {key: n for key, n in large.items() if key[1] == "f32" or key[0] == "convert"} == {
        ("convert", "f32"): 1,
        ("broadcast_in_dim", "f32"): 1,
        ("convert", "bf16"): 1,
    }
