"""What each instruction does to a program of `machine`: decoded once, a function of the program.

A step returns nothing, or whether the program goes on where others may come first.
"""

from collections.abc import Callable

import numpy as np
import ptx
from memory import WARP
from ptx import Address, Function, Instruction

ACCESSES = {"ld", "st", "param", "global", "shared", "shared__cta", "cg", "L1__evict_first", "L2__cache_hint"}
ACCESSES |= {"v2", "v4", "b8", "b16", "b32", "b64", "atom", "gpu", "acq_rel", "relaxed", "add", "u32"}


def decoded(function: Function, instruction: Instruction) -> Callable:
    kind = instruction.name[0]
    if kind in ("bar", "ret"):
        return _barrier(instruction)
    if kind == "bra":
        return _branch(function, instruction)
    if kind in ("ld", "st", "atom"):
        return _access(function, instruction)
    if kind in ("ldmatrix", "stmatrix"):
        return _matrix(function, instruction)
    return _computation(function, instruction)


def _barrier(instruction: Instruction):
    if instruction.text not in ("bar.sync 0", "bar.warp.sync -1", "ret"):
        raise NotImplementedError("but for bar.sync 0 and ret of all threads")
    if instruction.name[1:2] == ("warp",):  # warps run in step
        return lambda program: None
    last = instruction.name[0] == "ret"

    def step(program):
        program.barrier()
        if last:
            program.release()
        return not last

    return step


def _branch(function: Function, instruction: Instruction):
    (label,) = instruction.operands
    target, chosen = function.labels[label], _chosen(instruction)

    def step(program):
        if chosen is not None:
            taken = chosen(program)
            count = np.count_nonzero(taken)
            if count not in (0, len(taken)):
                raise RuntimeError("threads of a program part here")
            if count == 0:
                return
        program.next = target

    return step


def _chosen(instruction: Instruction):
    """Which threads carry an instruction out; None for all."""
    predicate = instruction.predicate
    if predicate is None:
        return None
    if instruction.negated:
        return lambda program: ~program.registers[predicate]
    return lambda program: program.registers[predicate]


def _value(source: str, kind: np.dtype, threads: int):
    """A source operand over the threads, of a kind."""
    if source[0] != "%" and source not in ptx.SPECIAL:
        constant = np.full(threads, ptx.literal(source, kind))
        return lambda program: constant
    held = ptx.kind_of(source)
    if held == kind:
        return lambda program: program.registers[source]
    if kind.kind in "iu" and held.itemsize > kind.itemsize:
        unsigned = np.dtype(f"u{kind.itemsize}")
        return lambda program: program.registers[source].astype(unsigned).view(kind)
    return lambda program: program.registers[source].view(kind)  # of a float half as wide as its register there are two


def _write(target: str, threads: int):
    """(program, value, chosen): puts a value's bits into a register, filled with zeros; of the threads `chosen`."""
    kind = ptx.kind_of(target)
    size = threads * kind.itemsize

    def write(program, value, chosen=None):
        if value.dtype is not kind:
            if value.nbytes == size:
                value = value.view(kind)
            else:
                value = value.view(f"u{value.dtype.itemsize}").astype(kind)
        if chosen is not None:
            value = np.where(chosen, value, program.registers[target])
        program.registers[target] = value

    return write


def _computation(function: Function, instruction: Instruction):
    name, (target, *sources), threads = instruction.name, instruction.operands, function.threads
    chosen = _chosen(instruction)
    if isinstance(target, tuple):  # one register into several
        return _parted(target, *sources, chosen, threads)
    write = _write(target, threads)
    if name[0] == "createpolicy":
        zeros = np.zeros(threads, np.uint64)
        return lambda program: write(program, zeros)
    if isinstance(sources[0], tuple):  # several into one
        parts, kind = sources[0], ptx.KINDS[name[-1]]

        def found(program):
            return np.stack([program.registers[part] for part in parts], -1).reshape(-1).view(kind)
    elif name[0] == "shfl":
        found = _shuffled(name, *sources, threads)
    else:
        kinds = ptx.operand_kinds(name, len(sources))
        found = _applied(ptx.rule(name), [_value(s, kind, threads) for s, kind in zip(sources, kinds, strict=True)])
    if chosen is None:
        return lambda program: write(program, found(program))
    return lambda program: write(program, found(program), chosen(program))


def _applied(rule, values):
    if len(values) == 2:
        a, b = values
        return lambda program: rule(a(program), b(program))
    if len(values) == 3:
        a, b, c = values
        return lambda program: rule(a(program), b(program), c(program))
    (a,) = values
    return lambda program: rule(a(program))


def _parted(targets, source: str, chosen, threads: int):
    unsigned = np.dtype(f"u{ptx.kind_of(source).itemsize // len(targets)}")
    writes = [_write(target, threads) for target in targets]

    def step(program):
        parts = program.registers[source].view(unsigned).reshape(-1, len(writes))
        which = None if chosen is None else chosen(program)
        for i, write in enumerate(writes):
            write(program, parts[:, i].copy(), which)

    return step


