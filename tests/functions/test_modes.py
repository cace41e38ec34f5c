"""Every setting of JAX that a user may turn leaves results as they are, on both sides of every size that changes code.

All jobs are one program. Where a setting leaves its text as it is, it is compiled no second time, only run again.
"""

import contextlib
import gc
import re
from functools import partial

import driver
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracle import assert_close

import jbn
import jbn.linen
import jbn.nnx
from jbn._functions.moments import population_state
from jbn._op import xla_cpu

LITTLE, LARGE = (12, 4), (1040, 32)


def draw(shape):
    rng = np.random.default_rng(0)
    channels = shape[-1]
    x, dy, residual = rng.normal(1, 2, (3, *shape)).astype(np.float32)
    scale, bias, mean, var = rng.uniform(0.5, 1.5, (4, channels)).astype(np.float32)
    return dict(
        x=x, dy=dy, residual=residual, mask=rng.random((shape[0], 1)) < 0.8,
        params=jbn.BNParams(scale, bias), state=jbn.BNState(mean, var),
    )  # fmt: skip


def train(d, x, **options):
    return jbn.bn_train(d["params"], d["state"], x, **options)


def gradients(d, **options):
    """y, the new state and the gradients of x, scale, bias, and of the residual if there is one."""

    def f(x, params, residual):
        return jbn.bn_train(params, d["state"], x, residual=residual, **options)

    y, pull, state = jax.vjp(f, d["x"], d["params"], d["residual"] if "activation" in options else None, has_aux=True)
    return y, state, pull(jnp.asarray(d["dy"]))


def scan(d):
    return jax.lax.scan(lambda s, x: jbn.bn_train(d["params"], s, x)[::-1], d["state"], d["x"].reshape(2, -1, 4))


def evaluate(d, act=None):
    y, pull = jax.vjp(lambda p, s, x: jbn.bn_eval(p, s, x, activation=act), d["params"], d["state"], d["x"])
    return y, pull(jnp.asarray(d["dy"]))


def second(d):
    loss = lambda x: (train(d, x)[0] ** 3 * d["dy"]).sum()  # noqa: E731
    return jax.jvp(jax.grad(loss), (d["x"],), (d["dy"],))


def linen(d):
    norm = jbn.linen.BatchNorm(use_running_average=False, activation="silu")
    variables = norm.init(jax.random.key(0), d["x"])

    def f(variables):
        y, new = norm.apply(variables, d["x"], mutable=["batch_stats"])
        return (y * d["dy"]).sum(), (y, new)

    return jax.grad(f, has_aux=True)(variables)


def of_nnx(d):
    norm = jbn.nnx.BatchNorm(d["x"].shape[-1], rngs=nnx.Rngs(0))
    grads = nnx.grad(lambda norm: (norm(d["x"]) * d["dy"]).sum())(norm)
    return nnx.to_pure_dict(grads), nnx.to_pure_dict(nnx.state(norm))


def folded(d):
    kernel = np.arange(20, dtype=np.float32).reshape(5, 4)
    before = jbn.fold_into_previous(d["params"], d["state"], kernel)
    after = jbn.fold_into_next(d["params"], d["state"], kernel.T)
    return before, after, jbn.denormalize(d["params"], d["state"], d["x"]), jbn.identity_params(d["state"])


BOTH = {
    "train, gradients": gradients,
    "residual and activation": lambda d: gradients(d, activation="silu"),
    "evaluate, gradients": evaluate,
    "half": lambda d: train(d, d["x"].astype(jnp.bfloat16))[0].astype(np.float32),
    "moments": lambda d: jbn.moments(d["x"]),
    "mask": lambda d: gradients(d, mask=d["mask"], activation="relu"),
}
ONCE = {
    "jvp": lambda d: jax.jvp(lambda x: train(d, x), (d["x"],), (d["dy"],)),
    "vmap": lambda d: jax.vmap(lambda x: train(d, x))(d["x"].reshape(2, -1, 4)),
    "vmap, shared": lambda d: jax.vmap(lambda x: train(d, x, axis_name="b"), axis_name="b")(d["x"].reshape(2, -1, 4)),
    "second derivative": second,
    "scan": scan,
    "remat": lambda d: jax.grad(jax.checkpoint(lambda x: (train(d, x)[0] * d["dy"]).sum()))(d["x"]),
    "channels first": lambda d: train(d | draw((d["x"].shape[0],)), d["x"], axis=0),
    "nothing seen": lambda d: train(d, d["x"], mask=d["mask"] & False),
    "virtual": lambda d: gradients(d, virtual_batch_size=4),
    "virtual, mask": lambda d: train(d, d["x"], virtual_batch_size=2, mask=d["mask"] & (np.arange(12) > 1)[:, None]),
    "renorm": lambda d: jbn.bn_train(d["params"], d["state"], d["x"], renorm=jbn.Renorm(2, 1)),
    "traced numbers": lambda d: jax.jit(lambda m: train(d, d["x"], momentum=m, epsilon=m))(np.float32(0.25)),
    "merge": lambda d: population_state(jbn.merge(jbn.moments(d["x"][:5]), jbn.moments(d["x"][5:]))),
    "fold": folded,
    "linen": linen,
    "nnx": of_nnx,
}


LARGE_JOBS = {f"{name}, large": f for name, f in BOTH.items()}


def program(little, large):
    jobs = {name: f(little) for name, f in (BOTH | ONCE).items()}
    return jobs | {name: f(large) for name, f in LARGE_JOBS.items()}


