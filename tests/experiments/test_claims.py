"""The experiments on claims: what every one of them has, how they are judged, kept and reported."""

import json
import math
import types
from pathlib import Path

import matplotlib.figure
import numpy as np
import pytest

from experiments.__main__ import main
from experiments.framework import catalog, study
from experiments.framework.claim import Claim, Rule, interval, judge, number, shown
from experiments.framework.record import Options, Results, plain

RESULTS = Path(__file__).parents[2] / "experiments/results/cpu"
CLAIMS = {name: entry for name, entry in catalog.discover().items() if entry.is_claim}
RULE = Rule(supported=(1.0, math.inf), contradicted=(-math.inf, 0.0))
CLAIM = Claim(says="More.", source="A paper", effect="difference", rule=RULE)


# ---- every experiment


@pytest.mark.parametrize("name", CLAIMS)
def test_quick_run(name, tmp_path):
    """The machinery from data to figure, on little: nothing about the findings."""
    experiment = catalog.load(CLAIMS[name])
    results = Results(name)
    study.run(experiment, Options(out=tmp_path, quick=True), results)
    assert len(results.rows) == len(list(experiment.parts(results.configuration)))
    assert results.summary["question"].endswith("?")
    assert len(results.summary["design"]) > 200
    assert {finding["verdict"] for finding in results.summary["findings"].values()} == {"not judged"}
    results.complete = True
    figure = experiment.figure(results)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # once laid out is enough: each drawing would do it again
    paths = results.save(tmp_path, lambda results: figure)
    assert json.loads(paths[0].read_text(encoding="utf-8"))["rows"] == results.rows
    assert study.table(results).row_count == len(experiment.CLAIMS)
    assert isinstance(figure, matplotlib.figure.Figure)
    assert figure.get_figwidth() <= 7.5  # inches: what a page is wide


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_are_told_in_full(name):
    experiment = catalog.load(CLAIMS[name])
    assert experiment.configuration(False)["seeds"] >= 5
    assert experiment.configuration(True) != experiment.configuration(False)
    assert len(experiment.CAPTION) > 40
    for claim in experiment.CLAIMS.values():
        assert claim.says.endswith(".") and claim.effect and claim.source
        (a, b), (c, d) = claim.rule.supported, claim.rule.contradicted
        assert a < b and c <= d and (b <= c or d <= a), "both verdicts at once"


@pytest.mark.parametrize("name", CLAIMS)
def test_committed_results_are_judged_by_the_claims_as_they_stand(name):
    """Neither a rule nor a setting was changed after the run, and no digit hangs on rounding or the seeds' order."""
    experiment = catalog.load(CLAIMS[name])
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    configuration, rows, summary = record["configuration"], record["rows"], record["summary"]
    assert configuration == plain({"seed": 0, "quick": False, **experiment.configuration(False)})
    parts = [plain(part) for part in experiment.parts(configuration)]
    assert [{key: row[key] for key in part} for row, part in zip(rows, parts, strict=True)] == parts
    noisy = otherwise_rounded(rows, np.random.default_rng(0))
    effects, rounded = (experiment.effects(each, configuration) for each in (rows, noisy))
    for claim, found in summary["findings"].items():
        judged = plain(judge(experiment.CLAIMS[claim], effects[claim], quick=False))
        assert judged.pop("samples") == pytest.approx(found.pop("samples"), rel=1e-12, abs=1e-12)
        assert judged == found
        again = plain(judge(experiment.CLAIMS[claim], rounded[claim][::-1], quick=False))
        assert again | {"samples": None} == found | {"samples": None}
    assert summary.keys() - {"findings"} == {"question", "design", "caption"}
    assert {key: summary[key] for key in study.told(experiment)} == study.told(experiment)


def otherwise_rounded(values, rng):
    """Lists of floats, however deep, as another processor's logarithms and sums may leave them."""
    if isinstance(values, dict):
        return {
            key: otherwise_rounded(value, rng) if isinstance(value, list) else value for key, value in values.items()
        }
    if isinstance(values, list):
        return [otherwise_rounded(value, rng) for value in values]
    return values * (1 + int(rng.integers(-2, 3)) * 2.0**-52) if isinstance(values, float) else values


# ---- verdicts


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (1.0, 2.0, "supported"),
        (0.9, 2.0, "not supported"),
        (0.1, 0.9, "not supported"),
        (-0.5, 1.5, "not supported"),
        (-1.0, 0.0, "contradicted"),
        (-1.0, 0.1, "not supported"),
    ],
)
def test_rule(low, high, verdict):
    assert RULE.verdict(low, high) == verdict
    assert RULE.told(" points") == "≥ 1 point supported, ≤ 0 points contradicted"
    assert Rule((-1 / 3, 2), (10_000, math.inf)).told("×") == "-0.333 to 2× supported, ≥ 10,000× contradicted"


