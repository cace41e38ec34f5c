"""Do the loss and its gradient change less along a step with batch norm?

Five layers of 100 relus on 4,000 digits, plain SGD in batches of 60, with batch norm and without; a seed gives both
the same order of the digits. After every tenth step training is left alone, and the landscape is probed as Santurkar
et al. do for their figure 4: on a batch of 60 training digits the gradient g is taken, and loss and gradient are
measured again at eight points along -g, from half the learning rate to four times it, the network normalizing that
batch as in training. Three numbers come of it: the range of the loss over these points; the largest distance
between the gradients there and g; and the largest ratio of such a distance to the way gone, the "effective
β-smoothness". All are taken in the mean of logarithms over the run.

Norms of gradients depend on how weights are scaled, to which batch norm is blind, so that the distances are also
recorded as fractions of ‖g‖. The claims compare both networks at one rate, as the paper does, and this is the best one
for the network without batch norm; the figure adds batch norm at its own best rate. Best is the rate at which a first
group of seeds has the lowest mean training loss over the run's last tenth; the other seeds are measured. A number
that is not finite counts as 1e6.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.framework.claim import Claim, Rule
from experiments.framework.plots import BLUE, DASHES, SKY, VERMILION, decades, key, lines, pyplot
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import MLP, NORMS
from experiments.material.train import Schedule, cross_entropy, seeds, train, wait

SANTURKAR = "Santurkar et al. 2018, "
# half as much again is what would show at a glance in the paper's figures, whose axes span decades
TOLD: dict[str, Any] = {"unit": "×", "ratio": True, "rule": Rule(supported=(1.5, np.inf), contradicted=(0, 1))}
CLAIMS = {
    "loss": Claim(
        says="With batch norm the loss varies less along the gradient.",
        source=SANTURKAR + "figure 4a",
        effect="range of the loss along the gradient, without batch norm over with it, at one learning rate",
        **TOLD,
    ),
    "gradient": Claim(
        says="With batch norm the gradient predicts better what it will be after a step.",
        source=SANTURKAR + "figure 4b",
        effect="largest change of the gradient along itself, without batch norm over with it, at one learning rate",
        **TOLD,
    ),
    "beta": Claim(
        says="With batch norm the gradient changes less per length of the step (effective β-smoothness).",
        source=SANTURKAR + "figure 4c",
        effect="largest change of the gradient per distance, without batch norm over with it, at one learning rate",
        **TOLD,
    ),
}
CAPTION = (
    "Along the gradient, at eight points from half a step to four steps, over training: the range of the loss, the "
    "largest change of the gradient, the same as a fraction of the gradient, and the same per distance. Means of "
    "logarithms over seeds with 95 % intervals. One rate for both networks, the best without batch norm, and (light, "
    "dashed) batch norm at its own."
)
MEASURES = {
    "loss": "range of the loss / nats",
    "gradient": "change of the gradient, ‖Δg‖ / nats",
    "relative": "relative change, ‖Δg‖ / ‖g‖",
    "beta": "β: change per distance / nats",
}
REACH = (0.5, 4.0)  # of the learning rate
NOT_FINITE = 1e6


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 3 if quick else 14,
        "choosing_seeds": 1 if quick else 4,
        "learning_rates": (0.03, 0.1) if quick else (0.03, 0.1, 0.3, 1.0),
        "features": (16,) if quick else (100,) * 5,
        "points": 2 if quick else 8,
        "schedule": Schedule(steps=8 if quick else 400, batch_size=60, evaluate_every=4 if quick else 10)._asdict(),
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"network": network} for network in NORMS]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Each of MEASURES (seeds, rates, evaluations), and the mean training loss of the last tenth (seeds, rates)."""
    model = MLP(NORMS[part["network"]], configuration["features"])
    schedule = Schedule(**configuration["schedule"])

    def run(key: Array, rate: Array, digits: Split) -> dict[str, Array]:
        def evaluate(variables: Any) -> dict[str, Array]:
            stats = {name: value for name, value in variables.items() if name != "params"}

            def loss(params: Any) -> Array:
                outputs: Any = model.apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])[0]
                return cross_entropy(outputs, y)

            return probe(loss, variables["params"], rate, configuration["points"])

        drawn = jax.random.choice(jax.random.fold_in(key, 3), len(digits.train_y), (schedule.batch_size,), False)
        x, y = jnp.asarray(digits.train_x)[drawn], jnp.asarray(digits.train_y)[drawn]
        history = train(model, optax.sgd(rate), digits, key, schedule, evaluate=evaluate)
        return {**history.found, "final_loss": history.loss[-schedule.steps // 10 :].mean()}

    every = jax.vmap(jax.vmap(run, (None, 0, None)), (0, None, None))
    rates = np.array(configuration["learning_rates"], np.float32)
    return wait(jax.jit(every)(seeds(configuration), rates, load_digits()))


def probe(loss: Any, params: Any, rate: Any, points: int) -> dict[str, Array]:
    """What `loss` does along its gradient g: each of MEASURES at params - s · rate · g, with s over `REACH`."""

    def at(g: Any, reach: Array) -> tuple[Any, tuple[Array, Array]]:
        there = jax.tree.map(lambda value, slope: value - reach * rate * slope, params, g)
        value, gradient = jax.value_and_grad(loss)(there)
        g = jax.tree.map(lambda first, now: jnp.where(reach == 0, now, first), g, gradient)
        return g, (value, optax.tree.norm(jax.tree.map(jnp.subtract, gradient, g)))

    reaches = jnp.concatenate([jnp.zeros(1), jnp.linspace(*REACH, points)])  # the first finds g itself
    g, (values, changes) = jax.lax.scan(at, jax.tree.map(jnp.zeros_like, params), reaches)
    reaches, values, changes, steepness = reaches[1:], values[1:], changes[1:], optax.tree.norm(g)
    return {
        "loss": values.max() - values.min(),
        "gradient": changes.max(),
        "relative": changes.max() / steepness,
        "beta": (changes / (reaches * rate * steepness)).max(),
    }


def best(row: dict[str, Any], configuration: dict[str, Any]) -> int:
    """The learning rate, as an index, at which the choosing seeds end with the lowest training loss."""
    found = np.array(row["final_loss"], np.float64)[: configuration["choosing_seeds"]]
    return int(np.where(np.isfinite(found), found, NOT_FINITE).mean(0).argmin())


def logs(row: dict[str, Any], measure: str, rate: int, configuration: dict[str, Any]) -> np.ndarray:
    """(measured seeds, evaluations): the logarithm to base 10."""
    found = np.array(row[measure], np.float64)[configuration["choosing_seeds"] :, rate]  # None becomes NaN
    return np.log10(np.clip(np.where(np.isfinite(found), found, NOT_FINITE), 1e-12, NOT_FINITE))


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    with_norm, without = (find(rows, network=network) for network in NORMS)
    rate = best(without, configuration)
    found = {}
    for measure in CLAIMS:
        more = logs(without, measure, rate, configuration) - logs(with_norm, measure, rate, configuration)
        found[measure] = (10 ** more.mean(1)).tolist()
    return found


def figure(results: Any) -> Any:
    told = results.configuration
    with_norm, without = (find(results.rows, network=network) for network in NORMS)
    equal, own = best(without, told), best(with_norm, told)
    fig, panels = pyplot().subplots(2, 2, figsize=(7.2, 5.2), sharex=True, layout="constrained")
    steps = told["schedule"]["evaluate_every"] * np.arange(1, 1 + np.shape(without["loss"])[-1])
    rates = told["learning_rates"]
    drawn: list[tuple[str, Any, int, str, Any]] = [
        (f"no norm, rate {rates[equal]:g}", without, equal, VERMILION, "solid"),
        (f"batch norm, rate {rates[equal]:g}", with_norm, equal, BLUE, "solid"),
    ]
    if own != equal:
        drawn.append((f"batch norm, its own rate {rates[own]:g}", with_norm, own, SKY, DASHES))
    for axes, (measure, title) in zip(panels.flat, MEASURES.items(), strict=True):
        for _, row, rate, color, style in drawn:
            lines(axes, steps, logs(row, measure, rate, told), color, linestyle=style)
        axes.set_title(title)
    for axes in panels[1]:
        axes.set_xlabel("training steps")
    low, high = panels[0, 0].get_ylim()
    panels[0, 0].set_ylim(low, high + 0.35 * (high - low))
    for axes in panels.flat:
        decades(axes)
    key(panels[0, 0], {label: color for label, _, _, color, _ in drawn})
    return fig
