"""Can batch norm undo itself, and does training find that?

With scale γ = √(σ² + ε) and bias β = μ, the statistics of its input, batch norm should return its input. First these
parameters are set (`jbn.identity_params`), on 1,000 hours of bike rental in natural units (12 features, from 0 or 1 to
days since the start) and on 1,000 digits (784 pixels, some of them always 0), in training and in inference; the error
is the largest difference over the feature's largest value.

Then they are learned. A batch norm layer starts with γ = 1, β = 0 and is trained to reproduce its input, the 1,000
hours, with half the squared error summed over the features, by plain SGD, its rate falling linearly from 0.2 to 0. In
γ and β this is a quadratic with unit curvature whatever the data, so nothing but the layer is tested. Once all hours
make one batch, whose statistics never change. Then batches are drawn, of 60 as in the paper's MNIST network and of
other sizes: now each batch has statistics of its own, which fixed γ and β cannot follow. For
evaluation the hours are cut once, in the order drawn, into batches of the size trained with, the remainder left out,
and the error is taken in training mode. What the bias alone must miss, the variance of a batch's mean, is 1/B − 1/n of
the variance (B of n examples, drawn without repetition). In inference, where the statistics stand still, the first
claim holds whatever the batches were.

A seed draws the examples and the batches.
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
from experiments.framework.claim import Claim, Rule, interval
from experiments.framework.plots import BLUE, DASHES, GREEN, GREY, ORANGE, PURPLE, lines, name, pyplot
from experiments.framework.study import find
from experiments.material.data import Split
from experiments.material.data.bikes import load_bikes
from experiments.material.data.digits import load_digits
from experiments.material.models import EPSILON, BatchNorm
from experiments.material.train import Schedule, seeds, train, wait

EPS = float(np.finfo(np.float32).eps)
IOFFE = "Ioffe & Szegedy 2015, section 3"
CLAIMS = {
    "set": Claim(
        says="With γ = σ and β = μ batch norm returns its input.",
        source=IOFFE,
        effect="largest error over the feature's largest value, in units of float32's epsilon",
        rule=Rule(supported=(0, 8), contradicted=(1e4, np.inf)),  # a product and three sums; 1e4 are 0.1 %
        unit=" eps",
    ),
    "learned": Claim(
        says="Training finds γ = σ and β = μ where that is the best.",
        source=IOFFE + " (“if that were the optimal thing to do”)",
        effect="largest distance of γ from σ and of β from μ, over σ, in units of float32's epsilon; one batch",
        # SGD stands still where its update is less than half a unit in the last place of a parameter
        rule=Rule(supported=(0, 100), contradicted=(1e4, np.inf)),
        unit=" eps",
    ),
    "batches": Claim(
        says="Training finds it in batches of 60 too, so that batch norm represents the identity in training.",
        source="drawn from " + IOFFE + " and 3.1, which do not claim it: statistics are a batch's own",
        effect="variance of the input that is not reproduced, mean over features",
        rule=Rule(supported=(0, 0.1), contradicted=(1, np.inf)),
        unit=" %",
    ),
}
CAPTION = (
    "A batch norm layer learns to reproduce its input. Left: root mean square error over training steps, in the "
    "features' standard deviations. Right: variance that is still not reproduced at the end, over the batch size; in "
    "theory no fixed bias gets below the dashed line. Means over seeds with 95 % intervals."
)
JUDGED_BATCH = 60


def configuration(quick: bool) -> dict[str, Any]:
    examples = 120 if quick else 1000
    return {
        "seeds": 4 if quick else 20,
        "examples": examples,
        "data": ("bikes",) if quick else ("bikes", "digits"),
        "batch_sizes": (JUDGED_BATCH, examples) if quick else (15, JUDGED_BATCH, 250, examples),
        "learning_rate": 0.2,
        "steps": 8 if quick else 200,
        "evaluate_every": 4,
    }


def parts(configuration: dict[str, Any]) -> list[dict[str, Any]]:
    exact = [{"parameters": "set", "data": data} for data in configuration["data"]]
    return exact + [{"parameters": "learned", "batch_size": size} for size in configuration["batch_sizes"]]


class Layer(nn.Module):
    """Batch norm and nothing else."""

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        return BatchNorm(use_running_average=not train, epsilon=EPSILON)(x)


def measure(configuration: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    """Set: the error (seeds,). Learned: what `distance` tells, (seeds, evaluations)."""
    pool = (load_digits() if part.get("data") == "digits" else load_bikes()).train_x
    keys = seeds(configuration)
    drawn = draw(keys, pool.reshape(len(pool), -1), configuration["examples"])
    if part["parameters"] == "set":
        return {"error": wait(jax.jit(jax.vmap(error))(drawn))}

    rate = optax.linear_schedule(configuration["learning_rate"], 0, configuration["steps"])
    schedule = Schedule(configuration["steps"], part["batch_size"], configuration["evaluate_every"])

    def learn(key: Array, x: Array) -> dict[str, Array]:
        told: dict[str, Any] = {"loss": half_squares, "evaluate": distance(x, part["batch_size"])}
        return train(Layer(), optax.sgd(rate), Split(x, x, x, x), key, schedule, **told).found

    return wait(jax.jit(jax.vmap(learn))(keys, drawn))


@functools.partial(jax.jit, static_argnums=2)
def draw(keys: Array, pool: Array, examples: int) -> Array:
    """(keys, examples, features): for each key, examples from the pool, none twice."""
    return jax.vmap(lambda key: jax.random.choice(jax.random.fold_in(key, 1), pool, (examples,), replace=False))(keys)


def half_squares(y: Array, x: Array) -> Array:
    """Half the squared error: mean over examples, sum over features."""
    return jnp.square(y - x).sum(-1).mean() / 2


def error(x: Array) -> Array:
    """Largest |y − x| over the feature's largest |x|, where the parameters make y = x, in training and inference."""
    seen = jbn.moments(x)
    state = jbn.BNState(seen.mean, seen.variance())
    params = jbn.identity_params(state, epsilon=EPSILON)
    trained, _ = jbn.bn_train(params, state, x, epsilon=EPSILON)
    wrong = jnp.abs(jnp.stack([trained, jbn.bn_eval(params, state, x, epsilon=EPSILON)]) - x).max((0, 1))
    largest = jnp.abs(x).max(0)
    return (wrong / jnp.where(largest > 0, largest, 1)).max()


