"""The pieces of the op in a traced program: what each runs as, what it launches, and what it cannot do without."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend.core import jaxprs_in_params

from jbn._op import dispatch
from jbn._op.gpu import GPUS, Device
from jbn._op.plan import Plan, size_in_bytes


class Piece(NamedTuple):
    """A piece of the op as the traced program has it; operands and outputs are shapes and dtypes."""

    name: str
    plan: Plan
    operands: tuple[Any, ...]
    outputs: list[Any]


class KernelLaunch(NamedTuple):
    """One launch of a kernel, on one device."""

    kernel: str
    tile: tuple[int, int]  # rows × channels
    programs: int
    threads: int  # of a program
    loaded: int  # bytes
    stored: int  # bytes


class Target(NamedTuple):
    """What a program is compiled for."""

    platform: str
    device: Device | None  # the GPU, if it is one

    def runs_as(self, piece: Piece) -> dispatch.Choice:
        return dispatch.choose(piece.name, piece.plan, self.platform, *piece.operands, device=self.device)

    def obstacle(self, piece: Piece) -> str | None:
        return dispatch.obstacle(piece.name, piece.plan, self.platform, *piece.operands, device=self.device)


def pieces(jaxpr) -> Iterator[Piece]:
    """The pieces in a traced program, in order."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removeprefix("jbn_")
        if name == "merge":
            continue  # of vectors
        if name != equation.primitive.name:
            operands = jax.tree.unflatten(equation.params["tree"], [v.aval for v in equation.invars])
            yield Piece(name, equation.params["plan"], operands, [v.aval for v in equation.outvars])
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from pieces(inner)


def choice(target: Target, passes: dict[str, list[Piece]]) -> tuple[str | None, str, list[str]]:
    """The implementation of a call, why, and what else there is to say."""
    try:
        choices = [(name, p, target.runs_as(p)) for name, found in passes.items() for p in found]
    except NotImplementedError as error:
        return None, str(error), []
    by_kernels = [choice for *_, choice in choices if choice.implementation == "triton"]
    if by_kernels:
        notes = [f"{name}: {p.name} by xla: {c.reason}" for name, p, c in choices if c.implementation == "xla"]
        return by_kernels[0].implementation, by_kernels[0].reason, notes
    notes = []
    if target.platform in GPUS:
        problem = next(filter(None, (target.obstacle(p) for _, p, _ in choices)), None)
        notes.append(f"implementation='triton' would {f'raise: {problem}' if problem else 'run the kernels'}")
    *_, first = choices[0]
    return first.implementation, first.reason, notes


def launches(target: Target, found: list[Piece]) -> tuple[KernelLaunch, ...]:
    """The launches of the pieces that kernels do."""
    from jbn._op import triton

    told = []
    for p in found:
        if target.device is not None and target.runs_as(p).implementation == "triton":
            for launch, loaded, stored in triton.launches_of(p.name, p.plan, target.device, *p.operands):
                tile, threads = (launch.tiling.ROWS, launch.tiling.CHANNELS), 32 * launch.tiling.warps
                told.append(KernelLaunch(launch.kernel.__name__, tile, launch.programs, threads, loaded, stored))
    return tuple(told)


def floor(piece: Piece) -> int:
    """Bytes when every tensor of x's size, and the mask at its own, is read or written once."""
    name, plan, operands, outputs = piece
    x = operands[0]
    tensors = [v for v in (*jax.tree.leaves(operands), *outputs) if v.ndim == x.ndim]
    if name == "apply":
        tensors = [v for v in tensors if v.dtype != bool]  # every position is normalised
    elif name == "gradient_input" and operands[-1] is not None:
        mask, kept = operands[3], operands[-1]
        tensors = [x, kept, outputs[0], *([] if mask is None else [mask])]  # z̄, kept, is the residual's cotangent
    elif name == "gradient_input" and plan.activation is None:
        _, _, residual, mask, *_ = operands
        # ȳ is the residual's cotangent as it is; with statistics given x̄ is ȳ scaled
        unread = [residual, residual] if residual is not None else []
        unread += [] if plan.centred else [x, *([] if mask is None else [mask])]
        return sum(map(size_in_bytes, tensors)) - sum(map(size_in_bytes, unread))
    elif name == "gradient_sums" and plan.activation is None and operands[2] is not None:
        tensors.remove(operands[2])
    return sum(map(size_in_bytes, tensors))
