"""Do gradients reach the early layers through batch norm, and do they explode with depth?

All at initialization, nothing is trained. On digits: ten layers of 100 units, one batch of 60 digits for each seed,
the norm of the gradient of each layer's weights, with batch norm and without. Sigmoids have Flax's standard weights
(variance 1 / fan-in), relus He's (2 / fan-in), made for relus without norm: they are drawn, and no claim rests on them.

Against theory: square layers of Gaussian weights, batch norm with scale 1 and bias 0 after each, then relu or nothing;
inputs are what such a layer makes of Gaussian noise, the gradient of the outputs is Gaussian noise. That is where the
theory holds: the batch at the fixed point of the forward pass, width without bound, and weights that the backward
pass meets as if drawn anew. Between the first layer and the last the
squared norm of the gradient of a layer's outputs before normalization grows at a rate per layer, (‖first‖² /
‖last‖²)^(1 / layers between), for each seed and batch size B. Theory, for relu and with J0, J1 the arc-cosine
kernels of correlation c = -1 / (B - 1), expects ((B - 1 + J0) / (1 - J1) - 1) / (B - 3), which falls to π / (π - 1) as
B grows, and for linear layers (B - 2) / (B - 3). A rate close to 1 is close to theory's by itself, therefore logarithms
are compared: 1 is theory's explosion, 0 none at all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from experiments.framework.claim import Claim, Rule, interval
from experiments.framework.plots import (
    DASHES,
    GREY,
    INK,
    NORM_COLORS,
    ORANGE,
    decades,
    lines,
    name,
    pyplot,
    samples,
)
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import MLP, NORMS
from experiments.material.train import cross_entropy, seeds, wait
from jbn import BNParams, bn_init, bn_train

YANG = "Yang et al. 2019, "
THEORY = Rule(supported=(0.9, 1.1), contradicted=(-np.inf, 0.5))
CLAIMS = {
    "sigmoid": Claim(
        says="In a deep network of sigmoids the gradient reaches the first layer with batch norm, and not without.",
        source="Ioffe & Szegedy 2015, sections 1 and 3.3",
        effect="norm of the first layer's gradient over the last one's: that with batch norm over that without",
        rule=Rule(supported=(10, np.inf), contradicted=(0, 1)),
        unit="×",
        ratio=True,
    ),
    "relu": Claim(
        says="In batch-normalized relu networks gradients explode with depth, their squares at theory's rate per "
        "layer, which falls to π / (π - 1) = 1.47 for large batches.",
        source=YANG + "theorem 8",
        effect="logarithm of the measured rate over that of theory's, summed over batch sizes",
        rule=THEORY,
    ),
    "linear": Claim(
        says="In batch-normalized linear networks the squares of gradients grow by (B - 2) / (B - 3) a layer.",
        source=YANG + "rate of linear networks",
        effect="logarithm of the measured rate over that of theory's, summed over batch sizes",
        rule=THEORY,
    ),
}
CAPTION = (
    "Left: norm of the gradient of each layer's weights over that of the last of ten layers, on digits, with sigmoids "
    "(solid) and with relus (dashed). Middle: growth of the squared gradient from the last layer back to the first, in "
    "relu and in linear networks (B: batch size), with theory's dashed. Right: its rate per layer over the batch size, "
    "points measured, curves of theory. Means over seeds with 95 % intervals."
)
DIGITS = {
    "sigmoid": (nn.sigmoid, nn.initializers.lecun_normal()),
    "relu": (nn.relu, nn.initializers.he_normal()),
}
THEORY_DRAWN = {"theory": {"color": GREY, "linestyle": DASHES, "linewidth": 1}}
MEASURED = {"measured": {"color": GREY}}
MEASURED_DOTS = {"measured": {"color": GREY, "marker": "o", "markersize": 4, "linestyle": "none"}}
THEORIES = {"relu": (jax.nn.relu, ORANGE), "linear": (lambda x: x, INK)}


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 3 if quick else 10,
        "layers": 2 if quick else 10,
        "features": 16 if quick else 100,
        "batch_size": 60,
        "depth": 6 if quick else 40,
        "width": 16 if quick else 512,
        "relu_batches": (16,) if quick else (6, 8, 16, 32, 64, 128),
        "linear_batches": (8,) if quick else (6, 8, 12, 16, 32),
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    digits = [{"data": "digits", "activation": activation, "network": norm} for activation in DIGITS for norm in NORMS]
    return digits + [
        {"data": "noise", "activation": activation, "batch": batch}
        for activation in THEORIES
        for batch in configuration[f"{activation}_batches"]
    ]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """The logarithm of the gradient's squared norm at each layer, (seeds, layers)."""
    if part["data"] == "digits":
        of_seed = functools.partial(digits_gradients, configuration, part)
        found = jax.jit(jax.vmap(of_seed, (0, None)))(seeds(configuration), load_digits())
    else:
        activation, _ = THEORIES[part["activation"]]
        of_seed = functools.partial(
            noise_gradients, activation, configuration["depth"], configuration["width"], part["batch"]
        )
        found = jax.jit(lambda keys: jax.lax.map(of_seed, keys))(seeds(configuration))
    return {"log_square": wait(found)}


