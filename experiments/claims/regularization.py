"""Does the noise of the batch regularize, and does batch norm replace dropout?

A relu network (two layers of 64 units) learns few digits (averaged to 14×14 pixels) until it knows them, by SGD with
momentum 0.9 in batches of 128, its rate falling linearly to 0. A seed draws the digits to train on, weights and order,
the same for all; the test is on 1,000 others. Each method takes the learning rate at which a first group of seeds
tested best, and is measured on the other seeds. A run that diverged answers nothing, which counts as wrong.

Noise: 1,000 digits, batch norm whose statistics are those of the whole batch or of groups of 32 to 4 within it (virtual
batches). The gradient is that of 128 digits throughout, so that the noise of the statistics is all that changes; a
smaller batch would change that of the gradient too.

Dropout: none, or after each layer with probability 0.2, with batch norm (of the whole batch) and without any norm, on
250, 1,000 and 4,000 digits; on 1,000, of which the claims are judged, 0.5 is tried too, and the first group of seeds
chooses between the two.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.framework.claim import Claim, Rule
from experiments.framework.plots import BLUE, DASHES, GREY, VERMILION, key, lines, name, pyplot
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import EPSILON, MOMENTUM
from experiments.material.train import Schedule, accuracy, at_best, cross_entropy, train
from jbn.linen import BatchNorm

NO_WORSE = {"unit": " points", "rule": Rule(supported=(-np.inf, 0.3), contradicted=(0.3, np.inf))}
CLAIMS = {
    "noise": Claim(
        says="Noisier statistics (groups of 16, not the whole batch of 128) generalize better.",
        source="Ioffe & Szegedy 2015, section 3.4; abstracts of Luo et al. 2018, Hoffer et al. 2017 (ghost batch norm)",
        effect="test error with statistics of 128, less that with statistics of 16, training on 1,000 digits",
        unit=" points",
        rule=Rule(supported=(0.3, np.inf), contradicted=(-np.inf, 0)),
    ),
    "dropout removed": Claim(
        says="With batch norm, dropout can be left out (within 0.3 points).",
        source="Ioffe & Szegedy 2015, sections 3.4 and 4.2.1 (remove dropout)",
        effect="test error of batch norm without dropout, less that with it, training on 1,000 digits",
        **NO_WORSE,
    ),
    "dropout replaced": Claim(
        says="Batch norm alone generalizes as well as dropout alone (within 0.3 points).",
        source="Ioffe & Szegedy 2015, abstract (in some cases no need for dropout) and section 3.4",
        effect="test error of batch norm without dropout, less that of dropout without batch norm, on 1,000 digits",
        **NO_WORSE,
    ),
}
CAPTION = (
    "Left: error on the digits tested and trained on, over the size of the groups whose statistics norm them. Middle: "
    "test error over the number of digits trained on. Right: how much higher the loss is in testing than in training. "
    "Dashed: with dropout. Mean over seeds with its 95 % interval."
)
NETWORKS = {"no norm": VERMILION, "batch norm": BLUE}
JUDGED = 1000  # digits to train on


class Network(nn.Module):
    """Layers of `features`: dense, batch norm in groups of `group` (None: none), relu, dropout; then 10 logits."""

    features: tuple[int, ...]
    group: int | None
    dropout: Any  # may be traced

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = x.reshape(len(x), -1)
        for features in self.features:
            x = nn.Dense(features, use_bias=self.group is None)(x)
            if self.group is not None:
                x = BatchNorm(not train, momentum=MOMENTUM, epsilon=EPSILON, virtual_batch_size=self.group)(x)
            x = nn.relu(x)
            if train:
                kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout, x.shape)
                x = jnp.where(kept, x / (1 - self.dropout), 0)
        return nn.Dense(10)(x)


def configuration(quick: bool) -> dict[str, Any]:
    steps = 8 if quick else 200
    return {
        "seeds": 4 if quick else 36,
        "choosing_seeds": 2 if quick else 6,
        "learning_rates": (0.1,) if quick else (0.01, 0.03, 0.1, 0.3, 1.0),
        "features": (8,) if quick else (64, 64),
        "groups": (16, 128) if quick else (4, 8, 16, 32, 128),
        "train_on": (JUDGED,) if quick else (250, JUDGED, 4000),
        "dropouts": (0.0, 0.2),
        "tried_too": () if quick else (0.5,),
        "schedule": Schedule(steps, batch_size=128, evaluate_every=steps)._asdict(),
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    batch = configuration["schedule"]["batch_size"]
    noise = [
        {"network": "batch norm", "group": group, "digits": JUDGED, "dropout": 0.0}
        for group in configuration["groups"]
        if group != batch
    ]
    return noise + [
        {"network": network, "group": batch if network == "batch norm" else None, "digits": digits, "dropout": dropout}
        for network in NETWORKS
        for digits in configuration["train_on"]
        for dropout in (*configuration["dropouts"], *(configuration["tried_too"] if digits == JUDGED else ()))
    ]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Of each measured seed: test and training error, and test less training loss; and the learning rate."""
    schedule = Schedule(**configuration["schedule"])
    every = runs(tuple(configuration["features"]), part["group"], part["digits"], schedule)
    return at_best(every, configuration, configuration["learning_rates"], smaller(load_digits()), part["dropout"])


