"""Runs PTX on NumPy arrays: a GPU that is slow and suspicious.

What Triton's interpreter cannot show is looked for here, in what the compiler made of a kernel. Programs are under way
side by side, in random order, and take turns at barriers and atomics. A store stays hidden, from its own program too,
until the program ends or, once a barrier is behind it, releases it with an atomic: what is read too early is still the
poison that was there. Accesses that `memory` refuses raise, as does a branch that a program's threads take differently.
"""

import functools
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import ptx
import steps
from memory import WARP, Memory, Shared
from sparse import Sparse

UNDER_WAY = 5  # programs at once


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
    code = translated(text)
    function = code.function
    memory = Memory([a for a in arguments if isinstance(a, np.ndarray | Sparse)])
    addresses = iter(memory.addresses)
    values = [next(addresses) if isinstance(a, np.ndarray | Sparse) else a for a in arguments]
    unused = len(function.parameters) - len(values)  # pointers of Triton's own
    values += [0] * unused
    parameters = {
        name: np.full(function.threads, value, ptx.KINDS[kind])
        for (kind, name), value in zip(function.parameters, values, strict=True)
    }
    rng = np.random.default_rng(seed)
    waiting, active = list(rng.permutation(programs if chosen is None else chosen)), []
    with np.errstate(all="ignore"):
        while waiting or active:
            while waiting and len(active) < UNDER_WAY:
                active.append(Program(code, memory, parameters, waiting.pop(), programs, shared))
            program = active[rng.integers(len(active))]
            if not program.advance():
                active.remove(program)
    return Report(*map(tuple, memory.counts.tolist()))


class Code:
    """A function whose instructions are decoded as they come: a step carries one out on a program."""

    def __init__(self, function: ptx.Function):
        self.function = function
        self.steps = [None] * len(function.instructions)
        self.thread = np.arange(function.threads, dtype=np.uint32)
        self.warps = (self.thread // WARP + 1).astype(np.int8)
        names = {name for each in function.instructions for name in re.findall(r"%(?:p|rs?|rd)\d+", each.text)}
        # what was never written is poison
        self.poison = {name: np.full(function.threads, np.array(-1).astype(ptx.kind_of(name))) for name in names}

    def decode(self, index: int):
        step = self.steps[index] = steps.decoded(self.function, self.function.instructions[index])
        return step


@functools.cache
def translated(text: str) -> Code:
    return Code(ptx.read(text))


class Program:
    """A block of threads, in step; registers are arrays over its threads, never written in place."""

    def __init__(self, code: Code, memory: Memory, parameters, index, programs: int, shared: int):
        self.code, self.memory, self.parameters, self.index = code, memory, parameters, index
        self.thread, self.warps = code.thread, code.warps
        full = np.full_like
        self.registers = code.poison | {
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
        code = self.code
        try:
            while True:
                index = self.next
                self.next = index + 1
                stopped = (code.steps[index] or code.decode(index))(self)
                if stopped is not None:
                    return stopped
        except Exception as error:
            error.add_note(f"program {self.index}, {code.function.instructions[index].text}")
            raise

    def barrier(self) -> None:
        self.ordered += self.hidden
        self.hidden = []
        self.shared.barrier()

    def release(self) -> None:
        for store in self.ordered:
            self.memory.store(self.index, *store)
        self.ordered = []
