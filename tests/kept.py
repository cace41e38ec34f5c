"""What is computed once a run of the tests, whichever test or worker of xdist comes first: files in a shared folder."""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path

folder: Path | None = None  # set by conftest


def once(key: Hashable, compute: Callable):
    """compute(), or what an earlier call with this key gave; the key's repr says all that the result depends on."""
    assert folder is not None
    path = folder / hashlib.sha256(repr(key).encode()).hexdigest()
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            pickle.dump(compute(), file)
        os.replace(file.name, path)  # whole or not there
    return pickle.loads(path.read_bytes())