@functools.cache
def runs(features: tuple[int, ...], group: int | None, digits: int, schedule: Schedule) -> Callable[..., Any]:
    """Training runs, jitted and batched over keys and rates; one program for all probabilities of dropout."""

    def run(key: Array, rate: Array, everything: Split, dropout: Array) -> dict[str, Array]:
        chosen = jax.random.permutation(jax.random.fold_in(key, 1), len(everything.train_y))[:digits]
        data = everything._replace(train_x=everything.train_x[chosen], train_y=everything.train_y[chosen])
        model = Network(features, group, dropout)
        optimizer = optax.sgd(optax.linear_schedule(rate, 0, schedule.steps), momentum=0.9)

        def evaluate(variables: Any) -> dict[str, Array]:
            seen, new = (data.train_x, data.train_y), (data.test_x, data.test_y)
            logits: Any = [model.apply(variables, x, train=False) for x, _ in (seen, new)]
            loss = [cross_entropy(each, y) for each, (_, y) in zip(logits, (seen, new), strict=True)]
            trained, tested = (1 - accuracy(model, *each)(variables) for each in (seen, new))
            return {"error": tested, "training_error": trained, "gap": loss[1] - loss[0]}

        found = train(model, optimizer, data, key, schedule, evaluate=evaluate).found
        return jax.tree.map(lambda each: each[-1], found)

    return jax.jit(jax.vmap(run, (0, 0, None, None)))


def smaller(digits: Split) -> Split:
    """The mean of every 2×2 pixels."""
    train_x, test_x = (x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)) for x in (digits.train_x, digits.test_x))
    return digits._replace(train_x=train_x, test_x=test_x)


def rows_of(rows: list[dict[str, Any]], configuration: dict[str, Any], network: str, digits: int) -> list[Any]:
    """Without dropout, and with it: of several probabilities the one that the choosing seeds found best."""
    group = configuration["schedule"]["batch_size"] if network == "batch norm" else None
    alike = [row for row in rows if (row["network"], row["digits"], row["group"]) == (network, digits, group)]
    return [
        find(alike, dropout=0.0),
        min((row for row in alike if row["dropout"]), key=lambda row: row["error_of_choice"]),
    ]


def noisy(rows: list[dict[str, Any]], group: int) -> dict[str, Any]:
    return find(rows, network="batch norm", group=group, digits=JUDGED, dropout=0.0)


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    def error(row: dict[str, Any]) -> np.ndarray:
        return 100 * np.array(row["error"])

    batch_norm, batch_norm_dropout = rows_of(rows, configuration, "batch norm", JUDGED)
    _, dropout = rows_of(rows, configuration, "no norm", JUDGED)
    return {
        "noise": (error(noisy(rows, configuration["schedule"]["batch_size"])) - error(noisy(rows, 16))).tolist(),
        "dropout removed": (error(batch_norm) - error(batch_norm_dropout)).tolist(),
        "dropout replaced": (error(batch_norm) - error(dropout)).tolist(),
    }


def figure(results: Any) -> Any:
    told, rows = results.configuration, results.rows
    fig, (noise, sizes, gaps) = pyplot().subplots(1, 3, figsize=(7.2, 3), layout="constrained")
    groups = told["groups"]
    for found, label, style in (("error", "tested on", "-"), ("training_error", "trained on", DASHES)):
        curves = 100 * np.stack([noisy(rows, group)[found] for group in groups], -1)
        lines(noise, groups, curves, BLUE, linestyle=style)
        name(noise, groups[-1], curves.mean(0)[-1], label, BLUE, xytext=(0, 15), ha="right")
    noise.set(title="noise", xlabel="digits normed together", ylabel="error / %", xscale="log", ylim=(0, None))
    noise.set_xticks(groups, groups)
    for axes, found, scale in ((sizes, "error", 100), (gaps, "gap", 1)):
        for network, color in NETWORKS.items():
            pairs = [rows_of(rows, told, network, digits) for digits in told["train_on"]]
            for of_kind, style in zip(zip(*pairs, strict=True), ("-", DASHES), strict=True):
                curves = scale * np.array([row[found] for row in of_kind], np.float64).T
                lines(axes, told["train_on"], curves, color, linestyle=style)
        axes.set(xlabel="digits trained on", xscale="log", ylim=(0, None))
        axes.set_xticks(told["train_on"], [f"{digits:,}" for digits in told["train_on"]])
    sizes.set(title="test error", ylabel="error / %", yticks=range(0, 20, 5))
    gaps.set(title="gap of the losses", ylabel="test less training loss / nats")
    key(gaps, {**NETWORKS, "dashed: dropout": GREY}, 0.99, ha="right")
    for axes in (noise, sizes, gaps):
        axes.minorticks_off()
    return fig
