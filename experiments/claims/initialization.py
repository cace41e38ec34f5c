"""Does batch norm make training depend less on the scale of the initial weights?

Relu networks of three hidden layers of 50 units, with batch norm and without, 300 steps of plain SGD in batches of 60
on 4,000 digits. The weights of the hidden layers, which batch norm follows, start as usual (truncated normal,
variance one over inputs) times a scale from 1e-3 to 1e3, half a decade apart; the last layer starts as usual in both.
Every network trains at four learning rates, a decade apart. A seed gives both networks the same weights and order of
the digits.

A network trains from a scale where its test accuracy ends at 90 % or more. First each scale has a learning rate of its
own, the best on a first group of seeds, and the other seeds tell how many decades of scales train (half a decade for
each scale). A diverged run is a wrong answer to every digit; 90 % is more than a last layer on hidden layers that
never moved is expected to reach. Rates far beyond those four might rescue more scales in either network.

Then batch norm alone is held to invariance: the rate that is best at scale 1 serves all scales. Batch norm's output
does not depend on the scale, but its gradient does, and so does the relative step, learning rate over scale squared
(van Laarhoven 2017): from very large weights little is learned, and at very small ones epsilon is felt.
"""

from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.framework.claim import Claim, Rule
from experiments.framework.plots import BLUE, DASHES, GREY, NORM_COLORS, VERMILION, lines, name, pyplot
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import MLP, NORMS
from experiments.material.train import Schedule, seeds, train, wait

IOFFE = "Ioffe & Szegedy 2015, "
CLAIMS = {
    "range": Claim(
        says="With batch norm more scales of the initial weights train.",
        source=IOFFE + "abstract (“be less careful about initialization”)",
        effect="decades of scales that train with batch norm, less those without",
        rule=Rule(supported=(1, np.inf), contradicted=(-np.inf, 0)),
        unit=" decades",
    ),
    "independence": Claim(
        says="With batch norm the scale of the initial weights makes no difference, at one learning rate.",
        source=IOFFE + "sections 1 and 3.3, taken to the letter",
        effect="test accuracy from scale 1, less that from the worst scale",
        rule=Rule(supported=(-np.inf, 2), contradicted=(10, np.inf)),
        unit=" points",
    ),
}
CAPTION = (
    "Final test accuracy over the scale of the initial weights, with batch norm and without. Left: each scale at its "
    "own best learning rate; dashed, the accuracy that counts as trained. Right: all scales at the rate that is best "
    "at scale 1. Mean over seeds with its 95 % interval."
)


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 3 if quick else 9,
        "choosing_seeds": 1 if quick else 3,
        "learning_rates": (0.3, 3.0) if quick else (0.003, 0.03, 0.3, 3.0),
        "per_decade": 1 if quick else 2,
        "features": (16,) if quick else (50, 50, 50),
        "target": 0.5 if quick else 0.9,
        "schedule": Schedule(steps=8 if quick else 300, batch_size=60, evaluate_every=8 if quick else 300)._asdict(),
    }


def scales(configuration: dict[str, Any]) -> np.ndarray:
    """Factors from 1e-3 to 1e3, evenly in logarithm; the middle one is exactly 1."""
    return 10 ** np.linspace(-3, 3, 6 * configuration["per_decade"] + 1)


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"network": network} for network in NORMS]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Final test accuracy (seeds, scales, rates)."""
    schedule = Schedule(**configuration["schedule"])
    standard = nn.initializers.lecun_normal()

    def accuracy(key: Array, scale: Array, rate: Array, digits: Split) -> Array:
        told: dict[str, Any] = {"kernel_init": lambda *shape_and_key: scale * standard(*shape_and_key)}
        model = MLP(NORMS[part["network"]], configuration["features"], **told)
        return train(model, optax.sgd(rate), digits, key, schedule).found[-1]

    over_rates = jax.vmap(accuracy, (None, None, 0, None))
    every = jax.vmap(jax.vmap(over_rates, (None, 0, None, None)), (0, None, None, None))
    settings = (np.float32(scales(configuration)), np.float32(configuration["learning_rates"]))
    return {"accuracy": wait(jax.jit(every)(seeds(configuration), *settings, load_digits()))}


def best(row: dict[str, Any], configuration: dict[str, Any]) -> np.ndarray:
    """(scales,): the learning rate, as an index, of the highest mean accuracy over the choosing seeds."""
    return np.array(row["accuracy"])[: configuration["choosing_seeds"]].mean(0).argmax(-1)


def tuned(row: dict[str, Any], configuration: dict[str, Any]) -> np.ndarray:
    """(measured seeds, scales): accuracy with each scale at its own best rate."""
    measured = np.array(row["accuracy"])[configuration["choosing_seeds"] :]
    return np.take_along_axis(measured, best(row, configuration)[None, :, None], -1)[..., 0]


def untuned(row: dict[str, Any], configuration: dict[str, Any]) -> np.ndarray:
    """(measured seeds, scales): accuracy with every scale at the rate that is best at scale 1."""
    index = best(row, configuration)[len(scales(configuration)) // 2]
    return np.array(row["accuracy"])[configuration["choosing_seeds"] :, :, index]


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    normed, plain = (find(rows, network=network) for network in NORMS)
    # 0.9 is less than that in single precision
    trained = [tuned(row, configuration) >= configuration["target"] - 1e-6 for row in (normed, plain)]
    more = (trained[0].sum(1) - trained[1].sum(1)) / configuration["per_decade"]
    held = untuned(normed, configuration)
    return {"range": more.tolist(), "independence": (100 * (held[:, held.shape[1] // 2] - held.min(1))).tolist()}


def figure(results: Any) -> Any:
    told = results.configuration
    fig, panels = pyplot().subplots(1, 2, figsize=(7.2, 3.2), sharey=True, layout="constrained")
    panels[1].tick_params(labelleft=True)  # a narrow page shows it below the other
    for axes, chosen in zip(panels, (tuned, untuned), strict=True):
        for network, color in NORM_COLORS.items():
            lines(axes, scales(told), 100 * chosen(find(results.rows, network=network), told), color)
        axes.set(xscale="log", xlabel="scale of the initial weights", xticks=10.0 ** np.arange(-3, 4), ylim=(0, 100))
    panels[0].axhline(100 * told["target"], color=GREY, linewidth=0.8, linestyle=DASHES)
    panels[0].set(title="each scale at its best rate", ylabel="final test accuracy / %")
    panels[0].annotate(
        "trained", (1e3, 100 * told["target"]), (0, 4), textcoords="offset points", color=GREY, ha="right"
    )
    name(panels[0], 1e-3, 80, "batch norm", BLUE)
    name(panels[0], 1e-3, 20, "no norm", VERMILION)
    panels[1].set(title="all at the rate best at scale 1")
    return fig
