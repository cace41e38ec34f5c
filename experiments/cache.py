"""Finished parts of an experiment on disk, found again only by exactly the same question."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.record import CHECKOUT, environment, plain, replacing

# what an experiment's numbers depend on besides its own file and the packages' versions
SOURCES = (
    "jbn/*.py",
    "jbn/kernels/*.py",
    "experiments/data/*.py",
    *(f"experiments/{name}.py" for name in ("models", "study", "train")),
)


class Cache:
    """Parts of one experiment, a file each; its name is the digest of all that the part's result depends on."""

    def __init__(self, folder: Path, source: Path, configuration: dict[str, Any]):
        """`source` is the experiment's file; `configuration` holds every setting, as `plain` leaves it."""
        self.folder = folder
        self.question = {
            "configuration": configuration,
            "environment": environment(),
            "code": digest([source, *(path for pattern in SOURCES for path in sorted(CHECKOUT.glob(pattern)))]),
        }

    def once(self, part: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `measure` returned for this part, now or in an earlier run."""
        question = plain({**self.question, "part": part})
        name = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{name[:32]}.json"
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # none there, or not whole
            kept = {}
        if kept.get("question") == question:
            return kept["answer"]
        answer = plain(measure())
        self.folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({"question": question, "answer": answer}), encoding="utf-8")
        return answer


def digest(paths: list[Path]) -> str:
    """SHA-256 of the files' contents, in order."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()
