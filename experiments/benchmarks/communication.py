"""What do batch norm's collectives bring to a device in a training step of ResNet-50?

Every distinct width of ResNet-50's 53 batch norms is lowered once a candidate and number of devices, forward and
backward to x, float32, the batch split over the devices; collectives and the sizes of their results are read from the
program's text, and multiplied by how many layers have that width. The gradients of scale and bias are left out: they
are part of the sum that every parameter's gradient takes.

Up to 2,048 devices, which is what XLA gives one process of a CPU, the program is compiled (under `jit`, without a
name for the axis); beyond, it is lowered with the axis named inside `shard_map`, where collectives stand in the text
before XLA compiles it, as they do for groups of devices, which need a name. PyTorch's SyncBatchNorm is not run: counts
and sizes are computed from what its source calls (torch/nn/modules/_functions.py): forward all_gather of mean, inverse
deviation and count, 2C + 1 numbers a device, backward all_reduce of 2C.

From results to bytes received by a device, as ring algorithms have it (n devices): (n − 1)/n of what is gathered, twice
(n − 1)/n of what is summed.
"""

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn.linen
from experiments.framework.plots import BLUE, GREEN, GREY, VERMILION, name, pyplot
from experiments.framework.record import Options, Results, progress
from experiments.material.cases import resnet50

DEVICES, QUICK_DEVICES = (8, 256, 4096), (8,)
COMPILABLE = 2048
ENVIRONMENT = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES[-1]}"}
GROUP = 8  # devices that share statistics where groups do
WIDTHS = Counter(norm.shape[norm.axis] for norm in resnet50(1))  # channels: layers
NUMBER = 4  # bytes

HLO = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
STABLEHLO = re.compile(
    r'"stablehlo\.(all_reduce|all_gather|all_to_all|collective_permute|reduce_scatter)".*? : \([^)]*\) -> ([^\n]*)',
    re.DOTALL,
)


class Collective(NamedTuple):
    """One collective of a program: its kind, and the bytes of its result on a device."""

    kind: str
    size: int

    def received(self, devices: int) -> float:
        """Bytes that reach a device of a ring."""
        return (2 if self.kind == "all-reduce" else 1) * self.size * (devices - 1) / devices


def compiled(function: Callable[..., Any], *arguments: Any) -> list[Collective]:
    """The collectives that are left once XLA has compiled."""
    text = jax.jit(function).lower(*arguments).compile().as_text() or ""
    shapes = re.compile(r"f32\[([\d,]*)\]")
    return [Collective(kind, size(shapes.findall(result), ",")) for result, kind in HLO.findall(text)]


def lowered(function: Callable[..., Any], *arguments: Any) -> list[Collective]:
    """The collectives that the program asks for."""
    text = jax.jit(function).lower(*arguments).as_text()
    shapes = re.compile(r"tensor<([\dx]*?)x?f32>")
    found = STABLEHLO.findall(text)
    return [Collective(kind.replace("_", "-"), size(shapes.findall(result), "x")) for kind, result in found]


def size(shapes: list[str], separator: str) -> int:
    """Bytes of float32 arrays of these shapes."""
    return NUMBER * sum(int(np.prod([int(n) for n in shape.split(separator) if n], dtype=int)) for shape in shapes)


def collectives(norm: Any, devices: int, channels: int, groups: Any = None) -> tuple[str, list[Collective]]:
    """Where one layer's collectives were read, and what they are."""
    mesh = Mesh(np.array(jax.devices()[:devices]), "data")
    split, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((2 * devices, 2, 2, channels), jnp.float32, sharding=split)
    vector = jax.ShapeDtypeStruct((channels,), jnp.float32, sharding=whole)
    variables = {"params": {"scale": vector, "bias": vector}, "batch_stats": {"mean": vector, "var": vector}}
    named = groups is not None or devices > COMPILABLE
    layer = norm(use_running_average=False, axis_name="data" if named else None, axis_index_groups=groups)

    def step(variables: Any, x: jax.Array, cotangent: jax.Array) -> Any:
        y, pullback, state = jax.vjp(lambda x: layer.apply(variables, x, mutable=["batch_stats"]), x, has_aux=True)
        return y, state, pullback(cotangent)

    if not named:
        return "compiled", compiled(step, variables, x, x)
    rows, all_ = P("data"), P()
    # unchecked, since groups leave each its own state
    mapped = jax.shard_map(step, mesh=mesh, in_specs=(all_, rows, rows), out_specs=(rows, all_, rows), check_vma=False)
    return "lowered", lowered(mapped, variables, x, x)


def in_groups(devices: int) -> list[list[int]]:
    """Neighbours in groups of `GROUP`."""
    return np.arange(devices).reshape(-1, GROUP).tolist()


def sync_batch_norm(devices: int, channels: int) -> tuple[str, list[Collective]]:
    """What PyTorch's source asks for."""
    gathered = NUMBER * devices * (2 * channels + 1)
    return "computed", [Collective("all-gather", gathered), Collective("all-reduce", NUMBER * 2 * channels)]


