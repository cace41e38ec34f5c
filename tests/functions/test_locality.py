"""What is not finite, or nearly so, reaches exactly what the formula says: drawn at random, every implementation.

A fault is one element of one operand replaced, or one of a mask flipped. What depends on it the oracle says, by moving
that element: everything else has the same bits as without it, and what depends on it is finite where the oracle's is,
and NaN or infinite as the oracle's is where no order of sums decides on that. Channels do not depend on each other, so
that each may have a fault of its own.
"""

import functools

import driver
import jax
import numpy as np
import oracle
import pytest
from cases import Case, draw, evaluate, train
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import jbn
from jbn._op import xla_cpu

pytestmark = pytest.mark.usefixtures("strict")

LARGEST = float(np.finfo(np.float32).max)
VALUES = [np.nan, np.inf, -np.inf, LARGEST, -LARGEST, LARGEST / 16, -LARGEST / 16, 1e-40, -1e-45]
MARGIN = 8.0  # a result this far below the largest float is finite however it is computed, so far above it is not

CASES = {
    "train": (train, Case((48, 6))),
    "train, residual, silu": (train, Case((48, 6), residual=True, activation="silu")),
    "train, mask, residual, relu": (train, Case((48, 6), mask=(0,), residual=True, activation="relu")),
    "train, a channel's own mask": (train, Case((48, 6), mask=(0, 1), epsilon=1e-5)),
    "eval": (evaluate, Case((48, 6), epsilon=1e-5)),
    "eval, residual, hard_swish": (evaluate, Case((48, 6), residual=True, activation="hard_swish")),
    "virtual": (train, Case((48, 6), virtual_batch_size=24)),
    "channels first": (train, Case((2, 6, 24), 1, activation="leaky_relu")),
}
LARGE = {"train": (train, Case((1040, 32))), "eval": (evaluate, Case((1040, 32)))}


@pytest.fixture(scope="module", params=["xla", "cut", "kernels"])
def implementation(request):
    """XLA's, the CPU's however little there is, and kernels, without a GPU on a CPU that passes for one."""
    if request.param == "kernels":
        with driver.gpu():
            yield "kernels"
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(xla_cpu, "LITTLE", 0 if request.param == "cut" else 2**14)
        jax.clear_caches()  # `jit` knows nothing of it
        yield request.param
    jax.clear_caches()


def operands(kind, case):
    """Of the case, by name, the mask apart."""
    inputs = draw(case)
    dy = np.random.default_rng(7).uniform(-1, 1, case.shape).astype(np.float32)
    values = inputs.arrays | inputs.state._asdict() | {"dy": dy}
    if kind is evaluate and not case.residual:  # x̂ is in the hundreds
        values["var"] = np.full_like(values["var"], 1e-6)
    return values, inputs.mask


@functools.cache
def compiled(kind, case, implementation):
    """f(operands, mask) -> results by name; `implementation` is part of the key."""
    options = {"implementation": "triton"} if implementation == "kernels" else {}

    @jax.jit
    def run(values, mask):
        names = [n for n in values if n != "dy" and (kind is evaluate or n not in ("mean", "var"))]

        def f(moving):
            every = values | moving
            arrays = {n: v for n, v in every.items() if n not in ("mean", "var", "dy")}
            state = jbn.BNState(every["mean"], every["var"])
            found = kind(case, **options)(arrays, state, *([mask] if kind is train else []))
            return found if kind is train else (found, state)

        y, pull, state = jax.vjp(f, {n: values[n] for n in names}, has_aux=True)
        (grads,) = pull(values["dy"])
        moved = state._asdict() if kind is train else {}
        return {"y": y} | {f"new {n}": v for n, v in moved.items()} | {f"d{n}": v for n, v in grads.items()}

    return run


def expected(kind, case, values, mask):
    """The oracle's results, by the same names."""
    x, scale, bias, mean, var, dy = (values.get(n) for n in ("x", "scale", "bias", "mean", "var", "dy"))
    given = (x, scale, bias, mean, var)
    with np.errstate(all="ignore"):
        if kind is evaluate:
            options = case.eval_options | {"residual": values.get("residual")}
            found = {"y": oracle.bn_eval(*given, **options)}
            grads = oracle.bn_eval_grads(dy, *given, **options)
        else:
            more = {"mask": mask, "residual": values.get("residual")}
            y, new_mean, new_var = oracle.bn_train(*given, **case.options, **more)
            found = {"y": y, "new mean": new_mean, "new var": new_var}
            # a masked NaN or Inf is nothing in derivatives
            seen = np.ones(case.shape, bool) if mask is None else np.broadcast_to(mask, case.shape)
            if more["residual"] is not None:
                more["residual"] = np.where(seen | np.isfinite(more["residual"]), more["residual"], 0)
            grads = oracle.bn_train_grads(dy, *given, **case.normalize_options, **more)
    return found | {f"d{n}": v for n, v in grads.items() if n in values}


