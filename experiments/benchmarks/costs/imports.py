"""What an import adds to those before it: CPU seconds, each time in a new process."""

import subprocess
import sys
from typing import Any

from experiments.benchmarks.costs.rows import row
from experiments.framework.record import CHECKOUT

# what is imported → what was imported before; Flax's own beside ours, for scale
IMPORTS = {
    "jbn": "jax",
    "flax.linen": "jax",
    "flax.nnx": "jax",
    "jbn.linen": "flax.linen",
    "jbn.nnx": "flax.nnx",
}
HEAVY = ("flax", "triton")  # what `import jbn` is to leave alone
CODE = """
import sys, time
import {before}
start, had = time.process_time(), set(sys.modules)
import {name}
print(time.process_time() - start, *({heavy!r} & (set(sys.modules) - had)))
"""


def imported(name: str, before: str) -> tuple[float, set[str]]:
    """CPU seconds that `import name` adds after `import before`, and which of `HEAVY` it loads."""
    code = CODE.format(name=name, before=before, heavy=set(HEAVY))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=True, timeout=120
    )
    seconds, *loaded = done.stdout.split()
    return float(seconds), set(loaded)


def imports(names: list[str], turns: int) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """A row for each import; and what of `HEAVY` each loads that was not there before."""
    times: dict[str, list[float]] = {name: [] for name in names}
    loads: dict[str, set[str]] = {name: set() for name in names}
    for turn in range(turns + (turns > 1)):  # the first only fills the disk's cache
        for name in names:
            seconds, loaded = imported(name, IMPORTS[name])
            loads[name] |= loaded
            if turn or turns == 1:
                times[name].append(seconds)
    rows = [
        row({"kind": "import", "what": f"import {name} after {IMPORTS[name]}", "unit": "CPU s"}, name, times, None)
        for name in names
    ]
    return rows, {name: sorted(found) for name, found in loads.items()}
