"""The CUDA driver, through ctypes: binaries loaded, launched and timed with nothing of Triton or JAX in between."""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

LOCAL_BYTES, REGISTERS, MAX_DYNAMIC_SHARED = 3, 4, 8  # of CUfunction_attribute
STATIC_SHARED = 48 * 1024  # bytes beyond which a function must be told
MULTIPROCESSORS, L2_BYTES = 16, 38  # of CUdevice_attribute
NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING
RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED: others may allocate meanwhile
LOST = (700, 714, 715, 716, 717, 718, 719)  # errors of a launch after which the context is of no use


class CudaError(RuntimeError):
    """The driver refused; `lost` says whether it will refuse everything from now on."""

    def __init__(self, code: int, what: str):
        super().__init__(f"CUDA error {code} of {what}")
        self.lost = code in LOST


class Program(NamedTuple):
    """A loaded binary."""

    function: Any
    threads: int
    shared: int  # bytes
    resident: int  # of its programs that a multiprocessor holds at once
    registers: int  # a thread
    spilled: int  # bytes of local memory a thread
    parameters: int


class Nothing:
    """Stands in for libcuda where none is: every function succeeds and does nothing."""

    def __getattr__(self, _name: str) -> Callable[..., int]:
        return lambda *_: 0


class Driver:
    """Everything goes to one stream, so what is asked for later comes later."""

    def __init__(self, library: Any = None):
        self.library = ctypes.CDLL("libcuda.so.1") if library is None else library
        context, device = ctypes.c_void_p(), ctypes.c_int()
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)  # the one that PyTorch has too
        self.call("cuCtxSetCurrent", context)
        self.stream = self.new_stream()
        self.device = device

    def call(self, name: str, *arguments: Any) -> None:
        """Raises CudaError unless the driver's function of that name succeeds."""
        code = getattr(self.library, name)(*arguments)
        if code:
            raise CudaError(code, name)

    def new_stream(self) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        self.call("cuStreamCreate", ctypes.byref(stream), NON_BLOCKING)
        return stream

    def about(self) -> dict[str, Any]:
        """The device's name, multiprocessors, bytes of L2, and the CUDA version that the driver speaks."""
        name, version = ctypes.create_string_buffer(100), ctypes.c_int()
        self.call("cuDeviceGetName", name, 100, self.device)
        self.call("cuDriverGetVersion", ctypes.byref(version))
        found = {}
        for key, attribute in (("multiprocessors", MULTIPROCESSORS), ("l2_bytes", L2_BYTES)):
            value = ctypes.c_int()
            self.call("cuDeviceGetAttribute", ctypes.byref(value), attribute, self.device)
            found[key] = value.value
        return {"device": name.value.decode(), **found, "cuda": version.value}

    # ---- binaries

    def load(self, cubin: bytes, symbol: str, warps: int, shared: int, parameters: int) -> Program:
        module, function, resident = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_int()
        self.call("cuModuleLoadData", ctypes.byref(module), cubin)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
        if shared > STATIC_SHARED:
            self.call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED, shared)
        size = ctypes.c_size_t(shared)
        self.call("cuOccupancyMaxActiveBlocksPerMultiprocessor", ctypes.byref(resident), function, 32 * warps, size)
        registers, spilled = ctypes.c_int(), ctypes.c_int()
        self.call("cuFuncGetAttribute", ctypes.byref(registers), REGISTERS, function)
        self.call("cuFuncGetAttribute", ctypes.byref(spilled), LOCAL_BYTES, function)
        return Program(function, 32 * warps, shared, resident.value, registers.value, spilled.value, parameters)

    def launcher(self, program: Program, programs: int, values: list[Any]) -> Callable[[], None]:
        """What launches so many programs on ctypes values; Triton's own scratch, unused, comes behind them as nulls.

        Raises:
          ValueError: the binary takes other parameters.
        """
        spare = program.parameters - len(values)
        if not 0 <= spare <= 2:
            raise ValueError(f"{len(values)} parameters for a binary that takes {program.parameters}")
        values = [*values, *(ctypes.c_uint64(0) for _ in range(spare))]
        addresses = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        shape = (programs, 1, 1, program.threads, 1, 1, program.shared, self.stream, addresses, None)

        def launch(_held: Any = values) -> None:
            self.call("cuLaunchKernel", program.function, *shape)

        return launch

    # ---- memory

    def allocate(self, size: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", ctypes.c_uint64(address))

    def upload(self, address: int, host: int, size: int) -> None:
        self.wait()  # for what reads it still
        self.call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(host), ctypes.c_size_t(size))
        self.call("cuCtxSynchronize")  # the copy may return while it is under way, and our stream would not wait

    def download(self, host: int, address: int, size: int) -> None:
        self.wait()
        self.call("cuMemcpyDtoH_v2", ctypes.c_void_p(host), ctypes.c_uint64(address), ctypes.c_size_t(size))

    def zero(self, address: int, count: int) -> None:
        """Fills 32-bit words with zeros."""
        self.call("cuMemsetD32Async", ctypes.c_uint64(address), 0, ctypes.c_size_t(count), self.stream)

    # ---- time

    def wait(self) -> None:
        self.call("cuStreamSynchronize", self.stream)

    def time(self, step: Callable[[int], None], count: int, replays: int = 5) -> float:
        """Microseconds of a step, of which `count` are captured in a graph: the median of replays behind a first one.

        `step(i)` queues the i-th; one has run before.
        """
        graph, executable, events = ctypes.c_void_p(), ctypes.c_void_p(), (ctypes.c_void_p(), ctypes.c_void_p())
        self.call("cuStreamBeginCapture_v2", self.stream, RELAXED)
        try:
            for i in range(count):
                step(i)
        finally:
            self.call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        try:
            self.call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
            for event in events:
                self.call("cuEventCreate", ctypes.byref(event), 0)
            times = []
            for replay in range(1 + replays):
                self.call("cuEventRecord", events[0], self.stream)
                self.call("cuGraphLaunch", executable, self.stream)
                self.call("cuEventRecord", events[1], self.stream)
                self.wait()
                elapsed = ctypes.c_float()
                self.call("cuEventElapsedTime", ctypes.byref(elapsed), *events)
                if replay:
                    times.append(1e3 * elapsed.value / count)
            return sorted(times)[len(times) // 2]
        finally:
            for event in events:
                if event.value:
                    self.call("cuEventDestroy_v2", event)
            if executable.value:
                self.call("cuGraphExecDestroy", executable)
            self.call("cuGraphDestroy", graph)
