"""The machine that runs compiled kernels: it computes what PTX says, and finds the faults it is there for."""

import re
from functools import partial

import machine
import numpy as np
import pytest

pytest.importorskip("triton", reason="Triton is not installed")

import compiled
import problems

from jbn.kernels import launches
from jbn.kernels.launches import Problem
from jbn.kernels.tiling import Tiling, View

MODULE = """
.version 8.0
.target sm_80
.extern .shared .align 16 .b8 global_smem[];
.visible .entry test(
	.param .u64 .ptr .global .align 1 test_param_0,
	.param .u32 test_param_1
)
.reqntid 64
{{
	.reg .pred 	%p<9>;
	ld.param.b64 	%rd1, [test_param_0];
	ld.param.b32 	%r9, [test_param_1];
	mov.u32 	%r1, %tid.x;  // 0 to 63
	mov.u32 	%r2, %ctaid.x;
	mul.wide.s32 	%rd2, %r1, 4;
	add.s64 	%rd2, %rd1, %rd2;
{body}
	ret;
}}
"""


def run(body, programs=1, number=0, kind=np.uint32, **options):
    """What the body, in which %rd2 is the thread's address in an array of 64 numbers, makes of that array."""
    array = np.full(64, 7, kind)
    report = machine.run(MODULE.format(body=body), programs, [array, number], shared=256, **options)
    return array, report


def stored(lines):
    """The bits of %r3 behind these lines."""
    return run(f"{lines}\nst.global.b32 [%rd2], %r3;")[0]


LANE = np.arange(64)


@pytest.mark.parametrize(
    "lines, wanted",
    [
        ("sub.s32 %r4, %r1, 40; div.s32 %r3, %r4, 16;", np.trunc((LANE - 40) / 16)),
        ("sub.s32 %r4, %r1, 40; rem.s32 %r3, %r4, 16;", np.fmod(LANE - 40, 16)),
        ("sub.s32 %r4, %r1, 40; shr.s32 %r3, %r4, 3;", (LANE - 40) >> 3),
        ("shl.b32 %r3, %r1, 32;", 0 * LANE),
        ("bfe.u32 %r3, %r1, 1, 3;", LANE >> 1 & 7),
        ("bfe.s32 %r3, %r1, 0, 2;", [0, 1, -2, -1] * 16),
        ("mad.lo.s32 %r3, %r1, -3, 5;", 5 - 3 * LANE),
        ("mul.hi.u32 %r3, %r1, 0x80000000U;", LANE >> 1),
        ("prmt.b32 %r3, %r1, 0, 0x4440U;", LANE),
        ("prmt.b32 %r3, %r1, 0, 0x4404U;", LANE << 8),
        ("shf.l.wrap.b32 %r3, 0x80000000U, %r1, 1;", LANE * 2 + 1),
        ("shfl.sync.bfly.b32 %r3, %r1, 4, 31, -1;", LANE ^ 4),
        ("shfl.sync.idx.b32 %r3, %r1, 5, 31, -1;", LANE // 32 * 32 + 5),
        ("setp.lt.s32 %p1, %r1, 9; selp.b32 %r3, %r1, -1, %p1;", np.where(LANE < 9, LANE, -1)),
        ("mov.b32 %r3, 3; setp.ge.s32 %p1, %r1, 9; @!%p1 mov.b32 %r3, %r1;", np.where(LANE < 9, LANE, 3)),
        ("cvt.u16.u32 %rs1, %r1; mov.b32 %r3, {%rs1, %rs1};", LANE * 65537),
        ("mov.b32 {%rs1, %rs2}, %r1; cvt.u32.u16 %r3, %rs1;", LANE),
        ("cvt.rn.f32.s32 %r4, %r1; cvt.rn.bf16.f32 %rs1, %r4; cvt.u32.u16 %r4, %rs1; shl.b32 %r3, %r4, 16;",
         LANE.astype(np.float32).view(np.int32)),
        ("cvt.rn.f32.s32 %r4, %r1; cvt.rn.f16x2.f32 %r5, %r4, 0f00000000; shr.u32 %r3, %r5, 26;",
         LANE.astype(np.float16).view(np.uint16) >> 10),  # the upper half is the first operand's
        ("setp.lt.s32 %p1, %r1, 9; selp.b32 %r3, 0f3F800000, %r1, %p1;", np.where(LANE < 9, 0x3F800000, LANE)),
    ],
)  # fmt: skip
def test_instructions(lines, wanted):
    np.testing.assert_array_equal(stored(lines).view(np.int32), wanted)


def test_floats():
    """max of a NaN and a number is the number; fma rounds once."""
    lines = "mov.b32 %r4, 0f7FC00000; max.f32 %r3, %r4, 0f40000000;"
    np.testing.assert_array_equal(stored(lines).view(np.float32), 2)
    # (1 + 2⁻¹²)² - 1 - 2⁻¹¹ = 2⁻²⁴, which a rounded product has lost
    lines = "mov.b32 %r4, 0f3F800800; mov.b32 %r5, 0fBF801000; fma.rn.f32 %r3, %r4, %r4, %r5;"
    np.testing.assert_array_equal(stored(lines).view(np.float32), 2.0**-24)


def test_parameters_with_a_sign():
    """A register twice as wide gets the sign all over."""
    lines = "ld.param.s32 %rd4, [test_param_1]; shr.s64 %rd4, %rd4, 32; cvt.u32.u64 %r3, %rd4;"
    lines += "st.global.b32 [%rd2], %r3;"
    np.testing.assert_array_equal(run(lines, number=2**32 - 5)[0], 2**32 - 1)
    np.testing.assert_array_equal(run(lines, number=5)[0], 0)


def test_matrices():
    """Each lane of a warp has two half words of 8 × 8: a row is four lanes' bytes, one after the other."""
    lines = """
    and.b32 %r4, %r1, 7; shl.b32 %r4, %r4, 4; shr.u32 %r5, %r1, 5; shl.b32 %r5, %r5, 7; add.s32 %r4, %r4, %r5;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r4], {%r1}; bar.sync 0; shl.b32 %r5, %r1, 2;
    """
    np.testing.assert_array_equal(stored(f"{lines} ld.shared.b32 %r3, [%r5];"), LANE)
    again = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r3}, [%r4];"
    np.testing.assert_array_equal(stored(f"{lines} {again}"), LANE)


