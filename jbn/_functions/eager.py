"""Calls outside `jit`."""

from functools import partial

import jax

# A function that is one program there, and not one for every operation in it; inlined into others it leaves no trace.
one_program = partial(jax.jit, inline=True)
