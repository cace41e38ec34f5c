"""The rows of measurements that the package ships: ResNet-50's batch norms by kernels and by XLA, on this host's GPU.

`jbn.autotune` measures the distinct batch norms of ResNet-50 at `--batches`, channels last, alone, with relu and with
add + relu, in training; and in `--out` writes the file of the GPU's kind, which `implementation=None` goes by once it
is in `jbn/_op/measured/`. Nothing else should run on the device.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

import jbn
from experiments.framework.plots import BLUE, GREY, VERMILION, pyplot
from experiments.framework.record import Options, Results
from experiments.material import cases
from jbn._op import tables

FUSED = {"alone": (False, None), "relu": (False, "relu"), "add + relu": (True, "relu")}
DTYPES = ("bfloat16", "float32")


def arguments(parser: Any) -> None:
    """Options of this experiment alone."""
    parser.add_argument("--batches", type=int, nargs="+", default=[128, 256], help="images (default: 128 256)")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES, help="of x (default: both)")


def run(options: Options, results: Results) -> None:
    """Measures all, again if they are in the file."""
    size, given = 32 if options.quick else 224, options.arguments
    found = cases.distinct(case for batch in given.batches for case in cases.resnet50(batch, size))
    results.configuration = {"batches": given.batches, "dtypes": given.dtypes, "size": size, "quick": options.quick}
    xs = [jax.ShapeDtypeStruct(case.shape, jnp.dtype(dtype)) for dtype in given.dtypes for case in found]
    try:
        tuning = jbn.autotune(gradients, xs, path=options.out, ignore_cache=True)
    except RuntimeError as error:
        raise SystemExit(f"error: {error}") from error
    results.rows += [
        tables.as_json(row) | {"forward_speed": row.speed(False), "backward_speed": row.speed(True)}
        for row in tuning.rows
    ]
    results.summary = {"device": tuning.device, "file": tuning.file}
    print(tuning)


def gradients(xs: list[jax.Array]) -> Any:
    """Every batch norm forward and backward: of x, parameters and residual."""

    def loss(given, activation):
        params, x, residual = given
        _, state = jbn.bn_init(x.shape[-1])
        y, _ = jbn.bn_train(params, state, x, residual=residual, activation=activation)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return [
        jax.grad(loss)((jbn.bn_init(x.shape[-1])[0], x, x if residual else None), activation)
        for residual, activation in FUSED.values()
        for x in xs
    ]


def table(results: Results) -> Any:
    """XLA's time over that of the kernels, of each pass."""
    from rich.table import Table

    shown = Table(title=results.summary["device"], caption=results.summary["file"])
    for name in ("x", "dtype", "with", "forward", "backward", "failed"):
        shown.add_column(name)
    for row in results.rows:
        speeds = ("–" if row[f"{each}_speed"] is None else f"{row[f'{each}_speed']:.2f}×" for each in tables.PASSES)
        shown.add_row("×".join(map(str, row["shape"])), row["dtype"], fused(row), *speeds, row["failed"] or "")
    return shown


def figure(results: Results) -> Any:
    """XLA's time over that of the kernels, over the size of x: a dot a batch norm."""
    plt = pyplot()
    fig, panels = plt.subplots(1, 2, figsize=(7.2, 3.2), sharey=True, layout="constrained")
    for ax, each in zip(panels, tables.PASSES, strict=True):
        for name, color in zip(FUSED, (GREY, BLUE, VERMILION), strict=True):
            rows = [row for row in results.rows if fused(row) == name and row[f"{each}_speed"] is not None]
            sizes = [jnp.dtype(row["dtype"]).itemsize * math.prod(row["shape"]) / 1e6 for row in rows]
            ax.plot(sizes, [row[f"{each}_speed"] for row in rows], "o", color=color, markersize=3, label=name)
        ax.axhline(1, color=GREY, linewidth=1)
        ax.set(xscale="log", xlabel="x / MB", title=each)
    panels[0].set_ylabel("XLA's time over the kernels'")
    panels[0].legend(frameon=False)
    return fig


def fused(row: dict[str, Any]) -> str:
    """The name of what the batch norm is with."""
    return next(name for name, kind in FUSED.items() if kind == (row["residual"] is not None, row["activation"]))
