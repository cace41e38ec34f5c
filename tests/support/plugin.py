"""Stands in for what jax-triton takes from jax's CUDA plugin, so that programs for a GPU lower where it is missing.

Triton compiles the kernels all the same; only the call that XLA would run is a text with the kernel's name.
"""

from typing import NamedTuple

import jaxlib.gpu_triton as real


class TritonKernel(NamedTuple):
    name: str
    warps: int
    blocks: int
    shared: int
    binary: str
    ir: str
    capability: int


class TritonKernelCall(NamedTuple):
    kernel: TritonKernel
    x: int
    y: int
    z: int
    parameters: list

    def to_proto(self, name: str, _metadata: bytes) -> bytes:
        return f" {self.kernel.name} ".encode()


NAMES = dict(
    TritonKernel=TritonKernel,
    TritonKernelCall=TritonKernelCall,
    create_array_parameter=lambda *given: given,
    create_scalar_parameter=lambda *given: given,
    get_compute_capability=lambda _device: 80,
    get_serialized_metadata=lambda *_: b"",
    get_arch_details=lambda _device: "gfx942",
)


def replace(patch, **others) -> None:
    """The stand-in, but for `others`, while a MonkeyPatch lasts; whether there is a plugin or not."""
    for name, value in (NAMES | others).items():
        patch.setattr(real, name, value, raising=False)


def install() -> None:
    """Puts the stand-in where jaxlib's plugin is missing, or is of another release, which jaxlib does not take."""
    if not hasattr(real, "TritonKernel"):
        vars(real).update(NAMES)
