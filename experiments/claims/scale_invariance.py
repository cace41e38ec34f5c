"""Does the scale of the weights before batch norm matter?

One dense layer of 100 units, batch norm, relu and a dense layer to 10 logits; cross-entropy on 250 digits, float32,
training mode. The first layer's weights W are multiplied by a, from 1e-3 to 1e3, a quarter of a decade apart, mostly
no powers of two, so that the rounding differs at each. Three things are compared with what they are at a = 1: the
output of batch norm, the gradient of the loss with respect to the digits (what the layer passes on), and the gradient
with respect to aW. An output differs by its largest difference over its largest value. A seed draws the digits and the
weights of both layers. Nothing is trained.

The paper leaves out the epsilon that batch norm adds to the variance, and so does the test of exactness: epsilon = 0.
With the customary 1e-5 the output is √((v + ε)/(v + ε/a²)) of what it was, v being the variance at a = 1, so that
small weights do matter; a claim of its own measures how much. The layer without batch norm is shown beside it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

import jbn
from experiments.framework.claim import Claim, Rule
from experiments.framework.plots import BLUE, GREY, SKY, VERMILION, lines, name, pyplot
from experiments.framework.study import find
from experiments.material.data.digits import load_digits
from experiments.material.train import cross_entropy, seeds, wait

EPS = float(np.finfo(np.float32).eps)
IOFFE = "Ioffe & Szegedy 2015, section 3.3"
CLAIMS = {
    "invariance": Claim(
        says="Neither the output of batch norm nor the gradient it passes on depends on the scale of the weights.",
        source=IOFFE,
        effect="largest change of either over the scales 1e-3 to 1e3, at epsilon 0, in units of float32's epsilon",
        # sums over 784 inputs round by up to √784 = 28 of these; 1e4 of them are 0.1 %
        rule=Rule(supported=(0, 32), contradicted=(1e4, np.inf)),
        unit=" eps",
    ),
    "gradient": Claim(
        says="The gradient of the weights shrinks as one over their scale: larger weights, smaller gradients.",
        source=IOFFE,
        effect="slope of log |gradient| against log scale, at epsilon 0 (the claim: −1)",
        rule=Rule(supported=(-1.01, -0.99), contradicted=(-0.9, np.inf)),
    ),
    "epsilon": Claim(
        says="The output stays the same with the epsilon that is really used, 1e-5.",
        source="drawn from " + IOFFE + ", which leaves the epsilon of its algorithm 1 out",
        effect="largest change of the output over the scales 1e-3 to 1e3, at epsilon 1e-5",
        rule=Rule(supported=(0, 1), contradicted=(10, np.inf)),
        unit=" %",
    ),
}
CAPTION = (
    "Change of a layer's output, and norm of its weights' gradient, when its weights are multiplied by a: with batch "
    "norm without and with its epsilon, and without batch norm; mean over seeds with its 95 % interval."
)
CUSTOMARY = 1e-5
UNITS = 100


def configuration(quick: bool) -> dict[str, Any]:
    return {"seeds": 4 if quick else 20, "examples": 60 if quick else 250, "per_decade": 1 if quick else 4}


def scales(configuration: dict[str, Any]) -> np.ndarray:
    """Factors from 1e-3 to 1e3, evenly in logarithm; the middle one is exactly 1."""
    return 10 ** np.linspace(-3, 3, 6 * configuration["per_decade"] + 1)


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    normed = [{"network": "batch norm", "epsilon": epsilon} for epsilon in (0.0, CUSTOMARY)]
    return [*normed, {"network": "no norm", "epsilon": None}]


@functools.partial(jax.jit, static_argnums=3)
def draw(keys: Array, pixels: Array, labels: Array, examples: int) -> tuple[Array, ...]:
    """For each key: inputs, labels, and the two layers' weights, of the customary variance 1 / inputs."""

    def one(key: Array) -> tuple[Array, ...]:
        chosen, first, second = jax.random.split(key, 3)
        index = jax.random.choice(chosen, len(labels), (examples,), replace=False)
        standard = nn.initializers.lecun_normal()
        return pixels[index], labels[index], standard(first, (pixels.shape[1], UNITS)), standard(second, (UNITS, 10))

    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnums=5)
