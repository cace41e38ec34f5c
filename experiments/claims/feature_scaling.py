"""Does a network need scaled features, and does batch norm at its input scale them well enough?

Twelve features of an hour (day 0 to 730, hour 0 to 23, humidity in %, three flags of the weather, …) predict the
logarithm of 1 + the bikes rented in it. One small relu network, without norm inside, is trained on the features in
their natural units, on each of four scalings (of `jbn.scaling`, fitted to the training hours), and on natural units
with batch norm as its first layer. Weights, order of the hours, steps and the target (standardized) are the same for
all. Every network trains at every learning rate of one wide grid (falling linearly to 0, so that the noise of the last
steps does not drown what is compared), with plain SGD and with Adam, which undoes the scale of each gradient; each
method takes the rate at which a first group of seeds tested best, and is measured on the other seeds. R² is
1 − squared error / variance of the target, on hours of days that are not trained on. Where it is below 0 or not a
number (a run that diverged), 0 stands for it, which is what predicting the mean gives: so where it is the natural units
that fail, the effect of scaling is at least what is told.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.framework.claim import Claim, Rule, interval
from experiments.framework.plots import (
    BLUE,
    DASHES,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    SKY,
    VERMILION,
    lines,
    name,
    pyplot,
    samples,
)
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.bikes import load_bikes
from experiments.material.models import EPSILON, MLP, MOMENTUM
from experiments.material.train import Schedule, seeds, train, wait
from jbn import scaling
from jbn.linen import BatchNorm

HELPS = Rule(supported=(5, np.inf), contradicted=(-np.inf, 0))
LECUN = "LeCun et al. 1998 (Efficient BackProp), section 4.3"
GAIN = "test R² on standardized features, less that on natural units, each at its best rate, 100 × R²"
CLAIMS = {
    "sgd": Claim(
        says="Features in their natural units slow or break training by SGD.",
        source=f"{LECUN}; Ioffe & Szegedy 2015, section 2",
        effect=GAIN,
        unit=" points",
        rule=HELPS,
    ),
    "adam": Claim(
        says="They do so with Adam too, although it rescales each gradient.",
        source="the opposite of Kingma & Ba 2015, abstract: invariant to diagonal rescaling of the gradients",
        effect=GAIN,
        unit=" points",
        rule=HELPS,
    ),
    "batch norm": Claim(
        says="Batch norm as the first layer does as well as standardized features (within 2 points, SGD).",
        source="Ioffe & Szegedy 2015, sections 2 and 3: each feature to mean 0 and variance 1, by mini-batch",
        effect="test R² with batch norm at the input, less that on standardized features, 100 × R²",
        unit=" points",
        rule=Rule(supported=(-2, np.inf), contradicted=(-np.inf, -2)),
    ),
}
CAPTION = (
    "Left: test R² of each method at its own best learning rate, by SGD (filled) and Adam (hollow). Middle and right: "
    "over all learning rates. Mean over seeds with its 95 % interval; 0 stands for runs that diverged, or are worse "
    "than predicting the mean."
)
OPTIMIZERS = ("SGD", "Adam")
UNSCALED = ("batch norm", "natural units")  # what the network is given
COLORS = {
    "standardize": GREEN,
    "batch norm": BLUE,
    "mean normalize": SKY,
    "min-max": ORANGE,
    "unit length": PURPLE,
    "natural units": VERMILION,
}


class Regression(nn.Module):
    """A number predicted by an `MLP` without norm; with batch norm in front of it if `normalize`."""

    features: tuple[int, ...]
    normalize: bool

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        if self.normalize:
            x = BatchNorm(use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON)(x)
        return MLP(None, self.features, outputs=1)(x, train)[:, 0]


def scaled(method: str, x: Array, fitted_to: Array) -> Array:
    """`x` as the network of this method sees it; a scaling learned from `fitted_to` alone."""
    if method in UNSCALED:
        return x
    if method == "unit length":
        return scaling.unit_length(x)
    kind: Any = method.replace("-", "_").replace(" ", "_")
    return scaling.apply(scaling.fit(kind, fitted_to), x)


def prepared(method: str) -> Split:
    """The hours with their features as this method has them, and the standardized target."""
    train_x, train_y, test_x, test_y = map(jnp.asarray, load_bikes())
    y, test_y = (jnp.log1p(counts)[:, None] for counts in (train_y, test_y))
    target = scaling.fit("standardize", y)
    return Split(
        scaled(method, train_x, train_x),
        scaling.apply(target, y)[:, 0],
        scaled(method, test_x, train_x),
        scaling.apply(target, test_y)[:, 0],
    )


def configuration(quick: bool) -> dict[str, Any]:
    steps = 8 if quick else 1000
    return {
        "seeds": 3 if quick else 30,
        "choosing_seeds": 1 if quick else 10,
        "learning_rates": (1e-6, 0.1) if quick else tuple(float(f"{10**e:.2g}") for e in np.arange(-6, 0.1, 0.5)),
        "features": (8,) if quick else (32, 32),
        "methods": ("standardize", "batch norm", "natural units") if quick else tuple(COLORS),
        "schedule": Schedule(steps, batch_size=64, evaluate_every=steps)._asdict(),
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"optimizer": name, "method": method} for name in OPTIMIZERS for method in configuration["methods"]]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Test R² at the end (seeds, rates), and how many runs of each rate it was 0 for."""
    model = Regression(tuple(configuration["features"]), part["method"] == "batch norm")
    rates = np.array(configuration["learning_rates"], np.float32)
    schedule = Schedule(**configuration["schedule"])
    adam = part["optimizer"] == "Adam"
    found = wait(every(model, schedule, seeds(configuration), rates, adam, prepared(part["method"])))
    return {"r2": found, "failed": (found == 0).sum(0)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def every(model: nn.Module, schedule: Schedule, keys: Array, rates: Array, adam: bool | Array, hours: Split) -> Array:
    """Test R² (seeds, rates); compiled twice in all, with batch norm and without."""

    def score(variables: Any) -> Array:
        return r_squared(model.apply(variables, hours.test_x, train=False), hours.test_y)

    def run(key: Array, rate: Array) -> Array:
        falling = optax.scale_by_learning_rate(optax.linear_schedule(rate, 0, schedule.steps))
        optimizer = optax.chain(adam_if(adam), falling)
        return train(model, optimizer, hours, key, schedule, loss=mse, evaluate=score).found[-1]

    return jax.vmap(jax.vmap(run, (None, 0)), (0, None))(keys, rates)


def adam_if(wanted: bool | Array) -> optax.GradientTransformation:
    """Adam's rescaling of the gradient, or nothing (then what follows is plain SGD); the choice may be traced."""
    adam = optax.scale_by_adam()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        rescaled, state = adam.update(updates, state, params)
        return jax.tree.map(lambda new, old: jnp.where(wanted, new, old), rescaled, updates), state

    return optax.GradientTransformation(adam.init, update)


def mse(outputs: Array, targets: Array) -> Array:
    return jnp.square(outputs - targets).mean()


def r_squared(predicted: Any, y: Array) -> Array:
    """1 − mean squared error / variance; 0 where that is less, or not a number."""
    value = 1 - jnp.square(predicted - y).mean() / y.var()
    return jnp.where(value > 0, value, 0)


def at_best(rows: list[dict[str, Any]], configuration: dict[str, Any], **wanted: str) -> tuple[float, np.ndarray]:
    """The learning rate at which the choosing seeds test best, and R² of the other seeds there."""
    r2, choosing = np.array(find(rows, **wanted)["r2"]), configuration["choosing_seeds"]
    index = int(r2[:choosing].mean(0).argmax())
    return configuration["learning_rates"][index], r2[choosing:, index]


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    def points(optimizer: str, method: str) -> np.ndarray:
        return 100 * at_best(rows, configuration, optimizer=optimizer, method=method)[1]

    return {
        "sgd": (points("SGD", "standardize") - points("SGD", "natural units")).tolist(),
        "adam": (points("Adam", "standardize") - points("Adam", "natural units")).tolist(),
        "batch norm": (points("SGD", "batch norm") - points("SGD", "standardize")).tolist(),
    }


def figure(results: Any) -> Any:
    told = results.configuration
    colors = {method: color for method, color in COLORS.items() if method in told["methods"]}
    fig, panels = pyplot().subplots(1, 3, figsize=(7.2, 3), width_ratios=(1, 1.1, 1.1), layout="constrained")
    best, *over_rates = panels
    best.set(
        title="at the best rate", xlabel="test R²", xlim=(0, 1), xticks=(0, 0.5, 1), ylim=(len(colors) - 0.5, -0.6)
    )
    best.set_yticks(range(len(colors)), colors)
    for label, color in zip(best.get_yticklabels(), colors.values(), strict=True):
        label.set(color=color, weight="bold")
    for shift, optimizer, axes in zip((-0.13, 0.13), OPTIMIZERS, over_rates, strict=True):
        axes.set(title=f"{optimizer}, over all rates", xscale="log", ylim=(0, 1), xlabel="learning rate")
        for place, (method, color) in enumerate(colors.items()):
            _, r2 = at_best(results.rows, told, optimizer=optimizer, method=method)
            low, middle, high = interval(r2.tolist())
            filling = color if optimizer == "SGD" else "white"
            best.plot((low, high), (place + shift,) * 2, color=color)
            best.plot(middle, place + shift, "o", color=color, markerfacecolor=filling, markersize=5)
            if place == len(colors) - 1:
                name(best, high, place + shift, optimizer, color, xytext=(7, 0), fontsize=8)
            curves = np.array(find(results.rows, optimizer=optimizer, method=method)["r2"])[told["choosing_seeds"] :]
            style = "-" if method in UNSCALED else DASHES
            lines(axes, told["learning_rates"], curves, color, linestyle=style)
    over_rates[0].set_ylabel("test R²")
    drawn = {"scaled features": {"color": GREY, "linestyle": DASHES}, "natural units,\nor batch norm": {"color": GREY}}
    samples(over_rates[0], drawn, loc="upper left")
    return fig
