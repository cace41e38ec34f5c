"""What can be done before a GPU is there: binaries compiled, packages unpacked, and what is missing told."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import triton

from experiments.benchmarks.gpu.flight import ahead, plan
from experiments.benchmarks.gpu.flight.raw import FOLDER
from experiments.benchmarks.gpu.flight.stamp import stamp
from experiments.framework.record import cores

TRITON = "3.6."  # of that machine, and the one that jax-triton 0.3 compiles with
JAX_TRITON = "jax-triton==0.3.1"
REMEDY = "pip install -e . 'triton==3.6.*' in an environment of its own, whose Python PYTHON names"


def prepare(folder: Path = FOLDER, seconds: float = 1e9, fetch: bool = True) -> bool:
    """Fills the folder; whether all is there then. What an earlier call left is kept where it is still right."""
    if not triton.__version__.startswith(TRITON):
        print(f"MISSING: triton {TRITON}x, which this is compiled with there; here is {triton.__version__}: {REMEDY}")
        return False
    planned = plan.everything()
    (folder / "binaries").mkdir(parents=True, exist_ok=True)
    (folder / "stamp").unlink(missing_ok=True)
    binaries = plan.write(folder, planned)
    print(f"{len(planned)} launches of {len(binaries)} binaries", flush=True)
    lacking = []
    forgotten = ahead.forget(folder / "binaries", binaries)
    left, errors = ahead.build(folder / "binaries", binaries, cores(), seconds)
    if left:
        lacking.append(f"{len(left)} binaries, the first of them {next(iter(left.values()))}")
    if fetch and not fetched(folder / "site"):
        lacking.append(f"{JAX_TRITON}, which pip could not fetch: tests and flight 2 need it")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB, {len(binaries) - len(left)} binaries, {forgotten} old ones deleted")
    for line in (*errors, *(f"MISSING: {each}" for each in lacking)):
        print(line)
    complete = not lacking and not errors
    if complete:
        (folder / "stamp").write_text(stamp(), encoding="utf-8")
    return complete


def fetched(site: Path) -> bool:
    """Whether jax-triton, pure Python, is in the folder or can be put there."""
    if (site / "jax_triton").is_dir():
        return True
    if importlib.util.find_spec("pip") is None:
        return False
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    return subprocess.run([*command, "--target", str(site), JAX_TRITON]).returncode == 0
