"""What imports what: arrows point down, and the base import stays light."""

import ast
import graphlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

import jbn

ROOT = Path(__file__).parent.parent
LAYERS = [  # from the top: nothing reaches up, not even through a private helper that is not listed here
    {"experiments"},
    {"jbn.linen", "jbn.nnx"},
    {"jbn"},  # and every public module that has no line of its own
    {"jbn.functional"},
    {"jbn._op", "jbn.moments"},
    {"jbn._xla", "jbn._triton"},
    {"jbn.kernels"},
]
RANK = {module: i for i, layer in enumerate(LAYERS) for module in layer}


def modules():
    """Name: path, of the package, its kernels and the experiments."""
    for folder, package in (
        (ROOT / "jbn", "jbn"),
        (ROOT / "kernels", "jbn.kernels"),
        (ROOT / "experiments", "experiments"),
    ):
        for path in sorted(folder.glob("*.py")):
            yield (package if path.stem == "__init__" else f"{package}.{path.stem}"), path


def imported(name, path, known):
    """Full names that a module imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name if path.stem == "__init__" else name.rpartition(".")[0]
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            for alias in node.names:
                submodule = f"{source}.{alias.name}"
                yield submodule if submodule in known or source == "jax" else source


FILES = dict(modules())
IMPORTS = {name: set(imported(name, path, FILES)) for name, path in FILES.items()}


def rank(module):
    """Of the module, or of the package it is in; None for a private helper, which has whatever rank it reaches."""
    package = next((p for p in ("jbn.kernels", "experiments") if module.startswith(p)), module)
    return RANK.get(package, None if package.startswith("jbn._") else RANK["jbn"])


def reached(module, seen):
    """What importing the module imports of ours, at any depth."""
    for target in IMPORTS[module] & FILES.keys() - seen:
        seen.add(target)
        reached(target, seen)
    return seen


def test_arrows_point_down():
    for module in FILES:
        ranks = {target: rank(target) for target in reached(module, set())}
        up = [target for target, r in ranks.items() if None not in (r, rank(module)) and r < rank(module)]
        assert not up, f"{module} reaches up to {up}"


def test_no_cycles():
    tuple(graphlib.TopologicalSorter({m: i & FILES.keys() for m, i in IMPORTS.items()}).static_order())


@pytest.mark.parametrize(
    "package, importers",
    [
        (
            "flax",
            {"jbn.linen", "jbn.nnx", "jbn._flax", "experiments"}
            | {f"jbn._{what}_{kind}" for what in ("recalibrate", "fold") for kind in ("linen", "nnx")},
        ),
        ("jax_triton", {"jbn._jax_triton"}),
        ("jbn._jax_triton", {"jbn._triton"}),
        ("jbn.kernels", {"jbn._triton", "jbn.kernels", "experiments.binaries"}),
        ("triton", {"jbn._triton", "jbn.kernels"}),
        ("jax._src", {"jbn._op", "jbn._primitive"}),
        ("optax", {"experiments"}),
        ("experiments", {"experiments"}),
        ("kernels", set()),
    ],
)
def test_only_these_import(package, importers):
    for module, imports in IMPORTS.items():
        uses = [i for i in imports if i == package or i.startswith(package + ".")]
        home = any(module == m or module.startswith(m + ".") for m in importers)
        assert home or not uses, f"{module} imports {uses}"


def test_private_imports_are_in_one_place():
    private = [(m, i) for m, imports in IMPORTS.items() for i in imports if i.startswith("jax._src")]
    assert {m for m, _ in private} <= {"jbn._primitive"} and len(private) <= 2, private


def test_kernels_know_no_jax():
    for module, imports in IMPORTS.items():
        if module.startswith("jbn.kernels"):
            assert not any(i.split(".")[0] in ("jax", "jax_triton", "numpy", "flax") for i in imports), module


def test_the_base_import_is_light():
    code = "import sys, jbn; print(*{m.split('.')[0] for m in sys.modules} & {'flax', 'triton', 'jax_triton', 'optax'})"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


def test_what_jax_triton_does_to_the_environment_is_undone():
    """It empties TRITON_CACHE_DIR, after which Triton's own launcher finds no place for what it compiles."""
    pytest.importorskip("jbn._jax_triton", reason="jax-triton is not installed", exc_type=ImportError)
    code = "import os, plugin; plugin.install(); import jbn._jax_triton; print(os.getenv('TRITON_CACHE_DIR'))"
    for kept in (None, "/somewhere"):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
        environment |= {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"} | ({} if kept is None else {"TRITON_CACHE_DIR": kept})
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == str(kept)


def test_the_tests_of_the_kernels_start_no_jax():
    """Which takes minutes under compute-sanitizer. As on a GPU, but that the interpreter stands in for it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import device, interpreter, pytest

def run(launch, arrays, outputs):
    interpreter.run(launch.kernel, launch.programs, *arrays, *launch.numbers, *outputs, **launch.constants)

device.run = run
pytest.main(["-p", "no:cacheprovider", "tests/test_kernels.py", "-k", "test_not_finite"])
from jax._src import xla_bridge
print("started" if xla_bridge.backends_are_initialized() else "not started")
"""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "JBN_TEST_GPU": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "1 passed" in out.stdout and out.stdout.splitlines()[-1] == "not started", out.stdout


def test_surface():
    """Names, order and defaults of arguments are the contract."""
    want = {
        jbn.bn_init: "(num_features, *, use_scale=True, use_bias=True, dtype)",
        jbn.bn_train: "(params, state, x, *, axis=-1, momentum=0.99, epsilon=1e-05, mask=None, residual=None, "
        "activation=None, dtype=None, virtual_batch_size=None, unbiased=False, axis_name=None, "
        "axis_index_groups=None, implementation=None)",
        jbn.bn_eval: "(params, state, x, *, axis=-1, epsilon=1e-05, residual=None, activation=None, "
        "dtype=None, implementation=None)",
        jbn.moments: "(x, *, axis=-1, mask=None, axis_name=None)",
    }
    for function, signature in want.items():
        parameters = [
            p.replace(annotation=p.empty, default=p.empty if p.default is jnp.float32 else p.default)
            for p in inspect.signature(function).parameters.values()
        ]
        assert str(inspect.Signature(parameters)) == signature
    assert jbn.BNParams._fields == ("scale", "bias")
    assert jbn.BNState._fields == ("mean", "var")
    assert jbn.Moments._fields == ("count", "mean", "m2")


def test_text_in_files_has_an_encoding():
    """The one named in the call: else it is the locale's."""
    for path in (*FILES.values(), *ROOT.glob("tests/*.py"), *ROOT.glob("experiments/*/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("read_text", "write_text"):
                    assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
