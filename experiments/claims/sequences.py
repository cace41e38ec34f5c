"""Is batch norm ill-suited to sequences of different lengths?

A recurrent network, h ← tanh(N(U h) + N(V x) + b), reads utterances of 7 to 29 steps and tells from its state at the
end which of nine people spoke. Five ways to norm it, and none:

- layer norm of both terms (Flax's);
- batch norm of both terms with statistics, and running averages, of each time step, over the utterances that have not
  ended by then; beyond the longest of the training the last step's serve, as Cooijmans et al. have it. Late steps have
  few utterances left: a batch with one of them has variance 0 there, and the running averages weigh it like a batch
  of thirty, which is part of what is judged;
- the same, the padding (zeros after an utterance's end, where the state stays as it is) counted in the statistics;
- batch norm of V x alone, with statistics over all utterances and steps (sequencewise), without the padding or with.

The masks are all that differs between counting the padding and not: no state moves and no answer is read there. Adam,
its rate falling linearly to 0, in batches of 30. Each method takes the learning rate and the first value of its scale
(0.1, as Cooijmans et al. advise, or 1) at which a first group of seeds tested best, and is measured on the other seeds.

There are 640 utterances, few enough that which are tested matters more than how weights begin: so a seed draws its own
270 to train on (as many as the source's split has) and 370 to test on, the same for all methods. Intervals over seeds
therefore tell of both, though the draws overlap, which makes them somewhat too narrow for other data.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array

from experiments.framework.claim import Claim, Rule, interval
from experiments.framework.plots import BLUE, GREEN, ORANGE, PURPLE, SKY, VERMILION, lines, pyplot
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.vowels import load_vowels
from experiments.material.models import EPSILON, MOMENTUM
from experiments.material.train import Schedule, at_best, train
from jbn import BNParams, BNState, bn_eval, bn_train
from jbn.linen import BatchNorm

WORSE = {"unit": " points", "rule": Rule(supported=(1, np.inf), contradicted=(-np.inf, 0))}
COOIJMANS = "Cooijmans et al. 2016, section 5.4"
CLAIMS = {
    "per step": Claim(
        says="Batch norm with statistics of each time step errs more than layer norm.",
        source="Ba et al. 2016, abstract and related work (against recurrent batch norm)",
        effect="test error of batch norm per step, without padding, less that of layer norm",
        **WORSE,
    ),
    "sequencewise": Claim(
        says="Batch norm errs more than layer norm even where it norms the input alone, over all steps.",
        source="abstracts of Ba et al. 2016 and Laurent et al. 2016 (such batch norm does not improve generalization)",
        effect="test error of sequencewise batch norm, without padding, less that of layer norm",
        **WORSE,
    ),
    "padding": Claim(
        says="Padding in the statistics of each time step raises the error, and a mask cures that.",
        source=f"{COOIJMANS}: padding with zeros biases mean and variance",
        effect="test error of batch norm per step with the padding counted, less that without",
        **WORSE,
    ),
}
CAPTION = (
    "Test error of layer norm, of batch norm (statistics per step or sequencewise; dashed: of the padding too) "
    "and of no norm: at the end, over training, and by the utterance's length; each method at its own best rate and "
    "first scale. Mean over seeds, each with a split of its own, with its 95 % interval."
)
SPEAKERS = 9
COLORS = {
    "layer norm": GREEN,
    "per step, masked": BLUE,
    "per step, padding counted": SKY,
    "sequencewise, masked": ORANGE,
    "sequencewise, padding counted": PURPLE,
    "no norm": VERMILION,
}
LENGTHS = (7, 12, 15, 18, 30)  # groups of about as many utterances


class Recurrent(nn.Module):
    """`x`: (utterances, steps, coefficients) and mask (utterances, steps, 1); returns (utterances, 9) logits."""

    method: str
    units: int
    first_scale: Any = 1.0

    @nn.compact
    def __call__(self, inputs: tuple[Array, Array], train: bool) -> Array:
        x, mask = inputs
        begin = nn.initializers.constant(self.first_scale)
        driven = nn.Dense(self.units, use_bias=False)(x)
        if self.method.startswith("sequencewise"):
            norm = BatchNorm(not train, momentum=MOMENTUM, epsilon=EPSILON, use_bias=False, scale_init=begin)
            driven = norm(driven, mask=None if self.counts_padding else mask)
        kernel = self.param("kernel", nn.initializers.orthogonal(), (self.units, self.units))
        bias = self.param("bias", nn.initializers.zeros, (self.units,))
        both = x.shape[1], 2, self.units  # of the input's term and the state's
        scales = self.param("scales", begin, both[1:])  # of no effect where these are not normed
        mean = self.variable("batch_stats", "mean", jnp.zeros, both)
        var = self.variable("batch_stats", "var", jnp.ones, both)
        seen = self.variable("batch_stats", "seen", jnp.zeros, both[:1], bool)
        running = BNState(mean.value, var.value) if train else last_known(BNState(mean.value, var.value), seen.value)

        def step(h: Array, now: Any) -> tuple[Array, BNState]:
            driven, on, running = now
            terms, running = self.normed(jnp.stack((driven, h @ kernel)), scales, running, on, train)
            return jnp.where(on, jnp.tanh(terms.sum(0) + bias), h), running

        over_time = jnp.moveaxis(driven, 1, 0), jnp.moveaxis(mask, 1, 0), running
        h, new = jax.lax.scan(step, jnp.zeros((len(x), self.units)), over_time)
        if train:
            mean.value, var.value = new
            seen.value |= mask.any((0, 2)) | self.counts_padding
        return nn.Dense(SPEAKERS)(h)

    @property
    def counts_padding(self) -> bool:
        return self.method.endswith("padding counted")

    def normed(self, terms: Array, scales: Array, running: BNState, on: Array, train: bool) -> tuple[Array, BNState]:
        """Both terms (2, utterances, units) of one step, and its statistics."""
        told: dict[str, Any] = {"epsilon": EPSILON}
        if self.method == "layer norm":
            layer: Any = nn.LayerNorm(use_bias=False, parent=None, **told)
            return jax.vmap(lambda scale, a: layer.apply({"params": {"scale": scale}}, a))(scales, terms), running
        if not self.method.startswith("per step"):
            return terms, running

        def norm(scale: Array, running: BNState, a: Array) -> tuple[Array, BNState]:
            if not train:
                return bn_eval(BNParams(scale, None), running, a, **told), running
            counted = None if self.counts_padding else on
            return bn_train(BNParams(scale, None), running, a, momentum=MOMENTUM, mask=counted, **told)

        return jax.vmap(norm)(scales, running, terms)


def last_known(stats: BNState, seen: Array) -> BNState:
    """Statistics (steps, ...) where those after the last step `seen` in training are that step's."""
    steps = jnp.arange(len(seen))
    last = jnp.max(jnp.where(seen, steps, 0))
    return jax.tree.map(lambda each: each[jnp.minimum(steps, last)], stats)


