"""The report on a folder of results: one HTML page that needs nothing else, and one Markdown table."""

import html
import json
import re
import string
from pathlib import Path
from typing import Any

from experiments.framework import plots
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
    """The whole HTML page."""
    findings = [(record, finding) for record in records for finding in record["summary"]["findings"].values()]
    verdicts = [finding["verdict"] for _, finding in findings]
    counts = {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(sorted(verdicts, key=len))}
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        tally=", ".join(f"{count} {verdict}" for verdict, count in counts.items()),
        claims=len(findings),
        experiments=len(records),
        took=duration(sum(record["seconds"] for record in records)),
        head="".join(f"<th scope=col>{column}</th>" for column in COLUMNS),
        rows="\n".join(row(record, finding) for record, finding in findings),
        sections="\n".join(section(record, out) for record in records),
    )


def row(record: dict[str, Any], finding: dict[str, Any]) -> str:
    """One finding in the table on top: on a narrow screen each cell is a line with its column's name."""
    name, *rest = map(html.escape, cells(record, finding))
    marked = [f"<a href='#{name}'>{name}</a>", *rest]
    marked[3] = badge(finding["verdict"])
    named = zip(COLUMNS, marked, strict=True)
    return "<tr>" + "".join(f"<td data-column='{column}'>{cell}</td>" for column, cell in named) + "</tr>"


def badge(verdict: str) -> str:
    """A verdict, coloured as well as told."""
    return f"<span class='verdict {verdict.replace(' ', '-')}'>{verdict}</span>"


def section(record: dict[str, Any], out: Path) -> str:
    """One experiment: the question, each claim and its verdict, the figure, the design and where it was measured."""
    summary, told = record["summary"], record["environment"]
    claims = "\n".join(
        f"<li>{badge(f['verdict'])} <strong>{escaped(f['says'])}</strong> <span class=source>{escaped(f['source'])}"
        f"</span><br>{escaped(f['effect'])}: <b>{escaped(shown(f))}</b>, {len(f['samples'])} seeds."
        f" <span class=rule>Rule, written before the run: {escaped(f['rule'])}.</span></li>"
        for f in summary["findings"].values()
    )
    design = "".join(f"<p>{escaped(paragraph)}</p>" for paragraph in summary["design"].split("\n\n"))
    versions = ", ".join(f"{key} {told[key]}" for key in ("python", "jax", "flax", "optax", "jbn"))
    where = f"{duration(record['seconds'])} on {told['device']}, {told['cores']} cores; {versions}; seed "
    return (
        f"<section id='{record['experiment']}'><h2>{escaped(summary['question'])}</h2><ul>{claims}</ul>"
        f"<figure><div class=scroll tabindex=0 role=group aria-label='figure'>{drawing(record, out)}</div>"
        f"<figcaption>{escaped(summary['caption'])}</figcaption></figure>{design}"
        f"<p class=where>{escaped(where)}{record['configuration']['seed']}.</p></section>"
    )


def escaped(text: str) -> str:
    """Text as HTML; what was `code` in it stays so."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def drawing(record: dict[str, Any], out: Path) -> str:
    """The experiment's SVG, to stand inside the page: named for screen readers, in the page's colours.

    Its ids get the experiment's name in front, since several drawings share the page.
    """
    name = record["experiment"]
    path = out / f"{name}.svg"
    if not path.exists():
        raise NothingToReport(f"{path} is missing beside its JSON file: run `{name}` again")
    text = path.read_text(encoding="utf-8")
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text)
    for color, variable in THEMED.items():
        text = re.sub(color, f"var({variable})", text, flags=re.IGNORECASE)
    opening, rest = text.split(">", 1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)
    label = html.escape(record["summary"]["caption"])
    return f'{opening} role="img" aria-label="{label}"><title>{label}</title>{rest}'
