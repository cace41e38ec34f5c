"""The GPU benchmark's machinery, on the CPU with tiny shapes: it selects, times, keeps, goes on and reports."""

import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import speed
from experiments.benchmarks.gpu import candidates, measure, report, tasks, timing
from experiments.benchmarks.gpu.tasks import Task
from experiments.benchmarks.gpu.worker import DOES, Failed, Worker, serve
from experiments.framework.record import Options, Results
from experiments.material import cases, models

TINY = Task("2×3×3×4", (2, 3, 3, 4), -1, "float32", "add + relu")
TWO = [TINY, Task("6×5", (6, 5), -1, "bfloat16", "alone")]
NAMES = ("jbn triton", "jbn xla", "flax.linen", "copy")


def options(out, minutes=None):
    return Options(out=out, arguments=types.SimpleNamespace(minutes=minutes))


def go(out, given=TWO, minutes=None, names=NAMES):
    results = Results("speed")
    measure.run(options(out, minutes), results, given, names, samples=3)
    return results


class Here(Worker):
    """Works in this process, which has imported JAX already."""

    def __init__(self, name):
        super().__init__(name)
        state = {}  # of all requests, as `serve` begins anew with each
        self.does = {do: lambda name, _, f=f, **asked: f(name, state, **asked) for do, f in DOES.items()}

    def ask(self, **request):
        answers = io.StringIO()
        serve(self.name, [json.dumps(request)], answers, self.does)
        self.answers.put(answers.getvalue())


def worker(name):
    """A process, as on a GPU, for copying alone."""
    return (Worker if name == "copy" else Here)(name)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "links", lambda _: 1)
        patch.setattr(measure, "Worker", worker)
        return out, go(out)


def test_tasks_begin_with_what_says_most():
    listed = tasks.tasks()
    assert listed[0] == Task("256×112×112×64", (256, 112, 112, 64), -1, "bfloat16", "add + relu")
    assert len(set(listed)) == len(listed)
    layers = {(t.case, t.dtype, t.fused) for t in listed if t.batch is None}
    assert len(layers) == 6 * len(cases.GPU)
    steps = [i for i, t in enumerate(listed) if t.batch is not None]
    assert [listed[i].batch for i in steps] == [256, 128]
    first = {case.name for case in cases.resnet50(256)}
    assert {t.case for t in listed[: steps[0]]} == first and {t.dtype for t in listed[: steps[0]]} == {"bfloat16"}


def test_rows(finished):
    """A row for each candidate and pass; who cannot run leaves the reason."""
    _, results = finished
    found = {(r["case"], r["candidate"], r["pass"]): r for r in results.rows}
    passes = ("forward", "backward", "both")
    wanted = {(t.case, name, each) for t in TWO for name in ("jbn xla", "flax.linen") for each in passes}
    wanted |= {(t.case, "jbn triton", "both") for t in TWO} | {("6×5", "copy", "forward")}
    assert found.keys() == wanted
    for (_, name, _), row in found.items():
        if name == "jbn triton":
            assert row["error"].startswith("NotImplementedError: implementation='triton' needs a CUDA or ROCm GPU")
            assert row["microseconds"] is None
        else:
            assert row["error"] is None
            assert 0 < row["microseconds_lower_quartile"] <= row["microseconds"] <= row["microseconds_upper_quartile"]
            assert 0 < row["handing_over"]
    x = 2 * 3 * 3 * 4 * 4
    assert [found[TINY.case, "jbn xla", each]["floor_bytes"] for each in passes] == [4 * x, 7 * x, 11 * x]
    assert found["6×5", "copy", "forward"]["floor_bytes"] == 2 * 60


def test_results_are_kept_and_gone_on_from(finished, monkeypatch):
    monkeypatch.setattr(measure, "Worker", worker)
    out, results = finished
    record = json.loads((out / "speed.json").read_text(encoding="utf-8"))
    assert len(record["rows"]) == len(results.rows) and record["configuration"]["kind"] == "gpu"
    again = go(out)
    # nothing but what failed is tried again
    assert again.rows[: len(record["rows"]) - 2] == [row for row in record["rows"] if not row["error"]]
    assert [row["candidate"] for row in again.rows[len(record["rows"]) - 2 :]] == ["jbn triton"] * 2


def test_results_of_another_device_are_set_aside(finished, tmp_path):
    out, _ = finished
    record = json.loads((out / "speed.json").read_text(encoding="utf-8"))
    record["environment"]["device"] = "another"
    (tmp_path / "speed.json").write_text(json.dumps(record), encoding="utf-8")
    go(tmp_path, given=[])
    [kept] = tmp_path.glob("speed-*.json")
    assert json.loads(kept.read_text(encoding="utf-8")) == record


