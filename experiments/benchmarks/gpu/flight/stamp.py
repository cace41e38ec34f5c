"""Whether what was compiled ahead is of the sources that are here: seen without importing Triton."""

import hashlib
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[3]
SOURCES = (
    "kernels/*.py",
    "experiments/benchmarks/gpu/flight/*.py",
    "experiments/material/cases.py",
    "experiments/material/models.py",
)


def stamp() -> str:
    """A hash of all that binaries and runs depend on."""
    paths = sorted(path for pattern in SOURCES for path in CHECKOUT.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def is_prepared(folder: Path) -> bool:
    """Whether `prepare` found nothing missing, and nothing has changed since."""
    path = folder / "stamp"
    return path.exists() and path.read_text(encoding="utf-8") == stamp()
