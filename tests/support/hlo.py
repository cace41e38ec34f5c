"""What devices send each other, read from a compiled program."""

import re

import numpy as np

COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
NUMBERS = 64  # bytes of a float32 vector over the channels: 4 · NUMBERS


def collectives(compiled) -> list[tuple[str, int]]:
    """(kind, bytes of the result) of every collective of a program."""
    found = []
    for shapes, kind in COLLECTIVE.findall(compiled.as_text()):
        sizes = [np.prod([int(n) for n in s.split(",") if n], dtype=int) for s in re.findall(r"\[([\d,]*)\]", shapes)]
        found.append((kind, 4 * int(sum(sizes))))
    return found
