"""Does batch norm tolerate higher, and more, learning rates, and is that the gain?

A relu network of eight hidden layers of 64 units (deep, since Bjorck et al. blame the growth of activations with
depth; weights as He et al. 2015 set them for relu, so that no bad start is cured), 400 steps of plain SGD in batches of
60 on 4,000 digits, with batch norm and without, at sixteen constant learning rates from 1e-3 to 1e2. A seed gives both
networks the same order of the digits.

A rate works where the training loss, mean of the last 66 steps (an epoch), ends at 0.3 nats or less; a run that
diverged has no finite loss and did not work. For each network and seed: the largest rate that works, and how many
decades of rates work (a third of one for each rate). Where none works, the lowest rate of the grid stands for the
largest. A largest rate at the end of the grid means: at least that.

That the gain is the rate: Bjorck et al. find no better accuracy with batch norm at the rate which the network without
it needs. Here that is the rate at which the network without batch norm had the lowest final loss on a first group of
seeds; on the other seeds the networks' final test accuracies at this same rate are compared.
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

IOFFE, BJORCK = "Ioffe & Szegedy 2015, section 3.3", "Bjorck et al. 2018, abstract"
CLAIMS = {
    "higher": Claim(
        says="Higher learning rates work with batch norm.",
        source=f"{IOFFE}; {BJORCK}",
        effect="largest learning rate that works with batch norm, over the largest without",
        rule=Rule(supported=(2, np.inf), contradicted=(0, 1)),  # the grid's step is 2.15; Ioffe & Szegedy took 5 and 30
        unit="×",
        ratio=True,
    ),
    "more": Claim(
        says="More learning rates work with batch norm.",
        source=f"{IOFFE}; {BJORCK}",
        effect="decades of learning rates that work with batch norm, less those without",
        rule=Rule(supported=(1 / 3, np.inf), contradicted=(-np.inf, 0)),  # the grid's step or more
        unit=" decades",
    ),
    "equal": Claim(
        says="At an equal rate, that which suits the network without batch norm, batch norm gains nothing.",
        source=BJORCK,
        effect="test accuracy with batch norm less that without, at the rate best without",
        rule=Rule(supported=(-np.inf, 0.5), contradicted=(1, np.inf)),
        unit=" points",
    ),
}
CAPTION = (
    "Final training loss and test accuracy over the learning rate, with batch norm and without; mean over seeds with "
    "its 95 % interval. Diverged runs count with the loss of a guess and no right answer. Dashed: the loss that counts "
    "as working; dotted: the rate at which both are compared, the best without batch norm."
)
GUESS = float(np.log(10))  # cross-entropy of ten equal chances


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 3 if quick else 11,
        "choosing_seeds": 1 if quick else 3,
        "decades": (-2, 2) if quick else (-3, 2),
        "per_decade": 1 if quick else 3,
        "features": (16,) if quick else (64,) * 8,
        "working_loss": 2.0 if quick else 0.3,
        "last_steps": 4 if quick else 66,
        "schedule": Schedule(steps=8 if quick else 400, batch_size=60, evaluate_every=8 if quick else 400)._asdict(),
    }


def rates(configuration: dict[str, Any]) -> np.ndarray:
    """The grid of learning rates, evenly in logarithm."""
    low, high = configuration["decades"]
    return 10 ** np.linspace(low, high, (high - low) * configuration["per_decade"] + 1)


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"network": network} for network in NORMS]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """(seeds, rates): the mean loss of the last steps, not finite where the run diverged, and the last accuracy."""
    told: dict[str, Any] = {"kernel_init": nn.initializers.he_normal()}
    model = MLP(NORMS[part["network"]], configuration["features"], **told)
    schedule = Schedule(**configuration["schedule"])

    def run(key: Array, rate: Array, digits: Split) -> dict[str, Array]:
        loss, accuracy, _ = train(model, optax.sgd(rate), digits, key, schedule)
        return {"loss": loss[-configuration["last_steps"] :].mean(), "accuracy": accuracy[-1]}

    every = jax.jit(jax.vmap(jax.vmap(run, (None, 0, None)), (0, None, None)))
    found = wait(every(seeds(configuration), np.float32(rates(configuration)), load_digits()))
    return {**found, "diverged": int((~np.isfinite(found["loss"])).sum())}


def final_loss(row: dict[str, Any]) -> np.ndarray:
    """(seeds, rates): the final loss, infinite where the run diverged."""
    losses = np.array(row["loss"], np.float64)  # None becomes NaN
    return np.where(np.isfinite(losses), losses, np.inf)


def working(row: dict[str, Any], configuration: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """For each seed the largest rate that works, the grid's lowest where none does, and the decades that work."""
    works = final_loss(row) <= configuration["working_loss"]
    grid = rates(configuration)
    return np.where(works, grid, grid[0]).max(1), works.sum(1) / configuration["per_decade"]


def equal(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> int:
    """The rate, as an index, with the lowest final loss without batch norm, in the mean over the choosing seeds."""
    chosen = final_loss(find(rows, network="no norm"))[: configuration["choosing_seeds"]]
    return int(np.minimum(chosen, GUESS).mean(0).argmin())


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    measured = slice(configuration["choosing_seeds"], None)
    index = equal(rows, configuration)
    largest, decades, accuracy = {}, {}, {}
    for network in NORMS:
        row = find(rows, network=network)
        largest[network], decades[network] = (each[measured] for each in working(row, configuration))
        accuracy[network] = 100 * np.array(row["accuracy"])[measured, index]
    return {
        "higher": (largest["batch norm"] / largest["no norm"]).tolist(),
        "more": (decades["batch norm"] - decades["no norm"]).tolist(),
        "equal": (accuracy["batch norm"] - accuracy["no norm"]).tolist(),
    }


def figure(results: Any) -> Any:
    told = results.configuration
    measured, grid = slice(told["choosing_seeds"], None), rates(told)
    fig, (losses, accuracies) = pyplot().subplots(1, 2, figsize=(7.2, 3.2), layout="constrained")
    for network, color in NORM_COLORS.items():
        row = find(results.rows, network=network)
        loss = np.minimum(final_loss(row), GUESS)[measured]
        lines(losses, grid, loss, color)
        lines(accuracies, grid, 100 * np.array(row["accuracy"])[measured], color)
        lowest = int(loss.mean(0).argmin())
        where = {"xytext": (-28, -7), "ha": "right"} if network == "no norm" else {"xytext": (10, -9)}
        name(losses, float(grid[lowest]), float(loss.mean(0)[lowest]), network, color, **where)
    losses.axhline(told["working_loss"], color=GREY, linewidth=0.8, linestyle=DASHES)
    losses.annotate(
        "works", (grid[-1], told["working_loss"]), (0, -10), textcoords="offset points", color=GREY, ha="right"
    )
    losses.set(title="final training loss", ylabel="cross-entropy / nats", yscale="log", ylim=(0.12, 2.6))
    losses.set_yticks((0.2, 0.5, 1, 2), ("0.2", "0.5", "1", "2"))
    losses.minorticks_off()
    accuracies.set(title="final test accuracy", ylabel="accuracy / %", ylim=(0, 100))
    index = equal(results.rows, told)
    accuracies.annotate(
        "equal rate,\nbest without", (grid[index], 0), (-4, 4), textcoords="offset points", color=GREY, ha="right"
    )
    decades = 10.0 ** np.arange(told["decades"][0], told["decades"][1] + 1)
    for axes in (losses, accuracies):
        axes.axvline(grid[index], color=GREY, linewidth=0.8, linestyle=":")
        axes.set(xscale="log", xlabel="learning rate", xticks=decades)
    return fig
