"""Shapes that are symbols while jax.export traces: one program, run at several sizes, against the float64 oracle."""

import re

import jax
import jax.numpy as jnp
import meaning
import numpy as np
import oracle
import pytest
from cases import Case, draw, evaluate, positional, train
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

import jbn
import jbn.linen
from jbn._op import dispatch
from jbn._op.plan import Plan
from jbn._op.sync import Sync

pytestmark = pytest.mark.usefixtures("strict")

CASES = {
    "plain": Case((4, 3)),
    "mask, residual, silu": Case((3, 2, 4), 1, (0, 2), residual=True, activation="silu", unbiased=True),
    "virtual batches": Case((4, 3, 2), virtual_batch_size=2, activation="silu"),
    "eval": Case((3, 2), residual=True, activation="silu"),
}
STEP = 1e-5  # of the finite differences, which are good to about its square


def symbolic(case, axes):
    """The case's shape with these axes symbolic, and the sizes to run it at: the case's own and a larger one."""
    grouped = 0 if case.virtual_batch_size else None
    names = [
        f"{case.virtual_batch_size if a == grouped else 1}*n{a}" if a in axes else str(n)
        for a, n in enumerate(case.shape)
    ]
    larger = tuple(n + (case.virtual_batch_size if a == grouped else 1) * (a in axes) for a, n in enumerate(case.shape))
    return ", ".join(names), [case, case._replace(shape=larger)]


def all_axes():
    for name, case in CASES.items():
        every = tuple(range(len(case.shape)))
        for axes in [*((a,) for a in every), *([every] if name == "plain" else [])]:
            yield pytest.param(name, axes, id=f"{name}, axes {axes}")


def abstract(inputs, case, text):
    """What `export` is to trace: the inputs' shapes, symbolic where x's are."""
    shape = export.symbolic_shape(text)

    def like_x(value):
        dims = [s if n == size else 1 for s, n, size in zip(shape, value.shape, case.shape, strict=True)]
        return jax.ShapeDtypeStruct(dims, value.dtype)

    vector = jax.ShapeDtypeStruct(shape[case.axis : case.axis + 1 or None], np.float64)
    return jax.tree.map(lambda v: vector if v.ndim == 1 else like_x(v), inputs)


def everything(f):
    """y and new state, gradients of sum(y · dy), and their derivative along `v` in two ways; as plain arrays."""

    def run(arrays, state, mask, dy, v):
        def total(arrays):
            y, new = f(arrays, state, mask)
            return (y * dy).sum(), (y, new)

        def along(arrays):
            return sum(jnp.vdot(g, v[k]) for k, g in jax.grad(total, has_aux=True)(arrays)[0].items())

        grad = jax.grad(jax.checkpoint(total), has_aux=True)
        grads, moved, (y, new) = jax.jvp(grad, (arrays,), (v,), has_aux=True)
        return y, tuple(new), grads, (moved, jax.grad(along)(arrays))

    return run


def wanted(name, case, inputs, dy, v):
    """The oracle's values, gradients, and their finite difference along v."""

    def grads(step=0.0):
        moved = inputs._replace(arrays={k: a + step * v[k] for k, a in inputs.arrays.items()})
        args, residual = positional(moved), moved.arrays.get("residual")
        if name == "eval":
            return oracle.bn_eval_grads(dy, *args, residual=residual, **case.eval_options)
        return oracle.bn_train_grads(dy, *args, mask=inputs.mask, residual=residual, **case.normalize_options)

    above, below = grads(STEP), grads(-STEP)
    return grads(), {k: (above[k] - below[k]) / (2 * STEP) for k in inputs.arrays}


@pytest.mark.parametrize("name, axes", list(all_axes()))
def test_values_and_derivatives(name, axes):
    """One program for all sizes: y, state, gradients through `remat`, and second derivatives."""
    with jax.enable_x64(True):
        text, cases = symbolic(CASES[name], axes)
        if name == "eval":
            f = lambda arrays, state, mask: (evaluate(CASES[name])(arrays, state), state)  # noqa: E731
        else:
            f = train(CASES[name])
        call = None
        for case in cases:
            drawn = draw(case, np.float64)
            rng = np.random.default_rng(7)
            dy, v = rng.normal(size=case.shape), {k: rng.normal(size=a.shape) for k, a in drawn.arrays.items()}
            args = (drawn.arrays, tuple(drawn.state), drawn.mask, dy, v)
            if call is None:
                plain = lambda a, s, m, dy, v: everything(f)(a, jbn.BNState(*s), m, dy, v)  # noqa: E731
                call = export.export(jax.jit(plain))(*abstract(args, case, text)).call
            y, state, got, second = meaning.run(call, *args)
            grads, moved = wanted(name, case, drawn, dy, v)
            if name == "eval":
                residual = drawn.arrays["residual"]
                assert_close(y, oracle.bn_eval(*positional(drawn), residual=residual, **case.eval_options), factor=10)
            else:
                residual = drawn.arrays.get("residual")
                want = oracle.bn_train(*positional(drawn), mask=drawn.mask, residual=residual, **case.options)
                for value, expected in zip((y, *state), want, strict=True):
                    assert_close(value, expected, n=case.rows, factor=10)
            for key, value in got.items():
                assert_close(value, grads[key], n=case.rows, factor=10)
                for way in second:
                    np.testing.assert_allclose(way[key], moved[key], rtol=1e-6, atol=1e-6)


