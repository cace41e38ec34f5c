"""The report: all its numbers from the JSON, one page that needs nothing else, fit for phones and screen readers."""

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from experiments.__main__ import main
from experiments.framework import plots, report
from experiments.framework.claim import Claim, Rule, judge
from experiments.framework.record import Results

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
    """Two finished experiments, and one that is none on a claim."""
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
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.ids += [told["id"]] if "id" in told else []
        self.links += [told[key] for key in ("href", "src", "xlink:href") if key in told]
        if tag == "svg":
            self.labels.append((told["role"], told["aria-label"]))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "link", "br"):
            self.open.pop()

    def handle_endtag(self, tag):
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
    assert reader.labels == [("img", "Curves & bands.")] * 2
    assert "Is &lt;first&gt; so?" in text and "One <code>code</code> paragraph." in text
    for color in (plots.INK, plots.GREY, plots.BLUE):
        drawings = text[text.index("<svg") :]
        assert color.lower() not in drawings.lower(), "a colour that does not follow the theme"
    assert "$" not in text


def test_page_holds_the_numbers_of_the_json(folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "2 claims, from the literature or drawn from it, in 2 experiments" in " ".join(text.split())
    assert "1 supported, 1 contradicted" in text
    low, _, high = interval(folder, "first").split()
    assert f"2.40× ({low} to {high})" in text
    assert "seed 7." in text and "2.8 min" in text


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [360, 1200])
def test_in_a_browser(folder, tmp_path, width):
    """In a frame as wide as a phone or a screen: no errors, nothing wider than the frame, text not too small."""
    probe = """
    <body style="margin:0"><iframe id="f" src="report.html" style="border:0;width:WIDTHpx;height:800px"></iframe>
    <script>
    document.getElementById("f").onload = (event) => {
      const page = event.target.contentDocument, root = page.documentElement;
      const wide = [...page.querySelectorAll("body *")].filter((e) => !e.closest(".scroll"))
        .filter((e) => e.getBoundingClientRect().right > root.clientWidth + 1).map((e) => e.tagName);
      const texts = [...page.querySelectorAll("svg text")].map((e) => e.getBoundingClientRect().height);
      document.title = JSON.stringify({over: root.scrollWidth - root.clientWidth, wide,
        smallest: Math.min(...texts), drawings: page.querySelectorAll("svg[role=img][aria-label]").length});
    };
    </script>"""
    # a page may look into a frame beside it only where files count as one origin
    (folder / f"probe{width}.html").write_text(probe.replace("WIDTH", str(width)), encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *QUIET, "--allow-file-access-from-files", f"--user-data-dir={tmp_path}", "--dump-dom",
         (folder / f"probe{width}.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    [title] = re.findall(r"<title>(\{.*?\})</title>", done.stdout)
    found = json.loads(title)
    assert (found["over"], found["wide"], found["drawings"]) == (0, [], 2)
    assert found["smallest"] > 8  # pixels, the line height of the smallest text in a drawing


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
