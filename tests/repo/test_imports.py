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

ROOT = Path(__file__).parents[2]
FLOORS = [  # from the top: nothing reaches up; a room's files are all on its floor
    {"experiments"},
    {"jbn", "jbn.linen", "jbn.nnx", "jbn.scaling", "jbn.convert"},  # the doors
    {"jbn._flax"},
    {"jbn._functions"},
    {"jbn._op"},
    {"jbn.kernels"},
]
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
PATHS = (ROOT, ROOT / "tests/support", ROOT / "tests/emulator")
SOURCES = {"jbn": ROOT / "jbn", "jbn.kernels": ROOT / "kernels", "experiments": ROOT / "experiments"}


def modules(sources):
    """Name: path, of every file at any depth."""
    for package, folder in sources.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(p for p in parts if p != "__init__"))), path


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


def read(sources):
    """Name: what it imports."""
    files = dict(modules(sources))
    return {name: set(imported(name, path, files)) for name, path in files.items()}


IMPORTS = read(SOURCES)
FLAX = {"jbn.linen", "jbn.nnx", "experiments", "jbn._flax.layer"} | {
    f"jbn._flax.{what}_{kind}" for what in ("recalibrate", "fold", "replace", "norm_mask") for kind in ("linen", "nnx")
}
INTERNALS = "jbn._op.jax_internals"
INTERNAL = {  # what JAX and Flax do not promise, though an underscore is missing: attributes, keys of parameters
    *("mat", "varying", "source_info", "name_stack", "fancy_primitive_batchers", "AxisData", "unwrap", "__wrapped__"),
    *("module_context", "axis_context", "lowering_parameters", "for_export", "add_keepalive", "platforms"),
    *("cond_nconsts", "body_nconsts", "cond_jaxpr", "body_jaxpr"),
}
FLIGHT = "experiments.benchmarks.gpu.flight"  # launches them itself
BINARIES = {"experiments.benchmarks.binaries", "experiments.benchmarks.in_flight"}
ONLY_THESE = {  # package: who may import it
    "flax": FLAX,
    "jax_triton": {"jbn._op.jax_triton"},
    "jbn._op.jax_triton": {"jbn._op.triton"},
    "jbn.kernels": {"jbn._op.triton", "jbn.kernels", *BINARIES, FLIGHT},
    "triton": {"jbn._op.triton", "jbn.kernels", FLIGHT},
    "jax._src": {INTERNALS},
    "optax": {"experiments"},
    "experiments": {"experiments"},
    "kernels": set(),
}


def within(module, package):
    return module == package or module.startswith(package + ".")


def floor(module):
    """Of the innermost room that the module is in."""
    return FLOOR[max((room for room in FLOOR if within(module, room)), key=len)]


def upward(imports):
    """Imports from a higher floor."""
    for module, targets in imports.items():
        yield from ((module, t) for t in sorted(targets & imports.keys()) if floor(t) < floor(module))


def strays(imports):
    """Imports by those who may not."""
    for module, targets in imports.items():
        for package, importers in ONLY_THESE.items():
            if not any(within(module, m) for m in importers):
                yield from ((module, target) for target in sorted(targets) if within(target, package))


def test_arrows_point_down():
    assert list(upward(IMPORTS)) == []


def test_every_file_stands_in_the_readme_of_its_folder():
    for readme in (ROOT / folder / "README.md" for folder in ("jbn", "kernels", "tests/emulator")):
        text = readme.read_text(encoding="utf-8")
        for path in readme.parent.rglob("*.py"):
            assert path.stem == "__init__" or f"`{path.name}`" in text, f"{readme} does not name {path.name}"


def test_no_cycles():
    tuple(graphlib.TopologicalSorter({m: i & IMPORTS.keys() for m, i in IMPORTS.items()}).static_order())


def test_only_these_import():
    assert list(strays(IMPORTS)) == []


def test_what_is_planted_at_any_depth_is_found(tmp_path):
    for place in ("jbn/_op/deep/bad.py", "experiments/claims/deep/bad.py"):
        (tmp_path / place).parent.mkdir(parents=True)
        text = "import jax._src.core, flax, jbn.linen, experiments.digits, kernels\n"
        (tmp_path / place).write_text(text, encoding="utf-8")
    sources = {name: tmp_path / name for name in ("jbn", "experiments")}
    planted = read(sources)
    assert set(planted) == {"jbn._op.deep.bad", "experiments.claims.deep.bad"}
    known = {**IMPORTS, **planted}
    assert set(upward(known)) == {("jbn._op.deep.bad", "jbn.linen"), ("jbn._op.deep.bad", "experiments.digits")}
    assert set(strays(planted)) == {
        ("jbn._op.deep.bad", "jax._src.core"),
        ("jbn._op.deep.bad", "flax"),
        ("jbn._op.deep.bad", "experiments.digits"),
        ("jbn._op.deep.bad", "kernels"),
        ("experiments.claims.deep.bad", "jax._src.core"),
        ("experiments.claims.deep.bad", "kernels"),
    }


