"""Bad input raises while tracing; the message names the argument, what came, and what to do."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jbn

pytestmark = pytest.mark.usefixtures("strict")

X = np.ones((6, 4, 3), np.float32)
PARAMS, STATE = jbn.BNParams(np.ones(3, "f4"), np.zeros(3, "f4")), jbn.BNState(np.zeros(3, "f4"), np.ones(3, "f4"))

BOTH = [  # keyword arguments, then what the message must hold: the argument, what came, the remedy
    (dict(axis=3), "axis", "3", r"-3 to 2|\[-3, 2\]|-3\.\.2"),
    (dict(axis=-4), "axis", "-4", r"-3 to 2|\[-3, 2\]|-3\.\.2"),
    (dict(axis=(1, 2)), "axis", r"\(1, 2\)", "reshape"),
    (dict(axis=1.5), "axis", r"1\.5", "integer"),
    (dict(axis=1), r"scale|params", r"\(3,\)", r"\(4,\)"),
    (dict(params=PARAMS._replace(scale=np.ones(5, "f4"))), "scale", r"\(5,\)", r"\(3,\)"),
    (dict(params=PARAMS._replace(bias=np.ones((3, 1), "f4"))), "bias", r"\(3, 1\)", r"\(3,\)"),
    (dict(params=PARAMS._replace(bias=np.ones((), "f4"))), "bias", r"\(\)", r"\(3,\)"),
    (dict(params=PARAMS._replace(scale=np.ones(3, "i4"))), "scale", "int32", "float|cast"),
    (dict(state=STATE._replace(mean=np.ones(2, "f4"))), "mean", r"\(2,\)", r"\(3,\)"),
    (dict(state=STATE._replace(var=np.ones((1, 3), "f4"))), "var", r"\(1, 3\)", r"\(3,\)"),
    (dict(state=STATE._replace(var=None)), "var", "None", "float|array"),
    (dict(params=STATE, state=PARAMS), "params", "BNState", "first|order|BNParams"),
    (dict(state=PARAMS), "state", "BNParams", "BNState"),
    (dict(params=None), "params", "None", "BNParams"),
    (dict(params={"scale": PARAMS.scale}), "params", "dict", "BNParams"),
    (dict(x=X.astype("i4")), "x", "int32", "astype|cast"),
    (dict(x=X > 0), "x", "bool", "astype|cast"),
    (dict(x=X.astype("c8")), "x", "complex64", "real|Flax"),
    (dict(x=np.float32(1)), "x", r"scalar|\(\)|rank 0", "axes|reshape|None"),
    (dict(residual=X[:, :1]), "residual", r"\(6, 1, 3\)", r"\(6, 4, 3\)"),
    (dict(residual=X[0]), "residual", r"\(4, 3\)", r"\(6, 4, 3\)"),
    (dict(residual=X.astype("i4")), "residual", "int32", "float|cast"),
    (dict(activation="swish"), "activation", "'swish'", "as a function"),
    (dict(negative_slope=0.2), "negative_slope", r"0\.2", "leave it out"),
    (dict(implementation="cuda"), "implementation", "'cuda'", "'xla'"),
    (dict(epsilon=-1e-3), "epsilon", r"-0\.001", ">= 0|non-?negative|positive"),
    (dict(epsilon=float("nan")), "epsilon", "nan", ">= 0|non-?negative|positive"),
    (dict(epsilon=np.ones(3, "f4")), "epsilon", r"\(3,\)", "scalar"),
    (dict(dtype=jnp.int32), "dtype", "int32", "float|cast"),
    (dict(dtype=jnp.complex64), "dtype", "complex64", "float|cast"),
    (dict(axis=True), "axis", "True", "integer"),
    (dict(x=None), "x", "NoneType", "array"),
    (dict(x="abc"), "x", "str", "array"),
    (dict(x=[[1.0], [1.0, 2.0]]), "x", "list", "of one length"),
    (dict(params=PARAMS._replace(scale=[[1.0], []])), r"params\.scale", "list", "of one length"),
    (dict(residual="abc"), "residual", "str", "array"),
    (dict(x=np.array([[None]])), "x", "ndarray", "array"),
    (dict(x=jax.ShapeDtypeStruct((6, 4, 3), "f4")), "x", "ShapeDtypeStruct", "array"),
    (dict(residual=jax.ShapeDtypeStruct((6, 4, 3), "f4")), "residual", "ShapeDtypeStruct", "array"),
    (dict(state=STATE._replace(var=jax.ShapeDtypeStruct((3,), "f4"))), r"state\.var", "ShapeDtypeStruct", "array"),
]

TRAIN = [
    (dict(momentum=-0.1), "momentum", r"-0\.1", r"\[0, 1\]|between 0 and 1"),
    (dict(momentum=1.5), "momentum", r"1\.5", r"\[0, 1\]|between 0 and 1"),
    (dict(momentum=float("nan")), "momentum", "nan", r"\[0, 1\]|between 0 and 1"),
    (dict(momentum=np.float32(2)), "momentum", "2", r"\[0, 1\]|between 0 and 1"),
    (dict(momentum=jnp.float32(-1)), "momentum", "-1", r"\[0, 1\]|between 0 and 1"),
    (dict(momentum=np.ones(3, "f4")), "momentum", r"\(3,\)", "scalar"),
    (dict(mask=np.ones((6, 4), bool)), "mask", r"\(6, 4\)", r"rank 3|\(6, 4, 3\)"),
    (dict(mask=np.ones((6, 1, 1, 1), bool)), "mask", r"\(6, 1, 1, 1\)", r"rank 3|\(6, 4, 3\)"),
    (dict(mask=np.ones((6, 2, 1), bool)), "mask", r"\(6, 2, 1\)", r"\(6, 4, 3\)"),
    (dict(mask=np.ones((6, 1, 1), "f4")), "mask", "float32", "bool"),
    (dict(mask=np.ones((6, 1, 1), "i4")), "mask", "int32", "bool"),
    (dict(virtual_batch_size=4), "virtual_batch_size", "4", "6"),
    (dict(virtual_batch_size=0), "virtual_batch_size", "0", "6|positive"),
    (dict(virtual_batch_size=-2), "virtual_batch_size", "-2", "6|positive"),
    (dict(virtual_batch_size=12), "virtual_batch_size", "12", "6"),
    (dict(virtual_batch_size=2.0), "virtual_batch_size", r"2\.0", "integer"),
    (dict(x=X[0, 0], virtual_batch_size=1), "virtual_batch_size", "1", r"\(3,\)"),
    (dict(axis_name="nope"), "axis_name", "'nope'", "shard_map|pmap|vmap"),
    (dict(axis_name=("nope", "neither")), "axis_name", "'nope'", "shard_map|pmap|vmap"),
    (dict(axis_index_groups=[[0, 1]]), "axis_index_groups", "None", "axis_name"),
    (dict(unbiased="no"), "unbiased", "'no'", "True or False"),
    (dict(axis_name=3), "axis_name", "3", "'data'"),
    (dict(virtual_batch_size=True), "virtual_batch_size", "True", "integer"),
    (dict(mask="abc"), "mask", "str", "array"),
]


def name_of(value):
    if isinstance(value, dict):
        return ",".join(f"{k}={np.shape(v) if hasattr(v, 'shape') else v}"[:40] for k, v in value.items())
    return ""


def raises(call, *patterns):
    """ValueError or TypeError, whose message matches every pattern, the first of them as a word."""
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    message = str(caught.value)
    name, *rest = patterns
    for pattern in (rf"\b({name})\b", *rest):
        assert re.search(pattern, message), f"nothing like {pattern!r} in: {message}"
    assert len(message) < 500, "a message is a sentence or two"


def arguments(bad):
    args = dict(params=PARAMS, state=STATE, x=X) | bad
    return (args.pop(k) for k in ("params", "state", "x")), args


class Foreign:
    """An array of another library, with a dtype of its own."""

    dtype, shape, ndim = "torch.float32", X.shape, X.ndim

    def __array__(self, dtype=None, copy=None):
        return X


def test_arrays_of_other_libraries_are_arrays():
    got, want = (jbn.bn_train(PARAMS, STATE, x) for x in (Foreign(), X))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("bad, name, came, remedy", BOTH + TRAIN, ids=name_of)
def test_train(bad, name, came, remedy):
    (params, state, x), options = arguments(bad)
    raises(lambda: jbn.bn_train(params, state, x, **options), name, came, remedy)


@pytest.mark.parametrize("bad, name, came, remedy", BOTH, ids=name_of)
def test_eval(bad, name, came, remedy):
    (params, state, x), options = arguments(bad)
    raises(lambda: jbn.bn_eval(params, state, x, **options), name, came, remedy)


def test_lists_are_arrays():
    """Wherever x is one."""
    lists = jax.tree.map(lambda v: v.tolist(), (PARAMS, STATE, X), is_leaf=lambda v: isinstance(v, np.ndarray))
    y, state = jbn.bn_train(*lists, residual=X.tolist())
    want = jbn.bn_train(PARAMS, STATE, X, residual=X)
    jax.tree.map(np.testing.assert_array_equal, (y, state), want)


@pytest.mark.parametrize("bad, name, came, remedy", BOTH[4:9] + TRAIN[6:12], ids=name_of)
def test_while_tracing(bad, name, came, remedy):
    """Under jit, before anything runs."""
    args = dict(params=PARAMS, state=STATE, x=X) | bad
    static = {k: args.pop(k) for k in ("axis", "virtual_batch_size") if k in args}
    raises(lambda: jax.eval_shape(lambda kw: jbn.bn_train(**kw, **static), args), name, came, remedy)


@pytest.mark.parametrize(
    "options, name, came, remedy",
    [
        (dict(axis=7), "axis", "7", "-3 to 2"),
        (dict(mask=np.ones((6, 4), bool)), "mask", r"\(6, 4\)", r"rank 3|\(6, 4, 3\)"),
        (dict(mask=np.ones((6, 1, 1), "f4")), "mask", "float32", "bool"),
        (dict(axis_name="nope"), "axis_name", "'nope'", "shard_map|pmap|vmap"),
        (dict(x=X.astype("i4")), "x", "int32", "astype|cast"),
    ],
    ids=name_of,
)
def test_moments(options, name, came, remedy):
    raises(
        lambda: jbn.moments(options.get("x", X), **{k: v for k, v in options.items() if k != "x"}), name, came, remedy
    )


@pytest.mark.parametrize(
    "args, options, name, came, remedy",
    [
        ((0,), {}, "num_features", "0", "positive"),
        ((-3,), {}, "num_features", "-3", "positive"),
        ((2.5,), {}, "num_features", r"2\.5", "integer"),
        (((3, 4),), {}, "num_features", r"\(3, 4\)", "integer"),
        ((3,), dict(dtype=jnp.int32), "dtype", "int32", "float"),
    ],
)
def test_init(args, options, name, came, remedy):
    raises(lambda: jbn.bn_init(*args, **options), name, came, remedy)


@pytest.mark.parametrize("groups", [[[0, 1], [2]], [[0, 1]], [[0, 1], [1, 2]], [[0, 1], [2, 9]]])
def test_axis_index_groups(groups):
    """Each index of the axis once, in groups of one size."""
    f = jax.vmap(lambda x: jbn.bn_train(PARAMS, STATE, x, axis_name="i", axis_index_groups=groups)[0], axis_name="i")
    raises(lambda: f(np.ones((4, 5, 3), "f4")), "axis_index_groups", re.escape(str(groups)), "once|each|every")


@pytest.mark.parametrize(
    "groups, came",
    [
        (4, "4"),
        ([0, 1, 2, 3], r"\[0, 1, 2, 3\]"),
        ([[0, 1], [2, 3.0]], r"3\.0"),
        ([[0, 1], None], "None"),
        ("01", "'01'"),
    ],
    ids=str,
)
def test_axis_index_groups_that_are_not_lists_of_integers(groups, came):
    f = jax.vmap(lambda x: jbn.bn_train(PARAMS, STATE, x, axis_name="i", axis_index_groups=groups)[0], axis_name="i")
    raises(lambda: f(np.ones((4, 5, 3), "f4")), "axis_index_groups", came, "integers", r"\[\[0, 1\], \[2, 3\]\]")


@pytest.mark.parametrize("function", [lambda **o: jbn.bn_train(PARAMS, STATE, **o)[0], jbn.moments])
@pytest.mark.parametrize(
    "names, came, remedy",
    [
        (("i", "i"), r"\('i', 'i'\)", "once"),
        (["i", "j", "i"], r"\['i', 'j', 'i'\]", "once"),
        ({"i"}, r"\{'i'\}", "sequence"),
        ([["i"]], r"\[\['i'\]\]", "sequence"),
    ],
    ids=str,
)
def test_names(function, names, came, remedy):
    f = jax.vmap(jax.vmap(lambda x: function(x=x, axis_name=names), axis_name="i"), axis_name="j")
    raises(lambda: f(np.ones((2, 4, 5, 3), "f4")), "axis_name", came, remedy)


def test_triton_says_what_works_instead():
    if jax.default_backend() == "gpu":
        pytest.skip("for hosts without a GPU")
    for call in (jbn.bn_train, jbn.bn_eval):
        with pytest.raises(Exception, match="triton") as caught:
            call(PARAMS, STATE, X, implementation="triton")
        assert re.search(r"'xla'", str(caught.value))
        assert re.search(r"pip install 'jax\[cuda12\]' triton 'jax-triton", str(caught.value)), "how to install it"
