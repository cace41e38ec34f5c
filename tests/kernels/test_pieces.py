"""`jbn._op.triton` against `jbn._op.xla`: how arrays of any rank lie in memory, and masks of any shape."""

from functools import partial

import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import device
import interpreter
import jax
import jax.numpy as jnp
import meaning
import oracle
import problems
from driver import ON_GPU
from problems import EPSILON, execute

from jbn._op import triton, xla
from jbn._op.plan import Coefficients, Plan
from jbn._op.sync import Sync

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # masked NaN and overflow, in NumPy

PIECES = {  # shape, channel, leading batch axes, shape of the mask
    "channels last": ((6, 5, 4, 3), 3, 0, None),
    "channels first": ((6, 3, 5, 4), 1, 0, None),
    "no rows but one axis": ((40,), 0, 0, None),
    "batches": ((2, 3, 8, 5), 3, 2, None),
    "full mask": ((6, 5, 3), 2, 0, (6, 5, 3)),
    "mask of examples": ((6, 5, 4, 3), 3, 0, (6, 1, 1, 1)),
    "mask of steps": ((6, 5, 3), 2, 0, (1, 5, 1)),
    "mask of two axes": ((6, 5, 4, 3), 3, 0, (6, 5, 1, 1)),
    "mask with a gap": ((6, 5, 4, 3), 3, 0, (6, 1, 4, 1)),
    "mask of channels": ((6, 5, 3), 2, 0, (1, 1, 3)),
    "mask of nothing": ((6, 5, 3), 2, 0, (1, 1, 1)),
    "mask of examples, channels first": ((6, 3, 5, 4), 1, 0, (6, 1, 1, 1)),
    "mask of positions, channels first": ((6, 3, 5, 4), 1, 0, (1, 1, 5, 4)),
    "mask of all but channels, channels first": ((6, 3, 5, 4), 1, 0, (6, 1, 5, 4)),
    "one mask for all batches": ((2, 6, 5, 3), 3, 1, (1, 6, 1, 1)),
    "a mask for each batch": ((2, 6, 5, 3), 3, 1, (2, 6, 1, 1)),
    "a mask that varies by one of two batch axes": ((2, 3, 6, 5), 3, 2, (2, 1, 6, 1)),
    "one channel": ((6, 5, 1), 2, 0, (6, 1, 1)),
}


# not compiled: what the kernels themselves make of such launches is in test_kernels, and test_functional has whole ops
@pytest.mark.parametrize("name", PIECES)
def test_pieces(name, monkeypatch):
    monkeypatch.setattr(problems, "run", device.run if ON_GPU else interpreter.execute)

    class Interpreter(triton.Runner):
        def __call__(self, launch, *arrays):
            return [jnp.asarray(v) for v in execute(launch, *map(np.asarray, arrays))]

    def kernel(name, plan, *operands):
        if ON_GPU:
            return jax.jit(partial(triton.piece(name, "cuda"), plan))(*operands)
        return getattr(triton, name)(plan, *operands, runner=Interpreter("cuda"))

    shape, channel, batch, mask_shape = PIECES[name]
    rng = np.random.default_rng(0)
    x, residual, dy = (jnp.asarray(rng.normal(1, 2, shape), jnp.float32) for _ in range(3))
    mask = None if mask_shape is None else jnp.asarray(rng.random(mask_shape) < 0.7)
    vector = (*shape[:batch], shape[channel])
    rows = x.size // int(np.prod(vector))
    plan = Plan(
        channel,
        batch,
        count=rows if mask is None else 1,
        centred=True,
        activation="silu",
        dtype=jnp.dtype("float32"),
        sync=Sync(),
        may_partition=False,
        implementation="triton",
    )

    def same(got, want):
        assert len(got) == len(want)
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype
            # of a single row the variance is 0, and 1/std, 30 times that of others, of what is 0 but for rounding
            oracle.assert_close(a, b, n=rows, factor=2 if rows > 1 else 60, scale=None if rows > 1 else 1)

    scale, bias = (jnp.asarray(rng.uniform(0.5, 1, vector), jnp.float32) for _ in range(2))
    epsilons = jnp.full((*shape[:batch], 1), EPSILON, jnp.float32)
    given = plan._replace(centred=False, count=1)

    def reference(x, residual, mask, dy, scale, bias, epsilons):
        moments = xla.moments(plan, x, mask)
        mean, var = moments[-2:]
        weight = None if mask is None else 1 / jnp.maximum(moments[0], 1)
        coef = Coefficients(mean, var, weight, epsilons, scale, bias)
        each = []
        for r in (None, residual):
            sums = xla.gradient_sums(plan, x, coef, r, mask, dy)
            dx = xla.gradient_input(plan, x, coef, r, mask, dy, sums)
            each.append((r, xla.apply(plan, x, coef, r), sums, dx))
        kept = xla.gradient_sums_keeping(plan, x, coef, residual, mask, dy)
        return moments, coef, each, kept, xla.gradient_input(given, x, coef, None, mask, dy, ())

    moments, coef, each, kept, wanted = meaning.run(reference, x, residual, mask, dy, scale, bias, epsilons)
    same(kernel("moments", plan, x, mask), moments)
    for r, y, sums, dx in each:
        same(kernel("apply", plan, x, coef, r), y)
        same(kernel("gradient_sums", plan, x, coef, r, mask, dy), sums)
        same(kernel("gradient_input", plan, x, coef, r, mask, dy, sums), dx)
    same(kernel("gradient_sums_keeping", plan, x, coef, residual, mask, dy), kept)
    *sums, dz = kept
    (dx,) = kernel("gradient_input", plan._replace(activation=None), x, coef, None, mask, dz, sums)
    same((dx, dz), each[1][3])
    same(kernel("gradient_input", given, x, coef, None, mask, dy, ()), wanted)