def test_traffic_and_sectors():
    """A warp that loads every other number asks for 128 bytes, and touches 256."""
    lines = "mul.wide.s32 %rd3, %r1, 4; add.s64 %rd3, %rd2, %rd3; setp.lt.s32 %p1, %r1, 32;"
    _, report = run(f"{lines} @%p1 ld.global.b32 %r3, [%rd3]; st.global.b32 [%rd2], %r1;")
    assert report == machine.Report(loaded=(128,), stored=(256,), sectors_loaded=(256,), sectors_stored=(256,))


@pytest.mark.parametrize(
    "lines, error, message",
    [
        ("st.global.b32 [%rd2 + 4], %r1;", IndexError, r"4 bytes at \[256\] of 256, array 0"),
        ("ld.global.b32 %r3, [%rd2 + -4];", IndexError, "no array is at"),
        ("setp.lt.s32 %p1, %r1, 9; @%p1 st.global.v2.b32 [%rd2], {%r1, %r1};", ValueError, "8 bytes at .* not aligned"),
        ("st.global.b32 [%rd1], %r1;", RuntimeError, "threads write different values to one place"),
        ("setp.lt.s32 %p1, %r1, 9; @%p1 bra $L;\n$L:", RuntimeError, "threads of a program part here"),
        ("mov.b32 %r4, 0; st.shared.b32 [%r4], %r1;", RuntimeError, "threads write different values to one place"),
        ("shl.b32 %r4, %r1, 2; st.shared.b32 [%r4], %r1; xor.b32 %r4, %r4, 128; ld.shared.b32 %r3, [%r4];",
         RuntimeError, "two warps share a byte with no barrier between"),
        ("shl.b32 %r4, %r1, 2; ld.shared.b32 %r3, [%r4]; xor.b32 %r4, %r4, 128; st.shared.b32 [%r4], %r1;",
         RuntimeError, "two warps share a byte with no barrier between"),
        ("shl.b32 %r4, %r1, 2; st.shared.b32 [%r4], %r1; xor.b32 %r4, %r4, 128;\nbar.warp.sync -1;"
         " ld.shared.b32 %r3, [%r4];",
         RuntimeError, "two warps share a byte with no barrier between"),
        ("mov.b32 %r4, 4; ld.shared.v2.b32 {%r3, %r5}, [%r4];", ValueError, "are not aligned, shared memory"),
        ("mov.b32 %r4, -4; ld.shared.b32 %r3, [%r4];", IndexError, "of 256, shared memory"),
        ("setp.lt.s32 %p1, %r1, 9; @%p1 bar.sync 0;", NotImplementedError, "bar.sync 0 and ret of all threads"),
        ("popc.b32 %r3, %r1;", NotImplementedError, "no rule is written for popc.b32"),
        ("shf.r.wrap.b32 %r3, %r1, %r1, 1;", NotImplementedError, "no rule is written for shf.r.wrap.b32"),
        ("max.NaN.f32 %r3, %r1, %r1;", NotImplementedError, "no rule is written for max.NaN.f32"),
        ("ld.shared.s8 %r3, [%r1];", NotImplementedError, "no rule is written for ld.shared.s8"),
    ],
)  # fmt: skip
def test_faults(lines, error, message):
    with pytest.raises(error, match=message) as caught:
        run(lines)
    assert "program 0, " in caught.value.__notes__[0]


