"""Real data sets, each with a split of its own that no command-line seed changes."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

SPLIT_SEED = 20150211


class Split(NamedTuple):
    """Inputs (examples first; an array, or several in a tuple) and targets, to train on and to test on."""

    train_x: Any
    train_y: Any
    test_x: Any
    test_y: Any


def checked(path: Path, sha256: str, remedy: str) -> bytes:
    """The file's bytes, if they are those the experiments were written for.

    Raises:
      ValueError: they are not.
    """
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, expected {sha256}: {remedy}")
    return content
