"""What was measured of batch norms on GPUs: rows in JSON files, one file for each kind of device.

The package's own are in `measured/`, beside this file; the user's, which `jbn.autotune` writes, in the user's cache
folder. Both have one format. A row is for one batch norm exactly as it was measured, and for no other.
"""

import json
import math
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jbn._op.plan import Plan, is_symbolic

VERSION = 1  # of the files; raised also where kernels become slower, as old rows would mislead
PACKAGED = Path(__file__).parent / "measured"
AHEAD = 0.98  # of XLA's time: what kernels took less than, to have won; a smaller lead may be noise


class Norm(NamedTuple):
    """One batch norm as a device has it: all that its speed depends on."""

    shape: tuple[int, ...]  # of x
    axis: int  # of the channels, ≥ 0
    batch: int  # leading axes, each index of which is a batch of its own
    dtype: str  # of x
    out: str  # dtype of y
    activation: str | None  # as `activations.encoded` has it
    residual: str | None  # its dtype
    mask: tuple[int, ...] | None  # its shape
    training: bool  # the statistics are x's own

    @classmethod
    def of(cls, plan: Plan, x) -> "Norm | None":
        """The one that a piece is of; None where it is of none, or x has no known size."""
        options = plan.options
        if options is None or is_symbolic(x.shape):
            return None
        mask = None
        if options.mask is not None:
            varies = set(range(plan.batch)) | {a + len(x.shape) for a in options.mask}
            mask = tuple(n if a in varies else 1 for a, n in enumerate(x.shape))
        names = jnp.dtype(x.dtype).name, jnp.dtype(plan.dtype).name
        return cls(
            tuple(x.shape), plan.channel, plan.batch, *names, options.activation, options.residual, mask, plan.centred
        )

    def may_be_part_of(self, whole: "Norm") -> bool:
        """Whether devices that share `whole` evenly may each have this."""
        alike = self._replace(shape=(), mask=None) == whole._replace(shape=(), mask=None)
        alike = alike and (self.mask is None) == (whole.mask is None) and len(self.shape) == len(whole.shape)
        return alike and all(n > 0 and m % n == 0 for n, m in zip(self.shape, whole.shape, strict=True))


PASSES = ("forward", "backward")


class Times(NamedTuple):
    """Microseconds of either implementation, medians."""

    triton: float
    xla: float


class Row(NamedTuple):
    """What was found of a batch norm."""

    norm: Norm
    forward: Times | None  # None where something failed before
    backward: Times | None  # by itself; None where no gradient was asked for
    failed: str | None  # why kernels must not be chosen
    date: str  # ISO 8601
    versions: str  # of the packages that it was measured with

    def speed(self, backward: bool) -> float | None:
        """XLA's time over that of the kernels, of a pass; None where that was not measured."""
        times = self.backward if backward else self.forward
        return None if times is None else times.xla / times.triton

    def won(self, backward: bool) -> bool:
        """Whether kernels are to be chosen for a pass."""
        speed = self.speed(backward)
        return self.failed is None and speed is not None and speed * AHEAD > 1


Rows = dict[Norm, Row]


class Source(NamedTuple):
    """Rows and where they are from."""

    name: str
    rows: Rows

    def row(self, norm: Norm | None) -> Row | None:
        return None if norm is None else self.rows.get(norm)


class Tables(NamedTuple):
    """What is known of a kind of device, the first first."""

    packaged: Source
    own: Source  # the user's
    left_out: Source  # the user's where several processes compile a program, and have not agreed on them


_known: dict[str, Tables] = {}  # by kind of device
_folders: dict[str, Path] = {}  # of the user's files, where another than the usual was named
_agreed: dict[str, Source] = {}  # rows that all processes have


def of(kind: str) -> Tables:
    """The tables for a kind of device, read once."""
    if kind not in _known:
        path = _folders.get(kind, default_folder()) / file_name(kind)
        own = nothing = Source(str(path), {})
        left_out = Source(str(path), read(path, kind))
        if jax.process_count() == 1:
            own, left_out = left_out, nothing
        elif kind in _agreed:
            own, left_out = _agreed[kind], nothing
        _known[kind] = Tables(_packaged(kind), own, left_out)
    return _known[kind]


