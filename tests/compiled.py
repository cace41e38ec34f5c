"""Compiles a launch for a GPU that need not be there, and runs the result: `machine` on what `ptx` reads."""

import machine

from jbn.kernels.binaries import compile_only

_known: dict[tuple, tuple[str, int]] = {}


def run(launch, arrays, outputs, target: str = "sm_90") -> machine.Report:
    """`outputs` are written in place."""
    kinds = tuple(a.dtype.name for a in arrays)
    constants = tuple(sorted(launch.constants.items()))
    written = tuple(o.dtype for o in launch.outputs)
    # numbers that are 1, and which are, are part of what is compiled
    ones = tuple(n == 1 for n in launch.numbers)
    key = launch.kernel.__name__, kinds, written, ones, constants, launch.tiling.warps, target
    if key not in _known:
        compiled = compile_only(launch, kinds, target)
        _known[key] = compiled.asm["ptx"], compiled.metadata.shared
    text, shared = _known[key]
    numbers = [n for n in launch.numbers if n != 1]
    return machine.run(text, launch.programs, [*arrays, *numbers, *outputs], shared)
