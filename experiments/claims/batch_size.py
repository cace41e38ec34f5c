"""Does batch norm fail at small batches, and what cures it?

Two small networks learn 4,000 digits in batches of 2 to 128, with plain SGD and a rate that falls linearly to 0. In the
dense one (14×14 pixels, two layers of 64) each digit brings one value to a statistic, so that at a batch of 2 there are
two, which become −1 and 1. In the convolutional one (kernels as wide as their strides, so that it is quick) 64, 16 and
4 positions of each digit count, so that its last norm still sees 8 values at a batch of 2.

Every run sees the same number of digits, so smaller batches take more steps: compare methods at one batch size. Each
method, at each size, takes the learning rate of one wide grid at which a first group of seeds tested best, and is
measured on the other seeds; a seed gives all methods the same weights and the same digits. A run that diverged answers
nothing, which counts as wrong.

Batch norm's running averages look back over as many digits at every size, so that small batches are not judged by
noisier averages. "Recalibrated" is the same trained network, its statistics taken afresh over training digits in
batches of the training's size; averages as long as these leave it little to mend. Batch renormalization's bounds open
to its paper's values, but later in the run: plain batch norm for the first quarter of the steps, r = 3 and d = 5 from
three quarters on. "Virtual batches" takes the steps of batches of 128, yet
normalises in groups of the size told: the statistics are those of a small batch, the gradient is not. Group norm has 4
groups, layer norm one (over the positions too), instance norm one for each channel (Flax's); they know no batch, and
so show what the batch size does apart from the statistics.
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
from experiments.framework.plots import BLUE, DASHES, GREEN, GREY, ORANGE, PURPLE, SKY, lines, names, pyplot
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.digits import load_digits
from experiments.material.models import EPSILON, MLP, MOMENTUM
from experiments.material.train import Schedule, accuracy, at_best, train
from jbn.linen import BatchNorm, recalibrate

LESS = {"unit": " points", "rule": Rule(supported=(1, np.inf), contradicted=(-np.inf, 0))}
CLAIMS = {
    "dense": Claim(
        says="At a batch of 4, a dense network errs more with batch norm than with layer norm.",
        source="Ba et al. 2016, abstract (batch norm depends on the batch size), and on MNIST with a dense network",
        effect="dense network's test error with batch norm at batch 4, less that with layer norm",
        **LESS,
    ),
    "convolutional": Claim(
        says="At a batch of 2, a convolutional network errs more with batch norm than with group norm.",
        source="Wu & He 2018, abstract (ResNet-50 at batch 2: 10.6 points)",
        effect="convolutional network's test error with batch norm at batch 2, less that with group norm",
        **LESS,
    ),
    "renormalization": Claim(
        says="At a batch of 4, batch renormalization lowers the error of batch norm.",
        source="Ioffe 2017, abstract, and its experiment with batches of 4",
        effect="dense network's test error with batch norm at batch 4, less that with batch renormalization",
        **LESS,
    ),
    "recalibration": Claim(
        says="At a batch of 2, recalibrated statistics lower the error: those of inference were at fault.",
        source="Singh & Shrivastava 2019, abstract (other statistics in inference: 6.18 points); Wu & Johnson 2021",
        effect="dense network's test error at batch 2 with running averages, less that with recalibrated statistics",
        **LESS,
    ),
}
CAPTION = (
    "Test error over batch size, all runs seeing the same number of digits, each method at its own best learning rate: "
    "a dense network (left) and a convolutional one (right). Dashed: the same batch norm networks, recalibrated. "
    "Virtual batches: steps of 128 digits, normed in groups of the size told. Mean over seeds with its 95 % interval."
)
SIZES = {
    "dense": {
        "batch norm": (2, 4, 16, 128),
        "renormalization": (2, 4, 128),
        "virtual batches": (2, 4, 16),
        "layer norm": (2, 4, 128),
    },
    "convolutional": {
        "batch norm": (2, 16, 128),
        "virtual batches": (2, 16),
        "group norm": (2, 16, 128),
        "instance norm": (2, 128),
    },
}
FEW = {
    "dense": {"batch norm": (2,), "renormalization": (2,), "layer norm": (2,)},
    "convolutional": {"batch norm": (2,), "group norm": (2,)},
}
BOUNDS = ((1.0, 3.0), (0.0, 5.0))  # of r and d, first and last: Ioffe 2017
REFERENCE = 128  # batch size of the steps with virtual batches
GROUPS = {
    "group norm": functools.partial(nn.GroupNorm, num_groups=4),
    "layer norm": functools.partial(nn.GroupNorm, num_groups=1),
    "instance norm": functools.partial(nn.GroupNorm, num_groups=None, group_size=1),
}
COLORS = {
    "batch norm": BLUE,
    "renormalization": GREEN,
    "virtual batches": PURPLE,
    "layer norm": ORANGE,
    "group norm": ORANGE,
    "instance norm": GREY,
}


class Blocks(nn.Module):
    """Convolutions of blocks of 4×4, 2×2 and 2×2 pixels, each followed by `norm` and relu; 10 logits.

    28×28 (in a frame of 0 that makes it 32×32) → 8×8 → 4×4 → 2×2 pixels. `x`: (n, 28, 28, 1); returns (n, 10).
    """

    norm: Any
    features: Sequence[int]

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        x = jnp.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)))
        for width, features in zip((4, 2, 2), self.features, strict=True):
            x = nn.Dense(features, use_bias=False)(blocks(x, width))
            x = nn.relu(self.norm(use_running_average=not train, momentum=MOMENTUM, epsilon=EPSILON)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def blocks(x: Array, width: int) -> Array:
    """(n, h, w, c) as (n, h / width, w / width, width² · c): a pixel of it is a block of x."""
    n, h, w, c = x.shape
    x = x.reshape(n, h // width, width, w // width, width, c)
    return jnp.moveaxis(x, 2, 3).reshape(n, h // width, w // width, width * width * c)


class Renormalization(nn.Module):
    """Batch renormalization whose bounds open with the steps it has taken, of `steps` in all."""

    use_running_average: bool
    momentum: float
    epsilon: float
    steps: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        layer = BatchNorm(self.use_running_average, momentum=self.momentum, epsilon=self.epsilon, renorm=True)
        step = self.variable("batch_stats", "step", jnp.zeros, (), jnp.int32)
        schedules = [optax.linear_schedule(*bounds, self.steps // 2, self.steps // 4) for bounds in BOUNDS]
        r_max, d_max = (jnp.asarray(schedule(step.value)) for schedule in schedules)
        y = layer(x, r_max=r_max, d_max=d_max)
        if not self.use_running_average:
            step.value += 1
        return y


def norm_of(method: str, size: int, configuration: dict[str, Any]) -> Any:
    """What the networks call for a norm; `size` is the number of digits normalised together."""
    if method in GROUPS:
        return lambda epsilon, **_: GROUPS[method](epsilon=epsilon)
    virtual = method == "virtual batches"
    averaging = 0.9 ** ((REFERENCE if virtual else size) / REFERENCE)
    if method == "renormalization":
        built: Any = functools.partial(Renormalization, steps=configuration["digits_seen"] // size)
    else:
        built = functools.partial(BatchNorm, virtual_batch_size=size if virtual else None)
    return lambda momentum, **told: built(momentum=averaging, **told)


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 4 if quick else 14,
        "choosing_seeds": 2,
        "learning_rates": (0.1,) if quick else (0.01, 0.03, 0.1, 0.3, 1.0, 3.0),
        "features": {"dense": (4,) if quick else (64, 64), "convolutional": (4, 4, 4) if quick else (8, 16, 32)},
        "batch_sizes": FEW if quick else SIZES,
        "small": 2 if quick else 4,
        "digits_seen": 64 if quick else 6144,
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"network": network, "method": method, "size": size}
        for network, methods in configuration["batch_sizes"].items()
        for method, sizes in methods.items()
        for size in sizes
    ]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Test errors of the measured seeds, and the learning rate; for batch norm those after recalibration too."""
    method, size = part["method"], part["size"]
    batch = REFERENCE if method == "virtual batches" else size
    steps = configuration["digits_seen"] // batch
    schedule = Schedule(steps, batch, steps)
    norm, dense = norm_of(method, size, configuration), part["network"] == "dense"
    model = (MLP if dense else Blocks)(norm, configuration["features"][part["network"]])

    def run(key: Array, rate: Array, digits: Split) -> dict[str, Array]:
        history = train(model, optax.sgd(optax.linear_schedule(rate, 0, steps)), digits, key, schedule)
        error = {"error": 1 - history.found[-1]}
        if method == "batch norm":
            # one batch of many groups is many batches of the training's size
            groups = model.clone(norm=functools.partial(norm, virtual_batch_size=size))
            images = digits.train_x[: len(digits.train_x) // REFERENCE * REFERENCE]
            variables = recalibrate(groups, history.variables, [images], train=True)
            error["recalibrated"] = 1 - accuracy(model, digits.test_x, digits.test_y)(variables)
        return error

    return at_best(
        jax.jit(jax.vmap(run, (0, 0, None))),
        configuration,
        configuration["learning_rates"],
        smaller(load_digits()) if dense else load_digits(),
    )


def smaller(digits: Split) -> Split:
    """The mean of every 2×2 pixels."""
    train_x, test_x = (x.reshape(-1, 14, 2, 14, 2, 1).mean((2, 4)) for x in (digits.train_x, digits.test_x))
    return digits._replace(train_x=train_x, test_x=test_x)


def percent(rows: list[dict[str, Any]], network: str, method: str, size: int, found: str = "error") -> np.ndarray:
    """Test error of each measured seed / %."""
    return 100 * np.array(find(rows, network=network, method=method, size=size)[found])


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    small = configuration["small"]
    dense = percent(rows, "dense", "batch norm", small)
    few, recalibrated = (percent(rows, "dense", "batch norm", 2, found) for found in ("error", "recalibrated"))
    convolutional = [percent(rows, "convolutional", method, 2) for method in ("batch norm", "group norm")]
    return {
        "dense": (dense - percent(rows, "dense", "layer norm", small)).tolist(),
        "convolutional": (convolutional[0] - convolutional[1]).tolist(),
        "renormalization": (dense - percent(rows, "dense", "renormalization", small)).tolist(),
        "recalibration": (few - recalibrated).tolist(),
    }


def figure(results: Any) -> Any:
    told = results.configuration
    fig, panels = pyplot().subplots(1, 2, figsize=(7.2, 3.2), sharey=True, layout="constrained")
    panels[1].tick_params(labelleft=True)  # a narrow page shows it below the other
    for axes, (network, methods) in zip(panels, told["batch_sizes"].items(), strict=True):
        ends = {}
        for method, sizes in methods.items():
            curves = np.stack([percent(results.rows, network, method, size) for size in sizes], -1)
            lines(axes, sizes, curves, COLORS[method])
            ends[method] = (curves.mean(0)[0], COLORS[method])
            if method == "batch norm":
                again = [percent(results.rows, network, method, size, "recalibrated") for size in sizes]
                lines(axes, sizes, np.stack(again, -1), SKY, linestyle=DASHES)
                ends["recalibrated"] = (np.mean(again[0]), SKY)
        ticks = methods["batch norm"]
        axes.set(
            title=f"{network} network", xscale="log", yscale="log", xlabel="batch size", xlim=(0.15, 140), ylim=(4, 55)
        )
        axes.set_xticks(ticks, ticks)
        axes.set_yticks((5, 10, 20, 50), (5, 10, 20, 50))
        axes.minorticks_off()
        names(axes, 2, ends, ha="right")
    panels[0].set_ylabel("test error / %")
    return fig
