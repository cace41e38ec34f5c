"""Compiles launches ahead of time into a folder, NAME.cubin and NAME.json for each, which stay while they are right.

A name (`jbn.kernels.binaries.name_of`) says all that a binary depends on: what did not change is not compiled again,
and what changed cannot be taken for what it was.
"""

import concurrent.futures
import json
import multiprocessing
import os
import re
import time
from pathlib import Path
from typing import Any

from experiments.benchmarks.gpu.flight.pieces import Case, arrays_of, launch_of
from experiments.framework.record import replacing
from jbn.kernels.binaries import compile_only

TARGET = "sm_90"


def compile_case(case: Case) -> tuple[bytes, dict[str, Any]]:
    """A case's binary, and what is to be known for launching it."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # half the size
    compiled = compile_only(launch_of(case), arrays_of(case), TARGET)
    metadata, entry = compiled.metadata, re.search(r"\.entry[^(]*\((.*?)\)", compiled.asm["ptx"], re.DOTALL)
    about = {
        "symbol": metadata.name,
        "warps": metadata.num_warps,
        "shared": metadata.shared,
        "parameters": entry[1].count(".param") if entry else 0,
    }
    return bytes(compiled.asm["cubin"]), about


def compile_named(named: tuple[str, Case], folder: Path) -> None:
    """Writes a case's binary; an error says in a line what was at the bottom of it."""
    name, case = named
    try:
        cubin, about = compile_case(case)
    except Exception as error:
        while error.__cause__ is not None:
            error = error.__cause__
        raise RuntimeError(f"{type(error).__name__}: {str(error).strip().splitlines()[-1:]}") from None
    with replacing(folder / f"{name}.cubin") as temporary:
        temporary.write_bytes(cubin)
    write(folder / f"{name}.json", about)  # last: what has it is whole


def missing(folder: Path, binaries: dict[str, Case]) -> dict[str, Case]:
    return {name: case for name, case in binaries.items() if not (folder / f"{name}.json").exists()}


def build(folder: Path, binaries: dict[str, Case], jobs: int, seconds: float) -> tuple[dict[str, Case], list[str]]:
    """Compiles what is missing, in order, in so many processes, as far as the time goes: (what still is, errors)."""
    started, errors = time.monotonic(), []
    todo = missing(folder, binaries)
    if todo:
        pool = concurrent.futures.ProcessPoolExecutor(min(jobs, len(todo)), multiprocessing.get_context("spawn"))
        futures = {pool.submit(compile_named, (name, case), folder): case for name, case in todo.items()}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(futures, timeout=seconds), 1):
                if error := future.exception():
                    errors.append(f"{futures[future]}: {error}")
                if done % 20 == 0 or done == len(todo):
                    print(f"compiled {done} of {len(todo)}, {time.monotonic() - started:.0f} s", flush=True)
        except concurrent.futures.TimeoutError:
            print(f"out of time after {seconds:.0f} s", flush=True)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return missing(folder, binaries), errors


def forget(folder: Path, binaries: dict[str, Case]) -> int:
    """Deletes what no case needs any more; returns how many binaries that were."""
    old = [path for path in folder.glob("*.cubin") if path.stem not in binaries]
    for path in old:
        path.unlink()
        path.with_suffix(".json").unlink(missing_ok=True)
    return len(old)


def write(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
