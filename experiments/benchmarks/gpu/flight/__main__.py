"""The command line: `python -m experiments.benchmarks.gpu.flight {prepare | 1 | 2 | 3 | summary}`.

experiments/README.md says more.
"""

import argparse
import importlib.util
import os
import sys
from pathlib import Path

RESULTS = Path("experiments/results/gpu")


def main(arguments: list[str]) -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog=".ci/flight", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="compile ahead, without a GPU, and say what is missing")
    prepare.add_argument("--seconds", type=float, default=1e9, help="compile no longer than this (default: all)")
    prepare.add_argument("--offline", action="store_true", help="fetch nothing")
    for which in "123":
        fly = commands.add_parser(which, help=f"run {which}, on a machine with a GPU, in under three minutes")
        fly.add_argument("out", nargs="?", type=Path, default=Path(os.environ.get("OUT", RESULTS)), help="folder")
        fly.add_argument("--dry", action="store_true", help="without a GPU: what can be run there")
    shown = commands.add_parser("summary", help="print what came back")
    shown.add_argument("paths", nargs="*", type=Path, default=[RESULTS], help="folders or .jsonl files")
    options = parser.parse_args(arguments)
    if options.command == "prepare":
        if importlib.util.find_spec("triton") is None:
            print("MISSING: triton, to compile with: pip install -e . 'triton==3.6.*'")
            return 1
        from experiments.benchmarks.gpu.flight.prepare import prepare as fill

        return 0 if fill(seconds=options.seconds, fetch=not options.offline) else 1
    if options.command == "summary":
        from experiments.benchmarks.gpu.flight.summary import summarise

        print(summarise(options.paths))
        return 0
    from experiments.benchmarks.gpu.flight.fly import fly as run

    return 0 if run(int(options.command), options.out, dry=options.dry) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
