"""Layers that make of their stored weights others: folded where that is right, and left with the reason where not."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import meaning
import numpy as np
import pytest
from flax import nnx
from layers import small
from oracle import assert_close

import jbn.linen
import jbn.nnx
from jbn._flax.fold_check import relative_error

C = 4
Norm = functools.partial(jbn.linen.BatchNorm, True)
X = np.random.default_rng(0).normal(0.5, 1, (8, C)).astype(np.float32)


def quantised(a):
    """To multiples of 1/8, with the identity's gradient."""
    return a + jax.lax.stop_gradient(jnp.round(a * 8) / 8 - a)


class Standardised(nn.Dense):
    def param(self, name, *args, **options):
        value = super().param(name, *args, **options)
        return (value - value.mean(0)) / value.std(0) if name == "kernel" else value


class Gained(nn.Dense):
    def param(self, name, *args, **options):
        value = super().param(name, *args, **options)
        return value / jnp.sqrt(3.0) if name == "kernel" else value


class OffsetNorm(jbn.linen.BatchNorm):
    def param(self, name, *args, **options):
        return super().param(name, *args, **options) + (name == "scale")


def promoting(kernel=lambda k: k, bias=lambda b: b, inputs=lambda x: x):
    """A layer's promote_dtype that changes what it is given: three arguments in linen, a tuple of them in nnx."""

    def promote(*arrays, dtype=None, **_):
        x, k, b = arrays[0] if len(arrays) == 1 else arrays
        return inputs(x), kernel(k), None if b is None else bias(b)

    return promote


@jax.custom_jvp
def rounded(a):
    return jnp.round(a)


rounded.defjvp(lambda primals, tangents: (rounded(*primals), *tangents))


def by_integers(x, kernel, numbers, precision=None, **_):
    unit = jnp.abs(kernel).max() / 127
    return unit * jax.lax.dot_general(x, jnp.round(kernel / unit).astype(jnp.int8).astype(x.dtype), numbers)


def by_pieces(x, kernel, *_, **__):
    """A convolution of width 2 as one product."""
    return jnp.concatenate([x[:, :-1], x[:, 1:]], -1) @ kernel.reshape(-1, kernel.shape[-1])


def turned(x, kernel, numbers, precision=None, **_):
    """The product with the kernel's transpose: linear, but its outputs are the kernel's rows."""
    return jax.lax.dot_general(x, kernel, (((1,), (1,)), ((), ())))


Dense = functools.partial(nn.Dense, C)
Quantised = functools.partial(Dense, promote_dtype=promoting(quantised))
CASES = {  # what is computed, and why the batch norm is left; "" where it folds
    "standardised": (lambda x: Norm()(Standardised(C)(x)), "linear in its stored kernel: its kernel goes into"),
    "standardised, behind": (lambda x: Standardised(C)(Norm()(x)), "linear in its stored kernel: its kernel goes into"),
    "quantised": (lambda x: Norm()(Quantised()(x)), "its kernel goes into"),
    "quantised, behind": (lambda x: Quantised()(Norm()(x)), "its kernel goes into"),
    "quantised by a function of its own derivative": (
        lambda x: Norm()(Dense(promote_dtype=promoting(rounded))(x)),
        "its kernel goes into round",
    ),
    "a jitted one": (lambda x: Norm()(Dense(promote_dtype=promoting(jax.jit(quantised)))(x)), "its kernel goes into"),
    "integers": (
        lambda x: Norm()(Dense(promote_dtype=promoting(lambda k: (8 * k).astype(jnp.int8).astype(k.dtype)))(x)),
        "its kernel goes into convert_element_type",
    ),
    "a convolution": (
        lambda x: Norm()(nn.Conv(C, (1,), promote_dtype=promoting(quantised))(x[None])),
        "Conv_0: it is not known to be linear in its stored kernel",
    ),
    "a product of its own": (lambda x: Norm()(Dense(dot_general=by_integers)(x)), "its kernel goes into"),
    "the bias": (lambda x: Norm()(Dense(promote_dtype=promoting(bias=quantised))(x)), "its bias goes into"),
    "a mapped kernel": (
        lambda x: Norm()(nn.map_variables(nn.Dense, "params", lambda v: jax.tree.map(quantised, v), init=True)(C)(x)),
        "the weights of .* are used elsewhere too",
    ),
    "its input": (lambda x: Norm()(Dense(promote_dtype=promoting(inputs=quantised))(x)), ""),
    "its input, behind": (
        lambda x: Dense(promote_dtype=promoting(inputs=quantised))(Norm()(x)),
        "Dense_0: it changes its input before the product",
    ),
    "a gain": (lambda x: Norm()(Gained(C)(x)), ""),
    "a gain, behind": (lambda x: Gained(C)(Norm()(x)), "Gained_0: its kernel is changed before the product"),
    "half precision": (lambda x: Norm()(Dense(promote_dtype=promoting(lambda k: k.astype(jnp.bfloat16)))(x)), ""),
    "no gradient": (lambda x: Norm()(Dense(promote_dtype=promoting(jax.lax.stop_gradient))(x)), ""),
    "a norm": (lambda x: OffsetNorm(True)(Dense()(x)), "its class OffsetNorm has a param of its own"),
    "a norm, behind": (lambda x: Dense()(OffsetNorm(True)(x)), "its class OffsetNorm has a param of its own"),
    "a convolution of its own": (
        lambda x: Norm()(nn.Conv(C, (2,), padding="VALID", conv_general_dilated=by_pieces)(x[None])),
        "",
    ),
    "linear, but not by outputs": (
        lambda x: Norm()(Dense(dot_general=turned)(x)),
        r"folded into Dense_0 it changes the outputs on the example by \S+ of their size, more than rounding",
    ),
}


