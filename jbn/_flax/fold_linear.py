"""Which layers are known to be linear in the kernel that they store: read from the jaxpr of a model.

A batch norm folds into y = x ⋆ kernel + bias. Weight standardisation, quantisation and the like make of the stored
kernel another one, which a rescaled kernel does not give; a layer that takes its weights to the product by anything
else than what is known here is refused, with what it did.
"""

from collections.abc import Iterator
from typing import NamedTuple

from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxprs_in_params

from jbn._flax.fold_marks import MARK, SCOPE, Call
from jbn._functions.checks import FLOATS
from jbn._op.jax_internals import checkpoint_name_of, handed_in, scope_of

Owner = tuple[str, str]  # a module and the name of its variable
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "custom_jvp_call", "custom_vjp_call")
SAME = ("copy", "copy_p", "name", "optimization_barrier", "sharding_constraint", "device_put", "stop_gradient")
KNOWN = {  # what may happen to a value of each role, besides: as Flax's own layers do
    "kernel": (),
    "bias": ("reshape", "broadcast_in_dim"),
    "input": ("reshape", "slice", "concatenate", "rev", "pad"),  # one that is padded with zeros is refused elsewhere
    "product": ("reshape",),
    "output": ("reshape",),
}
KNOWN_TRANSPOSED = {**KNOWN, "kernel": ("rev", "transpose"), "product": ("reshape", "pad", "reduce_sum", "slice")}
KNOWN_TRANSPOSED["product"] += ("concatenate", "rev")  # to wrap round


class Transforms(NamedTuple):
    """Why a layer is not known to take up a batch norm before which it stands, or behind; "" where it is."""

    before: str
    behind: str


def transforms(jaxpr: Jaxpr, owners: dict[Var, Owner], calls: list[Call]) -> dict[str, Transforms]:
    """For every layer that was called, by its module's name.

    Args:
      jaxpr: of the model, marked.
      owners: of its arguments that are variables.
      calls: by number.
    """
    found: dict[str, Transforms] = {}
    for module, new in _each_call(jaxpr, owners, calls):
        old = found.get(module, Transforms("", ""))
        found[module] = Transforms(old.before or new.before, old.behind or new.behind)
    return found


def _each_call(jaxpr: Jaxpr, owners: dict[Var, Owner], calls: list[Call]) -> Iterator[tuple[str, Transforms]]:
    layers: dict[int, _Layer] = {}
    for eqn in jaxpr.eqns:
        scope = SCOPE.search(scope_of(eqn))
        if scope is None:
            taken = [owners.get(v) if isinstance(v, Var) else None for v in eqn.invars]
            for one in jaxprs_in_params(eqn.params):
                passed = handed_in(eqn, one, taken)
                inner = {var: owner for var, owner in zip(one.invars, passed, strict=False) if owner}
                yield from _each_call(one, inner if len(passed) == len(one.invars) else {}, calls)
        elif not calls[int(scope[1])].is_norm:
            number = int(scope[1])
            layers.setdefault(number, _Layer(calls[number], owners)).follow(eqn)
    for number, layer in layers.items():
        if layer.ends:  # not what a loop traced of it beforehand, whose results nothing reads
            yield calls[number].module, layer.found()


class _Layer:
    """One call of a layer: the role of each value in it, from the stored weights to the output."""

    def __init__(self, call: Call, owners: dict[Var, Owner]):
        self.transposed = call.transposed
        self.known = KNOWN_TRANSPOSED if call.transposed else KNOWN
        own = {var: name for var, (module, name) in owners.items() if module == call.module}
        self.roles: dict[Var, str] = {var: name for var, name in own.items() if name in ("kernel", "bias")}
        self.before = self.behind = self.output = ""
        self.ends = False

    def found(self) -> Transforms:
        before = self.before
        if not before and self.output not in ("product", "output"):
            before = "its output is not known to be its input times its kernel, plus its bias"
        return Transforms(before, before or self.behind)

    def follow(self, eqn: JaxprEqn) -> None:
        mark = MARK.fullmatch(checkpoint_name_of(eqn) or "")
        if mark and mark[2] == "in":
            self.roles[eqn.outvars[0]] = "input"
        elif mark:
            (value,) = eqn.invars
            self.ends = True
            self.output = self.roles.get(value, "") if isinstance(value, Var) else ""
        else:
            self._step(eqn, self.roles)

    def _step(self, eqn: JaxprEqn, roles: dict[Var, str]) -> None:
        taken = [roles.get(v, "") if isinstance(v, Var) else "" for v in eqn.invars]
        inner = list(jaxprs_in_params(eqn.params))
        if not any(taken):
            return
        if eqn.primitive.name in CALLS and len(inner) == 1 and len(inner[0].invars) == len(taken):
            inside = {var: role for var, role in zip(inner[0].invars, taken, strict=True) if role}
            for each in inner[0].eqns:
                self._step(each, inside)
            results = [inside.get(v, "") if isinstance(v, Var) else "" for v in inner[0].outvars]
        else:
            results = [self._role(eqn, taken)] * len(eqn.outvars)
        roles.update((var, role) for var, role in zip(eqn.outvars, results, strict=True) if role)

    def _role(self, eqn: JaxprEqn, taken: list[str]) -> str:
        """Of the results of one operation."""
        name, kinds = eqn.primitive.name, {role for role in taken if role}
        if "unknown" in kinds:
            return "unknown"
        if kinds == {"input", "kernel"} and name in ("dot_general", "conv_general_dilated"):
            return "product"
        if sorted(taken) == ["bias", "product"] and name == "add":
            return "output"
        role = next(iter(kinds)) if len(kinds) == 1 else ""
        if role and name in (*SAME, *self.known[role]):
            return role
        if role and name == "convert_element_type" and eqn.params["new_dtype"].name in FLOATS:
            return role
        shapes = [getattr(value.aval, "shape", ()) for value in (eqn.invars[0], eqn.outvars[0])]
        if role == "kernel" and name == "reshape" and not self.transposed and shapes[0][-1:] == shapes[1][-1:]:
            return role  # its last axis is that of the outputs still
        if role == "input":  # whatever it becomes, the product is linear in the kernel
            self.behind = self.behind or f"it changes its input before the product (by {name})"
            return role
        if (name == "mul" and sorted(taken) == ["", "kernel"]) or (name == "div" and taken == ["kernel", ""]):
            self.behind = self.behind or f"its kernel is changed before the product (by {name})"
            return role
        what = " and ".join(sorted(kinds))
        self.before = self.before or f"it is not known to be linear in its stored kernel: its {what} goes into {name}"
        return "unknown"
