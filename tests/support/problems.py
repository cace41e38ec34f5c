"""Random problems for the kernels: drawn, run where `execute` is told to, and checked against NumPy float64."""

import ml_dtypes
import numpy as np
import oracle

from jbn.kernels import launches
from jbn.kernels.launches import Problem
from jbn.kernels.tiling import Tiling

DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}
EPSILON = 1e-3
run = None  # run(launch, arrays, outputs), which writes the outputs in place: set by whoever tests


def execute(launch, *arrays):
    """Runs a launch; whatever it does not write stays NaN."""
    outputs = []
    for output in launch.outputs:
        dtype = np.dtype(DTYPES.get(output.dtype, output.dtype))
        poison = 0 if output.zeroed else -1 if dtype.kind == "i" else np.nan
        outputs.append(np.full(output.shape, poison, dtype))
    anything = np.full(1, np.nan, np.float32)
    arrays = [anything if a is None else np.ascontiguousarray(a) for a in arrays]
    run(launch, arrays, outputs)
    return outputs


def cut(view, splits=2, rows=64, channels=8):
    """A tiling of several programs, whatever the shape."""
    tiles = -(-view.rows // rows)
    return Tiling(rows, channels, max(1, min(splits, tiles)), 4)


class Drawn:
    """Random operands of a problem, and what the oracle makes of them, one batch at a time."""

    def __init__(
        self, view, dtype="float32", mask=None, residual=False, activation=None, scale=True, bias=True, seed=0
    ):
        rng = np.random.default_rng(seed)
        kind, shape, vectors = DTYPES[dtype], tuple(view), (view.batch, view.channels)
        self.view, self.dtype = view, dtype
        self.x = rng.normal(1, 2, shape).astype(kind)
        self.dy = rng.normal(0, 1, shape).astype(kind)
        self.scale = rng.uniform(0.5, 1.5, vectors).astype(np.float32) if scale else None
        self.bias = rng.normal(0, 0.5, vectors).astype(np.float32) if bias else None
        self.residual = rng.normal(0, 1, shape).astype(kind) if residual else None
        self.activation, self.mask, self.geometry = activation, None, mask
        self.running = rng.normal(0, 1, vectors).astype(np.float32), rng.uniform(0.5, 2, vectors).astype(np.float32)
        if mask is not None:
            batches = 1 if mask.shared else view.batch
            length = shape[1:] if mask.kind == "full" else (mask.period,)
            self.mask = rng.random((batches, *length)) < 0.7

    @property
    def seen(self):
        """The mask at x's shape."""
        view = self.view
        if self.mask is None:
            return np.ones(view, bool)
        if self.geometry.kind == "full":
            return np.broadcast_to(self.mask, view)
        rows = (np.arange(view.rows) // self.geometry.divisor) % self.geometry.period
        picked = np.broadcast_to(self.mask, (view.batch, self.mask.shape[1]))[:, rows]
        return np.broadcast_to(picked.reshape(view.batch, view.outer, 1, view.inner), view)

    def problem(self, **more):
        return Problem(
            self.view, self.dtype, self.view.rows, self.scale is not None, self.bias is not None,
            self.residual is not None, self.activation, self.geometry,
        )._replace(**more)  # fmt: skip

    def coefficients(self):
        """mean, var and weight as the op hands them to the kernels, (B, C); weight is None without a mask."""
        count, mean, m2 = self.moments()
        if self.mask is None:
            return mean.astype(np.float32), (m2 / self.view.rows).astype(np.float32), None
        weight = np.where(count > 0, 1 / np.maximum(count, 1), 0)
        mean = np.where(count > 0, mean, self.running[0])
        return tuple(v.astype(np.float32) for v in (mean, np.where(count > 0, m2 * weight, self.running[1]), weight))

    def moments(self):
        each = [oracle.moments(x, axis=1, mask=m) for x, m in zip(self.x, self.seen, strict=True)]
        return tuple(np.stack(field) for field in zip(*each, strict=True))

    def per_batch(self, function, residuals):
        """The oracle's answers; for each batch it is given scale, bias and the running statistics."""
        answers = []
        for b, x in enumerate(self.x):
            vectors = (None if v is None else v[b] for v in (self.scale, self.bias, *self.running))
            residual = None if residuals is None else residuals[b]
            options = dict(axis=1, epsilon=EPSILON, mask=self.seen[b], residual=residual, activation=self.activation)
            answers.append(function(b, x, *vectors, **options))
        return answers

    def forward(self):
        return np.stack(self.per_batch(lambda b, *a, **k: oracle.bn_train(*a, **k).y, self.residual))

    def backward(self):
        residual = self.residual
        if residual is not None:  # a masked NaN or Inf is nothing in derivatives
            residual = np.where(self.seen | np.isfinite(residual), residual, 0)
        dy = np.where(self.seen | np.isfinite(self.x) | np.isfinite(self.dy), self.dy, 0)
        grads = self.per_batch(lambda b, *a, **k: oracle.bn_train_grads(dy[b], *a, **k), residual)
        return {name: np.stack([g[name] for g in grads]) for name in grads[0]}


def run_moments(drawn, tiling):
    """count, mean and Σ (x − mean)²."""
    found = execute(launches.moments(drawn.problem(), 132, tiling), drawn.x, drawn.mask)
    return summed(drawn, *found[:3])


def summed(drawn, count, mean, var):
    """The same, of what the kernel wrote."""
    n = np.full(mean.shape, drawn.view.rows, np.float64) if drawn.mask is None else count.astype(np.float64)
    return count, mean, (var * n).astype(var.dtype)


def run_apply(drawn, tiling, dtype=None):
    mean, var, _ = drawn.coefficients()
    launch = launches.apply(drawn.problem(), dtype or drawn.dtype, 132, tiling)
    return execute(launch, drawn.x, mean, var, epsilon(drawn), drawn.scale, drawn.bias, drawn.residual)[0]


def run_sums(drawn, tiling, keep=False):
    """Σz̄, Σz̄x̂ and, with `keep`, z̄."""
    mean, var, _ = drawn.coefficients()
    launch = launches.gradient_sums(drawn.problem(), drawn.dtype if keep else None, 132, tiling)
    vectors = (mean, var, epsilon(drawn), drawn.scale, drawn.bias)
    return execute(launch, drawn.x, *vectors, drawn.residual, drawn.mask, drawn.dy)[:3]


def run_backward(drawn, tiling, keep=False):
    """Σz̄, Σz̄x̂, x̄ and z̄, as two launches; with `keep`, the first one writes z̄ for the second."""
    mean, var, weight = drawn.coefficients()
    problem = drawn.problem(weight=weight is not None)
    vectors = (mean, var, epsilon(drawn), drawn.scale, drawn.bias)
    *sums, dz = run_sums(drawn, tiling, keep)
    if keep:
        launch = launches.gradient_input(
            problem._replace(activation=None, residual=False), drawn.dtype, None, 132, tiling
        )
        dx, _ = execute(launch, drawn.x, *vectors, weight, None, drawn.mask, dz, *sums)
    else:
        launch = launches.gradient_input(problem, drawn.dtype, drawn.dtype, 132, tiling)
        dx, dz = execute(launch, drawn.x, *vectors, weight, drawn.residual, drawn.mask, drawn.dy, *sums)
    return *sums, dx, dz


def epsilon(drawn):
    return np.full(drawn.view.batch, EPSILON, np.float32)


def check(drawn, tiling=None, keep=False, factor=1):
    """All four kernels on one problem."""
    tiling = tiling or cut(drawn.view)
    count, mean, m2 = run_moments(drawn, tiling)
    wanted = drawn.moments()
    if drawn.mask is not None:
        np.testing.assert_array_equal(count, wanted[0])
    oracle.assert_moments((mean, m2), wanted, n=drawn.view.rows)
    oracle.assert_close(run_apply(drawn, tiling), drawn.forward(), n=drawn.view.rows, factor=factor, axis=2)
    total, product, dx, dz = run_backward(drawn, tiling, keep)
    grads = drawn.backward()
    for b in range(drawn.view.batch):
        got, want = {"bias": total[b], "scale": product[b], "residual": dz[b]}, {k: v[b] for k, v in grads.items()}
        oracle.assert_grads(got, want, None, drawn.view.rows, factor, axis=1)
        oracle.assert_grads({"x": dx[b]}, want, None, drawn.view.rows, 2 * factor, axis=1)