def use(kind: str, folder: Path, agreed: Source | None = None) -> None:
    """From now on the user's rows are those in `folder`, or where several processes are one, those agreed on."""
    _folders[kind] = folder
    if agreed is not None:
        _agreed[kind] = agreed
    _known.pop(kind, None)


def file_name(kind: str) -> str:
    """Such as nvidia-h100-80gb-hbm3.json for "NVIDIA H100 80GB HBM3"."""
    return re.sub("[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json"


def default_folder() -> Path:
    """The user's cache folder, as the XDG base directory specification has it."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "jbn"


def _packaged(kind: str) -> Source:
    """The package's rows; for a kind in short, such as "NVIDIA H100", those of the one file that begins with it."""
    path = PACKAGED / file_name(kind)
    begun = sorted(PACKAGED.glob(f"{path.stem}-*.json"))
    if path.exists() or len(begun) != 1:
        return Source(path.name, read(path, kind))
    return Source(begun[0].name, read(begun[0], None))


def read(path: Path, kind: str | None) -> Rows:
    """The rows of a file for a kind of device, None for any; none, and a warning, where it is not such a file."""
    try:
        return _parsed(json.loads(path.read_text(encoding="utf-8")), kind)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        said = str(error) if type(error) is _Unfit else f"{type(error).__name__}: {error}"
        warnings.warn(
            f"jbn ignores the measurements in {path}: {said}; jbn.autotune writes the file anew", stacklevel=2
        )
        return {}


class _Unfit(ValueError):
    """A file is not what it should be, in words of ours."""


def _parsed(found: Any, kind: str | None) -> Rows:
    if found["version"] != VERSION:
        raise _Unfit(f"they have version {found['version']!r}, and this release reads {VERSION}")
    if kind not in (None, found["device"]):
        raise _Unfit(f"they are of the device {found['device']!r}, and this is {kind!r}")
    rows = map(row_from, found["rows"])
    return {row.norm: row for row in rows}


def row_from(found: dict[str, Any]) -> Row:
    """A row from its JSON.

    Raises:
      ValueError, TypeError, KeyError: it is none.
    """
    values: dict[str, Any] = {name: tuple(v) if isinstance(v := found[name], list) else v for name in Norm._fields}
    norm = Norm(**values)
    numbers = [norm.axis, norm.batch, *norm.shape, *(norm.mask or ())]
    texts = [norm.dtype, norm.out, found["date"], found["versions"]]
    texts += [t for t in (norm.activation, norm.residual, found["failed"]) if t is not None]
    types = {int: numbers, str: texts, bool: [norm.training]}
    if any(type(value) is not kind for kind, values in types.items() for value in values):
        raise _Unfit(f"a row is not one: {found}")
    forward, backward = (None if found[name] is None else Times(**found[name]) for name in PASSES)
    if not all(0 < t < math.inf for pair in (forward, backward) if pair is not None for t in pair):
        raise _Unfit(f"a row has times that are none: {found}")
    return Row(norm, forward, backward, found["failed"], found["date"], found["versions"])


def as_json(row: Row) -> dict[str, Any]:
    times = {name: t and t._asdict() for name, t in zip(PASSES, (row.forward, row.backward), strict=True)}
    return row.norm._asdict() | times | {"failed": row.failed, "date": row.date, "versions": row.versions}


def write(path: Path, kind: str, rows: Iterable[Row]) -> Rows:
    """Adds rows to a file, in place of older ones of the same batch norms; returns all that are there then.

    Whoever else adds rows waits, and whoever reads has the file as it was or as it is.
    """
    with _locked(path.parent):
        every = read(path, kind) | {row.norm: row for row in rows}
        lines = ",\n  ".join(json.dumps(as_json(row)) for row in every.values())
        text = f'{{\n "version": {VERSION},\n "device": {json.dumps(kind)},\n "rows": [\n  {lines}\n ]\n}}\n'
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    return every


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One at a time, of all processes."""
    import fcntl  # which Windows lacks, where JAX has no GPU

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