def distance(x: Array, batch_size: int) -> Any:
    """A function of variables: the layer's distance from the identity on `x`, cut into batches.

    missed: the squared error in training mode over the variance, mean over features. off: the largest distance
    of scale from √(σ² + ε) and of bias from μ, in σ.
    """
    var, wanted = x.var(0), jbn.BNState(x.mean(0), x.var(0))
    scale, bias = jbn.identity_params(wanted, epsilon=EPSILON)
    batches = x[: len(x) // batch_size * batch_size].reshape(-1, batch_size, x.shape[1])

    def evaluate(variables: Any) -> dict[str, Array]:
        def reproduced(batch: Array) -> Any:
            return Layer().apply(variables, batch, train=True, mutable=["batch_stats"])[0]

        squares = jnp.square(jax.vmap(reproduced)(batches) - batches).mean((0, 1))
        learned = variables["params"]["BatchNorm_0"]
        off = jnp.maximum(jnp.abs(learned["scale"] - scale), jnp.abs(learned["bias"] - bias))
        return {"missed": (squares / var).mean(), "off": (off / jnp.sqrt(var)).max()}

    return evaluate


def effects(rows: list[dict[str, Any]], configuration: dict[str, Any]) -> dict[str, list[float]]:
    exact = [find(rows, parameters="set", data=data)["error"] for data in configuration["data"]]
    whole, drawn = (find(rows, batch_size=size) for size in (configuration["examples"], JUDGED_BATCH))
    return {
        "set": (np.max(exact, 0) / EPS).tolist(),
        "learned": (np.array(whole["off"])[:, -1] / EPS).tolist(),
        "batches": (100 * np.array(drawn["missed"])[:, -1]).tolist(),
    }


def figure(results: Any) -> Any:
    told = results.configuration
    fig, (curves, ends) = pyplot().subplots(1, 2, figsize=(7.2, 3.2), layout="constrained", width_ratios=(3, 2))
    *drawn, examples = told["batch_sizes"]
    steps = np.arange(told["evaluate_every"], told["steps"] + 1, told["evaluate_every"])
    whole = np.array(find(results.rows, batch_size=examples)["missed"])
    lines(curves, steps, np.sqrt(whole), BLUE, "one batch")
    for size, color, raised in zip(drawn, (PURPLE, ORANGE, GREEN), (6, 0, -6), strict=False):
        missed = np.array(find(results.rows, batch_size=size)["missed"])
        lines(curves, steps, np.sqrt(missed), color)
        name(curves, steps[-1], np.sqrt(missed[:, -1]).mean(), f"batches of {size}", color, xytext=(4, raised))
        low, mean, high = interval((100 * missed[:, -1]).tolist())
        ends.errorbar(size, mean, [[mean - low], [high - mean]], color=color, marker="o", capsize=3)
        name(ends, size, mean, f"{mean:.1f} %", color, xytext=(8, 3))
    curves.axhline(EPS, color=GREY, linewidth=0.8)
    curves.annotate("float32's epsilon", (0, EPS), (2, -9), textcoords="offset points", color=GREY)
    curves.set(title="error while it learns", xlabel="training steps", ylabel="RMS error / standard deviation")
    curves.set(yscale="log", xlim=(0, 1.4 * steps[-1]), xticks=np.linspace(0, told["steps"], 5), ylim=(2e-8, None))
    across = np.geomspace(drawn[0], drawn[-1] * 1.5)
    ends.plot(across, 100 * (1 / across - 1 / examples), color=GREY, linestyle=DASHES, linewidth=1)
    ends.set(title="not reproduced at the end", xlabel="batch size", ylabel="share of the variance / %")
    ends.set(xscale="log", yscale="log", xlim=(0.8 * drawn[0], 2.5 * drawn[-1]), ylim=(0.1, 20))
    ends.set_xticks(drawn, drawn)
    ends.set_yticks((0.1, 1, 10), ("0.1", "1", "10"))
    ends.minorticks_off()
    name(ends, drawn[0], 0.3, "dashed: what no\nfixed bias follows", GREY)
    return fig
