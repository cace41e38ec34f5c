"""Measurements in files: what is read, written and left out, and what None makes of them."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jbn
from jbn._functions import explain_gpus
from jbn._op import dispatch, tables
from jbn._op.gpu import Device
from jbn._op.plan import Options, Plan
from jbn._op.sync import Sync
from jbn._op.tables import Norm, Row, Times

ROOT = Path(__file__).parents[2]
KIND = "NVIDIA Fake"
NORM = Norm((8, 7, 7, 64), 3, 0, "bfloat16", "bfloat16", "relu", None, None, True)
ROW = Row(NORM, Times(1.0, 2.0), Times(3.0, 6.0), None, "2026-01-02", "jax 1")
X = jax.ShapeDtypeStruct(NORM.shape, jnp.bfloat16)
PLAN = Plan(3, 0, 1, True, "relu", jnp.dtype("bfloat16"), Sync(), False, None, Options("relu", None, None))


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    """Folders of the package's and the user's files, empty, on a host with a GPU."""
    monkeypatch.setattr(tables, "PACKAGED", tmp_path / "packaged")
    monkeypatch.setattr(tables, "default_folder", lambda: tmp_path / "own")
    for name in ("_known", "_folders", "_agreed"):
        monkeypatch.setattr(tables, name, {})
    for module in (dispatch, explain_gpus):
        monkeypatch.setattr(module, "gpu", lambda _: Device(KIND, 132, "9.0"))
    monkeypatch.setattr(dispatch, "obstacle", lambda *_, **__: None)
    (tmp_path / "packaged").mkdir()
    (tmp_path / "own").mkdir()
    return {name: tmp_path / name / "nvidia-fake.json" for name in ("packaged", "own")}


def choice(name="moments", plan=PLAN, x=X):
    tables._known.clear()
    return dispatch.choose(name, plan, "cuda", x, None)


def test_what_is_written_is_read(places):
    other = Row(NORM._replace(mask=(8, 1, 1, 1), residual="float32"), None, None, "a “reason”", "2026-01-03", "")
    assert tables.write(places["own"], KIND, [ROW]) == {NORM: ROW}
    assert tables.write(places["own"], KIND, [other]) == {NORM: ROW, other.norm: other}
    newer = ROW._replace(date="2026-02-02")
    tables.write(places["own"], KIND, [newer])
    assert tables.read(places["own"], KIND) == {NORM: newer, other.norm: other}
    assert json.loads(places["own"].read_text(encoding="utf-8"))["device"] == KIND
    assert list(places["own"].parent.iterdir()) == [places["own"]], "nothing else is left there"


def spoiled(**changes):
    return json.dumps({"version": tables.VERSION, "device": KIND, "rows": [tables.as_json(ROW) | changes]})


SPOILED = {
    "no JSON": ("{", "JSONDecodeError"),
    "not text": (b"\xff\xfe\xff", "UnicodeDecodeError"),
    "of another kind": ("[]", "TypeError"),
    "another version": ('{"version": 2, "device": "NVIDIA Fake", "rows": []}', "they have version 2, and this release"),
    "another device": (
        '{"version": 1, "device": "NVIDIA Real", "rows": []}',
        "they are of the device 'NVIDIA Real', and this is 'NVIDIA Fake'",
    ),
    "a row without a field": ('{"version": 1, "device": "NVIDIA Fake", "rows": [{"shape": [1]}]}', "KeyError: 'axis'"),
    "a shape of text": (spoiled(shape=["8"]), "a row is not one"),
    "a date that is none": (spoiled(date=None), "a row is not one"),
    "times that are none": (spoiled(forward={"triton": -1.0, "xla": 2.0}), "a row has times that are none"),
    "times without one": (spoiled(forward={"triton": 1.0}), "TypeError"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_file_that_is_not_one_is_ignored(name, places):
    """With a warning that names it; and written anew by whoever measures next."""
    content, said = SPOILED[name]
    places["own"].write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.warns(UserWarning, match="jbn ignores the measurements in .*own/nvidia-fake.json: ") as caught:
        assert choice().implementation == "xla"
    assert len(caught) == 1 and said in str(caught[0].message)
    assert dispatch.choose("apply", PLAN, "cuda", X, None).implementation == "xla", "which is said once"
    with pytest.warns(UserWarning):
        tables.write(places["own"], KIND, [ROW])
    assert choice().implementation == "triton"


def test_none_goes_by_a_row(places):
    assert choice().reason.startswith("no measurement shows the kernels ahead for bfloat16, channels last")
    tables.write(places["own"], KIND, [ROW])
    row = f"row 8×7×7×64 bfloat16 of {places['own']}, 2026-01-02"
    assert choice() == ("triton", f"measured forward 2.00× as fast by kernels as by XLA, {row}")
    assert choice("gradient_input") == ("triton", f"measured backward 2.00× as fast by kernels as by XLA, {row}")


def test_each_pass_is_chosen_by_itself(places):
    for forward, backward, wanted in [
        (Times(1, 2), Times(4, 2), ("triton", "xla")),
        (Times(2, 1), Times(1, 3), ("xla", "triton")),
        (Times(98.5, 100), Times(90, 100), ("xla", "triton")),  # a smaller lead may be noise
        (Times(1, 2), None, ("triton", "xla")),
    ]:
        tables.write(places["own"], KIND, [ROW._replace(forward=forward, backward=backward)])
        assert tuple(choice(name).implementation for name in ("apply", "gradient_sums")) == wanted


def test_what_failed_is_never_chosen(places):
    tables.write(places["own"], KIND, [ROW._replace(failed="kernels and XLA differ in y")])
    found = choice()
    assert found.implementation == "xla"
    assert found.reason.startswith("the kernels failed when they were measured: kernels and XLA differ in y, row 8×7×7")


def test_what_failed_here_is_not_chosen_for_the_packages_sake(places, monkeypatch):
    tables.write(places["own"], KIND, [ROW._replace(failed="no")])
    tables.write(places["packaged"], KIND, [ROW])
    assert choice().reason.startswith("the kernels failed when they were measured: no, row")
    places["packaged"].unlink()
    monkeypatch.setattr(dispatch, "WINS", (dispatch.Win(KIND, "bfloat16", "last", 0, "all.json"),))
    assert choice().implementation == "xla"


def test_a_row_is_for_nothing_else(places):
    tables.write(places["own"], KIND, [ROW])
    half, options = jnp.dtype("float16"), PLAN.options
    others = {
        "shape": (PLAN, jax.ShapeDtypeStruct((8, 7, 7, 65), X.dtype)),
        "dtype": (PLAN, jax.ShapeDtypeStruct(X.shape, jnp.float16)),
        "axis": (PLAN._replace(channel=1), X),
        "batch": (PLAN._replace(batch=1), X),
        "dtype of y": (PLAN._replace(dtype=half), X),
        "inference": (PLAN._replace(centred=False), X),
        "activation": (PLAN._replace(options=options._replace(activation=None)), X),
        "residual": (PLAN._replace(options=options._replace(residual="bfloat16")), X),
        "mask": (PLAN._replace(options=options._replace(mask=(-4,))), X),
        "no batch norm": (PLAN._replace(options=None), X),
    }
    assert {
        name for name, (plan, x) in others.items() if choice("moments", plan, x).implementation == "triton"
    } == set()


def test_the_packages_own_come_first(places, monkeypatch):
    slow = ROW._replace(forward=Times(2, 1), backward=Times(4, 2))
    tables.write(places["own"], KIND, [ROW])
    tables.write(places["packaged"], KIND, [slow])
    assert "as fast by kernels as by XLA, row 8×7×7×64 bfloat16 of nvidia-fake.json, 2026" in choice().reason
    assert choice().implementation == "xla"
    places["packaged"].unlink()
    tables.write(places["own"], KIND, [slow])
    assert choice().implementation == "xla"
    monkeypatch.setattr(dispatch, "WINS", (dispatch.Win(KIND, "bfloat16", "last", 0, "all.json"),))
    assert choice() == ("triton", f"measured to win from 0 MB on {KIND} (all.json)")


def test_a_gpu_in_short(places):
    """A forecast for "NVIDIA H100" goes by the file of the only one whose name begins so."""
    tables.write(places["packaged"].with_name("nvidia-fake-80gb.json"), "NVIDIA Fake 80GB", [ROW])
    assert choice().implementation == "triton"
    tables.write(places["packaged"].with_name("nvidia-fake-nvl.json"), "NVIDIA Fake NVL", [ROW])
    assert choice().implementation == "xla"


def test_several_processes_go_by_what_they_agreed_on(places, monkeypatch):
    tables.write(places["own"], KIND, [ROW])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    found = choice()
    assert found.implementation == "xla"
    assert found.reason.endswith(
        f": the row in {places['own']} is left out, as the 2 processes have not agreed on it; call jbn.autotune in all "
        "of them"
    )
    told = jbn.explain(X, activation="relu", platform="cuda")
    assert told.implementation == "xla" and told.reason == found.reason
    tables.use(KIND, places["own"].parent, tables.Source("/first/nvidia-fake.json", {NORM: ROW}))
    assert choice().reason.endswith("row 8×7×7×64 bfloat16 of /first/nvidia-fake.json, 2026-01-02")


def test_explain_names_the_row_of_each_pass(places):
    tables.write(places["own"], KIND, [ROW._replace(backward=Times(4.0, 2.0))])
    told = jbn.explain(X, activation="relu", platform="cuda")
    row = f"row 8×7×7×64 bfloat16 of {places['own']}, 2026-01-02"
    assert told.reason == f"measured forward 2.00× as fast by kernels as by XLA, {row}"
    assert f"backward: gradient_sums by xla: measured backward 0.50× as fast by kernels as by XLA, {row}" in told.notes


def test_where_the_users_files_are(monkeypatch, tmp_path):
    spec: Any = importlib.util.find_spec("jbn._op.tables")  # anew, as of this one the tests have changed the folder
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    monkeypatch.setenv("HOME", str(tmp_path))
    usual = tmp_path / ".cache/jbn"
    for value, wanted in [("/cache", Path("/cache/jbn")), ("", usual), ("relative", usual)]:
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert fresh.default_folder() == wanted
    assert tables.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"


WRITER = """
import sys
from pathlib import Path
from jbn._op import tables
row = tables.row_from(eval(sys.argv[3]))
for i in range(30):
    tables.write(Path(sys.argv[1]), "NVIDIA Fake", [row._replace(norm=row.norm._replace(shape=(int(sys.argv[2]), i)))])
"""


def test_two_processes_write_at_once(places):
    command = [sys.executable, "-c", WRITER, str(places["own"])]
    running = [subprocess.Popen([*command, str(n), repr(tables.as_json(ROW))], cwd=ROOT) for n in (1, 2)]
    assert [process.wait() for process in running] == [0, 0]
    found = tables.read(places["own"], KIND)
    assert {norm.shape for norm in found} == {(n, i) for n in (1, 2) for i in range(30)}


def test_the_packages_files_can_be_read(monkeypatch):
    monkeypatch.undo()
    for path in tables.PACKAGED.glob("*.json"):
        device = json.loads(path.read_text(encoding="utf-8"))["device"]
        assert path.name == tables.file_name(device) and tables.read(path, device)
