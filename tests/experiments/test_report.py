"""The report: all its numbers from the JSON, one page that needs nothing else, fit for phones and screen readers."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.__main__ import main, told
from experiments.framework import catalog, cutting, devices, plots, report
from experiments.framework.claim import Claim, Rule, judge
from experiments.framework.record import Results

ROOT = Path(__file__).resolve().parents[2]
NAME = "nvidia-h200"
COMMITTED = ROOT / "experiments/results/cpu"
CLAIM = Claim('a < b & "so | on" holds.', "A paper 2015, §3", "b over a", Rule((1.1, math.inf), (0, 1)), "×", True)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=3000",
)  # fmt: skip


def figure(results):
    fig, axes = plots.pyplot().subplots(1, 2, figsize=(7.2, 3), layout="constrained")
    for each in axes:
        plots.lines(each, [0, 1, 2], np.ones((5, 3)) + np.eye(5, 3), plots.BLUE, "batch norm")
        each.set(xlabel="steps", xlim=(0, 4))
    return fig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two finished experiments on claims, one job that says what it found, and one that does not."""
    out = tmp_path_factory.mktemp("results")
    for name, samples in (("first", [2.0, 2.5, 3.0, 2.2, 2.4]), ("second", [0.5] * 5)):
        results = Results(name, {"seed": 7}, [{"a": 1}], complete=True, seconds=83.0)
        results.summary = {
            "question": f"Is <{name}> so?",
            "design": "One `code` paragraph.\n\nAnother.",
            "caption": "Curves & bands.",
            "findings": {"only": judge(CLAIM, samples, quick=False)},
        }
        results.save(out, figure)
    job = Results("job", {}, [{"a": 1}], complete=True, seconds=7.0)
    job.told = {"question": "How <fast>?", "design": "", "found": ["Twice & more.", "On one device."]}
    job.save(out, figure)
    (out / "speed.json").write_text(json.dumps({"complete": True, "summary": {}, "rows": []}), encoding="utf-8")
    assert main(["report", "--out", str(out)]) == 0
    return out


def test_markdown(folder):
    assert (folder / "report.md").read_text(encoding="utf-8").splitlines() == [
        "| experiment | claim | source | verdict | effect | 95 % interval | took |",
        "|---|---|---|---|---|---|---|",
        '| `first` | a < b & "so \\| on" holds. | A paper 2015, §3 | supported | 2.40× b over a '
        f"| {interval(folder, 'first')} | 83 s |",
        '| `second` | a < b & "so \\| on" holds. | A paper 2015, §3 | contradicted | 0.500× b over a '
        "| 0.500 to 0.500 | 83 s |",
    ]  # fmt: skip


def interval(folder, name):
    finding = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["summary"]["findings"]["only"]
    return f"{finding['low']:.2f} to {finding['high']:.2f}"


