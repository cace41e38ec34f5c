"""CPU seconds beyond compiling: what is counted as making programs, once, and what not."""

import types

import jax
import jax.numpy as jnp
import pytest

from experiments.framework import compiling

TRACE, COMPILE = (f"{compiling.PREFIX}{name}_duration" for name in ("jaxpr_trace", "backend_compile"))


@pytest.fixture
def clock(monkeypatch):
    """CPU seconds that the test sets."""
    now = types.SimpleNamespace(seconds=10.0)
    monkeypatch.setattr(compiling, "time", types.SimpleNamespace(process_time=lambda: now.seconds))
    return now


def test_what_is_made_inside_another_counts_once(clock):
    found = compiling.Compiling()
    found.begins(TRACE, 0.0, fun_name="outer")
    clock.seconds = 11
    found.begins(TRACE, 0.0, fun_name="inner")
    found.begins("/jax/other", 0.0)
    clock.seconds = 13
    found.ends(TRACE, 0.0, 0.0, fun_name="inner")
    assert found.seconds == 0
    clock.seconds = 14
    found.ends(TRACE, 0.0, 0.0, fun_name="outer")
    assert found.seconds == 4
    clock.seconds = 20  # what runs in between is not counted
    found.begins(COMPILE, 0.0)
    clock.seconds = 22
    found.ends("/jax/other", 0.0, 0.0)
    found.ends(COMPILE, 0.0, 0.0)
    found.ends(COMPILE, 0.0, 0.0)  # whose beginning was not seen
    assert found.seconds == 6
    assert compiling.told(found) == "took 22.0 s of CPU, 16.0 s of it beyond compiling"


def test_programs_that_jax_knows_nothing_of(clock):
    compiling.time.time = lambda: 0.0  # the fixture's
    with compiling.watching() as found, pytest.raises(ZeroDivisionError), compiling.making("triton"):
        clock.seconds = 13
        raise ZeroDivisionError
    assert found.seconds == 3 and found.open == 0


def test_jax_tells_of_programs_as_they_begin_and_end(clock):
    function = jax.jit(lambda x: jnp.sin(x) + 1)
    seen = []
    with compiling.watching() as found:
        listener = lambda event, *_, **__: seen.append(found.open) if event.startswith(compiling.PREFIX) else None  # noqa: E731
        jax.monitoring.register_event_duration_secs_listener(listener)
        try:
            function(jnp.ones(3))
        finally:
            jax.monitoring.unregister_event_duration_listener(listener)
        assert len(seen) >= 3 and min(seen) >= 1, "a program was made that had not begun"
        assert found.open == 0
        del seen[:]
        function(jnp.ones(3))
        assert seen == []
        clock.seconds += 5
        assert found.seconds == 0
    jax.jit(lambda x: x * 3)(jnp.ones(3))
    assert found.open == 0
