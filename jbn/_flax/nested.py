"""Nested dicts of linen's variables, by path; they are never changed, but copied."""

from typing import Any

Path = tuple[str, ...]
STATS = "batch_stats"


def at(tree: Any, path: Path) -> Any:
    """What is at `path`; an empty dict where nothing is."""
    for name in path:
        tree = tree.get(name, {})
    return tree


def put(tree: Any, path: Path, value: Any) -> Any:
    """A copy with `value` at `path`; None takes it out, and what is empty then."""
    if not path:
        return value
    inner = put(tree.get(path[0], {}), path[1:], value)
    others = {name: each for name, each in tree.items() if name != path[0]}
    return {**tree, path[0]: inner} if inner else others