def compare(
    x: Array, y: Array, weights: Array, readout: Array, factors: Array, normed: bool, epsilon: Array
) -> dict[str, Array]:
    """(scales,): relative changes of the output and of the input's gradient, and the norm of the weights'."""

    def found(factor: Array) -> tuple[Array, Array, Array]:
        def loss(weights: Array, x: Array) -> tuple[Array, Array]:
            output = x @ weights
            if normed:
                output, _ = jbn.bn_train(*jbn.bn_init(UNITS), output, epsilon=epsilon)
            return cross_entropy(nn.relu(output) @ readout, y), output

        (by_weights, by_x), output = jax.grad(loss, (0, 1), has_aux=True)(factor * weights, x)
        return output, by_x, optax.tree.norm(by_weights)

    outputs, passed, norms = jax.lax.map(found, factors)
    return {"output": change(outputs), "passed": change(passed), "gradient": norms}


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """What `compare` finds, (seeds, scales)."""
    digits = load_digits()
    pixels = digits.train_x.reshape(len(digits.train_y), -1)
    drawn = draw(seeds(configuration), pixels, digits.train_y, configuration["examples"])
    factors, epsilon = np.float32(scales(configuration)), part["epsilon"]
    every = [
        compare(*each, factors, epsilon is not None, np.float32(epsilon or 0)) for each in zip(*drawn, strict=True)
    ]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *wait(every))


def change(values: Array) -> Array:
    """(scales,): largest difference from the middle one of `values` (scales, ...), over its largest magnitude."""
    middle = values[len(values) // 2]
    return jnp.abs(values - middle).reshape(len(values), -1).max(1) / jnp.abs(middle).max()


def slopes(configuration: dict[str, Any], norms: Any) -> np.ndarray:
    """(seeds,): the slope of log norm against log scale, by least squares, of norms (seeds, scales)."""
    return np.polyfit(np.log(scales(configuration)), np.log(np.asarray(norms, np.float64)).T, 1)[0]


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    exact, customary = (find(rows, network="batch norm", epsilon=epsilon) for epsilon in (0.0, CUSTOMARY))
    changes = np.maximum(exact["output"], exact["passed"])
    return {
        "invariance": (changes.max(1) / EPS).tolist(),
        "gradient": slopes(configuration, exact["gradient"]).tolist(),
        "epsilon": (100 * np.max(customary["output"], 1)).tolist(),
    }


def figure(results: Any) -> Any:
    fig, (outputs, gradients) = pyplot().subplots(1, 2, figsize=(7.2, 3.3), layout="constrained")
    factors = scales(results.configuration)
    rows = [find(results.rows, **part) for part in parts(results.configuration)]
    for row, color in zip(rows, (BLUE, SKY, VERMILION), strict=True):
        for side in (factors < 1, factors > 1):  # at 1 there is no change, and zero has no logarithm
            lines(outputs, factors[side], np.array(row["output"])[:, side], color)
        lines(gradients, factors, row["gradient"], color)
    outputs.axhline(EPS, color=GREY, linewidth=0.8)
    outputs.set(title="output of the layer", ylabel="largest change / largest output", ylim=(2e-8, 1e5))
    outputs.annotate("float32's epsilon", (1e3, EPS), (0, -8), textcoords="offset points", color=GREY, ha="right")
    gradients.set(title="gradient of the layer's weights", ylabel="norm of ∂loss/∂(aW)")
    exact, customary, plain = (np.mean(row["gradient"], 0) for row in rows)
    name(outputs, 1.2, 1.5e-6, "batch norm, ε = 0", BLUE)
    name(outputs, 1.2, 6e-4, "batch norm, ε = 1e-5", SKY, xytext=(-4, 0))
    name(outputs, 1.2, 3e3, "no norm", VERMILION)
    name(gradients, 1e-2, np.interp(-2, np.log10(factors), exact), "batch norm, ε = 0: as 1/a", BLUE, xytext=(8, 6))
    name(gradients, factors[0], customary[0], "batch norm,\nε = 1e-5", SKY, xytext=(0, -44))
    name(gradients, factors[-1], plain[-1], "no norm", VERMILION, xytext=(0, -12), ha="right")
    for axes in (outputs, gradients):
        axes.set(xscale="log", yscale="log", xlabel="factor a on the weights", xticks=10.0 ** np.arange(-3, 4))
    return fig
