"""Figures in READMEs are those of committed results: what GPUs measured of the kernels as they are."""

import json
import math
import re
from functools import partial

import pytest
from figures import (
    APART,
    H100,
    H200,
    KERNELS,
    README,
    ROOT,
    apart,
    gigabytes,
    lines,
    mean,
    ran_cells,
    speeds,
    step_cells,
)

from jbn._op.tables import AHEAD

CARDS = {"H200": (H200, "flight2", "flight3"), "H100": (H100, "again", "again")}
NAMES = {"flax.linen": "`flax.linen`", "jbn triton": "jbn, kernels, add + relu fused"}
LAYERS = [(256, "relu"), (128, "relu"), (256, "add + relu"), (128, "add + relu"), (32, "relu")]
MORE = [(32, "add + relu"), (256, "alone")]
RIVALS = {"flax.linen": "`flax.linen`", "jbn xla": "our own XLA"}
# of relu at batch 256: kernels' times, and our XLA's forward pass, which took longer than both passes in one program
DISTURBED = {
    (*who, "256×112×112×64", "relu") for who in (("H100", "flax.linen"), ("H100", "jbn xla"), ("H200", "jbn xla"))
}
both_cards = pytest.mark.parametrize("card", CARDS)


def of(card, kind):
    folder, layers, alone = CARDS[card]
    return lines(alone if kind in ("run", "check", "repeat", "baseline", "part") else layers, kind, folder)


def speed(card):
    """Of a training step beside Flax's, as written."""
    steps = {line["candidate"]: line["us"] for line in of(card, "step")}
    return f"{steps['flax.linen'] / steps['jbn triton']:.2f}×"


@both_cards
def test_training_step(card):
    steps = {line["candidate"]: line for line in of(card, "step")}
    flax, told = steps["flax.linen"], {}
    for name, step in steps.items():
        assert step["batch"] == 128
        told[name] = step_cells(step)
        beside = f"{flax['us'] / step['us']:.2f}× | {step['peak_bytes'] / flax['peak_bytes']:.2f}×"
        assert f"| {card} | {NAMES[name]} | {' | '.join(told[name])} | {beside} |" in KERNELS
    ours, (ms, images, gib) = told["jbn triton"], told["flax.linen"]
    memory = steps["jbn triton"]["peak_bytes"] / flax["peak_bytes"]
    what = f"| {card}¹ | training step of ResNet-50, batch 128, 224², bfloat16, SGD; add + relu fused |"
    row = "kernels {} ms ({} images/s, {} GiB), ".format(*ours) + f"Flax {ms} ms ({images}, {gib}): {speed(card)} as"
    assert f"{what} {row} fast, {memory:.2f}× the memory |" in README
    assert f"a training step of ResNet-50 {speed('H200')} and {speed('H100')} ([speed](#speed))" in README


@both_cards
def test_what_ran(card):
    """Milliseconds of a training step by what ran, and the bytes that our kernels cannot do without."""
    for candidate, name in (("flax.linen", "`flax.linen`"), ("jbn triton", "jbn, kernels")):
        cells, ours = ran_cells(of(card, "kernels"), candidate)
        assert f"| {card} | {name} | {cells} |" in KERNELS
    # of the kernels', the last of the loop
    assert f"{card}: {gigabytes():.1f} GB in {ours:.2f} ms, {gigabytes() / ours:.1f} TB/s" in KERNELS


def layers(card, other):
    """Lines of layers, to compare with another's; without what was disturbed."""
    return [line for line in of(card, "layer") if (card, other, line["case"], line["fused"]) not in DISTURBED]


@both_cards
def test_layers(card):
    rows = 0
    for batch, fused in LAYERS + MORE:
        for other, name in RIVALS.items():
            if count := len(speeds(layers(card, other), batch, fused, other, *APART)):
                told, between, *means = apart(layers(card, other), batch, fused, other)
                who = name if count == 12 else f"{name}, {count} shapes"
                assert f"| {card} | {batch}, {fused} | {who} | {told} {between} | {' | '.join(means)} |" in KERNELS
                rows += 1
    assert rows == sum(
        line.startswith((f"| {card} | 256, ", f"| {card} | 128, ", f"| {card} | 32, ")) for line in KERNELS.splitlines()
    )
    (flax, flax_range, *_), (xla, xla_range, *_) = (apart(layers(card, other), 256, "relu", other) for other in RIVALS)
    others = [apart(layers(card, "flax.linen"), *each, "flax.linen")[0] for each in LAYERS[1:4]]
    one = ", ".join(apart(layers(card, "flax.linen"), *each, "flax.linen")[-1] for each in LAYERS[:4])
    told = f"{flax} as fast as Flax {flax_range}, {xla} as our own XLA {xla_range}; "
    told += "at batch 128 {} as fast as Flax; with add + relu {} and {}. ".format(*others)
    assert f"{told}Both passes in one program, as in the step: {one}" in README
    small = apart(layers(card, "flax.linen"), 32, "relu", "flax.linen")[0]
    assert (f"At batch 32 {small}" if card == "H100" else f"on the H200 {small}. ") in README


