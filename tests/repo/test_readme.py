"""README's examples run, and its commands are where CI looks for them."""

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments.framework import catalog, report, study
from experiments.framework.record import Options, Results

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILE = r"<!-- experiment: (\w+) -->\n```python\n(.*?)```"  # a whole file, not a script
EXAMPLES = re.findall(r"```python\n(.*?)```", re.sub(FILE, "", README, flags=re.DOTALL), re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=[f"example {i}" for i in range(len(EXAMPLES))])
def test_example_runs(source):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples_of_each_interface():
    for text in ("jbn.bn_train", "from jbn.linen import", "from jbn.nnx import", "jax.shard_map", "mask="):
        assert any(text in source for source in EXAMPLES)


def test_every_function_of_the_family_is_in_an_example():
    (table,) = re.findall(r"### The rest of the family\n.*?\n\|---\|---\|\n(.*?)\n\n", README, re.DOTALL)
    names = [name for row in table.splitlines() for name in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    assert len(names) > 20
    for name in names:
        assert any(re.search(rf"\b{re.escape(name)}[(=,]", source) for source in EXAMPLES), name


@pytest.mark.parametrize("name", ["run", "test"])
def test_commands_are_marked(name):
    (block,) = re.findall(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert block.startswith("python3 -m venv .venv && ")


def test_an_experiment_is_thirty_lines_and_runs(tmp_path):
    [(name, source)] = re.findall(FILE, README, re.DOTALL)
    statements = [line for line in source.splitlines() if line.strip()]
    assert len(statements) < 40
    (tmp_path / "claims").mkdir()
    path = tmp_path / "claims" / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    assert catalog.discover(tmp_path)[name].is_claim
    spec = importlib.util.spec_from_file_location(name, path)
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    results = Results(name)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        study.run(experiment, Options(out=tmp_path, quick=True), results)
    assert results.summary["findings"]["with"]["samples"]
    assert results.save(tmp_path, experiment.figure)


def test_claims_are_what_was_measured():
    [shown] = re.findall(r"<!-- claims -->\n(.*?)<!-- /claims -->", README, re.DOTALL)
    assert shown == report.markdown(report.read(ROOT / "experiments/results/cpu"))


def test_speed_is_what_was_measured():
    results = json.loads((ROOT / "experiments/results/cpu/speed.json").read_text(encoding="utf-8"))
    means = results["summary"]["speedup_geometric_mean"]
    shown = " | ".join(f"{means[name]:.2f}×" for name in ("jbn.bn_train", "jbn.linen", "torch"))
    assert f"| geometric mean | | {shown} |" in README


def test_digits_are_what_was_measured():
    results = json.loads((ROOT / "experiments/results/cpu/digits.json").read_text(encoding="utf-8"))
    for row in results["rows"]:
        accuracy = f"{100 * row['accuracy_mean']:.1f} ± {100 * row['accuracy_deviation']:.1f}"
        assert re.search(rf"\| {row['learning_rate']:g} \| {row['network']} \| .* \| {accuracy} \|", README)


def test_folding_is_what_was_measured():
    results = json.loads((ROOT / "experiments/results/cpu/folding.json").read_text(encoding="utf-8"))
    assert results["complete"] and results["summary"] == {"folded": 53, "left": 0}
    assert f"of {results['configuration']['turns']} turns" in README
    for before, after in zip(results["rows"][::2], results["rows"][1::2], strict=True):
        quartiles = f"{after['speedup_lower_quartile']:.2f}–{after['speedup_upper_quartile']:.2f}"
        times = f"{before['milliseconds']:.1f} | {after['milliseconds']:.1f}"
        assert f"| {before['case']} | {times} | {after['speedup']:.2f}× ({quartiles}) |" in README


def test_communication_is_what_was_measured():
    rows = json.loads((ROOT / "experiments/results/cpu/communication.json").read_text(encoding="utf-8"))["rows"]
    for devices in (8, 256, 4096):
        found = [row for row in rows if row["devices"] == devices]
        cells = (f"{row['collectives']}, {row['received_bytes'] / 1e6:.3g} MB" for row in found)
        assert f"| {devices} | {' | '.join(cells)} |" in README


def test_script_over_processes(tmp_path):
    """As `mpirun` would start it: two processes of two devices, which Open MPI's variables tell from each other."""
    (source,) = re.findall(r"```py\n(.*?)```", README, re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(source, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_PORT": str(port),
        "OMPI_MCA_orte_hnp_uri": f"1.0;tcp://127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    running = [
        subprocess.Popen(
            [sys.executable, script],
            env=environment | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    batches = [np.random.default_rng(i).normal(size=(16, 3)) for i in range(2)]
    try:
        indices = set()
        for process in running:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            index, *mean = re.sub(r"[\[\]]", " ", out.splitlines()[-1]).split()  # gloo writes above it
            indices.add(int(index))
            np.testing.assert_allclose(np.float64(mean), 0.01 * np.concatenate(batches).mean(0), rtol=1e-4)
        assert indices == {0, 1}
    finally:
        for process in running:
            process.kill()