def internals(source):
    """What of `INTERNAL` a text uses: as an attribute, or as the key of an equation's parameters."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in INTERNAL:
            yield node.attr
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant) and node.slice.value in INTERNAL:
            yield node.slice.value


def test_what_is_private_in_jax_is_in_one_file():
    used = {name: set(internals(path.read_text(encoding="utf-8"))) for name, path in modules(SOURCES)}
    assert {name for name, found in used.items() if found} == {INTERNALS}, used
    assert used[INTERNALS] >= INTERNAL - {"AxisData", "__wrapped__", "body_jaxpr"}  # else the list is out of date
    assert len([i for i in IMPORTS[INTERNALS] if within(i, "jax._src")]) == 3
    planted = "x = jax.typeof(v).mat; y = eqn.params['cond_nconsts']; 'name_stack'"
    assert set(internals(planted)) == {"mat", "cond_nconsts"}


def test_kernels_know_no_jax():
    for module, imports in IMPORTS.items():
        if within(module, "jbn.kernels"):
            assert not any(i.split(".")[0] in ("jax", "jax_triton", "numpy", "flax") for i in imports), module


def test_imports_are_light():
    """They load none of these, Flax where it is asked for alone, and compute nothing; one after another."""
    code = """
import importlib, sys
from jax._src import xla_bridge
heavy = {"flax", "triton", "jax_triton", "optax", "torch", "matplotlib"}
for module in ("jbn", "jbn.linen", "jbn.nnx"):
    importlib.import_module(module)
    loaded = heavy & {m.split(".")[0] for m in sys.modules} | {"jbn.convert", "jbn.scaling"} & set(sys.modules)
    print(module, *loaded, xla_bridge.backends_are_initialized())
    heavy -= {"flax", "optax"}  # the one brings the other
"""
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.splitlines() == ["jbn False", "jbn.linen False", "jbn.nnx False"]


def test_what_jax_triton_does_to_the_environment_is_undone():
    """It empties TRITON_CACHE_DIR, after which Triton's own launcher finds no place for what it compiles."""
    pytest.importorskip("jbn._op.jax_triton", reason="jax-triton is not installed", exc_type=ImportError)
    code = "import os, plugin; plugin.install(); import jbn._op.jax_triton; print(os.getenv('TRITON_CACHE_DIR'))"
    for kept in (None, "/somewhere"):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_CACHE_DIR"}
        environment |= {"PYTHONPATH": os.pathsep.join(map(str, PATHS))}
        environment |= {} if kept is None else {"TRITON_CACHE_DIR": kept}
        out = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == str(kept)


def test_the_tests_of_the_kernels_start_no_jax():
    """Which takes minutes under compute-sanitizer. As on a GPU, but that the interpreter stands in for it."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = """
import device, interpreter, pytest

device.run = interpreter.execute
pytest.main(["-p", "no:cacheprovider", "tests/kernels/test_kernels.py", "-k", "test_not_finite"])
from jax._src import xla_bridge
print("started" if xla_bridge.backends_are_initialized() else "not started")
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, PATHS)), "JBN_TEST_GPU": "1"}
    environment.pop("JBN_TEST_KEPT", None)  # by which these tests might be left out
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "1 passed" in out.stdout and out.stdout.splitlines()[-1] == "not started", out.stdout


def test_surface():
    """Names, order and defaults of arguments are the contract."""
    want = {
        jbn.bn_init: "(num_features, *, use_scale=True, use_bias=True, dtype)",
        jbn.bn_train: "(params, state, x, *, axis=-1, momentum=0.99, epsilon=1e-05, mask=None, residual=None, "
        "activation=None, negative_slope=0.01, dtype=None, virtual_batch_size=None, unbiased=False, axis_name=None, "
        "axis_index_groups=None, implementation=None, renorm=None)",
        jbn.bn_eval: "(params, state, x, *, axis=-1, epsilon=1e-05, residual=None, activation=None, "
        "negative_slope=0.01, dtype=None, implementation=None)",
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
    for path in (*dict(modules(SOURCES)).values(), *ROOT.glob("tests/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                if node.func.attr in ("read_text", "write_text"):
                    assert "encoding" in {keyword.arg for keyword in node.keywords}, f"{path}:{node.lineno}"