def scoped(*texts):
    """Abstract float32 arrays whose shapes share symbols."""
    scope = export.SymbolicScope()
    return [jax.ShapeDtypeStruct(export.symbolic_shape(text, scope=scope), np.float32) for text in texts]


def test_batch_renormalisation():
    params, state = jbn.bn_init(3)

    def f(x):
        options = dict(renorm=jbn.Renorm(1.5, 0.5), activation="silu")
        y, pull, new = jax.vjp(lambda x: jbn.bn_train(params, state, x, **options), x, has_aux=True)
        return y, tuple(new), pull(y)[0]

    run = jax.jit(export.export(jax.jit(f))(*scoped("n, 3")).call)
    for x in (draw(Case((4, 3))).arrays["x"], draw(Case((7, 3))).arrays["x"]):
        jax.tree.map(lambda got, want: assert_close(got, want, n=8, factor=10), run(x), jax.jit(f)(x))


def test_serialised_with_its_derivative():
    params, state = jbn.bn_init(3)
    f = jax.jit(lambda x: jbn.bn_train(params, state, x, virtual_batch_size=4)[0])
    again = export.deserialize(export.export(f)(*scoped("8, t, 3")).serialize(vjp_order=1))
    for t in (1, 3):
        case = Case((8, t, 3), virtual_batch_size=4, epsilon=1e-5, scale=False, bias=False)
        x, dy = draw(case).arrays["x"], np.random.default_rng(7).normal(size=case.shape).astype(np.float32)
        y, pull = jax.vjp(again.call, x)
        args = (x, *params, *state)
        assert_close(y, oracle.bn_train(*args, **case.options).y, n=case.rows, factor=10)
        want = oracle.bn_train_grads(dy, *args, **case.normalize_options)
        assert_close(pull(dy)[0], want["x"], n=case.rows, factor=10)


def test_count_of_moments():
    """A scalar, as always where all channels have as many."""
    f = jax.jit(lambda x: tuple(jbn.moments(x)))
    exported = export.export(f)(*scoped("n, t, 3"))
    assert [a.shape for a in exported.out_avals] == [(), (3,), (3,)]
    x = draw(Case((2, 5, 3))).arrays["x"]
    count, mean, m2 = oracle.moments(x)
    for got, want in zip(exported.call(x), (count[0], mean, m2), strict=True):
        assert_close(got, want, n=10)


def test_a_layer_and_vmap_of_a_symbolic_axis():
    layer = jbn.linen.BatchNorm(use_running_average=False)
    variables = layer.init(jax.random.key(0), jnp.ones((2, 3)))
    apply = lambda x: layer.apply(variables, x, mutable=["batch_stats"])[0]  # noqa: E731
    # of ȳ = x nothing but rounding would be left
    f = jax.jit(lambda x: jax.vjp(jax.vmap(apply), x)[1](jnp.cos(x))[0])
    exported = export.export(f)(*scoped("k, n, 3"))
    x = draw(Case((2, 5, 3))).arrays["x"]
    assert_close(exported.call(x), f(x), n=5, factor=10)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
def test_over_devices(devices, kind):
    """Exports over either kind of mesh; a CPU's own reductions are for sizes it knows."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(kind,), devices=devices[:2])
    params, state = jbn.bn_init(3)
    f = jax.jit(jax.value_and_grad(lambda x: (jbn.bn_train(params, state, x)[0] ** 3).sum()))
    with jax.set_mesh(mesh):
        place = NamedSharding(mesh, P("d"))
        (x,) = scoped("2*n, 3")
        exported = export.export(f)(jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place))
        if kind == AxisType.Explicit:
            return  # jax runs nothing that has both symbols and explicit axes, not even a sum
        for n in (2, 5):
            x = jax.device_put(draw(Case((2 * n, 3))).arrays["x"], place)
            for got, want in zip(jax.jit(exported.call)(x), f(x), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_virtual_batches_that_may_not_divide():
    said = "virtual_batch_size is 4, which does not divide the n examples of x of shape (n, 3): give a divisor"
    with pytest.raises(ValueError, match=re.escape(said)):
        jax.eval_shape(lambda x: jbn.bn_train(*jbn.bn_init(3), x, virtual_batch_size=4), *scoped("n, 3"))


def test_kernels_are_for_sizes_that_are_known(monkeypatch):
    """The default goes to XLA, whatever was measured; asked for by name they raise."""
    monkeypatch.setattr(dispatch, "WINS", (dispatch.Win("", "float32", "last", 0, "a test"),))
    jax.clear_caches()
    (x,) = scoped("n, 3")
    plan = Plan(1, 0, 1, True, None, jnp.dtype("float32"), Sync(), may_partition=True, implementation=None)
    assert dispatch.choose("moments", plan, "cuda", x, None).implementation == "xla"
    params, state = jbn.bn_init(3)

    def step(implementation):
        return jax.jit(jax.grad(lambda x: jbn.bn_train(params, state, x, implementation=implementation)[0].sum()))

    assert "triton" not in export.export(step(None), platforms=("cuda",))(x).mlir_module()
    with pytest.raises(NotImplementedError, match="x has the symbolic shape"):
        export.export(step("triton"), platforms=("cuda",))(x)
    jax.clear_caches()
