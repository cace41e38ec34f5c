"""`experiments overhead`: ratios within turns, programs that are whole training steps, and what is told of them."""

import jax
import numpy as np
import pytest

from experiments.benchmarks import overhead
from experiments.benchmarks.costs import calls, imports, networks, programs
from experiments.benchmarks.costs.networks import FLAX, FUSED, OURS
from experiments.benchmarks.costs.rows import COLUMNS, row
from experiments.framework.record import Options, Results

NETWORKS = {network.name: network for network in networks.networks()}


def test_ratios_are_taken_within_turns():
    times = {FLAX: [1.0, 10.0, 2.0], OURS: [2.0, 5.0, 4.0]}
    found = row({"kind": "eager", "unit": "µs"}, OURS, times, FLAX, trace=7.0)
    assert tuple(found) == COLUMNS
    assert (found["median"], found["over"], found["over_lower_quartile"], found["beside"]) == (4.0, 2.0, 1.25, FLAX)
    assert (found["candidate"], found["trace"], found["platform"]) == (OURS, 7.0, None)
    assert row({}, OURS, times, None)["over"] is None


@pytest.mark.parametrize("interface", ["linen", "nnx", "functional"])
def test_candidates_of_a_network_compute_the_same_step(interface):
    """Two dense layers of each candidate: the same loss, and gradients of the same sizes for the same parameters."""
    losses, sizes = [], []
    for name in overhead.CANDIDATES:
        function, given = NETWORKS["20 × dense"].steps[interface](name, True)
        leaves, tree = jax.tree.flatten(given)
        # positive constants: which leaf is which does not matter, and a constant column is normalised to 0, but for x
        rng = np.random.default_rng(0)
        filled = [np.ones(leaf.shape, leaf.dtype) for leaf in leaves[:-1]]
        filled += [rng.standard_normal(leaves[-1].shape, np.float32)]
        (loss, state), gradients = jax.jit(function)(*jax.tree.unflatten(tree, filled))
        losses.append(float(loss))
        sizes.append(sorted(leaf.shape for leaf in jax.tree.leaves((gradients, state))))
    assert losses[0] > 0.1
    np.testing.assert_allclose(losses[1:], losses[0], rtol=1e-4)
    assert sizes[0] == sizes[1] == sizes[2]


def test_networks_have_the_layers_that_are_told():
    for name, layers in (("20 × dense", 20), ("20 × 1×1 convolution", 20)):
        _, (params, stats, _) = NETWORKS[name].steps["linen"](OURS, False)
        assert len(stats) == layers and len(params) == 2 * layers
    _, (params, *_, images, labels) = NETWORKS["ResNet-50"].steps["linen"](FUSED, False)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 25_557_032
    assert (images.shape, labels.shape) == ((16, 224, 224, 3), (16,))


def test_lines_are_told_by_platform():
    found = programs.lines(NETWORKS["20 × dense"], "functional", (FLAX, OURS), True)
    assert [(row["platform"], row["candidate"]) for row in found] == [
        (platform, name) for platform in ("cpu", "cuda", "tpu") for name in (FLAX, OURS)
    ]
    assert all(row["median"] > 50 and row["over"] == row["median"] / found[0]["median"] for row in found[:2])


def test_calls_take_turns_and_compute_the_same():
    order = []
    candidates = {name: lambda name=name: order.append(name) for name in calls.BESIDE}
    taken = calls.take_turns(candidates, 3, 2, np.random.default_rng(0))
    assert {name: len(each) for name, each in taken.items()} == dict.fromkeys(calls.BESIDE, 3)
    turns = np.array(order[2 * len(candidates) :]).reshape(3, len(candidates), 2)  # after each was called twice
    assert (turns[..., 0] == turns[..., 1]).all() and all(set(turn[:, 0]) == set(candidates) for turn in turns)

    x = np.random.default_rng(0).standard_normal((16, 3)).astype(np.float32)
    for train in (True, False):
        results = {}
        for interface, make in calls.INTERFACES.items():
            for name in calls.BESIDE:
                found = make(name, train, jax.numpy.asarray(x))()
                results[interface, name] = np.asarray(found if interface == "nnx" else found[0])
        for (interface, name), y in results.items():
            beside = results["linen", calls.BESIDE[name]]
            np.testing.assert_allclose(y, beside, atol=1e-5, err_msg=f"{interface}, {name}, training: {train}")
        assert (results["linen", FUSED] >= 0).all() and (results["linen", OURS] < 0).any()


