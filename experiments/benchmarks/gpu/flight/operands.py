"""What the kernels read of one shape, and what they must write, in float64, by name."""

import math
from typing import Any

from experiments.benchmarks.gpu.flight.memory import Memory

EPSILON = 1e-5
LARGE = ("x", "residual", "dy", "y", "dx", "dz")  # of x's shape
# Of the distance from the exact result, relative, in norms. bfloat16 rounds by 2⁻⁹; where |z| is within rounding of 0,
# relu's derivative is 0 in one and 1 in the other: 2e-8 of all elements, whose root counts.
LIMITS = {"mean": 1e-5, "var": 1e-5, "columns": 1e-5, "total": 1e-3, "product": 1e-3}
LARGE_LIMITS = {"bfloat16": 5e-3, "float32": 1e-5}
DERIVATIVE_LIMIT = 1e-3  # of float32


def limit(name: str, dtype: str) -> float:
    """The largest distance that is rounding."""
    if name in LIMITS:
        return LIMITS[name]
    return max(LARGE_LIMITS[dtype], DERIVATIVE_LIMIT if name in ("dx", "dz") else 0)


class Operands:
    """In as many sets as together pass `beyond` bytes, so that no set is in L2 when its turn comes again.

    Exact results are of the first set. All sets are normalised by the first one's statistics: times do not depend on
    them.
    """

    def __init__(self, memory: Memory, shape: tuple[int, ...], dtype: str, beyond: float):
        self.memory, self.dtype = memory, dtype
        self.channels, self.rows = shape[-1], math.prod(shape[:-1])
        self.size = self.rows * self.channels * (4 if dtype == "float32" else 2)  # bytes of x
        self.sets = max(1, min(64, math.ceil(beyond / self.size)))
        self.made: dict[tuple[Any, ...], Any] = {}
        self.kept: tuple[Any, Any] = None, None

    def _once(self, *key: Any, make: Any) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def operand(self, name: str, fused: str, i: int) -> Any:
        """An array of set i."""
        if name in LARGE:
            return self._once(name, i, make=lambda: self._draw(name, i))
        return self._once(name, fused * (name in ("total", "product")), make=lambda: self._vector(name, fused))

    def _draw(self, name: str, i: int) -> Any:
        mean, std = (1, 2) if name == "x" else (0, 1)
        return self.memory.normal((self.rows, self.channels), self.dtype, 100 * LARGE.index(name) + i, mean, std)

    def _vector(self, name: str, fused: str) -> Any:
        if name == "epsilon":
            return self.memory.full((1,), "float32", EPSILON)
        if name in ("scale", "bias"):
            return self.memory.normal((self.channels,), "float32", len(name), float(name == "scale"), 0.25)
        exact = self.exact(name, fused)
        return self.memory.narrow(exact, "float32")

    def buffer(self, index: int, dtype: str, i: int) -> Any:
        """Where set i's output of that index goes, of x's shape."""
        return self._once("buffer", index, dtype, i, make=lambda: self.memory.full(self._shape, dtype, math.nan))

    @property
    def _shape(self) -> tuple[int, int]:
        return self.rows, self.channels

    def exact(self, name: str, fused: str) -> Any:
        """A result in float64; vectors are (C,). The last one of x's size is kept."""
        if name in LARGE:
            if self.kept[0] != (name, fused):
                self.kept = None, None  # first, so that memory is free
                self.kept = (name, fused), self._exact(name, fused)
            return self.kept[1]
        fused = fused if name in ("total", "product") else "alone"
        return self._once("exact", name, fused, make=lambda: self._exact(name, fused))

    def _exact(self, name: str, fused: str) -> Any:
        def given(name: str) -> Any:
            return self.memory.wide(self.operand(name, fused, 0))

        x = given("x")
        if name == "x":
            return x
        if name == "columns":
            return x.sum(0)
        if name in ("mean", "var"):
            mean = x.sum(0) / self.rows
            return mean if name == "mean" else ((x - mean) ** 2).sum(0) / self.rows
        rstd = (given("var") + EPSILON) ** -0.5
        normalised = (x - given("mean")) * rstd
        z = normalised * given("scale") + given("bias")
        if fused == "add + relu":
            z = z + given("residual")
        if name == "y":
            return z if fused == "alone" else z * (z > 0)
        dz = given("dy") if fused == "alone" else given("dy") * (z > 0)
        if name == "dz":
            return dz
        if name == "total":
            return dz.sum(0)
        if name == "product":
            return (dz * normalised).sum(0)
        assert name == "dx", f"nothing says what {name} is"
        away = (given("total") + normalised * given("product")) / self.rows
        return (dz - away) * (given("scale") * rstd)

    def distance(self, written: Any, name: str, fused: str) -> float:
        """Of what a kernel wrote from the exact result, relative, in norms; NaN where something was not written."""
        found = self.memory.wide(written).reshape(-1, self.channels)
        want = self.exact(name, fused)
        if name not in LARGE:
            found = found.sum(0)  # of all programs' parts
        return math.sqrt(float(((found - want) ** 2).sum()) / max(float((want**2).sum()), 1e-300))
