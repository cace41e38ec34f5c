"""What an experiment was asked, what it found, and how that reaches the disk."""

import contextlib
import csv
import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.framework import cutting

CHECKOUT = Path(__file__).resolve().parents[2]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


class Options(NamedTuple):
    """What the command line asks of every experiment."""

    seed: int = 0
    out: Path = Path("results")
    quick: bool = False
    arguments: Any = None  # the whole command line, for an experiment with options of its own


class MissingPackage(ImportError):
    """A package of the `experiments` extra is not installed."""


def require(*packages: str) -> None:
    """Raises MissingPackage, with the remedy, unless every package named can be imported."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingPackage(f"this needs {' and '.join(missing)}, not installed here: pip install -e '.[experiments]'")


@dataclass
class Results:
    """The findings of one run. `table` and `figure` of an experiment are functions of this alone.

    `rows` holds one dict per finished measurement, appended as it finishes, so that an interrupted run keeps
    them. Scalars in a row become columns of the CSV file; lists (curves) are kept in the JSON file only.
    """

    name: str
    configuration: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)  # what a job says of itself and of what it found
    environment: dict[str, Any] | None = None  # None: this process's
    complete: bool = False
    seconds: float | None = None  # None: since it was made
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def read(cls, path: Path) -> "Results":
        """The results that `save` wrote to a JSON file."""
        record = json.loads(path.read_text(encoding="utf-8"))
        return cls(record.pop("experiment"), **record)

    def save(self, out: Path, figure: Callable[["Results"], Any]) -> list[Path]:
        """Writes `<out>/<name>.json`, `.csv`, `.png` and `.svg`, each whole or not at all; returns the paths."""
        from matplotlib import pyplot

        paths = self.write(out)
        drawn = figure(self)
        for suffix in (".png", ".svg"):
            paths.append(out / f"{self.name}{suffix}")
            with replacing(paths[-1]) as temporary:
                # no date inside, so that the same results give the same bytes
                metadata = {"Date": None, "Coverage": cutting.written(cutting.parts(drawn))} if suffix == ".svg" else {}
                drawn.savefig(temporary, format=suffix[1:], metadata=metadata)
        pyplot.close(drawn)  # which keeps it open otherwise
        return paths

    def write(self, out: Path) -> list[Path]:
        """`save` without the figure."""
        record = {
            "experiment": self.name,
            "complete": self.complete,
            "configuration": self.configuration,
            "environment": environment() if self.environment is None else self.environment,
            "seconds": round(time.perf_counter() - self.started, 2) if self.seconds is None else self.seconds,
            "summary": self.summary,
            **({"told": self.told} if self.told else {}),
            "rows": self.rows,
        }
        out.mkdir(parents=True, exist_ok=True)
        for suffix in (".png", ".svg"):  # an old drawing must not pass for one of these results
            (out / f"{self.name}{suffix}").unlink(missing_ok=True)
        paths = [out / f"{self.name}{suffix}" for suffix in (".json", ".csv")]
        with replacing(paths[0]) as temporary:
            text = json.dumps(plain(record), indent=1, ensure_ascii=False, allow_nan=False)
            temporary.write_text(text + "\n", encoding="utf-8")
        with replacing(paths[1]) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            columns = [name for name, value in self.rows[0].items() if not isinstance(value, (list, dict))]
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
        return paths


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, else is removed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def plain(value: Any) -> Any:
    """`value` as JSON holds it: arrays become lists, what JSON has no word for (NaN, infinities) None.

    Single precision is written with the seven digits that it has.
    """
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "dtype"):
        single = value.dtype.itemsize <= 4 and value.dtype.kind not in "biu"
        listed = np.asarray(value, np.float64 if single else None).tolist()
        return plain(rounded(listed) if single else listed)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def rounded(value: Any) -> Any:
    """Nested lists of numbers, to seven significant digits."""
    return [rounded(item) for item in value] if isinstance(value, list) else float(f"{value:.7g}")


@contextlib.contextmanager
def progress(total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar over `total` parts; call what it yields with a description as each part starts."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as bar:
        task = bar.add_task("", total=total)
        done = itertools.count()
        yield lambda description: bar.update(task, completed=next(done), description=description)
        bar.update(task, completed=total, description="done")


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Versions and hardware, for the record beside the numbers."""
    import jax

    import jbn

    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "jbn": jbn.__version__,
        "platform": device.platform,
        "device": cpu_model() if device.platform == "cpu" else device.device_kind,
        "devices": jax.device_count(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model() -> str:
    """The processor's name, as Linux gives it; elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
