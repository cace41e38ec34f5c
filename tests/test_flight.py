"""The runs on a GPU, without one: the driver is faked, shapes are tiny, and nothing is timed that counts."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import driver
import numpy as np
import pytest
from fake_cuda import FakeCuda

from experiments import models
from experiments.gpu.flight import ahead, fly, layers, pieces, plan, raw, side_by_side, steps, summary
from experiments.gpu.flight.__main__ import main
from experiments.gpu.flight.driver import CudaError, Driver, Nothing
from experiments.gpu.flight.lines import Lines, read
from experiments.gpu.flight.memory import HostMemory, TorchMemory
from experiments.gpu.flight.operands import Operands
from experiments.gpu.flight.parts import Part, Parts, python
from experiments.gpu.flight.pieces import NAMED, Case, Tried
from experiments.gpu.flight.prepare import prepare
from experiments.gpu.flight.stamp import is_prepared
from experiments.gpu.worker import Failed
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
        (tmp_path / f"{run['binary']}.cubin").write_text(run["binary"])
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
    assert summary.summarise([path.parent]).count(f"{len(NAMED)} right") == 0  # each way is a line of its own


@pytest.mark.parametrize("fault", ["another kernel", "nothing is launched", "a number"])
def test_a_wrong_result_is_told(launcher, fault):
    made, runs, cuda, path = launcher
    [run] = [r for r in runs if (r["kernel"], r["fused"], r["dtype"]) == ("apply", "relu", "bfloat16")]
    if fault == "another kernel":
        [other] = [r for r in runs if (r["kernel"], r["fused"], r["dtype"]) == ("apply", "alone", "bfloat16")]
        (path.parent / f"{run['binary']}.cubin").write_text(other["binary"])
    elif fault == "nothing is launched":
        cuda.cuLaunchKernel = lambda *_: cuda.queue(lambda: None)
    else:
        run["numbers"][0][1] *= 2  # the count
    made.each([run], 1e9, made.measure)
    [line] = read([path])
    assert not line["ok"]
    assert math.isnan(line["errors"]["y"]) == (fault == "nothing is launched")


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
    import oracle

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
    from experiments.gpu.flight.baselines import Baselines, steps

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


# ---- what is planned, and compiled ahead


def test_the_plan_begins_with_what_the_library_chooses():
    planned = plan.everything()
    chosen = [case.how.tiling is None for case in planned]
    assert len(planned) == len(set(planned)) > 1000
    for dtype in plan.DTYPES:
        own = [
            is_own for is_own, case in zip(chosen, planned, strict=True) if case.dtype == dtype and len(case.shape) > 2
        ]
        assert {case.kernel for case in planned if case.dtype == dtype} == {piece.kernel for piece in pieces.PIECES}
        assert sum(own) == 24 * len(pieces.PIECES)
    first = planned[: 2 * len(plan.KNEE) + 24 * len(pieces.PIECES)]
    assert all(case.how.tiling is None and case.dtype == "bfloat16" for case in first)


def test_names_tell_binaries_apart():
    one, other = Case("moments", "alone", SHAPE, "bfloat16"), Case("moments", "alone", SHAPE, "bfloat16", SPLIT)
    named = [ahead.name_of(pieces.launch_of(case), pieces.arrays_of(case)) for case in (one, other, one)]
    assert named[0] == named[2] != named[1]
    launch = pieces.launch_of(one)
    wider = launch._replace(numbers=(2**31, *launch.numbers[1:]))
    assert len({ahead.name_of(launch._replace(**change), pieces.arrays_of(one)) for change in (
        {}, {"constants": launch.constants | {"UNROLL": 3}}, {"numbers": wider.numbers},
        {"kernel": pieces.launch_of(Case("apply", "relu", SHAPE, "bfloat16")).kernel},
    )}) == 4  # fmt: skip


def test_prepare_compiles_two_tilings_once(tmp_path, capsys, monkeypatch):
    planned = [Case("apply", "relu", SHAPE, "bfloat16", Tried(Tiling(rows, 32, 3, 4))) for rows in (32, 64)]
    monkeypatch.setattr(plan, "everything", lambda: planned)
    for _ in range(2):
        assert not is_prepared(tmp_path)
        right = prepare(tmp_path, fetch=False)
        told = capsys.readouterr().out
        assert right == is_prepared(tmp_path) == ("MISSING" not in told)  # whatever triton is here
        (tmp_path / "stamp").write_text("of other sources")
        assert "2 launches of 2 binaries" in told and "0 old ones deleted" in told
    assert "compiled" not in told
    runs = json.loads((tmp_path / "runs.json").read_text())
    for run in runs:
        about = json.loads((tmp_path / "binaries" / f"{run['binary']}.json").read_text())
        assert about["symbol"] == "jbn_apply" and about["warps"] == 4
        assert 0 <= about["parameters"] - len(run["reads"] + run["numbers"] + run["outputs"]) <= 2
        assert (tmp_path / "binaries" / f"{run['binary']}.cubin").read_bytes()[:4] == b"\x7fELF"
    del planned[1]
    prepare(tmp_path, fetch=False)
    assert "1 old ones deleted" in capsys.readouterr().out
    assert len(list((tmp_path / "binaries").iterdir())) == 2


def test_what_does_not_compile_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead.concurrent.futures, "ProcessPoolExecutor", lambda n, _: ThreadPoolExecutor(n))
    case = Case("apply", "relu", SHAPE, "bfloat16", Tried(Tiling(33, 32, 3, 4)))  # no power of two
    left, errors = ahead.build(tmp_path, {"name": case}, 1, 60)
    assert left == {"name": case} and "power of 2" in errors[0], errors


# ---- through JAX


def test_layers_agree(monkeypatch):
    """Kernels' too, on the CPU that passes for a GPU."""
    prints, task = [], side_by_side.TINY[1]
    monkeypatch.setattr(layers, "links", lambda _: 2)
    for name in ("flax.linen", "jbn xla", "jbn triton"):
        with driver.gpu() if name == "jbn triton" else contextlib.nullcontext():
            answer = layers.run(name, task, layers.compiled(name, task), 1, 1e-9)
        assert answer["failed"] == {} and set(answer["passes"]) == {"forward", "backward", "both"}
        assert all(times["us"] > 0 for times in answer["passes"].values())
        prints.append(answer["fingerprint"])
    assert len(prints[0]) == 5
    np.testing.assert_allclose(prints[1:], [prints[0]] * 2, rtol=1e-3)


