"""Option sets, inputs for them, and the two ways to call batch norm on those inputs."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbn


class Case(NamedTuple):
    """A point of the option space. Hashable, so that it can be a static argument."""

    shape: tuple[int, ...] = (6, 3)
    axis: int = -1
    mask: tuple[int, ...] | None = None  # the axes along which a mask varies
    dead: bool = False  # the mask, which varies by channel, hides all of the last one
    residual: bool = False
    activation: str | None = None
    virtual_batch_size: int | None = None
    unbiased: bool = False
    momentum: float = 0.9
    epsilon: float = 1e-3
    scale: bool = True
    bias: bool = True

    @property
    def channels(self):
        return self.shape[self.axis]

    @property
    def rows(self):
        """How many elements a channel has."""
        return int(np.prod(self.shape)) // max(self.channels, 1)

    @property
    def eval_options(self):
        return dict(axis=self.axis, epsilon=self.epsilon, activation=self.activation)

    @property
    def normalize_options(self):
        """Everything that shapes y."""
        return self.eval_options | dict(virtual_batch_size=self.virtual_batch_size)

    @property
    def options(self):
        return self.normalize_options | dict(momentum=self.momentum, unbiased=self.unbiased)


class Inputs(NamedTuple):
    arrays: dict  # x, and where the case has them scale, bias, residual
    state: jbn.BNState
    mask: np.ndarray | None


def draw(case, dtype=np.float32, seed=0, offset=1.0) -> Inputs:
    """NumPy inputs: x and residual in `dtype`, parameters and state in float32 (float64 for float64)."""
    rng = np.random.default_rng(seed)
    wide = np.float64 if dtype == np.float64 else np.float32
    c = case.channels
    arrays = {"x": rng.normal(offset, 2.0, case.shape).astype(dtype)}
    if case.scale:
        arrays["scale"] = rng.uniform(0.5, 1.5, c).astype(wide)
    if case.bias:
        arrays["bias"] = rng.normal(0, 0.5, c).astype(wide)
    if case.residual:
        arrays["residual"] = rng.normal(0, 1, case.shape).astype(dtype)
    state = jbn.BNState(rng.normal(0, 1, c).astype(wide), rng.uniform(0.5, 2, c).astype(wide))
    return Inputs(arrays, state, draw_mask(case, rng))


def draw_mask(case, rng):
    if case.mask is None:
        return None
    varies = {a % len(case.shape) for a in case.mask}
    mask = rng.random([n if i in varies else 1 for i, n in enumerate(case.shape)]) < 0.7
    if case.dead:
        np.moveaxis(mask, case.axis, -1)[..., -1] = False
    return mask


def train(case, bn=jbn, **more):
    """f(arrays, state, mask) -> (y, new state)."""

    def f(arrays, state, mask=None):
        params = jbn.BNParams(arrays.get("scale"), arrays.get("bias"))
        residual = arrays.get("residual")
        return bn.bn_train(params, state, arrays["x"], mask=mask, residual=residual, **case.options, **more)

    return f


def evaluate(case, bn=jbn, **more):
    """f(arrays, state) -> y."""

    def f(arrays, state):
        params = jbn.BNParams(arrays.get("scale"), arrays.get("bias"))
        residual = arrays.get("residual")
        return bn.bn_eval(params, state, arrays["x"], residual=residual, **case.eval_options, **more)

    return f


@functools.cache
def jitted(make, case, **more):
    """What `train` or `evaluate` makes of a case, compiled once however many inputs it is given."""
    return jax.jit(make(case, **more))


def positional(inputs):
    """The oracle's positional arguments: x, scale, bias, mean, var."""
    arrays, state, _ = inputs
    return arrays["x"], arrays.get("scale"), arrays.get("bias"), *state


def precision(dtype):
    """Context in which `dtype` exists."""
    return jax.enable_x64(bool(jnp.dtype(dtype) == np.float64))


# For transformations: small, and between them every option that y depends on.
PROBLEMS = {
    "plain": Case((5, 2)),
    "channels first, residual, relu, no scale": Case((2, 3, 4), 0, residual=True, activation="relu", scale=False),
    "mask, dead channel, residual, silu": Case((4, 2, 3), 1, (0, 1), True, True, "silu", unbiased=True),
    "mask, virtual batches, hard_swish": Case((4, 3, 2), mask=(0,), activation="hard_swish", virtual_batch_size=2),
    "residual, relu6, no bias": Case((6, 2), residual=True, activation="relu6", bias=False),
    "mask, leaky_relu, no parameters": Case((6, 2), -1, (0, 1), False, False, "leaky_relu", scale=False, bias=False),
    "eval": Case((5, 2), residual=True, activation="gelu_exact"),
}


def problem(name, bn=jbn):
    """f, its argument and a tangent, in float64; f takes one dict of arrays and returns (y, new state).

    The dict holds the running mean and var too. For "eval" f is bn_eval, and the state stays.
    """
    case = PROBLEMS[name]
    arrays, state, mask = draw(case, np.float64)
    arrays = arrays | state._asdict()
    rng = np.random.default_rng(5)
    tangents = {k: rng.normal(size=a.shape) for k, a in arrays.items()}
    trained, evaluated = train(case, bn), evaluate(case, bn)

    def f(arrays, mask=mask):
        state = jbn.BNState(arrays["mean"], arrays["var"])
        return (evaluated(arrays, state), state) if name == "eval" else trained(arrays, state, mask)

    return f, arrays, tangents


def loss(f):
    """A scalar of everything f returns, curved in y, in which no two elements weigh the same."""

    def scalar(*args):
        y, state = f(*args)
        weights = jnp.linspace(0.5, 2, y.size).reshape(y.shape)
        return (jnp.sin(y) * weights).sum() + state.mean.sum() + (state.var**2).sum()

    return scalar
