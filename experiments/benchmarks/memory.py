"""How much memory does a training step of a network take with each batch norm?

Nothing runs: networks are traced for their shapes. Three figures, which do not say the same.

Saved: what the forward pass keeps for the backward pass, as JAX has it: the arrays in the closure of `jax.vjp` that
are not parameters, statistics or images, each once; bfloat16. Where one program has both passes, XLA may compute anew
what is cheap, and keep less; into kernels it does not see.

Planned: temporary memory of the step (loss and gradient) as XLA plans it for this host's CPU, float32. There XLA takes
back what `jax.checkpoint` asks for, so that the policy shows no gain in it.

Peak: what a GPU held at most, from the runs that are committed (`flight2.jsonl`), where the network and its batch are
the same; with the policy, of the network in six checkpoints in place of one.

PyTorch and InPlace-ABN are computed, not run, for the same network and dtype, by what their sources keep. PyTorch
(tools/autograd/derivatives.yaml): the input of each convolution and dense layer, and its weights in bfloat16; the input
of each average pooling and batch norm, the output of each relu, input and int64 indices of each max pooling; a tensor
that several keep counts once. InPlace-ABN
(inplace_abn/functions.py, leaky_relu in place of relu): of a batch norm and its activation the output alone, of which
x̂ is computed; one that a residual is added to is kept beside the sum's. Vectors of a channel's length are left out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Jaxpr, Var

import jbn.linen
from experiments.framework.lines import read
from experiments.framework.plots import BLUE, GREEN, GREY, INK, ORANGE, SKY, VERMILION, pyplot
from experiments.framework.record import CHECKOUT, Options, Results, progress
from experiments.material.models import POLICY, ResNet50
from experiments.material.networks import DenseNet121, UNet
from experiments.material.train import cross_entropy

ENVIRONMENT = {"JAX_PLATFORMS": "cpu"}
FLIGHT = CHECKOUT / "experiments/results/gpu/nvidia-h100-80gb-hbm3/flight2.jsonl"
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "ResNet-50": (ResNet50, (128, 224, 224, 3)),
    "DenseNet-121": (DenseNet121, (128, 224, 224, 3)),
    "U-Net": (UNet, (16, 256, 256, 3)),
}
QUICK_NETWORKS = {"U-Net of two levels": (functools.partial(UNet, features=(8, 16)), (2, 16, 16, 3))}
KEPT = "kept"


class Candidate(NamedTuple):
    """A batch norm, and how the network is built with it and differentiated."""

    norm: Callable[..., Any]
    fused: bool = False
    policy: Any = None
    measured_as: str = ""  # in the GPU's runs


class OnPaper(nn.Module):
    """In a batch norm's place: names what PyTorch's autograd, or with `in_place` InPlace-ABN, keeps of it."""

    in_place: bool = False
    activation: str | None = None
    use_running_average: Any = None
    momentum: Any = None
    epsilon: Any = None
    dtype: Any = None
    scale_init: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, residual: jax.Array | None = None) -> jax.Array:
        y = (x if self.in_place else checkpoint_name(x, KEPT)) + 1  # another array
        if self.in_place and (residual is not None or self.activation is None):
            y = checkpoint_name(y, KEPT)
        y = y if residual is None else y + residual
        return y if self.activation is None else checkpoint_name(nn.relu(y), KEPT)


CANDIDATES = {
    "flax.linen": Candidate(nn.BatchNorm, measured_as="flax.linen"),
    "jbn": Candidate(jbn.linen.BatchNorm),
    "jbn, fused": Candidate(jbn.linen.BatchNorm, fused=True, measured_as="jbn triton"),
    "jbn, fused, policy": Candidate(jbn.linen.BatchNorm, fused=True, policy=POLICY, measured_as="jbn triton"),
    "PyTorch": Candidate(OnPaper, fused=True),
    "InPlace-ABN": Candidate(functools.partial(OnPaper, in_place=True), fused=True),
}
BASELINE = "flax.linen"
ON_PAPER = ("PyTorch", "InPlace-ABN")
COLORS = dict(zip(CANDIDATES, (GREY, SKY, BLUE, GREEN, VERMILION, ORANGE), strict=True))


def run(options: Options, results: Results) -> None:
    """A row for each network and candidate."""
    networks = QUICK_NETWORKS if options.quick else NETWORKS
    results.configuration = {
        "quick": options.quick,
        "images": {name: list(shape) for name, (_, shape) in networks.items()},
    }
    with progress(len(networks) * len(CANDIDATES)) as part:
        for network, (build, shape) in networks.items():
            for name, candidate in CANDIDATES.items():
                part(f"{network}, {name}")
                paper = name in ON_PAPER
                saved = on_paper if paper else saved_bytes
                results.rows.append(
                    {
                        "network": network,
                        "candidate": name,
                        "saved_bytes": saved(*traceable(build, candidate, shape, "bfloat16")),
                        "planned_bytes": None
                        if paper
                        else planned_bytes(*traceable(build, candidate, shape, "float32")),
                        "peak_bytes": peak_bytes(network, candidate, shape[0]),
                    }
                )


def traceable(
    build: Callable[..., nn.Module], candidate: Candidate, shape: tuple[int, ...], dtype: str
) -> tuple[Any, ...]:
    """The network as a function (params, stats, images) → (logits, new stats), and what stands for its arguments."""
    model = build(norm=candidate.norm, dtype=jnp.dtype(dtype), fused=candidate.fused)
    images = jax.ShapeDtypeStruct(shape, dtype)
    variables = jax.eval_shape(functools.partial(model.init, train=True), jax.random.key(0), images)

    def network(params: Any, stats: Any, images: Any) -> Any:
        y, updates = model.apply({"params": params, **stats}, images, train=True, mutable=["batch_stats"])
        return y, updates

    stats = {name: tree for name, tree in variables.items() if name != "params"}
    return (
        jax.checkpoint(network, policy=candidate.policy) if candidate.policy else network,
        variables["params"],
        stats,
        images,
    )


def saved_bytes(network: Callable[..., Any], *arguments: Any) -> int:
    """What the closure of the network's `jax.vjp` holds beside arguments."""

    def kept(params: Any, stats: Any, images: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda params: network(params, stats, images), params, has_aux=True)[1])

    jaxpr = jax.make_jaxpr(kept)(*arguments).jaxpr
    return beside_arguments(jaxpr, jaxpr.outvars)


