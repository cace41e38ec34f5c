"""How experiments on claims (`Study`) run: their parts one by one, each kept as it finishes, then the verdicts."""

import contextlib
import inspect
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments.framework.cache import Cache
from experiments.framework.claim import judge, shown
from experiments.framework.experiment import Configuration, Job, Part, Row, Study
from experiments.framework.record import Options, Results, plain, progress


def run(experiment: Study, options: Options, results: Results) -> None:
    """Measures every part that was not measured before, and judges the claims."""
    configuration = plain({"seed": options.seed, "quick": options.quick, **experiment.configuration(options.quick)})
    results.configuration = configuration
    cache = Cache(options.out / ".cache" / results.name, Path(experiment.__file__), configuration)
    parts = [plain(part) for part in experiment.parts(configuration)]
    with progress(len(parts)) as step:
        for part in parts:
            step(describe(part))
            results.rows.append(cache.once(part, lambda part=part: timed(experiment, configuration, part)))
    # of the measuring itself, whenever that was
    results.seconds = round(sum(row["seconds"] for row in results.rows), 2)
    conclude(experiment, results)


def conclude(experiment: Study, results: Results) -> None:
    """The claims judged by the rows of the results, and what the experiment says of itself."""
    configuration = results.configuration
    effects = experiment.effects(results.rows, configuration)
    if effects.keys() != experiment.CLAIMS.keys():
        raise ValueError(f"effects must return {list(experiment.CLAIMS)}, as CLAIMS has, got {list(effects)}")
    results.summary = {
        **told(experiment),
        "findings": {
            name: judge(claim, effects[name], configuration["quick"]) for name, claim in experiment.CLAIMS.items()
        },
    }


def told(experiment: Study) -> dict[str, str]:
    """What an experiment's file says of itself: the question, the design, and what the figure shows."""
    return {**words(experiment), "caption": experiment.CAPTION}


def words(experiment: Study | Job) -> dict[str, str]:
    """The question and the design, as the file's docstring has them."""
    question, _, design = (inspect.getdoc(experiment) or "").partition("\n")
    return {"question": question, "design": design.strip()}


def timed(experiment: Study, configuration: Configuration, part: Part) -> Row:
    """The row of one part, with the seconds that it took."""
    import jax

    started = time.perf_counter()
    # on a CPU the newer way to draw random numbers takes up to ten times as long to compile
    with jax.threefry_partitionable(False), optimizing(not configuration["quick"]):
        found = experiment.measure(configuration, part)
    if taken := part.keys() & found.keys():
        raise ValueError(f"measure returned {sorted(taken)}, which tell the part {part} apart: name them otherwise")
    return {**part, **found, "seconds": round(time.perf_counter() - started, 2)}


@contextlib.contextmanager
def optimizing(wanted: bool) -> Iterator[None]:
    """Programs compiled in the block are optimized only if `wanted`: a quick run does little but compile."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", before or not wanted)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def find(rows: Sequence[Row], **wanted: Any) -> Row:
    """The one row that has these values.

    Raises:
      LookupError: none has, or several have.
    """
    found = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    if len(found) != 1:
        raise LookupError(f"{len(found)} of {len(rows)} rows have {describe(wanted)}, expected one")
    return found[0]


def describe(part: Part) -> str:
    """A part in words."""
    return ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in part.items())


def table(results: Results) -> Any:
    """The claims, their measured effects and the verdicts."""
    from rich.table import Table

    shown_table = Table(title=results.summary["question"], caption="Mean over seeds (95 % interval).")
    for column in ("claim", "measured", "effect", "verdict"):
        shown_table.add_column(column)
    for finding in results.summary["findings"].values():
        shown_table.add_row(finding["says"], finding["effect"], shown(finding), finding["verdict"], end_section=True)
    return shown_table