def test_programs_that_write_the_same_place():
    with pytest.raises(RuntimeError, match="programs write the same bytes of array 0"):
        run("add.s32 %r3, %r1, %r2; st.global.b32 [%rd2], %r3;", programs=2)


def test_shared_memory_starts_as_poison():
    np.testing.assert_array_equal(stored("shl.b32 %r4, %r1, 2; ld.shared.b32 %r3, [%r4];"), 2**32 - 1)


def test_a_barrier_lets_warps_share():
    lines = (
        "shl.b32 %r4, %r1, 2; st.shared.b32 [%r4], %r1; bar.sync 0; xor.b32 %r4, %r4, 128; ld.shared.b32 %r3, [%r4];"
    )
    np.testing.assert_array_equal(stored(lines), LANE ^ 32)


READ = "@%p1 ld.global.b32 %r3, [%rd3];"


@pytest.mark.parametrize("early", [True, False])
def test_what_is_read_before_the_atomic_may_not_be_there_yet(early):
    """Of two programs each writes 16 numbers; who arrives last passes on what it has read of the other's."""
    before, after = (READ, "") if early else ("", READ)
    body = f"""
    setp.lt.s32 %p1, %r1, 16; setp.eq.b32 %p2, %r1, 0; mul.lo.s32 %r4, %r2, 64; cvt.s64.s32 %rd4, %r4;
    add.s64 %rd3, %rd2, %rd4; add.s32 %r5, %r1, 100; @%p1 st.global.b32 [%rd3], %r5;
    sub.s64 %rd3, %rd2, %rd4; add.s64 %rd3, %rd3, 64;
    bar.sync 0;
    {before}
    @%p2 atom.global.gpu.acq_rel.add.u32 %r6, [%rd1 + 252], 1;
    mov.b32 %r7, 0; @%p2 st.shared.b32 [%r7], %r6; bar.sync 0; ld.shared.b32 %r6, [%r7];
    {after}
    setp.eq.b32 %p3, %r6, 8; and.pred %p1, %p1, %p3; @%p1 st.global.b32 [%rd2 + 128], %r3;
    """
    passed_on = [run(body, programs=2, seed=seed)[0][32:48] for seed in range(20)]
    right = [np.array_equal(found, 100 + np.arange(16)) for found in passed_on]
    assert any(right) if early else all(right)
    assert not (early and all(right))


@pytest.mark.parametrize("missing", [None, "barriers", "release"])
def test_the_last_program_reads_what_others_wrote(missing, monkeypatch):
    """In the compiled kernel: without the barriers before the atomic, or its release, some of it is not there yet."""
    view = View(1, 600, 8, 1)
    launch = launches.moments(Problem(view, "float32", view.rows), 132, Tiling(64, 8, 5, 4))
    x = np.random.default_rng(0).normal(1, 2, view).astype(np.float32)
    text, shared = compiled.assembled(launch, [x, x])
    assert len(re.findall(r"atom\.global\.gpu\.acq_rel", text)) == 1
    before, after = text.split("atom.global.gpu.acq_rel")
    if missing == "barriers":  # they come before the last store instead
        last = before.rindex("\n", 0, before.rindex("st.global"))
        before = f"{before[:last]}\nbar.sync 0;{before[last:].replace('bar.sync', '// bar.sync')}"
    text = f"{before}atom.global.gpu.{'relaxed' if missing == 'release' else 'acq_rel'}{after}"

    found = []
    for seed in range(3):
        monkeypatch.setattr(problems, "run", partial(compiled.run_text, text=text, shared=shared, seed=seed))
        found.append(np.stack(problems.execute(launch, x, x)[1:3]))
    if missing is None:
        mean, var = found[0]
        np.testing.assert_allclose(mean[0], x.mean((0, 1, 3), np.float64), rtol=1e-6)
        np.testing.assert_allclose(var[0], x.var((0, 1, 3), np.float64), rtol=1e-5)
        # the order of the programs changes no bit
        assert len({each.tobytes() for each in found}) == 1
    else:
        assert np.isnan(found).any()
