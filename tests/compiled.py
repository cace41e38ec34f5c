"""Compiles a launch for a GPU that need not be there, and runs the result: `machine` on what `ptx` reads."""

import machine

from jbn.kernels.binaries import compile_only

_known: dict[tuple, tuple[str, int]] = {}


def run(launch, arrays, outputs, target: str = "sm_90", chosen=None) -> machine.Report:
    """`outputs` are written in place, by the programs chosen, or all."""
    text, shared = assembled(launch, arrays, target)
    return run_text(launch, arrays, outputs, text, shared, chosen=chosen)


def assembled(launch, arrays, target: str = "sm_90") -> tuple[str, int]:
    """PTX of a launch on such arrays, and the bytes of shared memory that it asks for."""
    kinds = tuple(a.dtype.name for a in arrays)
    constants = tuple(sorted(launch.constants.items()))
    written = tuple(o.dtype for o in launch.outputs)
    # whether a number is 1, and how wide it is, is part of what is compiled
    numbers = tuple((type(n), n == 1, n >= 2**31) for n in launch.numbers)
    key = launch.kernel.__name__, kinds, written, numbers, constants, launch.tiling.warps, target
    if key not in _known:
        compiled = compile_only(launch, kinds, target)
        _known[key] = compiled.asm["ptx"], compiled.metadata.shared
    return _known[key]


def run_text(launch, arrays, outputs, text: str, shared: int, seed: int = 0, chosen=None) -> machine.Report:
    """The same with PTX at hand."""
    arguments = [*arrays, *(n for n in launch.numbers if n != 1), *outputs]
    return machine.run(text, launch.programs, arguments, shared, seed, chosen)
