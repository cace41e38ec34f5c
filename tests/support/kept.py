"""What is long in coming is computed once, whichever test, worker of xdist or Python comes first: files in a folder."""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Callable, Hashable
from importlib.metadata import version
from pathlib import Path

folder: Path | None = None  # set by conftest


def once(key: Hashable, compute: Callable):
    """compute(), or what an earlier call gave; the key's repr says all that it depends on beside Triton's release."""
    return always((version("triton"), key), compute)


def always(key: Hashable, compute: Callable):
    """The same where Triton has no part in it, or the key says its release too."""
    assert folder is not None
    path = folder / hashlib.sha256(repr(key).encode()).hexdigest()
    if not path.exists():
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            pickle.dump(compute(), file)
        os.replace(file.name, path)  # whole or not there
    return pickle.loads(path.read_bytes())