def test_import_of_jbn_loads_neither_flax_nor_triton(monkeypatch):
    seconds, loaded = imports.imported("jbn", "jax")
    assert seconds > 0 and loaded == set()
    monkeypatch.setattr(imports, "HEAVY", ("decimal", "json"))
    assert imports.imported("decimal", "json")[1] == {"decimal"}


def results():
    """Rows as a run has them, of made-up numbers."""
    found = Results("overhead", {}, summary={"loads": {"jbn": []}}, complete=True)
    for kind, what, interface, platform in (
        ("program", "20 × dense", "linen", None),
        ("lines", "20 × dense", "linen", "tpu"),
        ("eager", "8×8, training", "nnx", None),
        ("jit", "16×32, gradient", "linen", None),
    ):
        told = {"kind": kind, "what": what, "interface": interface, "platform": platform, "unit": "units"}
        times = {FLAX: [1.0] * 3, OURS: [1.0, 1.5, 2.0], FUSED: [2.0] * 3}
        found.rows += [row(told, name, times, FLAX) for name in times]
    found.rows.append(row({"kind": "import", "what": "import jbn after jax"}, "jbn", {"jbn": [0.1, 0.3]}, None))
    return found


def test_what_is_told_of_them(tmp_path):
    found = results()
    assert overhead.found(found) == [
        "CPU seconds of trace, lower and compile, over Flax's: jbn 1.50 to 1.50×, jbn fused 2.00 to 2.00×.",
        "Lines of StableHLO, over Flax's: jbn 1.50 to 1.50×, jbn fused 2.00 to 2.00×.",
        "Eager calls of one layer, over Flax's: jbn 1.50 to 1.50×, jbn fused 2.00 to 2.00×.",
        "Small layers under jit, forward, gradient and inference, over Flax's: jbn 1.50 to 1.50×, jbn fused 2.00 to "
        "2.00×.",
        "Imports add jbn after jax 0.20 s of CPU time; of flax and triton `import jbn` loads neither.",
    ]
    assert overhead.markdown(found).splitlines()[2:] == [
        "| trace + lower + compile | 20 × dense, linen | 1.00 units | 1.50 (1.25–1.75) | 2.00 (2.00–2.00) |",
        "| StableHLO | 20 × dense, tpu | 1 units | 1.50 | 2.00 |",
        "| eager calls | 8×8, training, nnx | 1 units | 1.50 (1.25–1.75) | 2.00 (2.00–2.00) |",
        "| under jit | 16×32, gradient, linen | 1 units | 1.50 (1.25–1.75) | 2.00 (2.00–2.00) |",
        "| imports | import jbn after jax |  | 0.20 s (0.15–0.25) |  |",
    ]
    assert overhead.table(found).row_count == 10
    assert len(found.save(tmp_path, overhead.figure)) == 4


def test_a_quick_run_has_every_kind_but_resnet(monkeypatch):
    """Which measurements are taken; none is."""
    asked = []
    monkeypatch.setattr(imports, "imports", lambda names, turns: (asked.append(("import", *names)), ([], {}))[1])
    for module, name in ((calls, "eager"), (calls, "jitted")):
        monkeypatch.setattr(module, name, lambda shape, *_, name=name: asked.append((name, shape)) or [])
    for name in ("seconds", "lines"):
        monkeypatch.setattr(
            programs, name, lambda network, interface, *_, name=name: asked.append((name, network.name)) or []
        )
    monkeypatch.setattr(programs, "first", lambda *_: [])
    for quick in (True, False):
        asked.clear()
        overhead.run(Options(quick=quick), Results("overhead"))
        kinds = {kind for kind, *_ in asked}
        assert kinds == {"import", "eager", "jitted", "seconds", "lines"}
        assert (("seconds", "ResNet-50") in asked) == (not quick)
        assert len(asked[0]) == (2 if quick else 1 + len(imports.IMPORTS))
