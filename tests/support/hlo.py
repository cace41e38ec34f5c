"""What a program is made of: the operations it is lowered to, and what devices of it send each other once compiled."""

import re
from collections import Counter

import numpy as np

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
NUMBERS = 64  # bytes of a float32 vector over the channels: 4 · NUMBERS

FUNCTION = re.compile(r"^  func\.func \w+ @(\S+?)\(.*?^  \}", re.DOTALL | re.MULTILINE)
OPERATION = re.compile(r"= \"?(?:stablehlo|chlo)\.(?:custom_call @)?(\w+)|\bcall @([\w.]+)\(")


def collectives(compiled) -> list[tuple[str, int]]:
    """(kind, bytes of the result) of every collective of a program."""
    found = []
    for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
        sizes = [np.prod([int(n) for n in s.split(",") if n], dtype=int) for s in re.findall(r"\[([\d,]*)\]", shapes)]
        found.append((kind, 4 * int(sum(sizes))))
    return found


def operations(lowered) -> Counter:
    """How often each StableHLO operation is there once every call is replaced by what it calls, as XLA does."""
    return Counter(in_order(lowered.as_text()))


def in_order(text: str) -> list[str]:
    """The operations of such a program one by one, a custom call by its target."""
    bodies = {match[1]: OPERATION.findall(match[0]) for match in FUNCTION.finditer(text)}

    def of(name: str) -> list[str]:
        return [step for operation, called in bodies[name] for step in (of(called) if called else [operation])]

    return of("main")
