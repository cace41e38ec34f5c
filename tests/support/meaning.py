"""What a program means, by StableHLO's reference interpreter: where the question is what JAX made of our rules.

A small program is done in less time than XLA needs to compile it, and nothing is fused or reordered on the way. What
XLA makes of the same operations other tests ask.
"""

import jax
import numpy as np
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from jaxlib.mlir.passmanager import PassManager

stablehlo.register_stablehlo_passes()


def run(f, *args):
    """`jax.jit(f)(*args)` of float32 and float64 arrays, as NumPy arrays: on one device, and calling nothing else."""
    lowered = jax.jit(f, keep_unused=True).lower(*args)
    module = lowered.compiler_ir("stablehlo")
    with module.context:
        PassManager.parse("builtin.module(func.func(chlo-legalize-to-stablehlo))").run(module.operation)
        leaves = zip(jax.tree.leaves(args), jax.tree.leaves(lowered.args_info), strict=True)
        given = [ir.DenseElementsAttr.get(np.asarray(a, info.dtype, order="C")) for a, info in leaves]
        found = stablehlo.eval_module(module, given)
        return jax.tree.unflatten(lowered.out_tree, [np.array(value) for value in found])


def compiled(f, *args):
    """The same by XLA, for what the interpreter cannot do."""
    return jax.jit(f)(*args)
