"""What would run for a call of batch norm: implementation and reason, kernels, tiles, launches, bytes, collectives."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
from jax import core
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jbn import _check, _dispatch, _sent
from jbn._collectives import Sync
from jbn._device import GPUS, default_platform, gpu
from jbn._partition import full, ways
from jbn._plan import Plan, compute_dtype, size_in_bytes
from jbn._sent import Collective
from jbn._virtual import check_virtual
from jbn.functional import Activation, BNParams, BNState, Implementation, bn_eval, bn_train

PASSES = ("forward", "backward", "inference")


class KernelLaunch(NamedTuple):
    """One launch of a kernel, on one device."""

    kernel: str
    tile: tuple[int, int]  # rows × channels
    programs: int
    threads: int  # of a program
    loaded: int  # bytes
    stored: int  # bytes


class Explanation(NamedTuple):
    """`str()` shows all of it. `launches` and `collectives` are by pass: "forward", "backward", "inference"."""

    implementation: str | None  # "xla", "triton"; None where the call raises
    reason: str
    platform: str
    device: str
    shape: tuple[int, ...]  # of x on one device
    launches: dict[str, tuple[KernelLaunch, ...]]  # empty where XLA chooses its own
    floor: dict[str, int]  # bytes: every launch reads and writes each tensor of x's size once
    collectives: dict[str, tuple[Collective, ...]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        runs = "raises NotImplementedError" if self.implementation is None else self.implementation
        lines = [f"{runs}: {self.reason}", f"x {'×'.join(map(str, self.shape))} on {self.device} ({self.platform})"]
        for name in PASSES:
            launches = self.launches.get(name, ())
            total = sum(launch.loaded + launch.stored for launch in launches)
            over = f", {total / self.floor[name]:.3f} of it asked for" if launches and self.floor[name] else ""
            lines.append(f"{name}: {len(launches) or 'XLA’s own'} launches, floor {_size(self.floor[name])}{over}")
            lines += [
                f"  {k.kernel}: {k.programs} programs of {k.threads} threads, tiles {k.tile[0]} rows × {k.tile[1]} "
                f"channels, {_size(k.loaded)} loaded, {_size(k.stored)} stored"
                for k in launches
            ]
            sent = self.collectives.get(name, ())
            lines += [f"  {c.kind}{f' of {_size(c.size)}' if c.size else ''}: {c.what}" for c in sent]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def explain(
    x: Any,
    *,
    axis: int = -1,
    mask: Any = None,
    residual: Any = None,
    activation: Activation | None = None,
    dtype: DTypeLike | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    virtual_batch_size: int | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    axis_size: int | None = None,
    implementation: Implementation | None = None,
    platform: str | None = None,
) -> Explanation:
    """What `bn_train`, its gradient and `bn_eval` run as with these arguments; nothing is computed.

    Args:
      x: an array or `jax.ShapeDtypeStruct`; one with a `NamedSharding` stands for a call under `jit`, and is then
        explained for one device's part of it.
      mask, residual: arrays, `jax.ShapeDtypeStruct`s or None. Other options are those of `bn_train`.
      use_scale, use_bias: whether the parameters have them.
      axis_size: members of `axis_name` in all, ≥ 1; None for the number of devices.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for this host's. For a GPU that is not here it is a forecast, for
        the device that the answer names.

    Returns:
      `Explanation`; print it.

    Raises:
      TypeError, ValueError: for an argument that `bn_train` would not take, naming it.
    """
    platform = platform or default_platform()
    if platform not in ("cpu", "tpu", *GPUS):
        raise ValueError(f"platform is {platform!r}, expected None, 'cpu', 'cuda', 'rocm' or 'tpu': give one of these")
    whole = _abstract("x", x)
    jax.eval_shape(_check.check_input, whole)
    channel = _check.check_axis(axis, whole)
    parts, gathered = _division(whole)
    given = {"x": whole, "mask": mask, "residual": residual}
    x, mask, residual = (None if v is None else _part(_abstract(n, v), whole, parts) for n, v in given.items())
    if axis_size is not None:
        remedy = "give the number of members, or leave it out"
        axis_size = _check.check_positive("axis_size", axis_size, "None or a positive integer", remedy)
        if axis_name is None:
            raise ValueError(f"axis_size is {axis_size}, but axis_name is None: name the axis, or leave it out")
    several = isinstance(axis_name, Sequence) and not isinstance(axis_name, str)
    names: tuple[Any, ...] = () if axis_name is None else tuple(axis_name) if several else (axis_name,)
    virtual, shared = None, False  # virtual batches, by several devices or members
    if not names:
        virtual = check_virtual(virtual_batch_size, whole, channel, Sync())
        virtual_batch_size = None
        if virtual:
            # for the kernels, as much of a virtual batch as a device holds
            virtual_batch_size = math.gcd(virtual.size, x.shape[virtual.examples])
            split = [n for a, n in enumerate(parts) if a not in (channel, virtual.examples)]
            shared = virtual_batch_size != virtual.size or math.prod(split) > 1

    vector: Any = jax.ShapeDtypeStruct((x.shape[channel],), compute_dtype(x.dtype))
    params = BNParams(vector if use_scale else None, vector if use_bias else None)
    state = BNState(vector, vector)
    options: dict[str, Any] = dict(axis=axis, activation=activation, dtype=dtype, implementation=implementation)
    training: dict[str, Any] = dict(
        virtual_batch_size=virtual_batch_size, axis_name=axis_name, axis_index_groups=axis_index_groups
    )
    sharing = []

    def train(params, state, x, mask, residual):
        sync = _check.check_names(axis_name, axis_index_groups)
        sharing.append((sync, check_virtual(virtual_batch_size, x, channel, sync)))

        def f(params, x, residual):
            return bn_train(params, state, x, mask=mask, residual=residual, **options, **training)

        y, backward, _ = jax.vjp(f, params, x, residual, has_aux=True)
        return y, backward(y)

    def infer(params, state, x, residual):
        return bn_eval(params, state, x, residual=residual, **options)

    traced = jax.make_jaxpr(train, axis_env=_axes(names, axis_size))(params, state, x, mask, residual)
    trained = list(_pieces(traced.jaxpr))
    pieces = {
        "forward": [p for p in trained if not p.name.startswith("gradient")],
        "backward": [p for p in trained if p.name.startswith("gradient")],
        "inference": list(_pieces(jax.make_jaxpr(infer)(params, state, x, residual).jaxpr)),
    }
    chosen, reason, notes = _choice(platform, pieces)
    if chosen == "triton" and implementation is None:
        problem = _unsplit(whole, parts, gathered, virtual)
        chosen, reason = ("xla", problem) if problem else (chosen, reason)
    if not isinstance(whole.sharding, NamedSharding | SingleDeviceSharding | None):
        notes.append(
            f"x has a {type(whole.sharding).__name__}, expected a NamedSharding: explained as if on one device"
        )
    notes += [f"axis {a} of x, {whole.shape[a]} long, is not divided evenly: it is gathered" for a in gathered]
    if platform in GPUS and not gpu(platform).here:
        notes.append(f"no such GPU is here: a forecast for one of {gpu(platform).processors} multiprocessors")
    one, masked = size_in_bytes(vector), mask is not None
    if names:
        ((sync, virtual),) = sharing
        sent = _sent.by_name(sync, virtual, one, masked)
        shared = virtual is not None and virtual.members > 1
        if math.prod(parts) > 1:
            notes.append("what devices send for a sharded x besides axis_name is not told")
    else:
        members = math.prod(n for a, n in enumerate(parts) if a != channel)
        sent = _sent.by_jit(members, virtual is not None, shared, one, masked)
    if shared:
        notes.append(f"virtual batches are shared, by devices or members that hold parts of shape {x.shape}")
    return Explanation(
        chosen,
        reason,
        platform,
        gpu(platform).kind if platform in GPUS else platform,
        x.shape,
        {name: _launches(found, platform) for name, found in pieces.items()} if chosen == "triton" else {},
        {name: sum(map(_floor, found)) for name, found in pieces.items()},
        sent,
        tuple(notes),
    )


class _Piece(NamedTuple):
    """A piece of the op as the traced program has it; operands and outputs are shapes and dtypes."""

    name: str
    plan: Plan
    operands: tuple[Any, ...]
    outputs: list[Any]


def _pieces(jaxpr) -> Iterator[_Piece]:
    """The pieces in a traced program, in order."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removeprefix("jbn_")
        if name == "merge":
            continue  # of vectors
        if name != equation.primitive.name:
            operands = jax.tree.unflatten(equation.params["tree"], [v.aval for v in equation.invars])
            yield _Piece(name, equation.params["plan"], operands, [v.aval for v in equation.outvars])
        else:
            for inner in jaxprs_in_params(equation.params):
                yield from _pieces(inner)