def on_paper(network: Callable[..., Any], *arguments: Any) -> int:
    """What PyTorch's autograd keeps of the operations in the network."""
    jaxpr = jax.make_jaxpr(network)(*arguments).jaxpr
    kept, indices = [], 0
    for eqn in jaxpr.eqns:
        match eqn.primitive.name:
            case "conv_general_dilated" | "dot_general":
                kept += eqn.invars
            case "reduce_window_sum":
                kept.append(eqn.invars[0])
            case "reduce_window_max":
                kept.append(eqn.invars[0])
                indices += 8 * eqn.outvars[0].aval.size
            case "name" if eqn.params["name"] == KEPT:
                kept.append(eqn.outvars[0])
    return beside_arguments(jaxpr, kept) + indices


def beside_arguments(jaxpr: Jaxpr, values: list[Any]) -> int:
    """Bytes of these values, each once, without the jaxpr's own arguments."""
    found = {value for value in values if isinstance(value, Var)} - {*jaxpr.invars}
    shapes: list[Any] = [value.aval for value in found]
    return sum(shape.size * shape.dtype.itemsize for shape in shapes)


def planned_bytes(network: Callable[..., Any], params: Any, stats: Any, images: Any) -> int:
    """Temporary memory of loss and gradient, as XLA plans it here."""

    def loss(params: Any, stats: Any, images: Any, labels: Any) -> Any:
        logits, updates = network(params, stats, images)
        return cross_entropy(logits.astype(jnp.float32), labels), updates

    logits, _ = jax.eval_shape(network, params, stats, images)
    labels = jax.ShapeDtypeStruct(logits.shape[:-1], jnp.int32)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    plan: Any = step.lower(params, stats, images, labels).compile().memory_analysis()
    return plan.temp_size_in_bytes