def _shuffled(name, source: str, distance: str, bounds: str, _members: str, threads: int):
    if name[2] not in ("bfly", "idx") or bounds != "31":
        raise NotImplementedError("but for shfl.sync.bfly and shfl.sync.idx over whole warps")
    thread = np.arange(threads)
    distance = _value(distance, np.dtype("u4"), threads)

    def found(program):
        far = distance(program).astype(int)
        lane = (thread ^ far if name[2] == "bfly" else far) % WARP
        return program.registers[source][thread // WARP * WARP + lane]

    return found


def _addresses(at: Address):
    return lambda program: program.registers[at.base].astype(np.int64) + at.offset


def _access(function: Function, instruction: Instruction):
    name, operands, threads = instruction.name, instruction.operands, function.threads
    parameter = name[:2] == ("ld", "param")
    if not set(name) <= (ACCESSES | {"s32"} if parameter else ACCESSES):
        raise NotImplementedError(f"no rule is written for {'.'.join(name)}")
    if parameter:
        target, source = operands
        write = _write(target, threads)
        if name[-1] == "s32":  # the register may be wider
            wide = np.dtype(f"i{ptx.kind_of(target).itemsize}")
            return lambda program: write(program, program.parameters[source.base].view(np.int32).astype(wide))
        return lambda program: write(program, program.parameters[source.base])
    chosen = _chosen(instruction)
    if name[0] == "atom":
        carry_out = _atomic(instruction, threads)
    elif name[0] == "ld":
        carry_out = _load(instruction, threads)
    else:
        carry_out = _store(instruction, threads)

    def step(program):
        if chosen is None:
            return carry_out(program, None, slice(None))
        which = chosen(program)
        count = np.count_nonzero(which)
        if count == threads:
            return carry_out(program, None, slice(None))
        if count:
            return carry_out(program, which, which)

    if name[0] != "atom":
        return step

    def after_others(program):
        program.waited = not program.waited
        if program.waited:
            program.next -= 1
            return True
        return step(program)

    return after_others


def _load(instruction: Instruction, threads: int):
    registers, at = instruction.operands[:2]
    registers = registers if isinstance(registers, tuple) else (registers,)
    kind = np.dtype(f"u{ptx.KINDS[instruction.name[-1]].itemsize}")
    width = kind.itemsize * len(registers)
    writes, addresses = [_write(r, threads) for r in registers], _addresses(at)
    locate = _globally if instruction.name[1] == "global" else _shared

    def step(program, chosen, which):
        where = addresses(program)[which]
        content = locate(program, where, width, which).view(kind).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            if chosen is None:
                write(program, content[:, i].copy())
            else:
                read = np.zeros(threads, kind)
                read[which] = content[:, i]
                write(program, read, chosen)

    return step


def _globally(program, addresses, width: int, which):
    memory = program.memory
    number, at = memory.locate(addresses, width)
    memory.count(program.thread[which], number, at, width, False)
    return memory.load(number, at, width)


def _shared(program, addresses, width: int, which):
    return program.shared.load(program.shared.places(addresses, width), program.warps[which], width)


def _store(instruction: Instruction, threads: int):
    at, registers = instruction.operands[:2]
    registers = registers if isinstance(registers, tuple) else (registers,)
    kind = np.dtype(f"u{ptx.KINDS[instruction.name[-1]].itemsize}")
    width = kind.itemsize * len(registers)
    values, addresses = [_value(r, kind, threads) for r in registers], _addresses(at)
    globally = instruction.name[1] == "global"

    def step(program, _chosen, which):
        where = addresses(program)[which]
        content = np.stack([value(program)[which] for value in values], -1).view(f"V{width}")[:, 0]
        if globally:
            number, at = program.memory.locate(where, width)
            program.memory.count(program.thread[which], number, at, width, True)
            program.hidden.append((number, at, content))
        else:
            program.shared.store(program.shared.places(where, width), program.warps[which], content)

    return step


def _atomic(instruction: Instruction, threads: int):
    """One thread's atomic addition to global memory; a release takes along what a barrier has put before it."""
    name, (target, at, amount) = instruction.name, instruction.operands
    if not {"global", "gpu", "add", "u32"} < set(name):
        raise NotImplementedError("but for one thread's atom.global.gpu.add.u32")
    write, amount, addresses = _write(target, threads), _value(amount, np.dtype("u4"), threads), _addresses(at)

    def step(program, chosen, which):
        where, memory = addresses(program)[which], program.memory
        if len(where) != 1:
            raise NotImplementedError("but for one thread's atom.global.gpu.add.u32")
        if "acq_rel" in name:
            program.release()
        number, at = memory.locate(where, 4)
        before = memory.load(number, at, 4).view(np.uint32)
        memory.change(number, at, before + amount(program)[which])
        write(program, np.full(threads, before[0]), chosen)

    return step


def _matrix(function: Function, instruction: Instruction):
    """8 × 8 numbers of 16 bits: lane l has two of row l // 4, and lane r of eight knows where row r is."""
    name, operands, threads = instruction.name, instruction.operands, function.threads
    if name[1:4] != ("sync", "aligned", "m8n8") or "trans" in name or instruction.predicate:
        raise NotImplementedError("but for whole matrices as they lie")
    load = name[0] == "ldmatrix"
    registers, at = operands if load else operands[::-1]
    addresses, lane = _addresses(at), np.arange(WARP)
    writes = [_write(r, threads) for r in registers]

    def step(program):
        rows = addresses(program).reshape(-1, WARP)
        for i, register in enumerate(registers):
            first = rows[:, 8 * i + lane // 4] + 4 * (lane % 4)
            places = program.shared.places(first.reshape(-1), 4)
            if load:
                writes[i](program, program.shared.load(places, program.warps, 4).view(np.uint32))
            else:
                program.shared.store(places, program.warps, program.registers[register].view("V4"))

    return step
