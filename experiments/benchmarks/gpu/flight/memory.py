"""Arrays that kernels read and write: PyTorch's on the device, or NumPy's with a copy there.

Both have what `operands` and `raw` ask for; what is in float64 there has operators and `sum` in either. NumPy needs no
package that starts a GPU of its own, so it serves under compute-sanitizer, for small arrays, and without a GPU.
"""

import ctypes
import weakref
from typing import Any

import numpy as np

from experiments.benchmarks.gpu.flight.driver import Driver


class HostMemory:
    """NumPy arrays with a copy on the device, which goes when they go."""

    def __init__(self, driver: Driver):
        import ml_dtypes

        self.driver, self.bfloat16 = driver, ml_dtypes.bfloat16
        self.addresses: dict[int, int] = {}

    def _kept(self, array: np.ndarray) -> np.ndarray:
        array = np.ascontiguousarray(array)
        address = self.driver.allocate(array.nbytes)
        self.addresses[id(array)] = address
        weakref.finalize(array, self._free, id(array), address).atexit = False
        self._upload(array)
        return array

    def _free(self, key: int, address: int) -> None:
        del self.addresses[key]
        self.driver.free(address)

    def _upload(self, array: np.ndarray) -> None:
        self.driver.upload(self.addresses[id(array)], array.ctypes.data, array.nbytes)

    def dtype(self, name: str) -> Any:
        return self.bfloat16 if name == "bfloat16" else np.dtype(name)

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int, mean: float = 0, std: float = 1) -> np.ndarray:
        drawn = np.random.default_rng(seed).standard_normal(shape, np.float32)
        return self._kept((mean + std * drawn).astype(self.dtype(dtype)))

    def full(self, shape: tuple[int, ...], dtype: str, value: float) -> np.ndarray:
        return self._kept(np.full(shape, value, self.dtype(dtype)))

    def narrow(self, wide: np.ndarray, dtype: str) -> np.ndarray:
        """A float64 result as an operand."""
        return self._kept(wide.astype(self.dtype(dtype)))

    def fill(self, array: np.ndarray, value: float) -> None:
        array.fill(value)
        self._upload(array)

    def read(self, array: np.ndarray) -> np.ndarray:
        """The array as the device has it now."""
        self.driver.download(array.ctypes.data, self.addresses[id(array)], array.nbytes)
        return array

    def wide(self, array: np.ndarray) -> np.ndarray:
        return self.read(array).astype(np.float64)

    def copied(self, array: np.ndarray) -> bytes:
        return self.read(array).tobytes()

    def unchanged(self, array: np.ndarray, before: bytes) -> bool:
        """Whether every bit is as it was copied."""
        return self.copied(array) == before

    def address(self, array: np.ndarray) -> int:
        return self.addresses[id(array)]

    def release(self) -> None:
        """Nothing is held back from the device."""


class TorchMemory:
    """PyTorch's tensors; its work goes to the driver's stream."""

    def __init__(self, driver: Driver, device: str = "cuda"):
        import torch  # pyright: ignore[reportMissingImports]

        self.torch, self.driver, self.device = torch, driver, device
        if device == "cuda":
            torch.cuda.set_stream(torch.cuda.ExternalStream(driver.stream.value))

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int, mean: float = 0, std: float = 1) -> Any:
        generator = self.torch.Generator(device=self.device).manual_seed(seed)
        drawn = self.torch.randn(shape, device=self.device, generator=generator)
        return drawn.mul_(std).add_(mean).to(getattr(self.torch, dtype))

    def full(self, shape: tuple[int, ...], dtype: str, value: float) -> Any:
        return self.torch.full(shape, value, device=self.device, dtype=getattr(self.torch, dtype))

    def narrow(self, wide: Any, dtype: str) -> Any:
        return wide.to(getattr(self.torch, dtype)).contiguous()

    def fill(self, array: Any, value: float) -> None:
        array.fill_(value)

    def wide(self, array: Any) -> Any:
        return array.double()

    def copied(self, array: Any) -> Any:
        return array.clone()

    def unchanged(self, array: Any, before: Any) -> bool:
        return self.torch.equal(array.view(self.torch.uint8), before.view(self.torch.uint8))

    def address(self, array: Any) -> int:
        return array.data_ptr()

    def release(self) -> None:
        """Gives back what is not in use."""
        if self.device == "cuda":
            self.torch.cuda.empty_cache()


Memory = HostMemory | TorchMemory


def parameter(kind: str, value: float) -> Any:
    """A number as a kernel takes it: floats in 32 bits, integers in 32 or, where they need it, 64."""
    if kind == "float":
        return ctypes.c_float(value)
    return ctypes.c_int64(int(value)) if value >= 2**31 else ctypes.c_int32(int(value))


def pointer(address: int) -> Any:
    return ctypes.c_uint64(address)
