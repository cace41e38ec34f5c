"""Several named axes at once, and jit over sharded arrays, where statistics are global without a name."""

import contextlib
import functools
import re

import jax
import numpy as np
import oracle
import pytest
from cases import Case, draw, evaluate, positional, train
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close, assert_grads, assert_state

import jbn

pytestmark = pytest.mark.usefixtures("strict")

CASE = Case((16, 4, 6, 4), mask=(0, 1), residual=True, activation="relu")
AXES = ("a", "b")


@pytest.fixture
def mesh(devices):
    return Mesh(np.array(devices).reshape(4, 2), AXES)


@functools.cache
def inputs():
    drawn = draw(CASE)
    drawn.mask[4:8] = False
    return drawn


@functools.cache
def cotangent():
    return np.random.default_rng(7).normal(size=CASE.shape).astype(np.float32)


def oracles(rows=slice(None)):
    arrays, _, mask = inputs()
    part = inputs()._replace(arrays=arrays | {k: arrays[k][rows] for k in ("x", "residual")}, mask=mask[rows])
    args, options = positional(part), dict(mask=part.mask, residual=part.arrays["residual"])
    values = oracle.bn_train(*args, **options, **CASE.options)
    return values, oracle.bn_train_grads(cotangent()[rows], *args, **options, **CASE.normalize_options)


def gradients(f):
    """y, state and gradients of sum(y · dy), in one executable."""

    def total(arrays, state, mask, dy):
        y, new = f(arrays, state, mask)
        return (y * dy).sum(), (y, new)

    return jax.jit(jax.grad(total, has_aux=True))


def check(got, rows=slice(None)):
    grads, (y, state) = got
    want, want_grads = oracles(rows)
    assert_close(y, want.y, n=CASE.rows, factor=5)
    assert_state(state, want, n=CASE.rows)
    assert_grads(grads, want_grads, n=CASE.rows, factor=10)


def arrays_specs(spec):
    return {k: spec if k in ("x", "residual") else P() for k in inputs().arrays}


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("rows", [P(AXES), P("b", "a")], ids=["rows over both", "rows and columns"])
def test_two_names(mesh, check_vma, rows):
    f = jax.shard_map(
        train(CASE, axis_name=AXES),
        mesh=mesh,
        in_specs=(arrays_specs(rows), P(), rows),
        out_specs=(rows, P()),
        check_vma=check_vma,
    )
    check(gradients(f)(*inputs(), cotangent()))


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_name_over_which_x_is_the_same(mesh, check_vma):
    """Copies of a part weigh alike, so the statistics stay."""
    f = jax.shard_map(
        train(CASE, axis_name=AXES),
        mesh=mesh,
        in_specs=(arrays_specs(P("a")), P(), P("a")),
        out_specs=(P("a"), P()),
        check_vma=check_vma,
    )
    check(gradients(f)(*inputs(), cotangent()))


@pytest.mark.parametrize("check_vma", [True, False])
def test_only_a_name_over_which_x_is_the_same(mesh, check_vma):
    """Statistics of copies alone are x's own."""
    f = jax.shard_map(
        train(CASE, axis_name="b"),
        mesh=mesh,
        in_specs=(arrays_specs(P()), P(), P()),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    check(gradients(f)(*inputs(), cotangent()))


@pytest.mark.parametrize("name", AXES)
def test_one_of_two_names(mesh, name):
    """Members along the other axis stay apart."""
    f = jax.shard_map(
        lambda *args: jax.tree.map(lambda s: s[None] if s.ndim == 1 else s, train(CASE, axis_name=name)(*args)),
        mesh=mesh,
        in_specs=(arrays_specs(P(AXES)), P(), P(AXES)),
        out_specs=(P(AXES), P("b" if name == "a" else "a")),
    )
    y, state = jax.jit(f)(*inputs())
    rows = np.arange(16).reshape(4, 2, 2)  # a, b, own rows
    for i, members in enumerate(np.moveaxis(rows, 1, 0) if name == "a" else rows):
        want, _ = oracles(members.ravel())
        assert_close(np.asarray(y)[members.ravel()], want.y, n=CASE.rows, factor=5)
        assert_state(jax.tree.map(lambda s, i=i: s[i], state), want, n=CASE.rows)


def vmapped(f, name, size):
    """Rows cut in `size` parts, as members of a vmapped axis; the state of the first."""
    axes = {k: 0 if k in ("x", "residual") else None for k in inputs().arrays}
    mapped = jax.vmap(f, in_axes=(axes, None, 0), axis_name=name)

    def g(arrays, state, mask):
        cut = lambda a: a.reshape(size, -1, *a.shape[1:])  # noqa: E731
        y, new = mapped({k: cut(a) if axes[k] == 0 else a for k, a in arrays.items()}, state, cut(mask))
        return y.reshape(-1, *y.shape[2:]), jax.tree.map(lambda s: s[0], new)

    return g


def test_two_vmaps():
    check(gradients(vmapped(vmapped(train(CASE, axis_name=AXES), "b", 2), "a", 4))(*inputs(), cotangent()))


def test_vmap_within_shard_map(devices):
    f = jax.shard_map(
        vmapped(train(CASE, axis_name=AXES), "b", 2),
        mesh=Mesh(np.array(devices), ("a",)),
        in_specs=(arrays_specs(P("a")), P(), P("a")),
        out_specs=(P("a"), P()),
        check_vma=False,  # checked, jax itself has no collective over a vmapped axis
    )
    check(gradients(f)(*inputs(), cotangent()))


@pytest.mark.parametrize("names", ["b", AXES, ("b", "a")], ids=str)
def test_a_vmapped_name_under_checks_says_what_to_do(devices, names):
    f = jax.shard_map(
        vmapped(train(CASE, axis_name=names), "b", 2),
        mesh=Mesh(np.array(devices), ("a",)),
        in_specs=(arrays_specs(P("a")), P(), P("a")),
        out_specs=(P("a"), P()),
    )
    with pytest.raises(ValueError, match=r"axis_name has 'b', which vmap binds, .* check_vma=False"):
        jax.eval_shape(f, *inputs())


def test_vmap_by_name_of_a_mesh_axis(devices):
    """Around `shard_map`, whose name shares statistics: what is batched, parameters too, varies over both."""
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=devices)
    x, (arrays, state, _) = np.random.default_rng(0).normal(size=(2, 16, 6, 4)).astype("f4"), inputs()
    params = jbn.BNParams(arrays["scale"], arrays["bias"])

    def loss(params, x, name=None):
        def f(params, x):
            return jbn.bn_train(params, state, x, axis_name=name)[0]

        if name is None:
            return (jax.vmap(f, (None, 0))(params, x) ** 3).sum()
        f = jax.shard_map(f, mesh=mesh, in_specs=(P(), P(name)), out_specs=P(name))
        return (jax.vmap(f, (None, 0), spmd_axis_name="b")(params, x) ** 3).sum()

    want, got = (jax.jit(jax.grad(functools.partial(loss, name=name), (0, 1)))(params, x) for name in (None, "a"))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)


