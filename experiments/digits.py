"""Does batch norm train a small CNN on real digits faster, and over a wider range of learning rates?

The same network, with `jbn.linen.BatchNorm` after each convolution and without, is trained by plain SGD on
4,000 MNIST digits at several learning rates; both start from the same seeds and see the digits in the same
order. Each learning rate's seeds are one jitted scan, batched by vmap.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from experiments.framework.plots import BLUE, DASHES, GAP, GREY, NORM_COLORS, VERMILION, band, pyplot
from experiments.framework.record import Options, Results, progress
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import NORMS, DigitsCNN
from experiments.material.train import History, Schedule, train, wait

NETWORKS = {name: DigitsCNN(norm) for name, norm in NORMS.items()}
LEARNING_RATES = (0.03, 0.1, 0.3, 1.0, 3.0)
SEEDS = 5
SCHEDULE = Schedule(steps=200, batch_size=64, evaluate_every=10)
TARGET = 0.9  # test accuracy


def run(options: Options, results: Results) -> None:
    """Trains every network at every learning rate; a row of results each."""
    rates, seeds, schedule, features = LEARNING_RATES, SEEDS, SCHEDULE, DigitsCNN.features
    if options.quick:
        rates, seeds, features = (0.1, 1.0), 2, (8,)
        schedule = Schedule(steps=20, batch_size=32, evaluate_every=10)
    results.configuration = {
        "seed": options.seed,
        "quick": options.quick,
        "seeds": seeds,
        "learning_rates": rates,
        "optimizer": "sgd",
        **schedule._asdict(),
        "target_accuracy": TARGET,
        "features": features,
    }
    digits = Split(*map(jax.device_put, load_digits()))
    keys = jax.random.split(jax.random.key(options.seed), seeds)
    with progress(len(NETWORKS) * len(rates)) as step:
        for network, model in NETWORKS.items():
            runs = sweep(model.clone(features=features), schedule)
            for rate in rates:
                step(f"{network}, learning rate {rate:g}")
                history = wait(runs(keys, np.float32(rate), digits))
                results.rows.append(row(network, rate, history, schedule.evaluate_every))


def sweep(model: DigitsCNN, schedule: Schedule) -> Callable[[Array, Any, Split], History]:
    """A jitted function of keys (seeds,), a learning rate and data: the History of every seed."""

    def runs(keys: Array, rate: Any, digits: Split) -> History:
        return jax.vmap(lambda key: train(model, optax.sgd(rate), digits, key, schedule))(keys)

    return jax.jit(runs)


def row(network: str, rate: float, history: History, evaluate_every: int) -> dict[str, Any]:
    """What one network did at one learning rate: `history` has a leading axis of seeds."""
    loss = np.asarray(history.loss, np.float64)
    accuracy = np.asarray(history.found, np.float64).round(6)  # 0.9, not float32's 0.8999999762
    above = accuracy >= TARGET
    steps = [int(evaluate_every * (1 + curve.argmax())) if curve.any() else None for curve in above]
    reached = [count for count in steps if count is not None]
    return {
        "network": network,
        "learning_rate": rate,
        "seeds": len(accuracy),
        "reached": len(reached),
        "steps_mean": float(np.mean(reached)) if reached else None,
        "steps_deviation": deviation(reached),
        "accuracy_mean": float(accuracy[:, -1].mean()),
        "accuracy_deviation": deviation(accuracy[:, -1]),
        "diverged": int((~np.isfinite(loss).all(-1)).sum()),
        "steps": steps,
        "test_accuracy": accuracy.tolist(),
        "train_loss": loss.tolist(),
    }


def deviation(values: Any) -> float | None:
    """Sample standard deviation; None of fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def plus_minus(mean: float | None, spread: float | None, digits: int) -> str:
    """mean ± deviation, as far as there are any."""
    if mean is None:
        return "–"
    return f"{mean:.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def table(results: Results) -> Any:
    """Per learning rate and network: steps to the target, and final test accuracy."""
    from rich.table import Table

    shown = Table(
        title=f"MNIST digits, test accuracy in {results.configuration['steps']} steps of SGD",
        caption="Mean ± standard deviation over seeds; of steps, over the seeds that reached the target. "
        "Diverged: the loss became NaN or infinite.",
    )
    shown.add_column("learning rate", justify="right")
    shown.add_column("network")
    for column in (f"steps to {TARGET:.0%}", "reached it", "final accuracy / %", "diverged"):
        shown.add_column(column, justify="right")
    rows = sorted(results.rows, key=lambda row: row["learning_rate"])
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        shown.add_row(
            f"{row['learning_rate']:g}",
            row["network"],
            plus_minus(row["steps_mean"], row["steps_deviation"], 0),
            f"{row['reached']} of {row['seeds']}",
            plus_minus(100 * row["accuracy_mean"], 100 * row["accuracy_deviation"], 1),
            f"{row['diverged']} of {row['seeds']}",
            end_section=after is not None and after["learning_rate"] != row["learning_rate"],
        )
    return shown