def digits_gradients(configuration: dict[str, Any], part: dict[str, Any], key: Array, digits: Split) -> Array:
    """(layers,): log ‖gradient of the weights‖² of each hidden layer, on one batch."""
    activation, kernel_init = DIGITS[part["activation"]]
    layers = configuration["layers"]
    model = MLP(NORMS[part["network"]], (configuration["features"],) * layers, activation, kernel_init)
    initial, drawn = jax.random.split(key)
    batch = jax.random.choice(drawn, len(digits.train_y), (configuration["batch_size"],), replace=False)
    x, y = jnp.asarray(digits.train_x)[batch], jnp.asarray(digits.train_y)[batch]
    variables = dict(model.init(initial, x, train=False))
    params = variables.pop("params")

    def loss(params: Any) -> Array:
        logits: Any = model.apply({"params": params, **variables}, x, train=True, mutable=["batch_stats"])[0]
        return cross_entropy(logits, y)

    gradient = jax.grad(loss)(params)
    return jnp.log(jnp.stack([(gradient[f"Dense_{i}"]["kernel"] ** 2).sum() for i in range(layers)]))


def noise_gradients(activation: Any, depth: int, width: int, batch: int, key: Array) -> Array:
    """(depth,): log ‖gradient of the outputs before normalization‖² of each layer, for random inputs and targets."""
    inputs, direction, weights = jax.random.split(key, 3)
    state = bn_init(width)[1]

    @jax.checkpoint  # weights are drawn again on the way back, rather than kept
    def layer(x: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
        key, probe = given
        h = x @ jax.random.normal(key, (width, width)) / np.sqrt(width) + probe  # gradient of probe: that of h
        return normalized(h), None

    def normalized(h: Array) -> Array:
        return activation(bn_train(BNParams(None, None), state, h)[0])

    def loss(probes: Array) -> Array:
        x = normalized(jax.random.normal(inputs, (batch, width)))
        return (jax.lax.scan(layer, x, (jax.random.split(weights, depth), probes))[0] * target).sum()

    target = jax.random.normal(direction, (batch, width))
    return jnp.log((jax.grad(loss)(jnp.zeros((depth, batch, width))) ** 2).sum((1, 2)))


def theory(activation: str, batch: Any) -> Any:
    """The rate per layer at which the gradient's covariance grows in a wide network, of one or many batch sizes."""
    if activation == "linear":
        return (batch - 2) / (batch - 3)
    angle = np.arccos(-1 / (batch - 1))  # between two examples, normalized
    j0 = 1 - angle / np.pi
    j1 = (np.sin(angle) + (np.pi - angle) * np.cos(angle)) / np.pi
    return ((batch - 1 + j0) / (1 - j1) - 1) / (batch - 3)


def log_rates(row: dict[str, Any]) -> np.ndarray:
    """(seeds,): growth of log ‖gradient‖² per layer, from the last layer to the first."""
    found = np.array(row["log_square"])
    return (found[:, 0] - found[:, -1]) / (found.shape[1] - 1)


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    reached = {}
    for network in NORMS:
        found = np.array(find(rows, data="digits", activation="sigmoid", network=network)["log_square"])
        reached[network] = (found[:, 0] - found[:, -1]) / 2
    effects = {"sigmoid": np.exp(reached["batch norm"] - reached["no norm"]).tolist()}
    for activation in THEORIES:
        batches = configuration[f"{activation}_batches"]
        found = [log_rates(find(rows, data="noise", activation=activation, batch=batch)) for batch in batches]
        effects[activation] = (np.sum(found, 0) / np.log(theory(activation, np.array(batches))).sum()).tolist()
    return effects


def figure(results: Any) -> Any:
    fig, panels = pyplot().subplots(1, 3, figsize=(7.2, 3), layout="constrained")
    draw_digits(panels[0], results)
    draw_depth(panels[1], results)
    draw_batches(panels[2], results)
    return fig


def draw_digits(axes: Any, results: Any) -> None:
    layers = np.arange(1, 1 + results.configuration["layers"])
    for activation, style in (("sigmoid", "solid"), ("relu", DASHES)):
        for network, color in NORM_COLORS.items():
            row = find(results.rows, data="digits", activation=activation, network=network)
            found = np.array(row["log_square"])
            lines(axes, layers, (found - found[:, -1:]) / 2 / np.log(10), color, linestyle=style)
    axes.axhline(0, color=GREY, linewidth=0.6)
    axes.set(title="digits", xlabel="layer", ylabel="gradient / that of the last layer")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.6 * (high - low))
    drawn = {
        f"{activation}, {network}": {"color": color, "linestyle": style}
        for network, color in NORM_COLORS.items()
        for activation, style in (("relu", DASHES), ("sigmoid", "solid"))
    }
    samples(axes, drawn, loc="upper left")
    decades(axes)


