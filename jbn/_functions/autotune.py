"""Batch norms measured where they run, so that `implementation=None` may choose kernels."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jbn._functions import autotune_measure
from jbn._functions.autotune_table import Tuning, described, verdict
from jbn._op import dispatch, tables
from jbn._op.gpu import GPUS, INSTALL, default_platform, gpu
from jbn._op.tables import Norm, Row

THREADS = 16
PACKAGES = ("jax", "triton", "jax-triton")


def autotune(
    f: Callable, *args: Any, path: str | os.PathLike | None = None, ignore_cache: bool = False, progress: bool = True
) -> Tuning:
    """Measures the batch norms of `f(*args)` on this host's GPU, and lets `implementation=None` go by what it found.

    `f` is lowered, and compiled too where an automatic mesh splits arrays, but not run. Each distinct batch norm in it
    that None decides on (shape, dtype, axis, activation, residual, mask, virtual batches, in training or not, as one
    device has it) is then run by kernels and by XLA, on numbers made for it: their results must agree up to rounding,
    and both are timed, forward and, where f takes gradients, backward. From then on None takes, for exactly such a
    batch norm, the kernels in each pass that they did in less than 0.98 of XLA's time; one that failed or disagreed
    never. The package's own measurements, where it has them for a batch norm, come first.

    What was found is kept, for this process and later ones, in a JSON file for each kind of device; what is there
    already, but for failures, is not measured again. `jax.clear_caches()` at the end makes every function compile anew,
    by the new rows; only what `lower().compile()` gave stays as it is. The device should have nothing else to do.

    With several processes (`jax.distributed`) all call it, with the same program. The first measures and writes, and
    hands all rows in its file to the others: rows of a file count there only so, since processes that compile one
    program have to choose alike.

    Args:
      f: a function, jitted or not, that calls batch norms: a training step, or one call.
      args: its arguments, as `jax.jit` takes them; `jax.ShapeDtypeStruct` will do for arrays.
      path: the folder of the files, made if need be; None for `jbn` in the user's cache folder, `$XDG_CACHE_HOME` or
        `~/.cache`. Another folder counts in this process, and in a later one once it calls `autotune` with it.
      ignore_cache: whether to measure what is in the file already too.
      progress: whether to say on stderr what is done.

    Returns:
      `Tuning`: print it. Its rows have medians in microseconds of one batch norm.

    Raises:
      RuntimeError: there is no GPU; or, in all processes, the first one failed.
      TypeError, ValueError: an argument out of contract, or `f` has no batch norm that None decides on.
    """
    platform = default_platform()
    if not callable(f):
        raise TypeError(f"f is a {type(f).__name__}, expected a function: give the training step, then its arguments")
    if platform not in GPUS:
        raise RuntimeError(
            f"autotune needs a GPU, and JAX's default here is {platform}: call it where f is to run, with {INSTALL}; "
            f"jbn.explain(x, device='NVIDIA H100') forecasts what a GPU would run"
        )
    kind = gpu(platform).kind
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(f"path is {path!r}, expected None or a folder: give its name")
    folder = tables.default_folder() if path is None else Path(path).absolute()
    try:
        norms = batch_norms(f, args)
        if not norms:
            raise ValueError(
                "f has no batch norm that implementation=None decides on, expected at least one: give a function that "
                "calls jbn.bn_train, jbn.bn_eval or a module, without implementation; what exported programs, uneven "
                "axes and virtual batches over an automatic mesh leave to XLA does not count"
            )
        found, count = _from_first(lambda: _measured(norms, folder, kind, ignore_cache, progress))
        tables.use(kind, folder, None if jax.process_count() == 1 else found)
    finally:
        jax.clear_caches()
    return Tuning(kind, found.name, tuple(found.rows[norm] for norm in norms if norm in found.rows), count)


def batch_norms(f: Callable, args: tuple) -> dict[Norm, bool]:
    """The batch norms of a program that None decides on, as a device has them, and whether gradients are taken."""
    jax.clear_caches()  # what was lowered before would not be lowered again
    watch = dispatch.Watch()
    token = dispatch.watch.set(watch)
    try:
        lowered = getattr(f, "lower", jax.jit(f).lower)(*args)
        if watch.asks:
            watch.compiling = True
            lowered.compile()
    finally:
        dispatch.watch.reset(token)
    return {norm: True in passes for norm, passes in watch.found.items()}


def _measured(
    norms: dict[Norm, bool], folder: Path, kind: str, ignore_cache: bool, progress: bool
) -> tuple[tables.Source, int]:
    """All rows of the file, with those of the norms that were not there; and how many these are."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(
            f"path is {str(folder)!r}, where no file can be written ({error.strerror}): give another folder"
        ) from None
    path = folder / tables.file_name(kind)
    known = {} if ignore_cache else tables.read(path, kind)
    wanted = {norm: backward for norm, backward in norms.items() if not _is_known(known.get(norm), backward)}
    for row in measure(wanted, progress):
        known = tables.write(path, kind, [row])  # at once, so that what is interrupted loses nothing
    return tables.Source(str(path), known), len(wanted)


