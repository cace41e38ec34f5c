"""The runs on a GPU, without one: what is planned and compiled ahead, what goes through JAX, how parts are cut."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import driver
import jax
import numpy as np
import pytest

from experiments.benchmarks.gpu.flight import ahead, fly, layers, pieces, plan, side_by_side, steps, summary
from experiments.benchmarks.gpu.flight.__main__ import main
from experiments.benchmarks.gpu.flight.parts import Part, Parts, python
from experiments.benchmarks.gpu.flight.pieces import Case, Tried
from experiments.benchmarks.gpu.flight.prepare import prepare
from experiments.benchmarks.gpu.flight.stamp import is_prepared
from experiments.benchmarks.gpu.worker import Failed
from experiments.framework.lines import Lines, read
from experiments.material import models
from jbn.kernels.tiling import Tiling

SHAPE = (3, 10, 10, 32)
SPLIT = Tried(Tiling(64, 32, 3, 4))


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


def test_prepare_compiles_two_tilings_once(tmp_path, capsys, monkeypatch):
    planned = [Case("apply", "relu", SHAPE, "bfloat16", Tried(Tiling(rows, 32, 3, 4))) for rows in (32, 64)]
    monkeypatch.setattr(plan, "everything", lambda: planned)
    module = sys.modules[prepare.__module__]
    monkeypatch.setattr(module, "TRITON", "0.1.")
    assert not prepare(tmp_path) and not list(tmp_path.iterdir())
    assert re.match(r"MISSING: triton 0\.1\.x, .* here is \d.*: pip install", capsys.readouterr().out)
    monkeypatch.setattr(module, "TRITON", "")  # any will do
    for _ in range(2):
        assert not is_prepared(tmp_path)
        right = prepare(tmp_path, fetch=False)
        told = capsys.readouterr().out
        assert right and is_prepared(tmp_path) and "MISSING" not in told
        (tmp_path / "stamp").write_text("of other sources", encoding="utf-8")
        assert "2 launches of 2 binaries" in told and "0 old ones deleted" in told
    assert "compiled" not in told
    runs = json.loads((tmp_path / "runs.json").read_text(encoding="utf-8"))
    for run in runs:
        about = json.loads((tmp_path / "binaries" / f"{run['binary']}.json").read_text(encoding="utf-8"))
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
        np.testing.assert_allclose(prints[-1], prints[0], rtol=1e-3)


def test_a_layer_that_fails_is_told_and_the_next_one_runs():
    state = {}
    layers.begin("jbn triton", state, [list(side_by_side.TINY[0])])
    answer = layers.time("jbn triton", state, list(side_by_side.TINY[0]), 1, 1e-9)
    assert "triton" in answer["failed"]["all"] and answer["passes"] == {}
    assert "KeyError" in layers.time("jbn triton", state, list(side_by_side.TINY[1]), 1, 1e-9)["failed"]["all"]


def test_a_training_step_that_keeps_little(tmp_path, monkeypatch):
    path, lock = tmp_path / "found.jsonl", tmp_path / "lock"
    monkeypatch.setattr(sys, "argv", ["steps", str(path), str(lock), "jbn xla", "2", "--tiny", "--named=segments"])
    monkeypatch.setattr(steps, "SECONDS", 1e-9)
    monkeypatch.setattr(models, "STAGES", models.STAGES)  # as it was, afterwards
    jax.config.update("jax_disable_most_optimizations", True)  # compiles in half the time
    try:
        steps.main()
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    [line] = read([path])
    assert line["kind"] == "step" and line["named"] and line["segments"]
    assert line["images"] > 0 and line["planned_bytes"] > 0
    assert math.isfinite(line["loss"])


class Answers:
    """A worker that is told to begin, then answers with what it has."""

    def __init__(self, answer):
        self.found, self.stopped = answer, 0

    def ask(self, **request): ...

    def answer(self, _timeout):
        if isinstance(self.found, Exception):
            raise self.found
        return self.found

    def stop(self):
        self.stopped += 1


def test_candidates_are_compared_with_flax(tmp_path, capsys):
    path, device = tmp_path / "found.jsonl", None
    device = side_by_side.Device(Lines(path), (), None)
    times = {"both": {"us": 2.0, "us_low": 1.0, "us_high": 3.0, "host_us": 1.0}}
    answers = {"flax.linen": ([1.0], 0), "jbn xla": ([1.0 + 1e-6], 0), "torch": ([2.0], 31 * 2**30)}
    device.workers = {
        name: Answers({"passes": times, "fingerprint": seen, "failed": {}, "held_bytes": held})
        for name, (seen, held) in answers.items()
    }
    device.workers["jbn triton"] = Answers(Failed("no answer within 40 s"))
    device.layer(side_by_side.TINY[0], lambda: 1.0)
    found = list(read([path]))
    assert [(line.get("candidate"), line.get("same")) for line in found if line["kind"] == "layer"] == [
        ("flax.linen", True), ("jbn xla", True), ("torch", False),
    ]  # fmt: skip
    assert [line["error"] for line in found if line["kind"] == "error"] == ["no answer within 40 s"]
    assert set(device.workers) == set(answers)  # who failed has no further turn
    # what a process holds that is not given back ends with it
    assert {name: worker.stopped for name, worker in device.workers.items()} == dict.fromkeys(answers, 0) | {"torch": 1}
    assert [line["bytes"] for line in found if line["kind"] == "held"] == [31 * 2**30]
    with path.open("a", encoding="utf-8") as file:
        file.write('{"tried": "by hand"}\n')  # of no kind
    shown = summary.summarise([path])
    assert "DIFFERS: torch" in shown and "1 times: jbn triton no answer within 40 s" in shown


def test_the_marks_shapes_come_first():
    found = side_by_side.tasks()
    first = [(task.shape[0], task.fused) for task in found[::12]][:5]
    assert first == [(256, "relu"), (128, "relu"), (256, "add + relu"), (128, "add + relu"), (32, "relu")]
    assert found[0].size == max(task.size for task in found) and len(found) == len(set(found))
    assert side_by_side.tasks(["32, relu"]) == found[48:60]  # what `--only` asks for


@pytest.mark.parametrize("set_, found", [("", "--b --c"), (" --a ", "--a --b --c")])
def test_flags_of_the_user_stay(set_, found, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", set_)
    assert side_by_side.flags("--b", "--c") == {"XLA_FLAGS": found}


def test_steps_and_what_the_device_ran_are_shown(tmp_path):
    """The last of each way."""
    lines = Lines(tmp_path / "found.jsonl")
    told = {"batch": 128, "candidate": "jbn triton", "named": True}
    for ms, way in ((9, {"segments": True}), (4, {"segments": True}), (5, {})):
        lines("step", **told, **way, us=1e3 * ms, images=128e3 / ms, peak_bytes=2**30, planned_bytes=None)
        lines("kernels", **told, **way, kernel="jbn_apply", launches=53, us=100.0 * ms)
    shown = [" ".join(line.split()) for line in summary.summarise([tmp_path]).splitlines()]
    few = "128 jbn triton inputs and statistics kept"
    assert [line for line in shown if line.startswith("128")] == [
        *(f"{few} 5.00 25600 1.00 –", f"{few}, in segments 4.00 32000 1.00 –"),
        *(f"{few} jbn_apply 53 0.500", f"{few}, in segments jbn_apply 53 0.400"),
    ]


# ---- the runs


def test_the_command(tmp_path):
    """As it is typed, from anywhere."""
    command = Path(__file__).parents[2] / ".ci/flight"
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([command, "summary", tmp_path], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "no lines were found: a run on a GPU writes them (experiments/README.md)\n", done.stderr
    done = subprocess.run([command, "4"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "invalid choice: '4'" in done.stderr


def running(pid: str) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_parts_are_cut_at_their_limits_and_lose_nothing(tmp_path):
    lines = Lines(tmp_path / "found.jsonl")
    parts = Parts(tmp_path, lines, 60)
    child = "import subprocess; child = subprocess.Popen(['sleep', '1000']); print(child.pid, flush=True); child.wait()"
    well = parts.run(
        Part("slow", python("-c", child), 1),
        Part("quick", python("-c", "print(3)"), 50),
        Part("bad", ["false"], 50),
        Part("absent", ["no-such-tool"], 50),
    )
    assert not well
    found = {line["part"]: line for line in read([tmp_path / "found.jsonl"])}
    assert found["quick"]["last"] == "3"
    assert {name: line["ended"] for name, line in found.items()} == {
        "slow": "cut",
        "quick": "status 0",
        "bad": "status 1",
        "absent": "[Errno 2] No such file or directory: 'no-such-tool'",
    }
    pid = (tmp_path / "slow.log").read_text(encoding="utf-8").split()[-1]  # of the child, which has gone too
    for _ in range(600):  # the signal was sent; it may take a while to arrive
        if not running(pid):
            break
        time.sleep(0.1)
    assert not running(pid)
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
    (folder / "other.txt").write_text("not wanted", encoding="utf-8")
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
