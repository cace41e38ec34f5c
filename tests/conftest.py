"""Eight CPU devices, set before jax is imported; JBN_TEST_GPU=1 leaves the platform to jax.

XLA's compiling is most of the tests' time and, on a CPU, how it is done changes nothing but speed and last digits:
LLVM's optimizations are off, and fusions are emitted the quicker way, where there are two (`emitters`). Only the files
in `OPTIMIZED`, whose question is digits in single and half precision, are compiled as users' programs are.
"""

import gc
import importlib.metadata
import os
from pathlib import Path

import emitters

if not os.environ.get("JBN_TEST_GPU"):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8" + emitters.FLAGS
    )
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # of the processes that tests start too
    # where in Python an operation comes from is written into programs, for nobody here, in a twentieth of the time
    os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
    os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # so too into kernels

import driver
import jax
import kept
import plugin
import programs
import pytest
from jax._src import compiler

from jbn._op import dispatch, tables

plugin.install()
OPTIMIZED = {f"test_{name}" for name in ("cpu", "edges", "functional", "gradients", "moments", "numerics")}
# What they show depends neither on JAX nor on Python: of several Pythons that .ci/run tests the first runs them, or the
# first with a release of Triton. What kernels compute is Triton's; which layer is which follows from names and shapes.
ONCE = {"test_match"}
ONCE_A_TRITON = {f"test_{name}" for name in ("kernels", "machine", "traffic", "wide")}
ONCE_A_TRITON_BY_KERNELS = {f"test_{name}" for name in ("edges", "locality", "numerics")}
KEPT = os.environ.get("JBN_TEST_KEPT")


def pytest_collection_modifyitems(items):
    """On a GPU the kernels' tests run there; elsewhere what is marked so is skipped. None of it starts JAX."""
    passed, passed_with_triton = (bool(KEPT) and _tested(*of).exists() for of in ((), ("triton",)))
    for item in items:
        by_kernels = hasattr(item, "callspec") and item.callspec.params.get("implementation") == "kernels"
        if driver.ON_GPU and (by_kernels or item.path.stem in ("test_kernels", "test_pieces", "test_gpu")):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not driver.ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and JBN_TEST_GPU=1"))
        of_triton = ONCE_A_TRITON | ONCE_A_TRITON_BY_KERNELS if by_kernels else ONCE_A_TRITON
        if (passed and item.path.stem in ONCE) or (passed_with_triton and item.path.stem in of_triton):
            item.add_marker(pytest.mark.skip(reason="passed on another Python"))


def pytest_sessionfinish(exitstatus):
    if KEPT and exitstatus == 0 and "PYTEST_XDIST_WORKER" not in os.environ:
        _tested().touch()
        _tested("triton").touch()


def _tested(*packages) -> Path:
    """Is there once the tests have passed with these releases."""
    return Path(KEPT or "", " ".join(["tested", *(f"{name} {importlib.metadata.version(name)}" for name in packages)]))


@pytest.fixture(scope="session", autouse=True)
def few_collections():
    """Tracing makes many objects, few of them garbage in cycles, among millions that a collection would walk."""
    gc.collect()
    gc.freeze()  # what imports and pytest have made
    gc.set_threshold(50_000, 20, 20)
    yield
    gc.unfreeze()  # Triton's types complain of what is left when Python ends


@pytest.fixture(scope="session", autouse=True)
def kept_files(tmp_path_factory):
    """The folder of `kept`: one that .ci/run gives to every Python, or one for this run.

    xdist's workers have folders of their own in one that they share.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    kept.folder = Path(KEPT or shared / "kept")
    kept.folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if not driver.ON_GPU:
            driver.compile_once(patch)
            programs.compile_once(patch, compiler)
        yield


@pytest.fixture(scope="session", autouse=True)
def no_measurements_of_the_user(tmp_path_factory):
    """What whoever runs the tests has measured is not for them."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setattr(tables, "default_folder", lambda: folder)
        yield


@pytest.fixture(scope="module", autouse=True)
def optimizations(request):
    """Set anew by each file."""
    wanted = request.path.stem in OPTIMIZED or driver.ON_GPU
    jax.config.update("jax_disable_most_optimizations", not wanted)
    with pytest.MonkeyPatch.context() as patch:
        if wanted and not driver.ON_GPU:
            jax.clear_caches()  # of what was compiled for other files
            patch.setattr(compiler, "get_compile_options", emitters.as_users_do(compiler.get_compile_options))
        yield


@pytest.fixture(scope="module")
def strict():
    """Dtypes and ranks that jax would promote in silence raise; for files that test our own code."""
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def devices():
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    return jax.devices()[:8]


@pytest.fixture(scope="module", params=["xla", "kernels"])
def implementation(request):
    """What None stands for: XLA, or kernels wherever they can do it, without a GPU on a CPU that passes for one."""
    if request.param == "xla":
        yield "xla"
        return
    wins = [
        dispatch.Win("", dtype, layout, 0, "a test")
        for dtype in ("float16", "bfloat16", "float32")
        for layout in ("last", "first")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "WINS", tuple(wins))
        with driver.gpu():
            yield "kernels"
