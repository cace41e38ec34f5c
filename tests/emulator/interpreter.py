"""Runs Triton kernels on NumPy arrays, without torch or a GPU, and counts the bytes they load and store.

Triton's interpreter wants torch tensors; `_Pointer` has what it asks of them. Two of its results are corrected:
float32 → bfloat16 rounds to nearest even, as on a device, instead of truncating; a reduction by a function of our own
runs on whole arrays instead of element by element. Programs run one after the other, so races do not show. What
is patched is private to Triton: seen to work with 3.6.0 and 3.9.0.
"""

import functools
from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import ml_dtypes
import numpy as np
import triton
import triton.language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction


class Traffic(NamedTuple):
    """Bytes of global memory, as many times as they were asked for."""

    loaded: int
    stored: int


def run(kernel: JITFunction, programs: int, *arguments, **constants) -> Traffic:
    """Runs `kernel` on `programs` programs; NumPy arrays among the arguments are pointers, written in place."""
    arguments = [_Pointer(a) if isinstance(a, np.ndarray) else a for a in arguments]
    with _interpreting() as counts, np.errstate(all="ignore"):
        _interpreted(kernel)[(programs,)](*arguments, **constants)
    return Traffic(*counts)


def execute(launch, arrays, outputs) -> None:
    """Runs a launch; `outputs` are written in place."""
    run(launch.kernel, launch.programs, *arrays, *launch.numbers, *outputs, **launch.constants)


class _Pointer:
    """A NumPy array as a torch tensor that lies in host memory already."""

    def __init__(self, array: np.ndarray | None = None):
        self.array = array

    @property
    def dtype(self):
        return self.array.dtype

    def data_ptr(self):
        return self.array.ctypes.data

    def untyped_storage(self):
        return _Storage(self.array)

    def new_empty(self, _size, device=None):
        return _Pointer()

    def set_(self, storage, *_):
        self.array = storage.array
        return self

    def storage_offset(self):
        return 0

    def size(self):
        return self.array.shape

    def stride(self):
        return tuple(step // self.array.itemsize for step in self.array.strides)


class _Storage:
    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data

    def cpu(self):
        return self

    def copy_(self, _):
        """Nothing to bring back: kernels wrote to the array itself."""


_cache: dict[int, interpreter.InterpretedFunction] = {}  # by id: a JITFunction's hash reads its patched globals


def _interpreted(function: JITFunction) -> interpreter.InterpretedFunction:
    if id(function) not in _cache:
        _cache[id(function)] = interpreter.InterpretedFunction(function.fn)
    return _cache[id(function)]


@contextmanager
def _interpreting():
    """`triton.language` patched for the interpreter, all of it back in place behind; yields [loaded, stored]."""
    counts = [0, 0]
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counted_load(self, pointers, mask, *rest):
        counts[0] += _size(pointers, mask)
        return load(self, pointers, mask, *rest)

    def counted_store(self, pointers, value, mask, *rest):
        counts[1] += _size(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    replaced = [
        (JITFunction, "__call__", lambda self, *args, **kwargs: _interpreted(self).rewrite()(*args, **kwargs)),
        (builder, "create_masked_load", counted_load),
        (builder, "create_masked_store", counted_store),
        (tl.core.block_type, "__init__", _init_block_type),
        (tl.core.tensor, "__init__", _init_tensor),
        (TritonSemantic, "broadcast_impl_value", _broadcast_unlike),
        (interpreter, "_convert_float", _convert_float),
        (interpreter, "_get_np_dtype", _held_as),
        (interpreter, "_patch_lang_tensor", _patch_tensor),
        (interpreter.ReduceOps, "generic_reduce", _reduce),
        # whether integers overflow is worked out each time, and asserted only in debug mode
        (interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(sanitize_overflow=False)),
        (triton.knobs.runtime, "interpret", True),
    ]
    kept = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    scope = None
    try:
        for owner, name, value in replaced:
            setattr(owner, name, value)
        # the executor patches `tl` for the kernel; what `tl` defines in Triton itself sees `tl.core`
        scope = interpreter._patch_lang(tl.standard.zeros.fn)
        yield counts
    finally:
        if scope is not None:
            scope.restore()
        for owner, name, value in kept:
            setattr(owner, name, value)


class _Shape:
    """Made once and checked; by Triton anew for each tensor and its type, in half of the interpreter's time."""

    def __init__(self, *lengths: int):
        self.of_type = tl.core.tuple(lengths)
        self.of_tensor = tl.core.tuple([tl.constexpr(n) for n in lengths])
        self.size = validate_block_shape(lengths)
        self.numel = tl.constexpr(self.size)


_shape = functools.cache(_Shape)


def _init_block_type(self, element, shape):
    known = _shape(*[getattr(n, "value", n) for n in shape])
    self.element_ty, self.shape, self.numel = element, known.of_type, known.size
    self.name = f"{element} of {known.size}"


def _init_tensor(self, handle, kind):
    known = _shape(*(kind.shape if kind.is_block() else ()))
    self.handle, self.type, self.dtype = handle, kind, kind.scalar
    self.shape, self.numel = known.of_tensor, known.numel


_broadcast = TritonSemantic.broadcast_impl_value


def _broadcast_unlike(self, left, right):
    return (left, right) if left.shape is right.shape else _broadcast(self, left, right)


def _size(pointers, mask) -> int:
    kind = pointers.get_element_ty()
    asked = np.count_nonzero(np.broadcast_to(mask.data, pointers.data.shape))
    return asked * kind.primitive_bitwidth // 8


_patched_tensor = interpreter._patch_lang_tensor


def _patch_tensor(tensor, scope):
    _patched_tensor(tensor, scope)
    # triton 3.6 leaves it an array of one element, which newer NumPy does not take for an integer
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_scalar_held_as = functools.cache(interpreter._get_np_dtype)  # which builds a table each time


def _held_as(kind) -> np.dtype:
    return np.dtype(np.uint64) if kind.scalar.is_ptr() else _scalar_held_as(kind.scalar)


_truncating = interpreter._convert_float


def _convert_float(values, source, target, mode):
    if source == tl.float32 and target == tl.bfloat16:
        return values.astype(ml_dtypes.bfloat16).view(np.uint16)
    if source == tl.bfloat16 and target == tl.float32:  # exact either way, this is quick
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return _truncating(values, source, target, mode)


def _reduce(self, operands: Sequence):
    """A pairwise tree over whole arrays."""
    axis, rank = self.axis or 0, operands[0].handle.data.ndim
    if self.axis is None:
        operands = [self.to_tensor(t.handle.data.ravel(), t.dtype) for t in operands]
    kinds = [t.dtype for t in operands]
    values = [np.moveaxis(t.handle.data, axis, 0) for t in operands]
    while len(values[0]) > 1:
        half = len(values[0]) // 2
        halves = [v[:half] for v in values] + [v[half:] for v in values]
        merged = self.combine_fn.fn(*map(self.to_tensor, halves, kinds * 2))
        values = [t.handle.data for t in (merged if isinstance(merged, tuple) else (merged,))]
    values = [v[0] for v in values]
    if self.keep_dims:
        values = [np.reshape(v, (1,) * rank) if self.axis is None else np.expand_dims(v, axis) for v in values]
    return [self.to_tensor(v, k) for v, k in zip(values, kinds, strict=True)]