class Reader(HTMLParser):
    """Tags that are open, ids, links and the labels of drawings."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.links, self.labels = [], [], [], []

    def handle_starttag(self, tag, attributes):
        told = dict(attributes)
        if tag not in ("meta", "link", "br", "td"):
            self.open.append(tag)
        self.ids += [told["id"]] if "id" in told else []
        self.links += [told[key] for key in ("href", "src", "xlink:href") if key in told]
        if told.get("role") == "img":
            self.labels.append(told["aria-label"])

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
        while self.open[-1] == "tr" != tag:  # need not be closed
            self.open.pop()
        assert self.open.pop() == tag


def test_page_is_whole_and_needs_no_network(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert len(set(reader.ids)) == len(reader.ids)
    assert {link for link in reader.links if not link.startswith("#")} == {"data:,"}
    assert {link[1:] for link in reader.links if link.startswith("#")} <= set(reader.ids)
    assert set(re.findall(r"url\(#([^)]*)\)", text)) <= set(reader.ids)
    assert reader.labels == ["Curves & bands.", "Curves & bands.", "How <fast>?"]
    assert "<script" not in text
    assert "Is &lt;first&gt; so?" in text and "One <code>code</code> paragraph." in text
    for color in (plots.INK, plots.GREY, plots.BLUE):
        drawings = text[text.index("<svg") :]
        assert color.lower() not in drawings.lower(), "a colour that does not follow the theme"
    assert "$" not in text


def test_page_holds_the_numbers_of_the_json(folder):
    text = " ".join((folder / "report.html").read_text(encoding="utf-8").split())
    assert "2 claims, from the literature or drawn from it, in 2 experiments" in text
    assert "1 supported, 1 contradicted" in text
    low, _, high = interval(folder, "first").split()
    assert f"<b>2.40× ({low} to {high})</b>: b over a; 5 seeds." in text
    assert "Rule: ≥ 1.1× supported, 0 to 1× contradicted." in text
    assert "seed 7." in text and "2.8 min" in text
    assert text.count("took 83 s") == 2 and text.count("took 7 s") == 1


def test_contents_come_first_a_row_for_each_experiment(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    contents = text[text.index("<nav") : text.index("</nav>")]
    assert "<section" not in text[: text.index("</nav>")]
    rows = re.findall(r"<tr><td><a href='#(\w+)'>(.*?)</a><td>(.*)", contents)
    assert [row[:2] for row in rows] == [
        ("first", "Is &lt;first&gt; so?"),
        ("second", "Is &lt;second&gt; so?"),
        ("job", "How &lt;fast&gt;?"),
    ]
    assert [re.sub("<.*?>", "", row[2]) for row in rows] == ["1 supported", "1 contradicted", "Twice &amp; more."]
    assert "<p>On one device.</p>" in text


def cuts(draw=lambda fig: None, rows=1, width=6.0, **how):
    """For each part of three panels a row: which panels and how many points of labels it shows."""
    fig, panels = plots.pyplot().subplots(rows, 3, figsize=(width, 2 * rows), layout="constrained", **how)
    draw(fig)
    found = cutting.parts(fig)
    centres = {
        i: (x0 * 72 * width, 144 * rows * (1 - y0)) for i, each in enumerate(panels.flat) for x0, y0 in middle(each)
    }
    plots.pyplot().close(fig)
    assert cutting.read(cutting.written(found)) == [[pytest.approx(box, abs=0.06) for box in part] for part in found]
    shown = []
    for part in found:
        *labels, (left, top, wide, high) = part
        inside = [i for i, (x, y) in centres.items() if left < x < left + wide and top < y < top + high]
        shown.append((inside, sum(box[2] for box in labels)))
    return shown


def middle(axes):
    box = axes.get_position()
    return [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)]


def test_drawings_are_cut_between_panels_that_stand_alone():
    assert cuts() == [([0], 0), ([1], 0), ([2], 0)]
    assert cuts(lambda fig: fig.axes[1].tick_params(labelleft=False)) == [([0, 1], 0), ([2], 0)]
    assert cuts(rows=2) == [([i], 0) for i in range(6)]
    assert cuts(rows=2, sharex=True) == [([i, i + 3], 0) for i in range(3)]


def test_panels_with_one_scale_part_where_a_phone_has_no_room():
    """The scale is shown with each part, from the figure's edge to the panel's own."""
    assert cuts(width=4.5, sharey=True) == [([0, 1, 2], 0)]
    [(first, none), (second, labels)] = cuts(sharey=True)
    assert (first, second, none) == ([0, 1], [2], 0) and 15 < labels < 40


def test_what_stands_over_all_panels_is_a_row():
    over_all = ([], 0)
    for draw in (
        lambda fig: fig.suptitle("over all"),
        lambda fig: plots.samples(fig, {"all": {"color": "red"}}, loc="outside upper left"),
    ):
        assert cuts(draw) == [over_all, ([0], 0), ([1], 0), ([2], 0)]
    assert cuts(lambda fig: fig.supxlabel("below all", x=0, ha="left"))[-1] == over_all


def test_a_drawing_of_several_boxes_shows_them_side_by_side():
    """Labels, then the panel, each from its own place in the whole."""
    drawn = report.view([(0.0, 5.0, 30.0, 80.0), (200.0, 5.0, 100.0, 80.0)], "name-figure_1", below=True)
    assert drawn.startswith('<i></i><svg viewBox="0 0 130 80" style="--points: 130">')
    assert re.findall(r'<svg x="(\d+)" y="0" width="(\d+)" height="80" viewBox="([^"]*)">', drawn) == [
        ("0", "30", "0 5 30 80"),
        ("30", "100", "200 5 100 80"),
    ]
    assert drawn.count('<use href="#name-figure_1"/>') == 2


def test_style_lets_nothing_be_wider_than_the_page():
    """What holds without a browser: long words wrap, drawings and tables give way, no width is fixed."""
    [style] = re.findall("<style>(.*)</style>", report.TEMPLATE.read_text(encoding="utf-8"), re.DOTALL)
    wide = re.findall(r"([^{}]+?)\s*\{([^{}]*)\}", style.partition("@media (max-width")[0])
    rules = {" ".join(selector.split()): rule for selector, rule in wide}
    assert "overflow-wrap: anywhere" in style
    assert "overflow-x: auto" in rules[".scroll"]
    assert re.search(r"\.parts > svg \{[^}]*min-width: 0; max-width: 100%", style)
    assert "flex-wrap: wrap" in rules[".parts"]
    assert "minmax(0, 2fr) minmax(0, 3fr)" in rules[".beside"]
    assert re.findall(r"[^-]width: (?!100%|\d+%|auto|0;)\S+", style.replace("max-width", "")) == []
    assert [rule for rule in rules if "nowrap" in rules[rule]] == [".verdict"]
    assert '<nav aria-label="contents" class="scroll"' in report.TEMPLATE.read_text(encoding="utf-8")


PROBE = """
<body style="margin:0; color-scheme:SCHEME">
<iframe id="f" src="PAGE" style="border:0; width:WIDTHpx; height:800px; color-scheme:SCHEME"></iframe>
<script>
document.getElementById("f").onload = (event) => {
  const page = event.target.contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach((each) => { each.open = true; });
  const wide = [...page.querySelectorAll("body *")].filter((e) => !e.closest(".source") && !e.closest("svg *"))
    .filter((e) => e.getBoundingClientRect().right > root.clientWidth + 1).map((e) => e.tagName);
  const lightness = (color) => color.match(/\\d+/g).slice(0, 3).reduce((sum, each) => sum + +each, 0) / 765;
  const style = event.target.contentWindow.getComputedStyle(page.body);
  document.title = JSON.stringify({over: root.scrollWidth - root.clientWidth, wide,
    drawings: page.querySelectorAll("[role=img][aria-label]").length,
    smallest: Math.min(...[...page.querySelectorAll(".whole > svg, .parts > svg")]
      .filter((e) => e.getClientRects().length)
      .map((e) => e.getBoundingClientRect().width / e.viewBox.baseVal.width)),
    paper: lightness(style.backgroundColor), ink: lightness(style.color)});
};
</script>"""


def looked_at(page, width, scheme, profile):
    """What a browser finds in a frame as wide as a phone or a screen."""
    probe = page.with_name(f"probe-{page.stem}-{width}-{scheme}.html")
    replaced = PROBE.replace("WIDTH", str(width)).replace("SCHEME", scheme).replace("PAGE", page.name)
    probe.write_text(replaced.replace("\\\\", "\\"), encoding="utf-8")
    # a page may look into a frame beside it only where files count as one origin
    told = ("--allow-file-access-from-files", f"--user-data-dir={profile}", "--dump-dom", probe.as_uri())
    done = subprocess.run([str(CHROMIUM), *QUIET, *told], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    [title] = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
    return json.loads(title)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width, scheme", [(375, "light"), (375, "dark"), (1280, "light"), (1280, "dark")])
def test_in_a_browser(tmp_path, width, scheme):
    """The page on the committed results: no errors, nothing wider than it, all details open; ink differs from paper."""
    page = tmp_path / "report.html"
    records = report.read(COMMITTED)
    page.write_text(report.page(records, COMMITTED), encoding="utf-8")
    found = looked_at(page, width, scheme, tmp_path / "profile")
    assert (found["over"], found["wide"]) == (0, [])
    jobs = report.read_jobs(COMMITTED)
    assert found["drawings"] == len(records) + len(jobs)
    assert page.read_text(encoding="utf-8").count("<details class=job>") == len(jobs)  # else the page is too long
    assert found["smallest"] > 0.85  # of the size drawn, at which most text has 8 or 9 points
    light, dark = ("paper", "ink") if scheme == "light" else ("ink", "paper")
    assert found[light] > 0.85 and found[dark] < 0.15


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize(
    "planted", ["<p><img width=400 height=9 alt=''></p>", "<p style='white-space:nowrap'>" + "wide " * 200 + "</p>"]
)
def test_the_browser_finds_what_is_too_wide(folder, tmp_path, planted):
    text = (folder / "report.html").read_text(encoding="utf-8")
    (tmp_path / "wide.html").write_text(text.replace("</section>", f"{planted}</section>", 1), encoding="utf-8")
    assert looked_at(tmp_path / "wide.html", 375, "light", tmp_path / "profile")["over"] > 0


def test_redraw_follows_from_committed_numbers(tmp_path):
    """A study and a job: the results are what was committed, and the drawings are made anew."""
    for name in ("scale_invariance", "folding"):
        shutil.copy(COMMITTED / f"{name}.json", tmp_path)
    assert main(["redraw", "--out", str(tmp_path)]) == 0
    for name in ("scale_invariance", "folding"):
        again, before = (
            json.loads((each / f"{name}.json").read_text(encoding="utf-8")) for each in (tmp_path, COMMITTED)
        )
        for mine, theirs in zip(found_in(again), found_in(before), strict=True):  # rounding is NumPy's
            assert mine.pop("samples") == pytest.approx(theirs.pop("samples"), rel=1e-12, abs=1e-12)
        assert again == before and list(again) == list(before)
        assert (tmp_path / f"{name}.csv").read_bytes() == (COMMITTED / f"{name}.csv").read_bytes()
        assert (tmp_path / f"{name}.svg").exists() and (tmp_path / f"{name}.png").exists()
    assert (tmp_path / "report.html").exists()


def job(name):
    experiment: Any = catalog.load(catalog.discover()[name])
    return experiment


@pytest.mark.parametrize("name", ["digits", "speed", "overhead", "folding", "communication", "binaries"])
def test_what_jobs_found_is_what_was_measured(name):
    if name == "binaries":
        pytest.importorskip("triton")
    results = Results.read(COMMITTED / f"{name}.json")
    assert results.told == told(job(name), results)
    assert results.told["question"].endswith("?")


def test_gpus_are_told_of(folder, tmp_path):
    """What runs on a GPU found, in the contents and in a section, where there is a folder of them beside."""
    assert "How fast are the kernels" not in (folder / "report.html").read_text(encoding="utf-8")
    h100, h200 = devices.devices(COMMITTED.parent / "gpu")
    assert (h100.card, h200.card) == ("NVIDIA H100 80GB HBM3", "NVIDIA H200")
    step, *layers, where = h200.found
    kernels = (ROOT / "kernels/README.md").read_text(encoding="utf-8")
    assert "21.0 ms with flax.linen; 19.3 ms with jbn triton: 1.09× as fast, 1.11× the memory" in step
    assert "| 21.0 |" in kernels and "| 1.09× | 1.11× |" in kernels
    assert "1.43× as fast as Flax (1.12 to 1.57, 12 shapes)" in layers[0] and "| 1.43× (1.12 to 1.57) |" in kernels
    assert [layer.partition(",")[0] for layer in layers[:4:2]] == ["A layer with relu", "A layer with add + relu"]
    assert where == f"All of it is printed by `.ci/flight summary experiments/results/gpu/{NAME}/flight2.jsonl`."
    assert "24.9 ms with flax.linen; 23.3 ms with jbn triton: 1.07× as fast" in h100.found[0]  # as measured again
    assert h100.found[-1].endswith("/again.jsonl`.")

    shutil.copytree(folder, tmp_path / "cpu")
    lines = [
        {"kind": "environment", "card": "Some <card>, 1"},
        {"kind": "step", "candidate": "flax.linen", "named": False, "batch": 8, "us": 2e3, "peak_bytes": 4},
        {"kind": "step", "candidate": "jbn triton", "named": True, "batch": 8, "us": 1e3, "peak_bytes": 5},
    ]
    (tmp_path / "gpu/some").mkdir(parents=True)
    (tmp_path / "gpu/some/flight2.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    report.write(tmp_path / "cpu")
    text = (tmp_path / "cpu/report.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(text)
    assert reader.open == [] and "#gpu-some" in reader.links and "gpu-some" in reader.ids
    told = "2.0 ms with flax.linen; 1.0 ms with jbn triton, saving memory: 2.00× as fast, 1.25× the memory."
    assert text.count(told) == 2 and text.count("(Some &lt;card&gt;)?") == 2


def test_nothing_to_report(tmp_path, capsys):
    assert main(["report", "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert f"error: no results of experiments on claims in {tmp_path}: `python -m experiments all" in error
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy/second.svg").unlink()
    with pytest.raises(report.NothingToReport, match=r"second.svg is missing beside its JSON file: run `second` again"):
        report.write(tmp_path / "copy")
    path = tmp_path / "copy/first.json"
    path.write_text(path.read_text(encoding="utf-8")[:50], encoding="utf-8")
    with pytest.raises(report.NothingToReport, match=r"first.json is damaged \(.*\): run that experiment again"):
        report.write(tmp_path / "copy")


def found_in(record):
    return record["summary"].get("findings", {}).values()


def test_redraw_names_a_damaged_file(tmp_path, capsys):
    (tmp_path / "digits.json").write_text('{"experiment": "digits"', encoding="utf-8")
    assert main(["redraw", "--out", str(tmp_path)]) == 1
    assert f"error: {tmp_path}/digits.json is damaged (" in capsys.readouterr().err


def test_of_an_unfinished_job_nothing_is_told():
    results = Results("folding", {}, [{"case": "a"}])
    assert told(job("folding"), results) == {}
