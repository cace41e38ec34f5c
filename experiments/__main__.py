"""The command line: `python -m experiments [NAME | all | list | report] [--seed N] [--out DIR] [--quick]`."""

import argparse
import difflib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from experiments.framework import catalog
from experiments.framework.experiment import Job, Study
from experiments.framework.record import MissingPackage, Options, Results

MAIN_JOB = "digits"
COMMANDS = {
    "all": "every experiment on a claim, one after the other, then the report",
    "list": "the experiments there are",
    "report": "one HTML page and one table from the results in --out",
    "redraw": "figures, verdicts and words of the results in --out from their numbers, and the report: nothing is run",
}
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
Entries = dict[str, catalog.Entry]


def listing(entries: Entries) -> str:
    """Every experiment and what it is about, a line each."""
    width = max(map(len, entries))
    return "\n".join(f"{name:{width}}  {entry.says}" for name, entry in entries.items())


def parse(arguments: list[str], entries: Entries) -> tuple[str, Options]:
    """The experiment or command asked for, and its options; exits with a message where they make no sense."""
    commands = "\n".join(f"{name:{max(map(len, COMMANDS))}}  {does}" for name, does in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="python -m experiments",
        description="Runs one experiment: prints a table, and writes NAME.json, .csv, .png and .svg.",
        epilog=f"instead of a name:\n{commands}\n\nexperiments:\n{listing(entries)}\n\n"
        "Finished parts of an experiment on a claim are kept in OUT/.cache, and not measured again:\n"
        "delete that folder to measure anew.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", nargs="?", default=MAIN_JOB, help=f"of an experiment (default: {MAIN_JOB})")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: 0)")
    parser.add_argument("--out", type=Path, help="folder for what is written (default: results, or results/quick)")
    parser.add_argument("--quick", action="store_true", help="a few seconds to check that everything works")
    named = next((each for each in arguments if each in entries), MAIN_JOB)
    if "arguments" in entries[named].defines:
        catalog.load(entries[named]).arguments(parser.add_argument_group(f"of {named} alone"))
    given = parser.parse_args(arguments)
    known = {**entries, **COMMANDS}
    if given.name not in known:
        near = difflib.get_close_matches(given.name, known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        parser.error(f"no experiment is called {given.name!r}: {hint}there are {', '.join(entries)}")
    if not 0 <= given.seed < 2**32:
        parser.error(f"--seed must be from 0 to 2**32 - 1, got {given.seed}")
    given.out = given.out or Path("results/quick" if given.quick else "results")
    if given.out.exists() and not given.out.is_dir():
        parser.error(f"--out must be a folder, {given.out} is a file")
    if given.name != "list":
        try:
            given.out.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=given.out).close()
        except OSError as error:
            parser.error(f"--out must be a folder that can be written, {given.out} is not: {error.strerror}")
    return given.name, Options(given.seed, given.out, given.quick, given)


def restart_with(variables: dict[str, str]) -> None:
    """Starts this command afresh with environment variables that only a new process heeds, if any are unset."""
    unset = {name: value for name, value in variables.items() if name not in os.environ}
    if unset:
        print("restarting with " + " ".join(f"{name}={value}" for name, value in unset.items()), flush=True)
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **unset})


def execute(name: str, entry: catalog.Entry, options: Options) -> int:
    """Runs an experiment and saves what it found, all of it or what was finished; returns the exit status."""
    experiment = cast(Job, catalog.load(entry))
    restart_with(getattr(experiment, "ENVIRONMENT", {}))
    import jax
    from rich.console import Console

    from experiments.framework.study import optimizing

    results = Results(name)
    try:
        with optimizing(not options.quick):
            experiment.run(options, results)
        results.complete = True
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
    finally:  # after any other error too, what was finished is kept
        if results.rows and jax.process_index() == 0:  # of several that run as one, the first alone tells
            Console().print(experiment.table(results))
            results.told = told(experiment, results)
            paths = results.save(options.out, experiment.figure)
            part = "" if results.complete else f"what was finished (rows: {len(results.rows)}) to "
            print(f"wrote {part}{', '.join(map(str, paths))}")
    if not results.rows:
        print("nothing was finished, nothing is written", file=sys.stderr)
    return 0 if results.complete else INTERRUPTED


