"""Flax's batch norms of linen models computed as ours while a context is entered."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax

from jbn._flax.replace_shared import Replaced, check_options, left
from jbn._op.jax_internals import without_wrappers

_entered = jax.make_user_context(None)  # part of the key of everything that JAX traces and compiles


@contextlib.contextmanager
def replacing(ours: type[nn.BatchNorm], options: dict[str, Any]) -> Iterator[Replaced]:
    """As `jbn.linen.replacing`; `ours` is the class as which layers compute."""
    check_options("replacing", options)
    done = Replaced([], {})
    key = _key(options)
    with _entered(key), nn.intercept_methods(_interceptor(ours, options, key, done)):
        yield done


def _key(options: dict[str, Any]) -> Any:
    """Equal where programs may be shared: for arrays nowhere but in one context."""
    groups = options.get("axis_index_groups")
    if groups is not None:
        options = {**options, "axis_index_groups": tuple(map(tuple, groups))}
    key = (tuple(sorted(options.items())),)  # an object of its own, by which a context knows that it is the innermost
    try:
        hash(key)
    except TypeError:
        return object()
    return key


def _interceptor(ours: type[nn.BatchNorm], options: dict[str, Any], key: Any, done: Replaced) -> Callable:
    compute = without_wrappers(ours.__call__)  # Flax's wrapper runs already

    def intercept(next_fun, args, kwargs, context):
        layer: Any = context.module
        if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__" or _entered.value is not key:
            return next_fun(*args, **kwargs)
        kind, path = type(layer), "/".join(layer.path)
        if kind is not nn.BatchNorm:
            if kind.__module__ != "flax.linen.transforms":  # a lifted class calls a layer of the class that it lifts
                done.left[path] = left(kind, nn.BatchNorm, ours)
            return next_fun(*args, **kwargs)
        if path not in done.replaced:
            done.replaced.append(path)
        if "use_running_average" in options:  # said by the call too, it would be said twice
            args, kwargs = args[:1], {n: v for n, v in kwargs.items() if n != "use_running_average"}
        # The layer is a bound copy, and is ours during its call, so that interceptors inside see what it is; the last
        # of them calls context.orig_method, which is how to be behind them all.
        before = {name: vars(layer)[name] for name in options if name in vars(layer)}
        object.__setattr__(layer, "__class__", ours)
        vars(layer).update(options)
        context.orig_method.__setstate__((compute, (layer,), {}, None))
        try:
            return next_fun(*args, **kwargs)
        finally:
            for name in options:
                del vars(layer)[name]
            vars(layer).update(before)
            object.__setattr__(layer, "__class__", kind)

    return intercept