def test_passes_of_layers():
    def passes(card, loss):
        (*_, forward, backward, _), (*_, xla_forward, xla_backward, _) = (
            apart(layers(card, other), 256, "relu", other) for other in RIVALS
        )
        told = f"{card}: forward {forward} as fast as Flax{loss}, {xla_forward} as our own XLA; "
        return told + f"backward {backward} as fast as Flax, {xla_backward} as our own XLA"

    assert f"| {passes('H200', '')}. {passes('H100', ', **a loss**')} |" in README
    ranges = []
    for card in CARDS:
        found = [
            mean(speeds(layers(card, "flax.linen"), batch, "relu", "flax.linen", *each))
            for batch in (128, 256)
            for each in (APART, ["both"])
        ]
        ranges.append(f"{min(found):.2f} to {max(found):.2f}×")
    told = "On an H200 its kernels are {} as fast as Flax's batch norm with relu, on an H100 {} (batch 128 and 256)"
    assert told.format(*ranges) in README


def chosen(found):
    return {
        (run["kernel"], run["fused"], run["dtype"], tuple(run["shape"])): run
        for run in found
        if run["chosen"] and run["ok"]
    }


def test_right():
    assert all(run["ok"] for card in CARDS for run in of(card, "run"))
    checks, repeats = of("H200", "check"), of("H200", "repeat")
    assert all(check["ok"] for check in checks) and not any(repeat["differing"] for repeat in repeats)
    counts = [len(of(card, "run")) for card in CARDS]
    assert "timed launches agree with float64, {} on the H200 and {} on the H100".format(*counts) in KERNELS
    assert f"({len(checks)} launches). {len(repeats)} launches, 100 times each" in KERNELS
    last = {line["part"].removeprefix("flight3-"): line["last"] for line in of("H200", "part")}
    assert last["memcheck"].endswith("ERROR SUMMARY: 0 errors")
    assert last["racecheck"].endswith("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)")
    assert last["bits"].startswith(f"out of time after {len(repeats)} of ")
    core = re.sub(r"\[ *\d+%\]|\s", "", last["core"])
    assert set(core) == {"."} and f"tests with kernels: {len(core)} passed" in KERNELS


