"""First and second derivatives through scan, map, fori_loop and cond."""

import jax
import jax.numpy as jnp
import meaning
import numpy as np
import pytest
from beside import both
from cases import loss, problem
from test_transforms import along, check, rev, second

import jbn

pytestmark = pytest.mark.usefixtures("strict")

DEAD = "mask, dead channel, residual, silu"


def step(f, a):
    """The output is the next input, and the state goes along: what a scan over layers does."""
    y, state = f(a)
    return a | {"x": y + a["x"], "mean": state.mean, "var": state.var}


def returned(a):
    return a["x"], jbn.BNState(a["mean"], a["var"])


def scan(f, a):
    a, _ = jax.lax.scan(lambda a, _: (step(f, a), None), a, length=3)
    return returned(a)


def scan_checkpointed(f, a):
    return scan(jax.checkpoint(f), a)


def scan_over_batches(f, a):
    """One layer, its parameters shared by all steps, a batch and the running state a step."""

    def body(state, x):
        y, state = f(a | {"x": x} | state._asdict())
        return state, y

    batches = jnp.stack([a["x"], a["x"] * 2, a["x"] ** 2])
    state, ys = jax.lax.scan(body, jbn.BNState(a["mean"], a["var"]), batches)
    return ys, state


def mapped(f, a):
    return jax.lax.map(lambda x: f(a | {"x": x}), jnp.stack([a["x"], a["x"] * 2]))


def fori_loop(f, a):
    return returned(jax.lax.fori_loop(0, 3, lambda i, a: step(f, a), a))


def cond(f, a):
    return jax.lax.cond(a["x"].sum() > 0, f, lambda a: jax.tree.map(lambda x: 2 * x, f(a)), a)


STRUCTURES = (scan, scan_checkpointed, scan_over_batches, mapped, cond)  # a fori_loop is a scan to jax


def derivatives(h, a, t):
    """The gradient, and second derivatives forward and reverse over it."""
    return jax.jvp(jax.grad(h), (a,), (t,)), second(rev, along)(h, a, t)


@pytest.mark.parametrize(
    "structure, name",
    [(structure, "plain") for structure in STRUCTURES]
    + [(structure, DEAD) for structure in (scan_over_batches, mapped, fori_loop, cond)]
    + [(scan_over_batches, "mask, virtual batches, hard_swish"), (scan_over_batches, "eval"), (mapped, "eval")],
)
def test_like_plain_jnp(structure, name):
    with jax.enable_x64(True):

        def compute(bn):
            f, a, t = problem(name, bn)
            h = loss(lambda a: structure(f, a))
            program = meaning.Program(lambda a, t: derivatives(h, a, t), a, t)
            branches = (a, a | {"x": -a["x"]}) if structure is cond else (a,)
            return [program(each, t) for each in branches]

        check(*both(compute))


def test_forward_mode_through_a_while_loop():
    with jax.enable_x64(True):

        def compute(bn):
            f, a, t = problem("plain", bn)
            h = lambda a, n: jax.lax.fori_loop(0, n, lambda i, a: step(f, a), a)  # noqa: E731
            return jax.jit(lambda a, t, n: jax.jvp(lambda a: h(a, n), (a,), (t,)))(a, t, 3)

        check(*both(compute))


def test_vmapped_scan_of_gradients():
    """Training steps inside scan, several runs at once: what the experiments do."""
    with jax.enable_x64(True):

        def compute(bn):
            f, a, _ = problem(DEAD, bn)

            def run(x):
                def train_step(a, _):
                    g = jax.grad(loss(f))(a)
                    new = f(a)[1]
                    return {k: v - 0.1 * g[k] for k, v in a.items()} | new._asdict(), g["scale"]

                return jax.lax.scan(train_step, a | {"x": x}, length=3)

            return jax.jit(jax.vmap(run))(np.stack([a["x"], 2 * a["x"]]))

        check(*both(compute))
