"""What a launch compiles to, for devices that need not be there: registers, spills, memory, width of accesses."""

import hashlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from jbn.kernels.launches import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16", "int32": "*i32", "bool": "*i1"}


class Binary(NamedTuple):
    kernel: str
    target: str
    registers: int  # a thread
    spilled: int  # bytes of stack a thread; AMD's scalar registers spill into vector ones, which is none
    shared: int  # bytes a program
    loads: tuple[int, ...]  # widths in bytes of accesses to global memory, one for each instruction, ascending
    stores: tuple[int, ...]


def compile_launch(launch: Launch, arrays: tuple[str, ...], target: str) -> Binary:
    """What a launch whose input arrays have these dtypes compiles to."""
    compiled = compile_only(launch, arrays, target)
    if target.startswith("sm_"):
        registers, spilled = _cuda_resources(compiled.asm["cubin"])
        loads, stores = _cuda_accesses(compiled.asm["ptx"])
    else:
        registers, spilled = _hip_resources(compiled.asm["amdgcn"])
        loads, stores = _hip_accesses(compiled.asm["amdgcn"])
    return Binary(launch.kernel.__name__, target, registers, spilled, compiled.metadata.shared, loads, stores)


def compile_only(launch: Launch, arrays: tuple[str, ...], target: str) -> CompiledKernel:
    """Compiles a launch for arrays that are 16-byte aligned as XLA's are, as jax-triton does; numbers that are 1 go.

    Without lines of source, so that where a kernel stands in its file has no say in registers.
    """
    kinds = [POINTERS[kind] for kind in arrays]
    kinds += [_number(value) for value in launch.numbers]
    kinds += [POINTERS[output.dtype] for output in launch.outputs]
    names = launch.kernel.arg_names
    signature = dict(zip(names, kinds, strict=False)) | dict.fromkeys(launch.constants, "constexpr")
    constants = {(names.index(name),): value for name, value in launch.constants.items()}
    constants |= {(i,): 1 for i, kind in enumerate(kinds) if kind == "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.startswith("*")}
    source = ASTSource(launch.kernel, signature, constants, aligned)
    warps = max(1, launch.tiling.warps * 32 // TARGETS[target].warp_size)  # as many threads
    options = {"num_warps": warps, "enable_fp_fusion": True}
    with tempfile.TemporaryDirectory() as folder, triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = folder
        triton.knobs.compilation.disable_line_info = True
        return triton.compile(source, target=TARGETS[target], options=options)


def name_of(launch: Launch, arrays: tuple[str, ...], target: str) -> str:
    """Says all that a binary depends on, the kernel's source and Triton's release included: one name, one binary."""
    numbers = ["one" if n == 1 else type(n).__name__ + "64" * (n >= 2**31) for n in launch.numbers]
    outputs = [output.dtype for output in launch.outputs]
    constants = sorted(launch.constants.items())
    source = launch.kernel.cache_key  # of the kernel and all it calls
    known = (source, triton.__version__, target, arrays, numbers, outputs, constants, launch.tiling.warps)
    return hashlib.sha256(repr(known).encode()).hexdigest()[:16]


def _number(value: int | float) -> str:
    if value == 1:
        return "constexpr"
    if isinstance(value, float):
        return "fp32"
    return "i32" if value < 2**31 else "i64"


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout).groups()
    return int(registers), int(stack)


def _cuda_accesses(ptx: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    def widths(word):
        found = re.findall(rf"\b{word}\.global(?:\.[\w:]+)*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
        return tuple(sorted(int(count or 1) * int(bits) // 8 for count, bits in found))

    return widths("ld"), widths("st")


def _hip_resources(assembly: str) -> tuple[int, int]:
    def field(name):
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    return field("vgpr_count"), field("private_segment_fixed_size")


def _hip_accesses(assembly: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes = {"byte": 1, "ubyte": 1, "sbyte": 1, "short": 2, "ushort": 2, "sshort": 2, "dword": 4}

    def widths(word):
        found = re.findall(rf"\b(?:global|buffer)_{word}_([a-z]+?)(?:_d16(?:_hi)?)?(?:x(\d))?\s", assembly)
        return tuple(sorted(sizes[kind] * int(times or 1) for kind, times in found))

    return widths("load"), widths("store")