def test_a_layer_that_fails_is_told_and_the_next_one_runs():
    state = {}
    layers.begin("jbn triton", state, [list(side_by_side.TINY[0])])
    answer = layers.time("jbn triton", state, list(side_by_side.TINY[0]), 1, 1e-9)
    assert "triton" in answer["failed"]["all"] and answer["passes"] == {}
    assert "KeyError" in layers.time("jbn triton", state, list(side_by_side.TINY[1]), 1, 1e-9)["failed"]["all"]


def test_a_training_step_that_keeps_little(tmp_path, monkeypatch):
    path, lock = tmp_path / "found.jsonl", tmp_path / "lock"
    monkeypatch.setattr(sys, "argv", ["steps", str(path), str(lock), "jbn xla", "2", "--tiny", "--named"])
    monkeypatch.setattr(steps, "SECONDS", 1e-9)
    monkeypatch.setattr(models, "STAGES", models.STAGES)  # as it was, afterwards
    steps.main()
    [line] = read([path])
    assert line["kind"] == "step" and line["named"] and line["images"] > 0 and line["planned_bytes"] > 0
    assert math.isfinite(line["loss"])


class Answers:
    """A worker that is told to begin, then answers with what it has."""

    def __init__(self, answer):
        self.found = answer

    def ask(self, **request): ...

    def answer(self, _timeout):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def stop(self): ...


def test_candidates_are_compared_with_flax(tmp_path, capsys):
    path, device = tmp_path / "found.jsonl", None
    device = side_by_side.Device(Lines(path), (), None)
    times = {"both": {"us": 2.0, "us_low": 1.0, "us_high": 3.0, "host_us": 1.0}}
    answers = {"flax.linen": [1.0], "jbn xla": [1.0 + 1e-6], "torch": [2.0]}
    device.workers = {n: Answers({"passes": times, "fingerprint": f, "failed": {}}) for n, f in answers.items()}
    device.workers["jbn triton"] = Answers(Failed("no answer within 40 s"))
    device.layer(side_by_side.TINY[0], lambda: 1.0)
    found = list(read([path]))
    assert [(line.get("candidate"), line.get("same")) for line in found if line["kind"] == "layer"] == [
        ("flax.linen", True), ("jbn xla", True), ("torch", False),
    ]  # fmt: skip
    assert [line["error"] for line in found if line["kind"] == "error"] == ["no answer within 40 s"]
    assert set(device.workers) == set(answers)  # who failed has no further turn
    shown = summary.summarise([path])
    assert "DIFFERS: torch" in shown and "1 times: jbn triton no answer within 40 s" in shown