@st.composite
def drawn(draw, kind, case):
    """Faults `(operand, index, value)`, at most one a channel, and at least one channel without."""
    values, mask = operands(kind, case)
    if mask is not None and mask.shape[case.axis] > 1:
        values["mask"] = mask
    channels = draw(st.permutations(range(case.channels)))[: draw(st.integers(1, min(case.channels - 1, 5)))]
    faults = []
    for channel in channels:
        name = draw(st.sampled_from(sorted(values)))
        index = [draw(st.integers(0, n - 1)) for n in values[name].shape]
        index[case.axis if len(index) > 1 else 0] = channel
        faults.append((name, tuple(index), 0.0 if name == "mask" else draw(st.sampled_from(VALUES))))
    return faults


def put(values, mask, faults):
    values = {n: v.copy() for n, v in values.items()}
    mask = None if mask is None else mask.copy()
    for name, index, value in faults:
        if name == "mask":
            mask[index] ^= True
        else:
            values[name][index] = value
    return values, mask


def dependent(kind, case, values, mask, fault):
    """Where each result depends on the element; an activation that is flat somewhere hides nothing."""
    name, index, _ = fault
    curved = case._replace(activation=case.activation and "silu")
    before, moved = expected(kind, curved, values, mask), {}
    own = 1 if name == "mask" else values[name][index]
    for other in (1.5 * own + 0.1, 0.5 * own):
        after = expected(kind, curved, *put(values, mask, [(name, index, other)]))
        moved = {n: moved.get(n, False) | (value != before[n]) for n, value in after.items()}
    return moved


def check(kind, case, implementation, faults):
    values, mask = operands(kind, case)
    run = compiled(kind, case, implementation)
    before, spoilt = jax.device_get(run(values, mask)), put(values, mask, faults)
    after, want = jax.device_get(run(*spoilt)), expected(kind, case, *spoilt)
    reached = [dependent(kind, case, values, mask, fault) for fault in faults]
    for name, got in after.items():
        assert got.dtype == np.float32
        for (what, index, value), moved in zip(faults, reached, strict=True):
            own = of_channel(case, got, index[case.axis if len(index) > 1 else 0])
            there = moved[name][own]
            same = got[own].view(np.uint32) == before[name][own].view(np.uint32)
            assert (same | there).all(), f"{value} in {what}{index} reaches {name}"
            if abs(value) == LARGEST or (what != "dy" and 1e15 < abs(value) < np.inf):
                continue  # a product on the way may overflow where the result does not
            finite, wanted = np.isfinite(got[own]), np.abs(want[name][own])
            label = f"{value} in {what}{index}: {name}"
            assert finite[wanted < LARGEST / MARGIN].all(), f"{label} is not finite"
            assert not finite[~(wanted < LARGEST * MARGIN)].any(), f"{label} is finite"
            if np.isnan(value) or (np.isinf(value) and (kind is evaluate or what in ("bias", "residual"))):
                kinds = [
                    np.where(np.isnan(v), 2, np.where(np.isinf(v), np.sign(v), 0)) for v in (got[own], want[name][own])
                ]
                np.testing.assert_array_equal(*kinds, label)
            size = np.max(wanted, initial=1e-20, where=finite)
            np.testing.assert_allclose(got[own][finite], want[name][own][finite], rtol=1e-3, atol=1e-3 * size)
        left = sorted(set(range(case.channels)) - {f[1][case.axis if len(f[1]) > 1 else 0] for f in faults})
        own = of_channel(case, got, left)
        np.testing.assert_array_equal(got[own].view(np.uint32), before[name][own].view(np.uint32))


def of_channel(case, value, channel):
    """The index of what a result has of a channel, or of several."""
    return (..., channel) if value.ndim == 1 or case.axis == -1 else (slice(None), channel)


@pytest.mark.parametrize("name", CASES)
def test_one_element_reaches_what_depends_on_it(name, implementation):
    kind, case = CASES[name]
    few = implementation == "kernels" and not driver.ON_GPU  # emulated

    phases = [Phase.generate] if few else [Phase.generate, Phase.shrink]

    @settings(max_examples=4 if few else 25, deadline=None, database=None, derandomize=True, phases=phases)
    @given(drawn(kind, case))
    def holds(faults):
        check(kind, case, implementation, faults)

    holds()


@pytest.mark.parametrize("name", LARGE)
def test_past_the_size_at_which_code_changes(name):
    kind, case = LARGE[name]
    assert case.rows * case.channels > xla_cpu.LITTLE
    for what in ("x", "dy"):
        index = (77, 519, 0, 300, 64, 65)
        check(kind, case, "xla", [(what, (row, 5 * i), VALUES[i]) for i, row in enumerate(index)])
