"""Which batch norms of a model fold into which layers: read from the jaxpr of the model, never guessed from names.

Calls of layers and batch norms are marked while the model is traced. In the jaxpr a pair is a marked output whose one
use is the marked input of the other; anything else that reads the value, or the weights, is seen there too.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from jax.extend.core import ClosedJaxpr, Jaxpr, Var, jaxprs_in_params

from jbn._flax.fold_linear import Owner, transforms
from jbn._flax.fold_marks import MARK, SCOPE, Call, Marks
from jbn._op.jax_internals import checkpoint_name_of, handed_in, scope_of


class Pair(NamedTuple):
    """A batch norm and the layer that takes it up."""

    norm: str
    layer: str
    layer_first: bool


def pairs(closed: ClosedJaxpr, owners: Sequence[Owner | None], marks: Marks) -> tuple[list[Pair], dict[str, str]]:
    """The pairs, layers before norms first, and for every batch norm left the reason.

    Args:
      closed: of the model, marked.
      owners: of each of its arguments, the module whose variable it is and the variable's name, or None.
      marks: of the trace.
    """
    found = _Found(marks.calls)
    found.read(closed.jaxpr)
    owned = {var: owner for var, owner in zip(closed.jaxpr.invars, owners, strict=True) if owner}
    transformed = transforms(closed.jaxpr, owned, marks.calls)
    modules: dict[Var, str | None] = {var: module for var, (module, _) in owned.items()}
    strange = set(_read_elsewhere(closed.jaxpr, modules, marks.calls))
    foreign = {module for read in strange for module in read if module}
    calls: dict[str, list[int]] = defaultdict(list)
    for number in sorted(found.ran):
        calls[marks.calls[number].module].append(number)
    norms = [module for module, numbers in calls.items() if marks.calls[numbers[0]].is_norm]
    done: list[Pair] = []
    traced_for = {owner: reader for owner, reader in strange if reader in norms and owner not in calls}
    left = {norm: f"it runs in a jitted module that was traced for {other}" for norm, other in traced_for.items()}

    def refusal(norm: str, layer_first: bool) -> tuple[str, str]:
        """The layer on that side, and why the norm does not fold into it; "" where it does."""
        neighbours = found.before if layer_first else found.behind
        others = {neighbours.get(number) for number in calls[norm]}
        side = "its input is not the output" if layer_first else "its output is not the input"
        if None in others or any(marks.calls[n].is_norm for n in others):  # type: ignore[index]
            return "", f"{side} of a dense layer or convolution"
        layers = {marks.calls[n].module for n in others}  # type: ignore[index]
        if len(layers) > 1:
            return "", f"it is shared by {' and '.join(sorted(layers))}"
        (layer,) = layers
        last = marks.calls[next(iter(others))]  # type: ignore[index,arg-type]
        if last.refuses or (not layer_first and last.refuses_behind):
            return layer, f"{layer}: {last.refuses or last.refuses_behind}"
        if set(calls[layer]) != others:
            return layer, f"{layer} is also called without it"
        first = others if layer_first else calls[norm]
        if any(number not in found.sole for number in first):  # type: ignore[operator]
            return layer, f"the output of {layer if layer_first else 'the batch norm'} is used elsewhere too"
        if norm in traced_for.values():
            return layer, f"{layer}: its jitted module was traced for others too"
        if {norm, layer} & foreign:
            return layer, f"the weights of {layer if layer in foreign else 'the batch norm'} are used elsewhere too"
        if why := transformed[layer].before if layer_first else transformed[layer].behind:
            return layer, f"{layer}: {why}"
        if any(pair.layer == layer and pair.layer_first == layer_first for pair in done):
            return layer, f"{layer} takes up another batch norm"
        return layer, ""

    for norm in norms:
        own = next((marks.calls[n].refuses for n in calls[norm] if marks.calls[n].refuses), "")
        layer, why = ("", own) if own else refusal(norm, layer_first=True)
        if not why:
            done.append(Pair(norm, layer, True))
            continue
        bare = next((marks.calls[n].refuses_behind for n in calls[norm] if marks.calls[n].refuses_behind), "")
        if not own:
            layer, why_behind = ("", bare) if bare else refusal(norm, layer_first=False)
            if not why_behind:
                done.append(Pair(norm, layer, False))
                continue
            if layer or not found.before.keys() & set(calls[norm]):
                why = f"{why}, and {why_behind}"
        left[norm] = why
    return sorted(done, key=lambda pair: not pair.layer_first), left


class _Found:
    """Who follows whom in a jaxpr and those inside it."""

    def __init__(self, calls: list[Call]):
        self.calls = calls
        self.ran: set[int] = set()
        self.before: dict[int, int] = {}  # call: the call whose output it was given
        self.behind: dict[int, int] = {}
        self.sole: set[int] = set()  # calls whose output is read once

    def read(self, jaxpr: Jaxpr) -> None:
        made: dict[Var, int] = {}
        taken: list[tuple[Var, int]] = []
        uses: dict[Var, int] = defaultdict(int)
        for value in jaxpr.outvars:
            if isinstance(value, Var):
                uses[value] += 1
        for eqn in jaxpr.eqns:
            for value in eqn.invars:
                if isinstance(value, Var):
                    uses[value] += 1
            mark = MARK.fullmatch(checkpoint_name_of(eqn) or "")
            if mark and mark[2] == "out":
                made[eqn.outvars[0]] = int(mark[1])
            elif mark:
                self.ran.add(int(mark[1]))
                taken += [(value, int(mark[1])) for value in eqn.invars if isinstance(value, Var)]
            for inner in jaxprs_in_params(eqn.params):
                self.read(inner)
        self.sole |= {number for value, number in made.items() if uses[value] == 1}
        for value, number in taken:
            if value in made:
                self.before[number] = made[value]
                self.behind[made[value]] = number


def _read_elsewhere(jaxpr: Jaxpr, owners: dict[Var, str | None], calls: list[Call]) -> Iterator[tuple[str, str | None]]:
    """Modules with a variable that something else than their own calls reads, each with the module whose call does."""
    yield from ((owner, None) for value in jaxpr.outvars if isinstance(value, Var) and (owner := owners.get(value)))
    for eqn in jaxpr.eqns:
        read = [owners.get(v) if isinstance(v, Var) else None for v in eqn.invars]
        if not any(read):
            continue
        scope = SCOPE.search(scope_of(eqn))
        reader = calls[int(scope[1])].module if scope else None
        strange = [owner for owner in read if owner and owner != reader]
        inner = [(one, handed_in(eqn, one, read)) for one in jaxprs_in_params(eqn.params)]
        if reader is None and inner and all(len(one.invars) == len(given) for one, given in inner):
            for one, given in inner:
                yield from _read_elsewhere(one, dict(zip(one.invars, given, strict=True)), calls)
        else:
            yield from ((owner, reader) for owner in strange)
