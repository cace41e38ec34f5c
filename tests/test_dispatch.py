"""Which implementation a call compiles to: kernels for CUDA when asked for, plain XLA otherwise."""

import re

import jax
import jax.numpy as jnp
import pytest

import jbn

X = jnp.ones((8, 7, 7, 64), jnp.bfloat16)
PARAMS, STATE = jbn.bn_init(64)


def kernels(f, *args, platform="cuda"):
    """Calls of Triton kernels in `f` lowered for a platform."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    return len(re.findall(r"custom_call @triton_kernel_call", text))


def train(implementation, **options):
    def step(params, x, dy):
        def f(params, x):
            return jbn.bn_train(params, STATE, x, implementation=implementation, **options)

        y, vjp, state = jax.vjp(f, params, x, has_aux=True)
        return y, state, vjp(dy)

    return step


@pytest.fixture
def on_cuda():
    try:
        import jax_triton  # noqa: F401
    except Exception as error:
        pytest.skip(f"jax-triton cannot be imported here: {error}")


OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "residual": {"residual": X, "activation": "silu"},
    "mask": {"mask": jnp.ones((8, 7, 7, 1), bool)},
    "virtual": {"virtual_batch_size": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_two_launches_forward_and_two_backward(on_cuda, name):
    assert kernels(train("triton", **OPTIONS[name]), PARAMS, X, X) == 4


def test_vmap_is_an_axis_of_the_same_kernels(on_cuda):
    assert kernels(jax.vmap(train("triton"), (None, 0, 0)), PARAMS, X[None].repeat(3, 0), X[None].repeat(3, 0)) == 4


def test_inference_is_one_launch(on_cuda):
    assert kernels(lambda x: jbn.bn_eval(PARAMS, STATE, x, implementation="triton"), X) == 1


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_default_is_xla(implementation):
    assert kernels(train(implementation), PARAMS, X, X) == 0


def test_float64_has_no_kernel(on_cuda):
    with jax.enable_x64(True):
        x = X.astype(jnp.float64)
        with pytest.raises(NotImplementedError, match="dtype float64 is not among the kernels'"):
            kernels(train("triton"), PARAMS, x, x)


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_raise(platform):
    with pytest.raises(NotImplementedError, match=rf"needs a CUDA GPU, and this is compiled for {platform}: use"):
        kernels(train("triton"), PARAMS, X, X, platform=platform)
