"""What to launch for each piece of the op: kernel, programs, numbers, outputs, constants; whoever has arrays runs it.

A kernel's arguments are the arrays in the order each function here gives, then `numbers`, then `outputs`. An array that
the options say is absent is never read: any other stands in for it.
"""

from typing import Any, NamedTuple

from jbn.kernels.apply import jbn_apply
from jbn.kernels.gradients import jbn_gradient_input, jbn_gradient_sums
from jbn.kernels.moments import jbn_moments
from jbn.kernels.tiling import Tiling, View, alignment, choose, needs_wide_offsets, stream


class Output(NamedTuple):
    shape: tuple[int, ...]
    dtype: str
    zeroed: bool = False  # must hold zeros when the kernel starts


class Launch(NamedTuple):
    kernel: Any  # @triton.jit
    tiling: Tiling
    programs: int
    resident: int  # programs that a multiprocessor is to hold at once; registers must allow it
    numbers: tuple[int | float, ...]  # 32 or 64 bits as the value asks for; floats are float32
    outputs: tuple[Output, ...]
    constants: dict[str, Any]


class Mask(NamedTuple):
    """How a mask lies: of x's shape ("full"), or a value for each row, row r's at (r // divisor) % period ("rows")."""

    kind: str
    shared: bool = False  # by all batches
    divisor: int = 1
    period: int = 1


class Problem(NamedTuple):
    """What a piece is asked for: x, the operands beside it, and what is computed."""

    view: View
    dtype: str  # of x
    count: float = 1  # divides the sums where there are no weights
    scale: bool = True
    bias: bool = True
    residual: bool = False
    activation: str | None = None
    mask: Mask | None = None
    weight: bool = False  # sums are divided by data, not by the count
    centred: bool = True  # the statistics are x's own
    negative_slope: float = 0.01  # of leaky_relu


ABSENT = Output((1,), "float32")
ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4}
LONG = ("gelu", "gelu_exact", "mish", "elu", "tanh")  # activations whose expressions take registers of their own


