"""READMEs: their examples run, the files and headings they name are there, and commands are where CI looks for them."""

import importlib.util
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import emitters
import jax
import numpy as np
import pytest

from experiments.framework import catalog, study
from experiments.framework.record import Options, Results

ROOT = Path(__file__).parents[2]
ROOMS = [ROOT / name for name in ("jbn", "kernels", "experiments", "tests")]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *(path for room in ROOMS for path in sorted(room.rglob("README.md"))))
}
README = PAGES["README.md"]
FILES = {path.name for room in ROOMS for path in room.rglob("*.py")}
FILE = r"<!-- experiment: (\w+) -->\n```python\n(.*?)```"  # a whole file, not a script


class Example(NamedTuple):
    page: str
    line: int  # before its first
    source: str


def examples(page: str, text: str) -> list[list[Example]]:
    """Those of a page. One that begins with an import begins anew, any other goes on from those before it."""
    text = re.sub(FILE, lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
    found: list[list[Example]] = []
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if re.match("import |from ", block[1]):
            found.append([])
        found[-1].append(Example(page, text.count("\n", 0, block.start(1)), block[1]))
    return found


EXAMPLES = [group for page, text in PAGES.items() for group in examples(page, text)]
SOURCES = [example.source for group in EXAMPLES for example in group]


def run(group: list[Example]) -> None:
    names = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for page, line, source in group:
            exec(compile("\n" * line + source, page, "exec"), names)  # errors name the page's line


@pytest.mark.parametrize("group", EXAMPLES, ids=[f"{group[0].page}:{group[0].line}" for group in EXAMPLES])
def test_example_runs(group):
    run(group)


def test_an_example_goes_on_from_those_before_it():
    blocks = ("import os\na = 1\n", "a += 1\n", "import os\n", "a\n")
    text = "\n".join(f"```python\n{block}```\n" for block in blocks)
    first, second = examples("page", text)
    run(first)
    with pytest.raises(NameError) as error:
        run(second)
    assert error.traceback[-1].lineno == 14


def test_there_are_examples_of_each_interface():
    for text in ("jbn.bn_train", "from jbn.linen import", "jbn.nnx.BatchNorm", "jax.shard_map", "mask=", "norm_mask"):
        assert text in "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL)), text


def test_every_function_of_the_family_is_in_an_example():
    (table,) = re.findall(r"## The family by example\n.*?\n\|---\|---\|\n(.*?)\n\n", PAGES["jbn/README.md"], re.DOTALL)
    names = [name for row in table.splitlines() for name in re.findall(r"`([\w.]+)`", row.split("|")[1])]
    assert len(names) > 20
    for name in names:
        assert any(re.search(rf"\b{re.escape(name)}[(=,]", source) for source in SOURCES), name


def test_every_room_has_a_page_and_the_first_is_short():
    assert {f"{room.name}/README.md" for room in ROOMS} < PAGES.keys()
    assert len(README.splitlines()) <= 200


def headings(text: str) -> set[str]:
    """What links to a page's headings name, as GitHub makes it of them."""
    found = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


def broken(page: str, text: str) -> list[str]:
    """Links within the project that lead nowhere, and names of files, in backticks, that no folder from here up has."""
    here, found = (ROOT / page).parent, []
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, heading = link.partition("#")
        target = (here / path).resolve()
        if not target.exists():
            found.append(link)
        elif heading and heading not in headings(target.read_text(encoding="utf-8") if path else text):
            found.append(link)
    for name in re.findall(r"`((?:\w[\w.-]*/)+[\w.-]*|[\w.-]+\.py)`", text):
        above = [here, *(folder for folder in here.parents if folder.is_relative_to(ROOT))]
        if name not in FILES and not any((folder / name).exists() for folder in above):
            found.append(name)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page):
    assert broken(page, PAGES[page]) == []


def test_what_is_not_there_is_found():
    links = "# A … b\n[a](README.md#install) [b](README.md#none) [c](#a--b) [d](no.md)"
    text = f"{links} `jbn/no.py` `no.py` `jbn/_op/` `linen.py`"
    assert broken("README.md", text) == ["README.md#none", "no.md", "jbn/no.py", "no.py"]


@pytest.mark.parametrize("name", ["run", "test"])
def test_commands_are_marked(name):
    (block,) = re.findall(rf"<!-- command: {name} -->\n```sh\n(.*?)\n```", README, re.DOTALL)
    assert block.startswith("python3 -m venv .venv && ")


def test_an_experiment_is_thirty_lines_and_runs(tmp_path):
    [(name, source)] = re.findall(FILE, PAGES["experiments/README.md"], re.DOTALL)
    statements = [line for line in source.splitlines() if line.strip()]
    assert len(statements) < 40
    (tmp_path / "claims").mkdir()
    path = tmp_path / "claims" / f"{name}.py"
    path.write_text(source, encoding="utf-8")
    assert catalog.discover(tmp_path)[name].is_claim
    spec = importlib.util.spec_from_file_location(name, path)
    experiment = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(experiment)
    results = Results(name)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        study.run(experiment, Options(out=tmp_path, quick=True), results)
    assert results.summary["findings"]["with"]["samples"]
    assert results.save(tmp_path, experiment.figure)


def test_script_over_processes(tmp_path):
    """As `mpirun` would start it: two processes of two devices, which Open MPI's variables tell from each other."""
    (source,) = re.findall(r"```py\n(.*?)```", PAGES["jbn/README.md"], re.DOTALL)
    script = tmp_path / "script.py"
    script.write_text(source, encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2" + emitters.FLAGS,
        "PYTHONPATH": str(ROOT),
        "JAX_COORDINATOR_PORT": str(port),
        "OMPI_MCA_orte_hnp_uri": f"1.0;tcp://127.0.0.1:{port}",
        "OMPI_COMM_WORLD_SIZE": "2",
    }
    running = [
        subprocess.Popen(
            [sys.executable, script],
            env=environment | {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    batches = [np.random.default_rng(i).normal(size=(16, 3)) for i in range(2)]
    try:
        indices = set()
        for process in running:
            out, error = process.communicate(timeout=300)
            assert process.returncode == 0, error
            index, *mean = re.sub(r"[\[\]]", " ", out.splitlines()[-1]).split()  # gloo writes above it
            indices.add(int(index))
            np.testing.assert_allclose(np.float64(mean), 0.01 * np.concatenate(batches).mean(0), rtol=1e-4)
        assert indices == {0, 1}
    finally:
        for process in running:
            process.kill()
