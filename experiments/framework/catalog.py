"""Which experiments there are: found by looking at the files, so that a new one needs no registration."""

import ast
import importlib
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from experiments.framework.record import require

FOLDER = Path(__file__).parent.parent


class Entry(NamedTuple):
    """An experiment: its module's name, its docstring's first line, and what else the file defines."""

    module: str
    says: str
    defines: frozenset[str]

    @property
    def is_claim(self) -> bool:
        """Whether it puts claims to the test (else it is a job with a `run` of its own)."""
        return "CLAIMS" in self.defines


def discover(folder: Path = FOLDER) -> dict[str, Entry]:
    """Name → entry of every file here and in `benchmarks` with `run(options, results)`, and in `claims` with `CLAIMS`.

    Files are parsed, not imported, so that listing is quick and needs no optional package.
    """
    found = {}
    jobs = sorted([*folder.glob("*.py"), *folder.glob("benchmarks/*.py")], key=lambda path: path.stem)
    for path in [*jobs, *sorted(folder.glob("claims/*.py"))]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        defines = frozenset(name for node in tree.body for name in names(node))
        if "CLAIMS" in defines if path.parent.name == "claims" else any(map(is_job, tree.body)):
            module = ".".join(("experiments", *path.relative_to(folder).with_suffix("").parts))
            found[path.stem] = Entry(module, (ast.get_docstring(tree) or "").partition("\n")[0], defines)
    return found


def is_job(node: ast.stmt) -> bool:
    """Whether a statement defines what runs an experiment that is a job."""
    if not isinstance(node, ast.FunctionDef) or node.name != "run":
        return False
    return [argument.arg for argument in node.args.args] == ["options", "results"]


def names(node: ast.stmt) -> list[str]:
    """What one statement of a module defines."""
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def load(entry: Entry) -> ModuleType:
    """The experiment's module: a `Study` if it is on claims, else a `Job`.

    Raises:
      MissingPackage: what it needs is not installed.
    """
    require("jax", "flax", "optax", "rich", "matplotlib")
    return importlib.import_module(entry.module)
