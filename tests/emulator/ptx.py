"""Reads PTX, the assembly that NVIDIA's driver is given, and computes what its instructions do to registers.

A register is an array over the threads of a program, of unsigned integers; what an instruction takes it for is in the
instruction's name (`add.f32`). What Triton 3.6 to 3.9 makes of this project's kernels is known, anything else raises.
Semantics: NVIDIA, Parallel Thread Execution ISA, version 9; approximations are off by one or two units in the last
place, either way. Behind PTX ptxas may still fuse a product into a sum, where neither asks for rounding (`.rn`).
"""

import functools
import re
from typing import NamedTuple

import ml_dtypes
import numpy as np

KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16, "f32": np.float32, "pred": np.bool_}
KINDS |= {f"{pair[0]}{8 * n}": np.dtype(f"{pair[1]}{n}") for pair in ("bu", "uu", "si") for n in (1, 2, 4, 8)}
KINDS |= {f"{name}x2": KINDS[name] for name in ("bf16", "f16", "f32")}  # two in a register
KINDS = {name: np.dtype(kind) for name, kind in KINDS.items()}
REGISTERS = {"%p": KINDS["pred"], "%rs": KINDS["b16"], "%r": KINDS["b32"], "%rd": KINDS["b64"]}
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x", "global_smem")


def kind_of(register: str) -> np.dtype:
    return KINDS["b32"] if register in SPECIAL else REGISTERS[register.rstrip("0123456789")]


class Instruction(NamedTuple):
    """One line: `@%p1 ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1 + 16];`"""

    name: tuple[str, ...]  # ("ld", "global", "v4", "b32")
    operands: tuple  # a register, a number or a symbol as written; a tuple of these for {…}; an Address for […]
    predicate: str | None
    negated: bool
    text: str


class Address(NamedTuple):
    base: str
    offset: int


class Function(NamedTuple):
    name: str
    parameters: tuple[tuple[str, str], ...]  # (kind, name)
    threads: int
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # the instruction behind each


def read(text: str) -> Function:
    """The only function of a module."""
    text = re.sub(r"//.*", "", text)
    name, parameters, body = re.search(r"\.entry (\w+)\((.*?)\)(.*?\n\})", text, re.DOTALL).groups()
    (threads,) = re.search(r"\.reqntid (\d+)", body).groups()
    instructions, labels = [], {}
    # braces that open or close a line are scopes; within a line they are vectors
    for line in re.sub(r"(?m)^\s*[{}]\s*$", "", body).splitlines():
        while found := re.match(r"\s*([$\w]+):", line):
            labels[found.group(1)] = len(instructions)
            line = line[found.end() :]
        for part in filter(None, map(str.strip, line.split(";"))):
            if not part.startswith("."):
                instructions.append(_instruction(" ".join(part.split())))
    kinds = tuple(re.findall(r"\.param \.(\w+)[^,]*? (\w+)(?:,|\s*$)", parameters))
    return Function(name, kinds, int(threads), tuple(instructions), labels)


def _instruction(text: str) -> Instruction:
    negated, predicate, name, rest = re.fullmatch(r"(?:@(!?)(%p\d+)\s+)?([\w.:]+)\s*(.*)", text).groups()
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
    parts = tuple(name.replace("::", "__").split("."))
    return Instruction(parts, tuple(map(_operand, operands)), predicate, negated == "!", text)


def _operand(text: str):
    if text[0] == "{":
        return tuple(text.strip("{} ").replace(",", " ").split())
    if text[0] == "[":
        base, offset = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text).groups()
        return Address(base, int(offset or 0))
    return text


def literal(text: str, kind: np.dtype) -> np.generic:
    """A number as written, of a kind: 12, -1, 0x7770U, 0f3F800000 (the bits of a float32), 1.0."""
    if text.startswith("0f"):
        bits = np.uint32(int(text[2:], 16))
        return bits.view(np.float32).astype(kind) if kind.kind == "f" else bits.astype(kind)
    if kind.kind not in "iu":
        return kind.type(float(text))
    return np.uint64(int(text.rstrip("U"), 0) % 2**64).astype(f"u{kind.itemsize}").view(kind)


def _shift(operation):
    """Shifts by as many bits as there are, or more, leave nothing (or the sign)."""

    def shift(a, n):
        bits = 8 * a.dtype.itemsize
        n = n.astype(np.uint32)
        beyond = a >> a.dtype.type(bits - 1) if operation is np.right_shift and a.dtype.kind == "i" else a ^ a
        return np.where(n < bits, operation(a, np.minimum(n, bits - 1).astype(a.dtype)), beyond)

    return shift


def _approximate(exact):
    """Off in the last place, by one or two either way, as the exact result's bits have it."""
    bits = exact.view(np.int32)
    off = np.array([-2, -1, 1, 2], np.int32)[bits.view(np.uint32) * np.uint32(2654435761) >> np.uint32(30)]
    return np.where(np.isfinite(exact) & (exact != 0), (bits + off).view(np.float32), exact)


def _divided(a, b):
    if a.dtype.kind == "f":
        return a / b
    quotient = np.abs(a.astype(np.int64)) // np.maximum(np.abs(b.astype(np.int64)), 1)  # towards zero
    return (quotient * np.sign(a.astype(np.int64)) * np.sign(b.astype(np.int64))).astype(a.dtype)


