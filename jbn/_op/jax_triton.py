"""jax-triton, imported here alone: it sets TRITON_CACHE_DIR to "", with which Triton's own launcher cannot compile."""

import os

_kept = os.environ.get("TRITON_CACHE_DIR")
try:
    import jax_triton as jax_triton
finally:
    if _kept is None:
        os.environ.pop("TRITON_CACHE_DIR", None)
    else:
        os.environ["TRITON_CACHE_DIR"] = _kept
