"""What a run finds: lines of JSON, each on the disk as soon as it is known, so that a cut loses nothing."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


class Lines:
    """A file that lines are appended to; several processes may append to one."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, kind: str, **fields: Any) -> None:
        """Appends a line; `kind` says what it is about."""
        self.file.write(json.dumps({"kind": kind, **fields}) + "\n")
        self.file.flush()


def read(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The lines of files; what was cut off in the middle of a line is left out."""
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            yield line
