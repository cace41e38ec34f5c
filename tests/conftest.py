"""Eight CPU devices, set before jax is imported; JBN_TEST_GPU=1 leaves the platform to jax."""

import os

if not os.environ.get("JBN_TEST_GPU"):
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import driver
import jax
import plugin
import pytest

from jbn import _dispatch

plugin.install()


def pytest_collection_modifyitems(items):
    """On a GPU the kernels' tests run there; elsewhere what is marked so is skipped. None of it starts JAX."""
    for item in items:
        by_kernels = hasattr(item, "callspec") and item.callspec.params.get("implementation") == "kernels"
        if driver.ON_GPU and (by_kernels or item.path.stem in ("test_kernels", "test_gpu")):
            item.add_marker(pytest.mark.gpu)
        if item.get_closest_marker("gpu") and not driver.ON_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU, and JBN_TEST_GPU=1"))


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
        _dispatch.Win("", dtype, layout, 0, "a test")
        for dtype in ("float16", "bfloat16", "float32")
        for layout in ("last", "first")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "WINS", tuple(wins))
        with driver.gpu():
            yield "kernels"