def draw_depth(axes: Any, results: Any) -> None:
    """Growth of the squared gradient against the distance from the last layer."""
    depth = np.arange(results.configuration["depth"])
    ticks = depth[:: max(1, len(depth) // 20)]
    for activation, (_, color) in THEORIES.items():
        batches = results.configuration[f"{activation}_batches"]
        for batch in {batches[0], batches[-1]}:
            row = find(results.rows, data="noise", activation=activation, batch=batch)
            found = np.array(row["log_square"])[:, ::-1] / np.log(10)
            label = f"{activation}, B = {batch}"
            lines(axes, ticks, (found - found[:, :1])[:, ticks], color, label)
            axes.plot(depth, depth * np.log10(theory(activation, batch)), color=GREY, linestyle=DASHES, linewidth=1)
    axes.set(title="growth through layers", xlabel="layers from the last", xlim=(0, 1.9 * depth[-1]))
    axes.set(xticks=np.linspace(0, len(depth), 3), ylabel="squared gradient, likewise")
    samples(axes, MEASURED | THEORY_DRAWN, loc="upper right")
    low, high = axes.get_ylim()
    axes.set_ylim(low, high + 0.25 * (high - low))  # for the legend
    decades(axes)


def draw_batches(axes: Any, results: Any) -> None:
    """The rate against the batch size."""
    for activation, (_, color) in THEORIES.items():
        batches = np.array(results.configuration[f"{activation}_batches"])
        fine = np.geomspace(batches[0], batches[-1], 99)
        axes.plot(fine, theory(activation, fine), color=GREY, linestyle=DASHES, linewidth=1)
        for batch in batches.tolist():
            found = log_rates(find(results.rows, data="noise", activation=activation, batch=batch))
            low, mean, high = interval(np.exp(found).tolist(), ratio=True)
            axes.plot([batch, batch], [low, high], color=color)
            axes.plot(batch, mean, color=color, marker="o", markersize=4)
        name(axes, fine[20], theory(activation, fine[20]), activation, color, xytext=(8, 6))
    axes.axhline(np.pi / (np.pi - 1), color=GREY, linewidth=0.6)
    name(
        axes,
        results.configuration["relu_batches"][-1],
        np.pi / (np.pi - 1),
        "π / (π - 1)",
        GREY,
        ha="right",
        xytext=(0, -7),
        fontsize=7,
    )
    axes.set_xscale("log", base=2)
    axes.set(title="rate per layer", xlabel="batch size")
    samples(axes, MEASURED_DOTS | THEORY_DRAWN, loc="upper right")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