def measured(run: Callable[..., int], name: str, entry: catalog.Entry, options: Options) -> int:
    """Runs an experiment; of a quick run it tells the CPU seconds, all of the process, and those beyond compiling."""
    if not options.quick:
        return run(name, entry, options)
    from experiments.framework import compiling

    with compiling.watching() as found:
        status = run(name, entry, options)
    print(compiling.told(found))
    return status


def told(experiment: Job, results: Results) -> dict[str, Any]:
    """What the report says of a job that is finished: question, design, and what was found."""
    from experiments.framework import study

    found = getattr(experiment, "found", None)
    return {**study.words(experiment), "found": found(results)} if found and results.complete else {}


def investigate(name: str, entry: catalog.Entry, options: Options) -> int:
    """Runs an experiment on a claim; returns the exit status.

    Interrupted, it writes no verdict: the parts that are finished are kept, and the same command goes on there.
    """
    experiment = cast(Study, catalog.load(entry))
    from rich.console import Console

    from experiments.framework import study

    results = Results(name)
    try:
        study.run(experiment, options, results)
        results.complete = True
        Console().print(study.table(results))
        print(f"wrote {', '.join(map(str, results.save(options.out, experiment.figure)))}")
    except KeyboardInterrupt:
        kept = f"{len(results.rows)} finished parts are kept: the same command goes on from there"
        print(f"\ninterrupted; {kept}", file=sys.stderr)
        return INTERRUPTED
    return 0


def investigate_all(entries: Entries, options: Options) -> int:
    """Runs every experiment on a claim, then reports; one that fails is told at the end and stops no other."""
    import jax

    claims = {name: entry for name, entry in entries.items() if entry.is_claim}
    started, failed = time.perf_counter(), []
    for name, entry in claims.items():
        print(f"\n{name}: {entry.says}", flush=True)
        try:
            if investigate(name, entry, options) == INTERRUPTED:
                return INTERRUPTED
        except MissingPackage:
            raise
        except Exception:
            traceback.print_exc()
            failed.append(name)
        jax.clear_caches()  # what one experiment compiled is of no use to the next
    print(f"\n{len(claims)} experiments in {(time.perf_counter() - started) / 60:.1f} minutes")
    status = report(options.out)
    if failed:
        print(f"error: failed, as told above: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else status


def redraw(entries: Entries, out: Path) -> int:
    """Writes results again, with what follows from their rows as the code is now; returns the exit status."""
    from experiments.framework import study

    for name, entry in entries.items():
        if (out / f"{name}.json").exists():
            experiment = catalog.load(entry)
            try:
                results = Results.read(out / f"{name}.json")
            except (ValueError, TypeError) as error:
                print(f"error: {out / name}.json is damaged ({error}): run that experiment again", file=sys.stderr)
                return 1
            if entry.is_claim:
                study.conclude(cast(Study, experiment), results)
            else:
                results.told = told(cast(Job, experiment), results)
            print(f"wrote {', '.join(map(str, results.save(out, experiment.figure)))}")
    return report(out)


def report(out: Path) -> int:
    """Writes the report on the results in a folder; returns the exit status."""
    from experiments.framework.report import NothingToReport, write

    try:
        print(f"wrote {', '.join(map(str, write(out)))}")
    except NothingToReport as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    entries = catalog.discover()
    try:
        name, options = parse(arguments, entries)
        if name == "list":
            print(listing(entries))
            return 0
        if name == "all":
            return investigate_all(entries, options)
        if name == "redraw":
            return redraw(entries, options.out)
        if name == "report":
            return report(options.out)
        return measured(investigate if entries[name].is_claim else execute, name, entries[name], options)
    except MissingPackage as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
