"""libcuda without a GPU: memory is the host's, kernels run in Triton's interpreter, a graph is what was queued.

What `experiments.benchmarks.gpu.flight.driver` asks for, with the driver's own calling conventions. A binary's bytes
are a name, by which its launch is known. Replays of a graph are counted and not run, a millisecond each.
"""

import ctypes

import interpreter
import ml_dtypes
import numpy as np

from jbn.kernels.launches import Launch

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "int32": np.int32}


class FakeCuda:
    def __init__(self, launches: dict[str, tuple[Launch, tuple[str, ...]]]):
        self.launches = launches  # name → launch, dtypes of what it reads
        self.memory: dict[int, np.ndarray] = {}
        self.functions: list[str] = []
        self.captured: list | None = None
        self.launched: list[str] = []
        self.replayed = 0
        self.refuses: dict[str, int] = {}  # function → the error that it returns

    def __getattribute__(self, name):
        if name.startswith("cu") and name in super().__getattribute__("refuses"):
            return lambda *_: self.refuses[name]
        return super().__getattribute__(name)

    def cuCtxSynchronize(self):
        return 0

    def cuInit(self, flags):
        return 0

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = ordinal
        return 0

    def cuDevicePrimaryCtxRetain(self, context, device):
        context._obj.value = 1
        return 0

    def cuCtxSetCurrent(self, context):
        return 0

    def cuStreamCreate(self, stream, flags):
        stream._obj.value = 7
        return 0

    def cuDeviceGetName(self, name, size, device):
        name.value = b"NVIDIA fake"
        return 0

    def cuDriverGetVersion(self, version):
        version._obj.value = 13000
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        value._obj.value = {16: 132, 38: 50 * 2**20}[attribute]
        return 0

    def cuModuleLoadData(self, module, image):
        self.functions.append(image.decode())
        module._obj.value = len(self.functions)
        return 0

    def cuModuleGetFunction(self, function, module, symbol):
        launch, _ = self.launches[self.functions[module.value - 1]]
        assert symbol.decode() == launch.kernel.__name__
        function._obj.value = module.value
        return 0

    def cuOccupancyMaxActiveBlocksPerMultiprocessor(self, resident, function, threads, shared):
        resident._obj.value = 2
        return 0

    def cuFuncGetAttribute(self, value, attribute, function):
        value._obj.value = {3: 0, 4: 64}[attribute]
        return 0

    def cuMemAlloc_v2(self, address, size):
        block = np.full(size.value, 0xAB, np.uint8)
        address._obj.value = block.ctypes.data
        self.memory[block.ctypes.data] = block
        return 0

    def cuMemFree_v2(self, address):
        del self.memory[address.value]
        return 0

    def cuMemcpyHtoD_v2(self, address, host, size):
        ctypes.memmove(address.value, host.value, size.value)
        return 0

    def cuMemcpyDtoH_v2(self, host, address, size):
        ctypes.memmove(host.value, address.value, size.value)
        return 0

    def cuMemsetD32Async(self, address, value, count, stream):
        assert stream.value == 7 and value == 0 and 4 * count.value <= self.memory[address.value].nbytes
        return self.queue(lambda: ctypes.memset(address.value, 0, 4 * count.value))

    def cuLaunchKernel(self, function, x, y, z, threads, ty, tz, shared, stream, parameters, extra):
        assert (y, z, ty, tz, extra, stream.value) == (1, 1, 1, 1, None, 7)
        name = self.functions[function.value - 1]
        launch, arrays = self.launches[name]
        assert (x, threads) == (launch.programs, 32 * launch.tiling.warps)
        at = iter(list(parameters))
        given = [self.array(next(at), dtype) for dtype in arrays]
        numbers = [n if n == 1 else number(next(at), n) for n in launch.numbers]
        written = [self.array(next(at), output.dtype) for output in launch.outputs]
        assert all(ctypes.c_uint64.from_address(a).value == 0 for a in at)  # Triton's scratch

        def run():
            self.launched.append(name)
            interpreter.run(launch.kernel, x, *given, *numbers, *written, **launch.constants)

        return self.queue(run)

    def array(self, parameter, dtype):
        return self.memory[ctypes.c_uint64.from_address(parameter).value].view(DTYPES[dtype])

    def queue(self, call):
        if self.captured is None:
            call()
        else:
            self.captured.append(call)
        return 0

    def cuStreamSynchronize(self, stream):
        assert self.captured is None, "a stream that is captured is not waited for"
        return 0

    def cuStreamBeginCapture_v2(self, stream, mode):
        self.captured = []
        return 0

    def cuStreamEndCapture(self, stream, graph):
        graph._obj.value, self.calls, self.captured = 1, len(self.captured), None
        return 0

    def cuGraphInstantiateWithFlags(self, executable, graph, flags):
        executable._obj.value = graph.value
        return 0

    def cuGraphLaunch(self, executable, stream):
        assert self.calls
        self.replayed += 1
        return 0

    def cuEventCreate(self, event, flags):
        event._obj.value = 1
        return 0

    def cuEventElapsedTime(self, milliseconds, before, after):
        milliseconds._obj.value = 1
        return 0

    def cuEventRecord(self, event, stream):
        return 0

    cuEventDestroy_v2 = cuGraphExecDestroy = cuGraphDestroy = cuCtxSetCurrent


def number(parameter, like):
    """A number as the kernel takes it."""
    kind = ctypes.c_float if isinstance(like, float) else ctypes.c_int64 if like >= 2**31 else ctypes.c_int32
    return kind.from_address(parameter).value