def _is_known(row: Row | None, backward: bool) -> bool:
    return row is not None and row.failed is None and (row.backward is not None or not backward)


def measure(norms: dict[Norm, bool], progress: bool) -> Iterator[Row]:
    """A row for each: first all are compiled, in several threads, and checked as they come; then they are timed."""
    device = jax.local_devices()[0]
    say = _say if progress else lambda _: None
    ready = {}
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        begun = {norm: pool.submit(autotune_measure.prepare, norm, back, device) for norm, back in norms.items()}
        for i, (norm, future) in enumerate(begun.items()):
            ready[norm] = _checked(future)
            say(f"{i + 1} of {len(norms)} compiled and compared: {described(norm)}")
    finally:
        pool.shutdown(cancel_futures=True)
    for i, (norm, found) in enumerate(ready.items()):
        row = _row(norm, found)
        say(f"{i + 1} of {len(norms)} timed: {described(norm)}: {verdict(row)}")
        yield row


def _checked(future: Future) -> autotune_measure.Prepared | str:
    """What is ready to be timed, or why it is not."""
    try:
        prepared = future.result()
        return autotune_measure.disagreement(prepared, _inputs(prepared)) or prepared
    except Exception as error:
        return _brief(error)


def _row(norm: Norm, found: autotune_measure.Prepared | str) -> Row:
    versions = ", ".join(f"{package} {_version(package)}" for package in PACKAGES)
    row = Row(norm, None, None, None, datetime.date.today().isoformat(), versions)
    if isinstance(found, str):
        return row._replace(failed=found)
    try:
        forward, backward = autotune_measure.timed(found, _inputs(found))
    except Exception as error:
        return row._replace(failed=_brief(error))
    return row._replace(forward=forward, backward=backward)


def _inputs(prepared: autotune_measure.Prepared) -> list[Any]:
    return [prepared.draw(np.uint32(10 * i)) for i in range(prepared.layers)]


def _brief(error: Exception) -> str:
    message = str(error).strip().partition("\n")[0]
    return message if isinstance(error, NotImplementedError) else f"{type(error).__name__}: {message}"[:300]


def _version(package: str) -> str:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return "none"


def _from_first(compute: Callable[[], tuple[tables.Source, int]]) -> tuple[tables.Source, int]:
    """What the first process computes, in all of them.

    Raises:
      RuntimeError: it failed there, in all others too, as they would wait for ever.
    """
    if jax.process_count() == 1:
        return compute()
    sent, failure = b"", None
    if jax.process_index() == 0:
        try:
            source, count = compute()
            message = {"name": source.name, "rows": list(map(tables.as_json, source.rows.values())), "count": count}
        except Exception as error:
            message, failure = {"error": _brief(error)}, error
        sent = json.dumps(message).encode()
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(sent))))
    letters = np.zeros(length, np.uint8)
    letters[: len(sent)] = np.frombuffer(sent, np.uint8)
    message = json.loads(np.asarray(multihost_utils.broadcast_one_to_all(letters), np.uint8).tobytes())
    if "error" in message:
        raise RuntimeError(f"autotune failed in the first process: {message['error']}") from failure
    rows = map(tables.row_from, message["rows"])
    return tables.Source(message["name"], {row.norm: row for row in rows}), message["count"]


def _say(text: str) -> None:
    print(f"jbn.autotune: {text}", file=sys.stderr, flush=True)
