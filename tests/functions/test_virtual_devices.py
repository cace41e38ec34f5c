"""Virtual batches over devices: the same numbers however x is sharded, nothing sent where a device has whole ones."""

import functools

import jax
import numpy as np
import oracle
import pytest
from cases import Case, draw, positional, train
from hlo import NUMBERS, collectives
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close, assert_grads, assert_state

import jbn

pytestmark = pytest.mark.usefixtures("strict")

CASE = Case((16, 2, NUMBERS), mask=(0, 1), residual=True, activation="silu", unbiased=True)
KINDS = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
VECTOR = 4 * NUMBERS  # bytes over the channels
LOCAL = [("batch", 4), ("batch over both", 1)]  # a device holds whole virtual batches
CROSSING = [("batch", 8), ("batch over both", 4), ("batch and space", 4)]
SPECS = {"batch": P("a"), "batch over both": P(("a", "b")), "batch and space": P("a", "b")}


@pytest.fixture(params=KINDS)
def mesh(request, devices):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(KINDS[request.param],) * 2, devices=devices)
    with jax.set_mesh(mesh):
        yield mesh


@functools.cache
def inputs():
    drawn = draw(CASE)
    drawn.mask[3:7] = False  # a virtual batch of one example has no data at all
    return drawn


@functools.cache
def cotangent():
    return np.random.default_rng(7).normal(size=CASE.shape).astype(np.float32)


def gradients(f):
    """y, state and gradients of sum(y · dy), in one function."""

    def run(arrays, state, mask, dy):
        y, pullback, new = jax.vjp(lambda arrays: f(arrays, state, mask), arrays, has_aux=True)
        return y, new, pullback(dy)[0]

    return run


def check(got, k):
    y, state, grads = got
    case, (arrays, _, mask) = CASE._replace(virtual_batch_size=k), inputs()
    args = positional(inputs())
    options = dict(mask=mask, residual=arrays["residual"])
    want = oracle.bn_train(*args, **options, **case.options)
    assert_close(y, want.y, n=CASE.rows, factor=5)
    assert_state(state, want, n=CASE.rows)
    want = oracle.bn_train_grads(cotangent(), *args, **options, **case.normalize_options)
    assert_grads(grads, want, n=CASE.rows, factor=10)


def place(mesh, spec):
    put = lambda a: jax.device_put(a, NamedSharding(mesh, spec))  # noqa: E731
    arrays, state, mask = inputs()
    return arrays | {k: put(arrays[k]) for k in ("x", "residual")}, state, put(mask), put(cotangent())


@pytest.mark.parametrize("name, k", LOCAL)
def test_whole_virtual_batches_send_nothing(mesh, name, k):
    """Not for y and not for x̄; what the state and the parameters' gradients need is small, and of no size of x."""
    f = train(CASE._replace(virtual_batch_size=k))
    args = place(mesh, SPECS[name])
    program = jax.jit(gradients(f)).lower(*args).compile()
    check(program(*args), k)
    vectors = CASE.shape[0] // k * VECTOR  # of each virtual batch
    assert all(size <= vectors for kind, size in collectives(program) if kind == "all-gather")
    reduced = [size for kind, size in collectives(program) if kind == "all-reduce"]
    assert len(reduced) <= 5 and sum(reduced) <= 6 * VECTOR
    assert {kind for kind, _ in collectives(program)} <= {"all-gather", "all-reduce"}

    def y_alone(arrays, state, mask, dy):
        y, pullback = jax.vjp(lambda x: f(arrays | {"x": x}, state, mask)[0], arrays["x"])
        return y, pullback(dy)

    assert collectives(jax.jit(y_alone).lower(*args).compile()) == []


@pytest.mark.parametrize("name, k", CROSSING)
def test_virtual_batches_across_devices(mesh, name, k):
    args = place(mesh, SPECS[name])
    y, *rest = jax.jit(gradients(train(CASE._replace(virtual_batch_size=k))))(*args)
    check((y, *rest), k)
    if mesh.axis_types[0] == AxisType.Explicit:
        assert y.sharding.is_equivalent_to(args[0]["x"].sharding, 3)


@pytest.mark.parametrize("k", [2, 8])
def test_renormalization(mesh, k):
    """Each virtual batch has its own r and d, also where devices share it."""
    arrays, state, mask = inputs()

    def f(arrays, state, mask):
        params = jbn.BNParams(arrays["scale"], arrays["bias"])
        options = dict(virtual_batch_size=k, renorm=jbn.Renorm(1.5, 0.5))
        return jbn.bn_train(params, state, arrays["x"], mask=mask, **options)

    want = jax.jit(gradients(f))(arrays, state, mask, cotangent())
    got = jax.jit(gradients(f))(*place(mesh, P("a")))
    jax.tree.map(functools.partial(assert_close, n=CASE.rows, factor=10), got, want)


