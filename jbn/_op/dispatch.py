"""Which implementation runs.

The rule: "xla" and "triton" do as they say, or raise. None takes the kernels where they were measured to win and can
run, and plain XLA everywhere else. What was measured is a table here, so a new measurement changes data alone.
"""

import functools
import importlib.metadata
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jbn._op.gpu import GPUS, INSTALL, Device, gpu
from jbn._op.plan import Plan, in_megabytes, is_symbolic, size_in_bytes


class Win(NamedTuple):
    """On these devices, for x of this dtype and layout and at least so many bytes, kernels took no longer than XLA."""

    device: str  # what the device's kind begins with, e.g. "NVIDIA H100"
    dtype: str
    layout: str  # "last" or "first": where the channels are
    size: int  # bytes of x
    source: str  # the file of results


# From `python -m experiments speed` on a GPU, whose summary proposes these rows. Nothing has been measured yet.
WINS: tuple[Win, ...] = ()

OLDEST = {"triton": "3.6", "jax-triton": "0.3.1"}
CAPABILITY = 80  # the kernels' oldest compute capability, times ten
AMD = ("gfx90a", "gfx94", "gfx95")  # what the names of architectures with a compiled kernel begin with


class Choice(NamedTuple):
    implementation: str  # "xla" or "triton"
    reason: str


def choose(
    name: str,
    plan: Plan,
    platform: str,
    x,
    *operands,
    wins: tuple[Win, ...] | None = None,
    device: Device | None = None,
) -> Choice:
    """What piece `name` of the op runs as, on `platform`, for operands of these shapes and dtypes, by a table.

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
    kind = (device or gpu(platform)).kind
    win = measured(plan, kind, x, WINS if wins is None else wins)
    if win is None:
        return Choice("xla", f"no measurement shows the kernels ahead for {describe(plan, x)} on {kind}")
    problem = obstacle(name, plan, platform, x, *operands, device=device)
    if problem is not None:
        return Choice("xla", problem)
    return Choice("triton", f"measured to win from {in_megabytes(win.size)} on {win.device} ({win.source})")


def basis(platform: str, wins: tuple[Win, ...]) -> tuple:
    """What `choose` goes by besides piece, plan and operands."""
    return wins, gpu(platform), packages(platform)


def kernels(name: str, platform: str):
    """The function of piece `name` that launches kernels."""
    from jbn._op import triton

    return triton.piece(name, platform)


def may_use_kernels(plan: Plan, x) -> bool:
    """Whether kernels may be chosen on some device; known at tracing, before the platform is."""
    if plan.implementation is None:
        return any(_covers(win, plan, x) for win in WINS)
    return plan.implementation == "triton"


def measured(plan: Plan, kind: str, x, wins: tuple[Win, ...]) -> Win | None:
    """The row of a table that says the kernels win on a device of that kind."""
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
