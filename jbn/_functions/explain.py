"""What would run for a call of batch norm: implementation and reason, kernels, tiles, launches, bytes, collectives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.typing import DTypeLike

from jbn._functions import checks, explain_collectives, explain_gpus, explain_shares, explain_traced
from jbn._functions.batch_norm import Activation, BNParams, BNState, Implementation, bn_eval, bn_train
from jbn._functions.explain_collectives import Collective
from jbn._functions.explain_traced import KernelLaunch as KernelLaunch
from jbn._functions.virtual import Virtual, check_virtual
from jbn._op import dispatch
from jbn._op.activations import ACTIVATIONS
from jbn._op.gpu import Device
from jbn._op.plan import compute_dtype, in_megabytes, size_in_bytes
from jbn._op.sync import Sync

PASSES = ("forward", "backward", "inference")


class Explanation(NamedTuple):
    """`str()` shows all of it. `launches` and `collectives` are by pass: "forward", "backward", "inference"."""

    implementation: str | None  # "xla", "triton"; None where the call raises
    reason: str
    platform: str
    device: str
    gpu: Device | None  # what is known of it; a forecast unless `gpu.here`
    shape: tuple[int, ...]  # of x on one device
    launches: dict[str, tuple[KernelLaunch, ...]]  # empty where XLA chooses its own
    floor: dict[str, int]  # bytes: every launch reads and writes each tensor of x's size once
    collectives: dict[str, tuple[Collective, ...]]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        runs = "raises NotImplementedError" if self.implementation is None else self.implementation
        lines = [f"{runs}: {self.reason}", f"x {'×'.join(map(str, self.shape))} on {self.device} ({self.platform})"]
        if self.gpu is not None:
            lines.append(_described(self.gpu))
        lines.append("floor: each launch loads or stores every tensor of x's size that it needs, and the mask, once")
        for name in PASSES:
            lines += self._told(name)
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _told(self, name: str) -> list[str]:
        """The lines of a pass."""
        launches, floor = self.launches.get(name, ()), self.floor[name]
        line = (
            f"{name}: {len(launches) or 'XLA’s own'} launch{'es' * (len(launches) != 1)}, floor {in_megabytes(floor)}"
        )
        if self.gpu is not None and self.gpu.bandwidth is not None:
            line += f" ({1e6 * floor / self.gpu.bandwidth:.1f} µs at that bandwidth)"
        if launches and floor:
            line += f", {sum(launch.loaded + launch.stored for launch in launches) / floor:.3f} of it asked for"
        found = [
            f"  {k.kernel}: {k.programs} programs of {k.threads} threads, tiles {k.tile[0]} rows × {k.tile[1]} "
            f"channels, {in_megabytes(k.loaded)} loaded, {in_megabytes(k.stored)} stored"
            for k in launches
        ]
        sent = [
            f"  {c.kind}{f' of {in_megabytes(c.size)}' if c.size else ''}: {c.what}"
            for c in self.collectives.get(name, ())
        ]
        return [line, *found, *sent]


def explain(
    x: Any,
    *,
    axis: int = -1,
    mask: Any = None,
    residual: Any = None,
    activation: Activation | None = None,
    negative_slope: float = 0.01,
    dtype: DTypeLike | None = None,
    use_scale: bool = True,
    use_bias: bool = True,
    virtual_batch_size: int | None = None,
    axis_name: str | Sequence[str] | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    axis_size: int | None = None,
    implementation: Implementation | None = None,
    platform: str | None = None,
    device: str | None = None,
) -> Explanation:
    """What `bn_train`, its gradient and `bn_eval` run as with these arguments; nothing is computed.

    Args:
      x: an array or `jax.ShapeDtypeStruct`; one with a `NamedSharding` stands for a call under `jit`, and is then
        explained for one device's part of it.
      mask, residual: arrays, `jax.ShapeDtypeStruct`s or None. Other options are those of `bn_train`.
      use_scale, use_bias: whether the parameters have them.
      axis_size: members of `axis_name` in all, ≥ 1; None for the number of devices.
      platform: "cpu", "cuda", "rocm" or "tpu"; None for `device`'s, or this host's.
      device: a GPU by name, such as "NVIDIA H100", of those in `jbn/_functions/explain_gpus.py`; None for this host's,
        or where it has none of `platform` an H100 or MI300X. For a GPU that is not here the answer is a forecast, for
        which triton must be installed and nothing else.

    Returns:
      `Explanation`; print it. Sizes are in bytes, printed in megabytes of 10⁶ bytes.

    Raises:
      TypeError, ValueError: for an argument that `bn_train` would not take, naming it, or a `device` that is not known.
    """
    target = explain_traced.Target(*explain_gpus.target(platform, device))
    whole = explain_shares.abstract("x", x)
    jax.eval_shape(checks.check_input, whole)
    channel = checks.check_axis(axis, whole)
    parts, gathered = explain_shares.division(whole)
    given = {"x": whole, "mask": mask, "residual": residual}
    x, mask, residual = (
        None if v is None else explain_shares.part(explain_shares.abstract(n, v), whole, parts)
        for n, v in given.items()
    )
    axes = explain_shares.named_axes(axis_name, axis_size)
    virtual, shared = None, False
    if not axes:
        virtual, virtual_batch_size, shared = _virtual(virtual_batch_size, whole, channel, x, parts)
    vector: Any = jax.ShapeDtypeStruct((x.shape[channel],), compute_dtype(x.dtype))
    params = BNParams(vector if use_scale else None, vector if use_bias else None)
    options: dict[str, Any] = dict(
        axis=axis, activation=activation, negative_slope=negative_slope, dtype=dtype, implementation=implementation
    )
    training: dict[str, Any] = dict(
        virtual_batch_size=virtual_batch_size, axis_name=axis_name, axis_index_groups=axis_index_groups
    )
    passes, sync, by_members = _trace(
        options, training, axes, channel, params, BNState(vector, vector), x, mask, residual
    )

    chosen, reason, notes = explain_traced.choice(target, passes)
    if chosen == "triton" and implementation is None:
        problem = explain_shares.unsplit(whole, parts, gathered, virtual)
        chosen, reason = ("xla", problem) if problem else (chosen, reason)
    notes += _notes(target, whole, gathered, size_in_bytes(x))
    if callable(activation):
        notes.append(_outside(checks.activation_name(activation)))
    one, masked = size_in_bytes(vector), mask is not None
    if axes:
        sent = explain_collectives.by_name(sync, by_members, one, masked)
        shared = by_members is not None and by_members.members > 1
    else:
        members = math.prod(n for a, n in enumerate(parts) if a != channel)
        sent = explain_collectives.by_jit(members, virtual is not None, shared, one, masked)
    if axes and math.prod(parts) > 1:
        notes.append("what devices send for a sharded x besides axis_name is not told")
    if shared:
        notes.append(f"virtual batches are shared, by devices or members that hold parts of shape {x.shape}")
    return Explanation(
        chosen,
        reason,
        target.platform,
        target.platform if target.device is None else target.device.kind,
        target.device,
        x.shape,
        {name: explain_traced.launches(target, found) for name, found in passes.items()} if chosen == "triton" else {},
        {name: sum(map(explain_traced.floor, found)) for name, found in passes.items()},
        sent,
        tuple(notes),
    )


def _virtual(size: int | None, whole, channel: int, x, parts: list[int]) -> tuple[Virtual | None, int | None, bool]:
    """Virtual batches under `jit`, how much of one a device holds, and whether several devices hold one together."""
    virtual = check_virtual(size, whole, channel, Sync())
    if virtual is None:
        return None, None, False
    held = math.gcd(virtual.size, x.shape[virtual.examples])
    split = [n for a, n in enumerate(parts) if a not in (channel, virtual.examples)]
    return virtual, held, held != virtual.size or math.prod(split) > 1


def _trace(
    options, training, axes, channel, params, state, x, mask, residual
) -> tuple[dict[str, list[explain_traced.Piece]], Sync, Virtual | None]:
    """The pieces of each pass; who shares statistics, and virtual batches, by the named axes."""
    sharing = []

    def train(params, state, x, mask, residual):
        sync = checks.check_names(training["axis_name"], training["axis_index_groups"])
        sharing.append((sync, check_virtual(training["virtual_batch_size"], x, channel, sync)))

        def f(params, x, residual):
            return bn_train(params, state, x, mask=mask, residual=residual, **options, **training)

        y, backward, _ = jax.vjp(f, params, x, residual, has_aux=True)
        return y, backward(y)

    def infer(params, state, x, residual):
        return bn_eval(params, state, x, residual=residual, **options)

    trained = list(explain_traced.pieces(jax.make_jaxpr(train, axis_env=axes)(params, state, x, mask, residual).jaxpr))
    inferred = explain_traced.pieces(jax.make_jaxpr(infer)(params, state, x, residual).jaxpr)
    passes = {
        "forward": [p for p in trained if not p.name.startswith("gradient")],
        "backward": [p for p in trained if p.name.startswith("gradient")],
        "inference": list(inferred),
    }
    ((sync, virtual),) = sharing
    return passes, sync, virtual


def _notes(target: explain_traced.Target, whole, gathered: list[int], size: int) -> list[str]:
    """What else there is to say of where x lies, `size` bytes on a device, and of that device."""
    notes = [f"axis {a} of x, {whole.shape[a]} long, is not divided evenly: it is gathered" for a in gathered]
    if not isinstance(whole.sharding, NamedSharding | SingleDeviceSharding | None):
        kind = type(whole.sharding).__name__
        notes.insert(0, f"x has a {kind}, expected a NamedSharding: explained as if on one device")
    if target.device is not None:
        problem = None if target.device.here else dispatch.unlaunchable(target.platform)
        if problem is not None:
            notes.append(f"no kernel can be launched with the packages here: {problem}")
        if target.device.cache is not None and size <= target.device.cache:
            notes.append("x fits into L2: what a launch leaves there, the next reads faster than from memory")
    return notes


def _outside(name: str) -> str:
    """What there is to say of an activation that is a function."""
    remedy = f"; activation={name!r} is applied inside" if name in ACTIVATIONS else ""
    return f"activation {name} is a function: JAX applies it outside, which is not among launches and bytes{remedy}"


def _described(gpu: Device) -> str:
    """What is known of a GPU, and whether it is here."""
    known = [f"{gpu.processors} {'compute units' if gpu.capability == 0 else 'multiprocessors'}"]
    if gpu.cache is not None:
        known.append(f"L2 of {in_megabytes(gpu.cache)}")
    if gpu.bandwidth is not None:
        known.append(f"memory at {in_megabytes(gpu.bandwidth)}/s")
    return f"{'this host’s' if gpu.here else 'a forecast, as no such GPU is here'}: {', '.join(known)}"
