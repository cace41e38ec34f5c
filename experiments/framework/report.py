"""The report on a folder of results: one HTML page that needs nothing else, and one Markdown table."""

import html
import itertools
import json
import re
import string
from pathlib import Path
from typing import Any

from experiments.framework import cutting, plots
from experiments.framework import devices as gpu
from experiments.framework.claim import number, shown
from experiments.framework.record import replacing

TEMPLATE = Path(__file__).with_name("report.html")
THEMED = {plots.INK: "--ink", plots.GREY: "--grey", plots.FAINT: "--faint", "#ffffff": "--panel", plots.BLUE: "--blue"}
COLUMNS = ("experiment", "claim", "source", "verdict", "effect", "95 % interval", "took")


class NothingToReport(ValueError):
    """The folder holds no finished results of experiments on claims, or one that cannot be read."""


def write(out: Path) -> list[Path]:
    """Writes `<out>/report.html` and `<out>/report.md` from the results there; returns the paths.

    Raises:
      NothingToReport: there are none, or a file of theirs is damaged or lacks its figure.
    """
    records = read(out)
    paths = [out / "report.html", out / "report.md"]
    for path, text in zip(paths, (page(records, out), markdown(records)), strict=True):
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return paths


def read(out: Path) -> list[dict[str, Any]]:
    """The finished results on claims in a folder, by name."""
    records = []
    for path in sorted(out.glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise NothingToReport(f"{path} is damaged ({error}): run that experiment again") from error
        if record.get("complete") and "findings" in record.get("summary", {}):
            records.append(record)
    if not records:
        raise NothingToReport(
            f"no results of experiments on claims in {out}: `python -m experiments all --out {out}` makes them"
        )
    return records


def cells(record: dict[str, Any], finding: dict[str, Any]) -> tuple[str, ...]:
    """One row of the table of findings, as plain text, in the order of `COLUMNS`."""
    low, high, unit = number(finding["low"]), number(finding["high"]), finding["unit"]
    return (
        record["experiment"],
        finding["says"],
        finding["source"],
        finding["verdict"],
        f"{number(finding['mean'])}{unit} {finding['effect']}",
        f"{low} to {high}",
        duration(record["seconds"]),
    )


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def markdown(records: list[dict[str, Any]]) -> str:
    """The table of experiments/README.md, a row for each claim; an experiment's time stands in its first row."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    for record in records:
        for i, finding in enumerate(record["summary"]["findings"].values()):
            name, *rest, took = (cell.replace("|", "\\|") for cell in cells(record, finding))
            row = (f"`{name}`" if i == 0 else "", *rest, took if i == 0 else "")
            lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def page(records: list[dict[str, Any]], out: Path) -> str:
    """The whole HTML page: contents, a row for each experiment, then their sections; claims first, then jobs."""
    verdicts = [finding["verdict"] for record in records for finding in record["summary"]["findings"].values()]
    jobs, devices = read_jobs(out), gpu.devices(out.parent / "gpu")
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        tally=", ".join(f"{count} {verdict}" for verdict, count in counts(verdicts).items()),
        claims=len(verdicts),
        experiments=len(records),
        took=duration(sum(record["seconds"] for record in records)),
        rows="\n".join(map(row, records)),
        job_rows="\n".join([*map(job_row, jobs), *map(device_row, devices)]),
        jobs=len(jobs) + len(devices),
        sections="\n".join(section(record, out) for record in records),
        job_sections="\n".join([*(job_section(record, out) for record in jobs), *map(device_section, devices)]),
    )


def read_jobs(out: Path) -> list[dict[str, Any]]:
    """The finished results in a folder that are on no claim and say what was found, by name."""
    records = (json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("*.json")))
    return [record for record in records if record.get("complete") and record.get("told", {}).get("found")]


def counts(verdicts: list[str]) -> dict[str, int]:
    """How often each verdict was given, those that support claims first."""
    return {verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts), key=len)}


def row(record: dict[str, Any]) -> str:
    """An experiment on claims in the contents: its question, and how many of its claims got which verdict."""
    verdicts = counts([finding["verdict"] for finding in record["summary"]["findings"].values()])
    told = " ".join(badge(verdict, f"{count} {verdict}") for verdict, count in verdicts.items())
    return f"<tr><td>{link(record, record['summary']['question'])}<td>{told}"


def job_row(record: dict[str, Any]) -> str:
    """Another experiment in the contents: its question, and the most telling of what was found."""
    return f"<tr><td>{link(record, record['told']['question'])}<td>{escaped(record['told']['found'][0])}"


def device_row(device: gpu.Device) -> str:
    """A kind of GPU in the contents."""
    return f"<tr><td><a href='#{device.key}'>{told_of(device)}</a><td>{escaped(device.found[0])}"


def told_of(device: gpu.Device) -> str:
    """The question that runs on a GPU answer."""
    return escaped(f"How fast are the kernels on a GPU ({device.card})?")


def device_section(device: gpu.Device) -> str:
    """A kind of GPU: what was found there."""
    found = "".join(f"<p>{escaped(sentence)}</p>" for sentence in device.found)
    return f"<section id='{device.key}'><h2>{told_of(device)}</h2>{found}</section>"


def link(record: dict[str, Any], text: str) -> str:
    """To the section of an experiment."""
    return f"<a href='#{record['experiment']}'>{escaped(text)}</a>"


def badge(verdict: str, text: str = "") -> str:
    """A verdict, coloured as well as told."""
    return f"<span class='verdict {verdict.replace(' ', '-')}'>{text or verdict}</span>"


def section(record: dict[str, Any], out: Path) -> str:
    """An experiment on claims: each with its verdict, the figure beside them, the design behind a click."""
    summary = record["summary"]
    claims = "\n".join(
        f"<li>{badge(f['verdict'])}<strong>{escaped(f['says'])}</strong> "
        f"<span class=small>{escaped(f['source'])}.</span><br>"
        f"<b>{escaped(shown(f))}</b>: {escaped(f['effect'])}; {len(f['samples'])} seeds."
        f" <span class=small>Rule: {escaped(f['rule'])}.</span></li>"
        for f in summary["findings"].values()
    )
    told = body(record, out, summary, f"<ul>{claims}</ul>", summary["caption"])
    return f"<section id='{record['experiment']}'><h2>{escaped(summary['question'])}</h2>{told}</section>"


def job_section(record: dict[str, Any], out: Path) -> str:
    """Another experiment: what was found, and the figure, behind a click: the contents have the most telling of it."""
    found = "".join(f"<p>{escaped(sentence)}</p>" for sentence in record["told"]["found"])
    return behind_a_click(record["experiment"], record["told"]["question"], body(record, out, record["told"], found))


def behind_a_click(key: str, question: str, told: str) -> str:
    """A section of which only the question is seen at first."""
    return (
        f"<section id='{key}'><details class=job><summary><h2>{escaped(question)}</h2></summary>{told}"
        "</details></section>"
    )


def body(record: dict[str, Any], out: Path, words: dict[str, Any], found: str, caption: str = "") -> str:
    """What was found beside the figure; behind a click, design and where it was measured."""
    told, seed = record["environment"], record["configuration"].get("seed")
    versions = ", ".join(f"{key} {told[key]}" for key in ("python", "jax", "flax", "optax", "jbn"))
    where = f"On {told['device']}, {told['cores']} cores; {versions}"
    where += "." if seed is None else f"; seed {seed}."
    design = "".join(f"<p>{escaped(paragraph)}</p>" for paragraph in words["design"].split("\n\n") if paragraph)
    below = f"<figcaption>{escaped(caption)}</figcaption>" if caption else ""
    figure = f"<figure>{drawing(record, out, caption or words['question'])}{below}</figure>"
    return (
        f"<div class=beside><div>{found}</div>{figure}</div>"
        f"<details><summary>How it was measured; took {duration(record['seconds'])}</summary>{design}"
        f"<p>{escaped(where)}</p></details>"
    )


def escaped(text: str) -> str:
    """Text as HTML; what was `code` in it stays so."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def drawing(record: dict[str, Any], out: Path, label: str) -> str:
    """The experiment's SVG, to stand inside the page: named for screen readers, in the page's colours.

    A wide page shows it whole, a narrow one in the parts that its file names (`cutting`), if any, row under row. Its
    ids get the experiment's name in front, since several drawings share the page.
    """
    name = record["experiment"]
    path = out / f"{name}.svg"
    if not path.exists():
        raise NothingToReport(f"{path} is missing beside its JSON file: run `{name}` again")
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    [(width, height)] = re.findall(r'<svg[^>]* viewBox="0 0 (\S+) (\S+)"', text)
    coverage = re.search(r"<dc:coverage>(.*?)</dc:coverage>", text)
    whole = [(0.0, 0.0, float(width), float(height))]
    cut = cutting.read(coverage.group(1) if coverage else "") or [whole]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in THEMED.items():
        text = re.sub(color, f"var({variable})", text, flags=re.IGNORECASE)
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    source = f"{opening} class=source aria-hidden=true>{rest}"
    begins = [False, *(lower[0][1] > upper[0][1] for upper, lower in itertools.pairwise(cut))]
    views = "".join(view(part, f"{name}-figure_1", below) for part, below in zip(cut, begins, strict=True))
    return (
        f'{source}<div role=img aria-label="{html.escape(label)}">'
        f"<div class=whole>{view(whole, f'{name}-figure_1')}</div><div class=parts>{views}</div></div>"
    )


def view(part: cutting.Part, source: str, below: bool = False) -> str:
    """A drawing that shows boxes of another side by side; `below`: it begins a row."""
    ends = list(itertools.accumulate((width for _, _, width, _ in part), initial=0.0))
    height = max(box[3] for box in part)
    shown_boxes = "".join(
        f'<svg x="{x:g}" y="0" width="{width:g}" height="{tall:g}" viewBox="{left:g} {top:g} {width:g} {tall:g}">'
        f'<use href="#{source}"/></svg>'
        for x, (left, top, width, tall) in zip(ends, part, strict=False)
    )
    row = "<i></i>" if below else ""
    return f'{row}<svg viewBox="0 0 {ends[-1]:g} {height:g}" style="--points: {ends[-1]:g}">{shown_boxes}</svg>'
