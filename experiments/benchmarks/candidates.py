"""Candidates of `experiments speed`: one batch norm, forward and backward, as JAX's users and PyTorch's have it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jbn
import jbn.linen
from experiments.framework.record import cores
from experiments.material.cases import Case

BASELINE, COPY = "flax.linen", "copy"
MOMENTUM, EPSILON = 0.9, 1e-5


class Inputs(NamedTuple):
    """What a candidate is given: `x` and the cotangent of y of the case's shape, scale and bias (C,) in float32."""

    x: np.ndarray
    cotangent: np.ndarray
    scale: np.ndarray
    bias: np.ndarray


# One step of a candidate: blocks until y and the gradients of x, scale and bias are there, and returns them.
Step = Callable[[], tuple[Any, Any, Any, Any]]


def with_jax(apply: Callable[..., Any], state: Any, inputs: Inputs) -> Step:
    """A step of `apply(scale, bias, state, x) -> (y, new state)` in JAX."""

    @jax.jit
    def step(state: Any, x: Any, cotangent: Any, scale: Any, bias: Any) -> Any:
        y, pullback, state = jax.vjp(lambda x, scale, bias: apply(scale, bias, state, x), x, scale, bias, has_aux=True)
        return (y, *pullback(cotangent)), state

    arguments = jax.device_put((state, *inputs))
    return lambda: jax.block_until_ready(step(*arguments))[0]


def linen(module: Callable[..., Any]) -> Callable[[Case, Inputs], Step]:
    """The candidate that a Flax linen BatchNorm class is."""

    def candidate(case: Case, inputs: Inputs) -> Step:
        norm = module(
            use_running_average=False, axis=case.axis, momentum=MOMENTUM, epsilon=EPSILON, dtype=inputs.x.dtype
        )

        def apply(scale: Any, bias: Any, state: Any, x: Any) -> Any:
            variables = {"params": {"scale": scale, "bias": bias}, "batch_stats": state}
            y, updates = norm.apply(variables, x, mutable=["batch_stats"])
            return y, updates["batch_stats"]

        state = {"mean": jnp.zeros_like(inputs.bias), "var": jnp.ones_like(inputs.scale)}
        return with_jax(apply, state, inputs)

    return candidate


def functional(case: Case, inputs: Inputs) -> Step:
    """The candidate `jbn.bn_train`."""

    def apply(scale: Any, bias: Any, state: Any, x: Any) -> Any:
        params = jbn.BNParams(scale, bias)
        return jbn.bn_train(params, state, x, axis=case.axis, momentum=MOMENTUM, epsilon=EPSILON)

    _, state = jbn.bn_init(len(inputs.scale))
    return with_jax(apply, state, inputs)


def torch(case: Case, inputs: Inputs) -> Step:
    """The candidate PyTorch, on as many threads, images in its channels-last memory format."""
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(cores())
    dtype = getattr(torch, inputs.x.dtype.name)
    x, cotangent = (torch.from_numpy(np.float32(given)).to(dtype) for given in (inputs.x, inputs.cotangent))
    scale, bias = map(torch.from_numpy, (inputs.scale, inputs.bias))
    last = case.axis == -1
    x, cotangent = (tensor.movedim(-1, 1) if last else tensor for tensor in (x, cotangent))  # a view
    leaves = [tensor.requires_grad_() for tensor in (x, scale, bias)]
    mean, var = torch.zeros(len(inputs.scale)), torch.ones(len(inputs.scale))

    def step() -> Any:
        y = torch.nn.functional.batch_norm(x, mean, var, scale, bias, training=True, momentum=1 - MOMENTUM, eps=EPSILON)
        x_gradient, *gradients = torch.autograd.grad(y, leaves, cotangent)
        y, x_gradient = (tensor.movedim(1, -1) if last else tensor for tensor in (y.detach(), x_gradient))
        return y, x_gradient, *gradients

    return step


def copy(case: Case, inputs: Inputs) -> Step:
    """Reads and writes, by XLA, as many bytes as the passes over x that both directions cannot do without.

    Forward reads x twice and writes y; backward reads x and the cotangent twice and writes the gradient of x: eight
    passes. Here both are read and written, each bit inverted, which takes no time beside memory's, and that twice.
    """
    invert = jax.jit(lambda *given: tuple(map(lax.bitwise_not, given)))
    given = jax.device_put([each.view(f"uint{8 * each.dtype.itemsize}") for each in (inputs.x, inputs.cotangent)])

    def step() -> Any:
        for _ in range(2):
            jax.block_until_ready(invert(*given))

    return step


CANDIDATES: dict[str, Callable[[Case, Inputs], Step]] = {
    "jbn.bn_train": functional,
    "jbn.linen": linen(jbn.linen.BatchNorm),
    BASELINE: linen(flax.linen.BatchNorm),
    "torch": torch,
    COPY: copy,
}