def test_plain_vmap_within_shard_map(devices):
    """Batches of batches: those of one vmap index share statistics over devices, and no others."""
    x = np.stack([inputs().arrays["x"], 3 * inputs().arrays["x"] + 1])
    _, state, mask = inputs()
    params = jbn.BNParams(inputs().arrays["scale"], inputs().arrays["bias"])

    def local(x, mask):
        return jax.vmap(lambda x: jbn.bn_train(params, state, x, mask=mask, axis_name="a"))(x)

    f = jax.shard_map(
        local, mesh=Mesh(np.array(devices), ("a",)), in_specs=(P(None, "a"), P("a")), out_specs=(P(None, "a"), P())
    )
    y, new = jax.jit(f)(x, mask)
    for i in range(2):
        want = oracle.bn_train(x[i], *params, *state, mask=mask)
        assert_close(y[i], want.y, n=CASE.rows, factor=5)
        assert_state(jax.tree.map(lambda s, i=i: s[i], new), want, n=CASE.rows)


SHARDINGS = {
    "batch": P("a"),
    "batch, over both": P(AXES),
    "space": P(None, "a", "b"),
    "batch and space": P("b", "a"),
    "channels": P(None, None, None, "a"),
    "batch and channels": P("a", None, None, "b"),
}


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_jit_over_sharded_arrays(mesh, sharding):
    spec = SHARDINGS[sharding]
    place = lambda a: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    arrays, state, mask = inputs()
    arrays = arrays | {k: place(arrays[k]) for k in ("x", "residual")}
    args = arrays, state, mask, place(cotangent())
    f = gradients(train(CASE))
    check(f(*args))
    hlo = f.lower(*args).compile().as_text()
    largest = max([0, *(elements(shape) for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather", hlo))])
    assert largest < np.prod(CASE.shape) / 8, "nothing of x's size is gathered"


def elements(shape):
    return int(np.prod([int(n) for n in shape.split(",") if n]))


@pytest.mark.parametrize("sharding", ["batch", "batch and channels", "space"])
def test_explicit_mesh(devices, sharding):
    kinds = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), AXES, axis_types=kinds, devices=devices)
    spec = SHARDINGS[sharding]
    with jax.set_mesh(mesh):
        place = lambda a: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
        arrays, state, mask = inputs()
        arrays = arrays | {k: place(arrays[k]) for k in ("x", "residual")}
        check(gradients(train(CASE))(arrays, state, mask, place(cotangent())))


@pytest.mark.parametrize("kinds", ["Auto Auto", "Explicit Explicit", "Explicit Auto"])
@pytest.mark.parametrize("placed", ["nothing", "parameters", "all, whole"])
def test_arrays_that_no_axis_of_the_mesh_splits(devices, kinds, placed):
    """Inside `jax.set_mesh` what comes from outside it lies on no mesh, and what is made there on each device."""
    kinds = tuple(getattr(jax.sharding.AxisType, kind) for kind in kinds.split())
    mesh = jax.make_mesh((4, 2), AXES, axis_types=kinds, devices=devices)
    with jax.set_mesh(mesh):
        place = lambda a: jax.device_put(a, NamedSharding(mesh, P()))  # noqa: E731
        arrays, state, mask = inputs()
        if placed != "nothing":
            few = placed == "parameters"
            arrays = {k: a if few and k in ("x", "residual") else place(a) for k, a in arrays.items()}
            state, mask = jax.tree.map(place, state), mask if few else place(mask)
        check(gradients(train(CASE))(arrays, state, mask, cotangent()))


def test_explicit_mesh_without_entering_it(devices):
    """The arrays' types name the mesh."""
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=devices)
    place = lambda a: jax.device_put(a, NamedSharding(mesh, P("a", "b")))  # noqa: E731
    arrays, state, mask = inputs()
    arrays = arrays | {k: place(arrays[k]) for k in ("x", "residual")}
    check(gradients(train(CASE))(arrays, state, mask, place(cotangent())))


