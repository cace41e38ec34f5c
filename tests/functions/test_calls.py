"""What a call costs besides its arithmetic: outside `jit` it is one program, and in one it leaves what it needs."""

import contextlib
import re

import flax.linen as nn
import hlo
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx

pytestmark = pytest.mark.usefixtures("strict")

ROWS, CHANNELS = 6, 37  # so many channels no other test has: whatever was not compiled here is compiled here


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))


X, PARAMS, STATE = draw(ROWS, CHANNELS), *jbn.bn_init(CHANNELS)
BATCH = draw(2, ROWS, CHANNELS)
KERNEL, AFFINE = draw(CHANNELS, CHANNELS), jbn.scaling.Affine(*draw(2, CHANNELS))
SEEN = jnp.arange(ROWS)[:, None] < 4


@contextlib.contextmanager
def compiled():
    """Yields a list that grows by each program that is compiled inside."""
    found = []

    def listener(event: str, duration_secs: float, **about: str | int):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(about)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def linen(average):
    norm = jbn.linen.BatchNorm(use_running_average=average, activation="relu")
    variables = norm.init(jax.random.key(0), X)
    return lambda: norm.apply(variables, X, mutable=[] if average else ["batch_stats"])


def of_nnx(average):
    norm = jbn.nnx.BatchNorm(CHANNELS, use_running_average=average, activation="silu", rngs=nnx.Rngs(0))
    return lambda: norm(X)


def train(**options):
    return lambda: jbn.bn_train(PARAMS, STATE, X, **options)


CALLS = {
    "train": lambda: train(),
    "train, mask": lambda: train(mask=SEEN, residual=X, activation="relu"),
    "train, virtual": lambda: train(virtual_batch_size=3, unbiased=True),
    "train, renorm": lambda: train(renorm=jbn.Renorm(2.0, 1.0)),
    "evaluate": lambda: lambda: jbn.bn_eval(PARAMS, STATE, X),
    "linen, training": lambda: linen(False),
    "linen, inference": lambda: linen(True),
    "nnx, training": lambda: of_nnx(False),
    "nnx, inference": lambda: of_nnx(True),
    "fold into the layer before": lambda: lambda: jbn.fold_into_previous(PARAMS, STATE, KERNEL, STATE.var),
    "fold into the layer behind": lambda: lambda: jbn.fold_into_next(PARAMS, STATE, KERNEL),
    "denormalize": lambda: lambda: jbn.denormalize(PARAMS, STATE, X),
    "fit": lambda: lambda: jbn.scaling.fit("min_max", X),
    "apply": lambda: lambda: jbn.scaling.apply(AFFINE, X),
    "invert": lambda: lambda: jbn.scaling.invert(AFFINE, X),
    "unit length": lambda: lambda: jbn.scaling.unit_length(X),
    "vmap": lambda: lambda: jax.vmap(lambda x: jbn.bn_train(PARAMS, STATE, x))(BATCH),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_is_one_program_compiled_once(name):
    call = CALLS[name]()
    with compiled() as first:
        call()
    with compiled() as again:
        call()
    assert len(first) <= (2 if name == "fit" else 1) and not again, (first, again)  # of a part, and of what parts are


def test_a_gradient_is_one_more_for_each_pass_back():
    def f(x, params):
        return jbn.bn_train(params, STATE, x, epsilon=1e-4)

    def run(dy):
        _, pull, _ = jax.vjp(f, X, PARAMS, has_aux=True)
        return pull(dy)

    with compiled() as first:
        run(X)
    with compiled() as again:
        run(X)
    assert len(first) <= 3 and not again, (first, again)


def test_programs_are_seen():
    """Else nothing above and below could fail."""
    with compiled() as found:
        jax.jit(lambda x: x * 3)(X)
    assert found


def test_numbers_are_not_compiled_into_it():
    def call(number):
        bounds = jbn.Renorm(1 + number, number)
        y, state = jbn.bn_train(PARAMS, STATE, X, momentum=number, epsilon=number, renorm=bounds)
        return jbn.bn_eval(PARAMS, state, y, epsilon=number)

    call(0.5)
    with compiled() as again:
        call(0.25)
    assert not again


def test_under_jit_it_is_inlined():
    """What is one program outside is no call inside, and the state of an ordinary batch is mixed without choices."""
    evaluated = jax.jit(lambda x: jbn.bn_eval(PARAMS, STATE, x)).lower(X).as_text()
    trained = jax.jit(lambda x: jbn.bn_train(PARAMS, STATE, x)).lower(X).as_text()
    for text, pieces in ((evaluated, ["bn_apply"]), (trained, ["bn_moments", "bn_apply"])):
        (main,) = (match[0] for match in hlo.FUNCTION.finditer(text) if match[1] == "main")
        assert re.findall(r"call @(\w+)", main) == pieces
        assert "select" not in main


def programs(module, x):
    """Forward and backward, and inference, of a layer."""
    norms = [module.BatchNorm(use_running_average=average) for average in (False, True)]
    variables = norms[0].init(jax.random.key(0), x)

    def loss(params, x):
        y, updates = norms[0].apply({**variables, "params": params}, x, mutable=["batch_stats"])
        return (y * y).sum(), updates

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(variables["params"], x)
    return gradient, jax.jit(lambda x: norms[1].apply(variables, x)).lower(x)


@pytest.mark.parametrize("shape", [(16, 32), (128, 256)], ids=str)
def test_small_layers_are_plain_code(shape):
    """Of a program that takes some 50 µs every further loop is a part that counts."""
    x = draw(*shape)
    ours, flax = ([hlo.operations(p)["reduce"] for p in programs(module, x)] for module in (jbn.linen, nn))
    assert ours == [4, 0] and ours <= flax  # of two sums forward and two backward, and of inference
