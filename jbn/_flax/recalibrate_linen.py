"""Recalibration of a `flax.linen` model: its batch norms are watched from outside, by a method interceptor."""

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
from flax.core import DenyList, copy, unfreeze

from jbn._flax import recalibrate_shared
from jbn._flax.check_model import check_model
from jbn._flax.nested import STATS, Path, at, put
from jbn._functions.batch_norm import BNState
from jbn._functions.moments import merge

POOL = "population"  # a variable that lives beside mean and var while a batch runs


def recalibrate(
    model: nn.Module,
    variables: Any,
    batches: Iterable,
    *,
    num_batches: int | None = None,
    rngs: Any = None,
    progress: bool = False,
    **call: Any,
) -> Any:
    """The variables with every batch norm's running statistics replaced by exact ones over all batches.

    Runs `model.apply(variables, *batch, **call)` in training mode and pools what each batch norm was given by count:
    mean = Σx / n and var = Σ(x − mean)² / n (for `unbiased` layers / max(n − 1, 1)), over all batches and all calls
    of the layer, where its mask is True.

    Every batch is run with the `variables` given, so their order does not matter. A layer whose input passes no
    earlier batch norm gets the same statistics however the data are split into batches. A later one gets those of
    its input in training mode, where each batch was normalised with its own statistics: they depend on the batches,
    as training did; use its batch size.

    Args:
      model: any module; batch norms are `jbn.linen.BatchNorm` and Flax's, shared ones and those inside `nn.scan`,
        `nn.vmap`, `nn.remat` or `nn.jit` too. Those that run on running averages keep theirs. One with an `axis_name`
        needs it bound inside the model; otherwise build the model without (the variables are the same): batches that
        are sharded over devices have global statistics.
      variables: as `model.init` returned them. They are not changed.
      batches: an iterable of batches, gone through once. A tuple is unpacked into positional arguments (e.g. `(x,
        mask)`), anything else is the one argument; all leaves are arrays.
      num_batches: how many batches to take; None: all of them, `len(batches)` where it is known.
      rngs: a key, or a dict of keys by name (e.g. of dropout), as for `apply`; each batch has keys of its own.
      progress: show a bar (needs rich).
      **call: arguments of every call, such as `train=True`, and those of `apply`, such as `method`.

    Returns:
      A copy of `variables` with new `batch_stats`; a channel of which nothing was seen keeps its statistics.

    Raises:
      TypeError: `model` is no linen module.
      ValueError: no batch at all, fewer than expected, or no batch norm in training mode; named with the remedy.

    Source: Ioffe, Szegedy (2015), Batch Normalization, algorithm 2 (https://arxiv.org/abs/1502.03167); pooled by
    count rather than averaged over batches, as Wu, Johnson (2021), Rethinking "Batch" in BatchNorm, section 3
    (https://arxiv.org/abs/2105.07576).
    """
    check_model(model, nn.Module, "a flax.linen module", "call jbn.nnx.recalibrate(model, batches)")
    stats = unfreeze(variables).get(STATS, {})
    unbiased: dict[Path, bool] = {}

    def run(variables, rngs, args, on_call):
        with nn.intercept_methods(_interceptor(on_call)):
            return model.apply(variables, *args, rngs=rngs, mutable=DenyList("params"), **call)

    @jax.jit
    def step(variables, rngs, args):
        def note(layer, *_):
            unbiased[layer.path] = getattr(layer, "unbiased", False)

        jax.eval_shape(lambda variables, rngs, args: run(variables, rngs, args, note), variables, rngs, args)
        if not unbiased:
            raise recalibrate_shared.nothing_trained()
        seeded = unfreeze(variables)[STATS]
        for path in unbiased:
            own = at(seeded, path)
            seeded = put(seeded, path, {**own, POOL: recalibrate_shared.empty_like(own["mean"])})
        _, updates = run(copy(variables, {STATS: seeded}), rngs, args, _collect)
        return {path: at(updates[STATS], path)[POOL] for path in unbiased}

    apply_options = inspect.signature(nn.Module.apply).parameters
    method = call.get("method") or "__call__"
    method = getattr(type(model), method) if isinstance(method, str) else method

    def numbered(args, number):
        own = {name: value for name, value in call.items() if name not in apply_options}
        recalibrate_shared.check_arguments(functools.partial(method, model), method.__name__, args, own)
        return step(variables, jax.tree.map(lambda key: jax.random.fold_in(key, number), rngs), args)

    for path, seen in recalibrate_shared.pool(numbered, batches, num_batches, progress).items():
        own = at(stats, path)
        state = recalibrate_shared.new_state(BNState(own["mean"], own["var"]), seen, unbiased[path])
        stats = put(stats, path, {**own, **state._asdict()})
    return copy(variables, {STATS: stats})


def _interceptor(on_call: Callable[..., None]) -> Callable:
    """Calls `on_call(layer, x, mask, before)` after each call of a batch norm in training mode."""
    calls: Counter[Path] = Counter()

    def intercept(next_fun, args, kwargs, context):
        layer = context.module
        if not isinstance(layer, nn.BatchNorm) or context.method_name != "__call__":
            return next_fun(*args, **kwargs)
        if not layer.has_variable(STATS, "mean"):
            raise ValueError(f"variables has no {STATS} of {'/'.join(layer.path)}: give all that model.init returned")
        before, earlier = [layer.get_variable(STATS, name) for name in ("mean", "var")], calls[layer.path]
        y = next_fun(*args, **kwargs)
        if calls[layer.path] == earlier:  # else a subclass called the layer's own method, which was counted
            x, mask, average = _arguments(*args, **kwargs)
            if not nn.merge_param("use_running_average", layer.use_running_average, average):
                calls[layer.path] += 1
                on_call(layer, x, mask, before)
        return y

    return intercept


def _arguments(x, use_running_average=None, *, mask=None, **_):
    return x, mask, use_running_average


def _collect(layer: nn.Module, x: Any, mask: Any, before: list) -> None:
    """Adds what the layer saw to its pool, and puts its running statistics back."""
    seen = recalibrate_shared.layer_moments(layer, x, mask, "/".join(layer.path))
    pool = layer.get_variable(STATS, POOL)
    pool = jax.tree.map(lambda new, old: new.astype(old.dtype), merge(pool, seen), pool)  # a scan's carry keeps types
    for name, value in zip(("mean", "var", POOL), (*before, pool), strict=True):
        layer.put_variable(STATS, name, value)