CANDIDATES: dict[str, Callable[[int, int], tuple[str, list[Collective]]]] = {
    "jbn": lambda devices, channels: collectives(jbn.linen.BatchNorm, devices, channels),
    f"jbn, groups of {GROUP}": lambda devices, channels: collectives(
        jbn.linen.BatchNorm, devices, channels, in_groups(devices)
    ),
    "flax.linen": lambda devices, channels: collectives(flax.linen.BatchNorm, devices, channels),
    "PyTorch SyncBatchNorm": sync_batch_norm,
}
COLORS = dict(zip(CANDIDATES, (BLUE, GREEN, GREY, VERMILION), strict=True))


def run(options: Options, results: Results) -> None:
    """Reads the collectives of every width; a row for each candidate and number of devices."""
    numbers = QUICK_DEVICES if options.quick else DEVICES
    if jax.device_count() < max(numbers):
        raise SystemExit(
            f"error: there are {jax.device_count()} {jax.default_backend()} devices, {max(numbers)} are needed: unset "
            f"{' and '.join(ENVIRONMENT)}, which this command sets itself"
        )
    results.configuration = {"quick": options.quick, "devices": list(numbers), "layers": dict(WIDTHS), "group": GROUP}
    with progress(len(numbers) * len(CANDIDATES)) as part:
        for devices in numbers:
            for name, candidate in CANDIDATES.items():
                part(f"{name}, {devices} devices")
                found = {channels: candidate(devices, channels) for channels in WIDTHS}
                results.rows.append(row(devices, name, found))


def row(devices: int, name: str, found: dict[int, tuple[str, list[Collective]]]) -> dict[str, Any]:
    """The step's total, and one layer of each width."""
    sharing = GROUP if "groups" in name else devices
    step = [each for channels, (_, layer) in found.items() for each in layer * WIDTHS[channels]]
    return {
        "devices": devices,
        "candidate": name,
        "read": next(iter(found.values()))[0],
        "collectives": len(step),
        "result_bytes": sum(each.size for each in step),
        "received_bytes": round(sum(each.received(sharing) for each in step)),
        "layers": {channels: [list(each) for each in layer] for channels, (_, layer) in found.items()},
    }


def amount(received: float) -> str:
    """Bytes as MB."""
    return f"{received / 1e6:.3g} MB"


def table(results: Results) -> Any:
    """Collectives and received bytes of a step."""
    from rich.table import Table

    shown = Table(title="batch norms of ResNet-50, one training step, float32")
    for column in ("devices", "candidate", "collectives", "received by a device", "read from"):
        shown.add_column(column, justify="left" if column in ("candidate", "read from") else "right")
    for each in results.rows:
        shown.add_row(
            str(each["devices"]),
            each["candidate"],
            str(each["collectives"]),
            amount(each["received_bytes"]),
            each["read"],
        )
    return shown


def found(results: Results) -> list[str]:
    """What each candidate brings on the most devices; how many collectives each takes."""
    most = max(each["devices"] for each in results.rows)
    received = (f"{amount(each['received_bytes'])} ({each['candidate']})" for each in on(results, most))
    collectives = (
        f"{name}: {', '.join(str(each['collectives']) for each in results.rows if each['candidate'] == name)}"
        for name in CANDIDATES
    )
    numbers = ", ".join(f"{devices:,}" for devices in sorted({each["devices"] for each in results.rows}))
    return [
        f"On {most:,} devices each receives, in a step, {', '.join(received)}.",
        f"Collectives of a step on {numbers} devices, {'; '.join(collectives)}.",
    ]


def on(results: Results, devices: int) -> list[dict[str, Any]]:
    """The rows of one number of devices."""
    return [each for each in results.rows if each["devices"] == devices]


def figure(results: Results) -> Any:
    """Bytes received and collectives: a panel for each number of devices, a dot for each candidate.

    Nothing joins numbers of devices: jbn chooses another algorithm for many than for few.
    """
    numbers = sorted({each["devices"] for each in results.rows})
    fig, panels = pyplot().subplots(
        len(numbers), figsize=(4.6, 0.9 + 1.05 * len(numbers)), sharex=True, squeeze=False, layout="constrained"
    )
    for axes, devices in zip(panels[:, 0], numbers, strict=True):
        rows = on(results, devices)
        for place, each in enumerate(rows):
            color, received = COLORS[each["candidate"]], each["received_bytes"]
            axes.plot(received / 1e6, place, "o", color=color)
            name(axes, received / 1e6, place, f"{amount(received)} in {each['collectives']}", color, xytext=(7, 0))
        axes.set_yticks(range(len(rows)), [each["candidate"] for each in rows])
        axes.set(title=f"{devices:,} devices", xscale="log", ylim=(len(rows) - 0.4, -0.6))
        axes.grid(False)  # no line crosses what is written
        axes.minorticks_off()
    most = max(each["received_bytes"] for each in results.rows) / 1e6
    panels[-1, 0].set(xlabel="MB received by a device in a step,\nand in how many collectives", xlim=(0.4, 30 * most))
    panels[-1, 0].xaxis.set_major_formatter("{x:g}")
    return fig