def _fused(a, b, c):
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def _extracted(a, position, length):
    """bfe: bits [position, position + length), with a sign where a has one."""
    wide = a.view(np.uint32).astype(np.int64) >> position.astype(np.int64)
    field = wide & ((1 << length.astype(np.int64)) - 1)
    if a.dtype.kind == "i":  # the sign is the field's last bit that there is
        sign = 1 << np.clip(length.astype(np.int64) - 1, 0, 31 - position.astype(np.int64))
        field = (field ^ sign) - sign
    return field.astype(a.dtype)


def _bytes_picked(a, b, selector):
    """prmt: each nibble of the selector names one of eight bytes; its high bit asks for that byte's sign all over."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        nibble = selector.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(128), 255, 0), byte)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _funnel(a, b, n):
    """shf.l.wrap: the high half of (b, a) shifted left."""
    both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
    return (both << (n & 31).astype(np.uint64) >> np.uint64(32)).astype(np.uint32)


def _unordered(compare):
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


COMPARE = dict(eq=np.equal, lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal)
COMPARE |= {name + "u": _unordered(compare) for name, compare in [*COMPARE.items(), ("ne", np.not_equal)]}
COMPARE |= {
    "ne": lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b)) if a.dtype.kind == "f" else a != b,
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
}

# by first name; operands and result are of the kind that the last name says
PLAIN = {
    "mov": lambda a: a,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "mad": lambda a, b, c: a * b + c,
    "fma": _fused,
    "div": _divided,
    "rem": lambda a, b: a - _divided(a, b) * b,
    "max": np.fmax,  # NaN only if both are
    "abs": np.abs,
    "neg": np.negative,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "shf": _funnel,
    "bfe": _extracted,
    "prmt": _bytes_picked,
    "rsqrt": lambda a: 1 / np.sqrt(np.where(np.abs(a) < np.finfo(a.dtype).tiny, a * 0, a)),  # .ftz
    "ex2": np.exp2,
}

# what may stand between an instruction's first name and its kind
MODIFIERS = {
    "mov": "", "selp": "", "add": "rn", "sub": "rn", "mul": "lo hi wide rn", "mad": "lo wide", "fma": "rn",
    "div": "rn full", "rem": "", "max": "", "abs": "", "neg": "", "and": "", "or": "", "xor": "", "not": "", "shl": "",
    "shr": "", "shf": "l wrap", "bfe": "", "prmt": "", "rsqrt": "approx ftz", "ex2": "approx ftz", "cvt": "rn",
    "setp": " ".join(COMPARE) + " and or xor",
}  # fmt: skip


@functools.cache
def rule(name: tuple[str, ...]):
    """An instruction's function of the values of its operands, each of the kind that `operand_kinds` says."""
    first = name[0]
    kinds = 2 if first == "cvt" else 1
    if first not in MODIFIERS or not set(name[1:-kinds]) <= set(MODIFIERS[first].split()):
        raise NotImplementedError(f"no rule is written for {'.'.join(name)}")
    kind = KINDS[name[-1]]
    if first == "selp":
        return lambda yes, no, chosen: np.where(chosen, yes, no)
    if first == "setp":
        return _compared(*name[1:-1])
    if first == "cvt":
        return _converted(name)
    if first in ("mul", "mad") and name[1] in ("wide", "hi"):
        bits = 8 * kind.itemsize
        if name[1] == "hi":  # Python's integers have as many bits as it takes
            return lambda a, b: (a.astype(object) * b.astype(object) >> bits).astype(kind)
        wide = np.dtype(f"{kind.kind}{bits // 4}")
        if first == "mad":
            return lambda a, b, c: a.astype(wide) * b.astype(wide) + c
        return lambda a, b: a.astype(wide) * b.astype(wide)
    found = PLAIN[first]
    return (lambda *values: _approximate(found(*values))) if "approx" in name or "full" in name else found


def _compared(first: str, second: str | None = None):
    """setp: a comparison, and what a third operand makes of it."""
    compare = COMPARE[first]
    if second is None:
        return compare
    combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[second]
    return lambda a, b, c: combine(compare(a, b), c)


def _converted(name):
    target, source = KINDS[name[-2]], KINDS[name[-1]]
    if name[-2].endswith("x2"):  # the first operand is the upper half
        return lambda high, low: np.stack([low.astype(target), high.astype(target)], -1).reshape(-1)
    if source.kind == "f" and target.kind in "iu":
        raise NotImplementedError(f"no rule is written for {'.'.join(name)}")
    return lambda value: value.astype(target)


def operand_kinds(name: tuple[str, ...], count: int) -> list[np.dtype]:
    """For each of an instruction's sources; a register of another size is taken as it is."""
    kinds = [KINDS[name[-1]]] * count
    if name[:2] == ("mad", "wide"):
        kinds[2] = np.dtype(f"{kinds[0].kind}{2 * kinds[0].itemsize}")
    if name[0] == "selp" or (name[0] == "setp" and count == 3):
        kinds[-1] = KINDS["pred"]
    if name[0] in ("shl", "shr"):
        kinds[1] = KINDS["u32"]
    if name[0] == "bfe":
        kinds[1:] = [KINDS["u32"]] * 2
    return kinds
