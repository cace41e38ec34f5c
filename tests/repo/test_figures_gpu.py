"""Figures in READMEs are those of committed results: what an H100 measured of kernels before those that are now."""

import math
import re

import scipy.stats
from figures import (
    APART,
    EXPERIMENTS,
    KERNELS,
    README,
    apart,
    gigabytes,
    lines,
    norms,
    ran_cells,
    results,
    speeds,
    step_cells,
    steps,
)

from experiments.material import models
from jbn.kernels.tiling import View, choose


def test_training_step_on_a_gpu():
    found = steps()
    flax, saving = found["flax.linen", False], found["jbn triton", True]

    def beside(step):
        return f"{flax['us'] / step['us']:.2f}", f"{step['peak_bytes'] / flax['peak_bytes']:.2f}"

    assert len(found) == 5
    for step in found.values():
        assert f"| {' | '.join(step_cells(step))} | {'× | '.join(beside(step))}× |" in KERNELS
    [row] = [line.split("|")[3] for line in README.splitlines() if "saving memory as above, in six" in line]
    assert re.findall(r"\d+\.?\d*", row) == [*step_cells(saving)[::2], *beside(saving)]
    assert len(models.SEGMENTS) == 6  # one is the stem, and the last is an end
    assert "in six checkpoints" in README and "in six checkpoints" in KERNELS
    disturbed = [
        line["us"] for line in lines("tried", "step") if line.get("beside") and line["candidate"] == "flax.linen"
    ]
    assert f"took {disturbed[0] / 1e3:.1f} ms, and it was called 1.36×" in KERNELS
    assert f"took {disturbed[0] / 1e3:.1f} ms and once {disturbed[1] / 1e3:.1f}" in EXPERIMENTS


def test_what_a_gpu_ran():
    """Milliseconds of a training step by what ran, and the bytes that our kernels cannot do without."""
    kernels = lines("flight2", "kernels")
    for candidate, name in (("flax.linen", "`flax.linen`"), ("jbn triton", "jbn, kernels")):
        cells, ours = ran_cells(kernels, candidate)
        assert f"| {name} | {cells} |" in KERNELS
    # of the kernels', the last of the loop
    assert f"move {gigabytes():.1f} GB in those {ours:.2f} ms, {gigabytes() / ours:.1f} TB/s" in KERNELS
    ran = {(line["candidate"], line["kernel"]): line for line in kernels}
    launches = {
        name: [round(ran[who, name]["launches"]) for who in ("jbn triton", "flax.linen")]
        for name in ("XLA", "copies and zeros")
    }
    assert "are {} launches ({} with Flax)".format(*launches["XLA"]) in KERNELS
    zeros, flax = launches["copies and zeros"]
    assert f"of {zeros} copies and zeros ({flax} with Flax) {zeros - flax} are" in KERNELS


def itemsize(run):
    return 2 if run["dtype"] == "bfloat16" else 4


def tried(kind, *how):
    """By how it was tried, in order."""
    return {each: [line for line in lines("tried", kind) if line.get("tried") == each] for each in how}


def test_walks_on_a_gpu():
    start, end, both = walks = (
        "tiles from the start, then from the end",
        "from the end, then from the start",
        "both launches from the end",
    )
    typed, cut, flax = ", as typed custom calls", end + ", blocks cut anew", ("beside walks", "beside blocks cut anew")
    taken = tried("step", *walks, start + typed, end + typed, cut, *flax)
    ms = {each: f"{found[0]['us'] / 1e3:.2f}" for each, found in taken.items()}
    kernels = ("jbn_moments", "jbn_apply", "jbn_gradient_sums", "jbn_gradient_input", "cuDNN and cuBLAS")
    for each, found in tried("kernels", *walks).items():
        ran = {line["kernel"]: f"{line['us'] / 1e3:.2f}" for line in found}
        assert f" | {' | '.join(ran[kernel] for kernel in kernels)} | {ms[each]} |\n" in KERNELS
    assert f"Beside them Flax's took {ms[flax[0]]}" in KERNELS
    speed = float(ms[flax[1]]) / float(ms[cut])
    assert (
        f"With that the step took {ms[cut]} in another flight, and Flax's {ms[flax[1]]}, again {speed:.2f}×" in KERNELS
    )
    [checks], [repeats] = (tried(kind, cut).values() for kind in ("check", "repeat"))
    assert all(check["ok"] for check in checks) and not any(repeat["differing"] for repeat in repeats)
    assert f"found nothing on {len(checks)} launches, and {len(repeats)} gave the same bits" in KERNELS
    assert f"a training step of {ms[both]} ms, and {ms[end]} with the second from the start" in KERNELS
    told = (
        f"a training step of {ms[end + typed]} ms, and {ms[end]} without; with the walks of before {ms[start + typed]}"
    )
    assert f"{told} and {ms[start]} |" in KERNELS


