"""What the two kinds of experiment are, as the command line and the framework use them: modules of these members."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from experiments.framework.claim import Claim
from experiments.framework.record import Options, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

Configuration = dict[str, Any]  # every setting
Part = dict[str, Any]  # what tells one measurement from the others
Row = dict[str, Any]  # a part, and what was found


class Job(Protocol):
    """An experiment that runs itself.

    It may have `ENVIRONMENT`, variables to start with; `arguments(group)`; and `found(results)`, sentences of what was
    found, the most telling first, for the report. Its docstring's first line is the question.
    """

    def run(self, options: Options, results: Results) -> None:
        """Measures, appending each row to the results as it is finished."""
        ...

    def table(self, results: Results) -> Table:
        """What is printed."""
        ...

    def figure(self, results: Results) -> Figure:
        """Drawn from the results alone."""
        ...


class Study(Protocol):
    """An experiment on claims: `study.run` measures its parts one by one, each kept as it finishes, and judges.

    Its docstring's first line is the question and the rest the design.
    """

    __file__: str

    @property
    def CLAIMS(self) -> Mapping[str, Claim]:
        """By name."""
        ...

    @property
    def CAPTION(self) -> str:
        """What the figure shows, for those who see it and for those who do not."""
        ...

    def configuration(self, quick: bool) -> Configuration:
        """Every setting, `seeds` among them; `seed` and `quick` are added."""
        ...

    def parts(self, configuration: Configuration) -> list[Part]:
        """The measurements to take: a row of results each."""
        ...

    def measure(self, configuration: Configuration, part: Part) -> dict[str, Any]:
        """What was found, joined to the part in its row; arrays have seeds first."""
        ...

    def effects(self, rows: list[Row], configuration: Configuration) -> Mapping[str, Sequence[float]]:
        """Claim name → the effect for each seed."""
        ...

    def figure(self, results: Results) -> Figure:
        """Drawn from the results alone."""
        ...
