"""The wheel holds the library, its kernels and its type marker, and nothing of the checkout besides."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy, since setuptools leaves its work beside what it builds
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(source)], check=True)
    (wheel,) = folder.glob("jbn-*.whl")
    return zipfile.ZipFile(wheel).namelist()


def test_wheel(files):
    packages = {name.split("/")[0] for name in files}
    assert len(packages) == 2 and "jbn" in packages, "the package and its metadata, no top-level kernels"
    for name in ("jbn/py.typed", "jbn/kernels/moments.py", "jbn/linen.py", "jbn/nnx.py", "jbn/_op/measured/README.md"):
        assert name in files
    assert any(name.endswith("LICENSE") for name in files)
