"""What a program means, by StableHLO's reference interpreter: where the question is what JAX made of our rules.

A small program is done in less time than XLA needs to compile it, and nothing is fused or reordered on the way. What
XLA makes of the same operations other tests ask.
"""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.interpreters import mlir
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo
from jaxlib.mlir.passmanager import PassManager

stablehlo.register_stablehlo_passes()
MOST = 200_000  # elements of all that a program computes; the interpreter takes about a microsecond for each
TYPE = re.compile(r"tensor<((?:\d+x)*)")
KEYS = re.compile(r"sdy\.sharding_constraint (%\w+) <.*?>(?= :)")  # jax.random's, which choose nothing on one device


class Program:
    """`jax.jit(f)` for arrays like `args`, on one device and calling nothing else; gives NumPy arrays.

    XLA compiles what is large, which the interpreter is slow at, and complex numbers, of which it knows little.
    """

    def __init__(self, f, *args):
        leaves, tree = jax.tree.flatten(args)
        kinds = [jax.dtypes.canonicalize_dtype(jnp.result_type(leaf)) for leaf in leaves]

        def wide(*leaves):
            found = f(*jax.tree.unflatten(tree, [leaf.astype(k) for leaf, k in zip(leaves, kinds, strict=True)]))
            leaves, self.found = jax.tree.flatten(found)
            self.out = [leaf.dtype for leaf in leaves]
            return [leaf.astype(widened(leaf.dtype)) for leaf in leaves]

        self.kinds = [widened(kind) for kind in kinds]
        given = [jax.ShapeDtypeStruct(np.shape(leaf), kind) for leaf, kind in zip(leaves, self.kinds, strict=True)]
        lowered = jax.jit(wide, keep_unused=True).lower(*given)
        module = lowered.compiler_ir("stablehlo")
        text = str(module)
        if "tensor<?" in text:
            text = str(mlir.refine_polymorphic_shapes(module))
        text = KEYS.sub(r"stablehlo.optimization_barrier \1", text)
        if "complex<" in text or sum(map(elements, TYPE.findall(text))) > MOST:
            self.call = lowered.compile()
            return
        with module.context:
            module = ir.Module.parse(text)
            PassManager.parse("builtin.module(func.func(chlo-legalize-to-stablehlo))").run(module.operation)
        self.call = partial(evaluated, module)

    def __call__(self, *args):
        arrays = [np.asarray(a, kind, order="C") for a, kind in zip(jax.tree.leaves(args), self.kinds, strict=True)]
        return self.found.unflatten(map(np.asarray, self.call(*arrays), self.out))


def evaluated(module, *arrays):
    with module.context:
        given = [ir.DenseElementsAttr.get(a, signless=a.dtype.kind != "u") for a in arrays]
        return [np.array(value) for value in stablehlo.eval_module(module, given)]


def widened(dtype):
    """The interpreter is given, and gives, no half precision; it computes in it."""
    half = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32
    return np.dtype(np.float32) if half else dtype


def elements(shape: str) -> int:
    """Of a tensor whose type begins like this."""
    return math.prod(map(int, shape.split("x")[:-1]))


def run(f, *args):
    """`jax.jit(f)(*args)`, in NumPy arrays."""
    return Program(f, *args)(*args)


def compiled(f, *args):
    """The same by XLA, for what the interpreter cannot do."""
    return jax.jit(f)(*args)
