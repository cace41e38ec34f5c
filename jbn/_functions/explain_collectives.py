"""What devices send each other in a call of batch norm, as `explain` tells it."""

from typing import NamedTuple

from jbn._functions.virtual import Virtual
from jbn._op import merging
from jbn._op.sync import Sync


class Collective(NamedTuple):
    """What devices send each other."""

    kind: str  # "all-gather", "all-reduce"; with a vmapped axis, its arithmetic; "XLA’s own" where XLA decides
    size: int | None  # bytes of its result on each device; None where XLA decides
    what: str


Sent = dict[str, tuple[Collective, ...]]


def by_name(sync: Sync, virtual: Virtual | None, one: int, masked: bool) -> Sent:
    """What the members of `sync` send; `one` is the bytes of a vector over the channels."""
    if virtual is None or virtual.sync == sync:
        return _found(_moments(sync, one, masked), _gradients(sync, one))
    state = _moments(sync, one, True)  # the merged moments of virtual batches have a count for each channel
    if virtual.members == 1:
        return _found(state, ())
    return _found((*_moments(virtual.sync, one, masked), *state), _gradients(virtual.sync, one))


def by_jit(members: int, virtual: bool, shared: bool, one: int, masked: bool) -> Sent:
    """What `members` devices send that hold parts of x; `shared`: they hold parts of virtual batches too."""
    sync = Sync(members=members)
    if not virtual:
        return _found(_moments(sync, one, masked), _gradients(sync, one))
    if shared:
        own = (Collective("XLA’s own", None, "virtual batches that devices share"),)
        return _found(own, own)
    if members == 1:
        return {}
    forward = (  # whole ones on each device: only the running statistics are shared
        Collective("all-reduce", one, "largest mean"),
        Collective("all-reduce", (2 if masked else 1) * one, "counts and means" if masked else "means"),
        Collective("all-reduce", one, "squared deviations from the common mean"),
    )
    return _found(forward, ())


def _found(forward, backward) -> Sent:
    return {"forward": forward, "backward": backward} if forward or backward else {}


def _moments(sync: Sync, one: int, counted: bool) -> tuple[Collective, ...]:
    if sync.members == 1:
        return ()
    sent = (3 if counted else 2) * one
    if sync.groups is not None or sync.members * sent <= merging.GATHER_LIMIT:
        return (Collective("all-gather", sync.members * sent, f"moments of {sync.members} parts"),)
    return (
        Collective("all-reduce", sent - one, "counts and means" if counted else "means"),
        Collective("all-reduce", one, "squared deviations from the common mean"),
    )


def _gradients(sync: Sync, one: int) -> tuple[Collective, ...]:
    if sync.members == 1:
        return ()
    what = "sums of z̄ and z̄ · x̂"
    if sync.groups is not None:
        return (Collective("all-gather", sync.members * 2 * one, what),)
    return (Collective("all-reduce", 2 * one, what),)
