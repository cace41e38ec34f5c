"""The command line: `python -m experiments [NAME] [--seed N] [--out DIR] [--quick]`."""

import argparse
import ast
import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from experiments.record import MissingPackage, Options, Results, require

MAIN_JOB = "digits"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def discover(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """Name → claim of each experiment: a file with a `run` function; its docstring's first line.

    Files are parsed, not imported, so that listing is quick and needs no optional package.
    """
    found = {}
    for path in sorted(folder.glob("*.py")):
        if has_function(path, "run"):
            claim = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            found[path.stem] = claim.partition("\n")[0]
    return found


def has_function(path: Path, name: str) -> bool:
    """Whether a file defines a function, without importing it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return any(isinstance(node, ast.FunctionDef) and node.name == name for node in tree.body)


def load(name: str) -> Any:
    """The experiment's module.

    Raises:
      MissingPackage: what it needs is not installed.
    """
    require("jax", "flax", "optax", "rich", "matplotlib")
    return importlib.import_module(f"experiments.{name}")


def parse(arguments: list[str], experiments: dict[str, str]) -> tuple[str, Options]:
    """The experiment asked for, and its options; exits with a message where they make no sense."""
    width = max(map(len, experiments))
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Runs one experiment: prints a table, and writes NAME.json, .csv, .png and .svg.",
        epilog="experiments:\n" + "\n".join(f"  {name:{width}}  {claim}" for name, claim in experiments.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default=MAIN_JOB, help=f"which experiment, or `list` (default: {MAIN_JOB})")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for what is written (default: results)"
    )
    parser.add_argument("--quick", action="store_true", help="a few seconds to check that everything works")
    named = next((each for each in arguments if each in experiments), MAIN_JOB)
    if has_function(Path(__file__).with_name(f"{named}.py"), "arguments"):
        load(named).arguments(parser.add_argument_group(f"of {named} alone"))
    given = parser.parse_args(arguments)
    if given.name != "list" and given.name not in experiments:
        near = difflib.get_close_matches(given.name, experiments, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        parser.error(f"no experiment is called {given.name!r}: {hint}there are {', '.join(experiments)}")
    if not 0 <= given.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, got {given.seed}")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder, {given.out} is a file")
    return given.name, Options(given.seed, given.out, given.quick, given)


def restart_with(variables: dict[str, str]) -> None:
    """Starts this command afresh with environment variables that only a new process heeds, if any are unset."""
    unset = {name: value for name, value in variables.items() if name not in os.environ}
    if unset:
        print("restarting with " + " ".join(f"{name}={value}" for name, value in unset.items()), flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **unset})


def execute(name: str, options: Options) -> int:
    """Runs an experiment and saves what it found, all of it or what was finished; returns the exit status."""
    experiment = load(name)
    restart_with(getattr(experiment, "ENVIRONMENT", {}))
    from rich.console import Console

    results = Results(name)
    try:
        experiment.run(options, results)
        results.complete = True
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    finally:  # after any other error too, what was finished is kept
        if results.rows:
            Console().print(experiment.table(results))
            paths = results.save(options.out, experiment.figure)
            part = "" if results.complete else f"what was finished (rows: {len(results.rows)}) to "
            print(f"wrote {part}{', '.join(map(str, paths))}")
    if not results.rows:
        print("nothing was finished, nothing is written", file=sys.stderr)
    return 0 if results.complete else INTERRUPTED


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    experiments = discover()
    try:
        name, options = parse(arguments, experiments)
        if name == "list":
            for name, claim in experiments.items():
                print(f"{name:{max(map(len, experiments))}}  {claim}")
            return 0
        return execute(name, options)
    except MissingPackage as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
