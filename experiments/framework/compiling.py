"""CPU seconds that making programs takes: tracing, lowering and compiling them."""

import contextlib
import threading
import time
from collections.abc import Iterator

import jax

PREFIX = "/jax/core/compile/"  # of what jax.monitoring tells of programs being made: as each begins, and as it ends


class Compiling:
    """Counts from `watching` on, over all threads: `seconds` of CPU while any program was being made."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.open = 0  # one program is often traced inside another: the outermost alone is counted
        self.since = 0.0
        self.lock = threading.Lock()

    def begins(self, event: str, value: float, **kwargs: str | int) -> None:
        if event.startswith(PREFIX):
            with self.lock:
                if self.open == 0:
                    self.since = time.process_time()
                self.open += 1

    def ends(self, event: str, start_time: float, end_time: float, **kwargs: str | int) -> None:
        if event.startswith(PREFIX) and self.open:
            with self.lock:
                self.open -= 1
                if self.open == 0:
                    self.seconds += time.process_time() - self.since


@contextlib.contextmanager
def watching() -> Iterator[Compiling]:
    """Counts within the block."""
    found = Compiling()
    jax.monitoring.register_scalar_listener(found.begins)
    jax.monitoring.register_event_time_span_listener(found.ends)
    try:
        yield found
    finally:
        jax.monitoring.unregister_scalar_listener(found.begins)
        jax.monitoring.unregister_event_time_span_listener(found.ends)


@contextlib.contextmanager
def making(what: str) -> Iterator[None]:
    """What is done in the block is making a program, too: Triton's compiling, say, of which JAX knows nothing."""
    jax.monitoring.record_scalar(PREFIX + what, 1)
    began = time.time()
    try:
        yield
    finally:
        jax.monitoring.record_event_time_span(PREFIX + what, began, time.time())


def told(found: Compiling) -> str:
    """A line on what this process has taken since it began, imports included; one that it started tells its own."""
    total = time.process_time()
    return f"took {total:.1f} s of CPU, {total - found.seconds:.1f} s of it beyond compiling"