def found(results: Results) -> list[str]:
    """The fewest steps to the target, and the learning rates at which every seed reaches it."""
    fewest, working = [], []
    for network in NETWORKS:
        rows = [row for row in results.rows if row["network"] == network and row["reached"] == row["seeds"]]
        steps = f"{min(row['steps_mean'] for row in rows):.0f} steps" if rows else "never"
        fewest.append(f"{steps} with {network}")
        rates = ", ".join(f"{row['learning_rate']:g}" for row in rows) or "no learning rate"
        working.append(f"{rates} with {network}")
    return [
        f"{100 * TARGET:g} % test accuracy, at the fastest learning rate: {', '.join(fewest)} (mean over seeds).",
        f"Learning rates at which every seed reaches it: {'; '.join(working)}.",
    ]


def figure(results: Results) -> Any:
    """Above, test accuracy over steps at each learning rate; below, its end and the steps to the target."""
    plt = pyplot()
    told = results.configuration
    rates, total = told["learning_rates"], told["steps"]
    rows = {(row["network"], row["learning_rate"]): row for row in results.rows}
    fig = plt.figure(figsize=(9.2, 6.6), layout="constrained")
    title = f"A small CNN on MNIST digits, {total} steps, {told['seeds']} seeds"
    fig.suptitle(title, x=0.005, ha="left")
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.15), hspace=0.03)

    panels = above.subplots(1, len(rates), sharex=True, sharey=True, squeeze=False, gridspec_kw=GAP)[0]
    for axes, rate in zip(panels, rates, strict=True):
        axes.set_title(f"learning rate {rate:g}")
        axes.axhline(100 * TARGET, color=GREY, linewidth=0.8, linestyle=DASHES)
        for network, color in NORM_COLORS.items():
            if (network, rate) in rows:
                curves = 100 * np.array(rows[network, rate]["test_accuracy"])
                steps = told["evaluate_every"] * np.arange(1, curves.shape[1] + 1)
                band(axes, steps, curves.mean(0), curves.std(0, ddof=1), color)
        axes.set(xlabel="training steps", xlim=(0, total), ylim=(0, 100), xticks=(0, total // 2, total))
    panels[0].set_ylabel("test accuracy / %")
    panels[-1].text(total, 100 * TARGET + 1.5, f"{TARGET:.0%}", color=GREY, ha="right", fontsize="small")
    panels[0].text(0.97 * total, 74, "batch norm", color=BLUE, ha="right", weight="bold")
    panels[0].text(0.97 * total, 3, "no norm", color=VERMILION, ha="right", weight="bold")
    final, speed = below.subplots(1, 2)
    never = 1.1 * total  # where the seeds that did not reach the target are drawn
    for network, color, shift in zip(NORM_COLORS, NORM_COLORS.values(), (0.91, 1.1), strict=True):
        done = [rows[network, rate] for rate in rates if (network, rate) in rows]
        for row in done:
            x = shift * row["learning_rate"] * np.geomspace(0.94, 1.06, row["seeds"])
            scatter = {"color": color, "s": 16, "alpha": 0.6, "linewidths": 0, "clip_on": False}
            final.scatter(x, [100 * curve[-1] for curve in row["test_accuracy"]], **scatter)
            speed.scatter(x, [never if count is None else count for count in row["steps"]], **scatter)
        for axes, key, unit in ((final, "accuracy_mean", 100), (speed, "steps_mean", 1)):
            means = [(shift * row["learning_rate"], unit * row[key]) for row in done if row[key] is not None]
            if means:
                axes.plot(*zip(*means, strict=True), color=color)
    for axes in (final, speed):
        axes.set(xscale="log", xlabel="learning rate", xlim=(rates[0] / 1.5, rates[-1] * 1.5))
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
    final.set_title("final test accuracy")
    final.set(ylabel="test accuracy / %", ylim=(0, 100))
    speed.set_title(f"steps to {TARGET:.0%} test accuracy")
    ticks = np.linspace(0, total, 5)
    speed.set_yticks([*ticks, never], [*(f"{tick:g}" for tick in ticks), "not reached"])
    speed.set(ylabel="training steps", ylim=(0, 1.15 * total))
    caption = (
        "Above: mean ± standard deviation over seeds. Below: a dot for each\n"
        "seed, a line through the means (of steps: over the seeds that\nreached the target)."
    )
    below.supxlabel(caption, x=0.005, ha="left", fontsize="small", color=GREY)
    return fig