def test_what_an_h200_changed():
    """Beside the kernels of before, in another flight."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from jbn.kernels.launches import Problem, gradient_sums, moments
    from jbn.kernels.tiling import View

    launches = {"moments": partial(moments, processors=132), "sums": partial(gradient_sums, kept=None, processors=132)}
    now, before = chosen(of("H200", "run")), chosen(lines("tried", "run", H200))

    def gain(*asked, where=lambda _: True):
        found = [
            before[key]["us"] / run["us"]
            for key, run in now.items()
            if key[:3] == asked and key in before and where(before[key])
        ]
        return f"{min(found):.2f} to {max(found):.2f}× ({len(found)} shapes)"

    def few(run):  # of a merging that was cut to the programs that there are
        return 1 < run["tiling"][2] <= 512 // run["tiling"][1]

    assert f"| {gain('sums', 'add + relu', 'bfloat16')} |" in KERNELS
    assert f"| {gain('moments', 'alone', 'bfloat16')} |" in KERNELS
    told = [gain(kernel, "alone", "float32", where=few) for kernel in ("moments", "sums")]
    assert "| moments {}, sums {} |".format(*told) in KERNELS

    def one(*asked):  # of the tilings tried then, the one that is chosen now
        key = *asked, "bfloat16", (32, 7, 7, 2048)
        launch = launches[asked[0]](Problem(View(1, 1568, 2048, 1), "bfloat16", activation="relu"))
        cut = [*launch.tiling], launch.constants["UNROLL"]
        [run] = [
            run
            for run in lines("tried", "run", H200)
            if (run["kernel"], run["fused"], run["dtype"], tuple(run["shape"])) == key
            and (run["tiling"], run["unroll"]) == cut
        ]
        assert run["ok"] and not run["chosen"]
        return before[key]["us"] / run["us"]

    assert f"| moments {one('moments', 'alone'):.2f}×, sums with relu {one('sums', 'relu'):.2f}× |" in KERNELS


@both_cards
def test_kernels_alone(card):
    """Of x over 100 MB: bytes a second beside those of a copy of the same x."""
    runs = {
        key: run["bytes"] / run["us"] / 1e6
        for key, run in chosen(of(card, "run")).items()
        if math.prod(key[3]) * (2 if key[2] == "bfloat16" else 4) > 100e6
    }
    copies = {key[2:]: speed for key, speed in runs.items() if key[0] == "copy"}
    shares = {key: speed / copies[key[2:]] for key, speed in runs.items() if key[0] not in ("copy", "read")}
    cells = [f"{min(copies.values()):.1f} to {max(copies.values()):.1f} TB/s"]
    for dtype in ("bfloat16", "float32"):
        moments = [value for key, value in shares.items() if key[2] == dtype and key[0] == "moments"]
        others = [value for key, value in shares.items() if key[2] == dtype and key[0] != "moments"]
        assert len(others) > 50
        cells += [
            f"{100 * min(moments):.0f} to {100 * max(moments):.0f} %",
            f"{100 * min(others):.0f} to {100 * max(others):.0f} %",
        ]
    assert f"| {card} | {' | '.join(cells)} |" in KERNELS


LAUNCHES = {  # of a pass, with what: sums with add + relu keep z̄, of which the second launch makes x̄
    "forward": [(("moments", "alone"), ("apply", fused)) for fused in ("alone", "relu", "add + relu")],
    "backward": [
        (("sums", "alone"), ("input", "alone")),
        (("sums", "relu"), ("input", "relu")),
        (("sums", "add + relu"), ("input", "alone")),
    ],
}


@both_cards
def test_passes_beside_a_copy(card):
    """Of x over 100 MB, the two launches of a pass together."""
    runs = chosen(of(card, "run"))
    told = []
    for name, passes in LAUNCHES.items():
        shares = []
        for kind, _, dtype, shape in runs:
            if kind == "copy" and math.prod(shape) * (2 if dtype == "bfloat16" else 4) > 100e6:
                copy = runs["copy", "alone", dtype, shape]
                for launches in passes:
                    both = [runs.get((*launch, dtype, shape)) for launch in launches]
                    if all(both):
                        speed = sum(run["bytes"] for run in both) / sum(run["us"] for run in both)
                        shares.append(100 * speed / (copy["bytes"] / copy["us"]))
        assert len(shares) > 45
        told.append(f"{name} {min(shares):.0f} to {max(shares):.0f} %")
    assert f"{card}: {', '.join(told)} of a copy" in KERNELS.replace("\n", " ")


@both_cards
def test_beside_pytorch(card):
    """Forward and backward: the faster of its two for each shape, over our four launches."""
    runs, told = chosen(of(card, "run")), []
    for dtype in ("bfloat16", "float32"):
        theirs = {}
        for line in of(card, "baseline"):
            if (line["pass"], line["dtype"]) == ("both", dtype):
                theirs.setdefault(tuple(line["shape"]), []).append(line["us"])
        found = []
        for shape, us in theirs.items():
            ours = [runs.get((kind, "alone", dtype, shape)) for kind in ("moments", "apply", "sums", "input")]
            if all(ours):
                found.append(min(us) / sum(run["us"] for run in ours))
        told.append(f"{dtype} {mean(found):.2f}× ({min(found):.2f} to {max(found):.2f}, {len(found)} shapes)")
    assert f"{card}: {', '.join(told)}." in KERNELS


@both_cards
def test_rows_that_the_package_ships(card):
    """Of lines, and only of passes that the device and not the host was timed in."""
    measured = {"2026-11-28": of(card, "layer"), "2026-11-27": lines("flight2", "layer")}
    found = {
        (date, *line["shape"], line["fused"], line["pass"], line["candidate"]): line
        for date, each in measured.items()
        for line in each
    }
    kind = of(card, "environment")[0]["card"].partition(",")[0]
    path = ROOT / f"jbn/_op/measured/{kind.lower().replace(' ', '-')}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    assert table["device"] == kind and sum(row["date"] == "2026-11-28" for row in table["rows"]) > 30
    together = 0
    for row in table["rows"]:
        key = row["date"], *row["shape"], "add + relu" if row["residual"] else row["activation"] or "alone"
        for each in APART:
            for name, us in (row[each] or {}).items():
                line = found[*key, each, f"jbn {name}"]
                assert us == round(line["us"], 3) and line["same"]
                assert line["host_us"] < 0.9 * line["us"]
        if all(row[each] and row[each]["triton"] < AHEAD * row[each]["xla"] for each in APART):
            ours, xla = (found.get((*key, "both", f"jbn {name}")) for name in ("triton", "xla"))
            if ours and xla:
                together += 1
                assert ours["us"] < xla["us"], key
    assert together > 20
