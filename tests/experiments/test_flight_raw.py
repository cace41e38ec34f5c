"""Raw launches without a GPU: the driver is faked, kernels run in the interpreter, and every result is checked."""

import math

import numpy as np
import oracle
import pytest
from fake_cuda import FakeCuda

from experiments.benchmarks.gpu.flight import ahead, pieces, plan, raw, summary
from experiments.benchmarks.gpu.flight.driver import CudaError, Driver, Nothing
from experiments.benchmarks.gpu.flight.memory import HostMemory, TorchMemory
from experiments.benchmarks.gpu.flight.operands import Operands
from experiments.benchmarks.gpu.flight.pieces import NAMED, Case, Tried
from experiments.framework.lines import Lines, read
from jbn.kernels.tiling import Tiling

SHAPE = (3, 10, 10, 32)
SPLIT = Tried(Tiling(64, 32, 3, 4))
CASES = [Case(*name, SHAPE, "bfloat16") for name in NAMED]
CASES += [Case(*name, SHAPE, "float32", SPLIT) for name in NAMED if name[0] != "copy"]


@pytest.fixture
def launcher(tmp_path):
    """A launcher of CASES whose kernels run in the interpreter, the runs, and what it writes."""
    runs = [plan.described(case) for case in CASES]
    launches = {}
    for run, case in zip(runs, CASES, strict=True):
        launch = pieces.launch_of(case)
        launches[run["binary"]] = launch, pieces.arrays_of(case)
        about = {"symbol": launch.kernel.__name__, "warps": launch.tiling.warps, "shared": 0}
        about["parameters"] = len(run["reads"]) + len(run["numbers"]) + len(run["outputs"]) + 2
        ahead.write(tmp_path / f"{run['binary']}.json", about)
        (tmp_path / f"{run['binary']}.cubin").write_text(run["binary"], encoding="utf-8")
    cuda = FakeCuda(launches)
    driver = Driver(cuda)
    made = raw.Launcher(driver, HostMemory(driver), tmp_path, Lines(tmp_path / "found.jsonl"), 0)
    return made, runs, cuda, tmp_path / "found.jsonl"


def test_every_piece_is_launched_checked_and_timed(launcher):
    made, runs, cuda, path = launcher
    assert made.each(runs, 1e9, made.measure) == len(CASES)
    found = list(read([path]))
    assert [line["kind"] for line in found] == ["run"] * len(CASES)
    assert [line["kernel"] for line in found if not line["ok"]] == []
    names = {name for line in found for name in line["errors"]}
    assert names == {name for piece in pieces.PIECES for name in piece.writes.values()}
    assert all(line["us"] > 0 for line in found)
    assert {(line["resident"], line["registers"], line["spilled"]) for line in found} == {(2, 64, 0)}
    assert {line["chosen"] for line in found} == {True, False}
    assert all("same_us" in line for line in found if line["chosen"])
    assert cuda.replayed == 6 * (len(CASES) + len(NAMED))
    assert "WRONG" not in summary.summarise([path])


@pytest.mark.parametrize("fault", ["another kernel", "nothing is launched", "a number"])
def test_a_wrong_result_is_told(launcher, fault):
    made, runs, cuda, path = launcher
    kernel, result = ("input", "dx") if fault == "a number" else ("apply", "y")
    [run] = [r for r in runs if (r["kernel"], r["fused"], r["dtype"]) == (kernel, "relu", "bfloat16")]
    if fault == "another kernel":
        [other] = [r for r in runs if (r["kernel"], r["fused"], r["dtype"]) == ("apply", "alone", "bfloat16")]
        (path.parent / f"{run['binary']}.cubin").write_text(other["binary"], encoding="utf-8")
    elif fault == "nothing is launched":
        cuda.cuLaunchKernel = lambda *_: cuda.queue(lambda: None)
    else:
        run["numbers"][0][1] *= 2  # the count
    made.each([run], 1e9, made.measure)
    [line] = read([path])
    assert not line["ok"]
    assert math.isnan(line["errors"][result]) == (fault == "nothing is launched")


def test_bits_that_change_are_told(launcher):
    made, runs, cuda, path = launcher
    [run] = [r for r in runs if (r["kernel"], r["dtype"]) == ("moments", "bfloat16")]
    made.each([run], 1e9, lambda run: made.repeat(run, 3, lambda _: None))

    def disturb(i):
        if i == 1:  # of x, which is the first array there
            next(iter(cuda.memory.values()))[1] ^= 1

    made.each([run], 1e9, lambda run: made.repeat(run, 3, disturb))
    assert [line["differing"] for line in read([path])] == [0, 2]


