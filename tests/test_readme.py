"""README's examples run, and its commands are where CI looks for them."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("source", EXAMPLES, ids=[f"example {i}" for i in range(len(EXAMPLES))])
def test_example_runs(source):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(source, "README.md", "exec"), {"__name__": "readme"})


def test_there_are_examples_of_each_interface():
    for text in ("jbn.bn_train", "from jbn.linen import", "from jbn.nnx import", "jax.shard_map", "mask="):
        assert any(text in source for source in EXAMPLES)


@pytest.mark.parametrize("name", ["run", "test"])
def test_commands_are_marked(name):
    (block,) = re.findall(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert block.startswith("python3 -m venv .venv && ")
