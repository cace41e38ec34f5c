"""Should batch norm come before or after the activation, and is a bias before it of any use?

Three hidden layers of 64 units, each dense → batch norm → activation (as Ioffe and Szegedy place it) or dense →
activation → batch norm, with relu and with sigmoid; 500 steps of SGD in batches of 60 on 4,000 digits, the learning
rate falling linearly to zero so that the end is no accident of the last batch. Every network trains at every rate of
one grid; each placement takes the rate with the highest mean test accuracy over a first group of seeds and is measured
on the others, whose final test accuracies are compared. A seed gives all networks the same weights and order of the
digits. A diverged run is a wrong answer to every digit. Both placements have a bias in the dense layer: after the
activation it is of use, before batch norm it is what is tested.

Batch norm subtracts the mean, so a bias before it changes nothing and its gradient, in exact arithmetic, is zero. Its
computed gradient is compared with that of batch norm's own bias, in the same layer (largest component of each, worst
layer and activation), in the course of training, on 60 digits. The same networks train without the bias
too: the figure shows what removing it changes, in theory nothing but rounding, which training amplifies.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.framework.claim import Claim, Rule
from experiments.framework.plots import BLUE, GREY, ORANGE, SKY, lines, pyplot
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import EPSILON, MOMENTUM, BatchNorm
from experiments.material.train import Schedule, accuracy, cross_entropy, seeds, train, wait

EPS = float(np.finfo(np.float32).eps)
IOFFE = "Ioffe & Szegedy 2015, section 3.2"
# caffenet-benchmark reports 47.4 % before and 49.9 % after, GoogLeNet 60.7 and 59.6: errors change by some 4 %, which
# of an error of 6 % is a quarter of a point
RULE = Rule(supported=(0.25, np.inf), contradicted=(-np.inf, -0.25))
EFFECT = "test accuracy with batch norm before the activation, less that with it after"
CLAIMS = {
    "relu": Claim(
        says="Batch norm is better before a relu than after it.",
        source=IOFFE + " (disputed: Mishkin et al. 2017, on ImageNet)",
        effect=EFFECT,
        rule=RULE,
        unit=" points",
    ),
    "sigmoid": Claim(
        says="Batch norm is better before a sigmoid than after it.",
        source=IOFFE,
        effect=EFFECT,
        rule=RULE,
        unit=" points",
    ),
    "bias": Claim(
        says="A bias just before batch norm is useless: its gradient is zero.",
        source=IOFFE + " (“the bias b can be ignored”)",
        effect="gradient of that bias over that of batch norm's own, in units of float32's epsilon",
        rule=Rule(supported=(0, 100), contradicted=(1e4, np.inf)),  # sums over 60 examples; 1e4 are 0.1 %
        unit=" eps",
    ),
}
CAPTION = (
    "Left, middle: test accuracy at the end of training over the learning rate, batch norm before and after the "
    "activation, and before it without the dense layer's bias; dots, the rate that each is measured at; mean over "
    "seeds with its 95 % interval. Right: largest gradient of the dense layer's bias over that of batch norm's, with "
    "batch norm before and after the activation; a dot for each seed."
)
ACTIVATIONS = ("relu", "sigmoid")
BEFORE, AFTER, NO_BIAS = "before", "after", "before, no bias"
COLORS = {BEFORE: BLUE, AFTER: ORANGE, NO_BIAS: SKY}


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 3 if quick else 12,
        "choosing_seeds": 1 if quick else 3,
        "learning_rates": (0.3, 3.0) if quick else (0.1, 0.3, 1.0, 3.0, 10.0, 30.0),
        "features": (16,) if quick else (64, 64, 64),
        "placements": (BEFORE, AFTER) if quick else (BEFORE, AFTER, NO_BIAS),
        "schedule": Schedule(steps=8 if quick else 500, batch_size=60, evaluate_every=4 if quick else 100)._asdict(),
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"placement": placement} for placement in configuration["placements"]]


class Network(nn.Module):
    """Dense layers with batch norm before or after the activation, then 10 logits.

    `is_after` and `is_relu` (else sigmoid) may be traced, so that all choices are one compiled function.
    """

    features: Sequence[int]
    use_bias: bool
    is_after: Any
    is_relu: Any

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        def activation(x: Array, here: Any) -> Array:
            return jnp.where(here, jnp.where(self.is_relu, nn.relu(x), nn.sigmoid(x)), x)

        x = x.reshape(x.shape[0], -1)
        for features in self.features:
            x = activation(nn.Dense(features, use_bias=self.use_bias)(x), self.is_after)
            x = BatchNorm(use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON)(x)
            x = activation(x, ~self.is_after)
        return nn.Dense(10)(x)


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Test accuracy, and the dense layers' `bias_gradient`, (seeds, activations, rates, evaluations)."""
    static = (tuple(configuration["features"]), part["placement"] != NO_BIAS, Schedule(**configuration["schedule"]))
    is_after, is_relu = np.bool_(part["placement"] == AFTER), np.array([each == "relu" for each in ACTIVATIONS])
    rates = np.float32(configuration["learning_rates"])
    return wait(trainings(*static, seeds(configuration), is_after, is_relu, rates, load_digits()))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def trainings(
    features: Sequence[int],
    use_bias: bool,
    schedule: Schedule,
    keys: Array,
    is_after: Array,
    is_relu: Array,
    rates: Array,
    digits: Split,
) -> dict[str, Array]:
    """What `measure` returns, of one training for each of the keys, activations and rates."""
    falling = optax.linear_schedule(1, 0, schedule.steps)
    x, y = digits.train_x[: schedule.batch_size], digits.train_y[: schedule.batch_size]

    def one(key: Array, is_relu: Array, rate: Array) -> dict[str, Array]:
        model = Network(features, use_bias, is_after, is_relu)
        right = accuracy(model, digits.test_x, digits.test_y)

        def evaluate(variables: Any) -> dict[str, Array]:
            found = {"accuracy": right(variables)}
            return {**found, "bias": bias_gradient(model, variables, x, y)} if use_bias else found

        optimizer = optax.chain(optax.sgd(rate), optax.scale_by_schedule(falling))
        return train(model, optimizer, digits, key, schedule, evaluate=evaluate).found

    over_rates = jax.vmap(one, (None, None, 0))
    return jax.vmap(jax.vmap(over_rates, (None, 0, None)), (0, None, None))(keys, is_relu, rates)