def test_a_lost_context_ends_the_run_and_any_other_error_does_not(launcher):
    made, runs, cuda, path = launcher
    cuda.refuses["cuLaunchKernel"] = 1
    assert made.each(runs[:2], 1e9, made.measure) == 2
    with pytest.raises(CudaError, match="CUDA error 1 "):
        made.each(runs * 2, 1e9, made.check)  # as many in a row are no run's own fault
    assert len(list(read([path]))) == 2 + raw.FAILURES
    cuda.refuses["cuLaunchKernel"] = 700
    with pytest.raises(CudaError, match="CUDA error 700 of cuLaunchKernel"):
        made.each(runs[:2], 1e9, made.measure)
    errors = [line["error"] for line in read([path])]
    assert errors[-2:] == [f"CudaError: CUDA error {code} of cuLaunchKernel" for code in (1, 700)]


def test_a_binary_of_other_parameters_is_refused():
    driver = Driver(Nothing())
    program = driver.load(b"", "symbol", 8, 0, 9)
    with pytest.raises(ValueError, match="5 parameters for a binary that takes 9"):
        driver.launcher(program, 1, [None] * 5)


def test_memory_goes_when_its_operands_go():
    cuda = FakeCuda({})
    operands = Operands(HostMemory(Driver(cuda)), (4, 8), "float32", 1000)
    operands.operand("x", "alone", operands.sets - 1)
    operands.operand("total", "relu", 0)
    assert operands.sets == 8 and len(cuda.memory) == 8
    del operands
    assert not cuda.memory


def test_references_are_the_oracle_s():
    """Of what is normalised, added, cut and summed: NumPy float64, by the same operands."""
    memory = HostMemory(Driver(FakeCuda({})))
    operands = Operands(memory, (6, 5, 8), "float32", 0)
    x, dy, residual = (memory.wide(operands.operand(name, "add + relu", 0)) for name in ("x", "dy", "residual"))
    scale, bias = (memory.wide(operands.operand(name, "add + relu", 0)) for name in ("scale", "bias"))
    options = dict(axis=-1, epsilon=1e-5, residual=residual, activation="relu")
    state = np.zeros(8), np.ones(8)
    want = oracle.bn_train_grads(dy, x, scale, bias, *state, **options)
    exact = {name: operands.exact(name, "add + relu") for name in ("total", "product", "dz", "dx", "y")}
    np.testing.assert_allclose(exact["y"], oracle.bn_train(x, scale, bias, *state, **options).y, atol=1e-6)
    for name, other in (("total", "bias"), ("product", "scale"), ("dz", "residual"), ("dx", "x")):
        np.testing.assert_allclose(exact[name], want[other], atol=2e-6)


def test_pytorch_s_memory_and_its_batch_norm(launcher, tmp_path):
    """The same launches on tensors, and the steps that kernels are timed beside."""
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.gpu.flight.baselines import Baselines, steps

    made, runs, cuda, path = launcher

    class Memory(TorchMemory):
        def address(self, array):
            cuda.memory[array.data_ptr()] = array.reshape(-1).view(torch.uint8).numpy()
            return super().address(array)

    made.memory = memory = Memory(made.driver, "cpu")
    wanted = [run for run in runs if run["kernel"] in ("moments", "sums", "input") and run["fused"] != "add + relu"]
    made.each(wanted, 1e9, made.measure)
    made.each(wanted[:1], 1e9, lambda run: made.repeat(run, 2, lambda _: None))
    *found, repeat = read([path])
    assert len(found) == len(wanted) and all(line["ok"] for line in found) and repeat["differing"] == 0

    operands = made.of(next(run for run in runs if run["dtype"] == "float32"))
    passes = steps(memory, operands, SHAPE)
    y, (dx, *_) = passes["forward"](0), passes["both"](0)
    for got, name in ((y, "y"), (dx, "dx")):
        assert operands.distance(got.movedim(1, -1), name, "alone") < 1e-5
    baselines = Baselines(Driver(Nothing()), memory, Lines(tmp_path / "baselines.jsonl"))
    for _ in range(2):
        baselines.once({"shape": [1, *SHAPE[1:]], "dtype": "float32"}, Operands(memory, (1, *SHAPE[1:]), "float32", 0))
    lines = list(read([tmp_path / "baselines.jsonl"]))
    assert [(line["baseline"], line["pass"]) for line in lines] == [
        (name, each) for name in ("torch", "torch cudnn") for each in ("forward", "both")
    ]
