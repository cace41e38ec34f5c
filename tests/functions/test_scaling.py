"""Feature scaling against NumPy and scikit-learn: one array, streams, shards, masks, and features without spread."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import assert_close

from jbn import scaling
from jbn._op.merging import merge_stream

pytestmark = pytest.mark.usefixtures("strict")

KINDS = ["standardize", "min_max", "mean_normalize"]
ROWS, FEATURES = 48, 4


def data(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(ROWS, FEATURES)) * [1, 30, 0.1, 2] + [0, 100, 5, -7]).astype(dtype)


def missing(seed=1):
    return np.random.default_rng(seed).random((ROWS, FEATURES)) < 0.7


def expected(kind, x, axis=-1, mask=None):
    """(scale, offset) in float64, feature by feature."""
    columns = np.moveaxis(np.asarray(x, np.float64), axis, -1)
    valid = np.moveaxis(np.broadcast_to(True if mask is None else mask, np.shape(x)), axis, -1)
    scales, offsets = [], []
    for c in range(columns.shape[-1]):
        v = columns[..., c][valid[..., c]]
        spread = 0 if v.size == 0 else v.std() if kind == "standardize" else v.max() - v.min()
        scales.append(spread or 1)
        offsets.append(0 if v.size == 0 else v.min() if kind == "min_max" else v.mean())
    return np.array(scales), np.array(offsets)


def check(affine, want, n=ROWS):
    """Each feature to its own magnitude and spread."""
    assert isinstance(affine, scaling.Affine)
    scale, offset = want
    tolerance = 4 * np.finfo(np.float32).eps * (1 + np.sqrt(n)) * (np.abs(offset) + scale)
    assert np.all(np.abs(affine.scale - scale) <= tolerance), affine.scale - scale
    assert np.all(np.abs(affine.offset - offset) <= tolerance), affine.offset - offset


@functools.cache
def fitted(kind):
    return jax.jit(functools.partial(scaling.fit, kind), static_argnames="axis")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_one_array(kind, masked):
    x, mask = data(), missing() if masked else None
    want = expected(kind, x, mask=mask)
    check(scaling.fit(kind, x, mask=mask), want)
    check(fitted(kind)(x, mask=mask), want)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_axes_round_trip(kind, axis):
    x = np.random.default_rng(0).normal(3, 2, (4, 6, 5)).astype(np.float32)
    mask = np.random.default_rng(1).random((4, 1, 5)) < 0.8
    affine = scaling.fit(kind, x, axis=axis, mask=mask)
    scale, offset = want = expected(kind, x, axis, mask)
    check(affine, want)
    shape = [-1 if a == axis % 3 else 1 for a in range(3)]
    y = scaling.apply(affine, x, axis=axis)
    assert_close(y, (x - offset.reshape(shape)) / scale.reshape(shape), n=x.size)
    assert_close(scaling.invert(affine, y, axis=axis), x, n=x.size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
def test_batches_of_any_split(kind, masked):
    x, mask = data(), missing()
    want = expected(kind, x, mask=mask if masked else None)
    for cuts in ([24], [1, 2, 3, 40], range(2, ROWS, 2), [0, 48]):
        parts = np.split(np.arange(ROWS), cuts)
        batches = ((x[p], mask[p]) if masked else x[p] for p in parts)
        check(scaling.fit(kind, batches), want)


def test_some_batches_with_masks():
    x, mask = data(), missing()
    mask[:24] = True
    check(scaling.fit("standardize", [x[:24], (x[24:], mask[24:])]), expected("standardize", x, mask=mask))
    check(scaling.fit("standardize", [(x[:24], None), (x[24:], mask[24:])]), expected("standardize", x, mask=mask))


def test_batches_under_jit():
    x = data()
    check(jax.jit(lambda *parts: scaling.fit("standardize", parts))(x[:7], x[7:]), expected("standardize", x))


def test_a_long_stream_loses_nothing():
    """2,000 batches of mean 100 and std 1: rounding stays that of one batch."""
    x = np.random.default_rng(0).normal(100, 1, (2000, 8, 2)).astype(np.float32)
    check(scaling.fit("standardize", iter(x)), expected("standardize", x), n=8)


def test_merge_stream_is_ordered_and_balanced():
    """Each part once, in order; depth ⌈log₂ n⌉ in the tree."""
    for n in range(1, 40):
        parts, depth = merge_stream((((i,), 0) for i in range(n)), lambda a, b: (a[0] + b[0], max(a[1], b[1]) + 1))
        assert parts == tuple(range(n))
        assert depth <= int(np.ceil(np.log2(n)))
    assert merge_stream([], max) is None


@pytest.mark.parametrize("kind", KINDS)
def test_constant_and_empty_features(kind):
    x = np.stack([np.full(9, 0.1), np.full(9, 3e38), np.arange(9), np.zeros(9)], 1).astype(np.float32)
    mask = np.ones((9, 4), bool)
    mask[:, 3] = False
    x[:, 3] = np.nan
    for affine in (
        scaling.fit(kind, x, mask=mask),
        scaling.fit(kind, [(x[:2], mask[:2]), (x[2:], mask[2:])]),
    ):
        np.testing.assert_array_equal(affine.scale[jnp.array([0, 1, 3])], 1)
        y = scaling.apply(affine, np.nan_to_num(x, nan=5.0))
        np.testing.assert_array_equal(y[:, :2], 0)
        np.testing.assert_array_equal(y[:, 3], 5)
        back = scaling.invert(affine, y)
        np.testing.assert_array_equal(back[:, :2], x[:, :2])
    unmasked = scaling.apply(scaling.fit(kind, x), x)
    assert np.all(np.isnan(unmasked[:, 3])) and np.all(np.isfinite(unmasked[:, :3]))


@pytest.mark.parametrize(
    "kind, dtype, powers",
    [(kind, np.float32, (-66, 66, -100, 120)) for kind in KINDS]
    + [("standardize", np.float64, (-664, 664, -990, 1015))],
    ids=str,
)
def test_units_do_not_matter(kind, dtype, powers):
    """Squares of these overflow or vanish; what a stream saw before in other units, or nothing but zeros, is merged."""
    own, units = data(dtype=dtype), 2.0 ** np.array(powers)
    own[:12] = 0
    own[12:24] *= 2.0**-20
    x = (own * units).astype(dtype)
    mask = missing()
    mask[:6] = False
    with jax.enable_x64(dtype == np.float64):
        for given in (None, mask):
            want = [v * units for v in expected(kind, own, mask=given)]
            batches = [x[i : i + 6] if given is None else (x[i : i + 6], given[i : i + 6]) for i in range(0, ROWS, 6)]
            for affine in (scaling.fit(kind, x, mask=given), scaling.fit(kind, batches), fitted(kind)(x, mask=given)):
                for got, value in zip(affine, want, strict=True):
                    tolerance = 4 * np.finfo(dtype).eps * (1 + np.sqrt(ROWS)) * (np.abs(want[1]) + want[0])
                    assert np.all(np.abs(got - value) <= tolerance), (got, value)
        y = scaling.apply(affine, x)
        assert_close(scaling.invert(affine, y), x, n=ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_spread_that_is_no_normal_number_is_none(kind):
    tiny = np.finfo(np.float32).tiny
    x = np.stack([np.linspace(4, 4.5, 7), np.full(7, 5), np.zeros(7)], 1).astype(np.float32) * tiny
    affine = scaling.fit(kind, x)
    np.testing.assert_array_equal(affine.scale, 1)
    assert np.all(np.abs(scaling.apply(affine, x)) <= tiny)


def test_min_max_reaches_its_ends():
    y = scaling.apply(scaling.fit("min_max", data()), data())
    np.testing.assert_array_equal(y.min(0), 0)
    np.testing.assert_allclose(y.max(0), 1, rtol=2 * np.finfo(np.float32).eps)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dtypes(dtype):
    wide = np.float64 if dtype == np.float64 else np.float32
    x = np.random.default_rng(0).normal(3, 2, (40, 3)).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        affine = scaling.fit("standardize", x)
        assert affine.scale.dtype == affine.offset.dtype == wide
        scale, offset = expected("standardize", x)
        y = scaling.apply(affine, x)
        assert y.dtype == dtype and scaling.invert(affine, y).dtype == dtype
        assert scaling.unit_length(x).dtype == dtype
        assert_close(y, (x.astype(float) - offset) / scale, dtype, n=40)
        assert_close(scaling.invert(affine, y), x, dtype, n=40)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_several_dtypes(kind):
    """As of the widest; of units that a float32's squares do not hold, too."""
    x = data() * np.float32(1e25)
    with jax.enable_x64(True):
        for parts in ([x[:7], x[7:].astype("f8")], [x[:7].astype("f8"), x[7:]]):
            affine = scaling.fit(kind, parts)
            assert affine.scale.dtype == affine.offset.dtype == np.float64
            check(affine, expected(kind, x))
    check(
        scaling.fit(kind, [data()[:7].astype("f2"), data()[7:]]),
        expected(kind, np.r_[data()[:7].astype("f2"), data()[7:]]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_sharded(kind, devices):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, P("data"))
    x, mask = jax.device_put(data(), rows), jax.device_put(missing(), rows)
    want = expected(kind, data(), mask=missing())
    check(scaling.fit(kind, x, mask=mask), want)
    check(scaling.fit(kind, [(x, mask)] * 2), want)
    compiled = fitted(kind).lower(x, mask=mask).compile().as_text()
    assert f"f32[{ROWS},{FEATURES}]" not in compiled, "the whole of x lies on one device"


def test_transformations():
    """Under vmap each set of rows has its own map; gradients are finite at features without spread."""
    x = data().reshape(2, ROWS // 2, FEATURES)
    affine = jax.vmap(functools.partial(scaling.fit, "standardize"))(x)
    for i in range(2):
        check(scaling.Affine(affine.scale[i], affine.offset[i]), expected("standardize", x[i]))
    for kind in KINDS:
        grads = jax.grad(lambda x: (scaling.apply(scaling.fit(kind, x), x) ** 3).sum())(np.ones((5, 2), np.float32))  # noqa: B023
        assert np.all(np.isfinite(grads))


def test_unit_length():
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    for axis in (0, 1, -1):
        want = x / np.sqrt((x.astype(float) ** 2).sum(axis, keepdims=True))
        assert_close(jax.jit(scaling.unit_length, static_argnames="axis")(x, axis=axis), want)


def test_unit_length_at_the_ends():
    x = np.array([[3e38, 3e38], [3e-30, 4e-30], [0, 0], [-0.0, 7]], np.float32)
    half = np.sqrt(0.5)
    assert_close(scaling.unit_length(x), [[half, half], [0.6, 0.8], [0, 0], [0, 1]])
    grads = jax.grad(lambda x: (scaling.unit_length(x) * np.array([[1, 2]], np.float32)).sum())(x)
    assert np.all(np.isfinite(grads))
    np.testing.assert_array_equal(scaling.unit_length(np.zeros((2, 0), np.float32)).shape, (2, 0))


def test_unit_length_gradient():
    x = np.array([3.0, -4, 12], np.float32)
    want = (np.eye(3) - np.outer(x, x) / 169) / 13
    for jacobian in (jax.jacfwd, jax.jacrev):
        assert_close(jacobian(scaling.unit_length)(x), want)


def test_equal_to_scikit_learn():
    preprocessing = pytest.importorskip("sklearn.preprocessing")
    x = data(dtype=np.float64)
    x[:, 3] = 2.5  # constant
    gaps = missing()
    with_gaps = np.where(gaps, x, np.nan)
    with jax.enable_x64(True):
        for kind, scaler in (("standardize", preprocessing.StandardScaler), ("min_max", preprocessing.MinMaxScaler)):
            for mask, given in ((None, x), (gaps, with_gaps)):
                theirs = scaler().fit(given)
                ours = scaling.fit(kind, given, mask=mask)
                assert_close(scaling.apply(ours, x), theirs.transform(x), n=ROWS, factor=100)
                assert_close(scaling.invert(ours, x), theirs.inverse_transform(x), n=ROWS)
            streamed = scaler()
            for part in np.split(x, 4):
                streamed.partial_fit(part)
            ours = scaling.apply(scaling.fit(kind, np.split(x, 4)), x)
            assert_close(ours, streamed.transform(x), n=ROWS, factor=100)
        x[5] = 0
        assert_close(scaling.unit_length(x), preprocessing.Normalizer().transform(x))


@pytest.mark.parametrize(
    "call, kind, message",
    [
        (lambda x: scaling.fit("zscore", x), ValueError, "kind is 'zscore', expected one of standardize, min_max"),
        (lambda x: scaling.fit("min_max", 3.0), TypeError, "x is a float, expected an array or an iterable of arrays"),
        (lambda x: scaling.fit("min_max", iter([])), ValueError, "x yielded no batch: give at least one"),
        (lambda x: scaling.fit("min_max", [[1.0], [2.0]]), TypeError, r"yielded a list as batch 0.*jnp\.asarray"),
        (lambda x: scaling.fit("min_max", [x, x[:, :2]]), ValueError, r"batch 1 of x has shape \(48, 2\).* expected 4"),
        (lambda x: scaling.fit("min_max", [x], mask=x > 0), ValueError, r"let it yield pairs \(batch, mask\)"),
        (
            lambda x: scaling.fit("min_max", [x, (x, x)]),
            TypeError,
            "mask has dtype float32, expected bool(?s:.*)This is batch 1 of x",
        ),
        (lambda x: scaling.fit("min_max", x.astype(int)), TypeError, "x has dtype int.*cast it"),
        (lambda x: scaling.fit("min_max", x, axis=2), ValueError, "axis is 2, out of range"),
        (lambda x: scaling.apply((1.0, 2.0), x), TypeError, r"affine is a tuple, expected jbn\.scaling\.Affine"),
        (
            lambda x: scaling.invert(scaling.fit("min_max", x), x, axis=0),
            ValueError,
            r"affine\.scale has shape \(4,\), expected \(48,\)",
        ),
        (
            lambda x: scaling.apply(scaling.Affine(np.ones(4, int), np.zeros(4)), x),
            TypeError,
            r"affine\.scale has dtype int",
        ),
        (lambda x: scaling.unit_length(x.astype(complex)), TypeError, "x has dtype complex"),
    ],
)
def test_errors(call, kind, message):
    with pytest.raises(kind, match=message):
        call(data())