def test_interval_covers_the_mean_as_often_as_it_says():
    """Of samples of 6, the fewest measured; the bootstrap alone covers 87 %. 0.02: two deviations of the count."""
    draws = np.random.default_rng(0).normal(1, 1, size=(500, 6))
    bounds = [interval(draw) for draw in draws]
    covered = np.mean([low <= 1 <= high for low, _, high in bounds])
    assert 0.93 <= covered <= 0.98
    for draw, (low, middle, high) in zip(draws, bounds, strict=True):
        assert low < middle < high
        assert middle == pytest.approx(draw.mean(), abs=1e-7)


@pytest.mark.parametrize("ratio", [False, True])
def test_interval_is_the_same_however_sums_are_rounded(ratio):
    """Of accuracies, whose resampled means are level with the samples' again and again."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        samples = (rng.integers(1, 9, size=8) / 10).tolist()
        expected = interval(samples, ratio=ratio)
        for _ in range(5):
            assert interval(otherwise_rounded(rng.permutation(samples).tolist(), rng), ratio=ratio) == expected


def test_interval_of_ratios_is_geometric():
    low, middle, high = interval([2.0, 8.0, 4.0, 4.0, 4.0], ratio=True)
    assert middle == pytest.approx(4.0)
    assert 2.0 < low < 4.0 < high < 8.0
    inverse = interval([1 / 2, 1 / 8, 1 / 4, 1 / 4, 1 / 4], ratio=True)
    assert inverse == pytest.approx((1 / high, 1 / middle, 1 / low), rel=0.02)


def test_interval_of_equal_samples():
    assert interval([3.0] * 5) == (3.0, 3.0, 3.0)
    assert interval([0.0] * 5) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("samples", "ratio", "wanted"),
    [([1.0], False, "finite"), ([1.0, math.nan], False, "finite"), ([1.0, 0.0], True, "positive")],
)
def test_interval_refuses(samples, ratio, wanted):
    with pytest.raises(ValueError, match=f"samples must be two or more {wanted} numbers, one for each seed, got"):
        interval(samples, ratio=ratio)


def test_judging_takes_five_seeds():
    with pytest.raises(ValueError, match="judged on 5 seeds or more, got 4"):
        judge(CLAIM, [1.0] * 4, quick=False)
    assert judge(CLAIM, [1.0] * 4, quick=True)["verdict"] == "not judged"
    finding = judge(CLAIM, [2.0] * 5, quick=False)
    assert (finding["verdict"], shown(finding)) == ("supported", "2.00 (2.00 to 2.00)")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1.2345, "1.23"), (12.345, "12.3"), (123.4, "123"), (0.01234, "0.012"), (1234.5, "1,230"),
     (0.9996, "1.00"), (1e-7, "1.0e-07"), (-2.5, "-2.50"), (2.5e8, "2.5e+08")],
)  # fmt: skip
def test_numbers_as_people_read_them(value, text):
    assert number(value) == text


def test_plain():
    found = plain({"a": np.float32([0.1, np.nan]), "b": (np.int64(2), math.inf), "c": np.array(True), "d": None})
    assert found == {"a": [0.1, None], "b": [2, None], "c": True, "d": None}
    json.dumps(found, allow_nan=False)


# ---- running


def experiment(tmp_path, measured, text="x = 1"):
    """A made-up experiment of three parts, which records what it measures."""
    path = tmp_path / "made_up.py"
    path.write_text(text, encoding="utf-8")

    def measure(configuration, part):
        measured.append(part["size"])
        return {"value": np.arange(configuration["seeds"]) + part["size"]}

    module = types.ModuleType("made_up", "Is more more?\n\nThe design.")
    module.__dict__.update(
        __file__=str(path),
        CLAIMS={"more": CLAIM},
        CAPTION="A caption.",
        configuration=lambda quick: {"seeds": 5},
        parts=lambda configuration: [{"size": size} for size in (1, 2, 3)],
        measure=measure,
        effects=lambda rows, configuration: {"more": study.find(rows, size=3)["value"]},
        figure=lambda results: matplotlib.figure.Figure(),
    )
    return module


def run(module, out, **options):
    results = Results("made_up")
    study.run(module, Options(out=out, **options), results)
    return results


def test_finished_parts_are_not_measured_again(tmp_path):
    measured = []
    module = experiment(tmp_path, measured)
    first, second = run(module, tmp_path), run(module, tmp_path)
    assert measured == [1, 2, 3]
    assert first.rows == second.rows
    assert first.seconds == second.seconds == sum(row["seconds"] for row in first.rows)
    assert first.summary["findings"]["more"]["verdict"] == "supported"
    assert first.rows[0].keys() == {"size", "value", "seconds"}


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path):
    measured = []
    module = experiment(tmp_path, measured)
    whole = module.measure

    def interrupted(configuration, part):
        if part["size"] == 3:
            raise KeyboardInterrupt
        return whole(configuration, part)

    module.measure = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(module, tmp_path)
    module.measure = whole
    run(module, tmp_path)
    assert measured == [1, 2, 3]


def test_whatever_the_numbers_depend_on_is_asked_anew(tmp_path):
    measured = []
    module = experiment(tmp_path, measured)
    run(module, tmp_path)
    run(module, tmp_path, seed=1)
    run(module, tmp_path, quick=True)
    module.configuration = lambda quick: {"seeds": 6}
    run(module, tmp_path)
    run(experiment(tmp_path, measured, text="x = 2"), tmp_path)
    assert measured == [1, 2, 3] * 5


def test_words_and_what_is_made_from_the_rows_are_no_other_question(tmp_path):
    measured = []
    for text in ("x = 1", '"""A design."""\nx = 1  # why', "CLAIMS: dict = {}\nx = 1\ndef figure(results): return x"):
        run(experiment(tmp_path, measured, text), tmp_path)
    assert measured == [1, 2, 3]


def test_settings_of_jax_are_part_of_the_question(tmp_path, monkeypatch):
    measured = []
    module = experiment(tmp_path, measured)
    run(module, tmp_path)
    monkeypatch.setenv("JAX_DEFAULT_MATMUL_PRECISION", "bfloat16")
    run(module, tmp_path)
    assert measured == [1, 2, 3] * 2


def test_a_damaged_part_is_measured_again(tmp_path):
    measured = []
    module = experiment(tmp_path, measured)
    run(module, tmp_path)
    for path in (tmp_path / ".cache/made_up").iterdir():
        path.write_text(path.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    run(module, tmp_path)
    assert measured == [1, 2, 3] * 2


def test_effects_must_be_those_claimed(tmp_path):
    module = experiment(tmp_path, [])
    module.effects = lambda rows, configuration: {"less": [1.0] * 5}
    with pytest.raises(ValueError, match=r"effects must return \['more'\], as CLAIMS has, got \['less'\]"):
        run(module, tmp_path)


def test_what_is_found_must_not_hide_the_part(tmp_path):
    module = experiment(tmp_path, [])
    module.measure = lambda configuration, part: {"size": 0}
    with pytest.raises(ValueError, match=r"measure returned \['size'\], which tell the part {'size': 1} apart"):
        run(module, tmp_path)


def test_find():
    rows = [{"a": 1, "b": 1}, {"a": 1, "b": 2}]
    assert study.find(rows, a=1, b=2) is rows[1]
    with pytest.raises(LookupError, match="2 of 2 rows have a 1, expected one"):
        study.find(rows, a=1)


@pytest.fixture
def only_made_up(tmp_path, monkeypatch):
    """A catalogue of one made-up experiment."""
    module = experiment(tmp_path, [])
    entry = catalog.Entry("made_up", "Is more more?", frozenset({"CLAIMS"}))
    main_job = catalog.discover()["digits"]
    monkeypatch.setattr(catalog, "discover", lambda: {"digits": main_job, "made_up": entry})
    monkeypatch.setattr(catalog, "load", lambda entry: module)
    return module


def test_all_runs_the_claims_and_reports(only_made_up, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["all", "--out", str(out)]) == 0
    written = {"made_up.json", "made_up.csv", "made_up.png", "made_up.svg", "report.html", "report.md", ".cache"}
    assert {path.name for path in out.iterdir()} == written
    assert "1 experiments in" in capsys.readouterr().out


def test_one_that_fails_stops_no_other(only_made_up, tmp_path, capsys):
    def measure(configuration, part):
        raise RuntimeError("no luck")

    only_made_up.measure = measure
    assert main(["all", "--out", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert "no luck" in error and "failed, as told above: made_up" in error


def test_interrupting_writes_no_verdict(only_made_up, tmp_path, capsys):
    whole = only_made_up.measure

    def measure(configuration, part):
        if part["size"] == 2:
            raise KeyboardInterrupt
        return whole(configuration, part)

    only_made_up.measure = measure
    out = tmp_path / "out"
    assert main(["made_up", "--out", str(out)]) == 130
    assert "1 finished parts are kept: the same command goes on from there" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".cache"]
