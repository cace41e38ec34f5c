"""A run's parts, one behind the other or side by side, each cut at its limit and all of them at the run's."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

from experiments.framework.lines import Lines

GRACE = 3  # seconds between being asked to end and being killed


class Part(NamedTuple):
    name: str
    command: Sequence[str]
    seconds: float  # its limit
    environment: dict[str, str] = {}  # noqa: RUF012  (never changed)


class Parts:
    """Runs parts until a deadline; each one's output goes to FOLDER/NAME.log and to the terminal's end of it."""

    def __init__(self, folder: Path, lines: Lines, seconds: float):
        self.folder, self.lines, self.deadline = folder, lines, time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        """Seconds until the deadline, those that killing takes taken off."""
        return self.deadline - time.monotonic() - GRACE

    def run(self, *parts: Part, log: str | None = None) -> bool:
        """Runs parts side by side; whether all of them ended well. One whose time is up leaves what it has written.

        With `log` they share a file of that name.
        """
        threads, well = [], []
        for part in parts:
            arguments = part, self.folder / f"{log or part.name}.log", well
            threads.append(threading.Thread(target=self._run, args=arguments))
            threads[-1].start()
        for thread in threads:
            thread.join()
        return len(well) == len(parts)

    def _run(self, part: Part, log: Path, well: list[str]) -> None:
        limit, started = min(part.seconds, self.left()), time.monotonic()
        if limit < 1:
            self.lines("part", part=part.name, ended="never begun", seconds=0)
            print(f"== {part.name}: no time is left", flush=True)
            return
        print(f"== {part.name}, at most {limit:.0f} s", flush=True)
        with log.open("ab") as file:
            file.write(f"== {part.name}\n".encode())
            file.flush()
            ended = run(part, file, limit)
        seconds = round(time.monotonic() - started, 1)
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
        last = next((line for line in reversed(tail) if line.strip()), "")  # what sanitizers and tests found
        self.lines("part", part=part.name, ended=ended, seconds=seconds, last=last)
        print("\n".join([*tail, f"== {part.name}: {ended} after {seconds} s"]), flush=True)
        if ended == "status 0":
            well.append(part.name)


def run(part: Part, file: IO[bytes], limit: float) -> str:
    """Runs a command with its output to a file; how it ended."""
    try:
        process = subprocess.Popen(
            part.command,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **part.environment},
            start_new_session=True,  # so that its children can be ended with it
        )
    except OSError as error:
        return str(error)
    try:
        return f"status {process.wait(limit)}"
    except subprocess.TimeoutExpired:
        end(process)
        return "cut"


def end(process: subprocess.Popen) -> None:
    """Asks a process and all that it started to end, then ends them."""
    for each in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, each)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def python(*arguments: str) -> list[str]:
    return [sys.executable, "-u", *arguments]