def configuration(quick: bool) -> dict[str, Any]:
    return {
        "seeds": 4 if quick else 27,
        "choosing_seeds": 2 if quick else 3,
        "learning_rates": (0.01,) if quick else (0.001, 0.003, 0.01, 0.03),
        "first_scales": (0.1,) if quick else (0.1, 1.0),
        "methods": ("layer norm", "per step, masked", "sequencewise, masked", "per step, padding counted")
        if quick
        else tuple(COLORS),
        "units": 4 if quick else 32,
        "train_on": 270,
        "schedule": Schedule(steps=4 if quick else 300, batch_size=30, evaluate_every=2 if quick else 30)._asdict(),
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"method": method} for method in configuration["methods"]]


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Of the measured seeds: test error over training, and errors and utterances by length at the end."""
    schedule = Schedule(**configuration["schedule"])

    def run(key: Array, setting: Array, every: Any) -> dict[str, Array]:
        rate, first_scale = setting
        model = Recurrent(part["method"], configuration["units"], first_scale)
        data = drawn(jax.random.fold_in(key, 1), configuration["train_on"], *every)
        lengths = data.test_x[1].sum((1, 2))
        in_group = ((lengths[:, None] >= np.array(LENGTHS[:-1])) & (lengths[:, None] < np.array(LENGTHS[1:]))) * 1.0

        def evaluate(variables: Any) -> dict[str, Array]:
            logits: Any = model.apply(variables, data.test_x, train=False)
            wrong = ~((logits.argmax(-1) == data.test_y) & jnp.isfinite(logits).all(-1))
            return {"curve": wrong.mean(), "wrong": wrong @ in_group}

        optimizer = optax.adam(optax.linear_schedule(rate, 0, schedule.steps))
        found = train(model, optimizer, data, key, schedule, evaluate=evaluate).found
        last = {"error": found["curve"][-1], "wrong": found["wrong"][-1], "tested": in_group.sum(0)}
        return {**last, "curve": found["curve"]}

    settings = [(rate, scale) for rate in configuration["learning_rates"] for scale in configuration["first_scales"]]
    source = load_vowels()
    every = jax.tree.map(lambda *halves: np.concatenate(halves), source[:2], source[2:])
    return at_best(jax.jit(jax.vmap(run, (0, 0, None))), configuration, settings, every)


def drawn(key: Array, train_on: int, x: Any, y: Array) -> Split:
    """A split of all utterances, `train_on` of them to train on, by chance."""
    order = jax.random.permutation(key, len(y))
    (train_x, train_y), (test_x, test_y) = (
        jax.tree.map(lambda leaf, chosen=chosen: leaf[chosen], (x, y))
        for chosen in (order[:train_on], order[train_on:])
    )
    return Split(train_x, train_y, test_x, test_y)


def percent(rows: list[dict[str, Any]], method: str) -> np.ndarray:
    """Test error at the end of each measured seed / %."""
    return 100 * np.array(find(rows, method=method)["error"])


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    per_step, layer = percent(rows, "per step, masked"), percent(rows, "layer norm")
    return {
        "per step": (per_step - layer).tolist(),
        "sequencewise": (percent(rows, "sequencewise, masked") - layer).tolist(),
        "padding": (percent(rows, "per step, padding counted") - per_step).tolist(),
    }


def figure(results: Any) -> Any:
    told = results.configuration
    fig, panels = pyplot().subplots(1, 3, figsize=(7.2, 3.2), width_ratios=(0.8, 1, 1), layout="constrained")
    overall, over_time, over_length = panels
    steps = told["schedule"]["evaluate_every"] * np.arange(1, 1 + np.shape(results.rows[0]["curve"])[-1])
    groups = [f"{low}–{high - 1}" for low, high in itertools.pairwise(LENGTHS)]
    colors = [COLORS[method] for method in told["methods"]]
    for place, (method, color) in enumerate(zip(told["methods"], colors, strict=True)):
        row = find(results.rows, method=method)
        style = (0, (3, 1)) if method.endswith("counted") else "-"
        low, middle, high = interval(percent(results.rows, method).tolist())
        overall.plot((low, high), (place, place), color=color)
        overall.plot(middle, place, "o", color=color, markersize=5)
        lines(over_time, steps, 100 * np.array(row["curve"]), color, linestyle=style)
        by_length = 100 * np.array(row["wrong"]) / np.array(row["tested"])
        lines(over_length, np.arange(len(groups)), by_length, color, linestyle=style)
    overall.set(title="at the end", xlabel="test error / %", xlim=(0, None), ylim=(len(colors) - 0.5, -0.5))
    overall.set_yticks(range(len(colors)), [method.replace(", ", ",\n") for method in told["methods"]])
    for label, color in zip(overall.get_yticklabels(), colors, strict=True):
        label.set(color=color, weight="bold")
    over_time.set(title="over training", xlabel="training steps", ylabel="test error / %", ylim=(0, 30), xlim=(0, None))
    over_length.set(title="at the end, by length", xlabel="steps of the utterance", ylim=(0, None))
    over_length.set_xticks(range(len(groups)), groups)
    return fig