def test_blocks_on_a_gpu():
    """Wide blocks by size beside those where they fill the device, where `choose` cuts so now; and larger tiles."""

    def best(how):
        """The least time, and whether the library now has blocks of that width."""
        found = {}
        for run in tried("run", how)[how]:
            assert run["ok"]
            *rows, channels = run["shape"]
            cut = choose(View(1, math.prod(rows), channels, 1), itemsize(run), 132, 4096, 2)
            key = run["dtype"], run["fused"], tuple(run["shape"])
            us, _ = found.get(key, (math.inf, None))
            found[key] = min(us, run["us"]), run["tiling"][1] == cut.CHANNELS
        return found

    def gains(how, other):
        ours, others = best(how), best(other)
        return {key: (others[key][0] / us, chosen) for key, (us, chosen) in ours.items()}

    taken = {"bfloat16": [], "float32": []}
    for (dtype, *_), (gain, chosen) in gains("wide blocks by size", "wide blocks where full").items():
        taken[dtype] += [gain] * chosen
    halves, floats = taken.values()
    assert f"{min(halves):.2f} to {max(halves):.2f}× as fast for the {len(halves) // 3} shapes" in KERNELS
    assert f"it changes large x of few\nchannels, {min(floats):.2f} to {max(floats):.2f}×" in KERNELS
    gain = {key: value for key, (value, _) in gains("tiles of 4096", "tiles of 2048").items()}
    large = [value for (*_, shape), value in gain.items() if math.prod(shape) * 2 > 100e6]
    told = f"{min(gain.values()):.2f} to {max(gain.values()):.2f}×, above 100 MB {min(large):.2f} to {max(large):.2f}×"
    assert told in KERNELS


LAYERS = [
    (256, "relu"),
    (128, "relu"),
    (256, "add + relu"),
    (128, "add + relu"),
    (256, "alone"),
    (128, "alone"),
    (32, "relu"),
]
RIVALS = {"flax.linen": "`flax.linen`", "jbn xla": "our own XLA", "torch": "PyTorch, native and cuDNN"}


def test_layers_on_a_gpu():
    rows, layers = 0, lines("flight2", "layer")
    for batch, fused in LAYERS:
        for other, name in RIVALS.items():
            if count := len(speeds(layers, batch, fused, other, "forward")):
                told, between, *means = apart(layers, batch, fused, other)
                who = name if count == 12 else f"{name}, {count} shapes"
                assert f"| {batch}, {fused} | {who} | {told} {between} | {' | '.join(means)} |" in KERNELS
                rows += 1
    assert rows == sum(line.startswith(("| 256, ", "| 128, ", "| 32, ")) for line in KERNELS.splitlines())
    assert f"Kernels of before: {apart(layers, 256, 'relu', 'torch')[0]} as fast as PyTorch (6 shapes)" in README


def test_kernels_on_a_gpu():
    runs = lines("flight3", "run")
    assert all(run["ok"] for run in runs)
    chosen = [run for run in runs if run["chosen"] and run["dtype"] == "bfloat16" and math.prod(run["shape"]) > 50e6]
    copies = {tuple(run["shape"]): run["bytes"] / run["us"] for run in chosen if run["kernel"] == "copy"}
    least, most = min(copies.values()) / 1e6, max(copies.values()) / 1e6
    assert f"moves {least:.1f} to {most:.1f} TB/s" in KERNELS
    shares = [
        run["bytes"] / run["us"] / copies[shape]
        for run in chosen
        if run["kernel"] not in ("copy", "read") and (shape := tuple(run["shape"])) in copies
    ]
    assert len(shares) > 50 and f"at least {100 * min(shares):.0f} % of what the copy" in KERNELS
    checks, repeats = lines("flight3", "check"), lines("flight3", "repeat")
    assert all(check["ok"] for check in checks) and not any(repeat["differing"] for repeat in repeats)
    assert f"on all kernels ({len(checks)}\nlaunches). {len(repeats)} launches, 100 times each" in KERNELS


def runs(flight):
    return [run for run in lines(flight, "run") if run["kernel"] not in ("copy", "read")]


def in_flight(run):
    """KiB that a multiprocessor asks for, by the model, of a launch that was measured channels last."""
    reads = {"moments": 1, "apply": 1, "sums": 2, "input": 2}[run["kernel"]] + (
        run["fused"] == "add + relu" and run["kernel"] != "input"
    )
    rows, channels, splits, _ = run["tiling"]
    tiles = min(run["unroll"] or 1, math.ceil(math.prod(run["shape"][:-1]) / (rows * splits)))
    return (
        min(run["resident"], math.ceil(run["programs"] / 132)) * tiles * rows * channels * reads * itemsize(run) / 1024
    )


