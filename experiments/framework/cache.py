"""Finished parts of an experiment on disk, found again only by exactly the same question."""

import ast
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.framework.catalog import names
from experiments.framework.record import CHECKOUT, environment, plain, replacing

# what an experiment's numbers depend on besides its own file and the packages' versions
SOURCES = (
    "jbn/**/*.py",
    "kernels/**/*.py",
    "experiments/material/**/*.py",
    *(f"experiments/framework/{name}.py" for name in ("record", "study")),
)
SETTINGS = ("XLA_FLAGS", "JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION")
JUDGED = ("CLAIMS", "CAPTION", "effects", "figure")  # of an experiment's file: made from the rows, not making them


def code(path: Path, without: tuple[str, ...] = ()) -> str:
    """Digest of a file's code: comments, docstrings, layout and what is defined `without` make no difference."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if not set(without) & set(names(node))]
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


# once, as this process starts: what is imported now is what will run, whatever happens to the files meanwhile
SHARED = {str(path.relative_to(CHECKOUT)): code(path) for pattern in SOURCES for path in sorted(CHECKOUT.glob(pattern))}


class Cache:
    """Parts of one experiment, a file each; its name is the digest of all that the part's result depends on."""

    def __init__(self, folder: Path, source: Path, configuration: dict[str, Any]):
        """`source` is the experiment's file; `configuration` holds every setting, as `plain` leaves it."""
        self.folder = folder
        self.question = {
            "configuration": configuration,
            "environment": environment(),
            "settings": {name: os.environ.get(name) for name in SETTINGS},
            "code": {**SHARED, source.name: code(source, JUDGED)},
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
