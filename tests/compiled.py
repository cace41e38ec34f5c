"""Compiles a launch for a GPU that need not be there, and runs the result: `machine` on what `ptx` reads."""

import machine

from jbn.kernels.binaries import compile_only

_known: dict[tuple, tuple[str, int]] = {}


def run(launch, arrays, outputs, target: str = "sm_90") -> machine.Report:
    """`outputs` are written in place."""
    kinds = tuple(a.dtype.name for a in arrays)
    constants = tuple(sorted(launch.constants.items()))
    written = tuple(o.dtype for o in launch.outputs)
    # whether a number is 1, and how wide it is, is part of what is compiled
    numbers = tuple((type(n), n == 1, n >= 2**31) for n in launch.numbers)
    key = launch.kernel.__name__, kinds, written, numbers, constants, launch.tiling.warps, target
    if key not in _known:
        compiled = compile_only(launch, kinds, target)
        _known[key] = compiled.asm["ptx"], compiled.metadata.shared
    text, shared = _known[key]
    arguments = [*arrays, *(n for n in launch.numbers if n != 1), *outputs]
    return machine.run(text, launch.programs, arguments, shared)
