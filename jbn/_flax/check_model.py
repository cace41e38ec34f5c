"""What is given as a model: of Flax's two kinds the one that was asked for."""

from typing import Any


def check_model(model: Any, kind: type, name: str, elsewhere: str) -> None:
    """Whether it is a `kind`, which users know by that name; `elsewhere` takes the other.

    Raises:
      TypeError: it is not.
    """
    if not isinstance(model, kind):
        raise TypeError(
            f"model is a {type(model).__name__}, expected {name}: give the model itself; for one of Flax's other kind "
            f"{elsewhere}"
        )
