"""The three runs: which parts each has, in the order of their worth, and how long each may take."""

import importlib.metadata
import os
import subprocess
import tarfile
import tempfile
from pathlib import Path

from experiments.benchmarks.gpu.flight.parts import Part, Parts, python
from experiments.benchmarks.gpu.flight.raw import FOLDER
from experiments.benchmarks.gpu.flight.stamp import is_prepared
from experiments.benchmarks.gpu.flight.summary import summarise
from experiments.framework.lines import Lines

LIMIT = 164  # seconds, of each run: what follows the last part takes a few more
SMALL = "9e5"  # elements: what compute-sanitizer is given
BYTES_BACK = 15 * 2**20  # of XLA's programs: what comes back in one file
PACKAGES = (
    "jax",
    "jaxlib",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
    "jax-triton",
    "triton",
    "flax",
    "optax",
    "torch",
    "numpy",
)
WHOLE_OP = ("tests/kernels/test_gpu.py", "-k", "default or (whole_op and bfloat16)")
CORE = tuple(
    f"tests/{name}.py"
    for name in ("functions/test_functional", "op/test_gradients", "functions/test_numerics", "functions/test_edges")
)


def fly(which: int, out: Path, limit: float = LIMIT, dry: bool = False) -> bool:
    """Run 1, 2 or 3 into a folder; whether all its parts ended well.

    Files: `flightN.jsonl`, a `.log` for each part, and `flight2-xla.tar.gz`. `dry` runs where no GPU is, on tiny
    shapes, what can be run there.
    """
    out = out.resolve()
    lines = Lines(out / f"flight{which}.jsonl")
    parts = Parts(out, lines, limit)
    lines("environment", flight=which, **environment())
    well = {1: first, 2: second, 3: third}[which](parts, dry)
    print(summarise([out / f"flight{which}.jsonl"]), flush=True)
    return well


def first(parts: Parts, dry: bool = False) -> bool:
    """Raw; then a handful of tests of the whole op through jax."""
    well = is_prepared(FOLDER) or parts.run(compiling())
    well &= parts.run(raw("flight1-raw", parts, 112, *["--dry"] * dry))
    return parts.run(tests("flight1-tests", 50, 6, *WHOLE_OP)) and well


def second(parts: Parts, dry: bool = False) -> bool:
    """Training steps and layers through jax beside Flax's and PyTorch's."""
    command = python("-m", "experiments.benchmarks.gpu.flight.side_by_side", str(parts.lines.file.name))
    with tempfile.TemporaryDirectory() as scratch:
        options = ["--dump", scratch, *["--tiny"] * dry]
        well = parts.run(Part("flight2-steps", [*command, "steps", "--seconds", "86", *options], 90, VARIABLES))
        well &= parts.run(Part("flight2-layers", [*command, "layers", "--seconds", "60", *options], 70, VARIABLES))
        keep_programs(Path(scratch), parts.folder / "flight2-xla.tar.gz")
    return well


def third(parts: Parts, dry: bool = False) -> bool:
    """Raw again; memcheck and racecheck on kernels alone; the core's tests; the same bits with other streams busy."""
    well = is_prepared(FOLDER) or parts.run(compiling())
    well &= parts.run(raw("flight3-raw", parts, 30, *["--dry"] * dry))
    small = ("--host", "--largest", SMALL, "--each", "2", *["--dry"] * dry)
    checks = [
        raw(f"flight3-{tool}", parts, 36, *small, tool=None if dry else tool) for tool in ("memcheck", "racecheck")
    ]
    well &= parts.run(*checks)
    well &= parts.run(tests("flight3-core", 44, 12, *CORE))
    repeating = ("--repeat", "100", "--each", "1")
    return parts.run(raw("flight3-bits", parts, 30, *repeating, *["--dry"] * dry)) and well


VARIABLES = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JBN_TEST_GPU": "1"}


def compiling() -> Part:
    """What `prepare` did not compile, or changed since, is compiled on all cores."""
    return Part(
        "compile", python("-m", "experiments.benchmarks.gpu.flight", "prepare", "--seconds", "30", "--offline"), 40
    )


def raw(name: str, parts: Parts, seconds: float, *arguments: str, tool: str | None = None) -> Part:
    """Raw launches, which begin none in their last seconds; under a tool of compute-sanitizer's if one is named."""
    command = python("-m", "experiments.benchmarks.gpu.flight.raw", str(parts.lines.file.name), *arguments)
    command += ["--seconds", str(seconds - 12)]
    if tool is not None:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
    return Part(name, command, seconds)


def tests(name: str, seconds: float, processes: int, *arguments: str) -> Part:
    """pytest on the GPU; every test's outcome is in the log as it comes."""
    options = ("-vv", "-n", str(processes), "-m", "gpu", "--tb=short", "--maxfail=30")
    return Part(name, python("-m", "pytest", *options, *arguments), seconds, VARIABLES)


def keep_programs(scratch: Path, archive: Path) -> None:
    """XLA's optimised programs and their launches, the newest left out where they are too many to come back."""
    found = [
        path for path in scratch.rglob("*") if path.name.endswith(("after_optimizations.txt", "thunk_sequence.txt"))
    ]
    if found:
        with tarfile.open(archive, "w:gz") as file:
            for path in sorted(found, key=lambda path: path.stat().st_mtime):
                if archive.stat().st_size > BYTES_BACK:
                    break
                file.add(path, path.relative_to(scratch))


def environment() -> dict[str, object]:
    """Versions, the driver, and what the machine has beside the GPU."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem", "--format=csv,noheader"]
    try:
        card = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        card = None
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return {"card": card, "cores": os.cpu_count(), "packages": found, "site": (FOLDER / "site").is_dir()}
