"""Recalibration of a `flax.nnx` model: a copy of it runs whose batch norms also collect moments."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jbn._flax import recalibrate_shared
from jbn._flax.check_model import check_model
from jbn._functions.batch_norm import BNState
from jbn._functions.moments import Moments, merge

PARTS = tuple(f"population_{field}" for field in Moments._fields)


def recalibrate(
    model: nnx.Module,
    batches: Iterable,
    *,
    num_batches: int | None = None,
    progress: bool = False,
    method: str = "__call__",
    **call: Any,
) -> None:
    """Replaces every batch norm's running statistics, in place, by exact ones over all batches.

    Runs `model(*batch, **call)` in training mode and pools what each batch norm was given by count: mean = Σx / n and
    var = Σ(x − mean)² / n (for `unbiased` layers / max(n − 1, 1)), over all batches and all calls of the layer, where
    its mask is True.

    Every batch is run with the running statistics that the model has before, so the batches' order does not matter. A
    layer whose input passes no earlier batch norm gets the same statistics however the data are split into batches.
    A later one gets those of its input in training mode, where each batch was normalised with its own statistics:
    they depend on the batches, as training did; use its batch size.

    Args:
      model: any module, in training mode (`model.train()`). Batch norms are `jbn.nnx.BatchNorm` and Flax's, shared
        ones and those inside `nnx.scan`, `nnx.vmap`, `nnx.remat` or `nnx.jit` too. Those that run on running averages
        keep theirs. One with an `axis_name` needs it bound inside the model; otherwise build the model without (its
        state is the same): batches that are sharded over devices have global statistics.
      batches: an iterable of batches, gone through once. A tuple is unpacked into positional arguments (e.g. `(x,
        mask)`), anything else is the one argument; all leaves are arrays.
      num_batches: how many batches to take; None: all of them, `len(batches)` where it is known.
      progress: show a bar (needs rich).
      method: name of the method to call.
      **call: arguments of every call.

    Nothing else of the model changes: parameters, other variables and random streams stay (each batch draws on). A
    channel of which nothing was seen keeps its statistics, and after an error so do all.

    Raises:
      TypeError: `model` is no nnx module.
      ValueError: no batch at all, fewer than expected, or no batch norm in training mode; named with the remedy.

    Source: Ioffe, Szegedy (2015), Batch Normalization, algorithm 2 (https://arxiv.org/abs/1502.03167); pooled by
    count rather than averaged over batches, as Wu, Johnson (2021), Rethinking "Batch" in BatchNorm, section 3
    (https://arxiv.org/abs/2105.07576).
    """
    check_model(model, nnx.Module, "an nnx.Module", "call jbn.linen.recalibrate(model, variables, batches)")
    graphdef, streams, rest = nnx.split(model, nnx.RngState, ...)
    trained = _Trained()

    @jax.jit
    def step(streams, rest, args):
        twin = nnx.merge(graphdef, streams, rest)
        layers = _batch_norms(twin)
        for path, layer in layers.items():
            _observe(layer, ".".join(map(str, path)), trained)
        getattr(twin, method)(*args, **call)
        if not trained.any:
            raise recalibrate_shared.nothing_trained()
        return nnx.state(twin, nnx.RngState), [_pooled(layer) for layer in layers.values()]

    def advancing(args, _):
        nonlocal streams
        recalibrate_shared.check_arguments(getattr(model, method), method, args, call)
        streams, pools = step(streams, rest, args)
        return pools

    pools = recalibrate_shared.pool(advancing, batches, num_batches, progress)
    for layer, seen in zip(_batch_norms(model).values(), pools, strict=True):
        state = BNState(layer.mean[...], layer.var[...])
        layer.mean[...], layer.var[...] = recalibrate_shared.new_state(state, seen, getattr(layer, "unbiased", False))


class _Trained:
    """Whether any layer ran in training mode; equal to itself alone, so that graph definitions may hold it."""

    any = False


def _batch_norms(model: nnx.Module) -> dict[tuple, nnx.BatchNorm]:
    """By path, each once, in the graph's order, which copies share."""
    return {path: node for path, node in nnx.iter_graph(model) if isinstance(node, nnx.BatchNorm)}


def _observe(layer: Any, name: str, trained: _Trained) -> None:
    """Turns a layer, of a copy of our own, into one that collects moments as well."""
    for part, zeros in zip(PARTS, recalibrate_shared.empty_like(layer.mean[...]), strict=True):
        setattr(layer, part, nnx.BatchStat(zeros))
    layer.population_name, layer.population_trained = name, trained
    object.__setattr__(layer, "__class__", _observed(type(layer)))


def _pooled(layer: Any) -> Moments:
    return Moments(*(getattr(layer, part)[...] for part in PARTS))


@functools.cache
def _observed(kind: type) -> type:
    """`kind` with an observer right before the library's own `__call__`, behind those of the user's subclasses."""
    library: Any = next(c for c in kind.__mro__ if c is nnx.BatchNorm or c.__module__ == "jbn.nnx")

    class Observed(library):
        def __call__(self, x, use_running_average=None, **options):
            if self.use_running_average if use_running_average is None else use_running_average:
                return super().__call__(x, use_running_average, **options)
            self.population_trained.any = True
            seen = merge(
                _pooled(self), recalibrate_shared.layer_moments(self, x, options.get("mask"), self.population_name)
            )
            before = self.mean[...], self.var[...]
            y = super().__call__(x, use_running_average, **options)
            for part, value in zip(PARTS, seen, strict=True):
                variable = getattr(self, part)
                variable[...] = jnp.asarray(value, variable[...].dtype)  # a scan's carry keeps its types
            self.mean[...], self.var[...] = before
            return y

    return Observed if library is kind else type(kind)(kind.__name__, (kind, Observed), {})
