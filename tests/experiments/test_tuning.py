"""The experiment that measures the package's rows, with `jbn.autotune` in its place."""

import jax
import pytest

import jbn
from experiments.__main__ import main
from experiments.benchmarks import tuning
from experiments.material import cases
from jbn._op.tables import Norm, Row, Times


def measured(f, xs, *, path, ignore_cache):
    """As if one had won, and one failed; `f` is traced."""
    jax.eval_shape(f, xs)
    assert ignore_cache and {x.dtype.name for x in xs} == {"bfloat16"}
    norm = Norm(xs[0].shape, 3, 0, "bfloat16", "bfloat16", "relu", "bfloat16", None, True)
    won = Row(norm, Times(1, 2), Times(2, 4), None, "2026-01-02", "")
    failed = Row(norm._replace(activation=None, residual=None), None, None, "a reason", "2026-01-02", "")
    return jbn.Tuning("NVIDIA Fake", str(path / "nvidia-fake.json"), (won, failed), 2)


def test_rows_for_the_package(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jbn, "autotune", measured)
    monkeypatch.setattr(cases, "resnet50", lambda batch, size: [cases.images(batch, size, 3)] * 2)
    assert main(["tuning", "--quick", "--batches", "2", "--dtypes", "bfloat16", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} >= {f"tuning.{kind}" for kind in ("json", "csv", "png", "svg")}
    shown = capsys.readouterr().out
    assert "2×32×32×3 bfloat16, residual, relu" in shown and "add + relu" in shown and "2.00×" in shown


def test_without_a_gpu(tmp_path):
    with pytest.raises(SystemExit, match="error: autotune needs a GPU"):
        main(["tuning", "--quick", "--out", str(tmp_path)])
    assert tuning.fused({"residual": None, "activation": "relu"}) == "relu"
