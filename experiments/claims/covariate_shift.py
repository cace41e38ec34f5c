"""Does batch norm steady the inputs of layers, and is that why it helps?

Ioffe and Szegedy's MNIST network (three layers of 100 sigmoids) on 4,000 digits, plain SGD in batches of 60: without
batch norm, with it, and with noise after it that makes the layers' inputs unsteady on purpose, as in the counter-test
of Santurkar et al. (2018, section 2.1). In training, at every step anew, each unit of each layer draws a mean from
[-0.5, 0.5] and a scale from [1, 1.25], and each example's normalized value is multiplied by that scale and moved by
that mean, both jittered by 0.1; inference has no noise. The claims are judged with this noise; three times as much is
drawn beside it, to see how the answer depends on it. A seed gives all methods the same weights and order of digits.

What the last layer of sigmoids is given is watched on 500 training digits in training mode, for 32 of its units: the
15th, 50th and 85th percentile, as in Ioffe and Szegedy's figure 1b, c. The shift is how far these move in 20 training
steps, in the mean over units, percentiles and the run, in the units of the sigmoid's input. The gain is the test
accuracy averaged over the run, less that without batch norm, its mean over seeds, which is taken as exact; a gain below
one point counts as one point. That the noise leaves the gain speaks against stability as its cause as far as the noise
did make the inputs less steady than batch norm had made them, which the figure shows. Each method
trains at the learning rate of one grid at which a first group of seeds has the highest such average; the other seeds
are measured. A shift that is not finite counts as 1e6.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.framework.claim import Claim, Rule
from experiments.framework.plots import BLUE, ORANGE, PURPLE, VERMILION, decades, key, lines, pyplot
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import MLP, BatchNorm
from experiments.material.train import Schedule, accuracy, seeds, train, wait

SANTURKAR = "Santurkar et al. 2018, section 2.1, figure 2"
STEADIER: dict[str, Any] = {"unit": "×", "ratio": True, "rule": Rule(supported=(1.5, np.inf), contradicted=(0, 1))}
CLAIMS = {
    "steady": Claim(
        says="With batch norm the distribution of a layer's inputs is more stable as training goes on.",
        source="Ioffe & Szegedy 2015, section 4.1, figure 1b, c",
        effect="shift of the sigmoids' inputs in 20 steps, without batch norm over with it",
        **STEADIER,
    ),
    "noise": Claim(
        says="With noise after batch norm the inputs are less stable than without batch norm at all.",
        source=SANTURKAR,
        effect="shift of the sigmoids' inputs in 20 steps, with noise after batch norm over without batch norm",
        **STEADIER,
    ),
    "cause": Claim(
        says="Batch norm's gain comes from that stability: it goes where noise takes the stability away.",
        source="Ioffe & Szegedy 2015, abstract; disputed by " + SANTURKAR,
        effect="part of the gain in mean test accuracy over training that noise after batch norm takes away",
        rule=Rule(supported=(50, np.inf), contradicted=(-np.inf, 25)),
        unit=" %",
    ),
}
CAPTION = (
    "Above: 15th, 50th and 85th percentile of what one sigmoid of the last layer is given over training, in the first "
    "measured seed. Below: how far such percentiles move in 20 steps, in the mean over units, and test accuracy; means "
    "over seeds with 95 % intervals. Each method at its own best learning rate."
)
PERCENTILES = (15, 50, 85)
EXAMPLES, UNITS = 500, 32  # that are watched
MEAN, SCALE, JITTER = 0.5, 0.25, 0.1  # of noise of strength 1
STRENGTHS = {"batch norm": 0.0, "batch norm, noise": 1.0, "batch norm, noise × 3": 3.0}
NOT_FINITE = 1e6
COLORS = {"no norm": VERMILION, "batch norm": BLUE, "batch norm, noise": PURPLE, "batch norm, noise × 3": ORANGE}


class NoisyBatchNorm(nn.Module):
    """Batch norm, and in training each channel scaled and moved by noise whose distribution each call draws anew."""

    strength: Any
    use_running_average: bool
    momentum: float
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = BatchNorm(self.use_running_average, momentum=self.momentum, epsilon=self.epsilon)(x)
        # beside the running statistics, since like them it goes from step to step
        state = self.variable("batch_stats", "noise", lambda: jax.random.key_data(self.make_rng("params")))
        if self.use_running_average:
            return x
        following, now = jax.random.split(jax.random.wrap_key_data(state.value))
        state.value = jax.random.key_data(following)
        return noisy(now, x, self.strength)


def noisy(key: Array, x: Array, strength: Any) -> Array:
    """x (n, C) with noise: of a mean and a scale of each channel, jittered for each example; of strength 0 it is x."""
    keys = jax.random.split(key, 4)
    mean = jax.random.uniform(keys[0], x.shape[1:], minval=-MEAN, maxval=MEAN)
    mean = mean + jax.random.uniform(keys[1], x.shape, minval=-JITTER, maxval=JITTER)
    scale = jax.random.uniform(keys[2], x.shape[1:], maxval=SCALE) + JITTER * jax.random.normal(keys[3], x.shape)
    return x * (1 + strength * scale) + strength * mean


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 3 if quick else 13,
        "choosing_seeds": 1 if quick else 4,
        "learning_rates": (1.0, 3.0) if quick else (0.1, 0.3, 1.0, 3.0),
        "features": (UNITS,) if quick else (100, 100, 100),
        "schedule": Schedule(steps=40 if quick else 500, batch_size=60, evaluate_every=20)._asdict(),
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"network": network} for network in ("no norm", "batch norm")]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Of each method (seeds, rates, evaluations): test accuracy, one unit's percentiles (× 3), and the shift."""
    strengths = {"no norm": 0.0} if part["network"] == "no norm" else STRENGTHS
    layer = "Dense" if part["network"] == "no norm" else "NoisyBatchNorm"
    schedule = Schedule(**configuration["schedule"])

    def run(strength: Array, key: Array, rate: Array, digits: Split) -> dict[str, Array]:
        norm = None if part["network"] == "no norm" else functools.partial(NoisyBatchNorm, strength)
        model = MLP(norm, configuration["features"], activation=nn.sigmoid)
        right = accuracy(model, digits.test_x, digits.test_y)

        def evaluate(variables: Any) -> tuple[Array, Array]:
            given = inputs_of(
                model, variables, digits.train_x[:EXAMPLES], f"{layer}_{len(configuration['features']) - 1}"
            )
            return right(variables), jnp.percentile(given[:, :UNITS], jnp.array(PERCENTILES), axis=0)

        found, watched = train(model, optax.sgd(rate), digits, key, schedule, evaluate=evaluate).found
        return {"accuracy": found, "one_unit": watched[..., 0], "shift": shift(watched)}

    every = jax.vmap(jax.vmap(run, (None, None, 0, None)), (None, 0, None, None))
    every = jax.jit(jax.vmap(every, (0, None, None, None)))
    rates, noise = (np.array(list(x), np.float32) for x in (configuration["learning_rates"], strengths.values()))
    found = wait(every(noise, seeds(configuration), rates, load_digits()))
    return {"found": {name: jax.tree.map(operator.itemgetter(i), found) for i, name in enumerate(strengths)}}