def _choice(platform: str, passes: dict[str, list[_Piece]]) -> tuple[str | None, str, list[str]]:
    """The implementation of a call, why, and what else there is to say."""
    try:
        choices = [
            (name, p, _dispatch.choose(p.name, p.plan, platform, *p.operands))
            for name, pieces in passes.items()
            for p in pieces
        ]
    except NotImplementedError as error:
        return None, str(error), []
    notes = []
    by_kernels = [choice for *_, choice in choices if choice.implementation == "triton"]
    if by_kernels:
        notes += [f"{name}: {p.name} by xla: {c.reason}" for name, p, c in choices if c.implementation == "xla"]
        return by_kernels[0].implementation, by_kernels[0].reason, notes
    obstacles = (_dispatch.obstacle(p.name, p.plan, platform, *p.operands) for _, p, _ in choices)
    problem = next(filter(None, obstacles), None)
    if platform in GPUS:
        notes.append(f"implementation='triton' would {f'raise: {problem}' if problem else 'run the kernels'}")
    *_, first = choices[0]
    return first.implementation, first.reason, notes


def _unsplit(x, parts: list[int], gathered: list[int], virtual) -> str | None:
    """Why the default leaves a sharded x to XLA, which cannot split it for a kernel."""
    for axis in gathered:
        return f"axis {axis} of x, {x.shape[axis]} long, is not divided evenly, and uneven parts are for XLA"
    if virtual is not None and math.prod(parts) > 1 and AxisType.Explicit not in x.sharding.mesh.axis_types:
        return "XLA alone splits virtual batches over an automatic mesh, and would gather x for a kernel"
    return None