def test_budget(tmp_path, capsys):
    assert go(tmp_path, minutes=0).rows == []
    assert "out of time before task 1 of 2: the same command goes on from there" in capsys.readouterr().out


def test_report(finished, tmp_path):
    _, results = finished
    summary = report.summary(results)
    assert summary["copy_bandwidth_GB_per_s"] > 0
    assert summary["wins"] == [] and summary["behind_flax"] == []
    results.save(tmp_path, speed.figure)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".csv", ".png", ".svg"}
    assert speed.table(results).row_count == 3  # two cases, and that a candidate failed


def made(name, size, microseconds, layout="last", each="both"):
    row = measure.row(Task(f"{size}", (size // 2,)), name, each, microseconds=[microseconds], handing_over=[1.0])
    return row | {"layout": layout}


def test_rows_for_the_dispatch():
    """From the smallest size above which no case was lost."""
    results = Results("speed")
    for size, ours, plain in ((100, 5, 1), (200, 1, 2), (300, 3, 2), (400, 1, 2), (500, 2, 2)):
        results.rows += [made("jbn triton", size, ours), made("jbn xla", size, plain)]
    results.rows += [made("jbn triton", 600, 3, "first"), made("jbn xla", 600, 2, "first")]
    assert report.wins(results) == [{"dtype": "bfloat16", "layout": "last", "size": 400, "cases": 2}]


def test_candidates_that_differ_are_told():
    prints = {"flax.linen": [1.0, 2.0], "jbn xla": [1.0, 2.01], "torch": [1.0, 2.2], "copy": []}
    assert measure.differing(TINY._replace(dtype="bfloat16"), prints) == ["torch"]


def test_a_worker_that_dies_or_hangs_is_told_and_started_anew():
    worker = Worker("jbn xla")
    worker.ask(do="nothing of the kind")
    with pytest.raises(Failed, match="KeyError: 'nothing of the kind'"):
        worker.answer(60)
    worker.ask(do="prepare", task=list(TINY), links=1)
    worker.process.kill()
    with pytest.raises(Failed, match="the process ended with status -9"):
        worker.answer(60)
    worker.ask(do="prepare", task=list(TINY), links=1)
    with pytest.raises(Failed, match="no answer within 0 s"):
        worker.answer(0.0)
    assert worker.process.poll() is not None


def test_layers_wait_for_one_another():
    """Nothing is computed once for all, left out or merged: as many reductions as layers."""
    steps, _, _ = candidates.prepare("jbn xla", TINY._replace(fused="alone"), 2)
    assert len(steps["both"]()) == 2
    layer = candidates.chain(lambda x: (x * 2, x[0]))
    text = jax.jit(layer).lower([jnp.ones(3)] * 4).as_text()
    assert text.count("optimization_barrier") == 3


def test_numbers_are_drawn_by_one_program(monkeypatch):
    """Whatever the seed: tracing runs Python once for each program that is compiled."""
    seeds = []
    draw = candidates.draw
    monkeypatch.setattr(candidates, "draw", lambda task, seed: seeds.append(seed) or draw(task, seed))
    steps, _, _ = candidates.prepare("copy", TINY, 3)
    assert len(seeds) == 1
    for i, y in enumerate(steps["forward"]()):
        np.testing.assert_allclose(y, -draw(TINY, i), atol=1e-5)


def test_links_fill_the_cache():
    assert [timing.links(size) for size in (1000, 10**8, 10**9)] == [8, 3, 1]


def test_sampling_counts_calls():
    calls = []
    found = timing.sample(lambda: calls.append(1), lambda _: None, 4, 1e-9)
    assert len(calls) == 3 + 4 * 3
    assert len(found["microseconds"]) == len(found["handing_over"]) == 4
    assert timing.spread([1.0, 2.0, 3.0]) == (1.5, 2.0, 2.5)


def test_torch_draws_the_same_numbers():
    torch = pytest.importorskip("torch")
    from experiments.benchmarks.gpu import torch_candidates as ours

    task = Task("", (3, 5, 7, 4), -1, "float32", "alone")
    drawn = ours.draw(task, 11)
    assert isinstance(drawn, torch.Tensor)
    np.testing.assert_array_equal(drawn.movedim(1, -1).numpy(), candidates.draw(task, 11))


def test_fused_network_is_the_same_network():
    import jbn.linen

    def variables(fused):
        block = models.Bottleneck(4, 2, lambda **k: jbn.linen.BatchNorm(use_running_average=False, **k), fused=fused)
        return jax.jit(block.init_with_output)(jax.random.key(1), jax.random.normal(jax.random.key(0), (2, 6, 6, 8)))

    (y, plain), (z, fused) = variables(False), variables(True)
    assert jax.tree.structure(plain) == jax.tree.structure(fused)
    np.testing.assert_allclose(y, z, rtol=1e-5, atol=1e-5)