def test_the_marks_shapes_come_first():
    found = side_by_side.tasks()
    assert [(task.shape[0], task.fused) for task in found[::12]][:4] == [
        (256, "relu"), (256, "add + relu"), (128, "relu"), (128, "add + relu"),
    ]  # fmt: skip
    assert found[0].size == max(task.size for task in found) and len(found) == len(set(found))


# ---- the runs


def test_the_command(tmp_path):
    """As it is typed, from anywhere."""
    command = Path(__file__).parent.parent / ".ci/flight"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([command, "summary", tmp_path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "no lines were found: a run on a GPU writes them (experiments/README.md)\n", done.stderr
    done = subprocess.run([command, "4"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: '4'" in done.stderr


def test_parts_are_cut_at_their_limits_and_lose_nothing(tmp_path):
    lines = Lines(tmp_path / "found.jsonl")
    parts = Parts(tmp_path, lines, 60)
    child = "import subprocess; child = subprocess.Popen(['sleep', '1000']); print(child.pid, flush=True); child.wait()"
    well = parts.run(
        Part("slow", python("-c", child), 1), Part("quick", python("-c", "print(3)"), 50), Part("bad", ["false"], 50)
    )
    assert not well
    ended = {line["part"]: line["ended"] for line in read([tmp_path / "found.jsonl"])}
    assert ended == {"slow": "cut", "quick": "status 0", "bad": "status 1"}
    pid = (tmp_path / "slow.log").read_text().split()[-1]  # of the child, which has gone too
    stat = Path(f"/proc/{pid}/stat")
    assert not stat.exists() or stat.read_text().split()[2] == "Z"
    parts.deadline = time.monotonic()
    assert not parts.run(Part("late", ["true"], 50))
    assert list(read([tmp_path / "found.jsonl"]))[-1]["ended"] == "never begun"


@pytest.mark.parametrize("which", [1, 2, 3])
def test_each_run_fits_its_time_and_what_comes_back(which, tmp_path, monkeypatch):
    """Parts that begin when those before them took all they may have their time still, at least half a minute."""
    seen = []

    def run(self, *asked):
        seen.append(max(min(part.seconds, 1e9) for part in asked))
        assert sum(seen) - seen[-1] < fly.LIMIT - 10
        return True

    monkeypatch.setattr(Parts, "run", run)
    monkeypatch.setattr(fly, "environment", lambda: {"card": "a", "cores": 1, "packages": {}})
    monkeypatch.setattr(fly, "is_prepared", lambda _: False)
    assert fly.fly(which, tmp_path)
    assert len(seen) >= 2 and fly.LIMIT <= 170


def test_programs_that_come_back_are_not_too_many(tmp_path, monkeypatch):
    folder = tmp_path / "dump" / "jbn-xla"
    folder.mkdir(parents=True)
    for i in range(10):
        path = folder / f"{i}.after_optimizations.txt"
        path.write_bytes(np.random.default_rng(i).bytes(20000))
        os.utime(path, (i, i))
    (folder / "other.txt").write_text("not wanted")
    monkeypatch.setattr(fly, "BYTES_BACK", 30000)
    fly.keep_programs(tmp_path / "dump", tmp_path / "back.tar.gz")
    with tarfile.open(tmp_path / "back.tar.gz") as file:
        names = file.getnames()
    assert names == [f"jbn-xla/{i}.after_optimizations.txt" for i in range(len(names))]
    assert 2 <= len(names) < 6


def test_summary_shows_the_best_that_was_right(tmp_path):
    lines = Lines(tmp_path / "a" / "found.jsonl")
    told = {"kernel": "apply", "fused": "relu", "shape": [256, 7, 7, 512], "dtype": "bfloat16", "programs": 9}
    told |= {"resident": 4, "bytes": 2e6, "errors": {}, "unroll": None, "registers": 60, "spilled": 8}
    for rows, us, ok, chosen in ((64, 4.0, True, True), (32, 1.0, False, False), (16, 2.0, True, False)):
        lines("run", **told, tiling=[rows, 32, 3, 8], us=us, ok=ok, chosen=chosen)
    lines("run", **{**told, "kernel": "copy", "fused": "alone"}, tiling=[1, 1, 1, 8], us=1.0, ok=True, chosen=True)
    lines.file.write('{"kind": "run", "cut')
    lines.file.flush()
    shown = summary.summarise([tmp_path])
    best = "16×32×3×8 unroll None resident 4 registers 60 SPILLS 8"
    assert f"4.0  0.50 | best      2.0  1.00 {best} | 50% of a copy | 1 of 3 WRONG" in shown
    assert main(["summary", str(tmp_path)]) == 0
