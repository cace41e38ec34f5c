"""README's examples run, and its commands are where CI looks for them."""

import json
import re
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


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
