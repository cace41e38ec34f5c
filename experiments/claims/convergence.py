"""Does batch norm reach the same accuracy in fewer steps?

Ioffe and Szegedy's MNIST network (three layers of 100 units) on 4,000 digits, plain SGD in batches of 60, with
batch norm and without, with their sigmoids and with relu. Every network trains at every learning rate of a grid,
the same for both methods; each method takes the rate at which a first group of seeds reached the target soonest,
and is measured on the other seeds. A seed gives both methods the same order of the digits. Where a run never
reaches the target, the number of steps of the whole run stands for it: if that run is without batch norm, the effect is
at least what is told; if it is with it, at most.
"""

from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.framework.claim import Claim, Rule
from experiments.framework.plots import DASHES, GREY, NORM_COLORS, lines, name, pyplot
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import MLP, NORMS
from experiments.material.train import Schedule, seeds, train, wait

FASTER = Rule(supported=(1.1, np.inf), contradicted=(0, 1))
IOFFE = "Ioffe & Szegedy 2015, "
RATIO = {"unit": "×", "ratio": True, "rule": FASTER}
EFFECT = "steps to 90 % test accuracy without batch norm, over those with it"
CLAIMS = {
    "sigmoid": Claim(
        says="A network of sigmoids reaches the same accuracy in fewer steps with batch norm.",
        source=IOFFE + "figure 1a (MNIST)",
        effect=EFFECT,
        **RATIO,
    ),
    "relu": Claim(
        says="A network of relus reaches the same accuracy in fewer steps with batch norm.",
        source=IOFFE + "section 4.2.2 (Inception: 14 times fewer)",
        effect=EFFECT,
        **RATIO,
    ),
}
CAPTION = (
    "Test accuracy over training steps, each network at its own best learning rate, with sigmoids and with relu; "
    "mean over seeds with its 95 % interval."
)
ACTIVATIONS = {"sigmoid": nn.sigmoid, "relu": nn.relu}
LABELS = {"batch norm": 82, "no norm": 25}  # per cent: clear of the curves


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 3 if quick else 12,
        "choosing_seeds": 1 if quick else 4,
        "learning_rates": {"sigmoid": (0.1, 0.3, 1.0, 3.0), "relu": (0.03, 0.1, 0.3, 1.0)},
        "steps": {"sigmoid": 20, "relu": 20} if quick else {"sigmoid": 1500, "relu": 400},
        "features": (16,) if quick else (100, 100, 100),
        "target": 0.5 if quick else 0.9,
        "batch_size": 60,
        "evaluate_every": 10,
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"activation": activation, "network": network} for activation in ACTIVATIONS for network in NORMS]


def schedule_of(part: dict[str, Any], configuration: dict[str, Any]) -> Schedule:
    """Sigmoids without batch norm learn slowly: they get more steps."""
    steps = configuration["steps"][part["activation"]]
    return Schedule(steps, configuration["batch_size"], configuration["evaluate_every"])


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy (seeds, rates, evaluations)."""
    model = MLP(NORMS[part["network"]], configuration["features"], activation=ACTIVATIONS[part["activation"]])
    schedule = schedule_of(part, configuration)

    def accuracy(key: Array, rate: Array, digits: Split) -> Array:
        return train(model, optax.sgd(rate), digits, key, schedule).found

    every = jax.vmap(jax.vmap(accuracy, (None, 0, None)), (0, None, None))
    rates = np.array(configuration["learning_rates"][part["activation"]], np.float32)
    return {"accuracy": wait(jax.jit(every)(seeds(configuration), rates, load_digits()))}


def steps_to_target(row: dict[str, Any], configuration: dict[str, Any]) -> np.ndarray:
    """(seeds, rates): the first evaluated step at or above the target, or all steps where there is none."""
    schedule = schedule_of(row, configuration)
    above = np.array(row["accuracy"]) >= configuration["target"] - 1e-6  # 0.9 is less than that in single precision
    return np.where(above.any(-1), schedule.evaluate_every * (1 + above.argmax(-1)), schedule.steps)


def best(row: dict[str, Any], configuration: dict[str, Any]) -> int:
    """The learning rate, as an index, at which the choosing seeds reach the target soonest in the mean."""
    return int(steps_to_target(row, configuration)[: configuration["choosing_seeds"]].mean(0).argmin())


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    found = {}
    for activation in ACTIVATIONS:
        steps = {}
        for network in NORMS:
            row = find(rows, activation=activation, network=network)
            measured = steps_to_target(row, configuration)[configuration["choosing_seeds"] :]
            steps[network] = measured[:, best(row, configuration)]
        found[activation] = (steps["no norm"] / steps["batch norm"]).tolist()
    return found


def figure(results: Any) -> Any:
    told = results.configuration
    fig, panels = pyplot().subplots(1, 2, figsize=(7.2, 3), sharey=True, layout="constrained")
    panels[1].tick_params(labelleft=True)  # a narrow page shows it below the other
    for axes, activation in zip(panels, ACTIVATIONS, strict=True):
        axes.set_title(activation)
        axes.axhline(100 * told["target"], color=GREY, linewidth=0.8, linestyle=DASHES)
        total = told["steps"][activation]
        steps = np.arange(told["evaluate_every"], total + 1, told["evaluate_every"])
        for network, color in NORM_COLORS.items():
            row = find(results.rows, activation=activation, network=network)
            index = best(row, told)
            curves = 100 * np.array(row["accuracy"])[told["choosing_seeds"] :, index]
            lines(axes, steps, curves, color)
            label = f"{network},\nlearning rate {told['learning_rates'][activation][index]:g}"
            name(axes, 0.5 * total, LABELS[network], label, color, va="top")
        axes.set(xlim=(0, total), xticks=np.linspace(0, total, 3), ylim=(0, 100), xlabel="training steps")
    panels[0].text(0, 100 * told["target"] + 1, f" {told['target']:.0%}", color=GREY, fontsize="small")
    panels[0].set_ylabel("test accuracy / %")
    return fig
