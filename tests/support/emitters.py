"""How XLA emits a CPU's fusions in tests: in one part, and the old way where there are two, in a third of the time.

Flags for this process and for those that tests start; `as_users_do` puts them back for a file.
"""

import os
from importlib.metadata import version

from jaxlib.xla_client import CompileOptions

ONE_PART = " --xla_cpu_parallel_codegen_split_count=1"
QUICK = {
    "0.10": " --xla_cpu_use_fusion_emitters=false" + ONE_PART,
    "0.11": " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters" + ONE_PART,
    "0.12": " --xla_cpu_emitter_verification_level=0" + ONE_PART,  # the new way alone, not verified after each pass
}
RELEASE = version("jaxlib")[:4]
FLAGS = QUICK.get(RELEASE, ONE_PART)
# XLA's own values
USERS = {"xla_cpu_parallel_codegen_split_count": 32}
if RELEASE == "0.10":
    USERS["xla_cpu_use_fusion_emitters"] = True
# The entry in DebugOptions, field 500, which no option takes back; as field 2047, which there is not, nothing reads it.
ENTRY = b"'\n#xla_cpu_disable_new_fusion_emitters\x12\x00"
SET, UNKNOWN = b"\xa2\x1f" + ENTRY, b"\xfa\x7f" + ENTRY


def as_users_do(get):
    """`get_compile_options` of JAX as if XLA_FLAGS had no FLAGS."""
    if FLAGS not in os.environ.get("XLA_FLAGS", ""):
        return get

    def options(*args, env_options_overrides=None, **given):
        found = get(*args, env_options_overrides=USERS | (env_options_overrides or {}), **given)
        if RELEASE != "0.11":
            return found
        packed = found.SerializeAsString()
        assert SET in packed
        return CompileOptions.ParseFromString(packed.replace(SET, UNKNOWN))

    return options
