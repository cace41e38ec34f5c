"""Which implementation runs.

The rule: "xla" and "triton" do as they say, or raise. None takes the kernels where they were measured to win and can
run, and plain XLA everywhere else. What was measured is data: the package's rows for single batch norms, its table
`WINS` below for all from a size on, and behind these the user's rows, of `jbn.autotune` (`tables.py`).
"""

import functools
import importlib.metadata
import re
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbn._op import tables
from jbn._op.gpu import GPUS, INSTALL, Device, gpu
from jbn._op.plan import Plan, in_megabytes, is_symbolic, size_in_bytes


class Win(NamedTuple):
    """On these devices, for x of this dtype and layout and at least so many bytes, kernels took no longer than XLA."""

    device: str  # what the device's kind begins with, e.g. "NVIDIA H100"
    dtype: str
    layout: str  # "last" or "first": where the channels are
    size: int  # bytes of x
    source: str  # the file of results


# From `python -m experiments speed` on a GPU, whose summary proposes these rows. None as yet: single rows alone.
WINS: tuple[Win, ...] = ()

OLDEST = {"triton": "3.6", "jax-triton": "0.3.1"}
CAPABILITY = 80  # the kernels' oldest compute capability, times ten
AMD = ("gfx90a", "gfx94", "gfx95")  # what the names of architectures with a compiled kernel begin with


class Measured(NamedTuple):
    """All that was measured on a kind of device."""

    kind: str
    wins: tuple[Win, ...]
    tables: tables.Tables

    @classmethod
    def on(cls, kind: str) -> "Measured":
        return cls(kind, WINS, tables.of(kind))


class Watch:
    """Keeps the batch norms that None decides on while a program is lowered, as devices have them, and their passes."""

    def __init__(self):
        self.name = uuid.uuid4().hex  # so that no rule of another program, and none from a cache, answers the compiler
        self.found: dict[tables.Norm, set[bool]] = {}  # whether a pass is backward
        self.asks = False  # whether the compiler has to say what a device has
        self.compiling = False  # set when it does

    def note(self, name: str, plan: Plan, x) -> None:
        """A piece of this name has this x."""
        norm = tables.Norm.of(plan, x)
        if norm is not None:
            self.found.setdefault(norm, set()).add(is_backward(name))

    def noting(self, name: str, function: Callable) -> Callable:
        """`function`, for a piece whose x on a device the compiler says."""
        self.asks = True

        def noted(plan, x, *operands):
            if self.compiling:
                self.note(name, plan, x)
            return function(plan, x, *operands)

        return noted


watch: ContextVar[Watch | None] = ContextVar("watch", default=None)  # set by `jbn.autotune`


class Choice(NamedTuple):
    implementation: str  # "xla" or "triton"
    reason: str


def choose(
    name: str,
    plan: Plan,
    platform: str,
    x,
    *operands,
    measured: Measured | None = None,
    device: Device | None = None,
) -> Choice:
    """What piece `name` of the op runs as, on `platform`, for operands of these shapes and dtypes: by measurements.

    `device` is the GPU, None for the one that `platform` has here; for one that is not here it is a forecast.

    Raises:
      NotImplementedError: kernels are asked for by name and cannot run.
    """
    if plan.implementation == "xla":
        return Choice("xla", "asked for")
    if plan.implementation == "triton":
        problem = obstacle(name, plan, platform, x, *operands, device=device)
        if problem is not None:
            raise NotImplementedError(
                f"implementation='triton' cannot be used: {problem}; implementation='xla', or None, works here too"
            )
        return Choice("triton", "asked for")
    if platform not in GPUS:
        return Choice("xla", f"kernels are for GPUs, and this is compiled for {platform}")
    best = fastest(name, plan, x, measured or Measured.on((device or gpu(platform)).kind))
    if best.implementation == "triton":
        problem = obstacle(name, plan, platform, x, *operands, device=device)
        if problem is not None:
            return Choice("xla", problem)
    return best


def fastest(name: str, plan: Plan, x, measured: Measured) -> Choice:
    """What was measured to be the fastest; XLA where nothing was, or kernels failed on the user's device."""
    kind, wins, (packaged, own, left_out) = measured
    norm, backward = tables.Norm.of(plan, x), is_backward(name)
    users, row = own.row(norm), packaged.row(norm)
    if users is not None and users.failed is not None:
        return _by_row(own, users, backward)
    if row is not None:
        return _by_row(packaged, row, backward)
    win = covering(plan, kind, x, wins)
    if win is not None:
        return Choice("triton", f"measured to win from {in_megabytes(win.size)} on {win.device} ({win.source})")
    if users is not None:
        return _by_row(own, users, backward)
    told = f"no measurement shows the kernels ahead for {describe(plan, x)} on {kind}"
    if left_out.row(norm) is not None:
        told += (
            f": the row in {left_out.name} is left out, as the {jax.process_count()} processes have not agreed on it; "
            "call jbn.autotune in all of them"
        )
    return Choice("xla", told)


def _by_row(source: tables.Source, row: tables.Row, backward: bool) -> Choice:
    """The choice for a pass, with the row, its file and its date."""
    each, speed = "backward" if backward else "forward", row.speed(backward)
    if row.failed is not None:
        told = f"the kernels failed when they were measured: {row.failed}"
    elif speed is None:
        told = f"no measurement shows the kernels ahead: {each} was not measured"
    else:
        told = f"measured {each} {speed:.2f}× as fast by kernels as by XLA"
    shape = "×".join(map(str, row.norm.shape))
    implementation = "triton" if row.won(backward) else "xla"
    return Choice(implementation, f"{told}, row {shape} {row.norm.dtype} of {source.name}, {row.date}")