@pytest.mark.parametrize("entered", [False, True])
def test_only_the_mask_over_an_explicit_mesh(devices, entered):
    """y lies as x does."""
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=devices)
    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        arrays, state, mask = inputs()
        mask = jax.device_put(mask, NamedSharding(mesh, P("a")))
        check(gradients(train(CASE))(arrays, state, mask, cotangent()))


ELSEWHERE = {  # of x, of mask and residual
    "mask and residual are whole": (P("a"), P()),
    "by another axis": (P("a"), P("b")),
    "by the axis that splits the channels": (P(None, None, None, "a"), P("a")),
}


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize("name", ELSEWHERE)
def test_mask_and_residual_that_lie_elsewhere_on_an_explicit_mesh(devices, name, size):
    """y lies as x does, with virtual batches too."""
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=devices)
    own, other = ELSEWHERE[name]
    function = train(CASE._replace(virtual_batch_size=size))
    arrays, state, mask = inputs()
    want = gradients(function)(arrays, state, mask, cotangent())
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
        arrays = arrays | {"x": put(arrays["x"], own), "residual": put(arrays["residual"], other)}
        got = gradients(function)(arrays, state, put(mask, other), put(cotangent(), own))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)
    grads, (y, _) = got
    for value, spec in ((y, own), (grads["residual"], other)):
        assert value.sharding.is_equivalent_to(NamedSharding(mesh, spec), value.ndim)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_what_else_takes_a_mask_or_a_residual(devices, name):
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=devices)
    own, other = ELSEWHERE[name]
    arrays, state, mask = inputs()

    def f(x, residual, mask):
        params = jbn.BNParams(arrays["scale"], arrays["bias"])
        y = jbn.bn_eval(params, state, x, residual=residual, activation="relu")
        return y, jbn.moments(x, mask=mask), jbn.scaling.fit("min_max", x, mask=mask)

    want = f(arrays["x"], arrays["residual"], mask)
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
        got = f(put(arrays["x"], own), put(arrays["residual"], other), put(mask, other))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), got, want)
    assert got[0].sharding.is_equivalent_to(NamedSharding(mesh, own), got[0].ndim)


@pytest.mark.parametrize("sharding, vector", [("batch", "a"), ("batch and channels", "a"), ("batch, over both", "b")])
def test_explicit_vectors_over_axes_of_the_batch(devices, sharding, vector):
    """Parameters and state that are stored in parts are gathered where they are used, and come back in parts."""
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=devices)
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
        arrays, state, mask = inputs()
        x_like = SHARDINGS[sharding]
        arrays = {k: put(a, x_like if k in ("x", "residual") else P(vector)) for k, a in arrays.items()}
        state = jax.tree.map(lambda a: put(a, P(vector)), state)
        found = gradients(train(CASE))(arrays, state, mask, put(cotangent(), x_like))
        check(found)
        grads, (_, new) = found
        y = jax.jit(evaluate(CASE))(arrays, state)
    for value in (grads["scale"], grads["bias"], *new):
        assert value.sharding.spec == P(vector)
    arrays, state, _ = inputs()
    assert_close(y, oracle.bn_eval(*positional(inputs()), residual=arrays["residual"], **CASE.eval_options), factor=5)


def test_explicit_vectors_of_a_renormalisation(devices):
    """As without a mesh, also where each virtual batch has its own correction."""
    mesh = jax.make_mesh((4, 2), AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=devices)
    arrays, state, _ = inputs()

    def f(params, state, x):
        options = dict(renorm=jbn.Renorm(1.5, 0.5), virtual_batch_size=4)
        loss = lambda p: (jbn.bn_train(p, state, x, **options)[0] ** 2).sum()  # noqa: E731
        return jax.grad(loss)(params)

    params = jbn.BNParams(arrays["scale"], arrays["bias"])
    want = jax.jit(f)(params, state, arrays["x"])
    with jax.set_mesh(mesh):
        put = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
        parts = jax.tree.map(lambda a: put(a, P("a")), (params, state))
        got = jax.jit(f)(*parts, put(arrays["x"], P("a")))
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, n=CASE.rows, factor=10)