def moments(problem: Problem, processors: int, tiling: Tiling | None = None, capability: int = 80) -> Launch:
    """Arrays: x, mask. Outputs: count (with a mask), mean, var, scratch, scratch.

    `capability` is the device's, times ten.
    """
    view, mask = problem.view, problem.mask
    if _has_few_rows(problem):
        resident, unroll = 2, 2
        tiling = tiling or _tiling(problem, processors, 4096, resident, alone=True)
    elif mask is None and view.inner == 1:  # the fastest on an H100 over all sizes, within 5 % of each size's own best
        # four tiles in flight are up to 14 % faster on an H200; for sm_100 Triton 3.6 needs too many registers for them
        resident, unroll = 4, 4 if problem.dtype != "float32" and capability == 90 else 2
        tiling = tiling or _tiling(problem, processors, 4096 // ITEMSIZE[problem.dtype], resident, warps=4, wide=False)
    else:
        # seen in the binaries: what fits into the registers without spills
        resident, unroll = {"none": (3, 4), "rows": (3, 2), "full": (2, 2)}[mask.kind if mask else "none"]
        if mask is None and view.inner % 8:
            resident = 2  # elements that are loaded one by one take more of them
        if mask is not None and view.inner > 1:
            unroll = 1
        elif mask is None and problem.dtype == "float32":
            unroll = 2  # as many bytes in flight
        tiling = tiling or _tiling(problem, processors, 2048, resident)
    vector = Output((view.batch, view.channels), "float32")
    outputs = (vector if mask else ABSENT, vector, vector, *_scratch(view, tiling, 3 if mask else 2))
    numbers = (*_numbers(view, tiling), *_mask_numbers(mask))
    constants = _constants(view, tiling) | _merging(tiling, unroll) | _masking(mask)
    constants["RAGGED"] = view.rows % tiling.ROWS != 0
    return Launch(jbn_moments, tiling, tiling.programs(view), resident, numbers, outputs, constants)


def apply(problem: Problem, dtype: str, processors: int, tiling: Tiling | None = None) -> Launch:
    """Arrays: x, mean, var, epsilon, scale, bias, residual. Output: y, of `dtype`."""
    view = problem.view
    if view.inner == 1:
        resident, tiling = 4, tiling or stream(view, ITEMSIZE[problem.dtype])
    else:
        resident = 2 if problem.activation in LONG else 3
        tiling = tiling or _tiling(problem._replace(mask=None), processors, 4096, resident)
    numbers = _numbers(view, tiling)
    constants = _constants(view, tiling) | dict(
        ONE=tiling.is_one_each(view),
        HAS_SCALE=problem.scale,
        HAS_BIAS=problem.bias,
        HAS_RESIDUAL=problem.residual,
        **_activation(problem),
    )
    outputs = (Output(tuple(view), dtype),)
    return Launch(jbn_apply, tiling, tiling.programs(view), resident, numbers, outputs, constants)


def gradient_sums(
    problem: Problem, kept: str | None, processors: int, tiling: Tiling | None = None, capability: int = 80
) -> Launch:
    """Arrays: x, mean, var, epsilon, scale, bias, residual, mask, ȳ.

    Outputs: Σz̄, Σz̄x̂, z̄ (of the dtype `kept`, if any), scratch, scratch. `capability` as of `moments`.
    """
    view, fused = problem.view, _is_fused(problem)
    several = 2 if problem.dtype == "float32" else 1  # seen in the binaries: what needs no spills
    # for sm_100 Triton 3.9 spills a long activation by tiles of 4096
    if problem.activation in LONG and (fused or problem.mask is not None or view.inner > 1 or capability >= 100):
        resident, elements = 2, 4096 // ITEMSIZE[problem.dtype]  # one access a thread, of each tensor
        unroll = several if fused or problem.mask is not None or capability < 90 else 2
    elif fused:
        resident, elements, unroll = 2, 2048, several
        if capability >= 90 and problem.activation == "relu" and _is_plain(problem) and kept != "float32":
            elements = 4096  # an H200 is 4 to 18 % faster, an H100 up to 6; sm_80 has too few registers, or spills
    elif problem.mask is None and view.inner == 1:
        resident, elements, unroll = 2, 4096, 2  # up to 14 % faster on an H100 than less
    else:
        # as many bytes in flight, whatever the dtype
        resident = 2 if problem.activation or problem.mask else 3
        elements, unroll = 2048, 1 if problem.dtype == "float32" else 2
    tiling = tiling or _tiling(problem, processors, elements, resident, alone=not fused and _has_few_rows(problem))
    vector = Output((view.batch, view.channels), "float32")
    outputs = (vector, vector, Output(tuple(view), kept) if kept else ABSENT, *_scratch(view, tiling, 2))
    numbers = (*_numbers(view, tiling), *_mask_numbers(problem.mask))
    constants = _constants(view, tiling) | _merging(tiling, unroll, fewer=problem.dtype != "float32")
    constants |= _derivative(problem) | dict(KEEP=kept is not None)
    return Launch(jbn_gradient_sums, tiling, tiling.programs(view), resident, numbers, outputs, constants)


def gradient_input(
    problem: Problem, dtype: str, kept: str | None, processors: int, tiling: Tiling | None = None
) -> Launch:
    """Arrays: x, mean, var, epsilon, scale, bias, weight, residual, mask, ȳ, Σz̄, Σz̄x̂.

    Outputs: x̄ of `dtype`, z̄ (of the dtype `kept`, if any). With ȳ = z̄ and no activation, it needs no residual.
    """
    if not problem.centred and problem.activation is None:
        problem = problem._replace(mask=None)  # x̄ = scale · rstd · ȳ
    view = problem.view
    if view.inner == 1 and problem.mask is None:
        resident, tiling = 4, tiling or stream(view, ITEMSIZE[problem.dtype])
    else:
        long, fused = problem.activation in LONG, _is_fused(problem)
        resident = 2 if fused or (long and (problem.mask is not None or view.inner % 8)) else 3
        elements = 4096 // ITEMSIZE[problem.dtype] if long else 2048
        tiling = tiling or _tiling(problem, processors, elements, resident)
    numbers = (float(problem.count), *_numbers(view, tiling), *_mask_numbers(problem.mask))
    outputs = (Output(tuple(view), dtype), Output(tuple(view), kept) if kept else ABSENT)
    constants = _constants(view, tiling) | _derivative(problem)
    constants |= dict(
        ONE=tiling.is_one_each(view),
        HAS_SCALE=problem.scale,
        HAS_WEIGHT=problem.weight and problem.centred,
        CENTRED=problem.centred,
        KEEP=kept is not None,
    )
    return Launch(jbn_gradient_input, tiling, tiling.programs(view), resident, numbers, outputs, constants)


def _tiling(
    problem: Problem, processors: int, elements: int, resident: int, alone: bool = False, **options: Any
) -> Tiling:
    """`choose` for a reduction; `alone`: one program for a block of channels."""
    rows = problem.mask is not None and problem.mask.kind == "rows"
    tiling = choose(problem.view, ITEMSIZE[problem.dtype], processors, elements, resident, rows, **options)
    return tiling._replace(splits=1) if alone else tiling


def _numbers(view: View, tiling: Tiling) -> tuple[int, ...]:
    return view.outer, view.channels // alignment(view.channels), tiling.splits


def _mask_numbers(mask: Mask | None) -> tuple[int, ...]:
    return (1, 1) if mask is None else (mask.divisor, mask.period)


def _constants(view: View, tiling: Tiling) -> dict[str, Any]:
    return dict(
        S=view.inner,
        UNIT=alignment(view.channels),
        ROWS=tiling.ROWS,
        CHANNELS=tiling.CHANNELS,
        WIDE=needs_wide_offsets(view, tiling),
    )


def _is_fused(problem: Problem) -> bool:
    """Whether z, of which the activation's derivative is made, is a sum with a residual."""
    return problem.residual and problem.activation is not None


def _is_plain(problem: Problem) -> bool:
    """Of 16 bits, channels last, without a mask: what an H200 was asked about in detail."""
    return problem.mask is None and problem.view.inner == 1 and problem.dtype != "float32"


def _has_few_rows(problem: Problem) -> bool:
    """Whether a block of channels is for one program, so that nothing is merged, nor zeroed before it."""
    return _is_plain(problem) and problem.view.rows <= 2048 and problem.view.channels >= 1024


def _merging(tiling: Tiling, unroll: int, fewer: bool = False) -> dict[str, Any]:
    """Partial results are merged 1024 at once: more would need more registers than the rest of the kernel.

    `fewer`: no more at once than there are programs, which takes a microsecond less. But where the loop before has
    registers to spare, it is up to 28 % slower: the compiler has fewer loads in flight in it.
    """
    once = 1024 // tiling.CHANNELS
    if fewer:
        once = min(once, 1 << (tiling.splits - 1).bit_length())
    return dict(SPLIT=tiling.splits > 1, SPLITS=once, UNROLL=unroll)


def _derivative(problem: Problem) -> dict[str, Any]:
    """z̄ = ȳ where there is no activation: then nothing is needed to recompute z."""
    recomputed = problem.activation is not None
    return dict(
        HAS_SCALE=problem.scale and recomputed,
        HAS_BIAS=problem.bias and recomputed,
        HAS_RESIDUAL=problem.residual and recomputed,
        **_activation(problem),
        **_masking(problem.mask),
    )


def _activation(problem: Problem) -> dict[str, Any]:
    return dict(ACTIVATION=problem.activation or "none", NEGATIVE_SLOPE=problem.negative_slope)


def _masking(mask: Mask | None) -> dict[str, Any]:
    return dict(MASK="none", SHARED=True) if mask is None else dict(MASK=mask.kind, SHARED=mask.shared)


def _scratch(view: View, tiling: Tiling, fields: int) -> tuple[Output, Output]:
    """What programs hand to the last of them, and how many have; the former is read with 32-bit offsets."""
    if tiling.splits == 1:
        return ABSENT, ABSENT
    if tiling.splits * fields * view.channels >= 2**31:  # never by `choose`, for x below 500 GB
        raise ValueError(f"{tiling} has {tiling.splits} programs for {view.channels} channels: give it fewer")
    return (
        Output((view.batch, tiling.splits, fields, view.channels), "float32"),
        Output((view.batch, tiling.blocks(view)), "int32", zeroed=True),
    )
