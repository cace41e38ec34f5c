"""What replacing Flax's batch norms in linen and nnx models shares: the options, what was done, and what was left."""

from typing import Any, NamedTuple

from jbn._functions.checks import check_between, check_dtype, check_implementation, check_positive

OPTIONS = (  # how a batch norm is computed; what it has and what it computes stay the model's
    "use_running_average",
    "momentum",
    "epsilon",
    "dtype",
    "axis_name",
    "axis_index_groups",
    "virtual_batch_size",
    "unbiased",
    "implementation",
    "renorm",
    "r_max",
    "d_max",
)


class Replaced(NamedTuple):
    """What became of a model's batch norms, by paths: of nnx `"blocks.0.norm"`, of linen `"Block_0/BatchNorm_0"`.

    Attributes:
      replaced: those of Flax that compute as ours.
      left: for each other one the reason.
    """

    replaced: list[str]
    left: dict[str, str]


def check_options(caller: str, options: dict[str, Any]) -> None:
    """That they are options of ours, with values that the layer takes.

    Raises:
      TypeError: an option that the layer does not have, or that is the model's own.
      ValueError: a value out of range, or bounds without renorm.
    """
    for name in options:
        if name not in OPTIONS:
            raise TypeError(
                f"{caller} got {name}={options[name]!r}, expected some of {', '.join(OPTIONS)}: variables, axis and "
                "activation stay as the model has them"
            )
    bounds = {name: options[name] for name in ("r_max", "d_max") if options.get(name) is not None}
    if bounds and not options.get("renorm"):
        given = " and ".join(f"{name}={value!r}" for name, value in bounds.items())
        raise ValueError(f"{caller} got {given} without renorm=True: add it, or leave the bounds out")
    for name, value in bounds.items():
        check_between(name, value, 1 if name == "r_max" else 0, float("inf"))
    if "momentum" in options:
        check_between("momentum", options["momentum"], 0, 1)
    if "epsilon" in options:
        check_between("epsilon", options["epsilon"], 0, float("inf"))
    if options.get("dtype") is not None:
        check_dtype(options["dtype"])
    if options.get("virtual_batch_size") is not None:
        expected = "None or a positive integer"
        check_positive("virtual_batch_size", options["virtual_batch_size"], expected, "give examples per virtual batch")
    check_implementation(options.get("implementation"))


def left(kind: type, flax: type, ours: type) -> str:
    """Why a layer of this class, which is not Flax's own, is left."""
    api = ours.__module__
    if issubclass(kind, ours):
        return f"it is a {api}.BatchNorm already, with settings of its own"
    return (
        f"its class {kind.__name__} is a subclass of {flax.__name__}, which may compute in its own way: let it inherit "
        f"from {api}.BatchNorm"
    )
