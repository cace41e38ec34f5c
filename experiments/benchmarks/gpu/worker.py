"""A process of its own for each candidate, so that one that fails takes nobody along.

Requests and answers are lines of JSON: `{"do": "prepare", "task": […], "links": 8}`, then `{"do": "time", "pass":
"forward", "samples": 9, "seconds": 0.02}`; or `{"do": "step", "batch": 256, …}`, in a process for that alone.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any

from experiments.benchmarks.gpu.tasks import Task
from experiments.benchmarks.gpu.timing import sample


class Failed(RuntimeError):
    """A candidate could not do what it was asked; the message says why."""


class Worker:
    """The parent's end."""

    def __init__(
        self, name: str, module: str = "experiments.benchmarks.gpu.worker", environment: dict[str, str] | None = None
    ):
        self.name, self.module, self.environment = name, module, environment
        self.process: Any = None
        self.answers: queue.Queue[str | None] = queue.Queue()

    def ask(self, **request: Any) -> None:
        """Sends a request, to a new process if there is none."""
        if self.process is None or self.process.poll() is not None:
            self.answers = queue.Queue()
            self.process = subprocess.Popen(
                [sys.executable, "-m", self.module, self.name],
                env=None if self.environment is None else {**os.environ, **self.environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True).start()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()

    @staticmethod
    def _listen(process: Any, answers: "queue.Queue[str | None]") -> None:
        for line in process.stdout:
            answers.put(line)
        answers.put(None)

    def answer(self, timeout: float) -> dict[str, Any]:
        """The answer to the last request.

        Raises:
          Failed: there is none in time, the process ended, or it reports an error.
        """
        try:
            line = self.answers.get(timeout=max(timeout, 0.1))
        except queue.Empty:
            self.stop()
            raise Failed(f"no answer within {timeout:.0f} s") from None
        if line is None:
            self.stop()
            raise Failed(f"the process ended with status {self.process.returncode if self.process else None}")
        found = json.loads(line)
        if "error" in found:
            if found["fatal"]:
                self.stop()  # a device's context may be lost with it
            raise Failed(found["error"])
        return found

    def stop(self) -> None:
        """Ends the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def serve(name: str, requests: Any, answers: Any, does: dict[str, Callable[..., dict[str, Any]]] | None = None) -> None:
    """The worker's end: answers every request until there are no more."""
    does = DOES if does is None else does
    state: dict[str, Any] = {}
    for line in requests:
        request = json.loads(line)
        try:
            answer = does[request.pop("do")](name, state, **request)
        except Exception as error:
            traceback.print_exc()
            first = str(error).strip().partition("\n")[0]
            unable = isinstance(error, (NotImplementedError, ImportError))
            answer = {"error": f"{type(error).__name__}: {first}", "fatal": not unable}
            state.clear()
        print(json.dumps(answer), file=answers, flush=True)


def prepare(name: str, state: dict[str, Any], task: list[Any], links: int) -> dict[str, Any]:
    """Compiles a task's passes, of so many layers a step, and runs one."""
    state.clear()  # first, so that memory is free
    steps, wait, fingerprint = candidates(name).prepare(name, Task(*task), links)
    state.update(steps=steps, wait=wait, count=links)
    return {"passes": list(steps), "fingerprint": fingerprint}


def measure(_: str, state: dict[str, Any], **asked: Any) -> dict[str, Any]:
    """Microseconds of one layer, a list of samples."""
    found = sample(state["steps"][asked["pass"]], state["wait"], asked["samples"], asked["seconds"])
    return {key: [value / state["count"] for value in values] for key, values in found.items()}


def step(name: str, _: dict[str, Any], batch: int, samples: int, seconds: float) -> dict[str, Any]:
    """Microseconds of a training step of ResNet-50, the loss after them, and the most memory held."""
    module = candidates(name)
    train, wait, _ = module.prepare_step(name, batch)
    found = sample(train, wait, samples, seconds)
    return {**found, "loss": float(train()), "peak_bytes": module.peak_memory()}


def candidates(name: str) -> Any:
    """The module that has the candidate."""
    return importlib.import_module("experiments.benchmarks.gpu." + "torch_" * name.startswith("torch") + "candidates")


DOES = {"prepare": prepare, "time": measure, "step": step}


def main(does: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Serves as the worker that the command line names."""
    # answers have the pipe to themselves: whatever libraries print goes to the terminal
    pipe = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    serve(sys.argv[1], sys.stdin, pipe, does)


if __name__ == "__main__":
    main(DOES)
