"""What users see of the package: its names, and that they are there without an import of their own."""

import inspect
import pydoc
import re
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import flax.linen as nn
import pytest
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "module", [jbn, jbn.linen, jbn.nnx, jbn.scaling, jbn.convert], ids=lambda module: module.__name__
)
def test_dir_shows_what_is_public_and_no_more(module):
    shown = set(dir(module)) - {"__version__", "linen", "nnx"}
    assert shown == set(module.__all__)
    for name in module.__all__:
        assert getattr(module, name).__doc__


def test_help_shows_signatures_one_can_read():
    """Every argument has a type, told by its name and not by all that the name stands for."""
    for module in (jbn, jbn.linen, jbn.nnx, jbn.scaling, jbn.convert):
        for function in filter(inspect.isfunction, map(module.__dict__.get, module.__all__)):
            signature = inspect.signature(function)
            assert "Union" not in str(signature) and "jaxlib" not in str(signature), signature
            kinds = [signature.return_annotation, *(p.annotation for p in signature.parameters.values())]
            assert inspect.Parameter.empty not in kinds, signature
            assert typing.get_type_hints(function)  # which are there


@pytest.mark.parametrize("door, flax", [(jbn.linen, nn), (jbn.nnx, nnx)], ids=["linen", "nnx"])
def test_help_shows_what_the_constructors_take(door, flax):
    """Flax's arguments and ours by name, with their defaults, in the class and its subclasses; calls stay theirs."""
    signature = inspect.signature(door.BatchNorm)
    assert not any(word in str(signature) for word in ("Union", "_src", "jaxlib", "*args", "**")), signature
    shown = pydoc.render_doc(door.BatchNorm, renderer=pydoc.plaintext)  # from Python 3.13 on a line each
    assert re.sub(r"[\s|]", "", str(signature)) in re.sub(r"[\s|]", "", shown)
    theirs = dict(list(inspect.signature(flax.BatchNorm.__init__).parameters.items())[1:])
    ours = dict.fromkeys(("activation", "virtual_batch_size", "implementation"))
    ours |= dict(unbiased=False, renorm=False, r_max=None, d_max=None, negative_slope=0.01)
    assert signature.parameters.keys() == theirs.keys() | ours.keys()
    for name, parameter in signature.parameters.items():
        assert parameter.annotation is not parameter.empty
        assert parameter.default is theirs[name].default if name in theirs else parameter.default == ours[name]

    class Narrow(door.BatchNorm):
        pass

    assert inspect.signature(Narrow) == signature
    layer = Narrow() if flax is nn else Narrow(3, rngs=nnx.Rngs(0))
    assert list(inspect.signature(layer).parameters)[:2] == ["x", "use_running_average"]


def test_a_constructor_of_a_subclass_is_shown_as_it_is():
    class Wide(jbn.nnx.BatchNorm):
        def __init__(self, width: int, rngs: nnx.Rngs):
            super().__init__(width, rngs=rngs)

    assert list(inspect.signature(Wide).parameters) == ["width", "rngs"]


def test_flax_is_imported_when_a_module_is_asked_for():
    code = "import sys, jbn; a = 'flax' in sys.modules; print(a, jbn.linen.BatchNorm.__name__, jbn.nnx.fold.__name__)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "BatchNorm", "fold"]
    with pytest.raises(AttributeError, match="module 'jbn' has no attribute 'torch'"):
        jbn.torch  # noqa: B018


def test_the_version_stands_in_one_place():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]
    assert jbn.__version__.count(".") == 2
