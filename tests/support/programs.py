"""What XLA made of a program is used again where the same text is to be compiled for the same devices and options.

JAX's caches go by Python's objects, which tests make anew and some clear; an eighth of XLA's time went there.
"""

from collections import OrderedDict
from functools import wraps

MOST = 1000  # in a process; older ones are forgotten


def compile_once(patch, compiler) -> None:
    """`compiler` is that of JAX. Programs that call Python back are left alone: what that does is not in their text."""
    compile_, made = compiler.backend_compile_and_load, OrderedDict()

    @wraps(compile_)
    def once(backend, module, devices, options, host_callbacks, *rest, **named):
        text = module.operation.get_asm()
        split_by_a_rule = "CustomSPMDPartitioning" in text
        if host_callbacks or split_by_a_rule or rest or named:
            return compile_(backend, module, devices, options, host_callbacks, *rest, **named)
        key = id(backend), str(devices), options.SerializeAsString(), text
        if key not in made:
            made[key] = compile_(backend, module, devices, options, host_callbacks)
        made.move_to_end(key)
        if len(made) > MOST:
            made.popitem(last=False)
        return made[key]

    patch.setattr(compiler, "backend_compile_and_load", once)
