"""The four ways to run a function on eight members of a named axis, each with an eighth of the rows."""

import jax
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

KINDS = ("shard_map", "shard_map unchecked", "pmap", "vmap")
NAME = "d"
ROWS = ("x", "residual")  # the arrays that are cut; all others are the same for every member


def spread(kind, f, devices, varying_state=False):
    """g(arrays, state, mask, dy) that runs f on eighths of the rows, and returns what f does.

    f returns (something with rows, state); the state comes back once a device, or once where all agree.
    """

    def g(arrays, state, mask, dy):
        specs = {k: P(NAME) if k in ROWS else P() for k in arrays}
        if kind.startswith("shard_map"):
            body = f
            if varying_state:
                body = lambda *args: (lambda y, s: (y, jax.tree.map(lambda a: a[None], s)))(*f(*args))  # noqa: E731
            return jax.shard_map(
                body,
                mesh=Mesh(np.array(devices), NAME),
                in_specs=(specs, P(), P(NAME), P(NAME)),
                out_specs=(P(NAME), P(NAME) if varying_state else P()),
                check_vma=kind == "shard_map",
            )(arrays, state, mask, dy)
        mapping = jax.pmap if kind == "pmap" else jax.vmap
        mapped = mapping(f, axis_name=NAME, in_axes=({k: 0 if s else None for k, s in specs.items()}, None, 0, 0))
        arrays = {k: cut(a) if specs[k] else a for k, a in arrays.items()}
        out, state = mapped(arrays, state, cut(mask), cut(dy))
        return jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), out), state

    return g


def cut(a):
    """Rows as eighths, `(8, rows / 8, …)`; None stays."""
    return None if a is None else a.reshape(8, -1, *a.shape[1:])
