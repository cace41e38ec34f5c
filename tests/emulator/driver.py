"""A CPU that passes for a CUDA GPU: what jax-triton would hand to NVIDIA's driver runs on `machine` instead.

Everything above is as on a GPU: the choice of kernels, jax-triton's compilation, the arguments, sizes and zeroed memory
that it writes into the program. XLA, below, compiles for the CPU and calls back, which it cannot out of what it has
split over an automatic mesh.
"""

import dataclasses
import os
import zlib
from contextlib import contextmanager
from functools import partial

import jax
import kept
import machine
import numpy as np
import plugin
import pytest
from jax._src.interpreters.mlir import _platform_specific_lowerings
from jax.interpreters import mlir

ON_GPU = bool(os.environ.get("JBN_TEST_GPU"))
KERNELS = {}  # that jax-triton has made in this process, by all that they depend on


@contextmanager
def gpu():
    """Kernels run in here: with JBN_TEST_GPU=1 on a GPU, elsewhere as `installed` has it. Without jax-triton skips."""
    pytest.importorskip("jbn._op.jax_triton", reason="jax-triton is not installed", exc_type=ImportError)
    if ON_GPU:
        yield None
    else:
        with installed() as calls:
            yield calls


@contextmanager
def installed():
    """Kernels run in here wherever jax compiles for the CPU; yields the list of their calls, as they are compiled."""
    from jbn._op.jax_triton import jax_triton

    calls = []

    class Call(plugin.TritonKernelCall):
        def to_proto(self, _name, _metadata):
            calls.append(self)
            return str(len(calls) - 1).encode()

    def ffi_lowering(_target, *, backend_config, **_):
        call = calls[int(zlib.decompress(backend_config))]

        def rule(ctx, *operands):
            outputs = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ctx.avals_out]

            def ask(*arrays):
                return jax.pure_callback(partial(launch, call, outputs), outputs, *arrays)

            return mlir.lower_fun(ask, multiple_results=True)(compiling_for("cpu", ctx), *operands)

        return rule

    with pytest.MonkeyPatch.context() as patch:
        plugin.replace(patch, TritonKernelCall=Call)
        patch.setattr(jax_triton.triton_lib, "_COMPILED_KERNEL_CACHE", KERNELS)
        patch.setattr(jax.ffi, "ffi_lowering", ffi_lowering)
        for primitive, entry in _platform_specific_lowerings["cuda"].items():
            if primitive.name.startswith("jbn_"):
                patch.setitem(_platform_specific_lowerings["cpu"], primitive, entry)
            elif primitive.name == "triton_kernel_call":
                entry = dataclasses.replace(entry, rule=partial(as_cuda, entry.rule))
                patch.setitem(_platform_specific_lowerings["cpu"], primitive, entry)
        jax.clear_caches()
        try:
            yield calls
        finally:
            jax.clear_caches()


def compile_once(patch) -> None:
    """What jax-triton compiles is kept for all tests, if it is installed."""
    try:
        from jbn._op.jax_triton import jax_triton
    except ImportError:
        return
    triton_lib = jax_triton.triton_lib

    compile_ = triton_lib.compile_ttir_inplace

    def once(module, backend, options, *rest):
        # as a text, for what is compiled is changed in place; options but for a path of the installation
        chosen = {name: value for name, value in vars(options).items() if name != "extern_libs"}
        key = "jax-triton", str(module), chosen, *rest
        return kept.once(key, lambda: compile_(module, backend, options, *rest))

    patch.setattr(triton_lib, "compile_ttir_inplace", once)


def compiling_for(platform: str, ctx):
    return ctx.replace(module_context=ctx.module_context.replace(platforms=(platform,)))


def as_cuda(rule, ctx, *operands, **parameters):
    return rule(compiling_for("cuda", ctx), *operands, **parameters)


def launch(call, outputs, *arrays):
    """The outputs of a call; what it neither writes nor has zeroed is NaN."""
    given = [np.array(a) for a in arrays]
    written = [np.frombuffer(b"\xff" * o.size * o.dtype.itemsize, o.dtype).reshape(o.shape).copy() for o in outputs]
    pointers = iter([*given, *written])
    arguments = []
    for value, kind in call.parameters:  # of a scalar; of an array how many bytes are to be zero, and what divides it
        if isinstance(kind, str):
            arguments.append(value)
        else:
            arguments.append(next(pointers))
            arguments[-1].reshape(-1).view(np.uint8)[:value] = 0
    machine.run(call.kernel.binary, call.x, arguments, call.kernel.shared)
    return written