def test_bytes_in_flight():
    found = [row for row in results("binaries")["rows"] if row["ceiling_tbs"]]
    names = list(dict.fromkeys(row["launch"] for row in found if row["of_a_copy"]))
    for name in names:
        cells = [
            f"{row['in_flight_bytes'] / 1024:.0f} | {row['ceiling_tbs']:.1f} | {100 * row['of_a_copy']:.0f} %"
            for row in found
            if (row["launch"], row["layout"]) == (name, "last")
        ]
        assert f"| `{name}` | {' | '.join(cells)} |" in KERNELS, (name, cells)
    aligned = [row["ceiling_tbs"] for row in found if row["layout"] != "unaligned" and "mask" not in row["launch"]]
    assert f"has a ceiling under {min(aligned):.1f} TB/s, channels last or first" in KERNELS
    masked = [row for row in found if (row["launch"], row["dtype"]) == ("moments, mask of rows", "bfloat16")]
    ceilings = {row["layout"]: f"{row['ceiling_tbs']:.1f}" for row in masked}
    assert (
        f"mask of rows {ceilings['last']} TB/s in bfloat16, and 32×7×7×512, channels first, {ceilings['unaligned']}"
        in KERNELS
    )


def test_what_the_model_of_bytes_in_flight_does_not_tell():
    def chosen(flight, kernel, shape):
        asked = (kernel, "alone", shape, "bfloat16", True)
        (run,) = (r for r in runs(flight) if (r["kernel"], r["fused"], r["shape"], r["dtype"], r["chosen"]) == asked)
        return f"{in_flight(run):.0f}", f"{run['bytes'] / run['us'] / 1e6:.2f}"

    (was, then), (are, now) = (chosen(flight, "moments", [256, 112, 112, 64]) for flight in ("flight1", "flight3"))
    assert (
        f"moments had {was} KiB in flight and\n  moved {then} TB/s; in `flight3.jsonl` they have {are} and move {now}"
        in KERNELS
    )
    (was, then), (are, now) = (chosen(flight, "apply", [256, 112, 112, 64]) for flight in ("flight1", "flight3"))
    assert f"went from {was} KiB and {then} TB/s to {are} and {now}" in KERNELS
    copies = {
        tuple(run["shape"]): run
        for run in lines("flight3", "run")
        if (run["kernel"], run["dtype"]) == ("copy", "bfloat16")
    }
    copy = copies[256, 56, 56, 256]
    speed = float(chosen("flight3", "moments", [256, 56, 56, 256])[1]) / (copy["bytes"] / copy["us"] / 1e6)
    assert f"the same tiles reach {100 * speed:.0f} %" in KERNELS

    def agreement(kernel, fused):
        """The mean over shapes of the rank correlation between the model and the GPU, over tilings."""
        groups = {}
        for run in runs("flight3"):
            large = math.prod(run["shape"]) * 2 > 100e6
            if (run["kernel"], run["fused"], run["dtype"]) == (kernel, fused, "bfloat16") and large:
                groups.setdefault(tuple(run["shape"]), []).append((in_flight(run), run["bytes"] / run["us"]))
        shown = [scipy.stats.spearmanr(group).statistic for group in groups.values() if len(group) >= 5]
        return f"{sum(shown) / len(shown):.2f}".replace("-", "−")

    sums = [agreement(*case) for case in (("moments", "alone"), ("sums", "relu"), ("sums", "add + relu"))]
    assert f"{sums[0]}\n  (moments), {sums[1]} (sums with relu) and {sums[2]} (sums with add + relu)" in KERNELS, sums
    streams = sorted(agreement(*case) for case in (("apply", "relu"), ("apply", "add + relu"), ("input", "relu")))
    assert f"streamed they are {streams[0]} to\n  {streams[-1]}" in KERNELS, streams


def test_layers_of_a_training_step():
    """What 53 batch norms take at batch 128, in one program each, and in two."""
    layers = {
        (*line["shape"], line["fused"], line["candidate"], line["pass"]): line["us"]
        for line in lines("flight2", "layer")
        if line["shape"][0] == 128
    }

    def ms(candidate, *passes):
        us = sum(layers[(*shape, fused, candidate, each)] for shape, fused in norms() for each in passes)
        return f"{us / 1e3:.1f}"

    together = f"kernels take {ms('jbn triton', 'both')} ms and Flax {ms('flax.linen', 'both')}"
    assert f"{together}; apart {ms('jbn triton', *APART)}\nand {ms('flax.linen', *APART)}." in KERNELS