def peak_bytes(network: str, candidate: Candidate, batch: int) -> int | None:
    """What an H100 held at most in this step, if that was measured."""
    if network != "ResNet-50" or not candidate.measured_as:
        return None
    asked = candidate.measured_as, batch, candidate.policy is not None
    steps = [line for line in read([FLIGHT]) if line["kind"] == "step"]
    found = {(step["candidate"], step["batch"], step["named"]): step["peak_bytes"] for step in steps}
    return found.get(asked)  # the last, where it was measured twice


def table(results: Results) -> Any:
    """Every figure in GiB, saved bytes also over Flax's."""
    from rich.table import Table

    shown = Table(
        title="memory of a training step, GiB",
        caption="Saved: bfloat16, between the passes. Planned: float32, by XLA for a CPU. Peak: bfloat16, of an H100.",
    )
    for column in ("network", "candidate", "saved", "over Flax's", "planned", "peak"):
        shown.add_column(column, justify="left" if column in ("network", "candidate") else "right")
    for row in results.rows:
        over = row["saved_bytes"] / of(results, row["network"], BASELINE)["saved_bytes"]
        figures = [gib(row[f"{kind}_bytes"]) for kind in ("saved", "planned", "peak")]
        shown.add_row(row["network"], row["candidate"], figures[0], f"{over:.2f}×", *figures[1:])
    return shown


def of(results: Results, network: str, candidate: str) -> dict[str, Any]:
    """One row."""
    return next(row for row in results.rows if (row["network"], row["candidate"]) == (network, candidate))


def gib(size: int | None) -> str:
    """Bytes in GiB, to three digits."""
    if size is None:
        return "–"
    digits = max(0, 2 - math.floor(math.log10(size / 2**30)))
    return f"{size / 2**30:.{digits}f}"


def found(results: Results) -> list[str]:
    """What the policy keeps over InPlace-ABN; what each network keeps with each."""
    networks = results.configuration["images"]

    def saved(network: str, name: str) -> int:
        return of(results, network, name)["saved_bytes"]

    def told(name: str) -> str:
        return f"{name} {', '.join(gib(saved(network, name)) for network in networks)}"

    over = ", ".join(
        f"{saved(network, 'jbn, fused, policy') / saved(network, 'InPlace-ABN'):.2f}× ({network})"
        for network in networks
    )
    return [
        f"The policy keeps {over} of what InPlace-ABN would, whatever the activation.",
        f"GiB kept between the passes in bfloat16, {', '.join(networks)}: {'; '.join(map(told, CANDIDATES))}.",
    ]


def figure(results: Results) -> Any:
    """Saved bytes, a panel for each network and a bar for each candidate; a line where an H100's peak was."""
    networks = results.configuration["images"]
    fig, panels = pyplot().subplots(
        len(networks), figsize=(5, 0.5 + 1.5 * len(networks)), squeeze=False, layout="constrained"
    )
    for axes, network in zip(panels[:, 0], networks, strict=True):
        rows = [row for row in results.rows if row["network"] == network]
        most = max(row["saved_bytes"] for row in rows) / 2**30
        for place, row in enumerate(rows):
            saved, peak = row["saved_bytes"], row["peak_bytes"]
            axes.barh(place, saved / 2**30, 0.6, color=COLORS[row["candidate"]])
            end = max(saved, peak or 0) / 2**30
            if peak:
                axes.plot([peak / 2**30] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.5)
            says = gib(saved) if peak is None else f"{gib(saved)}, H100's peak {gib(peak)}"
            axes.annotate(says, (end, place), (4, 0), textcoords="offset points", va="center", fontsize=8)
        images = "×".join(map(str, networks[network]))
        axes.set_yticks(range(len(rows)), [row["candidate"] for row in rows])
        axes.set(title=f"{network}, {images}", ylim=(len(rows) - 0.5, -0.5), xlim=(0, 1.6 * most))
        axes.grid(False)
    panels[-1, 0].set(xlabel="GiB kept between forward and backward pass, bfloat16")
    return fig