def bias_gradient(model: nn.Module, variables: Any, x: Array, labels: Array) -> Array:
    """Largest gradient of a hidden dense layer's bias over the largest of its batch norm's bias, in the worst layer."""

    def loss(params: Any) -> Array:
        logits: Any = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])[0]
        return cross_entropy(logits, labels)

    gradient = jax.grad(loss)(variables["params"])
    layers = sum(layer.startswith("BatchNorm") for layer in gradient)
    largest = [
        [jnp.abs(gradient[f"{kind}_{layer}"]["bias"]).max() for layer in range(layers)]
        for kind in ("Dense", "BatchNorm")
    ]
    return (jnp.stack(largest[0]) / jnp.stack(largest[1])).max()


def chosen(row: dict[str, Any], activation: str, configuration: dict[str, Any]) -> tuple[np.ndarray, int]:
    """The measured seeds' final accuracies / %, (seeds, rates), and the choosing seeds' best rate, as an index."""
    accuracies = 100 * np.array(row["accuracy"])[:, ACTIVATIONS.index(activation), :, -1]
    first = configuration["choosing_seeds"]
    return accuracies[first:], int(accuracies[:first].mean(0).argmax())


def bias_ratio(row: dict[str, Any], configuration: dict[str, Any]) -> np.ndarray:
    """(measured seeds, activations, evaluations): the biases' gradients at the best rate."""
    ratios = np.array(row["bias"], np.float64)[configuration["choosing_seeds"] :]
    best = [chosen(row, activation, configuration)[1] for activation in ACTIVATIONS]
    return np.stack([ratios[:, i, index] for i, index in enumerate(best)], 1)


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    before, after = (find(rows, placement=placement) for placement in (BEFORE, AFTER))
    found = {}
    for activation in ACTIVATIONS:
        both = (chosen(row, activation, configuration) for row in (before, after))
        ends = [accuracies[:, best] for accuracies, best in both]
        found[activation] = (ends[0] - ends[1]).tolist()
    return {**found, "bias": (bias_ratio(before, configuration).max((1, 2)) / EPS).tolist()}


def figure(results: Any) -> Any:
    told = results.configuration
    fig = pyplot().figure(figsize=(7.2, 3.2), layout="constrained")
    relu, sigmoid, gradients = fig.subplots(1, 3, width_ratios=(3, 3, 2))
    rows = {placement: find(results.rows, placement=placement) for placement in told["placements"]}
    for axes, activation in ((relu, "relu"), (sigmoid, "sigmoid")):
        tops = []
        for placement, row in rows.items():
            accuracies, best = chosen(row, activation, told)
            dashes: dict[str, Any] = {"linestyle": (0, (2, 2))} if placement == NO_BIAS else {}
            lines(axes, told["learning_rates"], accuracies, COLORS[placement], **dashes)
            tops.append(accuracies[:, best].mean())
            axes.plot(told["learning_rates"][best], tops[-1], "o", color=COLORS[placement], zorder=3 - 0.5 * len(tops))
        axes.set(title=activation, xscale="log", xlabel="learning rate at the start")
        axes.set(ylim=(max(tops) - 10, max(tops) + 1))  # below that, diverged
        axes.set_xticks(told["learning_rates"], [f"{rate:g}" for rate in told["learning_rates"]])
        axes.minorticks_off()
    relu.set_ylabel("final test accuracy / %")
    for line, placement in enumerate(rows):
        where = (0.03, 0.22 - 0.08 * line)
        relu.annotate(placement, where, xycoords="axes fraction", color=COLORS[placement], weight="bold")
    for place, placement in enumerate((BEFORE, AFTER)):
        ratio = bias_ratio(rows[placement], told).max((1, 2))
        gradients.plot(np.full(len(ratio), place), ratio, "o", color=COLORS[placement], alpha=0.5)
    gradients.axhline(EPS, color=GREY, linewidth=0.8)
    gradients.annotate("float32's epsilon", (-0.5, EPS), (0, -9), textcoords="offset points", color=GREY)
    gradients.set(title="gradient of the bias", ylabel="over that of batch norm's bias", yscale="log", ylim=(1e-8, 1e2))
    gradients.set(xlim=(-0.6, 1.6), xticks=(0, 1), xticklabels=(BEFORE, AFTER))
    return fig