@pytest.mark.parametrize("masked", [False, True])
def test_explain_tells_what_the_state_sends(devices, masked):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,), devices=devices)
    put = lambda a: jax.device_put(a, NamedSharding(mesh, P("a")))  # noqa: E731
    x, options = put(inputs().arrays["x"]), {"mask": put(inputs().mask)} if masked else {}
    told = jbn.explain(x, virtual_batch_size=2, **options).collectives["forward"]
    f = functools.partial(jbn.bn_train, *jbn.bn_init(NUMBERS), virtual_batch_size=2)
    sent = collectives(jax.jit(f).lower(x, **options).compile())
    assert [(one.kind, one.size) for one in told] == sent


def test_channels_first(mesh):
    """The examples are then the second axis."""
    x = np.moveaxis(inputs().arrays["x"], -1, 0)
    placed = jax.device_put(x, NamedSharding(mesh, P(None, "a")))
    params, state = jbn.bn_init(NUMBERS)
    f = jax.jit(functools.partial(jbn.bn_train, params, state, axis=0, virtual_batch_size=2))
    jax.tree.map(functools.partial(assert_close, n=32, factor=4), f(placed), f(x))


def mapped(devices, f, check_vma, members=8):
    mesh = jax.make_mesh((members,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:members])
    arrays = {k: P("data") if k in ("x", "residual") else P() for k in inputs().arrays}
    specs = dict(in_specs=(arrays, P(), P("data")), out_specs=(P("data"), P()), check_vma=check_vma)
    return jax.jit(gradients(jax.shard_map(f, mesh=mesh, **specs)))


@pytest.mark.parametrize("k, check_vma", [(1, True), (4, True), (4, False), (16, True)])
def test_shard_map(devices, k, check_vma):
    """Two examples a member: of its own while that is enough, else shared with the next, or by all."""
    arrays, state, mask = inputs()
    f = mapped(devices, train(CASE._replace(virtual_batch_size=k), axis_name="data"), check_vma)
    check(f(arrays, state, mask, cotangent()), k)


def test_shard_map_renormalization_across_members(devices):
    arrays, state, mask = inputs()

    def f(arrays, state, mask, **sync):
        params = jbn.BNParams(arrays["scale"], arrays["bias"])
        options = dict(renorm=jbn.Renorm(1.5, 0.5), virtual_batch_size=4)
        return jbn.bn_train(params, state, arrays["x"], mask=mask, **options, **sync)

    got = mapped(devices, functools.partial(f, axis_name="data"), True)(arrays, state, mask, cotangent())
    want = jax.jit(gradients(f))(arrays, state, mask, cotangent())
    jax.tree.map(functools.partial(assert_close, n=CASE.rows, factor=10), got, want)


def test_vmap_and_groups_of_members():
    """Four members of four examples in two groups: a virtual batch of 8 is a group, one of 4 a member."""
    x = inputs().arrays["x"].reshape(4, 4, 2, NUMBERS)
    params, state = jbn.bn_init(NUMBERS)

    def run(k, groups):
        f = functools.partial(jbn.bn_train, params, state, axis_name="d", axis_index_groups=groups)
        return jax.vmap(lambda x: f(x, virtual_batch_size=k), axis_name="d")(x)

    def whole(x, k):
        return jbn.bn_train(params, state, x.reshape(-1, 2, NUMBERS), virtual_batch_size=k)

    for k in (4, 8):
        y, new = run(k, [[0, 2], [1, 3]])
        for members in ([0, 2], [1, 3]):
            want, wanted = whole(x[np.array(members)], k)
            assert_close(y[np.array(members)].reshape(want.shape), want, n=16)
            assert_close(new.var[members[0]], wanted.var, n=16)


def test_a_constant_channel_keeps_no_variance():
    x = np.full((12, 3), 0.1, np.float32)
    y, state = jbn.bn_train(*jbn.bn_init(3), x, virtual_batch_size=3, momentum=0)
    assert not np.any(y) and not np.any(state.var) and np.all(state.mean == x[0])


@pytest.mark.parametrize(
    "k, names, message",
    [
        (3, "d", r"is 3, which does not divide the 4 examples a member, of 4 over axis_name=\('d',\) of x"),
        (12, "d", "is 12, which does not divide the 4 examples a member.*a multiple of them that divides those of all"),
        (8, None, r"is 8, which does not divide the 4 examples of x of shape \(4, 2, 64\): give a divisor"),
        (0, "d", "is 0, expected None or a positive integer: give a divisor of the examples"),
    ],
)
def test_errors(k, names, message):
    x = inputs().arrays["x"].reshape(4, 4, 2, NUMBERS)
    f = functools.partial(jbn.bn_train, *jbn.bn_init(NUMBERS), virtual_batch_size=k, axis_name=names)
    with pytest.raises(ValueError, match=f"virtual_batch_size {message}"):
        jax.vmap(f, axis_name="d")(x)