def is_backward(name: str) -> bool:
    """Whether a piece is of the backward pass."""
    return name.startswith("gradient")


def basis(name: str, plan: Plan, platform: str, x, measured: Measured) -> tuple:
    """What `choose` goes by besides piece, plan and operands: of rows that x's parts may have, whether kernels won."""
    found = _possible(plan, x, measured)
    rows = [[(*row.norm, row.won(is_backward(name)), row.failed is None) for row in source] for source in found]
    return measured.wins, [sorted(source, key=repr) for source in rows], gpu(platform), packages(platform)


def kernels(name: str, platform: str):
    """The function of piece `name` that launches kernels."""
    from jbn._op import triton

    return triton.piece(name, platform)


def may_use_kernels(name: str, plan: Plan, x, measured: Measured) -> bool:
    """Whether None may choose kernels for x or for devices' parts of it."""
    won = any(row.won(is_backward(name)) for source in _possible(plan, x, measured) for row in source)
    return won or covering(plan, measured.kind, x, measured.wins) is not None


def _possible(plan: Plan, x, measured: Measured) -> list[list[tables.Row]]:
    """The package's rows and the user's that x, or a device's part of it, may have."""
    norm, (packaged, own, _) = tables.Norm.of(plan, x), measured.tables
    if norm is None:
        return []
    return [[row for row in source.rows.values() if row.norm.may_be_part_of(norm)] for source in (packaged, own)]


def covering(plan: Plan, kind: str, x, wins: tuple[Win, ...]) -> Win | None:
    """The row of `WINS` that says the kernels win on a device of that kind."""
    return next((win for win in wins if kind.startswith(win.device) and _covers(win, plan, x)), None)


def obstacle(name: str, plan: Plan, platform: str, x, *operands, device: Device | None = None) -> str | None:
    """Why the kernels cannot do this, or None if they can.

    A forecast, for a `device` that is not here, needs triton alone, and with the rest there is a try at compiling too.
    """
    if platform not in GPUS:
        return f"the kernels need a GPU, and this is compiled for {platform}"
    for value in (x, *jax.tree.leaves(operands), plan):
        kind = jnp.dtype(value.dtype).name
        if kind not in ("float16", "bfloat16", "float32", "bool"):
            return f"dtype {kind} is not among the kernels' (float16, bfloat16, float32)"
    if is_symbolic(x.shape):
        return f"x has the symbolic shape {x.shape}, and kernels are compiled for sizes"
    if x.size == 0:
        return f"x of shape {x.shape} is empty"
    forecast = device is not None and not device.here
    device = device or gpu(platform)
    architecture = device.architecture
    if architecture.startswith("gfx"):
        if not architecture.startswith(AMD):
            return f"the GPU is {architecture}, and the kernels are for {', '.join(AMD)}"
    elif device.capability < CAPABILITY:
        return f"the GPU has compute capability {architecture}, and the kernels need {CAPABILITY / 10}"
    problem = unlaunchable(platform)
    if problem is not None:
        return without_triton() if forecast else problem
    from jbn._op import triton

    return triton.failure(name, plan, platform, x, *operands)


def unlaunchable(platform: str) -> str | None:
    """Why kernels cannot be launched with the packages here."""
    problem = packages(platform)
    if problem is None:
        from jbn._op import triton

        problem = triton.MISSING
    return problem


def without_triton() -> str | None:
    """Why not even what would be launched can be told."""
    from jbn._op import triton

    return triton.NO_TRITON


@functools.cache
def packages(platform: str) -> str | None:
    """Why the packages installed cannot launch kernels on a platform."""
    found = {}
    for package in ("jax", *OLDEST):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed: {INSTALL}"
    return unusable(found, platform)


def unusable(versions: dict[str, str], platform: str) -> str | None:
    """What is wrong with these versions of jax, triton and jax-triton together on a platform."""
    for package, oldest in OLDEST.items():
        if _release(versions[package]) < _release(oldest):
            return f"{package} {versions[package]} is too old, {oldest} is the oldest that works: {INSTALL}"
    if _release(versions["jax-triton"]) >= (0, 4) and _release(versions["jax"]) >= (0, 12):
        return (
            f"jax-triton {versions['jax-triton']} does not work with jax {versions['jax']}: "
            "pip install 'jax-triton<0.4', or jax below 0.12"
        )
    if platform == "rocm" and _release(versions["triton"]) >= (3, 7):
        return (
            f"jax-triton {versions['jax-triton']} compiles for ROCm with triton 3.6 alone, and triton "
            f"{versions['triton']} is installed: pip install 'triton<3.7'"
        )
    return None


def layout(plan: Plan, x) -> str:
    return "last" if plan.channel == len(x.shape) - 1 else "first"


def describe(plan: Plan, x) -> str:
    size = "of a symbolic size" if is_symbolic(x.shape) else in_megabytes(size_in_bytes(x))
    return f"{jnp.dtype(x.dtype).name}, channels {layout(plan, x)}, {size}"


def _covers(win: Win, plan: Plan, x) -> bool:
    alike = (win.dtype, win.layout) == (jnp.dtype(x.dtype).name, layout(plan, x))
    return alike and not is_symbolic(x.shape) and size_in_bytes(x) >= win.size


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:3])