def inputs_of(model: nn.Module, variables: Any, x: Any, layer: str) -> Array:
    """What the activation after `layer` is given in training mode, (n, C)."""
    updates: Any = model.apply(
        variables, x, train=True, capture_intermediates=True, mutable=["batch_stats", "intermediates"]
    )[1]
    return updates["intermediates"][layer]["__call__"][0]


def shift(watched: Any) -> Any:
    """(evaluations - 1,): how far percentiles (evaluations, 3, units) move, in the mean."""
    return abs(watched[1:] - watched[:-1]).mean((1, 2))


def methods(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was found of each method, in the order of COLORS."""
    return {method: found for row in rows for method, found in row["found"].items()}


def best(found: dict[str, Any], configuration: dict[str, Any]) -> int:
    """The learning rate, as an index, at which the choosing seeds have the highest accuracy over the run."""
    return int(np.array(found["accuracy"])[: configuration["choosing_seeds"]].mean((0, 2)).argmax())


def chosen(found: dict[str, Any], what: str, configuration: dict[str, Any]) -> np.ndarray:
    """(measured seeds, evaluations, ...) at the chosen rate."""
    values = np.array(found[what], np.float64)[configuration["choosing_seeds"] :, best(found, configuration)]
    return np.where(np.isfinite(values), values, NOT_FINITE)  # None became NaN


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    shifts, accuracies = (
        {method: chosen(found, what, configuration).mean(1) for method, found in methods(rows).items()}
        for what in ("shift", "accuracy")
    )
    gain = max((accuracies["batch norm"] - accuracies["no norm"]).mean(), 0.01)
    return {
        "steady": (shifts["no norm"] / shifts["batch norm"]).tolist(),
        "noise": (shifts["batch norm, noise"] / shifts["no norm"]).tolist(),
        "cause": (100 * (accuracies["batch norm"] - accuracies["batch norm, noise"]) / gain).tolist(),
    }


def figure(results: Any) -> Any:
    told, found = results.configuration, methods(results.rows)
    fig = pyplot().figure(figsize=(7.2, 5), layout="constrained")
    upper, lower = fig.subfigures(2, 1)
    panels = upper.subplots(1, len(found), sharey=True)
    steps = told["schedule"]["evaluate_every"] * np.arange(1, 1 + np.shape(found["no norm"]["accuracy"])[-1])
    moved, right = lower.subplots(1, 2)
    for axes, (method, color) in zip(panels, COLORS.items(), strict=True):
        rate = told["learning_rates"][best(found[method], told)]
        axes.set(title=method.replace(", ", ",\n"), xlabel=f"steps (rate {rate:g})")
        percentiles = chosen(found[method], "one_unit", told)[0]
        axes.plot(steps, percentiles, color=color)
        axes.fill_between(steps, percentiles[:, 0], percentiles[:, 2], color=color, alpha=0.12, linewidth=0)
        lines(moved, steps[1:], np.log10(chosen(found[method], "shift", told)), color)
        lines(right, steps, 100 * chosen(found[method], "accuracy", told), color)
    panels[0].set_ylabel("input of one sigmoid")
    moved.set(title="shift of inputs in 20 steps", xlabel="training steps")
    decades(moved)
    right.set(title="test accuracy / %", xlabel="training steps", ylim=(0, 100))
    key(right, COLORS, 0.97, 0.05, ha="right", va="bottom")
    return fig