def noisy(tree):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda a: jnp.asarray(rng.uniform(0.5, 1.5, a.shape), a.dtype), tree)


def drawn(model):
    """Variables of it."""
    return noisy(jax.eval_shape(model.init, jax.random.key(0), X))


def outputs(got, model, variables):
    """Of the folded model, and of the other."""
    run = lambda folded, variables: (got.apply(folded, X), model.apply(variables, X))  # noqa: E731
    return meaning.run(run, got.variables, variables)


def left(got, norm, reason):
    """Whether that norm alone is left, for that reason; with "" whether none is."""
    assert got.left.keys() == ({norm} if reason else set()), got.left
    assert not reason or re.search(reason, got.left[norm]), got.left[norm]


@pytest.mark.parametrize("name", CASES)
def test_linen(name):
    function, reason = CASES[name]
    model = small(function)
    variables = drawn(model)
    got = jbn.linen.fold(model, variables, jax.ShapeDtypeStruct(X.shape, X.dtype))
    left(got, "OffsetNorm_0" if "a norm" in name else "BatchNorm_0", reason)
    half = jnp.finfo(jnp.bfloat16).eps / jnp.finfo(jnp.float32).eps if name == "half precision" else 1
    assert_close(*outputs(got, model, variables), n=C, factor=16 * float(half))


def test_the_others_fold():
    """Of five pairs those two are left that change the outputs, with the error of each."""

    def stack(x):
        for i in range(5):
            x = nn.relu(Norm()(Dense(dot_general=turned if i in (1, 3) else None)(x)))
        return x

    model = small(stack)
    variables = drawn(model)
    got = jbn.linen.fold(model, variables, X)
    assert got.folded == {f"BatchNorm_{i}": f"Dense_{i}" for i in (0, 2, 4)}
    assert got.left.keys() == {"BatchNorm_1", "BatchNorm_3"}
    assert_close(*outputs(got, model, variables), n=100)


def test_while_traced():
    """There is nothing to compare with then: what is known of the program decides."""
    model = small(CASES["standardised"][0])
    variables = drawn(model)
    plain = small(lambda x: Norm()(Dense()(x)))
    others = drawn(plain)

    @jax.jit
    def run(variables, others):
        kept, folded = jbn.linen.fold(model, variables, X), jbn.linen.fold(plain, others, X)
        assert kept.left and not folded.left
        return kept.apply(kept.variables, X), folded.apply(folded.variables, X)

    for y, want in zip(run(variables, others), (model.apply(variables, X), plain.apply(others, X)), strict=True):
        assert_close(y, want, n=C)


class Pair(nnx.Module):
    def __init__(self, norm=jbn.nnx.BatchNorm, behind=False, **options):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(C, C, rngs=rngs, **options)
        self.norm = norm(C, rngs=rngs)
        self.behind = behind

    def __call__(self, x):
        return self.dense(self.norm(x)) if self.behind else self.norm(self.dense(x))


def hooked(change):
    """A kernel's initializer's companion: variables whose values are changed as they are read."""
    return dict(kernel_metadata={"on_get_value": lambda variable, value: change(value)})


NNX = {
    "quantised": (dict(promote_dtype=promoting(quantised)), "its kernel goes into"),
    "quantised, behind": (dict(promote_dtype=promoting(quantised), behind=True), "its kernel goes into"),
    "as it is read": (hooked(quantised), "its kernel goes into"),
    "halved as it is read": (hooked(lambda k: k / 2), "folded into dense it changes the outputs on the example by"),
    "a bias there was not": (  # and is quantised once there is one
        dict(use_bias=False, promote_dtype=promoting(bias=quantised)),
        "folded into dense it changes the outputs on the example by",
    ),
    "its input": (dict(promote_dtype=promoting(inputs=quantised)), ""),
    "a norm": (
        dict(norm=functools.partial(jbn.nnx.BatchNorm, promote_dtype=lambda arrays, **_: arrays)),
        "it has a promote_dtype of its own",
    ),
}


@pytest.mark.parametrize("name", NNX)
def test_nnx(name):
    options, reason = NNX[name]
    model = Pair(**options)
    nnx.update(model, noisy(nnx.state(model)))
    model.eval()
    got = jbn.nnx.fold(model, jax.ShapeDtypeStruct(X.shape, X.dtype))
    left(got, "norm", reason)
    assert_close(got.model(X), model(X), n=C, factor=16)


def test_relative_error():
    a = np.array([3.0, -4.0], np.float32)
    for want, got, error in [
        (a, a, 0),
        (a, a + np.array([0, 0.5], np.float32), 0.1),
        (1e30 * a, 1.1e30 * a, 0.1),
        (0 * a, a, np.inf),
        (0 * a, 0 * a, 0),
        (np.inf * a, np.inf * a, 0),
        (np.array([np.nan, 1]), np.array([np.nan, 2]), 1),
        (np.array([np.nan, 1]), np.array([1, 1]), np.inf),
        (1j * a, a, np.sqrt(2)),
        (a[:0], a[:0], 0),
        ({"y": a, "updates": a}, {"y": a}, 0),
        ((a, np.array([1, 2])), (a, np.array([1, 3])), 0),  # a label may flip where two are as likely
        (np.array([1, 2]), np.array([1, 4]), 2 / np.sqrt(5)),
        ((a, a), (a, 2 * a), 1),
    ]:
        with np.errstate(all="ignore"):
            np.testing.assert_allclose(relative_error(want, got), error, rtol=1e-5)
