"""Running averages or population statistics: which should inference use?

Ioffe and Szegedy's MNIST network (three layers of 100 units, here relus) on 4,000 digits, plain SGD in batches of 50.
While it trains, the very same weights are tested in two ways: normalized with the running averages that training left
behind, and with population statistics, taken over all 4,000 training digits for the weights as they are. For these the
digits go through the network in training's batches of 50 and each layer pools what it was given, as
`jbn.linen.recalibrate` does; one pass is a batch of 4,000 with virtual batches of 50. Running averages begin at mean 0
and variance 1, as everywhere, which is part of the lag that a user meets, so that they are not corrected for it.

Momentum, the weight of the old average, is 0.99 (Flax's default) or 0.9. It changes no weight: the two networks are
one.
The learning rate is the one at which a first group of seeds is most accurate at the end, with population statistics;
the other seeds are measured. "Early" is the first epoch, five evaluations; "the end" is the last epoch.
"""

from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from experiments.framework.claim import Claim, Rule
from experiments.framework.plots import BLUE, FAINT, GREY, ORANGE, PURPLE, key, lines, pyplot
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import MLP, BatchNorm
from experiments.material.train import Schedule, accuracy, seeds, train, wait

WU = "Wu & Johnson 2021, section 3"
POINTS = " points"
CLAIMS = {
    "early": Claim(
        says="Early in training running averages lag: population statistics test better (momentum 0.99).",
        source=WU,
        effect="test accuracy with population statistics less that with running averages, mean of the first epoch",
        rule=Rule(supported=(1, np.inf), contradicted=(-np.inf, 0)),
        unit=POINTS,
    ),
    "end": Claim(
        says="At the end of training running averages are as good as population statistics (momentum 0.99).",
        source="Ioffe & Szegedy 2015, section 3.1 (moving averages track a model as it trains)",
        effect="test accuracy with population statistics less that with running averages, mean of the last epoch",
        rule=Rule(supported=(-0.5, 0.5), contradicted=(1, np.inf)),
        unit=POINTS,
    ),
    "momentum": Claim(
        says="A shorter memory lags less: early in training momentum 0.9 tests better than 0.99.",
        source=WU,
        effect="test accuracy with running averages, momentum 0.9 less 0.99, mean of the first epoch",
        rule=Rule(supported=(1, np.inf), contradicted=(-np.inf, 0)),
        unit=POINTS,
    ),
}
CAPTION = (
    "Left: test accuracy of the same weights over training, inference with population statistics and with running "
    "averages of two momenta; mean over seeds with its 95 % interval. Right: what each running average lacks to "
    "population statistics; shaded, the epochs over which the claims are judged."
)
STATISTICS = {"population": BLUE, "0.9": ORANGE, "0.99": PURPLE}


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 3 if quick else 14,
        "choosing_seeds": 1 if quick else 4,
        "momenta": (0.9, 0.99),
        "learning_rates": (0.1, 0.3) if quick else (0.1, 0.3, 1.0),
        "features": (16,) if quick else (100, 100, 100),
        "schedule": Schedule(steps=16 if quick else 480, batch_size=50, evaluate_every=8 if quick else 16)._asdict(),
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"network": "relu"}]


def network(configuration: dict[str, Any], **options: Any) -> MLP:
    """The network, its batch norms with other options than `models` gives them."""
    return MLP(lambda **given: BatchNorm(**{**given, **options}), configuration["features"])


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy (seeds, rates, evaluations) with population statistics and running averages of each momentum."""
    schedule = Schedule(**configuration["schedule"])
    pooling = network(configuration, momentum=0.0, virtual_batch_size=schedule.batch_size)

    def accuracies(momentum: Array, key: Array, rate: Array, digits: Split) -> dict[str, Array]:
        model = network(configuration, momentum=momentum)
        right = accuracy(model, digits.test_x, digits.test_y)

        def both(variables: Any) -> dict[str, Array]:
            population = pooling.apply(variables, digits.train_x, train=True, mutable=["batch_stats"])[1]
            return {"running": right(variables), "population": right({**variables, **population})}

        return train(model, optax.sgd(rate), digits, key, schedule, evaluate=both).found

    every = jax.vmap(accuracies, (None, None, 0, None))
    every = jax.vmap(jax.vmap(every, (None, 0, None, None)), (0, None, None, None))
    rates, momenta = (np.array(configuration[name], np.float32) for name in ("learning_rates", "momenta"))
    found = wait(jax.jit(every)(momenta, seeds(configuration), rates, load_digits()))
    running = dict(zip(map(str, configuration["momenta"]), found["running"], strict=True))
    return {"population": found["population"][0], **running}  # the first: the same for every momentum


def best(row: dict[str, Any], configuration: dict[str, Any]) -> int:
    """The learning rate, as an index, at which the choosing seeds are the most accurate in the last epoch."""
    found = last_epoch(np.array(row["population"]), configuration)
    return int(found[: configuration["choosing_seeds"]].mean(0).argmax())


def curves(row: dict[str, Any], configuration: dict[str, Any]) -> dict[str, np.ndarray]:
    """Statistics → test accuracy in per cent, (measured seeds, evaluations), at the chosen rate."""
    index = best(row, configuration)
    return {
        statistics: 100 * np.array(row[statistics])[configuration["choosing_seeds"] :, index]
        for statistics in STATISTICS
    }


def epoch(configuration: dict[str, Any]) -> int:
    """Evaluations in one pass over the training digits."""
    schedule = Schedule(**configuration["schedule"])
    return len(load_digits().train_y) // schedule.batch_size // schedule.evaluate_every


def first_epoch(found: np.ndarray, configuration: dict[str, Any]) -> np.ndarray:
    """Means over the first epoch's evaluations, the last axis."""
    return found[..., : epoch(configuration)].mean(-1)


def last_epoch(found: np.ndarray, configuration: dict[str, Any]) -> np.ndarray:
    """Means over the last epoch's evaluations, the last axis."""
    return found[..., -epoch(configuration) :].mean(-1)


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    found = curves(rows[0], configuration)
    return {
        "early": first_epoch(found["population"] - found["0.99"], configuration).tolist(),
        "end": last_epoch(found["population"] - found["0.99"], configuration).tolist(),
        "momentum": first_epoch(found["0.9"] - found["0.99"], configuration).tolist(),
    }


def figure(results: Any) -> Any:
    told = results.configuration
    every, found = told["schedule"]["evaluate_every"], curves(results.rows[0], told)
    steps = every * np.arange(1, 1 + found["population"].shape[1])
    rate = told["learning_rates"][best(results.rows[0], told)]
    fig, panels = pyplot().subplots(1, 2, figsize=(7.2, 3), layout="constrained")
    for statistics, color in STATISTICS.items():
        lines(panels[0], steps, found[statistics], color)
        if statistics != "population":
            lines(panels[1], steps, found["population"] - found[statistics], color)
    for axes, title in zip(panels, ("test accuracy / %", "population less running / points"), strict=True):
        for start in (0, steps[-1] - every * epoch(told)):
            axes.axvspan(start, start + every * epoch(told), color=FAINT, alpha=0.5, linewidth=0, zorder=0)
        axes.set(title=title, xlabel=f"training steps (rate {rate:g})", xlim=(0, steps[-1]))
    panels[1].axhline(0, color=GREY, linewidth=0.8)
    labels = ("population statistics", "running averages, momentum 0.9", "running averages, momentum 0.99")
    key(panels[0], dict(zip(labels, STATISTICS.values(), strict=True)), 0.97, 0.05, ha="right", va="bottom")
    return fig