def _launches(pieces: list[_Piece], platform: str) -> tuple[KernelLaunch, ...]:
    from jbn import _triton

    found = []
    for p in pieces:
        if _dispatch.choose(p.name, p.plan, platform, *p.operands).implementation != "triton":
            continue
        for launch, loaded, stored in _triton.launches_of(p.name, p.plan, platform, *p.operands):
            tile, threads = (launch.tiling.ROWS, launch.tiling.CHANNELS), 32 * launch.tiling.warps
            found.append(KernelLaunch(launch.kernel.__name__, tile, launch.programs, threads, loaded, stored))
    return tuple(found)


def _floor(piece: _Piece) -> int:
    """Bytes when every tensor of x's size, and the mask at its own, is read or written once."""
    name, plan, operands, outputs = piece
    x = operands[0]
    tensors = [v for v in (*jax.tree.leaves(operands), *outputs) if v.ndim == x.ndim]
    if name == "apply":
        tensors = [v for v in tensors if v.dtype != bool]  # every position is normalised
    elif name == "gradient_input" and plan.activation is None:
        _, _, residual, mask, *_ = operands
        # ȳ is the residual's cotangent as it is; with statistics given x̄ is ȳ scaled
        unread = [residual, residual] if residual is not None else []
        unread += [] if plan.centred else [x, *([] if mask is None else [mask])]
        return sum(map(size_in_bytes, tensors)) - sum(map(size_in_bytes, unread))
    elif name == "gradient_sums" and plan.activation is None and operands[2] is not None:
        tensors.remove(operands[2])
    return sum(map(size_in_bytes, tensors))


def _axes(names: tuple[str, ...], size: int | None) -> list[tuple[str, int]]:
    """The named axes with sizes; how `size` is spread over several does not matter."""
    if not names:
        return []
    return [(names[0], jax.device_count() if size is None else size), *((name, 1) for name in names[1:])]


def _division(x) -> tuple[list[int], list[int]]:
    """How many parts each axis of x has, and the axes that are gathered since theirs would be uneven."""
    sharding = x.sharding
    if not isinstance(sharding, NamedSharding):
        return [1] * x.ndim, []
    asked = [ways(sharding.mesh, entry) for entry in full(sharding.spec, x.ndim)]
    even = [w if n % w == 0 else 1 for n, w in zip(x.shape, asked, strict=True)]
    return even, [a for a, (w, n) in enumerate(zip(asked, even, strict=True)) if w != n]


def _abstract(name, value) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding."""
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        raise TypeError(f"{name} is a {type(value).__name__}, expected an array or a jax.ShapeDtypeStruct: make it one")
    traced = isinstance(value, core.Tracer)
    sharding = jax.typeof(value).sharding if traced else getattr(value, "sharding", None)
    dtype = jax.dtypes.canonicalize_dtype(value.dtype)
    return jax.ShapeDtypeStruct(value.shape, dtype, sharding=sharding)


def _part(value, whole, parts: list[int]) -> jax.ShapeDtypeStruct:
    """One device's part of an array that lies like x."""
    if len(value.shape) != len(whole.shape):
        return value  # which `bn_train` refuses, with the reason
    shape = [n // p if n == size else n for n, size, p in zip(value.shape, whole.shape, parts, strict=True)]
    return jax.ShapeDtypeStruct(tuple(shape), value.dtype)


def _size(count: int) -> str:
    return f"{count / 1e6:.3f} MB" if count >= 1e4 else f"{count} bytes"
