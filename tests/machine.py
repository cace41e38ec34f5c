"""Runs PTX on NumPy arrays: a GPU that is slow and suspicious.

What Triton's interpreter cannot show is looked for here, in what the compiler made of a kernel. Programs are under way
side by side, in random order, and take turns at barriers and atomics. A store stays hidden, from its own program too,
until the program ends or, once a barrier is behind it, releases it with an atomic: what is read too early is still the
poison that was there. Accesses that `memory` refuses raise, as does a branch that a program's threads take differently.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import ptx
from memory import WARP, Memory, Shared
from ptx import Address, Instruction
from sparse import Sparse

UNDER_WAY = 5  # programs at once
ACCESSES = {"ld", "st", "param", "global", "shared", "shared__cta", "cg", "L1__evict_first", "L2__cache_hint"}
ACCESSES |= {"v2", "v4", "b8", "b16", "b32", "b64", "atom", "gpu", "acq_rel", "relaxed", "add", "u32"}


class Report(NamedTuple):
    """Bytes of each array that threads asked for, and of the 32-byte sectors that warps thereby touched."""

    loaded: tuple[int, ...]
    stored: tuple[int, ...]
    sectors_loaded: tuple[int, ...]
    sectors_stored: tuple[int, ...]


def run(
    text: str, programs: int, arguments: Sequence, shared: int, seed: int = 0, chosen: Sequence[int] | None = None
) -> Report:
    """Runs a module's function, of its programs those chosen, or all.

    NumPy arrays among the arguments, and sparse ones, are pointers, written in place.
    """
    function = ptx.read(text)
    memory = Memory([a for a in arguments if isinstance(a, np.ndarray | Sparse)])
    addresses = iter(memory.addresses)
    values = [next(addresses) if isinstance(a, np.ndarray | Sparse) else a for a in arguments]
    unused = len(function.parameters) - len(values)  # pointers of Triton's own
    values += [0] * unused
    parameters = {
        name: np.array(value, ptx.KINDS[kind]) for (kind, name), value in zip(function.parameters, values, strict=True)
    }
    rng = np.random.default_rng(seed)
    waiting, active = list(rng.permutation(programs if chosen is None else chosen)), []
    with np.errstate(all="ignore"):
        while waiting or active:
            while waiting and len(active) < UNDER_WAY:
                active.append(Program(function, memory, parameters, waiting.pop(), programs, shared))
            program = active[rng.integers(len(active))]
            if not program.advance():
                active.remove(program)
    return Report(*map(tuple, memory.counts.tolist()))


class Program:
    """A block of threads, in step; registers are arrays over its threads."""

    def __init__(self, function: ptx.Function, memory: Memory, parameters, index, programs: int, shared: int):
        self.function, self.memory, self.parameters, self.index = function, memory, parameters, index
        self.thread = np.arange(function.threads, dtype=np.uint32)
        full = np.full_like
        self.registers = {
            "%tid.x": self.thread,
            "%ctaid.x": full(self.thread, index),
            "%nctaid.x": full(self.thread, programs),
            "global_smem": full(self.thread, 0),
        }
        self.shared = Shared(shared)
        self.next, self.waited = 0, False
        self.hidden, self.ordered = [], []  # stores since the last barrier, and before

    def advance(self) -> bool:
        """Runs up to the next barrier or atomic, where others may come first; False at the end."""
        while True:
            instruction = self.function.instructions[self.next]
            kind = instruction.name[0]
            if kind == "atom" and not self.waited:
                self.waited = True
                return True
            self.waited = False
            self.next += 1
            try:
                if kind in ("bar", "ret"):
                    if instruction.text not in ("bar.sync 0", "bar.warp.sync -1", "ret"):
                        raise NotImplementedError("but for bar.sync 0 and ret of all threads")
                    if instruction.name[1:2] == ("warp",):  # warps run in step
                        continue
                    self.barrier()
                    if kind == "ret":
                        self.release()
                    return kind == "bar"
                if kind == "bra":
                    self.branch(instruction)
                elif kind in ("ld", "st", "atom"):
                    self.access(instruction)
                elif kind in ("ldmatrix", "stmatrix"):
                    self.matrix(instruction)
                else:
                    self.compute(instruction)
            except Exception as error:
                error.add_note(f"program {self.index}, {instruction.text}")
                raise

    def barrier(self) -> None:
        self.ordered += self.hidden
        self.hidden = []
        self.shared.barrier()

    def release(self) -> None:
        for store in self.ordered:
            self.memory.store(self.index, *store)
        self.ordered = []

    def read(self, register: str):
        """Its bits; what was never written is poison."""
        if register not in self.registers:
            kind = ptx.kind_of(register)
            return np.full(len(self.thread), np.array(-1).astype(kind))
        return self.registers[register]

    def value(self, source: str, kind: np.dtype):
        """A source operand over the threads."""
        if source[0] != "%" and source not in self.registers:
            return np.full(len(self.thread), ptx.literal(source, kind))
        held = self.read(source)
        if kind.kind in "iu" and held.dtype.itemsize > kind.itemsize:
            held = held.astype(f"u{kind.itemsize}")
        return held.view(kind)  # of a float half as wide as its register there are two

    def write(self, target: str, value, chosen=None) -> None:
        """A value's bits into a register, filled with zeros; of the threads `chosen`, if not all."""
        kind = ptx.kind_of(target)
        if value.dtype != bool:
            value = value.view(f"u{value.dtype.itemsize}")
            value = value.view(kind) if len(value) > len(self.thread) else value.astype(kind)
        if chosen is not None:
            value = np.where(chosen, value, self.read(target))
        self.registers[target] = value

    def chosen(self, instruction: Instruction):
        """Which threads carry an instruction out; None for all."""
        if instruction.predicate is None:
            return None
        return self.read(instruction.predicate) ^ instruction.negated

    def branch(self, instruction: Instruction) -> None:
        taken = self.chosen(instruction)
        if taken is not None and taken.any() != taken.all():
            raise RuntimeError("threads of a program part here")
        if taken is None or taken.all():
            (label,) = instruction.operands
            self.next = self.function.labels[label]

    def compute(self, instruction: Instruction) -> None:
        name, (target, *sources) = instruction.name, instruction.operands
        chosen = self.chosen(instruction)
        if name[0] == "createpolicy":
            self.write(target, np.zeros(len(self.thread), np.uint64))
        elif isinstance(target, tuple):  # one register into several
            (source,) = sources
            whole = self.read(source)
            parts = whole.view(f"u{whole.dtype.itemsize // len(target)}").reshape(-1, len(target))
            for i, part in enumerate(target):
                self.write(part, parts[:, i], chosen)
        elif isinstance(sources[0], tuple):  # several into one
            parts = np.stack([self.read(part) for part in sources[0]], -1)
            self.write(target, parts.reshape(-1).view(ptx.KINDS[name[-1]]), chosen)
        elif name[0] == "shfl":
            self.write(target, self.shuffled(name, *sources), chosen)
        else:
            kinds = ptx.operand_kinds(name, len(sources))
            self.write(target, ptx.computed(name, *map(self.value, sources, kinds)), chosen)

    def shuffled(self, name, source, distance, bounds, _members):
        if name[2] not in ("bfly", "idx") or bounds != "31":
            raise NotImplementedError("but for shfl.sync.bfly and shfl.sync.idx over whole warps")
        distance = self.value(distance, np.dtype("u4")).astype(int)
        lane = (self.thread ^ distance if name[2] == "bfly" else distance) % WARP
        return self.read(source)[self.thread // WARP * WARP + lane]

    def addresses(self, at: Address):
        return self.registers[at.base].astype(np.int64) + at.offset

    def access(self, instruction: Instruction) -> None:
        name, operands = instruction.name, instruction.operands
        parameter = name[:2] == ("ld", "param")
        if not set(name) <= (ACCESSES | {"s32"} if parameter else ACCESSES):
            raise NotImplementedError(f"no rule is written for {'.'.join(name)}")
        if parameter:
            target, source = operands
            value = np.full(len(self.thread), self.parameters[source.base])
            if name[-1] == "s32":  # the register may be wider
                value = value.view(np.int32).astype(f"i{ptx.kind_of(target).itemsize}")
            self.write(target, value)
            return
        chosen = self.chosen(instruction)
        threads = self.thread if chosen is None else self.thread[chosen]
        if len(threads) == 0:
            return
        if name[0] == "atom":
            self.add_atomically(instruction, threads, chosen)
            return
        load = name[0] == "ld"
        registers, at = operands[:2] if load else operands[1::-1]
        registers = registers if isinstance(registers, tuple) else (registers,)
        size = ptx.KINDS[name[-1]].itemsize
        addresses, width = self.addresses(at)[threads], size * len(registers)
        content = None
        if not load:
            held = [self.value(r, np.dtype(f"u{size}"))[threads] for r in registers]
            content = np.stack(held, -1).view(np.uint8)
        if name[1] == "global":
            which, places = self.memory.locate(addresses, width)
            self.memory.count(threads, which, places, not load)
            if load:
                content = self.memory.load(which, places)
            else:
                self.hidden.append((which, places, content))
        else:
            places, warps = self.shared.places(addresses, width), (threads // WARP)[:, None].astype(int)
            if load:
                content = self.shared.load(places, warps)
            else:
                self.shared.store(places, warps, content)
        if load:
            for i, register in enumerate(registers):
                read = np.zeros(len(self.thread), f"u{size}")
                read[threads] = np.ascontiguousarray(content[:, i * size : (i + 1) * size]).view(f"u{size}")[:, 0]
                self.write(register, read, chosen)

    def add_atomically(self, instruction: Instruction, threads, chosen) -> None:
        """One thread's atomic addition to global memory; a release takes along what a barrier has put before it."""
        name, (target, at, amount) = instruction.name, instruction.operands
        if not {"global", "gpu", "add", "u32"} < set(name) or len(threads) != 1:
            raise NotImplementedError("but for one thread's atom.global.gpu.add.u32")
        if "acq_rel" in name:
            self.release()
        which, places = self.memory.locate(self.addresses(at)[threads], 4)
        before = self.memory.load(which, places).view(np.uint32)
        after = before + self.value(amount, before.dtype)[threads][:, None]
        self.memory.arrays[which][places] = after.view(np.uint8)
        self.write(target, np.full(len(self.thread), before[0, 0]), chosen)

    def matrix(self, instruction: Instruction) -> None:
        """8 × 8 numbers of 16 bits: lane l has two of row l // 4, and lane r of eight knows where row r is."""
        name, operands = instruction.name, instruction.operands
        if name[1:4] != ("sync", "aligned", "m8n8") or "trans" in name or instruction.predicate:
            raise NotImplementedError("but for whole matrices as they lie")
        load = name[0] == "ldmatrix"
        registers, at = operands if load else operands[::-1]
        lane = np.arange(WARP)
        rows = self.addresses(at).reshape(-1, WARP)
        for i, register in enumerate(registers):
            first = rows[:, 8 * i + lane // 4] + 4 * (lane % 4)
            places, warps = self.shared.places(first.reshape(-1), 4), (self.thread // WARP)[:, None].astype(int)
            if load:
                self.write(register, self.shared.load(places, warps).view(np.uint32)[:, 0])
            else:
                self.shared.store(places, warps, self.read(register)[:, None].view(np.uint8))
