"""How many bytes a launch loads and stores, from its geometry: what the interpreter counts by running it."""

from typing import NamedTuple

from jbn.kernels.launches import Launch
from jbn.kernels.tiling import View


class Traffic(NamedTuple):
    """Bytes of global memory, as many times as they are asked for."""

    loaded: int
    stored: int
    again: int = 0  # of those loaded, channels' vectors where each tile's program loads them: a cache has them


def traffic(launch: Launch, view: View, itemsizes: dict[str, int]) -> Traffic:
    """Of a launch on x like `view`, with so many bytes an element of "x", "residual", "dy", "y", "dx" and "dz".

    The atomic arrivals, 4 bytes a program, are left out.
    """
    constants, tiling = launch.constants, launch.tiling
    vector, programs = 4 * view.batch * view.channels, tiling.splits  # what each split loads or stores
    loads, stores = _tensors(launch)
    loaded = sum(view.size * itemsizes[name] for name in loads)
    stored = sum(view.size * itemsizes[name] for name in stores)
    mask = constants.get("MASK", "none")
    if mask == "full":
        loaded += view.size
    elif mask == "rows":
        loaded += view.batch * view.rows * tiling.blocks(view)
    loaded += vector * programs * _vectors(launch) + 4 * launch.programs * _scalars(launch)
    if launch.kernel.__name__ in ("jbn_moments", "jbn_gradient_sums"):
        fields = 3 if launch.kernel.__name__ == "jbn_moments" and mask != "none" else 2
        stored += vector * fields
        if constants["SPLIT"]:
            stored += vector * fields * programs
            # the last program reads them all; for the highest mean, or one program's, it first reads means
            again = {"jbn_moments": programs * 2 if fields == 3 else 1}.get(launch.kernel.__name__, 0)
            loaded += vector * (fields * programs + again)
    if launch.kernel.__name__ == "jbn_gradient_sums":
        loaded += vector + 4 * view.batch * tiling.blocks(view)  # var and epsilon once more, for what is stored
    streams = programs > 1 and programs * tiling.ROWS >= view.rows
    return Traffic(loaded, stored, vector * (programs - 1) * _vectors(launch) if streams else 0)


def _tensors(launch: Launch) -> tuple[list[str], list[str]]:
    """Tensors of x's size that a launch loads and stores."""
    name, constants = launch.kernel.__name__, launch.constants
    if name == "jbn_moments":
        return ["x"], []
    residual = ["residual"] if constants["HAS_RESIDUAL"] else []
    if name == "jbn_apply":
        return ["x", *residual], ["y"]
    kept = ["dz"] if constants["KEEP"] else []
    if name == "jbn_gradient_sums":
        return ["x", "dy", *residual], kept
    x = ["x"] if constants["CENTRED"] or constants["ACTIVATION"] != "none" else []
    return [*x, "dy", *residual], ["dx", *kept]


def _vectors(launch: Launch) -> int:
    """Vectors over a block's channels that each program loads."""
    name, constants = launch.kernel.__name__, launch.constants
    if name == "jbn_moments":
        return 0
    found = 2 + constants["HAS_SCALE"] + constants["HAS_BIAS"]  # mean, var
    if name == "jbn_gradient_input" and constants["CENTRED"]:
        found += 2 + constants["HAS_WEIGHT"]
    return found


def _scalars(launch: Launch) -> int:
    return launch.kernel.__name__ != "jbn_moments"  # epsilon