def by_hand(d):
    """What goes through data in Python."""
    batches = [d["x"][:5], d["x"][5:]]
    affine = jbn.scaling.fit("standardize", iter(batches))
    there = jbn.scaling.apply(affine, d["x"])
    model = jbn.linen.BatchNorm(use_running_average=False)
    variables = jbn.linen.recalibrate(model, model.init(jax.random.key(0), d["x"]), batches)
    norm = jbn.nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    jbn.nnx.recalibrate(norm, batches)
    return (
        *(affine, there, jbn.scaling.invert(affine, there), jbn.scaling.fit("min_max", d["x"])),
        *(jbn.scaling.unit_length(d["x"]), variables, nnx.to_pure_dict(nnx.state(norm))),
    )


def models(d):
    """What runs layers besides ours, whose products are the user's."""
    of_linen = nn.Sequential([nn.Dense(4), jbn.linen.BatchNorm(use_running_average=True)])
    folded = jbn.linen.fold(of_linen, of_linen.init(jax.random.key(0), d["x"]), d["x"])
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), jbn.nnx.BatchNorm(4, use_running_average=True, rngs=rngs))
    return folded.variables, nnx.to_pure_dict(nnx.state(jbn.nnx.fold(model, d["x"]).model))


SETTINGS = {
    "no jit": [jax.disable_jit],
    "64 bits": [lambda: jax.enable_x64(True)],
    "strict": [  # each raises what it dislikes, so that none hides another's
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.numpy_rank_promotion("raise"),
        lambda: jax.default_matmul_precision("BF16_BF16_F32"),
        lambda: jax.debug_nans(True),
        lambda: jax.debug_infs(True),
        lambda: jax.enable_checks(True),
        lambda: jax.transfer_guard("log"),
        jax.checking_leaks,
    ],
}


@contextlib.contextmanager
def setting(name):
    gc.collect()
    gc.freeze()  # each of hundreds of looks for leaks walks all objects but these: in a whole run, millions
    try:
        with contextlib.ExitStack() as stack:
            for context in SETTINGS[name]:
                stack.enter_context(context())
            yield
    finally:
        gc.unfreeze()


@pytest.fixture(scope="module")
def data():
    assert LITTLE[0] * LITTLE[1] <= xla_cpu.LITTLE < LARGE[0] * LARGE[1]
    return draw(LITTLE), draw(LARGE)


@pytest.fixture(scope="module")
def plain(data):
    """(text, executable, results) without any setting."""
    lowered = jax.jit(program).lower(*data)
    compiled = lowered.compile()
    return lowered.as_text(), compiled, jax.device_get(compiled(*data))


@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "no jit"])
def test_compiled(name, data, plain):
    text, compiled, wanted = plain
    with setting(name):
        lowered = jax.jit(program).lower(*data)
        run = compiled if lowered.as_text() == text else lowered.compile()
        check(run(*data), wanted)


def test_no_matrix_product(plain):
    """Its precision is the user's, by a name of jax's or any preset, and what cannot be compiled ends the process."""
    assert not re.search("dot|convolution", plain[0])


def test_call_by_call(data, plain):
    """Without jit every operation is a program, whose results are looked at here."""
    little, large = data
    with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
        for name, f in (BOTH | ONCE).items():
            if name not in ("second derivative", "virtual, mask"):  # a hundred programs each
                check(f(little), plain[2][name])
        name = "train, gradients, large"  # the pieces' own programs are as with jit
        check(LARGE_JOBS[name](large), plain[2][name])


def test_an_empty_virtual_batch_call_by_call(data):
    """The statistics of all are pooled by operations of JAX's own, none of whose results is infinite."""
    x, seen = data[0]["x"], np.arange(12) > 1
    statistics = lambda: train(data[0], x, virtual_batch_size=2, mask=seen[:, None], momentum=0)[1]  # noqa: E731
    with jax.disable_jit(), jax.debug_nans(True), jax.debug_infs(True):
        check(statistics(), jbn.BNState(x[seen].mean(0), x[seen].var(0)))


def test_kernels(data):
    """By the CPU that passes for a GPU, where there is none."""

    def jobs(d):
        evaluated = jbn.bn_eval(d["params"], d["state"], d["x"], implementation="triton")
        return evaluated, gradients(d, mask=d["mask"], activation="silu", implementation="triton")

    with driver.gpu():
        lowered = jax.jit(jobs).lower(data[0])
        compiled = lowered.compile()
        wanted = jax.device_get(compiled(data[0]))
        check(wanted[1], jax.device_get(jax.jit(partial(gradients, activation="silu"))(data[0], mask=data[0]["mask"])))
        for name in SETTINGS:
            with setting(name):
                if name == "no jit":
                    found = jobs(data[0])
                else:
                    again = jax.jit(jobs).lower(data[0])
                    found = (compiled if again.as_text() == lowered.as_text() else again.compile())(data[0])
                check(found, wanted)


@pytest.fixture(scope="module")
def plain_by_hand(data):
    return jax.device_get([f(data[0]) for f in (by_hand, models)])


@pytest.mark.parametrize("name", SETTINGS)
def test_by_hand(name, data, plain_by_hand):
    with setting(name):
        check([f(data[0]) for f in (by_hand, models)], plain_by_hand)


def check(got, wanted):
    got, wanted = jax.tree.leaves_with_path(got), jax.tree.leaves(wanted)
    for (path, value), want in zip(got, wanted, strict=True):
        try:
            assert_close(value, want, np.asarray(want).dtype, n=LARGE[0], factor=10)
        except AssertionError as error:
            raise AssertionError(jax.tree_util.keystr(path)) from error
