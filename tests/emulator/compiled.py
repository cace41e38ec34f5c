"""Compiles a launch for a GPU that need not be there, and runs the result: `machine` on what `ptx` reads."""

import kept
import machine
import pytest
from triton import knobs
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import compiler

from jbn.kernels.binaries import compile_only, name_of


def run(launch, arrays, outputs, target: str = "sm_90", chosen=None) -> machine.Report:
    """`outputs` are written in place, by the programs chosen, or all."""
    text, shared = assembled(launch, arrays, target)
    return run_text(launch, arrays, outputs, text, shared, chosen=chosen)


def assembled(launch, arrays, target: str = "sm_90") -> tuple[str, int]:
    """PTX of a launch on such arrays, and the bytes of shared memory that it asks for."""
    kinds = tuple(a.dtype.name for a in arrays)

    def compute():
        with pytest.MonkeyPatch.context() as patch:
            # NVIDIA's assembler has no part in this; nor have what came before PTX, and Triton's cache
            patch.setattr(CUDABackend, "make_cubin", lambda _self, ptx, *_: ptx.encode())
            patch.setattr(knobs.compilation, "store_binary_only", True)
            patch.setattr(compiler, "get_cache_key", lambda *_, **__: "")  # its folder is new
            compiled = compile_only(launch, kinds, target)
        return compiled.asm["cubin"].decode(), compiled.metadata.shared

    return kept.always(("ptx", name_of(launch, kinds, target)), compute)


def run_text(launch, arrays, outputs, text: str, shared: int, seed: int = 0, chosen=None) -> machine.Report:
    """The same with PTX at hand."""
    arguments = [*arrays, *(n for n in launch.numbers if n != 1), *outputs]
    return machine.run(text, launch.programs, arguments, shared, seed, chosen)
