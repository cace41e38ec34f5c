"""Moments of an array, and their algebra: commutative, associative, with the empty ones as identity."""

import jax
import jax.numpy as jnp
import meaning
import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_close, assert_moments

import jbn

pytestmark = pytest.mark.usefixtures("strict")

CHANNELS = 3


def check(got, count, mean, m2, n=1, dtype=np.float32):
    assert isinstance(got, jbn.Moments)
    np.testing.assert_array_equal(np.broadcast_to(np.asarray(got.count, float), np.shape(count)), count)
    assert_moments(got[1:], (count, mean, m2), dtype, n)


def data(*shape, seed=0, offset=2.0):
    return np.random.default_rng(seed).normal(offset, 1.5, shape).astype(np.float32)


@pytest.mark.parametrize("shape, axis", [((3,), 0), ((8, 3), -1), ((4, 3, 5), 1), ((3, 2, 2, 5), 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_of_an_array(shape, axis, masked):
    x = data(*shape)
    mask = np.random.default_rng(1).random(shape) < 0.6 if masked else None
    got = jax.jit(lambda x, mask: jbn.moments(x, axis=axis, mask=mask))(x, mask)
    check(got, *oracle.moments(x, axis, mask), n=x.size // x.shape[axis])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_dtypes(dtype):
    """Half types accumulate in float32; float64 stays."""
    x = data(50, 3).astype(dtype)
    wide = np.float64 if dtype == np.float64 else np.float32
    with jax.enable_x64(dtype == np.float64):
        got = jbn.moments(x)
        assert got.mean.dtype == got.m2.dtype == wide
        check(got, *oracle.moments(x), n=50, dtype=wide)


def test_broadcast_mask_and_dead_channel():
    x = data(8, 5, 3)
    mask = np.array([True, False, True]).reshape(1, 1, 3)
    x[..., 1] = np.nan
    got = jbn.moments(x, mask=mask)
    check(got, *oracle.moments(x, -1, mask), n=40)
    np.testing.assert_array_equal(got.count, [40, 0, 40])


@pytest.mark.parametrize("unbiased", [False, True])
def test_variance(unbiased):
    x, mask = data(6, 3), np.ones((6, 3), bool)
    mask[1:, 1] = False  # one value: an unbiased variance of 0, not 0/0
    got = jbn.moments(x, mask=mask).variance(unbiased=unbiased)
    n, _, m2 = oracle.moments(x, -1, mask)
    assert_close(got, m2 / np.maximum(n - unbiased, 1), n=6, scale=0)
    assert_close(jbn.moments(x).variance(unbiased), x.astype(float).var(0, ddof=int(unbiased)), n=6, scale=0)


parts = st.lists(
    st.tuples(
        st.lists(st.integers(0, 1000), min_size=CHANNELS, max_size=CHANNELS),  # counts differ by channel
        st.floats(-1e4, 1e4, width=32),
        st.floats(0, 100, width=32),
        st.integers(0, 2**32 - 1),
    ),
    min_size=4,
    max_size=4,  # one shape: merges are compiled once
)


def make(part):
    """float32 moments with some counts, means near `offset` and a spread; nothing subnormal, which XLA flushes."""
    counts, offset, spread, seed = part
    rng = np.random.default_rng(seed)
    n = np.array(counts, np.float32)
    mean = np.where(n > 0, offset + spread * rng.normal(size=CHANNELS), 0)
    m2 = np.where(n > 1, n * spread**2, 0)
    return jbn.Moments(n, *(np.where(np.abs(a) < 1e-30, 0, a).astype(np.float32) for a in (mean, m2)))


def exact(moments):
    """The merged moments in float64: weighted mean, then within plus between."""
    n, mean, m2 = (np.stack([np.asarray(m[i], np.float64) for m in moments]) for i in range(3))
    total = n.sum(0)
    center = (n * mean).sum(0) / np.maximum(total, 1)
    return total, center, (m2 + n * (mean - center) ** 2).sum(0)


def check_merged(got, moments):
    """Means to a few roundings of the largest mean, m2 to those of what the differences of means can tell."""
    n, mean, m2 = exact(moments)
    eps = 2.0**-23
    largest = np.max(np.abs(np.stack([m.mean for m in moments])), axis=0)
    np.testing.assert_array_equal(np.broadcast_to(np.asarray(got.count, float), n.shape), n)
    assert np.all(np.abs(got.mean - mean) <= 8 * eps * largest)
    means = np.sqrt(n * m2) * 8 * eps * largest + n * (8 * eps * largest) ** 2  # mean's error δ: 2δ·Σ|x−μ| + nδ²
    assert np.all(np.abs(got.m2 - m2) <= 16 * eps * m2 + 2 * means)


@given(parts, st.permutations(range(4)))
@settings(max_examples=60, deadline=None)
def test_merge_in_any_order_and_grouping(parts, order):
    moments = [make(p) for p in parts]
    a, b, c, d = (moments[i] for i in order)
    merge = jbn.merge
    for got in (merge(a, b, c, d), merge(merge(a, b), merge(c, d)), merge(a, merge(b, merge(c, d)))):
        check_merged(got, moments)


@given(parts, st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_empty_is_the_identity(parts, which):
    m, empty = make(parts[which]), jbn.moments(np.zeros((0, CHANNELS), np.float32))
    for got in (jbn.merge(m, empty), jbn.merge(empty, m), jbn.merge(empty, m, empty), jbn.merge(m)):
        for a, b in zip(got, m, strict=True):
            np.testing.assert_array_equal(np.broadcast_to(a, CHANNELS), b)


def test_empty_and_empty():
    empty = jbn.moments(np.zeros((0, CHANNELS), np.float32))
    merged = jbn.merge(empty, empty)
    np.testing.assert_array_equal(np.broadcast_to(merged.count, CHANNELS), 0)
    assert np.all(np.isfinite(merged.mean)) and np.all(np.asarray(merged.m2) == 0)


@pytest.mark.parametrize("cuts", [(1, 2), (0, 40), (17, 17), (39, 40)])
def test_merging_the_parts_is_the_whole(cuts):
    x, mask = data(40, 3, offset=100), np.random.default_rng(1).random((40, 3)) < 0.7
    whole = oracle.moments(x, -1, mask)
    pieces = [jbn.moments(x[s], mask=mask[s]) for s in np.split(np.arange(40), cuts)]
    check(jbn.merge(*pieces), *whole, n=40)
    x_only = [jbn.moments(p) for p in np.split(x, cuts)]
    check(jbn.merge(*x_only), *oracle.moments(x), n=40)


@pytest.mark.parametrize("constant", [0.1, 1e10, 3e38, -7])
def test_merging_a_constant_stays_exact(constant):
    """Empty parts between, whose mean is 0: the square of the difference may overflow, and must not matter."""
    pieces = [jbn.moments(np.full((n, 2), constant, np.float32)) for n in (1, 7, 1000, 33)]
    empty = jbn.moments(np.zeros((4, 2), np.float32), mask=np.zeros((4, 1), bool))
    for merged in (jbn.merge(*pieces), jbn.merge(empty, *pieces[:2], empty, *pieces[2:], empty)):
        np.testing.assert_array_equal(merged.m2, 0)
        np.testing.assert_array_equal(merged.mean, np.float32(constant))


def test_many_small_parts_and_a_large_one():
    """Added one by one to 2²⁴, which in float32 is its own successor, they would all be lost."""
    large = jbn.Moments(*(np.full(2, v, np.float32) for v in (2**24, 1, 2**24)))
    small = [jbn.Moments(*(np.full(2, v, np.float32) for v in (1, 3, 0))) for _ in range(127)]
    for parts in ([large, *small], [*small, large]):
        for got, want in zip(jbn.merge(*parts), exact(parts), strict=True):
            np.testing.assert_allclose(got, want, rtol=8 * 2.0**-24)  # seven levels, and a last rounding


@pytest.mark.parametrize("masked", [False, True])
def test_scan_over_a_stream(masked):
    x = data(12, 5, 3, offset=50)
    mask = np.random.default_rng(1).random(x.shape) < 0.5 if masked else np.ones_like(x, bool)
    of = (lambda x, m: jbn.moments(x, mask=m)) if masked else (lambda x, m: jbn.moments(x))

    def step(carry, batch):
        return jbn.merge(carry, of(*batch)), None

    empty = jax.tree.map(jnp.asarray, of(x[0, :0], mask[0, :0]))
    got, _ = jax.jit(lambda x, m: jax.lax.scan(step, empty, (x, m)))(x, mask)
    flat = lambda a: a.reshape(-1, 3)  # noqa: E731
    check(got, *oracle.moments(flat(x), -1, flat(mask)), n=60)


def test_vmap():
    x, mask = data(4, 6, 3), np.random.default_rng(1).random((4, 6, 1)) < 0.6
    got = jax.jit(jax.vmap(lambda x, m: jbn.merge(jbn.moments(x, mask=m), jbn.moments(x))))(x, mask)
    for i in range(4):
        both = np.concatenate([x[i], x[i]]), -1, np.concatenate([mask[i], np.ones((6, 1), bool)])
        row = jax.tree.map(lambda a, i=i: np.asarray(a)[i], (got.count, got.mean, got.m2))
        check(jbn.Moments(*row), *oracle.moments(*both), n=12)


@pytest.mark.parametrize("merged", [False, True])
def test_derivatives(merged):
    """∂mean/∂x = valid/n, ∂m2/∂x = 2·valid·(x − mean), and the second of m2; through a merge too."""
    with jax.enable_x64(True):
        x, mask = data(5, 2).astype(np.float64), np.ones((5, 2), bool)
        mask[1, 0] = mask[4, 1] = False
        valid, n = mask.astype(float), mask.sum(0)
        mean = (x * valid).sum(0) / n

        def moments(x):
            pieces = (slice(0, 2), slice(2, 5)) if merged else (slice(0, 5),)
            return jbn.merge(*(jbn.moments(x[s], mask=mask[s]) for s in pieces))

        assert_close(meaning.run(jax.grad(lambda x: moments(x).mean.sum()), x), valid / n)
        assert_close(meaning.run(jax.grad(lambda x: moments(x).m2.sum()), x), 2 * valid * (x - mean))
        for jacobian in (jax.jacfwd, jax.jacrev):
            hessian = meaning.run(jacobian(jax.grad(lambda x: moments(x).m2[0])), x)[:, 0, :, 0]
            assert_close(hessian, 2 * (np.diag(valid[:, 0]) - np.outer(valid[:, 0], valid[:, 0]) / n[0]))
