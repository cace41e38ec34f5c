"""Does ResNet-50's inference take less time with its batch norms folded into the convolutions?

Both models compute the same logits (checked) from the same variables, in float32, under `jax.jit`, which has the
variables as arguments: as constants XLA would fold some of it by itself. They take turns, so that whatever else the
machine does meets both; ratios are taken within a turn, medians and quartiles over turns.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jbn.linen
from experiments.benchmarks.speed import ENVIRONMENT as ENVIRONMENT
from experiments.benchmarks.speed import row
from experiments.benchmarks.turns import dots, take_turns, told
from experiments.framework.plots import BLUE, GREY, pyplot
from experiments.framework.record import Options, Results, cores, progress
from experiments.material.cases import Case, case
from experiments.material.models import ResNet50

BASELINE, FOLDED = "not folded", "folded"
CASES = [case(8, 64, 64, 3), case(1, 224, 224, 3), case(8, 224, 224, 3)]
QUICK_CASES = [case(2, 32, 32, 3)]
TURNS, QUICK_TURNS = 40, 3
TOLERANCE = 1e-4  # of the largest logit: folding reorders float32 arithmetic, and nothing else


def run(options: Options, results: Results) -> None:
    """Times both models on every case; a row for each."""
    turns, cases = (QUICK_TURNS, QUICK_CASES) if options.quick else (TURNS, CASES)
    results.configuration = {
        "seed": options.seed,
        "quick": options.quick,
        "turns": turns,
        "threads": cores(),
        "dtype": "float32",
        "baseline": BASELINE,
        "candidates": [BASELINE, FOLDED],
        "environment": ENVIRONMENT,
    }
    rng = np.random.default_rng(options.seed)
    model = ResNet50(stages=1 if options.quick else None)
    variables = trained(model, rng)
    folded = jbn.linen.fold(model, variables, jax.ShapeDtypeStruct(cases[0].shape, jnp.float32), train=False)
    results.summary = {"folded": len(folded.folded), "left": len(folded.left)}
    candidates: dict[str, tuple[Callable[..., Any], Any]] = {
        BASELINE: (model.apply, variables),
        FOLDED: (folded.apply, folded.variables),
    }
    with progress(len(cases)) as part:
        for each in cases:
            part(each.name)
            images = jax.device_put(rng.standard_normal(each.shape, np.float32))
            steps = {name: step(apply, weights, images) for name, (apply, weights) in candidates.items()}
            check(each, steps)
            times = take_turns(steps, turns, rng)
            results.rows += [row(each, name, times, BASELINE) for name in steps]


def trained(model: ResNet50, rng: np.random.Generator) -> Any:
    """Variables whose batch norms all do something, as after training; drawn without a program."""
    shapes = jax.eval_shape(lambda key: model.init(key, jnp.zeros((1, 32, 32, 3)), train=False), jax.random.key(0))

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if len(leaf.shape) < 2:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        fan_in = np.prod(leaf.shape[:-1])
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * np.float32((2 / fan_in) ** 0.5), leaf.dtype)

    return jax.tree.map(draw, shapes)


def step(apply: Callable[..., Any], variables: Any, images: jax.Array) -> Callable[[], Any]:
    """One inference: blocks until the logits are there."""
    run = jax.jit(lambda variables, images: apply(variables, images, train=False))
    return lambda: jax.block_until_ready(run(variables, images))


def check(each: Case, steps: dict[str, Callable[[], Any]]) -> None:
    """Raises RuntimeError unless both compute the same; this also compiles them."""
    got, want = (np.asarray(steps[name]()) for name in (FOLDED, BASELINE))
    error = np.abs(got - want).max() / np.abs(want).max()
    if not error < TOLERANCE:
        raise RuntimeError(f"folded and not folded differ on {each.name}: {error:.1e} relative")


def table(results: Results) -> Any:
    """Per case: both median times, and the speed of the folded model over the other with its quartiles."""
    from rich.table import Table

    shown = Table(
        title="ResNet-50, inference, float32",
        caption=f"Median milliseconds; speed over {BASELINE}: median (quartiles) "
        f"over {results.configuration['turns']} turns. {results.configuration['threads']} threads.",
    )
    for name in ("images", BASELINE, FOLDED, "speed"):
        shown.add_column(name, justify="left" if name == "images" else "right")
    for name in dict.fromkeys(each["case"] for each in results.rows):
        before, after = (each for each in results.rows if each["case"] == name)
        times = (f"{each['milliseconds']:.1f} ms" for each in (before, after))
        shown.add_row(name, *times, told(after))
    return shown


def found(results: Results) -> list[str]:
    """Whether folding is faster, and the speed of each case."""
    rows = [each for each in results.rows if each["candidate"] == FOLDED]
    faster = sum(each["speedup_lower_quartile"] > 1 for each in rows)
    speeds = ", ".join(
        f"{each['speedup']:.2f}× ({each['speedup_lower_quartile']:.2f} to {each['speedup_upper_quartile']:.2f}) "
        f"on {each['case']}"
        for each in rows
    )
    return [
        f"Folded is faster beyond the spread between turns in {faster or 'none'} of {len(rows)} cases on this device.",
        f"Speed over {BASELINE}, median and quartiles: {speeds}.",
    ]


def figure(results: Results) -> Any:
    """Speed of the folded model over the other: a line for each case, a dot and its quartiles."""
    plt = pyplot()
    rows = [each for each in results.rows if each["candidate"] == FOLDED]
    fig, axes = plt.subplots(figsize=(4.6, 0.9 + 0.4 * len(rows)), layout="constrained")
    axes.axvline(1, color=GREY, linewidth=1)
    dots(axes, rows, range(len(rows)), color=BLUE, markersize=5)
    axes.set_yticks(range(len(rows)), [each["case"] for each in rows])
    axes.set(xlabel=f"speed over {BASELINE}: median and quartiles", ylim=(len(rows) - 0.5, -0.5))
    axes.grid(False, axis="y")
    axes.margins(x=0.2)
    axes.set_title("ResNet-50, inference, float32")
    return fig
