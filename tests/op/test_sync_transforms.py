"""checkpoint, linearize, control flow, export of statistics shared over a name, against plain jnp and collectives.

In float64, where a wrong rule cannot pass for rounding.
"""

import functools

import jax
import meaning
import numpy as np
import oracle
import pytest
import reference
from beside import both
from cases import Case, draw, train
from jax import export
from mapping import KINDS, spread
from test_control_flow import fori_loop, scan, scan_over_batches

import jbn

pytestmark = pytest.mark.usefixtures("strict")

CASE = Case((16, 2, 3), mask=(0, 2), residual=True, activation="silu", unbiased=True)
GROUPS = {"all": None, "groups": ((0, 2, 4, 6), (1, 3, 5, 7))}
PLACES = [(kind, "all") for kind in KINDS] + [(kind, "groups") for kind in ("shard_map", "vmap")]
NAMES = jax.checkpoint_policies.save_only_these_names("bn_input", "bn_stats")


def drawn():
    """arrays, state, mask and a cotangent; member 3 has nothing valid."""
    arrays, state, mask = draw(CASE, np.float64)
    mask[6:8] = False
    return arrays, state, mask, np.random.default_rng(7).normal(size=CASE.shape)


def mapped(kind, groups, bn, devices, wrap=lambda f: f):
    """f(arrays, state, mask, dy) -> (y, state) over eight members, inside of which `wrap` is put around batch norm."""
    f = wrap(train(CASE, bn, axis_name="d", axis_index_groups=GROUPS[groups]))
    return spread(kind, lambda arrays, state, mask, dy: f(arrays, state, mask), devices, GROUPS[groups] is not None)


def total(f, *rest):
    """A loss of everything that f returns."""

    def scalar(arrays):
        y, state = f(arrays, *rest)
        return (y**3 * rest[-1]).sum() + state.mean.sum() + (state.var**2).sum()

    return scalar


CHECKPOINTS = {
    "inside": lambda mapped: mapped(wrap=jax.checkpoint),
    "inside, by names": lambda mapped: mapped(wrap=functools.partial(jax.checkpoint, policy=NAMES)),
    "outside": lambda mapped: jax.checkpoint(mapped()),
    "outside, by names": lambda mapped: jax.checkpoint(mapped(), policy=NAMES),
}


def compare(kind, function, *args):
    """function(bn, *args) is the same for ours and for the reference."""
    run = meaning.run if kind == "vmap" else meaning.compiled
    results = both(lambda bn: run(functools.partial(function, bn), *args))
    for got, want in zip(*map(jax.tree.leaves, results), strict=True):
        oracle.assert_close(got, want, np.float64, n=100, factor=100)


@pytest.mark.parametrize("kind, groups", PLACES)
def test_checkpoint(kind, groups, devices):
    """Gradients wherever it stands; that of the reference does not depend on it."""

    def gradients(bn, arrays, *rest):
        f = functools.partial(mapped, kind, groups, bn, devices)
        if bn is reference:
            return [jax.grad(total(f(), *rest))(arrays)] * len(CHECKPOINTS)
        return [jax.grad(total(placed(f), *rest))(arrays) for placed in CHECKPOINTS.values()]

    with jax.enable_x64(True):
        compare(kind, gradients, *drawn())


@pytest.mark.parametrize("groups", GROUPS)
def test_checkpoint_of_a_second_derivative(groups, devices):
    def curvature(bn, arrays, direction, *rest):
        f = mapped("vmap", groups, bn, devices, wrap=jax.checkpoint)
        return jax.jvp(jax.grad(total(f, *rest)), (arrays,), (direction,))

    with jax.enable_x64(True):
        arrays, *rest = drawn()
        compare("vmap", curvature, arrays, arrays | {"x": rest[-1]}, *rest)


@pytest.mark.parametrize("kind, groups", PLACES)
def test_linearize(kind, groups, devices):
    """The value, the linear map along a direction, and its transpose."""

    def linearized(bn, arrays, direction, *rest):
        f = mapped(kind, groups, bn, devices)
        value, map_ = jax.linearize(lambda arrays: f(arrays, *rest), arrays)
        return value, map_(direction), jax.linear_transpose(map_, arrays)(value)

    with jax.enable_x64(True):
        arrays, *rest = drawn()
        compare(kind, linearized, arrays, drawn()[0] | {"x": rest[-1]}, *rest)


def cond(f, a):
    """All members take the same branch, as collectives need it."""
    return jax.lax.cond(a["mean"].sum() < 100, f, lambda a: jax.tree.map(lambda x: 2 * x, f(a)), a)


@pytest.mark.parametrize("kind", KINDS)
def test_control_flow(kind, devices):
    """scan over layers and over batches, fori_loop and cond, inside the mapping."""

    def gradients(bn, arrays, state, *rest):
        f = train(CASE, bn, axis_name="d")

        def within(structure):
            def local(arrays, state, mask, dy):
                a = arrays | state._asdict()
                y, state = structure(lambda a: f(a, jbn.BNState(a["mean"], a["var"]), mask), a)
                return (y[1] if y.ndim > a["x"].ndim else y), state

            return total(spread(kind, local, devices), state, *rest)

        return [jax.grad(within(structure))(arrays) for structure in (scan, scan_over_batches, fori_loop, cond)]

    with jax.enable_x64(True):
        compare(kind, gradients, *drawn())


@pytest.mark.parametrize("kind, groups", PLACES)
def test_export(kind, groups, devices):
    """Values, state and gradients survive serialisation, for every platform."""

    leaves, tree = jax.tree.flatten(drawn())  # plain arrays: a NamedTuple would have to be registered

    def compute(bn):
        def values(*leaves):
            arrays, *rest = jax.tree.unflatten(tree, leaves)
            f = mapped(kind, groups, bn, devices)
            return jax.tree.leaves((f(arrays, *rest), jax.grad(total(f, *rest))(arrays)))

        f = jax.jit(values)
        if bn is reference:
            return f(*leaves)
        exported = export.export(f, platforms=("cpu", "cuda", "tpu"))(*leaves)
        assert exported.nr_devices == (1 if kind == "vmap" else 8)
        again = export.deserialize(exported.serialize())
        mesh = jax.make_mesh((exported.nr_devices,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return jax.jit(again.call)(*jax.device_put(leaves, everywhere))

    with jax.enable_x64(True):
        for g, w in zip(*both(compute), strict=True):
            oracle.assert_close(g, w, np.float64, n=100, factor=100)
